"""VAEEncoder and DiffusionFeatureEncoder on small models of the real shape."""

from __future__ import annotations

import pytest
import torch

from editloss_core.encoders import VAEEncoder
from editloss_core.encoders.base import EncoderInfo, PixelEncoder, Preprocess
from editloss_core.encoders.diffusion import run_to


def test_latents_by_hand(diffusion):
    pictures = torch.rand(2, 32, 48, 3)
    expected = (diffusion.ae(pictures.movedim(-1, 1) * 2 - 1) - 0.1) * 1.5
    torch.testing.assert_close(diffusion.vae(pictures), expected.movedim(1, -1))
    torch.testing.assert_close(diffusion.vae.latents(pictures), expected)


def test_sides_are_stretched_down_to_whole_latents(diffusion):
    pictures = torch.rand(1, 37, 51, 3)
    small = torch.nn.functional.interpolate(pictures.movedim(-1, 1), (32, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(diffusion.vae(pictures), diffusion.vae(small.clamp(0, 1).movedim(1, -1)))
    fixed = VAEEncoder(diffusion.ae, "vae", "f", 8, image_size=(40, 64))
    assert fixed(pictures).shape == (1, 5, 8, 4) and fixed.grid(37, 51) == (5, 8)


def test_shift_and_scale_per_channel(diffusion):
    plain = VAEEncoder(diffusion.ae, "vae", "f", 8)
    scaled = VAEEncoder(diffusion.ae, "vae", "f", 8, shift=[0.0, 1.0, 2.0, 3.0], scale=[1.0, 2.0, 3.0, 4.0])
    pictures = torch.rand(1, 32, 32, 3)
    expected = (plain(pictures) - torch.tensor([0.0, 1, 2, 3])) * torch.tensor([1.0, 2, 3, 4])
    torch.testing.assert_close(scaled(pictures), expected)
    assert plain.info.fingerprint != scaled.info.fingerprint


def test_vae_errors(diffusion):
    with pytest.raises(ValueError, match="downscale: expected at least 1"):
        VAEEncoder(diffusion.ae, "vae", "f", 0)
    with pytest.raises(ValueError, match="image_size: expected multiples of 8 pixels, got 36×36"):
        VAEEncoder(diffusion.ae, "vae", "f", 8, image_size=36)
    with pytest.raises(ValueError, match=r"expected latents \[1, C, 2, 2\], got \[1, 4, 4, 4\]"):
        VAEEncoder(diffusion.ae, "vae", "f", 16)(torch.rand(1, 32, 32, 3))
    with pytest.raises(ValueError, match="at least 8×8"):
        diffusion.vae(torch.rand(1, 7, 32, 3))


def test_features_by_hand(diffusion):
    encoder, model = diffusion.build(t=0.4, seed=5), diffusion.model
    pictures = torch.rand(2, 32, 48, 3)
    x0 = diffusion.vae.latents(pictures)
    epsilon = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(5))
    image = model.embed(0.6 * x0 + 0.4 * epsilon).flatten(2).mT + 0.4
    for block in model.blocks[:2]:
        image, _ = block(image, model.text)
    torch.testing.assert_close(encoder(pictures), image.unflatten(1, (2, 3)))


def test_the_same_noise_for_every_picture_of_a_size(diffusion):
    encoder = diffusion.build(t=0.9)
    same = torch.rand(1, 32, 32, 3).expand(3, -1, -1, -1)
    x = encoder(same)
    torch.testing.assert_close(x[0], x[2])
    torch.testing.assert_close(encoder(same[:1]), encoder(same[:1]), rtol=0, atol=0)
    assert not torch.allclose(x, diffusion.build(t=0.9, seed=1)(same))


def test_odd_latent_sides_are_padded_as_the_model_does(diffusion):
    encoder = diffusion.build()
    x = encoder(torch.rand(1, 40, 56, 3))
    assert x.shape[1:3] == encoder.grid(40, 56) == (3, 4)


def test_blocks_after_the_chosen_one_do_not_run(diffusion):
    encoder = diffusion.build()
    encoder(torch.rand(1, 32, 32, 3))
    assert [block.runs for block in diffusion.model.blocks] == [1, 1, 0]


def test_the_hook_goes_away_after_success_and_after_errors(diffusion):
    encoder, block = diffusion.build(), diffusion.model.blocks[1]
    encoder(torch.rand(1, 32, 32, 3))
    assert not block._forward_hooks
    encoder.predict = lambda x, t: 1 / 0
    with pytest.raises(ZeroDivisionError):
        encoder(torch.rand(1, 32, 32, 3))
    assert not block._forward_hooks
    encoder.predict = lambda x, t: diffusion.model.embed(x)
    with pytest.raises(ValueError, match="the model call ended without running it"):
        encoder(torch.rand(1, 32, 32, 3))
    assert not block._forward_hooks
    assert diffusion.model(torch.rand(1, 4, 4, 4), torch.rand(1)).shape == (1, 4, 16)  # the model runs to its end again


def test_a_model_that_catches_exceptions_cannot_stop_the_exit():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    reached = []

    def call():
        try:
            x = first(torch.ones(1, 2))
        except Exception:
            x = torch.zeros(1, 2)
        reached.append(second(x))

    assert torch.equal(run_to(first, call), first(torch.ones(1, 2))) and not reached


def test_one_exit_inside_another():
    outer, inner = torch.nn.Identity(), torch.nn.Linear(1, 1)
    one = torch.ones(1, 1)

    def call():
        run_to(inner, lambda: inner(one))
        outer(2 * one)

    assert run_to(outer, call) == 2
    # The block of the outer call runs within the inner one: the exit belongs to the outer call.
    assert run_to(outer, lambda: run_to(inner, lambda: inner(outer(3 * one)))) == 3
    assert not outer._forward_hooks and not inner._forward_hooks


def test_wrong_features_and_arguments_are_named(diffusion):
    with pytest.raises(ValueError, match="t: expected a noise level above 0 and below 1, got 1.0"):
        diffusion.build(t=1.0)
    with pytest.raises(ValueError, match="output: expected one of tokens, grid"):
        diffusion.build(output="global")
    with pytest.raises(ValueError, match="patch: expected at least 1"):
        diffusion.build(patch=0)
    with pytest.raises(ValueError, match=r"expected features \[1, 16, D\] .* got \[1, 4, 16\]; check select and patch"):
        diffusion.build(patch=1)(torch.rand(1, 32, 32, 3))


def test_maps_are_taken_as_they_are(diffusion):
    tokens, maps = diffusion.build(), diffusion.build()
    maps.select = lambda pair: pair[0].mT.unflatten(2, (2, 3))
    pictures = torch.rand(2, 32, 48, 3)
    torch.testing.assert_close(maps(pictures), tokens(pictures))


def test_latents_in_place_of_pictures(diffusion):
    """What an encoder makes of latents is what it makes of their pictures, and gradients reach the latents."""
    pictures = torch.rand(2, 32, 48, 3)
    z = diffusion.vae.unscaled(diffusion.vae.latents(pictures)).detach().requires_grad_()
    for encoder in (diffusion.vae, diffusion.build(), diffusion.build(output="tokens", t=0.6)):
        assert encoder.reads_latents(diffusion.vae.latent_space, 32, 48)
        made = encoder.from_latents(z)
        torch.testing.assert_close(made, encoder(pictures))
        assert torch.autograd.grad(made.square().sum(), z)[0].abs().sum() > 0


def test_the_latent_space_is_the_autoencoder_and_not_what_happens_around_it(diffusion):
    def space(fingerprint="f", downscale=8, **options):
        return VAEEncoder(diffusion.ae, "v", fingerprint, downscale, **options).latent_space

    assert space() == space(image_size=32) == VAEEncoder(diffusion.ae, "other name", "f", 8).latent_space
    assert space() == space(scale=2.0) == space(shift=[0.0, 2.0])
    assert len({space(), space("g"), space(downscale=16)}) == 3


def test_encoders_with_another_scale_read_the_same_latents(diffusion):
    """The VAE's own latents as an embedding, and a diffusion model's: one reads what the other made."""
    pictures = torch.rand(2, 32, 48, 3)
    own, model = VAEEncoder(diffusion.ae, "v", "f", 8), VAEEncoder(diffusion.ae, "v", "f", 8, shift=0.3, scale=2.0)
    assert own.reads_latents(model.latent_space, 32, 48)
    torch.testing.assert_close(own.from_latents(model.unscaled(model.latents(pictures))), own(pictures))


def test_an_encoder_of_one_size_reads_latents_of_that_size(diffusion):
    fixed = VAEEncoder(diffusion.ae, "v", "f", 8, image_size=(40, 64))
    assert fixed.reads_latents(fixed.latent_space, 40, 64) and not fixed.reads_latents(fixed.latent_space, 64, 64)
    assert not fixed.reads_latents(diffusion.vae.latent_space, 40, 64)
    assert not diffusion.vae.reads_latents(diffusion.vae.latent_space, 36, 64), "it would be stretched first"
    assert fixed.from_latents(torch.rand(1, 4, 5, 8)).shape == (1, 5, 8, 4)
    with pytest.raises(ValueError, match="^latents: expected 5×8, got 8×8"):
        fixed.from_latents(torch.rand(1, 4, 8, 8))
    for bad in (torch.rand(4, 5, 8), torch.zeros(1, 4, 5, 8, dtype=torch.int64), [1.0]):
        with pytest.raises(ValueError, match=r"^latents: expected floating \[B, C, h, w\], got "):
            diffusion.build().from_latents(bad)


def test_encoders_of_pictures_read_no_latents():
    class Mean(PixelEncoder):
        def features(self, pixels):
            return pixels.mean((2, 3))

    mean = Mean(EncoderInfo("m", "", "f", "global"), Preprocess(0, 0), torch.device("cpu"))
    assert not mean.reads_latents("", 32, 32)


def test_fingerprints(diffusion):
    known = {
        diffusion.build(**options).info.fingerprint
        for options in ({}, {"t": 0.5}, {"seed": 1}, {"output": "tokens"}, {"patch": 1})
    }
    assert len(known) == 5 and diffusion.build().info == diffusion.build().info
    vaes = {
        VAEEncoder(diffusion.ae, *args, **options).info.fingerprint
        for args, options in (
            (("v", "f", 8), {}),
            (("v", "g", 8), {}),
            (("v", "f", 8), {"image_size": 32}),
            (("v", "f", 8), {"scale": 2.0}),
            (("v", "f", 8), {"shift": 2.0}),
        )
    }
    assert len(vaes) == 5
