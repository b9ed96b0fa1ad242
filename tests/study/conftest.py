"""Studies on disk, answered one by one, whatever their raters could be shown."""

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from srpo_cli.study.rubric import Facts, Mode, load_rubric
from srpo_cli.study.store import ANSWERS, FACTS, KEY, Task, create


@pytest.fixture(scope="session")
def serving() -> ModuleType:
    """``serving.py``: small studies on disk and their server."""
    spec = spec_from_file_location("serving", Path(__file__).with_name("serving.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """Write a study: ``arms`` in their order, and ``tasks``, each a mapping with rater, kind ("item" if not given),
    prompt, arm, for pairs arm on the left and other on the right, ``answers`` value by dimension, and known."""

    def write(arms: Sequence[str], tasks: Sequence[Mapping[str, Any]], mode: Mode = "grades") -> Path:
        folder = tmp_path / "study"
        (folder / "private").mkdir(parents=True)
        prompts = list(dict.fromkeys(task["prompt"] for task in tasks if task.get("kind") != "training"))
        ids = {(arm, prompt): f"{arm}-{prompt}".encode().hex() for prompt in prompts for arm in arms}
        key = {ids[pair]: {"arm": pair[0], "prompt_id": pair[1], "kind": "item"} for pair in ids}
        (folder / KEY).write_text(json.dumps(key))
        people = sorted({task["rater"] for task in tasks})
        roles = ["expert" if person.startswith("e") else "rater" for person in people]
        shown = [
            Task(
                task=str(number),
                rater=task["rater"],
                position=number,
                kind=task.get("kind", "item"),
                picture=ids.get((task["arm"], task["prompt"]), "known"),
                other=ids.get((task.get("other"), task["prompt"])),
                prompt_id=task["prompt"],
                prompt="a prompt",
                group_name="photo",
                known=task.get("known", {}),
            )
            for number, task in enumerate(tasks)
        ]
        create(folder / ANSWERS, zip(people, roles, people, strict=True), shown)
        with closing(sqlite3.connect(folder / ANSWERS)) as database, database:
            for number, task in enumerate(tasks):
                for dimension, value in task["answers"].items():
                    answer = (str(number), dimension, value, task.get("ms", 2000), "2026-11-27T06:00:00Z")
                    database.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", answer)
        facts = Facts(
            name="mine",
            mode=mode,
            dimensions=load_rubric(mode),
            seed=0,
            raters=roles.count("rater"),
            experts=roles.count("expert"),
            k=roles.count("rater"),
            repeats=0,
            prompts=len(prompts),
            pictures=len(ids),
            created="2026-11-27T06:00:00Z",
            srpo="0",
        )
        (folder / FACTS).write_text(facts.model_dump_json())
        return folder

    return write
