"""From numbers to findings: every kind with its severity and advice, and the limits from which it is told.

28 rendered and 30 drawn pairs get no error and no warning, nor do they as JPEG of quality 95, 60 and 30.
Of the 58 before/after pictures of one shape that come with ComfyUI's templates, five get one: three are frames of a moving
camera, one is enlarged by 2 %, one was drawn after a control picture.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from ..models.registry import MODELS
from ..pairs.files import KINDS as REFUSED
from ..pairs.geometry import Size, same_proportions, times
from .measures import Coverage, Movement, PairMeasures

SEVERITIES = ("error", "warning", "note")
SHIFT = (
    0.5  # pixels by which a corner moves; in pictures above 1024 as much of 1024, since they are trained at about that
)
ZOOM, ROTATION, STRETCH = 0.3, 0.1, 0.3  # per cent, degrees, per cent
LATENT = 8.0  # pixels, in pictures above 1024 of 1024: a movement by a latent or more is an error
AGREEMENT = 0.3  # share of agreeing blocks from which a movement is told
CERTAIN = 4.0  # standard errors
REPAINTED = 0.1  # share of agreeing blocks below which nothing of the background is left
TINY = 5e-4  # share of the picture: a smaller change is hardly an edit
UNCOVERED, ELSEWHERE = 0.1, 0.8  # share of the change outside the mask
MASK_PIXELS, MASK_SHARE = 64, 2e-4
TONE = 0.02  # Oklab, just visible
DETAIL = 0.7  # ratio of fine detail
BLOCKS = 0.3
LONG = 400  # letters

_VERBS = re.compile(
    r"\b(add|apply|blur|brighten|chang|clean|colou?r|convert|crop|cut|darken|delet|draw|edit|enhanc|eras|exchang|extend|fill|fix|"
    r"giv|hang|insert|keep|lower|mak|mov|open|paint|plac|put|rais|recolou?r|relight|remov|render|repaint|replac|restor|restyl|"
    r"rotat|set|sharpen|show|straighten|substitut|swap|switch|tak|transform|translat|turn|unblur|us|wear|writ)(e|es|ed|ing|ise|ize)?s?\b",
    re.IGNORECASE,
)  # fmt: skip
_PLACEHOLDER = re.compile(r"\[(trigger|name|filewords|concept)\]", re.IGNORECASE)


class Kind(NamedTuple):
    """How bad a finding is, what it is called, and what to do."""

    severity: str
    title: str
    advice: str


KINDS: dict[str, Kind] = {
    **{kind: Kind("error", kind, advice) for kind, advice in REFUSED.items()},
    "flat": Kind("error", "one flat colour", "often a failed export; make the picture again"),
    "size swapped": Kind("error", "width and height swapped", "export one side again, so that both have the same width and height"),
    "turned": Kind("error", "mirrored or turned", "turn one of the two pictures back"),
    "wrong partner": Kind("error", "after picture of another pair", "rename the files, so that each before meets its own after"),
    "reversed": Kind("error", "the same pair both ways", "one of the two is swapped; keep the one that shows the edit"),
    "swapped": Kind("warning", "before and after perhaps swapped", "look at the picture; if the one on the right is where the edit should start, exchange the two files"),
    "overlaid": Kind("warning", "the old object is still there", "take the old object out of the after picture, or leave the pair out: it teaches overlays"),
    "tiny edit": Kind("warning", "hardly any edit", "see whether the edit was saved; if it is meant to be this small, give it a mask, so that it is not drowned"),
    "shift": Kind("warning", "shifted", "move the after picture back and crop both alike, or the shift is learned with the edit"),
    "zoom": Kind("warning", "zoomed", "scale the after picture back and crop both alike. Editors zoom where a size does not suit them: make pairs at multiples of 16"),
    "rotation": Kind("warning", "rotated", "turn the after picture back and crop both alike"),
    "stretch": Kind("warning", "stretched", "resize the after picture to its old proportions; look for a resize that ignores them"),
    "mask inverted": Kind("error", "mask inverted", "invert the mask: white is where the picture changes"),
    "mask elsewhere": Kind("error", "no change inside the mask", "give it the mask of this pair, or leave the mask out: it is estimated then"),
    "mask short": Kind("warning", "mask does not cover the change", "enlarge the mask, or mend what else changed in the after picture"),
    "mask tiny": Kind("warning", "mask of a few pixels", "paint the whole region, or leave the mask out: it is estimated then"),
    "mask large": Kind("note", "mask much larger than the change", "fine if it is meant; a closer mask gives the edit more weight"),
    "duplicate pair": Kind("warning", "the same pair twice", "keep one of them, or it weighs double"),
    "same before": Kind("warning", "one before picture, different after pictures", "keep the better target, or let the captions say how they differ"),
    "same after": Kind("note", "one after picture, different before pictures", "fine if it is meant; else one of them has the wrong after picture"),
    "leak": Kind("warning", "also in the other set", "take it out of one of the two, or validation measures memory"),
    "background": Kind("note", "background repainted", "fine for edits of the whole picture; else the model learns to repaint what should stay"),
    "all over": Kind("note", "a difference all over", "fine for edits of the whole picture (noise, blur, light); else nothing was edited: leave the pair out"),
    "sizes": Kind("note", "before and after differ in size", "both are resized to one size; what was enlarged stays softer"),
    "tone": Kind("note", "another brightness or colour", "match the tones outside the edit to the before picture's"),
    "softness": Kind("note", "another sharpness", "outside the edit, paste the before picture over the after picture"),
    "compression": Kind("note", "another compression", "save both sides without loss, from the originals"),
    "caption unread": Kind("warning", "caption that a text encoder cannot read", "write it in English: letters that a text encoder does not know are all the same to it"),
    "caption long": Kind("note", "long caption", "CLIP reads 77 tokens: say first what to change"),
    "caption placeholder": Kind("note", "caption with a placeholder", "only the trainer that it was written for replaces it; write the word itself"),
    "caption no verb": Kind("note", "caption without an instruction", "say what to do (“replace the chair with …”), as you will ask for it later"),
}  # fmt: skip


class Found(NamedTuple):
    """What one pair gives rise to: ``parts`` of "before", "after", "mask" and "caption" that it is about; a severity
    other than the kind's, or ""."""

    kind: str
    parts: tuple[str, ...]
    detail: str
    severity: str = ""


