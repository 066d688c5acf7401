"""A run's log as text and as pictures, read back from the table, the layout and the pixels."""

import math
import random

import pytest
import torch

from editloss_core.run_report import columns, curves
from editloss_core.runs.log import VELOCITY, RunLog, Sample, StepLog, TermSample, ValidationLog

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb

from editloss_core.run_report import plotting

NAMES = ["no edit", "distorted", "overlay"]
LONG = [f"{k} softplus triplet against the picture before, small encoder with patches, layer {k}" for k in range(12)]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn."""
    made, pixels = [], curves.pixels
    monkeypatch.setattr(curves, "pixels", lambda figure: made.append(figure) or pixels(figure))
    return made


def step(number, velocity, t=0.5, loss=None, **terms):
    """One sample; a term is a raw loss or a TermSample."""
    samples = {VELOCITY: velocity, **terms}
    samples = {n: v if isinstance(v, TermSample) else TermSample(v, v) for n, v in samples.items()}
    total = sum(v.weighted for v in samples.values()) if loss is None else loss
    return StepLog(number, total, 1.0, 1e-4, [Sample("pair", t, samples)])


def run(steps, names=(), validate=0, gradients=True, gate=1.0, seed=0):
    """Noisy losses that fall; the last term counts below ``gate`` only."""
    draw, log = random.Random(seed), RunLog()
    for i in range(1, steps + 1):
        t, fall = draw.random(), math.exp(-2 * i / steps)
        terms = {VELOCITY: TermSample(v := 0.3 + 0.2 * fall * draw.random(), v, None, v if gradients else None)}
        for k, name in enumerate(names):
            if k == len(names) - 1 and t >= gate:
                continue
            raw = max(0.0, fall * draw.random() * (k + 1) - 0.05)
            terms[name] = TermSample(raw, raw / 2, float(raw > 0) if k % 2 == 0 else None, raw if gradients else None)
        loss = sum(x.weighted for x in terms.values())
        log.add(StepLog(i, loss, draw.random(), 1e-4 * (1 - i / (steps + 1)), [Sample("p", t, terms)]))
        if validate and i % validate == 0:
            values = dict.fromkeys(names, fall)
            log.add(ValidationLog(i, 0.4, 0.5, values, dict.fromkeys(names, 1.0), {"0.1": (0.4, 0.5)}))
    return log


def table(words, head):
    """Rows of the Markdown table whose first cell of the head begins with ``head``: first cell → the others."""
    lines = iter(words.splitlines())
    next(line for line in lines if line.startswith(f"| {head}"))
    next(lines)
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *cells = line.strip("| ").split(" | ")
        rows[name] = cells
    return rows


@pytest.mark.parametrize("make", [curves.picture, curves.live, curves.text])
def test_an_empty_log_says_what_is_missing(make):
    with pytest.raises(ValueError, match="^log: expected at least one training step, got none$"):
        make(RunLog())
    with pytest.raises(ValueError, match=r"at least one training step, got none \(and 1 validation\)"):
        make(RunLog(validations=[ValidationLog(0, 0.1, 0.1)]))


def test_text_has_the_numbers_by_hand():
    log = RunLog()
    for i in range(1, 31):
        term = {} if i % 2 else {"a|b": TermSample(i / 10, i / 20, float(i > 15), 3.0 if i <= 10 else None)}
        velocity = TermSample(1.0 if i <= 10 else 0.5, 1.0, None, 1.0 if i <= 10 else None)
        log.add(step(i, velocity, t=0.1 if i <= 15 else 1.0, loss=float(i), **term))
    log.add(ValidationLog(30, 0.3, 0.4, {"a|b": 0.1}, {"a|b": 0.2}, {"0.1": (0.1, 0.5)}))
    words = curves.text(log)
    losses = table(words, "loss |")
    # the total: steps 1, 2, 3 and 28, 29, 30
    assert losses[curves.TOTAL] == ["2.0000 → 29.0000", "+1350%", "–", "–"]
    assert losses[VELOCITY] == ["1.0000 → 0.5000", "-50%", "–", "25%"]
    # evaluated at 15 steps, whose tenth is one; open at 8 of the 15; gradients of 1 and 3
    assert losses["a\\|b"] == ["0.2000 → 3.0000", "+1400%", "53%", "75%"]
    levels = table(words, "loss by noise level")
    # first third: steps 1…10 at t 0.1; last third: 21…30 at t 1; the gradients were measured at t 0.1
    assert levels[VELOCITY] == ["1.0000 → – (25%)", "–", "–", "–", "– → 0.5000"]
    assert levels["a\\|b"] == ["0.6000 → – (75%)", "–", "–", "–", "– → 2.6000"]
    held_out = table(words, "held-out pairs, step 30")
    assert held_out[VELOCITY] == ["0.4000", "0.3000", "-25.0%"]
    assert held_out["velocity at t 0.1"] == ["0.5000", "0.1000", "-80.0%"]
    assert held_out["a\\|b"] == ["0.2000", "0.1000", "-50.0%"]


def test_text_of_two_steps_has_one_mean_by_noise_level():
    words = curves.text(RunLog(steps=[step(1, 0.2, t=0.3), step(2, 0.4, t=0.3)]))
    assert table(words, "loss by noise level")[VELOCITY] == ["–", "0.3000", "–", "–", "–"]
    assert "Means over all steps" in words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "names", "options"),
    [
        (1, [], {}),
        (1, NAMES, {"gradients": False}),
        (2, NAMES[:1], {"validate": 2}),
        (60, LONG[:5], {"validate": 5, "gate": 0.5}),
        (90, LONG, {"validate": 30}),
    ],
)
def test_nothing_overlaps_and_nothing_leaves_the_page(figures, steps, names, options):
    image = curves.picture(run(steps, names, **options))
    assert image.shape[0] == 1 and image.shape[2:] == (1600, 3)
    assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1
    figure = figures[0]
    renderer = figure.canvas.get_renderer()
    page = figure.bbox
    parts = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.texts]
    places = {}
    for axes in figure.axes:  # twins share a place
        key = axes.get_position().bounds
        boxes = [axes.get_tightbbox(renderer)] + ([places[key]] if key in places else [])
        places[key] = type(page).union(boxes)
    parts += [(f"panel at {key}", box) for key, box in places.items()]
    for i, (one, box) in enumerate(parts):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, one
        for other, second in parts[:i]:
            width = min(box.x1, second.x1) - max(box.x0, second.x0)
            height = min(box.y1, second.y1) - max(box.y0, second.y0)
            assert min(width, height) <= 1.0, (one, other)


def color_at(image, axes, x, y):
    """Of the picture ``[H, W, 3]`` at a place in the data of a panel: the mean over 3 x 3 pixels."""
    column, row = axes.transData.transform((x, y))
    row, column = image.shape[0] - 1 - round(row), round(column)
    return image[row - 1 : row + 2, column - 1 : column + 2].mean((0, 1))


def near(color, expected, tolerance=0.25):
    return (color - torch.tensor(to_rgb(expected))).abs().max() < tolerance


def test_curves_are_where_the_numbers_are(figures):
    log = RunLog(steps=[step(i, 0.25, t=0.5, loss=0.75, a=0.125, b=0.5) for i in range(1, 41)])
    image = curves.picture(log)[0]
    style = columns.Columns.of(log).style
    main, _, _, a, b, _, levels, level_a, level_b = figures[0].axes
    # the total is 3.2 points wide, the others less: a line of 1.6 points is 2 of 3 pixels
    assert near(color_at(image, main, 20, 0.75), style(curves.TOTAL)["color"])
    assert near(color_at(image, main, 20, 0.25), style(VELOCITY)["color"], 0.4)
    assert color_at(image, main, 20, 0.5).min() > 0.75  # nothing there
    for panel, level, name, value in ((a, level_a, "a", 0.125), (b, level_b, "b", 0.5)):
        assert near(color_at(image, panel, 20, value), style(name)["color"], 0.4)
        assert color_at(image, panel, 20, value * 0.9).min() > 0.75
        assert near(color_at(image, level, 0.54, value / 2), style(name)["color"], 0.02)  # the last third's bar
        assert color_at(image, level, 0.3, value / 2).min() > 0.75  # no bar at other noise levels
    assert near(color_at(image, levels, 0.54, 0.125), style(VELOCITY)["color"], 0.02)
    assert style("a")["color"] != style("b")["color"]


def test_gradient_shares_are_stacked(figures):
    terms = {"a": TermSample(0.1, 0.1, None, 3.0)}
    log = RunLog(steps=[step(i, TermSample(0.2, 0.2, None, 1.0), t=0.1, **terms) for i in range(1, 11)])
    image = curves.picture(log)[0]
    panel, style = figures[0].axes[4], columns.Columns.of(log).style
    assert near(color_at(image, panel, 0.1, 0.2), style(VELOCITY)["color"], 0.02)
    assert near(color_at(image, panel, 0.1, 0.3), style("a")["color"], 0.02)
    assert near(color_at(image, panel, 0.1, 0.95), style("a")["color"], 0.02)
    assert [text.get_text() for text in panel.texts] == ["not measured"] * 4


@pytest.mark.slow
def test_it_says_what_was_not_measured_or_evaluated(figures):
    curves.picture(run(30, NAMES, gradients=False, gate=0.0001))
    words = {text.get_text() for axes in figures[0].axes for text in axes.texts}
    assert any(w.startswith("not measured in this run") for w in words)
    curves.picture(run(300, NAMES, gate=0.5))
    gated = figures[1].axes[-1]
    assert [text.get_text() for text in gated.texts] == ["–"] * 4  # two buckets of t, first and last third


def test_without_an_objective_it_says_so(figures):
    curves.picture(run(20))
    assert any("velocity loss alone" in text.get_text() for text in figures[0].texts)


@pytest.mark.slow
def test_the_share_of_open_hinges_has_an_axis(figures):
    curves.picture(run(20, NAMES))
    right = [axes for axes in figures[0].axes if axes.get_yticks().tolist() == [0, 0.5, 1] and not axes.patches]
    assert len(right) == 2  # "no edit" and "overlay" of the three have hinges


def test_held_out_pairs_are_marked(figures):
    curves.picture(run(40, NAMES[:1], validate=10))
    main = figures[0].axes[0]
    marked = [line for line in main.lines if line.get_marker() == "o" and len(line.get_xdata()) == 4]
    assert [list(line.get_ydata()) for line in marked] == [[0.5] * 4, [0.4] * 4]


@pytest.mark.slow
def test_what_is_not_finite_is_left_out():
    log = run(30, NAMES, validate=10)
    log.steps[3] = step(4, math.nan, loss=math.inf, overlay=TermSample(None, None))
    log.steps += [step(31, 0.3, never=math.nan)]
    log.validations += [ValidationLog(30, math.nan, 0.5, {"overlay": None})]
    assert curves.picture(log, width=400).isfinite().all()
    assert curves.live(log).isfinite().all()
    assert table(curves.text(log), "loss |")["never"] == ["– → –", "–", "–", "–"]


@pytest.mark.parametrize(("width", "height"), [(768, 384), (777, 301), (1536, 768)])
def test_live_has_the_size_and_the_last_values(figures, width, height):
    log = run(200, [*NAMES, *LONG])
    image = curves.live(log, width, height)
    assert image.shape == (height, width, 3) and image.min() < 0.2 and image.max() == 1
    words = [text.get_text() for text in figures[0].texts]
    last = float(columns.smoothed(columns.Columns.of(log).total)[-1])
    assert words[words.index(curves.TOTAL) + 1] == columns.number(last)
    assert any(w.startswith("and ") and w.endswith(" more") for w in words)


@pytest.mark.parametrize("count", [1, 7, 8, 100, 237])
def test_smoothing_is_the_slow_mean(count):
    draw = random.Random(count)
    values = [draw.random() if i % 3 == 0 else math.nan for i in range(count)]
    half = math.ceil(count / 40) if count >= 8 else 0
    slow = []
    for i in range(count):
        top = bottom = 0.0
        for j in range(max(0, i - half), min(count, i + half + 1)):
            for k in range(max(0, j - half), min(count, j + half + 1)):
                if not math.isnan(values[k]):
                    top, bottom = top + values[k], bottom + 1
        slow.append(math.nan if math.isnan(values[i]) else top / bottom)
    column = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(columns.smoothed(column), torch.tensor(slow, dtype=torch.float64), equal_nan=True)


@pytest.mark.parametrize("count", [1, 800, 801, 5000])
def test_thinning_keeps_order_and_spikes(count):
    column = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    column[count // 2] = 9.0
    steps, thin = plotting.thinned(torch.arange(count) + 1.0, column)
    assert len(thin) <= 800 and thin.max() == 9.0 and thin.min() == column.min()
    assert (steps.diff() >= 0).all() and torch.equal(column[steps.long() - 1], thin)


@pytest.mark.slow
def test_names_that_mathtext_would_read_stay_as_they_are(figures):
    curves.picture(run(10, ["$x_{", "a\nb", "猫", ""]), width=400)
    words = [text.get_text() for text in figures[0].texts]
    assert {"$x_{", "a b", "猫", "(no name)"} <= set(words)
