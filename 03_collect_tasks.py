"""Deployment: the Phase One policy watches the deployment streams and writes memories. Each environment (a
kind of question, as in the paper) asks its first questions, which are answered from memory alone. Then one
rollout cache is sampled that all environments share.

The questions are all that Phase Two learns from: no answers are used. The cache is sampled once, so a new
environment costs no rollout (paper, section 3). Of online streams (see 01) only what came before the last
recent question is watched here, and an environment learns nothing from the clips that its adapter will be
examined on: each row of the cache names the environments that may learn from it. Nobody has to ask: without
tasks the script ends with the memories.

Run: python 03_collect_tasks.py [--NAME=value ...]
     (toy world: 21 s on two cores)
In:  streams/streams.jsonl, tasks.jsonl (01), phase1/adapter (02), and what the judge needs
Out: tasks/memories.jsonl, memories/STREAM.txt (to be read), recent.json, cache.jsonl
"""
import math

from common import (Group, Sample, build_prompt, load_judge, load_policy, make_context, per_model,
                    rollout, settings, stage, watch)
from support import hours, judges
from support.hours import Sizes, first_measured, say_plan, sizes_of
from support.judges import Answer, Verdict
from support.ranks import gather, is_first_rank, my_share, once, progress, said_once
from support.reader import Retriever
from support.runs import (append_jsonl, as_written, clock, fingerprint, load_streams, need,
                          next_command, read_json, read_jsonl, read_progress, say_what_differs,
                          slug, start, write_json, write_jsonl, write_text)
from support.weights import load_adapter, load_tokenizer

phase1 = stage("02_phase1_train")

# ---------------------------------------------------------------- toy world | Qwen3-VL-30B-A3B
CACHE_STREAMS = per_model(24, 100)     # streams to cache contexts of (paper: about 100 videos) ...
CACHE_CONTEXTS = per_model(288, 2500)  # ... and their contexts at most (paper: 25 clips a video)
CHUNK = per_model(24, 28)              # contexts sampled between two writes of the cache
# ---------------------------------------------------------------- the method
RECENT = 5                             # questions that define an environment (paper: 5 to 10)
LATER = 5                              # questions after those, by which 04 validates R
GROUP = 8                              # N, memories cached per context (paper), at temperature 1
# ----------------------------------------------------------------
ANSWER = Answer("answer", """These notes are all that is known of a video:
{entries}

{question}
{options}
Reason from the notes alone, then answer with {{"answer": "LETTER"}}, or with \
{{"answer": "insufficient"}} where they don't tell.""")
OPEN = Answer("answer", """These notes are all that is known of a video:
{entries}

{question}
Reason from the notes alone, then answer in a few words, {{"answer": "..."}}, or with \
{{"answer": "insufficient"}} where they don't tell.""")
GRADE = Verdict("grade", """Question: {question}
Right answer: {answer}
Given answer: {reply}
Does the given answer mean the same as the right one? Answer with {{"verdict": true}} or \
{{"verdict": false}}.""")


# ================================================================ answers from memory
def answer(S, judge, tasks, memories):
    """What the reader replies to each task, and whether its memories were retrieved: (replies, retrieved).

    A reply is a letter, a text, "insufficient", or None where the reader failed.

    It gets the memories of the stream up to the time of the question and nothing else: all of them, or where
    they exceed READER_TOKENS the most relevant ones. memories: {stream: [row per clip]}.
    """
    answered = gather(read_and_reply(S, judge, my_share(tasks), memories))
    replies = [reply for reply, _ in answered]
    retrieved = [is_part for _, is_part in answered]
    return replies, retrieved


def read_and_reply(S, judge, tasks, memories):
    """(reply, whether its memories were retrieved) of each task."""
    tokenizer = load_tokenizer(S)
    retrievers = {}
    for stream in {task["stream"] for task in tasks}:
        entries = [[row["start"], row["end"], row["memory"]] for row in memories[stream]]
        retrievers[stream] = Retriever(entries, tokenizer)
    items = []
    retrieved = []
    for task in tasks:
        retrieve = retrievers[task["stream"]]
        question = task["question"]
        options = task["options"]
        entries, is_part = retrieve(question, options, task["time"], S.READER_TOKENS)
        items.append({"question": question, "options": options, "entries": entries})
        retrieved.append(is_part)
    return list(zip(ask_reader(judge, items), retrieved))


