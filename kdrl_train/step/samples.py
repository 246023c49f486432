"""Records some completions of each step, with what the update saw of each of their tokens.

R completions of the step, T tokens of one of them.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kdrl_train.batch import Batch, CompletionCoefficients, Example
from kdrl_train.config import DataConfig
from kdrl_train.config.models import DEFAULT_TEACHER
from kdrl_train.copies import to_host
from kdrl_train.model.packing import PackedBatch
from kdrl_train.model.policy import PolicyOutput
from kdrl_train.ranks import World
from kdrl_train.rollouts.rendering import decoded, visible_ids
from kdrl_train.rollouts.teacher_prompts import shown_to_teacher
from kdrl_train.runfolder.jsonl import Record

DIGITS = 4
"""Decimals of the numbers of a token: files stay small."""


class SampleRecorder:
    """Chooses the completions of a step that go into samples/, and keeps what the step's own passes
    compute of them: nothing is computed twice, and each rank keeps what it has computed.

    Args:
        total: R.
        count: how many to keep, spread over the step.
    """

    def __init__(self, total: int, count: int) -> None:
        count = min(count, total)
        self.chosen = sorted({i * total // count for i in range(count)})
        self.coefficients: CompletionCoefficients | None = None
        """Of the step, once they are known."""
        self._log_ratios: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, micro_batch: PackedBatch, out: PolicyOutput) -> None:
        """Keep the teacher log-ratio of the chosen completions in a pack (on the CPU)."""
        if out.teacher_logprobs is None:
            return
        start = 0
        completions, counts = micro_batch.rollout.unique_consecutive(return_counts=True)
        for r, count in zip(completions.tolist(), counts.tolist(), strict=True):
            if r in self.chosen:
                part = slice(start, start + count)
                log_ratio = (out.logprobs[part] - out.teacher_logprobs[part]).detach()
                self._log_ratios[r] = (log_ratio, micro_batch.kd_weight[part] > 0)
            start += count

    def records(
        self,
        step: int,
        batch: Batch,
        world: World,
        tokenizer: Any,
        of_teachers: DataConfig | None = None,
    ) -> list[Record]:
        """Make the lines of the step's file; all ranks call it together.

        of_teachers: how problems are written for teachers with prompts of their own; None: they
            read the policy's.

        A line holds: step, id, teacher (where problems name theirs), prompt, teacher_prompt (where
        a teacher reads another one), completion, answer,
        reward, rewards (name -> value of each), outcome (of the verifier), tokens, truncated,
        advantage, kd_weight, token_chars ([T]
        characters of the completion that each token wrote; None where it cannot be cut so),
        teacher_log_ratio ([T] l = log p - log q in nats, None where not distilled; None: nowhere).
        """
        if not self.chosen:
            return []
        log_ratios: dict[int, list[float | None]] = {}
        for part in world.share(self._numbers):
            log_ratios |= part
        if not world.main:
            return []
        several = any(example.teacher for example in batch.examples)
        rollouts, rewards_R, known = batch.rollouts, batch.rewards.flatten(), self.coefficients
        return [
            {
                "step": step,
                "id": batch.examples[r].id,
                **({"teacher": batch.examples[r].teacher or DEFAULT_TEACHER} if several else {}),
                "prompt": batch.examples[r].prompt,
                **_of_teacher(batch.examples[r], of_teachers),
                "completion": rollouts.texts[r],
                "answer": batch.examples[r].gold,
                "reward": rewards_R[r].item(),
                "rewards": {n: values[r] for n, values in batch.verdicts.parts.items()},
                "outcome": batch.verdicts.outcomes[r],
                "tokens": len(rollouts.completion_ids[r]),
                "truncated": bool(rollouts.truncated[r]),
                "advantage": None if known is None else round(known.advantages[r].item(), 6),
                "kd_weight": None if known is None else round(known.kd_weight[r].item(), 6),
                "token_chars": token_chars(
                    tokenizer,
                    rollouts.completion_ids[r].tolist(),
                    rollouts.texts[r],
                    bool(rollouts.truncated[r]),
                ),
                "teacher_log_ratio": log_ratios.get(r),
            }
            for r in self.chosen
        ]

    def _numbers(self) -> dict[int, list[float | None]]:
        """Round l of each token of a completion; None where it is not distilled."""
        numbers = {}
        log_ratios = to_host({r: log_ratio for r, (log_ratio, _) in self._log_ratios.items()})
        for r, (_, distilled) in self._log_ratios.items():
            pairs = zip(log_ratios[r].tolist(), distilled.tolist(), strict=True)
            if distilled.any():
                numbers[r] = [round(value, DIGITS) if used else None for value, used in pairs]
        return numbers


def _of_teacher(example: Example, data: DataConfig | None) -> dict[str, str]:
    """Return what a teacher reads of a problem, where that is not the policy's prompt."""
    prompt = example.prompt if data is None else shown_to_teacher(example, data)
    return {} if prompt == example.prompt else {"teacher_prompt": prompt}


def token_chars(tokenizer: Any, ids: Sequence[int], text: str, truncated: bool) -> list[int] | None:
    """Count how many characters of `text`, the completion's text, each of its ids wrote.

    A character of several tokens counts for the last of them; the end of sequence and padding wrote
    none. None where the parts do not add up.
    """
    visible = visible_ids(tokenizer, ids, truncated)
    alone = ["" if i is None else decoded(tokenizer, [i]) for i in visible]
    if "".join(alone) != text:
        parts = iter(_in_context(tokenizer, [i for i in visible if i is not None]))
        alone = ["" if i is None else next(parts) for i in visible]
    return [len(part) for part in alone] if "".join(alone) == text else None


def _in_context(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return [T] texts, each what a token adds to those before it.

    A leading space, or the rest of a character, cannot be seen from a token alone. It looks back to
    the token before the last whole one.
    """
    parts, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        known = decoded(tokenizer, ids[start:read])
        text = decoded(tokenizer, ids[start:end])
        if text.endswith("\ufffd") and end < len(ids):  # in the middle of a character
            parts.append("")
            continue
        parts.append(text[len(known) :])
        start, read = read, end
    return parts
