"""verl's FSDP engine makes an update with our head and losses: `bash tests/verl.sh`."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

pytest.importorskip("verl", reason="needs verl: bash tests/verl.sh")

import kdrl_kernels as kk
from kdrl_kernels.integrations.sequence_weights import WEIGHT
from kdrl_kernels.integrations.verl.topk import TeacherTopk, TopkNumbers
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.grpo import kd_weights
from kdrl_train.method.schedules import schedule_value
from tests.integrations import verl_host as host

pytestmark = [
    pytest.mark.verl,
    # verl, ray and peft under the versions that verl asks for
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny Qwen2 on disk, and a process group for the engines."""
    folder = tmp_path_factory.mktemp("verl")
    with host.one_process(folder):
        yield host.saved(folder)


@pytest.fixture(scope="module")
def lean(model: Path) -> Any:
    return host.engine(model, "kdrl")


@pytest.fixture(scope="module")
def full(model: Path) -> Any:
    return host.engine(model, None)


@pytest.mark.parametrize("mode", ["vanilla", "kdrl", "gspo"])
def test_an_update_has_the_gradients_of_full_logits(lean: Any, full: Any, mode: str) -> None:
    loss = host.policy_gradient(host.actor_config(loss_mode=mode, entropy_coeff=0.1))
    same(host.run(lean, loss), host.run(full, loss, fused=False))


def same(ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]) -> None:
    """Compare loss and gradients of an update; none may be all zeros."""
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert all(grad.abs().max() > 1e-4 for grad in theirs[1].values())
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)


def test_padded_inputs_have_them_too(model: Path, full: Any) -> None:
    loss = host.policy_gradient(host.actor_config())
    padded = host.engine(model, "kdrl", use_remove_padding=False)
    same(host.run(padded, loss, use_remove_padding=False), host.run(full, loss, fused=False))


def test_activation_checkpoints_leave_them(model: Path, full: Any) -> None:
    loss = host.policy_gradient(host.actor_config())
    built = host.engine(model, "kdrl", enable_gradient_checkpointing=True)
    same(host.run(built, loss), host.run(full, loss, fused=False))


def test_bfloat16_is_as_near_to_float32_as_full_logits_are(model: Path, full: Any) -> None:
    loss = host.policy_gradient(host.actor_config())
    exact = host.run(full, loss, fused=False)[1]
    ours, theirs = (
        host.run(host.engine(model, backend, precision=None), loss, fused=bool(backend))[1]
        for backend in ("kdrl", None)
    )
    for name, grad in exact.items():
        error, baseline = ((side[name] - grad).abs().max() for side in (ours, theirs))
        assert error <= 2 * baseline + 2**-8 * grad.abs().max(), name


def test_another_temperature_has_them_too(lean: Any, full: Any) -> None:
    loss, hot = host.policy_gradient(host.actor_config()), {"temperature": 1.7}
    same(host.run(lean, loss, **hot), host.run(full, loss, fused=False, **hot))


def test_a_tied_head_has_them_too(tmp_path: Path, model: Path) -> None:  # noqa: ARG001
    tied = host.saved(tmp_path, tie_word_embeddings=True)
    loss = host.policy_gradient(host.actor_config())
    theirs = host.run(host.engine(tied, None), loss, fused=False)
    same(host.run(host.engine(tied, "kdrl"), loss), theirs)


def test_three_steps_leave_the_parameters_of_full_logits(model: Path) -> None:
    loss = host.policy_gradient(host.actor_config(loss_mode="vanilla"))
    parameters = []
    for backend in ("kdrl", None):
        built = host.engine(model, backend, lr=1e-3)
        norms = []
        for step in range(3):
            data = host.update_batch(host.rollouts(seed=step), fused=backend is not None)
            with built.train_mode():
                norms.append(built.train_batch(data, loss)["metrics"]["grad_norm"])
                built.lr_scheduler_step()
        named = built.module.named_parameters()
        parameters.append((norms, {name: p.full_tensor().detach() for name, p in named}))
    assert parameters[0][0] == pytest.approx(parameters[1][0], rel=1e-5)
    torch.testing.assert_close(parameters[0][1], parameters[1][1], rtol=1e-5, atol=1e-5)


# with a teacher


