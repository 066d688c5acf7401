"""Qwen-Image-Edit by diffusers, the first Edit, 2509 and 2511: the pipelines' own numbers, gradients that are right, captions
that see the picture."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

pytest.importorskip("diffusers")

import torch
from PIL import Image
from small_qwen import as_tensor, called, draw, drawn_picture, smaller, write_qwen

from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.models.autoencoder import VAEDecoder, of_vae, vae_decoder_encoder, vae_encoder
from editloss_core.models.base import Preview
from editloss_core.models.captions import Captions, caption_sets, encode_captions
from editloss_core.models.denoiser import DiffusersDenoiser
from editloss_core.models.folder import ModelFolder
from editloss_core.models.kontext import pack, unpack
from editloss_core.models.qwen import QWEN_EDIT, QWEN_EDIT_2511, QWEN_EDIT_PLUS
from editloss_core.pairs import PairSet

CPU = torch.device("cpu")
PROMPT = "Make it a square."
HEIGHT, WIDTH = 48, 80  # 6×10 latents, 15 tokens
KINDS = {"edit": {"plus": False}, "2509": {}, "2511": {"zero_cond_t": True}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_qwen(tmp_path_factory.mktemp(kind), **options) for kind, options in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def files(folders, kind):
    return ModelFolder(folders[kind], dtype="fp32")


@pytest.fixture
def model(files):
    return files.edit_model


@pytest.fixture
def denoiser(files, model):
    return DiffusersDenoiser(model, files.load_transformer(CPU))


def pipeline_of(files, dtype=torch.float32):
    import diffusers

    kind = getattr(diffusers, files.edit_model.parts.pipeline)
    made = kind.from_pretrained(files.folder, torch_dtype=dtype, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def captions_of(model, *lengths):
    return [model.caption({"tokens": draw(n, 24, seed=n)}) for n in lengths]


def test_a_folder_is_known_by_its_pipeline_and_nothing_is_wrong_with_it(files, kind):
    assert files.edit_model is {"edit": QWEN_EDIT, "2509": QWEN_EDIT_PLUS, "2511": QWEN_EDIT_2511}[kind]
    assert files.faults() == []


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        ("processor", None, "path: processor: there is no preprocessor_config.json, for pictures with captions"),
        ("vae", {"z_dim": 16}, "path: transformer: expected in_channels 64 (2×2 latents of 16 channels), got 16"),
        ("transformer", {"out_channels": 16}, "path: transformer: expected out_channels 4, got 16"),
        ("text_encoder", {"text_config": {"hidden_size": 8}}, "expected text_config.hidden_size 24, which the transformer takes, got 8"),
        ("text_encoder", {"hidden_size": 3584}, "expected hidden_size 24, which the transformer takes, got 3584"),
        ("text_encoder", {"architectures": ["Qwen3ForCausalLM"]}, "expected a Qwen2_5_VLForConditionalGeneration"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_together_is_refused(folders, tmp_path, part, changes, expected):
    folder = shutil.copytree(folders["2509"], tmp_path / "model")
    if changes is None:
        (folder / part / "processor_config.json").unlink()
    else:
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (said,) = ModelFolder(folder).faults()
    assert expected in said


def test_a_forward_pass_is_the_pipelines(files, model, denoiser):
    """From the picture and the caption on: latents, reference, places, time and caption are all ours."""
    picture, pipeline = drawn_picture(HEIGHT, WIDTH), pipeline_of(files)
    with smaller(pipeline, WIDTH, HEIGHT):
        steps, _ = called(pipeline, picture, PROMPT, height=HEIGHT, width=WIDTH, true_cfg_scale=1.0)
        caption = model.caption(model.encode(files.load_text(CPU), PROMPT, as_tensor(picture)))
    assert torch.equal(caption.tokens, steps[0][0]["encoder_hidden_states"][0])
    reference = vae_encoder(files.load_vae(CPU)).latents(as_tensor(picture)[None])
    assert [given["timestep"].item() for given, _ in steps] == pytest.approx(model.times(15, 3)[:3].tolist(), abs=1e-6)
    for given, theirs in steps:
        x_t = unpack(given["hidden_states"][:, :15], 6, 10)
        assert torch.allclose(pack(reference), given["hidden_states"][:, 15:], atol=1e-6)
        with torch.no_grad():
            mine = denoiser(x_t, given["timestep"], [reference], [caption])
        assert torch.allclose(pack(mine), theirs[:, :15], rtol=1e-5, atol=1e-5)
        stock = denoiser.stock_velocity(x_t, given["timestep"], reference, caption)
        assert torch.allclose(stock, mine, atol=1e-4)
    # and each of them matters: the comparison would see a wrong one
    others = [denoiser(x_t, 0.9 * given["timestep"], [reference], [caption])]
    others += [denoiser(x_t, given["timestep"], [reference.flip(-1)], [caption])]
    others += [denoiser(x_t, given["timestep"], [reference], [caption._replace(tokens=caption.tokens.flip(0))])]
    assert all((other - mine).abs().max() > 1e-3 for other in others)


@pytest.mark.parametrize("kind", ["2509", "2511"])
def test_with_several_references_it_is_the_pipelines_too(files, model, denoiser, kind):
    """The network gets them one after the other, each at a place of its own, and the caption names them in that order."""
    first = drawn_picture(HEIGHT, WIDTH)
    pictures, pipeline = [first, first.transpose(Image.Transpose.FLIP_LEFT_RIGHT)], pipeline_of(files)
    with smaller(pipeline, WIDTH, HEIGHT):
        steps, _ = called(pipeline, pictures, PROMPT, height=HEIGHT, width=WIDTH, true_cfg_scale=1.0)
        seen = [as_tensor(picture) for picture in pictures]
        caption, other = (
            model.caption(model.encode(files.load_text(CPU), PROMPT, *order)) for order in (seen, seen[::-1])
        )
    given, theirs = steps[0]
    assert torch.equal(caption.tokens, given["encoder_hidden_states"][0])
    assert caption.tokens.shape == other.tokens.shape and (caption.tokens - other.tokens).abs().max() > 1e-3
    encoder = vae_encoder(files.load_vae(CPU))
    references = [encoder.latents(picture[None]) for picture in seen]
    x_t = unpack(given["hidden_states"][:, :15], 6, 10)
    with torch.no_grad():
        mine, turned = (denoiser(x_t, given["timestep"], order, [caption]) for order in (references, references[::-1]))
    assert torch.allclose(pack(mine), theirs[:, :15], rtol=1e-5, atol=1e-5)
    assert (turned - mine).abs().max() > 1e-3


def test_in_bfloat16_it_is_the_pipelines_too(folders):
    files = ModelFolder(folders["2511"], dtype="bf16")
    model, pipeline = files.edit_model, pipeline_of(files, torch.bfloat16)
    with smaller(pipeline, WIDTH, HEIGHT):
        steps, _ = called(
            pipeline, drawn_picture(HEIGHT, WIDTH), PROMPT, height=HEIGHT, width=WIDTH, true_cfg_scale=1.0
        )
    denoiser = DiffusersDenoiser(model, files.load_transformer(CPU))
    for given, theirs in steps:
        x_t, reference = (unpack(part, 6, 10).float() for part in given["hidden_states"].chunk(2, 1))
        caption = model.caption({"tokens": given["encoder_hidden_states"][0]})
        with torch.no_grad():
            mine = denoiser(x_t, given["timestep"].float(), [reference], [caption])
        assert torch.equal(pack(mine), theirs[:, :15].float())


def test_2511_tells_its_reference_that_it_is_at_the_end_of_time(folders):
    x, reference, t = draw(1, 4, 4, 4), draw(1, 4, 4, 4, seed=1), torch.tensor([0.7])
    found = []
    for kind in ("2509", "2511"):  # the same weights
        files = ModelFolder(folders[kind], dtype="fp32")
        denoiser = DiffusersDenoiser(files.edit_model, files.load_transformer(CPU))
        with torch.no_grad():
            found.append(denoiser(x, t, [reference], captions_of(files.edit_model, 7)))
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_a_batch_is_its_samples_whatever_the_captions_lengths_and_a_reference_may_have_another_size(model, denoiser):
    x, reference, t = draw(3, 4, 4, 6), draw(3, 4, 8, 4, seed=1), torch.tensor([0.2, 0.9, 0.5])
    captions = captions_of(model, 9, 5, 9)
    with torch.no_grad():
        together = denoiser(x, t, [reference], captions)
        for i, c in enumerate(captions):
            one = denoiser(x[i : i + 1], t[i : i + 1], [reference[i : i + 1]], [c])
            assert torch.allclose(together[i], one[0], atol=1e-5)
        stock = denoiser.stock_velocity(x[:1], t[:1], reference[:1], captions[0])
    assert together.shape == x.shape and together.dtype == torch.float32
    assert torch.allclose(stock, together[:1], atol=1e-4)


def test_what_does_not_fit_together_is_refused(model, denoiser):
    x, (caption,) = draw(1, 4, 4, 4), captions_of(model, 5)
    most = model.references
    wanted = "one" if most == 1 else f"1 to {most}"
    with pytest.raises(
        ValueError, match=f"expected {wanted}, as {model.parts.pipeline} takes it for a sample, got {most + 1}"
    ):
        denoiser(x, torch.rand(1), [x] * (most + 1), [caption])
    with pytest.raises(ValueError, match="expected even sides, got 3×4"):
        denoiser(x[:, :, :3], torch.rand(1), [x], [caption])
    with pytest.raises(ValueError, match="before: expected the picture that the caption is encoded with, got none"):
        model.encode(None, PROMPT, None)


def trained(denoiser, layers):
    lora = LoRA(denoiser.module, LoRASettings(rank=2, alpha=3.0, layers=layers), seed=1)
    with torch.no_grad():
        for i, layer in enumerate(lora.layers):
            layer.up.copy_(0.1 * draw(*layer.up.shape, seed=i))
    return lora


def gradients(denoiser, lora, captions):
    x = draw(2, 4, 4, 4).requires_grad_()
    with lora.attach() and torch.enable_grad():
        v = denoiser(x, torch.tensor([0.6, 0.3]), [draw(2, 4, 4, 4, seed=1)], captions)
        loss = (v - draw(2, 4, 4, 4, seed=2)).square().mean()
        found = torch.autograd.grad(loss, [x, *lora.parameters()], allow_unused=True, materialize_grads=True)
    lora.detach()
    return loss.detach(), found


@pytest.mark.parametrize(("layers", "count"), [("attention", 16), ("attention + MLP", 24), ("all", 34)])
def test_checkpointing_changes_no_gradient_and_finite_differences_agree(files, model, layers, count):
    found, captions = [], captions_of(model, 6, 4)  # of two lengths: one is filled up
    for checkpointing in (False, True):
        denoiser = DiffusersDenoiser(model, files.load_transformer(CPU), checkpointing=checkpointing)
        lora = trained(denoiser, layers)
        found.append(gradients(denoiser, lora, captions))
    (loss, plain), (_, again) = found
    assert len(lora.layers) == count
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(plain, again))
    # What the last block makes of the words is thrown away.
    unused = {name for (name, _), g in zip(lora.named_layers(), plain[2::2]) if not g.abs().max() > 0}
    thrown = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    assert unused == {f"transformer_blocks.1.{name}" for name in thrown} & set(lora.targets)
    with torch.no_grad():  # along the gradients of all layers' B
        norm = sum(g.square().sum() for g in plain[2::2]).sqrt()
        for layer, g in zip(lora.layers, plain[2::2]):
            layer.up.add_(1e-3 * g / norm)
        moved, _ = gradients(denoiser, lora, captions)
    assert (moved - loss) / 1e-3 == pytest.approx(float(norm), rel=0.05)


def test_previews_are_sampled_as_the_pipeline_samples_them(files, model, denoiser):
    """With classifier-free guidance, whose length is the caption's own, on the pipeline's noise levels."""
    picture, pipeline = drawn_picture(HEIGHT, WIDTH), pipeline_of(files)
    with smaller(pipeline, WIDTH, HEIGHT):
        steps, made = called(
            pipeline, picture, PROMPT, height=HEIGHT, width=WIDTH, negative_prompt=" ", true_cfg_scale=model.preview_cfg
        )
    assert len(steps) == 6
    captions = [model.caption({"tokens": given["encoder_hidden_states"][0]}) for given, _ in steps[:2]]
    noise, reference = (unpack(part, 6, 10) for part in steps[0][0]["hidden_states"].chunk(2, 1))
    preview = Preview(cfg=model.preview_cfg, negatives=captions[1:])
    mine = model.sample(denoiser, noise, [reference], captions[:1], 3, preview)
    assert torch.allclose(pack(mine), made, rtol=1e-4, atol=1e-4)
    plain = model.sample(denoiser, noise, [reference], captions[:1], 3)
    assert (plain - mine).abs().max() > 1e-2


def test_captions_see_the_picture_in_the_size_that_the_pipeline_gives_it(files, model):
    """Of a picture that is neither square nor of the model's size: nothing here is made smaller."""
    before, pipeline = as_tensor(drawn_picture(40, 72)), files.load_text(CPU)
    with torch.no_grad():
        mine = model.encode(pipeline, PROMPT, before)["tokens"]
        other = model.encode(pipeline, PROMPT, before.flip(1))["tokens"]
    assert mine.shape == other.shape and (mine - other).abs().max() > 1e-3
    # Tokens of 28×28 pixels: 512×288 pixels are 18×10 of them, 1376×768 are 49×27.
    words = len(pipeline.tokenizer(pipeline.prompt_template_encode)["input_ids"]) - 64
    named = model is not QWEN_EDIT
    template = "Picture 1: <|vision_start|><|vision_end|>" if named else ""
    extra = len(pipeline.tokenizer(template + PROMPT)["input_ids"]) - len("{}")
    assert len(mine) - words - extra == (18 * 10 if named else 49 * 27 - 1)


