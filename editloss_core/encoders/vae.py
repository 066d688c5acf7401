"""VAE latents as embeddings: layout and colour where they are, at a fraction of the pixels."""

from __future__ import annotations

from typing import Callable, Sequence, Union

import torch
from torch import Tensor

from ..hashing import hash_tensors
from .base import EncoderInfo, ImageSize, PixelEncoder, Preprocess, height_width


class VAEEncoder(PixelEncoder):
    """Latents ``(encode(2·picture − 1) − shift) · scale`` as a grid ``[B, H/downscale, W/downscale, C]``.

    A picture whose sides are not multiples of ``downscale`` is stretched down to the next ones.

    Attributes:
        latent_space: sha256 over the autoencoder: the weights' fingerprint and ``downscale``. Encoders of one space read
            its latents, whatever they do to pictures before and to latents after.

    Args:
        encode: pixels ``[B, 3, H, W]`` in −1…1 on ``device`` → latents ``[B, C, H/downscale, W/downscale]``,
            differentiable and without sampling: the posterior's mean
            (diffusers: ``lambda x: vae.encode(x).latent_dist.mode()``). The caller freezes the network.
        name: readable, for example ``"vae/flux_ae"``.
        fingerprint: of the weights behind ``encode`` (``hash_module``).
        downscale: pixels per latent, 8 for FLUX.
        device: where ``encode`` wants its pixels.
        image_size: pixels or (height, width), multiples of ``downscale``; 0 keeps each picture's own size.
        shift, scale: from the VAE's latents to the diffusion model's, numbers or one per channel (FLUX: 0.1159 and
            0.3611, https://github.com/black-forest-labs/flux).

    Raises:
        ValueError: for a bad ``downscale`` or ``image_size``; when called, for latents of an unexpected shape.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        name: str,
        fingerprint: str,
        downscale: int,
        *,
        device: Union[str, torch.device] = "cpu",
        image_size: ImageSize = 0,
        shift: Union[float, Sequence[float]] = 0.0,
        scale: Union[float, Sequence[float]] = 1.0,
    ):
        if downscale < 1:
            raise ValueError(f"downscale: expected at least 1, got {downscale}")
        height, width = (0, 0) if image_size == 0 else height_width(image_size)
        if height % downscale or width % downscale:
            raise ValueError(f"image_size: expected multiples of {downscale} pixels, got {height}×{width}")
        self.encode, self.downscale = encode, downscale
        # Built outside inference mode: backward through a node's inference tensors is refused.
        with torch.inference_mode(False):
            self.shift, self.scale = (
                torch.as_tensor(v, dtype=torch.float32).clone().reshape(1, -1, 1, 1).to(device) for v in (shift, scale)
            )
        preprocess = Preprocess(height, width, multiple=downscale)
        described = preprocess.describe()
        self.latent_space = hash_tensors([], fingerprint, str(downscale))
        numbers = [("shift", self.shift), ("scale", self.scale)]
        whole = hash_tensors(numbers, fingerprint, described, str(downscale))
        super().__init__(EncoderInfo(f"{name}/grid", described, whole, "grid"), preprocess, torch.device(device))

    def features(self, pixels: Tensor) -> Tensor:
        z = self.encode(pixels)
        rows, columns = (v // self.downscale for v in pixels.shape[2:])
        if z.ndim != 4 or (len(z), *z.shape[2:]) != (len(pixels), rows, columns):
            raise ValueError(
                f"{self.info.name}: expected latents [{len(pixels)}, C, {rows}, {columns}], got {list(z.shape)}"
            )
        return self.scaled(z)

    def scaled(self, z: Tensor) -> Tensor:
        """The autoencoder's own latents ``[B, C, h, w]`` → (z − shift) · scale, as the diffusion model takes them."""
        return (z - self.shift.to(z)) * self.scale.to(z)

    def unscaled(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`scaled`."""
        return z / self.scale.to(z) + self.shift.to(z)

    def latents(self, images: Tensor) -> Tensor:
        """Pictures ``[B, H, W, 3]`` → latents ``[B, C, h, w]`` as the diffusion model takes them."""
        return self(images).movedim(-1, 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.preprocess.size(height, width)
        return rows // self.downscale, columns // self.downscale

    def reads_latents(self, latent_space: str, height: int, width: int) -> bool:
        return latent_space == self.latent_space and self.preprocess.size(height, width) == (height, width)

    def from_latents(self, z: Tensor) -> Tensor:
        """The autoencoder's own latents ``[B, C, h, w]`` → the embedding of their pictures: scaled, as a grid.

        Raises:
            ValueError: another size than the encoder's own pictures have.
        """
        check_latents(z, self)
        return self.scaled(z).movedim(1, -1)


def check_latents(z: Tensor, vae: VAEEncoder) -> None:
    """ValueError unless ``z`` is ``[B, C, h, w]`` of a size at which ``vae`` encodes."""
    if not isinstance(z, Tensor) or z.ndim != 4 or not z.numel() or not z.is_floating_point():
        came = f"{z.dtype} {list(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"latents: expected floating [B, C, h, w], got {came}")
    size = tuple(v * vae.downscale for v in z.shape[2:])
    if vae.preprocess.size(*size) != size:
        expected = [v // vae.downscale for v in vae.preprocess.size(*size)]
        raise ValueError(f"latents: expected {expected[0]}×{expected[1]}, got {z.shape[2]}×{z.shape[3]}")
