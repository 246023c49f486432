"""Leaves the rows of a chunk whose logits have no gradient out of dX and dW."""

import torch
from torch import Tensor

from kdrl_kernels import rows as row_work
from kdrl_kernels.call import RowSet
from kdrl_kernels.token_rows import Coefficients


class Compaction:
    """Moves the rows whose logits have a gradient to the front of a chunk, in place.

    A used row beyond their count goes into the slot of an unused one before it, whose logits are
    not needed any more, so no slot is written while the row in it is still to be read.
    """

    def __init__(self, coef: Coefficients, impl: str) -> None:
        source, count = row_work.load(impl).slots(coef)
        self.source: Tensor | None = source
        """The row of each slot, -1 for none; None: nothing moves."""
        # elsewhere a copy that does not wait may be read before it is there
        self._count = count.to("cpu", non_blocking=count.is_cuda)
        self._ready = torch.cuda.Event() if count.is_cuda else None
        if self._ready is not None:
            self._ready.record()
        elif int(self._count) == len(source):
            self.source = None  # known at once

    def rows(self, rows: RowSet) -> RowSet:
        """Return the rows that are left, in the order of their slots; waits for their number.

        The caller queues the gradient kernel first, so that the GPU works while the host waits.
        """
        if self._ready is not None:
            self._ready.synchronize()
        count = int(self._count)
        if self.source is None or count == len(self.source):
            return rows
        source = self.source[:count]
        return rows[source] if isinstance(rows, Tensor) else source + rows.start
