"""The page of a run: what it says of a collapse, of the best checkpoint, and of a run that has neither."""

import copy
import json
import re

import pytest
from PIL import Image

from srpo_cli.metrics.guard import Signal, Watch
from srpo_cli.pages.training import MEANINGS, write_training_report

CONFIG = {"algorithm": {"name": "srpo"}, "reward": {"name": "miniature"}, "model": {"name": "miniature"}}


def make_guard(slope=0.1):
    signals = [
        Signal("statistics", "look", 0.0, 1.0, 0.4, 64, axis=True),
        Signal("miniature:clip/sgp_gap", "words", -0.2, 0.4, 0.15, 64, axis=True),
        Signal("sgp_gap", "words", -0.2, 0.3, 0.1, 64, trained=True),
        Signal("diversity", "panel", 0.12, 0.13, 0.03, 4, source="panel", bad="low"),
    ]
    watch = Watch({signal.name: signal for signal in signals}, 1.25, 0.05, 5, 100)
    for step in range(25):
        way = slope * step
        watch.note(step, 8, {"statistics": way, "miniature:clip/sgp_gap": 0.6 * way - 0.2, "sgp_gap": 0.5 * way - 0.2})
        if step and step % 5 == 0:
            watch.note(step, 4, {"diversity": 0.12})
            watch.check(step)
    best = watch.best([5, 10, 15, 20])
    return {
        "version": 1,
        "action": "stop",
        "planned_steps": 300,
        "words": {"positive": ["realistic photo"], "negative": ["cg render"]},
        "pictures": {"calibration": 64, "panel": 8},
        **watch.to_json(),
        "checkpoints": [place._asdict() for place in watch.rank([5, 10, 15, 20])],
        "best": best and best._asdict(),
        "stopped": watch.collapsed,
        "cost": {"seconds": 3.14, "beside": 3.0, "share": 0.042},
    }


@pytest.fixture(scope="module")
def collapsed():
    return make_guard()


@pytest.fixture
def page(tmp_path):
    """Writes the page of a guard and returns it as text."""

    def write(guard, sheets=(0, 10, 15, 20), summary=None):
        (tmp_path / "config.yaml").write_text(json.dumps(CONFIG))
        (tmp_path / "samples").mkdir(exist_ok=True)
        for step in sheets:
            Image.new("RGB", (64, 32), "red").save(tmp_path / "samples" / f"step-{step:06d}.png")
        if summary:
            (tmp_path / "summary.json").write_text(json.dumps(summary))
        return write_training_report(tmp_path, guard).read_text()

    return write


def headings(text, level):
    return re.findall(rf"<h{level}[^>]*>\s*(.*?)\s*</h{level}>", text, re.S)


def test_a_collapse_is_told_with_its_signals_and_what_to_use_instead(collapsed, page):
    text = page(collapsed)
    assert collapsed["stopped"] is not None
    step, best = collapsed["stopped"]["step"], collapsed["best"]["step"]
    assert headings(text, 1) == [f"Stopped at step {step}; step {best} is the best"]
    assert f"collapsed at step {step}: {', '.join(collapsed['stopped']['signals'])} left the corridor" in text
    assert re.search(rf'<tr data-step="{best}"><th scope="row">{best} <small>best</small>', text)
    assert "3.1 s, 4.2 % of the run" in text


def test_a_run_that_goes_the_wrong_way_has_no_best_checkpoint(page):
    text = page(make_guard(slope=-0.1))
    assert headings(text, 1) == ["No checkpoint is better than the base model"]


def test_without_an_axis_checkpoints_are_not_ranked(collapsed, page):
    guard = copy.deepcopy(collapsed) | {"checkpoints": [], "best": None}
    for signal in guard["signals"]:
        signal["axis"] = False
    text = page(guard)
    assert headings(text, 1) == ["The checkpoints could not be ranked"]
    assert 'id="checkpoints"' not in text


def test_crossed_signals_come_first_and_the_trained_one_is_marked(collapsed, page):
    cards = [re.sub(r"<[^>]+>", "", card) for card in headings(page(collapsed), 3)]
    assert len(cards) == 4
    assert "out at step" in cards[0] and "out at step" not in cards[-1]
    assert [card for card in cards if "is trained" in card] == [card for card in cards if card.startswith("sgp_gap")]


def test_the_corridor_lies_between_its_ends(collapsed, page):
    text = page(collapsed)
    card = text[text.index('data-signal="statistics"') :]
    found = re.search(r'class="corridor" x="44" y="([\d.]+)" width="\d+" height="([\d.]+)"', card)
    top, height = map(float, found.groups())
    labels = re.findall(r'x="38" y="([\d.]+)" text-anchor="end">([\d.]+)<', card[: card.index("</svg>")])
    ticks = {float(value): float(y) for y, value in labels}
    scale = (ticks[0.0] - ticks[1.0]) / 1.0
    assert top + height == pytest.approx(ticks[0.0], abs=0.2)  # low end 0
    assert height == pytest.approx(1.25 * scale, abs=0.3)


def test_the_sheets_are_in_the_page_before_best_and_last_first(collapsed, page):
    text = page(collapsed)
    best = collapsed["best"]["step"]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert captions[:2] == ["Step 0, the base model", f"Step {best}, the best checkpoint"]
    assert captions[2] == "Step 20, the last step"
    assert len(re.findall(r'src="data:image/webp;base64,', text)) == len(captions) == 4
    assert not re.search(r'(src|href)="(?!data:|#)', text)


def test_what_a_user_wrote_is_text(collapsed, page):
    guard = collapsed | {"words": {"positive": ["<b>photo</b>"], "negative": ["&"]}}
    text = page(guard, sheets=())
    assert "<b>photo" not in text and "&lt;b&gt;photo" in text
    assert 'id="pictures"' not in text


def test_figures_of_a_finished_run_are_shown_with_their_intervals(collapsed, page):
    figure = {"mean": 0.5, "low": 0.4, "high": 0.6}
    text = page(collapsed, summary={"steps": 20, "base": {"photo_rate": figure}, "tuned": {"photo_rate": figure}})
    assert '<th scope="row">photo rate</th><td>0.500 [0.400, 0.600]</td>' in text


def test_a_run_of_which_nothing_was_seen_has_a_page(collapsed, page):
    guard = collapsed | {"series": {key: [] for key in collapsed["series"]}, "panel": [], "checks": [], "warnings": []}
    guard |= {"collapsed": None, "stopped": None, "checkpoints": [], "best": None}
    assert "Nothing that was watched left its corridor" in page(guard)


def test_every_signal_of_a_guard_has_a_meaning():
    from srpo_cli.recipes import guard

    assert {*guard._LOOK, guard.CAPTION_MARGIN, guard.REWARD, guard.GAP, "statistics"} <= {*MEANINGS}
