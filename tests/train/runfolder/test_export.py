"""export: the folder has the dtypes of the one it came from, or an error of one line."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdrl_train.config import TrainConfig
from kdrl_train.model.load import read_model
from kdrl_train.model.policy import HeadedModel
from kdrl_train.runfolder.export import export
from tests.train.ranks import train_ranks

ROUTER = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def student(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """student(dtype, {name: another dtype}, name="llama") -> a folder with weights in these."""

    def make(dtype: torch.dtype, others: dict[str, torch.dtype], name: str = "llama") -> Path:
        folder = shutil.copytree(folders[name], tmp_path / "student")
        model = AutoModelForCausalLM.from_pretrained(folder).to(dtype)
        model.save_pretrained(folder)
        state = load_file(folder / "model.safetensors")
        state = {key: value.to(others.get(key, dtype)) for key, value in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("name", ["student", "llama"])  # tied and untied
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_exported_weights_have_the_dtype_of_the_folder(
    student: Callable[..., Path], tokenizer: Any, tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    source = student(dtype, {}, name)
    model = read_model(str(source), "model.policy", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    export(model, tokenizer, tmp_path / "model", dtype_of=model.origin.dtype_of)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored.keys() == load_file(source / "model.safetensors").keys()
    for key, value in stored.items():
        assert torch.equal(value, model.state_dict()[key].to(dtype)), key
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert f"torch.{config['dtype']}" == str(dtype)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.dtype == dtype
    assert model.dtype == torch.float32  # it may be trained on


def test_tensors_of_other_dtypes_keep_them(
    student: Callable[..., Path], tokenizer: Any, tmp_path: Path
) -> None:
    others = {"lm_head.weight": torch.float32, ROUTER: torch.float32}
    source = student(torch.bfloat16, others)
    model = read_model(str(source), "model.policy", torch.float32)
    export(model, tokenizer, tmp_path / "model", dtype_of=model.origin.dtype_of)
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value)
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"


def test_the_exported_configuration_has_the_dropout_of_the_folder(
    tiny: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny("opt", ffn_dim=64, word_embed_proj_dim=32, dropout=0.3, attention_dropout=0.2)
    for _ in range(2):  # policy and engine may wrap one model
        HeadedModel(model)
    export(model, tokenizer, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert (config["dropout"], config["attention_dropout"]) == (0.3, 0.2)
    assert (model.config.dropout, model.config.attention_dropout) == (0, 0)  # it may be trained on
    assert model.model.decoder.layers[0].dropout == 0


def test_names_without_the_prefix_of_the_model_are_the_same_tensors(
    student: Callable[..., Path],
) -> None:
    folder = student(torch.bfloat16, {ROUTER: torch.float32})
    state = load_file(folder / "model.safetensors")
    state = {key.removeprefix("model."): value for key, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    origin = read_model(str(folder), "model.policy", torch.float32).origin
    assert origin.dtype_of(ROUTER) == torch.float32
    assert origin.dtype_of("model.norm.weight") == torch.bfloat16
    assert origin.dtype_of("model.layers.0.mlp.experts.gate_up_proj") == torch.bfloat16


@pytest.mark.slow
def test_ranks_export_what_one_process_does(
    student: Callable[..., Path], config: Callable[..., TrainConfig]
) -> None:
    source = student(torch.bfloat16, {}, "student")  # tied
    base = config()
    run = replace(base, steps=1, model=replace(base.model, policy=str(source)))
    assert "Error" not in "".join(train_ranks(run, 2))
    stored = load_file(run.out / "model" / "model.safetensors")
    assert stored.keys() == load_file(source / "model.safetensors").keys()
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
        safetensors.SafetensorError("Error while serializing: I/O error: No space left on device"),
        Exception("No space left on device (os error 28)"),  # what tokenizers raises
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_export_that_fails_leaves_the_older_one(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_tokenizer: Any, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{", encoding="utf-8")
        raise error

    model = read_model(str(folders["llama"]), "model.policy", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    export(model, tokenizer, tmp_path / "model")
    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(
        OSError, match=r"^the model must be written to .*model, got \w+: "
    ) as caught:
        export(model, tokenizer, tmp_path / "model")
    assert str(caught.value).endswith(
        ": free space or correct --out, then --resume writes it again"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == tokenizer.get_vocab()
