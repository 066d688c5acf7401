"""Hundreds of bad prompts: each ends in a result, a refusal or a node's own message, and nothing gets out of the folders.

The prompts come from one seed. Two environment variables help to look further: EDITLOSS_FUZZ_PROMPTS (how many) and
EDITLOSS_FUZZ_SEED.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comfy_client import Client, NodeError
from comfy_server import ComfyServer
from helpers import graph, link
from PIL import Image
from safetensors.torch import save_file
from small_models import CLIP, CLIP_FILE, DATASET, MODEL_FILE, TIMM, TIMM_FILE, VAE_FILE, write_models

from editloss_core.demo.scenes import stool_pairs, write_folder
from editloss_core.embeddings import EmbeddingSet
from editloss_core.encoders.base import EncoderInfo
from editloss_core.training.checkpoint import Checkpoint

PROMPTS = int(os.environ.get("EDITLOSS_FUZZ_PROMPTS", "480"))
SEED = int(os.environ.get("EDITLOSS_FUZZ_SEED", "20251123"))
MARKER = "top-secret-encoder"  # stands in every file outside the folders; nothing may ever repeat it
READABLE = (".StaleEmbeddings", ".PairProblems", ".CheckpointError", ".NonFinite", ".OutOfMemory")
WITHOUT_INPUTS = {"EditLossDemoModel"}  # can never be wrong
WANTED = "replace the chair with my stool"

# ---------------------------------------------------------------------------- values

NAMES = [
    "",
    " ",
    ".",
    "..",
    "../../x",
    "../" * 12 + "etc/passwd",
    "/etc/passwd",
    "C:\\Windows\\win.ini",
    "\\\\host\\share",
    "con",
    "NUL.txt",
    "com1",
    "a\0b",
    "a\nb",
    "日本語/モデル",
    "🎉",
    "é" * 300,
    "ä" * 100,
    "x" * 10_000,
    "a/" * 300 + "b",
    "a/../b",
    "a//b",
    "~root/x",
    "$HOME",
    "%2e%2e%2f",
    "name.",
    "name /x",
    "-rf",
    "*",
    "\ud800",
    "nan",
    "{}",
    "null",
    "..\\..\\x",
    "a:b",
    "a|b<c>",
    ".hidden",
    "x.safetensors",
    "x.safetensors/y",
    "good",
    "good [output]",
    "good [input]",
    "good [temp]",
    "folder.safetensors",
    "folder",
    "link_out",
    "link_out [input]",
    "link_dir/secret",
    "loop",
    "link_dir/secret [input]",
    "escape/secret",
]
NUMBERS = [
    0,
    -1,
    1,
    3.7,
    -0.0,
    1e308,
    -1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "nan",
    "-inf",
    "12",
    "0x10",
    "1e3",
    "",
    2**31,
    2**63,
    -(2**63),
    10**30,
    True,
    None,
    "twelve",
]
OTHERS = [
    None,
    True,
    0,
    -5,
    1.5,
    "",
    "text",
    {},
    {"a": 1},
    {"__value__": []},
    {"__value__": [1, 2]},
    {"__value__": [["a", {}]]},
    {"__value__": None},
    [],
    ["src"],
    ["src", 0, 0],
    ["src", 99],
    ["src", -1],
]
# Numbers that are allowed but slow are not drawn.
CHEAP = {
    "image_size": [0, 0, 16, 32, 48, 17, 50, 64],
    "width": [640, 640, 672, 641],
    "count": [1, 2, 5],
    "batch_size": [1, 2, 8],
    "feather": [0.0, 0.5, 2.0, 7.0, 64.0],
    "steps": [1, 1, 2],
    "step": [0, 0, 1, 7],
    "rank": [2, 2, 1, 5],
    "hold_out": [0, 1, 2],
    "held_out": [1, 2],
    "resolution": [128, 64, 96, 100],
    "accumulation": [1, 2, 3],
    "previews": [1, 0, 4],
    "preview_steps": [1, 0, 2],
    "validate_every": [1, 0, 3],
}
FILES = {
    "weights": [
        TIMM_FILE,
        TIMM_FILE,
        CLIP_FILE,
        "empty.safetensors",
        "truncated.safetensors",
        "text.safetensors",
        "pickle.safetensors",
        "foreign.safetensors",
        "numbers.safetensors",
        "not_finite.safetensors",
        "huge_header.safetensors",
        "nowhere.safetensors",
        "loop.safetensors",
        "outside.safetensors",
        "sub/../test_vit.safetensors",
        "folder.safetensors",
    ],
    "OpenCLIPEncoder.weights": [CLIP_FILE, CLIP_FILE, CLIP_FILE, TIMM_FILE, "truncated.safetensors"],
    "file": [
        "good",
        "good [input]",
        "empty",
        "truncated",
        "text",
        "foreign",
        "no_metadata",
        "bad_json",
        "one_number",
        "no_encoder",
        "other_role",
        "whole_numbers",
        "two_sizes",
        "nan",
        "link_out",
        "link_dir/secret",
        "link_out [input]",
        "loop",
        "folder",
        "escape/secret",
        "gone",
    ],
    "buffer": ["full", "full", "empty", "broken", "two_sizes", "a_file", "link_dir", "loop", "full/below", "fresh"],
    "file_name": ["fuzz/a", "fuzz/b c", "fuzz/ü", "link_out", "link_dir/new", "loop", "folder", "good/below"],
    "model_name": [TIMM, TIMM, "test_resnet", "vit_tiny_patch16_224", "hf-hub:timm/test_vit", "test_vit.r160_in1k"],
    "architecture": [CLIP, CLIP, "ViT-S-16", "hf-hub:a/b", "local-dir:/tmp"],
    "block": [
        "joint_blocks.0",
        "joint_blocks.0",
        "joint_blocks.0.x_block",
        "joint_blocks.9",
        "final_layer",
        "x_embedder",
    ],
    "name": ["a", "a|b", "line\nbreak", "🎉 日本語", "n" * 3000],
    "TrainKontextLoRA.name": ["run", "run", "läufe/a b", "link_dir/new", "loop", "a_file/below", "🎉"],
    "ResumeTraining.run": [
        "first",
        "first",
        "first",
        "broken",
        "linked",
        "link_file",
        "link_dir",
        "loop",
        "nowhere",
        "a_file",
        "gone",
    ],
    "folder": [
        "fuzz pairs",
        "fuzz pairs",
        "fuzz one folder",
        "fuzz bad",
        "fuzz empty",
        "fuzz link",
        "fuzz loop",
        "fuzz nowhere",
        "fuzz_src.png",
        "fuzz pairs/after",
        "fuzz pairs/../fuzz pairs",
    ],
    "control_folder": ["", "", " ", "fuzz pairs/before", "fuzz bad/before", "fuzz empty", "../fuzz pairs"],
    "default_caption": ["", WANTED, "make it nice", "line\nbreak", "n" * 3000],
    "captions": [WANTED, WANTED, f"{WANTED}\n{WANTED}", "", " \n ", "make it nice", "n" * 3000],
    "terms": ["*", "*", "no edit*", "nothing", "", "[", "no edit identity"],
    "LoRAOptions.layers": ["", "all", "all, -*mod*", "double_blocks.*.img_attn.*", "-all", "nothing.*", ",", "[a"],
}


def valid(rng: random.Random, node: str, name: str, kind: str, options: dict[str, Any], plain: bool) -> Any:
    names = FILES.get(f"{node}.{name}") or FILES.get(name)
    if names:
        return names[0] if plain else rng.choice(names)
    if plain and options.get("default") is not None:
        return CHEAP.get(name, [options["default"]])[0]
    if name in CHEAP:
        return rng.choice(CHEAP[name])
    if kind == "INT":
        return rng.choice(
            [options["min"], options["max"], options["default"], rng.randint(options["min"], options["max"])]
        )
    if kind == "FLOAT":
        low, high = options["min"], min(options["max"], 100.0)
        return rng.choice([low, options["max"], options["default"], rng.uniform(low, high)])
    if kind == "COMBO":
        return rng.choice(options["options"] or ["none"])
    return rng.random() < 0.5 if kind == "BOOLEAN" else "text"


def broken(rng: random.Random, name: str, kind: str) -> Any:
    if kind in ("INT", "FLOAT"):
        return rng.choice([*NUMBERS, *NUMBERS, *OTHERS, link("int"), link("float"), link("text")])
    if kind == "STRING" or name in FILES:
        known = [v for v in FILES.get(name, []) for _ in range(3)]
        return rng.choice([*NAMES, *known, *OTHERS, link("text"), link("climb"), link("int")])
    if kind == "COMBO":
        return rng.choice([*NAMES[:20], *OTHERS, link("text")])
    if kind == "BOOLEAN":
        return rng.choice([*NUMBERS[:6], *OTHERS, link("text")])
    if kind in ("IMAGE", "MASK"):
        return rng.choice([*OTHERS, link("vae"), link("text"), *map(link, SHAPES[kind]), *map(link, SHAPES[kind])])
    some = ("src", "mask", "vae", "model", "encoder", "encode", "objective", "pairs", "options", "resume", "demo")
    return rng.choice([*OTHERS, *map(link, some), link("run", 4), link("demo", 1)])


# ---------------------------------------------------------------------------- nodes around the one that is tested

SIZES = [(1, 1, 1), (1, 7, 1), (7, 1, 2), (16, 16, 1), (16, 16, 3), (33, 17, 1), (64, 48, 2), (40, 24, 5), (8, 64, 1)]
SHAPES = {
    "IMAGE": [f"empty{i}" for i in range(len(SIZES))] + ["src", "gt", "pred", "scaled", "alpha", "nan", "pair"],
    "MASK": ["mask", "ones", "zeros", "half", "nan_mask", "tiny_mask", "odd_mask", "masks"],
}


def pool() -> dict[str, Any]:
    """In every prompt, so that ComfyUI keeps the loaded networks; only what a prompt uses is run."""

    def scaled(node: str, width: int, height: int) -> tuple[str, dict[str, Any]]:
        return "ImageScale", {
            "image": link(node),
            "upscale_method": "bilinear",
            "width": width,
            "height": height,
            "crop": "disabled",
        }

    def solid(value: float, width: int, height: int) -> tuple[str, dict[str, Any]]:
        return "SolidMask", {"value": value, "width": width, "height": height}

    both = {"pred": link("pred"), "gt": link("gt"), "src": link("src")}
    loss = {"encoder": link("encoder"), "weight": 1.0, "dist": "cos", "margin": 0.2, "margin_mode": "fixed"}
    return {
        "int": ("PrimitiveInt", {"value": -7}),
        "float": ("PrimitiveFloat", {"value": 1e30}),
        "text": ("PrimitiveString", {"value": "linked text"}),
        "climb": ("PrimitiveString", {"value": "../../escape"}),
        **{
            f"empty{i}": (
                "EmptyImage",
                {"width": w, "height": h, "batch_size": b, "color": 1000003 * (i + 1) % 0xFFFFFF},
            )
            for i, (h, w, b) in enumerate(SIZES)
        },
        "src": ("LoadImage", {"image": "fuzz_src.png"}),
        "gt": ("LoadImage", {"image": "fuzz_gt.png"}),
        "pred": ("ImageBatch", {"image1": link("src"), "image2": link("gt")}),
        "scaled": scaled("gt", 19, 31),
        "pair": ("ImageBatch", {"image1": link("gt"), "image2": link("src")}),
        "alpha": ("JoinImageWithAlpha", {"image": link("gt"), "alpha": link("half")}),
        "mask": ("LoadImageMask", {"image": "fuzz_mask.png", "channel": "red"}),
        "ones": solid(1.0, 48, 48),
        "zeros": solid(0.0, 48, 48),
        "half": solid(0.5, 48, 48),
        "nan_mask": solid("nan", 48, 48),
        "tiny_mask": solid(1.0, 1, 1),
        "odd_mask": solid(1.0, 13, 99),
        "many": ("RepeatImageBatch", {"image": link("gt"), "amount": 3}),
        "masks": ("ImageToMask", {"image": link("many"), "channel": "green"}),
        "nan": ("MaskToImage", {"mask": link("nan_mask")}),
        "vae": ("VAELoader", {"vae_name": VAE_FILE}),
        "model": ("UNETLoader", {"unet_name": MODEL_FILE, "weight_dtype": "default"}),
        "data": ("LoadTrainingDataset", {"folder_name": DATASET}),
        "lotus": ("LotusConditioning", {}),
        "encoder": (
            "EditLossTimmEncoder",
            {"model_name": TIMM, "weights": TIMM_FILE, "output": "grid", "layer": -1, "image_size": 32},
        ),
        "vector": ("EditLossTimmEncoder", {"model_name": TIMM, "weights": TIMM_FILE, "output": "global", "layer": -1}),
        "latents": ("EditLossVAEEncoder", {"vae": link("vae")}),
        "encode": (
            "EditLossEncode",
            {
                "encoder": link("encoder"),
                "overlay": link("pair"),
                "hard_negative": link("pred"),
                "mask": link("mask"),
                **both,
            },
        ),
        "encode_vector": ("EditLossEncode", {"encoder": link("vector"), **both}),
        "encode_both": (
            "EditLossEncode",
            {
                "encoder": link("vector"),
                "embeddings": link("encode"),
                "overlay": link("pair"),
                "hard_negative": link("pred"),
                **both,
            },
        ),
        "objective": ("EditLossNoEditIdentity", loss),
        "demo": ("EditLossDemoModel",),
        "pairs": ("EditLossDemoPairs", {"count": 2, "held_out": 1, "seed": 0}),
        "demo_latents": ("EditLossVAEEncoder", {"vae": link("demo", 2)}),
        "mix": (
            "EditLossRecommendedMix",
            {"encoder": link("demo_latents"), "preset": "recommended", "geometry_dist": "cos"},
        ),
        "untrainable": (
            "EditLossTriplet",
            {**loss, "anchor": "pred", "positive": "gt", "negative": "hard_negative", "objective": link("mix")},
        ),
        "options": (
            "EditLossRunOptions",
            {
                "checkpoint_every": 1,
                "keep": 3,
                "validate_every": 1,
                "previews": 1,
                "preview_steps": 1,
                "guidance": 1.0,
                "preview_guidance": 2.5,
                "gradient_checkpointing": False,
                "memory_reserve": 0.0,
            },
        ),
        "run": training(name="first", options=link("options"), held_out=link("pairs", 1), objective=link("mix")),
        "resume": ("EditLossResumeTraining", {"run": "first", "step": 0}),
    }


def training(**changes: Any) -> tuple[str, dict[str, Any]]:
    """One step on the demo's pairs, with what the node's plain values are in this test, so that it can be resumed."""
    widgets = {
        "name": "follower",
        "steps": 1,
        "learning_rate": 1e-4,
        "batch_size": 1,
        "rank": 2,
        "alpha": 16.0,
        "layers": "attention + MLP",
        "seed": 0,
        "hold_out": 0,
    }
    wired = {"model": link("demo"), "clip": link("demo", 1), "vae": link("demo", 2), "pairs": link("pairs")}
    return "EditLossTrainKontextLoRA", {**widgets, **wired, **changes}


RECIPES: dict[str, dict[str, list[Any]]] = {
    "TimmEncoder": {},
    "OpenCLIPEncoder": {},
    "CLIPVisionEncoder": {"clip_vision": ["vae", "src"]},
    "VAEEncoder": {"vae": ["vae"]},
    "DiffusionEncoder": {"model": ["model"], "vae": ["vae"], "conditioning": [["data", 1], ["data", 1], "lotus"]},
    "Encode": {"encoder": ["encoder", "vector", "latents"], "embeddings": ["encode", "encode_vector"]},
    "SaveEmbeddings": {"embeddings": ["encode", "encode_vector"]},
    "LoadEmbeddings": {"encoder": ["encoder", "vector"]},
    "EvaluateObjective": {"objective": ["objective"], "embeddings": ["encode_both"] * 3 + ["encode_vector"]},
    "TrainKontextLoRA": {
        "model": ["demo"] * 4 + ["model"],
        "clip": [["demo", 1]],
        "vae": [["demo", 2]] * 3 + ["vae"],
        "decoder": [["demo", 2], "vae"],
        "objective": ["mix", "mix", "objective", "untrainable"],
        "held_out": [["pairs", 1]],
    },
    "DemoJudge": {
        "base": ["demo"] * 4 + ["model"],
        "trained": ["run"] * 4 + ["model"],
        "clip": [["demo", 1]],
        "vae": [["demo", 2]] * 3 + ["vae"],
    },
}
SOCKETS = {
    "EDITLOSS_ENCODER": ["encoder", "vector"],
    "EDITLOSS_OBJECTIVE": ["objective"],
    "EDITLOSS_EMBEDDINGS": ["encode"],
    "EDITLOSS_PAIRS": ["pairs"],
    "EDITLOSS_TRAINING_OPTIONS": ["options"],
    "EDITLOSS_RESUME": ["resume"],
    "EDITLOSS_RUN": [["run", 4]],
}
USUAL = {
    "before": "src",
    "after": "gt",
    "pred": "pred",
    "gt": "gt",
    "src": "src",
    "images": "pred",
    "overlay": "pair",
    "hard_negative": "pred",
    "mask": "mask",
    "mask_before": "mask",
    "mask_after": "mask",
    "MakePairs.before": ["pairs", 2],  # the others are too small to train on
    "MakePairs.after": ["pairs", 3],
}


def wire(source: str | list[Any]) -> list[Any]:
    """A link to a node of the pool, to its first output where no other is named."""
    return link(source) if isinstance(source, str) else link(*source)


def draw_prompt(rng: random.Random, node: str, info: dict[str, Any]) -> dict[str, Any]:
    """One node with mostly valid inputs, of which none to three are then broken, and what follows it."""
    short = node.removeprefix("EditLoss")
    recipe = RECIPES.get(short, {})
    declared = [
        (group, name, *entry)
        for group in ("required", "optional")
        for name, entry in info["input"].get(group, {}).items()
    ]
    inputs: dict[str, Any] = {}
    plain = rng.random() < 0.5  # nothing but defaults and what fits, mostly
    for group, name, kind, options in declared:
        if group == "optional" and rng.random() < (1.0 if plain and short == "LoadEmbeddings" else 0.4):
            continue
        if kind in ("IMAGE", "MASK"):
            usual = USUAL.get(f"{short}.{name}") or USUAL[name]
            inputs[name] = wire(usual if plain or rng.random() < 0.6 else rng.choice(SHAPES[kind]))
        elif name in recipe or kind in SOCKETS:
            inputs[name] = wire(rng.choice(recipe.get(name) or SOCKETS[kind]))
        else:
            inputs[name] = valid(rng, short, name, kind, options, plain)
    faults = rng.choice([0, 0, 1]) if plain else rng.choice([0, 0, 1, 1, 2])
    for _, name, kind, _ in rng.sample(declared, k=min(faults, len(declared))):
        if rng.random() < 0.15:
            inputs.pop(name, None)
        else:
            inputs[name] = broken(rng, name, kind)
    if rng.random() < 0.05:
        inputs["no_such_input"] = rng.choice([5, link("gt"), link("text")])
    return graph(**pool(), node=(node, inputs), **followers(rng, info))


TRAINED_WITH = {
    "EDITLOSS_PAIRS": "pairs",
    "EDITLOSS_TRAINING_OPTIONS": "options",
    "EDITLOSS_RESUME": "resume",
    "EDITLOSS_OBJECTIVE": "objective",
}


def followers(rng: random.Random, info: dict[str, Any]) -> dict[str, Any]:
    """An output that makes ComfyUI run the node, and often the pack's next nodes as well."""
    kind, show = info["output"][0], ("PreviewAny", {"source": link("node")})
    if kind in TRAINED_WITH and rng.random() < (0.1 if kind == "EDITLOSS_OBJECTIVE" else 0.4):
        train = training(steps=rng.choice([1, 2]), **{TRAINED_WITH[kind]: link("node")})
        return {"after": train, "show": ("PreviewAny", {"source": link("after", 3)})}
    if kind == "EDITLOSS_ENCODER":
        pictures = {
            role: link(rng.choice(["src", "gt"] * 4 + ["empty0", "empty5", "empty7", "nan", "alpha"]))
            for role in ("pred", "gt")
        }
        return {
            "after": ("EditLossEncode", {"encoder": link("node"), **pictures}),
            "show": ("PreviewAny", {"source": link("after")}),
        }
    if kind == "EDITLOSS_OBJECTIVE":
        wired = {
            "objective": link("node"),
            "width": 640,
            "embeddings": link(rng.choice(["encode_both"] * 5 + ["encode", "encode_vector"])),
        }
        return {"after": ("EditLossEvaluateObjective", wired), "show": ("PreviewAny", {"source": link("after", 3)})}
    if kind == "EDITLOSS_EMBEDDINGS" and rng.random() < 0.6:
        copy = {"embeddings": link("node"), "file_name": f"fuzz/copy{rng.randint(0, 3)}"}
        wired = {"objective": link("objective"), "embeddings": link("node"), "width": 640}
        return {"copy": ("EditLossSaveEmbeddings", copy), "show": ("EditLossEvaluateObjective", wired)}
    if kind == "IMAGE" and rng.random() < 0.5:
        return {"show": ("PreviewImage", {"images": link("node")})}
    return {"show": show}


