"""A question asked by hand (03, ASK): answered from the notes alone, with what it rests on, and learned from later."""
import json
import random
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from support import judges, runs                                            # noqa: E402
from test_judges import server                                              # noqa: E402, F401
from tiny import world                                                      # noqa: E402

collect = common.stage("03_collect_tasks")
HOLD = """
import pathlib, sys
sys.path.insert(0, {root!r})
from support import runs
runs.hold(pathlib.Path({folder!r}))
print("held", flush=True)
sys.stdin.read()
"""


def note(stream, clip, memory):
    return {"stream": stream, "clip": clip, "start": 10.0 * clip, "end": 10.0 * clip + 10, "memory": memory, "text": ""}


NOTES = {"walk": ["now, <face_3> wears red, a blue lamp.", "still, in the garden, exactly two balls.",
                  "still, a red key, <face_3> is waving."],
         "home": ["now, in the kitchen.", "still, in the office, <face_3> wears blue.", ""]}


@pytest.fixture
def run(tmp_path):
    """What 03 leaves of two streams. Their videos have gone, and so has the model."""
    streams = [{"stream": name, "split": "deploy", "source": "tiny",
                "clips": [{"clip": t, "start": 10.0 * t, "end": 10.0 * t + 10, "file": "gone.mp4", "offset": 0.0,
                           "speech": []} for t in range(3)]} for name in NOTES]
    runs.write_jsonl(tmp_path / "streams" / "streams.jsonl", streams)
    runs.write_jsonl(tmp_path / "streams" / "truth.jsonl", [])
    rows = [note(name, t, memories[t]) for t in range(3) for name, memories in NOTES.items()]
    runs.write_jsonl(tmp_path / "tasks" / "memories.jsonl", rows)
    runs.write_json(tmp_path / "tasks" / "settings.json", {"JUDGE": "tiny", "MODEL": "tiny", "RECENT": 3, "LATER": 2})
    return tmp_path


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    def refuse(S):
        raise AssertionError("the model was loaded")
    monkeypatch.setattr(collect, "load_policy", refuse)


def ask(run, question, capsys, *argv):
    """What is printed after the judge has introduced itself."""
    collect.main([f"--RUN={run}", f"--ASK={question}", *argv])
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("judge: ")]


# ================================================================ what is answered
def test_the_fact_with_the_entry_that_holds_it(run, capsys):
    said = ask(run, "Which object was shown at 00:00:20?", capsys)
    assert said[:4] == ["red key", "This rests on:", "    walk, 00:00:20-00:00:30",
                        "    still, a red key, <face_3> is waving."]
    said = ask(run, "Which object came right after the blue lamp of 00:00:00?", capsys)
    assert said[0] == "The notes don't tell."                     # the middle clip shows none
    said = ask(run, "How many balls were there at 00:00:00?", capsys)
    assert said[0] == "The notes don't tell." and "This rests on:" not in said


def test_what_rests_on_several_entries(run, capsys):
    runs.append_jsonl(run / "tasks" / "memories.jsonl", [note("walk", 3, "still, a green cup.")])
    said = ask(run, "What object was there at 00:00:30?", capsys)
    assert said[0] == "green cup"
    said = ask(run, "Which object came right after the red key of 00:00:20?", capsys)
    assert said[0] == "green cup" and [s[4:].split(",")[0] for s in said if "-00:00:" in s] == ["walk", "walk"]
    said = ask(run, "From 00:00:00 to 00:00:20, how many different places were there?", capsys)
    assert said[0] == "two" and sum(s.startswith("    home, ") for s in said) == 2


def test_streams_that_differ_are_told_apart(run, capsys):
    question = "Where were the people at 00:00:10?"
    said = ask(run, question, capsys)
    assert said[0] == "garden (walk); office (home)"
    assert ask(run, question, capsys, "--STREAM=home")[:3] == ["office", "This rests on:", "    home, 00:00:10-00:00:20"]
    assert ask(run, "What colour did <face_3> wear at 00:00:00?", capsys)[0] == "red"       # one alone tells
    with pytest.raises(SystemExit, match="STREAM=hom: there are notes of 2 streams, such as walk, home"):
        ask(run, question, capsys, "--STREAM=hom")


