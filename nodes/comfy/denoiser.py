"""ComfyUI's MODEL as a :class:`~editloss_core.models.base.Denoiser` of the core."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import comfy.conds
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...editloss_core.lora.lora import layer_features
from ...editloss_core.models.base import EditModel
from .flow_model import check_flow_model, edit_model_of, model_inputs
from .frames import framed, unframed
from .gradients import (
    attention_with_backward,
    checkpointed,
    differentiable,
    thaw_attributes,
    usable,
)
from .loading import is_loaded, load_for_call
from .offers import program, static_model

# What an entry can say that has no meaning for one training pair; leaving it out silently would train something else.
NOT_TRAINABLE = {
    "control": "a ControlNet",
    "area": "an area",
    "mask": "a mask",
    "gligen": "GLIGEN boxes",
    "hooks": "hooks that change the model",
}


# ---------------------------------------------------------------------------------------------------------------------
# MODEL
# ---------------------------------------------------------------------------------------------------------------------


class ComfyDenoiser:
    """Velocity of a ComfyUI flow model with reference latents (FLUX.1 Kontext and kin).

    Runs what ComfyUI's samplers run: the model's own conditioning, patches, wrappers and compute dtype. The velocity is
    the network's own output, exact at every t, t = 0 included. The base's weights are frozen for good.

    A conditioning item is the CONDITIONING of one prompt, ``[[context, options]]``. Reference latents in it are left out:
    the denoiser's references take their place.

    Args:
        model: ComfyUI MODEL.
        guidance: what a guidance-distilled model is told; 1 is usual in training, 2.5 in sampling with Kontext. None takes
            each conditioning's own value, or ComfyUI's 3.5.
        checkpointing: keep each block's inputs only and compute the blocks again in the backward pass: about a third
            more time, a fraction of the memory.
        told: title of the edit model, where several share a class; empty goes by the MODEL.

    Raises:
        ValueError: for a model that does not predict velocity, or is none of the known edit models.
    """

    def __init__(self, model, guidance: Optional[float] = 1.0, checkpointing: bool = True, told: str = ""):
        check_flow_model(model)
        self.edit_model = edit_model_of(model, told)
        model = static_model(model)
        self.model, self.guidance, self.checkpointing = model, guidance, checkpointing
        model.model.requires_grad_(False)
        thaw_attributes(model.model.latent_format)
        self._films = model.model.latent_format.latent_dimensions == 3
        self._loaded: list[tuple[int, int]] = []

    def told(self, guidance: Optional[float]) -> ComfyDenoiser:
        """The same MODEL, told another guidance; see ``guidance`` above."""
        other = copy.copy(self)
        other.guidance = guidance
        return other

    @property
    def module(self) -> nn.Module:
        return self.model.model.diffusion_model

    @property
    def device(self) -> torch.device:
        return self.model.load_device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        base = self.model.model
        return base.manual_cast_dtype or base.get_dtype()

    @property
    def program(self) -> str:
        return program()

    @property
    def patches(self) -> str:
        """What else acts on the network: attention, wrappers, patches and options, and whether all of it is on its device."""
        model = self.model
        attention = comfy.ldm.modules.attention.optimized_attention
        whole = model.loaded_size() >= model.model_size()
        parts = [attention, model.model_options, model.wrappers, sorted(model.object_patches), whole]
        return str([_named(part) for part in parts])

    # What a gradient depends on: this pack, and all of ComfyUI's models, which change without a new version.
    code = (Path(__file__).parents[1], Path(comfy.ops.__file__).parent)

    def to_model(self, latents: Tensor) -> Tensor:
        """A VAE's latents → the model's."""
        return unframed(self.model.model.process_latent_in(framed(latents, self._films)), self._films)

    def from_model(self, latents: Tensor) -> Tensor:
        """The model's latents → a VAE's."""
        return unframed(self.model.model.process_latent_out(framed(latents, self._films)), self._films)

    def load(self, extra_patchers: Sequence[Any] = (), reserve: Optional[int] = None) -> None:
        """Bring the model, and decoders or encoders that take part in the same step, to their devices.

        For the time between steps: loading may push out models that a graph still needs. Costs nothing if all are there.
        The others are smaller and come first, so that it is the model's weights that wait where not all of them fit.

        Args:
            extra_patchers: ``ModelPatcher`` objects, for example ``VAEDecoder.patcher``; clones of the model, whose weights
                are the model's own, are left out.
            reserve: bytes to leave free for activations; weights that do not fit beside them stay in main memory and are
                brought in for each product. None loads everything and pushes out every other model.
        """
        extras = [p for p in dict.fromkeys(extra_patchers) if p.model is not self.model.model]
        patchers = [self.model, *extras]
        if self._loaded and self._loaded == [_whereabouts(p) for p in patchers]:
            return
        with torch.inference_mode(False):
            for some in (extras, patchers) if extras else (patchers,):
                comfy.model_management.load_models_gpu(
                    some, memory_required=1e20 if reserve is None else reserve, force_full_load=reserve is None
                )
        self._loaded = [_whereabouts(p) for p in patchers]

    def check(self, item: Any) -> None:
        """Refuse what a call with this conditioning item would refuse, without loading or running the network.

        Raises:
            ValueError: as a call.
        """
        z = framed(torch.zeros(1, self.model.model.latent_format.latent_channels, 8, 8), self._films)
        self._inputs(z, [z], item)

    def __call__(self, x_t: Tensor, t: Tensor, references: Sequence[Tensor], conditioning: Sequence[Any]) -> Tensor:
        """As in :class:`~editloss_core.models.base.Denoiser`; contexts of different lengths run one after the other.

        Raises:
            ValueError: for a batch that does not fit together, for conditioning of another model, with more than one
                entry or with parts that cannot be trained on, and for a model that looks at no reference latents.
        """
        if len(t) != len(x_t) or len(conditioning) != len(x_t) or any(len(r) != len(x_t) for r in references):
            raise ValueError(
                f"x_t: expected one t, reference and conditioning for each of {len(x_t)} latents, got {len(t)} t, "
                f"references of {[len(r) for r in references]} and {len(conditioning)} conditionings"
            )
        if self._loaded[:1] != [_whereabouts(self.model)]:
            load_for_call(self.model, self.model.model.memory_required(x_t.shape))
        x_t, t = framed(usable(x_t, self.device), self._films), usable(t, self.device)
        references = [framed(usable(r, self.device), self._films) for r in references]
        inputs = [
            self._inputs(x_t[i : i + 1], [r[i : i + 1] for r in references], item)
            for i, item in enumerate(conditioning)
        ]
        groups: list[list[int]] = []
        for i, one in enumerate(inputs):
            group = next((g for g in groups if comfy.samplers.cond_equal_size(inputs[g[0]], one)), None)
            if group is None:
                groups.append([i])
            else:
                group.append(i)
        if len(groups) == 1:
            return self._velocity(x_t, t, comfy.samplers.cond_cat(inputs))
        parts = [self._velocity(x_t[g], t[g], comfy.samplers.cond_cat([inputs[i] for i in g])) for g in groups]
        order = torch.tensor([i for g in groups for i in g], device=x_t.device)
        return torch.cat(parts)[order.argsort()]

    def stock_velocity(self, x: Tensor, t: Tensor, reference: Tensor, item: Any) -> Tensor:
        """(x − denoised) / t as ComfyUI's samplers compute it, for a batch of one pair.

        Args:
            x: ``[B, C, h, w]``, like ``reference``.
            t: ``[B]`` above 0.
            item: the one CONDITIONING.
        """
        model, base = self.model, self.model.model
        x, latent = framed(x, self._films), framed(self.from_model(reference[:1]), self._films)
        more = {"reference_latents": [latent], **self._said()}
        options = {**model.model_options, "transformer_options": self._options()}
        model.pre_run()
        try:
            conds = comfy.sampler_helpers.convert_cond([[item[0][0], {**item[0][1], **more}]])
            conds = comfy.samplers.encode_model_conds(base.extra_conds, conds, x, x.device, "positive")
            (denoised,) = comfy.samplers.calc_cond_batch(base, [conds], x, t, options)
        finally:
            model.cleanup()
        return unframed(x - denoised, self._films) / t.view(-1, 1, 1, 1)

    def _said(self) -> dict[str, Any]:
        """What stands in a conditioning beside prompt and references."""
        guidance = None if self.edit_model.guidance is None else self.guidance
        said = {"guidance": guidance, "reference_latents_method": self.edit_model.reference_method}
        return {name: value for name, value in said.items() if value is not None}

    @contextlib.contextmanager
    def exact_products(self) -> Iterator[None]:
        """Inside, quantised layers multiply in the precision that the network computes in, and do not round their inputs.

        Newer layers have a switch for it, which those for int8 and int4 weights do not obey; nothing rounds where something is
        done to a weight before it is used. The older fp8 layers keep from their fast product in training, or then as well.
        """
        if not is_loaded(self.model):
            load_for_call(self.model, 0)  # which would take away again what is put on weights here
        with contextlib.ExitStack() as stack:

            def put(layer: nn.Module, **values: Any) -> None:
                for name, value in values.items():
                    stack.callback(setattr, layer, name, getattr(layer, name))
                    setattr(layer, name, value)

            for layer in self.module.modules():
                as_it_is = [*getattr(layer, "weight_function", ()), lambda weight: weight]
                quantised = isinstance(getattr(layer, "weight", None), QuantizedTensor)
                if quantised and hasattr(layer, "_full_precision_mm"):  # which a table of embeddings has not
                    put(layer, _full_precision_mm=True, weight_function=as_it_is)
                elif isinstance(layer, comfy.ops.fp8_ops.Linear):
                    put(layer, training=True, weight_function=as_it_is)
            yield

    def _options(self) -> dict[str, Any]:
        """``transformer_options`` as ComfyUI's samplers make them: with the model's wrappers."""
        options = self.model.model_options.get("transformer_options", {}).copy()
        options["wrappers"] = comfy.patcher_extension.merge_nested_dicts(
            options.get("wrappers", {}), self.model.wrappers
        )
        return options

    def _inputs(self, x: Tensor, references: list[Tensor], item: Any) -> dict[str, comfy.conds.CONDRegular]:
        base = self.model.model
        cond = dict(comfy.sampler_helpers.convert_cond(_entry(item, self))[0])
        cond.pop("reference_latents", None)
        if references:
            cond["reference_latents"] = references
        cond.update(self._said())
        inputs = model_inputs(base, cond, x)
        if references:
            if "ref_latents" not in inputs:
                raise ValueError(f"model: expected one that looks at reference latents, got {type(base).__name__}")
            inputs["ref_latents"] = comfy.conds.CONDList(references)  # in the model's space already
        return inputs

    def _velocity(self, x: Tensor, t: Tensor, inputs: dict[str, Any]) -> Tensor:
        base, net = self.model.model, self.module
        options = self._options()
        options["cond_or_uncond"], options["sigmas"] = [0], t
        answers: list[Tensor] = []
        hook = net.register_forward_hook(lambda module, args, output: answers.append(output))
        training = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        if training:
            options.setdefault("optimized_attention_override", attention_with_backward)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(differentiable(net))
                if training and self.checkpointing:
                    stack.enter_context(checkpointed(net))
                base.apply_model(x, t, transformer_options=options, **inputs)
        finally:
            hook.remove()
        return unframed(answers[-1], self._films).float()


def _named(thing: Any) -> Any:
    """Plain values, and names of functions and classes, that say what a structure of patches is made of."""
    if isinstance(thing, dict):
        return {str(key): _named(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [_named(value) for value in thing]
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return thing
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _whereabouts(patcher) -> tuple[int, int]:
    """Which model, and how much of it is on its device."""
    return id(patcher), patcher.loaded_size() if is_loaded(patcher) else -1


def _entry(item: Any, denoiser: ComfyDenoiser) -> Sequence[Any]:
    """A CONDITIONING that can be trained on."""
    if not isinstance(item, (list, tuple)) or not all(isinstance(e, (list, tuple)) and len(e) == 2 for e in item):
        raise ValueError(
            f"conditioning: expected CONDITIONING of one prompt for each sample, got {type(item).__name__}"
        )
    if len(item) != 1:
        raise ValueError(f"conditioning: expected one entry for each sample, got {len(item)}; do not combine prompts")
    context, options = item[0]
    for key, what in NOT_TRAINABLE.items():
        if options.get(key) is not None:
            raise ValueError(f"conditioning: expected a prompt alone, got {what} with it ({key!r})")
    wanted, _ = layer_features(denoiser.module.get_submodule(denoiser.edit_model.text_layer))
    if context.shape[-1] != wanted:
        own, other = (_of(width, denoiser.edit_model) for width in (wanted, context.shape[-1]))
        raise ValueError(
            f"conditioning: {denoiser.edit_model.title} takes text features of {own}, got {other}; use the model's own text encoder"
        )
    return item


def _of(width: int, edit_model: EditModel) -> str:
    """Text features of this width, with the name of the text encoder that makes them."""
    name = edit_model.text_encoders.get(width)
    return f"{width} numbers ({name})" if name else f"{width} numbers"
