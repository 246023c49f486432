"""Runs of KdrlTrainer: masks, schedules, kinds of teachers, and resuming to the bit."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from trl import GRPOConfig, GRPOTrainer

from kdrl_kernels.integrations import trl
from kdrl_kernels.integrations.trl import KdrlConfig, KdrlTrainer
from kdrl_train.cli import parse
from kdrl_train.model.teacher.client import TeacherError, vocabulary_hash
from kdrl_train.tools.serve.command import ServeConfig
from tests.integrations.trl_runs import (
    OLD_NAMES,
    PROMPTS,
    arguments,
    logs,
    parameters,
    plain_settings,
    reward,
    small_model,
    tokenizer,
    trainer_of,
)
from tests.train.servers import Scripted, by_position, running, teacher_app

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)
ENDS = list(range(2, 262, 4))


class Recorder(KdrlTrainer):
    """Keeps what each micro-batch was told, by default those of training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Any]] = []
        self.all_terms: list[Any] = []
        self.training_alone = True

    def _head_terms(self, inputs: dict[str, Any]) -> Any:
        terms = super()._head_terms(inputs)
        if self.model.training or not self.training_alone:
            self.batches.append(inputs)
            self.all_terms.append(terms)
        return terms


def run(folder: Path, teacher: Any = None, resume: Path | None = None, **options: Any) -> Recorder:
    """Train KdrlTrainer on the small model; without a teacher named, that of seed 2."""
    names = ("reward_funcs", "train_dataset", "eval_dataset")
    more = {name: options.pop(name) for name in names if name in options}
    teacher = small_model(2, hidden=24) if teacher is None else teacher
    args = arguments(KdrlConfig, folder, **{"kd_coef": 0.5} | options)
    trainer = trainer_of(Recorder, args, teacher_model=teacher, **more)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer  # type: ignore[no-any-return]


def column(trainer: Any, name: str) -> list[float]:
    """Return a metric of each step."""
    return [line[name] for line in logs(trainer)]


def assert_same_weights(one: Any, other: Any) -> None:
    weights = parameters(other)
    for name, weight in parameters(one).items():
        assert torch.equal(weight, weights[name]), name


def judged(inputs: dict[str, Any]) -> list[float]:
    """Return the rewards of a batch's completions, from their tokens."""
    texts = []
    for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True):
        texts.append(tokenizer().decode(ids[mask.bool()], skip_special_tokens=True))
    return reward(texts)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_mask_follows_its_completions(tmp_path: Path, accumulation: int) -> None:
    trainer = run(
        tmp_path,
        kd_mask="wrong",
        steps_per_generation=2,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
    )
    assert len(trainer.batches) == 2 * accumulation
    weights = []
    for inputs, terms in zip(trainer.batches, trainer.all_terms, strict=True):
        expected = torch.tensor([float(value <= 0.5) for value in judged(inputs)])
        assert_close(inputs["kd_weight"], expected)
        assert_close(terms.kd_weight, 0.5 * expected[:, None].expand_as(terms.kd_weight))
        weights += expected.tolist()
    assert 0 < sum(weights) < len(weights)
    share = logs(trainer)[0]["kdrl/completions"]  # of what was generated first
    assert share == pytest.approx(sum(weights[:8]) / 8)


def test_the_teacher_reads_what_is_distilled_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, rows = small_model(2, hidden=24), list[int]()
    teacher.base_model.register_forward_pre_hook(
        lambda _module, _args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"kd": "rkl", "kd_mask": "wrong", "right_above": 0.2}
    trainer = run(tmp_path / "1", teacher, **options)
    wrong = [sum(value <= 0.2 for value in judged(inputs)) for inputs in trainer.batches]
    assert set(wrong) == {0, 1}
    probed = len(rows) - len(wrong)  # the teacher's own logits are compared before the first step
    assert probed > 0
    assert rows[probed:] == [max(count, 1) for count in wrong]

    def read_all(self: Any, inputs: Any, kd_weight: torch.Tensor) -> torch.Tensor:
        return KdrlTrainer._teacher_states(self, inputs, torch.ones_like(kd_weight))

    monkeypatch.setattr(Recorder, "_teacher_states", read_all)
    whole = run(tmp_path / "2", **options)
    assert all(terms.teacher_states.ne(0).any(dim=2).all() for terms in whole.all_terms)
    for name, weight in parameters(trainer).items():
        assert_close(weight, parameters(whole)[name], rtol=1e-5, atol=1e-7)


