"""The trainer's tiny models, for the tests of hosts; and modules that no garbage collection reads.

accelerate collects garbage at the start of every training run: over half of a short run's time.
"""

import gc
from collections.abc import Iterator

import pytest

from tests.train.conftest import folders, tiny, tokenizer

__all__ = ["folders", "tiny", "tokenizer"]


@pytest.fixture(scope="session", autouse=True)
def _imported_modules_are_no_garbage() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
