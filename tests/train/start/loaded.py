"""Changes what was loaded, and reads a warning, for the tests of the preflight."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kdrl_train.config import TrainConfig
from kdrl_train.start.load import Loaded


def with_teacher(loaded: Loaded, **changes: Any) -> Loaded:
    """Change the teacher of what was loaded."""
    return replace(loaded, teachers=(replace(loaded.teachers[0], **changes),))


def warning(check: Callable[..., str], config: TrainConfig, loaded: Loaded) -> str:
    """Return the text of the warning with which a check ends."""
    with pytest.raises(UserWarning) as caught:
        check(config, loaded)
    return str(caught.value)
