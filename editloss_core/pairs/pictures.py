"""What a picture file is, and its pixels: the one place that decides which kinds are read, and what becomes of profiles,
transparency, palettes, deep numbers, animation and orientation. Whatever is not plain is a :class:`Remark`.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Optional

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

# Formats that Pillow names but are no pictures here: they start another program, or are film, data or stubs.
NOT_READ = ("BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "WMF", "XVTHUMB")
# Endings of pictures that need more than there may be, with what that is.
NEEDS = {
    ".avif": "Pillow 11.3 or newer",
    ".heic": "the package pillow-heif",
    ".heif": "the package pillow-heif",
    ".hif": "the package pillow-heif",
    ".jxl": "the package pillow-jxl-plugin",
    **dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"), "a raw converter"),
    **dict.fromkeys((".ai", ".eps", ".pdf", ".svg"), "to be drawn in pixels"),
    **dict.fromkeys((".exr", ".hdr"), "to be brought into 0…1"),
}
# How a file begins → what it is.
CONTENT = {
    rb"\x89PNG": "PNG",
    rb"\xff\xd8\xff": "JPEG",
    rb"RIFF....WEBP": "WebP",
    rb"BM": "BMP",
    rb"(II[*+]\0|MM\0[*+])": "TIFF",
    rb"GIF8": "GIF",
    rb"....ftyp(avif|avis)": "AVIF",
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC",
    rb"(\xff\x0a|\0\0\0\x0cJXL )": "JPEG XL",
    rb"(\0\0\0\x0cjP  |\xff\x4f\xff\x51)": "JPEG 2000",
    rb"%PDF": "PDF",
    rb"(?i)\s*(<!doctype html|<html)": "a web page",
    rb"(?i)\s*<(\?xml|svg)": "SVG or XML",
    rb"version https://git-lfs": "a pointer of Git LFS; fetch the files themselves",
}
SAME_COLOUR = 2  # of 255: a profile that changes no colour by more is sRGB
SIXTEEN = 16.0  # floats above it that are not whole count to 255; those up to it are bright parts of pictures in 0…1
UNDER = 0.05  # of the scale: how far below 0 the ringing of a resize may reach

# What a remark says, of one picture.
REMARKS = {
    "transparent": "transparency was laid on white",
    "transparent mask": "transparency was laid on black",
    "cut-out": "a cut-out's transparency was read as the mask",
    "no mask": "a mask is neither black nor white in most places",
    "profile": "colours were converted to sRGB",
    "bad profile": "a colour profile that cannot be used was left out",
    "only EXIF": "Adobe RGB that only EXIF tells was read as sRGB",
    "frames": "the first of several frames or pages was read",
    "scale": "numbers were read on another scale than the format's",
    "bright": "values above 1 were cut off",
    "orientation": "a picture with damaged EXIF was read as it is stored",
}
READ_OTHERWISE = (
    "cut-out",
    "profile",
    "scale",
)  # remarks that make other pixels of the same bytes than plain reading does


class Remark(NamedTuple):
    """Something that a person should know about how a picture was read: one of :data:`REMARKS`, and the detail or ""."""

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return REMARKS[self.kind] + (f" ({self.detail})" if self.detail else "")


class Picture(NamedTuple):
    """Pixels of a file.

    Attributes:
        values: float32 in 0…1, sRGB ``[H, W, 3]`` or (masks) ``[H, W]``.
        content: equal for equal bytes that are read alike: sha256 of them, and of how they are read where that is not plain.
        remarks: on how it was read.
    """

    values: np.ndarray
    content: str
    remarks: tuple[Remark, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# Kinds
# ---------------------------------------------------------------------------------------------------------------------


@cache
def _initialised() -> None:
    """Every plugin that Pillow has, and those for HEIC and JPEG XL if they are installed."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401 (registers itself)


def _formats() -> list[str]:
    _initialised()
    return [kind for kind in Image.OPEN if kind not in NOT_READ]


