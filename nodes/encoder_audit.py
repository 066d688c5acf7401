"""Which of a person's encoders would have noticed a failed edit, before any training."""

from __future__ import annotations

import json

import comfy.model_management
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..editloss_core.encoder_audit.audit import audit_encoders
from ..editloss_core.encoder_audit.picture import audit_picture
from ..editloss_core.encoders.base import Encoder
from .checks import checked
from .notices import say
from .sockets import EncoderSocket, PairsSocket

CATEGORY = "EditLoss/diagnostics"


def _another(name: str) -> EncoderSocket.Input:
    return EncoderSocket.Input(name, optional=True, tooltip="Another encoder to compare with.")


class AuditEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossAuditEncoders",
            display_name="Audit Encoders",
            category=CATEGORY,
            description="Shows encoders your own pairs with made failures: which one notices a missing edit, an overlay, a distortion, "
            "and which margin each loss can use.",
            inputs=[
                PairsSocket.Input("pairs", tooltip="From Load Pairs or Make Pairs. A dozen or more, or little can be said for sure."),
                EncoderSocket.Input("encoder_1", tooltip="The encoder that you think of training with."),
                _another("encoder_2"),
                _another("encoder_3"),
                _another("encoder_4"),
                io.Boolean.Input(
                    "layers", default=True, optional=True,
                    tooltip="On: up to six layers of every timm encoder of grid or tokens, whatever its own. Off: its own alone, "
                    "several times faster.",
                ),
                io.Int.Input(
                    "max_pairs", default=24, min=1, max=500, optional=True,
                    tooltip="At most so many pairs, evenly spaced. Fewer are faster and say less.",
                ),
                io.Int.Input(
                    "crop", default=512, min=0, max=2048, step=16, optional=True,
                    tooltip="Side of the window around the edit that the encoders see, in pixels. Take the crop of the training. 0: "
                    "whole pictures.",
                ),
                io.Int.Input(
                    "batch_size", default=4, min=1, max=64, optional=True,
                    tooltip="Pictures per pass. Lower it when memory is short; the result is the same.",
                ),
                io.Int.Input(
                    "width", default=1600, min=640, max=4096, step=32, optional=True, tooltip="Of the picture, in pixels."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="Encoders × failures, for Save Image."),
                io.String.Output(display_name="text", tooltip="The same as Markdown tables, for Preview as Text."),
                io.String.Output(display_name="values", tooltip="Everything as JSON, for scripts."),
                io.Float.Output(
                    display_name="no_edit_margin",
                    tooltip="Margin for No-Edit Identity with the recommended encoder; 0 where none fits.",
                ),
                io.Float.Output(
                    display_name="overlay_margin",
                    tooltip="Margin for Overlay Avoidance with the recommended encoder; 0 where none fits.",
                ),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(
        cls, pairs, encoder_1, encoder_2=None, encoder_3=None, encoder_4=None, layers=True, max_pairs=24, crop=512,
        batch_size=4, width=1600,
    ) -> io.NodeOutput:  # fmt: skip
        encoders = _named(encoder_1, encoder_2, encoder_3, encoder_4)
        bar = ProgressBar(1)
        audit = audit_encoders(
            pairs, encoders, layers=layers, crop=crop, max_pairs=max_pairs, batch_size=batch_size,
            progress=lambda done, total: bar.update_absolute(done, total),
            check=comfy.model_management.throw_exception_if_processing_interrupted,
        )  # fmt: skip
        picture, text = audit_picture(audit, width), audit.text()
        margins = {r.failure: r.margin or 0.0 for r in audit.recommendations}
        values = json.dumps(audit.as_dict(), allow_nan=False)
        advice = "\n".join(f"{r.term}: {r.reason}" for r in audit.recommendations)
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(
            picture, text, values, margins.get("no edit", 0.0), margins.get("overlay", 0.0),
            ui={**shown, **say(cls, advice, audit.notes)},
        )  # fmt: skip


def _named(*wired: Encoder | None) -> dict[str, Encoder]:
    encoders: dict[str, Encoder] = {}
    for place, encoder in enumerate(wired, 1):
        if encoder is None:
            continue
        if encoder.info.name in encoders:
            raise ValueError(
                f"encoder_{place}: expected another encoder than the ones above it, got a second {encoder.info.name!r}; give "
                "one of the two another name"
            )
        encoders[encoder.info.name] = encoder
    return encoders


NODES = [AuditEncoders]
