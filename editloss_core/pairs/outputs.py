"""Outputs of an edit model beside the pairs that they are of: what lies where, and which step of a training made it.

Trainers sample the same pictures again and again, and say in the name of a file, or of a folder, after how many steps. None of
them says it like another; what is read here is in ``editloss diagnose --help``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional

from .files import Layout, ending_in, part_folders, pictures_in, readable, relative, visible, walk
from .pictures import endings, needs

PARTS = ("before", "output", "after", "mask")
TABLES = {"before": "before", "after": "after", "mask": "masks"}  # part → its table of a layout

_BREAK = r"[\s/_\-.~()\[\]=#+,]"
_TOKEN = re.compile(r"[^\s/_\-.~()\[\]=#+,]+")
_STEP_WORD = re.compile(r"(?:global)?(?:steps?|iters?|iterations?|its?|checkpoints?|ckpts?)", re.I)
_EPOCH_WORD = re.compile(r"epochs?|ep|e", re.I)
# Clocks: milliseconds or seconds with a date (ai-toolkit, kohya); a date, and a time behind it.
_CLOCK = re.compile(r"\d{12,17}")
_DATE = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])")
_PADDED = re.compile(r"\d{6,11}")  # kohya pads a step to 6 digits, ai-toolkit to 9
# What may be left of a name beside the pair's and the step: it says nothing of which pair it is.
_PLAIN = re.compile(
    r"\d{1,5}|s(?:eed)?\d+|seed|v\d+|samples?|images?|img|outputs?|out|val(?:idation)?|preview|gen(?:erated)?|lora|result|final|last",
    re.I,
)


@dataclass(frozen=True)
class Moment:
    """When an output was made: after so many steps, or epochs; None where the name does not say."""

    count: Optional[int] = None
    unit: str = "step"

    def __str__(self) -> str:
        return "" if self.count is None else f"{self.unit} {self.count:,}"


@dataclass(frozen=True)
class Output:
    """One output.

    Attributes:
        name: as the entry is called: its path below the outputs' folder without suffix.
        path: of the file.
        key: of its pair in the layout's tables; "" where none fits.
        moment: when it was made.
        note: how it was matched, where that is not by the pair's name.
        problem: why it belongs to no pair; else "".
    """

    name: str
    path: Path
    key: str = ""
    moment: Moment = Moment()
    note: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Outputs:
    """Outputs and the pairs that they are of, before any picture is opened.

    Attributes:
        layout: before, after and masks by the pair's key; its root is what names in messages are relative to.
        outputs: in the order of their files.
        places: the folders, or the file, of each part.
        notes: what a person should know of how they were matched.
    """

    layout: Layout
    outputs: tuple[Output, ...]
    places: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sampled(self) -> bool:
        """Whether they were sampled in the course of a training: some name says when."""
        return any(o.moment.count is not None for o in self.outputs)


def find_outputs(folder: Optional[Path] = None, parts: Optional[Mapping[str, Path]] = None) -> Outputs:
    """The outputs of a folder, or of parts that are named, with the pairs that they belong to.

    Args:
        folder: has the parts as folders or as endings of names; where ``parts`` has "before", it may be the outputs' own.
        parts: "before", "output", "after" and "mask" → folder or picture; each goes before what ``folder`` has.

    Raises:
        FileNotFoundError: a folder or picture is not there.
        ValueError: no before pictures or no outputs, with what was looked for and what is there.
    """
    given = {part: Path(place) for part, place in (parts or {}).items() if place is not None}
    for part, place in given.items():
        if not place.exists():
            raise FileNotFoundError(f"--{part}: there is no folder or picture {place}")
    kinds = {part: place.is_dir() for part, place in given.items() if part != "output"}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"--{part} a {'folder' if is_folder else 'picture'}" for part, is_folder in kinds.items())
        raise ValueError(
            f"expected folders, or pictures, for all of {', '.join(f'--{part}' for part in kinds)}, got {told}"
        )
    if folder is None and not {"before", "output"} <= given.keys():
        missing = " and ".join(f"--{part}" for part in ("before", "output") if part not in given)
        raise ValueError(f"expected FOLDER, or --before and --output, got no {missing}")
    places, flat = _places(folder, given)
    root = folder if folder is not None else places["output"][0].parent
    layout = Layout("outputs", root)
    first = places["before"][0]
    one = first.stem if first.is_file() else ""  # one before picture, whatever the others are called
    if flat is not None:
        found = _flat(layout, flat)
    else:
        for part, table in TABLES.items():
            entries = list(_pictures(places.get(part, ()), _others(places, part)))
            layout.add(table, [(one or name, path) for name, path in entries])
            if part == "before":
                layout.names.update({name.casefold(): name for name, _ in entries})
        found = list(_pictures(places["output"], _others(places, "output")))
    for _, path in found:
        layout.use(path)
    if folder is not None:
        parts_own = {place for there in places.values() for place in there} - {folder}
        pictures = (path for path in walk(folder) if _concerns(path, parts_own))
        if flat is not None or folder in places["output"]:
            layout.account(pictures, "pictures of no part")
        else:
            layout.account(pictures, "pictures outside before/, output/, after/ and mask/", PARTS)
    if not layout.before and not found:
        looked = " and ".join(relative(places[part][0], root) + "/" * places[part][0].is_dir() for part in PARTS[:2])
        told = "".join(f"; {note}" for note in layout.notes)
        raise ValueError(f"expected pictures in {looked} of {readable(str(root))}, got none{told}")
    matched, notes = _matched(found, layout, one.casefold())
    return Outputs(layout, tuple(matched), places, (*notes, *layout.notes))


def _places(folder: Optional[Path], given: Mapping[str, Path]) -> tuple[dict[str, Sequence[Path]], Optional[Path]]:
    """(where the parts are, the folder in which endings of names tell them apart or None)."""
    places: dict[str, Sequence[Path]] = {part: (place,) for part, place in given.items()}
    if folder is None:
        return places, None
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {readable(str(folder))}")
    if not folder.is_dir():
        raise ValueError(
            f"expected a folder, got the file {readable(str(folder))}; single pictures are named one by one: --before A --output B --after C"
        )
    for part in PARTS:
        inside = part_folders(folder, part)
        if inside:
            places.setdefault(part, inside)
    if {"before", "output"} <= places.keys():
        return places, None
    if "before" in given and "output" not in places:
        return {**places, "output": (folder,)}, None
    if any(_ends(path.stem, "output") for _, path in pictures_in(folder)):
        return {"before": (folder,), "output": (folder,)}, folder
    missing = [part for part in PARTS[:2] if part not in places]
    there = ", ".join(sorted(readable(p.name) + "/" * p.is_dir() for p in visible(folder))[:12]) or "nothing"
    raise ValueError(
        f"folder: expected before/ and output/ in {readable(str(folder))}, got {' and '.join(f'no {part}/' for part in missing)}; there is: {there}. "
        f"Name {'it' if len(missing) == 1 else 'them'} with {' and '.join(f'--{part} DIR' for part in missing)}, or see --help for the layouts"
    )


def _concerns(path: Path, folders: Collection[Path]) -> bool:
    """Whether a person should hear of a file that is passed over: what lies among a part's pictures, but for captions;
    elsewhere pictures alone, since trainers leave much beside them."""
    kind = path.suffix.lower()
    if any(folder in path.parents for folder in folders):
        return kind != ".txt"
    return kind in endings() or bool(needs(kind))


def _others(places: Mapping[str, Sequence[Path]], part: str) -> list[Path]:
    """The folders of all parts but one."""
    return [place for other, there in places.items() if other != part for place in there if place.is_dir()]


def _pictures(places: Sequence[Path], apart: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Those of folders, or the one that a place is itself."""
    for place in places:
        if place.is_file():
            yield readable(place.stem), place
        else:
            yield from pictures_in(place, apart)


