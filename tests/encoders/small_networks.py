"""Small networks of the real classes, and what the tests of several encoders share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

VIT, DINO2, DINO3 = "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"
SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}
TIMM_KWARGS = {VIT: SMALL, DINO2: SMALL, DINO3: SMALL, "test_resnet": {}, "test_efficientnet": {}, "test_convnext": {}}

_TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
_VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
# Every family of image towers that open_clip has, small.
CLIPS = {
    "tiny-vit": {"vision_cfg": _VIT},
    "tiny-coca": {
        "vision_cfg": {
            **_VIT,
            "attentional_pool": True,
            "attn_pooler_queries": 4,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        }
    },
    "tiny-resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64}},
    "tiny-convnext": {
        "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    },
    "tiny-siglip": {
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "embed_dim": 64,
    },
}


def register_clips(folder: Path) -> None:
    """Make CLIPS known to open_clip, as a user does with his own configurations."""
    import open_clip

    for name, config in CLIPS.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 32, "text_cfg": _TEXT, **config}))
        open_clip.add_model_config(folder / f"{name}.json")


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """No zeros and ones of a fresh network: every weight and statistic takes part, and outputs stay moderate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                noise = 0.1 * torch.randn(value.shape, generator=generator)
                value.add_(noise.abs() if name.endswith("running_var") else noise)
    return net.eval()


class TinyEncoder(nn.Sequential):
    """Shaped like TAESD's encoder: strided convolutions to latents, 8 pixels each."""

    def __init__(self, channels: int = 4):
        super().__init__(
            nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, channels, 3, 2, 1)
        )


class TinyDecoder(nn.Sequential):
    """Shaped like TAESD's decoder: two resolutions before the last, upsampled by twice."""

    def __init__(self, channels: int = 4):
        up = [nn.Conv2d(channels, 8, 3, 1, 1), nn.SiLU()]
        for _ in range(3):
            up += [nn.Conv2d(8, 8, 3, 1, 1), nn.SiLU(), nn.Upsample(scale_factor=2)]
        super().__init__(*up, nn.Conv2d(8, 8, 3, 1, 1), nn.SiLU(), nn.Conv2d(8, 3, 3, 1, 1))


class TinyDiT(nn.Module):
    """Shaped like Flux where it matters here: patches of 2 × 2 latents, text tokens first, blocks that return pairs."""

    class Block(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.linear, self.runs = nn.Linear(width, width), 0

        def forward(self, image, text):
            self.runs += 1
            return image + torch.tanh(self.linear(image) + text.mean(1, keepdim=True)), text

    def __init__(self, channels: int = 4, width: int = 16):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, 2, 2)
        self.text = nn.Parameter(torch.randn(1, 3, width))
        self.blocks = nn.ModuleList(TinyDiT.Block(width) for _ in range(3))

    def forward(self, x, t):
        image = self.embed(nn.functional.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))).flatten(2).mT
        image, text = image + t.view(-1, 1, 1).to(image), self.text.to(image)
        for block in self.blocks:
            image, text = block(image, text)
        return image


def assert_close_to_pil(ours: torch.Tensor, theirs: torch.Tensor, std: tuple[float, ...]) -> None:
    """Preprocessed pixels agree but for two habits of PIL: it rounds to 8 bits after each of its two passes, and it
    clips cubic overshoot after each. Measured on ``photo``: 0.3/255 on average, up to 6/255 beside hard black edges;
    with a clamp between two passes the largest would be 1.0/255, but gradients would stop there too."""
    difference = ((ours - theirs).abs() * 255 * torch.tensor(std).view(1, 3, 1, 1)).flatten().sort().values
    assert ours.shape == theirs.shape and difference.mean() < 0.5
    assert difference[int(0.995 * len(difference))] < 1.5 and difference[-1] < 8
