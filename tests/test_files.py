"""Files that cannot be written: a sentence that names them, and nothing left behind."""

from __future__ import annotations

import errno
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from editloss_core.files import NotWritten, check_writable, make_folder, replacing

resource = pytest.importorskip("resource")  # not on Windows


@contextmanager
def full():
    """As if 4096 bytes were left; the system says "File too large" where a full disk says "No space left on device". Not for
    longer than it takes: pytest's own output may be a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def write_bytes(path):
    path.write_bytes(b"x" * 10_000)


def write_text_in_parts(path):
    with open(path, "a") as file:
        for _ in range(10_000):
            file.write("x")


def write_tensors(path):
    save_file({"a": torch.zeros(10_000)}, path)


@pytest.mark.parametrize("write", [write_bytes, write_text_in_parts, write_tensors])
def test_no_room_left(tmp_path, write):
    (tmp_path / "kept.bin").write_bytes(b"mine")
    with pytest.raises(NotWritten) as raised:
        with full(), replacing(tmp_path / "kept.bin") as temporary:
            write(temporary)
    assert str(raised.value) == f"{tmp_path / 'kept.bin'} cannot be written: File too large"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.bin"] and (tmp_path / "kept.bin").read_bytes() == b"mine"


def test_errors_of_what_the_block_reads_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.txt"):
        with replacing(tmp_path / "new.txt"):
            (tmp_path / "gone.txt").read_text()
    with pytest.raises(OSError, match="no disk at all") as raised:
        with replacing(tmp_path / "new.txt"):
            raise OSError(errno.EIO, "no disk at all", str(tmp_path / "other.txt"))
    assert not isinstance(raised.value, NotWritten)


def test_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below" / "more"):
        for ask in (make_folder, check_writable):
            with pytest.raises(NotWritten) as raised:
                ask(place)
            assert str(raised.value) == f"{place} cannot be written: {tmp_path / 'file'} is a file, not a folder"
    with pytest.raises(FileNotFoundError, match=f"new.txt: there is no folder {tmp_path / 'gone'}"):
        with replacing(tmp_path / "gone" / "new.txt"):
            pass
    check_writable(tmp_path / "not" / "there" / "yet")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
