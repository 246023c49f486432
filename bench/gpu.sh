#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network: bash bench/gpu.sh OUT
# Runs on the machine's own Python, from the repository. Wheels in ./wheels, which bench/wheels.sh
# downloads, are installed first, without their dependencies. Tiles of the row kernels apart, since
# they take minutes to compile: python3 -m bench.tiles; the scoreboard at its full length too:
# python3 -m bench --minutes 8 --out OUT. Options and parts: bash bench/gpu.sh --help
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
root=$PWD
cd "$here"
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec python3 -m bench.gpu "$@"
