"""What every edit model of the registry has to say, and what is asked of it by name."""

import re

import pytest
import torch

from editloss_core.models import registry
from editloss_core.models.base import NOT_IN_DIFFUSERS, PRESETS, EditModel, Preview
from editloss_core.models.qwen import QWEN_EDIT
from editloss_core.models.registry import MODELS

# Names by which models are told apart that share a class.
FILES = {
    "flux2_klein": "flux-2-klein-9b-fp8.safetensors",
    "qwen_image_edit": "qwen_image_edit_fp8_e4m3fn.safetensors",
    "qwen_image_edit_2511": "qwen_image_edit_2511_fp8mixed.safetensors",
}
EACH = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)


@EACH
def test_a_model_says_all_that_is_asked_of_it(model):
    assert isinstance(model, EditModel) and model.id == model.id.lower() and model.title
    assert tuple(model.layers) == PRESETS and all(model.layers.values())
    assert len({m.id for m in MODELS}) == len(MODELS)
    for name in ("mu", "encode", "caption", "velocity", "stock_velocity"):
        said = getattr(type(model), name) is not getattr(EditModel, name)
        assert said or (model.parts is NOT_IN_DIFFUSERS and name != "mu"), name
    assert model.parts is not NOT_IN_DIFFUSERS or not model.diffusers_loads_lora
    assert (model.preview_cfg == 1.0) or model.guidance is None, "guidance is embedded, or made of two passes"


@EACH
def test_it_is_found_by_the_names_of_its_classes(model):
    assert registry.of_id(model.id) is model
    assert registry.of_comfyui(model.comfyui_model, model.comfyui_config, FILES.get(model.id, "")) is model
    sizes = {layer: model.names.shapes.get(layer.split(".", 2)[-1], (1, 1)) for layer in all_layers(model)}
    theirs = {name: (1, 1) for layer in sizes for name in model.names.diffusers(layer)}
    networks = [registry.of_network(model.comfyui_network, sizes)]
    if model.parts is not NOT_IN_DIFFUSERS:
        index = {"_class_name": model.parts.pipeline, **model.parts.index}
        assert registry.of_pipeline(index, model.parts.config) is model
        networks.append(registry.of_network(model.parts.transformer, theirs))
    for found in networks:
        assert found.names is model.names and found.layers is model.layers


def all_layers(model):
    names = model.names
    return [f"{blocks}.0.{inner}" for blocks, _, inside in names.blocks for inner in inside] + list(names.outside)


@EACH
def test_it_is_found_by_the_names_of_all_its_layers_in_both_programs(model):
    names = model.names
    ours = {layer: names.shapes.get(layer.split(".", 2)[-1], (1, 1)) for layer in all_layers(model)}
    theirs = {part: (1, 1) for layer in ours for part in names.diffusers(layer)}
    assert registry.of_layers(theirs, comfyui=False).names is names
    if model.id != "longcat_image_edit":  # in ComfyUI all of its names are FLUX.1's, which has more
        assert registry.of_layers(ours, comfyui=True).names is names
    assert registry.of_layers(ours, True, model.id) is registry.of_layers(theirs, False, model.id) is model


def sized(*layers):
    return dict.fromkeys(layers, (1, 1))


def test_layers_that_mean_something_else_by_model_are_not_guessed():
    """Attention's of FLUX.1 and of Qwen are called the same in diffusers, and otherwise in ComfyUI."""
    layers = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj"]
    with pytest.raises(
        ValueError, match="model: 'transformer_blocks.0.attn.to_q' and all the others are diffusers'"
    ) as refused:
        registry.of_layers(sized(*layers), comfyui=False)
    assert "flux_kontext" in str(refused.value) and "qwen_image_edit_plus" in str(refused.value)
    # The same ones in ComfyUI's dialect are Qwen's alone; others beside them are FLUX.1's alone.
    of = registry.of_layers
    assert of(sized(*layers), comfyui=True).names is QWEN_EDIT.names
    assert of(sized(*layers, "single_transformer_blocks.0.attn.to_q"), comfyui=False).id == "flux_kontext"
    assert of(sized(*layers, "transformer_blocks.0.img_mlp.net.2"), comfyui=False).names is QWEN_EDIT.names


