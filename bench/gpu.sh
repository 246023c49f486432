#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network: bash bench/gpu.sh OUT
# Runs on the machine's own Python, from the repository, with nothing installed but pytest and
# hypothesis beside torch and Triton. Prints a short report last; the whole of it is under OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash bench/gpu.sh OUT}
mkdir -p "$out"
export TRITON_DEFAULT_FP_FUSION=1 PYTHONUNBUFFERED=1
python3 - > "$out/machine.txt" <<'PY'
import platform, torch, triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__,
      "python", platform.python_version())
PY
python3 -m pytest tests/kernels --junitxml="$out/kernels.xml" > "$out/kernels.log" 2>&1
code=$?
cat "$out/machine.txt"
grep -E "^(FAILED|ERROR)|passed|failed" "$out/kernels.log" | tail -40
exit $code
