"""Take a step that was stopped apart: loss and gradient of each completion on its own.

A loss or gradient that is not finite leaves failed_step_XXXXXX.pt in the run folder, with the
step's completions and rewards, and a checkpoint of the weights that met them.
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kdrl_train.batch import CompletionCoefficients, Rollouts
from kdrl_train.config import TrainConfig
from kdrl_train.config_file import load_yaml, update
from kdrl_train.method import grpo
from kdrl_train.model.load import use_device
from kdrl_train.model.packing import pack
from kdrl_train.runfolder import checkpoint
from kdrl_train.settings import Switch, settings
from kdrl_train.start.load import load


@settings
class ReplayConfig:
    """Which step is examined."""

    file: Path = Path("failed_step.pt")
    """The file failed_step_XXXXXX.pt of a run folder."""
    all: Switch = False
    """Show every completion. Without it: those that are not finite, and the ten with the largest
    gradients."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """One completion on its own, divided by the normaliser of the whole step."""

    index: int
    example_id: str
    tokens: int
    reward: float
    advantage: float
    kd_weight: float
    loss: float
    grad_norm: float
    lowest_logprob: float
    """Of its tokens, nats."""

    @property
    def finite(self) -> bool:
        """Whether it could have been learnt from."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def main(config: ReplayConfig, console: Console | None = None) -> list[Replayed]:
    """Compute, and print as a table. Raises ValueError for a file or run folder that is none."""
    dump = load_dump(config.file)
    found = replay(dump, config.file.parent)
    broken = [one for one in found if not one.finite]
    shown = found
    if not config.all:
        rest = sorted((one for one in found if one.finite), key=lambda one: -one.grad_norm)
        shown = broken + rest[:10]
    out = Console(highlight=False) if console is None else console
    out.print(table(shown, f"step {dump['step']}: {len(broken)} of {len(found)} not finite"))
    if not broken:
        out.print("each is finite on its own: the sum, or other weights, were not")
    return found


def load_dump(file: Path) -> dict[str, Any]:
    """The dump of a stopped step. Raises ValueError for a file that is none."""
    try:
        dump = torch.load(file)
        return {name: dump[name] for name in (*_STEP, *_ROLLOUTS)}
    except Exception as error:  # torch.load has many
        raise ValueError(
            f"file must be a failed_step_XXXXXX.pt of a run folder, got {file}: {error!r}"
        ) from error


_STEP = ("step", "part", "rewards", "coefficients", "example_ids")
_ROLLOUTS = tuple(field.name for field in fields(Rollouts))


def replay(dump: dict[str, Any], folder: Path) -> list[Replayed]:
    """Every completion of the dump, at the weights of the step it stopped at.

    Raises: ValueError where the run folder has no configuration or no checkpoint of that step.
    """
    if dump["part"]:
        raise ValueError(
            f"file must be of the first update of its step, got update {dump['part'] + 1}: nothing "
            "keeps the weights between two updates"
        )
    config = update(TrainConfig(), load_yaml(folder / "config.yaml"))
    use_device(config.model)
    loaded = load(config)
    policy, step, rewards = loaded.policy, dump["step"], dump["rewards"]
    place = config.model.weights
    if step > 0:
        place = folder / "checkpoints" / f"step_{step:06d}"
    if place is not None:
        checkpoint.load_weights(place, policy)
    rollouts = Rollouts(**{name: dump[name] for name in _ROLLOUTS})
    weights, normalizer = grpo.token_weights(
        rollouts.lengths,
        ~rewards.isnan().flatten(),
        config.method.token_weights,
        config.sampling.max_new_tokens,
    )
    coefficients = replace(CompletionCoefficients(**dump["coefficients"]), token_weights=weights)
    found = []
    policy.train()
    for batch in pack(rollouts, coefficients, micro_batch_tokens=1):  # a completion each
        index, packed = int(batch.rollout[0]), batch.to(policy.device)
        teacher = loaded.teacher(packed) if loaded.teacher and batch.needs_teacher else None
        out = policy(packed, normalizer.to(policy.device), teacher)
        out.loss.backward()
        grads = [p.grad for p in policy.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).item()
        policy.zero_grad(set_to_none=True)
        found.append(
            Replayed(
                index=index,
                example_id=dump["example_ids"][index],
                tokens=len(batch.tokens),
                reward=rewards.flatten()[index].item(),
                advantage=coefficients.advantages[index].item(),
                kd_weight=coefficients.kd_weight[index].item(),
                loss=out.loss.item(),
                grad_norm=norm,
                lowest_logprob=out.logprobs.min().item(),
            )
        )
    return found


def table(rows: list[Replayed], title: str) -> Table:
    """Completions as a rich table; those that are not finite in red."""
    out = Table(title=title)
    names = ("#", "problem", "tokens", "reward", "advantage", "kd weight", "loss", "|g|", "min lp")
    for name in names:
        out.add_column(name, justify="left" if name == "problem" else "right")
    for row in rows:
        numbers = (row.reward, row.advantage, row.kd_weight, row.loss, row.grad_norm)
        out.add_row(
            str(row.index),
            row.example_id,
            str(row.tokens),
            *(f"{number:.3g}" for number in (*numbers, row.lowest_logprob)),
            style="" if row.finite else "bold red",
        )
    return out
