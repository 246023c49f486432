"""Trains with TRL's DistillationTrainer by any divergence or sampled term of Objective.

B completions, C their positions, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl import DistillationConfig, DistillationTrainer

import kdrl_kernels as kk
from kdrl_kernels.integrations.own_logits import require_own_logits
from kdrl_kernels.integrations.trl.config import (
    HEAD_BACKWARDS,
    READERS,
    KdrlConfig,
    arguments_of,
    check_sampler,
)
from kdrl_kernels.integrations.trl.head import bare, model_head
from kdrl_kernels.integrations.trl.head_loss import HeadTerms, one_pass, places_of
from kdrl_kernels.integrations.trl.means import log_means
from kdrl_kernels.integrations.trl.teachers import check_apart, check_tokens, tokenizer_of

OPTIONS = {one.name: one for one in fields(KdrlConfig)}
BETAS = {0.0: "fkl", 1.0: "rkl"}
"""What TRL's beta means at its ends; between them it is the teacher's share in "jsd"."""
MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""Inputs of a vision-language model, as TRL names them."""


def _as_in_kdrl(name: str) -> Any:
    """Return a field with the default and the help that it has in KdrlConfig."""
    return field(default=OPTIONS[name].default, metadata=dict(OPTIONS[name].metadata))


@dataclass
class KdrlDistillationConfig(DistillationConfig):
    """Adds kinds of distillation, and the sketch, to DistillationConfig.

    The options are those of KdrlConfig. kd is None by default: TRL's beta then says what is
    minimised, 0 the forward KL, 1 the reverse KL, and any between the Jensen-Shannon divergence.

    Raises: ValueError or TypeError, one line, for an option that is wrong or that would do nothing.
    """

    kd: str | None = field(
        default=None,
        metadata={
            "help": "What is minimised: k2, k3 or k3_ratio of the sampled tokens; rkl, fkl, jsd or "
            "rkl+fkl over the whole vocabulary; topk_rkl, topk_fkl or topk_jsd over the teacher's "
            "kd_topk best tokens. None (none on a command line): beta says it."
        },
    )
    kd_baseline: str | None = _as_in_kdrl("kd_baseline")
    k3_bound: float = _as_in_kdrl("k3_bound")
    jsd_alpha: float = _as_in_kdrl("jsd_alpha")
    fkl_share: float = _as_in_kdrl("fkl_share")
    kd_topk: int = _as_in_kdrl("kd_topk")
    tail: bool = _as_in_kdrl("tail")
    head_backward: str = _as_in_kdrl("head_backward")
    sketch_threshold: float | None = _as_in_kdrl("sketch_threshold")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kd == "none":
            self.kd = None
        if self.kd is not None and self.beta != 1.0:
            raise ValueError(
                f"beta must be left at 1.0 with kd={self.kd!r}, got {self.beta}: both say which "
                "divergence is minimised"
            )
        self._check_readers()
        self.objective()
        if not isinstance(self.kd_topk, int) or not 1 <= self.kd_topk <= 512:
            raise ValueError(f"kd_topk must be in 1 to 512, got {self.kd_topk}")
        if self.head_backward not in HEAD_BACKWARDS:
            raise ValueError(
                f"head_backward must be one of {HEAD_BACKWARDS}, got {self.head_backward!r}"
            )
        kk.Sketch(threshold=self.sketch_threshold)

    def _check_readers(self) -> None:
        """Refuse options that would do nothing."""
        names = ("kd_baseline", *READERS, "fkl_share", "tail")
        for name in names:
            value, default = getattr(self, name), OPTIONS[name].default
            if value == default:
                continue
            if self.kd is None:
                raise ValueError(f"kd must be set with {name}={value!r}, got None: beta is used")
            if self.kd not in READERS.get(name, (self.kd,)):
                readers = " and ".join(map(repr, READERS[name]))
                raise ValueError(
                    f"{name} must be {default} for kd={self.kd!r}, got {value}: only {readers} "
                    "read it"
                )
        threshold = OPTIONS["sketch_threshold"].default
        if self.head_backward == "exact" and self.sketch_threshold != threshold:
            raise ValueError(
                "head_backward must be 'sketch' with sketch_threshold="
                f"{self.sketch_threshold}, got 'exact': it does nothing there"
            )

    def objective(self) -> kk.Objective:
        """Return the settings of kdrl_loss: distillation alone, of weight 1.

        Raises: ValueError or TypeError for a kind or number that is wrong.
        """
        if self.kd is None:
            kd: Any = BETAS.get(self.beta, "jsd")
            alpha = self.beta if kd == "jsd" else 0.5
            return kk.Objective(policy="off", kd=kd, kd_coef=1.0, jsd_alpha=alpha)
        names = ("kd", "kd_baseline", "k3_bound", "jsd_alpha", "fkl_share", "tail")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        return kk.Objective(policy="off", kd_coef=1.0, **options)


