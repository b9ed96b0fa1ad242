"""Small studies on disk, and their server in a process of its own, to be killed."""

import json
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from srpo_cli.runtime.pictures import METADATA_KEY
from srpo_cli.study.arms import items_of_folders
from srpo_cli.study.build import Options, new_study
from srpo_cli.study.training import TrainingItem

ARMS = ("zebra-base", "walrus-tuned")
"""Names that occur nowhere else, so that finding one is a leak."""

TELLTALE = "okapi"
"""Part of the name of every picture's file."""

_COMMAND = "from srpo_cli.cli.rate import app; app(prog_name='rate')"


def draw_arm(folder: Path, arm: str, prompts: Sequence[str], size: tuple[int, int] = (48, 48)) -> Path:
    """A folder of an arm's pictures, whose metadata says all that a rater must not know."""
    (folder / arm).mkdir(parents=True)
    for number, prompt in enumerate(prompts):
        seed = sum(map(ord, arm)) * 1000 + number
        picture = Image.effect_noise(size, 60).convert("RGB")
        picture.paste((seed % 251, seed % 241, seed % 239), (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
        info = PngImagePlugin.PngInfo()
        info.add_text(METADATA_KEY, json.dumps({"prompt": prompt, "seed": number, "model": arm}))
        info.add_itxt("Comment", f"made by {arm}")
        exif = Image.Exif()
        exif[0x013B] = f"artist {arm}"
        picture.save(
            folder / arm / f"{TELLTALE}-{number:03d}.png",
            pnginfo=info,
            exif=exif,
            icc_profile=f"profile {arm}".encode(),
        )
    return folder / arm


def make_study(
    folder: Path,
    prompts: int = 4,
    training: Sequence[TrainingItem] = (),
    size: tuple[int, int] = (48, 48),
    **options: Any,
) -> Path:
    """A study of two arms in ``folder``."""
    texts = [f"prompt number {number}" for number in range(prompts)]
    arms = {arm: draw_arm(folder / "arms", arm, texts, size) for arm in ARMS}
    study = folder / "study"
    asked = {"raters": 2, "experts": 1, "k": 2, **options}
    new_study(study, items_of_folders(arms), Options(name="mine", **asked), training)
    return study


def lesson(folder: Path, known: Mapping[str, int]) -> TrainingItem:
    """A training item with a picture of its own."""
    place = draw_arm(folder / "lessons", ARMS[0], ["what to learn"])
    return TrainingItem("what to learn", (place / f"{TELLTALE}-000.png",), known)


def tokens(study: Path) -> dict[str, str]:
    """Everyone's secret."""
    lines = (study / "private" / "links.csv").read_text().splitlines()[1:]
    return {line.split(",")[0]: line.split("/r/")[1].strip("/") for line in lines}


def rows(study: Path, query: str, *values: Any) -> list[tuple[Any, ...]]:
    """What the database holds."""
    with closing(sqlite3.connect(study / "answers.sqlite")) as database:
        return database.execute(query, values).fetchall()


class Served:
    """``srpo eval rate serve`` as a process; what is started again listens on the same port."""

    def __init__(self, study: Path) -> None:
        self.study, self.port, self.links = study, 0, {}
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", _COMMAND, "serve", str(self.study), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        count = len(tokens(self.study))
        found: Mapping[str, str] = {}
        while len(found) < count:
            line = self.process.stdout.readline()
            assert line, "the server has ended"
            match = re.match(r"(\w+) +\w+ +(http://\S+)", line)
            found = {**found, **({match[1]: match[2]} if match else {})}
        self.links = found
        self.port = int(re.search(r":(\d+)/", next(iter(found.values())))[1])

    def kill(self) -> None:
        """As a power cut or the kernel would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
