"""Stage 6: watch the test streams with every policy, answer from its memories alone, write the report.

A policy watches each test stream once, clip by clip, with its own memories as history. The reader answers the
questions of *every* environment from them, so the cross-task transfer matrix costs no second watching;
without TRANSFER an adapter watches what its own environment asks about. Only "+ task prompt" watches once for
each. All are validated in Phase One's contexts: win / tie / loss. Of online streams, what was seen up to an
environment's last recent question keeps the memories of the policy without its adapter, and what 03 cached is
not validated on.

Differences from the paper: 95 % intervals, by a bootstrap over streams (questions about one stream share its
memories, so the stream is the independent unit; below 5 streams it is the question); the questions after the
update (scope "after") stand apart from "all", which pools the first recent questions as the paper does; a
reply that the judge failed to give is dropped and counted, never a miss. results/report.py lays it all out.

Run:  python 06_eval.py     (finished policies are kept: interrupt it, or train another adapter, and go on)
In:   streams/*.jsonl  phase1/adapter  tasks/recent.json, cache.jsonl  phase2/*/*/adapter (whichever exist)
Out:  eval/results.json, results.md, report.html (one file, opens offline), memories.jsonl
"""
import importlib, random
from types import SimpleNamespace

import common
import loading
from common import np
from judges import load_judge
from loading import fingerprint
from results import report
from results.report import apart, ratio, resamples

stage3 = importlib.import_module("03_collect_tasks")

# ------------------------------------------------------------------------------------------------------------
STREAMS = 0                         # test streams to watch; 0 = all of them
METHODS = ""                        # evaluate only these beside base and phase1, like base+prompt,dpo-steer
EXPECT = "dpo-steer,grpo-steer"     # Phase Two policies of a full comparison; others found in phase2/ join in
RECENT = 5                          # questions in a task prompt, and pooled into scope "all" (paper: 5)
TRANSFER = common.both(1, 0)        # 1: adapters also answer what the other environments ask
READERS = ""                        # others who answer from the same memories, like local,openai:MODEL
VALIDATE = 160                      # contexts for the quality of a method, dealt out to its adapters
VALIDATE_TEMPERATURE = 1.0          # as in training: at 0.6 even an untrained base looks faithful
BOOTSTRAP = 2000                    # resamples of the streams: an interval ends within about 0.3 points
EXAMPLES = 3                        # clips shown in the report with their frames
# ------------------------------------------------------------------------------------------------------------


# -------------------------------------------------------------------------------- statistics
METRICS = {"accuracy": (2, 0), "coverage": (1, 0), "precision": (2, 1)}    # columns of `count`: top / bottom
QUALITY = {"win": (7, 6), "tie": (8, 6), "loss": (9, 6), "faithful": (2, 0), "non_redundant": (3, 0),
           "fully_right": (4, 0), "well_formed": (1, 0), "tokens": (5, 1)}     # columns of `tally`


def count(rows, units):
    """(streams, 4) of asked, covered, correct, and answered from a part of the memories, as not all fit the
    reader. A reply of None (the judge failed) is in none of them."""
    table = np.zeros((len(units), 4))
    for row in rows:
        if row["reply"] is not None:
            table[units[row["stream"]]] += (1, row["reply"] != "insufficient", bool(row["correct"]),
                                            row.get("retrieved", False))
    return table


def tally(rows, units, budget):
    """(streams, 10): samples, well formed, faithful within budget, clean, all of it, tokens if well formed;
    comparisons, wins, ties, losses. What the judge failed on is left out of its part."""
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


def early_tasks(recent, S):
    return {t["task"] for asked in recent.values() for t in asked[:S.RECENT]}


