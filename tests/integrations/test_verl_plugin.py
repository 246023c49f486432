"""verl loads the plugin; another version of verl, or none, is refused in one line."""

import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from kdrl_kernels.integrations import versions

MODULE = "kdrl_kernels.integrations.verl"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of its own."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"VERL_PLATFORM": "nvidia"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("release", "line"),
    [
        ("0.8.2", "verl must be of release 0.9, got 0.8.2:"),
        ("0.10.0", "verl must be of release 0.9, got 0.10.0:"),
        (None, 'verl 0.9 must be installed: pip install "kdrl-kernels[verl]"'),
    ],
)
def test_another_version_is_refused_in_one_line(
    release: str | None,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def version(name: str) -> str:
        if release is None:
            raise PackageNotFoundError(name)
        return release

    monkeypatch.setattr(versions, "version", version)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match=f"^{re.escape(line)}") as refused:
        importlib.import_module(MODULE)
    (record,) = caplog.records  # verl hides what is raised, not what is logged
    assert (record.name, record.levelname) == (MODULE, "WARNING")
    assert record.getMessage() == str(refused.value)


@pytest.mark.verl
@pytest.mark.parametrize("way", ["entry point", "module"])
def test_verl_loads_it(way: str) -> None:
    by_point = way == "entry point"
    environment = {
        "VERL_USE_EXTERNAL_PLUGINS": "auto" if by_point else "none",
        "VERL_USE_EXTERNAL_MODULES": "" if by_point else MODULE,
    }
    code = (
        "import sys, verl\n"
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn\n"
        "print(get_policy_loss_fn('kdrl').__module__)\n"
        "print('verl.workers.engine' in sys.modules)\n"
    )
    done = python(code, **environment)
    assert done.stdout.splitlines()[-2:] == [f"{MODULE}.losses", "False"], done.stderr


@pytest.mark.verl
def test_verl_without_it_has_no_such_loss() -> None:
    code = "from verl.trainer.ppo.core_algos import get_policy_loss_fn as get\nget('kdrl')"
    done = python(code, VERL_USE_EXTERNAL_PLUGINS="none")
    assert "Unsupported loss mode: kdrl" in done.stderr
