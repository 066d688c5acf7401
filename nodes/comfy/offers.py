"""What one ComfyUI has and another has not. Each question is asked of the program itself, once, and here alone.

Nothing here looks at a version number: a fork may be ahead of its number, and a number says nothing about a field.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any, Callable, Iterator
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from comfy_api.latest import io

# Families of the fused kernels whose answers are differentiable functions of activations; quantised products are not.
FUSED = ("apply_rope", "rms_rope", "adaln", "rms_adaln", "na3d")
# Module of a model under dynamic VRAM → its static copy, so that all nodes that get the same model share one.
_STATIC: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()
WITHOUT_DYNAMIC = "start ComfyUI with --disable-dynamic-vram"


def program() -> str:
    """What the models run in, with the versions that their numbers depend on."""
    try:
        from comfyui_version import __version__ as version
    except ImportError:  # a program that only carries ComfyUI's packages
        version = "of an unknown version"
    parts = [f"ComfyUI {version}", f"torch {torch.__version__}"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        parts.insert(1, f"comfy-kitchen {importlib.metadata.version('comfy-kitchen')}")
    return ", ".join(parts)


def is_dynamic(patcher) -> bool:
    """Whether ComfyUI pages a model's weights in and out beneath its tensors: autograd's would be gone when it comes back."""
    ask = getattr(patcher, "is_dynamic", None)
    return ask is not None and ask()


def file_of(patcher) -> str:
    """Name of the file that a stock loader made the model of, where it leaves word of that."""
    _, given, *_ = getattr(patcher, "cached_patcher_init", None) or ((), ())
    return Path(given[0]).name if given and isinstance(given[0], str) else ""


def static_model(patcher):
    """A MODEL whose weights stay where they are put, with the same LoRAs and patches; under dynamic VRAM loaded once more.

    Raises:
        ValueError: for a dynamic one whose loader left no word of how to load it again.
    """
    if not is_dynamic(patcher):
        return patcher
    if patcher.cached_patcher_init is None:
        raise ValueError(
            "model: expected one from a stock loader (Load Diffusion Model, Load Checkpoint), got one that cannot be loaded "
            f"again without dynamic VRAM, which gradients need; use such a loader, or {WITHOUT_DYNAMIC}"
        )
    with torch.inference_mode(False):
        patcher.non_dynamic_delegate_model = _STATIC.get(patcher.model, patcher.non_dynamic_delegate_model)
        copied = patcher.get_non_dynamic_delegate()
    _STATIC[patcher.model] = patcher.non_dynamic_delegate_model
    return copied


def static_vae(vae):
    """:func:`static_model` for a VAE with weights: built once more from them, so that any loader will do.

    Raises:
        ValueError: for a dynamic one of a kind that its weights alone do not tell.
    """
    if not is_dynamic(vae.patcher):
        return vae
    net = vae.first_stage_model
    if net not in _STATIC:
        known = {"tae_latent_channels": vae.latent_channels}
        try:
            with torch.inference_mode(False):  # for a CPU it is never dynamic
                twin = comfy.sd.VAE(sd=vae.get_sd(), device=torch.device("cpu"), dtype=vae.vae_dtype, metadata=known)
        except RuntimeError as error:  # tensors that do not fit
            raise ValueError(f"vae: {type(net).__name__} cannot be copied ({error}); {WITHOUT_DYNAMIC}") from error
        made = twin.first_stage_model
        if type(made) is not type(net) or made.state_dict().keys() != net.state_dict().keys():
            raise ValueError(f"vae: {type(net).__name__} cannot be copied; {WITHOUT_DYNAMIC}")
        copied = copy.copy(vae)
        copied.first_stage_model, copied.patcher = made.to(vae.vae_dtype), _for_devices_of(vae.patcher, made)
        _STATIC[net] = copied
    return _STATIC[net]


def static_clip_vision(clip):
    """:func:`static_model` for a CLIP_VISION, which never says how to load it again: built once more from its weights."""
    if not is_dynamic(clip.patcher):
        return clip
    net = clip.model
    if net not in _STATIC:
        with torch.inference_mode(False):
            made = type(net)(clip.config, clip.dtype, torch.device("cpu"), comfy.ops.manual_cast).eval()
            made.load_state_dict(clip.get_sd())
        copied = copy.copy(clip)
        copied.model = made.to(torch.device("cpu"), clip.dtype)
        copied.patcher = _for_devices_of(clip.patcher, made)
        _STATIC[net] = copied
    return _STATIC[net]


def _for_devices_of(patcher, module: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    return comfy.model_patcher.ModelPatcher(module, patcher.load_device, patcher.offload_device)


def drop_inference_buffers() -> None:
    """Let go of the memory into which weights are brought for a call, where a node has made it in inference mode.

    ComfyUI keeps it for the next node, and what was made in that mode cannot be written to in another.
    """
    buffers = getattr(comfy.model_management, "STREAM_CAST_BUFFERS", {})
    streams = [stream for stream, buffer in buffers.items() if buffer.is_inference()]
    if streams:
        comfy.model_management.synchronize()  # what was brought into it may be in use
    for stream in streams:
        del buffers[stream]


@contextlib.contextmanager
def in_training() -> Iterator[None]:
    """Inside, models whose fast path has no derivative take another, where ComfyUI has a flag for it."""
    management = comfy.model_management
    before = getattr(management, "in_training", None)
    if before is None:
        yield
        return
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before


def fused_kernels() -> list[tuple[Any, Callable[..., Any]]]:
    """Operators of the package comfy_kitchen, and what each does in plain torch; none where ComfyUI comes without it.

    A kernel that changes its inputs has an underscore at its end, and stands beside the function that does not.
    """
    if importlib.util.find_spec("comfy_kitchen") is None:
        return []
    from comfy_kitchen.backends import eager

    found = []
    for name in dir(eager):
        if name.startswith(FUSED) and hasattr(torch.ops.comfy_kitchen, name):
            found.append((getattr(torch.ops.comfy_kitchen, name), getattr(eager, name.rstrip("_"))))
    return found


def folded(declared: io.Input) -> io.Input:
    """An input that is rarely changed, behind the node's "advanced inputs" where ComfyUI's inputs can be told so."""
    if hasattr(declared, "advanced"):
        declared.advanced = True
    return declared


def has_comparison() -> bool:
    """Whether the page can lay two pictures over each other with a slider; ``web/compare.js`` then does."""
    return hasattr(io, "ImageCompare")
