"""Computes an operation whose whole float64 gradients are too dear: at a sample, by its formula.

With u = 2 N H V FLOP the whole costs 3u or 4u, 54 to 71 TFLOP at the reference shape. Outputs need
the logits of all rows, u for each head, and stay whole; so does dz = dloss/dlogits. Of the GEMMs
after it only a sample is computed, each number exactly:

    dX[n] = dz[n] · W            for a row n of every 32
    dW[v] = Σ_n dz[n, v] X[n]    for a token v of every 64, and the tokens of the rows above

What is wrong elsewhere shows in the probes. Every row of both gradients is also multiplied by
random vectors g of ±1, which costs 2 N V FLOP each:

    dX · g = dz · (W · g)        dW · g = dzᵀ · (X · g)

A wrong row passes them all only if its error is orthogonal to each g.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench import definition
from bench.inputs import ADAPTER_SCALE, Inputs
from bench.ops import Op

ROWS_EACH, VOCAB_EACH = 32, 64
"""Rows of hidden, and of the head, of which one at a random place is in the sample."""
LEAST_ROWS, LEAST_VOCAB = 16, 64
"""Rows that are in the sample of a small shape at least."""
PROBES = 4
PROBED = " · probes"
"""Ends the name of a gradient whose rows are multiplied by the probes."""
BLOCK = 8192
"""Rows of a gradient that are converted to float64 at a time."""
Numbers = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class GradientSample:
    """The rows of dX and dW that are computed, and the vectors that all rows are multiplied by."""

    rows: Tensor
    """[R] int64, sorted: of hidden."""
    vocab: Tensor
    """[S] int64, sorted: of weight."""
    probes: Tensor
    """[H, PROBES] of ±1, float64."""

    def reduce(self, results: Numbers) -> Numbers:
        """Return the outputs of a call, and of its gradients what `compute` returns."""
        reduced = dict(results)
        for name, kept in (("dhidden", self.rows), ("dweight", self.vocab)):
            if name in results:
                reduced[name] = results[name][kept]
                blocks = results[name].split(BLOCK)
                reduced[name + PROBED] = torch.cat([b.double() @ self.probes for b in blocks])
        return reduced

    def describe(self) -> dict[str, int]:
        """Return the sizes of the sample."""
        return {"rows": len(self.rows), "vocab": len(self.vocab), "probes": PROBES}


def draw(inputs: Inputs, seed: int = 0) -> GradientSample:
    """Draw a sample, the same for a seed: one of each run of neighbours, the first and the last."""
    shape, device = inputs.shape, inputs.hidden.device
    rng = torch.Generator().manual_seed(seed)
    rows = _one_of_each(shape.N, max(LEAST_ROWS, shape.N // ROWS_EACH), rng)
    vocab = _one_of_each(shape.V, max(LEAST_VOCAB, shape.V // VOCAB_EACH), rng)
    vocab = torch.cat([vocab, inputs.tokens[rows.to(device)].cpu()]).unique()
    probes = torch.randint(2, (shape.H, PROBES), generator=rng) * 2.0 - 1
    return GradientSample(rows.to(device), vocab.to(device), probes.double().to(device))


def _one_of_each(total: int, count: int, rng: torch.Generator) -> Tensor:
    """Draw one number of each of `count` runs of equal length below `total`, and both ends."""
    runs = torch.arange(min(count, total)).double()
    places = (runs + torch.rand(len(runs), generator=rng, dtype=torch.double)) * total / len(runs)
    return torch.cat([places.long().clamp(max=total - 1), torch.tensor([0, total - 1])]).unique()


def compute(
    inputs: Inputs,
    op: Op,
    sample: GradientSample,
    dtype: torch.dtype,
    rows: int,
    product: definition.Product = definition.plain_product,
) -> Numbers:
    """Compute outputs, and gradients at the sample, in dtype, some rows of logits at a time.

    An adapter's gradients are whole. product: computes hidden · weightᵀ.
    """
    typed_inputs, N = definition.typed(inputs, op, dtype), inputs.shape.N
    gradients = _SampledGradients(typed_inputs, op, sample, dtype)
    parts: list[Numbers] = []
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        logq = None
        with torch.no_grad():
            logits = definition.student_logits(typed_inputs, op, part, product)
            if op.teacher_head:
                logq = definition.teacher_logprobs(typed_inputs, op, part, product)
        logits.requires_grad_(bool(op.gradients))
        results = definition.row_results(inputs, op, definition.log_softmax(logits), logq, part)
        outputs = results.outputs
        if results.losses is not None:
            (results.losses.sum() / N).backward()
            assert logits.grad is not None
            gradients.add(part, logits.grad)
            outputs["loss"] = results.losses
        parts.append({name: value.detach() for name, value in outputs.items()})
        del logits, logq, results, outputs  # or the next rows come on top of these
    return definition.whole_outputs(parts) | gradients.numbers()


class _SampledGradients:
    """The gradients of all rows so far, from dz = dloss/dlogits of some rows at a time."""

    def __init__(self, inputs: Inputs, op: Op, sample: GradientSample, dtype: torch.dtype) -> None:
        """inputs: in dtype."""
        self.inputs, self.op, self.sample = inputs, op, sample
        self.weight = inputs.shared_weight.detach()
        self.probes = sample.probes.to(dtype)
        self.lifted = self.weight @ self.probes  # [V, PROBES]
        self.vocab = sample.vocab[sample.vocab < len(self.weight)]  # of the others dW is 0
        self.dx: list[tuple[Tensor, Tensor]] = []
        """Rows of the sample, and all rows by the probes, of each part."""
        H, PROBES = self.probes.shape
        self.dw = self.weight.new_zeros(len(sample.vocab), H)
        self.dw_probed = self.weight.new_zeros(inputs.shape.V, PROBES)
        self.da = torch.zeros_like(inputs.adapter_a)
        self.db = torch.zeros_like(inputs.adapter_b)

    @torch.no_grad()
    def add(self, part: slice, dz: Tensor) -> None:
        """Add the gradients of the rows in part. dz: [C, V]."""
        x, V = self.inputs.hidden[part], len(self.weight)
        rows = self.sample.rows
        kept = rows[(rows >= part.start) & (rows < part.stop)] - part.start
        dx, probed = dz[kept] @ self.weight, dz @ self.lifted
        if self.op.adapter:
            a, b = self.inputs.adapter_a, self.inputs.shared_adapter_b
            narrow = ADAPTER_SCALE * (dz @ b)  # [C, RANK]
            dx += narrow[kept] @ a
            probed += narrow @ (a @ self.probes)
            self.da += narrow.T @ x
            self.db[:V] += ADAPTER_SCALE * (dz.T @ (x @ a.T))
        self.dx.append((dx, probed))
        if "weight" in self.op.gradients:
            self.dw[: len(self.vocab)] += dz[:, self.vocab].T @ x
            self.dw_probed[:V] += dz.T @ (x @ self.probes)

    def numbers(self) -> Numbers:
        """Return the operation's gradients by name."""
        numbers: Numbers = {}
        if "hidden" in self.op.gradients:
            dx, probed = zip(*self.dx, strict=True)
            numbers |= {"dhidden": torch.cat(dx), "dhidden" + PROBED: torch.cat(probed)}
        if "weight" in self.op.gradients:
            numbers |= {"dweight": self.dw, "dweight" + PROBED: self.dw_probed}
        if self.op.adapter:
            numbers |= {"dadapter_a": self.da, "dadapter_b": self.db}
        return numbers
