"""A focus that follows: one long toy stream whose user asks about something else in every block.

The stream is one folder of a camera's files (SOURCE="camera"), which grows. It begins with PRELUDE clips that nobody
asks about. Then BLOCKS blocks follow, each with its own kind of question: BEFORE clips, the block's first five
questions, AFTER clips, and LATER questions about these. After the five questions the agent learns: 01, 03, 04 and 05
are run again on the grown folder, and 03 watches what follows with the adapter that 05 has just made. The order of the
kinds is drawn for each seed.

All four policies are asked the same later questions, and answer from their own memories of the same clips:
  Phase One        never learns from questions
  base, told       the untrained base, with the latest five questions in its prompt
  first adapter    learns from the first block's questions alone, and keeps that adapter for ever
  agent            learns after the first five questions of every block

Run: python experiments/drift.py [JOBS]     (JOBS seeds at a time, one thread each; default 2)
In:  the scripts, tiny/
Out: results/drift.json, drift.svg; runs/drift/ (the runs). Interrupt it and run it again: it goes on.
"""
import datetime
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from experiments.evidence import cell, commit, interval, script_of          # noqa: E402
from support.runs import (find, read_json, read_jsonl, slug, write_json,    # noqa: E402
                          write_jsonl, write_text)
from tiny import world                                                       # noqa: E402

RESULTS = ROOT / "results"
RUNS = ROOT / "runs" / "drift"

# ---------------------------------------------------------------- what is run
SEEDS = range(10, 15)            # nothing was developed on these
PRELUDE = 60                     # clips before the first question
BLOCKS = 6                       # one for each kind of question
BEFORE = 8                       # clips of a block before its first questions ...
AFTER = 12                       # ... and after them
FIRST = 5                        # questions that the agent learns from (RECENT in 03 to 05)
LATER = 10                       # questions at a block's end, which are counted
MIDNIGHT = datetime.datetime(2026, 1, 1)
LEARN = ["04", "05"]             # what is run after 01 and 03 where the agent learns
MORE = {"04": ["--STEPS=10", "--WARMUP=1"]}      # the reward model is not used by DPO
POLICIES = {"phase1": "Phase One", "told": "base, told the latest questions",
            "first": "the first adapter, kept for ever", "agent": "the agent that goes on"}
# ----------------------------------------------------------------


@dataclass
class Life:
    """One seed's stream, its folder of videos, and the run that watches it."""
    seed: int

    def __post_init__(self):
        clips = PRELUDE + BLOCKS * (BEFORE + AFTER)
        self.truth = world.make_stream(world.stream_seed(self.seed, "deploy", 999), clips)
        self.kinds = random.Random(f"{self.seed} drift").sample(world.CATEGORIES, BLOCKS)
        self.folder = RUNS / f"s{self.seed}-videos"
        self.run = RUNS / f"s{self.seed}"

    # ---------------- the scripts
    def call(self, number, *arguments):
        """Runs a script of the repository on this life. SystemExit where it fails."""
        command = [sys.executable, script_of(number), f"--SEED={self.seed}", "--CPU_THREADS=1", *arguments]
        log = RUNS / f"s{self.seed}.log"
        with open(log, "a") as file:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed, see {log}")

    def train_phase1(self):
        """Phase One of this seed, as ./run.sh trains it, in a run of its own."""
        for number in ("01", "02"):
            self.call(number, f"--RUN={self.phase1}")

    @property
    def phase1(self):
        return RUNS / f"s{self.seed}-phase1"

    def live(self, *numbers):
        """Scripts on the folder as it is now."""
        self.call("01", f"--RUN={self.run}", "--SOURCE=camera", f"--DATA={self.folder}")
        for number in numbers:
            self.call(number, f"--RUN={self.run}", f"--FROM={self.phase1}", *MORE.get(number, ()))

    @property
    def stream(self):
        """The stream's name in streams.jsonl: that of the folder."""
        return self.folder.name

    # ---------------- what comes in
    def record(self, first, last):
        """The camera writes a file of the clips from `first` up to `last`."""
        began = MIDNIGHT + datetime.timedelta(seconds=first * world.CLIP_SECONDS)
        file = self.folder / f"{began:%Y%m%d_%H%M%S}.mp4"
        if not file.exists():
            aside = file.with_suffix(".aside")
            world.write_stream_video(aside, self.truth[first:last])
            aside.rename(file)

    def ask(self, questions):
        """Adds questions to the user's tasks.jsonl, once."""
        file = self.folder / "tasks.jsonl"
        before = read_jsonl(file) if file.exists() else []
        names = {row["task"] for row in before}
        new = [row for row in questions if row["task"] not in names]
        write_jsonl(file, before + new)


