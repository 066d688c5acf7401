"""What does not change during training, computed once and kept: masks, latents, crops, and constant embeddings."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ahead import ahead, behind
from ..cache import Entry, TensorCache
from ..checks import check_whole, is_whole
from ..device_memory import is_out_of_memory
from ..embeddings import EmbeddingSet
from ..encoders.base import Encoder, EncoderInfo, Region
from ..encoders.vae import VAEEncoder
from ..hashing import hash_tensors
from ..masks import REGION, edit_region, how_they_differ
from ..negatives import SAME_PIXEL, OverlaySettings, make_overlays
from ..pairs import MULTIPLE, Finding, PairImages, PairSet, sided
from ..pairs.geometry import Crop, find_crop
from ..processes import Processes
from ..progress import Progress
from .memory import OutOfMemory

if TYPE_CHECKING:
    from accelerate import Accelerator

METHOD = "1"  # part of every key: count up when masks, crops or embeddings come to be made in another way
WELL_COVERED = 0.98  # of the edit inside the crop; less gets a note

_T = TypeVar("_T")


class _Layout(NamedTuple):
    """Where an encoder's tokens are."""

    grid: Optional[tuple[int, int]]
    region: Region


@dataclass(frozen=True, eq=False)
class Prepared:
    """Pairs with everything about them that is constant, on the CPU. Made by :func:`prepare`.

    Methods that take indices want those of one batch of ``pairs.batches``: all of one size.

    Attributes:
        pairs: the pairs.
        crops: the window of each pair that encoders of pictures see.
        masks: edit region of each pair ``[H, W]``, or None.
        valid: where each pair's pictures are ``[H, W]``, or None: everywhere. Elsewhere a variant shows what lies beyond them.
        vae: the encoder that made the latents.
        encoders: name → what made the embeddings.
        crop: largest side of the window, 0 for the whole picture.
        overlay: how the pictures of the role overlay were made; None if there are none.
        notes: what a person should know though it stops nothing.
    """

    pairs: PairSet
    crops: tuple[Crop, ...]
    masks: tuple[Optional[Tensor], ...]
    valid: tuple[Optional[Tensor], ...]
    vae: VAEEncoder
    encoders: Mapping[str, EncoderInfo]
    crop: int
    overlay: Optional[OverlaySettings]
    notes: tuple[str, ...]
    _latents: tuple[Mapping[str, Tensor], ...]
    _embeddings: Mapping[str, tuple[Mapping[str, Tensor], ...]]
    _layouts: Mapping[str, tuple[_Layout, ...]]
    _of_latents: frozenset[str]

    def __len__(self) -> int:
        return len(self.pairs)

    def about(self) -> dict[str, Any]:
        """Plain values that say what was prepared, each of something else, so that a run that goes on can tell what changed."""
        return {
            "pictures": self.pairs.digest,
            "captions": self.pairs.captions_digest,
            "resolution": self.pairs.resolution,
            "upscale": self.pairs.upscale,
            "variants": None if self.pairs.variants is None else asdict(self.pairs.variants),
            "crop": self.crop,
            "overlay": None if self.overlay is None else asdict(self.overlay),
            "vae": self.vae.info.fingerprint,
            "encoders": {name: info.fingerprint for name, info in self.encoders.items()},
        }

    @property
    def downscale(self) -> int:
        """Pixels per latent."""
        return self.vae.downscale

    @property
    def nbytes(self) -> int:
        """Memory that all of it takes."""
        regions = [{"": region} for region in (*self.masks, *self.valid) if region is not None]
        groups = [self._latents, regions, *self._embeddings.values()]
        return sum(t.nbytes for group in groups for tensors in group for t in tensors.values())

    def after(self, indices: Sequence[int]) -> Tensor:
        """Latents of the after pictures ``[B, C, h, w]``, as the model takes them."""
        return torch.stack([self._latents[i]["gt"] for i in indices])

    def before(self, indices: Sequence[int]) -> Tensor:
        """Latents of the before pictures ``[B, C, h, w]``, as the model takes them."""
        return torch.stack([self._latents[i]["src"] for i in indices])

    def references(self, indices: Sequence[int]) -> list[Tensor]:
        """All that the model looks at: :meth:`before`, and as many further pictures ``[B, C, h', w']`` as these pairs have."""
        further = self.pairs[indices[0]].references
        names = [f"src_{number}" for number in range(2, len(further) + 2)]
        return [self.before(indices), *(torch.stack([self._latents[i][name] for i in indices]) for name in names)]

    def pixel_masks(self, indices: Sequence[int]) -> Optional[Tensor]:
        """Edit regions ``[B, H, W]``, all ones for a pair without a mask; None if no pair of the batch has one.

        They are 0 where there is no picture.
        """
        masks = [self.masks[i] for i in indices]
        masks = [self._valid(i) if m is None else m for i, m in zip(indices, masks)]
        if all(m is None for m in masks):
            return None
        return torch.stack([torch.ones(self.pairs.targets[i]) if m is None else m for i, m in zip(indices, masks)])

    def latent_valid(self, indices: Sequence[int]) -> Optional[Tensor]:
        """1 for a latent that is of pictures alone, with its neighbours, and 0 for the others, ``[B, h, w]``; None if all are."""
        if all(self.valid[i] is None for i in indices):
            return None
        size, factor = self.pairs.targets[indices[0]], self.downscale
        regions = [self._valid(i) for i in indices]
        beyond = torch.stack([torch.zeros(size) if v is None else 1.0 - v for v in regions])
        return 1.0 - F.max_pool2d(F.max_pool2d(beyond, factor), 3, 1, 1)

    def _valid(self, index: int) -> Optional[Tensor]:
        valid = self.valid[index]
        return None if valid is None else valid.float()

    def latent_masks(self, indices: Sequence[int]) -> Optional[Tensor]:
        """The share of each latent's area inside the edit region, ``[B, h, w]``; None as in :meth:`pixel_masks`."""
        masks = self.pixel_masks(indices)
        return None if masks is None else F.avg_pool2d(masks, self.downscale)

    def reads_latents(self, encoder: str) -> bool:
        """Whether an encoder's embeddings are of whole latents (``from_latents``), not of cropped pictures.

        Raises:
            ValueError: an encoder that the pairs were not prepared for.
        """
        self._check(encoder)
        return encoder in self._of_latents

    @property
    def reads_pictures(self) -> bool:
        """Whether any encoder's embeddings are of cropped pictures, so that estimates have to be decoded."""
        return not all(map(self.reads_latents, self.encoders))

    def embeddings(self, indices: Sequence[int], encoders: Optional[Iterable[str]] = None) -> EmbeddingSet:
        """gt, src and (if prepared) overlay of a batch, with masks of what each encoder saw.

        Args:
            indices: of the pairs.
            encoders: names; all if None.

        Raises:
            ValueError: an encoder that the pairs were not prepared for.
        """
        names = list(self.encoders if encoders is None else encoders)
        for name in names:
            self._check(name)
        tensors, grids, regions = {}, {}, {}
        for name in names:
            samples = [self._embeddings[name][i] for i in indices]
            tensors.update({(role, name): torch.stack([s[role] for s in samples]) for role in samples[0]})
            layout = self._layouts[name][indices[0]]
            if layout.grid is not None:
                grids[name], regions[name] = layout.grid, layout.region
        made = EmbeddingSet(tensors, {name: self.encoders[name] for name in names}, grids, regions)
        masks = self.pixel_masks(indices)
        if masks is None:
            return made
        cropped = torch.stack([self.crops[i](mask) for i, mask in zip(indices, masks)])
        made = made.with_mask(masks)
        for name in grids:
            if name not in self._of_latents:
                made = made.with_mask(cropped, name)
        return made

    def embed(self, encoder: Encoder, index: int, pictures: Tensor) -> Tensor:
        """Embeddings of other pictures ``[N, H, W, 3]`` of a pair, made as its own were, in float32 on the CPU.

        Raises:
            ValueError: an encoder that the pairs were not prepared for.
        """
        if not self.reads_latents(encoder.info.name):
            return encoder.embed(self.crops[index](pictures.movedim(-1, 1)).movedim(1, -1), len(pictures))
        with torch.no_grad():
            z = self.vae.latents(pictures).float().cpu()  # as kept ones are
            return encoder.from_latents(self.vae.unscaled(z.to(encoder.device))).float().cpu()

    def _check(self, encoder: str) -> None:
        if encoder not in self.encoders:
            raise ValueError(f"encoder: expected one of those prepared, {sorted(self.encoders)}, got {encoder!r}")


