#!/usr/bin/env bash
# The tests that need DeepSpeed, on the CPU: bash tests/deepspeed.sh [FOLDER [OPTIONS OF PYTEST]]
# FOLDER: of a virtual environment, about 2 GB, made there if it is absent and kept; by default a
# temporary one, deleted afterwards. DeepSpeed compiles its CPU communication once: a C++ compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-}
if [ -z "$venv" ]; then
    venv=$(mktemp -d)/venv
    trap 'rm -rf "$(dirname "$venv")"' EXIT
fi
if [ ! -e "$venv/ready" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q -c constraints.txt -e ".[trl]" pytest pytest-xdist
    "$venv/bin/pip" install -q deepspeed==0.19.8 setuptools
    touch "$venv/ready"
fi
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} DS_ACCELERATOR=cpu
export TORCH_EXTENSIONS_DIR="$venv/torch_extensions" PATH="$venv/bin:$PATH"
"$venv/bin/python" -m pytest -m deepspeed -n 0 tests/integrations/test_trl_deepspeed.py "${@:2}"