@pytest.mark.parametrize(
    "model", [model for model in MODELS if model.parts is not NOT_IN_DIFFUSERS], ids=lambda model: model.id
)
def test_its_classes_are_in_diffusers_and_transformers(model):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    parts = model.parts
    for name in (parts.pipeline, parts.transformer, parts.autoencoder, *parts.decoders):
        assert hasattr(diffusers, name), name
    assert [name for name in parts.texts.values() if not hasattr(transformers, name)] == []
    assert {folder for folder, _, _ in parts.text_widths} <= set(parts.texts)


@EACH
def test_names_of_layers_go_both_ways(model):
    names = model.names
    layers = [f"{ours}.7.{inner}" for ours, _, inside in names.blocks for inner in inside] + list(names.outside)
    for layer in layers:
        assert [names.comfyui(part) for part in names.diffusers(layer)] == [
            (layer, i) for i in range(len(names.diffusers(layer)))
        ]
    assert names.comfyui("no.such.layer") == ("", 0) and names.diffusers("no.such.layer") == ()
    assert set(names.swapped) <= set(layers)


@EACH
def test_noise_levels_fall_from_one_to_nothing_and_do_not_fall_with_the_size(model):
    for steps in (1, 4, 20):
        times = model.times(1024, steps)
        assert times[0] == 1 and times[-1] == 0 and len(times) == steps + 1 and bool((times.diff() < 0).all())
    assert model.mu(4096, 20) >= model.mu(256, 20)


@pytest.mark.parametrize(
    ("ask", "found"),
    [
        (lambda: registry.of_comfyui("Ideogram4"), "got ComfyUI's Ideogram4"),
        (lambda: registry.of_comfyui("Chroma"), "got ComfyUI's Chroma: it takes a reference and does not look at it"),
        (lambda: registry.of_comfyui("Flux2"), "got ComfyUI's Flux2"),
        (
            lambda: registry.of_pipeline({"_class_name": "FluxPipeline"}),
            "got a folder of FluxPipeline: it has no reference",
        ),
        (lambda: registry.of_pipeline({"_class_name": None}), "got a folder of None"),
    ],
)
def test_what_is_unknown_is_refused_by_name_with_the_list_of_what_is_known(ask, found):
    with pytest.raises(ValueError, match="expected an edit model that is known") as refused:
        ask()
    assert found in str(refused.value) and all(model.title in str(refused.value) for model in MODELS)


def test_nothing_that_is_known_is_refused():
    refused = registry.REFUSED.keys() & {name for m in MODELS for name in (m.comfyui_model, m.parts.pipeline)}
    assert refused == {"QwenImage"}, "of which some files are refused"
    for model in MODELS:
        assert registry.of_comfyui(model.comfyui_model, model.comfyui_config).comfyui_model == model.comfyui_model


def test_a_lora_of_no_known_model_is_refused():
    with pytest.raises(
        ValueError,
        match=rf"no known model \({re.escape(registry.titles())}\) has a layer 'blocks.0.attn' in ComfyUI's names",
    ):
        registry.of_layers({"blocks.0.attn": (1, 1)}, comfyui=True)
    assert registry.of_network("ChromaTransformer2DModel") is None


class Two:
    """v = x for the caption, 3·x for the negative; remembers what it was told."""

    def __init__(self, guidance=1.0):
        self.guidance, self.asked = guidance, []

    def told(self, guidance):
        other = Two(guidance)
        other.asked = self.asked
        return other

    def __call__(self, x, t, references, conditioning):
        self.asked.append((self.guidance, conditioning[0]))
        return x if conditioning[0] == "caption" else 3 * x


def test_previews_are_sampled_with_and_without_classifier_free_guidance():
    model, noise = MODELS[0], torch.ones(2, 4, 4, 4)
    two, half = Two(), 1.0
    plain = model.sample(two, noise, [], ["caption"] * 2, 1)
    assert torch.equal(plain, noise - noise) and two.asked == [(1.0, "caption")]
    made = model.sample(two, noise, [], ["caption"] * 2, 1, Preview(2.5, 4.0, ["nothing"] * 2))
    assert two.asked[1:] == [(2.5, "caption"), (2.5, "nothing")] and two.guidance == half
    assert torch.allclose(made, noise - (3 + 4 * (1 - 3)) * noise)  # v = n + cfg · (p − n)
    with pytest.raises(ValueError, match="negatives: expected one for each of 2 samples with cfg 4, got 1"):
        model.sample(two, noise, [], ["caption"] * 2, 1, Preview(cfg=4.0, negatives=["nothing"]))


