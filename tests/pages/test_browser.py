"""The report in a real Chromium, opened as a file as a reader would."""

import functools
import http.server
import json
import re
import threading
import time

import pytest

from srpo_cli.pages import gallery as gallery_module
from srpo_cli.pages.report import verdict, write_report

LABELS = ("base", "tuned")
HOSTILE = """<script>hacked = 1</script>"' onerror="hacked=2" {{ 7 * 7 }} &amp; </script><img src=x onerror=hacked=3>"""
HEBREW = "מודל חדש (2)"


def opened(driver, path):
    """Open a page and wait for it; its console must stay empty."""
    driver.get(path.as_uri())
    assert driver.get_log("browser") == []
    return driver


def all_texts(driver, selector):
    return [each.text for each in driver.find_elements("css selector", selector)]


def choose(driver, name, value):
    from selenium.webdriver.support.ui import Select

    Select(driver.find_element("id", f"show-{name}")).select_by_visible_text(value)


def shown_items(driver):
    return driver.execute_script("return [...document.querySelectorAll('.prompt')].map(each => each.dataset.item)")


def requests(driver, page):
    """Addresses that a page asked for, but for those that are in it."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    urls = [each["request"]["url"] for each in sent if each["documentURL"].startswith(page)]
    return [url for url in urls if not url.startswith("data:")]


@pytest.fixture
def report(tmp_path, pictures, table, result, study):
    """Write a report of 48 pictures a model, with a study in it; its folder, result and table."""
    rows = table(LABELS, pictures(tmp_path, LABELS, 48), 12)
    made = result(rows)
    write_report(tmp_path, made, rows, study())
    return tmp_path, made, rows


def test_the_page_asks_for_nothing_and_says_what_the_result_says(browser, report):
    folder, result, _ = report
    driver = opened(browser(), folder / "report.html")
    page = (folder / "report.html").as_uri()
    assert requests(driver, page) == [page]
    leads = [re.sub(r"\s+", " ", text) for text in all_texts(driver, "#verdict .lead")]
    assert leads == verdict(result)
    for comparison in result["comparisons"]:
        if comparison["group"] == "all":
            row = driver.find_element("css selector", f"#differences tr[data-measure='{comparison['measure']}']")
            digits = next(m["digits"] for m in result["measures"] if m["name"] == comparison["measure"])
            assert f"{comparison['difference']:+.{digits}f}".replace("-", "\N{MINUS SIGN}").lstrip(
                "+"
            ) in row.get_attribute("textContent")
    assert driver.find_element("id", "skipped").is_displayed()


def test_pictures_are_found_sorted_and_turned(browser, report):
    folder, _, table = report
    driver = opened(browser(), folder / "report.html")
    in_order = list(dict.fromkeys(table["item"]))
    assert shown_items(driver) == in_order[:12]
    driver.find_element("css selector", "[data-turn='1']").click()
    assert shown_items(driver) == in_order[12:24]

    choose(driver, "group", "photo")
    assert shown_items(driver) == [item for item in in_order if item.startswith("photo/")]
    choose(driver, "group", "all")

    driver.find_element("css selector", "[data-sort='lowest']").click()  # worst by gap
    gaps = table[table["model"] == "tuned"].set_index("item")["gap:hpsv2.1"]
    assert shown_items(driver) == list(gaps.sort_values().index[:12])
    choose(driver, "of", "the difference")
    choose(driver, "order", "highest first")
    choose(driver, "column", "HPS")
    plain = [table[table["model"] == label].set_index("item")["hpsv2.1"] for label in LABELS]
    assert shown_items(driver)[:5] == list((plain[1] - plain[0]).sort_values(ascending=False).index[:5])

    driver.find_element("id", "show-search").send_keys("6 BIRDS anime")
    deadline = time.monotonic() + 5
    while len(shown_items(driver)) > 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    wanted = table[(table["model"] == "base") & table["prompt"].str.contains("6 birds") & (table["group"] == "anime")]
    assert sorted(shown_items(driver)) == sorted(wanted["item"])
    assert driver.find_element("id", "found").text == f"1 to {len(wanted)} of {len(wanted)} found among 48"


def test_the_slider_is_reached_and_moved_by_the_keyboard(browser, report):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    folder, _, _ = report
    driver = opened(browser(), folder / "report.html")
    driver.find_element("id", "show-search").click()
    for _ in range(30):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        if driver.switch_to.active_element.get_attribute("type") == "range":
            break
    slider = driver.switch_to.active_element
    assert slider.get_attribute("type") == "range"
    over = driver.find_element("css selector", ".slider .after")
    assert "50%" in over.value_of_css_property("clip-path")
    ActionChains(driver).send_keys(Keys.ARROW_RIGHT * 10).perform()
    assert "60%" in over.value_of_css_property("clip-path")
    assert slider.get_attribute("aria-valuetext") == "60 % base"
    ActionChains(driver).send_keys(Keys.HOME).perform()
    assert "0%" in over.value_of_css_property("clip-path")


def test_a_model_is_never_on_both_sides_of_the_slider(browser, report):
    from selenium.webdriver.support.ui import Select

    folder, _, _ = report
    driver = opened(browser(), folder / "report.html")
    before, after = (Select(driver.find_element("id", f"show-{side}")) for side in ("before", "after"))
    for changed in (before, after, after, before):
        changed.select_by_visible_text("tuned" if changed.first_selected_option.text == "base" else "base")
        assert {before.first_selected_option.text, after.first_selected_option.text} == {"base", "tuned"}


def test_small_pictures_are_enlarged_by_a_whole_factor(browser, report):
    folder, _, _ = report
    for width in (1280, 360):
        driver = opened(browser(width), folder / "report.html")
        sizes = driver.execute_script("return [...document.querySelectorAll('.prompt img')].map(i => i.clientWidth)")
        assert len(sizes) == 12 * 4
        assert all(size % 48 == 0 and size >= 96 for size in sizes)
        image = driver.find_element("css selector", ".prompt img")
        assert image.value_of_css_property("image-rendering") == "pixelated"


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_down_and_not_sideways(browser, report, dark):
    folder, _, _ = report
    driver = opened(browser(360, 740, dark), folder / "report.html")
    driver.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
    wide = driver.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, nav, svg, .skip')"
        " && e.getBoundingClientRect().right > 361).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    ground = driver.find_element("tag name", "body").value_of_css_property("background-color")
    assert (max(map(int, re.findall(r"\d+", ground)[:3])) < 60) is dark


def test_what_is_folded_is_printed(browser, report):
    folder, _, _ = report
    driver = opened(browser(), folder / "report.html")
    closed = "return document.querySelectorAll('section > details:not([open])').length"
    before = driver.execute_script(closed)
    assert before == 7
    assert len(driver.find_elements("css selector", "img[loading=lazy]")) == 48
    driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert driver.execute_script(closed) == 0
    assert driver.find_elements("css selector", "img[loading=lazy]") == []
    driver.execute_script("dispatchEvent(new Event('afterprint'))")
    assert driver.execute_script(closed) == before


def test_nobodys_text_runs(browser, tmp_path, pictures, table, result, study):
    rows = table(LABELS, pictures(tmp_path, LABELS, 8), 2)
    rows = rows.replace({"model": {"base": HOSTILE, "tuned": HEBREW}, "group": {"anime": HOSTILE}})
    rows["prompt"] = HOSTILE
    rows["item"] = HOSTILE + rows["item"]
    made = result(rows, benchmark=HOSTILE)
    made["description"] = made["protocol_digest"] = made["published"]["source"] = made["published"]["note"] = HOSTILE
    made["measures"][0]["title"] = made["measures"][0]["note"] = HOSTILE
    made["skipped"] = [{"metric": HOSTILE, "reason": HOSTILE}]
    made["environment"] = {HOSTILE: HOSTILE, "command": ["srpo", "eval", HOSTILE]}
    made["notes"] = [HOSTILE]
    made["protocol"]["judges"] = {HOSTILE: {HOSTILE: HOSTILE}}
    made["published"]["rows"][0]["model"] = made["hacking"][0]["text"] = HOSTILE
    analysis = study(arms=(HOSTILE, HEBREW)) | {"study": HOSTILE, "notes": [HOSTILE]}
    analysis["raters_table"][0]["rater"] = HOSTILE
    driver = opened(browser(), write_report(tmp_path, made, rows, analysis))
    choose(driver, "column", HOSTILE.strip())
    for summary in driver.find_elements("css selector", "summary"):
        driver.execute_script("arguments[0].click()", summary)
    assert driver.execute_script("return window.hacked") is None
    assert len(driver.find_elements("css selector", "script")) == 3
    assert driver.find_elements("css selector", "img[onerror], [onmouseover]") == []
    assert driver.find_element("css selector", ".prompt h3").text == HOSTILE
    captions = all_texts(driver, ".prompt:first-child figcaption bdi")
    assert captions[:2] == [HOSTILE, HEBREW]
    assert driver.get_log("browser") == []


def test_no_foreign_script_runs_even_if_it_gets_into_the_page(browser, report):
    folder, _, _ = report
    page = folder / "report.html"
    page.write_text(page.read_text(encoding="utf-8").replace("</main>", "<script>window.hacked = 1</script></main>"))
    driver = browser()
    driver.get(page.as_uri())
    assert driver.execute_script("return window.hacked") is None
    assert shown_items(driver)


def test_thumbnails_beside_the_page_are_shown_from_a_file_and_from_a_server(
    browser, tmp_path, pictures, table, result, monkeypatch
):
    monkeypatch.setattr(gallery_module, "EMBEDDED", 0)
    rows = table(LABELS, pictures(tmp_path, LABELS, 8, edge=300, noise=9), 2)
    page = write_report(tmp_path, result(rows), rows)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    driver = browser()
    try:
        for address in (page.as_uri(), f"http://127.0.0.1:{server.server_port}/report.html"):
            driver.get(address)
            driver.execute_script("for (const each of document.images) each.loading = 'eager'")
            widths = "return [...document.images].map(each => each.naturalWidth)"
            deadline = time.monotonic() + 10
            while 0 in driver.execute_script(widths) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert driver.execute_script(widths) == [256] * 32
            assert driver.get_log("browser") == []
            link = driver.find_element("css selector", ".prompt a.frame").get_attribute("href")
            assert link == address.replace("report.html", rows["file"][0])
    finally:
        server.shutdown()


def test_3200_prompts_of_six_models_open_quickly_and_can_be_searched(
    browser, tmp_path, pictures, table, result, monkeypatch
):
    monkeypatch.setattr(gallery_module, "EMBEDDED", 0)
    labels = ["FLUX.1-dev", "ReFL", "DRaFT-LV", "DanceGRPO", "Direct-Align", "SRPO"]
    rows = table(labels, pictures(tmp_path, labels, 20, edge=16), 800)
    page = write_report(tmp_path, result(rows), rows)
    driver = browser()
    start = time.monotonic()
    opened(driver, page)
    assert len(shown_items(driver)) == 12
    assert time.monotonic() - start < 5
    asked = {url for url in requests(driver, page.as_uri()) if url != page.as_uri()}
    assert all("/thumbnails/" in url for url in asked)
    assert len(asked) <= 12 * len(labels) < len(list(tmp_path.glob("thumbnails/*/*")))
    first = driver.find_element("css selector", ".prompt img")
    assert first.get_attribute("loading") == "lazy"
    driver.execute_script("arguments[0].scrollIntoView()", first)
    while not first.get_property("naturalWidth") and time.monotonic() - start < 10:
        time.sleep(0.05)
    assert first.get_property("naturalWidth") == 16
    choose(driver, "size", "24")
    assert len(driver.find_elements("css selector", "img")) == 24 * 8 < 400
    driver.find_element("id", "show-search").send_keys("prompt 3199 ")
    deadline = time.monotonic() + 3
    while shown_items(driver) != ["photo/00799"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert shown_items(driver) == ["photo/00799"]
