"""Figures out of a table: by hand, against a slow bootstrap, and against what is known of normal draws."""

import math

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
    hundredfold,
    mean,
    mean_absolute,
)
from srpo_cli.metrics.intervals import holm, interval, p_value, resampled_counts, wilson

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


def signals_of(table):
    """The signals of a table in which every column of numbers is a measure without a better side."""
    names = table.columns[table.columns.get_loc("image") + 1 :]
    measures = [Measure(name, "", (name,), better="higher" if "diversity" in name else "") for name in names]
    return hacking_signals(aggregate(table, measures), table)


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
    assert by_groups[ALL]["reward"].mean == pytest.approx(3)  # (1 + 5) / 2
    assert by_groups["one"]["reward"].mean == by_pictures["one"]["reward"].mean == 1
    assert [by_groups[group]["reward"].count for group in (ALL, "one", "two")] == [4, 3, 1]


def test_prompts_are_resampled_within_their_group():
    groups = ["a"] * 20 + ["b"] * 20
    values = normal(10, 40) + np.repeat([0, 100], 20)  # groups far apart, whose sizes stay
    found = aggregate(table_of(["base"], groups, reward=[values]), [REWARD]).figures["base"]
    figures = [found[group]["reward"] for group in ("a", "b", ALL)]
    assert [figure.count for figure in figures] == [20, 20, 40]
    assert all(figure.high - figure.low < 1.5 for figure in figures)


def test_a_group_of_one_prompt_has_no_interval_and_is_resampled_with_others_like_it():
    values = [3, 9, *normal(11, 20), *normal(12, 20)]
    table = table_of(
        ["base", "tuned"], ["a", "b", *"c" * 20, *"d" * 20], reward=[values, [*values[:2], *normal(13, 40)]]
    )
    for overall, mean_of_all in (("pictures", np.mean(values)), ("groups", (12 + sum(values[2:]) / 20) / 4)):
        found = aggregate(table, [REWARD], overall)
        figures = {group: found.figures["base"][group]["reward"] for group in ("a", "b", "c", ALL)}
        assert figures["a"] == (3, None, None, 1)
        assert figures["c"].low < figures["c"].mean < figures["c"].high
        assert figures[ALL].mean == pytest.approx(mean_of_all)
        assert figures[ALL].low < figures[ALL].mean < figures[ALL].high
        assert {(c.low, c.high, c.p) for c in found.comparisons if c.group in "ab"} == {(None, None, 1.0)}


@pytest.mark.parametrize("overall", ["pictures", "groups"])
def test_a_lone_group_of_one_prompt_is_resampled_with_the_smallest_other_and_weighs_what_it_weighs(overall):
    table = table_of(["base"], ["a", *"b" * 3, *"c" * 9], reward=[[100, *normal(14, 12)]])
    figure = aggregate(table, [REWARD], overall).figures["base"][ALL]["reward"]
    means = table.groupby("group")["reward"].mean()
    assert figure.mean == pytest.approx(table["reward"].mean() if overall == "pictures" else means.mean())
    assert figure.low < figure.mean - 5 < figure.mean + 5 < figure.high


@pytest.mark.parametrize(
    ("prompts", "groups", "overall"),
    [(1, 4, "pictures"), (2, 4, "pictures"), (3, 4, "groups"), (2, 12, "pictures"), (8, 1, "pictures")],
)
def test_few_prompts_in_a_group_show_nothing_more_often_than_they_say(prompts, groups, overall):
    false = held = 0
    names = [name for name in map(str, range(groups)) for _ in range(prompts)]
    for seed in range(200):
        values = normal([seed, prompts, groups], 2, len(names))
        found = aggregate(table_of(["base", "tuned"], names, reward=values), [REWARD], overall, draws=200)
        (comparison,) = (each for each in found.comparisons if each.group == ALL)
        false += comparison.p < 0.05
        held += comparison.low <= 0 <= comparison.high
    assert false <= 20  # 10 expected, standard error 3.1; it was 36 to 200 with a variance of n and not n - 1
    assert held >= 174  # 190 expected; with two prompts a mean of one has few values, which costs some per cent


def test_groups_of_different_weight_have_the_freedom_of_the_one_that_matters():
    names, false = ["a"] * 2 + ["b"] * 30 + ["c"] * 30, 0
    for seed in range(200):
        table = table_of(["base", "tuned"], names, reward=normal(seed, 2, 62))
        comparisons = aggregate(table, [REWARD], "groups", draws=200).comparisons
        false += next(each.p for each in comparisons if each.group == ALL) < 0.05
    assert false <= 20


