"""support/checkpoint.py on a model of two numbers: what is resumed, what is refused, which signals are heard.

The whole loop, a real process and SIGKILL are in test_loop.py.
"""
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
from support.checkpoint import Training                                     # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Break(Exception):
    pass


def params(*shapes):
    return [torch.nn.Parameter(torch.ones(shape)) for shape in shapes or [(2,), (3, 2)]]


def train(out, steps=6, at=None, do=None, weights=None, batch=None, **options):
    """Some steps; `do` is called in step `at` -> (parameters, the Training)."""
    out.mkdir(exist_ok=True)
    weights = weights or params()
    batch = batch or SimpleNamespace(state=0)
    run = Training(out, weights, steps=steps, lr=0.1, save_every=2, grad_clip=1.0, batch=batch, **options)
    for step in run:
        noise = torch.Generator().manual_seed(step)
        loss = sum((p * torch.randn(p.shape, generator=noise)).sum() ** 2 for p in weights) + batch.state
        loss.backward()
        if step == at:
            do()
        norm = run.optimizer_step(0.1 / (step + 1))
        batch.state += step
        run.log({"step": step, "loss": loss.item(), "norm": norm}, "loss")
    return weights, run


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_an_interrupted_run_ends_bit_by_bit_as_a_whole_one(tmp_path):
    whole, run = train(tmp_path / "whole")
    assert [row["step"] for row in run.rows] == list("012345") and not same(whole, params())

    def fail():
        raise Break
    for at in range(6):
        out = tmp_path / f"cut{at}"
        with pytest.raises(Break):
            train(out, at=at, do=fail)
        before = [line.split(",")[0] for line in (out / "log.csv").read_text().splitlines()[1:]] if at else []
        assert before == [str(i) for i in range(at)]               # ahead of the checkpoint
        resumed, again = train(out)
        assert again.first == at // 2 * 2 and same(resumed, whole)
        assert (out / "log.csv").read_bytes() == (tmp_path / "whole" / "log.csv").read_bytes()
        states = [r.optimizer.state_dict()["state"] for r in (run, again)]
        assert all(torch.equal(states[0][i][name], states[1][i][name]) for i in (0, 1) for name in states[0][i])
        assert run.batch.state == again.batch.state


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step(number, tmp_path):
    whole, _ = train(tmp_path / "whole")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="stopped after step 2; run the same command to go on"):
        train(tmp_path / "cut", at=2, do=lambda: os.kill(os.getpid(), number))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed, run = train(tmp_path / "cut")
    assert run.first == 3 and same(resumed, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(number, tmp_path):
    """The first is noted while the step waits for something, such as a judge that never answers."""
    script = f"""
import os, pathlib, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import torch
from support.checkpoint import Training
p = torch.nn.Parameter(torch.ones(2))
for step in Training(pathlib.Path({str(tmp_path)!r}), [p], steps=9, lr=0.1, save_every=9, grad_clip=1.0):
    print("waiting", flush=True)
    threading.Event().wait()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    assert process.stdout.readline() + process.stdout.readline() == \
        "\nstopping after this step, which is saved; once more stops without it\n"
    began = time.time()
    process.send_signal(number)
    assert process.wait(timeout=20) == -number and time.time() - began < 5


def test_a_finished_run_does_nothing(tmp_path, capsys):
    whole, _ = train(tmp_path)
    capsys.readouterr()
    again, run = train(tmp_path)
    assert same(again, whole) and run.first == 6 and run.bar is None
    assert capsys.readouterr() == ("", "")                         # no bar either


@pytest.mark.parametrize("shapes", [[(2,)], [(2,), (3, 2), (1,)], [(2,), (2, 3)], [(2,), (1, 2)]])
def test_a_checkpoint_of_other_parameters_is_refused(shapes, tmp_path):
    """The last case could be broadcast."""
    train(tmp_path)
    with pytest.raises(SystemExit, match=r"checkpoint.pt holds 2 tensors with 8 parameters, but .*Take a new --RUN"):
        train(tmp_path, weights=params(*shapes))


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(tmp_path):
    weights = params()

    def spoil():
        weights[0].grad.fill_(float("nan"))
    with pytest.raises(SystemExit, match="step 0: the gradient norm is nan.*lower learning rate .now 0.1"):
        train(tmp_path, at=0, do=spoil, weights=weights)
    assert same(weights, params()) and not (tmp_path / "checkpoint.pt").exists()


def test_all_ranks_stop_and_one_says_so(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from support.checkpoint import Training
from support.ranks import RANK, join
join()
p = torch.nn.Parameter(torch.ones(2))
run = Training(pathlib.Path({str(tmp_path)!r}), [p], steps=9, lr=0.1, save_every=9, grad_clip=1.0)
for step in run:
    (p.sum() * (RANK + 1)).backward()
    if RANK == 1 and step == 1:
        os.kill(os.getpid(), signal.SIGTERM)             # the other rank hears of it
    run.log(dict(step=step, norm=run.optimizer_step()), "norm")
""")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120)
    assert done.returncode and done.stderr.count("stopped after step 1; run the same command") == 1, done.stderr
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 2
    assert (tmp_path / "log.csv").read_text().splitlines()[1] == "0,4.24264"           # (1 + 2) * sqrt 2