def test_every_question_of_the_toy_world_is_answered_as_its_reader_does():
    rng, right = random.Random(0), 0
    for seed in range(20):
        truth = world.make_stream(seed, 6)
        entries = [[10.0 * t, 10.0 * t + 10, world.sentence("now", rng.sample(world.clip_facts(truth[t]), 5))]
                   for t in range(6)]
        for task in world.make_tasks("s", truth, rng):
            letter = world.Judge().answer(entries, task["question"], task["options"])
            found = world.Judge().asked([[*entry, "s"] for entry in entries], task["question"])
            if letter == "insufficient":
                # Without options a wrong note counts too; these notes are true.
                assert found == {"answer": "insufficient", "entries": []}
                continue
            right += 1
            assert task["options"]["ABCD".index(letter)][3:] == found["answer"]
            # The entries named are enough, and none of them is idle.
            some = [entries[n - 1] for n in found["entries"]]
            assert world.Judge().answer(some, task["question"], task["options"]) == letter
            for entry in some:
                rest = [other for other in some if other != entry]
                assert world.Judge().answer(rest, task["question"], task["options"]) == "insufficient"
    assert right > 60


def test_a_question_that_is_not_of_this_world(run, capsys):
    with pytest.raises(SystemExit, match="toy world alone, such as 'Where were the people at 00:01:00.*not 'Keys.'"):
        ask(run, "Keys?", capsys)
    assert not (run / "tasks" / "asked.jsonl").exists()


# ================================================================ a judge that reads texts
class Scripted:
    def __init__(self, *replies):
        self.replies, self.read = list(replies), []

    def __call__(self, questions, attempt):
        self.read += [question.text for question in questions]
        return [self.replies.pop(0) for _ in questions]


def scripted(monkeypatch, *replies):
    sender = Scripted(*replies)
    monkeypatch.setattr(collect, "load_judge", lambda S, model, shows_frames: judges.TextJudge(sender))
    return sender


def test_a_text_judge_reads_all_notes_with_streams_and_times(run, capsys, monkeypatch):
    sender = scripted(monkeypatch, '{"answer": "in the garden", "entries": [9]}',
                      'So:\n</think>\n{"answer": "in the garden", "entries": [2]}')
    said = ask(run, "  Where  was the ball? ", capsys)
    assert said[:4] == ["in the garden", "This rests on:", "    walk, 00:00:10-00:00:20", "    " + NOTES["walk"][1]]
    assert len(sender.read) == 2                                  # a number that is not there is refused
    text = sender.read[0]
    assert "\nWhere was the ball?\n" in text and "4. home, 00:00:00-00:00:10\nnow, in the kitchen." in text
    assert "5. home" in text and "6. " not in text                # the last note is empty
    scripted(monkeypatch, '{"answer": "insufficient"}')
    assert ask(run, "Who called?", capsys)[0] == "The notes don't tell."
    scripted(monkeypatch, *["no"] * 3)
    with pytest.raises(SystemExit, match="no answer that can be read"):
        ask(run, "Who called?", capsys)


ITEM = {"question": "q", "entries": [[0.0, 10.0, "a", "s"], [10.0, 20.0, "b", "s"]]}


@pytest.mark.parametrize("reply, want", [
    ({"answer": " a cup ", "entries": [2]}, {"answer": "a cup", "entries": [2]}),
    ({"answer": "a cup", "entries": [2, 1, 2], "why": ""}, {"answer": "a cup", "entries": [1, 2]}),
    ({"answer": "insufficient", "entries": [1]}, {"answer": "insufficient", "entries": []}),
    ({"answer": "insufficient"}, {"answer": "insufficient", "entries": []}),
    ({"answer": "a cup"}, None), ({"answer": "a cup", "entries": []}, None), ({"answer": "a cup", "entries": [3]}, None),
    ({"answer": "a cup", "entries": [0]}, None), ({"answer": "a cup", "entries": ["1"]}, None),
    ({"answer": "a cup", "entries": [True]}, None), ({"answer": "a cup", "entries": [1.0]}, None),
    ({"answer": "a cup", "entries": 1}, None), ({"answer": "", "entries": [1]}, None), ({"entries": [1]}, None),
    ([], None), ("a cup", None)], ids=str)
