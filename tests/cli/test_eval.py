"""``srpo eval`` as it is typed: what it prints and leaves behind, its exit codes, and everything that it refuses."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image

from srpo_cli.cli.app import main
from srpo_cli.cli.eval import with_run
from srpo_cli.config.benchmark import benchmark_names
from srpo_cli.config.load import dump_yaml, load_train_config
from srpo_cli.miniature import WEIGHTS
from srpo_cli.miniature.world import draw_prompts

LIMIT = 4
WORLD = ("--benchmark", "miniature", "--limit", str(LIMIT))
QUICK = (*WORLD, "--metric", "statistics")
FILES = {"results.json", "images.parquet", "pictures", "scores", "table.md", "table.tex", "report.html"}
STYLES = ("anime", "concept-art", "paintings", "photo")


@pytest.fixture(scope="module", autouse=True)
def no_accelerator():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srpo_cli.runtime.devices.has_accelerator", lambda: False)
        for module in ("srpo_cli.recipes.benchmark", "srpo_cli.recipes.sample", "srpo_cli.runtime.devices"):
            patch.setattr(f"{module}.best_device", lambda: torch.device("cpu"))
        yield


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test types its commands in an empty folder, on a machine without weights."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A run folder with one checkpoint, whose transformer is the miniature's with every weight 2 % larger."""
    run = tmp_path_factory.mktemp("runs") / "realism"
    checkpoint = run / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    resolved = load_train_config("realism", flags={"model.name": "miniature"}, miniature=True)
    (run / "config.yaml").write_text(dump_yaml(resolved))
    (checkpoint / "state.json").write_text('{"step": 2}')
    transformer = FluxTransformer2DModel.from_pretrained(WEIGHTS / "pipeline" / "transformer", dtype=torch.float32)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.02)
    transformer.save_pretrained(checkpoint / "transformer")
    return run


@pytest.fixture(scope="module")
def evaluated(tuned, tmp_path_factory) -> Path:
    """A result of the miniature and a run. To be read only: see ``copied``."""
    folder = tmp_path_factory.mktemp("evaluated") / "result"
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as stop:
        main(["eval", "base=miniature", str(tuned), *WORLD, "--output", str(folder)])
    assert not stop.value.code
    return folder


@pytest.fixture
def copied(evaluated, tmp_path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "copied"))


@pytest.fixture
def result(evaluated) -> dict:
    return read(evaluated)


def read(folder: Path | str) -> dict:
    return json.loads((Path(folder) / "results.json").read_text())


def refused(outcome, *parts: str, exit_code: int = 2) -> None:
    """One line, on stderr, and nothing was written where the command was typed."""
    assert (outcome.exit_code, outcome.stdout) == (exit_code, ""), outcome.stderr
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def write_styles(folder: Path, each: int) -> None:
    """HPDv2's format with prompts of the miniature's world."""
    prompts = draw_prompts(len(STYLES) * each, 3, "evaluation")
    (folder / "benchmark").mkdir(parents=True)
    for number, style in enumerate(STYLES):
        own = prompts[number * each : (number + 1) * each]
        (folder / "benchmark" / f"{style}.json").write_text(json.dumps(own))


SMALL = """
extends: hpdv2
prompts:
  groups: {anime: 3, concept-art: 3, paintings: 3, photo: 3}
metrics: [oracle, miniature, "sgp:miniature", statistics]
steps: 3
size: [48, 48]
batches: 3
"""


# --- run ----------------------------------------------------------------------------------------------------------


