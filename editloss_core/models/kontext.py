"""FLUX.1 Kontext (Black Forest Labs), the first model here and the example for the next: a file like this one is all that a
model costs.

Facts of ComfyUI's side are names of its classes and of its network's layers; those of diffusers' side are the classes of
``FluxKontextPipeline`` (https://github.com/huggingface/diffusers), whose latents, tokens and positions :meth:`Kontext.velocity`
repeats. Nothing here imports either: objects that they have loaded come in.
"""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from .base import EditModel, LayerNames, Parts

PATCH = 2  # latents per token along each side

# -- layers ---------------------------------------------------------------------------------------------------------------
# Patterns over both programs' names. A single block's first layer makes queries, keys, values and the MLP's input, its last
# one takes attention's and the MLP's output together: both count as attention, or two thirds of a Flux would have none.
ATTENTION = (
    "*blocks.*attn*.*",
    "*single_blocks.*.linear1",
    "*single_blocks.*.linear2",
    "*single_transformer_blocks.*.proj_out",
)
MLP = ("*blocks.*mlp*.*", "*blocks.*.ff.*", "*blocks.*.ff_context.*", "*single_transformer_blocks.*.proj_mlp")

# ComfyUI's layer → diffusers', inside a block. Several are the rows of the one, from above.
DOUBLE_BLOCK = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE_BLOCK = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),  # shift and scale in the opposite order
}


class Caption(NamedTuple):
    """A caption as the model takes it: T5's tokens ``[T, D]`` and CLIP's pooled vector ``[P]``."""

    tokens: Tensor
    pooled: Tensor


