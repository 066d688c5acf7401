"""The training loop: flow matching plus an objective on x̂0, on the weights of a LoRA. It knows no program around it."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Optional, Sequence, TypeVar

import torch
from torch import Tensor

from ..device_memory import is_out_of_memory
from ..encoders.base import Encoder
from ..files import NotWritten, make_folder
from ..hashing import hash_tensors
from ..lora.lora import LoRA
from ..models.base import Denoiser, Preview
from ..objective import EditObjective, LossTerm
from ..processes import Processes, ProcessLost, check_accelerator, check_batch
from ..runs.checkpoint import CHECKPOINT_FOLDER, Checkpoint, checkpoint_path, checkpoints, tidy
from ..runs.log import OWN_FAILURES, VELOCITY, EventLog, RunLog, Sample, StepLog, TermSample, ValidationLog
from ..runs.pictures import PreviewRow, save_pictures
from . import pair_weights, rollout
from .estimate import Decode, EstimateObjective
from .flow import add_noise, estimate, estimate_weights, generator_for, velocity_loss
from .gradients import (
    NonFinite,
    Part,
    blame,
    check_losses,
    finite_rows,
    lora_gradient_norm,
    output_gradient,
    parts_of,
)
from .host import Host
from .memory import OutOfMemory, StepMemory, advice
from .own_failures import FOLDER as FAILURES_FOLDER
from .own_failures import ROLE, Judged, OwnFailures, judged, summary, tally
from .prepare import Prepared
from .resume import differences, resumable
from .self_check import SelfCheck, check_network, check_objective_parts, identity, program_of, recall, remember
from .settings import MovingAverage, TrainingSettings, check_objective, every, gated, warnings
from .shares import Shares
from .trackers import scalars, start_trackers
from .validation import Validator

if TYPE_CHECKING:
    from accelerate import Accelerator

UNCHECKED = "self-check off: whether the gradients of this run are right was not looked at"
_T = TypeVar("_T")


@dataclass
class TrainingResult:
    """What a run leaves.

    Attributes:
        steps: done.
        lora: with the averaged weights if there is a moving average.
        log: of every step and validation.
        pictures: of the last validation.
        checkpoint: the last one, None without a folder.
        self_check: a line on what it found before the first step, or that it was off; empty where nothing was left to train.
    """

    steps: int
    lora: LoRA
    log: RunLog
    pictures: list[PreviewRow] = field(default_factory=list)
    checkpoint: Optional[Path] = None
    self_check: str = ""


class Trainer:
    """Trains a LoRA, in one process or in those of an ``accelerate.Accelerator``.

    Several processes share each batch of ``settings.batch_size`` pairs, so that their number changes what a run takes and
    not what it learns: pairs, noise, noise levels and in-batch negatives are those of the whole batch, and each process
    has the same LoRA and optimiser at every step. (Only dropout draws in each process for itself.) The one gradient of a step
    is summed over the processes when its passes are done. Process 0 alone writes; all have to see the same files.

    Args:
        denoiser: the model, frozen.
        lora: made for ``denoiser.module``; attached while :meth:`run` runs.
        prepared: the pairs to train on.
        conditioning: one object per pair, which the denoiser understands.
        settings: of the run.
        objective: terms on x̂0, or None for flow matching alone.
        encoders: by the names that the objective's terms use.
        decode: differentiable decoder, for encoders that read pictures and for previews.
        dropped: the same with empty captions, where ``settings.caption_dropout`` is above 0.
        validation: held-out pairs, with ``validation_conditioning``.
        folder: for checkpoints and the log; None keeps everything in memory.
        info: plain values to keep in checkpoints (which pairs, which model).
        resolution, checkpointing: only for the advice when memory runs out, and to tell what the self-check depends on.
        cache: folder in which a self-check that passed is remembered; None looks every time.
        host: the program around.
        preview: what the model is told while pictures are sampled; None: what it is told in training.
        accelerator: whose processes train together, and whose trackers are told every step; the denoiser is on its device,
            see :func:`~editloss_core.processes.place`.

    Raises:
        ValueError: what does not fit together, before any work.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        lora: LoRA,
        prepared: Prepared,
        conditioning: Sequence[Any],
        settings: TrainingSettings,
        *,
        objective: Optional[EditObjective] = None,
        encoders: Optional[Mapping[str, Encoder]] = None,
        decode: Optional[Decode] = None,
        dropped: Sequence[Any] = (),
        validation: Optional[Prepared] = None,
        validation_conditioning: Sequence[Any] = (),
        folder: Optional[Path] = None,
        info: Optional[Mapping[str, Any]] = None,
        resolution: Optional[int] = None,
        checkpointing: bool = False,
        cache: Optional[Path] = None,
        host: Optional[Host] = None,
        preview: Optional[Preview] = None,
        accelerator: Optional[Accelerator] = None,
    ):
        self.processes = Processes(accelerator)
        if accelerator is not None:
            check_accelerator(accelerator)
            device = torch.device(denoiser.device)
            if device.type != accelerator.device.type or device.index not in (None, accelerator.device.index):
                raise ValueError(f"denoiser: expected it on {accelerator.device}, it is on {device}")
        check_batch(settings.batch_size, self.processes.count)
        for name, pairs, given in (
            ("conditioning", prepared, conditioning),
            ("dropped", prepared if settings.caption_dropout else (), dropped),
            ("validation_conditioning", validation or (), validation_conditioning),
        ):
            if len(pairs) != len(given):
                raise ValueError(f"{name}: expected one for each of {len(pairs)} pairs, got {len(given)}")
        check_objective(objective, settings)
        objective = objective if objective and objective.terms else None
        self.denoiser, self.lora, self.prepared = denoiser, lora, prepared
        self.conditioning, self.dropped = conditioning, dropped
        self.settings, self.folder, self.host, self.decode = settings, folder, host or Host(), decode
        self.info = {
            "settings": settings.as_dict(),
            "lora": asdict(lora.settings),
            "objective": [asdict(term) for term in objective.terms] if objective else [],
            **prepared.about(),
            **(info or {}),
        }
        self._advice = {"resolution": resolution, "rank": lora.settings.rank, "optimizer": settings.optimizer}
        self._checkpointing, self._cache = checkpointing, cache
        self.warnings = warnings(objective, settings)  # settings that were measured, and are not good
        self.notes: list[str] = []  # what a person should know though it stops nothing
        if settings.batch_size % self.processes.count:
            each = -(-settings.batch_size // self.processes.count)
            self.notes.append(
                f"batch_size {settings.batch_size}: in a step {self.processes.count} processes have time for {each} pairs each; "
                f"a multiple of {self.processes.count} would use all of it"
            )

        def on_estimates(
            pairs: Prepared,
            terms: Sequence[LossTerm],
            processes: Optional[Processes] = None,
            failures: Optional[OwnFailures] = None,
        ) -> Optional[EstimateObjective]:
            if not terms:
                return None
            return EstimateObjective(
                EditObjective(terms), encoders or {}, pairs, decode, lora.disabled, denoiser.device, processes, failures
            )

        terms = gated(objective, settings).terms if objective else ()
        alone = [term for term in terms if not term.across_batch and ROLE not in term.roles]
        in_batch = ", ".join(term.name for term in terms if term.across_batch)
        self._teaching = {rollout.REGRESSION, *(term.name for term in terms if term.weight)}
        self.shares = Shares(terms, VELOCITY) if settings.weights == "shares" and terms else None
        self.failures = self._own_failures(terms, encoders or {})
        self.objective = on_estimates(prepared, terms, self.processes, self.failures)
        if settings.estimate == "rollout":
            without, with_gradients = rollout.passes(settings.rollout_steps, settings.objective_every)
            self.notes.append(
                f"rollouts at every {settings.objective_every}. step: on average {without:.2g} passes without gradients and "
                f"{with_gradients:.3g} with them a step, in place of 1"
            )
        self._taught = list(range(len(prepared)))
        self._pair_weights: Optional[Tensor] = None
        if settings.pair_weights == "reach":
            ratios = pair_weights.reach(terms, prepared)
            self._pair_weights = pair_weights.weights(ratios)
            self._taught = self._pair_weights.nonzero()[:, 0].tolist()
            self.notes += pair_weights.notes(ratios, prepared)
        self.warnings += pair_weights.margin_warnings(terms, prepared)
        buckets = prepared.pairs.subset(self._taught).alike
        self._full = min(
            settings.batch_size, max(map(len, buckets), default=1)
        )  # pairs of a batch that is not cut short
        if in_batch and settings.batch_size == 1:
            self.notes.append(f"{in_batch}: compares the pairs of a batch, and is always 0 with batch_size 1")
        self.validator = None
        if validation is not None and len(validation):
            if in_batch:
                self.notes.append(
                    f"{in_batch}: left out of validation, where pairs come one at a time and there is no batch to compare"
                )
            of_failures = ", ".join(term.name for term in terms if ROLE in term.roles)
            if of_failures:
                self.notes.append(
                    f"{of_failures}: left out of validation, whose pairs have no failed outputs to compare with"
                )
            self.validator = Validator(
                denoiser, lora, validation, validation_conditioning, settings, on_estimates(validation, alone), decode,
                self._check, self.processes, preview,
            )  # fmt: skip
        lora.to(denoiser.device)
        self.optimizer = settings.make_optimizer(lora.parameters())
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.average = MovingAverage(settings.ema, lora.named_parameters()) if settings.ema else None
        self.log = RunLog(folder if self.processes.main else None)
        self.step = 0  # done
        self._saved: Optional[Path] = None
        self._saved_step = 0
        self._updating = False
        self._memory = StepMemory(torch.device(denoiser.device))
        self._epochs: dict[int, list[list[int]]] = {}

    # -- the run ----------------------------------------------------------------------------------------------------

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint: LoRA, optimiser, average, step and log.

        What may change does: learning rate, weight decay, clipping and all that is not in the optimiser's state are
        this run's, and :attr:`notes` says what is not as it was. From an earlier step than the last one, :meth:`run` sets
        the later checkpoints aside.

        Raises:
            CheckpointError: another LoRA or optimiser than this run's.
        """
        saved = resumable(path, self.lora, self.settings)
        self._load(saved.lora)
        if self.average is not None:
            for name, value in self.average.values.items():
                value.copy_(saved.average[name])
        self.optimizer.load_state_dict(saved.optimizer)
        for group in self.optimizer.param_groups:  # which came back with the old one; the learning rate is set per step
            group["weight_decay"] = self.settings.weight_decay
        if self.shares is not None:
            self.shares.means.update(saved.shares)
        self.notes += differences(saved.info, self.info)
        if saved.step >= self.settings.steps:
            steps = self.settings.steps
            self.notes.append(f"nothing was left to train: {path.name} is of step {saved.step}, steps is {steps}")
        self.step, self._saved, self._saved_step = saved.step, path, saved.step
        if self.folder is not None:
            self.log = RunLog.read(self.folder, saved.step)
            if not self.processes.main:
                self.log.folder = None

    def self_check(self, anew: bool = False) -> SelfCheck:
        """Whether the gradients of this run are right; nothing is trained or changed. The same in every process.

        Args:
            anew: look although the result is remembered.

        Raises:
            OutOfMemory, and whatever the host raises.
        """
        return self._guarded(lambda: self._self_check(anew))

    def _self_check(self, anew: bool) -> SelfCheck:
        batch = self._batch(0)
        rows = len(self.processes.rows(len(batch)))
        objective, seed = self.objective, self.settings.seed
        about = {
            "batch": rows,
            "latents": list(self.prepared.after(batch[:1]).shape),
            "crop": self.prepared.crop,
            "checkpointing": self._checkpointing,
            "objective": self.info["objective"],
            "decoder": self.info.get("decoder"),
        }
        self._memory.begin()
        self._memory.enter("model")
        self.host.before_step()  # where weights are, belongs to what is checked
        encoders, decode = (objective.encoders, objective.decode) if objective else ({}, None)
        key = identity(self.denoiser, self.lora, about, encoders, decode)
        known = None if anew else recall(self._cache, key)
        if all(self.processes.gather([known is not None])):  # asked in every process, or one would wait for the others
            return known
        device = torch.device(self.denoiser.device)
        attached = self.lora.attached
        self.lora.attach()
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                self._check()
                found = check_network(self.denoiser, self.lora, self.prepared, self.conditioning, batch[0], rows, seed)
                self._check()
                if objective:
                    self._memory.enter("objective")
                    found += check_objective_parts(objective, batch[0], seed)
        finally:
            if not attached:
                self.lora.detach()
        checks = self.processes.gather([SelfCheck(program_of(self.denoiser), tuple(found))])
        check = next((c for c in checks if c.wrong), checks[0])
        if self.processes.main:
            remember(self._cache, key, check)
        return check

    def run(self) -> TrainingResult:
        """Train from the present step to the last one.

        Raises:
            SelfCheckFailed: the gradients are not right; nothing was learnt.
            NonFinite, OutOfMemory, ProcessLost, NotWritten: with what to do; what was learnt until then is in the last
                checkpoint.
            ValueError: processes that do not have the same pairs, settings or weights.
            Whatever the host raises, after a checkpoint.
        """
        with self.processes.last_words(self.where_kept):
            return self._run()

    def _run(self) -> TrainingResult:
        if self.folder is not None:
            if not self.step and checkpoints(self.folder / CHECKPOINT_FOLDER):
                raise ValueError(
                    f"folder: {self.folder.name} holds checkpoints of another run; resume it or choose another name"
                )
        if self.processes.count > 1:
            self.processes.agree(self._identity())  # after it, all have read what process 0 may move
        if self.folder is not None and self.processes.main:
            make_folder(self.folder)
            if self.step < self.settings.steps:  # else what came later stays: somebody wants the LoRA of this step
                tidy(self.folder / CHECKPOINT_FOLDER, self.step)
                if self.failures is not None:
                    self.failures.forget(self.step)
                self.log.rewrite()
        said = len(self.notes)
        start_trackers(self.processes.accelerator, self.folder, self.info)
        self.log.add(EventLog(self.step, "resumed" if self.step else "started", tuple(self.notes), self.info))
        pictures: list[PreviewRow] = []
        checked = ""
        self.lora.attach().train()
        try:
            if self.step < self.settings.steps:
                checked = self._checked()
                if self.failures is not None and self.step:
                    self._guarded(self._recall)
            if self._validation_is_due():  # who was stopped within a validation makes it up
                pictures = self._guarded(self._validate)
            elif self.step >= self.settings.steps and self.validator and self.settings.validate_every:
                with self._averaged():
                    pictures = self._guarded(self._pictures)
            while self.step < self.settings.steps:
                self._check()
                if self.step and every(self.settings.own_failures_every, self.step):
                    self._guarded(self._look)
                log = self._guarded(self._step)
                self._record(log)
                self.host.on_step(log, self.settings.steps)
                last = self.step == self.settings.steps
                if last or every(self.settings.checkpoint_every, self.step):
                    self._save(self.settings.keep)
                if self._validation_is_due():
                    pictures = self._guarded(self._validate)
        except BaseException as error:
            unsaved = ""
            if not self._updating and self.step > self._saved_step:
                try:
                    # What led to a NaN is saved, but none of the checkpoints before it, where it may not have begun, goes.
                    self._save(None if isinstance(error, NonFinite) else self.settings.keep)
                except OSError as full:  # most often what stopped the run
                    unsaved = "" if isinstance(error, OSError) else f"\n{full}"
            if isinstance(error, (NonFinite, OutOfMemory, ProcessLost, NotWritten)):
                error.args = (f"{error}{unsaved}\n{self.where_kept()}".rstrip(),)
            with suppress(OSError):
                self.log.add(EventLog(self.step, "stopped", (f"{type(error).__name__}: {error}".rstrip(": "),)))
            raise
        finally:
            self.lora.detach()
            self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self._load(self.average.values)
        self.lora.eval()
        idle = sum(not self._learns(step.samples) for step in self.log.steps)
        if idle:
            self.notes.append(
                f"{idle} of {len(self.log.steps)} steps changed nothing: velocity_weight is 0, and the noise levels drawn were "
                "outside every term's t_min to t_max"
            )
        looks = [event.info for event in self.log.events if event.event == OWN_FAILURES]
        if looks:
            failed: Counter[str] = sum((Counter(look["failed"]) for look in looks), Counter())
            self.notes.append(f"own failures: {summary(sum(look['outputs'] for look in looks), failed)}")
        self.log.add(EventLog(self.step, "ended", tuple(self.notes[said:])))
        return TrainingResult(self.step, self.lora, self.log, pictures, self._saved, checked)

    def _checked(self) -> str:
        """The self-check of a run, in its log; SelfCheckFailed if something is wrong."""
        if not self.settings.self_check:
            self.log.add(EventLog(self.step, "unchecked", (UNCHECKED,)))
            return UNCHECKED
        found = self.self_check()
        self.log.add(EventLog(self.step, "checked", (found.line(),), {"parts": [asdict(part) for part in found.parts]}))
        found.raise_if_wrong()
        return found.line()

    def _check(self) -> None:
        self.processes.check()
        self.host.check()

    def _record(self, log: StepLog | ValidationLog) -> None:
        self.log.add(log)
        if self.processes.accelerator is not None:
            self.processes.accelerator.log(scalars(log), step=log.step)

    def where_kept(self) -> str:
        """The last checkpoint on disk: process 0 may not have written the one that it was about to."""
        if self.folder is None:
            return ""
        found = checkpoints(self.folder / CHECKPOINT_FOLDER)
        if not found:
            return f"There is no checkpoint in {self.folder.name} yet."
        return f"What was learnt is kept in {self.folder.name}/{found[-1].parent.name}/{found[-1].name}."

    def _identity(self) -> dict[str, str]:
        """What has to be the same in all processes, as texts that are."""
        values = {name: json.dumps(value, sort_keys=True) for name, value in self.info.items()}
        return {**values, "step": str(self.step), "LoRA weights": hash_tensors(self.lora.named_parameters())}

    def _save(self, keep: Optional[int]) -> None:
        if self.folder is None:
            return
        if not self.processes.main:
            self._saved, self._saved_step = checkpoint_path(self.folder / CHECKPOINT_FOLDER, self.step), self.step
            return
        state = Checkpoint(
            self.step,
            {name: p.detach() for name, p in self.lora.named_parameters()},
            self.optimizer.state_dict(),
            self.average.values if self.average is not None else None,
            self.info,
            self.shares.means if self.shares is not None else {},
        )
        self._saved = state.save(self.folder / CHECKPOINT_FOLDER, keep)
        self._saved_step = self.step

    def _validation_is_due(self) -> bool:
        interval = self.settings.validate_every if self.validator else 0
        due = self.step > 0 and interval > 0 and (self.step == self.settings.steps or every(interval, self.step))
        return due and all(done.step != self.step for done in self.log.validations)

    def _validate(self) -> list[PreviewRow]:
        self._memory.begin()
        self._memory.enter("validation")
        with self._averaged():
            self.host.before_step()
            log = self.validator.losses(self.step)
            pictures = self._pictures()
        if self.folder is not None and self.processes.main:  # before the line that names them
            log = replace(log, pictures=save_pictures(self.folder, pictures))
        self._record(log)
        self.host.on_validation(log, pictures)
        return pictures

    def _pictures(self) -> list[PreviewRow]:
        return self.validator.pictures()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """With the moving average in place of the weights, if there is one."""
        if self.average is None:
            yield
            return
        own = {name: p.detach().clone() for name, p in self.lora.named_parameters()}
        self._load(self.average.values)
        try:
            yield
        finally:
            self._load(own)

    @torch.no_grad()
    def _load(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self.lora.named_parameters():
            p.copy_(values[name])

    # -- one step ---------------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], _T]) -> _T:
        """``work``'s answer; advice if the memory is not enough for it."""
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            crop, model = None, self.denoiser.edit_model
            if self.objective is not None and self.objective.decodes:
                crop = max(((c.height, c.width) for c in self.prepared.crops), key=lambda c: c[0] * c[1])
            text = advice(
                self._memory,
                tokens=2 * max(model.tokens(self.prepared.after([i])) for i in range(len(self.prepared))),
                batch_size=self.settings.batch_size,
                checkpointing=self._checkpointing,
                crop=crop,
                blocks=sum(len(m) for m in self.denoiser.module.modules() if isinstance(m, torch.nn.ModuleList)),
                settings=self._advice,
            )
            raise OutOfMemory(text) from error

    def _own_failures(self, terms: Sequence[LossTerm], encoders: Mapping[str, Encoder]) -> Optional[OwnFailures]:
        """What keeps them, with a note on the cost; None where they are off."""
        settings, pairs = self.settings, self.prepared.pairs
        interval = settings.own_failures_every
        if not interval:
            return None
        if self.decode is None:
            raise ValueError(
                f"own_failures_every: {interval} needs pictures of outputs; give a decoder, or set it to 0"
            )
        most = (settings.steps - 1) // interval * settings.batch_size * settings.accumulation
        size = 3 * max(height * width for height, width in pairs.targets)
        kept = f"; up to {most} pictures, {most * size / 1e6:.3g} MB, in {FAILURES_FOLDER}" if self.folder else ""
        self.notes.append(
            f"own failures at every {interval}. step: {settings.rollout_steps} passes without gradients each time, on average "
            f"{settings.rollout_steps / interval:.2g} a step, with decoding and a verdict{kept}"
        )
        readers = dict.fromkeys(term.encoder for term in terms if ROLE in term.roles)
        found = {name: encoders[name] for name in readers if name in encoders}
        return OwnFailures(
            self.prepared, found, settings.own_failures_kept, max(1, most), self.lora.disabled, self.folder,
            self.processes.main,
        )  # fmt: skip

    def _recall(self) -> None:
        assert self.failures is not None
        self._memory.begin()
        self._memory.enter("own failures")
        self.failures.recall(self.step)

    def _look(self) -> None:
        """Sample the pairs of the coming step, and keep what the judge fails. One pair at a time, so that what comes of it
        does not depend on the processes."""
        assert self.failures is not None
        self._memory.begin()
        self._memory.enter("own failures")
        self.host.before_step()
        step, accumulation = self.step + 1, self.settings.accumulation
        numbers = range(self.step * accumulation, step * accumulation)
        indices = list(dict.fromkeys(i for number in numbers for i in self._batch(number)))
        self.lora.eval()
        try:
            found = self.processes.each(len(indices), lambda k: self._judged(indices[k]), (NonFinite,))
        finally:
            self.lora.train()
        for index, one in zip(indices, found):
            self.failures.hold(index, one, step)
        failed = tally(found)
        notes = [summary(len(found), failed)]
        notes += [
            f"{self.prepared.pairs[i].name} was not judged: {f.problem}" for i, f in zip(indices, found) if f.problem
        ]
        self.log.add(EventLog(step, OWN_FAILURES, tuple(notes), {"outputs": len(found), "failed": failed}))

    @torch.no_grad()
    def _judged(self, index: int) -> Judged:
        """The LoRA's output for a pair, and the verdict on it."""
        device, where = self.denoiser.device, f"own failures at step {self.step + 1}"
        references = self.prepared.references([index])
        generator = generator_for(self.settings.seed, "own failures", self.step, self.prepared.pairs[index].name)
        latents = self.denoiser.edit_model.sample(
            self.denoiser,
            torch.randn(references[0].shape, generator=generator).to(device),
            [reference.to(device) for reference in references],
            [self.conditioning[index]],
            self.settings.rollout_steps,
            progress=lambda done, total: self._check(),
        )
        return judged(self.prepared, index, self.decode(latents)[0], where)

    def _step(self) -> StepLog:
        began = time.perf_counter()
        self._memory.begin()
        self._memory.enter("loading")
        self.host.before_step()
        self.optimizer.zero_grad(set_to_none=True)
        samples: list[Sample] = []
        total, accumulation = 0.0, self.settings.accumulation
        for number in range(self.step * accumulation, (self.step + 1) * accumulation):
            for work in self._passes():
                self._check()
                loss, rows = work(number)
                total += loss / accumulation
                samples += rows
        self._memory.enter("optimiser")
        self.processes.add_up([p.grad for p in self.lora.parameters() if p.grad is not None])
        norm = lora_gradient_norm(self.lora, samples, f"step {self.step + 1}")
        if self.settings.clip:
            torch.nn.utils.clip_grad_norm_(self.lora.parameters(), self.settings.clip)
        rate = self.settings.rate(self.step)
        for group, peak in zip(self.optimizer.param_groups, self._peaks):
            group["lr"] = peak * rate
        self._updating = True
        if self._learns(samples):  # else momentum and weight decay would move the weights without a loss
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.lora.named_parameters(), self.step)
        self.step += 1
        self._updating = False
        group = self.optimizer.param_groups[0]
        learning_rate = group["lr"] * float(group.get("d", 1.0))
        seconds = time.perf_counter() - began
        return StepLog(self.step, total, norm, learning_rate, samples, seconds)

    def _passes(self) -> list[Callable[[int], tuple[float, list[Sample]]]]:
        """What this step makes of a batch."""
        rolls = self.settings.estimate == "rollout" and every(self.settings.objective_every, self.step)
        return [self._pass, self._rollout] if rolls else [self._pass]

    def _learns(self, samples: Sequence[Sample]) -> bool:
        """Whether a step with these samples had any loss of some weight: samples do not list terms outside their gate."""
        return self.settings.velocity_weight > 0 or any(not self._teaching.isdisjoint(s.terms) for s in samples)

    def _pass(self, number: int) -> tuple[float, list[Sample]]:
        """Flow matching's forward and backward pass; ``number`` counts them from the start of the run and decides all
        randomness."""
        settings, device, model = self.settings, self.denoiser.device, self.denoiser.edit_model
        batch = self._batch(number)
        rows = self.processes.rows(len(batch))
        indices = [batch[i] for i in rows]
        generator = generator_for(settings.seed, "training", number)
        x0 = self.prepared.after(indices).to(device)
        references = [reference.to(device) for reference in self.prepared.references(indices)]
        # Drawn for the whole batch: what a sample gets does not depend on the process that works on it.
        levels = settings.timesteps.draw(len(batch), model.mu(model.tokens(x0)), generator)
        noise = torch.randn((len(batch), *x0.shape[1:]), generator=generator)
        t, noise = levels[rows].to(device), noise[rows].to(device)
        x_t, target = add_noise(x0, noise, t), noise - x0

        self._memory.enter("model")
        with self._dropout(number):
            predicted = self.denoiser(x_t, t, references, self._captions(batch, rows, number))
        acts = settings.estimate == "one_step" and every(settings.objective_every, self.step)
        measured = self._measured(self.step)

        def losses(output: Tensor, own: slice, pairs: Sequence[int], levels: Tensor) -> list[Part]:
            velocity = self._flow_matching(output, target[own], *self._regions(indices[own]))
            velocity = self.processes.whole(velocity, len(pairs))
            parts = [Part(VELOCITY, velocity, settings.velocity_weight * velocity)]
            if acts:
                parts += self._objective_parts(estimate(x_t[own], t[own], output), pairs, levels, measured)
            return parts

        return self._learn(predicted, losses, batch, levels, measured, acts)

    def _captions(self, batch: Sequence[int], rows: Sequence[int], number: int) -> list[Any]:
        """What the denoiser is told of these rows of a batch: the pair's caption, or now and then none."""
        if not self.settings.caption_dropout:
            return [self.conditioning[batch[i]] for i in rows]
        chances = torch.rand(len(batch), generator=generator_for(self.settings.seed, "caption dropout", number))
        gone = (chances < self.settings.caption_dropout).tolist()
        return [(self.dropped if gone[i] else self.conditioning)[batch[i]] for i in rows]

    def _flow_matching(
        self, output: Tensor, target: Tensor, masks: Optional[Tensor], valid: Optional[Tensor]
    ) -> Tensor:
        """The velocity loss ``[rows]``, of some of the batch's at a time; experiments put others in its place."""
        return velocity_loss(output, target, masks, self.settings.edit_weight, valid)

    def _rollout(self, number: int) -> tuple[float, list[Sample]]:
        """As :meth:`_pass`, on a state that the model reaches from pure noise: the objective and the regression."""
        settings, device = self.settings, self.denoiser.device
        batch = self._batch(number)
        rows = self.processes.rows(len(batch))
        indices = [batch[i] for i in rows]
        generator = generator_for(settings.seed, "rollout", number)
        gone = rollout.draw_step(settings.rollout_steps, generator)
        x0 = self.prepared.after(indices).to(device)
        references = [reference.to(device) for reference in self.prepared.references(indices)]
        conditioning = [self.conditioning[i] for i in indices]
        noise = torch.randn((len(batch), *x0.shape[1:]), generator=generator)[rows].to(device)
        self._memory.enter("rollout")
        with self._rollout_weights():
            level, x_t = rollout.state(
                self.denoiser, noise, references, conditioning, settings.rollout_steps, gone, self._check
            )
        t, levels = torch.full((len(rows),), level, device=device), torch.full((len(batch),), level)
        self._memory.enter("model")
        with self._dropout(number):
            predicted = self.denoiser(x_t, t, references, conditioning)
        measured = self._measured(self.step // settings.objective_every)

        def losses(output: Tensor, own: slice, pairs: Sequence[int], levels: Tensor) -> list[Part]:
            x0_hat, parts = estimate(x_t[own], t[own], output), []
            if settings.rollout_regression:
                masks, valid = self._regions(indices[own])
                error = velocity_loss(x0_hat, x0[own], masks, settings.edit_weight, valid)
                error = self.processes.whole(error, len(pairs)) * estimate_weights(levels, "inverse_square").to(device)
                scale = settings.ramp(self.step)
                parts = [Part(rollout.REGRESSION, error, settings.rollout_regression * error, scale=scale)]
            return parts + self._objective_parts(x0_hat, pairs, levels, measured)

        return self._learn(predicted, losses, batch, levels, measured, True)

    def _regions(self, indices: Sequence[int]) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """(the edit where it counts more, what counts at all), as :func:`velocity_loss` takes them."""
        masks = self.prepared.latent_masks(indices) if self.settings.edit_weight != 1.0 else None
        valid, device = self.prepared.latent_valid(indices), self.denoiser.device
        return None if masks is None else masks.to(device), None if valid is None else valid.to(device)

    def _objective_parts(self, x0_hat: Tensor, pairs: Sequence[int], levels: Tensor, measured: bool) -> list[Part]:
        """The objective on estimates, where it counts at these noise levels."""
        if self.objective is None:
            return []
        settings = self.settings
        self._memory.enter("objective")
        weights = estimate_weights(levels.to(x0_hat.device), settings.estimate_weighting, settings.estimate_cap)
        report = self.objective(x0_hat, pairs, levels, weights, once=not measured)
        return [] if report is None else parts_of(report, self._scale)

    def _scale(self, term: str) -> float:
        """The factor on a term's weighted loss: of the warm-up, and of its share."""
        ramp = self.settings.ramp(self.step)
        return ramp if self.shares is None else ramp * self.shares.factor(term)

    def _measured(self, turn: int) -> bool:
        """Whether gradients are measured part by part at this turn of a kind of pass."""
        return every(self.settings.gradients_every, turn) or (self.shares is not None and not self.shares.complete)

    @contextmanager
    def _rollout_weights(self) -> Iterator[None]:
        """The LoRA as it is on the way of a rollout, which has no gradients: without dropout."""
        self.lora.eval()
        try:
            if self.settings.rollout_weights == "frozen":
                with self.lora.disabled():
                    yield
            elif self.settings.rollout_weights == "average":
                with self._averaged():
                    yield
            else:
                yield
        finally:
            self.lora.train()

    def _learn(
        self,
        predicted: Tensor,
        losses: Callable[[Tensor, slice, Sequence[int], Tensor], list[Part]],
        batch: Sequence[int],
        levels: Tensor,
        measured: bool,
        acts: bool,
    ) -> tuple[float, list[Sample]]:
        """The backward pass of a call of the model: (mean total of the batch, what to log of it).

        The losses are differentiated to the model's output first, so that decoder and encoders are gone before the
        backward pass of the model begins; and where the objective says so, sample by sample, so that those of one are gone before
        the next one's begin.

        Args:
            predicted: v̂ of this process' samples.
            losses: v̂ of some of them as a leaf, which of them, the pairs that all processes look at with it, and their noise
                levels → the parts, of these pairs.
            batch: indices of the pairs.
            levels: ``[B]`` noise levels, on the CPU.
            measured: whether part by part.
            acts: whether the objective is among the losses.
        """
        turns = [(slice(None), list(range(len(batch))))]
        if acts and self.objective is not None and self.objective.apart(levels):
            turns = self.processes.turns(len(batch))
        names = [self.prepared.pairs[i].name for i in batch]
        gradient, total = torch.zeros_like(predicted), 0.0
        norms: dict[str, list[float]] = {}
        samples: dict[int, Sample] = {}  # by their places in the batch

        def weighted(output: Tensor, own: slice, places: list[int]) -> list[Part]:
            pairs = [batch[k] for k in places]
            return self._weighted(losses(output, own, pairs, levels[places]), pairs)

        for own, places in turns:
            output = predicted.detach()[own].requires_grad_(True)
            again = partial(weighted, output, own, places)
            parts = again()
            if not parts:
                continue
            called, at = [names[k] for k in places], levels[places]
            found, rows = self._output_gradient(parts, output, measured, called, at, again)
            gradient[own] = found * (len(places) / len(batch))
            values = _table(parts).tolist()
            total += sum(sum(column[1]) for column in values) / len(batch)
            for i, place in enumerate(places):
                terms = {}
                for part, columns, norm in zip(parts, values, rows[i]):
                    raw, added, opened, counts = (column[i] for column in columns)
                    if norm is not None:
                        norms.setdefault(part.name, []).append(norm)
                    if counts:  # else outside the gate: of no weight, and so of no word in means over noise levels
                        opened = None if part.open is None else opened
                        terms[part.name] = TermSample(raw, added, opened, None if norm is None else part.scale * norm)
                samples[place] = Sample(names[place], levels[place].item(), terms)
        if not samples:
            return 0.0, []
        self._memory.enter("backward")
        # The gradient is of the batch's mean: that of fewer pairs, of a size that few have, counts for less, or each of them would
        # count for more than a pair of the others.
        predicted.backward(gradient / (self.settings.accumulation * self._full / len(batch)))

        if self.shares is not None:
            for name, values_of_part in norms.items():
                self.shares.measured(name, values_of_part)
        return total, [samples[place] for place in sorted(samples)]

    def _output_gradient(
        self,
        parts: Sequence[Part],
        output: Tensor,
        measured: bool,
        names: Sequence[str],
        levels: Tensor,
        again: Callable[[], list[Part]],
    ) -> tuple[Tensor, list[list[Optional[float]]]]:
        """(d total / d v̂, the norm of each part's for each pair, None if not measured); NonFinite if something is not finite.

        Args:
            parts: of some pairs, with their graphs.
            output: v̂ of those of them that this process works on, a leaf.
            measured: whether part by part.
            names, levels: of the pairs.
            again: makes the parts anew.
        """
        where = f"step {self.step + 1}"
        check_losses(parts, names, levels, where)
        gradient, norms = output_gradient(parts, output, measured)
        found = self.processes.whole(torch.cat([norms, finite_rows(gradient)[:, None]], 1), len(names))
        rows = found.tolist()  # a wait for the device
        finite = [bool(row.pop()) for row in rows]
        if not all(finite):
            blame(again(), output, finite, names, levels, where, self.processes)
        return gradient, rows if measured else [[None] * len(parts) for _ in rows]

    def _weighted(self, parts: list[Part], batch: Sequence[int]) -> list[Part]:
        """Parts with the weights of their pairs."""
        if self._pair_weights is None:
            return parts
        weights = self._pair_weights[list(batch)]
        return [part._replace(weighted=part.weighted * weights.to(part.weighted)) for part in parts]

    def _batch(self, number: int) -> list[int]:
        per_epoch = len(self._epoch(0))
        return self._epoch(number // per_epoch)[number % per_epoch]

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            taught = self._taught
            drawn = self.prepared.pairs.subset(taught).batches(self.settings.batch_size, self.settings.seed, epoch)
            batches = [[taught[i] for i in batch] for batch in drawn]
            self._epochs = {0: self._epochs.get(0, batches), epoch: batches}
        return self._epochs[epoch]

    @contextmanager
    def _dropout(self, number: int) -> Iterator[None]:
        """Dropout draws from torch's global state: seed it for this pass, and put it back."""
        if not self.lora.settings.dropout:
            yield
            return
        device = torch.device(self.denoiser.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            key = (self.settings.seed, "dropout", number, *([self.processes.rank] if self.processes.rank else []))
            torch.manual_seed(generator_for(*key).initial_seed())
            yield


def _table(parts: Sequence[Part]) -> Tensor:
    """raw, weighted, open and counts of each part, ``[parts, 4, B]``; 1 where a part has none."""
    ones = torch.ones_like(parts[0].raw, dtype=torch.float32)
    return torch.stack(
        [
            torch.stack([ones if v is None else v.detach().to(ones) for v in (p.raw, p.added, p.open, p.counts)])
            for p in parts
        ]
    )


def metadata(trainer: Trainer) -> dict[str, str]:
    """Texts for the header of a LoRA file: settings, objective and data; ``steps`` are those that were done."""
    info = {**trainer.info, "settings": {**trainer.info["settings"], "steps": trainer.step}}
    return {f"editloss_{name}": json.dumps(value, sort_keys=True) for name, value in info.items()}