# ---------------------------------------------------------------------------- files, good and bad


def embedding_set(seed: int = 0, batch: int = 1, name: str = f"timm/{TIMM}/grid", **changes: Any) -> EmbeddingSet:
    generator = torch.Generator().manual_seed(seed)
    tensors = {(role, name): torch.rand(batch, 2, 2, 4, generator=generator) for role in ("pred", "gt", "src")}
    info = EncoderInfo(name, "none", "0" * 64, "grid")
    return EmbeddingSet(**{"tensors": tensors, "encoders": {name: info}, "grids": {name: (2, 2)}, **changes})


def write_embeddings(folder: Path, outside: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    whole = embedding_set().save(folder / "good.safetensors").read_bytes()
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    save_file({"a": torch.zeros(2)}, folder / "foreign.safetensors", {"format": "pt"})
    save_file({"a": torch.zeros(2)}, folder / "no_metadata.safetensors")
    (folder / "bad_json.safetensors").write_bytes(whole.replace(b'{\\"timm/', b'[\\"timm/'))
    # Whole and signed, but by something else than Save Embeddings.
    key = ("pred", f"timm/{TIMM}/grid")
    embedding_set(tensors={key: torch.rand(1, 2, 2, 4), ("gt", key[1]): torch.rand(3, 5, 2, 4)}).save(
        folder / "two_sizes.safetensors"
    )
    embedding_set(tensors={key: torch.full((1, 2, 2, 4), float("nan"))}).save(folder / "nan.safetensors")
    (folder / "folder.safetensors").mkdir(exist_ok=True)
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "link_out.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "link_dir").symlink_to(outside, target_is_directory=True)


def write_weights(folder: Path, outside: Path) -> None:
    good = (folder / TIMM_FILE).read_bytes()
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "truncated.safetensors").write_bytes(good[: len(good) // 3])
    (folder / "text.safetensors").write_text("<html>404</html>" * 20)
    torch.save({"a": torch.zeros(3)}, folder / "pickle.safetensors")
    embedding_set().save(folder / "foreign.safetensors")
    (folder / "huge_header.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}")
    from safetensors.torch import load_file

    state = load_file(folder / TIMM_FILE)
    save_file({k: (100 * v).to(torch.int32) for k, v in state.items()}, folder / "numbers.safetensors")
    save_file({k: torch.full_like(v, float("nan")) for k, v in state.items()}, folder / "not_finite.safetensors")
    (folder / "nowhere.safetensors").symlink_to(folder / "deleted.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "folder.safetensors").mkdir(exist_ok=True)
    (folder / "outside.safetensors").symlink_to(
        outside / "weights.safetensors"
    )  # a user's own link: allowed, as everywhere


def write_buffers(folder: Path, outside: Path) -> None:
    from editloss_core.hard_negatives import HardNegativeBuffer, image_key, quantize_image

    full = HardNegativeBuffer(folder / "full")
    pictures = {name: picture_tensor(name) for name in ("src", "gt")}
    for picture in pictures.values():
        full.store(image_key(picture), quantize_image(1 - picture))
    sizes = HardNegativeBuffer(folder / "two_sizes")
    for i, picture in enumerate(pictures.values()):
        sizes.store(image_key(picture), quantize_image(torch.rand(8 + i, 8, 3)))
    HardNegativeBuffer(folder / "empty")
    (folder / "broken").mkdir()
    (folder / "broken" / "negative-0000000001-0.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{...}")
    shutil.copy(next((folder / "full").glob("*.safetensors")), folder / "broken" / "copy.safetensors")
    (folder / "broken" / "link.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "a_file").write_text("not a folder")
    (folder / "link_dir").symlink_to(outside, target_is_directory=True)
    (folder / "loop").symlink_to(folder / "loop")


def write_runs(folder: Path, outside: Path) -> None:
    """Runs that cannot be resumed, and links to a checkpoint outside that could be."""
    saved = Checkpoint(1, {"a": torch.zeros(1)}, {}, None, {"lora": {"layers": MARKER}, "settings": {}})
    secret = saved.save(outside / "checkpoints")
    for name in ("broken", "link_file", "nowhere", "linked"):
        (folder / name / "checkpoints").parent.mkdir(parents=True)
        if name != "linked":
            (folder / name / "checkpoints").mkdir()
    (folder / "broken" / "checkpoints" / secret.name).write_bytes(secret.read_bytes()[:100])
    (folder / "link_file" / "checkpoints" / secret.name).symlink_to(secret)
    (folder / "nowhere" / "checkpoints" / secret.name).symlink_to(outside / "deleted.safetensors")
    (folder / "linked" / "checkpoints").symlink_to(secret.parent, target_is_directory=True)
    (folder / "a_file").write_text("not a folder")
    (folder / "link_dir").symlink_to(outside, target_is_directory=True)
    (folder / "loop").symlink_to(folder / "loop")


def write_loras(folder: Path, outside: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "good.safetensors").write_bytes(b"someone's own")
    (folder / "folder.safetensors").mkdir()
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "link_out.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "link_dir").symlink_to(outside, target_is_directory=True)


def write_pairs(folder: Path, outside: Path) -> None:
    """Pairs of 128 pixels below ``input``, good and bad; one set lies outside behind a link, where data sets may lie, and
    one lies outside where no link leads."""
    examples = stool_pairs(2)
    names = write_folder(examples, folder / "fuzz pairs")
    write_folder(examples, outside / "shared")
    write_folder(examples, outside / "private")
    for caption in (outside / "private" / "after").glob("*.txt"):
        caption.write_text(MARKER)
    (folder / "fuzz link").symlink_to(outside / "shared", target_is_directory=True)
    (folder / "fuzz loop").symlink_to(folder / "fuzz loop")
    (folder / "fuzz nowhere").symlink_to(outside / "deleted", target_is_directory=True)
    (folder / "fuzz empty").mkdir()
    one = folder / "fuzz one folder"
    one.mkdir()
    for name in names:
        for part in ("before", "after"):
            shutil.copy(folder / "fuzz pairs" / part / f"{name}.png", one / f"{name}_{part}.png")
    bad = folder / "fuzz bad"
    shutil.copytree(folder / "fuzz pairs", bad)
    (bad / "before" / f"{names[0]}.png").write_bytes(b"not a picture")
    (bad / "after" / f"{names[1]}.txt").write_bytes(b"\xff\xfe\x00")
    (bad / "mask" / "alone.png").symlink_to(bad / "mask" / "alone.png")
    Image.new("RGB", (20, 300)).save(bad / "after" / "thin.jpg")


def picture(name: str) -> np.ndarray:
    y, x = np.mgrid[0:48, 0:48]
    pixels = np.stack([2 * x + 60, 3 * y + 40, x + y + 50], -1)
    pixels[14:34, 12:32] = (230, 40, 30) if name == "src" else (20, 60, 220)
    return pixels.astype(np.uint8)


def picture_tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(picture(name).astype(np.float32) / 255.0)


def tree(folder: Path) -> dict[str, str]:
    """Every file and link below a folder, with what is in it; links are not followed."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in [*files, *(f for f in folders if Path(root, f).is_symlink())]:
            path = Path(root, name)
            found[path.relative_to(folder).as_posix()] = (
                f"link to {os.readlink(path)}" if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
            )
    return found


@pytest.fixture(scope="module")
def field(
    comfyui_server: ComfyServer, client: Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """Models, pictures, bad files, links that lead out, and a folder outside with files that only those links reach."""
    server, outside = comfyui_server, tmp_path_factory.mktemp("outside")
    embedding_set(name=MARKER).save(outside / "secret.safetensors")
    from editloss_core.hard_negatives import HardNegativeBuffer, image_key, quantize_image

    for name in ("src", "gt"):
        HardNegativeBuffer(outside).store(
            image_key(picture_tensor(name)), quantize_image(picture_tensor(name)), note=MARKER
        )
    write_models(server.models_dir, server.output_dir)
    shutil.copy(server.models_dir / "editloss_encoders" / TIMM_FILE, outside / "weights.safetensors")
    for name in ("src", "gt"):
        Image.fromarray(picture(name)).save(server.input_dir / f"fuzz_{name}.png")
    mask = np.zeros((48, 48), np.uint8)
    mask[14:34, 12:32] = 255
    Image.fromarray(mask).save(server.input_dir / "fuzz_mask.png")
    write_embeddings(server.output_dir / "editloss" / "embeddings", outside)
    write_embeddings(server.input_dir / "editloss" / "embeddings", outside)
    write_buffers(server.output_dir / "editloss" / "hard_negatives", outside)
    write_runs(server.output_dir / "editloss" / "runs", outside)
    write_loras(server.models_dir / "loras", outside)
    write_pairs(server.input_dir, outside)
    encoders = server.models_dir / "editloss_encoders"
    kept = {path.name for path in encoders.iterdir()}
    write_weights(encoders, outside)
    show = {"show": ("PreviewAny", {"source": link("run", 3)})}
    assert outcome(client, graph(**pool(), **show))[0] == "result", "the run that others resume"
    before = {
        "base": inside_base(server),
        "outside": tree(outside),
        "above": {p.name for p in server.base.parent.iterdir()},
    }
    yield SimpleNamespace(server=server, outside=outside, before=before)
    clear(p for p in encoders.iterdir() if p.name not in kept)
    clear((server.models_dir / "loras").iterdir())  # the folder stays: ComfyUI remembers when it was changed
    clear([*server.input_dir.glob("fuzz *"), server.input_dir / "editloss", server.output_dir / "editloss"])


def clear(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def inside_base(server: ComfyServer) -> dict[str, str]:
    """Everything below the base folder but what ComfyUI itself keeps there: its log, its settings, its temp folder."""
    own = ("comfyui.log", "user/", "temp/")
    return {name: content for name, content in tree(server.base).items() if not name.startswith(own)}


# ---------------------------------------------------------------------------- the run


def outcome(client: Client, prompt: dict[str, Any], timeout: float = 60.0) -> tuple[str, str, str, str]:
    """("result" | "refused" | "failed", node class, exception type, message)."""
    try:
        prompt_id = client.queue(prompt)
    except NodeError as error:
        return "refused", error.class_type, "", error.message
    deadline, wait = time.monotonic() + timeout, 0.005
    while time.monotonic() < deadline:
        entry = client.call(f"/history/{prompt_id}").get(prompt_id)
        if entry:
            for kind, data in entry["status"]["messages"]:
                if kind == "execution_error":
                    return "failed", data["node_type"], data["exception_type"], data["exception_message"].strip()
            return "result", "", "", json.dumps(entry["outputs"])
        time.sleep(wait)
        wait = min(0.05, 1.3 * wait)
    client.interrupt(prompt_id)
    return "failed", "", "Timeout", f"no end after {timeout:.0f} s"


def unreadable(kind: str, node: str, exception: str, message: str, typed: Iterable[Any] = ()) -> str:
    """Why a failure is not a clear error of one of our nodes; empty if it is. ``typed``: values that a message may repeat,
    however long they are."""
    if kind == "refused":
        return "" if message else "refused without a word"
    if not node.startswith("EditLoss"):
        return f"raised by {node}"
    if exception != "ValueError" and not exception.endswith(READABLE):
        return f"a {exception}"
    for text in typed:
        if isinstance(text, str) and len(text) > 100:
            message = message.replace(text, "…")
    if not 15 <= len(message) <= 1500 or "has no attribute" in message or "Traceback" in message:
        return "not a message for people"
    return ""


def test_fuzz(
    field: SimpleNamespace, client: Client, object_info: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = sorted(name for name in object_info if name.startswith("EditLoss"))
    rng, counts, per_node, bad, leaks = random.Random(SEED), Counter(), {n: Counter() for n in nodes}, [], []
    slow, began = (0.0, 0), time.monotonic()
    for i in range(PROMPTS):
        node = nodes[i % len(nodes)]
        prompt = draw_prompt(rng, node, object_info[node])
        start = time.monotonic()
        kind, culprit, exception, message = outcome(client, prompt)
        slow = max(slow, (time.monotonic() - start, i))
        counts[kind] += 1
        per_node[node][kind] += 1
        typed = prompt["node"]["inputs"].values()
        fault = unreadable(kind, culprit, exception, message, typed) if kind != "result" else ""
        if fault:
            shown = {
                name: v if len(repr(v)) < 200 else f"{repr(v)[:200]}…" for name, v in prompt["node"]["inputs"].items()
            }
            bad.append(f"#{i} {node} {shown}\n    {fault}: {culprit}: {message[:600]}")
        if MARKER in message:
            leaks.append(f"#{i} {node}: {message[:300]}")
        assert field.server.alive, (
            f"the server died of prompt {i}: {json.dumps(prompt)[:2000]}\n{field.server.log_tail()}"
        )
    seconds = time.monotonic() - began
    with capsys.disabled():
        print(
            f"\n{PROMPTS} prompts, seed {SEED}: {counts['result']} results, {counts['refused']} refused by ComfyUI's validation, "
            f"{counts['failed']} errors of nodes, {len(bad)} of them unclear; {seconds:.0f} s, the slowest {slow[0]:.1f} s (#{slow[1]})"
        )
        for name, found in per_node.items():
            print(f"  {name:28} {found['result']:4} {found['refused']:4} {found['failed']:4}")
    assert not bad, f"{len(bad)} unclear failures\n" + "\n".join(bad[:40])
    assert not leaks, "\n".join(leaks)
    never = {n for n, found in per_node.items() if not found["refused"] + found["failed"]} - WITHOUT_INPUTS
    assert not never, f"never wrong: {never}"
    without = {n for n, found in per_node.items() if not found["result"]} - {
        "EditLossCLIPVisionEncoder"
    }  # needs 600 MB
    assert not without, f"never right: {without}"


def test_nothing_outside_was_read_or_written(field: SimpleNamespace) -> None:
    """After the fuzz: new files in output and among the LoRAs only, what was there is as it was, and no copy of the
    secret anywhere."""
    after = inside_base(field.server)
    new = {name for name in after if name not in field.before["base"]}
    assert new and all(name.startswith(("output/editloss/", "models/loras/")) for name in new), sorted(new)
    assert any(name.startswith("models/loras/") for name in new), "no LoRA was saved"
    assert all(not name.endswith((".tmp", ".part")) for name in new), "temporary files stayed"
    changed = {name for name, content in field.before["base"].items() if after.get(name) != content}
    assert all(name.startswith("output/editloss/") for name in changed), sorted(changed)
    assert tree(field.outside) == field.before["outside"]
    assert {p.name for p in field.server.base.parent.iterdir()} == field.before["above"]
    for name in new | changed:
        path = field.server.base / name
        if path.is_file() and not path.is_symlink():
            assert MARKER.encode() not in path.read_bytes(), f"{name} holds what lies outside"


def test_the_server_still_serves(field: SimpleNamespace, client: Client) -> None:
    shown = {
        "after": (
            "EditLossEvaluateObjective",
            {"objective": link("objective"), "embeddings": link("encode"), "width": 640},
        ),
        "show": ("PreviewAny", {"source": link("after", 3)}),
    }
    kind, *_, message = outcome(client, graph(**pool(), **shown))
    assert kind == "result" and "no edit identity" in message


def test_lists_never_offer_what_lies_outside(field: SimpleNamespace, client: Client) -> None:
    offered = client.object_info()["EditLossLoadEmbeddings"]["input"]["required"]["file"][1]["options"]
    assert "good [output]" in offered and "good [input]" in offered
    assert not [name for name in offered if "secret" in name or "folder" in name]


@pytest.mark.parametrize("setting", ["folder", "control_folder"])
def test_no_name_of_a_folder_of_pairs_climbs_out(setting: str, field: SimpleNamespace, client: Client) -> None:
    """Names that would reach whole pairs outside, were they followed; what they are refused with tells nothing of them."""
    private = field.outside / "private"
    assert (private / "before").is_dir()
    climbing = os.path.relpath(private, field.server.input_dir)
    assert (field.server.input_dir / climbing / "before").is_dir()
    for name in (
        climbing,
        f"fuzz pairs/../{climbing}",
        f"./{climbing}",
        climbing.replace("/", "\\"),
        climbing.replace("../", "..%2f"),
        str(private),
        f"//{private}",
        f"{climbing}/",
        f"fuzz link/../{private.name}",
    ):
        folders = {"folder": "fuzz pairs/after", "control_folder": "fuzz pairs/before", setting: name}
        nodes = {"load": ("EditLossLoadPairs", {**folders, "resolution": 64, "default_caption": WANTED})}
        kind, _, exception, message = outcome(client, graph(**nodes))
        assert (kind, exception) == ("failed", "ValueError"), (name, kind, message)
        assert message.startswith(f"{setting}: ") and MARKER not in message, message
        assert "scene_" not in message, "it names files"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("linked", "leads out of ComfyUI's output folder"),
        ("link_file", "leads out of ComfyUI's output folder"),
        ("link_dir", "no run called 'link_dir'"),
        ("nowhere", "no run called 'nowhere'"),
        ("broken", "not a readable checkpoint"),
    ],
)
def test_what_cannot_be_resumed_says_why(run: str, message: str, field: SimpleNamespace, client: Client) -> None:
    nodes = {**pool(), "resume": ("EditLossResumeTraining", {"run": run, "step": 0})}
    nodes["run"][1].update(resume=link("resume"), name=f"never {run}")
    kind, _, exception, said = outcome(client, graph(**nodes, show=("PreviewAny", {"source": link("run", 3)})))
    assert kind == "failed" and message in said and MARKER not in said, (exception, said)
    assert tree(field.outside) == field.before["outside"]
