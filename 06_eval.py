"""Watch the test streams with every policy, answer from its memories alone, write the report.

A policy watches each test stream once, clip by clip, with its own memories as history. A reader
answers the questions of *every* environment (a kind of question, as in the paper) from these
memories, so the matrix of transfer between environments costs no second watching. Without TRANSFER
an adapter watches what its own environment asks about. "+ task prompt" is told the recent
questions, so it watches once for each environment.

Memories are judged twice. "As deployed": a part of those that the answers came from. "In the same
contexts": all policies write once more, at temperature 1 and with Phase One's history, in contexts
that 03 has not cached. Both times win / tie / loss are against Phase One. Of online streams (see
01), what was seen up to an environment's last recent question keeps the memories that were written
without the environment's adapter or prompt.

Differences from the paper:
- 95 % intervals, by a bootstrap over streams, because questions about one stream share its
  memories. With fewer than 5 streams it is over questions.
- The questions after the update (scope "after") stand apart from "all", which pools the first
  recent questions as the paper does.
- A reply that the judge failed to give is dropped and counted, never a miss.

A question whose answer isn't known is not asked here, since nothing could be counted.

Run:  python 06_eval.py    (What a policy has finished is stored: interrupt it, or train another
      adapter, and go on. Toy world: 144 s on two cores.)
In:   streams/*.jsonl, phase1/adapter, tasks/recent.json and cache.jsonl, phase2/*/*/adapter
      (whichever exist)
Out:  eval/results.json, results.md, report.html (one file, opens offline), memories.jsonl
"""
import functools
import random
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from common import (build_prompt, load_judge, load_policy, make_context, per_model, rollout,
                    settings, stage, watch)
from support import figures, report
from support.hours import say_plan, sizes_of
from support.judges import ask_in_shares
from support.ranks import gather, is_first_rank, my_share, once, progress, said_once
from support.runs import (NOT_COMPARED, ROOT, as_written, fingerprint, load_streams, need,
                          next_command, read_json, read_jsonl, say_what_differs, slug, start,
                          write_json, write_jsonl, write_text)
from support.weights import load_adapter, load_tokenizer

phase1 = stage("02_phase1_train")
collect = stage("03_collect_tasks")
reward_stage = stage("04_train_reward")

# ------------------------------------------------------------------------------------------------
STREAMS = 0                      # test streams to watch; 0: all of them
METHODS = ""                     # beside base and phase1, like base+prompt,dpo-steer; "": all
EXPECT = "dpo-steer,grpo-steer"  # Phase Two methods that should be there; others found join in
RECENT = 5                       # questions in a task prompt and in scope "all" (paper: 5)
TRANSFER = per_model(1, 0)       # 1: adapters also answer what the other environments ask
READERS = ""                     # others who answer from the same memories, like local,openai:MODEL
VALIDATE = 160                   # memories of a method that are judged as deployed, and contexts in
                                 # which it writes once more; dealt out to its adapters
VALIDATE_TEMPERATURE = 1.0       # in the same contexts: as in training, where answers differ most
BOOTSTRAP = 2000                 # draws of the streams: an interval ends within about 0.3 points
EXAMPLES = 3                     # clips shown in the report with their frames
# ------------------------------------------------------------------------------------------------


# ================================================================ who is examined
@dataclass
class Examinee:
    """A policy that is examined: a method, and the environment its adapter or prompt is for."""
    method: str                     # "base", "phase1", "base+prompt", "dpo-steer", ...
    environment: str                # "": it is for all of them
    writer: str                     # whose weights write: "base", "phase1", "phase2"
    folder: Path | None = None      # of the Phase Two adapter

    @property
    def slug(self):
        return f"{self.method}.{slug(self.environment)}" if self.environment else self.method

    @property
    def is_prompted(self):
        return self.method.endswith("+prompt")

    def is_for(self, environment):
        return self.environment in ("", environment)


BASE = Examinee("base", "", "base")
PHASE1 = Examinee("phase1", "", "phase1")


