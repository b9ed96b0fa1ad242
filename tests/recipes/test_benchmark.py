"""A benchmark from prompts to figures, on the miniature: what is drawn, judged, kept, added up and refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from diffusers import FluxTransformer2DModel
from pandas.testing import assert_frame_equal
from PIL import Image

from srpo_cli.config.benchmark import Benchmark, benchmark_names, load_benchmark
from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.metrics.pictures import STATISTICS, picture_statistics
from srpo_cli.miniature import WEIGHTS
from srpo_cli.miniature.world import draw_prompts
from srpo_cli.recipes import benchmark as recipe
from srpo_cli.recipes.benchmark import Request, evaluate, show
from srpo_cli.recipes.judges import plan_judges
from srpo_cli.recipes.parts import load_reward
from srpo_cli.recipes.score import to_images
from srpo_cli.runtime.benchmarks import load_items, picture_path
from srpo_cli.runtime.distributed import ALONE
from srpo_cli.runtime.pictures import open_picture, read_metadata
from srpo_cli.runtime.sources import Source

CPU = torch.device("cpu")
LIMIT = 10  # a batch of eight and one of two
BASE = Source("miniature")
WORLD = load_benchmark("miniature")
STYLES = ("anime", "concept-art", "paintings", "photo")
EACH = 5  # prompts of a style


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Equality to the bit is promised there."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("benchmark", "sample"):
            patch.setattr(f"srpo_cli.recipes.{module}.best_device", lambda: CPU)
        yield


def run(output: Path, request: Request | None = None, **changes) -> dict:
    request = request or Request(WORLD, {"base": BASE}, limit=LIMIT)
    return evaluate(replace(request, **changes), output, ALONE, None, lambda _: None)


def only(*metrics, **changes) -> Benchmark:
    return WORLD.model_copy(update={"metrics": metrics, **changes})


def table_of(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "images.parquet")


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When everything that was drawn and judged was written, and what it holds."""
    paths = [*folder.glob("pictures/*/*-seed*.png"), *folder.glob("scores/*/*.parquet")]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def lasting(result: dict) -> dict:
    """A result without what no two calls share."""
    return {key: value for key, value in result.items() if key not in ("cost", "environment")}


def analysis_of(*arms: str) -> dict:
    """The least that is an analysis of a human study."""
    counts = {"study": "taste", "mode": "pairs", "raters": 2, "experts": 0, "prompts": 1, "pictures": 2, "answers": 2}
    nothing = {"dimensions": [], "grade_names": [], "grades": {}, "differences": [], "raters_table": [], "notes": []}
    pairs = {"strengths": {}, "win_rates": []}
    return {"arms": arms, "complete": 1, **counts, **nothing, "agreement": {}, "overall_rule": {}, "pairs": pairs}


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def folder_of_pictures(folder: Path, evaluated: Path, label: str = "base") -> Path:
    """A model's drawn pictures as somebody else would hand them over."""
    items = load_items(WORLD).items
    for row in table_of(evaluated).query("model == @label").itertuples():
        place = folder / f"{picture_path(WORLD, items[row.seed // WORLD.seed_step])}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(evaluated / row.file).save(place)
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """The miniature's transformer with every weight 2 % larger."""
    transformer = FluxTransformer2DModel.from_pretrained(WEIGHTS / "pipeline" / "transformer", dtype=torch.float32)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.02)
    folder = tmp_path_factory.mktemp("tuned")
    transformer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def request_of_three(tuned) -> Request:
    models = {"base": BASE, "again": BASE, "tuned": Source("miniature", tuned)}
    return Request(WORLD, models, limit=LIMIT)


@pytest.fixture(scope="module")
def evaluated(request_of_three, tmp_path_factory) -> Path:
    """The miniature twice and a tuned one, evaluated. To be read only: see ``copied``."""
    folder = tmp_path_factory.mktemp("evaluated") / "result"
    run(folder, request_of_three)
    return folder


@pytest.fixture
def copied(evaluated, tmp_path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "copied"))


@pytest.fixture(scope="module")
def result(evaluated) -> dict:
    return json.loads((evaluated / "results.json").read_text())


@pytest.fixture(scope="module")
def styles(tmp_path_factory) -> tuple[Benchmark, Path]:
    """A small copy of HPDv2's format with prompts of the miniature's world, and the benchmark of it."""
    folder = tmp_path_factory.mktemp("hpdv2")
    prompts = draw_prompts(len(STYLES) * EACH, 3, "evaluation")
    (folder / "benchmark").mkdir()
    for number, style in enumerate(STYLES):
        own = prompts[number * EACH : (number + 1) * EACH]
        (folder / "benchmark" / f"{style}.json").write_text(json.dumps(own))
    (folder / "small.yaml").write_text(
        f"""
        extends: hpdv2
        prompts:
          groups: {{{", ".join(f"{style}: {EACH}" for style in STYLES)}}}
        metrics: [oracle, miniature, sgp:miniature, statistics]
        steps: 3
        size: [48, 48]
        batches: 2
        """
    )
    return load_benchmark(str(folder / "small.yaml")), folder


