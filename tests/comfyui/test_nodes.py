"""Every node in a real ComfyUI: its schema, its numbers against the core's, its errors."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import graph, link
from PIL import Image, ImageFilter
from runner.client import Client, NodeError
from runner.server import ComfyServer, pack_root
from small_models import CLIP, CLIP_FILE, DATASET, MODEL_FILE, TIMM, TIMM_FILE, VAE_FILE, vae, write_models
from torch import Tensor

from editloss_core import losses
from editloss_core.embeddings import EmbeddingSet, encode_pairs, load_shards
from editloss_core.encoders import OpenCLIPEncoder, TimmEncoder
from editloss_core.masks import estimate_mask
from editloss_core.negatives import OverlaySettings, make_overlays
from editloss_core.pairs import PairSet

ROOM_CATEGORIES = {"encoders", "embeddings", "negatives", "losses", "diagnostics", "training", "demo"}
SIDE = 96  # pixels of the test pictures
TIMM_WIDGETS = {"model_name": TIMM, "weights": TIMM_FILE, "output": "grid", "layer": -1, "image_size": 64}

# ---------------------------------------------------------------------------- schema


def ours(object_info: dict[str, Any]) -> dict[str, Any]:
    return {name: info for name, info in object_info.items() if name.startswith("EditLoss")}


def inputs_of(info: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    declared = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    return {name: (entry[0], entry[1] if len(entry) > 1 else {}) for name, entry in declared.items()}


def test_every_class_of_the_files_is_served_and_no_other(object_info: dict[str, Any]) -> None:
    ids, listed = set(), 0
    for file in (pack_root() / "nodes").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        ids |= set(re.findall(r'"(EditLoss[A-Z]\w+)"', text))
        names = re.search(r"^NODES = \[(.*?)\]", text, re.S | re.M)
        listed += len(re.findall(r"\w+", names.group(1))) if names else 0
    served = ours(object_info)
    assert set(served) == ids and len(served) == listed
    assert {info["python_module"] for info in served.values()} == {"custom_nodes.comfyui-editloss"}


def test_ids_categories_and_descriptions(object_info: dict[str, Any]) -> None:
    for name, info in ours(object_info).items():
        assert re.fullmatch(r"EditLoss[A-Z][A-Za-z]+", name)
        pack, _, room = info["category"].partition("/")
        assert pack == "EditLoss" and room in ROOM_CATEGORIES, name
        assert len(info["description"]) > 20 and info["description"].rstrip()[-1] in ".:…)", name
        assert info["display_name"] and info["display_name"] != name
    assert ROOM_CATEGORIES <= {info["category"].partition("/")[2] for info in ours(object_info).values()}


def test_every_input_and_output_has_a_tooltip(object_info: dict[str, Any]) -> None:
    for name, info in ours(object_info).items():
        for input_name, (_, options) in inputs_of(info).items():
            assert len(options.get("tooltip") or "") > 10, f"{name}.{input_name}"
        assert info["output"] and len(info["output_tooltips"]) == len(info["output"]), name
        assert all(len(tip or "") > 10 for tip in info["output_tooltips"]), name


def test_output_names_are_given_and_apart_from_input_names_of_the_same_type(object_info: dict[str, Any]) -> None:
    for name, info in ours(object_info).items():
        assert len(set(info["output_name"])) == len(info["output_name"])
        for shown, kind in zip(info["output_name"], info["output"]):
            assert re.fullmatch(r"[a-z_]+", shown) and shown != kind, f"{name}: {shown}"


def test_defaults_are_allowed_values(object_info: dict[str, Any]) -> None:
    for name, info in ours(object_info).items():
        for input_name, (kind, options) in inputs_of(info).items():
            where = f"{name}.{input_name}"
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"], where
                assert options["min"] < options["max"] and options["step" if kind == "FLOAT" else "max"], where
            elif kind == "COMBO":
                assert isinstance(options["options"], list), where
                assert "default" not in options or options["default"] in options["options"], where
            elif kind in ("STRING", "BOOLEAN"):
                assert "default" in options, where


def test_optional_inputs_come_after_required_ones(object_info: dict[str, Any]) -> None:
    """ComfyUI shows them in this order, and saved workflows keep widget values by it."""
    for info in ours(object_info).values():
        assert info["input_order"]["required"] == list(info["input"]["required"])


def test_every_node_has_a_help_page_under_its_name_and_every_page_a_node(object_info: dict[str, Any]) -> None:
    pages = {page.stem: page for page in (pack_root() / "web" / "docs").glob("EditLoss*.md")}
    assert pages.keys() == ours(object_info).keys()
    for name, page in pages.items():
        assert page.read_text(encoding="utf-8").startswith(f"# {object_info[name]['display_name']}\n")


# ---------------------------------------------------------------------------- the pictures and models


def blob(x: float, y: float, colour: tuple[float, float, float], radius: float = 0.2) -> np.ndarray:
    """A picture with shading, some noise, and one disc."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    noise = np.random.default_rng(int(1000 * (x + y))).normal(0, 0.004, (SIDE, SIDE, 3))
    picture = np.stack([0.4 + 0.3 * columns, 0.5 + 0.2 * rows, 0.6 - 0.2 * columns], -1) + noise
    inside = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
    picture[inside] = np.asarray(colour) + 0.1 * np.sin(40 * columns[inside])[:, None]
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def as_tensor(pixels: np.ndarray) -> Tensor:
    """As LoadImage makes it."""
    return torch.from_numpy(pixels.astype(np.float32) / 255.0)[None]


@pytest.fixture(scope="module")
def world(comfyui_server: ComfyServer) -> SimpleNamespace:
    """Pictures in the input folder, models in the model folders; the same pictures as tensors by role."""
    write_models(comfyui_server.models_dir, comfyui_server.output_dir)
    src, gt = blob(0.5, 0.5, (0.9, 0.2, 0.1)), blob(0.5, 0.45, (0.1, 0.3, 0.9), 0.23)
    pictures = {
        "src": src,
        "gt": gt,
        "pred1": blob(0.52, 0.46, (0.15, 0.3, 0.8), 0.22),
        "pred2": src[:, ::-1],
        "pred3": (src // 2 + gt // 2),
        "bad1": np.roll(gt, 17, 1),
        "bad2": 255 - gt,
    }
    for name, pixels in pictures.items():
        Image.fromarray(np.ascontiguousarray(pixels)).save(comfyui_server.input_dir / f"editloss_{name}.png")
    changed = (np.abs(src.astype(int) - gt).max(-1) > 60).astype(np.uint8) * 255
    mask = Image.fromarray(changed).filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.GaussianBlur(2))
    mask.convert("RGB").save(
        comfyui_server.input_dir / "editloss_mask.png"
    )  # ComfyUI 0.33.0 reads grey files a level off
    tensors = {name: as_tensor(np.ascontiguousarray(pixels)) for name, pixels in pictures.items()}
    tensors["pred"] = torch.cat([tensors.pop(f"pred{i}") for i in (1, 2, 3)])
    tensors["hard_negative"] = torch.cat([tensors.pop(f"bad{i}") for i in (1, 2)])
    return SimpleNamespace(
        images=tensors,
        mask=as_tensor(np.asarray(mask)),
        server=comfyui_server,
        weights=comfyui_server.models_dir / "editloss_encoders",
    )


