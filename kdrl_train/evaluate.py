"""How good a policy is: avg@k, pass@k, response length, truncated share."""

import json
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from math import comb
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from kdrl_train.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    SamplingConfig,
    TeacherConfig,
)
from kdrl_train.data import Example, encode_prompt, load_examples
from kdrl_train.policy import load_model, load_tokenizer
from kdrl_train.rollout import generate_rollouts
from kdrl_train.teacher_client import connect
from kdrl_train.verifier import Verifier

EVAL_STEP = 2**31
"""Step number of evaluation draws: beyond any training step, so their seeds never coincide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """One measurement. Shares are in [0, 1]."""

    problems: int
    samples: int
    """k: completions per problem."""
    avg_at_k: float
    """Mean over problems of the share of right completions."""
    pass_at_k: dict[int, float]
    """k' -> unbiased chance that one of k' completions is right, for k' = 1, 2, 4, ..., k."""
    mean_length: float
    """Tokens per completion."""
    truncated: float
    """Share of completions cut at max_new_tokens."""
    outcomes: dict[str, int]
    """Completions by verdict: right, wrong, unparseable, timeout, error."""
    seconds: float

    def metrics(self) -> dict[str, float]:
        """The numbers of a line of metrics.jsonl."""
        return {
            "eval_avg_at_k": self.avg_at_k,
            "eval_pass_at_k": self.pass_at_k[self.samples],
            "eval_length": self.mean_length,
            "eval_truncated": self.truncated,
        }


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that at least one of k completions, drawn without return from n, is right.

    1 - C(n - right, k) / C(n, k): unbiased for pass@k (arXiv 2107.03374).

    Raises: ValueError unless 0 <= right <= n and 1 <= k <= n.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"pass@k must have right <= n and 1 <= k <= n, got {right=}, {n=}, {k=}")
    return 1 - comb(n - right, k) / comb(n, k)


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    *,
    data: DataConfig,
    sampling: SamplingConfig,
    verifier: Verifier,
    samples: int,
    seed: int = 0,
    vocab_size: int | None = None,
) -> EvalResult:
    """Sample `samples` completions of each example and score them.

    The draw is a function of seed alone, so that two models, or two moments of a run, see the same
    noise.

    Args:
        model, tokenizer: transformers causal LM; left in the mode it was in.
        examples: at least one.
        data: how a prompt is encoded.
        sampling: max_new_tokens, temperature, batch_size; its group_size is replaced by `samples`.
        verifier: open.
        vocab_size: columns from here on are never drawn; None: the model's own width.
    Raises: ValueError for an empty list of examples.
    """
    if not examples:
        raise ValueError("examples must hold at least one problem, got none")
    start = time.perf_counter()
    prompts = [encode_prompt(tokenizer, example, data) for example in examples]
    sampling = replace(sampling, group_size=samples)
    rollouts = generate_rollouts(model, tokenizer, prompts, sampling, seed, EVAL_STEP, vocab_size)
    answers = [example.answer for example in examples for _ in range(samples)]
    verdicts = verifier.score(rollouts.texts, answers)
    right_P = torch.tensor([o == "right" for o in verdicts.outcomes]).view(-1, samples).sum(dim=1)
    ks = [2**i for i in range(samples.bit_length()) if 2**i < samples] + [samples]
    return EvalResult(
        problems=len(examples),
        samples=samples,
        avg_at_k=right_P.double().mean().item() / samples,
        pass_at_k={
            k: sum(pass_at_k(samples, int(r), k) for r in right_P) / len(examples) for k in ks
        },
        mean_length=rollouts.lengths.double().mean().item(),
        truncated=rollouts.truncated.double().mean().item(),
        outcomes=dict(verdicts.counts),
        seconds=time.perf_counter() - start,
    )


def evaluate_folder(config: EvaluateConfig) -> EvalResult:
    """Load the model folder and the problems that `config` names, and measure."""
    examples = load_examples(config.data)[: config.max_problems]
    tokenizer = load_tokenizer(config.model.policy)
    dtype = getattr(torch, config.model.dtype)
    model = load_model(config.model.policy, "model.policy", config.model, dtype)
    with Verifier(config.reward) as verifier:
        return evaluate(
            model,
            tokenizer,
            examples,
            data=config.data,
            sampling=config.sampling,
            verifier=verifier,
            samples=config.samples,
            seed=config.seed,
            vocab_size=common_width(model, config.model),
        )


def common_width(model: Any, config: ModelConfig) -> int:
    """Columns that a policy trained with the teacher samples from: those that both heads have;
    without a teacher all of its own. Of the teacher only its width is asked."""
    columns = model.get_output_embeddings().weight.shape[0]
    if config.teacher is None:
        return columns
    if config.teacher_is_url:
        with closing(connect(config, TeacherConfig())) as server:
            return min(columns, server.vocab_size or columns)
    return min(columns, AutoConfig.from_pretrained(config.teacher).get_text_config().vocab_size)


def result_table(results: dict[str, EvalResult]) -> Table:
    """Name of a policy -> its measurement, as one rich table."""
    first = next(iter(results.values()))
    table = Table(title=f"{first.problems} problems, {first.samples} completions each")
    columns = [f"avg@{first.samples}", *(f"pass@{k}" for k in first.pass_at_k if k > 1)]
    for name in ("policy", *columns, "tokens", "truncated", "unparseable", "timeout", "seconds"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.avg_at_k:.1%}",
            *(f"{share:.1%}" for k, share in result.pass_at_k.items() if k > 1),
            f"{result.mean_length:.0f}",
            f"{result.truncated:.1%}",
            str(result.outcomes["unparseable"]),
            str(result.outcomes["timeout"]),
            f"{result.seconds:.1f}",
        )
    return table


def main(config: EvaluateConfig) -> EvalResult:
    """Measure a saved model: a table on the screen and, with `out`, the numbers as JSON."""
    result = evaluate_folder(config)
    Console().print(result_table({config.model.policy: result}))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    return result
