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
    check_parts(config.model.name, config.reward.parts, config.algorithm.name)
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


OTHERS = """
  others:
    pickscore: 0.5
    clip:ViT-L-14/openai: {weight: -1e-2, weights: clip.pt}
    ./judge.py:Best: {}
"""


def test_rewards_are_mixed_in_a_file_and_survive_being_written_out(preset_file):
    text = SMALLEST.replace("reward: {name: miniature}", f"reward:\n  name: miniature\n  weight: 2{OTHERS}")
    resolved = load_train_config(preset_file(text))
    parts = {name: (part.weight, part.weights) for name, part in resolved.config.reward.parts.items()}
    assert parts == {
        "miniature": (2, None),
        "./judge.py:Best": (1, None),
        "clip:ViT-L-14/openai": (-0.01, Path("clip.pt")),
        "pickscore": (0.5, None),
    }
    again = load_train_config(preset_file(dump_yaml(resolved)))
    assert again.config == resolved.config
    assert again.config.model_dump_json() == resolved.config.model_dump_json()  # which a checkpoint's digest is of


def test_rewards_are_mixed_by_set_in_any_order_and_as_a_whole(preset_file):
    file = preset_file(SMALLEST.replace("{name: miniature}", "{name: miniature, others: {imagereward: 3}}"))
    either, other = ("clip:ViT-L-14/openai: 0.5", "aesthetic-v2.5: -1")
    first, second = (
        load_train_config(file, overrides=[f"reward.others={{{text}}}"])
        for text in (f"{either}, {other}", f"{other}, {either}")
    )
    assert first.config.model_dump_json() == second.config.model_dump_json()
    assert list(first.config.reward.parts) == ["miniature", "aesthetic-v2.5", "clip:ViT-L-14/openai"]
    assert first.origins["reward.others"] == "--set"
    assert list(load_train_config(file, overrides=["reward.others={}"]).config.reward.parts) == ["miniature"]


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
        ("train.steps.more=3", ["Unknown key 'train.steps.more'", "train.steps is set as a whole"]),
        ("reward.others.hpsv2.1=3", ["'reward.others.hpsv2.1'", "reward.others is set as a whole", "{NAME: WEIGHT}"]),
        ("reward.others=hpsv2.1", ["reward.others is hpsv2.1, from --set: should be a mapping", "{NAME: WEIGHT}"]),
        ("reward.others={hpsv2.1: high}", ["reward.others is {hpsv2.1: high}, from --set: should be a valid number"]),
        ("reward.others={hpsv2.1: {wieght: 1}}", ["reward.others is {hpsv2.1: {wieght: 1}}", "weight: , weights:"]),
        ("reward.others={hpsv2.1: true}", ["reward.others is {hpsv2.1: true}, from --set: should be a number"]),
        ("reward.others={miniature: 1}", ["reward.others names miniature, as reward.name does"]),
        ("reward.weight=0", ["reward.weight is 0", "another value"]),
        ("reward.pair=noise", ["reward.pair is noise", "'words' or 'picture'"]),
        ("reward.pair_noise=0", ["reward.pair_noise is 0", "greater than 0"]),
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


