"""The online protocol, 03 to 06 with the toy world's model: one long stream of questions as in EgoLife, and
many short ones as in Video-MME. What Phase Two may see, and when its adapter takes over."""
import importlib
import json
import random
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from support import runs                                                    # noqa: E402
from support.weights import save_adapter                                    # noqa: E402
from tiny import world                                                      # noqa: E402
from test_stages import ALWAYS, LOOP                                        # noqa: E402

KINDS = ("place", "object")
STAGES = {"03_collect_tasks": ["--RECENT=2", "--LATER=1", "--GROUP=4", "--CACHE_STREAMS=2"],
          "04_train_reward": ["--STEPS=2", "--CONTEXTS=3", "--ROWS=3", "--WARMUP=1", "--BOOTSTRAP=50", "--RECENT=2"],
          "05_phase2_train": [*LOOP, "--DPO_STEPS=2", "--PAIRS=2", "--RECENT=2"],
          "06_eval": ["--BOOTSTRAP=50", "--VALIDATE=6", "--EXAMPLES=1", "--RECENT=2", "--METHODS=base+prompt,dpo-steer",
                      "--TRANSFER=0", "--READERS=tiny"]}


def stage(name, run, *argv):
    torch.set_num_threads(1)
    importlib.import_module(name).main([f"--RUN={run}", *ALWAYS, *STAGES[name], *argv])
    return json.loads((run / "eval" / "results.json").read_text()) if name == "06_eval" else None


def write_run(run, source, truths, tasks, policy):
    """streams/ and an untrained phase1/ of a run; truths: {stream: truth of its clips}, a video each."""
    rows, facts = [], []
    for name, truth in truths.items():
        video = run / "streams" / f"{name}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        world.write_video(video, np.concatenate([world.draw_frames(clip) for clip in truth]))
        rows.append({"stream": name, "split": "online", "source": source, "clips": [
            {"clip": t, "start": 10.0 * t, "end": 10.0 * t + 10, "file": video.name, "offset": 10.0 * t,
             "speech": []} for t in range(len(truth))]})
        facts += [{"stream": name, "clip": t, "facts": clip} for t, clip in enumerate(truth)]
    for name, some in (("streams", rows), ("tasks", tasks), ("truth", facts)):
        runs.write_jsonl(run / "streams" / f"{name}.jsonl", some)
    policy.add("phase1", "lora")
    save_adapter(policy, "phase1", run / "phase1" / "adapter")
    return run


