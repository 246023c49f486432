"""Writes what a run has trained: model/ and, of a run with adapters, adapter/."""

from copy import copy
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kdrl_train.model import lora
from kdrl_train.model.folder import ADAPTER_WEIGHTS, base_of
from kdrl_train.runfolder.checkpoint import load_weights
from kdrl_train.runfolder.export import export, replace_folder, require_finite, whole_state
from kdrl_train.step.run import Run

REMEDY = "free space or correct --out, then --resume writes it again"


def write_best(run: Run) -> str:
    """Load the weights of the best evaluation, and write them as write_model does, into folders
    whose names end in _best. The policy keeps them.

    Returns: what is where; that there is none, where the run was measured at no step, as one that
        was done before eval.keep_best was set.
    """
    assert run.best is not None
    if run.best.now is None:
        return "no step of it was measured, so none is the best"
    folder, config = run.best.checkpoint(run.best.now), run.config
    load_weights(folder, run.policy, run.world, config.checkpoint_hashes, config=config.model)
    return f"of step {run.best.now.step}, the best, {write_model(run, '_best')}"


def write_model(run: Run, ending: str = "") -> str:
    """Write the trained model into the run's folder; all ranks call it together.

    Args:
        ending: of the folders' names.
    Returns: what is where.
    Raises: as runfolder.export.export.
    """
    model, config, ours = run.policy.model, run.config, run.log.require_ours
    whole, adapter = (config.out / f"{name}{ending}" for name in ("model", "adapter"))
    settings = config.model.lora
    if not settings.rank:
        export(model, run.tokenizer, whole, run.world, model.origin.dtype_of, require_ours=ours)
        return f"the model is in {whole}"
    state = whole_state(model, run.world)
    parts = lora.adapter_state(model, state)
    require_finite(model, parts, adapter, run.world)
    base = base_of(config.model.policy)
    base = str(Path(base).absolute()) if Path(base).is_dir() else base
    write = partial(_write_adapter, run, parts, base)
    run.world.on_main(lambda: replace_folder(adapter, write, REMEDY, ours))
    if not settings.merge:
        return f"the adapter is in {adapter}"
    merge = partial(lora.merged_state, model)
    export(
        model,
        run.tokenizer,
        whole,
        run.world,
        model.origin.dtype_of,
        require_ours=ours,
        merge=merge,
    )
    return f"the adapter is in {adapter}, and merged into its base in {whole}"


def _write_adapter(run: Run, parts: dict[str, Tensor], base: str, work: Path) -> None:
    """Write a folder that PeftModel.from_pretrained loads, with the tokenizer."""
    settings = copy(getattr(run.policy.model, lora.KEPT))
    settings.base_model_name_or_path, settings.inference_mode = base, True
    settings.save_pretrained(work)
    save_file(parts, work / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
    run.tokenizer.save_pretrained(work)
