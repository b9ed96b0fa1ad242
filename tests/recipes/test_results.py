"""Results: what they hold, what cannot be read for one, how they are put side by side, and the tables made of them."""

import json
import re
import string
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from srpo_cli.config.benchmark import Benchmark
from srpo_cli.errors import UsageError
from srpo_cli.metrics.aggregate import ALL, Measure, aggregate, mean_absolute
from srpo_cli.recipes.results import (
    RESULTS,
    TABLE,
    Result,
    difference_rows,
    interval_rows,
    latex,
    markdown,
    mean_rows,
    measure_rows,
    merge,
    protocol_digest,
    read_result,
    shown,
    summarise,
    write_result,
    write_tables,
)

MEASURES = [
    Measure("hpsv2.1", "HPS", ("hpsv2.1",), digits=3),
    Measure("distance", "distance", ("deviation:a", "deviation:b"), mean_absolute, "lower", 2, "in spreads"),
    Measure("fid", "FID", (), better="lower", digits=1),
    Measure("saturation", "saturation", ("saturation",), better=""),
]
PUBLISHED = {
    "source": "arXiv 2509.06942, Table 1",
    "note": "50 steps",
    "rows": [{"model": "FLUX.1-dev", "figures": {"hpsv2.1": 0.289, "deqa": 4.292}}],
}


def benchmark_of(**changes):
    keys = {
        "name": "tiny",
        "description": "A few prompts",
        "prompts": {"layout": "table", "files": ["prompts.txt"]},
        "metrics": ["hpsv2.1"],
    }
    return Benchmark.model_validate({**keys, "published": PUBLISHED, **changes})


