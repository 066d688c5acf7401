"""The protocol that every encoder keeps, and the preprocessing that most of them share."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Callable, Iterable, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUTPUTS = ("global", "tokens", "grid")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EncoderInfo:
    """What an embedding must carry to be compared with another one.

    Attributes:
        name: readable and unique within a graph, for example ``timm/vit_small_patch14_dinov2/grid``.
        preprocessing: what happens to a picture before the network, in words.
        fingerprint: sha256 over weights, preprocessing and output; equal fingerprints give equal embeddings.
        output: ``"global"`` [B, D], ``"tokens"`` [B, P, D] or ``"grid"`` [B, h, w, D].
    """

    name: str
    preprocessing: str
    fingerprint: str
    output: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "EncoderInfo":
        return cls(**json.loads(text))


class Encoder(ABC):
    """Pictures ``[B, H, W, 3]`` in 0…1 → embeddings, differentiable with respect to the pictures.

    A subclass sets ``info`` and ``device`` and implements :meth:`forward` and :meth:`grid`.
    """

    info: EncoderInfo
    device: torch.device

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Checked pictures on ``self.device`` → ``[B, D]``, ``[B, P, D]`` or ``[B, h, w, D]``."""

    @abstractmethod
    def grid(self, height: int, width: int) -> Optional[tuple[int, int]]:
        """Rows and columns of the token grid for pictures of this size (row-major for ``"tokens"``); None for global."""

    def __call__(self, images: Tensor) -> Tensor:
        """Encode with gradients.

        Raises:
            ValueError: for anything but a floating ``[B, H, W, 3]`` tensor with at least one picture.
        """
        check_images("images", images)
        return self.forward(images.to(self.device))

    def embed(self, images: Tensor, batch_size: int = 8, progress: Optional[Progress] = None) -> Tensor:
        """Encode without gradients in batches; the result is a float32 tensor on the CPU.

        Args:
            images: ``[B, H, W, 3]`` in 0…1.
            batch_size: pictures per forward pass; lower it when memory is short.
            progress: called with (done, total) pictures after each batch.
        """
        check_images("images", images)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        parts = []
        with torch.no_grad():
            for start in range(0, len(images), batch_size):
                parts.append(self(images[start : start + batch_size]).float().cpu())
                if progress is not None:
                    progress(min(start + batch_size, len(images)), len(images))
        return torch.cat(parts)


def check_images(name: str, images: Tensor) -> None:
    """ValueError unless ``images`` is a floating ``[B, H, W, 3]`` tensor with at least one pixel."""
    if not isinstance(images, Tensor):
        raise ValueError(f"{name}: expected a tensor [B, H, W, 3], got {type(images).__name__}")
    if images.ndim != 4 or images.shape[-1] != 3 or images.numel() == 0:
        raise ValueError(f"{name}: expected a picture batch [B, H, W, 3], got shape {list(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"{name}: expected floating values in 0…1, got {images.dtype}")


@dataclass(frozen=True)
class Preprocess:
    """Resize and normalise with gradients, in place of the rounding PIL pipelines that encoders ship with.

    Attributes:
        height, width: what the network takes, in pixels; 0 keeps the picture's own size rounded down to ``multiple``.
        mean, std: per channel, of pictures in 0…1.
        mode: ``"bicubic"`` or ``"bilinear"``, always antialiased.
        crop: False stretches the whole picture to the target (an edit at the border stays visible); True scales the
            shorter side and crops the centre, as CLIP was trained.
        multiple: the patch size; sizes that are kept are rounded down to it.
    """

    height: int
    width: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    mode: str = "bicubic"
    crop: bool = False
    multiple: int = 1

    def __post_init__(self):
        if self.mode not in ("bicubic", "bilinear"):
            raise ValueError(f"mode: expected 'bicubic' or 'bilinear', got {self.mode!r}")
        if self.multiple < 1 or self.height < 0 or self.width < 0:
            raise ValueError(f"size: expected height and width >= 0 and multiple >= 1, got {self}")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels that the network sees for a picture of this size."""
        if self.height and self.width:
            return self.height, self.width
        if min(height, width) < self.multiple:
            raise ValueError(f"images: expected at least {self.multiple}×{self.multiple} pixels, got {height}×{width}")
        return height - height % self.multiple, width - width % self.multiple

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, H, W, 3]`` in 0…1 → normalised ``[B, 3, h, w]`` in float32."""
        x = images.movedim(-1, 1).float()
        target = self.size(x.shape[2], x.shape[3])
        scaled = target
        if self.crop:
            scale = max(target[0] / x.shape[2], target[1] / x.shape[3])
            scaled = tuple(max(t, round(s * scale)) for t, s in zip(target, x.shape[2:]))
        if scaled != tuple(x.shape[2:]):
            # Cubic overshoot leaves 0…1; the clamp that follows has a zero gradient only where it bites.
            x = F.interpolate(x, size=scaled, mode=self.mode, antialias=True, align_corners=False).clamp(0.0, 1.0)
        top, left = (scaled[0] - target[0]) // 2, (scaled[1] - target[1]) // 2
        x = x[:, :, top : top + target[0], left : left + target[1]]
        mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def describe(self) -> str:
        """The preprocessing in words, as it stands in an embedding file."""
        size = f"{self.height}×{self.width}" if self.height and self.width else f"own size in steps of {self.multiple}"
        how = "shorter side, centre crop" if self.crop else "stretch"
        mean, std = (" ".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
        return f"resize {size} ({self.mode}, antialias, {how}); mean {mean}; std {std}"


def hash_tensors(tensors: Iterable[tuple[str, Tensor]], *texts: str) -> str:
    """sha256 over names, dtypes, shapes and bytes of tensors, and over texts.

    Every byte counts: 300 MB of weights take about a second.
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_module(module: nn.Module, *texts: str) -> str:
    """Fingerprint of a network's weights together with what is done before and after it."""
    return hash_tensors(sorted(module.state_dict().items()), *texts)


def freeze(module: nn.Module, device: torch.device) -> nn.Module:
    """An encoder is never trained: eval mode, no parameter gradients, on its device."""
    return module.eval().requires_grad_(False).to(device)
