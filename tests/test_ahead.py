"""Frames that are read in a thread while the model works: in order, within bounds, with their errors."""
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from support.ahead import ReadAhead                                         # noqa: E402
from support.runs import ROOT                                               # noqa: E402


def until(is_true):
    end = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_clips_are_read_in_order_in_the_thread_and_not_too_many_ahead():
    read, threads = [], set()

    def reader(clip):
        threads.add(threading.current_thread() is threading.main_thread())
        read.append(clip)
        return clip * 10
    ahead = ReadAhead(reader, most=3)
    ahead.expect({i: i for i in range(6)})
    until(lambda: read == [0, 1, 2])
    time.sleep(0.05)
    assert read == [0, 1, 2] and threads == {False}
    ahead.expect({0: 0, 1: 1})                                  # they are here, and are not read again
    assert ahead.take(0, 0) == 0
    until(lambda: read == [0, 1, 2, 3])                         # one was taken, so the next is read
    assert ahead.take(5, 5) == 50 and True in threads           # too far ahead: read at once, and not again
    assert [ahead.take(i, i) for i in (1, 2, 3, 4)] == [10, 20, 30, 40]
    assert read == [0, 1, 2, 3, 5, 4] and not ahead.wanted and not ahead.coming


@pytest.mark.parametrize("error", [SystemExit("the file is lost"), ValueError("x"), KeyboardInterrupt()])
def test_an_error_is_raised_where_its_clip_is_taken(error):
    def reader(clip):
        if clip == 1:
            raise error
        return clip
    ahead = ReadAhead(reader)
    ahead.expect({i: i for i in range(3)})
    assert ahead.take(0, 0) == 0
    with pytest.raises(type(error)) as raised:
        ahead.take(1, 1)
    assert raised.value is error
    assert ahead.take(2, 2) == 2


def test_reading_and_work_overlap():
    """20 clips, each read in 20 ms and worked on for 20 ms, take little more than 20 x 20 ms."""
    def wait(clip):
        time.sleep(0.02)

    def seconds(ahead):
        began = time.monotonic()
        ahead.expect(dict.fromkeys(range(20)))
        for i in range(20):
            ahead.take(i, None)
            wait(None)
        return time.monotonic() - began
    assert seconds(ReadAhead(wait)) < 0.8 * seconds(ReadAhead(wait, most=0))


PROGRAM = """
import sys, time
from support.ahead import ReadAhead
ahead = ReadAhead(lambda clip: time.sleep(0.3))
for clip in range(60):
    ahead.expect({clip: None})
print("reads", flush=True)
time.sleep(0.1)
if len(sys.argv) > 1:
    time.sleep(60)
raise SystemExit("why it ends")
"""


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_program_that_ends_waits_for_one_clip_at_most(interrupted):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *(["wait"] if interrupted else [])], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "reads\n"
    began = time.monotonic()
    if interrupted:
        os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert time.monotonic() - began < 8                         # 60 clips would take 18 s
    assert ("KeyboardInterrupt" if interrupted else "why it ends") in error and "futures" not in error


def test_a_watch_reads_the_clips_of_the_next_round_while_it_writes(policy, streams, monkeypatch):
    read, written, real, honest = [], [], common.decode, policy._read
    monkeypatch.setattr(policy.frames, "read", lambda clip: read.append(clip["clip"]) or honest(clip))

    def slow(*given):
        written.append(real(*given))
        until(lambda: read == list(range(min(3, len(written) + 1))))        # one clip more than is written about
        return written[-1]
    monkeypatch.setattr(common, "decode", slow)
    policy.features.clear()
    short = [stream | {"clips": stream["clips"][:3]} for stream in streams[:1]]
    common.watch(policy, short)
    assert len(written) == 3 and read == [0, 1, 2]
    assert not policy.frames.coming and not policy.frames.wanted


def test_batches_and_rows_say_what_comes(policy, contexts, monkeypatch):
    """Longest first, as they are worked on."""
    expected = []
    monkeypatch.setattr(policy, "look_ahead", lambda some: expected.append([c.stream for c in some]))
    list(common.batches(policy, contexts, 1, 8))
    by_length = sorted(contexts, key=policy.prompt_length, reverse=True)
    groups = [common.Group(context, []) for context in contexts]
    common.packed_rows(policy, groups)
    assert expected == [[c.stream for c in by_length], [c.stream for c in contexts]]
