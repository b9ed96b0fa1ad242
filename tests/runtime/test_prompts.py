"""Prompts from files and standard input, and what is said of files that hold none."""

import io

import pytest

from srpo_cli.errors import UsageError
from srpo_cli.runtime.prompts import read_prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a red sphere\n\n a blue cone \n"),
        ("p.jsonl", '{"prompt": "a red sphere", "id": 1}\n{"prompt": "a blue cone"}\n'),
        ("p.csv", 'id,prompt\n1,a red sphere\n2,"a blue cone"\n'),
    ],
)
def test_every_format_gives_the_same_prompts(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_prompts(str(tmp_path / name)) == ["a red sphere", "a blue cone"]


@pytest.mark.parametrize("text", ["a red sphere\n", '{"prompt": "a red sphere"}\n'])
def test_standard_input_is_text_or_json_lines(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert read_prompts("-") == ["a red sphere"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", " \n\n", "holds no prompt"),
        ("p.jsonl", '{"text": "x"}\n', "line 1"),
        ("p.csv", "id,text\n1,x\n", "no column 'prompt'"),
    ],
)
def test_a_file_without_prompts_is_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        read_prompts(str(tmp_path / name))


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="cannot read prompts"):
        read_prompts(str(tmp_path / "nope.txt"))
