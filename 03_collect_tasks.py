"""Deployment: the Phase One policy watches the deployment streams and writes memories. Questions of several
environments (an environment is a kind of question, as in the paper) are answered from these memories alone. Then
a rollout cache is sampled that all environments share: a new environment costs no rollout (paper, section 3).

The questions are all that Phase Two learns from. Answers, where there are any, are only counted. Nobody has to
ask: without tasks the script ends with the memories.

Run it again after 01 has taken up new videos or questions. It watches the new clips alone, answers the new
questions and adds the new clips to the cache. Which questions define an environment depends on the split of the
streams (see 01):
  deploy   a life goes on: the latest RECENT of all that were ever asked. Once 05 has made an environment's adapter,
           it writes the new clips too, and what the environment asks is answered from these notes: the adapter's
           where there are any, Phase One's before. So a clip gets a memory of each writer, in one pass over the
           frames. Phase One goes on, because the cache wants its histories and a new environment has no adapter.
  online   a benchmark, as in the paper: the first RECENT, for ever. Only what came before the last recent
           question is watched here, and an environment learns nothing from the clips that its adapter will be
           examined on: each row of the cache names the environments that may learn from it.

Run: python 03_collect_tasks.py [--NAME=value ...]
     (toy world: 23 s on two cores)
     python 03_collect_tasks.py --RUN=mine --ASK="Where did I put the keys?"    answers from the notes
In:  streams/streams.jsonl, tasks.jsonl (01), phase1/adapter (02), and what the judge needs; later
     phase2/ADAPTER/*/adapter (05)
Out: tasks/memories.jsonl (Phase One's), adapted/ENVIRONMENT.jsonl (an adapter's), memories/STREAM.txt (to be read);
     asked.jsonl (all questions with their replies, in the order in which they came), recent.json;
     cache.jsonl, considered.json (how many clips of each stream the cache was drawn from)
"""
import functools
import math
import sys
import zlib
from dataclasses import dataclass

from common import (Group, Notes, Sample, build_prompt, go_on, load_judge, load_policy,
                    make_context, per_model, rollout, settings, stage, watch)
from support import hours, judges
from support.hours import Sizes, first_measured, say_plan, sizes_of
from support.judges import Answer, SourcedAnswer, Verdict
from support.ranks import gather, is_first_rank, my_share, once, progress, said_once
from support.reader import Retriever, printed
from support.runs import (ROOT, append_jsonl, clock, find, fingerprint, have_frames, load_streams, need,
                          next_command, read_growing, read_json, read_jsonl, read_progress,
                          say_what_differs, slug, start, write_json, write_jsonl, write_text)
from support.weights import load_adapter, load_tokenizer

phase1 = stage("02_phase1_train")

