"""The ledger goes on where a checkpoint left it, and times steps only."""

import time

from srpo_cli.runtime.ledger import Ledger


def test_a_ledger_goes_on_from_its_state():
    ledger = Ledger()
    ledger.forwards += 24
    with ledger:
        time.sleep(0.01)
    state = ledger.state_dict()
    counts = {"rollouts", "forwards", "gradient_passes", "reward_calls", "updates"}
    assert set(state) == {*counts, "seconds", "cpu_seconds"}
    other = Ledger()
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert state["seconds"] >= 0.01


def test_the_time_of_a_step_that_fails_is_counted_too():
    ledger = Ledger()
    try:
        with ledger:
            time.sleep(0.01)
            raise ValueError
    except ValueError:
        pass
    assert ledger.report()["seconds"] >= 0.01
    assert ledger.report()["peak_memory_gib"] > 0


def test_processor_time_is_not_that_of_waiting():
    ledger = Ledger()
    with ledger:
        time.sleep(0.05)
    slept = ledger.cpu_seconds
    started = time.process_time()
    with ledger:
        while time.process_time() - started < 0.05:
            pass
    assert slept < 0.03 and ledger.cpu_seconds - slept > 0.04
