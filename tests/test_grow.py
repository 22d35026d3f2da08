"""03 again and again: streams that grow, questions that come later, answers that nobody knows."""
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from support import runs                                                    # noqa: E402
from support.weights import save_adapter                                    # noqa: E402
from tiny import world                                                      # noqa: E402
from test_online import KINDS, asked_at, write_run                          # noqa: E402
from test_stages import ALWAYS                                              # noqa: E402

collect = importlib.import_module("03_collect_tasks")
CONSTANTS = [*ALWAYS, "--RECENT=2", "--LATER=1", "--GROUP=2", "--CHUNK=3"]
# How many clips of each stream are there: in the end, and at two moments before.
STEPS = [{"a": 2}, {"a": 3, "b": 2}, {"a": 3, "b": 4, "c": 3}]


def collect_tasks(run, *argv):
    torch.set_num_threads(1)
    collect.main([f"--RUN={run}", *CONSTANTS, *argv])


@pytest.fixture(scope="module")
def life(tmp_path_factory, loaded):
    """A run on three deploy streams of a few clips, each with a question of two kinds after every clip but the first."""
    truths = {name: world.make_stream(world.stream_seed(9, "deploy", i), clips)
              for i, (name, clips) in enumerate(STEPS[-1].items())}
    tasks = []
    for name, truth in truths.items():
        times = range(20, 10 * len(truth) + 1, 10)
        for kind in KINDS:
            tasks += asked_at(truth, kind, times, name)
    run = write_run(tmp_path_factory.mktemp("life"), "videos", truths, tasks, loaded)
    loaded.drop("phase1")
    rows = runs.read_jsonl(run / "streams/streams.jsonl")
    runs.write_jsonl(run / "streams/streams.jsonl", [row | {"split": "deploy"} for row in rows])
    return run


@pytest.fixture(scope="module")
def whole(life, tmp_path_factory):
    """The same, after one run of 03."""
    run = copy_of(life, tmp_path_factory.mktemp("whole"))
    collect_tasks(run)
    return run


def copy_of(life, run):
    shutil.copytree(life, run, dirs_exist_ok=True)
    return run


def grow(life, run, clips):
    """Leaves so many clips of each stream, and the questions that have been asked by then."""
    streams = []
    for row in runs.read_jsonl(life / "streams/streams.jsonl"):
        if row["stream"] in clips:
            streams.append(row | {"clips": row["clips"][:clips[row["stream"]]]})
    tasks = [task for task in runs.read_jsonl(life / "streams/tasks.jsonl")
             if task["time"] <= 10 * clips.get(task["stream"], 0)]
    runs.write_jsonl(run / "streams/streams.jsonl", streams)
    runs.write_jsonl(run / "streams/tasks.jsonl", tasks)


def rows_of(run, name):
    return runs.read_jsonl(run / "tasks" / name)


def as_known(rows, *names):
    """{what a row is known by: row}; nothing stands twice."""
    known = {tuple(row[name] for name in names): row for row in rows}
    assert len(known) == len(rows)
    return known


def same_work(one, two):
    for name, *keys in (("memories.jsonl", "stream", "clip"), ("asked.jsonl", "task")):
        assert as_known(rows_of(one, name), *keys) == as_known(rows_of(two, name), *keys), name
    assert (one / "tasks/cache.jsonl").read_bytes() == (two / "tasks/cache.jsonl").read_bytes()


def by_environment(rows):
    environments = {}
    for row in rows:
        environments.setdefault(row["environment"], []).append(row["task"])
    return environments


