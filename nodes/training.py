"""Train an edit LoRA, go on with one, keep it, and look at how it went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import comfy.model_management
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..editloss_core.drawing import grid, sheet
from ..editloss_core.encoders.vae import VAEEncoder
from ..editloss_core.lora.lora import LoRA, LoRASettings
from ..editloss_core.models.base import PRESETS, Preview
from ..editloss_core.models.captions import Captions, caption_sets, check_references, same_words
from ..editloss_core.pairs import PairSet, with_variants
from ..editloss_core.run_report import curves
from ..editloss_core.runs.checkpoint import CHECKPOINT_FOLDER, checkpoints
from ..editloss_core.runs.log import RunLog
from ..editloss_core.training.flow import Timesteps
from ..editloss_core.training.prepare import Prepared, prepare
from ..editloss_core.training.resume import resumable
from ..editloss_core.training.settings import TrainingSettings, check_objective
from ..editloss_core.training.trainer import Trainer, metadata
from . import ended_runs, folders
from .checks import checked
from .comfy.captions import conditioning
from .comfy.decoder import VAEDecoder, check_decoder
from .comfy.denoiser import ComfyDenoiser
from .comfy.encoders import vae_encoder
from .comfy.flow_model import check_text_encoder
from .comfy.host import ComfyHost, step_memory
from .comfy.loading import check_shared, fingerprint, patchers_of, with_lora
from .comfy.offers import folded, has_comparison
from .notices import say
from .sockets import (
    LoRAModelSocket,
    LossMapSocket,
    ObjectiveSocket,
    OptionsSocket,
    PairsSocket,
    ResumePoint,
    ResumeSocket,
    RunSocket,
    TrainingOptions,
    TrainingRun,
    WiredObjective,
)

CATEGORY = "EditLoss/training"
NO_PICTURES = (
    "This run has no pictures of held-out pairs. For pictures, set hold_out in Train Edit LoRA to 1 or more, and "
    "validate_every, previews and preview_steps in Run Options above 0."
)
AS_IT_WAS = (
    "not trained again: nothing has changed since the run {}, whose outputs ComfyUI had let go of. To train once more, change "
    "the seed or the name"
)
SIDES = ("before", "base", "lora", "after")  # of a preview
LORA_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def settings_inputs() -> list[io.Input]:
    """What Train Edit LoRA and Export Training Config have in common, widgets first."""
    return [
        io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip="Optimiser steps. 500 to 2000 for a dozen pairs."),
        io.Float.Input(
            "learning_rate", default=1e-4, min=1e-6, max=10.0, step=1e-6,
            tooltip="1e-4 is a good start. Prodigy (Optimizer Options) finds its own and wants 1.",
        ),
        io.Int.Input(
            "batch_size", default=1, min=1, max=256,
            tooltip="Pairs per pass. In-batch InfoNCE needs at least 2. Accumulation is in Optimizer Options.",
        ),
        io.Int.Input("rank", default=16, min=1, max=1024, tooltip="Size of the LoRA: 8 to 32 for one object."),
        folded(io.Float.Input("alpha", default=16.0, min=0.01, max=4096.0, step=0.5, tooltip="The update is scaled by alpha / rank. Equal to rank is a good start.")),
        io.Combo.Input(
            "layers", options=list(PRESETS), default="attention + MLP",
            tooltip="Which layers learn. attention is smallest; all adds modulation and embedders. LoRA Options takes patterns.",
        ),
        io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=False, tooltip="Of everything random, and of which pairs are held out. The same seed gives the same LoRA on a CPU."),
        io.Int.Input(
            "hold_out", default=1, min=0, max=1000,
            tooltip="Pairs that are not trained on but watched: their losses and pictures tell learning from memorising.",
        ),
        ObjectiveSocket.Input("objective", optional=True, tooltip="A chain of loss nodes or Recommended Mix. Open: flow matching alone."),
        OptionsSocket.Input("options", optional=True, tooltip="From the Options nodes, chained in any order."),
        PairsSocket.Input("held_out", optional=True, tooltip="Pairs to watch, in place of hold_out."),
    ]  # fmt: skip


class Train(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossTrainKontextLoRA",
            display_name="Train Edit LoRA",
            category=CATEGORY,
            description="Trains a LoRA on before/after pairs: flow matching, plus the losses of an objective on the model's one-step "
            "estimate of the after picture.",
            inputs=[
                io.Model.Input("model", tooltip="FLUX.1 Kontext dev, FLUX.2, Qwen-Image-Edit, LongCat-Image-Edit or OmniGen2. Others are refused by name."),
                io.Clip.Input("clip", tooltip="The model's own text encoders; they read the captions of the pairs."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                PairsSocket.Input("pairs", tooltip="From Load Pairs or Make Pairs."),
                io.String.Input("name", default="my_edit", tooltip="Of the run: output/editloss/runs/NAME. A name that is taken gets a number."),
                *settings_inputs(),
                io.Vae.Input(
                    "decoder", optional=True,
                    tooltip="A small VAE (TAEF1) that decodes estimates for losses on pictures, and previews: a fraction of the memory.",
                ),
                ResumeSocket.Input("resume", optional=True, tooltip="From Resume Training: go on with an earlier run."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.prompt],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA at strength 1."),
                LoRAModelSocket.Output(display_name="lora", tooltip="For the stock Load LoRA Model and Save LoRA Weights."),
                LossMapSocket.Output(display_name="loss_map", tooltip="For the stock Plot Loss Graph."),
                io.Int.Output(display_name="steps", tooltip="Steps done."),
                RunSocket.Output(display_name="run", tooltip="For Save LoRA, Plot Losses and Compare."),
            ],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(
        cls, model, clip, vae, pairs, name, steps, learning_rate, batch_size, rank, alpha, layers, seed, hold_out,
        objective=None, options=None, held_out=None, decoder=None, resume=None,
    ) -> io.NodeOutput:  # fmt: skip
        options, objective = options or TrainingOptions(), objective or WiredObjective()
        widgets = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
        settings, lora_settings = settings_of(widgets, {"rank": rank, "alpha": alpha, "layers": layers}, options)
        check_objective(objective.objective, settings)
        folder = folders.run_folder(resume.run) if resume else folders.new_run_folder(name)
        if held_out is None and hold_out:
            pairs, held_out = pairs.split(hold_out, seed)
        pairs = with_variants(pairs, pairs.variants)  # after the split: those that are watched have none
        with torch.inference_mode(False), torch.enable_grad():
            trainer, host = make_trainer(
                model, clip, vae, pairs, settings, lora_settings, objective, options, held_out, decoder, folder, resume
            )
            if resume:
                trainer.resume(resume.checkpoint)
                host.log = RunLog(steps=[*trainer.log.steps], validations=[*trainer.log.validations])
            asked = ended_runs.request(cls.hidden and cls.hidden.prompt, name, trainer.info)
            ended = None if resume else ended_runs.find(asked, trainer.lora)
            if ended:
                run, notes = ended
                notes = (*notes, AS_IT_WAS.format(run.name))
            else:
                result = trainer.run()
                run = TrainingRun(folder.name, result, metadata(trainer), folder)
                notes = (*trainer.warnings, *trainer.prepared.notes, *trainer.notes)
                ended_runs.keep(asked, run, notes)

            result = run.result
            tensors = result.lora.tensors()
            trained = with_lora(model, tensors)
            comfy.model_management.soft_empty_cache()
        lines = [f"{result.steps} steps, kept in output/editloss/runs/{run.name}"]
        lines += [result.self_check] if result.self_check else []
        text = "\n".join([*lines, *(f"- {n}" for n in notes)])
        shown = say(cls, text, notes, curves.text(result.log))
        return io.NodeOutput(trained, tensors, result.log.loss_map(), result.steps, run, ui=shown)


def make_trainer(
    model, clip, vae, pairs: PairSet, settings: TrainingSettings, lora_settings: LoRASettings, objective: WiredObjective,
    options: TrainingOptions, held_out: Optional[PairSet] = None, decoder=None, folder: Optional[Path] = None,
    resume: Optional[ResumePoint] = None,
) -> tuple[Trainer, ComfyHost]:  # fmt: skip
    """The core's trainer with everything that it needs, made and encoded; outside of inference mode.

    Raises:
        ValueError: what does not fit together, before captions and pictures are encoded.
    """
    denoiser = ComfyDenoiser(model, options.guidance, options.checkpointing, options.edit_model)
    check_text_encoder(clip, denoiser.edit_model)
    check_references(denoiser.edit_model, [some for some in (pairs, held_out) if some is not None])
    for encoder_name in objective.objective.encoders:
        check_shared(objective.encoders[encoder_name], denoiser.model)
    lora = LoRA(denoiser.module, lora_settings, settings.seed, denoiser.edit_model)
    encoder = vae_encoder(vae, 0, model.model.latent_format)
    if decoder is not None:
        check_decoder(decoder, vae)
    decode = VAEDecoder(vae if decoder is None else decoder, denoiser.from_model)
    if resume:
        resumable(resume.checkpoint, lora, settings)

    cfg = options.preview_cfg or denoiser.edit_model.preview_cfg
    sampled = settings.previews if settings.preview_steps else 0
    sets = caption_sets(pairs, held_out, settings.caption_dropout, sampled, cfg)
    captions = Captions(*conditioning(clip, sets, denoiser, folders.cache_folder()))
    train, watched = (_prepared(some, encoder, objective, options, settings) for some in (pairs, held_out))
    host = _host(denoiser, decode, train, objective, settings, options)
    trainer = Trainer(
        denoiser, lora, train, captions.own, settings,
        objective=objective.objective, encoders=objective.encoders, decode=decode, dropped=captions.dropped,
        validation=watched, validation_conditioning=captions.watched,
        folder=folder,
        info=_info(denoiser, decode, train, options),
        resolution=pairs.resolution, checkpointing=options.checkpointing, cache=folders.cache_folder(), host=host,
        preview=Preview(options.preview_guidance or denoiser.edit_model.preview_guidance, cfg, captions.away),
    )  # fmt: skip
    trainer.notes += same_words({pair.caption: made[0][0] for pair, made in zip(train.pairs, captions.own)})
    return trainer, host


def settings_of(
    training: dict[str, Any], lora: dict[str, Any], options: TrainingOptions
) -> tuple[TrainingSettings, LoRASettings]:
    """What the widgets say, and over it what the options nodes say."""
    timesteps = Timesteps(**options.timesteps)
    return TrainingSettings(**{**training, "timesteps": timesteps, **options.training}), LoRASettings(
        **{**lora, **options.lora}
    )


def _prepared(
    pairs: Optional[PairSet],
    vae: VAEEncoder,
    objective: WiredObjective,
    options: TrainingOptions,
    settings: TrainingSettings,
) -> Optional[Prepared]:
    """Latents, crops and constant embeddings, with overlays if a term reads them."""
    if pairs is None:
        return None
    encoders = {name: objective.encoders[name] for name in objective.objective.encoders}
    bar = ProgressBar(1)

    def step(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return prepare(
        pairs, vae, encoders, folders.cache_folder(), crop=options.crop,
        overlay=options.overlay if objective.objective.reads("overlay") else None,
        estimate_missing_masks=bool(encoders) or settings.edit_weight != 1.0, progress=step,
    )  # fmt: skip


def _info(denoiser: ComfyDenoiser, decode: VAEDecoder, train: Prepared, options: TrainingOptions) -> dict[str, Any]:
    """What a run depends on beside its settings and pairs, for resume to tell what changed; it goes into the LoRA's header."""
    decoder = fingerprint(decode.vae.first_stage_model) if train.reads_pictures else ""
    model = denoiser.model
    return {
        "model": f"{type(model.model).__name__} in {str(model.model_dtype()).removeprefix('torch.')}",
        "edit_model": denoiser.edit_model.title,
        "guidance": options.guidance,
        "decoder": decoder,
    }


