"""Defines the entries of a sketched gradient, as the row work returns them. Maths: SKETCH.md."""

from dataclasses import dataclass

from torch import Tensor

BLOCK = 64
"""Columns of a block whose sum is known before its entries are."""
FORWARD = ("fkl", "rkl+fkl")
"""Divergences whose gradient has a term of q alone: where q is large, an entry counts too."""

ENTRY_BYTES = 16
"""An int32 column and three float32 numbers, as Triton writes them."""


def row_room(V: int, least: float, ids: int = 0) -> int:
    """Return how many entries Triton has room for in each row of a chunk; least: as in Grid."""
    return min(V, int(1 / least) + 2 + ids)


@dataclass(frozen=True, slots=True)
class Grid:
    """Says which entries of [C, V] are kept: those whose interval holds a whole number.

    The intervals of a row lie end to end. The first begins at the row's uniform number, and that of
    column v has length a_v / threshold, where a = p, or (p + q) / 2 for a divergence of FORWARD.
    """

    thresholds: Tensor
    """[C] float64 above 0; infinite: no entry is kept."""
    uniforms: Tensor
    """[C] float64 in [0, 1)."""
    least: float
    """No threshold is below, but where log r is read, by the share of those columns: a row has at
    most 1 / least + 1 entries beside its K ids."""
    most_entries: float
    """A row that would have more entries on average, Σ min(1, length), is flat: nothing is kept."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Holds the entries that were kept, [E] each, sorted by row and then by column.

    The sampled token's may be among them.
    """

    row: Tensor
    """int64, in the chunk."""
    column: Tensor
    """int64."""
    chance: Tensor
    """Probability with which the entry was kept, in (0, 1]."""
    value: Tensor
    """dL/dz of the entry, without the term of the sampled token, divided by chance."""
    logp: Tensor
    """log p of the entry, in nats."""

    def select(self, where: Tensor) -> "Entries":
        """Return the entries where a [E] bool is true."""
        place = where.nonzero().squeeze(1)
        return Entries(*(getattr(self, name)[place] for name in self.__slots__))
