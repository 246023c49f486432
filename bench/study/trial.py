"""Runs trials of the study in one process: `python -m bench.study.trial STUDY NAME...`.

NAME is that of a trial, or of a model of a task ("arithmetic/student"). The output of a trial goes
to log.txt in its folder, an error becomes its result, and its name on standard output says that it
has ended. Imports take as long as ten steps, so one process runs several trials in turn.
"""

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bench.study import setup
from bench.study.arms import ARMS, NO_ROW_IS_FLAT, SKETCH_THRESHOLD
from bench.study.config import StudyConfig, Trial
from bench.study.k1_control import K1Policy
from kdrl_train import train
from kdrl_train.batch import Rollouts, Verdicts
from kdrl_train.config import ModelConfig, OptimConfig, RewardConfig, SamplingConfig, TrainConfig
from kdrl_train.config_file import load_yaml, update
from kdrl_train.method.evaluation import EVAL_STEP, summarize
from kdrl_train.model.load import load_model, load_tokenizer
from kdrl_train.model.policy import Policy
from kdrl_train.rollouts.problems import encode_prompt, load_examples, step_indices
from kdrl_train.rollouts.sampler import SampleRequest, generate_rollouts
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder import events, jsonl
from kdrl_train.runfolder.log import read_records
from kdrl_train.tools import sft
from kdrl_train.tools.demo import data_config
from kdrl_train.tools.toy import TASKS

CURVES = ("accuracy", "tokens", "response_length", "entropy", "kl_teacher", "kd_coef", "grad_norm")
SKETCH_CURVES = ("sketch_entries", "sketch_noise", "sketch_flat_share")
STAGES = ("rollout", "verify", "score", "teacher", "update", "sync")
MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The score of a model on one set of problems, sampled at temperature 1."""

    samples: int
    """k: completions of each problem."""
    right: str
    """A digit for each problem: how many of its completions are right."""
    pass_at_k: float
    maj_at_k: float | None
    length: float
    """Mean number of tokens of a completion."""
    truncated: float
    """Share of the completions that were cut at max_new_tokens."""

    @property
    def shares(self) -> np.ndarray:
        """Return the share of right completions of each problem, [P]."""
        return np.array([int(digit) for digit in self.right]) / self.samples


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """The result of a trial, which is result.json in its folder."""

    trial: Trial
    status: Literal["done", "crashed"]
    error: str | None = None
    seconds: float = 0.0
    scores: dict[str, Score] = field(default_factory=dict)
    """Scores by the name of the set of problems."""
    curve: dict[str, list[float | None]] = field(default_factory=dict)
    """Values of each metric at every step; also "seconds_rollout" and the other stages."""
    sampled_tokens: int = 0
    """Tokens of all completions that were sampled for training."""
    commit: str | None = None
    """Commit of the code, where the trial ran from a clone with git."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrialResult":
        """Rebuild a result from the dictionary that dataclasses.asdict made."""
        scores = {name: Score(**score) for name, score in values["scores"].items()}
        return cls(**values | {"trial": Trial(**values["trial"]), "scores": scores})

    @classmethod
    def read(cls, path: Path) -> "TrialResult":
        """Read a result from a file that `write` made. Raises: ValueError if it is damaged."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} must hold the result of a trial, got {type(error).__name__}: {error}: "
                "delete it, and the trial runs again"
            ) from error

    def write(self, path: Path) -> None:
        """Write the result; the file is complete or does not exist."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        partial.replace(path)


def trial_folder(config: StudyConfig, trial: Trial) -> Path:
    """Return the folder of a trial's run and result."""
    return config.out / "trials" / trial.name


