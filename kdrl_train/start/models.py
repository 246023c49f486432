"""Checks the heads and the weights of policy and teachers before the first step."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kdrl_train.config import TrainConfig
from kdrl_train.config.models import REFERENCE
from kdrl_train.model.fsdp import gathered
from kdrl_train.model.policy import HeadedModel, Teacher
from kdrl_train.model.probe import probe
from kdrl_train.model.self_teacher import LiveTeacher
from kdrl_train.model.teacher.openai import PoolingClient
from kdrl_train.model.weights import Origin, some
from kdrl_train.rollouts.teacher_prompts import encode_as_teacher_reads
from kdrl_train.start.load import Loaded, LoadedTeacher
from kdrl_train.start.prompts import PROBE_PROMPTS, check_server_tokenizer, check_tokenizers
from kdrl_train.start.teacher_server import (
    check_head,
    check_scores,
    check_server,
    check_states,
    check_topk,
)

PROBE_LENGTH = 1024
"""Tokens of a prompt that the teacher's probe reads: all their logits are held at once."""


def teacher_checks(
    config: TrainConfig, loaded: Loaded, teacher: LoadedTeacher
) -> dict[str, Callable[[], str]]:
    """Return the checks of one teacher, by name."""
    checks = _checks_of(config, loaded, teacher)
    return {
        f"{check}{ending(config, teacher)}": partial(_present, teacher, run)
        for check, run in checks.items()
    }


def _present(teacher: LoadedTeacher, check: Callable[[], str]) -> str:
    """Run a check of a teacher, which is on its device then."""
    teacher.present()
    return check()


def ending(config: TrainConfig, teacher: LoadedTeacher) -> str:
    """Return what is behind the names of a teacher's checks: its name, if there are several."""
    several = config.model.teachers or teacher.name == REFERENCE
    return f", {teacher.name}" if several else ""


def _checks_of(
    config: TrainConfig, loaded: Loaded, teacher: LoadedTeacher
) -> dict[str, Callable[[], str]]:
    """Return the checks of one teacher, by their names without an ending."""
    model, server = teacher.model, teacher.server
    packed = config.optim.micro_batch_tokens > 1
    if isinstance(model, LiveTeacher):
        return {}  # it is the policy, which is checked
    if model is not None:
        return {
            "tokenizers": lambda: check_tokenizers(config, loaded, teacher),
            "teacher weights": lambda: check_weights(model, teacher.key),
            "teacher head": lambda: probed(model, teacher.key, packed),
            "teacher probe": lambda: check_teacher_reads(config, loaded, model, teacher.key),
        }
    assert server is not None
    tokenizer, examples = loaded.tokenizer, loaded.examples[:PROBE_PROMPTS]
    checks = {
        "teacher server": lambda: check_server(server),
        "tokenizers": lambda: check_server_tokenizer(config, loaded, server),
    }
    head = teacher.head
    if head is not None and isinstance(server, PoolingClient):  # it has no head, and no scores
        checks["served head"] = lambda: check_states(config, server, head, tokenizer, examples)
        return checks
    checks["teacher probe"] = lambda: check_scores(config, server, tokenizer, examples)
    if head is not None:
        checks["served head"] = lambda: check_head(config, server, head, tokenizer, examples)
    if config.method.is_topk:
        checks["likeliest tokens"] = lambda: check_topk(config, server, tokenizer, examples)
    return checks


def check_vocabulary(loaded: Loaded) -> str:
    """Check that every head has a column for every token, and count the columns of each head.

    Raises: ValueError for a tokenizer with more tokens than a head has columns.
    """
    highest = max(loaded.tokenizer.get_vocab().values())
    heads = {"policy": loaded.policy.vocab_size}
    columns_of = {one.key: one.vocab_size for one in loaded.teachers}
    heads |= {key.removeprefix("model."): n for key, n in columns_of.items() if n is not None}
    for name, columns in heads.items():
        if highest >= columns:
            raise ValueError(
                f"model.{name} must have a column for every token, got {columns:,} columns "
                f"and a token with id {highest:,}: resize its embeddings, or use its own tokenizer"
            )
    sizes = ", ".join(f"{name} {columns:,}" for name, columns in heads.items())
    common = min(heads.values())
    left_out = f"; those from {common:,} on are not sampled"
    return f"{highest + 1:,} tokens; columns: {sizes}" + left_out * (max(heads.values()) > common)


