"""How figures are written in pages: digits, signs, intervals and p-values."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
_CONTROL = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127, 0xFFFE, 0xFFFF])


def is_number(value: Any) -> bool:
    """Whether there is a figure: neither None nor NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """``value`` with so many decimals and a true minus, a dash where there is none; ``sign``: also write a plus."""
    if not is_number(value):
        return NONE
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def interval(figure: Mapping[str, Any], digits: int = 3, sign: bool = False) -> str:
    """The two ends of a figure's interval, ``[low, high]``."""
    return f"[{number(figure.get('low'), digits, sign)}, {number(figure.get('high'), digits, sign)}]"


def p_value(p: float | None, named: bool = True) -> str:
    """A p-value with its name, ``p < 0.001``, ``p = 0.03``; without, ``< 0.001``, ``0.03``."""
    if not is_number(p):
        return f"p {NONE}" if named else NONE
    if p < 0.001:
        return "p < 0.001" if named else "< 0.001"
    return f"{'p = ' if named else ''}{p:.{3 if p < 0.01 else 2}f}"


def percent(share: float | None, digits: int = 0, sign: bool = False) -> str:
    """A share in [0, 1] as a percentage."""
    return f"{number(100 * share, digits, sign)} %" if is_number(share) else NONE


def listed(parts: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    parts = list(parts)
    return " and ".join(([", ".join(parts[:-1])] if len(parts) > 1 else []) + parts[-1:])


def plain(text: object) -> str:
    """Somebody's text without the control characters that no page can hold."""
    return str(text).translate(_CONTROL)


def isolated(text: object) -> str:
    """Somebody's text inside a sentence: one that runs from right to left does not turn what is around it."""
    text = plain(text)
    turns = any(unicodedata.bidirectional(c) in ("R", "AL", "RLE", "RLO", "LRE", "LRO", "RLI", "LRI") for c in text)
    return f"\N{FIRST STRONG ISOLATE}{text}\N{POP DIRECTIONAL ISOLATE}" if turns else text