EPOCH = datetime.datetime(1970, 1, 1)


def on_the_clock(clip):
    """When a clip begins, on the clock of a camera: s since 1970, local time."""
    return (MIDNIGHT - EPOCH).total_seconds() + clip * world.CLIP_SECONDS


# ---------------------------------------------------------------- blocks and their questions
@dataclass
class Block:
    """Clips first <= t < asked, then questions; asked <= t < last, then questions about these."""
    number: int
    kind: str
    first: int
    asked: int
    last: int


def blocks_of(life):
    found = []
    for number, kind in enumerate(life.kinds):
        first = PRELUDE + number * (BEFORE + AFTER)
        found.append(Block(number, kind, first, first + BEFORE, first + BEFORE + AFTER))
    return found


def questions_about(life, block, first, last, count, name):
    """Rows of a user's tasks.jsonl: `count` questions of the block's kind about the clips first <= t < last, at their
    end. Without an environment, so all of them are of one mixed environment."""
    draw = random.Random(f"{life.seed} {block.number} {name}")
    everything = []
    for t, clip in enumerate(life.truth):
        start = t * world.CLIP_SECONDS
        sentence = world.sentence("now", world.clip_facts(clip))
        everything.append([start, start + world.CLIP_SECONDS, sentence])
    notes = world.Notes(everything)
    begins = first * world.CLIP_SECONDS
    ends = last * world.CLIP_SECONDS
    pool = []
    for kind, fields in world.possible_questions(life.truth[:last], block.kind):
        if begins <= fields["t"] < ends - world.CLIP_SECONDS:
            pool.append((kind, fields, draw.randrange(2)))
    draw.shuffle(pool)
    # The other wording comes last, for few new facts.
    pool += [(kind, fields, 1 - wording) for kind, fields, wording in pool]
    rows = []
    for n, (kind, fields, wording) in enumerate(pool[:count]):
        task = world.make_task(kind, fields, wording, notes, draw)
        rows.append({"task": f"{block.number}-{name}-{n}", "time": on_the_clock(last), **task})
    return rows


def first_questions(life, block):
    return questions_about(life, block, block.first, block.asked, FIRST, "first")


def later_questions(life, block):
    return questions_about(life, block, block.asked, block.last, LATER, "later")


# ---------------------------------------------------------------- the agent's life
def live(life):
    """Runs the scripts again and again on the growing folder -> {block: later tasks with the agent's replies}."""
    life.train_phase1()
    life.folder.mkdir(parents=True, exist_ok=True)
    # What the toy world's judge knows.
    write_jsonl(life.folder / "truth.jsonl", world.truth_rows(life.stream, life.truth))
    life.record(0, PRELUDE)
    life.live("03")
    for block in blocks_of(life):
        marker = RUNS / f"s{life.seed}-block{block.number}"
        if marker.exists():                            # a block that an interrupted life has finished
            continue
        life.record(block.first, block.asked)
        life.ask(first_questions(life, block))
        life.live("03", *LEARN)
        if block.number == 0:
            keep_first_adapter(life)
        life.record(block.asked, block.last)
        life.ask(later_questions(life, block))
        life.live("03")
        marker.touch()
    asked = read_jsonl(life.run / "tasks" / "asked.jsonl")
    return by_block(asked)