def load(name: str) -> tuple[str, dict[str, Any]]:
    return "LoadImage", {"image": f"editloss_{name}.png"}


def batch(a: str, b: str) -> tuple[str, dict[str, Any]]:
    return "ImageBatch", {"image1": link(a), "image2": link(b)}


OVERLAY = {"construction": "all", "opacity_min": 0.5, "opacity_max": 0.8, "seed": 4}
PICTURES = {
    "src": load("src"),
    "gt": load("gt"),
    "p1": load("pred1"),
    "p2": load("pred2"),
    "p3": load("pred3"),
    "b1": load("bad1"),
    "b2": load("bad2"),
    "p12": batch("p1", "p2"),
    "pred": batch("p12", "p3"),
    "bad": batch("b1", "b2"),
    "mask": ("LoadImageMask", {"image": "editloss_mask.png", "channel": "red"}),
    "overlay": (
        "EditLossOverlayNegative",
        {**OVERLAY, "before": link("src"), "after": link("gt"), "mask": link("mask")},
    ),
    "encoder": ("EditLossTimmEncoder", TIMM_WIDGETS),
    "encode": (
        "EditLossEncode",
        {
            "encoder": link("encoder"),
            "pred": link("pred"),
            "gt": link("gt"),
            "src": link("src"),
            "overlay": link("overlay"),
            "hard_negative": link("bad"),
            "mask": link("mask"),
        },
    ),
}


def evaluated(*chain: tuple[str, dict[str, Any]], **nodes: Any) -> dict[str, Any]:
    """Pictures, encoder, Encode, a chain of loss nodes, Evaluate and its JSON; ``nodes`` replace or add nodes."""
    wired: dict[str, Any] = {}
    for i, (kind, widgets) in enumerate(chain):
        before = {"objective": link(f"loss{i - 1}")} if i else {}
        wired[f"loss{i}"] = (kind, {"encoder": link("encoder"), **before, **widgets})
    return graph(
        **{
            **PICTURES,
            **wired,
            "evaluate": (
                "EditLossEvaluateObjective",
                {"objective": link(f"loss{len(chain) - 1}"), "embeddings": link("encode"), "width": 640},
            ),
            "show": ("PreviewAny", {"source": link("evaluate", 3)}),
            **nodes,
        }
    )


def values_of(client: Client, prompt: dict[str, Any]) -> dict[str, Any]:
    return json.loads(client.run(needed(prompt)).outputs["show"]["text"][0])


def needed(prompt: dict[str, Any]) -> dict[str, Any]:
    """Without nodes that no output uses: a broken example should fail for one reason."""
    outputs = [
        n
        for n, node in prompt.items()
        if node["class_type"]
        in (
            "PreviewAny",
            "PreviewImage",
            "SaveImage",
            "EditLossEvaluateObjective",
            "EditLossSaveEmbeddings",
            "EditLossStoreHardNegative",
            "MaskPreview",
        )
    ]
    kept: set[str] = set()
    while outputs:
        name = outputs.pop()
        if name not in kept and name in prompt:
            kept.add(name)
            outputs += [v[0] for v in prompt[name]["inputs"].values() if isinstance(v, list)]
    return {name: node for name, node in prompt.items() if name in kept}


def picture_of(client: Client, ref: dict[str, str]) -> Tensor:
    with Image.open(io.BytesIO(client.download(ref))) as picture:
        return as_tensor(np.asarray(picture.convert("RGB")))


# ---------------------------------------------------------------------------- loss nodes against the core


@pytest.fixture(scope="module")
def core(world: SimpleNamespace) -> SimpleNamespace:
    """Embeddings by role, each for three outputs, and the token weights of the mask, made in this process."""
    encoder = TimmEncoder(TIMM, world.weights / TIMM_FILE, image_size=64)
    settings = OverlaySettings(opacity=(0.5, 0.8), scale=(0.95, 1.05), seed=4)
    overlays = make_overlays(world.images["src"], world.images["gt"], world.mask, settings=settings).images
    z = {role: encoder.embed(world.images[role]) for role in ("pred", "gt", "src", "hard_negative")}
    several = {"overlay": encoder.embed(overlays), "hard_negative": z.pop("hard_negative")}
    z = {role: t.expand(3, -1, -1, -1) for role, t in z.items()}
    z.update({role: t[None].expand(3, -1, -1, -1, -1) for role, t in several.items()})
    made = EmbeddingSet().with_images(encoder, {"gt": world.images["gt"]}).with_mask(world.mask)
    weights = made.token_weights(encoder.info.name).expand(3, -1, -1)
    return SimpleNamespace(encoder=encoder, overlays=overlays, w=weights, **z)


def difference(c: SimpleNamespace) -> Tensor:
    return losses.token_distances(c.gt.contiguous(), [c.src.contiguous()], "cos")[0]


