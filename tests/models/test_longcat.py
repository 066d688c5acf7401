"""LongCat-Image-Edit by diffusers: the pipeline's own numbers, gradients that are right, captions that see the picture."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import torch
from small_qwen import as_tensor, called, draw, drawn_picture, smaller, write_longcat

from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.models.autoencoder import vae_encoder
from editloss_core.models.base import Preview
from editloss_core.models.denoiser import DiffusersDenoiser
from editloss_core.models.folder import ModelFolder
from editloss_core.models.kontext import pack, unpack
from editloss_core.models.longcat import LONGCAT, positions

CPU = torch.device("cpu")
PROMPT = "Make 'it' a square."
HEIGHT, WIDTH = 48, 80  # 6×10 latents, 15 tokens


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ModelFolder(write_longcat(tmp_path_factory.mktemp("longcat")), dtype="fp32")


@pytest.fixture(scope="module")
def pipeline(files):
    from diffusers import LongCatImageEditPipeline

    made = LongCatImageEditPipeline.from_pretrained(files.folder, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def denoiser(files):
    return DiffusersDenoiser(LONGCAT, files.load_transformer(CPU))


def captions_of(*lengths):
    return [LONGCAT.caption({"tokens": draw(n, 24, seed=n)}) for n in lengths]


def test_a_forward_pass_is_the_pipelines(files, pipeline, denoiser):
    """From the picture and the caption on: latents, reference, positions, time and caption are all ours."""
    assert files.edit_model is LONGCAT and files.faults() == []
    picture = drawn_picture(HEIGHT, WIDTH)
    with smaller(pipeline, WIDTH, HEIGHT):
        steps, _ = called(pipeline, picture, PROMPT, guidance_scale=1.0)
        caption = LONGCAT.caption(LONGCAT.encode(files.load_text(CPU), PROMPT, as_tensor(picture)))
    assert torch.equal(caption.tokens, steps[0][0]["encoder_hidden_states"][0])
    reference = vae_encoder(files.load_vae(CPU)).latents(as_tensor(picture)[None])
    assert [given["timestep"].item() for given, _ in steps] == pytest.approx(
        LONGCAT.times(15, 3)[:3].tolist(), abs=1e-6
    )
    for given, theirs in steps:
        ids = torch.cat([given["txt_ids"], given["img_ids"]]).float()
        assert torch.equal(ids, positions(len(caption.tokens), (6, 10), (6, 10)))
        assert torch.allclose(pack(reference), given["hidden_states"][:, 15:], atol=1e-6)
        x_t = unpack(given["hidden_states"][:, :15], 6, 10)
        with torch.no_grad():
            mine = denoiser(x_t, given["timestep"], [reference], [caption])
        assert torch.allclose(pack(mine), theirs[:, :15], rtol=1e-5, atol=1e-5)
        assert torch.allclose(denoiser.stock_velocity(x_t, given["timestep"], reference, caption), mine, atol=1e-4)
    # and each of them matters: the comparison would see a wrong one
    others = [denoiser(x_t, 0.9 * given["timestep"], [reference], [caption])]
    others += [denoiser(x_t, given["timestep"], [reference.flip(-1)], [caption])]
    others += [denoiser(x_t, given["timestep"], [reference], [caption._replace(tokens=caption.tokens.flip(0))])]
    assert all((other - mine).abs().max() > 1e-3 for other in others)


def test_previews_are_sampled_as_the_pipeline_samples_them(pipeline, denoiser):
    with smaller(pipeline, WIDTH, HEIGHT):
        steps, made = called(pipeline, drawn_picture(HEIGHT, WIDTH), PROMPT, guidance_scale=LONGCAT.preview_cfg)
    assert len(steps) == 6
    captions = [LONGCAT.caption({"tokens": given["encoder_hidden_states"][0]}) for given, _ in steps[:2]]
    noise, reference = (unpack(part, 6, 10) for part in steps[0][0]["hidden_states"].chunk(2, 1))
    mine = LONGCAT.sample(
        denoiser, noise, [reference], captions[:1], 3, Preview(cfg=LONGCAT.preview_cfg, negatives=captions[1:])
    )
    assert torch.allclose(pack(mine), made, rtol=1e-4, atol=1e-4)


def test_a_batch_is_its_samples_whatever_the_captions_lengths(denoiser):
    """A picture's rows begin at the end of the caption: a length that was filled up would move them."""
    x, reference, t = draw(3, 16, 4, 6), draw(3, 16, 4, 6, seed=1), torch.tensor([0.2, 0.9, 0.5])
    captions = captions_of(9, 5, 9)
    with torch.no_grad():
        together = denoiser(x, t, [reference], captions)
        for i, c in enumerate(captions):
            one = denoiser(x[i : i + 1], t[i : i + 1], [reference[i : i + 1]], [c])
            assert torch.allclose(together[i], one[0], atol=1e-5)
    assert together.shape == x.shape and together.dtype == torch.float32


