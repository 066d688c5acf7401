"""The program around a trainer: what it is told and asked, and what a terminal shows."""

from __future__ import annotations

from typing import Optional, Sequence

from ..runs.log import StepLog, ValidationLog
from ..runs.pictures import PreviewRow


class Host:
    """What a trainer asks of the program around it. This one does nothing; a subclass overrides what it needs.

    Every process has one of its own, and all are asked and told the same.
    """

    def check(self) -> None:
        """Called often; raises (anything) to stop. The run then keeps what was learnt and lets the exception through."""

    def before_step(self) -> None:
        """Called between graphs: the place to bring models to the device."""

    def on_step(self, log: StepLog, total: int) -> None:
        """After every step, out of ``total``."""

    def on_validation(self, log: Optional[ValidationLog], pictures: Sequence[PreviewRow]) -> None:
        """After every validation."""


class ConsoleHost(Host):
    """Shows a run on a terminal.

    Args:
        steps: of the whole run.
        shown: False in all but the main process.
    """

    def __init__(self, steps: int, shown: bool = True):
        from tqdm import tqdm

        self._bar = tqdm(total=steps, desc="training", disable=not shown, delay=1.0)
        self._shown = shown

    def on_step(self, log: StepLog, total: int) -> None:
        self._bar.update(log.step - self._bar.n)
        self._bar.set_postfix_str(f"loss {log.loss:.4g}, gradient {log.gradient_norm:.3g}")
        if log.step == total:
            self._bar.close()

    def on_validation(self, log: Optional[ValidationLog], pictures: Sequence[PreviewRow]) -> None:
        if log is not None and self._shown:
            values = {"velocity": (log.velocity_base, log.velocity)}
            values |= {name: (log.terms_base[name], value) for name, value in log.terms.items()}
            said = ", ".join(f"{name} {base:.4g} → {own:.4g}" for name, (base, own) in values.items())
            self._bar.write(f"step {log.step}, held-out pairs, base → with the LoRA: {said}")