def train_config(config: StudyConfig, trial: Trial) -> TrainConfig:
    """Return the settings of a trial's training run.

    Two arms differ in the method, the learning rate, the presence of a teacher, the head's
    backward pass and the arm's settings alone.
    """
    arm, task = ARMS[trial.arm], setup.folder(config, trial.task)
    method = None if arm.method is None else arm.at(trial.beta, config.steps)
    teacher = str(task / f"teacher_{trial.teacher}")
    base = TrainConfig(
        out=trial_folder(config, trial) / "run",
        seed=trial.seed,
        steps=config.steps,
        save_every=config.steps,
        model=ModelConfig(policy=str(task / "student"), device=config.device),
        data=data_config(task / "train.jsonl"),
        sampling=SamplingConfig(
            prompts_per_step=config.prompts_per_step,
            group_size=config.group_size,
            max_new_tokens=config.task_models(trial.task).max_new_tokens,
            batch_size=1024,
        ),
        reward=RewardConfig(function=TASKS[trial.task].reward, workers=1),
        optim=OptimConfig(
            learning_rate=trial.learning_rate or 1.0, micro_batch_tokens=MICRO_BATCH_TOKENS
        ),
    )
    if method is None:
        return base
    model = replace(base.model, teacher=None if method.kd is None else teacher)
    if arm.sketched:
        model = replace(
            model,
            head_backward="sketch",
            head_threshold=SKETCH_THRESHOLD,
            head_flat=NO_ROW_IS_FLAT,
        )
    settings = _at(task, arm.settings)
    return update(replace(base, method=method, model=model), settings)


def _at(task: Path, value: Any) -> Any:
    """Put the folder of a task in place of {task} in the texts of nested settings."""
    if isinstance(value, Mapping):
        return {key: _at(task, one) for key, one in value.items()}
    return value.replace("{task}", str(task)) if isinstance(value, str) else value


def run(config: StudyConfig, trial: Trial) -> TrialResult:
    """Train, unless the arm trains nothing, then measure the model."""
    start = time.perf_counter()
    run_config, task = train_config(config, trial), setup.folder(config, trial.task)
    curve: dict[str, list[float | None]] = {}
    sampled = 0
    if trial.arm == "sft":
        folder, sampled = distil_offline(config, trial, run_config)
    elif trial.learning_rate is None:
        folder = task / ("student" if trial.arm == "student" else f"teacher_{trial.teacher}")
    else:
        policy_class = K1Policy if ARMS[trial.arm].k1_as_loss else Policy
        folder = train.main(run_config, policy_class=policy_class) / "model"
        if not folder.exists():  # a signal ended it, which is no result: the trial runs again
            raise SystemExit(f"{trial.name} was stopped before its last step")
        rows = read_records(run_config.out)
        sketch = SKETCH_CURVES if ARMS[trial.arm].sketched else ()
        names = [*CURVES, *sketch, *(f"seconds_{stage}" for stage in STAGES)]
        curve = {name: [_short(row.get(name)) for row in rows] for name in names}
        sampled = sum(row["tokens"] for row in rows)
    return TrialResult(
        trial=trial,
        status="done",
        scores=measure(config, trial, folder, run_config),
        curve=curve,
        sampled_tokens=sampled,
        seconds=time.perf_counter() - start,
    )


def _short(value: float | None) -> float | None:
    """Round to five digits, since results are committed and read by people."""
    return None if value is None else float(f"{value:.5g}")


def sample(model: Any, tokenizer: Any, examples: Any, run_config: TrainConfig, step: int, size: int,
           verifier: Verifier) -> tuple[Rollouts, Verdicts]:  # fmt: skip
    """Sample and judge `size` completions of each example, drawn by (seed, step) as in training."""
    prompts = [encode_prompt(tokenizer, example, run_config.data) for example in examples]
    sampling = replace(run_config.sampling, group_size=size)
    request = SampleRequest(prompts=prompts, sampling=sampling, seed=run_config.seed, step=step)
    rollouts = generate_rollouts(model, tokenizer, request)
    golds = [example.gold for example in examples for _ in range(size)]
    return rollouts, verifier.score(rollouts.texts, golds)


def measure(
    config: StudyConfig, trial: Trial, folder: Path, run_config: TrainConfig
) -> dict[str, Score]:
    """Score a model on the validation problems (in a sweep), else on all sets of test problems.

    Every arm with this seed uses the same random draws.
    """
    sets = {"validation": config.validation_problems}
    if not trial.sweep:
        sets = dict.fromkeys(("test", *setup.OUT_OF_DISTRIBUTION), config.test_problems)
    model = load_model(str(folder), "model.policy", run_config.model, torch.float32)
    tokenizer, k = load_tokenizer(str(folder)), config.samples
    scores = {}
    with Verifier(run_config.reward) as verifier:
        for name, count in sets.items():
            data = data_config(setup.folder(config, trial.task) / f"{name}.jsonl")
            examples = load_examples(data)[:count]
            judged = sample(model, tokenizer, examples, run_config, EVAL_STEP, k, verifier)
            scores[name] = score(*judged, samples=k, seed=trial.seed)
    return scores