def prepare(
    pairs: PairSet,
    vae: VAEEncoder,
    encoders: Optional[Mapping[str, Encoder]] = None,
    cache_folder: Optional[Path] = None,
    *,
    crop: int = 0,
    overlay: Optional[OverlaySettings] = None,
    estimate_missing_masks: bool = True,
    batch_size: int = 4,
    progress: Optional[Progress] = None,
    accelerator: Optional[Accelerator] = None,
) -> Prepared:
    """Masks, latents, crops and embeddings of every pair, from the cache where they are there.

    gt is the after, src the before picture. An encoder that reads the latents of ``vae`` gets them whole; every other one
    gets a crop of the pictures, so that training need decode no more than that. The work goes model by model, so that
    no two have to be in memory together; while a model works, the pictures of the next pairs are read, and the results
    of the last ones written. Several processes share out what is not in the cache and take the rest from there; what
    they do not find, they make themselves.

    Args:
        pairs: what to prepare.
        vae: encodes at the pictures' own size.
        encoders: by name (``encoder.info.name``).
        cache_folder: where results are kept as safetensors, under a hash of everything they depend on; None computes them
            anew. Files that are damaged are not trusted but made again. Above 20 GB, what has been of no use for the
            longest time is removed (:meth:`~editloss_core.cache.TensorCache.prune`).
        crop: largest side of the window that is cut from the pictures for encoders, in pixels, a multiple of 16: the one
            with the most of the edit mask in it, centred on the mask; 0 takes the whole picture.
        overlay: how to make pictures of the role overlay; None makes none.
        estimate_missing_masks: whether a pair without a mask gets one by :func:`~editloss_core.masks.edit_region`. Where none
            stands out (light, colour, noise, style), the whole picture is the edit region, with a note. Of no use where nothing
            reads masks: without encoders, and with an ``edit_weight`` of 1.
        batch_size: pictures per pass through a model; where memory is not enough for them, they go one at a time.
        progress: called with (done, total) over everything that is not in the cache; its exceptions end the work, and
            what was done until then is kept. With several processes, the total is this one's share.
        accelerator: of the processes that prepare together, all with the same arguments.

    Raises:
        PairProblems: pairs without a visible edit or with a mask that vanishes at their size, all in one report, before
            any model is run; or what is wrong with pairs that have changed since they were checked.
        ValueError: a picture that changes while it is prepared, an argument out of range, latents or embeddings that are not finite, or overlays that cannot be made;
            the message names the pair.
        OutOfMemory: the device has not enough for a single picture; the message names pair, model and size, and what would
            help.
    """
    encoders = dict(encoders or {})
    _check_arguments(pairs, vae, encoders, crop, batch_size)
    with torch.inference_mode(False), torch.no_grad():  # in this order: the first one turns gradients on
        processes = Processes(accelerator)
        pairs = pairs.as_they_are()  # since they were checked, minutes may have gone by, while captions were encoded
        work = _Work(pairs, vae, cache_folder, crop, overlay, estimate_missing_masks, batch_size, progress, processes)
        return work.run(encoders)


