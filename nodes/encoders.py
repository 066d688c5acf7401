"""Encoder nodes: one per family, each gives an ENCODER that Encode and the losses take."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io

from ..editloss_core.encoders.base import Encoder
from .checks import checked
from .comfy import encoders
from .comfy.offers import folded
from .folders import ENCODER_FOLDER, NO_WEIGHTS, encoder_weights, encoder_weights_path, state_of
from .notices import say
from .sockets import EncoderSocket

CATEGORY = "EditLoss/encoders"
OUTPUTS = ["grid", "tokens", "global"]


def _output_input(default: str, options: list[str] = OUTPUTS) -> io.Combo.Input:
    return io.Combo.Input(
        "output", options=options, default=default,
        tooltip="grid: features by place, for masks and heat maps. tokens: the same as a list. global: one vector per "
        "picture, blind to shapes and places.",
    )  # fmt: skip


def _weights_input() -> io.Combo.Input:
    return io.Combo.Input(
        "weights", options=encoder_weights() or [NO_WEIGHTS],
        tooltip=f"A .safetensors file in models/{ENCODER_FOLDER}. Nothing is downloaded: put the file there and press R.",
    )  # fmt: skip


def _size_input(what: str) -> io.Int.Input:
    return io.Int.Input("image_size", default=0, min=0, max=4096, step=2, optional=True, tooltip=what)


def _crop_input() -> io.Boolean.Input:
    return folded(io.Boolean.Input(
        "crop", default=False, optional=True,
        tooltip="Off: the whole picture is stretched to the encoder's square, so that edits at the border count. On: centre crop.",
    ))  # fmt: skip


def _name_input() -> io.String.Input:
    return folded(io.String.Input(
        "name", default="", optional=True,
        tooltip="What the encoder is called in reports and embedding files. Empty: made from the network and its output. Name "
        "one of two that differ only in weights or size.",
    ))  # fmt: skip


def _answer(cls, encoder: Encoder, name: str) -> io.NodeOutput:
    """The encoder under its name, and what it does to a picture on the node."""
    if name.strip():
        encoder.info = replace(encoder.info, name=name.strip())
    return io.NodeOutput(encoder, ui=say(cls, f"{encoder.info.name}\n{encoder.info.preprocessing.split(';')[0]}"))


ENCODER_OUTPUT = EncoderSocket.Output(display_name="encoder", tooltip="To Encode and to the losses that shall read it.")


class OpenCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossOpenCLIPEncoder",
            display_name="Encoder: OpenCLIP (CLIP, SigLIP)",
            category=CATEGORY,
            description="Any picture tower of OpenCLIP (CLIP, SigLIP, EVA, ConvNeXt …) with weights from a file.",
            inputs=[
                io.String.Input(
                    "architecture", default="ViT-L-14",
                    tooltip="OpenCLIP's name for the architecture: ViT-B-32, ViT-L-14, ViT-SO400M-14-SigLIP-384 … It must fit "
                    "the weights; OpenAI's need the names that end in -quickgelu.",
                ),
                _weights_input(),
                _output_input("global"),
                _crop_input(),
                _name_input(),
            ],
            outputs=[ENCODER_OUTPUT],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, weights, **_) -> str | float:
        return state_of(encoder_weights_path, weights)

    @classmethod
    @checked("weights")
    def execute(cls, architecture, weights, output, crop=False, name="") -> io.NodeOutput:
        path = encoder_weights_path(weights)
        with torch.inference_mode(False):
            encoder = encoders.ManagedOpenCLIP(architecture.strip(), path, output=output, crop=crop)
        return _answer(cls, encoder, name)


class Timm(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossTimmEncoder",
            display_name="Encoder: timm (DINOv2, DINOv3)",
            category=CATEGORY,
            description="Any network of timm with weights from a file: DINOv2 and DINOv3 patch tokens, maps of convolutional nets.",
            inputs=[
                io.String.Input(
                    "model_name", default="vit_base_patch14_dinov2",
                    tooltip="timm's name: vit_base_patch14_dinov2, vit_base_patch16_dinov3, convnext_base, "
                    "tf_efficientnet_lite0 … It must fit the weights.",
                ),
                _weights_input(),
                _output_input("grid"),
                io.Int.Input(
                    "layer", default=-1, min=-64, max=63,
                    tooltip="Which stage (convolutional nets) or block (transformers). -1 is the last; earlier ones are finer "
                    "and know less about objects. Try -2 for geometry.",
                ),
                _size_input("Side of the square that the network sees, in pixels. 0: the model's own. Larger: finer tokens, slower."),
                _crop_input(),
                _name_input(),
            ],
            outputs=[ENCODER_OUTPUT],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, weights, **_) -> str | float:
        return state_of(encoder_weights_path, weights)

    @classmethod
    @checked("weights")
    def execute(cls, model_name, weights, output, layer, image_size=0, crop=False, name="") -> io.NodeOutput:
        path = encoder_weights_path(weights)
        with torch.inference_mode(False):
            encoder = encoders.ManagedTimm(
                model_name.strip(), path, output=output, layer=layer, image_size=image_size, crop=crop
            )
        return _answer(cls, encoder, name)


class VAELatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossVAEEncoder",
            display_name="Encoder: VAE Latents",
            category=CATEGORY,
            description="The latents of a VAE as a grid of embeddings: cheap, exact in place, knows colour and layout, not objects.",
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the model that you train (for FLUX: ae.safetensors)."),
                _size_input("Side of the square that the VAE sees, in pixels. 0: the picture's own size."),
                _name_input(),
            ],
            outputs=[ENCODER_OUTPUT],
        )

    @classmethod
    @checked()
    def execute(cls, vae, image_size=0, name="") -> io.NodeOutput:
        return _answer(cls, encoders.vae_encoder(vae, image_size), name)


class VAEDecoderFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossVAEDecoderEncoder",
            display_name="Encoder: VAE Decoder Features",
            category=CATEGORY,
            description="What the decoder of a VAE makes of latents on the way to pixels (latent perceptual loss): no pixels are made.",
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of the model that you train (for FLUX: ae.safetensors)."),
                io.String.Input(
                    "depths", default="1",
                    tooltip="Where the decoder is read. 1: after the blocks that work at the resolution of the latents, which is cheap. 2: at "
                    "twice that, and so on; each costs two to four times as much. Several: 1, 2.",
                ),
                _size_input("Side of the square that the VAE sees, in pixels. 0: the picture's own size."),
                _name_input(),
            ],
            outputs=[ENCODER_OUTPUT],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, vae, depths, image_size=0, name="") -> io.NodeOutput:
        return _answer(cls, encoders.ManagedVAEDecoder(vae, _depths(depths), image_size), name)


def _depths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace("+", ",").split(",")]
    except ValueError:
        raise ValueError(f"depths: expected ascending whole numbers from 1, such as 1, 2; got {text!r}") from None


class ClipVision(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossCLIPVisionEncoder",
            display_name="Encoder: CLIP Vision",
            category=CATEGORY,
            description="ComfyUI's own CLIP Vision models (CLIP, SigLIP, DINOv2), without the pixel rounding that kills gradients.",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="From Load CLIP Vision."),
                _output_input("grid"),
                io.Combo.Input(
                    "layer", options=list(encoders.CLIP_VISION_LAYERS), default="last",
                    tooltip="For grid and tokens: the last layer, or the one before, which CLIP trained less for captions.",
                ),
                _crop_input(),
                _name_input(),
            ],
            outputs=[ENCODER_OUTPUT],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, clip_vision, output, layer, crop=False, name="") -> io.NodeOutput:
        return _answer(cls, encoders.ClipVisionEncoder(clip_vision, output, layer, crop), name)


class DiffusionFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossDiffusionEncoder",
            display_name="Encoder: Diffusion Features",
            category=CATEGORY,
            description="What a block of a flow model (FLUX and kin) makes of a picture at a chosen noise level.",
            inputs=[
                io.Model.Input("model", tooltip="A flow-matching model: FLUX.1, Kontext and kin."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Conditioning.Input("conditioning", tooltip="A neutral prompt is enough; the same for all pictures."),
                io.String.Input(
                    "block", default="double_blocks.9",
                    tooltip="Which block's output: double_blocks.0 … 18 or single_blocks.0 … 37 in FLUX.1. Middle blocks know "
                    "most about objects.",
                ),
                io.Float.Input(
                    "noise_level", default=0.3, min=0.01, max=0.99, step=0.01,
                    tooltip="t of x_t = (1 − t) · picture + t · noise. Low sees detail, high sees layout. Try 0.2 to 0.5.",
                ),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=False, tooltip="Of the noise, the same for every picture."),
                _output_input("grid", ["grid", "tokens"]),
                _size_input("Side of the square that the model sees, in pixels. 0: the picture's own size."),
                _name_input(),
            ],
            outputs=[ENCODER_OUTPUT],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(
        cls, model, vae, conditioning, block, noise_level, seed, output, image_size=0, name=""
    ) -> io.NodeOutput:
        encoder = encoders.diffusion_encoder(
            model, vae, conditioning, block.strip(), noise_level, seed, output, image_size
        )
        return _answer(cls, encoder, name)


NODES = [OpenCLIP, Timm, VAELatents, VAEDecoderFeatures, ClipVision, DiffusionFeatures]
