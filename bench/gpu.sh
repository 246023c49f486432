#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network: bash bench/gpu.sh OUT
# (tiles of the row kernels apart, since they take minutes to compile: python3 -m bench.tiles)
# Runs on the machine's own Python, from the repository, with nothing installed but pytest and
# hypothesis beside torch and Triton; pytest-benchmark too, for the speed and memory of each
# operation. Prints a report last, tables at its end. Each part has its own time limit, 530 s in
# all, and leaves what it has under OUT when it is stopped: eight files.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash bench/gpu.sh OUT}
mkdir -p "$out"
export TRITON_DEFAULT_FP_FUSION=1 PYTHONUNBUFFERED=1
limit() { timeout --signal=INT --kill-after=5 "$@"; } # on SIGINT pytest still writes its reports

python3 - > "$out/machine.txt" <<'PY'
import platform, torch, triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__,
      "python", platform.python_version())
PY
limit 200 python3 -m pytest tests/kernels --junitxml="$out/kernels.xml" > "$out/kernels.log" 2>&1
code=$?
limit 80 python3 -m bench.gemms --out "$out" --seconds 50 > "$out/bench.log" 2>&1
if python3 -c "import pytest_benchmark" 2> /dev/null; then
    limit 150 python3 -m pytest bench/ -k speed --benchmark-json="$out/speed.json" \
        >> "$out/bench.log" 2>&1 || code=$?
    limit 80 python3 -m pytest bench/ -k memory --benchmark-json="$out/memory.json" \
        >> "$out/bench.log" 2>&1 || code=$?
else
    echo "pytest-benchmark is not installed: no speed or memory of the operations" \
        >> "$out/bench.log"
fi
{
    cat "$out/machine.txt"
    grep -hE "^(FAILED|ERROR|E  )|passed|failed|not installed" "$out/kernels.log" "$out/bench.log" \
        | tail -60
    [ -s "$out/gemms.json" ] && python3 -m bench.gemms --show "$out/gemms.json"
    reports=()
    for report in "$out/speed.json" "$out/memory.json"; do
        [ -s "$report" ] && reports+=("$report")
    done
    [ ${#reports[@]} -gt 0 ] && python3 -m bench.table "${reports[@]}"
} > "$out/report.md" 2>&1
cat "$out/report.md"
exit "$code"
