"""Puts the example pictures and the example encoder where ComfyUI looks for them.

The pair is real: the input and the result of "Replace the cat with a dalmatian" by an edit model, as ComfyUI's own
template package shows it. Three of the four outputs imitate failures by simple means, so that the example has all of
them. The overlay is a translucent paste, by other code than the pack's overlay negatives but like some of them, so it is
an easy case; what a model paints may be harder to tell.

The rendered rooms of tests/pictures, whose layers are known, give outputs of all five kinds for diagnose_outputs, and a
folder of pairs with typical mistakes for audit_pairs.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from lite0 import write_lite0
from PIL import Image, ImageFilter

PACKAGE = "comfyui_workflow_templates_media_image"
BEFORE, AFTER = "image_qwen_image_edit_2509-2.webp", "image_qwen_image_edit_2509-1.webp"
CROP = (70, 140, 280, 350)  # left, top, right, bottom around both animals, in pixels of the 350 × 350 pictures
SIZE = 448
PREFIX = "editloss_example_"
RENDERED = Path(__file__).resolve().parents[1] / "tests" / "pictures"
PAIRS = "editloss_example_pairs"  # folder below ComfyUI's input
CAPTION = "replace the chair with the stool"
WEIGHTS = "efficientnet_lite0.safetensors"


def prepare(comfyui_input: Path, comfyui_models: Path) -> None:
    """Write the pictures to ``comfyui_input`` and the encoder's weights to ``comfyui_models/editloss_encoders``.

    Raises:
        RuntimeError: if a package that carries them is not installed, saying how to get it.
    """
    before, after = (_template_picture(name) for name in (BEFORE, AFTER))
    pictures = {
        "before": before,
        "after": after,
        "output_good": _recompressed(after, 60),
        "output_no_edit": _recompressed(before, 60),
        "output_distorted": _recompressed(_distorted(before, after), 60),
        "output_overlay": _recompressed(_overlaid(before, after), 60),
    }
    pictures |= {f"room_{name}": pixels for name, pixels in room_outputs("oak_chair").items()}
    comfyui_input.mkdir(parents=True, exist_ok=True)
    _write_pairs(comfyui_input / PAIRS)
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(comfyui_input / f"{PREFIX}{name}.png")
    weights = comfyui_models / "editloss_encoders" / WEIGHTS
    if not weights.is_file():
        write_lite0(weights)


def _template_picture(name: str) -> np.ndarray:
    try:
        package = __import__(PACKAGE)
    except ImportError as error:
        raise RuntimeError(
            f'{PACKAGE} is not installed; it comes with ComfyUI, or: pip install -e ".[comfyui]"'
        ) from error
    path = Path(package.__file__).parent / "templates" / name
    if not path.is_file():
        raise RuntimeError(f"{PACKAGE} has no picture {name}; the version that ComfyUI 0.3.75 asks for has it")
    picture = Image.open(path).convert("RGB").resize((350, 350), Image.Resampling.BICUBIC)
    return np.asarray(picture.crop(CROP).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _recompressed(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Through JPEG, so that no output equals its source to the bit, as none of a model does."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """1 where either animal stands, softly 0 elsewhere; ``[H, W, 1]``."""
    difference = np.abs(before.astype(float) - after.astype(float)).max(-1)
    region = Image.fromarray(((difference > 45) * 255).astype(np.uint8))
    region = region.filter(ImageFilter.MedianFilter(7)).filter(ImageFilter.MaxFilter(15))
    return np.asarray(region.filter(ImageFilter.GaussianBlur(6)))[..., None] / 255.0


def _distorted(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The new object bent and pulled apart, the background left alone as far as a warp can."""
    height, width = after.shape[:2]
    region = Image.fromarray((_changed(before, after)[..., 0] * 255).astype(np.uint8))
    weight = np.asarray(region.filter(ImageFilter.GaussianBlur(14))) / 255.0
    y, x = np.mgrid[:height, :width].astype(float)
    sx = x + weight * 20 * np.sin(y / 16.0 + x / 60.0)
    sy = y + weight * 22 * np.sin(x / 26.0)
    return _sample(after, sx, sy)


