"""Looks at a model's files before transformers reads them, and refuses in one line what is wrong.

A model is a folder, or an id of the hub, whose files are looked for in the hub's cache.
"""

import json
import re
import struct
import zipfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)

from kdrl_train.hub import DEADLINE_S, unreachable

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The files that transformers reads, in its order; of each there may be an index of shards."""
ADAPTER_CONFIG = "adapter_config.json"
"""The file by which a folder is one of peft."""
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ELSEWHERE = "it is an adapter, which is not here: download it first, `hf download {name}`"
GATED = "it is gated: accept its terms on its page of the hub, then run `hf auth login`"
POINTER = b"version https://git-lfs"
AGAIN = "download it again"
UNTRUSTED = (
    "which is not run: name a model that transformers has, or set model.trust_remote_code "
    "(--model.trust-remote-code; in sft and replay --trust-remote-code) if you trust its authors"
)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def refusal(key: str, name: str, why: str) -> ValueError:
    """Make the error for a model that cannot be used; `key` is the setting that names it."""
    return ValueError(
        f"{key} must be a folder with a causal LM of transformers, or a hub id, got {name!r} "
        f"(looked in {Path.cwd()}): {why}"
    )


def one_line(error: BaseException) -> str:
    """Say what an error of transformers or the hub means for the user, in one line."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"it has code of its own, {UNTRUSTED}"
    if "gated repo" in text:
        return GATED
    if "Unrecognized configuration class" in text:
        kind = re.sub(r".*?\.(\w+)'>.*", r"\1", text)
        return (
            f"transformers has no causal LM for its {kind}: name a text-only model; the text part "
            "of one with images or sound must first be saved as a model of its own"
        )
    if isinstance(error, OSError | ValueError | ImportError):
        return text[:400]
    return f"{type(error).__name__}: {text[:400]}"


def has_auto_class(config: PretrainedConfig) -> bool:
    """Say whether transformers can load a model with this configuration from its folder."""
    kind = type(config)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: PretrainedConfig) -> Any:
    """Return the class that loads a model: one for images too where no causal LM is known."""
    kind = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def require_loadable(name: str, key: str, trusted: bool = False) -> dict[str, Any]:
    """Return the config.json of a model of transformers, after a look at its files; of an adapter
    those of its base.

    Args:
        trusted: model.trust_remote_code: whether code in its folder may be run.
    Raises: ValueError for a name that is neither a folder nor an id, a model with code of its own
        that is not trusted, and files that are absent, cut, or pointers of git-lfs.
    """
    require_place(name, key)
    name = base_of(name)
    try:
        require_readable(name, "generation_config.json")
        if Path(name).is_dir():
            config = read_json(Path(name) / "config.json")
        else:
            config, _ = PretrainedConfig.get_config_dict(name)
        tensors(name)
    except (OSError, ValueError) as error:
        raise refusal(key, name, one_line(error)) from error
    kind = config.get("model_type")
    if "auto_map" in config and kind not in CONFIG_MAPPING and not trusted:
        why = f"its model_type {kind!r} has code of its own (auto_map in config.json), {UNTRUSTED}"
        raise refusal(key, name, why)
    return config


def require_place(name: str, key: str) -> None:
    """Raise ValueError at once for a name that is no folder and that the hub does not know, and for
    an adapter whose base is not."""
    if not name:
        raise ValueError(f"{key} must name a folder or hub id, got nothing: set {key}")
    problem = place_problem(name)
    if problem:
        raise refusal(key, name, problem)


def read_config(name: str, trusted: bool = False) -> Any:
    """Return transformers' config of a model, whose weights need not be here.

    trusted: model.trust_remote_code: whether code in its folder may be run.

    Raises: ValueError that says why it cannot be read.
    """
    problem = place_problem(name)
    if problem:
        raise ValueError(problem)
    try:
        return AutoConfig.from_pretrained(base_of(name), trust_remote_code=trusted)
    except Exception as error:  # the code of a config may raise anything
        raise ValueError(one_line(error)) from error


def place_problem(name: str) -> str:
    """Say why a name is neither a folder with a model nor one of the hub; nothing if it is."""
    path = Path(name)
    if path.is_dir():
        return _adapter_problem(name) or _run_problem(path)
    if path.exists():
        return "it is a file: name the folder that it is in"
    parent = path.parent
    folders = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    close = get_close_matches(path.name, folders, n=1)  # whole paths are always alike
    hint = f" (did you mean {parent / close[0]}?)" if close else ""
    if _is_hub_id(name) and not ("/" in name and parent.is_dir()):
        problem = _hub_problem(name)
        return problem and problem + hint
    return f"there is no such folder{hint}"


def _run_problem(path: Path) -> str:
    """Say what to name in place of a run's folder or checkpoint; nothing for another folder."""
    remedy = "name the run's model.policy, and a checkpoint as model.weights"
    if any(path.glob("*.distcp")):
        return f"it is a checkpoint of a run: {remedy}"
    if (path / "config.json").exists() or not (path / "config.yaml").exists():
        return ""
    model = path / "model"
    if model.is_dir():
        return f"it is the folder of a run: name {model}"
    return f"it is the folder of a run, whose model is not written yet: {remedy}"


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not name.startswith(".")


