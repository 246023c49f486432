"""Products of a sparse gradient with the head are those of the dense one."""

from typing import Any

import pytest
import torch

from kdrl_kernels import sparse_rows
from kdrl_kernels.head import Head
from kdrl_kernels.sparse_rows import SparseRows
from tests.kernels.params import F32, F64

N, H, V = 9, 8, 50


@pytest.mark.parametrize("dtypes", [(F64, F64), (F32, F64), (F32, torch.bfloat16)])
@pytest.mark.parametrize("slices", [1, 4, 50])
def test_products(
    slices: int, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a table larger than a slice, with rows and columns that have no entries."""
    of_head, of_result = dtypes
    monkeypatch.setattr(sparse_rows, "SLICE_BYTES", -(-V * H * 8 // slices))
    monkeypatch.setattr(sparse_rows, "ENTRIES_OF_SLICE", 0)
    torch.manual_seed(0)
    dense = torch.randn(N, V, dtype=F64) * (torch.rand(N, V) < 0.3)
    dense[4], dense[:, ::7] = 0, 0
    rows, columns = dense.nonzero(as_tuple=True)
    offsets = torch.searchsorted(rows, torch.arange(N + 1))
    sparse = SparseRows(offsets, columns.int(), dense[rows, columns])
    head = Head(torch.randn(N, H, dtype=of_head), torch.randn(V, H, dtype=of_head))
    results: Any = sparse.products(head, [of_result] * 3, (True, True, True), "torch")
    expected = dense @ head.weight.double(), dense.t() @ head.hidden.double(), dense.sum(dim=0)
    bound = 0.01 if of_result != F64 else 1e-12
    for ours, right in zip(results, expected, strict=True):
        assert ours.dtype == of_result
        torch.testing.assert_close(ours.double(), right, rtol=bound, atol=bound)


def test_a_large_table_is_cut_where_bags_have_many_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sliced = sparse_rows._sliced_bags
    monkeypatch.setattr(sparse_rows, "SLICE_BYTES", 10 * H * 4)
    monkeypatch.setattr(sparse_rows, "_sliced_bags", lambda *args: calls.append(1) or sliced(*args))
    for entries, cut in ((40, 0), (41, 1)):  # eight in each of five slices
        calls.clear()
        index = torch.arange(entries, dtype=torch.int32)
        offsets = torch.tensor([0, entries])
        table = torch.ones(V, H)
        total = sparse_rows.eager_bags(table, index, torch.ones(entries), offsets, F32)
        assert len(calls) == cut
        assert total.tolist() == [[entries] * H]