def test_shares_of_none_and_all_have_wilson_s_interval_and_newcombe_s_difference():
    table = table_of(["base", "tuned"], photo=[[0] * 40, [1] * 40], reward=[[2] * 40, [3] * 40])
    found = aggregate(table, [Measure("photo", "", ("photo",)), REWARD])
    assert found.figures["base"][ALL]["photo"] == (*wilson(0, 40), 40)
    assert found.figures["tuned"][ALL]["photo"] == (*wilson(40, 40), 40)
    photo, reward = found.comparisons
    assert photo.difference == 1
    assert 0.8 < photo.low < 0.9 < photo.high == 1
    assert (reward.low, reward.high) == (1, 1)  # no share: what never changes is sure


def test_a_share_of_pixels_is_no_share_of_pictures():
    (signal,) = signals_of(table_of(["base", "tuned"], clipping=np.zeros((2, 40))))
    assert (signal.low, signal.high) == (0, 0)


def test_prompts_of_one_text_are_resampled_together():
    values = normal(15, 2, 40)
    twice = table_of(["base", "tuned"], prompts=[f"text {n // 2}" for n in range(40)], reward=values)
    as_images = table_of(["base", "tuned"], images=2, reward=values)
    one, other = (aggregate(table, [REWARD]) for table in (twice, as_images))
    assert one == other
    assert one.figures["base"][ALL]["reward"].count == 20
    in_batches = batch_figures(twice, [REWARD], 4)["base"][ALL]["reward"]
    assert in_batches.mean == pytest.approx(values[0].mean())
    assert in_batches.prompts == 10  # batches are of prompts as the benchmark lists them


def slow_bootstrap(table, groups, seed, draws):
    """The same resamples, taken prompt by prompt: (draws, models) means, in which each group keeps its weight."""
    generator = torch.Generator().manual_seed(seed)
    models = list(dict.fromkeys(table["model"]))
    rewards = {key: list(rows["reward"]) for key, rows in table.groupby(["model", "item"])}
    means = np.zeros((draws, len(models)))
    for group in dict.fromkeys(groups):
        items = list(dict.fromkeys(table.loc[table["group"] == group, "item"]))
        for draw, row in enumerate(torch.cat(list(resampled_counts(len(items), draws, generator))).int().tolist()):
            chosen = [item for item, times in zip(items, row, strict=True) for _ in range(times)]
            for number, model in enumerate(models):
                own = np.mean([r for item in chosen for r in rewards[model, item]])
                means[draw, number] += own * len(items) / len(groups)
    return means


def test_it_equals_a_slow_bootstrap_that_takes_prompt_by_prompt():
    groups = ["a"] * 7 + ["b"] * 5
    table = table_of(["base", "tuned"], groups, images=3, reward=normal(1, 2, 36))
    found = aggregate(table, [REWARD], draws=60, seed=9)
    means = slow_bootstrap(table, groups, 9, 60)
    freedom = 12**2 / (7**2 / 6 + 5**2 / 4)  # Welch and Satterthwaite's, of weights like sizes
    for number, model in enumerate(["base", "tuned"]):
        estimate = table.loc[table["model"] == model, "reward"].mean()
        expected = interval(estimate, means[:, number], 12, freedom)
        assert found.figures[model][ALL]["reward"] == pytest.approx((*expected, 12), abs=1e-12)
    differences, over_all = means[:, 1] - means[:, 0], found.comparisons[0]
    assert over_all[:4] == ("base", "tuned", ALL, "reward")
    expected = interval(over_all.difference, differences, 12, freedom)
    assert (over_all.low, over_all.high) == pytest.approx(expected[1:], abs=1e-12)
    assert over_all.p == pytest.approx(p_value(over_all.difference, differences, 12, freedom))


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


def test_holm_takes_all_prompts_and_groups_for_two_families():
    values = normal(5, 3, 60) + np.array([[0.0], [0.5], [0.2]])
    measures = [REWARD, Measure("other", "", ("other",))]
    table = table_of(["base", "one", "two"], ["a"] * 30 + ["b"] * 30, reward=values, other=normal(6, 3, 60))
    comparisons = aggregate(table, measures).comparisons
    families = [c for c in comparisons if c.group == ALL], [c for c in comparisons if c.group != ALL]
    assert [len(family) for family in families] == [4, 8]
    for family in families:
        assert [c.p_holm for c in family] == holm([c.p for c in family])


