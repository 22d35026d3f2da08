"""One adapter for questions of several kinds, or the sum of adapters of one kind each?

For every set of kinds in SETS an adapter is trained by the scripts on recent questions of all of them, as many of each
(a mixed environment), and the vectors of its kinds are added up. Both write memories of the test streams; so does each
single vector. All are asked the same questions: those of the set's kinds.

Run: python experiments/mixed.py     (Phase One of each seed is that of experiments/drift.py)
In:  the scripts, tiny/
Out: results/mixed.json, mixed.md; runs/mixed/ (the runs). Interrupt it and run it again: it goes on.
"""
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from experiments.drift import Life                                           # noqa: E402
from experiments.evidence import (cell, commit, interval, script_of,         # noqa: E402
                                  table_row)
from support.runs import (find, load_streams, read_json, read_jsonl, slug,  # noqa: E402
                          write_json, write_jsonl, write_text)

RESULTS = ROOT / "results"
RUNS = ROOT / "runs" / "mixed"

# ---------------------------------------------------------------- what is run
SEEDS = range(10, 13)
SETS = ("place+wear", "action+object", "count+speech", "place+action+count", "wear+object+speech",
        "place+wear+action+object+count+speech")
QUESTIONS = 6                    # recent questions of a mixed environment, as many of each kind
# ----------------------------------------------------------------


