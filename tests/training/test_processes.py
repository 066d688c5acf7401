"""Several processes on this machine, over gloo, started by torchrun as accelerate's own launcher does it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.utils import DistributedType
from processes_checks import CHECKS
from processes_lost import RUN
from small import equal, trainer, weights

from editloss_core.processes import Processes, check_accelerator, place
from editloss_core.runs.checkpoint import CHECKPOINT_FOLDER, checkpoints
from editloss_core.runs.log import LOG_FILE, RunLog

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def launch(program, *arguments, processes=2, timeout=150):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, str(HERE / program), *map(str, arguments)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """What two processes found: name of a check → what is wrong, of each process."""
    folder = tmp_path_factory.mktemp("processes")
    done = launch("processes_checks.py", folder)
    files = [folder / f"checks_{rank}.json" for rank in (0, 1)]
    assert all(f.is_file() for f in files), done.stdout
    return [json.loads(f.read_text()) for f in files]


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(checked, name):
    for rank, found in enumerate(checked):
        assert found.get(name) == "", f"process {rank}: {found.get(name, 'did not get there')}"


def finish(folder):
    """Go on alone from the last checkpoint, and compare with a run that was never stopped."""
    made = trainer(folder, **RUN)
    made.resume(checkpoints(folder / CHECKPOINT_FOLDER)[-1])
    assert made.step == 3, "what was learnt until then"
    found, expected = weights(made.run().lora), weights(trainer(**RUN).run().lora)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6)


def test_deepspeed_shares_out_the_frozen_weights(tmp_path):
    """Where DeepSpeed is installed; it is in no extra."""
    pytest.importorskip("deepspeed")
    done = launch("processes_deepspeed.py", tmp_path)
    assert not done.returncode, done.stdout


def test_a_process_that_dies_ends_the_run_and_says_where_the_checkpoint_is(tmp_path):
    folder = tmp_path / "my run"
    done = launch("processes_lost.py", folder, "SIGKILL")
    assert done.returncode
    assert "Process 0 of 2 got no answer: another process of this run has ended" in done.stdout
    assert "What was learnt is kept in my run/checkpoints/step_000003.safetensors." in done.stdout
    assert RunLog.read(folder).events[-1].event == "stopped"
    finish(folder)


def test_a_process_that_does_not_answer_ends_with_its_launcher_asking(tmp_path):
    """Waiting in a collective, Python cannot be interrupted: SIGTERM still leaves a message, and the last checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder, running = tmp_path / "run", []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        running.append(
            subprocess.Popen(
                [sys.executable, str(HERE / "processes_lost.py"), str(folder), "SIGSTOP"],
                env={**ENVIRONMENT, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
        )
    try:
        until = time.monotonic() + 120
        while len(RunLog.read(folder).steps) < 3 and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(0.5)  # into the collective
        assert running[0].poll() is None, running[0].communicate()[0]
        running[0].send_signal(signal.SIGTERM)
        said, _ = running[0].communicate(timeout=30)
    finally:
        for process in running:
            process.kill()
            process.wait()
            process.stdout.close()
    assert running[0].returncode == 128 + signal.SIGTERM
    assert (
        "Process 0 of 2 was asked to end. What was learnt is kept in run/checkpoints/step_000002.safetensors." in said
    )
    assert (folder / LOG_FILE).is_file()


# -- one process ------------------------------------------------------------------------------------------------------


def test_one_process_under_an_accelerator_is_the_run_without_one():
    changes = {"steps": 3, "lora": {"dropout": 0.2}}
    own = trainer(accelerator=Accelerator(cpu=True), **changes).run()
    plain = trainer(**changes).run()
    assert equal(weights(own.lora), weights(plain.lora)), "to the last bit"


@pytest.mark.parametrize(("total", "count"), [(1, 3), (3, 3), (5, 2), (5, 4), (8, 3)])
def test_rows_are_everyones_and_equally_many(total, count):
    parts = []
    for rank in range(count):
        one = Processes()
        one.rank, one.count = rank, count
        parts.append(one.rows(total))
    assert len({len(rows) for rows in parts}) == 1
    assert sum(parts, [])[:total] == list(range(total)) and not any(sum(parts, [])[total:])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision: expected 'no'"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: expected 1, got 2"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "FSDP or DEEPSPEED, got MEGATRON_LM"),
        ({"distributed_type": DistributedType.FSDP, "is_fsdp2": False}, "fsdp_version: expected 2, got 1"),
    ],
)
def test_what_does_not_work_is_refused(monkeypatch, changes, told):
    """A real accelerator with one property as this machine cannot make it."""
    accelerator = Accelerator(cpu=True)
    for name, value in changes.items():
        monkeypatch.setattr(Accelerator, name, property(lambda self, value=value: value))
    with pytest.raises(ValueError, match=told):
        check_accelerator(accelerator)


def test_a_network_is_placed_frozen():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="frozen parameters only, got 2 that are trained, e.g. weight"):
        place(torch.nn.Linear(2, 3), accelerator)
    module = torch.nn.Linear(2, 3).requires_grad_(False)
    assert place(module, accelerator)(torch.ones(1, 2)).shape == (1, 3)