ROLES = {"anchor": "pred", "positive": "gt"}
Case = tuple[str, dict[str, Any], Callable[[SimpleNamespace], Tensor]]
# node, widgets, the public loss per sample
CASES: list[Case] = [
    (
        "NoEditIdentity",
        {"dist": "cos", "margin": 0.3, "margin_mode": "fixed", "smooth": 0.05},
        lambda c: losses.loss_no_edit_identity(c.pred, c.gt, c.src, 0.3, "cos", "mean", "none", c.w, 0.05),
    ),
    (
        "NoEditIdentity",
        {"dist": "l2", "margin": 0.6, "margin_mode": "auto", "token_weights": "none"},
        lambda c: losses.loss_no_edit_identity(c.pred, c.gt, c.src, "auto:0.6", "l2", "mean", "none"),
    ),
    ("GeometryMatch", {"dist": "l2"}, lambda c: losses.loss_geometry_match(c.pred, c.gt, "l2", "mean", "none", c.w)),
    (
        "GeometryMatch",
        {"dist": "cos", "agg": "max"},
        lambda c: losses.loss_geometry_match(c.pred, c.gt, "cos", "max", "none", c.w),
    ),
    (
        "OverlayAvoidance",
        {"dist": "cos", "margin": 0.25, "margin_mode": "fixed", "neg_agg": "max"},
        lambda c: losses.loss_overlay_avoidance(c.pred, c.gt, c.overlay, 0.25, "cos", "mean", "none", c.w, 0.0, "max"),
    ),
    (
        "OverlayAvoidance",
        {"dist": "cos", "margin": 0.9, "margin_mode": "auto", "token_weights": "difference"},
        lambda c: losses.loss_overlay_avoidance(
            c.pred, c.gt, c.overlay, "auto:0.9", "cos", "mean", "none", difference(c)
        ),
    ),
    (
        "FeatureMatch",
        {**ROLES, "dist": "l1", "agg": "sum", "token_weights": "none"},
        lambda c: losses.feature_match_loss(c.pred, c.gt, "l1", "sum", "none"),
    ),
    (
        "FeatureMatch",
        {"anchor": "src", "positive": "pred", "dist": "l2"},
        lambda c: losses.feature_match_loss(c.src, c.pred, "l2", "mean", "none", c.w),
    ),
    (
        "Contrastive",
        {**ROLES, "dist": "l2", "margin": 1.0, "label": "same"},
        lambda c: losses.contrastive_pair_loss(c.pred, c.gt, torch.ones(3), 1.0, "l2", "mean", "none", c.w),
    ),
    (
        "Contrastive",
        {"anchor": "pred", "positive": "src", "dist": "cos", "margin": 0.8, "label": "different"},
        lambda c: losses.contrastive_pair_loss(c.pred, c.src, torch.zeros(3), 0.8, "cos", "mean", "none", c.w),
    ),
    (
        "Triplet",
        {**ROLES, "negative": "src", "dist": "cos", "margin": 0.2, "margin_mode": "fixed", "agg": "sum"},
        lambda c: losses.triplet_margin_loss(c.pred, c.gt, c.src, 0.2, "cos", "sum", "none", c.w),
    ),
    (
        "Triplet",
        {"anchor": "pred", "positive": "src", "negative": "gt", "dist": "l2", "margin": 5.0, "margin_mode": "fixed"},
        lambda c: losses.triplet_margin_loss(c.pred, c.src, c.gt, 5.0, "l2", "mean", "none", c.w),
    ),
    (
        "MarginRanking",
        {**ROLES, "reference": "src", "negative": "gt", "dist": "cos", "margin": 0.1, "smooth": 0.02},
        lambda c: losses.margin_ranking_on_distances(
            losses.pair_distance(c.pred, c.gt, "cos", "mean", c.w),
            losses.pair_distance(c.src, c.gt, "cos", "mean", c.w),
            0.1,
            "none",
            smooth=0.02,
        ),
    ),
    (
        "MultiNegative",
        {**ROLES, "negative": "hard_negative", "dist": "cos", "margin": 0.4, "margin_mode": "fixed", "neg_agg": "sum"},
        lambda c: losses.multi_negative_ranking_loss(
            c.pred, c.gt, c.hard_negative, 0.4, "cos", "mean", "none", c.w, 0.0, "sum"
        ),
    ),
    (
        "InfoNCE",
        {"anchor": "gt", "positive": "pred", "negative": "in_batch", "temperature": 0.1},
        lambda c: losses.info_nce_loss(c.gt, c.pred, None, 0.1, "mean", "none", c.w),
    ),
    (
        "InfoNCE",
        {**ROLES, "negative": "hard_negative", "temperature": 0.5},
        lambda c: losses.info_nce_loss(c.pred, c.gt, c.hard_negative, 0.5, "mean", "none", c.w),
    ),
    (
        "PairDistance",
        {"anchor": "src", "positive": "gt", "dist": "l2"},
        lambda c: losses.pair_distance(c.src, c.gt, "l2", "mean", c.w),
    ),
]


def test_every_loss_node_has_a_case(object_info: dict[str, Any]) -> None:
    there = {n for n, info in ours(object_info).items() if info["category"] == "EditLoss/losses"}
    assert there == {f"EditLoss{name}" for name, _, _ in CASES} | {"EditLossRecommendedMix"}


