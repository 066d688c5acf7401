"""Embedding-only losses for training edit models on before/after pairs.

This file needs torch alone and can be copied into any trainer. Three task losses answer the three ways in
which an edit LoRA fails, and are made of the general losses beside them:

====================  ==================================  ==============================================
failure               loss                                made of
====================  ==================================  ==============================================
no edit               :func:`loss_no_edit_identity`       triplet: nearer to *after* than to *before*
distorted geometry    :func:`loss_geometry_match`         feature match with *after*
overlay               :func:`loss_overlay_avoidance`      triplet: nearer to *after* than to the overlay
====================  ==================================  ==============================================

Conventions shared by every function
    * Embeddings are floating tensors ``[B, D]``, ``[B, P, D]``, ``[B, H, W, D]`` or any ``[B, ..., D]``. All the
      dimensions between the first and the last are *tokens*.
    * A distance is computed per token, then ``agg`` (``"mean"``, ``"max"``, ``"sum"``) makes one number per sample,
      then the loss is formed, then ``reduction`` (``"mean"``, ``"sum"``, ``"none"`` → ``[B]``) reduces the batch.
    * ``weights`` of token shape ``[B, ...]`` (an edit mask at token resolution, non-negative) weigh tokens inside
      ``agg``: ``"mean"`` becomes Σwd / Σw (0 where Σw = 0), ``"sum"`` Σwd, ``"max"`` max(wd). ``weights`` of shape
      ``[B]`` multiply each sample's loss; for ``[B, D]`` embeddings only this second kind exists.
    * ``margin`` is a number ≥ 0, a tensor ``[B]``, or ``"auto"``: half of what the target itself reaches,
      0.5 · d(positive, negative) per sample; ``"auto:0.8"`` takes another fraction in (0, 1]. With a number above
      d(positive, negative) even a perfect prediction pays. An automatic margin is a constant for the gradient.
    * ``smooth`` = s > 0 replaces the hinge max(0, x) by s · log(1 + exp(x / s)); s is in units of the distance.
    * Half-precision inputs are computed in float32 and give a float32 loss; float64 stays float64. Gradients come
      back in the dtype of their input, and only for inputs that require them.
    * Near the origin the cosine is defined with norms clamped to 1e-4 and its gradient fades linearly to zero, so
      the gradient of each distance has a norm of at most 1e4 per token, before the loss's own factors (1/τ, weights,
      two distances in a hinge); above a norm of 1e-4 both are exact. In float32 a cosine distance is good to about
      1.2e-7, however near the two vectors are, and 0 where they are equal. NaN in, NaN out.

Every function raises ValueError for a wrong shape, dtype, device or option, naming the argument, what came and what
was expected. Derivatives of second order are refused with an error.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "aggregate_tokens",
    "contrastive_on_distances",
    "contrastive_pair_loss",
    "feature_match_loss",
    "info_nce_loss",
    "info_nce_on_distances",
    "loss_geometry_match",
    "loss_no_edit_identity",
    "loss_overlay_avoidance",
    "margin_fraction",
    "margin_ranking_on_distances",
    "multi_negative_ranking_loss",
    "pair_distance",
    "token_distances",
    "triplet_margin_loss",
]

Margin = Union[float, str, Tensor]
Negatives = Union[Tensor, Sequence[Tensor]]

AGGREGATIONS = ("mean", "max", "sum")
REDUCTIONS = ("mean", "sum", "none")
DISTANCES = ("cos", "l2")
MATCHES = ("l2", "l1", "cos")

MIN_NORM = 1e-4  # below it a vector has no trustworthy direction: the cosine is clamped and its gradient fades
SMALL_ELEMENTS = 1 << 18  # up to so many numbers, more calls cost more than memory does, and there are no blocks
BLOCK_ELEMENTS = 1 << 20  # numbers per block on a CPU: large enough to hide Python, small enough to stay in the cache
SHARED_ELEMENTS = 1 << 19  # from so many numbers on, the blocks are shared among threads …
SMALLEST_SHARE = 1 << 18  # … at least so many each, so that there are some blocks for every thread
LEAST_FEW_TEMPERATURE = 1 / 32  # from it on, exp of a difference of two cosines over it is far from what overflows
MOST_THREADS = 8  # more would wait for Python
LARGE_BYTES = 1 << 22  # from so many bytes on, NumPy asks for large pages
ONE_PASS_ELEMENTS = 1 << 19  # from so many numbers on, Σ x·y in one pass is the faster way …
ONE_PASS_FEATURES = 1 << 11  # … and up to so many features it is as exact: a longer sum is better made of sums
TILE_ELEMENTS = 1 << 22  # scores of anchors against a bank that exist at one time …
BANK_ROWS = 256  # … unless those of so many anchors are more: fewer would make poor matrix products


# ---------------------------------------------------------------------------------------------------------------------
# The task losses
# ---------------------------------------------------------------------------------------------------------------------


def loss_no_edit_identity(
    z_pred: Tensor,
    z_gt: Tensor,
    z_src: Tensor,
    margin: Margin = 0.2,
    dist: str = "cos",
    agg: str = "mean",
    reduction: str = "mean",
    weights: Optional[Tensor] = None,
    smooth: float = 0.0,
) -> Tensor:
    """Against *no edit*: max(0, d(pred, gt) − d(pred, src) + margin), the output must be nearer to after than to before.

    Give the edit mask as token ``weights``: averaged over the whole picture, an unchanged background hides the object.

    Args:
        z_pred: ``[B, ..., D]`` embedding of the model's output.
        z_gt: that of the after picture, same shape.
        z_src: that of the before picture, same shape.
        margin, dist, agg, reduction, weights, smooth: as :func:`triplet_margin_loss`.

    Raises:
        ValueError: as the module says.

    >>> src, gt = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> loss_no_edit_identity(gt, gt, src), loss_no_edit_identity(src, gt, src)
    (tensor(0.), tensor(1.2000))
    """
    _check_embeddings(z_pred=z_pred, z_gt=z_gt, z_src=z_src)
    _look_at_batch(z_pred)
    return _ranking(z_pred, z_gt, [z_src], margin, dist, agg, reduction, weights, smooth)


def loss_geometry_match(
    z_pred: Tensor,
    z_gt: Tensor,
    kind: str = "l2",
    agg: str = "mean",
    reduction: str = "mean",
    weights: Optional[Tensor] = None,
) -> Tensor:
    """Against *distorted geometry*: feature match of the output with the after picture, token by token.

    Use token or grid embeddings: a global vector hardly moves when a shape is bent. The default ``"l2"`` is a sum over D squared
    differences, in the hundreds for most encoders; ``"cos"`` is on one scale, 0…2, with the hinges of the other task losses, whose
    margins are about 0.25, and is what a sum with them takes.

    Args:
        z_pred, z_gt: ``[B, ..., D]`` embeddings of the output and of the after picture.
        kind, agg, reduction, weights: as :func:`feature_match_loss`; ``kind`` is what nodes and configs call ``dist``.

    Raises:
        ValueError: as the module says.

    >>> loss_geometry_match(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
    tensor(4.)
    """
    _check_embeddings(z_pred=z_pred, z_gt=z_gt)
    _look_at_batch(z_pred)
    _check_option("kind", kind, MATCHES)
    _check_option("agg", agg, AGGREGATIONS)
    _check_option("reduction", reduction, REDUCTIONS)
    return _match(z_pred, z_gt, kind, agg, reduction, weights)


def loss_overlay_avoidance(
    z_pred: Tensor,
    z_gt: Tensor,
    z_overlay: Negatives,
    margin: Margin = 0.2,
    dist: str = "cos",
    agg: str = "mean",
    reduction: str = "mean",
    weights: Optional[Tensor] = None,
    smooth: float = 0.0,
    neg_agg: str = "mean",
) -> Tensor:
    """Against *overlay*: max(0, d(pred, gt) − d(pred, overlay) + margin), for one overlay or several.

    Args:
        z_pred, z_gt: ``[B, ..., D]`` embeddings of the output and of the after picture.
        z_overlay: embedding of the new object painted over the old one: shaped like ``z_pred``, ``[B, K, ..., D]`` for
            K constructions, or a list of K.
        margin, dist, agg, reduction, weights, smooth, neg_agg: as :func:`multi_negative_ranking_loss`.

    Raises:
        ValueError: as the module says.

    >>> gt, overlay = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    >>> loss_overlay_avoidance(gt, gt, overlay, margin="auto"), loss_overlay_avoidance(overlay, gt, overlay, margin=0)
    (tensor(0.), tensor(0.2929))
    """
    _check_embeddings(z_pred=z_pred, z_gt=z_gt)
    _look_at_batch(z_pred)
    negatives = _negative_list("z_overlay", z_overlay, z_pred)
    return _ranking(z_pred, z_gt, negatives, margin, dist, agg, reduction, weights, smooth, neg_agg)


# ---------------------------------------------------------------------------------------------------------------------
# The general losses
# ---------------------------------------------------------------------------------------------------------------------


def pair_distance(
    a: Tensor, b: Tensor, dist: str = "cos", agg: str = "mean", weights: Optional[Tensor] = None
) -> Tensor:
    """Distance between two embeddings, per sample.

    ``"cos"``: 1 − a·b / (‖a‖‖b‖) per token, in [0, 2]. ``"l2"``: ‖a − b‖² per token (squared, summed over D). Then
    ``agg`` over tokens.

    Args:
        a, b: ``[B, ..., D]``, same shape.
        dist: ``"cos"`` or ``"l2"``.
        agg: ``"mean"``, ``"max"`` or ``"sum"`` over tokens.
        weights: None, token weights ``[B, ...]`` or factors per sample ``[B]``.

    Returns:
        ``[B]``.

    Raises:
        ValueError: as the module says.

    >>> pair_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    tensor([1.])
    """
    _check_embeddings(a=a, b=b)
    _check_option("dist", dist, DISTANCES)
    _check_option("agg", agg, AGGREGATIONS)
    return _match(a, b, dist, agg, "none", weights)


def feature_match_loss(
    pred: Tensor,
    target: Tensor,
    kind: str = "l2",
    agg: str = "mean",
    reduction: str = "mean",
    weights: Optional[Tensor] = None,
) -> Tensor:
    """Distance of predicted features to target features.

    ``"l2"``: ‖p − t‖² (squared, summed over D). ``"l1"``: Σ|p − t|. ``"cos"``: 1 − cos(p, t). Per token, then ``agg``.

    Args:
        pred, target: ``[B, ..., D]``, same shape.
        kind: ``"l2"``, ``"l1"`` or ``"cos"``.
        agg: ``"mean"``, ``"max"`` or ``"sum"`` over tokens.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (→ ``[B]``).
        weights: None, token weights ``[B, ...]`` or factors per sample ``[B]``.

    Raises:
        ValueError: as the module says.

    Source:
        Feature reconstruction loss of Johnson et al., 2016, "Perceptual Losses for Real-Time Style Transfer and
        Super-Resolution", with the encoder left to the caller.

    >>> feature_match_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]))
    tensor(5.)
    """
    _check_embeddings(pred=pred, target=target)
    _check_option("kind", kind, MATCHES)
    _check_option("agg", agg, AGGREGATIONS)
    _check_option("reduction", reduction, REDUCTIONS)
    return _match(pred, target, kind, agg, reduction, weights)


def contrastive_pair_loss(
    z1: Tensor,
    z2: Tensor,
    y: Tensor,
    margin: float = 1.0,
    dist: str = "l2",
    agg: str = "mean",
    reduction: str = "mean",
    weights: Optional[Tensor] = None,
) -> Tensor:
    """Contrastive loss of a labelled pair: ½ · y · d² + ½ · (1 − y) · max(0, margin − d)².

    With ``dist="l2"``, d is the **Euclidean** distance ‖z1 − z2‖ (not squared), as in the paper: both parts and the
    margin are on it. With ``dist="cos"``, d = 1 − cos(z1, z2), so a margin of 1 asks for orthogonal vectors and the
    largest useful one is 2. With tokens, d is the aggregate of the token distances. (The paper writes Y = 0 for a
    similar pair; here y = 1 pulls together and y = 0 pushes apart, as most libraries have it.)

    Args:
        z1, z2: ``[B, ..., D]``, same shape.
        y: 1 = same, 0 = different; ``[B]`` bool, integer or floating in 0…1, or one number for all.
        margin: number ≥ 0, in units of d.
        dist: ``"l2"`` or ``"cos"``.
        agg, reduction, weights: as the module says.

    Raises:
        ValueError: as the module says; labels outside 0…1 (looked at on the CPU only, so as not to stall a GPU).

    Source:
        Hadsell, Chopra, LeCun, 2006, "Dimensionality Reduction by Learning an Invariant Mapping", eq. 4.

    >>> z1, z2 = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.3, 0.4], [0.3, 0.4]])
    >>> contrastive_pair_loss(z1, z2, torch.tensor([1, 0]), reduction="none")
    tensor([0.1250, 0.1250])
    """
    _check_embeddings(z1=z1, z2=z2)
    _check_option("dist", dist, DISTANCES)
    _check_option("agg", agg, AGGREGATIONS)
    _check_option("reduction", reduction, REDUCTIONS)
    _check_number("margin", margin, minimum=0.0)
    _check_labels(y, z1.shape[0], z1.device)
    sample_weights, token_weights = _split_weights(weights, z1.shape[:-1], z1.device)
    if z1.ndim == 2 and dist == "l2" and z1.numel() <= SMALL_ELEMENTS and not _is_compiling():
        _check_ordinary(z1, z2)
        dtype = _compute_dtype(z1, z2)
        d = torch.linalg.vector_norm((z1 if z1.dtype == dtype else z1.to(dtype)) - z2, dim=-1)  # in the fewest calls
    else:
        (d,) = _distances(z1, [z2], "euclidean" if dist == "l2" else "cos")
    return _contrastive(_aggregate(d, agg, token_weights), y, margin, reduction, sample_weights)


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: Margin = 0.2,
    dist: str = "cos",
    agg: str = "mean",
    reduction: str = "mean",
    weights: Optional[Tensor] = None,
    smooth: float = 0.0,
) -> Tensor:
    """max(0, d(anchor, positive) − d(anchor, negative) + margin).

    Args:
        anchor, positive, negative: ``[B, ..., D]``, same shape.
        margin: number ≥ 0 in units of d, ``[B]``, ``"auto"`` or ``"auto:F"``.
        dist: ``"cos"`` (1 − cosine) or ``"l2"`` (squared L2, summed over D).
        agg, reduction, weights, smooth: as the module says.

    Raises:
        ValueError: as the module says.

    Source:
        Schroff et al., 2015, "FaceNet", eq. 3 (which uses ``dist="l2"``).

    >>> a, p, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> triplet_margin_loss(a, p, n), triplet_margin_loss(a, n, p, margin=0.5)
    (tensor(0.), tensor(1.5000))
    """
    _check_embeddings(anchor=anchor, positive=positive, negative=negative)
    return _ranking(anchor, positive, [negative], margin, dist, agg, reduction, weights, smooth)


def multi_negative_ranking_loss(
    z_anchor: Tensor,
    z_positive: Tensor,
    z_negs: Negatives,
    margin: Margin = 0.2,
    dist: str = "cos",
    agg: str = "mean",
    reduction: str = "mean",
    weights: Optional[Tensor] = None,
    smooth: float = 0.0,
    neg_agg: str = "mean",
) -> Tensor:
    """Agg_j max(0, d(anchor, positive) − d(anchor, negative_j) + margin).

    Args:
        z_anchor, z_positive: ``[B, ..., D]``, same shape.
        z_negs: ``[B, K, ..., D]``, or a list of K tensors shaped like the anchor (K may be 1).
        margin: number ≥ 0 in units of d, ``[B]`` or ``[B, K]``, ``"auto"`` (per negative) or ``"auto:F"``.
        dist: ``"cos"`` or ``"l2"`` (squared).
        agg, reduction, weights, smooth: as the module says.
        neg_agg: ``"mean"``, ``"max"`` (the hardest negative alone) or ``"sum"`` over the K negatives.

    Raises:
        ValueError: as the module says.

    Source:
        The triplet hinge of FaceNet over K explicit negatives; ``neg_agg="max"`` is the hardest-negative form of
        Faghri et al., 2018, "VSE++".

    >>> a, p = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    >>> multi_negative_ranking_loss(a, p, [torch.tensor([[0.0, 1.0]]), a], margin=0.5)
    tensor(0.2500)
    """
    _check_embeddings(z_anchor=z_anchor, z_positive=z_positive)
    negatives = _negative_list("z_negs", z_negs, z_anchor)
    return _ranking(z_anchor, z_positive, negatives, margin, dist, agg, reduction, weights, smooth, neg_agg)


def info_nce_loss(
    anchor: Tensor,
    positive: Tensor,
    negatives: Optional[Negatives] = None,
    temperature: float = 0.07,
    agg: str = "mean",
    reduction: str = "mean",
    weights: Optional[Tensor] = None,
) -> Tensor:
    """−log( exp(s(a, p)/τ) / (exp(s(a, p)/τ) + Σ_j exp(s(a, n_j)/τ)) ) with s = −d = cos − 1.

    Token embeddings are compared position by position and ``agg`` reduces the cosine distances over tokens, so with
    ``"mean"`` s is the mean cosine (less 1, which cancels).

    Args:
        anchor, positive: ``[B, ..., D]``, same shape.
        negatives: None: the positives of the other samples in the batch (with a batch of one there are none and the
            loss is 0). Else negatives of one's own per sample (``[B, K, ..., D]``, or a list of K tensors shaped like
            the anchor), or a bank that all samples share: ``[N, D]`` (every token is compared with every row) or, for
            token embeddings, ``[N, ..., D]`` compared position by position.
        temperature: τ > 0.
        agg, reduction, weights: as the module says; token weights are the anchor's.

    Raises:
        ValueError: as the module says; a non-positive temperature.

    Source:
        van den Oord et al., 2018, "Representation Learning with Contrastive Predictive Coding".

    >>> z = torch.eye(4)
    >>> round(info_nce_loss(z, z, temperature=1.0).item(), 4)  # log(1 + 3/e)
    0.7437
    """
    _check_embeddings(anchor=anchor, positive=positive)
    _check_option("agg", agg, AGGREGATIONS)
    _check_option("reduction", reduction, REDUCTIONS)
    _check_number("temperature", temperature, minimum=0.0, exclusive=True)
    sample_weights, token_weights = _split_weights(weights, anchor.shape[:-1], anchor.device)

    if negatives is None and len(anchor) == 1 and not _is_compiling():
        _warn_once("info_nce_loss: a batch of one has no other samples as negatives, and the loss is 0; give negatives")
    bank = positive if negatives is None else _shared_bank(negatives, anchor)
    if bank is None:
        assert negatives is not None
        references = [positive, *_negative_list("negatives", negatives, anchor)]
        distances = _aggregated_distances(anchor, references, "cos", agg, token_weights)
        return _own_info_nce([torch.stack(distances, 1)], temperature, reduction, sample_weights)
    few = max(anchor.numel(), bank.numel(), len(anchor) * len(bank)) <= SMALL_ELEMENTS
    if few and anchor.ndim == 2 and temperature >= LEAST_FEW_TEMPERATURE and not _is_compiling():
        _check_ordinary(anchor, positive, bank)
        losses = _VectorInfoNCE.apply(1.0 / temperature, anchor, positive, None if negatives is None else bank)
        return _reduce(losses, reduction, sample_weights)
    # What is used twice below must not have its two gradients rounded to half precision before they are added.
    dtype = _compute_dtype(anchor, positive, bank)
    anchor, positive = anchor.to(dtype), positive.to(dtype)
    (d_pos,) = _aggregated_distances(anchor, [positive], "cos", agg, token_weights)
    bank = positive if negatives is None else bank.to(dtype)
    parts = _bank_parts(anchor, bank, d_pos, 1.0 / temperature, agg, token_weights)
    if reduction == "none":
        return _reduce(_BankInfoNCE.apply(False, negatives is None, *parts, None), reduction, sample_weights)
    factors = torch.full_like(d_pos, 1.0 / len(d_pos) if reduction == "mean" else 1.0)
    if sample_weights is not None:
        factors = factors * sample_weights.to(dtype)
    return _BankInfoNCE.apply(torch.is_grad_enabled(), negatives is None, *parts, factors)


# ---------------------------------------------------------------------------------------------------------------------
# On distances that the caller has
# ---------------------------------------------------------------------------------------------------------------------


def token_distances(anchor: Tensor, references: Sequence[Tensor], dist: str = "cos") -> List[Tensor]:
    """Distance of every token of ``anchor`` to the same token of each reference.

    ``"cos"``: 1 − a·r / (‖a‖‖r‖), in [0, 2]. ``"l2"``: ‖a − r‖². ``"l1"``: Σ|a − r|. ``"euclidean"``: ‖a − r‖, with
    gradient 0 where a = r. All references are handled in one pass over the anchor, forward and backward; nothing is
    normalised or copied into a new tensor of the embeddings' size except the gradients that are asked for.

    Args:
        anchor: ``[B, ..., D]``.
        references: tensors shaped like ``anchor``.
        dist: ``"cos"``, ``"l2"``, ``"l1"`` or ``"euclidean"``.

    Returns:
        One float32 (float64 for float64 input) tensor ``[B, ...]`` per reference.

    Raises:
        ValueError: for a wrong shape, dtype, device or ``dist``, and for tensors made in inference mode where a
            gradient is wanted.

    >>> a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    >>> token_distances(a, [a, -a])
    [tensor([[0., 0.]]), tensor([[2., 2.]])]
    """
    _check_option("dist", dist, ("cos", "l2", "l1", "euclidean"))
    if not isinstance(references, (list, tuple)) or not references:
        came = "an empty one" if isinstance(references, (list, tuple)) else type(references).__name__
        raise ValueError(f"references: expected a list of at least one tensor, got {came}")
    _check_embeddings(anchor=anchor, **{f"references[{i}]": r for i, r in enumerate(references)})
    return list(_distances(anchor, references, dist))


def aggregate_tokens(distances: Tensor, agg: str = "mean", weights: Optional[Tensor] = None) -> Tensor:
    """Token distances ``[B, ...]`` → ``[B]``: weighted mean, sum or maximum over all token dimensions.

    Args:
        distances: ``[B]`` (returned as it is) or ``[B, ...]``.
        agg: ``"mean"``: Σwd / Σw, and 0 for a sample whose weights are all 0; ``"sum"``: Σwd; ``"max"``: max(wd).
        weights: None or non-negative, shaped like ``distances``.

    >>> aggregate_tokens(torch.tensor([[1.0, 3.0]]), "mean", torch.tensor([[0.0, 1.0]]))
    tensor([3.])
    """
    _check_option("agg", agg, AGGREGATIONS)
    _check_tensor("distances", distances)
    if distances.ndim < 1 or distances.numel() == 0:
        raise ValueError(f"distances: expected [B] or [B, ...] with B >= 1, got shape {_shape(distances)}")
    if distances.ndim > 1 and weights is not None:
        if weights.shape != distances.shape:
            raise ValueError(f"weights: expected shape {_shape(distances)} like the distances, got {_shape(weights)}")
        _split_weights(weights, distances.shape, distances.device)
    return _aggregate(distances, agg, weights)


def margin_fraction(margin: Margin) -> Optional[float]:
    """The fraction of d(positive, negative) that ``"auto"`` stands for; None if ``margin`` is a number or a tensor.

    Raises:
        ValueError: for a negative or non-finite number, another word, or a fraction outside (0, 1].

    >>> margin_fraction("auto"), margin_fraction("auto:0.8"), margin_fraction(0.2)
    (0.5, 0.8, None)
    """
    if isinstance(margin, Tensor):
        if not margin.is_floating_point():
            raise ValueError(f"margin: expected a floating tensor, got {margin.dtype}")
        if _on_cpu(margin) and bool((margin < 0).any()):
            raise ValueError(f"margin: expected values >= 0, got a tensor with minimum {margin.min().item():g}")
        return None
    if isinstance(margin, str):
        word, colon, number = margin.partition(":")
        try:
            fraction = float(number) if colon else 0.5
        except ValueError:
            fraction = math.nan
        if word.strip() != "auto" or not 0.0 < fraction <= 1.0:
            raise ValueError(f"margin: expected a number >= 0, 'auto' or 'auto:F' with 0 < F <= 1, got {margin!r}")
        return fraction
    _check_number("margin", margin, minimum=0.0)
    return None


def margin_ranking_on_distances(
    d_pos: Tensor,
    d_neg: Tensor,
    margin: Margin = 0.2,
    reduction: str = "mean",
    weights: Optional[Tensor] = None,
    smooth: float = 0.0,
    neg_agg: str = "mean",
) -> Tensor:
    """Hinge on distances that the caller has: Agg_j max(0, d_pos − d_neg,j + margin).

    Args:
        d_pos: ``[B]`` distance to what should be near.
        d_neg: ``[B]``, or ``[B, K]`` for K negatives.
        margin: number ≥ 0, or a tensor ``[B]`` (``[B, K]`` for K negatives). ``"auto"`` needs embeddings and is refused.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (→ ``[B]``).
        weights: None or ``[B]``, factors of the per-sample losses.
        smooth: 0 for the hinge, > 0 for a softplus of that width.
        neg_agg: ``"mean"``, ``"max"`` or ``"sum"`` over the K negatives.

    Raises:
        ValueError: shapes that do not fit, a negative margin or ``smooth``, an unknown option, an empty batch.

    >>> margin_ranking_on_distances(torch.tensor([0.1, 0.5]), torch.tensor([0.6, 0.4]), margin=0.2, reduction="none")
    tensor([0.0000, 0.3000])
    """
    _check_option("reduction", reduction, REDUCTIONS)
    _check_option("neg_agg", neg_agg, AGGREGATIONS)
    _check_number("smooth", smooth, minimum=0.0)
    _check_distances("d_pos", d_pos, (1,))
    _check_distances("d_neg", d_neg, (1, 2))
    if d_neg.shape[0] != d_pos.shape[0]:
        raise ValueError(f"d_neg: expected a batch of {d_pos.shape[0]} like d_pos, got shape {_shape(d_neg)}")
    _check_same_device(d_pos=d_pos, d_neg=d_neg)
    if margin_fraction(margin) is not None or isinstance(margin, str):
        raise ValueError(f"margin: expected a number or a tensor, got {margin!r}, which needs embeddings")
    sample_weights, _ = _split_weights(weights, d_pos.shape, d_pos.device)
    dtype = _compute_dtype(d_pos, d_neg)
    if isinstance(margin, Tensor):
        _check_margin_tensor(margin, d_neg.shape, d_neg.device)
    d_pos, d_neg = (d if d.dtype == dtype else d.to(dtype) for d in (d_pos, d_neg))
    return _hinge_loss(d_pos, d_neg, margin, reduction, sample_weights, smooth, neg_agg)


def contrastive_on_distances(
    distance: Tensor,
    y: Union[Tensor, float],
    margin: float = 1.0,
    reduction: str = "mean",
    weights: Optional[Tensor] = None,
) -> Tensor:
    """½ · y · d² + ½ · (1 − y) · max(0, margin − d)², on distances ``[B]`` that the caller has.

    See :func:`contrastive_pair_loss`.

    >>> contrastive_on_distances(torch.tensor([0.6, 0.6]), torch.tensor([1, 0]), reduction="none")
    tensor([0.1800, 0.0800])
    """
    _check_option("reduction", reduction, REDUCTIONS)
    _check_distances("distance", distance, (1,))
    _check_number("margin", margin, minimum=0.0)
    sample_weights, _ = _split_weights(weights, distance.shape, distance.device)
    _check_labels(y, distance.shape[0], distance.device)
    return _contrastive(distance.to(_compute_dtype(distance)), y, margin, reduction, sample_weights)


def info_nce_on_distances(
    d_pos: Tensor,
    d_neg: Tensor,
    temperature: float = 0.07,
    reduction: str = "mean",
    weights: Optional[Tensor] = None,
) -> Tensor:
    """−log( exp(−d_pos/τ) / (exp(−d_pos/τ) + Σ_j exp(−d_neg,j/τ)) ), on distances that the caller has.

    Args:
        d_pos: ``[B]``.
        d_neg: ``[B]`` or ``[B, K]``.
        temperature: τ > 0.
        reduction, weights: as the module says.

    >>> info_nce_on_distances(torch.tensor([0.0]), torch.tensor([[0.0]]), temperature=1.0)
    tensor(0.6931)
    """
    _check_option("reduction", reduction, REDUCTIONS)
    _check_number("temperature", temperature, minimum=0.0, exclusive=True)
    _check_distances("d_pos", d_pos, (1,))
    _check_distances("d_neg", d_neg, (1, 2))
    if d_neg.shape[0] != d_pos.shape[0]:
        raise ValueError(f"d_neg: expected a batch of {d_pos.shape[0]} like d_pos, got shape {_shape(d_neg)}")
    _check_same_device(d_pos=d_pos, d_neg=d_neg)
    sample_weights, _ = _split_weights(weights, d_pos.shape, d_pos.device)
    columns = [d if d.ndim == 2 else d.unsqueeze(1) for d in (d_pos, d_neg)]
    dtype = _compute_dtype(d_pos, d_neg)
    columns = [d if d.dtype == dtype else d.to(dtype) for d in columns]
    return _own_info_nce(columns, temperature, reduction, sample_weights)


# ---------------------------------------------------------------------------------------------------------------------
# From token distances to a loss
# ---------------------------------------------------------------------------------------------------------------------


def _aggregate(distances: Tensor, agg: str, weights: Optional[Tensor]) -> Tensor:
    """:func:`aggregate_tokens` where all is checked already: looking at every weight once is enough."""
    if distances.ndim == 1:
        return distances
    d = distances.flatten(1)
    if weights is not None:
        w = weights.to(d.dtype).flatten(1)
        d = d * w
        if agg == "mean":
            total = w.sum(1)
            return d.sum(1) / torch.where(total > 0, total, torch.ones_like(total))
    if agg == "mean":
        return d.mean(1)
    return d.sum(1) if agg == "sum" else d.amax(1)


def _hinge(x: Tensor, smooth: float) -> Tensor:
    # Below 1e-30 the quotient would overflow and the two are the same in float32.
    return smooth * F.softplus(x / smooth) if smooth > 1e-30 else x.relu()


def _hinge_loss(
    d_pos: Tensor,
    d_neg: Tensor,
    margin: Union[float, Tensor],
    reduction: str,
    sample_weights: Optional[Tensor],
    smooth: float,
    neg_agg: str,
) -> Tensor:
    """:func:`margin_ranking_on_distances` where all is checked and of one dtype."""
    if isinstance(margin, Tensor):
        margin = margin.to(d_neg.dtype)
        if d_neg.ndim == 2 and margin.ndim == 1:
            margin = margin.unsqueeze(1)
    excess = (d_pos.unsqueeze(1) if d_neg.ndim == 2 else d_pos) - d_neg + margin
    return _reduce(_aggregate(_hinge(excess, smooth), neg_agg, None), reduction, sample_weights)


def _reduce(per_sample: Tensor, reduction: str, sample_weights: Optional[Tensor]) -> Tensor:
    if sample_weights is not None:
        per_sample = per_sample * sample_weights.to(per_sample.dtype)
    if reduction == "none":
        return per_sample
    return per_sample.mean() if reduction == "mean" else per_sample.sum()


def _contrastive(
    distance: Tensor, y: Union[Tensor, float], margin: float, reduction: str, sample_weights: Optional[Tensor]
) -> Tensor:
    """:func:`contrastive_on_distances` where all is checked and in the dtype of the computation."""
    if not isinstance(y, Tensor) or y.dtype != distance.dtype:
        y = torch.as_tensor(y, dtype=distance.dtype, device=distance.device)
    return _reduce(_Contrastive.apply(margin, distance, y), reduction, sample_weights)


class _Contrastive(torch.autograd.Function):
    """½ · y · d² + ½ · (1 − y) · max(0, margin − d)²."""

    @staticmethod
    def forward(ctx: Any, margin: float, d: Tensor, y: Tensor) -> Tensor:
        short = (margin - d).clamp_min_(0.0)
        ctx.save_for_backward(d, y, short)
        return torch.lerp(short.square(), d.square(), y).mul_(0.5)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tuple[Optional[Tensor], ...]:
        _refuse_second_order()
        (d, y, short), (_, need_d, need_y) = ctx.saved_tensors, ctx.needs_input_grad
        to_y = (0.5 * g * (d.square() - short.square())).sum_to_size(y.shape) if need_y else None
        return None, g * torch.lerp(-short, d, y) if need_d else None, to_y


def _own_info_nce(
    distances: List[Tensor], temperature: float, reduction: str, sample_weights: Optional[Tensor]
) -> Tensor:
    """:func:`info_nce_on_distances` where all is checked and of one dtype: that to the positive first, all ``[B, n]``."""
    logits = torch.cat(distances, 1) / -temperature
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    if sample_weights is None:
        return F.cross_entropy(logits, target, reduction=reduction)
    return _reduce(F.cross_entropy(logits, target, reduction="none"), reduction, sample_weights)


def _aggregated_distances(
    anchor: Tensor, references: Sequence[Tensor], dist: str, agg: str, token_weights: Optional[Tensor]
) -> List[Tensor]:
    return [_aggregate(d, agg, token_weights) for d in _distances(anchor, references, dist)]


def _ranking(
    anchor: Tensor,
    positive: Tensor,
    negatives: List[Tensor],
    margin: Margin,
    dist: str,
    agg: str,
    reduction: str,
    weights: Optional[Tensor],
    smooth: float,
    neg_agg: str = "mean",
) -> Tensor:
    """The hinge that triplet, multi-negative ranking and the task losses share; its embeddings are checked already."""
    _check_option("dist", dist, DISTANCES)
    _check_option("agg", agg, AGGREGATIONS)
    _check_option("neg_agg", neg_agg, AGGREGATIONS)
    _check_option("reduction", reduction, REDUCTIONS)
    _check_number("smooth", smooth, minimum=0.0)
    fraction = margin_fraction(margin)
    if isinstance(margin, Tensor):
        count = sum(n.shape[1] if n.ndim > anchor.ndim else 1 for n in negatives)
        _check_margin_tensor(margin, torch.Size([anchor.shape[0], count]), anchor.device)
    sample_weights, token_weights = _split_weights(weights, anchor.shape[:-1], anchor.device)
    d_pos, *d_neg = _aggregated_distances(anchor, [positive, *negatives], dist, agg, token_weights)
    one = len(d_neg) == 1  # as [B]: [B, 1] would take more calls
    if fraction is not None:
        with torch.no_grad():
            reach = _aggregated_distances(positive, negatives, dist, agg, token_weights)
            margin = fraction * (reach[0] if one else torch.stack(reach, 1))
    elif isinstance(margin, Tensor) and one and margin.ndim == 2:
        margin = margin.squeeze(1)
    assert not isinstance(margin, str)
    of_negatives = d_neg[0] if one else torch.stack(d_neg, 1)
    return _hinge_loss(d_pos, of_negatives, margin, reduction, sample_weights, smooth, neg_agg)


def _match(a: Tensor, b: Tensor, kind: str, agg: str, reduction: str, weights: Optional[Tensor]) -> Tensor:
    if weights is None and reduction == "mean" and (agg == "mean" or a.ndim == 2):
        _check_ordinary(a, b)
        if kind != "cos" and a.numel() <= SMALL_ELEMENTS and not _is_compiling():
            return _MeanDifference.apply(kind, a, b)
        return _TokenDistances.apply(kind, True, a, b)
    sample_weights, token_weights = _split_weights(weights, a.shape[:-1], a.device)
    (d,) = _distances(a, [b], kind)
    return _reduce(_aggregate(d, agg, token_weights), reduction, sample_weights)


# ---------------------------------------------------------------------------------------------------------------------
# The primitive: one anchor against any number of references, per token, with one analytic backward
# ---------------------------------------------------------------------------------------------------------------------


def _distances(anchor: Tensor, references: Sequence[Tensor], dist: str) -> Sequence[Tensor]:
    """:func:`token_distances` of what is checked already; a reference ``[B, K, ..., D]`` stands for K."""
    _check_ordinary(anchor, *references)
    return _TokenDistances.apply(dist, False, anchor, *references)


class _TokenDistances(torch.autograd.Function):
    """d_j = dist(anchor, reference_j) per token; a reference ``[B, K, ..., D]`` counts as K of them. With ``mean`` the mean of
    all of these, which many a loss is.

    Saved for backward: the inputs themselves and, per token, the squared norms and the distances.
    """

    @staticmethod
    def forward(ctx: Any, dist: str, mean: bool, anchor: Tensor, *references: Tensor) -> Any:
        measure = _measure if _is_small(anchor) else _measure_in_blocks
        d, *kept = measure(dist, anchor, _each(references, anchor), _compute_dtype(anchor, *references))
        ctx.save_for_backward(anchor, *references, *(kept if dist != "euclidean" else [d]))
        ctx.dist, ctx.inputs, ctx.count = dist, 1 + len(references), d.numel() if mean else 0
        ctx.set_materialize_grads(False)
        return d.mean() if mean else d.unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        _refuse_second_order()
        saved = ctx.saved_tensors  # read once: non-reentrant checkpointing allows no second time
        (anchor, *references), scalars, needs = saved[: ctx.inputs], saved[ctx.inputs :], ctx.needs_input_grad[2:]
        given, used = [g for g in grads if g is not None], None
        if not given:
            return (None, None, *(torch.zeros_like(x) if need else None for x, need in zip(saved, needs)))
        if ctx.count:
            g = given[0] / ctx.count
        else:
            g = torch.stack(given)
            if len(given) < len(grads):
                used = [j for j, x in enumerate(grads) if x is not None]
                scalars = [x[used] if x.ndim == anchor.ndim else x for x in scalars]
        differentiate = _differentiate if _is_small(anchor) else _differentiate_in_blocks
        return (None, None, *differentiate(ctx.dist, g, scalars, anchor, references, needs, used))


def _is_small(anchor: Tensor) -> bool:
    """Whether to work in one piece: laying out blocks would take longer than the work, or a compiler makes its own."""
    return anchor.numel() <= SMALL_ELEMENTS or _is_compiling()


def _each(references: Sequence[Tensor], anchor: Tensor) -> List[Tensor]:
    """All references shaped like the anchor, K views for one that has a dimension more."""
    return [x for r in references for x in (r.unbind(1) if r.ndim > anchor.ndim else (r,))]


# --- per token -------------------------------------------------------------------------------------------------------


def _cosine_distances(dot: Tensor, aa: Tensor, rr: Tensor) -> Tuple[Tensor, ...]:
    """1 − cos, cos and the squared norms, from these and dot products; so that identical vectors give exactly 0 and 1."""
    aa_, rr_ = aa.clamp_min(MIN_NORM**2), rr.clamp_min(MIN_NORM**2)
    cosine = (dot / aa_).mul_((aa_ / rr_).sqrt_()).clamp_(-1.0, 1.0)
    return 1.0 - cosine, cosine, aa, rr


Slopes = Tuple[Any, ...]  # tensors; None where no gradient needs one


def _slopes(dist: str, g: Tensor, scalars: Sequence[Tensor], of_anchor: bool, of_references: bool) -> Slopes:
    """The factors of :func:`_differentiate`, ``[B, ..., 1]`` and ``[R, B, ..., 1]``: own_a, cross_a, own_r, cross_r of a cosine;
    of a difference one, which may be one number.

    ∂(1 − cos) is linear in the two vectors. Below MIN_NORM the own part vanishes (the clamped norm is a constant) and the
    cross part fades with ‖x‖ / MIN_NORM.
    """
    if dist == "cos":
        cosine, aa, rr = scalars
        g_cosine, floor = g * cosine, MIN_NORM**2
        aa_, rr_ = aa.clamp_min(floor), rr.clamp_min(floor)
        own_a = cross_a = own_r = cross_r = None
        if of_anchor:
            own_a = (g_cosine.sum(0) / torch.threshold(aa, floor, math.inf)).unsqueeze(-1)
            cross_a = (aa / rr_).sqrt_().mul_(g / aa_).unsqueeze(-1)
        if of_references:
            own_r = (g_cosine / torch.threshold(rr, floor, math.inf)).unsqueeze(-1)
            cross_r = (rr / aa_).sqrt_().mul_(g / rr_).unsqueeze(-1)
        return own_a, cross_a, own_r, cross_r
    if dist == "euclidean":
        # The direction diff / ‖diff‖; at and extremely near 0, where it does not exist in float32, it fades to 0.
        g = g / scalars[0].clamp_min(1e-18)
    elif dist == "l2":
        g = 2.0 * g
    return (g.unsqueeze(-1) if g.ndim else g,)


# --- in one piece ----------------------------------------------------------------------------------------------------


def _ready(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype of the computation and, so that sums of equal vectors are equal, with the features side by side."""
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride(-1) == 1 or _is_compiling() else x.contiguous()


