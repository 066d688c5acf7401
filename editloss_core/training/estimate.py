"""The objective on the one-step estimate x̂0: in latents directly, and through a decoded crop for image encoders."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Callable, ContextManager, Mapping, Optional, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..encoders.base import Encoder
from ..objective import EditObjective, LossTerm, ObjectiveReport, TermReport, gradient_where
from ..processes import Processes
from .own_failures import ROLE, OwnFailures
from .prepare import Prepared

HALO = 4  # latents around the crop that are decoded too and cut off, so that the crop's border looks as in the whole

Decode = Callable[[Tensor], Tensor]
"""Latents in model space ``[B, C, h, w]`` → pictures ``[B, H, W, 3]`` in 0…1, differentiable.

One that checkpoints its own blocks says so by a true attribute ``checkpointing``; it is not checkpointed as a whole as well,
which would compute it a third time.
"""


class EstimateObjective:
    """Evaluates an objective on estimates of prepared pairs.

    Embeddings of gt, src and overlay come from the preparation and are constants. An encoder that reads the model's
    latents gets x̂0 as it is; for the others the pair's crop of x̂0 is decoded once, and shared.

    Of several samples, decoder and encoders are checkpointed: they keep little but their inputs, and the backward pass computes
    them again. Of a single one, decoder and the last encoder keep what they computed. A backward pass after each sample
    therefore takes a third less time, in the memory of one sample; who calls does it wherever :meth:`apart` says so.

    Args:
        objective: terms whose anchor is ``pred``.
        encoders: by the names that the terms use.
        prepared: pairs with the constant embeddings of these encoders.
        decode: decoder, needed if an encoder reads pictures.
        frozen: a context in which encoders run, for those that share the network that is trained: without its LoRA.
        device: where the constants are kept.
        processes: that work on each batch together.
        failures: the role hard_negative; without them no term may read it.

    Raises:
        ValueError: an encoder is missing, or a decoder is needed and there is none.
    """

    def __init__(
        self,
        objective: EditObjective,
        encoders: Mapping[str, Encoder],
        prepared: Prepared,
        decode: Optional[Decode] = None,
        frozen: Callable[[], ContextManager] = nullcontext,
        device: torch.device | str = "cpu",
        processes: Optional[Processes] = None,
        failures: Optional[OwnFailures] = None,
    ):
        self.objective, self.prepared, self.decode, self.frozen, self.device = (
            objective, prepared, decode, frozen, device,
        )  # fmt: skip
        self.failures = failures
        self.processes = processes or Processes()
        self.encoders = {name: encoders[name] for name in objective.encoders if name in encoders}
        missing = [name for name in objective.encoders if name not in encoders]
        if missing:
            raise ValueError(f"objective: its terms read {missing[0]!r}, which is not among the encoders")
        pictures = self._of_pictures(objective)
        if pictures and decode is None:
            raise ValueError(f"objective: {pictures[0]!r} reads pictures; connect a VAE that decodes the estimate")
        self.decodes = bool(pictures)

    def __call__(
        self,
        x0: Tensor,
        indices: Sequence[int],
        t: Tensor,
        sample_weights: Optional[Tensor] = None,
        details: bool = False,
        once: bool = False,
    ) -> Optional[ObjectiveReport]:
        """The terms that count at these noise levels; None if none does.

        The report is of the whole batch in every process; its graph is that of the samples that this process works on, so
        that the total has the gradient with respect to them that it has in one process. For terms that look across the
        batch, embeddings are gathered; for the others, losses.

        Args:
            x0: estimates ``[rows, C, h, w]`` of the samples that this process works on, with their graph.
            indices: of the pairs of the whole batch, of one bucket.
            t: ``[B]`` their noise levels; on the CPU, no gate has to wait for the device.
            sample_weights: ``[B]``, see :meth:`EditObjective.evaluate`.
            details: see there.
            once: the backward pass follows at once, and only once: the encoder that it meets first is not checkpointed, since
                all that it would free is computed again before anything else is. With a single sample it never is.
        """
        counting = self.objective.at(t)
        if not counting.terms:
            return None
        batch, rows = len(indices), self.processes.rows(len(indices))
        own = [indices[i] for i in rows]
        pictures = self._of_pictures(counting)
        # Those of pictures are the larger ones, and come last: the backward pass is through with them and the decoder before it
        # computes any of the others again.
        order = sorted(counting.encoders, key=pictures.__contains__)
        single, pixels = len(x0) == 1, None
        preds = {}
        for name in order:
            encoder, counts = self.encoders[name], counting.counts(t, (name,))[rows]
            keep = (once or single) and name == order[-1]
            if name in pictures:
                if pixels is None:
                    pixels = self._decode(gradient_where(counting.counts(t, pictures)[rows], x0), own, single)
                pred = self._run(encoder, gradient_where(counts, pixels), keep)
            else:
                z = self.prepared.vae.unscaled(gradient_where(counts, x0))
                pred = self._run(encoder.from_latents, z, keep)
            preds[name] = pred.to(self.device)
        if self.processes.count == 1:
            return self._evaluate(counting.terms, preds, indices, t, sample_weights, details)
        weights = None if sample_weights is None else sample_weights[rows]
        alone = [term for term in counting.terms if not term.across_batch]
        across = [term for term in counting.terms if term.across_batch]
        found: list[TermReport] = []
        if alone:
            found += self._of_whole_batch(self._evaluate(alone, preds, own, t[rows], weights, details).terms, batch)
        if across:
            whole = {name: self.processes.whole(preds[name], batch) for name in EditObjective(across).encoders}
            found += self._evaluate(across, whole, indices, t, sample_weights, details).terms
        return ObjectiveReport.of(found, counting.terms)

    def apart(self, t: Tensor) -> bool:
        """Whether samples of these noise levels are best evaluated and differentiated one after the other: something is decoded,
        and no term compares them."""
        counting = self.objective.at(t)
        return bool(self._of_pictures(counting)) and not any(term.across_batch for term in counting.terms)

    def _of_pictures(self, objective: EditObjective) -> list[str]:
        return [name for name in objective.encoders if not self.prepared.reads_latents(name)]

    def _evaluate(
        self,
        terms: Sequence[LossTerm],
        preds: Mapping[str, Tensor],
        indices: Sequence[int],
        t: Tensor,
        sample_weights: Optional[Tensor],
        details: bool,
    ) -> ObjectiveReport:
        objective = EditObjective(terms)
        embeddings = self.prepared.embeddings(indices, objective.encoders)
        for name in self.failures.encoders if self.failures is not None else ():
            if name in objective.encoders:
                negatives = self.failures.embeddings(indices, name, embeddings.get("src", name))
                embeddings = embeddings.with_embedding(ROLE, self.encoders[name].info, negatives)
        embeddings = embeddings.to(self.device)
        for name in objective.encoders:
            embeddings = embeddings.with_embedding("pred", self.encoders[name].info, preds[name])
        return objective.evaluate(embeddings, details, t.to(self.device), sample_weights)

    def _of_whole_batch(self, reports: Sequence[TermReport], batch: int) -> list[TermReport]:
        """What the processes found of their samples, together: the losses, those of one's own with their graph."""
        columns = [v for r in reports for v in (r.per_sample, r.open, r.sample_weights) if v is not None]
        whole = iter(self.processes.whole_of_each(columns, batch))
        made = []
        for r in reports:
            loss, opened, weights = (
                None if v is None else next(whole) for v in (r.per_sample, r.open, r.sample_weights)
            )
            made.append(TermReport(r.term, loss.mean(), loss, {}, opened).counting(weights))
        return made

    def differentiated(self, index: int) -> list[tuple[str, Callable[[Tensor], Tensor], Tensor]]:
        """What a step differentiates, of one pair: ``(part, function, its input)``, for the self-check.

        An encoder whose terms all have weight 0 only watches, and is left out.
        """
        taught = [name for name in self.encoders if any(t.weight for t in self.objective.terms if t.encoder == name)]
        pictures = [name for name in taught if not self.prepared.reads_latents(name)]
        z = self.prepared.after([index]).to(self.device)
        parts: list[tuple[str, Callable[[Tensor], Tensor], Tensor]] = []
        if pictures:
            parts.append(("decoder", lambda z: self._decode(z, [index], True), z))
            with torch.no_grad():  # far from 0 and 1, where encoders clamp and let gradients pass
                pixels = 0.3 + 0.4 * self._decode(z, [index], True)
        for name in taught:
            encoder = self.encoders[name]
            if name in pictures:
                parts.append((f"encoder {name}", lambda x, e=encoder: self._run(e, x, False), pixels))
            else:

                def of_latents(z: Tensor, encoder: Encoder = encoder) -> Tensor:
                    return self._run(encoder.from_latents, self.prepared.vae.unscaled(z), False)

                parts.append((f"encoder {name}", of_latents, z))
        return parts

    def without_gates(self) -> EstimateObjective:
        """The same with every term at every noise level, for outputs that are done."""
        whole = copy.copy(self)
        terms = self.objective.terms
        whole.objective = EditObjective(tuple(replace(term, t_min=0.0, t_max=1.0) for term in terms))
        return whole

    def _decode(self, x0: Tensor, indices: Sequence[int], keep: bool) -> Tensor:
        """Pictures of the pairs' crops ``[B, H, W, 3]``; ``keep``: not to be decoded again in the backward pass."""
        parts, factor = [], self.prepared.downscale
        for z, index in zip(x0, indices):
            crop = self.prepared.crops[index]
            rows = _with_halo(crop.top // factor, crop.height // factor, z.shape[1])
            columns = _with_halo(crop.left // factor, crop.width // factor, z.shape[2])
            window = z[None, :, rows[0] : rows[1], columns[0] : columns[1]]
            pixels = self._run(self.decode, window, keep or getattr(self.decode, "checkpointing", False))
            expected = [1, factor * window.shape[2], factor * window.shape[3], 3]
            if list(pixels.shape) != expected:
                raise ValueError(
                    f"decode: expected pictures {expected} of latents {list(window.shape)}, got {list(pixels.shape)}"
                )
            top, left = crop.top - rows[0] * factor, crop.left - columns[0] * factor
            parts.append(pixels[:, top : top + crop.height, left : left + crop.width])
        return torch.cat(parts)

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor, keep: bool) -> Tensor:
        """``function(x)``; unless ``keep``, what it computes on the way is not kept for the backward pass."""

        def run(x: Tensor) -> Tensor:  # the backward pass comes through here again, and must see the same LoRA
            with self.frozen():
                return function(x)

        return run(x) if keep or not torch.is_grad_enabled() else checkpoint(run, x, use_reentrant=False)


def _with_halo(start: int, length: int, whole: int) -> tuple[int, int]:
    return max(0, start - HALO), min(whole, start + length + HALO)
