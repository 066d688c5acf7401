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
   **distorted**: what is left of x − e inside the object, forgiving small shifts; and how much the object is stretched. Where both
   are found, x − e has to be like the old object for it to be an overlay; where it surely is, it is one.
6. **unusable**: the new object has not come, and the edges outside the mask are not those of the room (noise, another scene), or
   neither object's edges are seen.
7. Where the picture moved as a whole, which is a collateral change, 3 to 6 are asked once more after it was laid back.

An edit of the whole picture (light, tone, colour, noise, style) has no object: there it is asked whether x is still s, and
whether it is near g everywhere; between the two the verdict is **undecided**, as it is wherever no failure was found but not all
could be asked. An output that is the after picture up to a codec is good, whatever the edit.

Each score is a measure on a scale on which 0.5 is the line between failure and none. The lines were fitted on one half of
a set of rendered pairs, with other meshes and backgrounds than those on which the results are reported
(``benchmarks/edit_failures``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Mapping, Optional, Sequence

import torch
from torch import Tensor

from ..masks import blur, dilate, estimate_mask, oklab
from .alignment import align, look_up
from .measures import (
    GRAIN,
    VISIBLE,
    Against,
    Crop,
    Expected,
    Whole,
    above_noise,
    changes,
    coefficient,
    coefficients,
    edges,
    edges_lost,
    filled,
    ghost,
    grain,
    in_palette,
    largest_change,
    length,
    like_old,
    likeness,
    local_share,
    norm,
    palette_of,
    progress_of,
    resized,
    shape_errors,
    share_nearer,
    slopes,
    softness,
    surroundings,
)
from .regions import find_regions
from .scores import FAILURES, GOOD, LINES, UNDECIDED, VERDICTS, beyond_codec, decide, lost, ramp, scores_of
from .sizes import check_proportions, fitting

__all__ = ["FAILURES", "GOOD", "MEASURES", "UNDECIDED", "VERDICTS", "Verdict", "judge"]

COARSE = 0.1  # of the new object's size, by which its colours are blurred
SEEN = (0.5, 0.9)  # likeness of an object's edges from which it is there
NO_SURROUNDINGS = "collateral change: the mask leaves no surroundings to compare"
LEAST_AROUND = 0.02  # share of the picture outside the mask
SMALLEST = 16  # pixels of a mask
AT_THE_EDGE = 4  # pixels around the new object within which its edges are
BESIDE = 3  # pixels around the new object that belong to it
NO_GHOST = 0.03  # share of the old object's edges
REACH = 0.12  # of the new object's size, by which it may stand out of the mask
AFAR = 0.35  # of the same, within which a change of the surroundings may be of a distorted object's making
FEWEST, MOST = 24, 256  # colours of a palette
SMOOTHED = 1.5  # pixels: 4 × 4 thresholds of a dithering add up to nothing
FEWER = 0.9  # of the before picture's pixels: an output of fewer is compared at its own sharpness
ARRIVED = 0.3  # share of the new object, or of any change, from which it can be an overlay or distorted

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
    "edges lost": "1 − share of the after picture's fine edges that the object has in their places, by that of its surroundings",
    "stretch": "ratio of the two main scalings of the object, less 1",
    "displaced": "shift of the object as a share of its size",
    "resized": "scale of the object, less 1",
    "like old": "how much of what is not as expected is the old object, 0 to 1: in colours, in edges, or as its outline",
    "background": "largest change of a neighbourhood outside the mask, in Oklab",
    "away": "the same farther off than a third of the new object's size from where it is",
    "tint": "largest change of the mean colour of a large neighbourhood there, in Oklab: grain and codecs have none",
    "codec": "the same that JPEG of quality 50 makes of the picture itself; asked where the background is over its line",
    "old seen": "likeness of the edges where the old object stood to its edges, 0 to 1, in whatever colours",
    "new seen": "likeness of the edges where the new object was found, or belongs, to its edges",
    "new colours": "likeness of the coarse colours there to the new object's, both against the room behind it",
    "room seen": "likeness of the coarse edges of the surroundings to those of the before or the after picture, 0 to 1",
}


