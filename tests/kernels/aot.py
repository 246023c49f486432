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
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdrl_kernels.rows import Stream
from kdrl_kernels.rows import triton as kernels

ARCHES = (80, 90, 100)
CODES = kernels.KD_CODES
DIVISIBLE = [["tt.divisibility", 16]]

Variant = tuple[str, Any, dict[str, Any], dict[str, str]]
"""Name, kernel, constexprs, and pointer types that differ from *fp32."""


def variants() -> Iterator[Variant]:
    """What the launchers run: every KD term and softcap, at the launchers' own block sizes."""
    for kd in (None, "rkl", "fkl"):
        for cap, cap_t in product((None, 30.0), (None, 30.0) if kd else (None,)):
            student = Stream(torch.empty(0), 1.0, cap)
            teacher = Stream(torch.empty(0), 1.0, cap_t) if kd else None
            flags = {"HAS_SOFTCAP": cap is not None, "T_HAS_SOFTCAP": cap_t is not None}
            flags |= {"HAS_ENTROPY": True, "KD": CODES[kd]}
            name = f"{kd}-{cap}-{cap_t}"
            sweep = flags | {"BLOCK_V": kernels.sweep_block(student, teacher)}
            yield f"sweep-{name}", kernels._sweep_kernel, sweep, {}
            gradient = flags | {"BLOCK_V": kernels.gradient_block(student, teacher)}
            yield f"gradient-{name}-bf16", kernels._gradient_kernel, gradient, {"dz_ptr": "*bf16"}
    flags = {"HAS_SOFTCAP": False, "T_HAS_SOFTCAP": False, "HAS_ENTROPY": True}
    gradient = flags | {"KD": CODES["rkl"], "BLOCK_V": kernels.GRADIENT_BLOCK_V}
    for dtype in ("fp16", "fp32"):
        yield f"gradient-rkl-{dtype}", kernels._gradient_kernel, gradient, {"dz_ptr": f"*{dtype}"}
    for kd, code in CODES.items():
        flags = {"HAS_POLICY": True, "HAS_ENTROPY": True, "KD": code}
        block = {"BLOCK": kernels.OBJECTIVE_BLOCK}
        yield f"objective-{kd}", kernels._objective_kernel, flags | block, {}


def compile_one(variant: Variant, arch: int, aligned: bool) -> Any:
    """The compiled kernel. aligned: strides divisible by 16, as in most vocabularies."""
    _, kernel, constexprs, pointers = variant

    def type_of(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        if name == "token_ptr":
            return "*i64"
        if name.endswith("_ptr"):
            return pointers.get(name, "*fp32")
        return "i32" if name in ("V", "C") or name.startswith("stride_") else "fp32"

    names = kernel.arg_names
    divisible = ("_ptr",) if not aligned else ("_ptr", "_zn", "_tn", "_dn")
    attrs = {(i,): DIVISIBLE for i, name in enumerate(names) if name.endswith(divisible)}
    signature = {name: type_of(name) for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
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
    """One JSON line for each kernel variant, alignment and architecture."""
    for variant, aligned, arch in product(variants(), (True, False), ARCHES):
        if not aligned and variant[0].startswith("objective"):
            continue  # it has no strides
        compiled = compile_one(variant, arch, aligned)
        name = f"{variant[0]}-{'aligned' if aligned else 'ragged'}"
        row = {"kernel": name, "arch": arch, "shared_bytes": compiled.metadata.shared}
        sys.stdout.write(json.dumps(row | resources(compiled.asm["cubin"])) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
