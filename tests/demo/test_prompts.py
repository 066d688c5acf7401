"""Prompts of the small model: what they mean, what does not matter, and what is refused."""

import pytest
import torch

from editloss_core.demo import prompts
from editloss_core.demo.drawing import COLOURS, OBJECTS, STOOL
from editloss_core.demo.prompts import CONTEXT, POOLED, encode
from editloss_core.demo.scenes import HELD_OUT, TASKS, draw, stool_pairs


def word(text, token):
    """The word part of a prompt's source (0) or target (1)."""
    return encode(text)[0][0, token, : prompts.WORD]


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize(
    "text", ["Replace the CHAIR with a table.", "replace chair table", "Please replace a chair by the table!", "  replace\nan chair,table "]
)  # fmt: skip
def test_case_articles_and_punctuation_do_not_matter(text):
    for got, expected in zip(encode(text), encode("replace the chair with a table")):
        assert torch.equal(got, expected)


def test_every_prompt_has_its_own_meaning():
    things = (*OBJECTS, STOOL)
    texts = [f"replace the {a} with a {b}" for a in things for b in things]
    texts += [f"remove the {a}" for a in things] + [f"make the {a} {c}" for a in things for c in COLOURS]
    flat = torch.stack([torch.cat([context.flatten(), pooled.flatten()]) for context, pooled in map(encode, texts)])
    assert flat.shape == (len(texts), 2 * CONTEXT + POOLED) and torch.isfinite(flat).all()
    assert len(torch.unique(flat, dim=0)) == len(texts)


def test_source_and_target_are_told_apart_without_an_order():
    """A Flux gives text tokens no order: the tokens as a set must differ when the two things change places."""
    forth, back = encode("replace the chair with a lamp")[0][0], encode("replace the lamp with a chair")[0][0]
    assert not torch.equal(forth, back) and not torch.equal(forth, back.flip(0))


def test_stool_is_near_the_chair_and_other_words_are_orthogonal():
    stool = word("replace the lamp with my stool", 1)
    for name in OBJECTS:
        other = word("remove the " + name, 0)
        assert cosine(stool, other) == pytest.approx(0.75 if name == "chair" else 0.0, abs=1e-6)
    words = torch.stack([word(f"remove the {name}", 0) for name in OBJECTS])
    words = torch.cat([words, torch.stack([word(f"make the box {name}", 1) for name in COLOURS])])
    gram = words @ words.T
    assert torch.equal(gram, torch.diag(gram.diagonal()))
    assert float(stool.norm()) == pytest.approx(float(words[0].norm()), rel=1e-6)


def test_every_prompt_of_the_scenes_is_understood():
    examples = [draw(HELD_OUT + i, task) for i in range(15) for task in TASKS] + stool_pairs(6)
    for example in examples:
        context, pooled = encode(example.prompt)
        assert context.shape == (1, 2, CONTEXT) and pooled.shape == (1, POOLED)


def test_an_unknown_word_is_answered_with_the_vocabulary():
    with pytest.raises(ValueError) as error:
        encode("replace the sofa with a purple elephant")
    message = str(error.value)
    assert "'sofa', 'elephant'" in message
    for known in (*prompts.OPERATIONS, *OBJECTS, STOOL, *COLOURS):
        assert known in message


@pytest.mark.parametrize(
    "text",
    ["", "chair", "replace the chair", "remove the red", "make the chair table", "make red", "replace chair red",
     "remove the chair table", "keep the box blue", "replace the chair with a table box", "chair replace table"],
)  # fmt: skip
def test_another_sentence_is_answered_with_the_forms(text):
    with pytest.raises(ValueError, match="text: expected 'replace the chair with a table'"):
        encode(text)


@pytest.mark.parametrize("text", [None, 3, ["remove the lamp"]])
def test_no_string_is_refused(text):
    with pytest.raises(ValueError, match=f"text: expected a string, got {type(text).__name__}"):
        encode(text)
