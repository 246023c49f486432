"""Changes what was loaded, for the tests of the preflight."""

from dataclasses import replace
from typing import Any

from kdrl_train.start.load import Loaded


def with_teacher(loaded: Loaded, **changes: Any) -> Loaded:
    """Change the teacher of what was loaded."""
    return replace(loaded, teachers=(replace(loaded.teachers[0], **changes),))