@pytest.mark.parametrize(("node", "widgets", "public"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_a_loss_node_gives_the_public_loss(
    node: str, widgets: dict[str, Any], public: Callable[..., Tensor], core: SimpleNamespace, client: Client
) -> None:
    values = values_of(client, evaluated((f"EditLoss{node}", {"weight": 0.5, **widgets})))
    (term,) = values["terms"].values()
    expected = public(core)
    assert expected.std() > 1e-6 or node == "PairDistance", "the example says nothing"
    assert term["per_sample"] == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-5)
    assert term["value"] == pytest.approx(expected.mean().item(), rel=1e-5, abs=1e-5)
    assert values["total"] == pytest.approx(0.5 * expected.mean().item(), rel=1e-5, abs=1e-5)
    assert term["encoder"] == core.encoder.info.name and len(values["signal"]) == 3


def test_terms_chain_and_the_name_stands_in_the_report(core: SimpleNamespace, client: Client) -> None:
    values = values_of(
        client,
        evaluated(
            (
                "EditLossNoEditIdentity",
                {"weight": 1.0, "dist": "cos", "margin": 0.3, "margin_mode": "fixed", "name": "who"},
            ),
            ("EditLossGeometryMatch", {"weight": 0.25, "dist": "cos"}),
            ("EditLossGeometryMatch", {"weight": 0.0, "dist": "l2"}),
        ),
    )
    parts = [
        losses.loss_no_edit_identity(core.pred, core.gt, core.src, 0.3, weights=core.w),
        losses.loss_geometry_match(core.pred, core.gt, "cos", weights=core.w),
        losses.loss_geometry_match(core.pred, core.gt, "l2", weights=core.w),
    ]
    assert list(values["terms"]) == ["who", "geometry match", "geometry match #2"]
    for term, part in zip(values["terms"].values(), parts):
        assert term["value"] == pytest.approx(part.item(), rel=1e-5, abs=1e-5)
    assert values["total"] == pytest.approx((parts[0] + 0.25 * parts[1]).item(), rel=1e-5, abs=1e-5)


def test_the_preset_is_the_three_losses_with_two_encoders(
    core: SimpleNamespace, world: SimpleNamespace, client: Client
) -> None:
    """Identity and overlay by one encoder, geometry by another, whose embeddings come from a second Encode."""
    prompt = evaluated(
        (
            "EditLossRecommendedMix",
            {"preset": "recommended", "geometry_dist": "l2", "geometry_encoder": link("global")},
        ),
        vae=("VAELoader", {"vae_name": VAE_FILE}),
        **{"global": ("EditLossVAEEncoder", {"vae": link("vae")})},
        first=PICTURES["encode"],
        encode=(
            "EditLossEncode",
            {"encoder": link("global"), "pred": link("pred"), "gt": link("gt"), "embeddings": link("first")},
        ),
    )
    values = values_of(client, prompt)
    latents = {role: vae().encode(world.images[role]) for role in ("pred", "gt")}
    wv = EmbeddingSetWeights(world.mask, 12)
    expected = {
        "no edit identity": losses.loss_no_edit_identity(core.pred, core.gt, core.src, 0.25, weights=core.w),
        "geometry match": losses.loss_geometry_match(
            latents["pred"], latents["gt"].expand(3, -1, -1, -1).contiguous(), "l2", weights=wv.expand(3, -1, -1)
        ),
        "overlay avoidance": losses.loss_overlay_avoidance(core.pred, core.gt, core.overlay, 0.25, weights=core.w),
    }
    assert list(values["terms"]) == list(expected)
    for name, weight in (("no edit identity", 1.0), ("geometry match", 0.5), ("overlay avoidance", 0.7)):
        assert values["terms"][name]["weight"] == weight
        assert values["terms"][name]["value"] == pytest.approx(expected[name].item(), rel=1e-4, abs=1e-5)
    assert values["terms"]["geometry match"]["encoder"].startswith("vae/taesd-16ch")


def EmbeddingSetWeights(mask: Tensor, cells: int) -> Tensor:
    """Shares of area: the mask's sides are multiples of the grid's here."""
    return torch.nn.functional.avg_pool2d(mask[:, None], mask.shape[1] // cells)[:, 0]


# ---------------------------------------------------------------------------- the other encoders


def distance_by(encoder: dict[str, Any], dist: str = "cos", **nodes: Any) -> dict[str, Any]:
    """d(pred, gt) without a mask."""
    return evaluated(
        ("EditLossPairDistance", {"weight": 1.0, **ROLES, "dist": dist}),
        encoder=encoder,
        encode=("EditLossEncode", {"encoder": link("encoder"), "pred": link("pred"), "gt": link("gt")}),
        **nodes,
    )


@pytest.mark.parametrize(("output", "crop"), [("global", False), ("grid", True), ("tokens", False)])
def test_openclip_encoder(output: str, crop: bool, world: SimpleNamespace, client: Client) -> None:
    encoder = OpenCLIPEncoder(CLIP, world.weights / CLIP_FILE, output, crop=crop)
    z = {role: encoder.embed(world.images[role]) for role in ("pred", "gt")}
    expected = losses.feature_match_loss(z["pred"], z["gt"].expand_as(z["pred"]).contiguous(), "cos", reduction="none")
    values = values_of(
        client,
        distance_by(
            ("EditLossOpenCLIPEncoder", {"architecture": CLIP, "weights": CLIP_FILE, "output": output, "crop": crop})
        ),
    )
    (term,) = values["terms"].values()
    assert term["per_sample"] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert expected.min() > 1e-5 and term["encoder"] == encoder.info.name


@pytest.mark.parametrize(
    "widgets", [{"layer": 0}, {"output": "tokens", "layer": -2, "crop": True}, {"output": "global", "image_size": 0}]
)
def test_timm_encoder(widgets: dict[str, Any], world: SimpleNamespace, client: Client) -> None:
    chosen = {**TIMM_WIDGETS, **widgets}
    options = {key: chosen[key] for key in ("output", "layer", "image_size", "crop") if key in chosen}
    encoder = TimmEncoder(TIMM, world.weights / TIMM_FILE, **options)
    z = {role: encoder.embed(world.images[role]) for role in ("pred", "gt")}
    expected = losses.feature_match_loss(z["pred"], z["gt"].expand_as(z["pred"]).contiguous(), "l2", reduction="none")
    (term,) = values_of(client, distance_by(("EditLossTimmEncoder", chosen), "l2"))["terms"].values()
    assert term["per_sample"] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)


def test_vae_encoder_through_the_stock_loader(world: SimpleNamespace, client: Client) -> None:
    z = {role: vae().encode(world.images[role]) for role in ("pred", "gt")}
    assert z["pred"].shape == (3, 12, 12, 16)
    expected = losses.feature_match_loss(z["pred"], z["gt"].expand_as(z["pred"]).contiguous(), "l2", reduction="none")
    values = values_of(
        client,
        distance_by(("EditLossVAEEncoder", {"vae": link("vae")}), "l2", vae=("VAELoader", {"vae_name": VAE_FILE})),
    )
    (term,) = values["terms"].values()
    assert term["per_sample"] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5) and expected.min() > 1e-4


def test_vae_decoder_encoder(world: SimpleNamespace, client: Client) -> None:
    """The numbers are held against ComfyUI's own in test_model_encoders.py; here the node runs as a user wires it."""
    loader = ("VAELoader", {"vae_name": VAE_FILE})
    found = []
    for depths in ("1", "1, 2"):
        node = ("EditLossVAEDecoderEncoder", {"vae": link("vae"), "depths": depths})
        (term,) = values_of(client, distance_by(node, "l2", vae=loader))["terms"].values()
        assert term["encoder"] == f"vae-decoder/taesd-16ch/{depths.replace(', ', '+')}/grid"
        found.append(term["per_sample"])
        assert all(1e-4 < v < 4 for v in found[-1])
    assert found[0] != found[1]


DIFFUSION = {
    "model": ("UNETLoader", {"unet_name": MODEL_FILE, "weight_dtype": "default"}),
    "vae": ("VAELoader", {"vae_name": VAE_FILE}),
    "data": ("LoadTrainingDataset", {"folder_name": DATASET}),
}


def diffusion(**widgets: Any) -> tuple[str, dict[str, Any]]:
    return "EditLossDiffusionEncoder", {
        "model": link("model"),
        "vae": link("vae"),
        "conditioning": link("data", 1),
        "block": "joint_blocks.0",
        "noise_level": 0.3,
        "seed": 1,
        "output": "grid",
        **widgets,
    }


def test_diffusion_encoder_through_the_stock_loaders(world: SimpleNamespace, client: Client) -> None:
    """The numbers are held against ComfyUI's own in test_model_encoders.py; here the node runs as a user wires it."""
    found = []
    for level in (0.3, 0.9):
        values = values_of(client, distance_by(diffusion(noise_level=level), **DIFFUSION))
        (term,) = values["terms"].values()
        assert term["encoder"] == f"diffusion/sd3/joint_blocks.0/t{level}/grid"
        found.append(term["per_sample"])
        assert all(1e-6 < v < 2 for v in found[-1])
    assert max(found[0]) > max(found[1]), "more noise should hide more of the difference"


# ---------------------------------------------------------------------------- embeddings in files


LOSS = ("EditLossNoEditIdentity", {"weight": 1.0, "dist": "cos", "margin": 0.3, "margin_mode": "fixed"})
SAVE = ("EditLossSaveEmbeddings", {"embeddings": link("encode"), "file_name": "tests/round trip é"})