# ---------------------------------------------------------------- toy world | Qwen3-VL-30B-A3B
CACHE_STREAMS = per_model(24, 100)     # online streams watched at least (paper: about 100 videos) ...
CACHE_CONTEXTS = per_model(288, 2500)  # ... and contexts cached at most (paper: 25 clips a video)
CHUNK = per_model(24, 28)              # contexts sampled, or questions asked, between two writes
# ---------------------------------------------------------------- the method
RECENT = 5                             # questions that define an environment (paper: 5 to 10)
LATER = 5                              # questions besides those, by which 04 validates R
GROUP = 8                              # N, memories cached per context (paper), at temperature 1
ADAPTER = "dpo-steer"                  # which of 05's adapters write, ALGORITHM-ADAPTER; "": none
# ---------------------------------------------------------------- a question of one's own
ASK = ""                               # is answered from the notes that there are; nothing is watched
ASK_ONLY = 0                           # 1: it doesn't join the recent questions
ENVIRONMENT = "questions"              # whose notes answer it, and whose recent questions it joins
STREAM = ""                            # of one stream alone; "": of all
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
ASKED = SourcedAnswer("asked", """These notes are all that is known of what was seen:
{entries}

{question}
Reason from the notes alone. Answer in a few words and with the numbers of the notes that the answer rests on, {{"answer": "...", "entries": [1, 2]}}, or with {{"answer": "insufficient"}} where the notes don't tell.""")
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

    None where no answer is known, and where the reader or the judge failed.
    """
    to_grade = []
    correct = []
    for i, (task, reply) in enumerate(zip(tasks, replies)):
        if reply is None or not has_answer(task):
            correct.append(None)
            continue
        correct.append(reply == task["answer"])
        if not task["options"] and reply != judges.INSUFFICIENT:
            to_grade.append(i)
    grades = grade(judge, tasks, replies, to_grade)
    for i, verdict in zip(to_grade, grades):
        correct[i] = verdict
    return correct


def has_answer(task):
    """Whether the right answer is known. A question needs none, see tasks.jsonl in 01."""
    return task.get("answer") is not None


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


def latest_questions(asked, n, later):
    """{environment: its latest n questions, then those before them, at most `later`}.

    asked: in the order in which they were asked.
    """
    environments = {}
    for task in asked:
        environments.setdefault(task["environment"], []).append(task)
    recent = {}
    for environment, tasks in sorted(environments.items()):
        recent[environment] = tasks[-n:] + tasks[-n - later:-n]
    return recent


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


def identity(task):
    """What a question is known by. One that was reworded under its old name is another one."""
    return task["task"], task["question"]


def read_asked(path):
    """{identity: row of asked.jsonl}, in the order in which they were asked first.

    Where the judge had failed, a later row of the same question takes the place of the first.
    """
    asked = {}
    for row in read_progress(path):
        asked[identity(row)] = row
    return asked


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
@dataclass
class Cache:
    """The rollout cache, and what comes into it now. A place is (stream, number of a clip)."""
    rows: dict           # {(name of the stream, clip): row} of cache.jsonl
    old: list            # places that stay in it
    new: list            # places that come in; some of them may be in `rows`, after an interruption

    @property
    def missing(self):
        """Places that were never sampled."""
        return [place for place in self.new if name_of(place) not in self.rows]

    @property
    def unjudged(self):
        """Samples that a judge has failed on."""
        names = [name_of(place) for place in self.old + self.new]
        return count_unjudged([self.rows[name] for name in names if name in self.rows])

    def chunks_to_do(self, size):
        """Places to be sampled or judged, `size` at a time."""
        to_do = []
        for chunk in in_chunks(self.old, size) + in_chunks(self.new, size):
            missing = [place for place in chunk if name_of(place) not in self.rows]
            if any(has_unjudged(self.rows.get(name_of(place))) for place in chunk):
                # A chunk in which a verdict failed is judged again as a whole: an endpoint has kept all others,
                # and a few clips that it refuses are still a few among many.
                to_do.append(chunk)
            elif missing:
                to_do.append(missing)
        return to_do


def name_of(place):
    stream, t = place
    return stream["stream"], t


def read_cache(S, out, streams):
    """The Cache. Of clips that it has not been drawn from yet, CACHE_CONTEXTS at most come in, evenly spread over
    all of them. For these the oldest make room."""
    file = out / "considered.json"
    considered = once(lambda: read_json(file) if file.exists() else {})
    # What was judged again stands in cache.part, and takes the place of what was finished before.
    before = [*read_progress(out / "cache.jsonl"), *read_progress(out / "cache.part")]
    rows = {(row["stream"], row["clip"]): row for row in before}
    places = all_places(streams)
    unseen = []
    for stream, t in places:
        is_unseen = t >= considered.get(stream["stream"], 0)
        if is_unseen and have_frames(stream["clips"][max(0, t + 1 - S.K):t + 1]):
            unseen.append((stream, t))
    new = evenly(unseen, S.CACHE_CONTEXTS)
    names = {name_of(place) for place in new}
    old = []
    for place in places:
        if name_of(place) in rows and name_of(place) not in names:
            old.append(place)
    too_many = max(0, len(old) + len(new) - S.CACHE_CONTEXTS)
    return Cache(rows, old[too_many:], new)


def all_places(streams):
    places = []
    for stream in streams:
        places += [(stream, t) for t in range(len(stream["clips"]))]
    return places


def evenly(items, limit):
    """At most `limit` of the items, evenly spread.

    >>> evenly("abcdefg", 3)
    ['a', 'c', 'e']
    """
    count = min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def in_chunks(items, size):
    return [items[first:first + size] for first in range(0, len(items), size)]


def fill_cache(S, out, cache, policy, judge, streams, memories, limits, planned=None):
    """GROUP samples of every context, with their format and quality rewards, appended chunk by chunk
    -> the rows of cache.jsonl."""
    part = out / "cache.part"
    written = {}
    for stream, notes in memories.items():
        written[stream] = [row["memory"] for row in notes]
    to_do = cache.chunks_to_do(S.CHUNK)
    chunks = progress(to_do, "rollout cache") if to_do else []
    for chunk in first_measured(chunks, len(to_do), planned, f"for {S.CHUNK} contexts"):
        groups = []
        to_sample = []
        keys = []
        for stream, t in my_share(chunk):
            context = make_context(stream, t, written[stream["stream"]], k=S.K)
            row = cache.rows.get((stream["stream"], t))
            group = Group(context, saved_samples(row))
            groups.append(group)
            if not group.samples:
                to_sample.append(group)
                keys.append((S.SEED, 8, zlib.crc32(stream["stream"].encode()), t))
        if to_sample:
            contexts = [group.context for group in to_sample]
            samples = rollout(policy, contexts, S.GROUP, keys)
            for group, answers in zip(to_sample, samples):
                group.samples = answers
        phase1.quality(groups, judge, S.MEMORY_TOKENS)
        rows = gather(list(map(cache_row, groups)))
        append_jsonl(part, rows)
        cache.rows |= {(row["stream"], row["clip"]): row for row in rows}
    return publish(S, out, cache, streams, limits)


def publish(S, out, cache, streams, limits):
    """Writes cache.jsonl, in the order of streams and clips, and from how many clips it was drawn."""
    names = {name_of(place) for place in cache.old + cache.new}
    rows = []
    for stream, t in all_places(streams):
        if (stream["stream"], t) in names:
            row = cache.rows[stream["stream"], t]
            row["environments"] = learners(stream, stream["clips"][t], limits)
            rows.append(row)
    failed = count_unjudged(rows)
    if failed * 2 > len(rows) * S.GROUP:
        raise SystemExit(said_once(f"the judge failed on {failed} of {len(rows) * S.GROUP} cached "
                                   "samples; mend it and run the same command again"))
    write_jsonl(out / "cache.jsonl", rows)
    considered = {stream["stream"]: len(stream["clips"]) for stream in streams}
    write_json(out / "considered.json", considered)
    if is_first_rank():
        (out / "cache.part").unlink(missing_ok=True)
    return rows


def saved_samples(row):
    """The samples of a row of the cache, to be judged again; none without a row."""
    samples = []
    for saved in row["samples"] if row else ():
        fields = {name: saved[name] for name in SAMPLED}
        samples.append(Sample(**fields))
    return samples


def has_unjudged(row):
    """Whether a judge failed on a sample of a row of the cache. A missing row has none."""
    return row is not None and count_unjudged([row]) > 0


def count_unjudged(rows):
    """Samples in rows of the cache whose quality is missing."""
    count = 0
    for row in rows:
        count += [sample["quality"] for sample in row["samples"]].count(None)
    return count


# What a row of the cache keeps of a sample beside its rewards.
SAMPLED = ("ids", "text", "memory", "thinking_tokens", "memory_tokens", "truncated")


def cache_row(group):
    """A row of cache.jsonl. Which environments may learn from it is filled in when it is published."""
    context = group.context
    samples = []
    for sample in group.samples:
        samples.append({name: getattr(sample, name) for name in SAMPLED} | {
            "format": 0.0 if sample.memory else phase1.FORMAT,
            "quality": sample.quality})
    return {"stream": context.stream, "clip": context.clip, "history": context.history,
            "environments": [], "samples": samples}


def cached_context(stream, row, window):
    """The context of a row of cache.jsonl, with the history that it was sampled with."""
    first = row["clip"] - len(row["history"])
    return make_context(stream, row["clip"], dict(enumerate(row["history"], first)), k=window)


# ================================================================ asked by hand
def ask_by_hand(S, argv):
    """Answers ASK from the notes alone. It needs no video and takes no lock, so another process may be watching."""
    folder = need(S, "tasks/memories.jsonl").parent
    S = as_in_the_run(S, argv, folder)
    question = " ".join(S.ASK.split())
    if not question:
        raise SystemExit("ASK is empty: put the question in quotes")
    notes = notes_of(S, folder)
    entries = [note for note in notes if note[2]]
    if not entries:
        raise SystemExit(f"{folder} holds no note yet: run python 03_collect_tasks.py --RUN={S.RUN} "
                         "without ASK, which watches")
    judge = load_judge(S, functools.cache(lambda: load_policy(S)), shows_frames=False)
    retrieve = Retriever(entries, load_tokenizer(S))
    entries, is_part = retrieve(question, [], math.inf, S.READER_TOKENS)
    [found] = once(lambda: judge.ask(ASKED, [{"question": question, "entries": entries}]))
    if found is None:
        raise SystemExit(said_once("the judge gave no answer that can be read: ask again"))
    say_answer(found, entries)
    row = {"task": "", "stream": S.STREAM or "*", "environment": S.ENVIRONMENT,
           "time": max(end for _, end, *_ in notes), "question": question, "options": [],
           "answer": None, "reply": found["answer"], "correct": None}
    join_recent(S, folder, row | {"retrieved": True} if is_part else row)


def as_in_the_run(S, argv, folder):
    """The constants with which the run was made, such as JUDGE, where argv doesn't say otherwise."""
    saved = read_json(folder / "settings.json")
    arguments = []
    for name, value in saved.items():
        if hasattr(S, name) and name not in ("SCRIPT", "COMMAND"):
            arguments.append(f"--{name}={value}")
    return settings(globals(), [*arguments, *argv])


