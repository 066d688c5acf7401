"""More looks at the same pairs in training: flips, shifts, zooms, small turns and mild tone."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io, ui
from torch.nn import functional as F

from ..editloss_core.drawing import grid
from ..editloss_core.pairs import PairSet, VariantSettings, with_variants
from ..editloss_core.training.prepare import describe_variants
from .checks import checked
from .comfy.offers import folded
from .notices import say
from .sockets import PairsSocket

CATEGORY = "EditLoss/training"
SHOWN, ACROSS = 3, 6  # pairs and their looks in the preview
UNCOVERED = 0.35  # brightness of what is not learnt, in the preview
LONGEST = 384  # pixels of a picture in the preview


class PairVariants(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossPairVariants",
            display_name="Pair Variants",
            category=CATEGORY,
            description="Each pair is trained in several variants: mirrored, shifted, enlarged, turned a little, in a slightly other "
            "light. Before, after and mask alike. A dozen pairs then teach more. Held-out pairs stay as they are.",
            inputs=[
                PairsSocket.Input("pairs", tooltip="From Load Pairs or Make Pairs. Other nodes behind this one still see the pairs themselves."),
                io.Int.Input("count", default=8, min=1, max=64, tooltip="Looks at each pair, itself included. 8 for a dozen pairs, 2 to 4 for a hundred, 1 = off."),
                io.Boolean.Input("flip", default=True, tooltip="Mirror every other one. Off for text, logos and objects that have a left and a right. Pairs whose captions say left, right or letters are never mirrored."),
                io.Float.Input("shift", default=0.25, min=0.0, max=0.5, step=0.01, tooltip="Largest shift sideways, as a share of the width; a quarter of it up and down. The edit stays in the picture."),
                io.Float.Input("zoom", default=1.14, min=1.0, max=2.0, step=0.01, tooltip="Largest factor; the smallest is one over it. 1 = off."),
                io.Float.Input("turn", default=2.0, min=0.0, max=45.0, step=0.5, tooltip="Largest turn either way, in degrees. 0 where lines have to stay upright: buildings, pages, screens."),
                io.Float.Input("tone", default=0.05, min=0.0, max=0.5, step=0.01, tooltip="Largest change of brightness, contrast and colours, as a share. 0 where the edit is a matter of light or colour."),
                folded(io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=False, tooltip="Of what is drawn. The same seed gives the same variants, which the cache then has.")),
            ],
            outputs=[
                PairsSocket.Output(display_name="pairs", tooltip="To Train Edit LoRA, which makes the variants of the pairs that it trains on."),
                io.String.Output(display_name="report", tooltip="How many there will be, which are not mirrored, memory and disk."),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, pairs, **settings) -> io.NodeOutput:
        chosen = VariantSettings(**settings)
        text = describe_variants(with_variants(pairs, chosen))
        shown = ui.PreviewImage(sheet(pairs, chosen), cls=cls).as_dict()
        return io.NodeOutput(replace(pairs, variants=chosen), text, ui={**shown, **say(cls, text)})


def sheet(pairs: PairSet, settings: VariantSettings) -> torch.Tensor:
    """The first pairs, each before and after in its first looks, dark where nothing is learnt: ``[1, H, W, 3]``."""
    across = min(settings.count, ACROSS)
    first = pairs.subset(range(min(SHOWN, len(pairs))))
    made = with_variants(first, settings)
    rows, names = [], []
    for index, pair in enumerate(first):
        looks = [made.load(index * settings.count + number) for number in range(across)]
        for part in ("before", "after"):
            rows.append([_small(getattr(look, part), look.valid) for look in looks])
            names.append(f"{pair.name}, {part}")
    labels = ["the pair", *(f"variant {number}" for number in range(1, across))]
    return grid.grid(rows, labels, names, width=1200)


def _small(picture: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    if valid is not None:
        picture = picture * (UNCOVERED + (1 - UNCOVERED) * valid[..., None])
    share = LONGEST / max(picture.shape[:2])
    if share >= 1:
        return picture
    size = [max(1, round(side * share)) for side in picture.shape[:2]]
    return F.interpolate(picture.movedim(-1, 0)[None], size, mode="bilinear", antialias=True)[0].movedim(0, -1)


NODES = [PairVariants]
