"""The proof: KDRL and its rivals on made-up tasks; `python -m bench.study`."""