class KdrlDistillationTrainer(DistillationTrainer):
    """Minimises any divergence or sampled term of Objective where DistillationTrainer has three.

    Student and teacher run as TRL runs them, then one kdrl_loss computes loss and gradient.
    Generation, masks, normaliser and the logged entropy are TRL's. Beside it are logged means over
    the tokens: kdrl/teacher_log_ratio of l = log p - log q, kdrl/k2 of l²/2, and of the divergence
    kdrl/kl, kdrl/forward_kl, kdrl/jsd or kdrl/topk_divergence.

    Args:
        teacher_model: a causal LM of the student's tokenizer, its folder or its id.
        args: KdrlDistillationConfig; None: its defaults, which are TRL's.
        The others: as in DistillationTrainer.
    Raises: ValueError or TypeError, one line, for arguments that cannot be right together.
    """

    _tag_names: ClassVar = [*DistillationTrainer._tag_names, "kdrl"]

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: KdrlDistillationConfig | None = None,
        *positional: Any,
        **options: Any,
    ) -> None:
        args = arguments_of(args, KdrlDistillationConfig, model, "Distillation")
        if teacher_model is None:
            raise ValueError("teacher_model must be a model, its folder or its id, got None")
        if isinstance(teacher_model, str) and "://" in teacher_model:
            raise ValueError(
                f"teacher_model must be a model, its folder or its id, got {teacher_model!r}: "
                "KdrlTrainer takes the URL of a teacher"
            )
        if isinstance(teacher_model, nn.Module) and isinstance(model, nn.Module):
            check_apart(teacher_model, model)
        super().__init__(model, teacher_model, args, *positional, **options)
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        for role, one in (("model", self.model), ("teacher_model", teacher)):
            _check_states(one, role)
        model_head(bare(self.model), self.temperature).check_zero3(args.head_backward)
        model_head(bare(teacher), self.temperature).check_teacher()
        named = isinstance(teacher_model, str)
        name = teacher_model if named else getattr(teacher_model, "name_or_path", "")
        tokens = tokenizer_of(name, args) if name else None
        if tokens is not None:
            check_tokens(tokens, self._tokenizer)
        check_sampler(args)
        self._objective = args.objective()
        self._head_metrics: dict[str, Tensor] = {}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
        """Compute the loss as TRL does, and log what the head's pass counted."""
        loss = super().compute_loss(model, inputs, *more, **options)
        log = self._metrics["train" if self.model.training else "eval"]
        log_means(log, self._head_metrics, self.accelerator)
        return loss

    def _compute_loss(
        self, student: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, sum of the student's entropies, and number of tokens; TRL calls it."""
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        hidden = self._states(student, inputs)
        self.teacher_model.eval()
        with torch.no_grad():  # through the teacher's own wrapper, which holds its weights
            states = self._forward_redirection(
                self.teacher_model, teacher, self._states, teacher, inputs
            )
        head = model_head(bare(student), self.temperature)
        device = head.weight.device
        hidden, arithmetic = head.arithmetic(hidden.to(device))
        used = _loss_mask(inputs).to(device)
        count = used.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        weights = used.float() / (count.to(device) if isinstance(count, Tensor) else count)
        terms = HeadTerms(
            objective=self._objective,
            token_weights=weights,
            joint=True,
            teacher_states=states.to(device),
            teacher_head=lambda: model_head(bare(teacher), self.temperature),
            topk=self.args.kd_topk,
            sketch=self._sketch(weights),
        )
        tokens = inputs["completion_ids"].to(device)
        with arithmetic, head.gathered():
            places = places_of(used)
            out = one_pass(terms, head, hidden[places], tokens[places], places)
        self._head_metrics = out.metrics
        assert out.entropy is not None
        return out.loss, out.entropy.sum(), used.sum()

    def _states(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Run a model's backbone; its final hidden states where it predicts completions."""
        hidden: Tensor = self._get_last_hidden_state(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            **{name: inputs[name] for name in MULTIMODAL if name in inputs},
        )
        return hidden

    def _sketch(self, weights: Tensor) -> kk.Sketch | None:
        """Return the sketch of a micro-batch, None for the exact gradient.

        No other micro-batch has its seed, and no other process its rows. The seed depends on the
        optimizer step, not on how long this process has run.
        """
        if self.args.head_backward == "exact":
            return None
        micro_batch = self._step % self.args.gradient_accumulation_steps
        return kk.Sketch(
            threshold=self.args.sketch_threshold,
            seed=(self.args.seed << 40) + (self.state.global_step << 16) + micro_batch,
            rows=self.accelerator.process_index << 32,
            scale=weights.max().item(),
        )


def _check_states(model: Any, role: str) -> None:
    """Raise ValueError for a model of whose base_model's states TRL's function makes no logits."""
    inner = bare(model)
    if any(one.is_prompt_learning for one in getattr(model, "peft_config", {}).values()):
        raise ValueError(
            f"{role} must have no virtual tokens of prompt learning, got some: TRL's distillation "
            "runs the model below them; KdrlTrainer runs them too"
        )
    if inner.base_model is inner:
        raise ValueError(
            f"{role} must have a base_model below its LM head, got {type(inner).__name__}, which "
            "is its own: KdrlTrainer takes it"
        )
    require_own_logits(inner, role)


def _loss_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Return which of the completions' tokens are distilled, [B, C]: none that a tool wrote."""
    mask: Tensor = inputs["completion_mask"] != 0
    return mask & (inputs["tool_mask"] != 0) if "tool_mask" in inputs else mask
