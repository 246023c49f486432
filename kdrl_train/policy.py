"""Policy and teacher: a causal LM's backbone, and its LM head inside the loss.

The policy's forward takes a packed row to the loss, so that the head weight is read where FSDP2
has just gathered it, and no [T, V] logits exist. T fed tokens, N loss tokens, H hidden size,
V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import kdrl_kernels as kk
from kdrl_train import attention, grpo
from kdrl_train.config import MethodConfig
from kdrl_train.packing import PackedBatch

T = TypeVar("T")
PROBE_LENGTHS = (7, 5)
"""Tokens of the two sequences of the start-up probe."""
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float64: 1e-6}
"""Largest RMS difference of the probe, as a share of the RMS of what is compared: well above the
rounding of a deep model in that dtype, well below what another formula or a leak would give."""


class HeadedModel(nn.Module):
    """A transformers causal LM split at its LM head: z = softcap(scale · (x Wᵀ + b)) / temperature.

    Dropout is switched off: the loss is taken at the distribution that is sampled from. Output
    embeddings may be tied. softcap is the config's final_logit_softcapping; scale is one of
    logit_scale (Cohere), 1 / logits_scaling (Granite), lm_head_multiplier (Falcon-H1), else 1.

    Args:
        model: the causal LM, with get_output_embeddings() and a base_model.
        temperature: sampling temperature.
        compute_dtype: of the forward pass; float32 weights run under autocast if it is bfloat16.
    Raises: ValueError for a model without an LM head, or with both a softcap and a scale.
    """

    def __init__(
        self,
        model: Any,
        *,
        temperature: float = 1.0,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        name = type(model).__name__
        if model.get_output_embeddings() is None or model.base_model is model:
            raise ValueError(f"the model must be a causal LM with an LM head, got {name}")
        self.model = model
        self.compute_dtype = compute_dtype
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        scale = _logit_scale(config)
        if self.softcap is not None and scale != 1.0:
            raise ValueError(
                f"the model must scale or cap its logits, not both, got {name} with scale {scale} "
                f"and softcap {self.softcap}: this order of the two is not supported"
            )
        self.temperature = temperature / scale
        self.device: torch.device = model.device
        """Where it computes; before it is sharded, and where FSDP2 offloads it, its weights are
        elsewhere."""
        _disable_dropout(model)

    @property
    def vocab_size(self) -> int:
        """V: rows of the head, padding included."""
        return self.model.get_output_embeddings().weight.shape[0]

    def autocast(self) -> AbstractContextManager:
        """Context of every forward of float32 weights: bfloat16 compute where asked for."""
        return torch.autocast(
            self.device.type,
            dtype=torch.bfloat16,
            enabled=self.compute_dtype == torch.bfloat16,
        )

    def answer(self, question: Callable[[Any], T]) -> T:
        """question(self); where it is sharded use sharding.ask."""
        return question(self)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """LM head in the compute dtype: weight [V, H], and bias [V] or None."""
        module = self.model.get_output_embeddings()
        bias = getattr(module, "bias", None)
        dtype = self.compute_dtype
        return module.weight.to(dtype), None if bias is None else bias.to(dtype)

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        rows: Tensor | None,
        lengths: Sequence[int],
    ) -> Tensor:
        """input_ids, position_ids [1, T] -> hidden states [N, H] of `rows` [N] (None: all T).

        lengths: tokens of each sequence in the row; they sum to T.
        """
        text = self.model.config.get_text_config()
        more = {}
        if text._attn_implementation == attention.NAME:
            more = attention.packed_arguments(lengths, input_ids.device)
        with self.autocast():
            out = self.model.base_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, **more
            )
        states = out.last_hidden_state[0]
        if rows is not None:
            states = states.index_select(0, rows)
        return states.to(self.compute_dtype)


class Teacher(HeadedModel):
    """A frozen model in evaluation mode: packed row -> kk.TeacherHead of its loss tokens."""

    def __init__(
        self,
        model: Any,
        *,
        temperature: float = 1.0,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, temperature=temperature, compute_dtype=compute_dtype)
        self.requires_grad_(requires_grad=False)
        self.eval()

    @torch.no_grad()
    def forward(self, batch: PackedBatch) -> kk.TeacherHead:
        """hidden [N, H_t] and the head [V_t, H_t], at the policy's temperature; no gradient."""
        weight, bias = self.head()
        hidden = self.hidden(batch.input_ids, batch.position_ids, batch.rows, batch.lengths)
        return kk.TeacherHead(
            hidden, weight, bias=bias, temperature=self.temperature, softcap=self.softcap
        )


