"""What every encoder promises, whatever its family."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from small_networks import CLIPS, DINO2, TIMM_KWARGS

from editloss_core import encoders
from editloss_core.encoders import Encoder, EncoderInfo, OpenCLIPEncoder, TimmEncoder, VAEDecoderEncoder

HERE = Path(__file__).resolve().parent
CASES = [
    *[f"{name}:{output}" for name in (*CLIPS, *TIMM_KWARGS) for output in ("global", "grid")],
    "tiny-vit:tokens",
    f"{DINO2}:tokens",
    "vae:grid",
    "diffusion:tokens",
    "diffusion:grid",
    "vae-decoder 1:grid",
    "vae-decoder 1+2:grid",
]


def test_every_encoder_is_tried():
    """By the fixture below, which makes some itself and takes the others of conftest.py."""
    made = "".join((HERE / name).read_text("utf-8") for name in (Path(__file__).name, "conftest.py"))
    exported = {name: getattr(encoders, name) for name in encoders.__all__}
    known = [name for name, what in exported.items() if isinstance(what, type) and issubclass(what, Encoder)]
    assert len(known) > 4 and [name for name in known if name != "Encoder" and f"{name}(" not in made] == []


@pytest.fixture(params=CASES)
def encoder(request, clips, timms, diffusion, decoder_features):
    name, output = request.param.split(":")
    # As in a ComfyUI node; the loader has to leave inference mode by itself.
    with torch.inference_mode():
        if name in CLIPS:
            return OpenCLIPEncoder(name, clips[name].file, output)
        if name in TIMM_KWARGS:
            size = (42, 56) if name == DINO2 else (64, 32)
            return TimmEncoder(name, timms[name].file, output, image_size=size, model_kwargs=timms[name].kwargs)
        if name.startswith("vae-decoder"):
            return decoder_features.build(depths=[int(depth) for depth in name.split()[1].split("+")])
    return diffusion.vae if name == "vae" else diffusion.build(output=output)


def test_shapes_values_and_grid(encoder):
    for height, width in ((40, 64), (37, 51)):
        grid = encoder.grid(height, width)  # before the picture was seen
        x = encoder(torch.rand(2, height, width, 3))
        assert encoder.grid(height, width) == grid
        assert x.dtype == torch.float32 and torch.isfinite(x).all() and x.std() > 1e-4
        if encoder.info.output == "global":
            assert grid is None and x.ndim == 2
        elif encoder.info.output == "tokens":
            assert x.ndim == 3 and x.shape[1] == grid[0] * grid[1]
        else:
            assert x.ndim == 4 and tuple(x.shape[1:3]) == grid
        assert len(x) == 2


def test_embed_equals_call_and_batches_do_not_mix(encoder):
    pictures = torch.rand(3, 40, 48, 3)
    seen = []
    embedded = encoder.embed(pictures, batch_size=2, progress=lambda *done: seen.append(done))
    assert seen == [(2, 3), (3, 3)] and not embedded.requires_grad
    torch.testing.assert_close(embedded, encoder(pictures), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedded[1:2], encoder(pictures[1:2]), rtol=1e-4, atol=1e-5)


def test_gradient_reaches_the_picture_and_nothing_else(encoder):
    pictures = torch.rand(1, 40, 48, 3, requires_grad=True)
    encoder(pictures).square().mean().backward()
    assert torch.isfinite(pictures.grad).all() and pictures.grad.abs().sum() > 0
    # Every region of the picture counts, borders too.
    assert (torch.nn.functional.avg_pool2d(pictures.grad.abs().movedim(-1, 1), 8) > 0).float().mean() > 0.5


def test_half_precision_pictures_and_pictures_from_a_node(encoder):
    with torch.inference_mode():
        from_node = torch.rand(1, 40, 48, 3)
        in_node = encoder.embed(from_node)
    torch.testing.assert_close(encoder(from_node), in_node, rtol=1e-4, atol=1e-5)
    assert encoder(from_node.clone().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    "bad",
    [
        torch.rand(40, 48, 3),
        torch.rand(1, 3, 40, 48),
        torch.rand(0, 40, 48, 3),
        torch.zeros(1, 40, 48, 3, dtype=torch.uint8),
    ],
    ids=["3d", "nchw", "empty", "uint8"],
)
def test_wrong_pictures_are_named(diffusion, bad):
    with pytest.raises(ValueError, match="images: expected"):
        diffusion.vae(bad)


def test_info_survives_json(encoder):
    assert EncoderInfo(**json.loads(json.dumps(asdict(encoder.info)))) == encoder.info
    assert len(encoder.info.fingerprint) == 64 and encoder.info.output in encoder.info.name


def _double(encoder):
    if isinstance(encoder, VAEDecoderEncoder):
        encoder.layers()  # of the network as it is
    for part in ("network", "encode", "decode", "predict"):
        if hasattr(encoder, part):
            getattr(encoder, part).double()
    if hasattr(encoder, "vae"):
        encoder.vae.encode.double()
    return encoder


def test_gradient_agrees_with_finite_differences(encoder, pictures):
    """In float64 along a random direction; only relu nets have kinks, which a step this small rarely meets."""
    encoder = _double(encoder)
    generator = torch.Generator().manual_seed(1)
    x = pictures[:1].double().requires_grad_()
    along = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    y = encoder(x)
    probe = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((y * probe).sum(), x)
    step = 1e-8
    with torch.no_grad():
        difference = ((encoder(x + step * along) - encoder(x - step * along)) * probe).sum() / (2 * step)
    assert abs((gradient * along).sum() - difference) <= 1e-4 * difference.abs() + 1e-6


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_black_and_white_have_gradients_too(encoder, value):
    """clamp has no gradient at its bounds, and product photos stand on white."""
    x = torch.full((1, 44, 52, 3), value, requires_grad=True)
    (encoder(x) * torch.randn(encoder(x).shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).float().mean() > 0.5


@pytest.mark.parametrize("bad", [255.0, -1.0, float("nan")])
def test_pictures_out_of_range_are_refused(diffusion, bad):
    with pytest.raises(ValueError, match="images: expected values in 0…1, got values from"):
        diffusion.vae.embed(torch.full((1, 16, 16, 3), bad))
