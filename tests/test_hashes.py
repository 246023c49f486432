""".ci/hashes.txt pins, with hashes, what constraints.txt pins."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
HASHES = (ROOT / ".ci" / "hashes.txt").read_text("utf-8")


def pins(text: str) -> dict[str, set[str]]:
    """Map the name of each package to the versions that a file pins it to."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE):
        versions.setdefault(canonicalize_name(name), set()).add(version)
    return versions


def test_both_files_pin_the_same_versions() -> None:
    hashed, plain = pins(HASHES), pins((ROOT / "constraints.txt").read_text("utf-8"))
    both = hashed.keys() & plain.keys()
    assert {name: hashed[name] for name in both} == {name: plain[name] for name in both}
    needed = {"torch", "transformers", "tokenizers", "safetensors", "datasets", "pytest", "uvicorn"}
    assert needed <= both


def test_every_pin_has_its_hashes_and_no_place() -> None:
    blocks = re.findall(r"^[\w.-]+==.*?(?=^[\w.-]+==|\Z)", HASHES, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 80
    for block in blocks:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
    assert not re.search(r"://|^-", HASHES, re.MULTILINE)


def test_every_dependency_of_the_tests_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    declared: dict[str, dict[str, list[str]]] = {}
    monkeypatch.setattr("setuptools.setup", lambda **more: declared.update(more))
    monkeypatch.setattr("sys.argv", ["setup.py"])
    source = (ROOT / "setup.py").read_text("utf-8")
    exec(compile(source, str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})
    hashed = pins(HASHES)
    for text in [*declared["install_requires"], *declared["extras_require"]["dev"]]:
        requirement = Requirement(text)
        versions = hashed[canonicalize_name(requirement.name)]
        assert any(requirement.specifier.contains(version) for version in versions), text
