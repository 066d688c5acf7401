"""Files that are either whole or not there."""

from __future__ import annotations

import os
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union


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
