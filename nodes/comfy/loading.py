"""Whose weights are on the device when."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from comfy.utils import ProgressBar
from torch import Tensor, nn

from ...editloss_core.encoders.base import Encoder
from ...editloss_core.encoders.diffusion import DiffusionFeatureEncoder
from ...editloss_core.encoders.vae import VAEEncoder
from ...editloss_core.hashing import hash_module


def fingerprint(module: nn.Module, *texts: str) -> str:
    """:func:`hash_module` with the node's progress bar, which its cancel button stops."""
    bar = ProgressBar(1)
    return hash_module(module, *texts, progress=lambda done, total: bar.update_absolute(done, total))


def is_loaded(patcher) -> bool:
    """Whether ComfyUI counts the model as loaded, in full or in part: itself, or a clone with the same weights."""
    return any(
        other is patcher or (other.model is patcher.model and other.patches_uuid == patcher.patches_uuid)
        for other in comfy.model_management.loaded_models()
    )


def load_for_call(patcher, memory_required: float) -> None:
    """Bring a model to its device before a call, but not while gradients are on if it is there already.

    Loading may push another model out, and a graph may still need that one's weights where they are.
    """
    if not (is_loaded(patcher) and torch.is_grad_enabled()):
        comfy.model_management.load_models_gpu([patcher], memory_required=memory_required)


def patchers_of(encoder: Encoder, reads_latents: bool = False) -> list[Any]:
    """ComfyUI's patchers of all that has to be on its device while the encoder runs.

    Args:
        encoder: from one of the encoder nodes.
        reads_latents: it is given latents (``from_latents``), so that the VAE in it has nothing to do.
    """
    if isinstance(encoder, VAEEncoder) and reads_latents:
        return []
    behind = patchers_of(encoder.vae, reads_latents) if isinstance(encoder, DiffusionFeatureEncoder) else []
    return [*getattr(encoder, "patchers", ()), *behind]


def check_shared(encoder: Encoder, model) -> None:
    """ValueError if the encoder runs the weights of ``model`` with other LoRAs on them: ComfyUI keeps them once only."""
    for patcher in patchers_of(encoder):
        if patcher.model is model.model and patcher.patches_uuid != model.patches_uuid:
            raise ValueError(
                f"objective: the encoder {encoder.info.name!r} runs the same weights as model, but with other LoRAs or patches; "
                "wire one and the same MODEL to both, or load it twice"
            )


def with_lora(model, tensors: dict[str, Tensor]):
    """A MODEL with a LoRA in ComfyUI's names at strength 1, as the stock loader puts it on."""
    patched, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    return patched


class WholePatcher(comfy.model_patcher.ModelPatcher):
    """For a network of plain torch layers, which run with all of their weights on the device or not at all.

    ComfyUI's own layers bring a weight that waits in main memory in for each product; to take some of the weights away, or
    to load only as many as fit, would break the others.
    """

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        super().load(device_to, force_patch_weights=force_patch_weights, full_load=True)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return 0  # ComfyUI then unloads all of it, if it needs the room
