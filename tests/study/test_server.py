"""What the rating page's server gives out, and what it refuses: with the right code, and nothing written."""

import http.client
import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from srpo_cli.errors import UsageError
from srpo_cli.study.build import resolve
from srpo_cli.study.server import LARGEST_BODY, make_app

HERE = "http://localhost:8765"
SAFE = {"Content-Type": "application/json", "X-Rate": "1", "Origin": HERE}


@pytest.fixture
def study(serving, tmp_path) -> Path:
    lessons = [serving.lesson(tmp_path, {"detail": 1})]
    return serving.make_study(tmp_path, prompts=3, training=lessons, repeats=0.5)


@pytest.fixture
def client(study) -> TestClient:
    return TestClient(make_app(study), HERE, follow_redirects=False)


@pytest.fixture
def pages(serving, study) -> dict[str, str]:
    """The path of everyone's page."""
    return {rater: f"/r/{token}/" for rater, token in serving.tokens(study).items()}


def state_of(client: TestClient, page: str) -> dict[str, Any]:
    return client.get(f"{page}state").json()


def answer_to(state: dict[str, Any], request: str = "request-0", value: int | None = 2, ms: int = 900) -> dict:
    question = state["question"]
    return {
        "request": request,
        "task": question["task"],
        "dimension": question["dimension"],
        "value": value,
        "ms": ms,
    }


def post(client: TestClient, page: str, body: Any, **headers: str):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(f"{page}answers", content=content, headers={**SAFE, **headers})


def rate_everything(client: TestClient, page: str) -> Iterator[dict[str, Any]]:
    """Answer all questions, and yield every state on the way, the last one too."""
    state = state_of(client, page)
    while state["question"]:
        yield state
        number = f"{page[3:11]}-{state['question']['task']}-{state['question']['dimension']}"
        reply = post(client, page, answer_to(state, re.sub("[^0-9A-Za-z-]", "-", number)))
        assert reply.status_code == 200, reply.text
        state = reply.json()["state"]
    yield state


def test_a_study_is_rated_from_the_training_to_the_end(client, pages, study, serving):
    states = list(rate_everything(client, pages["r01"]))
    assert states[0]["question"]["training"] and not states[1]["question"]["training"]
    assert states[-1]["done"] == states[-1]["total"] == 1 + 6 + 3
    assert len(states) == 1 + (6 + 3) * 5 + 1
    stored = serving.rows(
        study, "SELECT count(*), min(value), max(value) FROM answers JOIN tasks USING (task) WHERE rater = 'r01'"
    )
    assert stored == [(len(states) - 1, 2, 2)]
    assert state_of(client, pages["r02"])["done"] == 0


def test_no_served_byte_names_an_arm_or_a_file_or_who_else_rates(client, pages, study, serving):
    for page in (pages["r01"], pages["r02"]):
        for number, state in enumerate(rate_everything(client, page)):
            served = [json.dumps(state).encode()]
            if state["question"]:
                question = state["question"]
                assert set(question) == {
                    *("task", "training", "pictures", "prompt", "step", "steps"),
                    *("dimension", "title", "text", "look_for", "answers"),
                }
                for address in chain(question["pictures"], state["upcoming"]):
                    picture = client.get(page + address)
                    assert picture.status_code == 200 and picture.headers["content-type"] == "image/png"
                    served += [picture.content, str(picture.headers).encode(), address.encode()]
            for content in served:
                for word in (*serving.ARMS, serving.TELLTALE, "repeat", "known", "prompt_id", "r01", "r02"):
                    assert word.encode() not in content, (number, word)
    for path in ("", "state"):
        reply = client.get(pages["r01"] + path)
        assert reply.status_code == 200
        text = (reply.text + str(reply.headers)).lower()
        assert not [word for word in (*serving.ARMS, serving.TELLTALE, str(study.parent)) if word in text]


def test_a_repeat_looks_like_any_other_task(client, pages, study, serving):
    repeats = {task for (task,) in serving.rows(study, "SELECT task FROM tasks WHERE kind = 'repeat'")}
    shown = [state["question"] for state in rate_everything(client, pages["r01"]) if state["question"]]
    again = [question for question in shown if question["task"] in repeats]
    once = [question for question in shown if question["task"] not in repeats and not question["training"]]
    assert again and {frozenset(question) for question in again} == {frozenset(question) for question in once}
    assert {len(question["task"]) for question in again} == {len(question["task"]) for question in once}


