"""Results and studies to make reports of: made up, but in exactly the form that `srpo eval` writes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

GROUPS = ("anime", "concept-art", "paintings", "photo")
COLUMNS = ("hpsv2.1", "gap:hpsv2.1", "win:hpsv2.1", "saturation", "contrast", "band_5")
MEASURES = [
    {
        "name": name,
        "title": title,
        "better": better,
        "digits": digits,
        "note": note,
        "columns": [column],
        "reduce": reduce,
    }
    for name, title, better, digits, note, column, reduce in (
        ("hpsv2.1", "HPS", "higher", 4, "cosine", "hpsv2.1", "first"),
        ("sgp:hpsv2.1", "SGP-HPS", "higher", 5, "positive minus negative", "gap:hpsv2.1", "first"),
        ("sgp_x100:hpsv2.1", "SGP-HPS x 100", "higher", 3, "100 times the gap", "gap:hpsv2.1", "hundredfold"),
        ("sgp_win_rate:hpsv2.1", "SGP-HPS win rate", "higher", 3, "", "win:hpsv2.1", "first"),
        ("saturation", "saturation", "", 3, "", "saturation", "first"),
        ("contrast", "contrast", "", 3, "", "contrast", "first"),
    )
]
_COLUMN = {measure["name"]: measure["columns"][0] for measure in MEASURES}
_CENTRES = {
    "hpsv2.1": lambda m: 0.289 - 0.002 * m,
    "gap:hpsv2.1": lambda m: 0.0046 + 0.0012 * m,
    "saturation": lambda m: 0.42 + 0.09 * m,
    "contrast": lambda m: 0.21,
    "band_5": lambda m: -6.1 + 0.1 * m,
}
_SPREADS = {"hpsv2.1": 0.02, "gap:hpsv2.1": 0.004, "saturation": 0.12, "contrast": 0.05, "band_5": 0.6}


def make_pictures(folder: Path, labels: Sequence[str], count: int, edge: int = 48, noise: int = 0) -> list[list[str]]:
    """Draw ``count`` pictures a model, a disc on a ground; files relative to ``folder``, (models, count)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:edge, :edge] / edge
    files = []
    for number in range(len(labels)):
        of_model = []
        for i in range(count):
            ground = np.stack([0.35 + 0.3 * y, 0.45 + 0.2 * y, 0.6 - 0.3 * y], -1)
            disc = (x - 0.5) ** 2 + (y - 0.55) ** 2 < 0.07
            ground[disc] = np.array([0.9, 0.2, 0.15]) * (0.6 + 0.4 * i / count) / (1 + 0.25 * number)
            pixels = (255 * ground).astype(int) + rng.integers(-noise, noise + 1, ground.shape)
            file = f"pictures/{number}/{i:05d}.png"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / file)
            of_model.append(file)
        files.append(of_model)
    return files


