"""Training on a reward that is a Python file: told of, the same as if built in, and gone on with unchanged only."""

import json
import re
from pathlib import Path

import pytest

from srpo_cli.config.load import load_train_config
from srpo_cli.trust import digest_of, trust

PLUGINS = Path(__file__).parents[1] / "rewards" / "plugins"

pytestmark = [pytest.mark.usefixtures("on_the_cpu")]

SOURCE = "from srpo_cli.rewards.miniature import load_miniature as load\n"
FUNCTION = """from srpo_cli.rewards.plugins import reward
@reward(unit="", {})
def load(images, prompts):
    return images.mean()
"""


@pytest.fixture(autouse=True)
def a_user_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("srpo_cli.trust._this_process", set())


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(SOURCE)
    return path


def test_a_plugin_trains_as_a_built_in_reward_does_and_is_asked_about_once(
    plugin, tmp_path, tiny, srpo, read_metrics, monkeypatch
):
    runs = {name: tmp_path / name for name in ("mine", "built-in")}
    first = srpo(*tiny(runs["mine"], "--reward", plugin, "--trust", "--quiet", steps=1))
    assert first.exit_code == 0, first.stderr
    assert f"reward: {plugin} is a plug-in, sha256 " in first.stderr
    assert srpo(*tiny(runs["built-in"], steps=1)).exit_code == 0
    assert read_metrics(runs["mine"]) == read_metrics(runs["built-in"])
    state = json.loads((runs["mine"] / "checkpoints/step-000001/state.json").read_text())
    assert re.fullmatch(r"judge\.py sha256:\w{64}; reward\.safetensors sha256:\w{64}", state["reward"])

    monkeypatch.setattr("srpo_cli.trust._this_process", set())  # another day
    again = srpo("train", "--resume", runs["mine"], "--steps", "2")
    assert again.exit_code == 0, again.stderr
    assert f"reward: {plugin} is a plug-in, sha256 " in again.stderr

    plugin.write_text(SOURCE + "# changed\n")
    asked = srpo("train", "--resume", runs["mine"], "--steps", "3")
    assert (asked.exit_code, asked.stderr) == (
        2,
        f"error: {plugin} has changed since you trusted it: read it again, then add --trust\n",
    )
    refused = srpo("train", "--resume", runs["mine"], "--steps", "3", "--trust")
    assert refused.exit_code == 2
    assert "the weights or the code of the reward have changed since" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("source", "exit_code", "message"),
    [
        ("1 / 0\n", 1, "judge.py failed at {plugin}:1: ZeroDivisionError"),
        (FUNCTION.format("reads_text=True, differentiable=False"), 2, "judge.py has no gradient"),
        (FUNCTION.format("reads_text=False, differentiable=True"), 2, "judge.py reads no text"),
        (FUNCTION.format("reads_text=True, differentiable=True"), 1, "judge.py returned shape () for 2 pictures"),
        (SOURCE.replace("as load", "as make") + "def load(*a):\n    1 / 0\n", 1, "failed at {plugin}:3: ZeroDivision"),
    ],
)
def test_a_plugin_that_cannot_train_is_one_line(source, exit_code, message, plugin, tmp_path, tiny, srpo):
    plugin.write_text(source)
    outcome = srpo(*tiny(tmp_path / "run", "--reward", plugin, "--trust"))
    assert outcome.exit_code == exit_code
    assert message.format(plugin=plugin) in outcome.stderr.splitlines()[-1]


