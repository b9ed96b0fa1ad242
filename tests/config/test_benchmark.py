"""Benchmarks as data: the built-in ones are complete, a user's own are checked, extended and refused in one line."""

import pytest

from srpo_cli.config.benchmark import (
    BENCHMARKS_FOLDER,
    Benchmark,
    PromptsSource,
    benchmark_names,
    describe,
    for_miniature,
    load_benchmark,
)
from srpo_cli.errors import UsageError
from srpo_cli.metrics.pictures import STATISTICS
from srpo_cli.miniature.world import SIZE, STYLE_WORDS
from srpo_cli.registry import REWARDS, metric_parts

PROMPTS = {  # in all, and pictures of each
    "dpg": (1065, 4),
    "drawbench": (200, 1),
    "geneval": (553, 4),
    "hpdv2": (3200, 1),
    "hpdv2-500": (500, 1),
    "miniature": (256, 1),
    "parti": (1632, 1),
}
SMALLEST = "name: mine\ndescription: mine\nprompts: {files: [p.txt]}\nmetrics: [statistics]\n"


def refusal(name: str) -> str:
    """The message with which loading is refused."""
    with pytest.raises(UsageError) as caught:
        load_benchmark(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The built-in ones


def test_every_file_of_the_folder_is_a_known_benchmark():
    assert sorted(PROMPTS) == benchmark_names() == sorted(path.stem for path in BENCHMARKS_FOLDER.iterdir())


@pytest.mark.parametrize("name", benchmark_names())
def test_a_built_in_benchmark_is_complete(name):
    benchmark = load_benchmark(name)
    source = benchmark.prompts
    assert benchmark.name == name and "\n" not in benchmark.description
    groups = [min(count, source.first_of_group or count) for count in source.groups.values()]
    assert (sum(groups) or source.count, benchmark.images_per_prompt) == PROMPTS[name]
    assert source.licence and (source.repo or source.layout == "world")
    assert benchmark.steps and benchmark.size and benchmark.seed_step >= benchmark.images_per_prompt


@pytest.mark.parametrize("name", benchmark_names())
def test_every_reward_that_a_built_in_benchmark_asks_for_exists(name):
    metrics = load_benchmark(name).metrics
    assert len(set(metrics)) == len(metrics)
    for metric in set(metrics) - {"statistics", "oracle", "geneval"}:
        REWARDS.find(metric.removeprefix("sgp:").removeprefix("diversity:"))
    assert not any(metric in STATISTICS for metric in metrics)  # they come together, by the name of statistics


@pytest.mark.parametrize("name", benchmark_names())
def test_a_benchmark_as_data_is_the_benchmark(name):
    benchmark = load_benchmark(name)
    data = describe(benchmark)
    assert "published" not in data
    assert Benchmark.model_validate(data).model_dump() == benchmark.model_copy(update={"published": None}).model_dump()


def test_the_seeds_are_those_of_the_papers_scripts():
    assert [load_benchmark("hpdv2").first_seed(index) for index in (0, 1, 3199)] == [42, 1042, 3_199_042]


def test_the_published_rows_are_those_of_table_1():
    rows = {row.model: row.figures for row in load_benchmark("hpdv2").published.rows}
    assert list(rows) == ["FLUX.1-dev", "ReFL*", "DRaFT-LV*", "DanceGRPO", "Direct-Align", "SRPO"]
    assert list(rows["SRPO"].values()) == [6.194, 23.040, 1.118, 0.289, 0.505, 4.275]
    assert rows["FLUX.1-dev"]["hpsv2.1"] == 0.289
    assert all("sgp:hpsv2.1" not in figures for figures in rows.values())  # the raw gap is not what is printed there
    geneval = {row.model: row.figures for row in load_benchmark("geneval").published.rows}
    assert list(geneval) == list(rows)
    assert [figures["geneval"] for figures in geneval.values()] == [0.678, 0.656, 0.636, 0.585, 0.668, 0.665]
    assert "detector" in load_benchmark("geneval").published.note


def test_the_study_prompts_differ_from_hpdv2_in_nothing_that_is_drawn():
    whole, study = (describe(load_benchmark(name)) for name in ("hpdv2", "hpdv2-500"))
    changed = {key for key in whole if whole[key] != study[key]}
    assert changed == {"name", "description", "prompts", "batches"}
    assert {key for key in whole["prompts"] if whole["prompts"][key] != study["prompts"][key]} == {"first_of_group"}
    assert load_benchmark("hpdv2-500").published is None


@pytest.mark.parametrize("name", ["dpg", "drawbench", "parti"])
def test_benchmarks_of_the_same_kind_are_drawn_and_measured_as_hpdv2_is(name):
    other, hpdv2 = load_benchmark(name), load_benchmark("hpdv2")
    assert set(hpdv2.metrics) <= set(other.metrics)
    for key in ("seed", "seed_step", "steps", "guidance", "size", "control_words", "overall"):
        assert getattr(other, key) == getattr(hpdv2, key)
    assert (other.batches, other.published, other.prompts.groups, other.prompts.sha256) == (None, None, {}, {})
    assert other.picture_path == {"dpg": "{name}-{image}"}.get(name)


def test_the_miniature_is_measured_in_words_that_its_world_knows():
    benchmark = load_benchmark("miniature")
    assert benchmark.size == (SIZE, SIZE)
    known = {word for words in STYLE_WORDS.values() for word in words}
    assert {*benchmark.control_words.positive, *benchmark.control_words.negative} <= known


def test_the_miniature_is_judged_by_a_reward_that_is_held_out():
    kinds = [metric_parts(name) for name in load_benchmark("miniature").metrics]
    assert {("reward", "miniature:clip"), ("sgp", "miniature:clip")} <= set(kinds)


# A file of prompts, and the miniature


def test_any_file_of_prompts_is_a_benchmark(write):
    benchmark = load_benchmark(write("a red sphere\n", "cats.txt"))
    assert (benchmark.name, benchmark.prompts.files, benchmark.prompts.layout) == ("cats", ("cats.txt",), "table")
    assert benchmark.metrics == load_benchmark("hpdv2").metrics
    assert (benchmark.images_per_prompt, benchmark.steps, benchmark.size) == (1, None, None)
    assert [benchmark.first_seed(index) for index in (0, 2)] == [0, 2000]


def test_where_a_file_of_prompts_is_does_not_change_the_protocol(write):
    here, there = (load_benchmark(write("a red sphere\n", name)) for name in ("a/cats.txt", "b/cats.txt"))
    assert here.folder != there.folder
    assert describe(here) == describe(there)


def test_on_the_miniature_other_prompts_are_measured_as_its_own_are():
    hpdv2, own = load_benchmark("hpdv2"), load_benchmark("miniature")
    swapped = for_miniature(hpdv2)
    assert swapped.metrics == own.metrics
    assert (swapped.steps, swapped.size, swapped.control_words) == (own.steps, own.size, own.control_words)
    assert (swapped.prompts, swapped.seed, swapped.batches) == (hpdv2.prompts, hpdv2.seed, hpdv2.batches)
    assert swapped.published is None


def test_on_the_miniature_plug_ins_and_diversity_stay(write):
    metrics = "[hpsv2.1, deqa.py, 'deqa.py:load_it', 'diversity:pickscore']"
    benchmark = load_benchmark(write(f"extends: dpg\nmetrics: {metrics}\n"))
    own = load_benchmark("miniature").metrics
    assert for_miniature(benchmark).metrics == (*own, "diversity:miniature", "deqa.py", "deqa.py:load_it")


@pytest.mark.parametrize("metrics", ["[oracle]", "['sgp:miniature', hpsv2.1]", "['sgp:miniature:clip']"])
def test_a_benchmark_that_was_made_for_the_miniature_is_left_alone(write, metrics):
    benchmark = load_benchmark(write(f"extends: miniature\nmetrics: {metrics}\nsteps: 3\n"))
    assert for_miniature(benchmark) is benchmark


# Extending


def test_own_keys_win_and_sections_are_merged_key_by_key(write):
    benchmark = load_benchmark(write("extends: hpdv2\nsteps: 4\nprompts: {groups: {anime: 2, photo: 3}}\n"))
    base = load_benchmark("hpdv2")
    assert benchmark.steps == 4 and benchmark.guidance == base.guidance
    assert benchmark.prompts.groups == {"anime": 2, "photo": 3}
    assert benchmark.prompts.files == base.prompts.files
    assert benchmark.published is None and base.published is not None


def test_one_that_extends_another_does_not_go_by_its_name(write):
    benchmark = load_benchmark(write("extends: hpdv2\n"))
    assert (benchmark.name, benchmark.description) == ("mine", "mine, which extends hpdv2")


def test_published_figures_may_be_stated_anew(write):
    text = "extends: hpdv2\npublished: {source: us, rows: [{model: m, figures: {hpsv2.1: 0.3}}]}\n"
    assert load_benchmark(write(text)).published.rows[0].figures == {"hpsv2.1": 0.3}


def test_a_file_extends_another_file_by_its_place_and_the_prompts_stay_where_they_are(write, tmp_path):
    write(SMALLEST, "base/mine.yaml")
    heir = load_benchmark(write("extends: base/mine.yaml\nseed: 7\n", "heir.yaml"))
    assert (heir.name, heir.seed, heir.folder) == ("heir", 7, tmp_path / "base")
    own = load_benchmark(write("extends: base/mine.yaml\nprompts: {files: [q.txt]}\n", "own.yaml"))
    assert own.folder == tmp_path


@pytest.mark.parametrize("base", ["hpdv2", "hpdv2-500", "dpg", "parti", "miniature"])
@pytest.mark.parametrize("own", ["files: [q.txt]", "layout: table, files: [q.txt], count: 2"])
def test_of_a_file_that_names_its_own_prompts_nothing_is_said_that_is_true_of_the_others(base, own, write, tmp_path):
    benchmark = load_benchmark(write(f"extends: {base}\nprompts: {{{own}}}\n", "own.yaml"))
    count = 2 if "count" in own else None
    assert benchmark.prompts == PromptsSource(files=("q.txt",), count=count) and benchmark.folder == tmp_path
    assert benchmark.picture_path is None and benchmark.metrics == load_benchmark(base).metrics


def test_another_repository_is_taken_key_by_key(write):
    text = "extends: hpdv2\nprompts: {repo: us/HPD, hub: github, files: [a/anime.json], groups: {anime: 3}}\n"
    benchmark = load_benchmark(write(text))
    assert (benchmark.prompts.repo, benchmark.prompts.layout) == ("us/HPD", "lists")


def test_a_circle_of_files_is_refused(write):
    write("extends: a.yaml\n", "b.yaml")
    assert "leads back to itself" in refusal(write("extends: b.yaml\n", "a.yaml"))


# Mistakes


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hpdv3", ["Unknown benchmark 'hpdv3'", "Did you mean 'hpdv2'?", "parti"]),
        ("nope.yaml", ["'nope.yaml' does not exist"]),
        ("prompts/nope.txt", ["'prompts/nope.txt' does not exist"]),
        (str(BENCHMARKS_FOLDER), ["is a folder"]),
    ],
)
def test_what_is_no_benchmark_is_refused_by_name(name, parts):
    message = refusal(name)
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stepz: 3", ["Unknown key 'stepz'", "Did you mean steps?"]),
        ("prompts: {groupes: {}}", ["Unknown key 'prompts.groupes'", "Did you mean prompts.groups?"]),
        ("prompts: {qqq: 1}", ["Unknown key 'prompts.qqq'", "There are prompts.layout, "]),
        ("published: {rows: [{model: m, figure: {}}]}", ["'published.rows.figure'", "published.rows.figures"]),
        ("steps: 0", ["steps is 0", "greater than or equal to 1", "Meaning: sampling steps"]),
        ("steps: 2.5", ["steps is 2.5", "integer"]),
        ("images_per_prompt: 65", ["images_per_prompt is 65", "less than or equal to 64"]),
        ("size: [1, 2, 3]", ["size", "Meaning: [height, width] in pixels"]),
        ("metrics: []", ["metrics is []", "at least 1"]),
        ("overall: styles", ["overall is styles", "'pictures' or 'groups'"]),
        ("prompts: {sha256: {benchmark/anime.json: abc}}", ["prompts.sha256.benchmark/anime.json is abc", "digest"]),
        ("prompts: {sha256: {x.json: " + "a" * 64 + "}}", ["prompts.sha256 names 'x.json'"]),
        ("prompts: {repo: null}", ["prompts.repo is null and prompts.hub is dataset", "give both"]),
        ("prompts: {count: 3}", ["prompts.count is 3", "add up to 3200"]),
        ("prompts: {files: []}", ["prompts.files is []", "at least one file"]),
        ("prompts: {files: [../../secret.json]}", ["'../../secret.json'", "paths inside"]),
        ("prompts: {layout: folder}", ["layout folder needs one folder"]),
        ("prompts: {layout: world}", ["prompts.layout is world"]),
        ("prompts: hpdv2", ["prompts is hpdv2", "should be keys with values."]),
        ("prompts: {groups: 3}", ["prompts.groups is 3", "should be keys with values."]),
        ("prompts: {groups: {anime: many}}", ["prompts.groups.anime is many", "prompts in each group"]),
        ("picture_path: '{model}/{index}'", ["picture_path is", "{id}, {group}"]),
        ("picture_path: '{id.__class__}'", ["picture_path is", "{id}, {group}"]),
        ("picture_path: '{name}'", ["only prompts.layout folder has a {name}"]),
        ("control_words: {template: '{word}'}", ["control_words", "{prompt} once"]),
        ("published: {source: x, rows: [{model: m, figures: {hps: 1}}]}", ["figures of no metric: hps"]),
        ("published: {source: x, rows: [{model: m, figures: {geneval: 1}}]}", ["figures of no metric: geneval"]),
        ("extends: hpdv9", ["'hpdv9'", "Did you mean 'hpdv2'?"]),
        ("extends: [a]", ["extends", "[a]"]),
        ("extends: other.yaml", ["other.yaml' does not exist"]),
        ("seed: 1\nseed: 2", ["appears twice"]),
        ("- a list", ["should hold keys with values"]),
        ("a: [", ["is not YAML"]),
    ],
)
def test_a_mistake_is_one_line_with_file_key_and_value(write, text, parts):
    extends = "" if text.startswith(("extends", "-", "a:")) else "extends: hpdv2\n"
    path = write(extends + text + "\n")
    message = refusal(path)
    assert "mine.yaml" in message or "other.yaml" in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("key", ["name", "description", "prompts", "metrics"])
def test_a_file_that_extends_nothing_has_to_say_everything(write, key):
    lines = [line for line in SMALLEST.splitlines() if not line.startswith(key)]
    assert f"{key} is missing from benchmark" in refusal(write("\n".join(lines)))
    assert load_benchmark(write(SMALLEST)).prompts.files == ("p.txt",)


def test_a_file_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refusal(str(tmp_path / "mine.yaml"))
