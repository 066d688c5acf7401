"""The few pictures of the evaluation set that are in the repository, for tests and examples.

python benchmarks/edit_failures/ship.py SCENES --out tests/pictures

The pairs go to editloss_core/demo/pictures, as the example graphs show them; what only tests need goes to --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from failures import Item, items
from PIL import Image
from render import Scene, load_scene

PAIRS = Path(__file__).resolve().parents[2] / "editloss_core" / "demo" / "pictures"
SIDE = 384  # pixels
QUALITY = 88

# name → (scene, kind, construction, severity); other rooms, objects and sizes each
CHOSEN = {
    "osaka_chair": ("report_03_osakaChair_stool2", "good", "soft and noisy", 1),
    "thonet": ("report_05_thonet_crate", "no edit", "copy, JPEG", 60),
    "oak_chair": ("report_00_oakChair_stool2", "overlay", "old behind new", 0.5),
    "armchair": ("report_07_armchair_bedsideTable2", "distorted", "warp", 0.1),
    "bar_stool": ("report_12_silla2_stool2", "collateral change", "thing added", 0.12),
    "cushion_chair": ("report_02_chairWithCushion_crate", "good", "displaced", 0.12),
}


def image(values: np.ndarray) -> Image.Image:
    picture = Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def save(picture: Image.Image, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{name}.webp", quality=QUALITY, method=6)


def chosen_item(scene: Scene, construction: str, severity: float) -> Item:
    return next(i for i in items(scene) if (i.construction, i.severity) == (construction, severity))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scenes", type=Path, help="folder that render.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    parts, outcomes = arguments.out / "parts", {}
    for name, (source, kind, construction, severity) in CHOSEN.items():
        scene = load_scene(arguments.scenes / f"{source}.npz")
        item = chosen_item(scene, construction, severity)
        for folder, values in (
            (PAIRS / "before", scene.before),
            (PAIRS / "after", scene.after),
            (arguments.out / "output", item.picture),
        ):
            save(image(values), folder, name)
        (PAIRS / "mask").mkdir(parents=True, exist_ok=True)
        image(scene.mask).point(lambda v: 255 * (v > 127)).convert("1").save(PAIRS / "mask" / f"{name}.png")
        for folder in ("plate", "old", "new", "old_shadow", "new_shadow"):
            save(image(getattr(scene, folder)), parts / folder, name)
        outcomes[name] = {"scene": source, "kind": kind, "construction": construction, "severity": severity}
    (arguments.out / "outcomes.json").write_text(json.dumps(outcomes, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
