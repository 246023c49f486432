#!/usr/bin/env bash
# Builds the sdist and the wheel, and installs both without extras: bash tests/wheel.sh [PYTHON ...]
# PYTHON: interpreters to install on, each into a fresh environment; by default those of python3.11,
# python3.12 and python3.13 that are there. pip brings torch: a CUDA build has several GB.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD pythons=("$@")
[ $# -gt 0 ] || pythons=(python3.11 python3.12 python3.13)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

python3 -m venv "$work/tools"
"$work/tools/bin/pip" install -q --no-compile build twine
"$work/tools/bin/python" -m build --outdir "$work/dist" . > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
wheel=$(echo "$work"/dist/*.whl) sdist=$(echo "$work"/dist/*.tar.gz)
"$work/tools/bin/twine" check --strict "$wheel" "$sdist"

# The wheel holds the files of both packages and no others. It was built from the sdist, as build does.
git ls-files kdrl_kernels kdrl_train | sort > "$work/tracked"
python3 -c 'import sys, zipfile; print(*zipfile.ZipFile(sys.argv[1]).namelist(), sep="\n")' "$wheel" |
    grep -v '\.dist-info/' | sort | diff "$work/tracked" - # < is missing, > is too much
tar -tzf "$sdist" | (! grep -E '^[^/]+/(tests|bench)/')    # neither has a part of the tests

# most modules that torch brings are never imported: none is compiled before it is
install=("$work/tools/bin/pip" --python "$work/venv" install -q --no-compile)
for python in "${pythons[@]}"; do
    if ! "$python" -c "" 2> "$work/log"; then
        printf '%s is not there: %s\n' "$python" "$(head -n 1 "$work/log")"
        continue
    fi
    "$python" -m venv --without-pip "$work/venv"
    "${install[@]}" -c constraints.txt "$wheel"
    (cd "$work" && venv/bin/python -I "$root/tests/wheel_smoke.py")
    "${install[@]}" --no-deps --force-reinstall "$sdist"
    (cd "$work" && venv/bin/python -I "$root/tests/wheel_smoke.py")
    rm -rf "$work/venv"
done
