"""Other people's rewards: a Python file that the user agreed to run, or an entry point of an installed package.

docs/plugins.md is the interface in one page.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Self

import torch
from torch import Tensor, nn

from srpo_cli.errors import MissingError, SrpoError, UsageError, one_line
from srpo_cli.registry import REWARDS, InstalledPlugin, PluginFile
from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.preprocess import Images
from srpo_cli.rewards.weights import Announce, sha256
from srpo_cli.trust import read_trusted

Judge = Callable[[Images, Sequence[str]], Tensor]
"""What :meth:`Reward.__call__` is, as a function."""


class FunctionReward(Reward):
    """A reward that is one function; :func:`reward` makes it."""

    def __init__(self, judge: Judge, *, unit: str, reads_text: bool, differentiable: bool) -> None:
        self.judge = judge
        self.name = judge.__name__
        self.unit, self.reads_text, self.differentiable = unit, reads_text, differentiable

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return self.judge(images, prompts)


def reward(*, unit: str, reads_text: bool, differentiable: bool) -> Callable[[Judge], FunctionReward]:
    """Decorator that makes a reward of a function ``(images, prompts) -> (B,)``; see :class:`Reward` for the words.

    Nothing has a default, because a wrong guess would show only in what a training does.
    """
    return lambda judge: FunctionReward(judge, unit=unit, reads_text=reads_text, differentiable=differentiable)


class PluginReward(Reward):
    """Somebody else's reward: what it returns is checked before anything is computed from it.

    Args:
        inner: the reward itself; its parameters are frozen here.
        name: what the user calls it.
        record: which code it is; recorded before what ``inner`` says of its weights.
        file: its code, so that an error inside can be told with its line.
    """

    def __init__(self, inner: Reward, name: str, record: str, file: Path) -> None:
        self.inner, self.name = inner, name
        self.unit, self.reads_text, self.differentiable = inner.unit, inner.reads_text, inner.differentiable
        self.preprocess, self.modes, self.thread_safe = inner.preprocess, inner.modes, inner.thread_safe
        self.weights = f"{record}; {inner.weights}" if inner.weights else record
        self._record, self._file = record, file
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        with _blamed_on(self.name, self._file):
            answer = self.inner(images, prompts)
        return self._checked(answer, images)

    def scores(self, images: Images, *texts: Sequence[str]) -> tuple[Tensor, ...]:
        with _blamed_on(self.name, self._file):
            answers = self.inner.scores(images, *texts)
        if len(answers) != len(texts):
            raise SrpoError(f"the plug-in {self.name} scored {len(answers)} of {len(texts)} lists of texts")
        return tuple(self._checked(answer, images) for answer in answers)

    def prepare(self, texts: Sequence[str]) -> None:
        with _blamed_on(self.name, self._file):
            self.inner.prepare(texts)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.inner.parameters()

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def via(self, mode: str | None) -> Self:
        return type(self)(self.inner.via(mode), self.name, self._record, self._file)

    def _checked(self, answer: object, images: Images) -> Tensor:
        """What the plug-in returned, (B,) float32 or wider where the pictures are; SrpoError if it is no such thing."""
        wrong = f"the plug-in {self.name} returned"
        if not isinstance(answer, Tensor):
            raise SrpoError(f"{wrong} a {type(answer).__name__}: it must return a tensor, one reward a picture")
        if tuple(answer.shape) != (len(images),):
            raise SrpoError(f"{wrong} shape {tuple(answer.shape)} for {len(images)} pictures: one reward a picture")
        if not answer.is_floating_point():
            raise SrpoError(f"{wrong} {answer.dtype}: rewards are floating-point numbers")
        finite = answer.isfinite()
        # A model that has diverged makes pictures that nobody can judge; the training says that itself.
        if not finite.all() and all(image.isfinite().all() for image in images):
            number = int((~finite).nonzero()[0])
            raise SrpoError(f"{wrong} {answer[number].item()} for picture {number}: rewards are finite")
        wants_gradient = torch.is_grad_enabled() and any(image.requires_grad for image in images)
        if self.differentiable and wants_gradient and not answer.requires_grad:
            raise SrpoError(f"{wrong} rewards without gradient and says differentiable=True: one of them is wrong")
        return answer.to(images[0].device, torch.promote_types(answer.dtype, torch.float32))


def load_plugin(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    announce: Announce | None = None,
) -> PluginReward:
    """The reward that a Python file or an installed package offers under ``name``.

    Args:
        name: PATH.py (its ``load``), PATH.py:NAME, or the name of an entry point of the group ``srpo.rewards``.
        weights, device, dtype, announce: handed to the plug-in's loader.

    Raises UsageError for a file that the user has not agreed to run, before any of it runs, and for one that defines
    no reward; MissingError for a package that it imports and that is not here; SrpoError for any error inside.
    """
    plugin = REWARDS.plugin(name)
    load = _from_file if isinstance(plugin, PluginFile) else _from_package
    found, record, file = load(name, plugin)
    with _blamed_on(name, file):
        inner = _make(found, name, weights, device, dtype, announce)
    return PluginReward(inner, name, record, file)


def _from_file(name: str, plugin: PluginFile) -> tuple[object, str, Path]:
    """What the file defines under the attribute, the record of its content, and its place."""
    source, digest = read_trusted(plugin.path)
    file = plugin.path.absolute()
    with _blamed_on(name, file):
        module = _execute(source, file, f"srpo_plugin_{digest}")
    if not hasattr(module, plugin.attribute):
        rewards = [key for key, value in vars(module).items() if isinstance(value, Reward)]
        instead = f"name one of its rewards, as in {plugin.path}:{rewards[0]}" if rewards else "see docs/plugins.md"
        raise UsageError(f"the plug-in {plugin.path} defines no {plugin.attribute!r}: {instead}")
    return getattr(module, plugin.attribute), f"{file.name} sha256:{digest}", file


def _execute(source: bytes, file: Path, name: str) -> ModuleType:
    """Run exactly this source as a module.

    The import system itself would rather run a compiled copy from ``__pycache__``, which nobody has read.
    """
    module = module_from_spec(spec_from_file_location(name, file))
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        exec(compile(source, str(file), "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_package(name: str, plugin: InstalledPlugin) -> tuple[object, str, Path]:
    """What the entry point names, the record of its package and module, and the module's place."""
    with _blamed_on(f"{name} of {plugin.package}", Path(plugin.entry.module)):
        found = plugin.entry.load()
        file = Path(sys.modules[plugin.entry.module].__file__)
    return found, f"{plugin.package}, {file.name} sha256:{sha256(file)}", file


