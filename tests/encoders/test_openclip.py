"""OpenCLIPEncoder against open_clip itself."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_networks import CLIPS, assert_close_to_pil

from editloss_core.encoders import OpenCLIPEncoder


@pytest.mark.parametrize("name", CLIPS)
def test_global_is_encode_image(name, clips, pictures):
    encoder = OpenCLIPEncoder(name, clips[name].file)
    with torch.no_grad():
        expected = clips[name].model.encode_image(encoder.preprocess(pictures))
    expected = expected[0] if name == "tiny-coca" else expected  # a tower that returns tokens as well
    torch.testing.assert_close(encoder(pictures), expected, rtol=1e-5, atol=1e-5)
    unit = OpenCLIPEncoder(name, clips[name].file, normalize=True)
    torch.testing.assert_close(unit(pictures), torch.nn.functional.normalize(expected, dim=-1), rtol=1e-5, atol=1e-5)


def _hooked(module, run):
    seen = []
    handle = module.register_forward_hook(lambda m, args, output: seen.append(output))
    with torch.no_grad():
        run()
    handle.remove()
    return seen[-1]


def test_tokens_are_those_that_the_model_pools(clips, pictures):
    """Taken from the library's own forward by hooks on the last modules before pooling."""
    where = {
        "tiny-vit": lambda v: v.ln_post,
        "tiny-coca": lambda v: v.attn_pool.ln_k,
        "tiny-siglip": lambda v: v.trunk.norm,
        "tiny-resnet": lambda v: v.layer4,
        "tiny-convnext": lambda v: v.trunk.stages,
    }
    for name, module in where.items():
        encoder = OpenCLIPEncoder(name, clips[name].file, "tokens")
        visual, pixels = clips[name].model.visual, encoder.preprocess(pictures)
        expected = _hooked(module(visual), lambda: visual(pixels))
        if expected.ndim == 4:
            expected = expected.flatten(2).mT
        elif name != "tiny-siglip":
            expected = expected[:, 1:]
        prefix = getattr(getattr(visual, "trunk", None), "num_prefix_tokens", 0)
        torch.testing.assert_close(encoder(pictures), expected[:, prefix:], rtol=1e-5, atol=1e-5)


def test_tokens_are_row_major_over_the_grid(clips, pictures):
    tokens = OpenCLIPEncoder("tiny-vit", clips["tiny-vit"].file, "tokens")
    grid = OpenCLIPEncoder("tiny-vit", clips["tiny-vit"].file, "grid")
    assert torch.equal(tokens(pictures), grid(pictures).flatten(1, 2))


@pytest.mark.parametrize("crop, resize_mode", [(False, "squash"), (True, "shortest")])
def test_preprocessing_is_close_to_open_clips_own(crop, resize_mode, clips, photo):
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    encoder = OpenCLIPEncoder("tiny-vit", clips["tiny-vit"].file, crop=crop)
    own = image_transform_v2(PreprocessCfg(size=32, resize_mode=resize_mode), is_train=False)
    ours = encoder.preprocess(torch.from_numpy(photo)[None].float() / 255)
    assert_close_to_pil(ours, own(Image.fromarray(photo))[None], encoder.preprocess.std)


def test_mean_and_std_belong_to_the_weights():
    from editloss_core.encoders.openclip import _preprocess_cfg

    assert tuple(_preprocess_cfg("ViT-B-16-SigLIP", "", False)["mean"]) == (0.5, 0.5, 0.5)
    assert _preprocess_cfg("ViT-L-14", "", False)["mean"][0] == pytest.approx(0.48145466)
    assert tuple(_preprocess_cfg("ViT-L-14", "laion2b_s32b_b82k", False)["mean"]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="did you mean laion2b_s34b_b79k"):
        _preprocess_cfg("ViT-B-32", "laion2b_s34b_b79", False)
    with pytest.raises(ValueError, match="QuickGELU; choose the …-quickgelu architecture"):
        _preprocess_cfg("ViT-B-32", "openai", False)
    assert _preprocess_cfg("ViT-B-32-quickgelu", "openai", True)


@pytest.mark.parametrize("prefix", ["visual.", ""])
def test_a_file_of_the_image_tower_alone(prefix, clips, tmp_path, pictures):
    whole = load_file(clips["tiny-vit"].file)
    tower = {prefix + k[len("visual.") :]: v for k, v in whole.items() if k.startswith("visual.")}
    save_file(tower, tmp_path / "tower.safetensors")
    first, second = (OpenCLIPEncoder("tiny-vit", f) for f in (clips["tiny-vit"].file, tmp_path / "tower.safetensors"))
    assert first.info == second.info and torch.equal(first(pictures), second(pictures))


