"""Draws the prompts of test_fuzz.py: any node of the pack with mostly valid inputs, of which some are then broken.

To add a node: most need nothing here. ``RECIPES`` names sources for sockets of ComfyUI's own types, ``CHEAP`` values for
widgets that may be slow, ``FILES`` names for those that reach files.
"""

from __future__ import annotations

import random
from typing import Any

from helpers import graph, link
from small_models import CLIP, CLIP_FILE, DATASET, MODEL_FILE, TIMM, TIMM_FILE, VAE_FILE

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
    "unedited": [0, 1, 2],
    "overlaid": [0, 1, 2],
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
        "pairs": ("EditLossDemoPairs", {"count": 2, "unedited": 1, "overlaid": 0, "held_out": 1, "seed": 0}),
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
    "VAEDecoderEncoder": {"vae": ["vae"]},
    "DiffusionEncoder": {"model": ["model"], "vae": ["vae"], "conditioning": [["data", 1], ["data", 1], "lotus"]},
    "Encode": {"encoder": ["encoder", "vector", "latents"], "embeddings": ["encode", "encode_vector"]},
    "SaveEmbeddings": {"embeddings": ["encode", "encode_vector"]},
    "LoadEmbeddings": {"encoder": ["encoder", "vector"]},
    "EvaluateObjective": {"objective": ["objective"], "embeddings": ["encode_both"] * 3 + ["encode_vector"]},
    "DiagnoseOutputs": {"objective": ["objective"], "embeddings": ["encode_both"] * 3 + ["encode_vector"]},
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
    "before_2": "src",
    "after": "gt",
    "pred": "pred",
    "output": "pred",
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
