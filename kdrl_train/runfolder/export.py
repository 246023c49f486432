"""Exports a trained policy as a folder that transformers loads."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from kdrl_train.errors import RunError
from kdrl_train.ranks import ALONE, World
from kdrl_train.runfolder.finite import first_broken
from kdrl_train.runfolder.writable import remove

State = dict[str, Tensor]
DtypeOf = Callable[[str], torch.dtype]
"""Returns the dtype in which a tensor is saved, by its name."""


def export(
    model: Any,
    tokenizer: Any,
    folder: Path,
    world: World = ALONE,
    dtype_of: DtypeOf | None = None,
    remedy: str = "free space or correct --out, then --resume writes it again",
    require_ours: Callable[[], None] = lambda: None,
    merge: Callable[[State], State] = lambda state: state,
) -> None:
    """Write a folder that from_pretrained loads; an older one is replaced.

    Args:
        world: the ranks of the run, which all call this together; rank 0 collects the weights on
            the CPU and writes.
        dtype_of: the dtype of each floating tensor in the folder; None: the model's.
        remedy: what to do where it cannot be written, for the message.
        require_ours: raises RunError where another run has begun in the run's folder.
        merge: makes of the model's whole state that of the folder.
    Raises: OSError if it cannot be written (a full disk, say), FloatingPointError for a weight that
        is not finite, or not in the folder's dtype: then an older folder stays.
    """
    weights = merge(whole_state(model, world))  # nothing on other ranks than rank 0
    if dtype_of is not None:
        weights = cast(model, weights, dtype_of)
    require_finite(model, weights, folder, world)

    def write(work: Path) -> None:
        with as_configured(model):
            model.save_pretrained(work, state_dict=weights)
        if dtype_of is not None:
            declare(work / "config.json", dtype_of(""))
        tokenizer.save_pretrained(work)

    world.on_main(lambda: replace_folder(folder, write, remedy, require_ours))


def whole_state(model: Any, world: World = ALONE) -> State:
    """Return the state of a model, whole: nothing on other ranks than rank 0, which has it in the
    CPU's memory. All ranks call it together."""
    if not world.launched:
        return dict(model.state_dict())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: Any = get_model_state_dict(model, options=options)
    return dict(whole)


def replace_folder(
    folder: Path,
    write: Callable[[Path], None],
    remedy: str,
    require_ours: Callable[[], None] = lambda: None,
) -> None:
    """Write a folder under another name, and rename it; an older one is replaced.

    write: makes a folder of this path, with everything in it.
    """
    work, older = (folder.with_name(f".{part}_{folder.name}") for part in ("tmp", "old"))
    try:
        require_ours()
        remove(work)
        write(work)
        require_ours()
        if folder.exists():
            remove(older)  # left by a killed run
            folder.rename(older)
        work.rename(folder)
        with suppress(OSError):  # the model is there
            remove(older)
    except RunError:
        raise  # of require_ours; the other run may be writing into `work`
    except Exception as error:  # the tokenizers' and safetensors' libraries have their own types
        shutil.rmtree(work, ignore_errors=True)
        cause = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise OSError(f"the model must be written to {folder}, got {cause}: {remedy}") from error


def require_finite(model: Any, weights: State, folder: Path, world: World) -> None:
    """Raise FloatingPointError, on all ranks, for a parameter among rank 0's weights with NaN or
    inf: what is learnt must be finite, a mask among the buffers need not be."""
    learnt = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    learnt |= weights.keys() - model.state_dict().keys()  # adapters are merged into them
    named = [(name, tensor) for name, tensor in weights.items() if name in learnt]
    broken = world.on_main(lambda: first_broken(named))
    if broken is not None:
        remedy = "lower the learning rate"
        if world.on_main(lambda: dict(named)[broken].dtype) == torch.float16:
            remedy += ", or start from a copy of the model in bfloat16: float16 ends at 65504"
        raise FloatingPointError(
            f"the weights must be finite, got NaN or inf in {broken}: {folder} is not written; "
            + remedy
        )


@contextmanager
def as_configured(model: Any) -> Iterator[None]:
    """Give a model's configurations the dropout rates back that training set to 0."""
    silenced = getattr(model, "silenced", ())
    for config, name, value in silenced:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in silenced:
            setattr(config, name, 0)


def cast(model: Any, weights: State, dtype_of: DtypeOf) -> State:
    """Return the weights in the CPU's memory, in other dtypes; tied ones stay one tensor."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    copies: dict[int, Tensor] = {}
    result = {}
    for name, weight in weights.items():
        key = id(parameters.get(name, weight))
        if key not in copies:
            dtype = dtype_of(name) if weight.is_floating_point() else weight.dtype
            copies[key] = weight.detach().to(dtype).cpu()
        result[name] = copies[key]
    return result


def declare(path: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the weights, in which transformers loads them, into a config.json."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *config.values()):
        if isinstance(part, dict) and "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