def endings() -> frozenset[str]:
    """Endings of pictures that can be read here, in lower case with their dot."""
    formats = set(_formats())
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in formats)


def needs(ending: str) -> str:
    """What reading a picture of an ending would take; "" if it can be read, or is not known to be one."""
    return "" if ending in endings() else NEEDS.get(ending, "")


def _unidentified(data: bytes) -> str:
    """Why Pillow found no picture in a file."""
    kind = next((name for start, name in CONTENT.items() if re.match(start, data, re.DOTALL)), "")
    if not data:
        return "it is empty"
    if not data.strip(b"\0"):
        return "it holds nothing but zeros"
    if kind == "HEIC" or kind == "JPEG XL":
        wanted = NEEDS[".heic" if kind == "HEIC" else ".jxl"]
        return f"its content is {kind}, which needs {wanted}; install that, or save it as PNG"
    if kind in ("PNG", "JPEG", "WebP", "BMP", "TIFF", "GIF", "AVIF", "JPEG 2000"):
        return f"its content is {kind}, but damaged or of a kind that cannot be read here; save it with 8 bits a colour"
    return (
        f"its content is {kind}" if kind else "its content is not PNG, JPEG or any other picture that can be read here"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------

_truncation = Lock()
_strict: list[bool] = []  # one entry for each thread that reads; the first knows how the flag was


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Other programs in the process may have told Pillow to fill cut-off files with grey.

    The flag is the process', so that threads which read at the same time share the change, and the last one takes it back.
    """
    with _truncation:
        _strict.append(_strict[0] if _strict else ImageFile.LOAD_TRUNCATED_IMAGES)
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        with _truncation:
            previous = _strict.pop()
            if not _strict:
                ImageFile.LOAD_TRUNCATED_IMAGES = previous


def read_picture(path: Path, mask: bool = False) -> Picture:
    """The first frame of a picture file, turned as its EXIF orientation says, in sRGB.

    Colours with a profile are converted to sRGB; masks are numbers, and keep theirs. Transparency is laid on white, in a
    mask on black; where a mask is a cut-out, its transparency is the mask. Grey, palette, CMYK, LAB and 16-bit files become
    RGB, masks grey. Whole numbers up to 255 count to 255 however many bits they have, floats likewise.

    Raises:
        ValueError: it cannot be read whole, with the reason.
    """
    try:
        data = path.read_bytes()
        remarks: list[Remark] = []
        with _whole_files_only(), Image.open(io.BytesIO(data), formats=_formats()) as image:
            remarks += _frames(image)
            image.load()
            profile = image.info.get("icc_profile", b"")  # None where it could not be unpacked
            upright = _upright(image, remarks)
            if profile == b"" and not mask and _adobe_by_exif(image):
                remarks.append(Remark("only EXIF"))
            values = _mask(upright, remarks) if mask else _colours(upright, profile, remarks)
            between = float(((values > 0.1) & (values < 0.9)).mean()) if mask else 0.0
            if between > 0.5:  # such as a picture of the object
                remarks.append(Remark("no mask", f"{between:.0%} of it"))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(_unidentified(data)) from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise ValueError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
    content = hashlib.sha256(data).hexdigest()
    otherwise = [remark.kind for remark in remarks if remark.kind in READ_OTHERWISE]
    if otherwise:
        content = hashlib.sha256(f"{content} {' '.join(otherwise)}".encode()).hexdigest()
    return Picture(values, content, tuple(remarks))


def _frames(image: Image.Image) -> list[Remark]:
    """Animations and files of several pages. A phone's second frame (MPO) and layers (PSD) are no others of the same kind."""
    if image.format in ("MPO", "PSD"):
        return []
    try:
        count = getattr(image, "n_frames", 1)
    except Exception:  # a later frame is damaged; the first one is not
        return [Remark("frames")]
    return [Remark("frames", f"{count} of them")] if count > 1 else []


def _upright(image: Image.Image, remarks: list[Remark]) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever stands in damaged EXIF
        remarks.append(Remark("orientation"))
        return image


def _adobe_by_exif(image: Image.Image) -> bool:
    """Whether a camera says so that writes no profile."""
    try:
        exif = image.getexif()
        return exif.get_ifd(0x8769).get(0xA001) == 2 or exif.get_ifd(0xA005).get(1) == "R03"
    except Exception:  # whatever stands in damaged EXIF
        return False


def _colours(image: Image.Image, profile: Optional[bytes], remarks: list[Remark]) -> np.ndarray:
    """``[H, W, 3]`` in sRGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        grey = _levels(image, remarks)
        curve = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        converted = np.asarray(_in_srgb(curve, profile, remarks), dtype=np.float32)[0] / 255.0
        if any(remark.kind == "profile" for remark in remarks):
            return np.stack([np.interp(grey * 255.0, np.arange(256), c) for c in converted.T], -1).astype(np.float32)
        return np.repeat(grey[..., None], 3, axis=2)
    alpha = _alpha(image)
    if alpha is not None:
        image = image.convert("L" if image.mode in ("L", "LA") else "RGBA")
    colours = _in_srgb(image, profile, remarks)
    if alpha is not None and np.asarray(alpha).min() < 255:
        remarks.append(Remark("transparent"))
        colours.putalpha(alpha)
        colours = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return np.asarray(colours, dtype=np.float32) / 255.0


def _mask(image: Image.Image, remarks: list[Remark]) -> np.ndarray:
    """``[H, W]``, 1 where the edit is."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _levels(image, remarks)
    alpha = _alpha(image)
    if alpha is None:
        image = _lab().apply(image) if image.mode == "LAB" else image
        return np.asarray(image.convert("L"), dtype=np.float32) / 255.0
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, "black")
    grey, opaque = np.asarray(Image.alpha_composite(ground, image).convert("L")), np.asarray(alpha)
    if opaque.min() < 128 <= opaque.max() and not np.array_equal(grey, opaque):
        if not _drawn(np.asarray(image.convert("RGB").convert("L"))[opaque >= 128]):
            remarks.append(Remark("cut-out"))
            grey = opaque
    elif opaque.min() < 255 and not np.array_equal(grey, opaque):
        remarks.append(Remark("transparent mask"))
    return grey.astype(np.float32) / 255.0


