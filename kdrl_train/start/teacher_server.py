"""Checks before the first step that a teacher behind a URL replies, and fits the policy."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_train import output
from kdrl_train.batch import Example
from kdrl_train.config import TrainConfig
from kdrl_train.exchange import NoReplyError
from kdrl_train.model.fingerprint import weights_hash
from kdrl_train.model.teacher.client import (
    KdrlClient,
    Query,
    TeacherClient,
    TeacherError,
    TeacherInfo,
    vocabulary_hash,
)
from kdrl_train.model.teacher.head import ServedHead, load_norm, normal_rms
from kdrl_train.model.teacher.openai import OpenAiClient, PoolingClient
from kdrl_train.proxies import is_exposed
from kdrl_train.rollouts.teacher_prompts import encode_as_teacher_reads
from kdrl_train.start.load import described

T = TypeVar("T")

ROUNDING = {"float32": 1e-3, "bfloat16": 0.05}
"""Largest mean difference of log-probabilities, in nats, that is rounding alone, by the coarser
dtype of server and trainer."""
RMS_ERROR = 0.05
"""How far from 1 rounding to bfloat16, and the epsilon of the norm, may bring normal_rms."""
PROBE_TOKENS = 256
"""Number of tokens, spread over the vocabulary, whose texts are compared without a hash of it."""


def check_server(client: TeacherClient) -> str:
    """Say what the server says of its model; `load` has seen that it replies.

    Raises: UserWarning where others on the way to it can read and change what is sent.
    """
    info = client.info
    parts = [f"{client.url}: {info.model}", info.dtype]
    parts.append(None if info.vocab_size is None else f"{info.vocab_size:,} columns")
    parts.append(None if info.root in (None, info.model) else f"loaded from {info.root}")
    parts.append(None if info.window is None else f"a window of {info.window:,} tokens")
    said = ", ".join(part for part in parts if part)
    if is_exposed(client.url):
        raise UserWarning(
            f"model.teacher should be https, or in a private network, got {said}: others on the "
            "way can read the token and the completions, and change the log-probabilities"
        )
    return said


def check_same_tokens(client: TeacherClient, tokenizer: Any) -> str:
    """Check that the server's tokens are the policy's.

    It compares the hashes of the two maps from token to id or, where the server has none, the texts
    of PROBE_TOKENS tokens.

    Raises: ValueError where they differ; TeacherError for a server without prompt
        log-probabilities.
    """
    size = len(tokenizer.get_vocab())
    if not isinstance(client, OpenAiClient):
        if client.info.tokenizer != vocabulary_hash(tokenizer):
            raise ValueError(
                f"the teacher at {client.url} must have the policy's tokenizer, got another map of "
                f"tokens to ids: serve a model of the policy's family; `check` with model.teacher "
                f"set to the folder of {client.info.model} names the first token that differs"
            )
        return f"the same {size:,} tokens"
    ids = sorted(set(tokenizer.get_vocab().values()))
    count = min(PROBE_TOKENS, (client.info.window or PROBE_TOKENS) - 1, len(ids))
    chosen = [ids[i * (len(ids) - 1) // max(count - 1, 1)] for i in range(count)]
    query = Query("a probe of the vocabulary", ids[:1], chosen)
    compared = 0
    for token, text in zip(chosen, _query_once(client.texts, query), strict=True):
        expected = tokenizer.decode([token])
        if text is None or "\ufffd" in text + expected:  # a part of a character has no text
            continue
        compared += 1
        if text != expected:
            raise ValueError(
                f"the teacher at {client.url} must have the policy's tokenizer, got another: token "
                f"{token} is {expected!r} for the policy and {text!r} for the teacher; serve a "
                "model of the policy's family"
            )
    return f"{compared} of {size:,} tokens compared, up to id {chosen[-1]:,}: the same"


def check_scores(
    config: TrainConfig, client: TeacherClient, tokenizer: Any, examples: list[Example]
) -> str:
    """Say the teacher's mean log-probability of a few prompts, and that of a uniform guess.

    Raises: TeacherError where the teacher does not return finite log-probabilities.
    """
    total, count = 0.0, 0
    for example in examples:
        ids = encode_as_teacher_reads(tokenizer, example, config.data)
        if len(ids) > 1:
            query = Query(f"prompt {example.id}", ids[:1], ids[1:])
            logprobs = _query_once(client.logprobs, query)
            total, count = total + logprobs.sum().item(), count + len(logprobs)
    uniform = -math.log(client.vocab_size or len(tokenizer))
    return f"{total / max(count, 1):.2f} nats per prompt token (uniform guess: {uniform:.2f})"


def with_probe(
    config: TrainConfig,
    client: TeacherClient,
    head: ServedHead | None,
    tokenizer: Any,
    examples: list[Example],
) -> TeacherInfo:
    """Return what the server says of its model, and if that is no hash of its weights, what the
    model says of a few prompts, by which a resumed run knows it again."""
    if client.info.weights is not None:
        return client.info
    ids, logprobs = [], []
    for example in examples:
        prompt = encode_as_teacher_reads(tokenizer, example, config.data)[: PROBE_TOKENS + 1]
        if len(prompt) > 1:
            query = Query(f"prompt {example.id}", prompt[:1], prompt[1:])
            ids.append(prompt)
            if isinstance(client, PoolingClient):
                assert head is not None
                values = _logprobs(head, _query_once(client.states, query), prompt[1:])
            else:
                values = _query_once(client.logprobs, query)
            logprobs.append(values.tolist())
    return replace(client.info, probe_ids=ids, probe_logprobs=logprobs)


def hash_here(root: str | None) -> str | None:
    """Return the weights_hash of the folder that a server says it has loaded; None where it is not
    on this machine, or holds what transformers does not read."""
    if root is None or not Path(root).is_absolute() or not Path(root).is_dir():
        return None
    output.begin(f"hashing the teacher, {described(root)}", at_once=True)
    try:
        return weights_hash(root)
    except (OSError, ValueError):  # of GGUF, say, or another user's
        return None


def check_head(
    config: TrainConfig,
    client: TeacherClient,
    head: ServedHead,
    tokenizer: Any,
    examples: list[Example],
) -> str:
    """Check on a few prompts that the head, on the server's states, gives the server's scores.

    Raises: ValueError where they differ by more than rounding; UserWarning where the states of a
        step may not fit this machine's memory.
    """
    assert isinstance(client, KdrlClient)
    differences = []
    temperature = config.sampling.temperature
    for example in examples:
        ids = encode_as_teacher_reads(tokenizer, example, config.data)
        if len(ids) > 1:
            query = Query(f"prompt {example.id}", ids[:1], ids[1:], temperature=temperature)
            states = _query_once(client.states, query)
            scores = _query_once(client.logprobs, query)
            differences.append((_logprobs(head, states, ids[1:]) - scores).abs())
    mean = torch.cat(differences).mean().item() if differences else 0.0
    coarsest = "bfloat16" if "bfloat16" in (client.info.dtype, config.model.dtype) else "float32"
    if not mean <= ROUNDING[coarsest]:
        raise ValueError(
            f"{head.key} must be the head of {client.info.model}, which the server has, got "
            f"{head.name}, whose log-probabilities differ from the server's by "
            f"{mean:.2g} nats on average: name the folder or hub id that is served"
        )
    states_said, too_large = _states_said(config, client)
    said = (
        f"{len(head.weight):,} columns, {head.bytes / 1e9:.2f} GB on each rank; within {mean:.0e} "
        f"nats of the server's scores; {states_said}"
    )
    if too_large:
        raise UserWarning(f"{too_large} ({said})")
    return said


def check_states(
    config: TrainConfig,
    client: PoolingClient,
    head: ServedHead,
    tokenizer: Any,
    examples: list[Example],
) -> str:
    """Check on a few prompts that a server without a head gives what its model's head reads: what
    the final norm gives.

    Raises: ValueError where it does not; UserWarning where the states of a step may not fit this
        machine's memory, and where it may have another model than the head is of, since it gives no
        log-probabilities to compare with.
    """
    norm = load_norm(head.key, head.name, config.model.trust_remote_code)
    rms, logprobs = [], []
    for example in examples:
        ids = encode_as_teacher_reads(tokenizer, example, config.data)
        if len(ids) > 1:
            states = _query_once(client.states, Query(f"prompt {example.id}", ids[:1], ids[1:]))
            logprobs.append(_logprobs(head, states, ids[1:]))
            rms.append(torch.ones(1) if norm is None else normal_rms(norm, states))
    error = (torch.cat(rms) - 1).abs().max().item() if rms else 0.0
    if not error <= RMS_ERROR:
        raise ValueError(
            f"{head.key} must be of the model at {client.url}, and its states what the final norm "
            f"gives, got states that the norm of {head.name} cannot give, by {error:.0%}: name the "
            "folder or hub id that is served, or serve it with `python -m kdrl_train serve` (vLLM "
            "gives states before the norm for some families)"
        )
    mean = torch.cat(logprobs).mean().item() if logprobs else 0.0
    uniform = -math.log(len(head.weight))
    states_said, too_large = _states_said(config, client)
    said = (
        f"{len(head.weight):,} columns, {head.bytes / 1e9:.2f} GB on each rank; {mean:.2f} nats "
        f"per prompt token (uniform guess: {uniform:.2f}); {states_said}"
    )
    root = client.info.root
    other = root is None or Path(root) != Path(head.name)
    doubts = {
        f"the server has loaded {root or 'a model that it does not name'}": other,
        "its final norm is not known, so that the states are not compared with it": norm is None,
        "it predicts prompts worse than a uniform guess would": mean < uniform - 1e-3,
    }
    warnings = [too_large] if too_large else []
    if any(doubts.values()):
        listed = "; ".join(doubt for doubt, true in doubts.items() if true)
        warnings.append(
            f"{head.key} must be of the model that is served, got {head.name}, which cannot be "
            f"told for sure: {listed}"
        )
    if warnings:
        raise UserWarning(f"{'; '.join(warnings)} ({said})")
    return said


def _logprobs(head: ServedHead, states: Tensor, ids: list[int]) -> Tensor:
    """Return the log-probability [T] of each token by the state [T, H_t] before it, on the CPU."""
    teacher = head.of(states, len(states))
    out = kk.linear_logprobs(
        teacher.hidden,
        teacher.weight,
        torch.tensor(ids, device=head.weight.device),
        bias=teacher.bias,
        temperature=teacher.temperature,
        softcap=teacher.softcap,
    )
    return out.logprobs.float().cpu()


def _states_said(config: TrainConfig, client: TeacherClient) -> tuple[str, str | None]:
    """Say how much memory the states of a step take, and what to do where that is more than half of
    the machine's; None where it is less."""
    sampling, size = config.sampling, client.info.hidden_size or 0
    R, T = sampling.prompts_per_step * sampling.group_size, sampling.max_new_tokens
    width = 2 if "bfloat16" in (client.info.dtype, config.model.dtype) else 4
    total = R * T * size * width
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    said = (
        f"the states of a step take at most {R:,} · {T:,} · {size:,} · {width} B = "
        f"{total / 1e9:.2f} GB of CPU memory over all ranks"
    )
    if 2 * total <= machine * max(1, int(os.environ.get("GROUP_WORLD_SIZE", "1"))):
        return said, None
    return said, (
        f"the states of a step must fit the memory of this machine, {machine / 1e9:.0f} GB, got "
        f"{total / 1e9:.2f} GB: lower sampling.prompts_per_step or sampling.max_new_tokens, or set "
        'method.kd to "topk_rkl", which takes 12 B for each of kd_topk tokens, with a teacher that '
        "`python -m kdrl_train serve` serves"
    )


def check_topk(
    config: TrainConfig, client: TeacherClient, tokenizer: Any, examples: list[Example]
) -> str:
    """Say how much of the teacher's probability its kd_topk likeliest tokens have."""
    assert isinstance(client, KdrlClient)
    masses = []
    count = min(config.method.kd_topk, client.vocab_size or config.method.kd_topk)
    for example in examples:
        ids = encode_as_teacher_reads(tokenizer, example, config.data)
        if len(ids) > 1:
            query = Query(f"prompt {example.id}", ids[:1], ids[1:])
            query = replace(query, temperature=config.sampling.temperature)
            topk = _query_once(lambda one: client.topk(one, count), query)
            masses.append(topk.logprobs.masked_fill(topk.ids < 0, -math.inf).exp().sum(dim=1))
    mean = torch.cat(masses).mean().item() if masses else 1.0
    return f"{count} tokens have {mean:.1%} of the teacher's probability, on prompts"


def _query_once(method: Callable[[Query], T], query: Query) -> T:
    """Call a method of the client once: a run that has not begun need not wait for its teacher."""
    try:
        return method(query)
    except NoReplyError as error:
        raise TeacherError(
            f"model.teacher must reply, got {error} for {query.name}: see the server's log"
        ) from error
