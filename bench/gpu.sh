#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network: bash bench/gpu.sh OUT
# (tiles of the row kernels apart, since they take minutes to compile: python3 -m bench.tiles;
# the scoreboard at its full length too: python3 -m bench --minutes 8 --out OUT)
# Runs on the machine's own Python, from the repository. Wheels in ./wheels, which bench/wheels.sh
# downloads, are installed first, without their dependencies; the scoreboard times whichever
# libraries it finds.
# Prints a report last, tables at its end. Each part has its own time limit, 570 s in all, and
# leaves what it has under OUT when it is stopped.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash bench/gpu.sh OUT}
mkdir -p "$out"
export TRITON_DEFAULT_FP_FUSION=1 PYTHONUNBUFFERED=1
within() { timeout --signal=INT --kill-after=5 "$@"; } # on SIGINT pytest still writes its reports
tests=(python3 -m pytest -o addopts= -q -m "not slow and not vllm") # one process: there is one GPU

wheels=(wheels/*.whl)
if [ -e "${wheels[0]}" ]; then
    python3 -m pip install --no-index --no-deps "${wheels[@]}" > "$out/wheels.log" 2>&1 \
        || echo "some wheels were not installed: see wheels.log"
fi
python3 - > "$out/machine.txt" <<'PY'
import platform, torch, triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__,
      "python", platform.python_version())
PY
within 190 "${tests[@]}" tests/kernels --junitxml="$out/kernels.xml" > "$out/kernels.log" 2>&1
code=$?
within 120 "${tests[@]}" tests/train/test_gpu.py > "$out/train.log" 2>&1 || code=$?
within 50 python3 -m bench.gemms --out "$out" --seconds 40 > "$out/gemms.log" 2>&1
within 60 python3 -m bench.measures.sketch --out "$out" --minutes 1 --profiles reasoning hard \
    > "$out/sketch.log" 2>&1
within 150 python3 -m bench --minutes 2 --out "$out" > "$out/bench.log" 2>&1 || code=$?
{
    cat "$out/machine.txt"
    grep -hE "^(FAILED|ERROR|E  )|passed|failed" "$out/kernels.log" "$out/train.log" | tail -40
    grep -hE "not installed|failed|differs" "$out/bench.log" | tail -40
    cat "$out"/sketch-*.md
    [ -s "$out/gemms.json" ] && python3 -m bench.gemms --show "$out/gemms.json"
    [ -s "$out/results.json" ] && python3 bench/report.py "$out" --short
} > "$out/report.md" 2>&1
cat "$out/report.md"
exit "$code"
