"""A whole training run that is real but tiny: pictures, autoencoder, picture encoder, denoiser, all in plain torch."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from editloss_core.encoders.base import EncoderInfo, PixelEncoder, Preprocess, freeze
from editloss_core.encoders.vae import VAEEncoder
from editloss_core.hashing import hash_module
from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.models.kontext import KONTEXT
from editloss_core.negatives import OverlaySettings
from editloss_core.objective import EditObjective, LossTerm
from editloss_core.pairs import PairSet
from editloss_core.training.flow import Timesteps
from editloss_core.training.host import Host
from editloss_core.training.prepare import prepare
from editloss_core.training.settings import TrainingSettings
from editloss_core.training.trainer import Trainer

CPU = torch.device("cpu")
DOWNSCALE, CHANNELS = 8, 12
LATENTS, PATCHES = "vae/blocks/grid", "patches/grid"  # names of the encoders


def pictures(count, height=32, width=32, seed=0):
    """before, after ``[B, H, W, 3]`` and masks: a bar becomes a square of another colour before a patchwork."""
    g = torch.Generator().manual_seed(seed)
    patchwork = 0.3 + 0.4 * torch.rand(count, height // 4, width // 4, 3, generator=g)
    before = patchwork.repeat_interleave(4, 1).repeat_interleave(4, 2)
    after, mask = before.clone(), torch.zeros(count, height, width)
    for i in range(count):
        top, left = (8 * int(torch.randint((side - 16) // 8 + 1, (), generator=g)) for side in (height, width))
        colours = torch.rand(2, 3, generator=g).round()
        before[i, top : top + 16, left + 4 : left + 8] = colours[0]
        after[i, top : top + 16, left : left + 16] = colours[1] * 0.8 + 0.1
        mask[i, top : top + 16, left : left + 16] = 1.0
    return before, after, mask


class Blocks(nn.Module):
    """Convolutional autoencoder onto four flat or antisymmetric patterns per 8×8 block and colour.

    What is constant over 4×4 pixels comes back exactly.
    """

    def __init__(self):
        super().__init__()
        half = torch.cat([torch.ones(4), -torch.ones(4)])
        lines = torch.stack([torch.ones(8), half])
        patterns = torch.einsum("ay,bx->abyx", lines, lines).reshape(4, 8, 8)
        weight = torch.zeros(CHANNELS, 3, 8, 8)
        for colour in range(3):
            weight[4 * colour : 4 * colour + 4, colour] = patterns
        self.encoder = nn.Conv2d(3, CHANNELS, 8, stride=8, bias=False)
        self.decoder = nn.ConvTranspose2d(CHANNELS, 3, 8, stride=8, bias=False)
        with torch.no_grad():
            self.encoder.weight.copy_(weight / 64)
            self.decoder.weight.copy_(weight)

    def forward(self, pixels):
        return self.encoder(pixels)

    def decode(self, z):
        """[B, C, h, w] → [B, H, W, 3] in 0…1."""
        return (0.5 + 0.5 * self.decoder(z)).movedim(1, -1)


class WideDecoder(nn.Module):
    """A decoder with seams: convolutions before and after each doubling, which see less than two latents around."""

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        widths = (CHANNELS, 8, 8, 8, 3)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.tanh = nn.Tanh()
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g) / math.sqrt(p[0].numel() if p.ndim > 1 else 10)

    def forward(self, z):
        for i, layer in enumerate(self.layers):
            z = layer(F.interpolate(z, scale_factor=2.0) if i else z)
            z = self.tanh(z) if i < 3 else z
        return torch.sigmoid(z).movedim(1, -1)


class Patches(PixelEncoder):
    """A convolution over 8×8 patches and a tanh."""

    def __init__(self, seed=0):
        preprocess = Preprocess(0, 0, multiple=8)
        g = torch.Generator().manual_seed(seed)
        self.net = nn.Conv2d(3, 16, 8, stride=8)
        for p in self.net.parameters():
            p.data = torch.randn(p.shape, generator=g) / (8 if p.ndim > 1 else 2)
        freeze(self.net, CPU)
        info = EncoderInfo(PATCHES, preprocess.describe(), hash_module(self.net, preprocess.describe()), "grid")
        super().__init__(info, preprocess, CPU)
        self.calls = 0

    def features(self, pixels):
        self.calls += 1
        return torch.tanh(self.net(pixels))


class Net(nn.Module):
    """Per latent: x_t, the reference, their means, t and the conditioning → velocity."""

    def __init__(self, width=32, blocks=2):
        super().__init__()
        self.embed = nn.Linear(4 * CHANNELS + 4, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.out = nn.Linear(width, CHANNELS)

    def forward(self, x, checkpointing):
        h = self.embed(x)
        for block in self.blocks:

            def run(h, block=block):
                return h + F.silu(block(h))

            h = checkpoint(run, h, use_reentrant=False) if checkpointing and torch.is_grad_enabled() else run(h)
        return self.out(h)


class SmallDenoiser:
    """The protocol of models.base.Denoiser around a :class:`Net` with fixed random weights.

    ``conditioning``: tensors ``[2]``.
    """

    edit_model = KONTEXT  # whose schedule it is sampled on

    def __init__(self, width=32, checkpointing=False, seed=0):
        self.module, self.device, self.checkpointing = Net(width), CPU, checkpointing
        g = torch.Generator().manual_seed(seed)
        for p in self.module.parameters():
            p.data = torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1)
        freeze(self.module, CPU)

    def __call__(self, x_t, t, references, conditioning):
        around = [z.mean((2, 3), keepdim=True).expand_as(z) for z in (x_t, references[0])]
        flat = torch.stack([torch.stack([level, 1 - level]) for level in t]), torch.stack(list(conditioning))
        flat = [v[:, :, None, None].expand(-1, -1, *x_t.shape[2:]) for v in flat]
        x = torch.cat([x_t, references[0], *around, *flat], 1).movedim(1, -1)
        return self.module(x, self.checkpointing).movedim(-1, 1)


class Recording(SmallDenoiser):
    """Keeps what went in and came out: (x_t, t, references, conditioning, v̂) per call."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls_made = []

    def __call__(self, x_t, t, references, conditioning):
        v = super().__call__(x_t, t, references, conditioning)
        self.calls_made.append((x_t, t, references, conditioning, v))
        return v


