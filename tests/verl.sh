#!/usr/bin/env bash
# The tests that need verl, against verl itself on the CPU: bash tests/verl.sh [FOLDER [OPTIONS OF PYTEST]]
# Prints the table of kdrl_kernels/integrations/verl/README.md too.
# FOLDER: of a virtual environment, about 3 GB, made there if it is absent and kept; by default a
# temporary one, deleted afterwards. Linux.
set -euo pipefail
cd "$(dirname "$0")/.."
install() {
    # verl wants another transformers than constraints.txt names
    "$venv/bin/pip" install -q -e ".[verl]" verl==0.9.1 torch==2.13.0 pytest pytest-xdist hypothesis
}
. tests/environment.sh "${1:-}"
"$venv/bin/python" -m pytest -m verl -n 0 tests/integrations/test_verl_*.py "${@:2}"
"$venv/bin/python" -m tests.integrations.verl_table 2>/dev/null
