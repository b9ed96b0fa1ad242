"""From a preset, ``--set`` and flags to one validated configuration that knows where every value came from.

A preset is a YAML file of :class:`TrainConfig` keys. Besides these it may hold ``miniature:``, the keys that
change where the run happens on the built-in miniature, and ``variants:``, named sets of keys (each with its
own ``miniature:``) of which ``variant:`` names the default. Everything is flattened to dotted keys first; a
later layer replaces whole values, lists included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from srpo_cli.config import dialect
from srpo_cli.config.schema import METHODS, POLICY_METHODS, TrainConfig
from srpo_cli.errors import UsageError

Leaves = dict[str, Any]
"""Values by dotted key."""

DEFAULT_ORIGIN = "default"
MINIATURE = "miniature"
"""Name of the built-in model, and of the preset section that is for it."""

_FLAGS = {"model.name": "--model", "reward.name": "--reward"}
_IDLE_KEYS = {  # by schedule, the keys that it does not read
    "sigma": ("algorithm.reference.",),
    "reference": (
        "algorithm.window",
        "algorithm.delta_sigma",
        "algorithm.semantic_weight",
        "algorithm.common_weight",
    ),
}


_ON_KNOWN_NOISE = ("srpo", "direct-align")
_KEYS_OF_METHODS = {  # keys that only some methods read
    "algorithm.window": _ON_KNOWN_NOISE,
    "algorithm.delta_sigma": _ON_KNOWN_NOISE,
    "algorithm.reference.": _ON_KNOWN_NOISE,
    "algorithm.branches": ("srpo",),
    "algorithm.semantic_weight": ("srpo",),
    "algorithm.common_weight": ("srpo",),
    "algorithm.relative": tuple(name for name in METHODS if name != "srpo"),
    "algorithm.hinge": tuple(name for name in METHODS if name not in POLICY_METHODS),
    "algorithm.refl.": ("refl",),
    "algorithm.draft.": ("draft",),
    "algorithm.alignprop.": ("alignprop",),
    "algorithm.grpo.": POLICY_METHODS,
}


@dataclass(frozen=True)
class Layer:
    """What a preset or a variant sets, and what its ``miniature:`` section sets (None: it has none)."""

    values: Leaves
    miniature: Leaves | None


@dataclass(frozen=True)
class Preset:
    """A preset file as read, every key known, no value checked yet."""

    name: str
    text: str
    base: Layer
    variants: dict[str, Layer]
    default_variant: str | None

    @property
    def description(self) -> str:
        """The preset's own line about itself, empty where it has none."""
        return str(self.base.values.get("description", ""))


@dataclass(frozen=True)
class Resolved:
    """A validated configuration, and for every dotted key where its value came from.

    An origin is "default", "preset NAME", "preset NAME (miniature)", "--set", or the flag's name.
    """

    config: TrainConfig
    origins: dict[str, str]


def load_train_config(
    preset: str | Path,
    *,
    variant: str | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    miniature: bool = False,
    overrides_from: str = "--set",
) -> Resolved:
    """Resolve a training configuration; any mistake is a one-line ``UsageError``.

    Later wins: defaults, preset, its variant, with ``miniature`` the preset's and the variant's
    ``miniature:`` sections, ``overrides``, ``flags``.

    Args:
        preset: name of a shipped preset or path of a file; "NAME:VARIANT" also chooses the variant.
        variant: name of a variant of the preset; None takes the one in ``preset``, else the preset's default.
        overrides: "dotted.key=value" with the value in YAML, as given to ``--set``.
        flags: values by dotted key; None means that the flag was not given.
        miniature: the run happens on the built-in miniature.
        overrides_from: where messages say that ``overrides`` are from.
    """
    name, variant_in_name = split_variant(preset)
    layers = [
        *_preset_layers(read_preset(name), variant or variant_in_name, miniature),
        *((overrides_from, _parse_override(override, overrides_from)) for override in overrides),
        *(
            (_flag(key), _flatten({key: value}, _flag(key)))
            for key, value in (flags or {}).items()
            if value is not None
        ),
    ]
    values: Leaves = {}
    origins = dict.fromkeys(FIELDS, DEFAULT_ORIGIN)
    for origin, leaves in layers:
        values |= leaves
        origins |= dict.fromkeys(leaves, origin)
    resolved = Resolved(_validate(values, origins), origins)
    _refuse_idle_keys(resolved)
    return resolved


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    return sorted(path.stem for path in _presets_folder().glob("*.yaml"))


