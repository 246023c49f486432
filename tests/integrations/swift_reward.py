"""A reward function of ms-swift, in the form that --external_plugins loads."""

from typing import Any

from swift.rewards import ORM, orms


class Digits(ORM):  # type: ignore[misc] # ms-swift has no types
    """Rewards a completion by its characters, so that most of a group differ."""

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [sum(map(ord, text)) % 7 / 7 for text in completions]


orms["digits"] = Digits
