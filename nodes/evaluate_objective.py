"""What an objective says about outputs, as numbers and as a picture."""

from __future__ import annotations

import json

from comfy_api.latest import io, ui

from ..editloss_core import objective_report as reports
from .checks import checked
from .notices import say
from .sockets import EmbeddingsSocket, ObjectiveSocket

CATEGORY = "EditLoss/diagnostics"


class EvaluateObjective(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossEvaluateObjective",
            display_name="Evaluate Objective",
            category=CATEGORY,
            description="Every term's value, distances and heat map for a batch of outputs: which fails, by which term, and where.",
            inputs=[
                ObjectiveSocket.Input("objective", tooltip="Terms from a chain of loss nodes or from the preset."),
                EmbeddingsSocket.Input("embeddings", tooltip="Must hold every role and encoder that the terms name."),
                io.Image.Input("pred", optional=True, tooltip="The outputs, to draw the heat maps on. Open: they lie on grey."),
                io.Image.Input("gt", optional=True, tooltip="The after picture, shown for comparison."),
                io.Image.Input("src", optional=True, tooltip="The before picture, shown for comparison."),
                io.Int.Input(
                    "width", default=1600, min=640, max=4096, step=32, optional=True, tooltip="Of the picture, in pixels."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The report as a picture, for Save Image."),
                io.String.Output(display_name="text", tooltip="The report as a Markdown table, for Preview as Text."),
                io.Float.Output(display_name="total", tooltip="Σ weight · value."),
                io.String.Output(display_name="values", tooltip="Everything as JSON, for scripts."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, objective, embeddings, pred=None, gt=None, src=None, width=1600) -> io.NodeOutput:
        report = objective.evaluate(embeddings)
        text = reports.text_table(report)
        pred, gt, src = (None if images is None else images[..., :3] for images in (pred, gt, src))
        picture = reports.picture(report, pred, gt, src, width)
        values = json.dumps({**report.as_dict(), "signal": report.signal()}, allow_nan=False)
        shown = {**ui.PreviewImage(picture, cls=cls).as_dict(), **say(cls, text.replace("**", ""))}
        return io.NodeOutput(picture, text, float(report.total), values, ui=shown)


NODES = [EvaluateObjective]
