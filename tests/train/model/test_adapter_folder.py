"""adapter_folder: adapters that peft has saved are merged, continued or refused by name."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdrl_train.config import LoraConfig, TrainConfig
from kdrl_train.model import lora
from kdrl_train.model.fingerprint import weights_hash
from kdrl_train.model.load import load_policy, load_tokenizer, read_model, require_adaptable
from kdrl_train.ranks import ALONE

# peft 0.21 reads an attribute that transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
SETTINGS = LoraConfig(rank=2, alpha=3.0, targets=("q_proj", "down_proj", "lm_head"))
Saved = Callable[..., Path]


@pytest.fixture
def saved(folders: dict[str, Path], tmp_path: Path) -> Saved:
    """saved(target_modules=..., **settings of peft) -> an adapter of `llama`, as peft saves it."""

    def make(**settings: Any) -> Path:
        options = {"r": 2, "lora_alpha": 3, "target_modules": list(SETTINGS.targets)} | settings
        base = AutoModelForCausalLM.from_pretrained(folders["llama"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **options))
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter"

    return make


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=torch.arange(2, 20)[None]).logits
    return result


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "r": 3}], ids=["alpha", "rslora"])
def test_it_is_merged_as_peft_does(
    saved: Saved, folders: dict[str, Path], settings: dict[str, Any]
) -> None:
    path = saved(**settings)
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    before = logits(base)
    theirs = logits(peft.PeftModel.from_pretrained(base, str(path)))
    ours = logits(read_model(str(path), "model.teacher", torch.float32).eval())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - before).abs().max() > 0.1


def test_its_tokenizer_may_be_that_of_its_base(saved: Saved, tokenizer: Any) -> None:
    assert load_tokenizer(str(saved())).get_vocab() == tokenizer.get_vocab()


def test_its_fingerprint_is_of_base_and_adapter(saved: Saved, folders: dict[str, Path]) -> None:
    path = saved()
    first = weights_hash(str(path))
    assert first not in (None, weights_hash(str(folders["llama"])))
    tensors = load_file(path / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, path / "adapter_model.safetensors")
    assert weights_hash(str(path)) != first


def test_a_policy_continues_it(saved: Saved, config: Callable[..., TrainConfig]) -> None:
    path = saved()
    run = config(policy="llama")
    run = replace(run, model=replace(run.model, policy=str(path), lora=SETTINGS))
    require_adaptable(run, ALONE)
    policy = load_policy(run, None)
    stored = load_file(path / "adapter_model.safetensors")
    ours = lora.adapter_state(policy.model, policy.model.state_dict())
    assert ours.keys() == stored.keys()
    assert all(torch.equal(ours[name], stored[name]) for name in stored)
    whole = replace(run, model=replace(run.model, lora=LoraConfig()))
    merged = load_policy(whole, None)
    assert not lora.adapted(merged.model)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    torch.testing.assert_close(logits(merged.model), logits(policy.model), rtol=1e-4, atol=1e-4)


def load_checked(run: TrainConfig) -> None:
    require_adaptable(run, ALONE)
    load_policy(run, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 3}, r"model\.lora\.rank must be that of the adapter in .*, 2, got 3: set it"),
        ({"alpha": 4.0}, r"model\.lora\.alpha must be that of the adapter in .*, 3\.0, got 4\.0"),
        ({"rslora": True}, r"model\.lora\.rslora must be that of the adapter"),
        ({"targets": ("q_proj",)}, r"model\.lora\.targets must be the layers .* down_proj lm_head"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_than_its_own_are_refused(
    saved: Saved, config: Callable[..., TrainConfig], change: dict[str, Any], message: str
) -> None:
    run = config(policy="llama")
    settings = replace(SETTINGS, **change)
    run = replace(run, model=replace(run.model, policy=str(saved()), lora=settings))
    with pytest.raises(ValueError, match=message):
        load_checked(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "its adapter has use_dora True, which is not read here: merge it"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 5}}, r"rank_pattern {'q_proj': 5}"),
        ({"alpha_pattern": {"q_proj": 5}}, "alpha_pattern"),
        ({"bias": "all"}, "bias 'all'"),
        (
            {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"},
            r"alora_invocation_tokens \[5\]",
        ),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_no_plain_lora_is_refused(
    saved: Saved, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"model\.teacher must be .*{message}"):
        read_model(str(saved(**settings)), "model.teacher", torch.float32)


def test_other_adapters_and_files_are_refused(saved: Saved, tmp_path: Path) -> None:
    path = saved()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_model(str(path), "model.teacher", torch.float32)

    settings = json.loads((path / "adapter_config.json").read_text("utf-8"))
    for change, message in {
        "IA3": r"must be of type LORA, got IA3: merge it",
        "pissa": r"its adapter has init_lora_weights 'pissa'",
        "absent": r"its adapter of \S+ has no A and B of rank 5",
    }.items():
        key = {"IA3": "peft_type", "pissa": "init_lora_weights", "absent": "r"}[change]
        value = 5 if change == "absent" else change
        (path / "adapter_config.json").write_text(json.dumps(settings | {key: value}), "utf-8")
        refused(message)
    (path / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    tensors = load_file(path / "adapter_model.safetensors")
    wrong = {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}
    save_file(wrong, path / "adapter_model.safetensors")
    refused(r"its adapter is of model\.layers\.7\S*, \[32, .*\], and its base has no such layer")
    (path / "adapter_model.safetensors").write_bytes(b"123")
    refused(r"adapter_model\.safetensors is damaged")
    (path / "adapter_model.safetensors").unlink()
    refused(r"its adapter has no weights \(adapter_model\.safetensors or adapter_model\.bin\)")
    shutil.copytree(path, tmp_path / "second")
    settings["base_model_name_or_path"] = str(path)
    (tmp_path / "second" / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    path = tmp_path / "second"
    refused("which is an adapter: merge that one first")
