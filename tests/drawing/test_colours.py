"""Colours of verdicts: readable on light and dark, and told apart by people who see colours otherwise."""

import itertools

import pytest
import torch

from editloss_core.drawing.colours import VERDICT_COLORS, color_of, text_on
from editloss_core.drawing.sheet import INK
from editloss_core.verdict.judge import UNDECIDED, VERDICTS

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009),
# severity 1, on linear RGB.
SIGHT = {
    "trichromacy": [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
# Ottosson, "A perceptual color space for image processing" (2020).
TO_LMS = torch.tensor([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566], [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
TO_LAB = torch.tensor([[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099], [0.0259040371, 0.7827717662, -0.808675766]])  # fmt: skip


def linear(color):
    rgb = torch.tensor([int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    """WCAG 2.2."""
    low, high = sorted(float(linear(c) @ torch.tensor([0.2126, 0.7152, 0.0722])) + 0.05 for c in (a, b))
    return high / low


def test_every_verdict_has_a_colour():
    assert list(VERDICT_COLORS) == list(VERDICTS)


@pytest.mark.parametrize("sight", SIGHT)
def test_verdicts_are_told_apart(sight):
    def seen(color):
        return TO_LAB @ (TO_LMS @ (torch.tensor(SIGHT[sight]) @ linear(color)).clamp(0, 1)).pow(1 / 3)

    for a, b in itertools.combinations(VERDICTS, 2):
        least = 0.075 if UNDECIDED in (a, b) else 0.125  # grey, and only an outline
        assert (seen(VERDICT_COLORS[a]) - seen(VERDICT_COLORS[b])).norm() >= least, (a, b)


@pytest.mark.parametrize("verdict", VERDICTS)
def test_colours_stand_out_on_both_pages_and_carry_letters(verdict):
    color = VERDICT_COLORS[verdict]
    assert contrast(color, "#ffffff") >= 3 and contrast(color, "#14171b") >= 3
    assert text_on(color) in ("#ffffff", INK) and contrast(color, text_on(color)) >= 4.5


@pytest.mark.parametrize(
    "words, verdict",
    [
        ("good", "good"), ("NO EDIT 0.93", "no edit"), ("collateral change", "collateral change"),
        ("collateral", "collateral change"), ("not judged", None), ("no failure", None), ("", None), ("odd", None),
    ],
)  # fmt: skip
def test_words_have_the_colour_of_the_verdict_that_they_begin_with(words, verdict):
    assert color_of(words) == VERDICT_COLORS.get(verdict)
