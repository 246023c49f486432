"""Reads the LM head of a teacher behind a URL, and no other of its weights.

Its server sends the states that this head reads: together they are the teacher's whole
distribution, at the exact place where the server computes it.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

import kdrl_kernels as kk
from kdrl_kernels.head_config import head_scalars, logit_scale
from kdrl_train.model.folder import (
    WEIGHTS,
    auto_class,
    is_adapter,
    one_line,
    read_config,
    read_json,
    refusal,
    require_whole,
)
from kdrl_train.model.teacher.client import TeacherInfo

OF_AN_ADAPTER = (
    "it is an adapter, and holds no whole LM head: name the folder in which it is merged (model/ "
    "of its run), or its base where it does not adapt the LM head"
)
"""Why the head of an adapter is not read, and what to do."""


@dataclass(frozen=True, slots=True)
class ServedHead:
    """Holds the LM head of a teacher whose hidden states a server computes."""

    key: str
    """The setting that names it, for messages."""
    name: str
    """Its folder or hub id."""
    weight: Tensor
    """[V_t, H_t], on the run's device, in its dtype."""
    bias: Tensor | None
    """[V_t] or None."""
    temperature: float
    softcap: float | None

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        tensors = [self.weight] if self.bias is None else [self.weight, self.bias]
        return sum(tensor.nbytes for tensor in tensors)

    def of(self, states: Tensor | None, tokens: int) -> kk.TeacherHead:
        """Return the teacher at `tokens` places with these states [tokens, H_t].

        states: None where no token is distilled: zeros, whose weight is 0.
        """
        if states is None:
            states = self.weight.new_zeros(tokens, self.weight.shape[1])
        return kk.TeacherHead(
            states.to(self.weight),
            self.weight,
            bias=self.bias,
            temperature=self.temperature,
            softcap=self.softcap,
        )


def load_head(
    key: str,
    name: str,
    info: TeacherInfo,
    *,
    temperature: float,
    dtype: torch.dtype,
    device: torch.device,
    trusted: bool = False,
) -> ServedHead:
    """Read the head of a model from its folder, or from the one file of the hub that holds it.

    Args:
        key: the setting that names it, for messages: teacher.head.
        name: a folder or hub id.
        info: what the server says of its model, whose head it must be.
        temperature: of the sampler.
        trusted: model.trust_remote_code: whether code in the model's folder may be run.
    Raises: ValueError where it cannot be read, or is not the head of the server's model.
    """
    try:
        config = read_config(name, trusted)
        if is_adapter(name):
            raise ValueError(OF_AN_ADAPTER)
        model = _without_weights(config, trusted)
        module = model.get_output_embeddings()
        if module is None:
            raise ValueError("it has no LM head")
        bias = getattr(module, "bias", None)
        weight = _read(name, model, module.weight)
        bias = None if bias is None else _read(name, model, bias)
    except Exception as error:  # a model's code and its files' readers raise many types
        raise refusal(key, name, one_line(error)) from error
    text = config.get_text_config()
    _check_fits(f"{key} = {name!r}", info, weight, *logit_numbers(text))
    at, cap = head_scalars(text, temperature)
    bias = None if bias is None else bias.to(device, dtype)
    return ServedHead(key, name, weight.to(device, dtype), bias, at, cap)


def load_norm(key: str, name: str, trusted: bool = False) -> torch.nn.Module | None:
    """Read the final norm of a model, in float32: what its head reads comes out of it.

    key, name, trusted: as load_head.

    Returns: None where it is not known which module that is.
    Raises: ValueError where it cannot be read.
    """
    try:
        model = _without_weights(read_config(name, trusted), trusted)
        width = model.get_output_embeddings().weight.shape[1:]
        norms = [
            module
            for module in model.get_decoder().children()
            if "norm" in type(module).__name__.lower() and module.weight.shape == width
        ]
        if len(norms) != 1:
            return None
        module = deepcopy(norms[0]).float().to_empty(device="cpu")
        for part, parameter in norms[0].named_parameters():
            module.get_parameter(part).data.copy_(_read(name, model, parameter))
    except Exception as error:  # as load_head
        raise refusal(key, name, one_line(error)) from error
    return module


@torch.no_grad()
def normal_rms(norm: torch.nn.Module, states: Tensor) -> Tensor:
    """Return the root mean square [T] of states [T, H] without shift and scale of a norm; all are
    near 1 where the states came out of it.

    RMSNorm and LayerNorm give shift + scale · x for an x of mean 0 and mean square 1, as the signs
    +1, -1, +1, ... are.
    """
    H = states.shape[1]
    signs = 1.0 - 2.0 * (torch.arange(H) % 2)
    shift = norm(torch.zeros(1, H))[0]
    scale = norm(signs[None])[0] - shift  # up to the signs, which squares do not show
    used = scale.abs() > 1e-3 * scale.abs().max()  # a channel may be switched off
    return ((states.float() - shift)[:, used] / scale[used]).square().mean(dim=1).sqrt()


