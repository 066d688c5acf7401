"""Run an example workflow in a real ComfyUI and save what it shows.

    python workflows/run.py --list
    python workflows/run.py train_demo
    python workflows/run.py my_workflow.json --out pictures
    python workflows/run.py --check [my_workflow.json]

ComfyUI is looked for in --comfyui, then in COMFYUI_PATH, then around this pack; if there is none, a small
private copy is downloaded. Your own ComfyUI's folders are never written to; a workflow of your own finds the models
and pictures there.

--check trains nothing. It does what training does before its first step, with the model and settings of the workflow
(the demo's without one): are gradients right in this ComfyUI, and does the before picture have an effect? Exit status 1
if not.

Pictures and texts go to the folder results/NAME of this repository, and those of a training run with them: the
logs and the pictures of held-out pairs, which editloss report results/NAME judges, and the LoRAs in loras/, named as they
are in models/loras. When a workflow is run again and succeeds, all that
its last run left there is replaced, so that what lies together belongs together; rename what you want to keep. Files
that are not of that run are left alone.

A workflow that loads LoRAs finds those of results/*/loras, of two with one name the later one. A workflow that trains
begins without any.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from runner.client import Client, ComfyError, History, Progress
from runner.results import LORAS, give_loras, replacing_results
from runner.server import ComfyServer
from runner.ui_to_api import WorkflowError, is_saved_workflow, to_prompt

HERE = Path(__file__).resolve().parent
DEFAULT = "train_demo"
RESULTS = HERE.parent / "results"
TRAINER, CHECK = "EditLossTrainKontextLoRA", "EditLossSelfCheck"
MODEL_OUTPUT = 0  # of the trainer
NOT_RUN = (2, 4)  # modes of a saved node: muted, bypassed


def available() -> list[str]:
    """The names of the workflows in this folder."""
    return sorted(path.stem for path in HERE.glob("*.json"))


def find(name: str) -> Path:
    """The file behind a name, or behind a path to a .json of the user's own."""
    for path in (HERE / f"{name}.json", Path(name)):
        if path.suffix == ".json" and path.is_file():
            return path
    listed = "\n".join(f"  {known}" for known in available()) or "  (none)"
    raise ComfyError(f"no workflow '{name}'. There are:\n{listed}")


