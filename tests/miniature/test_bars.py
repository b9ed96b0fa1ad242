"""The miniature that is shipped reaches its bars, on 256 prompts with noises that nothing was chosen on."""

import pytest

from srpo_cli.miniature.measure import BARS, CEILINGS, measure, missed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured():
    return measure(count=256, styled=64)


@pytest.mark.parametrize("name", BARS)
def test_the_miniature_reaches_its_bar(measured, name):
    assert measured["figures"][name]["mean"] >= BARS[name], measured["figures"][name]


@pytest.mark.parametrize("name", CEILINGS)
def test_the_miniature_stays_below_its_ceiling(measured, name):
    assert measured["figures"][name]["mean"] <= CEILINGS[name], measured["figures"][name]


def test_there_is_room_for_more_realism(measured):
    figures = measured["figures"]
    assert figures["photo_distance"]["mean"] > 10 * figures["photographs_photo_distance"]["mean"]
    assert figures["photo_rate"]["high"] < 0.3 < 0.8 < figures["photographs_photo_rate"]["low"]


def test_what_is_missed_is_named(measured):
    assert missed(measured) == []
    worse = {**measured["figures"], "shape_accuracy": {"mean": 0.5}, "token_grid": {"mean": 0.2}}
    assert missed({"figures": worse}) == ["shape_accuracy is 0.500, below 0.9", "token_grid is 0.200, above 0.03"]