def find_examinees(S, environments):
    """All of them, base and Phase One first. Says which expected Phase Two adapters are missing."""
    examinees = []
    for plain in (BASE, PHASE1):
        examinees.append(plain)
        for environment in environments:
            examinees.append(Examinee(f"{plain.method}+prompt", environment, plain.writer))
    folders = once(lambda: find_adapters(S))     # a neighbour may finish one while the ranks look
    expected = (S.METHODS or S.EXPECT).split(",")
    found = sorted({method for method, _ in folders})
    for method in dict.fromkeys(expected + found):
        is_phase2 = method.split("+")[0] not in ("base", "phase1")
        if not is_phase2 or not is_wanted(S, method):
            continue
        missing = []
        for environment in environments:
            folder = folders.get((method, slug(environment)))
            if folder:
                examinees.append(Examinee(method, environment, "phase2", folder))
            else:
                missing.append(environment)
        if missing:
            say_missing(S, method, missing)
    return [examinee for examinee in examinees if is_wanted(S, examinee.method)]


def is_wanted(S, method):
    return not S.METHODS or method in ("base", "phase1", *S.METHODS.split(","))


def find_adapters(S):
    """{(method, slug of the environment): folder} of the Phase Two adapters of RUN and FROM."""
    own = ROOT / "runs" / S.RUN
    runs = [own]
    # The adapters of FROM belong to its Phase One: a fork that has its own can't use them.
    if S.FROM and not (own / "phase1" / "adapter").exists():
        runs = [ROOT / "runs" / S.FROM, own]
    folders = {}
    for run in runs:
        for file in run.glob("phase2/*/*/adapter/*.safetensors"):
            method, environment = file.parts[-4:-2]
            folders[method, environment] = file.parent
    return folders


def say_missing(S, method, environments):
    constants = ("ALGORITHM", "ADAPTER", "NAME")              # a method's name is made of these
    arguments = [f"--{name}={value}" for name, value in zip(constants, method.split("-", 2))]
    how = next_command(S, "05_phase2_train.py", *arguments)
    print(f"!! {method}: no adapter for {', '.join(environments)}, left out here (05 makes none "
          f"where there is no pair). To make it: {how}")


# ================================================================ on what
@dataclass
class Exam:
    """What all are examined on, with what, and where it is written."""
    S: SimpleNamespace
    out: Path
    policy: "LazyPolicy"
    streams: list           # rows of streams.jsonl, test and online, that a task is about
    tasks: list             # rows of tasks.jsonl about them, of the environments below
    recent: dict            # environment -> its RECENT tasks, with Phase One's replies (03)
    questions: dict         # environment -> their texts
    key: str                # hash of all that the results depend on

    @property
    def environments(self):
        return list(self.recent)

    def key_of(self, examinee):
        return fingerprint(self.key, examinee.method, examinee.environment, examinee.folder)


def load_exam(S, out, phase1_adapter):
    streams = load_streams(S, "test")
    collect.check_recent(S, streams)
    recent = read_json(need(S, "tasks/recent.json"))
    names = {stream["stream"] for stream in streams}
    tasks = []
    for task in read_jsonl(need(S, "streams/tasks.jsonl")):
        if task["environment"] in recent and task["stream"] in names:
            tasks.append(task)
    recent, tasks = with_answers(recent, tasks)
    recent = {environment: asked[:S.RECENT] for environment, asked in recent.items()}
    questions = {}
    for environment, asked in recent.items():
        questions[environment] = [task["question"] for task in asked]
    streams = streams_of(tasks, streams)
    if S.STREAMS:
        streams = streams[:S.STREAMS]
    names = {stream["stream"] for stream in streams}
    tasks = [task for task in tasks if task["stream"] in names]
    constants = {name: value for name, value in vars(S).items() if name not in NOT_COMPARED}
    early = sorted(figures.early_tasks(recent))
    key = fingerprint(constants, phase1_adapter, as_written(S, streams), questions, early)
    return Exam(S, out, LazyPolicy(S, phase1_adapter), streams, tasks, recent, questions, key)


def with_answers(recent, tasks):
    """(recent, tasks) without questions whose answer isn't known, and without environments that are left with none.

    A recent question needs no answer. Says what is left out. SystemExit where that is everything.
    """
    answered = [task for task in tasks if collect.has_answer(task)]
    environments = {task["environment"] for task in answered}
    without = [environment for environment in recent if environment not in environments]
    if not answered:
        raise SystemExit(f"no test or online stream has a question of {', '.join(without)} with an answer "
                         f"({len(tasks)} without): 06 counts right answers. 01 takes them up")
    if len(answered) < len(tasks):
        print(f"{len(tasks) - len(answered)} of {len(tasks)} questions have no answer and are not asked")
    if without:
        print(f"*** left out, as no question has an answer: {', '.join(without)} ***")
    return {name: asked for name, asked in recent.items() if name not in without}, answered


