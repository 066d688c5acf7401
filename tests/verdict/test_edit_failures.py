"""The failures of benchmarks/edit_failures, made from the pictures that are in the repository."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from editloss_core.verdict.judge import judge

pytest.importorskip("scipy")

HERE = Path(__file__).parents[1]
PICTURES = HERE / "pictures"
PAIRS = HERE.parent / "editloss_core" / "demo" / "pictures"
sys.path.insert(0, str(HERE.parent / "benchmarks" / "edit_failures"))

import failures  # noqa: E402
import render  # noqa: E402
import unseen  # noqa: E402

pytestmark = pytest.mark.slow

OUTCOMES = json.loads((PICTURES / "outcomes.json").read_text(encoding="utf-8"))
LAYERS = ("plate", "old", "new", "old_shadow", "new_shadow")
CODEC = 0.03  # mean difference of two pictures that WebP or JPEG alone sets apart: 0.002 to 0.016 here


def read(path: Path, mode: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert(mode), np.float32) / 255


@pytest.fixture(scope="module")
def scene() -> render.Scene:
    modes = dict(zip(LAYERS, ("RGB", "RGBA", "RGBA", "L", "L")))
    return render.Scene(
        "oak_chair", **{k: read(PICTURES / "parts" / k / "oak_chair.webp", mode) for k, mode in modes.items()}
    )


@pytest.fixture(scope="module")
def made(scene) -> list[failures.Item]:
    return [*failures.items(scene), *unseen.items(scene)]


def change(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    return float(np.abs(a - b).mean(2)[where].mean())


def test_every_construction_is_made_and_stays_in_range(scene, made):
    wanted = {
        (c, s)
        for table in (failures.TABLE, unseen.TABLE)
        for c, (_, levels, *_) in table.items()
        for some in levels.values()
        for s in some
    }
    assert {(i.construction, i.severity) for i in made} == wanted
    for item in made:
        assert item.kind in failures.KINDS and item.level in ("slight", "moderate", "severe", "-")
        assert item.picture.shape == scene.plate.shape and item.picture.dtype == np.float32
        assert 0 <= item.picture.min() and item.picture.max() <= 1


def test_the_same_scene_gives_the_same_pictures(scene, made):
    again = [*failures.items(scene), *unseen.items(scene)]
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(made, again, strict=True))


def test_copy_and_right_edit_are_exact(scene, made):
    by_name = {i.construction: i.picture for i in made}
    assert np.array_equal(by_name["copy"], scene.before.clip(0, 1))
    assert np.array_equal(by_name["after"], scene.after.clip(0, 1))


@pytest.mark.parametrize(
    "make",
    [
        failures._behind,
        failures._before_new,
        failures._multiplied,
        failures._screened,
        failures._grains,
        failures._outline,
        failures._beside,
        failures._half_wiped,
        failures._interlaced,
        failures._grey_ghost,
        unseen._squares,
        unseen._fading,
    ],  # fmt: skip
)
def test_nothing_left_of_the_old_object_is_the_right_edit(scene, make):
    assert np.allclose(make(scene, 0.0, np.random.default_rng(0)), scene.after, atol=1e-6)


def test_a_failure_grows_with_its_severity(scene, made):
    """Towards the after picture for what is not edited, away from it for all else."""
    everywhere = np.ones(scene.mask.shape, bool)
    for table in (failures.TABLE, unseen.TABLE):
        for construction, (kind, *_) in table.items():
            some = [i for i in made if i.construction == construction]
            # a piece stands to either side, and the room may be more like it on one of them
            # and a region out of focus is another one for each severity
            if (
                kind == "good"
                or len(some) < 2
                or construction in ("copy, JPEG", "in two pieces", "region out of focus")
            ):
                continue
            distances = [change(i.picture, scene.after, everywhere) for i in some]
            order = [i.severity for i in some]
            if construction == "after shines through":  # the less of it, the worse
                order = [-s for s in order]
            assert np.argsort(order).tolist() == np.argsort(distances).tolist(), construction


def test_what_is_done_to_the_object_leaves_the_room_as_it_is(scene, made):
    """Elsewhere it has its own pixels, not smeared ones: 9 to 22 % of the picture is touched, nearly all would be."""
    for item in made:
        if item.kind == "distorted" or item.construction in ("displaced", "resized"):
            touched = np.abs(item.picture - scene.plate).max(2) > 1e-6
            assert touched.mean() < 0.3, item.construction


def test_a_collateral_change_leaves_the_edit_alone(scene, made):
    inside = scene.mask > 0.5
    for item in made:
        if item.kind == "collateral change" and item.construction != "picture moved":
            assert change(item.picture, scene.after, inside) < 0.02, item.construction
            assert change(item.picture, scene.after, ~inside) > 1e-4, item.construction


@pytest.mark.parametrize("share", [0.02, 0.07, 0.15])
def test_a_warp_moves_the_object_by_the_share_it_says(scene, share, monkeypatch):
    looked = []
    monkeypatch.setattr(failures, "moved", lambda layer, y, x: looked.append((y, x)) or layer)
    failures._warp(scene, share, np.random.default_rng(0))
    y, x = failures.grid(scene)
    inside = scene.new[..., 3] > 0.5
    squared = ((looked[0][0] - y) ** 2 + (looked[0][1] - x) ** 2)[inside]
    assert np.sqrt(squared.mean()) == pytest.approx(share * failures.size_of(scene.new), rel=1e-3)


@pytest.mark.parametrize("share", [0.08, 0.2, 0.4])
def test_as_much_is_missing_as_it_says(scene, share, monkeypatch):
    layers = []
    monkeypatch.setattr(render.Scene, "compose", lambda self, layer, shadow: layers.append(layer) or self.plate)
    failures._missing(scene, share, np.random.default_rng(0))
    inside = scene.new[..., 3] > 0.5
    assert 1 - (layers[0][..., 3][inside] > 0.5).mean() == pytest.approx(share, abs=0.01)


def test_an_object_behind_a_larger_one_makes_no_overlay(scene, monkeypatch):
    whole = scene.new.copy()
    whole[..., 3] = 1
    hidden = render.Scene(scene.name, scene.plate, scene.old, whole, scene.old_shadow, scene.new_shadow)
    some = {"copy", *failures.BEHIND}
    monkeypatch.setattr(failures, "TABLE", {k: row for k, row in failures.TABLE.items() if k in some})
    assert {i.construction for i in failures.items(scene)} == some
    assert {i.construction for i in failures.items(hidden)} == {"copy"}


def test_no_mesh_or_photograph_is_in_two_parts():
    """Of those that verdicts see, and of those that flawed pairs are found in."""
    for names in (render.OLD, render.NEW, render.CLUTTER, render.PHOTOS):
        for others in (render.FOR_PAIRS, ("newest",)):
            every = [name for part in render.PARTS if part not in others for name in names[part]]
            assert len(every) == len(set(every))


@pytest.mark.parametrize("name", OUTCOMES)
def test_shipped_pictures_belong_together(name):
    before, after = (read(PAIRS / k / f"{name}.webp", "RGB") for k in ("before", "after"))
    output = read(PICTURES / "output" / f"{name}.webp", "RGB")
    mask = read(PAIRS / "mask" / f"{name}.png", "L")
    assert before.shape == after.shape == output.shape == (384, 384, 3) and set(np.unique(mask)) == {0.0, 1.0}
    inside = mask > 0.5
    assert change(before, after, ~inside) < CODEC < change(before, after, inside)
    assert f"| {name} |" in (PAIRS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    if OUTCOMES[name]["kind"] == "no edit":
        assert change(output, before, inside) < CODEC
    else:
        assert change(output, before, inside) > CODEC


def test_shipped_pictures_are_small_and_of_the_report_part():
    sizes = [sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) for folder in (PAIRS, PICTURES)]
    assert sizes[0] < 400_000 and sum(sizes) < 1_000_000
    assert all(o["scene"].startswith("report_") for o in OUTCOMES.values())
    assert {o["kind"] for o in OUTCOMES.values()} == set(failures.KINDS)


@pytest.mark.parametrize(
    "construction, verdict",
    [
        ("ordered dithering", "good"),
        ("outline of old drawn", "overlay"),
        ("half wiped away", "overlay"),
        ("upper half turned", "distorted"),
        ("one side darkened", "collateral change"),
        ("picture moved", "collateral change"),
    ],
)
def test_verdicts_that_were_wrong_once(scene, made, construction, verdict):
    outputs = [i for i in made if i.construction == construction and i.level in ("moderate", "-")]
    given = [torch.from_numpy(p).float() for p in (scene.before, scene.after, scene.mask)]
    assert [judge(given[0], torch.from_numpy(i.picture), *given[1:]).verdict for i in outputs] == [verdict]