def check_weights(model: HeadedModel, key: str) -> str:
    """Name what the model's files hold and the model does not: the export will lack it.

    Raises: UserWarning if there is such a part; of a teacher only for tensors of its own layers.
    """
    origin: Origin | None = getattr(model.model, "origin", None)
    kind = type(model.model).__name__
    if origin is None:
        return f"{kind}, made in this process"
    doubts = []
    if origin.parts and key == "model.policy":
        parts = ", ".join(f"{path} ({count:,} tensors)" for path, count in origin.parts.items())
        doubts.append(
            f"{kind} has no {parts}, which its files hold: the exported model will lack them"
        )
    if origin.unused:
        doubts.append(
            f"{kind} does not use {some(origin.unused)} of its files: does model_type in "
            "config.json name its architecture?"
        )
    if doubts:
        raise UserWarning(f"{key}: {'; '.join(doubts)}")
    exported = ", the dtype of its export" if key == "model.policy" else ""
    return f"all read, {str(origin.dtype).removeprefix('torch.')} in its files{exported}"


def probed(model: HeadedModel, name: str, packed: bool) -> str:
    """Check that a model can be split at its LM head and keeps packed sequences apart.

    Raises: ValueError if not, as `probe` does; UserWarning where its sequences must have a row
        each, or it keeps its own attention.
    """
    with gathered(model):
        probe_error = probe(model, name, packed=packed)
    kind = "tied" if tied(model) else "untied"
    detail = (
        f"{type(model.model).__name__}, {kind} head: within {probe_error:.0e} of the model's own "
        f"logits; {model.choice if packed else 'one sequence per pack'}"
    )
    if packed and model.choice.reason:
        raise UserWarning(detail)
    return detail


def tied(model: HeadedModel) -> bool:
    """Say whether the LM head and the input embeddings share their weight."""
    embeddings = model.model.get_input_embeddings()
    return embeddings.weight is model.model.get_output_embeddings().weight


@torch.no_grad()
def check_teacher_reads(
    config: TrainConfig, loaded: Loaded, teacher: Teacher, key: str = "model.teacher"
) -> str:
    """Compare the teacher's mean log-probability of a few of the prompts that it reads with that of
    a uniform guess.

    key: the setting that names it.

    Raises: ValueError if it is not a finite number.
    """
    examples = loaded.examples[:PROBE_PROMPTS]
    tokenizer, data = loaded.tokenizer, config.data
    prompts = [
        torch.tensor(encode_as_teacher_reads(tokenizer, example, data)[:PROBE_LENGTH])
        for example in examples
    ]
    with gathered(teacher):
        total, count = _prompt_logprobs(teacher, prompts)
    mean = total / max(count, 1)
    if not abs(mean) < float("inf"):
        raise ValueError(f"{key} must give finite log-probabilities, got {mean}")
    uniform = -torch.log(torch.tensor(float(teacher.vocab_size))).item()
    return f"{mean:.2f} nats per prompt token (uniform guess: {uniform:.2f})"


def _prompt_logprobs(teacher: HeadedModel, prompts: list[Tensor]) -> tuple[float, int]:
    """Return the sum of the log-probabilities of prompts, each [T], and how many they are."""
    total, count = 0.0, 0
    for prompt in prompts:
        ids = prompt.to(teacher.device)
        logits = teacher.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total += logits.float().log_softmax(dim=1).gather(1, ids[1:, None]).sum().item()
        count += len(ids) - 1
    return total, count
