"""Memories that outgrow the reader: what is kept, what never is, and how much of the accuracy stays."""
import builtins
import doctest
import importlib
import pathlib
import random
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("bm25s")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common                                                               # noqa: E402
from experiments import retrieval                                           # noqa: E402
from support import judges, reader, runs, weights                           # noqa: E402
from tiny import world                                                      # noqa: E402

collect = common.stage("03_collect_tasks")


@pytest.fixture(scope="module")
def tokenizer():
    return weights.load_tokenizer(settings())


def settings(*argv):
    return common.settings({"__doc__": ""}, argv)


@pytest.fixture(scope="module")
def long(tokenizer):
    """Entries and tasks of a stream of 40 min, and the tokens of it all."""
    entries, tasks = retrieval.make_stream(0, "right")
    return entries, tasks, int(reader.Retriever(entries, tokenizer).tokens.sum())


def read(entries):
    """The text of the memories that a reader gets."""
    return "\n\n".join(reader.printed(e) for e in entries if e[2])


@pytest.mark.parametrize("setting", ["right", "wrong", "inside"])
def test_a_tenth_of_the_memory_keeps_the_accuracy(setting, tokenizer):
    right, used = {1: 0, 10: 0}, {}
    for i in range(3):
        entries, tasks = retrieval.make_stream(i, setting)
        rows = {str(i): [dict(start=a, end=b, memory=m) for a, b, m in entries]}
        whole = int(reader.Retriever(entries, tokenizer).tokens.sum())
        for times in right:
            S = settings(f"--READER_TOKENS={whole // times}")
            replies, retrieved = collect.answer(S, world.Judge(), tasks, rows)
            right[times] += sum(collect.right(world.Judge(), tasks, replies))
            used.setdefault(times, set()).update(retrieved)
    assert used == {1: {False}, 10: {True}}
    assert right[10] >= 0.9 * right[1] > 40, right


def test_what_fits_is_read_whole(tokenizer, long):
    entries, tasks, whole = long
    entries = [*entries[:3], [30.0, 40.0, ""], *entries[4:]]                  # a lost memory costs nothing
    retriever = reader.Retriever(entries, tokenizer)
    budget, ask = int(retriever.tokens.sum()), (tasks[0]["question"], tasks[0]["options"], 2400.0)
    assert budget < whole and retriever.tokens[3] == 0
    assert retriever(*ask, budget) == (entries, False)
    kept, retrieved = retriever(*ask, budget - 1)
    assert retrieved and len(kept) < len(entries) - 1 and [30.0, 40.0, ""] not in kept
    assert retriever(ask[0], [], 200.0, budget - 1) == (entries[:20], False)      # only what was there counts
    assert reader.Retriever([], tokenizer)(*ask, 10) == ([], False)


