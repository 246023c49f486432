"""Repeats a step that stopped a run, one completion at a time, to find the one that failed.

A run whose loss or gradient is not finite leaves failed_step_XXXXXX.pt in its folder, with the
step's completions and rewards, and a checkpoint of the weights before the step.
"""

import math
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdrl_train.batch import CompletionCoefficients, Rollouts
from kdrl_train.config import TrainConfig
from kdrl_train.config_file import load_yaml, require_own_module, update
from kdrl_train.errors import require_file
from kdrl_train.method import grpo
from kdrl_train.model.load import use_device
from kdrl_train.model.packing import pack
from kdrl_train.model.policy import Policy
from kdrl_train.model.teacher.remote import RemoteTeacher
from kdrl_train.model.teachers import Teachers
from kdrl_train.output import guarded_console
from kdrl_train.runfolder import checkpoint
from kdrl_train.runfolder.untrusted import load_tensors
from kdrl_train.settings import Switch, settings
from kdrl_train.start.load import Loaded, load
from kdrl_train.start.open_run import teachers_of
from kdrl_train.step.coefficients import with_replies
from kdrl_train.step.update import sketch_scale, sketch_seed


@settings
class ReplayConfig:
    """Settings of `replay`: the dump to examine."""

    file: Path = Path("failed_step.pt")
    """The file failed_step_XXXXXX.pt of a run folder."""
    all: Switch = False
    """Show every completion. Without it: those that are not finite, and the ten with the largest
    gradients."""
    trust_remote_code: Switch = False
    """Run Python files in the folders of policy and teacher (auto_map in their config.json), with
    the rights of this process. The run's own setting is not taken over."""


def of_run(_run: TrainConfig, folder: Path) -> ReplayConfig:
    """Takes the newest dump in the folder of a run."""
    dumps = sorted(folder.glob("failed_step_*.pt"))
    return ReplayConfig(file=dumps[-1] if dumps else folder / "failed_step_XXXXXX.pt")


