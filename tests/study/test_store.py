"""An answer is stored once, in order, for its own rater, and can be taken back."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from srpo_cli.errors import UsageError
from srpo_cli.study.store import Change, RefusedError, Store, UnknownTaskError, read_facts


@pytest.fixture
def study(serving, tmp_path) -> Path:
    return serving.make_study(tmp_path, prompts=3, repeats=0)


@pytest.fixture
def store(study) -> Store:
    return Store(study)


def next_change(store: Store, rater: str, value: int = 2, request: str | None = None) -> Change:
    standing = store.standing(rater)
    return Change(
        request or f"{standing.task.task}.{standing.dimension}", standing.task.task, standing.dimension, value, 700
    )


def test_answers_lead_through_all_questions_of_all_tasks(store, study, serving):
    asked = []
    while (standing := store.standing("r01")).task:
        asked.append((standing.task.task, standing.dimension))
        assert (standing.done, standing.total) == (divmod(len(asked) - 1, 5)[0], 6)
        assert (standing.step, standing.steps) == (divmod(len(asked) - 1, 5)[1], 5)
        assert store.record("r01", next_change(store, "r01"))
    assert len(asked) == len(set(asked)) == 6 * 5
    assert store.standing("r01").done == 6
    assert store.standing("r02").done == 0
    stored = serving.rows(study, "SELECT task, dimension, value, ms FROM answers")
    assert sorted(stored) == sorted((task, dimension, 2, 700) for task, dimension in asked)


def test_the_same_request_is_stored_once(store, study, serving):
    change = next_change(store, "r01")
    assert store.record("r01", change) is True
    assert store.record("r01", change) is False
    assert len(serving.rows(study, "SELECT * FROM answers")) == len(serving.rows(study, "SELECT * FROM changes")) == 1


@pytest.mark.parametrize("other", [{"value": 3}, {"ms": 1}])
def test_the_same_request_with_another_content_is_refused(store, study, serving, other):
    change = next_change(store, "r01")
    store.record("r01", change)
    with pytest.raises(RefusedError):
        store.record("r01", Change(**{**vars(change), **other}))
    assert serving.rows(study, "SELECT value, ms FROM answers") == [(2, 700)]


def test_only_the_question_to_go_on_with_is_answered(store, study, serving):
    first = next_change(store, "r01")
    store.record("r01", first)
    with pytest.raises(RefusedError):
        store.record("r01", Change("again", first.task, first.dimension, 0, 1))
    upcoming = store.standing("r01").upcoming
    with pytest.raises(RefusedError):
        store.record("r01", Change("ahead", upcoming.task, first.dimension, 0, 1))
    assert serving.rows(study, "SELECT request FROM changes") == [(first.request,)]


def test_another_rater_s_task_does_not_exist(store, study, serving):
    with pytest.raises(UnknownTaskError):
        store.record("r02", next_change(store, "r01"))
    with pytest.raises(UnknownTaskError):
        store.record("r01", Change("none", "no-such-task", "detail", 1, 1))
    assert serving.rows(study, "SELECT * FROM changes") == []


def test_taking_back_goes_back_over_a_task_s_edge_and_leaves_a_trace(store, study, serving):
    changes = []
    for _ in range(6):
        changes.append(next_change(store, "r01"))
        store.record("r01", changes[-1])
    for number, change in enumerate(reversed(changes)):
        assert store.standing("r01").last == (change.task, change.dimension, 2)
        assert store.record("r01", Change(f"back-{number}", change.task, change.dimension, None, 0))
        standing = store.standing("r01")
        assert (standing.task.task, standing.dimension) == (change.task, change.dimension)
    assert store.standing("r01").last is None
    assert serving.rows(study, "SELECT * FROM answers") == []
    assert [value for (value,) in serving.rows(study, "SELECT value FROM changes ORDER BY id")] == [2] * 6 + [None] * 6


def test_only_the_last_answer_is_taken_back_and_a_replay_does_not_take_another(store, study, serving):
    first = next_change(store, "r01")
    store.record("r01", first)
    second = next_change(store, "r01")
    store.record("r01", second)
    with pytest.raises(RefusedError):
        store.record("r01", Change("back-1", first.task, first.dimension, None, 0))
    back = Change("back-2", second.task, second.dimension, None, 0)
    assert store.record("r01", back) is True
    assert store.record("r01", back) is False
    assert store.record("r01", second) is False  # a late copy of what was taken back does not bring it back
    assert serving.rows(study, "SELECT dimension FROM answers") == [(first.dimension,)]


def test_many_connections_at_once_store_an_answer_once(study, serving):
    change = next_change(Store(study), "r01")

    def record(_: int) -> bool:
        return Store(study).record("r01", change)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(record, range(24))) == 1
    assert len(serving.rows(study, "SELECT * FROM answers")) == 1


def test_writes_are_synchronous_and_logged_ahead(store):
    database = store._database()
    assert database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert database.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_progress_tells_of_everyone(store):
    for _ in range(7):
        store.record("r02", next_change(store, "r02"))
    everyone = {each.rater: each for each in store.progress()}
    assert list(everyone) == ["r01", "r02", "e01"]
    assert (everyone["r02"].done, everyone["r02"].total, everyone["r02"].median_seconds) == (1, 6, 0.7)
    assert (everyone["r01"].done, everyone["r01"].median_seconds) == (0, None)
    assert (everyone["e01"].role, everyone["e01"].total) == ("expert", 0)


def test_repeats_are_counted_once_they_are_answered(serving, tmp_path):
    store = Store(serving.make_study(tmp_path, prompts=6, repeats=0.5))
    assert [each.repeats for each in store.progress()] == [0, 0, 0]
    while store.standing("r01").task:
        store.record("r01", next_change(store, "r01"))
    assert [each.repeats for each in store.progress()] == [6 * 5, 0, 0]  # answers, as the analysis counts them


def test_training_is_not_taken_back(serving, tmp_path):
    lesson = serving.lesson(tmp_path, {"detail": 1})
    store = Store(serving.make_study(tmp_path, training=[lesson]))
    change = next_change(store, "r01")
    assert change.dimension == "detail"
    store.record("r01", change)
    assert store.standing("r01").last is None
    with pytest.raises(RefusedError):
        store.record("r01", Change("back", change.task, change.dimension, None, 0))


@pytest.mark.parametrize("missing", ["study.json", "answers.sqlite", "private/key.json"])
def test_a_folder_that_is_no_study_is_refused(study, missing):
    (study / missing).unlink()
    with pytest.raises(UsageError, match=f"is no study, it has no {missing}"):
        read_facts(study)


def test_a_study_of_nothing_sensible_is_refused(study):
    (study / "study.json").write_text('{"format": 7}')
    with pytest.raises(UsageError, match="is not of a study"):
        Store(study)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda database: database.write_text("xx"), "file is not a database"),
        (lambda database: database.write_bytes(b""), "no such table: raters"),
        (lambda database: database.write_bytes(database.read_bytes()[:-8192]), "malformed"),
        (lambda database: database.write_bytes(database.read_bytes()[:8192].ljust(40960, b"x")), "database"),
    ],
)
def test_a_damaged_database_is_refused(study, damage, reason):
    damage(study / "answers.sqlite")
    with pytest.raises(UsageError, match=f"answers.sqlite is no database of answers .*{reason}.*: restore it"):
        Store(study)


def test_an_answer_and_its_trace_are_stored_together_or_not_at_all(store, study, serving):
    with sqlite3.connect(study / "answers.sqlite") as database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON changes BEGIN SELECT RAISE(ABORT, 'full'); END")
    with pytest.raises(sqlite3.Error, match="full"):
        store.record("r01", next_change(store, "r01"))
    assert serving.rows(study, "SELECT * FROM answers") == []


def test_the_database_refuses_a_second_answer_by_itself(study):
    with sqlite3.connect(study / "answers.sqlite") as database:
        task = database.execute("SELECT task FROM tasks").fetchone()[0]
        database.execute("INSERT INTO answers VALUES (?, 'detail', 1, 1, 'now')", (task,))
        with pytest.raises(sqlite3.IntegrityError):
            database.execute("INSERT INTO answers VALUES (?, 'detail', 2, 1, 'now')", (task,))
