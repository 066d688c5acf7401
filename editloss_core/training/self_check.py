"""Finds out, before a run learns anything, whether its gradients are right and its model sees what it should.

Programs around a model change every week, and what is written for inference can differentiate wrongly without a word. So
the model, the LoRA, the objective, the precision and the checkpointing of the run itself are put to the test:

* along a random direction d, the derivative that a backward pass gives, ⟨w, J d⟩, is compared with the central difference
  Δ = f(x + d) − f(x − d), for w = Δ / ‖Δ‖: of the network's output with respect to the LoRA, of decoded pictures with
  respect to latents, and of each encoder's embedding with respect to what it reads;
* the denoiser's velocity with what the program's own sampling path computes for the same input;
* the derivative of the output with respect to the reference with 0: a model that does not look at the before picture
  trains without complaint.

It takes four passes of the model, of a step's size: x + d, x − d, x with its gradient, and the sampling path's. Where the
derivative with respect to the reference is 0, one more looks at another reference before it is said to have no effect.

**Tolerances.** Three things part the two derivatives: rounding, the curvature of f, and errors. What the first two come to is
measured in the same passes, by c = ‖f(x + d) + f(x − d) − 2 f(x)‖ / ‖Δ‖: independent rounding makes up c²/3 of ‖Δ‖², which is
taken off again. Allowed is c²/3 beside a part for the precision, :data:`TOLERANCES`. Where c is above :data:`BLUR` nothing can
be told, and that is said. Quantised layers multiply without rounding their inputs meanwhile, where they can be told to.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from types import FunctionType
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

import torch
from torch import Tensor, nn

from ..device_memory import is_out_of_memory
from ..encoders.base import Encoder
from ..files import make_folder, replacing
from ..lora.lora import LoRA
from ..models.base import Denoiser
from ..processes import ProcessLost
from .estimate import EstimateObjective
from .flow import add_noise, generator_for
from .prepare import Prepared

# Of a derivative, by the precision that the model computes in. Measured on Flux networks of 5 and 30 blocks with right
# gradients: float32 0.02 % apart, float16 up to 1 %, bfloat16 up to 5 % where c is below 0.6, and up to 20 % where it is 1.
TOLERANCES = {torch.float32: 0.002, torch.float16: 0.03, torch.bfloat16: 0.06}
# Of a velocity, ‖ours − theirs‖ / ‖theirs‖: the same numbers through other kernels. A wrong guidance or position is above 0.1.
VELOCITY_TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}
BLUR = 0.8
NOISE_LEVEL = 0.6
NO_EFFECT = 1e-6  # ‖∂v/∂reference‖ / ‖∂v/∂x_t‖ of a reference that is looked at: 0.04 and more in every model tried
# How far the LoRA is moved, as a share of itself; it makes up about SIZE of the output. Wide enough to stand out from rounding.
STEPS = {torch.float32: 0.03, torch.float16: 0.15, torch.bfloat16: 0.3}
SIZE = 0.3
# The first layer that is called is moved by all of it, the last one by e^-4: on the way back to the first layers a gradient
# goes through everything, and what is wrong anywhere stands out. With equal shares a wrong one was seen half as clearly.
FADING = 4.0
# And latents or pictures before a decoder or encoder, as a share of their own size: narrow, for a ReLU has kinks, and where
# that drowns in rounding, wide.
NARROW, WIDE = (0.001, 0.01), (0.1, 0.08)  # with what is allowed
FOLDER = "self_checks"  # of what is remembered, in a cache folder


class _NoGradient(Exception):
    """The pass with a gradient stopped; the message says how."""


class SelfCheckFailed(RuntimeError):
    """A derivative or a velocity is not what it should be; the message names the part, the numbers and what to do."""


@dataclass(frozen=True)
class Checked:
    """What was found of one part.

    Attributes:
        part: "LoRA", "decoder", "encoder NAME", "velocity" or "reference".
        found, expected: the two numbers that should agree; NaN where there are none.
        error: how far they are apart, as a share of the larger one; None where nothing could be told.
        allowed: the largest error that is no fault.
        said: what happened, where it is not a matter of two numbers.
    """

    part: str
    found: float = math.nan
    expected: float = math.nan
    error: Optional[float] = None
    allowed: float = math.nan
    said: str = ""

    @property
    def wrong(self) -> bool:
        return self.error is not None and not self.error <= self.allowed

    def __str__(self) -> str:
        if self.said:
            return f"{self.part}: {self.said}"
        return f"{self.part} {self.found:.2g}" if self.part == "reference" else f"{self.part} {_percent(self.error)}"


@dataclass(frozen=True)
class SelfCheck:
    """What was found of all parts.

    Attributes:
        program: what the model ran in, with its version.
        parts: in the order in which they were checked.
        remembered: the day on which it was found, if it was not found now.
    """

    program: str
    parts: tuple[Checked, ...]
    remembered: str = ""

    @property
    def wrong(self) -> list[Checked]:
        return [part for part in self.parts if part.wrong]

    def line(self) -> str:
        """One line for a log."""
        found = "; ".join(str(part) for part in self.parts)
        when = f", remembered from {self.remembered}" if self.remembered else ""
        verdict = "FAILED" if self.wrong else "passed"
        return f"self-check {verdict} ({self.program}{when}): {found}"

    def faults(self) -> list[str]:
        """A sentence for every part that is wrong."""
        return [_fault(part) for part in self.wrong]

    def raise_if_wrong(self) -> None:
        """SelfCheckFailed, with every part that is wrong."""
        if self.wrong:
            found = "\n".join(f"- {fault}" for fault in self.faults())
            raise SelfCheckFailed(
                f"self-check: with {self.program} this run would learn something wrong:\n{found}\n{ADVICE}"
            )


ADVICE = (
    "Nothing was trained. Update EditLoss; if that does not help, report these lines. Until then: the ComfyUI or diffusers that "
    "worked before; for the LoRA, the layers 'attention', or gradient checkpointing off; self_check off trains all the same."
)
_MEANS = {
    "velocity": "the trainer computes {found}, the program's own sampling {expected} (norms): they differ by {error}",
    "reference": "the before picture does not change what the model predicts; it cannot learn an edit of it. Use an edit model "
    "that takes reference latents, and the nodes that its own workflows use",
}
_SLOPE = "the backward pass says {found} along a direction, finite differences {expected}: {error} apart, {allowed} is allowed"


def _fault(part: Checked) -> str:
    if part.said:
        return f"{part.part}: {part.said}"
    values = {"found": f"{part.found:.4g}", "expected": f"{part.expected:.4g}", "error": _percent(part.error)}
    text = _MEANS.get(part.part, _SLOPE)
    return f"{part.part}: {text.format(**values, allowed=_percent(part.allowed))}"


def _percent(share: Optional[float]) -> str:
    return "?" if share is None else f"{100 * share:.2g} %"


# ---------------------------------------------------------------------------------------------------------------------
# One derivative
# ---------------------------------------------------------------------------------------------------------------------


class Line:
    """A line through the point that some tensors are at: each can be moved ``sign`` times its direction away from it."""

    def __init__(self, values: Sequence[Tensor], directions: Sequence[Tensor]):
        self.values, self.directions = list(values), list(directions)
        self._start = [value.detach().clone() for value in values]

    @torch.no_grad()
    def move(self, sign: int) -> None:
        for value, start, direction in zip(self.values, self._start, self.directions):
            value.copy_(start + sign * direction)
        torch.clear_autocast_cache()  # which would go on with the weights that were there before


@dataclass(frozen=True)
class Slope:
    """Derivative along a line: ``found`` by a backward pass, ``expected`` by differences, both times 2 ‖d‖.

    Attributes:
        blur: c of the text above.
        gradients: of the extra inputs.
        middle: f(x), detached.
    """

    found: float
    expected: float
    blur: float
    gradients: list[Optional[Tensor]]
    middle: Tensor

    def checked(self, part: str, allowed: float) -> Checked:
        if not self.expected > 0 or self.blur > BLUR:
            return Checked(part, self.found, self.expected, said="cannot be told, its answers are too coarse")
        error = abs(self.found - self.expected) / max(abs(self.found), abs(self.expected))
        return Checked(part, self.found, self.expected, error, allowed + self.blur**2 / 3)


def slope(
    evaluate: Callable[[], Tensor],
    line: Line,
    inputs: Sequence[Tensor] = (),
    counts: Optional[Callable[[Tensor], Tensor]] = None,
) -> Slope:
    """The derivative of ``evaluate`` along ``line``, twice. Three calls; only the last one has a gradient.

    Args:
        evaluate: gives a tensor of the line's values.
        line: the values are leaves that require a gradient.
        inputs: other leaves, whose gradient is wanted too.
        counts: which numbers of a result count, where it is not smooth everywhere.

    Raises:
        _NoGradient: the pass with a gradient stops, although the others do not.
    """
    with torch.no_grad():
        line.move(1)
        plus = evaluate().float()
        line.move(-1)
        minus = evaluate().float()
        line.move(0)
    with _gradient_pass():
        middle = evaluate().float()
    kept = middle.detach()
    difference, second = plus - minus, plus + minus - 2 * kept
    if counts is not None:
        inside = counts(plus) & counts(minus) & counts(kept)
        difference, second = difference * inside, second * inside
    norm = difference.norm()
    leaves = [*line.values, *inputs]
    gradients: list[Optional[Tensor]] = [None] * len(leaves)
    if middle.requires_grad and norm > 0:
        with _gradient_pass():
            gradients = list(torch.autograd.grad(middle, leaves, difference / norm, allow_unused=True))
    along = sum((g.double() * d).sum() for g, d in zip(gradients, line.directions) if g is not None)
    blur = (second.norm() / norm).item() if norm > 0 else math.inf
    expected = norm.item() * (1 - blur**2 / 3) if norm > 0 else 0.0
    return Slope(2 * float(along), expected, blur, gradients[len(line.values) :], kept)


@contextmanager
def _gradient_pass() -> Iterator[None]:
    """Gradients are on; what stops the block for want of a derivative is a _NoGradient."""
    try:
        with torch.enable_grad():
            yield
    except RuntimeError as error:
        if is_out_of_memory(error) or isinstance(error, ProcessLost):
            raise
        raise _NoGradient(f"its gradient cannot be computed ({_in_a_line(error)})") from error


def _in_a_line(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else ''}"


class LoRALine(Line):
    """A line through a LoRA that has an effect.

    A LoRA starts as 0, where its first matrix has no gradient. For the time of the check each layer's second matrix is
    random, and so large that all layers together make up about :data:`SIZE` of the output; how large is found within the
    first pass, from what each layer answers.
    """

    def __init__(self, lora: LoRA, step: float, generator: torch.Generator):
        layers = list(lora.layers)
        with torch.no_grad():
            for layer in layers:
                layer.up.copy_(torch.randn(layer.up.shape, generator=generator))
        values = [p for layer in layers for p in (layer.down, layer.up)]
        directions = []
        for value in values:
            noise = torch.randn(value.shape, generator=generator).to(value)
            directions.append(step * value.detach().square().mean().sqrt() * noise)
        super().__init__(values, directions)
        self._share = SIZE / math.sqrt(len(layers))
        self._fitted: set[int] = set()
        self._hooks = [
            part.register_forward_hook(self._fit(i, layer), with_kwargs=True, prepend=True)
            for i, (part, layer) in enumerate(zip(lora.targets.values(), layers))
        ]

    def _fit(self, i: int, layer: nn.Module) -> Callable[..., None]:
        """A hook for the first call of layer ``i``, within the pass at +d."""

        def hook(part: nn.Module, args: tuple, kwargs: dict, answer: Tensor) -> None:
            if i in self._fitted:
                return
            early = math.exp(-FADING * len(self._fitted) / len(self._hooks))
            self._fitted.add(i)
            down, up = 2 * i, 2 * i + 1
            with torch.no_grad():
                x = args[0] if args else next(iter(kwargs.values()))
                bypass = layer(x, torch.zeros_like(answer)).float().norm()
                factor = self._share * answer.float().norm() / bypass
                if not (factor.isfinite() and factor > 0):  # an input or answer of zeros
                    factor = torch.zeros_like(factor)
                factor = factor.to(self.values[up].device)
                self._start[up].mul_(factor)
                self.directions[up].mul_(early * factor)
                self.directions[down].mul_(early)
                for place in (down, up):
                    self.values[place].copy_(self._start[place] + self.directions[place])
            torch.clear_autocast_cache()

        return hook

    def release(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


# ---------------------------------------------------------------------------------------------------------------------
# A run's parts
# ---------------------------------------------------------------------------------------------------------------------


def precision_of(denoiser: Denoiser) -> torch.dtype:
    """The dtype that the model computes in."""
    dtype = getattr(denoiser, "dtype", None) or next(
        (p.dtype for p in denoiser.module.parameters() if p.is_floating_point()), torch.float32
    )
    return dtype if dtype in TOLERANCES else torch.bfloat16


def program_of(denoiser: Denoiser) -> str:
    return getattr(denoiser, "program", "") or f"torch {torch.__version__}"


def check_network(
    denoiser: Denoiser, lora: LoRA, prepared: Prepared, conditioning: Sequence[Any], index: int, batch: int, seed: int
) -> list[Checked]:
    """LoRA, velocity and reference, in four passes over ``batch`` times the pair ``index``. The LoRA must be attached."""
    dtype, device = precision_of(denoiser), denoiser.device
    generator = generator_for(seed, "self-check")
    x0 = prepared.after([index]).to(device).expand(batch, -1, -1, -1)
    noise = torch.randn(x0.shape, generator=generator).to(device)
    t = torch.full((batch,), NOISE_LEVEL, device=device)
    x = add_noise(x0, noise, t).requires_grad_()
    reference = prepared.before([index]).to(device).expand(batch, -1, -1, -1).clone().requires_grad_()
    prompts = [conditioning[index]] * batch
    stock = getattr(denoiser, "stock_velocity", None)
    with _kept(lora), _exact(denoiser):
        line = LoRALine(lora, STEPS[dtype], generator)
        try:
            try:
                measured = slope(lambda: denoiser(x, t, [reference], prompts), line, [x, reference])
            except _NoGradient as error:
                return [Checked("LoRA", error=math.inf, allowed=0.0, said=str(error))]
            found = [measured.checked("LoRA", TOLERANCES[dtype])]
            with torch.no_grad():
                if stock is not None:
                    found.append(
                        _velocity(measured.middle, lambda: stock(x.detach(), t, reference.detach(), prompts[0]), dtype)
                    )
                if not found[0].wrong:  # else a derivative is missing, and that is said already
                    found.append(_effect(measured, lambda: denoiser(x, t, [reference.flip(-1)], prompts)))
        finally:
            line.release()
    return found


def _velocity(ours: Tensor, stock: Callable[[], Tensor], dtype: torch.dtype) -> Checked:
    try:
        theirs = stock().float()
    except (RuntimeError, TypeError, AttributeError) as error:  # a program that does it in another way
        if is_out_of_memory(error):
            raise
        return Checked("velocity", said=f"cannot be told, the sampling path could not be run ({_in_a_line(error)})")
    apart = ((ours - theirs).norm() / theirs.norm()).item()
    return Checked("velocity", ours.norm().item(), theirs.norm().item(), apart, VELOCITY_TOLERANCES[dtype])


def _effect(measured: Slope, with_another: Callable[[], Tensor]) -> Checked:
    """Whether the reference changes the output: by its gradient, and if that is 0, by another reference."""
    if not measured.middle.isfinite().all():
        return Checked("reference", said="cannot be told, the model's answer is not finite")
    of_x, of_reference = (0.0 if g is None else g.norm().item() for g in measured.gradients)
    effect = of_reference / of_x if of_x else 0.0
    if effect <= NO_EFFECT:
        middle = measured.middle
        effect = ((with_another().float() - middle).norm() / middle.norm()).item() if middle.any() else math.nan
    if math.isnan(effect):
        return Checked("reference", said="cannot be told, the model's answer is 0")
    return Checked("reference", effect, NO_EFFECT, NO_EFFECT / effect if effect else math.inf, 1.0)


def check_objective_parts(objective: EstimateObjective, index: int, seed: int) -> list[Checked]:
    """Decoder and encoders, with what a step gives them of the pair ``index``.

    They may compute in another precision than the model: where small steps drown in rounding, wide ones are taken.
    """
    generator = generator_for(seed, "self-check of the objective")
    found = []
    for part, function, x in objective.differentiated(index):
        noise = torch.randn(x.shape, generator=generator).to(x)
        direction = noise * x.square().mean().sqrt()
        x = x.detach().clone().requires_grad_()

        def measured(step: float, f=function, x=x, d=direction, counts=_in_range if part == "decoder" else None):
            return slope(lambda: f(x), Line([x], [step * d]), counts=counts)

        try:
            (step, allowed) = NARROW
            one = measured(step)
            if one.blur > BLUR / 3:
                (step, allowed) = WIDE
                one = measured(step)
        except _NoGradient as error:
            found.append(Checked(part, error=math.inf, allowed=0.0, said=str(error)))
        else:
            found.append(one.checked(part, allowed))
    return found


def _in_range(pictures: Tensor) -> Tensor:
    """Where a decoder did not clamp, for its gradient passes the clamp and its differences do not."""
    return (pictures > 0) & (pictures < 1)


@contextmanager
def _kept(lora: LoRA) -> Iterator[None]:
    """Inside, the LoRA's weights may be anything, and it drops nothing; afterwards they are what they were."""
    before, mode = [p.detach().to("cpu", copy=True) for p in lora.parameters()], lora.training
    lora.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(lora.parameters(), before):
                p.copy_(value)
        lora.train(mode)


