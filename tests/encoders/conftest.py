"""Small networks of the real classes, saved as files and loaded as a user's files are; the network is cut off."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parents[1] / "workflows"):  # the modules beside this file; lite0
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

VIT, DINO2, DINO3 = "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"
SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}
TIMM_KWARGS = {VIT: SMALL, DINO2: SMALL, DINO3: SMALL, "test_resnet": {}, "test_efficientnet": {}, "test_convnext": {}}

_TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
_VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
# Every family of image towers that open_clip has, small.
CLIPS = {
    "tiny-vit": {"vision_cfg": _VIT},
    "tiny-coca": {"vision_cfg": {**_VIT, "attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2,
                                 "output_tokens": True}},
    "tiny-resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64}},
    "tiny-convnext": {"vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear",
                                     "image_size": 64}},
    "tiny-siglip": {"vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none",
                                   "image_size": 160}, "embed_dim": 64},
}


def register_clips(folder: Path) -> None:
    """Make CLIPS known to open_clip, as a user does with his own configurations."""
    import open_clip

    for name, config in CLIPS.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 32, "text_cfg": _TEXT, **config}))
        open_clip.add_model_config(folder / f"{name}.json")


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """No zeros and ones of a fresh network: every weight and statistic takes part, and outputs stay moderate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                noise = 0.1 * torch.randn(value.shape, generator=generator)
                value.add_(noise.abs() if name.endswith("running_var") else noise)
    return net.eval()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whatever asks for a server fails."""
    def refuse(*args, **kwargs):
        raise AssertionError(f"a network connection was tried: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """name → SimpleNamespace(model, file): whole CLIPs, text tower included, as files."""
    import open_clip

    folder = tmp_path_factory.mktemp("clips")
    register_clips(folder)
    found = {}
    for name in CLIPS:
        model = randomise(open_clip.create_model(name, pretrained=None))
        save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, folder / f"{name}.safetensors")
        found[name] = SimpleNamespace(model=model, file=folder / f"{name}.safetensors")
    return found


@pytest.fixture(scope="session")
def timms(tmp_path_factory):
    """name → SimpleNamespace(model, file, kwargs): networks with a classifier of ten classes, as files."""
    import timm

    folder = tmp_path_factory.mktemp("timm")
    found = {}
    for name, kwargs in TIMM_KWARGS.items():
        dynamic = {"dynamic_img_size": True} if name.startswith("vit") else {}
        model = randomise(timm.create_model(name, pretrained=False, num_classes=10, **kwargs, **dynamic))
        save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, folder / f"{name}.safetensors")
        found[name] = SimpleNamespace(model=model, file=folder / f"{name}.safetensors", kwargs=kwargs)
    return found


class TinyEncoder(nn.Sequential):
    """Shaped like TAESD's encoder: strided convolutions to latents, 8 pixels each."""

    def __init__(self, channels: int = 4):
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU(),
                         nn.Conv2d(8, channels, 3, 2, 1))


class TinyDiT(nn.Module):
    """Shaped like Flux where it matters here: patches of 2 × 2 latents, text tokens first, blocks that return pairs."""

    class Block(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.linear, self.runs = nn.Linear(width, width), 0

        def forward(self, image, text):
            self.runs += 1
            return image + torch.tanh(self.linear(image) + text.mean(1, keepdim=True)), text

    def __init__(self, channels: int = 4, width: int = 16):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, 2, 2)
        self.text = nn.Parameter(torch.randn(1, 3, width))
        self.blocks = nn.ModuleList(TinyDiT.Block(width) for _ in range(3))

    def forward(self, x, t):
        image = self.embed(nn.functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))).flatten(2).mT
        image, text = image + t.view(-1, 1, 1).to(image), self.text.to(image)
        for block in self.blocks:
            image, text = block(image, text)
        return image


@pytest.fixture
def diffusion():
    """A small VAE and diffusion model: SimpleNamespace(vae, model, build(**options) → DiffusionFeatureEncoder)."""
    from editloss_core.encoders import DiffusionFeatureEncoder, VAEEncoder
    from editloss_core.encoders.base import freeze, hash_module

    torch.manual_seed(0)
    cpu = torch.device("cpu")
    ae, dit = freeze(TinyEncoder(), cpu), freeze(TinyDiT(), cpu)
    vae = VAEEncoder(ae, "vae/tiny", hash_module(ae), 8, shift=0.1, scale=1.5)

    def build(**options):
        return DiffusionFeatureEncoder(vae, dit, dit.blocks[1], lambda pair: pair[0], "tiny/blocks.1",
                                       hash_module(dit), **{"patch": 2, **options})

    return SimpleNamespace(ae=ae, model=dit, vae=vae, build=build)


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """uint8 [120, 200, 3]: shading, hard edges, fine stripes and sensor noise, as in a photograph."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:120, 0:200] / 120.0
    picture = np.stack([0.5 + 0.4 * np.sin(3 * x + y), 0.3 + 0.5 * y, 0.6 - 0.3 * x * y], -1)
    picture[30:70, 40:90] = (0.9, 0.2, 0.1)
    picture[60:100, 120:180] *= 0.5 + 0.5 * np.sign(np.sin(40 * x[60:100, 120:180]))[..., None]
    picture += rng.normal(0, 0.02, picture.shape)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def assert_close_to_pil(ours: torch.Tensor, theirs: torch.Tensor, std: tuple[float, ...]) -> None:
    """Preprocessed pixels agree but for two habits of PIL: it rounds to 8 bits after each of its two passes, and it
    clips cubic overshoot after each. Measured on ``photo``: 0.3/255 on average, up to 6/255 beside hard black edges;
    with a clamp between two passes the largest would be 1.0/255, but gradients would stop there too."""
    difference = ((ours - theirs).abs() * 255 * torch.tensor(std).view(1, 3, 1, 1)).flatten().sort().values
    assert ours.shape == theirs.shape and difference.mean() < 0.5
    assert difference[int(0.995 * len(difference))] < 1.5 and difference[-1] < 8


@pytest.fixture
def pictures() -> torch.Tensor:
    """[2, 44, 52, 3] inside 0.2…0.8, where the clamp after a cubic resize never bites."""
    return 0.2 + 0.6 * torch.rand(2, 44, 52, 3, generator=torch.Generator().manual_seed(3))
