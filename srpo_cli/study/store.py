"""A study's tasks and answers in SQLite: an answer is on the disk before anybody hears that it was taken."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import ValidationError

from srpo_cli.errors import UsageError, one_line
from srpo_cli.study.rubric import Facts

FACTS, ANSWERS, KEY, LINKS, PICTURES = (
    "study.json",
    "answers.sqlite",
    "private/key.json",
    "private/links.csv",
    "pictures",
)
DISPUTED = 2
"""Grades that are so far apart, or further, go to the experts."""

_SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE raters (
    rater TEXT PRIMARY KEY, role TEXT NOT NULL CHECK (role IN ('rater', 'expert')), token_sha256 TEXT NOT NULL UNIQUE
);
CREATE TABLE tasks (
    task TEXT PRIMARY KEY, rater TEXT NOT NULL REFERENCES raters, position INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('training', 'item', 'repeat', 'resolution')),
    picture TEXT NOT NULL, other TEXT, prompt_id TEXT, prompt TEXT NOT NULL, group_name TEXT, known TEXT,
    dimensions TEXT, -- a JSON list where not all of the study's are asked
    UNIQUE (rater, position)
);
CREATE TABLE answers (
    task TEXT NOT NULL REFERENCES tasks, dimension TEXT NOT NULL, value INTEGER NOT NULL, ms INTEGER NOT NULL,
    answered_at TEXT NOT NULL, PRIMARY KEY (task, dimension)
);
CREATE TABLE changes (
    id INTEGER PRIMARY KEY, request TEXT NOT NULL UNIQUE, task TEXT NOT NULL REFERENCES tasks,
    dimension TEXT NOT NULL, value INTEGER, ms INTEGER NOT NULL, at TEXT NOT NULL -- without a value: taken back
);
"""
_STANDING = """
WITH mine AS (
    SELECT position, coalesce(json_array_length(dimensions), :all) AS asked,
        (SELECT count(*) FROM answers WHERE answers.task = tasks.task) AS given
    FROM tasks WHERE rater = :rater
)
SELECT count(*), coalesce(sum(given >= asked), 0), min(CASE WHEN given < asked THEN position END) FROM mine
"""
_SPREAD = """
SELECT picture, prompt_id, prompt, group_name, dimension
FROM answers JOIN tasks USING (task) WHERE kind = 'item'
GROUP BY picture, dimension HAVING max(value) - min(value) >= ?
ORDER BY prompt_id, picture, dimension
"""


@dataclass(frozen=True)
class Task:
    """What a rater is shown.

    Attributes:
        position: in the rater's order.
        picture, other: ids of the picture, or of the left and the right one.
        known: by dimension, the right values of a training task.
        dimensions: names of what is asked, None: all of the study's.
    """

    task: str
    rater: str
    position: int
    kind: Literal["training", "item", "repeat", "resolution"]
    picture: str
    other: str | None
    prompt_id: str | None
    prompt: str
    group_name: str = ""
    known: Mapping[str, int] = field(default_factory=dict)
    dimensions: Sequence[str] | None = None


@dataclass(frozen=True)
class Change:
    """What a rater sends: a value for a question, or None to take the last answer back.

    Attributes:
        request: made by the page, another one for each answer, the same where it is sent again.
        ms: from showing to answering, in milliseconds.
    """

    request: str
    task: str
    dimension: str
    value: int | None
    ms: int


@dataclass(frozen=True)
class Standing:
    """How far a rater is.

    Attributes:
        done, total: tasks.
        task: the one to go on with, None: all are done.
        step, steps: of its questions, how many are answered and how many there are.
        dimension: name of the question.
        last: task, dimension and value of the answer that can be taken back.
        upcoming: the task after this one.
    """

    done: int
    total: int
    task: Task | None = None
    step: int = 0
    steps: int = 0
    dimension: str | None = None
    last: tuple[str, str, int] | None = None
    upcoming: Task | None = None


@dataclass(frozen=True)
class Progress:
    """A rater's part of ``srpo eval rate status``.

    Attributes:
        done, total: tasks.
        median_seconds: of an answer, None before the first.
        repeats: answers to tasks that came once more.
    """

    rater: str
    role: str
    done: int
    total: int
    median_seconds: float | None
    repeats: int


@dataclass(frozen=True)
class Dispute:
    """A picture about which raters disagree, and on which dimensions."""

    picture: str
    prompt_id: str
    prompt: str
    group_name: str
    dimensions: tuple[str, ...]


@dataclass(frozen=True)
class Waiting:
    """Pictures on which raters differ: given to no expert yet, and given but not answered."""

    unresolved: int
    with_experts: int


class UnknownTaskError(LookupError):
    """There is no such task, or it is another rater's."""


class RefusedError(ValueError):
    """A change that does not fit to what is stored: the answer is told where to go on."""


