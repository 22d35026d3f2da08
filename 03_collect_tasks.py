"""Deployment: the Phase One policy watches the deployment streams and writes memories; each environment
asks its first questions, which are answered from memory alone; and one rollout cache is sampled that
all environments share.

The questions are all that Phase Two learns from (no answers are used); the cache is sampled once, so
that a new environment costs no rollout (paper, section 3). Of online streams (see 01) only what came before
the last recent question is watched here, and Phase Two learns nothing from the clips that its adapter will be
examined on (`cached`). Nobody has to ask: without tasks the script ends with the memories.

Run: python 03_collect_tasks.py [--NAME=value ...]
In:  streams/streams.jsonl, tasks.jsonl (01), phase1/adapter (02)
Out: tasks/memories.jsonl, memories/STREAM.txt (to be read), recent.json, cache.jsonl
"""
import importlib
import math
import time
import zlib

from common import (both, clock, load_policy, load_streams, logprobs, make_context, need, read_json, read_jsonl,
                    rollout, settings, start, torch, write_json, write_jsonl, write_text)
from judges import Retriever, load_judge
from loading import RANK, WORLD, command, fingerprint, gather, load_adapter, load_tokenizer, once

# ---------------------------------------------------------------- embedded world | Qwen3-VL-30B-A3B
CACHE_STREAMS = both(24, 100)   # streams whose contexts are cached (paper: about 100 videos) ...
CACHE_CONTEXTS = both(288, 2500)  # ... and their contexts at most, evenly spread (paper: 25 clips a video)
CHUNK = both(24, 4)             # contexts sampled between two writes of the cache
# ---------------------------------------------------------------- the method
RECENT = 10                     # questions kept per environment: the first 5 define Phase Two,
                                # the rest validate 04
GROUP = 8                       # N, memories cached per context (paper, section 3), sampled at temperature 1
PROBE = 100                     # tokens that an answer may have in the rollout which tells the cost of a run
# ----------------------------------------------------------------
ANSWER = """These notes are all that is known of a video:
{entries}

{question}
{options}
Reason from the notes alone, then answer with {{"answer": "LETTER"}}, or with \
{{"answer": "insufficient"}} where they don't tell."""
OPEN = """These notes are all that is known of a video:
{entries}

{question}
Reason from the notes alone, then answer in a few words, {{"answer": "..."}}, or with \
{{"answer": "insufficient"}} where they don't tell."""
GRADE = """Question: {question}
Right answer: {answer}
Given answer: {reply}
Does the given answer mean the same as the right one? Answer with {{"verdict": true}} or \
{{"verdict": false}}."""


def announce(S, policy, contexts, groups, calls, passes=3, sampled=True):
    """Prints what a run will cost before it starts, from one measured rollout and one measured pass.

    contexts: a typical batch; groups: how many are to come; calls: judge calls a group; passes: per group,
    a forward pass counts 1, one with its backward 3; sampled: False where the answers are cached, two a
    group (05 with dpo). The rollout stops after PROBE tokens; longer answers are taken to use their budget.
    """
    contexts, limit = contexts[:policy.side[0]], policy.S.MAX_NEW_TOKENS
    prompts, began = policy.prepare(contexts), time.time()           # vision runs here, before the clock
    answers, length, per_token = [[policy.end] * (S.THINK_TOKENS + S.MEMORY_TOKENS)] * 2, 0, 0
    if sampled:
        policy.S.MAX_NEW_TOKENS = min(limit, PROBE)
        samples = rollout(policy, contexts, S.GROUP, [(S.SEED, 999_999, i) for i in range(len(contexts))])
        policy.S.MAX_NEW_TOKENS = limit
        answers, drawn = [s.ids for s in samples[0]], [len(s.ids) for g in samples for s in g]    # tokens
        usual = S.THINK_TOKENS + S.MEMORY_TOKENS if max(drawn) == PROBE < limit else sum(drawn) / len(drawn)
        length, per_token = S.GROUP * usual, (time.time() - began) / sum(drawn)
    rolled = time.time()
    with torch.no_grad():
        logprobs(policy, contexts[0], answers)
    seconds = length * per_token + passes * (time.time() - rolled)
    what = (f"{groups} groups of {S.GROUP} = {groups * S.GROUP} rollouts, about {length:.0f} tokens sampled "
            "a group") if sampled else f"{groups} pairs, nothing sampled"
    print(f"cost: {what}, {len(prompts[0].ids)} prompt tokens, {groups * calls} judge calls, about "
          f"{groups * seconds / 60:.1f} min")


