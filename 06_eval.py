"""Stage 6: watch the test streams with every policy, answer from its memories alone, write the report.

A policy watches each test stream once, clip by clip, with its own memories as history. The reader answers the
questions of *every* environment from them, so the cross-task transfer matrix costs no second watching. Only
"+ task prompt" watches once per environment. All are validated in Phase One's contexts: win / tie / loss.

Differences from the paper: 95 % intervals, by a bootstrap over streams (questions about one stream share its
memories, so the stream is the independent unit); the questions after the update (scope "after") stand apart
from "all", which pools the first recent questions as the paper does; a reply that the judge failed to give is
dropped and counted, never a miss. Tables and page are laid out by results/report.py.

Run:  python 06_eval.py     (finished policies are kept: interrupt it, or train another adapter, and go on)
In:   streams/*.jsonl  phase1/adapter  tasks/recent.json  phase2/*/*/adapter (whichever exist)
Out:  eval/results.json, results.md, report.html (one file, opens offline), memories.jsonl
"""
import hashlib, importlib, json, random
from pathlib import Path
from types import SimpleNamespace

import common
import loading
from judges import load_judge

# ------------------------------------------------------------------------------------------------------------
STREAMS = 0                         # test streams to watch; 0 = all of them
METHODS = ""                        # evaluate only these beside base and phase1, like base+prompt,dpo-steer
EXPECT = "dpo-steer,grpo-steer"     # Phase Two policies of a full comparison; others found in phase2/ join in
RECENT = 5                          # questions in a task prompt, and pooled into scope "all" (paper: 5)
VALIDATE = 160                      # contexts for the quality of a method, dealt out to its adapters
VALIDATE_TEMPERATURE = 1.0          # as in training: at 0.6 even an untrained base looks faithful
BOOTSTRAP = 2000                    # resamples of the streams: an interval ends within about 0.3 points
EXAMPLES = 3                        # clips shown in the report with their frames
CURVES = "reward,quality,malformed,memory,loss,margin,norm"     # columns of the training logs to draw
# ------------------------------------------------------------------------------------------------------------


# -------------------------------------------------------------------------------- statistics
METRICS = {"accuracy": (2, 0), "coverage": (1, 0), "precision": (2, 1)}    # columns of `count`: top / bottom
QUALITY = {"win": (7, 6), "tie": (8, 6), "loss": (9, 6), "faithful": (2, 0), "non_redundant": (3, 0),
           "fully_right": (4, 0), "well_formed": (1, 0), "tokens": (5, 1)}     # columns of `tally`


def resamples(groups, n, seed):
    """How often each stream is drawn in each of `n` bootstrap samples: (n, streams of all groups).

    groups: sizes; each is resampled by itself (test streams; streams of the recent questions). Every figure
    uses the same draws, so the differences between methods are paired by stream.
    """
    import numpy as np
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.multinomial(g, [1 / g] * g, n) for g in groups if g], axis=1)


def ratio(counts, weights, top, bottom, minus=None):
    """{mean, low, high} of the pooled ratio sum(top) / sum(bottom); with `minus` the lead over it in points.

    counts, minus (streams, columns); weights (B, streams). All three are None where the bottom is 0
    (precision where nothing was covered); low and high also where a single stream gives no spread.

    >>> import numpy as np
    >>> ratio(np.array([[4., 2.], [12., 10.]]), resamples([2], 9, 0), 1, 0)["mean"]
    0.75
    """
    import numpy as np

    def share(c):
        sums = np.concatenate([np.ones((1, len(c))), weights]) @ c     # (1 + B, columns): the data first
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums[:, top] / sums[:, bottom]                      # (1 + B,)

    values = share(counts) if minus is None else 100 * (share(counts) - share(minus))
    if not np.isfinite(values[0]):
        return {"mean": None, "low": None, "high": None}
    low = high = None
    if (counts[:, bottom] > 0).sum() > 1:
        low, high = np.nanpercentile(values[1:], [2.5, 97.5]).round(6).tolist()
    return {"mean": round(float(values[0]), 6), "low": low, "high": high}