def test_the_prompt_is_shown_for_every_question_but_the_aesthetic_one_which_comes_first(client, pages):
    shown = [state["question"] for state in rate_everything(client, pages["r02"]) if state["question"]]
    for question in shown:
        assert (question["prompt"] is None) == (question["dimension"] == "aesthetics")
        if question["step"] == 0 and not question["training"]:
            assert question["dimension"] == "aesthetics"


def test_the_right_answer_of_the_training_is_told_after_the_answer_and_not_before(client, pages):
    first = state_of(client, pages["r01"])
    assert "known" not in json.dumps(first)
    taught = post(client, pages["r01"], answer_to(first)).json()
    assert (taught["stored"], taught["value"], taught["known"]) == (True, 2, 1)
    assert taught["state"]["last"] is None
    asked = post(client, pages["r01"], answer_to(taught["state"], "request-1")).json()
    assert asked["known"] is None


def test_pages_forbid_all_that_they_do_not_need(client, pages):
    policies = {}
    for path in (pages["r01"], f"{pages['r01']}state", "/nothing", pages["r01"] + "pictures/x.png"):
        headers = client.get(path).headers
        policies[path] = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert policies[path]["default-src"] == policies[path]["frame-ancestors"] == "'none'"
        assert headers["referrer-policy"] == "no-referrer" and headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in headers and "server" not in headers and "last-modified" not in headers
    policy = policies[pages["r01"]]
    assert policy["connect-src"] == "'self'" and policy["form-action"] == policy["base-uri"] == "'none'"
    for source in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[0-9A-Za-z+/]{43}='", policy[source])  # what the page brings, nothing else


def test_nothing_is_loaded_from_elsewhere(client, pages):
    page = client.get(pages["r01"]).text
    assert "<style>" in page and "<script" in page
    assert not re.search(r"(https?:)?//\w+\.\w+|(src|href)=\"(?!data:,)|@import|url\(", page)


def test_a_replayed_request_is_acknowledged_and_written_once(client, pages, study, serving):
    body = answer_to(state_of(client, pages["r01"]))
    first, again = post(client, pages["r01"], body), post(client, pages["r01"], body)
    assert (first.status_code, again.status_code) == (200, 409)
    assert again.json()["stored"] is True and again.json()["value"] == 2
    assert again.json()["state"] == first.json()["state"]
    changed = post(client, pages["r01"], {**body, "value": 0})
    assert changed.status_code == 409 and changed.json()["stored"] is False
    assert (
        serving.rows(study, "SELECT value FROM changes") == serving.rows(study, "SELECT value FROM answers") == [(2,)]
    )


def test_an_answer_is_taken_back_by_its_rater_only(client, pages, study, serving):
    post(client, pages["r01"], answer_to(state_of(client, pages["r01"])))  # the training's
    before = state_of(client, pages["r01"])
    after = post(client, pages["r01"], answer_to(before, "request-1")).json()["state"]
    back = {"request": "request-2", "value": None, "ms": 0}
    last = {key: after["last"][key] for key in ("task", "dimension")}
    assert after["last"]["value"] == 2
    assert post(client, pages["r02"], {**back, **last}).status_code == 404
    reply = post(client, pages["r01"], {**back, **last})
    assert reply.status_code == 200 and reply.json()["state"] == before
    assert [value for (value,) in serving.rows(study, "SELECT value FROM changes ORDER BY id")] == [2, 2, None]


REFUSED = {  # what is changed in a good request: status
    "no origin": ({"Origin": ""}, None, 403),
    "another site": ({"Origin": "https://evil.example"}, None, 403),
    "another port": ({"Origin": "http://localhost:9999"}, None, 403),
    "no address": ({"Origin": "http://["}, None, 403),
    "a sandboxed page": ({"Origin": "null"}, None, 403),
    "no custom header": ({"X-Rate": ""}, None, 403),
    "a form": ({"Content-Type": "application/x-www-form-urlencoded"}, None, 415),
    "plain text": ({"Content-Type": "text/plain"}, None, 415),
    "another name for the host": ({"Host": "evil.example:8765", "Origin": "http://evil.example:8765"}, None, 400),
    "no JSON": ({}, b"{", 400),
    "no object": ({}, b"[]", 400),
    "no UTF-8": ({}, b'{"request": "\xff"}', 400),
    "a larger body": ({}, {"padding": "x" * LARGEST_BODY}, 413),
    "one more key": ({}, {"rater": "r02"}, 400),
    "a value too high": ({}, {"value": 4}, 400),
    "a negative value": ({}, {"value": -1}, 400),
    "a value that is text": ({}, {"value": "2"}, 400),
    "a value that is true": ({}, {"value": True}, 400),
    "an unknown dimension": ({}, {"dimension": "beauty"}, 400),
    "a question that is not the next": ({}, {"dimension": "overall"}, 409),
    "an unknown task": ({}, {"task": "0" * 16}, 404),
    "a negative time": ({}, {"ms": -1}, 400),
    "a request without a name": ({}, {"request": ""}, 400),
    "taking back what was not given": ({}, {"value": None}, 409),
}


