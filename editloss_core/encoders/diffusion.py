"""Features of a diffusion model itself: what one of its blocks sees in a picture at one noise level."""

from __future__ import annotations

import threading
from typing import Any, Callable

import torch
from torch import Tensor, nn

from ..hashing import hash_tensors
from .base import Encoder, EncoderInfo, Region, check_output
from .vae import VAEEncoder, check_latents


class DiffusionFeatureEncoder(Encoder):
    """Output of ``block`` while the model looks at ``x_t = (1 − t)·x0 + t·ε`` (rectified flow), x0 the latents.

    ε comes from ``seed`` and is the same for every picture of one size, so that distances compare pictures and not
    noise. The model call is cut off as soon as the block has answered: blocks after it cost nothing. Features of
    diffusion models as descriptors: DIFT, Tang et al. 2023, https://arxiv.org/abs/2306.03881.

    Args:
        vae: gives the model's latents (with its shift and scale).
        predict: ``predict(x_t, t)`` calls the model with frozen conditioning: x_t ``[B, C, h, w]`` float, t float32
            ``[B]`` in 0…1, both on ``vae.device``. What it returns is not used. It must reach ``block`` and be
            differentiable up to there; it is left through a BaseException, which ``except Exception`` does not stop.
        block: a module that the call runs. If it runs more than once, the first output counts.
        select: the block's output → ``[B, N, D]`` (picture tokens, row-major, without text and reference tokens) or
            ``[B, D, rows, columns]``.
        name: readable, for example ``"flux/double_blocks.10"``.
        fingerprint: of the model's weights, its conditioning and the block.
        t: noise level, above 0 (the picture) and below 1 (only noise). 0.1–0.3 sees detail, 0.5 and more layout.
        seed: of ε.
        patch: latents per feature cell along a side: 2 for FLUX; the stride of a U-Net block.
        output: ``"grid"`` [B, rows, columns, D] or ``"tokens"`` [B, N, D].

    Raises:
        ValueError: for a bad ``t``, ``patch`` or ``output``; when called, if the block is not reached or ``select``
            gives an unexpected shape.
    """

    def __init__(
        self,
        vae: VAEEncoder,
        predict: Callable[[Tensor, Tensor], Any],
        block: nn.Module,
        select: Callable[[Any], Tensor],
        name: str,
        fingerprint: str,
        *,
        t: float = 0.3,
        seed: int = 0,
        patch: int = 1,
        output: str = "grid",
    ):
        check_output(output, ("tokens", "grid"))
        if not 0.0 < t < 1.0:
            raise ValueError(f"t: expected a noise level above 0 and below 1, got {t}")
        if patch < 1:
            raise ValueError(f"patch: expected at least 1, got {patch}")
        self.vae, self.predict, self.block, self.select = vae, predict, block, select
        self.t, self.seed, self.patch, self.device = t, seed, patch, vae.device
        noise = f"t {t:g}, noise seed {seed}"
        whole = hash_tensors([], vae.info.fingerprint, fingerprint, name, noise, str(patch), output)
        self.info = EncoderInfo(f"{name}/t{t:g}/{output}", f"{vae.info.preprocessing}; {noise}", whole, output)

    def forward(self, images: Tensor) -> Tensor:
        return self._of(self.vae.latents(images))

    def reads_latents(self, latent_space: str, height: int, width: int) -> bool:
        return self.vae.reads_latents(latent_space, height, width)

    def from_latents(self, z: Tensor) -> Tensor:
        """The autoencoder's own latents ``[B, C, h, w]`` → the embedding of their pictures.

        Raises:
            ValueError: another size than ``vae`` encodes at; features of an unexpected shape.
        """
        check_latents(z, self.vae)
        return self._of(self.vae.scaled(z))

    def _of(self, x0: Tensor) -> Tensor:
        """Features of latents as the model takes them."""
        t = torch.full((len(x0),), self.t, device=x0.device)
        x_t = (1.0 - self.t) * x0 + self.t * self.noise(x0)
        x = self.select(run_to(self.block, lambda: self.predict(x_t, t)))
        rows, columns = (-(-side // self.patch) for side in x0.shape[2:])
        if x.ndim == 4 and x.shape[2:] == (rows, columns):
            x = x.flatten(2).transpose(1, 2)
        if x.ndim != 3 or tuple(x.shape[:2]) != (len(x0), rows * columns):
            raise ValueError(
                f"{self.info.name}: expected features [{len(x0)}, {rows * columns}, D] or [{len(x0)}, D, "
                f"{rows}, {columns}], got {list(x.shape)}; check select and patch"
            )
        return x if self.info.output == "tokens" else x.unflatten(1, (rows, columns))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.vae.grid(height, width)
        return -(-rows // self.patch), -(-columns // self.patch)

    def region(self, height: int, width: int) -> Region:
        return self.vae.region(height, width)

    def noise(self, x0: Tensor) -> Tensor:
        """ε ``[1, C, h, w]``, drawn on the CPU so that every device sees the same."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(1, *x0.shape[1:], generator=generator).to(x0)


class _Reached(BaseException):
    """The block has answered: leave the model call."""

    def __init__(self, owner: list[Any]):
        super().__init__()
        self.owner = owner


def run_to(block: nn.Module, call: Callable[[], Any]) -> Any:
    """Run ``call`` until ``block`` has answered, and return its output; the hook is gone afterwards, come what may.

    Raises:
        ValueError: if ``call`` ends without running the block. Errors of ``call`` pass through.
    """
    outputs: list[Any] = []
    thread = threading.get_ident()

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != thread:  # another call of the same model, which is none of ours
            return
        outputs.append(output)
        raise _Reached(outputs)

    handle = block.register_forward_hook(stop)
    try:
        call()
    except _Reached as reached:
        if reached.owner is not outputs:  # another encoder's, around this one
            raise
    finally:
        handle.remove()
    if not outputs:
        raise ValueError(f"block: the model call ended without running it ({type(block).__name__})")
    return outputs[0]