def count(rows, units):
    """(streams, 3) of asked, covered, correct. A reply of None (the judge failed) is in none of them."""
    import numpy as np
    table = np.zeros((len(units), 3))
    for row in rows:
        if row["reply"] is not None:
            table[units[row["stream"]]] += (1, row["reply"] != "insufficient", bool(row["correct"]))
    return table


def tally(rows, units, budget):
    """(streams, 10): samples, well formed, faithful within budget, clean, all of it, tokens if well formed;
    comparisons, wins, ties, losses. What the judge failed on is left out of its part."""
    import numpy as np
    table = np.zeros((len(units), 10))
    for row in rows:
        sums, formed = table[units[row["stream"]]], bool(row["memory"])
        if None not in (row["faithful"], row["clean"]):
            good = row["faithful"] and row["tokens"] <= budget
            sums[:6] += (1, formed, good, row["clean"], good and row["clean"], formed * row["tokens"])
        for verdict in row["verdicts"].values():
            sums[6:] += (verdict is not None, verdict == "win", verdict == "tie", verdict == "loss")
    return table


def figures(counts, weights, minus=None, columns=METRICS):
    return {name: ratio(counts, weights, *pair, minus) for name, pair in columns.items()}


def summarise(jobs, answers, recent, units, weights, S):
    """{rows, gains, transfer}: shares in [0, 1], gains in points, each {mean, low, high}.

    Counts are pooled over questions, never means of ratios, so that accuracy = coverage x precision.
    """
    table = {(j.method, j.environment, e): count([r for r in answers[j.slug] if r["environment"] == e], units)
             for j in jobs for e in recent}
    first = {e: count(recent[e][:S.RECENT], units) for e in recent}
    mine = lambda m, e: (m, e if (m, e, e) in table else "", e)        # the policy meant for environment e
    pool = lambda keys: sum(table[key] for key in keys)
    rows, gains, transfer = [], {}, {}
    for m in dict.fromkeys(j.method for j in jobs):
        have = [e for e in recent if mine(m, e) in table]
        for e, asked in [(e, [e]) for e in have] + [("all", have)]:
            scopes = {"after": pool(mine(m, x) for x in asked)}
            if not m.startswith("base"):     # before the update all others write as Phase One: its answers
                scopes["all"] = scopes["after"] + sum(first[x] for x in asked)
            rows += [{"method": m, "environment": e, "scope": scope, **figures(c, weights),
                      "questions": int(c[:, 0].sum())} for scope, c in scopes.items()]
        over = lambda ref, keys: figures(pool(keys), weights, pool(mine(ref, key[2]) for key in keys))
        gains[m] = {"over_" + ref: over(ref, [mine(m, e) for e in have]) if m != ref else None
                    for ref in ("base", "phase1")} | {"mismatched": None}
        if m not in ("base", "phase1") and not m.endswith("+prompt"):
            transfer[m] = {a: {e: figures(table[m, a, e], weights) for e in recent} for a in have}
            others = [(m, a, e) for a in have for e in recent if a != e]
            gains[m]["mismatched"] = over("phase1", others) if others else None
    transfer["phase1"] = {e: figures(table["phase1", "", e], weights) for e in recent}
    return {"rows": rows, "gains": gains, "transfer": transfer}


