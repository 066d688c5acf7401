"""Which encoder would have noticed? How far each one's distance tells failures from harmless changes, and what margin it allows.

For each pair, each encoder embeds the after picture (gt), harmless copies of it (JPEG, blur, brightness, one pixel), and
failures made from the pair: the before picture, overlays, misshapen copies. An encoder is fit for a loss if d(failure, gt)
exceeds d(harmless, gt), with the distance and the edit mask that the loss itself uses.
"""

from __future__ import annotations

import math
from typing import Callable, Mapping, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import losses
from ..checks import check_whole
from ..drawing.statistics import grouped_auroc, quantile
from ..embeddings import EmbeddingSet
from ..encoders.base import Encoder, EncoderInfo, PixelEncoder, Preprocess
from ..encoders.timm_net import TimmEncoder
from ..hashing import hash_tensors
from ..objective import TERMS
from ..pairs import MULTIPLE, PairSet
from ..progress import Progress
from .examples import Examples, make_examples
from .result import BASELINE, AuditRow, EncoderAudit, Recommendation, count_of, interval, short

MOST_LAYERS = 6  # of one encoder; each costs a pass
AT_ONCE = 8  # pairs whose pictures are in memory together, so that encoders change places on a device less often
FEW_PAIRS = 12  # 10 is the least for which the interval of an AUROC of 1 lies above SEES
DIGITS = 2  # of a margin, significant ones

# failure → the loss against it, by the table of terms
TERM_OF = {kind.failure: name for name, kind in TERMS.items() if kind.failure}