def watch(policy, S, streams, questions=(), desc="watch", path=None, begun=None):
    """The policy watches streams side by side, clip by clip, with its own memories as history
    -> {stream: [row per clip]}.

    Rows are {stream, clip, start, end, memory, text}; a malformed answer leaves the memory "". Inference
    sampling: temperature 0.6, top-p 0.95, top-k 20 (paper, section 1). path: a JSONL to which rows are
    appended as they come; an interrupted watch goes on from it. begun: {stream: rows of its first clips} that
    another policy wrote; this one goes on after them.
    """
    from tqdm import tqdm
    kept = {s["stream"]: list((begun or {}).get(s["stream"], [])) for s in streams}
    for row in once(lambda: read_jsonl(path, torn=True) if path and path.exists() else []):
        mine = kept.get(row["stream"])                      # None: a stream that has gone
        if mine is not None and row["clip"] == len(mine):
            mine.append(row)
    for t in tqdm(range(max((len(s["clips"]) for s in streams), default=0)), desc=desc, leave=False):
        now = [s for s in streams if len(kept[s["stream"]]) == t < len(s["clips"])]
        mine = now[RANK::WORLD]                                            # of several GPUs, this one's
        contexts = [make_context(s, t, [m["memory"] for m in kept[s["stream"]]], questions, S.K)
                    for s in mine]
        keys = [(S.SEED, 7, zlib.crc32(s["stream"].encode()), t) for s in mine]
        groups = rollout(policy, contexts, 1, keys, 0.6, 0.95, 20)
        rows = gather([dict(stream=s["stream"], clip=t, start=s["clips"][t]["start"], end=s["clips"][t]["end"],
                            memory=m.memory or "", text=m.text) for s, (m,) in zip(mine, groups)])
        for row in rows:
            kept[row["stream"]].append(row)
        if path and rows:
            write_jsonl(path, rows, "a")
    return kept


def answer(S, judge, tasks, memories):
    """Replies of the reader, who gets the memories of the stream up to the time of the question, and nothing
    else: all of them, or where they exceed READER_TOKENS the most relevant ones.

    memories: {stream: [row per clip]}. Returns two lists over the tasks: a letter, "insufficient" or None (it
    failed); and whether the memories were retrieved.
    """
    def ask():
        tokenizer = load_tokenizer(S)
        seen = {s: Retriever([[m["start"], m["end"], m["memory"]] for m in memories[s]], tokenizer)
                for s in {t["stream"] for t in tasks}}
        told = [seen[t["stream"]](t["question"], t["options"], t["time"], S.READER_TOKENS) for t in tasks]
        return judge.ask("answer", [
            {"question": t["question"], "options": t["options"], "entries": entries}
            for t, (entries, _) in zip(tasks, told)]), [retrieved for _, retrieved in told]
    return once(ask)


def right(judge, tasks, replies):
    """Whether each reply is right: the letter of a multiple choice, an open answer by the judge's grade. None
    where the reader or the judge failed."""
    texts = [i for i, t in enumerate(tasks) if not t["options"] and replies[i] not in (None, "insufficient")]
    grades = once(lambda: judge.ask("grade", [
        {"question": tasks[i]["question"], "answer": tasks[i]["answer"], "reply": replies[i]} for i in texts
    ]) if texts else [])
    graded = dict(zip(texts, grades))
    return [None if reply is None else graded.get(i, reply == task["answer"])
            for i, (task, reply) in enumerate(zip(tasks, replies))]


