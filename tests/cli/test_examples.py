"""Every example in the help of `srpo score` and `srpo eval` works as it is printed, on the miniature, offline."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from srpo_cli.cli import eval as evaluation
from srpo_cli.cli import score
from srpo_cli.config.load import dump_yaml, load_train_config
from srpo_cli.miniature import WEIGHTS

PROMPTS = [
    f"{'an' if colour == 'orange' else 'a'} {colour} {shape} on {ground}"
    for colour, shape, ground in [
        ("red", "sphere", "sand"),
        ("blue", "cone", "snow"),
        ("green", "cube", "grass"),
        ("yellow", "cylinder", "a wooden table"),
        ("orange", "sphere", "a checkered floor"),
        ("purple", "cube", "sand"),
        ("red", "cone", "grass"),
        ("blue", "sphere", "a wooden table"),
    ]
]


def examples(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r"(srpo|\w+ .*\| srpo) ", line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with eight pictures of the miniature in ``images``, as `srpo sample` leaves them."""
    from srpo_cli.recipes.sample import Request, sample
    from srpo_cli.runtime.sources import Source

    folder = tmp_path_factory.mktemp("examples")
    list(sample(Source("miniature"), Request(PROMPTS), folder / "images"))
    return folder


@pytest.mark.parametrize("example", examples(score.EXAMPLES))
def test_the_example_works(example, folder, srpo, monkeypatch):
    monkeypatch.chdir(folder)
    piped = ""
    for command in example.split(" | "):
        program, *arguments = shlex.split(command)
        assert program == "srpo"
        monkeypatch.setattr("sys.stdin", io.StringIO(piped))
        outcome = srpo(*(arguments[: arguments.index(">")] if ">" in arguments else arguments))
        assert outcome.exit_code == 0, outcome.stderr
        piped = outcome.stdout
    assert piped
    if "jsonl" in example:
        assert all(isinstance(json.loads(line), dict) for line in piped.splitlines())


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An empty folder to type in, without weights; makes runs/realism, a run of a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("srpo_cli.runtime.devices.has_accelerator", lambda: False)

    def make(model: str) -> None:
        checkpoint = Path("runs/realism/checkpoints/step-000001")
        checkpoint.mkdir(parents=True)
        resolved = load_train_config("realism", flags={"model.name": model}, miniature=model == "miniature")
        Path("runs/realism/config.yaml").write_text(dump_yaml(resolved))
        (checkpoint / "state.json").write_text('{"step": 1}')
        shutil.copytree(WEIGHTS / "pipeline" / "transformer", checkpoint / "transformer")

    return make


@pytest.mark.parametrize("example", [example for example in examples(evaluation.EXAMPLES) if "hpdv2" not in example])
def test_the_example_of_an_evaluation_works(example, runs, srpo):
    runs("miniature")
    Path("prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n")
    _, *arguments = shlex.split(example)
    if "show" in arguments:
        assert srpo("eval", "miniature", "--benchmark", "miniature", "--limit", "2").exit_code == 0
        assert srpo("eval", "other=miniature", "--benchmark", "miniature", "--limit", "2", "-o", "other").exit_code == 0
    outcome = srpo(*arguments, *([] if "show" in arguments else ["--limit", "2"]))
    assert outcome.exit_code == 0, outcome.stderr
    assert len(re.findall(r"^report: (evals/\w+/report.html)$", outcome.stderr, re.MULTILINE)) == 1


@pytest.mark.parametrize("example", [example for example in examples(evaluation.EXAMPLES) if "hpdv2" in example])
def test_the_example_of_an_evaluation_on_hpdv2_lacks_nothing_but_the_prompts(example, runs, srpo):
    runs("flux.1-dev")
    Path("pictures").mkdir()
    _, *arguments = shlex.split(example.replace(" --gpus 8", ""))  # eight processes are many for one refusal
    outcome = srpo(*arguments)
    assert outcome.exit_code == 4, outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("error: the prompts of hpdv2 are not here: fetch them with")


def test_there_are_examples():
    assert len(examples(score.EXAMPLES)) >= 5
    assert len(examples(evaluation.EXAMPLES)) >= 5
