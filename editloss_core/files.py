"""Files that are either whole or not there, tensors in safetensors among them."""

from __future__ import annotations

import json
import os
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Mapping, Union

from torch import Tensor


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
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # a long name of its own would not fit beside path's
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
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
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