def test_a_group_mask_reads_whole_groups(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 8, "num_generations": 2, "learning_rate": 0.0}
    trainer = run(tmp_path, kd_mask="wrong_group", right_above=0.6, max_steps=4, **options)
    seen = set()
    for inputs in trainer.batches:
        groups: dict[Any, list[tuple[float, float]]] = {}
        rows = zip(inputs["prompt_ids"], judged(inputs), inputs["kd_weight"].tolist(), strict=True)
        for prompt, value, weight in rows:
            groups.setdefault(tuple(prompt.tolist()), []).append((value, weight))
        for members in groups.values():
            assert len(members) == 2
            expected = float(all(value <= 0.6 for value, _ in members))
            assert [weight for _, weight in members] == [expected] * 2
            seen.add((expected, *sorted(value <= 0.6 for value, _ in members)))
    assert seen == {(0.0, False, False), (0.0, False, True), (1.0, True, True)}


def test_ends_are_masked(tmp_path: Path) -> None:
    trainer = run(tmp_path, kd_eos="mask", max_steps=2)
    ends = 0
    for inputs, terms in zip(trainer.batches, trainer.all_terms, strict=True):
        is_end = torch.isin(inputs["completion_ids"], torch.tensor(ENDS))
        ends += int((is_end * inputs["completion_mask"]).sum())
        assert_close(terms.kd_weight, 0.5 * (~is_end).float())
    assert ends > 0


def test_beta_follows_its_schedule(tmp_path: Path) -> None:
    schedule = {"kind": "linear", "final": 0.0, "steps": 2}
    trainer = run(tmp_path, kd_coef_schedule=schedule, gradient_accumulation_steps=2, max_steps=4)
    assert column(trainer, "kdrl/kd_coef") == [0.5, 0.25, 0.0, 0.0]
    kinds = [terms.objective.kd for terms in trainer.all_terms]
    assert kinds == ["k2"] * 4 + [None] * 4
    assert trainer.all_terms[-1].teacher_states is None  # the teacher is not run for nothing


def test_beta_0_is_grpo(tmp_path: Path) -> None:
    trainer = run(tmp_path, kd_coef=0.0)
    host = trainer_of(GRPOTrainer, arguments(GRPOConfig, tmp_path))
    host.train()
    for name, weight in parameters(trainer).items():
        assert_close(weight, parameters(host)[name], rtol=1e-5, atol=1e-7)


def one(completions: list[str], **columns: Any) -> list[float]:  # noqa: ARG001
    return [1.0] * len(completions)


def test_an_adaptive_schedule_reads_the_share_of_right_completions(tmp_path: Path) -> None:
    options = {"reward_funcs": [reward, one], "reward_weights": [1.0, 0.0], "learning_rate": 0.0}
    trainer = run(tmp_path, kd_coef_schedule={"kind": "reward_adaptive"}, **options)
    for inputs in trainer.batches:
        right = sum(value > 0.5 for value in judged(inputs)) / 4
        assert_close(inputs["kd_weight"], torch.full((4,), 4 * right * (1 - right)))
    assert len({inputs["kd_weight"][0].item() for inputs in trainer.batches}) > 1


def test_evaluations_have_groups_of_their_size(tmp_path: Path) -> None:
    options = {"num_generations_eval": 2, "per_device_eval_batch_size": 8, "eval_strategy": "steps"}
    args = arguments(KdrlConfig, tmp_path, kd_mask="wrong_group", right_above=0.6, **options)
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    teacher = small_model(2)
    trainer = trainer_of(Recorder, args, teacher_model=teacher, eval_dataset=prompts)
    trainer.training_alone = False
    metrics = trainer.evaluate()
    (inputs,) = trainer.batches
    wrong = torch.tensor([value <= 0.6 for value in judged(inputs)]).view(4, 2).all(dim=1)
    assert_close(inputs["kd_weight"], wrong.float().repeat_interleave(2))
    assert metrics["eval_kdrl/completions"] == pytest.approx(wrong.float().mean().item())
    assert 0 < wrong.sum() < 4


