"""Features of a VAE's decoder: what it makes of latents on the way to pixels, without making pixels."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..hashing import hash_tensors
from .base import Encoder, EncoderInfo, Region
from .diffusion import run_to
from .vae import VAEEncoder, check_latents

Step = Callable[[Tensor], Tensor]

OUTLIER = 10.0  # standard deviations of a channel; what lies beyond counts as this much
SHORT = 0.01  # of a layer's mean square: what is far shorter is not brought to full length
DEAD = 0.1  # of a layer's root mean square deviation: a channel that hardly moves is not blown up any further
PATTERNS, SIDE = 8, 64  # pictures from which a channel's mean and deviation are taken, and their side in pixels


class VAEDecoderEncoder(Encoder):
    """Features of a VAE's decoder at chosen depths as a grid, read from latents: the decoder runs to the deepest and stops.

    Depth 1 is what the decoder's blocks at the resolution of the latents have made, upsampled by its own convolution (diffusers:
    the output of the first of ``up_blocks``), 2 the same of the blocks at twice that resolution, and so on; the last is not
    upsampled. Each depth costs about two to four times the one before.

    These are the features of the latent perceptual loss (LPL: Berrada et al. 2024, https://arxiv.org/abs/2411.04873). As
    there, each depth's channels are standardised, extreme activations are kept from ruling the distance, and depths count by
    the inverse of their upscaling. What differs: LPL takes mean and deviation from the features of the target and masks outliers
    in both pictures. An embedding is of one picture and knows no target, so mean and deviation of each channel are fixed, taken
    once from the decoder's features of eight drawn patterns, and a value beyond ten deviations counts as ten, without a gradient;
    statistics of the picture itself would hide its brightness and contrast. Each depth's features at a place are then brought to
    one length, as LPIPS does it (Zhang et al. 2018, https://arxiv.org/abs/1801.03924), which told bent objects from harmless
    changes better. Finer depths are averaged over the cells of the coarsest; the whole token's length is at most 1.

    Args:
        vae: encodes pictures, and says which latents are read; its shift and scale do not matter.
        decoder: the module that ``decode`` runs: an ``nn.Sequential`` in TAESD's layout (or diffusers' ``DecoderTiny``),
            the first Stable Diffusion's ``Decoder`` (``conv_in``, ``mid``, ``up``), or diffusers' (``conv_in``,
            ``mid_block``, ``up_blocks``). Frozen.
        decode: the autoencoder's own latents → anything; it is left as soon as the decoder's first convolution has answered.
        name: readable, for example ``"vae-decoder/flux_ae"``.
        fingerprint: of the weights of encoder and decoder.
        depths: ascending, from 1.

    Raises:
        ValueError: a decoder of another layout; depths that it has not.
    """

    def __init__(
        self,
        vae: VAEEncoder,
        decoder: nn.Module,
        decode: Callable[[Tensor], Any],
        name: str,
        fingerprint: str,
        *,
        depths: Sequence[int] = (1,),
    ):
        first, steps = decoder_steps(decoder)
        check_depths(depths, len(steps))
        self.vae, self.decode, self.depths, self.device = vae, decode, tuple(depths), vae.device
        self._first, self._steps = first, steps[: depths[-1]]
        self._layers: Optional[list[_Layer]] = None
        chosen = "+".join(map(str, depths))
        described = f"{vae.preprocess.describe()}; decoder to depth {chosen}"
        method = f"{PATTERNS} patterns of {SIDE}, outliers {OUTLIER:g}, dead {DEAD:g}, short {SHORT:g}"
        whole = hash_tensors([], vae.latent_space, vae.preprocess.describe(), fingerprint, chosen, method)
        self.info = EncoderInfo(f"{name}/{chosen}/grid", described, whole, "grid")

    def forward(self, images: Tensor) -> Tensor:
        return self._of(self.vae.unscaled(self.vae.latents(images)))

    def reads_latents(self, latent_space: str, height: int, width: int) -> bool:
        return self.vae.reads_latents(latent_space, height, width)

    def from_latents(self, z: Tensor) -> Tensor:
        """The autoencoder's own latents ``[B, C, h, w]`` → the embedding of their pictures.

        Raises:
            ValueError: another size than ``vae`` encodes at.
        """
        check_latents(z, self.vae)
        return self._of(z)

    def features(self, z: Tensor) -> list[Tensor]:
        """The autoencoder's own latents → what the decoder has at each chosen depth ``[B, D, rows, columns]``, as it is."""
        x = run_to(self._first, lambda: self.decode(z))
        found = []
        for depth, steps in enumerate(self._steps, 1):
            for step in steps:
                x = step(x)
            if depth in self.depths:
                found.append(x if x.ndim == 4 else x.squeeze(2))  # a decoder of films makes films of one picture
        return found

    def _of(self, z: Tensor) -> Tensor:
        layers = self.layers()
        features = self.features(z)
        coarsest = features[0].shape[2]
        made = []
        for x, layer in zip(features, layers):
            x = x if x.dtype == torch.float64 else x.float()
            x = ((x - layer.mean.to(x)) / layer.deviation.to(x)).clamp(-OUTLIER, OUTLIER)
            x = x * (layer.length / (x.square().sum(1, keepdim=True) + SHORT * x.shape[1]).sqrt())
            made.append(F.avg_pool2d(x, x.shape[2] // coarsest))
        return torch.cat(made, 1).movedim(1, -1)

    def layers(self) -> list[_Layer]:
        """How the features of each depth are standardised; measured at the first call, at the price of a small batch."""
        if self._layers is None:
            # Not in inference mode: what is made here takes part in backward passes.
            with torch.inference_mode(False), torch.no_grad():
                z = self.vae.encode(2.0 * patterns().to(self.device) - 1.0)
                features = self.features(z)
                shares = [features[0].shape[2] / x.shape[2] for x in features]
                self._layers = [
                    _Layer.of(x, z.shape[2], (share / sum(shares)) ** 0.5) for x, share in zip(features, shares)
                ]
        return self._layers

    def grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.vae.grid(height, width)
        cells = self.layers()[0].cells
        return round(rows * cells), round(columns * cells)

    def region(self, height: int, width: int) -> Region:
        return self.vae.region(height, width)


class _Layer(NamedTuple):
    """Standardisation of one depth.

    Attributes:
        mean, deviation: ``[1, D, 1, 1]``, over the patterns.
        length: to which its features at a place are brought; the squares of all depths' add up to 1.
        cells: cells per latent, along a side.
    """

    mean: Tensor
    deviation: Tensor
    length: float
    cells: float

    @classmethod
    def of(cls, x: Tensor, latents: int, length: float) -> _Layer:
        """Of the features ``[B, D, rows, columns]`` of pictures with ``latents`` rows of latents."""
        x = x.float()
        deviation = x.std((0, 2, 3), keepdim=True)
        deviation = deviation.clamp_min(DEAD * float(deviation.square().mean().sqrt()) + 1e-12)
        return cls(x.mean((0, 2, 3), keepdim=True), deviation, length, x.shape[2] / latents)


def patterns() -> Tensor:
    """``[8, 3, 64, 64]`` in 0…1: coloured noise with as much of coarse as of fine, as pictures have it; always the same."""
    generator = torch.Generator().manual_seed(0)
    x, side = torch.zeros(PATTERNS, 3, SIDE, SIDE), 2
    while side <= SIDE:
        noise = torch.rand(PATTERNS, 3, side, side, generator=generator) - 0.5
        x += F.interpolate(noise, size=(SIDE, SIDE), mode="bilinear", align_corners=False) * (2.0 / side) ** 0.5
        side *= 2
    return (0.5 + 0.25 * x / x.std()).clamp(0.0, 1.0)


def check_depths(depths: Sequence[int], most: Optional[int] = None) -> None:
    """ValueError unless ``depths`` are ascending whole numbers from 1, up to ``most``."""
    whole = not isinstance(depths, str) and all(isinstance(d, int) and not isinstance(d, bool) for d in depths)
    if not whole or not depths or list(depths) != sorted(set(depths)) or depths[0] < 1:
        raise ValueError(f"depths: expected ascending whole numbers from 1, for example 1, 2; got {depths!r}")
    if most is not None and depths[-1] > most:
        raise ValueError(f"depths: this decoder has 1 to {most}, got {depths[-1]}")


def decoder_steps(decoder: Any) -> tuple[nn.Module, list[list[Step]]]:
    """The first convolution of a decoder, and what follows it, depth by depth; the layers that make pixels of the last features
    are left out.

    The blocks are run one by one, not by the decoder: it would run to its end, and may checkpoint them itself.

    Raises:
        ValueError: a decoder of another layout.
    """
    first = getattr(decoder, "conv_in", None)
    if isinstance(first, nn.Module) and hasattr(decoder, "up_blocks") and hasattr(decoder, "mid_block"):
        return first, _of_diffusers(decoder)
    if isinstance(first, nn.Module) and hasattr(decoder, "up") and hasattr(decoder, "mid"):
        return first, _of_compvis(decoder)
    layers = getattr(decoder, "layers", decoder)
    if isinstance(layers, nn.Sequential):
        return _of_sequential(layers)
    raise ValueError(
        f"decoder: expected one in the layout of TAESD or of Stable Diffusion's autoencoder, got {type(decoder).__name__}"
    )


def _of_sequential(layers: nn.Sequential) -> tuple[nn.Module, list[list[Step]]]:
    """TAESD's: convolution, activation, blocks, then upsampling, convolution, blocks, and so on; last a convolution to RGB."""
    modules = list(layers)
    start = next((i for i, module in enumerate(modules) if isinstance(module, nn.Conv2d)), len(modules))
    steps: list[list[Step]] = [[]]
    for before, module in zip(modules[start:], modules[start + 1 : -1]):
        steps[-1].append(module)
        if isinstance(before, nn.Upsample):  # module is its convolution
            steps.append([])
    if not steps[0]:
        raise ValueError(
            f"decoder: expected a convolution and blocks, as TAESD has them, got {', '.join(type(m).__name__ for m in modules)}"
        )
    return modules[start], steps


def _of_compvis(decoder: Any) -> list[list[Step]]:
    """https://github.com/CompVis/stable-diffusion, which ComfyUI builds on: ``up`` is from fine to coarse."""
    mid = decoder.mid
    steps: list[list[Step]] = [[_with_none(mid.block_1), mid.attn_1, _with_none(mid.block_2)]]
    for level in reversed(decoder.up):
        for i, block in enumerate(level.block):
            steps[-1].append(_with_none(block))
            if len(level.attn):
                steps[-1].append(level.attn[i])
        if level is not decoder.up[0]:
            steps[-1].append(level.upsample)
            steps.append([])
    return steps


def _of_diffusers(decoder: Any) -> list[list[Step]]:
    """diffusers' ``Decoder``, without its own checkpointing."""
    mid = decoder.mid_block
    steps: list[list[Step]] = [[_with_none(mid.resnets[0])]]
    for attention, block in zip(mid.attentions, mid.resnets[1:]):
        steps[0] += [*([] if attention is None else [attention]), _with_none(block)]
    for up in decoder.up_blocks:
        steps[-1] += map(_with_none, up.resnets)
        if up.upsamplers:
            steps[-1] += up.upsamplers
            steps.append([])
    return steps


def _with_none(block: nn.Module) -> Step:
    """A residual block that asks for the embedding of a time step."""
    return lambda x: block(x, None)
