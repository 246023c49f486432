"""Exports a trained policy as a folder that transformers loads."""

import shutil
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from kdrl_train.ranks import ALONE, World


def export(model: Any, tokenizer: Any, folder: Path, world: World = ALONE) -> None:
    """Write a folder that from_pretrained loads; an older one is replaced.

    world: the ranks of the run, which all call this together; rank 0 collects the weights on the
        CPU and writes.
    """
    weights = None
    if world.launched:
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=whole)
    world.on_main(lambda: _export(model, tokenizer, folder, weights))


def _export(model: Any, tokenizer: Any, folder: Path, weights: dict[str, Any] | None) -> None:
    """Write the folder under another name and rename it; None: the weights are the model's own."""
    work = folder.with_name(f".tmp_{folder.name}")
    if work.exists():
        shutil.rmtree(work)
    model.save_pretrained(work, state_dict=weights)
    tokenizer.save_pretrained(work)
    if folder.exists():
        shutil.rmtree(folder)
    work.rename(folder)