class _Work:
    """One call of :func:`prepare`."""

    def __init__(
        self, pairs, vae, cache_folder, crop, overlay, estimate_missing_masks, batch_size, progress, processes
    ):
        self.processes = processes
        self.pairs, self.vae, self.crop, self.overlay = pairs, vae, crop, overlay
        self.estimating, self.batch_size, self.progress = estimate_missing_masks, batch_size, progress
        self.cache = TensorCache(None if cache_folder is None else Path(cache_folder))
        self.done = self.total = 0

    def run(self, encoders: Mapping[str, Encoder]) -> Prepared:
        everywhere = range(len(self.pairs))
        of_latents = frozenset(
            name
            for name, encoder in encoders.items()
            if all(encoder.reads_latents(self.vae.latent_space, *size) for size in self.pairs.buckets)
        )
        base = [hash_tensors([], METHOD, self.pairs.fingerprint(i)) for i in everywhere]
        own = [pair.mask is not None or not self.estimating for pair in self.pairs]
        regions = [[str(self.estimating)] if mask else [str(self.estimating), REGION] for mask in own]
        keys = {
            ("masks", ""): [_key(b, *regions[i]) for i, b in enumerate(base)],
            ("latents", ""): [_key(b, self.vae.info.fingerprint) for b in base],
        }
        for name, encoder in encoders.items():
            seen = self.vae.info.fingerprint if name in of_latents else f"crop {self.crop}"
            settings = (encoder.info.fingerprint, seen, str(self.overlay))
            keys["embeddings", name] = [_key(b, *settings, *regions[i]) for i, b in enumerate(base)]
        found = {at: [self.cache.get(at[0], key) for key in keys[at]] for at in keys}
        self.processes.wait()  # all have looked before anyone adds to it, so that their shares fit together
        per_pair = 2 + (len(self.overlay.kinds) if self.overlay else 0)
        cost = {"masks": 1, "latents": 2, "embeddings": per_pair}
        self.total = sum(cost[at[0]] * len(self._share(entries)) for at, entries in found.items())

        def write(at: tuple[str, str], i: int) -> None:
            self.cache.put(at[0], keys[at][i], *found[at][i])

        def work(at: tuple[str, str], read: Callable[[int], _T], make: Callable[[int, _T], Optional[Entry]]) -> None:
            """What is missing of one kind: read ahead, made, and written behind; None is not kept."""
            for turn, todo in enumerate(self._turns(at[0], keys[at], found[at])):
                self.total += cost[at[0]] * len(todo) if turn else 0  # the first is part of it already
                with ahead(read, todo) as ready, behind(write) as keep:
                    for i, value in zip(todo, ready):
                        entry = make(i, value)
                        if entry is not None:
                            found[at][i] = entry
                            keep(at, i)

        problems: dict[int, list[Finding]] = {}

        def checked(i: int, made: tuple[dict[str, Tensor], list[Finding]]) -> Optional[Entry]:
            regions, wrong = made
            self._step(1)
            if wrong:
                problems[i] = wrong
                return None
            return Entry(regions, {})

        work(("masks", ""), self._mask, checked)
        if problems:
            raised: dict[tuple[str, tuple[str, ...]], Finding] = {}
            for finding in (finding for i in sorted(problems) for finding in problems[i]):
                raised.setdefault((finding.kind, finding.files), finding)  # once for a pair and all of its variants
            raise self.pairs.problems(list(raised.values()))
        masks = tuple(_as_float(entry.tensors.get("mask")) for entry in found["masks", ""])
        crops = tuple(find_crop(mask, self.pairs.targets[i], self.crop) for i, mask in enumerate(masks))

        def encoded(i: int, images: list[Tensor]) -> Entry:
            z, *further = (self._encode(some, i) for some in images)
            self._step(2)
            return Entry(
                {"gt": z[0], "src": z[1], **{f"src_{number}": one[0] for number, one in enumerate(further, 2)}}, {}
            )

        work(("latents", ""), self._both, encoded)
        for name, encoder in encoders.items():
            reads_latents = name in of_latents

            def pictures_of(i: int, whole: bool = reads_latents) -> Optional[Tensor]:
                return self._pictures(i, masks[i], None if whole else crops[i])

            def embedded(
                i: int, pictures: Optional[Tensor], encoder: Encoder = encoder, whole: bool = reads_latents
            ) -> Entry:
                z = found["latents", ""][i].tensors if whole else None
                tensors, layout = self._embed(encoder, i, crops[i], z, pictures)
                return Entry(tensors, layout._asdict())

            work(("embeddings", name), pictures_of, embedded)
        if self.processes.main:
            self.cache.prune()
        return Prepared(
            pairs=self.pairs,
            crops=crops,
            masks=masks,
            valid=tuple(entry.tensors.get("valid") for entry in found["masks", ""]),
            vae=self.vae,
            encoders={name: encoder.info for name, encoder in encoders.items()},
            crop=self.crop,
            overlay=self.overlay,
            notes=tuple(self._notes(masks, crops if set(encoders) - of_latents else ())) + self.pairs.notes,
            _latents=tuple(entry.tensors for entry in found["latents", ""]),
            _embeddings={name: tuple(entry.tensors for entry in found["embeddings", name]) for name in encoders},
            _layouts={name: tuple(_layout(entry.about) for entry in found["embeddings", name]) for name in encoders},
            _of_latents=of_latents,
        )

    def _share(self, entries: Sequence[Optional[Entry]]) -> Sequence[int]:
        return self.processes.own([i for i, entry in enumerate(entries) if entry is None])

    def _turns(self, kind: str, keys: Sequence[str], entries: list[Optional[Entry]]) -> Iterator[Sequence[int]]:
        """The pairs to work on: this process' share of what is missing, and then what of the others' is not in the cache:
        all of it without one, none as a rule with one."""
        missing = [i for i, entry in enumerate(entries) if entry is None]
        yield self._share(entries)
        if self.processes.count > 1:
            self.processes.wait()
            for i in missing:
                entries[i] = entries[i] or self.cache.get(kind, keys[i])
            yield [i for i in missing if entries[i] is None]

    def _step(self, pictures: int) -> None:
        self.done += pictures
        if self.progress is not None:
            self.progress(self.done, self.total)

    # What comes from files and needs no model: read ahead, in threads that change nothing of this object.

    def _both(self, index: int) -> list[Tensor]:
        """After and before ``[2, H, W, 3]``, and each further reference ``[1, H, W, 3]``."""
        images = self.pairs.load_checked(index)
        return [torch.stack([images.after, images.before]), *(reference[None] for reference in images.references)]

    def _pictures(self, index: int, mask: Optional[Tensor], crop: Optional[Crop]) -> Optional[Tensor]:
        """What an encoder gets of a pair: after, before and overlays ``[2 + K, h, w, 3]`` inside the crop; without one the
        overlays alone, whole, or None if there are none."""
        if crop is None and self.overlay is None:
            return None
        images = self.pairs.load_checked(index)
        overlays = self._overlays(images, mask, index) if self.overlay else None
        if crop is None:
            return overlays
        pictures = [images.after[None], images.before[None]] + ([] if overlays is None else [overlays])
        return crop(torch.cat(pictures).movedim(-1, 1)).movedim(1, -1)

    def _mask(self, index: int) -> tuple[dict[str, Tensor], list[Finding]]:
        """ "mask", the edit region in steps of 1/255, and "valid", where the pictures are, as uint8 ``[H, W]``, as far as there
        are any; and what is wrong."""
        problems: list[Finding] = []
        images = self.pairs.load_checked(index)
        own, mask = self.pairs[index].mask is not None, images.mask
        both, where = (self.pairs.called(index, "before"), self.pairs.called(index, "after")), "inside its mask "
        if mask is not None and own and not bool((mask >= 0.5).any()):
            height, width = self.pairs.targets[index]
            detail = f"nothing is left of it at {width}×{height} px"
            return {}, [Finding("mask empty", (self.pairs.called(index, "mask"),), detail)]
        if not own:
            where, differ = "", how_they_differ(images.before, images.after)
            if mask is None and (self.estimating or not differ):
                mask = edit_region(images.before, images.after)
            if mask is None and not differ:
                return {}, [
                    Finding("no edit", both, "they differ no more than a copy that was saved again; paint a mask")
                ]
            mask = mask if self.estimating else None
        change = (images.before - images.after).abs().amax(-1)
        most = (change if mask is None else change * (mask > 0)).amax().item()
        if most <= SAME_PIXEL:
            problems.append(Finding("no edit", both, f"{where}the pictures differ by at most {most * 255:.1f} of 255"))
        regions = {} if mask is None else {"mask": (mask * 255).round().to(torch.uint8)}
        return regions | ({} if images.valid is None else {"valid": images.valid.to(torch.uint8)}), problems

    def _encode(self, images: Tensor, index: int) -> Tensor:
        """Latents ``[B, C, h, w]`` in float32 on the CPU."""
        what, size = f"latents of {self.vae.info.name!r}", images.shape[1:3]
        helps = f"a resolution of the pairs below {self.pairs.resolution}, or a smaller VAE"
        return self._finite(self._batches(self.vae.latents, images, index, what, size, helps), index, what)

    def _batches(
        self,
        run: Callable[[Tensor], Tensor],
        x: Tensor,
        index: int,
        what: str,
        size: Sequence[int],
        helps: str,
        done: Callable[[int], None] = lambda count: None,
    ) -> Tensor:
        """``run`` on batches of ``x``, as float32 on the CPU.

        Args:
            index: of the pair.
            what: is made.
            size: of its pictures, in pixels.
            helps: against a lack of memory.
            done: called with the number of pictures after each batch.

        Raises:
            OutOfMemory: for one picture; of a larger batch they are tried one at a time.
        """
        made, left = [], list(x.split(self.batch_size))
        while left:
            part = left.pop(0)
            try:
                made.append(run(part).float().cpu())
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise OutOfMemory(
                        f"Out of memory while preparing {what} for the pair {self.pairs[index].name!r}, with one picture of "
                        f"{size[1]}×{size[0]} px at a time. What would help: {helps}; or more of the device left free."
                    ) from error
                left = [*part.split(1), *left]
                continue
            done(len(part))
        return torch.cat(made)

    def _finite(self, x: Tensor, index: int, what: str) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"{what}: expected finite numbers, got NaN or infinity for the pair {self.pairs[index].name!r}; run it in "
                "float32 or bfloat16"
            )
        return x

    def _embed(
        self, encoder: Encoder, index: int, crop: Crop, z: Optional[Mapping[str, Tensor]], pictures: Optional[Tensor]
    ) -> tuple[dict[str, Tensor], _Layout]:
        """Role → embedding of one pair; overlay ``[K, ...]``.

        Args:
            z: its latents, if the encoder reads them.
            pictures: see :meth:`_pictures`.
        """
        height, width = size = self.pairs.targets[index] if z is not None else (crop.height, crop.width)
        what = f"embeddings by {encoder.info.name!r}"
        smaller = f"a resolution of the pairs below {self.pairs.resolution}"
        if z is not None:
            latents = [z["gt"][None], z["src"][None]]
            latents += [] if pictures is None else [self._encode(pictures, index)]
            helps = f"{smaller}, or an encoder of pictures, which sees a crop"

            def embed(part: Tensor) -> Tensor:
                return encoder.from_latents(self.vae.unscaled(part.to(encoder.device)))

            x = self._batches(embed, torch.cat(latents), index, what, size, helps, self._step)
        else:
            helps = f"a crop below {max(size)}, {smaller}, or a smaller encoder"

            def embed(part: Tensor) -> Tensor:
                return encoder.embed(part, len(part))

            x = self._batches(embed, pictures, index, what, size, helps, self._step)
        x = self._finite(x, index, what)
        roles = {"gt": x[0], "src": x[1]}
        if self.overlay:
            roles["overlay"] = x[2:]
        return roles, _Layout(encoder.grid(height, width), encoder.region(height, width))

    def _overlays(self, images: PairImages, mask: Optional[Tensor], index: int) -> Tensor:
        """``[K, H, W, 3]``. The draws depend on the pair itself, not on its place among the others."""
        draw = int(self.pairs.fingerprint(index)[:12], 16)
        pair = images.before[None], images.after[None]
        if mask is None and self.estimating:
            mask = torch.ones(images.before.shape[:2])
        try:
            return make_overlays(
                *pair, None if mask is None else mask[None], settings=self.overlay, indices=[draw]
            ).images
        except ValueError as error:
            raise ValueError(f"overlay: of the pair {self.pairs[index].name!r}: {error}") from error

    def _notes(self, masks: Sequence[Optional[Tensor]], crops: Sequence[Crop]) -> list[str]:
        notes = []
        whole = [self.pairs[i].original for i, mask in enumerate(masks) if mask is None and self.estimating]
        if whole:
            notes.append(everywhere_note(list(dict.fromkeys(whole))))
        for i, (mask, crop) in enumerate(zip(masks, crops)):
            if mask is not None and crop.coverage < WELL_COVERED:
                rows, columns = (mask >= 0.5).any(1).nonzero()[:, 0], (mask >= 0.5).any(0).nonzero()[:, 0]
                side = max(int(rows[-1] - rows[0]), int(columns[-1] - columns[0])) + 1
                notes.append(
                    f"{self.pairs[i].name}: the crop of {crop.width}×{crop.height} px holds {crop.coverage:.0%} of the "
                    f"edit; a crop of {math.ceil(side / MULTIPLE + 1) * MULTIPLE} px would hold it"
                )
        if self.cache.refused:
            notes.append(
                f"cache: made {len(self.cache.refused)} damaged files again: {', '.join(self.cache.refused[:3])}"
            )
        return notes


