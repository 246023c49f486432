"""Trains with TRL's GRPOTrainer, and adds a teacher to its loss.

B completions of a batch, C their positions, H hidden size.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

import kdrl_kernels as kk
from kdrl_kernels.integrations.own_logits import require_own_logits
from kdrl_kernels.integrations.trl.coefficients import (
    BetaSchedule,
    check_schedule,
    completion_weights,
    token_weights_of_kd,
    total_rewards,
)
from kdrl_kernels.integrations.trl.config import KdrlConfig, arguments_of, check_sampler
from kdrl_kernels.integrations.trl.fused import FusedHead
from kdrl_kernels.integrations.trl.head import ModelHead, bare, head_adapters, model_head
from kdrl_kernels.integrations.trl.head_loss import HeadTerms
from kdrl_kernels.integrations.trl.means import log_means
from kdrl_kernels.integrations.trl.teachers import (
    Pupil,
    TeacherServer,
    check_teacher_model,
    columns_of,
    is_url,
    local_teacher,
    wrapped,
)

ONE_PASS = ("grpo", "bnpo", "dr_grpo", "dapo")
"""Loss types whose token losses kdrl_loss computes, with their gradient, in one pass."""
PAPER = {
    "title": "KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and "
    "Reinforcement Learning",
    "id": "2506.02208",
}


class OutputRecorder:
    """Calls a model and keeps its last output, which TRL's own functions do not hand on.

    The output is that of the wrapper (DDP, FSDP, ZeRO-3), whose hooks belong to its tensors, with
    the values that its head computed.
    """

    def __init__(self, model: Any, head: FusedHead) -> None:
        self.model = model
        self.head = head
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.head.unrounded(self.model(*args, **kwargs))
        return self.output


class KdrlTrainer(GRPOTrainer):
    """Adds to GRPOTrainer's loss the pull of a teacher, kd_coef · KD, and computes both leanly.

    Where TRL's policy gradient is one of each token (ONE_PASS, importance ratios of tokens, no
    reference model), policy gradient and KD term are one pass over the LM head: no logits [N, V]
    are held, and the head is multiplied three times, four with an exact KD term. Otherwise TRL
    computes its loss from log-probabilities that linear_logprobs gives, and the KD term is added.
    Rewards, advantages, masks, normalisers and TRL's metrics are TRL's own. Beside them it logs
    kdrl/kd_coef, kdrl/completions, the share of completions that are distilled, means over the
    distilled tokens of l = log p - log q (kdrl/teacher_log_ratio), of l²/2 (kdrl/k2) and of the
    divergence (kdrl/kl and others), and in one pass kdrl/kd_flipped, the share of tokens whose
    advantage changes its sign under the teacher's pull.

    Args:
        teacher_model: the teacher: a causal LM of transformers with the policy's tokenizer, its
            folder or id, or the URL of `python -m kdrl_train serve`. It is frozen.
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
        args = arguments_of(args, KdrlConfig, model, "KDRL")
        check_teacher_model(teacher_model, args, model)
        check_sampler(args)
        with head_adapters():
            super().__init__(model, reward_funcs, args, *positional, **options)
        self._check_head()
        check_schedule(args, self.eval_dataset)
        self._method = args.method()
        self._beta = BetaSchedule(self._method.kd_coef)
        self.add_callback(self._beta)
        self._student_head = self._fused_head()
        self._student_head.attach(bare(self.model))
        self._wider = False
        self._reference_head = self._fused_head()
        if self.ref_model is not None:  # its log-probabilities are compared with the student's
            reference = self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False)
            self._reference_head.attach(bare(reference))
        self.teacher_model: Any = None
        self.teacher_server: TeacherServer | None = None
        if teacher_model is not None:
            self._take_teacher(teacher_model)

    def _check_head(self) -> None:
        """Raise ValueError for a policy whose LM head cannot be computed here as TRL samples."""
        require_own_logits(bare(self.model), "model")
        head = model_head(bare(self.model), self.temperature)
        if head.adapter is not None and self.args.cast_lm_head_to_fp32:
            raise ValueError(
                "cast_lm_head_to_fp32 must be False with an adapter on lm_head, got True: TRL "
                "would sample from the head without it"
            )
        head.check_zero3(self.args.head_backward)

    def _fused_head(self, *, states: bool = False) -> FusedHead:
        return FusedHead(self.temperature, float32=self.args.cast_lm_head_to_fp32, states=states)

    def _take_teacher(self, teacher: Any) -> None:
        """Load a teacher, or connect to its server; compare it with the student."""
        pupil = Pupil(bare(self.model), self._tokenizer, self.eos_token_ids)
        if is_url(teacher):
            if self._is_vlm:
                raise ValueError(
                    "teacher_model must be in this process for a model that sees images, got "
                    f"{teacher}: a server is sent tokens alone"
                )
            self.teacher_server = TeacherServer(teacher, self.args, pupil)
            return
        model = local_teacher(teacher, self.args, pupil)
        self._teacher = bare(model)
        self._wider = pupil.columns > columns_of(self._teacher)
        self._fused_head(states=True).attach(self._teacher)
        self.teacher_model = wrapped(model, self)

    @property
    def one_pass(self) -> bool:
        """Whether the policy gradient is of the kind that kdrl_loss computes.

        It is not of a student with columns that the teacher lacks: one pass would leave these out.
        """
        low, high, bound = self.epsilon_low, self.epsilon_high, self.args.delta
        return (
            self.loss_type in ONE_PASS
            and not self._wider
            and self.importance_sampling_level == "token"
            and self.beta == 0.0
            and self.off_policy_mask_threshold is None
            and self.top_entropy_quantile >= 1.0
            and not self._entropy_bonus_enabled
            and 0 <= low < 1
            and 0 <= high < math.inf
            and (bound is None or 1 + high < bound < math.inf)
        )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """Keep the rewards [R, functions] of all processes."""
        self._rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Add what the KD term needs: kd_weight [B], and teacher_logprobs [B, C] of a server."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.args.kd is None:
            return output
        B, process = len(output["completion_ids"]), self.accelerator.process_index
        train = self.model.training
        weights_R = completion_weights(
            total_rewards(self._rewards, self.reward_weights),
            self.num_generations if train else self.num_generations_eval,
            self._method,
            self.args.right_above,
        )
        share = (weights_R > 0).float().mean().item()
        self._metrics["train" if train else "eval"]["kdrl/completions"].append(share)
        output["kd_weight"] = weights_R[process * B : (process + 1) * B]
        if self.teacher_server is not None and self._may_distil:
            output["teacher_logprobs"] = self.teacher_server.logprobs(output)
        return output

    @property
    def _may_distil(self) -> bool:
        """Whether beta is above 0 at a step that learns from what is generated now."""
        steps = self.args.steps_per_generation * self.num_iterations
        alone = not self.model.training or self.args.gradient_accumulation_steps % steps == 0
        return not alone or self._beta.beta(self.state.global_step) > 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder = Path(self._get_output_dir(trial=trial), name)
            self._beta.save(folder)
            if self.teacher_server is not None:
                self.teacher_server.save(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._beta.load(Path(checkpoint), self.state.global_step)
            if self.teacher_server is not None:
                self.teacher_server.check_same(Path(checkpoint))

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute what TRL does, also without a gradient by the student's values as they were."""
        if model is self.model or model is self.model_wrapped:
            model = OutputRecorder(model, self._student_head)
        elif model is self.ref_model:
            model = OutputRecorder(model, self._reference_head)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        recorder = OutputRecorder(model, self._student_head)
        terms = self._head_terms(inputs)
        with self._student_head.computing(terms):
            loss = super()._compute_loss(recorder, inputs)
        output = recorder.output
        if self.args.kd is not None:
            mode = "train" if self.model.training else "eval"
            beta = self._beta.beta(self.state.global_step)
            self._metrics[mode]["kdrl/kd_coef"].append(beta)
        if terms.objective.kd is not None or (terms.joint and terms.sketch is not None):
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
        beta = self._beta.beta(self.state.global_step)
        kd_weight = token_weights_of_kd(inputs, beta, self._masked_ends)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            ratio = inputs["importance_sampling_ratio"]
            kd_weight = kd_weight * ratio
            advantages = advantages * ratio
        terms = HeadTerms(
            objective=self._objective(distil=self.args.kd is not None and beta > 0),
            token_weights=weights,
            joint=self.one_pass,
            advantages=advantages.to(weights.dtype).expand_as(weights) if self.one_pass else None,
            old_logprobs=inputs.get("old_per_token_logps"),
            kd_weight=kd_weight,
            topk=self.args.kd_topk,
        )
        if terms.objective.kd is not None and self.teacher_server is not None:
            terms = replace(terms, teacher_logprobs=inputs["teacher_logprobs"])
        elif terms.objective.kd is not None:
            terms = replace(
                terms,
                teacher_states=self._teacher_states(inputs, kd_weight),
                teacher_head=self._teacher_head,
            )
        if self.args.head_backward == "sketch":
            terms = replace(terms, sketch=self._sketch(terms))
        return terms

    @property
    def _masked_ends(self) -> Tensor | None:
        """The end-of-sequence tokens, where these are not distilled."""
        return torch.tensor(self.eos_token_ids) if self.args.kd_eos == "mask" else None

    def _objective(self, *, distil: bool) -> kk.Objective:
        """Return the settings of the loss: with the policy gradient, or the KD term alone."""
        if self.one_pass:
            objective = self.args.objective("clip", distil=distil)
            return replace(objective, dual_clip=self.args.delta)
        return self.args.objective("off") if distil else kk.Objective(kd=None)

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
    def _teacher_states(self, inputs: Mapping[str, Any], kd_weight: Tensor) -> Tensor:
        """Return the teacher's final hidden states where it predicts completions, [B, C, H].

        Where a mask leaves out completions, the teacher reads the others alone; their states are 0.
        """
        more = {name: inputs[name] for name in MULTIMODAL if inputs.get(name) is not None}
        ids, mask = (
            torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], dim=1)
            for part in ("ids", "mask")
        )
        C, chooses = inputs["completion_ids"].shape[1], self.args.judges and not more
        if chooses:
            read = (kd_weight > 0).any(dim=1)
            read[0] |= ~read.any()  # a sharded teacher needs all processes
            rows = read.nonzero().squeeze(1)
            ids, mask = ids[rows], mask[rows]
        states: Tensor = self._get_per_token_logps_and_entropies(
            self.teacher_model, ids, mask, C, **more
        )[0]
        if not chooses:
            return states
        whole = states.new_zeros(len(kd_weight), *states.shape[1:])
        return whole.index_copy_(0, rows.to(states.device), states)

    def _teacher_head(self) -> ModelHead:
        return model_head(self._teacher, self.temperature, float32=self.args.cast_lm_head_to_fp32)

    def _sketch(self, terms: HeadTerms) -> kk.Sketch:
        """Return the sketch of a micro-batch: no other one has its seed and rows.

        The seed depends on the optimizer step, not on how long this process has run.
        """
        assert terms.kd_weight is not None
        size = terms.kd_weight * (terms.objective.kd is not None)
        if terms.advantages is not None:
            size = torch.hypot(terms.advantages, size)
        sizes = (terms.token_weights * size).double()
        sizes = sizes[sizes != 0]
        micro_batch = self._step % self._micro_batches
        return kk.Sketch(
            threshold=self.args.sketch_threshold,
            seed=(self.args.seed << 40) + (self.state.global_step << 16) + micro_batch,
            rows=self.accelerator.process_index << 32,
            scale=sizes.square().mean().sqrt().item() if len(sizes) else 1.0,
        )

    def _log_head(self, metrics: Mapping[str, Tensor]) -> None:
        """Log means over the tokens of all processes."""
        log = self._metrics["train" if self.model.training else "eval"]
        totals = log_means(log, metrics, self.accelerator)
        if self.model.training:
            self._beta.measured(totals)


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
