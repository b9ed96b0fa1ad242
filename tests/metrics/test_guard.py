"""Corridors, crossings, the stop rule and the ranking, by hand and by simulation."""

import json
import math

import numpy as np
import pytest
from scipy.stats import t as student

from srpo_cli.metrics.guard import Discriminant, Signal, Variance, Watch, has_collapsed, scatter, threshold, trend


def signal(name="saturation", family="look", base=0.0, asked=1.0, spread=1.0, count=100, **facts):
    return Signal(name, family, base, asked, spread, count, **facts)


def watch(*signals, every=5, tests=100, reach=1.25, alpha=0.05, **facts):
    return Watch({one.name: one for one in signals}, reach, alpha, every, tests, **facts)


@pytest.mark.parametrize(("base", "asked", "low", "high"), [(0.4, 0.2, 0.15, 0.4), (0.2, 0.4, 0.2, 0.45)])
def test_a_corridor_goes_from_the_base_to_reach_times_the_asked_pictures(base, asked, low, high):
    assert signal(base=base, asked=asked).corridor(1.25) == pytest.approx((low, high))


def test_how_far_outside_by_hand():
    one = signal()  # corridor [0, 1.25]
    assert one.outside(0.5, 1.25) == 0
    assert one.outside(1.5, 1.25) == pytest.approx(0.25)
    assert one.outside(-0.4, 1.25) == pytest.approx(0.4)
    assert math.isnan(one.outside(math.nan, 1.25))


@pytest.mark.parametrize(
    ("bad", "asked", "below", "above"),
    [
        ("either", 1.0, True, True),
        ("low", 1.0, True, False),
        ("high", 1.0, False, True),
        ("back", 1.0, True, False),
        ("back", -1.0, False, True),
    ],
)
def test_only_the_bad_way_out_counts(bad, asked, below, above):
    one = signal(asked=asked, bad=bad)
    assert (one.outside(-9.0, 1.25) > 0, one.outside(9.0, 1.25) > 0) == (below, above)
    assert len(one.sides) == below + above


def test_the_scatter_of_a_series_by_hand():
    # differences 2, -1, 3; mean square 14/3, half of it; 2 * 9 / 8 degrees of freedom
    assert scatter([1.0, 3.0, 2.0, 5.0]) == pytest.approx((7 / 3, 2.25))


def test_the_scatter_of_noise_is_its_variance_and_a_drift_hardly_moves_it():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=4000)
    assert scatter(noise).value == pytest.approx(1, rel=0.05)
    assert scatter(noise + 0.1 * np.arange(4000)).value == pytest.approx(1, rel=0.05)


def test_the_freedom_of_a_scatter_is_that_of_its_own_variance():
    # Of a chi-square with f degrees of freedom over f the variance is 2 / f.
    values = [scatter(row).value for row in np.random.default_rng(1).normal(size=(20000, 12))]
    assert 2 / np.var(values) == pytest.approx(scatter(range(12)).freedom, rel=0.05)


def test_variances_add_up_by_welch_and_satterthwaite():
    # (4 + 1)^2 / (16 / 8 + 1 / 4) = 11.11
    assert Variance(4.0, 8) + Variance(1.0, 4) == pytest.approx((5.0, 100 / 9))
    assert (Variance(4.0, 8) + Variance(0.0, 4)).freedom == pytest.approx(8)
    assert Variance(0.0, 8) + Variance(0.0, 4) == (0.0, 4)


def test_between_takes_means_and_the_larger_spread():
    one = Signal.between("saturation", "look", [1.0, 3.0], [5.0, 9.0])
    assert (one.base, one.asked, one.count) == (2.0, 7.0, 2)
    assert one.spread == pytest.approx(math.sqrt(8.0))  # variances 2 and 8


def test_an_axis_needs_base_and_asked_pictures_to_differ():
    assert signal(asked=1.0, count=100).tells  # 1 / sqrt(2 / 100) = 7 standard errors
    assert not signal(asked=0.3, count=100).tells  # 2


def test_the_discriminant_is_0_at_the_base_and_1_at_the_asked_pictures():
    rng = np.random.default_rng(0)
    base, asked = rng.normal(size=(50, 4)), rng.normal(1.0, size=(50, 4))
    mixture = Discriminant.between(base, asked)
    assert mixture(base).mean() == pytest.approx(0, abs=1e-12)
    assert mixture(asked).mean() == pytest.approx(1)


