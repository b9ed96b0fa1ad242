"""One HTML page that answers, for somebody who was not there: which model is better, by how much, and is it sure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from srpo_cli.pages.charts import shape
from srpo_cli.pages.frame import asset, policy, templates
from srpo_cli.pages.gallery import Progress, gallery
from srpo_cli.pages.glossary import DIRECTIONS
from srpo_cli.pages.results import results_context, sentence
from srpo_cli.pages.study import study_context
from srpo_cli.pages.verdict import verdict
from srpo_cli.pages.writing import plain
from srpo_cli.runtime.folder import write_atomically

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ANALYSIS", "REPORT", "verdict", "write_report"]

REPORT, ANALYSIS = "report.html", "analysis.json"
"""Names in a folder of the page, and of the human study that the page tells of."""


def write_report(
    folder: Path,
    result: Mapping[str, Any] | None,
    table: pd.DataFrame | None,
    study: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write ``report.html`` into ``folder`` and return its path.

    The page holds its style and scripts and needs no network. Its thumbnails are in it while they are few (3 MB), else
    in ``thumbnails/`` beside it, where those that match are kept.

    Args:
        folder: of the result; what ``table`` calls ``file`` is relative to it.
        result: of ``results.json``, or None for a study alone.
        table: a row for each picture, as in ``images.parquet``; None shows no pictures.
        study: the analysis of a human study.
        progress: told (thumbnails made, thumbnails in all) as they are made.

    SrpoError for a picture that cannot be read.
    """
    if result is None and study is None:
        raise ValueError("a report needs a result or a study")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = gallery(folder, result, table, progress) if result is not None and table is not None else None
    page = render(folder, result, pictures, study)
    write_atomically(folder / REPORT, page.encode(errors="replace"))  # a lone surrogate is in no file's encoding
    return folder / REPORT


def render(
    folder: Path,
    result: Mapping[str, Any] | None,
    pictures: Mapping[str, Any] | None,
    study: Mapping[str, Any] | None,
) -> str:
    """The page as text; ``pictures`` as :func:`srpo_cli.pages.gallery.gallery` gives them."""
    environment = templates()
    environment.filters |= {"sentence": sentence, "figures_apart": _figures_apart}
    environment.globals |= {"shape": shape, "directions": DIRECTIONS}
    style, page_script, gallery_script = (asset(environment, name) for name in ("style.css", "page.js", "gallery.js"))
    context: dict[str, Any] = {"result": result, "study": study, "pictures": _shown(pictures)}
    if result is not None:
        context |= results_context(result, folder)
    if study is not None:
        context |= study_context(study)
    if result is None and study is not None:
        context |= {"heading": _study_heading(study), "title": f"{study['study']}: human study"}
    return environment.get_template("report.html.j2").render(
        **context,
        contents=_contents(context),
        style=style,
        page_script=page_script,
        gallery_script=gallery_script,
        policy=policy(style, page_script, gallery_script),
    )


def _figures_apart(text: str) -> Markup:
    """A sentence with the figures in its parentheses set apart, so that it reads without them."""
    parts = re.split(r"(\([^()]*\d[^()]*\))", plain(text))
    apart = Markup('<span class="figures">{}</span>')
    return Markup("").join(apart.format(part) if place % 2 else part for place, part in enumerate(parts))


def _shown(pictures: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the template asks of the pictures, their data as JSON that cannot end its script element."""
    if pictures is None or not pictures["items"]:
        return None
    text = json.dumps(pictures, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    gaps = [place for place, column in enumerate(pictures["columns"]) if column["name"].startswith("sgp:")]
    beside = bool(pictures["sources"]) and not pictures["sources"][0].startswith("data:")
    return {**pictures, "json": Markup(text), "gap": gaps[0] if gaps else None, "beside": beside}


def _contents(context: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Anchors and names of the sections that the page has."""
    result, study = context["result"], context["study"]
    sections = [
        ("verdict", "Answer", result),
        ("table", "Table", result),
        ("differences", "Differences", result and context["differences"]),
        ("intervals", "Intervals", result),
        ("groups", "Groups", result and context["group_cards"]),
        ("pictures", "Pictures", context["pictures"]),
        ("hacking", "Hacking", result and context["hacking"]),
        ("study", "People", study),
        ("excellent", "Excellent rates", study and context["excellent"]),
        ("pairs", "Pairs", study and context["pairs"]),
        ("raters", "Raters", study),
        ("protocol", "Protocol", result),
        ("glossary", "Glossary", result),
    ]
    return [(anchor, name) for anchor, name, there in sections if there]


def _study_heading(study: Mapping[str, Any]) -> str:
    arms = [plain(arm) for arm in study["arms"]]
    return f"Do people prefer {arms[1]} to {arms[0]}?" if len(arms) == 2 else "What do people prefer?"
