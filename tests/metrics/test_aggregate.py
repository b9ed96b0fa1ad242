"""Figures out of a table: by hand, against a slow bootstrap, and against what is known of normal draws."""

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from srpo_cli.errors import SrpoError
from srpo_cli.metrics.aggregate import (
    ALL,
    Measure,
    aggregate,
    batch_figures,
    hacking_signals,
    holm,
    hundredfold,
    mean,
    mean_absolute,
)
from srpo_cli.metrics.intervals import resamples

REWARD = Measure("reward", "Reward", ("reward",))


def table_of(models, groups=None, images=1, prompts=None, **columns):
    """A row a picture: ``models`` are labels, ``groups`` and ``prompts`` each item's, columns are (models, items)."""
    groups = groups or [""] * (np.size(next(iter(columns.values()))) // len(models) // images)
    rows = [
        {
            "model": model,
            "item": f"{item:03d}",
            "group": group,
            "prompt": prompts[item] if prompts else f"prompt {item}",
            "image": image,
        }
        for model in models
        for item, group in enumerate(groups)
        for image in range(images)
    ]
    return pd.DataFrame(rows).assign(**{name: np.ravel(values).astype(float) for name, values in columns.items()})


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_a_figure_is_the_mean_of_pictures_with_the_number_of_prompts():
    found = aggregate(table_of(["base"], images=2, reward=[[1, 2, 3, 6]]), [REWARD])
    assert found.groups == ()
    assert found.figures["base"][ALL]["reward"][0::3] == (3.0, 2)
    assert found.comparisons == []


def test_all_pictures_of_a_prompt_are_resampled_together():
    values = normal(0, 1, 40)
    alone = aggregate(table_of(["base"], reward=values), [REWARD])
    fourfold = aggregate(table_of(["base"], images=4, reward=np.repeat(values, 4, axis=1)), [REWARD])
    ours, theirs = (found.figures["base"][ALL]["reward"] for found in (alone, fourfold))
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_measures_reduce_the_means_of_their_columns():
    table = table_of(["base"], a=[[1, -5]], b=[[4, 6]])  # means -2 and 5
    measures = [
        Measure("absolute", "", ("a", "b"), mean_absolute),
        Measure("mean", "", ("a", "b"), mean),
        Measure("hundredfold", "", ("a",), hundredfold),
    ]
    figures = aggregate(table, measures).figures["base"][ALL]
    assert [figure.mean for figure in figures.values()] == [3.5, 1.5, -200.0]


def test_over_all_groups_a_mean_is_that_of_pictures_or_as_geneval_has_it_that_of_groups():
    groups = ["one", "one", "one", "two"]
    table = table_of(["base"], groups, reward=[[0, 0, 3, 5]])
    by_pictures, by_groups = (aggregate(table, [REWARD], overall).figures["base"] for overall in ("pictures", "groups"))
    assert by_pictures[ALL]["reward"].mean == 2  # 8 / 4
    assert by_groups[ALL]["reward"].mean == 3  # (1 + 5) / 2
    assert by_groups["one"]["reward"].mean == by_pictures["one"]["reward"].mean == 1
    assert [by_groups[group]["reward"].count for group in (ALL, "one", "two")] == [4, 3, 1]


def test_prompts_are_resampled_within_their_group():
    found = aggregate(table_of(["base"], ["a", "b", "b"], reward=[[7, 0, 2]]), [REWARD])
    figures = {group: found.figures["base"][group]["reward"] for group in ("a", "b", ALL)}
    assert figures["a"] == (7, 7, 7, 1)  # one prompt is there once in every resample
    assert figures["b"] == (1, 0, 2, 2)
    assert figures[ALL] == (3, pytest.approx(7 / 3), pytest.approx(11 / 3), 3)  # so that the 7 always weighs a third


def test_prompts_of_one_text_are_resampled_together():
    twice = table_of(["base", "tuned"], prompts=["x", "x", "y"], reward=[[0, 4, 5], [1, 5, 5]])
    found = aggregate(twice, [REWARD])
    assert found.figures["base"][ALL]["reward"] == (3, 2, 5, 2)  # x twice: (0 + 4) / 2; y twice: 5; never 0 or 4 alone
    assert found.comparisons[0].wins == 0.75  # higher on x, equal on y
    as_images = table_of(["base", "tuned"], prompts=["x", "y"], images=2, reward=[[0, 4, 5, 5], [1, 5, 5, 5]])
    in_batches = batch_figures(twice, [REWARD], 3)["base"][ALL]["reward"]
    assert in_batches.mean == 3  # batches are of prompts as the benchmark lists them
    assert aggregate(as_images, [REWARD]).comparisons[0].wins == 0.75


def slow_bootstrap(table, groups, seed, draws):
    """The same resamples, taken prompt by prompt: (draws, models) means over all pictures."""
    generator = torch.Generator().manual_seed(seed)
    models = list(dict.fromkeys(table["model"]))
    chosen = [[] for _ in range(draws)]
    for group in dict.fromkeys(groups):
        items = list(dict.fromkeys(table.loc[table["group"] == group, "item"]))
        for draw, row in enumerate(torch.cat(list(resamples(len(items), draws, generator))).tolist()):
            chosen[draw] += [items[number] for number in row]
    rewards = {key: list(rows["reward"]) for key, rows in table.groupby(["model", "item"])}
    return np.array(
        [[np.mean([r for item in own for r in rewards[model, item]]) for model in models] for own in chosen]
    )


def test_it_equals_a_slow_bootstrap_that_takes_prompt_by_prompt():
    groups = ["a"] * 7 + ["b"] * 5
    table = table_of(["base", "tuned"], groups, images=3, reward=normal(1, 2, 36))
    found = aggregate(table, [REWARD], draws=60, seed=9)
    means = slow_bootstrap(table, groups, 9, 60)
    for number, model in enumerate(["base", "tuned"]):
        expected = np.quantile(means[:, number], [0.025, 0.975])
        assert found.figures[model][ALL]["reward"][1:3] == pytest.approx(expected, abs=1e-12)
    differences = means[:, 1] - means[:, 0]
    over_all = found.comparisons[0]
    assert over_all[:4] == ("base", "tuned", ALL, "reward")
    assert (over_all.low, over_all.high) == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=1e-12)
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    assert beyond > 0
    assert over_all.p == pytest.approx(2 * (beyond + 1) / 61)


