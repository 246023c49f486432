"""A user's module that cannot be imported ends a command with one line that says where."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kdrl_train.method.config import MethodConfig
from kdrl_train.method.own_loss import load_loss
from kdrl_train.rollouts.rewards import load_reward

LOADERS: dict[str, Callable[[str], object]] = {
    "reward.function": load_reward,
    "method.loss": lambda name: load_loss(MethodConfig(loss=name, kd=None)),
}


@pytest.mark.parametrize("key", LOADERS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n    pass", r"got SyntaxError: .*{name}\.py, line 1"),
        ("\nfrom math import tau2", r"got .*{name}\.py, line 2: ImportError: cannot import name"),
        ("a = 1\nb = c", r"got .*{name}\.py, line 2: NameError: name 'c' is not defined: correct"),
        ("raise SystemExit(3)", r"got .*{name}\.py, line 1: SystemExit: 3: correct it"),
        ("raise ValueError('a\\nb')", r"got .*{name}\.py, line 1: ValueError: a b: correct it"),
        ("import no_such_package", r"No module named 'no_such_package'; install it or run from"),
    ],
    ids=["syntax", "import", "name", "exit", "lines", "package"],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    key: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"broken_{key[:6]}_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=message.format(name=name)) as error:
        LOADERS[key](f"{name}:f")
    assert str(error.value).startswith(f"{key} must be ")
    assert "\n" not in str(error.value)
