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
        ("p.TXT", "\ufeffa red sphere\r\na blue cone\r\n"),
        ("p.csv", "\ufeffprompt\r\na red sphere\r\n\r\na blue cone\r\n"),
    ],
)
def test_every_format_gives_the_same_prompts(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
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
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": null}\n', "line 2: prompt is null"),
        ("p.csv", "id,text\n1,x\n", "no column 'prompt'"),
        ("p.csv", "", "its columns are none"),
        ("p.csv", 'prompt\n"' + "x" * 200_000, "not CSV"),
        ("p.json", '["x"]', "write it as .jsonl"),
    ],
)
def test_a_file_without_prompts_is_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        read_prompts(str(tmp_path / name))


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="cannot read prompts"):
        read_prompts(str(tmp_path / "nope.txt"))


def test_a_prompt_keeps_its_own_line_breaks(tmp_path):
    (tmp_path / "p.csv").write_text('prompt\n"one\ntwo"\n')
    (tmp_path / "p.jsonl").write_text('{"prompt": "one\u2028two"}\n', encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.csv")) == ["one\ntwo"]
    assert read_prompts(str(tmp_path / "p.jsonl")) == ["one\u2028two"]


def test_bytes_that_are_no_text_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8 text"):
        read_prompts(str(tmp_path / "p.txt"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xff"), "utf-8", errors="surrogateescape"))
    with pytest.raises(UsageError, match="standard input: not UTF-8 text"):
        read_prompts("-")
