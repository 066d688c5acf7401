"""What holds for every edit model of the registry: a new one is tried by its line there."""

from __future__ import annotations

import pytest
import torch

from editloss_core.models import registry
from editloss_core.models.base import PRESETS, EditModel, LayerNames, Preview
from editloss_core.models.registry import MODELS

each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)


def layers(names: LayerNames) -> list[str]:
    """ComfyUI's names of all kinds of layers, in blocks those of the fourth."""
    inside = [f"{ours}.3.{layer}" for ours, _, rows in names.blocks for layer in rows]
    return [*inside, *names.outside]


def test_ids_are_told_apart_and_unknown_ones_refused_by_name():
    for facts in ("id", "title", "comfyui_model"):
        assert len({getattr(model, facts) for model in MODELS}) == len(MODELS), facts
    assert len({model.parts.pipeline for model in MODELS}) == len(MODELS)
    for find in (registry.by_id, registry.of_comfyui, registry.of_pipeline):
        with pytest.raises(ValueError, match="expected an edit model that is known .*got .*Unheard"):
            find("Unheard")
    assert registry.of_network("Unheard") is None


@each_model
def test_it_is_found_by_what_a_program_knows_of_it(model):
    assert registry.by_id(model.id) is registry.of_comfyui(model.comfyui_model) is model
    assert registry.of_pipeline(model.parts.pipeline) is model
    for network in (model.comfyui_network, model.parts.transformer):
        assert registry.of_network(network).layers == model.layers
    assert model.title in registry.titles()


@each_model
def test_its_classes_are_in_diffusers_and_transformers(model):
    programs = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    parts = model.parts
    assert set(parts.texts) >= {folder for folder, _, _ in parts.text_widths}
    for name in (parts.pipeline, parts.transformer, parts.autoencoder, *parts.decoders):
        assert hasattr(programs[0], name), name
    for name in parts.texts.values():
        assert hasattr(programs[1], name), name


@each_model
def test_its_layers_have_a_name_in_both_programs_and_the_presets_take_some(model):
    assert list(model.layers) == list(PRESETS)
    theirs = {}
    for layer in layers(model.names):
        for part, name in enumerate(model.names.diffusers(layer)):
            assert model.names.comfyui(name) == (layer, part)
            theirs[name] = layer
    assert theirs and set(model.names.swapped) <= set(theirs.values())
    assert registry.of_layers(layers(model.names), comfyui=True).names == model.names
    assert registry.of_layers(list(theirs), comfyui=False).names == model.names


@each_model
def test_noise_levels_go_from_noise_to_a_picture(model):
    for steps in (1, 4, model.preview_steps):
        times = model.times(model.tokens(torch.zeros(1, 4, 96, 128)), steps)
        assert times.shape == (steps + 1,) and times[0] == 1 and times[-1] == 0
        assert (times.diff() < 0).all()


@each_model
def test_a_picture_is_sampled_with_and_without_cfg(model):
    """Velocity ε − x0 of a known picture leads to it, whatever the schedule; guided away from a second one, beyond it."""
    noise, picture, other = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    class Known:
        asked: list = []

        def told(self, guidance):
            self.asked.append(guidance)
            return self

        def __call__(self, x_t, t, references, conditioning):
            return noise - conditioning[0]

    found = model.sample(Known(), noise, [noise], [picture], steps=3)
    assert torch.allclose(found, picture, atol=1e-5) and Known.asked == []
    found = model.sample(Known(), noise, [noise], [picture], 3, Preview(2.0, 3.0, other))
    guided = noise - model.guided(noise - picture, noise - other, 3.0)
    assert torch.allclose(found, guided, atol=1e-5) and Known.asked == [2.0]
    with pytest.raises(ValueError, match="negative: expected it with cfg 3, got none"):
        model.sample(Known(), noise, [noise], [picture], 3, Preview(cfg=3.0))


@each_model
def test_it_says_how_captions_and_velocity_are_made(model):
    made = ("mu", "encode", "caption", "velocity", "stock_velocity")
    assert [name for name in made if getattr(type(model), name) is getattr(EditModel, name)] == []
