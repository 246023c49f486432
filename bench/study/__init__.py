"""The study compares KDRL with other methods on synthetic tasks: `python -m bench.study`."""
