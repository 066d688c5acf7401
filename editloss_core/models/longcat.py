"""LongCat-Image-Edit (Meituan): a network like FLUX.1's, whose captions are encoded with the before picture.

In ComfyUI it is FLUX.1's class with other inputs, in diffusers a class of its own (``LongCatImageEditPipeline``). No guidance
is embedded in it, and a picture's rows and columns are counted from the caption's length.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Optional, Sequence

import torch
from torch import Tensor

from .base import Caption, CaptionsOfTokens, LayerNames, Parts
from .kontext import ATTENTION, DOUBLE_BLOCK, KONTEXT, MLP, PATCH, SINGLE_BLOCK, pack, position_ids, unpack
from .qwen import TEXT_WIDTHS, module_of, resized, seen, sized

OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_embed.timestep_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),  # shift and scale in the opposite order
}


class LongCat(CaptionsOfTokens):
    id = "longcat_image_edit"
    title = "LongCat-Image-Edit"
    comfyui_model = "LongCatImage"
    comfyui_network = "Flux"
    comfyui_tokenizer = "LongCatImageTokenizer"
    comfyui_clip = "longcat_image"
    reference_method = "index"
    parts = Parts(
        pipeline="LongCatImageEditPipeline",
        transformer="LongCatImageTransformer2DModel",
        autoencoder="AutoencoderKL",
        decoders=("AutoencoderKL", "AutoencoderTiny"),
        texts={"text_encoder": "Qwen2_5_VLForConditionalGeneration"},
        tokenizers=("tokenizer", "text_processor"),
        processors=("text_processor",),
        text_widths=TEXT_WIDTHS,
        original_key="double_blocks.0.img_attn.qkv.weight",
    )
    layers = {"attention": ATTENTION, "attention + MLP": (*ATTENTION, *MLP), "all": ("*",)}
    names = LayerNames(
        model="LongCat-Image-Edit",
        blocks=(
            ("double_blocks", "transformer_blocks", DOUBLE_BLOCK),
            ("single_blocks", "single_transformer_blocks", SINGLE_BLOCK),
        ),
        outside=OUTSIDE,
        swapped=("final_layer.adaLN_modulation.1",),
        shapes=KONTEXT.names.shapes,
    )
    diffusers_loads_lora = False
    reads_picture = True
    preview_cfg = 4.5  # the pipeline's own
    patch = PATCH
    downscale = 8
    text_tokens = 838  # 512 of the caption, filled up, and 512² pixels at 28² a token
    block_attributes = ("transformer_blocks", "single_transformer_blocks")

    def mu(self, tokens: int, steps: Optional[int] = None) -> float:
        """That of FLUX.1."""
        return KONTEXT.mu(tokens, steps)

    # -- captions: with the before picture ---------------------------------------------------------------------------

    def tokenize(self, clip: Any, caption: str, before: Optional[Tensor], *further: Tensor) -> Any:
        """As ComfyUI's Text Encode Qwen Image Edit, which its workflow uses: four times the area that the pipeline takes."""
        return clip.tokenize(caption, images=[seen(before, 1024 * 1024)])

    def encode(self, pipeline: Any, caption: str, before: Optional[Tensor], *further: Tensor) -> dict[str, Tensor]:
        module, tokenizer, most = module_of(type(pipeline)), pipeline.tokenizer, pipeline.tokenizer_max_length
        # Letters in quotation marks are tokens of their own. The pipeline's own message for what is too long fails.
        pieces = [list(part) if quoted else [part] for part, quoted in module.split_quotation(caption)]
        words = sum(len(tokenizer(piece, add_special_tokens=False)["input_ids"]) for part in pieces for piece in part)
        if words > most:
            raise ValueError(f"caption: expected at most {most} tokens, got {words} in {caption!r}")
        tokens, _ = pipeline.encode_prompt(caption, image=resized(pipeline, before, 1024 * 1024, parts=2))
        return {"tokens": tokens[0].cpu()}

    # -- diffusers' network: picture tokens first, the reference's after them, told apart by the first coordinate -----

    def velocity(
        self, denoiser: Any, x_t: Tensor, t: Tensor, references: Sequence[Tensor], captions: Sequence[Caption]
    ) -> Tensor:
        (height, width), device, dtype = x_t.shape[2:], denoiser.device, denoiser.dtype
        (reference,) = references
        made = pack(x_t.to(device, dtype))
        tokens = torch.cat([made, pack(reference.to(device, dtype))], 1)
        # The pipeline counts time to 1000 in the model's dtype: rounded there, bf16 gives the numbers that it gives.
        time = (1000 * t.to(device)).to(dtype) / 1000
        # A picture's rows begin where the caption ends, in all samples of a call at the same: one call for each length.
        groups: dict[int, list[int]] = {}
        for sample, caption in enumerate(captions):
            groups.setdefault(len(caption.tokens), []).append(sample)
        velocity = torch.zeros_like(made)
        for length, group in groups.items():
            ids = positions(length, (height, width), (reference.shape[2], reference.shape[3])).to(device)
            answer = denoiser.module(
                hidden_states=tokens[group],
                timestep=time[group],
                encoder_hidden_states=torch.stack([captions[sample].tokens for sample in group]).to(device, dtype),
                txt_ids=ids[:length],
                img_ids=ids[length:],
                return_dict=False,
            )[0]
            velocity = velocity.index_copy(0, torch.tensor(group, device=device), answer[:, : made.shape[1]])
        return unpack(velocity, height, width)

    def stock_velocity(self, denoiser: Any, x: Tensor, t: Tensor, reference: Tensor, caption: Caption) -> Tensor:
        from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImageEditPipeline

        if x.shape != reference.shape:
            raise ValueError(
                f"reference: expected {tuple(x.shape)} like the picture that is made, which the pipeline gives its size, got "
                f"{tuple(reference.shape)}"
            )
        (_, channels, height, width), like = x.shape, {"device": denoiser.device, "dtype": denoiser.dtype}

        stock: Any = LongCatImageEditPipeline

        class Pipeline(stock):  # type: ignore[misc]
            """Its reference comes as latents, its caption encoded: it would take the size of latents for a picture's, and
            count the captions that it was given."""

            def _encode_vae_image(self, image: Tensor, generator: Any) -> Tensor:
                return latents

            def encode_prompt(self, **_: Any) -> tuple[Tensor, Tensor]:
                return caption.tokens[None].to(**like), positions(len(caption.tokens)).to(denoiser.device)

        class Sizes(SimpleNamespace):
            """All that it asks its autoencoder and its processor for."""

        vae = Sizes(config=Sizes(block_out_channels=(0,) * 4, latent_channels=channels))
        pipeline = Pipeline(
            FlowMatchEulerDiscreteScheduler(), vae, None, None, Sizes(image_processor=None), denoiser.module
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        made = []
        for one, its in zip(x, reference):
            latents = its[None].to(**like)
            with sized(LongCatImageEditPipeline, self.downscale * width, self.downscale * height) as picture:
                after = pipeline(
                    image=picture, prompt="", latents=pack(one[None].to(**like)), guidance_scale=1.0, sigmas=[t[0].item()],
                    num_inference_steps=1, output_type="latent", return_dict=False,
                )[0]  # fmt: skip
            made.append(unpack(after.float(), height, width))
        return (x - torch.cat(made).to(x)) / t.view(-1, 1, 1, 1)


def positions(length: int, *pictures: tuple[int, int]) -> Tensor:
    """``[N, 3]`` of a caption's tokens, then of each picture's (height and width in latents): which of them a token is of,
    its row and its column. A caption's go down the diagonal, and every picture begins at its end."""
    words = torch.arange(length)[:, None] * torch.tensor([0, 1, 1])
    begin = torch.tensor([0, length, length])
    # In float32, as the pipeline has them: bf16 would not tell neighbours beyond 256 apart.
    return torch.cat([words.float(), *(position_ids(*size, image=i) + begin for i, size in enumerate(pictures, 1))])


LONGCAT = LongCat()