def test_the_discriminant_does_not_depend_on_units_and_beats_the_best_figure_where_two_are_correlated():
    rng = np.random.default_rng(1)
    covariance = [[1, 0.9], [0.9, 1]]
    base = rng.multivariate_normal([0, 0], covariance, 4000)
    asked = rng.multivariate_normal([1, 0], covariance, 4000)
    mixture = Discriminant.between(base, asked)
    np.testing.assert_allclose(Discriminant.between(base * [7, 0.1], asked * [7, 0.1])(base * [7, 0.1]), mixture(base))
    assert mixture(base).std() < 0.8  # one figure alone: 1


def test_a_mixture_does_not_find_in_other_pictures_what_chance_put_into_its_own():
    rng = np.random.default_rng(2)
    base, asked = rng.normal(size=(16, 12)), rng.normal(size=(16, 12))  # no difference
    fitted = Discriminant.between(base, asked)
    assert fitted(asked).mean() - fitted(base).mean() == pytest.approx(1)
    gaps = []
    for _ in range(40):
        base, asked = rng.normal(size=(16, 12)), rng.normal(size=(16, 12)) + 0.5
        own, others = Discriminant.held_out(base, asked), Discriminant.between(base, asked)
        fresh = rng.normal(size=(2, 500, 12))
        told = own[1].mean() - own[0].mean()
        gaps.append([told, others(fresh[1] + 0.5).mean() - others(fresh[0]).mean()])
    told, true = np.mean(gaps, 0)
    assert told == pytest.approx(true, abs=0.06) and true < 0.8


def test_the_threshold_is_bonferronis_of_students_t():
    assert threshold(0.05, 10, 20) == pytest.approx(student.isf(0.005, 20))
    assert threshold(0.05, 1000, 20) > threshold(0.05, 10, 20) > threshold(0.05, 10, 200)


def test_two_signals_of_one_family_are_one_piece_of_evidence():
    look = signal("saturation"), signal("grid")
    assert not has_collapsed(look)
    assert has_collapsed([look[0], signal("sgp_gap", "words")])


def test_the_trend_of_a_line_is_the_line_at_either_end_and_between():
    steps = np.arange(30)
    for at in (0, 3, 15, 29, 31):
        assert trend(steps, 2.0 * steps + 1, at, 5) == pytest.approx(2.0 * at + 1)


def test_the_trend_looks_no_further_than_its_width_but_where_the_series_ends():
    steps = np.arange(30)
    values = np.where(abs(steps - 10) <= 5, 1.0, 100.0)
    assert trend(steps, values, 10, 5) == pytest.approx(1)
    values = np.where(steps >= 20, 1.0, 100.0)
    assert trend(steps, values, 30, 5) == pytest.approx(1)  # 20 to 29
    assert math.isnan(trend(steps, values, 60, 5))
    assert math.isnan(trend([], [], 5, 5))


def test_a_signal_is_told_once_and_two_families_end_the_run():
    guard = watch(signal(), signal("sgp_gap", "words"))
    told = []
    for step in range(26):
        if step and step % 5 == 0:
            told.append([one.name for one in guard.check(step)])
        guard.note(step, 8, {"saturation": 9.0 if step >= 15 else 0.0, "sgp_gap": 9.0 if step >= 20 else 0.0})
    assert told == [[], [], [], ["saturation"], ["sgp_gap"]]
    assert guard.warnings[0]["step"] == 20 and guard.warnings[1]["step"] == 25


def test_a_check_weighs_means_by_their_pictures_and_looks_at_those_since_the_last():
    guard = watch(signal(), every=5)
    guard.note(1, 8, {"saturation": 50.0})
    guard.check(5)
    guard.note(6, 10, {"saturation": 1.0})
    guard.note(8, 30, {"saturation": 2.0})
    guard.check(10)
    assert guard.checks[-1]["values"] == {"saturation": pytest.approx(1.75)}


def watched(means, *signals, every=5, first=0, **facts):
    """A watch of runs whose steps have these means of every signal, checked when it is time."""
    guard = watch(*signals, every=every, **facts)
    for step, mean in enumerate(means, first):
        if step and step % every == 0:
            guard.check(step)
        guard.note(step, 8, {one.name: mean for one in signals})
    guard.check(first + len(means))
    return guard


