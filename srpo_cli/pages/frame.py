"""What all pages share: their templates, style and scripts, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from srpo_cli.pages.writing import plain


def templates() -> Environment:
    """The package's templates; whatever text goes into one is escaped, and what is missing is an error."""
    return Environment(
        loader=PackageLoader("srpo_cli.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )


def asset(environment: Environment, name: str) -> Markup:
    """A style sheet or script of the package as it is, not as a template."""
    source, _, _ = environment.loader.get_source(environment, name)
    return Markup(source)


def policy(style: str, *scripts: str) -> str:
    """A content security policy: nothing but this style, these scripts, and pictures beside the page or in it."""
    allowed = {
        "default-src": "'none'",
        "img-src": "'self' file: data:",
        "style-src": _hash(style),
        "script-src": " ".join(map(_hash, scripts)),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{kind} {sources}" for kind, sources in allowed.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
