"""Will it fit, and how long does a step take? Predicted from the models' config.json alone.

`python -m kdrl_train plan` takes the settings of `train` (or the config.yaml of a run) and says
which devices. Every number it prints is an estimate: planning/memory.py and planning/speed.py say
how it is made, bench/results/plan-cpu/README.md how far memory was off in two real runs.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kdrl_train.config import TrainConfig
from kdrl_train.runfolder.log import peak_memory_bytes
from kdrl_train.settings import (
    NaturalFloat,
    PositiveFloat,
    PositiveInt,
    Share,
    UnitInterval,
    settings,
)
from kdrl_train.start.estimate.case import Case, Placement
from kdrl_train.start.estimate.devices import PEAKS, Device, DeviceName, link_gb_per_s, measure_cpu
from kdrl_train.start.estimate.memory import (
    ALWAYS,
    MOMENTS,
    by_moment,
    causes,
    loading_bytes,
    memory_terms,
)
from kdrl_train.start.estimate.shapes import read_shape
from kdrl_train.start.estimate.terms import Term
from kdrl_train.tools.plan.speed import Lengths, time_terms, totals

GB = 1e9
LIBRARIES = "Python and libraries"
"""Term of a CPU: what this process holds so far; `train` loads a few more."""


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
        if self.engine.kind != "generate":
            raise ValueError(
                f'engine.kind must be "generate" to be planned, got "{self.engine.kind}": what '
                "other engines take is not modelled; `check` estimates a vllm_server run's memory"
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
class Plan:
    """The prediction. Every number is an estimate."""

    memory: list[Term]
    limit: float
    """Bytes of one GPU, less the reserve."""
    time: list[Term]
    rollouts: int
    """Completions of a step, over all GPUs."""
    response: float
    """Mean tokens of one."""
    loading: float
    """Bytes of rank 0's CPU memory before the models are sharded."""

    @property
    def moments(self) -> dict[str, float]:
        """Bytes held at each moment."""
        return by_moment(self.memory)

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return max(self.moments.values())

    @property
    def fits(self) -> bool:
        """Whether the worst moment is within the limit."""
        return self.peak <= self.limit

    @property
    def causes(self) -> list[Term]:
        """The largest terms of each moment that does not fit."""
        return causes(self.memory, self.limit)

    def to_dict(self) -> dict[str, Any]:
        """What --json writes."""
        one_by_one, hidden = totals(self.time)
        return {
            "estimate": True,
            "memory": [asdict(term) for term in self.memory],
            "moments": self.moments,
            "peak_bytes": self.peak,
            "limit_bytes": self.limit,
            "loading_bytes": self.loading,
            "fits": self.fits,
            "causes": {term.name: term.remedy for term in self.causes},
            "time": [asdict(term) for term in self.time],
            "seconds": one_by_one,
            "seconds_communication_hidden": hidden,
            "tokens_per_s": self.rollouts * self.response / one_by_one,
        }


def make_plan(config: PlanConfig) -> Plan:
    """Memory and time of a run.

    Raises: ValueError for models that cannot be read or are not modelled, and for a workspace that
        does not hold a row of logits.
    """
    policy = read_shape(config.model.policy, "model.policy")
    teacher = None
    if config.method.kd is not None:
        teacher = read_shape(config.model.teacher or "", "model.teacher")
    cpu = config.device == "cpu"
    placement = Placement(
        gpus=config.gpus,
        cpu=cpu,
        teacher_weights="cpu" if config.model.offload_teacher else "sharded",
        offload_policy=config.model.offload_policy,
    )
    case = Case(run=config, policy=policy, teacher=teacher, placement=placement)
    memory = memory_terms(case)
    if cpu:
        libraries = peak_memory_bytes(torch.device("cpu")) or 0.0
        memory.append(Term(LIBRARIES, libraries, "of this process", ALWAYS))
    device = device_of(config)
    return Plan(
        memory=memory,
        limit=device.memory_bytes * (1 - config.reserve),
        time=time_terms(case, device, config.lengths, config.launch_us),
        rollouts=config.sampling.prompts_per_step * config.sampling.group_size,
        response=config.lengths.response,
        loading=loading_bytes(case),
    )


