"""What is wrong with a set of before/after pairs, before any training."""

from __future__ import annotations

import json

import comfy.model_management
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..editloss_core.pair_audit.audit import audit
from ..editloss_core.pair_audit.picture import audit_picture
from ..editloss_core.pairs import folder_state
from . import folders
from .checks import checked
from .notices import say
from .sockets import EncoderSocket, PairsSocket

CATEGORY = "EditLoss/diagnostics"


class AuditPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossAuditPairs",
            display_name="Audit Pairs",
            category=CATEGORY,
            description="Looks for pairs that would spoil a training: swapped, shifted, zoomed, without an edit, with a mask in the wrong "
            "place, twice. Names the files and says what to do.",
            inputs=[
                io.String.Input(
                    "folder", default="pairs",
                    tooltip="Below ComfyUI's input folder, as in Load Pairs, and it may be broken. Not looked at if pairs is wired.",
                ),
                io.String.Input(
                    "control_folder", default="", optional=True,
                    tooltip="For data sets made for ai-toolkit: folder is the target folder (after), this one the control folder "
                    "(before).",
                ),
                io.String.Input(
                    "default_caption", default="", optional=True, tooltip="The instruction for pairs without a .txt file."
                ),
                PairsSocket.Input("pairs", optional=True, tooltip="Pairs from Load Pairs, Make Pairs or Demo Pairs, instead of the folder."),
                PairsSocket.Input(
                    "others", optional=True,
                    tooltip="Another set that should share no picture with this one, such as the validation pairs.",
                ),
                EncoderSocket.Input(
                    "encoder", optional=True,
                    tooltip="Helps to find swapped pairs. Open: colours and shapes are compared, which most often suffices.",
                ),
                io.Int.Input(
                    "width", default=1600, min=640, max=4096, step=32, optional=True, tooltip="Of the picture, in pixels."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The pairs with findings, worst first, for Save Image."),
                io.String.Output(display_name="text", tooltip="The whole report as Markdown, for Preview as Text."),
                io.Boolean.Output(display_name="ok", tooltip="True without errors and warnings; notes are allowed."),
                io.Int.Output(display_name="problems", tooltip="Number of errors and warnings."),
                io.String.Output(display_name="values", tooltip="Everything as JSON, for scripts."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder, control_folder="", **others) -> str | float:
        if "pairs" in others:  # wired: what it brings is compared by ComfyUI, and the folder is not looked at
            return "pairs"
        try:
            return folder_state(*_places(folder, control_folder))
        except (AttributeError, ValueError, OSError):  # linked, so not known yet, or no such folder: execute says why
            return float("nan")

    @classmethod
    @checked()
    def execute(
        cls, folder, control_folder="", default_caption="", pairs=None, others=None, encoder=None, width=1600
    ) -> io.NodeOutput:
        bar = ProgressBar(1)
        source = [pairs] if pairs is not None else _places(folder, control_folder)
        found = audit(
            *source, default_caption=default_caption, others=others, encoder=encoder,
            progress=lambda done, total: bar.update_absolute(done, total),
            check=comfy.model_management.throw_exception_if_processing_interrupted,
        )  # fmt: skip
        picture, text, counts = audit_picture(found, width), found.text(), found.counts()
        values = json.dumps(found.as_dict(), allow_nan=False)
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(
            picture, text, found.ok, counts["error"] + counts["warning"], values,
            ui={**shown, **say(cls, found.summary(), [] if found.ok else [found.headline()], text)},
        )  # fmt: skip


def _places(folder: str, control_folder: str) -> list:
    control = [folders.pair_folder("control_folder", control_folder)] if control_folder.strip() else []
    return [folders.pair_folder("folder", folder), *control]


NODES = [AuditPairs]