def notes_of(S, folder):
    """[[start, end, memory, stream]] of STREAM, or of all, as ENVIRONMENT's adapter wrote it, or else Phase One."""
    rows = {}
    for name in ("memories.jsonl", f"adapted/{slug(S.ENVIRONMENT)}.jsonl"):
        for row in read_growing(folder / name):
            rows.setdefault(row["stream"], {})[row["clip"]] = row
    if S.STREAM and S.STREAM not in rows:
        names = ", ".join(list(rows)[:5])
        raise SystemExit(f"STREAM={S.STREAM}: there are notes of {len(rows)} streams, "
                         f"such as {names}")
    notes = []
    for stream, of_stream in rows.items():
        if S.STREAM in ("", stream):
            for _, row in sorted(of_stream.items()):
                notes.append([row["start"], row["end"], row["memory"], stream])
    return notes


def say_answer(found, entries):
    if found["answer"] == judges.INSUFFICIENT:
        print("The notes don't tell.")
        return
    print(f"{found['answer']}\nThis rests on:")
    for number in found["entries"]:
        print("    " + printed(entries[number - 1]).replace("\n", "\n    "))


def join_recent(S, folder, row):
    """Adds a question that was asked by hand to the log, and to the recent questions of its environment."""
    streams = find(S, "streams/streams.jsonl")
    splits = [stream["split"] for stream in read_jsonl(streams)] if streams else []
    if S.ASK_ONLY:
        return
    if folder.parent != ROOT / "runs" / S.RUN:
        print(f"The notes are those of {folder.parent}, so the question joins no recent ones.")
        return
    if "online" in splits:
        print("The streams are a benchmark's, whose first questions are the recent ones for ever, "
              "so this one doesn't join them.")
        return
    file = folder / "recent.json"
    recent = read_json(file) if file.exists() else {}
    if recent and row["environment"] not in recent:
        print(f"*** {row['environment']} is a new environment, beside {', '.join(recent)} ***")
    asked = read_progress(folder / "asked.jsonl")
    row["task"] = f"asked-{len(asked) + 1}"
    append_jsonl(folder / "asked.jsonl", [row])
    latest = latest_questions([*asked, row], S.RECENT, S.LATER)
    write_json(file, recent | {row["environment"]: latest[row["environment"]]})
    learners = "04 and 05" if (folder / "cache.jsonl").exists() else "03 (without ASK), 04 and 05"
    print(f"The question is one of the recent ones of {row['environment']} now: {learners}, run "
          "again, learn from it.")