def streams_of(tasks, streams):
    """Those of the streams that a task is about."""
    names = {task["stream"] for task in tasks}
    return [stream for stream in streams if stream["stream"] in names]


def tasks_for(exam, examinee):
    """What an examinee is asked."""
    early = figures.early_tasks(exam.recent)
    asked = []
    for task in exam.tasks:
        # Before the update all write as Phase One, whose replies 03 has. Only the base has its own.
        is_new = task["task"] not in early or examinee.method == "base"
        if is_new and (exam.S.TRANSFER or examinee.is_for(task["environment"])):
            asked.append(task)
    return asked


class LazyPolicy:
    """The policy, which is loaded when the first memory that isn't stored is asked for."""

    def __init__(self, S, phase1_adapter):
        self.S = S
        self.phase1_adapter = phase1_adapter
        self.policy = None
        self.folder = None                             # of the Phase Two adapter that is loaded

    def load(self):
        if self.policy is None:
            self.policy = load_policy(self.S)
            load_adapter(self.policy, "phase1", self.phase1_adapter)
        return self.policy

    def using(self, examinee):
        """A context in which the policy writes as the examinee, with its adapters."""
        policy = self.load()
        if examinee.folder and examinee.folder != self.folder:
            load_adapter(policy, "phase2", examinee.folder)
            self.folder = examinee.folder
        return policy.using(examinee.writer)


def read_stored(path, key):
    """The rows of a file that was made with this key; None where there is no such file."""
    rows = once(lambda: read_jsonl(path) if path.exists() else [])
    return rows[1:] if rows and rows[0] == {"fingerprint": key} else None


def store(path, key, rows):
    write_jsonl(path, [{"fingerprint": key}, *rows])


# ================================================================ watch
def watch_streams(exam, examinee, memories, description):
    """Rows {stream, clip, start, end, memory} of a pass over the streams; "" where malformed.

    memories: {slug: rows} of those who watched before, base and Phase One first.
    """
    key = exam.key_of(examinee)
    path = exam.out / "memories" / f"{examinee.slug}.jsonl"
    rows = read_stored(path, key)
    if rows is not None:
        return rows
    path.parent.mkdir(exist_ok=True)
    streams = streams_of(tasks_for(exam, examinee), exam.streams)
    questions = exam.questions[examinee.environment] if examinee.is_prompted else ()
    begun = written_before(exam, examinee, memories)
    # Unfinished work is named by the key, so that only a run with the same one goes on from it.
    unfinished = path.with_suffix(f".{key[:12]}.part")
    with exam.policy.using(examinee) as policy:
        watched = watch(policy, streams, questions, unfinished, begun, description)
    rows = []
    for stream in streams:
        for row in watched[stream["stream"]]:
            rows.append({name: value for name, value in row.items() if name != "text"})
    store(path, key, rows)
    if is_first_rank():
        unfinished.unlink(missing_ok=True)
    return rows


def written_before(exam, examinee, memories):
    """{stream: its first rows}, written before the examinee had its adapter or its prompt.

    They are about the streams of its environment's recent questions, up to the last of these.
    """
    if not examinee.environment:
        return {}
    plain = BASE if examinee.writer == "base" else PHASE1
    last = collect.last_asked(exam.recent[examinee.environment])
    begun = {stream: [] for stream in last}
    for row in memories[plain.slug]:
        if row["end"] <= last.get(row["stream"], -1):
            begun[row["stream"]].append(row)
    return begun


# ================================================================ answer
def answer_tasks(exam, judge, examinee, tasks, memories, folder):
    """Rows of `answer`, stored in a folder."""
    rows = stored_answers(exam, examinee, tasks, folder)
    if rows is None:
        rows = answer(exam.S, judge, tasks, memories)
        key = fingerprint(exam.key_of(examinee), tasks)
        store(folder / f"{examinee.slug}.jsonl", key, rows)
    return rows


def stored_answers(exam, examinee, tasks, folder):
    """What `answer_tasks` has stored; None where an answer is missing, so that all are asked for again.

    An endpoint asks for what is missing alone, because it keeps its replies.
    """
    key = fingerprint(exam.key_of(examinee), tasks)
    rows = read_stored(folder / f"{examinee.slug}.jsonl", key)
    is_whole = rows is not None and all(row["correct"] is not None for row in rows)
    return rows if is_whole else None