@pytest.fixture(scope="module")
def whole(styles, tmp_path_factory) -> Path:
    """The miniature on all prompts of ``styles``."""
    benchmark, prompts = styles
    folder = tmp_path_factory.mktemp("whole") / "result"
    run(folder, Request(benchmark, {"base": BASE}, prompts=prompts))
    return folder


# --- what comes out -----------------------------------------------------------------------------------------------


def test_a_folder_holds_the_result_in_every_form(evaluated, result):
    names = {path.name for path in evaluated.iterdir()}
    assert names == {"results.json", "images.parquet", "pictures", "scores", "table.md", "table.tex", "report.html"}
    assert [model["label"] for model in result["models"]] == ["base", "again", "tuned"]
    assert "photo distance" in (evaluated / "table.md").read_text()
    assert "photo distance" in (evaluated / "table.tex").read_text()
    assert "photo distance" in (evaluated / "report.html").read_text()


def test_the_table_has_a_row_a_picture_with_its_prompt_seed_and_file(evaluated):
    table, prompts = table_of(evaluated), draw_prompts(256, 0, "evaluation")
    assert len(table) == 3 * LIMIT
    for row in table.itertuples():
        number = int(row.item)
        metadata = read_metadata(evaluated / row.file)
        assert (row.prompt, row.seed, row.image, row.group) == (prompts[number], 1000 * number, 0, "")
        assert (metadata["prompt"], metadata["seed"], metadata["steps"]) == (row.prompt, row.seed, 12)


def test_equal_models_draw_equal_pictures_and_differ_by_exactly_nothing(evaluated, result):
    table = table_of(evaluated)
    pixels = {
        label: [open_picture(evaluated / file).tobytes() for file in table.query("model == @label").file]
        for label in ("base", "again", "tuned")
    }
    assert pixels["base"] == pixels["again"]
    assert all(one != other for one, other in zip(pixels["base"], pixels["tuned"], strict=True))
    numbers = table.select_dtypes("number").columns
    assert_frame_equal(
        table.query("model == 'base'")[numbers].reset_index(drop=True),
        table.query("model == 'again'")[numbers].reset_index(drop=True),
        check_exact=True,
    )
    again = [each for each in result["comparisons"] if each["model"] == "again"]
    assert len(again) == len(result["measures"])
    for each in again:
        found = [each[key] for key in ("baseline", "difference", "p_holm", "wins")]
        assert found == ["base", 0, 1, 0.5]
        at_an_end = result["figures"]["base"]["all"][each["measure"]]["mean"] in (0, 1)  # of a share, so few may hide
        assert each["high"] == -each["low"] and (each["low"] < 0 if at_an_end else each["low"] == 0)
    assert any(each["difference"] != 0 for each in result["comparisons"] if each["model"] == "tuned")
    assert result["models"][0]["fingerprint"] == result["models"][1]["fingerprint"]
    assert result["models"][0]["fingerprint"] != result["models"][2]["fingerprint"]


def test_figures_are_what_the_pictures_say_when_they_are_asked_alone(evaluated, result):
    table = table_of(evaluated)
    for label in ("base", "tuned"):
        own = table[table["model"] == label]
        pixels = torch.stack([torch.tensor(list(open_picture(evaluated / file).tobytes())) for file in own["file"]])
        images = to_images(pixels.byte().view(-1, 48, 48, 3))
        figures = result["figures"][label]["all"]
        for name in ("miniature", "miniature:clip"):
            (plain,) = load_reward(name, None, CPU).scores(images, list(own["prompt"]))
            assert figures[name]["mean"] == pytest.approx(plain.double().mean().item(), abs=1e-6)
            assert figures[f"sgp:{name}"]["mean"] == pytest.approx(own[f"gap:{name}"].mean(), abs=1e-9)
        contrast = picture_statistics(images)[:, STATISTICS.index("contrast")]
        assert figures["contrast"]["mean"] == pytest.approx(contrast.double().mean().item(), abs=1e-6)
        distance = own[[f"deviation:{name}" for name in STATISTICS]].mean().abs().mean()
        assert figures["photo_distance"]["mean"] == pytest.approx(distance, abs=1e-9)
        assert figures["sgp:miniature"]["count"] == LIMIT


