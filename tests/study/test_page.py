"""The rating page in a real browser, by keyboard, on a phone, and while its server is killed again and again."""

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import pytest

PATIENCE = 30  # seconds that a page may take to come back
VALUES = {"1": 3, "2": 2, "3": 1, "4": 0}

WATCH = """
const send = window.fetch;
window.fetch = async (path, options) => {
  const response = await send(path, options);
  if (response.ok && options?.method === "POST" && sessionStorage.getItem("lose")) {
    sessionStorage.removeItem("lose");
    throw new TypeError("the acknowledgement was lost");
  }
  if (options?.method === "POST" && (response.ok || response.status === 409)) {
    const reply = await response.clone().json();
    const told = JSON.parse(sessionStorage.getItem("told") || "[]");
    told.push([response.status, reply.stored, JSON.parse(options.body)]);
    sessionStorage.setItem("told", JSON.stringify(told));
  }
  return response;
};
"""
"""Notes every answer that the server has acknowledged, over reloads too; loses one acknowledgement if it is told to."""

SEEN = """
return {
  screen: document.body.dataset.screen,
  ready: document.getElementById("panel").ariaBusy === "false" && !document.getElementById("guide").open,
  guide: document.getElementById("guide").open,
  count: document.getElementById("count").textContent,
  title: document.getElementById("title").textContent,
  prompt: document.getElementById("prompt").textContent,
  undo: !document.getElementById("undo").disabled,
  status: document.getElementById("status").textContent,
  zoomed: !document.getElementById("zoomed").hidden,
  feedback: document.getElementById("feedback").hidden ? null : document.getElementById("verdict").textContent,
  images: Array.from(document.querySelectorAll("#stage img"), (image) => [
    image.naturalWidth, image.clientWidth, getComputedStyle(image).imageRendering,
    image.getBoundingClientRect().left, image.getBoundingClientRect().right,
  ]),
};
"""