def table_of(*labels, prompts=24, styles=("anime", "photo"), seed=0, images=1):
    """Each style's prompts in order, with numbers that depend on the label and the seed alone."""
    parts = []
    for label in labels:
        numbers = np.random.default_rng([seed, *label.encode()])
        rows = [
            {
                "model": label,
                "item": f"{style}/{number:05d}",
                "group": style,
                "prompt": f"{style} {number}",
                "image": image,
                "seed": 7,
                "file": f"pictures/{label}/{style}-{number}-{image}.png",
            }
            for style in styles
            for number in range(prompts // len(styles))
            for image in range(images)
        ]
        values = numbers.normal(size=(4, len(rows)))
        columns = dict(zip(["hpsv2.1", "deviation:a", "deviation:b", "saturation"], values, strict=True))
        parts.append(pd.DataFrame(rows).assign(**columns))
    return pd.concat(parts, ignore_index=True)


def result_of(folder, *labels, steps=12, sets=True, fingerprint="of {}", **options):
    benchmark = benchmark_of(batches=4)
    table = table_of(*labels, **options)
    protocol = {"benchmark": benchmark.model_dump(mode="json"), "steps": steps, "items": table["item"].nunique()}
    models = [
        {
            "label": label,
            "model": "miniature",
            "weights": None,
            "fingerprint": fingerprint.format(label),
            "pictures": int((table["model"] == label).sum()),
            "folder": f"pictures/{label}",
        }
        for label in labels
    ]
    data = summarise(
        table,
        MEASURES,
        benchmark,
        protocol,
        models,
        skipped=[("pickscore", "its weights are missing: hf download x")],
        sets={label: {"fid": 10.0 + len(label)} for label in labels} if sets else None,
        cost={label: {"seconds": 1.5, "pictures_drawn": 3} for label in labels},
    )
    return Result(data, table, folder)


@pytest.fixture
def written(tmp_path):
    """A result in a folder."""
    result = result_of(tmp_path / "one", "base", "tuned")
    write_result(result)
    return result


def test_a_result_holds_what_the_table_says():
    result = result_of("anywhere", "base", "tuned")
    found = aggregate(result.table, MEASURES)
    assert result.data["groups"] == ["anime", "photo"]
    for label in ("base", "tuned"):
        for group in (ALL, "anime", "photo"):
            expected = {name: figure._asdict() for name, figure in found.figures[label][group].items()}
            held = dict(result.data["figures"][label][group])
            assert held.pop("fid", None) == (
                {"mean": 10.0 + len(label), "low": None, "high": None, "count": 24} if group == ALL else None
            )
            assert held == expected
    assert result.data["comparisons"] == [comparison._asdict() for comparison in found.comparisons]
    assert [signal["signal"] for signal in result.data["hacking"]] == ["saturation"]
    anime = result.table.query("model == 'tuned' and group == 'anime'")["hpsv2.1"].to_numpy().reshape(4, 3).mean(1)
    batch = result.data["batches"]["tuned"]["anime"]["hpsv2.1"]
    assert batch == {"mean": pytest.approx(anime.mean()), "std": pytest.approx(anime.std()), "prompts": 3}
    assert result.data["published"] == PUBLISHED
    assert result.data["skipped"] == [{"metric": "pickscore", "reason": "its weights are missing: hf download x"}]


def test_a_measure_that_nobody_could_take_is_no_column_of_the_result():
    result = result_of("anywhere", "base", sets=False)
    assert [measure["name"] for measure in result.data["measures"]] == ["hpsv2.1", "distance", "saturation"]


def test_a_measure_whose_reduction_has_no_name_is_refused_since_it_could_not_be_merged():
    nameless = Measure("odd", "odd", ("hpsv2.1",), lambda means: means.sum(-1))
    with pytest.raises(ValueError, match="odd reduces by none of first, hundredfold, mean, mean_absolute"):
        summarise(table_of("base"), [nameless], benchmark_of(), {}, [{"label": "base"}])


def test_the_digest_of_a_protocol_knows_its_values_and_not_their_order():
    digest = protocol_digest({"steps": 12, "size": [48, 48]})
    assert re.fullmatch("[0-9a-f]{16}", digest)
    assert digest == protocol_digest({"size": [48, 48], "steps": 12})
    assert digest != protocol_digest({"steps": 13, "size": [48, 48]})


def test_a_result_is_read_as_it_was_written_by_its_folder_or_its_file(written):
    for path in (written.folder, written.folder / RESULTS):
        data, table, folder = read_result(path)
        assert data == written.data
        pd.testing.assert_frame_equal(table, written.table)
        assert folder == written.folder


def test_a_result_without_its_table_can_be_read_and_shown_alone(written, tmp_path):
    (written.folder / TABLE).unlink()
    result = read_result(written.folder)
    assert result.table is None
    data, table = merge([result])
    assert table is None
    assert data["figures"] == written.data["figures"]
    other = result_of(tmp_path / "two", "other")
    with pytest.raises(UsageError, match=r"one has no images\.parquet, which comparing takes"):
        merge([other, result])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist: give the results.json"),
        ("{", r"is no result of srpo eval \(Expecting"),
        (b"\xff\xfe", "is no result of srpo eval"),
        ("[1]", r"is no result of srpo eval \(it has no benchmark\)"),
        ('{"benchmark": 1}', r"is no result of srpo eval \(it has no description\)"),
    ],
)
def test_what_is_no_result_is_told_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / RESULTS).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as refused:
        read_result(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_result_of_another_format_is_refused(written):
    (written.folder / RESULTS).write_text(json.dumps({**written.data, "format": 2}))
    with pytest.raises(UsageError, match="has format 2, and this srpo reads 1"):
        read_result(written.folder)


def test_a_table_that_is_not_the_results_is_refused(written):
    written.table.drop(columns="prompt").to_parquet(written.folder / TABLE)
    with pytest.raises(UsageError, match="has no column prompt"):
        read_result(written.folder)
    table_of("stranger").to_parquet(written.folder / TABLE)
    with pytest.raises(UsageError, match="is not of the models base, tuned"):
        read_result(written.folder)
    (written.folder / TABLE).write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="cannot be read"):
        read_result(written.folder)


def test_merged_models_are_compared_with_the_first_one_as_if_measured_in_one_go(tmp_path):
    one, two = result_of(tmp_path / "one", "base", "short"), result_of(tmp_path / "two", "longest")
    data, table = merge([one, two], tmp_path)
    together = result_of(tmp_path, "base", "short", "longest").data
    for key in ("measures", "groups", "figures", "batches", "comparisons", "hacking", "skipped", "protocol_digest"):
        assert data[key] == together[key], key
    assert [model["label"] for model in data["models"]] == ["base", "short", "longest"]
    assert data["cost"].keys() == {"base", "short", "longest"}
    assert table["model"].value_counts().to_dict() == {"base": 24, "short": 24, "longest": 24}