def test_the_protocol_and_the_cost_are_told(result):
    protocol = result["protocol"]
    assert protocol["prompt_count"] == LIMIT and not {"limit", "group"} & protocol.keys()
    assert result["selection"] == {"limit": LIMIT, "group": None}
    assert (protocol["steps"], protocol["size"]) == (12, [48, 48])
    assert protocol["benchmark"]["seed_step"] == 1000
    assert list(protocol["judges"]) == ["oracle", "miniature", "miniature:clip", "statistics"]
    assert {label: cost["pictures_drawn"] for label, cost in result["cost"].items()} == {
        "base": LIMIT,
        "again": LIMIT,
        "tuned": LIMIT,
    }


def test_all_pictures_of_a_prompt_are_judged_together_whatever_the_batch(tmp_path):
    benchmark = only("diversity:miniature", "miniature", images_per_prompt=3)
    results = [run(tmp_path / str(size), benchmark=benchmark, limit=4, batch_size=size) for size in (1, 7, 32)]
    tables = [table_of(tmp_path / str(size)) for size in (1, 7, 32)]
    for table in tables:
        assert list(table["image"]) == [0, 1, 2] * 4
        assert list(table["seed"]) == [1000 * item + image for item in range(4) for image in range(3)]
        assert (table.groupby("item")["diversity:miniature"].nunique() == 1).all()
        assert (table["diversity:miniature"] > 0).all()
        assert_frame_equal(table, tables[0], rtol=0, atol=1e-6)
    assert results[0]["figures"]["base"]["all"]["diversity:miniature"]["count"] == 4


def test_a_distance_to_the_models_own_pictures_is_nothing(evaluated, tmp_path):
    reference = folder_of_pictures(tmp_path / "real", evaluated)
    given = Request(only("fid:miniature", "statistics"), {"base": BASE}, limit=LIMIT, reference=reference)
    result = run(tmp_path / "result", given)
    assert result["figures"]["base"]["all"]["fid:miniature"]["mean"] == pytest.approx(0, abs=1e-4)
    assert result["figures"]["base"]["all"]["fid:miniature"]["low"] is None
    assert "fid:miniature" not in table_of(tmp_path / "result")
    before = files_of(tmp_path / "result")
    assert lasting(run(tmp_path / "result", given)) == lasting(result)
    assert files_of(tmp_path / "result") == before


@pytest.mark.parametrize("name", [name for name in benchmark_names() if load_benchmark(name).published])
def test_every_published_figure_can_stand_beside_a_measured_one(name):
    benchmark = load_benchmark(name)
    measured = {measure for plan in plan_judges(benchmark) for measure in plan.headings}
    by_plugins = {"deqa"}
    assert {figure for row in benchmark.published.rows for figure in row.figures} <= measured | by_plugins


# --- styles -------------------------------------------------------------------------------------------------------


def test_a_small_copy_of_hpdv2_is_measured_by_style_and_in_batches(whole):
    result, table = json.loads((whole / "results.json").read_text()), table_of(whole)
    assert result["benchmark"] == "small" and result["published"] is None
    assert result["groups"] == list(STYLES)
    assert list(table["item"]) == [f"{style}/{number:05d}" for style in STYLES for number in range(EACH)]
    assert list(table["seed"]) == [42 + 1000 * index for index in range(len(STYLES) * EACH)]
    figures, batches = result["figures"]["base"], result["batches"]["base"]
    assert list(batches) == list(STYLES)
    for style in STYLES:
        own = table.loc[table["group"] == style, "miniature"]
        assert figures[style]["miniature"]["mean"] == pytest.approx(own.mean(), abs=1e-9)
        assert figures[style]["miniature"]["count"] == EACH
        means = [own.iloc[:3].mean(), own.iloc[3:].mean()]
        assert batches[style]["miniature"]["mean"] == pytest.approx(sum(means) / 2, abs=1e-9)
        assert batches[style]["miniature"]["std"] == pytest.approx(abs(means[0] - means[1]) / 2, abs=1e-9)
    assert figures["all"]["miniature"]["mean"] == pytest.approx(table["miniature"].mean(), abs=1e-9)
    assert figures["all"]["miniature"]["count"] == len(STYLES) * EACH
    assert set(result["protocol"]["judges"]) == {"oracle", "miniature", "statistics"}
    assert result["protocol"]["judges"]["miniature"]["control_words"]["positive"] == ["Realistic photo"]