def ask_reader(judge, items):
    """Replies in the order of the items: those with options are asked by ANSWER, the others by OPEN."""
    chosen = iter(judge.ask(ANSWER, [item for item in items if item["options"]]))
    written = iter(judge.ask(OPEN, [item for item in items if not item["options"]]))
    return [next(chosen) if item["options"] else next(written) for item in items]


def right(judge, tasks, replies):
    """Whether each reply is right: a letter by itself, an open answer by the judge's grade.

    None where the reader or the judge failed.
    """
    to_grade = []
    for i, task in enumerate(tasks):
        if not task["options"] and replies[i] not in (None, judges.INSUFFICIENT):
            to_grade.append(i)
    grades = grade(judge, tasks, replies, to_grade)
    correct = []
    for task, reply in zip(tasks, replies):
        correct.append(None if reply is None else reply == task["answer"])
    for i, verdict in zip(to_grade, grades):
        correct[i] = verdict
    return correct


def grade(judge, tasks, replies, indices):
    items = []
    for i in indices:
        item = {"question": tasks[i]["question"], "answer": tasks[i]["answer"], "reply": replies[i]}
        items.append(item)
    return judges.ask_in_shares(judge, GRADE, items) if items else []


# ================================================================ who asked what, and when
def first_questions(tasks, n):
    """{environment: its first n tasks}. The file's order is the order in which they are asked."""
    environments = {}
    for task in tasks:
        asked = environments.setdefault(task["environment"], [])
        if len(asked) < n:
            asked.append(task)
    return environments


def spread(tasks):
    """Tasks in rounds, one per environment, stream and round.

    So the first questions of an environment come from many streams.
    """
    rounds = []
    asked = {}                                   # questions so far: {(environment, stream): n}
    for task in tasks:
        key = task["environment"], task["stream"]
        rounds.append(asked.get(key, 0))
        asked[key] = rounds[-1] + 1
    order = sorted(range(len(tasks)), key=lambda i: rounds[i])
    return [tasks[i] for i in order]


def last_asked(tasks):
    """{stream: s of the last of the tasks about it}"""
    last = {}
    for task in tasks:
        last[task["stream"]] = max(task["time"], last.get(task["stream"], task["time"]))
    return last


def seen_by_then(streams, recent, cache_streams):
    """What was watched when the recent questions had been asked.

    Online streams go on after that. Those which the questions are about end at the last of them; others,
    whole, fill up to cache_streams.
    """
    last = last_asked(sum(recent.values(), []))
    places_left = cache_streams - len(last)
    seen = []
    for stream in streams:
        if stream["split"] != "online":
            seen.append(stream)
        elif stream["stream"] in last:
            clips = [clip for clip in stream["clips"] if clip["end"] <= last[stream["stream"]]]
            seen.append(stream | {"clips": clips or stream["clips"][:1]})
        elif places_left > 0:
            seen.append(stream)
            places_left -= 1
    return seen


def learns_until(tasks, recent, n):
    """{environment: {stream: s}} of the streams on which it will be examined: questions after its first n.

    It may learn from clips that end by the last of its first n questions about that stream, or from none.
    """
    limits = {}
    for environment, asked in recent.items():
        first = asked[:n]
        names = {task["task"] for task in first}
        last = last_asked(first)
        limits[environment] = {}
        for task in tasks:
            if task["environment"] == environment and task["task"] not in names:
                limits[environment][task["stream"]] = last.get(task["stream"], 0.0)
    return limits


def learners(stream, clip, limits):
    """The environments that may learn from this clip: all, where the stream is not online."""
    if stream["split"] != "online":
        return list(limits)
    allowed = []
    for environment, until in limits.items():
        if clip["end"] <= until.get(stream["stream"], math.inf):
            allowed.append(environment)
    return allowed


