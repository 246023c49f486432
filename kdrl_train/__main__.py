"""`python -m kdrl_train`."""

import sys

from kdrl_train.cli import main

if __name__ == "__main__":  # worker processes import this module too
    sys.exit(main())
