"""Tensors on disk under a key of content: what is not exactly what was asked for is as good as not there."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional

import torch
from torch import Tensor

from .files import make_folder, replacing
from .hashing import hash_tensors

log = logging.getLogger(__name__)

FORMAT = "editloss-prepared-1"
OURS = FORMAT.rstrip("0123456789")  # of any version
KINDS = ("masks", "latents", "embeddings", "captions")
NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
LIMIT = 20_000_000_000  # bytes: about 2000 pairs at 1024² with embeddings of their latents
GONE = (OSError, RuntimeError)  # safetensors opens a file twice, the second time through torch, which raises the latter
RECENT = 24 * 3600.0  # seconds: what another run may be reading, or the held-out pairs of this one


class Entry(NamedTuple):
    """Tensors by name, and plain values about them."""

    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]


@dataclass
class TensorCache:
    """One safetensors file per entry, ``folder/kind/key.safetensors``; its time of change is when it was last of use.

    Attributes:
        folder: where the files are; None keeps nothing.
        refused: files that were there and could not be used, since they are damaged or of someone else.
        used: files that were read or written.
    """

    folder: Optional[Path]
    refused: list[str] = field(default_factory=list)
    used: set[Path] = field(default_factory=set)

    def get(self, kind: str, key: str) -> Optional[Entry]:
        """The entry of a key; None if there is none that is whole and was written for this key."""
        if self.folder is None:
            return None
        path = self.folder / kind / f"{key}.safetensors"
        if not path.is_file():
            return None
        entry = _read(path, kind, key)
        if entry is not None:
            self.used.add(path)
            with suppress(OSError):  # a file of someone else, or removed since
                os.utime(path)
        elif path.is_file():  # else another process removed it just now
            self.refused.append(f"{kind}/{path.name}")
        return entry

    def put(
        self, kind: str, key: str, tensors: Mapping[str, Tensor], about: Optional[Mapping[str, Any]] = None
    ) -> Entry:
        """Write an entry atomically, and return it."""
        from safetensors.torch import save_file

        entry = Entry(tensors, dict(about or {}))
        if self.folder is not None:
            # Copies: safetensors refuses tensors that share memory.
            whole = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
            metadata = {"format": FORMAT, "kind": kind, "key": key, "about": json.dumps(entry.about)}
            metadata["content"] = _content(whole, metadata)
            path = self.folder / kind / f"{key}.safetensors"
            make_folder(path.parent)
            with replacing(path) as temporary:
                save_file(whole, temporary, metadata=metadata)
            self.used.add(path)
        return entry

    def prune(self, limit: int = LIMIT) -> None:
        """Remove what has been of no use for the longest time until all files together take at most ``limit`` bytes.

        Files that this object used stay, and those that anyone used within a day, even if they take more. So does whatever
        this class has not written: other names, and files whose header does not say what their name does. Several
        processes may prune at once. What was removed goes to the log.
        """
        if self.folder is None:
            return
        files = sorted(_files(self.folder))
        excess = sum(size for _, size, _ in files) - limit
        removed: list[int] = []
        for last_used, size, path in files:
            if sum(removed) >= excess or last_used > time.time() - RECENT:
                break
            if path not in self.used and _is_ours(path):
                with suppress(OSError):  # removed by another process, or open in one on Windows
                    path.unlink()
                    removed.append(size)
        if removed:
            log.info(
                "cache: removed %d files (%.1f GB) of %s that were unused for the longest time, to stay within %.0f GB",
                len(removed), sum(removed) / 1e9, self.folder, limit / 1e9,
            )  # fmt: skip


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """(last use, bytes, path) of the files that have names of entries."""
    for kind in KINDS:
        with suppress(OSError):  # no such folder yet
            for item in os.scandir(folder / kind):
                with suppress(OSError):  # removed since
                    if NAME.fullmatch(item.name) and item.is_file(follow_symlinks=False):
                        status = item.stat()
                        yield status.st_mtime, status.st_size, folder / kind / item.name


def _is_ours(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, *GONE):
        return False
    named = metadata.get("kind") == path.parent.name and metadata.get("key") == path.stem
    return named and metadata.get("format", "").startswith(OURS)


def _read(path: Path, kind: str, key: str) -> Optional[Entry]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if [metadata.get(name) for name in ("format", "kind", "key")] != [FORMAT, kind, key]:
                return None
            # Copied: safetensors maps the file, and who overwrites it later would change or crash us.
            with torch.inference_mode(False):
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        if metadata.get("content") != _content(tensors, metadata):
            return None
        return Entry(tensors, json.loads(metadata["about"]))
    except (SafetensorError, *GONE, KeyError, ValueError):
        return None


def _content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return hash_tensors(sorted(tensors.items()), *(f"{metadata.get(n)}\0" for n in ("format", "kind", "key", "about")))
