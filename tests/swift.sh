#!/usr/bin/env bash
# The tests that need ms-swift, on the CPU: bash tests/swift.sh [FOLDER [OPTIONS OF PYTEST]]
# FOLDER: of a virtual environment, about 3 GB, made there if it is absent and kept; by default a
# temporary one, deleted afterwards. ms-swift takes a TRL and a transformers of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
install() {
    "$venv/bin/pip" install -q torch==2.13.0 ms-swift==4.6.0 msgspec # which 4.6.0 does not ask for
    "$venv/bin/pip" install -q liger-kernel==0.8.5 pytest pytest-xdist
}
. tests/environment.sh "${1:-}"
"$venv/bin/python" -m pytest -m swift -n 0 tests/integrations/test_swift_*.py "${@:2}"