@dataclass(frozen=True)
class Verdict:
    """What became of one edit.

    Attributes:
        verdict: one of ``VERDICTS``; undecided where no failure was found and not all could be asked.
        scores: failure → 0…1, where 0.5 and more is a failure; None where it cannot be answered.
        measures: the numbers behind it, see ``MEASURES``; None where it cannot be answered.
        unanswered: sentences on what could not be answered, and why.
        maps: "unchanged", "old object", "shape", "background" → ``[h, w]`` of the whole picture in 0…1, 1 the worst.
        mask: the edit mask that was used, ``[h, w]``.
        notes: sentences on what was done to the pictures first.
    """

    verdict: str
    scores: Mapping[str, Optional[float]]
    measures: Mapping[str, Optional[float]]
    unanswered: tuple[str, ...] = ()
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Optional[Tensor] = None
    notes: tuple[str, ...] = ()


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

    Without an after picture: no edit, collateral change, whether the old object's edges are still there, and whether the room
    is. Without a mask it is estimated from before and after; without both, nothing but no edit can be answered. Pictures of
    another size are brought to that of the before picture; of an output with fewer pixels, the others lose what it cannot show.

    Args:
        before, output, after: ``[H, W, 3]``, floating, in 0…1, of the before picture's proportions within two per cent.
        mask: ``[H, W]`` in 0…1, of the same proportions, where the edit belongs: both objects, with their shadows if possible.

    Raises:
        ValueError: shapes, dtypes, values or proportions that do not fit; a mask that is empty or a few pixels.

    >>> from ..demo.scenes import draw
    >>> pair = draw(3, "replace", "chair", "table")
    >>> judge(pair.before, pair.before, pair.after).verdict
    'no edit'
    >>> judge(pair.before, pair.after, pair.after).verdict
    'good'
    """
    _check(before, output, after, mask)
    size, notes = before.shape[:2], list[str]()
    s, x = _planes(before), fitting("output", _planes(output), size, notes)
    g = None if after is None else fitting("after", _planes(after), size, notes)
    if x.shape[-2:].numel() * FEWER > output.shape[:2].numel():  # what it cannot show is no fault of the edit
        s = resized(resized(s, output.shape[:2]), size)
        g = None if g is None else resized(resized(g, output.shape[:2]), size)
    s, g = _in_palette(_planes(output), s, x, g, notes)
    found = _judge(s, x, g, mask, output.shape[:2] != size, notes)
    return replace(found, notes=tuple(notes))


def _judge(s: Tensor, x: Tensor, g: Optional[Tensor], mask: Optional[Tensor], moved: bool, notes: list[str]) -> Verdict:
    everywhere = torch.ones_like(s[:, :1])
    region = None
    if mask is not None:
        region = fitting("mask", mask.detach().float().cpu()[None, None], s.shape[-2:], notes)
        _check_area(region)
        if surroundings(region) < LEAST_AROUND:
            region = None
            notes.append("The mask leaves no surroundings; where the edit belongs was estimated.")
    masked = region is not None
    if region is None:
        region = _estimated(s, x if g is None else g)
    s, x, g = _without_grain(s, x, g, region, notes)
    if g is None:
        if not _some(region):
            return _without_edit(Whole.of(s, x, g, everywhere))
        found = _judge_alone(Whole.of(s, x, g, region, moved), masked)
        flat = _flat(x) and not _flat(s)
    else:
        whole = Whole.of(s, x, g, region, moved)
        tone = not _some(region) or surroundings(region) < LEAST_AROUND or whole.is_tone()
        if tone and not masked:
            whole = Whole.of(s, x, g, everywhere, moved)
        assert whole.g is not None
        if whole.is_last(whole.known[0]):
            return _alike(whole)
        found = _judge_tone(whole) if tone else _moved_back(whole, _judge_by(whole))
        if length(whole.raw - whole.g).sum() < length(whole.raw - whole.s).sum() and whole.is_last(oklab(whole.raw)):
            found = _as(found, dict.fromkeys(FAILURES, 0.0), ())
        flat = _flat(x) and not _flat(s) and not _flat(g)
    return _of_one_colour(found) if flat else found


def _without_grain(
    s: Tensor, x: Tensor, g: Optional[Tensor], region: Tensor, notes: list[str]
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """All three smoothed where the output has grain that the others have not: of dithering, or of a film."""
    outside = region <= 0.5
    if not bool(outside.any()):
        outside = torch.ones_like(outside)
    if not _grainier(x, [t for t in (s, g) if t is not None], outside):
        return s, x, g
    notes.append("The output has grain that the before picture has not; all were smoothed before they were compared.")
    s, x = (_smoothed(t) for t in (s, x))
    return s, x, None if g is None else _smoothed(g)


def _smoothed(picture: Tensor) -> Tensor:
    return blur(picture, SMOOTHED, min(5, min(picture.shape[-2:]) - 1))


def _grainier(x: Tensor, known: Sequence[Tensor], outside: Tensor) -> bool:
    """Whether x has more grain than the known pictures."""
    own = grain(x, outside) ** 2
    return own > GRAIN**2 and own - max(grain(t, outside) for t in known) ** 2 > GRAIN**2


def _planes(picture: Tensor) -> Tensor:
    """``[H, W, 3]`` → ``[1, 3, H, W]`` in float32."""
    return picture.detach().float().cpu().clamp(0, 1).permute(2, 0, 1)[None]


def _in_palette(
    output: Tensor, s: Tensor, x: Tensor, g: Optional[Tensor], notes: list[str]
) -> tuple[Tensor, Optional[Tensor]]:
    """The before and the after picture in the few colours of an output that was saved with a palette, dithered as it is; as they
    are where it has many, or they too have few."""
    colours = palette_of(output, MOST)
    if colours is None or len(colours) < FEWEST:
        return s, g
    known = [t for t in (s, g) if t is not None]
    if any(palette_of(t, MOST) is not None for t in known):
        return s, g
    brought = [[in_palette(t, colours, dithered) for t in known] for dithered in (False, True)]
    nearer = [max(share_nearer(x, t, to) for t, to in zip(some, known, strict=True)) for some in brought]
    best = brought[nearer.index(max(nearer))]
    if max(nearer) < 0.5:
        return s, g  # the colours of something else
    if _grainier(x, best, torch.ones_like(x[:, :1]) > 0):
        return s, g  # dithered in another way, which keeps mean colours that the nearest ones do not
    notes.append(f"The output has {len(colours)} colours; before and after were brought to these.")
    return best[0], None if g is None else best[1]


def _estimated(s: Tensor, other: Tensor) -> Tensor:
    """Where two pictures differ, ``[1, 1, H, W]``."""
    return estimate_mask(s.permute(0, 2, 3, 1), other.permute(0, 2, 3, 1))[:, None]


def _some(region: Tensor) -> bool:
    return bool((region > 0.5).any())


def _flat(picture: Tensor) -> bool:
    # a sixteenth of the pixels deviates at most four times as much as all of them
    return all(float(t.flatten(2).std(2).max()) < line for t, line in ((picture[..., ::4, ::4], 0.04), (picture, 0.01)))


def _as(found: Verdict, scores: Mapping[str, Optional[float]], unanswered: Optional[tuple[str, ...]] = None) -> Verdict:
    """The same with other scores."""
    said = found.unanswered if unanswered is None else unanswered
    return replace(found, verdict=decide(scores, found.measures), scores=scores, unanswered=said)


def _of_one_colour(found: Verdict) -> Verdict:
    """A black or grey output shows neither object, however near its colour happens to be to one of them."""
    gone = {"no edit": 0.0, "overlay": 0.0, "unusable": 1.0}
    scores = {k: gone.get(k, v) for k, v in found.scores.items()}
    said = () if None not in scores.values() else found.unanswered
    return replace(_as(found, scores, said), maps=_without_old(found.maps))


def _without_old(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values * 0 if name == "old object" else values for name, values in maps.items()}


def _judge_by(whole: Whole) -> Verdict:
    """With the after picture."""
    crop = Crop.of(whole)
    s, x, g = crop.s, crop.x, crop.g
    assert g is not None
    lab_s, lab_x, lab_g = (blur(t, 1.0, 3) for t in (crop.known[0], crop.lab_x, crop.known[1]))
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
    against = Against.of(s, x, e)
    off, towards = against.off, against.towards
    old_left = coefficient(off, towards, old * (1 - w) * known)
    edges_s, edges_x, edges_e = against.slopes_s, against.slopes_x, against.slopes_e
    old_edges, told = ghost(edges_x - edges_e, edges_s - edges_e, old * known * (~dilate(w > 0.1, BESIDE)).float())
    old_inside = coefficients(edges_x, (edges_s, edges_e), w)[0] if placed else None
    if old_inside is not None and told and old_edges < NO_GHOST:
        old_inside = 0.5 * old_inside  # where it stood alone it is gone: a distortion may look like it inside
    likeness_to_old = like_old(x, expected, against, old, crop.mask.float() * known)
    outside = ~dilate(crop.mask, 4)
    soft = softness(edges_x, edges_e, w, outside) if placed else None
    near = (dilate(w > 0.5, AT_THE_EDGE) & crop.mask | (w > 0.5)) * known
    lost_edges = edges_lost(crop.known[0], crop.lab_x, expected.lab_picture, near, outside) if placed else None
    new_there = None
    if placed:
        # In its own place as well, where the search may have taken the old object for it; a thin one shows in its edges.
        edges_g = edges_e if expected.in_place else slopes(blur(g, 1.0, 3))
        new_there = max(
            coefficient(x - s, e - s, w),
            coefficient(x - s, g - s, new),
            coefficients(edges_x, (edges_s, edges_g), new)[1],
        )
    arrived = min(1.0, max(new_there or 0.0, 1 - unchanged) / ARRIVED)
    old_seen, new_seen, new_colours = _seen(crop, g, expected, old, placed)
    room = whole.room_seen(whole.mask)

    progress, residual = progress_of(moved, wanted, weight)
    shape_map, shape, outline, in_place = shape_errors(lab_s, lab_x, lab_g, expected, old, known, crop.mask)
    whole_size = whole.s.shape[-2:]
    # a bent object may reach beyond the mask
    reach = round(REACH * float(new.sum()) ** 0.5) if placed else 0
    for far in (reach, 0):
        also = crop.in_whole(dilate(w > 0.25, far).float() if far else w, whole_size) > 0.25
        background, background_map = whole.background(also)
        if background is not None:
            break
    tint = _tint(whole, also)
    around_new = dilate((w > 0.25) | (new > 0.25), round(AFAR * float(new.sum()) ** 0.5)).float() if placed else w
    away, _ = whole.background(crop.in_whole(around_new, whole_size) > 0.25)
    codec = _codec(background, whole)
    similarity, affine = expected.similarity, expected.affine
    measures = {
        "unchanged": unchanged, "progress": progress, "residual": residual,
        "old left": old_left, "old edges": old_edges, "old inside": old_inside, "new there": new_there,
        "shape": shape, "outline": outline, "outline in place": in_place, "soft": soft, "edges lost": lost_edges,
        "stretch": None if affine is None else affine.stretch - 1,
        "displaced": None if similarity is None else similarity.displacement,
        "resized": None if similarity is None else similarity.scale - 1,
        "like old": likeness_to_old, "background": background, "away": away, "tint": tint, "codec": codec, "old seen": old_seen, "new seen": new_seen,
        "new colours": new_colours, "room seen": room,
    }  # fmt: skip
    scores = scores_of(measures, arrived)
    if placed and (scores["no edit"] or 0.0) >= 0.5 and max(background or 0.0, 0.5 * residual) > LINES["background"][0]:
        beside = _beside(whole, crop, new)
        scores["overlay"] = max(scores["overlay"] or 0.0, beside)
        scores["no edit"] = min(scores["no edit"] or 0.0, 1 - beside)
    if (scores["no edit"] or 0.0) >= 0.5:  # the search may have taken the old object for the new one
        towards, off = blur(s - expected.plate, 1.0, 3), blur(x - expected.plate, 1.0, 3)
    old_map = local_share(off, towards, old * known).clamp(0, 1) * _old_there(measures, scores)
    unchanged_map = weight * (1 - length(moved) / length(wanted).clamp_min(0.02)).clamp(0, 1)
    maps = {
        "unchanged": crop.in_whole(unchanged_map, whole_size), "old object": crop.in_whole(old_map, whole_size),
        "shape": crop.in_whole(shape_map.clamp(0, 1), whole_size), "background": (background_map / 0.2).clamp(0, 1),
    }  # fmt: skip
    unanswered = () if background is not None else (NO_SURROUNDINGS,)
    return Verdict(
        decide(scores, measures),
        scores,
        measures,
        unanswered,
        {k: v[0, 0] for k, v in maps.items()},
        whole.full_mask[0, 0],
    )


def _moved_back(whole: Whole, found: Verdict) -> Verdict:
    """Of a picture that moved as a whole, what became of the edit is asked once more after it was laid back: what moves leaves
    something of everything."""
    of_edit = ("overlay", "distorted")
    if found.verdict not in (*of_edit, "collateral change") or (found.scores["collateral change"] or 0.0) < 0.5:
        return found
    laid = whole.laid_back() if any((found.scores[f] or 0.0) >= 0.5 for f in of_edit) else None
    if laid is None:
        return found
    again = _judge_by(laid)
    around = {name: found.measures[name] for name in ("background", "away", "tint", "codec", "room seen")}
    scores = {**found.scores, **{f: again.scores[f] for f in of_edit}}
    return _as(replace(again, measures={**again.measures, **around}), scores)


def _seen(
    crop: Crop, g: Tensor, expected: Expected, old: Tensor, placed: bool
) -> tuple[float, Optional[float], Optional[float]]:
    """(likeness to the old object where it stood, to the new one where it was found or belongs): of what they have in edges
    that the room has not; and to the new one in coarse colours, where a bent object is still like itself."""
    room, x, s = (edges(t, 2.0) for t in (expected.lab_plate, crop.lab_x, crop.known[0]))
    around = dilate(old > 0.3, 3).float()
    beside = around * (expected.object < 0.1)
    old_seen = max(abs(likeness(x - room, s - room, where)) for where in (around, beside))
    if not placed:
        return old_seen, None, None
    sigma = max(1.0, COARSE * float(expected.new.sum()) ** 0.5)
    radius = min(math.ceil(2.5 * sigma), min(crop.x.shape[-2:]) - 1)
    coarse = blur(crop.x - expected.plate, sigma, radius)
    in_edges, in_colours = [], []
    places = [(expected.picture, expected.lab_picture, expected.object), (g, crop.known[1], expected.new)]
    for picture, lab, mask in places[1:] if expected.in_place else places:
        where = dilate(mask > 0.3, 3).float()
        in_edges.append(likeness(x - room, edges(lab, 2.0) - room, where))
        in_colours.append(likeness(coarse, blur(picture - expected.plate, sigma, radius), where))
    return old_seen, max(in_edges), max(in_colours)


def _beside(whole: Whole, crop: Crop, new: Tensor) -> float:
    """Whether the new object stands elsewhere in the picture, 0 to 1 with the line at 0.5: beside the old one."""
    assert whole.g is not None
    weights = crop.in_whole(new, whole.s.shape[-2:])
    if float(weights.sum()) < SMALLEST:
        return 0.0
    lab_x, lab_g = (blur(t, 1.0, 3) for t in (whole.lab_x, whole.known[1]))
    similarity, _ = align(lab_x, lab_g, weights, farthest=max(whole.s.shape[-2:]))
    wanted, where = edges(whole.known[1], 1.0), (weights > 0.3).float()
    there, before = (likeness(edges(oklab(look_up(t, similarity)), 1.0), wanted, where) for t in (whole.x, whole.s))
    return min(ramp(there, *SEEN), 1 - ramp(before, *SEEN))  # the room may have one like it


def _old_there(m: Mapping[str, Optional[float]], scores: Mapping[str, Optional[float]]) -> float:
    """How far its map is to be shown, 0 to 1: fully where a share of the old object is over its line, not at all below half of
    it, where the map would show what happens to look like it."""
    if (scores["unusable"] or 0.0) >= 0.5:
        return 0.0
    shares = (ramp(m[name] or 0.0, *LINES[name]) for name in ("old left", "old edges", "old inside"))
    return min(1.0, max(0.0, 4 * max(*shares, scores["no edit"] or 0.0) - 1))


def _codec(background: Optional[float], whole: Whole) -> Optional[float]:
    over = background is not None and background > LINES["background"][0]
    return whole.codec_change(whole.mask) if over else None


def _tint(whole: Whole, also: Optional[Tensor] = None) -> Optional[float]:
    """On the line's scale, where that of a codec is never above the line."""
    line = LINES["tint"][0]
    tint = whole.tint(also)
    if tint is None or tint <= line:
        return tint
    mask = whole.mask if also is None else whole.mask | also
    return tint / max(1.0, (whole.codec_tint(mask) or 0.0) / line)