def test_intervals_cover_the_truth_as_often_as_they_say():
    covered = differs = 0
    for seed in range(200):
        prompts = normal(seed, 1, 80)  # hard and easy prompts, the same for both models
        values = prompts + np.stack([normal(1000 + seed, 80), 0.3 + normal(2000 + seed, 80)])
        found = aggregate(table_of(["base", "tuned"], ["a"] * 50 + ["b"] * 30, reward=values), [REWARD], draws=300)
        figure, difference = found.figures["base"][ALL]["reward"], found.comparisons[0]
        covered += figure.low <= 0 <= figure.high
        differs += difference.low <= 0.3 <= difference.high
    assert 180 <= covered <= 199
    assert 180 <= differs <= 199


def test_equal_models_differ_by_nothing_and_that_is_sure():
    values = normal(2, 1, 333)
    measures = [REWARD, Measure("both", "", ("reward", "other"), mean_absolute)]
    table = table_of(["base", "same", "again"], ["a"] * 300 + ["b"] * 33, reward=[*values] * 3, other=[*values**2] * 3)
    for overall in ("pictures", "groups"):
        comparisons = aggregate(table, measures, overall).comparisons
        assert len(comparisons) == 2 * 2 * 3
        assert {comparison[4:] for comparison in comparisons} == {(0.0, 0.0, 0.0, 1.0, 1.0, 0.5)}


def test_comparisons_are_paired():
    prompts = 10 * normal(3, 1, 100)
    table = table_of(["base", "tuned"], reward=np.concatenate([prompts, prompts + 0.1 + 0.01 * normal(4, 1, 100)]))
    found = aggregate(table, [REWARD])
    difference = found.comparisons[0]
    low, high = found.figures["base"][ALL]["reward"][1:3]
    assert high - low > 3
    assert 0.09 < difference.low < difference.high < 0.11
    assert difference.p < 1e-9
    assert difference.wins == 1


