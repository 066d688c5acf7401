"""Which outputs of an edit failed, how and where, judged from their pixels."""

from __future__ import annotations

import json

import comfy.model_management
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..editloss_core.verdict.items import Failing, Item, summary, table, with_signals
from ..editloss_core.verdict.picture import MAPS, heat, sheet
from .checks import checked
from .notices import say
from .sockets import EmbeddingsSocket, ObjectiveSocket

CATEGORY = "EditLoss/diagnostics"


class DiagnoseOutputs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossDiagnoseOutputs",
            display_name="Diagnose Outputs (Verdicts)",
            category=CATEGORY,
            description="Judges outputs of any edit model from pixels and geometry: good, no edit, overlay, distorted, collateral "
            "change, unusable, or undecided where not all can be asked, with scores and heat maps. It asks no encoder, so that it "
            "can contradict a training signal.",
            inputs=[
                io.Image.Input("before", tooltip="The pictures before the edit: one per output, or one for all."),
                io.Image.Input("output", tooltip="What the model made of them; of the same proportions, within two per cent."),
                io.Image.Input(
                    "after", optional=True,
                    tooltip="What it should have made. Open: distorted cannot be answered, the rest only with a mask, and nothing is called good.",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Where the edit belongs: both objects with their shadows. Open: it is estimated from before and after.",
                ),
                ObjectiveSocket.Input(
                    "objective", optional=True,
                    tooltip="With embeddings: shows what these losses say of the same outputs beside the verdict.",
                ),
                EmbeddingsSocket.Input(
                    "embeddings", optional=True, tooltip="Of the same outputs in the same order, from Encode by Role."
                ),
                io.Int.Input(
                    "width", default=1600, min=640, max=4096, step=32, optional=True, tooltip="Of the picture, in pixels."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="Contact sheet: verdict, scores, pictures and heat maps, for Save Image."),
                io.Image.Output(
                    display_name="maps",
                    tooltip="Four per output, laid over it: unchanged, old object, shape, background. Grey where not answered.",
                ),
                io.String.Output(display_name="text", tooltip="The verdicts as a Markdown table, for Preview as Text."),
                io.String.Output(display_name="values", tooltip="Verdicts, scores and measures as JSON, for scripts."),
                io.Float.Output(display_name="failure_rate", tooltip="Share of the judged outputs that failed or are undecided, 0 to 1."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(
        cls, before, output, after=None, mask=None, objective=None, embeddings=None, width=1600
    ) -> io.NodeOutput:
        count = len(output)
        mask = mask[None] if mask is not None and mask.ndim == 2 else mask
        given = {"before": before, "output": output, "after": after, "mask": mask}
        for name, batch in given.items():
            if batch is not None and len(batch) not in (1, count):
                raise ValueError(f"{name}: expected 1 or {count} like output, got {len(batch)}")
        report = _signal(objective, embeddings, count)
        items = []
        bar = ProgressBar(count)
        for i in range(count):
            comfy.model_management.throw_exception_if_processing_interrupted()
            items.append(Item.judged(f"output {i + 1}", **{k: _nth(x, i) for k, x in given.items() if x is not None}))
            bar.update_absolute(i + 1, count)
        failed = [item for item in items if item.verdict is None]
        if len(failed) == count:
            raise ValueError(failed[0].message)
        if report is not None:
            items = with_signals(items, report)
        picture, failing = sheet(items, width), Failing.of(items)
        maps = torch.stack([_map(item, name, _nth(output, i)) for i, item in enumerate(items) for name in MAPS])
        low, high = failing.interval
        rate = failing.most.value
        values = {
            "outputs": [item.as_dict() for item in items],
            "failure_rate": {"value": rate, "low": low, "high": high, "n": failing.n, "undecided": failing.undecided},
        }
        notes = [f"{item.name}: {item.message}" for item in failed]
        disagreeing = sum(bool(item.disagreement) for item in items)
        lines = [summary(items), f"failing: {failing}"]
        if report is not None:
            lines.append(f"the training signal says something else for {disagreeing} of {failing.n}")
        text = table(items)
        shown = say(cls, "\n".join(lines + notes), notes, text)
        return io.NodeOutput(
            picture, maps, text, json.dumps(values, allow_nan=False), rate,
            ui={**ui.PreviewImage(picture, cls=cls).as_dict(), **shown},
        )  # fmt: skip


def _signal(objective, embeddings, count: int):
    """What the objective says about the outputs; None without one."""
    if objective is None and embeddings is None:
        return None
    if objective is None or embeddings is None:
        missing = "objective" if objective is None else "embeddings"
        raise ValueError(
            f"{missing}: expected it together with {'embeddings' if objective is None else 'objective'}, got nothing"
        )
    report = objective.evaluate(embeddings)
    if len(report.signal()) != count:
        raise ValueError(f"embeddings: expected {count} outputs like output, got {len(report.signal())}")
    return report


def _nth(batch: torch.Tensor, i: int) -> torch.Tensor:
    one = batch[i if len(batch) > 1 else 0]
    return one[..., :3] if one.ndim == 3 else one


def _map(item: Item, name: str, output: torch.Tensor) -> torch.Tensor:
    values = item.verdict.maps.get(name) if item.verdict else None
    return heat(output.float().cpu().nan_to_num(), torch.zeros(output.shape[:2]) if values is None else values)


NODES = [DiagnoseOutputs]
