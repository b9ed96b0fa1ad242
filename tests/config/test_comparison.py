"""Comparisons as data: the built-in ones resolve, methods build on each other, and mistakes are one line."""

import pytest

from srpo_cli.config.comparison import COMPARISONS_FOLDER, comparison_names, load_comparison
from srpo_cli.errors import UsageError

TOP = """
name: mine
description: mine
budget: 100
seeds: [1, 2]
columns: [photo_rate]
"""
METHODS = """
methods:
  - {label: refl, preset: "baselines:refl", tuning: {lr: [1e-5, 2e-5], by: reward}}
  - {label: srpo, preset: realism, set: {algorithm.target: null, rollout.steps: 4}, checkpoints: 2}
"""
COSTS = "rate: photo_rate\nlevels: [0.1]\nreference: srpo\n"


def row(keys: str) -> str:
    """The methods, and one more."""
    return f"{METHODS}  - {{{keys}}}\n"


def refusal(name: str) -> str:
    """The message with which loading is refused."""
    with pytest.raises(UsageError) as caught:
        load_comparison(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_file_of_the_folder_is_a_known_comparison():
    assert "table1" in comparison_names()
    assert comparison_names() == sorted(path.stem for path in COMPARISONS_FOLDER.iterdir())


@pytest.mark.parametrize("name", comparison_names())
def test_a_built_in_comparison_and_each_of_its_methods_resolve(name):
    comparison = load_comparison(name)
    assert comparison.name == name and "\n" not in comparison.description
    grouped = {label for labels in comparison.groups.values() for label in labels}
    assert grouped == {method.label for method in comparison.methods}
    for label in grouped:
        assert comparison.resolve(label).config.model.name == comparison.model
        assert comparison.method(comparison.rate_owner(label)).like is None


def test_table_1_compares_every_method_that_can_be_trained():
    table = load_comparison("table1")
    named = {table.resolve(label).config.algorithm.name for label in table.groups["methods"]}
    assert named == {"srpo", "direct-align", "refl", "draft", "alignprop", "dance-grpo", "flow-grpo"}
    assert len(table.seeds) >= 3, "fewer say nothing of other seeds"


def test_a_method_that_is_like_another_has_its_preset_settings_and_rate(write):
    keys = "label: wide, like: refl, set: {rollout.steps: 4}, groups: [ablations], checkpoints: 4"
    methods = METHODS.replace("tuning:", "set: {train.batch_size: 2, rollout.steps: 5}, tuning:")
    comparison = load_comparison(write(f"{TOP}{methods}  - {{{keys}}}\n"))
    wide = comparison.method("wide")
    assert (wide.preset, wide.set) == ("baselines:refl", {"train.batch_size": 2, "rollout.steps": 4})
    assert (wide.groups, wide.checkpoints, wide.tuning) == (("ablations",), 4, None)
    assert [comparison.rate_owner(label) for label in ("refl", "srpo", "wide")] == ["refl", "srpo", "refl"]
    config = comparison.resolve("wide").config
    assert (config.algorithm.name, config.train.batch_size, config.rollout.steps) == ("refl", 2, 4)
    assert comparison.groups == {"methods": ["refl", "srpo"], "ablations": ["wide"]}


def test_what_a_cell_settles_wins_over_what_a_method_sets(write):
    comparison = load_comparison(write(TOP + METHODS))
    assert comparison.resolve("srpo").config.algorithm.target is None
    resolved = comparison.resolve("srpo", ["rollout.steps=6"], {"train.steps": 9})
    assert (resolved.config.rollout.steps, resolved.config.train.steps) == (6, 9)


def test_a_tuning_seed_may_be_one_of_the_seeds_where_nothing_is_tuned(write):
    methods = METHODS.replace(", tuning: {lr: [1e-5, 2e-5], by: reward}", "")
    assert load_comparison(write(f"{TOP}tuning_seed: 1{methods}")).tuning_seed == 1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"{TOP}seedz: [1]{METHODS}", ["Unknown key 'seedz'", "Did you mean seeds?"]),
        (TOP + row("label: x, preste: realism"), ["Unknown key 'methods.preste'", "Did you mean methods.preset?"]),
        (
            TOP + row("label: x, preset: realism, tuning: {lr: [1, 2], bye: reward}"),
            ["Unknown key 'methods.tuning.bye'", "Did you mean methods.tuning.by?"],
        ),
        (TOP + row("preset: realism"), ["methods.2.label is missing"]),
        (TOP + row("label: x, preset: realism, tuning: {lr: [1, 2]}"), ["methods.2.tuning.by is missing", "decides"]),
        (TOP + row("label: x"), ["method x", "either preset or like"]),
        (TOP + row("label: x, preset: realism, like: srpo"), ["method x", "either preset or like"]),
        (TOP + row("label: x, like: spro"), ["method x is like spro", "an earlier one with a preset"]),
        (TOP + row("label: x, like: x"), ["method x is like x", "an earlier one"]),
        (TOP + row("label: x, like: y}\n  - {label: y, preset: realism"), ["method x is like y", "an earlier one"]),
        (TOP + row("label: x, like: srpo}\n  - {label: y, like: x"), ["method y is like x", "with a preset"]),
        (
            TOP + row("label: x, like: srpo, tuning: {lr: [1, 2], by: reward}"),
            ["method x has like and tuning", "that of srpo"],
        ),
        (
            TOP + row("label: x, preset: realism, set: {optimizer.lr: 1}, tuning: {lr: [1, 2], by: reward}"),
            ["method x sets optimizer.lr", "leave one of them out"],
        ),
        (
            TOP + row("label: x, like: refl, set: {optimizer.lr: 1}"),
            ["method x sets optimizer.lr", "refl's tuning"],
        ),
        (TOP + row("label: x, like: srpo, set: {train.seed: 1}"), ["method x sets train.seed", "leave it out"]),
        (TOP + row("label: x, like: srpo, set: {guard.action: warn}"), ["method x sets guard.action", "settles"]),
        (TOP + row("label: x, like: srpo, set: {train: {steps: 9}}"), ["method x sets train, a section", "dotted"]),
        (
            TOP + row("label: x, preset: realism, set: {algorithm.pair: 2}"),
            ["method x", "'algorithm.pair' from its set"],
        ),
        (TOP + row("label: srpo, preset: realism"), ["methods has srpo twice"]),
        (TOP + row("label: base, preset: realism"), ["methods has base twice", "the untrained model"]),
        (TOP + row("label: a.b, preset: realism"), ["methods.2.label is a.b", "pattern"]),
        (TOP + row("label: x, preset: realism, groups: []"), ["methods.2.groups is []", "at least 1"]),
        (TOP + row("label: x, preset: realism, checkpoints: 0"), ["methods.2.checkpoints is 0", "cost ratio"]),
        (TOP + row("label: x, preset: realism, tuning: 1e-5"), ["methods.2.tuning is 1", "keys with values"]),
        (TOP + METHODS.replace("[1e-5, 2e-5]", "[1e-5]"), ["methods.0.tuning.lr is [1", "at least 2"]),
        (TOP + METHODS.replace("[1e-5, 2e-5]", "[2e-5, 1e-5]"), ["methods.0.tuning.lr is [2", "should rise"]),
        (TOP + METHODS.replace("[1e-5, 2e-5]", "[1e-5, 1e-5]"), ["tuning.lr is [1", "each rate once"]),
        (TOP + METHODS.replace("[1e-5, 2e-5]", "[0, 1e-5]"), ["methods.0.tuning.lr.0 is 0", "greater than 0"]),
        (f"{TOP}methods: srpo", ["methods is srpo", "should be a list"]),
        (f"{TOP}methods: {{srpo: realism}}", ["Unknown key 'methods.srpo'", "methods.label"]),
        (f"{TOP}methods: {{label: srpo}}", ["methods is {label: srpo}", "should be a list"]),
        (f"{TOP}methods: [srpo]", ["methods.0 is srpo", "should be keys with values"]),
        (f"{TOP}methods: []", ["methods is []", "at least 1"]),
        (TOP.replace("[1, 2]", "[1, 2, 1]") + METHODS, ["seeds is [1, 2, 1]", "each seed once"]),
        (TOP.replace("[1, 2]", "[1, -2]") + METHODS, ["seeds.1 is -2", "greater than or equal to 0"]),
        (f"{TOP}tuning_seed: 2{METHODS}", ["tuning_seed is 2", "in seeds", "another one"]),
        (TOP.replace("100", "1e3") + METHODS, ["budget is 1", "valid integer", "forwards of the transformer"]),
        (f"{TOP}rate: photo_rate{METHODS}", ["rate is photo_rate", "levels and reference together"]),
        (f"{TOP}rate: photo_rate\nlevels: [1]{METHODS}", ["rate is photo_rate", "levels and reference together"]),
        (f"{TOP}rate: photo_rate\nreference: srpo{METHODS}", ["rate is photo_rate", "levels and reference together"]),
        (f"{TOP}levels: [1]{METHODS}", ["rate is null", "levels and reference together"]),
        (TOP + COSTS.replace("srpo", "refl") + METHODS, ["reference is refl", "several checkpoints"]),
        (TOP + COSTS.replace("srpo", "sprp") + METHODS, ["reference is sprp", "label of a method"]),
        (f"{TOP}budget: 3{METHODS}", ["appears twice"]),
        (TOP + row("label: x, preset: realims"), ["method x of comparison mine", "'realims'", "'realism'"]),
        (TOP + row("label: x, preset: nope.yaml"), ["method x of comparison mine", "'nope.yaml' does not exist"]),
        (
            TOP + row("label: x, like: srpo, set: {algorithm.windw: [0, 1]}"),
            ["method x of comparison mine", "'algorithm.windw'", "algorithm.window"],
        ),
        (
            TOP + row("label: x, like: srpo, set: {rollout.steps: 0}"),
            ["method x of comparison mine", "rollout.steps is 0", "greater than or equal to 1"],
        ),
        ("- a list", ["mine.yaml should hold keys with values", "not [a list]"]),
        ("", ["mine.yaml should hold keys with values", "not null"]),
        ("a: [", ["mine.yaml is not YAML"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(write, text, parts):
    message = refusal(write(text))
    assert "mine" in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("key", ["name", "description", "budget", "seeds", "columns", "methods"])
def test_what_has_no_default_has_to_be_said(write, key):
    load_comparison(write(TOP + COSTS + METHODS))
    text = TOP if key == "methods" else "\n".join(x for x in TOP.split("\n") if not x.startswith(key)) + METHODS
    assert f"{key} is missing from comparison" in refusal(write(text))


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    path = tmp_path / "mine.yaml"
    assert "mine.yaml' does not exist" in refusal(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refusal(str(path))
    path.unlink()
    path.mkdir()
    assert "mine.yaml' cannot be read: Is a directory" in refusal(str(path))


def test_what_is_no_comparison_is_refused_by_name():
    message = refusal("table2")
    assert all(part in message for part in ("Unknown comparison 'table2'", "Did you mean 'table1'?", "a .yaml file"))