# ================================================================ the stage
LEVERS = ("contexts", "THINK_TOKENS")    # what to lower where the plan exceeds a day


def work(plan, S, sizes):
    """What this stage does, for the plan (support/hours.py)."""
    if sizes.clips:
        plan.watch("watch", sizes.clips, sizes.streams)
    if sizes.adapters:
        plan.sample("watch: adapters", sizes.adapters * sizes.clips, 1, sizes.streams)
    if sizes.questions:
        plan_answers(plan, S, sizes, sizes.questions, S.CHUNK)
    if sizes.contexts:
        plan.sample("cache", sizes.contexts, S.GROUP, S.CHUNK)
        plan.see("cache", sizes.contexts * S.K)
        phase1.plan_quality(plan, S, sizes.contexts * S.GROUP, S.CHUNK * S.GROUP, S.GROUP)


def plan_answers(plan, S, sizes, questions, at_once):
    """The reader's answers, `at_once` in a call: it reads all memories of a stream, as far as they fit."""
    memories = sizes.notes + sizes.clips // max(1, sizes.streams)
    notes = min(memories * (S.MEMORY_TOKENS + hours.STAMP), S.READER_TOKENS)
    plan.judge("answers", questions, at_once, notes, hours.QUESTION)


def planned_sizes(S):
    """The Sizes of a run that has not begun, for --PLAN=1."""
    sizes = sizes_of(S, "deploy")
    sizes.contexts = min(sizes.contexts, S.CACHE_CONTEXTS)
    path = find(S, "streams/streams.jsonl")
    if path and is_benchmark(read_jsonl(path)):
        first = sizes.environments * (S.RECENT + S.LATER)
        sizes.questions = min(sizes.questions, first)
    return sizes