def preset_path(name: str | Path) -> Path:
    """The file of a preset named by a shipped name or by its own path; ``UsageError`` where there is none."""
    if name in preset_names():
        return _presets_folder() / f"{name}.yaml"
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise UsageError(f"Preset file {str(name)!r} does not exist.")
    if Path(__file__).with_name("comparisons").joinpath(f"{name}.yaml").is_file():
        raise UsageError(f"{name} is a comparison, not a preset: run it with `srpo eval compare --preset {name}`.")
    raise UsageError.unknown("preset", str(name), preset_names())


def split_variant(preset: str | Path) -> tuple[str, str | None]:
    """Split "lighting:dark" into name and variant; a file whose own name holds a colon stays whole."""
    name, colon, variant = str(preset).rpartition(":")
    if not colon or "/" in variant or Path(preset).is_file():
        return str(preset), None
    return name, variant


def read_preset(name: str | Path) -> Preset:
    """Read a preset by shipped name or path (without variant) and refuse what it does not know."""
    path = preset_path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Preset file {str(path)!r} cannot be read: {error}.") from error
    origin = f"preset {name}"
    content = _mapping(dialect.parse(text, origin), "the file", origin)
    variants = {
        str(label): _read_layer(_mapping(section, f"variants.{label}", origin), f"{origin}:{label}")
        for label, section in _mapping(content.pop("variants", None), "variants", origin).items()
    }
    default = content.pop("variant", None)
    if (default is None and variants) or (default is not None and default not in variants):
        known = ", ".join(variants) or "none"
        raise UsageError(f"variant from {origin} should name the default of its variants ({known}), not {default!r}.")
    return Preset(str(name), text, _read_layer(content, origin), variants, default)


def dump_yaml(resolved: Resolved) -> str:
    """The whole configuration as YAML, each value's origin in a comment; the text is itself a preset."""
    lines = ["# Every value of a training run and where it came from. This file is itself a preset."]
    lines += _dump_section(resolved.config.model_dump(mode="json"), resolved.origins)
    return "\n".join(lines) + "\n"


# Keys of the schema