# ---------------------------------------------------------------------------------------------------------------------
# Edits of the whole picture, and pairs without a visible one
# ---------------------------------------------------------------------------------------------------------------------

TONE = (
    "the edit changes light, colours or style and no object, and the output is not near enough to the after picture to be called "
    "good"
)
ALIKE = "before and after show no visible difference"


def _judge_tone(whole: Whole) -> Verdict:
    """Whether the output is still the before picture, or is near the after picture everywhere."""
    s, x, g = whole.s, whole.x, whole.g
    assert g is not None
    weight = whole.mask.float()
    moved, wanted, off = (blur(t, 1.0, 3) for t in (x - s, g - s, x - g))
    unchanged = 1 - above_noise(moved, weight, ~whole.mask) / norm(wanted, weight)
    progress, residual = progress_of(moved, wanted, weight)
    whole_picture = torch.zeros_like(whole.mask)
    away, _ = largest_change(changes(whole.lab_x, whole.known[1:]), whole_picture)
    codec = whole.codec_change(whole_picture)
    room = whole.room_seen(whole.mask)
    background, background_map = whole.background()
    measures = dict.fromkeys(MEASURES)
    measures |= {"unchanged": unchanged, "progress": progress, "residual": residual, "room seen": room}
    measures |= {"background": background, "codec": codec}
    scores: dict[str, Optional[float]] = dict.fromkeys(FAILURES)
    scores |= {"no edit": ramp(unchanged, *LINES["unchanged"]), "unusable": lost(room)}
    unanswered: tuple[str, ...] = ()
    near = norm(off, weight) <= (1 - LINES["unchanged"][0]) * norm(wanted, weight)
    changed = beyond_codec(away, codec)
    if near and changed is not None and changed <= LINES["background"][0]:
        scores |= dict.fromkeys(("overlay", "distorted", "collateral change"), 0.0)
    else:
        asked = ["overlay", "distorted"]
        beyond = beyond_codec(background, codec)
        if beyond is None:
            asked.append("collateral change")
        else:
            scores["collateral change"] = ramp(beyond, *LINES["background"])
        unanswered = (f"{', '.join(asked)}: {TONE}",)
    unchanged_map = weight * (1 - length(moved) / length(wanted).clamp_min(0.02)).clamp(0, 1)
    maps = {"unchanged": unchanged_map[0, 0]}
    if background is not None:
        maps["background"] = (background_map / 0.2).clamp(0, 1)[0, 0]
    return Verdict(decide(scores, measures), scores, measures, unanswered, maps, whole.full_mask[0, 0])


