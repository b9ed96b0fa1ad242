"""The YAML that presets and ``--set`` are written in: 5e-6 is a number, ``no`` is a word, no key comes twice.

PyYAML reads YAML 1.1, where 5e-6 is text and ``no`` is false; both have cost people runs. This is YAML 1.2 in
the two places where it matters.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from srpo_cli.errors import UsageError

_FLOAT_TAG, _BOOL_TAG = "tag:yaml.org,2002:float", "tag:yaml.org,2002:bool"
_FLOAT = re.compile(r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)$|\.nan$")
_FLOAT_STARTS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            message = f"key {twice!r} appears twice"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if tag not in {_FLOAT_TAG, _BOOL_TAG}]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, _FLOAT_STARTS)
_Loader.add_implicit_resolver(_BOOL_TAG, re.compile("(true|false)$"), list("tf"))


class _Dumper(yaml.SafeDumper):
    """Keeps PyYAML's own resolvers, so that text is quoted wherever either dialect would misread it."""


_Dumper.add_implicit_resolver(_FLOAT_TAG, _FLOAT, _FLOAT_STARTS)


def parse(text: str, origin: str) -> Any:
    """Read one YAML document; ``UsageError`` naming ``origin``, line and column where it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}, " if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{origin} is not YAML: {where}{problem}.") from error


def inline(value: Any) -> str:
    """``value`` as YAML on one line, to be read back by :func:`parse`."""
    text = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.strip()[1:-1]
