"""Pictures of the documentation that are computed and not photographed: curves of the losses, the three failures, and
a report on samples.

    python benchmarks/docs_pictures.py        # writes docs/pictures/loss_*.webp, failures.webp and when_to_stop.webp

Every curve is a public function of editloss_core evaluated point by point, and its gradient what autograd says; every
verdict and map is what :func:`editloss_core.verdict.judge.judge` says of the outputs that the example graphs show.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from editloss_core import losses
from editloss_core.demo import pictures
from editloss_core.drawing.colours import VERDICT_COLORS, text_on
from editloss_core.drawing.sheet import INK, LINE, MUTED, Sheet, new_figure, pixels
from editloss_core.drawing.written import save as written
from editloss_core.run_report import report
from editloss_core.run_report.verdicts import judge_samples
from editloss_core.verdict.folder import scan
from editloss_core.verdict.judge import judge
from editloss_core.verdict.picture import FAILURE_OF, heat

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
WIDTH = 1400
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d98c00", "#009e73", "#cc79a7"  # those of the curves of a run
MARGIN = 0.25


def save(figure, name: str) -> None:
    picture = Image.fromarray((pixels(figure) * 255).round().byte().numpy())
    picture.save(PICTURES / f"{name}.webp", lossless=name.startswith("loss"), quality=90, method=6)


class Curves(Sheet):
    """Panels side by side, with a title above and words below each."""

    HEIGHT, TOP, LEFT, GAP = 3.6, 0.55, 0.75, 0.75

    def __init__(self, panels: int):
        super().__init__(new_figure(WIDTH, 14.0, self.HEIGHT))
        self.count, self.drawn = panels, 0
        self.width = (14.0 - self.LEFT - 0.25 - (panels - 1) * self.GAP) / panels

    def panel(self, title: str, x: str, y: str):
        left = self.LEFT + self.drawn * (self.width + self.GAP)
        self.drawn += 1
        self.write(left - 0.4, 0.25, title, fontsize=11, weight="bold")
        axes = self.axes(left, self.TOP, self.width, self.HEIGHT - self.TOP - 0.6)
        axes.grid(color=LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, labelsize=9, length=0)
        axes.set_xlabel(x, fontsize=9.5, color=INK)
        axes.set_ylabel(y, fontsize=9.5, color=INK)
        for side in axes.spines.values():
            side.set_color(LINE)
        return axes


def legend(axes, place: str = "best") -> None:
    axes.legend(fontsize=9, frameon=True, framealpha=0.9, edgecolor="none", loc=place)


def slopes(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``loss`` of each point of ``x``, and its derivative there."""
    x = x.clone().requires_grad_()
    y = loss(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), gradient


def turned(angle: Tensor) -> Tensor:
    """Unit vectors ``[n, 2]`` at these angles from the first axis."""
    return torch.stack([angle.cos(), angle.sin()], -1)