def expected_bytes(pairs: PairSet, channels: int = 16, downscale: int = 8) -> tuple[int, int]:
    """(memory, disk) that latents and masks of these pairs take, embeddings not counted; a VAE like FLUX's by default."""
    memory = disk = 0
    for (height, width), members in pairs.buckets.items():
        pixels = height * width * len(members)
        latents = 2 * 4 * channels * pixels // downscale**2  # after and before, float32
        memory += latents + 5 * pixels  # mask in float32, valid
        disk += latents + 2 * pixels
    return memory, disk


def everywhere_note(names: Sequence[str]) -> str:
    """For pairs without a mask in which nothing stands out."""
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return (
        f"in {len(names)} pair{'s' * (len(names) > 1)} no region stands out ({shown}): the whole picture is the edit region; "
        "give a mask where less of it was edited"
    )


def describe_variants(pairs: PairSet) -> str:
    """How many pairs there are with their variants, which are not mirrored, and what they will take."""
    originals = [pair for pair in pairs if pair.variant is None]
    memory, disk = expected_bytes(pairs)
    text = (
        f"{len(originals)} pairs × {len(pairs) // len(originals)} = {len(pairs)}; latents and masks take about "
        f"{memory / 1e6:.0f} MB of memory and {disk / 1e6:.0f} MB of the cache's disk"
    )
    kept = [pair.name for pair in originals if sided(pair.caption)]
    if pairs.variants is not None and pairs.variants.flip and kept:
        shown = ", ".join(kept[:5]) + (", …" if len(kept) > 5 else "")
        text += f"; {len(kept)} not mirrored, as their captions speak of sides or writing: {shown}"
    return text


