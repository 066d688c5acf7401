"""What an edit model is: everything about it that is neither ComfyUI's nor diffusers' own, one subclass and instance a model.

A model's file says what its parts are called in both programs, which layers a LoRA takes, how its captions are encoded,
where its reference goes, what it is told and how pictures are sampled from it, how noise levels depend on the size, and what
its layers are called in LoRA files. :mod:`.registry` knows them all; :mod:`.kontext` is the example to begin from.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Optional, Protocol, Sequence

import torch
from torch import Tensor, nn

from ..progress import Progress

PRESETS = ("attention", "attention + MLP", "all")  # of layers; what each comprises is the model's to say


class Denoiser(Protocol):
    """A model that predicts velocity.

    Attributes:
        module: the network; LoRA layers are found in it, by the names that files use (without prefix).
        device: where it wants its inputs.
        edit_model: what is known about it.

    The self-check (:mod:`~editloss_core.training.self_check`) also uses what a denoiser has of these:

    * ``program``: what it runs in, with its version; ``dtype``: what it computes in; ``patches``: text that changes with
      what else acts on the model; ``code``: folders or files whose code it depends on.
    * ``stock_velocity(x_t, t, reference, conditioning)``: what the program's own sampling path computes for a batch of one
      pair at one noise level, with the one conditioning object.
    * ``exact_products()``: a context in which quantised layers do not round their inputs.
    """

    module: nn.Module
    device: torch.device
    edit_model: EditModel

    def told(self, guidance: Optional[float]) -> Denoiser:
        """The same model with the same weights, told another guidance. Asked for where previews have one of their own."""
        ...

    def __call__(self, x_t: Tensor, t: Tensor, references: Sequence[Tensor], conditioning: Sequence[Any]) -> Tensor:
        """Velocity ``[B, C, h, w]`` in float32, differentiable with respect to x_t and the LoRA's weights.

        Args:
            x_t: ``[B, C, h, w]`` float32.
            t: ``[B]`` float32 in 0…1.
            references: latents ``[B, C, h', w']`` that the model looks at: the before picture.
            conditioning: B objects, one per sample, that only the denoiser understands.
        """
        ...


@dataclass(frozen=True)
class Preview:
    """How a picture of a held-out pair is asked for.

    Attributes:
        guidance: what a guidance-distilled model is told; None takes what the program would.
        cfg: scale of classifier-free guidance, v = n + cfg · (p − n); 1 asks the model once.
        negatives: what stands in the place of each sample's caption for n, as the denoiser takes it; needed where cfg is not 1.
    """

    guidance: Optional[float] = None
    cfg: float = 1.0
    negatives: Sequence[Any] = ()

    def of(self, index: int) -> Preview:
        """The same of one sample alone."""
        return replace(self, negatives=self.negatives[index : index + 1])


@dataclass(frozen=True)
class Parts:
    """The classes of a model's parts in diffusers' layout, by name: nothing of it is imported to know them.

    Attributes:
        pipeline: in model_index.json.
        transformer: of the network.
        autoencoder: of the autoencoder.
        decoders: of those that may decode in its place.
        texts: folder → class, of the text encoders.
        tokenizers: folders.
        processors: those of them that also say how pictures are read.
        text_widths: (text encoder's folder, its key, the transformer's key): numbers of their configs that have to be equal.
        original_key: a tensor by which a single file in the original layout is known.
        index: what model_index.json has to say beside the pipeline, where several models share that.
        config: the same of the transformer's config.json.
        text_layers: of the text encoder, whose features stand side by side.
        others: what a network with other inputs would be, for the message.
    """

    pipeline: str
    transformer: str
    autoencoder: str
    decoders: tuple[str, ...]
    texts: Mapping[str, str]
    tokenizers: tuple[str, ...]
    text_widths: tuple[tuple[str, str, str], ...]
    original_key: str
    index: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    text_layers: int = 1
    processors: tuple[str, ...] = ()
    others: str = ""


NOT_IN_DIFFUSERS = Parts("", "", "", (), {}, (), (), "")

Rows = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class LayerNames:
    """A model's linear layers in ComfyUI's names and in diffusers', as LoRA files have them.

    Attributes:
        model: its name, for messages.
        blocks: (ComfyUI's list of blocks, diffusers', ComfyUI's layer in a block → diffusers'). Several are the rows of the
            one, from above.
        outside: the same for layers that are in no block.
        swapped: ComfyUI's layers whose halves diffusers has in the opposite order.
        mlp_ratio: rows of a fourth part for each of the first three's, where queries, keys, values and an MLP's input are one.
        shapes: ComfyUI's layer in a block → (inputs, outputs) in a ratio that another model with the same names has not.
        alpha: whether diffusers' loader takes a layer's ``.alpha``; if not, it is multiplied into the matrices.
    """

    model: str
    blocks: tuple[tuple[str, str, Rows], ...]
    outside: Rows = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    mlp_ratio: int = 4
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    alpha: bool = True

    def fits(self, layer: str, inputs: int, outputs: int) -> bool:
        """Whether ComfyUI's layer of this size may be one of the model's."""
        one, other = self.shapes.get(layer.partition(".")[2].partition(".")[2], (inputs, outputs))
        return inputs * other == outputs * one

    def comfyui(self, layer: str) -> tuple[str, int]:
        """diffusers' layer → (ComfyUI's, which of its parts); ("", 0) for a layer that the model does not have."""
        head, _, rest = layer.partition(".")
        number, _, name = rest.partition(".")
        for ours, theirs, inside in self.blocks:
            if head == theirs:
                found = ((f"{ours}.{number}.{w}", parts.index(name)) for w, parts in inside.items() if name in parts)
                return next(found, ("", 0))
        return next(((whole, parts.index(layer)) for whole, parts in self.outside.items() if layer in parts), ("", 0))

    def diffusers(self, layer: str) -> tuple[str, ...]:
        """ComfyUI's layer → diffusers'; none for a layer that the model does not have."""
        head, _, rest = layer.partition(".")
        number, _, name = rest.partition(".")
        for ours, theirs, inside in self.blocks:
            if head == ours:
                return tuple(f"{theirs}.{number}.{part}" for part in inside.get(name, ()))
        return self.outside.get(layer, ())

    def dotted(self, layer: str, comfyui: bool) -> str:
        """A layer of ComfyUI's or of diffusers' whose name has underscores in place of dots, as kohya's trainers write it;
        "" for one that the model does not have.

        >>> from editloss_core.models.kontext import KONTEXT
        >>> KONTEXT.names.dotted("double_blocks_7_img_attn_qkv", comfyui=True)
        'double_blocks.7.img_attn.qkv'
        """
        for ours, theirs, inside in self.blocks:
            head = ours if comfyui else theirs
            number, _, name = layer.removeprefix(f"{head}_").partition("_")
            if layer.startswith(f"{head}_") and number.isdecimal():
                known = inside if comfyui else (part for parts in inside.values() for part in parts)
                return next((f"{head}.{number}.{known_as}" for known_as in known if _under(known_as) == name), "")
        outside = self.outside if comfyui else (part for parts in self.outside.values() for part in parts)
        return next((known_as for known_as in outside if _under(known_as) == layer), "")


def _under(layer: str) -> str:
    return layer.replace(".", "_")


class EditModel:
    """One edit model. A subclass fills in the attributes and overrides what is not as below.

    Attributes:
        id: permanent; it may stand in files.
        title: what people call it.
        comfyui_model: class of its MODEL's ``model`` (``comfy.model_base``), by name. A subclass of it is another model.
        comfyui_config: what the config of its network there has to say, where several models share the class.
        comfyui_file: pattern of the name of its file, where nothing in it tells it from another model.
        comfyui_tokenizer: class of its text encoder's tokenizer there, by name, where the width of the features does not tell.
        comfyui_clip: type of Load CLIP that gives such a text encoder.
        comfyui_network: class of its network there.
        parts: its classes in diffusers; NOT_IN_DIFFUSERS where that has no pipeline for it.
        text_layer: the linear layer that takes the text encoder's features, in ComfyUI's network.
        layers: preset → patterns over names of layers, of both programs' networks.
        names: of its layers in LoRA files.
        diffusers_loads_lora: whether its pipeline has a loader of LoRA files.
        reference_method: ComfyUI's ``reference_latents_method``, None where the network needs none.
        references: pictures that it looks at for one sample at the most, the before picture among them.
        reads_picture: whether its captions are encoded with the before picture.
        guidance, preview_guidance: what it is told in training and for pictures; None where it is told nothing.
        preview_cfg: scale of classifier-free guidance in the stock workflow, 1 without.
        preview_steps: to which it was distilled, the most that its pictures are sampled in; None where it was not.
        patch: latents per token along each side.
        downscale: pixels per latent along each side.
        text_encoders: width of text features → whose they are, for messages.
        text_tokens: of a caption.
        letters: what its text encoder knows beyond the English alphabet, without case; None: every script.
        width_attribute, block_attributes: where diffusers' network has its width and its blocks.
        block_values: numbers per token and width that a block keeps for its backward pass beside its input.
    """

    id: str
    title: str
    comfyui_model: str
    comfyui_network: str
    parts: Parts
    layers: Mapping[str, tuple[str, ...]]
    names: LayerNames
    comfyui_config: Mapping[str, Any] = {}
    comfyui_file: str = ""
    comfyui_tokenizer: str = ""
    comfyui_clip: str = ""
    text_encoders: Mapping[int, str] = {}
    diffusers_loads_lora: bool = True
    text_layer: str = "txt_in"
    reference_method: Optional[str] = None
    references: int = 1
    reads_picture: bool = False
    guidance: Optional[float] = None
    preview_guidance: Optional[float] = None
    preview_cfg: float = 1.0
    preview_steps: Optional[int] = None
    patch: int = 2
    downscale: int = 8
    text_tokens: int = 512
    letters: Optional[str] = None
    width_attribute: str = "inner_dim"
    block_attributes: tuple[str, ...] = ("transformer_blocks",)
    block_values: int = 17

    def is_comfyui(self, base: str, config: Mapping[str, Any], file: str) -> bool:
        """Whether a MODEL is one of this model, see :func:`.registry.of_comfyui`."""
        return (
            self.comfyui_model == base
            and self.has_config(config)
            and re.search(self.comfyui_file, file.lower()) is not None
        )

    def has_config(self, config: Mapping[str, Any]) -> bool:
        """Whether ComfyUI's network may be this model's by its config."""
        return all(config.get(key) == value for key, value in self.comfyui_config.items())

    # -- noise levels -----------------------------------------------------------------------------------------------

    def mu(self, tokens: int, steps: Optional[int] = None) -> float:
        """By how much logit(t) is raised for a picture of ``tokens`` tokens, in training, or sampled in ``steps`` steps."""
        raise NotImplementedError

    def tokens(self, latents: Tensor) -> int:
        """Of one picture ``[B, C, h, w]``."""
        return math.ceil(latents.shape[-2] / self.patch) * math.ceil(latents.shape[-1] / self.patch)

    def sample_tokens(self, height: int, width: int, references: int = 1) -> int:
        """Of a whole sample: the caption's, and those of a picture of this size in pixels and of its references."""
        side = self.downscale * self.patch
        return self.text_tokens + (1 + references) * (height // side) * (width // side)

    def times(self, tokens: int, steps: int) -> Tensor:
        """``[steps + 1]`` noise levels from 1 to 0 of a sampled picture."""
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return torch.sigmoid(torch.logit(even) + self.mu(tokens, steps)).float()

    # -- pictures ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def path(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        references: Sequence[Tensor],
        conditioning: Sequence[Any],
        steps: int,
        preview: Optional[Preview] = None,
    ) -> Iterator[tuple[float, Tensor]]:
        """(t, x_t) by Euler's method from pure noise at t = 1 to the picture at t = 0, on the model's own schedule.

        ``steps + 1`` states; a state's call of the model is made when the next one is asked for. Arguments as in
        :meth:`sample`.

        Raises:
            ValueError: classifier-free guidance without something to be guided away from, for each sample.
        """
        asked = denoiser if preview is None else denoiser.told(preview.guidance)
        cfg, negatives = (1.0, ()) if preview is None else (preview.cfg, preview.negatives)
        if cfg != 1.0 and len(negatives) != len(conditioning):
            raise ValueError(
                f"negatives: expected one for each of {len(conditioning)} samples with cfg {cfg:g}, got {len(negatives)}"
            )
        times, x = self.times(self.tokens(noise), steps), noise
        for t, following in zip(times, times[1:]):
            yield t.item(), x
            levels = t.expand(len(x)).to(x.device)
            if cfg == 1.0:
                v = asked(x, levels, references, conditioning)
            else:
                v = self.steered(partial(asked, x, levels), references, conditioning, negatives, cfg)
            x = x + (following - t).item() * v.to(x)
        yield 0.0, x

    def sample(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        references: Sequence[Tensor],
        conditioning: Sequence[Any],
        steps: int,
        preview: Optional[Preview] = None,
        progress: Optional[Progress] = None,
    ) -> Tensor:
        """Latents at the end of :meth:`path`, without gradients.

        Args:
            denoiser, references, conditioning: as in :class:`Denoiser`.
            noise: ε ``[B, C, h, w]``.
            steps: calls of the model (twice as many with classifier-free guidance).
            preview: what the model is told; None asks it as it is asked in training.
            progress: called with (done, steps).
        """
        latents = noise
        for done, (_, x) in enumerate(self.path(denoiser, noise, references, conditioning, steps, preview)):
            latents = x
            if done and progress is not None:
                progress(done, steps)
        return latents

    def steered(
        self,
        asked: Callable[[Sequence[Tensor], Sequence[Any]], Tensor],
        references: Sequence[Tensor],
        conditioning: Sequence[Any],
        negative: Sequence[Any],
        cfg: float,
    ) -> Tensor:
        """Velocity with classifier-free guidance; a model that is asked in another way than for caption and negative overrides it.

        Args:
            asked: the model's velocity for references and conditioning, at the place where it is wanted.
        """
        return self.guided(asked(references, conditioning), asked(references, negative), cfg)

    def guided(self, positive: Tensor, negative: Tensor, cfg: float) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598); a model that rescales overrides it."""
        return negative + cfg * (positive - negative)

    # -- captions ---------------------------------------------------------------------------------------------------

    def tokenize(self, clip: Any, caption: str, before: Optional[Tensor], *further: Tensor) -> Any:
        """What ComfyUI's CLIP is asked to encode.

        Args:
            clip: the text encoder.
            before: the before picture ``[H, W, 3]`` where the model :attr:`reads_picture`, else None.
            further: the other references then, if the pair has any.
        """
        return clip.tokenize(caption)

    def encode(self, pipeline: Any, caption: str, before: Optional[Tensor], *further: Tensor) -> dict[str, Tensor]:
        """A caption by diffusers' pipeline, as tensors to keep; see :meth:`caption`."""
        raise NotImplementedError

    def caption(self, tensors: Mapping[str, Tensor]) -> Any:
        """What :meth:`velocity` takes for a sample, made of what :meth:`encode` gave."""
        raise NotImplementedError

    def words(self, caption: Any) -> Tensor:
        """What the text encoder made of the words of a caption, as :meth:`caption` gives it: equal for captions that are the
        same to the model."""
        raise NotImplementedError

    def unknown(self, caption: str) -> tuple[int, int]:
        """(letters of a caption that the text encoder does not know, all of its letters)."""
        letters = [letter for letter in unicodedata.normalize("NFKC", caption).lower() if letter.isalpha()]
        if self.letters is None:
            return 0, len(letters)
        return sum(not letter.isascii() and letter not in self.letters for letter in letters), len(letters)

    # -- diffusers' network -----------------------------------------------------------------------------------------

    def velocity(
        self, denoiser: Any, x_t: Tensor, t: Tensor, references: Sequence[Tensor], captions: Sequence[Any]
    ) -> Tensor:
        """By diffusers' transformer, in its own dtype; :class:`.denoiser.DiffusersDenoiser` has checked the batch."""
        raise NotImplementedError

    def stock_velocity(self, denoiser: Any, x: Tensor, t: Tensor, reference: Tensor, caption: Any) -> Tensor:
        """(x − x') / t, x' being what diffusers' pipeline makes of x in one step from t to 0, for a batch of one pair."""
        raise NotImplementedError


class Caption(NamedTuple):
    """A caption as :class:`CaptionsOfTokens` take it: the text encoder's features ``[T, D]``, and nothing beside them."""

    tokens: Tensor


class CaptionsOfTokens(EditModel):
    """An edit model that takes tokens of a caption and nothing else; its :meth:`encode` gives ``tokens``."""

    def caption(self, tensors: Mapping[str, Tensor]) -> Caption:
        return Caption(tensors["tokens"])

    def words(self, caption: Caption) -> Tensor:
        return caption.tokens
