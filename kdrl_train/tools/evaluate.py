"""Measures a policy: avg@k, pass@k and maj@k with intervals, response length, truncation."""

import json
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdrl_train import output
from kdrl_train.batch import Example
from kdrl_train.config import (
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    ModelConfig,
    SamplingConfig,
    TeacherConfig,
    TrainConfig,
)
from kdrl_train.config.models import SELF, is_url, teacher_file
from kdrl_train.config_file import load_yaml, update
from kdrl_train.errors import written
from kdrl_train.method.evaluation import EVAL_STEP, EvalResult, summarize
from kdrl_train.model import lora
from kdrl_train.model.eos import eos_ids
from kdrl_train.model.folder import read_config, refusal
from kdrl_train.model.load import load_model, load_tokenizer
from kdrl_train.model.policy import HeadedModel
from kdrl_train.model.teacher.openai import connect
from kdrl_train.model.window import window
from kdrl_train.rollouts.agreement import Agreement
from kdrl_train.rollouts.problems import ProblemSet, PromptFacts, encode_prompt
from kdrl_train.rollouts.records import SUFFIXES
from kdrl_train.rollouts.reward_inputs import reward_inputs
from kdrl_train.rollouts.sampler import SampleRequest, generate_rollouts
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder.best import resolved
from kdrl_train.runfolder.checkpoint import checkpoints, load_weights
from kdrl_train.runfolder.log import ROLLOUTS
from kdrl_train.runfolder.writable import require_writable_file
from kdrl_train.start.base_model import model_of_adapters
from kdrl_train.start.gold_answers import check_gold
from kdrl_train.start.load import described, read_sets
from kdrl_train.start.prompts import check_window, prompt_doubts, turn_doubts
from kdrl_train.start.taught import taught_otherwise, written_otherwise
from kdrl_train.start.unread import changed, idle


def evaluate(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    *,
    data: DataConfig,
    sampling: SamplingConfig,
    verifier: Verifier,
    seed: int = 0,
    vocab_size: int | None = None,
    greedy: bool = False,
    allowed_mismatch: float | None = None,
) -> EvalResult:
    """Samples sampling.group_size completions of each example and scores them.

    The random numbers depend on the seed alone, so that two models, or two steps of a run, are
    measured with the same ones.

    Args:
        model, tokenizer: transformers causal LM; it stays in its mode (train or eval).
        examples: at least one.
        data: says how a prompt is encoded.
        sampling: group_size (k of avg@k), max_new_tokens, temperature, batch_size.
        verifier: open.
        vocab_size: only token ids below it are sampled; None: all that the model's head has.
        greedy: whether to take the most probable tokens, and draw none.
        allowed_mismatch: EngineConfig.allowed_mismatch; None: completions are not compared.
    Raises: ValueError for an empty list of examples; EngineError where completions are sampled at
        other log-probabilities than the model has for them alone.
    """
    if not examples:
        raise ValueError("examples must hold at least one problem, got none")
    start = time.perf_counter()
    prompts = [encode_prompt(tokenizer, example, data) for example in examples]
    samples = sampling.group_size
    request = SampleRequest(
        prompts=prompts,
        sampling=sampling,
        seed=seed,
        step=EVAL_STEP,
        greedy=greedy,
        report=output.meter(ROLLOUTS, len(prompts) * samples),
    )
    output.begin(ROLLOUTS)
    agreement = None
    if allowed_mismatch is not None:
        agreement = Agreement(model, sampling.temperature, vocab_size, allowed_mismatch)
    rollouts = generate_rollouts(
        model, tokenizer, request, sampled_vocab_size=vocab_size, agreement=agreement
    )
    examples_R = [example for example in examples for _ in range(samples)]
    output.begin("rewards")
    more = reward_inputs(verifier.inputs, examples_R, rollouts, tokenizer)
    golds = [example.gold for example in examples_R]
    verdicts = verifier.score(rollouts.texts, golds, more=more)
    return summarize(rollouts, verdicts, samples, seed, time.perf_counter() - start)


def of_run(run: TrainConfig, folder: Path) -> EvaluateConfig:
    """Takes over what a run measures and how: held-out problems, templates, sampling and reward.

    A run without held-out problems gives those that it learns from. The policy is model/ of the
    run's folder; before the run has finished, its first policy with the weights of the newest
    checkpoint.
    """
    held_out = bool(run.eval.data.path)
    sampling = run.sampling
    if held_out:
        sampling = replace(run.eval.sampling(sampling), group_size=sampling.group_size)
    model = with_read_teachers(run)
    if (folder / "model").is_dir():
        model = replace(model, policy=str(folder / "model"), weights=None)
    elif saved := checkpoints(folder / "checkpoints"):
        model = replace(model, weights=saved[-1])
    elif (folder / "adapter").is_dir():
        model = replace(model, policy=str(folder / "adapter"), weights=None)
    return EvaluateConfig(
        seed=run.seed,
        samples=run.eval.samples,
        greedy=run.eval.greedy and held_out,
        max_sampler_mismatch=run.engine.max_sampler_mismatch,
        max_problems=run.eval.max_problems if held_out else None,
        checkpoint_hashes=run.checkpoint_hashes,
        model=model,
        data=run.eval.data if held_out else run.data,
        sets=run.eval.sets if held_out else {},
        sampling=sampling,
        reward=run.reward,
    )


