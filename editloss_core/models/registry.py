"""The edit models that are known, and who a class, a folder or a file belongs to.

What is not here is refused by name: a model that was never tried may ignore its reference, or train on a caption that should
have seen the picture, without a word.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Optional

from .base import EditModel
from .flux2 import FLUX2_DEV, FLUX2_KLEIN, FLUX2_KLEIN_BASE
from .kontext import KONTEXT
from .longcat import LONGCAT
from .omnigen2 import OMNIGEN2
from .qwen import QWEN_EDIT, QWEN_EDIT_2511, QWEN_EDIT_PLUS

# Of those that are told apart by a file's name or not at all, the one that is taken without it comes last.
MODELS: tuple[EditModel, ...] = (
    KONTEXT, FLUX2_DEV, FLUX2_KLEIN, FLUX2_KLEIN_BASE, QWEN_EDIT_2511, QWEN_EDIT, QWEN_EDIT_PLUS, LONGCAT, OMNIGEN2,
)  # fmt: skip

Sizes = Mapping[str, tuple[int, int]]  # layer, without prefix → (inputs, outputs)

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
    "QwenImage": "Qwen-Image makes pictures of words alone, and Layered several at once; if it is a Qwen-Image-Edit by another "
    "name, say which in edit_model of Run Options",
    "QwenImagePipeline": "it has no reference; Qwen-Image-Edit's folders are of QwenImageEditPipeline or QwenImageEditPlusPipeline",
    "FluxPipeline": "it has no reference; FLUX.1 Kontext's folder is of FluxKontextPipeline",
}


def titles() -> str:
    """The known models, for a message."""
    return ", ".join(model.title for model in MODELS)


def _the(matches: Callable[[EditModel], bool], found: str, name: Optional[str] = None) -> EditModel:
    model = next((model for model in MODELS if matches(model)), None)
    if model is None:
        raise ValueError(f"expected an edit model that is known ({titles()}), got {found}{_why_not(name)}")
    return model


def _why_not(name: Optional[str]) -> str:
    why = REFUSED.get(name or "")
    return f": {why}" if why else ""


def of_id(id: str) -> EditModel:
    """By its permanent name."""
    return _the(lambda model: model.id == id, f"{id!r}; the names are {', '.join(model.id for model in MODELS)}")


def of_comfyui(base: str, config: Mapping[str, Any] = {}, file: str = "") -> EditModel:  # noqa: B006
    """By the class of a MODEL's ``model``: its very name, for what inherits from a known model may be another one.

    Several models may share a class, as those of Qwen-Image-Edit do: the first that fits of them in :data:`MODELS`.

    Args:
        base: that name.
        config: of its network.
        file: name of the file that it was loaded from, where that is known.

    Raises:
        ValueError: unknown; the known ones are named. So do the others.
    """
    found = f"ComfyUI's {base}" + (f" of {file}" if file else "")
    return _the(lambda model: model.is_comfyui(base, config, file), found, base)


def of_pipeline(index: Mapping[str, Any], config: Mapping[str, Any] = {}) -> EditModel:  # noqa: B006
    """By the model_index.json of a folder in diffusers' layout, and the config.json of its transformer."""
    pipeline = index.get("_class_name")

    def matches(model: EditModel) -> bool:
        parts = model.parts
        said = ((index, parts.index), (config, parts.config))
        return parts.pipeline == pipeline and all(bool(f.get(k)) == v for f, wanted in said for k, v in wanted.items())

    return _the(matches, f"a folder of {pipeline}", pipeline)


def of_network(network: str, sizes: Sizes = {}) -> Optional[EditModel]:  # noqa: B006
    """By the class of a network in either program; None for one that is not known, whose layers have to be named.

    Args:
        network: that name.
        sizes: of the network's linear layers, by which models that share the class are told apart.
    """

    def strange(model: EditModel) -> int:
        names = model.names
        if network == model.parts.transformer:
            return sum(not names.comfyui(layer)[0] for layer in sizes)
        missing = sum(layer not in sizes for layer in names.outside)
        return missing + sum(
            not names.diffusers(layer) or not names.fits(layer, *size) for layer, size in sizes.items()
        )

    named = [model for model in MODELS if network in (model.comfyui_network, model.parts.transformer)]
    return min(named, key=strange, default=None)


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


def of_layers(sizes: Sizes, comfyui: bool, told: str = "") -> EditModel:
    """The model that a LoRA is of, by the names of its layers, and by their sizes where models share the names.

    Args:
        sizes: of the layers, in ComfyUI's dialect or in diffusers'.
        comfyui: in ComfyUI's.
        told: id of the model, by the file's header or by who asks: it has to have these layers.

    Raises:
        ValueError: no model has them all, or several have, and call them differently in the other program.
    """
    program = "ComfyUI's" if comfyui else "diffusers'"

    def strange(model: EditModel) -> list[str]:
        knows = model.names.diffusers if comfyui else lambda layer: model.names.comfyui(layer)[0]
        return [layer for layer in sizes if not knows(layer)]

    models = (of_id(told),) if told else MODELS
    fit = [model for model in models if not strange(model)]
    if not fit:
        nearest = min(models, key=lambda model: len(strange(model)))
        known = nearest.title if told else f"no known model ({titles()})"
        raise ValueError(f"lora: {known} has {'no' if told else 'a'} layer {strange(nearest)[0]!r} in {program} names")
    if comfyui and not told:
        fit = [model for model in fit if all(model.names.fits(layer, *size) for layer, size in sizes.items())] or fit
    others = [model for model in fit[1:] if not _same(model, fit[0], sizes, comfyui)]
    if others:
        raise ValueError(
            f"model: {next(iter(sizes))!r} and all the others are {program} names of layers of "
            f"{', of '.join(model.title for model in fit)}; expected to be told which as one of "
            f"{', '.join(model.id for model in fit)}"
        )
    return fit[0]


def _same(a: EditModel, b: EditModel, sizes: Sizes, comfyui: bool) -> bool:
    """Whether a LoRA of these layers is the same file in the other program, whichever of the models it is of."""
    if a.names is b.names:
        return True
    ask = "diffusers" if comfyui else "comfyui"
    alike = all(getattr(a.names, ask)(layer) == getattr(b.names, ask)(layer) for layer in sizes)
    return alike and (not comfyui or a.names.alpha == b.names.alpha)
