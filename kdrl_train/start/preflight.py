"""The preflight: checks, before the first step, for mistakes that would waste a run."""

import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from rich.table import Table
from rich.text import Text

from kdrl_train import output
from kdrl_train.batch import OUTCOMES, Example, Verdicts
from kdrl_train.config import EvaluateConfig, RewardConfig, TrainConfig
from kdrl_train.errors import RankError, RunError
from kdrl_train.model.load import use_device
from kdrl_train.model.teacher.client import TeacherError
from kdrl_train.proxies import is_exposed
from kdrl_train.ranks import ALONE, World
from kdrl_train.ranks import connect as connect_ranks
from kdrl_train.rollouts.engines import vllm_server
from kdrl_train.rollouts.rendering import PromptError
from kdrl_train.rollouts.routing import check_routing
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder.trackers import Trackers
from kdrl_train.start.head_gradient import check_sketch
from kdrl_train.start.load import Loaded, load
from kdrl_train.start.memory import check_memory
from kdrl_train.start.models import (
    check_vocabulary,
    check_weights,
    ending,
    probed,
    teacher_checks,
)
from kdrl_train.start.prompts import check_eos, check_first_prompt, check_prompts
from kdrl_train.start.self_teacher import check_teacher_prompt

GOLDS_AT_ONCE = 1000
"""Gold answers that are sent to the verifier together."""
OWN_REWARD_S = 60.0
"""Seconds for judging gold answers by a reward function of the user's own, which may be slow."""


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
    policy, models = loaded.policy, list(loaded.teacher_models.values())
    checks: dict[str, Callable[[], str]] = {
        "prompts": lambda: check_prompts(config, loaded),
        **(
            {"routing": lambda: check_routing(loaded.examples, config)}
            if config.model.teachers
            else {}
        ),
        "first prompt": lambda: check_first_prompt(config, loaded),
        "gold answers": lambda: check_gold(config, loaded.all_examples, verifier),
        "end of sequence": lambda: check_eos(config, loaded),
        "policy weights": lambda: check_weights(policy, "model.policy"),
        "policy head": lambda: probed(policy, "model.policy", packed),
    }
    if policy.sketch is not None:
        checks["head gradient"] = lambda: check_sketch(config, loaded)
    if loaded.prompts.teacher is not None:
        checks["teacher's prompt"] = lambda: check_teacher_prompt(config, loaded)
    for teacher in loaded.teachers:
        checks |= teacher_checks(config, loaded, teacher)
    if config.engine.kind == "vllm_server":
        checks["engine"] = lambda: check_engine(config)
    checks["vocabulary"] = lambda: check_vocabulary(loaded)
    checks["memory"] = lambda: check_memory(config, policy, models, world.size)
    local = [ending(config, one) for one in loaded.teachers if one.model is not None]
    on_all_ranks = {"policy head", "head gradient"}
    on_all_ranks |= {f"teacher {part}{end}" for part in ("head", "probe") for end in local}
    results: list[CheckResult] = []
    output.begin("preflight", at_once=True)
    for place, (name, check) in enumerate(checks.items(), start=1):
        output.count("preflight", place, len(checks), f", {name}")
        failed = {result.name for result in results if not result.passed}
        if name in _repetitions(local, failed):
            continue
        if name in on_all_ranks:
            results.append(_result(name, check))
        else:
            results.append(world.on_main(partial(_result, name, check)))
    return results


def _repetitions(models: Sequence[str], failed: set[str]) -> set[str]:
    """Name the checks that say nothing new once teachers of this process have another tokenizer.

    models: what is behind the names of these teachers' checks.
    """
    others = [end for end in models if f"tokenizers{end}" in failed]
    return {"vocabulary"} | {f"teacher probe{end}" for end in others} if others else set()


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
