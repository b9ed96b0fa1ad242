"""Studies on disk that are made without the tool, answer by answer."""

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

SCHEMA = """
CREATE TABLE raters(rater TEXT PRIMARY KEY, role TEXT CHECK(role IN ('rater','expert')), token_sha256 TEXT UNIQUE);
CREATE TABLE tasks(task TEXT PRIMARY KEY, rater TEXT, position INTEGER,
    kind TEXT CHECK(kind IN ('training','item','repeat','resolution')), picture TEXT, other TEXT, prompt_id TEXT,
    prompt TEXT, group_name TEXT, known TEXT);
CREATE TABLE answers(task TEXT, dimension TEXT, value INTEGER, ms INTEGER, answered_at TEXT,
    PRIMARY KEY(task, dimension));
"""
FACTS = {
    "grades": [
        {"name": "alignment", "title": "Text-image alignment"},
        {"name": "realism", "title": "Realism and artifacts"},
        {"name": "detail", "title": "Detail"},
        {"name": "aesthetics", "title": "Aesthetics"},
        {"name": "overall", "title": "Overall"},
    ],
    "pairs": [{"name": "overall", "title": "Preference"}],
}


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """Write a study: ``arms`` in their order, and ``tasks``, each a mapping with rater, kind ("item" if not given),
    prompt, arm, for pairs arm on the left and other on the right, ``answers`` value by dimension, and known."""

    def write(arms: Sequence[str], tasks: Sequence[Mapping[str, Any]], mode: str = "grades") -> Path:
        folder = tmp_path / "study"
        (folder / "private").mkdir(parents=True)
        (folder / "study.json").write_text(json.dumps({"name": "mine", "mode": mode, "dimensions": FACTS[mode]}))
        prompts = list(dict.fromkeys(task["prompt"] for task in tasks if task.get("kind") != "training"))
        ids = {(arm, prompt): f"{arm}-{prompt}".encode().hex() for prompt in prompts for arm in arms}
        key = {ids[pair]: {"arm": pair[0], "prompt_id": pair[1], "kind": "item"} for pair in ids}
        (folder / "private" / "key.json").write_text(json.dumps(key))
        database = sqlite3.connect(folder / "answers.sqlite")
        database.executescript(SCHEMA)
        raters = {task["rater"] for task in tasks}
        roles = [(rater, "expert" if rater.startswith("e") else "rater", rater) for rater in sorted(raters)]
        database.executemany("INSERT INTO raters VALUES (?, ?, ?)", roles)
        for number, task in enumerate(tasks):
            shown = [
                ids.get((task.get(side), task["prompt"]), "known" if side == "arm" else None)
                for side in ("arm", "other")
            ]
            known = json.dumps(task["known"]) if "known" in task else None
            row = (
                str(number),
                task["rater"],
                number,
                task.get("kind", "item"),
                *shown,
                task["prompt"],
                "a prompt",
                "photo",
                known,
            )
            database.execute(f"INSERT INTO tasks VALUES ({', '.join('?' * 10)})", row)
            for dimension, value in task["answers"].items():
                answer = (str(number), dimension, value, task.get("ms", 2000), "2026-11-27T06:00:00Z")
                database.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", answer)
        database.commit()
        database.close()
        return folder

    return write