class PolicyOutput(NamedTuple):
    """A tuple, so that PyTorch's tree functions find the loss: FSDP2 hooks its backward pass."""

    loss: Tensor
    """0-d, differentiable."""
    logprobs: Tensor
    """[N] nats, detached."""
    sums: dict[str, Tensor]
    """0-d sums over the tokens, see grpo.token_sums."""
    teacher_logprobs: Tensor | None = None
    """[N] nats, detached; None without a teacher."""


class Policy(HeadedModel):
    """The model that is trained, with the loss in its forward.

    Args:
        model, temperature, compute_dtype: as HeadedModel.
        method: the objective.
        vocab_size: columns of the head from here on are not part of the vocabulary; None: all are.
        workspace_bytes, head_impl: of kk.kdrl_loss.
    """

    def __init__(
        self,
        model: Any,
        method: MethodConfig,
        *,
        vocab_size: int | None = None,
        workspace_bytes: int | None = None,
        head_impl: str | None = None,
        temperature: float = 1.0,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, temperature=temperature, compute_dtype=compute_dtype)
        self.objective = objective(method, distil=method.kd is not None)
        self.objective_alone = objective(method, distil=False)
        self.limit = vocab_size
        self.workspace_bytes = workspace_bytes
        self.head_impl = head_impl

    def forward(
        self,
        batch: PackedBatch,
        normalizer: Tensor,
        teacher: kk.TeacherHead | None,
        goal: kk.Objective | None = None,
    ) -> PolicyOutput:
        """Loss of one packed row: sum of its token losses / normalizer.

        Strictly on-policy, without batch.old_logprobs: the old log-probabilities are the detached
        new ones, so the ratio is 1.

        Args:
            batch: on the model's device.
            normalizer: 0-d, of the whole step: the loss of a step is the sum over its rows.
            teacher: its hidden states of the same tokens; None where no token is distilled, or
                where batch.teacher_logprobs came from a server.
            goal: another objective than the method's, for diagnostics.
        """
        weight, bias = self.head()
        hidden = self.hidden(batch.input_ids, batch.position_ids, batch.rows, batch.lengths)
        distil = teacher is not None or batch.teacher_logprobs is not None
        if goal is None:
            goal = self.objective if distil else self.objective_alone
        out = kk.kdrl_loss(
            hidden,
            weight,
            batch.tokens,
            advantages=None if goal.policy == "off" else batch.advantages,
            token_weights=batch.token_weights,
            old_logprobs=batch.old_logprobs,
            teacher=teacher,
            teacher_logprobs=batch.teacher_logprobs,
            kd_weight=batch.kd_weight if distil else None,
            normalizer=normalizer,
            objective=goal,
            bias=bias,
            temperature=self.temperature,
            softcap=self.softcap,
            vocab_size=self.limit,
            entropy=True,
            workspace_bytes=self.workspace_bytes,
            impl=self.head_impl,
        )
        sums = grpo.token_sums(
            logprobs=out.logprobs,
            sampled_logprobs=batch.sampled_logprobs,
            entropy=out.entropy,
            teacher_logprobs=out.teacher_logprobs,
            kl=out.kl if goal.exact_kd == "rkl" else None,
            clip_fraction=kk.mean_metrics(out.metrics).get("clip_fraction"),
            token_weights=batch.token_weights,
            kd_weight=batch.kd_weight,
            advantages=batch.advantages,
            kd=None if goal.policy == "off" else goal.kd,
            kd_baseline=goal.kd_baseline,
        )
        return PolicyOutput(out.loss, out.logprobs, sums, out.teacher_logprobs)


