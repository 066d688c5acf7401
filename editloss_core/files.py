"""Files that are either whole or not there, tensors in safetensors among them."""

from __future__ import annotations

import json
import os
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, Mapping, Optional, Union

from torch import Tensor


class NotWritten(OSError):
    """What cannot be written, by name and with the reason, as a sentence for a person."""


@contextmanager
def writing(path: Union[str, Path], temporary: Optional[Path] = None) -> Iterator[None]:
    """NotWritten for ``path`` where the block cannot write it: no room left, no right to, a file where a folder should be.

    Args:
        path: what is named.
        temporary: what is written in its place.
    """
    from safetensors import SafetensorError

    path = Path(path)
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        named = error.filename
        if named is not None and str(named) != str(temporary) and not Path(path).is_relative_to(str(named)):
            raise  # of a file that the block reads
        reason = error.strerror or str(error)
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            reason = next((f"{p} is a file, not a folder" for p in (path, *path.parents) if p.is_file()), reason)
        raise NotWritten(f"{path} cannot be written: {reason}") from error
    except SafetensorError as error:
        if "(os error " not in str(error):
            raise
        reason = str(error).rpartition("I/O error: ")[2].partition(" (os error ")[0]
        raise NotWritten(f"{path} cannot be written: {reason}") from error


def make_folder(path: Union[str, Path]) -> None:
    """A folder and those above it, where they are not there yet.

    Raises:
        NotWritten: it cannot be made.
    """
    with writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def check_writable(folder: Union[str, Path]) -> None:
    """Whether files could be written to a folder, which need not be there; nothing is left behind.

    Raises:
        NotWritten: they could not.
    """
    folder = Path(folder).absolute()
    with writing(folder):
        place = next(p for p in (folder, *folder.parents) if p.exists())
    temporary = place / _temporary_name()
    with writing(folder, temporary):
        try:
            temporary.write_bytes(b"x")
        finally:
            with suppress(OSError):
                temporary.unlink()


def check_conversion(source: Path, target: Path, overwrite: bool) -> None:
    """What a program that makes one file of another asks before any work.

    Raises:
        FileNotFoundError: there is no ``source``, or no folder for ``target``.
        IsADirectoryError: one of them is a folder.
        FileExistsError: ``target`` exists and ``overwrite`` is False.
        ValueError: ``target`` is no .safetensors file, or is ``source`` itself.
    """
    for name, path in (("source", source), ("target", target)):
        if path.is_dir():
            raise IsADirectoryError(f"{name}: expected a file, {path} is a folder")
    if not source.exists():
        raise FileNotFoundError(f"source: no such file: {source}")
    if target.suffix.lower() != ".safetensors":
        raise ValueError(f"target: expected a name ending in .safetensors, got {target.name}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"target: there is no folder {target.parent}")
    if target.exists() and target.samefile(source):
        raise ValueError(f"target: {target} is the source itself, expected another name")
    if target.exists() and not overwrite:
        raise FileExistsError(f"target: {target} exists already")


def _temporary_name() -> str:
    return f".{uuid.uuid4().hex}.tmp"


@contextmanager
def replacing(path: Union[str, Path]) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place if the block ends well, and disappears if it does not.

    Nobody ever sees half a file, and writers at the same time do not mix: the last one to finish wins. The file that
    appears has the permissions of any new file (the umask), whatever the writer did: safetensors and tempfile make
    files that only their owner may read, which a shared server cannot serve.

    Args:
        path: of the file to make or replace; its folder must exist.

    Yields:
        The path to write to; the file exists already and is empty.

    Raises:
        FileNotFoundError: no such folder.
        IsADirectoryError: ``path`` is a folder.
        NotWritten: no room left, or no right to write there.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with replacing(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('whole', 1)
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path.name}: expected the path of a file, got a folder")
    if not path.parent.exists():
        raise FileNotFoundError(f"{path.name}: there is no folder {path.parent}")
    temporary = path.with_name(_temporary_name())  # a long name of its own would not fit beside path's
    with writing(path, temporary):
        with open(temporary, "xb") as file:
            mode = os.stat(file.fileno()).st_mode & 0o777
        try:
            yield temporary
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def read_safetensors(path: Union[str, Path]) -> dict[str, Tensor]:
    """Tensors of a .safetensors file on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another suffix (pickles can run code) and for a file that is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise ValueError(
            f"weights: expected a .safetensors file, got {path.name}; convert it with "
            f"python -m editloss_core.encoders.convert {path.name} {path.stem}.safetensors"
        )
    if not path.is_file():
        raise FileNotFoundError(f"weights: no such file: {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights: {path.name} is not a whole safetensors file ({error})") from error


def write_safetensors(path: Union[str, Path], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, whole or not at all, that depends on its content only.

    Raises:
        ValueError: for another suffix, metadata that is not text, values that are not finite.
    """
    from safetensors.torch import save

    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"path: expected a .safetensors file, got {path.name}")
    wrong = [f"{k!r}: {v!r}" for k, v in metadata.items() if not isinstance(k, str) or not isinstance(v, str)]
    if wrong:
        raise ValueError(f"metadata: expected texts, got {wrong[0]}")
    # Through float32: torch cannot ask this of every float of 8 bits.
    broken = [name for name, x in tensors.items() if x.is_floating_point() and not x.float().isfinite().all()]
    if broken:
        raise ValueError(
            f"{path.name}: {len(broken)} tensors are not finite in this dtype, among them {', '.join(broken[:3])}"
        )
    data = save(dict(tensors), metadata=dict(metadata))
    # The library writes metadata in an order that changes with every process.
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if metadata:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.write(memoryview(data)[8 + size :])