QKV, MLP = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0"


def test_a_lora_of_names_that_several_models_have_goes_by_sizes_by_the_header_or_by_who_asks():
    of = registry.of_layers
    assert of({QKV: (8, 24), MLP: (8, 32)}, True).id == "flux_kontext"
    assert of({QKV: (8, 24), MLP: (8, 48)}, True).names is of({"single_stream_modulation.lin": (8, 24)}, True).names
    with pytest.raises(ValueError, match="are ComfyUI's names of layers of FLUX.1 Kontext, of FLUX.2 dev"):
        of({QKV: (8, 24)}, True)
    assert [of({QKV: (8, 24)}, True, told).id for told in ("flux2_dev", "flux_kontext")] == [
        "flux2_dev",
        "flux_kontext",
    ]
    # What both call the same in the other program is no question.
    assert of({"transformer_blocks.0.attn.to_q": (8, 8), "context_embedder": (8, 8)}, False).id == "flux_kontext"
    with pytest.raises(ValueError, match="FLUX.1 Kontext has no layer 'single_stream_modulation.lin' in ComfyUI's"):
        of({"single_stream_modulation.lin": (8, 24)}, True, "flux_kontext")
    with pytest.raises(ValueError, match="got 'sdxl'; the names are flux_kontext, flux2_dev"):
        of({QKV: (8, 24)}, True, "sdxl")
    # Of a layer that nobody has, the model that has the most of the others is asked.
    with pytest.raises(ValueError, match="has a layer 'single_blocks.0.x' in"):
        of(
            {
                "single_stream_modulation.lin": (8, 24),
                "double_blocks.0.img_mlp.0": (8, 48),
                "single_blocks.0.x": (1, 1),
            },
            True,
        )


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("flux-2-klein-4b-fp8.safetensors", "flux2_klein"),
        ("FLUX.2-klein-9B.gguf", "flux2_klein"),
        ("flux-2-klein-base-4b.safetensors", "flux2_klein_base"),
        ("my_flux2.safetensors", "flux2_klein_base"),
        ("", "flux2_klein_base"),
    ],
)
def test_kleins_are_told_apart_by_the_name_of_their_file(file, found):
    assert registry.of_comfyui("Flux2", {"guidance_embed": False}, file).id == found
    assert registry.of_comfyui("Flux2", {"guidance_embed": True}, file).id == "flux2_dev"


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("qwen_image_edit_bf16.safetensors", "qwen_image_edit"),
        ("Qwen-Image-Edit-Q4_K_M.gguf", "qwen_image_edit"),
        ("qwen_image_edit_2509_fp8_e4m3fn.safetensors", "qwen_image_edit_plus"),
        ("Qwen-Image-Edit-2511-Q4_K_M.gguf", "qwen_image_edit_2511"),
        ("qwen-image-for-edits.safetensors", "qwen_image_edit_plus"),
        ("my_merge.safetensors", "qwen_image_edit_plus"),
        ("", "qwen_image_edit_plus"),
    ],
)
def test_those_of_qwen_are_told_apart_by_the_name_of_their_file_or_by_a_key_in_it(file, found):
    assert registry.of_comfyui("QwenImage", {}, file).id == found
    assert (
        registry.of_comfyui("QwenImage", {"default_ref_method": "index_timestep_zero"}, file).id
        == "qwen_image_edit_2511"
    )
    with pytest.raises(ValueError, match="got ComfyUI's QwenImage.*: Qwen-Image makes pictures of words alone"):
        registry.of_comfyui("QwenImage", {"use_additional_t_cond": True, "default_ref_method": "negative_index"}, file)


@pytest.mark.parametrize(
    "file", ["qwen_image_fp8_e4m3fn.safetensors", "qwen_image_2512_bf16.safetensors", "Qwen-Image-Q4_K_M.gguf"]
)
def test_a_file_of_qwen_image_that_edits_nothing_is_refused_by_its_name(file):
    with pytest.raises(
        ValueError, match=rf"QwenImage of {file}: .*words alone.* say which in edit_model of Run Options"
    ):
        registry.of_comfyui("QwenImage", {}, file)