def _sample(pixels: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear lookup, clamped at the border."""
    x, y = np.clip(x, 0, pixels.shape[1] - 1.001), np.clip(y, 0, pixels.shape[0] - 1.001)
    x0, y0 = x.astype(int), y.astype(int)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    p = pixels.astype(float)
    top = (1 - fx) * p[y0, x0] + fx * p[y0, x0 + 1]
    bottom = (1 - fx) * p[y0 + 1, x0] + fx * p[y0 + 1, x0 + 1]
    return ((1 - fy) * top + fy * bottom).round().astype(np.uint8)


def _overlaid(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The new object painted translucently over the old one, which is still there."""
    mask = 0.6 * _changed(before, after)
    return (mask * after + (1.0 - mask) * before).round().astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Rendered rooms
# ---------------------------------------------------------------------------------------------------------------------


def _rendered(part: str, name: str) -> np.ndarray:
    picture = Image.open(next((RENDERED / part).glob(f"{name}.*")))
    return np.asarray(picture if picture.mode in ("RGB", "RGBA") else picture.convert("L"))


def room_outputs(name: str) -> dict[str, np.ndarray]:
    """Before, after and mask of a pair, and an output of every kind."""
    before, after, output, mask = (_rendered(f"edits/{part}", name) for part in ("before", "after", "output", "mask"))
    plate, new = _rendered("parts/plate", name), _rendered("parts/new", name)
    rows = (new[..., 3] > 127).any(1).nonzero()[0]
    layer = new[..., 3:] / 255.0
    layer[rows[0] + 2 * len(rows) // 3 :] = 0  # without its feet
    distorted = plate * (1 - layer) + new[..., :3] * layer
    collateral = after.copy()
    collateral[:90, -130:] = collateral[:90, -130:, ::-1] // 2 + 90
    return {
        "before": before,
        "after": after,
        "mask": mask,
        "output_good": _recompressed(after, 60),
        "output_no_edit": _recompressed(before, 60),
        "output_overlay": output,
        "output_distorted": _recompressed(distorted.round().astype(np.uint8), 80),
        "output_collateral": _recompressed(collateral, 80),
    }


def _write_pairs(folder: Path) -> None:
    """The six rendered pairs, and four more as people have them by mistake."""
    parts = {part: folder / part for part in ("before", "after", "mask")}
    for place in parts.values():
        place.mkdir(parents=True, exist_ok=True)

    def write(
        name: str, before: np.ndarray, after: np.ndarray, mask: np.ndarray | None = None, caption: str = CAPTION
    ) -> None:
        for part, pixels in (("before", before), ("after", after), ("mask", mask)):
            if pixels is not None:
                Image.fromarray(pixels).save(parts[part] / f"{name}.png")
        if caption:
            (parts["after"] / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")

    names = sorted(path.stem for path in (RENDERED / "edits" / "before").iterdir())
    pairs = {name: [_rendered(f"edits/{part}", name) for part in ("before", "after", "mask")] for name in names}
    for name, pair in pairs.items():
        write(name, *pair)
    before, after, _ = pairs[names[0]]
    write("not_edited", _recompressed(before[:, ::-1], 90), _recompressed(before[:, ::-1], 60))
    before, after, _ = pairs[names[1]]
    write("shifted", before[:, ::-1][8:-8, 8:-8], after[:, ::-1][8:-8, 2:-14])
    before, after, mask = pairs[names[2]]
    write("mask_elsewhere", before[:, ::-1], after[:, ::-1], mask)
    before, after, _ = pairs[names[3]]
    write("without_caption", before[:, ::-1], after[:, ::-1], caption="")