def answer(S, judge, tasks, memories):
    """Rows {task, stream, environment, reply, correct, retrieved}.

    The reader gets what an examinee wrote before the question, and nothing else. memories: the rows
    of `watch_streams`. reply and correct are None where the judge failed.
    """
    of_stream = {task["stream"]: [] for task in tasks}
    for row in memories:
        if row["stream"] in of_stream:
            of_stream[row["stream"]].append(row)
    replies, retrieved = collect.answer(S, judge, tasks, of_stream)
    failed = replies.count(None)
    if 2 * failed > len(replies):
        raise SystemExit(said_once(f"the judge failed on {failed} of {len(replies)} questions: "
                                   "mend it and run the same command again"))
    correct = collect.right(judge, tasks, replies)
    rows = []
    for task, reply, is_correct, is_retrieved in zip(tasks, replies, correct, retrieved):
        rows.append({
            "task": task["task"],
            "stream": task["stream"],
            "environment": task["environment"],
            "reply": None if is_correct is None else reply,
            "correct": is_correct,
            "retrieved": is_retrieved,
        })
    return rows


def load_readers(exam, examinees):
    """{name: another reader}; None in the place of one whose answers are all stored."""
    readers = {}
    for name in exam.S.READERS.split(","):
        if not name:
            continue
        folder = exam.out / "answers" / slug(name)
        stored = [stored_answers(exam, examinee, tasks_of_reader(exam, examinee), folder)
                  for examinee in examinees]
        S = SimpleNamespace(**vars(exam.S) | {"JUDGE": name})
        readers[name] = None
        if None in stored:
            readers[name] = load_judge(S, exam.policy.load, shows_frames=False)
    return readers


def ask_reader(exam, name, reader, examinees, memories):
    """{slug: rows of `answer`} by another reader."""
    folder = exam.out / "answers" / slug(name)
    answers = {}
    for examinee in progress(examinees, name, leave=False):
        tasks = tasks_of_reader(exam, examinee)
        answers[examinee.slug] = answer_tasks(
            exam, reader, examinee, tasks, memories[examinee.slug], folder)
    return answers


def tasks_of_reader(exam, examinee):
    """What another reader is asked: what is asked of the examinee's own environment."""
    tasks = tasks_for(exam, examinee)
    return [task for task in tasks if examinee.is_for(task["environment"])]


# ================================================================ judge the memories as deployed
def judge_deployed(exam, judge, examinee, memories, tokenizer):
    """Rows as of `validate`, of memories that the answers came from: each with its own history.

    memories: {slug: rows of `watch_streams`}. Phase One is not compared with itself.
    """
    key = exam.key_of(examinee)
    path = exam.out / "deployed" / f"{examinee.slug}.jsonl"
    rows = read_stored(path, key)
    if rows is not None and are_judged(rows):
        return rows
    own = by_place(memories[examinee.slug])
    watched = own.keys() & by_place(memories[PHASE1.slug]).keys()
    contexts = []
    rows = []
    for stream, t in deployed_places(exam, examinee, watched):
        history = {clip: row["memory"] for (name, clip), row in own.items()
                   if name == stream["stream"] and clip < t}
        contexts.append(make_context(stream, t, history, k=exam.S.K))
        memory = own[stream["stream"], t]["memory"]
        tokens = len(tokenizer(memory)["input_ids"]) if memory else 0
        rows.append(unjudged_row(stream["stream"], t, memory, tokens))
    judge_quality(judge, rows, contexts)
    if examinee is not PHASE1:
        for environment, questions in exam.questions.items():
            if examinee.is_for(environment):
                judge_relevance(judge, rows, memories[PHASE1.slug], environment, questions)
    store(path, key, rows)
    return rows


def deployed_places(exam, examinee, watched):
    """(stream, clip) of the memories that are judged: an examinee's share of VALIDATE, by chance.

    watched: what both the examinee and Phase One watched. Methods that watched the same clips are
    judged on the same ones. What was written before the examinee had its adapter or its prompt is
    not its own.
    """
    tasks_before = exam.recent.get(examinee.environment, [])
    last = collect.last_asked(tasks_before)
    places = []
    for stream in exam.streams:
        for t, clip in enumerate(stream["clips"]):
            is_own = clip["end"] > last.get(stream["stream"], -1)
            if is_own and (stream["stream"], t) in watched:
                places.append((stream, t))
    random.Random(exam.S.SEED).shuffle(places)
    if not examinee.environment:
        return places[:exam.S.VALIDATE]
    # Dealt out to a method's examinees, so that each method is judged on as many memories.
    first = exam.environments.index(examinee.environment)
    return places[first:exam.S.VALIDATE:len(exam.environments)]