@pytest.mark.parametrize(("headers", "change", "status"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_the_page_s_own_answer_is_refused_and_not_written(
    client, pages, study, serving, headers, change, status
):
    good = answer_to(state_of(client, pages["r01"]))
    body = change if isinstance(change, bytes) else {**good, **(change or {})}
    kept = {name: value for name, value in {**SAFE, **headers}.items() if value}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = client.post(f"{pages['r01']}answers", content=content, headers=kept)
    assert reply.status_code == status
    assert serving.rows(study, "SELECT * FROM changes") == serving.rows(study, "SELECT * FROM answers") == []
    assert post(client, pages["r01"], good).status_code == 200  # so it was the change that was refused


def test_a_body_without_a_declared_length_is_cut_off_too(client, pages, study, serving):
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    reply = client.post(f"{pages['r01']}answers", content=chunks(), headers=SAFE)
    assert reply.status_code == 413
    assert serving.rows(study, "SELECT * FROM changes") == []


def test_another_rater_s_task_cannot_be_answered(client, pages, study, serving):
    body = answer_to(state_of(client, pages["r01"]))
    assert post(client, pages["r02"], body).status_code == 404
    assert serving.rows(study, "SELECT * FROM changes") == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_answers_are_only_posted(client, pages, method):
    assert client.request(method, f"{pages['r01']}answers", headers=SAFE).status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/r/", "/r/x/", "/r//", "/r/x/state", "/study.json", "/answers.sqlite", "/private/key.json"),
        *("/private/links.csv", "/pictures/", "/rate.html", "/docs", "/openapi.json", "/favicon.ico"),
    ],
)
def test_nothing_else_is_served(client, path):
    reply = client.get(path)
    assert (reply.status_code, reply.text) == (404, "Not Found")


def test_an_unknown_link_is_told_nothing(client, pages, serving, study):
    token = serving.tokens(study)["r01"]
    for guess in (token[:-1], token + "a", token.swapcase(), f"{token}%00", "' OR 1=1 --"):
        for path in ("", "state", "pictures/0.png"):
            assert client.get(f"/r/{guess}/{path}").status_code == 404
        assert post(client, f"/r/{guess}/", answer_to(state_of(client, pages["r01"]))).status_code == 404


@pytest.mark.parametrize(
    "name",
    [
        "../study.json",
        "..%2fstudy.json",
        "..%2f..%2fprivate%2fkey.json",
        "%2e%2e%2fprivate%2fkey.json",
        "....//private/key.json",
        "..%5cprivate%5ckey",
        "%00",
        "*",
        "",
    ],
)
def test_pictures_are_found_by_their_ids_and_nothing_else_is(client, pages, name):
    for ending in ("", ".png"):
        reply = client.get(f"{pages['r01']}pictures/{name}{ending}")
        assert reply.status_code == 404
        assert b"zebra" not in reply.content


def test_pictures_are_for_those_who_rate_them(serving, tmp_path):
    study = serving.make_study(tmp_path, prompts=4, raters=2, k=1)
    client = TestClient(make_app(study), HERE)
    tokens = serving.tokens(study)
    of = {
        rater: {picture for (picture,) in serving.rows(study, "SELECT picture FROM tasks WHERE rater = ?", rater)}
        for rater in tokens
    }
    assert of["r01"] and of["r02"] and not of["r01"] & of["r02"]
    for rater, token in tokens.items():
        for picture in of["r01"] | of["r02"]:
            status = client.get(f"/r/{token}/pictures/{picture}.png").status_code
            assert status == (200 if picture in of[rater] else 404)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8765", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8765", 200),
        ("LOCALHOST", 200),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("", 400),
        ("[", 400),
    ],
)
def test_only_the_server_s_own_names_are_answered(study, pages, host, status):
    client = TestClient(make_app(study), HERE)
    assert client.get(pages["r01"], headers={"Host": host}).status_code == status


def test_the_address_that_a_connection_came_in_on_is_answered_for_servers_on_all_addresses(study, pages):
    client = TestClient(make_app(study), "http://192.0.2.7:8765")  # what the server says of itself
    assert client.get(pages["r01"]).status_code == 200
    assert client.get(pages["r01"], headers={"Host": "192.0.2.8:8765"}).status_code == 400


