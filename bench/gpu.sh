#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network, on the machine's own Python:
#   bash bench/wheels.sh                               where there is a network: fills ./wheels
#   bash bench/gpu.sh OUT --archive FILE.tar.gz        there, with ./wheels; FILE holds all of OUT
#   bash bench/gpu.sh OUT2 --parts curve               what had no time, once more
# Wheels are installed first, without their dependencies. Options and parts: bash bench/gpu.sh --help
# Apart, since they take minutes: tiles of the row kernels, python3 -m bench.tiles --out DIR, and the
# scoreboard at its full length, python3 -m bench --minutes 8 --out DIR.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
root=$PWD
cd "$here"
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec python3 -m bench.gpu "$@"
