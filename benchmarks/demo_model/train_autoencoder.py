"""The autoencoder of the small model: its encoder is worked out, its decoder is trained.

The best linear encoder of 8 × 8 patches is their principal components; 16 of them keep 29 dB of these scenes. TAESD's
layers can hold that exactly: pixels are positive, so ReLUs pass them, and three strided convolutions collect a patch. The
components are scaled halfway to equal variance (σ → √σ): left as they are, the noise of a flow model drowns all but the
mean colours, and whitened they put the finest detail on a par with shape. The decoder is an ordinary TAESD decoder.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from editloss_core.demo.model import FLUX_SCALE, FLUX_SHIFT, Autoencoder
from editloss_core.files import replacing

LOG = logging.getLogger(__name__)
PATCH, CHANNELS = 8, 16
RAW = 0.3  # of the latents' scale, between encoder and decoder: TAESD's 3 · tanh(z / 3) is nearly linear there
HELD_OUT_GROUPS = 100  # at the end of the pool
DECODER_NOISE = 0.05  # standard deviation: what a flow model makes is not exactly a latent


def principal_components(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """W ``[192, 16]`` and c ``[16]`` such that z = p W + c for patches p in (y, x, colour) order, of unit mean variance."""
    patches = _patches(pictures).flatten(0, 2).double()
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    deviation, vectors = values.flip(0)[:CHANNELS].sqrt(), vectors.flip(1)[:, :CHANNELS]
    vectors = vectors * vectors.sum(0).sign()
    matrix = vectors / deviation.sqrt() / deviation.mean().sqrt()
    return matrix.float(), -(mean @ matrix).float()


def _patches(pictures: Tensor) -> Tensor:
    n, height, width = pictures.shape[:3]
    grid = pictures.reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return grid.transpose(2, 3).reshape(n, height // PATCH, width // PATCH, -1)


@torch.no_grad()
def set_encoder(model: Autoencoder, matrix: Tensor, bias: Tensor) -> None:
    """Writes z = RAW · (p W + c) into the encoder's convolutions, exactly.

    Two strided convolutions move 2 × 2 pixels into channels, a third one does so and multiplies; z and −z leave it side by
    side, so that the ReLU behind it loses nothing, and the last convolution takes their difference.
    """
    encoder = model.taesd_encoder
    for p in encoder.parameters():
        p.zero_()
    matrix = matrix.view(2, 2, 2, 2, 2, 2, 3, CHANNELS)  # y in fours, twos, ones; x the same; colour; component
    first, second, third, last = encoder[2].weight, encoder[6].weight, encoder[10].weight, encoder[14]
    for colour in range(3):
        encoder[0].weight[colour, colour, 1, 1] = 1
    for y in range(2):
        for x in range(2):
            for i in range(3):
                first[(y * 2 + x) * 3 + i, i, y + 1, x + 1] = 1
            for i in range(12):
                second[(y * 2 + x) * 12 + i, i, y + 1, x + 1] = 1
            for i in range(48):  # a channel is (y2, x2, y1, x1, colour)
                y2, x2, y1, x1, colour = np.unravel_index(i, (2, 2, 2, 2, 3))
                row = matrix[y, y2, y1, x, x2, x1, colour]
                third[:CHANNELS, i, y + 1, x + 1], third[CHANNELS : 2 * CHANNELS, i, y + 1, x + 1] = row, -row
    for k in range(CHANNELS):
        last.weight[k, k, 1, 1], last.weight[k, CHANNELS + k, 1, 1] = RAW, -RAW
    last.bias.copy_(RAW * bias)
    model.vae_scale.fill_(FLUX_SCALE * RAW)
    model.vae_shift.fill_(FLUX_SHIFT)


@torch.no_grad()
def _start_decoder(decoder: nn.Sequential, matrix: Tensor, bias: Tensor) -> None:
    """He's weights, blocks that do nothing yet, and each patch's mean colour straight through to the picture."""
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in decoder:
        if hasattr(layer, "conv"):
            nn.init.zeros_(layer.conv[4].weight)
    inverse = torch.linalg.pinv(matrix.double())  # [16, 192]
    colour = inverse.view(CHANNELS, PATCH * PATCH, 3).mean(1).float()
    entry, out = decoder[1], decoder[19]
    entry.weight[:3] = 0
    entry.weight[:3, :, 1, 1] = colour.T / RAW
    entry.bias[:3] = -(bias @ colour)
    for i in (7, 12, 17):
        decoder[i].weight[:3] = 0
    out.weight.mul_(0.1)
    out.weight[:, :3] = 0
    for k in range(3):
        for layer in (decoder[7], decoder[12], decoder[17], out):
            layer.weight[k, k, 1, 1] = 1


class ConvMuon:
    """Muon for convolution kernels, seen as matrices ``[out, in · 9]``: momentum, made orthogonal by Newton–Schulz.

    torch.optim.Muon takes matrices only. Source: K. Jordan, https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(self, kernels: list[Tensor], momentum: float = 0.95):
        self.kernels, self.momentum = kernels, momentum
        self.buffers = [torch.zeros_like(p) for p in kernels]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for p, buffer in zip(self.kernels, self.buffers):
            buffer.mul_(self.momentum).add_(p.grad)
            x = p.grad.add(buffer, alpha=self.momentum).flatten(1)
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
            p.sub_(x.view_as(p), alpha=lr)
            p.grad = None