def test_files_of_a_merged_result_are_found_from_its_own_folder(tmp_path):
    one, two = result_of(tmp_path / "one", "base"), result_of(tmp_path / "deep" / "two", "tuned")
    data, table = merge([one, two], tmp_path / "out")
    assert table["file"].iloc[0] == "../one/pictures/base/anime-0-0.png"
    assert table["file"].iloc[-1] == "../deep/two/pictures/tuned/photo-11-0.png"
    assert [model["folder"] for model in data["models"]] == ["../one/pictures/base", "../deep/two/pictures/tuned"]
    again, same = merge([one], one.folder)
    assert same["file"].tolist() == one.table["file"].tolist()
    assert again["models"] == one.data["models"]


def test_a_model_of_several_results_is_taken_once(tmp_path):
    one, two = result_of(tmp_path / "one", "base", "short"), result_of(tmp_path / "two", "base", "longest")
    data, table = merge([one, two])
    assert list(data["figures"]) == list(dict.fromkeys(table["model"])) == ["base", "short", "longest"]


def test_different_models_of_one_label_are_told_apart_by_their_folders(tmp_path):
    one = result_of(tmp_path / "a" / "eval", "base", "tuned", fingerprint="first {}")
    two = result_of(tmp_path / "b" / "eval", "tuned", seed=1, fingerprint="second {}")
    data, _ = merge([one, two])
    assert list(data["figures"]) == [model["label"] for model in data["models"]] == list(data["cost"])
    assert list(data["figures"]) == ["base", "a/eval/tuned", "b/eval/tuned"]
    assert data["figures"]["a/eval/tuned"]["photo"] == one.data["figures"]["tuned"]["photo"]
    assert data["figures"]["b/eval/tuned"]["photo"] == two.data["figures"]["tuned"]["photo"]
    assert data["figures"]["b/eval/tuned"][ALL]["fid"]["mean"] == 15


def test_different_protocols_are_refused_by_name_unless_that_is_allowed(tmp_path):
    one, two = result_of(tmp_path / "one", "base"), result_of(tmp_path / "two", "base", steps=50)
    with pytest.raises(
        UsageError, match=r"one and .*two have different protocols: steps is 12 and 50\. .*--allow-diff"
    ):
        merge([one, two])
    data, _ = merge([one, two], allow_different=True)
    assert list(data["figures"]) == ["one/base", "two/base"]  # the weights are the same, the pictures are not
    assert data["protocol"]["mixed"] == ["steps is 12 and 50"]
    assert data["protocol_digest"] == protocol_digest(data["protocol"]) != one.data["protocol_digest"]


def test_the_first_of_many_differences_are_named(tmp_path):
    one, two = (result_of(tmp_path / name, name) for name in ("one", "two"))
    two.data["protocol"] = {"benchmark": {"seed": 1}, "steps": 1}
    with pytest.raises(UsageError) as refused:
        merge([one, two])
    assert 'benchmark.name is "tiny" and null; benchmark.description is' in str(refused.value)
    assert re.search(r"; benchmark\.prompts is \{.*\.\.\. and null and \d+ more\. Evaluate", str(refused.value))
    assert "\n" not in str(refused.value)


def test_merged_results_are_compared_over_their_common_prompts(tmp_path):
    one, two = result_of(tmp_path / "one", "base", prompts=24), result_of(tmp_path / "two", "tuned", prompts=10)
    two.table.loc[0, "prompt"] = "another one of the same number"
    data, table = merge([one, two], allow_different=True)
    assert {figure["count"] for own in data["figures"].values() for figure in own[ALL].values()} == {9}
    kept = one.table[one.table["item"].isin(two.table["item"][1:])]
    assert data["figures"]["base"][ALL]["hpsv2.1"]["mean"] == pytest.approx(kept["hpsv2.1"].mean())
    assert [model["pictures"] for model in data["models"]] == [9, 9]
    assert "fid" not in data["figures"]["base"][ALL]  # it was of pictures that are no longer there
    assert len(table) == 18
    stranger = result_of(tmp_path / "three", "other", styles=("paintings",))
    with pytest.raises(UsageError, match="no prompt in common"):
        merge([one, stranger], allow_different=True)


