"""A MODEL that predicts velocity: whether it does, what is known about it, and what it makes of a prompt."""

from __future__ import annotations

import comfy.conds
import comfy.model_sampling
import comfy.sampler_helpers
from torch import Tensor

from ...editloss_core.models import registry
from ...editloss_core.models.base import EditModel
from ...editloss_core.models.qwen import ZERO
from .gradients import usable
from .offers import file_of


def check_flow_model(model) -> None:
    """ValueError unless it predicts velocity."""
    base = model.model
    if not isinstance(base.model_sampling, comfy.model_sampling.CONST):
        raise ValueError(
            f"model: expected a flow-matching model (FLUX and kin), got {type(base).__name__} with "
            f"{type(base.model_sampling).__name__} sampling"
        )


def edit_model_of(model, told: str = "") -> EditModel:
    """What is known about a MODEL.

    Args:
        model: the MODEL.
        told: the edit model's title, of those that share a class; empty goes by the MODEL's config and file.

    Raises:
        ValueError: nothing; with the models that are known. What was told is of another class, or needs a newer ComfyUI.
    """
    if any(name.endswith(".default_ref_method") for name in model.object_patches):
        raise ValueError(
            "model: expected one without Flux KV Cache, which would keep the reference of the first pair for all; leave that "
            "node out"
        )
    base, config = type(model.model).__name__, getattr(model.model.model_config, "unet_config", {})
    try:
        known = registry.of_comfyui(base, config, file_of(model))
    except ValueError as error:
        raise ValueError(f"model: {error}") from None
    if told:
        alike = {m.title: m for m in registry.MODELS if m.comfyui_model == base and m.has_config(config)}
        if told not in alike:
            raise ValueError(f"edit_model: expected one of {', '.join(alike)} for ComfyUI's {base}, got {told}")
        known = alike[told]
    if known.reference_method == ZERO and not hasattr(model.model.diffusion_model, "default_ref_method"):
        raise ValueError(
            f"model: {known.title} tells its reference that it is at t = 0 ({ZERO}), which this ComfyUI cannot; update it"
        )
    return known


def check_text_encoder(clip, edit_model: EditModel) -> None:
    """ValueError, before anything is encoded, for another model's CLIP."""
    if not edit_model.comfyui_tokenizer:
        return
    found = [kind.__name__ for kind in type(getattr(clip, "tokenizer", clip)).__mro__]  # the demo's has none
    if edit_model.comfyui_tokenizer not in found:
        raise ValueError(
            f"clip: expected the text encoder of {edit_model.title} (Load CLIP, type {edit_model.comfyui_clip}), got one with a "
            f"{found[0]}"
        )


def model_inputs(base, cond: dict, x: Tensor) -> dict[str, comfy.conds.CONDRegular]:
    """What the model makes of one prompt for latents ``x`` [B, C, h, w], as ComfyUI's samplers do it.

    Args:
        base: ``comfy.model_base.BaseModel``.
        cond: one entry of ``comfy.sampler_helpers.convert_cond``.
        x: on the device where the model runs.

    Raises:
        ValueError: if something is missing that this model needs.
    """
    missing = None
    if base.model_config.unet_config.get("vec_in_dim") and cond.get("pooled_output") is None:
        missing = "'pooled_output'"  # which newer ComfyUI takes for zeros
    try:
        inputs = base.extra_conds(**{k: usable(v, x.device) for k, v in cond.items()}, noise=x, device=x.device)
    except KeyError as error:
        missing = error
    if missing:
        raise ValueError(
            f"conditioning: {type(base).__name__} needs {missing}; make it with the model's own text encoder"
        )
    return {name: value.process_cond(batch_size=len(x), device=x.device, area=None) for name, value in inputs.items()}