def test_it_writes_a_folder_prints_a_table_and_says_where_the_report_is(srpo):
    outcome = srpo("eval", "miniature", *WORLD, "-o", "out")
    assert outcome.exit_code == 0
    assert {path.name for path in Path("out").iterdir()} == FILES
    assert len(list(Path("out/pictures/miniature").glob("*-seed*.png"))) == LIMIT
    head, row = outcome.stdout.splitlines()[:2]
    assert head.split()[:3] == ["model", "photo", "distance"] and row.split()[0] == "miniature"
    assert f"{read('out')['figures']['miniature']['all']['photo_distance']['mean']:.3f}" in row
    assert outcome.stderr.splitlines() == [
        "miniature: drawing 4 pictures of 4 prompts",
        "note: Only 4 different prompts: intervals and p values of so few are rough.",
        "report: out/report.html",
    ]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("eval a -b x", "eval run a -b x"),
        ("eval -b x a", "eval run -b x a"),
        ("eval run a -b x", "eval run a -b x"),
        ("eval show out", "eval show out"),
        ("eval rate new", "eval rate new"),
        ("eval --help", "eval --help"),
        ("eval", "eval"),
        ("score eval", "score eval"),
        ("", ""),
    ],
)
def test_run_may_be_left_out(given, meant):
    assert with_run(given.split()) == meant.split()


def test_with_and_without_run_are_the_same_and_the_second_call_draws_nothing(srpo):
    first = srpo("eval", "miniature", *WORLD, "-o", "out")
    one = read("out")
    times = {path: path.stat().st_mtime_ns for path in Path("out").glob("[ps]*/*/*e[ed]*.p*")}
    second = srpo("eval", "run", "miniature", *WORLD, "-o", "out")
    assert (first.exit_code, first.stdout) == (second.exit_code, second.stdout)
    assert second.stderr == first.stderr.replace("4 prompts", "4 prompts; of the 4 there what matches is kept")
    assert {key: read("out")[key] for key in one if key not in ("cost", "environment")} == {
        key: one[key] for key in one if key not in ("cost", "environment")
    }
    assert {path: path.stat().st_mtime_ns for path in times} == times and times
    assert read("out")["cost"]["miniature"]["pictures_drawn"] == LIMIT  # of both calls together


def test_without_a_model_and_an_output_the_miniature_goes_to_evals(srpo):
    outcome = srpo("eval", *QUICK)
    assert outcome.exit_code == 0
    assert "evaluating the built-in miniature" in outcome.stderr
    assert Path("evals/miniature/results.json").is_file()


def test_a_run_is_called_by_its_folder_and_compared_with_the_first_model(result, tuned):
    assert [model["label"] for model in result["models"]] == ["base", "realism"]
    assert result["models"][1]["weights"] == str((tuned / "checkpoints/step-000002/transformer").resolve())
    assert {(each["baseline"], each["model"]) for each in result["comparisons"]} == {("base", "realism")}


def test_json_is_one_document_on_stdout_and_everything_else_is_on_stderr(srpo):
    outcome = srpo("eval", "a=miniature", "b=miniature", *QUICK, "-o", "out", "--format", "json")
    assert json.loads(outcome.stdout) == read("out")
    assert "report: out/report.html" in outcome.stderr


def test_a_folder_of_pictures_is_a_model(srpo, evaluated, result):
    rows = pd.read_parquet(evaluated / "images.parquet").query("model == 'realism'")
    Path("theirs").mkdir()
    for row in rows.itertuples():
        Image.open(evaluated / row.file).save(f"theirs/{row.item}.webp", lossless=True)
    outcome = srpo("eval", "base=miniature", "theirs", *WORLD, "-o", "out")
    assert outcome.exit_code == 0
    assert "theirs: 4 pictures in theirs" in outcome.stderr
    assert read("out")["figures"]["theirs"] == result["figures"]["realism"]


def test_the_pictures_of_a_folder_are_looked_for_before_anything_is_drawn(srpo):
    Path("theirs").mkdir()
    refused(srpo("eval", "miniature", "theirs", *WORLD, "-o", "out"), "theirs is taken for pictures made elsewhere")
    assert not Path("out").exists()