@pytest.mark.parametrize(
    ("limit", "group", "items"),
    [
        (6, None, ["anime/00000", "anime/00001", "concept-art/00000", "concept-art/00001", "paintings/00000"]),
        (None, "photo", [f"photo/{number:05d}" for number in range(EACH)]),
        (2, "paintings", ["paintings/00000", "paintings/00001"]),
    ],
)
def test_a_choice_of_prompts_keeps_their_seeds_and_pictures(limit, group, items, styles, whole, tmp_path):
    benchmark, prompts = styles
    request = Request(benchmark, {"base": BASE}, prompts=prompts, limit=limit, group=group)
    result = run(tmp_path / "part", request, benchmark=benchmark.model_copy(update={"metrics": ("miniature",)}))
    table, all_rows = table_of(tmp_path / "part"), table_of(whole).set_index("item")
    assert list(table["item"])[: len(items)] == items and len(table) == (limit or EACH)
    for row in table.itertuples():
        assert row.seed == all_rows.loc[row.item, "seed"]
        assert row.file == all_rows.loc[row.item, "file"]
        one, other = (
            torch.tensor(list(open_picture(place / row.file).tobytes())) for place in (tmp_path / "part", whole)
        )
        assert (one - other).abs().max() <= 1  # rounding, in another batch
    assert result["selection"] == {"limit": limit, "group": group}
    assert result["groups"] == ([] if group else list(STYLES))


# --- going on -----------------------------------------------------------------------------------------------------


def test_the_same_call_draws_nothing_and_judges_nothing(copied, request_of_three, result):
    before = files_of(copied)
    again = run(copied, request_of_three)
    assert files_of(copied) == before
    assert lasting(again) == lasting(result)
    assert {cost["pictures_drawn"] for cost in again["cost"].values()} == {LIMIT}  # of both calls together


def test_what_a_kill_left_missing_comes_again_and_nothing_else_does(copied, request_of_three, evaluated, result):
    before = files_of(copied)
    files = table_of(copied)["file"]
    lost = [files[number] for number in (1, 6, 9)]
    lost.append(next(name for name in before if name.startswith("scores/tuned/oracle")))
    for name in [*lost, "results.json", "report.html"]:
        (copied / name).unlink()
    again = run(copied, request_of_three)
    after = files_of(copied)
    assert {name for name in after if after[name] != before[name]} == set(lost)
    assert {name for name in after if after[name][1] != before[name][1]} == set()
    assert lasting(again) == lasting(result)
    assert_frame_equal(table_of(copied), table_of(evaluated), check_exact=True)
    assert {label: cost["pictures_drawn"] for label, cost in again["cost"].items()} == {
        "base": 3,
        "again": 0,
        "tuned": 0,
    }


def test_a_drawn_picture_that_is_cut_off_is_drawn_again(copied, request_of_three, result):
    before = files_of(copied)
    name = next(name for name in before if name.startswith("pictures/tuned"))
    cut_off(copied / name)
    assert lasting(run(copied, request_of_three)) == lasting(result)
    after = files_of(copied)
    assert [each for each in after if after[each] != before[each]] == [name]
    assert after[name][1] == before[name][1]


def test_scores_that_are_cut_off_or_of_something_else_are_made_again(copied, request_of_three, result):
    before = files_of(copied)
    one, other, third, _ = sorted(name for name in before if name.startswith("scores/base"))
    (copied / one).write_bytes(before[one][1][:100])
    (copied / other).write_bytes(b"")
    shutil.copy(copied / third.replace("base", "tuned"), copied / third)
    assert lasting(run(copied, request_of_three)) == lasting(result)
    assert {name: content for name, (_, content) in files_of(copied).items()} == {
        name: content for name, (_, content) in before.items()
    }


def test_a_result_that_was_half_written_is_written_again(copied, request_of_three, result):
    (copied / "images.parquet").write_bytes(b"PAR1 and no more")
    assert lasting(run(copied, request_of_three)) == lasting(result)
    assert len(table_of(copied)) == 3 * LIMIT


@pytest.mark.parametrize("rest", [0, 500])
def test_a_result_that_was_cut_off_is_told_and_written_anew(rest, copied, request_of_three, result):
    before = files_of(copied)
    content = (copied / "results.json").read_bytes()
    (copied / "results.json").write_bytes(content[:rest])
    said: list[str] = []
    assert lasting(evaluate(request_of_three, copied, ALONE, None, said.append)) == lasting(result)
    assert said[0] == f"{copied / 'results.json'} cannot be read: it is written anew"
    assert json.loads((copied / "results.json").read_text())["figures"] == result["figures"]
    assert files_of(copied) == before


def test_what_was_spent_on_a_model_is_kept_and_added_to(copied, request_of_three, result):
    there = json.loads((copied / "results.json").read_text())
    there["cost"] = {label: {"seconds": 1000.0, "pictures_drawn": LIMIT} for label in there["cost"]}
    there["models"][1]["fingerprint"] = "another"
    (copied / "results.json").write_text(json.dumps(there))
    next((copied / "pictures" / "base").glob("*-seed*.png")).unlink()
    cost = run(copied, request_of_three)["cost"]
    assert [cost[label]["pictures_drawn"] for label in ("base", "again", "tuned")] == [LIMIT + 1, 0, LIMIT]
    assert cost["base"]["seconds"] >= 1000 and cost["again"]["seconds"] < 1000