def test_saved_embeddings_give_the_same_number(core: SimpleNamespace, world: SimpleNamespace, client: Client) -> None:
    shown = client.run(needed(graph(**PICTURES, save=SAVE)))
    (text,) = shown.outputs["save"]["text"]
    file, kept, mask = text.splitlines()
    assert file == "round trip é.safetensors" and mask == "with a mask"
    assert "pred 3, gt 1, src 1, overlay 1×4, hard_negative 1×2" in kept
    assert (world.server.output_dir / "editloss" / "embeddings" / "tests" / "round trip é.safetensors").is_file()
    values = values_of(
        client,
        evaluated(
            LOSS,
            encode=(
                "EditLossLoadEmbeddings",
                {
                    "file": "tests/round trip é [output]",
                    "encoder": link("encoder"),
                    "gt": link("gt"),
                    "src": link("src"),
                },
            ),
        ),
    )
    expected = losses.loss_no_edit_identity(core.pred, core.gt, core.src, 0.3, weights=core.w).item()
    assert values["total"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert (
        "tests/round trip é [output]"
        in client.object_info()["EditLossLoadEmbeddings"]["input"]["required"]["file"][1]["options"]
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gt": link("src")}, "gt was made from other pictures; encode again"),
        ({"encoder": link("other")}, "was run with other preprocessing"),
        (
            {"encoder": link("clip")},
            f"expected embeddings by 'openclip/{CLIP}/global', it has \\['timm/{TIMM}/grid'\\]",
        ),
    ],
)
def test_a_stale_file_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, world: SimpleNamespace, client: Client
) -> None:
    client.run(
        needed(graph(**PICTURES, save=("EditLossSaveEmbeddings", {"embeddings": link("encode"), "file_name": "stale"})))
    )
    prompt = evaluated(
        LOSS,
        encode=("EditLossLoadEmbeddings", {"file": "stale [output]", **changes}),
        other=("EditLossTimmEncoder", {**TIMM_WIDGETS, "image_size": 96}),
        clip=("EditLossOpenCLIPEncoder", {"architecture": CLIP, "weights": CLIP_FILE, "output": "global"}),
    )
    with pytest.raises(NodeError, match=f"stale.safetensors: .*{reason}") as caught:
        client.run(needed(prompt))
    assert caught.value.class_type == "EditLossLoadEmbeddings"


def test_a_folder_of_shards_is_one_entry(world: SimpleNamespace, client: Client) -> None:
    folder = world.server.output_dir / "editloss" / "embeddings" / "large set"
    encoder = TimmEncoder(TIMM, world.weights / TIMM_FILE, image_size=64)
    pairs = PairSet.from_images(world.images["src"], world.images["gt"], captions="edit", min_size=16)
    encode_pairs(pairs, [encoder], folder, shard_pairs=1)
    options = client.object_info()["EditLossLoadEmbeddings"]["input"]["required"]["file"][1]["options"]
    assert [name for name in options if "large set" in name] == ["large set [output]"]
    load = ("EditLossLoadEmbeddings", {"file": "large set [output]", "encoder": link("encoder")})
    copy = ("EditLossSaveEmbeddings", {"embeddings": link("load"), "file_name": "copy"})
    client.run(needed(graph(**PICTURES, load=load, save=copy)))
    saved, expected = EmbeddingSet.load(folder.parent / "copy.safetensors"), load_shards(folder)
    assert saved.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(saved.tensors[key], value) for key, value in expected.tensors.items())
    with pytest.raises(NodeError, match="gt: expected nothing, large set is a folder of shards"):
        client.run(needed(graph(**PICTURES, load=(load[0], {**load[1], "gt": link("gt")}), save=copy)))


def test_a_file_from_the_input_folder_and_a_file_that_changed(world: SimpleNamespace, client: Client) -> None:
    """A file that is replaced is read again: the node looks at its time and size."""
    folder = world.server.input_dir / "editloss" / "embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    encoder = TimmEncoder(TIMM, world.weights / TIMM_FILE, image_size=64)
    prompt = evaluated(LOSS, encode=("EditLossLoadEmbeddings", {"file": "given [input]"}))
    totals = []
    for pred in (world.images["gt"], world.images["src"]):
        roles = {"pred": pred, "gt": world.images["gt"], "src": world.images["src"]}
        EmbeddingSet().with_images(encoder, roles).save(folder / "given.safetensors")
        totals.append(values_of(client, prompt)["terms"]["no edit identity"]["per_sample"][0])
    z = {role: encoder.embed(world.images[role]) for role in ("gt", "src")}
    assert totals == pytest.approx(
        [losses.loss_no_edit_identity(z[r], z["gt"], z["src"], 0.3).item() for r in ("gt", "src")], rel=1e-5, abs=1e-5
    )


# ---------------------------------------------------------------------------- negatives


def test_overlay_node_gives_the_cores_pictures(core: SimpleNamespace, world: SimpleNamespace, client: Client) -> None:
    shown = client.run(
        needed(
            graph(
                **PICTURES,
                show=("PreviewImage", {"images": link("overlay")}),
                masks=("MaskToImage", {"mask": link("overlay", 1)}),
                pasted=("PreviewImage", {"images": link("masks")}),
            )
        )
    )
    pictures = torch.cat([picture_of(client, ref) for ref in shown.outputs["show"]["images"]])
    assert pictures.shape == core.overlays.shape == (4, SIDE, SIDE, 3)
    assert (pictures - core.overlays).abs().max() <= 1.01 / 255  # PreviewImage cuts to 8 bits
    pasted = torch.cat([picture_of(client, ref) for ref in shown.outputs["pasted"]["images"]])[..., 0]
    both = (pictures - world.images["src"]).abs().amax(-1), (pictures - world.images["gt"]).abs().amax(-1)
    for distance in both:  # neither object is gone: where something was pasted, it is unlike both pictures
        assert (distance * (pasted > 0.5)).amax((1, 2)).min() > 0.05


def test_estimated_mask_is_the_cores_and_covers_the_edit(world: SimpleNamespace, client: Client) -> None:
    shown = client.run(
        needed(
            graph(
                src=load("src"),
                gt=load("gt"),
                mask=(
                    "EditLossEstimateMask",
                    {"before": link("src"), "after": link("gt"), "threshold": 0.0, "grow": 0.02},
                ),
                picture=("MaskToImage", {"mask": link("mask")}),
                show=("PreviewImage", {"images": link("picture")}),
            )
        )
    )
    mask = picture_of(client, shown.outputs["show"]["images"][0])[..., 0]
    assert torch.equal(mask, estimate_mask(world.images["src"], world.images["gt"], margin=0.02))
    changed = (world.images["src"] - world.images["gt"]).abs().amax(-1) > 0.3
    assert mask[changed].mean() > 0.97 and 0.05 < mask.mean() < 0.5