def test_the_path_of_hpdv2_with_prompts_of_the_world(srpo):
    Path("small.yaml").write_text(SMALL)
    write_styles(Path("prompts"), 3)
    outcome = srpo("eval", "miniature", "-b", "small.yaml", "--prompts", "prompts", "-o", "all")
    assert outcome.exit_code == 0, outcome.stderr
    assert read("all")["groups"] == list(STYLES)
    assert list(read("all")["batches"]["miniature"]) == list(STYLES)
    assert "## concept-art" in Path("all/table.md").read_text()
    given = ("eval", "miniature", "-b", "small.yaml", "--prompts", "prompts", "--metric", "miniature", "-o", "photo")
    outcome = srpo(*given, "--style", "photo", "--limit", 2)
    assert outcome.exit_code == 0, outcome.stderr
    rows = pd.read_parquet("photo/images.parquet")
    assert list(rows["item"]) == ["photo/00000", "photo/00001"]
    assert list(rows["seed"]) == [42 + 9000, 42 + 10000]
    assert read("photo")["selection"]["group"] == "photo"
    refused(srpo(*given[:-1], "x", "--style", "photos"), "Unknown group 'photos'. Did you mean 'photo'?")
    assert not Path("x").exists()


@pytest.mark.parametrize("ending", ["txt", "csv"])
def test_somebodys_own_prompts_on_the_miniature_are_measured_as_it_is(srpo, ending):
    prompts = ["a red sphere on sand", "a blue cone on snow, dark"]
    lines = prompts if ending == "txt" else ["prompt", *(f'"{prompt}"' for prompt in prompts)]
    Path(f"mine.{ending}").write_text("\n".join(lines) + "\n")
    outcome = srpo("eval", "miniature", "--benchmark", f"mine.{ending}")
    assert outcome.exit_code == 0, outcome.stderr
    assert list(pd.read_parquet("evals/mine/images.parquet")["prompt"]) == prompts
    assert list(read("evals/mine")["protocol"]["judges"]) == ["oracle", "miniature", "miniature:clip", "statistics"]


def test_somebodys_prompts_are_found_wherever_they_are_and_whatever_is_measured(srpo):
    Path("deep").mkdir()
    Path("deep/mine.txt").write_text("a red sphere on sand\n")
    outcome = srpo("eval", "miniature", "-b", "deep/mine.txt", "--metric", "diversity:miniature", "-n", 2)
    assert outcome.exit_code == 0, outcome.stderr
    assert len(pd.read_parquet("evals/mine/images.parquet")) == 2
    assert read("evals/mine")["figures"]["miniature"]["all"]["diversity:miniature"]["mean"] > 0


def test_a_distance_to_real_pictures(srpo, evaluated):
    given = ("--metric", "fid:miniature", "--reference", evaluated / "pictures" / "base")
    outcome = srpo("eval", "miniature", *WORLD, *given, "-o", "out")
    assert outcome.exit_code == 0, outcome.stderr
    assert read("out")["figures"]["miniature"]["all"]["fid:miniature"]["mean"] == pytest.approx(0, abs=1e-4)
    assert "FID" in outcome.stdout


def test_a_metric_whose_weights_are_missing_is_left_out_by_name_with_the_command(srpo):
    outcome = srpo("eval", "miniature", *WORLD, "--metric", "pickscore", "--metric", "miniature", "-o", "out")
    assert outcome.exit_code == 3
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("left out: ")]
    assert line.startswith("left out: pickscore: ") and "hf download yuvalkirstain/PickScore_v1" in line
    assert "ickscore" not in outcome.stdout and "plain reward" in outcome.stdout
    assert "Pick" not in Path("out/table.tex").read_text()
    assert [each["metric"] for each in read("out")["skipped"]] == ["pickscore"]
    assert "pickscore" not in read("out")["figures"]["miniature"]["all"]


def test_where_every_metric_is_left_out_there_is_no_table(srpo):
    outcome = srpo("eval", "miniature", *WORLD, "--metric", "pickscore", "-o", "out")
    assert (outcome.exit_code, outcome.stdout) == (3, "")
    assert read("out")["measures"] == []


def test_statistics_alone_are_one_table(srpo):
    outcome = srpo("eval", "miniature", *QUICK, "-o", "out")
    assert outcome.exit_code == 0
    assert outcome.stdout.split()[:2] == ["measure", "miniature"]