def folder_of(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_model_folder_and_server_teach_the_same(tmp_path: Path) -> None:
    teacher = small_model(2, hidden=24)
    folder = folder_of(teacher, tmp_path / "teacher")
    one = run(tmp_path / "1", teacher)
    other = run(tmp_path / "2", folder)
    assert_same_weights(one, other)
    with running(teacher_app(folder)) as url:
        remote = run(tmp_path / "3", url)
        remote.teacher_server.close()
    before = parameters(trainer_of(Recorder, arguments(KdrlConfig, tmp_path, kd=None)))
    for name, weight in parameters(one).items():
        moved = (weight - before[name]).abs().max().item()
        assert_close(parameters(remote)[name], weight, rtol=1e-4, atol=1e-3 * moved)
    for name in ("kdrl/k2", "kdrl/teacher_log_ratio", "loss", "grad_norm"):
        assert column(remote, name) == pytest.approx(column(one, name), rel=1e-4), name
    assert column(one, "kdrl/k2")[0] > 0.1
    alone = trainer_of(GRPOTrainer, arguments(GRPOConfig, tmp_path))
    alone.train()
    assert column(alone, "grad_norm") != pytest.approx(column(one, "grad_norm"), rel=0.1)


def test_a_server_is_queried_for_what_is_distilled_alone(tmp_path: Path) -> None:
    script = Scripted(
        by_position, tokenizer=vocabulary_hash(tokenizer()), vocab_size=262, eos_ids=ENDS
    )
    schedule = {"kind": "step", "at": [1], "values": [0.0]}
    with running(script.app()) as url:
        trainer = run(tmp_path, url, kd="k3", kd_mask="wrong", kd_coef_schedule=schedule)
        trainer.teacher_server.close()
    sent = set(script.queries)
    inputs = trainer.batches[0]
    weight = inputs["kd_weight"] > 0
    expected, rows = (
        set(),
        zip(
            inputs["prompt_ids"],
            inputs["prompt_mask"].bool(),
            inputs["completion_ids"],
            inputs["completion_mask"].bool(),
            strict=True,
        ),
    )
    for distilled, (prompt, kept, completion, mask) in zip(weight, rows, strict=True):
        if distilled:
            expected.add((*prompt[kept].tolist(), *completion[mask].tolist()))
    assert sent == expected
    assert 0 < weight.sum() < 4
    assert all("teacher_logprobs" not in inputs for inputs in trainer.batches[1:])
    ids = inputs["prompt_mask"].sum(dim=1)[:, None] + torch.arange(
        inputs["completion_ids"].shape[1]
    )
    scores = -(ids + inputs["completion_ids"] / 1000) * inputs["completion_mask"] * weight[:, None]
    assert_close(inputs["teacher_logprobs"], scores)


RESUMED: dict[str, dict[str, Any]] = {
    "kl_budget": {
        "kd": "rkl",
        "kd_coef_schedule": {"kind": "kl_budget", "bounds": [1e-4, 2.0], "gain": 0.3},
        "gradient_accumulation_steps": 2,
    },
    "cosine": {"kd_coef_schedule": {"kind": "cosine", "final": 0.0, "steps": 5}},
    "sketch": {"head_backward": "sketch", "sketch_threshold": 1.0},
    "masked": {"kd_mask": "wrong", "optim": "adamw_torch", "learning_rate": 1e-3},
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("cosine", "masked")]


@pytest.mark.parametrize("name", ["kl_budget", "sketch", *SLOW])
def test_a_resumed_run_is_the_run_to_the_bit(tmp_path: Path, name: str) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4} | RESUMED[name]
    # at the end of an epoch transformers itself does not resume to the bit
    options["train_dataset"] = Dataset.from_dict({"prompt": PROMPTS * 4})
    whole = run(tmp_path / "run", **options)
    resumed = run(tmp_path / "run", resume=tmp_path / "run" / "checkpoint-2", **options)
    assert column(resumed, "kdrl/kd_coef") == column(whole, "kdrl/kd_coef")
    scheduled = "kd_coef_schedule" in RESUMED[name]
    assert len(set(column(whole, "kdrl/kd_coef"))) == (4 if scheduled else 1)
    if name == "sketch":
        assert all(noise > 0 for noise in column(whole, "kdrl/sketch_noise"))
    for key in ("loss", "grad_norm", "kdrl/k2"):
        assert column(resumed, key) == column(whole, key), key
    assert_same_weights(resumed, whole)


