"""Imports between the rooms of the trainer go down, never up, and no modules form a circle.

The imports are read from the source, so that those inside functions, those under TYPE_CHECKING and
modules named by a string (importlib.import_module, the preload of a forkserver) count too.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = (
    ("tools",),
    ("train",),
    ("start",),
    ("step",),
    ("rollouts",),
    ("model", "runfolder"),
    ("config",),
    ("method",),
    ("batch",),
    ("exchange", "ranks"),
    ("watch",),
    ("copies", "errors", "hub", "output", "proxies", "settings", "waiting"),
)
"""The rooms of kdrl_train, from the highest to the lowest; rooms of one floor do not meet."""

SHARED = {
    "cli": "tools",
    "commands": "tools",
    "options": "tools",
    "__main__": "tools",
    "config_file": "config",
    "__init__": "errors",
    "regroup": "ranks",
    "other_names": "settings",
}
"""Modules that stand beside the rooms, and the room whose rules they follow."""

HOSTS = "kdrl_kernels.integrations"
"""Code for other people's trainers, above both packages: it may import either."""

DYNAMIC = "*"
"""The last part of a module's name that is made up while the program runs."""

Sources = Mapping[str, str]
"""Module -> its source, for the modules of one package; `pkg.__init__` for the package itself."""

Import = tuple[str, int, str]
"""Importing module, line, imported module: a module of `sources`, or a name outside of them."""


def sources_of(package: str) -> Sources:
    """Read every module of a package of this repository."""
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths, f"{package} must be a package of this repository"
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in paths
    }


def imports_of(sources: Sources) -> list[Import]:
    """List every import of every module, wherever it stands in the module."""
    return [
        (module, line, _resolve(name, sources))
        for module, source in sources.items()
        for line, name in _names(
            module, ast.parse(source), {name.split(".")[0] for name in sources}
        )
    ]


def _names(module: str, tree: ast.AST, packages: set[str]) -> Iterator[tuple[int, str]]:
    """Line and full name of whatever `module` imports; for `from a import b` the name is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.JoinedStr) and _starts_in(node, packages):
            yield node.lineno, f"{node.values[0].value}{DYNAMIC}"  # type: ignore[attr-defined]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split(".")
            if len(parts) > 1 and parts[0] in packages and all(map(str.isidentifier, parts)):
                yield node.lineno, node.value


def _starts_in(node: ast.JoinedStr, packages: set[str]) -> bool:
    """Say whether an f-string begins like the name of a module of one of the packages."""
    first = node.values[0]
    return isinstance(first, ast.Constant) and str(first.value) in {f"{one}." for one in packages}


def _resolve(name: str, sources: Sources) -> str:
    """Find the module that holds `name`: the longest prefix which is a module of `sources`."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        for known in (module, f"{module}.__init__"):
            if known in sources and not (end == 1 and parts[-1] == DYNAMIC):
                return known
    return name


def room_of(module: str) -> str:
    """Name the room of a module of kdrl_train, or "*" where the module is known at run time."""
    part = module.split(".")[1]
    return SHARED.get(part, part)


