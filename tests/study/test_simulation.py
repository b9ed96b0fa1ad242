"""Studies whose truth is known: the intervals hold it as often as they say, and those that ignore prompts do not.

A picture's quality is its arm's, and its prompt's and its own chance; a grade is that, the rater's bias and noise, cut
at three places. 150 prompts and 5 of 10 raters for each stand for the paper's 500; 400 draws instead of 10,000 cost
half a per cent.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from numpy import ndarray
from scipy.stats import norm

from srpo_cli.study.agreement import agreement, raters_table
from srpo_cli.study.analysis import grade_figures
from srpo_cli.study.export import GRADES
from srpo_cli.study.preference import preferences

PROMPTS, RATERS, PER_PROMPT, DRAWS = 150, 10, 5, 400
ARMS, DIMENSIONS = ("base", "ours"), ("realism", "detail")
MEANS = np.array([[-0.2, 0.6], [0.3, 0.3]])  # dimensions, arms: they differ in realism, not in detail
PROMPT_SD, PICTURE_SD, NOISE_SD = 0.5, 0.7, 0.7
CUTS = np.array([-1.2, -0.3, 1.0])
BIASES = np.linspace(-0.5, 0.5, RATERS)
SPREAD = np.sqrt(PROMPT_SD**2 + PICTURE_SD**2 + NOISE_SD**2)
ABOVE = norm.sf((CUTS - MEANS[..., None, None] - BIASES[:, None]) / SPREAD)  # (dimensions, arms, raters, cuts)
EXCELLENT_RATES = ABOVE[..., -1].mean(-1)
MEAN_GRADES = ABOVE.sum(-1)  # of each rater


def hold(truth: float | ndarray, low: float | ndarray, high: float | ndarray) -> float:
    """The share of intervals in which the truth lies."""
    return float(np.mean((np.asarray(low) <= truth) & (truth <= np.asarray(high))))


def grades_of(random: np.random.Generator, prompts: int) -> pd.DataFrame:
    """A study's answers, each prompt graded by ``PER_PROMPT`` raters, all of its arms by the same ones."""
    rater = np.argsort(random.random((prompts, RATERS)), axis=1)[:, :PER_PROMPT]
    quality = MEANS + PROMPT_SD * random.normal(size=(prompts, 1, 1))
    quality = quality + PICTURE_SD * random.normal(size=(prompts, *MEANS.shape))
    latent = quality[:, None] + BIASES[rater][..., None, None]
    latent = latent + NOISE_SD * random.normal(size=latent.shape)  # (prompts, raters, dimensions, arms)
    places = [axis.ravel() for axis in np.indices(latent.shape)]
    arm = np.array(ARMS)[places[3]]
    prompt = places[0].astype(str)
    return pd.DataFrame(
        {
            "rater": np.array([f"r{number}" for number in range(RATERS)])[rater[places[0], places[1]]],
            "arm": arm,
            "prompt_id": prompt,
            "unit": np.char.add(arm, prompt),
            "dimension": np.array(DIMENSIONS)[places[2]],
            "value": np.searchsorted(CUTS, latent.ravel()),
        }
    )


@dataclass(frozen=True)
class Coverage:
    """Shares of simulated studies, over all arms and dimensions."""

    clustered: float
    wilson: float
    differences: float
    false_alarms: float
    power: float


