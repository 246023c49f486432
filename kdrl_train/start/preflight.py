"""The preflight: checks, before the first step, for mistakes that would waste a run."""

import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kdrl_train import output
from kdrl_train.batch import OUTCOMES, Example, Verdicts
from kdrl_train.config import EvaluateConfig, RewardConfig, TrainConfig
from kdrl_train.errors import RankError, RunError
from kdrl_train.model.fsdp import gathered
from kdrl_train.model.load import use_device
from kdrl_train.model.policy import HeadedModel
from kdrl_train.model.probe import probe
from kdrl_train.model.teacher.client import TeacherError
from kdrl_train.model.weights import Origin, some
from kdrl_train.proxies import is_exposed
from kdrl_train.ranks import ALONE, World
from kdrl_train.ranks import connect as connect_ranks
from kdrl_train.rollouts.engines import vllm_server
from kdrl_train.rollouts.problems import encode_prompt
from kdrl_train.rollouts.rendering import PromptError
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder.trackers import Trackers
from kdrl_train.start.head_gradient import check_sketch
from kdrl_train.start.load import Loaded, load
from kdrl_train.start.memory import check_memory
from kdrl_train.start.prompts import (
    PROBE_PROMPTS,
    check_eos,
    check_first_prompt,
    check_prompts,
    check_server_tokenizer,
    check_tokenizers,
)
from kdrl_train.start.teacher_server import check_scores, check_server

GOLDS_AT_ONCE = 1000
"""Gold answers that are sent to the verifier together."""
OWN_REWARD_S = 60.0
"""Seconds for judging gold answers by a reward function of the user's own, which may be slow."""

OF_ONE_TOKENIZER = ("teacher probe", "vocabulary")
"""Checks that say nothing new where a teacher in this process has another tokenizer."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check: a line of the preflight table."""

    name: str
    passed: bool
    detail: str
    """What the check saw; after a failure also what to do about it."""
    warning: bool = False
    """Whether the check passed with a doubt, which `detail` explains."""


def preflight(
    config: TrainConfig,
    loaded: Loaded,
    verifier: Verifier,
    world: World = ALONE,
) -> list[CheckResult]:
    """Run every check, on rank 0 alone or, where a model must compute, on all ranks.

    Args:
        world: the ranks of the run, which all call this together.
    """
    packed = config.optim.micro_batch_tokens > 1
    policy, teacher, server = loaded.policy, loaded.teacher, loaded.server
    checks: dict[str, Callable[[], str]] = {
        "prompts": lambda: check_prompts(config, loaded),
        "first prompt": lambda: check_first_prompt(config, loaded),
        "gold answers": lambda: check_gold(config, [*loaded.examples, *loaded.held_out], verifier),
        "end of sequence": lambda: check_eos(config, loaded),
        "policy weights": lambda: check_weights(policy, "model.policy"),
        "policy head": lambda: _probed(policy, "model.policy", packed),
    }
    if policy.sketch is not None:
        checks["head gradient"] = lambda: check_sketch(config, loaded)
    if teacher is not None:
        checks |= {
            "tokenizers": lambda: check_tokenizers(config, loaded),
            "teacher weights": lambda: check_weights(teacher, "model.teacher"),
            "teacher head": lambda: _probed(teacher, "model.teacher", packed),
            "teacher probe": lambda: check_teacher_reads(config, loaded),
        }
    if server is not None:
        tokenizer, probed = loaded.tokenizer, loaded.examples[:PROBE_PROMPTS]
        checks |= {
            "teacher server": lambda: check_server(server),
            "tokenizers": lambda: check_server_tokenizer(config, loaded),
            "teacher probe": lambda: check_scores(config, server, tokenizer, probed),
        }
    if config.engine.kind == "vllm_server":
        checks["engine"] = lambda: check_engine(config)
    checks["vocabulary"] = lambda: check_vocabulary(loaded)
    checks["memory"] = lambda: check_memory(config, policy, teacher, world.size)
    on_all_ranks = {"policy head", "head gradient", "teacher head"} | (
        {"teacher probe"} if teacher is not None else set()
    )
    results: list[CheckResult] = []
    output.begin("preflight", at_once=True)
    for place, (name, check) in enumerate(checks.items(), start=1):
        output.count("preflight", place, len(checks), f", {name}")
        failed = {result.name for result in results if not result.passed}
        if teacher is not None and name in OF_ONE_TOKENIZER and "tokenizers" in failed:
            continue
        if name in on_all_ranks:
            results.append(_result(name, check))
        else:
            results.append(world.on_main(partial(_result, name, check)))
    return results


