"""Which failure is it? A verdict on an edit from pixels and geometry, without any encoder.

Pictures: s the before picture, x the output, g the after picture, b the background behind the objects. What is measured, in
this order (``MEASURES`` has a line for each number):

1. The output's colours are brought to those of the before picture (or the after picture, if that is nearer) by a gain and
   an offset per channel, fitted outside the mask, and a shift by a pixel is taken back: a brighter picture is no failure.
2. **collateral change**: what moved outside the mask, by a distance that forgives a shift by a pixel.
3. Inside the mask each pixel belongs to the old object, to the new one, to both or to none: in which of s and g does it look
   like the surroundings? (:mod:`.regions`)
4. The new object is looked for in the output under shifts, turns and scalings (:mod:`.alignment`), so that a displaced object
   is not called a distorted one. What the output should be is then e: the background with the object where it was found.
5. **no edit**: how near x is to s; or the old object is there, redrawn, and nothing of the new one. **overlay**: the
   least-squares share α of x ≈ e + α (s − e) where the old object was: in colours; in the edges beside the new object, where
   |α| counts, since a ghost may be lighter or darker than what it is the ghost of; and in the edges inside the new object.
   **distorted**: what is left of x − e inside the object, forgiving small shifts; and how much the object is stretched.

Each score is a measure on a scale on which 0.5 is the line between failure and none. The lines were fitted on one half of
a set of rendered pairs, with other meshes and backgrounds than those on which the results are reported
(``benchmarks/edit_failures``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Mapping, Optional

import torch
from torch import Tensor

from ..masks import blur, dilate, estimate_mask, oklab
from .measures import (
    VISIBLE,
    Crop,
    Expected,
    Whole,
    above_noise,
    codec_change,
    coefficient,
    coefficients,
    filled,
    ghost,
    length,
    local_share,
    norm,
    progress_of,
    shape_errors,
    slopes,
    softness,
)
from .regions import find_regions

__all__ = ["FAILURES", "MEASURES", "VERDICTS", "Verdict", "judge"]

VERDICTS = ("good", "no edit", "overlay", "distorted", "collateral change")
FAILURES = VERDICTS[1:]

MEASURES = {
    "unchanged": "1 − ‖x − s‖ / ‖g − s‖ where s and g differ: 1 for a copy of the before picture",
    "progress": "⟨x − s, g − s⟩ / ‖g − s‖²: how far from before to after, 0 to 1",
    "residual": "what of x − s is at right angles to g − s, over ‖g − s‖",
    "old left": "share of the old object's colours that is left where it stood",
    "old edges": "share of the old object's edges that is left beside the new object, as they were or reversed",
    "old inside": "share of the old object's edges that shows inside the new object",
    "new there": "share of the new object's colours that has come, where it was found or where it belongs, or of its edges",
    "shape": "what differs from the after picture's object, aligned, in the worst part of it; 1 is its contrast",
    "outline": "1 − intersection over union of the object's outline with the after picture's, aligned",
    "outline in place": "the same before the alignment: a displaced object has much here and little above",
    "soft": "1 − share of the strength of the after picture's edges that the object has, by that of its surroundings",
    "stretch": "ratio of the two main scalings of the object, less 1",
    "displaced": "shift of the object as a share of its size",
    "resized": "scale of the object, less 1",
    "background": "largest change of a neighbourhood outside the mask, in Oklab",
    "codec": "the same that JPEG of quality 50 makes of the picture itself; asked where the background is over its line",
}


@dataclass(frozen=True)
class Verdict:
    """What became of one edit.

    Attributes:
        verdict: one of ``VERDICTS``.
        scores: failure → 0…1, where 0.5 and more is a failure; None where it cannot be answered.
        measures: the numbers behind it, see ``MEASURES``; None where it cannot be answered.
        unanswered: sentences on what could not be answered, and why.
        maps: "unchanged", "old object", "shape", "background" → ``[h, w]`` of the whole picture in 0…1, 1 the worst.
        mask: the edit mask that was used, ``[h, w]``.
    """

    verdict: str
    scores: Mapping[str, Optional[float]]
    measures: Mapping[str, Optional[float]]
    unanswered: tuple[str, ...] = ()
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Optional[Tensor] = None


class _JudgesAtWork:
    """Threads of this process that judge now, and how many threads torch had before the first of them."""

    def __init__(self) -> None:
        self.lock, self.at_work, self.threads = Lock(), 0, 1


_JUDGES = _JudgesAtWork()


@contextmanager
def one_thread() -> Iterator[None]:
    """The many small tensors of a verdict gain nothing from several threads, and on a busy machine lose: at 128 × 128 pixels a
    picture took 4 s of two cores that others used as well, and 0.5 s of one.

    The number is the whole process': judges in several threads give back what was there before any of them."""
    with _JUDGES.lock:
        if not _JUDGES.at_work:
            _JUDGES.threads = torch.get_num_threads()
        _JUDGES.at_work += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _JUDGES.lock:
            _JUDGES.at_work -= 1
            torch.set_num_threads(_JUDGES.threads)  # those before the first of them, whoever is the last


