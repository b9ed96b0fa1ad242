"""Train: load, measure the base, then roll out, noise, step, recover, judge and update until the target is met."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor, nn

from srpo_cli.algorithms.srpo import Rollout
from srpo_cli.config.load import Resolved, dump_yaml
from srpo_cli.config.schema import TrainConfig
from srpo_cli.core.target import Target
from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.recipes.evaluate import Evaluation, Evaluator
from srpo_cli.recipes.parts import (
    Parts,
    Prompts,
    check_miniature_prompts,
    chunks,
    draw_pictures,
    fingerprint,
    frozen_parameters,
    load_prompts,
    make_parts,
)
from srpo_cli.recipes.pictures import Files, Photographs, PictureSource, open_pictures, read_picture
from srpo_cli.runtime.checkpoints import Checkpoint, find_checkpoint, list_checkpoints, save_checkpoint
from srpo_cli.runtime.devices import arithmetic, best_device
from srpo_cli.runtime.distributed import Ranks, join_ranks
from srpo_cli.runtime.folder import SUMMARY, RunFolder, config_digest, environment
from srpo_cli.runtime.ledger import Ledger
from srpo_cli.runtime.pictures import save_grid, save_png
from srpo_cli.runtime.progress import StepProgress
from srpo_cli.runtime.quiet import quiet_libraries
from srpo_cli.runtime.seeding import generator
from srpo_cli.runtime.signals import StopRequest, stop_on_signals

BASE, TUNED = "base.json", "tuned.json"
BEFORE_AFTER = "before_after.png"
_CALIBRATION = 64  # pictures that each side of the automatic target is measured on
_EXACT = ("srpo-cli", "torch", "torchvision", "diffusers", "transformers", "open_clip_torch")


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
    quiet: bool = False,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run a training from its configuration, or go on with the one in ``output``.

    Under torchrun every process calls this, and rank 0 returns the summary.

    Args:
        resolved: the configuration; with ``resume`` that of the run itself.
        output: the run's folder, new, or with ``resume`` the run that is continued.
        quiet: no progress.
        say: where lines for the user go.

    Raises SrpoError for what a user can cause; the run folder keeps all that was finished.
    """
    quiet_libraries()
    config, device = resolved.config, best_device()
    with stop_on_signals() as stop, join_ranks(device) as ranks:
        folder = RunFolder(Path(ranks.from_rank_0(str(output))))  # a name with the time in it may differ between ranks
        quiet = quiet or not ranks.leads
        with ranks.together():
            checkpoint = None
            if resume:
                checkpoint = _resume_from(folder, config, ranks)
            elif ranks.leads:
                folder.check_free()
            run = Run(config, folder, checkpoint, ranks, (lambda _: None) if quiet else say)
            if ranks.leads and resume:
                folder.go_on(dump_yaml(resolved))
            elif ranks.leads:
                folder.start(dump_yaml(resolved), processes=ranks.size, device=device.type)
        run.prepare(stop)
        with StepProgress(config.train.steps, run.step, quiet) as progress:
            run.loop(stop, progress)
        summary = stop.unless_asked(run.finish) if ranks.leads else None
        ranks.wait()
    if stop.signal and not summary:
        if ranks.leads:
            say(f"stopped by {stop.signal.name} after step {run.step}; go on with: {resume_command(folder.path)}")
        return Outcome(folder.path, None, stop.exit_code)
    return Outcome(folder.path, summary, 0)


def resume_command(output: Path) -> str:
    """What a user types to go on with a run."""
    return f"srpo train --resume {shlex.quote(str(output))}"


def _resume_from(folder: RunFolder, config: TrainConfig, ranks: Ranks) -> Checkpoint | None:
    """The newest checkpoint of a run, None for a run that was stopped before its first.

    Refuses what could not be exact: other library versions, another kind of device or number of processes, or a
    configuration that is not the checkpoint's.
    """
    before, now = folder.environment(), environment()["packages"]
    for name in _EXACT:
        if (version := before["packages"].get(name)) != now[name]:
            raise UsageError(
                f"{folder.path} was begun with {name} {version}, here is {now[name]}: going on would not be exact; "
                f"install {name}=={version} or start a new run"
            )
    if (device := before.get("device")) != ranks.device.type:
        raise UsageError(
            f"{folder.path} was begun on {device}, here is {ranks.device.type}: going on would not be exact; "
            "go on there or start a new run"
        )
    if (processes := before.get("processes")) != ranks.size:
        raise UsageError(
            f"{folder.path} was begun with {processes} process(es), here are {ranks.size}: going on would not be "
            f"exact; start {processes} or a new run"
        )
    if not list_checkpoints(folder.checkpoints):
        return None
    checkpoint = find_checkpoint(folder.path)
    if checkpoint.state().get("config") != _digest(config):
        raise UsageError(f"{checkpoint.path} belongs to another configuration than {folder.path}'s: start a new run")
    if config.train.steps < checkpoint.step:
        raise UsageError(
            f"{folder.path} has done {checkpoint.step} steps already: --steps {config.train.steps} is fewer; give more"
        )
    checkpoint.check_transformer()
    return checkpoint


