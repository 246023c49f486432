"""Compile every row kernel ahead of time, without a GPU, and print its resources as JSON lines.

Run in a process without TRITON_INTERPRET: `python -m tests.kernels.aot`. sm_* give a cubin, whose
resource report comes from the cuobjdump inside the triton wheel.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdrl_kernels.rows import triton as kernels

ARCHES = (80, 90, 100)
CODES = kernels.KD_CODES
FLAGS = {"HAS_SOFTCAP": False, "T_HAS_SOFTCAP": False, "HAS_ENTROPY": True}
ALIGNED = [["tt.divisibility", 16]]


def variants() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, str]]]:
    """(name, kernel, constexprs, pointer types that differ from *fp32) of what runs in practice."""
    for kd in (None, "rkl", "fkl"):
        for softcap in (False, True):
            flags = FLAGS | {"HAS_SOFTCAP": softcap, "KD": CODES[kd]}
            name = f"{kd}-{'softcap' if softcap else 'plain'}"
            sweep = flags | {"BLOCK_V": kernels.PAIR_BLOCK_V if kd else kernels.SWEEP_BLOCK_V}
            yield f"sweep-{name}", kernels._sweep_kernel, sweep, {}
            gradient = flags | {"BLOCK_V": kernels.GRADIENT_BLOCK_V}
            yield f"gradient-{name}-bf16", kernels._gradient_kernel, gradient, {"dz_ptr": "*bf16"}
    for dtype in ("fp16", "fp32"):
        gradient = FLAGS | {"KD": CODES["rkl"], "BLOCK_V": kernels.GRADIENT_BLOCK_V}
        yield f"gradient-rkl-{dtype}", kernels._gradient_kernel, gradient, {"dz_ptr": f"*{dtype}"}
    for kd, code in CODES.items():
        flags = {"HAS_POLICY": True, "KD": code, "HAS_ENTROPY": True}
        flags["BLOCK"] = kernels.OBJECTIVE_BLOCK
        yield f"objective-{kd}", kernels._objective_kernel, flags, {}


def compile_one(
    kernel: Any, constexprs: dict[str, Any], pointers: dict[str, str], arch: int
) -> Any:
    """The compiled kernel; pointers and strides divisible by 16, as the allocator gives them."""

    def type_of(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        if name == "token_ptr":
            return "*i64"
        if name.endswith("_ptr"):
            return pointers.get(name, "*fp32")
        return "i32" if name in ("V", "C") or name.startswith("stride_") else "fp32"

    names = kernel.arg_names
    attrs = {
        (i,): ALIGNED for i, n in enumerate(names) if n.endswith("_ptr") or n.startswith("stride_")
    }
    source = ASTSource(
        fn=kernel, signature={n: type_of(n) for n in names}, constexprs=constexprs, attrs=attrs
    )
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=kernels.OPTIONS)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and SHARED of a cubin: per thread, bytes."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", report)}


def main() -> None:
    """One JSON line for each kernel variant and architecture."""
    for name, kernel, constexprs, pointers in variants():
        for arch in ARCHES:
            compiled = compile_one(kernel, constexprs, pointers, arch)
            row = {"kernel": name, "arch": arch, "shared_bytes": compiled.metadata.shared}
            sys.stdout.write(json.dumps(row | resources(compiled.asm["cubin"])) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
