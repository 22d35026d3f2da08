"""Work that is killed in the middle of its writes, for tests of what goes on afterwards.

A test runs a script of its own in a new process. The script imports this module, loads the model once, and runs each
piece of work in a forked child, which kills itself by SIGKILL: nothing is flushed, closed or cleaned up.
"""
import os
import signal
import sys

import common
from support import runs


def load_model_once(arguments):
    """Loads the toy world's model on one thread; from then on `common.load_model` hands it out to all children."""
    import torch
    torch.set_num_threads(1)
    loaded = common.load_model(common.settings({"__doc__": ""}, arguments))

    def load_model(S):
        return loaded
    common.load_model = load_model


def finishes(work, *arguments, kill_at):
    """Runs work(*arguments) in a child that is killed at its write number `kill_at` -> whether it ended before.

    A child that fails in any other way fails the script too.
    """
    child = os.fork()
    if child == 0:
        kill_at_write(kill_at)
        sys.stdout = open(os.devnull, "w")
        work(*arguments)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), (work.__name__, arguments, status)
    return status == 0


def kill_at_write(number):
    """From now on this process counts its writes, and kills itself at that number.

    Counted are the moment before a line is appended or a file is written, and those before and after a file takes
    the place of another.
    """
    left = number
    as_bytes = runs.as_bytes
    replace = os.replace

    def count():
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_as_bytes(text):
        count()
        return as_bytes(text)

    def counted_replace(source, target):
        count()
        replace(source, target)
        count()
    runs.as_bytes = counted_as_bytes
    os.replace = counted_replace
