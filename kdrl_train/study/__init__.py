"""The proof: KDRL and its rivals on made-up tasks; `python -m kdrl_train study`."""
