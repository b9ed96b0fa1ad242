"""From presets, ``--set`` and flags to one configuration: precedence, origins, and one-line refusals."""

from pathlib import Path

import pytest

from srpo_cli.config.load import (
    dump_yaml,
    load_train_config,
    preset_names,
    preset_path,
    read_preset,
    split_variant,
)
from srpo_cli.errors import UsageError
from srpo_cli.registry import check_parts

SMALLEST = """
model: {name: miniature, size: [48, 48]}
reward: {name: miniature}
control_words: {positive: [photo], negative: [render]}
prompts: {source: miniature}
"""


def forms() -> list[tuple[str, str | None, bool]]:
    """Every shipped preset, variant by variant, as (name, variant, miniature)."""
    return [
        (name, variant, miniature)
        for name in preset_names()
        for variant, layer in (read_preset(name).variants or {None: read_preset(name).base}).items()
        for miniature in ([False] if layer.miniature is None else [False, True])
    ]


@pytest.fixture
def preset_file(tmp_path: Path):
    """Write a preset file and return its path."""

    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def refusal(*arguments, **options) -> str:
    """The message with which loading is refused."""
    with pytest.raises(UsageError) as caught:
        load_train_config(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_presets_of_the_paper_are_shipped():
    assert {"realism", "lighting", "style"} <= set(preset_names())


@pytest.mark.parametrize(("name", "variant", "miniature"), forms())
def test_a_shipped_preset_resolves_and_names_parts_that_exist(name, variant, miniature):
    config = load_train_config(name, variant=variant, miniature=miniature).config
    check_parts(config.model.name, config.reward.name, config.algorithm.name)
    assert config.description
    assert (config.model.name == "miniature") is miniature


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_opens_with_its_command_hardware_and_figures(name):
    header = preset_path(name).read_text().split("\n\n")[0]
    assert f"srpo train --preset {name}" in header
    assert "Hardware:" in header
    assert "Published" in header
    assert "README.md" in header


@pytest.mark.parametrize(("name", "variant", "miniature"), forms())
def test_a_resolved_preset_written_out_is_the_same_preset(name, variant, miniature, preset_file):
    resolved = load_train_config(name, variant=variant, miniature=miniature)
    again = load_train_config(preset_file(dump_yaml(resolved)), miniature=miniature)
    assert again.config == resolved.config


def test_text_that_looks_like_something_else_survives_being_written_out(preset_file):
    words = ["no", "1e-5", "null", "a: b", "# c", "{d}"]
    resolved = load_train_config(preset_file(SMALLEST), flags={"control_words.positive": words})
    assert load_train_config(preset_file(dump_yaml(resolved))).config.control_words.positive == tuple(words)


def test_the_realism_preset_is_the_published_run():
    config = load_train_config("realism").config
    assert (config.optimizer.lr, config.optimizer.betas) == (5e-6, (0.9, 0.999))
    assert (config.optimizer.weight_decay, config.optimizer.grad_clip) == (1e-4, 0.1)
    assert (config.rollout.steps, config.rollout.guidance, config.rollout.shift) == (25, 1, 3)
    assert (config.algorithm.schedule, config.algorithm.guidance, config.algorithm.hinge) == (
        "reference",
        3.5,
        0.7,
    )
    assert config.algorithm.reference.discount_inv == (0.3, 0.01)
    assert (config.train.steps, config.model.size) == (20, (720, 720))


def test_later_layers_win_and_every_value_knows_where_it_came_from():
    resolved = load_train_config(
        "lighting:dark",
        overrides=["rollout.steps=7", "train.steps=8"],
        flags={"train.steps": 9, "model.name": "miniature", "train.seed": None},
        miniature=True,
    )
    assert (resolved.config.rollout.steps, resolved.config.train.steps) == (7, 9)
    origins = resolved.origins
    assert origins["train.seed"] == "default"
    assert origins["rollout.shared_noise"] == "preset lighting"
    assert origins["model.size"] == "preset lighting (miniature)"
    assert origins["control_words.positive"] == "preset lighting:dark (miniature)"
    assert origins["rollout.steps"] == "--set"
    assert origins["train.steps"] == "--steps"
    assert origins["model.name"] == "--model"


def test_a_variant_is_chosen_by_name_by_argument_or_by_default():
    by_name = load_train_config("lighting:dark")
    assert by_name == load_train_config("lighting", variant="dark")
    assert by_name != load_train_config("lighting") == load_train_config("lighting:natural")
    assert by_name.origins["control_words.positive"] == "preset lighting:dark"


def test_a_colon_in_the_name_of_a_file_is_no_variant(tmp_path):
    file = tmp_path / "a:b.yaml"
    file.write_text(SMALLEST)
    assert split_variant(file) == (str(file), None)
    assert split_variant(tmp_path / "c.yaml:dark") == (str(tmp_path / "c.yaml"), "dark")


def test_numbers_are_numbers_and_words_are_words(preset_file):
    config = load_train_config(
        preset_file(SMALLEST + "optimizer: {lr: 5e-6, eps: '1e-9'}"),
        overrides=["optimizer.weight_decay=1e-5", "control_words.negative=[no, on]"],
    ).config
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay) == (5e-6, 1e-9, 1e-5)
    assert config.control_words.negative == ("no", "on")


