"""06_eval.py and its rooms: figures against hand counts, intervals, transfer, validation, the report; no model."""
import contextlib
import doctest
import html.parser
import importlib
import json
import pathlib
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common                                                               # noqa: E402
from support import figures, intervals, report, runs                       # noqa: E402
from support.intervals import Bootstrap                                     # noqa: E402
from tiny import world                                                      # noqa: E402

stage = importlib.import_module("06_eval")
NONE = {"mean": None, "low": None, "high": None}


def reply(stream, environment, reply, answer="A"):
    return {"stream": stream, "environment": environment, "reply": reply, "correct": reply == answer,
            "task": f"{stream} {environment}"}


def totals(counts, *names):
    return [sum(getattr(count, name) for count in counts) for name in names]


# ---------------------------------------------------------------- statistics
def test_metrics_against_a_hand_count():
    bootstrap = Bootstrap([["s", "t"]], 200, 0)
    rows = [reply("s", "e", "A"), reply("s", "e", "B"), reply("t", "e", "insufficient"), reply("t", "e", "A"),
            reply("t", "e", None)]                                # the judge failed: neither asked nor missed
    counts = [figures.count_answer(row, bootstrap) for row in rows]
    for unit, expected in (("s", [2, 2, 1, 0]), ("t", [2, 1, 1, 0])):
        of_unit = [count for count in counts if count.unit == unit]
        assert totals(of_unit, "asked", "covered", "correct", "retrieved") == expected
    assert bootstrap.sums(counts, "covered").tolist() == [2, 1]
    got = figures.figures(counts, bootstrap)
    assert (got["accuracy"]["mean"], got["coverage"]["mean"]) == (0.5, 0.75)
    assert got["precision"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
    product = got["coverage"]["mean"] * got["precision"]["mean"]
    assert got["accuracy"]["mean"] == pytest.approx(product, abs=1e-5)
    assert got["coverage"]["low"] == 0.5 and got["coverage"]["high"] == 1.0     # one stream drawn twice


def test_what_the_reader_saw_a_part_of_is_counted():
    bootstrap = Bootstrap([["s"]], 9, 0)
    rows = [reply("s", "e", "A") | {"retrieved": True}, reply("s", "e", "A") | {"retrieved": False},
            reply("s", "e", None) | {"retrieved": True}]
    assert totals([figures.count_answer(row, bootstrap) for row in rows], "retrieved") == [1]


def test_precision_is_none_where_nothing_is_covered():
    bootstrap = Bootstrap([["s", "t"]], 50, 0)
    rows = [reply("s", "e", "insufficient"), reply("t", "e", "insufficient")]
    got = figures.figures([figures.count_answer(row, bootstrap) for row in rows], bootstrap)
    assert got["precision"] == NONE and got["accuracy"]["mean"] == 0
    assert figures.figures([], bootstrap)["accuracy"] == NONE


def answered(right, asked=1):
    """A count for each stream 0, 1, ...: how many of its questions were answered right."""
    return [figures.AnswerCount(unit, asked=asked, correct=int(n)) for unit, n in enumerate(right)]


def test_interval_covers_and_knows_that_streams_are_the_unit():
    """Five equal questions per stream are one observation: the interval must not shrink by asking again."""
    rng = np.random.default_rng(0)
    bootstrap = Bootstrap([list(range(40))], 2000, 1)
    right = rng.integers(0, 2, 40)
    once = bootstrap.ratio(answered(right), "correct", "asked")
    five = bootstrap.ratio(5 * answered(right), "correct", "asked")
    assert once == five
    assert once["low"] < once["mean"] < once["high"]
    assert once["high"] - once["low"] == pytest.approx(2 * 1.96 * right.std() / 40 ** 0.5, rel=0.15)
    hits = 0
    fewer = Bootstrap([list(range(40))], 400, 1)
    for _ in range(100):                                           # about 95 of 100 intervals hold the truth
        x = fewer.ratio(answered(rng.binomial(4, 0.3, 40), asked=4), "correct", "asked")
        hits += x["low"] <= 0.3 <= x["high"]
    assert hits >= 87


def test_a_single_stream_has_no_interval_and_groups_are_drawn_apart():
    assert Bootstrap([[0]], 9, 0).ratio(answered([1], asked=4), "correct", "asked") == NONE | {"mean": 0.25}
    times = Bootstrap([list("abc"), list("de")], 100, 0).times
    assert times.shape == (100, 5)
    assert (times[:, :3].sum(1) == 3).all() and (times[:, 3:].sum(1) == 2).all()
    assert len(set(times[:, 0])) > 1                                            # and they do differ


def test_gains_are_paired_by_stream():
    """A method that is 10 points better on every stream has a gain without spread, however these differ."""
    before = [1, 4, 8, 2]
    gain = Bootstrap([list(range(4))], 500, 0).ratio(
        answered([n + 1 for n in before], asked=10), "correct", "asked", answered(before, asked=10))
    assert gain == {"mean": 10.0, "low": pytest.approx(10), "high": pytest.approx(10)}


def test_below_five_streams_the_questions_are_drawn():
    rows = [[reply(s, e, "A") for s in "st" for e in "ef"], [{"stream": "s", "clip": 3}]]
    recent = {"e": [reply("w", "e", "A")]}
    few = figures.draw_units(["s", "t"], recent, rows, 20, 0)
    assert few.unit == "questions" and few.times.shape == (20, 6)
    assert list(few.column) == ["s 3", "s s e", "s s f", "t t e", "t t f", "w w e"]
    many = figures.draw_units(list("stuvw"), recent, rows, 20, 0)
    assert many.unit == "streams" and list(many.column) == ["s", "t", "w"]
    assert (many.times[:, 2] == 1).all()                                        # what is apart is drawn apart


def test_transfer_and_gains_by_hand():
    def examinee(method, environment=""):
        return SimpleNamespace(method=method, environment=environment, slug=f"{method}.{environment}")

    def ask(x, y):
        return [reply(s, e, "A" if right else "insufficient") for e, rights in (("x", x), ("y", y))
                for s, right in zip("stuv", rights)]

    examinees = [examinee("base"), examinee("phase1"), examinee("dpo-steer", "x"), examinee("dpo-steer", "y")]
    answers = {"base.": ask([0, 0, 0, 0], [0, 0, 0, 1]), "phase1.": ask([1, 0, 0, 0], [0, 0, 1, 0]),
               "dpo-steer.x": ask([1, 1, 1, 0], [0, 0, 0, 0]), "dpo-steer.y": ask([1, 0, 0, 0], [1, 1, 1, 1])}
    recent = {"x": [reply("w", "x", "A")] * 2, "y": [reply("w", "y", None)] * 2}
    R = figures.summarise(examinees, answers, recent, Bootstrap([list("stuv"), ["w"]], 300, 0))

    def accuracy(row):
        return {e: c["accuracy"]["mean"] for e, c in row.items()}

    matrix = {a: accuracy(row) for a, row in R["transfer"]["dpo-steer"].items()}
    assert matrix == {"x": {"x": 0.75, "y": 0}, "y": {"x": 0.25, "y": 1}}
    assert accuracy(R["transfer"]["phase1"]) == {"x": 0.25, "y": 0.25}
    gains = R["gains"]["dpo-steer"]
    assert gains["over_phase1"]["accuracy"]["mean"] == pytest.approx(62.5)      # 7 of 8 against 2 of 8
    assert gains["mismatched"]["accuracy"]["mean"] == pytest.approx(-12.5)      # 1 of 8 against 2 of 8
    assert gains["over_base"]["accuracy"]["mean"] == pytest.approx(75)
    row = {(r["method"], r["environment"], r["scope"]): r for r in R["rows"]}
    assert row["dpo-steer", "all", "after"]["questions"] == 8
    assert row["dpo-steer", "x", "all"]["accuracy"]["mean"] == pytest.approx(5 / 6, abs=1e-6)
    assert row["dpo-steer", "y", "all"]["questions"] == 4                 # replies that failed are not pooled
    assert ("base", "all", "all") not in row


def test_counts_of_memories_and_compare():
    def row(**changes):
        return {"stream": "s", "memory": "m", "tokens": 9, "faithful": True, "clean": True, "verdicts": {}} | changes

    rows = [row(verdicts={"x": "win"}), row(tokens=99, verdicts={"x": "tie", "y": "loss"}), row(clean=False),
            row(memory="", tokens=0, faithful=False, clean=False), row(faithful=None, verdicts={"x": None})]
    counts = [figures.count_memory(each, Bootstrap([["s"]], 9, 0), 17) for each in rows]
    assert totals(counts, "samples", "well_formed", "faithful", "clean", "fully_right", "tokens", "comparisons",
                  "wins", "ties", "losses") == [4, 3, 2, 2, 1, 117, 3, 1, 1, 1]
    means = {name: figure["mean"] for name, figure in
             figures.figures(counts, Bootstrap([["s"]], 9, 0), metrics=figures.QUALITY).items()}
    assert means == {"win": 0.333333, "tie": 0.333333, "loss": 0.333333, "faithful": 0.5, "non_redundant": 0.5,
                     "fully_right": 0.25, "well_formed": 0.75, "tokens": 39}

    class Biased:                                # prefers what comes first, unless one is "good" or "broken"
        def ask(self, prompt, items):
            assert prompt.name == "prefer"
            return [None if "broken" in (i["first"], i["second"]) else
                    "second" if i["second"] == "good" else "first" for i in items]
    pairs = [("good", "bad"), ("bad", "good"), ("bad", "worse"), ("broken", "bad")]
    assert stage.compare(Biased(), ["q"], pairs) == ["win", "loss", "tie", None]


def test_a_memory_is_compared_only_with_a_memory():
    """Malformed on either side: no verdict, and no question to the judge."""
    asked = []

    class First:
        def ask(self, prompt, items):
            asked.extend(items)
            return ["first" if item["first"] == "one" else "second" for item in items]
    rows = [{"stream": "s", "clip": i, "memory": m, "verdicts": {}} for i, m in enumerate(["one", "", "three"])]
    reference = [{"stream": "s", "clip": i, "memory": m} for i, m in enumerate(["1", "2", "", "of another"])]
    stage.judge_relevance(First(), rows, reference, "e", ["q"])
    assert [row["verdicts"] for row in rows] == [{"e": "win"}, {}, {}]
    assert [(item["first"], item["second"]) for item in asked] == [("one", "1"), ("1", "one")]


def test_the_reader_gets_nothing_from_after_the_question():
    seen = []

    class Reader:
        def ask(self, prompt, items):
            seen.extend(items)
            return ["A" for _ in items]
    memories = [{"stream": "s", "clip": i, "start": 10.0 * i, "end": 10.0 * i + 10, "memory": m}
                for i, m in enumerate(["one", "", "three", "four"])]
    task = {"task": "t", "stream": "s", "environment": "e", "time": 30.0, "question": "?",
            "options": ["A. x"], "answer": "A"}
    assert stage.answer(common.settings({"__doc__": ""}, []), Reader(), [task], memories)[0]["correct"]
    told = [[0.0, 10.0, "one"], [10.0, 20.0, ""], [20.0, 30.0, "three"]]
    assert seen == [{"entries": told, "question": "?", "options": ["A. x"]}]


def test_a_reader_that_mostly_fails_stops_the_stage():
    class Broken:
        def ask(self, prompt, items):
            return [None for _ in items]
    task = {"task": "t", "stream": "s", "environment": "e", "time": 30.0, "question": "?",
            "options": ["A. x"], "answer": "A"}
    with pytest.raises(SystemExit, match="failed on 1 of 1"):
        stage.answer(common.settings({"__doc__": ""}, []), Broken(), [task], [])


def test_stored_results_depend_on_their_key(tmp_path):
    path = tmp_path / "x.jsonl"
    assert stage.read_stored(path, "a") is None
    stage.store(path, "a", [{"n": 1}])
    assert stage.read_stored(path, "a") == [{"n": 1}]
    assert stage.read_stored(path, "b") is None
    stage.store(path, "b", [])
    assert stage.read_stored(path, "b") == [] and stage.read_stored(path, "a") is None
    (tmp_path / "adapter").mkdir()
    prints = set()
    for text in ("one", "two"):
        (tmp_path / "adapter" / "steer.safetensors").write_text(text)
        prints |= {stage.fingerprint({"S": n}, tmp_path / "adapter") for n in (1, 2)}
        for environment in ("x", "y"):
            examinee = stage.Examinee("dpo-steer", environment, "phase2", tmp_path / "adapter")
            prints |= {stage.Exam(None, None, None, [], [], {}, {}, key).key_of(examinee) for key in ("k", "l")}
    assert len(prints) == 4 + 8


# ---------------------------------------------------------------- the stage with stand-in policies
class Page(html.parser.HTMLParser):
    """Fails on tags that do not match; collects every attribute that could fetch something."""
    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        fetching = ("src", "href", "srcset", "data", "action", "poster")
        self.fetched += [v for k, v in attributes if k in fetching]
        assert tag not in ("script", "link", "iframe", "object", "embed")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


class Stand:
    """A policy that writes true facts; an adapter of the environment E puts facts of the category E first."""
    def __init__(self, truth):
        self.truth, self.focus, self.who, self.loaded = truth, None, "base", []

    def load(self, writer, folder):
        self.loaded.append(folder)
        self.focus = folder.parent.name if writer == "phase2" else None

    def using(self, writer):
        self.who = writer
        return contextlib.nullcontext(self)

    def write(self, context, key):
        rng, clip = random.Random(str(key)), context.clips[-1]["clip"]
        truth, old = self.truth[context.stream], set(world.facts((context.history or [""])[-1]))
        focus = self.focus if self.who == "phase2" else None
        if self.who == "base" and rng.random() < 0.3:
            return common.Sample([1], "<b>", None, 0, 0, True)
        facts = sorted((f for f in world.clip_facts(truth[clip]) if f not in old),
                       key=lambda f: (f.category != focus, rng.random()))[:3]
        text = world.sentence(world.connector(context.history and context.history[-1]), facts)
        return common.Sample([1], text, text, 3, 15, False)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with streams, tasks and empty adapters, and stand-ins for what needs a model."""
    splits, truth, rows, tasks = {"deploy": 3, "test": 6}, {}, [], []
    for split, n in splits.items():
        for i in range(n):
            name = f"{split}-{i}"
            truth[name] = world.make_stream(world.stream_seed(0, split, i), clips=6)
            rows.append({"stream": name, "split": split, "source": "tiny", "clips": [
                {"clip": t, "start": 10.0 * t, "end": 10.0 * t + 10, "file": f"{name}.mp4",
                 "offset": 10.0 * t, "speech": []} for t in range(6)]})
            tasks += world.make_tasks(name, truth[name], random.Random(i), 2)
    runs.write_jsonl(tmp_path / "streams" / "streams.jsonl", rows)
    for row in rows:
        (tmp_path / "streams" / row["clips"][0]["file"]).touch()
    runs.write_jsonl(tmp_path / "streams" / "tasks.jsonl", tasks)
    known = [{"stream": s, "clip": t, "facts": truth[s][t]} for s in truth for t in range(6)]
    runs.write_jsonl(tmp_path / "streams" / "truth.jsonl", known)
    early = [t | {"reply": "insufficient", "correct": False} for t in tasks if t["stream"][0] == "d"]
    recent = {e: [t for t in early if t["environment"] == e] for e in world.CATEGORIES[:3]}
    runs.write_json(tmp_path / "tasks" / "recent.json", recent)
    runs.write_jsonl(tmp_path / "tasks" / "cache.jsonl", [])
    runs.write_text(tmp_path / "phase1" / "adapter" / "adapter_model.safetensors", "x")
    runs.write_text(tmp_path / "phase1" / "log.csv", "step,reward,note\n0,-0.5,\n1,0.2,\n2,nan,\n")
    for e in recent:
        runs.write_text(tmp_path / "phase2" / "dpo-steer" / e / "adapter" / "steer.safetensors", e)
        runs.write_text(tmp_path / "phase2" / "dpo-steer" / e / "log.csv", "step,loss\n0,0.7\n1,0.3\n")
    policy = Stand(truth)

    def watch(policy, streams, questions=(), path=None, begun=None, desc=""):
        out = {s["stream"]: [] for s in streams}
        writer = desc.split(" (")[0]                                 # without "(3 of 14)"
        for s in streams:
            for t, clip in enumerate(s["clips"]):
                written = [row["memory"] for row in out[s["stream"]]]
                sample = policy.write(common.make_context(s, t, written), (s["stream"], t, writer))
                out[s["stream"]].append({"stream": s["stream"], "clip": t, "start": clip["start"],
                                         "end": clip["end"], "memory": sample.memory or "", "text": ""})
        return out

    def rollout(policy, contexts, n, keys, *how):
        return [[policy.write(context, key)] for context, key in zip(contexts, keys)]

    monkeypatch.setattr(stage, "load_policy", lambda S: policy)
    monkeypatch.setattr(stage, "load_adapter", lambda policy, writer, folder: policy.load(writer, folder))
    monkeypatch.setattr(stage, "watch", watch)
    monkeypatch.setattr(stage, "rollout", rollout)
    monkeypatch.setattr(report, "clip_frames",
                        lambda clip, n: (np.zeros((n, 96, 96, 3), np.uint8), list(range(n))))
    return SimpleNamespace(folder=tmp_path, policy=policy)


def stored_key(path):
    return runs.read_jsonl(path)[0]["fingerprint"]


def test_the_stage_end_to_end(run, capsys):
    arguments = [f"--RUN={run.folder}", "--BOOTSTRAP=300"]
    stage.main(arguments)
    said, out = capsys.readouterr().out, run.folder / "eval"
    assert "grpo-steer: no adapter for place, wear, action" in said and "05_phase2_train.py" in said
    R, after = json.loads((out / "results.json").read_text()), {}
    for r in R["rows"]:
        assert set(r) == {"method", "environment", "scope", "accuracy", "coverage", "precision", "questions",
                          "retrieved"}
        for m in ("accuracy", "coverage", "precision"):
            x = r[m]
            assert x["mean"] is None or x["low"] is None or 0 <= x["low"] <= x["mean"] <= x["high"] <= 1
        after[r["method"], r["environment"], r["scope"]] = r
    assert after["phase1", "all", "after"]["questions"] == 6 * 3 * 2
    assert after["phase1", "all", "all"]["questions"] == 6 * 3 * 2 + 3 * 5
    gains = R["gains"]["dpo-steer"]
    assert gains["over_phase1"]["accuracy"]["mean"] > 15 > gains["mismatched"]["accuracy"]["mean"]
    validated = {(v["method"], v["environment"]): v for v in R["validation"]}
    assert validated["dpo-steer", "all"]["win"]["mean"] > 0.4 > validated["phase1", "all"]["win"]["mean"]
    right = {m: validated[m, "all"]["fully_right"]["mean"] for m in ("base", "phase1")}
    assert right["base"] < 0.9 and right["phase1"] == 1
    memories = runs.read_jsonl(out / "memories.jsonl")
    assert len(memories) == (1 + 3 + 1 + 3 + 3) * 36
    assert {m["environment"] for m in memories} == {"", "place", "wear", "action"}
    # As deployed: judged is what the answers came from, each memory with those before it by the same policy.
    written = {(m["method"], m["environment"], m["stream"], m["clip"]): m["memory"] for m in memories}
    for method, environment, name in (("base", "", "base"), ("dpo-steer", "wear", "dpo-steer.wear")):
        judged = stage.read_stored(out / "deployed" / f"{name}.jsonl", stored_key(out / "deployed" / f"{name}.jsonl"))
        assert len(judged) == (36 if method == "base" else 12)
        for row in judged:
            assert row["memory"] == written[method, environment, row["stream"], row["clip"]]
            assert row["faithful"] is not None and set(row["verdicts"]) <= {"place", "wear", "action"}
    deployed = {(v["method"], v["environment"]): v for v in R["deployed"]}
    assert deployed["dpo-steer", "all"]["non_redundant"]["mean"] == 1                # with another history it is not
    assert deployed["phase1", "all"]["win"]["mean"] is None                          # not compared with itself
    assert deployed["dpo-steer", "all"]["win"]["mean"] > 0.4 and deployed["base", "all"]["fully_right"]["mean"] < 0.9
    text = (out / "results.md").read_text()
    widths = {line.count("|") for line in text.split("## ")[1].splitlines() if line.startswith("|")}
    assert widths == {8} and "Phase Two, dpo-steer" in text
    assert "intervals over streams" in text

    # run again: nothing is watched; a new adapter is watched alone
    run.policy.loaded.clear()
    stage.main(arguments)
    assert run.policy.loaded == [] and json.loads((out / "results.json").read_text()) == R
    runs.write_text(run.folder / "phase2" / "grpo-steer" / "wear" / "adapter" / "steer.safetensors", "new")
    stage.main(arguments)
    assert [f.parts[-3:-1] for f in run.policy.loaded[1:]] == [("grpo-steer", "wear")]
    assert "Phase Two, grpo-steer (1 of 3)" in (out / "results.md").read_text()


def test_questions_without_an_answer_are_not_asked_and_said(run, capsys):
    def forget(task):
        is_unknown = task["environment"] == "wear" or task["task"].endswith("place-1")
        return task | {"answer": None} if is_unknown else task
    file = run.folder / "streams" / "tasks.jsonl"
    runs.write_jsonl(file, list(map(forget, runs.read_jsonl(file))))
    file = run.folder / "tasks" / "recent.json"
    recent = {}
    for environment, tasks in runs.read_json(file).items():
        recent[environment] = list(map(forget, tasks))
        for task in recent[environment]:
            if task["answer"] is None:
                task |= {"correct": None, "reply": "B"}
    runs.write_json(file, recent)
    stage.main([f"--RUN={run.folder}", "--BOOTSTRAP=50", "--METHODS=dpo-steer"])
    said, results = capsys.readouterr().out, json.loads((run.folder / "eval" / "results.json").read_text())
    assert "18 of 36 questions have no answer and are not asked" in said
    assert "*** left out, as no question has an answer: wear ***" in said
    rows = {(r["method"], r["environment"], r["scope"]): r["questions"] for r in results["rows"]}
    assert rows["phase1", "place", "after"] == 6 and rows["phase1", "action", "after"] == 12
    known = sum(task["answer"] is not None for task in recent["place"][:5])
    assert 0 < known < 5 and rows["phase1", "place", "all"] == 6 + known
    assert not any(environment == "wear" for _, environment, _ in rows) and results["dropped"]["replies"] == 0
    # A policy is told all recent questions: they need no answer.
    S = common.settings(vars(stage), [f"--RUN={run.folder}"])
    exam = stage.load_exam(S, run.folder / "eval", run.folder / "phase1" / "adapter")
    assert exam.questions["place"] == [task["question"] for task in recent["place"][:5]]
    tasks = runs.read_jsonl(run.folder / "streams" / "tasks.jsonl")
    runs.write_jsonl(run.folder / "streams" / "tasks.jsonl", [task | {"answer": None} for task in tasks])
    with pytest.raises(SystemExit, match=r"no test or online stream has a question .* with an answer \(36 without\)"):
        stage.load_exam(S, run.folder / "eval", run.folder / "phase1" / "adapter")


def test_a_method_without_a_judged_memory(run):
    for environment in ("place", "wear"):
        (run.folder / "phase2/dpo-steer" / environment / "adapter" / "steer.safetensors").unlink()
    stage.main([f"--RUN={run.folder}", "--BOOTSTRAP=50", "--METHODS=dpo-steer", "--VALIDATE=1"])
    table = (run.folder / "eval" / "results.md").read_text().split("## ")[1]
    assert "| – | – |" in next(line for line in table.splitlines() if "dpo-steer" in line)


def test_methods_and_forks(run, capsys, tmp_path):
    stage.main([f"--RUN={run.folder}", "--BOOTSTRAP=50", "--METHODS=base+prompt,dpo-steer,dpo-stear-x"])
    rows = json.loads((run.folder / "eval" / "results.json").read_text())["rows"]
    assert {r["method"] for r in rows} == {"base", "base+prompt", "phase1", "dpo-steer"}
    assert "!! dpo-stear-x" in (said := capsys.readouterr().out) and "--ADAPTER=stear --NAME=x" in said
    # a fork with a Phase One of its own must not wear the adapters of the run that it came from
    fork = tmp_path / "fork"
    runs.write_text(fork / "phase1" / "adapter" / "adapter_model.safetensors", "another")
    S = SimpleNamespace(RUN=str(fork), FROM=str(run.folder), METHODS="", EXPECT="dpo-steer", COMMAND="")
    assert "dpo-steer" not in {j.method for j in stage.find_examinees(S, ["place"])}
    (fork / "phase1" / "adapter" / "adapter_model.safetensors").unlink()
    (fork / "phase1" / "adapter").rmdir()
    assert stage.find_examinees(S, ["place"])[-1].folder == run.folder / "phase2/dpo-steer/place/adapter"


def test_the_page_stands_alone(run):
    name = "dpo-<b>&\"'"                                                     # a folder may be called anything
    runs.write_text(run.folder / "phase2" / name / "wear" / "adapter" / "steer.safetensors", "x")
    stage.main([f"--RUN={run.folder}", "--BOOTSTRAP=50"])
    text = (run.folder / "eval" / "report.html").read_text()
    page = Page(text)
    assert page.fetched and all(v.startswith("data:image/jpeg;base64,") for v in page.fetched)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "dpo-<b>&" not in text and name in page.text and "<face_" in page.text and "<face_" not in text
    assert text.count("<svg") == 3 and 'name="viewport"' in text and "prefers-color-scheme:dark" in text
    assert "<mark>" in text


def test_the_examples_in_the_docstrings_hold():
    for module in (stage, report, figures, intervals):
        assert doctest.testmod(module).failed == 0


def test_marks_and_cells():
    assert report.marked("now, <face_3> waves.", "now, <face_3> waves") == "now, &lt;face_3&gt; waves."
    assert report.marked("a <b>.", "") == "<mark>a &lt;b&gt;.</mark>"
    assert report.cell(None) == report.cell(NONE) == "–"
    assert report.cell({"mean": 12.34, "low": -1, "high": 20}, 1) == "12.3 (-1.0 to 20.0)"
    flat = report.chart("a<b", {"x": [(0, 1.0)], "y&": [(0, 1.0)]})      # no range on either axis
    assert Page(flat).text.startswith("a<b")


def test_before_the_update_the_base_answers_for_itself():
    """In online streams: of two early questions the base had one right, Phase One none."""
    def examinee(method):
        return SimpleNamespace(method=method, environment="", slug=method)

    early = [reply("w", "x", "B") | {"task": n} for n in ("first", "second")]
    after = [reply("s", "x", "A"), reply("t", "x", "insufficient")]
    own = [reply("w", "x", "A") | {"task": "first"}, reply("w", "x", "B") | {"task": "second"}]
    R = figures.summarise([examinee("base"), examinee("phase1")], {"base": own + after, "phase1": after}, {"x": early},
                          Bootstrap([list("stw")], 50, 0))
    row = {(r["method"], r["scope"]): r for r in R["rows"] if r["environment"] == "all"}
    assert [row[m, "after"]["questions"] for m in ("base", "phase1")] == [2, 2]
    assert row["base", "all"]["accuracy"]["mean"] == 0.5 and row["phase1", "all"]["accuracy"]["mean"] == 0.25