def asked_at(truth, kind, times, name, seed=0):
    """Tasks of one kind about what was shown before each time, in s."""
    rows = []
    for i, time in enumerate(times):
        some = world.make_tasks(name, truth[:time // 10], random.Random(f"{seed} {kind} {time}"), 1)
        rows += [t | {"task": f"{name}-{kind}-{i}", "time": float(time)} for t in some if t["environment"] == kind]
    assert len(rows) == len(times)
    return rows


@pytest.fixture(scope="module")
def long(tmp_path_factory, loaded):
    """A run on one stream of 16 clips; the third "place" question comes at 70 s, the third "object" at 90 s."""
    truth = world.make_stream(world.stream_seed(3, "test", 0), 16)
    tasks = asked_at(truth, "place", (30, 50, 70, 120, 150), "life") + asked_at(
        truth, "object", (40, 60, 90, 130, 160), "life")
    run = write_run(tmp_path_factory.mktemp("long"), "egolife", {"life": truth},
                    sorted(tasks, key=lambda t: t["time"]), loaded)
    loaded.drop("phase1")
    for name in STAGES:
        stage(name, run)
    return run


def test_phase2_sees_what_lay_before_the_update_alone(long):
    recent = runs.read_json(long / "tasks" / "recent.json")
    assert {e: [t["time"] for t in asked] for e, asked in recent.items()} == {
        "place": [30, 50, 70], "object": [40, 60, 90]}
    memories = runs.read_jsonl(long / "tasks" / "memories.jsonl")
    assert [m["clip"] for m in memories] == list(range(9))                # up to 90 s, the last recent question
    assert {r["clip"] for r in runs.read_jsonl(long / "tasks" / "cache.jsonl")} == set(range(9))
    # of these, each environment's pairs and preferences know no clip after its own second question
    for name in ("pairs", "preferences"):
        rows = runs.read_jsonl(long / "reward" / f"{name}.jsonl")
        assert {r["environment"] for r in rows} == set(KINDS)
        assert max(r["clip"] for r in rows if r["environment"] == "place") < 5
        assert max(r["clip"] for r in rows if r["environment"] == "object") < 6
    rows = runs.read_jsonl(long / "eval" / "checked" / "phase1.jsonl")[1:]
    assert rows and min(r["clip"] for r in rows) >= 9                   # what was cached is not validated on


def test_what_an_environment_may_learn_from_and_is_examined_on_can_not_overlap(long, tmp_path):
    """03 chose the rows by its RECENT of 2: with 1, clips up to the second question would be learned and examined."""
    with pytest.raises(SystemExit, match="RECENT=1, but 03 had RECENT=2"):
        stage("04_train_reward", tmp_path, f"--FROM={long}", "--RECENT=1")


def test_which_environments_may_learn_from_a_clip():
    collect = common.stage("03_collect_tasks")
    ask = lambda name, kind, stream, time: {"task": name, "environment": kind, "stream": stream, "time": time}
    tasks = [ask("p1", "place", "a", 20.0), ask("o1", "object", "a", 30.0), ask("p2", "place", "a", 40.0),
             ask("p3", "place", "b", 50.0), ask("o2", "object", "b", 60.0)]
    recent = collect.first_questions(tasks, 2)
    assert {kind: [t["task"] for t in asked] for kind, asked in recent.items()} == {
        "place": ["p1", "p2"], "object": ["o1", "o2"]}
    # of "place" p3 is still to come, about b, of which nothing was asked before; of "object" nothing
    assert collect.learns_until(tasks, recent, 2) == {"place": {"b": 0.0}, "object": {}}
    limits = collect.learns_until(tasks, recent, 1)         # as if the first question alone defined an environment
    assert limits == {"place": {"a": 20.0, "b": 0.0}, "object": {"b": 0.0}}
    online, clip = {"stream": "a", "split": "online"}, {"end": 30.0}
    assert collect.learners(online, clip, limits) == ["object"]
    assert collect.learners(online, {"end": 20.0}, limits) == ["place", "object"]
    assert collect.learners({"stream": "a", "split": "deploy"}, clip, limits) == ["place", "object"]


def test_on_policy_too_trains_on_what_was_seen(long, tmp_path, monkeypatch):
    phase1, seen = common.stage("02_phase1_train"), []
    rolling = phase1.RollingBatch
    monkeypatch.setattr(phase1, "RollingBatch", lambda streams, written, **constants: (
        seen.extend(streams), rolling(streams, written, **constants))[1])
    stage("05_phase2_train", tmp_path, f"--FROM={long}", "--ALGORITHM=grpo", "--GRPO_STEPS=1",
          "--ENVIRONMENT=place")
    assert [len(s["clips"]) for s in seen] == [5]               # the second "place" question comes at 50 s


def test_the_adapter_takes_over_after_its_questions(long):
    rows = {}
    for r in runs.read_jsonl(long / "eval" / "memories.jsonl"):
        rows.setdefault((r["method"], r["environment"]), []).append(r["memory"])
    assert {len(memories) for memories in rows.values()} == {16}
    first = [m["memory"] for m in runs.read_jsonl(long / "tasks" / "memories.jsonl")]
    assert rows["phase1", ""][:9] == first                  # those from which 03 answered the recent questions
    # by 06's RECENT of 2 the update of "place" comes at 50 s, that of "object" at 60 s
    for kind, n in (("place", 5), ("object", 6)):
        assert rows["dpo-steer", kind][:n] == rows["phase1", ""][:n]
        assert rows["base+prompt", kind][:n] == rows["base", ""][:n]
        assert rows["base+prompt", kind][n:] != rows["base", ""][n:]


def test_each_question_is_asked_once_and_counted(long):
    R = runs.read_json(long / "eval" / "results.json")
    n = {(r["method"], r["environment"], r["scope"]): r["questions"] for r in R["rows"]}
    for method in ("base", "base+prompt", "phase1", "dpo-steer"):
        assert (n[method, "all", "after"], n[method, "all", "all"], n[method, "place", "all"]) == (6, 10, 5)
    answers = lambda slug: {r["task"] for r in runs.read_jsonl(
        long / "eval" / "answers" / f"{slug}.jsonl")[1:]}
    assert answers("dpo-steer.place") == {"life-place-2", "life-place-3", "life-place-4"}     # TRANSFER=0
    assert len(answers("base")) == 10 and len(answers("phase1")) == 6
    assert R["gains"]["dpo-steer"]["mismatched"] is None
    of = {(r["method"], r["environment"], r["scope"]): r["accuracy"] for r in R["rows"]}
    assert of["base", "all", "all"]["low"] is not None      # of one stream: the questions are what is resampled
    # Phase One's first answers are those of 03, the base's its own
    first = [t for asked in runs.read_json(long / "tasks" / "recent.json").values() for t in asked[:2]]
    right = lambda slug: [r["correct"] for r in runs.read_jsonl(long / "eval" / "answers" / f"{slug}.jsonl")[1:]]
    assert of["phase1", "all", "all"]["mean"] == sum(right("phase1") + [t["correct"] for t in first]) / 10
    assert of["base", "all", "all"]["mean"] == sum(right("base")) / 10
    assert right("base") != right("phase1")


def test_the_tables_of_a_data_set(long, capsys):
    stage("06_eval", long)                                                  # all is kept: only printed again
    said, text = capsys.readouterr().out, (long / "eval" / "results.md").read_text()
    assert "Beside the paper" in said and "38.4" in said and "45.4" in said and "80.5" in said
    assert "By type" in text and "By type" not in said and "Transfer" not in text
    assert "intervals over questions" in text
    assert "Other readers" in said and said.count("the usual one") == 4
    R = runs.read_json(long / "eval" / "results.json")
    of = lambda rows: [(r["method"], r["environment"], r["accuracy"]) for r in rows if r["scope"] == "after"]
    assert of(R["readers"]["tiny"]) == of(R["rows"])                # the same reader, asked as another one


def test_many_short_streams(tmp_path, policy):
    """As Video-MME: a question of each kind after each of six videos; 03 watches no more than it needs."""
    truths = {f"v{i}": world.make_stream(world.stream_seed(4, "test", i), 4) for i in range(6)}
    tasks = [t for name, truth in truths.items() for kind in KINDS for t in asked_at(truth, kind, (40,), name)]
    run = write_run(tmp_path, "videomme", truths, tasks, policy)
    policy.drop("phase1")
    stage("03_collect_tasks", run, "--CACHE_STREAMS=4", "--CACHE_CONTEXTS=7")
    memories = runs.read_jsonl(run / "tasks" / "memories.jsonl")
    assert {m["stream"] for m in memories} == {"v0", "v1", "v2", "v3"}      # three with questions, one to fill up
    cache = runs.read_jsonl(run / "tasks" / "cache.jsonl")
    assert len(cache) == 7 and {r["stream"] for r in cache} == {"v0", "v1", "v2", "v3"}
    may = {e: {r["stream"] for r in cache if e in r["environments"]} for e in KINDS}
    assert may == dict.fromkeys(KINDS, {"v0", "v1"})
    for name in ("04_train_reward", "05_phase2_train"):
        stage(name, run)
    R = stage("06_eval", run, "--TRANSFER=1")
    n = {(r["method"], r["environment"], r["scope"]): r["questions"] for r in R["rows"]}
    assert (n["phase1", "all", "after"], n["phase1", "all", "all"], n["base", "all", "all"]) == (8, 12, 12)
    assert R["streams"] == 6 and R["source"] == "videomme"
    wrote = {}
    for r in runs.read_jsonl(run / "eval" / "memories.jsonl"):
        wrote.setdefault((r["method"], r["environment"]), {})[r["stream"], r["clip"]] = r["memory"]
    steered = [e for m, e in wrote if m == "dpo-steer"]
    for e in steered:                                   # v0 and v1 were seen before the update
        early = {k: v for k, v in wrote["phase1", ""].items() if k[0] in ("v0", "v1")}
        assert early.items() <= wrote["dpo-steer", e].items()


def test_memories_first_questions_later(tmp_path, policy, capsys):
    """Streams may go, come and be cut between two runs of 03; what was written stays."""
    truths = {f"v{i}": world.make_stream(world.stream_seed(5, "test", i), 4) for i in range(3)}
    run = write_run(tmp_path, "videos", truths, [], policy)
    policy.drop("phase1")
    stage("03_collect_tasks", run)
    before = runs.read_jsonl(run / "tasks" / "memories.jsonl")
    assert len(before) == 12 and "no tasks ask about these streams" in capsys.readouterr().out
    runs.write_jsonl(run / "streams" / "tasks.jsonl", [
        t for kind in KINDS for t in asked_at(truths["v1"], kind, (20, 30, 40), "v1")])
    rows = runs.read_jsonl(run / "streams" / "streams.jsonl")
    runs.write_jsonl(run / "streams" / "streams.jsonl", rows[1:])             # v0 has gone
    stage("03_collect_tasks", run)
    assert runs.read_jsonl(run / "tasks" / "memories.jsonl") == before
    assert {r["stream"] for r in runs.read_jsonl(run / "tasks" / "cache.jsonl")} == {"v1", "v2"}
    assert "new: 0 clips of 0 streams, 6 questions, 8 contexts to cache" in capsys.readouterr().out
    stage("03_collect_tasks", run)
    assert "finished before: " in capsys.readouterr().out
    runs.write_jsonl(run / "streams" / "streams.jsonl", rows)                 # v0 is there again
    stage("03_collect_tasks", run)
    assert "new: 0 clips of 0 streams, 0 questions, 4 contexts to cache" in capsys.readouterr().out


def test_questions_before_anything_was_seen_are_counted(tmp_path, policy, capsys):
    truth = world.make_stream(world.stream_seed(6, "test", 0), 4)
    tasks = [t | {"time": 5.0} for t in asked_at(truth, "place", (30,), "v")] + asked_at(truth, "object", (40,), "v")
    run = write_run(tmp_path, "videos", {"v": truth}, tasks, policy)
    policy.drop("phase1")
    stage("03_collect_tasks", run)
    said = capsys.readouterr().out
    assert "1 questions are asked before any clip has ended" in said and "v-place-0 at 5 s" in said


def test_without_preferences_04_says_why(long, tmp_path, monkeypatch):
    class Undecided(world.Judge):
        def prefer(self, questions, first, second):
            return "tie"
    monkeypatch.setattr(common.stage("04_train_reward"), "load_judge",
                        lambda S, policy, shows_frames: Undecided())
    with pytest.raises(SystemExit, match=r"no reward model: preferences in 0 contexts.*; (\d+) of \1 .* were ties"):
        stage("04_train_reward", tmp_path, f"--FROM={long}")


def test_a_stream_is_watched_alike_in_any_company(policy, streams):
    together = common.watch(policy, streams[:2])
    alone = common.watch(policy, streams[1:2])
    assert alone[streams[1]["stream"]] == together[streams[1]["stream"]]


def test_a_folder_of_videos_gives_memories_to_read(tmp_path, policy, capfd):
    """Real videos, where ../shared/videos has them, through 01 and 03; no questions."""
    from test_streams import SHARED, make_video
    folder, real = tmp_path / "my videos", [SHARED / "videos" / name for name in ("nasa_13013.mp4", "bikes.mp4")]
    folder.mkdir()
    for file in real:
        if file.exists():
            (folder / file.name).write_bytes(file.read_bytes())
        else:
            make_video(folder / file.name, frames=110)
    policy.add("phase1", "lora")
    save_adapter(policy, "phase1", tmp_path / "run" / "phase1" / "adapter")
    policy.drop("phase1")
    importlib.import_module("01_make_streams").main(
        ["--SOURCE=videos", f"--DATA={folder}", f"--RUN={tmp_path / 'run'}"])
    stage("03_collect_tasks", tmp_path / "run", "--JUDGE=local")
    said = capfd.readouterr()
    assert "no tasks ask about these streams" in said.out
    assert re.search(r"watch: .*\d\d:\d\d<\d\d:\d\d", said.err)                 # time gone < time left
    for file in real:
        text = (tmp_path / "run" / "tasks" / "memories" / f"{file.stem}.txt").read_text()
        assert re.fullmatch(r"(\d\d:\d\d:\d\d-\d\d:\d\d:\d\d\n\S.*\n\n)+", text), text
