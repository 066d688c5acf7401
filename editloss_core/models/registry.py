"""The edit models that are known, and who a class, a folder or a file belongs to.

What is not here is refused by name: a model that was never tried may ignore its reference, or train on a caption that should
have seen the picture, without a word.
"""

from __future__ import annotations

from typing import Callable, Collection, Mapping, Optional

from .base import EditModel
from .kontext import KONTEXT
from .omnigen2 import OMNIGEN2

MODELS: tuple[EditModel, ...] = (KONTEXT, OMNIGEN2)

_SEES = (
    "its text encoder sees the before picture in a way that is not known here, and a LoRA would learn from captions that it never "
    "meets when pictures are made"
)
_IGNORES = "it takes a reference and does not look at it, so that a LoRA would learn without the before picture"
# Others that edit, or look as if they did: ComfyUI's class or diffusers' pipeline → why not. What was found by trying them.
REFUSED: Mapping[str, str] = {
    "Boogu": _SEES,
    "Chroma": _IGNORES,
    "ChromaRadiance": _IGNORES,
    "HiDream": "HiDream-E1 takes its before picture beside the noise (concat_latent_image), not as a reference",
    "HiDreamO1": "autograd cannot follow its network (it writes with out=), which keeps keys of an earlier call besides",
    "JoyImage": _SEES,
    "JoyImageEditPipeline": _SEES,
    "Krea2": f"it looks at a reference only where a method is named, and {_SEES}",
    "Lumina2": f"of Z-Image, {_SEES}; Lumina 2 has no reference",
    "ZImageOmniPipeline": _SEES,
    "MageFlow": _SEES,
    "FluxPipeline": "it has no reference; FLUX.1 Kontext's folder is of FluxKontextPipeline",
}


def titles() -> str:
    """The known models, for a message."""
    return ", ".join(model.title for model in MODELS)


def _the(matches: Callable[[EditModel], bool], found: str, name: Optional[str]) -> EditModel:
    model = next((model for model in MODELS if matches(model)), None)
    if model is None:
        raise ValueError(f"expected an edit model that is known ({titles()}), got {found}{_why_not(name)}")
    return model


def _why_not(name: Optional[str]) -> str:
    why = REFUSED.get(name or "")
    return f": {why}" if why else ""


def of_comfyui(base: str) -> EditModel:
    """By the class of a MODEL's ``model``: its very name, for what inherits from a known model may be another one.

    Raises:
        ValueError: unknown; the known ones are named. So do the others.
    """
    return _the(lambda model: model.comfyui_model == base, f"ComfyUI's {base}", base)


def of_pipeline(pipeline: Optional[str]) -> EditModel:
    """By the pipeline that a folder in diffusers' layout is for."""
    return _the(lambda model: bool(pipeline) and model.parts.pipeline == pipeline, f"a folder of {pipeline}", pipeline)


def of_network(network: str) -> Optional[EditModel]:
    """By the class of a network in either program; None for one that is not known, whose layers have to be named."""
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
    """By the names of a LoRA's layers, without prefix, in ComfyUI's dialect or in diffusers'."""

    def strange(model: EditModel) -> Optional[str]:
        knows = model.names.diffusers if comfyui else lambda layer: model.names.comfyui(layer)[0]
        return next((layer for layer in layers if not knows(layer)), None)

    model = next((model for model in MODELS if strange(model) is None), None)
    if model is None:
        program = "ComfyUI's" if comfyui else "diffusers'"
        raise ValueError(f"lora: no known model ({titles()}) has a layer {strange(MODELS[0])!r} in {program} names")
    return model
