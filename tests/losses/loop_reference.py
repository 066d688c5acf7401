"""The public losses as loops over samples, tokens and features in Python floats.

Slow and obvious on purpose, and sharing no code with losses.py: the tests hold the vectorised losses against it.
"""

import itertools
import math
import random

import torch

MIN_NORM = 1e-4
LAYOUTS = {"BD": (3, 5), "BPD": (3, 4, 5), "BHWD": (2, 2, 3, 4), "B222D": (2, 2, 2, 2, 3)}


# --- making inputs ---------------------------------------------------------------------------------------------------


def embeddings(shape, count, dtype=torch.float64, seed=0, scale=1.0):
    """``count`` random embeddings with a common part, so that cosines are neither all near 0 nor near 1."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator, dtype=torch.float64)
    own = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(scale * (0.5 * common + x)).to(dtype) for x in own]


def some_weights(which, shape, dtype=torch.float64, seed=1):
    """Weights per "sample" or per "token" (one of them 0) for embeddings of ``shape``; None for None."""
    if which is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    w = torch.rand(shape[:1] if which == "sample" else shape[:-1], generator=generator, dtype=dtype) + 0.1
    w.view(-1)[-1] = 0.0
    return w


def weight_kinds(shape):
    """[B, D] has no token weights of its own: there [B] is per sample."""
    return (None, "sample") if len(shape) == 2 else (None, "sample", "token")


def pairwise(**axes):
    """Few combinations of the axes' values in which every pair of values of any two axes occurs (greedy)."""
    everything = list(itertools.product(*(range(len(values)) for values in axes.values())))
    rows = random.Random(0).sample(everything, min(1000, len(everything)))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing = set().union(*(itertools.combinations(enumerate(row), 2) for row in everything))
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        assert pairs[best] & missing, "the sample of rows lacks a pair"
        missing -= pairs[best]
        yield {name: axes[name][i] for name, i in zip(axes, best)}


# --- distances -------------------------------------------------------------------------------------------------------


def flatten(node):
    return [x for child in node for x in flatten(child)] if isinstance(node, list) else [node]


def tokens_of(x):
    """``[B, ..., D]`` as lists [B][T][D]."""

    def vectors(node):
        return [v for child in node for v in vectors(child)] if isinstance(node[0], list) else [node]

    return [vectors(sample) for sample in x.detach().double().tolist()]


def distance(a, b, kind):
    if kind == "cos":
        dot = aa = bb = 0.0
        for x, y in zip(a, b):
            dot, aa, bb = dot + x * y, aa + x * x, bb + y * y
        return 1.0 - dot / (max(math.sqrt(aa), MIN_NORM) * max(math.sqrt(bb), MIN_NORM))
    total = 0.0
    for x, y in zip(a, b):
        total += abs(x - y) if kind == "l1" else (x - y) ** 2
    return math.sqrt(total) if kind == "euclidean" else total


def aggregate(values, agg, weights=None):
    if weights is None:
        weights = [1.0] * len(values)
    weighted = [w * v for w, v in zip(weights, values)]
    if agg == "max":
        return max(weighted)
    if agg == "sum":
        return sum(weighted)
    return sum(weighted) / sum(weights) if sum(weights) > 0 else 0.0


def token_weights(weights, sample):
    return flatten(weights[sample].detach().double().tolist()) if weights is not None and weights.ndim > 1 else None


def distances(a, b, kind, agg, weights):
    """[B]: the aggregated distance of every sample; weights per sample are left to ``reduce``."""
    result = []
    for i, (sample_a, sample_b) in enumerate(zip(tokens_of(a), tokens_of(b))):
        per_token = [distance(x, y, kind) for x, y in zip(sample_a, sample_b)]
        result.append(aggregate(per_token, agg, token_weights(weights, i)))
    return result


def reduce(per_sample, reduction, weights):
    if weights is not None and weights.ndim == 1:
        per_sample = [w * x for w, x in zip(weights.tolist(), per_sample)]
    if reduction == "none":
        return per_sample
    return sum(per_sample) / len(per_sample) if reduction == "mean" else sum(per_sample)


# --- the losses ------------------------------------------------------------------------------------------------------


def pair_distance(a, b, dist="cos", agg="mean", weights=None):
    return reduce(distances(a, b, dist, agg, weights), "none", weights)


