"""Reading ahead and writing behind: in order, no further than said, errors where they belong, and nothing left running."""

import threading
import time

import pytest

from editloss_core.ahead import ahead, behind


def threads():
    return [t for t in threading.enumerate() if t.name.startswith(("editloss-ahead", "editloss-behind"))]


def test_in_order_whatever_takes_longer():
    with ahead(lambda k: time.sleep(0.02 * (k % 3 == 0)) or k * k, range(12), workers=3) as read:
        assert list(read) == [k * k for k in range(12)]
    assert not threads()


def test_reads_while_the_caller_works_and_no_further_than_said():
    started = []
    with ahead(lambda k: started.append(k) or k, range(100), workers=3) as read:
        for k in range(5):
            assert next(read) == k
            deadline = time.monotonic() + 30
            while len(started) < k + 4 and time.monotonic() < deadline:
                time.sleep(0.001)
            assert started == list(range(k + 4)) or sorted(started) == list(range(k + 4))


def test_an_error_comes_in_its_turn_and_ends_the_reading():
    asked = []

    def read(k):
        asked.append(k)
        if k == 3:
            raise ValueError("the file of 3")
        return k

    got = []
    with pytest.raises(ValueError, match="the file of 3"), ahead(read, range(50), workers=4) as made:
        for value in made:
            got.append(value)
    assert got == [0, 1, 2] and max(asked) < 10
    assert not threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_caller_who_stops_leaves_nothing_running(error):
    running, asked, go = [], [], threading.Event()

    def read(k):
        asked.append(k)
        if k:
            go.wait(30)
            running.append(k)
        return k

    with pytest.raises(error), ahead(read, range(50), workers=2) as made:
        next(made)
        threading.Timer(0.05, go.set).start()
        raise error
    assert not threads()
    assert sorted(running) == sorted(k for k in asked if k) and len(asked) <= 4
    with pytest.raises(RuntimeError):
        next(made)


def test_nothing_to_read():
    with ahead(str, []) as read:
        assert list(read) == []


def test_behind_everything_is_done_in_order_while_the_caller_goes_on():
    done, go = [], threading.Event()

    def write(k):
        go.wait(30)
        done.append(k)

    with behind(write, waiting=3) as give:
        for k in range(3):
            give(k)
        assert done == []
        threading.Timer(0.05, go.set).start()
        give(3)  # one too many: the first is waited for
        assert done
    assert done == [0, 1, 2, 3]
    assert not threads()


def test_behind_an_error_comes_with_the_next_call_or_at_the_end():
    done = []

    def write(k):
        if k == 1:
            raise OSError("the disk is full")
        done.append(k)

    for count in (2, 50):
        with pytest.raises(OSError, match="disk is full"), behind(write) as give:
            for k in range(count):
                give(k)
        assert not threads()
    assert len(done) < 12


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_behind_a_caller_who_stops_loses_nothing(error):
    done = []
    with pytest.raises(error), behind(lambda k: time.sleep(0.02) or done.append(k)) as give:
        for k in range(4):
            give(k)
        raise error
    assert done == [0, 1, 2, 3]
    assert not threads()