def main(argv=None):
    S = settings(globals(), argv)
    if S.PLAN:
        say_plan(S, work, planned_sizes(S), LEVERS)
        return
    if S.ADAPTER and not S.ADAPTER.startswith(("dpo-", "grpo-")):
        raise SystemExit(f"ADAPTER={S.ADAPTER}: here it names what 05 has made by ALGORITHM and "
                         'ADAPTER, like dpo-steer; "": no adapter writes')
    if S.ASK:
        ask_by_hand(S, sys.argv[1:] if argv is None else argv)
        return
    out = start(S, "tasks", answer, right, phase1.quality, build_prompt)
    streams = load_streams(S, "deploy")
    names = {stream["stream"] for stream in streams}
    tasks = [task for task in read_jsonl(need(S, "streams/tasks.jsonl")) if task["stream"] in names]
    adapter = need(S, "phase1/adapter")
    say_what_differs(adapter.parent, "02_phase1_train.py", phase1.quality, build_prompt)

    # ---- what is new
    is_online = is_benchmark(streams)
    asked = read_asked(out / "asked.jsonl")
    to_ask = spread(tasks)
    if is_online:
        first = first_questions(tasks, S.RECENT + S.LATER)
        to_ask = sum(first.values(), [])
        if tasks:
            streams = seen_by_then(streams, first, S.CACHE_STREAMS)
    news = what_is_new(S, out, streams, to_ask, asked)
    news.say()
    say_unseen(news.questions, streams)
    planned = say_plan(S, work, news.sizes(), LEVERS)
    # The judge comes first, because one that can't be had should be told before hours of watching.
    get_policy = functools.cache(functools.partial(load_phase1, S, adapter))
    judge = load_judge(S, get_policy) if news.needs_judge else None

    # ---- memories
    memories = news.memories
    if news.clips:
        policy = get_policy()
        load_adapters(policy, news.adapters)
        memories = watch(policy, streams, path=out / "memories.jsonl", beside=news.beside,
                         planned=planned.hours_of("watch"))
    write_readable(out / "memories", memories)
    for environment, notes in news.adapted.items():
        adapted = {stream: rows for stream, rows in notes.memories.items() if has_adapted(rows)}
        write_readable(out / "memories" / slug(environment), adapted)

    # ---- questions, answered from memory
    answer_new(S, judge, news, asked, memories, out / "asked.jsonl")
    recent = latest_questions(asked.values(), S.RECENT, S.LATER)
    if is_online:
        recent = {}
        for environment, some in first.items():
            recent[environment] = [asked[identity(task)] for task in some]
    if not recent:
        print("no tasks ask about these streams: the memories are all there is to make "
              "(see tasks.jsonl in 01)")
        return
    stop_where_most_failed(recent)
    say_replies(recent, news.questions + news.again, S.RECENT)

    # ---- the rollout cache
    limits = learns_until(tasks, recent, S.RECENT)
    planned_hours = planned.hours_of("cache", "judge")
    policy = get_policy() if news.cache.missing else None
    cached = fill_cache(
        S, out, news.cache, policy, judge, streams, memories, limits, planned_hours)
    if not is_online:                            # a question may have been asked by hand meanwhile
        asked = read_asked(out / "asked.jsonl")
        recent = latest_questions(asked.values(), S.RECENT, S.LATER)
    write_json(out / "recent.json", recent)
    say_what_failed(recent, cached)
    done = "finished before:" if news.is_empty else "memories, answers and the rollout cache are in"
    print(f"{done} {out}; next: {next_command(S, '04_train_reward.py')}")