def read(workflow_file: Path) -> dict[str, Any]:
    """A workflow's content, or an error that names the file."""
    try:
        workflow = json.loads(workflow_file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON, or the encoding of the text
        raise WorkflowError(f"{workflow_file}: {error}") from error
    if not is_saved_workflow(workflow):
        raise WorkflowError(
            f"{workflow_file} is not a workflow as the page saves it; save it with Workflow > Save, not Export (API)"
        )
    return workflow


def check_out(out: Path) -> None:
    """Refuse a folder that could not be written, before a long run; it is made when there is something to save."""
    nearest = next(path for path in (out, *out.parents) if path.exists())
    if not nearest.is_dir():
        raise ComfyError(f"--out: expected a folder, {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise ComfyError(f"--out: expected a folder to write to, {nearest} is read-only")


class ProgressLines:
    """One line per node, with its title and time, and the percent inside nodes that report it.

    On a terminal the percent is rewritten in place; in a file each quarter gets a line of its own.
    """

    def __init__(self, prompt: dict[str, Any]) -> None:
        self._titles = {node_id: node["_meta"]["title"] for node_id, node in prompt.items()}
        self._live = sys.stdout.isatty()
        self._node, self._began, self._shown = "", 0.0, 0

    def __call__(self, progress: Progress) -> None:
        if progress.node_id != self._node:
            self.finish()
            self._node, self._began, self._shown = progress.node_id, time.monotonic(), 0
            if self._live:
                self._write("")
        percent = int(100 * progress.value / progress.max) if progress.max else 0
        step = 1 if self._live else 25
        if progress.max > 1 and percent >= self._shown + step:
            self._shown = percent - percent % step
            self._write(f"{percent:3d} %")

    def finish(self) -> None:
        """Close the line of the node that was running."""
        if self._node:
            self._write(f"{time.monotonic() - self._began:.1f} s", end="\n")
        self._node = ""

    def _write(self, status: str, end: str = "") -> None:
        title = self._titles.get(self._node, f"node {self._node}")
        print(
            f"\r  {title}  {status}    " if self._live else f"  {title}  {status}",
            end=end if self._live else "\n",
            flush=True,
        )


def save(history: History, prompt: dict[str, Any], client: Client, out: Path) -> list[Path]:
    """Write every picture and text of a run into ``out`` and return their paths; texts are printed, each one once."""
    saved: list[Path] = []
    printed: set[str] = set()
    for node_id, shown in sorted(history.outputs.items(), key=lambda item: _natural(item[0])):
        node = prompt.get(node_id, {})
        title = node.get("_meta", {}).get("title") or node.get("class_type", "node")
        stem = f"{node_id}-{title}".lower()
        stem = re.sub(r"[^a-z0-9]+", "-", stem).strip("-")
        items = [item for values in shown.values() if isinstance(values, list) for item in values]
        files = [item for item in items if isinstance(item, dict) and item.get("filename")]
        texts = [item for item in shown.get("text") or () if isinstance(item, str)]
        for k, ref in enumerate(files):
            suffix = Path(ref["filename"]).suffix
            saved.append(out / f"{stem}{_number(k, files)}{suffix}")
            saved[-1].write_bytes(client.download(ref))
        for k, text in enumerate(texts):
            if text not in printed:  # Preview as Text shows what the node before it may have shown
                print(f"\n{title}:\n{text}")
                printed.add(text)
            saved.append(out / f"{stem}{_number(k, texts)}.txt")
            saved[-1].write_text(text, encoding="utf-8", newline="")
    return saved


def _number(k: int, items: list[Any]) -> str:
    return f"-{k + 1}" if len(items) > 1 else ""


def _natural(node_id: str) -> list[tuple[int, str]]:
    """Node 10 comes after node 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"[:.]", node_id)]


def run(workflow_file: Path, out: Path, comfyui: str | None = None) -> list[Path]:
    """Start a ComfyUI, run one workflow in it, and put what it shows and trains into ``out``."""
    workflow = read(workflow_file)
    check_out(out)
    server = _server(workflow_file, workflow, comfyui)
    print(f"Starting ComfyUI from {server.comfyui} ...", flush=True)
    began = time.monotonic()
    try:
        if not trains(workflow):  # a LoRA of the name to save would make the new one NAME_2
            give(workflow, server.models_dir / LORAS)
        server.start()
        client = Client(server.url)
        prompt = to_prompt(workflow, client.object_info())
        print(f"Ready after {time.monotonic() - began:.0f} s. Running {workflow_file.stem}:", flush=True)
        lines = ProgressLines(prompt)
        try:
            history = client.run(prompt, lines, timeout=24 * 3600, extra_data={"extra_pnginfo": {"workflow": workflow}})
        finally:
            lines.finish()
        with replacing_results(out, workflow_file.stem) as results:
            save(history, prompt, client, results.folder)
            if trains(workflow):
                collect(server.models_dir / LORAS, server.output_dir / "editloss" / "runs", results.folder)
        return results.placed
    finally:
        server.close()


def check(workflow_file: Path, comfyui: str | None = None) -> bool:
    """Start a ComfyUI and check each training of a workflow, without training. Prints what is found; True if all is right."""
    workflow = read(workflow_file)
    server = _server(workflow_file, workflow, comfyui)
    print(f"Starting ComfyUI from {server.comfyui} ...", flush=True)
    right = True
    try:
        server.start()
        client = Client(server.url)
        object_info = client.object_info()
        checks = checks_of(to_prompt(workflow, object_info), object_info)
        if not checks:
            raise WorkflowError(f"{workflow_file}: there is no Train Edit LoRA in it to check")
        for node_id, prompt in checks.items():
            lines = ProgressLines(prompt)
            try:
                history = client.run(prompt, lines, timeout=3600)
            finally:
                lines.finish()
            (text,) = history.outputs[node_id]["text"]
            print(f"\n{text}", flush=True)
            right = right and text.startswith("self-check passed")
    finally:
        server.close()
    return right


def checks_of(prompt: dict[str, Any], object_info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each Train Edit LoRA its id, and a prompt of what stands before it, with the check in its place.

    A model that comes from another training is the one that went into that.
    """
    declared = object_info[CHECK]["input"]
    known = {*declared["required"], *declared["optional"]}

    def untrained(value: Any) -> Any:
        while _is_link(value) and prompt[value[0]]["class_type"] == TRAINER:
            if value[1] != MODEL_OUTPUT:
                raise WorkflowError(
                    f"--check: node {value[0]} would have to train first; check it in a graph of its own"
                )
            value = prompt[value[0]]["inputs"]["model"]
        return value

    def _is_link(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and value[0] in prompt

    made = {}
    for node_id, node in prompt.items():
        if node["class_type"] != TRAINER:
            continue
        inputs = {name: untrained(value) for name, value in node["inputs"].items() if name in known}
        part = {node_id: {**node, "class_type": CHECK, "inputs": inputs}}
        waiting = [inputs]
        while waiting:
            for value in waiting.pop().values():
                if _is_link(value) and value[0] not in part:
                    before = prompt[value[0]]
                    inputs = {name: untrained(v) for name, v in before["inputs"].items()}
                    part[value[0]] = {**before, "inputs": inputs}
                    waiting.append(inputs)
        made[node_id] = part
    return made


def _server(workflow_file: Path, workflow: dict[str, Any], comfyui: str | None) -> ComfyServer:
    """For a workflow that names models to download, and for a user's own, one that reads what that ComfyUI has."""
    wants_models = any(node.get("properties", {}).get("models") for node in workflow["nodes"])
    return ComfyServer(comfyui, borrow=wants_models or workflow_file.resolve().parent != HERE)


def trains(workflow: dict[str, Any]) -> bool:
    """Whether a LoRA is trained when the workflow runs."""
    return any(node.get("type") == TRAINER and node.get("mode") not in NOT_RUN for node in workflow["nodes"])


def collect(loras: Path, runs: Path, out: Path) -> None:
    """Copy LoRAs that were trained, and the logs of their runs with the held-out pictures, from the server's folders, which go
    away with it."""
    files = {p: out / LORAS / p.relative_to(loras) for p in loras.rglob("*.safetensors")}
    for log in runs.rglob("log.jsonl"):
        name = log.parent.relative_to(runs).as_posix()
        files[log] = out / f"{name}.log.jsonl"
        files |= {p: out / f"{name}.pictures" / p.name for p in (log.parent / "pictures").glob("*.png")}
    for path, target in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def give(workflow: dict[str, Any], folder: Path) -> None:
    """Put the LoRAs of earlier runs where ComfyUI lists them, and print which file is behind one that is loaded."""
    given = give_loras(RESULTS, folder)
    widgets = [node.get("widgets_values") or () for node in workflow["nodes"] if node.get("mode") not in NOT_RUN]
    values = [value for some in widgets for value in (some.values() if isinstance(some, dict) else some)]
    named = {value.replace("\\", "/") for value in values if isinstance(value, str)}
    for name in sorted(given.keys() & named):
        print(f"LoRA {name}: {given[name]}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "name",
        nargs="?",
        default=DEFAULT,
        metavar="NAME",
        help=f"a workflow of this folder, or a path to a .json (default: {DEFAULT})",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to save (default: results/NAME of this repository)"
    )
    parser.add_argument("--comfyui", metavar="PATH", help="the ComfyUI folder to use")
    parser.add_argument("--list", action="store_true", help="list the workflows and stop")
    parser.add_argument("--check", action="store_true", help="check the gradients of its training, and train nothing")
    args = parser.parse_args(argv)
    began = time.monotonic()
    if args.list:
        print("\n".join(available()))
        return 0
    try:
        workflow_file = find(args.name)
        if args.check:
            return 0 if check(workflow_file, args.comfyui) else 1
        out = (args.out or RESULTS / workflow_file.stem).absolute()
        saved = run(workflow_file, out, args.comfyui)
    except (ComfyError, WorkflowError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    print(f"\nSaved {len(saved)} file{'' if len(saved) == 1 else 's'} to {out}")
    print(f"Done in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a title that the console cannot show must not end the run
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the server ends as well
    sys.exit(main())