# ================================================================ grown
def test_a_run_that_grew_in_three_steps_equals_one_over_the_whole(life, whole, tmp_path, monkeypatch, capsys):
    run, done = copy_of(life, tmp_path), Counter()

    def counted(module, name, count):
        function = getattr(module, name)

        @functools.wraps(function)               # so that 03 takes it for its own
        def wrapper(*args, **kwargs):
            done.update(count(*args))
            return function(*args, **kwargs)
        monkeypatch.setattr(module, name, wrapper)
    counted(common, "rollout", lambda policy, contexts, *_: [("watched", c.stream, c.clip) for c in contexts])
    counted(collect, "rollout", lambda policy, contexts, *_: [("cached", c.stream, c.clip) for c in contexts])
    counted(collect, "answer", lambda S, judge, tasks, *_: [("asked", task["task"]) for task in tasks])
    said = []
    for clips in STEPS:
        grow(life, run, clips)
        collect_tasks(run)
        said.append(capsys.readouterr().out)
    for line, new in zip(said, ("2 clips of 1 streams, 2 questions, 2 contexts to cache; before: 0 memories, 0 questions",
                                "3 clips of 2 streams, 4 questions, 3 contexts to cache; before: 2 memories, 2 questions",
                                "5 clips of 2 streams, 8 questions, 5 contexts to cache; before: 5 memories, 6 questions")):
        assert f"new: {new}" in line
    same_work(run, whole)
    clips = [(name, t) for name, count in STEPS[-1].items() for t in range(count)]
    tasks = [task["task"] for task in runs.read_jsonl(life / "streams/tasks.jsonl")]
    assert {key for key in done if key[0] == "watched"} == {("watched", *clip) for clip in clips}
    assert all(count == 1 for key, count in done.items() if key[0] != "watched")
    assert {key[1:] for key in done if key[0] == "cached"} == set(clips)
    assert {key[1] for key in done if key[0] == "asked"} == set(tasks)
    # A fourth run has nothing to do, and needs no model.
    before = {path: path.read_bytes() for path in (run / "tasks").rglob("*") if path.is_file()}
    monkeypatch.setattr(collect, "load_policy", None)
    monkeypatch.setattr(collect, "load_judge", None)
    collect_tasks(run)
    assert "finished before: " in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (run / "tasks").rglob("*") if path.is_file()}


def test_the_latest_questions_define_an_environment(life, tmp_path, capsys):
    run = copy_of(life, tmp_path)
    came = {kind: [] for kind in KINDS}
    for clips in STEPS:
        grow(life, run, clips)
        collect_tasks(run)
        for kind, names in by_environment(rows_of(run, "asked.jsonl")).items():
            assert names[:len(came[kind])] == came[kind]          # what was asked before keeps its place
            came[kind] = names
        recent = runs.read_json(run / "tasks/recent.json")
        assert list(recent) == sorted(recent) and set(recent) == set(KINDS)
        for kind, rows in recent.items():
            names = [row["task"] for row in rows]
            assert names[:2] == came[kind][-2:] and names[2:] == came[kind][-3:-2]
        assert all(set(row["environments"]) == set(KINDS) for row in rows_of(run, "cache.jsonl"))
    said = capsys.readouterr().out
    last = runs.read_json(run / "tasks/recent.json")["place"][1]
    assert f"{last['question']}  ->  {collect.in_words(last)}" in said


def test_a_question_of_a_new_kind_costs_no_rollout(life, tmp_path, monkeypatch):
    run = copy_of(life, tmp_path)
    tasks = runs.read_jsonl(life / "streams/tasks.jsonl")
    runs.write_jsonl(run / "streams/tasks.jsonl", [task for task in tasks if task["environment"] == "place"])
    collect_tasks(run)
    runs.write_jsonl(run / "streams/tasks.jsonl", tasks)
    monkeypatch.setattr(collect, "load_policy", None)
    collect_tasks(run)
    assert set(runs.read_json(run / "tasks/recent.json")) == set(KINDS)
    assert all(row["environments"] == sorted(KINDS) for row in rows_of(run, "cache.jsonl"))


