"""The GPU's measurements, tiny and on the CPU: that every part runs and leaves its figures."""

import json

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_all_parts_run_and_are_kept(tmp_path):
    assert gpu.main(["--tiny", "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert results["scale"] == "tiny"
    assert all("error" not in results[part] and "took_s" in results[part] for part in gpu.PARTS)
    assert results["steps"]["ours_over_bare"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_done_before_a_part_failed_is_kept(tmp_path, monkeypatch):
    def breaks(bench):
        yield "first", 1
        raise RuntimeError("no more memory")

    monkeypatch.setitem(gpu.PARTS, "breaks", breaks)
    assert gpu.main(["--tiny", "--out", str(tmp_path / "out"), "--parts", "breaks", "ceilings"]) == 1
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert results["breaks"]["first"] == 1
    assert results["breaks"]["error"] == "RuntimeError: no more memory"
    assert results["ceilings"]["square_tflops"] > 0


def test_no_part_is_begun_after_the_time(tmp_path):
    assert gpu.main(["--tiny", "--out", str(tmp_path / "out"), "--parts", "ceilings", "--minutes", "-1"]) == 1
    assert "skipped" in json.loads((tmp_path / "out" / "gpu.json").read_text())["ceilings"]


def test_results_become_rows_of_the_table():
    results = {"device": "a GPU", "scale": "full", "forwards": {"best_s": 0.0667, "forward_flops": 37.28e12}}
    results["steps"] = {"plan": {"flops": 1253e12, "gib": 48.4}, "ours_s": {"median": 2.4}, "kept_rollout_s": 0.6}
    verdicts = {row.id: row.verdict for row in gpu.rows(results)}
    assert verdicts == {"T4": "excellent", "T5": "excellent", "T6": "excellent" if 0.6 / 2.4 <= 0.256 else "good"}