def _drawn(grey: np.ndarray) -> bool:
    """Whether what is opaque is a mask itself, drawn in black and in white, and no picture of a thing."""
    black, white = (grey <= 8).mean(), (grey >= 247).mean()
    return black + white >= 0.98 and min(black, white) >= 0.01


def _alpha(image: Image.Image) -> Optional[Image.Image]:
    """The transparency of a picture, 255 where it is opaque; None if it has none."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA").getchannel("A")
    return None


def _levels(image: Image.Image, remarks: list[Remark]) -> np.ndarray:
    """Grey ``[H, W]`` in 0…1 of a file with more than 8 bits: Pillow's own conversion cuts these off at 255."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("expected finite values, got NaN or infinity")
    low, high = float(values.min()), float(values.max())
    if image.mode != "F":
        top, scales = 65535.0, (255.0, 65535.0)
        scale = next((s for s in scales if high <= s), 0.0)
    else:
        top = 1.0
        if high <= 1.0 or (high <= SIXTEEN and not (values == np.round(values)).all()):
            scale = 1.0
        else:
            scale = next((s for s in (255.0, 65535.0) if high <= s * (1 + UNDER)), 0.0)
    if not scale or low < -UNDER * scale:
        kinds = "0…1, 0…255 or 0…65535" if image.mode == "F" else "0…255 or 0…65535"
        raise ValueError(f"expected numbers in {kinds}, got {low:g} to {high:g}")
    if scale != top and high > 0:
        remarks.append(Remark("scale", f"0…{scale:g}; the largest is {high:g}"))
    elif image.mode == "F" and high > 1.0:
        remarks.append(Remark("bright", f"up to {high:g}"))
    return (values / scale).clip(0.0, 1.0).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Colours
