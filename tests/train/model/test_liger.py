"""model.liger puts in liger-kernel's layers and nothing else, and is refused clearly elsewhere.

The layers' arithmetic needs a GPU and is not tested here.
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.qwen2 import modeling_qwen2

from kdrl_train.config import ModelConfig
from kdrl_train.model import liger, load

CUDA = torch.device("cuda")


def test_a_cpu_is_refused() -> None:
    message = r"model\.liger must be false without a GPU .* got true on cpu: leave model\.liger out"
    with pytest.raises(ValueError, match=message):
        liger.require_liger(torch.device("cpu"))
    config = ModelConfig(policy="nowhere", device="cpu", liger=True)
    with pytest.raises(ValueError, match=message):  # before it looks for the weights
        load.load_model("nowhere", "model.policy", config, torch.float32)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", str)  # Triton is installed
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for name in [name for name in sys.modules if name.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"got true: .*pip install 'kdrl-kernels\[liger\]'"):
        liger.require_liger(CUDA)
    monkeypatch.setattr(liger, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="without a GPU that Triton compiles for"):
        liger.require_liger(CUDA)


def test_layers_are_ligers_and_the_loss_is_not(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("liger_kernel")
    names = ("apply_rotary_pos_emb", "Qwen2RMSNorm", "Qwen2MLP")
    for name in names:  # put back afterwards: liger replaces them for the whole process
        monkeypatch.setattr(modeling_qwen2, name, getattr(modeling_qwen2, name))
    model = tiny("qwen2")
    liger.patch_layers(liger.require_liger(CUDA), model, "model.policy")
    layer = model.model.layers[0]
    patched = [model.model.norm, layer.input_layernorm, layer.post_attention_layernorm, layer.mlp]
    for module in patched:
        assert module.forward.__func__.__module__.startswith("liger_kernel."), module
    assert modeling_qwen2.apply_rotary_pos_emb.__module__.startswith("liger_kernel.")
    assert model.forward.__func__ is modeling_qwen2.Qwen2ForCausalLM.forward
    assert torch.nn.functional.cross_entropy.__module__.startswith("torch.")


def test_an_unknown_architecture_is_named(tiny: Callable[..., Any]) -> None:
    module = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    message = r"model\.teacher must be of an architecture that liger-kernel knows .* got qwen2"
    with pytest.raises(ValueError, match=message):
        liger.patch_layers(module, tiny("qwen2"), "model.teacher")
