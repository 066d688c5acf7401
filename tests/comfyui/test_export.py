"""Export Training Config: the file says what Train Edit LoRA would have trained, setting for setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomllib
from helpers import graph, link
from runner.client import Client, ComfyError
from runner.server import ComfyServer
from safetensors import safe_open
from small_models import TIMM, TIMM_FILE, write_models

from editloss_core.demo.scenes import stool_pairs, write_folder
from editloss_core.objective import EditObjective
from editloss_core.training.config import TimmSection, VAESection
from editloss_core.training.config_reader import parse_config

SETTINGS = {
    "steps": 2, "learning_rate": 2e-3, "batch_size": 2, "rank": 4, "alpha": 8.0, "layers": "attention", "seed": 3, "hold_out": 1,
}  # fmt: skip
OPTIONS = {
    "EditLossOptimizerOptions": {
        "optimizer": "adamw", "accumulation": 2, "warmup": 1, "schedule": "cosine", "clip": 0.5, "weight_decay": 0.02, "ema": 0.5,
    },
    "EditLossNoiseOptions": {
        "distribution": "shifted", "mean": 0.1, "std": 0.9, "minimum_t": 0.05, "maximum_t": 0.95, "velocity_weight": 0.7,
        "edit_weight": 2.0,
    },
    "EditLossObjectiveOptions": {
        "crop": 96, "every": 1, "weighting": "inverse_square", "weighting_cap": 50.0, "gradients_every": 1, "overlays": "blend",
        "overlay_opacity": 0.6,
    },
    "EditLossLoRAOptions": {"layers": "", "dropout": 0.1},
    "EditLossRunOptions": {
        "checkpoint_every": 1, "keep": 2, "validate_every": 2, "previews": 1, "preview_steps": 2, "guidance": 1.5,
        "preview_guidance": 3.0, "gradient_checkpointing": False, "memory_reserve": 0.0,
    },
}  # fmt: skip

VARIANTS = {"count": 3, "flip": False, "shift": 0.1, "zoom": 1.2, "turn": 1.5, "tone": 0.1, "seed": 4}


@pytest.fixture(scope="module")
def folder(comfyui_server: ComfyServer) -> Path:
    """``input/export_pairs``, and the weights of a small timm network."""
    write_models(comfyui_server.base / "models", comfyui_server.output_dir)
    made = comfyui_server.base / "input" / "export_pairs"
    write_folder(stool_pairs(3, seed=0), made)
    return made


def exporting(**values: Any) -> dict[str, Any]:
    """Two encoders, three losses (one gated), every options node; ``train`` and ``export`` of the same."""
    options: dict[str, Any] = {}
    before: dict[str, Any] = {}
    for node, widgets in OPTIONS.items():
        options[node] = (node, {**widgets, **before})
        before = {"options": link(node)}
    shared = {**SETTINGS, "pairs": link("variants"), "objective": link("gated"), **before}
    return graph(
        pairs=("EditLossLoadPairs", {"folder": "export_pairs", "resolution": 128, "default_caption": "put a “stool” there"}),
        variants=("EditLossPairVariants", {**VARIANTS, "pairs": link("pairs")}),
        model=("EditLossDemoModel",),
        vae=("EditLossVAEEncoder", {"vae": link("model", 2)}),
        timm=("EditLossTimmEncoder", {"model_name": TIMM, "weights": TIMM_FILE, "output": "grid", "layer": -1, "name": "Näher"}),
        no_edit=("EditLossNoEditIdentity", {"encoder": link("vae"), "weight": 0.9, "dist": "cos", "margin": 0.5, "margin_mode": "auto"}),
        overlay=(
            "EditLossOverlayAvoidance",
            {"encoder": link("vae"), "weight": 0.7, "dist": "cos", "margin": 0.2, "margin_mode": "fixed",
             "objective": link("no_edit")},
        ),
        geometry=(
            "EditLossGeometryMatch", {"encoder": link("timm"), "weight": 0.5, "dist": "l1", "objective": link("overlay")},
        ),
        gated=("EditLossGateTerms", {"objective": link("geometry"), "terms": "overlay*", "t_min": 0.1, "t_max": 0.8}),
        **options,
        train=(
            "EditLossTrainKontextLoRA",
            {**shared, "name": "exported", "model": link("model"), "clip": link("model", 1), "vae": link("model", 2)},
        ),
        save=("EditLossSaveLoRA", {"run": link("train", 4), "file_name": "editloss/exported", "dtype": "fp32"}),
        export=(
            "EditLossExportTraining",
            {**shared, "name": "sub/exported", "model_folder": "/models/kontext", "quantization": "nf4", **values},
        ),
        text=("PreviewAny", {"source": link("export")}),
        file=("PreviewAny", {"source": link("export", 1)}),
    )  # fmt: skip


def test_the_file_says_what_the_graph_trains(client: Client, comfyui_server: ComfyServer, folder: Path) -> None:
    outputs = client.run(exporting()).outputs
    text, file = (outputs[node]["text"][0] for node in ("text", "file"))
    path = comfyui_server.output_dir / "editloss" / "configs" / "sub" / "exported.toml"
    assert file == "output/editloss/configs/sub/exported.toml" and path.read_text(encoding="utf-8") == text
    assert text in outputs["export"]["text"][0]
    config = parse_config(text, files=False)

    # What Train Edit LoRA itself wrote about the same graph.
    with safe_open(next((comfyui_server.base / "models" / "loras" / "editloss").glob("exported*")), "pt") as saved:
        header = saved.metadata()
    assert json.loads(json.dumps(config.training.as_dict())) == json.loads(header["editloss_settings"])
    assert json.loads(json.dumps(vars(config.lora))) == json.loads(header["lora"])
    assert EditObjective(config.objective.terms) == config.objective
    terms = json.loads(json.dumps([vars(term) for term in config.objective.terms]))
    assert terms == json.loads(header["editloss_objective"])
    assert json.loads(header["editloss_overlay"])["kinds"] == list(config.overlay.kinds) == ["blend"]
    assert json.loads(header["editloss_crop"]) == config.estimate.crop == 96
    assert json.loads(header["editloss_variants"]) == vars(config.variants) == VARIANTS
    assert json.loads(header["editloss_guidance"]) == config.model.guidance == 1.5
    assert json.loads(header["editloss_resolution"]) == config.pairs.resolution == 128

    assert config.model.path == "/models/kontext" and config.model.quantization == "nf4"
    assert not config.model.gradient_checkpointing and config.validation.preview_guidance == 3.0
    assert Path(config.pairs.folder) == folder and config.pairs.default_caption == "put a “stool” there"
    assert config.pairs.flawed == "leave out"
    assert config.validation.hold_out == 1 and not config.validation.folder
    assert (
        path.parent / config.run.folder
    ).resolve() == comfyui_server.output_dir.resolve() / "editloss/runs/sub/exported"
    assert (path.parent / config.run.cache).resolve() == comfyui_server.output_dir.resolve() / "editloss/cache"
    vae, timm = config.encoders.values()
    assert vae == VAESection() and isinstance(timm, TimmSection) and list(config.encoders)[1] == "Näher"
    assert (
        timm.model_name == TIMM and Path(timm.weights).is_file() and tomllib.loads(text)["encoders"][1]["layer"] == -1
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pairs": ("EditLossDemoPairs", {"count": 2, "unedited": 0, "overlaid": 0, "held_out": 1, "seed": 0})},
         "pairs: expected pairs of a folder (Load Pairs), got pictures of the graph"),
        ({"vae": ("EditLossDiffusionEncoder", {
            "model": link("model"), "vae": link("model", 2), "conditioning": link("words"), "block": "double_blocks.0",
            "noise_level": 0.3, "seed": 0, "output": "grid"})},
         "cannot be made outside this program; use VAE Latents, VAE Decoder Features, timm or OpenCLIP"),
    ],
)  # fmt: skip
def test_what_no_file_can_say_is_refused(client: Client, folder: Path, changes: dict, expected: str) -> None:
    prompt = {
        **{name: node for name, node in exporting().items() if name not in ("train", "save")},
        **graph(words=("CLIPTextEncode", {"clip": link("model", 1), "text": "remove the lamp"}), **changes),
    }
    with pytest.raises(ComfyError) as caught:
        client.run(prompt)
    assert expected in str(caught.value)
