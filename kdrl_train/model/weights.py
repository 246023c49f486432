"""Compares the tensors of a model with those of its files: none absent, and none lost unseen."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdrl_train.model.folder import has_auto_class, refusal

HARMLESS = re.compile(
    r"(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias|num_batches_tracked)$"
)
"""Buffers that are computed, not learnt: rotary frequencies, positions, masks of GPT-2."""


def require_complete(model: Any, report: dict[str, Any], key: str, name: str) -> None:
    """Check that transformers read every weight of a model from its files.

    It fills what it does not read with random numbers.

    Args:
        report: what from_pretrained returns with output_loading_info.
    Raises: ValueError naming the weights that are absent or of another shape, and where a head
        that config.json ties to the embeddings differs from them in the files.
    """
    absent = sorted(tensor for tensor in report["missing_keys"] if not HARMLESS.search(tensor))
    if absent:
        raise refusal(
            key,
            name,
            f"its files lack {some(absent)}: save the whole model (or set tie_word_embeddings in "
            "config.json if only the head is absent, and it is the embeddings)",
        )
    other = sorted(report["mismatched_keys"])
    if other:
        tensor, stored, expected = other[0]
        raise refusal(
            key,
            name,
            f"{tensor} has shape {list(stored)} in its files and {list(expected)} by config.json "
            f"({len(other)} such tensors): they do not belong together",
        )
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, source in tied.items():
        if parameters.get(target) is not parameters.get(source):
            raise refusal(
                key,
                name,
                f"config.json says that {target} is {source} (tie_word_embeddings), but its files "
                "hold two: set tie_word_embeddings to false in config.json",
            )


def require_trainable(model: Any, key: str, name: str) -> None:
    """Raise ValueError for parameters that no gradient reaches, and an export nobody can load."""
    if not has_auto_class(model.config):  # Mllama: text part of a larger model
        raise refusal(
            key,
            name,
            f"transformers could not load what would be exported, a {type(model).__name__} with a "
            f"{type(model.config).__name__}: name a text-only model",
        )
    fixed = [
        parameter
        for parameter, value in model.named_parameters()
        if not (value.is_floating_point() and value.itemsize > 1 and value.requires_grad)
    ]
    if fixed:
        raise refusal(
            key,
            name,
            f"{len(fixed)} of its parameters cannot be trained, as they are quantised or frozen "
            f"({some(fixed)}): name a model with weights in 16 or 32 bits",
        )


def require_floats(model: Any, stored: dict[str, Tensor], key: str, name: str) -> None:
    """Raise ValueError for weights in 8 bits that no quantization_config says how to scale."""
    narrow = [
        parameter
        for parameter, _ in model.named_parameters()
        if parameter in stored
        and not (stored[parameter].is_floating_point() and stored[parameter].itemsize > 1)
    ]
    if narrow:
        raise refusal(
            key,
            name,
            f"{len(narrow)} of its weights have 8 bits or are integers ({some(narrow)}), and its "
            "config.json has no quantization_config: name the model that it was made of",
        )


def some(names: list[str]) -> str:
    """Write the first names of a list, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Says what a model's files were like; the model carries it as its attribute `origin`."""

    dtype: torch.dtype
    """The floating dtype of most of their elements."""
    dtypes: dict[str, torch.dtype]
    """The dtype of each floating tensor, by its name in the files."""
    prefix: str
    """What may stand before a name in the model and not in the files: "model." (Llama)."""
    parts: dict[str, int]
    """Parts in the files that the model does not have (a vision tower, layers for several tokens),
    with their numbers of tensors."""
    unused: list[str]
    """Tensors of layers that the model has, which it does not use: is it another architecture?"""

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor of the model in the files; of most of them if it has none.

        Several tensors of the files may be one of the model (experts).
        """
        bare = name.removeprefix(self.prefix)
        return self.dtypes.get(name, self.dtypes.get(bare, self.dtype))


def origin_of(
    model: Any, stored: dict[str, Tensor], config: dict[str, Any], report: dict[str, Any]
) -> Origin:
    """Say what the tensors in a model's files, and its config.json, are like."""
    parts, unused = lost(model, report, stored)
    stored = {key: value for key, value in stored.items() if value.is_floating_point()}
    elements: Counter[torch.dtype] = Counter()
    for value in stored.values():
        elements[value.dtype] += value.numel()
    declared = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    most = elements.most_common(1)
    return Origin(
        dtype=most[0][0] if most else getattr(torch, declared.removeprefix("torch.")),
        dtypes={key: value.dtype for key, value in stored.items()},
        prefix=f"{model.base_model_prefix}.",
        parts=parts,
        unused=unused,
    )


def lost(
    model: Any, report: dict[str, Any], stored: Iterable[str]
) -> tuple[dict[str, int], list[str]]:
    """Return the parts in the files that the model lacks, and tensors that its layers do not use.

    transformers does not report those that the model's class declares as expected.
    """
    modules = {name for name, _ in model.named_modules()}

    def first_absent(key: str) -> str:
        """Return the path to the first module, or tensor, of a key that the model lacks."""
        names = key.split(".")
        paths = (".".join(names[:i]) for i in range(1, len(names)))
        return next((path for path in paths if path not in modules), key)

    patterns = model._keys_to_ignore_on_load_unexpected or ()
    expected = [key for key in stored if any(re.search(pattern, key) for pattern in patterns)]
    # in a layer that the model has, such a tensor was read under another name (experts)
    expected = [key for key in expected if not re.search(r"\.\d+\.", first_absent(key))]
    parts: Counter[str] = Counter()
    unused = []
    for key in sorted({*report["unexpected_keys"], *expected} - model.state_dict().keys()):
        if HARMLESS.search(key):
            continue
        path = first_absent(key)
        if path == key:
            unused.append(key)
        else:
            parts[path] += 1
    return dict(parts), unused


@contextmanager
def without_report() -> Iterator[None]:
    """Silence the table that transformers logs of absent weights: ours is an error or a line.

    A filter does it: at another level of its logger, transformers also lists the layers that a plan
    for tensor parallelism leaves whole.
    """
    logger = logging.getLogger("transformers.modeling_utils")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)