@functools.cache
def parts():
    """(autoencoder, VAEEncoder, picture encoder), which never change."""
    ae = freeze(Blocks(), CPU)
    return ae, VAEEncoder(ae, "vae/blocks", hash_module(ae), DOWNSCALE), Patches()


def encoders():
    _, vae, patches = parts()
    return {vae.info.name: vae, patches.info.name: patches}


@functools.cache
def prepared_pairs(count=4, sizes=((32, 32),), seed=0, crop=0, names="pair"):
    """``count`` pairs of each size, prepared for both encoders."""
    sets = []
    for k, (height, width) in enumerate(sizes):
        before, after, mask = pictures(count, height, width, seed + k)
        called = [f"{names} {k * count + i}" for i in range(count)]
        sets.append(PairSet.from_images(before, after, mask, "make it a square", names=called, min_size=16))
    whole = replace(sets[0], **{f: sum((getattr(s, f) for s in sets), ()) for f in ("pairs", "sizes", "contents")})
    _, vae, _ = parts()
    return prepare(whole, vae, encoders(), crop=crop, overlay=OverlaySettings(kinds=("blend",)))


NO_EDIT = LossTerm("no_edit_identity", LATENTS, name="no edit", weight=1.0, margin=0.25)
GEOMETRY = LossTerm("geometry_match", PATCHES, name="geometry", weight=0.5, dist="cos")
OVERLAY = LossTerm("overlay_avoidance", PATCHES, name="overlay", weight=0.7, margin=0.25)
ALL = EditObjective((NO_EDIT, GEOMETRY, OVERLAY))


def conditioning(count):
    return [torch.randn(2, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def settings(**changes):
    chosen = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "gradients_every": 2, "validate_every": 0,
              "checkpoint_every": 2, "preview_steps": 0, "timesteps": Timesteps("uniform", minimum=0.05), "pushes_t_max": 1.0,
              "self_check": False}  # fmt: skip
    return TrainingSettings(**{**chosen, **changes})


def trainer(
    folder=None, *, prepared=None, objective=ALL, denoiser=None, decode=None, validation=None, lora=None, host=None,
    width=32, checkpointing=False, resolution=None, with_encoders=None, accelerator=None, cache=None, dropped=(), **changes,
):  # fmt: skip
    """A trainer of the small parts; ``changes`` go to the settings, ``lora`` to those of the LoRA."""
    prepared = prepared or prepared_pairs()
    denoiser = denoiser or SmallDenoiser(width, checkpointing)
    made = LoRA(denoiser.module, LoRASettings(**{"rank": 4, "alpha": 4.0, "layers": "all", **(lora or {})}), seed=0)
    return Trainer(
        denoiser, made, prepared, conditioning(len(prepared)), settings(**changes), objective=objective,
        encoders=encoders() if with_encoders is None else with_encoders, decode=decode or parts()[0].decode,
        validation=validation, validation_conditioning=conditioning(len(validation)) if validation else (),
        folder=folder, resolution=resolution, checkpointing=checkpointing, host=host,
        accelerator=accelerator, cache=cache, dropped=dropped,
    )  # fmt: skip


class StopAfter(Host):
    """Raises KeyboardInterrupt after a step, or at one of the questions whether to go on during the step after it."""

    def __init__(self, step, checks=0):
        self.step, self.checks, self.counting = step, checks, False

    def on_step(self, log, total):
        if log.step == self.step:
            if not self.checks:
                raise KeyboardInterrupt
            self.counting = True

    def check(self):
        if self.counting:
            self.checks -= 1
            if not self.checks:
                raise KeyboardInterrupt


def weights(lora):
    return {name: p.detach().clone() for name, p in lora.named_parameters()}


def equal(a, b):
    """Whether nested states are the same, bit for bit, types included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or a != a and b != b)


def indices_of(made, conditioning):
    """The pairs that a call of the denoiser was about."""
    return [i for c in conditioning for i, own in enumerate(made.conditioning) if own is c]


def without_times(log):
    """Steps and validations of a log, without the seconds that they took."""
    return [replace(s, seconds=0.0) for s in log.steps], log.validations
