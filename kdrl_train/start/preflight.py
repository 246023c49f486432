"""The preflight: checks, before the first step, for mistakes that would waste a run."""

import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

from rich.table import Table
from rich.text import Text

from kdrl_train import output
from kdrl_train.config import ModelConfig, TrainConfig
from kdrl_train.errors import RankError, RunError
from kdrl_train.model import lora
from kdrl_train.model.load import use_device
from kdrl_train.model.teacher.client import FIRST_REPLY_S, TeacherError
from kdrl_train.proxies import is_exposed
from kdrl_train.ranks import ALONE, World
from kdrl_train.ranks import connect as connect_ranks
from kdrl_train.rollouts.engines import vllm_server
from kdrl_train.rollouts.rendering import PromptError
from kdrl_train.rollouts.routing import check_routing
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder import checkpoint
from kdrl_train.runfolder.adapters import check_adapters
from kdrl_train.runfolder.best import resolved
from kdrl_train.runfolder.trackers import Trackers
from kdrl_train.start.gold_answers import check_gold
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
from kdrl_train.start.prompts import (
    check_eos,
    check_first_prompt,
    check_prompts,
    longest_with_completion,
)
from kdrl_train.start.self_teacher import check_teacher_prompt
from kdrl_train.start.unread import check_settings, unread


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
    idle = unread(config, world.launched)
    checks: dict[str, Callable[[], str]] = {
        **({"settings": lambda: check_settings(idle)} if idle else {}),
        "prompts": lambda: check_prompts(config, loaded),
        **(
            {"routing": lambda: check_routing(loaded.examples, config)}
            if config.model.teachers
            else {}
        ),
        "first prompt": lambda: check_first_prompt(config, loaded),
        "gold answers": lambda: check_gold(config, loaded.all_examples, verifier, loaded.tokenizer),
        "end of sequence": lambda: check_eos(config, loaded),
        "policy weights": lambda: check_weights(policy, "model.policy"),
        "policy head": lambda: probed(policy, "model.policy", packed),
    }
    if config.model.weights is not None and not config.resume:
        checks["first weights"] = lambda: check_start(config.model)
    if config.model.lora.rank:
        checks["adapters"] = lambda: lora.summary(policy.model)
    if policy.sketch is not None:
        checks["head gradient"] = lambda: check_sketch(config, loaded)
    if loaded.prompts.teacher is not None:
        checks["teacher's prompt"] = lambda: check_teacher_prompt(config, loaded)
    for teacher in loaded.teachers:
        checks |= teacher_checks(config, loaded, teacher)
    if config.engine.kind == "vllm_server":
        checks["engine"] = lambda: check_engine(config, longest_with_completion(config, loaded))
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


def check_start(config: ModelConfig) -> str:
    """Check that model.weights is a whole checkpoint, with the adapters of the run if it has some.

    Raises: ValueError if not; UserWarning for what cannot be told of them.
    """
    assert config.weights is not None
    saved = checkpoint.read(resolved(config.weights))
    doubts = check_adapters(saved.folder, saved.config.get("model", {}), config)
    said = f"{saved.folder}, after {saved.step} steps"
    if doubts:
        raise UserWarning("; ".join([*doubts, said]))
    return said


def check_trackers(config: TrainConfig) -> str:
    """Check that every tracker can be imported and knows its user; `train` does so at once too.

    Raises: ValueError if not.
    """
    with Trackers(config.log) as trackers:
        trackers.log_in()
    return f"ready: {', '.join(config.log.trackers)}"


def check_engine(config: TrainConfig, longest: int = 0) -> str:
    """Check that the vLLM server replies and was started as the run needs it.

    longest: tokens of the longest prompt with its completion.

    Raises: ValueError if not; UserWarning where the way to it is open to others.
    """
    within_s = min(config.engine.timeout_s, FIRST_REPLY_S)  # it is no outage yet, which may end
    engine = replace(config.engine, timeout_s=within_s)
    with closing(vllm_server.connect(replace(config, engine=engine))) as client:
        model, window = vllm_server.inspect(client, config)
    if longest > window:
        raise ValueError(
            f"the server at {client.url} must hold the longest prompt and completion, {longest:,} "
            f"tokens, got a window of {window:,}: start it with a larger --max-model-len"
        )
    if is_exposed(client.url):
        raise UserWarning(
            f"engine.url should be https, or in a private network, got {client.url}: whoever "
            "reaches a server in development mode owns its machine; bind it to 127.0.0.1 and use "
            "a tunnel (ssh -L)"
        )
    return f"{client.url}: {model}, a window of {window:,} tokens"


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