def pairs_of(*captions):
    pictures = torch.stack([as_tensor(drawn_picture(64, 64)).roll(i, 0) for i in range(len(captions))])
    pairs = PairSet.from_images(pictures, 1 - pictures, None, "-", names=[f"p{i}" for i in range(len(captions))])
    return replace(pairs, pairs=tuple(replace(p, caption=c) for p, c in zip(pairs, captions)))


def test_each_pair_has_its_own_caption_and_the_cache_knows_both(folders, tmp_path):
    files, loads = ModelFolder(folders["2509"], dtype="fp32"), []

    def load():
        loads.append(1)
        return files.load_text(CPU)

    pairs = pairs_of(PROMPT, PROMPT)
    (first,) = encode_captions(QWEN_EDIT_PLUS, [pairs], load, files.text_fingerprint, tmp_path)
    assert (first[0].tokens - first[1].tokens).abs().max() > 1e-3
    (again,) = encode_captions(QWEN_EDIT_PLUS, [pairs], load, files.text_fingerprint, tmp_path)
    assert loads == [1] and all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again))


def test_a_dropped_caption_keeps_its_picture(folders):
    files, pairs = ModelFolder(folders["2509"], dtype="fp32"), pairs_of(PROMPT, PROMPT)
    sets = caption_sets(pairs, pairs, dropout=0.1, sampled=1, cfg=4.0)
    made = Captions(*encode_captions(QWEN_EDIT_PLUS, sets, lambda: files.load_text(CPU), files.text_fingerprint))
    assert list(map(len, made)) == [2, 2, 2, 1]
    assert (made.dropped[0].tokens - made.dropped[1].tokens).abs().max() > 1e-3
    assert len(made.own[0].tokens) - len(made.dropped[0].tokens) == len(PROMPT), "a token is a letter"
    assert made.away[0] is made.dropped[0] and made.watched[1] is made.own[1], "encoded once"
    none = caption_sets(pairs, None, dropout=0.0, sampled=1, cfg=4.0)
    assert list(map(len, none)) == [2, 0, 0, 0]