def test_of_two_definitions_of_a_measure_the_first_results_holds(tmp_path):
    one, two = result_of(tmp_path / "one", "base"), result_of(tmp_path / "two", "tuned")
    two.data["measures"][0].update(title="HPS x 100", reduce="hundredfold")
    data, _ = merge([one, two])
    assert data["measures"] == one.data["measures"]
    assert data["figures"]["tuned"][ALL]["hpsv2.1"] == two.data["figures"]["tuned"][ALL]["hpsv2.1"]


def test_a_result_is_not_merged_with_itself(written):
    with pytest.raises(UsageError, match="one is given 2 times"):
        merge([written, read_result(written.folder)])


@pytest.mark.parametrize(
    ("figure", "digits", "text"),
    [
        ({"mean": 0.28949, "low": 0.2804, "high": 0.2996}, 3, "0.289 [0.280, 0.300]"),
        ({"mean": 12.25, "low": None, "high": None}, 1, "12.2"),
        ({"mean": 4.292}, 2, "4.29"),
        ({"mean": -0.0001, "low": -0.0101, "high": 0.0}, 2, "0.00 [-0.01, 0.00]"),
        ({"mean": 3.0, "low": 2.0, "high": 4.0}, 0, "3 [2, 4]"),
        (None, 3, "-"),
    ],
)
def test_a_figure_is_shown_with_its_interval(figure, digits, text):
    assert shown(figure, digits) == text


def test_a_difference_is_shown_with_its_sign():
    assert shown({"mean": 0.5, "low": -0.25, "high": 1.25}, 2, sign=True) == "+0.50 [-0.25, +1.25]"


def test_rows_are_models_columns_are_measures_and_published_rows_come_last_and_marked():
    result = result_of("anywhere", "base", "tuned").data
    rows = measure_rows(result)
    assert [list(row) for row in rows] == [["model", "HPS", "distance", "FID", "saturation"]] * 3
    assert [row["model"] for row in rows] == ["base", "tuned", "FLUX.1-dev (published)"]
    assert rows[0]["HPS"] == shown(result["figures"]["base"][ALL]["hpsv2.1"], 3)
    assert rows[0]["FID"] == "14.0"
    assert list(rows[2].values())[1:] == ["0.289", "-", "-", "-"]  # DeQA was not measured here, and has no column
    by_style = measure_rows(result, "photo")
    assert [row["model"] for row in by_style] == ["base", "tuned"]
    assert by_style[1]["distance"] == shown(result["figures"]["tuned"]["photo"]["distance"], 2)


def test_the_terminals_short_table_has_no_intervals_and_only_measures_with_a_better_side():
    rows = mean_rows(result_of("anywhere", "base", "tuned").data)
    assert list(rows[0]) == ["model", "HPS", "distance", "FID"]
    assert not any("[" in cell for row in rows for cell in row.values())


def test_a_row_a_measure_has_the_difference_of_two_models_and_of_more_a_star_where_one_differs():
    two = result_of("anywhere", "base", "tuned").data
    row = interval_rows(two)[0]
    assert list(row) == ["measure", "base", "tuned", "difference", "p (Holm)", "better is"]
    assert row["difference"] == shown(_difference_of(two["comparisons"][0]), 3, sign=True)
    three = result_of("anywhere", "base", "tuned", "other").data
    for comparison in three["comparisons"]:
        comparison["p_holm"] = 0.01 if comparison["model"] == "other" else 0.2
    rows = interval_rows(three)
    assert list(rows[0]) == ["measure", "base", "tuned", "other", "better is"]
    assert [cell.endswith(" *") for cell in rows[0].values()] == [False, False, False, True, False]


def _difference_of(comparison):
    return {"mean": comparison["difference"], "low": comparison["low"], "high": comparison["high"]}