def _alike(whole: Whole) -> Verdict:
    """Of a pair whose edit cannot be seen, only whether the output shows the room."""
    room = whole.room_seen(torch.zeros_like(whole.mask))
    scores = {**dict.fromkeys(FAILURES), "unusable": lost(room)}
    said = f"no edit, overlay, distorted, collateral change: {ALIKE}"
    measures = {**dict.fromkeys(MEASURES), "room seen": room}
    return Verdict(decide(scores, measures), scores, measures, (said,), {}, whole.full_mask[0, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Without an after picture
# ---------------------------------------------------------------------------------------------------------------------

WITHOUT_AFTER = "distorted: without an after picture the new object's shape is unknown"
WITHOUT_BOTH = (
    "overlay, collateral change, unusable: without a mask or an after picture what belongs to the edit is unknown"
)
# sentence → what a person can add, so that it can be answered
REMEDIES = {
    WITHOUT_AFTER: "after/ (what the outputs should have become)",
    WITHOUT_BOTH: "after/, or mask/ (white where the edit belongs)",
}


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
    tint = _tint(whole) if masked else None
    codec = _codec(background, whole)
    measures = dict.fromkeys(MEASURES)
    measures.update({"unchanged": unchanged})
    if masked:
        room = whole.room_seen(whole.mask)
        measures.update(
            {"old edges": old_edges, "background": background, "tint": tint, "codec": codec, "room seen": room}
        )
    scores = scores_of(measures, min(1.0, (1 - unchanged) / ARRIVED), "old edges, alone")
    unanswered = [WITHOUT_AFTER]
    if not masked:
        unanswered.append(WITHOUT_BOTH)
    elif background is None:
        unanswered.append(NO_SURROUNDINGS)
    unchanged_map = inside * (1 - length(moved) / 0.1).clamp(0, 1)
    old_map = local_share(slopes_x, slopes_s, core).clamp(0, 1)
    if (scores["unusable"] or 0.0) >= 0.5:
        old_map = old_map * 0
    maps = {
        "unchanged": crop.in_whole(unchanged_map, size),
        "old object": crop.in_whole(old_map, size),
        "background": (background_map / 0.2).clamp(0, 1),
    }
    if not masked:
        maps = {}
    return Verdict(
        decide(scores, measures),
        scores,
        measures,
        tuple(unanswered),
        {k: v[0, 0] for k, v in maps.items()},
        whole.full_mask[0, 0],
    )


def _without_edit(whole: Whole) -> Verdict:
    """The output shows no visible difference from the before picture anywhere."""
    scores = {**dict.fromkeys(FAILURES), "no edit": 1.0, "unusable": 0.0}
    measures = {**dict.fromkeys(MEASURES), "unchanged": 1.0}
    said = (WITHOUT_AFTER, "overlay, collateral change: the output shows no visible difference from the before picture")
    return Verdict("no edit", scores, measures, said, {}, whole.full_mask[0, 0])


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
        if not all(bool(end.isfinite()) for end in torch.aminmax(picture)):  # NaN is both
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
        check_proportions(name, picture.shape[:2], before.shape[:2])
    if min(before.shape[:2]) < 16:
        raise ValueError(f"before: expected at least 16 x 16 pixels, got {before.shape[1]} x {before.shape[0]}")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not mask.is_floating_point():
        came = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected [H, W] of floats in 0…1, got {came}")
    check_proportions("mask", mask.shape, before.shape[:2])


def _check_area(region: Tensor) -> None:
    area = int((region > 0.5).sum())
    if area < SMALLEST:
        raise ValueError(f"mask: expected at least {SMALLEST} pixels above one half, got {area}")