def test_wins_are_the_share_of_prompts_where_the_model_is_higher():
    table = table_of(["base", "tuned"], ["a", "a", "a", "b"], reward=[[1, 1, 1, 1], [2, 1, 0, 3]])
    wins = {c.group: c.wins for c in aggregate(table, [REWARD]).comparisons}
    assert wins == {ALL: 0.625, "a": 0.5, "b": 1.0}  # one and a half of three, one of one
    wins = {c.group: c.wins for c in aggregate(table, [REWARD], "groups").comparisons}
    assert wins[ALL] == 0.75


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_takes_all_prompts_and_groups_for_two_families():
    values = normal(5, 3, 60) + np.array([[0.0], [0.5], [0.2]])
    measures = [REWARD, Measure("other", "", ("other",))]
    table = table_of(["base", "one", "two"], ["a"] * 30 + ["b"] * 30, reward=values, other=normal(6, 3, 60))
    comparisons = aggregate(table, measures).comparisons
    families = [c for c in comparisons if c.group == ALL], [c for c in comparisons if c.group != ALL]
    assert [len(family) for family in families] == [4, 8]
    for family in families:
        assert [c.p_holm for c in family] == holm([c.p for c in family])


def test_a_large_difference_survives_a_family_of_150_tests():
    columns = {f"c{k}": normal(k, 6, 50) for k in range(30)}
    columns["c7"][3] += 3
    measures = [Measure(name, "", (name,)) for name in columns]
    comparisons = aggregate(table_of(list("abcdef"), **columns), measures).comparisons
    assert len(comparisons) == 150
    assert [(c.model, c.measure) for c in comparisons if c.p_holm < 0.05] == [("d", "c7")]


def test_what_was_not_measured_of_a_model_is_left_out_and_never_a_zero():
    table = table_of(["base", "tuned"], reward=[[1, 2], [3, 4]], pick=[[math.nan, math.nan], [5, 6]])
    measures = [REWARD, Measure("pick", "", ("pick",)), Measure("gone", "", ("gone",)), Measure("fid", "", ())]
    found = aggregate(table, measures)
    assert list(found.figures["base"][ALL]) == ["reward"]
    assert list(found.figures["tuned"][ALL]) == ["reward", "pick"]
    assert [c.measure for c in found.comparisons] == ["reward"]


def test_a_table_that_nothing_was_measured_in_has_no_figures():
    found = aggregate(table_of(["base", "tuned"], reward=[[1, 2], [3, 4]]), [])
    assert found.figures == {"base": {ALL: {}}, "tuned": {ALL: {}}}
    assert found.comparisons == hacking_signals(table_of(["base"], reward=[[1, 2]])) == []


@pytest.mark.parametrize("gap", [math.nan, math.inf])
def test_a_gap_in_a_column_is_an_error_and_no_smaller_mean(gap):
    table = table_of(["base", "tuned"], reward=[[1, 2, 3], [1, gap, 3]])
    with pytest.raises(SrpoError, match="reward is no number for 1 of the 3 pictures of tuned"):
        aggregate(table, [REWARD])


def test_a_model_without_the_prompts_of_others_is_an_error_that_names_them():
    table = table_of(["base", "tuned"], reward=np.zeros((2, 6)))
    lacking = table[(table["model"] == "base") | (table["item"] == "001")]
    with pytest.raises(SrpoError, match=r"tuned has no picture of .*: 000, 002, 003 and 2 more; draw them"):
        aggregate(lacking, [REWARD])


def test_a_picture_that_is_there_twice_is_an_error():
    table = table_of(["base"], reward=[[1, 2]])
    with pytest.raises(SrpoError, match="twice"):
        aggregate(pd.concat([table, table.tail(1)]), [REWARD])


def test_a_group_may_not_be_called_all():
    with pytest.raises(SrpoError, match="a group is called 'all'"):
        aggregate(table_of(["base"], [ALL, "photo"], reward=[[1, 2]]), [REWARD])
    assert aggregate(table_of(["base"], [ALL, ALL], reward=[[1, 2]]), [REWARD]).groups == ()