def _measure(dist: str, anchor: Tensor, rs: Sequence[Tensor], dtype: torch.dtype) -> Tuple[Tensor, ...]:
    """Distances ``[R, B, ...]``; and of a cosine what backward needs: cos, a · a ``[B, ...]`` and r · r."""
    a, sums, squares = _ready(anchor, dtype), [], []
    for r in rs:
        r = _ready(r, dtype)
        if dist == "cos":
            sums.append((a * r).sum(-1))
            squares.append(r.square().sum(-1))
        else:
            step = a - r
            sums.append((step.abs_() if dist == "l1" else step.square_()).sum(-1))
    if dist == "cos":
        return _cosine_distances(_stacked(sums), a.square().sum(-1), _stacked(squares))
    return (_stacked(sums).sqrt_() if dist == "euclidean" else _stacked(sums),)


def _stacked(tensors: List[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _differentiate(
    dist: str,
    g: Tensor,
    scalars: Sequence[Tensor],
    anchor: Tensor,
    references: Sequence[Tensor],
    needs: Sequence[bool],
    used: Optional[Sequence[int]],
) -> List[Optional[Tensor]]:
    """The gradients that are needed: own · x − cross · y of a cosine for both its vectors, slope · (a − r) or its sign of a
    difference; nothing of references that are not ``used``."""
    dtype, rs, total = _compute_dtype(anchor, *references), _each(references, anchor), None
    slopes = _slopes(dist, g, scalars, needs[0], any(needs[1:]))
    a, wanted = _ready(anchor, dtype), [False] * len(rs)
    parts: Dict[int, Tensor] = {}
    if any(needs[1:]):
        wanted = [need for r, need in zip(references, needs[1:]) for _ in _each([r], anchor)]
    for i, j in enumerate(range(len(rs)) if used is None else used):
        r = _ready(rs[j], dtype)
        if dist == "cos":
            own_a, cross_a, own_r, cross_r = slopes
            if needs[0]:
                total = (a * own_a if total is None else total).addcmul_(r, cross_a[i], value=-1)
            if wanted[j]:
                parts[j] = (r * own_r[i]).addcmul_(a, cross_r[i], value=-1)
        else:
            slope = slopes[0] if slopes[0].ndim == 0 else slopes[0][i]
            step = (a - r).sign_() if dist == "l1" else a - r
            if wanted[j]:
                parts[j] = step * -slope
            if needs[0]:
                total = step.mul_(slope) if total is None else total.addcmul_(step, slope)
    results = [None if total is None else total.to(anchor.dtype)]
    j = 0
    for x, need in zip(references, needs[1:]):
        count, several = (x.shape[1], True) if x.ndim > anchor.ndim else (1, False)
        found = [parts[i] if i in parts else torch.zeros_like(a) for i in range(j, j + count)] if need else []
        results.append((torch.stack(found, 1) if several else found[0]).to(x.dtype) if need else None)
        j += count
    return results


class _MeanDifference(torch.autograd.Function):
    """The mean over tokens of ‖a − b‖² or Σ|a − b|: of few numbers, where every call counts, one sum over all of them.

    Saved for backward: a − b, as large as an input.
    """

    @staticmethod
    def forward(ctx: Any, dist: str, a: Tensor, b: Tensor) -> Tensor:
        dtype, tokens = _compute_dtype(a, b), a.shape[:-1].numel()
        step = (a if a.dtype == dtype else a.to(dtype)) - b
        ctx.save_for_backward(step)
        ctx.dtypes, ctx.signs, ctx.slope = (a.dtype, b.dtype), dist == "l1", (1.0 if dist == "l1" else 2.0) / tokens
        return (step.abs() if ctx.signs else step.square()).sum() / tokens

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tuple[Optional[Tensor], ...]:
        _refuse_second_order()
        (step,), (_, need_a, need_b) = ctx.saved_tensors, ctx.needs_input_grad
        slope = g * ctx.slope
        to_a = step.sign().mul_(slope) if ctx.signs else step * slope
        to_b = (-to_a).to(ctx.dtypes[1]) if need_b else None
        return None, (to_a if to_a.dtype == ctx.dtypes[0] else to_a.to(ctx.dtypes[0])) if need_a else None, to_b


# --- block by block --------------------------------------------------------------------------------------------------


def _measure_in_blocks(dist: str, anchor: Tensor, rs: Sequence[Tensor], dtype: torch.dtype) -> Tuple[Tensor, ...]:
    """:func:`_measure`, block by block, with the scalars of the tokens: one thread's work is less than calling others to it."""
    a, rs, shape = _as_rows(anchor), [_as_rows(r) for r in rs], anchor.shape[:-1]
    work = _Blocks([a, *rs], dtype, dots=dist == "cos")
    d, kept = work.per_token(len(rs)), [work.per_token(n) for n in (len(rs), 1, len(rs))] if dist == "cos" else []

    def measure(block: Block, bench: _Bench) -> None:
        x, every = bench.load("anchor", a, block), (slice(None), *block)
        if dist == "cos":
            cosine, (aa,), rr = kept
            bench.dot(x, x, aa, block)
            for j, rows in enumerate(rs):
                r = bench.load("reference", rows, block)
                bench.dot(r, r, rr[j], block)
                bench.dot(x, r, cosine[j], block)
            d[every], cosine[every], *_ = _cosine_distances(cosine[every], aa[block], rr[every])
            return
        for j, rows in enumerate(rs):
            diff = torch.sub(x, bench.load("reference", rows, block), out=bench.scratch("product", x.shape))
            bench.sum(diff.abs_() if dist == "l1" else diff.square_(), d[j], block)
        if dist == "euclidean":
            d[every].sqrt_()

    work.each(measure)
    if dist != "cos":
        return (d.view(-1, *shape),)
    cosine, (aa,), rr = kept
    return d.view(-1, *shape), cosine.view(-1, *shape), aa.view(shape), rr.view(-1, *shape)


def _differentiate_in_blocks(
    dist: str,
    g: Tensor,
    scalars: Sequence[Tensor],
    anchor: Tensor,
    references: Sequence[Tensor],
    needs: Sequence[bool],
    used: Optional[Sequence[int]],
) -> List[Optional[Tensor]]:
    """:func:`_differentiate`, block by block, into the gradients themselves."""
    results = [_large(x.shape, x.dtype, x.device) if need else None for x, need in zip((anchor, *references), needs)]
    a, to_a = _as_rows(anchor), None if results[0] is None else _as_rows(results[0])
    rs = [_as_rows(r) for r in _each(references, anchor)]
    to_rs: List[Optional[Tensor]] = []
    for reference, result in zip(references, results[1:]):
        count = reference.shape[1] if reference.ndim > anchor.ndim else 1
        to_rs += [None] * count if result is None else [_as_rows(x) for x in _each([result], anchor)]
    if used is not None:
        for j, to_r in enumerate(to_rs):
            if to_r is not None and j not in used:
                to_r.zero_()
        rs, to_rs = [rs[j] for j in used], [to_rs[j] for j in used]
    g, *scalars = (x if x.ndim == 0 else x.reshape(-1, *a.shape[:2]) for x in (g, *scalars))
    if dist == "cos":
        scalars[1] = scalars[1][0]

    def write(block: Block, bench: _Bench) -> None:
        every = (..., *block)
        slopes = _slopes(dist, g[every] if g.ndim else g, [x[every] for x in scalars], to_a is not None, any(needs[1:]))
        x, total = bench.load("anchor", a, block), None
        if to_a is not None and dist == "cos":
            total = torch.mul(x, slopes[0], out=bench.target("total", to_a, block))
        for j, (rows, to_r) in enumerate(zip(rs, to_rs)):
            r = bench.load("reference", rows, block)
            if dist == "cos":
                _, cross_a, own_r, cross_r = slopes
                if total is not None:
                    total.addcmul_(r, cross_a[j], value=-1)
                if to_r is not None:
                    part = torch.mul(r, own_r[j], out=bench.target("product", to_r, block))
                    bench.store(part.addcmul_(x, cross_r[j], value=-1), to_r, block)
                continue
            slope = slopes[0][j] if slopes[0].ndim else slopes[0]
            home = to_a if total is None else None  # the first difference is where the gradient is to be
            out = bench.scratch("product", x.shape) if home is None else bench.target("total", home, block)
            step = torch.sub(x, r, out=out)
            step = step.sign_() if dist == "l1" else step
            if to_r is not None:
                bench.store(torch.mul(step, -slope, out=bench.target("part", to_r, block)), to_r, block)
            if home is not None:
                total = step.mul_(slope)
            elif total is not None:
                total.addcmul_(step, slope)
        if to_a is not None and total is not None:
            bench.store(total, to_a, block)

    _Blocks([a, *rs], _compute_dtype(anchor, *references)).each(write, backwards=True)
    return results


Block = Tuple[slice, slice]
WHOLE: Block = (slice(None), slice(None))


def _part(rows: Tensor, block: Block) -> Tensor:
    return rows if block is WHOLE else rows[block]


def _large(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """New memory; of NumPy if torch has one, which on Linux asks for pages of 2 MiB instead of 4 KiB for its arrays: at its first use
    each page is a call to the system, and those for a gradient in small pages take longer than all its numbers do.
    """
    x = torch.empty(shape, dtype=dtype, device=device)  # takes nothing until it is written to
    size, array = x.numel() * x.element_size(), _numpys_array()
    if array is None or device.type != "cpu" or type(x) is not Tensor or size < LARGE_BYTES:
        return x
    return torch.from_numpy(array(size, "uint8")).view(dtype).view(x.shape)


@functools.cache
def _numpys_array() -> Optional[Callable[[int, str], Any]]:
    """NumPy's class of arrays, whose call makes one that is not filled; None where torch works without it."""
    try:
        return type(torch.empty(0).numpy())
    except RuntimeError:
        return None


class _Blocks:
    """The pieces in which several rows ``[B, T, D]`` are worked through, one after the other or by several threads.

    Backward takes the blocks in reverse, because the last of the forward pass may still be in the cache.

    A few threads each take a whole block, with torch's own threads off, instead of sharing every operation in it: on a busy
    machine torch's threads wait after each operation for the one that was held up, and these only at the end. What comes out
    does not depend on their number.
    """

    def __init__(self, rows: Sequence[Tensor], dtype: torch.dtype, dots: bool = False):
        self.rows, self.dtype, self.threads = rows[0], dtype, 1
        on_cpu, shape = self.rows.device.type == "cpu", self.rows.shape
        batch, tokens, features = shape
        size, limit = shape.numel(), BLOCK_ELEMENTS * (1 if on_cpu else 16)
        if on_cpu and size >= SHARED_ELEMENTS and all(type(x) is Tensor for x in rows):
            self.threads = min(torch.get_num_threads(), MOST_THREADS)
            if self.threads > 1:
                limit = min(limit, max(SMALLEST_SHARE, math.ceil(size / (2 * self.threads))))
        self.blocks = list(_blocks(batch, tokens, features, limit))
        pays = dots and on_cpu and size >= ONE_PASS_ELEMENTS and features <= ONE_PASS_FEATURES
        # A block of several samples is one matrix only where they lie one after the other.
        self.one_pass = pays and (
            _part(self.rows, self.blocks[0]).shape[0] == 1 or all(x.is_contiguous() for x in rows)
        )
        self.diagonals: Dict[int, Tensor] = {}
        if self.one_pass:  # here, since threads cannot share what catches warnings
            sizes = {_part(self.rows, block).shape[:2].numel() for block in self.blocks}
            self.diagonals = {n: self._diagonal(n) for n in sizes}

    def per_token(self, count: int) -> Tensor:
        return torch.empty(count, *self.rows.shape[:2], dtype=self.dtype, device=self.rows.device)

    def _diagonal(self, n: int) -> Tensor:
        """The pattern of n entries on the diagonal; blocks have one size, or two."""
        at = torch.arange(n + 1, device=self.rows.device)
        values = torch.zeros(n, dtype=self.dtype, device=self.rows.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sparse tensors are beta
            return torch.sparse_csr_tensor(at, at[:-1], values, (n, n), check_invariants=False)

    def each(self, work: Callable[[Block, _Bench], None], backwards: bool = False) -> None:
        """``work(block, bench)`` for every block."""
        order = self.blocks[::-1] if backwards else self.blocks
        threads = min(self.threads, len(order))
        if threads < 2:
            bench = _Bench(self)
            for block in order:
                work(block, bench)
            return
        todo, inference = deque(order), torch.is_inference_mode_enabled()

        def some() -> None:
            bench = _Bench(self)
            with torch.inference_mode(inference), torch.no_grad():
                while todo:
                    try:
                        block = todo.popleft()
                    except IndexError:  # another thread was faster
                        return
                    work(block, bench)

        jobs = [_crew().submit(some) for _ in range(threads)]
        try:
            for job in jobs:
                job.result()
        finally:
            todo.clear()  # one that failed, or was interrupted, leaves the rest undone


@functools.cache
def _crew() -> ThreadPoolExecutor:
    """Threads without threads of torch's own, made once in a process; those of the caller are left as they are."""
    size, before = min(os.cpu_count() or 1, MOST_THREADS), torch.get_num_threads()
    crew, ready = ThreadPoolExecutor(size, "losses"), threading.Barrier(size)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first question sets its number to the process's: it has to come first
        torch.set_num_threads(1)
        ready.wait()

    try:
        for job in [crew.submit(begin) for _ in range(size)]:
            job.result()
    except BaseException:
        ready.abort()
        raise
    finally:
        torch.set_num_threads(before)  # the number for threads to come, which each of them set to 1
    return crew


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_crew.cache_clear)  # a fork has none of the threads


class _Bench:
    """What one thread works a block with: memory of a block's size, which is used again.

    With ``out=`` into that memory, every pass but the first reads from the cache.
    """

    def __init__(self, plan: _Blocks):
        self.plan, self.dtype = plan, plan.dtype
        self.memory: Dict[str, Tensor] = {}

    def scratch(self, name: str, shape: torch.Size) -> Tensor:
        """Memory for a block of ``shape`` (no block is larger than the first one)."""
        if name not in self.memory:
            rows = self.plan.rows
            self.memory[name] = _large(_part(rows, self.plan.blocks[0]).shape, self.dtype, rows.device)
        memory = self.memory[name]
        return memory if memory.shape == shape else memory[: shape[0], : shape[1]]

    def load(self, name: str, rows: Tensor, block: Block) -> Tensor:
        """A block in the dtype of the computation with its features side by side: a view if it is so already."""
        x = _part(rows, block)
        return x if x.dtype == self.dtype and x.stride(-1) == 1 else self.scratch(name, x.shape).copy_(x)

    def dot(self, x: Tensor, y: Tensor, to: Tensor, block: Block) -> None:
        """Σ x·y over the features, into its block of ``to``. One order of adding for all, so that Σ x·y = Σ x·x where y
        equals x.

        Where it pays, in one pass without the products in between: the diagonal of x yᵀ, and none of its other entries.
        """
        if self.plan.one_pass:
            tokens = x.shape[:-1]
            diagonal, x, y = self.plan.diagonals[tokens.numel()], x.flatten(0, 1), y.flatten(0, 1)
            to[block] = torch.sparse.sampled_addmm(diagonal, x, y.t(), beta=0.0).values().view(tokens)
        else:
            self.sum(torch.mul(x, y, out=self.scratch("product", x.shape)), to, block)

    def sum(self, products: Tensor, to: Tensor, block: Block) -> None:
        """Over the features, into its block of ``to``."""
        torch.sum(products, -1, out=_part(to, block))

    def target(self, name: str, rows: Tensor, block: Block) -> Tensor:
        """Where to compute what :meth:`store` puts into ``rows``: there, if they have the dtype of the computation."""
        x = _part(rows, block)
        return x if x.dtype == self.dtype else self.scratch(name, x.shape)

    def store(self, value: Tensor, rows: Tensor, block: Block) -> None:
        if rows.dtype != self.dtype:
            rows[block] = value


def _blocks(batch: int, tokens: int, dim: int, limit: Optional[int] = None) -> Iterator[Tuple[slice, slice]]:
    """Slices over batch and tokens, each covering about BLOCK_ELEMENTS numbers, the first one being the largest."""
    limit = limit or BLOCK_ELEMENTS
    if batch * tokens * dim <= limit:
        yield WHOLE
    elif tokens * dim >= limit:
        step = max(1, limit // dim)
        step = math.ceil(tokens / math.ceil(tokens / step))  # equal pieces
        for b in range(batch):
            for t in range(0, tokens, step):
                yield slice(b, b + 1), slice(t, t + step)
    else:
        step = max(1, limit // (tokens * dim))
        for b in range(0, batch, step):
            yield slice(b, b + step), slice(None)


def _refuse_second_order() -> None:
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError("the losses have no derivatives of second order: call backward without create_graph=True")


def _as_rows(x: Tensor) -> Tensor:
    """``[B, ..., D]`` as ``[B, T, D]``; a view unless the token dimensions themselves are permuted."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


# ---------------------------------------------------------------------------------------------------------------------
# InfoNCE against a bank, a few anchors at a time
# ---------------------------------------------------------------------------------------------------------------------


def _bank_parts(
    anchor: Tensor, bank: Tensor, d_pos: Tensor, scale: float, agg: str, token_weights: Optional[Tensor]
) -> Tuple[float, Tensor, Tensor, Optional[Tensor], Tensor]:
    """What :class:`_BankInfoNCE` takes: scale, features of anchors and bank, token weights or None, positive scores."""
    a, n = (_as_rows(_UnitVectors.apply(x)) for x in (anchor, bank))
    tokens = a.shape[1]
    w = None if token_weights is None else token_weights.flatten(1).to(a.dtype)
    if agg == "max" and tokens > 1:
        return scale, a, n, a.new_ones(a.shape[:2]) if w is None else w, d_pos * -scale
    # The sum over tokens is one product: Σ_t w_t (1 − cos_t) = Σ_t w_t − (w·a)·n over all features of all tokens.
    constant: Union[float, Tensor] = float(tokens)
    if w is not None:
        constant = w.sum(1)
        if agg == "mean":
            total = torch.where(constant > 0, constant, torch.ones_like(constant))
            w, constant = w / total.unsqueeze(1), constant / total
        a = a * w.unsqueeze(-1)
    positive_scores = (constant - d_pos) * scale if w is not None or agg != "mean" else (1.0 - d_pos) * scale
    if w is None and agg == "mean":
        scale = scale / tokens
    a = a.sum(1) if n.shape[1] < tokens else a.flatten(1)  # [N, D]: every token meets the same row
    return scale, a, n.flatten(1), None, positive_scores


def _unit_vectors(x: Tensor) -> Tuple[Tensor, Tensor]:
    """x / max(‖x‖, MIN_NORM) over the last dimension, and ‖x‖."""
    norm = x.square().sum(-1, keepdim=True).sqrt_()
    return x / norm.clamp_min(MIN_NORM), norm


def _through_unit_vectors(unit: Tensor, norm: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the vectors from that of the unit vectors; below MIN_NORM it fades."""
    along = (grad * unit).sum(-1, keepdim=True).mul_(norm >= MIN_NORM)
    scale = norm.clamp_max(MIN_NORM) / (norm.clamp_min(MIN_NORM) * MIN_NORM)
    return torch.addcmul(grad, unit, along, value=-1).mul_(scale)


class _UnitVectors(torch.autograd.Function):
    """x / max(‖x‖, MIN_NORM) over the last dimension, with the gradient fading below MIN_NORM."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        unit, norm = _unit_vectors(x)
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _refuse_second_order()
        unit, norm = ctx.saved_tensors
        return _through_unit_vectors(unit, norm, grad)


class _VectorInfoNCE(torch.autograd.Function):
    """log(1 + Σ_j exp(scale · (a_i·n_j − a_i·p_i))) of few vectors ``[B, D]``, all of them made unit vectors, against a bank
    ``[N, D]``, or against the other positives.

    Saved for backward: the unit vectors, the exponentials and their sums.
    """

    @staticmethod
    def forward(ctx: Any, scale: float, anchor: Tensor, positive: Tensor, bank: Optional[Tensor]) -> Tensor:
        given = [anchor, positive] if bank is None else [anchor, positive, bank]
        units, norms = _unit_vectors(torch.cat(given).to(_compute_dtype(*given)))
        batch = len(anchor)
        a, p, n = units[:batch], units[batch : 2 * batch], units[batch:] if bank is None else units[2 * batch :]
        with _full_precision(anchor.device):
            powers = torch.addmm((a * p).sum(1, keepdim=True), a, n.t(), beta=-scale, alpha=scale).exp_()
        if bank is None:
            powers.fill_diagonal_(0.0)
        total = powers.sum(1, keepdim=True)
        ctx.save_for_backward(powers, total, units, norms)
        ctx.scale, ctx.dtypes, ctx.in_batch = scale, [x.dtype for x in given], bank is None
        return total.log1p().squeeze(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tuple[Optional[Tensor], ...]:
        _refuse_second_order()
        (powers, total, units, norms), needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        batch = len(powers)
        parts = [slice(0, batch), slice(batch, 2 * batch), slice(2 * batch, None)]
        a, p, n = units[parts[0]], units[parts[1]], units[parts[1] if ctx.in_batch else parts[2]]
        factor, scale = g.unsqueeze(1) / (total + 1.0), ctx.scale
        slopes, own = powers * factor, total * -factor  # of the scores, and of the positive's
        grads: List[Optional[Tensor]] = [None] * 3
        with _full_precision(g.device):
            if needs[0]:
                grads[0] = torch.addmm(p * own, slopes, n, beta=scale, alpha=scale)
            if needs[1] and ctx.in_batch:
                grads[1] = torch.addmm(a * own, slopes.t(), a, beta=scale, alpha=scale)
            elif needs[1]:
                grads[1] = a * own * scale
            if needs[2]:
                grads[2] = torch.mm(slopes.t(), a) * scale
        for i, grad in enumerate(grads):
            if grad is not None:
                grads[i] = _through_unit_vectors(units[parts[i]], norms[parts[i]], grad).to(ctx.dtypes[i])
        return (None, *grads)


class _BankInfoNCE(torch.autograd.Function):
    """log(1 + Σ_j exp(s_ij − p_i)) of every anchor i, for scores s against a bank and p of the positive.

    Scores exist for a few anchors at a time. Without token weights s_ij = scale · a_i·n_j of ``[B, F]`` and ``[N, F]``; with
    ``w`` ``[B, T]``, −scale times the largest w_t (1 − a_it·n_jt) of ``[B, T, D]`` and ``[N, T, D]`` or ``[N, 1, D]``.
    ``skip_own`` leaves out j = i. With ``factors`` ``[B]`` the result is Σ_i factor_i · loss_i, whose gradient, but for one
    number, is known as soon as the scores are and is made with them; without, ``[B]``, and the scores are made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        now: bool,
        skip_own: bool,
        scale: float,
        a: Tensor,
        n: Tensor,
        w: Optional[Tensor],
        p: Tensor,
        factors: Optional[Tensor],
    ) -> Tensor:
        ctx.options, needs = (skip_own, scale), ctx.needs_input_grad[3:]
        if factors is None:
            loss, _ = _bank_info_nce(skip_own, scale, a, n, w, p, None, ())
            ctx.save_for_backward(a, n, w, p)
            return loss
        loss, grads = _bank_info_nce(skip_own, scale, a, n, w, p, factors, needs if now else ())
        ctx.save_for_backward(*grads, loss if needs[-1] else None)
        return (loss * factors).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tuple[Optional[Tensor], ...]:
        _refuse_second_order()
        if g.ndim:
            skip_own, scale = ctx.options
            a, n, w, p = ctx.saved_tensors
            _, grads = _bank_info_nce(skip_own, scale, a, n, w, p, g, ctx.needs_input_grad[3:])
            return (None, None, None, *grads, None)
        return (None, None, None, *(None if x is None else x * g for x in ctx.saved_tensors))


def _bank_info_nce(
    skip_own: bool,
    scale: float,
    a: Tensor,
    n: Tensor,
    w: Optional[Tensor],
    p: Tensor,
    factors: Optional[Tensor],
    needs: Sequence[bool],
) -> Tuple[Tensor, List[Optional[Tensor]]]:
    """Losses, and the gradients of Σ factor · loss for those of a, n, w and p that need one."""
    loss = torch.empty_like(p)
    grads = [torch.zeros_like(x) if need and x is not None else None for x, need in zip((a, n, w, p), needs)]
    tokens = 1 if w is None else w.shape[1]
    step = max(1 if w is not None else BANK_ROWS, TILE_ELEMENTS // (len(n) * tokens))
    scratch = None if _is_compiling() or w is not None else a.new_empty(min(step, len(a)), len(n))
    with _full_precision(a.device):
        for start in range(0, len(a), step):
            rows = slice(start, min(start + step, len(a)))
            if w is None:
                out = None if scratch is None else scratch[: rows.stop - start]
                s = torch.mm(a[rows] * scale, n.T, out=out)
            else:
                d = 1.0 - torch.einsum("btd,ntd->bnt", a[rows], n.expand(-1, tokens, -1))
                s = (d * w[rows].unsqueeze(1)).amax(-1).mul_(-scale)
            if skip_own:
                s.diagonal(start).fill_(-math.inf)
            top = s.amax(1, keepdim=True)
            top = torch.where(top == -math.inf, torch.zeros_like(top), top)  # a batch of one has no others
            total = s.sub_(top).exp_().sum(1)
            excess = total.log() + top.squeeze(1) - p[rows]
            loss[rows] = F.softplus(excess)
            if factors is None or not any(needs):
                continue
            slope = factors[rows] * excess.sigmoid()  # that of the log of the sum; s / total are its shares
            share = (slope * scale / torch.where(total > 0, total, torch.ones_like(total))).unsqueeze(1)
            if grads[3] is not None:
                grads[3][rows] = -slope
            if w is not None:
                _add_max_gradients(grads, rows, a, n, w, d, s.mul_(-share))
                continue
            if grads[0] is not None:
                grads[0][rows] = torch.mm(s, n).mul_(share)
            if grads[1] is not None:
                grads[1].addmm_(s.T, a[rows] * share)
    return loss, grads


def _add_max_gradients(
    grads: List[Optional[Tensor]], rows: slice, a: Tensor, n: Tensor, w: Tensor, d: Tensor, g: Tensor
) -> None:
    """Adds those of Σ g · max_t(w d) for some anchors; tokens that share the maximum share its gradient."""
    weighted = d * w[rows].unsqueeze(1)
    share = (weighted == weighted.amax(-1, keepdim=True)).to(d.dtype)
    share *= (g / share.sum(-1)).unsqueeze(-1)
    if grads[2] is not None:
        grads[2][rows] = (share * d).sum(1)
    share *= -w[rows].unsqueeze(1)  # from d to the cosines
    if grads[0] is not None:
        grads[0][rows] = torch.einsum("bnt,ntd->btd", share, n.expand(-1, a.shape[1], -1))
    if grads[1] is not None:
        step = torch.einsum("bnt,btd->ntd", share, a[rows])
        grads[1] += step if n.shape[1] > 1 else step.sum(1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _check_ordinary(anchor: Tensor, *references: Tensor) -> None:
    """None was made in inference mode, where a gradient is wanted."""
    if _is_compiling() or not torch.is_grad_enabled():
        return
    tensors = (anchor, *references)
    for i, x in enumerate(tensors):
        if x.is_inference() and any(y.requires_grad for y in tensors):
            name = "anchor" if i == 0 else f"references[{i - 1}]"
            raise ValueError(
                f"{name}: expected an ordinary tensor, got one made under torch.inference_mode(), which backward "
                "cannot use; clone it outside inference mode"
            )


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _on_cpu(x: Tensor) -> bool:
    """Whether values may be looked at without stalling a GPU (or breaking a compiled graph)."""
    return x.device.type == "cpu" and not _is_compiling()


_is_compiling: Callable[[], bool] = getattr(
    getattr(torch, "compiler", None), "is_compiling", bool
)  # torch 2.0 has none


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    for t in tensors:  # any() takes twice as long
        if t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _full_precision(device: torch.device) -> ContextManager[Any]:
    """Autocast off: inside it a matrix product would be rounded to half precision."""
    try:
        try:
            on = _is_compiling() or torch.is_autocast_enabled(device.type)  # to ask is a tenth of the context's time
        except TypeError:  # torch before 2.4 cannot be asked
            on = True
        return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()
    except RuntimeError:  # a device type without autocast
        return contextlib.nullcontext()


def _check_option(name: str, value: str, options: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")


def _check_number(name: str, value: float, minimum: float, exclusive: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    if not is_number or value < minimum or (exclusive and value == minimum):
        raise ValueError(f"{name}: expected a number {'>' if exclusive else '>='} {minimum:g}, got {value!r}")


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")


def _check_embeddings(**named: Tensor) -> None:
    """All are ``[B, ..., D]`` of one shape on one device, floating and not empty."""
    first_name, first = next(iter(named.items()))
    for name, x in named.items():
        _check_tensor(name, x)
        if x.ndim < 2:
            raise ValueError(f"{name}: expected [B, D], [B, P, D], [B, H, W, D] or [B, ..., D], got {_shape(x)}")
        if x.numel() == 0:
            raise ValueError(f"{name}: expected at least one sample, token and feature, got empty shape {_shape(x)}")
        if x.shape != first.shape:
            raise ValueError(f"{name}: expected shape {_shape(first)} like {first_name}, got {_shape(x)}")
    _check_same_device(**named)
    if not _is_compiling() and _channels_first(first.shape):
        _warn_once(
            f"{first_name}: {_shape(first)} is taken for [B, H, W, D], tokens of {first.shape[-1]} features; are the channels last? "
            "Latents [B, C, h, w] become embeddings by .movedim(1, -1)"
        )


def _look_at_batch(z_pred: Tensor) -> None:
    """A warning where ``[P, D]`` looks like the tokens of one picture, not like a batch of an edit model's outputs."""
    if z_pred.ndim == 2 and len(z_pred) >= 64 and not _is_compiling():
        _warn_once(
            f"z_pred: {_shape(z_pred)} is taken for a batch of {len(z_pred)} samples with a vector each; tokens of one picture are "
            "[1, P, D], by [None]"
        )


def _channels_first(shape: torch.Size) -> bool:
    """Whether a shape looks like an autoencoder's latents ``[B, C, h, w]``: few channels before a larger picture."""
    if len(shape) != 4 or shape[1] not in (4, 8, 16, 32):
        return False
    height, width = shape[2], shape[3]
    return min(height, width) >= max(24, shape[1] + 1) and max(height, width) <= 4 * min(height, width)


def _check_same_device(**named: Tensor) -> None:
    first_name, first = next(iter(named.items()))
    for name, x in named.items():
        if x.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} like {first_name}, got {x.device}")


def _check_distances(name: str, d: Tensor, dims: Sequence[int]) -> None:
    _check_tensor(name, d)
    if d.ndim not in dims or d.numel() == 0:
        expected = " or ".join({1: "[B]", 2: "[B, K]"}[n] for n in dims)
        raise ValueError(f"{name}: expected distances {expected} with B >= 1, got shape {_shape(d)}")


def _check_margin_tensor(margin: Tensor, negatives: torch.Size, device: torch.device) -> None:
    """``[]``, ``[B]`` or ``[B, K]`` where the negatives' distances are ``[B]`` or ``[B, K]``."""
    if margin.shape not in (negatives, negatives[:1], torch.Size([])):
        ways = " or ".join(dict.fromkeys(str(list(shape)) for shape in (negatives[:1], negatives)))
        raise ValueError(f"margin: expected a number or shape {ways}, got {_shape(margin)}")
    if margin.ndim and margin.device != device:
        raise ValueError(f"margin: expected device {device} like the distances, got {margin.device}")


def _check_labels(y: Union[Tensor, float], batch: int, device: torch.device) -> None:
    if isinstance(y, Tensor):
        if y.shape not in (torch.Size([batch]), torch.Size([])):
            raise ValueError(f"y: expected a number or shape [{batch}], one label per sample, got {_shape(y)}")
        if y.is_complex():
            raise ValueError(f"y: expected real labels in 0…1, got {y.dtype}")
        if y.device != device:
            raise ValueError(f"y: expected device {device} like the embeddings, got {y.device}")
        outside = y.dtype != torch.bool and _on_cpu(y) and (y.amin().item() < 0 or y.amax().item() > 1)
    elif isinstance(y, (bool, int, float)):
        outside = not 0 <= y <= 1
    else:
        raise ValueError(f"y: expected a tensor of labels or one number, got {y!r}")
    if outside:
        came = f"values from {y.min()} to {y.max()}" if isinstance(y, Tensor) else repr(y)
        raise ValueError(f"y: expected labels in 0…1 (1 = same), got {came}")


def _negative_list(name: str, negatives: Negatives, anchor: Tensor) -> List[Tensor]:
    """The references that the negatives are: one tensor ``[B, ..., D]`` or ``[B, K, ..., D]``, or several of the first."""
    if isinstance(negatives, Tensor):
        _check_tensor(name, negatives)
        if negatives.ndim == anchor.ndim + 1:
            expected = [anchor.shape[0], "K", *anchor.shape[1:]]
            if negatives.numel() == 0 or negatives.shape[:1] + negatives.shape[2:] != anchor.shape:
                listed = ", ".join(map(str, expected))
                raise ValueError(f"{name}: expected shape [{listed}] with K >= 1, got {_shape(negatives)}")
            items = [negatives]
        elif negatives.ndim == anchor.ndim:
            items = [negatives]
        else:
            ways = f"{_shape(anchor)} or [{', '.join(map(str, [anchor.shape[0], 'K', *anchor.shape[1:]]))}]"
            raise ValueError(f"{name}: expected shape {ways}, got {_shape(negatives)}")
    elif isinstance(negatives, (list, tuple)):
        items = list(negatives)
    else:
        raise ValueError(f"{name}: expected a tensor or a list of tensors, got {type(negatives).__name__}")
    if not items:
        raise ValueError(f"{name}: expected at least one negative, got an empty list")
    if isinstance(negatives, Tensor) and negatives.ndim > anchor.ndim:  # its shape is checked already
        _check_same_device(**{"the anchor": anchor, name: negatives})
        return items
    named: Dict[str, Tensor] = {"the anchor": anchor}
    named.update({name if len(items) == 1 else f"{name}[{i}]": x for i, x in enumerate(items)})
    _check_embeddings(**named)
    return items


def _shared_bank(negatives: Negatives, anchor: Tensor) -> Optional[Tensor]:
    """The bank ``[N, D]`` or ``[N, ..., D]``; None if the negatives belong to the samples."""
    if not isinstance(negatives, Tensor) or negatives.ndim not in (2, anchor.ndim):
        return None
    _check_tensor("negatives", negatives)
    fits = negatives.shape[1:] in (anchor.shape[1:], anchor.shape[-1:])
    if negatives.numel() == 0 or not fits:
        tokens = "".join(f"{n}, " for n in anchor.shape[1:-1])
        ways = f"[N, {anchor.shape[-1]}]" + (f" or [N, {tokens}{anchor.shape[-1]}]" if tokens else "")
        raise ValueError(f"negatives: expected a bank {ways}, or [B, K, ...] per sample, got {_shape(negatives)}")
    _check_same_device(anchor=anchor, negatives=negatives)
    return negatives


def _split_weights(
    weights: Optional[Tensor], shape: torch.Size, device: torch.device
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """(per sample ``[B]``, per token ``[B, ...]``), at most one of which is not None, for tokens of ``shape``."""
    if weights is None:
        return None, None
    if not isinstance(weights, Tensor):
        raise ValueError(f"weights: expected a tensor or None, got {type(weights).__name__}")
    if weights.is_complex():
        raise ValueError(f"weights: expected real numbers, got {weights.dtype}")
    if weights.device != device:
        raise ValueError(f"weights: expected device {device} like the embeddings, got {weights.device}")
    if weights.shape not in (shape, shape[:1]):
        ways = f"{list(shape[:1])} per sample" + (f" or {list(shape)} per token" if len(shape) > 1 else "")
        hint = "; are the channels of the embeddings last, and is the batch first?" if weights.ndim > 1 else ""
        raise ValueError(f"weights: expected shape {ways}, got {_shape(weights)}{hint}")
    if _on_cpu(weights) and bool((weights < 0).any()):
        raise ValueError(f"weights: expected values >= 0, got a minimum of {weights.min().item():g}")
    if weights.ndim > 1 and _on_cpu(weights) and not bool(weights.flatten(1).any(1).all()):
        _warn_once(
            "weights: all tokens of a sample have weight 0, so that its distances are 0 and nothing is learnt from it; is its mask "
            "empty?"
        )
    return (weights, None) if weights.ndim == 1 else (None, weights)


_warned: Set[str] = set()


def _warn_once(text: str) -> None:
    """A UserWarning the first time in a process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=4)
