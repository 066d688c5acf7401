"""The gradient of a pass: each term's part of it at the model's output, and which term is to blame if it is not finite."""

from __future__ import annotations

import math
from typing import Callable, NamedTuple, NoReturn, Optional, Sequence

import torch
from torch import Tensor

from ..lora.lora import LoRA
from ..objective import ObjectiveReport
from ..processes import Processes
from ..runs.log import Sample


class NonFinite(ArithmeticError):
    """A loss or a gradient is NaN or infinite; the message names the term, the pair and t. Nothing was updated with it."""


class Part(NamedTuple):
    """A term of a pass, ``[B]`` each: the loss, what it adds to the total, whether its hinge is open, whether it counts.

    ``scale`` is a further factor on what it adds; a part whose scale is 0 is only measured.
    """

    name: str
    raw: Tensor
    weighted: Tensor
    open: Optional[Tensor] = None
    counts: Optional[Tensor] = None
    scale: float = 1.0

    @property
    def added(self) -> Tensor:
        """What it adds to the total, ``[B]``."""
        return self.weighted if self.scale == 1.0 else self.scale * self.weighted


def parts_of(report: ObjectiveReport, scale: Callable[[str], float] = lambda name: 1.0) -> list[Part]:
    """An objective's terms; samples outside a term's gate do not count.

    Args:
        scale: of a term by its name.
    """
    return [
        Part(
            r.term.name,
            r.per_sample,
            r.weighted_per_sample,
            r.open,
            None if r.sample_weights is None else r.sample_weights > 0,
            scale(r.term.name),
        )
        for r in report.terms
    ]


def output_gradient(parts: Sequence[Part], output: Tensor, measured: bool) -> tuple[Tensor, Tensor]:
    """d total / d v̂, the total being the sum of the parts' means over the batch.

    Args:
        parts: of the whole batch, with their graphs, which are used up.
        output: v̂ ``[rows, ...]`` of the samples that this process works on, a leaf.
        measured: whether to differentiate part by part as well. The gradient is the same, bit for bit: the parts' sum would
            be rounded in another order, and a run that measures would not be the run that does not.

    Returns:
        The gradient, and the norm of each part's gradient without its scale, per sample (of the sum over the batch)
        ``[rows, parts]``, with no parts if not measured.
    """
    counted = [part.weighted if part.weighted.requires_grad else None for part in parts]
    total = sum(part.added.mean() for part in parts if part.weighted.requires_grad and part.scale)
    whole = torch.zeros_like(output)
    if torch.is_tensor(total):
        whole = torch.autograd.grad(total, output, retain_graph=measured)[0]
    if not measured:
        return whole, output.new_zeros(len(output), 0)
    norms = []
    for k, weighted in enumerate(counted):
        gradient = torch.zeros_like(output)
        if weighted is not None:
            later = any(w is not None for w in counted[k + 1 :])
            found = torch.autograd.grad(weighted.sum(), output, retain_graph=later, allow_unused=True)[0]
            gradient = gradient if found is None else found
        norms.append(gradient.flatten(1).norm(dim=1))
    return whole, torch.stack(norms, 1)


def check_losses(parts: Sequence[Part], names: Sequence[str], t: Tensor, where: str) -> None:
    """NonFinite unless every loss is finite: one wait for the device, and only if something is wrong, which.

    Args:
        where: the run is, in words: ``"step 7"``.
    """
    if torch.stack([part.weighted.detach().float() for part in parts]).isfinite().all():
        return
    for part in parts:
        for i, value in enumerate(part.weighted):
            if not value.isfinite():
                what = f"the loss of {part.name!r} is {part.raw[i].item()}"
                raise NonFinite(_finding(where, what, names[i], t[i].item()))


def blame(
    parts: Sequence[Part],
    output: Tensor,
    finite: Sequence[bool],
    names: Sequence[str],
    t: Tensor,
    where: str,
    processes: Processes,
) -> NoReturn:
    """The gradient at the model's output is not finite although the losses are: raise NonFinite for the term.

    Args:
        parts: of the whole batch, computed anew; the graphs of the first ones are used up.
        finite: whether the gradient of the total is, for each sample of the batch.
    """
    for part in parts:
        gradient = None
        if part.weighted.requires_grad:
            gradient = torch.autograd.grad(part.weighted.sum(), output, retain_graph=True, allow_unused=True)[0]
        rows = finite_rows(torch.zeros_like(output) if gradient is None else gradient)
        for i, fine in enumerate(processes.whole(rows, len(names)).tolist()):
            if not fine:
                raise NonFinite(_finding(where, f"the gradient of {part.name!r} is not finite", names[i], t[i].item()))
    i = finite.index(False)
    raise NonFinite(_finding(where, "the gradient of the total is not finite", names[i], t[i].item()))


def finite_rows(gradient: Tensor) -> Tensor:
    """1 where all of a sample's gradient ``[B, ...]`` is finite, else 0; ``[B]`` in float32."""
    return gradient.isfinite().flatten(1).all(1).float()


def lora_gradient_norm(lora: LoRA, samples: Sequence[Sample], where: str) -> float:
    """The norm of the whole gradient; NonFinite if it is not finite, before anything is updated.

    The losses and their gradients at the model's output were finite, so the model's own backward pass is at fault; the
    sample with the largest loss is named, which is a guess if there are several.
    """
    gradients = [p.grad for p in lora.parameters() if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm().item() if gradients else 0.0  # one launch, not one each
    if math.isfinite(norm):
        return norm
    names = [
        name
        for name, layer in zip(lora.targets, lora.layers)
        if any(p.grad is not None and not p.grad.isfinite().all() for p in layer.parameters())
    ]
    sample = max(samples, key=lambda s: max(x.weighted for x in s.terms.values()))
    term = max(sample.terms, key=lambda n: sample.terms[n].weighted)
    what = (
        f"the gradient of {len(names)} layers ({', '.join(names[:3])}, …) is not finite; the largest loss is {term!r}"
    )
    raise NonFinite(_finding(where, what, sample.pair, sample.t))


def _finding(where: str, what: str, pair: str, t: float) -> str:
    return (
        f"Stopped at {where}: {what}, for pair {pair!r} at t = {t:.3f}. Nothing was updated with it. Lower the learning "
        "rate, raise the warm-up, or look at this pair and term"
    )
