"""Training that survives Ctrl-C, SIGTERM and SIGKILL: the same command goes on to the same weights, bit by bit."""
import csv
import io
import json
import math
import os
import signal
import time

from support.hours import first_measured
from support.ranks import (WORLD, add_gradients, gather, is_first_rank, once, progress, said_once,
                           torch)
from support.runs import read_json, write_json, write_text, written_aside

LESSON = "questions.json"    # what a training in a folder has begun with


def begun_with(out):
    """The lesson, as below, that the training in a folder has begun with; {} where none has."""
    file = out / LESSON
    return once(lambda: read_json(file) if file.exists() else {})


def begin_anew_unless(out, lesson):
    """Forgets the checkpoint and the log in a folder, unless they are of this lesson.

    lesson: a JSON dict of what the training depends on beside the constants of its script.
    """
    if begun_with(out) == lesson:
        return
    if is_first_rank():
        for name in ("checkpoint.pt", "log.csv"):
            (out / name).unlink(missing_ok=True)
    write_json(out / LESSON, lesson)
    gather([])                                   # the others look for a checkpoint after it has gone


# s after a signal in which another one is the same: torchrun passes on what a terminal has sent to all ranks.
PASSED_ON = 2.0 if WORLD > 1 else 0.0


class Training:
    """The steps of a run that are still to do, for 02, 04 and 05:

        run = Training(out, params, steps=80, lr=1e-4, save_every=10, grad_clip=1.0)
        for step in run:
            loss.backward()
            norm = run.optimizer_step()
            run.log({"step": step, "loss": loss.item(), "norm": norm}, "loss")     # "loss": beside the bar

    It resumes from out/checkpoint.pt, which is written every `save_every` steps, after the last one and, on
    Ctrl-C or SIGTERM, after the step in hand. A step's noise must derive from its number alone, so no state
    of a random generator is kept. What else a step depends on is `batch.state` (any JSON), which is kept. log.csv
    is written and never read: the checkpoint holds its rows too.
    Raises SystemExit where the checkpoint is damaged, or holds other parameters than `params`.
    """

    def __init__(self, out, params, *, steps, lr, save_every, grad_clip, batch=None,
                 description=None, planned=None):
        self.params = params
        self.steps = steps
        self.lr = lr
        self.save_every = save_every
        self.grad_clip = grad_clip
        self.batch = batch
        self.planned = planned                   # hours of all steps, None where there is no plan
        self.description = description or out.name
        self.checkpoint = out / "checkpoint.pt"
        self.log_file = out / "log.csv"
        self.optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
        self.first = 0
        self.rows = []                           # of log.csv: {column: text}
        self.bar = None                          # shown while the steps run
        self.signals = []                        # s of those received since the steps began
        if self.checkpoint.exists():
            self.resume()

    # ---- the steps
    def __iter__(self):
        if self.first >= self.steps:
            return
        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, self.note_signal)
        to_do = range(self.first, self.steps)
        self.bar = progress(to_do, self.description, initial=self.first, total=self.steps)
        try:
            steps = first_measured(self.bar, self.steps, self.planned, "a step", write=self.bar.write)
            for step in steps:
                yield step
                # A signal may reach one rank before the others. All of them stop after the same step.
                stop = any(gather([bool(self.signals)]))
                done = step + 1
                if stop or done % self.save_every == 0 or done == self.steps:
                    self.save(done)
                if stop:
                    sentence = f"stopped after step {step}; run the same command to go on"
                    raise SystemExit(said_once(sentence))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def note_signal(self, number, frame):
        """The first signal is noted. The second ends the process at once, whatever that is waiting for."""
        now = time.monotonic()
        if self.signals and now - self.signals[0] >= PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signals.append(now)
        if len(self.signals) == 1:
            # Not by print: the signal may come while something is being printed, and that must not nest.
            if is_first_rank():
                os.write(1, b"\nstopping after this step, which is saved; once more stops without it\n")

    def optimizer_step(self, lr=None):
        """One optimizer step with the clipped sum of all ranks' gradients -> the norm before it was clipped.

        Raises SystemExit, before anything is changed, where that norm is not finite.
        """
        add_gradients(self.params)
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.grad_clip).item()
        if not math.isfinite(norm):
            raise SystemExit(said_once(
                f"step {len(self.rows)}: the gradient norm is {norm}; this update was not made. "
                f"Start again with a lower learning rate (now {self.lr:g}), as another run which "
                "reads the earlier stages from this one: --RUN=NEWNAME --FROM=THISRUN"))
        self.optimizer.param_groups[0]["lr"] = self.lr if lr is None else lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def log(self, row, *shown):
        """Adds a row, {column: number}, to log.csv; the columns `shown` stand beside the bar."""
        self.rows.append({name: f"{value:.6g}" for name, value in row.items()})
        self.bar.set_postfix({name: f"{row[name]:.3f}" for name in shown})
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(self.rows[-1]))
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.log_file, table.getvalue())

    # ---- the checkpoint
    def save(self, done):
        """Writes what `resume` reads, after `done` steps. A kill leaves the checkpoint before, whole."""
        saved = {"step": done,
                 "params": [p.detach().cpu() for p in self.params],
                 "optimizer": self.optimizer.state_dict(),
                 "state": json.dumps(self.batch.state if self.batch else None),
                 "rows": json.dumps(self.rows)}
        # By way of memory, because torch's own writing does not say why a disk refused.
        data = io.BytesIO()
        torch.save(saved, data)
        with written_aside(self.checkpoint) as aside:
            aside.write_bytes(data.getbuffer())

    def resume(self):
        saved = self.read()
        shapes = [tuple(p.shape) for p in self.params]
        saved_shapes = [tuple(values.shape) for values in saved["params"]]
        if shapes != saved_shapes:
            raise SystemExit(said_once(
                f"{self.checkpoint} holds {describe(saved_shapes)}, but this run trains "
                f"{describe(shapes)}: it was made with another model or another version of "
                "the code. Take a new --RUN, or delete that folder"))
        with torch.no_grad():
            for p, values in zip(self.params, saved["params"]):
                p.copy_(values)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.first = saved["step"]
        if self.batch:
            self.batch.state = json.loads(saved["state"])
        self.rows = json.loads(saved["rows"])

    def read(self):
        """What `save` wrote."""
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            missing = {"step", "params", "optimizer", "state", "rows"} - saved.keys()
            if missing:
                raise ValueError(f"without {', '.join(sorted(missing))}")
        except Exception as error:               # a damaged file can raise almost anything
            what = str(error).partition("\n")[0][:200]
            raise SystemExit(said_once(
                f"{self.checkpoint} can't be read ({type(error).__name__}: {what}): it was cut or "
                "damaged. Delete it, and the training begins anew at step 0")) from None
        return saved


def describe(shapes):
    """What a list of parameters is, in few words."""
    sizes = [math.prod(shape) for shape in shapes]
    return f"{len(shapes)} tensors with {sum(sizes)} parameters"
