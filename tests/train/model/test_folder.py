"""folder: what is wrong with a model's files is said in one line before they are read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from httpx2 import Request, Response
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM

from kdrl_train.model import folder as folders_of_models
from kdrl_train.model.folder import UNTRUSTED, one_line, quantization, require_loadable, tensors
from kdrl_train.model.load import load_tokenizer, read_model
from kdrl_train.start.estimate.shapes import read_shape

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4000000000\n"
Folder = Callable[..., Path]


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Folder:
    """folder() -> a copy of the untied model `llama`, to be damaged."""
    return lambda: shutil.copytree(folders["llama"], tmp_path / "model")


def message(name: str | Path) -> str:
    """Return the error of reading a model, which is one line."""
    with pytest.raises(ValueError, match=r"^model\.policy must be a folder with a caus") as error:
        read_model(str(name), "model.policy", torch.float32)
    text = str(error.value)
    assert "\n" not in text
    assert f"got {str(name)!r}" in text
    return text.partition("): ")[2]


def test_the_tensors_are_those_of_the_files(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    (tmp_path / "pickled").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("one", "shards", "pickled"):
        stored = tensors(str(tmp_path / name))
        assert {(key, value.shape, value.dtype) for key, value in stored.items()} == {
            (key, value.shape, torch.bfloat16) for key, value in model.state_dict().items()
        }


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("model.safetensors", b"", "model.safetensors is empty: download it again"),
        ("model.safetensors", 5, "is cut, or no safetensors file (5 bytes): download"),
        ("model.safetensors", -1, "142,544 bytes, got 142,543: download it again"),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]", "is damaged ("),
        ("model.safetensors", b"\x0a\0\0\0\0\0\0\0" + b'{"a": [1]}', "is damaged ("),
        ("model.safetensors", POINTER, "is a pointer of git-lfs: run `git lfs pull`"),
        ("config.json", -9, "config.json is not readable JSON ("),
        ("config.json", b"[]", "config.json must hold a JSON object, got list: download"),
        ("config.json", POINTER, "config.json is a pointer of git-lfs: run `git lfs pull`"),
    ],
)
def test_a_damaged_file_is_named(
    folder: Folder, file: str, content: bytes | int, reason: str
) -> None:
    path = folder() / file
    path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    assert reason in message(path.parent)


def test_absent_files_are_named(folder: Folder, tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    (tmp_path / "shards" / "model-00002-of-00007.safetensors").unlink()
    assert "of which 1 are absent, first model-00002-of-00007.safetensors" in message(
        tmp_path / "shards"
    )
    index = tmp_path / "shards" / "model.safetensors.index.json"
    for text in ('{"weight_map": ["a"]}', "{}"):
        index.write_text(text, encoding="utf-8")
        assert message(index.parent) == (
            f"{index} must name the file of each tensor (weight_map): download it again"
        )
    path = folder()
    (path / "model.safetensors").unlink()
    assert message(path).startswith("it has no weights (model.safetensors or pytorch_model.bin")
    (path / "config.json").unlink()
    assert message(path) == "it has no config.json"


def test_pickled_weights_that_are_cut_are_named(folder: Folder) -> None:
    path = folder()
    model = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    assert read_model(str(path), "model.policy", torch.float32).config.hidden_size == 32
    whole = (path / "pytorch_model.bin").read_bytes()
    (path / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    assert message(path) == f"{path}/pytorch_model.bin is cut: download it again"


@pytest.mark.fault("hostile model folder")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickled_weights_run_nothing(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as some users have it
    path, target = folder(), tmp_path / "attacked"

    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(target),)

    (path / "model.safetensors").unlink()
    state = {"lm_head.weight": Attack()}
    torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert "pytorch_model.bin is damaged" in message(path) or legacy
    assert not target.exists()


def test_an_adapter_whose_base_is_absent_says_so(folder: Folder) -> None:
    path = folder()
    settings = {"base_model_name_or_path": "/no/base", "peft_type": "LORA"}
    (path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    # it would be read without its adapter, or with it
    assert message(path).startswith("it has a model beside an adapter (adapter_config.json): move")
    (path / "model.safetensors").unlink()
    absent = "it is an adapter of /no/base, and of that there is no such folder"
    assert message(path).startswith(absent)
    for read in (load_tokenizer, read_shape):  # eval and plan begin with these
        with pytest.raises(ValueError, match=absent):
            read(str(path), "model.policy")
    for content, why in ((b"", "is empty"), (b"[", "is not readable JSON"), (POINTER, "pointer")):
        (path / "adapter_config.json").write_bytes(content)
        assert why in message(path)
    (path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "must name its base_model_name_or_path, got None" in message(path)


def test_code_of_its_own_is_refused(folder: Folder) -> None:
    path = folder() / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X"}
    path.write_text(json.dumps(config), encoding="utf-8")
    require_loadable(str(path.parent), "model.policy")  # transformers has a llama itself
    path.write_text(json.dumps(config | {"model_type": "x"}), encoding="utf-8")
    reason = message(path.parent)
    assert reason.startswith("its model_type 'x' has code of its own (auto_map in config.json)")
    assert reason.endswith(f"{UNTRUSTED}")
    require_loadable(str(path.parent), "model.policy", trusted=True)


def test_a_mistyped_name_waits_for_no_hub(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable() -> str:
        tries.append(1)
        return "ConnectError: Name or service not known"

    tries: list[int] = []
    monkeypatch.setattr(folders_of_models, "unreachable", unreachable)
    monkeypatch.chdir(folder().parent)
    (tmp_path / "runs").mkdir()
    for name in ("/no/such", "./mdoel", "absent/", "a/b/c", "runs/frist", "a b", "~/x"):
        assert message(name).startswith("there is no such folder")
    assert message(str(tmp_path / "mdoel")).endswith(f"(did you mean {tmp_path / 'model'}?)")
    assert message(str(tmp_path / "other")) == "there is no such folder"
    assert message("model/config.json") == "it is a file: name the folder that it is in"
    assert tries == []
    for name, hint in (("mdoel", " (did you mean model?)"), ("org/mdoel", "")):
        assert message(name) == (
            "there is no such folder, and the hub cannot be reached (ConnectError: Name or "
            f"service not known): name a folder{hint}"
        )
    assert tries == [1, 1]


def test_an_adapter_of_the_hub_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(rfilename="adapter_config.json")]
    monkeypatch.setattr(folders_of_models, "unreachable", str)
    monkeypatch.setattr(
        HfApi, "model_info", lambda *_, **_arguments: SimpleNamespace(siblings=files)
    )
    assert message("org/adapter").startswith("it is an adapter, which is not here: download it")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RepositoryNotFoundError, "there is no such folder, and no such model on the hub (or it"),
        (GatedRepoError, "it is gated: accept its terms on its page of the hub, then run `hf auth"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_named_shortly(
    monkeypatch: pytest.MonkeyPatch, error: type[RepositoryNotFoundError], reason: str
) -> None:
    def fail(*_: Any, **_arguments: Any) -> None:
        raise error("404\n" * 20, response=Response(404, request=Request("GET", "http://x")))

    monkeypatch.setattr(folders_of_models, "unreachable", str)
    monkeypatch.setattr(HfApi, "model_info", fail)
    assert message("org/private").startswith(reason)


def test_an_image_model_without_a_causal_lm_is_refused_in_one_line() -> None:
    class Qwen2_5_VLConfig:  # noqa: N801 (transformers' own name)
        pass

    error = ValueError(
        f"Unrecognized configuration class {Qwen2_5_VLConfig} for this kind of AutoModel: "
        "AutoModelForCausalLM.\nModel type should be one of ApertusConfig, ArceeConfig."
    )
    assert one_line(error).startswith("transformers has no causal LM for its Qwen2_5_VLConfig:")


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"compression_config": {"format": "pack"}}, "unknown method"),
        ({"quantization_config": None, "text_config": None}, None),
        ({}, None),
    ],
)
def test_quantization_is_read_from_the_config(config: dict, method: str | None) -> None:
    assert quantization(config) == method


def test_a_runs_folder_and_its_checkpoint_are_no_models(tmp_path: Path) -> None:
    remedy = "name the run's model.policy, and a checkpoint as model.weights"
    (tmp_path / "config.yaml").touch()
    reason = f"it is the folder of a run, whose model is not written yet: {remedy}"
    assert message(tmp_path) == reason
    (tmp_path / "model").mkdir()
    reason = f"it is the folder of a run: name {tmp_path / 'model'}"
    assert message(tmp_path) == reason
    with pytest.raises(ValueError, match=rf"{reason}$"):
        load_tokenizer(str(tmp_path))
    saved = tmp_path / "checkpoints" / "step_000002"
    saved.mkdir(parents=True)
    (saved / "__0_0.distcp").touch()
    assert message(saved) == f"it is a checkpoint of a run: {remedy}"
    with pytest.raises(ValueError, match=r"step_000002' .*\): it is a checkpoint of a run: "):
        read_shape(str(saved), "model.policy")