def first_questions(tasks, n):
    """{environment: its first n tasks}, in the order of the file, which is the
    order in which they are asked."""
    environments = {}
    for task in tasks:
        if len(environments.setdefault(task["environment"], [])) < n:
            environments[task["environment"]].append(task)
    return environments


def spread(tasks):
    """Tasks in rounds, one per stream and round, so that the first questions of an
    environment come from many streams."""
    seen, rounds = {}, []
    for task in tasks:
        key = task["environment"], task["stream"]
        seen[key] = seen.get(key, -1) + 1
        rounds.append((seen[key], task))
    return [t for _, t in sorted(rounds, key=lambda x: x[0])]


def last_asked(tasks):
    """{stream: s of the last of the tasks about it}"""
    return {t["stream"]: t["time"] for t in sorted(tasks, key=lambda t: t["time"])}


def cached(S, streams):
    """{environment: rows of cache.jsonl on which Phase Two may train}: all but those of online streams on
    which its adapter will be examined, as later questions of its kind are about the stream, and the clip comes
    after the last of the RECENT ones."""
    rows, recent = (read(need(S, f"tasks/{name}")) for read, name in (
        (read_jsonl, "cache.jsonl"), (read_json, "recent.json")))
    ends = {(s["stream"], c["clip"]): c["end"] for s in streams if s["split"] == "online" for c in s["clips"]}
    tasks, may = read_jsonl(need(S, "streams/tasks.jsonl")) if ends else [], {}
    for environment, asked in recent.items():
        last, early = last_asked(asked[:S.RECENT]), {t["task"] for t in asked[:S.RECENT]}
        over = {t["stream"]: last.get(t["stream"], 0.0) for t in tasks
                if t["environment"] == environment and t["task"] not in early}
        may[environment] = [r for r in rows if ends.get((r["stream"], r["clip"]), 0.0)
                            <= over.get(r["stream"], math.inf)]
    return may


def seen_by_then(S, streams, recent):
    """What was watched when the recent questions had been asked. Online streams go on after that: those which
    the questions are about end at the last of them; others, whole, fill up to CACHE_STREAMS."""
    last = last_asked(t for asked in recent.values() for t in asked)
    online = [s["stream"] for s in streams if s["split"] == "online"]
    others = [s for s in online if s not in last][:max(0, S.CACHE_STREAMS - len(last))]
    return [s if s["split"] != "online" or s["stream"] in others else s | {
        "clips": [c for c in s["clips"] if c["end"] <= last[s["stream"]]] or s["clips"][:1]}
        for s in streams if s["stream"] not in online or s["stream"] in last or s["stream"] in others]


