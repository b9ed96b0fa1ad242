"""Training on a reward that is a Python file: told of, the same as if built in, and gone on with unchanged only."""

import json
import re

import pytest

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