def test_what_the_latest_questions_are():
    asked = [{"task": i, "environment": kind} for i, kind in enumerate("yxyxyyyx")]
    recent = collect.latest_questions(asked, 2, 2)
    assert {kind: [row["task"] for row in rows] for kind, rows in recent.items()} == {"x": [3, 7, 1], "y": [5, 6, 2, 4]}
    assert list(recent) == ["x", "y"]
    assert [row["task"] for row in collect.latest_questions(asked, 2, 0)["y"]] == [5, 6]


# ================================================================ answers that nobody knows
def test_without_answers_all_is_the_same_but_what_is_correct(life, whole, tmp_path, monkeypatch, capsys):
    run = copy_of(life, tmp_path)
    tasks = runs.read_jsonl(run / "streams/tasks.jsonl")
    runs.write_jsonl(run / "streams/tasks.jsonl", [task | {"answer": None} for task in tasks])
    collect_tasks(run)
    said = capsys.readouterr().out
    for name in ("memories.jsonl", "cache.jsonl"):
        assert (run / "tasks" / name).read_bytes() == (whole / "tasks" / name).read_bytes()
    unknown = {"answer": None, "correct": None}
    assert rows_of(run, "asked.jsonl") == [row | unknown for row in rows_of(whole, "asked.jsonl")]
    assert all(row["reply"] for row in rows_of(run, "asked.jsonl"))
    assert "place, 2 recent questions: no answers known" in said and "judge has failed" not in said
    collect_tasks(run)
    assert "finished before: " in capsys.readouterr().out


def test_no_judge_grades_what_has_no_answer():
    tasks = [{"question": "q", "options": options, "answer": answer}
             for options, answer in (([], None), ([], "cup"), (["A. x"], None), (["A. x"], "A"), ([], "cup"))]

    class Grader:
        def ask(self, prompt, items):
            assert [item["answer"] for item in items] == ["cup"]
            return [True]
    assert collect.right(Grader(), tasks, ["hat", "a cup", "A", "A", None]) == [None, True, None, True, None]


def test_a_failed_reply_is_asked_again_and_an_unknown_answer_is_not(life, whole, tmp_path, monkeypatch, capsys):
    run = copy_of(life, tmp_path)
    tasks = runs.read_jsonl(run / "streams/tasks.jsonl")
    refused = [rows[0]["question"] for rows in runs.read_json(whole / "tasks/recent.json").values()]
    for task in tasks:
        if task["environment"] == "place":
            task["answer"] = None
    runs.write_jsonl(run / "streams/tasks.jsonl", tasks)
    ask = world.Judge.ask

    def fails(self, prompt, items):
        replies = ask(self, prompt, items)
        return [None if item.get("question") in refused else reply for item, reply in zip(items, replies)]
    monkeypatch.setattr(world.Judge, "ask", fails)
    collect_tasks(run)
    assert "judge has failed on 2 recent questions and 0 samples" in capsys.readouterr().out
    first = rows_of(run, "asked.jsonl")
    assert {row["question"] for row in first if row["reply"] is None} == set(refused)
    monkeypatch.setattr(world.Judge, "ask", ask)
    monkeypatch.setattr(collect, "load_policy", None)
    collect_tasks(run)
    asked = rows_of(run, "asked.jsonl")
    again = [row for row in asked if row["question"] in refused]
    assert all(row["reply"] for row in again) and {row["correct"] is None for row in again} == {True, False}
    assert [row["task"] for row in asked] == [row["task"] for row in first]       # they keep their places
    others = [row for row in first if row["question"] not in refused]
    assert [row for row in asked if row["question"] not in refused] == others
    assert "judge has failed" not in capsys.readouterr().out
    recent = sum(runs.read_json(run / "tasks/recent.json").values(), [])
    assert all(row["reply"] for row in recent)


