"""The small Kontext-shaped model of the demo in ComfyUI's own classes."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams

from ...editloss_core.demo import model


def small_flux(**options) -> comfy.model_patcher.ModelPatcher:
    """ComfyUI's Flux class with the small model's sizes and weights; its loaders know the large size only.

    Args:
        options: what ComfyUI tells a loader whose model it wants again, a copy to train for example; it is the same for all.
    """
    with torch.inference_mode(False):
        config = comfy.supported_models.Flux(model.flux_config(FluxParams))
        config.set_inference_dtype(torch.float32, None)
        base = config.get_model({}, device=torch.device("cpu"))
        base.diffusion_model.load_state_dict(config.process_unet_state_dict(model.load_diffusion()))
        base.diffusion_model.eval().requires_grad_(False)
    patcher = comfy.model_patcher.ModelPatcher(
        base, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )
    patcher.cached_patcher_init = (small_flux, ())  # how ComfyUI comes by another copy
    return patcher


def small_vae() -> comfy.sd.VAE:
    """Its TAESD-shaped autoencoder, as the stock loader has it: whatever copies, saves or loads a VAE can do so with this one."""
    with torch.inference_mode(False):
        return comfy.sd.VAE(sd=model.load_autoencoder())
