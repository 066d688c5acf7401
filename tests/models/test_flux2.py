"""FLUX.2 by diffusers: the pipelines' own numbers, gradients that are right, captions, folders that do not fit."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest

pytest.importorskip("diffusers")

import torch
from small_flux2 import transformer, write_flux2
from small_qwen import draw

from editloss_core.lora.lora import LoRA, LoRASettings
from editloss_core.models.autoencoder import VAEDecoder, vae_decoder_encoder, vae_encoder
from editloss_core.models.captions import encode_captions
from editloss_core.models.denoiser import DiffusersDenoiser
from editloss_core.models.flux2 import (
    FLUX2_DEV,
    FLUX2_KLEIN,
    FLUX2_KLEIN_BASE,
    Caption,
    patchify,
    positions,
    text_positions,
    tokens,
    unpatchify,
)
from editloss_core.models.folder import ModelFolder
from editloss_core.pairs import PairSet

CPU = torch.device("cpu")
PROMPT = "Make it a square."
BOTH = pytest.mark.parametrize("kind", ["dev", "klein"])
MODELS = {"dev": FLUX2_DEV, "klein": FLUX2_KLEIN_BASE}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_flux2(tmp_path_factory.mktemp(kind) / "model", dev=kind == "dev") for kind in MODELS}


@pytest.fixture(scope="module")
def files(folders):
    return {kind: ModelFolder(folder, dtype="fp32") for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def pipelines(folders):
    import diffusers

    found = {}
    for kind, folder in folders.items():
        name = MODELS[kind].parts.pipeline
        found[kind] = getattr(diffusers, name).from_pretrained(folder, local_files_only=True)
        found[kind].set_progress_bar_config(disable=True)
    return found


def asked(*captions):
    """Pairs of these captions."""
    pictures = torch.rand(len(captions), 64, 64, 3, generator=torch.Generator().manual_seed(2))
    pairs = PairSet.from_images(pictures, 1 - pictures, None, "-", names=[f"p{i}" for i in range(len(captions))])
    return replace(pairs, pairs=tuple(replace(p, caption=c) for p, c in zip(pairs, captions)))


def picture(height, width):
    from PIL import Image

    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()), pixels[None].float() / 255


def called(pipeline, image, **options):
    """What the pipeline gave its transformer at every step, and what came back."""
    seen = []
    hook = pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    try:
        pipeline(
            image=image, prompt=PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(3),
            output_type="latent", **options,
        )  # fmt: skip
    finally:
        hook.remove()
    return seen


def test_tokens_positions_and_schedule_are_the_pipelines(pipelines):
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    pipeline, z = pipelines["klein"], draw(2, 4, 6, 10)
    packed = pipeline._patchify_latents(z)
    assert torch.equal(patchify(z), packed) and torch.equal(unpatchify(packed), z)
    assert torch.equal(tokens(packed), pipeline._pack_latents(packed))
    made = [draw(1, 16, 3, 5), draw(1, 16, 2, 4)]
    ids = torch.cat([pipeline._prepare_latent_ids(packed)[0], pipeline._prepare_image_ids(made)[0]])
    assert torch.equal(positions(3, 5, 3, 5, 2, 4), ids)
    assert torch.equal(text_positions(7), pipeline._prepare_text_ids(draw(1, 7, 4))[0])
    for count in (256, 4096, 4300, 4301, 9216):
        for steps in (4, 20, 50):
            assert FLUX2_DEV.mu(count, steps) == pytest.approx(compute_empirical_mu(count, steps), abs=1e-12)
    assert FLUX2_KLEIN.mu(4096) == FLUX2_KLEIN.mu(4096, 50) and FLUX2_DEV.mu(4096, 20) == pytest.approx(2.2, abs=0.01)


@BOTH
def test_a_forward_pass_is_the_pipelines(kind, files, pipelines):
    """From the picture and the caption on: latents, reference, positions, time, guidance, text and noise levels are all ours."""
    height, width = 64, 96
    pipeline, model, file = pipelines[kind], MODELS[kind], files[kind]
    image, pixels = picture(height, width)
    steps = called(pipeline, image, guidance_scale=2.5 if kind == "dev" else 1.0)
    (caption,) = encode_captions(model, [asked(PROMPT)], lambda: file.load_text(CPU), file.text_fingerprint)[0]
    assert file.edit_model is model
    denoiser = DiffusersDenoiser(model, file.load_transformer(CPU), guidance=2.5)
    reference = vae_encoder(file.load_vae(CPU)).latents(pixels)
    assert reference.shape == (1, 16, 4, 6) and len(steps) == 3
    times = model.times(24, 3)
    for (given, theirs), t in zip(steps, times):
        assert given["timestep"].item() == pytest.approx(t.item(), abs=1e-5)
        x_t = given["hidden_states"][:, :24].transpose(1, 2).unflatten(2, (4, 6))
        with torch.no_grad():
            mine = denoiser(x_t, given["timestep"], [reference], [caption])
        assert torch.allclose(tokens(mine), theirs[:, :24], rtol=1e-5, atol=1e-5)
        assert torch.equal(given["img_ids"][0], positions(4, 6, 4, 6))
    # and each of them matters: the comparison would see a wrong one
    given = steps[0][0]
    right = denoiser(x_t, given["timestep"], [reference], [caption])
    others = [denoiser(x_t, 0.9 * given["timestep"], [reference], [caption])]
    others += [denoiser(x_t, given["timestep"], [reference.flip(-1)], [caption])]
    others += [denoiser(x_t, given["timestep"], [reference], [Caption(1.1 * caption.tokens)])]
    told = denoiser.told(1.0)(x_t, given["timestep"], [reference], [caption])
    assert all((other - right).abs().max() > 1e-4 for other in others)
    assert ((told - right).abs().max() > 1e-4) == (kind == "dev"), "guidance is embedded in dev alone"


def test_in_bfloat16_it_is_the_pipelines_too(folders):
    """Wide enough that a position rounded to bfloat16 would be another one."""
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(folders["klein"], dtype=torch.bfloat16, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image, _ = picture(64, 128)
    steps = called(pipeline, image, guidance_scale=1.0)
    half = ModelFolder(folders["klein"], dtype="bf16")
    (caption,) = encode_captions(FLUX2_KLEIN_BASE, [asked(PROMPT)], lambda: half.load_text(CPU), "")[0]
    denoiser = DiffusersDenoiser(FLUX2_KLEIN_BASE, half.load_transformer(CPU))
    for given, theirs in steps:
        latents = [x.transpose(1, 2).unflatten(2, (4, 8)).float() for x in given["hidden_states"].chunk(2, 1)]
        with torch.no_grad():
            mine = denoiser(latents[0], given["timestep"].float(), [latents[1]], [caption])
        assert torch.equal(tokens(mine), theirs[:, :32].float())
    assert denoiser.kept(positions, 4, 300).dtype == torch.int64


def trained(denoiser, layers="all"):
    lora = LoRA(denoiser.module, LoRASettings(rank=2, alpha=3.0, layers=layers), seed=1)
    with torch.no_grad():
        for i, layer in enumerate(lora.layers):
            layer.up.copy_(0.1 * draw(*layer.up.shape, seed=i))
    return lora


def gradients(denoiser, lora, t=0.6):
    x, caption = draw(1, 16, 2, 4).requires_grad_(), Caption(draw(5, 24, seed=3))
    with lora.attach() and torch.enable_grad():
        v = denoiser(x, torch.tensor([t]), [draw(1, 16, 2, 4, seed=1)], [caption])
        loss = (v - draw(1, 16, 2, 4, seed=2)).square().mean()
        found = torch.autograd.grad(loss, [x, *lora.parameters()])
    lora.detach()
    return loss.detach(), found


def test_checkpointing_changes_no_gradient_and_finite_differences_agree():
    found = []
    for checkpointing in (False, True):
        denoiser = DiffusersDenoiser(FLUX2_DEV, transformer(4, guidance=True), checkpointing=checkpointing)
        lora = trained(denoiser)
        found.append(gradients(denoiser, lora))
    (loss, plain), (_, again) = found
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(plain, again))
    assert all(g.abs().max() > 0 for g in plain)
    with torch.no_grad():  # along the gradient of all of the LoRA
        norm = sum(g.square().sum() for g in plain[1:]).sqrt()
        for p, g in zip(lora.parameters(), plain[1:]):
            p.add_(1e-3 * g / norm)
        moved, _ = gradients(denoiser, lora)
    assert (moved - loss) / 1e-3 == pytest.approx(float(norm), rel=0.05)


@pytest.mark.parametrize(
    ("preset", "count", "some", "none"),
    [
        ("attention", 10, "single_transformer_blocks.0.attn.to_qkv_mlp_proj", "transformer_blocks.0.ff.linear_in"),
        ("attention + MLP", 14, "transformer_blocks.0.ff_context.linear_out", "single_stream_modulation.linear"),
        ("all", 25, "time_guidance_embed.guidance_embedder.linear_2", None),
    ],
)
def test_the_presets_of_layers_know_the_names_of_diffusers(preset, count, some, none):
    made = LoRA(transformer(guidance=True), LoRASettings(rank=1, layers=preset))
    assert some in made.targets and none not in made.targets and len(made.targets) == count
    assert made.model.names is FLUX2_DEV.names


@BOTH
def test_what_the_self_check_asks_of_the_pipeline_is_the_same(kind):
    net = transformer(4, guidance=kind == "dev")
    denoiser = DiffusersDenoiser(MODELS[kind], net, guidance=3.0)
    x, reference, caption = draw(1, 16, 3, 5), draw(1, 16, 3, 5, seed=1), Caption(draw(6, 24, seed=2))
    with torch.no_grad():
        mine = denoiser(x, torch.tensor([0.7]), [reference], [caption])
        theirs = denoiser.stock_velocity(x, torch.tensor([0.7]), reference, caption)
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_batch_is_its_samples_and_references_may_have_other_sizes_and_be_several():
    denoiser = DiffusersDenoiser(FLUX2_KLEIN_BASE, transformer(4))
    captions = [Caption(draw(6, 24, seed=i)) for i in range(2)]
    x, reference, t = draw(2, 16, 4, 6), draw(2, 16, 3, 5, seed=1), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        both = denoiser(x, t, [reference], captions)
        for i, c in enumerate(captions):
            one = denoiser(x[i : i + 1], t[i : i + 1], [reference[i : i + 1]], [c])
            assert torch.allclose(both[i], one[0], atol=1e-5)
        two = FLUX2_KLEIN_BASE.velocity(denoiser, x, t, [reference, reference], captions)
    assert both.shape == x.shape and both.dtype == torch.float32 and (two - both).abs().max() > 1e-3


@BOTH
def test_captions_are_the_pipelines(kind, files, pipelines):
    file, model = files[kind], MODELS[kind]
    (made,) = encode_captions(model, [asked(PROMPT, "Remove the cat.")], lambda: file.load_text(CPU), "f")
    with torch.no_grad():
        theirs, _ = pipelines[kind].encode_prompt("Remove the cat.", max_sequence_length=512)
    assert made[1].tokens.shape == (512, 24) and torch.equal(made[1].tokens, theirs[0])
    assert torch.equal(model.words(made[1]), theirs[0]) and (made[0].tokens - made[1].tokens).abs().max() > 0.1


def test_decoding_is_the_pipelines_and_has_gradients_beyond_white(files, pipelines):
    pipeline, vae = pipelines["klein"], files["klein"].load_vae(CPU)
    decode, encoder = VAEDecoder(vae), vae_encoder(vae)
    pixels = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    theirs = pipeline._encode_vae_image(2 * pixels.movedim(-1, 1) - 1, None)
    assert torch.allclose(encoder.latents(pixels), theirs, atol=1e-5)
    assert encoder.info.name == "vae/autoencoderklflux2-16ch/grid" and encoder.downscale == 16
    z = draw(1, 16, 2, 3)
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    unpacked = pipeline._unpatchify_latents(z * deviation + vae.bn.running_mean.view(1, -1, 1, 1))
    theirs = pipeline.image_processor.postprocess(
        pipeline.vae.decode(unpacked, return_dict=False)[0].detach(), output_type="pt"
    )
    assert torch.allclose(decode(z), theirs.movedim(1, -1), atol=1e-5)
    z = (30 * z).requires_grad_()
    pictures = decode(z)
    assert pictures.max() == 1.0 and pictures.shape == (1, 32, 48, 3)
    assert torch.autograd.grad(pictures[pictures == 1.0].sum(), z)[0].abs().max() > 0
    features = vae_decoder_encoder(vae, (1, 2))
    assert features(pixels).shape[1:3] == torch.Size(features.grid(32, 48)) == (8, 12)


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        ("transformer", {"in_channels": 64}, r"expected in_channels 16 \(2×2 latents of 4 channels\), got 64: that is not FLUX.2 k"),
        ("text_encoder", {"hidden_size": 16}, "text_encoder: expected hidden_size 8, which the transformer takes 3 times, got 16"),
        ("text_encoder", {"architectures": ["MistralForCausalLM"]}, "text_encoder: expected a Qwen3ForCausalLM, got a MistralForC"),
        ("vae", {"_class_name": "AutoencoderKL"}, "vae: expected a AutoencoderKLFlux2, got a AutoencoderKL"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_together_is_refused(folders, tmp_path, part, changes, expected):
    folder = shutil.copytree(folders["klein"], tmp_path / "model")
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (fault,) = ModelFolder(folder).faults()
    assert re.search(expected, fault)


def test_a_single_file_of_flux1_is_refused(folders, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "flux1.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, file)
    (fault,) = ModelFolder(folders["dev"], file).faults()
    assert "expected FLUX.2 dev's transformer in the original layout" in fault
    save_file({"double_stream_modulation_img.lin.weight": torch.zeros(1)}, file)
    assert ModelFolder(folders["dev"], file).faults() == []


def test_whole_folders_have_no_fault_and_the_distilled_one_is_told_by_its_index(folders, files, tmp_path):
    assert all(file.faults() == [] for file in files.values())
    folder = shutil.copytree(folders["klein"], tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    model = ModelFolder(folder).edit_model
    assert model is FLUX2_KLEIN and (model.preview_cfg, model.preview_steps) == (1.0, 4)
    assert (FLUX2_KLEIN_BASE.preview_cfg, FLUX2_KLEIN_BASE.preview_steps) == (4.0, None)
    assert (FLUX2_DEV.preview_cfg, FLUX2_DEV.preview_guidance, FLUX2_DEV.guidance) == (1.0, 4.0, 1.0)
