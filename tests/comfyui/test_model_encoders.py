"""ComfyUI's VAE, CLIP_VISION and MODEL as encoders: equal to ComfyUI's own numbers, with gradients that are right.

The checks run in one process of their own, inside ComfyUI (see driver_model_encoders.py); here each is one test. The
last test loads a CLIP vision file of a real size through the stock loader of a running server.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from driver_model_encoders import CHECKS
from helpers import check_passed, graph, link, run_driver
from PIL import Image
from runner.client import Client
from runner.server import ComfyServer


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Check → traceback, empty where it passed."""
    return run_driver("driver_model_encoders.py", tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("name", CHECKS)
def test_in_comfyui(name: str, results: dict[str, str]) -> None:
    check_passed(name, results)


VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}


def test_a_vit_l_file_through_the_stock_loader(comfyui_server: ComfyServer, client: Client) -> None:
    """600 MB of random weights in transformers' layout; transformers itself says what must come out."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_L))
    model = model.to_empty(device="cpu").half().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.02).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for embeddings in (model.vision_model.embeddings,):
            embeddings.position_ids = torch.arange(257)[None]
    folder = comfyui_server.models_dir / "clip_vision"
    folder.mkdir(exist_ok=True)
    file = folder / "vit_l_random.safetensors"
    try:
        save_file({k: v for k, v in model.state_dict().items() if v.is_floating_point()}, file)
        pixels = (torch.rand(2, 224, 224, 3) * 255).round().to(torch.uint8)
        for name, picture in zip(("pred", "gt"), pixels):
            Image.fromarray(picture.numpy()).save(comfyui_server.input_dir / f"vit_l_{name}.png")
        shown = client.run(
            graph(
                clip=("CLIPVisionLoader", {"clip_name": file.name}),
                encoder=(
                    "EditLossCLIPVisionEncoder",
                    {"clip_vision": link("clip"), "output": "global", "layer": "last"},
                ),
                pred=("LoadImage", {"image": "vit_l_pred.png"}),
                gt=("LoadImage", {"image": "vit_l_gt.png"}),
                encode=("EditLossEncode", {"encoder": link("encoder"), "pred": link("pred"), "gt": link("gt")}),
                loss=(
                    "EditLossPairDistance",
                    {"encoder": link("encoder"), "weight": 1.0, "anchor": "pred", "positive": "gt", "dist": "cos"},
                ),
                evaluate=("EditLossEvaluateObjective", {"objective": link("loss"), "embeddings": link("encode")}),
                show=("PreviewAny", {"source": link("evaluate", 3)}),
            )
        )
        values: dict[str, Any] = json.loads(shown.outputs["show"]["text"][0])
        mean, std = (
            torch.tensor([0.48145466, 0.4578275, 0.40821073]),
            torch.tensor([0.26862954, 0.26130258, 0.27577711]),
        )
        with torch.no_grad():
            z = model.float()(pixel_values=((pixels / 255.0 - mean) / std).movedim(-1, 1)).image_embeds
        expected = 1 - torch.cosine_similarity(z[:1], z[1:]).item()
        assert values["total"] == pytest.approx(expected, abs=1e-4) and expected > 1e-3
    finally:
        file.unlink(missing_ok=True)
        client.call("/free", {"unload_models": True, "free_memory": True})
