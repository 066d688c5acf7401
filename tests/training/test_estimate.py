"""The objective on x̂0: a decoded crop stands for the whole picture, and what it took is gone before the model's turn."""

from dataclasses import replace

import pytest
import torch
from small import (
    GEOMETRY,
    LATENTS,
    NO_EDIT,
    OVERLAY,
    PATCHES,
    Patches,
    SmallDenoiser,
    WideDecoder,
    encoders,
    prepared_pairs,
    trainer,
    weights,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from editloss_core.encoders.base import freeze
from editloss_core.objective import EditObjective
from editloss_core.training.estimate import HALO, EstimateObjective
from editloss_core.training.prepare import prepare

ON_PICTURES = EditObjective((GEOMETRY, OVERLAY))


class Seeing(Patches):
    """Remembers the pictures that it got."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, images):
        self.seen.append(images.detach().clone())
        return super().__call__(images)


def estimates(prepared, indices, seed=0):
    x0 = prepared.after(indices)
    return (x0 + 0.3 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()


@pytest.mark.parametrize("side, crop", [(96, 32), (96, 48), (64, 0), (48, 32)])
def test_a_decoded_crop_equals_the_crop_of_the_whole_decoded_picture(side, crop):
    """Pixels and gradients, for a decoder that sees less than the halo; crops differ from pair to pair."""
    prepared, decoder, sizes = (
        prepared_pairs(4, ((side, side),), crop=crop),
        freeze(WideDecoder(), torch.device("cpu")),
        [],
    )
    indices = [0, 1, 3]
    own = {**encoders(), PATCHES: Seeing()}
    x0 = estimates(prepared, indices)
    objective = EstimateObjective(ON_PICTURES, own, prepared, lambda z: sizes.append(z.shape) or decoder(z))
    report = objective(x0, indices, torch.full((3,), 0.5))
    (gradient,) = torch.autograd.grad(report.total, x0)

    whole = decoder(x0)
    cut = torch.stack([prepared.crops[i](whole[n].movedim(-1, 0)).movedim(0, -1) for n, i in enumerate(indices)])
    torch.testing.assert_close(own[PATCHES].seen[0], cut, atol=1e-6, rtol=1e-5)
    embeddings = prepared.embeddings(indices, [PATCHES]).with_embedding("pred", own[PATCHES].info, own[PATCHES](cut))
    expected = ON_PICTURES.evaluate(embeddings)
    torch.testing.assert_close(report.total, expected.total)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.total, x0)[0], atol=1e-6, rtol=1e-3)
    if crop:
        assert all(max(shape[2:]) <= min(crop // 8 + 2 * HALO, side // 8) for shape in sizes)
        assert len({c[:2] for c in prepared.crops}) > 1


def test_without_the_halo_it_would_not():
    """The test above can fail: this decoder's crops have seams."""
    prepared, decoder = prepared_pairs(4, ((96, 96),), crop=32), freeze(WideDecoder(), torch.device("cpu"))
    crop = next(c for c in prepared.crops if c.top and c.left)
    z = prepared.after([prepared.crops.index(crop)])
    alone = decoder(crop(z, 8)).movedim(-1, 1)
    assert (alone - crop(decoder(z).movedim(-1, 1))).abs().max() > 1e-3


def test_a_decoder_of_another_scale_is_refused():
    """A window of a picture that is twice as large is another window."""
    prepared = prepared_pairs(2)
    twice = lambda z: torch.zeros(len(z), 16 * z.shape[2], 16 * z.shape[3], 3) + z.mean()  # noqa: E731
    objective = EstimateObjective(ON_PICTURES, encoders(), prepared, twice)
    with pytest.raises(ValueError, match="decode: expected .*32.*got .*64"):
        objective(estimates(prepared, [0]), [0], torch.ones(1))


def test_terms_that_do_not_count_are_not_evaluated():
    prepared, own = prepared_pairs(), {**encoders(), PATCHES: Seeing()}
    gated = EditObjective((NO_EDIT, type(GEOMETRY)("geometry_match", PATCHES, t_max=0.3)))
    objective = EstimateObjective(gated, own, prepared, lambda z: pytest.fail("decoded"))
    x0 = estimates(prepared, [0, 1])
    assert [r.term.name for r in objective(x0, [0, 1], torch.tensor([0.4, 0.9])).terms] == ["no edit"]
    only = EditObjective(gated.terms[1:])
    assert EstimateObjective(only, own, prepared, lambda z: z)(x0, [0, 1], torch.tensor([0.4, 0.9])) is None
    assert not own[PATCHES].seen


def test_nan_of_decoder_and_encoders_for_a_sample_that_does_not_count_stays_out_of_the_gradient():
    """Where the gates of two encoders differ, each keeps its own samples."""

    class Broken(Patches):
        """Not a number for the first picture, and so is the way back."""

        def features(self, pixels):
            factor = torch.ones(len(pixels), 1, 1, 1)
            factor[0] = torch.nan
            return super().features(pixels * factor)

    prepared, decoder = prepared_pairs(), WideDecoder().requires_grad_(False)
    terms = EditObjective((replace(GEOMETRY, t_min=0.5), replace(NO_EDIT, margin=2.0)))
    t, grads = torch.tensor([0.2, 0.6, 0.9]), []
    for encoder, decode in (
        (Patches(), decoder),
        (Broken(), decoder),
        (Patches(), lambda z: decoder(z * (torch.nan if torch.equal(z.detach(), first) else 1.0))),
    ):
        x0 = estimates(prepared, [0, 1, 2])
        first = x0[:1].detach()
        objective = EstimateObjective(terms, {**encoders(), PATCHES: encoder}, prepared, decode)
        objective(x0, [0, 1, 2], t).total.backward()
        grads.append(x0.grad)
    assert grads[0].any((1, 2, 3)).all()
    assert torch.equal(grads[1], grads[0]) and torch.equal(grads[2], grads[0])


def test_encoders_run_without_the_lora_also_when_they_are_computed_again():
    """An encoder may be the network that is trained; its backward pass comes after the context was left."""
    prepared, denoiser = prepared_pairs(), SmallDenoiser()

    class Sharing(Patches):
        """Adds features of the trained network itself."""

        def features(self, pixels):
            x = torch.nn.functional.avg_pool2d(pixels, 8).movedim(1, -1).repeat(1, 1, 1, 18)[..., :52]
            return super().features(pixels) + denoiser.module(x, False)[..., :1].movedim(-1, 1)

    made = trainer(denoiser=denoiser, with_encoders={**encoders(), PATCHES: Sharing()}, objective=ON_PICTURES)
    for layer in made.lora.layers:
        layer.up.data.fill_(0.1)
    found = []
    for attached in (True, False):
        made.lora.attach() if attached else made.lora.detach()
        x0 = estimates(prepared, [0, 1])
        report = made.objective(x0, [0, 1], torch.ones(2))
        found.append((report.total, torch.autograd.grad(report.total, x0)[0]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("measured", [0, 1], ids=["plain step", "measured step"])
def test_the_decoder_is_gone_before_the_backward_pass_of_the_model(measured):
    """Of all that decoder and encoder computed and were given, nothing is left when the model's gradient begins."""
    storages, alive = [], {"in the decoder": 0, "before the model": []}
    decoder = WideDecoder().requires_grad_(False)

    def remember(module, args, output):
        alive["in the decoder"] = max(alive["in the decoder"], sum(not s.expired() for s in storages))
        storages.append(StorageWeakRef(output.untyped_storage()))

    decoder.tanh.register_forward_hook(remember)  # of all that it computes, this is what its gradient needs

    class Given(Patches):
        def features(self, pixels):
            storages.append(StorageWeakRef(pixels.untyped_storage()))
            return super().features(pixels)

        def __call__(self, images):
            storages.append(StorageWeakRef(images.untyped_storage()))
            return super().__call__(images)

    class Asking(SmallDenoiser):
        def __call__(self, *args):
            v = super().__call__(*args)
            v.register_hook(lambda g: alive["before the model"].append(sum(not s.expired() for s in storages)))
            return v

    own = {**encoders(), PATCHES: Given()}
    trainer(denoiser=Asking(), with_encoders=own, decode=decoder, steps=2, gradients_every=measured).run()
    assert len(storages) >= 2 * 2 * 3  # steps, samples, layers
    assert alive["before the model"] == [0, 0] and alive["in the decoder"] >= 2


@pytest.mark.parametrize("measured", [0, 1], ids=["plain step", "measured step"])
def test_sample_by_sample_a_run_is_what_it_is_batch_by_batch(measured, monkeypatch):
    """Gates, weights of noise levels and pair weights included; and each sample is decoded once."""
    terms = EditObjective((NO_EDIT, replace(GEOMETRY, t_max=0.6), replace(OVERLAY, t_min=0.4)))
    found, counts = [], []
    for apart in (True, False):
        if not apart:
            monkeypatch.setattr(EstimateObjective, "apart", lambda *_: False)
        decoder, calls = WideDecoder().requires_grad_(False), []
        made = trainer(
            objective=terms, decode=lambda z, d=decoder, c=calls: c.append(len(z)) or d(z), steps=3, batch_size=3,
            accumulation=2, gradients_every=measured, estimate_weighting="inverse_square", pair_weights="reach", clip=0.0,
        )  # fmt: skip
        found.append((made.run(), weights(made.lora)))
        counts.append(calls)
    (one, mine), (other, theirs) = found
    assert len({frozenset(s.terms) for step in one.log.steps for s in step.samples}) > 1
    for a, b in zip(one.log.steps, other.log.steps):
        assert a.loss == pytest.approx(b.loss, rel=1e-5) and a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-4)
        for x, y in zip(a.samples, b.samples):
            assert (x.pair, x.t, list(x.terms)) == (y.pair, y.t, list(y.terms))
            for name in x.terms:
                said, expected = (
                    [
                        v.terms[name].raw,
                        v.terms[name].weighted,
                        v.terms[name].open or 0.0,
                        v.terms[name].gradient or 0.0,
                    ]
                    for v in (x, y)
                )
                assert said == pytest.approx(expected, rel=1e-4, abs=1e-6)
                assert (x.terms[name].gradient is not None) == bool(measured)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-6)
    samples = sum(len(step.samples) for step in one.log.steps)
    assert len(counts[0]) == samples < len(counts[1])


def test_only_one_sample_s_decoding_is_in_memory():
    """Checkpointed: going forward through a batch keeps no activations of the decoder."""
    storages, alive = [], []
    decoder = WideDecoder().requires_grad_(False)

    def remember(module, args, output):
        storages.append(StorageWeakRef(output.untyped_storage()))

    decoder.tanh.register_forward_hook(remember)
    prepared = prepared_pairs()
    x0 = estimates(prepared, [0, 1, 2, 3])
    report = EstimateObjective(ON_PICTURES, encoders(), prepared, decoder)(x0, [0, 1, 2, 3], torch.ones(4))
    assert len(storages) == 4 * 3 and all(s.expired() for s in storages)
    decoder.layers[3].register_forward_hook(lambda *_: alive.append(sum(not s.expired() for s in storages)))
    report.total.backward()
    assert alive == [3, 3, 3, 3]


def test_a_decoder_that_checkpoints_itself_is_computed_no_third_time():
    prepared, decoder = prepared_pairs(), WideDecoder().requires_grad_(False)
    calls = []

    class Own:
        checkpointing = True

        def __call__(self, z):
            calls.append(len(z))
            return checkpoint(decoder, z, use_reentrant=False)

    found = []
    for decode in (Own(), decoder):
        x0 = estimates(prepared, [0, 1])
        report = EstimateObjective(ON_PICTURES, encoders(), prepared, decode)(x0, [0, 1], torch.ones(2))
        found.append((report.total, torch.autograd.grad(report.total, x0)[0]))
    assert calls == [1, 1]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_the_encoder_that_the_backward_pass_meets_first_is_computed_once():
    """And the others twice, so that no two keep their activations at a time."""
    prepared, found = prepared_pairs(), []
    for once in (False, True):
        nearest, other = Patches(), Patches()
        other.info = replace(other.info, name="others/grid")
        own = {**encoders(), PATCHES: nearest, other.info.name: other}
        both = prepare(prepared.pairs, own[LATENTS], own, overlay=prepared.overlay)
        nearest.calls = other.calls = 0
        terms = EditObjective((replace(GEOMETRY, encoder=other.info.name, name="other"), GEOMETRY, NO_EDIT))
        x0 = estimates(prepared, [0, 1])
        report = EstimateObjective(terms, own, both, WideDecoder().requires_grad_(False))(
            x0, [0, 1], torch.ones(2), once=once
        )
        gradient = torch.autograd.grad(report.total, x0)[0]
        found.append((report.total, gradient, nearest.calls, other.calls))
    assert found[0][2:] == (2, 2) and found[1][2:] == (1, 2)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
