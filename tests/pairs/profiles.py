"""Colour profiles as cameras and editors write them, made small; and whether HEIC is read here."""

import itertools
import struct

import pytest

from editloss_core.pairs.pictures import endings

without_heic = pytest.mark.skipif(".heic" in endings(), reason="pillow-heif is installed, so HEIC is not passed over")

# Columns of red, green and blue in XYZ under D50, as the profiles of these spaces have them.
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
ADOBE_RGB = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
D50 = (0.9642, 1.0, 0.8249)


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _curve(gamma: float) -> bytes:
    return struct.pack(">4s4xIH2x", b"curv", 1, round(gamma * 256))


def rgb(primaries=DISPLAY_P3, gamma: float = 2.2, name: str = "Display P3") -> bytes:
    """A matrix profile of three primaries and one gamma."""
    places = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)) | {b"wtpt": D50}
    tags = {tag: b"XYZ \0\0\0\0" + _fixed(*place) for tag, place in places.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma))
    return _profile(b"RGB ", tags, name)


def grey(gamma: float = 1.0, name: str = "Linear Grey") -> bytes:
    return _profile(b"GRAY", {b"wtpt": b"XYZ \0\0\0\0" + _fixed(*D50), b"kTRC": _curve(gamma)}, name)


# Inks on paper in CIELAB; what is printed over one another is as dark as the darkest and as coloured as their mean.
INKS = {"cyan": (60, -30, -40), "magenta": (50, 70, 0), "yellow": (90, -5, 90), "black": (15, 0, 0)}


def cmyk(name: str = "Coated") -> bytes:
    """A table profile of four inks, with one entry for each of the 16 ways to print them."""
    ramp = bytes(range(256))
    clut = b""
    for inks in itertools.product((0, 1), repeat=4):
        used = [lab for on, lab in zip(inks, INKS.values()) if on] or [(100, 0, 0)]
        light, a, b = min(lab[0] for lab in used), *(sum(lab[k] for lab in used) / len(used) for k in (1, 2))
        clut += bytes((round(light * 2.55), round(a) + 128, round(b) + 128))
    table = struct.pack(">4s4x4B", b"mft1", 4, 3, 2, 0) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp * 4 + clut + ramp * 3
    return _profile(b"CMYK", {b"wtpt": b"XYZ \0\0\0\0" + _fixed(*D50), b"A2B0": table}, name, b"prtr", b"Lab ")


def _profile(
    space: bytes, tags: dict[bytes, bytes], name: str, kind: bytes = b"mntr", connection: bytes = b"XYZ "
) -> bytes:
    text = name.encode() + b"\0"
    tags = tags | {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 78,
        b"cprt": b"text\0\0\0\0none\0",
    }
    place, table, body = 132 + 12 * len(tags), b"", b""
    for tag, data in tags.items():
        table += tag + struct.pack(">II", place + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4x4s4s4s4s12x4s28x", place + len(body), b"\x02\x20\0\0", kind, space, connection, b"acsp")
    return (head + _fixed(*D50)).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