BOTH = ("before", "after")


def of_pair(v: PairMeasures) -> list[Found]:
    """What the measures of a pair say."""
    flat = [Found("flat", (part,), "all of its pixels are alike") for part in v.flat]
    sizes = v.before_size[::-1], v.after_size[::-1]
    if not same_proportions(*sizes):
        if same_proportions(sizes[0], sizes[1][::-1]):
            flat.append(Found("size swapped", BOTH, f"{times(sizes[0])} and {times(sizes[1])}; {v.fit}"))
        return flat
    if flat:
        return flat
    if v.turned:
        return [Found("turned", BOTH, f"the after picture is {v.turned}")]
    moved = _movement(v.movement, max(sizes[0]))
    if v.changed_share == 0 and v.tone > TONE:
        return [*moved, *_tone(v, "nothing else changes")]
    if v.changed_share < TINY and v.differ == "all over" and not moved:
        return [
            Found("all over", BOTH, "they differ by more than a copy that was saved again, and no region stands out")
        ]
    if v.changed_share == 0 and (moved or not v.differ):
        taken = ", once the movement is taken out" if moved else ""
        return [*moved, Found("no edit", BOTH, f"nothing differs by more than {v.noise:.3f} in Oklab{taken}")]
    found = [*moved, *_background(v, sizes)]
    if v.changed_share < TINY:
        found.append(Found("tiny edit", BOTH, f"{v.changed_share:.3%} of the picture changes"))
    return found + ([] if v.mask is None else _mask(v.mask, v.changed_share))


def of_caption(caption: str) -> list[Found]:
    """What the words of an instruction say. Of captions in other scripts only the length is looked at."""
    found = []
    if len(caption) > LONG:
        found.append(Found("caption long", ("caption",), f"{len(caption)} letters"))
    bracket = _PLACEHOLDER.search(caption)
    if bracket:
        found.append(Found("caption placeholder", ("caption",), f"it has “{bracket[0]}”"))
    if caption and caption.isascii() and not _VERBS.search(caption):
        found.append(
            Found(
                "caption no verb", ("caption",), f"“{caption[:60]}{'…' if len(caption) > 60 else ''}” names no change"
            )
        )
    return found


def of_letters(caption: str) -> list[Found]:
    """Which of the edit models has a text encoder that does not know the letters of a caption, or most of them."""
    found = []
    for model in MODELS:
        unknown, letters = model.unknown(caption)
        if 2 * unknown > letters:
            detail = f"the text encoder of {model.title} does not know {unknown} of its {letters} letters"
            found.append(Found("caption unread", ("caption",), detail))
    return found


