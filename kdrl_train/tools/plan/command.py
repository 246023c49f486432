"""Estimates whether a run fits its devices and how long a step takes, from config.json alone.

`python -m kdrl_train plan` takes the settings of `train` (or the config.yaml of a run) and a choice
of devices. Every number it prints is an estimate: start/estimate/memory.py and tools/plan/speed.py
say how it is made, bench/results/plan-cpu/README.md how far memory was off in two real runs.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdrl_train.config import TrainConfig
from kdrl_train.config.models import DEFAULT_TEACHER, SELF, is_url
from kdrl_train.errors import written
from kdrl_train.model import lora
from kdrl_train.model.attention import Choice
from kdrl_train.model.choice import choose
from kdrl_train.output import guarded_console
from kdrl_train.runfolder.log import peak_memory_bytes
from kdrl_train.settings import (
    NaturalFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    Share,
    UnitInterval,
    settings,
)
from kdrl_train.start.estimate.case import Case, Placement
from kdrl_train.start.estimate.devices import PEAKS, Device, DeviceName, link_gb_per_s, measure_cpu
from kdrl_train.start.estimate.memory import (
    by_moment,
    causes,
    loading_bytes,
    memory_terms,
)
from kdrl_train.start.estimate.shapes import (
    ModelShape,
    largest_first,
    read_model,
    read_shape,
    served_heads,
    shape_of,
)
from kdrl_train.start.estimate.terms import ALWAYS, MOMENTS, Term
from kdrl_train.tools.plan.speed import Lengths, time_terms, totals

GB = 1e9
LIBRARIES = "Python and libraries"
"""Name of the term, on a CPU, for what this process holds so far; `train` loads a few more."""


@settings
class PlanConfig(TrainConfig):
    """A run as `train` takes it, and the devices that it is planned for."""

    gpus: PositiveInt = 1
    """GPUs of the whole run, with one process each. With --device cpu: processes on this
    machine."""
    gpus_per_node: PositiveInt = 8
    """GPUs that NVLink connects. Between more GPUs than this the network's speed counts."""
    device: DeviceName = "h100"
    """Device whose peak rates are used. cpu: this machine's, measured at the start."""
    gpu_memory: PositiveFloat | None = None
    """Memory of one GPU in GB (1e9 bytes). None: the device's."""
    reserve: UnitInterval = 0.05
    """Share of that memory that fragmentation may take."""
    tokens: PositiveInt | None = None
    """Mean length of a completion in tokens, for the time. None: sampling.max_new_tokens."""
    prompt_tokens: PositiveInt | None = None
    """Mean length of a prompt in tokens, for the time. None: data.max_prompt_tokens."""
    tflops: PositiveFloat | None = None
    """Peak rate of GEMMs in model.dtype, in TFLOP/s; None: the device's."""
    bandwidth: PositiveFloat | None = None
    """Peak bandwidth of the device's memory, in TB/s; None: the device's."""
    interconnect: PositiveFloat | None = None
    """Peak rate at which a GPU receives from the others, in GB/s; None: the device's."""
    gemm_share: Share = 0.7
    """Share of the peak rate that GEMMs reach. Large ones reached 0.8 on an H200."""
    bandwidth_share: Share = 0.8
    """Share of the peak bandwidth that memory reaches. A copy reached 0.9 on an H200."""
    interconnect_share: Share = 0.7
    """Share of the peak rate that collectives reach. The default is a guess."""
    launch_us: NaturalFloat = 500.0
    """Microseconds that Python and kernel launches take for each layer and token of `generate`. The
    default is a guess."""
    entries: PositiveFloat | None = None
    """Mean entries of a token's gradient with model.head_backward sketch: sketch_entries of a run
    of yours. Flatter distributions have more. None: 64 with a 16-bit model.dtype, else 150, as of
    a policy that is sure of most of its tokens."""
    flat: Probability | None = None
    """Share of tokens too flat to be sketched, whose gradient is exact: sketch_flat_share of a run
    of yours. None: all at a vocabulary so small that `entries` would cost more, else none."""
    json: Path | None = None
    """File for all numbers. None: only the tables on the screen."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)  # super() does not find its class in one with slots
        self._check_means()
        if self.optim.head_impl == "reference" or self.model.attention == "eager":
            raise ValueError(
                "optim.head_impl must not be reference, nor model.attention eager, got "
                f"{self.optim.head_impl} and {self.model.attention}: they hold all logits and all "
                "attention weights, which is not modelled"
            )
        if self.model.tensor_parallel > 1:
            raise ValueError(
                "model.tensor_parallel must be 1 to be planned, got "
                f"{self.model.tensor_parallel}: what split layers take is not modelled"
            )

    def _check_means(self) -> None:
        """Refuse a mean length above the longest length."""
        longest = {
            "tokens": ("sampling.max_new_tokens", self.sampling.max_new_tokens),
            "prompt_tokens": ("data.max_prompt_tokens", self.data.max_prompt_tokens),
        }
        for name, (key, most) in longest.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise ValueError(f"{name} must be at most {key} = {most}, got {value}")

    @property
    def lengths(self) -> Lengths:
        """Mean tokens."""
        return Lengths(
            prompt=self.prompt_tokens or self.data.max_prompt_tokens,
            response=self.tokens or self.sampling.max_new_tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Holds the memory and the time that a run is expected to take."""

    memory: list[Term]
    available_bytes: float
    """Memory of one GPU without the reserve."""
    time: list[Term]
    rollouts: int
    """Completions of a step, over all GPUs."""
    response: float
    """Mean tokens of a completion."""
    loading_bytes: float
    """CPU memory of rank 0 before the models are sharded."""

    @property
    def moments(self) -> dict[str, float]:
        """Returns the bytes held at each moment."""
        return by_moment(self.memory)

    @property
    def peak(self) -> float:
        """Returns the bytes held at the moment that needs the most."""
        return max(self.moments.values())

    @property
    def fits(self) -> bool:
        """Says whether the peak is within the available memory."""
        return self.peak <= self.available_bytes

    @property
    def causes(self) -> list[Term]:
        """Returns the largest terms of each moment that does not fit."""
        return causes(self.memory, self.available_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Returns what --json writes."""
        sequential, overlapped = totals(self.time)
        return {
            "estimate": True,
            "memory": [asdict(term) for term in self.memory],
            "moments": self.moments,
            "peak_bytes": self.peak,
            "limit_bytes": self.available_bytes,
            "loading_bytes": self.loading_bytes,
            "fits": self.fits,
            "causes": {term.name: term.remedy for term in self.causes},
            "time": [asdict(term) for term in self.time],
            "seconds": sequential,
            "seconds_communication_hidden": overlapped,
            "tokens_per_s": self.rollouts * self.response / sequential,
        }


def make_estimate(config: PlanConfig) -> Estimate:
    """Estimates memory and time of a run.

    Raises: ValueError for models that cannot be read or are not modelled, an engine that is not,
        and for a workspace that is too small for the logits of one token.
    """
    if config.engine.kind != "generate":  # here, since options may replace that of a file
        raise ValueError(
            f'engine.kind must be "generate" to be planned, got "{config.engine.kind}": what other '
            "engines take is not modelled; plan the rest with --engine.kind generate"
        )
    trusted = config.model.trust_remote_code
    model = read_model(config.model.policy, "model.policy", trusted)
    policy = shape_of(model, f"model.policy = {config.model.policy!r}")
    teachers: tuple[ModelShape, ...] = ()
    if config.method.kd is not None:
        places = config.model.teacher_places or {DEFAULT_TEACHER: ""}
        teachers = largest_first(
            policy if place == SELF else read_shape(place, config.model.teacher_key(name), trusted)
            for name, place in places.items()
            if not is_url(place)  # a server's memory is its own
        )
    cpu, adapters = config.device == "cpu", config.model.lora
    placement = Placement(
        gpus=config.gpus,
        cpu=cpu,
        teacher_weights="cpu" if config.model.offload_teacher else "sharded",
        offload_policy=config.model.offload_policy,
        memory_bytes=None if cpu else int(device_of(config).memory_bytes),
    )
    case = Case(
        run=config,
        policy=policy,
        teacher=teachers[0] if teachers else None,
        other_teachers=teachers[1:],
        served=served_heads(config),
        placement=placement,
        adapters=lora.count(model, adapters) if adapters.rank else 0,
        head_rank=lora.head_rank(model, adapters) if adapters.rank else 0,
        choice=attention_of(model, config),
        entries=config.entries,
        flat=config.flat,
    )
    memory = memory_terms(case)
    if cpu:
        libraries = peak_memory_bytes(torch.device("cpu")) or 0.0
        memory.append(Term(LIBRARIES, libraries, "of this process", ALWAYS))
    device = device_of(config)
    return Estimate(
        memory=memory,
        available_bytes=device.memory_bytes * (1 - config.reserve),
        time=time_terms(case, device, config.lengths, config.launch_us),
        rollouts=config.sampling.prompts_per_step * config.sampling.group_size,
        response=config.lengths.response,
        loading_bytes=loading_bytes(case),
    )


def attention_of(model: Any, config: PlanConfig) -> Choice:
    """Chooses the attention of a policy as `train` does on a CPU: FlashAttention keeps no more."""
    if config.model.attention is not None:
        return Choice()
    try:
        return choose(model, None, torch.device("cpu"), torch.float32)
    except Exception:  # what an unusual model's code raises: train says it, this is an estimate
        return Choice()


def device_of(config: PlanConfig) -> Device:
    """Returns the memory and the speeds of one process: a CPU is measured, a GPU reaches the
    configured shares of its peaks."""
    dtype = config.model.dtype
    if config.device == "cpu":
        cpu = measure_cpu(getattr(torch, dtype), config.gpus)
        memory, flops, bandwidth, link = cpu.memory_bytes, cpu.flops, cpu.bandwidth, cpu.link
    else:
        peaks = PEAKS[config.device]
        memory = peaks.memory_gb * GB
        flops = config.gemm_share * getattr(peaks, dtype) * 1e12
        bandwidth = config.bandwidth_share * peaks.bandwidth * 1e12
        link = config.interconnect_share * GB
        link *= link_gb_per_s(peaks, config.gpus, config.gpus_per_node)
    if config.gpu_memory is not None:
        memory = config.gpu_memory * GB
    if config.tflops is not None:
        flops = config.gemm_share * config.tflops * 1e12
    if config.bandwidth is not None:
        bandwidth = config.bandwidth_share * config.bandwidth * 1e12
    if config.interconnect is not None:
        link = config.interconnect_share * config.interconnect * GB
    return Device(memory_bytes=memory, flops=flops, bandwidth=bandwidth, link=link)


def memory_table(estimate: Estimate, config: PlanConfig) -> Table:
    """Makes a table of memory: one line for each term, then one for each moment."""
    table = Table(title=f"memory of one of {config.gpus} x {config.device}, estimated")
    table.add_column("term")
    table.add_column("GB", justify="right")
    for name in ("held during", "formula", "too large: what to change"):
        table.add_column(name, overflow="fold")
    too_large = estimate.causes
    for term in estimate.memory:
        when = "always" if term.when == ALWAYS else ", ".join(term.when)
        remedy = Text(term.remedy if term in too_large else "", "bold red")
        table.add_row(term.name, _gb(term.value), when, term.formula, remedy)
    table.add_section()
    for moment, held in estimate.moments.items():
        excess = held - estimate.available_bytes
        text = Text(f"{_gb(excess)} GB too much" if excess > 0 else "", "bold red")
        table.add_row(f"sum at: {moment}", _gb(held), "", MOMENTS[moment], text)
    return table


def time_table(estimate: Estimate, config: PlanConfig) -> Table:
    """Makes a table of time: one line for each term, then the sums."""
    table = Table(title=f"one step on {config.gpus} x {config.device}, estimated")
    table.add_column("term")
    table.add_column("seconds", justify="right")
    table.add_column("part of the step")
    table.add_column("formula", overflow="fold")
    for term in estimate.time:
        table.add_row(term.name, _seconds(term.value), ", ".join(term.when), term.formula)
    table.add_section()
    sequential, overlapped = totals(estimate.time)
    rate = f"{estimate.rollouts * estimate.response / sequential:,.0f} response tokens per second"
    table.add_row("sum", _seconds(sequential), "", rate)
    if overlapped < sequential:
        note = "at best: communication takes place during forward and backward"
        table.add_row("sum, overlapped", _seconds(overlapped), "", note)
    return table


def verdict(estimate: Estimate, config: PlanConfig) -> Text:
    """Writes the last lines: whether the run fits, what is free, and what the estimate assumes."""
    available = f"{_gb(estimate.available_bytes)} GB ({config.reserve:.0%} kept for fragmentation)"
    moment = max(estimate.moments, key=lambda name: estimate.moments[name])
    peak = f"the most is {_gb(estimate.peak)} GB (at: {moment}) of {available}"
    if estimate.fits:
        free = estimate.available_bytes - estimate.peak
        word, text = ("fits", "bold green"), f": {peak}; {_gb(free)} GB stay free."
    else:
        word = "does not fit", "bold red"
        text = f": {peak}. The last column says what to change."
    if config.gpus > 1:
        text += f" To load the models, rank 0 takes {_gb(estimate.loading_bytes)} GB of CPU memory."
    return Text.assemble(
        word,
        f"{text} These numbers are estimates. Memory is for the longest sequences, "
        f"{config.data.max_prompt_tokens:,} prompt + {config.sampling.max_new_tokens:,} response "
        f"tokens; time is for a mean of {config.lengths.prompt:,} + {config.lengths.response:,} "
        "tokens, without the verifier.",
    )


def _gb(size: float) -> str:
    return f"{size / GB:,.2f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.3g}"


def main(config: PlanConfig, console: Console | None = None) -> int:
    """Prints the estimate; returns 0 if the run fits, else 1.

    Args:
        console: where the tables go; None: standard output.
    Raises: what make_estimate raises.
    """
    estimate = make_estimate(config)
    console = guarded_console(console)
    console.print(memory_table(estimate, config))
    console.print(time_table(estimate, config))
    console.print(verdict(estimate, config))
    if config.json is not None:
        text = json.dumps(estimate.to_dict(), indent=1)
        with written(config.json):
            config.json.write_text(text + "\n", encoding="utf-8")
    return 0 if estimate.fits else 1
