"""The rating page and its small interface, for one study, on one address."""

from __future__ import annotations

import hashlib
import re
import socket
import sqlite3
import sys
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterable, Mapping
from csv import DictReader
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.study.rubric import answer_names
from srpo_cli.study.store import LINKS, PICTURES, Change, RefusedError, Standing, Store, Task, UnknownTaskError

LARGEST_BODY = 4096
"""Bytes of a request."""

HEADER = "x-rate"
"""What the page sends with every answer: another site's form cannot."""

_HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "x-robots-tag": "noindex",
}
_FRESH = {"cache-control": "no-store"}
_KEPT = {"cache-control": "private, max-age=86400, immutable"}  # what an id shows never changes
_LONGEST_MS = 24 * 60 * 60 * 1000


class Answer(BaseModel):
    """The body of a request that answers a question, or takes the last answer back."""

    model_config = ConfigDict(extra="forbid", strict=True)

    request: str = Field(pattern=r"^[0-9A-Za-z-]{8,64}$")
    task: str = Field(max_length=64)
    dimension: str = Field(max_length=64)
    value: int | None = Field(ge=0, le=3)
    ms: int = Field(ge=0, le=_LONGEST_MS)


class Guard:
    """Refuses hosts that the server is not, so that no other site's name can lead here, and sets the safe headers.

    Args:
        app: what is guarded.
        hosts: names under which it is reached, besides the address that a connection came in on.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        host = _host_of(f"//{Headers(scope=scope).get('host', '')}")
        here = (scope.get("server") or ("",))[0]
        if host and (host in self.hosts or host == here):
            return await self.app(scope, receive, send_safely)
        await PlainTextResponse("this is not the address of the study", 400)(scope, receive, send_safely)


class Rating:
    """The requests that a rater's page makes.

    Args:
        store: the study's database.
        origin: host and port under which raters reach the page if that is not what they ask for, as behind a proxy.
    """

    def __init__(self, store: Store, origin: str | None = None) -> None:
        self.store, self.origin = store, origin
        self.dimensions = {dimension.name: dimension for dimension in store.facts.dimensions}
        self.whole_page = _whole_page()

    def routes(self) -> list[Route]:
        return [
            Route("/r/{token}/", self.page),
            Route("/r/{token}/state", self.state),
            Route("/r/{token}/answers", self.answer, methods=["POST"]),
            Route("/r/{token}/pictures/{picture}.png", self.picture),
        ]

    def page(self, request: Request) -> Response:
        self._rater(request)
        return self.whole_page

    def state(self, request: Request) -> Response:
        return JSONResponse(self._state(self._rater(request)), headers=_FRESH)

    def picture(self, request: Request) -> Response:
        rater, picture = self._rater(request), request.path_params["picture"]
        if not self.store.shows(rater, picture):
            raise HTTPException(404)
        file = self.store.study / PICTURES / f"{picture}.png"
        return Response(file.read_bytes(), media_type="image/png", headers=_KEPT)

    async def answer(self, request: Request) -> Response:
        self._check_origin(request)
        try:
            sent = Answer.model_validate_json(await _body(request))
        except ValidationError as error:
            raise HTTPException(400, "not an answer") from error
        return await run_in_threadpool(self._record, request, Change(**sent.model_dump()))

    def _record(self, request: Request, change: Change) -> Response:
        rater = self._rater(request)
        values = range(len(answer_names(self.store.facts.mode)))
        if change.dimension not in self.dimensions or (change.value is not None and change.value not in values):
            raise HTTPException(400, "not an answer")
        try:
            new = self.store.record(rater, change)
        except UnknownTaskError as error:
            raise HTTPException(404) from error
        except RefusedError as error:
            refusal = {"stored": False, "error": str(error), "state": self._state(rater)}
            return JSONResponse(refusal, 409, _FRESH)
        known = None if change.value is None else self.store.known(change.task, change.dimension)
        taken = {"stored": True, "value": change.value, "known": known, "state": self._state(rater)}
        return JSONResponse(taken if new else {**taken, "error": "sent before"}, 200 if new else 409, _FRESH)

    def _rater(self, request: Request) -> str:
        rater = self.store.rater(request.path_params["token"])
        if rater is None:
            raise HTTPException(404)
        return rater

    def _check_origin(self, request: Request) -> None:
        """Refuse what another site made a browser send, even if it knew the link; there are no cookies."""
        origin = request.headers.get("origin", "")
        place, asked = _place_of(origin), _place_of(f"{origin.partition(':')[0]}://{request.headers['host']}")
        if not place or place not in (asked, self.origin) or request.headers.get(HEADER) != "1":
            raise HTTPException(403, "not from the study's own page")
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "answers are JSON")

    def _state(self, rater: str) -> dict[str, Any]:
        """All that a page shows: where the rater is, the question, and what comes after it."""
        standing = self.store.standing(rater)
        last = dict(zip(("task", "dimension", "value"), standing.last, strict=True)) if standing.last else None
        return {
            "mode": self.store.facts.mode,
            "done": standing.done,
            "total": standing.total,
            "last": last,
            "question": self._question(standing),
            "upcoming": _files(standing.upcoming) if standing.upcoming else [],
        }

    def _question(self, standing: Standing) -> dict[str, Any] | None:
        if standing.task is None or standing.dimension is None:
            return None
        task, dimension = standing.task, self.dimensions[standing.dimension]
        names = answer_names(self.store.facts.mode)
        return {
            "task": task.task,
            "training": task.kind == "training",
            "pictures": _files(task),
            "prompt": None if dimension.prompt == "hidden" else task.prompt,
            "step": standing.step,
            "steps": standing.steps,
            "dimension": dimension.name,
            "title": dimension.title,
            "text": dimension.question,
            "look_for": list(dimension.look_for),
            "answers": [{"value": i, "name": name, "text": dimension.grades[name]} for i, name in enumerate(names)],
        }


def make_app(study: Path, hosts: Iterable[str] = (), url: str | None = None) -> ASGIApp:
    """The application that serves a study.

    Args:
        hosts: names of the machine, besides localhost, under which it may be called.
        url: where raters reach it if a proxy or a tunnel stands before it.
    """
    handlers: Mapping[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        HTTPException: _refusal,
        sqlite3.OperationalError: _not_now,
    }
    names = {"localhost", "127.0.0.1", "::1", *(host.lower() for host in hosts)}
    if url is not None:
        name = _host_of(url)
        if not name or urlsplit(url).scheme not in ("http", "https"):
            raise UsageError(f"--url {url}: give it as in --url https://rate.example.org")
        names.add(name)
    rating = Rating(Store(study), _place_of(url) if url else None)
    return Guard(Starlette(routes=rating.routes(), exception_handlers=handlers), frozenset(names))


def serve(study: Path, host: str, port: int, url: str | None, announce: Callable[[list[dict[str, str]]], None]) -> None:
    """Serve a study until the process is interrupted.

    Args:
        port: 0 takes any that is free.
        url: where raters reach the server if that is not where it listens: a proxy's or tunnel's.
        announce: is given everyone's name, role and link once the server listens.
    """
    app = make_app(study, [host, socket.gethostname()], url)
    links = read_links(study)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host} port {port} ({reason}): choose another --port or --host") from error
    base = (url or f"http://{_reachable(host)}:{listening.getsockname()[1]}").rstrip("/")
    announce([{"rater": link["rater"], "role": link["role"], "link": base + link["link"]} for link in links])
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_level="warning",
        access_log=False,  # it would hold the links
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run(sockets=[listening])


def read_links(study: Path) -> list[dict[str, str]]:
    """Everyone's name, role and secret path; SrpoError where they cannot be read."""
    try:
        with open(study / LINKS, newline="", encoding="utf-8") as file:
            return list(DictReader(file))
    except OSError as error:
        raise SrpoError(f"cannot read the links in {study / LINKS} ({error.strerror})") from error