def test_a_plugin_runs_when_it_is_trusted(srpo, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    shutil.copy(Path(__file__).parents[1] / "rewards" / "plugins" / "brightness.py", "brightness.py")
    given = ("eval", "miniature", *WORLD, "--metric", "brightness.py", "-o", "out")
    refused(srpo(*given), "brightness.py", "--trust")
    assert not Path("out").exists()
    outcome = srpo(*given, "--trust")
    assert outcome.exit_code == 0, outcome.stderr
    assert "brightness.py is a plug-in" in outcome.stderr
    assert "brightness.py" in read("out")["figures"]["miniature"]["all"]


def test_an_interrupt_before_anything_is_drawn_says_how_to_go_on(srpo, monkeypatch):
    def interrupted(_name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("srpo_cli.config.benchmark.load_benchmark", interrupted)
    outcome = srpo("eval", "miniature", *WORLD)
    assert outcome.exit_code == 130
    assert outcome.stderr.splitlines()[0] == "stopped: the same command goes on with what is missing"


def test_the_example_of_the_documentation_runs_as_it_is_written(srpo, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    docs = Path(__file__).parents[2] / "docs" / "evaluation.md"
    (example,) = re.findall("```yaml\n(.*?)```", docs.read_text(), re.DOTALL)
    Path("mine.yaml").write_text(example)
    Path("captions.csv").write_text("prompt,style\na cat,photo\na fox,anime\n")
    for name in ("photo", "anime"):
        Path("theirs", name).mkdir(parents=True)
    for number in range(4):
        for name in ("photo", "anime"):
            Image.new("RGB", (1024, 1024), (60 * number, 9, 9)).save(f"theirs/{name}/00000-{number}.png")
    outcome = srpo("eval", "theirs", "-b", "mine.yaml", "-o", "out")
    assert outcome.exit_code == 3, outcome.stderr  # for want of the reward's weights
    assert (read("out")["groups"], read("out")["counts"]["prompts"]) == (["photo", "anime"], 2)
    assert {each["metric"] for each in read("out")["skipped"]} == {"hpsv2.1", "sgp:hpsv2.1", "diversity:hpsv2.1"}


@pytest.mark.slow
def test_an_interrupt_leaves_what_was_drawn_and_says_how_to_go_on():
    command = [sys.executable, "-m", "srpo_cli", "eval", "miniature", "-b", "miniature", "-o", "out"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end = time.monotonic() + 120
    while not list(Path("out").glob("pictures/*/*-seed*.png")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped: the same command goes on with what is missing" in stderr.splitlines()
    assert "Traceback" not in stderr and not Path("out/results.json").exists()


# --- bounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "missed"),
    [
        ("--fail-under photo_distance=0", []),
        ("--fail-over photo_distance=0", ["base has", "realism has"]),
        ("--fail-over base:photo_distance=0", ["base has"]),
        ("--fail-over realism:photo_distance=0 --fail-under caption=2", ["base has", "realism has", "realism has"]),
        ("--fail-under sgp:miniature=1", ["base has", "realism has"]),
        ("--fail-under base:sgp:miniature=1", ["base has"]),
        (
            "--fail-under miniature:clip=1 --fail-over base:sgp:miniature:clip=-1",
            ["base has", "realism has", "base has"],
        ),
        ("--fail-over PHOTO_distance=1e9 --fail-under saturation=0", []),
    ],
)
def test_a_bound_that_is_missed_is_told_and_ends_with_5(flags, missed, srpo, copied, tuned):
    outcome = srpo("eval", "base=miniature", tuned, *WORLD, "-o", copied, *flags.split())
    assert outcome.exit_code == (5 if missed else 0), outcome.stderr
    said = [line for line in outcome.stderr.splitlines() if line.startswith("--fail-")]
    assert len(said) == len(missed)
    assert all(part in line for part, line in zip(missed, said, strict=True))
    assert outcome.stdout  # the table is printed all the same


def test_a_bound_is_met_by_its_own_figure_and_missed_by_the_next_one(srpo, copied, tuned, result):
    figure = result["figures"]["base"]["all"]["caption_accuracy"]["mean"]
    given = ("eval", "base=miniature", tuned, *WORLD, "-o", copied)
    assert srpo(*given, "--fail-under", f"base:caption={figure}").exit_code == 0
    assert srpo(*given, "--fail-over", f"base:caption={figure}").exit_code == 0
    assert srpo(*given, "--fail-under", f"base:caption={figure + 1e-9}").exit_code == 5


def test_a_heading_names_a_measure_too(srpo, copied, tuned):
    given = ("eval", "base=miniature", tuned, *WORLD, "-o", copied)
    assert srpo(*given, "--fail-over", "photo distance=0").exit_code == 5
    assert srpo(*given, "--fail-under", "sgp-MINIATURE win rate=0").exit_code == 0


def test_a_metric_is_bounded_whatever_models_are_called(srpo):
    given = ("eval", "sgp=miniature", "b=miniature", *WORLD, "--metric", "sgp:miniature", "-o", "out")
    outcome = srpo(*given, "--metric", "miniature", "--fail-under", "sgp:miniature=1")
    assert [line.split()[2] for line in outcome.stderr.splitlines() if line.startswith("--fail-")] == ["sgp", "b"]
    outcome = srpo(*given, "--metric", "miniature", "--fail-under", "sgp:plain reward=1")
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("--fail-")]
    assert line.startswith("--fail-under sgp:plain reward=1: sgp has ")


def test_a_bound_of_a_metric_that_was_left_out_is_missed(srpo):
    given = ("eval", "miniature", *WORLD, "--metric", "pickscore", "--metric", "statistics", "-o", "out")
    outcome = srpo(*given, "--fail-over", "pickscore=100")
    assert outcome.exit_code == 5
    assert "--fail-over pickscore=100: not measured of miniature" in outcome.stderr.splitlines()


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("miniature", ["--benchmark is missing: name dpg, drawbench", "or a file"]),
        ("miniature -b minature", ["Unknown benchmark 'minature'. Did you mean 'miniature'?"]),
        ("miniature -b nope.txt", ["Benchmark file 'nope.txt' does not exist"]),
        ("miniature -b nope.yaml", ["Benchmark file 'nope.yaml' does not exist"]),
        ("miniature -b .", ["is a folder"]),
        ("minature -b miniature", ["Unknown model 'minature'. Did you mean 'miniature'?"]),
        ("given/nope -b miniature", ["given/nope does not exist"]),
        ("miniature -b hpdv2", ["miniature cannot be measured by hpdv2", "Take --benchmark miniature"]),
        ("small=miniature -b geneval", ["small cannot be measured by geneval"]),
        ("-b hpdv2", ["no accelerator here", "miniature cannot be measured by hpdv2"]),
        ("a=miniature a=miniature -b miniature", ["a=miniature: give every model a label of its own"]),
        ("miniature miniature -b miniature", ["give every model a label of its own"]),
        ("flux.1-dev miniature -b prompts.txt", ["miniature is a miniature and flux.1-dev is none"]),
        ("miniature -b prompts.txt --prompts prompts.txt", ["is a file of prompts already: leave out --prompts"]),
        ("miniature -b castle.txt", ["the miniature cannot draw 'a castle'"]),
        ("miniature -b miniature --prompts prompts.txt", ["use --benchmark prompts.txt"]),
        ("miniature -b miniature --base flux.1-dev", ["--base flux.1-dev is of no use here"]),
        ("given -b miniature --base flux.1-dev", ["--base flux.1-dev is of no use here: given is pictures"]),
        ("miniature -b miniature --metric statistic", ["Unknown metric 'statistic'. Did you mean 'statistics'?"]),
        ("miniature -b miniature --metric sgp:hpsv3", ["Unknown reward 'hpsv3'"]),
        ("miniature -b miniature --metric sgp:aesthetic-v2.5", ["reads no text"]),
        ("miniature -b miniature --metric diversity:miniature", ["give --num-images 2 or more"]),
        ("miniature -b miniature --metric fid", ["--reference"]),
        ("miniature -b miniature --reference given", ["--reference given is of no use without --metric fid or kid"]),
        ("miniature -b miniature --metric kid:miniature --reference nope", ["kid:miniature: nope is no folder"]),
        ("miniature -b miniature --metric fid:miniature --reference given", ["given holds no picture"]),
        ("miniature -b miniature --style photo", ["there is no group 'photo': this benchmark has no groups"]),
        ("miniature -b miniature --limit 0", ["--limit", "should be greater than or equal to 1"]),
        ("miniature -b miniature --limit few", ["--limit"]),
        ("miniature -b miniature -n 65", ["--num-images", "less than or equal to 64"]),
        ("miniature -b miniature --batch-size 0", ["--batch-size"]),
        ("miniature -b miniature --fail-under 0.28", ["--fail-under 0.28: give MEASURE=VALUE, as in --fail-under hps"]),
        ("miniature -b miniature --fail-over hps=high", ["--fail-over hps=high: give MEASURE=VALUE"]),
        ("miniature -b miniature --fail-over hps=nan", ["--fail-over hps=nan: give MEASURE=VALUE"]),
        ("miniature -b miniature --fail-over =1", ["--fail-over =1: give MEASURE=VALUE"]),
        (
            "miniature -b miniature --metric statistics --fail-over saturatoin=1",
            ["Unknown measure 'saturatoin'. Did you mean 'saturation'?"],
        ),
        (
            "miniature -b miniature --metric pickscore --fail-under pik=1",
            ["Unknown measure 'pik'.", "Available: pickscore, Pick."],
        ),
        (
            "a=miniature c=miniature -b miniature --fail-over b:caption=1",
            ["b:caption: no model is called 'b' (there are a, c), and no measure 'b:caption'"],
        ),
        ("a=miniature -b miniature --fail-over b:captoin=1", ["Unknown measure 'b:captoin'"]),
        (
            "a,b=miniature -b miniature",
            ["a,b=miniature: give every model a label of its own, of letters, digits, _, - and ."],
        ),
        ("=miniature -b miniature", ["=miniature: give every model a label of its own, of letters"]),
        (
            "miniature -b miniature --metric kid:miniature --reference real -n 2 --limit 1",
            ["kid:miniature needs 4 pictures or more, and there are 2"],
        ),
        ("miniature -b miniature --weights miniature", ["give NAME=PATH"]),
        ("miniature -b miniature --weights hpsv2.1=x.pt", ["of no use: the metrics read miniature"]),
        ("miniature -b miniature --weights miniature=x.pt", ["--weights miniature=x.pt: there is no such file"]),
        ("miniature -b miniature -o prompts.txt", ["cannot write to prompts.txt"]),
        ("miniature -b miniature -o prompts.txt/out", ["cannot write to prompts.txt/out"]),
        ("miniature -b miniature --format csv", ["'csv' is not one of"]),
        ("miniature -b miniature --nodes 2", ["--nodes 2 needs --rdzv"]),
        ("show", ["Missing argument"]),
        ("show nope", ["nope does not exist: give the results.json of srpo eval, or its folder"]),
        ("show castle.txt", ["castle.txt is no result of srpo eval"]),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_drawn(arguments, parts, srpo):
    Path("prompts.txt").write_text("a red sphere on sand\n")
    Path("castle.txt").write_text("a castle\n")
    Path("given").mkdir()
    Path("real").mkdir()
    Image.new("RGB", (48, 48)).save("real/0.png")
    before = sorted(Path().rglob("*"))
    outcome = srpo("eval", *arguments.split())
    noted, *_ = outcome.stderr.splitlines(keepends=True)
    if noted.startswith("no accelerator here"):
        assert parts[0] in noted
        outcome, parts = type(outcome)(outcome.exit_code, outcome.stdout, outcome.stderr[len(noted) :]), parts[1:]
    refused(outcome, *parts)
    assert sorted(Path().rglob("*")) == before


def test_prompts_that_are_not_here_are_told_with_the_command_that_fetches_them(srpo):
    Path("pictures").mkdir()
    outcome = srpo("eval", "theirs=pictures", "--benchmark", "hpdv2", "--style", "photo")
    refused(outcome, "hf download zhwang/HPDv2", "--download", "--prompts FOLDER", exit_code=4)
    assert not Path("evals").exists()


def test_another_protocol_in_the_same_folder_is_refused_and_nothing_written_over(srpo, copied, tuned):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    given = ("eval", "base=miniature", tuned, "--benchmark", "miniature", "-o", copied)
    refused(srpo(*given, "--limit", 5), "a result of miniature with prompt_count 4, not 5: choose another --output")
    refused(srpo(*given, "--limit", 4, "-n", 2), "images_per_prompt 1, not 2")
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


# --- show ---------------------------------------------------------------------------------------------------------


def test_a_result_is_shown_again_as_it_was(srpo, copied, tuned):
    outcome = srpo("eval", "base=miniature", tuned, *WORLD, "-o", copied)
    shown = srpo("eval", "show", copied)
    few = "note: Only 4 different prompts: intervals and p values of so few are rough.\n"
    assert (shown.exit_code, shown.stdout, shown.stderr) == (0, outcome.stdout, few)
    assert srpo("eval", "show", copied / "results.json").stdout == outcome.stdout
    again = srpo("eval", "show", copied, "-o", "again")
    assert again.stderr == f"{few}report: again/report.html\n"
    assert read("again")["figures"] == read(copied)["figures"]
    assert {path.name for path in Path("again").iterdir()} == FILES - {"pictures", "scores"}


def test_results_side_by_side_are_told_apart_by_their_folders(srpo, evaluated, tuned):
    srpo("eval", "base=miniature", *WORLD, "-o", "second")
    srpo("eval", f"base={tuned}", *WORLD, "-o", "third")
    outcome = srpo("eval", "show", evaluated, "second", "third", "-o", "both", "--format", "json")
    assert outcome.exit_code == 0
    merged = json.loads(outcome.stdout)
    assert merged == read("both")
    assert [model["label"] for model in merged["models"]] == ["result/base", "realism", "third/base"]
    files = pd.read_parquet("both/images.parquet")["file"]
    assert len(files) == 3 * LIMIT and all((Path("both") / file).is_file() for file in files)
    differences = {
        each["model"]: each["difference"] for each in merged["comparisons"] if each["measure"] == "photo_distance"
    }
    assert differences["realism"] == differences["third/base"] != 0


def test_results_of_different_protocols_are_put_together_only_on_demand(srpo, evaluated):
    srpo("eval", "other=miniature", "--benchmark", "miniature", "--limit", 3, "-o", "short")
    refused(srpo("eval", "show", evaluated, "short"), "prompt_count is 4 and 3", "--allow-different")
    outcome = srpo("eval", "show", evaluated, "short", "--allow-different", "--format", "json")
    assert outcome.exit_code == 0
    merged = json.loads(outcome.stdout)
    assert {figure["count"] for own in merged["figures"].values() for figure in own["all"].values()} == {3}
    assert "prompt_count is 4 and 3" in merged["protocol"]["mixed"]


def test_a_result_among_several_is_not_written_over(srpo, copied):
    srpo("eval", "other=miniature", *WORLD, "-o", "other")
    before = (copied / "results.json").read_bytes()
    refused(srpo("eval", "show", "other", copied, "-o", copied), "is one of the results, which would be lost")
    assert (copied / "results.json").read_bytes() == before


# --- help ---------------------------------------------------------------------------------------------------------


def test_help_names_every_benchmark_and_the_ways_to_go(srpo):
    whole = " ".join(srpo("eval", "--help").stdout.replace("│", " ").split())
    assert "srpo eval MODEL... --benchmark NAME is short for srpo eval run" in whole
    assert "srpo eval run --help lists its options" in whole
    text = " ".join(srpo("eval", "run", "--help").stdout.replace("│", " ").split())
    for name in benchmark_names():
        assert name in text
    for part in ("[LABEL=]MODEL", "sgp:REWARD", "[LABEL:]MEASURE=VALUE", "evals/BENCHMARK", "the exit code is then 3"):
        assert part in text
