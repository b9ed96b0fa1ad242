"""``srpo presets``: what it prints, what it writes, what it refuses."""

import json

import pytest

from srpo_cli.config.load import load_train_config, preset_names, preset_path


def test_list_names_every_preset_and_variant(srpo):
    outcome = srpo("presets", "list")
    assert outcome.exit_code == 0
    assert not outcome.stderr
    for word in [*preset_names(), "natural, bright, dark, backlit"]:
        assert word in outcome.stdout


def test_list_is_json_for_scripts(srpo):
    rows = {row["preset"]: row for row in json.loads(srpo("presets", "list", "--format", "json").stdout)}
    assert sorted(rows) == preset_names()
    assert rows["lighting"]["default"] == "natural"
    assert rows["realism"]["variants"] == ["full", "lora", "offline"]


def test_show_prints_a_preset_with_the_origin_of_every_value(srpo, tmp_path):
    outcome = srpo("presets", "show", "style:painting", "--miniature", "--set", "train.steps=3")
    assert outcome.exit_code == 0
    lines = [line.split("#") for line in outcome.stdout.splitlines()]
    assert ["  steps: 3", "--set"] in [[value.rstrip(), origin.strip()] for value, *rest in lines for origin in rest]
    (tmp_path / "shown.yaml").write_text(outcome.stdout)
    assert load_train_config(tmp_path / "shown.yaml").config.control_words.positive == ("oil painting",)


def test_copy_keeps_the_text_and_says_how_to_run_it(srpo, tmp_path):
    copy = tmp_path / "mine.yaml"
    outcome = srpo("presets", "copy", "lighting:dark", copy)
    assert outcome.exit_code == 0
    assert copy.read_text() == preset_path("lighting").read_text()
    assert f"srpo train --preset {copy}:dark" in outcome.stderr
    assert not outcome.stdout


def test_copy_overwrites_nothing(srpo, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("precious")
    outcome = srpo("presets", "copy", "realism", mine)
    assert outcome.exit_code == 2
    assert "exists and is left alone" in outcome.stderr
    assert mine.read_text() == "precious"


def test_copy_needs_a_folder_that_exists(srpo, tmp_path):
    outcome = srpo("presets", "copy", "realism", tmp_path / "nowhere" / "mine.yaml")
    assert outcome.exit_code == 2
    assert "cannot be written" in outcome.stderr


def test_the_shipped_presets_are_valid(srpo):
    outcome = srpo("presets", "validate", *preset_names())
    assert outcome.exit_code == 0
    assert outcome.stdout.splitlines() == [f"{name}: ok" for name in preset_names()]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: flux.1-dev", "name: flux.1-deV", "Did you mean 'flux.1-dev'?"),
        ("name: hpsv2.1", "name: hpsv2", "Unknown reward 'hpsv2'"),
        (
            "positive: [oil painting]",
            "positive: []",
            "control_words.positive is []",
        ),  # in one variant's miniature
    ],
)
def test_validate_reports_every_file_and_fails_for_one(srpo, tmp_path, old, new, message):
    text = preset_path("style").read_text()
    assert old in text
    bad = tmp_path / "bad.yaml"
    bad.write_text(text.replace(old, new))
    outcome = srpo("presets", "validate", "realism", bad, "style", tmp_path / "none.yaml")
    assert outcome.exit_code == 2
    assert outcome.stdout.splitlines() == ["realism: ok", "style: ok"]
    assert message in outcome.stderr
    assert "none.yaml' does not exist" in outcome.stderr
    assert "2 of 4" in outcome.stderr


def test_mistakes_are_one_line_on_stderr(srpo):
    outcome = srpo("presets", "show", "realsm")
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert outcome.stderr.splitlines() == [
        "error: Unknown preset 'realsm'. Did you mean 'realism'? Available: baselines, lighting, realism, style."
    ]