def test_a_proxy_s_address_is_admitted_once_it_is_named(study, pages):
    client = TestClient(make_app(study, url="https://rate.example.org/study"), HERE)
    headers = {**SAFE, "Host": "rate.example.org", "Origin": "https://rate.example.org"}
    body = answer_to(client.get(f"{pages['r01']}state", headers=headers).json())
    # some proxies keep the name, others put their own in its place
    assert post(client, pages["r01"], body, **headers).status_code == 200
    assert post(client, pages["r01"], body, Origin=headers["Origin"]).status_code == 409
    assert post(client, pages["r01"], body, Origin="https://other.example.org").status_code == 403
    with pytest.raises(UsageError, match=r"--url rate\.example\.org: give it as"):
        make_app(study, url="rate.example.org")


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://rate.example.org:443", "https://rate.example.org"),
        ("http://rate.example.org:80/study", "http://rate.example.org"),
        ("https://rate.example.org", "https://rate.example.org:443"),
        ("http://[2001:db8::1]:80", "http://[2001:db8::1]"),
    ],
)
def test_a_port_that_browsers_leave_out_may_be_named(study, pages, url, origin):
    client = TestClient(make_app(study, url=url), HERE)
    body = answer_to(state_of(client, pages["r01"]))
    assert post(client, pages["r01"], body, Origin="https://rate.example.org:80").status_code == 403
    assert post(client, pages["r01"], body, Origin=origin).status_code == 200


def test_experts_are_asked_what_is_disputed_and_see_no_grade(client, pages, study, serving):
    for rater, value in (("r01", 0), ("r02", 3)):
        state = state_of(client, pages[rater])
        number = 0
        while state["question"]:
            number += 1
            given = value if state["question"]["dimension"] == "detail" else 1
            state = post(client, pages[rater], answer_to(state, f"{rater}-request-{number}", given)).json()["state"]
    assert state_of(client, pages["e01"])["total"] == 0
    assert resolve(study) == 6
    states = list(rate_everything(client, pages["e01"]))
    assert [state["question"]["dimension"] for state in states[:-1]] == ["detail"] * 6
    assert all(state["question"]["steps"] == 1 for state in states[:-1])


def test_where_nothing_can_be_stored_the_page_is_told_to_ask_again(client, pages, study, capsys):
    body = answer_to(state_of(client, pages["r01"]))
    with closing(sqlite3.connect(study / "answers.sqlite")) as database:
        database.execute("ALTER TABLE changes RENAME TO away")
    assert post(client, pages["r01"], body).status_code == 503
    assert "an answer could not be stored" in capsys.readouterr().err
    with closing(sqlite3.connect(study / "answers.sqlite")) as database:
        database.execute("ALTER TABLE away RENAME TO changes")
    assert post(client, pages["r01"], body).status_code == 200


@pytest.mark.slow
def test_ten_raters_at_once_are_answered_within_a_tenth_of_a_second(serving, tmp_path):
    study = serving.make_study(tmp_path, prompts=80, raters=10, k=5)
    each = 200
    with serving.Served(study) as server:
        slow: list[float] = []
        given: dict[str, list[tuple[str, str, int]]] = {}

        def rate(rater: str) -> None:
            path = server.links[rater].split(str(server.port))[1]
            headers = {**SAFE, "Origin": f"http://127.0.0.1:{server.port}"}
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            connection.request("GET", f"{path}state")
            state, times, mine = json.load(connection.getresponse()), [], []
            for number in range(each):
                body = answer_to(state, f"{rater}-request-{number}", number % 4)
                started = time.perf_counter()
                connection.request("POST", f"{path}answers", json.dumps(body), headers)
                response = connection.getresponse()
                reply = json.load(response)
                times.append(time.perf_counter() - started)
                assert response.status == 200
                mine.append((body["task"], body["dimension"], number % 4))
                state = reply["state"]
            slow.extend(times)
            given[rater] = mine

        threads = [threading.Thread(target=rate, args=(f"r{number:02d}",)) for number in range(1, 11)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(given) == 10
    assert sorted(slow)[int(0.95 * len(slow))] < 0.1
    stored = serving.rows(study, "SELECT task, dimension, value FROM answers")
    assert sorted(stored) == sorted(chain.from_iterable(given.values())) and len(stored) == 10 * each
    assert serving.rows(study, "SELECT count(*), count(DISTINCT request) FROM changes") == [(10 * each, 10 * each)]