# -------------------------------------------------------------------------------- policies
def find_jobs(S, environments):
    """What is evaluated: method, the environment learned or told ("" = none), writer, adapter folder, slug.
    An expected Phase Two policy that phase2/ lacks is named with its command."""
    job = lambda method, environment, writer, folder=None: SimpleNamespace(
        method=method, environment=environment, writer=writer, folder=folder, told=method.endswith("+prompt"),
        slug=common.slug(f"{method}.{environment}" if environment else method))
    wanted = lambda m: not S.METHODS or m in ("base", "phase1", *S.METHODS.split(","))
    jobs, (own, old) = [], (common.ROOT / "runs" / r for r in (S.RUN, S.FROM or S.RUN))
    for writer in ("base", "phase1"):
        jobs += [job(writer, "", writer)] + [job(writer + "+prompt", e, writer) for e in environments]
    # adapters of FROM belong to its Phase One: no use for a fork with its own
    runs = [own] if (own / "phase1" / "adapter").exists() else [old, own]
    found = {f.parts[-4:-2]: f.parent for r in runs for f in r.glob("phase2/*/*/adapter/*.safetensors")}
    methods = dict.fromkeys((S.METHODS or S.EXPECT).split(",") + sorted({m for m, _ in found}))
    for method in [m for m in methods if wanted(m) and m.split("+")[0] not in ("base", "phase1")]:
        jobs += [job(method, e, "phase2", found[method, common.slug(e)]) for e in environments
                 if (method, common.slug(e)) in found]
        if lacks := [e for e in environments if (method, common.slug(e)) not in found]:
            names = zip(("ALGORITHM", "ADAPTER", "NAME"), method.split("-", 2))
            print(f"!! {method}: no adapter for {', '.join(lacks)}, left out here. To make it: python "
                  f"05_phase2_train.py --RUN={S.RUN} " + " ".join(f"--{k}={v}" for k, v in names))
    return [j for j in jobs if wanted(j.method)]


class Writer:
    """Loads the model when the first memory that is not kept is asked for; switches to a job's adapters."""

    def __init__(self, S, phase1):
        self.S, self.phase1, self.policy, self.folder = S, phase1, None, None

    def load(self):
        if self.policy is None:
            self.policy = common.load_policy(self.S)
            loading.load_adapter(self.policy, "phase1", self.phase1)
        return self.policy

    def using(self, job):
        if job.folder and job.folder != self.folder:
            loading.load_adapter(self.load(), "phase2", job.folder)
            self.folder = job.folder
        return self.load().using(job.writer)


