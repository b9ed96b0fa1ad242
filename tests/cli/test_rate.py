"""``srpo eval rate`` as a user types it: making a study, serving it, and how far it is."""

import builtins
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.request import urlopen

import pandas as pd
import pytest
from PIL import Image

from srpo_cli.cli.errors import one_line_errors
from srpo_cli.cli.rate import app
from srpo_cli.config.benchmark import Benchmark
from srpo_cli.metrics.aggregate import Measure
from srpo_cli.recipes.results import Result, summarise, write_result

PROMPTS = ("a red sphere", "a blue cone", "a green cube", "a yellow pyramid")


@pytest.fixture
def rate(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``srpo eval rate`` with arguments in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            with one_line_errors():
                code = app(args=list(arguments), prog_name="rate", standalone_mode=False) or 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Two folders of pictures, each with its prompt beside it."""
    monkeypatch.chdir(tmp_path)
    for arm in ("base", "ours"):
        (tmp_path / arm).mkdir()
        for number, prompt in enumerate(PROMPTS):
            Image.new("RGB", (16, 16), (40 * number, len(arm), 0)).save(tmp_path / arm / f"{number}.png")
            (tmp_path / arm / f"{number}.txt").write_text(prompt)


ARMS = ("--arm", "base=base", "--arm", "ours=ours")


def ids(folder: str = "study") -> dict[str, dict]:
    return json.loads(Path(folder, "private", "key.json").read_text())


def test_a_study_is_made_and_says_what_comes_next(rate):
    code, out, err = rate("new", "study", *ARMS, "--raters", "3", "--experts", "1")
    assert (code, out) == (0, "")
    assert "study: 4 prompts, 8 pictures, 3 raters, 3 for each prompt" in err
    assert "Next: srpo eval rate serve study" in err
    facts = json.loads(Path("study/study.json").read_text())
    assert (facts["name"], facts["mode"], facts["k"], facts["seed"]) == ("study", "grades", 3, 0)
    assert "base" not in Path("study/study.json").read_text()
    assert next(iter(ids().values()))["arm"] == "base"  # the first arm is what others are compared with


def test_the_paper_s_protocol_is_what_is_not_said_otherwise(rate):
    assert rate("new", "study", *ARMS)[0] == 0
    facts = json.loads(Path("study/study.json").read_text())
    assert (facts["raters"], facts["experts"], facts["k"]) == (10, 3, 5)
    assert [dimension["name"] for dimension in facts["dimensions"]] == [
        *("alignment", "realism", "detail", "aesthetics", "overall"),
    ]
    assert list(facts["dimensions"][0]["grades"]) == ["Excellent", "Good", "Pass", "Fail"]


def test_what_is_asked_can_be_chosen(rate):
    options = ["--mode", "pairs", "--raters", "2", "--per-prompt", "1", "--repeats", "0", "--seed", "7"]
    assert rate("new", "study", *ARMS, *options, "--name", "krea")[0] == 0
    facts = json.loads(Path("study/study.json").read_text())
    assert (facts["name"], facts["mode"], facts["k"], facts["seed"]) == ("krea", "pairs", 1, 7)
    with closing(sqlite3.connect("study/answers.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM tasks").fetchone() == (4,)


def write_result_here() -> None:
    """The pictures as a result of ``srpo eval``."""
    prompts = {"layout": "lines", "files": ["prompts.txt"]}
    benchmark = Benchmark.model_validate(
        {"name": "tiny", "description": "Four prompts", "prompts": prompts, "metrics": ["hpsv2.1"]}
    )
    rows = [
        {
            "model": arm,
            "item": f"{number:05d}",
            "group": "",
            "prompt": prompt,
            "image": 0,
            "file": f"{arm}/{number}.png",
        }
        for arm in ("base", "ours")
        for number, prompt in enumerate(PROMPTS)
    ]
    table = pd.DataFrame(rows).assign(seed=0, **{"hpsv2.1": 0.25})
    measures = [Measure("hpsv2.1", "HPS", ("hpsv2.1",))]
    data = summarise(table, measures, benchmark, {}, [{"label": "base"}, {"label": "ours"}])
    write_result(Result(data, table, Path()))


@pytest.mark.parametrize("named", [".", "results.json"])
def test_the_models_of_a_result_are_arms(rate, named):
    write_result_here()
    code, _, err = rate("new", "study", "--from", named, "--arm", "ours", "--arm", "base")
    assert code == 0 and "study: 4 prompts, 8 pictures" in err
    assert {entry["arm"]: Path(entry["file"]).parent.name for entry in ids().values()} == {
        "ours": "ours",
        "base": "base",
    }
    Path("images.parquet").unlink()
    code, _, err = rate("new", "again", "--from", named)
    assert code == 2 and "has no images.parquet, which says what its pictures show" in err


@pytest.mark.parametrize(("command", "words"), [("new", "10 tasks or more"), ("status", "repeated answers")])
def test_help_says_how_far_apart_and_what_is_counted(rate, command, words):
    assert words in " ".join(rate(command, "--help")[1].split())


def test_training_items_are_read(rate):
    row = {"image": "base/0.png", "prompt": "a red sphere", "grades": {"detail": "Pass"}}
    Path("lessons.jsonl").write_text(json.dumps(row))
    assert rate("new", "study", *ARMS, "--training", "lessons.jsonl")[0] == 0
    with closing(sqlite3.connect("study/answers.sqlite")) as database:
        rows = database.execute("SELECT position, known FROM tasks WHERE kind = 'training'").fetchall()
    assert rows == [(0, '{"detail": 1}')] * 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to compare: give --arm NAME=DIR"),
        (("--arm", "base"), "--arm base: give NAME=DIR"),
        (("--arm", "base=base", "--arm", "base=ours"), "--arm base is given twice"),
        (("--arm", "base=nowhere"), "--arm base=nowhere: there is no such folder"),
        (("--from", "base"), "base/results.json does not exist: give the results.json of srpo eval"),
        (("--from", "base", "--arm", "a=b"), "--arm a=b names a folder: with --from give the name of a model"),
        (("--from", "base", "--prompts", "p.txt"), "--prompts p.txt is of no use with --from"),
        ((*ARMS, "--raters", "2", "--per-prompt", "3"), "--per-prompt 3 is more than --raters 2"),
        ((*ARMS, "--training", "nowhere.jsonl"), "cannot read training items from nowhere.jsonl"),
        (("--arm", "base=base", "--mode", "pairs"), "pairs need two arms or more, here is 1"),
        ((*ARMS, "--repeats", "2"), "--repeats"),
        ((*ARMS, "--mode", "stars"), "--mode"),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(rate, arguments, message):
    code, out, err = rate("new", "study", *arguments)
    assert (code, out) == (2, "")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert sorted(path.name for path in Path().iterdir() if path.name != "lessons.jsonl") == ["base", "ours"]


def test_a_missing_picture_is_named(rate):
    Path("ours/2.png").unlink()
    code, _, err = rate("new", "study", *ARMS)
    assert code == 2 and "arm ours has no picture of 'a green cube'" in err


def answer(rater: str, value: int, seconds: float) -> None:
    """All of a rater's answers at once, as if given on the page."""
    from srpo_cli.study.store import Change, Store

    store = Store(Path("study"))
    while (standing := store.standing(rater)).task:
        change = Change(
            f"{standing.task.task}.{standing.dimension}",
            standing.task.task,
            standing.dimension,
            value if standing.dimension == "realism" else 2,
            int(1000 * seconds),
        )
        store.record(rater, change)


def test_status_tells_how_far_everyone_is_and_what_awaits_the_experts(rate):
    rate("new", "study", *ARMS, "--raters", "2", "--experts", "2", "--repeats", "0.25")
    code, out, err = rate("status", "study")
    assert code == 0 and "0 of 10" in out and "repeated answers" in out and err == ""
    answer("r01", 0, 2.5)
    answer("r02", 3, 1.0)
    _, out, err = rate("status", "study")
    assert re.search(r"r01 +rater +10 of 10 +2\.5 +10\b", out) and re.search(r"e01 +expert +0 of 0", out)
    assert "raters differ on 8 pictures: srpo eval rate resolve study" in err
    assert "8 new pictures for the experts" in rate("resolve", "study")[2]
    document = json.loads(rate("status", "study", "--format", "json")[1])
    assert document["disputed_pictures"] == {"unresolved": 0, "with_experts": 8}
    assert [each["total"] for each in document["raters"]] == [10, 10, 4, 4]
    assert document["raters"][0] == {
        **{"rater": "r01", "role": "rater", "done": 10, "total": 10, "median_seconds": 2.5, "repeats": 10}
    }
    answer("e01", 1, 1.0)
    assert "pictures that await the experts' answers: 4" in rate("status", "study")[2]


def test_a_single_arm_is_graded_with_a_note_and_what_is_one_is_no_plural(rate):
    code, _, err = rate("new", "study", "--arm", "base=base", "--raters", "1", "--experts", "1")
    assert code == 0
    assert "study: 4 prompts, 4 pictures, 1 rater, 1 for each prompt" in err.splitlines()
    assert "note: base is the only arm: its grades are compared with nothing" in err.splitlines()
    assert "only arm" not in rate("new", "two", *ARMS)[2]
    answer("r01", 3, 1.0)
    assert rate("analyze", "study")[0] == 0


def test_one_disputed_picture_is_no_plural(rate):
    for path in [*Path("base").glob("[1-3].*")]:
        path.unlink()
    rate("new", "study", "--arm", "base=base", "--raters", "2", "--experts", "1", "--repeats", "0")
    answer("r01", 0, 1.0)
    answer("r02", 3, 1.0)
    assert "raters differ on 1 picture: srpo eval rate resolve study" in rate("status", "study")[2]
    assert "1 new picture for the experts" in rate("resolve", "study")[2]
    assert "pictures that await the experts' answers: 1" in rate("status", "study")[2]


def test_a_study_without_experts_is_not_told_to_resolve(rate):
    rate("new", "study", *ARMS, "--raters", "2", "--experts", "0")
    answer("r01", 0, 1.0)
    answer("r02", 3, 1.0)
    code, _, err = rate("status", "study")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("command", ["status", "serve", "resolve", "export", "analyze"])
def test_a_damaged_database_is_one_line_before_anybody_gets_a_link(rate, command):
    rate("new", "study", *ARMS)
    Path("study/answers.sqlite").write_text("xx\n")
    code, out, err = rate(command, "study")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "study/answers.sqlite is no database of answers (file is not a database): restore it from a backup" in err


@pytest.mark.parametrize("command", ["status", "serve", "resolve"])
def test_a_folder_that_is_no_study_is_one_line(rate, command):
    code, _, err = rate(command, "base")
    assert code == 2 and err.splitlines() == [
        "error: base is no study, it has no study.json: make one with `srpo eval rate new`"
    ]


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_what_is_not_installed_is_told_with_the_command(rate, monkeypatch, package):
    rate("new", "study", *ARMS)
    real = builtins.__import__

    def without(name: str, *rest):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    for name in [name for name in sys.modules if name.partition(".")[0] == package or name.endswith("study.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    code, _, err = rate("serve", "study")
    assert code == 4 and "pip install 'srpo-cli[rate]'" in err and package in err


def test_serving_prints_one_link_each_and_answers_on_this_machine_only(rate):
    rate("new", "study", *ARMS, "--raters", "2", "--experts", "1")
    command = "from srpo_cli.cli.rate import app; app(prog_name='rate')"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "serve", "study", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run that a shell put into the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines = [process.stdout.readline() for _ in range(4)]
    links = [re.search(r"http://127\.0\.0\.1:(\d+)/r/[\w-]{32}/", line) for line in lines[1:]]
    assert all(links) and len({link[0] for link in links}) == 3
    assert b"Picture study" in urlopen(links[0][0]).read()
    code, _, err = rate("serve", "study", "--port", links[0][1])
    assert code == 2 and f"cannot listen on 127.0.0.1 port {links[0][1]}" in err and "--port" in err
    assert listening_addresses(int(links[0][1])) == {"0100007F"}
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert out == ""  # each link was printed once
    assert process.returncode in (130, -signal.SIGINT)


def listening_addresses(port: int) -> set[str]:
    """Addresses on which something listens on a port, as Linux writes them; the first in IPv6 too."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{os.getpid()}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A" and int(local.split(":")[1], 16) == port:
                found.add(local.split(":")[0])
    return found


def test_a_port_or_url_that_cannot_be_is_refused(rate):
    rate("new", "study", *ARMS)
    assert rate("serve", "study", "--port", "70000")[0] == 2
    code, _, err = rate("serve", "study", "--url", "rate.example.org")
    assert code == 2 and "--url rate.example.org: give it as" in err
    code, _, err = rate("serve", "study", "--host", "no.such.host.invalid")
    assert code == 2 and "cannot listen on no.such.host.invalid" in err


def test_light_commands_load_nothing_heavy():
    command = (
        "import sys; import srpo_cli.cli.rate, srpo_cli.study.store, srpo_cli.study.server; "
        "print(sorted({'torch', 'numpy', 'pandas', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout.strip() == "[]"


def test_analyze_says_how_many_resolutions_are_outstanding(rate):
    rate("new", "study", *ARMS, "--raters", "2", "--experts", "2")
    answer("r01", 0, 1.0)
    answer("r02", 3, 1.0)
    assert "Resolutions outstanding: 8 to be given to the experts" in rate("analyze", "study")[2]
    rate("resolve", "study")
    answer("e01", 1, 1.0)
    assert "0 to be given to the experts (`srpo eval rate resolve`), 4 to be answered" in rate("analyze", "study")[2]
    answer("e02", 1, 1.0)
    assert "outstanding" not in rate("analyze", "study")[2]