def score(rollouts: Rollouts, verdicts: Verdicts, *, samples: int, seed: int) -> Score:
    """Score `samples` judged completions of each problem."""
    summary = summarize(rollouts, verdicts, samples, seed, 0.0)
    right = np.array([outcome == "right" for outcome in verdicts.outcomes]).reshape(-1, samples)
    return Score(
        samples=samples,
        right="".join(str(n) for n in right.sum(axis=1)),
        pass_at_k=summary.pass_at_k[samples],
        maj_at_k=summary.maj_at_k,
        length=summary.mean_length,
        truncated=summary.truncated,
    )


def distil_offline(config: StudyConfig, trial: Trial, run_config: TrainConfig) -> tuple[Path, int]:
    """Train the student by SFT on the teacher's right completions.

    The teacher completes the prompts that the other arms see, as often as they do, and the student
    makes as many updates as they do. It learns from each right completion once.

    Returns: the model's folder, and the tokens of all completions, wrong ones included.
    """
    task, out = setup.folder(config, trial.task), run_config.out.parent
    folder = task / f"teacher_{trial.teacher}"
    model = load_model(str(folder), "model.teacher", run_config.model, torch.float32)
    tokenizer, examples = load_tokenizer(str(folder)), load_examples(run_config.data)
    rows, tokens, learnt = [], 0, 0
    with Verifier(run_config.reward) as verifier:
        for step in range(config.steps):
            places = step_indices(len(examples), run_config.seed, step, config.prompts_per_step)
            examples_of_step = [examples[i] for i in places]
            rollouts, verdicts = sample(
                model, tokenizer, examples_of_step, run_config, step, config.group_size, verifier
            )
            tokens += int(rollouts.lengths.sum())
            for r, outcome in enumerate(verdicts.outcomes):
                if outcome == "right":
                    prompt = examples_of_step[r // config.group_size].prompt.rstrip("\n")
                    rows.append({"question": prompt, "solution": rollouts.texts[r]})
                    learnt += len(rollouts.completion_ids[r]) + len(rollouts.prompt_ids[r])
    if not rows:
        raise ValueError(f"the teacher must give right samples, got none from {folder}")
    jsonl.write(out / "samples.jsonl", rows)
    assert trial.learning_rate is not None
    sft.main(
        sft.SftConfig(
            out=out / "model",
            model=str(task / "student"),
            seed=trial.seed,
            data=data_config(out / "samples.jsonl"),
            steps=config.steps,
            batch_tokens=math.ceil(learnt / config.steps),
            learning_rate=trial.learning_rate,
            warmup_steps=min(50, config.steps // 10),
            device=config.device,
        )
    )
    return out / "model", tokens


def main(argv: list[str]) -> int:
    """Run the named trials and models; a trial's error goes into its result, a model's is fatal."""
    out, names = Path(argv[0]), argv[1:]
    config = update(StudyConfig(), load_yaml(out / "study.yaml"))
    torch.set_num_threads(1)
    report = os.fdopen(os.dup(1), "w", buffering=1)
    for name in names:
        folder = out / "trials" / name
        if not (folder / "trial.json").exists():
            task, model = name.split("/")
            sft.main(setup.model_config(config, task, model))
            continue
        with (folder / "log.txt").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        finish(config, folder)
        report.write(f"{name}\n")
    return 0


def finish(config: StudyConfig, folder: Path) -> None:
    """Run the trial whose trial.json is in the folder, and write its result there."""
    trial = Trial(**json.loads((folder / "trial.json").read_text(encoding="utf-8")))
    try:
        result = run(config, trial)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        result = TrialResult(trial=trial, status="crashed", error=message)
    result = replace(result, commit=events.versions().get("commit"))
    result.write(folder / "result.json")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