def _result(name: str, check: Callable[[], str]) -> CheckResult:
    """Run one check; a UserWarning that it raises is a warning, another error is a failure."""
    try:
        return CheckResult(name, passed=True, detail=check())
    except UserWarning as warning:
        return CheckResult(name, passed=True, detail=str(warning), warning=True)
    except RankError:  # another rank ended: no check that needs all ranks can go on
        raise
    # a model's own code may raise anything (TypeError, IndexError, AttributeError, ...)
    except Exception as error:
        return CheckResult(name, passed=False, detail=_said(error))


def _said(error: Exception) -> str:
    """Return the message of an error; one that was not written for the user gets kind and place."""
    if isinstance(error, (ValueError, OSError, RunError)):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"


def check_trackers(config: TrainConfig) -> str:
    """Check that every tracker can be imported and knows its user; `train` does so at once too.

    Raises: ValueError if not.
    """
    with Trackers(config.log) as trackers:
        trackers.log_in()
    return f"ready: {', '.join(config.log.trackers)}"


def check_engine(config: TrainConfig) -> str:
    """Check that the vLLM server replies and was started as the run needs it.

    Raises: ValueError if not; UserWarning where the way to it is open to others.
    """
    with closing(vllm_server.connect(config)) as client:
        model, window = vllm_server.inspect(client, config)
    if is_exposed(client.url):
        raise UserWarning(
            f"engine.url should be https, or in a private network, got {client.url}: whoever "
            "reaches a server in development mode owns its machine; bind it to 127.0.0.1 and use "
            "a tunnel (ssh -L)"
        )
    return f"{client.url}: {model}, a window of {window:,} tokens"


