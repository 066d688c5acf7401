"""The small model's files: a Flux of width 128, an autoencoder in TAESD's layout, and how to load them.

ComfyUI is not needed here. The network class is ComfyUI's own, so it is built where ComfyUI is known (the nodes, and the
script that trains it); the autoencoder has an equal in plain PyTorch, because training it and testing it need no more.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .prompts import CONTEXT, POOLED

__all__ = [
    "AUTOENCODER",
    "DIFFUSION",
    "FLUX",
    "LORAS",
    "Autoencoder",
    "flux_config",
    "load_autoencoder",
    "load_diffusion",
]

WEIGHTS = Path(__file__).parent / "weights"
DIFFUSION = WEIGHTS / "small_kontext.safetensors"
AUTOENCODER = WEIGHTS / "small_autoencoder.safetensors"
LORAS = Path(__file__).parent / "loras"  # what train_demo leaves; loras/README.md says how to make it again

# Of ComfyUI's Flux: 128-pixel pictures are 16 × 16 latents of 16 channels, 64 tokens of 64 numbers. A ComfyUI may not know
# each of these; what its class asks for is taken.
FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": POOLED,
    "context_in_dim": CONTEXT,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 4,
    "axes_dim": [8, 28, 28],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}


def flux_config(parameters: type) -> dict[str, Any]:
    """What ``comfy.supported_models.Flux`` is made of.

    Args:
        parameters: the dataclass of what ComfyUI's Flux takes, ``comfy.ldm.flux.model.FluxParams``.

    Raises:
        ValueError: if it wants something that is not known here.
    """
    known = fields(parameters)
    missing = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING and f.name not in FLUX]
    if missing:
        raise ValueError(f"demo model: this ComfyUI's Flux wants {', '.join(missing)}, which this pack does not know")
    return {"image_model": "flux", **{f.name: FLUX[f.name] for f in known if f.name in FLUX}}


FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159  # of ComfyUI's latent format for Flux: model = (latent − shift) · scale

# The latents of both: PCA of 8 × 8 patches is linear, so the encoder needs none of TAESD's blocks, and the decoder not all.
# A block with zero weights is a ReLU. Those are not in the file.
DECODER_BLOCKS = (3, 4, 5, 8, 9, 10, 13)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(64, 64), nn.ReLU(), _conv(64, 64), nn.ReLU(), _conv(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Autoencoder(nn.Module):
    """TAESD's layout (https://github.com/madebyollin/taesd) with 16 channels; blocks of zeros are a mere ReLU.

    Args:
        whole: True builds every block, as ComfyUI's class does.
    """

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        down: list[nn.Module | str] = [_conv(3, 64), "block"]
        up: list[nn.Module | str] = [_Clamp(), _conv(16, 64), nn.ReLU()]
        for _ in range(3):
            down += [_conv(64, 64, stride=2, bias=False), "block", "block", "block"]
            up += ["block", "block", "block", nn.Upsample(scale_factor=2), _conv(64, 64, bias=False)]
        down, up = [*down, _conv(64, 16)], [*up, "block", _conv(64, 3)]

        def built(layers: list[nn.Module | str], trained: Collection[int]) -> nn.Sequential:
            blocks = {i: Block() if whole or i in trained else nn.ReLU() for i, x in enumerate(layers) if x == "block"}
            return nn.Sequential(*(x if isinstance(x, nn.Module) else blocks[i] for i, x in enumerate(layers)))

        self.taesd_encoder, self.taesd_decoder = built(down, ()), built(up, DECODER_BLOCKS)
        self.vae_scale, self.vae_shift = nn.Parameter(torch.tensor(FLUX_SCALE)), nn.Parameter(torch.tensor(FLUX_SHIFT))

    def encode(self, pictures: Tensor) -> Tensor:
        """``[B, H, W, 3]`` in 0…1 → latents in model space ``[B, 16, H/8, W/8]``, of about unit variance."""
        latents = self.taesd_encoder(pictures.movedim(-1, 1)) / self.vae_scale + self.vae_shift
        return (latents - FLUX_SHIFT) * FLUX_SCALE

    def decode(self, latents: Tensor) -> Tensor:
        """Latents in model space → ``[B, H, W, 3]`` in 0…1."""
        latents = latents / FLUX_SCALE + FLUX_SHIFT
        return self.taesd_decoder((latents - self.vae_shift) * self.vae_scale).movedim(1, -1).clamp(0, 1)


def load_autoencoder(path: Path = AUTOENCODER) -> dict[str, Tensor]:
    """The state dict for ``comfy.sd.VAE(sd=…)`` or ``Autoencoder(whole=True)``, in float32, zero blocks included."""
    state = {name: value.float() for name, value in load_file(path).items()}
    for name, value in Autoencoder(whole=True).state_dict().items():
        state.setdefault(name, torch.zeros_like(value))
    return state


def load_diffusion(path: Path = DIFFUSION) -> dict[str, Tensor]:
    """The state dict of the Flux under the names of its first release, in float32.

    ComfyUI has since renamed some layers: ``process_unet_state_dict`` of its Flux gives them the names of today.
    """
    return {name: value.float() for name, value in load_file(path).items()}
