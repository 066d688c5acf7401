"""What every edit model of the registry has to say, and what is asked of it by name."""

import pytest
import torch

from editloss_core.models import registry
from editloss_core.models.base import NOT_IN_DIFFUSERS, PRESETS, EditModel, Preview
from editloss_core.models.registry import MODELS

EACH = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)


@EACH
def test_a_model_says_all_that_is_asked_of_it(model):
    assert isinstance(model, EditModel) and model.id == model.id.lower() and model.title
    assert tuple(model.layers) == PRESETS and all(model.layers.values())
    assert len({m.id for m in MODELS}) == len(MODELS)
    pipelines = [m.parts.pipeline for m in MODELS if m.parts is not NOT_IN_DIFFUSERS]
    assert len(set(pipelines)) == len(pipelines)
    for name in ("mu", "encode", "caption", "velocity", "stock_velocity"):
        said = getattr(type(model), name) is not getattr(EditModel, name)
        assert said or (model.parts is NOT_IN_DIFFUSERS and name != "mu"), name
    assert (model.parts is NOT_IN_DIFFUSERS) == model.names.comfyui_alone, "without a pipeline there is one dialect"
    assert (model.preview_cfg == 1.0) or model.guidance is None, "guidance is embedded, or made of two passes"


@EACH
def test_it_is_found_by_the_names_of_its_classes(model):
    assert registry.of_comfyui(model.comfyui_model) is model and registry.of_network(model.comfyui_network) is model
    if model.parts is not NOT_IN_DIFFUSERS:
        assert registry.of_pipeline(model.parts.pipeline) is model
        assert registry.of_network(model.parts.transformer) is model
    layer = next(iter(model.names.blocks))
    ours = f"{layer[0]}.0.{next(iter(layer[2]))}"
    assert registry.of_layers([ours], comfyui=True) is model
    assert registry.of_layers(model.names.diffusers(ours), comfyui=False) is model


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
        (lambda: registry.of_pipeline("FluxPipeline"), "got a folder of FluxPipeline: it has no reference"),
        (lambda: registry.of_pipeline(None), "got a folder of None"),
    ],
)
def test_what_is_unknown_is_refused_by_name_with_the_list_of_what_is_known(ask, found):
    with pytest.raises(ValueError, match="expected an edit model that is known") as refused:
        ask()
    assert found in str(refused.value) and all(model.title in str(refused.value) for model in MODELS)


def test_nothing_that_is_known_is_refused():
    assert not registry.REFUSED.keys() & {name for m in MODELS for name in (m.comfyui_model, m.parts.pipeline)}


def test_a_lora_of_no_known_model_is_refused():
    with pytest.raises(
        ValueError,
        match=rf"no known model \({registry.titles()}\) has a layer 'blocks.0.attn' in ComfyUI's names",
    ):
        registry.of_layers(["blocks.0.attn"], comfyui=True)
    assert registry.of_network("QwenImageTransformer2DModel") is None


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
    made = model.sample(two, noise, [], ["caption"] * 2, 1, Preview(2.5, 4.0, "nothing"))
    assert two.asked[1:] == [(2.5, "caption"), (2.5, "nothing")] and two.guidance == half
    assert torch.allclose(made, noise - (3 + 4 * (1 - 3)) * noise)  # v = n + cfg · (p − n)
    with pytest.raises(ValueError, match="negative: expected it with cfg 4, got none"):
        model.sample(two, noise, [], ["caption"] * 2, 1, Preview(cfg=4.0))