@torch.no_grad()
@one_thread()
def judge(before: Tensor, output: Tensor, after: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Verdict:
    """The verdict on one output.

    Without an after picture: no edit, collateral change, and whether the old object's edges are still there. Without a mask
    it is estimated from before and after; without both, nothing but no edit can be answered.

    Args:
        before, output, after: ``[H, W, 3]``, floating, in 0…1, of one size.
        mask: ``[H, W]`` in 0…1, where the edit belongs: both objects, with their shadows if possible.

    Raises:
        ValueError: shapes, dtypes, values or sizes that do not fit; a mask that is empty or a few pixels; before and after
            without a visible difference.

    >>> from ..demo.scenes import draw
    >>> pair = draw(3, "replace", "chair", "table")
    >>> judge(pair.before, pair.before, pair.after).verdict
    'no edit'
    >>> judge(pair.before, pair.after, pair.after).verdict
    'good'
    """
    _check(before, output, after, mask)
    s, x = _planes(before), _planes(output)
    g = None if after is None else _planes(after)
    if mask is not None:
        region = mask.detach().float().cpu()[None, None]
    else:
        other = output if after is None else after
        region = estimate_mask(before.float().cpu()[None], other.float().cpu()[None])[:, None]
    whole = Whole.of(s, x, g, region)
    if not bool((region > 0.5).any()):  # no mask was given
        if after is not None:
            raise ValueError("after: expected a visible difference from before, got none; is it the before picture?")
        return _without_edit(whole, "no mask and no after picture: what belongs to the edit is unknown")
    found = _judge_alone(whole, mask is not None) if after is None else _judge_by(whole)
    return _of_one_colour(found) if _flat(output) and not _flat(before) else found


def _planes(picture: Tensor) -> Tensor:
    """``[H, W, 3]`` → ``[1, 3, H, W]`` in float32."""
    return picture.detach().float().cpu().clamp(0, 1).permute(2, 0, 1)[None]


def _flat(picture: Tensor) -> bool:
    return float(picture.float().flatten(0, 1).std(0).max()) < 0.01


def _of_one_colour(found: Verdict) -> Verdict:
    """A black or grey output shows neither object, however near its colour happens to be to one of them."""
    scores = {k: v if v is None or k in ("distorted", "collateral change") else 0.0 for k, v in found.scores.items()}
    return replace(found, verdict=_decide(scores), scores=scores)


def _judge_by(whole: Whole) -> Verdict:
    """With the after picture."""
    crop, full_g = Crop.of(whole), whole.pictures[2]
    s, x, g = crop.s, crop.x, crop.g
    assert g is not None and whole.g is not None and full_g is not None
    lab_s, lab_x, lab_g = (blur(oklab(t), 1.0, 3) for t in (s, x, g))
    regions = find_regions(lab_s, lab_g, crop.mask)
    changed = crop.mask & (length(lab_g - lab_s) > VISIBLE)
    old, new = regions.old * crop.mask, regions.new * crop.mask
    placed = float(new.sum()) > max(60.0, 0.08 * float(old.sum()))
    expected = Expected.of(crop, g, lab_x, lab_g, old, new, placed)
    e, w = expected.picture, expected.object
    new = expected.new
    known = (~dilate((old > 0.3) & (new > 0.3) & (w < 0.5), 1)).float()  # elsewhere neither s nor g shows the room

    weight = changed.float()
    moved, wanted = blur(x - s, 1.0, 3), blur(g - s, 1.0, 3)
    unchanged = 1 - above_noise(moved, weight, ~crop.mask) / norm(wanted, weight)
    towards, off = blur(s - e, 1.0, 3), blur(x - e, 1.0, 3)
    old_left = coefficient(off, towards, old * (1 - w) * known)
    edges_s, edges_x, edges_e = (slopes(blur(t, 1.0, 3)) for t in (s, x, e))
    old_edges, told = ghost(edges_x - edges_e, edges_s - edges_e, old * known * (~dilate(w > 0.1, BESIDE)).float())
    old_inside = coefficients(edges_x, (edges_s, edges_e), w)[0] if placed else None
    if old_inside is not None and told and old_edges < NO_GHOST:
        old_inside = 0.5 * old_inside  # where it stood alone it is gone: a distortion may look like it inside
    soft = softness(edges_x, edges_e, w, ~dilate(crop.mask, 4)) if placed else None
    new_there = None
    if placed:
        # In its own place as well, where the search may have taken the old object for it; a thin one shows in its edges.
        edges_g = slopes(blur(g, 1.0, 3))
        new_there = max(
            coefficient(x - s, e - s, w),
            coefficient(x - s, g - s, new),
            coefficients(edges_x, (edges_s, edges_g), new)[1],
        )
    arrived = min(1.0, max(new_there or 0.0, 1 - unchanged) / ARRIVED)

    progress, residual = progress_of(moved, wanted, weight)
    shape_map, shape, outline, in_place = shape_errors(lab_x, lab_g, expected, old, known)
    whole_size = whole.s.shape[-2:]
    also = crop.in_whole(w, whole_size) > 0.25
    background, background_map = whole.background(also)
    codec = _codec(background, full_g, whole.g, whole.mask)
    similarity, affine = expected.similarity, expected.affine
    measures = {
        "unchanged": unchanged, "progress": progress, "residual": residual,
        "old left": old_left, "old edges": old_edges, "old inside": old_inside, "new there": new_there,
        "shape": shape, "outline": outline, "outline in place": in_place, "soft": soft,
        "stretch": None if affine is None else affine.stretch - 1,
        "displaced": None if similarity is None else similarity.displacement,
        "resized": None if similarity is None else similarity.scale - 1,
        "background": background, "codec": codec,
    }  # fmt: skip
    scores = _scores(measures, arrived)
    old_map = (local_share(off, towards, old * known)).clamp(0, 1)
    unchanged_map = weight * (1 - length(moved) / length(wanted).clamp_min(0.02)).clamp(0, 1)
    maps = {
        "unchanged": crop.in_whole(unchanged_map, whole_size), "old object": crop.in_whole(old_map, whole_size),
        "shape": crop.in_whole(shape_map.clamp(0, 1), whole_size), "background": (background_map / 0.2).clamp(0, 1),
    }  # fmt: skip
    unanswered = () if background is not None else ("collateral change: the mask leaves no surroundings to compare",)
    return Verdict(
        _decide(scores), scores, measures, unanswered, {k: v[0, 0] for k, v in maps.items()}, whole.full_mask[0, 0]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Without an after picture
# ---------------------------------------------------------------------------------------------------------------------

WITHOUT_AFTER = "distorted: without an after picture the new object's shape is unknown"


def _judge_alone(whole: Whole, masked: bool) -> Verdict:
    crop = Crop.of(whole)
    size = whole.s.shape[-2:]
    inside = crop.mask.float()
    around = filled(crop.s, 1 - dilate(crop.mask, 2).float())
    s, x = crop.s, crop.x
    contrast = max(norm(s - around, inside), 0.05 * float(inside.sum() * 3) ** 0.5)
    moved = blur(x - s, 1.0, 3)
    unchanged = 1 - above_noise(moved, inside, ~crop.mask) / contrast
    core = (~dilate(~crop.mask, 3)).float()
    if float(core.sum()) < 30:  # a thin mask
        core = inside
    slopes_s, slopes_x = (slopes(blur(t, 1.0, 3)) for t in (s, x))
    old_edges = coefficient(slopes_x, slopes_s, core)
    background, background_map = whole.background() if masked else (None, torch.zeros(1, 1, *size))
    codec = _codec(background, whole.pictures[0], whole.s, whole.mask)
    measures = dict.fromkeys(MEASURES)
    measures.update({"unchanged": unchanged, "old edges": old_edges, "background": background, "codec": codec})
    if not masked:
        measures["old edges"] = None
    scores = _scores(measures, min(1.0, (1 - unchanged) / ARRIVED), "old edges, alone")
    unanswered = [WITHOUT_AFTER]
    if not masked:
        unanswered += [
            "overlay, collateral change: without a mask or an after picture what belongs to the edit is unknown"
        ]
    elif background is None:
        unanswered.append("collateral change: the mask leaves no surroundings to compare")
    unchanged_map = inside * (1 - length(moved) / 0.1).clamp(0, 1)
    old_map = local_share(slopes_x, slopes_s, core).clamp(0, 1)
    maps = {
        "unchanged": crop.in_whole(unchanged_map, size),
        "old object": crop.in_whole(old_map, size),
        "background": (background_map / 0.2).clamp(0, 1),
    }
    if not masked:
        maps = {}
    return Verdict(
        _decide(scores),
        scores,
        measures,
        tuple(unanswered),
        {k: v[0, 0] for k, v in maps.items()},
        whole.full_mask[0, 0],
    )


def _without_edit(whole: Whole, why: str) -> Verdict:
    """The output shows no visible difference from the before picture anywhere."""
    scores = {"no edit": 1.0, "overlay": None, "distorted": None, "collateral change": None}
    measures = {**dict.fromkeys(MEASURES), "unchanged": 1.0}
    return Verdict(
        "no edit", scores, measures, (f"overlay, distorted, collateral change: {why}",), {}, whole.full_mask[0, 0]
    )


# ---------------------------------------------------------------------------------------------------------------------
# From measures to scores
# ---------------------------------------------------------------------------------------------------------------------

# measure → (line, full): the score is 0.5 on the line and 1 at full
LINES = {
    "unchanged": (0.8, 1.0),
    "old left": (0.15, 0.6),
    "old edges": (0.08, 0.4),
    "old inside": (0.1, 0.5),
    "old edges, alone": (0.45, 0.9),  # without an after picture, where edges of the room that go on count as well
    "shape": (0.4, 1.0),
    "outline": (0.3, 0.6),
    "soft": (0.22, 0.7),
    "stretch": (0.12, 0.5),
    "background": (0.05, 0.3),
}
SMALLEST = 16  # pixels of a mask
BESIDE = 3  # pixels around the new object that belong to it
NO_GHOST = 0.03  # share of the old object's edges
PRESENT = (0.35, 0.9)  # line and full, as above: share of the old object from which it is there
ABSENT = (0.2, 0.5)  # share of the new object below which it is not there, and from which it surely is
ARRIVED = 0.3  # share of the new object, or of any change, from which it can be an overlay or distorted


def _ramp(value: float, line: float, full: float) -> float:
    """0 at 0 and below, 0.5 on the line, 1 at full and above; straight between them."""
    return min(1.0, 0.5 * max(0.0, value) / line if value <= line else 0.5 + 0.5 * (value - line) / (full - line))


def _scores(m: Mapping[str, Optional[float]], arrived: float, edges: str = "old edges") -> dict[str, Optional[float]]:
    def ramp(name: str, value: Optional[float]) -> Optional[float]:
        return None if value is None else _ramp(value, *LINES[name])

    def worst(*values: Optional[float]) -> Optional[float]:
        known = [v for v in values if v is not None]
        return arrived * max(known) if known else None

    return {
        "no edit": max(ramp("unchanged", m["unchanged"]) or 0.0, _redrawn(m)),
        "overlay": worst(
            ramp("old left", m["old left"]), ramp(edges, m["old edges"]), ramp("old inside", m["old inside"])
        ),
        "distorted": worst(
            ramp("shape", m["shape"]),
            ramp("outline", m["outline"]),
            ramp("soft", m["soft"]),
            ramp("stretch", m["stretch"]),
        ),
        "collateral change": ramp("background", _beyond_codec(m["background"], m["codec"])),
    }


def _redrawn(m: Mapping[str, Optional[float]]) -> float:
    """The old object is there, if not pixel by pixel, and the new one is not."""
    left, edges, new = m["old left"], m["old edges"], m["new there"]
    if left is None or edges is None or new is None:
        return 0.0
    return min(_ramp(max(left, edges), *PRESENT), 1 - _ramp(new, *ABSENT))


def _codec(background: Optional[float], picture: Tensor, small: Tensor, mask: Tensor) -> Optional[float]:
    over = background is not None and background > LINES["background"][0]
    return codec_change(picture, small, mask) if over else None


def _beyond_codec(background: Optional[float], codec: Optional[float]) -> Optional[float]:
    """The change on the line's scale, where that of a codec is never above the line."""
    if background is None or codec is None:
        return background
    return background / max(1.0, codec / LINES["background"][0])


def _decide(scores: Mapping[str, Optional[float]]) -> str:
    return next((failure for failure in FAILURES if (scores[failure] or 0.0) >= 0.5), "good")


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and checks
# ---------------------------------------------------------------------------------------------------------------------


def _check(before: Tensor, output: Tensor, after: Optional[Tensor], mask: Optional[Tensor]) -> None:
    for name, picture in (("before", before), ("output", output), ("after", after)):
        if picture is None:
            continue
        if (
            not isinstance(picture, Tensor)
            or picture.ndim != 3
            or picture.shape[-1] != 3
            or not picture.is_floating_point()
        ):
            came = f"{picture.dtype} {list(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
            raise ValueError(f"{name}: expected a picture [H, W, 3] of floats in 0…1, got {came}")
        if not bool(picture.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
        if picture.shape != before.shape:
            sizes = [f"{p.shape[1]} x {p.shape[0]}" for p in (before, picture)]
            raise ValueError(f"{name}: expected {sizes[0]} pixels like the before picture, got {sizes[1]}")
    if min(before.shape[:2]) < 16:
        raise ValueError(f"before: expected at least 16 x 16 pixels, got {before.shape[1]} x {before.shape[0]}")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not mask.is_floating_point():
        came = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected [H, W] of floats in 0…1, got {came}")
    if mask.shape != before.shape[:2]:
        raise ValueError(
            f"mask: expected {before.shape[1]} x {before.shape[0]} pixels like the before picture, got {mask.shape[1]} x {mask.shape[0]}"
        )
    area = int((mask > 0.5).sum())
    if area < SMALLEST:
        raise ValueError(f"mask: expected at least {SMALLEST} pixels above one half, got {area}")


GOOD = VERDICTS[0]