def _host(
    denoiser: ComfyDenoiser, decode: VAEDecoder, train: Prepared, objective: WiredObjective, settings: TrainingSettings,
    options: TrainingOptions,
) -> ComfyHost:  # fmt: skip
    encoders = {name: patchers_of(objective.encoders[name], train.reads_latents(name)) for name in train.encoders}
    patchers = [patcher for some in encoders.values() for patcher in some]
    reserve = int(options.reserve * (1 << 30))
    if not reserve:
        reserve = step_memory(
            denoiser.model, train, settings.batch_size, options.checkpointing,
            decode.vae if train.reads_pictures else None, patchers,
        )  # fmt: skip
    if train.reads_pictures:
        patchers.append(decode.patcher)
    return ComfyHost(denoiser, patchers, reserve, settings.steps)


class Resume(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossResumeTraining",
            display_name="Resume Training",
            category=CATEGORY,
            description="The last checkpoint of a run, to go on where it was stopped. The result is that of a run that was never stopped.",
            inputs=[
                io.Combo.Input(
                    "run", options=folders.runs() or [folders.NO_RUNS],
                    tooltip="A run in output/editloss/runs, the latest first. Press R to see new ones. Keep the LoRA's settings, the "
                    "optimizer and whether ema is on as they were; steps may grow.",
                ),
                io.Int.Input("step", default=0, min=0, max=1_000_000, optional=True, tooltip="Which checkpoint; 0 = the last one."),
            ],
            outputs=[ResumeSocket.Output(display_name="resume", tooltip="To Train Edit LoRA.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, run, step=0) -> str | float:
        try:
            return str([(p.name, p.stat().st_mtime_ns) for p in _checkpoints(run)])
        except (TypeError, ValueError, OSError):  # linked, so not known yet, or no such run: execute says why
            return float("nan")

    @classmethod
    @checked("run")
    def execute(cls, run, step=0) -> io.NodeOutput:
        found = _checkpoints(run)
        named = [path for path in found if path.stem == f"step_{step:06d}"]
        if step and not named:
            there = ", ".join(map(_step, found))
            raise ValueError(f"step: {run} has no checkpoint of step {step}; it has {there}")
        chosen = named[0] if step else found[-1]
        return io.NodeOutput(ResumePoint(run, chosen), ui=say(cls, f"{run}, step {_step(chosen)}"))


def _step(checkpoint: Path) -> str:
    return checkpoint.stem.removeprefix("step_").lstrip("0") or "0"


def _checkpoints(run: str) -> list[Path]:
    return checkpoints(folders.run_folder(run) / CHECKPOINT_FOLDER)


class SaveLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossSaveLoRA",
            display_name="Save Edit LoRA",
            category=CATEGORY,
            description="Writes the LoRA into models/loras, where the stock loaders find it, with settings and objective in its header.",
            inputs=[
                RunSocket.Input("run", tooltip="From Train Edit LoRA."),
                io.String.Input(
                    "file_name", default="editloss/my_edit",
                    tooltip="Below models/loras, without ending; '/' makes subfolders. A name that is taken gets a number.",
                ),
                io.Combo.Input("dtype", options=list(LORA_DTYPES), default="bf16", tooltip="fp32 keeps every bit and takes twice the space."),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="As the stock LoRA loaders list it.")],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, run, file_name, dtype) -> io.NodeOutput:
        path, listed = folders.new_lora_file(file_name)
        run.result.lora.save(path, run.metadata, LORA_DTYPES[dtype])
        text = f"models/loras/{listed} ({path.stat().st_size / 1e6:.1f} MB). Press R, then choose it in Load LoRA."
        return io.NodeOutput(listed, ui=say(cls, text))


class PlotLosses(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossPlotLosses",
            display_name="Plot Losses (Curves)",
            category=CATEGORY,
            description="Every term over the steps and by noise level, its share of the gradient, and the held-out pairs.",
            inputs=[
                RunSocket.Input("run", tooltip="From Train Edit LoRA."),
                io.Int.Input("width", default=1600, min=640, max=4096, step=32, optional=True, tooltip="Of the picture, in pixels."),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The curves."),
                io.String.Output(display_name="text", tooltip="First and last values of each term as a Markdown table."),
                io.String.Output(display_name="values", tooltip="Means by noise level as JSON."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, run, width=1600) -> io.NodeOutput:
        log = run.result.log
        picture, text = curves.picture(log, width), curves.text(log)
        values = json.dumps(log.by_noise_level())
        return io.NodeOutput(picture, text, values, ui=ui.PreviewImage(picture, cls=cls))


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossCompare",
            display_name="Compare Base and LoRA",
            category=CATEGORY,
            description="Held-out pairs in rows: before, output of the base, output with the LoRA, after. Same noise for both outputs.",
            inputs=[
                RunSocket.Input("run", tooltip="From Train Edit LoRA, with held-out pairs."),
                io.Int.Input("width", default=1280, min=320, max=4096, step=32, optional=True, tooltip="Of the picture, in pixels."),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The rows as one picture."),
                io.Image.Output(display_name="before", is_output_list=True, tooltip="The before pictures, one by one."),
                io.Image.Output(display_name="base", is_output_list=True, tooltip="What the base made of them: for Image Compare or Preview Image."),
                io.Image.Output(display_name="lora", is_output_list=True, tooltip="What the LoRA made of them, from the same noise."),
                io.Image.Output(display_name="after", is_output_list=True, tooltip="The after pictures, one by one."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, run, width=1280) -> io.NodeOutput:
        rows = run.result.pictures
        if rows:
            picture = grid.grid(rows, width=width)
            sides = [[getattr(row, name)[None] for row in rows] for name in SIDES]
            shown = ui.PreviewImage(picture, cls=cls).as_dict()
            if has_comparison():
                _, base, lora, _ = sides
                shown |= {"a_images": _previews(cls, base), "b_images": _previews(cls, lora)}
            return io.NodeOutput(picture, *sides, ui=shown)
        # A run that took hours is not to end in red because nobody looked on.
        picture = _written(NO_PICTURES, width)
        return io.NodeOutput(
            picture,
            *([picture] for _ in SIDES),
            ui={**ui.PreviewImage(picture, cls=cls).as_dict(), **say(cls, NO_PICTURES, [NO_PICTURES])},
        )


def _previews(cls, pictures: list[torch.Tensor]) -> list[Any]:
    """Temporary files of pictures of any sizes, as the page is told of them."""
    return [shown for picture in pictures for shown in ui.PreviewImage(picture, cls=cls).as_dict()["images"]]


def _written(text: str, width: int) -> torch.Tensor:
    """A few words as a picture ``[1, H, W, 3]``."""
    figure = sheet.new_figure(width, 6.4, 0.9)
    sheet.Sheet(figure).write(0.3, 0.45, sheet.wrapped(text, 80), color=sheet.MUTED)
    return sheet.pixels(figure)[None]


NODES = [Train, Resume, SaveLoRA, PlotLosses, Compare]
