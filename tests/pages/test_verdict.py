"""Verdicts against sentences that were written by hand."""
# ruff: noqa: RUF001  (pages write a true minus)

import pytest

from srpo_cli.pages.verdict import judged, main_measures, study_verdict, verdict


def measure(name, better="higher", title=None, digits=2):
    return {"name": name, "title": title or name, "better": better, "digits": digits, "note": ""}


def comparison(name, difference, low, high, p_holm, model="tuned", group="all"):
    return {
        "baseline": "base",
        "model": model,
        "group": group,
        "measure": name,
        "difference": difference,
        "low": low,
        "high": high,
        "p": p_holm,
        "p_holm": p_holm,
        "wins": 0.5,
    }


def result(measures, comparisons, labels=("base", "tuned"), figures=None, hacking=()):
    return {
        "models": [{"label": label} for label in labels],
        "measures": measures,
        "comparisons": comparisons,
        "figures": figures or {},
        "hacking": list(hacking),
    }


def signal(model, name, difference, crossed=True):
    return {"model": model, "signal": name, "difference": difference, "crossed": crossed}


def test_the_verdict_by_hand():
    measures = [
        measure("photo_distance", "lower", "photo distance"),
        measure("photo_rate", title="photo rate"),
        measure("miniature", title="plain reward"),
        measure("caption_accuracy", title="caption accuracy"),
    ]
    comparisons = [
        comparison("photo_distance", -0.464, -0.51, -0.42, 0.0004),
        comparison("photo_rate", 0.5, 0.44, 0.57, 0.004),
        comparison("miniature", -0.22, -0.23, -0.21, 0.0004),
        comparison("caption_accuracy", 0.0, -0.006, 0.005, 1.0),
        comparison("photo_distance", 0.9, 0.8, 1.0, 0.0004, group="photo"),  # of a group: not the verdict's
    ]
    assert verdict(result(measures, comparisons)) == [
        "tuned is better than base on photo distance (−0.46 [−0.51, −0.42], p < 0.001) and photo rate "
        "(+0.50 [+0.44, +0.57], p = 0.004); its plain reward is lower (−0.22 [−0.23, −0.21], p < 0.001); no difference "
        "is shown in caption accuracy (0.00 [−0.01, +0.01])."
    ]


def test_nothing_better_and_nothing_different_are_said():
    worse = [comparison("fid", 3.0, 2.0, 4.0, 0.01)]
    assert verdict(result([measure("fid", "lower", "FID")], worse)) == [
        "Against base, tuned is better on nothing that was measured; its FID is higher "
        "(+3.00 [+2.00, +4.00], p = 0.01)."
    ]
    same = [comparison("fid", 0.1, -1.0, 1.2, 0.9)]
    assert verdict(result([measure("fid", "lower", "FID")], same)) == [
        "No difference between tuned and base is shown in FID (+0.10 [−1.00, +1.20])."
    ]
    assert verdict(result([measure("grain", "")], [comparison("grain", 1.0, 0.9, 1.1, 0.01)])) == [
        "tuned and base share no measure of which one direction is better."
    ]


def test_one_model_alone_is_not_judged():
    assert verdict(result([measure("hps")], [], labels=["base"])) == [
        "Nothing was compared: the figures below are those of base."
    ]


@pytest.mark.parametrize(
    ("better", "difference", "p_holm", "kind"),
    [
        ("higher", 1.0, 0.049, "better"),
        ("higher", 1.0, 0.05, "same"),
        ("higher", -1.0, 0.01, "worse"),
        ("lower", -1.0, 0.01, "better"),
        ("lower", 1.0, 0.01, "worse"),
        ("", 1.0, 0.01, "changed"),
        ("higher", 0.0, 0.01, "same"),
        ("higher", 1.0, None, "same"),
    ],
)
def test_a_difference_is_judged_by_direction_and_corrected_p(better, difference, p_holm, kind):
    assert judged({"difference": difference, "p_holm": p_holm}, measure("x", better)) == kind


def test_the_same_thing_is_not_counted_twice():
    names = ["sgp:hps", "sgp_x100:hps", "sgp_win_rate:hps", "caption_accuracy", "shape_accuracy", "light_accuracy"]
    measures = [measure(name) for name in names]
    kept = [each["name"] for each in main_measures(result(measures, []))]
    assert kept == ["sgp:hps", "sgp_win_rate:hps", "caption_accuracy"]
    alone = main_measures(result([measure("sgp_x100:hps"), measure("shape_accuracy")], []))
    assert [each["name"] for each in alone] == ["sgp_x100:hps", "shape_accuracy"]


def test_of_many_models_the_leaders_are_named_and_ties_are_not():
    means = {"base": (0.3, 5.0, 1.0), "a": (0.1, 6.0, 1.0), "b": (0.2, 7.0, 0.5)}
    names = ("distance", "aes", "tied")
    figures = {
        label: {"all": {name: {"mean": mean} for name, mean in zip(names, of_model, strict=True)}}
        for label, of_model in means.items()
    }
    measures = [measure("distance", "lower"), measure("aes"), measure("tied")]
    comparisons = [comparison("aes", 1, 0.5, 1.5, 0.01, model) for model in ("a", "b")]
    assert "By the means alone the best is a on distance; b on aes." in verdict(
        result(measures, comparisons, list(means), figures)
    )


def test_models_that_hack_alike_share_a_sentence_and_quiet_ones_have_none():
    signals = [
        signal("a", "saturation", 0.2),
        signal("a", "band_5", -0.2),
        signal("b", "saturation", 0.3),
        signal("b", "band_5", -0.1),
        signal("c", "saturation", 0.1, crossed=False),
    ]
    comparisons = [comparison("aes", 1, 0.5, 1.5, 0.01, model) for model in "abc"]
    sentences = verdict(result([measure("aes")], comparisons, ["base", "a", "b", "c"], hacking=signals))
    assert sentences[3:] == [
        "Look at the pictures of a and b before you believe their rewards: saturation rose and band_5 fell by more "
        "than half a standard deviation of the baseline's pictures."
    ]


def test_the_verdict_of_grades_by_hand(study):
    differences = [
        ("alignment", 0.0, -0.01, 0.012, 0.9),
        ("realism", 0.307, 0.25, 0.35, 0.0002),
        ("detail", -0.1, -0.12, -0.08, 0.02),
    ]
    keys = ("dimension", "difference", "low", "high", "p_holm")
    made = study() | {
        "differences": [{"baseline": "base", "arm": "ours", **dict(zip(keys, d, strict=True))} for d in differences]
    }
    assert study_verdict(made) == [
        "ours is graded Excellent more often than base on Realism and artifacts (+30.7 points [+25.0, +35.0], "
        "p < 0.001); ours is graded Excellent less often than base on Detail (−10.0 points [−12.0, −8.0], p = 0.02); "
        "no difference is shown on Text-image alignment (0.0 points [−1.0, +1.2])."
    ]


@pytest.mark.parametrize(
    ("mean", "p_holm", "start"),
    [
        (0.7, 0.001, "ours is preferred to base (70 % ["),
        (0.3, 0.001, "base is preferred to ours (ours wins 30 % ["),
        (0.52, 0.4, "No preference between ours and base is shown (ours wins 52 % ["),
    ],
)
def test_the_verdict_of_pairs(study, mean, p_holm, start):
    made = study("pairs")
    made["pairs"]["win_rates"][0] |= {"rate": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}, "p_holm": p_holm}
    assert study_verdict(made)[0].startswith(start)
