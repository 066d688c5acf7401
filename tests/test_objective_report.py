"""The report as text and as a picture, read back from the pixels."""

import sys
import threading
from dataclasses import replace

import pytest
import torch

from editloss_core import objective_report as module
from editloss_core.embeddings import EmbeddingSet
from editloss_core.encoders.base import EncoderInfo
from editloss_core.objective import TERMS, EditObjective, LossTerm, recommended
from editloss_core.objective_report import FAILURE_NAMES, MAX_COLUMNS, text_table

try:
    import matplotlib
except ImportError:
    matplotlib = None
needs_matplotlib = pytest.mark.skipif(matplotlib is None, reason='matplotlib is missing: pip install -e ".[test]"')

GRID = (2, 3)
WIDTH = 440  # a quarter of the usual size: the layout is the same in inches
GT, SRC, OVERLAY, FAR = range(4)


def embeddings(*outputs, layout="grid", name="e", mask=None):
    """One pair whose gt, src and overlay lie on axes of their own; each output is one axis or six, one per token."""
    eye = torch.eye(4)

    def tokens(axes):
        z = torch.stack([eye[a] for a in (axes if isinstance(axes, list) else [axes] * 6)])
        return z.mean(0) if layout == "global" else z.view(*GRID, 4)

    tensors = {
        ("pred", name): torch.stack([tokens(o) for o in outputs]),
        ("gt", name): tokens(GT)[None],
        ("src", name): tokens(SRC)[None],
        ("overlay", name): tokens(OVERLAY)[None, None],
        ("hard_negative", name): tokens(FAR)[None, None],
    }
    made = EmbeddingSet(
        tensors, {name: EncoderInfo(name, "none", "0" * 64, layout)}, {} if layout == "global" else {name: GRID}
    )
    return made if mask is None else made.with_mask(mask)


def evaluated(*outputs, objective=None, details=True, **kwargs):
    return (objective or recommended("e")).evaluate(embeddings(*outputs, **kwargs), details)


def grey(count, value=0.5, height=16, width=24):
    return torch.full((count, height, width, 3), value)


@pytest.fixture
def drawn(monkeypatch):
    """What a picture is made of: texts in order, and the axes' rectangles as fractions (left, bottom, width, height)."""
    if matplotlib is None:
        pytest.skip('matplotlib is missing: pip install -e ".[test]"')
    from matplotlib.figure import Figure

    class Drawn:
        texts, boxes = [], []

    Drawn.texts, Drawn.boxes = [], []
    text, add_axes = Figure.text, Figure.add_axes
    monkeypatch.setattr(Figure, "text", lambda self, x, y, s, **k: Drawn.texts.append(s) or text(self, x, y, s, **k))
    monkeypatch.setattr(
        Figure, "add_axes", lambda self, rect, **k: Drawn.boxes.append(rect) or add_axes(self, rect, **k)
    )
    return Drawn


