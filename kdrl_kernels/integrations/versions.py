"""Refuses a host whose version was not tried."""

from importlib.metadata import PackageNotFoundError, version


def require(package: str, release: str, remedy: str) -> None:
    """Check that the release of a package is there for which a module was written.

    Args:
        package: name of its distribution, "trl".
        release: the first numbers of its version, "1.16": any 1.16.x passes.
        remedy: the command that installs it.
    Raises: ImportError, one line that names the version and the remedy.
    """
    try:
        installed = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{package} {release} must be installed: {remedy}") from None
    if not f"{installed}.".startswith(f"{release}."):
        raise ImportError(
            f"{package} must be of release {release}, got {installed}: its internals change from "
            f"one to the next, and this one was not tried: {remedy}"
        )
