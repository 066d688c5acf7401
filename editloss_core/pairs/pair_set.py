"""Before/after pairs: find them, check them once and completely, and load them in one shared geometry.

Pictures are floats ``[H, W, 3]`` in 0…1, masks ``[H, W]`` in 0…1 with 1 where the picture changes; sizes are (height,
width) in pixels.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

from ..ahead import ahead
from ..checks import check_whole, is_whole
from ..hashing import hash_tensors
from ..masks import REGION
from ..progress import Progress
from .files import (
    Finding,
    Layout,
    PairProblems,
    digest_state,
    file_state,
    listed,
    read_caption,
    readable,
    relative,
    scan,
)
from .geometry import (
    MASK_PROPORTIONS,
    MULTIPLE,
    PairImages,
    Size,
    bounding_box,
    bucket_size,
    cover,
    resample,
    same_proportions,
    times,
)
from .pictures import Picture, Remark, notes_on, read_picture
from .variants import Variant, VariantSettings, content_of, draw

GONE = "gone"
GEOMETRY = "geometry 1"  # part of every fingerprint: what `load` does to a picture

Source = Union[Path, Tensor]


@dataclass(frozen=True, eq=False)
class Pair:
    """One edit: the picture before and after it, what was asked for, and where.

    Attributes:
        name: unique within a set.
        before, after: a file, or a tensor ``[H, W, 3]``.
        caption: the instruction.
        mask: the edit region as a file or a tensor ``[H, W]``, or None.
        references: further pictures that the model looks at beside the before picture (before_2, before_3 …), each of any size.
        reference_sizes: theirs, once they were looked at.
        variant: how its pictures are transformed; None: not at all.
    """

    name: str
    before: Source
    after: Source
    caption: str = ""
    mask: Optional[Source] = None
    references: tuple[Source, ...] = ()
    reference_sizes: tuple[Size, ...] = ()
    variant: Optional[Variant] = None

    @property
    def original(self) -> str:
        """The name of the pair that it is a variant of, or its own."""
        return self.variant.of if self.variant else self.name


def find_pairs(
    folder: Union[str, Path],
    control_folder: Union[str, Path] = "",
    *,
    resolution: int = 1024,
    default_caption: str = "",
    upscale: bool = False,
    min_size: int = 64,
    progress: Optional[Progress] = None,
) -> PairSet:
    """The pairs of a folder, after every file of it was looked at.

    Three layouts are recognised, in this order; files belong together by their name without suffix, whatever its case:

    * ``control_folder`` given: after pictures in ``folder``, before pictures in ``control_folder`` (ai-toolkit), masks in
      ``folder/mask``; captions beside the after pictures, beside the before pictures or in ``folder/captions``: the first
      of them that has one.
    * the folders ``before/``, ``after/`` and, if wanted, ``mask/`` (or ``control/``, ``target/``, ``masks/``); captions as .txt beside the after pictures, beside
      the before pictures, in ``captions/`` or in ``folder``: the first of them that has one. ``before_2/``, ``before_3/`` …
      up to 9 hold further references of some or all pairs, of any size.
    * one folder with ``x_before.png``, ``x_after.png`` and, if wanted, ``x_mask.png`` or ``mask/x.png``; captions in
      ``x.txt``, ``x_after.txt``, ``x_before.txt`` or ``captions/x.txt``.

    ``masks/`` and ``caption/`` do as well. Pictures are whatever :func:`~.pictures.read_picture` reads, and become sRGB as it
    says; captions are UTF-8, UTF-16 or UTF-32. Subfolders are searched as well, and a pair has the same one in every place:
    ``before/kitchen/x.png`` and ``after/kitchen/x.png`` are the pair "kitchen/x". Passed over are hidden files, files of
    other kinds, and folders that begin with ".", "_" or "@"; the set's notes name them.

    Args:
        folder, control_folder: see above; an empty control folder means none.
        resolution: pictures are trained at about ``resolution²`` pixels, in their own proportions.
        default_caption: for pairs without a caption of their own; empty makes such a pair a problem.
        upscale: whether small pictures are enlarged to ``resolution``; if not, they are trained at their own size.
        min_size: shortest side that a picture may have, in pixels.
        progress: called with (done, total) pairs while they are checked.

    Raises:
        FileNotFoundError: no such folder.
        PairProblems: everything that is wrong with the pairs, in one report.
        ValueError: no pairs at all, or a bad setting.
    """
    _check_settings(resolution, min_size)
    layout = scan(Path(folder), Path(control_folder) if str(control_folder) else None)
    findings = list(layout.findings)
    pairs = []
    for key in sorted(layout.before.keys() | layout.after.keys()):
        before, after = layout.before.get(key), layout.after.get(key)
        if before is None or after is None:
            for kind, path in (("no before", after), ("no after", before)):
                findings += [] if path is None else [Finding(kind, (layout.name(path),), layout.partner(path))]
            continue
        caption, written = "", layout.captions.get(key)
        if written:
            try:
                caption = read_caption(written)
            except ValueError as error:
                findings.append(Finding("unreadable", (layout.name(written),), str(error)))
                caption = "unreadable"
        if not (caption or default_caption.strip()):
            findings.append(
                Finding("no caption", (layout.name(written or after),), "the file is empty" if written else "")
            )
        further = [table[key] for table in layout.references if key in table]
        if further != [table.get(key) for table in layout.references[: len(further)]]:
            findings.append(Finding("reference gap", tuple(map(layout.name, further))))
        pairs.append(
            Pair(
                layout.names[key],
                before,
                after,
                caption or default_caption.strip(),
                layout.masks.get(key),
                tuple(further),
            )
        )
    known = layout.before.keys() | layout.after.keys()
    others = [("reference alone", table) for table in layout.references]
    for kind, table in (("mask alone", layout.masks), ("caption alone", layout.captions), *others):
        lone = [path for key, path in table.items() if key not in known]
        findings += [Finding(kind, (layout.name(path),), layout.partner(path)) for path in lone]
    partial = [layout.before.get(k) or layout.after[k] for k in known if not (k in layout.before and k in layout.after)]
    found = _checked(pairs, findings, layout, partial, resolution, upscale, min_size, progress)
    control = Path(control_folder) if str(control_folder) else None
    return replace(found, control_folder=control, default_caption=default_caption.strip())


def folder_state(folder: Union[str, Path], control_folder: Union[str, Path] = "") -> str:
    """A digest that changes when a file of the folder does (by name, size or time), without opening any picture.

    Raises:
        FileNotFoundError, ValueError: as :func:`find_pairs`, for a folder without pairs.
    """
    layout = scan(Path(folder), Path(control_folder) if str(control_folder) else None)
    tables = ("before", "after", "masks", "captions")
    found = {f"{t}/{layout.name(p)}": p for t in tables for p in getattr(layout, t).values()}
    return digest_state(found | {layout.name(p): p for table in layout.references for p in table.values()})


@dataclass(frozen=True, eq=False)
class PairSet:
    """Checked pairs, sorted into buckets of one size each. Made by :func:`find_pairs` or :meth:`from_images`.

    Attributes:
        pairs: in the order of their names (or of the batch).
        sizes: what every picture of a pair has at least, (height, width).
        contents: sha256 of a pair's files or tensors, as they were when they were checked.
        states: name of a pair of files → what the file system said of them just before.
        resolution, upscale: see :func:`find_pairs`.
        folder, control_folder, default_caption: see :func:`find_pairs`; the folder is None if they came from pictures.
        layout: how they lay there, in words.
        notes: what a person should know though it is no mistake.
        variants: what :func:`with_variants` is to make of those that are trained on, or has made; None: none.
        flawed: what was done with pairs that teach a failure; "keep" where nobody looked for them.

    Instances are never changed.
    """

    pairs: tuple[Pair, ...]
    sizes: tuple[Size, ...]
    contents: tuple[str, ...]
    resolution: int = 1024
    upscale: bool = False
    folder: Optional[Path] = None
    layout: str = ""
    notes: tuple[str, ...] = ()
    control_folder: Optional[Path] = None
    default_caption: str = ""
    variants: Optional[VariantSettings] = None
    flawed: str = "keep"
    states: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_images(
        cls,
        before: Tensor,
        after: Tensor,
        mask: Optional[Tensor] = None,
        captions: Union[str, Sequence[str]] = "",
        references: Sequence[Tensor] = (),
        *,
        names: Optional[Sequence[str]] = None,
        resolution: int = 1024,
        upscale: bool = False,
        min_size: int = 64,
        progress: Optional[Progress] = None,
    ) -> PairSet:
        """Pairs from picture batches.

        Args:
            before, after: ``[B, H, W, 3]`` in 0…1; the two may differ in size, not in proportions.
            mask: ``[B, H, W]`` or ``[1, H, W]``, or None.
            captions: one for every pair, or B of them.
            references: further pictures that the model looks at, ``[B, H, W, 3]`` or ``[1, H, W, 3]`` each, of any size.
            names: B names; "pair 1" and so on if None.
            resolution, upscale, min_size, progress: as in :func:`find_pairs`.

        Raises:
            ValueError: a wrong shape or number of things.
            PairProblems: everything that is wrong with the pairs, in one report.
        """
        _check_settings(resolution, min_size)
        count = len(before) if isinstance(before, Tensor) else 0
        further = [(f"before_{i}", batch, 4) for i, batch in enumerate(references, 2)]
        for name, batch, dims in (("before", before, 4), ("after", after, 4), ("mask", mask, 3), *further):
            if name == "mask" and batch is None:
                continue
            a_batch = isinstance(batch, Tensor) and batch.is_floating_point() and batch.ndim == dims and batch.numel()
            if batch is None or not a_batch or (dims == 4 and batch.shape[-1] != 3):
                expected = "pictures [B, H, W, 3]" if dims == 4 else "[B, H, W]"
                came = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
                raise ValueError(f"{name}: expected {expected} in 0…1, got {came}")
            if len(batch) != count and not (name not in ("before", "after") and len(batch) == 1):
                raise ValueError(f"{name}: expected {count} like before, got {len(batch)}")
        captions = [captions] * count if isinstance(captions, str) else list(captions)
        names = [f"pair {i + 1}" for i in range(count)] if names is None else list(names)
        for what, values in (("captions", captions), ("names", names)):
            if len(values) != count or not all(isinstance(v, str) for v in values):
                raise ValueError(f"{what}: expected {count} texts, one per pair, got {len(values)}")
        if len(set(names)) < count:
            raise ValueError(f"names: expected each name once, got {names}")
        findings = [Finding("no caption", (n,)) for n, c in zip(names, captions) if not c.strip()]
        # Copies: what a node hands over is an inference tensor, and belongs to the cache of the graph.
        with torch.inference_mode(False):
            before, after = (t.detach().float().cpu().clone() for t in (before, after))
            mask = None if mask is None else mask.detach().float().cpu().clone()
            references = [t.detach().float().cpu().clone() for t in references]
        pairs = [
            Pair(
                name,
                before[i],
                after[i],
                caption.strip(),
                None if mask is None else mask[min(i, len(mask) - 1)],
                tuple(t[min(i, len(t) - 1)] for t in references),
            )  # fmt: skip
            for i, (name, caption) in enumerate(zip(names, captions))
        ]
        return _checked(pairs, findings, None, (), resolution, upscale, min_size, progress)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]

    @cached_property
    def targets(self) -> tuple[Size, ...]:
        """The size that each pair is trained at."""
        return tuple(bucket_size(size, self.resolution, self.upscale) for size in self.sizes)

    @cached_property
    def buckets(self) -> dict[Size, list[int]]:
        """Size → the indices of its pairs, the largest bucket first."""
        found: dict[Size, list[int]] = {}
        for index, target in enumerate(self.targets):
            found.setdefault(target, []).append(index)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))

    def reference_targets(self, index: int) -> tuple[Size, ...]:
        """The size that each further reference of a pair is seen at: about that of training, in its own proportions."""
        sizes = self.pairs[index].reference_sizes
        return tuple(bucket_size(size, self.resolution, self.upscale) for size in sizes)

    @cached_property
    def alike(self) -> tuple[tuple[int, ...], ...]:
        """The indices of each bucket, parted where pairs have further references of other sizes or another number of them."""
        found = []
        for members in self.buckets.values():
            groups: dict[tuple[Size, ...], list[int]] = {}
            for index in members:
                groups.setdefault(self.reference_targets(index), []).append(index)
            found += [tuple(group) for group in groups.values()]
        return tuple(found)

    def load(self, index: int) -> PairImages:
        """The pixels of a pair at its size, transformed if it is a variant."""
        pair = self.pairs[index]
        images = load(pair, self.targets[index], self.reference_targets(index))
        return pair.variant.apply(images) if pair.variant else images

    def load_checked(self, index: int) -> PairImages:
        """As :meth:`load`, where what is read must be what was checked, as its fingerprint will stand for it.

        Raises:
            ValueError: a file cannot be read, or has changed since it was checked.
        """
        images, pair = self.load(index), self.pairs[index]
        if self.states.get(pair.original) not in (None, _state(pair)):
            files = ", ".join(self.called(index, part) for part in _sources(pair))
            raise ValueError(f"pairs: one of {files} has changed since they were checked; start again")
        return images

    def as_they_are(self) -> PairSet:
        """The set as its files are now: pairs whose files have changed since they were checked are checked again.

        What they are called and their captions stay, and so does everything about the other pairs; the set itself if nothing
        changed. A changed pair has new variants, and a note. Files that are gone are told by whoever reads them.

        Raises:
            PairProblems: what is wrong with the changed ones.
        """
        now = {pair.original: _state(pair) for pair in self.pairs if pair.original in self.states}
        moved = {name for name, state in now.items() if GONE not in state and state != self.states[name]}
        sizes, contents = list(self.sizes), list(self.contents)
        pairs, changed, findings = list(self.pairs), list[str](), list[Finding]()
        looked: dict[str, _Look] = {}
        for index, pair in enumerate(self.pairs):
            if pair.original not in moved:
                continue
            if pair.original not in looked:
                looked[pair.original] = _inspect(replace(pair, variant=None), self.folder, 1)
                findings += looked[pair.original].findings
            look, drawn = looked[pair.original], pair.variant
            if drawn is not None and self.variants is not None:
                drawn = draw(drawn.of, pair.caption, look.content, drawn.number, self.variants)
            content = look.content if drawn is None else content_of(look.content, drawn)
            changed += [pair.name] if content != contents[index] else []
            sizes[index], contents[index] = look.size, content
            pairs[index] = replace(pair, variant=drawn, reference_sizes=look.references)
        if findings:
            raise self.problems(findings)
        if not moved:
            return self
        notes = (
            [f"changed since the folder was checked, and read as they are now: {listed(changed)}"] if changed else []
        )
        return replace(
            self, pairs=tuple(pairs), sizes=tuple(sizes), contents=tuple(contents), notes=(*self.notes, *notes),
            states={**self.states, **{name: look.state for name, look in looked.items()}},
        )  # fmt: skip

    def called(self, index: int, part: str) -> str:
        """What a message calls the part "before", "after" or "mask" of a pair: its file below the folder, if it has one."""
        return _called(self.pairs[index], part, self.folder)

    def problems(self, findings: Sequence[Finding]) -> PairProblems:
        """The report of findings that were made after the check."""
        return PairProblems(findings, _where(self.folder, self.layout))

    def fingerprint(self, index: int) -> str:
        """sha256 over the content of a pair's pictures and what :meth:`load` does to them; the caption is not in it."""
        further = [str(self.reference_targets(index))] if self.pairs[index].references else []
        return hash_tensors([], self.contents[index], str(self.targets[index]), GEOMETRY, *further)

    @property
    def digest(self) -> str:
        """sha256 over the names and contents of all pairs; neither captions, the size of training nor variants are in it."""
        own = [(p.name, content) for p, content in zip(self.pairs, self.contents) if p.variant is None]
        return hash_tensors([], *(f"{name}\0{content}\0" for name, content in own))

    @property
    def captions_digest(self) -> str:
        """sha256 over all captions, those of variants left out."""
        return hash_tensors([], *(f"{p.caption}\0" for p in self.pairs if p.variant is None))

    def batches(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """The batches of one epoch: every pair once, each batch of pairs that are :attr:`alike`, order and company drawn at random.

        A variant counts as a pair, and variants of one pair are in different batches where the bucket has at least
        ``batch_size`` pairs. The result depends on nothing but the arguments, the sizes of the buckets and whose variants
        there are. The last batch of a bucket holds what is left over, so it may be smaller.
        """
        for name, value, low in (("batch_size", batch_size, 1), ("seed", seed, None), ("epoch", epoch, 0)):
            check_whole(name, value, low)
        digest = hashlib.sha256(f"batches/{seed}/{epoch}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        found = []
        for members in self.alike:
            drawn = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            order = self._apart(drawn, batch_size)
            found += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]

    def _apart(self, order: Sequence[int], batch_size: int) -> list[int]:
        """An order in which every pair comes once before any comes again, and not again within a batch if that can be."""
        rounds: dict[str, int] = {}
        turns: list[list[int]] = []
        for index in order:
            turn = rounds.setdefault(self.pairs[index].original, 0)
            rounds[self.pairs[index].original] += 1
            turns += [[]] if turn == len(turns) else []
            turns[turn].append(index)
        made: list[int] = []
        for members in turns:
            begun = {self.pairs[i].original for i in made[len(made) - len(made) % batch_size :]}
            made += sorted(members, key=lambda i: self.pairs[i].original in begun)
        return made

    def subset(self, indices: Sequence[int]) -> PairSet:
        """The pairs of some indices, in that order."""
        pairs, sizes, contents = self.pairs, self.sizes, self.contents
        return replace(
            self,
            pairs=tuple(pairs[i] for i in indices),
            sizes=tuple(sizes[i] for i in indices),
            contents=tuple(contents[i] for i in indices),
        )

    def split(self, hold_out: int, seed: int = 0) -> tuple[PairSet, PairSet]:
        """(training, validation) pairs: ``hold_out`` pairs for validation, drawn by name, so that adding pairs to a
        folder moves few from one side to the other. Variants are made of the training pairs afterwards; the others
        ask for none.

        Raises:
            ValueError: no pair would be left for training, or variants are among them already.
        """
        if any(pair.variant for pair in self.pairs):
            raise ValueError(
                "hold_out: expected pairs without variants; split first, and make variants of those to train on"
            )
        if not is_whole(hold_out) or not 0 <= hold_out < len(self):
            raise ValueError(
                f"hold_out: expected 0 to {len(self) - 1}, so that one of the {len(self)} pairs is left to train on, got "
                f"{hold_out!r}"
            )
        rank = sorted(range(len(self)), key=lambda i: hashlib.sha256(f"{seed}/{self.pairs[i].name}".encode()).digest())
        held = set(rank[:hold_out])
        training, validation = ([i for i in range(len(self)) if (i in held) == side] for side in (False, True))
        return self.subset(training), replace(self.subset(validation), variants=None)


def with_variants(pairs: PairSet, settings: Optional[VariantSettings]) -> PairSet:
    """Each pair, followed by its variants: ``count`` entries of its caption and size in its place.

    The variants of "kitchen" are called "kitchen ~1" and so on. For the pairs that are trained on alone, after
    :meth:`PairSet.split`: a variant of a held-out pair would tell what is held out. None, or a count of 1, changes nothing.

    Raises:
        ValueError: pairs that are variants already, or names that are taken.
    """
    if any(pair.variant for pair in pairs):
        raise ValueError("pairs: expected pairs as they were found, got variants already")
    if settings is None or settings.count == 1:
        return replace(pairs, variants=settings)
    made, contents, numbers = [], [], []
    for index, (pair, content) in enumerate(zip(pairs, pairs.contents)):
        for number in range(settings.count):
            variant = draw(pair.name, pair.caption, content, number, settings) if number else None
            name = f"{pair.name} ~{number}" if number else pair.name
            made.append(replace(pair, name=name, variant=variant))
            seen = content if pair.mask is not None else f"{content} {REGION}"  # in view stays what is estimated
            contents.append(content if variant is None else content_of(seen, variant))
            numbers.append(index)
    names = [pair.name for pair in made]
    if len(set(names)) < len(names):
        taken = sorted(name for name in set(names) if names.count(name) > 1)
        raise ValueError(f"pairs: {', '.join(taken)}: variants would have these names; rename the pairs that have them")
    sizes = tuple(pairs.sizes[i] for i in numbers)
    return replace(pairs, pairs=tuple(made), sizes=sizes, contents=tuple(contents), variants=settings)


def load(pair: Pair, size: Size, reference_sizes: Sequence[Size] = ()) -> PairImages:
    """Before, after and mask of a pair at ``size``, all three through one geometry; further references each at a size of its own.

    The after picture is scaled to cover ``size`` and cropped around its centre, or moved by as little as it takes to keep
    the mask inside. Before and mask are cut at the same fractions of their height and width, whatever their own sizes.

    Raises:
        ValueError: a file cannot be read.
    """
    pixels = {part: _pixels(source, part == "mask").values for part, source in _sources(pair).items()}
    references = [pixels.pop(part) for part in _further(pair)]
    keep = bounding_box(pixels["mask"]) if "mask" in pixels else None
    box = cover(pixels["after"].shape[:2], size, keep)
    with torch.inference_mode(False):
        fitted = {part: resample(values, box, size) for part, values in pixels.items()}
        seen = tuple(resample(r, cover(r.shape[:2], s), s) for r, s in zip(references, reference_sizes))
    return PairImages(fitted["before"], fitted["after"], fitted.get("mask"), references=seen)


def _sources(pair: Pair) -> dict[str, Source]:
    mask = {} if pair.mask is None else {"mask": pair.mask}
    return {"before": pair.before, "after": pair.after, **mask, **_further(pair)}


def _further(pair: Pair) -> dict[str, Source]:
    """The references beside the before picture, as the folders of a set call them."""
    return {f"before_{number}": source for number, source in enumerate(pair.references, 2)}


def _state(pair: Pair) -> str:
    """Changes when a file of a pair does, or is another one, without opening it; "" where there are none."""
    found = []
    for source in _sources(pair).values():
        if isinstance(source, Path):
            try:
                found.append(file_state(source))
            except OSError:  # reading it will say why
                found.append(GONE)
    return ", ".join(found)


def _pixels(source: Source, mask: bool) -> Picture:
    if isinstance(source, Path):
        try:
            return read_picture(source, mask)
        except ValueError as error:
            raise ValueError(f"{readable(f'{source.parent.name}/{source.name}')}: {error}") from error
    if not bool(torch.isfinite(source).all()):
        raise ValueError("expected values in 0…1, got NaN or infinity")
    content = hash_tensors([("picture", source)])
    return Picture(source.float().clamp(0.0, 1.0).numpy(), content)


def _check_settings(resolution: int, min_size: int) -> None:
    for name, value, low in (("resolution", resolution, MULTIPLE), ("min_size", min_size, 1)):
        check_whole(name, value, low, "pixels")


def _checked(
    pairs: Sequence[Pair],
    findings: list[Finding],
    layout: Optional[Layout],
    partial: Sequence[Path],
    resolution: int,
    upscale: bool,
    min_size: int,
    progress: Optional[Progress],
) -> PairSet:
    """Decode every picture, and make a set of them or raise the whole report. ``partial``: pictures without a partner,
    which are looked at as well."""
    looks: list[_Look] = []
    folder, description = (layout.root, layout.description) if layout else (None, "")
    with ahead(lambda pair: _inspect(pair, folder, min_size), pairs) as inspected:
        for done, look in enumerate(inspected):
            looks.append(look)
            findings += look.findings
            if progress is not None:
                progress(done + 1, len(pairs))
    notes = list(layout.notes) if layout else []
    if layout is not None:
        for path in partial:
            _try_pixels(path, False, layout.name(path), findings)
    foreign = [pair.name for pair in pairs if _of_another_script(pair.caption)]
    if foreign:
        notes.append(
            f"captions in other scripts than Latin, in {len(foreign)} pairs ({listed(foreign)}): many text encoders do not know "
            "them, and read different words as the same; write them in English"
        )
    notes += _notes({pair.name: look for pair, look in zip(pairs, looks) if not look.findings})
    if findings:
        raise PairProblems(findings, _where(folder, description), notes)
    pairs = [replace(pair, reference_sizes=look.references) for pair, look in zip(pairs, looks)]
    return PairSet(
        tuple(pairs), tuple(look.size for look in looks), tuple(look.content for look in looks), resolution, upscale, folder,
        description, tuple(notes), states={pair.name: look.state for pair, look in zip(pairs, looks) if look.state},
    )  # fmt: skip


def _of_another_script(caption: str) -> bool:
    letters = [letter for letter in caption if letter.isalpha()]
    return 2 * sum("LATIN" not in unicodedata.name(letter, "") for letter in letters) > len(letters)


class _Look(NamedTuple):
    """What :func:`_inspect` finds: sizes by part, content, state, remarks on how parts were read, and what is wrong."""

    sizes: Mapping[str, Size]
    content: str
    state: str
    remarks: Mapping[str, Sequence[Remark]]
    findings: Sequence[Finding]

    @property
    def size(self) -> Size:
        """What both pictures have at least."""
        both = [self.sizes.get(part, (0, 0)) for part in ("before", "after")]
        return min(h for h, _ in both), min(w for _, w in both)

    @property
    def references(self) -> tuple[Size, ...]:
        """Sizes of those beside the before picture."""
        return tuple(size for part, size in self.sizes.items() if part.startswith("before_"))


def _notes(looks: Mapping[str, _Look]) -> list[str]:
    """What a person should know of pairs that have nothing wrong."""
    remarks = [
        (name, remark if not remark.detail else remark._replace(detail=f"{part}: {remark.detail}"))
        for name, look in looks.items()
        for part, told in look.remarks.items()
        for remark in told
    ]
    notes = notes_on(remarks)
    profiles = Counter(
        next(
            (r.detail.removeprefix("from ") for r in look.remarks.get(part, ()) if r.kind == "profile"), "sRGB or none"
        )
        for look in looks.values()
        for part in ("before", "after")
    )
    if len(profiles) > 1:
        counts = ", ".join(f"{name}: {count}" for name, count in profiles.most_common())
        notes.append(f"the set mixes colour profiles ({counts} pictures); all are read as sRGB")
    unequal = {n: look.sizes for n, look in looks.items() if look.sizes["before"] != look.sizes["after"]}
    if unequal:
        told = (f"{name} ({times(sizes['before'])}, {times(sizes['after'])})" for name, sizes in unequal.items())
        notes.append(
            f"before and after differ in size in {len(unequal)} pairs, and are resized to one (before, after): "
            f"{', '.join(told)}"
        )
    other = [
        f"{name} ({times(look.sizes['mask'])} for {times(look.sizes['after'])})"
        for name, look in looks.items()
        if "mask" in look.sizes and look.sizes["mask"] not in (look.sizes["before"], look.sizes["after"])
    ]
    if other:
        notes.append(f"masks of another size than their pictures are resized to them: {listed(other)}")
    return notes


def _where(folder: Optional[Path], layout: str) -> str:
    return f"{readable(str(folder))} ({layout})" if folder else "the picture batches"


def _called(pair: Pair, part: str, folder: Optional[Path]) -> str:
    source = _sources(pair).get(part)
    return relative(source, folder) if folder and isinstance(source, Path) else f"{pair.original} {part}"


def _try_pixels(source: Source, mask: bool, label: str, findings: list[Finding]) -> Optional[Picture]:
    try:
        return read_picture(source, mask) if isinstance(source, Path) else _pixels(source, mask)
    except ValueError as error:
        findings.append(Finding("unreadable", (label,), str(error)))
        return None


def _inspect(pair: Pair, folder: Optional[Path], min_size: int) -> _Look:
    """Read a pair, and say what is wrong with it."""
    findings: list[Finding] = []
    state = _state(pair)  # first: what changes while it is read is seen later
    sources = _sources(pair)
    labels = {part: _called(pair, part, folder) for part in sources}
    tried = {part: _try_pixels(s, part == "mask", labels[part], findings) for part, s in sources.items()}
    found = {part: picture for part, picture in tried.items() if picture is not None}
    sizes = {part: (p.values.shape[0], p.values.shape[1]) for part, p in found.items()}
    for part in [part for part in sizes if part != "mask"]:
        if min(sizes[part]) < min_size:
            findings.append(
                Finding("too small", (labels[part],), f"{times(sizes[part])}, expected at least {min_size} px")
            )
    both = "before" in sizes and "after" in sizes
    if both and not same_proportions(sizes["before"], sizes["after"]):
        detail = f"{times(sizes['before'])} and {times(sizes['after'])}"
        findings.append(Finding("proportions", (labels["before"], labels["after"]), detail))
    elif both and found["before"].content == found["after"].content:
        findings.append(Finding("no edit", (labels["before"], labels["after"]), "they are the same"))
    if "mask" in sizes:
        top = float(found["mask"].values.max())
        fits = (same_proportions(sizes["mask"], sizes[p], MASK_PROPORTIONS) for p in ("before", "after") if p in sizes)
        if top < 0.5:
            detail = f"its brightest value is {top * 255:.0f} of 255, expected at least 128"
            findings.append(Finding("mask empty", (labels["mask"],), detail))
        elif "after" in sizes and not any(fits):
            detail = f"{times(sizes['mask'])} for {times(sizes['after'])}"
            findings.append(Finding("mask proportions", (labels["mask"], labels["after"]), detail))
    remarks = {part: picture.remarks for part, picture in found.items()}
    content = hash_tensors([], *(f"{part} {picture.content}" for part, picture in found.items()))
    return _Look(sizes, content, state, remarks, findings)