def test_a_budget_uses_what_was_logged(tmp_path: Path) -> None:
    options = RESUMED["kl_budget"] | {"gradient_accumulation_steps": 1, "max_steps": 4}
    evaluation = Dataset.from_dict({"prompt": PROMPTS[:1]})
    options |= {"eval_dataset": evaluation, "eval_strategy": "steps", "eval_steps": 1}
    trainer = run(tmp_path, per_device_eval_batch_size=4, **options)
    kl, beta = column(trainer, "kdrl/kl"), column(trainer, "kdrl/kd_coef")
    assert trainer._beta.history.kl == kl
    for s in range(3):
        error = min(max(kl[s] / 0.1 - 1, -1.0), 1.0)
        assert beta[s + 1] == pytest.approx(min(max(beta[s] * (1 + 0.3 * error), 1e-4), 2.0))


def test_a_plateau_of_the_evaluations_switches_and_is_kept(tmp_path: Path) -> None:
    def constant(completions: list[str], **columns: Any) -> list[float]:  # noqa: ARG001
        return [0.25] * len(completions)

    options = {
        "kd_coef_schedule": {"kind": "switch", "final": 0.125, "steps": 100, "patience": 2},
        "reward_funcs": constant,
        "eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:1]}),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
    }
    whole = run(tmp_path / "run", **options)
    assert column(whole, "kdrl/kd_coef") == [0.5, 0.5, 0.5, 0.125]
    assert whole._beta.history.scores == [0.25] * 4
    resumed = run(tmp_path / "run", resume=tmp_path / "run" / "checkpoint-2", **options)
    assert column(resumed, "kdrl/kd_coef") == [0.5, 0.5, 0.5, 0.125]
    assert_same_weights(resumed, whole)


def test_a_resumed_run_needs_its_teachers_server(tmp_path: Path) -> None:
    facts = {"tokenizer": vocabulary_hash(tokenizer()), "vocab_size": 262, "eos_ids": ENDS}
    script = Scripted(by_position, **facts)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    with running(script.app()) as url:
        run(tmp_path / "run", url, **options).teacher_server.close()
        script.info |= {"dtype": "bfloat16"}
        checkpoint = tmp_path / "run" / "checkpoint-2"
        with pytest.raises(
            TeacherError, match=r"the teacher scripted must be that of .*teacher\.j"
        ):
            run(tmp_path / "run", url, resume=checkpoint, **options)


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (lambda: None, {}, r"teacher_model must be set with kd='k2', got None"),
        (lambda: small_model(2), {"kd": None}, r"teacher_model must be None with kd=None"),
        (
            lambda: small_model(2),
            {"kd_coef_schedule": {"kind": "switch", "final": 0.0, "patience": 1}},
            r"eval_strategy and one eval_dataset must be set",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(
    tmp_path: Path, teacher: Callable[[], Any], options: dict[str, Any], message: str
) -> None:
    args = arguments(KdrlConfig, tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        trainer_of(KdrlTrainer, args, teacher_model=teacher())


def test_the_student_is_no_teacher(tmp_path: Path) -> None:
    model = small_model(1)
    args = arguments(KdrlConfig, tmp_path)
    with pytest.raises(ValueError, match=r"teacher_model must not share weights with model"):
        trainer_of(KdrlTrainer, args, model=model, teacher_model=model)


def test_the_guides_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = Path(trl.__file__).with_name("README.md").read_text(encoding="utf-8")
    section = text.split("## KdrlTrainer")[1].split("\n## ")[0]
    more = plain_settings(tmp_path)
    del more["output_dir"]
    names: dict[str, Any] = {
        "student": small_model(1),
        "teacher": small_model(2),
        "reward": reward,
        "more": more,
        "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
        "tokenizer": tokenizer(),
    }
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert len(logs(names["trainer"])) == 3
    for schedule in ("fading", "budget", "plateau"):
        args = arguments(KdrlConfig, tmp_path, kd_coef=0.01, kd_coef_schedule=names[schedule])
        assert args.schedule().kind == names[schedule]["kind"]
    (words,) = [shlex.split(line) for line in section.splitlines() if "kdrl_train serve" in line]
    config = parse(ServeConfig(), words[words.index("serve") + 1 :], "serve", "")
    assert config.model.teacher == "TEACHER"
