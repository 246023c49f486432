"""Prints how far verl's numbers with our head are from those with full logits; tests/verl.sh.

Part 1: a patched model alone, float64. Part 2: an update by verl's FSDP2 engine, float32.
"""

import contextlib
import io
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor
from verl.models.transformers.monkey_patch import apply_monkey_patch

import kdrl_kernels as kk
from kdrl_train.method.config import ScheduleConfig
from tests.integrations import verl_host as host
from tests.integrations.test_verl_engine import kdrl_train_loss
from tests.integrations.test_verl_head import FAMILIES, full_logits, scores_and_gradients


def largest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, float]:
    """Return the largest difference of two sets of gradients, and the largest gradient."""
    apart = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    return apart, max(grad.abs().max().item() for grad in theirs.values())


def model_lines() -> list[str]:
    lines = []
    for family, config in FAMILIES.items():
        model = host.tiny(config()).double()
        inputs = {"input_ids": torch.randint(3, host.V, (2, 7))}
        theirs = scores_and_gradients(model, full_logits(model, inputs, 0.7))
        apply_monkey_patch(model, use_fused_kernels=True, fused_kernels_backend="kdrl")
        out = model(**inputs, temperature=0.7, return_dict=True, use_cache=False)
        ours = scores_and_gradients(model, (out.log_probs, out.entropy))
        scores, entropy = (
            (a - b).abs().max().item() for a, b in zip(ours[:2], theirs[:2], strict=True)
        )
        apart, size = largest(ours[2], theirs[2])
        name = (
            f"{model.config.model_type}, {family}" if family != model.config.model_type else family
        )
        lines.append(f"| {name} | {scores:.0e} | {entropy:.0e} | {apart:.0e} of {size:.1f} |")
    return lines


def engine_lines() -> list[str]:
    lines = []
    folder = Path(tempfile.mkdtemp())
    with host.one_process(folder):
        model = host.saved(folder)
        lean, full = host.engine(model, "kdrl"), host.engine(model, None)
        for mode in ("vanilla", "kdrl", "gspo", "cispo"):
            loss = host.policy_gradient(host.actor_config(loss_mode=mode, entropy_coeff=0.1))
            pairs = host.run(lean, loss), host.run(full, loss, fused=False)
            lines.append(engine_line(f'policy loss "{mode}", entropy bonus', *pairs))
        for mask in ("none", "wrong", "wrong_group"):
            fields = {"kind": "linear", "initial": 0.8, "final": 0.2, "steps": 4}
            loss = host.joint_loss(host.actor_config(), kd_coef_schedule=fields, kd_mask=mask)
            theirs = kdrl_train_loss(model, ScheduleConfig(**fields), mask, 0)
            name = f'"kdrl" + "kdrl_k2", linear schedule, mask {mask}: against `kdrl_loss`'
            lines.append(engine_line(name, host.run(lean, loss), theirs))
        for kd in ("topk_rkl", "topk_fkl", "topk_jsd"):
            objective = kk.Objective(kd=kd, kd_coef=1.0, dual_clip=3.0)
            batch, mode = host.rollouts(topk=7), f"kdrl_{kd}"
            loss = host.joint_loss(host.actor_config(), loss_mode=mode, kd_mask="wrong")
            data = host.update_batch(batch, fused=True, distillation_use_topk=True)
            constant = ScheduleConfig(initial=1.0)
            theirs = kdrl_train_loss(model, constant, "wrong", 0, batch=batch, objective=objective)
            name = f'"kdrl" + "{mode}", mask wrong: against `kdrl_loss`'
            lines.append(engine_line(name, host.gradients(lean, data, loss), theirs))
    return lines


def engine_line(
    name: str, ours: tuple[float, dict[str, Tensor]], theirs: tuple[float, dict[str, Tensor]]
) -> str:
    apart, size = largest(ours[1], theirs[1])
    return f"| {name} | {ours[0]:.6f} | {theirs[0]:.6f} | {apart:.0e} of {size:.2f} |"


def main() -> None:
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        models, engines = model_lines(), engine_lines()
    print("| patched model, float64 | log-probability | entropy | gradients |\n|---|---|---|---|")
    print("\n".join(models))
    print("\n| update by FSDP2, float32 | loss | with full logits | gradients |\n|---|---|---|---|")
    print("\n".join(engines))


if __name__ == "__main__":
    main()
