"""Times row kernels against a copy that moves as many bytes, over the logits of a chunk [C, V].

Bytes are the least that the interface of kdrl_kernels/rows asks for, [C] vectors left out:

    sweep                   reads each logit once: 4 C V
    sweep, two streams      4 C V of each: 8 C V
    jsd                     two sweeps over both streams, since the second needs both sums: 16 C V
    gradient                reads the logits, writes dz over them: (4 + b) C V, b bytes an element
    gradient, two streams   reads the teacher's too: (8 + b) C V

What an implementation moves beyond that is its own business and shows as a lower share of the copy:
the PyTorch rows write exp(d) over the logits, once more what they read. The second sweep of "jsd"
and PyTorch's steps after the first find their block of rows in the cache of a CPU.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

import kdrl_kernels as kk
from bench.inputs import Inputs
from bench.measures.timing import device_ms, sample_rounds
from bench.results_file import OURS, Record, record
from kdrl_kernels import gemm
from kdrl_kernels.buffers import gradient_view
from kdrl_kernels.chunks import padded
from kdrl_kernels.rows import load
from kdrl_kernels.rows.streams import Stats, Stream, TeacherStream
from kdrl_kernels.token_rows import Coefficients

LOGIT = torch.float32
"""Dtype of the logits, whatever the operands of the GEMM."""


class ChunkInputs:
    """The logits of the first C rows of student and teacher, and a working buffer."""

    def __init__(self, inputs: Inputs, C: int) -> None:
        self.C, self.V = C, min(inputs.shape.V, inputs.shape.V_t)
        hidden = inputs.hidden.detach()
        self.dtype, self.tokens = hidden.dtype, inputs.tokens[:C]
        self.logits_of_gemm = hidden.new_zeros(2, C, padded(self.V), dtype=LOGIT)
        heads = (
            (hidden, inputs.weight.detach()),
            (inputs.teacher_hidden, inputs.teacher_weight),
        )
        for logits, (x, weight) in zip(self.logits_of_gemm, heads, strict=True):
            gemm.project(x[:C], weight[: self.V], logits[:, : self.V])
        self.work = torch.empty_like(self.logits_of_gemm)
        scale = inputs.advantages[:C] / C
        self.coef = Coefficients(scale, kl=torch.full_like(scale, 1 / C))

    def streams(self, kd: str | None) -> tuple[Stream, TeacherStream | None]:
        """Return the streams over the working buffer; with kd None that of the student alone."""
        student, teacher = (part[:, : self.V] for part in self.work)
        return Stream(student, 1.0, None), TeacherStream(teacher, 1.0, None, kd) if kd else None

    def refill(self, streams: int) -> None:
        """Restore the logits of the first streams of the buffer as the GEMM left them."""
        self.work[:streams].copy_(self.logits_of_gemm[:streams])

    def copy(self, moved: int) -> None:
        """Copy moved / 2 bytes: read them and write as many."""
        elements = moved // (2 * LOGIT.itemsize)
        self.work.view(-1)[:elements].copy_(self.logits_of_gemm.view(-1)[:elements])


@dataclass(frozen=True, slots=True)
class Kernel:
    """A row kernel: a function of a row module, on one stream or on two."""

    name: str
    kd: str | None
    """Divergence to the teacher, whose logits are a second stream; None: there is one stream."""
    reads: int
    """Logits that are read for each element of [C, V]."""
    is_gradient: bool = False

    def moved(self, chunk: ChunkInputs) -> int:
        """Count the bytes that are read and written at least."""
        written = chunk.dtype.itemsize if self.is_gradient else 0
        return (self.reads * LOGIT.itemsize + written) * chunk.C * chunk.V

    def run(self, work: ModuleType, chunk: ChunkInputs) -> tuple[float, float]:
        """Measure (ms of the kernel, ms of the copy), each over refilled logits."""
        student, teacher = chunk.streams(self.kd)
        streams = 2 if self.kd else 1
        stats: list[Stats] = []

        def sweep() -> None:
            entropy = not self.kd and not self.is_gradient
            stats.append(work.sweep(student, chunk.tokens, teacher=teacher, entropy=entropy))

        def refill_and_sweep() -> None:
            chunk.refill(streams)
            sweep()

        def gradient() -> None:
            coef = chunk.coef if self.kd else Coefficients(chunk.coef.logprobs)
            out = gradient_view(student.logits, chunk.dtype)
            work.gradient(student, chunk.tokens, stats[-1], coef, out=out, teacher=teacher)

        def refill() -> None:
            chunk.refill(streams)

        copied = device_ms(refill, lambda: chunk.copy(self.moved(chunk)))
        if self.is_gradient:
            return device_ms(refill_and_sweep, gradient), copied
        return device_ms(refill, sweep), copied


KERNELS = (
    Kernel("sweep", None, 1),
    Kernel("sweep, two streams", "rkl", 2),
    Kernel("jsd", "jsd", 4),
    Kernel("gradient", None, 1, is_gradient=True),
    Kernel("gradient, two streams", "rkl", 2, is_gradient=True),
)


def chunk_rows(inputs: Inputs) -> int:
    """Return C, which the library would choose for exact KD on these inputs."""
    shape, device = inputs.shape, inputs.hidden.device
    chunk_plan = kk.chunk_plan(
        shape.N,
        shape.H,
        shape.V,
        teacher=(shape.H_t, shape.V_t),
        kd="rkl",
        dtype=shape.dtype,
        device=device,
        impl=_impl(device),
    )
    return chunk_plan.rows


def records(inputs: Inputs, rounds: int, deadline: float) -> Iterator[Record]:
    """Yield a record for each kernel of this device's row module; deadline of time.monotonic."""
    work = load(_impl(inputs.hidden.device))
    chunk = ChunkInputs(inputs, chunk_rows(inputs))
    measures = {kernel: _measure(kernel, work, chunk) for kernel in KERNELS}
    for kernel, samples in sample_rounds(measures, rounds, deadline).items():
        one = record(
            "rows",
            kernel.name,
            inputs.shape,
            inputs.profile,
            OURS,
            package=None,
            version=None,
            setting={"rows": chunk.C},
            status=samples.status,
        )
        if samples.values:
            total, copied = zip(*samples.values, strict=True)
            one |= {"bytes": kernel.moved(chunk), "total_ms": [*total], "copy_ms": [*copied]}
        yield one


def _measure(
    kernel: Kernel, work: ModuleType, chunk: ChunkInputs
) -> Callable[[int], tuple[float, float]]:
    """Make a measure for sample_rounds."""

    def call(_: int) -> tuple[float, float]:
        return kernel.run(work, chunk)

    return call


def _impl(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "torch"