def test_stored_negatives_are_drawn_for_their_own_picture(world: SimpleNamespace, client: Client) -> None:
    store = (
        "EditLossStoreHardNegative",
        {"images": link("bad"), "before": link("src"), "buffer": "tests/one", "capacity": 8, "per_picture": 4},
    )
    draw = {"before": link("src"), "buffer": "tests/one", "count": 2, "seed": 0, "if_empty": "error"}
    stored = client.run(needed(graph(**PICTURES, store=store, count=("PreviewAny", {"source": link("store")}))))
    assert stored.outputs["count"]["text"] == ["2"]
    assert stored.outputs["store"]["text"] == ["2 of 8 in 'tests/one'"]

    def drawn(**changes: Any) -> Tensor:
        shown = client.run(
            needed(
                graph(
                    **PICTURES,
                    draw=("EditLossDrawHardNegative", {**draw, **changes}),
                    show=("PreviewImage", {"images": link("draw")}),
                )
            )
        )
        return torch.cat([picture_of(client, ref) for ref in shown.outputs["show"]["images"]])

    both = drawn()
    wanted = world.images["hard_negative"]
    assert min((both - wanted).abs().max(), (both.flip(0) - wanted).abs().max()) <= 1.01 / 255
    assert torch.equal(drawn(before=link("gt"), if_empty="before", count=1), world.images["gt"])
    with pytest.raises(NodeError, match="'tests/one' has nothing for before picture 0") as caught:
        drawn(before=link("gt"))
    assert caught.value.class_type == "EditLossDrawHardNegative"
    client.run(needed(graph(**PICTURES, store=(store[0], {**store[1], "images": link("gt")}))))
    assert len(drawn(count=3).unique(dim=0)) == 3, "the buffer grew, and the cached draw was kept"


# ---------------------------------------------------------------------------- the picture


@pytest.mark.parametrize("width", [640, 1216])
def test_the_reports_picture_is_drawn_at_its_width(width: int, client: Client) -> None:
    shown = client.run(
        needed(
            evaluated(
                LOSS,
                ("EditLossGeometryMatch", {"weight": 0.5, "dist": "cos"}),
                evaluate=(
                    "EditLossEvaluateObjective",
                    {
                        "objective": link("loss1"),
                        "embeddings": link("encode"),
                        "pred": link("pred"),
                        "gt": link("gt"),
                        "src": link("src"),
                        "width": width,
                    },
                ),
                save=("SaveImage", {"images": link("evaluate"), "filename_prefix": "tests/report"}),
                text=("PreviewAny", {"source": link("evaluate", 1)}),
                total=("PreviewAny", {"source": link("evaluate", 2)}),
            )
        )
    )
    (ref,) = shown.outputs["save"]["images"]
    picture = picture_of(client, ref)[0]
    assert picture.shape[1] == width and picture.shape[0] > 0.5 * width
    assert picture.std() > 0.1 and (picture.max(-1).values - picture.min(-1).values > 0.3).float().mean() > 0.02
    assert torch.equal(picture, picture_of(client, shown.outputs["evaluate"]["images"][0])[0])
    text = shown.outputs["text"]["text"][0]
    assert text.count("\n| ") >= 5 and "no edit identity" in text and "geometry match" in text
    assert math.isclose(
        float(shown.outputs["total"]["text"][0]), json.loads(shown.outputs["show"]["text"][0])["total"], rel_tol=1e-6
    )


def test_a_report_without_pictures_is_drawn_too(client: Client) -> None:
    shown = client.run(needed(evaluated(LOSS)))
    assert picture_of(client, shown.outputs["evaluate"]["images"][0]).std() > 0.05


# ---------------------------------------------------------------------------- errors


def timm_with(**widgets: Any) -> dict[str, Any]:
    return evaluated(LOSS, encoder=("EditLossTimmEncoder", {**TIMM_WIDGETS, **widgets}))


def loss_with(node: str = "Triplet", **widgets: Any) -> dict[str, Any]:
    full = {"weight": 1.0, **ROLES, "negative": "src", "dist": "cos", "margin": 0.2, "margin_mode": "fixed"}
    return evaluated((f"EditLoss{node}", {**full, **widgets}))


def encode_with(**changes: Any) -> dict[str, Any]:
    wired = {k: v for k, v in {**PICTURES["encode"][1], **changes}.items() if v is not None}
    return evaluated(
        LOSS,
        ("EditLossOverlayAvoidance", {"weight": 1.0, "dist": "cos", "margin": 0.2, "margin_mode": "fixed"}),
        encode=("EditLossEncode", wired),
        **SMALLER,
    )


SMALLER = {
    "small": (
        "ImageScale",
        {"image": link("gt"), "upscale_method": "nearest-exact", "width": 40, "height": 24, "crop": "disabled"},
    ),
    "black": ("SolidMask", {"value": 0.0, "width": 96, "height": 96}),
}


def node_alone(node: str, output: int = 0, **inputs: Any) -> dict[str, Any]:
    return graph(
        **PICTURES, **SMALLER, node=(f"EditLoss{node}", inputs), show=("PreviewAny", {"source": link("node", output)})
    )


def linked(kind: str, value: Any) -> dict[str, Any]:
    return {"primitive": (f"Primitive{kind}", {"value": value})}


def unlisted(name: str, got: str, said: str, options: str) -> str:
    """A choice that is in no list: ``said`` by the node, or before it by a ComfyUI that compares them itself (not 0.3.75)."""
    return rf"{name}: {said}|input '{name}': Value not in list: {name}: {re.escape(got)} not in \[{options}"


def unknown(name: str, got: str, options: str) -> str:
    return unlisted(name, got, f"expected one of {options}, got {got}", options)