def test_the_error_of_a_check_is_that_of_earlier_steps_by_hand():
    earlier = [1.0, 3.0, 2.0, 5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    guard = watched([*earlier, 9.0, 9.0], signal(base=0.0, asked=0.0, spread=0.1, count=4))
    # Differences 2, -1, 3, -1 and five 0: half of 15/9 over the two steps, and 0.01 over 4 pictures of the calibration.
    assert guard.checks[-1]["z"]["saturation"] == pytest.approx(9 / math.sqrt(15 / 18 / 2 + 0.0025))


def test_the_error_of_a_check_is_never_less_than_that_of_independent_pictures():
    guard = watched([3.0] * 15, signal(base=0.0, asked=0.0, spread=1.0, count=100))
    assert guard.checks[-1]["z"]["saturation"] == pytest.approx(3 / math.sqrt(1 / 40 + 1 / 100))


def test_after_a_few_steps_nothing_is_known_and_nothing_tested():
    guard = watched([99.0] * 10, signal(), every=1)
    assert [len(check["z"]) for check in guard.checks] == [0] * 8 + [1, 1]


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("at", [9, 12, 16])
def test_a_collapse_in_one_step_does_not_hide_in_what_it_adds_to_the_error(every, at):
    rng = np.random.default_rng(at)
    means = rng.normal(size=25) / math.sqrt(8)
    means[at:] += 100
    guard = watched(means, signal(count=64), signal("sgp_gap", "words", count=64), every=every, tests=400)
    # A check of five may hold some from before.
    assert guard.collapsed["step"] <= at + 2 * every


def test_a_figure_that_is_no_number_is_left_out_and_no_more():
    rng = np.random.default_rng(0)
    means = rng.normal(size=40) / math.sqrt(8)
    means[20:] += 10
    clean = watched(means, signal(count=64, axis=True))
    means[[3, 22]] = math.nan
    holed = watched(means, signal(count=64, axis=True))
    assert clean.warnings[0]["step"] == holed.warnings[0]["step"] == 25
    assert not any(math.isnan(z) for check in holed.checks for z in check["z"].values())
    assert not math.isnan(holed.rank([20])[0].distance)


def test_of_given_pictures_every_look_is_tested():
    guard = watch(signal(count=64), every=50, given=True)
    guard.note(50, 4, {"saturation": 9.0})
    assert [one.name for one in guard.check(50)] == ["saturation"]


def test_a_panels_error_is_that_of_its_prompts():
    guard = watch(signal("diversity", "panel", source="panel", base=0.0, asked=0.0, count=4))
    guard.note(5, 4, {"diversity": 2.0})
    guard.check(5)
    assert guard.checks[-1]["z"]["diversity"] == pytest.approx(2 / math.sqrt(1 / 4 + 1 / 4))


def test_an_averages_place_is_where_weights_that_move_evenly_have_it():
    # After n steps of 1 an average with decay 1/2 is at n - (1 - 2^-n).
    guard = Watch({"look": signal("look", axis=True)}, 1.25, 0.05, 5, 100, decay=0.5)
    overshooting(guard, slope=0.1)
    (place,) = guard.rank([2])
    assert place.axes["look"] == pytest.approx(0.1 * (2 - 0.75))
    average, at = 0.0, 0.0
    for _ in range(10):
        at += 1
        average = 0.5 * average + 0.5 * at
    (place,) = guard.rank([10])
    assert place.axes["look"] == pytest.approx(0.1 * average)


def test_nothing_noted_nothing_tested():
    guard = watch(signal())
    assert guard.check(5) == []
    assert guard.checks == [{"step": 5, "values": {}, "z": {}, "crossed": [], "tested": 0}]


def test_what_has_been_tested_is_not_tested_again():
    guard = watch(signal("diversity", "panel", source="panel"), every=5)
    guard.note(5, 4, {"diversity": 0.1})
    guard.check(5)
    guard.check(10)
    assert [check["values"] for check in guard.checks] == [{"diversity": 0.1}, {}]


def overshooting(guard, slope=0.1, steps=30):
    for step in range(steps):
        guard.note(step, 8, {"look": slope * step, "gap": slope * step})


def test_the_best_checkpoint_is_the_one_nearest_to_the_end_of_the_way():
    guard = watch(signal("look", axis=True), signal("gap", "words", axis=True))
    overshooting(guard)  # reaches 1.25 at step 12.5
    places = guard.rank([5, 10, 15, 20])
    assert [place.distance for place in places] == pytest.approx([0.75, 0.25, 0.25, 0.75])
    assert guard.best([5, 9, 13, 20]).step == 13
    assert guard.best([5, 12, 20]).axes == pytest.approx({"look": 1.2, "gap": 1.2})


def test_a_precise_axis_counts_for_more_than_a_noisy_one():
    # spreads 1 and 0.5: precisions 1 and 4; 0.25 short of the end and 0.75 past it
    guard = watch(signal("look", axis=True), signal("gap", "words", spread=0.5, axis=True))
    for step in range(21):
        guard.note(step, 8, {"look": 0.1 * step, "gap": 0.2 * step})
    (place,) = guard.rank([10])
    assert place.axes == pytest.approx({"look": 1.0, "gap": 2.0})
    assert place.distance == pytest.approx((1 * 0.25 + 4 * 0.75) / 5)


def test_the_last_checkpoint_stays_unless_another_is_clearly_better():
    guard = watch(signal("look", axis=True))
    for step in range(16):
        guard.note(step, 8, {"look": 0.1 * step})
    assert guard.best([12, 13]).step == 12  # 0.05 and 0.05: the first
    assert guard.best([11, 12, 13], keep_last=True).step == 13
    assert guard.best([12, 15], keep_last=True).step == 12


def test_a_method_that_goes_the_other_way_has_no_best_checkpoint():
    guard = watch(signal("look", axis=True))
    overshooting(guard, slope=-0.1)
    assert guard.best([5, 10, 15]) is None


@pytest.mark.parametrize(("slope", "best"), [(0.009, None), (0.011, 10)])
def test_what_is_hardly_better_than_the_base_is_not_called_better(slope, best):
    guard = watch(signal("look", axis=True))
    overshooting(guard, slope=slope)  # at step 10 0.09 or 0.11 of the way
    found = guard.best([10])
    assert (found and found.step) == best


def test_without_an_axis_nothing_is_ranked():
    guard = watch(signal("look"))
    overshooting(guard)
    assert guard.rank([5, 10]) == []
    assert guard.best([5, 10]) is None


def test_a_restored_watch_goes_on_as_if_it_had_never_stopped():
    def run(guard, first, last):
        for step in range(first, last):
            if step and step % 5 == 0:
                if step == 10:
                    guard.note(step, 4, {"diversity": 0.2})
                guard.check(step)
            guard.note(step, 8, {"look": 0.1 * step, "gap": 0.3 * step})
        return guard

    def fresh():
        panel = signal("diversity", "panel", source="panel")
        return watch(signal("look", axis=True), signal("gap", "words"), panel)

    whole = run(fresh(), 0, 31)
    state = json.loads(json.dumps(run(fresh(), 0, 23).to_json()))
    again = fresh()
    again.restore(state, 17, newest=16)
    run(again, 17, 31)
    assert again.to_json() == whole.to_json()
    assert again.rank([5, 20]) == whole.rank([5, 20])


@pytest.mark.parametrize(("pictures", "alike"), [(64, 0.0), (64, 0.3), (8, 0.0), (8, 0.3)])
def test_an_untrained_run_is_warned_no_oftener_than_alpha_says(pictures, alike):
    """Twelve signals, 40 checks of five steps of eight pictures, in a step correlated by ``alike``, as by one noise."""
    rng = np.random.default_rng(0)
    families = ["look", "words", "content"]
    names = [f"signal {i}" for i in range(12)]
    warned = collapsed = 0
    for _ in range(100):
        base, asked = rng.normal(size=(pictures, 12)), rng.normal(size=(pictures, 12)) * rng.choice([0.5, 1, 2], 12)
        asked += rng.choice([-1, 0, 1], 12)
        signals = [Signal.between(n, families[i % 3], base[:, i], asked[:, i]) for i, n in enumerate(names)]
        guard = watch(*signals, tests=12 * 40 * 2)
        own = math.sqrt(1 - alike) * rng.normal(size=(200, 8, 12)).mean(1)
        steps = math.sqrt(alike) * rng.normal(size=(200, 12)) + own
        for step, means in enumerate(steps):
            if step and step % 5 == 0:
                guard.check(step)
            guard.note(step, 8, dict(zip(names, means, strict=True)))
        guard.check(200)
        warned += bool(guard.warnings)
        collapsed += guard.collapsed is not None
    assert warned / 100 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 100)
    assert collapsed <= 1
