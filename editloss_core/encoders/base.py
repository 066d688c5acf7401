"""The protocol that every encoder keeps, and the preprocessing that most of them share."""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..progress import Progress

OUTPUTS = ("global", "tokens", "grid")

ImageSize = Union[int, Sequence[int]]
Region = tuple[float, float, float, float]  # top, left, bottom, right as fractions of a picture
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class EncoderInfo:
    """What an embedding must carry to be compared with another one.

    Attributes:
        name: readable and unique within a graph, for example ``timm/vit_small_patch14_dinov2/grid``.
        preprocessing: what happens to a picture before the network, in words.
        fingerprint: sha256 over weights, preprocessing and output; equal fingerprints give equal embeddings.
        output: ``"global"`` [B, D], ``"tokens"`` [B, P, D] or ``"grid"`` [B, h, w, D].
    """

    name: str
    preprocessing: str
    fingerprint: str
    output: str


class Encoder(ABC):
    """Pictures ``[B, H, W, 3]`` in 0…1 → embeddings, differentiable with respect to the pictures.

    A subclass sets ``info`` and ``device`` and implements :meth:`forward` and :meth:`grid`.

    Attributes:
        arguments: with which its class makes an equal one elsewhere; None where that takes an object (ComfyUI's, or a
            function), or random weights.
    """

    info: EncoderInfo
    device: torch.device
    arguments: Optional[Mapping[str, Any]] = None

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Checked pictures on ``self.device`` → ``[B, D]``, ``[B, P, D]`` or ``[B, h, w, D]``."""

    @abstractmethod
    def grid(self, height: int, width: int) -> Optional[tuple[int, int]]:
        """Rows and columns of the grid for pictures of this size (row-major for ``"tokens"``); None for global."""

    def region(self, height: int, width: int) -> Region:
        """The part of a picture of this size that the token grid covers: all of it, unless the encoder crops."""
        return WHOLE

    def reads_latents(self, latent_space: str, height: int, width: int) -> bool:
        """Whether the encoder has a ``from_latents`` that takes the latents of this autoencoder and of pictures of this
        size: without decoding, and with the result that it has for the pictures."""
        return False

    def __call__(self, images: Tensor) -> Tensor:
        """Encode with gradients.

        Raises:
            ValueError: for anything but a floating ``[B, H, W, 3]`` tensor with at least one picture.
        """
        check_images("images", images)
        return self.forward(images.to(self.device))

    def embed(self, images: Tensor, batch_size: int = 8, progress: Optional[Progress] = None) -> Tensor:
        """Encode without gradients in batches; the result is a float32 tensor on the CPU.

        Args:
            images: ``[B, H, W, 3]`` in 0…1.
            batch_size: pictures per forward pass; lower it when memory is short.
            progress: called with (done, total) pictures after each batch.
        """
        check_images("images", images)
        low, high = (float(v) for v in torch.aminmax(images))
        if not (low >= -0.1 and high <= 1.1):  # a resize may overshoot a little; NaN fails as well
            raise ValueError(f"images: expected values in 0…1, got values from {low:g} to {high:g}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        parts = []
        with torch.no_grad():
            for start in range(0, len(images), batch_size):
                parts.append(self(images[start : start + batch_size]).float().cpu())
                if progress is not None:
                    progress(min(start + batch_size, len(images)), len(images))
        return torch.cat(parts)


def check_images(name: str, images: Tensor) -> None:
    """ValueError unless ``images`` is a floating ``[B, H, W, 3]`` tensor with at least one pixel."""
    if not isinstance(images, Tensor):
        raise ValueError(f"{name}: expected a tensor [B, H, W, 3], got {type(images).__name__}")
    if images.ndim != 4 or images.shape[-1] != 3 or images.numel() == 0:
        raise ValueError(f"{name}: expected a picture batch [B, H, W, 3], got shape {list(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"{name}: expected floating values in 0…1, got {images.dtype}")


@dataclass(frozen=True)
class Preprocess:
    """Resize and normalise with gradients, in place of the rounding PIL pipelines that encoders ship with.

    Attributes:
        height, width: what the network takes, in pixels; 0 keeps the picture's own size rounded down to ``multiple``.
        mean, std: per channel, of pictures in 0…1.
        mode: ``"bicubic"`` or ``"bilinear"``, always antialiased.
        crop: False stretches the whole picture to the target (an edit at the border stays visible); True scales the
            shorter side and crops the centre, as CLIP was trained.
        multiple: the patch size; sizes that are kept are rounded down to it.
    """

    height: int
    width: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    mode: str = "bicubic"
    crop: bool = False
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("bicubic", "bilinear"):
            raise ValueError(f"mode: expected 'bicubic' or 'bilinear', got {self.mode!r}")
        if self.multiple < 1 or self.height < 0 or self.width < 0:
            raise ValueError(f"size: expected height and width >= 0 and multiple >= 1, got {self}")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels that the network sees for a picture of this size."""
        if self.height and self.width:
            return self.height, self.width
        if min(height, width) < self.multiple:
            raise ValueError(f"images: expected at least {self.multiple}×{self.multiple} pixels, got {height}×{width}")
        return height - height % self.multiple, width - width % self.multiple

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, H, W, 3]`` in 0…1 → normalised ``[B, 3, h, w]`` in float32 (float64 stays float64)."""
        x = images.movedim(-1, 1)
        x = x if x.dtype == torch.float64 else x.float()
        target, scaled, top, left = self._plan(*x.shape[2:])
        if scaled != tuple(x.shape[2:]):
            x = F.interpolate(x, size=scaled, mode=self.mode, antialias=True, align_corners=False)
        # Values that overshoot are cut off, gradients pass: clamp's own gradient is 0 at the bounds too, where all the black
        # and white of a picture lies.
        x = x + (x.clamp(0.0, 1.0) - x).detach()
        x = x[:, :, top : top + target[0], left : left + target[1]]
        mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def _plan(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int], int, int]:
        """(what the network sees, what the picture is scaled to, top and left of the former in the latter)."""
        target = scaled = self.size(height, width)
        if self.crop:  # torchvision's Resize and CenterCrop round in these ways
            if target[0] * width >= target[1] * height:
                scaled = target[0], max(target[1], width * target[0] // height)
            else:
                scaled = max(target[0], height * target[1] // width), target[1]
        return target, scaled, round((scaled[0] - target[0]) / 2), round((scaled[1] - target[1]) / 2)

    def region(self, height: int, width: int) -> Region:
        """The part of a picture of this size that the network sees."""
        target, scaled, top, left = self._plan(height, width)
        return (
            top / scaled[0], left / scaled[1], (top + target[0]) / scaled[0], (left + target[1]) / scaled[1]
        )  # fmt: skip

    def describe(self) -> str:
        """The preprocessing in words, as it stands in an embedding file."""
        size = f"{self.height}×{self.width}" if self.height and self.width else f"own size in steps of {self.multiple}"
        how = "shorter side, centre crop" if self.crop else "stretch"
        mean, std = (" ".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
        return f"resize {size} ({self.mode}, antialias, {how}); mean {mean}; std {std}"


class PixelEncoder(Encoder):
    """An encoder made of a :class:`Preprocess` and a function from its pixels to a vector or a feature map.

    A subclass implements :meth:`features` and calls ``super().__init__`` once its network stands.
    """

    def __init__(self, info: EncoderInfo, preprocess: Preprocess, device: torch.device):
        self.info, self.preprocess, self.device = info, preprocess, device
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels ``[B, 3, h, w]`` → ``[B, D]`` for ``"global"``, else a map ``[B, D, rows, columns]``."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(self.preprocess(images))
        expected = 2 if self.info.output == "global" else 4
        if x.ndim != expected:
            raise ValueError(f"{self.info.name}: expected {expected}-dimensional features, got {list(x.shape)}")
        if self.info.output == "global":
            return x
        self._grids[self.preprocess.size(*images.shape[1:3])] = (x.shape[2], x.shape[3])
        x = x.permute(0, 2, 3, 1)
        return x.flatten(1, 2) if self.info.output == "tokens" else x

    def region(self, height: int, width: int) -> Region:
        return self.preprocess.region(height, width)

    def grid(self, height: int, width: int) -> Optional[tuple[int, int]]:
        """As in :class:`Encoder`. A size that was not encoded before costs one black picture through the network."""
        if self.info.output == "global":
            return None
        size = self.preprocess.size(height, width)
        if size not in self._grids:
            with torch.no_grad():
                x = self.features(torch.zeros(1, 3, *size, device=self.device))
                self._grids[size] = (x.shape[2], x.shape[3])
        return self._grids[size]


def freeze(module: nn.Module, device: torch.device) -> nn.Module:
    """An encoder is never trained: eval mode, no parameter gradients, on its device."""
    return module.eval().requires_grad_(False).to(device)


def check_output(output: str, allowed: Sequence[str] = OUTPUTS) -> None:
    """ValueError unless ``output`` is one of ``allowed``."""
    if output not in allowed:
        raise ValueError(f"output: expected one of {', '.join(allowed)}, got {output!r}")


def check_known(name: str, value: str, known: Iterable[str], example: str = "") -> None:
    """ValueError with the closest known names unless ``value`` is one of ``known``.

    Args:
        name: of the argument, for the error.
        value: what was given for it.
        known: what may be given.
        example: of a known name, for when nothing is close; empty: the first one.
    """
    known = list(known)
    if value not in known:
        close = _close_names(value, known)[:4]
        hint = f"{len(known)} names are known, e.g. {example or known[0]}"
        if close:
            hint = f"did you mean {', '.join(close)}?"
        raise ValueError(f"{name}: {value!r} is unknown; {hint}")


def _close_names(value: str, known: Sequence[str]) -> list[str]:
    """The names with every word of ``value`` in them, else with the most words, else those spelled alike."""
    lower = {k.lower(): k for k in known}
    text = re.sub(r"^.*/(?=[a-z])", "", value.lower())  # facebook/dinov2-base, but not ViT-L/14
    words = set(re.findall(r"[a-z0-9]+", text))
    telling = {w for w in words if len(re.findall(r"[a-z]", w)) >= 3}
    # A word begins where letters or digits begin: vit is not in convit, and 14 is in patch14.
    starts = {w: re.compile((r"(?<!\d)" if w[0].isdigit() else "(?<![a-z])") + w) for w in words}
    found = {k: {w for w in words if starts[w].search(k)} for k in lower}

    close = [k for k in lower if words and found[k] == words]
    if not close:
        close = [k for k in lower if found[k] & telling]
        most = max((len(found[k]) for k in close), default=0)
        close = [k for k in close if len(found[k]) == most]
    if not close:
        return [lower[k] for k in difflib.get_close_matches(text, lower, n=4, cutoff=0.5)]
    return [lower[k] for k in sorted(close, key=lambda k: (len(k), -difflib.SequenceMatcher(None, text, k).ratio()))]


def height_width(image_size: ImageSize) -> tuple[int, int]:
    """``518`` or ``(392, 518)`` → (height, width).

    Raises:
        ValueError: for anything else, and for sizes below one pixel.
    """
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or any(not isinstance(v, int) or v < 1 for v in pair):
        raise ValueError(f"image_size: expected pixels or (height, width), got {image_size!r}")
    return pair


@contextmanager
def building(weights: Union[str, Path, None], random_seed: Optional[int]) -> Iterator[None]:
    """Where a network is constructed: outside ComfyUI's inference mode (its tensors cannot take part in backward),
    with a reproducible start if it stays random, and without touching torch's global random state.

    Raises:
        ValueError: unless exactly one of ``weights`` and ``random_seed`` is given. An untrained encoder measures
            nothing, so it has to be asked for (tests do).
    """
    if (weights is None) == (random_seed is None):
        raise ValueError(
            "weights: expected a .safetensors file, or None with random_seed for an untrained network; "
            f"got weights={weights!r} and random_seed={random_seed!r}"
        )
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        if random_seed is not None:
            torch.default_generator.manual_seed(random_seed)
        yield


def load_weights(module: nn.Module, state: dict[str, Tensor], name: str, file: str, ignore: Sequence[str] = ()) -> None:
    """Copy ``state`` into ``module``; every tensor must fit.

    Args:
        module: the network.
        state: its tensors by name.
        name: of the network, for the error.
        file: name of the file that the tensors are from, for the error.
        ignore: prefixes of tensors that the file may hold and the network does not need (a classifier head).

    Raises:
        ValueError: names a few of the missing, misshapen and surplus tensors, and says so where less than half of the
            network is in the file. Nothing is copied then.
    """
    own = module.state_dict()
    # BatchNorm's step counter plays no part in eval mode, and old files lack it.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    surplus = [k for k in state if k not in own and not k.startswith(tuple(ignore))]
    misshapen = [
        f"{k} {list(state[k].shape)} instead of {list(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    faults = []
    for kind, names in (("missing", missing), ("of another shape", misshapen), ("not known to the network", surplus)):
        if names:
            faults.append(f"{len(names)} {kind} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})")
    if faults:
        lead = ""
        if 2 * (len(missing) + len(misshapen)) > len(own):
            lead = (
                f" holds another network than {name}; set the model name (or architecture) to the network that the "
                "file was saved from. It"
            )
        raise ValueError(
            f"weights: {file}{lead} does not fit {name}, which has {len(own)} tensors: {'; '.join(faults)}"
        )
    module.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