def make_table(
    labels: Sequence[str], files: Sequence[Sequence[str]], each: int, groups: Sequence[str] = GROUPS, images: int = 1
) -> pd.DataFrame:
    """A row for each model, group, prompt (``each`` of a group) and image; files are taken in turn."""
    rng = np.random.default_rng(1)
    shared = rng.normal(size=(len(COLUMNS), len(groups) * each * images))
    frames = []
    for m, label in enumerate(labels):
        index = np.arange(len(groups) * each * images)
        item = index // images
        group = [groups[i] for i in item // each]
        frame = pd.DataFrame(
            {
                "model": label,
                "item": [f"{g}/{i % each:05d}" for g, i in zip(group, item, strict=True)],
                "group": group,
                "prompt": [f"prompt {i} of {g}: a red disc, {i % 7} birds" for g, i in zip(group, item, strict=True)],
                "image": index % images,
                "seed": 42 + 1000 * item + index % images,
                "file": [files[m][i % len(files[m])] for i in index],
            }
        )
        for place, (name, centre) in enumerate(_CENTRES.items()):
            noise = 0.8 * shared[place] + 0.6 * rng.normal(size=len(index))
            frame[name] = centre(m) + _SPREADS[name] * noise
        frame["win:hpsv2.1"] = (frame["gap:hpsv2.1"] > 0).astype(float)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _figure(values: pd.Series) -> dict[str, Any]:
    error = 1.96 * values.std() / len(values) ** 0.5
    mean = values.mean()
    return {"mean": mean, "low": mean - error, "high": mean + error, "count": len(values)}


def _values(table: pd.DataFrame, measure: str, label: str, group: str) -> pd.Series:
    rows = table[(table["model"] == label) & ((table["group"] == group) | (group == "all"))]
    values = rows[_COLUMN[measure]].reset_index(drop=True)
    return 100 * values if measure.startswith("sgp_x100") else values


def make_result(table: pd.DataFrame, benchmark: str = "hpdv2", model: str = "flux.1-dev") -> dict[str, Any]:
    """A result with the means of a table, intervals by the normal approximation, and all other keys filled in."""
    labels, groups = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["group"]))
    groups = groups if len(groups) > 1 else []
    where = ["all", *groups]
    figures = {
        label: {
            group: {m["name"]: _figure(_values(table, m["name"], label, group)) for m in MEASURES} for group in where
        }
        for label in labels
    }
    comparisons = []
    for label in labels[1:]:
        for group in where:
            for measure in MEASURES:
                values = [_values(table, measure["name"], each, group) for each in (labels[0], label)]
                found = _figure(values[1] - values[0])
                p = 0.0004 if found["low"] > 0 or found["high"] < 0 else 0.6
                comparisons.append(
                    {
                        "baseline": labels[0],
                        "model": label,
                        "group": group,
                        "measure": measure["name"],
                        "difference": found["mean"],
                        "low": found["low"],
                        "high": found["high"],
                        "p": p / 4,
                        "p_holm": p,
                        "wins": float((values[1] > values[0]).mean()),
                    }
                )
    hacking = []
    for label in labels[1:]:
        for name in ("saturation", "contrast"):
            base, value = (_values(table, name, each, "all") for each in (labels[0], label))
            found = _figure(value - base)
            crossed = abs(found["mean"]) > base.std() / 2
            hacking.append(
                {
                    "model": label,
                    "signal": name,
                    "base": base.mean(),
                    "value": value.mean(),
                    "difference": found["mean"],
                    "low": found["low"],
                    "high": found["high"],
                    "p_holm": 0.002 if crossed else 0.7,
                    "spread": base.std(),
                    "crossed": bool(crossed),
                    "text": f"{name} {base.mean():.3g} -> {value.mean():.3g}",
                }
            )
    protocol = {
        "benchmark": {
            "name": benchmark,
            "description": "3,200 prompts of four styles",
            "prompts": {"layout": "lists", "repo": "zhwang/HPDv2", "files": ["benchmark/anime.json"]},
            "images_per_prompt": 1,
            "seed": 42,
            "seed_step": 1000,
            "steps": 50,
            "guidance": 3.5,
            "size": [1024, 1024],
        },
        "prompts_sha256": "ab" * 32,
        "prompt_count": int(table["item"].nunique()),
        "items": "cd" * 8,
        "steps": 50,
        "size": [1024, 1024],
        "judges": {"hpsv2.1": {"weights": "xswu/HPSv2", "preprocess": "crop", "unit": "cosine"}},
    }
    per_model = len(table) // len(labels)
    return {
        "format": 1,
        "srpo": "0.1.0",
        "benchmark": benchmark,
        "description": "3,200 prompts of four styles",
        "protocol": protocol,
        "protocol_digest": "0123456789abcdef",
        "models": [
            {
                "label": label,
                "model": model,
                "weights": f"runs/{number}" if number else None,
                "fingerprint": f"{number:016x}",
                "pictures": per_model,
                "folder": f"pictures/{number}",
            }
            for number, label in enumerate(labels)
        ],
        "counts": {"prompts": table["item"].nunique(), "texts": table["item"].nunique()},
        "notes": [],
        "measures": [dict(measure) for measure in MEASURES],
        "groups": groups,
        "figures": figures,
        "batches": {
            label: {group: {"hpsv2.1": {"mean": 0.28, "std": 0.004, "prompts": 80}} for group in groups}
            for label in labels
        },
        "comparisons": comparisons,
        "hacking": hacking,
        "skipped": [{"metric": "pickscore", "reason": "not here: hf download yuvalkirstain/PickScore_v1"}],
        "published": {
            "source": "Table 1 of arXiv 2509.06942",
            "note": "The scale of SGP-HPS is not known.",
            "rows": [{"model": "FLUX.1-dev", "figures": {"hpsv2.1": 0.289, "geneval": 0.678}}],
        },
        "environment": {
            "python": "3.11.9",
            "packages": {"torch": "2.11.0"},
            "command": ["/usr/bin/srpo", "eval", "base=flux.1-dev", "tuned=runs/1", "--benchmark", "hpdv2"],
        },
        "cost": {label: {"seconds": 12.5, "pictures_drawn": per_model} for label in labels},
        "selection": {"limit": None, "group": None},
        "prompts": {"origin": "zhwang/HPDv2@newest", "files": {}, "unverified": ["benchmark/anime.json"]},
    }


