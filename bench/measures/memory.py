"""Measures the memory of one call beyond inputs, outputs and gradients.

On a CPU (Linux) it is growth of the resident set's high-water mark, in a process of its own: the
mark is first set back to what is resident, with an allocator that gives every large block back to
the system. On a GPU it is growth of the allocator's peak, to which no other work adds. The call is
made once before, so that what is compiled and loaded is there.
"""

import gc
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import providers
from bench.inputs import Inputs, make_inputs
from bench.machine import (
    DEVICE,
    M_MMAP_MAX,
    M_MMAP_THRESHOLD,
    malloc_options,
    set_up_cpu,
)
from bench.measures.timing import clear_gradients, failure, free_cache
from bench.ops import OPS_BY_NAME, Op
from bench.providers import Provider, Refusal, Setting
from bench.results_file import OUT_OF_TIME, Record, record
from bench.shapes import Shape

OPS = tuple(
    OPS_BY_NAME[name]
    for name in (
        "GRPO",
        "KDRL exact",
        "reverse KL",
        "logprob + entropy",
        "GRPO + top-64 reverse KL",
        "GRPO, head adapter",
        "GRPO + both KLs",
        "KDRL, two teachers",
    )
)
"""Operations that differ in what they must hold; each call needs a slow new process."""
LARGE_BYTES = 1 << 16
"""On a CPU blocks of this size and more are mapped each, and unmapped when they are freed."""
MAPPINGS = 1 << 16
"""The most that there may be: glibc's default."""
CASE_SECONDS = 120.0
"""Seconds after which a case is stopped."""
EXIT_SECONDS = 5.0
"""Seconds that its process has to end by itself, after its reply."""


def measure(
    shape: Shape, profile: str, op_name: str, provider_name: str, setting: Setting
) -> dict[str, int]:
    """Measure {"extra_bytes", "input_bytes", "output_bytes", "gradient_bytes"} in this process."""
    map_large_blocks()
    op = OPS_BY_NAME[op_name]
    provider = next(one for one in providers.load() if one.name == provider_name)
    inputs = make_inputs(shape, profile, teachers=op.teachers)
    return growth(inputs, op, lambda: _call(provider, inputs, op, setting))


def map_large_blocks() -> None:
    """Let every large block of this process go back to the system when it is freed."""
    set_up_cpu()
    if DEVICE == "cpu":
        malloc_options({M_MMAP_MAX: MAPPINGS, M_MMAP_THRESHOLD: LARGE_BYTES})


def growth(inputs: Inputs, op: Op, call: Callable[[], providers.Outputs]) -> dict[str, int]:
    """Call twice, and return by how much the second call grew this process, as `measure` does."""
    call()
    clear_gradients(inputs, op)
    gc.collect()
    before = reset_peak()
    outputs = call()
    grown = peak_bytes() - before
    output_bytes = sum(tensor.nbytes for tensor in outputs.values())
    gradients = [getattr(inputs, name).grad for name in op.gradients]
    gradient_bytes = sum(gradient.nbytes for gradient in gradients)
    return {
        "extra_bytes": grown - output_bytes - gradient_bytes,
        "input_bytes": sum(tensor.nbytes for tensor in large_inputs(inputs, op)),
        "output_bytes": output_bytes,
        "gradient_bytes": gradient_bytes,
    }


def large_inputs(inputs: Inputs, op: Op) -> list[Tensor]:
    """Return the large inputs that an operation reads."""
    read = [inputs.hidden, inputs.weight, inputs.tokens]
    if op.kd == "topk_rkl":
        read += [inputs.teacher_topk_tokens, inputs.teacher_topk_logprobs]
    if op.adapter:
        read += [inputs.adapter_a, inputs.adapter_b]
    if op.teacher_head:
        one = op.teachers == 1
        read += [inputs.teacher_hidden, inputs.teacher_weight] if one else [*inputs.two_teachers]
    return read


def in_own_process(
    shape: Shape, profile: str, op_name: str, provider_name: str, setting: Setting
) -> dict[str, int]:
    """Run `measure` in a new process. Raises: as `alone`."""
    return alone(measure, shape, profile, op_name, provider_name, setting)


def alone(task: Callable[..., Any], *arguments: Any, seconds: float = CASE_SECONDS) -> Any:
    """Return what a function of a module returns in a new process, which is stopped after seconds.

    Raises: RuntimeError where the call fails, its process dies (killed for want of memory, say) or
    gives no answer.
    """
    free_cache()  # of this process, which holds inputs perhaps
    # forkserver: libraries are imported once; but CUDA must not be alive where one forks
    context: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
    if DEVICE == "cpu":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bench.measures.memory"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, task, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise RuntimeError(f"no answer in {seconds:.0f} s")
        reply = receiver.recv()
        process.join(EXIT_SECONDS)
    except EOFError:
        raise RuntimeError("its process died, for want of memory perhaps") from None
    finally:
        process.kill()
        process.join()
    if isinstance(reply, Exception):
        raise reply
    return reply


def _answer(sender: Connection, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Send what the task returns, or the error it raises."""
    try:
        sender.send(task(*arguments))
    except Exception as error:  # raised again by the one who asked
        sender.send(RuntimeError(failure(error).removeprefix("failed: ")))


def records(
    op: Op,
    shape: Shape,
    profile: str,
    contestants: Sequence[tuple[Provider, Setting]],
    deadline: float,
    inputs: Inputs | None = None,
) -> Iterator[Record]:
    """Yield records of kind "memory"; no case starts after the deadline, of time.monotonic().

    inputs: to measure with in this process; None: each case in a process of its own.
    """
    for provider, setting in contestants:
        memory_record = record(
            "memory",
            op.name,
            shape,
            profile,
            provider.name,
            package=provider.package,
            version=providers.version(provider),
            setting=dict(setting),
        )
        try:
            providers.check(provider, op)
            if time.monotonic() > deadline:
                memory_record["status"] = OUT_OF_TIME
            else:
                memory_record |= (
                    in_own_process(shape, profile, op.name, provider.name, setting)
                    if inputs is None
                    else growth(inputs, op, partial(_call, provider, inputs, op, setting))
                )
        except Refusal as refusal:
            memory_record["status"] = str(refusal)
        except Exception as error:  # of other people's code: it stands in the table
            memory_record["status"] = failure(error)
        yield memory_record


def _call(provider: Provider, inputs: Inputs, op: Op, setting: Setting) -> providers.Outputs:
    clear_gradients(inputs, op)
    outputs = providers.forward(provider, inputs, op, setting)
    if op.gradients:
        outputs["loss"].backward()
    return {name: value.detach() for name, value in outputs.items()}


def reset_peak() -> int:
    """Set the peak to what is in use now, and return it in bytes."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        raise OSError(f"the peak of a CPU process is read on Linux alone, not {platform.system()}")
    return peak_bytes()


def peak_bytes() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    # not getrusage: its maximum counts the parent's, from before the exec
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) * 1024