def upward(sources: Sources) -> list[str]:
    """List the imports that go up, or to the other room of the same floor."""
    floor = {room: depth for depth, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for module, line, name in imports_of(sources):
        if name.split(".")[0] != "kdrl_train":
            continue
        here, target = room_of(module), room_of(name)
        depth = 0 if target == DYNAMIC else floor[target]  # it may be any module
        if here != target and depth <= floor[here] and floor[here] > 0:
            wrong.append(f"{module}:{line} ({here}) imports {name} ({target})")
    return wrong


def circle(sources: Sources, depth: int | None = None) -> list[str]:
    """Return the modules of one circle of imports, or an empty list.

    depth: how many parts of a name tell modules apart: with 2, a.b.c and a.b.d are both a.b.
    """

    def short(module: str) -> str:
        return ".".join(module.split(".")[:depth])

    graph: dict[str, set[str]] = {short(module): set() for module in sources}
    for module, _, name in imports_of(sources):
        if name in sources and short(name) != short(module):
            graph[short(module)].add(short(name))
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def foreign(sources: Sources, packages: set[str]) -> list[str]:
    """List the imports of the packages named."""
    return [
        f"{module}:{line} imports {name}"
        for module, line, name in imports_of(sources)
        if name.split(".")[0] in packages
    ]


def test_every_module_of_the_trainer_has_a_room() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert {room_of(module) for module in sources_of("kdrl_train")} == set(rooms)
    assert len(rooms) == len(set(rooms))


def test_imports_of_the_trainer_go_down() -> None:
    assert upward(sources_of("kdrl_train")) == []


@pytest.mark.parametrize("package", ["kdrl_train", "bench"])
def test_no_imports_form_a_circle(package: str) -> None:
    assert circle(sources_of(package)) == []


def test_no_rooms_of_the_kernels_form_a_circle() -> None:
    """Inside kdrl_kernels.rows the package, which is the interface, loads its modules late."""
    assert circle(sources_of("kdrl_kernels"), depth=2) == []


def test_packages_know_only_those_below_them() -> None:
    kernels, trainer = sources_of("kdrl_kernels"), sources_of("kdrl_train")
    hosts = {name for name in kernels if name.startswith(HOSTS)}
    alone = {name: source for name, source in kernels.items() if name not in hosts}
    assert foreign(alone, {"kdrl_train", "bench", "tests"}) == []
    assert foreign(kernels, {"bench", "tests"}) == []
    assert foreign(trainer, {"bench", "tests"}) == []


def test_only_hosts_import_what_was_made_for_them() -> None:
    for package in ("kdrl_kernels", "kdrl_train"):  # bench/ measures them
        for module, line, name in imports_of(sources_of(package)):
            assert module.startswith(HOSTS) or not name.startswith(HOSTS), f"{module}:{line}"


def test_what_flows_is_made_of_torch_alone() -> None:
    batch = {"kdrl_train.batch": sources_of("kdrl_train")["kdrl_train.batch"]}
    packages = {name.split(".")[0] for _, _, name in imports_of(batch)}
    assert packages <= {"torch", *sys.stdlib_module_names}


def test_the_readme_of_the_trainer_names_the_rooms_in_this_order() -> None:
    """One paragraph or list of kdrl_train/README.md names all rooms, from high to low."""
    text = (ROOT / "kdrl_train" / "README.md").read_text(encoding="utf-8")
    rooms = [room for floor in FLOORS[: FLOORS.index(("batch",)) + 1] for room in floor]
    assert any(names_in_order(block, rooms) for block in text.split("\n\n")), rooms


def names_in_order(text: str, rooms: list[str]) -> bool:
    """Say whether the words `rooms` occur in `text` one after the other, other words between."""
    words = iter("".join(char if char.isalnum() or char == "_" else " " for char in text).split())
    return all(any(word == room for word in words) for room in rooms)


# the rules themselves, on sources that are made up


@pytest.mark.parametrize(
    "statement",
    [
        "from kdrl_train import train",
        "from kdrl_train.train import main",
        "import kdrl_train.train as loop",
        "from ..train import main",
        "def late():\n    from kdrl_train.train import main",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kdrl_train.train import Run",
        "import importlib\nloop = importlib.import_module('kdrl_train.train')",
        "import importlib\nloop = importlib.import_module(f'kdrl_train.{name}')",
    ],
)
def test_an_import_that_goes_up_is_seen(statement: str) -> None:
    loop = "from kdrl_train.step.run import Run\n"
    sources = {"kdrl_train.train": loop, "kdrl_train.step.run": statement}
    (wrong,) = upward(sources)
    line = len(statement.splitlines())
    assert wrong.startswith(f"kdrl_train.step.run:{line} (step) imports kdrl_train."), wrong
    assert upward(sources | {"kdrl_train.step.run": "import torch"}) == []


def test_rooms_of_one_floor_do_not_meet() -> None:
    sources = {"kdrl_train.model.policy": "import kdrl_train.runfolder.log"}
    assert upward(sources | {"kdrl_train.runfolder.log": ""}) == [
        "kdrl_train.model.policy:1 (model) imports kdrl_train.runfolder.log (runfolder)"
    ]
    assert (
        upward({"kdrl_train.model.a": "import kdrl_train.model.b", "kdrl_train.model.b": ""}) == []
    )


def test_a_circle_is_seen() -> None:
    sources = {
        "p.a": "from p.b import x",
        "p.b": "def late():\n    import p.c",
        "p.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import a",
        "p.d": "import p.a",
    }
    assert set(circle(sources)) == {"p.a", "p.b", "p.c"}
    assert circle(sources | {"p.c": "import torch"}) == []
    rooms = {"p.a.x": "import p.b.y", "p.b.y": "", "p.b.z": "import p.a.x"}
    assert circle(rooms) == []
    assert set(circle(rooms, depth=2)) == {"p.a", "p.b"}


def test_a_foreign_package_is_seen() -> None:
    sources = {"kdrl_kernels.api": "import torch\ndef f():\n    from kdrl_train.ranks import World"}
    assert foreign(sources, {"kdrl_train"}) == ["kdrl_kernels.api:3 imports kdrl_train.ranks.World"]
    assert foreign(sources, {"bench"}) == []


def test_the_order_of_names_is_seen() -> None:
    assert names_in_order("`tools`, then `train.py`\n> start/", ["tools", "train", "start"])
    assert not names_in_order("start, tools, train", ["tools", "train", "start"])
    assert not names_in_order("tools, training, start", ["tools", "train", "start"])
