"""Provides verl: log-probability and entropy of a linear head in Triton, as its actors do."""

import functools
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType, SimpleNamespace

import torch.nn.functional as F
from torch import Tensor

from bench.providers import Provider

H_MULTIPLE = 128
"""The hidden size must be a multiple of this: its kernels assert that."""
FOLDER = "bench_verl_kernel"
"""Module name under which its folder of kernels is loaded."""
BACKWARD = ("_Split_Dlogits_N", "_Total_Separate", "_Total_Fuse_MN")
"""Members of its BackwardEnum, its default first; _Split_Dlogits_M is not implemented."""


def bare_package(name: str) -> ModuleType:
    """Return the package without running its __init__: enough to import single modules of it."""
    spec = find_spec(name)
    assert spec is not None
    return sys.modules.setdefault(name, module_from_spec(spec))


@functools.cache
def _library() -> SimpleNamespace:
    """Import its two modules, and not verl itself, which needs ray, hydra and tensordict.

    They go by another name, because its forward pass imports its kernels on every call: verl's own
    names are free again afterwards.
    """
    already = set(sys.modules)
    try:
        for name in ("verl", "verl.utils"):
            bare_package(name)
        folder = ModuleType(FOLDER)
        folder.__path__ = bare_package("verl.utils.kernel").__path__
        sys.modules[FOLDER] = folder
        kernels = import_module(f"{FOLDER}.kernels")
        function = import_module(f"{FOLDER}.linear_cross_entropy").linear_cross_entropy
    finally:
        for name in set(sys.modules) - already:
            if name.split(".")[0] == "verl":
                del sys.modules[name]
    return SimpleNamespace(kernels=kernels, linear_cross_entropy=function)


def _score(
    hidden: Tensor, weight: Tensor, tokens: Tensor, entropy: bool, backward: str
) -> tuple[Tensor, Tensor | None]:
    """Compute log-probability and entropy, which it always does together.

    Per token, also where a mean is wanted: its own means are wrong unless N is a multiple of 16.
    """
    library = _library()
    library.kernels.set_backward_method(getattr(library.kernels.BackwardEnum, backward))
    missing = -hidden.shape[1] % H_MULTIPLE
    if missing:
        hidden, weight = F.pad(hidden, (0, missing)), F.pad(weight, (0, missing))
    logprobs, h = library.linear_cross_entropy(hidden, weight, tokens, 1.0, "none")
    if logprobs.requires_grad:
        logprobs.register_hook(Tensor.contiguous)  # it asserts that; the gradient of a mean is not
    return logprobs, h if entropy else None


PROVIDERS: tuple[Provider, ...] = (
    Provider(
        name="verl",
        package="verl",
        gpu_only="Triton kernels",
        settings=tuple({"backward": name} for name in BACKWARD),
        score=_score,
        refused={"topk_rkl": "its top-k divergence is a forward KL, without the rest"},
    ),
)
