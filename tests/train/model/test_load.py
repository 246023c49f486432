"""load: tokenizers that are not there, and weights that cannot be trained."""

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from kdrl_train.config import TrainConfig
from kdrl_train.model.folder import read_config, require_loadable
from kdrl_train.model.load import load_policy, load_teacher, load_tokenizer, read_model
from kdrl_train.model.weights import require_trainable
from kdrl_train.ranks import World
from kdrl_train.runfolder.export import export
from kdrl_train.start.estimate.shapes import read_shape
from kdrl_train.start.load import load


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """copied("llama", **settings) -> a copy of a folder, with other settings in its config.json."""

    def make(name: str, **settings: Any) -> Path:
        folder = shutil.copytree(folders[name], tmp_path / name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")
        return folder

    return make


@pytest.mark.parametrize("name", ["student", "llama"])  # an empty tokenizer is made; an error
def test_a_folder_without_a_tokenizer_is_named(copied: Callable[..., Path], name: str) -> None:
    folder = copied(name)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    for key in ("model.policy", "model.teacher"):
        with pytest.raises(ValueError, match=rf"^{key} must have .* has no tokenizer .* copy to"):
            load_tokenizer(str(folder), key)


def test_a_run_names_the_model_whose_tokenizer_is_absent(
    copied: Callable[..., Path], config: Callable[..., TrainConfig]
) -> None:
    folder = copied("teacher")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    base = config()
    run = replace(base, model=replace(base.model, teacher=str(folder)))
    with pytest.raises(ValueError, match=r"^model\.teacher must have a tokenizer beside its weig"):
        load(run)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named(copied: Callable[..., Path], file: str) -> None:
    path = copied("llama") / file
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=rf"{file} is not readable JSON .*: download it again"):
        load_tokenizer(str(path.parent))


METHODS = ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "not-known-yet"]


@pytest.mark.parametrize("method", METHODS)
def test_quantised_weights_are_not_trained(
    copied: Callable[..., Path], config: Callable[..., TrainConfig], method: str
) -> None:
    folder = copied("llama", quantization_config={"quant_method": method})
    base = config()
    run = replace(base, model=replace(base.model, policy=str(folder)))
    with pytest.raises(
        ValueError, match=rf"^model\.policy .*: its weights are quantised \({method}\), and gradie"
    ):
        load_policy(run, None)


def test_a_quantised_teacher_is_not_sharded(
    copied: Callable[..., Path], config: Callable[..., TrainConfig]
) -> None:
    folder = copied("teacher", quantization_config={"quant_method": "bitsandbytes"})
    base = config()
    run = replace(base, model=replace(base.model, teacher=str(folder)))
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes\), and cannot be sharded: .* "):
        load_teacher(run, World(launched=True))


def test_a_library_that_is_absent_is_named_in_one_line(copied: Callable[..., Path]) -> None:
    folder = copied("llama", quantization_config={"quant_method": "quanto", "weights": "int8"})
    with pytest.raises(ValueError, match=r"^model\.teacher .*(quanto|accelerate)") as error:
        read_model(str(folder), "model.teacher", torch.float32)
    assert "\n" not in str(error.value)


def test_parameters_without_a_gradient_are_counted(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    require_trainable(model, "model.policy", "a")
    model.model.norm.requires_grad_(requires_grad=False)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn))
    with pytest.raises(
        ValueError, match=r": 2 of its parameters .*\(model\.norm\.weight, lm_head\.weight\)"
    ):
        require_trainable(model, "model.policy", "a")


def test_reading_a_model_logs_nothing(
    copied: Callable[..., Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the table of unused weights, nor a list of layers for tensor parallelism."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = copied("student")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"more.weight": torch.ones(2)}, folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        model = read_model(str(folder), "model.policy", torch.float32)
    assert model.origin.parts == {"more": 1}
    assert caplog.messages == []


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once code in a model's folder was run; questions are answered with "y"."""
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path / "marker"


def with_code(folder: Path, marker: Path, **settings: Any) -> str:
    """Put code into the folder of a Qwen2, which its config.json and tokenizer name."""
    for name, kind in (("configuration_x", "Qwen2Config"), ("modeling_x", "Qwen2ForCausalLM")):
        (folder / f"{name}.py").write_text(
            f"from pathlib import Path\nfrom transformers import {kind}\n"
            f"Path({str(marker)!r}).touch()\n"
            f"class X({kind}):\n    model_type = 'x-{folder.name}'\n",
            encoding="utf-8",
        )
    with (folder / "modeling_x.py").open("a", encoding="utf-8") as file:
        file.write("from .configuration_x import X as C\nX.config_class = C\n")
    shutil.copy(folder / "modeling_x.py", folder / "tokenization_x.py")
    names = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    changes = {
        "config.json": {"model_type": f"x-{folder.name}", "auto_map": names} | settings,
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]},
            "tokenizer_class": "X",
        },
    }
    for file, values in changes.items():
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(content | values), encoding="utf-8")
    return str(folder)


FLAG = r"\(--model\.trust-remote-code; in sft and replay --trust-remote-code\)"
READERS: dict[str, Callable[[str], object]] = {
    "train": lambda folder: require_loadable(folder, "model.policy"),
    "weights": lambda folder: read_model(folder, "model.policy", torch.float32),
    "plan": lambda folder: read_shape(folder, "model.policy"),
    "eval": read_config,
    "serve": load_tokenizer,
}


@pytest.mark.fault("hostile model folder")
@pytest.mark.parametrize("family", ["x", "t5"])  # unknown; known, but no causal LM
@pytest.mark.parametrize("command", READERS)
def test_code_of_a_model_is_not_run(
    copied: Callable[..., Path], marker: Path, command: str, family: str
) -> None:
    folder = with_code(copied("student"), marker, model_type=family)
    known = family == "t5"  # transformers has a tokenizer for it
    with suppress(ValueError) if known else pytest.raises(ValueError, match=FLAG):
        READERS[command](folder)
    assert not marker.exists()


@pytest.mark.fault("hostile model folder")
def test_code_of_a_model_is_run_where_it_is_trusted(
    copied: Callable[..., Path], folders: dict[str, Path], marker: Path, tmp_path: Path
) -> None:
    folder = with_code(copied("student"), marker)
    model = read_model(folder, "model.policy", torch.float32, trusted=True)
    assert marker.exists()
    assert type(model).__name__ == "X"
    plain = load_file(folders["student"] / "model.safetensors")
    assert torch.equal(model.get_input_embeddings().weight, plain["model.embed_tokens.weight"])
    shape = read_shape(folder, "model.policy", trusted=True)
    assert shape.parameters == sum(weight.numel() for weight in plain.values())
    tokenizer = load_tokenizer(str(folders["student"]))
    export(model, tokenizer, tmp_path / "exported")
    assert (tmp_path / "exported" / "modeling_x.py").is_file()
    again = str(tmp_path / "exported")
    with pytest.raises(ValueError, match=FLAG):
        read_model(again, "model.policy", torch.float32)
    copy = read_model(again, "model.policy", torch.float32, trusted=True)
    assert torch.equal(copy.get_input_embeddings().weight, plain["model.embed_tokens.weight"])
