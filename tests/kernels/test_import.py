"""`import kdrl_kernels` loads little, and works without Triton."""

import subprocess
import sys

import pytest

NO_TRITON = "import sys; sys.modules['triton'] = None\n"
SMALL_LOSS = """
import torch, kdrl_kernels as kk
x = torch.ones(2, 3, requires_grad=True)
kk.kdrl_loss(x, torch.eye(5, 3), torch.arange(2), advantages=torch.ones(2),
             objective=kk.Objective(kd=None), impl={impl}).loss.backward()
assert x.grad.abs().sum() > 0
"""


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_is_light() -> None:
    code = "import sys, kdrl_kernels; print(*sorted(sys.modules))"
    modules = _run(code).stdout.split()
    assert "kdrl_kernels.one_pass" in modules
    assert "transformers" not in modules
    assert "kdrl_kernels.rows.kernels" not in modules


def test_works_without_triton() -> None:
    result = _run(NO_TRITON + SMALL_LOSS.format(impl=None))
    assert result.returncode == 0, result.stderr


@pytest.mark.slow  # a process each
@pytest.mark.parametrize("where", ["not installed", "no gpu"])
def test_named_triton_does_not_fall_back(where: str) -> None:
    code = SMALL_LOSS.format(impl="'triton'")
    if where == "not installed":
        message = "impl must be 'torch' or 'reference' where Triton is not installed"
        code = NO_TRITON + code
    else:
        message = "impl='triton' must get GPU tensors, got hidden on cpu"
        code = "import os; os.environ.pop('TRITON_INTERPRET', None)\n" + code
    result = _run(code)
    assert result.returncode == 1
    assert message in result.stderr