# what is wrong, prompt, the node that says so, and what it says (a pattern)
ERRORS: list[tuple[str, Callable[[], dict[str, Any]], str, str]] = [
    # widgets that ComfyUI itself refuses
    ("number too small", lambda: loss_with(weight=-1), "Triplet", "input 'weight': Value -1.0 smaller than min of 0"),
    ("number too large", lambda: timm_with(layer=64), "TimmEncoder", "input 'layer': Value 64 bigger than max of 63"),
    ("text for a number", lambda: loss_with(margin="much"), "Triplet", "input 'margin': Failed to convert.*much"),
    ("missing input", lambda: node_alone("PairDistance"), "PairDistance", "input 'encoder': Required input is missing"),
    ("wrong socket", lambda: node_alone("Encode", encoder=link("gt")), "Encode", "IMAGE.*mismatch.*EDITLOSS_ENCODER"),
    # widgets that it lets through
    (
        "unknown option",
        lambda: loss_with(dist="manhattan"),
        "Triplet",
        unknown("dist", "'manhattan'", "'cos', 'l2'"),
    ),
    (
        "unknown mode",
        lambda: loss_with(margin_mode="car"),
        "Triplet",
        unknown("margin_mode", "'car'", "'fixed', 'auto'"),
    ),
    (
        "unknown role",
        lambda: loss_with(negative="pred"),
        "Triplet",
        unknown("negative", "'pred'", "'src', 'gt', 'overlay', 'hard_negative'"),
    ),
    ("a number for an option", lambda: loss_with(agg=3), "Triplet", unknown("agg", "3", "'mean', 'max', 'sum'")),
    ("not a number", lambda: loss_with(margin="nan"), "Triplet", "margin: expected a number from 0 to 10000, got nan"),
    (
        "linked out of range",
        lambda: {**encode_with(batch_size=link("primitive")), **graph(**linked("Int", -5))},
        "Encode",
        "batch_size: expected a whole number from 1 to 256, got -5",
    ),
    (
        "a word for a picture",
        lambda: encode_with(pred="cat.png"),
        "Encode",
        "pred: expected a batch of pictures.*'cat.png'",
    ),
    (
        "a word for an encoder",
        lambda: node_alone("PairDistance", encoder="dino", weight=1.0, **ROLES, dist="cos"),
        "PairDistance",
        "encoder: expected an encoder from one of the Encoder nodes, got 'dino'",
    ),
    (
        "auto margin above 1",
        lambda: loss_with(margin=1.5, margin_mode="auto"),
        "Triplet",
        "margin: in auto mode .*up to 1, got 1.5",
    ),
    # encoders
    (
        "missing weights",
        lambda: timm_with(weights="dinov2.safetensors"),
        "TimmEncoder",
        unlisted(
            "weights",
            "'dinov2.safetensors'",
            f"'dinov2.safetensors' is not in models/editloss_encoders; it has .*{TIMM_FILE}",
            f".*'{TIMM_FILE}'",
        ),
    ),
    (
        "weights outside",
        lambda: timm_with(weights="../vae/taesd16.safetensors"),
        "TimmEncoder",
        unlisted("weights", "'../vae/taesd16.safetensors'", ".*is not in models/editloss_encoders", f".*'{TIMM_FILE}'"),
    ),
    (
        "weights of another network",
        lambda: timm_with(weights=CLIP_FILE),
        "TimmEncoder",
        "does not fit test_vit.*missing",
    ),
    (
        "unknown network",
        lambda: timm_with(model_name="vit_tinny"),
        "TimmEncoder",
        "'vit_tinny' is unknown; did you mean",
    ),
    (
        "no such layer",
        lambda: timm_with(layer=40),
        "TimmEncoder",
        "layer: test_vit has 6 layers, expected -6…5, got 40",
    ),
    ("size off the patches", lambda: timm_with(image_size=50), "TimmEncoder", "multiples of 16 pixels, got 50"),
    (
        "unknown architecture",
        lambda: evaluated(
            LOSS,
            encoder=(
                "EditLossOpenCLIPEncoder",
                {"architecture": "ViT-S-32-old", "weights": CLIP_FILE, "output": "grid"},
            ),
        ),
        "OpenCLIPEncoder",
        "architecture: 'ViT-S-32-old' is unknown; did you mean .*ViT-S-32",
    ),
    (
        "VAE size off the grid",
        lambda: distance_by(("EditLossVAEEncoder", {"vae": link("vae"), "image_size": 50}), vae=DIFFUSION["vae"]),
        "VAEEncoder",
        "image_size: expected multiples of 8",
    ),
    (
        "depths that are no numbers",
        lambda: distance_by(
            ("EditLossVAEDecoderEncoder", {"vae": link("vae"), "depths": "deep"}), vae=DIFFUSION["vae"]
        ),
        "VAEDecoderEncoder",
        "depths: expected ascending whole numbers from 1, such as 1, 2; got 'deep'",
    ),
    (
        "unknown block",
        lambda: distance_by(diffusion(block="double_blocks.3"), **DIFFUSION),
        "DiffusionEncoder",
        "has no block 'double_blocks.3'; try one of joint_blocks.0",
    ),
    (
        "conditioning of another model",
        lambda: distance_by(diffusion(conditioning=link("lotus")), **DIFFUSION, lotus=("LotusConditioning", {})),
        "Encode",
        "conditioning: SD3 needs 'pooled_output'",
    ),
    # sizes and numbers of pictures
    (
        "another size",
        lambda: node_alone("OverlayNegative", before=link("src"), after=link("small"), **OVERLAY),
        "OverlayNegative",
        "after: expected the size of before, 96×96 pixels, got 40×24; scale one of them first",
    ),
    ("empty mask", lambda: encode_with(mask=link("black")), "Encode", "mask: sample 0 of 1 is empty"),
    (
        "no picture",
        lambda: node_alone("Encode", encoder=link("encoder")),
        "Encode",
        "Connect at least one picture: pred, gt",
    ),
    (
        "two pairs, three outputs",
        lambda: encode_with(gt=link("bad"), src=link("bad"), overlay=None),
        "Encode",
        "pred: expected 2 outputs, one for each pair, got 3",
    ),
    (
        "no difference",
        lambda: node_alone("EstimateMask", before=link("src"), after=link("src"), threshold=0.0),
        "EstimateMask",
        "Pair 0: no visible difference",
    ),
    (
        "overlay of equal pictures",
        lambda: node_alone("OverlayNegative", before=link("src"), after=link("src"), **OVERLAY),
        "OverlayNegative",
        "no visible edit",
    ),
    (
        "min above max",
        lambda: node_alone(
            "OverlayNegative",
            before=link("src"),
            after=link("gt"),
            **{**OVERLAY, "opacity_min": 0.9, "opacity_max": 0.5},
        ),
        "OverlayNegative",
        "opacity",
    ),
    # what an objective needs
    (
        "missing role",
        lambda: encode_with(overlay=None),
        "EvaluateObjective",
        "overlay: no embedding by 'timm/test_vit/grid'; it has",
    ),
    (
        "missing encoder",
        lambda: evaluated(
            (LOSS[0], {**LOSS[1], "encoder": link("other")}),
            other=("EditLossTimmEncoder", {**TIMM_WIDGETS, "output": "tokens"}),
        ),
        "EvaluateObjective",
        "'timm/test_vit/tokens' is not in the",
    ),
    (
        "same name, other encoder",
        lambda: evaluated(
            LOSS,
            (LOSS[0], {**LOSS[1], "encoder": link("other")}),
            other=("EditLossTimmEncoder", {**TIMM_WIDGETS, "image_size": 96}),
        ),
        "NoEditIdentity",
        "already has another encoder called",
    ),
    (
        "pictures that do not fit",
        lambda: evaluated(
            LOSS,
            evaluate=(
                "EditLossEvaluateObjective",
                {"objective": link("loss0"), "embeddings": link("encode"), "pred": link("bad")},
            ),
        ),
        "EvaluateObjective",
        "pred: expected 1 or 3 pictures like the report, got 2",
    ),
    # files
    (
        "no such embeddings",
        lambda: evaluated(LOSS, encode=("EditLossLoadEmbeddings", {"file": "nothing [input]"})),
        "LoadEmbeddings",
        "file: there are no embeddings called 'nothing \\[input\\]'; there are",
    ),
    (
        "file outside",
        lambda: evaluated(LOSS, encode=("EditLossLoadEmbeddings", {"file": "../../models/vae/taesd16"})),
        "LoadEmbeddings",
        "file: expected a name of letters",
    ),
    (
        "save outside",
        lambda: graph(**PICTURES, save=(SAVE[0], {**SAVE[1], "file_name": "../../escape"})),
        "SaveEmbeddings",
        "file_name: expected a name of letters, digits.*got '../../escape'",
    ),
    (
        "no buffer yet",
        lambda: node_alone("DrawHardNegative", before=link("src"), buffer="never", count=1, seed=0, if_empty="error"),
        "DrawHardNegative",
        "there is no buffer called 'never' yet",
    ),
    (
        "images per before",
        lambda: node_alone(
            "StoreHardNegative", images=link("pred"), before=link("bad"), buffer="x", capacity=1, per_picture=1
        ),
        "StoreHardNegative",
        "images: expected a multiple of 2",
    ),
]