def unread(config: EvaluateConfig) -> dict[str, str]:
    """Returns why nothing reads some settings with another value than their default, by key."""
    rules = []
    if config.greedy:
        rules.append(("greedy draws nothing", ["samples", "sampling.temperature"]))
    if config.data.path.endswith(SUFFIXES):
        rules.append(("data.path names a file", ["data.split"]))
    if config.model.weights is None:
        rules.append(("model.weights is None", ["checkpoint_hashes"]))
    return idle(changed(config), rules)


def with_read_teachers(run: TrainConfig) -> ModelConfig:
    """Returns the models of a run without the teachers that say nothing about what it samples from:
    all of a run that does not distil, and the policy itself."""
    model = run.model
    if run.method.kd is None:
        model = replace(model, teachers={}, reference=None)
    if run.method.kd is None or model.teacher_is_self:
        decay = ModelConfig().ema_decay
        model = replace(model, teacher=None, self_teacher="frozen", ema_decay=decay)
    return model


def evaluate_sets(config: EvaluateConfig, console: Console | None = None) -> dict[str, EvalResult]:
    """Loads the model folder and the problems that `config` names, and measures the model.

    console: gets a line that says what is measured, and what is doubtful; None: none does.
    Raises: ValueError for a prompt and completion that the model's window does not hold, and more.
    Returns: the name of each set -> its result; that of `data` is "data", and comes first.
    """
    config = replace(config, model=model_of_adapters(config.model))
    tokenizer = load_tokenizer(config.model.policy, "model.policy", config.model.trust_remote_code)
    sections = {"data": config.data} | {f"sets.{name}": one for name, one in config.sets.items()}
    sets = read_sets(sections, tokenizer, max_problems=config.max_problems)
    dtype = getattr(torch, config.model.dtype)
    output.begin(f"loading {described(config.model.policy)}", at_once=True)
    # a checkpoint with adapters holds all that was learnt, also where they began in a folder
    adapters = config.model.lora.rank > 0 and config.model.weights is not None
    name = config.model.policy
    model = load_model(name, "model.policy", config.model, dtype, merged=not adapters)
    for problems in sets:
        longest, tokens = problems.facts.longest, config.sampling.max_new_tokens
        check_window("model.policy", window(model.config), longest, tokens, problems.section)
    doubts = []
    if config.model.weights is not None:
        if adapters:
            lora.inject(model, config.model.lora, config.seed)
        doubts += load_weights(
            config.model.weights,
            HeadedModel(model),
            hashes=config.checkpoint_hashes,
            config=config.model,
        )
        lora.merge_in_place(model, dtype)
    engine, results = EngineConfig(max_sampler_mismatch=config.max_sampler_mismatch), {}
    with Verifier(config.reward) as verifier:
        for problems in sets:
            of_set = replace(config, data=problems.data, sets={})
            say_doubts(of_set, problems, model, tokenizer, doubts, console)
            doubts = []
            try:
                check_gold(config, problems.examples, verifier, tokenizer)
            except UserWarning as warning:
                if console is not None:
                    console.print(f"warning: {warning}", markup=False, soft_wrap=True)
            result = evaluate(
                model,
                tokenizer,
                problems.examples,
                data=problems.data,
                sampling=replace(
                    config.sampling, group_size=1 if config.greedy else config.samples
                ),
                verifier=verifier,
                seed=config.seed,
                vocab_size=common_width(model, config.model),
                greedy=config.greedy,
                allowed_mismatch=engine.allowed_mismatch(config.model.dtype),
            )
            name = problems.section.removeprefix("sets.")
            results[name] = replace(result, left_out=len(problems.facts.too_long))
    return results


def say_doubts(
    config: EvaluateConfig,
    problems: ProblemSet,
    model: Any,
    tokenizer: Any,
    doubts: list[str],
    console: Console | None,
) -> None:
    """Prints what is measured on one set, and what is doubtful."""
    if console is None:
        return
    ends, facts = eos_ids(model, tokenizer), problems.facts
    doubts = doubts + prompt_doubts(tokenizer, ends, config.data, problems.examples[0], facts)
    doubts += turn_doubts(tokenizer, ends, config.data)
    learnt = taught_otherwise(config.model.policy, tokenizer, config.data)
    doubts += [f"warning: {line}" for line in learnt]
    for line in (*measured(config, facts), *doubts, *doubts_of_run(config, tokenizer)):
        console.print(line, markup=False, soft_wrap=True)


def measured(config: EvaluateConfig, facts: PromptFacts) -> list[str]:
    """Says what is measured, on which problems, and how many of these are left out."""
    weights = "" if config.model.weights is None else f" with {config.model.weights}"
    what = f"{config.model.policy}{weights} on {facts.count:,} problems of {config.data.path}"
    return [what, facts.left_out] if facts.left_out else [what]