def _make(found: object, name: str, weights: str | Path | None, *how: object) -> Reward:
    """The reward that a plug-in defines: one that is ready, or what its loader makes."""
    if isinstance(found, Reward):
        if weights is not None:
            raise UsageError(f"the plug-in {name} takes no weights, and is given {weights}: leave them out")
        return found
    arguments = (name, None if weights is None else Path(weights), *how)
    if not callable(found) or not _takes(found, arguments):
        raise UsageError(
            f"the plug-in {name} is neither a Reward nor a loader (name, weights, device, dtype, announce); a function "
            "(images, prompts) becomes a Reward by @srpo_cli.rewards.plugins.reward"
        )
    made = found(*arguments)
    if not isinstance(made, Reward):
        raise UsageError(f"the plug-in {name} is a loader that returned a {type(made).__name__}, not a Reward")
    return made


def _takes(function: Callable, arguments: tuple) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError):  # the latter from a callable that does not say what it takes
        return False
    return True


@contextmanager
def _blamed_on(name: str, file: Path) -> Iterator[None]:
    """Turn whatever a plug-in raises into one line with the place in its ``file``; what is ours stays as it is."""
    try:
        yield
    except (SrpoError, torch.OutOfMemoryError):
        raise
    except ModuleNotFoundError as error:
        line = _line(error, file)
        raise MissingError(f"the plug-in {name} needs a package that is not here{line}: {error}") from error
    except (Exception, SystemExit) as error:
        kind, line = type(error).__name__, _line(error, file)
        message = error.msg if isinstance(error, SyntaxError) else one_line(error)
        raise SrpoError(f"the plug-in {name} failed{line}: {kind}: {message}") from error


def _line(error: BaseException, file: Path) -> str:
    """Where in the file, as " at FILE:LINE"; empty for an error that was not raised below it."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f" at {file}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f" at {file}:{lines[-1]}" if lines else ""