def digest(token: str) -> str:
    """What is stored of a rater's token."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_facts(study: Path) -> Facts:
    """What ``study.json`` says; UsageError for a folder that is no study."""
    missing = next((name for name in (FACTS, ANSWERS, KEY) if not (study / name).is_file()), None)
    if missing:
        raise UsageError(f"{study} is no study, it has no {missing}: make one with `srpo eval rate new`")
    try:
        return Facts.model_validate_json((study / FACTS).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, ValidationError) as error:
        raise UsageError(f"{study / FACTS} is not of a study: make one with `srpo eval rate new`") from error


def create(path: Path, raters: Iterable[tuple[str, str, str]], tasks: Iterable[Task]) -> None:
    """Make the database, for its owner only; ``raters`` are names, roles and tokens."""
    path.touch(mode=0o600, exist_ok=False)  # SQLite gives the log beside it the same mode
    with closing(sqlite3.connect(path)) as database:
        database.executescript(_SCHEMA)
        with database:
            rows = [(rater, role, digest(token)) for rater, role, token in raters]
            database.executemany("INSERT INTO raters VALUES (?, ?, ?)", rows)
            _insert(database, tasks)


class Store:
    """The database of a study, for any number of threads and processes at once.

    Args:
        study: its folder; UsageError for one that is no study, or whose database is damaged.
    """

    def __init__(self, study: Path) -> None:
        self.study, self.facts = study, read_facts(study)
        self._names = [dimension.name for dimension in self.facts.asked]
        self._local = threading.local()
        self._writing = threading.Lock()  # threads queue; SQLite would let them sleep and try again
        self._check()

    def rater(self, token: str) -> str | None:
        """Whose token it is."""
        row = self.read("SELECT rater FROM raters WHERE token_sha256 = ?", digest(token))
        return row[0]["rater"] if row else None

    def shows(self, rater: str, picture: str) -> bool:
        """Whether a picture is in one of the rater's tasks."""
        query = "SELECT 1 FROM tasks WHERE rater = ? AND (picture = ? OR other = ?) LIMIT 1"
        return bool(self.read(query, rater, picture, picture))

    def standing(self, rater: str) -> Standing:
        """Where the rater goes on."""
        facts = {"rater": rater, "all": len(self._names)}
        total, done, position = self._database().execute(_STANDING, facts).fetchone()
        if position is None:
            return Standing(done, total, last=self._last_of(self._before(rater, None)))
        task, *following = self._tasks(
            "SELECT * FROM tasks WHERE rater = ? AND position >= ? ORDER BY position LIMIT 2", rater, position
        )
        asked = self._asked(task)
        given = {row["dimension"] for row in self.read("SELECT dimension FROM answers WHERE task = ?", task.task)}
        step = next(i for i, name in enumerate(asked) if name not in given)
        last = self._last_of(task if step else self._before(rater, position))
        return Standing(done, total, task, step, len(asked), asked[step], last, next(iter(following), None))

    def record(self, rater: str, change: Change) -> bool:
        """Store an answer, or take the last one back; on the disk when this returns.

        Returns False where the same request was stored before: then nothing is written. Raises UnknownTaskError for
        what is not the rater's, and RefusedError for a request that was stored with another content, an answer to
        anything but the question to go on with, and taking back anything but the last answer.
        """
        with self.transaction() as database:
            if not self.read("SELECT 1 FROM tasks WHERE task = ? AND rater = ?", change.task, rater):
                raise UnknownTaskError(change.task)
            same = self.read(
                "SELECT request, task, dimension, value, ms FROM changes WHERE request = ?", change.request
            )
            if same:
                if Change(*same[0]) != change:
                    raise RefusedError("this request was stored with another content")
                return False
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            standing = self.standing(rater)
            if change.value is None:
                if standing.last is None or standing.last[:2] != (change.task, change.dimension):
                    raise RefusedError("only the last answer can be taken back")
                database.execute(
                    "DELETE FROM answers WHERE task = ? AND dimension = ?", (change.task, change.dimension)
                )
            else:
                if not standing.task or (standing.task.task, standing.dimension) != (change.task, change.dimension):
                    raise RefusedError("this is not the question to go on with")
                answer = (change.task, change.dimension, change.value, change.ms, now)
                database.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", answer)
            database.execute(
                "INSERT INTO changes (request, task, dimension, value, ms, at) VALUES (?, ?, ?, ?, ?, ?)",
                (change.request, change.task, change.dimension, change.value, change.ms, now),
            )
        return True

    def known(self, task: str, dimension: str) -> int | None:
        """The right value of a training task."""
        rows = self._tasks("SELECT * FROM tasks WHERE task = ?", task)
        return rows[0].known.get(dimension) if rows else None

    def progress(self) -> list[Progress]:
        """How far everyone is, raters before experts."""
        times: dict[str, list[int]] = {}
        repeats: Counter[str] = Counter()
        for row in self.read("SELECT rater, ms, kind FROM answers JOIN tasks USING (task)"):
            times.setdefault(row["rater"], []).append(row["ms"])
            repeats[row["rater"]] += row["kind"] == "repeat"
        found = []
        for row in self.read("SELECT rater, role FROM raters ORDER BY role DESC, rater"):
            rater, standing = row["rater"], self.standing(row["rater"])
            seconds = median(times[rater]) / 1000 if rater in times else None
            found.append(Progress(rater, row["role"], standing.done, standing.total, seconds, repeats[rater]))
        return found

    def disputes(self) -> list[Dispute]:
        """What raters differ on by :data:`DISPUTED` or more and no expert has been given, a row for each picture."""
        if self.facts.mode != "grades" or not self.facts.experts:
            return []
        given = self._given()
        found: dict[str, Dispute] = {}
        for row in self.read(_SPREAD, DISPUTED):
            picture, *rest, dimension = row
            if (picture, dimension) not in given:
                before = found[picture].dimensions if picture in found else ()
                found[picture] = Dispute(picture, *rest, (*before, dimension))
        return list(found.values())

    def waiting(self) -> Waiting:
        """How many disputed pictures wait, and for what."""
        unanswered = {picture for (picture, _), answered in self._given().items() if not answered}
        return Waiting(len(self.disputes()), len(unanswered))

    def loads(self, role: str) -> dict[str, int]:
        """Tasks by rater."""
        rows = self.read(
            "SELECT raters.rater AS rater, count(task) AS tasks FROM raters LEFT JOIN tasks USING (rater) "
            "WHERE role = ? GROUP BY raters.rater ORDER BY raters.rater",
            role,
        )
        return {row["rater"]: row["tasks"] for row in rows}

    def add(self, task: Task) -> None:
        """Add a task behind those that its rater has."""
        _insert(self._database(), [task])

    def _given(self) -> dict[tuple[str, str], bool]:
        """By picture and dimension what experts were given, and whether they have answered."""
        answered = {(row["task"], row["dimension"]) for row in self.read("SELECT task, dimension FROM answers")}
        return {
            (task.picture, name): (task.task, name) in answered
            for task in self._tasks("SELECT * FROM tasks WHERE kind = 'resolution'")
            for name in self._asked(task)
        }

    def _before(self, rater: str, position: int | None) -> Task | None:
        """The task before a position, or the last one."""
        tasks = self._tasks(
            "SELECT * FROM tasks WHERE rater = ? AND (? IS NULL OR position < ?) ORDER BY position DESC LIMIT 1",
            rater,
            position,
            position,
        )
        return tasks[0] if tasks else None

    def _last_of(self, task: Task | None) -> tuple[str, str, int] | None:
        """The last answer of a task; none of a training task, whose right answer has been told."""
        if task is None or task.kind == "training":
            return None
        rows = self.read("SELECT dimension, value FROM answers WHERE task = ?", task.task)
        given = {row["dimension"]: row["value"] for row in rows}
        return next(((task.task, name, given[name]) for name in reversed(self._asked(task)) if name in given), None)

    def _asked(self, task: Task) -> list[str]:
        return [name for name in self._names if task.dimensions is None or name in task.dimensions]

    def _tasks(self, query: str, *values: Any) -> list[Task]:
        return [_task(row) for row in self.read(query, *values)]

    def read(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """The rows of an SQL query."""
        return self._database().execute(query, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Nobody else writes until this is left; if an error leaves it, nothing was written."""
        with self._writing, self._database() as database:
            database.execute("BEGIN IMMEDIATE")
            yield database

    def _check(self) -> None:
        try:
            found = self.read("PRAGMA quick_check(1)")[0][0]
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            for table in ("raters", "tasks", "answers", "changes"):
                self.read(f"SELECT 1 FROM {table} LIMIT 1")
        except sqlite3.DatabaseError as error:
            raise UsageError(
                f"{self.study / ANSWERS} is no database of answers ({one_line(error)}): restore it from a backup, or "
                "make a study with `srpo eval rate new`"
            ) from error

    def _database(self) -> sqlite3.Connection:
        """This thread's connection."""
        if not hasattr(self._local, "database"):
            database = sqlite3.connect(self.study / ANSWERS, isolation_level=None, timeout=10)
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA synchronous = FULL")  # WAL's default may lose the last answers with the power
            self._local.database = database
        return self._local.database


def _insert(database: sqlite3.Connection, tasks: Iterable[Task]) -> None:
    rows = [
        (
            *(task.task, task.rater, task.position, task.kind, task.picture, task.other),
            *(task.prompt_id, task.prompt, task.group_name),
            json.dumps(dict(task.known)) if task.known else None,
            json.dumps(list(task.dimensions)) if task.dimensions is not None else None,
        )
        for task in tasks
    ]
    database.executemany("INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)


def _task(row: sqlite3.Row) -> Task:
    values = dict(row)
    known, dimensions = values.pop("known"), values.pop("dimensions")
    return Task(
        **values, known=json.loads(known) if known else {}, dimensions=json.loads(dimensions) if dimensions else None
    )
