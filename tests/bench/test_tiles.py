"""Tests which kernels the search for tiles compiles."""

from typing import Any

import pytest

from bench import tiles
from kdrl_kernels.rows.tiles import TILES, Tile
from tests.kernels import aot


def test_the_kernels_of_the_table_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def compile_one(variant: aot.Variant, *_: Any, **__: Any) -> None:
        names.append(variant[0])

    monkeypatch.setattr(aot, "compile_one", compile_one)
    monkeypatch.setattr(aot, "resources", lambda _: {"registers": 40})
    monkeypatch.setattr(aot, "instructions", lambda _, streams: 10.0 / streams)
    rows = list(tiles.compiled(Tile(1, 512, 4)))
    assert {key for key, _ in rows} == TILES.keys()
    assert {one["registers"] for _, one in rows} == {40}
    streams = {name: 10 / one["instructions"] for name, (_, one) in zip(names, rows, strict=True)}
    assert streams["sweep-None"] == 1
    assert streams["sweep-jsd"] == streams["sketch-fkl"] == 2
    assert streams["sketch-rkl"] == 1, "it reads the teacher only where there are entries"
