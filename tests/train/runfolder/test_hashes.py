"""One bit of a checkpoint that has changed on the disk is found before the file is read."""

import hashlib
import json
import os
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kdrl_train.config import TrainConfig
from kdrl_train.ranks import ALONE, World
from kdrl_train.runfolder import checkpoint, hashes
from kdrl_train.runfolder.async_saver import Saver

CONFIG = TrainConfig(samples_per_step=3)
FILES = ("__0_0.distcp", ".metadata", "rollouts.pt", "meta.json")
damaged = pytest.mark.fault("flipped or cut file")
Tried = Callable[[str, int], None]


@pytest.fixture(scope="module", params=["waits", "save_async"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, saved while the trainer waits or in a thread; tests leave it whole."""
    model, optimizer = trained()
    out = tmp_path_factory.mktemp("run")
    config = replace(CONFIG, out=out, save_async=request.param == "save_async")
    saver = Saver(config, ALONE, print, {"data": {"count": 3, "sha256": "ab"}})
    saver.save(1, model, optimizer, {"texts": ["drawn"], "lengths": torch.arange(9)})
    saver.check(wait=True)
    saver.close()
    return out / "checkpoints" / "step_000001"


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    return model, optimizer


def refusal(place: Path) -> str:
    """Say how a resume and --model.weights refuse a checkpoint; both must, with one message."""
    model, optimizer = trained()
    before = model.weight.clone()
    with pytest.raises(ValueError, match=r"must") as first:
        checkpoint.load(checkpoint.latest(place.parent), model=model, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"must") as second:
        checkpoint.load_weights(place, model)
    assert torch.equal(model.weight, before)
    assert str(first.value) == str(second.value)
    return str(first.value)


@damaged
@pytest.mark.parametrize("name", FILES)
def test_one_bit_is_found_wherever_it_is(place: Path, name: str, record_property: Tried) -> None:
    path, draw = place / name, random.Random(0)
    whole = path.read_bytes()
    places = [0, len(whole) // 2, len(whole) - 1]
    places += [draw.randrange(len(whole)) for _ in range(9)]
    record_property("tried", len(places))
    try:
        for position in places:
            content = bytearray(whole)
            content[position] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
            message = refusal(place)
            assert name in message
            assert f"delete {place}" in message.replace("delete it", f"delete {place}")
            assert "from the previous checkpoint" in message
    finally:
        path.write_bytes(whole)
    model, optimizer = trained()
    newest = checkpoint.latest(place.parent)
    assert checkpoint.load(newest, model=model, optimizer=optimizer) == 1
    assert checkpoint.load_weights(place, model) == checkpoint.unchecked(newest) == []


@damaged
def test_no_bit_of_meta_json_may_change(
    place: Path, tmp_path: Path, record_property: Tried
) -> None:
    """Also where it changes no value, such as the case of 1e-06."""
    whole = (place / "meta.json").read_bytes()
    expected = rf"{tmp_path} must be a checkpoint folder with a meta.json, got \w+Error"
    telling = (b"e-06", b"files", b"sha256", hashes.SEAL.encode())
    positions = [*range(0, len(whole), 401), *(whole.index(key) for key in telling)]
    record_property("tried", 8 * len(positions))
    for position in positions:
        for bit in range(8):
            content = bytearray(whole)
            content[position] ^= 1 << bit
            (tmp_path / "meta.json").write_bytes(content)
            with pytest.raises(ValueError, match=expected):
                checkpoint.read(tmp_path)


def test_the_hashes_are_those_of_the_files(place: Path) -> None:
    meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
    expected = {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in FILES[:3]}
    assert meta["sha256"] == expected
    assert set(meta["files"]) == set(expected)


def test_ranks_check_each_file_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(checkpoint, "require_same", lambda *a: checked.extend(a[2]))
    monkeypatch.setattr(World, "share", lambda _world, make: [make()])
    newest = checkpoint.latest(place.parent)
    for rank in range(2):
        checkpoint.check_files(newest, World(rank, 2))
    assert checked[0] == "__0_0.distcp"  # the largest first
    assert sorted(checked) == sorted(FILES[:3])


def test_a_file_that_grows_is_hashed_whole(tmp_path: Path) -> None:
    """Its hash is that of the end, with parts that are longer and shorter than one read."""

    parts = [bytes(5), b"x" * (hashes.CHUNK + 3), b"", b"end"]
    expected = hashlib.sha256(b"".join(parts)).hexdigest()

    def write_the_next(_seconds: float) -> None:
        file.write(parts.pop(0))
        file.flush()

    with (tmp_path / "file").open("wb") as file:
        written: Any = SimpleNamespace(is_set=lambda: not parts, wait=write_the_next)
        assert hashes._follow(tmp_path / "file", written) == expected


def test_switched_off_they_are_neither_written_nor_compared(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = checkpoint.RunState(
        step=1, model=model, optimizer=optimizer, config=replace(CONFIG, checkpoint_hashes=False)
    )
    place = checkpoint.save(tmp_path, state)
    newest = checkpoint.latest(tmp_path)
    assert newest.hashes == {}
    (warning,) = checkpoint.load_weights(place, model)
    assert "has no hashes of its files" in warning
    assert checkpoint.load_weights(place, model, hashes=False) == []
    checkpoint.save(tmp_path, replace(state, config=CONFIG))
    path = place / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    position = content.index(model.bias.detach().numpy().tobytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must have the SHA-256"):
        checkpoint.load_weights(place, model)
    other, _ = trained()
    assert checkpoint.load_weights(place, other, hashes=False) == []
    assert not torch.equal(other.bias, model.bias)  # as whoever switches it off must know


@pytest.mark.fault("hostile checkpoint")
def test_meta_json_of_a_stranger(tmp_path: Path) -> None:
    place = tmp_path / "step_000001"
    place.mkdir()
    (tmp_path / "outside").touch()
    older = {"step": 1, "config": {}, "torch": "2", "files": {"../outside": 0}}
    odd = [older | {"step": "1"}, older | {"config": []}]
    texts = [
        *map(json.dumps, [older, *odd]),
        "[]",
        "1",
        '{"step": 1, "config": {}, "files": 7}',
        "[" * 100_000,
    ]
    for text in texts:
        (place / "meta.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"no such file: the checkpoint|with a meta\.json, got"
        ):
            checkpoint.read(place)


def test_sections_of_another_kind(place: Path, tmp_path: Path) -> None:
    meta = hashes.unsealed((place / "meta.json").read_text())
    for value in (7, None, [], "x"):
        for change in (
            {"config": meta["config"] | {"model": value}},
            {"config": meta["config"] | {"reward": value}},
            {"data": {"data": value}},
            {"data": {"data": {"count": [value]}}},
        ):
            (tmp_path / "meta.json").write_text(hashes.sealed(meta | change))
            with pytest.raises(ValueError, match=r"with a meta\.json, got "):
                checkpoint.read(tmp_path)


@pytest.mark.fault("hostile checkpoint")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sha256": {".metadata": "ab"}}, "hashes of other files than it has"),
        ({"sha256": dict.fromkeys((*FILES[:3], "no_file"), "ab")}, "hashes of other files"),
        ({"data": 7}, "another kind of value"),
        (None, "no regular file"),
    ],
    ids=["too few", "too many", "data", "pipe"],
)
def test_a_sealed_meta_json_of_a_stranger(
    place: Path, tmp_path: Path, change: dict[str, Any] | None, told: str
) -> None:
    path = tmp_path / "meta.json"
    meta = hashes.unsealed((place / "meta.json").read_text())
    if change is None:
        os.mkfifo(path)
    else:
        path.write_text(hashes.sealed(meta | change))
    # whoever reads the pipe waits for ever; the test only until then
    end = threading.Timer(1, lambda: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK)))
    end.start()
    with pytest.raises(ValueError, match=rf"with a meta\.json, got .*{told}"):
        checkpoint.read(tmp_path)
    end.cancel()