def device_of(config: PlanConfig) -> Device:
    """What one process has, at the shares it is said to reach; a CPU is measured as it is."""
    dtype = config.model.dtype
    if config.device == "cpu":
        found = measure_cpu(getattr(torch, dtype), config.gpus)
        memory, flops, bandwidth = found.memory_bytes, found.flops, found.bandwidth
        link = found.link
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


def memory_table(plan: Plan, config: PlanConfig) -> Table:
    """One line a term, then one a moment."""
    table = Table(title=f"memory of one of {config.gpus} x {config.device}, estimated")
    table.add_column("held")
    table.add_column("GB", justify="right")
    for name in ("when", "how much", "too much"):
        table.add_column(name, overflow="fold")
    too_much = plan.causes
    for term in plan.memory:
        when = "always" if term.when == ALWAYS else ", ".join(term.when)
        remedy = f"[bold red]{term.remedy}[/]" if term in too_much else ""
        table.add_row(term.name, _gb(term.value), when, term.formula, remedy)
    table.add_section()
    for moment, held in plan.moments.items():
        over = held > plan.limit
        text = f"[bold red]{_gb(held - plan.limit)} GB over[/]" if over else ""
        table.add_row(f"at: {moment}", _gb(held), "", MOMENTS[moment], text)
    return table


def time_table(plan: Plan, config: PlanConfig) -> Table:
    """One line a term, then the sums."""
    table = Table(title=f"one step on {config.gpus} x {config.device}, estimated")
    table.add_column("what")
    table.add_column("s", justify="right")
    table.add_column("part")
    table.add_column("how much", overflow="fold")
    for term in plan.time:
        table.add_row(term.name, _seconds(term.value), ", ".join(term.when), term.formula)
    table.add_section()
    one_by_one, hidden = totals(plan.time)
    rate = f"{plan.rollouts * plan.response / one_by_one:,.0f} response tokens a second"
    table.add_row("one after the other", _seconds(one_by_one), "", rate)
    if hidden < one_by_one:
        note = "communication behind the passes, at best"
        table.add_row("overlapped", _seconds(hidden), "", note)
    return table


def verdict(plan: Plan, config: PlanConfig) -> str:
    """The last line: does it fit, with how much to spare, and how sure that is."""
    limit = f"{_gb(plan.limit)} GB ({config.reserve:.0%} kept for fragmentation)"
    moment = max(plan.moments, key=lambda name: plan.moments[name])
    peak = f"{_gb(plan.peak)} GB at its worst ({moment})"
    if plan.fits:
        text = f"[bold green]fits[/]: {peak} of {limit}, {_gb(plan.limit - plan.peak)} GB free."
    else:
        text = f"[bold red]does not fit[/]: {peak} of {limit}. What would help stands in the table."
    if config.gpus > 1:
        text += f" To load, rank 0 takes {_gb(plan.loading)} GB of CPU memory."
    return (
        f"{text} All of this is an estimate from shapes, for lengths up to "
        f"{config.data.max_prompt_tokens:,} + {config.sampling.max_new_tokens:,} tokens in memory, "
        f"and {config.lengths.prompt:,} + {config.lengths.response:,} on average in time; the "
        "verifier is not in it."
    )


def _gb(size: float) -> str:
    return f"{size / GB:,.2f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.3g}"


def main(config: PlanConfig, console: Console | None = None) -> int:
    """Print the plan; returns 0 if it fits, else 1.

    Args:
        console: where the tables go; None: standard output.
    Raises: as make_plan does.
    """
    plan = make_plan(config)
    console = console or Console(highlight=False)
    console.print(memory_table(plan, config))
    console.print(time_table(plan, config))
    console.print(verdict(plan, config))
    if config.json is not None:
        text = json.dumps(plan.to_dict(), indent=1)
        config.json.write_text(text + "\n", encoding="utf-8")
    return 0 if plan.fits else 1