def test_seeds_decide_the_resamples():
    table = table_of(["base"], reward=normal(7, 1, 30))
    one, again, other = (aggregate(table, [REWARD], seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_batches_by_hand():
    groups = ["a"] * 4 + ["b"]
    table = table_of(["base"], groups, images=2, reward=[[1, 1, 3, 3, 5, 5, 7, 7, 9, 9]])
    found = batch_figures(table, [REWARD], 2)
    assert found == {"base": {"a": {"reward": (4.0, 2.0)}}}  # batches of 2 and 6; one prompt makes no two batches
    ungrouped = batch_figures(table.assign(group=""), [REWARD], 5)
    assert ungrouped["base"][ALL]["reward"] == (5.0, pytest.approx(math.sqrt(8)))


def test_a_signal_crosses_when_it_moves_surely_and_far():
    spread = normal(8, 1, 200)
    spread = (spread - spread.mean()) / spread.std()
    columns = {
        "saturation": [0.4 + 0.1 * spread, 0.53 + 0.1 * spread],  # 1.3 standard deviations
        "grid": [0.1 * spread, 0.04 + 0.1 * spread],  # surely, but 0.4 of them
        "contrast": [spread, spread],
        "diversity:clip": [0.3 + 0.1 * spread, 0.5 + 0.1 * spread],  # the more the better
        "diversity:dino": [0.3 + 0.1 * spread, 0.1 + 0.1 * spread],
        "reward": [spread, spread + 5],
    }
    signals = {signal.signal: signal for signal in hacking_signals(table_of(["base", "tuned"], **columns))}
    assert {name for name, signal in signals.items() if signal.crossed} == {"saturation", "diversity:dino"}
    assert signals.keys() == columns.keys() - {"reward"}
    saturation = signals["saturation"]
    assert (saturation.model, saturation.base, saturation.value) == ("tuned", pytest.approx(0.4), pytest.approx(0.53))
    assert (saturation.low, saturation.high) == (pytest.approx(0.13), pytest.approx(0.13))
    assert saturation.text == "saturation 0.4 -> 0.53, 1.3 standard deviations of base's pictures"
    assert signals["grid"].p_holm < 0.05


def test_a_signal_that_moves_far_on_a_few_prompts_alone_has_not_crossed():
    table = table_of(["base", "tuned"], saturation=[[0.1, 0.2, 0.3, 0.4], [0.9, 0.1, 0.9, 0.3]])
    (signal,) = hacking_signals(table)
    assert signal.difference > 2 * signal.spread
    assert (signal.crossed, signal.p_holm > 0.05) == (False, True)


def test_a_signal_that_the_baseline_never_shows_crosses_too():
    clipping = [np.zeros(60), np.linspace(0.01, 0.02, 60)]
    (signal,) = hacking_signals(table_of(["base", "tuned"], clipping=clipping))
    assert (signal.crossed, signal.spread, signal.text) == (True, 0, "clipping 0 -> 0.015")


SIXTY_COLUMNS = """
import re, sys, time
from pathlib import Path
import numpy as np, pandas as pd
from srpo_cli.metrics.aggregate import Measure, aggregate

models = int(sys.argv[1])
items = 100_000 // models
table = pd.DataFrame({
    "model": np.repeat([f"m{i}" for i in range(models)], items),
    "item": np.tile([f"{i:06d}" for i in range(items)], models),
    "group": np.tile([f"style {i % 4}" for i in range(items)], models),
    "prompt": np.tile([f"prompt {i}" for i in range(items)], models),
    "image": 0,
    **{f"c{k}": np.random.default_rng(k).normal(size=models * items) for k in range(60)},
})
measures = [Measure(f"c{k}", "", (f"c{k}",)) for k in range(60)]

def most_memory():  # in kB; not getrusage's, which begins with what the parent process had
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

Path("/proc/self/clear_refs").write_text("5")  # the most from now on
before, start = most_memory(), time.process_time()
aggregate(table, measures)
print(most_memory() - before, time.process_time() - start)
"""


@pytest.mark.parametrize("models", ["1", "6"])
def test_100_000_pictures_and_60_columns_take_less_than_a_gigabyte_and_half_a_minute(models):
    command = [sys.executable, "-c", SIXTY_COLUMNS, models]
    kilobytes, seconds = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert 0 < kilobytes < 2**20
    assert seconds < 30