def test_a_judge_that_fails_on_most_stops_the_run_and_nothing_is_lost(life, whole, tmp_path, monkeypatch):
    run = copy_of(life, tmp_path)
    ask = world.Judge.ask

    def fails(self, prompt, items):
        return [None] * len(items) if prompt.name == "answer" else ask(self, prompt, items)
    monkeypatch.setattr(world.Judge, "ask", fails)
    with pytest.raises(SystemExit, match="failed on 6 of 6 recent questions"):
        collect_tasks(run)
    assert not (run / "tasks/recent.json").exists()
    monkeypatch.setattr(world.Judge, "ask", ask)
    collect_tasks(run)
    recent = [[row["reply"] for row in sum(runs.read_json(each / "tasks/recent.json").values(), [])]
              for each in (run, whole)]
    assert recent[0] == recent[1]


def test_samples_that_nobody_judged_are_judged_later_and_sampled_once(life, whole, tmp_path, monkeypatch):
    run = copy_of(life, tmp_path)
    ask = world.Judge.ask

    def fails(self, prompt, items):
        return [None] * len(items) if prompt.name == "faithful" else ask(self, prompt, items)
    monkeypatch.setattr(world.Judge, "ask", fails)
    with pytest.raises(SystemExit, match="failed on 20 of 20 cached samples"):
        collect_tasks(run)
    monkeypatch.setattr(world.Judge, "ask", ask)
    monkeypatch.setattr(collect, "load_policy", None)
    collect_tasks(run)
    assert (run / "tasks/cache.jsonl").read_bytes() == (whole / "tasks/cache.jsonl").read_bytes()


# ================================================================ the cache makes room
def test_the_oldest_contexts_make_room(tmp_path, monkeypatch):
    """Of new clips at most CACHE_CONTEXTS, evenly spread; a clip that was left out once is never looked at again."""
    S = SimpleNamespace(CACHE_CONTEXTS=6, CHUNK=4, GROUP=1, SEED=0, K=2, MEMORY_TOKENS=9)
    sampled = []
    gone = set()

    def rollout(policy, contexts, n, keys):
        sampled.extend((context.stream, context.clip) for context in contexts)
        return [[common.Sample([1], str(key), str(key), 0, 1, False)] for key in keys]

    def quality(groups, judge, memory_tokens):
        for group in groups:
            group.samples[0].quality = 0.5
    monkeypatch.setattr(collect, "rollout", rollout)
    monkeypatch.setattr(collect.phase1, "quality", quality)

    def file_of(name, t):
        file = tmp_path / f"{name}{t}.mp4"
        file.touch()
        return "gone.mp4" if (name, t) in gone else str(file)

    def fill(**clips):
        streams = [{"stream": name, "split": "deploy",
                    "clips": [{"clip": t, "start": t, "end": t + 1, "file": file_of(name, t)} for t in range(count)]}
                   for name, count in clips.items()]
        memories = {name: [{"memory": f"{name}{t}"} for t in range(count)] for name, count in clips.items()}
        sampled.clear()
        cache = collect.read_cache(S, tmp_path, streams)
        collect.fill_cache(S, tmp_path, cache, None, None, streams, memories, {"e": {}})
        rows = runs.read_jsonl(tmp_path / "cache.jsonl")
        assert all(row["history"] == [f"{row['stream']}{t}" for t in range(max(0, row["clip"] - 1), row["clip"])]
                   for row in rows)
        return [row["stream"] + str(row["clip"]) for row in rows]
    assert fill(a=2, b=3) == ["a0", "a1", "b0", "b1", "b2"]
    assert fill(a=2, b=5) == ["a1", "b0", "b1", "b2", "b3", "b4"]                # one too many: a0 has gone
    assert sampled == [("b", 3), ("b", 4)]
    assert fill(a=2, b=5) == ["a1", "b0", "b1", "b2", "b3", "b4"] and not sampled
    assert fill(a=2, b=14) == ["b5", "b6", "b8", "b9", "b11", "b12"]             # every 1.5th of nine new ones
    assert fill(a=2, b=15) == ["b6", "b8", "b9", "b11", "b12", "b14"] and sampled == [("b", 14)]
    rows = {(row["stream"], row["clip"]): row for row in runs.read_jsonl(tmp_path / "cache.jsonl")}
    for name in ("cache.jsonl", "considered.json"):
        (tmp_path / name).unlink()
    # Noise belongs to a stream and a clip, whatever else is sampled.
    fill(b=15)
    for row in runs.read_jsonl(tmp_path / "cache.jsonl"):
        if (row["stream"], row["clip"]) in rows:
            assert row == rows[row["stream"], row["clip"]]
    # A context shows two clips: without the file of b16 there are none of b16 and b17.
    gone.add(("b", 16))
    fill(b=19)
    assert sampled == [("b", 15), ("b", 18)]


