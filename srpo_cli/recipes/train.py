"""Train: load, measure the base, then roll out, noise, step, recover, judge and update until the target is met."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from srpo_cli.algorithms.base import Rollout
from srpo_cli.algorithms.judging import Captions
from srpo_cli.config.load import Resolved, dump_yaml
from srpo_cli.config.schema import TrainConfig
from srpo_cli.core.target import Target, caption_margin
from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.metrics.guard import Place
from srpo_cli.models.quantised import check_float8_rollouts
from srpo_cli.pages.training import write_training_report
from srpo_cli.recipes.drawing import Drawing
from srpo_cli.recipes.encodings import EncodedPictures, EncodedPrompts, cache_folder
from srpo_cli.recipes.figures import GAP, OtherPrompts
from srpo_cli.recipes.guard import PANEL_PROMPTS, make_guard
from srpo_cli.recipes.guard import Plan as GuardPlan
from srpo_cli.recipes.parts import (
    Parts,
    Prompts,
    check_miniature_prompts,
    chunks,
    fingerprint,
    frozen_parameters,
    load_prompts,
    make_parts,
)
from srpo_cli.recipes.pictures import Files, Photographs, PictureSource, open_pictures
from srpo_cli.recipes.placement import hold, prepare_model
from srpo_cli.recipes.plan import plan_run
from srpo_cli.recipes.report import BASE, BEFORE_AFTER, TUNED, Report
from srpo_cli.recipes.resume import Resumed, digest, resume_from
from srpo_cli.recipes.run_prompts import RunPrompts
from srpo_cli.recipes.target import WRONG_CAPTIONS, holds_captions, make_target, warn_of_target
from srpo_cli.recipes.weights import Weights
from srpo_cli.runtime.average import WeightAverage
from srpo_cli.runtime.checkpoints import (
    ROLLOUTS,
    Checkpoint,
    link_best,
    list_checkpoints,
    save_checkpoint,
)
from srpo_cli.runtime.devices import best_device
from srpo_cli.runtime.distributed import Ranks, join_ranks
from srpo_cli.runtime.folder import SUMMARY, RunFolder, locked
from srpo_cli.runtime.ledger import Ledger
from srpo_cli.runtime.plan import GIB, Plan, out_of_memory
from srpo_cli.runtime.progress import StepProgress
from srpo_cli.runtime.quiet import quiet_libraries
from srpo_cli.runtime.seeding import generator
from srpo_cli.runtime.signals import StopRequest, stop_on_signals

__all__ = ["BEFORE_AFTER", "Outcome", "Run", "resume_command", "train"]

MARGIN = "held_margin"  # by which captions are held; the guard's caption_margin is over another wrong caption
_FIGURE = "guard/"  # before the names of the guard's figures, while they travel with a step's other means
_KEPT = ("adam", "gradients", "batch_branches")  # what a memory plan settles and the last bits depend on


_Measure = Callable[[Tensor, Sequence[str], Sequence[Tensor]], Tensor]


class _Look(NamedTuple):
    """What is seen in B pictures: reward, gap and held caption margin, (B,) each, and the guard's figures, (B, K)."""

    reward: Tensor
    gap: Tensor
    margin: Tensor | None
    figures: Tensor | None


class _NotFiniteError(SrpoError):
    """A step that all ranks give up."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its folder, its summary if it got there, and the process's exit code."""

    folder: Path
    summary: dict[str, Any] | None
    exit_code: int


