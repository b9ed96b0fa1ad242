"""Which memory plan fits a machine, what it needs there, and what would help where none does. Numbers in, numbers out.

A plan's peak is the largest of its stages, not their sum: text encoders are gone before the rest is loaded, and the
graph that is cut at x_0_hat never holds the decoder's backward pass and the transformer's at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srpo_cli.errors import UsageError

if TYPE_CHECKING:
    from srpo_cli.config.schema import TrainConfig
    from srpo_cli.runtime.doctor import Device

GIB = 2**30
_GB = 1e9

PARTS = (
    "weights",
    "master",
    "optimizer",
    "gradients",
    "average",
    "activations",
    "decoder",
    "reward",
    "encoders",
    "buffers",
)
"""What memory is spent on; ``decoder`` and ``reward`` are their weights and their own activations."""

_SHARES = (0.80, 0.85, 0.90, 0.95)  # of a GPU's memory: the first is filled gladly, the last is all that can be
_FULL = _SHARES[-1]
_HOST_SHARE = 0.85  # of the host's memory; the rest is the system's and the page cache's
_CONTEXT = 1.0 * _GB  # CUDA context and cuBLAS's and cuDNN's workspaces
_FRAGMENTS = 0.05  # of all that comes and goes
_PROCESS = 4.0 * _GB  # Python, torch and CUDA's libraries in one process
_SMALL_MODEL = 10**9  # parameters, below which float32 weights in every process are the simplest thing that fits
_UPDATED_BLOCK = 2**26  # elements that SplitAdamW updates at a time; where they stream, three such blocks are there

_MOMENTS = {"float32": 8.0, "bfloat16": 4.0, "8bit": 2 * (1 + 4 / 256)}
"""Bytes per parameter of Adam's two moments; in 8 bit there is a float32 scale for every 256."""
_ELEMENT = {"float32": 4, "bfloat16": 2}
_COUNTED = {"model.size", "train.mode"}  # keys whose change is counted anew
_BASE = {"float8": 1.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes per weight of a quantised base; nf4 has a float32 scale for every 64 (bitsandbytes, not double-quantised)."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that times are estimated for.

    Attributes:
        device: what torch's name of the device contains.
        memory: GiB that torch reports, a little less than the name says.
        teraflops: dense bfloat16 with float32 accumulation, as published.
        utilisation: share of ``teraflops`` that a compiled FLUX reaches here; an assumption.
        host_link: GB/s each way to pinned host memory.
        peer_link: GB/s of a ring collective inside a node.
        host_memory: GiB of the host for each GPU, where the machine is not the one that asks.
    """

    device: str
    memory: float
    teraflops: float
    utilisation: float
    host_link: float
    peer_link: float
    host_memory: float


# Memory, TFLOP/s and links: NVIDIA's data sheets (H100/H200 SXM, A100 SXM, L40S, B200 in a DGX, H20) and the
# architecture papers of GeForce RTX 4090 and 5090. Utilisation: diffusers' compiled FLUX.1-dev at 1024 px runs at
# 465 TFLOP/s on an H100, 47 %; published H20 runs reach 66 % of its few FLOPs; a 4090 about 40 %. Links at 80 % of
# what PCIe and NVLink promise; host memory as clouds sell it.
GPUS = {
    "h100": Gpu("H100", 79.0, 989, 0.45, 50, 350, 128),
    "h200": Gpu("H200", 139.0, 989, 0.45, 50, 350, 128),
    "a100-80": Gpu("A100-SXM4-80GB", 79.0, 312, 0.50, 24, 230, 120),
    "a100-40": Gpu("A100-SXM4-40GB", 39.4, 312, 0.50, 24, 230, 80),
    "l40s": Gpu("L40S", 44.4, 362, 0.45, 24, 20, 64),
    "rtx-4090": Gpu("RTX 4090", 23.5, 165, 0.40, 24, 10, 64),
    "rtx-5090": Gpu("RTX 5090", 31.3, 209, 0.40, 50, 20, 64),
    "b200": Gpu("B200", 178.0, 2250, 0.35, 50, 700, 256),
    "h20": Gpu("H20", 95.0, 148, 0.66, 50, 350, 128),
}
"""Known GPUs by the name that ``--on`` takes."""


@dataclass(frozen=True)
class Work:
    """What one part computes and keeps for one picture; FLOPs count a multiply-add as two, bytes are in its dtype.

    Attributes:
        forward, both: FLOPs of one forward pass, and of forward and backward.
        recomputed: FLOPs of both where every block is recomputed in the backward pass.
        saved: bytes kept for the backward pass.
        stash: the same where every block is recomputed.
        block: bytes that the largest block keeps while it is recomputed.
        widest: bytes of the largest activation.
    """

    forward: float = 0.0
    both: float = 0.0
    recomputed: float = 0.0
    saved: int = 0
    stash: int = 0
    block: int = 0
    widest: int = 0


@dataclass(frozen=True)
class Counts:
    """What a configuration's models hold and do, counted on the meta device.

    Attributes:
        parameters: of the transformer, without a LoRA.
        modulation, linears: of these, the weights of the blocks' modulation layers and of their other linear layers.
        block, matrix: parameters of the largest block, and of its largest weight.
        lora: parameters of the LoRA that would be trained.
        transformer, decoder, reward: the work of each; the transformer with its LoRA in mode lora.
        decoder_parameters, reward_parameters, encoder_parameters: VAE, the reward's picture tower, CLIP and T5.
        prompt: bytes of one encoded prompt.
        uncounted: what could not be counted, in words for people; empty where nothing is missing.
    """

    parameters: int
    modulation: int
    linears: int
    block: int
    matrix: int
    lora: int
    transformer: Work
    decoder: Work
    reward: Work
    decoder_parameters: int
    reward_parameters: int
    encoder_parameters: int
    prompt: int
    uncounted: str = ""


Recount = Callable[["TrainConfig"], Counts]
"""Counts a changed configuration."""


@dataclass(frozen=True)
class Machine:
    """Where a run would happen; bytes are those of one GPU and of one node.

    ``eight_bit`` says whether bitsandbytes is there, which 8-bit moments need.
    """

    gpu: str
    gpu_memory: int
    host_memory: int
    gpus: int = 1
    nodes: int = 1
    is_cpu: bool = False
    eight_bit: bool = True

    @property
    def ranks(self) -> int:
        """Processes of the whole run."""
        return self.gpus * self.nodes

    @property
    def known(self) -> Gpu | None:
        """The entry of :data:`GPUS` that this GPU is."""
        return next((gpu for name, gpu in GPUS.items() if self.gpu == name or gpu.device in self.gpu), None)

    @property
    def memory(self) -> int:
        """Bytes that a process can use for its models."""
        return self.host_memory // self.gpus if self.is_cpu else self.gpu_memory

    def __str__(self) -> str:
        count = "" if self.ranks == 1 else f"{self.ranks} x "
        return f"{count}{self.gpu}, {self.memory / GIB:.0f} GiB{'' if self.ranks == 1 else ' each'}"


@dataclass(frozen=True)
class Effort:
    """What a method asks of the models for one rollout.

    Attributes:
        draws: draws of its largest lot, which one pass of the model takes where branches are batched.
        graph: most calls of the transformer that the graph of one draw holds until it is gone backward through.
        calls: calls of the transformer with a gradient, over all lots; on average where they are drawn at random.
        judged: pictures that are decoded and judged with a gradient, over all lots.
        forwards: calls of the transformer without a gradient, beside the sampler's.
        compares: whether one of these is made while a graph is there.
    """

    draws: int = 1
    graph: int = 1
    calls: float = 1
    judged: int = 1
    forwards: int = 0
    compares: bool = False

    @classmethod
    def of(cls, config: TrainConfig, together: int = 1) -> Effort:
        """That of the configured method, with so many rollouts ``together`` in one pass of the model."""
        algorithm, steps, pairs = config.algorithm, config.rollout.steps, config.algorithm.pairs
        if algorithm.group > 1:
            trained = algorithm.policy_steps(steps)
            first = -(-trained // pairs)  # whose steps are compared with the policy itself
            reference = trained if algorithm.grpo.kl else 0
            return cls(first, 1, trained, 0, trained - first + reference, bool(reference))
        if algorithm.name == "draft" and not algorithm.draft.noises:
            return cls(1, algorithm.draft.last_steps, algorithm.draft.last_steps * pairs, pairs)
        if algorithm.name == "alignprop":
            low, high = algorithm.alignprop.truncation or (0, steps)
            chances = [min(1.0, (step - low + 1) / (high - low + 1)) for step in range(low, steps)]
            called = sum(1 - (1 - chance) ** together for chance in chances[:-1]) + 1  # at the last step always
            return cls(1, steps - low, called * pairs, pairs)
        draws = {"srpo": len(algorithm.branches), "draft": algorithm.draft.noises + algorithm.draft.include_last}
        own = draws.get(algorithm.name, 1)
        return cls(own, 1, own * pairs, own * pairs)


@dataclass(frozen=True)
class Settings:
    """What every ``auto`` of the configuration's section ``memory`` comes to; the fields are its keys."""

    plan: str
    adam: str = "float32"
    gradients: str = "float32"
    micro_batch: int = 1
    batch_branches: bool = True
    transformer_checkpointing: bool = False
    vae_checkpointing: bool = False
    shard: int = 1


@dataclass(frozen=True)
class Advice:
    """Flags that make a plan smaller: the plan they lead to, what it would need, and whether that fits."""

    settings: str
    plan: str
    total_gib: float
    fits: bool

    def __str__(self) -> str:
        return f"{self.settings} ({self.plan}, {self.total_gib:.1f} GiB{'' if self.fits else ', still too much'})"


@dataclass(frozen=True)
class Plan:
    """A memory plan with its price. GiB, FLOPs, pictures and seconds are those of one process.

    Attributes:
        name: the plan's kind, with "+lora" in mode lora.
        why: one sentence.
        settings: what was chosen, and what was asked for.
        fits: whether device and host have room for it.
        memory_gib: by part, at the stage where the device holds most; without "total".
        stage: that stage.
        host_gib: host memory of all processes of a node, of rank 0's where they differ.
        forwards_per_step: pictures through the transformer without a gradient, on average where rollouts are replayed.
        gradient_passes_per_step: pictures through it forward and backward, on average where these are drawn at random.
        flops_per_step: of transformer, decoder and reward.
        seconds_per_step: an estimate, by known GPU that has the memory for this plan.
        disk_gib: checkpoints that are kept and the one that is being written, and the cache of encoded prompts.
        launch: the command line.
        advice: three settings that make it smaller, where it does not fit.
        machine: where it would run.
        counts, recount: what it was priced with; None for a plan that needed no counting.
    """

    name: str
    why: str
    settings: Settings
    fits: bool = True
    memory_gib: dict[str, float] = field(default_factory=dict)
    stage: str = ""
    host_gib: float = 0.0
    forwards_per_step: float = 0
    gradient_passes_per_step: float = 0
    flops_per_step: float = 0.0
    seconds_per_step: dict[str, float] = field(default_factory=dict)
    disk_gib: float = 0.0
    launch: str = ""
    advice: tuple[Advice, ...] = ()
    machine: Machine | None = None
    counts: Counts | None = field(default=None, repr=False, compare=False)
    recount: Recount | None = field(default=None, repr=False, compare=False)

    @property
    def total_gib(self) -> float:
        """The device's peak."""
        return sum(self.memory_gib.values())


def this_machine(devices: Sequence[Device], gpus: int | None = None, nodes: int = 1) -> Machine:
    """The machine that asks, with ``gpus`` of its devices (None: one process)."""
    memory = host_memory()
    eight_bit = find_spec("bitsandbytes") is not None
    if not devices:
        return Machine("cpu", 0, memory, gpus or 1, nodes, is_cpu=True, eight_bit=eight_bit)
    smallest = min(devices, key=lambda device: device.memory)
    return Machine(smallest.model, smallest.memory, memory, gpus or 1, nodes, eight_bit=eight_bit)


def host_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that processes get here: what is built in, or what a container is limited to."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups version 2, and 1
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            limits.append(int((groups / name).read_text()))
    return min(limits)


def known_machine(name: str, gpus: int | None = None, nodes: int = 1) -> Machine:
    """A machine with a known GPU, its host sized as :data:`GPUS` assumes; UsageError for an unknown name."""
    if name.lower() not in GPUS:
        raise UsageError.unknown("GPU", name, GPUS)
    gpu, count = GPUS[name.lower()], gpus or 1
    return Machine(name.lower(), int(gpu.memory * GIB), int(count * gpu.host_memory * GIB), count, nodes)


def settle(config: TrainConfig, machine: Machine, counts: Callable[[], Counts], **more: Any) -> Plan:
    """The plan of a run that is about to start.

    On a CPU there is nothing to choose: memory is what it has, time is what it lacks, so nothing is recomputed and
    ``counts`` is not called. ``more`` goes to :func:`choose`.
    """
    if machine.is_cpu:
        settings = next(_candidates(config, machine, parameters=0))
        return Plan(_name(settings, config), _REASONS["cpu"], settings, machine=machine)
    return choose(counts(), config, machine, **more)


def choose(
    counts: Counts,
    config: TrainConfig,
    machine: Machine,
    *,
    launch: str = "",
    recount: Recount | None = None,
) -> Plan:
    """The quickest plan that fits, or the nearest to fitting with what would make it fit.

    The first kind that fits is taken, in the order of what it costs: everything on the device, then shared or
    streamed. Within it, room to spare comes before exact moments, and these before exact sums of gradients; of what
    is left the quickest wins. Keys of ``memory`` that are not ``auto`` are obeyed.

    Args:
        counts: of this configuration.
        launch: the command line that starts it.
        recount: counts of a changed configuration, for the advice; None: advice that needs none.
    """
    prices = [
        _Price(settings, counts, config, machine)
        for settings in _candidates(config, machine, parameters=counts.parameters)
    ]
    chosen = _first_that_fits(prices)
    fits = chosen is not None
    if chosen is None:
        chosen = _nearest(prices)
    plan = replace(chosen.plan(), why=_reason(chosen, prices), fits=fits, launch=launch, counts=counts, recount=recount)
    return plan if fits else replace(plan, advice=advise(plan, config))


def advise(plan: Plan, config: TrainConfig) -> tuple[Advice, ...]:
    """Three settings that need less than a counted plan, each planned anew: those that fit first, then the smallest."""
    found = []
    for changes, gpus in _remedies(config, plan):
        changed, counts = _changed(config, changes), plan.counts
        if changes.keys() & _COUNTED:
            if plan.recount is None:
                continue
            counts = plan.recount(changed)
        machine = replace(plan.machine, gpus=gpus, host_memory=plan.machine.host_memory // plan.machine.gpus * gpus)
        prices = [_Price(one, counts, changed, machine) for one in _candidates(changed, machine, counts.parameters)]
        best = _first_that_fits(prices)
        price = best or _nearest(prices)
        if price.total / GIB > plan.total_gib - 0.05 and (plan.fits or best is None):
            continue
        settings = [f"--set {key}={_yaml(value)}" for key, value in changes.items()]
        settings += [f"--gpus {gpus}"] if gpus != plan.machine.gpus else []
        total = round(price.total / GIB, 1)
        found.append(Advice(" ".join(settings), _name(price.settings, changed), total, best is not None))
    found.sort(key=lambda advice: (not advice.fits, 0 if advice.fits else advice.total_gib))
    return tuple(found[:3])


def out_of_memory(plan: Plan, config: TrainConfig) -> str:
    """One line for a run that found no memory: what was planned, and what needs less."""
    if plan.counts is None:
        half = [max(16, edge // 32 * 16) for edge in config.model.size]
        settings = [f"train.batch_size={config.train.batch_size // 2}"] if config.train.batch_size > 1 else []
        settings += ["memory.batch_branches=false"] if plan.settings.batch_branches else []
        settings += [f"model.size={_yaml(half)}"]
        return f"out of memory in plan {plan.name}: try {', or '.join(f'--set {setting}' for setting in settings)}"
    told = f"out of memory in plan {plan.name}, which was to need {plan.total_gib:.1f} of "
    told += f"{plan.machine.memory / GIB:.1f} GiB"
    advice = advise(plan, config)
    return f"{told}: try {', or '.join(map(str, advice))}" if advice else f"{told}, and no setting needs less"


# What may be chosen


def _candidates(config: TrainConfig, machine: Machine, parameters: int) -> Iterator[Settings]:
    """Every combination that the configuration leaves open, the preferred ones first."""
    memory = config.memory
    if memory.shard != "auto" and machine.ranks % memory.shard:
        raise UsageError(
            f"memory.shard is {memory.shard}, and the run has {machine.ranks} process(es): give a divisor of these"
        )
    micro_batches = _open(memory.micro_batch, _halvings(config.train.batch_size))
    if machine.is_cpu:
        micro_batches = micro_batches[:1]
    both = (True,) if machine.is_cpu or Effort.of(config).draws == 1 else (True, False)
    recompute = (False,) if machine.is_cpu else (False, True)
    for kind in _kinds(config, machine, parameters):
        for adam, micro_batch, batched, transformer, vae in product(
            _moments(kind, config, machine),
            micro_batches,
            _open(memory.batch_branches, both),
            _open(memory.transformer_checkpointing, recompute),
            _open(memory.vae_checkpointing, recompute),
        ):
            settings = Settings(
                kind,
                adam,
                "float32",
                min(micro_batch, config.train.batch_size),
                batched,
                transformer,
                vae,
                _open(memory.shard, (machine.gpus,))[0] if kind == "sharded" else 1,
            )
            for gradients in _gradients(settings, config):
                yield replace(settings, gradients=gradients)


def _kinds(config: TrainConfig, machine: Machine, parameters: int) -> tuple[str, ...]:
    """Kinds of plan in the order of what they cost; UsageError for one that cannot be had."""
    asked, dtype = config.memory.plan, config.model.dtype
    if config.train.mode == "lora":
        if asked not in ("auto", "replicated"):
            raise UsageError(
                f"memory.plan is {asked} and train.mode is lora: a LoRA's state is small and in every process; "
                "set memory.plan=auto"
            )
        return ("replicated",)
    if asked in ("resident", "streamed") and dtype == "float32" and not machine.is_cpu:
        raise UsageError(
            f"memory.plan is {asked} and model.dtype is float32: it keeps bfloat16 weights beside their master; "
            "set model.dtype=bfloat16 or memory.plan=replicated"
        )
    if asked != "auto":
        return (asked,)
    if machine.is_cpu or parameters < _SMALL_MODEL or config.memory.master == "bfloat16":
        return ("replicated",)
    shared = ("sharded",) if machine.ranks > 1 else ()
    return (*shared, "replicated") if dtype == "float32" else (*shared, "resident", "streamed")


def _moments(kind: str, config: TrainConfig, machine: Machine) -> tuple[str, ...]:
    """Exact ones where they are on the device; what streams through the host is to be small."""
    if kind in ("replicated", "sharded"):
        return ("float32",)
    eight_bit = ("8bit",) if machine.eight_bit else ()
    exact = ("float32",) if kind == "resident" else ()
    return _open(config.memory.adam, (*exact, *eight_bit, "bfloat16"))


def _gradients(settings: Settings, config: TrainConfig) -> tuple[str, ...]:
    """A single pass is computed in bfloat16 anyway, so float32 sums have a use only where there are several."""
    if settings.plan in ("replicated", "sharded"):
        return ("float32",)
    several = _passes_per_update(settings, config) > 1
    return _open(config.memory.gradients, ("float32", "bfloat16") if several else ("bfloat16",))


def _passes_per_update(settings: Settings, config: TrainConfig) -> int:
    """Backward passes whose gradients are summed up in one update."""
    micro_batches = -(-config.train.batch_size // settings.micro_batch)
    draws = 1 if settings.batch_branches else Effort.of(config).draws
    return micro_batches * draws * (config.algorithm.pairs if config.algorithm.update == "rollout" else 1)


def _open(asked: Any, choices: tuple[Any, ...]) -> tuple[Any, ...]:
    return choices if asked == "auto" else (asked,)


def _halvings(number: int) -> tuple[int, ...]:
    """``number``, half of it and so on, down to 1."""
    return (number,) if number == 1 else (number, *_halvings(number // 2))


def _name(settings: Settings, config: TrainConfig) -> str:
    return f"{settings.plan}+lora" if config.train.mode == "lora" else settings.plan


# What it costs


class _Price:
    """What one combination of settings needs, on one machine."""

    def __init__(self, settings: Settings, counts: Counts, config: TrainConfig, machine: Machine) -> None:
        self.settings, self.counts, self.config, self.machine = settings, counts, config, machine
        self.passes = _passes_per_update(settings, config)
        self.effort = Effort.of(config, min(settings.micro_batch, config.train.batch_size))
        self.stage, self.parts = max(self._stages().items(), key=lambda stage: sum(stage[1].values()))
        self.total = sum(self.parts.values())
        self.host = self._host()
        speed = machine.known or GPUS["h100"]  # of an unknown GPU only the order matters
        self.seconds = self._seconds(speed)

    @property
    def excess(self) -> float:
        """The most that device or host is filled, as a share of what may be filled; at most 1 where it fits."""
        return max(self.total / (_FULL * self.machine.memory), self.host / (_HOST_SHARE * self.machine.host_memory))

    def fits(self, share: float) -> bool:
        """Whether the device has room for it in ``share`` of its memory, and the host too."""
        return self.total <= share * self.machine.memory and self.excess <= 1

    @property
    def only_the_host_is_full(self) -> bool:
        """Whether the device has room for it, and the host has not."""
        return self.total <= _FULL * self.machine.memory and self.excess > 1

    @property
    def is_exact(self) -> bool:
        """Whether no sum of gradients is rounded more than its terms are."""
        return self.settings.gradients == "float32" or self.passes == 1

    def plan(self) -> Plan:
        """The plan, but for why."""
        config = self.config
        return Plan(
            name=_name(self.settings, config),
            why="",
            settings=self.settings,
            memory_gib={part: self.parts.get(part, 0.0) / GIB for part in PARTS},
            stage=self.stage,
            host_gib=self.host / GIB,
            forwards_per_step=_whole(self._rollouts()),
            gradient_passes_per_step=self._gradient_passes(),
            flops_per_step=self._flops(),
            seconds_per_step={
                name: round(self._seconds(gpu), 2)
                for name, gpu in GPUS.items()
                if not self.machine.is_cpu and self.total <= _FULL * gpu.memory * GIB
            },
            disk_gib=self._disk() / GIB,
            machine=self.machine,
        )

    # Bytes

    def _stages(self) -> dict[str, dict[str, float]]:
        """Bytes by part at every stage that may be the peak."""
        counts, settings, config = self.counts, self.settings, self.config
        transformer, decoder, reward = counts.transformer, counts.decoder, counts.reward
        rollouts = settings.micro_batch
        pictures = self._pictures()
        held = transformer.stash if settings.transformer_checkpointing else transformer.saved
        graph = pictures * self.effort.graph * held
        recompute = transformer.block if settings.transformer_checkpointing else 0
        work = pictures * (recompute + 2 * transformer.widest)  # the second: an activation's gradient, in and out
        kept = pictures * (decoder.stash if settings.vae_checkpointing else decoder.saved)
        decode = pictures * ((decoder.block if settings.vae_checkpointing else 0) + 2 * decoder.widest)
        judge = pictures * reward.saved

        state = self._state()
        gradients = state.pop("gradients")
        before = gradients if self.passes > 1 else 0.0
        transient = self._transient_weights()
        stages = {
            "rollout": {
                "weights": float(counts.linears) if config.rollout.dtype == "float8" else 0.0,  # beside their own
                "gradients": before,
                "activations": rollouts * (transformer.block + 2 * transformer.widest) + transient,
            },
            "judging": {
                "gradients": before,
                "activations": graph,
                "decoder": kept + max(0.0, decode - judge),
                "reward": judge,
            }
            if self.effort.judged
            else {"decoder": rollouts * 2 * decoder.widest, "reward": rollouts * 2 * reward.widest},
            # In a single pass the graph goes as the gradients come.
            "backward": {
                "gradients": gradients,
                "activations": (graph if self.passes > 1 else max(0.0, graph - gradients)) + work + transient,
            },
            "update": {"gradients": gradients, "buffers": self._update_buffers()},
        }
        if self.effort.compares:
            stages["comparing"] = {
                "gradients": before,
                "activations": graph + pictures * (transformer.block + 2 * transformer.widest) + transient,
            }
        if config.train.ema is not None:
            stages["measuring"] = {**stages["rollout"], "gradients": 0.0, "average": self._aside()}
        result = {}
        for name, extra in stages.items():
            parts = {part: state.get(part, 0.0) + extra.get(part, 0.0) for part in PARTS}
            moving = sum(extra.get(part, 0.0) for part in ("activations", "decoder", "reward"))
            parts["buffers"] += self._context() + _FRAGMENTS * moving
            result[name] = parts
        if not self._keeps_encoders():
            result["encoding"] = {"encoders": self._encoders(), "buffers": self._context()}
        return result

    def _state(self) -> dict[str, float]:
        """Bytes that are there all the time, and the gradients."""
        counts, settings, config = self.counts, self.settings, self.config
        element = self._element()
        parameters, trained = counts.parameters, self._trained()
        state = {
            "decoder": element * counts.decoder_parameters,
            "reward": element * counts.reward_parameters,
            "encoders": self._encoders() if self._keeps_encoders() else 0.0,
        }
        average = 4 * trained if config.train.ema is not None else 0
        if config.train.mode == "lora":
            return state | {
                "weights": self._base() + 4 * trained,
                "optimizer": 8 * trained,
                "gradients": 4 * trained,
                "average": average,
            }
        if settings.plan == "replicated":
            if config.memory.master == "bfloat16":
                held = {"weights": 2, "optimizer": 4, "gradients": 2}
            else:
                cast = 0 if self.machine.is_cpu or element == 4 else element  # autocast keeps what it has cast
                held = {"weights": 4 + cast, "optimizer": 8, "gradients": 4}
            return state | {part: size * parameters for part, size in held.items()} | {"average": average}
        if settings.plan == "sharded":
            share = parameters / settings.shard
            return state | {
                "weights": element * parameters,
                "master": 4 * share,
                "optimizer": 8 * share,
                "gradients": 4 * share,
                "average": average / settings.shard,
            }
        moments = _MOMENTS[settings.adam] * parameters
        on_device = settings.plan == "resident"
        return state | {
            "weights": 2 * parameters,
            "master": 2 * parameters * on_device,
            "optimizer": moments * on_device,
            "gradients": _ELEMENT[settings.gradients] * parameters,
            "average": average * on_device,
        }

    def _host(self) -> float:
        """Bytes of host memory of a node's processes."""
        parameters, settings = self.counts.parameters, self.settings
        process = _PROCESS + (self.total if self.machine.is_cpu else 0)
        if settings.plan == "streamed":
            average = 4 if self.config.train.ema is not None else 0
            process += (2 + _MOMENTS[settings.adam] + average) * parameters
        # To write a checkpoint rank 0 gathers the moments that are shared.
        gathered = _MOMENTS[settings.adam] * parameters if settings.plan == "sharded" else 0
        return process * self.machine.gpus + gathered

    def _aside(self) -> float:
        """Bytes of the weights that averaged ones take the place of while pictures are made and measured."""
        settings, config = self.settings, self.config
        if config.train.mode == "lora":
            return 4 * self.counts.lora
        halved = settings.plan in ("resident", "streamed") or config.memory.master == "bfloat16"
        return (2 if halved else 4) * self.counts.parameters / settings.shard

    def _element(self) -> int:
        """Bytes of a number in the frozen models and in the activations; a CPU always computes in float32."""
        return 4 if self.machine.is_cpu else _ELEMENT[self.config.model.dtype]

    def _trained(self) -> int:
        return self.counts.lora if self.config.train.mode == "lora" else self.counts.parameters

    def _base(self) -> float:
        """Bytes of the frozen transformer under a LoRA."""
        counts, base = self.counts, self.config.lora.base
        if base == "model":
            return self._element() * counts.parameters
        quantised = counts.linears + counts.modulation
        return _BASE[base] * quantised + self._element() * (counts.parameters - quantised)

    def _transient_weights(self) -> float:
        """Bytes of weights that come and go with a block: a dequantised one, or what a reduce-scatter sends."""
        if self.settings.plan == "sharded":
            return (self._element() + 4) * self.counts.block
        if self.config.train.mode == "lora" and self.config.lora.base != "model":
            return 2 * self._element() * self.counts.matrix  # with and without its scales
        return 0.0

    def _update_buffers(self) -> float:
        """Bytes of a block of split weights that is being updated in float32, and of those that stream beside it."""
        if self.settings.plan not in ("resident", "streamed"):
            return 0.0
        moments = _MOMENTS[self.settings.adam]
        working = 8 if self.settings.adam == "float32" else 16  # master and gradient; the moments where they are coded
        streamed = 3 * (2 + moments) if self.settings.plan == "streamed" else 0
        return min(_UPDATED_BLOCK, self.counts.parameters) * (working + streamed)

    def _encoders(self) -> float:
        return float(self._element() * self.counts.encoder_parameters)

    def _keeps_encoders(self) -> bool:
        return _cache_is_off(self.config)

    def _context(self) -> float:
        return 0.0 if self.machine.is_cpu else _CONTEXT

    def _disk(self) -> float:
        """Bytes of checkpoints while the newest is written and none yet removed, and of prompts that a run encodes.

        A guard may keep one more, its best.
        """
        config, trained = self.config, self._trained()
        low = 2 if self.settings.plan in ("resident", "streamed") else 0
        weights = 4 * (1 if config.train.ema is None else 2)
        kept = config.checkpoint.keep + 1 + (config.guard.action != "off")
        checkpoints = kept * (weights + low + _MOMENTS[self.settings.adam]) * trained
        if _cache_is_off(config):
            return checkpoints
        prompts = config.train.steps * config.train.batch_size * self.machine.ranks // config.algorithm.group
        held_out = max(config.evaluation.prompts, config.samples.count)
        return checkpoints + self.counts.prompt * (min(prompts, config.prompts.limit or prompts) + held_out)

    # Work and time

    def _rollouts(self) -> float:
        """Forwards without a gradient in a step; a replayed one has none."""
        config = self.config
        if config.rollout.source == "pictures":
            return 0.0
        own = config.rollout.steps / (1 + config.rollout.replay) + self.effort.forwards
        return config.train.batch_size * own

    def _gradient_passes(self) -> float:
        return _whole(self.config.train.batch_size * self.effort.calls)

    def _pictures(self) -> int:
        """Pictures in one pass of the model with a gradient."""
        return self.settings.micro_batch * (self.effort.draws if self.settings.batch_branches else 1)

    def _flops_by_batch(self) -> list[tuple[float, int]]:
        """FLOPs of a step with the pictures that they are computed for at a time."""
        counts, settings, config = self.counts, self.settings, self.config
        transformer, decoder, reward = counts.transformer, counts.decoder, counts.reward
        call = transformer.recomputed if settings.transformer_checkpointing else transformer.both
        verdict = (decoder.recomputed if settings.vae_checkpointing else decoder.both) + reward.both
        measured = config.train.batch_size * (decoder.forward + reward.forward)  # every step judges its rollouts
        judged = config.train.batch_size * self.effort.judged
        return [
            (self._rollouts() * transformer.forward + measured, settings.micro_batch),
            (self._gradient_passes() * call + judged * verdict, self._pictures()),
        ]

    def _flops(self) -> float:
        return sum(flops for flops, _ in self._flops_by_batch())

    def _seconds(self, gpu: Gpu) -> float:
        """Estimated seconds of a step: FLOPs at the assumed utilisation, and what streams or is exchanged, exposed."""
        # A GPU does 3 to 10 % more per second with four pictures at a time than with one.
        rate = gpu.teraflops * 1e12 * gpu.utilisation
        seconds = sum(flops / (rate * 1.06 * n / (n + 0.06)) for flops, n in self._flops_by_batch())
        updates = self.config.algorithm.pairs if self.config.algorithm.update == "pair" else 1
        parameters, plan = self._trained(), self.settings.plan
        if plan == "streamed":
            seconds += updates * (2 + _MOMENTS[self.settings.adam]) * parameters / (gpu.host_link * _GB)
        if self.machine.ranks > 1:
            if plan == "sharded":  # weights gathered once, gradients scattered in every pass
                exchanged = (self._element() + 4 * self.passes) * parameters
            else:
                exchanged = 2 * _ELEMENT[self.settings.gradients] * parameters
            seconds += updates * exchanged / (gpu.peer_link * _GB)
        return seconds


def _first_that_fits(prices: Sequence[_Price]) -> _Price | None:
    kinds = dict.fromkeys(price.settings.plan for price in prices)
    moments = dict.fromkeys(price.settings.adam for price in prices)
    for kind, share, adam, exact in product(kinds, _SHARES, moments, (True, False)):
        fitting = [
            price
            for price in prices
            if (price.settings.plan, price.settings.adam, price.is_exact) == (kind, adam, exact) and price.fits(share)
        ]
        if fitting:
            return min(fitting, key=lambda price: price.seconds)
    return None


def _nearest(prices: Sequence[_Price]) -> _Price:
    """What comes nearest to fitting; where only the host is too small, what the device has most room for."""
    return min(prices, key=lambda price: (price.excess, price.total))


def _cache_is_off(config: TrainConfig) -> bool:
    """Whether text encoders stay loaded, because no encoded prompt is kept on disk."""
    cache = config.prompts.cache
    return cache is None or (cache == "auto" and config.model.name == "miniature")


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


# Words

_REASONS = {
    "cpu": "on a CPU every process keeps float32 weights and recomputes nothing",
    "replicated": "the model is small enough for float32 weights and AdamW in every process",
    "resident": "the device holds bfloat16 weights, the low halves of their float32 master and Adam's moments",
    "sharded": "the processes of a node share float32 weights, gradients and Adam's moments, and each keeps bfloat16 "
    "weights gathered",
    "streamed": "low halves of the master and Adam's moments stay in host memory and stream through once per update",
}


def _reason(chosen: _Price, prices: Sequence[_Price]) -> str:
    """One sentence on why it is this one."""
    machine, config, kind = chosen.machine, chosen.config, chosen.settings.plan
    room = f"{machine.memory / GIB:.1f} GiB"
    if chosen.only_the_host_is_full:
        return (
            f"nothing fits: the closest plan needs {chosen.host / GIB:.0f} GiB of host memory, "
            f"{_HOST_SHARE * machine.host_memory / GIB:.0f} of {machine.host_memory / GIB:.0f} can be used"
        )
    if chosen.excess > 1:
        return (
            f"nothing fits: the closest plan needs {chosen.total / GIB:.1f} GiB, "
            f"{_FULL * machine.memory / GIB:.1f} of {room} can be used"
        )
    if machine.is_cpu:
        return _REASONS["cpu"]
    if config.train.mode == "lora":
        base = config.model.dtype if config.lora.base == "model" else config.lora.base
        return f"a LoRA with its AdamW is small beside the frozen {base} weights, so every process has both"
    why = _REASONS[kind]
    if config.memory.plan != "auto":
        return f"memory.plan asks for it: {why}"
    resident = [price.total for price in prices if price.settings.plan == "resident"]
    if kind == "streamed" and resident:
        why += f": with these on the device at least {min(resident) / GIB:.0f} GiB were needed, of {room}"
    return why


def _remedies(config: TrainConfig, plan: Plan) -> Iterator[tuple[dict[str, Any], int]]:
    """Changes that need less memory, the mildest first: of the configuration by dotted key, and of the GPUs here."""
    gpus, settings, full = plan.machine.gpus, plan.settings, config.train.mode == "full"
    tight = {
        "memory.vae_checkpointing": True,
        "memory.transformer_checkpointing": True,
        "memory.batch_branches": False,
        "memory.micro_batch": 1,
    }
    for key, value in tight.items():
        if getattr(settings, key.partition(".")[2]) != value:
            yield {key: value}, gpus
    yield tight, gpus
    for name in ("plan", "gradients", "adam"):
        if getattr(config.memory, name) != "auto":
            yield {f"memory.{name}": "auto"}, gpus
    if _cache_is_off(config) and config.model.name != "miniature":
        yield {"prompts.cache": "auto"}, gpus
    if config.train.ema is not None:
        yield {"train.ema": None}, gpus
    if full and not plan.machine.is_cpu:
        yield from (({}, more) for more in (2, 4, 8) if more > gpus)
    lora: dict[str, Any] = {"train.mode": "lora"} if full else {}
    if full and config.memory.plan not in ("auto", "replicated"):
        lora["memory.plan"] = "auto"
    # What was found too large has to get smaller, and not to spend on speed what it saves.
    saved = dict(list(tight.items())[:2]) if plan.fits else {}
    for base in ("model", "float8", "nf4"):
        if full or base != config.lora.base:
            yield {**lora, "lora.base": base, **saved}, gpus
    if config.model.size[0] * config.model.size[1] > 512 * 512:
        yield {"model.size": [512, 512], **saved}, gpus
        yield {**lora, "lora.base": "nf4", "model.size": [512, 512], **saved}, gpus


def _changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """The configuration with values by dotted key, checked again."""
    values = config.model_dump()
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return type(config).model_validate(values)


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
