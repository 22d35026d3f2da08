"""Hours before they are spent: what a stage will take on a card, part by part, and what brings it down.

A part is a count times a rate. With P tokens of prompt and n answers of A tokens, a packed row has T = P + n A tokens,
and T_pairs = P P / 2 + n A P + n A A / 2 pairs of a token and one that it sees. Seconds:

    a pass over a row       pass + token x T + pair x T_pairs + logp x n A          (read)
    with its gradient       learned token x T + learned pair x T_pairs              (learn)
    a token of S answers    the larger of launches and step + seen x S x (P + n A / 2), as all of a prompt's
                            answers lie in one row and are half written on average (sample)
    a judge's verdicts      packed rows, with the reasoning that was sampled before (judge)
    a clip                  vision x tokens, and the card waits where the CPU, which reads ahead, needs longer for its
                            frames than the card for all of the part beside it      (see)

Two things are taken for granted. Everything uses its budget: an answer has THINK_TOKENS and MEMORY_TOKENS, a prompt is
full. And the longest of the answers that are written side by side, which ends last, is LONGEST times as long. So it
is a plan: the first measured step of a run corrects it (`first_measured`). Loading is not counted.
"""
import math
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

from support.local_judge import ROW
from support.plan import check_plan, clip_tokens, is_30b, plan, prompt_tokens, sketch
from support.ranks import WORLD, torch
from support.runs import find, read_jsonl

DAY = 24                 # hours
LONGEST = 1.5            # a guess, see above
QUESTION = 40            # tokens of a question with its options
INSTRUCTION = 120        # tokens of a judge's question without what is judged
REPLY = 6                # tokens of a judge's replies up to where they part
DECIDED = 0.5            # share of comparisons that are no tie in the first order: a guess (Phase One's
                         # memories against its own are no tie in 27 %, says the paper)
STAMP = 15               # tokens of a memory's times, as the reader sees them
PAIRED = 0.29            # share of contexts that give a pair (paper: 29.17 %)


# ---------------------------------------------------------------- cards and rates
@dataclass
class Card:
    """What a card's data sheet says."""
    gib: int             # of memory
    matmul: float        # TFLOP/s in bf16
    bandwidth: float     # TB/s


CARDS = {"H100": Card(80, 989, 3.35),
         "H200": Card(141, 989, 4.80),
         "A100-80": Card(80, 312, 2.04),
         "L40S": Card(48, 362, 0.86),
         "4090": Card(24, 165, 1.01)}


@dataclass
class Rate:
    """Seconds on an H100, and what another card changes: "matmul", "bandwidth" or, for the CPU beside it, nothing."""
    seconds: float
    bound: str


# Of Qwen3-VL-30B-A3B in NF4, fitted to results/full_size.json: what was measured there is met within 15 %
# (tests/test_hours.py).
RATES = {"pass": Rate(0.10, "cpu"),              # prefill, judge rows and rows without gradient ...
         "token": Rate(18.5e-6, "matmul"),
         "pair": Rate(2.65e-9, "matmul"),        # ... its attention alone: 4.35 and 10.2 ms a layer
         "logp": Rate(13e-6, "bandwidth"),
         "learned token": Rate(120e-6, "matmul"),
         "learned pair": Rate(12.5e-9, "matmul"),          # training rows, merged
         "launches": Rate(0.11, "cpu"),          # decoding 1 x 8, 8 x 8: the card waits for them
         "step": Rate(0.07, "bandwidth"),        # as a CUDA graph, 1 x 8
         "seen": Rate(30e-9, "bandwidth"),       # 16 x 8, and the kernel at 21,000 cached tokens
         "vision": Rate(25e-6, "matmul"),        # five clips
         # Not measured on the card's host: 20 frames of 640 x 272 take 0.3 s on one core.
         "frame": Rate(0.015, "cpu")}


