"""VAEDecoderEncoder: the decoder's own features, and nothing of the decoder beyond them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from editloss_core.demo.model import Autoencoder
from editloss_core.encoders import VAEDecoderEncoder, VAEEncoder
from editloss_core.encoders.decoder_features import OUTLIER, decoder_steps, patterns
from editloss_core.hashing import hash_module

KL = {
    "latent_channels": 4, "block_out_channels": [8, 8, 16, 16], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
TINY = {
    "encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4, "latent_channels": 4,
    "num_encoder_blocks": [1] * 4, "num_decoder_blocks": [2, 1, 1, 1],
}  # fmt: skip


def taesd():
    """The demo's class, its last modules of each depth, and the modules after them."""
    ae = Autoencoder(whole=True)
    decoder = ae.taesd_decoder

    def decode(z):
        return decoder((z - ae.vae_shift) * ae.vae_scale)

    return ae.encode, decoder, decode, [decoder[i] for i in (7, 12, 17, 18)], [decoder[i] for i in (8, 13, 18, 19)]


def tiny():
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderTiny(**TINY)
    layers = vae.decoder.layers
    ends = [i + 1 for i, module in enumerate(layers) if isinstance(module, nn.Upsample)] + [len(layers) - 2]
    return vae.encode, vae.decoder, vae.decode, [layers[i] for i in ends], [layers[i + 1] for i in ends]


def kl(**options):
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(**KL, **options)
    vae.enable_gradient_checkpointing()
    ups = vae.decoder.up_blocks
    after = [*(up.resnets[0] for up in ups[1:]), vae.decoder.conv_norm_out]
    return vae.encode, vae.decoder, vae.decode, list(ups), after