def test_decoding_is_the_pipelines_with_gradients_beyond_white_and_encoding_too(folders):
    files = ModelFolder(folders["2509"], dtype="fp32")
    vae, pipeline = files.load_vae(CPU), pipeline_of(files)
    encoder, config = vae_encoder(vae), vae.config
    z = draw(2, 4, 4, 6)
    mean, deviation = (torch.tensor(v).view(1, 4, 1, 1) for v in (config.latents_mean, config.latents_std))
    theirs = pipeline.vae.decode((z * deviation + mean)[:, :, None], return_dict=False)[0][:, :, 0]
    theirs = pipeline.image_processor.postprocess(theirs.detach(), output_type="pt").movedim(1, -1)
    decode = VAEDecoder(vae)
    assert torch.allclose(decode(z), theirs, atol=1e-6)
    wide = (8 * z).requires_grad_()
    pictures = decode(wide)
    assert pictures.min() == 0.0 and pictures.max() == 1.0 and pictures.shape == (2, 32, 48, 3)
    assert torch.autograd.grad(pictures[pictures == 1.0].sum(), wide)[0].abs().max() > 0
    pixels = torch.rand(1, 16, 24, 3)
    theirs = pipeline._encode_vae_image(2 * pixels.movedim(-1, 1)[:, :, None] - 1, None)[:, :, 0]
    assert torch.allclose(encoder.latents(pixels), theirs, atol=1e-6)
    assert encoder.info.name == "vae/autoencoderklqwenimage-4ch/grid" and encoder.downscale == 8
    assert torch.allclose(
        encoder.unscaled(encoder.latents(pixels)), vae_encoder(vae, scaled=False).latents(pixels), atol=1e-5
    )