def by_place(rows):
    return {(row["stream"], row["clip"]): row for row in rows}


def unjudged_row(stream, clip, memory, tokens):
    """A row of `validate` before its verdicts. A malformed response is neither faithful nor clean."""
    unjudged = None if memory else False
    return {
        "stream": stream,
        "clip": clip,
        "memory": memory,
        "tokens": tokens,
        "faithful": unjudged,
        "clean": unjudged,
        "verdicts": {},             # environment -> "win", "tie" or "loss"
    }


# ================================================================ validate, in the same contexts
def validation_contexts(exam, memories):
    """Contexts with Phase One's memories as history, at random clips that 03 has not cached.

    memories: Phase One's rows.
    """
    cache = read_jsonl(need(exam.S, "tasks/cache.jsonl"))
    cached = {(row["stream"], row["clip"]) for row in cache}
    places = []
    for stream in streams_of(tasks_for(exam, PHASE1), exam.streams):
        for t in range(1, len(stream["clips"])):
            if (stream["stream"], t) not in cached:
                places.append((stream, t))
    history = {stream["stream"]: [] for stream in exam.streams}
    for row in memories:
        history[row["stream"]].append(row["memory"])
    number = min(exam.S.VALIDATE, len(places))
    contexts = []
    for stream, t in random.Random(exam.S.SEED).sample(places, number):
        contexts.append(make_context(stream, t, history[stream["stream"]], k=exam.S.K))
    return contexts


def write_reference(exam, contexts):
    """Rows of Phase One in all contexts: what every memory is compared with.

    When it is examined, it writes once more with other noise. So it does not tie with itself by
    construction.
    """
    path = exam.out / "checked" / "reference.jsonl"
    rows = read_stored(path, exam.key)
    if rows is None:
        rows = write_memories(exam, PHASE1, contexts, attempt=1)
        store(path, exam.key, rows)
    return rows


def validate(exam, judge, examinee, contexts, reference):
    """Rows {stream, clip, memory, tokens, faithful, clean, verdicts}: one sample a context."""
    # The contexts are dealt out to a method's examinees, so that each method writes once in each.
    if examinee.environment:
        first = exam.environments.index(examinee.environment)
        contexts = contexts[first::len(exam.environments)]
    key = exam.key_of(examinee)
    path = exam.out / "checked" / f"{examinee.slug}.jsonl"
    rows = read_stored(path, key)
    if rows is None:
        rows = write_memories(exam, examinee, contexts, attempt=0)
        store(path, key, rows)
    if not are_judged(rows):
        judge_quality(judge, rows, contexts)
        for environment, questions in exam.questions.items():
            if examinee.is_for(environment):
                judge_relevance(judge, rows, reference, environment, questions)
        store(path, key, rows)
    return rows


def are_judged(rows):
    """Whether no verdict is missing. Where one is, all are asked for again, as in `stored_answers`."""
    verdicts = []
    for row in rows:
        verdicts += [row["faithful"], row["clean"], *row["verdicts"].values()]
    return None not in verdicts


def write_memories(exam, examinee, contexts, attempt):
    """Rows as of `validate`, not judged yet. attempt: a number that changes the noise."""
    if examinee.is_prompted:
        questions = exam.questions[examinee.environment]
        contexts = [replace(context, questions=questions) for context in contexts]
    keys = [(exam.S.SEED, 9, attempt, i) for i in range(len(contexts))]
    with exam.policy.using(examinee) as policy:
        share = rollout(policy, my_share(contexts), 1, my_share(keys), exam.S.VALIDATE_TEMPERATURE)
    rows = []
    for context, (sample,) in zip(contexts, gather(share)):
        rows.append(unjudged_row(
            context.stream, context.clip, sample.memory or "", sample.memory_tokens))
    return rows