def _whole_page() -> Response:
    """The page with its style and script inside, so that it is loaded whole or not at all, and allowed to run them."""
    folder = Path(__file__).with_name("page")
    text = {name: (folder / name).read_text(encoding="utf-8") for name in ("rate.html", "rate.css", "rate.js")}
    page = text["rate.html"].replace("/* rate.css */", text["rate.css"]).replace("/* rate.js */", text["rate.js"])
    policy = (
        f"default-src 'none'; style-src {_source(text['rate.css'])}; script-src {_source(text['rate.js'])}; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Response(page, media_type="text/html", headers={**_FRESH, "content-security-policy": policy})


def _source(text: str) -> str:
    """What a policy calls an inline style or script."""
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _reachable(host: str) -> str:
    """What a browser is told to open where a server listens on ``host``."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _files(task: Task) -> list[str]:
    """Addresses of a task's pictures, relative to the page."""
    return [f"pictures/{picture}.png" for picture in (task.picture, task.other) if picture]


def _host_of(address: str) -> str | None:
    """The name of the host in an address, without its port, in small letters."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _place_of(address: str) -> str:
    """Host and port of an address as browsers write them, without the scheme's own port; "" where it has none."""
    try:
        parts = urlsplit(address.lower())
    except ValueError:
        return ""
    return parts.netloc.removesuffix({"http": ":80", "https": ":443"}.get(parts.scheme, ""))


async def _body(request: Request) -> bytes:
    """The body, at most :data:`LARGEST_BODY` bytes of it."""
    declared = request.headers.get("content-length", "0")
    if re.fullmatch(r"[0-9]+", declared) and int(declared) > LARGEST_BODY:
        raise HTTPException(413, "too large for an answer")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise HTTPException(413, "too large for an answer")
    return bytes(body)


async def _refusal(request: Request, error: Exception) -> Response:
    """One line, the same for all that is not found."""
    assert isinstance(error, HTTPException)
    return PlainTextResponse(error.detail, error.status_code, headers={**_FRESH, **(error.headers or {})})


async def _not_now(request: Request, error: Exception) -> Response:
    """The disk is full or the database is locked: the page will ask again."""
    print(f"an answer could not be stored: {error}", file=sys.stderr)
    return PlainTextResponse("the answer could not be stored", 503, headers=_FRESH)
