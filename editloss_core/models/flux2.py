"""FLUX.2 (Black Forest Labs): dev, which has guidance distilled into it, klein base, which wants classifier-free guidance, and
klein, which was distilled to four steps. One network in ComfyUI and in diffusers, told apart by its config.

Latents are what the programs give the network: 2×2 of the autoencoder's in one of 128 channels, 16 pixels along each side, so
that one latent is one token. Facts of diffusers' side are those of ``Flux2Pipeline`` and ``Flux2KleinPipeline``
(https://github.com/huggingface/diffusers); nothing here imports them before they are needed.
"""

from __future__ import annotations

from typing import Any, Optional, Sequence

import torch
from torch import Tensor

from .base import Caption, CaptionsOfTokens, LayerNames, Parts

# -- layers ---------------------------------------------------------------------------------------------------------------
# Patterns over both programs' names. A single block's first layer makes queries, keys, values and the MLP's input, its last
# one takes attention's and the MLP's output together, in both programs: both count as attention, as for FLUX.1.
ATTENTION = ("*blocks.*attn*.*", "*single_blocks.*.linear1", "*single_blocks.*.linear2")
MLP = ("*blocks.*_mlp.*", "*blocks.*.ff.*", "*blocks.*.ff_context.*")

# ComfyUI's layer → diffusers', inside a block. Several are the rows of the one, from above.
DOUBLE_BLOCK = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SINGLE_BLOCK = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),  # shift and scale in the opposite order
}

# Text features of three layers side by side: their width → whose they are.
TEXT_ENCODERS = {15360: "Mistral Small 3.2", 7680: "Qwen3 4B", 12288: "Qwen3 8B"}
DEFAULT_STEPS = 50  # of both pipelines, whose schedule depends on it
REFERENCE = 10  # first coordinate of the first reference's tokens, of the second one 20, and so on; 0 is the picture's