def call(number, seed, run, *arguments):
    """Runs a script of the repository. SystemExit where it fails."""
    command = [sys.executable, script_of(number), f"--RUN={run}", f"--FROM={Life(seed).phase1}", f"--SEED={seed}",
               "--CPU_THREADS=1", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")


# The reward model is not used by DPO, so it gets few steps.
FEW = ("--STEPS=10", "--WARMUP=1")


def single(seed):
    """The run with an adapter for each kind, as ./run.sh makes them."""
    run = RUNS / f"s{seed}-single"
    Life(seed).train_phase1()
    call("03", seed, run)
    call("04", seed, run, *FEW)
    call("05", seed, run)
    return run


def mixed(seed, source):
    """The run whose environments are the SETS."""
    run = RUNS / f"s{seed}-mixed"
    asked = read_json(source / "tasks" / "recent.json")
    recent = {}
    for name in SETS:
        kinds = name.split("+")
        each = QUESTIONS // len(kinds)
        recent[name] = []
        for kind in kinds:
            recent[name] += asked[kind][:each]
    write_json(run / "tasks" / "recent.json", recent)
    cache = read_jsonl(source / "tasks" / "cache.jsonl")
    write_jsonl(run / "tasks" / "cache.jsonl", [row | {"environments": list(SETS)} for row in cache])
    call("04", seed, run, f"--RECENT={QUESTIONS}", *FEW)
    call("05", seed, run, f"--RECENT={QUESTIONS}")
    return run


def vectors_of(source, run):
    """{name: steering vector}: "" for Phase One, a kind, a set, or "sum of" a set."""
    import torch
    from safetensors.torch import load_file

    def vector(folder, name):
        file = folder / "phase2" / "dpo-steer" / slug(name) / "adapter" / "steer.safetensors"
        [value] = load_file(str(file)).values()
        return value
    kinds = SETS[-1].split("+")
    found = {kind: vector(source, kind) for kind in kinds}
    found[""] = torch.zeros_like(found[kinds[0]])
    for name in SETS:
        found[name] = vector(run, name)
        found[f"sum of {name}"] = sum(found[kind] for kind in name.split("+"))
    return found


def accuracy_of(seed, source, vectors):
    """{name: {kind of question: [right, asked]}} on the test streams, each vector with its own memories."""
    import common
    from support.weights import load_adapter
    collect = common.stage("03_collect_tasks")
    S = common.settings(vars(collect), [f"--RUN={source}", f"--FROM={Life(seed).phase1}", f"--SEED={seed}",
                                        "--CPU_THREADS=1"])
    policy = common.load_policy(S)
    load_adapter(policy, "phase1", find(S, "phase1/adapter"))
    kind = SETS[-1].split("+")[0]
    load_adapter(policy, "phase2", source / "phase2" / "dpo-steer" / slug(kind) / "adapter")
    _, steer, _ = policy.steer["phase2"]
    judge = common.load_judge(S, lambda: policy)
    streams = load_streams(S, "test")
    names = {stream["stream"] for stream in streams}
    tasks = [task for task in read_jsonl(find(S, "streams/tasks.jsonl")) if task["stream"] in names]
    found = {}
    for name, vector in vectors.items():
        steer.data.copy_(vector)
        with policy.using("phase2"):
            memories = common.watch(policy, streams, desc=name or "Phase One")
        replies, _ = collect.answer(S, judge, tasks, memories)
        counts = {}
        for task, is_right in zip(tasks, collect.right(judge, tasks, replies)):
            count = counts.setdefault(task["environment"], [0, 0])
            count[0] += int(is_right)
            count[1] += 1
        found[name] = counts
    return found


def one_seed(seed):
    record = RUNS / f"s{seed}.json"
    if not record.exists():
        source = single(seed)
        vectors = vectors_of(source, mixed(seed, source))
        counts = accuracy_of(seed, source, vectors)
        write_json(record, {"seed": seed, "commit": commit(), "counts": counts})
    return read_json(record)


# ---------------------------------------------------------------- the table
def share(counts, kinds):
    """% right of the questions of these kinds."""
    right = sum(counts[kind][0] for kind in kinds)
    asked = sum(counts[kind][1] for kind in kinds)
    return 100 * right / asked


def rows_of(records):
    """A row for each set: {"set", "phase1", "mixed", "sum", "own", "other"}, figures in %.

    own: each kind's questions with the vector of that kind; other: with those of the set's other kinds.
    """
    rows = []
    for name in SETS:
        kinds = name.split("+")
        values = {"phase1": [], "mixed": [], "sum": [], "own": [], "other": []}
        for record in records:
            counts = record["counts"]
            values["phase1"].append(share(counts[""], kinds))
            values["mixed"].append(share(counts[name], kinds))
            values["sum"].append(share(counts[f"sum of {name}"], kinds))
            own = [share(counts[kind], [kind]) for kind in kinds]
            values["own"].append(sum(own) / len(own))
            other = [share(counts[writer], [kind]) for writer in kinds for kind in kinds if writer != kind]
            values["other"].append(sum(other) / len(other))
        rows.append({"set": name} | {column: interval(found) for column, found in values.items()})
    return rows


HEADS = {"phase1": "Phase One", "mixed": "one adapter of mixed questions", "sum": "sum of the single vectors",
         "own": "each kind's own vector", "other": "another kind's vector of the set"}


def table(rows):
    lines = [table_row(["kinds of questions", *HEADS.values()]), "|---" * (1 + len(HEADS)) + "|"]
    for row in rows:
        kinds = row["set"].replace("+", ", ")
        lines.append(table_row([kinds, *[cell(row[column], 0) for column in HEADS]]))
    return "\n".join(lines)


def page(rows, seeds):
    """mixed.md."""
    return "\n".join([
        "# Questions of several kinds", "",
        f"`python experiments/mixed.py`, {seeds} seeds, mean (95 % t interval over seeds). Questions of these kinds about "
        "test streams, answered right, %. A mixed adapter has learned from six questions, as many of each kind; a single "
        "vector from five of its kind.", "", table(rows), ""])


def main():
    RUNS.mkdir(parents=True, exist_ok=True)
    records = [one_seed(seed) for seed in SEEDS]
    rows = rows_of(records)
    write_json(RESULTS / "mixed.json", {"rows": rows, "records": records})
    write_text(RESULTS / "mixed.md", page(rows, len(records)))
    print(page(rows, len(records)))


if __name__ == "__main__":
    main()
