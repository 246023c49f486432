"""A folder or file that somebody else has made runs nothing: it is refused, or only read."""

import io
import json
import os
import pickle
import random
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from torch import nn
from torch.distributed.checkpoint import metadata

from kdrl_train.config import EngineConfig, TrainConfig
from kdrl_train.runfolder import checkpoint, untrusted
from kdrl_train.runfolder.untrusted import load_tensors
from kdrl_train.tools import evaluate, replay
from tests.train.test_train import run

Config = Callable[..., TrainConfig]
CONFIG = TrainConfig()
FUNCTIONS = [
    ("os", "mkdir"),
    ("posix", "mkdir"),
    ("builtins", "eval"),
    ("torch", "load"),
    ("torch.distributed.checkpoint.filesystem", "os.mkdir"),
    ("torch.distributed.checkpoint.metadata", "os.mkdir"),
    ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
    ("torch.serialization", "os.mkdir"),
    ("pathlib", "os.mkdir"),
    ("pathlib", "Path"),
]
"""(module, name): functions, some by the way of a module that the metadata does name."""

hostile = pytest.mark.fault("hostile checkpoint")


class Attack:
    """Makes a folder when it is read back."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.fixture
def target(tmp_path: Path) -> Any:
    """What an attack would make; it must not be there when the test ends."""
    path = tmp_path / "attacked"
    yield path
    assert not path.exists()


def saved(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Any:
    """Save a checkpoint; `change` changes its state first."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = checkpoint.RunState(step=1, model=model, optimizer=optimizer, config=CONFIG)
    place = checkpoint.save(folder / "checkpoints", state)
    if change is not None:
        tensors = checkpoint.whole_state(model, optimizer)
        change(tensors)
        (place / ".metadata").unlink()
        with checkpoint._quiet():
            dcp.save(tensors, checkpoint_id=place)
        accept(place)
    return place, model, optimizer


def accept(place: Path) -> None:
    """Let meta.json say of every file what it is now, as somebody who sends a folder can."""
    meta = json.loads((place / "meta.json").read_text())
    files = {p.name: p.stat().st_size for p in place.iterdir() if p.name != "meta.json"}
    kept = {name: meta[name] for name in ("step", "config", "data", "torch")}
    (place / "meta.json").write_text(json.dumps(kept | {"files": files}))


def named(module: str, name: str, argument: str) -> bytes:
    """Write a pickle that calls a function by its name, dots and all, with one text."""
    words = b"".join(b"\x8c" + struct.pack("B", len(w)) + w.encode() for w in (module, name))
    return (
        b"\x80\x04" + words + b"\x93\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."
    )


@hostile
def test_metadata_names_no_function(
    tmp_path: Path, target: Path, record_property: Callable[[str, int], None]
) -> None:
    place, model, optimizer = saved(tmp_path)
    for module, name in FUNCTIONS:
        (place / ".metadata").write_bytes(named(module, name, str(target)))
        accept(place)
        expected = rf"must describe a checkpoint, got {module}\.{name}, which no checkpoint"
        with pytest.raises(ValueError, match=expected):
            checkpoint.load_weights(place, model)
        newest = checkpoint.latest(place.parent)
        with pytest.raises(ValueError, match=expected):
            checkpoint.load(newest, model=model, optimizer=optimizer)
        assert not target.exists()
    record_property("tried", len(FUNCTIONS))


@hostile
def test_metadata_that_lacks_what_it_must_have_is_refused(tmp_path: Path) -> None:
    place, model, _ = saved(tmp_path)
    for content in (b"", b"\x80\x04N.", pickle.dumps({"storage_data": {}}), b"\x80\x04]."):
        (place / ".metadata").write_bytes(content)
        accept(place)
        with pytest.raises(ValueError, match=r"\.metadata must describe a checkpoint, got "):
            checkpoint.load_weights(place, model)


