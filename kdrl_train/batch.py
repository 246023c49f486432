"""Defines what flows through a step: problems, completions, verdicts, batch and coefficients.

Imports torch alone. P prompts, G completions per prompt, R = P * G completions, T tokens of one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Example:
    """One problem with its gold answer."""

    id: str
    """Where it was read: "train.jsonl:12" (line, from 1), "part.parquet:3" (row), "owner/set:3"."""
    prompt: str
    """The problem inside data.prompt_template."""
    gold: str
    """The gold answer as text; of a worked solution what counts of it (problems.gold_answer)."""
    teacher: str = ""
    """Name of the teacher of this problem; empty: the default one."""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The whole record that it was read from."""
    messages: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    """The chat messages of a problem that has them, the last one inside data.prompt_template;
    `prompt` shows them as a text then."""

    @property
    def content(self) -> "str | tuple[dict[str, Any], ...]":
        """What is rendered: the messages, or the text."""
        return self.messages or self.prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollouts:
    """R completions, G in a row for each prompt. All tensors are on the CPU."""

    prompt_ids: list[Tensor]
    """R of [T_prompt] int64; the G completions of a prompt share one tensor."""
    completion_ids: list[Tensor]
    """R of [T] int64, T >= 1, with the end-of-sequence token where one was drawn."""
    logprobs: list[Tensor]
    """R of [T] float32: log softmax(logits / temperature) of each token as sampled, nats."""
    truncated: Tensor
    """[R] bool: cut at max_new_tokens without an end-of-sequence token (finish reason length)."""
    texts: list[str]
    """R decoded completions, with special tokens but without the end of sequence and padding."""

    @property
    def lengths(self) -> Tensor:
        """[R] int64: tokens of each completion."""
        return torch.tensor([len(ids) for ids in self.completion_ids])

    @classmethod
    def join(cls, parts: Sequence["Rollouts"]) -> "Rollouts":
        """Concatenate the completions of the parts, of which there is at least one."""
        return cls(
            prompt_ids=[ids for part in parts for ids in part.prompt_ids],
            completion_ids=[ids for part in parts for ids in part.completion_ids],
            logprobs=[logprobs for part in parts for logprobs in part.logprobs],
            truncated=torch.cat([part.truncated for part in parts]),
            texts=[text for part in parts for text in part.texts],
        )