def kdrl_train_loss(
    model: Path,
    schedule: ScheduleConfig,
    mask: str,
    step: int,
    *,
    batch: Any = None,
    objective: kk.Objective = kk.Objective(kd="k2", kd_coef=1.0, dual_clip=3.0),  # noqa: B008
) -> Any:
    """Compute loss and gradients of a batch by kdrl_loss, with the trainer's weights."""
    batch = batch or host.rollouts()
    tensors = batch.batch
    policy = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    policy.lm_head.weight.requires_grad_()
    P = tensors["prompts"].shape[1]
    rows: dict[str, list[Tensor]] = {key: [] for key in ("hidden", "token", "teacher", "ids")}
    for b in range(len(batch)):
        used = tensors["attention_mask"][b].bool()
        states = policy.model(input_ids=tensors["input_ids"][b][used][None])[0][0]
        length = int(used[P:].sum())
        rows["hidden"].append(states[-length - 1 : -1])
        rows["token"].append(tensors["responses"][b, :length])
        rows["teacher"].append(tensors["teacher_logprobs"][b, P - 1 : P - 1 + length])
        rows["ids"].append(tensors["teacher_ids"][b, P - 1 : P - 1 + length])
    used = tensors["attention_mask"][:, P:].bool()
    rewards_PG = tensors["token_level_scores"].sum(1).view(-1, 4).double()
    method = MethodConfig(kd_coef=schedule, kd_mask=mask)  # type: ignore[arg-type]
    weight_R = kd_weights(rewards_PG, rewards_PG > 0.5, method, schedule_value(schedule, step))
    weights = tensors["response_mask"][used]
    out = kk.kdrl_loss(
        torch.cat(rows["hidden"]),
        policy.lm_head.weight,
        torch.cat(rows["token"]),
        advantages=tensors["advantages"][used],
        old_logprobs=tensors["old_log_probs"][used],
        teacher_logprobs=None if objective.topk_kd else torch.cat(rows["teacher"])[:, 0],
        teacher_topk=(torch.cat(rows["ids"]), torch.cat(rows["teacher"]))
        if objective.topk_kd
        else None,
        token_weights=weights,
        kd_weight=weight_R[:, None].expand_as(used)[used],
        objective=objective,
    )
    out.loss.backward()
    return out.loss.item(), {name: p.grad for name, p in policy.named_parameters()}


@pytest.mark.parametrize("mask", ["none", "wrong", "wrong_group"])
@pytest.mark.parametrize("kind", ["constant", "linear", "reward_adaptive"])
def test_the_joint_loss_is_that_of_kdrl_train(
    model: Path, lean: Any, mask: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"kind": kind, "initial": 0.8, "final": 0.2, "steps": 4}
    monkeypatch.setattr(lean.lr_scheduler, "last_epoch", 3)
    loss = host.joint_loss(host.actor_config(), kd_coef_schedule=fields, kd_mask=mask)
    theirs = kdrl_train_loss(model, ScheduleConfig(**fields), mask, 3)
    same(host.run(lean, loss), theirs)


@pytest.mark.parametrize("kd", ["topk_rkl", "topk_fkl", "topk_jsd"])
@pytest.mark.parametrize("tail", [True, False])
def test_a_topk_loss_is_that_of_kdrl_train(model: Path, lean: Any, kd: Any, tail: bool) -> None:
    objective = kk.Objective(kd=kd, kd_coef=1.0, dual_clip=3.0, tail=tail, jsd_alpha=0.3)
    batch, fields = host.rollouts(topk=7), {"kind": "reward_adaptive", "initial": 0.8}
    loss = host.joint_loss(
        host.actor_config(),
        loss_mode=f"kdrl_{kd}",
        kd_coef_schedule=fields,
        kd_mask="wrong",
        tail=tail,
        jsd_alpha=0.3,
    )
    data = host.update_batch(batch, fused=True, distillation_use_topk=True)
    schedule = ScheduleConfig(**fields)  # type: ignore[arg-type]
    theirs = kdrl_train_loss(model, schedule, "wrong", 0, batch=batch, objective=objective)
    same(host.gradients(lean, data, loss), theirs)