def is_benchmark(streams):
    return any(stream["split"] == "online" for stream in streams)


def load_phase1(S, adapter):
    policy = load_policy(S)
    load_adapter(policy, "phase1", adapter)
    return policy


# ---------------------------------------------------------------- adapters at work
def find_adapters(S, environments):
    """{environment: folder} of the adapters that 05 has made in this run."""
    folders = {}
    for environment in environments:
        folder = ROOT / "runs" / S.RUN / "phase2" / S.ADAPTER / slug(environment) / "adapter"
        if S.ADAPTER and any(folder.glob("*.safetensors")):
            folders[environment] = folder
    return folders


def load_adapters(policy, folders):
    for environment, folder in folders.items():
        load_adapter(policy, writer_of(environment), folder)
    policy.use("phase1")


def writer_of(environment):
    return f"phase2:{environment}"


def adapted_notes(S, out, environments, folders, memories):
    """{environment: its Notes}, where an adapter has written or is about to.

    They hold the adapter's memory of a clip where there is one, else Phase One's (memories: {stream: rows}). In each
    round `watch` adds the adapters' rows before Phase One's. So where Phase One has a clip and the adapter has not,
    there was no adapter then, and after a SIGKILL an adapter may be a clip ahead.
    """
    adapted = {}
    for environment in environments:
        path = out / "adapted" / f"{slug(environment)}.jsonl"
        written = {(row["stream"], row["clip"]): row for row in read_progress(path)}
        if not written and environment not in folders:
            continue
        merged = {}
        for stream, rows in memories.items():
            merged[stream] = [written.get((stream, t), row) for t, row in enumerate(rows)]
            while (stream, len(merged[stream])) in written:
                merged[stream].append(written[stream, len(merged[stream])])
        policy = ""
        if environment in folders:
            # Which adapter it was: 05 makes it anew when the recent questions change.
            policy = f"{S.ADAPTER} {fingerprint(folders[environment])[:8]}"
        adapted[environment] = Notes(writer_of(environment), merged, path, policy=policy)
    return adapted