@hostile
def test_metadata_names_no_file_outside_the_folder(tmp_path: Path) -> None:
    """Such a file would be read without the checks of the checkpoint's own."""
    place, model, _ = saved(tmp_path)
    other, _, _ = saved(tmp_path / "other")
    for name in ("../../other", str(other / "__0_0.distcp")):
        metadata = pickle.loads((place / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.relative_path = name
        (place / ".metadata").write_bytes(pickle.dumps(metadata))
        accept(place)
        with pytest.raises(ValueError, match=r"must name files that the run has saved beside it"):
            checkpoint.load_weights(place, model)


@hostile
def test_metadata_names_every_part_of_a_tensor(tmp_path: Path) -> None:
    """Of what is left out, torch would keep what the model had before, without an error."""
    place, model, _ = saved(tmp_path)
    whole = (place / ".metadata").read_bytes()
    for key, told in (("model.weight", "0 of the 6"), ("model.bias", "1 of the 2")):
        metadata = pickle.loads(whole)
        chunks = metadata.state_dict_metadata[key].chunks
        if key == "model.weight":
            chunks.clear()
        else:
            chunks[0].sizes = torch.Size([1])
        (place / ".metadata").write_bytes(pickle.dumps(metadata))
        accept(place)
        with pytest.raises(ValueError, match=rf"describe .*, got {told} numbers of {key}"):
            checkpoint.load_weights(place, model)


@hostile
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_items_that_are_no_tensors_run_nothing(tmp_path: Path, target: Path, part: str) -> None:
    def change(state: dict[str, Any]) -> None:
        if part == "model":
            state["model"]["weight"] = Attack(target)
        else:
            state["optimizer"]["param_groups"][0]["lr"] = Attack(target)

    place, model, optimizer = saved(tmp_path, change)
    newest = checkpoint.latest(place.parent)
    with pytest.raises(ValueError, match=r"no plain value: .* GLOBAL posix\.mkdir"):
        checkpoint.load(newest, model=model, optimizer=optimizer)
    if part == "model":
        with pytest.raises(ValueError, match=r"no plain value: .* GLOBAL posix\.mkdir"):
            checkpoint.load_weights(place, model)


@hostile
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_stored_batch_runs_nothing(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as some users have it
    file = tmp_path / "failed_step_000001.pt"
    torch.save({"step": Attack(target)}, file, _use_new_zipfile_serialization=not legacy)
    what = "got File is not a zip file" if legacy else r"no plain value: .* GLOBAL posix\.mkdir"
    with pytest.raises(ValueError, match=what):
        load_tensors(file)
    with pytest.raises(ValueError, match=rf"file must be a failed_step_.*{what}"):
        replay.load_dump(file)


@hostile
def test_a_pipe_in_place_of_a_stored_batch_is_not_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "failed_step_000001.pt"
    os.mkfifo(file)
    # who reads the pipe waits for ever; the test only until then
    end = threading.Timer(1, lambda: os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK)))
    end.start()
    with pytest.raises(ValueError, match=rf"got no regular file {file.name}"):
        load_tensors(file)
    end.cancel()


@pytest.mark.fault("flipped or cut file")
def test_a_flipped_bit_in_a_stored_batch_changes_no_number(
    tmp_path: Path, record_property: Callable[[str, int], None]
) -> None:
    """It is refused, or it stands where nothing is stored, between two tensors."""
    batch = {"a": torch.arange(40.0), "b": [torch.ones(3)], "texts": ["one"], "step": 7}
    path, draw, refused = tmp_path / "batch.pt", random.Random(0), 0
    torch.save(batch, path)
    whole = path.read_bytes()
    record_property("tried", 100)
    for _ in range(100):
        content = bytearray(whole)
        content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            read = load_tensors(path)
        except ValueError:
            refused += 1
            continue
        assert torch.equal(read["a"], batch["a"])
        assert torch.equal(read["b"][0], batch["b"][0])
        assert (read["texts"], read["step"]) == (["one"], 7)
    assert refused > 25
    position = whole.index(batch["a"].numpy().tobytes()) + 42
    path.write_bytes(whole[:position] + b"\xff" + whole[position + 1 :])
    with pytest.raises(ValueError, match=r"it must be as torch.save .*, got other bytes in"):
        load_tensors(path)


@hostile
@pytest.mark.slow
def test_no_command_reads_what_it_has_not_checked(
    config: Config, target: Path, record_property: Callable[[str, int], None]
) -> None:
    """Of a checkpoint with a flipped bit, and of one that would run something."""
    settings = config(steps=2, save_every=1, engine=EngineConfig(staleness=1))
    run(settings)
    place = settings.out / "checkpoints" / "step_000001"
    (settings.out / "checkpoints" / "step_000002").rename(settings.out / "newer")
    one = torch.ones(1)
    dump: dict[str, Any] = {name: [None] for name in (*replay._STEP, *replay._ROLLOUTS)}
    dump |= {"step": 1, "part": 0, "rewards": one, "truncated": one}
    dump["coefficients"] = dict.fromkeys(("advantages", "kd_weight", "token_weights"), one)
    failed = replay.ReplayConfig(file=settings.out / "failed_step_000001.pt")
    torch.save(dump, failed.file)
    again = replace(settings, resume=True)
    other = replace(settings.model, weights=place)
    measured = evaluate.of_run(settings, settings.out)
    commands: list[Callable[[], Any]] = [
        lambda: run(again),
        lambda: run(replace(settings, out=settings.out / "other", model=other)),
        lambda: evaluate.evaluate_sets(replace(measured, model=other)),
        lambda: replay.main(failed, Console(file=io.StringIO())),
    ]
    record_property("tried", 2 * len(commands) + 1)
    path = place / "__0_0.distcp"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    for command in commands:
        with pytest.raises(ValueError, match=r"__0_0\.distcp must have the SHA-256"):
            command()
    path.write_bytes(whole)
    torch.save({"step": Attack(target)}, place / "rollouts.pt")
    accept(place)
    with pytest.raises(ValueError, match=r"rollouts.pt must hold .* GLOBAL posix\.mkdir"):
        run(again)
    (place / ".metadata").write_bytes(named("os", "mkdir", str(target)))
    accept(place)
    for command in commands:
        with pytest.raises(ValueError, match=r"got os\.mkdir, which no checkpoint"):
            command()


class Attribute:
    """Pickles as the attribute of a class, as some Pythons pickle the member of an enumeration."""

    def __init__(self, owner: Any, name: str) -> None:
        self.arguments = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.arguments


@pytest.mark.fault("hostile checkpoint")
def test_an_enumeration_is_all_that_has_attributes() -> None:
    formats = metadata._MEM_FORMAT_ENCODING

    def load(owner: Any, name: str) -> Any:
        data = pickle.dumps(Attribute(owner, name))
        return untrusted._MetadataUnpickler(io.BytesIO(data)).load()

    assert load(formats, "TORCH_PRESERVE_FORMAT") is formats.TORCH_PRESERVE_FORMAT
    with pytest.raises(KeyError):
        load(formats, "__subclasses__")
    with pytest.raises(pickle.UnpicklingError, match=r"an attribute of .*Metadata"):
        load(metadata.Metadata, "__init__")