class Page:
    """A rater's page in a browser of its own."""

    def __init__(self, driver, link: str) -> None:
        self.driver, self.link = driver, link
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        driver.get(link)

    def press(self, key: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(key).perform()

    def see(self) -> dict:
        return self.driver.execute_script(SEEN)

    def wait(self, until: Callable[[dict], bool]) -> dict:
        end = time.monotonic() + PATIENCE
        while not until(seen := self.see()):
            assert time.monotonic() < end, seen
            time.sleep(0.01)
        return seen

    def ready(self) -> dict:
        """Wait for the next question or the end."""
        return self.wait(lambda seen: seen["ready"] or seen["screen"] == "end")

    def start(self) -> dict:
        """Leave the greeting."""
        self.wait(lambda seen: seen["guide"])
        self.press("\ue007")
        return self.ready()

    def answer(self, key: str) -> dict:
        self.press(key)
        return self.ready()

    def reload(self) -> None:
        """As somebody does it: again, if the server was away."""
        from selenium.common.exceptions import WebDriverException

        while True:
            with suppress(WebDriverException):
                self.driver.get(self.link)
                if self.driver.execute_script('return document.getElementById("panel") !== null'):
                    return
            time.sleep(0.1)

    def told(self) -> list:
        return self.driver.execute_script('return JSON.parse(sessionStorage.getItem("told") || "[]")')

    def problems(self) -> list[str]:
        """What the browser complained about."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]


@pytest.fixture
def opened(serving, browser, tmp_path) -> Callable[..., Page]:
    """Make a study, serve it, and open the first rater's page; ``window`` is the browser's."""
    servers = []

    def open_page(window: dict | None = None, **study) -> Page:
        made = serving.make_study(tmp_path, **study)
        servers.append(serving.Served(made))
        page = Page(browser(**(window or {})), servers[-1].links["r01"])
        page.study, page.server = made, servers[-1]
        return page

    yield open_page
    for server in servers:
        server.kill()


@pytest.fixture
def page(opened) -> Page:
    made = opened(prompts=3, repeats=0)
    made.start()
    return made


def test_a_picture_is_graded_by_keys_one_question_at_a_time(page, serving):
    seen = page.see()
    assert (seen["count"], seen["title"], seen["prompt"]) == ("1 of 6", "Aesthetics", "not shown for this question")
    (natural, shown, rendering, *_) = seen["images"][0]  # enlarged by a whole factor, pixel by pixel
    assert natural == 48 and shown % 48 == 0 and shown // 48 >= 8 and rendering == "pixelated"
    titles = []
    for key in "12341":
        titles.append(page.see()["title"])
        seen = page.answer(key)
    assert titles == ["Aesthetics", "Text-image alignment", "Realism and artifacts", "Detail", "Overall"]
    assert (seen["count"], seen["title"]) == ("2 of 6", "Aesthetics")
    values = dict(serving.rows(page.study, "SELECT dimension, value FROM answers"))
    assert values == {"aesthetics": 3, "alignment": 2, "realism": 1, "detail": 0, "overall": 3}
    assert page.problems() == []


def test_times_are_measured_from_the_showing(page, serving):
    time.sleep(0.5)
    page.answer("1")
    page.answer("1")
    waited, at_once = (ms for (ms,) in serving.rows(page.study, "SELECT ms FROM changes ORDER BY id"))
    assert 500 <= waited < 10_000 and at_once < waited


def test_undo_goes_back_to_the_last_question_even_of_the_last_picture(page, serving):
    assert not page.see()["undo"]
    page.press("u")  # there is nothing to undo
    for _ in range(5):
        page.answer("2")
    assert page.see()["count"] == "2 of 6"
    page.answer("u")
    assert page.answer("\ue003")["title"] == "Detail"  # backspace
    page.driver.refresh()
    seen = page.ready()
    assert (seen["count"], seen["title"]) == ("1 of 6", "Detail")
    page.answer("1")
    page.answer("4")
    assert serving.rows(page.study, "SELECT value FROM answers WHERE dimension = 'overall'") == [(0,)]
    values = [value for (value,) in serving.rows(page.study, "SELECT value FROM changes ORDER BY id")]
    assert values == [2, 2, 2, 2, 2, None, None, 3, 0]


@pytest.mark.parametrize("size", [(1400, 1000), (640, 400)])
def test_large_pictures_are_made_smaller_but_never_larger_and_zoom_shows_their_own_pixels(opened, size):
    page = opened(prompts=1, size=size)
    seen = page.start()
    (natural, shown, *_) = seen["images"][0]
    assert natural == size[0] and shown <= min(size[0], 1280)
    assert (shown == size[0]) == (size[0] == 640)
    page.press("z")
    widths = page.driver.execute_script(
        'const place = document.getElementById("zoomed");'
        'return [place.querySelector("img").clientWidth, place.scrollLeft, place.scrollTop, place.scrollWidth]'
    )
    assert page.see()["zoomed"] and widths[0] == size[0]
    if size[0] > 1280:
        before = widths[1:3]
        assert before[0] == pytest.approx((widths[3] - 1280) / 2, abs=16)  # it opens on the middle
        page.press("\ue014")
        drag(page, -60, -40)
        after = page.driver.execute_script(
            'return [document.getElementById("zoomed").scrollLeft, document.getElementById("zoomed").scrollTop]'
        )
        assert after[0] > before[0] and after[1] > before[1]
        assert page.see()["zoomed"]  # a drag is no click
    page.press("z")
    assert not page.see()["zoomed"]


def drag(page: Page, right: int, down: int) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    place = page.driver.find_element(By.ID, "zoomed")
    ActionChains(page.driver).click_and_hold(place).move_by_offset(right, down).release().perform()


def test_a_click_zooms_and_another_closes(page):
    from selenium.webdriver.common.by import By

    page.driver.find_element(By.CSS_SELECTOR, "#stage img").click()
    assert page.see()["zoomed"]
    page.driver.find_element(By.ID, "zoomed").click()
    assert not page.see()["zoomed"]
    page.press("?")
    page.wait(lambda seen: seen["guide"])
    page.press("1")  # no answer while help is open
    page.press("\ue00c")
    assert page.ready()["title"] == "Aesthetics"


def test_training_tells_the_right_answer_and_waits(opened, serving, tmp_path):
    page = opened(prompts=2, training=[serving.lesson(tmp_path, {"realism": 1, "detail": 3})])
    page.start()
    page.press("1")
    assert page.wait(lambda seen: seen["feedback"])["feedback"] == "The right answer is: Pass."
    page.press("2")  # answers nothing
    page.press("\ue007")
    assert page.ready()["title"] == "Detail"
    page.press("1")
    assert page.wait(lambda seen: seen["feedback"])["feedback"] == "That is right."
    page.press(" ")
    seen = page.ready()
    assert seen["title"] == "Aesthetics" and not seen["undo"]
    assert serving.rows(page.study, "SELECT dimension, value FROM answers ORDER BY dimension") == [
        ("detail", 3),
        ("realism", 3),
    ]


def test_pairs_are_answered_by_arrows_and_ties(opened, serving):
    page = opened(prompts=4, mode="pairs", repeats=0)
    page.start()
    assert len(page.see()["images"]) == 2
    page.press("z")
    page.press("\ue014")  # the other picture, no answer
    page.press("z")
    for key in ("\ue012", "t", "=", "\ue014"):
        page.answer(key)
    assert page.see()["screen"] == "end"
    assert [value for (value,) in serving.rows(page.study, "SELECT value FROM changes ORDER BY id")] == [0, 1, 1, 2]


@pytest.mark.parametrize("mode", ["grades", "pairs"])
def test_on_a_phone_all_is_in_reach_of_a_thumb(opened, mode, serving):
    from selenium.webdriver.common.by import By

    page = opened({"width": 360, "height": 740}, prompts=2, mode=mode, repeats=0)
    page.start()
    wide = page.driver.execute_script("return document.documentElement.scrollWidth")
    assert wide <= 360
    for *_, left, right in page.see()["images"]:
        assert 0 <= left < right <= 360
    buttons = page.driver.find_elements(By.CSS_SELECTOR, "#answers button")
    assert len(buttons) == (4 if mode == "grades" else 3)
    assert all(button.size["height"] >= 44 for button in buttons)
    buttons[0].click()
    page.wait(lambda seen: seen["ready"] and seen["undo"])
    assert serving.rows(page.study, "SELECT value FROM answers") == [(3 if mode == "grades" else 0,)]


def test_the_end_can_be_undone_and_is_not_the_end_for_an_expert(opened, serving):
    page = opened(prompts=1, repeats=0)
    page.start()
    for _ in range(10):
        page.answer("1")
    assert page.see()["screen"] == "end"
    page.press("u")
    assert page.wait(lambda seen: seen["ready"])["title"] == "Overall"
    page.driver.get(page.server.links["e01"])
    page.wait(lambda seen: seen["screen"] == "end")
    assert page.driver.execute_script('return document.getElementById("farewell").textContent') == "Nothing to do yet"


def test_a_late_answer_of_another_window_is_not_taken_twice(page, serving):
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("window")
    page.driver.get(page.server.links["r01"])
    page.ready()
    page.answer("1")
    page.driver.switch_to.window(first)
    page.press("4")  # to the question that the other window has answered
    seen = page.wait(lambda seen: seen["ready"] and seen["title"] == "Text-image alignment")
    assert seen["status"] == "This was answered before"
    assert serving.rows(page.study, "SELECT value FROM answers") == [(3,)]


@pytest.mark.parametrize(("key", "lost"), [("4", "stored"), ("u", "taken back")])
def test_an_answer_that_is_refused_is_not_said_to_be_stored(page, serving, key, lost):
    page.answer("1")
    with closing(sqlite3.connect(page.study / "answers.sqlite")) as database, database:
        database.execute("UPDATE raters SET token_sha256 = rater")  # the link is no longer the rater's
    page.press(key)
    page.wait(lambda seen: seen["screen"] == "end")
    told = page.driver.execute_script('return document.getElementById("epilogue").textContent')
    assert f"Your last answer was not {lost}" in told
    assert serving.rows(page.study, "SELECT value FROM changes") == [(3,)]


@contextmanager
def killed_again_and_again(server, dice: random.Random) -> Iterator[list[float]]:
    """Kill the server at random moments and start it again, until left; the list is of when."""
    over, killed = threading.Event(), []

    def run() -> None:
        while not over.wait(dice.uniform(0.3, 2.0)):
            server.kill()
            killed.append(time.monotonic())
            over.wait(dice.uniform(0, 0.4))
            server.start()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def rate(page: Page, dice: random.Random, pressed: list[int | None]) -> None:
    """Rate everything with the keyboard, now and then taking back or loading the page anew in the middle."""
    page.start()
    page.driver.execute_script('sessionStorage.setItem("lose", "1")')
    while (seen := page.ready())["screen"] != "end":
        if seen["undo"] and dice.random() < 0.06:
            page.press("u")
            pressed.append(None)
        else:
            key = dice.choice(list(VALUES))
            page.press(key)
            pressed.append(VALUES[key])
        if dice.random() < 0.05:
            page.reload()


@pytest.mark.slow
def test_two_raters_lose_and_double_nothing_while_the_server_is_killed(serving, browser, tmp_path):
    study = serving.make_study(tmp_path, prompts=20, raters=2, k=2, repeats=0.05)
    raters = ("r01", "r02")
    with serving.Served(study) as server:
        pages = {rater: Page(browser(), server.links[rater]) for rater in raters}
        pressed: dict[str, list[int | None]] = {rater: [] for rater in raters}
        dice = {rater: random.Random(f"rate {rater}") for rater in raters}
        threads = [threading.Thread(target=rate, args=(pages[each], dice[each], pressed[each])) for each in raters]
        with killed_again_and_again(server, random.Random("kill")) as killed:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        told = {rater: pages[rater].told() for rater in raters}
    assert len(killed) >= 8
    assert serving.rows(study, "PRAGMA integrity_check") == [("ok",)]
    for rater in raters:
        tasks = serving.rows(study, "SELECT count(*) FROM tasks WHERE rater = ?", rater)[0][0]
        assert tasks == 40 + 2
        query = "SELECT request, task, dimension, value FROM changes JOIN tasks USING (task) WHERE rater = ?"
        changes = serving.rows(study, f"{query} ORDER BY id", rater)
        # what was pressed, what the page was told to be stored, and what is stored, are the same in the same order
        acknowledged = {body["request"]: body for _, stored, body in told[rater] if stored}
        assert all(stored for _, stored, _ in told[rater])
        assert [value for *_, value in changes] == pressed[rater]
        assert [
            (body["request"], body["task"], body["dimension"], body["value"]) for body in acknowledged.values()
        ] == changes
        standing: dict[tuple[str, str], int] = {}
        for _, task, dimension, value in changes:
            if value is None:
                del standing[task, dimension]
            else:
                assert (task, dimension) not in standing
                standing[task, dimension] = value
        query = "SELECT task, dimension, value FROM answers JOIN tasks USING (task) WHERE rater = ?"
        stored = serving.rows(study, query, rater)
        assert sorted(stored) == sorted((*question, value) for question, value in standing.items())
        assert len(stored) == tasks * 5
    assert any(value is None for value in pressed["r01"] + pressed["r02"])  # so all of it has been met
    assert all(any(status == 409 for status, *_ in told[rater]) for rater in raters)
