"""Pictures that an output must not look like: overlays made from a pair, and a buffer of earlier bad outputs."""

from __future__ import annotations

import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..editloss_core.hard_negatives import HardNegativeBuffer, dequantize_image, image_key, quantize_image
from ..editloss_core.masks import check_pair, estimate_mask
from ..editloss_core.negatives import OVERLAY_KINDS, OverlaySettings, make_overlays
from . import folders
from .checks import checked
from .comfy.offers import folded
from .notices import say

CATEGORY = "EditLoss/negatives"
SHOWN = 8  # pictures on a node
DIMMED = 0.25  # brightness of what a mask leaves out


def _before_input(tooltip: str = "The before pictures.") -> io.Image.Input:
    return io.Image.Input("before", tooltip=tooltip)


def _same_batch(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    before, after = (t[..., :3].clamp(0, 1) for t in (before, after))  # resizing can overshoot
    if before.shape[1:3] != after.shape[1:3]:
        sizes = [f"{t.shape[2]}×{t.shape[1]}" for t in (before, after)]
        raise ValueError(
            f"after: expected the size of before, {sizes[0]} pixels, got {sizes[1]}; scale one of them first"
        )
    check_pair(before, after)
    return before, after


def _first(cls, images: torch.Tensor, what: str, count: int = 0, note: str = "") -> dict:
    """The first pictures on the node, and how many there are of ``what``, a word in the singular."""
    count = count or len(images)
    what += "s" if count > 1 else ""
    text = f"{count} {what}" if count <= SHOWN else f"{SHOWN} of {count} {what}"
    shown = ui.PreviewImage(images[:SHOWN], cls=cls).as_dict()
    return {**shown, **say(cls, f"{text}: {note}" if note else text)}


def _estimate(
    before: torch.Tensor, after: torch.Tensor, bar: ProgressBar, hint: str, threshold: float = 0.0, **options: float
) -> torch.Tensor:
    """The core's masks, picture by picture: each step of the bar lets ComfyUI cancel the node."""
    masks = []
    for i in range(len(before)):
        mask = estimate_mask(before[i : i + 1], after[i : i + 1], threshold or "auto", **options)
        if not mask.any():
            raise ValueError(
                f"Pair {i}: no visible difference between before and after; are both the same picture? {hint}"
            )
        masks.append(mask)
        bar.update(1)
    return torch.cat(masks)


class OverlayNegative(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossOverlayNegative",
            display_name="Overlay Negative",
            category=CATEGORY,
            description="Makes the failure to stay away from: the new object painted over the old one, both visible. Several "
            "constructions per pair, picture by picture.",
            inputs=[
                _before_input(),
                io.Image.Input("after", tooltip="The after pictures, of the same size."),
                io.Combo.Input(
                    "construction", options=["all", *OVERLAY_KINDS], default="all",
                    tooltip="new_over_old: the new object over the before picture. old_over_new: the old object over the after "
                    "picture. blend: both mixed in the edit region. double: the new one beside the old one. all: one of each.",
                ),
                io.Float.Input(
                    "opacity_min", default=0.55, min=0.3, max=1.0, step=0.05, tooltip="Least opacity of what is pasted."
                ),
                io.Float.Input(
                    "opacity_max", default=1.0, min=0.3, max=1.0, step=0.05,
                    tooltip="Most opacity. Without silhouettes it is held at 0.7, because an opaque paste of the whole edit "
                    "region would be the after picture.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=False, tooltip="The same seed gives the same overlays, picture by picture."
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="The edit region. Open: estimated from where before and after differ."
                ),
                io.Mask.Input("mask_before", optional=True, tooltip="Silhouette of the old object; makes truer overlays."),
                io.Mask.Input("mask_after", optional=True, tooltip="Silhouette of the new object; makes truer overlays."),
                folded(io.Float.Input(
                    "feather", default=2.0, min=0.0, max=64.0, step=0.5, optional=True, tooltip="Soft edge of the paste, in pixels."
                )),
                folded(io.Float.Input(
                    "max_offset", default=0.02, min=0.0, max=0.5, step=0.01, optional=True,
                    tooltip="Largest random shift, as a fraction of the picture.",
                )),
                folded(io.Float.Input(
                    "scale_jitter", default=0.05, min=0.0, max=0.5, step=0.01, optional=True,
                    tooltip="Largest random change of size: 0.05 is ±5 %.",
                )),
            ],
            outputs=[
                io.Image.Output(display_name="overlay", tooltip="To Encode's overlay input. Pair by pair, K of each."),
                io.Mask.Output(display_name="pasted", tooltip="What was pasted, one mask per overlay."),
            ],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(
        cls, before, after, construction, opacity_min, opacity_max, seed, mask=None, mask_before=None, mask_after=None,
        feather=2.0, max_offset=0.02, scale_jitter=0.05,
    ) -> io.NodeOutput:  # fmt: skip
        before, after = _same_batch(before, after)
        if opacity_min > opacity_max:
            raise ValueError(f"opacity_min: expected at most opacity_max ({opacity_max:g}), got {opacity_min:g}")
        settings = OverlaySettings(
            kinds=OVERLAY_KINDS if construction == "all" else (construction,),
            opacity=(opacity_min, opacity_max),
            feather=feather,
            max_offset=max_offset,
            scale=(1.0 - scale_jitter, 1.0 + scale_jitter),
            seed=seed,
        )
        estimating = mask is None and (mask_before is None or mask_after is None)
        bar = ProgressBar(len(before) * (2 if estimating else 1))
        if estimating:  # as make_overlays would, all at once
            mask = _estimate(before, after, bar, "An overlay cannot be made of a pair with no visible edit.")
        result = make_overlays(
            before, after, mask, mask_before, mask_after, settings, progress=lambda done, total: bar.update(1)
        )
        return io.NodeOutput(result.images, result.masks, ui=_first(cls, result.images, "overlay"))


class EstimateMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossEstimateMask",
            display_name="Estimate Edit Mask",
            category=CATEGORY,
            description="Where before and after differ, ignoring compression noise and shifts of a pixel.",
            inputs=[
                _before_input(),
                io.Image.Input("after", tooltip="The after pictures, of the same size."),
                io.Float.Input(
                    "threshold", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Smallest change that counts (Oklab distance; 0.02 is just visible). 0 finds it by itself; raise it "
                    "if the mask takes in the background.",
                ),
                io.Float.Input(
                    "grow", default=0.01, min=0.0, max=0.25, step=0.01, optional=True,
                    tooltip="Growth on every side, as a fraction of the longer side.",
                ),
                io.Float.Input(
                    "feather", default=0.0, min=0.0, max=64.0, step=0.5, optional=True, tooltip="Soft edge in pixels."
                ),
            ],
            outputs=[io.Mask.Output(display_name="edit_mask", tooltip="White = edited. To Encode and Overlay Negative.")],
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, before, after, threshold, grow=0.01, feather=0.0) -> io.NodeOutput:
        before, after = _same_batch(before, after)
        hint = "For a faint edit set threshold by hand, for instance to 0.01."
        bar = ProgressBar(len(before))
        masks = _estimate(before, after, bar, hint, threshold, margin=grow, feather=feather)
        edited = after[:SHOWN] * (DIMMED + (1 - DIMMED) * masks[:SHOWN, ..., None].to(after))
        shares = ", ".join(f"{share:.0%}" for share in masks[:SHOWN].mean((1, 2)).tolist())
        return io.NodeOutput(masks, ui=_first(cls, edited, "mask", len(masks), f"{shares} of the picture"))


def _buffer_input() -> io.String.Input:
    return io.String.Input(
        "buffer", default="default", tooltip="Name of the buffer, a folder below output/editloss/hard_negatives."
    )


class StoreHardNegative(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossStoreHardNegative",
            display_name="Store Hard Negatives",
            category=CATEGORY,
            description="Keeps bad outputs on disk, filed by the before picture they belong to. The oldest go when it is full.",
            inputs=[
                io.Image.Input("images", tooltip="Bad outputs: one per before picture, or several in a row for each."),
                _before_input("The before pictures that the outputs were made from."),
                _buffer_input(),
                io.Int.Input("capacity", default=512, min=1, max=1_000_000, tooltip="Most pictures in the whole buffer."),
                io.Int.Input("per_picture", default=16, min=1, max=10_000, tooltip="Most pictures for one before picture."),
                io.Float.Input(
                    "score", default=0.0, min=-1e6, max=1e6, step=0.01, optional=True,
                    tooltip="How bad they are, for your own records.",
                ),
            ],
            outputs=[io.Int.Output(display_name="stored", tooltip="Pictures in the buffer now.")],
            is_output_node=True,
            not_idempotent=True,
        )  # fmt: skip

    @classmethod
    @checked()
    def execute(cls, images, before, buffer, capacity, per_picture, score=0.0) -> io.NodeOutput:
        images, before = images[..., :3], before[..., :3]
        if len(images) % len(before):
            raise ValueError(f"images: expected a multiple of {len(before)} (before pictures), got {len(images)}")
        store = HardNegativeBuffer(folders.negative_buffer_folder(buffer), capacity=capacity, per_key=per_picture)
        each = len(images) // len(before)
        for i, image in enumerate(images):
            store.store(image_key(before[i // each]), quantize_image(image), score=score)
        return io.NodeOutput(len(store), ui=say(cls, f"{len(store)} of {capacity} in {buffer!r}"))


class DrawHardNegative(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EditLossDrawHardNegative",
            display_name="Draw Hard Negatives",
            category=CATEGORY,
            description="Draws earlier bad outputs of the same before pictures from a buffer.",
            inputs=[
                _before_input(),
                _buffer_input(),
                io.Int.Input("count", default=1, min=1, max=64, tooltip="How many for each before picture."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=False, tooltip="The same seed and buffer give the same draw."),
                io.Combo.Input(
                    "if_empty", options=["error", "before"], default="error",
                    tooltip="When a picture has none yet: stop, or use the before picture itself (the output of no edit).",
                ),
            ],
            outputs=[io.Image.Output(display_name="hard_negative", tooltip="To Encode's hard_negative input. Pair by pair.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, buffer, **_) -> str | float:
        try:
            folder = folders.negative_buffer_folder(buffer)
        except (AttributeError, ValueError):  # linked, so not known yet, or no name: always run, and execute says why
            return float("nan")
        times = [p.lstat().st_mtime_ns for p in folder.glob("*.safetensors")]
        return f"{len(times)} {max(times, default=0)}"

    @classmethod
    @checked()
    def execute(cls, before, buffer, count, seed, if_empty) -> io.NodeOutput:
        before = before[..., :3]
        folder = folders.negative_buffer_folder(buffer)
        if not folder.is_dir() and if_empty == "error":
            raise ValueError(f"buffer: there is no buffer called {buffer!r} yet; run Store Hard Negatives first")
        store = HardNegativeBuffer(folder)
        drawn, keys = [], store.keys()
        for i, picture in enumerate(before):
            key = image_key(picture)
            if key in keys:
                drawn.append(dequantize_image(store.draw(key, count, seed + i)))
            elif if_empty == "before":
                drawn.append(picture.expand(count, -1, -1, -1).cpu())
            else:
                raise ValueError(
                    f"buffer: {buffer!r} has nothing for before picture {i}; store some, or set if_empty to before"
                )
        sizes = {tuple(d.shape[1:3]) for d in drawn}
        if len(sizes) > 1:
            raise ValueError(
                f"buffer: expected pictures of one size, {buffer!r} has {sorted(sizes)} (height, width) for these"
            )
        pictures = torch.cat(drawn)
        return io.NodeOutput(pictures, ui=_first(cls, pictures, "hard negative"))


NODES = [OverlayNegative, EstimateMask, StoreHardNegative, DrawHardNegative]