@dataclass(frozen=True, slots=True)
class Replayed:
    """Holds loss and gradient of one completion, divided by the normaliser of the whole step."""

    index: int
    example_id: str
    tokens: int
    reward: float
    outcome: str
    """The verdict; "-" in a file of an older version."""
    advantage: float
    kd_weight: float
    loss: float
    grad_norm: float
    lowest_logprob: float
    """Smallest log-probability of a token, nats."""

    @property
    def finite(self) -> bool:
        """Says whether loss and gradient are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


WIDTH = 200
"""Columns of a table that goes into a pipe or a file: 80 would cut its numbers."""


def main(config: ReplayConfig, console: Console | None = None) -> list[Replayed]:
    """Repeats the step and prints a table of its completions.

    Raises: ValueError if the file is not such a dump, or its folder not a run folder.
    """
    dump = load_dump(config.file)
    out = guarded_console(console)
    replayed = replay(dump, config.file.parent, out, config.trust_remote_code)
    broken = [one for one in replayed if not one.finite]
    shown = replayed
    if not config.all:
        finite = sorted((one for one in replayed if one.finite), key=lambda one: -one.grad_norm)
        shown = broken + finite[:10]
    if not out.is_terminal:
        out.width = max(out.width, WIDTH)
    out.print(table(shown, f"step {dump['step']}: {len(broken)} of {len(replayed)} not finite"))
    if not broken:
        out.print("each completion alone is finite: the sum was not, or the step had other weights")
    return replayed


def load_dump(file: Path) -> dict[str, Any]:
    """Reads the dump of a step that stopped a run. Raises ValueError if the file is not one."""
    if not file.exists():
        raise ValueError(
            f"file must be a failed_step_XXXXXX.pt of a run folder, got {file}, which does not "
            "exist: name one with --file"
        )
    try:
        require_file(file)
        dump = load_tensors(file)
        step: dict[str, Any] = {name: dump[name] for name in (*_STEP, *_ROLLOUTS)}
        step["outcomes"] = dump.get("outcomes") or ["-"] * len(dump["example_ids"])
        step["coefficients"] = CompletionCoefficients(**dump["coefficients"])
        for name, value in step.items():
            kind = _KINDS.get(name, list)
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be of type {kind.__name__}")
            if isinstance(value, list) and len(value) != step["rewards"].numel():
                raise ValueError(f"{name} must have an item for each of the rewards")
        return step
    except Exception as error:  # a damaged file raises many types
        raise ValueError(
            f"file must be a failed_step_XXXXXX.pt of a run folder, got {file}: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        ) from error


_STEP = ("step", "part", "rewards", "coefficients", "example_ids")
_ROLLOUTS = tuple(field.name for field in fields(Rollouts))
_KINDS = {
    "step": int,
    "part": int,
    "rewards": torch.Tensor,
    "truncated": torch.Tensor,
    "coefficients": CompletionCoefficients,
}
"""Types of values of a dump; the others are lists with an item for each completion."""


def replay(
    dump: dict[str, Any], folder: Path, console: Console, trusted: bool = False
) -> list[Replayed]:
    """Repeats every completion of the dump with the weights before the step.

    Args:
        console: gets what is doubtful.
        trusted: whether code in the folders of the models may be run.
    Raises: ValueError if the run folder has no configuration, or no checkpoint of that step.
    """
    if dump["part"]:
        raise ValueError(
            f"file must be of the first update of its step, got update {dump['part'] + 1}: the "
            "weights between two updates of a step are not saved"
        )
    config = update(TrainConfig(), load_yaml(folder / "config.yaml"))
    require_own_module(config.method.loss or "", folder / "config.yaml", "method.loss")
    config = replace(config, model=replace(config.model, trust_remote_code=trusted))
    use_device(config.model)
    loaded = load(config)
    policy, step, rewards = loaded.policy, dump["step"], dump["rewards"]
    rollouts = Rollouts(**{name: dump[name] for name in _ROLLOUTS})
    with closing(loaded), ExitStack() as stack:
        known = dump["coefficients"]
        teachers, coefficients = query_servers(config, loaded, rollouts, known, stack, console)
    for doubt in load_weights_before(step, config, folder, policy, teachers):
        console.print(f"warning: {doubt}", markup=False, soft_wrap=True)
    weights, normalizer = grpo.token_weights(
        rollouts.lengths,
        ~rewards.isnan().flatten(),
        config.method.token_weights,
        config.sampling.max_new_tokens,
    )
    coefficients = replace(coefficients, token_weights=weights)
    replayed = []
    policy.train()
    seed = sketch_seed(config.seed, step, dump["part"])
    policy.draw_sketch(seed, sketch_scale(coefficients, config.method))
    for batch in pack(rollouts, coefficients, micro_batch_tokens=1):  # a completion each
        index, packed = int(batch.rollout[0]), batch.to(policy.device)
        out = policy(packed, normalizer.to(policy.device), teachers.head(packed))
        out.loss.backward()
        grads = [p.grad for p in policy.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).item()
        policy.zero_grad(set_to_none=True)
        replayed.append(
            Replayed(
                index=index,
                example_id=dump["example_ids"][index],
                tokens=len(batch.tokens),
                reward=rewards.flatten()[index].item(),
                outcome=dump["outcomes"][index],
                advantage=coefficients.advantages[index].item(),
                kd_weight=coefficients.kd_weight[index].item(),
                loss=out.loss.item(),
                grad_norm=norm,
                lowest_logprob=out.logprobs.min().item(),
            )
        )
    return replayed


def load_weights_before(
    step: int, config: TrainConfig, folder: Path, policy: Policy, teachers: Teachers
) -> list[str]:
    """Loads the weights that a step started from, of the policy and of a teacher that averages.

    Returns: what to warn of.
    Raises: ValueError if the folder has no checkpoint of that step.
    """
    place = config.model.weights
    if step > 0:
        place = folder / "checkpoints" / f"step_{step:06d}"
        if teachers.average is not None:
            checkpoint.load_weights(place, teachers.average, hashes=False, of="teacher")
    if place is None:
        return []
    hashes = config.checkpoint_hashes
    return checkpoint.load_weights(place, policy, hashes=hashes, config=config.model)


def query_servers(
    config: TrainConfig,
    loaded: Loaded,
    rollouts: Rollouts,
    coefficients: CompletionCoefficients,
    stack: ExitStack,
    console: Console,
) -> tuple[Teachers, CompletionCoefficients]:
    """Returns the teachers, and the coefficients with what their servers say of the completions: a
    dump holds log-probabilities, and neither states nor likeliest tokens.

    Raises: ValueError for servers that read prompts of their own, which a dump does not hold.
    """
    teachers = teachers_of(config, loaded)
    servers = {number: one for number, one in enumerate(loaded.teachers) if one.server is not None}
    if config.method.reads_logprobs or not servers:
        return teachers, coefficients
    if config.data.teacher_template is not None:
        raise ValueError(
            "data.teacher_template must be None to replay a step with states from a server, got "
            f"{config.data.teacher_template!r}: the file does not hold what the teacher read"
        )
    columns = loaded.policy.sampled_vocab_size
    remote = {
        number: stack.enter_context(
            RemoteTeacher(one.server, config, columns, console.print, one.head)
        )
        for number, one in servers.items()
        if one.server is not None
    }
    teachers = replace(teachers, remote=remote)
    number_R = coefficients.teacher
    if number_R is None:
        number_R = torch.zeros(len(rollouts.texts), dtype=torch.int64)
    replies = teachers.collect(rollouts, coefficients.kd_weight > 0, number_R, {})
    return teachers, with_replies(coefficients, config.method, replies)


def table(completions: list[Replayed], title: str) -> Table:
    """Makes a table of completions; those that are not finite are red."""
    out = Table(title=title)
    numbers = ("reward", "advantage", "kd weight", "loss", "gradient norm", "lowest log p")
    names = ("#", "problem", "outcome", "tokens", *numbers)
    for name in names:
        is_name = name in ("problem", "outcome")
        out.add_column(name, justify="left" if is_name else "right", no_wrap=is_name)
    for one in completions:
        values = (one.reward, one.advantage, one.kd_weight, one.loss, one.grad_norm)
        out.add_row(
            str(one.index),
            Text(str(one.example_id)),
            Text(str(one.outcome)),
            str(one.tokens),
            *(f"{value:.3g}" for value in (*values, one.lowest_logprob)),
            style="" if one.finite else "bold red",
        )
    return out
