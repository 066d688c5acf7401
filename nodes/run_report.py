"""A training run, judged by what its held-out pictures show."""

from __future__ import annotations

import comfy.model_management
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..editloss_core.run_report.report import picture, text, write_page
from ..editloss_core.run_report.verdicts import judge_run
from .checks import checked
from .folders import RUN_FOLDER
from .notices import say
from .sockets import RunSocket

CATEGORY = "EditLoss/diagnostics"


class RunReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossRunReport",
            display_name="Run Report",
            category=CATEGORY,
            description="Judges the held-out pictures of every validation from their pixels, and says which checkpoint fails least: on "
            "the node, and as one HTML page in the run's folder.",
            inputs=[
                RunSocket.Input("run", tooltip="From Train Edit LoRA, with held-out pairs."),
                io.Int.Input("width", default=1600, min=640, max=4096, step=32, optional=True, tooltip="Of the picture, in pixels."),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="Failure rates, the best step, and held-out pairs with verdicts."),
                io.String.Output(display_name="text", tooltip="The choice, a table of validations and notes, as Markdown."),
                io.String.Output(display_name="page", tooltip="The HTML page: output/editloss/runs/NAME/report.html."),
                io.Int.Output(display_name="best_step", tooltip="The step that fails least; 0 if nothing could be judged."),
                io.String.Output(
                    display_name="best_checkpoint",
                    tooltip="Its file in the run's folder; empty if it is not there any more.",
                ),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, run, width=1600) -> io.NodeOutput:
        if run.folder is None:
            raise ValueError("run: expected a run with a folder, got one that kept nothing")
        bar = ProgressBar(1)

        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        judged = judge_run(run.folder, progress)
        path = write_page(judged)
        shown, said = picture(judged, width), text(judged)
        page = f"output/{RUN_FOLDER.as_posix()}/{run.name}/{path.name}"
        best = judged.best
        kept = judged.checkpoint(best.step) if best else None
        name = kept.relative_to(judged.folder).as_posix() if kept else ""
        notices = say(cls, "\n".join([*judged.advice(), page]), (), said)
        return io.NodeOutput(
            shown, said, page, best.step if best else 0, name,
            ui={**ui.PreviewImage(shown, cls=cls).as_dict(), **notices},
        )  # fmt: skip


NODES = [RunReport]
