"""A retired word names nothing, and no two classes share a name.

`python tests/test_words.py` prints every place, and how often each word occurs.
"""

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kdrl_train", "kdrl_kernels", "bench", "tests")

WHOLE = {"found", "given", "own", "wanted", "there", "limit", "Answered", "Trace", "Terms"}
"""Retired where they are the whole name, but for underscores at its ends."""

PARTS = {"gap", "gaps", "lag", "ask", "asked", "ahead", "scratch", "lab"}
PARTS |= {"happened", "tinted", "bins"}
"""Retired between underscores too, as in rollout_lag."""


NAME_OF = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "asname"}
NAME_OF |= dict.fromkeys((ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef), "name")
NAME_OF |= dict.fromkeys((ast.ExceptHandler, ast.MatchAs, ast.MatchStar), "name")
NAME_OF |= dict.fromkeys((ast.arg, ast.keyword), "arg")
"""Kind of a node that defines a name -> its attribute that holds it."""


@dataclass(frozen=True, order=True)
class Place:
    """One definition."""

    file: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.name}"


def retired(name: str) -> list[str]:
    """Return the retired words in a name."""
    bare = name.strip("_")
    parts = {part for part in bare.lower().split("_") if part in PARTS}
    return sorted(parts | ({bare} & WHOLE))


def definitions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every variable, argument, attribute, function, class and keyword."""
    for node in ast.walk(tree):
        field = NAME_OF.get(type(node))
        name = getattr(node, field) if field else None
        if name and not isinstance(getattr(node, "ctx", None), ast.Load):
            yield node.lineno, name


def places_in(file: str, source: str) -> list[Place]:
    """List the names in a module that hold a retired word, the module's own name first."""
    names = [(1, part) for part in Path(file).with_suffix("").parts]
    names += definitions(ast.parse(source))
    return [Place(file, line, name) for line, name in names if retired(name)]


def classes_in(file: str, source: str) -> list[Place]:
    """List the public classes of a module, without those inside a class or a function."""
    return [
        Place(file, node.lineno, node.name)
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]


def twins(classes: list[Place]) -> list[str]:
    """Say which places share the name of a class."""
    by_name = defaultdict(list)
    for place in classes:
        by_name[place.name].append(str(place))
    return [" and ".join(places) for places in by_name.values() if len(places) > 1]


def files_of(*packages: str) -> dict[str, str]:
    """Read the Python files of packages: path in the repository -> source."""
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def all_places() -> list[Place]:
    """List every name of the repository that holds a retired word."""
    return [place for file, text in files_of(*PACKAGES).items() for place in places_in(file, text)]


def all_twins() -> list[str]:
    """Say which public classes of the code share a name; tests are free."""
    files = files_of("kdrl_train", "kdrl_kernels", "bench")
    return twins([place for file, source in files.items() for place in classes_in(file, source)])


def test_no_name_holds_a_retired_word() -> None:
    places = [str(place) for place in all_places()]
    assert not places, f"{len(places)} names to change:\n" + "\n".join(places)


def test_no_two_classes_share_a_name() -> None:
    pairs = all_twins()
    assert not pairs, f"{len(pairs)} names for two classes:\n" + "\n".join(pairs)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("found = 1", "found"),
        ("for _gap in (): ...", "_gap"),
        ("def rollout_lag(): ...", "rollout_lag"),
        ("def f(*, stale_gap): ...", "stale_gap"),
        ("self.bins = 1", "bins"),
        ("self.bins: int = 1", "bins"),
        ("f(limit=1)", "limit"),
        ("class Trace: ...", "Trace"),
        ("lambda wanted: 0", "wanted"),
        ("import os as there", "there"),
        ("try: ...\nexcept OSError as given: ...", "given"),
        ("with open('') as own: ...", "own"),
        ("[asked for asked in ()]", "asked"),
        ("(lab := 1)", "lab"),
        ("match 0:\n    case ahead: ...", "ahead"),
    ],
)
def test_a_retired_word_is_seen(source: str, name: str) -> None:
    (place,) = places_in("kdrl_train/step/run.py", source)
    assert str(place) == f"kdrl_train/step/run.py:{len(source.splitlines())}:{name}"


@pytest.mark.parametrize(
    "source", ["limits = flag = task = labels = time_limit = foundation = 1", "print(found)", ""]
)
def test_other_names_are_free(source: str) -> None:
    assert places_in("kdrl_train/step/run.py", source) == []


def test_a_module_with_a_retired_name_is_seen() -> None:
    assert [str(place) for place in places_in("tests/scratch/run.py", "")] == [
        "tests/scratch/run.py:1:scratch"
    ]


def test_twins_are_seen_and_private_and_nested_classes_are_free() -> None:
    first = classes_in("a.py", "class Batch:\n    class Row: ...\nclass _Row: ...")
    second = classes_in("b.py", "\nclass Batch: ...\nclass _Row: ...\nclass Row: ...")
    assert twins(first + second) == ["a.py:1:Batch and b.py:2:Batch"]


def main() -> None:
    """Print the places, and how often each word occurs."""
    places = all_places()
    counts = Counter(word for place in places for word in retired(place.name))
    lines = [*map(str, places), *all_twins()]
    lines += [f"{count:5d} {word}" for word, count in counts.most_common()]
    sys.stdout.write("\n".join([*lines, f"{len(places):5d} in all"]) + "\n")


if __name__ == "__main__":
    main()
