"""Makes the lines of an estimate: each is a product of named numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Factor = tuple[float, str]
"""A number and its unit."""

MOMENTS = {
    "prefill": "the policy reads the prompts of a batch",
    "decode": "the policy samples the last token of a batch",
    "teacher": "the teacher reads a pack",
    "head": "the loss of a pack is computed; the layers still keep their activations",
    "backward": "backward begins: the gradient of the last layer",
    "root": "backward ends: the gradient of embedding and head",
    "optimizer": "AdamW makes its step",
}
ALWAYS = tuple(MOMENTS)
UPDATE = ("head", "backward")
ROLLOUT = ("prefill", "decode")
MORE_GPUS = "raise --gpus"
WAIT = "--no-save-async"
LARGER = "choose GPUs with more memory, or a smaller model"


@dataclass(frozen=True, slots=True)
class Term:
    """Is one line of an estimate."""

    name: str
    value: float
    """Bytes of one GPU, or seconds of one step."""
    formula: str
    when: tuple[str, ...]
    """Moments at which these bytes are held, or the part of the step these seconds belong to."""
    remedy: str = ""
    """Settings that make the value smaller; empty where there are none."""


def product(
    name: str, when: Sequence[str], factors: Sequence[Factor], over: Factor = (1, ""), **more: str
) -> Term:
    """Makes a term of the product of `factors`, divided by `over`, with its formula."""
    value = math.prod(number for number, _ in factors) / over[0]
    formula = " · ".join(f"{number_text(number)} {unit}" for number, unit in factors)
    if over[1]:
        formula += f" / {number_text(over[0])} {over[1]}"
    return Term(name, value, formula, tuple(when), **more)


def number_text(number: float) -> str:
    """Writes whole and large numbers in full, others with four digits."""
    return f"{number:,.0f}" if isinstance(number, int) or number >= 1e4 else f"{number:,.4g}"