def check_vocabulary(loaded: Loaded) -> str:
    """Check that every head has a column for every token, and count the columns of each head.

    Raises: ValueError for a tokenizer with more tokens than a head has columns.
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
    common = min(heads.values())
    left_out = f"; those from {common:,} on are not sampled"
    return f"{highest + 1:,} tokens; columns: {sizes}" + left_out * (max(heads.values()) > common)


def check_gold(
    config: TrainConfig | EvaluateConfig, examples: Sequence[Example], verifier: Verifier
) -> str:
    """Check that each gold answer, in a box, earns a reward when it is judged against itself.

    Equal ones are judged once. A reward function of the user's own may expect another format: it
    must only run without error, on those that it judges within OWN_REWARD_S.

    Raises: ValueError naming the first gold answer that fails, and the error if there was one;
        UserWarning where reward.right_above is less than half of the largest reward, or not below
        it.
    """
    golds = list(dict.fromkeys(example.gold for example in examples))
    builtin = config.reward.function in ("math", "exact")
    parts: list[Verdicts] = []
    start = time.monotonic()
    for first in range(0, len(golds), GOLDS_AT_ONCE):
        if parts and not builtin and time.monotonic() > start + OWN_REWARD_S:
            break
        part = golds[first : first + GOLDS_AT_ONCE]
        parts.append(verifier.score([f"\\boxed{{{gold}}}" for gold in part], part))
    verdicts = Verdicts.join(parts)
    outcomes = dict(zip(golds, verdicts.outcomes, strict=False))
    judged = [example for example in examples if example.gold in outcomes]
    counts = Counter(outcomes[example.gold] for example in judged)
    summary = ", ".join(f"{counts[name]:,} {name}" for name in OUTCOMES if counts[name])
    summary += f" of {len(examples):,}" if len(judged) < len(examples) else ""
    accepted = {"right"} if builtin else set(OUTCOMES) - {"error"}
    failed = [example for example in judged if outcomes[example.gold] not in accepted]
    if failed:
        message = verdicts.errors.get(golds.index(failed[0].gold), "")
        others = ", ".join(example.id for example in failed[1:6])
        must = f"{config.reward.function} must judge gold answers in a box without an error"
        remedy = "correct the function, or the row"
        if builtin:
            must = "gold answers must be right against themselves"
            remedy = "correct the row, or set data.answer_column or reward.function"
        raise ValueError(
            f"{must}, got {summary}; first: {failed[0].id}, "
            f"answer {failed[0].gold[:80]!r}, {outcomes[failed[0].gold]} {message}".rstrip()
            + f": {remedy}"
            + (f"; also {others}" if others else "")
        )
    if counts["timeout"]:
        raise UserWarning(
            f"gold answers in a box must be judged within reward.timeout_s, got {summary}: such a "
            "completion is paid 0; make reward.function faster, or raise reward.timeout_s"
        )
    return summary + _threshold(config.reward, verdicts)


def _threshold(config: RewardConfig, verdicts: Verdicts) -> str:
    """Say which rewards are right.

    Raises: UserWarning where reward.right_above is less than half of the largest reward, or no
        reward is above it.
    """
    rule = f"a reward above {config.right_above:g} (reward.right_above)"
    if config.function in ("math", "exact"):
        return f"; right: {rule}"
    low, high = min(verdicts.rewards), max(verdicts.rewards)
    rule = f"; right: as the function says, else {rule}; rewards from {low:g} to {high:g}"
    if 2 * config.right_above < high and high > 1:
        raise UserWarning(
            f"gold answers in a box{rule}: set reward.right_above to half of the largest reward, "
            f"e.g. {high / 2:g}, unless a smaller one is right too, or the function says what is "
            "right"
        )
    if 0 < high <= config.right_above and "right" not in verdicts.outcomes:
        raise UserWarning(
            f"no gold answer in a box is right{rule}: set reward.right_above to half of the "
            "largest reward that the function can give, unless it expects another format than a box"
        )
    return rule


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


def _probed(model: HeadedModel, name: str, packed: bool) -> str:
    """Check that a model can be split at its LM head and keeps packed sequences apart.

    Raises: ValueError if not, as `probe` does; UserWarning where its sequences must have a row
        each, or it keeps its own attention.
    """
    with gathered(model):
        probe_error = probe(model, name, packed=packed)
    kind = "tied" if _tied(model) else "untied"
    detail = (
        f"{type(model.model).__name__}, {kind} head: within {probe_error:.0e} of the model's own "
        f"logits; {model.choice if packed else 'one sequence per pack'}"
    )
    if packed and model.choice.reason:
        raise UserWarning(detail)
    return detail


def _tied(model: HeadedModel) -> bool:
    """Say whether the LM head and the input embeddings share their weight."""
    embeddings = model.model.get_input_embeddings()
    return embeddings.weight is model.model.get_output_embeddings().weight


@torch.no_grad()
def check_teacher_reads(config: TrainConfig, loaded: Loaded) -> str:
    """Compare the teacher's mean log-probability of a few prompts with that of a uniform guess.

    Raises: ValueError if it is not a finite number.
    """
    assert loaded.teacher is not None
    probed = loaded.examples[:PROBE_PROMPTS]
    prompts = [torch.tensor(encode_prompt(loaded.tokenizer, e, config.data)) for e in probed]
    with gathered(loaded.teacher):
        total, count = _prompt_logprobs(loaded.teacher, prompts)
    mean = total / max(count, 1)
    if not abs(mean) < float("inf"):
        raise ValueError(f"model.teacher must give finite log-probabilities, got {mean}")
    uniform = -torch.log(torch.tensor(float(loaded.teacher.vocab_size))).item()
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


def results_table(results: Sequence[CheckResult]) -> Table:
    """Return the results of the preflight as a rich table."""
    table = Table(title="preflight")
    for name in ("check", "result", "detail"):
        table.add_column(name, overflow="fold")
    for result in results:
        mark = Text("ok", "green") if result.passed else Text("failed", "bold red")
        mark = Text("warning", "yellow") if result.warning else mark
        table.add_row(result.name, mark, Text(result.detail))
    return table


def require(results: Sequence[CheckResult]) -> list[str]:
    """Return the warnings of the preflight, one line each.

    Raises: ValueError listing the checks that failed, if any.
    """
    failed = [f"  {result.name}: {result.detail}" for result in results if not result.passed]
    if failed:
        raise ValueError("the run must pass its preflight, got:\n" + "\n".join(failed))
    return [f"{result.name}: {result.detail}" for result in results if result.warning]


def main(config: TrainConfig) -> int:
    """Run the preflight of a run and print its table, in one process or under torchrun.

    Returns: 0 if every check passed, else 1.
    """
    tensor = config.model.tensor_parallel
    with connect_ranks(use_device(config.model), tensor=tensor) as world:
        results = []
        if config.log.trackers:
            results = [world.on_main(lambda: _result("trackers", lambda: check_trackers(config)))]
        try:
            loaded = load(config, world)
        except Exception as error:  # as in _result: a model's code may raise anything
            names = {TeacherError: "teacher server", PromptError: "prompts"}
            name = next((n for kind, n in names.items() if isinstance(error, kind)), "loading")
            results.append(CheckResult(name, passed=False, detail=_said(error)))
        else:
            with Verifier(config.reward) as verifier, closing(loaded):
                results += preflight(config, loaded, verifier, world=world)
        if world.main:
            output.guarded_console().print(results_table(results))
    return 0 if all(result.passed for result in results) else 1
