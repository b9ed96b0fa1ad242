"""Pictures that a command is given, in a stable order, with their prompts."""

import json
from pathlib import Path

import pytest

from srpo_cli.errors import UsageError
from srpo_cli.runtime.inputs import Picture, list_pictures, read_rows, with_prompts


@pytest.fixture
def tree(tmp_path) -> Path:
    for name in ("b/2.png", "b/10.jpg", "a.webp", "b/c/x.PNG", ".hidden/y.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(pictures, root):
    return [Path(picture.file).relative_to(root).as_posix() for picture in pictures]


def test_a_folder_is_all_its_pictures_in_the_order_of_their_names(tree):
    found = list_pictures([str(tree)])
    assert names(found, tree) == ["a.webp", "b/10.jpg", "b/2.png", "b/c/x.PNG"]
    assert all(picture.found for picture in found)


def test_what_is_named_is_taken_in_the_order_given_whatever_its_ending(tree):
    given = [str(tree / "b/notes.txt"), str(tree / "a.webp")]
    assert list_pictures(given) == [Picture(path) for path in given]


def test_a_run_stands_for_the_pictures_of_its_fixed_prompts(tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "before_after.png").touch()
    for step in ("step-000000", "step-000010"):
        (tmp_path / "samples" / step).mkdir(parents=True)
        (tmp_path / "samples" / step / "00.png").touch()
        (tmp_path / "samples" / f"{step}.png").touch()  # the sheet of that step
    assert names(list_pictures([str(tmp_path)]), tmp_path) == [
        "samples/step-000000/00.png",
        "samples/step-000010/00.png",
    ]


@pytest.mark.parametrize(("make", "said"), [(False, "does not exist"), (True, "holds no picture")])
def test_nothing_there_is_told(tmp_path, make, said):
    if make:
        (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=said):
        list_pictures([str(tmp_path / "empty")])


def test_rows_name_a_file_or_an_image_and_are_read_one_at_a_time():
    def lines():
        yield '{"file": "a.png", "prompt": "one", "seed": 1}\n'
        yield "\n"
        yield '{"image": "b.png"}\n'
        raise AssertionError("read too far")

    rows = read_rows(lines())
    assert next(rows) == Picture("a.png", "one", row={"file": "a.png", "prompt": "one", "seed": 1})
    assert next(rows).prompt is None


@pytest.mark.parametrize("line", ["a.png", "[1]", "{}", '{"file": 3}', '{"file": "a", "prompt": 3}', '{"file": "a"'])
def test_a_line_that_is_no_row_is_told_by_number(line):
    with pytest.raises(UsageError, match="line 2"):
        list(read_rows(['{"file": "a"}', line]))


def test_prompts_go_by_order_or_by_name(tree):
    pictures = list_pictures([str(tree)])
    (tree / "p.txt").write_text("one\ntwo\nthree\nfour\n")
    assert [p.prompt for p in with_prompts(pictures, str(tree / "p.txt"))] == ["one", "two", "three", "four"]
    rows = [{"file": "b/2.png", "prompt": "two"}, {"file": "x.PNG", "prompt": "ex"}]
    (tree / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p.prompt for p in with_prompts(pictures, str(tree / "p.jsonl"))] == [None, None, "two", "ex"]
    (tree / "p.csv").write_text("prompt,image\nten,b/10.jpg\n")
    assert [p.prompt for p in with_prompts(pictures, str(tree / "p.csv"))] == [None, "ten", None, None]


def test_as_many_prompts_as_pictures_are_needed(tree):
    (tree / "p.txt").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match="2 prompts for 4 pictures"):
        with_prompts(list_pictures([str(tree)]), str(tree / "p.txt"))


def test_a_name_that_means_two_pictures_is_refused_and_one_with_its_folder_is_not(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").touch()
    pictures = list_pictures([str(tmp_path)])
    (tmp_path / "p.csv").write_text("file,prompt\n0.png,one\n")
    with pytest.raises(UsageError, match=r"several pictures by 0\.png"):
        with_prompts(pictures, str(tmp_path / "p.csv"))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "p.csv").write_text("file,prompt\na/0.png,one\nb/0.png,two\n")
    monkeypatch.chdir(tmp_path)  # the names are of the working directory, not of the list's
    assert [p.prompt for p in with_prompts(pictures, str(tmp_path / "lists" / "p.csv"))] == ["one", "two"]
