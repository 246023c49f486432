"""Hashes the files of a checkpoint while they are written, and compares them before they are read.

SHA-256: CPUs have instructions for it, with which it is three times as fast as BLAKE2 (915 and
294 MiB/s on one busy core).
"""

import hashlib
import itertools
import json
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

CHUNK = 1 << 20
SEAL = "sha256_of_this_text"
"""The key of meta.json with the hash of its other lines."""
OLDER_KEYS = {"step", "config", "data", "torch", "files"}
"""The keys of meta.json from before it had hashes: where one is another, the file has changed."""
WAIT_S = 0.01
"""Between two looks at a file that is being written."""


def sha256_of(path: Path) -> str:
    """Hash a file, a part after the other."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_same(folder: Path, hashes: dict[str, str], names: Iterable[str]) -> None:
    """Compare some files of a checkpoint folder with what they were when they were saved.

    Raises: ValueError for the first one that has changed.
    """
    for name in names:
        now = sha256_of(folder / name)
        if now != hashes[name]:
            raise ValueError(
                f"{folder / name} must have the SHA-256 {hashes[name]} as when it was saved, got "
                f"{now}: the checkpoint is damaged; delete {folder} to resume from the previous "
                "checkpoint"
            )


class HashingWriter(_FileSystemWriter):
    """Writes a checkpoint's folder as torch does; each rank hashes its file while it writes it.

    hashing: whether it hashes.
    """

    def __init__(self, folder: Path, hashing: bool) -> None:
        super().__init__(folder)
        self.hashing = hashing
        self.hashes: dict[str, str] = {}
        """File -> SHA-256, of all ranks; rank 0 has them once all have written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; its hash is one more result, which rank 0 gets as the others."""
        if not self.hashing:
            return super().write_data(plan, planner)
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"  # the first, and only, file of a rank
        path = Path(self.path) / name
        path.touch()
        written = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
            digest = pool.submit(_follow, path, written)
            try:
                results = super().write_data(plan, planner).value()
            finally:
                written.set()
        future: Future[list[WriteResult]] = Future()
        future.set_result([*results, WriteResult(MetadataIndex(name), 0, digest.result())])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Keep the hashes of all ranks, and write the metadata."""
        items = []
        for result in itertools.chain(*results):
            if isinstance(result.storage_data, str):
                self.hashes[result.index.fqn] = result.storage_data
            else:
                items.append(result)
        super().finish(metadata, [items])


def _follow(path: Path, written: threading.Event) -> str:
    """Hash a file that is being written, from its beginning to its end, until it is whole.

    torch.distributed.checkpoint only appends: it writes into a stream that cannot seek.
    """
    digest, part = hashlib.sha256(), bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while True:
            whole = written.is_set()
            while size := file.readinto(part):
                digest.update(memoryview(part)[:size])
            if whole:
                return digest.hexdigest()
            written.wait(WAIT_S)


def sealed(meta: dict[str, Any]) -> str:
    """Write meta.json, whose last line is the hash of all its text but that hash."""
    text = json.dumps(meta | {SEAL: ""}, indent=1)
    seal = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(meta | {SEAL: seal}, indent=1)


def unsealed(text: str) -> dict[str, Any]:
    """Read meta.json. Raises ValueError if it has changed; older ones have no hash of their own."""
    meta: dict[str, Any] = json.loads(text)
    seal = meta.pop(SEAL, None)
    if seal is None and meta.keys() <= OLDER_KEYS:
        return meta
    if seal is None or hashlib.sha256(text.replace(seal, "", 1).encode()).hexdigest() != seal:
        raise ValueError("another text than was saved")
    return meta
