"""`python -m kdrl_train`."""

import sys

from kdrl_train.errors import ExtraError, needs_extra


def start() -> int:
    """Run the command line; Ctrl-C ends it with one line and, as in a shell, exit code 130."""
    try:
        with needs_extra("train"):
            from kdrl_train.cli import main  # noqa: PLC0415  Ctrl-C may come while it is imported
        return main()
    except ExtraError as error:  # kdrl_train is installed with kdrl_kernels, its packages are not
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":  # worker processes import this module too
    sys.exit(start())