LAYOUTS = {
    "TAESD": taesd,
    "AutoencoderTiny": tiny,
    "AutoencoderKL": kl,
    "AutoencoderKL without attention and quantisation": lambda: kl(
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_are_those_of_hooks_on_the_whole_decoder(layout):
    torch.manual_seed(0)
    _, decoder, decode, last, after = LAYOUTS[layout]()
    channels = 16 if layout == "TAESD" else 4
    z = torch.randn(2, channels, 4, 6)
    seen, ran = [], []
    for module in last:
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        decode(z)
    expected = list(seen)
    assert [x.shape[2] for x in expected] == [8, 16, 32, 32]
    for depth, module in enumerate(after, 1):
        module.register_forward_hook(lambda module, args, output, depth=depth: ran.append(depth))
    decoder.requires_grad_(False)
    vae = VAEEncoder(lambda pixels: torch.randn(2, channels, 4, 4), "vae", "f", 8)
    for depths in ((1,), (2,), (1, 3), (1, 2, 3, 4)):
        encoder = VAEDecoderEncoder(vae, decoder, decode, "d", "f", depths=depths)
        ran.clear()
        found = encoder.features(z.requires_grad_())
        assert ran == list(range(1, depths[-1])), "it went on beyond the deepest, or stopped before"
        for depth, x in zip(depths, found, strict=True):
            torch.testing.assert_close(x, expected[depth - 1])
        made = encoder.from_latents(z)
        side = 2 ** depths[0]
        assert made.shape == (2, 4 * side, 6 * side, sum(x.shape[1] for x in found))
        assert tuple(made.shape[1:3]) == encoder.grid(32, 48)
        (gradient,) = torch.autograd.grad(made.square().sum(), z)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
    with pytest.raises(ValueError, match="depths: this decoder has 1 to 4, got 5"):
        VAEDecoderEncoder(vae, decoder, decode, "d", "f", depths=(1, 5))


def test_of_diffusers_autoencoder_with_its_own_latents():
    """As ``kind = "vae_decoder"`` of a training config makes it."""
    diffusers = pytest.importorskip("diffusers")
    from editloss_core.models.autoencoder import vae_decoder_encoder, vae_encoder

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**KL, scaling_factor=0.3611, shift_factor=0.1159).eval().requires_grad_(False)
    encoder, of_model = vae_decoder_encoder(vae, (1, 2)), vae_encoder(vae)
    pictures = torch.rand(1, 32, 48, 3)
    z = of_model.unscaled(of_model.latents(pictures))
    assert encoder.info.name == "vae-decoder/autoencoderkl-4ch/1+2/grid" and encoder.reads_latents(
        of_model.latent_space, 32, 48
    )
    torch.testing.assert_close(encoder.from_latents(z), encoder(pictures), rtol=1e-3, atol=1e-4)
    block = vae.decoder.up_blocks[0](vae.decoder.mid_block(vae.decoder.conv_in(vae.post_quant_conv(z))))
    torch.testing.assert_close(encoder.features(z)[0], block)


def test_standardised_by_hand(decoder_features):
    encoder = decoder_features.build(depths=(1, 2))
    vae, decoder = decoder_features.ae, decoder_features.decoder
    z = torch.randn(2, 4, 5, 6)
    reference = vae(2 * patterns() - 1)
    expected = []
    for upto, finer in ((6, 1), (9, 2)):
        part = nn.Sequential(*list(decoder)[:upto])
        known, x = part(reference), part(z)
        deviation, mean = torch.std_mean(known, (0, 2, 3), keepdim=True)
        assert (deviation > 0.1 * deviation.square().mean().sqrt()).all()
        x = ((x - mean) / deviation).clamp(-OUTLIER, OUTLIER)
        x = x * (1 / finer / 1.5) ** 0.5 / (x.square().sum(1, keepdim=True) + 0.01 * 8).sqrt()
        expected.append(nn.functional.avg_pool2d(x, finer))
    torch.testing.assert_close(encoder.from_latents(z), torch.cat(expected, 1).movedim(1, -1), rtol=1e-4, atol=1e-5)
    first = decoder_features.build()(patterns().movedim(1, -1)).norm(dim=-1)
    assert first.max() <= 1 and first.median() > 0.98, "a token's length over the patterns"


def test_an_outlier_counts_as_ten_deviations_and_has_no_gradient(decoder_features):
    encoder, z = decoder_features.build(), decoder_features.ae(2 * patterns()[:1] - 1)
    encoder.layers()
    features = encoder.features(z)[0].clone()
    features[0, 3, 1, 2] = 1e6
    features.requires_grad_()
    encoder.features = lambda z: [features]
    made = encoder.from_latents(z)
    known = encoder.layers()[0]
    there = ((features - known.mean) / known.deviation)[0, :, 1, 2].detach()
    there[3] = OUTLIER
    torch.testing.assert_close(made[0, 1, 2].detach(), there / (there.square().sum() + 0.08).sqrt())
    (gradient,) = torch.autograd.grad((made * torch.randn(made.shape)).sum(), features)
    assert gradient[0, 3, 1, 2] == 0 and (gradient == 0).sum() == 1


def test_channels_that_never_move_are_not_blown_up(decoder_features):
    with torch.no_grad():
        decoder_features.decoder[5].weight[0] = 0.0
    encoder = decoder_features.build()
    deviation = encoder.layers()[0].deviation.flatten()
    assert deviation[0].item() == pytest.approx(0.1 * (deviation[1:].square().sum() / 8).sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_latents_have_gradients(decoder_features, value):
    z = torch.full((1, 4, 4, 4), value, requires_grad=True)
    made = decoder_features.build(depths=(1, 2)).from_latents(z)
    (gradient,) = torch.autograd.grad((made * torch.randn(made.shape)).sum(), z)
    assert gradient.isfinite().all() and (gradient != 0).all()


def test_finite_differences_by_latents(decoder_features):
    encoder = decoder_features.build(depths=(1, 3))
    encoder.layers()
    decoder_features.decoder.double()
    z = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(encoder.from_latents, z)


def test_latents_in_place_of_pictures(decoder_features):
    vae, pictures = decoder_features.vae, torch.rand(2, 32, 48, 3)
    z = vae.unscaled(vae.latents(pictures))
    encoder = decoder_features.build(depths=(1, 2))
    assert encoder.reads_latents(vae.latent_space, 32, 48) and not encoder.reads_latents("other", 32, 48)
    torch.testing.assert_close(encoder.from_latents(z), encoder(pictures))
    fixed = decoder_features.build(VAEEncoder(vae.encode, "v", "f", 8, image_size=32))
    assert not fixed.reads_latents(fixed.vae.latent_space, 64, 64) and fixed(pictures).shape == (2, 8, 8, 8)
    with pytest.raises(ValueError, match="^latents: expected 4×4, got 4×6"):
        fixed.from_latents(z)


def test_the_name_and_what_changes_the_fingerprint(decoder_features):
    build, vae = decoder_features.build, decoder_features.vae
    encoders = [build(), build(depths=(2,)), build(depths=(1, 2)), build(VAEEncoder(vae.encode, "v", "other", 8))]
    encoders.append(build(VAEEncoder(vae.encode, "v", hash_module(vae.encode), 8, image_size=32)))
    assert len({e.info.fingerprint for e in encoders}) == 5 and build().info == encoders[0].info
    assert encoders[2].info.name == "vae-decoder/tiny/1+2/grid"
    with torch.no_grad():
        decoder_features.decoder[4 + 1].weight += 1e-3
    assert build().info.fingerprint != encoders[0].info.fingerprint
    # The scale between the autoencoder and a diffusion model plays no part: the decoder takes its own latents.
    plain = VAEEncoder(vae.encode, "v", hash_module(vae.encode), 8)
    assert build(plain).info.fingerprint == build().info.fingerprint


@pytest.mark.parametrize("bad", [(), (0,), (2, 1), (1, 1), (1.0,), (True,), "1"])
def test_wrong_depths_are_named(decoder_features, bad):
    with pytest.raises(ValueError, match="^depths: expected ascending whole numbers from 1"):
        decoder_features.build(depths=bad)


def test_other_decoders_are_named():
    for module, expected in (
        (nn.Linear(1, 1), "layout of TAESD or of Stable Diffusion's autoencoder, got Linear"),
        (nn.Sequential(nn.ReLU()), "a convolution and blocks, as TAESD has them, got ReLU"),
    ):
        with pytest.raises(ValueError, match=f"^decoder: expected .*{expected}"):
            decoder_steps(module)