@pytest.fixture(scope="module")
def coverage() -> Coverage:
    random = np.random.default_rng(20261127)
    rates, wilsons, differences, detail, realism = [], [], [], [], []
    for study in range(300):
        found = grade_figures(grades_of(random, PROMPTS), ARMS, DIMENSIONS, DRAWS, seed=study)
        for (place, name), (number, arm) in [(d, a) for d in enumerate(DIMENSIONS) for a in enumerate(ARMS)]:
            figures, truth = found["grades"][arm][name], EXCELLENT_RATES[place, number]
            rates.append(hold(truth, figures["excellent"]["low"], figures["excellent"]["high"]))
            wilsons.append(hold(truth, figures["excellent_wilson"]["low"], figures["excellent_wilson"]["high"]))
        for place, each in enumerate(found["differences"]):
            truth = EXCELLENT_RATES[place, 1] - EXCELLENT_RATES[place, 0]
            differences.append(hold(truth, each["low"], each["high"]))
        realism.append(found["differences"][0]["p_holm"] < 0.05)
        detail.append(found["differences"][1]["p"] < 0.05)
    return Coverage(*(float(np.mean(each)) for each in (rates, wilsons, differences, detail, realism)))


@pytest.mark.slow
def test_clustered_intervals_of_excellent_rates_hold_the_truth_in_95_studies_of_100(coverage):
    assert 0.93 < coverage.clustered < 0.97  # measured 0.945 of 1,200, standard error below 0.01


@pytest.mark.slow
def test_wilson_s_intervals_hold_it_less_often(coverage):
    assert coverage.wilson < 0.88  # measured 0.80


@pytest.mark.slow
def test_intervals_of_differences_hold_the_truth_in_95_studies_of_100(coverage):
    assert 0.925 < coverage.differences < 0.975  # measured 0.942 of 600, standard error 0.009


@pytest.mark.slow
def test_arms_that_do_not_differ_are_told_apart_in_5_studies_of_100(coverage):
    assert 0.02 < coverage.false_alarms < 0.085  # measured 0.067 of 300, standard error 0.013
    assert coverage.power > 0.99  # measured 1


@pytest.mark.parametrize("prompts", [10, pytest.param(20, marks=pytest.mark.slow)])
def test_few_prompts_tell_arms_that_do_not_differ_apart_no_more_often_than_they_say(prompts):
    random, false, held = np.random.default_rng([7, prompts]), [], []
    for study in range(400):
        found = grade_figures(grades_of(random, prompts), ARMS, DIMENSIONS, draws=300, seed=study)
        detail = found["differences"][1]
        false.append(detail["p"] < 0.05)
        held.append(hold(EXCELLENT_RATES[1, 1] - EXCELLENT_RATES[1, 0], detail["low"], detail["high"]))
    assert np.mean(false) < 0.085  # measured 0.050 and 0.055, standard error 0.011
    assert 0.905 < np.mean(held) < 0.985  # measured 0.935 twice


def test_the_simulated_clusters_are_what_wilson_ignores():
    counts = grades_of(np.random.default_rng(0), 2000)
    excellent = counts["value"] == len(GRADES) - 1
    of_picture = excellent[counts["dimension"] == "detail"].groupby(counts["unit"]).mean()
    rate = excellent[counts["dimension"] == "detail"].mean()
    assert of_picture.var() > 2 * rate * (1 - rate) / PER_PROMPT


def test_excellent_rates_of_a_large_study_are_the_true_ones():
    found = grade_figures(grades_of(np.random.default_rng(1), 20_000), ARMS, DIMENSIONS, draws=20, seed=0)
    rates = [[found["grades"][arm][name]["excellent"]["mean"] for arm in ARMS] for name in DIMENSIONS]
    assert np.array(rates) == pytest.approx(EXCELLENT_RATES, abs=0.01)


def test_rater_biases_are_recovered_within_their_intervals():
    mean = MEAN_GRADES.mean((0, 1))  # each rater's, to be compared with that of the nine others
    truth = {f"r{number}": each - (mean.sum() - each) / (RATERS - 1) for number, each in enumerate(mean)}
    random, held, found = np.random.default_rng(2), [], []
    for study in range(40):
        answers = grades_of(random, PROMPTS).assign(kind="item", role="rater", ms=2000, known=pd.NA)
        rows = raters_table(answers, training=answers.iloc[:0], pairs=False, draws=DRAWS, seed=study)
        held += [hold(truth[row["rater"]], row["low"], row["high"]) for row in rows]
        found.append({row["rater"]: row["bias"] for row in rows})
    assert pd.DataFrame(found).mean().to_dict() == pytest.approx(truth, abs=0.04)
    assert 0.92 < np.mean(held) < 0.975  # measured 0.955 of 400, standard error 0.011


