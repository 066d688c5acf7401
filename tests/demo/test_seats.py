"""Seats from parameters: every word is seen, and nobody draws the stool."""

import itertools
import random
from dataclasses import astuple, fields, replace

import numpy as np
import pytest
import torch

from editloss_core.demo import seats
from editloss_core.demo.prompts import encode
from editloss_core.demo.scenes import HELD_OUT, Scene, draw
from editloss_core.demo.seats import BACKS, HEIGHTS, LEGS, PART_COLOURS, SEAT_WORDS, STOOL_LOOK, TOPS, Seat, drawn_seat

CHOICES = (tuple(HEIGHTS), TOPS, LEGS, BACKS, *[tuple(PART_COLOURS)] * 3)


def test_every_word_changes_the_picture_and_the_prompt():
    scene = Scene(HELD_OUT + 2)
    seat = replace(STOOL_LOOK, back="barred")
    for field, words in zip(fields(Seat), CHOICES):
        looks = [replace(seat, **{field.name: word}) for word in words]
        pictures = [scene.picture(look, "red")[0] for look in looks]
        prompts = [encode(f"replace the chair with a {look}")[1] for look in looks]
        for (a, p), (b, q) in itertools.combinations(zip(pictures, prompts), 2):
            assert np.abs(a - b).max() > 0.1 and not torch.equal(p, q)


def test_every_shape_stands_in_the_picture_whole():
    """At any place and scale a scene can have."""
    for seed, shape in enumerate(itertools.product(*CHOICES[:4])):
        mask = Scene(seed).picture(Seat(*shape, "red", "blue", "black"), "red")[1]
        assert 500 < mask.sum() < 5000
        assert not mask[0].any() and not mask[-1].any() and not mask[:, 0].any() and not mask[:, -1].any()


def test_nobody_draws_the_stool_or_one_of_its_shape_in_two_of_its_colours():
    rng = random.Random(0)
    drawn = [astuple(drawn_seat(rng)) for _ in range(30_000)]
    own = astuple(STOOL_LOOK)
    shaped = [seat for seat in drawn if seat[:4] == own[:4]]
    assert 150 < len(shaped) < 450  # 1 of 108
    assert all(sum(a == b for a, b in zip(seat[4:], own[4:])) <= 1 for seat in shaped)
    assert {word for seat in drawn for word in Seat(*seat).words} == set(SEAT_WORDS)


def test_a_description_is_read_back():
    rng = random.Random(1)
    for _ in range(200):
        seat = drawn_seat(rng)
        said = str(seat).replace(",", "")
        assert seats.find_seat(f"replace the lamp with a {said} please") == (
            "replace the lamp with a seat please",
            seat,
        )
    assert seats.find_seat("replace the lamp with a seat") == ("replace the lamp with a seat", None)


def test_a_seat_is_one_token_of_a_words_length():
    context, pooled = encode(f"Replace the lamp with a {STOOL_LOOK}.")
    plain = encode("replace the lamp with a chair")
    assert [context.shape, pooled.shape] == [part.shape for part in plain]
    assert float(context[0, 1].norm()) == pytest.approx(float(plain[0][0, 1].norm()))
    assert torch.equal(context[0, 0], plain[0][0, 0])


def test_an_example_of_a_seat():
    example = draw(HELD_OUT + 4, "replace", "lamp", STOOL_LOOK)
    stool = draw(HELD_OUT + 4, "replace", "lamp", "stool")
    assert torch.equal(example.after, stool.after) and torch.equal(example.new_mask, stool.new_mask)
    assert example.prompt == f"replace the lamp with a {STOOL_LOOK}"


@pytest.mark.parametrize(
    "text, word",
    [
        ("a huge round backless seat with splayed legs, teal top, pink rim, brown legs", "huge"),
        ("a low round backless seat with splayed legs, white top, pink rim, brown legs", "white"),
    ],
)
def test_unknown_words_are_named(text, word):
    with pytest.raises(ValueError, match=f"got '{word}'"):
        encode(f"replace the chair with {text}")


@pytest.mark.parametrize("text", ["replace the chair with a seat", "remove the seat", f"make the {STOOL_LOOK} red"])
def test_a_seat_is_a_described_target(text):
    with pytest.raises(ValueError, match="text: "):
        encode(text)