def logit_numbers(config: Any) -> tuple[float, float | None]:
    """Return logit_scale and softcap, as in TeacherInfo, of a text model's configuration."""
    scale, (_, cap) = logit_scale(config), head_scalars(config)
    return scale, None if cap is None else cap * scale


def _check_fits(
    head: str, info: TeacherInfo, weight: Tensor, scale: float, softcap: float | None
) -> None:
    """Raise ValueError unless a head has the shape and the numbers of the server's model.

    head: names it in messages.
    """
    served: dict[str, tuple[Any, Any]] = {"numbers in a state": (weight.shape[1], info.hidden_size)}
    if info.vocab_size is not None:  # vLLM does not say
        served |= {
            "columns": (len(weight), info.vocab_size),
            "as logit_scale": (scale, info.logit_scale),
            "as softcap": (softcap, info.softcap),
        }
    for what, (ours, theirs) in served.items():
        if ours != theirs:
            raise ValueError(
                f"{head} must be the head of {info.model}, which the server has, got {ours} "
                f"{what}, and {theirs} there: name the folder or hub id that is served"
            )


def _without_weights(config: Any, trusted: bool) -> Any:
    """Make a model whose parameters are on the meta device."""
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=trusted)


def _read(name: str, model: Any, parameter: Tensor) -> Tensor:
    """Read one parameter of a model, which is on the meta device, from the model's files."""
    names = list(dict.fromkeys(_names(model, parameter)))
    files = _files(name)
    known = {_renamed(model, tensor): tensor for tensor in files}
    tensor = next((known[one] for one in names if one in known), None)
    if tensor is None:
        raise ValueError(f"its files have none of {', '.join(names)}")
    value = _tensor(_path(name, files[tensor]), tensor)
    if value.shape != parameter.shape or not value.is_floating_point() or value.itemsize == 1:
        raise ValueError(
            f"{tensor} has shape {list(value.shape)} and {value.dtype} in its files, and "
            f"{list(parameter.shape)} by config.json: name the model with weights in 16 or 32 bits"
        )
    return value


def _names(model: Any, parameter: Tensor) -> Iterator[str]:
    """Yield the names that a parameter may have in a model's files, the likeliest first.

    A tied head is the input embeddings, under their name; the files may hold it under its own too.
    """
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [name for name, value in parameters.items() if value is parameter]
    names = [*(tied[name] for name in names if name in tied), *names]
    prefix = f"{model.base_model_prefix}."
    for name in dict.fromkeys(names):
        yield name
        yield name.removeprefix(prefix)


def _renamed(model: Any, tensor: str) -> str:
    """Return the name in the model of a tensor of its files, which some families name otherwise
    (GPT-NeoX, and models that read images too)."""
    for entry in get_model_conversion_mapping(model):
        if isinstance(entry, WeightRenaming):
            tensor, _ = entry.rename_source_key(tensor)
    return tensor


def _files(name: str) -> dict[str, str]:
    """Return the file of each tensor of a model, by its name."""
    for file in WEIGHTS:
        index = _path(name, f"{file}.index.json", absent=True)
        if index is not None:
            return dict(read_json(index)["weight_map"])
        path = _path(name, file, absent=True)
        if path is not None and path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                return dict.fromkeys(tensors.keys(), file)
        if path is not None:
            return dict.fromkeys(_pickled(path), file)
    raise ValueError(f"it has no weights ({' or '.join(WEIGHTS)}, or an index of shards)")


def _path(name: str, file: str, *, absent: bool = False) -> Path | None:
    """Return the path of a model's file, which is downloaded where it is not here.

    absent: return None where the model has no such file, in place of an error.
    """
    if Path(name).is_dir():
        path = Path(name) / file
        if path.is_file():
            require_whole(path)
            return path
    else:
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError:  # the hub cannot be reached: it may be absent, or not here
            if not absent:
                raise
        except EntryNotFoundError:
            pass
    if absent:
        return None
    raise ValueError(f"it has no {file}")


def _tensor(path: Path | None, tensor: str) -> Tensor:
    """Read one tensor of a file."""
    assert path is not None
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as tensors:
            value: Tensor = tensors.get_tensor(tensor)
            return value
    return _pickled(path)[tensor].clone()


def _pickled(path: Path) -> dict[str, Tensor]:
    """Map a file of torch.save into memory, without running what it names."""
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return state
