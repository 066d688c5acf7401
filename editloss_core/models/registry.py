"""The edit models that are known, and who a class, a folder or a file belongs to.

What is not here is refused by name: a model that was never tried may ignore its reference, or train on a caption that should
have seen the picture, without a word.
"""

from __future__ import annotations

from typing import Callable, Collection, Optional

from .base import EditModel
from .kontext import KONTEXT
from .longcat import LONGCAT
from .qwen import QWEN_EDIT, QWEN_EDIT_PLUS

MODELS: tuple[EditModel, ...] = (KONTEXT, QWEN_EDIT_PLUS, QWEN_EDIT, LONGCAT)


def titles() -> str:
    """The known models, for a message."""
    return ", ".join(model.title for model in MODELS)


def _the(matches: Callable[[EditModel], bool], found: str) -> EditModel:
    model = next((model for model in MODELS if matches(model)), None)
    if model is None:
        raise ValueError(f"expected an edit model that is known ({titles()}), got {found}")
    return model


def of_id(id: str) -> EditModel:
    """By its permanent name."""
    return _the(lambda model: model.id == id, f"{id!r}; the names are {', '.join(model.id for model in MODELS)}")


def of_comfyui(base: str) -> EditModel:
    """By the class of a MODEL's ``model``: its very name, for what inherits from a known model may be another one.

    Several models may share a class, as Qwen-Image-Edit and its Plus do: the first of them in :data:`MODELS`.

    Raises:
        ValueError: unknown; the known ones are named. So do the others.
    """
    return _the(lambda model: model.comfyui_model == base, f"ComfyUI's {base}")


def of_pipeline(pipeline: Optional[str]) -> EditModel:
    """By the pipeline that a folder in diffusers' layout is for."""
    return _the(lambda model: model.parts.pipeline == pipeline, f"a folder of {pipeline}")


def of_network(network: str) -> Optional[EditModel]:
    """By the class of a network in either program; None for one that is not known, whose layers have to be named.

    Models that share a class have the same presets.
    """
    return next((model for model in MODELS if network in (model.comfyui_network, model.parts.transformer)), None)


def dotted(layer: str, comfyui: bool) -> str:
    """The name of a LoRA's layer that has underscores in place of dots, by the first model that has such a layer.

    Raises:
        ValueError: none has.
    """
    found = next((name for model in MODELS if (name := model.names.dotted(layer, comfyui))), "")
    if not found:
        program = "ComfyUI's" if comfyui else "diffusers'"
        raise ValueError(
            f"lora: no known model ({titles()}) has a layer {layer!r} in {program} names with underscores, as kohya's trainers "
            "write them"
        )
    return found


def of_layers(layers: Collection[str], comfyui: bool) -> EditModel:
    """By the names of a LoRA's layers, without prefix, in ComfyUI's dialect or in diffusers'.

    Raises:
        ValueError: no model has all of them, or several have that call them otherwise in the other dialect.
    """
    program = "ComfyUI's" if comfyui else "diffusers'"
    called = {model: [_elsewhere(model, layer, comfyui) for layer in layers] for model in MODELS}
    fitting = [model for model in MODELS if all(called[model])]
    if not fitting:
        missing = min((called[model].count(()), i) for i, model in enumerate(MODELS))[
            1
        ]  # the one that has most of them
        strange = next(layer for layer, name in zip(layers, called[MODELS[missing]]) if not name)
        raise ValueError(f"lora: no known model ({titles()}) has a layer {strange!r} in {program} names")
    if any(called[model] != called[fitting[0]] for model in fitting):
        raise ValueError(
            f"model: {next(iter(layers))!r} and all the others are {program} names of layers of "
            f"{', of '.join(model.title for model in fitting)}; expected to be told which as one of "
            f"{', '.join(model.id for model in fitting)}"
        )
    return fitting[0]


def _elsewhere(model: EditModel, layer: str, comfyui: bool) -> tuple[object, ...]:
    """What a layer is called in the other dialect; empty for one that the model does not have."""
    if comfyui:
        return model.names.diffusers(layer)
    whole, part = model.names.comfyui(layer)
    return (whole, part) if whole else ()