def test_published_figures_stand_under_a_name_or_a_title_and_rows_without_any_are_left_out(tmp_path):
    result = result_of(tmp_path, "base").data
    rows = [("one", {"hpsv2.1": 0.3}), ("two", {"hps": 0.4}), ("three", {"deqa": 4.3})]
    result["published"]["rows"] = [{"model": model, "figures": figures} for model, figures in rows]
    assert [(row["model"], row["HPS"]) for row in measure_rows(result)[1:]] == [
        ("one (published)", "0.300"),
        ("two (published)", "0.400"),
    ]
    result["published"]["rows"] = result["published"]["rows"][2:]
    write_tables(result, tmp_path)
    assert "ublished" not in (tmp_path / "table.md").read_text() + (tmp_path / "table.tex").read_text()


def test_published_figures_are_said_to_be_of_the_whole_set_beside_those_of_a_part(tmp_path):
    result = result_of("anywhere", "base").data
    for limit in (None, 24):
        write_tables({**result, "selection": {"limit": limit, "group": None}}, tmp_path)
        for name in ("table.md", "table.tex"):
            assert ("of the whole set" in (tmp_path / name).read_text()) == (limit == 24)


def test_prompts_of_one_text_are_counted_once_and_all_of_them_are_named(tmp_path):
    table = table_of("base", prompts=8, styles=("photo",))
    table["prompt"] = [f"text {number // 2}" for number in range(8)]
    protocol = {"benchmark": benchmark_of().model_dump(mode="json")}
    data = summarise(table, MEASURES, benchmark_of(), protocol, [{"label": "base"}], sets={"base": {"fid": 9.0}})
    assert data["counts"] == {"prompts": 8, "texts": 4}
    assert {figure["count"] for figure in data["figures"]["base"][ALL].values()} == {4}
    write_tables(data, tmp_path)
    for name in ("table.md", "table.tex"):
        assert "8 prompts, 4 different texts, protocol" in (tmp_path / name).read_text()


def test_few_prompts_are_said_to_be_few(tmp_path):
    few, many, by_group = (result_of(tmp_path, "base", prompts=prompts).data for prompts in (10, 60, 40))
    assert few["notes"] == ["Only 10 different prompts: intervals and p values of so few are rough."]
    assert many["notes"] == []
    assert by_group["notes"][0].startswith("Group by group there are as few as 20 different prompts: ")
    write_tables(few, tmp_path)
    assert few["notes"][0] in (tmp_path / "table.md").read_text()
    assert few["notes"][0] in (tmp_path / "table.tex").read_text()


def test_measures_of_one_title_go_by_their_names():
    result = result_of("anywhere", "base").data
    result["measures"][1]["title"] = "HPS"
    assert list(measure_rows(result)[0]) == ["model", "hpsv2.1", "distance", "FID", "saturation"]


def test_differences_are_rows_of_model_and_measure():
    result = result_of("anywhere", "base", "tuned").data
    rows = difference_rows(result)
    assert [(row["model"], row["against"], row["measure"]) for row in rows] == [
        ("tuned", "base", "HPS"),
        ("tuned", "base", "distance"),
        ("tuned", "base", "saturation"),
    ]
    first = result["comparisons"][0]
    assert rows[0]["difference"] == shown({**first, "mean": first["difference"]}, 3, sign=True)
    assert rows[0]["higher on"] == f"{100 * first['wins']:.0f} %"
    assert len(difference_rows(result, "photo")) == 3


def test_markdown_has_a_table_for_all_prompts_and_for_each_style(tmp_path):
    result = result_of(tmp_path, "base", "a|b <script>").data
    write_tables(result, tmp_path)
    text = (tmp_path / "table.md").read_text()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(table) for table in tables] == [2 + 3, 2 + 3, 2 + 2, 2 + 2, 2 + 4]  # all, differences, styles, batches
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert tables[0][2].split(" | ")[1] == shown(result["figures"]["base"][ALL]["hpsv2.1"], 3)
    assert r"a\|b \<script>" in tables[0][3]
    assert "Published, not measured here: arXiv 2509.06942, Table 1. 50 steps" in text
    assert "## photo" in text
    assert "- pickscore: its weights are missing: hf download x" in text


