"""What else people measure edits with: distances of an output to the after picture, inside the mask.

The network is EfficientNet-Lite0 with its real ImageNet weights, since weights of LPIPS, CLIP or DINO are in no package
registry: "LPIPS-style" and "DINO-style" are those measures' formulas on this network's features, not the networks themselves.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PEERS = ("L1", "1 − SSIM", "LPIPS-style", "DINO-style (tokens)", "CLIP-style (pooled)")
SIDE = 320  # pixels of what the network sees


class Peers:
    """Distances of outputs to one after picture."""

    _network = None

    def __init__(self, after: np.ndarray, mask: np.ndarray):
        self.after, self.mask = after, mask
        rows, columns = np.nonzero(mask > 0.5)
        self.box = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        self.known = self._features(after)

    def distances(self, output: np.ndarray) -> dict[str, float]:
        from skimage.metrics import structural_similarity

        weight = self.mask / self.mask.sum()
        _, similar = structural_similarity(self.after, output, channel_axis=2, data_range=1.0, full=True)
        features = self._features(output)
        perceptual = [
            _mean((_unit(a) - _unit(b)).square().sum(1), self._token_mask(a)) for a, b in zip(self.known, features)
        ]
        last = self.known[-1], features[-1]
        tokens = _mean(1 - F.cosine_similarity(*last, dim=1), self._token_mask(last[0]))
        pooled = 1 - float(F.cosine_similarity(*(t.mean((2, 3)) for t in last)))
        values = (
            float((np.abs(output - self.after).mean(2) * weight).sum()), 1 - float((similar.mean(2) * weight).sum()),
            float(sum(perceptual)), tokens, pooled,
        )  # fmt: skip
        return dict(zip(PEERS, values))

    def _token_mask(self, features: Tensor) -> Tensor:
        top, bottom, left, right = self.box
        crop = torch.from_numpy(self.mask[top:bottom, left:right].copy())[None, None]
        return F.interpolate(crop, size=features.shape[-2:], mode="area")[:, 0]

    @torch.no_grad()
    def _features(self, picture: np.ndarray) -> list[Tensor]:
        top, bottom, left, right = self.box
        crop = torch.from_numpy(np.ascontiguousarray(picture[top:bottom, left:right])).float().permute(2, 0, 1)[None]
        crop = F.interpolate(crop, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        return self.network().forward_intermediates(2 * crop - 1, intermediates_only=True)

    @classmethod
    def network(cls):
        if cls._network is None:
            import tempfile

            import timm
            from safetensors.torch import load_file

            sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "encoders"))
            from lite0 import write_lite0

            with tempfile.TemporaryDirectory() as folder:
                weights = load_file(write_lite0(Path(folder) / "lite0.safetensors"))
            network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
            network.load_state_dict(weights)
            cls._network = network.eval()
        return cls._network


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features, dim=1)


def _mean(values: Tensor, weight: Tensor) -> float:
    return float((values * weight).sum() / weight.sum().clamp_min(1e-6))
