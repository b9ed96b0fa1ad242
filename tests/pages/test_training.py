"""The page of a run: what it says of a collapse, of the best checkpoint, and of a run that has neither."""

import copy
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from srpo_cli.metrics.guard import Signal, Watch
from srpo_cli.pages import training
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
        "plan": {"steps": 300},
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


OVER = {"steps": 20, "base": {}, "tuned": {}}


@pytest.fixture
def page(tmp_path):
    """Writes the page of a guard and returns it as text."""

    def write(guard, sheets=(0, 10, 15, 20), summary=OVER):
        (tmp_path / "config.yaml").write_text(json.dumps(CONFIG))
        (tmp_path / "samples").mkdir(exist_ok=True)
        for step in sheets:
            Image.new("RGB", (64, 32), "red").save(tmp_path / "samples" / f"step-{step:06d}.png")
        if summary:
            (tmp_path / "summary.json").write_text(json.dumps(summary))
        return write_training_report(tmp_path, guard, "miniature + 0.5 pickscore").read_text()

    return write


def test_a_checkpoint_is_the_best_of_several_and_else_the_only_one(page):
    calm = make_guard(slope=0.01)
    only = calm | {"checkpoints": calm["checkpoints"][:1]}
    best = calm["best"]["step"]
    assert headings(page(calm), 1) == [f"Step {best} is the best"]
    assert headings(page(only), 1) == [f"Step {best} is the only checkpoint"]


@pytest.mark.parametrize(("count", "when"), [(1, "at the one check."), (2, "at any of 2 checks.")])
def test_checks_are_counted(page, count, when):
    calm = make_guard(slope=0.01)
    checked = [check for check in calm["checks"] if check["z"]][:count]
    assert when in page(calm | {"checks": checked, "warnings": []})


def test_all_rewards_that_were_trained_are_named(collapsed, page):
    assert "on the reward miniature + 0.5 pickscore, " in page(collapsed)


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


def test_of_a_run_that_is_not_over_the_heading_says_so(collapsed, page):
    step, best = collapsed["stopped"]["step"], collapsed["best"]["step"]
    text = page(collapsed, summary=None)
    assert headings(text, 1) == [f"Stopped at step {step}; step {best} is the best so far"]
    assert "it was not over when this page was written" in text


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


SVG = "{http://www.w3.org/2000/svg}"


def chart_of(text, anchor):
    start = text.index("<svg", text.index(anchor))
    return ElementTree.fromstring(text[start : text.index("</svg>", start) + len("</svg>")])


def points_of(chart):
    """Centres of the circles, which the first series has."""
    return [(float(c.get("cx")), float(c.get("cy"))) for c in chart.iter(f"{SVG}circle") if c.get("class") == "dot s0"]


def test_the_checkpoints_are_marked_where_they_are_on_the_way(collapsed, page):
    chart = chart_of(page(collapsed), 'class="beside"')
    points = points_of(chart)
    assert len(points) == len(collapsed["checkpoints"]) == 4
    squares = [p for p in chart.iter(f"{SVG}polygon") if p.get("class") == "dot s1"]
    assert len(squares) == 4  # of the second axis
    (x, y), (x_2, y_2) = points[0], points[1]
    first, second = collapsed["checkpoints"][:2]
    ticks = {float(t.text): float(t.get("y")) for t in chart.iter(f"{SVG}text") if t.get("x") == "38"}
    scale = (ticks[1.0] - ticks[0.0]) / 1.0
    moved = second["axes"]["statistics"] - first["axes"]["statistics"]
    assert y_2 - y == pytest.approx(scale * moved, abs=0.3)
    assert x_2 > x


def test_the_way_is_shown_where_no_checkpoint_is_on_it(collapsed, page):
    text = page(collapsed | {"checkpoints": [], "best": None})
    assert "There was no checkpoint to rank" in text
    assert points_of(chart_of(text, 'class="beside"')) == []
    assert 'aria-label="Checkpoints"' not in text


def test_the_points_of_a_signal_are_what_its_checks_tested(collapsed, page):
    chart = chart_of(page(collapsed), 'data-signal="statistics"')
    tested = [check["values"]["statistics"] for check in collapsed["checks"]]
    heights = [y for _, y in points_of(chart)]
    assert len(heights) == len(tested) == 4
    steps = np.diff(heights) / np.diff(tested)  # pixels of 1, which is the same all over
    assert steps == pytest.approx([steps[0]] * 3, rel=0.01)


def test_a_collapse_that_did_not_stop_the_run_is_in_its_heading(collapsed, page):
    step, best = collapsed["collapsed"]["step"], collapsed["best"]["step"]
    guard = collapsed | {"stopped": None, "action": "warn"}
    text = page(guard)
    assert headings(text, 1) == [f"Collapsed at step {step}; step {best} is the best"]
    assert "training went on: guard.action is warn" in text
    assert "before the collapse is as near" not in text
    late = guard | {"best": {**guard["best"], "step": step}}
    assert "None from before the collapse is as near: look at its pictures" in page(late)


