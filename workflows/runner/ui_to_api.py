"""Turn a workflow as the ComfyUI frontend saves it (LiteGraph JSON 0.4) into the prompt the server runs.

The server does not read the saved format: the frontend converts it with ``app.graphToPrompt()`` in the
browser. This module does the same without a browser, so that a saved workflow can be run from a terminal.
``tests/comfyui/test_run.py`` holds the result against the frontend's own, on the same graph.

Left out on purpose, because they live in the browser alone: subgraphs and group nodes (one clear error),
random ``{a|b}`` choices in text, and ``%Node.widget%`` replacements in file names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Nodes that exist in the frontend only; links pass through them or end in them.
VIRTUAL_CLASSES = frozenset({"Note", "MarkdownNote", "Reroute", "PrimitiveNode"})
WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
UPLOAD_OPTIONS = ("image_upload", "video_upload", "animated_image_upload")
MUTED, BYPASSED = 2, 4


class WorkflowError(ValueError):
    """The file cannot be turned into a prompt; the message says which node and why."""


@dataclass(frozen=True)
class _Input:
    """One input of a node class, from ``/object_info``."""

    name: str
    type: str
    options: dict[str, Any]
    choices: tuple[Any, ...] = ()

    @classmethod
    def from_spec(cls, name: str, spec: Any) -> _Input:
        kind = spec[0]
        options = (spec[1] if len(spec) > 1 else None) or {}
        if isinstance(kind, (list, tuple)):  # [["a", "b"], {...}], the older way to write a COMBO
            return cls(name, "COMBO", options, tuple(kind))
        return cls(name, kind, options, tuple(options.get("options") or ()) if kind == "COMBO" else ())

    @property
    def is_widget(self) -> bool:
        kind = self.options.get("widgetType") or self.type
        return kind in WIDGET_TYPES and not self.options.get("forceInput")

    @property
    def has_socket(self) -> bool:
        return not (self.is_widget and self.options.get("socketless"))

    @property
    def extra_slots(self) -> int:
        """Values the frontend stores after this one: "control after generate", and a filter for lists."""
        if self.type == "INT":
            return int(bool(self.options.get("control_after_generate", self.name in ("seed", "noise_seed"))))
        if self.type == "COMBO" and self.options.get("control_after_generate"):
            return 2
        return 0

    def default(self) -> Any:
        """What a fresh widget shows; None where the frontend has nothing to send."""
        if self.type == "COMBO":
            return self.options.get("default") or (self.choices[0] if self.choices else None)
        return self.options.get("default", {"STRING": "", "BOOLEAN": False}.get(self.type, 0))


def _class_inputs(info: dict[str, Any]) -> list[_Input]:
    """The inputs of a class in the order in which the frontend makes their widgets."""
    found: list[_Input] = []
    for group in ("required", "optional"):
        specs = info.get("input", {}).get(group) or {}
        order = (info.get("input_order") or {}).get(group) or []
        names = [name for name in order if name in specs]
        found += [_Input.from_spec(name, specs[name]) for name in [*names, *(n for n in specs if n not in names)]]
    return found


def _drop_old_slots(inputs: list[_Input], values: list[Any]) -> list[Any]:
    """Files from before ``forceInput`` inputs lost their widget still hold a value for them.

    The frontend recognises such a file by the number of values alone; this follows it to the letter.
    """
    upload = any(i.type == "COMBO" and any(i.options.get(key) for key in UPLOAD_OPTIONS) for i in inputs)
    with_slot = [i for i in inputs if i.is_widget or i.options.get("forceInput")]
    count = (
        sum(2 if i.options.get("control_after_generate") or i.name in ("seed", "noise_seed") else 1 for i in with_slot)
        + upload
    )
    if count != len(values):
        return values
    forced = [bool(i.options.get("forceInput")) for i in with_slot]
    return [value for k, value in enumerate(values) if not (k < len(forced) and forced[k])]


def _widget_values(inputs: list[_Input], saved: Any) -> dict[str, Any]:
    """Widget name to value: saved ones first, the class's defaults where the file holds none."""
    widgets = [i for i in inputs if i.is_widget]
    values = {i.name: i.default() for i in widgets if i.default() is not None}
    if isinstance(saved, dict):  # some packs save their widgets by name
        return values | {i.name: saved[i.name] for i in widgets if i.name in saved}
    slots = _drop_old_slots(inputs, list(saved or ()))
    at = 0
    for widget in widgets:
        if at >= len(slots):
            break
        values[widget.name] = slots[at]
        at += 1 + widget.extra_slots
    return values


