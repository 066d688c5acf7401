"""The grid of pictures, read back from the pixels."""

import pytest
import torch

pytest.importorskip("matplotlib")

from editloss_core.drawing.colours import VERDICT_COLORS
from editloss_core.drawing.grid import grid
from editloss_core.runs.pictures import PreviewRow

COLORS = ((0.9, 0.1, 0.1), (0.1, 0.7, 0.1), (0.1, 0.1, 0.9), (0.7, 0.1, 0.7))
GOOD, NO_EDIT = (tuple(int(VERDICT_COLORS[v][k : k + 2], 16) / 255 for k in (1, 3, 5)) for v in ("good", "no edit"))


def flat(color, height=128, width=128):
    return torch.tensor(color).expand(height, width, 3).clone()


def row(name="pair", height=128, width=128):
    return PreviewRow(name, *(flat(color, height, width) for color in COLORS))


def box(page, color, tolerance=0.012):
    """Top, left, height and width of what has this colour."""
    found = (page[0] - torch.tensor(color)).abs().amax(-1) <= tolerance
    ys, xs = found.any(1).nonzero(), found.any(0).nonzero()
    return int(ys[0]), int(xs[0]), int(ys[-1] - ys[0]) + 1, int(xs[-1] - xs[0]) + 1


def test_small_pictures_are_enlarged_in_the_order_of_the_labels():
    page = grid([row()])
    assert page.dtype == torch.float32 and page.min() >= 0 and page.max() <= 1
    boxes = [box(page, color) for color in COLORS]
    assert all(b[2:] == (256, 256) for b in boxes) and len({b[0] for b in boxes}) == 1
    assert [b[1] for b in boxes] == sorted(b[1] for b in boxes)
    assert page.shape[2] < 1600  # no larger than it needs


def test_the_page_is_never_wider_than_asked():
    for width in (300, 777, 1600):
        page = grid([row(height=512, width=1024)], width=width)
        assert width - 4 <= page.shape[2] <= width  # a page of four columns is a multiple of four


def test_a_row_has_one_height_and_keeps_its_aspect():
    pictures = [
        flat(COLORS[0], 100, 200),
        flat(COLORS[1], 300, 300),
        flat(COLORS[2], 60, 30),
        flat(COLORS[3], 400, 200),
    ]
    page = grid([pictures])
    boxes = [box(page, color) for color in COLORS]
    assert len({b[2] for b in boxes}) == 1
    height = boxes[0][2]
    assert [b[3] for b in boxes] == [height * 2, height, height // 2, height // 2]


def test_rows_of_several_shapes_follow_each_other():
    page = grid([row("wide", 100, 200), [flat((0, 0, 0.5), 256, 128), *[flat((0.5, 0.5, 0), 256, 128)] * 3]])
    first, second = box(page, COLORS[0]), box(page, (0, 0, 0.5))
    assert first[2:] == (128, 256) and second[2] == 384 and second[3] == 192  # at most 1.5 cells tall
    assert second[0] >= first[0] + first[2] + 20


def test_enlarging_is_smooth_and_stays_in_range():
    checker = ((torch.arange(64)[:, None] // 8 + torch.arange(64) // 8) % 2).float()[..., None].expand(-1, -1, 3)
    page = grid([[checker]], labels=("checks",))
    top, left, height, width = box(grid([[flat(COLORS[0])]], labels=("checks",)), COLORS[0])
    assert (height, width) == (256, 256)
    drawn = page[0, top : top + 256, left : left + 256, 0]
    small = torch.nn.functional.avg_pool2d(drawn[None], 4)[0]
    assert (small - checker[..., 0]).abs().mean() < 0.06
    assert 0 < ((drawn > 0.2) & (drawn < 0.8)).float().mean() < 0.2  # edges are soft, and few


def test_notes_are_drawn_in_words_on_the_colour_of_their_verdict():
    bare, page = grid([row()]), grid([row()], notes=[[None, "no edit", "Good 0.93", None]])
    assert page.shape[1] > bare.shape[1]
    good, bad = box(page, GOOD), box(page, NO_EDIT)
    lora, base = box(page, COLORS[2]), box(page, COLORS[1])
    for tag, picture in ((good, lora), (bad, base)):
        assert tag[0] >= picture[0] + picture[2]  # below its picture
        assert abs(tag[1] + tag[3] / 2 - picture[1] - picture[3] / 2) <= 1
        inside = page[0, tag[0] : tag[0] + tag[2], tag[1] : tag[1] + tag[3]]
        letters = (
            (inside.amin(-1) > 0.9) if tag is bad else (inside.amax(-1) < 0.2)
        )  # white or dark, by what is read better
        assert letters.float().mean() > 0.08
    long = grid([row()], notes=[["no edit " * 40, None, None, None]])
    assert box(long, NO_EDIT)[3] <= 256


def test_every_verdict_has_its_colour_and_the_rest_is_grey():
    for verdict, color in VERDICT_COLORS.items():
        page = grid([row()], notes=[[None, f"{verdict} 0.81", None, None]])
        assert box(page, tuple(int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)))[2] >= 20, verdict
    assert box(grid([row()], notes=[["odd", None, None, None]]), (102 / 255, 112 / 255, 128 / 255))[2] >= 20


def test_names_stand_above_their_rows():
    r = row("stool")
    bare, named = grid([[r.before, r.base, r.lora, r.after]]), grid([r])
    top, before = box(named, COLORS[0])[0], box(bare, COLORS[0])[0]
    assert 20 <= top - before <= named.shape[1] - bare.shape[1] < 40
    written = named[0, top - 20 : top - 2, : 16 + 256]
    assert (written.amin(-1) < 0.6).any()
    pictures = [flat(COLORS[0])]
    assert not torch.equal(grid([pictures], ("x",), names=["stool"]), grid([pictures], ("x",), names=["chair"]))
    assert grid([row("very long name " * 50)]).shape == named.shape


def test_pixels_that_are_not_numbers_are_black():
    picture = flat(COLORS[0])
    picture[:] = float("nan")
    page = grid([[picture]], labels=("output",))
    assert page.isfinite().all() and box(page, (0, 0, 0))[2:] == (256, 256)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "rows: expected at least one row"),
        ([row()], {"labels": ()}, "labels: expected at least one"),
        ([row("stool")], {"labels": ("a", "b")}, r"row 1 \(stool\): expected 2 pictures, one per label, got 4"),
        ([[flat(COLORS[0])] * 3], {}, "row 1: expected 4 pictures"),
        ([row(), [None] * 4], {}, r"row 2, before: expected a picture \[H, W, 3\], got NoneType"),
        ([[flat(COLORS[0])[None]] * 4], {}, r"row 1, before: .*of shape \[1, 128, 128, 3\]"),
        ([[flat(COLORS[0]).to(torch.uint8)] * 4], {}, "torch.uint8"),
        ([row()], {"names": ["a", "b"]}, "names: expected one per row, which are 1, got 2"),
        ([row()], {"notes": [["a"]]}, "notes: row 1: expected 4"),
        ([row()], {"notes": ["good"]}, "notes: row 1: expected 4"),
        ([row()], {"width": 100}, "width: expected at least"),
    ],
)
def test_what_does_not_fit_is_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        grid(rows, **options)