def test_replies_are_parsed_strictly(reply, want):
    assert collect.ASKED.parse(json.dumps(reply), ITEM) == want


def test_notes_beyond_the_budget_are_searched_in_all_streams(run, capsys, monkeypatch):
    rows = [note(name, t, f"still, someone walks past house {t} of {name}.") for name in ("walk", "home") for t in range(3, 60)]
    rows[70]["memory"] = "still, the keys were put into the drawer."
    runs.append_jsonl(run / "tasks" / "memories.jsonl", rows)
    sender = scripted(monkeypatch, '{"answer": "the drawer", "entries": [1]}')
    ask(run, "Where were the keys put?", capsys, "--READER_TOKENS=200")
    assert "into the drawer" in sender.read[0] and "home, 00:02:40" in sender.read[0]
    assert sender.read[0].count("someone walks past") < 12
    assert runs.read_jsonl(run / "tasks" / "asked.jsonl")[0]["retrieved"] is True


def test_an_endpoint_can_be_asked(run, capsys, server):                      # noqa: F811
    said = ask(run, "Who waved?", capsys, "--JUDGE=openai:some-model")
    assert said[:3] == ["A", "This rests on:", "    walk, 00:00:00-00:00:10"]
    server.mode = "prose"
    with pytest.raises(SystemExit, match="not answer|not be read|can't be read"):
        ask(run, "Who sat?", capsys, "--JUDGE=openai:some-model")


def test_the_model_itself_can_be_asked(run, capsys, monkeypatch, loaded):
    monkeypatch.setattr(collect, "load_policy", lambda S: loaded)
    with pytest.raises(SystemExit, match="no answer that can be read"):     # it has learned no such replies
        ask(run, "Where were the people at 00:00:10?", capsys, "--JUDGE=local", "--MAX_NEW_TOKENS=16")


# ================================================================ what is kept
def test_the_question_joins_the_recent_ones(run, capsys):
    asked = ["Which object was shown at 00:00:20?", "How many balls were there at 00:00:00?",
             "What colour did <face_3> wear at 00:00:00?", "What object was there at 00:00:20?"]
    for question in asked:
        said = ask(run, question, capsys)
        assert said[-1].startswith("The question is one of the recent ones of questions now: 03 (without ASK), 04 and 05")
    log = runs.read_jsonl(run / "tasks" / "asked.jsonl")
    assert [row["question"] for row in log] == asked and len({row["task"] for row in log}) == 4
    assert log[1] == {"task": "asked-2", "stream": "*", "environment": "questions", "time": 30.0, "question": asked[1],
                      "options": [], "answer": None, "reply": "insufficient", "correct": None}
    recent = runs.read_json(run / "tasks" / "recent.json")
    # RECENT=3 of the run: the latest three, then what was asked before them
    assert [row["question"] for row in recent["questions"]] == [*asked[1:], asked[0]]
    with open(run / "tasks" / "asked.jsonl", "ab") as file:          # a kill has torn a line
        file.write(b'{"task": "asked-')
    runs.write_jsonl(run / "tasks" / "cache.jsonl", [])
    said = ask(run, asked[0], capsys, "--ENVIRONMENT=object", "--STREAM=walk")
    assert said[-1].endswith("of object now: 04 and 05, run again, learn from it.")
    assert len(runs.read_jsonl(run / "tasks" / "asked.jsonl")) == 5
    recent = runs.read_json(run / "tasks" / "recent.json")
    assert len(recent["questions"]) == 4 and recent["object"][0]["stream"] == "walk"


def test_a_new_environment_is_said(run, capsys):
    ask(run, "Which object was shown at 00:00:20?", capsys)
    assert "*** plce is a new environment, beside questions ***" in ask(
        run, "Which object was shown at 00:00:20?", capsys, "--ENVIRONMENT=plce")
    said = ask(run, "Which object was shown at 00:00:20?", capsys, "--ENVIRONMENT=plce")
    assert not any("new environment" in line for line in said)


