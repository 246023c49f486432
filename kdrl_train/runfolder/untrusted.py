"""Reads files of torch.save and torch.distributed.checkpoint without running what they hold.

A pickle names the functions that rebuild its objects, and one that somebody else has made may name
any function at all. Here only the classes of tensors, numbers, text and containers are rebuilt; a
file that names another one is refused before it is called.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem


def load_tensors(path: Path) -> Any:
    """Read what torch.save has written: tensors, numbers, text, lists and dictionaries.

    Raises: ValueError for a file that holds anything else, or that has changed since.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise FileNotFoundError(f"no regular file {path.name}")
        with zipfile.ZipFile(path) as records:
            changed = records.testzip()  # torch.load does not look at the checksums
        if changed is not None:
            raise ValueError(f"other bytes in its {changed}")
        return _load(path)
    except Exception as error:  # zip, pickle and PyTorch raise many types for damaged files
        what = str(error).partition("\n")[0]
        raise ValueError(f"it must be as torch.save has written it, got {what}") from error


def _load(file: Path | io.BytesIO) -> Any:
    """Call torch.load, to which the environment may have said that it shall run everything."""
    try:
        return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        # the context says what it is, the error itself how to run it
        why = str(error.__context__ or error).partition(". ")[0].rstrip(".")
        raise ValueError(f"what is no tensor and no plain value: {why}") from error


def _path(*parts: str) -> str:
    """Stand for every class of pathlib: the folder of the save, which nothing reads."""
    return "/".join(parts)


def _member(owner: Any, name: str) -> Any:
    """Stand for getattr, by which Python 3.11.0 to 3.11.3 pickle the member of an enumeration."""
    if owner is not metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"an attribute of {owner}, which no checkpoint needs")
    return owner[name]


_CLASSES: dict[tuple[str, str], Any] = {
    ("builtins", "getattr"): _member,
    **{
        (one.__module__, one.__name__): one
        for one in (
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
        )
    },
    **{("torch", str(t)[6:]): t for t in vars(torch).values() if isinstance(t, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
    **{
        (module, f"{system}Path"): _path
        for module in ("pathlib", "pathlib._local")  # the latter in Python 3.13
        for system in ("Posix", "Windows")
    },
}
"""What the metadata of a checkpoint is made of: (module, name) -> what is called."""


class _MetadataUnpickler(pickle.Unpickler):
    """Rebuilds the metadata of a checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that the pickle names. Raises UnpicklingError for an unexpected one."""
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(
                f"{module}.{name}, which no checkpoint needs: it was made to run code, or by "
                "another version of torch"
            )
        return _CLASSES[module, name]


def _require_whole(name: str, entry: Any) -> None:
    """Raise ValueError for a tensor whose parts are smaller than it is: torch reads them, and
    leaves in the rest what the model had before."""
    if not isinstance(entry, metadata.BytesStorageMetadata):
        size = sum(part.sizes.numel() for part in entry.chunks)
        if size != entry.size.numel():
            raise ValueError(f"{size:,} of the {entry.size.numel():,} numbers of {name}")


class Reader(dcp.FileSystemReader):
    """Reads a checkpoint folder, whose `files` hold its tensors."""

    def __init__(self, folder: Path, files: set[str]) -> None:
        super().__init__(folder)
        self._metadata = folder / ".metadata"
        self._files = files

    def open(self) -> None:
        """Read the metadata. Raises ValueError where it describes anything else."""
        path = self._metadata
        try:
            with path.open("rb") as file:
                self.metadata: metadata.Metadata = _MetadataUnpickler(file).load()
            places = list(self.metadata.storage_data.values())
            for name, entry in self.metadata.state_dict_metadata.items():
                _require_whole(name, entry)
            outside = {place.relative_path for place in places} - self._files
            changed = any(place.transform_descriptors for place in places)
        except Exception as error:  # a pickle may hold any types, in any order
            raise ValueError(f"{path} must describe a checkpoint, got {error}") from error
        if outside or changed:
            what = f"{min(map(str, outside))!r}" if outside else "compressed ones"
            raise ValueError(f"{path} must name files that the run has saved beside it, got {what}")
        self.metadata.storage_meta = metadata.StorageMeta(load_id=self.load_id)

    def read_metadata(self, *_arguments: Any, **_keywords: Any) -> metadata.Metadata:
        """Return the metadata, which `open` has read."""
        return self.metadata


class Planner(DefaultLoadPlanner):
    """Plans a load whose items that are no tensors are numbers, text and containers of them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take such an item. Raises ValueError for anything else."""
        safe = io.BytesIO()
        torch.save(_load(value), safe)  # super() would run it
        safe.seek(0)
        super().load_bytes(read_item, safe)