def audit_encoders(
    pairs: PairSet,
    encoders: Mapping[str, Encoder],
    *,
    layers: bool = True,
    crop: int = 512,
    max_pairs: int = 24,
    batch_size: int = 4,
    progress: Optional[Progress] = None,
    check: Callable[[], None] = lambda: None,
) -> EncoderAudit:
    """How well encoders tell failures from harmless changes on these pairs, and which margin each loss can use.

    Args:
        pairs: a dozen or more, or intervals are wide; masks that are missing are estimated.
        encoders: name → encoder, at least one. The means of 8 × 8 pixels are judged beside them.
        layers: judge up to six layers of every timm encoder of grids or tokens, and not only the one it was made for.
        crop: largest side of the window around the edit that encoders see, in pixels, a multiple of 16, as in training; 0
            for whole pictures.
        max_pairs: at most so many, evenly spaced; their number times that of encoders and layers is the work.
        batch_size: pictures per pass.
        progress: called with (done, total) steps; a step is one pair in one encoder or layer.
        check: called between steps; raises to stop.

    Returns:
        An :class:`EncoderAudit`. Pairs that cannot be used are left out and named in its notes.

    Raises:
        ValueError: no encoder, a wrong setting, or not one usable pair, with the reasons.
    """
    _check_arguments(pairs, encoders, crop, max_pairs, batch_size)
    subjects = [
        _Subject(name, layer, at_layer)
        for name, encoder in encoders.items()
        for layer, at_layer in (_at_layers(encoder) if layers else {None: encoder}).items()
    ]
    subjects.append(_Subject(BASELINE, None, PixelMeans()))
    count = min(max_pairs, len(pairs))
    chosen = [i * len(pairs) // count for i in range(count)]
    found: dict[int, list[_Distances]] = {i: [] for i in range(len(subjects))}
    notes: list[str] = []
    example, used, done, total = None, 0, 0, count * len(subjects)
    for start in range(0, count, AT_ONCE):
        ready: list[Examples] = []
        for index in chosen[start : start + AT_ONCE]:
            check()
            try:
                ready.append(make_examples(pairs, index, crop))
                notes += [f"{pairs[index].name}: {note}" for note in ready[-1].notes]
            except ValueError as error:
                notes.append(f"{pairs[index].name}: left out: {error}")
                done += len(subjects)
        example = example or next(iter(ready), None)
        used += len(ready)
        for i, subject in enumerate(subjects):
            for shown in ready:
                check()
                try:
                    found[i].append(_measure(subject.encoder, shown, batch_size))
                except ValueError as error:
                    notes.append(f"{shown.pair}: left out for {subject.called}: {error}")
                done += 1
                if progress is not None:
                    progress(done, total)
    rows = [row for i, subject in enumerate(subjects) for row in _rows(subject, found[i])]
    if example is None or all(row.encoder == BASELINE for row in rows):
        raise ValueError("pairs: expected at least one that can be used, got none: " + "; ".join(notes[:4]))
    failures = dict.fromkeys(row.failure for row in rows if row.encoder != BASELINE)
    recommendations = tuple(_recommend(rows, failure) for failure in failures)
    return EncoderAudit(tuple(rows), recommendations, used, (*notes, *_cautions(encoders, used)), example)


class PixelMeans(PixelEncoder):
    """Means over 8 × 8 pixels as a grid ``[B, H/8, W/8, 4]``: what anyone has without an encoder.

    A token is (red, green, blue, 1) − ½: the constant keeps the cosine of a grey pixel defined, and makes the angle grow
    with the difference of colours.
    """

    def __init__(self):
        preprocess = Preprocess(0, 0, std=(1.0, 1.0, 1.0), mode="bilinear", multiple=8)
        name, described = "pixels/8x8", preprocess.describe()
        info = EncoderInfo(name, described, hash_tensors([], name, described), "grid")
        super().__init__(info, preprocess, torch.device("cpu"))

    def features(self, pixels: Tensor) -> Tensor:
        means = F.avg_pool2d(pixels, 8)
        return torch.cat([means, torch.full_like(means[:, :1], 0.5)], 1)


class _Subject(NamedTuple):
    """What gets rows of its own."""

    name: str
    layer: Optional[int]
    encoder: Encoder

    @property
    def called(self) -> str:
        return self.name if self.layer is None else f"{self.name}, layer {self.layer}"


class _Distances(NamedTuple):
    """Distances from gt in one pair: dist → benign ``[N]``, and dist → failure → construction → distance."""

    benign: Mapping[str, Tensor]
    failures: Mapping[str, Mapping[str, Mapping[str, float]]]
    negatives: Mapping[str, tuple[str, ...]]


def _check_arguments(
    pairs: PairSet, encoders: Mapping[str, Encoder], crop: int, max_pairs: int, batch_size: int
) -> None:
    if not isinstance(pairs, PairSet) or not len(pairs):
        raise ValueError(f"pairs: expected a PairSet with at least one pair, got {type(pairs).__name__}")
    if not encoders or not all(isinstance(e, Encoder) for e in encoders.values()):
        came = ", ".join(type(e).__name__ for e in encoders.values()) or "none"
        raise ValueError(f"encoders: expected name → Encoder, at least one, got {came}")
    if BASELINE in encoders:
        raise ValueError(f"encoders: expected another name than that of the baseline, got {BASELINE!r}")
    for name, value, low in (("crop", crop, 0), ("max_pairs", max_pairs, 1), ("batch_size", batch_size, 1)):
        check_whole(name, value, low)
    if crop % MULTIPLE:
        raise ValueError(f"crop: expected a multiple of {MULTIPLE} pixels, or 0 for the whole picture, got {crop}")


def _at_layers(encoder: Encoder) -> dict[Optional[int], Encoder]:
    """An encoder at some of its layers, first to last, its own among them; layer None if it has no others.

    They share one network: what differs is where its answer is read.
    """
    if not isinstance(encoder, TimmEncoder) or encoder.info.output == "global":
        return {None: encoder}
    count = len(encoder.network.feature_info)
    few = min(MOST_LAYERS, count)
    wanted = {round((i + 1) * count / few) - 1 for i in range(few)} | {encoder.layer}
    found: dict[Optional[int], Encoder] = {}
    for layer in sorted(wanted):
        found[layer] = encoder if layer == encoder.layer else encoder.at_layer(layer)
    return found


def _measure(encoder: Encoder, shown: Examples, batch_size: int) -> _Distances:
    """Distances by the losses' own path: embeddings by role, the mask at token resolution, one pass of the primitive."""
    benign = list(shown.benign.values())
    places = [(failure, name) for failure, made in shown.failures.items() for name in made]
    others = torch.stack([*benign, *(shown.failures[failure][name] for failure, name in places)])
    images = {"gt": shown.after[None].float() / 255.0, "hard_negative": others.float() / 255.0}
    embedded = EmbeddingSet().with_images(encoder, images, batch_size).with_mask(shown.mask)
    name = encoder.info.name
    weights = embedded.token_weights(name)
    if weights is not None and not bool(weights.max() > 0):
        raise ValueError("the edit region lies outside what the encoder sees of the picture; turn its crop off")
    gt, references = embedded.get("gt", name), embedded.get("hard_negative", name).unbind(1)
    harmless, failures = {}, {}
    with torch.no_grad():
        for dist in dict.fromkeys(TERMS[term].defaults["dist"] for term in TERM_OF.values()):
            tokens = losses.token_distances(gt, references, dist)
            d = torch.cat([losses.aggregate_tokens(t, "mean", weights) for t in tokens])
            if not bool(d.isfinite().all()):
                raise ValueError("the encoder's answer holds NaN or infinity")
            harmless[dist] = d[: len(benign)]
            failures[dist] = {}
            for (failure, construction), value in zip(places, d[len(benign) :].tolist()):
                failures[dist].setdefault(failure, {})[construction] = value
    return _Distances(harmless, failures, shown.negatives)


def _rows(subject: _Subject, found: Sequence[_Distances]) -> list[AuditRow]:
    rows = []
    for failure, term in TERM_OF.items():
        dist = TERMS[term].defaults["dist"]
        made = [(d.benign[dist], d.failures[dist][failure], d) for d in found if failure in d.failures[dist]]
        if not made:
            continue
        benign = [b for b, _, _ in made]
        reached = [
            values[name] for _, values, d in made for name in d.negatives.get(failure, tuple(values)) if name in values
        ]
        reach, median = (quantile(torch.tensor(reached), share) for share in (0.1, 0.5))
        noise = quantile(torch.cat(benign), 0.95)
        margin = _rounded_down(0.5 * reach)
        rows.append(
            AuditRow(
                subject.name,
                subject.layer,
                failure,
                term,
                dist,
                len(made),
                grouped_auroc([torch.tensor(list(values.values())) for _, values, _ in made], benign),
                {n: _alone(n, made) for n in dict.fromkeys(n for _, values, _ in made for n in values)},
                reach,
                median,
                noise,
                margin if "margin" in TERMS[term].defaults and margin > noise else None,
            )
        )
    return rows


def _alone(name: str, made: Sequence[tuple]) -> float:
    """AUROC of one construction."""
    groups = [(torch.tensor([values[name]]), benign) for benign, values, _ in made if name in values]
    return grouped_auroc(*zip(*groups), draws=1).value


def _recommend(rows: Sequence[AuditRow], failure: str) -> Recommendation:
    """The row with the best lower bound; among equals (to two digits) the one whose failures stand out most from harmless
    changes."""
    candidates = [row for row in rows if row.failure == failure]
    baseline = next((row for row in candidates if row.encoder == BASELINE), None)

    def rank(row: AuditRow) -> tuple[float, float]:
        sure = row.auroc.value if row.auroc.low is None else row.auroc.low
        return round(sure, 2), row.reach / max(row.noise, 1e-9)

    best = max((row for row in candidates if row.encoder != BASELINE), key=rank)
    good = best.judgement == "sees"
    told = f"AUROC {interval(best.auroc, '{:.2f}, interval {:.2f} to {:.2f}')}"
    if good:
        reason = f"{best.called} notices it ({told})"
    elif best.judgement == "blind":
        reason = f"no encoder here would notice it; the best is {best.called} ({told}). Try another encoder or layer"
    else:
        reason = f"{best.called} is the best here ({told}), but {count_of(best.pairs)} cannot show that it notices"
    if "margin" in TERMS[best.term].defaults:
        reason += (
            f"; margin {best.margin:g}, half of what 90 % of its negatives reach ({short(best.reach)})"
            if best.margin is not None
            else f"; no fixed margin fits, since its negatives reach {short(best.reach)} and harmless changes {short(best.noise)}: take auto"
        )
    else:
        reason += f"; {best.dist} {short(best.median)} for a failure, at most {short(best.noise)} for a harmless change"
    if baseline is not None and baseline.auroc.value > best.auroc.value + 0.02:
        reason += f". Plain pixels tell it better ({baseline.auroc.value:.2f})"
    return Recommendation(
        best.term, failure, best.dist, best.encoder, best.layer, best.margin, good, f"{reason}."
    )  # fmt: skip


def _cautions(encoders: Mapping[str, Encoder], used: int) -> list[str]:
    notes = []
    if used == 1:
        notes.append("one pair only: there are no intervals, and another pair may say something else")
    elif used < FEW_PAIRS:
        notes.append(
            f"{count_of(used)}: intervals are wide; {FEW_PAIRS} or more can show that an encoder notices a failure"
        )
    for name, encoder in encoders.items():
        if encoder.info.output == "global":
            notes.append(
                f"{name}: one vector per picture; the edit mask does not act on it, and shapes and places are lost"
            )
    return notes


def _rounded_down(value: float) -> float:
    """To two significant digits, towards 0."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - DIGITS + 1)
    return float(f"{math.floor(value / unit) * unit:.{DIGITS}g}")
