"""A client of a running ComfyUI: queues prompts, follows them, and says in whose words they failed."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Proxies from the environment must not get between this process and a server on 127.0.0.1.
local = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ComfyError(RuntimeError):
    """ComfyUI could not be found, started, reached, or did not finish in time."""


class NodeError(ComfyError):
    """A node refused its inputs or failed. ``str()`` is for people; ``message`` is the node's own."""

    def __init__(self, node_id: str, class_type: str, message: str, title: str = "", traceback: str = "") -> None:
        self.node_id, self.class_type, self.message = node_id, class_type, message
        self.title, self.traceback = title or class_type, traceback
        super().__init__(f"{self.title} (node {node_id}): {message}" if node_id else message)


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

    def queue(
        self, prompt: dict[str, Any], extra_data: dict[str, Any] | None = None, *, client_id: str | None = None
    ) -> str:
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

    def run(
        self,
        prompt: dict[str, Any],
        on_progress: Callable[[Progress], None] | None = None,
        timeout: float = 600.0,
        *,
        extra_data: dict[str, Any] | None = None,
    ) -> History:
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

    def _follow(
        self,
        events: _Events,
        prompt_id: str,
        prompt: dict[str, Any],
        on_progress: Callable[[Progress], None],
        deadline: float,
    ) -> None:
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
            with local.open(request, timeout=60) as answer:
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
        return [
            Progress(str(s.get("display_node_id") or s["node_id"]), float(s["value"]), float(s["max"])) for s in running
        ]
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
    return NodeError(
        node_id, str(data.get("node_type", "")), message, _title(prompt, node_id), "".join(data.get("traceback") or ())
    )


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
