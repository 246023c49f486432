"""A host that is missing, or of another version, is refused in one line."""

from importlib.metadata import version

import pytest

from kdrl_kernels.integrations.versions import require


def test_a_version_that_was_tried_passes() -> None:
    numbers = version("pytest").split(".")
    require("pytest", ".".join(numbers[:2]), "pip install pytest")
    require("pytest", numbers[0], "pip install pytest")


@pytest.mark.parametrize(
    ("package", "release", "message"),
    [
        ("pytest", "1.0", r"pytest must be of release 1\.0, got \d+\.\d.*: pip install it"),
        ("no-such-host", "2", r"no-such-host 2 must be installed: pip install it"),
    ],
)
def test_another_is_refused(package: str, release: str, message: str) -> None:
    with pytest.raises(ImportError, match=message) as error:
        require(package, release, "pip install it")
    assert "\n" not in str(error.value)


def test_a_longer_number_is_another_release() -> None:
    first = version("pytest").split(".")[0]
    with pytest.raises(ImportError, match="must be of release"):
        require("pytest", first[:-1] + "0" + first[-1], "pip install it")
