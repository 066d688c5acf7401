"""Any timm network as an encoder: DINOv2, DINOv3 and other ViTs, and the stages of conv nets."""

from __future__ import annotations

import copy
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Union

import torch
from torch import Tensor, nn

from ..extras import need
from ..files import read_safetensors
from ..hashing import hash_module
from .base import (
    EncoderInfo,
    ImageSize,
    PixelEncoder,
    Preprocess,
    building,
    check_known,
    check_output,
    freeze,
    height_width,
    load_weights,
)

log = logging.getLogger(__name__)


class TimmEncoder(PixelEncoder):
    """Features of a timm network (https://github.com/huggingface/pytorch-image-models). Nothing is ever downloaded.

    ``"grid"`` [B, h, w, D] and ``"tokens"`` [B, h·w, D] (row-major) come from timm's ``forward_intermediates``, which
    ViTs and conv nets share: patch tokens of one block through the final norm, without class and register tokens, or
    the map of one stage. ``"global"`` [B, D] are the pooled features before the classifier.

    Args:
        model_name: a name of ``timm.list_models()``, for example ``"vit_small_patch14_dinov2"``; a tag
            (``"….lvd142m"``) chooses mean and std where a model's weights differ in them.
        weights: a .safetensors file, in timm's names or in a layout that timm converts (Meta's DINOv2 and DINOv3,
            converted by ``editloss_core.encoders.convert``). A classifier head in it is left out. None together with
            ``random_seed`` gives an untrained network.
        output: ``"grid"``, ``"tokens"`` or ``"global"``.
        layer: the block of a ViT or the stage of a conv net, counted from 0 or backwards from -1 (the last).
            Early layers see texture and exact position, late ones see objects. Only for grid and tokens.
        image_size: pixels or (height, width), multiples of the patch size for ViTs; 0 is the model's own size; -1
            keeps each picture's own size, rounded down to the patch size (or the stage's stride). DINOv2's own size is
            518, which is 37 × 37 tokens; 224 gives 16 × 16.
        crop: False stretches the whole picture; True scales the shorter side and crops the centre.
        device: where it runs; None is the CPU.
        random_seed: seed of an untrained network, for tests.
        model_kwargs: further arguments of ``timm.create_model``, for example ``{"depth": 2}``.

    Raises:
        ValueError: for an unknown model (close names are suggested), a layer that is not there, an unsuitable
            ``image_size``, and weights that are not safetensors or do not fit.
        FileNotFoundError: if the weights file does not exist.
    """

    def __init__(
        self,
        model_name: str,
        weights: Union[str, Path, None] = None,
        output: str = "grid",
        *,
        layer: int = -1,
        image_size: ImageSize = 0,
        crop: bool = False,
        device: Union[str, torch.device, None] = None,
        random_seed: Optional[int] = None,
        model_kwargs: Optional[Mapping[str, Any]] = None,
    ):
        need("timm")
        import timm

        check_output(output)
        _check_name(model_name)
        if output == "global" and layer != -1:
            raise ValueError(f"layer: only for grid and tokens; global features are the last layer's, got {layer}")
        model_kwargs = dict(model_kwargs or {})
        state = None if weights is None else read_safetensors(weights)
        self.network: Any  # timm's, which has much that no nn.Module has
        if weights is not None and "act_layer" not in model_kwargs:
            _check_activation(model_name)
        with building(weights, random_seed):
            self.network, any_size = _create(model_name, model_kwargs)
            self.layer = _check_layer(self.network, model_name, layer)
            if weights is not None and state is not None:
                _load(self.network, state, model_name, Path(weights).name)
            device = torch.device(device or "cpu")
            freeze(self.network, device)
        cfg = timm.data.resolve_model_data_config(self.network)
        size, multiple = _input_size(self.network, cfg, model_name, any_size, self.layer, image_size)
        mode = cfg["interpolation"] if cfg["interpolation"] in ("bicubic", "bilinear") else "bicubic"
        preprocess = Preprocess(
            *size, mean=tuple(cfg["mean"]), std=tuple(cfg["std"]), mode=mode, crop=crop, multiple=multiple
        )
        name = f"timm/{model_name}/{output}" + (f"/layer{layer}" if layer != -1 else "")
        # Arguments can change a network without changing its weights (the number of heads).
        fingerprint = hash_module(
            self.network,
            f"timm/{model_name}/{output}/{self.layer}",
            preprocess.describe(),
            repr(sorted(model_kwargs.items())),
        )
        super().__init__(EncoderInfo(name, preprocess.describe(), fingerprint, output), preprocess, device)
        if weights is not None and not model_kwargs:
            self.arguments = {
                "model_name": model_name, "weights": str(weights), "output": output, "layer": layer,
                "image_size": image_size, "crop": crop,
            }  # fmt: skip

    def at_layer(self, layer: int) -> TimmEncoder:
        """This encoder with its answer read at another layer, counted from 0; both share one network.

        Raises:
            ValueError: an encoder of global features, or a layer that the network does not have.
        """
        if self.info.output == "global":
            raise ValueError("layer: global features are the last layer's")
        other = copy.copy(self)
        other.layer, other._grids = _check_layer(self.network, self.info.name, layer), {}
        own = f"{self.info.fingerprint}/layer{other.layer}"
        other.info = replace(self.info, name=f"{self.info.name}@{other.layer}", fingerprint=own)
        return other

    def features(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(next(self.network.parameters()).dtype)
        if self.info.output == "global":
            return self.network(pixels)
        return self.network.forward_intermediates(
            pixels, indices=[self.layer], norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )[0]


def _check_name(model_name: str) -> None:
    """Registered names only: timm would ask a server for ``hf-hub:…``."""
    import timm

    check_known("model_name", model_name.partition(".")[0], timm.list_models(), "vit_small_patch14_dinov2")
    if "." in model_name:
        check_known("model_name", model_name, timm.list_models(f"{model_name.partition('.')[0]}.*", include_tags=True))


def _check_activation(model_name: str) -> None:
    """CLIP's weights of OpenAI and others were trained with QuickGELU: they fit a network with GELU, whose answers are wrong.

    Raises:
        ValueError: the name's tag is of such weights, and the network of the name has GELU. Without a tag nothing tells, and a
            warning is logged.
    """
    import timm
    from timm.models import get_pretrained_cfg

    network = model_name.partition(".")[0]
    other = network.replace("_clip_", "_clip_quickgelu_")
    if "_clip_" not in network or "quickgelu" in network or other not in timm.list_models(other):
        return
    names = timm.list_models(f"{network}.*", include_tags=True, pretrained=True)
    notes = {name: getattr(get_pretrained_cfg(name), "notes", None) or () for name in names}
    quick = [name for name in names if any("QuickGELU" in note for note in notes[name])]
    if model_name in quick:
        raise ValueError(
            f"model_name: the weights of {model_name} were trained with QuickGELU, {network} has GELU; choose {other}"
        )
    if model_name == network and quick:
        tags = ", ".join(name.partition(".")[2] for name in quick)
        log.warning(
            "model_name: %s has GELU. If the weights are of OpenAI's CLIP or others trained with QuickGELU (%s), choose %s: they fit "
            "both networks, and the answers of this one are wrong. A name with the weights' tag (%s.laion2b) ends this warning.",
            network, tags, other, network,
        )  # fmt: skip


def _create(model_name: str, model_kwargs: dict[str, Any]) -> tuple[nn.Module, bool]:
    """The network without a classifier, and whether its positions are interpolated to other picture sizes."""
    import timm

    kwargs = {"pretrained": False, "num_classes": 0, **model_kwargs}
    try:
        net, any_size = timm.create_model(model_name, **{"dynamic_img_size": True, **kwargs}), True
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise ValueError(f"model_kwargs: {model_name} refused {model_kwargs}: {error}") from error
        net = timm.create_model(model_name, **kwargs)
        any_size = not net.pretrained_cfg.get("fixed_input_size")
    if not hasattr(net, "forward_intermediates"):
        raise ValueError(f"model_name: {model_name} has no forward_intermediates in timm {timm.__version__}")
    return net, any_size


def _check_layer(net: Any, model_name: str, layer: int) -> int:
    """The layer counted from 0."""
    count = len(net.feature_info)
    if not -count <= layer < count:
        raise ValueError(f"layer: {model_name} has {count} layers, expected {-count}…{count - 1}, got {layer}")
    return layer % count


def _load(net: nn.Module, state: dict[str, Tensor], model_name: str, file: str) -> None:
    heads = tuple(_removed_heads(net))
    own = net.state_dict()
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if convert is not None and any(k not in state or state[k].shape != v.shape for k, v in own.items()):
        try:
            state = convert(state, net)
        except Exception:  # A file of something else; what follows names the tensors that do not fit.
            pass
    load_weights(net, state, model_name, file, ignore=heads)


def _removed_heads(net: Any) -> Iterator[str]:
    """Prefixes of the classifier that timm left out because of ``num_classes=0``."""
    classifier = net.pretrained_cfg.get("classifier") or ()
    for name in (classifier,) if isinstance(classifier, str) else classifier:
        found = name
        while found:  # caformer's classifier is head.fc.fc2, and all of head.fc is left out
            try:
                net.get_submodule(found)
                break
            except AttributeError:
                found = found.rpartition(".")[0]
        yield f"{found or name}."


def _input_size(
    net: Any, cfg: dict[str, Any], model_name: str, any_size: bool, layer: int, image_size: ImageSize
) -> tuple[tuple[int, int], int]:
    """Height and width for the network (0, 0 for each picture's own) and what they must be multiples of."""
    embed: Any = getattr(net, "patch_embed", None)
    own = height_width(getattr(embed, "img_size", None) or cfg["input_size"][1:])
    is_vit = hasattr(net, "blocks") and hasattr(embed, "patch_size")
    multiple = max(height_width(embed.patch_size)) if is_vit else net.feature_info[layer]["reduction"]
    if image_size == 0:
        return own, multiple
    if image_size == -1 and any_size:
        return (0, 0), multiple
    size = own if image_size == -1 else height_width(image_size)
    if not any_size and (image_size == -1 or size != own):
        raise ValueError(f"image_size: {model_name} takes only {own[0]}×{own[1]} pixels, got {image_size}; use 0")
    if is_vit and any(v % multiple for v in size):
        raise ValueError(
            f"image_size: {model_name} takes multiples of {multiple} pixels, got {size[0]}×{size[1]}; "
            f"try {tuple(max(v // multiple, 1) * multiple for v in size)}"
        )
    return size, multiple