def test_what_is_drawn_and_what_is_there_is_said(copied, request_of_three, tmp_path):
    for folder, told in ((tmp_path / "new", ""), (copied, f"; of the {LIMIT} there what matches is kept")):
        said: list[str] = []
        evaluate(replace(request_of_three, models={"base": BASE}), folder, ALONE, None, said.append)
        assert said[0] == f"base: drawing {LIMIT} pictures of {LIMIT} prompts{told}"


def test_another_metric_of_the_same_pictures_draws_nothing(copied, request_of_three):
    before = files_of(copied)
    result = run(copied, request_of_three, benchmark=only("statistics"))
    assert files_of(copied) == before
    assert list(result["protocol"]["judges"]) == ["statistics"]
    assert "photo_distance" not in result["figures"]["base"]["all"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"limit": LIMIT - 1}, f"prompt_count {LIMIT}, not {LIMIT - 1}"),
        ({"limit": None}, f"prompt_count {LIMIT}, not 256"),
        ({"benchmark": only("statistics", seed=7)}, "seed 0, not 7"),
        ({"benchmark": only("statistics", steps=3)}, "steps 12, not 3"),
        ({"benchmark": only("statistics", images_per_prompt=2)}, "images_per_prompt 1, not 2"),
    ],
)
def test_a_folder_with_the_result_of_another_protocol_is_left_alone(changes, named, copied, request_of_three):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=f"holds a result of miniature with {named}: choose another --output"):
        run(copied, request_of_three, **changes)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_other_prompts_in_a_file_of_the_same_name_are_another_protocol(tmp_path):
    for folder, prompts in (("one", ["a red sphere on sand"]), ("two", ["a blue cone on snow"])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "prompts.txt").write_text("\n".join(prompts))
    benchmarks = [
        load_benchmark(str(tmp_path / folder / "prompts.txt")).model_copy(
            update={"metrics": ("statistics",), "steps": 2, "size": (48, 48)}
        )
        for folder in ("one", "two")
    ]
    run(tmp_path / "result", Request(benchmarks[0], {"base": BASE}))
    with pytest.raises(UsageError, match="another prompts_sha256"):
        run(tmp_path / "result", Request(benchmarks[1], {"base": BASE}))


def test_a_protocol_is_of_the_prompts_and_not_of_how_they_were_chosen(styles, tmp_path):
    benchmark, prompts = styles
    protocols = {}
    for name, chosen in {
        "all": {},
        "as many": {"limit": len(STYLES) * EACH},
        "photo": {"group": "photo"},
        "photo, as many": {"group": "photo", "limit": EACH},
        "anime": {"group": "anime"},
    }.items():
        request = Request(benchmark, {"base": BASE}, prompts=prompts, **chosen)
        result = run(tmp_path / name, request, benchmark=benchmark.model_copy(update={"metrics": ("statistics",)}))
        protocols[name] = result["protocol"]
        assert (result["selection"]["limit"] is None) == (name != "photo, as many")
    assert protocols["all"] == protocols["as many"]
    assert protocols["photo"] == protocols["photo, as many"]
    assert protocols["photo"]["prompt_count"] == protocols["anime"]["prompt_count"]
    assert protocols["photo"]["items"] != protocols["anime"]["items"]
    with pytest.raises(UsageError, match="with another items"):
        show([tmp_path / "anime"], tmp_path / "photo", allow_different=False)