def plain_text(source):
    """What LaTeX prints for text out of characters and the commands for special ones."""
    words = {"backslash": "\\", "asciitilde": "~", "asciicircum": "^", "less": "<", "greater": ">", "bar": "|"}
    pattern = r"\\text(\w+)\{\}|\\([&%$#_{}])|([^\\&%$#_{}~^<>|])"
    found = list(re.finditer(pattern, source))
    assert "".join(match[0] for match in found) == source, "a special character is left"
    return "".join(words.get(match[1]) or match[2] or match[3] for match in found)


def test_latex_prints_every_character_as_it_is():
    text = string.digits + string.ascii_letters + string.punctuation + " é±"
    assert plain_text(latex(text)) == text
    assert latex("two\nlines") == "two lines"


def test_the_latex_table_is_a_tabular_of_whole_rows_that_needs_no_package(tmp_path):
    result = result_of(tmp_path, "base", "[50%] a_b & \\input{x}").data
    result["figures"]["base"][ALL]["distance"].update(mean=-0.5, low=-0.75, high=0.25)
    write_tables(result, tmp_path)
    lines = (tmp_path / "table.tex").read_text().splitlines()
    body = [line for line in lines if not line.startswith("%")]
    assert (body[0], body[-1]) == (r"\begin{tabular}{lrrrr}", r"\end{tabular}")
    rows = [line for line in body[1:-1] if line != r"\hline"]
    assert [line.count("&") - line.count(r"\&") for line in rows] == [4] * 4
    assert all(line.startswith("{") and line.endswith(r" \\") for line in rows)  # no row may begin with [ after a \\
    assert r"{[50\%] a\_b \& \textbackslash{}input\{x\}}" in rows[2]
    assert "& $-$0.50 [$-$0.75, 0.25] &" in rows[1]
    assert rows[3].startswith("{FLUX.1-dev (published)} & 0.289 & - & - ")
    assert body.count(r"\hline") == 4  # above and below the headings, above the published rows, at the end


def test_markdown_keeps_a_cell_a_cell():
    assert markdown("a|b\nc \\ `x` *y* <b> 1 < 2") == r"a\|b c \\ \`x\` \*y\* \<b> 1 < 2"


SIXTY_COLUMNS = """
import re, sys, time
from pathlib import Path
import numpy as np, pandas as pd
from srpo_cli.config.benchmark import Benchmark
from srpo_cli.metrics.aggregate import SIGNALS, Measure
from srpo_cli.recipes.results import summarise

models = int(sys.argv[1])
items = 100_000 // models
labels = [f"m{i}" for i in range(models)]
columns = [*SIGNALS, *(f"c{k}" for k in range(60 - len(SIGNALS)))]
table = pd.DataFrame({
    "model": np.repeat(labels, items),
    "item": np.tile([f"{i:06d}" for i in range(items)], models),
    "group": np.tile([f"style {i % 4}" for i in range(items)], models),
    "prompt": np.tile([f"prompt {i}" for i in range(items)], models),
    "image": 0,
    **{name: np.random.default_rng(k).normal(size=models * items) for k, name in enumerate(columns)},
})
measures = [Measure(name, "", (name,), better="" if name in SIGNALS else "higher") for name in columns]
prompts = {"layout": "table", "files": ["prompts.txt"]}
benchmark = Benchmark(name="large", description="large", prompts=prompts, metrics=["hpsv2.1"], batches=10)

def most_memory():  # in kB; not getrusage's, which begins with what the parent process had
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

Path("/proc/self/clear_refs").write_text("5")  # the most from now on
before, start = most_memory(), time.process_time()
data = summarise(table, measures, benchmark, {}, [{"label": label} for label in labels])
assert len(data["hacking"]) == len(SIGNALS) * (models - 1)
print(most_memory() - before, time.process_time() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("models", ["1", "6"])
def test_100_000_pictures_and_60_columns_take_less_than_a_gigabyte_beyond_imports_and_half_a_minute(models):
    command = [sys.executable, "-c", SIXTY_COLUMNS, models]
    kilobytes, seconds = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert 0 < kilobytes < 2**20
    assert seconds < 30
