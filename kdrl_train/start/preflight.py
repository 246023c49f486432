"""Preflight: everything that would waste a run, found before its first training minute."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kdrl_train.batch import Example
from kdrl_train.config import TrainConfig
from kdrl_train.errors import RankError
from kdrl_train.model.eos import eos_ids
from kdrl_train.model.fsdp import gathered
from kdrl_train.model.load import use_device
from kdrl_train.model.policy import HeadedModel
from kdrl_train.model.probe import probe
from kdrl_train.model.teacher.client import TeacherError
from kdrl_train.ranks import ALONE, World
from kdrl_train.ranks import connect as connect_ranks
from kdrl_train.rollouts.engines.vllm_client import VllmClient
from kdrl_train.rollouts.engines.vllm_server import inspect
from kdrl_train.rollouts.problems import encode_prompt
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.start.load import Loaded, load
from kdrl_train.start.memory import check_memory
from kdrl_train.start.teacher_server import check_same_tokens, check_scores, check_server

GOLD_AT_START = 64
"""Gold answers that `train` checks before step 0; `check` takes all of them."""
PROBE_PROMPTS = 4
"""Prompts that the teacher probe reads."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the preflight table."""

    name: str
    passed: bool
    detail: str
    """What was found; on failure also the remedy."""
    warning: bool = False
    """Passed, but not beyond doubt."""


def preflight(
    config: TrainConfig,
    loaded: Loaded,
    verifier: Verifier,
    gold: int | None = None,
    world: World = ALONE,
) -> list[Finding]:
    """Run every check: rank 0, but for those that read with a model, which all ranks do.

    Args:
        gold: how many gold answers are judged against themselves; None: all.
        world: the ranks of the run.
    """
    packed = config.optim.micro_batch_tokens > 1
    policy, teacher, server = loaded.policy, loaded.teacher, loaded.server
    checks: dict[str, Callable[[], str]] = {
        "prompts": lambda: check_prompts(config, loaded),
        "gold answers": lambda: check_gold(config, loaded.examples[:gold], verifier),
        "end of sequence": lambda: check_eos(loaded, config.method.kd_eos),
        "policy head": lambda: _probed(policy, "model.policy", packed),
    }
    if teacher is not None:
        checks |= {
            "tokenizers": lambda: check_tokenizers(loaded.tokenizer, loaded.teacher_tokenizer),
            "teacher head": lambda: _probed(teacher, "model.teacher", packed),
            "teacher probe": lambda: check_teacher_reads(config, loaded),
        }
    if server is not None:
        tokenizer, some = loaded.tokenizer, loaded.examples[:PROBE_PROMPTS]
        checks |= {
            "teacher server": lambda: check_server(server),
            "tokenizers": lambda: check_same_tokens(server, tokenizer),
            "teacher probe": lambda: check_scores(config, server, tokenizer, some),
        }
    if config.engine.kind == "vllm_server":
        checks["engine"] = lambda: check_engine(config)
    checks["vocabulary"] = lambda: check_vocabulary(loaded)
    checks["memory"] = lambda: check_memory(config, policy, teacher, world.size)
    reading = {"policy head", "teacher head"} | (
        {"teacher probe"} if teacher is not None else set()
    )
    findings = []
    for name, run in checks.items():
        if name in reading:
            findings.append(_examine(name, run))
        else:
            findings.append(world.on_main(partial(_examine, name, run)))
    return findings


def _examine(name: str, run: Callable[[], str]) -> Finding:
    try:
        return Finding(name, passed=True, detail=run())
    except UserWarning as doubt:
        return Finding(name, passed=True, detail=str(doubt), warning=True)
    except (ValueError, OSError) as error:
        return Finding(name, passed=False, detail=str(error))


def check_engine(config: TrainConfig) -> str:
    """The vLLM server answers, and was started as the run needs it. Raises: ValueError if not."""
    client = VllmClient(str(config.engine.url), config.engine.timeout_s)
    model, window = inspect(client, config)
    return f"{client.url}: {model}, a window of {window:,} tokens"


def check_tokenizers(policy: Any, teacher: Any) -> str:
    """The two vocabularies are the same map from token to id.

    Raises: ValueError naming the first token (by id) that differs.
    """
    ours = {i: token for token, i in policy.get_vocab().items()}
    theirs = {i: token for token, i in teacher.get_vocab().items()}
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i):
            raise ValueError(
                f"model.teacher must have the policy's tokenizer, got another: token {i} is "
                f"{ours.get(i)!r} for the policy and {theirs.get(i)!r} for the teacher; choose "
                "two models of one family, or distil nothing with --preset grpo"
            )
    return f"the same {len(ours):,} tokens"