# ---------------------------------------------------------------- what is new
@dataclass
class News:
    """What there is to do, and what was done before."""
    streams: list        # that have new clips
    clips: int           # that nothing was written of yet
    memories: dict       # {stream: rows} that were written before
    questions: list      # tasks that were never asked
    again: list          # questions that the judge has failed on, with the recent ones beside them
    answered: int        # questions that were asked before
    cache: Cache
    adapters: dict       # {environment: folder} of those that write the new clips, too
    adapted: dict        # {environment: Notes} where an adapter has written or is about to

    @property
    def beside(self):
        """Notes of those who write beside Phase One."""
        return [self.adapted[environment] for environment in self.adapters]

    @property
    def needs_judge(self):
        cache = self.cache
        return bool(self.questions or self.again or cache.missing or cache.unjudged)

    @property
    def is_empty(self):
        return not self.clips and not self.needs_judge

    def sizes(self):
        environments = len({task["environment"] for task in self.questions})
        written = sum(map(len, self.memories.values()))
        return Sizes("what is new", len(self.streams), self.clips, len(self.cache.missing),
                     environments, len(self.questions), notes=written // len(self.memories),
                     adapters=len(self.adapters))

    def say(self):
        written = sum(map(len, self.memories.values()))
        print(f"new: {self.clips} clips of {len(self.streams)} streams, "
              f"{len(self.questions)} questions, {len(self.cache.missing)} contexts to cache; "
              f"before: {written} memories, {self.answered} questions, "
              f"{len(self.cache.old)} contexts")
        if self.clips and self.adapters:
            print(f"{1 + len(self.adapters)} memories of each new clip: by Phase One, and by the "
                  f"adapters of {', '.join(self.adapters)}")


def what_is_new(S, out, streams, to_ask, asked):
    memories = {stream["stream"]: [] for stream in streams}
    go_on(memories, out / "memories.jsonl")
    clips = 0
    growing = []
    for stream in streams:
        new_clips = len(stream["clips"]) - len(memories[stream["stream"]])
        if new_clips > 0:
            clips += new_clips
            growing.append(stream)
    questions = [task for task in to_ask if identity(task) not in asked]
    # Where the judge failed on a question it is asked again, in the company of the recent ones: then a few that it
    # refuses are a few among many.
    recent = latest_questions(asked.values(), S.RECENT, S.LATER)
    company = {identity(task) for task in sum(recent.values(), [])}
    again = []
    for name, task in asked.items():
        if task["stream"] in memories and (task["reply"] is None or name in company):
            again.append(task)
    if all(task["reply"] is not None for task in again):
        again = []
    # Without questions nothing is cached.
    cached_streams = streams if to_ask or asked else []
    cache = read_cache(S, out, cached_streams)
    environments = sorted({task["environment"] for task in asked.values()})
    # A benchmark leaves the adapters to 06.
    adapters = {}
    if not is_benchmark(streams):
        adapters = once(lambda: find_adapters(S, environments))
    adapted = adapted_notes(S, out, environments, adapters, memories)
    return News(
        growing, clips, memories, questions, again, len(asked), cache, adapters, adapted)


def say_unseen(tasks, streams):
    """Warns where questions come before anything can be known."""
    first_end = {stream["stream"]: stream["clips"][0]["end"] for stream in streams}
    unseen = [task for task in tasks if task["time"] < first_end.get(task["stream"], math.inf)]
    if unseen:
        example = f"{unseen[0]['task']} at {unseen[0]['time']:g} s"
        print(f"*** {len(unseen)} questions are asked before any clip has ended, when nothing is "
              f"known, e.g. {example} ***")


# ---------------------------------------------------------------- memories and replies, to be read
def write_readable(folder, memories):
    """A text for each stream, with the times of its clips; where adapters have written, with who wrote what."""
    written = 0
    for stream, rows in memories.items():
        entries = [stream + "\n"] if slug(stream) != stream else []
        shows_writers = has_adapted(rows)
        for row in rows:
            time = f"{clock(row['start'])}-{clock(row['end'])}"
            who = f"  {row.get('policy', 'phase1')}" if shows_writers else ""
            nothing = "(the video is damaged here)" if row.get("grey") else "(nothing)"
            entries.append(f"{time}{who}\n{row['memory'] or nothing}\n")
            written += bool(row["memory"])
        write_text(folder / f"{slug(stream)}.txt", "\n".join([*entries, ""]))
    clips = sum(len(rows) for rows in memories.values())
    print(f"memories of {written} of {clips} clips: {folder}")