def _ends(stem: str, part: str) -> bool:
    return re.fullmatch(rf".+_{part}(?:{_BREAK}.*)?", stem, re.I | re.S) is not None


def _flat(layout: Layout, folder: Path) -> list[tuple[str, Path]]:
    """Fill the tables from one folder in which names end in the part; the outputs of it, without the ending."""
    pictures = list(pictures_in(folder))
    outputs = [(name, path) for name, path in pictures if _ends(path.stem, "output")]
    others = [entry for entry in pictures if entry not in outputs]
    for part, table in TABLES.items():
        entries = ending_in(f"_{part}", others)
        layout.add(table, entries)
        if part == "before":
            layout.names.update({name.casefold(): name for name, _ in entries})
    return [(re.sub(rf"_output(?={_BREAK}|$)", "", name, flags=re.I), path) for name, path in outputs]


# ---------------------------------------------------------------------------------------------------------------------
# Which output is of which pair
# ---------------------------------------------------------------------------------------------------------------------


def _matched(found: Sequence[tuple[str, Path]], layout: Layout, one: str) -> tuple[list[Output], list[str]]:
    """The outputs with their pairs: by name, and where that fails by the number of the sample. ``one``: of all of them."""
    if one:
        return [Output(name, path, one, moment_of(name)) for name, path in found], []
    single = next(iter(layout.before)) if len(layout.before) == 1 else ""
    outputs = [_by_name(name, path, layout.before) for name, path in found]
    strangers = [i for i, o in enumerate(outputs) if not o.key]
    sampled = [i for i in strangers if outputs[i].moment.count is not None]
    if not sampled:
        return outputs, []
    if single:
        for i in sampled:
            outputs[i] = replace(outputs[i], key=single)
        return outputs, [
            f"every output was taken for one of {layout.name(layout.before[single])}, the only before picture"
        ]
    numbers = {i: number for i in sampled if (number := sample_number(outputs[i].name)) is not None}
    keys = sorted(layout.before, key=natural)
    first = 1 if numbers and min(numbers.values()) == 1 else 0
    most = max(numbers.values(), default=-1)
    if not numbers or most + 1 - first != len(keys):
        told = f"numbered {first} to {most}" if numbers else "without the name of a pair"
        problem = (
            f"before: its name has no pair's name in it, and the samples are {told} beside {len(keys)} before pictures; name "
            "with --before a folder that has one for each sample, in their order"
        )
        for i in sampled:
            outputs[i] = replace(outputs[i], problem=problem)
        return outputs, []
    for i, number in numbers.items():
        outputs[i] = replace(outputs[i], key=keys[number - first], note="Matched by the number of the sample.")
    places = ", ".join(f"{i} = {layout.name(layout.before[key])}" for i, key in enumerate(keys[:4], first))
    more = ", …" if len(keys) > 4 else ""
    return outputs, [f"samples were matched to before pictures by their numbers: {places}{more}"]