def _fits(a: str, b: str) -> bool:
    """LiteGraph's rule for connecting two types: wildcards, lists with commas, any case."""
    if a in ("", "*") or b in ("", "*"):
        return True
    return bool(set(str(a).lower().split(",")) & set(str(b).lower().split(",")))


class _Graph:
    """The saved nodes and links, and where each link really comes from."""

    def __init__(self, workflow: dict[str, Any], object_info: dict[str, Any]) -> None:
        self.info = object_info
        self.nodes: dict[str, dict[str, Any]] = {str(node["id"]): node for node in workflow["nodes"]}
        self.links = {link[0]: (str(link[1]), int(link[2])) for link in workflow.get("links") or () if link}

    def active(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The nodes that the server is to see."""
        for node_id, node in self.nodes.items():
            if node["type"] not in VIRTUAL_CLASSES and node.get("mode") not in (MUTED, BYPASSED):
                yield node_id, node

    def slots(self, node: dict[str, Any]) -> list[dict[str, Any]]:
        """A node's input sockets as the live graph has them: the class's own, then what the file adds."""
        saved = node.get("inputs") or []
        info = self.info.get(node["type"])
        if info is None:
            return saved
        by_name = {slot["name"]: slot for slot in saved}
        inputs = [i for i in _class_inputs(info) if i.has_socket]
        inputs.sort(key=lambda i: i.is_widget)  # stable: plain sockets lie above those of widgets
        names = {i.name for i in inputs}
        live = [{"name": i.name, "type": i.type, "link": by_name.get(i.name, {}).get("link")} for i in inputs]
        # An extra socket that claims to belong to a widget which the class no longer has is dropped.
        return live + [slot for slot in saved if slot["name"] not in names and not slot.get("widget")]

    def origin(self, node_id: str, slot: dict[str, Any]) -> tuple[str, int]:
        """The node and output at the other end of a connected socket."""
        origin = self.links.get(slot["link"])
        if origin is None or origin[0] not in self.nodes:
            raise WorkflowError(
                f"{self.name(node_id)}: input '{slot['name']}' uses link {slot['link']}, "
                "which leads nowhere in this file"
            )
        return origin

    def source(
        self,
        node_id: str,
        slot: dict[str, Any],
        kind: str | None = None,
        seen: frozenset[tuple[str, str]] = frozenset(),
    ) -> tuple[str, int] | None:
        """Follow a link through reroutes and bypassed nodes to the output that feeds it, if any does."""
        if slot.get("link") is None:
            return None
        here = (node_id, slot["name"])
        if here in seen:
            raise WorkflowError(f"{self.name(node_id)}: the links run in a circle at input '{slot['name']}'")
        seen |= {here}
        kind = kind if kind is not None else str(slot.get("type", "*"))
        from_id, output = self.origin(node_id, slot)
        node = self.nodes[from_id]
        slots = self.slots(node)
        if node.get("mode") == BYPASSED:
            through = self._bypass(node, slots, output, kind)
            return None if through is None else self.source(from_id, through, None, seen)
        if node["type"] in VIRTUAL_CLASSES:
            return self.source(from_id, slots[output], kind, seen) if output < len(slots) else None
        return from_id, output

    def _bypass(
        self, node: dict[str, Any], slots: list[dict[str, Any]], output: int, kind: str
    ) -> dict[str, Any] | None:
        """The input that a bypassed node hands on as its output number ``output``."""
        if not slots:
            return None
        if kind in ("*", ""):
            return slots[output] if output < len(slots) else slots[0]
        out_type = self._output_type(node, output)
        matching = [s for s in slots if _fits(str(s["type"]), out_type) and _fits(str(s["type"]), kind)]
        if output < len(slots) and slots[output] in matching:
            return slots[output]
        exact = [s for s in slots if s["type"] == kind]
        return next(iter(exact or matching), None)

    def _output_type(self, node: dict[str, Any], output: int) -> str:
        types = self.info.get(node["type"], {}).get("output") or [o["type"] for o in node.get("outputs") or ()]
        kind = types[output] if output < len(types) else "*"
        return "COMBO" if isinstance(kind, (list, tuple)) else str(kind)

    def primitive_value(self, node_id: str, slot: dict[str, Any]) -> tuple[Any, ...]:
        """``(value,)`` if a PrimitiveNode feeds this socket directly, else ``()``."""
        node = self.nodes[self.origin(node_id, slot)[0]]
        values = node.get("widgets_values") or ()
        return tuple(values[:1]) if node["type"] == "PrimitiveNode" else ()

    def title(self, node: dict[str, Any]) -> str:
        """The title that the user gave, else the display name; some files hold the class name as a title."""
        kind = node["type"]
        given = node.get("title")
        return given if given and given != kind else self.info[kind].get("display_name") or kind

    def name(self, node_id: str) -> str:
        return f"node {node_id} ({self.nodes[node_id]['type']})"


def _check(workflow: dict[str, Any], graph: _Graph) -> None:
    """Say everything that stands in the way before any work is done."""
    subgraphs = {s.get("id") for s in (workflow.get("definitions") or {}).get("subgraphs") or ()}
    missing: dict[str, list[str]] = {}
    for node_id, node in graph.active():
        if node["type"] in subgraphs:
            raise WorkflowError(
                f"node {node_id} ({node.get('title') or node['type']}) is a subgraph; "
                "unpack it in ComfyUI and save again"
            )
        if node["type"] not in graph.info:
            missing.setdefault(node["type"], []).append(node_id)
    if missing:
        listed = ", ".join(f"{name} (node {', '.join(ids)})" for name, ids in sorted(missing.items()))
        raise WorkflowError(f"this ComfyUI has no node class for: {listed}")


def is_saved_workflow(content: Any) -> bool:
    """Whether this is a workflow as the page saves it; an exported API prompt is not."""
    if not isinstance(content, dict) or not isinstance(content.get("nodes"), list):
        return False
    links = content.get("links") or []
    return (
        all(isinstance(node, dict) and {"id", "type"} <= node.keys() for node in content["nodes"])
        and isinstance(links, list)
        and all(isinstance(link, list) for link in links if link)
    )


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """Convert a saved workflow to an API prompt, as the frontend does when "Run" is pressed.

    Args:
        workflow: the saved JSON, version 0.4 (``nodes`` and ``links`` arrays).
        object_info: the answer of the server's ``/object_info``.

    Returns:
        ``{node id: {"class_type", "inputs", "_meta": {"title"}}}``. An input is a value, or
        ``[node id, output slot]`` for a link. Muted, bypassed and frontend-only nodes are not in it.

    Raises:
        WorkflowError: for another format, missing node classes (all of them at once), subgraphs, or links
            that lead nowhere or run in a circle.
    """
    if not is_saved_workflow(workflow):
        raise WorkflowError("expected a saved workflow with a 'nodes' list; an exported API prompt has none")
    graph = _Graph(workflow, object_info)
    _check(workflow, graph)
    prompt: dict[str, Any] = {}
    for node_id, node in graph.active():
        class_inputs = _class_inputs(object_info[node["type"]])
        inputs = _widget_values(class_inputs, node.get("widgets_values"))
        for slot in graph.slots(node):
            if slot.get("link") is None:
                continue
            source = graph.source(node_id, slot)
            if source is not None:
                inputs[slot["name"]] = source
            elif slot["name"] in inputs:
                inputs[slot["name"]] = (*graph.primitive_value(node_id, slot), inputs[slot["name"]])[0]
        prompt[node_id] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": graph.title(node)}}
    for node in prompt.values():
        node["inputs"] = {
            name: _encode(value)
            for name, value in node["inputs"].items()
            if not (isinstance(value, tuple) and value[0] not in prompt)
        }
    return prompt


def _encode(value: Any) -> Any:
    """Links become two-item lists, so a list that is a value has to be wrapped; the server unwraps it."""
    if isinstance(value, tuple):
        return list(value)
    return {"__value__": value} if isinstance(value, list) else value