def _hub_problem(name: str) -> str:
    """Say why the hub has no model of this name; nothing if it has one, or its cache has."""
    why = unreachable()
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return _adapter_problem(name)
    if why:
        return f"there is no such folder, and the hub cannot be reached ({why}): name a folder"
    try:
        info = HfApi().model_info(name, timeout=DEADLINE_S)
    except GatedRepoError:
        return GATED
    except (RepositoryNotFoundError, HFValidationError):
        return (
            "there is no such folder, and no such model on the hub (or it is private: run "
            "`hf auth login`)"
        )
    except Exception as error:  # each version of the hub's client has its own network errors
        return (
            "there is no such folder, and the hub cannot be reached "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        )
    files = {file.rfilename for file in info.siblings or ()}
    return ELSEWHERE.format(name=name) if ADAPTER_CONFIG in files else ""


def is_adapter(name: str) -> bool:
    """Say whether a folder, or a model in the hub's cache, is an adapter of peft."""
    return stored_file(name, ADAPTER_CONFIG) is not None


def base_of(name: str) -> str:
    """Return the name of the base of an adapter; another model's name as it is.

    Raises: ValueError for an adapter that names no base.
    """
    path = stored_file(name, ADAPTER_CONFIG)
    if path is None:
        return name
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path} must name its base_model_name_or_path, got {base!r}: set it")
    return base


def _adapter_problem(name: str) -> str:
    """Say why an adapter cannot be put on its base; nothing if it can, and for another model."""
    if not is_adapter(name):
        return ""
    if any(stored_file(name, file) for file in WEIGHTS):
        return f"it has a model beside an adapter ({ADAPTER_CONFIG}): move one of them elsewhere"
    try:
        base = base_of(name)
    except ValueError as error:
        return one_line(error)
    if (Path(base).is_dir() or _is_hub_id(base)) and is_adapter(base):
        return f"it is an adapter of {base}, which is an adapter: merge that one first"
    problem = place_problem(base)
    return problem and f"it is an adapter of {base}, and of that {problem}"


def stored_file(name: str, file: str) -> Path | None:
    """Return the path of a file of a model on this machine; None if it is not here."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    cached = try_to_load_from_cache(name, file)
    return Path(cached) if isinstance(cached, str) else None


def require_readable(name: str, *files: str) -> None:
    """Raise ValueError for a JSON file of a model that is here and damaged."""
    for file in files:
        path = stored_file(name, file)
        if path is not None:
            read_json(path)


def quantization(config: dict[str, Any]) -> str | None:
    """Return the method by which the weights of a config.json are quantised; None: they are not."""
    for part in (config, config.get("text_config") or {}):
        settings = part.get("quantization_config") or part.get("compression_config")
        if settings:
            return str(settings.get("quant_method") or "unknown method")
    return None


def tensors(name: str) -> dict[str, Tensor]:
    """Return every tensor in a model's files, on the meta device; empty if none are here yet.

    Raises: ValueError for a folder without weights, and for files that are absent or cut.
    """
    result: dict[str, Tensor] = {}
    for path in weight_files(name):
        require_whole(path)
        read = _safetensors if path.suffix == ".safetensors" else _pickled
        result |= read(path)
    return result


def weight_files(name: str) -> list[Path]:
    """Return the files of weights that transformers reads."""
    for file in WEIGHTS:
        path = stored_file(name, file)
        if path is not None:
            return [path]
        index = stored_file(name, f"{file}.index.json")
        if index is None:
            continue
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{index} must name the file of each tensor (weight_map): {AGAIN}")
        shards = sorted(set(places.values()))
        paths = [index.parent / shard for shard in shards]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise ValueError(
                f"{index} names {len(shards)} files, of which {len(absent)} are absent, first "
                f"{absent[0]}: download them"
            )
        return paths
    if Path(name).is_dir():
        raise ValueError(f"it has no weights ({' or '.join(WEIGHTS)}, or an index of shards)")
    return []


def require_whole(path: Path) -> None:
    """Raise ValueError for an empty file, and a pointer of git-lfs."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: {AGAIN}")
    if _is_pointer(path):
        raise ValueError(f"{path} is a pointer of git-lfs: run `git lfs pull` in its folder")


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file with an object in it."""
    if not path.is_file():
        raise ValueError(f"it has no {path.name}")
    require_whole(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): {AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}: {AGAIN}")
    return value


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Read the header of a safetensors file: 8 bytes of its length, then JSON, then the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path} is cut, or no safetensors file ({size:,} bytes): {AGAIN}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in header.values()]
            shapes = {
                name: torch.empty(
                    entry["shape"], dtype=DTYPES.get(entry["dtype"], torch.uint8), device="meta"
                )
                for name, entry in header.items()
            }
        except Exception as error:  # what json and torch raise for a header of other values
            raise ValueError(f"{path} is damaged ({error}): {AGAIN}") from error
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        raise ValueError(f"{path} must have {whole:,} bytes, got {size:,}: {AGAIN}")
    return shapes


def _pickled(path: Path) -> dict[str, Tensor]:
    """Read a file of torch.save; nothing from the format before PyTorch 1.6."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":  # the beginning of a zip file without its end
                raise ValueError(f"{path} is cut: {AGAIN}")
        return {}
    try:
        state = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:  # pickle, zip and PyTorch raise many types for damaged files
        raise ValueError(f"{path} is damaged ({type(error).__name__}): {AGAIN}") from error
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
