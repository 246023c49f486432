"""The scoreboard compares this library with public ones: pytest bench/ or python -m bench."""

import os

# huge pages for large CPU tensors of every provider, where Linux has them: a new tensor of 128 MB
# costs 32,768 page faults else, which is a tenth of a head's time (PyTorch reads this once)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