def test_the_last_checkpoint_is_not_called_the_nearest_where_another_one_is(collapsed, page):
    places = [{"step": 5, "distance": 0.10, "axes": {}}, {"step": 10, "distance": 0.15, "axes": {}}]
    guard = collapsed | {"collapsed": None, "stopped": None, "checkpoints": places, "best": places[1]}
    text = page(guard)
    assert "Step 10 is the last, and no other checkpoint is clearly nearer" in text
    assert "that of step 10 is nearest" not in text
    assert "that of step 5 is nearest to where it should be" in page(guard | {"best": places[0]})


def test_what_judged_is_said_and_so_is_that_no_second_reward_did(collapsed, page):
    assert "nothing was trained on miniature:clip." in page(collapsed)
    signals = [{**signal, "axis": False} for signal in collapsed["signals"] if "/" not in signal["name"]]
    assert "no second reward was watched" in page(collapsed | {"signals": signals})


def test_a_run_without_a_check_is_not_called_healthy(collapsed, page):
    quiet = collapsed | {"warnings": [], "collapsed": None, "stopped": None}
    assert "is not known" not in page(quiet)
    assert "no check was made: whether the run hacked is not known" in page(quiet | {"checks": []})


def test_what_the_guard_did_not_see_is_shown_apart(collapsed, page, tmp_path):
    assert 'id="training"' not in page(collapsed)
    rows = [{"step": i, "loss": 0.1 * i, "photo_distance": None, "grad_norm": math.nan} for i in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    section = page(collapsed).partition('id="training"')[2].partition("</section>")[0]
    assert headings(section, 3) == ["loss"]  # the others have no figure


def test_nothing_that_is_not_a_number_gets_into_a_chart(collapsed, page):
    guard = copy.deepcopy(collapsed)
    for name in ("statistics", "sgp_gap"):
        guard["series"][name][::2] = [None] * len(guard["series"][name][::2])
        guard["checks"][0]["values"][name] = math.nan
    guard["checks"][1]["z"]["statistics"] = math.inf
    guard["signals"][2] |= {"low": None, "high": None}
    guard["checkpoints"][0]["axes"]["statistics"] = None
    text = page(guard)
    assert not re.search(r'[="\s](nan|inf|None)\b', "".join(re.findall(r"<svg.*?</svg>", text, re.S)))
    assert len(points_of(chart_of(text, 'data-signal="statistics"'))) == 3


def test_many_sheets_are_thinned_and_made_smaller(collapsed, page, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_EMBEDDED", 250_000)
    (tmp_path / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    for step in range(0, 400, 5):
        Image.fromarray(noise).save(tmp_path / "samples" / f"step-{step:06d}.png")
    text = page(collapsed, sheets=())
    sources = re.findall(r'src="(data:[^"]+)"', text)
    assert len(sources) == 24
    assert sum(map(len, sources[3:])) <= 250_000
    assert len(sources[0]) > 4 * len(sources[3])  # the main ones keep their size
    steps = [int(step) for step in re.findall(r"<figcaption>Step (\d+)", text)]
    assert steps[:3] == [0, collapsed["best"]["step"], 395]
    assert max(np.diff(steps[3:])) <= 25  # evenly


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_the_page_without_scrolling_it_sideways(browser, collapsed, page, tmp_path, dark):
    page(collapsed, sheets=(0, 5, 10, 15, 20, 25, 30))
    driver = browser(390, 800, dark)
    driver.get((tmp_path / "report.html").as_uri())
    assert driver.get_log("browser") == []  # the policy of the page lets its own style and script in
    driver.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    assert driver.execute_script("return [...document.images].every((each) => each.naturalWidth > 0)")


def test_the_other_steps_are_a_strip_that_keys_move_and_paper_unrolls(browser, collapsed, page, tmp_path):
    from selenium.webdriver.common.keys import Keys

    page(collapsed, sheets=(0, 5, 10, 15, 20, 25, 30))
    driver = browser(900, 800)
    driver.get((tmp_path / "report.html").as_uri())
    driver.execute_script("document.querySelector('#pictures details').open = true")
    strip = driver.find_element("css selector", ".film")
    assert strip.get_property("scrollWidth") > strip.get_property("clientWidth")
    strip.send_keys(Keys.END)
    strip.send_keys(Keys.ARROW_RIGHT * 10)
    moved = "const done = arguments[1]; setTimeout(() => done(arguments[0].scrollLeft), 500)"
    assert driver.execute_async_script(moved, strip) > 0
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert strip.get_property("scrollWidth") <= strip.get_property("clientWidth")
