"""The pictures and pairs that the example graphs open with are what they are called."""

from __future__ import annotations

import pytest
import torch

from editloss_core.demo import judge as drawn
from editloss_core.demo import pictures
from editloss_core.demo.scenes import stool_pairs
from editloss_core.pair_audit.audit import audit
from editloss_core.verdict.judge import judge


@pytest.mark.slow
@pytest.mark.parametrize("scene", pictures.SCENES)
def test_every_output_is_what_it_is_called(scene):
    pair = pictures.edit(scene)
    outputs = pictures.outputs(pair)
    assert [judge(pair.before, x, pair.after, pair.mask).verdict for x in outputs.values()] == list(pictures.KINDS)
    assert not torch.equal(outputs["good"], pair.after) and not torch.equal(outputs["no edit"], pair.before)


def test_the_judge_that_knows_what_was_drawn_agrees():
    outputs = torch.stack(list(pictures.outputs(pictures.edit(pictures.DRAWN)).values()))
    verdicts = [v.verdict for v in drawn.judge(outputs, stool_pairs(1) * len(outputs))]
    assert verdicts == ["good", "no edit", "overlay", "distorted", "collateral"]


def test_an_unknown_scene_is_refused():
    with pytest.raises(ValueError, match="scene: expected one of oak chair, .*, drawn room, got 'sofa'"):
        pictures.edit("sofa")


@pytest.mark.slow
def test_the_audit_finds_each_mistake_of_the_pairs_and_no_other():
    found = audit(pictures.example_pairs(resolution=384))
    assert found.counts() == {"error": 2, "warning": 2, "note": 0}
    assert found.summary().splitlines()[1:] == [
        "- no edit: not_edited before + not_edited after",
        "- mask does not cover the change: mask_elsewhere mask",
        "- shifted: shifted after",
        "- the same pair twice: oak_chair before + oak_chair after",
    ]