def adapter_of(life):
    return life.run / "phase2" / "dpo-steer" / slug("questions") / "adapter"


def first_adapter_of(life):
    return RUNS / f"s{life.seed}-first-adapter"


def keep_first_adapter(life):
    shutil.copytree(adapter_of(life), first_adapter_of(life), dirs_exist_ok=True)


def by_block(asked):
    """{number of the block: its later tasks}"""
    found = {}
    for task in asked:
        number, name, _ = task["task"].split("-")
        if name == "later":
            found.setdefault(int(number), []).append(task)
    return found


# ---------------------------------------------------------------- the others, on the same clips
def watch_as(policy, life, stream, name):
    """Rows of the whole stream as another policy writes them; after what Phase One had written until then."""
    from common import watch
    from support.weights import load_adapter
    notes = read_jsonl(life.run / "tasks" / "memories.jsonl")
    notes = [row for row in notes if row["stream"] == stream["stream"]]
    if name == "phase1":
        return notes
    blocks = blocks_of(life)
    if name == "first":
        load_adapter(policy, "phase2", first_adapter_of(life))
        begun = notes[:blocks[0].asked]
        with policy.using("phase2"):
            return watch(policy, [stream], begun={stream["stream"]: begun})[stream["stream"]]
    # The base is told nothing at first, then the five questions of each block from when they were asked.
    rows = []
    with policy.using("base"):
        for block in [None, *blocks]:
            told = [task["question"] for task in first_questions(life, block)] if block else ()
            upto = blocks[0].asked if block is None else end_of_what_is_told(block)
            part = stream | {"clips": stream["clips"][:upto]}
            rows = watch(policy, [part], told, begun={stream["stream"]: rows})[stream["stream"]]
    return rows


def end_of_what_is_told(block):
    """The clip before which the next block's questions are asked."""
    is_last = block.number == BLOCKS - 1
    return block.last if is_last else block.last + BEFORE


def replies_of_others(life, tasks):
    """{policy: {block: [whether each later question was answered right]}} of all but the agent."""
    import common
    collect = common.stage("03_collect_tasks")
    S = common.settings(vars(collect), [f"--RUN={life.run}", f"--FROM={life.phase1}", f"--SEED={life.seed}",
                                        "--CPU_THREADS=1"])
    policy = common.load_policy(S)
    from support.weights import load_adapter
    load_adapter(policy, "phase1", find(S, "phase1/adapter"))
    from support.runs import load_streams
    [stream] = load_streams(S, "deploy")
    judge = common.load_judge(S, lambda: policy)
    found = {}
    for name in ("phase1", "told", "first"):
        rows = watch_as(policy, life, stream, name)
        found[name] = {}
        for number, asked in tasks.items():
            replies, _ = collect.answer(S, judge, asked, {stream["stream"]: rows})
            found[name][number] = collect.right(judge, asked, replies)
    return found


def one_seed(seed):
    """Writes the record of a seed, unless it is there."""
    record = RUNS / f"s{seed}.json"
    if record.exists():
        return read_json(record)
    life = Life(seed)
    tasks = live(life)
    found = replies_of_others(life, tasks)
    found["agent"] = {number: [task["correct"] for task in asked] for number, asked in tasks.items()}
    accuracy = {}
    for name, of_blocks in found.items():
        accuracy[name] = [100 * sum(right) / len(right) for _, right in sorted(of_blocks.items())]
    row = {"seed": seed, "kinds": life.kinds, "commit": commit(), "accuracy": accuracy}
    write_json(record, row)
    return row


# ---------------------------------------------------------------- figures and the picture
def figures(records):
    """{policy: {"blocks": [figure per block], "all": figure, "after the first block": figure}}, in %."""
    found = {}
    for name in POLICIES:
        of_seeds = [record["accuracy"][name] for record in records]
        found[name] = {
            "blocks": [interval([seed[block] for seed in of_seeds]) for block in range(BLOCKS)],
            "all": interval([sum(seed) / BLOCKS for seed in of_seeds]),
            "after the first block": interval([sum(seed[1:]) / (BLOCKS - 1) for seed in of_seeds])}
    return found