def judge_quality(judge, rows, contexts):
    """Fills in whether a memory is faithful and clean; None where the judge failed."""
    well_formed = [(row, context) for row, context in zip(rows, contexts) if row["memory"]]
    truths = []
    repetitions = []
    for row, context in well_formed:
        truths.append({"context": context, "memory": row["memory"]})
        repetitions.append({"previous": phase1.previous_memory(context), "memory": row["memory"]})
    faithful = ask_in_shares(judge, phase1.FAITHFUL, truths)
    clean = ask_in_shares(judge, phase1.CLEAN, repetitions)
    for (row, _), is_faithful, is_clean in zip(well_formed, faithful, clean):
        row["faithful"] = is_faithful
        row["clean"] = is_clean


def judge_relevance(judge, rows, reference, environment, questions):
    """Fills in the verdicts of one environment. A malformed response is never compared."""
    others = by_place(reference)
    compared = []
    pairs = []
    for row in rows:
        other = others[row["stream"], row["clip"]]["memory"]
        if row["memory"] and other:
            compared.append(row)
            pairs.append((row["memory"], other))
    for row, verdict in zip(compared, compare(judge, questions, pairs)):
        row["verdicts"][environment] = verdict


def compare(judge, questions, pairs):
    """For each pair "win", "tie" or "loss" of its first memory; None where the judge failed.

    What the judge says counts where both orders of a pair agree (see 04), and else it is a tie.
    """
    said = gather(reward_stage.in_both_orders(judge, questions, my_share(pairs)))
    words = {"first": "win", "second": "loss", "failed": None}
    return [words.get(word, "tie") for word in said]


# ================================================================ the stage
LEVERS = ("STREAMS", "environments", "THINK_TOKENS")     # lowered where the plan exceeds a day


def work(plan, S, sizes, methods=0):
    """What this stage does, for the plan (support/hours.py).

    methods: how many have an examinee for each environment; 0: those that METHODS or EXPECT names.
    """
    if not methods:
        names = S.METHODS or f"base+prompt,phase1+prompt,{S.EXPECT}"
        methods = len(names.split(","))
    streams = min(S.STREAMS or sizes.streams, sizes.streams)
    share = streams / sizes.streams
    clips = round(share * sizes.clips)
    clips_asked = clips if S.TRANSFER else round(share * sizes.clips_asked)
    questions = round(share * sizes.questions)
    of_methods = methods * sizes.environments
    # Base and Phase One watch all, and are asked everything.
    plan.watch("watch: base, Phase One", 2 * clips, streams)
    streams_asked = max(1, round(streams * clips_asked / max(1, clips)))
    plan.watch("watch: the others", of_methods * clips_asked, streams_asked)
    crossed = sizes.environments if S.TRANSFER else 1
    answers = (2 + methods * crossed) * questions
    collect.plan_answers(plan, S, sizes, answers, round(questions / max(1, sizes.environments)))
    # One more sample of Phase One is what the memories of all are compared with.
    memories = (3 + methods) * S.VALIDATE
    plan.sample("validate", memories, 1, S.VALIDATE)
    plan.see("validate", memories * S.K)
    # Judged are as many memories as deployed, and in the same contexts.
    judged = 2 * (2 + methods) * S.VALIDATE
    phase1.plan_quality(plan, S, judged, S.VALIDATE, 1)
    compared = (3 * sizes.environments + 2 * methods) * S.VALIDATE
    reward_stage.plan_comparisons(plan, S, compared, S.VALIDATE)


# Those whose edit asks for a new run: they hold the prompts of policy, judge and reader.
FUNCTIONS_THAT_MATTER = (build_prompt, phase1.quality, collect.answer, collect.right,
                         reward_stage.in_both_orders)


