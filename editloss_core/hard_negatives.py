"""A bounded buffer on disk of earlier bad outputs, to be used as negatives later.

What a model got wrong a thousand steps ago is the best negative for what it gets wrong now. A trainer stores failed
pictures (or their embeddings) under the pair that they belong to, and a later step, a later run or another process
draws them::

    buffer = HardNegativeBuffer("negatives", capacity=512, per_key=16)
    key = image_key(before)                                  # before: [H, W, 3] in 0…1
    buffer.store(key, quantize_image(output), score=0.8, note="overlay at step 1200")
    negatives = dequantize_image(buffer.draw(key, count=4, seed=step))          # [4, H, W, 3]

Each entry is a safetensors file with one tensor and its description in the metadata; nothing is ever unpickled. A file
appears by ``os.replace`` from a temporary file in the same folder, and every access holds a file lock, so that any
number of processes may share a folder and a process that is killed leaves nothing half-written behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import stat as stat_module
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor

from .checks import check_number, check_whole

__all__ = ["HardNegative", "HardNegativeBuffer", "dequantize_image", "image_key", "quantize_image"]

log = logging.getLogger(__name__)

FORMAT = "editloss-hard-negative-1"
TENSOR = "negative"
LOCK_NAME = ".editloss-negatives.lock"
TEMPORARY_PREFIX = ".editloss-negatives-"
TEMPORARY_SUFFIX = ".tmp"


@dataclass(frozen=True)
class HardNegative:
    """What is known about one entry without reading its tensor.

    Attributes:
        key: the pair that it belongs to.
        score: how bad it was, larger is worse; NaN if nobody said.
        note: free text.
        step: training step, or None.
        time: seconds since 1970.
        sequence: entries are numbered as they come in; a larger number is younger.
        shape: of the tensor.
        dtype: of the tensor, such as ``"uint8"``.
        path: the file.
        content: hash of the tensor; empty in a file that was written without.
    """

    key: str
    score: float
    note: str
    step: int | None
    time: float
    sequence: int
    shape: tuple[int, ...]
    dtype: str
    path: Path
    content: str = ""


class HardNegativeBuffer:
    """Bounded, shared, on disk: at most ``capacity`` entries, at most ``per_key`` of them under one key.

    A full buffer evicts its **oldest** entries, first under the same key, then over all keys: negatives should come
    from the model as it is now, and a score that a weaker model got says little about it. ``score`` is kept for the
    reader and does not decide what stays.

    Files in the folder that are no entries (foreign, corrupt, truncated) are skipped with a logged warning, do not
    count and are never deleted.

    Args:
        folder: where the files lie; made if it is missing.
        capacity: most entries in this space, ≥ 1.
        per_key: most entries under one key, ≥ 1; no more than ``capacity`` matter.
        space: what the tensors are: ``"image"`` for pictures, or the fingerprint of the encoder for embeddings. A
            buffer sees only entries of its own space, so that embeddings of two encoders in one folder are never mixed;
            ``capacity`` counts within a space.
        lock_timeout: seconds to wait for another process, ≥ 0.

    Raises:
        ValueError: for a value outside its range, or a folder that is a file.
        TimeoutError: from any method, when another process holds the lock for longer than ``lock_timeout``.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        capacity: int = 512,
        per_key: int = 16,
        space: str = "image",
        lock_timeout: float = 60.0,
    ) -> None:
        check_whole("capacity", capacity, 1)
        check_whole("per_key", per_key, 1)
        if not isinstance(space, str) or not space:
            raise ValueError(f"space: expected a non-empty string, got {space!r}")
        check_number("lock_timeout", lock_timeout, 0.0)
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"folder: expected a folder, got the file {self.folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.capacity = capacity
        self.per_key = per_key
        self.space = _text(space)
        self._lock = FileLock(str(self.folder / LOCK_NAME), timeout=lock_timeout)
        # Files are replaced, never changed, so each is parsed once: name → (size, modification time, inode), entry or None.
        self._known: dict[str, tuple[tuple[int, int, int], HardNegative | None]] = {}
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:  # a lock belongs to its process; worker processes open their own
        return type(self), (self.folder, self.capacity, self.per_key, self.space, self._lock.timeout)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.folder)!r}, capacity={self.capacity}, per_key={self.per_key}, "
            f"space={self.space!r})"
        )

    def __len__(self) -> int:
        """Number of readable entries in this space."""
        return len(self.entries())

    def keys(self) -> list[str]:
        """The keys that have entries, sorted."""
        return sorted({e.key for e in self.entries()})

    def entries(self, key: str | None = None) -> list[HardNegative]:
        """Descriptions of all entries, or of those under one key, the oldest first. An unknown key has none."""
        key = None if key is None else _checked_key(key)
        with self._lock:
            return [e for e in self._scan() if key is None or e.key == key]

    def store(self, key: str, tensor: Tensor, score: float = math.nan, note: str = "", step: int | None = None) -> Path:
        """Adds one entry and evicts the oldest ones that are too many.

        A tensor that is there already under this key makes no second entry: the one that is there becomes the
        youngest, with the score, note and step of this call.

        Args:
            key: the pair that the output belongs to, such as :func:`image_key` of its before picture; any text.
            tensor: any shape and dtype that safetensors knows; all entries under a key have the same. Pictures are best
                stored as :func:`quantize_image` makes them.
            score: how bad it is, larger is worse.
            note: free text.
            step: training step.

        Returns:
            The path of the file. Its name is made of a number and a hash; the key itself is in the metadata.

        Raises:
            ValueError: for a wrong type, or a tensor whose shape or dtype differs from the entries under this key.
        """
        key = _checked_key(key)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"tensor: expected a torch.Tensor, got {type(tensor).__name__}")
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise ValueError(f"score: expected a number, got {score!r}")
        if not isinstance(note, str):
            raise ValueError(f"note: expected text, got {note!r}")
        if step is not None:
            check_whole("step", step)
        data = tensor.detach().to("cpu").contiguous().clone()  # a clone, so that a view does not drag its storage along
        with self._lock:
            self._sweep()
            entries = self._scan()
            same = [e for e in entries if e.key == key]
            kind = tuple(data.shape), _dtype_name(data)
            if same and kind != (same[-1].shape, same[-1].dtype):
                raise ValueError(
                    f"tensor: expected {list(same[-1].shape)} {same[-1].dtype} like the other entries under "
                    f"{_short(key)}, got {list(kind[0])} {kind[1]}; clear() that key, or use another buffer"
                )
            content = _content(data)
            again = next((e for e in same if e.content == content), None)
            sequence = 1 + max((e.sequence for e in entries), default=0)
            metadata = {
                "format": FORMAT,
                "space": self.space,
                "key": key,
                "score": repr(float(score)),
                "note": _text(note),
                "dtype": kind[1],
                "step": "" if step is None else str(step),
                "time": repr(time.time()),
                "sequence": str(sequence),
                "content": content,
            }
            digest = hashlib.blake2b(f"{self.space}\0{key}".encode(), digest_size=8).hexdigest()
            path = self.folder / f"negative-{sequence:010d}-{digest}.safetensors"
            if again is not None:  # replaced in one step, so that a writer that is killed loses nothing
                path = again.path
                same.remove(again)
                entries.remove(again)
            elif path.exists():  # a corrupt file or one that was copied there: leave it
                path = path.with_name(f"negative-{sequence:010d}-{digest}-{uuid.uuid4().hex}.safetensors")
            temporary = self.folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
            try:
                temporary.write_bytes(safetensors.torch.save({TENSOR: data}, metadata=metadata))
                # Room is made first, so that nobody ever counts more than capacity; and only once the new file is
                # written, so that a full disk costs no entry.
                excess = same[: max(0, len(same) + 1 - self.per_key)]
                paths = {e.path for e in excess}
                rest = [e for e in entries if e.path not in paths]
                for entry in excess + rest[: max(0, len(rest) + 1 - self.capacity)]:
                    self._remove(entry)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def draw(self, key: str, count: int = 1, seed: int = 0) -> Tensor:
        """``count`` entries under ``key``, distinct ones as long as there are any.

        Without replacement while ``count`` is at most the number of entries; beyond it every entry comes once before
        any comes again. The same seed and the same content of the buffer give the same draw, in any process.

        Args:
            key: see :meth:`store`.
            count: how many, ≥ 1.
            seed: any integer.

        Returns:
            ``[count, ...]`` on the CPU, in the dtype in which they were stored.

        Raises:
            KeyError: when there is no entry under ``key``; the message names the keys that are there.
            ValueError: for a wrong type, or entries under the key that differ in shape or dtype.
        """
        key = _checked_key(key)
        check_whole("count", count, 1)
        check_whole("seed", seed)
        with self._lock:
            entries = self._scan()
            candidates = [e for e in entries if e.key == key]
            chosen: list[Tensor] = []
            while candidates and not chosen:
                order = _order(len(candidates), count, seed, key)
                found: dict[int, Tensor | None] = {i: self._load(candidates[i]) for i in sorted(set(order))}
                whole = {i: t for i, t in found.items() if t is not None}
                if len(whole) == len(found):
                    chosen = [whole[i] for i in order]
                candidates = [e for i, e in enumerate(candidates) if found.get(i, e) is not None]
        if not chosen:
            keys = sorted({e.key for e in entries} - {key})
            there = ", ".join(map(_short, keys[:8])) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            raise KeyError(
                f"key: no hard negatives under {_short(key)} in {self.folder} (space {self.space!r}); "
                + (f"expected one of {len(keys)}: {there}" if keys else "the buffer is empty")
            )
        kinds = sorted({f"{list(t.shape)} {_dtype_name(t)}" for t in chosen})
        if len(kinds) > 1:
            raise ValueError(
                f"key: entries under {_short(key)} differ in shape or dtype and cannot be stacked: {', '.join(kinds)}; "
                "clear() that key, or use another buffer"
            )
        return torch.stack(chosen)

    def clear(self, key: str | None = None, after: int | None = None) -> int:
        """Deletes the entries of this space, all or those under one key; returns how many. Foreign files stay.

        Args:
            key: see :meth:`store`.
            after: a training step: only entries of later steps go.
        """
        key = None if key is None else _checked_key(key)
        if after is not None:
            check_whole("after", after)
        with self._lock:
            self._sweep()
            gone = [e for e in self._scan() if key is None or e.key == key]
            if after is not None:
                gone = [e for e in gone if e.step is not None and e.step > after]
            for entry in gone:
                self._remove(entry)
            return len(gone)

    # Everything below is called with the lock held.

    def _scan(self) -> list[HardNegative]:
        """The entries of this space, the oldest first."""
        entries: list[HardNegative] = []
        present: set[str] = set()
        with os.scandir(self.folder) as listing:
            for item in listing:
                name = item.name
                if name == LOCK_NAME or (name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX)):
                    continue
                present.add(name)
                try:
                    info = item.stat(follow_symlinks=False)
                except OSError:  # gone meanwhile, by other hands than ours
                    continue
                state = (info.st_size, info.st_mtime_ns, info.st_ino)
                known = self._known.get(name)
                if known is None or known[0] != state:
                    entry = None
                    if stat_module.S_ISREG(info.st_mode) and name.endswith(".safetensors"):
                        entry = self._read_header(Path(item.path))
                    else:
                        self._skip(name, "not an entry")
                    self._known[name] = known = state, entry
                if known[1] is not None:
                    entries.append(known[1])
        for name in self._known.keys() - present:
            del self._known[name]
        return sorted(entries, key=lambda e: (e.sequence, e.path.name))

    def _read_header(self, path: Path) -> HardNegative | None:
        """The entry in a file: None for one of another space, and, with a warning, for anything else."""
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT or TENSOR not in set(file.keys()):
                    self._skip(path.name, "a safetensors file that is not a hard negative")
                    return None
                if metadata["space"] != self.space:
                    return None
                return HardNegative(
                    key=metadata["key"],
                    score=float(metadata["score"]),
                    note=metadata["note"],
                    step=int(metadata["step"]) if metadata["step"] else None,
                    time=float(metadata["time"]),
                    sequence=int(metadata["sequence"]),
                    shape=tuple(file.get_slice(TENSOR).get_shape()),
                    dtype=metadata["dtype"],
                    path=path,
                    content=metadata.get("content", ""),
                )
        except Exception as error:  # safetensors raises its own class, OSError, ValueError, … on broken files
            self._skip(path.name, f"{type(error).__name__}: {error}")
            return None

    def _load(self, entry: HardNegative) -> Tensor | None:
        try:
            return safetensors.torch.load(entry.path.read_bytes())[TENSOR]
        except Exception as error:  # changed by other hands since its header was read
            self._skip(entry.path.name, f"{type(error).__name__}: {error}")
            return None

    def _skip(self, name: str, reason: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            log.warning("Hard negatives in %s: skipping %r (%s)", self.folder, name, reason)

    def _remove(self, entry: HardNegative) -> None:
        try:
            entry.path.unlink(missing_ok=True)
        except OSError as error:  # on Windows, somebody has it open
            log.warning("Hard negatives: cannot delete %s: %s", entry.path, error)

    def _sweep(self) -> None:
        """Removes what killed writers left: temporary files are written under the lock, so any seen now is dead."""
        for path in self.folder.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"):
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def quantize_image(image: Tensor) -> Tensor:
    """A picture in 0…1 as uint8, rounded: a quarter of the room on disk. Values outside are clamped.

    >>> quantize_image(torch.tensor([0.0, 0.5, 1.0]))
    tensor([  0, 128, 255], dtype=torch.uint8)
    """
    if not isinstance(image, Tensor) or not image.is_floating_point():
        raise ValueError(f"image: expected a floating tensor in 0…1, got {_kind(image)}")
    return (image.detach().float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def dequantize_image(image: Tensor) -> Tensor:
    """The inverse of :func:`quantize_image` for what 8 bits can hold: uint8 → float32 in 0…1.

    >>> dequantize_image(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        raise ValueError(f"image: expected a uint8 tensor, got {_kind(image)}")
    return image.float() / 255


def image_key(image: Tensor) -> str:
    """A key made of what a picture shows: 32 hexadecimal digits of the SHA-256 of its shape and 8-bit values.

    A picture and its PNG have the same key. ComfyUI's Save Image cuts 255·x (in float32) off instead of rounding it,
    and so does the key; for what was loaded from 8 bits as k / 255 both give k, for all 256 values.

    Args:
        image: ``[H, W, C]`` or ``[1, H, W, C]``, float32 or float64 in 0…1, or uint8.

    Raises:
        ValueError: for anything else, and for NaN.
    """
    if not isinstance(image, Tensor) or image.dtype not in (torch.float32, torch.float64, torch.uint8):
        raise ValueError(f"image: expected float32 or float64 in 0…1, or uint8, got {_kind(image)}")
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.numel() == 0:
        raise ValueError(f"image: expected one picture [H, W, C] or [1, H, W, C], got {list(image.shape)}")
    image = image.detach().cpu()
    if image.is_floating_point():
        if image.isnan().any():
            raise ValueError("image: expected values in 0…1, got NaN")
        image = (image.float().clamp(0, 1) * 255).to(torch.uint8)
    digest = hashlib.sha256(json.dumps(list(image.shape)).encode())
    digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _short(key: str) -> str:
    return repr(key if len(key) <= 48 else key[:40] + "…")


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).replace("torch.", "")


def _content(x: Tensor) -> str:
    """Hash of dtype, shape and bytes of a contiguous tensor on the CPU."""
    digest = hashlib.blake2b(f"{_dtype_name(x)} {list(x.shape)} ".encode(), digest_size=16)
    digest.update(x.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _text(value: str) -> str:
    """Metadata is UTF-8: lone surrogates, which file names on Linux may contain, are spelled out."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _order(size: int, count: int, seed: int, key: str) -> list[int]:
    """``count`` numbers below ``size``: whole permutations one after the other."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(size, generator=generator).tolist()
    return order[:count]


def _checked_key(key: str) -> str:
    if not isinstance(key, str) or not key:
        raise ValueError(f"key: expected a non-empty string, got {key!r}")
    return _text(key)
