"""``srpo doctor``: what would run here, and the command for whatever is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srpo_cli.cli.options import FormatOption, OptionalPresetOption
from srpo_cli.cli.output import OutputFormat, print_rows
from srpo_cli.config.load import load_train_config
from srpo_cli.errors import MissingError

if TYPE_CHECKING:
    from srpo_cli.runtime.doctor import Check


def doctor(preset: OptionalPresetOption = None, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Say what would run here: versions, devices, disk, and the weights of a preset."""
    if preset is not None:
        load_train_config(preset)  # a bad name is refused before torch is loaded
    from srpo_cli.runtime import doctor as examine

    packages, torch = examine.check_packages(), examine.check_loads("torch")
    devices = examine.accelerators() if torch.ok else []
    checks = [*packages, torch, examine.check_loads("torchvision"), *examine.check_hardware(devices)]
    elsewhere: list[Check] = []
    if all(check.ok for check in packages):
        checks.append(examine.check_hub_cache())
        checks += _check_weights(preset, miniature=not devices)
        if preset is not None and not devices:  # what the same preset needs where there is an accelerator
            elsewhere = [check for check in _check_weights(preset, miniature=False) if check not in checks]
    rows = [_row(check, "missing") for check in checks]
    print_rows(rows + [_row(check, "not here") for check in elsewhere], output_format)
    missing = [check for check in checks if not check.ok]
    if missing:
        raise MissingError(f"{missing[0].subject}: {missing[0].found}. Next: {missing[0].remedy}")


def _row(check: Check, otherwise: str) -> dict[str, str]:
    status = "ok" if check.ok else otherwise
    return {"check": check.subject, "status": status, "found": check.found, "remedy": check.remedy}


def _check_weights(preset: str | None, miniature: bool) -> list[Check]:
    """The weights of the preset as it would run here, without one those of the miniature."""
    from srpo_cli.runtime.doctor import check_path, check_plugin, check_weights

    if preset is None:
        return [check_weights("model", "miniature"), check_weights("reward", "miniature")]
    config = load_train_config(preset, miniature=miniature).config
    checks = [check_weights("model", config.model.name)]
    if config.model.weights:  # they go into the named model
        checks.append(check_path("tuned weights", config.model.weights))
    if config.reward.weights:  # they take the place of the named reward's own
        plugin = check_plugin(config.reward.name)
        return [*checks, *([plugin] if plugin else []), check_path("reward weights", config.reward.weights)]
    return [*checks, check_weights("reward", config.reward.name)]
