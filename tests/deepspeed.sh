#!/usr/bin/env bash
# The tests that need DeepSpeed, on the CPU: bash tests/deepspeed.sh [FOLDER [OPTIONS OF PYTEST]]
# FOLDER: of a virtual environment, about 2 GB, made there if it is absent and kept; by default a
# temporary one, deleted afterwards. DeepSpeed compiles its CPU communication once: a C++ compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
install() {
    "$venv/bin/pip" install -q -c constraints.txt -e ".[trl]" pytest pytest-xdist
    "$venv/bin/pip" install -q deepspeed==0.19.8 setuptools
}
. tests/environment.sh "${1:-}"
export DS_ACCELERATOR=cpu
export TORCH_EXTENSIONS_DIR="$venv/torch_extensions" PATH="$venv/bin:$PATH"
"$venv/bin/python" -m pytest -m deepspeed -n 0 tests/integrations/test_trl_deepspeed.py "${@:2}"