def fingerprint(*things):
    """Hash of values, and of the contents of every file in a Path: what a kept result depends on."""
    digest = hashlib.sha256()
    for thing in things:
        files = sorted(p for p in thing.rglob("*") if p.is_file()) if isinstance(thing, Path) else []
        for data in (p.read_bytes() for p in files) if files else [json.dumps(thing, default=str).encode()]:
            digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def kept(path, key, make):
    """Rows of `make(part)`, stored with their key; read back where the file has this key: a run goes on.
    part: where `make` may keep unfinished work; its name holds the key, so no other run takes it up."""
    head, *rows = loading.once(lambda: common.read_jsonl(path) if path.exists() else [None])
    if head == {"fingerprint": key}:
        return rows
    part = path.with_suffix(f".{key[:12]}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = make(part)
    common.write_jsonl(path, [{"fingerprint": key}, *rows])
    part.unlink(missing_ok=True)
    return rows


# ------------------------------------------------------------------------------- watch, answer, judge
def watch(writer, job, streams, questions, S, part):
    """Rows {stream, clip, start, end, memory}, "" where malformed: a policy's pass over the streams."""
    told, stage3 = questions[job.environment] if job.told else (), importlib.import_module("03_collect_tasks")
    with writer.using(job) as policy:
        seen = stage3.watch(policy, S, streams, told, job.slug, part)      # {stream: [row per clip]}
    return [{k: row[k] for k in row if k != "text"} for s in streams for row in seen[s["stream"]]]


def answer(S, judge, tasks, memories):
    """Rows {task, stream, environment, reply, correct, retrieved}; the reader gets what came before."""
    entries = {s: [row for row in memories if row["stream"] == s] for s in {t["stream"] for t in tasks}}
    stage3 = importlib.import_module("03_collect_tasks")
    replies, retrieved = stage3.answer(S, judge, tasks, entries)
    if 2 * (lost := replies.count(None)) > len(replies):
        raise SystemExit(f"the judge failed on {lost} of {len(replies)} questions: mend it and run again")
    return [{k: t[k] for k in ("task", "stream", "environment")} | {"reply": None if good is None else reply,
             "correct": good, "retrieved": part} for t, reply, good, part in zip(
                 tasks, replies, stage3.right(judge, tasks, replies), retrieved)]


def compare(judge, questions, pairs):
    """win | tie | loss of the first memory of each pair for such questions; both orders must agree, else it
    is a tie (as in 04). None where the judge failed."""
    ask = lambda a, b: {"questions": questions, "first": a, "second": b}
    both = loading.once(lambda: judge.ask("prefer", [ask(*x) for a, b in pairs for x in ((a, b), (b, a))]))
    named = {("first", "second"): "win", ("second", "first"): "loss"}
    return [None if None in said else named.get(said, "tie") for said in zip(both[::2], both[1::2])]


def validate(writer, judge, job, contexts, questions, S, reference=None):
    """Rows {stream, clip, memory, tokens, faithful, clean, verdicts}: one sample per context.

    contexts: with the Phase One history. verdicts: environment -> `compare` with the reference's memory.
    A malformed response is neither faithful nor clean, and never compared. reference: None makes that itself.
    """
    with writer.using(job) as policy:
        told = questions[job.environment] if job.told else []
        asked = [c._replace(questions=told) for c in contexts]
        # the reference has noise of its own: Phase One against itself must not be a tie by construction
        keys = [(S.SEED, 9, int(reference is None), i) for i in range(len(contexts))]
        part = slice(loading.RANK, None, loading.WORLD)                  # of several GPUs, this one's
        samples = loading.gather(common.rollout(policy, asked[part], 1, keys[part], S.VALIDATE_TEMPERATURE))
    rows = [{"stream": c.stream, "clip": c.clip, "memory": s.memory or "", "tokens": s.memory_tokens,
             "faithful": False, "clean": False, "verdicts": {}} for c, (s,) in zip(contexts, samples)]
    if reference is None:
        return rows
    last = lambda context: (context.history or [""])[-1]
    formed = [(row, c) for row, c in zip(rows, contexts) if row["memory"]]
    faithful, clean = loading.once(lambda: (
        judge.ask("faithful", [{"context": c, "memory": row["memory"]} for row, c in formed]),
        judge.ask("clean", [{"previous": last(c), "memory": row["memory"]} for row, c in formed])))
    for (row, _), one, two in zip(formed, faithful, clean):
        row |= {"faithful": one, "clean": two}
    theirs = {(r["stream"], r["clip"]): r["memory"] for r in reference}
    both = [(row, theirs[c.stream, c.clip]) for row, c in formed if theirs[c.stream, c.clip]]
    for e in [job.environment] if job.environment else questions:
        for (row, _), verdict in zip(both, compare(judge, questions[e], [(a["memory"], b) for a, b in both])):
            row["verdicts"][e] = verdict
    return rows


# -------------------------------------------------------------------------------- the stage
def main(argv=None):
    S = common.settings(globals(), argv)
    out = common.start(S, "eval")
    from tqdm import tqdm
    from results import report
    streams, judge = common.load_streams(S, "test")[:S.STREAMS or None], load_judge(S, lambda: writer.load())
    recent, phase1 = common.read_json(common.need(S, "tasks/recent.json")), common.need(S, "phase1/adapter")
    questions = {e: [t["question"] for t in rows[:S.RECENT]] for e, rows in recent.items()}
    ids, tasks = [s["stream"] for s in streams], common.read_jsonl(common.need(S, "streams/tasks.jsonl"))
    tasks = [t for t in tasks if t["stream"] in ids and t["environment"] in recent]
    jobs, writer, clips = find_jobs(S, list(recent)), Writer(S, phase1), sum(len(s["clips"]) for s in streams)
    print(f"{len(jobs)} policies x {clips} clips of {len(ids)} test streams = {len(jobs) * clips} memories, "
          f"{len(jobs) * len(tasks)} answers, {S.VALIDATE} validated memories a method; less what is kept")
    # ---- every policy watches and answers; new adapters, streams or questions make its part anew
    world = fingerprint(vars(S), phase1, streams, questions)
    key = {j.slug: fingerprint(world, j.method, j.environment, j.folder or "") for j in jobs}
    memories, answers = {}, {}
    for j in tqdm(jobs, desc="watch and answer"):
        memories[j.slug] = kept(out / "memories" / f"{j.slug}.jsonl", key[j.slug],
                                lambda part: watch(writer, j, streams, questions, S, part))
        answers[j.slug] = kept(out / "answers" / f"{j.slug}.jsonl", fingerprint(key[j.slug], tasks),
                               lambda _: answer(S, judge, tasks, memories[j.slug]))
    # ---- every method writes in the same contexts, with Phase One's memories as history
    past = {s: [row["memory"] for row in memories["phase1"] if row["stream"] == s] for s in ids}
    spots = [(s, t) for s in streams for t in range(1, len(s["clips"]))]
    spots = random.Random(S.SEED).sample(spots, min(S.VALIDATE, len(spots)))
    contexts = [common.make_context(s, t, past[s["stream"]], (), S.K) for s, t in spots]
    reference = kept(out / "checked" / "reference.jsonl", world, lambda _: validate(
        writer, judge, next(j for j in jobs if j.slug == "phase1"), contexts, questions, S))
    place = {e: i for i, e in enumerate(recent)}
    dealt = lambda j: contexts[place[j.environment]::len(place)] if j.environment else contexts
    checked = {j.slug: kept(out / "checked" / f"{j.slug}.jsonl", key[j.slug], lambda _: validate(
        writer, judge, j, dealt(j), questions, S, reference)) for j in tqdm(jobs, desc="validate")}
    # ---- figures and report
    early = sorted({t["stream"] for rows in recent.values() for t in rows[:S.RECENT]} - set(ids))
    units = {s: i for i, s in enumerate(ids + early)}
    weights = resamples([len(ids), len(early)], S.BOOTSTRAP, S.SEED)
    R = {"run": S.RUN, "streams": len(ids), **summarise(jobs, answers, recent, units, weights, S)}
    sums = {j.slug: tally(checked[j.slug], units, S.MEMORY_TOKENS) for j in jobs}
    R["validation"] = []
    for m in R["gains"]:
        mine = [j for j in jobs if j.method == m]
        for e, group in [(j.environment, [j]) for j in mine if j.environment] + [("all", mine)]:
            shares = figures(sum(sums[j.slug] for j in group), weights, None, QUALITY)
            R["validation"].append({"method": m, "environment": e, **shares})
    R["dropped"] = {"replies": sum(r["reply"] is None for rows in answers.values() for r in rows),
                    "verdicts": sum(None in (r["faithful"], r["clean"], *r["verdicts"].values())
                                    for rows in checked.values() for r in rows)}
    common.write_json(out / "results.json", R)
    common.write_jsonl(out / "memories.jsonl", [{"method": j.method, "environment": j.environment, **row}
                                                for j in jobs for row in memories[j.slug]])
    common.write_text(out / "results.md", report.markdown(R))
    common.write_text(out / "report.html", report.page(R, S, jobs, memories, streams, phase1))
    report.show(R, 0, 1)
    print(f"\nThe report, which opens offline: {out / 'report.html'}\nTry next, an adapter or an ablation:\n"
          f"  python 05_phase2_train.py --RUN={S.RUN} --ADAPTER=lora && python 06_eval.py --RUN={S.RUN}\n"
          f"  python 02_phase1_train.py --RUN=norich --FROM={S.RUN} --RICHNESS=0")


if __name__ == "__main__":
    main()
