"""Training that survives Ctrl-C, SIGTERM and SIGKILL: the same command goes on to the same weights, bit by bit."""
import csv
import json
import math
import signal

from support.hours import first_measured
from support.ranks import add_gradients, gather, progress, said_once, torch
from support.runs import written_aside


class Training:
    """The steps of a run that are still to do, for 02, 04 and 05:

        run = Training(out, params, steps=80, lr=1e-4, save_every=10, grad_clip=1.0)
        for step in run:
            loss.backward()
            norm = run.optimizer_step()
            run.log({"step": step, "loss": loss.item(), "norm": norm}, "loss")     # "loss": beside the bar

    It resumes from out/checkpoint.pt, which is written every `save_every` steps, after the last one and, on
    Ctrl-C or SIGTERM, after the step in hand. A step's noise must derive from its number alone, so no state
    of a random generator is kept. What else a step depends on is `batch.state` (any JSON), which is kept.
    Raises SystemExit where the checkpoint holds other parameters than `params`.
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
        self.signals = []                        # those received since the steps began
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
        self.signals.append(number)

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
        with written_aside(self.log_file) as aside, open(aside, "w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[-1]))
            writer.writeheader()
            writer.writerows(self.rows)

    # ---- the checkpoint
    def save(self, done):
        """Writes what `resume` reads, after `done` steps. A kill leaves the checkpoint before, whole."""
        saved = {"step": done,
                 "params": [p.detach().cpu() for p in self.params],
                 "optimizer": self.optimizer.state_dict(),
                 "state": json.dumps(self.batch.state if self.batch else None)}
        with written_aside(self.checkpoint) as aside:
            torch.save(saved, aside)

    def resume(self):
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
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
        # log.csv may be ahead of the checkpoint: those steps are done again.
        lines = self.log_file.read_text().splitlines()
        self.rows = list(csv.DictReader(lines))[:self.first]


def describe(shapes):
    """What a list of parameters is, in few words."""
    sizes = [math.prod(shape) for shape in shapes]
    return f"{len(shapes)} tensors with {sum(sizes)} parameters"
