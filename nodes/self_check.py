"""Whether gradients are right in this ComfyUI, without training anything."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..editloss_core.models.base import PRESETS
from ..editloss_core.training.settings import check_objective
from .checks import checked
from .notices import say
from .sockets import ObjectiveSocket, OptionsSocket, PairsSocket, TrainingOptions, WiredObjective
from .training import CATEGORY, make_trainer, settings_of


class SelfCheckNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossSelfCheck",
            display_name="Self-Check",
            category=CATEGORY,
            description="What Train Edit LoRA does before its first step: compares gradients with finite differences, the model's "
            "velocity with that of ComfyUI's sampler, and whether the before picture has an effect. It trains nothing.",
            inputs=[
                io.Model.Input("model", tooltip="The model that you are going to train."),
                io.Clip.Input("clip", tooltip="The model's own text encoders."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                PairsSocket.Input("pairs", tooltip="From Load Pairs, Make Pairs or Demo Pairs; one pair is looked at."),
                io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="As in Train Edit LoRA: the check takes what a step takes."),
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip="As in Train Edit LoRA."),
                io.Float.Input("alpha", default=16.0, min=0.01, max=4096.0, step=0.5, tooltip="As in Train Edit LoRA."),
                io.Combo.Input(
                    "layers", options=list(PRESETS), default="attention + MLP",
                    tooltip="As in Train Edit LoRA. If all fails, try attention: the fault may be in the layers that it leaves out.",
                ),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=False, tooltip="Of the directions that are tried."),
                ObjectiveSocket.Input("objective", optional=True, tooltip="With losses, their encoders and the decoder are checked too."),
                OptionsSocket.Input("options", optional=True, tooltip="From the Options nodes, as for Train Edit LoRA."),
                io.Vae.Input("decoder", optional=True, tooltip="A small VAE (TAEF1), if Train Edit LoRA has one."),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="What agreed and what did not, for Preview as Text or a report of a fault."),
                io.Boolean.Output(display_name="ok", tooltip="True if nothing is wrong."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(
        cls, model, clip, vae, pairs, batch_size, rank, alpha, layers, seed, objective=None, options=None, decoder=None
    ) -> io.NodeOutput:
        options, objective = options or TrainingOptions(), objective or WiredObjective()
        settings, lora_settings = settings_of(
            {"batch_size": batch_size, "seed": seed}, {"rank": rank, "alpha": alpha, "layers": layers}, options
        )
        check_objective(objective.objective, settings)
        with torch.inference_mode(False), torch.enable_grad():
            trainer, _ = make_trainer(
                model, clip, vae, pairs, settings, lora_settings, objective, options, decoder=decoder
            )
            found = trainer.self_check(anew=True)
        text = "\n".join([found.line(), *found.faults()])
        return io.NodeOutput(text, not found.wrong, ui=say(cls, text, found.faults()))


NODES = [SelfCheckNode]
