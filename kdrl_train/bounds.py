"""What a number of the configuration may be."""

import math


def positive(key: str, value: float) -> None:
    """Raises ValueError unless 0 < value < inf (nan is refused too)."""
    if not 0 < value < math.inf:
        raise ValueError(f"{key} must be positive and finite, got {value}")


def at_least(least: int, key: str, value: float | None) -> None:
    """Raises ValueError unless value is None or least <= value < inf (nan is refused too)."""
    if value is not None and not least <= value < math.inf:
        kind = "finite and " if isinstance(value, float) else ""
        raise ValueError(f"{key} must be {kind}at least {least}, got {value}")


def in_unit_interval(key: str, value: float) -> None:
    """Raises ValueError unless 0 <= value < 1 (nan is refused too)."""
    if not 0 <= value < 1:
        raise ValueError(f"{key} must be at least 0 and below 1, got {value}")