def train(
    resolved: Resolved,
    output: Path,
    *,
    resume: bool = False,
    download: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run a training from its configuration, or go on with the one in ``output``.

    Where several processes are started, all call this, and rank 0 returns the summary.

    Args:
        resolved: the configuration; with ``resume`` that of the run itself.
        output: the run's folder, new, or with ``resume`` the run that is continued.
        download: fetch weights and prompts that are not here, each announced by name and size.
        quiet: no progress.
        say: where lines for the user go.

    Raises SrpoError for what a user can cause; the run folder keeps all that was finished.
    """
    quiet_libraries()
    config, device = resolved.config, best_device()
    with stop_on_signals() as stop, join_ranks(device) as ranks, ExitStack() as kept:
        folder = RunFolder(Path(ranks.from_rank_0(str(output))))  # a name with the time in it may differ between ranks
        quiet = quiet or not ranks.leads
        with ranks.together():
            resumed = Resumed(None, config.train.batch_size * ranks.size)
            if resume:
                if ranks.leads:
                    kept.enter_context(locked(folder.path))
                resumed = resume_from(folder, config, ranks)
            elif ranks.leads:
                folder.check_free()
            tell = (lambda _: None) if quiet else say
            warn = say if ranks.leads else tell
            run = Run(config, folder, resumed, ranks, tell, warn, announce=warn if download else None)
            if ranks.leads and resume:
                folder.go_on(dump_yaml(resolved))
            elif ranks.leads:
                folder.start(dump_yaml(resolved), processes=ranks.size, device=device.type, batch=run.batch)
                kept.enter_context(locked(folder.path))
                run.keep_prompts()
        run.prepare(stop)
        with StepProgress(config.train.steps, run.step, quiet) as progress:
            run.loop(stop, progress)
        summary = run.conclude(stop)
        ranks.wait()
    if stop.signal and not summary:
        if ranks.leads:
            say(f"stopped by {stop.signal.name} after step {run.step}; go on with: {resume_command(folder.path)}")
        return Outcome(folder.path, None, stop.exit_code)
    return Outcome(folder.path, summary, 0)


def resume_command(output: Path) -> str:
    """What a user types to go on with a run."""
    return f"srpo train --resume {shlex.quote(str(output))}"


class Run:
    """One training run: the parts, where it stands, and what a step does.

    Args:
        config: all that the run does.
        folder: where it is written.
        resumed: where it stands, and how many rollouts a step has over all processes.
        ranks: the processes.
        say: where lines for the user go.
        warn: where those go that nobody should miss who asked for quiet; None: there, too.
        announce: told about a download before it starts; None: nothing is downloaded.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        resumed: Resumed,
        ranks: Ranks,
        say: Callable[[str], None],
        warn: Callable[[str], None] | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        self.config, self.folder, self.ranks, self.say, self.warn = config, folder, ranks, say, warn or say
        self.device, self.seed, self.batch = ranks.device, config.train.seed, resumed.batch
        checkpoint = resumed.checkpoint
        self.plan = self._settle_plan(checkpoint)
        self.settings = self.plan.settings
        if self.plan.memory_gib:
            room = self.plan.machine.memory / GIB
            say(f"memory plan: {self.plan.name}, {self.plan.total_gib:.1f} of {room:.1f} GiB ({self.plan.why})")
        self.guard_plan = self._plan_guard(checkpoint)
        prompts = self._load_prompts(announce)
        self.pictures = self._open_pictures(prompts.train)
        self.prompts = RunPrompts(config, prompts, self.pictures, self.batch, self.guard_plan.calibration)
        if len(self.prompts.held_out) < config.evaluation.prompts:
            asked = config.evaluation.prompts
            say(f"{len(self.prompts.held_out)} of {asked} prompts to measure by: of a file every eighth is held out")
        if config.model.name == "miniature" and self.device.type == "cpu":
            # Its matrices are too small for a second thread to pay, and last bits must not depend on the machine.
            torch.set_num_threads(1)
        with self._memory():
            self._load(checkpoint, announce)
        self.saved = self.step

    def _settle_plan(self, checkpoint: Checkpoint | None) -> Plan:
        """The memory plan, the same on all ranks; what rounds in it stays as the checkpoint was made."""
        config, ranks = self.config, self.ranks
        if checkpoint:
            memory = config.memory.model_copy(update=checkpoint.state().get("settled", {}))
            config = config.model_copy(update={"memory": memory})
        with ranks.together():
            if config.rollout.dtype == "float8":
                check_float8_rollouts(self.device, config.lora.base if config.train.mode == "lora" else "model")
            plan = plan_run(config, self.device, ranks.size, ranks.local_size)
        others = ranks.gather(plan.settings)
        for rank, settings in enumerate(others):
            if settings != others[0]:
                raise UsageError(
                    f"the machine of rank {rank} would take plan {settings}, that of rank 0 {others[0]}: set "
                    "memory.plan, memory.adam and memory.micro_batch to what fits both"
                )
        return plan

    def _plan_guard(self, checkpoint: Checkpoint | None) -> GuardPlan:
        """What the guard may spend; of a run that goes on as it was begun, which rank 0 knows."""
        if checkpoint is None:
            return GuardPlan.of(self.config, self.batch, self.ranks.size)
        with self.ranks.together():
            plan = GuardPlan.as_begun(self.config, self.batch, self.ranks.size, self.folder.path)
        return self.ranks.from_rank_0(plan)

    def _load(self, checkpoint: Checkpoint | None, announce: Callable[[str], None] | None) -> None:
        """Everything that needs memory."""
        config, ranks = self.config, self.ranks
        with ranks.together():  # all have their files before any waits for the others
            self.parts = self._make_parts(checkpoint, announce)
        self.model, self.algorithm = self.parts.model, self.parts.algorithm
        self.encoded = self._encode_pictures()
        prepare_model(self.model, config, self.settings, self.device)
        self.data = self._data()
        self.trained = hold(self.parts.loaded, config, self.settings, ranks)
        self.drawing = Drawing(self.parts, config, self.trained)
        self.policy = self.drawing.policy
        if len(config.reward.parts) > 1:
            self.say(f"reward: {self._reward}")
        self.model.use_attention(config.model.attention)
        self.average = self._make_average()
        self.weights = Weights(config, self.model, self.trained, self.average)
        self.report = Report(self.parts, config, self.prompts.held_out, self.folder)
        with ranks.together():
            self.guard = make_guard(
                config,
                self.guard_plan,
                self.parts,
                self.prompts.judged,
                self.prompts.panel,
                self.batch,
                self.folder,
                ranks,
                self.warn,
                announce,
            )
        if self.guard_plan.shortfall:
            self.say(f"guard: off, {self.guard_plan.shortfall}")
        self._other_prompts = OtherPrompts(self.prompts.train)
        warn_of_target(config.algorithm, self.warn)
        self._holds_captions = holds_captions(config.algorithm, self.parts.reward, self._other_prompts, self.warn)
        self._captions_weight = 0.0
        self.ledger = Ledger()
        self.prepared = self.ledger.state_dict()
        """What was spent before the first step."""
        self.target: Target | None = None
        self.step, self.stopped_by, self._updated = 0, "", False
        self._stop, self._may_be_asked = StopRequest(), True
        self.rollouts: list[Rollout] = []
        self.gaps: list[Tensor] = []
        if checkpoint:
            self._restore(checkpoint)
        self.parts.reward.prepare(self._texts())

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        return self.trained.parameters

    # --- parts ----------------------------------------------------------------------------------------------------

    def _load_prompts(self, announce: Callable[[str], None] | None) -> Prompts:
        config = self.config
        source = config.prompts
        if source.source == "-" and self.folder.prompts.exists():  # a run that goes on: standard input was read
            source = source.model_copy(update={"source": str(self.folder.prompts)})

        def load() -> Prompts:
            watched = PANEL_PROMPTS if self.guard_plan.calibration else 0
            held_out = max(config.evaluation.prompts, config.samples.count, watched)
            split = config.evaluation.split
            return load_prompts(source, config.model.name, held_out, split, self.seed, announce)

        if source.source != "-":
            return load()
        with self.ranks.together():
            prompts = load() if self.ranks.leads else None
        return self.ranks.from_rank_0(prompts)

    def keep_prompts(self) -> None:
        """Write prompts that came through standard input into the run's folder, so that it can be gone on with."""
        if self.config.prompts.source == "-":
            self.folder.keep_prompts(self.prompts.in_order)

    def _open_pictures(self, captions: list[str]) -> PictureSource | None:
        """The pictures that stand for rollouts; the miniature's world must know what they are said to show."""
        pictures = open_pictures(self.config, captions)
        if isinstance(pictures, Photographs):
            check_miniature_prompts(list(pictures.prompts))
        elif isinstance(pictures, Files) and self.config.model.name == "miniature":
            check_miniature_prompts([caption for _, caption in pictures.items])
        return pictures

    def _make_parts(self, checkpoint: Checkpoint | None, announce: Callable[[str], None] | None) -> Parts:
        """Text encoders first, for the prompts that this run consumes, then all the rest without them."""
        config, folder = self.config, cache_folder(self.config)
        self.encoded_prompts = encoded = None
        if folder:
            self.encoded_prompts = encoded = EncodedPrompts(config, folder, self.device, announce)
            encoded.encode_ahead(self.prompts.encoded, self.ranks, self.say)
        tuned = checkpoint.transformer if checkpoint else None
        parts = make_parts(config, self.settings, self.ranks, tuned, text_encoders=encoded is None, announce=announce)
        if encoded:
            parts.model.release_text_encoders(encoded)
        return parts

    def _texts(self) -> list[str]:
        """Every text that the reward is asked for in training."""
        words = self.algorithm.control_words
        prompts = self.prompts.judged
        wrong = self._wrong_captions([*self.prompts.trained_on, *self.prompts.calibration])
        return [
            *prompts,
            *dict.fromkeys(chain(*wrong)),
            *(text for word in words.all for text in words.texts(word, prompts)),
        ]

    @property
    def _reward(self) -> str:
        """What is trained, in words."""
        added = ", their advantages added" if self.policy and self.policy.mixed else ""
        return f"{self.parts.reward.name}{added}"

    def _encode_pictures(self) -> EncodedPictures | None:
        if not self.pictures:
            return None
        autoencoder = fingerprint(self.model.vae.parameters())
        folder = cache_folder(self.config)
        return EncodedPictures(self.pictures, self.model, self.config.model.size, folder, autoencoder)

    def _make_average(self) -> WeightAverage | None:
        decay = self.config.train.ema
        if decay is None:
            return None
        on_the_host = "cpu" if self.settings.plan == "streamed" else None
        return WeightAverage(self.parameters, decay, self.trained.master, on_the_host)

    def _data(self) -> dict[str, str]:
        """Digests of what the configuration only names, and what a run may not lose under way."""
        text = json.dumps([self.prompts.train, self.pictures.digest() if self.pictures else ""])
        prompts = hashlib.sha256(text.encode()).hexdigest()[:16]
        frozen = fingerprint(frozen_parameters(self.parts))
        encoders = self.encoded_prompts.fingerprint if self.encoded_prompts else ""
        return {"prompts": prompts, "reward": self.parts.reward.weights, "frozen": frozen + encoders}

    # --- where it stands ------------------------------------------------------------------------------------------

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        for name, what in (
            ("prompts", "the prompts or pictures"),
            ("reward", "the weights or the code of the reward"),
            ("frozen", "the files of the model or the reward"),
        ):
            if state.get(name) != self.data[name]:
                raise UsageError(f"{what} have changed since {checkpoint.path} was written: start a new run")
        self.weights.restore(checkpoint, state)
        self.step = checkpoint.step
        self._load_state(state)
        if self._replays:
            self._recall_rollouts(checkpoint)
        self._note_target()

    def _state(self) -> dict[str, Any]:
        """Where the run stands, but for weights and optimizer."""
        return {
            "target": self.target.state_dict() if self.target else None,
            "ledger": self.ledger.state_dict(),
            "prepared": self.prepared,
            "evaluator": self.report.evaluator.state_dict(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.ledger.load_state_dict(state["ledger"])
        self.prepared = state.get("prepared", self.prepared)
        self.report.evaluator.load_state_dict(state["evaluator"])
        if state["target"]:
            self.target = Target.from_state_dict(state["target"])

    @property
    def _replays(self) -> int:
        return self.config.rollout.replay

    # --- before ---------------------------------------------------------------------------------------------------

    def prepare(self, stop: StopRequest) -> None:
        """Measure and draw the untrained model, and set the target; a run that goes on has all this."""
        if self.step:
            if self.ranks.leads:
                self.folder.truncate_log(self.step)
            self.guard.restore(self.step)
            self._note_guard()
            if self.stopped_by == "guard" and self.ranks.leads:
                self.say("the guard has ended this run, so it does not go on; a new one with guard.action=warn would")
            return
        with self._as_measured():
            with self.ranks.together():
                if self.ranks.leads:
                    self.folder.truncate_log(0)
                    stop.unless_asked(self._measure_base)
            # Where ranks share it, none may leave in the middle of it.
            stop.unless_asked(self._calibrate) if self.ranks.size == 1 else self._calibrate()
        self.prepared = self.ledger.state_dict()

    @contextmanager
    def _as_measured(self) -> Iterator[None]:
        """Averaged weights where there are any, all of them ready for passes that rank 0 makes alone."""
        with self._memory(), self.average.applied() if self.average else nullcontext():
            self.trained.gather()
            try:
                yield
            finally:
                self.trained.release()

    @contextmanager
    def _memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise SrpoError(out_of_memory(self.plan, self.config)) from error

    def _measure_base(self) -> None:
        if prompts := self.report.evaluator.prompts:
            self.say(f"measuring the base model on {len(prompts)} held-out prompts")
        self.report.evaluate(BASE)
        self.report.sample(self.step)

    def _calibrate(self) -> None:
        """Set target and guard by what the untrained model draws, with and without the positive word."""
        algorithm = self.config.algorithm
        prompts = self.prompts.calibration
        if not prompts:
            return
        for_target = len(prompts) if algorithm.target == "auto" or self._holds_captions else 0
        to_ask = prompts[: max(for_target, self.guard_plan.calibration)]
        with self.ledger if algorithm.target is not None else self.guard.timed(beside=True):
            base, base_figures = self._calibration(prompts, prompts)
            asked, asked_figures = base[:0], base_figures[:0]
            if to_ask:
                asked, asked_figures = self._calibration(self.algorithm.control_words.asked(to_ask), to_ask)
        if algorithm.target is not None:
            drawn = len(base) + for_target
            self.ledger.rollouts += drawn
            self.ledger.forwards += self.config.rollout.steps * drawn
            self.ledger.reward_calls += drawn
            rollouts = self.batch // algorithm.group
            self.target = make_target(algorithm, base, asked, rollouts, self.say, self.warn)
        if self.guard_plan.calibration:
            with self.guard.timed(beside=True):
                draw = partial(self.drawing.pictures, purpose="panel")
                self.guard.calibrate(base_figures[: len(asked)], asked_figures, draw)

    def _wrong_captions(self, prompts: Sequence[str]) -> list[list[str]]:
        """Other prompts that pictures of these are held against, a column each; none where nothing is held."""
        return self._other_prompts.of(prompts, WRONG_CAPTIONS) if self._holds_captions else []

    def _calibration(self, asked: list[str], prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Pictures that are drawn as rollouts are, for what is ``asked``, measured and judged by the prompts.

        Returns their gap, and caption margin where it is held, (N, 1 or 2), and the guard's figures, where there is
        one, and the gap, (N, K); on every rank, of which each draws its share.
        """
        own, share = list(self.ranks.share(len(prompts))), []
        measure = self.guard.figures.measure if self.guard_plan.calibration else None
        with self.ranks.together():  # none waits for the pictures of one that has failed
            for part, pictures in self.drawing.pictures([asked[i] for i in own], own, "calibration"):
                drawn_for = [prompts[i] for i in own[part]]
                draws = [generator(self.seed, "calibration augmentation", i) for i in own[part]]
                look = self._look(pictures, drawn_for, draws, measure)
                gap = look.gap[:, None].float()
                held = gap if look.margin is None else torch.cat([gap, look.margin[:, None].float()], 1)
                figures = gap if look.figures is None else torch.cat([look.figures, gap], 1)
                share.append((held.cpu(), figures.cpu()))
        drawn = [one for of_rank in self.ranks.gather(share) for one in of_rank]
        return torch.cat([held for held, _ in drawn]), torch.cat([figures for _, figures in drawn])

    def _look(
        self, pictures: Tensor, prompts: Sequence[str], draws: list[torch.Generator], measure: _Measure | None
    ) -> _Look:
        """What the reward, and with ``measure`` the guard, see in decoded pictures."""
        captions = self.guard.figures.captions(prompts) if measure else [prompts]
        wrong = self._wrong_captions(prompts)
        *rewards, gap = self.algorithm.measure(pictures, *captions, *wrong, generator=draws)
        own, others = rewards[: len(captions)], rewards[len(captions) :]
        margin = caption_margin(own[0], *others) if others else None
        return _Look(own[0], gap, margin, measure(pictures, prompts, own) if measure else None)

    # --- the loop -------------------------------------------------------------------------------------------------

    def loop(self, stop: StopRequest, progress: StepProgress) -> None:
        """Take steps until the last one, the target or a signal; whatever ends them, the completed ones are saved."""
        self._stop = stop
        while self.step < self.config.train.steps and not self.stopped_by and not self._asked_to_stop():
            before = self._remember()
            try:
                with self.ledger, self._memory():
                    record = self.take_step()
            except _NotFiniteError as error:  # every rank meets it
                if self._take_back(before):
                    self._save()
                raise self.ranks.common(error) from None
            except Exception:
                with suppress(Exception):  # what to tell is why the step failed
                    if self._take_back(before) and self._saves_alone:
                        self._save()
                raise
            self.step += 1
            self._note_target()
            self._record(record, progress)
        self._save()

    def _note_target(self) -> None:
        """End the run at its target; one that holds it only fades its rate."""
        if self.target and self.target.reached and self.config.algorithm.at_target == "stop":
            self.stopped_by = "target"

    def _note_guard(self) -> None:
        if self.guard.stopped:
            self.stopped_by = "guard"

    def _asked_to_stop(self) -> bool:
        """Whether a signal reached any rank; all then stop at the same step, with the same exit code.

        An update carries along whether it did, so that ranks need not ask one another before each step.
        """
        if self.ranks.size > 1 and not self._may_be_asked:
            return False
        self._may_be_asked = False
        if number := self.ranks.largest(self._stop.signal or 0):
            self._stop.signal = Signals(number)
        return bool(number)

    def _record(self, record: dict[str, Any], progress: StepProgress) -> None:
        """Log a completed step, and save, draw and evaluate where it is time to."""
        config = self.config
        if figures := record.pop("figures"):
            self.guard.note(self.step - 1, {**figures, GAP: record[GAP]})
        if self.ranks.leads:
            self.folder.log(record)  # before the step is saved: one that cannot be logged is done again
        self._consult_guard()
        if self.ranks.leads:
            progress.update(self.step, {k: record[k] for k in ("reward", GAP, "photo_distance")}, self._is_last)
        if self._is_last:
            return
        draw, evaluate = self._is_time(config.samples.every), self._is_time(config.evaluation.every)
        if self._is_time(config.checkpoint.every) or ((draw or evaluate) and not self._saves_alone):
            self._save()
        if not draw and not evaluate:
            return
        try:
            with self.ranks.together(), self._as_measured():
                if draw and self.ranks.leads:
                    self.report.sample(self.step)
                if evaluate and self.ranks.leads:
                    self.report.evaluate(f"evaluation-{self.step:06d}.json")
        except Exception:
            with suppress(Exception):  # what to tell is why it failed
                self._save()
            raise

    def _consult_guard(self) -> None:
        """Have the guard check the run where it is time to, and end it if the guard says so."""
        if not self.guard.is_due(self.step, self._is_last):
            return
        if not self.guard.wants_panel(self.step):
            self.guard.check(self.step)
        else:
            try:
                with self._as_measured():
                    self.guard.check(self.step, partial(self.drawing.pictures, purpose="panel"))
            except Exception:
                with suppress(Exception):  # what to tell is why it failed
                    if self._saves_alone:
                        self._save()
                raise
        self._note_guard()

    @property
    def _is_last(self) -> bool:
        return bool(self.stopped_by) or self.step == self.config.train.steps

    @property
    def _saves_alone(self) -> bool:
        """Whether this rank can write a checkpoint when another one is in trouble."""
        return self.ranks.size == 1 or not self.trained.collective

    def _is_time(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _remember(self) -> dict[str, Any]:
        """What a failed step may have changed by the time it fails; the weights where a step updates them twice."""
        self._updated = False
        several = self.config.algorithm.update == "pair" and self.config.algorithm.pairs > 1
        return {
            "target": copy.deepcopy(self.target),
            "ledger": copy.copy(self.ledger),
            "window": self.report.evaluator.window,
            "rollouts": (self.rollouts, self.gaps),
            "trained": self.trained.remember() if several else None,
        }

    def _take_back(self, before: dict[str, Any]) -> bool:
        """Undo what a failed step did; False where its first update cannot be undone."""
        self.trained.drop_gradients()
        self.target, self.ledger, self.report.evaluator.window = before["target"], before["ledger"], before["window"]
        self.rollouts, self.gaps = before["rollouts"]
        if self._updated and before["trained"] is None:
            return False
        if before["trained"] is not None:
            self.trained.recall(before["trained"])
        return True

    # --- a step ---------------------------------------------------------------------------------------------------

    def take_step(self) -> dict[str, Any]:
        """Roll out, measure the gap, and take K gradient pairs; returns the step's record."""
        started = time.perf_counter()
        measured: dict[str, Tensor] = {}
        distance = None
        if self.step % (self._replays + 1) == 0 or not self.rollouts:
            with self.drawing.sampling():
                self.rollouts = [self._roll_out(numbers) for numbers in self._micro_batches()]
            measured, distance = self._measure()
        record = self._descend(measured, distance)
        return {"step": self.step + 1, **record, "seconds": round(time.perf_counter() - started, 3)}

    def _micro_batches(self) -> list[list[int]]:
        """Numbers of this rank's rollouts, counted over the run: the same rollouts, however many ranks share them."""
        share = [self._fresh * self.batch + place for place in self.ranks.share(self.batch)]
        return [share[part] for part in chunks(len(share), self.settings.micro_batch)]

    @property
    def _fresh(self) -> int:
        """The step that this one's rollouts were, or are, made in."""
        return self.step - self.step % (self._replays + 1)

    def _generators(self, purpose: str, numbers: Sequence[int]) -> list[torch.Generator]:
        """A generator for each rollout; with replay a rollout is drawn from at several steps."""
        again = [self.step - self._fresh] if self.step != self._fresh else []
        return [generator(self.seed, purpose, number, *again) for number in numbers]

    def _roll_out(self, numbers: list[int]) -> Rollout:
        """Clean latents and their noise: sampled from the model, or encoded from given pictures."""
        prompts = self.prompts.of(numbers)
        conditioning, noise = self.model.encode_prompts(prompts), self._rollout_noise(numbers)
        size = self.config.model.size
        draws = self._generators("policy", numbers)
        if self.algorithm.keeps_path:
            sigmas, path = self.drawing.path(conditioning, noise, draws)
            return Rollout(path[-1], noise, prompts, conditioning, size, sigmas, path)
        x_0 = self.encoded.batch(numbers) if self.encoded else self.drawing.latents(conditioning, noise, draws)
        return Rollout(x_0, noise, prompts, conditioning, size)

    def _rollout_noise(self, numbers: list[int]) -> Tensor:
        """The noise that a batch starts from, packed: shared, it is one noise for all samples of all ranks."""
        size = self.config.model.size
        if self.config.rollout.shared_noise:
            return self.model.noise(1, size, generator(self.seed, "rollout", self.step)).expand(len(numbers), -1, -1)
        group = self.config.algorithm.group
        draws = [generator(self.seed, "rollout", number // group) for number in numbers]
        return torch.cat([self.model.noise(1, size, draw) for draw in draws])

    @torch.no_grad()
    def _measure(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """Reward and gap of the fresh rollouts' own pictures as this rank's share of their means; photo distance."""
        pictures = [self.drawing.decode(rollout.x_0) for rollout in self.rollouts]
        watched = self.guard.watch is not None and not self.encoded
        measure = self.guard.measure if watched else None
        looks = [
            self._look(images, rollout.prompts, self._generators("gap augmentation", numbers), measure)
            for images, rollout, numbers in zip(pictures, self.rollouts, self._micro_batches(), strict=True)
        ]
        self.gaps = [look.gap for look in looks]
        self.ledger.rollouts += self.batch
        self.ledger.reward_calls += 2 * self.batch
        if not self.encoded:
            self.ledger.forwards += self.config.rollout.steps * self.batch
        if self.policy:
            self._compare(pictures)
        prompts = [prompt for rollout in self.rollouts for prompt in rollout.prompts]
        distance = self.report.evaluator.live_distance(torch.cat(pictures), prompts, self.ranks)
        share = self.ranks.size / self.batch
        rewards = torch.cat([look.reward for look in looks])
        measured = {"reward": rewards.sum() * share, GAP: torch.cat(self.gaps).sum() * share}
        if self._holds_captions:
            measured[MARGIN] = torch.cat([look.margin for look in looks]).sum() * share
        if watched:
            sums = torch.cat([look.figures for look in looks]).sum(0) * share
            measured |= {_FIGURE + name: total for name, total in zip(self.guard.figures.names, sums, strict=True)}
        return measured, distance

    def _compare(self, pictures: list[Tensor]) -> None:
        """Judge the fresh rollouts' pictures by what is trained, and tell each how it stands in its group."""
        rewards = []
        for images, rollout, numbers in zip(pictures, self.rollouts, self._micro_batches(), strict=True):
            draws = self._generators("augmentation", numbers)
            rewards.append(self.policy.judge(images, rollout.prompts, self.step + 1, generator=draws))
        self.ledger.reward_calls += self.batch
        own = torch.cat(rewards, -1)
        shares = self.ranks.gather(own.cpu())
        first = sum(share.shape[-1] for share in shares[: self.ranks.rank])
        advantages = self.policy.advantages(torch.cat(shares, -1))[first : first + own.shape[-1]].to(own)
        sizes = [len(rollout.prompts) for rollout in self.rollouts]
        parts = advantages.split(sizes)
        self.rollouts = [replace(rollout, advantages=part) for rollout, part in zip(self.rollouts, parts, strict=True)]

    def _lots(self, count: int) -> list[list[list[Any]]]:
        """Where gradients are taken: for each micro-batch ``count`` lots of draws."""
        numbers = self._micro_batches()
        lots = [self.parts.draws.pairs(self._generators("injection", part), count) for part in numbers]
        if self.policy is None:
            return lots
        batched = self.settings.batch_branches
        with self.parts.arithmetic():
            lots = [
                self.policy.remember(rollout, own, batched=batched)
                for rollout, own in zip(self.rollouts, lots, strict=True)
            ]
        remembered, reference = lots[0][1:], lots[0] if self.policy.kl else []
        self.ledger.forwards += sum(map(len, [*remembered, *reference])) * self.batch
        return lots

    def _descend(self, measured: dict[str, Tensor], distance: Tensor | None) -> dict[str, Any]:
        """Accumulate K pairs of gradients and update after each pair, or once after all."""
        config = self.config.algorithm
        draws = self._lots(config.pairs)
        augmentations = [self._generators("augmentation", part) for part in self._micro_batches()]
        per_update = 1 if config.update == "pair" else config.pairs
        record: dict[str, Any] = dict.fromkeys(("reward", GAP, "photo_distance"))
        if self.target and self.target.captions:
            self._captions_weight = self.target.captions_weight  # one for all updates on a rollout
            record |= {MARGIN: None, "captions_weight": self._captions_weight}
        losses, norms = [], []
        for part in chunks(config.pairs, per_update):
            accumulated = self._accumulate([pairs[part] for pairs in draws], augmentations)
            told = self._update({**accumulated, **measured}, distance)
            self.ledger.gradient_passes += round(told.pop("calls"))
            losses.append(told.pop("loss"))
            norms.append(told.pop("grad_norm"))
            record |= told
            measured, distance = {}, None
        mean = {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)}
        figures = {key.removeprefix(_FIGURE): record.pop(key) for key in list(record) if key.startswith(_FIGURE)}
        return {**record, **mean, "lr": self.trained.optimizer.param_groups[0]["lr"], "figures": figures}

    def _accumulate(
        self, draws: list[list[list[Any]]], augmentations: list[list[torch.Generator]]
    ) -> dict[str, Tensor]:
        """Gradients of all micro-batches for one update, each with its lots.

        Returns this rank's share of the loss, and ``calls`` whose mean over the ranks is the number of pictures that
        went through the model with a gradient.
        """
        passes = [(number, lot, 1.0) for number, lots in enumerate(draws) for lot in lots]
        passes += [(*passes[-1][:2], 0.0)] * (self._idle_passes(len(draws)) * len(draws[0]))
        losses, calls = [], 0
        for done, (number, lot, counts) in enumerate(passes, 1):
            rollout = self.rollouts[number]
            self.trained.accumulate(last=done == len(passes))
            share = counts * len(rollout.prompts) * self.ranks.size / self.batch
            with self.parts.arithmetic():
                metrics = self.algorithm.backward(
                    rollout,
                    lot,
                    self.step + 1,
                    **self._towards_target(number),
                    scale=share / (len(lot) * len(draws[number])),
                    generator=augmentations[number] if counts else torch.Generator(),  # whose draws count for nothing
                    batched=self.settings.batch_branches,
                )
            losses.append(metrics["loss"])
            if counts:
                calls += sum(self.algorithm.calls(draw, len(rollout.prompts)) for draw in lot)
        if self.policy is None:
            self.ledger.reward_calls += sum(map(len, draws[0])) * self.batch
        loss = sum(losses)
        return {"loss": loss, "calls": torch.full_like(loss, float(calls * self.ranks.size))}

    def _towards_target(self, number: int) -> dict[str, Any]:
        """What the target asks of a micro-batch: how samples count, and to bring pictures back to their prompts."""
        if self.target is None:
            return {}
        weights = {"weights": self.target.weights(self.gaps[number])}
        if not self._captions_weight:
            return weights
        wrong = self._wrong_captions(self.rollouts[number].prompts)
        return weights | {"captions": Captions(self._captions_weight, wrong)}

    def _idle_passes(self, own: int) -> int:
        """Micro-batches that another rank has more of: where passes are collective, this one goes along for nothing."""
        if not self.trained.collective:
            return 0
        largest = math.ceil(self.batch / self.ranks.size)
        return math.ceil(largest / self.settings.micro_batch) - own

    def _update(self, values: dict[str, Tensor], distance: Tensor | None) -> dict[str, float | None]:
        """One optimizer step at the rate that warm-up and target leave; returns the values' means over the ranks.

        The host reads from the device here and nowhere else: what it has to know of a step comes in one transfer.
        """
        options = self.config.optimizer
        if self.ranks.size > 1:
            values = {**values, "asked": torch.full_like(values["loss"], float(self._stop.signal is not None))}
        means = self.trained.average(self.ranks, torch.stack([value.float() for value in values.values()]))
        norm = self.trained.clip(options.grad_clip)
        wanted = {**dict(zip(values, means, strict=True)), "grad_norm": norm}
        if distance is not None:
            wanted["photo_distance"] = distance
        told = dict(zip(wanted, torch.stack([value.to(means) for value in wanted.values()]).tolist(), strict=True))
        self._may_be_asked |= told.pop("asked", 0.0) > 0
        if not all(math.isfinite(told[key]) for key in ("loss", "grad_norm", GAP, MARGIN) if key in told):
            raise self._not_finite(told["loss"], told["grad_norm"])
        if self.target and GAP in told:
            self.target.update(told[GAP], told.get(MARGIN))
        warm = min(1.0, (self.ledger.updates + 1) / options.warmup_steps) if options.warmup_steps else 1.0
        self._updated = True
        faded = max(self.target.lr_scale, self._captions_weight) if self.target else 1.0
        self.trained.step(options.lr * warm * faded)
        if self.average:
            self.average.update()
        self.ledger.updates += 1
        return told

    def _not_finite(self, loss: float, norm: float) -> _NotFiniteError:
        what = f"loss {loss:g} with gradient norm {norm:g} at step {self.step + 1}"
        advice = f"start a new run with a lower optimizer.lr (now {self.config.optimizer.lr:g})"
        if self.step == 0:
            return _NotFiniteError(f"{what}: {advice}")
        weights = shlex.quote(str(Checkpoint.of(self.folder.checkpoints, self.step).transformer))
        saved = f"the {self.step} before it are saved"
        return _NotFiniteError(f"{what}: {saved}; {advice} and --set model.weights={weights}")

    # --- saving ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.saved == self.step:
            return
        if self.ranks.leads:
            settled = {key: getattr(self.settings, key) for key in _KEPT}
            state = {"config": digest(self.config), "layout": self.trained.layout, "settled": settled}
            state |= self.data | self._state()
            best = self._rank_checkpoints()
            self.guard.write(self._seconds)  # a run that goes on from the checkpoint needs it
            keep = self.config.checkpoint.keep
            save_checkpoint(self.folder.checkpoints, self.step, self._write, state, keep, best and best.step)
            self._rank_checkpoints()
        else:
            self._write(None)
        self.saved = self.step

    def _rank_checkpoints(self, ended: bool = False) -> Place | None:
        """Where the checkpoints are by what the guard has seen; ``best`` links to the best of them."""
        checkpoints = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(self.folder.checkpoints)}
        best = self.guard.rank(list(checkpoints), ended)
        if self.guard.watch:
            link_best(self.folder.path, checkpoints[best.step] if best else None)
        return best

    @property
    def _seconds(self) -> float:
        """What the run took so far, but for measuring and drawing what it shows of itself."""
        return self.ledger.seconds + self.guard.seconds_beside

    def _write(self, folder: Path | None) -> None:
        """Weights, averages, optimizer and rollouts to be replayed; a rank without a folder only gives its part."""
        self.weights.write(folder)
        rollouts = self._collect_rollouts() if self._replays else None
        if folder and rollouts:
            save_file(rollouts, folder / ROLLOUTS)

    def _collect_rollouts(self) -> dict[str, Tensor] | None:
        """What a replay starts from, of all ranks in the order of their samples; on rank 0."""
        own = [torch.cat([getattr(rollout, name) for rollout in self.rollouts]).cpu() for name in ("x_0", "eps")]
        shares = self.ranks.gather([*own, torch.cat(self.gaps).cpu()])
        columns = zip(*shares, strict=True)
        return {name: torch.cat(column) for name, column in zip(("x_0", "eps", "gaps"), columns, strict=True)}

    def _recall_rollouts(self, checkpoint: Checkpoint) -> None:
        """The rollouts that the checkpoint's steps were taken on, this rank's share of them."""
        if self.step % (self._replays + 1) == 0:
            return
        kept = checkpoint.rollouts(self.device)
        first = self._fresh * self.batch
        for numbers in self._micro_batches():
            place = slice(numbers[0] - first, numbers[-1] - first + 1)
            prompts = self.prompts.of(numbers)
            conditioning = self.model.encode_prompts(prompts)
            size = self.config.model.size
            self.rollouts.append(Rollout(kept["x_0"][place], kept["eps"][place], prompts, conditioning, size))
            self.gaps.append(kept["gaps"][place])

    # --- after ----------------------------------------------------------------------------------------------------

    def conclude(self, stop: StopRequest) -> dict[str, Any] | None:
        """Measure the tuned model, draw before and after, and write the summary; on rank 0, unless stopped.

        The guard's page is written in any case.
        """
        with self.ranks.together(), self._as_measured():
            if not self.ranks.leads:
                return None
            summary = stop.unless_asked(self._finish)
            if self.guard.watch:
                self.guard.write(self._seconds)
                write_training_report(self.folder.path, self.guard.to_json(self._seconds), self._reward)
            return summary

    def _finish(self) -> dict[str, Any]:
        best = self._rank_checkpoints(ended=True)
        if best is None and self.guard.has_ranked:
            self.warn(
                "guard: no checkpoint is clearly better than the base model by held-out evidence: use the base model, "
                f"not the newest checkpoint, which {self.folder.path} stands for"
            )
        shown = self._go_back_to(best.step) if best and best.step != self.step else self.step
        if prompts := self.report.evaluator.prompts:
            self.say(f"measuring the tuned model on {len(prompts)} held-out prompts")
        tuned = self.report.evaluate(TUNED)
        self.report.sample(shown)
        self.report.before_after(shown)
        summary = self.report.summary(
            tuned,
            steps=self.step,
            stopped_by=self.stopped_by or "steps",
            **({"best_step": best and best.step} if self.guard.watch else {}),
            **({"target": self.target.state_dict()} if self.target else {}),
            seconds=round(self.ledger.seconds, 1),
            ledger=self.ledger.report(),
            plan=self.plan.name,
        )
        self.folder.write_json(SUMMARY, summary)
        return summary

    def _go_back_to(self, step: int) -> int:
        """Draw the last weights as they are, then put those of an earlier checkpoint in their place; returns ``step``.

        On rank 0 and at the end of a run, whose own weights are saved.
        """
        self.report.sample(self.step)
        every = self.config.checkpoint.every
        self.say(
            f"the best checkpoint is that of step {step}, of {self.step} (one every {every} steps: checkpoint.every)"
        )
        self.weights.put_back(Checkpoint.of(self.folder.checkpoints, step))
        return step