@pytest.mark.parametrize(
    ("variant", "overrides", "parts"),
    [
        ("refl", ["algorithm.refl.steps_left=[0, 4]"], ["steps_left is [0, 4]", "1 <= fewest <= most", "[1, 10]"]),
        ("refl", ["algorithm.refl.steps_left=[4, 2]"], ["steps_left is [4, 2]", "1 <= fewest <= most"]),
        ("refl", ["rollout.steps=3"], ["steps_left is [1, 4] and rollout.steps is 3", "lower the one or raise"]),
        ("draft", ["algorithm.draft.last_steps=11"], ["last_steps is 11 and rollout.steps is 10", "lower the one"]),
        ("draft", ["algorithm.draft.noises=2"], ["noises is 2", "last_steps is 2", "set algorithm.draft.last_steps=1"]),
        ("draft", ["algorithm.draft.include_last=true"], ["include_last is true", "set algorithm.draft.noises=2"]),
        ("alignprop", ["algorithm.alignprop.truncation=[5, 3]"], ["truncation is [5, 3]", "0 <= low <= high"]),
        (
            "alignprop",
            ["algorithm.alignprop.truncation=[0, 11]"],
            ["[0, 11] and rollout.steps is 10", "within [0, 10]"],
        ),
        ("alignprop", ["algorithm.alignprop.truncation=[10, 10]"], ["keep a step", "[9, 9] keeps the last alone"]),
        ("dance-grpo", ["rollout.steps=1"], ["rollout.steps is 1", "set rollout.steps=2 or more"]),
        (
            "dance-grpo",
            ["algorithm.pairs=6"],
            [
                "algorithm.pairs is 6, and dance-grpo trains 5 of the 10 steps",
                "lower algorithm.pairs, or raise rollout",
            ],
        ),
        ("dance-grpo", ["algorithm.grpo.noise_level=0"], ["noise_level is 0", "above 0", "0.3 for dance-grpo", "srpo"]),
        ("dance-grpo", ["algorithm.grpo.group=1"], ["group is 1", "greater than or equal to 2"]),
        ("dance-grpo", ["algorithm.grpo.fraction=0"], ["fraction is 0", "greater than 0"]),
        ("dance-grpo", ["train.batch_size=12"], ["batch_size is 12", "multiple of algorithm.grpo.group, which is 8"]),
        ("dance-grpo", ["algorithm.grpo.kl=0.1"], ["kl is 0.1 and train.mode is full", "set train.mode=lora, or"]),
        ("dance-grpo", ["algorithm.hinge=0.5"], ["algorithm.hinge", "no effect", "'dance-grpo'"]),
        ("refl", ["algorithm.grpo.clip=0.5"], ["algorithm.grpo.clip", "no effect", "algorithm.name=dance-grpo"]),
        ("refl", ["algorithm.window=[0.5, 0.9]"], ["algorithm.window", "no effect", "algorithm.name=srpo"]),
        ("refl", ["rollout.replay=1"], ["rollout.replay is 1", "set rollout.replay=0", "srpo or direct-align"]),
        ("refl", ["algorithm.schedule=reference"], ["schedule is reference", "set algorithm.schedule=sigma"]),
        (
            "refl",
            ["rollout.source=pictures", "rollout.pictures=list.jsonl"],
            ["rollout.source is pictures", "set rollout.source=model", "srpo or direct-align"],
        ),
        ("flow-grpo", ["rollout.guidance=1"], ["rollout.guidance is 1 and algorithm.guidance is 3.5", "one value"]),
        ("direct-align", ["algorithm.branches=[invert]"], ["algorithm.branches", "no effect", "algorithm.name=srpo"]),
    ],
)
def test_what_a_method_cannot_do_is_refused_in_one_line_with_what_it_can(variant, overrides, parts):
    message = refusal(f"baselines:{variant}", overrides=overrides, miniature=True)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("variant", "overrides"),
    [
        ("refl", ["rollout.steps=4", "rollout.guidance=1"]),  # it calls the model once, under its own guidance
        ("draft", ["algorithm.draft.last_steps=10"]),
        ("alignprop", ["algorithm.alignprop.truncation=[9, 10]"]),
        ("dance-grpo", ["algorithm.pairs=5", "algorithm.grpo.kl=0.1", "train.mode=lora"]),
        ("flow-grpo", ["algorithm.pairs=9", "train.batch_size=8"]),
        ("direct-align", ["rollout.replay=1", "rollout.steps=1"]),
    ],
)
def test_a_method_may_go_as_far_as_the_sampler(variant, overrides):
    load_train_config(f"baselines:{variant}", overrides=overrides, miniature=True)


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


def test_a_target_of_given_pictures_and_captions_that_nothing_reads_are_refused():
    message = refusal("realism:offline", miniature=True, overrides=["algorithm.target=auto"])
    assert "rollout.source is pictures and algorithm.target is auto" in message
    held = ["algorithm.captions=hold", "algorithm.target=auto"]
    assert "reward.pair is picture" in refusal("realism", overrides=[*held, "reward.pair=picture"])
    assert "algorithm.target is null" in refusal("realism", overrides=held[:1])
    assert "dance-grpo, which follows no gradient" in refusal("baselines:dance-grpo", overrides=held[:1])
    assert "rollout.source is pictures, which" in refusal("realism:offline", overrides=held[:1])


def test_unknown_presets_and_variants_get_a_suggestion():
    assert "Did you mean 'realism'?" in refusal("realsm")
    assert "a comparison, not a preset: run it with `srpo eval compare --preset table1`" in refusal("table1")
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