def summarise(jobs, answers, recent, units, weights, S):
    """{rows, gains, transfer}: shares in [0, 1], gains in points, each {mean, low, high}.

    Counts are pooled over questions, never means of ratios, so that accuracy = coverage x precision.
    """
    early = early_tasks(recent, S)
    of = lambda j, e: [r for r in answers[j.slug] if r["environment"] == e]
    table = {(j.method, j.environment, e): count([r for r in of(j, e) if r["task"] not in early], units)
             for j in jobs for e in recent}
    first = {e: count(recent[e][:S.RECENT], units) for e in recent}
    # before the update all write as Phase One, whose answers 03 has; but for the base, which has its own
    based = {e: count([r for r in of(jobs[0], e) if r["task"] in early], units) for e in recent}
    mine = lambda m, e: (m, e if (m, e, e) in table else "", e)        # the policy meant for environment e
    pool = lambda keys: sum(table[key] for key in keys)
    rows, gains, transfer = [], {}, {}
    for m in dict.fromkeys(j.method for j in jobs):
        have = [e for e in recent if mine(m, e) in table]
        for e, asked in [(e, [e]) for e in have] + [("all", have)]:
            scopes = {"after": pool(mine(m, x) for x in asked)}
            pooled = sum((based if m.startswith("base") else first)[x] for x in asked)
            if not m.startswith("base") or sum(based.values()).any():
                scopes["all"] = scopes["after"] + pooled
            rows += [{"method": m, "environment": e, "scope": scope, **figures(c, weights),
                      "questions": int(c[:, 0].sum()), "retrieved": int(c[:, 3].sum())}
                     for scope, c in scopes.items()]
        over = lambda ref, keys: figures(pool(keys), weights, pool(mine(ref, key[2]) for key in keys))
        gains[m] = {"over_" + ref: over(ref, [mine(m, e) for e in have]) if m != ref else None
                    for ref in ("base", "phase1")} | {"mismatched": None}
        if m not in ("base", "phase1") and not m.endswith("+prompt"):
            transfer[m] = {a: {e: figures(table[m, a, e], weights) for e in recent} for a in have}
            others = [(m, a, e) for a in have for e in recent if a != e and table[m, a, e].any()]
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
            how = loading.command(S, "05_phase2_train.py", *(f"--{k}={v}" for k, v in names))
            print(f"!! {method}: no adapter for {', '.join(lacks)}, left out here (05 makes none where there is no "
                  f"pair). To make it: {how}")
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
def before(job, recent, memories, S):
    """{stream: rows} of what the policy without the job's adapter or prompt wrote of the streams of its
    environment's recent questions, up to the last of these."""
    old = memories["base" if job.writer == "base" else "phase1"] if job.environment else ()
    last = stage3.last_asked(recent.get(job.environment, [])[:S.RECENT])
    return {s: [row for row in old if row["stream"] == s and row["end"] <= t] for s, t in last.items()}


def watch(writer, job, streams, questions, begun, S, part):
    """Rows {stream, clip, start, end, memory}, "" where malformed: a policy's pass over the streams."""
    told = questions[job.environment] if job.told else ()
    with writer.using(job) as policy:
        seen = stage3.watch(policy, S, streams, told, job.slug, part, begun)       # {stream: [row per clip]}
    return [{k: row[k] for k in row if k != "text"} for s in streams for row in seen[s["stream"]]]


