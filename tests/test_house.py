"""House rules that can be read from the source: imports point one way, heavy ones stay out of the hall."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "srpo_cli"

LEAVES = {"errors", "registry", "trust"}
MAY_IMPORT = {  # room or file -> what of ours it may import beside itself; with a slash: one part of a room
    "__init__": set(),
    "__main__": {"cli"},
    "errors": set(),
    "registry": {"errors"},
    "trust": {"errors"},
    "config": {"errors"},
    "core": {"errors"},
    "metrics": {"core", *LEAVES},
    "models": {"core", "miniature.WEIGHTS", *LEAVES},
    "rewards": {"core", "miniature.WEIGHTS", *LEAVES},
    "algorithms": {"core", *LEAVES},
    "miniature": {"core", "metrics", *LEAVES},
    "miniature/build": {"core", "metrics", "models", "rewards", *LEAVES},  # trains what these two load
    "miniature/oracle": {"core", "metrics", "models", "rewards", *LEAVES},
    "miniature/measure": {"core", "metrics", "models", "rewards", *LEAVES},
    "runtime": {"core", "config", "miniature", *LEAVES},  # its weights for the doctor, its prompts
    "pages": {"metrics", "runtime.folder", *LEAVES},
    "study": {"metrics", "runtime", "__version__", *LEAVES},
    "recipes": {
        "algorithms",
        "models",
        "rewards",
        "metrics",
        "runtime",
        "miniature",
        "pages",
        "core",
        "config",
        "__version__",
        *LEAVES,
    },
    "cli": {"recipes", "study", "pages", "runtime", "config", "__version__", *LEAVES},
}
LIGHT = ("__init__", "__main__", "errors", "registry", "trust", "config", "cli")
HEAVY = {
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "open_clip",
    "accelerate",
    "peft",
    "numpy",
    "pandas",
    "PIL",
}
PRIVATE = ("click", "typer.core", "typer.main", "typer.models", "typer._")


def modules() -> list[str]:
    """Every module file below the package, relative to it."""
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """The longest key of MAY_IMPORT that the module file lies in."""
    stem = module.removesuffix(".py")
    rooms = [room for room in MAY_IMPORT if stem == room or stem.startswith(room + "/")]
    assert rooms, f"{module} is in no room that this test knows"
    return max(rooms, key=len)


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_level_imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names imported when the module is; those under ``if TYPE_CHECKING`` are not."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        for_types_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not for_types_only and not isinstance(node, functions):
            yield from imports(node)


def parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


def test_there_are_modules_to_read():
    assert "cli/app.py" in modules()


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module):
    room = room_of(module)
    allowed = {room.partition("/")[0], *MAY_IMPORT[room]}
    for name in imports(parse(module)):
        package, _, ours = name.partition(".")
        if package == "srpo_cli":
            assert any(f"{ours}.".startswith(f"{part}.") for part in allowed), f"{module} imports {name}"


@pytest.mark.parametrize("module", [module for module in modules() if room_of(module) in LIGHT])
def test_light_rooms_import_nothing_heavy_at_the_top(module):
    heavy_rooms = tuple(f"srpo_cli.{room}." for room in MAY_IMPORT.keys() - set(LIGHT))
    for name in top_level_imports(parse(module)):
        assert name.partition(".")[0] not in HEAVY, f"{module} imports {name}"
        assert not name.startswith(heavy_rooms), f"{module} imports {name}"


@pytest.mark.parametrize("module", modules())
def test_a_module_says_what_it_is_and_uses_public_names(module):
    tree = parse(module)
    assert ast.get_docstring(tree), f"{module} has no docstring"
    assert Path(module).stem != "utils"
    for name in imports(tree):
        assert not name.startswith(PRIVATE), f"{module} imports {name}"