def copied(random: np.random.Generator, fidelity: float, prompts: int, raters: int = 5) -> pd.DataFrame:
    """Each rater copies a picture's true grade with probability ``fidelity``, else draws one from the same shares.

    Two grades of a picture are equal where both are copies, and otherwise as apart as any two grades, so that alpha is
    ``fidelity`` squared, whatever the measure of distance.
    """
    shares = [0.1, 0.2, 0.4, 0.3]
    truth = random.choice(4, (prompts, 1), p=shares)
    value = np.where(random.random((prompts, raters)) < fidelity, truth, random.choice(4, (prompts, raters), p=shares))
    picture = np.repeat(np.arange(prompts), raters).astype(str)
    return pd.DataFrame({"unit": picture, "prompt_id": picture, "value": value.ravel()})


@pytest.mark.parametrize("fidelity", [0.0, 0.7, 0.9, 1.0])
def test_alpha_is_the_analytic_one(fidelity):
    found = agreement(copied(np.random.default_rng(4), fidelity, 20_000), len(GRADES), draws=5, seed=0)
    assert found["alpha"] == pytest.approx(fidelity**2, abs=0.01)


@pytest.mark.slow
def test_intervals_of_alpha_hold_it_in_95_studies_of_100():
    random = np.random.default_rng(5)
    found = [agreement(copied(random, 0.85, 100), len(GRADES), draws=200, seed=study) for study in range(200)]
    held = [hold(0.85**2, each["low"], each["high"]) for each in found]
    assert 0.90 < np.mean(held) < 0.985  # measured 0.95 of 200, standard error 0.015


THREE, STRENGTHS = ("base", "other", "ours"), np.array([-0.6, 0.0, 0.6])
TIES = 0.2


def choices_of(random: np.random.Generator, prompts: int) -> pd.DataFrame:
    """Two raters choose between each two of three arms; a fifth of the choices are ties."""
    first, second = np.array([(0, 1), (0, 2), (1, 2)]).T
    shape = (prompts, 2, 3)
    preferred = 1 / (1 + np.exp(STRENGTHS[first] - STRENGTHS[second]))  # of the second one, ties half
    wins = random.random(shape) < (preferred - TIES / 2) / (1 - TIES)
    prompt, _, pair = (axis.ravel() for axis in np.indices(shape))
    return pd.DataFrame(
        {
            "prompt_id": prompt.astype(str),
            "first": np.array(THREE)[first][pair],
            "second": np.array(THREE)[second][pair],
            "value": np.where(random.random(shape) < TIES, 1, 2 * wins).ravel(),
        }
    )


@pytest.mark.slow
def test_strengths_and_win_rates_are_recovered_within_their_intervals():
    random, strengths, held, rates = np.random.default_rng(6), [], [], []
    for study in range(120):
        found = preferences(choices_of(random, 100), THREE, draws=DRAWS, refits=150, seed=study)
        for truth, each in zip(STRENGTHS, found["strengths"].values(), strict=True):
            held.append(hold(truth, each["low"], each["high"]))
        strengths.append([each["mean"] for each in found["strengths"].values()])
        for steps, row in zip((1, 2, 1), found["win_rates"], strict=True):
            rates.append(hold(1 / (1 + np.exp(-0.6 * steps)), row["rate"]["low"], row["rate"]["high"]))
    assert np.mean(strengths, axis=0) == pytest.approx(STRENGTHS, abs=0.03)
    assert 0.90 < np.mean(held) < 0.985  # measured 0.925 of 360, of three that sum to zero; standard error 0.01
    assert 0.92 < np.mean(rates) < 0.975  # measured 0.942 of 360