def answer(S, judge, tasks, memories):
    """Rows {task, stream, environment, reply, correct, retrieved}; the reader gets what came before."""
    entries = {s: [row for row in memories if row["stream"] == s] for s in {t["stream"] for t in tasks}}
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
    streams = common.load_streams(S, "test")
    recent, phase1 = common.read_json(common.need(S, "tasks/recent.json")), common.need(S, "phase1/adapter")
    questions = {e: [t["question"] for t in rows[:S.RECENT]] for e, rows in recent.items()}
    tasks, early = common.read_jsonl(common.need(S, "streams/tasks.jsonl")), early_tasks(recent, S)
    about = {t["stream"] for t in tasks if t["environment"] in recent}
    streams = [s for s in streams if s["stream"] in about][:S.STREAMS or None]
    ids = [s["stream"] for s in streams]
    if not ids:
        raise SystemExit(f"no test or online stream has a question of {', '.join(recent)} (01 makes them)")
    jobs, writer = find_jobs(S, list(recent)), Writer(S, phase1)
    judge = load_judge(S, writer.load)
    own = lambda j, t: t["environment"] == (j.environment or t["environment"])
    asked = {j.slug: [t for t in tasks if t["stream"] in ids and t["environment"] in recent and (
        t["task"] not in early or j.slug == "base") and (S.TRANSFER or own(j, t))] for j in jobs}
    seen = {j.slug: [s for s in streams if s["stream"] in {t["stream"] for t in asked[j.slug]}] for j in jobs}
    clips = sum(len(s["clips"]) for j in jobs for s in seen[j.slug])
    print(f"{len(jobs)} policies, {len(ids)} test streams: {clips} memories, {sum(map(len, asked.values()))} "
          f"answers, up to {S.VALIDATE} validated memories a method; less what is kept")
    # ---- every policy watches and answers; new adapters, streams or questions make its part anew
    world = fingerprint({k: v for k, v in vars(S).items() if k not in common.HARMLESS}, phase1, streams,
                        questions, sorted(early))
    key = {j.slug: fingerprint(world, j.method, j.environment, j.folder or "") for j in jobs}
    memories, answers = {}, {}
    for j in tqdm(jobs, desc="watch and answer"):
        begun = before(j, recent, memories, S)
        memories[j.slug] = kept(out / "memories" / f"{j.slug}.jsonl", key[j.slug], lambda part: watch(
            writer, j, seen[j.slug], questions, begun, S, part))
        answers[j.slug] = kept(out / "answers" / f"{j.slug}.jsonl", fingerprint(key[j.slug], asked[j.slug]),
                               lambda _: answer(S, judge, asked[j.slug], memories[j.slug]))
    # ---- every method writes in the same contexts, with Phase One's memories as history
    past = {s: [row["memory"] for row in memories["phase1"] if row["stream"] == s] for s in ids}
    old = {(r["stream"], r["clip"]) for r in common.read_jsonl(common.need(S, "tasks/cache.jsonl"))}
    spots = [(s, t) for s in seen["phase1"] for t in range(1, len(s["clips"])) if (s["stream"], t) not in old]
    spots = random.Random(S.SEED).sample(spots, min(S.VALIDATE, len(spots)))
    contexts = [common.make_context(s, t, past[s["stream"]], (), S.K) for s, t in spots]
    reference = kept(out / "checked" / "reference.jsonl", world, lambda _: validate(
        writer, judge, next(j for j in jobs if j.slug == "phase1"), contexts, questions, S))
    place = {e: i for i, e in enumerate(recent)}
    dealt = lambda j: contexts[place[j.environment]::len(place)] if j.environment else contexts
    checked = {j.slug: kept(out / "checked" / f"{j.slug}.jsonl", key[j.slug], lambda _: validate(
        writer, judge, j, dealt(j), questions, S, reference)) for j in tqdm(jobs, desc="validate")}
    # ---- figures and report
    split, unit = (dict, "streams") if len(ids) >= 5 else (apart, "questions")      # too few are not resampled
    answers, checked, recent = (split(parts) for parts in (answers, checked, recent))
    ids = sorted({r["stream"] for parts in (answers, checked) for rows in parts.values() for r in rows})
    first = sorted({t["stream"] for rows in recent.values() for t in rows[:S.RECENT]} - set(ids))
    units = {s: i for i, s in enumerate(ids + first)}
    weights = resamples([len(ids), len(first)], S.BOOTSTRAP, S.SEED)
    R = {"run": S.RUN, "source": streams[0]["source"], "streams": len(streams), "unit": unit, "readers": {}}
    R |= summarise(jobs, answers, recent, units, weights, S)
    for name in filter(None, S.READERS.split(",")):
        reader, replies = load_judge(SimpleNamespace(**vars(S) | {"JUDGE": name}), writer.load), {}
        for j in tqdm(jobs, desc=name):
            mine = [t for t in asked[j.slug] if own(j, t)]
            replies[j.slug] = kept(out / "answers" / common.slug(name) / f"{j.slug}.jsonl", fingerprint(
                key[j.slug], mine), lambda _: answer(S, reader, mine, memories[j.slug]))
        R["readers"][name] = summarise(jobs, split(replies), recent, units, weights, S)["rows"]
    sums = {j.slug: tally(checked[j.slug], units, S.MEMORY_TOKENS) for j in jobs}
    groups = [(m, e, [sums[j.slug] for j in jobs if j.method == m and e in ("all", j.environment)])
              for m in R["gains"] for e in (*recent, "all")]
    R["validation"] = [{"method": m, "environment": e, **figures(sum(group), weights, None, QUALITY)}
                       for m, e, group in groups if group]
    R["dropped"] = {"replies": sum(r["reply"] is None for rows in answers.values() for r in rows),
                    "verdicts": sum(None in (r["faithful"], r["clean"], *r["verdicts"].values())
                                    for rows in checked.values() for r in rows)}
    common.write_json(out / "results.json", R)
    common.write_jsonl(out / "memories.jsonl", [{"method": j.method, "environment": j.environment, **row}
                                                for j in jobs for row in memories[j.slug]])
    common.write_text(out / "results.md", report.markdown(R))
    common.write_text(out / "report.html", report.page(R, S, jobs, memories, streams, phase1))
    report.show(R, "Answers from memory", "Gains", "By type", "Beside the paper", "Other readers")
    print(f"\nThe report, which opens offline: {out / 'report.html'}\nTry an ablation (README), or another adapter:\n"
          f"  {loading.command(S, '05_phase2_train.py', '--ADAPTER=lora')} && {loading.command(S, '06_eval.py')}")


if __name__ == "__main__":
    main()