# ================================================================ adapters at work
@pytest.fixture(scope="module")
def adapted(life, loaded, tmp_path_factory):
    """A run in which an adapter of "place" has come after the first step, and all clips have been watched since.

    With what was written and answered, in order: (writer, stream, clip, history), and ("answered", task, memories).
    """
    run = copy_of(life, tmp_path_factory.mktemp("adapted"))
    grow(life, run, STEPS[0])
    collect_tasks(run)
    make_adapter(loaded, run, "place", 0)
    grow(life, run, STEPS[2])
    done = []
    rollout, answer, see = common.rollout, collect.answer, common.Policy._see

    def seen_rollout(policy, contexts, *args, **how):
        done.extend((policy.who, c.stream, c.clip, list(c.history)) for c in contexts)
        return rollout(policy, contexts, *args, **how)

    @functools.wraps(answer)                     # so that 03 takes it for its own
    def seen_answer(S, judge, tasks, memories):
        for task in tasks:
            notes = [row["memory"] for row in memories[task["stream"]]]
            done.append(("answered", task["task"], notes))
        return answer(S, judge, tasks, memories)

    def seen_clips(self, clips):
        done.extend(("seen", clip["file"], clip["offset"]) for clip in clips)
        return see(self, clips)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "rollout", seen_rollout)
        patch.setattr(collect, "answer", seen_answer)
        patch.setattr(common.Policy, "_see", seen_clips)
        collect_tasks(run)
    return run, done


def make_adapter(policy, run, environment, seed):
    policy.S.LAYER = 1
    params = policy.add("phase2", "steer")
    with torch.no_grad():
        params[0].copy_(0.5 * torch.randn(params[0].shape, generator=torch.Generator().manual_seed(seed)))
    save_adapter(policy, "phase2", run / "phase2/dpo-steer" / environment / "adapter")
    policy.drop("phase2")


NEW = [("a", 2), *(("b", t) for t in range(4)), *(("c", t) for t in range(3))]


def test_an_adapter_writes_the_new_clips_beside_phase_one(adapted, whole):
    run, done = adapted
    same_rows = as_known(rows_of(whole, "memories.jsonl"), "stream", "clip")
    assert as_known(rows_of(run, "memories.jsonl"), "stream", "clip") == same_rows     # Phase One's stay its own
    assert (run / "tasks/cache.jsonl").read_bytes() == (whole / "tasks/cache.jsonl").read_bytes()
    rows = as_known(rows_of(run, "adapted/place.jsonl"), "stream", "clip")
    assert set(rows) == set(NEW) and not (run / "tasks/adapted/object.jsonl").exists()
    assert len({row["policy"] for row in rows.values()}) == 1
    assert re.fullmatch("dpo-steer [0-9a-f]{8}", rows["a", 2]["policy"])
    assert any(rows[clip]["memory"] != same_rows[clip]["memory"] for clip in NEW)
    # The adapter goes on from Phase One's memories, and then from its own.
    notes = {clip: row["memory"] for clip, row in {**same_rows, **rows}.items()}
    histories = {event[1:3]: event[3] for event in done if event[0] == "phase2:place"}
    assert set(histories) == set(NEW)
    for (stream, t), history in histories.items():
        assert history == [notes[stream, i] for i in range(t)]
    # All write in one pass over the frames: each clip is looked at once.
    seen = Counter(event for event in done if event[0] == "seen")
    assert set(seen.values()) == {1} and len(seen) == 10