Outcome = Literal["right", "wrong", "unparseable", "timeout", "error"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """How R completions were judged, in their order."""

    rewards: list[float]
    """[R] weighted sums. timeout, and unparseable of a single reward: 0.0. error: NaN; the update
    leaves it out."""
    outcomes: list[Outcome]
    """[R]. right, wrong or unparseable: as the reward that decides says, else by
    reward.right_above; the rest as counted by `counts`."""
    errors: dict[int, str] = field(default_factory=dict)
    """Index of a completion with outcome `error` -> what its reward raised or returned."""
    answers: list[str | None] = field(default_factory=list)
    """[R]. The answer in the spelling it votes for (rewards.load_answer); None: there is none."""
    restarts: int = 0
    """How often the workers had to be started anew, because one died while it had no work."""
    parts: dict[str, list[float]] = field(default_factory=dict)
    """Name -> [R] values of each reward, without its weight. timeout: 0.0, error: NaN."""

    @property
    def counts(self) -> dict[str, int]:
        """Completions per outcome, every outcome present; the values sum to R."""
        counts = Counter(self.outcomes)
        return {outcome: counts[outcome] for outcome in OUTCOMES}

    @classmethod
    def join(cls, parts: Sequence["Verdicts"]) -> "Verdicts":
        """Concatenate the verdicts of the parts; errors keep their completion."""
        names = dict.fromkeys(name for part in parts for name in part.parts)
        common = [name for name in names if all(name in part.parts for part in parts)]
        joined = cls(rewards=[], outcomes=[], parts={name: [] for name in common})
        for part in parts:
            start = len(joined.rewards)
            joined.errors.update({start + i: text for i, text in part.errors.items()})
            joined.rewards.extend(part.rewards)
            joined.outcomes.extend(part.outcomes)
            joined.answers.extend(part.answers)
            for name, values in joined.parts.items():
                values.extend(part.parts[name])
        return replace(joined, restarts=sum(part.restarts for part in parts))


class TopkScores(NamedTuple):
    """Holds the teacher's likeliest tokens at T places, and its score of the sampled ones."""

    sampled: Tensor
    """[T] float32, nats: the log-probability of each sampled token."""
    ids: Tensor
    """[T, K] int64; -1 where fewer than K tokens have a probability above 0."""
    logprobs: Tensor
    """[T, K] float32, nats; 0 where the id is -1."""


TeacherReply = Tensor | TopkScores
"""What a teacher's server says of one completion: log-probabilities [T], states [T, H_t], or the
likeliest tokens."""


@dataclass(frozen=True, slots=True)
class JudgedRollouts:
    """Completions with their verdicts, of one rank or of all."""

    rollouts: Rollouts
    verdicts: Verdicts
    teacher_replies: list[TeacherReply | None]
    """R, where the teacher's server was queried; else None."""

    @classmethod
    def join(cls, parts: Sequence["JudgedRollouts"]) -> "JudgedRollouts":
        """Concatenate the parts, of which there is at least one."""
        return cls(
            rollouts=Rollouts.join([part.rollouts for part in parts]),
            verdicts=Verdicts.join([part.verdicts for part in parts]),
            teacher_replies=[reply for part in parts for reply in part.teacher_replies],
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's completions with their rewards, of all ranks: what the update learns from."""

    examples: list[Example]
    """R, one per completion."""
    rollouts: Rollouts
    verdicts: Verdicts
    rewards: Tensor
    """rewards_PG [P, G] float64, NaN where the reward function failed, and only there."""
    teacher_replies: list[TeacherReply | None]
    """R, where a server was queried while the rewards were computed; else None."""
    staleness: int
    """Optimiser steps between the weights that sampled them and those that learn from them."""

    @property
    def right(self) -> Tensor:
        """[P, G] bool: which completions the verifier calls right."""
        right_R = [outcome == "right" for outcome in self.verdicts.outcomes]
        return torch.tensor(right_R).view_as(self.rewards)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionCoefficients:
    """What weights the loss of each completion's tokens. Everything is on the CPU, the same on all
    ranks, and decided before the step's first update."""

    advantages: Tensor
    """[R] float32."""
    kd_weight: Tensor
    """[R] float32: beta times group factor times mask."""
    token_weights: Tensor
    """[R] float32, the weight of each token of a completion; 0: it carries no loss."""
    old_logprobs: Mapping[int, Tensor] | None = None
    """Completion -> [T] nats that the ratio is taken to; None: those of the update itself."""
    sampler_weights: Mapping[int, Tensor] | None = None
    """Completion -> [T] importance weights between sampler and trainer; None: no correction."""
    teacher_logprobs: Sequence[Tensor | None] | None = None
    """R of [T] nats from a server, None where it was not queried; None: there is no server."""
    teacher_states: Sequence[Tensor | None] | None = None
    """R of [T, H_t] hidden states from a server, as teacher_logprobs, but on each rank those of its
    own packs alone."""
    teacher_topk: Sequence[TopkScores | None] | None = None
    """R of the likeliest tokens of a teacher behind a URL, as teacher_states."""
    teacher: Tensor | None = None
    """[R] int64, the number of each completion's teacher; None: 0."""
    teacher_prompts: Sequence[Tensor] | None = None
    """R of [T_prompt] int64, what a teacher reads in place of the prompt; None: the prompt."""
    distil_eos: bool = True
    """False takes the distillation weight from the token that ends a completion."""
    kd_prefix: float = 1.0
    """The share of each completion's tokens, the first ones, that keeps its distillation weight."""
