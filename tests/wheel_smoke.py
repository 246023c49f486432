"""Examines an installed kdrl-kernels: `python -I wheel_smoke.py`, in a folder without its source.

Run by tests/wheel.sh in environments that have no extra, so it imports nothing but torch.
"""

import importlib
import math
import re
import subprocess
import sys
from importlib.metadata import metadata, version
from importlib.resources import files

import torch

import kdrl_kernels as kk

HOSTS = {"trl": "kdrl-kernels[trl]", "verl": "kdrl-kernels[verl]", "swift": "ms-swift==4.6.*"}
"""Modules of kdrl_kernels.integrations -> what pip installs for them."""


def check_files() -> None:
    """What is no module came too: type marks, guides, the template of the report."""
    assert "site-packages" in str(files("kdrl_kernels")), files("kdrl_kernels")
    assert kk.__version__ == version("kdrl-kernels")
    for package, path in (
        ("kdrl_kernels", "py.typed"),
        ("kdrl_kernels", "rows/README.md"),
        ("kdrl_kernels", "rows/COST.md"),
        ("kdrl_kernels", "rows/SKETCH.md"),
        ("kdrl_kernels", "integrations/README.md"),
        ("kdrl_train", "py.typed"),
        ("kdrl_train", "tools/report/page.html.j2"),
        ("kdrl_train", "tools/report/style.css"),
    ):
        assert files(package).joinpath(path).read_text(encoding="utf-8") or path == "py.typed"
    text = str(metadata("kdrl-kernels").get_payload())
    assert text.startswith("# kdrl-kernels")
    assert "](kdrl_" not in text, "a link of README.md leads into the repository"


def check_loss() -> None:
    """One row over two tokens, by hand: p = (3/4, 1/4), teacher q = (1/2, 1/2), advantage 2.

    The loss is -2 + 0.1 KL(p, q). d KL / d logit_v = p_v (log(p_v / q_v) - KL).
    """
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[math.log(3.0)], [0.0]], requires_grad=True)
    out = kk.kdrl_loss(
        hidden,
        weight,
        torch.tensor([0]),
        advantages=torch.tensor([2.0]),
        teacher=kk.TeacherHead(torch.ones(1, 1), torch.zeros(2, 1)),
        normalizer=1,
        objective=kk.Objective(policy="clip", kd="rkl", kd_coef=0.1),
    )
    out.loss.backward()
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    d_first = -2 * 0.25 + 0.1 * 0.75 * (math.log(1.5) - kl)
    assert weight.grad is not None
    assert torch.allclose(out.loss, torch.tensor(-2 + 0.1 * kl))
    assert torch.allclose(out.logprobs, torch.tensor([math.log(0.75)]))
    assert torch.allclose(weight.grad, torch.tensor([[d_first], [-d_first]]))


def check_missing_extras() -> None:
    """What needs an extra says in one line which command installs it."""
    done = subprocess.run(
        [sys.executable, "-m", "kdrl_train"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the packages of the extra train must be installed, got "), line
    assert line.endswith(": pip install 'kdrl-kernels[train]'"), line
    for host, needed in HOSTS.items():
        line = ""
        try:
            importlib.import_module(f"kdrl_kernels.integrations.{host}")
        except ImportError as error:
            line = str(error)
        assert re.search(f"pip install ['\"]{re.escape(needed)}['\"]", line), line
        assert "\n" not in line, line


if __name__ == "__main__":
    check_files()
    check_loss()
    check_missing_extras()
    print(f"kdrl-kernels works on Python {sys.version.split()[0]} with torch {torch.__version__}")