def test_new_questions_are_answered_from_the_notes_of_their_environment(adapted, whole):
    run, done = adapted
    phase1 = as_known(rows_of(run, "memories.jsonl"), "stream", "clip")
    adapter = as_known(rows_of(run, "adapted/place.jsonl"), "stream", "clip")
    answered = {event[1]: event[2] for event in done if event[0] == "answered"}
    tasks = {task["task"]: task for task in rows_of(whole, "asked.jsonl")}
    assert len(answered) == len(tasks) - 2                        # two were asked before
    for name, notes in answered.items():
        rows = {**phase1, **adapter} if tasks[name]["environment"] == "place" else phase1
        stream = tasks[name]["stream"]
        assert notes == [rows[stream, t]["memory"] for t in range(STEPS[2][stream])]


def test_the_text_says_who_wrote_what(adapted):
    run, _ = adapted
    text = (run / "tasks/memories/place/a.txt").read_text()
    label = rows_of(run, "adapted/place.jsonl")[0]["policy"]
    assert re.findall(r"^\S+-\S+  (.*)$", text, re.MULTILINE) == ["phase1", "phase1", label]
    assert "phase1" not in (run / "tasks/memories/a.txt").read_text()
    assert not (run / "tasks/memories/object").exists()


def test_a_round_that_was_cut_between_two_writers_is_finished(adapted, life, tmp_path, monkeypatch):
    """The adapter has written of a clip, and Phase One had not yet: the adapter writes of it no second time."""
    run = copy_of(adapted[0], tmp_path)
    memories = run / "tasks/memories.jsonl"
    before = rows_of(run, "memories.jsonl")
    for name in ("asked.jsonl", "recent.json", "cache.jsonl", "considered.json"):
        (run / "tasks" / name).unlink()
    runs.write_jsonl(memories, before[:-1])
    runs.write_jsonl(run / "tasks/asked.jsonl", rows_of(adapted[0], "asked.jsonl")[:2])
    writers = []
    rollout = common.rollout

    def seen(policy, contexts, *args, **how):
        writers.extend(policy.who for _ in contexts)
        return rollout(policy, contexts, *args, **how)
    monkeypatch.setattr(common, "rollout", seen)
    collect_tasks(run)
    assert set(writers) == {"phase1"} and rows_of(run, "memories.jsonl") == before
    for name in ("memories.jsonl", "adapted/place.jsonl", "asked.jsonl", "cache.jsonl", "recent.json"):
        assert (run / "tasks" / name).read_bytes() == (adapted[0] / "tasks" / name).read_bytes(), name


def test_each_environment_has_notes_of_its_own_and_a_new_adapter_a_name_of_its_own(adapted, life, loaded, tmp_path, capsys):
    run = copy_of(life, tmp_path)
    grow(life, run, STEPS[1])
    collect_tasks(run)
    make_adapter(loaded, run, "place", 1)
    make_adapter(loaded, run, "object", 0)
    grow(life, run, STEPS[2])
    capsys.readouterr()
    collect_tasks(run)
    assert "3 memories of each new clip: by Phase One, and by the adapters of object, place" in capsys.readouterr().out
    rows = {kind: as_known(rows_of(run, f"adapted/{kind}.jsonl"), "stream", "clip") for kind in KINDS}
    assert set(rows["place"]) == set(rows["object"]) == {("b", 2), ("b", 3), ("c", 0), ("c", 1), ("c", 2)}
    names = {kind: {row["policy"] for row in rows[kind].values()} for kind in KINDS}
    of_first = {row["policy"] for row in rows_of(adapted[0], "adapted/place.jsonl")}
    assert names["object"] == of_first and names["place"] != of_first     # the same vector, and another one
    assert [rows["place"][clip]["memory"] for clip in rows["place"]] != [
        rows["object"][clip]["memory"] for clip in rows["place"]]
    # Without adapters from here on, what they wrote is kept, and what comes is answered from it.
    shutil.rmtree(run / "phase2")
    collect_tasks(run)
    assert "finished before: " in capsys.readouterr().out