def has_adapted(rows):
    """Whether an adapter wrote some of the rows."""
    return any("policy" in row for row in rows)


def answer_new(S, judge, news, asked, memories, path):
    """Asks what has no reply yet, and adds the rows to `asked` and to the log at `path`, chunk by chunk.

    A row is the task with its "reply" (None where the reader or the judge failed), whether it is "correct" (None
    where no answer is known, too), and "retrieved" where a part of the memories was read.
    """
    to_do = []
    for chunk in in_chunks(news.again, S.CHUNK) + in_chunks(news.questions, S.CHUNK):
        if any(lacks_reply(task, asked) for task in chunk):
            to_do += by_notes(chunk, news.adapted, memories)
    for chunk, notes in progress(to_do, "answers", leave=False):
        replies, retrieved = answer(S, judge, chunk, notes)
        correct = right(judge, chunk, replies)
        rows = []
        for task, reply, is_right, is_part in zip(chunk, replies, correct, retrieved):
            if not lacks_reply(task, asked):
                continue
            if is_right is None and has_answer(task):
                reply = None
            row = task | {"reply": reply, "correct": is_right}
            rows.append(row | {"retrieved": True} if is_part else row)
        append_jsonl(path, rows)
        for row in rows:
            asked[identity(row)] = row
    # What failed at first stands there twice.
    log = read_progress(path)
    once_each = {identity(row): row for row in log}
    if len(once_each) < len(log):
        write_jsonl(path, list(once_each.values()))


def by_notes(tasks, adapted, memories):
    """[(tasks, the memories that they are answered from)]: an adapter's where their environment has one."""
    groups = {}
    for task in tasks:
        name = task["environment"] if task["environment"] in adapted else ""
        groups.setdefault(name, []).append(task)
    answered_from = {"": memories}
    for environment, notes in adapted.items():
        answered_from[environment] = notes.memories
    return [(group, answered_from[name]) for name, group in groups.items()]


def lacks_reply(task, asked):
    row = asked.get(identity(task))
    return row is None or row["reply"] is None


def stop_where_most_failed(recent):
    rows = sum(recent.values(), [])
    failed = [row["reply"] for row in rows].count(None)
    if failed * 2 > len(rows):
        raise SystemExit(said_once(f"the judge failed on {failed} of {len(rows)} recent "
                                   "questions; mend it and run the same command again"))


def say_replies(recent, tasks, n):
    """Prints the replies to those of the tasks that are among the n recent questions of an environment."""
    new = {identity(task) for task in tasks}
    for environment, rows in recent.items():
        rows = rows[:n]
        if not any(identity(row) in new for row in rows):
            continue
        known = [row["correct"] for row in rows if row["correct"] is not None]
        counted = "no answers known"
        if known:
            counted = f"{known.count(True)} of {len(known)} answered right"
        print(f"{environment}, {len(rows)} recent questions: {counted}")
        for row in rows:
            if identity(row) in new:
                print(f"    {row['question']}  ->  {in_words(row)}")


def in_words(row):
    """A reply to be read."""
    words = row["reply"]
    if words is None:
        return "(the judge failed)"
    if words == judges.INSUFFICIENT:
        words = "the notes don't tell"
    for option in row["options"]:
        if option.startswith(f"{row['reply']}. "):
            words = option
    mark = {True: " (right)", False: " (wrong)", None: ""}[row["correct"]]
    return words + mark


def say_what_failed(recent, cached):
    """Says on how much of what is published the judge has failed."""
    unanswered = [row["reply"] for row in sum(recent.values(), [])].count(None)
    unjudged = count_unjudged(cached)
    if unanswered or unjudged:
        print(f"*** the judge has failed on {unanswered} recent questions and {unjudged} samples, "
              "which are left out from here on; this command asks for them again ***")


if __name__ == "__main__":
    main()
