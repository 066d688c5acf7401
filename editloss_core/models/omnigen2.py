"""OmniGen2 (VectorSpaceLab, https://github.com/VectorSpaceLab/OmniGen2), in ComfyUI alone: diffusers has no pipeline for it.

Its captions are read by a language model that does not see the picture; the before picture is a reference, whose tokens stand
before those of the picture that is made, with positions after the caption's.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Optional, Sequence

from torch import Tensor

from .base import NOT_IN_DIFFUSERS, EditModel, LayerNames

ATTENTION = ("*attn.*",)
MLP = ("*feed_forward.*",)

PLAIN_BLOCK = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"feed_forward.{name}" for name in ("linear_1", "linear_2", "linear_3")),
)
BLOCK = (*PLAIN_BLOCK, "norm1.linear")
OUTSIDE = (
    "x_embedder",
    "ref_image_patch_embedder",
    "time_caption_embed.timestep_embedder.linear_1",
    "time_caption_embed.timestep_embedder.linear_2",
    "time_caption_embed.caption_embedder.1",
    "norm_out.linear_1",
    "norm_out.linear_2",
)


def _same(layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {layer: (layer,) for layer in layers}


class OmniGen2(EditModel):
    id = "omnigen2"
    title = "OmniGen2"
    comfyui_model = "Omnigen2"
    comfyui_network = "OmniGen2Transformer2DModel"
    parts = NOT_IN_DIFFUSERS
    diffusers_loads_lora = False
    text_layer = "time_caption_embed.caption_embedder.1"

    references = 5  # it has embeddings of so many
    layers = {"attention": ATTENTION, "attention + MLP": (*ATTENTION, *MLP), "all": ("*",)}
    names = LayerNames(
        model="OmniGen2",
        blocks=(
            *((blocks, blocks, _same(BLOCK)) for blocks in ("layers", "noise_refiner", "ref_image_refiner")),
            ("context_refiner", "context_refiner", _same(PLAIN_BLOCK)),
        ),
        outside=_same(OUTSIDE),
    )

    # Nothing is told to it: the stock workflow asks it three times for each step.
    preview_cfg = 5.0
    preview_reference_cfg = 2.0

    # A block of width d keeps about 22·d values per token: three of 4·d in the MLP, and ten for attention and the norms.
    patch = 2
    downscale = 8
    text_tokens = 256  # it has no length of its own: of a long caption, with the 28 that are around it
    width_attribute = "hidden_size"
    block_attributes = ("layers", "noise_refiner", "ref_image_refiner", "context_refiner")
    block_values = 22

    def mu(self, tokens: int, steps: Optional[int] = None) -> float:
        """The same for every size: ComfyUI's shift of 2.6."""
        return math.log(2.6)

    def steered(
        self,
        asked: Callable[[Sequence[Tensor], Sequence[Any]], Tensor],
        references: Sequence[Tensor],
        conditioning: Sequence[Any],
        negative: Sequence[Any],
        cfg: float,
    ) -> Tensor:
        """Guided away from the negative by ``cfg``, and from having no picture by less: v = b + 2·(n − b) + cfg·(p − n), with b
        for the negative without a reference, as the stock workflow has it.
        """
        bare, unlike = asked([], negative), asked(references, negative)
        return self.guided(unlike, bare, self.preview_reference_cfg) + cfg * (asked(references, conditioning) - unlike)


OMNIGEN2 = OmniGen2()