# ---------------------------------------------------------------------------------------------------------------------


def _rgb(image: Image.Image) -> Image.Image:
    """RGB by Pillow's own conversion; LAB, which it cannot convert so, through its colour management."""
    if image.mode == "LAB":
        return _lab().apply(image)
    return image.convert("RGB")


def _in_srgb(image: Image.Image, profile: Optional[bytes], remarks: list[Remark]) -> Image.Image:
    """Opaque colours in sRGB, with a remark where a profile changes them or cannot be used."""
    if profile == b"":
        return _rgb(image)
    try:
        transform = _transform(profile or b"")
        if transform.space == "RGB" and image.mode != "CMYK" and image.mode != "LAB":
            image = image.convert("RGB")
        elif transform.space == "GRAY" and image.mode == "1":
            image = image.convert("L")
        if image.mode != transform.mode:
            raise ValueError(f"it is for {transform.space} pictures, and this one is {image.mode}")
    except (
        Exception
    ) as error:  # ImageCms raises OSError, PyCMSError and more; ImportError where Pillow is built without it
        remarks.append(Remark("bad profile", _first_line(error)))
        return _rgb(image)
    if transform.plain:
        return _rgb(image)
    remarks.append(Remark("profile", f"from {transform.name}"))
    return transform.apply(image)


class _Transform(NamedTuple):
    """Of one profile to sRGB.

    Attributes:
        space: of the profile, as it calls it.
        mode: of the pictures that it takes.
        name: of the profile.
        plain: whether it is sRGB, or as good as that: then nothing is converted.
        built: Pillow's.
    """

    space: str
    mode: str
    name: str
    plain: bool
    built: Any

    def apply(self, image: Image.Image) -> Image.Image:
        converted = ImageCms.applyTransform(image, self.built)
        assert converted is not None  # it is so only where it was asked to work in place
        return converted


MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> _Transform:
    """Raises whatever ImageCms raises, and ValueError, for a profile that cannot be used."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    if space not in MODES:
        raise ValueError(f"it is for {space} colours")
    mode = MODES[space]
    built = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    name = _first_line(ImageCms.getProfileDescription(opened)) or "a profile without a name"
    plain = False
    if mode in ("RGB", "L"):
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 1, 3)
        probe = Image.fromarray(cube if mode == "RGB" else np.repeat(steps[:, None], 2, 1))
        expected = np.asarray(probe.convert("RGB"), dtype=np.int16)
        given = np.asarray(ImageCms.applyTransform(probe, built), dtype=np.int16)
        if given[-1].min() < 200:
            raise ValueError("it makes white dark")
        plain = int(np.abs(given - expected).max()) <= SAME_COLOUR
    return _Transform(space, mode, name, plain, built)


@cache
def _lab() -> _Transform:
    """CIELAB without a profile of its own: of D50, as TIFF has it."""
    built = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    return _Transform("Lab", "LAB", "CIELAB", False, built)


def _first_line(text: object) -> str:
    return next((line.strip() for line in str(text).splitlines() if line.strip()), "")


# ---------------------------------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------------------------------

NAMED = 5  # pictures that a note on many of them names


def notes_on(found: Iterable[tuple[str, Remark]]) -> list[str]:
    """A line for each kind of remark on a set: (name, remark) of all of its pictures."""
    told: dict[str, dict[str, dict[str, None]]] = {}
    for name, remark in found:
        told.setdefault(remark.kind, {}).setdefault(name, {}).setdefault(remark.detail)
    notes = []
    for kind in REMARKS:
        names = told.get(kind, {})
        if names:
            listed = [name + (f" ({', '.join(filter(None, d))})" if any(d) else "") for name, d in names.items()]
            more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
            notes.append(f"{REMARKS[kind]} in {len(names)} pairs: {', '.join(listed[:NAMED])}{more}")
    return notes
