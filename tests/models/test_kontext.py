"""Kontext by diffusers: the pipeline's own numbers, gradients that are right, captions and their cache."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("diffusers")

import torch
from small_kontext import write_kontext

from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.models.autoencoder import VAEDecoder, vae_encoder
from editloss_core.models.base import EditModel
from editloss_core.models.captions import encode_captions, same_words
from editloss_core.models.denoiser import DiffusersDenoiser
from editloss_core.models.folder import ModelFolder, hash_folders
from editloss_core.models.kontext import KONTEXT, Kontext, pack, position_ids, positions, unpack
from editloss_core.pairs import PairSet

CPU = torch.device("cpu")
PROMPT = "Make it a square."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_kontext(tmp_path_factory.mktemp("kontext"))


@pytest.fixture(scope="module")
def files(folder):
    return ModelFolder(folder, dtype="fp32")


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import FluxKontextPipeline

    made = FluxKontextPipeline.from_pretrained(folder, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def caption(files):
    return encode_captions(KONTEXT, [asked(PROMPT)], lambda: files.load_text(CPU), files.text_fingerprint)[0][0]


def asked(*captions):
    """Pairs of these captions, each with pictures of its own."""
    ramp = torch.linspace(0, 1, 64 * 64 * 3).reshape(64, 64, 3)
    pictures = torch.stack([ramp.roll(i, 0) for i in range(len(captions))])
    pairs = PairSet.from_images(pictures, 1 - pictures, None, "-", names=[f"p{i}" for i in range(len(captions))])
    return replace(pairs, pairs=tuple(replace(p, caption=c) for p, c in zip(pairs, captions)))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_tokens_and_positions_are_the_pipelines(pipeline):
    z = draw(2, 4, 6, 10)
    packed = pipeline._pack_latents(z, 2, 4, 6, 10)
    assert torch.equal(pack(z), packed)
    assert torch.equal(unpack(packed, 6, 10), z)
    assert torch.equal(unpack(packed, 6, 10), pipeline._unpack_latents(packed, 48, 80, 8))
    ids = pipeline._prepare_latent_image_ids(1, 3, 5, CPU, torch.float32)
    assert torch.equal(position_ids(6, 10), ids)
    ids[:, 0] = 1
    assert torch.equal(position_ids(6, 10, image=1), ids)
    with pytest.raises(ValueError, match="even sides, got 6×7"):
        pack(draw(1, 4, 6, 7))


def called(pipeline, picture, seed=3, **options):
    """What the pipeline gave its transformer at every step, and what came back."""
    seen = []
    hook = pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    try:
        height, width = picture.shape[2:]
        pipeline(
            image=picture, prompt=PROMPT, height=height, width=width, max_area=height * width, num_inference_steps=3,
            guidance_scale=2.5, generator=torch.Generator().manual_seed(seed), _auto_resize=False, output_type="latent",
            **options,
        )  # fmt: skip
    finally:
        hook.remove()
    return seen


def test_a_forward_pass_is_the_pipelines(files, pipeline, caption):
    """From the picture and the caption on: latents, reference, positions, time, guidance and text are all ours."""
    height, width = 48, 80
    picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    steps = called(pipeline, picture)
    denoiser = DiffusersDenoiser(KONTEXT, files.load_transformer(CPU), guidance=2.5)
    reference = vae_encoder(files.load_vae(CPU)).latents(picture.movedim(1, -1))
    assert len(steps) == 3
    for given, theirs in steps:
        own = theirs.shape[1] // 2
        x_t = unpack(given["hidden_states"][:, :own], height // 8, width // 8)
        with torch.no_grad():
            mine = denoiser(x_t, given["timestep"], [reference], [caption])
        assert torch.allclose(pack(mine), theirs[:, :own], rtol=1e-5, atol=1e-5)
        assert torch.equal(given["img_ids"], positions(6, 10, 6, 10))
    # and each of them matters: the comparison would see a wrong one
    x_t, t = unpack(steps[0][0]["hidden_states"][:, :own], 6, 10), steps[0][0]["timestep"]
    right = denoiser(x_t, t, [reference], [caption])
    others = [denoiser.told(1.0)(x_t, t, [reference], [caption])]
    others += [denoiser(x_t, 0.9 * t, [reference], [caption]), denoiser(x_t, t, [reference.flip(-1)], [caption])]
    others += [
        denoiser(x_t, t, [reference], [caption._replace(**{f: 1.1 * getattr(caption, f)})]) for f in caption._fields
    ]
    assert all((other - right).abs().max() > 1e-3 for other in others)


def test_in_bfloat16_it_is_the_pipelines_too(folder, caption):
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    steps = called(pipeline, torch.rand(1, 3, 32, 32))
    half = ModelFolder(folder, dtype="bf16")
    denoiser = DiffusersDenoiser(KONTEXT, half.load_transformer(CPU), guidance=2.5)
    own = encode_captions(KONTEXT, [asked(PROMPT)], lambda: half.load_text(CPU), half.text_fingerprint)[0][0]
    for given, theirs in steps:
        x = given["hidden_states"]
        latents = [unpack(part, 4, 4).float() for part in x.chunk(2, 1)]
        with torch.no_grad():
            mine = denoiser(latents[0], given["timestep"].float(), [latents[1]], [own])
        assert torch.equal(pack(mine), theirs[:, : x.shape[1] // 2].float())


def test_a_batch_is_its_samples_and_a_reference_may_have_another_size(files, caption):
    denoiser = DiffusersDenoiser(KONTEXT, files.load_transformer(CPU))
    other = caption._replace(tokens=caption.tokens.flip(0), pooled=-caption.pooled)
    x, reference, t = draw(2, 4, 4, 6), draw(2, 4, 8, 4, seed=1), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        both = denoiser(x, t, [reference], [caption, other])
        for i, c in enumerate([caption, other]):
            one = denoiser(x[i : i + 1], t[i : i + 1], [reference[i : i + 1]], [c])
            assert torch.allclose(both[i], one[0], atol=1e-5)
    assert both.shape == x.shape and both.dtype == torch.float32


def test_what_does_not_fit_together_is_refused(files, caption):
    denoiser = DiffusersDenoiser(KONTEXT, files.load_transformer(CPU))
    x = draw(2, 4, 4, 4)
    with pytest.raises(ValueError, match="expected one, as FluxKontextPipeline takes it for a sample, got 2"):
        denoiser(x, torch.rand(2), [x, x], [caption] * 2)
    with pytest.raises(ValueError, match="each of 2 latents, got 2, 2 and 1"):
        denoiser(x, torch.rand(2), [x], [caption])


def trained(denoiser, layers="all"):
    lora = LoRA(denoiser.module, LoRASettings(rank=2, alpha=3.0, layers=layers), seed=1)
    with torch.no_grad():
        for i, layer in enumerate(lora.layers):
            layer.up.copy_(0.1 * draw(*layer.up.shape, seed=i))
    return lora


def gradients(denoiser, lora, caption, t=0.6):
    x = draw(1, 4, 4, 4).requires_grad_()
    with lora.attach() and torch.enable_grad():
        loss = (
            (denoiser(x, torch.tensor([t]), [draw(1, 4, 4, 4, seed=1)], [caption]) - draw(1, 4, 4, 4, seed=2))
            .square()
            .mean()
        )
        found = torch.autograd.grad(loss, [x, *lora.parameters()])
    lora.detach()
    return loss.detach(), found


def test_checkpointing_changes_no_gradient_and_finite_differences_agree(files, caption):
    found = []
    for checkpointing in (False, True):
        denoiser = DiffusersDenoiser(KONTEXT, files.load_transformer(CPU), checkpointing=checkpointing)
        lora = trained(denoiser)
        found.append(gradients(denoiser, lora, caption))
    (loss, plain), (_, again) = found
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(plain, again))
    assert all(g.abs().max() > 0 for g in plain)
    with torch.no_grad():  # along the gradient of the first layer's B
        layer, g = lora.layers[0], plain[2]
        layer.up.add_(1e-3 * g / g.norm())
        moved, _ = gradients(denoiser, lora, caption)
    assert (moved - loss) / 1e-3 == pytest.approx(float(g.norm()), rel=0.05)


@pytest.mark.parametrize(
    ("preset", "some", "none"),
    [
        ("attention", "single_transformer_blocks.1.proj_out", "transformer_blocks.0.ff.net.2"),
        ("attention + MLP", "transformer_blocks.0.ff_context.net.0.proj", "transformer_blocks.0.norm1.linear"),
        ("all", "time_text_embed.guidance_embedder.linear_2", None),
    ],
)
def test_the_presets_of_layers_know_the_names_of_diffusers(files, preset, some, none):
    names = LoRA(files.load_transformer(CPU), LoRASettings(rank=1, layers=preset)).targets
    assert some in names and none not in names
    assert {"transformer_blocks.0.attn.add_k_proj", "single_transformer_blocks.0.attn.to_q"} <= set(names)


def test_decoding_is_the_pipelines_and_has_gradients_beyond_white(files, pipeline):
    vae = files.load_vae(CPU)
    decode, encoder = VAEDecoder(vae), vae_encoder(vae)
    z = draw(1, 4, 4, 6)
    config = pipeline.vae.config
    theirs = pipeline.vae.decode(z / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    theirs = pipeline.image_processor.postprocess(theirs.detach(), output_type="pt").movedim(1, -1)
    assert torch.allclose(decode(z), theirs, atol=1e-6)
    z = (8 * z).requires_grad_()
    pictures = decode(z)
    assert pictures.min() == 0.0 and pictures.max() == 1.0 and pictures.shape == (1, 32, 48, 3)
    assert torch.autograd.grad(pictures[pictures == 1.0].sum(), z)[0].abs().max() > 0
    pixels = torch.rand(1, 16, 24, 3)
    theirs = pipeline._encode_vae_image(2 * pixels.movedim(-1, 1) - 1, None)
    assert torch.allclose(encoder.latents(pixels), theirs, atol=1e-6)
    assert encoder.info.name == "vae/autoencoderkl-4ch/grid" and encoder.downscale == 8


def test_captions_are_the_pipelines_and_cached(files, pipeline, tmp_path):
    calls = []

    def load():
        calls.append(1)
        return files.load_text(CPU)

    said = []
    texts = [PROMPT, "Remove the “cat”.", PROMPT]
    sets, told = [asked(*texts), asked(*texts[1:])], files.text_fingerprint
    first, watched = encode_captions(KONTEXT, sets, load, told, tmp_path, lambda *at: said.append(at))
    assert len(first) == 3 and len(watched) == 2 and said == [(1, 2), (2, 2)]
    assert first[2] is first[0] is watched[1] and first[1] is watched[0] is not first[0]
    with torch.no_grad():
        tokens, pooled, _ = pipeline.encode_prompt(texts[1])
    assert torch.equal(first[1].tokens, tokens[0]) and torch.equal(first[1].pooled, pooled[0])
    (again,) = encode_captions(KONTEXT, sets[:1], load, told, tmp_path)
    assert len(calls) == 1 and all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x, y))
    encode_captions(KONTEXT, [asked(*texts, "Another.")], load, told, tmp_path)
    encode_captions(KONTEXT, sets, load, "others", tmp_path)
    assert len(calls) == 3
    assert all(not t.is_inference() and t.device == CPU for t in again[0])


def test_captions_that_are_the_same_to_the_model_are_named(files, tmp_path):
    """The small T5 knows the letters of ASCII, each a token; all of what it does not know in a row is one unknown token."""
    texts = ["把椅子换成我的凳子", "请移除桌上的花瓶。", "Remove the cat.", "Remove the 猫."]
    (made,) = encode_captions(KONTEXT, [asked(*texts)], lambda: files.load_text(CPU), files.text_fingerprint, tmp_path)
    words = {text: KONTEXT.words(caption) for text, caption in zip(texts, made)}
    (note,) = same_words(words)
    assert note.startswith("captions: 2 different ones are only 1 to the model")
    assert f"“{texts[0]}” = “{texts[1]}”" in note and "Remove" not in note
    assert same_words({text: words[text] for text in texts[1:]}) == [] == same_words({})


def test_letters_that_the_text_encoder_does_not_know():
    assert KONTEXT.unknown("Ersetze den STUHL über der Straße") == (0, 28)
    assert KONTEXT.unknown("把椅子 ok") == (3, 5)
    assert KONTEXT.unknown("ﬁne Ｆ") == (0, 5), "as T5 folds letters that look another way"
    assert EditModel().unknown("把椅子") == (0, 3), "a model that reads every script"


def test_where_the_picture_is_read_each_pair_has_its_own(tmp_path):
    """As for models whose text encoder sees the before picture: here one whose 'tokens' are that picture's mean."""

    class Seeing(Kontext):
        reads_picture = True

        def encode(self, pipeline, caption, before):
            return {"tokens": before.mean().expand(1, 1).clone(), "pooled": before[0, 0]}

    pairs, loads = asked(PROMPT, PROMPT, "Another."), []
    (made,) = encode_captions(Seeing(), [pairs], lambda: loads.append(1), "f", tmp_path)
    assert [c.pooled.tolist() for c in made] == [pairs.load(i).before[0, 0].tolist() for i in range(3)]
    (again,) = encode_captions(Seeing(), [pairs], lambda: loads.append(1), "f", tmp_path)
    assert loads == [1] and all(torch.equal(a.pooled, b.pooled) for a, b in zip(made, again))


def test_captions_that_were_of_no_use_for_long_are_pruned_like_all_else(files, tmp_path):
    import os

    from editloss_core.cache import TensorCache

    encode_captions(KONTEXT, [asked(PROMPT)], lambda: files.load_text(CPU), files.text_fingerprint, tmp_path)
    (path,) = (tmp_path / "captions").iterdir()
    os.utime(path, (1, 1))
    TensorCache(tmp_path).prune(limit=1)
    assert not path.exists()


def test_the_fingerprint_of_folders_sees_small_files_and_the_time_of_large_ones(tmp_path):
    import os

    (tmp_path / "a").mkdir()
    small, large = tmp_path / "a" / "config.json", tmp_path / "a" / "model.safetensors"
    small.write_text("1")
    with open(large, "wb") as file:
        file.truncate(17_000_000)
    first = hash_folders([tmp_path / "a"])
    os.utime(small, (1, 1))
    assert hash_folders([tmp_path / "a"]) == first != hash_folders([tmp_path / "a"], "bf16")
    small.write_text("2")
    second = hash_folders([tmp_path / "a"])
    os.utime(large, (1, 1))
    assert len({first, second, hash_folders([tmp_path / "a"])}) == 3