def make_study(mode: str = "grades", arms: Sequence[str] = ("base", "ours")) -> dict[str, Any]:
    """An analysis with figures near those of the paper."""
    titles = {
        "alignment": "Text-image alignment",
        "realism": "Realism and artifacts",
        "detail": "Detail",
        "aesthetics": "Aesthetics",
        "overall": "Overall",
    }

    def share(mean: float, half: float = 0.02) -> dict[str, float]:
        return {"mean": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)}

    def graded(excellent: float) -> dict[str, Any]:
        counts = [250, 800, 1450 - round(2000 * excellent) // 2, round(2500 * excellent)]
        total = sum(counts)
        return {
            "counts": counts,
            "mean": {"mean": 1.7, "low": 1.65, "high": 1.75},
            "excellent": share(counts[3] / total),
            "excellent_wilson": share(counts[3] / total, 0.012),
            "good_or_better": share((counts[2] + counts[3]) / total),
        }

    rates = {arm: {name: 0.08 + 0.3 * (arm != arms[0]) * (name != "alignment") for name in titles} for arm in arms}
    grades = {arm: {name: graded(rate) for name, rate in of_arm.items()} for arm, of_arm in rates.items()}
    differences = [
        {
            "baseline": arms[0],
            "arm": arm,
            "dimension": name,
            "difference": grades[arm][name]["excellent"]["mean"] - grades[arms[0]][name]["excellent"]["mean"],
            "low": -0.01 if name == "alignment" else 0.25,
            "high": 0.012 if name == "alignment" else 0.31,
            "p": 0.9 if name == "alignment" else 0.0002,
            "p_holm": 0.9 if name == "alignment" else 0.0008,
        }
        for arm in arms[1:]
        for name in titles
    ]
    raters = [
        {
            "rater": f"r{i:02d}",
            "role": "rater",
            "answers": 2500,
            "bias": 0.1 * (i - 5) / 5,
            "low": 0.1 * (i - 5) / 5 - 0.05,
            "high": 0.1 * (i - 5) / 5 + 0.05,
            "repeats": 25,
            "repeat_agreement": 0.8,
            "training_agreement": None if i == 3 else 0.9,
            "median_seconds": 6.4,
        }
        for i in range(1, 11)
    ]
    win_rates = [
        {
            "arm": arm,
            "against": arms[0],
            "wins": 300,
            "ties": 100,
            "losses": 100,
            "rate": {"mean": 0.7, "low": 0.66, "high": 0.74},
            "p": 0.0001,
            "p_holm": 0.0001,
        }
        for arm in arms[1:]
    ]
    strengths = {arm: {"mean": 0.4 * n, "low": 0.4 * n - 0.1, "high": 0.4 * n + 0.1} for n, arm in enumerate(arms)}
    grading = mode == "grades"
    return {
        "format": 1,
        "study": "realism",
        "mode": mode,
        "arms": list(arms),
        "raters": 10,
        "experts": 3,
        "prompts": 500,
        "pictures": 500 * len(arms),
        "answers": 25000,
        "complete": 0.98,
        "dimensions": [{"name": name, "title": title} for name, title in titles.items()],
        "grade_names": ["Fail", "Pass", "Good", "Excellent"],
        "grades": grades if grading else {},
        "differences": differences if grading else [],
        "agreement": {
            name: {"alpha": None, "low": None, "high": None, "label": "undefined"}
            if name == "detail"
            else {"alpha": 0.71, "low": 0.66, "high": 0.76, "label": "tentative"}
            for name in titles
        },
        "raters_table": raters,
        "overall_rule": {arm: graded(0.06 + 0.2 * (arm != arms[0])) for arm in arms} if grading else {},
        "pairs": None if grading else {"strengths": strengths, "win_rates": win_rates},
        "notes": ["3 of 5,000 grades are the experts' consensus."],
    }


@pytest.fixture
def pictures() -> Callable[..., list[list[str]]]:
    return make_pictures


@pytest.fixture
def table() -> Callable[..., pd.DataFrame]:
    return make_table


@pytest.fixture
def result() -> Callable[..., dict[str, Any]]:
    return make_result


@pytest.fixture
def study() -> Callable[..., dict[str, Any]]:
    return make_study