class Kontext(EditModel):
    id = "flux_kontext"
    title = "FLUX.1 Kontext"

    # What its classes are called. ComfyUI's FLUX.1 dev has the same one: without its reference it is no edit model, and the
    # self-check sees that.
    comfyui_model = "Flux"
    comfyui_network = "Flux"
    parts = Parts(
        pipeline="FluxKontextPipeline",
        transformer="FluxTransformer2DModel",
        autoencoder="AutoencoderKL",
        decoders=("AutoencoderKL", "AutoencoderTiny"),
        texts={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
        tokenizers=("tokenizer", "tokenizer_2"),
        text_widths=(
            ("text_encoder", "hidden_size", "pooled_projection_dim"),
            ("text_encoder_2", "d_model", "joint_attention_dim"),
        ),
        original_key="double_blocks.0.img_attn.qkv.weight",
        others="Kontext, which sees its picture as tokens (FLUX.1 Fill has 384, Canny and Depth 128)",
    )

    # Which layers a preset of a LoRA takes, and what files call them.
    layers = {"attention": ATTENTION, "attention + MLP": (*ATTENTION, *MLP), "all": ("*",)}
    names = LayerNames(
        model="FLUX",
        blocks=(
            ("double_blocks", "transformer_blocks", DOUBLE_BLOCK),
            ("single_blocks", "single_transformer_blocks", SINGLE_BLOCK),
        ),
        outside=OUTSIDE,
        swapped=("final_layer.adaLN_modulation.1",),
        mlp_ratio=4,
        shapes={"img_mlp.0": (1, 4), "img_mlp.2": (4, 1), "txt_mlp.0": (1, 4), "txt_mlp.2": (4, 1)}
        | {"linear1": (1, 7), "linear2": (5, 1)},
    )

    # What it is told: guidance is distilled into it. 1 is usual in training, 2.5 in the stock workflow, which has no CFG.
    guidance = 1.0
    preview_guidance = 2.5

    # Sizes, for tokens and memory. A block of width d keeps about 17·d values per token for its backward pass: qkv 3,
    # normalised input 2, attention 1, MLP 4 + 4, and 3 in the residual and gates.
    patch = PATCH
    downscale = 8
    text_tokens = 512  # of T5; the pipeline's own default
    # In the vocabulary of T5 v1.1 (English, German, French, Romanian; a few Cyrillic letters without words left out). Any
    # other makes one unknown token of all of its like in a row.
    letters = "ßàáâäçèéêîóôöùûüăşţșț"
    width_attribute = "inner_dim"
    block_attributes = ("transformer_blocks", "single_transformer_blocks")
    block_values = 17

    def mu(self, tokens: int, steps: Optional[int] = None) -> float:
        """A straight line through 0.5 at 256 and 1.15 at 4096 tokens (https://github.com/black-forest-labs/flux)."""
        return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)

    # -- captions: text alone; the picture is seen as a reference ----------------------------------------------------

    def encode(self, pipeline: Any, caption: str, before: Optional[Tensor], *further: Tensor) -> dict[str, Tensor]:
        tokens, pooled, _ = pipeline.encode_prompt(caption, max_sequence_length=self.text_tokens)
        return {"tokens": tokens[0].cpu(), "pooled": pooled[0].cpu()}

    def caption(self, tensors: Mapping[str, Tensor]) -> Caption:
        return Caption(tensors["tokens"], tensors["pooled"])

    def words(self, caption: Caption) -> Tensor:
        return caption.tokens

    # -- diffusers' network: picture tokens first, the reference's after them, told apart by the first coordinate -----

    def velocity(
        self, denoiser: Any, x_t: Tensor, t: Tensor, references: Sequence[Tensor], captions: Sequence[Caption]
    ) -> Tensor:
        (height, width), like = x_t.shape[2:], {"device": denoiser.device, "dtype": denoiser.dtype}
        (reference,), network = references, denoiser.module
        tokens = torch.stack([c.tokens for c in captions]).to(**like)
        told = network.config.guidance_embeds
        made = pack(x_t.to(**like))
        # The pipeline counts time to 1000 in the model's dtype: rounded there, bf16 gives the numbers that it gives.
        time = (1000 * t.to(denoiser.device)).to(denoiser.dtype) / 1000
        velocity = network(
            hidden_states=torch.cat([made, pack(reference.to(**like))], 1),
            timestep=time,
            guidance=torch.full((len(x_t),), denoiser.guidance, device=denoiser.device) if told else None,
            pooled_projections=torch.stack([c.pooled for c in captions]).to(**like),
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, **like),
            # In the model's dtype, as the pipeline has them: in bf16 they are whole up to 256.
            img_ids=denoiser.kept(positions, height, width, *reference.shape[2:]),
            return_dict=False,
        )[0]
        return unpack(velocity[:, : made.shape[1]], height, width)

    def stock_velocity(self, denoiser: Any, x: Tensor, t: Tensor, reference: Tensor, caption: Caption) -> Tensor:
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

        (count, channels, height, width), like = x.shape, {"device": denoiser.device, "dtype": denoiser.dtype}
        # The pipeline asks its autoencoder for the size of a latent alone: pictures come and go as latents.
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            latent_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        pipeline: Any = FluxKontextPipeline(
            FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, denoiser.module
        )
        pipeline.set_progress_bar_config(disable=True)
        side = self.downscale
        after = pipeline(
            image=reference.to(**like), latents=pack(x.to(**like)), height=side * height, width=side * width,
            max_area=side * side * height * width, _auto_resize=False, num_images_per_prompt=1, sigmas=[t[0].item()],
            num_inference_steps=1, guidance_scale=denoiser.guidance, output_type="latent", return_dict=False,
            prompt_embeds=caption.tokens[None].expand(count, -1, -1).to(**like),
            pooled_prompt_embeds=caption.pooled[None].expand(count, -1).to(**like),
        )[0]  # fmt: skip
        return (x - unpack(after.float(), height, width)) / t.view(-1, 1, 1, 1)


def pack(latents: Tensor) -> Tensor:
    """``[B, C, h, w]`` → tokens ``[B, h/2 · w/2, 4·C]``, row by row; a token's numbers go by channel, row, column.

    >>> pack(torch.arange(8.0).reshape(1, 2, 2, 2))
    tensor([[[0., 1., 2., 3., 4., 5., 6., 7.]]])
    """
    count, channels, height, width = latents.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"latents: expected even sides, got {height}×{width}")
    parts = latents.reshape(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`, for latents of this height and width."""
    rows, columns = height // PATCH, width // PATCH
    parts = tokens.reshape(len(tokens), rows, columns, -1, PATCH, PATCH)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def position_ids(height: int, width: int, image: int = 0) -> Tensor:
    """``[h/2 · w/2, 3]``: which picture a token is of (0 = the one that is made, 1 = the reference), its row and column."""
    rows, columns = torch.arange(height // PATCH), torch.arange(width // PATCH)
    which = torch.full((1, 1), image)
    grid = torch.stack(torch.broadcast_tensors(which, rows[:, None], columns[None, :]), -1)
    return grid.flatten(0, 1).float()


def positions(height: int, width: int, reference_height: int, reference_width: int) -> Tensor:
    """Of the picture's tokens and of its reference's."""
    return torch.cat([position_ids(height, width), position_ids(reference_height, reference_width, image=1)])


KONTEXT = Kontext()