def _key(*parts: str) -> str:
    return hash_tensors([], *(f"{part}\0" for part in parts))


def _as_float(mask: Optional[Tensor]) -> Optional[Tensor]:
    return None if mask is None else mask.float() / 255


def _layout(about: Mapping) -> _Layout:
    return _Layout(None if about["grid"] is None else tuple(about["grid"]), tuple(about["region"]))


def _check_arguments(
    pairs: PairSet, vae: VAEEncoder, encoders: Mapping[str, Encoder], crop: int, batch_size: int
) -> None:
    if not len(pairs):
        raise ValueError("pairs: expected at least one, got none")
    if not is_whole(crop) or crop < 0 or crop % MULTIPLE:
        raise ValueError(f"crop: expected a multiple of {MULTIPLE} pixels, or 0 for the whole picture, got {crop!r}")
    check_whole("batch_size", batch_size, 1)
    if MULTIPLE % vae.downscale:
        raise ValueError(f"vae: expected 1, 2, 4, 8 or 16 pixels per latent, got {vae.downscale}")
    for size in pairs.buckets:
        if vae.preprocess.size(*size) != size:
            raise ValueError(
                f"vae: expected one that keeps the size of pictures, got one that takes {size[1]}×{size[0]} to "
                f"{vae.preprocess.size(*size)[1]}×{vae.preprocess.size(*size)[0]}; set its image size to 0"
            )
    for name, encoder in encoders.items():
        if name != encoder.info.name:
            raise ValueError(f"encoders: expected {encoder.info.name!r} under its own name, got it as {name!r}")