def fill_cache(S, out, policy, judge, streams, memories):
    """GROUP samples of every context, with their format and quality rewards, appended chunk by chunk."""
    from tqdm import tqdm
    phase1, part = importlib.import_module("02_phase1_train"), out / "cache.part"
    done = once(lambda: read_jsonl(part, torn=True) if part.exists() else [])
    every = [(s, t) for s in streams for t in range(len(s["clips"]))]
    todo = [every[i * len(every) // S.CACHE_CONTEXTS] for i in range(S.CACHE_CONTEXTS)
            ] if len(every) > S.CACHE_CONTEXTS else every
    contexts = [make_context(s, t, [m["memory"] for m in memories[s["stream"]]], k=S.K) for s, t in todo]
    for i in tqdm(range(len(done), len(todo), S.CHUNK), desc="rollout cache", initial=len(done) // S.CHUNK):
        mine = range(i + RANK, min(i + S.CHUNK, len(todo)), WORLD)
        chunk = [contexts[j] for j in mine]
        samples = rollout(policy, chunk, S.GROUP, [(S.SEED, 8, j) for j in mine])
        qualities = phase1.quality(S, judge, chunk, samples)
        rows = gather([{"stream": c.stream, "clip": c.clip, "history": c.history, "samples": [
            s._asdict() | {"format": 0.0 if s.memory else phase1.FORMAT, "quality": q}
            for s, q in zip(group, quality)
        ]} for c, group, quality in zip(chunk, samples, qualities)])
        write_jsonl(part, rows, "a")
        done += rows
    write_jsonl(out / "cache.jsonl", done)
    if not RANK:
        part.unlink()


def main(argv=None):
    S = settings(globals(), argv)
    out = start(S, "tasks")
    streams = load_streams(S, "deploy")
    tasks = [t for t in read_jsonl(need(S, "streams/tasks.jsonl"))
             if t["stream"] in {s["stream"] for s in streams}]
    made_of = fingerprint(streams, tasks)
    if (out / "cache.jsonl").exists():
        if made_of != read_json(out / "made_of.json"):
            print(f"*** streams or tasks have changed since {out} was made, and are not in it. To take them "
                  "up: --RUN=NEWNAME, from 01 on ***")
        return print(f"finished before: {out}; next: {command(S, '04_train_reward.py')}")
    write_json(out / "made_of.json", made_of)
    adapter, judge = need(S, "phase1/adapter"), load_judge(S, lambda: policy) if tasks else None
    policy = load_policy(S)
    load_adapter(policy, "phase1", adapter)

    online = any(s["split"] == "online" for s in streams)
    recent = first_questions(tasks if online else spread(tasks), S.RECENT)
    streams = seen_by_then(S, streams, recent) if tasks else streams
    clips = sum(len(s["clips"]) for s in streams)
    print(f"{len(streams)} streams of {clips} clips to watch, {len(tasks)} questions to come" + (
        ": what precedes the last recent question" if tasks and online else ""))
    blind = [t for asked in recent.values() for t in asked if not any(
        c["end"] <= t["time"] for s in streams if s["stream"] == t["stream"] for c in s["clips"])]
    if blind:
        print(f"*** {len(blind)} recent questions are asked before any clip has ended, when nothing is known, "
              f"e.g. {blind[0]['task']} at {blind[0]['time']:g} s ***")
    cached = streams[:S.CACHE_STREAMS] if tasks else []
    if cached:
        announce(S, policy, [make_context(s, len(s["clips"]) // 2, {}, k=S.K) for s in cached],
                 min(S.CACHE_CONTEXTS, sum(len(s["clips"]) for s in cached)), 2 * S.GROUP, 0)
    memories = watch(policy, S, streams, desc="watch", path=out / "memories.jsonl")
    for stream, rows in memories.items():
        write_text(out / "memories" / f"{stream}.txt", "".join(
            f"{clock(m['start'])}-{clock(m['end'])}\n{m['memory'] or '(nothing)'}\n\n" for m in rows))
    written = sum(bool(m["memory"]) for rows in memories.values() for m in rows)
    print(f"memories of {written} of {clips} clips: {out / 'memories'}")
    if not tasks:
        return print("no tasks ask about these streams: the memories are all there is to make (see "
                     "tasks.jsonl in 01)")

    for environment, asked in recent.items():
        replies, retrieved = answer(S, judge, asked, memories)
        for task, reply, part, correct in zip(asked, replies, retrieved, right(judge, asked, replies)):
            task |= {"reply": reply if correct is not None else None, "correct": correct}
            task |= {"retrieved": True} if part else {}
        failed = sum(t["correct"] is None for t in asked)
        print(f"  {environment:24} {sum(bool(t['correct']) for t in asked[:5])} of the first "
              f"{len(asked[:5])} answered right, e.g. {asked[0]['question']!r} -> {asked[0]['reply']}"
              + f"; {failed} without a verdict" * bool(failed))
    write_json(out / "recent.json", recent)
    fill_cache(S, out, policy, judge, cached, memories)
    print(f"next: {command(S, '04_train_reward.py')}")


if __name__ == "__main__":
    main()