def check_recent(S, streams):
    """SystemExit where 04 to 06 take more or fewer questions than 03 did as those that define an environment.

    On online streams they set what it may learn from (03) and what it is examined on (06), which must not
    overlap.
    """
    file = need(S, "tasks/recent.json").parent / "settings.json"
    if not file.exists() or all(stream["split"] != "online" for stream in streams):
        return
    before = read_json(file).get("RECENT", S.RECENT)
    if before != S.RECENT:
        raise SystemExit(f"RECENT={S.RECENT}, but 03 had RECENT={before}: on online streams this "
                         f"says from which clips an environment may learn. Take --RECENT={before}, "
                         "or make the run anew from 03 on: --RUN=NEWNAME --FROM=THISRUN")


# ================================================================ the rollout cache
def fill_cache(S, out, policy, judge, streams, memories, limits, planned=None):
    """GROUP samples of every context, with their format and quality rewards, appended chunk by chunk."""
    part = out / "cache.part"
    # What was judged again stands in `part`, and takes the place of what was finished before.
    before = [*read_progress(out / "cache.jsonl"), *read_progress(part)]
    done = {(row["stream"], row["clip"]): row for row in before}
    places = chosen_clips(streams, S.CACHE_CONTEXTS)
    names = [(stream["stream"], t) for stream, t in places]
    written = {}
    for stream, rows in memories.items():
        written[stream] = [row["memory"] for row in rows]
    firsts = range(0, len(places), S.CHUNK)
    chunks = progress(firsts, "rollout cache")
    for first in first_measured(chunks, len(firsts), planned, f"for {S.CHUNK} contexts"):
        chunk = range(first, min(first + S.CHUNK, len(places)))
        # A chunk in which a verdict failed is judged again as a whole: an endpoint has kept all others, and a
        # few clips that it refuses are still a few among many.
        again = any(has_unjudged(done[names[i]]) for i in chunk if names[i] in done)
        indices = my_share([i for i in chunk if again or names[i] not in done])
        groups = []
        environments = []                        # that may learn from a context
        to_sample = []                           # (group, key)
        for i in indices:
            stream, t = places[i]
            context = make_context(stream, t, written[stream["stream"]], k=S.K)
            group = Group(context, saved_samples(done.get(names[i])))
            groups.append(group)
            environments.append(learners(stream, stream["clips"][t], limits))
            if not group.samples:
                to_sample.append((group, (S.SEED, 8, i)))
        contexts = [group.context for group, _ in to_sample]
        samples = rollout(policy, contexts, S.GROUP, [key for _, key in to_sample])
        for (group, _), answers in zip(to_sample, samples):
            group.samples = answers
        phase1.quality(groups, judge, S.MEMORY_TOKENS)
        rows = gather(list(map(cache_row, groups, environments)))
        if rows:
            append_jsonl(part, rows)
        done |= {(row["stream"], row["clip"]): row for row in rows}
    rows = [done[name] for name in names]
    failed = count_unjudged(rows)
    if failed * 2 > len(rows) * S.GROUP:
        raise SystemExit(said_once(f"the judge failed on {failed} of {len(rows) * S.GROUP} cached "
                                   "samples; mend it and run the same command again"))
    write_jsonl(out / "cache.jsonl", rows)
    if is_first_rank():
        part.unlink(missing_ok=True)


def saved_samples(row):
    """The samples of a row of the cache, to be judged again; none without a row."""
    samples = []
    for saved in row["samples"] if row else ():
        fields = {name: saved[name] for name in SAMPLED}
        samples.append(Sample(**fields))
    return samples


def has_unjudged(row):
    """Whether a judge failed on a sample of a row of the cache."""
    return any(sample["quality"] is None for sample in row["samples"])


def count_unjudged(rows):
    """Samples in rows of the cache whose quality is missing."""
    count = 0
    for row in rows:
        count += [sample["quality"] for sample in row["samples"]].count(None)
    return count