def test_its_decoder_is_checkpointed_with_the_same_gradients(folders):
    vae = ModelFolder(folders["2509"]).load_vae(CPU)
    kept, found = [], []
    plain, again = of_vae(vae), of_vae(vae)
    again.checkpoint()
    for decode in (again.decode, plain.decode):
        z, sizes = draw(1, 4, 4, 4).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = decode(z).square().sum()
        kept.append(sum(sizes))
        found.append(torch.autograd.grad(loss, z)[0])
    assert torch.allclose(*found, rtol=1e-5, atol=1e-7) and kept[0] < 0.5 * kept[1]
    assert VAEDecoder(vae).checkpointing


def test_features_of_its_decoder_are_read_from_latents(folders):
    vae = ModelFolder(folders["2509"]).load_vae(CPU)
    encoder = vae_decoder_encoder(vae, (1, 2))
    pictures = torch.rand(2, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    z = vae_encoder(vae, scaled=False).latents(pictures)
    with torch.no_grad():
        first, second = encoder.features(z)
        block = vae.decoder.up_blocks[0](vae.decoder.mid_block(vae.decoder.conv_in(vae.post_quant_conv(z[:, :, None]))))
        assert torch.equal(first, block[:, :, 0]) and torch.equal(second, vae.decoder.up_blocks[1](block)[:, :, 0])
        made = encoder(pictures)
        assert torch.allclose(encoder.from_latents(z), made, atol=1e-5) and made.ndim == 4