def _by_name(name: str, path: Path, before: Mapping[str, Path]) -> Output:
    """The pair whose name is all of the output's, or the longest that is in it beside a step, a number or a seed."""
    low = name.casefold()
    if low in before:
        return Output(name, path, low)
    whole = moment_of(low)
    for key in sorted((k for k in before if k in low), key=lambda k: (-len(k), k)):
        for place in re.finditer(rf"(?:\A|(?<={_BREAK})){re.escape(key)}(?={_BREAK}|\Z)", low):
            rest = f"{low[: place.start()]}/{low[place.end() :]}"
            moment = moment_of(rest)
            first = place.start() == 0 or low[place.start() - 1] == "/"
            if moment.count is None and whole.count is not None and not (key.isdecimal() and first):
                continue  # what was cut out is the step itself
            if moment.count is None and not _is_plain(rest, key, before):
                continue
            return Output(name, path, key, moment)
    return Output(name, path, "", whole)


def _is_plain(rest: str, key: str, before: Mapping[str, Path]) -> bool:
    """Whether what is left of a name beside a pair's is numbers and words that say nothing; and not a number by which other
    pairs are told apart: with room and room_2, room_3 is no output of room."""
    if not all(_PLAIN.fullmatch(token) for token in _TOKEN.findall(rest)):
        return False
    numbered = re.compile(rf"{re.escape(key)}{_BREAK}?\d+")
    return not any(numbered.fullmatch(other) for other in before)