def crops(pool: np.ndarray, rng: np.random.Generator, count: int, size: int) -> Tensor:
    """Pictures ``[count, size, size, 3]`` cut on the patches' grid, some with their colours exchanged or mirrored."""
    out = []
    for _ in range(count):
        y, x = rng.integers(0, (pool.shape[2] - size) // PATCH + 1, 2) * PATCH
        picture = pool[
            rng.integers(len(pool) - HELD_OUT_GROUPS), rng.integers(pool.shape[1]), y : y + size, x : x + size
        ]
        if rng.random() < 0.3:
            picture = picture[..., rng.permutation(3)]
        if rng.random() < 0.5:
            picture = picture[:, ::-1]
        out.append(picture)
    return torch.from_numpy(np.stack(out)).float().div_(255)


def train_decoder(model: Autoencoder, matrix: Tensor, bias: Tensor, pool: np.ndarray, steps: int) -> None:
    """L1 + 2 · MSE + half the L1 of the differences between neighbours, on crops of 64 pixels, at last on whole pictures.

    The decoder is left with the averaged weights.
    """
    torch.manual_seed(0)
    decoder = model.taesd_decoder.to(memory_format=torch.channels_last)
    _start_decoder(decoder, matrix, bias)
    kernels = [p for p in decoder.parameters() if p.ndim == 4 and min(p.shape[:2]) > CHANNELS]
    muon, known = ConvMuon(kernels), {id(p) for p in kernels}
    adam = torch.optim.AdamW(
        [p for p in decoder.parameters() if id(p) not in known], betas=(0.9, 0.98), weight_decay=0.0
    )
    average = {name: value.clone() for name, value in decoder.state_dict().items()}
    for step in range(steps):
        rng, whole = np.random.default_rng(step), step > 0.9 * steps
        pictures = crops(pool, rng, 2 if whole else 8, 128 if whole else 64)
        with torch.no_grad():
            z = model.taesd_encoder(pictures.movedim(-1, 1))
            z = z + DECODER_NOISE * RAW * torch.randn(z.shape, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            out = decoder(z.contiguous(memory_format=torch.channels_last))
        error = out.float() - pictures.movedim(-1, 1)
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 0.5 * edges
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        late = max(0.0, (step / steps - 0.4) / 0.6)
        lr = min(1, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * late)))
        adam.param_groups[0]["lr"] = 1e-3 * lr
        adam.step()
        muon.step(0.02 * lr)
        with torch.no_grad():
            for name, value in decoder.state_dict().items():
                average[name].lerp_(value, 1 - min(0.995, (2 + step) / (11 + step)))
        if (step + 1) % 50 == 0:
            LOG.info(
                "decoder: step %d, loss %.4f, %.2f dB",
                step + 1,
                loss.item(),
                -10 * error.square().mean().log10().item(),
            )

    decoder.load_state_dict(average)


@torch.no_grad()
def round_trip(model: Autoencoder, pool: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over held-out scenes, mean of pictures."""
    pictures = torch.from_numpy(np.ascontiguousarray(pool[-HELD_OUT_GROUPS:, 1])).float().div_(255)
    errors = [(model.decode(model.encode(x[None])) - x).square().mean().item() for x in pictures]
    return float(np.mean([-10 * math.log10(e) for e in errors]))


def save(model: Autoencoder, path: Path) -> None:
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary)
