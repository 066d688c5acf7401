"""The processes of a run, as accelerate started them: who does which share, and how the shares come together again.

Without an accelerator there is one process, which does everything. All communication is accelerate's, over one process group.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Callable, NoReturn, Optional, Sequence, TypeVar, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

T = TypeVar("T")
GRACE = 10.0  # seconds that a run has to end by itself after SIGTERM; torchrun waits 30 before SIGKILL


class ProcessLost(RuntimeError):
    """Another process of the run has ended, or does not answer any more."""


def launched() -> int:
    """How many processes the launcher of this one started, as torchrun and accelerate tell them; 1 without a launcher."""
    from torch.distributed.elastic.utils import get_env_variable_or_raise

    try:
        count = get_env_variable_or_raise("WORLD_SIZE")
    except ValueError:
        return 1
    return int(count)


def leave(status: int) -> NoReturn:
    """End this program, which has nothing left to do, with an exit status.

    One of several processes does so without taking the interpreter down: a thread of torch's that asks for Python's lock
    meanwhile would be ended in the middle of C++, which now and then is an abort after all work is done.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class Processes:
    """What a run asks of the processes that it consists of.

    Every process has to call the methods that communicate, in the same order.

    Args:
        accelerator: an ``accelerate.Accelerator``; None for a run in one process.

    Attributes:
        rank: of this process, from 0.
        count: of all.
        main: whether this is the one that writes.
    """

    def __init__(self, accelerator: Optional[Accelerator] = None):
        self.accelerator = accelerator
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.main = self.rank == 0
        self._terminated = False

    # -- shares -----------------------------------------------------------------------------------------------------

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``count``-th of the items, so that all of them are somebody's and nobody's twice."""
        return items[self.rank :: self.count]

    def rows(self, total: int) -> list[int]:
        """The samples of a batch that this process works on: equally many in each process, next to each other.

        Where they do not come out even, the last places are filled with the first sample, which :meth:`whole` drops.
        """
        each = -(-total // self.count)
        return [i if i < total else 0 for i in range(self.rank * each, (self.rank + 1) * each)]

    def turns(self, total: int) -> list[tuple[slice, list[int]]]:
        """A batch one sample of each process at a time: (which of one's own rows, the places of all in the batch).

        The samples of a turn are a batch to every method here. Where there is one less than processes, what is computed for the
        row that fills the last place is dropped, as ever.
        """
        each = -(-total // self.count)
        return [(slice(k, k + 1), list(range(k, total, each))) for k in range(each)]

    def whole(self, own: Tensor, total: int) -> Tensor:
        """``[total, …]``: the whole batch, made of what each process has ``[rows, …]`` of it.

        The values are those of all processes; the graph is that of one's own rows. A sum over the whole batch that every
        process differentiates with respect to its own rows therefore has the gradient that it has in one process, and no
        communication is needed on the way back.
        """
        return self.whole_of_each([own], total)[0]

    def whole_of_each(self, own: Sequence[Tensor], total: int) -> list[Tensor]:
        """:meth:`whole` of several tensors of one shape, in one message. Their graphs stay apart: 0 · NaN in one is no
        NaN in another."""
        if self.count == 1 or not own:
            return list(own)
        start, stop = (min((self.rank + k) * len(own[0]), total) for k in (0, 1))
        with self._collective() as accelerator:
            others = accelerator.gather(torch.stack([x.detach() for x in own], 1)).unbind(1)
        return [torch.cat([y[:start], x[: stop - start].to(y), y[stop:total]]) for x, y in zip(own, others)]

    def each(self, count: int, work: Callable[[int], T], carried: tuple[type[Exception], ...] = ()) -> list[T]:
        """``[work(0), …, work(count − 1)]`` in every process, each of them computed in one.

        All processes call ``work`` equally often, which a model whose weights are shared out needs; what is too many is
        dropped.

        Raises:
            One of ``carried``: in every process, if ``work`` raised it in one; of several, the one that comes first.
        """
        if self.count == 1:
            return [work(i) for i in range(count)]
        rounds = -(-count // self.count)
        found: list[tuple[int, Optional[T], Optional[Exception]]] = []
        for i in range(self.rank, rounds * self.count, self.count):
            try:
                found.append((i, work(min(i, count - 1)), None))
            except carried as error:
                found.append((i, None, error))
        results = sorted(self.gather(found), key=lambda result: result[0])[:count]
        for _, _, failure in results:
            if failure is not None:
                raise failure
        return [cast(T, value) for _, value, _ in results]

    def once(self, work: Callable[[], T], carried: tuple[type[Exception], ...] = ()) -> T:
        """What ``work`` gives in process 0, in every process; exceptions of the ``carried`` kinds are raised in every one."""
        if self.count == 1:
            return work()
        outcome: list[tuple[Optional[T], Optional[Exception]]] = []
        if self.main:
            try:
                outcome = [(work(), None)]
            except carried as error:
                outcome = [(None, error)]
        value, failure = self.gather(outcome)[0]
        if failure is not None:
            raise failure
        return cast(T, value)

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, which can be pickled, in the order of the processes."""
        if self.count == 1:
            return list(items)
        from accelerate.utils import gather_object

        with self._collective():
            return gather_object(list(items))

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, the same to the last bit in each of them; one message for all."""
        if self.count == 1 or not tensors:
            return
        with self._collective() as accelerator:
            sums = accelerator.reduce(torch.cat([t.flatten() for t in tensors]), "sum")
        for t, total in zip(tensors, sums.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            with self._collective() as accelerator:
                accelerator.wait_for_everyone()

    def agree(self, values: dict[str, str]) -> None:
        """ValueError in every process unless all have the same values, naming those that differ."""
        everyone = self.gather([values])
        for rank, theirs in enumerate(everyone):
            other = sorted(k for k in everyone[0].keys() | theirs.keys() if everyone[0].get(k) != theirs.get(k))
            if other:
                raise ValueError(
                    f"processes: expected the same in each of {self.count}, got other {', '.join(other)} in process {rank} "
                    "than in process 0; give all machines the same files and settings"
                )

    @contextmanager
    def _collective(self) -> Iterator[Accelerator]:
        assert self.accelerator is not None  # one process has nothing to say to others
        try:
            yield self.accelerator
        except RuntimeError as error:  # torch has no class of its own for what gloo says
            first = str(error).strip().splitlines()[:1]
            raise ProcessLost(
                f"Process {self.rank} of {self.count} got no answer: another process of this run has ended; the reason is in "
                f"what that one wrote last. ({first[0] if first else error!r})"
            ) from error

    # -- the end ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """SystemExit if the launcher has asked this process to end, inside :meth:`last_words`."""
        if self._terminated:
            raise SystemExit(128 + signal.SIGTERM)

    @contextmanager
    def last_words(self, words: Callable[[], str]) -> Iterator[None]:
        """While the block runs, a SIGTERM lets it end at its next :meth:`check`, and logs ``words()``.

        A launcher that has lost a process ends the others so. They may be waiting for the lost one where Python cannot be
        interrupted; after :data:`GRACE` seconds they are ended all the same. Only for several processes, in the main thread, and
        not on Windows, which ends a process without a signal.
        """
        if self.count == 1 or os.name == "nt" or threading.current_thread() is not threading.main_thread():
            yield
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        ended = threading.Event()

        def note(signum: int, frame: Optional[FrameType]) -> None:
            self._terminated = True

        def watch() -> None:
            while (signals := os.read(reading, 16)) and signal.SIGTERM not in signals:
                pass
            if not signals:
                return
            log.error("Process %d of %d was asked to end. %s", self.rank, self.count, words())
            if not ended.wait(GRACE):
                sys.stderr.flush()
                os._exit(128 + signal.SIGTERM)

        before = signal.signal(signal.SIGTERM, note)
        fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        watcher = threading.Thread(target=watch, name="editloss-last-words", daemon=True)
        watcher.start()
        lost = False
        try:
            yield
        except ProcessLost:
            lost = True  # the launcher's SIGTERM is on its way, and must not come before this error is told
            raise
        finally:
            if not lost:
                ended.set()
                signal.set_wakeup_fd(fd)
                signal.signal(signal.SIGTERM, before)
                os.close(writing)
                watcher.join()
                os.close(reading)


def place(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A frozen network where accelerate's configuration wants it: on this process' device, or its weights shared out.

    A LoRA stands beside the network and is the same in every process, so that a network which fits is not wrapped, and FSDP
    and DeepSpeed's ZeRO-3 share out nothing but frozen weights. (ZeRO-1 and -2 share out what a frozen network does not
    have: under them it is whole on each device.) Make the LoRA first: wrappers inside change the names of layers.

    Args:
        module: without parameters that are trained; FSDP and DeepSpeed take it apart as accelerate's configuration says.
        accelerator: with ``mixed_precision`` "bf16" the network runs under autocast, or with FSDP in that dtype.

    Raises:
        ValueError: parameters that are trained; FSDP of the first kind; Megatron-LM.
    """
    check_accelerator(accelerator)
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    if trained:
        raise ValueError(
            f"module: expected frozen parameters only, got {len(trained)} that are trained, e.g. {trained[0]}"
        )
    if getattr(accelerator, "is_fsdp2", False):
        from accelerate.utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, module)
    if accelerator.distributed_type.value == "DEEPSPEED":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        if config.get("zero_optimization", {}).get("stage") != 3:
            return module.to(accelerator.device)
        config["train_micro_batch_size_per_gpu"] = 1  # has to be a number, and counts for its own backward pass only
        return accelerator.prepare(module).module  # without the engine around, which wants that backward pass
    # Not for evaluation alone it would be wrapped on CPUs, where DDP refuses frozen parameters.
    return accelerator.prepare_model(module, evaluation_mode=True)


def check_batch(batch_size: int, processes: int) -> None:
    """ValueError unless each process has a pair of every batch."""
    if batch_size < processes:
        raise ValueError(
            f"batch_size: expected at least one pair for each of {processes} processes, got {batch_size} for all of them"
        )


def check_accelerator(accelerator: Accelerator) -> None:
    """ValueError for configurations of accelerate that a LoRA cannot be trained with here, with what to use instead."""
    kind = accelerator.distributed_type.value
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError("fsdp_version: expected 2, got 1, whose wrappers hide the layers from the LoRA")
    if kind == "MEGATRON_LM":
        raise ValueError(f"distributed_type: expected NO, MULTI_GPU, MULTI_CPU, FSDP or DEEPSPEED, got {kind}")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision: expected 'no' (the model's own dtype) or 'bf16', got {accelerator.mixed_precision!r}, which would "
            "need its losses scaled"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps: expected 1, got {accelerator.gradient_accumulation_steps}; set accumulation in the "
            "training settings instead"
        )