def _digest(config: TrainConfig) -> str:
    """Digest of all that a step depends on; how long a run is and what it writes is not among it."""
    free = {"description": True, "train": {"steps"}, "evaluation": True, "samples": True, "checkpoint": True}
    return config_digest(config.model_dump_json(exclude=free))


class Run:
    """One training run: the parts, where it stands, and what a step does."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        checkpoint: Checkpoint | None,
        ranks: Ranks,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.folder, self.ranks, self.say = config, folder, ranks, say
        self.device = ranks.device
        self.seed = config.train.seed
        self.prompts: Prompts = load_prompts(
            config.prompts,
            config.model.name,
            held_out=max(config.evaluation.prompts, config.samples.count),
            split=config.evaluation.split,
            seed=self.seed,
        )
        self.pictures = self._open_pictures()
        if config.model.name == "miniature" and self.device.type == "cpu":
            # Its matrices are too small for a second thread to pay, and last bits must not depend on the machine.
            torch.set_num_threads(1)
        tuned = {"weights": checkpoint.transformer} if checkpoint else {}
        model_config = config.model.model_copy(update=tuned)
        self.parts: Parts = make_parts(config.model_copy(update={"model": model_config}), self.device)
        self.model = self.parts.model
        self.parameters = self.model.trainable_parameters()
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, options.lr, tuple(options.betas), options.eps, options.weight_decay
        )
        self.evaluator = Evaluator(self.parts, config, self.prompts.held_out[: config.evaluation.prompts])
        self.ledger = Ledger()
        self.target: Target | None = None
        self.step, self.stopped = 0, False
        self.data = self._data()
        if checkpoint:
            self._restore(checkpoint)
        self.saved = self.step

    def _open_pictures(self) -> PictureSource | None:
        """The pictures that stand for rollouts; the miniature's world must know what they are said to show."""
        pictures = open_pictures(self.config, self.prompts.train)
        if isinstance(pictures, Photographs):
            check_miniature_prompts(list(pictures.prompts))
        elif isinstance(pictures, Files) and self.config.model.name == "miniature":
            check_miniature_prompts([caption for _, caption in pictures.items])
        return pictures

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        for name, what in (
            ("prompts", "the prompts or pictures"),
            ("reward", "the weights or the code of the reward"),
            ("frozen", "the files of the model or the reward"),
        ):
            if state.get(name) != self.data[name]:
                raise UsageError(f"{what} have changed since {checkpoint.path} was written: start a new run")
        checkpoint.load_optimizer(self.optimizer)
        self.step = checkpoint.step
        self._load_state(state)
        self.stopped = bool(self.target and self.target.reached)

    def _data(self) -> dict[str, str]:
        """Digests of what the configuration only names, and what a run may not lose under way."""
        text = json.dumps([self.prompts.train, self.pictures.digest() if self.pictures else ""])
        prompts = hashlib.sha256(text.encode()).hexdigest()[:16]
        frozen = fingerprint(frozen_parameters(self.parts))
        return {"prompts": prompts, "reward": self.parts.reward.weights, "frozen": frozen}

    def _state(self) -> dict[str, Any]:
        """Where the run stands, but for weights and optimizer."""
        return {
            "target": self.target.state_dict() if self.target else None,
            "ledger": self.ledger.state_dict(),
            "evaluator": self.evaluator.state_dict(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.ledger.load_state_dict(state["ledger"])
        self.evaluator.load_state_dict(state["evaluator"])
        if state["target"]:
            self.target = Target(state["target"]["base"], state["target"]["value"])
            self.target.load_state_dict(state["target"])

    # --- before ---------------------------------------------------------------------------------------------------

    def prepare(self, stop: StopRequest) -> None:
        """Measure and draw the untrained model, and set the target; a run that goes on has all this."""
        if self.step == 0:
            if self.ranks.leads:
                self.folder.truncate_log(0)
                stop.unless_asked(self._measure_base)
            measured = self.ranks.from_rank_0((self.target.base, self.target.value) if self.target else None)
            self.target = Target(*measured) if measured else None
        elif self.ranks.leads:
            self.folder.truncate_log(self.step)

    def _measure_base(self) -> None:
        if self.evaluator.prompts:
            self.say(f"measuring the base model on {len(self.evaluator.prompts)} held-out prompts")
        self._evaluate(BASE)
        self._sample()
        with self.ledger:
            self.target = self._calibrate()

    def _calibrate(self) -> Target | None:
        """The target of the semantic gap: given, or measured on the base model with and without the positive word."""
        wanted = self.config.algorithm.target
        if wanted is None:
            return None
        prompts = [self.prompts.train[i % len(self.prompts.train)] for i in range(_CALIBRATION)]
        base = self._calibration_gap(prompts, prompts)
        if wanted != "auto":
            return Target(base, wanted)
        words = self.parts.algorithm.control_words
        asked = [words.texts(words.positive[i % len(words.positive)], [p])[0] for i, p in enumerate(prompts)]
        positive = self._calibration_gap(asked, prompts)
        target = Target.from_positive_mode(base, positive, self.config.algorithm.target_reach)
        self.say(
            f"target: semantic gap {base:+.3f} now, {positive:+.3f} when asked for the positive word, "
            f"so train to {target.value:+.3f}"
        )
        return target

    def _calibration_gap(self, asked: list[str], prompts: list[str]) -> float:
        """Mean gap of rollouts that are drawn as in training, for what is asked, and judged by the prompts."""
        size, batch = self.config.model.size, self.config.train.batch_size
        noises = [generator(self.seed, "calibration", i) for i in range(len(prompts))]
        augmentation = generator(self.seed, "calibration augmentation")
        gaps = []
        for part in chunks(len(prompts), batch):
            noise = torch.cat([self.model.noise(1, size, draw) for draw in noises[part]])
            pictures = self._decode(self._draw(asked[part], noise))
            gaps.append(self.parts.algorithm.gap(pictures, prompts[part], generator=augmentation))
        self.ledger.rollouts += len(prompts)
        self.ledger.forwards += self.config.rollout.steps * len(prompts)
        self.ledger.reward_calls += len(prompts)
        return torch.cat(gaps).mean().item()

    # --- the loop -------------------------------------------------------------------------------------------------

    def loop(self, stop: StopRequest, progress: StepProgress) -> None:
        """Take steps until the last one, the target or a signal; whatever ends them, the completed ones are saved."""
        while self.step < self.config.train.steps and not self.stopped and not self._asked_to_stop(stop):
            before = self._remember()
            try:
                with self.ledger:
                    record = self._take_step()
            except Exception:
                with suppress(Exception):  # what to tell is why the step failed
                    self._take_back(before)
                    self._save()
                raise
            self.step += 1
            self.stopped = bool(self.target and self.target.reached)
            if self.ranks.leads:
                self._record(record, progress)
        self._save()

    def _asked_to_stop(self, stop: StopRequest) -> bool:
        """Whether a signal reached any rank; all then stop at the same step, with the same exit code."""
        if number := self.ranks.largest(stop.signal or 0):
            stop.signal = Signals(number)
        return bool(number)

    def _record(self, record: dict[str, Any], progress: StepProgress) -> None:
        """Log a completed step, and save, draw and evaluate where it is time to."""
        config = self.config
        self.folder.log(record)  # before the step is saved: one that cannot be logged is done again
        last = self.stopped or self.step == config.train.steps
        progress.update(self.step, {k: record[k] for k in ("reward", "sgp_gap", "photo_distance")}, last)
        if last:
            return
        if self._is_time(config.checkpoint.every):
            self._save()
        try:
            if self._is_time(config.samples.every):
                self._sample()
            if self._is_time(config.evaluation.every):
                self._evaluate(f"evaluation-{self.step:06d}.json")
        except Exception:
            with suppress(Exception):  # what to tell is why it failed
                self._save()
            raise

    def _is_time(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _remember(self) -> dict[str, Any]:
        """What a failed step may have changed by the time it fails.

        The weights are among it only where a step updates them more than once, and kept on the host.
        """
        state = copy.deepcopy(self._state())
        if self.config.algorithm.update == "pair" and self.config.algorithm.pairs > 1:
            state["weights"] = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]
            state["optimizer"] = copy.deepcopy(self.optimizer.state_dict())
        return state

    @torch.no_grad()
    def _take_back(self, state: dict[str, Any]) -> None:
        """Undo what a failed step did."""
        self._load_state(state)
        if "weights" in state:
            self.optimizer.load_state_dict(state["optimizer"])
            for parameter, weights in zip(self.parameters, state["weights"], strict=True):
                parameter.copy_(weights)

    def _take_step(self) -> dict[str, Any]:
        """Roll out, measure the gap, and take K gradient pairs; returns the step's record."""
        started = time.perf_counter()
        rollout = self._roll_out()
        record, gaps = self._measure(self._decode(rollout.x_0), rollout.prompts)
        weights, scale = None, 1.0
        if self.target:
            self.target.update(record["sgp_gap"])
            weights, scale = self.target.weights(gaps), self.target.lr_scale
        record |= self._descend(rollout, weights, scale)
        return {"step": self.step + 1, **record, "seconds": round(time.perf_counter() - started, 3)}

    @property
    def _turn(self) -> int:
        return self.ranks.turn(self.step)

    def _roll_out(self) -> Rollout:
        """Clean latents and their noise: sampled from the model, or encoded from given pictures."""
        size, batch = self.config.model.size, self.config.train.batch_size
        noise = self._rollout_noise()
        if self.pictures:
            images, prompts = self.pictures.batch(self._turn, batch, size)
            with arithmetic(self.device, self._dtype):
                x_0 = self.model.encode(images)
        else:
            prompts = self.prompts.batch(self._turn, batch)
            x_0 = self._draw(prompts, noise)
            self.ledger.forwards += self._everywhere(self.config.rollout.steps * batch)
        self.ledger.rollouts += self._everywhere(batch)
        return Rollout(x_0, noise, prompts, self.model.encode_prompts(prompts), size)

    def _rollout_noise(self) -> Tensor:
        """The noise that a batch starts from, packed: shared, it is one noise for all samples of all ranks."""
        size, batch = self.config.model.size, self.config.train.batch_size
        if self.config.rollout.shared_noise:
            return self.model.noise(1, size, generator(self.seed, "rollout", self.step)).expand(batch, -1, -1)
        return self.model.noise(batch, size, generator(self.seed, "rollout", self._turn))

    def _draw(self, prompts: list[str], noise: Tensor) -> Tensor:
        """Sample clean latents as rollouts are sampled."""
        config = self.config.rollout
        with arithmetic(self.device, self._dtype):
            return self.model.sample(
                self.model.encode_prompts(prompts),
                noise,
                self.config.model.size,
                config.steps,
                config.guidance,
                config.shift,
                truncate_time=self.config.algorithm.schedule == "reference",
            )

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.config.model.dtype)

    @torch.no_grad()
    def _decode(self, x_0: Tensor) -> Tensor:
        with arithmetic(self.device, self._dtype):
            return self.model.decode(x_0, self.config.model.size)

    @torch.no_grad()
    def _measure(self, pictures: Tensor, prompts: Sequence[str]) -> tuple[dict[str, Any], Tensor]:
        """Reward, gap and photo distance of the rollout's own pictures, and the gap of each of this rank's.

        The photo distance is that of rank 0's pictures: it looks back over many steps anyway.
        """
        gaps = self.parts.algorithm.gap(
            pictures, prompts, generator=generator(self.seed, "gap augmentation", self._turn)
        )
        reward, gap = self.ranks.mean(self.parts.reward(pictures, prompts).mean().item(), gaps.mean().item())
        self.ledger.reward_calls += self._everywhere(2 * len(pictures))
        distance = self.evaluator.live_distance(pictures, list(prompts)) if self.ranks.leads else None
        return {"reward": reward, "sgp_gap": gap, "photo_distance": distance}, gaps

    def _descend(self, rollout: Rollout, weights: Tensor | None, scale: float) -> dict[str, Any]:
        """Accumulate K pairs of gradients and update after each pair, or once after all."""
        config, batch = self.config.algorithm, len(rollout.prompts)
        draws = self.parts.draws.pairs(batch, config.pairs, generator(self.seed, "injection", self._turn))
        augmentation = generator(self.seed, "augmentation", self._turn)
        per_update = 1 if config.update == "pair" else config.pairs
        losses, norms = [], []
        for part in chunks(config.pairs, per_update):
            loss = 0.0
            for injections in draws[part]:
                with arithmetic(self.device, self._dtype):
                    metrics = self.parts.algorithm.backward(
                        rollout,
                        injections,
                        self.step + 1,
                        weights=weights,
                        scale=1 / (len(injections) * per_update),
                        generator=augmentation,
                    )
                self.ledger.gradient_passes += self._everywhere(len(injections) * batch)
                self.ledger.reward_calls += self._everywhere(len(injections) * batch)
                loss += metrics["loss"]
            loss = self.ranks.average_gradients(self.parameters, loss)
            losses.append(loss)
            norms.append(self._update(loss, scale))
        return {
            "loss": sum(losses) / len(losses),
            "grad_norm": sum(norms) / len(norms),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def _everywhere(self, count: int) -> int:
        """What all ranks did, of which each does the same."""
        return count * self.ranks.size

    def _update(self, loss: float, scale: float) -> float:
        """One optimizer step at the rate that warm-up and target leave; returns the gradient norm before clipping."""
        options = self.config.optimizer
        norm = nn.utils.clip_grad_norm_(self.parameters, options.grad_clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise self.ranks.common(self._not_finite(loss, norm))
        warm = min(1.0, (self.ledger.updates + 1) / options.warmup_steps) if options.warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * warm * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ledger.updates += 1
        return norm

    def _not_finite(self, loss: float, norm: float) -> SrpoError:
        what = f"loss {loss:g} with gradient norm {norm:g} at step {self.step + 1}"
        advice = f"start a new run with a lower optimizer.lr (now {self.config.optimizer.lr:g})"
        if self.step == 0:
            return SrpoError(f"{what}: {advice}")
        weights = shlex.quote(str(Checkpoint.of(self.folder.checkpoints, self.step).transformer))
        return SrpoError(f"{what}: the {self.step} before it are saved; {advice} and --set model.weights={weights}")

    def _save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if not self.ranks.leads or self.saved == self.step:
            return
        state = {"config": _digest(self.config), **self.data, **self._state()}
        keep = self.config.checkpoint.keep
        save_checkpoint(self.folder.checkpoints, self.step, self.model.save_weights, self.optimizer, state, keep)
        self.saved = self.step

    # --- pictures and figures -------------------------------------------------------------------------------------

    def _sample(self) -> None:
        """Draw the fixed prompts from their fixed noises: a folder of pictures and a grid, named after the step."""
        config = self.config
        prompts = self.prompts.held_out[: config.samples.count]
        if not prompts:
            return
        noises = [generator(self.seed, "samples", i) for i in range(len(prompts))]
        with arithmetic(self.device, self._dtype):
            pictures = draw_pictures(
                self.model,
                prompts,
                noises,
                config.model.size,
                config.sampling.steps,
                config.sampling.guidance,
                8,
            )
        folder = self._samples_of(self.step)
        folder.mkdir(exist_ok=True)
        for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
            metadata = {
                "prompt": prompt,
                "model": config.model.name,
                "step": self.step,
                "run": str(self.folder.path),
            }
            save_png(picture, folder / f"{i:02d}.png", metadata)
        save_grid([pictures], folder.with_suffix(".png"), captions=prompts)

    def _samples_of(self, step: int) -> Path:
        return self.folder.samples / f"step-{step:06d}"

    def _draw_before_after(self) -> None:
        """One sheet with the fixed prompts before and after and, on the miniature, as the renderer's photographs."""
        size, prompts = self.config.model.size, self.prompts.held_out[: self.config.samples.count]
        if not prompts:
            return
        rows = [
            torch.stack([read_picture(path, size) for path in sorted(self._samples_of(step).glob("*.png"))])
            for step in (0, self.step)
        ]
        labels = ["base", "tuned"]
        if self.parts.knows_only_the_world:
            photographs, _ = Photographs(prompts, self.seed).batch(0, len(prompts), size)
            rows.append(self.evaluator.round_trip(photographs))
            labels.append("photograph")
        save_grid(rows, self.folder.path / BEFORE_AFTER, labels, prompts)

    def _evaluate(self, name: str) -> Evaluation | None:
        if not self.evaluator.prompts:
            return None
        with arithmetic(self.device, self._dtype):
            evaluation = self.evaluator.run()
        self.folder.write_json(name, evaluation.to_json())
        return evaluation

    def finish(self) -> dict[str, Any]:
        """Measure the tuned model, and write the pictures of before and after and the summary."""
        if self.evaluator.prompts:
            self.say(f"measuring the tuned model on {len(self.evaluator.prompts)} held-out prompts")
        tuned = self._evaluate(TUNED)
        self._sample()
        self._draw_before_after()
        base = self.folder.path / BASE
        summary = {
            "base": json.loads(base.read_text()) if tuned and base.exists() else {},
            "tuned": tuned.to_json() if tuned else {},
            "steps": self.step,
            "stopped_by": "target" if self.stopped else "steps",
            "seconds": round(self.ledger.seconds, 1),
            "ledger": self.ledger.report(),
            "seed": self.seed,
            "model": self.config.model.name,
            "evaluation_prompts": len(self.evaluator.prompts),
        }
        self.folder.write_json(SUMMARY, summary)
        return summary