def test_sixteen_bits_do_not_round_what_a_teacher_said(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes, numbers = [], TeacherTopk.numbers

    def spy(teacher: TeacherTopk, logprobs: Tensor, rest: Tensor | None) -> TopkNumbers:
        dtypes.append((teacher.logprobs.dtype, logprobs.dtype))
        return numbers(teacher, logprobs, rest)

    monkeypatch.setattr(TeacherTopk, "numbers", spy)
    loss = host.joint_loss(host.actor_config(), loss_mode="kdrl_topk_rkl")
    data = host.update_batch(host.rollouts(topk=7), fused=True, distillation_use_topk=True)
    host.gradients(host.engine(model, "kdrl", precision=None), data, loss)
    assert set(dtypes) == {(torch.float32, torch.float32)}


def test_a_topk_loss_alone_needs_no_sampled_tokens(model: Path, lean: Any) -> None:
    objective = kk.Objective(policy="off", kd="topk_fkl", kd_coef=1.0, kd_ratio_cap=1.0)
    batch = host.rollouts(topk=7)
    loss = host.joint_loss(
        host.actor_config(), loss_mode="kdrl_topk_fkl", use_task_rewards=False, kd_ratio_cap=1.0
    )
    flags = {"distillation_use_topk": True, "distillation_only": True}
    data = host.update_batch(batch, fused=True, calculate_entropy=False, **flags)
    batch.batch["old_log_probs"] -= 100  # so that s is 1
    schedule = ScheduleConfig(initial=1.0)
    theirs = kdrl_train_loss(model, schedule, "none", 0, batch=batch, objective=objective)
    same(host.gradients(lean, data, loss), theirs)


@pytest.mark.parametrize(
    ("backend", "message"),
    [(None, "model.use_fused_kernels=True .*impl_backend=kdrl"), ("kdrl", "use_remove_padding")],
)
def test_a_topk_loss_elsewhere_is_refused(model: Path, backend: str | None, message: str) -> None:
    built = host.engine(model, backend)
    flags = {"distillation_use_topk": True, "use_remove_padding": backend is None}
    data = host.update_batch(host.rollouts(topk=3), fused=backend is not None, **flags)
    loss = host.joint_loss(host.actor_config(), loss_mode="kdrl_topk_rkl")
    with built.train_mode(), pytest.raises(ValueError, match=f"must be used with .*{message}"):
        built.train_batch(data, loss)


def test_two_ranks_have_the_gradients_of_one(model: Path, lean: Any, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    out = tmp_path / "gradients.pt"
    command = [*torchrun, "-m", "tests.integrations.verl_ranks", str(model), str(out)]
    subprocess.run(command, check=True, timeout=300)
    both = torch.load(out)
    loss = host.joint_loss(host.actor_config(), kd_coef_schedule="reward_adaptive")
    same((both["loss"], both["grads"]), host.run(lean, loss))


def test_only_the_teacher_changes_what_a_teacher_changes(lean: Any) -> None:
    loss = host.joint_loss(host.actor_config(), distillation_loss_coef=0.1)
    batch = host.rollouts()
    first = host.gradients(lean, host.update_batch(batch, fused=True), loss)[1]
    batch.batch["teacher_logprobs"] -= 1
    second = host.gradients(lean, host.update_batch(batch, fused=True), loss)[1]
    assert (first["lm_head.weight"] - second["lm_head.weight"]).abs().max() > 1e-3


def test_a_step_is_a_move_of_the_learning_rate(model: Path) -> None:
    built = host.engine(model, "kdrl")
    fields = {"kind": "step", "initial": 1.0, "at": [1, 2], "values": [0.5, 0.25]}
    actor = host.actor_config()
    loss = host.joint_loss(actor, kd_coef_schedule=fields)
    measured = []
    for _ in range(3):
        for _ in range(2):  # two updates of a step
            data = host.update_batch(host.rollouts(), fused=True)
            with built.train_mode():
                metrics = built.train_batch(data, loss)["metrics"]
            measured += metrics["distillation/kd_weight"]
        built.lr_scheduler_step()
    assert measured == pytest.approx([1] * 4 + [0.5] * 4 + [0.25] * 4)


@pytest.mark.parametrize("bound", [0.5, 1.0])
def test_a_completion_is_right_above_a_reward(lean: Any, bound: float) -> None:
    loss = host.joint_loss(host.actor_config(), kd_mask="wrong", right_above=bound)
    batch = host.rollouts()
    weights = host.weighted(lean, host.update_batch(batch, fused=True), loss)[WEIGHT]
    wrong = batch.batch["token_level_scores"].sum(1) <= bound
    assert weights.tolist() == wrong.tolist()


def test_a_group_in_two_updates_is_refused(lean: Any) -> None:
    loss = host.joint_loss(host.actor_config(), kd_mask="wrong_group")
    data = host.update_batch(host.rollouts(size=2), fused=True, micro_batch=2)
    with (
        lean.train_mode(),
        pytest.raises(ValueError, match=r"each group must be whole .* 4 completions, got .* \[2\]"),
    ):
        lean.train_batch(data, loss)


@pytest.mark.parametrize("key", ["uid", "token_level_scores"])
def test_a_batch_without_what_a_mask_reads_is_refused(lean: Any, key: str) -> None:
    loss = host.joint_loss(host.actor_config(), kd_mask="wrong_group")
    data = host.update_batch(host.rollouts(), fused=True)
    del data[key]
    with lean.train_mode(), pytest.raises(ValueError, match=f"the batch must hold {key}"):
        lean.train_batch(data, loss)


def test_metrics_count_distilled_tokens(lean: Any) -> None:
    loss = host.joint_loss(host.actor_config(), kd_mask="wrong")
    batch = host.rollouts()
    data = host.update_batch(batch, fused=True, micro_batch=len(batch))
    with lean.train_mode():
        metrics = lean.forward_backward_batch(host.weighted(lean, data, loss), loss)["metrics"]
        lean.optimizer_zero_grad()
    mask = batch.batch["response_mask"]
    wrong = batch.batch["token_level_scores"].sum(1) == 0
    share = mask[wrong].sum() / mask.sum()
    assert metrics["distillation/kd_share"] == pytest.approx([share.item()])
    assert metrics["distillation/kd_weight"] == [1.0]
    assert {"distillation/teacher_log_ratio", "distillation/k2", "actor/ppo_kl"} <= set(metrics)