def _movement(m: Movement, long: int) -> list[Found]:
    """The largest of shift, zoom, rotation and stretch, by how far it moves a corner; its words name the others too."""
    scale = max(1.0, long / 1024)
    if not m.registered or m.agreement < AGREEMENT:
        return []
    if m.moved < max(SHIFT * scale, CERTAIN * (m.moved_sd or 0.0)):
        return []
    x, y, zoom, turn, wide = m.shift_x, m.shift_y, m.zoom, m.rotation, m.stretch
    # kind → (how far the corners move, the least that is told, words); corners lie 0.6 long sides from the middle
    parts = {
        "shift": (math.hypot(x, y), SHIFT * scale, _way(x, "right", "left") + _way(y, "down", "up")),
        "zoom": (abs(zoom) / 100 * 0.6 * long, ZOOM / 100 * 0.6 * long, [f"{abs(zoom):.1f} % {'larger' if zoom > 0 else 'smaller'}"]),
        "rotation": (
            math.radians(abs(turn)) * 0.6 * long, math.radians(ROTATION) * 0.6 * long,
            [f"turned by {abs(turn):.1f}° {'clockwise' if turn > 0 else 'anticlockwise'}"],
        ),
        "stretch": (abs(wide) / 100 * 0.3 * long, STRETCH / 100 * 0.3 * long, [f"{abs(wide):.1f} % {'wider' if wide > 0 else 'narrower'} for its height"]),
    }  # fmt: skip
    told = sorted((k for k, (size, least, _) in parts.items() if size >= least), key=lambda k: -parts[k][0])
    if not told:
        return []
    words = ", ".join(part for kind in told for part in parts[kind][2])
    severity = "error" if m.moved >= LATENT * scale else "warning"
    return [Found(told[0], ("after",), f"the background is {words}; corners move by up to {m.moved:.1f} px", severity)]


def _way(pixels: float, positive: str, negative: str) -> list[str]:
    return [f"{abs(pixels):.1f} px {positive if pixels > 0 else negative}"] if abs(pixels) >= 0.05 else []


def _background(v: PairMeasures, sizes: tuple[Size, Size]) -> list[Found]:
    found = []
    if sizes[0] != sizes[1]:
        found.append(Found("sizes", BOTH, f"{times(sizes[0])} and {times(sizes[1])}"))
    if not v.movement.registered:
        if v.movement.agreement < REPAINTED and v.movement.asked:
            share = f"{v.movement.agreement:.0%} of the blocks with detail are the same before and after"
            found.append(Found("background", BOTH, share))
        return found
    found += _tone(v, "measured outside the edit")
    if v.texture is None:
        return found
    ratio, blocks = v.texture.detail_ratio, v.texture.blocks
    if ratio is not None and not DETAIL < ratio < 1 / DETAIL:
        found.append(
            Found("softness", BOTH, f"outside the edit the after picture has {ratio:.2f} times the fine detail")
        )
    if min(sizes[0]) >= 192 and max(blocks) - min(blocks) > BLOCKS and max(blocks) > 3 * min(blocks):
        side = BOTH[int(blocks[1] > blocks[0])]
        found.append(
            Found("compression", (side,), f"JPEG's blocks show in the {side} picture: {max(blocks):.1f}, in the other {min(blocks):.1f}")
        )  # fmt: skip
    return found


def _tone(v: PairMeasures, where: str) -> list[Found]:
    if v.tone <= TONE:
        return []
    light = v.brightness
    way = "brighter" if light > 0.01 else "darker" if light < -0.01 else "of another colour or contrast"
    return [
        Found(
            "tone",
            BOTH,
            f"the after picture is {way}, by {v.tone:.3f} in Oklab, where {TONE} is just visible; {where}",
        )
    ]


def _mask(mask: Coverage, changed: float) -> list[Found]:
    outside, inside, share = mask.uncovered, mask.changed, mask.share
    if mask.pixels < MASK_PIXELS or share < MASK_SHARE:
        return [Found("mask tiny", ("mask",), f"{mask.pixels} pixels are white")]
    if outside > ELSEWHERE and mask.border > 0.6:
        return [
            Found(
                "mask inverted",
                ("mask",),
                f"{outside:.0%} of the change lies in its black part, and its border is white",
            )
        ]
    if outside > ELSEWHERE and inside < 0.02:
        return [
            Found(
                "mask elsewhere",
                ("mask",),
                f"{outside:.0%} of the change lies outside; {inside:.0%} of the inside changes",
            )
        ]
    if outside > UNCOVERED:
        return [
            Found(
                "mask short", ("mask",), f"{outside:.0%} of the change lies outside", "error" if outside > 0.5 else ""
            )
        ]
    if share > 0.1 and share > 5 * changed + 0.05:
        return [Found("mask large", ("mask",), f"it covers {share:.0%} of the picture, of which {changed:.1%} changes")]
    return []
