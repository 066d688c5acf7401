"""Blocks that are shared among threads: equal results, the caller's threads as they were, and nothing left hanging."""

import os
import threading

import pytest
import torch

from editloss_core import losses

SHAPE = (3, 700, 512)  # above SHARED_ELEMENTS: several blocks for each of two threads


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def embeddings(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(3)]


def results(threads, dist, dtype, mode=None):
    torch.set_num_threads(threads)
    leaves = [x.requires_grad_() for x in embeddings(dtype)]
    distances = losses.token_distances(leaves[0], leaves[1:], dist)
    sum((i + 1) * d.mean() for i, d in enumerate(distances)).backward()
    assert torch.get_num_threads() == threads
    return [*distances, *(x.grad for x in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dist", ["cos", "l2", "l1", "euclidean"])
def test_the_number_of_threads_changes_no_bit(dist, dtype):
    alone = results(1, dist, dtype)
    for threads in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(alone, results(threads, dist, dtype)))


def test_blocks_are_shared_from_a_size_on_and_suffice_for_every_thread():
    for threads, expected in ((1, 1), (2, 2), (4, 4), (64, losses.MOST_THREADS)):
        torch.set_num_threads(threads)
        plan = losses._Blocks([torch.empty(8, 1024, 768)], torch.float32)
        assert plan.threads == expected and len(plan.blocks) >= 2 * expected
        assert losses._Blocks([torch.empty(8, 1024)[:, None]], torch.float32).threads == 1


def test_each_thread_of_the_crew_works_without_threads_of_its_own():
    torch.set_num_threads(2)
    plan, seen = losses._Blocks([torch.empty(SHAPE)], torch.float32), []
    both = threading.Barrier(2)  # passed only if two of them work at a time

    def work(block, bench):
        if len(seen) < 2:
            seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
            both.wait(60)

    plan.each(work)
    assert len({thread for thread, _, _ in seen}) == 2 and threading.get_ident() not in [t for t, _, _ in seen]
    assert [rest for _, *rest in seen] == [[1, False]] * 2


def test_what_fails_in_a_thread_is_raised_and_the_rest_is_left():
    torch.set_num_threads(2)
    plan, done = losses._Blocks([torch.empty(SHAPE)], torch.float32), []

    def work(block, bench):
        done.append(block)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        plan.each(work)
    assert len(done) <= 2 < len(plan.blocks)


def test_under_inference_mode_and_for_tensors_that_were_made_in_it():
    torch.set_num_threads(2)
    plain = losses.token_distances(*(lambda a, b, c: (a, [b, c]))(*embeddings()))
    with torch.inference_mode():
        a, b, c = embeddings()
        found = losses.token_distances(a, [b, c])
        assert found[0].is_inference()
    assert all(torch.equal(x, y) for x, y in zip(plain, found))


def test_two_callers_at_a_time():
    torch.set_num_threads(2)
    expected, found = results(2, "cos", torch.float32), {}

    def call(name):
        found[name] = results(2, "cos", torch.float32)

    callers = [threading.Thread(target=call, args=(name,)) for name in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(120)
    assert len(found) == 3
    assert all(torch.equal(a, b) for results in found.values() for a, b in zip(expected, results))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_gets_threads_of_its_own():
    results(2, "l2", torch.float32)
    child = os.fork()
    if not child:
        # torch's own threads do not survive a fork: nothing but the crew may be used here
        try:
            a, b, _ = embeddings_of_ones()
            crew = losses._crew()
            done = [crew.submit(lambda: (a - b).sum().item()) for _ in range(4)]
            os._exit(0 if [job.result(60) for job in done] == [0.0] * 4 else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def embeddings_of_ones():
    return [torch.ones(8, 8) for _ in range(3)]