def check_vocabulary(loaded: Loaded) -> str:
    """Every token of the tokenizer has a column in every head; padding columns are counted.

    Raises: ValueError for a tokenizer larger than a head.
    """
    highest = max(loaded.tokenizer.get_vocab().values())
    heads = {"policy": loaded.policy.vocab_size}
    teacher = loaded.teacher or loaded.server
    if teacher is not None and teacher.vocab_size is not None:
        heads["teacher"] = teacher.vocab_size
    for name, columns in heads.items():
        if highest >= columns:
            raise ValueError(
                f"model.{name} must have a column for every token, got {columns:,} columns "
                f"and a token with id {highest:,}: resize its embeddings, or use its own tokenizer"
            )
    sizes = ", ".join(f"{name} {columns:,}" for name, columns in heads.items())
    used = min(heads.values())
    return f"{highest + 1:,} tokens; columns: {sizes}; those from {used:,} on are left out"


def check_eos(loaded: Loaded, kd_eos: str = "keep") -> str:
    """Tokenizer, policy and teacher end a sequence with the same tokens.

    Args:
        kd_eos: "mask" lets the teacher end with others: no end is distilled then.
    Raises: ValueError where the tokenizer's token is unknown to the policy, or the teacher's to
        the policy: completions would run on, or the teacher would ask for an end nobody honours.
    """
    model, tokenizer = loaded.policy.model, loaded.tokenizer
    ids = eos_ids(model, tokenizer)
    declared = model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else declared or []
    own = tokenizer.eos_token_id
    if declared and own is not None and own not in declared:
        raise ValueError(
            f"the policy's end-of-sequence tokens must agree, got {own} ({tokenizer.eos_token!r}) "
            f"from its tokenizer and {declared} from its generation_config.json: put both into "
            "eos_token_id of generation_config.json"
        )
    note = ""
    theirs = [] if loaded.server is None else loaded.server.info.eos_ids
    if loaded.teacher is not None:
        theirs = eos_ids(loaded.teacher.model, loaded.teacher_tokenizer)
    extra = sorted(set(theirs or []) - set(ids))
    if extra and kd_eos == "keep":
        raise ValueError(
            f"the teacher must end sequences as the policy does, got {extra} "
            f"({tokenizer.convert_ids_to_tokens(extra)}) beside the policy's {ids}: put them "
            "into eos_token_id of the policy's generation_config.json, or set method.kd_eos to mask"
        )
    if extra:
        note = f"; the teacher also ends with {extra}, so ends are not distilled"
    if theirs is None:
        note = "; the teacher's are not known: its server does not say"
    return f"{ids} {tokenizer.convert_ids_to_tokens(ids)}{note}"


def check_prompts(config: TrainConfig, loaded: Loaded) -> str:
    """Every prompt encodes within max_prompt_tokens, and fits the window with its completion:
    those to learn from in both models, held-out ones (eval.data) in the policy.

    Raises: ValueError for a prompt that is too long, or a window that is too short.
    """
    lengths = [len(encode_prompt(loaded.tokenizer, e, config.data)) for e in loaded.examples]
    try:
        held_out = [
            len(encode_prompt(loaded.tokenizer, e, config.eval.data)) for e in loaded.held_out
        ]
    except ValueError as error:
        raise ValueError(f"in eval.data: {error}") from error
    needed = max(lengths) + config.sampling.max_new_tokens
    _check_window("model.policy", _window(loaded.policy), max(lengths + held_out), config)
    if loaded.teacher is not None:
        _check_window("model.teacher", _window(loaded.teacher), max(lengths), config)
    if loaded.server is not None:
        _check_window("model.teacher", loaded.server.info.window, max(lengths), config)
    extra = f"{len(held_out):,} held out of at most {max(held_out)}, " if held_out else ""
    template = config.data.chat_template and loaded.tokenizer.chat_template is not None
    return (
        f"{len(lengths):,} problems, {min(lengths)} to {max(lengths)} tokens, {extra}"
        f"{'with the chat template' if template else 'without a chat template'}; at most {needed} "
        "tokens with the completion"
    )


def _window(model: HeadedModel) -> int | None:
    """Positions of a model; None: it names no limit."""
    return getattr(model.model.config.get_text_config(), "max_position_embeddings", None)


def _check_window(name: str, window: int | None, longest: int, config: TrainConfig) -> None:
    """Raises ValueError where a model's positions end before the longest prompt's completion."""
    if window is not None and longest + config.sampling.max_new_tokens > window:
        raise ValueError(
            f"{name} must hold the longest prompt and completion, got a window of {window} "
            f"tokens for {longest} + {config.sampling.max_new_tokens}: lower "
            "sampling.max_new_tokens or choose another model"
        )


