"""Rewards that are other people's code: asked about before they run, and told whenever they do."""

from __future__ import annotations

from collections.abc import Callable

from srpo_cli.registry import REWARDS, InstalledPlugin, PluginFile


def check_plugin(reward: str, agreed: bool) -> None:
    """UsageError for a reward that is a Python file which is not there, or which may not run.

    ``agreed``: the user gave ``--trust``. Nothing is remembered, and nothing of the file runs.
    """
    plugin = REWARDS.plugin(reward)
    if isinstance(plugin, PluginFile):
        from srpo_cli.trust import check_trusted

        check_trusted(plugin.path, agreed)


def admit_plugin(reward: str, agreed: bool, say: Callable[[str], None]) -> None:
    """:func:`check_plugin`, remember the agreement, and tell whose code will run."""
    check_plugin(reward, agreed)
    plugin = REWARDS.plugin(reward)
    if isinstance(plugin, PluginFile):
        from srpo_cli.trust import check_trusted, trust

        if agreed:
            trust(plugin.path)
        say(f"reward: {reward} is a plug-in, sha256 {check_trusted(plugin.path)[:12]}; its code runs here")
    elif isinstance(plugin, InstalledPlugin):
        say(f"reward: {reward} is a plug-in, {plugin.entry.value} of {plugin.package}; its code runs here")
    elif hidden := REWARDS.shadowed(reward):
        say(f"reward: {reward} is the built-in one; the plug-in of that name in {hidden.package} is not used")
