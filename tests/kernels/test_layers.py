"""Modules of kdrl_kernels import each other in the order of MODULES.md, and never upwards."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdrl_kernels

PACKAGE = "kdrl_kernels"
FOLDER = Path(kdrl_kernels.__file__).parent


def _module(path: Path) -> str:
    """Return the name of a file of the package, "rows.eager" for rows/eager.py."""
    parts = path.relative_to(FOLDER).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in sorted(FOLDER.rglob("*.py"))}


def _order() -> list[str]:
    """Return the modules in the order of MODULES.md, lowest first."""
    text = (FOLDER / "MODULES.md").read_text(encoding="utf-8")
    block = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert block is not None
    names = (line.split()[0] for line in block[1].splitlines())
    return [_module(FOLDER / name) for name in names]


def _imports(source: str, modules: set[str]) -> Iterator[str]:
    """Yield the modules of the package that a source imports anywhere, in functions too."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                path = name.removeprefix(PACKAGE).removeprefix(".")
                # from package.module import name
                yield path if path in modules else path.rpartition(".")[0]


def _upward(order: list[str], sources: dict[str, str]) -> list[tuple[str, str]]:
    """Return the imports that do not go down the order: (module, what it imports)."""
    place = {name: i for i, name in enumerate(order)}
    return [
        (name, imported)
        for name, source in sources.items()
        for imported in _imports(source, set(place))
        if place[imported] >= place[name]
    ]


def test_every_module_is_listed_once() -> None:
    assert sorted(_order()) == sorted(MODULES)


def test_imports_go_down() -> None:
    """So there is no circle."""
    sources = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    assert sum(1 for source in sources.values() for _ in _imports(source, set(MODULES))) > 40
    assert _upward(_order(), sources) == []


def test_no_import_is_for_type_checkers_alone() -> None:
    for name, path in MODULES.items():
        assert "TYPE_CHECKING" not in path.read_text(encoding="utf-8"), name


@pytest.mark.parametrize(
    "line",
    [
        "import kdrl_kernels.b",
        "from kdrl_kernels import b",
        "from kdrl_kernels.b import f",
        "from kdrl_kernels import f",
        "def g():\n    from kdrl_kernels.b import f",
    ],
)
def test_an_upward_import_is_seen(line: str) -> None:
    target = "" if line == "from kdrl_kernels import f" else "b"
    assert _upward(["a", "b", ""], {"a": line}) == [("a", target)]
    assert _upward([target, "a"], {"a": line}) == []