def _exact(denoiser: Denoiser):
    """Quantised layers multiply without rounding their inputs, where the denoiser can tell them to.

    The differences of a function that rounds its inputs to 8 or 4 bits say nothing of a derivative. The backward pass of such a
    layer is the same either way.
    """
    return getattr(denoiser, "exact_products", nullcontext)()


# ---------------------------------------------------------------------------------------------------------------------
# What is remembered
# ---------------------------------------------------------------------------------------------------------------------


def identity(
    denoiser: Denoiser, lora: LoRA, about: Mapping[str, Any], encoders: Mapping[str, Encoder], decode: Any = None
) -> str:
    """A key of everything that the check depends on: program, model, precision, settings, and the code of all of them.

    Weights do not belong to it, and their shapes and dtypes do: whether a derivative is right does not depend on their values.
    """
    texts = [program_of(denoiser), str(denoiser.device), getattr(denoiser, "patches", "")]
    texts += [json.dumps(about, sort_keys=True, default=str), str(precision_of(denoiser)), str(asdict(lora.settings))]
    texts += [f"{name} {encoder.info}" for name, encoder in encoders.items()]
    for name, part in denoiser.module.named_modules():
        weights = ((key, type(p).__name__, p.dtype, tuple(p.shape)) for key, p in part.named_parameters(recurse=False))
        texts.append(f"{name} {type(part).__qualname__} {list(weights)}")
    code = [Path(__file__).parents[1], *getattr(denoiser, "code", ())]
    for thing in (denoiser, decode, *encoders.values()):
        made_by = thing if isinstance(thing, FunctionType) else type(thing)
        texts.append(f"{made_by.__module__}.{made_by.__qualname__}")
        file = getattr(sys.modules.get(made_by.__module__), "__file__", None)
        code += [Path(file)] if file else []
    for path in code:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            texts.append(hashlib.sha256(file.read_bytes()).hexdigest())
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def recall(folder: Optional[Path], key: str) -> Optional[SelfCheck]:
    """What was found for this key before, if it is remembered."""
    path = folder / FOLDER / f"{key}.json" if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        return SelfCheck(entry["program"], tuple(Checked(**part) for part in entry["parts"]), entry["day"])
    except (ValueError, KeyError, TypeError):
        return None


def remember(folder: Optional[Path], key: str, found: SelfCheck) -> None:
    """For :func:`recall`. Only what agrees is kept: who is told of a fault looks again."""
    if folder is None or found.wrong:
        return
    make_folder(folder / FOLDER)
    parts = [asdict(part) for part in found.parts]
    text = json.dumps({"program": found.program, "day": date.today().isoformat(), "parts": parts})
    with replacing(folder / FOLDER / f"{key}.json") as temporary:
        temporary.write_text(text, encoding="utf-8")