def test_wrong_weights_are_named(clips, tmp_path):
    whole = load_file(clips["tiny-vit"].file)
    whole["visual.proj"] = torch.zeros(64, 16)
    del whole["visual.ln_post.bias"]
    whole["visual.extra"] = torch.zeros(1)
    save_file(whole, tmp_path / "bad.safetensors")
    with pytest.raises(
        ValueError,
        match=r"^weights: bad.safetensors does not fit the image tower of tiny-vit, .*: 1 missing \(ln_post.bias\); 1 of another shape \(proj \[64, 16\] instead of "
        r"\[64, 32\]\); 1 not known to the network \(extra\)",
    ):
        OpenCLIPEncoder("tiny-vit", tmp_path / "bad.safetensors")
    save_file({"vision_model.embeddings.class_embedding": torch.zeros(8)}, tmp_path / "hf.safetensors")
    with pytest.raises(ValueError, match="transformers' layout.*load it as CLIP_VISION"):
        OpenCLIPEncoder("tiny-vit", tmp_path / "hf.safetensors")
    with pytest.raises(ValueError, match="expected a .safetensors file, got model.pt; convert it with python -m"):
        OpenCLIPEncoder("tiny-vit", tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        OpenCLIPEncoder("tiny-vit", tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(clips["tiny-vit"].file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        OpenCLIPEncoder("tiny-vit", tmp_path / "cut.safetensors")


def test_weights_of_another_tower_say_so(clips):
    with pytest.raises(
        ValueError,
        match="^weights: tiny-resnet.safetensors holds another network than the image tower of tiny-vit; set",
    ):
        OpenCLIPEncoder("tiny-vit", clips["tiny-resnet"].file)


@pytest.mark.parametrize(
    "name, first",
    [("ViT-L/14", "ViT-L-14"), ("ViT-L/14@336px", "ViT-L-14"), ("vit-l-14", "ViT-L-14"), ("ViT-B/32", "ViT-B-32")],
)
def test_openais_names_find_the_architecture(name, first):
    with pytest.raises(ValueError, match=f"is unknown; did you mean {first}[,?]"):
        OpenCLIPEncoder(name, random_seed=0)


def test_wrong_arguments_are_named(clips):
    file = clips["tiny-vit"].file
    with pytest.raises(ValueError, match="'ViT-B32' is unknown; did you mean .*ViT-B-32"):
        OpenCLIPEncoder("ViT-B32", file)
    with pytest.raises(ValueError, match="output: expected one of global, tokens, grid"):
        OpenCLIPEncoder("tiny-vit", file, "cls")
    with pytest.raises(ValueError, match="weights: expected a .safetensors file, or None with random_seed"):
        OpenCLIPEncoder("tiny-vit")
    with pytest.raises(ValueError, match="fixed positions for 32×32 pixels and cannot give tokens at 64×64"):
        OpenCLIPEncoder("tiny-vit", file, "tokens", image_size=64)
    with pytest.raises(ValueError, match="cannot give global"):
        OpenCLIPEncoder("tiny-resnet", clips["tiny-resnet"].file, image_size=96)


def test_conv_towers_take_other_sizes(clips, pictures):
    resnet = OpenCLIPEncoder("tiny-resnet", clips["tiny-resnet"].file, "grid", image_size=(96, 128))
    assert resnet(pictures).shape[1:3] == resnet.grid(44, 52) == (3, 4)
    convnext = OpenCLIPEncoder("tiny-convnext", clips["tiny-convnext"].file, image_size=(96, 128))
    assert convnext(pictures).shape == (2, 32)


def test_random_networks_are_reproducible_and_leave_the_global_state_alone(clips):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = (OpenCLIPEncoder("tiny-vit", random_seed=s).info.fingerprint for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert first == again != other


@pytest.mark.slow
def test_a_real_architecture_is_built_without_its_text_tower():
    """RN50 at full size, 38 M parameters; the whole CLIP has 102 M."""
    encoder = OpenCLIPEncoder("RN50", random_seed=0, output="grid")
    assert sum(p.numel() for p in encoder.network.parameters()) < 40e6
    assert encoder(torch.rand(1, 64, 64, 3)).shape == (1, 7, 7, 2048)