def _walk(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Yield (dotted key, description) of every value below ``section`` and (dotted key, None) of sections."""
    for name, field in section.model_fields.items():
        key = prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield key, None
            yield from _walk(field.annotation, key + ".")
        else:
            yield key, field.description or ""


FIELDS = {key: text for key, text in _walk(TrainConfig) if text is not None}
"""Description of every value by dotted key."""

SECTIONS = [key for key, text in _walk(TrainConfig) if text is None]


# Reading layers


def _parse_override(override: str, origin: str) -> Leaves:
    key, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"--set takes key=value, not {override!r}; for instance --set train.steps=10.")
    # Alone, a dash is standard input, as everywhere on a command line; in YAML it would begin a list.
    value = (
        text
        if text == "-"
        else dialect.parse(text, f"--set {key} (quote text with braces or colons): the value {text}")
    )
    return _flatten({key.strip(): value}, origin)


def _read_layer(content: dict[Any, Any], origin: str) -> Layer:
    has_miniature = MINIATURE in content
    miniature = _flatten(_mapping(content.pop(MINIATURE, None), MINIATURE, origin), f"{origin} ({MINIATURE})")
    return Layer(_flatten(content, origin), miniature if has_miniature else None)


def _flatten(content: Mapping[Any, Any], origin: str, prefix: str = "") -> Leaves:
    leaves: Leaves = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key in FIELDS:
            leaves[key] = value
        elif key in SECTIONS:
            leaves |= _flatten(_mapping(value, key, origin), origin, key + ".")
        else:
            raise UsageError(_unknown_key(key, origin))
    return leaves


def _mapping(value: Any, key: str, origin: str) -> dict[Any, Any]:
    """``value`` as a mapping; nothing at all (only comments below a key) is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{key} from {origin} should hold keys of its own, not {dialect.inline(value)}.")
    return dict(value)


def _preset_layers(preset: Preset, variant: str | None, miniature: bool) -> list[tuple[str, Leaves]]:
    """The preset's layers from weak to strong, each with its origin."""
    origin = f"preset {preset.name}"
    layers = [(origin, preset.base)]
    variant = variant or preset.default_variant
    if variant is not None:
        if variant not in preset.variants:
            raise UsageError.unknown(f"variant of {origin}", variant, preset.variants)
        layers.append((f"{origin}:{variant}", preset.variants[variant]))
    plain = [(name, layer.values) for name, layer in layers]
    if not miniature:
        return plain
    is_miniature = preset.base.values.get("model.name") == MINIATURE
    for name, layer in layers:
        if layer.miniature is None and not is_miniature:
            able = [f"{preset.name}:{label}" for label, other in preset.variants.items() if other.miniature is not None]
            hint = f"these can: {', '.join(able)}" if able else "it has no `miniature:` section"
            raise UsageError(f"{name} cannot run on the built-in miniature; {hint}.")
    return plain + [(f"{name} ({MINIATURE})", layer.miniature or {}) for name, layer in layers]


# Checking


def _validate(values: Leaves, origins: Mapping[str, str]) -> TrainConfig:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    for section in (key for key in SECTIONS if "." not in key):
        nested.setdefault(section, {})  # so that a missing value is reported by its own key
    try:
        return TrainConfig.model_validate(nested)
    except ValidationError as error:
        raise UsageError(_first_problem(error, values, origins)) from error


def _first_problem(error: ValidationError, values: Leaves, origins: Mapping[str, str]) -> str:
    problems: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        problems.setdefault(_key_of(detail["loc"]), []).append(_plain(detail["msg"]))
    key, messages = next(iter(problems.items()))
    more = f" ({len(problems) - 1} more after it.)" if len(problems) > 1 else ""
    text = " or ".join(messages)
    if key not in FIELDS:  # a check of two fields, which names both
        return f"{text}.{more}"
    if key not in values:
        return f"{key} is missing: {FIELDS[key]}.{more}"
    value = dialect.inline(values[key])
    return f"{key} is {value}, from {origins[key]}: {text}. Meaning: {FIELDS[key]}.{more}"


def _plain(message: str) -> str:
    """A pydantic message in words that fit YAML."""
    message = re.sub("^(Value error, |(Input|Tuple|String) (?=should))", "", message)
    message = message.replace("Field required", "should have one more item").replace(" after validation", "")
    return message.replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")


def _key_of(location: tuple[int | str, ...]) -> str:
    """The dotted key of an error, without positions in lists and members of unions."""
    parts = [str(part) for part in location]
    keys = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((key for key in keys if key in FIELDS), "")


def _refuse_idle_keys(resolved: Resolved) -> None:
    """Refuse a knob that the user turned and that the chosen schedule or mode does not have."""
    schedule, mode = resolved.config.algorithm.schedule, resolved.config.train.mode
    method = resolved.config.algorithm.name
    for key, origin in resolved.origins.items():
        readers = next((names for start, names in _KEYS_OF_METHODS.items() if key.startswith(start)), (method,))
        if origin.startswith("--") and method not in readers:
            raise UsageError(
                f"{key} from {origin} has no effect while algorithm.name is {method!r}; add --set "
                f"algorithm.name={readers[0]}, or leave it out."
            )
        if origin.startswith("--") and key == "reward.pair_noise" and resolved.config.reward.pair == "words":
            raise UsageError(
                f"{key} from {origin} has no effect while reward.pair is 'words'; add --set reward.pair=picture, or "
                "leave it out."
            )
        if origin.startswith("--") and key.startswith("lora.") and mode != "lora":
            raise UsageError(
                f"{key} from {origin} has no effect while train.mode is {mode!r}; add --set train.mode=lora, or leave "
                "it out."
            )
        if origin.startswith("--") and key.startswith(_IDLE_KEYS[schedule]):
            other = next(name for name in _IDLE_KEYS if name != schedule)
            raise UsageError(
                f"{key} from {origin} has no effect while algorithm.schedule is {schedule!r}; "
                f"add --set algorithm.schedule={other}, or leave it out."
            )


# Words


def _presets_folder() -> Path:
    package = Path(__file__).parents[1]
    packaged = package / "presets"  # in a wheel; a checkout has the folder beside the package
    return packaged if packaged.is_dir() else package.parent / "presets"


def _flag(key: str) -> str:
    return _FLAGS.get(key) or "--" + key.rpartition(".")[2].replace("_", "-")


def _unknown_key(key: str, origin: str) -> str:
    if whole := next((field for field in FIELDS if key.startswith(f"{field}.")), None):
        return f"Unknown key {key!r} from {origin}: {whole} is set as a whole. Meaning: {FIELDS[whole]}."
    section, _, last = key.rpartition(".")
    known = [*FIELDS, *SECTIONS]
    near = get_close_matches(last, [name.rpartition(".")[2] for name in known], n=1)
    meant = [name for name in known if name.rpartition(".")[2] in near]
    meant = [name for name in meant if name.rpartition(".")[0] == section] or meant
    hint = f"Did you mean {' or '.join(meant)}?" if meant else "`srpo presets show realism` lists every key."
    return f"Unknown key {key!r} from {origin}. {hint}"


def _dump_section(content: Mapping[str, Any], origins: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, value in content.items():
        key = prefix + name
        if key in FIELDS:
            yield f"{indent + name}: {dialect.inline(value)}".ljust(48) + f"  # {origins[key]}"
        else:
            yield f"{indent + name}:"
            yield from _dump_section(value, origins, key + ".")
