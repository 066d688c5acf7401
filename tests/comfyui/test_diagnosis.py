"""Verdicts beside a training objective, and the pair audit, through the real server."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from helpers import graph, link
from PIL import Image
from runner.client import Client, NodeError


def diagnosis(**more: Any) -> dict[str, Any]:
    """Four outputs of a drawn room: good, no edit, overlay, distorted."""
    given = {"before": link("room"), "output": link("four"), "after": link("room", 1), "mask": link("room", 2)}
    return graph(
        room=("EditLossExamplePictures", {"scene": "drawn room"}),
        four=("ImageFromBatch", {"image": link("room", 3), "batch_index": 0, "length": 4}),
        diagnose=("EditLossDiagnoseOutputs", {**given, "width": 1200, **more}),
        values=("PreviewAny", {"source": link("diagnose", 3)}),
        maps=("PreviewImage", {"images": link("diagnose", 1)}),
    )


def objective() -> dict[str, Any]:
    """The recommended mix on the demo model's VAE latents."""
    return graph(
        demo=("EditLossDemoModel",),
        encoder=("EditLossVAEEncoder", {"vae": link("demo", 2)}),
        mix=("EditLossRecommendedMix", {"encoder": link("encoder"), "preset": "recommended", "geometry_dist": "cos"}),
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
        overlay=(
            "EditLossOverlayNegative",
            {
                "construction": "all", "opacity_min": 0.5, "opacity_max": 0.8, "seed": 0, "before": link("room"),
                "after": link("room", 1), "mask": link("room", 2),
            },
        ),
        encode=(
            "EditLossEncode",
            {
                "encoder": link("encoder"), "pred": link("four"), "gt": link("room", 1), "src": link("room"),
                "overlay": link("overlay"), "mask": link("room", 2),
            },
        ),
    )  # fmt: skip
    prompt = {**diagnosis(objective=link("mix"), embeddings=link("encode")), **objective(), **nodes}
    outputs = json.loads(client.run(prompt).outputs["values"]["text"][0])["outputs"]
    signals = [o["signal"] for o in outputs]
    assert signals[0]["says"] not in ("no edit", "overlay", "distorted") and signals[1]["says"] == "no edit"
    assert all(set(s["toward"]) == {"no edit", "distorted", "overlay"} for s in signals)


def test_an_objective_alone_is_refused(client: Client) -> None:
    with pytest.raises(NodeError, match="embeddings: expected"):
        client.run({**diagnosis(objective=link("mix")), **objective()})


def test_the_pair_audit_names_the_mistakes(client: Client) -> None:
    prompt = graph(
        pairs=("EditLossExamplePairs", {"resolution": 384}),
        audit=("EditLossAuditPairs", {"folder": "not looked at", "pairs": link("pairs")}),
        ok=("PreviewAny", {"source": link("audit", 2)}),
        problems=("PreviewAny", {"source": link("audit", 3)}),
    )
    shown = client.run(prompt).outputs
    assert shown["ok"]["text"][0].lower() == "false" and shown["problems"]["text"][0] == "4"