def moment_of(name: str) -> Moment:
    """When an output, or a checkpoint, was made, as its name says.

    >>> moment_of("1700000000000__000000250_0"), moment_of("mylora_e000003_01_20250101120000_42")
    (Moment(count=250, unit='step'), Moment(count=3, unit='epoch'))
    >>> moment_of("checkpoint-500/kitchen").count, moment_of("kitchen_00001_").count
    (500, None)
    """
    found = _moment(name)
    return found[0] if found else Moment()


def _moment(name: str) -> Optional[tuple[Moment, int]]:
    """(when, where in the name it ends). Words decide; without one, numbers that are padded or folders of their own, and epochs as
    kohya writes them. Numbers behind a clock are seeds, where there is one before it."""
    tokens = [(m[0], m.start(), m.end()) for m in _TOKEN.finditer(name)]
    found: list[tuple[Moment, int]] = []
    before_clock: Optional[int] = None  # how many of them
    after_date = False
    for i, (token, start, end) in enumerate(tokens):
        following = tokens[i + 1] if i + 1 < len(tokens) else None
        word = re.fullmatch(r"([A-Za-z]+)(\d+)", token) or re.fullmatch(r"(\d+)(steps?|iters?|it)", token, re.I)
        if word:
            letters, digits = (word[1], word[2]) if word[1].isalpha() else (word[2], word[1])
            if _STEP_WORD.fullmatch(letters):
                return Moment(int(digits)), end
            if _EPOCH_WORD.fullmatch(letters) and (letters.lower() != "e" or len(digits) >= 3):
                found.append((Moment(int(digits), "epoch"), end))
        elif following and following[0].isdecimal() and not _CLOCK.fullmatch(following[0]):
            if _STEP_WORD.fullmatch(token):
                return Moment(int(following[0])), following[2]
            if _EPOCH_WORD.fullmatch(token) and len(token) > 1:
                found.append((Moment(int(following[0]), "epoch"), following[2]))
        counted = (
            token.isdecimal() and following is not None and re.fullmatch(r"steps|iters|iterations", following[0], re.I)
        )
        if counted and not (i + 2 < len(tokens) and tokens[i + 2][0].isdecimal()):  # 250_steps, and not steps_250
            return Moment(int(token)), tokens[i + 1][2]
        a_date = _DATE.fullmatch(token) is not None
        if a_date or _CLOCK.fullmatch(token) or (after_date and len(token) == 6):
            before_clock = len(found)
        elif token.isdecimal():
            folder = name[end : end + 1] == "/" and (start == 0 or name[start - 1] == "/")
            if _PADDED.fullmatch(token) or folder:
                found.append((Moment(int(token)), end))
        after_date = a_date
    if not found:
        return None
    return found[0] if before_clock == 0 else found[(before_clock or len(found)) - 1]


def sample_number(name: str) -> Optional[int]:
    """The number of the prompt that an output was sampled for: the first behind the step that is no clock, or else the last in
    front of it.

    >>> sample_number("name_e000001_01_20240101120000_42"), sample_number("image_3_step_250"), sample_number("step_250/kitchen")
    (1, 3, None)
    """
    found = _moment(name)
    if found is None:
        return next(iter(_numbers(name)), None)
    moment, end = found
    behind, front = _numbers(name[end:]), _numbers(name[:end])
    if front and front[-1] == moment.count:
        front.pop()  # the step itself
    return behind[0] if behind else front[-1] if front else None


def _numbers(text: str) -> list[int]:
    """Those of at most five digits; where some stand behind a word for a picture, these alone."""
    named = re.findall(r"(?:image|img|prompt|sample|val(?:idation)?)s?[_\- ]?(\d{1,5})(?!\d)", text, re.I)
    return [int(t) for t in named or [t for t in _TOKEN.findall(text) if t.isdecimal() and len(t) <= 5]]


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A key for sorting in which 2 comes before 10."""
    pieces = re.split(r"([0-9]+)", name.casefold())
    return [(0, int(p), "") if p.isdecimal() and p.isascii() else (1, 0, p) for p in pieces], name
