"""Hashes a model's files, so that two models of one name and size are told apart."""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from kdrl_train.model.folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_of,
    stored_file,
    weight_files,
)

THREADS = 8
"""Files hashed at a time: one thread makes 1 to 2 GB/s, less than a disk gives."""
CACHED_BYTES = 2**28
"""The hash of a smaller file is not kept: it takes less than 0.3 s."""
CACHE = Path(HF_HOME) / "kdrl_train_hashes.json"
"""Path of a large file -> what os.stat said of it, and its hash."""
NOTES = {"_name_or_path", "transformers_version"}
"""Keys of config.json that change nothing."""


def weights_hash(name: str) -> str | None:
    """Return the SHA-256 of a model's configuration and weights, and of an adapter; None where
    no file is here.

    The name of its folder is no part of it. Hashes of large files are kept in CACHE; a file that
    changes has another time or inode, and is read again.
    """
    base = base_of(name)
    paths = [path.resolve() for path in weight_files(base)]
    config = stored_file(base, "config.json")
    if base != name:
        files = (stored_file(name, file) for file in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS))
        paths += [path.resolve() for path in files if path is not None]
    if not paths or config is None:
        return None
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key not in NOTES}
    cache = _read_cache()
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = list(pool.map(lambda path: _file_hash(path, cache), paths))
    _write_cache(cache)
    parts = json.dumps([settings, hashes], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()


def _file_hash(path: Path, cache: dict[str, Any]) -> str:
    """Return the SHA-256 of a file, from the cache where it has not changed since."""
    before = _state(path)
    match cache.get(str(path)):
        case [state, str(known)] if state == before:
            return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if path.stat().st_size >= CACHED_BYTES and _state(path) == before:
        cache[str(path)] = [before, digest]
    return digest


def _state(path: Path) -> list[int]:
    """Return what changes with a file's content; no user can set back the time of its inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read_cache() -> dict[str, Any]:
    """Read the cache; an empty one where it cannot be read, which costs time alone."""
    with contextlib.suppress(OSError, ValueError):
        cache = json.loads(CACHE.read_text(encoding="utf-8"))
        if isinstance(cache, dict):
            return cache
    return {}


def _write_cache(cache: dict[str, Any]) -> None:
    """Write the cache, without files that are gone; a folder that refuses costs time alone."""
    if not cache:
        return
    work = CACHE.with_name(f".{CACHE.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        kept = {path: entry for path, entry in cache.items() if Path(path).is_file()}
        work.write_text(json.dumps(kept), encoding="utf-8")
        work.replace(CACHE)