def main(argv=None):
    S = settings(globals(), argv)
    if S.PLAN:
        say_plan(S, work, sizes_of(S, "test"), LEVERS)
        return
    out = start(S, "eval", *FUNCTIONS_THAT_MATTER)
    need(S, "streams/streams.jsonl")
    phase1_adapter = need(S, "phase1/adapter")
    say_what_differs(phase1_adapter.parent, "02_phase1_train.py", build_prompt, phase1.quality)
    exam = load_exam(S, out, phase1_adapter)
    examinees = find_examinees(S, exam.environments)
    judge = None if is_all_judged(exam, examinees) else load_judge(S, exam.policy.load)
    readers = load_readers(exam, examinees)
    say_cost(exam, examinees)
    methods = len({examinee.method for examinee in examinees if examinee.environment})
    say_plan(S, functools.partial(work, methods=methods), sizes_of(S, "test"), LEVERS)
    # ---------------- watch and answer
    memories = {}
    answers = {}
    for number, examinee in enumerate(examinees, 1):
        name = examinee.slug
        description = f"{name} ({number} of {len(examinees)})"
        memories[name] = watch_streams(exam, examinee, memories, description)
        answers[name] = answer_tasks(
            exam, judge, examinee, tasks_for(exam, examinee), memories[name], out / "answers")
    # ---------------- judge the memories as deployed
    tokenizer = load_tokenizer(S)
    deployed = {}
    for examinee in progress(examinees, "judge memories", leave=False):
        deployed[examinee.slug] = judge_deployed(exam, judge, examinee, memories, tokenizer)
    # ---------------- validate in the same contexts
    contexts = validation_contexts(exam, memories[PHASE1.slug])
    reference = write_reference(exam, contexts)
    checked = {}
    for examinee in progress(examinees, "validate", leave=False):
        checked[examinee.slug] = validate(exam, judge, examinee, contexts, reference)
    # ---------------- other readers of the same memories
    other_answers = {}
    for name, reader in readers.items():
        other_answers[name] = ask_reader(exam, name, reader, examinees, memories)
    # ---------------- figures with intervals, files, report
    results = figures_of(exam, examinees, answers, other_answers, deployed, checked)
    write_json(out / "results.json", results)
    write_text(out / "results.md", report.markdown(results))
    write_memories_of_all(out / "memories.jsonl", examinees, memories)
    curves = report.training_curves(examinees, phase1_adapter)
    examples = report.examples(examinees, memories, exam.streams, S.EXAMPLES, S.FRAMES_PER_CLIP)
    write_text(out / "report.html", report.page(results, curves, examples))
    report.show(results)
    another_adapter = next_command(S, "05_phase2_train.py", "--ADAPTER=lora")
    print(f"made in {out}: results.json, results.md, memories.jsonl, report.html (opens offline)\n"
          f"next: an ablation (README), or another adapter:\n"
          f"  {another_adapter} && {next_command(S, '06_eval.py')}")


def is_all_judged(exam, examinees):
    """Whether all that the judge is asked for is stored: then the report needs no judge."""
    for examinee in examinees:
        tasks = tasks_for(exam, examinee)
        for folder in ("deployed", "checked"):
            file = exam.out / folder / f"{examinee.slug}.jsonl"
            rows = read_stored(file, exam.key_of(examinee))
            if rows is None or not are_judged(rows):
                return False
        if stored_answers(exam, examinee, tasks, exam.out / "answers") is None:
            return False
    return True


def say_cost(exam, examinees):
    clips = 0
    answers = 0
    for examinee in examinees:
        tasks = tasks_for(exam, examinee)
        answers += len(tasks)
        clips += sum(len(stream["clips"]) for stream in streams_of(tasks, exam.streams))
    print(f"cost: {len(examinees)} policies on {len(exam.streams)} test streams: {clips} memories, "
          f"{answers} answers, up to {exam.S.VALIDATE} validated memories a method; less what is "
          "stored")


def figures_of(exam, examinees, answers, other_answers, deployed, checked):
    """What results.json holds."""
    S = exam.S
    recent = {}
    for environment, asked in exam.recent.items():
        recent[environment] = [task for task in asked if collect.has_answer(task)]
    judged = [*deployed.values(), *checked.values()]
    bootstrap = figures.draw_units(
        exam.streams, recent, [*answers.values(), *judged], S.BOOTSTRAP, S.SEED)
    readers = {}
    for reader_name, replies in other_answers.items():
        summary = figures.summarise(examinees, replies, recent, bootstrap)
        readers[reader_name] = summary["rows"]
    return {
        "run": S.RUN,
        "source": exam.streams[0]["source"],
        "streams": len(exam.streams),
        "unit": bootstrap.unit,
        "readers": readers,
        **figures.summarise(examinees, answers, recent, bootstrap),
        "deployed": figures.summarise_validation(
            examinees, deployed, exam.environments, S.MEMORY_TOKENS, bootstrap),
        "validation": figures.summarise_validation(
            examinees, checked, exam.environments, S.MEMORY_TOKENS, bootstrap),
        "dropped": figures.count_dropped(answers.values(), judged),
    }


def write_memories_of_all(path, examinees, memories):
    rows = []
    for examinee in examinees:
        for row in memories[examinee.slug]:
            rows.append({"method": examinee.method, "environment": examinee.environment, **row})
    write_jsonl(path, rows)


if __name__ == "__main__":
    main()
