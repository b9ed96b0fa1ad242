"""Prompts from files and standard input, and what is said of files that hold none."""

import io

import pandas as pd
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


def test_a_parquet_file_gives_its_prompt_column(tmp_path):
    file = tmp_path / "p.parquet"
    pd.DataFrame({"id": [1, 2, 3], "prompt": ["a red sphere", None, " a blue cone "]}).to_parquet(file)
    assert read_prompts(str(file)) == ["a red sphere", "a blue cone"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["x"]}, "no column 'prompt': its columns are text"),
        ({"prompt": [7]}, "row 1: prompt is 7, not a text"),
        ({"prompt": [""]}, "holds no prompt"),
    ],
)
def test_a_parquet_file_without_prompts_is_one_line(tmp_path, columns, message):
    file = tmp_path / "p.parquet"
    pd.DataFrame(columns).to_parquet(file)
    with pytest.raises(UsageError, match=message):
        read_prompts(str(file))


def test_a_file_that_is_not_parquet_or_not_there_is_one_line(tmp_path):
    (tmp_path / "p.parquet").write_text("a red sphere")
    with pytest.raises(UsageError, match="is not Parquet") as failure:
        read_prompts(str(tmp_path / "p.parquet"))
    assert "\n" not in str(failure.value)
    with pytest.raises(UsageError, match=r"cannot read prompts from .*nope"):
        read_prompts(str(tmp_path / "nope.parquet"))
