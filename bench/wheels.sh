#!/usr/bin/env bash
# Fills a folder with the wheels that bench/gpu.sh installs where there is no network:
#   bash bench/wheels.sh [FOLDER]    (default: wheels)
# For Python 3.12 on Linux x86-64, at the versions of constraints.txt and bench/peers.txt. Torch,
# triton, transformers, numpy, scipy, pandas, pyarrow, pytest, hypothesis, matplotlib, jinja2, rich,
# protobuf, einops and peft are taken to be on the machine. Says how large the folder is, and fails beyond 64 MiB.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-wheels}
needs=(
    # the trainer
    pydantic annotated-types typing-inspection
    pebble math-verify latex2sympy2_extended antlr4-python3-runtime
    tyro typeguard docstring-parser httpx2 httpcore2 truststore
    # peers; TRL's backward pass imports datasets. QuACK is left out: it is written in CUTLASS's
    # Python, whose compiler, nvidia-cutlass-dsl-libs-cu13, has 92 MB alone
    liger-kernel==0.8.5 trl cut-cross-entropy==25.1.1
    flash-linear-attention==0.6.0 fla-core
    datasets dill multiprocess
    pytest-xdist execnet # one option of it is of version 3.8
)
platforms=()
for glibc in 39 35 34 31 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
fetch=(python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12
    --implementation cp "${platforms[@]}" -d "$folder")
"${fetch[@]}" -c constraints.txt "${needs[@]}"
# pydantic imports no other version of its core than the one it names
core=$(unzip -p "$folder"/pydantic-[0-9]*.whl '*/METADATA' \
    | sed -nE 's/^Requires-Dist: pydantic[-_]core==([0-9.]+).*/\1/p')
"${fetch[@]}" "pydantic_core==$core"
"${fetch[@]}" "$(grep ^verl== bench/peers.txt)"
size=$(du -sm "$folder" | cut -f1)
echo "$folder: $(ls "$folder" | wc -l) wheels, $size MB"
test "$size" -lt 64 || { echo "at most 64 MiB travel: leave the largest out"; exit 1; }