def doubts_of_run(config: EvaluateConfig, tokenizer: Any) -> list[str]:
    """Says where the run in whose folder the model is learns from the problems that are measured,
    or wrote its prompts otherwise."""
    folder = run_folder(config.model)
    file = folder / "config.yaml"
    if not file.is_file():
        return []
    try:
        run = update(TrainConfig(), load_yaml(file))
    except ValueError:  # another program's file, or an older version's
        return []
    doubts = []
    if (run.data.path, run.data.split) == (config.data.path, config.data.split):
        doubts = [f"warning: {folder} learns from these problems, so that others may be harder"]
    ways = (run.data, run.eval.data, *run.eval.sets.values())
    differences = [written_otherwise(tokenizer, data, config.data) for data in ways]
    if all(differences):
        names = ", data.".join(differences[0])
        doubts.append(
            f"warning: {folder} wrote its prompts otherwise, by data.{names}; --config {file} "
            "measures as the run does"
        )
    return doubts


def run_folder(config: ModelConfig) -> Path:
    """Returns the folder of the run that the policy comes from, if it comes from one."""
    if config.weights is None:
        return Path(config.policy).parent
    return resolved(config.weights).parent.parent


def common_width(model: Any, config: ModelConfig) -> int:
    """Returns the number of token ids that a policy samples from when it trains with its teachers.

    It is that of the smallest of all heads; without a teacher, that of the policy's head. The
    teachers' weights are not loaded; a server need not run where the run's folder says its width.
    """
    vocab_size = model.get_output_embeddings().weight.shape[0]
    widths = [teacher_width(config, name, place) for name, place in config.teacher_places.items()]
    return min([vocab_size, *(width for width in widths if width)])


def teacher_width(config: ModelConfig, name: str, place: str) -> int | None:
    """Returns the number of columns of a teacher's head; None: its server does not say."""
    if place == SELF:
        return None
    if is_url(place):
        description = run_folder(config) / teacher_file(name)
        if description.is_file():
            return json.loads(description.read_text(encoding="utf-8"))["vocab_size"]
        if config.teacher_api == "openai":  # such servers do not say
            return None
        with closing(connect(config, TeacherConfig(), place)) as server:
            return server.vocab_size
    try:
        teacher = read_config(place, config.trust_remote_code)
    except ValueError as error:
        raise refusal(config.teacher_key(name), place, str(error)) from error
    return teacher.get_text_config().vocab_size


def result_table(results: dict[str, EvalResult]) -> Table:
    """Makes a table with a column for each policy, from the policies' names and results."""
    first = next(iter(results.values()))
    table = Table(
        title=f"{first.problems} problems, {first.samples} completions each",
        caption="(95% interval by bootstrap over problems)",
    )
    table.add_column("")
    for policy in results:
        table.add_column(Text(policy), justify="right", overflow="fold")
    for name in dict.fromkeys(name for result in results.values() for name in result.shares):
        table.add_row(name, *(_share(result, name) for result in results.values()))
    for name, cell in (
        ("tokens per completion", lambda result: f"{result.mean_length:.0f}"),
        ("cut at max_new_tokens", lambda result: f"{result.truncated:.1%}"),
        ("unparseable", lambda result: str(result.outcomes["unparseable"])),
        ("verifier timeouts", lambda result: str(result.outcomes["timeout"])),
        ("seconds", lambda result: f"{result.seconds:.1f}"),
    ):
        table.add_row(name, *map(cell, results.values()))
    if any(result.outcomes["error"] for result in results.values()):
        failed = (f"{result.outcomes['error']}, as not right" for result in results.values())
        table.add_row("reward function failed", *failed)
    if any(result.left_out for result in results.values()):
        counts = (str(result.left_out) for result in results.values())
        table.add_row("left out, prompt too long", *counts)
    return table


def _share(result: EvalResult, name: str) -> str:
    """Writes a share and its interval in percent, or "-" if the result has no such share."""
    if name not in result.shares:
        return "-"
    low, high = result.intervals[name]
    return f"{result.shares[name]:.1%} ({100 * low:.1f}-{100 * high:.1f})"


def main(config: EvaluateConfig) -> EvalResult:
    """Measures a saved model; prints a table and, if `out` is set, writes the numbers as JSON."""
    if config.out is not None:
        require_writable_file(config.out)  # now, as a measurement takes long
    console = output.guarded_console()
    results = evaluate_sets(config, console)
    name = str(config.model.weights or config.model.policy)
    for place, one in results.items():
        console.print(result_table({name if place == "data" else f"{name}, {place}": one}))
    result = results.pop("data")
    if config.out is not None:
        numbers = asdict(result) | {"sets": {place: asdict(one) for place, one in results.items()}}
        with written(config.out):
            config.out.parent.mkdir(parents=True, exist_ok=True)
            config.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return result
