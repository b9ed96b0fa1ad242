"""Train: load, measure the base, then roll out, noise, step, recover, judge and update until the target is met."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srpo_cli.algorithms.srpo import Rollout
from srpo_cli.config.load import Resolved, dump_yaml
from srpo_cli.config.schema import TrainConfig
from srpo_cli.core.target import Target
from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.recipes.evaluate import Evaluation, Evaluator
from srpo_cli.recipes.parts import Parts, Prompts, draw_pictures, load_prompts, make_parts
from srpo_cli.recipes.pictures import Photographs, PictureSource, open_pictures, read_picture
from srpo_cli.runtime.checkpoints import Checkpoint, find_checkpoint, list_checkpoints, save_checkpoint
from srpo_cli.runtime.devices import arithmetic, best_device
from srpo_cli.runtime.folder import ENVIRONMENT, SUMMARY, RunFolder, config_digest, environment
from srpo_cli.runtime.ledger import Ledger
from srpo_cli.runtime.pictures import save_grid, save_png
from srpo_cli.runtime.progress import StepProgress
from srpo_cli.runtime.seeding import generator
from srpo_cli.runtime.signals import StopRequest, stop_on_signals

BASE, TUNED = "base.json", "tuned.json"
BEFORE_AFTER = "before_after.png"
_CALIBRATION = 64  # pictures that each side of the automatic target is measured on
_EXACT = ("torch", "torchvision", "diffusers", "transformers", "open_clip_torch")


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

    Args:
        resolved: the configuration; with ``resume`` that of the run itself.
        output: the run's folder, new, or with ``resume`` the run that is continued.
        quiet: no progress.
        say: where lines for the user go.

    Raises SrpoError for what a user can cause; the run folder keeps all that was finished.
    """
    with stop_on_signals() as stop:
        folder = RunFolder(output)
        checkpoint = _resume_from(folder, resolved.config) if resume else None
        if not resume:
            folder.start(dump_yaml(resolved))
        run = Run(resolved.config, folder, checkpoint, say)
        run.measure_base()
        with StepProgress(resolved.config.train.steps, run.step, quiet) as progress:
            run.loop(stop, progress)
        if stop.signal:
            say(f"stopped by {stop.signal.name} after step {run.step}; go on with: {resume_command(output)}")
            return Outcome(output, None, stop.exit_code)
        return Outcome(output, run.finish(), 0)


def resume_command(output: Path) -> str:
    """What a user types to go on with a run."""
    return f"srpo train --resume {shlex.quote(str(output))}"