def test_the_name_of_an_adapter_is_no_kind_of_05(tmp_path):
    with pytest.raises(SystemExit, match="ADAPTER=lora: here it names what 05 has made"):
        collect.main([f"--RUN={tmp_path}", "--ADAPTER=lora"])


# ================================================================ killed while it grows, and on two ranks
GROW = """
import os, pathlib, random, shutil, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_grow
from support import ranks
life, run, adapters = map(pathlib.Path, sys.argv[1:])


def grow(step):                              # the adapter comes after the first step
    test_grow.grow(life, run, test_grow.STEPS[step])
    if step == 1:
        shutil.copytree(adapters, run / "phase2")
"""
KILLED = GROW + """
import killed

draw = random.Random(3)
killed.load_model_once(test_grow.ALWAYS)


def sizes():
    files = [run / "tasks" / name for name in ("memories.jsonl", "adapted/place.jsonl", "asked.jsonl", "cache.part")]
    return {{file: file.stat().st_size if file.exists() else 0 for file in files}}


for step in range(3):
    grow(step)
    kills = 0
    before = sizes()
    while not killed.finishes(test_grow.collect_tasks, run, kill_at=draw.randint(1, 8 * 3 ** kills)):
        kills += 1
        after = sizes()
        written = [file for file in after if after[file] > before[file]]
        if written:                              # the line that was written last may be torn
            last = max(written, key=lambda file: file.stat().st_mtime_ns)
            os.truncate(last, after[last] - draw.choice([0, 5]))
        before = sizes()
    print("killed", kills, "times", flush=True)
"""
TWO_RANKS = GROW + """
for step in range(3):
    if ranks.RANK == 0:
        grow(step)
    ranks.once(lambda: None)
    test_grow.collect_tasks(run)
"""


def run_script(script, folder, command, *argv):
    file = folder / "script.py"
    file.write_text(script.format(root=str(runs.ROOT), tests=str(runs.ROOT / "tests")))
    done = subprocess.run([sys.executable, *command, str(file), *argv], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def same_grown(run, adapted):
    same_work(run, adapted)
    one, two = (as_known(rows_of(each, "adapted/place.jsonl"), "stream", "clip") for each in (run, adapted))
    assert one == two and set(one) == set(NEW)


def test_sigkill_in_the_middle_of_growing_loses_nothing(life, adapted, tmp_path):
    run = copy_of(life, tmp_path / "run")
    said = run_script(KILLED, tmp_path, [], str(life), str(run), str(adapted[0] / "phase2"))
    kills = [int(line.split()[1]) for line in said.splitlines() if line.startswith("killed")]
    assert len(kills) == 3 and min(kills) >= 1
    same_grown(run, adapted[0])
    asked = by_environment(rows_of(run, "asked.jsonl"))
    recent = runs.read_json(run / "tasks/recent.json")
    assert {kind: [row["task"] for row in rows[:2]] for kind, rows in recent.items()} == {
        kind: names[-2:] for kind, names in asked.items()}
    assert not (run / "tasks/cache.part").exists()


def test_two_ranks_grow_as_one(life, adapted, tmp_path):
    run = copy_of(life, tmp_path / "run")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run_script(TWO_RANKS, tmp_path, command, str(life), str(run), str(adapted[0] / "phase2"))
    same_grown(run, adapted[0])
