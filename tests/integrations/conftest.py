"""The trainer's tiny models, for the tests of hosts."""

from tests.train.conftest import folders, tiny, tokenizer

__all__ = ["folders", "tiny", "tokenizer"]
