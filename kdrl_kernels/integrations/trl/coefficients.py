"""Decides how much each completion is distilled: beta of the step, masks by the rewards.

R completions of all processes, G in a row for each prompt; B completions of a batch, C positions.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState, TrainingArguments

from kdrl_kernels.integrations.trl.config import KdrlConfig
from kdrl_train.copies import to_device
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.grpo import group_factor, kd_mask
from kdrl_train.method.schedules import History, schedule_value

FILE = "kdrl_state.json"
"""What a schedule has seen, in each checkpoint."""
SCORE = "eval_reward"
"""The score of an evaluation: the mean reward of its completions, as TRL logs it."""


def total_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """Add up the reward functions of each completion, as TRL does.

    Args:
        rewards: [R, functions]; NaN where a function gave none.
        weights: [functions].
    Returns: [R]; NaN where no function gave one.
    """
    total = (rewards * weights.to(rewards.device)).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), math.nan)


def completion_weights(
    rewards_R: Tensor, G: int, method: MethodConfig, right_above: float
) -> Tensor:
    """Weight each completion's distillation before beta: mask · group factor, [R] float32.

    A completion without a reward (NaN) is distilled where nothing depends on rewards, as TRL's own
    KL term holds for it; by a mask it is not, since nobody knows whether it is wrong.

    Args:
        rewards_R: [R] float, the G completions of a prompt in a row.
        right_above: a completion with a reward above this is right.
    """
    rewards_PG = rewards_R.view(-1, G).cpu()
    known_PG = ~rewards_PG.isnan()
    right_PG = rewards_PG > right_above
    mask_PG = kd_mask(right_PG, method.kd_mask)
    if method.kd_mask != "none":
        mask_PG = mask_PG * known_PG
    factor = group_factor(method.kd_coef, rewards_PG, right_PG)
    factor = factor.nan_to_num(nan=0.0)  # of a group without any reward
    return to_device((factor.float() * mask_PG).flatten(), rewards_R.device)


def token_weights_of_kd(inputs: Mapping[str, Any], beta: float, ends: Tensor | None) -> Tensor:
    """Weight each token's distillation: beta · kd_weight of its completion, [B, C] float32.

    Args:
        inputs: of a batch; without kd_weight [B] every completion counts as 1.
        ends: ids of the end-of-sequence tokens, where these are not distilled.
    """
    tokens = inputs["completion_ids"]
    weight = torch.full(tokens.shape, beta, dtype=torch.float32, device=tokens.device)
    if "kd_weight" in inputs:
        weight = weight * inputs["kd_weight"][:, None]
    if ends is not None:
        weight = weight.masked_fill(torch.isin(tokens, to_device(ends, tokens.device)), 0.0)
    return weight


def check_schedule(args: KdrlConfig, eval_dataset: Any) -> None:
    """Raise ValueError for a schedule that waits for what the run will never measure."""
    schedule = args.schedule()
    if schedule.kind == "kl_budget" and args.objective("off").topk_kd is not None:
        raise ValueError(
            f"kd must not be {args.kd!r} with kd_coef_schedule of kind 'kl_budget', got both: the "
            "divergence over K tokens is not the KL that the budget is for"
        )
    if not schedule.waits_for_plateau:
        return
    if args.eval_strategy == "no" or eval_dataset is None or isinstance(eval_dataset, Mapping):
        raise ValueError(
            "eval_strategy and one eval_dataset must be set where kd_coef_schedule has patience, "
            f"got {args.eval_strategy!r} and {type(eval_dataset).__name__}: a plateau is one of "
            f"{SCORE}; or leave patience out"
        )


class BetaSchedule(TrainerCallback):
    """Computes beta of each optimizer step; remembers the KL and the scores that some kinds read.

    All processes hold the same, to the bit, since they are told sums over all of them.

    schedule: of beta.
    """

    def __init__(self, schedule: ScheduleConfig) -> None:
        self.schedule = schedule
        self.history = History()
        self._kl, self._tokens = 0.0, 0.0
        self._first_step: int | None = None

    def beta(self, step: int) -> float:
        """Return beta of an optimizer step, from 0."""
        return schedule_value(self.schedule, step, self.history)

    def measured(self, sums: Mapping[str, float]) -> None:
        """Add a micro-batch's sums of kdrl_loss, over all processes, to the optimizer step's."""
        if self.schedule.kind == "kl_budget" and sums.get("kd_tokens"):
            self._kl += sums["kl_sum"] if "kl_sum" in sums else sums["teacher_log_ratio_sum"]
            self._tokens += sums["kd_tokens"]

    def on_train_begin(self, _args: Any, state: TrainerState, _control: Any, **_: Any) -> None:
        """Forget an earlier run, where none is resumed."""
        self._first_step = state.global_step
        if state.global_step == 0:
            self._forget()

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Keep the step's mean KL to the teacher."""
        if self.schedule.kind == "kl_budget":
            kl = self._kl / self._tokens if self._tokens else math.nan
            self.history.kl.append(kl if math.isfinite(kl) else None)
        self._kl, self._tokens = 0.0, 0.0

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        _control: Any,
        metrics: Mapping[str, Any],
        **_: Any,
    ) -> None:
        """Keep the score of an evaluation that an uninterrupted run would have made too."""
        step, first = state.global_step, self._first_step
        extra = args.eval_strategy == "steps" and step % state.eval_steps != 0  # at the end alone
        if self.schedule.waits_for_plateau and first is not None and step > first and not extra:
            score = metrics.get(SCORE)
            if score is not None and math.isfinite(score):
                self.history.scores.append(score)

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Count no evaluation outside of a run."""
        self._first_step = None

    def _forget(self) -> None:
        self.history = History()
        self._kl, self._tokens = 0.0, 0.0

    def save(self, checkpoint: Path) -> None:
        """Write the history into a checkpoint's folder; JSON keeps every digit."""
        state = asdict(self.history)
        text = json.dumps({name: state[name] for name in ("kl", "scores")})
        (checkpoint / FILE).write_text(text + "\n", encoding="utf-8")

    def load(self, checkpoint: Path, step: int) -> None:
        """Restore the history of a checkpoint.

        Args:
            step: how many optimizer steps are done.
        Raises: ValueError where the schedule needs a history that the checkpoint does not hold.
        """
        self._forget()
        if not self.schedule.reads_history:
            return
        path = checkpoint / FILE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            self.history = History(kl=list(state["kl"]), scores=list(state["scores"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must hold what kd_coef_schedule of kind {self.schedule.kind!r} has seen, "
                f"got {type(error).__name__}: resume a checkpoint of KdrlTrainer"
            ) from None
        if self.schedule.kind == "kl_budget" and len(self.history.kl) != step:
            raise ValueError(
                f"{path} must hold the KL of {step} steps, got {len(self.history.kl)}: resume a "
                "checkpoint that the same schedule wrote"
            )
