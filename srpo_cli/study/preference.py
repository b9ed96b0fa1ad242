"""What preferences between pairs of pictures say: win rates, and Bradley-Terry strengths of the arms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from srpo_cli.errors import MissingError
from srpo_cli.metrics.intervals import holm, interval, p_value, rate_interval, resample

if TYPE_CHECKING:
    from pandas import DataFrame

PRIOR = 0.25  # choix's alpha: with two arms half a win each way on top of what was counted, so that logs are finite
_ITERATIONS = 10_000


def bradley_terry(wins: ndarray, start: ndarray | None = None) -> ndarray:
    """Strengths (arms,) of mean zero, in log odds, from how often each arm won against each, (arms, arms).

    Arm i is preferred to j with probability 1 / (1 + exp(s_j - s_i)). Half wins may be counted for ties. ``start``:
    strengths from which to iterate. MissingError without the library.
    """
    try:
        import choix
    except ImportError as error:
        raise MissingError("strengths need choix, which is not here: pip install 'srpo-cli[rate]'") from error
    found = choix.ilsr_pairwise_dense(wins, alpha=PRIOR, initial_params=start, max_iter=_ITERATIONS)
    return found - found.mean()


def preferences(answers: DataFrame, arms: Sequence[str], draws: int, refits: int, seed: int) -> dict[str, Any]:
    """Win rates of every later arm against every earlier one, and strengths, on one dimension.

    ``answers`` has columns first and second, arms in their order, and value: 0 the first one is preferred, 1 a tie,
    2 the second one. A tie is half a win for both. Intervals are over prompts, ``refits`` draws of the strengths.
    """
    compared = [arm for arm in arms if (answers[["first", "second"]] == arm).any(axis=None)]
    pairs = [pair for pair in combinations(compared, 2) if _asked(answers, *pair).any()]
    table = _tally(answers, pairs)
    drawn, total = resample(table, draws, seed), table.sum(0)
    win_rates = []
    for place, (against, arm) in enumerate(pairs):
        prompts = int(table[:, place].any(1).sum())
        with np.errstate(invalid="ignore"):  # a draw may hold no prompt of this pair
            rates = drawn[:, place] @ [0, 0.5, 1] / drawn[:, place].sum(1)
        losses, ties, wins = (int(count) for count in total[place])
        rate = rate_interval((wins + ties / 2) / (wins + ties + losses), rates, prompts)
        row = {"arm": arm, "against": against, "wins": wins, "ties": ties, "losses": losses, "rate": rate._asdict()}
        win_rates.append({**row, "p": p_value(rate.mean - 0.5, rates - 0.5, prompts)})
    for row, corrected in zip(win_rates, holm([row["p"] for row in win_rates]), strict=True):
        row["p_holm"] = corrected
    prompts = int(table.any((1, 2)).sum())
    return {"strengths": _strengths(total, drawn[:refits], pairs, compared, prompts), "win_rates": win_rates}


def _asked(answers: DataFrame, first: str, second: str) -> Any:
    return (answers["first"] == first) & (answers["second"] == second)


def _tally(answers: DataFrame, pairs: Sequence[tuple[str, str]]) -> ndarray:
    """How often each outcome was chosen, (prompts, pairs, 3)."""
    prompts, prompt = np.unique(answers["prompt_id"], return_inverse=True)
    table = np.zeros((len(prompts), len(pairs), 3), dtype=int)
    for place, pair in enumerate(pairs):
        asked = _asked(answers, *pair).to_numpy()
        np.add.at(table, (prompt[asked], place, answers["value"].to_numpy()[asked]), 1)
    return table


def _strengths(
    total: ndarray, drawn: ndarray, pairs: Sequence[tuple[str, str]], arms: Sequence[str], prompts: int
) -> dict[str, dict[str, float]]:
    found = bradley_terry(_wins(total, pairs, arms))
    refitted = np.stack([bradley_terry(_wins(each, pairs, arms), found) for each in drawn])
    return {arm: interval(found[place], refitted[:, place], prompts)._asdict() for place, arm in enumerate(arms)}


def _wins(tally: ndarray, pairs: Sequence[tuple[str, str]], arms: Sequence[str]) -> ndarray:
    """Wins of each arm (row) against each (column), from (pairs, 3) outcomes."""
    wins = np.zeros((len(arms), len(arms)))
    for (first, second), (for_first, ties, for_second) in zip(pairs, tally, strict=True):
        wins[arms.index(first), arms.index(second)] = for_first + ties / 2
        wins[arms.index(second), arms.index(first)] = for_second + ties / 2
    return wins