class Speed:
    """The rates on a card, in seconds."""

    def __init__(self, card):
        slower = {"matmul": CARDS["H100"].matmul / card.matmul,
                  "bandwidth": CARDS["H100"].bandwidth / card.bandwidth,
                  "cpu": 1}
        self.of = {name: rate.seconds * slower[rate.bound] for name, rate in RATES.items()}

    def read(self, prompt, answers=0, tokens=0):
        row, pairs = size_of_row(prompt, answers, tokens)
        attention = self.of["pair"] * pairs
        logp = self.of["logp"] * answers * tokens
        return self.of["pass"] + self.of["token"] * row + attention + logp

    def verdicts(self, questions, calls, shared, column, together):
        """So many questions in so many calls, `together` of which share a prompt; each adds a column."""
        # A longer row is split, and each part has the prompt anew.
        together = max(1, min(together, (ROW - shared) // column))
        row, pairs = size_of_row(shared, together, column)
        groups = questions / together
        rows = max(calls, groups * row / ROW)
        return rows * self.of["pass"] + groups * (self.of["token"] * row + self.of["pair"] * pairs)

    def learn(self, prompt, answers, tokens):
        row, pairs = size_of_row(prompt, answers, tokens)
        return self.of["learned token"] * row + self.of["learned pair"] * pairs

    def step(self, prompt, answers, tokens, contexts):
        """One more token of each answer to so many contexts."""
        seen = prompt + answers * tokens / 2
        busy = self.of["step"] + self.of["seen"] * contexts * answers * seen
        return max(self.of["launches"], busy)


def size_of_row(prompt, answers, tokens):
    """(tokens, pairs) of a packed row.

    >>> size_of_row(10, 2, 4)                    # 50 of the prompt, 2 x 4 x 10 and 2 x 8 of the answers
    (18, 146.0)
    """
    own = prompt ** 2 / 2 + answers * tokens ** 2 / 2
    return prompt + answers * tokens, own + answers * tokens * prompt


# ---------------------------------------------------------------- what there is to do
@dataclass
class Sizes:
    """What a stage works on."""
    source: str                  # of these numbers
    streams: int
    clips: int                   # of all streams
    contexts: int = 0            # that 03 caches
    environments: int = 0
    questions: int = 0
    clips_asked: int = 0         # of the streams that an environment asks about, on average
    adapters: int = 0            # that write beside Phase One
    notes: int = 0               # memories of a stream from before, on average
    comparisons: float = 28      # of two memories, for each context and environment: all pairs of 8


# Training, deployment, and Video-MME's short and medium videos (on average 30 clips of 10 s; a kind of question asks
# about 125 of the 600).
PAPER = {"train": Sizes("the paper's sizes", streams=326, clips=8150),
         "deploy": Sizes("the paper's sizes", 100, 2500, 2500, 12, 120),
         "test": Sizes("the paper's sizes", 600, 18000, 2500, 12, 1800, 3750)}


def sizes_of(S, split):
    """The Sizes of this run's streams of a split, or the paper's where 01 has made none."""
    path = find(S, "streams/streams.jsonl")
    splits = {split} if split == "train" else {split, "online"}
    rows = [row for row in read_jsonl(path) if row["split"] in splits] if path else []
    if not rows:
        return replace(PAPER[split], source=f"{PAPER[split].source}, as 01 has made no streams for it")
    clips = {row["stream"]: len(row["clips"]) for row in rows}
    file = path.parent / "tasks.jsonl"
    tasks = [task for task in read_jsonl(file) if task["stream"] in clips] if file.exists() else []
    asked = {(task["environment"], task["stream"]) for task in tasks}
    environments = len({environment for environment, _ in asked})
    total = sum(clips.values())
    clips_asked = sum(clips[stream] for _, stream in asked) // max(1, environments)
    return Sizes(str(path), len(rows), total, total, environments, len(tasks), clips_asked)


# ---------------------------------------------------------------- the estimate
@dataclass
class Part:
    name: str
    work: str                    # what is counted, in words
    seconds: float | None        # None where no rate is known


class Estimate:
    """The parts of a stage. speed: a card's Speed, None where no rates are known; room: of support/plan.py."""

    def __init__(self, S, speed, room):
        self.S = S
        self.speed = speed
        self.room = room
        self.parts = []
        self.before = 0              # parts before the steps
        self.tokens = 0              # that are written, by policy and judge
        self.calls = 0               # of the judge
        self.answer = S.THINK_TOKENS + S.MEMORY_TOKENS

    # ---- a line each
    def sample(self, name, contexts, samples, at_once, prompt=None, tokens=None, clips=None,
               limit=None):
        """Answers to contexts, of which `at_once` are handed over at a time. Without prompt and clips: full ones."""
        limit = self.S.MAX_NEW_TOKENS if limit is None else limit
        prompt = prompt_tokens(self.S) if prompt is None else prompt
        tokens = self.answer if tokens is None else tokens
        clips = self.S.K if clips is None else clips
        at_once = max(1, min(at_once, contexts))
        self.tokens += contexts * samples * tokens
        each = f" x {samples} answers" if samples > 1 else " answers"
        work = f"{contexts:,}{each} of {tokens:,} tokens (at most {limit:,})"
        if not self.speed:
            self.add(name, work, None)
            return
        together, width = self.together(prompt, samples, at_once, clips, limit)
        calls = contexts / at_once
        turns = samples / width                  # more than one, where a group is written in parts
        batches = calls * math.ceil(at_once / together) * turns
        step = self.speed.step(prompt, width, tokens, contexts * turns / batches)
        last = min(LONGEST * tokens, max(tokens, limit))
        # When most have ended the card waits for launches.
        of_batch = tokens * step + (last - tokens) * self.speed.of["launches"]
        seconds = contexts * self.speed.read(prompt) + batches * of_batch
        self.add(name, f"{work}, {together} x {width} side by side", seconds)

    def together(self, prompt, samples, at_once, clips, limit=None):
        """(contexts, answers to each) that are written side by side."""
        limit = limit or self.S.MAX_NEW_TOKENS
        contexts, width = self.room.side_by_side(prompt, samples, limit)
        features = self.S.FEATURE_CLIPS // max(1, clips)
        return max(1, min(contexts, at_once, features)), width

    def read(self, name, rows, prompt, answers, tokens):
        self.row(name, rows, prompt, answers, tokens, self.speed and self.speed.read)

    def learn(self, name, rows, prompt, answers, tokens):
        self.row(name, rows, prompt, answers, tokens, self.speed and self.speed.learn)

    def row(self, name, rows, prompt, answers, tokens, rate):
        work = f"{rows:,} rows of {prompt:,} + {answers} x {tokens:,} tokens"
        self.add(name, work, rows * rate(prompt, answers, tokens) if rate else None)

    def judge(self, name, calls, at_once, shared, own, together=1, reasons=True, clips=0):
        """Questions to the judge, `at_once` in a call. It reasons about each, and then its verdicts are read.

        shared: tokens of what `together` questions have in common, beside the clips and the instruction; own: of
        what each adds.
        """
        shared += INSTRUCTION + clips * clip_tokens(self.S)
        self.calls += calls
        judge = self.S.JUDGE
        if judge.startswith("openai") or not self.speed:
            whose = f"at {judge}" if judge.startswith("openai") else "judge calls"
            self.add(name, f"{calls:,} {whose}, about {calls * (shared + own):,} tokens to read", None)
            return
        reasoning = self.S.JUDGE_TOKENS if reasons else 0
        if reasoning:
            self.sample(name, calls, 1, at_once, shared + own, reasoning, clips, reasoning)
            part = self.parts[-1]
            part.work = part.work.replace("answers", "judge calls", 1)
        else:
            self.add(name, f"{calls:,} judge calls without reasoning", 0)
        column = own + reasoning + REPLY
        self.parts[-1].seconds += self.speed.verdicts(
            calls, calls / max(1, at_once), shared, column, together)

    def see(self, part, clips):
        """The clips of a part that has been listed: the vision tower, and what is waited for frames."""
        name = f"{part}: frames"
        work = f"{clips:,} clips of {self.S.FRAMES_PER_CLIP} frames: the vision tower, and waiting for them"
        if not self.speed:
            self.add(name, work, None)
            return
        vision = self.speed.of["vision"] * clips * clip_tokens(self.S)
        reading = self.speed.of["frame"] * clips * self.S.FRAMES_PER_CLIP
        beside = sum(other.seconds for other in self.parts if other.name == part)
        self.add(name, work, max(vision, reading - beside))

    # ---- what more than one stage does
    def watch(self, name, clips, streams):
        """A memory of each clip, of as many streams side by side as are written at a time."""
        at_once = streams
        if self.speed:
            at_once, _ = self.together(prompt_tokens(self.S), 1, streams, self.S.K)
        self.sample(name, clips, 1, at_once)
        self.see(name, clips)

    def add(self, name, work, seconds):
        self.parts.append(Part(name, work, seconds))

    def steps_begin(self):
        """What is added from here on is done step by step."""
        self.before = len(self.parts)

    # ---- sums: None where no rates are known; several ranks share the hours
    def hours(self, first=0):
        if not self.speed:
            return None
        return sum(part.seconds or 0 for part in self.parts[first:]) / 3600 / WORLD

    def hours_of(self, *names, shares=1):
        """Of the parts whose names begin so; of one of so many equal shares of them."""
        if not self.speed:
            return None
        seconds = [part.seconds or 0 for part in self.parts if part.name.startswith(names)]
        return sum(seconds) / 3600 / WORLD / shares

    def hours_of_steps(self, runs=1):
        """Of all steps of one of so many equal runs."""
        return self.hours(self.before) / runs if self.speed else None


def estimate(S, work, sizes, card=None):
    """The Estimate of work(Estimate, S, sizes). card: a name of CARDS; None: without hours."""
    speed = room = None
    if card:
        speed = Speed(CARDS[card])
        room = plan(sketch(), S, CARDS[card].gib * 2**30).room
        room.is_here = False
    result = Estimate(S, speed, room)
    work(result, S, sizes)
    return result


# ---------------------------------------------------------------- said
def say_plan(S, work, sizes, levers=()):
    """Prints what a stage will do, in hours where rates are known -> the Estimate.

    work(estimate, S, sizes) lists the parts. levers: names of constants of S and of fields of Sizes, of which each
    alone may bring the stage below a day.
    """
    card = this_card(S)
    if card and S.PLAN:
        check_plan(sketch(), S, CARDS[card].gib * 2**30)
    result = estimate(S, work, sizes, card)
    total = f"{result.tokens:,} tokens are written, and {result.calls:,} judge calls made"
    if not card and not S.PLAN:
        print(f"plan: {sizes.streams:,} streams of {sizes.clips:,} clips ({sizes.source}); {total}")
        return result
    where = f" on one {card}" if card else ""
    print(f"plan of {S.SCRIPT}, {S.MODEL}{where}: {sizes.streams:,} streams of {sizes.clips:,} clips "
          f"({sizes.source})")
    for part in result.parts:
        hours = "       " if part.seconds is None else f"{part.seconds / 3600 / WORLD:7.1f} h"
        print(f"  {hours}  {part.name:20} {part.work}")
    total = f"in all: {total}"
    if not card:
        print(f"             {total}; no hours, as rates are known for Qwen3-VL-30B-A3B on "
              f"{', '.join(CARDS)}")
        return result
    ranks = f" on each of {WORLD} cards" if WORLD > 1 else ""
    print(f"  {result.hours():7.1f} h{ranks}  {total}. Planned, from what was measured on an H100 "
          "(results/full_size.md)")
    if result.hours() > DAY:
        say_how_to_save(S, work, sizes, levers, result)
    return result


def this_card(S):
    """The name in CARDS of this machine's card, with PLAN=1 that of CARD; None where no hours can be told."""
    if not is_30b(S.MODEL):
        return None
    if S.PLAN:
        if S.CARD not in CARDS:
            raise SystemExit(f"CARD={S.CARD} is unknown: take one of {', '.join(CARDS)}")
        return S.CARD
    if torch is None or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    for card in CARDS:
        if all(part in name for part in card.split("-")):
            return card
    return None


# How to change a number that is no constant of the stage itself.
HOW = {"contexts": "--CACHE_CONTEXTS={} in 03",
       "environments": "{} kinds of questions (--TYPES in 01)"}


def say_how_to_save(S, work, sizes, levers, planned):
    """Prints, for each lever, the largest value with which the stage ends within a day."""
    found = 0
    for name in levers:
        now = getattr(sizes, name) if name in HOW else getattr(S, name)
        if name == "STREAMS" and not now:        # of 06, where 0 stands for all
            now = sizes.streams
        value = largest(S, work, sizes, name, now, planned)
        if value:
            found += 1
            if found == 1:
                print(f"  more than a day; each of these alone brings it below {DAY} hours:")
            how = HOW.get(name, f"--{name}={{}}").format(value)
            print(f"    {how} instead of {now:,}")
    if not found:
        print(f"  more than a day, and none of {', '.join(levers)} alone brings it below {DAY} hours: "
              "lower several, or share it among cards by torchrun")


def largest(S, work, sizes, name, now, planned):
    """The largest value of a lever with which the stage ends within a day, by bisection; 0 where there is none."""
    fits = 0
    exceeds = now
    while exceeds - fits > 1:
        value = (fits + exceeds) // 2
        changed = SimpleNamespace(**vars(S))
        changed_sizes = replace(sizes, **{name: value}) if name in HOW else sizes
        if name not in HOW:
            setattr(changed, name, value)
        again = Estimate(changed, planned.speed, planned.room)
        work(again, changed, changed_sizes)
        if again.hours() < DAY:
            fits = value
        else:
            exceeds = value
    return fits


def first_measured(steps, count, planned, what, skip=0, write=print):
    """Yields the steps, and corrects the plan by the first one that takes more than a second.

    count: of all steps; planned: their hours, None where there is no plan; what: "a step"; skip: so many steps at
    the beginning are shorter than the others.
    """
    is_said = planned is None
    for number, step in enumerate(steps):
        began = time.time()
        yield step
        seconds = time.time() - began
        if not is_said and number >= skip and seconds > 1:
            is_said = True
            write(measured(what, seconds, count, planned))


def measured(what, seconds, count, planned):
    """
    >>> measured("a step", 672, 100, 12.04)
    'measured: 11.2 min a step, so 18.7 h for 100; planned 12.0 h'
    """
    hours = seconds * count / 3600
    return f"measured: {seconds / 60:.1f} min {what}, so {hours:.1f} h for {count}; planned {planned:.1f} h"