def test_set_takes_a_whole_section_and_null():
    config = load_train_config("realism", overrides=["optimizer={lr: 1e-6, grad_clip: null}", "rollout.shift="]).config
    assert (config.optimizer.lr, config.optimizer.grad_clip, config.rollout.shift) == (1e-6, None, None)
    assert config.optimizer.weight_decay == 1e-4


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("algorithm.windw=1", ["'algorithm.windw'", "--set", "Did you mean algorithm.window?"]),
        ("algoritm.window=1", ["Did you mean algorithm.window?"]),
        ("steps=3", ["rollout.steps or train.steps or sampling.steps"]),
        ("rollout.stepz=3", ["Did you mean rollout.steps?"]),
        ("train.steps.more=3", ["Unknown key 'train.steps.more'"]),
        ("quux=3", ["Unknown key 'quux'", "srpo presets show"]),
        ("train.steps", ["key=value", "'train.steps'"]),
        ("train=3", ["train from --set should hold keys of its own, not 3"]),
        ("train.steps=0", ["train.steps is 0, from --set: should be greater than or equal to 1"]),
        ("train.steps=ten", ["train.steps is ten", "should be a valid integer"]),
        ("optimizer.lr=-1", ["optimizer.lr is -1", "greater than 0"]),
        ("algorithm.schedule=karras", ["algorithm.schedule is karras", "'sigma' or 'reference'"]),
        ("algorithm.target=x", ["algorithm.target is x", "'auto'", "valid number"]),
        ("control_words.positive=[]", ["control_words.positive is []", "at least 1 item"]),
        ("control_words.positive=real", ["control_words.positive is real", "should be a list"]),
        ("control_words.template={word}. {prompt}", ["quote", "not YAML", "column"]),
        (
            "algorithm.window=[0.3,0.5]",
            ["algorithm.delta_sigma is 0.15", "algorithm.window, which is [0.3, 0.5]"],
        ),
        ("algorithm.reference.shift=2", ["no effect", "--set algorithm.schedule=reference"]),
    ],
)
def test_a_bad_override_is_refused_in_one_line(override, parts):
    message = refusal("realism", overrides=[override], miniature=True)
    for part in parts:
        assert part in message


def test_a_knob_that_the_schedule_does_not_have_is_refused_only_where_a_user_turns_it():
    assert "no effect" in refusal("realism", overrides=["algorithm.window=[0.7, 0.9]"])
    load_train_config("realism", overrides=["algorithm.window=[0.7, 0.9]", "algorithm.schedule=sigma"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: [", ["is not YAML", "line 1"]),
        ("- a list", ["the file", "should hold keys of its own"]),
        ("train: {steps: 1, steps: 2}", ["'steps' appears twice", "line 1"]),
        ("trian: {steps: 1}", ["'trian'", "Did you mean train?"]),
        ("miniature: {train: {stepz: 1}}", ["(miniature)", "'train.stepz'"]),
        ("variants: {a: {}}", ["variant from", "not None"]),
        ("{variant: b, variants: {a: {}}}", ["variant from", "not 'b'"]),
        ("model: {name: miniature}", ["reward.name is missing", "more after it"]),
    ],
)
def test_a_bad_file_is_refused_in_one_line(text, parts, preset_file):
    message = refusal(preset_file(text))
    for part in parts:
        assert part in message


def test_unknown_presets_and_variants_get_a_suggestion():
    assert "Did you mean 'realism'?" in refusal("realsm")
    assert "does not exist" in refusal("nowhere/realism.yaml")
    assert "Did you mean 'dark'?" in refusal("lighting:drak")
    assert "Unknown variant" in refusal("realism:dark")


def test_what_cannot_run_on_the_miniature_says_so(preset_file):
    assert "style:comic, style:painting" in refusal("style:cyberpunk", miniature=True)
    flux = preset_file(SMALLEST.replace("name: miniature, size", "name: flux.1-dev, size"))
    assert "no `miniature:` section" in refusal(flux, miniature=True)
    load_train_config(preset_file(SMALLEST), miniature=True)


def test_a_miniature_section_may_be_empty(preset_file):
    load_train_config(
        preset_file(SMALLEST.replace("name: miniature, size", "name: a/b, size") + "miniature:"),
        miniature=True,
    )
