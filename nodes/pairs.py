"""Before/after pairs: from a folder, or from pictures in the graph."""

from __future__ import annotations

from collections import Counter
from typing import Optional

import comfy.model_management
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..editloss_core.drawing import grid
from ..editloss_core.pair_audit.flawed import KINDS, SETTINGS, Handled, handle
from ..editloss_core.pairs import PairSet, find_pairs, folder_state
from . import folders
from .checks import checked
from .notices import say
from .sockets import PairsSocket

CATEGORY = "EditLoss/training"
SHOWN = 6  # pairs in the preview on the node
PAIRS_OUTPUT = PairsSocket.Output(display_name="pairs", tooltip="To Train Edit LoRA.")
REPORT_OUTPUT = io.String.Output(
    display_name="report", tooltip="What was found: sizes, buckets, captions, masks, flawed pairs."
)


def _resolution_input() -> io.Int.Input:
    return io.Int.Input(
        "resolution", default=1024, min=64, max=2048, step=16,
        tooltip="Pairs are trained at about this many pixels squared, in their own proportions. 512 for 12 GB, 768 for 16 GB, "
        "1024 for 24 GB and more.",
    )  # fmt: skip


def _upscale_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "upscale", default=False, optional=True, tooltip="Enlarge small pictures to the resolution. Off: they keep their size."
    )  # fmt: skip


def flawed_input() -> io.Combo.Input:
    return io.Combo.Input(
        "flawed", options=list(SETTINGS), default="leave out", optional=True,
        tooltip="Pairs in which nothing was edited, or whose after picture still shows the old object, told by what the others have in "
        "common. They teach these failures. keep: train on them all the same. stop: an error names them.",
    )  # fmt: skip


def without_flawed(pairs: PairSet, flawed: str, bar: Optional[ProgressBar] = None) -> Handled:
    """What is left of a set; ``bar`` is at its half when this begins."""
    count = len(pairs)
    return handle(
        pairs, flawed, lambda done, total: bar.update_absolute(count + done, 2 * total) if bar is not None else None,
        comfy.model_management.throw_exception_if_processing_interrupted,
    )  # fmt: skip


def _answer(cls, pairs: PairSet, flawed: str, bar: ProgressBar) -> io.NodeOutput:
    handled = without_flawed(pairs, flawed, bar)
    text = "\n".join([describe(handled.pairs), *(f"- {note}" for note in handled.untold)])
    shown = ui.PreviewImage(sheet(pairs, handled), cls=cls).as_dict()
    return io.NodeOutput(handled.pairs, text, ui={**shown, **say(cls, text, handled.pairs.notes)})


def describe(pairs: PairSet) -> str:
    """What a set of pairs holds, in a few lines."""
    masks = sum(pair.mask is not None for pair in pairs)
    captions = Counter(pair.caption for pair in pairs)
    lines = [f"{len(pairs)} pairs{f' ({pairs.layout})' if pairs.layout else ''}; {masks} with a mask"]
    further = sum(bool(pair.references) for pair in pairs)
    lines += [f"- {further} with further references"] if further else []
    lines += [f"- {w}×{h}: {len(members)} pairs" for (h, w), members in pairs.buckets.items()]
    lines += [
        f"- {count} × “{text if len(text) <= 80 else text[:79] + '…'}”" for text, count in captions.most_common(4)
    ]
    lines += [f"- and {len(captions) - 4} other captions"] if len(captions) > 4 else []
    lines += [f"- {note}" for note in pairs.notes]
    return "\n".join(lines)


def sheet(pairs: PairSet, handled: Optional[Handled] = None) -> torch.Tensor:
    """The first flawed pairs, then the first others as they will be trained, the edit region beside them: ``[1, H, W, 3]``."""
    flaws = {flaw.name: flaw.kind for flaw in handled.found} if handled else {}
    done = "left out" if handled and handled.left_out else "kept"
    right = [i for i, pair in enumerate(pairs) if pair.name not in flaws][:SHOWN]
    shown = [i for i, pair in enumerate(pairs) if pair.name in flaws][:SHOWN] + right
    most = max((len(pairs[i].references) for i in shown), default=0)
    further = tuple(f"before_{number}" for number in range(2, 2 + most))
    rows, names, notes = [], [], []
    for index in shown:
        images, name = pairs.load(index), pairs[index].name
        nothing = torch.full_like(images.before, 0.5)
        mask = nothing if images.mask is None else images.mask.unsqueeze(-1).expand(-1, -1, 3)
        missing = [nothing] * (most - len(images.references))
        rows.append((images.before, *images.references, *missing, images.after, mask))
        kind = flaws.get(name)
        names.append(f"{name}: {done}, {KINDS[kind]}" if kind else name)
        said = {"unedited": "no edit", "overlaid": "overlay"}[kind] if kind else None
        notes.append([None, *[None] * most, said, None])
    return grid.grid(rows, ("before", *further, "after", "mask (grey: none)"), names, notes, width=900)


class LoadPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossLoadPairs",
            display_name="Load Pairs (Before, After)",
            category=CATEGORY,
            description="Before/after pairs from a folder, all checked before any work: one report names every file that is wrong.",
            inputs=[
                io.String.Input(
                    "folder", default="pairs",
                    tooltip="Below ComfyUI's input folder. It holds before/, after/ and perhaps mask/ with the same file names, or "
                    "files that end in _before and _after. Captions are .txt files of the same name.",
                ),
                _resolution_input(),
                io.String.Input(
                    "default_caption", default="", optional=True, tooltip="The instruction for pairs without a .txt file."
                ),
                io.String.Input(
                    "control_folder", default="", optional=True,
                    tooltip="For data sets made for ai-toolkit: folder is the target folder (after), this one the control folder "
                    "(before).",
                ),
                _upscale_input(),
                flawed_input(),
            ],
            outputs=[PAIRS_OUTPUT, REPORT_OUTPUT],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder, control_folder="", **others) -> str | float:
        try:
            places = [folders.pair_folder("folder", folder)]
            places += [folders.pair_folder("control_folder", control_folder)] if control_folder.strip() else []
            return folder_state(*places)
        except (AttributeError, ValueError, OSError):  # linked, so not known yet, or no such folder: execute says why
            return float("nan")

    @classmethod
    @checked()
    def execute(
        cls, folder, resolution, default_caption="", control_folder="", upscale=False, flawed="leave out"
    ) -> io.NodeOutput:
        control = folders.pair_folder("control_folder", control_folder) if control_folder.strip() else ""
        bar = ProgressBar(1)
        pairs = find_pairs(
            folders.pair_folder("folder", folder), control, resolution=resolution, default_caption=default_caption,
            upscale=upscale, progress=lambda done, total: bar.update_absolute(done, 2 * total),
        )  # fmt: skip
        return _answer(cls, pairs, flawed, bar)


class MakePairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossMakePairs",
            display_name="Make Pairs",
            category=CATEGORY,
            description="Before/after pairs from picture batches in the graph.",
            inputs=[
                io.Image.Input("before", tooltip="The pictures before the edit, one per pair."),
                io.Image.Input("after", tooltip="The pictures after it, in the same order."),
                io.String.Input(
                    "captions", default="", multiline=True,
                    tooltip="The instruction: one line for all pairs, or one line per pair.",
                ),
                _resolution_input(),
                io.Mask.Input("mask", optional=True, tooltip="The edit region, white = edited. Open: estimated from the difference."),
                _upscale_input(),
                flawed_input(),
                io.Image.Input(
                    "before_2", optional=True,
                    tooltip="A second reference, one for all pairs or one per pair, of any size; for models that look at several "
                    "(FLUX.2, Qwen-Image-Edit 2509 and 2511, OmniGen2).",
                ),
            ],
            outputs=[PAIRS_OUTPUT, REPORT_OUTPUT],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(
        cls, before, after, captions, resolution, mask=None, upscale=False, flawed="leave out", before_2=None
    ) -> io.NodeOutput:
        lines = [line.strip() for line in captions.splitlines() if line.strip()]
        if len(lines) not in (1, len(before)):
            expected = "one line" if len(before) == 1 else f"one line, or {len(before)} lines, one per pair"
            raise ValueError(f"captions: expected {expected}, got {len(lines) or 'none'}")
        if mask is not None and mask.ndim == 2:
            mask = mask[None]
        bar = ProgressBar(len(before))
        pairs = PairSet.from_images(
            before[..., :3], after[..., :3], mask, lines[0] if len(lines) == 1 else lines,
            () if before_2 is None else (before_2[..., :3],), resolution=resolution, upscale=upscale,
            progress=lambda done, total: bar.update_absolute(done, 2 * total),
        )  # fmt: skip
        return _answer(cls, pairs, flawed, bar)


NODES = [LoadPairs, MakePairs]
