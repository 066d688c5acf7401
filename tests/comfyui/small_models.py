"""Real files of small networks with random weights, for every loader that the node tests use."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TIMM, TIMM_FILE = "test_vit", "test_vit.safetensors"
CLIP, CLIP_FILE = "ViT-S-32-alt", "clip_s32.safetensors"
VAE_FILE, MODEL_FILE, DATASET = "taesd16.safetensors", "sd3_tiny.safetensors", "editloss_conditioning"


def write_models(models: Path, output: Path) -> None:
    """Everything below, once; files that are there already stay."""
    encoders = models / "editloss_encoders"
    for folder, name, make in (
        (encoders, TIMM_FILE, timm_weights),
        (encoders, CLIP_FILE, clip_weights),
        (models / "vae", VAE_FILE, vae_weights),
        (models / "diffusion_models", MODEL_FILE, sd3_weights),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).is_file():
            save_file({k: v.contiguous() for k, v in make().items()}, folder / name)
    for folder in (output, models.parent / "datasets"):  # where ComfyUI 0.3.75 looks, and where 0.33.0 does
        write_conditioning(folder / DATASET)


def randomised(module: nn.Module, seed: int = 0, scale: float = 0.05) -> nn.Module:
    """Every weight takes part: nothing stays at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.add_(scale * torch.randn(value.shape, generator=generator))
    return module.eval()


def timm_weights() -> dict[str, Tensor]:
    """A vision transformer of 0.4 M parameters; its classifier stays in the file, as in a downloaded one."""
    import timm

    torch.manual_seed(0)
    return randomised(timm.create_model(TIMM, pretrained=False)).state_dict()


def clip_weights() -> dict[str, Tensor]:
    """The smallest picture tower of OpenCLIP, in half precision (45 MB)."""
    import open_clip
    from open_clip.model import _build_vision_tower

    torch.manual_seed(0)
    config = open_clip.get_model_config(CLIP)
    tower = randomised(_build_vision_tower(config["embed_dim"], config["vision_cfg"]), scale=0.01)
    return {f"visual.{name}": value.half() for name, value in tower.state_dict().items()}


class TinyVAEBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def conv(inputs: int, outputs: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class TinyVAE(nn.Module):
    """TAESD's layout (https://github.com/madebyollin/taesd) with FLUX's 16 channels, scale and shift."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        down, up = [conv(3, 64), TinyVAEBlock()], [nn.Identity(), conv(channels, 64), nn.ReLU()]
        for _ in range(3):
            down += [conv(64, 64, stride=2, bias=False), *(TinyVAEBlock() for _ in range(3))]
            up += [*(TinyVAEBlock() for _ in range(3)), nn.Upsample(scale_factor=2), conv(64, 64, bias=False)]
        self.taesd_encoder = nn.Sequential(*down, conv(64, channels))
        self.taesd_decoder = nn.Sequential(*up, TinyVAEBlock(), conv(64, 3))
        self.vae_scale, self.vae_shift = nn.Parameter(torch.tensor(0.3611)), nn.Parameter(torch.tensor(0.1159))

    def encode(self, pictures: Tensor) -> Tensor:
        """``[B, H, W, 3]`` in 0…1 → latents ``[B, h, w, C]``."""
        with torch.no_grad():
            return (self.taesd_encoder(pictures.movedim(-1, 1)) / self.vae_scale + self.vae_shift).movedim(1, -1)


def vae() -> TinyVAE:
    torch.manual_seed(0)
    model = TinyVAE()
    model.load_state_dict(
        {
            **randomised(model, scale=0.04).state_dict(),
            "vae_scale": torch.tensor(0.3611),
            "vae_shift": torch.tensor(0.1159),
        }
    )
    return model


def vae_weights() -> dict[str, Tensor]:
    return vae().state_dict()


def sd3_weights() -> dict[str, Tensor]:
    """The smallest flow model that ComfyUI's stock loader detects: one joint block of width 64, 16 latent channels."""
    generator = torch.Generator().manual_seed(0)
    width, text, pooled = 64, 20, 24
    linears = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, pooled),
        "y_embedder.mlp.2": (width, width),
        "context_embedder": (width, text),
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "x_embedder.proj": (width, 16, 2, 2),
        "joint_blocks.0.context_block.attn.qkv": (3 * width, width),
        "joint_blocks.0.context_block.adaLN_modulation.1": (2 * width, width),
        "joint_blocks.0.x_block.attn.qkv": (3 * width, width),
        "joint_blocks.0.x_block.attn.proj": (width, width),
        "joint_blocks.0.x_block.mlp.fc1": (4 * width, width),
        "joint_blocks.0.x_block.mlp.fc2": (width, 4 * width),
        "joint_blocks.0.x_block.adaLN_modulation.1": (6 * width, width),
    }
    state = {"pos_embed": torch.randn(1, 256, width, generator=generator)}
    for name, shape in linears.items():
        state[f"{name}.weight"] = 0.1 * torch.randn(shape, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return state


def write_conditioning(folder: Path) -> None:
    """What a text encoder would give, in the format of the stock Load Training Dataset: no text encoder is small."""
    generator = torch.Generator().manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    context, pooled = torch.randn(1, 5, 20, generator=generator), torch.randn(1, 24, generator=generator)
    torch.save(
        {"latents": [{"samples": torch.zeros(1, 16, 4, 4)}], "conditioning": [[[context, {"pooled_output": pooled}]]]},
        folder / "shard_0000.pkl",
    )
    (folder / "metadata.json").write_text("{}", encoding="utf-8")  # by which 0.33.0 knows the folder
