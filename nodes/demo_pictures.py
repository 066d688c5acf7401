"""Pictures and pairs that come with the pack, so that an example graph runs before anybody has put a file anywhere."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..editloss_core.demo import pictures
from ..editloss_core.drawing import grid
from .checks import checked
from .demo import CATEGORY
from .notices import say
from .pairs import SHOWN, describe, sheet
from .sockets import PairsSocket


class ExamplePictures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossExamplePictures",
            display_name="Example Pictures",
            category=CATEGORY,
            description="A pair that comes with the pack, and five outputs of its edit: a good one, one without an edit, an overlay, a "
            "distorted one, and one with a change elsewhere. To try the nodes before you have pictures of your own.",
            inputs=[
                io.Combo.Input(
                    "scene", options=list(pictures.SCENES), default="oak chair",
                    tooltip="A rendered room of 384 pixels, or the drawn room of 128 that the demo model knows. Try another one and look "
                    "what the verdicts make of it.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="before", tooltip="The picture before the edit."),
                io.Image.Output(display_name="after", tooltip="What the edit should give."),
                io.Mask.Output(display_name="mask", tooltip="The edit region: where either object is."),
                io.Image.Output(
                    display_name="outputs",
                    tooltip="Five outputs as one batch: good, no edit, overlay, distorted, collateral change. ImageFromBatch (Get Image from "
                    "Batch) takes some out.",
                ),
                io.String.Output(display_name="names", tooltip="What each output is, a line for each."),
                io.String.Output(display_name="caption", tooltip="The instruction of the pair."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, scene) -> io.NodeOutput:
        pair = pictures.edit(scene)
        outputs = pictures.outputs(pair)
        shown = {"before": pair.before, "after": pair.after, **outputs}
        shown |= {"mask": pair.mask.unsqueeze(-1).expand(-1, -1, 3)}
        rows = [list(shown)[i : i + 2] for i in range(0, len(shown), 2)]
        picture = grid.grid([[shown[n] for n in row] for row in rows], ("", ""), notes=rows, width=560)
        return io.NodeOutput(
            pair.before[None], pair.after[None], pair.mask[None], torch.stack(list(outputs.values())), "\n".join(outputs),
            pair.caption, ui={**ui.PreviewImage(picture, cls=cls).as_dict(), **say(cls, pair.caption)},
        )  # fmt: skip


class ExamplePairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossExamplePairs",
            display_name="Example Pairs",
            category=CATEGORY,
            description="Six rendered pairs that come with the pack, and four more with a mistake that people make: nothing edited, the "
            "after picture shifted, the mask elsewhere, one pair twice.",
            inputs=[
                io.Int.Input(
                    "resolution", default=384, min=64, max=2048, step=16,
                    tooltip="What the pairs would be trained at, in pixels squared; they have 384. Smaller is quicker to look at.",
                ),
            ],
            outputs=[
                PairsSocket.Output(display_name="pairs", tooltip="To Audit Pairs or Audit Encoders."),
                io.String.Output(display_name="report", tooltip="What was found: sizes, buckets, captions, masks."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, resolution) -> io.NodeOutput:
        pairs = pictures.example_pairs(resolution)
        text = describe(pairs)
        shown = ui.PreviewImage(
            sheet(pairs.subset(range(len(pairs) - SHOWN, len(pairs)))), cls=cls
        ).as_dict()  # the mistakes
        return io.NodeOutput(pairs, text, ui={**shown, **say(cls, text, pairs.notes)})


NODES = [ExamplePictures, ExamplePairs]
