"""The image tower of any OpenCLIP architecture, with weights from a file that the user has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class OpenCLIPEncoder(PixelEncoder):
    """Image embeddings of OpenCLIP (https://github.com/mlfoundations/open_clip). Nothing is ever downloaded, and the
    text tower is not built.

    ``"global"`` is ``encode_image``: pooled and projected, ``[B, D]``. ``"grid"`` [B, h, w, D] and ``"tokens"``
    [B, h·w, D] (row-major) are the last feature map without class token and without the projection, after the
    model's own final norm:

    * ViT: patch tokens through ``ln_post``;
    * CoCa (attentional pooling): patch tokens through the pooler's input norm ``ln_k``, since ``ln_post`` follows
      the pooling there and has another width;
    * timm ViTs (SigLIP, EVA, PE, …): patch tokens through the trunk's ``norm``, before any attention pooling;
    * timm conv nets (ConvNeXt, …): the last stage's map, which has no norm of its own before pooling;
    * ModifiedResNet (RN50, …): the map of ``layer4``, before the attention pooling.

    OpenAI's weights, and others trained with QuickGELU, need the ``…-quickgelu`` architecture: the tensors fit both,
    and the plain one gives slightly wrong embeddings without an error. Naming ``pretrained_tag`` catches this.

    Args:
        architecture: a name of ``open_clip.list_models()``, for example ``"ViT-B-32"``.
        weights: a .safetensors file of the whole CLIP (``open_clip_model.safetensors``) or of its image tower alone
            (``visual.*`` or bare names); None together with ``random_seed`` gives an untrained network.
        output: ``"global"``, ``"tokens"`` or ``"grid"``.
        pretrained_tag: open_clip's name of the weights, for example ``"laion2b_s34b_b79k"``. It decides mean, std and
            interpolation, which belong to the weights and not to the architecture. Empty: what most of the
            architecture's known weights use (all of them agree but for ViT-L-14 ``laion2b_s32b_b82k``, whose mean and
            std are 0.5).
        normalize: scale embeddings to unit length over D.
        image_size: pixels or (height, width); 0 is the model's own size. Others work only where no positional
            embedding is fixed: conv trunks, and ModifiedResNet for ``"tokens"`` and ``"grid"``.
        crop: False stretches the whole picture; True scales the shorter side and crops the centre, as most CLIPs
            were trained.
        device: where it runs; None is the CPU.
        random_seed: seed of an untrained network, for tests.

    Raises:
        ValueError: for an unknown architecture or tag (close names are suggested), an unsuitable ``image_size``, and
            weights that are not safetensors, are in another project's layout, or do not fit.
        FileNotFoundError: if the weights file does not exist.
    """

    def __init__(
        self,
        architecture: str,
        weights: Union[str, Path, None] = None,
        output: str = "global",
        *,
        pretrained_tag: str = "",
        normalize: bool = False,
        image_size: ImageSize = 0,
        crop: bool = False,
        device: Union[str, torch.device, None] = None,
        random_seed: Optional[int] = None,
    ):
        need("open_clip")
        import open_clip

        check_output(output)
        check_known("architecture", architecture, open_clip.list_models(), "ViT-B-32")
        config = open_clip.get_model_config(architecture)
        cfg = _preprocess_cfg(architecture, pretrained_tag, bool(config.get("quick_gelu")))
        state = None if weights is None else _visual_state(read_safetensors(weights), Path(weights).name)
        self.network: Any  # open_clip's image tower, of one of three families
        with building(weights, random_seed):
            self.network = _build_visual(config)
            size = _input_size(self.network, config["vision_cfg"], architecture, output, image_size)
            if weights is not None and state is not None:
                load_weights(self.network, state, f"the image tower of {architecture}", Path(weights).name)
            device = torch.device(device or "cpu")
            freeze(self.network, device)
        self.normalize = normalize
        mode = "bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic"
        preprocess = Preprocess(*size, mean=tuple(cfg["mean"]), std=tuple(cfg["std"]), mode=mode, crop=crop)
        name = f"openclip/{architecture}/{output}"
        fingerprint = hash_module(self.network, name, preprocess.describe(), f"normalize={normalize}")
        super().__init__(EncoderInfo(name, preprocess.describe(), fingerprint, output), preprocess, device)
        if weights is not None and not (pretrained_tag or normalize or image_size):
            self.arguments = {"architecture": architecture, "weights": str(weights), "output": output, "crop": crop}

    def features(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(next(self.network.parameters()).dtype)
        if self.info.output == "global":
            x = self.network(pixels)
        else:
            x = _last_map(self.network, pixels)
        return F.normalize(x, dim=1) if self.normalize else x


def _build_visual(config: dict[str, Any]) -> nn.Module:
    """The image tower alone; ``output_tokens`` off, so that its forward returns the pooled embedding and no more."""
    from open_clip.model import _build_vision_tower

    vision = {**config["vision_cfg"], "timm_model_pretrained": False, "output_tokens": False}
    return _build_vision_tower(config["embed_dim"], vision, quick_gelu=config.get("quick_gelu", False))


def _last_map(visual: Any, pixels: Tensor) -> Tensor:
    """``[B, 3, H, W]`` → ``[B, D, h, w]``; all three families of towers speak ``forward_intermediates``."""
    pooler = getattr(visual, "attn_pool", None)
    x = visual.forward_intermediates(
        pixels, indices=1, normalize_intermediates=pooler is None, intermediates_only=True
    )["image_intermediates"][-1]
    return x if pooler is None else pooler.ln_k(x.movedim(1, -1)).movedim(-1, 1)


def _preprocess_cfg(architecture: str, tag: str, quick_gelu: bool) -> dict[str, Any]:
    """Mean, std and interpolation of the named weights, or what most weights of the architecture use."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    default = vars(PreprocessCfg())
    cfgs = {t: {**default, **open_clip.get_pretrained_cfg(architecture, t)} for t in tags}
    if tag:
        check_known("pretrained_tag", tag, tags or ["(this architecture has no known weights)"])
        wanted = bool(cfgs[tag].get("quick_gelu", False))
        if wanted != quick_gelu:
            raise ValueError(
                f"pretrained_tag: {tag} was trained {'with' if wanted else 'without'} QuickGELU; choose "
                f"the {'…-quickgelu' if wanted else 'plain'} architecture instead of {architecture}"
            )
        return cfgs[tag]
    votes = Counter((tuple(c["mean"]), tuple(c["std"]), c["interpolation"]) for c in cfgs.values())
    if not votes:
        return default
    mean, std, interpolation = votes.most_common(1)[0][0]
    return {"mean": mean, "std": std, "interpolation": interpolation}


def _visual_state(state: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    """The image tower's tensors under the tower's own names."""
    if any(k.startswith("vision_model.") for k in state):
        raise ValueError(
            f"weights: {file} is in transformers' layout (vision_model.*), as ComfyUI's clip_vision files "
            "are; load it as CLIP_VISION, or take the open_clip file of the same model"
        )
    tower = {k[len("visual.") :]: v for k, v in state.items() if k.startswith("visual.")}
    return tower or state


def _input_size(
    visual: Any, vision_cfg: dict[str, Any], architecture: str, output: str, image_size: ImageSize
) -> tuple[int, int]:
    own = height_width(visual.image_size)
    if image_size == 0:
        return own
    size = height_width(image_size)
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        attention_pool = vision_cfg.get("timm_pool") in ("abs_attn", "rot_attn") and output == "global"
        free = not trunk.pretrained_cfg.get("fixed_input_size") and not attention_pool
    else:
        free = hasattr(visual, "attnpool") and output != "global"
    if size != own and not free:
        raise ValueError(
            f"image_size: {architecture} has fixed positions for {own[0]}×{own[1]} pixels and cannot give "
            f"{output} at {size[0]}×{size[1]}; use 0"
        )
    return size
