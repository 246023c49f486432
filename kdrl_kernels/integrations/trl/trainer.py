"""Trains with TRL's GRPOTrainer, and adds a teacher to its loss.

B completions of a batch, C their positions, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id

import kdrl_kernels as kk
from kdrl_kernels.integrations.trl.config import KdrlConfig
from kdrl_kernels.integrations.trl.fused import FusedHead
from kdrl_kernels.integrations.trl.head import ModelHead, bare, model_head
from kdrl_kernels.integrations.trl.head_loss import HeadTerms
from kdrl_kernels.integrations.trl.means import log_means

ONE_PASS = ("grpo", "bnpo", "dr_grpo", "dapo")
"""Loss types whose token losses kdrl_loss computes, with their gradient, in one pass."""
PAPER = {
    "title": "KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and "
    "Reinforcement Learning",
    "id": "2506.02208",
}


class OutputRecorder:
    """Calls a model and keeps its last output, which TRL's own functions do not hand on.

    The output is that of the wrapper (DDP, FSDP, ZeRO-3), whose hooks belong to its tensors.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.model(*args, **kwargs)
        return self.output


class KdrlTrainer(GRPOTrainer):
    """Adds to GRPOTrainer's loss the pull of a teacher, kd_coef · KD, and computes both leanly.

    Where TRL's policy gradient is one of each token (ONE_PASS, importance ratios of tokens, no
    reference model), policy gradient and KD term are one pass over the LM head: no logits [N, V]
    are held, and the head is multiplied three times, four with an exact KD term. Otherwise TRL
    computes its loss from log-probabilities that linear_logprobs gives, and the KD term is added.
    Rewards, advantages, masks, normalisers and TRL's metrics are TRL's own. Beside them it logs
    kdrl/kd_coef, means over the distilled tokens of l = log p - log q (kdrl/teacher_log_ratio), of
    l²/2 (kdrl/k2) and of the divergence (kdrl/kl and others), and kdrl/kd_flipped, the share of
    tokens whose advantage changes its sign under the teacher's pull.

    Args:
        teacher_model: the teacher, a causal LM of the policy's tokenizer.
        args: KdrlConfig; None: its defaults.
        The others: as in GRPOTrainer.
    Raises: ValueError, one line, for options that cannot be right together.
    """

    _tag_names: ClassVar = ["trl", "kdrl"]
    _name = "KDRL"
    _paper: ClassVar = PAPER

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: KdrlConfig | None = None,
        *positional: Any,
        teacher_model: Any = None,
        **options: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = KdrlConfig(f"{name.split('/')[-1]}-KDRL")
        if not isinstance(args, KdrlConfig):
            raise TypeError(f"args must be a KdrlConfig, got {type(args).__name__}")
        if (teacher_model is None) != (args.kd is None):
            raise ValueError(
                f"teacher_model must be set with kd={args.kd!r}, got None: or set kd=None"
                if teacher_model is None
                else "teacher_model must be None with kd=None, got one: it would do nothing"
            )
        super().__init__(model, reward_funcs, args, *positional, **options)
        self._student_head = self._fused_head()
        self._student_head.attach(bare(self.model))
        self.teacher_model = None if teacher_model is None else self._prepared(teacher_model)

    def _fused_head(self, *, states: bool = False) -> FusedHead:
        return FusedHead(self.temperature, float32=self.args.cast_lm_head_to_fp32, states=states)

    def _prepared(self, teacher: Any) -> Any:
        """Freeze a teacher, and wrap it as TRL does a reference model."""
        teacher.requires_grad_(requires_grad=False)
        disable_dropout_in_model(teacher)
        self._teacher = bare(teacher)
        self._fused_head(states=True).attach(self._teacher)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    @property
    def one_pass(self) -> bool:
        """Whether the policy gradient is of the kind that kdrl_loss computes."""
        low, high, bound = self.epsilon_low, self.epsilon_high, self.args.delta
        return (
            self.loss_type in ONE_PASS
            and self.importance_sampling_level == "token"
            and self.beta == 0.0
            and self.off_policy_mask_threshold is None
            and self.top_entropy_quantile >= 1.0
            and not self._entropy_bonus_enabled
            and 0 <= low < 1
            and (bound is None or bound > 1 + high)
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        recorder = OutputRecorder(model)
        terms = self._head_terms(inputs)
        with self._student_head.computing(terms):
            loss = super()._compute_loss(recorder, inputs)
        output = recorder.output
        if terms.objective.kd is not None or terms.sketch is not None:
            self._log_head(self._student_head.metrics)
        if not terms.joint:
            return loss if output.loss is None else loss + output.loss
        if self.aux_loss_enabled:
            return output.loss + self.router_aux_loss_coef * output.aux_loss / self._micro_batches
        return output.loss

    @property
    def _micro_batches(self) -> int:
        """Micro-batches whose losses add up to that of a step; in evaluation one."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _head_terms(self, inputs: dict[str, Any]) -> HeadTerms:
        """Collect what the forward of a micro-batch needs for its loss; runs the teacher."""
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        weights = self._token_weights(inputs, mask)
        advantages = inputs["advantages"]
        if advantages.ndim == 1:
            advantages = advantages[:, None]
        kd_weight = torch.full_like(weights, self._kd_coef())
        if self.use_vllm and self.vllm_importance_sampling_correction:
            ratio = inputs["importance_sampling_ratio"]
            kd_weight = kd_weight * ratio
            advantages = advantages * ratio
        terms = HeadTerms(
            objective=self._objective(),
            token_weights=weights,
            joint=self.one_pass,
            advantages=advantages.to(weights.dtype).expand_as(weights) if self.one_pass else None,
            old_logprobs=inputs.get("old_per_token_logps"),
            kd_weight=kd_weight,
            topk=self.args.kd_topk,
        )
        if self.teacher_model is not None:
            terms = replace(
                terms,
                teacher_states=self._teacher_states(inputs),
                teacher_head=self._teacher_head,
            )
        if self.args.head_backward == "sketch":
            terms = replace(terms, sketch=self._sketch(terms))
        return terms

    def _kd_coef(self) -> float:
        """Return beta of the optimizer step."""
        return self.args.kd_coef

    def _objective(self) -> kk.Objective:
        """Return the settings of the loss: with the policy gradient, or the KD term alone."""
        if not self.one_pass:
            if self.args.kd is None:
                return kk.Objective(kd=None)
            return self.args.objective("off")
        objective = self.args.objective("clip")
        return replace(objective, dual_clip=self.args.delta)

    def _token_weights(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
        """Return [B, C] weights whose sum with the token losses is TRL's loss of the type."""
        weights = mask.float()
        if self.loss_type in ("cispo", "dapo", "vespo"):
            # TRL counts the tokens of all that was generated; a step has its share of them
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if self.model.training:
                tokens = tokens * self._micro_batches / self.args.steps_per_generation
            return weights / tokens
        if self.loss_type in ("grpo", "sapo"):
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1) / len(weights)
        elif self.loss_type == "bnpo":
            weights = weights / weights.sum().clamp(min=1)
        elif self.loss_type == "dr_grpo":
            weights = weights / (len(weights) * self.max_completion_length)
        else:
            weights = weights / len(weights)
        return weights / self._micro_batches

    @torch.no_grad()
    def _teacher_states(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the teacher's final hidden states where it predicts completions, [B, C, H]."""
        states, _, _ = self._get_per_token_logps_and_entropies(
            self.teacher_model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            **{name: inputs.get(name) for name in MULTIMODAL},
        )
        return states

    def _teacher_head(self) -> ModelHead:
        return model_head(self._teacher, self.temperature, float32=self.args.cast_lm_head_to_fp32)

    def _sketch(self, terms: HeadTerms) -> kk.Sketch:
        """Return the sketch of a micro-batch: no other one has its seed and rows."""
        assert terms.kd_weight is not None
        size = terms.kd_weight * (terms.objective.kd is not None)
        if terms.advantages is not None:
            size = torch.hypot(terms.advantages, size)
        sizes = (terms.token_weights * size).double()
        sizes = sizes[sizes != 0]
        return kk.Sketch(
            threshold=self.args.sketch_threshold,
            seed=(self.args.seed << 40) + self._step,
            rows=self.accelerator.process_index << 32,
            scale=sizes.square().mean().sqrt().item() if len(sizes) else 1.0,
        )

    def _log_head(self, metrics: Mapping[str, Tensor]) -> None:
        """Log means over the tokens of all processes."""
        log = self._metrics["train" if self.model.training else "eval"]
        log_means(log, metrics, self.accelerator)
        if self.args.kd is not None:
            log["kdrl/kd_coef"].append(self._kd_coef())


MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""Inputs of a vision-language model, as TRL names them."""
