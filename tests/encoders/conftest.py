"""Small networks of the real classes, saved as files and loaded as a user's files are; the network is cut off."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # the modules beside this file
    sys.path.insert(0, str(HERE))

from small_networks import CLIPS, TIMM_KWARGS, TinyDecoder, TinyDiT, TinyEncoder, randomise, register_clips  # noqa: E402


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
        torch.manual_seed(0)  # the tests must not depend on which ones ran before
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
        torch.manual_seed(0)
        model = randomise(timm.create_model(name, pretrained=False, num_classes=10, **kwargs, **dynamic))
        save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, folder / f"{name}.safetensors")
        found[name] = SimpleNamespace(model=model, file=folder / f"{name}.safetensors", kwargs=kwargs)
    return found


@pytest.fixture
def diffusion():
    """A small VAE and diffusion model: SimpleNamespace(vae, model, build(**options) → DiffusionFeatureEncoder)."""
    from editloss_core.encoders import DiffusionFeatureEncoder, VAEEncoder
    from editloss_core.encoders.base import freeze
    from editloss_core.hashing import hash_module

    torch.manual_seed(0)
    cpu = torch.device("cpu")
    ae, dit = freeze(TinyEncoder(), cpu), freeze(TinyDiT(), cpu)
    vae = VAEEncoder(ae, "vae/tiny", hash_module(ae), 8, shift=0.1, scale=1.5)

    def build(**options):
        return DiffusionFeatureEncoder(
            vae, dit, dit.blocks[1], lambda pair: pair[0], "tiny/blocks.1", hash_module(dit), **{"patch": 2, **options}
        )

    return SimpleNamespace(ae=ae, model=dit, vae=vae, build=build)


@pytest.fixture
def decoder_features():
    """A small VAE: SimpleNamespace(ae, decoder, vae, build(**options) → VAEDecoderEncoder)."""
    from editloss_core.encoders import VAEDecoderEncoder, VAEEncoder
    from editloss_core.encoders.base import freeze
    from editloss_core.hashing import hash_module

    torch.manual_seed(0)
    cpu = torch.device("cpu")
    ae, decoder = freeze(TinyEncoder(), cpu), freeze(TinyDecoder(), cpu)
    vae = VAEEncoder(ae, "vae/tiny", hash_module(ae), 8, shift=0.1, scale=1.5)

    def build(vae=vae, **options):
        return VAEDecoderEncoder(vae, decoder, decoder, "vae-decoder/tiny", hash_module(decoder), **options)

    return SimpleNamespace(ae=ae, decoder=decoder, vae=vae, build=build)


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


@pytest.fixture
def pictures() -> torch.Tensor:
    """[2, 44, 52, 3] inside 0.2…0.8, where the clamp after a cubic resize never bites."""
    return 0.2 + 0.6 * torch.rand(2, 44, 52, 3, generator=torch.Generator().manual_seed(3))