class Flux2(CaptionsOfTokens):
    """What all variants have in common; dev's text encoder and guidance are below."""

    comfyui_model = "Flux2"
    comfyui_network = "Flux"  # of FLUX.1 as well
    comfyui_clip = "flux2"
    text_encoders = TEXT_ENCODERS

    layers = {"attention": ATTENTION, "attention + MLP": (*ATTENTION, *MLP), "all": ("*",)}
    names = LayerNames(
        model="FLUX.2",
        blocks=(
            ("double_blocks", "transformer_blocks", DOUBLE_BLOCK),
            ("single_blocks", "single_transformer_blocks", SINGLE_BLOCK),
        ),
        outside=OUTSIDE,
        swapped=("final_layer.adaLN_modulation.1",),
        # The MLP is gated: twice its width goes in. FLUX.1 has the same names and other shapes.
        shapes={"img_mlp.0": (1, 6), "img_mlp.2": (3, 1), "txt_mlp.0": (1, 6), "txt_mlp.2": (3, 1)}
        | {"linear1": (1, 9), "linear2": (4, 1)},
        alpha=False,
    )

    # Sizes, for tokens and memory. A block of width d keeps about 19·d values per token for its backward pass: qkv 3,
    # normalised input 2, attention 1, MLP 6 + 3 + 1, and 3 in the residual and gates.
    references = 4  # klein's makers say 4, dev takes more
    patch = 1
    downscale = 16
    text_tokens = 512
    width_attribute = "inner_dim"
    block_attributes = ("transformer_blocks", "single_transformer_blocks")
    block_values = 19

    def mu(self, tokens: int, steps: Optional[int] = None) -> float:
        """``compute_empirical_mu`` of both programs: between two straight lines, for 10 and for 200 steps, below 4300 tokens."""
        many = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return many
        few = 8.73809524e-05 * tokens + 1.89833333
        return few + (many - few) * ((steps or DEFAULT_STEPS) - 10) / 190

    # -- captions: text alone, three of its encoder's layers side by side; the picture is seen as a reference ---------

    def encode(self, pipeline: Any, caption: str, before: Optional[Tensor], *further: Tensor) -> dict[str, Tensor]:
        tokens, _ = pipeline.encode_prompt(caption, max_sequence_length=self.text_tokens)
        return {"tokens": tokens[0].cpu()}

    # -- diffusers' network: picture tokens first, the references' after them, told apart by the first coordinate -----

    def velocity(
        self, denoiser: Any, x_t: Tensor, t: Tensor, references: Sequence[Tensor], captions: Sequence[Caption]
    ) -> Tensor:
        (height, width), like = x_t.shape[2:], {"device": denoiser.device, "dtype": denoiser.dtype}
        network = denoiser.module
        text = torch.stack([c.tokens for c in captions]).to(**like)
        made = tokens(x_t.to(**like))
        sizes = [side for reference in references for side in reference.shape[2:]]
        # The pipeline counts time to 1000 in the model's dtype: rounded there, bf16 gives the numbers that it gives.
        time = (1000 * t.to(denoiser.device)).to(denoiser.dtype) / 1000
        told = network.config.guidance_embeds
        velocity = network(
            hidden_states=torch.cat([made, *(tokens(reference.to(**like)) for reference in references)], 1),
            timestep=time,
            guidance=torch.full((len(x_t),), denoiser.guidance, device=denoiser.device) if told else None,
            encoder_hidden_states=text,
            txt_ids=denoiser.kept(text_positions, text.shape[1]),
            img_ids=denoiser.kept(positions, height, width, *sizes),
            return_dict=False,
        )[0]
        return velocity[:, : made.shape[1]].transpose(1, 2).unflatten(2, (height, width))

    def stock_velocity(self, denoiser: Any, x: Tensor, t: Tensor, reference: Tensor, caption: Caption) -> Tensor:
        import diffusers
        from PIL import Image

        like = {"device": denoiser.device, "dtype": denoiser.dtype}

        class WithLatents(getattr(diffusers, self.parts.pipeline)):  # type: ignore[misc]
            """Its reference comes as latents."""

            def _encode_vae_image(self, image: Tensor, generator: Any) -> Tensor:
                return reference[:1].to(**like)

        # The pipeline asks its autoencoder for the size of a latent, and the latents are seen before it has them.
        vae = diffusers.AutoencoderKLFlux2(
            block_out_channels=(4,) * 4, norm_num_groups=4, latent_channels=x.shape[1] // 4
        )
        after: list[Tensor] = []

        def see(pipeline: Any, step: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
            after.append(values["latents"].float())
            return values

        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipeline: Any = WithLatents(scheduler, vae, None, None, denoiser.module)
        pipeline.set_progress_bar_config(disable=True)
        count, side = len(x), self.downscale
        pipeline(
            image=Image.new("RGB", (64, 64)), latents=x.to(**like), height=side * x.shape[2], width=side * x.shape[3],
            sigmas=[t[0].item()], num_inference_steps=1, output_type="latent", return_dict=False,
            guidance_scale=denoiser.guidance if denoiser.module.config.guidance_embeds else 1.0,
            prompt_embeds=caption.tokens[None].expand(count, -1, -1).to(**like), callback_on_step_end=see,
        )  # fmt: skip
        return (x - after[0].transpose(1, 2).unflatten(2, x.shape[2:])) / t.view(-1, 1, 1, 1)


def tokens(latents: Tensor) -> Tensor:
    """``[B, C, h, w]`` → ``[B, h · w, C]``, row by row."""
    return latents.flatten(2).transpose(1, 2)


def patchify(latents: Tensor) -> Tensor:
    """The autoencoder's latents ``[B, C, 2h, 2w]`` → the model's ``[B, 4·C, h, w]``, whose numbers go by channel, row, column.

    >>> patchify(torch.arange(8.0).reshape(1, 2, 2, 2)).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """
    parts = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return parts.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def unpatchify(latents: Tensor) -> Tensor:
    """The inverse of :func:`patchify`."""
    parts = latents.unflatten(1, (-1, 2, 2))
    return parts.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


def text_positions(count: int) -> Tensor:
    """``[count, 4]``: the last coordinate counts the tokens of a text."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(count))


def positions(height: int, width: int, *references: int) -> Tensor:
    """``[N, 4]`` of the picture's tokens, and after them of its references', whose heights and widths are given: which picture
    a token is of, its row and column, 0."""
    sizes = [(height, width), *zip(references[::2], references[1::2])]
    grids = [
        torch.cartesian_prod(torch.tensor([REFERENCE * i]), torch.arange(h), torch.arange(w), torch.arange(1))
        for i, (h, w) in enumerate(sizes)
    ]
    return torch.cat(grids)


def _parts(pipeline: str, text: str, text_width: str, **index: Any) -> Parts:
    return Parts(
        pipeline=pipeline,
        index=index,
        transformer="Flux2Transformer2DModel",
        autoencoder="AutoencoderKLFlux2",
        decoders=("AutoencoderKLFlux2",),
        texts={"text_encoder": text},
        tokenizers=("tokenizer",),
        text_widths=(("text_encoder", text_width, "joint_attention_dim"),),
        text_layers=3,
        original_key="double_stream_modulation_img.lin.weight",
    )


class Flux2Dev(Flux2):
    id = "flux2_dev"
    title = "FLUX.2 dev"
    comfyui_tokenizer = "Flux2Tokenizer"
    comfyui_config = {"guidance_embed": True}
    parts = _parts("Flux2Pipeline", "Mistral3ForConditionalGeneration", "text_config.hidden_size")

    # What it is told: guidance is distilled into it. 1 is usual in training, 4 in both programs' pictures, without CFG.
    guidance = 1.0
    preview_guidance = 4.0


class Flux2KleinBase(Flux2):
    """4B and 9B: the same but for sizes, which the network's config has."""

    id = "flux2_klein_base"
    title = "FLUX.2 klein base"
    comfyui_tokenizer = "KleinTokenizer"
    comfyui_config = {"guidance_embed": False}
    parts = _parts("Flux2KleinPipeline", "Qwen3ForCausalLM", "hidden_size", is_distilled=False)

    preview_cfg = 4.0  # of diffusers' pipeline; ComfyUI's workflow has 5


class Flux2Klein(Flux2KleinBase):
    """Distilled: what is trained on it moves it away from its four steps, which is why base is there."""

    id = "flux2_klein"
    title = "FLUX.2 klein"
    comfyui_file = r"klein(?!.*base)"
    parts = _parts("Flux2KleinPipeline", "Qwen3ForCausalLM", "hidden_size", is_distilled=True)

    preview_cfg = 1.0
    preview_steps = 4


FLUX2_DEV, FLUX2_KLEIN_BASE, FLUX2_KLEIN = Flux2Dev(), Flux2KleinBase(), Flux2Klein()