def test_a_reference_may_have_another_size_but_not_in_the_pipeline(denoiser):
    x, reference, t = draw(1, 16, 4, 6), draw(1, 16, 8, 4, seed=1), torch.tensor([0.4])
    (caption,) = captions_of(5)
    assert denoiser(x, t, [reference], [caption]).shape == x.shape
    with pytest.raises(ValueError, match=r"reference: expected \(1, 16, 4, 6\) like the picture that is made"):
        denoiser.stock_velocity(x, t, reference, caption)


def test_positions_are_whole_numbers_that_half_precision_would_round():
    ids = positions(838, (64, 64), (64, 64))
    assert ids.dtype == torch.float32 and len(ids) == 838 + 2 * 1024
    assert ids[837].tolist() == [0, 837, 837] and ids[838].tolist() == [1, 838, 838]
    assert ids[838 + 33].tolist() == [1, 839, 839] and ids[-1].tolist() == [2, 869, 869]
    assert not torch.equal(ids.bfloat16().float(), ids)


@pytest.mark.parametrize(("layers", "count"), [("attention", 16), ("attention + MLP", 22), ("all", 32)])
def test_checkpointing_changes_no_gradient_and_finite_differences_agree(files, layers, count):
    def gradients(denoiser, lora):
        x = draw(2, 16, 4, 4).requires_grad_()
        with lora.attach() and torch.enable_grad():
            v = denoiser(x, torch.tensor([0.6, 0.3]), [draw(2, 16, 4, 4, seed=1)], captions_of(6, 4))
            loss = (v - draw(2, 16, 4, 4, seed=2)).square().mean()
            found = torch.autograd.grad(loss, [x, *lora.parameters()])
        lora.detach()
        return loss.detach(), found

    found = []
    for checkpointing in (False, True):
        denoiser = DiffusersDenoiser(LONGCAT, files.load_transformer(CPU), checkpointing=checkpointing)
        lora = LoRA(denoiser.module, LoRASettings(rank=2, alpha=3.0, layers=layers), seed=1)
        with torch.no_grad():
            for i, layer in enumerate(lora.layers):
                layer.up.copy_(0.1 * draw(*layer.up.shape, seed=i))
        found.append(gradients(denoiser, lora))
    (loss, plain), (_, again) = found
    assert len(lora.layers) == count and all(g.abs().max() > 0 for g in plain)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(plain, again))
    with torch.no_grad():  # along the gradients of all layers' B
        norm = sum(g.square().sum() for g in plain[2::2]).sqrt()
        for layer, g in zip(lora.layers, plain[2::2]):
            layer.up.add_(1e-3 * g / norm)
        moved, _ = gradients(denoiser, lora)
    assert (moved - loss) / 1e-3 == pytest.approx(float(norm), rel=0.05)


def test_captions_see_the_picture_at_half_the_size_that_the_pipeline_gives_it(files):
    before, text = as_tensor(drawn_picture(40, 72)), files.load_text(CPU)
    with torch.no_grad():
        mine = LONGCAT.encode(text, PROMPT, before)["tokens"]
        other = LONGCAT.encode(text, PROMPT, before.flip(1))["tokens"]
    # 1376×768 pixels halved are 25×14 tokens of 28×28; a caption is filled up to 512, and the picture's ends are two more.
    assert mine.shape == other.shape == (25 * 14 + 512 + 2, 24) and (mine - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match="caption: expected at most 512 tokens, got 513"):
        LONGCAT.encode(text, "a" * 400 + " 'quoted' " + "b" * 103, before)
