"""Fines completions for their length near the longest one: DAPO's soft overlong punishment.

Of L tokens, with max_new_tokens M, a buffer of B tokens and the penalty f, a completion loses

    f · min(1, max(0, L - (M - B)) / B)

of its reward: nothing up to M - B tokens, f where it is cut at M (arXiv:2503.14476, equation 13).
"""

from collections.abc import Sequence


def overlong_fines(
    lengths: Sequence[int], max_new_tokens: int, buffer: int, penalty: float
) -> list[float]:
    """Compute what is added to the reward of each completion: 0 or less.

    Args:
        lengths: [R] tokens of a completion, with its end of sequence.
        max_new_tokens: the longest that is sampled.
        buffer: reward.overlong_buffer, at least 1.
        penalty: reward.overlong_penalty.
    """
    first = max_new_tokens - buffer
    return [-penalty * min(max(length - first, 0) / buffer, 1.0) for length in lengths]