@pytest.mark.parametrize(("prompt", "node", "pattern"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_a_mistake_is_that_nodes_clear_error(
    prompt: Callable[[], dict[str, Any]], node: str, pattern: str, world: SimpleNamespace, client: Client
) -> None:
    with pytest.raises(NodeError) as caught:
        client.run(needed(prompt()))
    assert caught.value.class_type == f"EditLoss{node}", caught.value
    assert re.search(pattern, caught.value.message, re.S), caught.value.message


def test_the_server_goes_on_serving_after_all_of_them(
    core: SimpleNamespace, client: Client, world: SimpleNamespace
) -> None:
    assert world.server.alive
    expected = losses.loss_no_edit_identity(core.pred, core.gt, core.src, 0.3, weights=core.w).item()
    assert values_of(client, evaluated(LOSS))["total"] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_link_to_an_input_that_no_longer_exists_is_left_out(client: Client, world: SimpleNamespace) -> None:
    """A workflow from another version of the pack: ComfyUI drops unknown constants, but passes unknown links on."""
    assert values_of(client, encode_with(an_older_input=link("gt")))["total"] > 0


# ---------------------------------------------------------------------------- names and shapes that reports must draw


@pytest.mark.parametrize("name", ["$\\frac{$", "cost $x_$ and $y$", "a|b", "line\nbreak", "日本語 🎉", "n" * 5000])
def test_any_name_can_stand_in_a_report(name: str, client: Client) -> None:
    values = values_of(client, evaluated((LOSS[0], {**LOSS[1], "name": name})))
    assert list(values["terms"]) == [name]


def test_the_report_of_a_tall_picture_stays_a_picture(client: Client) -> None:
    """An output of 4 × 256 pixels; its height must not be multiplied into every row of the report."""
    shown = client.run(
        needed(
            evaluated(
                LOSS,
                tall=(
                    "ImageScale",
                    {"image": link("gt"), "upscale_method": "bilinear", "width": 4, "height": 256, "crop": "disabled"},
                ),
                evaluate=(
                    "EditLossEvaluateObjective",
                    {"objective": link("loss0"), "embeddings": link("encode"), "pred": link("tall"), "width": 640},
                ),
            )
        )
    )
    height, width = picture_of(client, shown.outputs["evaluate"]["images"][0]).shape[1:3]
    assert width == 640 and height < 6 * width


def test_work_on_pairs_tells_every_picture_and_gives_the_cores_result(world: SimpleNamespace, client: Client) -> None:
    """Each step is also where ComfyUI can cancel. The overlay's mask is open, so it counts estimates and overlays."""
    pairs = {"before": link("befores"), "after": link("afters")}
    prompt = graph(
        **PICTURES,
        two=batch("gt", "p1"),
        afters=batch("two", "b1"),
        befores=("RepeatImageBatch", {"image": link("src"), "amount": 3}),
        estimate=("EditLossEstimateMask", {**pairs, "threshold": 0.0}),
        white=("MaskToImage", {"mask": link("estimate")}),
        masks=("PreviewImage", {"images": link("white")}),
        paste=("EditLossOverlayNegative", {**OVERLAY, **pairs, "construction": "blend"}),
        pictures=("PreviewImage", {"images": link("paste")}),
    )
    steps = set()
    shown = client.run(needed(prompt), lambda p: steps.add((p.node_id, p.value, p.max)))
    for node, total in (("estimate", 3), ("paste", 6)):  # a newer ComfyUI sends those between only now and then
        told = {value for name, value, most in steps if (name, most) == (node, total)}
        assert {1, total} <= told <= set(range(total + 1)), node
    w = world.images
    core_pairs = w["src"].expand(3, -1, -1, -1), torch.cat([w["gt"], w["pred"][:1], w["hard_negative"][:1]])
    masks = torch.cat([picture_of(client, ref) for ref in shown.outputs["masks"]["images"]])[..., 0]
    assert torch.equal(masks, estimate_mask(*core_pairs))
    settings = OverlaySettings(("blend",), (0.5, 0.8), scale=(0.95, 1.05), seed=4)
    pictures = torch.cat([picture_of(client, ref) for ref in shown.outputs["pictures"]["images"]])
    assert (pictures - make_overlays(*core_pairs, settings=settings).images).abs().max() <= 1.01 / 255

    for node, options, pattern in (
        ("EstimateMask", {"threshold": 0.0}, "Pair 0: no visible difference .* are both the same picture"),
        ("OverlayNegative", {**OVERLAY, "opacity_min": 0.9, "opacity_max": 0.4},
         r"opacity_min: expected at most opacity_max \(0.4\), got 0.9"),
    ):  # fmt: skip
        with pytest.raises(NodeError, match=pattern):
            client.run(needed(node_alone(node, before=link("src"), after=link("src"), **options)))


def test_option_nodes_as_they_come_change_nothing(object_info: dict[str, Any], client: Client) -> None:
    """Their widgets begin at what a run has without them; Rollout Options is what turns rollouts on."""
    nodes = [name for name, info in ours(object_info).items() if info["output"] == ["EDITLOSS_TRAINING_OPTIONS"]]
    assert len(nodes) == 6
    prompt = {}
    for name in nodes:
        values = {k: o["default"] for k, (_, o) in inputs_of(object_info[name]).items() if "default" in o}
        prompt.update(graph(**{name: (name, values), f"{name} shown": ("PreviewAny", {"source": link(name)})}))
    outputs = client.run(prompt).outputs
    (rollouts,) = outputs["EditLossRolloutOptions"]["text"]
    assert rollouts == "estimate: rollout\nobjective_every: 4\nrollout_regression: 1"
    assert {name: outputs[name]["text"] for name in nodes if name != "EditLossRolloutOptions"} == {
        name: ["nothing changed: these are the defaults"] for name in nodes if name != "EditLossRolloutOptions"
    }


def test_losses_wired_to_another_encoder_of_the_same_name_are_refused(client: Client, world: SimpleNamespace) -> None:
    """The names collide where only the size differs; the loss would read the wrong embeddings without a word."""
    prompt = evaluated(LOSS)
    prompt["other"] = json.loads(json.dumps(prompt["encoder"]))
    prompt["other"]["inputs"]["image_size"] = 96
    prompt["loss0"]["inputs"]["encoder"] = ["other", 0]
    with pytest.raises(NodeError, match="wired to a .* with other weights or another size"):
        client.run(prompt)
