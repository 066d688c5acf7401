"""Tensors on disk under a key of content: what is not exactly what was asked for is as good as not there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional

import torch
from torch import Tensor

from ..encoders.base import hash_tensors
from ..files import replacing

FORMAT = "editloss-prepared-1"


class Entry(NamedTuple):
    """Tensors by name, and plain values about them."""

    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]


@dataclass
class TensorCache:
    """One safetensors file per entry, ``folder/kind/key.safetensors``.

    Attributes:
        folder: where the files are; None keeps nothing.
        refused: files that were there and could not be used, since they are damaged or of someone else.
    """

    folder: Optional[Path]
    refused: list[str] = field(default_factory=list)

    def get(self, kind: str, key: str) -> Optional[Entry]:
        """The entry of a key; None if there is none that is whole and was written for this key."""
        if self.folder is None:
            return None
        path = self._path(kind, key)
        if not path.is_file():
            return None
        entry = _read(path, kind, key)
        if entry is None:
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
            path = self._path(kind, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file(whole, temporary, metadata=metadata)
        return entry

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.safetensors"


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
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return hash_tensors(sorted(tensors.items()), *(f"{metadata.get(n)}\0" for n in ("format", "kind", "key", "about")))
