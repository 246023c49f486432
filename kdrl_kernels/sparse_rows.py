"""Multiplies a sparse dL/dlogits with the head: dX, dW and db, each written once in its dtype.

dX[n] is a sum over the entries of row n, dW[v] one over those of column v after a stable sort: both
are bags of weighted rows of a table, without atomics.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrl_kernels.gemm import WIDEN_ELEMENTS
from kdrl_kernels.head import Head, Needs, Sums

SLICE_BYTES = 1 << 23
"""Of a table that is larger, a CPU adds up one slice after the other: it stays in the cache."""
ENTRIES_OF_SLICE = 8
"""But not where a bag has fewer entries in each slice, on average."""


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Holds entries of [N, V], by row: what is kept from the forward pass until backward."""

    offsets: Tensor
    """[N + 1] int64: row n has the entries from offsets[n] to offsets[n + 1]."""
    columns: Tensor
    """[E] int32."""
    values: Tensor
    """[E], float32 or float64."""

    @property
    def rows(self) -> Tensor:
        """The row of each entry, [E] int32."""
        return row_of_each(self.offsets, len(self.columns))

    def products(self, head: Head, dtypes: list[torch.dtype], needs: Needs, impl: str) -> Sums:
        """Return dX, dW and db of these dL/dlogits, in their dtypes; None where not needed."""
        bags = load_bags(impl)
        dx, dw, db = None, None, None
        if needs[0]:
            dx = bags(head.weight, self.columns, self.values, self.offsets, dtypes[0])
        if needs[1] or needs[2]:
            columns, rows, values = self._by_column()
            ends = torch.arange(len(head.weight) + 1, dtype=torch.int32, device=columns.device)
            offsets = torch.searchsorted(columns, ends)
            if needs[1]:
                dw = bags(head.trained_hidden, rows, values, offsets, dtypes[1])
            if needs[2]:
                db = row_sums(values, offsets).to(dtypes[2])
        return dx, dw, db

    def add_to(self, sums: Sums, head: Head, impl: str) -> None:
        """Add dX, dW and db of a few entries to sums, in float32 or float64."""
        dx, dw, db = sums
        if dx is not None:
            _add_bags(dx, self.rows, head.weight, self.columns, self.values, impl)
        columns, rows, values = self._by_column()
        if dw is not None:
            _add_bags(dw, columns, head.trained_hidden, rows, values, impl)
        if db is not None:
            used, counts = columns.unique_consecutive(return_counts=True)
            db[used] += row_sums(values, F.pad(counts.cumsum(0), (1, 0)))

    def _by_column(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return column, row and value of each entry, by column and then by row."""
        columns, order = self.columns.sort(stable=True)
        return columns, self.rows[order], self.values[order]


def _add_bags(
    into: Tensor, bag: Tensor, table: Tensor, index: Tensor, weights: Tensor, impl: str
) -> None:
    """Add weights[k] · table[index[k]] to row bag[k] of `into`; bag is sorted."""
    bags, table = load_bags(impl), table if impl == "triton" else table.to(weights.dtype)
    used, counts = bag.unique_consecutive(return_counts=True)
    for rows, part, ends in _blocks(F.pad(counts.cumsum(0), (1, 0)), table.shape[1]):
        into[used[rows]] += bags(table, index[part], weights[part], ends, into.dtype)


def _blocks(offsets: Tensor, H: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield blocks of bags whose sums are small: the bags, their entries and their offsets."""
    step = max(1, WIDEN_ELEMENTS // H)
    edges = torch.cat([offsets[:-1:step], offsets[-1:]]).tolist()  # the host waits once for a GPU
    for block, start in enumerate(range(0, len(offsets) - 1, step)):
        ends, entries = offsets[start : start + step + 1], slice(edges[block], edges[block + 1])
        yield slice(start, start + step), entries, ends - ends[0]


def row_of_each(offsets: Tensor, entries: int) -> Tensor:
    """Return the row of each entry, [E] int32."""
    rows = torch.arange(len(offsets) - 1, dtype=torch.int32, device=offsets.device)
    return rows.repeat_interleave(offsets.diff(), output_size=entries)


def row_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Return the sum of the entries of each row, in their order; 0 for none."""
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0)


def eager_bags(
    table: Tensor, index: Tensor, weights: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the sum of weights[k] · table[index[k]] of each bag, [bags, H] in dtype.

    Bag b has the k from offsets[b] to offsets[b + 1]. Sums have the dtype of weights.
    """
    wide, offsets = table.to(weights.dtype), offsets.to(index.dtype)
    if dtype == weights.dtype:
        slices = -(-wide.nbytes // SLICE_BYTES)
        many = len(index) > ENTRIES_OF_SLICE * slices * (len(offsets) - 1)
        if many and slices > 1 and table.device.type == "cpu":
            return _sliced_bags(wide, index, weights, offsets, slices)
        return _bags(wide, index, weights, offsets)
    out = table.new_empty(len(offsets) - 1, table.shape[1], dtype=dtype)
    for rows, part, ends in _blocks(offsets, table.shape[1]):
        out[rows] = _bags(wide, index[part], weights[part], ends)
    return out


def _sliced_bags(
    table: Tensor, index: Tensor, weights: Tensor, offsets: Tensor, slices: int
) -> Tensor:
    """Add up the bags of one slice of the table after the other: each stays in the cache."""
    bags, size = len(offsets) - 1, -(-len(table) // slices)
    keys, order = (index // size * bags + row_of_each(offsets, len(index))).sort(stable=True)
    index, weights = index[order], weights[order]
    edges = torch.arange(slices * bags + 1, dtype=keys.dtype)
    edges = torch.searchsorted(keys, edges, out_int32=True).to(index.dtype)
    out = table.new_zeros(bags, table.shape[1])
    for first in range(0, slices * bags, bags):
        ends = edges[first : first + bags + 1]
        part = slice(int(ends[0]), int(ends[-1]))
        out += _bags(table, index[part], weights[part], ends - ends[0])
    return out


def _bags(table: Tensor, index: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    if len(index) == 0:  # embedding_bag wants an entry
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    return F.embedding_bag(
        index, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def load_bags(impl: str) -> Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]:
    """Return the function of an implementation that adds up bags."""
    if impl == "triton":
        from kdrl_kernels.rows import kernel_bags  # noqa: PLC0415 (Triton is optional)

        return kernel_bags.bags
    return eager_bags