COLOURS = {"phase1": "#8a93a0", "told": "#c28a1b", "first": "#3b6fb5", "agent": "#1f6f4a"}
LEFT = 60
WIDTH = 480                                    # pixels of all blocks
TOP = 50
HEIGHT = 240                                   # pixels of 100 %


def picture(found, seeds):
    """drift.svg: the accuracy of each policy over the blocks, with intervals over seeds."""
    lines = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 350" font-family="sans-serif" font-size="14">'
             '<rect width="100%" height="100%" fill="white"/>'
             '<text x="12" y="24" font-size="15" font-weight="bold">The user asks about something else in each block: '
             'later questions answered right, %</text>']
    for percent in (0, 25, 50, 75, 100):
        lines.append(f'<path d="M{LEFT} {y_of(percent):.0f}h{WIDTH}" stroke="#ddd"/>'
                     f'<text x="{LEFT - 8}" y="{y_of(percent) + 5:.0f}" text-anchor="end">{percent}</text>')
    for block in range(BLOCKS):
        lines.append(f'<text x="{x_of(block):.0f}" y="{TOP + HEIGHT + 20}" text-anchor="middle">block {block + 1}</text>')
    for number, name in enumerate(POLICIES):
        lines += curve(name, found[name]["blocks"], shift=6 * (number - 1.5))
        lines.append(label(name, found[name], TOP + 30 + 52 * number))
    lines.append(f'<text x="12" y="340" font-size="12" fill="#555">Toy world, {seeds} seeds, mean and 95 % interval; the '
                 'order of the kinds is drawn for each seed; python experiments/drift.py</text></svg>')
    return "\n".join(lines) + "\n"


def x_of(block):
    return LEFT + WIDTH * (block + 0.5) / BLOCKS


def y_of(percent):
    return TOP + HEIGHT * (1 - min(100, max(0, percent)) / 100)


def curve(name, blocks, shift):
    """SVG elements of one policy: a line through its means, and an interval at each."""
    colour = COLOURS[name]
    points = []
    lines = []
    for block, figure in enumerate(blocks):
        x = x_of(block) + shift
        points.append(f"{x:.1f} {y_of(figure['mean']):.1f}")
        if figure["low"] is not None:
            lines.append(f'<path d="M{x:.1f} {y_of(figure["low"]):.1f}V{y_of(figure["high"]):.1f}" '
                         f'stroke="{colour}" stroke-width="1.5" opacity="0.6"/>')
    lines.append(f'<path d="M{"L".join(points)}" fill="none" stroke="{colour}" stroke-width="3"/>')
    return lines


def label(name, figure, y):
    later = cell(figure["after the first block"], 0)
    x = LEFT + WIDTH + 14
    return (f'<path d="M{x} {y - 5}h20" stroke="{COLOURS[name]}" stroke-width="3"/>'
            f'<text x="{x + 28}" y="{y}">{POLICIES[name]}</text>'
            f'<text x="{x + 28}" y="{y + 18}" fill="#555" font-size="13">{later} after block 1</text>')


def main():
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    RUNS.mkdir(parents=True, exist_ok=True)
    # Each seed in a process of its own, because torch is loaded there.
    def alone(seed):
        code = f"from experiments.drift import one_seed; one_seed({seed})"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        print(f"seed {seed} is done", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(alone, SEEDS))
    records = [read_json(RUNS / f"s{seed}.json") for seed in SEEDS]
    found = figures(records)
    write_json(RESULTS / "drift.json", {"policies": found, "records": records})
    write_text(RESULTS / "drift.svg", picture(found, len(records)))
    for name, figure in found.items():
        print(f"{POLICIES[name]:36} {json.dumps(figure['after the first block'])}")


if __name__ == "__main__":
    main()