def hinge() -> None:
    """The hinge that five of the losses share, with its soft form, and what a margin beyond reach does."""
    page = Curves(3)
    gap = torch.linspace(-0.75, 0.5, 501)
    value = page.panel("the loss", "gap: d(pred, gt) − d(pred, negative)", "loss, margin 0.25")
    slope = page.panel("its gradient", "gap: d(pred, gt) − d(pred, negative)", "slope")
    for smooth, color in ((0.0, BLUE), (0.05, ORANGE), (0.1, PINK)):

        def loss(x: Tensor, smooth: float = smooth) -> Tensor:
            zero = torch.zeros_like(x)
            return losses.margin_ranking_on_distances(x + 1.0, zero + 1.0, MARGIN, "none", smooth=smooth)

        y, dy = slopes(loss, gap)
        label = f"smooth {smooth:g}" if smooth else "hinge (smooth 0)"
        value.plot(gap, y, color=color, linewidth=2, label=label)
        slope.plot(gap, dy, color=color, linewidth=2, label=label)
    for axes, place in ((value, "upper left"), (slope, "lower right")):
        axes.axvline(-MARGIN, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        legend(axes, place)
    value.text(-MARGIN - 0.02, 0.4, "met", ha="right", color=MUTED, fontsize=9)
    value.text(-MARGIN + 0.02, 0.4, "open", ha="left", color=MUTED, fontsize=9)

    reach = page.panel("a margin within reach, and beyond it", "way from before (0) to after (1)", "no-edit identity")
    way = torch.linspace(0, 1, 201)
    for edit, margin, color, words in (
        (0.6, MARGIN, GREEN, "d(gt, src) 0.6, margin 0.25"),
        (0.15, MARGIN, ORANGE, "d(gt, src) 0.15, margin 0.25"),
        (0.15, "auto", BLUE, "d(gt, src) 0.15, margin auto"),
    ):
        whole = math.acos(1 - edit)
        src, gt = turned(torch.zeros(len(way))), turned(torch.full((len(way),), whole))
        y = losses.loss_no_edit_identity(turned(way * whole), gt, src, margin, reduction="none")
        reach.plot(way, y, color=color, linewidth=2, label=words)
    reach.set_ylim(-0.03, 0.98)
    legend(reach, "upper right")
    save(page.figure, "loss_hinge")


def match() -> None:
    """cos, l2 and l1 over how far the prediction is off, with their gradients."""
    page = Curves(3)
    angle = torch.linspace(0, math.pi, 361)
    y, dy = slopes(
        lambda x: losses.feature_match_loss(turned(x), turned(torch.zeros_like(x)), "cos", reduction="none"), angle
    )
    axes = page.panel("cos", "angle between prediction and target, degrees", "loss, slope per radian")
    axes.plot(angle.rad2deg(), y, color=BLUE, linewidth=2, label="loss")
    axes.plot(angle.rad2deg(), dy, color=ORANGE, linewidth=2, linestyle=(0, (4, 2)), label="slope")
    axes.set_xticks(range(0, 181, 45))
    legend(axes, "upper left")
    off = torch.linspace(-2, 2, 401)
    for kind in ("l2", "l1"):
        y, dy = slopes(
            lambda x, kind=kind: losses.feature_match_loss(
                x.unsqueeze(-1), torch.zeros(len(x), 1), kind, reduction="none"
            ),
            off,
        )
        axes = page.panel(kind, "one feature: prediction − target", "loss, slope")
        axes.plot(off, y, color=BLUE, linewidth=2, label="loss")
        axes.plot(off, dy, color=ORANGE, linewidth=2, linestyle=(0, (4, 2)), label="slope")
        legend(axes, "lower right")
    save(page.figure, "loss_match")


def contrastive() -> None:
    page = Curves(2)
    d = torch.linspace(0, 1.6, 321)
    value = page.panel("the loss", "distance d of the pair", "loss, margin 1")
    slope = page.panel("its gradient", "distance d of the pair", "slope")
    for label, color, words in ((1, GREEN, "same: ½ d²"), (0, PINK, "different: ½ max(0, margin − d)²")):
        y, dy = slopes(
            lambda x, label=label: losses.contrastive_on_distances(x, torch.tensor(label), reduction="none"), d
        )
        value.plot(d, y, color=color, linewidth=2, label=words)
        slope.plot(d, dy, color=color, linewidth=2, label=words)
    for axes in (value, slope):
        axes.axvline(1.0, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        legend(axes, "upper left")
    slope.axhline(0, color=MUTED, linewidth=1)
    save(page.figure, "loss_contrastive")


def info_nce() -> None:
    page = Curves(3)
    gap = torch.linspace(-0.4, 0.4, 401)
    value = page.panel("the loss, one negative", "gap: d(pred, gt) − d(pred, negative)", "loss")
    slope = page.panel("its gradient", "gap: d(pred, gt) − d(pred, negative)", "slope")
    share = page.panel("eight negatives", "d(pred, negative), with d(pred, gt) 0.3", "share of the push, %")
    negatives = torch.linspace(0.3, 0.65, 8)
    for k, (tau, color) in enumerate(((0.05, ORANGE), (0.07, BLUE), (0.2, PINK))):

        def loss(x: Tensor, tau: float = tau) -> Tensor:
            return losses.info_nce_on_distances(x + 1.0, torch.ones_like(x), tau, "none")

        y, dy = slopes(loss, gap)
        value.plot(gap, y, color=color, linewidth=2, label=f"temperature {tau:g}")
        slope.plot(gap, dy, color=color, linewidth=2, label=f"temperature {tau:g}")
        d = negatives.clone()[None].requires_grad_()
        (push,) = torch.autograd.grad(losses.info_nce_on_distances(torch.tensor([0.3]), d, tau), d)
        share.bar(
            negatives + (k - 1) * 0.013, 100 * (push / push.sum())[0], 0.012, color=color, label=f"temperature {tau:g}"
        )
    for axes in (value, slope, share):
        legend(axes, "upper right" if axes is share else "upper left")
    save(page.figure, "loss_info_nce")


def masks() -> None:
    """What the background does to an average over tokens: 1024 of them, of which some are edited and turned by 60 degrees."""
    page = Curves(2)
    shares = torch.tensor([1, 2, 3, 5, 7, 10, 15, 20, 30, 45, 60, 80, 100])
    src = turned(torch.zeros(1, 1024))
    rows: dict[str, list[float]] = {"token weights: mask": [], "none": []}
    paid: dict[str, list[float]] = {"token weights: mask": [], "none": []}
    for percent in shares.tolist():
        edited = (torch.arange(1024) < 1024 * percent / 100).float()[None]
        gt = turned(edited * math.pi / 3)
        for name, weights in (("token weights: mask", edited), ("none", None)):
            rows[name].append(losses.pair_distance(gt, src, weights=weights).item())
            paid[name].append(losses.loss_no_edit_identity(gt, gt, src, MARGIN, weights=weights).item())
    reach = page.panel("what the edit amounts to", "share of the picture that the edit covers, %", "d(gt, src)")
    cost = page.panel(
        "what a perfect prediction pays, margin 0.25",
        "share of the picture that the edit covers, %",
        "no-edit identity",
    )
    for axes, found in ((reach, rows), (cost, paid)):
        for (name, values), color in zip(found.items(), (GREEN, ORANGE)):
            axes.plot(shares, values, "o-", color=color, linewidth=2, markersize=4, label=name)
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        axes.minorticks_off()
    reach.axhline(MARGIN, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
    reach.text(1.05, MARGIN + 0.012, "margin", color=MUTED, fontsize=9)
    legend(reach, "center left")
    legend(cost, "center left")
    save(page.figure, "loss_masks")


# ---------------------------------------------------------------------------------------------------------------------
# The three failures
# ---------------------------------------------------------------------------------------------------------------------

FAILURES = (  # output, map of the verdict, what red says
    ("no edit", "unchanged", "red: still the before picture"),
    ("distorted", "shape", "red: not the shape it should have"),
    ("overlay", "old object", "red: the old object is left"),
)
WINDOW = slice(55, 316), slice(62, 352)  # rows and columns around both objects


def failures() -> None:
    """The pair on the left; beside it each failed output above the map of its verdict."""
    pair = pictures.edit("oak chair")
    before, after, mask, _ = pair
    found = pictures.outputs(pair)
    left, gap, head, between, side = 0.15, 0.3, 0.95, 0.5, 3.2
    high = side * (WINDOW[0].stop - WINDOW[0].start) / (WINDOW[1].stop - WINDOW[1].start)
    page = Sheet(new_figure(WIDTH, 14.0, head + 2 * high + between + 0.15))

    def show(picture: Tensor, column: int, row: int) -> None:
        axes = page.axes(left + column * (side + gap), head + row * (high + between), side, high)
        axes.imshow(picture[WINDOW].numpy(), interpolation="bilinear", vmin=0, vmax=1)
        axes.set_axis_off()

    def words(column: int, row: int, text: str, shift: float = 0.0, **style) -> None:
        y = head + row * (high + between) - 0.24
        page.write(left + column * (side + gap) + shift, y, text, **{"fontsize": 13, **style})

    words(0, 0, "before", weight="bold")
    words(0, 1, "after: what it should become", weight="bold")
    show(before, 0, 0)
    show(after, 0, 1)
    for column, (name, place, meaning) in enumerate(FAILURES, 1):
        output = found[name]
        verdict = judge(before, output, after, mask)
        if verdict.verdict != FAILURE_OF[place]:
            raise AssertionError(f"{name}: the verdict is {verdict.verdict}, so that this picture would not be true")
        color = VERDICT_COLORS[verdict.verdict]
        field = {"boxstyle": "round,pad=0.3", "facecolor": color, "edgecolor": "none"}
        text = f"{verdict.verdict} {verdict.scores[verdict.verdict]:.2f}"
        words(column, 0, text, 0.06, weight="bold", color=text_on(color), bbox=field)
        words(column, 1, meaning)
        show(output, column, 0)
        show(heat(output, verdict.maps[place]), column, 1)
    page.write(left, 0.28, "the pair", fontsize=13, color=MUTED)
    page.write(left + side + gap, 0.28, "three outputs that failed: the verdict, and where", fontsize=13, color=MUTED)
    save(page.figure, "failures")


# ---------------------------------------------------------------------------------------------------------------------
# When to stop
# ---------------------------------------------------------------------------------------------------------------------

SAMPLED = {  # step → what the outputs of eight held-out pairs are: too early, right, and trained too long
    250: ("no edit", "no edit", "no edit", "no edit", "no edit", "no edit", "no edit", "overlay"),
    500: ("no edit", "overlay", "good", "no edit", "overlay", "no edit", "overlay", "no edit"),
    750: ("good", "overlay", "good", "no edit", "good", "good", "overlay", "good"),
    1000: ("good", "good", "good", "good", "good", "good", "overlay", "good"),
    1250: ("good", "good", "distorted", "good", "distorted", "good", "good", "distorted"),
    1500: (
        "distorted",
        "good",
        "distorted",
        "collateral change",
        "distorted",
        "collateral change",
        "good",
        "distorted",
    ),
}


def samples(root: Path) -> Path:
    """A folder as ai-toolkit leaves it, with outputs of eight pairs that were made to fail: ``samples/``, checkpoints, and
    ``control/`` and ``target/`` beside them."""
    scenes = [scene for scene in pictures.SCENES if scene != pictures.DRAWN]
    for place, (scene, flipped) in enumerate((scene, flipped) for flipped in (False, True) for scene in scenes):
        pair = pictures.edit(scene)
        pair = pair._replace(**{part: getattr(pair, part).flip(1) for part in pictures.PARTS}) if flipped else pair
        made, name = pictures.outputs(pair), f"{place}_{scene.replace(' ', '_')}{'_mirrored' if flipped else ''}.png"
        written(pair.before, root / "control" / name)
        written(pair.after, root / "target" / name)
        for step, kinds in SAMPLED.items():
            written(made[kinds[place]], root / "samples" / f"{1_700_000_000_000 + step}__{step:09d}_{place}.png")
    for step in SAMPLED:
        (root / f"chair_to_stool_{step:09d}.safetensors").touch()
    return root


def when_to_stop() -> None:
    """The report on such a folder."""
    with TemporaryDirectory() as scratch:
        root = samples(Path(scratch) / "chair_to_stool")
        found = scan(root, {"before": root / "control", "after": root / "target"})
        run = judge_samples(found, root)
        for step, v in zip(SAMPLED, run.validations):
            if v.counts != Counter(SAMPLED[step]):
                raise AssertionError(
                    f"step {step}: the verdicts are {dict(v.counts)}, so that this picture would not be true"
                )
        page = report.picture(run, 1400, rows=3)[0]
    Image.fromarray((page * 255).round().byte().numpy()).save(PICTURES / "when_to_stop.webp", quality=88, method=6)


def main(names: Sequence[str]) -> None:
    for draw in (hinge, match, contrastive, info_nce, masks, failures, when_to_stop):
        if not names or draw.__name__ in names:
            draw()


if __name__ == "__main__":
    main(sys.argv[1:])
