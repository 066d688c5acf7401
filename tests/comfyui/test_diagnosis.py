"""Verdicts beside a training objective, and the pair audit, through the real server."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from comfy_client import Client, NodeError
from comfy_server import ComfyServer
from examples import PAIRS, PREFIX, WEIGHTS, prepare
from helpers import graph, link
from PIL import Image

ROOM = f"{PREFIX}room_"


@pytest.fixture(scope="module", autouse=True)
def example_files(comfyui_server: ComfyServer) -> None:
    prepare(comfyui_server.input_dir, comfyui_server.models_dir)


def diagnosis(**more: Any) -> dict[str, Any]:
    """Four outputs of a rendered pair: good, no edit, overlay, distorted."""
    names = {"s": "before", "g": "after", "o1": "output_good", "o2": "output_no_edit", "o3": "output_overlay", "o4": "output_distorted"}  # fmt: skip
    pictures = {key: ("LoadImage", {"image": f"{ROOM}{name}.png"}) for key, name in names.items()}
    given = {"before": link("s"), "output": link("b3"), "after": link("g"), "mask": link("m")}
    return graph(
        **pictures,
        m=("LoadImageMask", {"image": f"{ROOM}mask.png", "channel": "red"}),
        b1=("ImageBatch", {"image1": link("o1"), "image2": link("o2")}),
        b2=("ImageBatch", {"image1": link("b1"), "image2": link("o3")}),
        b3=("ImageBatch", {"image1": link("b2"), "image2": link("o4")}),
        diagnose=("EditLossDiagnoseOutputs", {**given, "width": 1200, **more}),
        values=("PreviewAny", {"source": link("diagnose", 3)}),
        maps=("PreviewImage", {"images": link("diagnose", 1)}),
    )


def test_every_output_gets_its_verdict_and_its_maps(client: Client) -> None:
    shown = client.run(diagnosis()).outputs
    values = json.loads(shown["values"]["text"][0])
    assert [o["verdict"] for o in values["outputs"]] == ["good", "no edit", "overlay", "distorted"]
    assert values["failure_rate"]["value"] == 0.75 and values["failure_rate"]["n"] == 4
    assert len(shown["maps"]["images"]) == 16
    picture = Image.open(io.BytesIO(client.download(shown["diagnose"]["images"][0])))
    assert picture.width == 1200


def test_the_training_signal_stands_beside_the_verdict(client: Client) -> None:
    nodes = graph(
        encoder=(
            "EditLossTimmEncoder",
            {"model_name": "tf_efficientnet_lite0", "weights": WEIGHTS, "output": "grid", "layer": 3, "image_size": 256},
        ),
        overlay=(
            "EditLossOverlayNegative",
            {
                "construction": "all", "opacity_min": 0.5, "opacity_max": 0.8, "seed": 0, "before": link("s"), "after": link("g"),
                "mask": link("m"),
            },
        ),
        encode=(
            "EditLossEncode",
            {
                "encoder": link("encoder"), "pred": link("b3"), "gt": link("g"), "src": link("s"),
                "overlay": link("overlay"), "mask": link("m"),
            },
        ),
        mix=("EditLossRecommendedMix", {"encoder": link("encoder"), "preset": "recommended", "geometry_dist": "cos"}),
    )  # fmt: skip
    prompt = {**diagnosis(objective=link("mix"), embeddings=link("encode")), **nodes}
    outputs = json.loads(client.run(prompt).outputs["values"]["text"][0])["outputs"]
    signals = [o["signal"] for o in outputs]
    assert signals[0]["says"] not in ("no edit", "overlay", "distorted") and signals[1]["says"] == "no edit"
    assert all(set(s["toward"]) == {"no edit", "distorted", "overlay"} for s in signals)


def test_an_objective_alone_is_refused(client: Client) -> None:
    nodes = graph(
        encoder=(
            "EditLossTimmEncoder",
            {
                "model_name": "tf_efficientnet_lite0",
                "weights": WEIGHTS,
                "output": "grid",
                "layer": 3,
                "image_size": 256,
            },
        ),
        mix=("EditLossRecommendedMix", {"encoder": link("encoder"), "preset": "recommended", "geometry_dist": "cos"}),
    )
    with pytest.raises(NodeError, match="embeddings: expected"):
        client.run({**diagnosis(objective=link("mix")), **nodes})


def test_the_pair_audit_names_the_mistakes(client: Client) -> None:
    prompt = graph(
        audit=("EditLossAuditPairs", {"folder": PAIRS}),
        ok=("PreviewAny", {"source": link("audit", 2)}),
        problems=("PreviewAny", {"source": link("audit", 3)}),
    )
    shown = client.run(prompt).outputs
    assert shown["ok"]["text"][0].lower() == "false" and shown["problems"]["text"][0] == "4"
