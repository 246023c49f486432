"""Does the row work of one chunk: statistics of logits, coefficients, logits into gradients.

Two modules define the same names: `eager` (any device) and `kernels` (GPU). Maths: README.md.
"""

from types import ModuleType

from kdrl_kernels.rows import eager, eager_sketch


def load(impl: str) -> ModuleType:
    """Return the row module of an implementation: `eager` for "torch", `kernels` for "triton"."""
    if impl == "triton":  # a plain import: torch.compile traces it, but not import_module
        from kdrl_kernels.rows import kernels  # noqa: PLC0415 (Triton is optional)

        return kernels
    return eager


def load_sketch(impl: str) -> ModuleType:
    """Return the module of an implementation with `sketch`."""
    if impl == "triton":
        from kdrl_kernels.rows import kernel_sketch  # noqa: PLC0415

        return kernel_sketch
    return eager_sketch
