"""How often the guard warns of a run in which nothing is trained: ``python -m benchmarks.guard``, a few minutes.

Every run has twelve signals in three families, some of which differ between base and asked pictures. Pictures of a step
are correlated, as those are that share a noise, or independent.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser

import numpy as np

from srpo_cli.metrics.guard import Signal, Watch

FAMILIES = ("look", "words", "content")
SIGNALS = 12
ALPHA = 0.05
CASES = (  # calibration pictures, correlation within a step, pictures of a step, steps, steps of a check
    (64, 0.0, 8, 150, 5),
    (64, 0.3, 8, 150, 5),
    (8, 0.0, 8, 150, 5),
    (8, 0.3, 8, 150, 5),
    (64, 0.3, 32, 40, 1),
    (8, 0.3, 32, 40, 1),
)


def untrained_run(rng: np.random.Generator, pictures: int, alike: float, batch: int, steps: int, every: int) -> Watch:
    """Watch a run whose pictures stay those of the base model."""
    names = [f"signal {number}" for number in range(SIGNALS)]
    base = rng.normal(size=(pictures, SIGNALS))
    asked = rng.normal(size=(pictures, SIGNALS)) * rng.choice([0.5, 1, 2], SIGNALS) + rng.choice([-1, 0, 1], SIGNALS)
    signals = [Signal.between(n, FAMILIES[i % 3], base[:, i], asked[:, i]) for i, n in enumerate(names)]
    tests = 2 * SIGNALS * (steps // every)
    watch = Watch({one.name: one for one in signals}, 1.25, ALPHA, every, tests)
    common, own = rng.normal(size=(2, steps, SIGNALS))
    means = math.sqrt(alike) * common + math.sqrt((1 - alike) / batch) * own
    for step, row in enumerate(means):
        if step and step % every == 0:
            watch.check(step)
        watch.note(step, batch, dict(zip(names, row.tolist(), strict=True)))
    watch.check(steps)
    return watch


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500, help="simulated runs of each case")
    runs = parser.parse_args().runs
    print("pictures  alike  batch  steps  every  warned  stopped")
    for case in CASES:
        rng = np.random.default_rng(0)
        watches = [untrained_run(rng, *case) for _ in range(runs)]
        warned, stopped = (sum(bool(getattr(one, kind)) for one in watches) for kind in ("warnings", "collapsed"))
        print(
            "{:8d}  {:5.1f}  {:5d}  {:5d}  {:5d}".format(*case),
            f"{warned / runs:6.1%}  {stopped / runs:7.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
