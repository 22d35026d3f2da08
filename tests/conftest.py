"""Fixtures of all tests: a toy run of stage 1, the toy world's model, and contexts of several lengths.

The model is loaded once; `policy` hands it out bare and takes off whatever a test put on it.
"""
import importlib
import pathlib
import signal
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common                                                               # noqa: E402
from support import runs, sources                                           # noqa: E402

# A shell starts what runs in the background deaf to Ctrl-C, and tests send it to their children.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A run folder with the streams of stage 1 in it; never written to by tests."""
    run = tmp_path_factory.mktemp("toy")
    importlib.import_module("01_make_streams").main(
        [f"--RUN={run}", "--TRAIN_STREAMS=4", "--DEPLOY_STREAMS=1", "--TEST_STREAMS=1", "--CLIPS=6"])
    return run


@pytest.fixture(scope="session")
def streams(toy):
    return runs.load_streams(common.settings({"__doc__": ""}, [f"--RUN={toy}"]), "train")


@pytest.fixture(scope="session")
def loaded():
    return common.load_policy(
        common.settings({"__doc__": ""}, ["--MAX_NEW_TOKENS=32", "--CPU_THREADS=1"]))


@pytest.fixture
def policy(loaded):
    """The base model, bare. One thread: beside anything else that runs, two wait for each other and take ten
    times as long."""
    importlib.import_module("torch").set_num_threads(1)
    yield loaded
    for writer in ("phase2", "phase1"):
        loaded.drop(writer)
    loaded.train_only([])
    loaded.model.zero_grad(set_to_none=True)


@pytest.fixture(scope="session")
def contexts(streams):
    """Four contexts of four lengths: a first clip, a short history, a full window, and one with questions."""
    memory = {i: f"now, <face_{i + 1}> wears red, a blue lamp." if i % 3 else "" for i in range(6)}
    return [common.make_context(streams[0], 0, memory), common.make_context(streams[1], 2, memory),
            common.make_context(streams[2], 5, memory),
            common.make_context(streams[3], 3, memory, ["What did <face_3> wear at 00:00:10?"])]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Videos that a test has just made are young: nobody waits to see whether they still change."""
    monkeypatch.setattr(sources, "LOOK_AGAIN", 0)