def test_nothing_from_after_the_question_is_read(tokenizer, long):
    entries, tasks, whole = long
    retriever = reader.Retriever(entries, tokenizer)
    for time in (0.0, 9.9, 10.0, 1234.0, 2399.0):
        for task in tasks[::10]:
            for budget in (whole // 10, whole):
                kept, _ = retriever(task["question"], task["options"], time, budget)
                assert all(b <= time for _, b, _ in kept) and bool(kept) == (time >= 10)
    # an entry that the question is about, but that ends a second too late
    kept, retrieved = retriever("What happened at 00:20:00?", [], 1209.0, whole // 10)
    assert retrieved and kept[-1][0] == 1190.0


def test_kept_entries_are_in_time_order_with_their_times(tokenizer, long):
    entries, tasks, whole = long
    retriever = reader.Retriever(entries, tokenizer)
    for task in tasks[::7]:
        ask = task["question"], task["options"], task["time"], whole // 10
        kept, _ = retriever(*ask)
        assert kept == [e for e in entries if e in kept] and len(kept) > 15
        assert kept == reader.Retriever(entries, tokenizer)(*ask)[0]
    prompt = collect.OPEN.filled({"entries": kept, "question": "q", "options": []})
    assert all(f"{runs.clock(a)}-{runs.clock(b)}\n{m}" in prompt for a, b, m in kept)


def test_the_budget_is_never_exceeded(tokenizer, long):
    entries, tasks, whole = long
    rng = random.Random(0)
    entries = [[a, b, m * rng.choice((0, 1, 1, 30))] for a, b, m in entries]           # some alone exceed it
    retriever = reader.Retriever(entries, tokenizer)
    length = lambda kept: len(tokenizer(read(kept), add_special_tokens=False)["input_ids"])
    for budget in (0, 1, 21, 22, 100, 400, whole // 3):
        for task in tasks[::20]:
            kept, retrieved = retriever(task["question"], task["options"], task["time"], budget)
            assert retrieved and length(kept) <= budget, (length(kept), budget)
        assert not kept if budget < 20 else length(kept) > budget - 25                  # and it is used
    fat = reader.Retriever([[0.0, 10.0, "a lamp " * 99], [10.0, 20.0, "a cup"]], tokenizer)
    assert fat("Where was the lamp?", [], 20.0, 20) == ([[10.0, 20.0, "a cup"]], True)


def test_relevance_by_hand(monkeypatch):
    """Twenty entries of one token each, all but two alike."""
    count = lambda texts, **_: {"input_ids": [[0] for _ in texts]}
    entries = [[10.0 * t, 10.0 * t + 10, "somebody waits"] for t in range(20)]
    entries[7][2] = "<face_3> waits"
    entries[12][2] = "somebody sings"

    def starts(question, n, options=()):
        return [a for a, _, _ in reader.Retriever(entries, count)(question, options, 200.0, n)[0]]
    assert starts("Who is <face_3>?", 1) == [70.0]
    assert starts("What happened?", 1, ["A. somebody sings", "B. nothing"]) == [120.0]   # so are options
    assert starts("What at 00:02:34?", 1) == starts("And at 00:02:30?", 1) == [150.0]    # the clip of a time
    assert starts("<FACE_3>?", 3) == [60.0, 70.0, 80.0]                              # and its neighbours
    assert starts("Who knows?", 2) == [0.0, 10.0]                            # of equals the earliest
    monkeypatch.setattr(reader, "SHARE", 0)
    assert starts("<face_3>?", 2) == [0.0, 70.0]


def test_text_without_spaces(tokenizer):
    assert reader.words("小明在00:01:30喝茶 <face_3>,Ok") == [*"小明在", "00:01:30", *"喝茶", "<face_3>", "ok"]
    assert reader.words("お茶を 마셨다 Привет élan") == [*"お茶を", *"마셨다", "привет", "élan"]
    entries = [[10.0 * t, 10.0 * t + 10, "小明在厨房里说话。"] for t in range(20)]
    entries[13][2] = "小明正在花园浇水。"
    kept, _ = reader.Retriever(entries, tokenizer)("谁在花园浇水?", [], 200.0, 45)
    assert [a for a, _, _ in kept] == [130.0]


def test_a_missing_package_is_named_only_where_it_is_needed(tokenizer, long, monkeypatch):
    entries, _, whole = long
    load = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name == "bm25s":
            raise ImportError(name)
        return load(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", blocked)
    retriever = reader.Retriever(entries, tokenizer)
    assert retriever("q", [], 2400.0, whole) == (entries, False)
    with pytest.raises(SystemExit, match="READER_TOKENS.*pip install bm25s"):
        retriever("q", [], 2400.0, whole - 1)


def test_usual_streams_are_never_cut(tokenizer):
    """Twelve of the longest answers that a stream of the embedded world may get."""
    S = settings()
    line = len(tokenizer("00:00:10-00:00:20\n\n\n", add_special_tokens=False)["input_ids"])
    assert world.CLIPS * (S.MAX_NEW_TOKENS + line) <= S.READER_TOKENS < settings("--MODEL=full").READER_TOKENS


def test_rows_say_which_questions_used_it(long):
    entries, tasks, whole = long
    rows = [dict(stream="0", clip=i, start=a, end=b, memory=m) for i, (a, b, m) in enumerate(entries)]
    asked = [tasks[0] | {"time": 100.0}, tasks[1]]
    S = settings(f"--READER_TOKENS={whole // 2}")
    replies, retrieved = collect.answer(S, world.Judge(), asked, {"0": rows})
    assert retrieved == [False, True] and len(replies) == 2
    answers = importlib.import_module("06_eval").answer(S, world.Judge(), asked, rows)
    assert [row["retrieved"] for row in answers] == retrieved


def test_stage_3_marks_recent_questions_that_used_it(tmp_path):
    stage = importlib.import_module("test_stages").stage
    small = ["--TRAIN_STREAMS=2", "--DEPLOY_STREAMS=2", "--TEST_STREAMS=1", "--CLIPS=3"]
    stage("01_make_streams", tmp_path, *small)
    stage("02_phase1_train", tmp_path, "--MAX_NEW_TOKENS=32", "--GROUP=2", "--STEPS=1", "--CONTEXTS=2")
    for name, budget in (("all", 2000), ("part", 9)):
        stage("03_collect_tasks", tmp_path / name, f"--FROM={tmp_path}", "--MAX_NEW_TOKENS=32", "--GROUP=2",
              f"--READER_TOKENS={budget}")
        recent = runs.read_json(tmp_path / name / "tasks" / "recent.json")
        marks = {t.get("retrieved") for rows in recent.values() for t in rows}
        assert marks == {None if name == "all" else True}


def test_the_examples_in_the_docstrings_hold():
    assert all(doctest.testmod(module).failed == 0 for module in (reader, judges))
