"""`python -m kdrl_train`."""

import sys


def start() -> int:
    """Run the command line; Ctrl-C ends it with one line and, as in a shell, exit code 130."""
    try:
        from kdrl_train.cli import main  # noqa: PLC0415  Ctrl-C may come while it is imported

        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":  # worker processes import this module too
    sys.exit(start())