def chosen_clips(streams, limit):
    """(stream, index of the clip) of at most `limit` contexts, evenly spread over all clips."""
    places = []
    for stream in streams:
        places += [(stream, t) for t in range(len(stream["clips"]))]
    if len(places) <= limit:
        return places
    return [places[i * len(places) // limit] for i in range(limit)]


# What a row of the cache keeps of a sample beside its rewards.
SAMPLED = ("ids", "text", "memory", "thinking_tokens", "memory_tokens", "truncated")


def cache_row(group, environments):
    context = group.context
    samples = []
    for sample in group.samples:
        samples.append({name: getattr(sample, name) for name in SAMPLED} | {
            "format": 0.0 if sample.memory else phase1.FORMAT,
            "quality": sample.quality})
    return {"stream": context.stream, "clip": context.clip, "history": context.history,
            "environments": environments, "samples": samples}


def cached_context(stream, row, window):
    """The context of a row of cache.jsonl, with the history that it was sampled with."""
    first = row["clip"] - len(row["history"])
    return make_context(stream, row["clip"], dict(enumerate(row["history"], first)), k=window)


# ================================================================ the stage
LEVERS = ("contexts", "THINK_TOKENS")    # what to lower where the plan exceeds a day


def work(plan, S, sizes):
    """What this stage does, for the plan (support/hours.py)."""
    plan.watch("watch", sizes.clips, sizes.streams)
    plan_answers(plan, S, sizes, sizes.environments * (S.RECENT + S.LATER), S.RECENT + S.LATER)
    if sizes.contexts:
        plan.sample("cache", sizes.contexts, S.GROUP, S.CHUNK)
        plan.see("cache", sizes.contexts * S.K)
        phase1.plan_quality(plan, S, sizes.contexts * S.GROUP, S.CHUNK * S.GROUP, S.GROUP)


def plan_answers(plan, S, sizes, questions, at_once):
    """The reader's answers, `at_once` in a call: it reads all memories of a stream, as far as they fit."""
    memory = sizes.clips // max(1, sizes.streams) * (S.MEMORY_TOKENS + hours.STAMP)
    notes = min(memory, S.READER_TOKENS)
    plan.judge("answers", questions, at_once, notes, hours.QUESTION)


def main(argv=None):
    S = settings(globals(), argv)
    if S.PLAN:
        sizes = sizes_of(S, "deploy")
        sizes.contexts = min(sizes.contexts, S.CACHE_CONTEXTS)
        say_plan(S, work, sizes, LEVERS)
        return
    out = start(S, "tasks", answer, right, phase1.quality, build_prompt)
    streams = load_streams(S, "deploy")
    names = {stream["stream"] for stream in streams}
    tasks = [task for task in read_jsonl(need(S, "streams/tasks.jsonl")) if task["stream"] in names]
    if finished_before(S, out, streams, tasks):
        return
    adapter = need(S, "phase1/adapter")
    say_what_differs(adapter.parent, "02_phase1_train.py", phase1.quality, build_prompt)
    judge = load_judge(S, lambda: policy) if tasks else None
    policy = load_policy(S)
    load_adapter(policy, "phase1", adapter)

    # ---- what is to be watched
    is_online = any(stream["split"] == "online" for stream in streams)
    recent = first_questions(tasks if is_online else spread(tasks), S.RECENT + S.LATER)
    if tasks:
        streams = seen_by_then(streams, recent, S.CACHE_STREAMS)
    cached_streams = streams[:S.CACHE_STREAMS] if tasks else []
    say_what_is_to_come(streams, tasks, recent, is_online)
    sizes = Sizes("those above", len(streams), sum(len(stream["clips"]) for stream in streams),
                  len(chosen_clips(cached_streams, S.CACHE_CONTEXTS)), len(recent))
    planned = say_plan(S, work, sizes, LEVERS)

    # ---- memories
    memories = watch(
        policy, streams, path=out / "memories.jsonl", planned=planned.hours_of("watch"))
    write_readable(out / "memories", memories)
    if not tasks:
        print("no tasks ask about these streams: the memories are all there is to make "
              "(see tasks.jsonl in 01)")
        return

    # ---- the recent questions, answered from memory
    answer_recent(S, judge, recent, memories)
    write_json(out / "recent.json", recent)

    # ---- the rollout cache
    limits = learns_until(tasks, recent, S.RECENT)
    planned_hours = planned.hours_of("cache", "judge")
    fill_cache(S, out, policy, judge, cached_streams, memories, limits, planned_hours)
    say_what_failed(out)
    print(f"memories, answers and the rollout cache are in {out}; "
          f"next: {next_command(S, '04_train_reward.py')}")


def finished_before(S, out, streams, tasks):
    """Whether this folder is complete; if not, remembers of which streams and tasks it will be made."""
    made_of = fingerprint(as_written(S, streams), tasks)
    file = out / "made_of.json"
    has_changed = once(lambda: file.exists() and made_of != read_json(file))
    if not (out / "cache.jsonl").exists() or not (out / "recent.json").exists():
        if has_changed:
            print(f"*** streams or tasks have changed since {out} was begun; memories that were "
                  "written before are kept as they are ***")
        write_json(file, made_of)
        return False
    if has_changed:
        print(f"*** streams or tasks have changed since {out} was made, and are not in it. To take "
              "them up: --RUN=NEWNAME, from 01 on ***")
    elif say_what_failed(out):
        return False
    print(f"finished before: {out}; next: {next_command(S, '04_train_reward.py')}")
    return True


def say_what_failed(out):
    """Whether the judge has failed on a part of what is published, which is said."""
    # Rank 0 reads, because it has written: another may be here before the file is in place.
    recent, cache = once(lambda: (read_json(out / "recent.json"), read_jsonl(out / "cache.jsonl")))
    tasks = sum(recent.values(), [])
    unanswered = [task["correct"] for task in tasks].count(None)
    unjudged = count_unjudged(cache)
    if unanswered or unjudged:
        print(f"*** the judge has failed on {unanswered} recent questions and {unjudged} samples, "
              "which are left out from here on; this command asks for them again ***")
    return unanswered + unjudged > 0


def say_what_is_to_come(streams, tasks, recent, is_online):
    clips = sum(len(stream["clips"]) for stream in streams)
    why = ": what precedes the last recent question" if tasks and is_online else ""
    print(f"{len(streams)} streams of {clips} clips to watch, {len(tasks)} questions to come{why}")
    first_end = {stream["stream"]: stream["clips"][0]["end"] for stream in streams}
    unseen = []
    for asked in recent.values():
        unseen += [task for task in asked if task["time"] < first_end.get(task["stream"], math.inf)]
    if unseen:
        example = f"{unseen[0]['task']} at {unseen[0]['time']:g} s"
        print(f"*** {len(unseen)} recent questions are asked before any clip has ended, when "
              f"nothing is known, e.g. {example} ***")


def write_readable(folder, memories):
    """A text for each stream, with the times of its clips."""
    written = 0
    for stream, rows in memories.items():
        entries = [stream + "\n"] if slug(stream) != stream else []
        for row in rows:
            nothing = "(the video is damaged here)" if row.get("grey") else "(nothing)"
            memory = row["memory"] or nothing
            entries.append(f"{clock(row['start'])}-{clock(row['end'])}\n{memory}\n")
            written += bool(row["memory"])
        write_text(folder / f"{slug(stream)}.txt", "\n".join([*entries, ""]))
    clips = sum(len(rows) for rows in memories.values())
    print(f"memories of {written} of {clips} clips: {folder}")


def answer_recent(S, judge, recent, memories):
    """Adds to each task its "reply", whether it is "correct", and "retrieved" where a part was read."""
    tasks = sum(recent.values(), [])
    replies, retrieved = answer(S, judge, tasks, memories)
    correct = right(judge, tasks, replies)
    failed = correct.count(None)
    if failed * 2 > len(tasks):
        raise SystemExit(said_once(f"the judge failed on {failed} of {len(tasks)} recent "
                                   "questions; mend it and run the same command again"))
    for i, task in enumerate(tasks):
        task["reply"] = None if correct[i] is None else replies[i]
        task["correct"] = correct[i]
        if retrieved[i]:
            task["retrieved"] = True
    for environment, asked in recent.items():
        first = asked[:S.RECENT]
        first_right = sum(task["correct"] is True for task in first)
        example = f"{asked[0]['question']!r} -> {asked[0]['reply']}"
        print(f"  {environment:24} {first_right} of the first {len(first)} answered right, "
              f"e.g. {example}")


if __name__ == "__main__":
    main()