def test_asked_only(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert ask(run, "Which object was shown at 00:00:20?", capsys, "--ASK_ONLY=1")[0] == "red key"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_benchmark_keeps_its_questions(run, capsys):
    file = run / "streams" / "streams.jsonl"
    runs.write_jsonl(file, [row | {"split": "online"} for row in runs.read_jsonl(file)])
    assert "benchmark" in ask(run, "Which object was shown at 00:00:20?", capsys)[-1]
    assert not (run / "tasks" / "asked.jsonl").exists() and not (run / "tasks" / "recent.json").exists()


def test_the_notes_of_another_run_are_read_and_not_added_to(run, tmp_path_factory, capsys):
    fork = tmp_path_factory.mktemp("fork")
    said = ask(fork, "Which object was shown at 00:00:20?", capsys, f"--FROM={run}")
    assert said[0] == "red key" and "joins no recent ones" in said[-1]
    assert not (run / "tasks" / "asked.jsonl").exists() and not list(fork.iterdir())


def test_the_notes_of_an_adapter_take_the_place_of_phase_ones(run, capsys):
    runs.write_jsonl(run / "tasks" / "adapted" / "place.jsonl", [note("walk", 2, "still, in the library.")])
    question = "Where were the people at 00:00:20?"
    assert ask(run, question, capsys)[0] == "The notes don't tell."
    assert ask(run, question, capsys, "--ENVIRONMENT=place")[0] == "library"
    assert ask(run, "Where were the people at 00:00:10?", capsys, "--ENVIRONMENT=place", "--STREAM=walk")[0] == "garden"


# ================================================================ beside others, and before anything
def test_while_another_process_watches(run, capsys):
    """It holds the folder, and is in the middle of a line."""
    file = run / "tasks" / "memories.jsonl"
    with open(file, "ab") as out:
        out.write(b'{"stream": "walk", "clip": 3, "memory": "sti')
    before = file.read_bytes()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(root=str(runs.ROOT), folder=str(run / "tasks"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert ask(run, "Which object was shown at 00:00:20?", capsys)[0] == "red key"
    finally:
        holder.communicate("")
    assert file.read_bytes() == before and len(runs.read_jsonl(run / "tasks" / "asked.jsonl")) == 1


def test_what_is_asked_while_the_cache_is_sampled_is_not_lost(run, capsys, monkeypatch):
    (run / "streams" / "gone.mp4").touch()
    (run / "phase1" / "adapter").mkdir(parents=True)
    (run / "tasks" / "settings.json").unlink()
    task = {"task": "1", "stream": "walk", "environment": "place", "time": 30.0, "options": ["A. garden", "B. office"],
            "question": "Where were the people at 00:00:10?", "answer": "A"}
    runs.write_jsonl(run / "streams" / "tasks.jsonl", [task])
    monkeypatch.setattr(collect, "load_phase1", lambda S, adapter: None)

    def fill_cache(*arguments):
        ask(run, "Which object was shown at 00:00:20?", capsys)
        return []
    monkeypatch.setattr(collect, "fill_cache", fill_cache)
    collect.main([f"--RUN={run}"])
    recent = runs.read_json(run / "tasks" / "recent.json")
    assert {name: [row["reply"] for row in rows] for name, rows in recent.items()} == {
        "place": ["A"], "questions": ["red key"]}


def test_before_anything_was_watched(run, tmp_path_factory, capsys):
    with pytest.raises(SystemExit, match="Make it first: python 03_collect_tasks.py"):
        ask(tmp_path_factory.mktemp("new"), "What?", capsys)
    with pytest.raises(SystemExit, match="ASK is empty"):
        ask(run, " ", capsys)
    (run / "tasks" / "memories.jsonl").write_text("")
    with pytest.raises(SystemExit, match="holds no note yet: run python 03_collect_tasks.py"):
        ask(run, "What?", capsys)


def test_the_run_says_who_answers_unless_the_command_does(run, capsys, monkeypatch):
    runs.write_json(run / "tasks" / "settings.json", {"JUDGE": "openai:some", "READER_TOKENS": 77, "GONE": 1, "SOURCES": {}})
    seen = []
    monkeypatch.setattr(collect, "load_judge", lambda S, *rest, **options: seen.append((S.JUDGE, S.READER_TOKENS)) or (
        judges.TextJudge(Scripted('{"answer": "insufficient"}'))))
    ask(run, "What?", capsys, "--ASK_ONLY=1")
    ask(run, "What?", capsys, "--ASK_ONLY=1", "--JUDGE=local")
    assert seen == [("openai:some", 77), ("local", 77)]