def test_a_folder_with_something_else_called_a_result_is_left_alone(tmp_path):
    (tmp_path / "results.json").write_text('{"accuracy": 1}')
    with pytest.raises(UsageError, match="is no result of srpo eval"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


# --- pictures made elsewhere --------------------------------------------------------------------------------------


def test_pictures_made_elsewhere_are_measured_as_drawn_ones_are(evaluated, result, tmp_path):
    given = folder_of_pictures(tmp_path / "theirs", evaluated, "tuned")
    found = run(tmp_path / "out", Request(WORLD, {"base": BASE, "theirs": given}, limit=LIMIT))
    assert found["figures"]["theirs"] == result["figures"]["tuned"]
    model = found["models"][1]
    assert (model["model"], model["weights"], model["pictures"]) == ("pictures made elsewhere", None, LIMIT)
    assert (tmp_path / "out" / model["folder"]).resolve() == given.resolve()
    files = table_of(tmp_path / "out").query("model == 'theirs'")["file"]
    assert all((tmp_path / "out" / file).is_file() for file in files)
    assert not (tmp_path / "out" / "pictures" / "theirs").exists()
    assert "theirs" not in found["cost"]


def test_given_pictures_are_judged_again_when_they_have_changed_and_not_when_they_were_copied(evaluated, tmp_path):
    given = folder_of_pictures(tmp_path / "theirs", evaluated)
    request = Request(only("statistics"), {"theirs": given}, limit=LIMIT)
    first = run(tmp_path / "out", request)
    before = files_of(tmp_path / "out")
    copy = Path(shutil.copytree(given, tmp_path / "copy", copy_function=shutil.copyfile))
    assert run(tmp_path / "out", request, models={"theirs": copy})["figures"] == first["figures"]
    assert files_of(tmp_path / "out") == before
    Image.new("RGB", (48, 48), "white").save(given / "00000.png")
    changed = run(tmp_path / "out", request)
    assert changed["figures"] != first["figures"]
    assert changed["models"][0]["fingerprint"] != first["models"][0]["fingerprint"]


def test_a_given_picture_that_cannot_be_read_is_told_and_never_left_out(evaluated, tmp_path):
    given = folder_of_pictures(tmp_path / "theirs", evaluated)
    cut_off(given / "00003.png")
    with pytest.raises(SrpoError, match=r"cannot read .*theirs/00003\.png"):
        run(tmp_path / "out", Request(only("statistics"), {"theirs": given}, limit=LIMIT))
    assert not (tmp_path / "out" / "results.json").exists()


def test_given_pictures_that_are_missing_are_told_before_anything_is_drawn(evaluated, tmp_path):
    given = folder_of_pictures(tmp_path / "theirs", evaluated)
    (given / "00002.png").unlink()
    (given / "00004.png").unlink()
    with pytest.raises(UsageError, match=r"theirs is taken for .*has no 00002\.png or the like, nor of 1 more"):
        run(tmp_path / "out", Request(WORLD, {"base": BASE, "theirs": given}, limit=LIMIT))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_was_drawn_into_is_found_by_prompt_and_seed(evaluated, result, tmp_path):
    drawn = Path(shutil.copytree(evaluated / "pictures" / "tuned", tmp_path / "drawn"))
    request = Request(WORLD, {"theirs": drawn}, limit=LIMIT)
    assert run(tmp_path / "out", request)["figures"]["theirs"] == result["figures"]["tuned"]
    for file in (evaluated / "pictures" / "base").iterdir():
        shutil.copyfile(file, drawn / file.name)
    rows = [(evaluated / "pictures" / label / "samples.jsonl").read_text() for label in ("base", "tuned")]
    (drawn / "samples.jsonl").write_text("".join(rows))
    with pytest.raises(UsageError, match="with seed 0, by different models or settings: take those of one of them out"):
        run(tmp_path / "both", request)
    (drawn / "samples.jsonl").write_text(rows[1].partition("\n")[2])
    with pytest.raises(UsageError, match=r"has no picture of '.*' with seed 0 in its samples\.jsonl.* seed_step"):
        run(tmp_path / "less", request)
    (drawn / "samples.jsonl").write_text("[]\n")
    with pytest.raises(UsageError, match=r"samples\.jsonl does not list pictures"):
        run(tmp_path / "none", request)
    assert not any((tmp_path / name).exists() for name in ("both", "less", "none"))


def test_a_picture_that_was_drawn_from_another_prompt_is_told(evaluated, tmp_path):
    given = folder_of_pictures(tmp_path / "theirs", evaluated)
    rows = table_of(evaluated).query("model == 'base'")
    other = rows[rows["prompt"] != rows["prompt"].iloc[1]].iloc[-1]
    shutil.copyfile(evaluated / other["file"], given / "00001.png")
    with pytest.raises(UsageError, match=rf"00001\.png was drawn from {other['prompt']!r}, and should be of"):
        run(tmp_path / "out", Request(only("statistics"), {"theirs": given}, limit=LIMIT))


def test_two_pictures_of_one_prompt_are_told_before_anything_is_drawn(evaluated, tmp_path):
    given = folder_of_pictures(tmp_path / "theirs", evaluated)
    Image.open(given / "00002.png").save(given / "00002.jpg")
    with pytest.raises(UsageError, match=r"has 00002\.jpg and 00002\.png of one prompt"):
        run(tmp_path / "out", Request(WORLD, {"base": BASE, "theirs": given}, limit=LIMIT))
    assert not (tmp_path / "out").exists()


def test_pictures_made_elsewhere_are_of_the_size_that_is_asked_for(evaluated, tmp_path):
    given = folder_of_pictures(tmp_path / "theirs", evaluated)
    request = Request(only("statistics", size=(64, 32)), {"base": BASE, "theirs": given}, limit=LIMIT)
    with pytest.raises(UsageError, match=r"00000\.png has 48 by 48 pixels .* and miniature asks for 64 by 32"):
        run(tmp_path / "out", request)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", ["theirs", "others"])
def test_pictures_made_elsewhere_are_of_one_size(other, evaluated, tmp_path):
    given = {label: folder_of_pictures(tmp_path / label, evaluated) for label in ("theirs", "others")}
    Image.new("RGB", (48, 64)).save(given[other] / "00003.png")
    with pytest.raises(UsageError, match=rf"{other}/00003\.png has 64 by 48 pixels .*theirs/00000\.png has 48 by 48"):
        run(tmp_path / "out", Request(only("statistics", size=None), given, limit=LIMIT))
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_size_of_its_own_is_not_compared_with_pictures_of_another(evaluated, tmp_path):
    given = folder_of_pictures(tmp_path / "theirs", evaluated)
    for file in given.glob("*.png"):
        Image.new("RGB", (64, 64)).save(file)
    with pytest.raises(UsageError, match=r"base has size \[48, 48\] of its own, and theirs \[64, 64\]"):
        run(tmp_path / "out", Request(only("statistics", size=None), {"base": BASE, "theirs": given}, limit=LIMIT))


def test_what_is_known_of_pictures_made_elsewhere_is_in_the_protocol_and_no_more(evaluated, tmp_path):
    results = []
    for edge in (48, 64):
        given = folder_of_pictures(tmp_path / str(edge), evaluated)
        for file in given.glob("*.png"):
            Image.open(file).resize((edge, edge)).save(file)
        request = Request(only("statistics", size=None), {"theirs": given}, limit=LIMIT)
        results.append(run(tmp_path / f"of {edge}", request))
    assert [result["protocol"]["size"] for result in results] == [[48, 48], [64, 64]]
    assert results[0]["protocol_digest"] != results[1]["protocol_digest"]
    for result in results:
        (model,) = result["models"]
        assert (model["sampling"], model["steps"], result["protocol"]["steps"]) == ("unknown", None, None)


# --- what cannot be done ------------------------------------------------------------------------------------------


def test_a_metric_whose_weights_are_missing_is_left_out_by_name_and_is_no_zero(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    said: list[str] = []
    request = Request(only("pickscore", "sgp:pickscore", "miniature"), {"base": BASE}, limit=2)
    result = evaluate(request, tmp_path / "out", ALONE, None, said.append)
    assert [each["metric"] for each in result["skipped"]] == ["pickscore", "sgp:pickscore"]
    assert all("hf download yuvalkirstain/PickScore_v1" in each["reason"] for each in result["skipped"])
    assert not any(each["reason"].startswith(each["metric"]) for each in result["skipped"])
    assert [line for line in said if line.startswith("left out: ")] == [
        f"left out: {each['metric']}: {each['reason']}" for each in result["skipped"]
    ]
    assert list(result["figures"]["base"]["all"]) == ["miniature"]
    assert [each["name"] for each in result["measures"]] == ["miniature"]
    assert not [column for column in table_of(tmp_path / "out") if "pickscore" in column]
    assert "pickscore" not in json.dumps([result["figures"], result["comparisons"], result["protocol"]["judges"]])


def test_a_result_without_any_measure_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    result = run(tmp_path / "out", benchmark=only("pickscore"), limit=2)
    assert (result["measures"], result["figures"]["base"]["all"]) == ([], {})
    assert show([tmp_path / "out"], None, allow_different=False)["skipped"] == result["skipped"]


def test_prompts_that_the_miniature_does_not_know_are_told_before_anything_is_drawn(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red sphere on sand\na castle\n")
    benchmark = load_benchmark(str(tmp_path / "prompts.txt")).model_copy(update={"metrics": ("statistics",)})
    with pytest.raises(UsageError, match="the miniature cannot draw 'a castle'"):
        run(tmp_path / "out", Request(benchmark, {"base": BASE}))
    assert not (tmp_path / "out").exists()


def test_a_group_that_is_called_like_all_of_them_is_told_before_anything_is_drawn(tmp_path):
    for name in ("all", "photo"):
        (tmp_path / f"{name}.json").write_text('["a red sphere on sand"]')
    prompts = {"layout": "lists", "files": ["all.json", "photo.json"]}
    benchmark = Benchmark.model_validate(
        {"name": "x", "description": "x", "prompts": prompts, "metrics": ["statistics"]}
    )
    with pytest.raises(UsageError, match="a group of prompts is called 'all'"):
        run(tmp_path / "out", Request(benchmark, {"base": BASE}, prompts=tmp_path))
    assert not (tmp_path / "out").exists()


def test_models_whose_own_steps_differ_are_not_compared(tmp_path):
    models = {"base": BASE, "other": Source(str(WEIGHTS / "pipeline"))}  # which does not know that it is the miniature
    with pytest.raises(UsageError, match=r"other has steps 50 of its own, and base 12: say in a benchmark's \.yaml"):
        run(tmp_path, Request(only("statistics", steps=None), models, limit=2))


def test_pictures_that_another_machine_has_drawn_out_of_sight_are_one_line(tmp_path, monkeypatch):
    drawn = recipe.drawing.sample

    def on_a_disk_of_its_own(*arguments):
        for row in drawn(*arguments):
            yield row
        Path(row["file"]).unlink()

    monkeypatch.setattr(recipe.drawing, "sample", on_a_disk_of_its_own)
    with pytest.raises(SrpoError, match=r"\.png was drawn and is not here: with --nodes all machines have to share"):
        run(tmp_path / "out", benchmark=only("statistics"), limit=2)


def test_a_model_that_is_not_here_leaves_no_folder(tmp_path):
    with pytest.raises(SrpoError):
        run(tmp_path / "out", models={"base": Source(str(tmp_path / "nothing"))})
    assert list(tmp_path.iterdir()) == []


# --- shown again --------------------------------------------------------------------------------------------------


def test_a_result_is_shown_as_it_is_and_two_are_compared_anew(copied, result, styles, tmp_path):
    shown = show([copied], None, allow_different=False)
    assert shown["figures"] == result["figures"] and shown["comparisons"] == result["comparisons"]
    run(tmp_path / "second", limit=LIMIT, models={"tuned": BASE})
    both = show([copied, tmp_path / "second" / "results.json"], tmp_path / "both", allow_different=False)
    labels = [model["label"] for model in both["models"]]
    assert labels == ["base", "again", "copied/tuned", "second/tuned"]
    last = {each["measure"]: each for each in both["comparisons"] if each["model"] == "second/tuned"}
    assert last["photo_distance"]["difference"] == 0
    assert json.loads((tmp_path / "both" / "results.json").read_text()) == both
    table = table_of(tmp_path / "both")
    assert all((tmp_path / "both" / file).is_file() for file in table["file"])


def test_what_people_said_stays_in_the_report(copied, request_of_three, tmp_path):
    run(tmp_path / "second", limit=LIMIT, models={"other": BASE})
    analysis = analysis_of("base", "tuned")
    (copied / "analysis.json").write_text(json.dumps(analysis))
    for write in (
        lambda: run(copied, request_of_three),
        lambda: show([copied], copied, allow_different=False),
    ):
        (copied / "report.html").unlink(missing_ok=True)
        write()
        assert (copied / "report.html").read_text().count('id="study"') == 1
    show([copied, tmp_path / "second"], tmp_path / "both", allow_different=False)
    show([copied], tmp_path / "again", allow_different=False)
    (copied / "analysis.json").write_text(json.dumps(analysis_of("somebody", "else")))
    run(copied, request_of_three)
    for folder in (tmp_path / "both", tmp_path / "again", copied):
        assert 'id="study"' not in (folder / "report.html").read_text()


def test_a_file_that_only_has_the_name_of_an_analysis_is_told(copied):
    (copied / "analysis.json").write_text('{"accuracy": 1}')
    with pytest.raises(UsageError, match=r"analysis\.json is no analysis of srpo eval rate"):
        show([copied], copied, allow_different=False)


def test_results_side_by_side_know_every_command(copied, tmp_path):
    run(tmp_path / "second", limit=LIMIT, models={"other": BASE})
    run(tmp_path / "third", limit=LIMIT, models={"third": BASE})
    for name in ("copied", "second", "third"):
        file = tmp_path / name / "results.json"
        data = json.loads(file.read_text())
        data["environment"]["command"] = ["/bin/srpo", "eval", name]
        file.write_text(json.dumps(data))
    assert "commands" not in show([copied], None, allow_different=False)
    show([copied, tmp_path / "second"], tmp_path / "both", allow_different=False)
    all_of_them = show([tmp_path / "both", tmp_path / "third"], None, allow_different=False)
    assert all_of_them["commands"] == [["/bin/srpo", "eval", name] for name in ("copied", "second", "third")]


def test_showing_writes_over_no_result_of_something_else(copied, tmp_path):
    run(tmp_path / "second", limit=LIMIT, models={"other": BASE})
    run(tmp_path / "short", limit=2)
    before = (copied / "results.json").read_bytes()
    with pytest.raises(UsageError, match="is one of the results, which would be lost"):
        show([tmp_path / "second", copied], copied, allow_different=False)
    with pytest.raises(UsageError, match=f"holds a result of miniature with prompt_count {LIMIT}, not 2"):
        show([tmp_path / "short"], copied, allow_different=False)
    assert (copied / "results.json").read_bytes() == before
    show([copied], copied, allow_different=False)  # its own report anew
    assert json.loads((copied / "results.json").read_text())["figures"] == json.loads(before)["figures"]