def test_holm_counts_a_test_once_and_statistics_apart():
    values = 0.1 * normal(16, 3, 60) + np.array([[0.0], [0.02], [0.05]])
    measures = [
        Measure("sgp", "", ("reward",)),
        Measure("sgp_x100", "", ("reward",), hundredfold),
        Measure("saturation", "", ("saturation",), better=""),
        Measure("grain", "", ("grain",), better=""),
        Measure("diversity:clip", "", ("diversity:clip",)),
    ]
    columns = {"reward": values, "saturation": normal(17, 3, 60), "grain": normal(18, 3, 60)}
    table = table_of(["base", "one", "two"], **columns, **{"diversity:clip": normal(19, 3, 60)})
    found = aggregate(table, measures)
    by_measure = {measure.name: [c for c in found.comparisons if c.measure == measure.name] for measure in measures}
    claims = by_measure["sgp"] + by_measure["diversity:clip"]
    assert [c.p_holm for c in claims] == holm([c.p for c in claims])
    assert [c.p_holm for c in by_measure["sgp_x100"]] == [c.p_holm for c in by_measure["sgp"]]
    statistics = by_measure["saturation"] + by_measure["grain"]
    corrected = holm([c.p for c in [*statistics, *by_measure["diversity:clip"]]])
    assert [c.p_holm for c in statistics] == corrected[:4]
    signals = {(signal.model, signal.signal): signal.p_holm for signal in hacking_signals(found, table)}
    assert signals == {
        ("one", "saturation"): corrected[0],
        ("two", "saturation"): corrected[1],
        ("one", "diversity:clip"): corrected[4],
        ("two", "diversity:clip"): corrected[5],
    }


def test_signals_are_the_figures_when_groups_weigh_alike():
    table = table_of(["base", "tuned"], ["a"] * 3 + ["b"] * 9, saturation=normal(20, 2, 12))
    found = aggregate(table, [Measure("saturation", "", ("saturation",), better="")], "groups")
    (signal,) = hacking_signals(found, table)
    assert [signal.base, signal.value] == [found.figures[m][ALL]["saturation"].mean for m in ("base", "tuned")]
    assert signal[4:8] == (*found.comparisons[0][4:7], found.comparisons[0].p_holm)


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
    assert found.comparisons == signals_of(table_of(["base"], reward=[[1, 2]])) == []


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
    assert found == {"base": {"a": {"reward": (4.0, 2.0, 2.0)}}}  # of 2 and 6; one prompt makes no two batches
    ungrouped = batch_figures(table.assign(group=""), [REWARD], 5)
    assert ungrouped["base"][ALL]["reward"] == (5.0, pytest.approx(math.sqrt(8)), 1.0)


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
    signals = {signal.signal: signal for signal in signals_of(table_of(["base", "tuned"], **columns))}
    assert {name for name, signal in signals.items() if signal.crossed} == {"saturation", "diversity:dino"}
    assert signals.keys() == columns.keys() - {"reward"}
    saturation = signals["saturation"]
    assert (saturation.model, saturation.base, saturation.value) == ("tuned", pytest.approx(0.4), pytest.approx(0.53))
    assert (saturation.low, saturation.high) == (pytest.approx(0.13), pytest.approx(0.13))
    assert saturation.text == "saturation 0.4 -> 0.53, 1.3 standard deviations of base's pictures"
    assert signals["grid"].p_holm < 0.05


def test_a_signal_that_moves_far_on_a_few_prompts_alone_has_not_crossed():
    table = table_of(["base", "tuned"], saturation=[[0.1, 0.2, 0.3, 0.4], [0.9, 0.1, 0.9, 0.3]])
    (signal,) = signals_of(table)
    assert signal.difference > 2 * signal.spread
    assert (signal.crossed, signal.p_holm > 0.05) == (False, True)


def test_a_signal_that_the_baseline_never_shows_crosses_too():
    clipping = [np.zeros(60), np.linspace(0.01, 0.02, 60)]
    (signal,) = signals_of(table_of(["base", "tuned"], clipping=clipping))
    assert (signal.crossed, signal.spread, signal.text) == (True, 0, "clipping 0 -> 0.015")