def check_gold(config: TrainConfig, examples: Sequence[Example], verifier: Verifier) -> str:
    """Each gold answer, in a box, is right against itself.

    A reward function of the user's own may want another format, so it is only run, not judged.

    Raises: ValueError naming the first gold answer that fails, and the error if there was one.
    """
    answers = [example.gold for example in examples]
    verdicts = verifier.score([f"\\boxed{{{answer}}}" for answer in answers], answers)
    counts = verdicts.counts
    summary = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    judged = config.reward.function in ("math", "exact")
    for i, outcome in enumerate(verdicts.outcomes):
        if outcome == "error" or (judged and outcome != "right"):
            raise ValueError(
                f"gold answers must be right against themselves, got {summary}; first: "
                f"{examples[i].id}, answer {answers[i]!r}, {outcome} "
                f"{verdicts.errors.get(i, '')}".rstrip()
                + ": correct the row, or set data.answer_column or reward.function"
            )
    return summary


def _probed(model: HeadedModel, name: str, packed: bool) -> str:
    with gathered(model):
        probe_error = probe(model, name, packed=packed)
    kind = "tied" if _tied(model) else "untied"
    rows = "packed rows keep sequences apart" if packed else "one sequence per row"
    return f"{type(model.model).__name__}, {kind} head: own logits to {probe_error:.0e}; {rows}"


def _tied(model: HeadedModel) -> bool:
    embeddings = model.model.get_input_embeddings()
    return embeddings.weight is model.model.get_output_embeddings().weight


@torch.no_grad()
def check_teacher_reads(config: TrainConfig, loaded: Loaded) -> str:
    """The teacher's mean log-probability of a few prompts, beside that of a uniform guess.

    Raises: ValueError when it is not a finite number.
    """
    assert loaded.teacher is not None
    some = loaded.examples[:PROBE_PROMPTS]
    prompts = [torch.tensor(encode_prompt(loaded.tokenizer, e, config.data)) for e in some]
    with gathered(loaded.teacher):
        total, count = _prompt_logprobs(loaded.teacher, prompts)
    mean = total / max(count, 1)
    if not abs(mean) < float("inf"):
        raise ValueError(f"model.teacher must give finite log-probabilities, got {mean}")
    uniform = -torch.log(torch.tensor(float(loaded.teacher.vocab_size))).item()
    return f"{mean:.2f} nats per prompt token (uniform guess: {uniform:.2f})"


def _prompt_logprobs(teacher: HeadedModel, prompts: list[Tensor]) -> tuple[float, int]:
    """Sum of the log-probabilities of prompts, each [T], and how many they are."""
    total, count = 0.0, 0
    for prompt in prompts:
        ids = prompt.to(teacher.device)
        logits = teacher.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total += logits.float().log_softmax(dim=1).gather(1, ids[1:, None]).sum().item()
        count += len(ids) - 1
    return total, count


def findings_table(findings: Sequence[Finding]) -> Table:
    """The preflight as a rich table."""
    table = Table(title="preflight")
    for name in ("check", "", "found"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        mark = "[green]ok[/]" if finding.passed else "[bold red]failed[/]"
        mark = "[yellow]warning[/]" if finding.warning else mark
        table.add_row(finding.name, mark, _plain(finding.detail))
    return table


def _plain(text: str) -> str:
    """Square brackets that rich must not read as markup."""
    return text.replace("[", r"\[")


def require(findings: Sequence[Finding]) -> list[str]:
    """The warnings. Raises: ValueError listing the findings that failed, if any."""
    failed = [f"  {f.name}: {f.detail}" for f in findings if not f.passed]
    if failed:
        raise ValueError("the run must pass its preflight, got:\n" + "\n".join(failed))
    return [f"{f.name}: {f.detail}" for f in findings if f.warning]


def main(config: TrainConfig) -> int:
    """Preflight of a run, of one process or by torchrun: a table, and 0 if all is well, else 1."""
    with connect_ranks(use_device(config.model)) as world:
        try:
            loaded = load(config, world)
        except (ValueError, OSError, RankError) as error:
            name = "teacher server" if isinstance(error, TeacherError) else "loading"
            findings = [Finding(name, passed=False, detail=str(error))]
        else:
            with Verifier(config.reward) as verifier, closing(loaded):
                findings = preflight(config, loaded, verifier, world=world)
        if world.main:
            Console().print(findings_table(findings))
    return 0 if all(finding.passed for finding in findings) else 1
