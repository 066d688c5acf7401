"""A graph's training as a file, for training without ComfyUI."""

from __future__ import annotations

from comfy_api.latest import io

from ..editloss_core.files import replacing
from ..editloss_core.models.folder import QUANTIZATIONS
from ..editloss_core.pairs import PairSet
from ..editloss_core.training.config import (
    NO_VARIANTS,
    RATHER_IN_RUN,
    RATHER_IN_VALIDATION,
    EstimateSection,
    ModelSection,
    PairsSection,
    RunSection,
    TrainingConfig,
    ValidationSection,
    encoder_section,
    to_toml,
)
from ..editloss_core.training.settings import check_objective
from . import folders
from .checks import checked
from .notices import say
from .sockets import PairsSocket, TrainingOptions, WiredObjective
from .training import CATEGORY, settings_inputs, settings_of

CONFIG_HEADING = """\
Train it: python -m editloss_core.training {file}  (look at it first: --check)
On several GPUs or machines: accelerate launch -m editloss_core.training {file}
On another machine, change the paths of model, pairs and encoders; relative ones are below this file's folder."""


class Export(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossExportTraining",
            display_name="Export Training Config",
            category=CATEGORY,
            description="Writes what this graph would train as a file for training without ComfyUI: on diffusers, on one GPU or "
            "many. Trains nothing.",
            inputs=[
                PairsSocket.Input("pairs", tooltip="From Load Pairs: the file names its folder."),
                io.String.Input("name", default="my_edit", tooltip="Of the file and of the run: output/editloss/configs/NAME.toml. A name that is taken gets a number."),
                io.String.Input(
                    "model_folder", default="FLUX.1-Kontext-dev",
                    tooltip="Folder of FLUX.1 Kontext dev in diffusers' layout, on the machine that will train. It is not opened here.",
                ),
                io.Combo.Input(
                    "quantization", options=list(QUANTIZATIONS), default="none",
                    tooltip="none: bf16 weights, 24 GB. nf4 (bitsandbytes): 7 GB. int8 (bitsandbytes) and torchao_int8: 12 GB.",
                ),
                *settings_inputs(),
            ],
            is_output_node=True,
            outputs=[
                io.String.Output(display_name="text", tooltip="The file's content, for Preview as Text."),
                io.String.Output(display_name="file", tooltip="Where it is: output/editloss/configs/NAME.toml."),
            ],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(
        cls, pairs, name, model_folder, quantization, steps, learning_rate, batch_size, rank, alpha, layers, seed, hold_out,
        objective=None, options=None, held_out=None,
    ) -> io.NodeOutput:  # fmt: skip
        options, objective = options or TrainingOptions(), objective or WiredObjective()
        widgets = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
        settings, lora = settings_of(widgets, {"rank": rank, "alpha": alpha, "layers": layers}, options)
        check_objective(objective.objective, settings)
        path = folders.new_config_file(name)
        relative = path.relative_to(folders.config_root()).with_suffix("")
        above = "../" * len(relative.parts)
        source, watched = _folder("pairs", pairs), _folder("held_out", held_out) if held_out is not None else {}
        config = TrainingConfig(
            model=ModelSection(
                model_folder.strip(), quantization=quantization, guidance=options.guidance,
                gradient_checkpointing=options.checkpointing,
            ),
            pairs=PairsSection(
                **source, resolution=pairs.resolution, default_caption=pairs.default_caption, upscale=pairs.upscale,
                flawed=pairs.flawed,
            ),
            encoders={n: encoder_section(objective.encoders[n]) for n in objective.objective.encoders},
            objective=objective.objective, training=settings, lora=lora, estimate=EstimateSection(options.crop),
            overlay=options.overlay, variants=pairs.variants or NO_VARIANTS,
            validation=ValidationSection(
                hold_out=0 if watched else hold_out, **watched, preview_guidance=options.preview_guidance,
                preview_cfg=options.preview_cfg,
                **{key: getattr(settings, key) for key in RATHER_IN_VALIDATION},
            ),
            run=RunSection(
                folder=f"{above}runs/{relative.as_posix()}", cache=f"{above}cache",
                **{key: getattr(settings, key) for key in RATHER_IN_RUN},
            ),
        )  # fmt: skip
        text = to_toml(config, CONFIG_HEADING.format(file=path.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        file = f"output/{folders.CONFIG_FOLDER.as_posix()}/{relative.as_posix()}.toml"
        return io.NodeOutput(text, file, ui=say(cls, f"{file}\n\n{text}"))


def _folder(setting: str, pairs: PairSet) -> dict[str, str]:
    """Where pairs are, as a config says it."""
    if pairs.folder is None:
        raise ValueError(
            f"{setting}: expected pairs of a folder (Load Pairs), got pictures of the graph, which no file can name"
        )
    control = pairs.control_folder
    return {"folder": pairs.folder.as_posix(), "control_folder": control.as_posix() if control else ""}


NODES = [Export]