def objective(method: MethodConfig, *, distil: bool) -> kk.Objective:
    """kk.Objective of a method; kd_coef is 1 since beta is in each token's kd weight.

    Without distillation, for rows whose kd weights are all 0, a method with policy "off" becomes a
    policy gradient of its advantages, which are 0: no loss, but entropy and log-probabilities.
    kd "reward" has no term in the loss; its teacher is only read without a gradient, as of k2.
    """
    alone = method.policy == "off" and not distil
    kd = "k2" if method.kd == "reward" else method.kd
    return kk.Objective(
        policy="none" if alone else method.policy,
        clip_low=method.clip_low,
        clip_high=method.clip_high,
        kd=kd if distil else None,
        kd_baseline=method.kd_baseline if distil else None,
        kd_coef=1.0,
        jsd_alpha=method.jsd_alpha,
        entropy_coef=method.entropy_coef,
    )


def _logit_scale(config: Any) -> float:
    """Factor between hidden · weightᵀ and the logits, by the names transformers gives it."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    return scale / (getattr(config, "logits_scaling", None) or 1.0)


def _disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, the attention's own attribute included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


@torch.no_grad()
def probe(wrapped: HeadedModel, name: str, *, packed: bool = True) -> float:
    """Compare the head path with the model's own logits, and a packed row with single sequences.

    Args:
        wrapped: policy or teacher.
        name: "model.policy" or "model.teacher", for the message.
        packed: whether rows will hold more than one sequence.
    Returns: RMS difference of the logits as a share of their RMS.
    Raises: ValueError when either comparison fails: the loss would be that of another model.
    """
    model, dtype = wrapped.model, wrapped.compute_dtype
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(wrapped.vocab_size, (1, n), generator=draw) for n in PROBE_LENGTHS]
    ids = [sequence.to(wrapped.device) for sequence in ids]
    positions = [torch.arange(n, device=wrapped.device)[None] for n in PROBE_LENGTHS]
    weight, bias = wrapped.head()
    single = [wrapped.hidden(i, p, None, [i.shape[1]]) for i, p in zip(ids, positions, strict=True)]
    head = [torch.nn.functional.linear(x, weight, bias).float() for x in single]
    ours = torch.cat(head) / wrapped.temperature
    if wrapped.softcap is not None:  # the scale is 1 here: temperature is that of sampling
        ours = torch.tanh(torch.cat(head) / wrapped.softcap) * wrapped.softcap / wrapped.temperature
    with wrapped.autocast():
        theirs = torch.cat([model(input_ids=i, use_cache=False).logits[0].float() for i in ids])
    theirs = theirs / (wrapped.temperature * _logit_scale(model.config.get_text_config()))
    gap = _relative_rms(ours, theirs)
    limit = PROBE_TOLERANCE[dtype]
    if not gap <= limit:
        raise ValueError(
            f"{name} must have logits = softcap(scale · hidden · weightᵀ + bias), got "
            f"{type(model).__name__}, whose own logits differ from that by {gap:.1e} of their RMS "
            f"(limit {limit:.0e}): its architecture does something else before or after its LM "
            "head and cannot be trained here"
        )
    if not packed:
        return gap
    together = wrapped.hidden(
        torch.cat(ids, dim=1), torch.cat(positions, dim=1), None, PROBE_LENGTHS
    )
    leak = _relative_rms(together.float(), torch.cat(single).float())
    if not leak <= limit:
        raise ValueError(
            f"{name} must keep packed sequences apart by their position ids, got "
            f"{type(model).__name__}, whose hidden states change by {leak:.1e} of their RMS when "
            "two sequences share a row: set optim.micro_batch_tokens to 1 (one sequence per row)"
        )
    return gap


def _relative_rms(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()