@pytest.fixture
def layout_only(drawn, monkeypatch):
    """Where only texts and places are looked at: the pixels, which take most of the time, are not drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    monkeypatch.setattr(FigureCanvasAgg, "draw", lambda self: self.get_renderer())
    return drawn


def pixels(image, box, rows=1, columns=1):
    """Mean colour of the middle of each cell of a rectangle of the picture: [rows, columns, 3]."""
    height, width = image.shape[1:3]
    left, bottom, w, h = box
    result = torch.empty(rows, columns, 3)
    for r in range(rows):
        for c in range(columns):
            y = (1 - bottom - h + h * (r + 0.5) / rows) * height
            x = (left + w * (c + 0.5) / columns) * width
            result[r, c] = image[0, int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].mean((0, 1))
    return result


def check_picture(image, width=WIDTH):
    assert image.ndim == 4 and image.shape[0] == 1 and image.shape[3] == 3 and image.dtype == torch.float32
    assert image.shape[2] == width and image.shape[1] > 50
    assert image.min() >= 0 and image.max() <= 1 and torch.isfinite(image).all()
    assert image.std() > 0.05 and image[0, :2].mean() > 0.9, "there is something on it, on white"


# --- the text --------------------------------------------------------------------------------------------------------


def test_the_table_has_every_value():
    report = evaluated(GT, SRC, OVERLAY, FAR)
    text = text_table(report)
    lines = text.split("\n")
    assert lines[0] == f"**total {report.total.item():.4f}**, 3 terms"
    for t in report.terms:
        (row,) = [line for line in lines if line.startswith(f"| {t.term.name} |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:4] == [f"{t.term.weight:g}", f"{t.value.item():.4f}", f"{t.weighted.item():.4f}"]
        assert cells[4] == ("–" if t.active is None else f"{t.active:.0%}")
        for name, d in t.distances.items():
            assert f"{name} {d.mean().item():.4f}" in cells[5]
    outputs = [
        [c.strip() for c in line.strip("|").split("|")] for line in lines if line[:3] in ("| 1", "| 2", "| 3", "| 4")
    ]
    assert [cells[1] for cells in outputs] == ["no failure signal", "NO EDIT", "OVERLAY", "DISTORTED"]
    for i, cells in enumerate(outputs):
        assert cells[0] == str(i + 1)
        for t, cell in zip(report.terms, cells[2:]):
            assert cell == f"{t.per_sample[i].item():.4f} ({t.toward_failure[i].item():.0%})"


def test_the_table_is_a_table():
    """Every row of a Markdown table has as many cells as its head."""
    for block in text_table(evaluated(GT, SRC)).split("\n\n")[1:3]:
        assert len({line.count("|") for line in block.split("\n")}) == 1


def test_the_table_has_every_output():
    text = text_table(evaluated(*[SRC] * (MAX_COLUMNS + 5)))
    assert text.count("| NO EDIT |") == MAX_COLUMNS + 5


def test_every_failure_has_a_name():
    assert {row.failure for row in TERMS.values()} <= set(FAILURE_NAMES)


def test_a_bar_in_a_name_stays_in_its_cell():
    text = text_table(evaluated(GT, objective=EditObjective().with_term(LossTerm("triplet", "e", name="a|b"))))
    rows = [line.replace("\\|", "") for line in text.split("\n\n")[1].split("\n")]
    assert len({row.count("|") for row in rows}) == 1


def test_without_details_no_verdict_is_claimed():
    assert "no failure signal" not in text_table(evaluated(SRC, details=False))


# --- the picture -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_matplotlib
@pytest.mark.parametrize("count, width", [(1, 440), (3, 333), (5, 801)])
def test_shape_width_and_range(count, width):
    image = module.picture(evaluated(*[FAR] * count), grey(count), grey(1), grey(1), width)
    check_picture(image, width)


@needs_matplotlib
def test_default_width():
    assert module.picture(evaluated(GT), grey(1)).shape[2] == 1600


def test_columns_rows_and_verdicts(drawn):
    report = evaluated(GT, SRC, OVERLAY)
    image = module.picture(report, grey(3, 0.2), grey(1, 0.6), grey(3, 0.8), WIDTH)
    check_picture(image)
    # Per output: bars, before, after, output and three maps; drawn row by row.
    assert len(drawn.boxes) == 3 * (1 + 3 + 3)
    for row, value in ((1, 0.8), (2, 0.6), (3, 0.2)):
        for box in drawn.boxes[3 * row : 3 * row + 3]:
            assert pixels(image, box).flatten().tolist() == pytest.approx([value] * 3, abs=0.01)
    for text in (
        "output 1",
        "output 3",
        "no failure signal",
        "NO EDIT",
        "OVERLAY",
        "before",
        "after",
        "output",
        "no edit identity",
    ):
        assert text in drawn.texts, text
    assert any(f"total {report.total.item():.4f}" in text for text in drawn.texts)
    for t in report.terms:
        assert f"{t.value.item():.4f}" in drawn.texts and f"{t.weighted.item():.4f}" in drawn.texts


def test_each_column_has_its_own_pictures(drawn):
    values = [0.1, 0.4, 0.7]
    pred = torch.cat([grey(1, v) for v in values])
    image = module.picture(evaluated(GT, SRC, FAR), pred, width=WIDTH)
    for box, value in zip(drawn.boxes[3:6], values):
        assert pixels(image, box).flatten().tolist() == pytest.approx([value] * 3, abs=0.01)


@pytest.mark.slow
def test_the_first_columns_are_shown_and_the_rest_is_mentioned(drawn):
    count = MAX_COLUMNS + 3
    image = module.picture(evaluated(*[SRC] * count), grey(count), width=WIDTH)
    check_picture(image)
    assert f"output {MAX_COLUMNS}" in drawn.texts and f"output {MAX_COLUMNS + 1}" not in drawn.texts
    assert f"the first {MAX_COLUMNS} of {count} outputs" in drawn.texts
    assert drawn.texts.count("NO EDIT") == MAX_COLUMNS
    assert len(drawn.boxes) == MAX_COLUMNS * (1 + 1 + 3)
    assert max(left + w for left, _, w, _ in drawn.boxes) <= 1


@pytest.mark.parametrize("count", [1, 8])
def test_nothing_overlaps_and_nothing_leaves_the_picture(layout_only, count):
    module.picture(evaluated(*[FAR] * count), grey(count), grey(1), grey(1), WIDTH)
    for i, (left, bottom, w, h) in enumerate(layout_only.boxes):
        assert left >= 0 and bottom >= 0 and left + w <= 1 and bottom + h <= 1
        for other in layout_only.boxes[:i]:
            apart = (
                left >= other[0] + other[2]
                or other[0] >= left + w
                or bottom >= other[1] + other[3]
                or other[1] >= bottom + h
            )
            assert apart or all(abs(a - b) < 1e-9 for a, b in zip(other, (left, bottom, w, h)))


def red(colour):
    return bool(colour[0] > colour[2] + 0.2)


def blue(colour):
    return bool(colour[2] > colour[0] + 0.2)


def neutral(colour):
    return bool((colour.max() - colour.min()) < 0.03)


@pytest.mark.parametrize("layout", ["grid", "tokens"])
def test_red_is_where_the_output_is_nearer_to_the_negative(drawn, layout):
    made = embeddings([GT, SRC, GT, FAR, GT, SRC], [SRC, GT, GT, GT, FAR, GT])
    if layout == "tokens":
        flat = {k: t.flatten(-3, -2) for k, t in made.tensors.items()}
        made = replace(made, tensors=flat, encoders={"e": replace(made.encoders["e"], output="tokens")})
    report = EditObjective((LossTerm("no_edit_identity", "e"),)).evaluate(made, details=True)
    image = module.picture(report, grey(2), width=WIDTH)
    cells = [pixels(image, box, *GRID).flatten(0, 1) for box in drawn.boxes[-2:]]  # the maps come last
    kinds = [
        ["red" if red(c) else "blue" if blue(c) else "none" if neutral(c) else "?" for c in column] for column in cells
    ]
    # The top left corner of a map has the loss written over it, so the middle of its first token is still read as drawn.
    assert kinds[0] == ["blue", "red", "blue", "none", "blue", "red"]
    assert kinds[1] == ["red", "blue", "blue", "blue", "none", "blue"]


def test_red_is_where_the_output_is_far_from_the_target(drawn):
    report = evaluated([GT, GT, GT, GT, FAR, SRC], objective=EditObjective((LossTerm("geometry_match", "e"),)))
    image = module.picture(report, grey(1), width=WIDTH)
    cells = pixels(image, drawn.boxes[-1], *GRID).flatten(0, 1)
    assert [red(c) for c in cells] == [False, False, False, False, True, True] and not any(blue(c) for c in cells)


def test_tokens_that_did_not_count_are_pale(drawn):
    mask = torch.zeros(4, 6)
    mask[:, 4:] = 1  # the last column of tokens
    report = evaluated(SRC, objective=EditObjective((LossTerm("no_edit_identity", "e"),)), mask=mask)
    image = module.picture(report, grey(1), width=WIDTH)
    cells = pixels(image, drawn.boxes[-1], *GRID)
    assert all(neutral(c) for c in cells[:, :2].flatten(0, 1)) and all(red(c) for c in cells[:, 2])


@pytest.mark.slow
def test_bars_are_as_long_as_the_failure_is_near(drawn):
    report = evaluated(GT, SRC, GT, objective=EditObjective((LossTerm("no_edit_identity", "e"),)))
    image = module.picture(report, grey(3), width=1000)
    near, at = (pixels(image, box, 1, 9)[0] for box in drawn.boxes[:2])
    assert not any(red(c) for c in near) and sum(red(c) for c in at) >= 6


@needs_matplotlib
def test_it_runs_in_a_thread_without_pyplot(monkeypatch):
    """pyplot keeps figures for ever and picks a window system; ComfyUI executes nodes outside of the main thread."""
    for name in [n for n in sys.modules if n.startswith("matplotlib.pyplot")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import fails
    report, result = evaluated(GT, SRC), {}

    def work():
        try:
            with torch.inference_mode():
                result["image"] = module.picture(report, grey(2), grey(1), grey(1), WIDTH)
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert "error" not in result, result.get("error")
    check_picture(result["image"])


@needs_matplotlib
def test_the_same_report_gives_the_same_picture():
    a, b = (module.picture(evaluated(SRC), grey(1), width=WIDTH) for _ in range(2))
    assert a.equal(b)


# --- unusual reports -------------------------------------------------------------------------------------------------


def test_one_output_and_nothing_else(drawn):
    image = module.picture(evaluated(SRC), grey(1), width=WIDTH)
    check_picture(image)
    assert len(drawn.boxes) == 1 + 1 + 3 and "before" not in drawn.texts and "after" not in drawn.texts


def test_one_picture_may_stand_for_every_output(drawn):
    image = module.picture(evaluated(GT, SRC), grey(1, 0.3), width=WIDTH)
    for box in drawn.boxes[2:4]:
        assert pixels(image, box).flatten().tolist() == pytest.approx([0.3] * 3, abs=0.01)


def test_global_encoders_have_no_maps(drawn):
    report = evaluated(GT, SRC, layout="global")
    check_picture(module.picture(report, grey(2), grey(1), grey(1), WIDTH))
    assert len(drawn.boxes) == 2 * (1 + 3)
    assert "NO EDIT" in text_table(report)


@needs_matplotlib
def test_without_details_there_are_still_pictures_and_numbers():
    check_picture(module.picture(evaluated(GT, details=False), grey(1), width=WIDTH))


def test_terms_of_every_kind_and_three_of_one(drawn):
    objective = EditObjective()
    for kind in [*TERMS, "triplet", "triplet"]:
        objective = objective.with_term(LossTerm(kind, "e"))
    report = evaluated(GT, SRC, objective=objective)
    check_picture(module.picture(report, grey(2), grey(1), grey(1), WIDTH))
    assert len(drawn.boxes) == 2 * (1 + 3 + len(TERMS) + 2)
    assert all(f"| {t.term.name} |" in text_table(report) for t in report.terms)


@pytest.mark.slow
@needs_matplotlib
@pytest.mark.parametrize(
    "name", ["word " * 60, "x" * 300, "Kanten schärfer als vorher – “Maß” ≥ 0,5"], ids=["words", "one", "signs"]
)
def test_long_names(name):
    objective = EditObjective((LossTerm("no_edit_identity", name, name=name), LossTerm("geometry_match", name)))
    report = evaluated(GT, SRC, objective=objective, name=name)
    check_picture(module.picture(report, grey(2), width=WIDTH))
    assert name in text_table(report)


@needs_matplotlib
def test_dollars_in_names_are_no_mathematics():
    report = evaluated(GT, objective=EditObjective((LossTerm("triplet", "e", name="$a_{$"),)))
    check_picture(module.picture(report, grey(1), width=WIDTH))


@needs_matplotlib
@pytest.mark.parametrize("height, width", [(1, 1), (8, 64), (64, 8)])
def test_pictures_of_any_shape(height, width):
    check_picture(module.picture(evaluated(GT), grey(1, height=height, width=width), grey(1), width=WIDTH))


@needs_matplotlib
def test_pictures_with_gradients_and_values_beyond_the_range():
    pred = (grey(2) * 4 - 1).requires_grad_()
    made = embeddings(GT, SRC)
    live = made.tensors["pred", "e"].clone().requires_grad_()
    report = recommended("e").evaluate(replace(made, tensors={**made.tensors, ("pred", "e"): live}), details=True)
    assert report.total.requires_grad
    check_picture(module.picture(report, pred, grey(1).half(), width=WIDTH))
    assert "NO EDIT" in text_table(report)


def test_the_explanation_names_what_red_means(layout_only):
    module.picture(evaluated(GT), grey(1), width=WIDTH)
    said = [text.replace("\n", " ") for text in layout_only.texts]
    assert "red: nearer to src than to gt; blue: nearer to gt" in said
    assert "red: pred far from gt" in said


@pytest.mark.parametrize(
    "kind, settings, wrong",
    [
        ("margin_ranking", {}, "nearer to gt than to gt"),  # the map is d(pred, gt) − d(src, gt)
        ("info_nce", dict(negative="overlay"), "red: pred far from gt"),  # it is d(pred, gt) − d(pred, overlay)
        ("contrastive", dict(label=0, positive="src"), "red: pred far from src"),  # far is what this term wants
    ],
)
def test_the_explanation_is_not_wrong(layout_only, kind, settings, wrong):
    module.picture(evaluated(GT, objective=EditObjective((LossTerm(kind, "e", **settings),))), grey(1), width=WIDTH)
    assert not any(wrong in text.replace("\n", " ") for text in layout_only.texts)


# --- errors ----------------------------------------------------------------------------------------------------------


@needs_matplotlib
@pytest.mark.parametrize("role", ["pred", "gt", "src"])
def test_numbers_of_pictures_that_do_not_fit_are_refused(role):
    images = {"pred": grey(3), "gt": grey(3), "src": grey(3), role: grey(2)}
    with pytest.raises(ValueError, match="expected 1 or 3 pictures like the report, got 2"):
        module.picture(evaluated(GT, SRC, FAR), **images, width=WIDTH)


@needs_matplotlib
@pytest.mark.parametrize("role", ["pred", "gt", "src"])
def test_the_refusal_names_the_argument(role):
    images = {"pred": grey(3), "gt": grey(3), "src": grey(3), role: grey(2)}
    with pytest.raises(ValueError, match=f"^{role}: "):
        module.picture(evaluated(GT, SRC, FAR), **images, width=WIDTH)


@needs_matplotlib
@pytest.mark.parametrize("shape", [(16, 24, 3), (1, 3, 16, 24), (1, 16, 24)], ids=str)
def test_other_shapes_are_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"^pred: expected a picture batch \[B, H, W, 3\]"):
        module.picture(evaluated(GT), torch.zeros(shape), width=WIDTH)


@needs_matplotlib
def test_without_outputs_the_maps_are_drawn_on_grey():
    check_picture(module.picture(evaluated(GT, SRC), width=WIDTH), WIDTH)
    check_picture(module.picture(evaluated(GT, SRC), gt=grey(1, height=8, width=64), width=WIDTH), WIDTH)


@needs_matplotlib
@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_outputs_lie_in_bands(drawn, count):
    """Side by side, so that the most common report is readable on a node: wider than high."""
    image = module.picture(evaluated(*[SRC, GT][:count]), grey(count, 0.2), grey(1, 0.8), grey(1, 0.6), WIDTH)
    assert image.shape[1] < image.shape[2] and len(drawn.boxes) == count * (1 + 3 + 3)
    for item, value in enumerate((0.6, 0.8, 0.2)):
        for box in drawn.boxes[count * (1 + item) : count * (2 + item)]:
            assert pixels(image, box).flatten().tolist() == pytest.approx([value] * 3, abs=0.01)
    assert "NO EDIT" in drawn.texts