def feature_match_loss(pred, target, kind="l2", agg="mean", reduction="mean", weights=None):
    return reduce(distances(pred, target, kind, agg, weights), reduction, weights)


def contrastive_pair_loss(z1, z2, y, margin=1.0, dist="l2", agg="mean", reduction="mean", weights=None):
    ds = distances(z1, z2, "euclidean" if dist == "l2" else dist, agg, weights)
    labels = [float(v) for v in y.tolist()] if isinstance(y, torch.Tensor) and y.ndim else [float(y)] * len(ds)
    per_sample = [0.5 * t * d**2 + 0.5 * (1 - t) * max(0.0, margin - d) ** 2 for t, d in zip(labels, ds)]
    return reduce(per_sample, reduction, weights)


def hinge(x, smooth):
    if smooth == 0:
        return max(0.0, x)
    return max(0.0, x) + smooth * math.log1p(math.exp(-abs(x) / smooth))  # = s log(1 + exp(x / s))


def margin_of(margin, sample, j, d_positive_negative=None):
    if isinstance(margin, str):
        return (float(margin[5:]) if ":" in margin else 0.5) * d_positive_negative
    if isinstance(margin, torch.Tensor):
        return margin.item() if margin.ndim == 0 else float(margin[(sample, j)[: margin.ndim]])
    return margin


def margin_ranking_on_distances(d_pos, d_neg, margin=0.2, reduction="mean", weights=None, smooth=0.0, neg_agg="mean"):
    per_sample = []
    for i, positive in enumerate(d_pos.tolist()):
        negatives = flatten(d_neg[i].tolist())
        per_sample.append(
            aggregate([hinge(positive - d + margin_of(margin, i, j), smooth) for j, d in enumerate(negatives)], neg_agg)
        )
    return reduce(per_sample, reduction, weights)


def negatives_of(negatives, anchor):
    if not isinstance(negatives, torch.Tensor):
        return list(negatives)
    return [negatives[:, k] for k in range(negatives.shape[1])] if negatives.ndim > anchor.ndim else [negatives]


def multi_negative_ranking_loss(
    z_anchor, z_positive, z_negs, margin=0.2, dist="cos", agg="mean", reduction="mean", weights=None, smooth=0.0,
    neg_agg="mean",
):  # fmt: skip
    negatives = negatives_of(z_negs, z_anchor)
    d_pos = distances(z_anchor, z_positive, dist, agg, weights)
    d_neg = [distances(z_anchor, n, dist, agg, weights) for n in negatives]
    reach = [distances(z_positive, n, dist, agg, weights) for n in negatives]
    per_sample = []
    for i in range(len(d_pos)):
        terms = [
            hinge(d_pos[i] - d_neg[j][i] + margin_of(margin, i, j, reach[j][i]), smooth) for j in range(len(negatives))
        ]
        per_sample.append(aggregate(terms, neg_agg))
    return reduce(per_sample, reduction, weights)


def triplet_margin_loss(anchor, positive, negative, *args, **kwargs):
    return multi_negative_ranking_loss(anchor, positive, [negative], *args, **kwargs)


def info_nce_loss(anchor, positive, negatives=None, temperature=0.07, agg="mean", reduction="mean", weights=None):
    samples = tokens_of(anchor)
    d_pos = distances(anchor, positive, "cos", agg, weights)
    per_sample = []
    for i, sample in enumerate(samples):
        if negatives is None:  # the positives of the others
            others = [other for j, other in enumerate(tokens_of(positive)) if j != i]
        elif isinstance(negatives, torch.Tensor) and negatives.ndim == 2:  # a bank of vectors, for every token
            others = [[row] * len(sample) for row in negatives.tolist()]
        elif isinstance(negatives, torch.Tensor) and negatives.ndim == anchor.ndim:  # a bank, position by position
            others = tokens_of(negatives)
        else:
            others = [tokens_of(n)[i] for n in negatives_of(negatives, anchor)]
        w = token_weights(weights, i)
        scores = [-d_pos[i] / temperature]
        for other in others:
            scores.append(-aggregate([distance(x, y, "cos") for x, y in zip(sample, other)], agg, w) / temperature)
        top = max(scores)
        per_sample.append(top + math.log(sum(math.exp(s - top) for s in scores)) - scores[0])
    return reduce(per_sample, reduction, weights)


loss_no_edit_identity = triplet_margin_loss
loss_geometry_match = feature_match_loss
loss_overlay_avoidance = multi_negative_ranking_loss