def trusted(name):
    """The path of a plug-in that the user has agreed to."""
    trust(PLUGINS / name)
    return PLUGINS / name


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("untrained_clip.py", []),
        ("brightness.py", ["--set=reward.pair=picture"]),
    ],
)
def test_a_mix_trains_and_is_gone_on_with_to_the_bit(name, settings, tmp_path, tiny, srpo, assert_same):
    mix = [f"--set=reward.others={{{trusted(name)}: {{weight: 0.5}}}}", "--set=reward.weight=2", *settings]
    runs = {label: tmp_path / label for label in ("whole", "halves", "plain")}
    first = srpo(*tiny(runs["whole"], *mix, steps=2, measured=True))
    assert first.exit_code == 0, first.stderr
    assert srpo(*tiny(runs["halves"], *mix, steps=1)).exit_code == 0
    again = srpo("train", "--resume", runs["halves"], "--steps", "2")
    assert again.exit_code == 0, again.stderr
    assert_same(runs["whole"], runs["halves"], 2)

    state = json.loads((runs["whole"] / "checkpoints/step-000002/state.json").read_text())
    own, other = state["reward"].split("; ", 1)
    assert re.fullmatch(r"reward\.safetensors sha256:\w{64}", own)
    assert other.startswith(f"{name} sha256:{digest_of(PLUGINS / name)}")
    config = load_train_config(runs["whole"] / "config.yaml").config
    assert {part: its.weight for part, its in config.reward.parts.items()} == {"miniature": 2, str(PLUGINS / name): 0.5}
    assert "# --set" in next(
        line for line in (runs["whole"] / "config.yaml").read_text().splitlines() if "others:" in line
    )


def test_a_mix_is_the_weighted_sum_of_what_each_reward_alone_measures(tmp_path, tiny, srpo, read_metrics):
    name = trusted("untrained_clip.py")
    runs = {
        "miniature": [],
        "other": ["--reward", name],
        "mix": [f"--set=reward.others={{{name}: -3}}", "--set=reward.weight=0.5"],
    }
    for label, settings in runs.items():
        outcome = srpo(*tiny(tmp_path / label, *settings, steps=1))
        assert outcome.exit_code == 0, outcome.stderr
    measured = {label: read_metrics(tmp_path / label)[0] for label in runs}
    for value in ("reward", "sgp_gap"):
        expected = 0.5 * measured["miniature"][value] - 3 * measured["other"][value]
        assert measured["mix"][value] == pytest.approx(expected, rel=1e-5)


def test_a_reward_that_reads_no_text_trains_on_the_pictures_own_pair(tmp_path, tiny, srpo, read_metrics):
    plugin = tmp_path / "contrast.py"
    plugin.write_text(FUNCTION.format("reads_text=False, differentiable=True").replace("mean()", "std((1, 2, 3))"))
    asked = srpo(*tiny(tmp_path / "refused", "--reward", plugin, "--trust"))
    assert asked.exit_code == 2
    assert "add --set reward.pair=picture" in asked.stderr.splitlines()[-1]
    settings = ["--set=reward.pair=picture", "--set=reward.pair_noise=0.1", "--set=reward.shift=0"]
    outcome = srpo(*tiny(tmp_path / "run", "--reward", plugin, *settings, steps=2))
    assert outcome.exit_code == 0, outcome.stderr
    for record in read_metrics(tmp_path / "run"):
        assert -0.1 < record["sgp_gap"] < 0  # a noised picture has more contrast
        assert record["grad_norm"] > 0


def test_every_name_of_a_mix_is_checked_before_anything_loads(plugin, tmp_path, tiny, srpo, monkeypatch):
    monkeypatch.setattr("srpo_cli.recipes.train.train", lambda *_, **__: pytest.fail("loaded"))
    asked = srpo(*tiny(tmp_path / "run", f"--set=reward.others={{{plugin}: 1}}"))
    assert (asked.exit_code, asked.stderr) == (
        2,
        f"error: {plugin} is Python code that would run here: read it, then add --trust (asked once)\n",
    )
    unknown = srpo(*tiny(tmp_path / "run", "--set=reward.others={pickscor: 1}"))
    assert unknown.exit_code == 2
    assert "Unknown reward 'pickscor'. Did you mean 'pickscore'?" in unknown.stderr