def _resume_from(folder: RunFolder, config: TrainConfig) -> Checkpoint | None:
    """The newest checkpoint of a run, None for a run that was stopped before its first.

    Refuses what could not be exact: other library versions, or a configuration that is not the checkpoint's.
    """
    before = json.loads((folder.path / ENVIRONMENT).read_text())["packages"]
    now = environment()["packages"]
    for name in _EXACT:
        if before.get(name) != now[name]:
            raise UsageError(
                f"{folder.path} was begun with {name} {before.get(name)}, here is {now[name]}: going on would not be "
                f"exact; install {name}=={before.get(name)} or start a new run"
            )
    if not list_checkpoints(folder.checkpoints):
        return None
    checkpoint = find_checkpoint(folder.path)
    if checkpoint.state()["config"] != _digest(config):
        raise UsageError(f"{checkpoint.path} belongs to another configuration than {folder.path}'s: start a new run")
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
        say: Callable[[str], None],
    ) -> None:
        self.config, self.folder, self.say = config, folder, say
        self.device = best_device()
        tuned = config.model_copy(
            update={"model": config.model.model_copy(update={"weights": checkpoint.transformer})}
        ) if checkpoint else config  # fmt: skip
        self.parts: Parts = make_parts(tuned, self.device)
        self.model = self.parts.model
        self.parameters = self.model.trainable_parameters()
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, options.lr, tuple(options.betas), options.eps, options.weight_decay
        )
        self.seed = config.train.seed
        self.prompts: Prompts = load_prompts(
            config.prompts, config.model.name, held_out=config.evaluation.prompts, seed=self.seed
        )
        self.pictures: PictureSource | None = open_pictures(config, self.prompts.train)
        self.evaluator = Evaluator(self.parts, config, self.prompts.held_out)
        self.ledger = Ledger()
        self.target: Target | None = None
        self.step, self.stopped = 0, False
        if checkpoint:
            self._restore(checkpoint)
        else:
            self.folder.truncate_log(0)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state()
        checkpoint.load_optimizer(self.optimizer)
        self.step = state["step"]
        self.ledger.load_state_dict(state["ledger"])
        self.evaluator.load_state_dict(state["evaluator"])
        if state["target"]:
            self.target = Target(state["target"]["base"], state["target"]["value"])
            self.target.load_state_dict(state["target"])
            self.stopped = self.target.reached
        self.folder.truncate_log(self.step)

    # --- before ---------------------------------------------------------------------------------------------------

    def measure_base(self) -> None:
        """Evaluate and sample the untrained model, and set the target; a run that goes on has all this."""
        if self.step:
            return
        self._evaluate(BASE)
        self._sample()
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
        rollout, config = self.config.rollout, self.config
        noises = [generator(self.seed, "calibration", i) for i in range(len(prompts))]
        pictures = draw_pictures(
            self.model,
            asked,
            noises,
            config.model.size,
            rollout.steps,
            rollout.guidance,
            config.train.batch_size,
        )
        self.ledger.forwards += rollout.steps * len(prompts)
        self.ledger.reward_calls += len(prompts)
        augmentation = generator(self.seed, "calibration augmentation")
        pictures = pictures.to(self.parts.reward.device)
        return self.parts.algorithm.gap(pictures, prompts, generator=augmentation).mean().item()

    # --- the loop -------------------------------------------------------------------------------------------------

    def loop(self, stop: StopRequest, progress: StepProgress) -> None:
        """Take steps until the last one, the target or a signal; the state is saved whichever it is."""
        config, saved = self.config, self.step
        while self.step < config.train.steps and not stop.signal and not self.stopped:
            with self.ledger:
                record = self._take_step()
            self.step += 1
            self.folder.log(record)
            progress.update(self.step, {k: record[k] for k in ("reward", "sgp_gap", "photo_distance")})
            self.stopped = bool(self.target and self.target.reached)
            last = self.stopped or self.step == config.train.steps
            if config.samples.every and self.step % config.samples.every == 0 and not last:
                self._sample()
            if config.evaluation.every and self.step % config.evaluation.every == 0 and not last:
                self._evaluate(f"evaluation-{self.step:06d}.json")
            if last or (config.checkpoint.every and self.step % config.checkpoint.every == 0):
                self._save()
                saved = self.step
        if saved < self.step:
            self._save()

    def _take_step(self) -> dict[str, Any]:
        """Roll out, measure the gap, and take K gradient pairs; returns the step's record."""
        started = time.perf_counter()
        rollout = self._roll_out()
        pictures = self._decode(rollout)
        self.ledger.rollouts += len(rollout.prompts)
        record = {"step": self.step + 1, **self._measure(pictures, rollout)}
        gaps, scale = record.pop("gaps"), 1.0
        weights = None
        if self.target:
            self.target.update(gaps.mean().item())
            weights, scale = self.target.weights(gaps), self.target.lr_scale
        record |= self._descend(rollout, weights, scale)
        return {**record, "seconds": round(time.perf_counter() - started, 3)}

    def _roll_out(self) -> Rollout:
        """Clean latents and their noise: sampled from the model, or encoded from given pictures."""
        config, size = self.config, self.config.model.size
        batch = config.train.batch_size
        draw = generator(self.seed, "rollout", self.step)
        if self.pictures:
            images, prompts = self.pictures.batch(self.step, batch, size)
            with arithmetic(self.device, self._dtype):
                x_0 = self.model.encode(images)
            eps = self.model.noise(1 if config.rollout.shared_noise else batch, size, draw).expand_as(x_0)
            return Rollout(x_0, eps, prompts, self.model.encode_prompts(prompts), size)
        prompts = self.prompts.batch(self.step, batch)
        noise = self.model.noise(1 if config.rollout.shared_noise else batch, size, draw)
        noise = noise.expand(batch, -1, -1)
        conditioning = self.model.encode_prompts(prompts)
        with arithmetic(self.device, self._dtype):
            x_0 = self.model.sample(
                conditioning,
                noise,
                size,
                config.rollout.steps,
                config.rollout.guidance,
                config.rollout.shift,
                truncate_time=config.algorithm.schedule == "reference",
            )
        self.ledger.forwards += config.rollout.steps * batch
        return Rollout(x_0, noise, prompts, conditioning, size)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.config.model.dtype)

    @torch.no_grad()
    def _decode(self, rollout: Rollout) -> Tensor:
        with arithmetic(self.device, self._dtype):
            return self.model.decode(rollout.x_0, rollout.size)

    @torch.no_grad()
    def _measure(self, pictures: Tensor, rollout: Rollout) -> dict[str, Any]:
        """Reward, gap and photo distance of the rollout's own pictures."""
        gaps = self.parts.algorithm.gap(
            pictures, rollout.prompts, generator=generator(self.seed, "gap augmentation", self.step)
        )
        reward = self.parts.reward.score(pictures, rollout.prompts)
        self.ledger.reward_calls += 2 * len(pictures)
        return {
            "gaps": gaps,
            "reward": reward.mean().item(),
            "sgp_gap": gaps.mean().item(),
            "photo_distance": self.evaluator.live_distance(pictures, list(rollout.prompts)),
        }

    def _descend(self, rollout: Rollout, weights: Tensor | None, scale: float) -> dict[str, Any]:
        """Accumulate K pairs of gradients and update after each pair, or once after all."""
        config = self.config.algorithm
        draws = self.parts.draws.pairs(len(rollout.prompts), config.pairs, generator(self.seed, "injection", self.step))
        augmentation = generator(self.seed, "augmentation", self.step)
        per_update = 1 if config.update == "pair" else config.pairs
        losses, norms = [], []
        for number, injections in enumerate(draws, 1):
            with arithmetic(self.device, self._dtype):
                metrics = self.parts.algorithm.backward(
                    rollout,
                    injections,
                    self.step + 1,
                    weights=weights,
                    scale=1 / (len(injections) * per_update),
                    generator=augmentation,
                )
            self.ledger.gradient_passes += len(injections) * len(rollout.prompts)
            self.ledger.reward_calls += len(injections) * len(rollout.prompts)
            losses.append(metrics["loss"])
            if number % per_update == 0:
                norms.append(self._update(metrics["loss"], scale))
        return {
            "loss": sum(losses) / len(losses),
            "grad_norm": sum(norms) / len(norms),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def _update(self, loss: float, scale: float) -> float:
        """One optimizer step at the rate that warm-up and target leave; returns the gradient norm before clipping."""
        options = self.config.optimizer
        norm = nn.utils.clip_grad_norm_(self.parameters, options.grad_clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise SrpoError(
                f"loss {loss} with gradient norm {norm} at step {self.step + 1}: the weights of the last checkpoint "
                f"are whole; lower optimizer.lr (now {options.lr:g}) and start again from there"
            )
        warm = min(1.0, (self.ledger.updates + 1) / options.warmup_steps) if options.warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * warm * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ledger.updates += 1
        return norm

    def _save(self) -> None:
        state = {
            "config": _digest(self.config),
            "target": self.target.state_dict() if self.target else None,
            "ledger": self.ledger.state_dict(),
            "evaluator": self.evaluator.state_dict(),
        }
        keep = self.config.checkpoint.keep
        save_checkpoint(self.folder.checkpoints, self.step, self.model.transformer, self.optimizer, state, keep)

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
            rows.append(Photographs(prompts).batch(0, len(prompts), size)[0])
            labels.append("photograph")
        save_grid(rows, self.folder.path / BEFORE_AFTER, labels, prompts)

    def _evaluate(self, name: str) -> Evaluation | None:
        if not self.prompts.held_out:
            return None
        with arithmetic(self.device, self._dtype):
            evaluation = self.evaluator.run()
        self.folder.write_json(name, evaluation.to_json())
        return evaluation

    def finish(self) -> dict[str, Any]:
        """Measure the tuned model, and write the pictures of before and after and the summary."""
        tuned = self._evaluate(TUNED)
        self._sample()
        self._draw_before_after()
        base = json.loads((self.folder.path / BASE).read_text()) if tuned else {}
        summary = {
            "base": base,
            "tuned": tuned.to_json() if tuned else {},
            "steps": self.step,
            "stopped_by": "target" if self.stopped else "steps",
            "seconds": round(self.ledger.seconds, 1),
            "ledger": self.ledger.report(),
            "seed": self.seed,
            "model": self.config.model.name,
            "evaluation_prompts": len(self.prompts.held_out),
        }
        self.folder.write_json(SUMMARY, summary)
        return summary
