"""06_eval.py: metrics against hand counts, intervals, transfer, validation, and the report; no model."""
import doctest, html.parser, importlib, json, pathlib, random, re, sys
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common
from results import report
from tiny import world

stage = importlib.import_module("06_eval")
NONE = {"mean": None, "low": None, "high": None}


def reply(stream, environment, reply, answer="A"):
    return {"stream": stream, "environment": environment, "reply": reply, "correct": reply == answer,
            "task": f"{stream} {environment}"}


# ---------------------------------------------------------------- statistics
def test_metrics_against_a_hand_count():
    units = {"s": 0, "t": 1}
    rows = [reply("s", "e", "A"), reply("s", "e", "B"), reply("t", "e", "insufficient"), reply("t", "e", "A"),
            reply("t", "e", None)]                                # the judge failed: neither asked nor missed
    table = stage.count(rows, units)
    assert table.tolist() == [[2, 2, 1, 0], [2, 1, 1, 0]]
    got = stage.figures(table, stage.resamples([2], 200, 0))
    assert (got["accuracy"]["mean"], got["coverage"]["mean"]) == (0.5, 0.75)
    assert got["precision"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
    product = got["coverage"]["mean"] * got["precision"]["mean"]
    assert got["accuracy"]["mean"] == pytest.approx(product, abs=1e-5)
    assert got["coverage"]["low"] == 0.5 and got["coverage"]["high"] == 1.0     # one stream drawn twice


def test_precision_is_none_where_nothing_is_covered():
    table = stage.count([reply("s", "e", "insufficient"), reply("t", "e", "insufficient")], {"s": 0, "t": 1})
    got = stage.figures(table, stage.resamples([2], 50, 0))
    assert got["precision"] == NONE and got["accuracy"]["mean"] == 0
    assert stage.figures(np.zeros((2, 3)), stage.resamples([2], 50, 0))["accuracy"] == NONE


def test_interval_covers_and_knows_that_streams_are_the_unit():
    """Five equal questions per stream are one observation: the interval must not shrink by asking again."""
    rng, weights = np.random.default_rng(0), stage.resamples([40], 2000, 1)
    right = rng.integers(0, 2, 40)
    once = stage.ratio(np.stack([np.ones(40), np.ones(40), right], 1), weights, 2, 0)
    five = stage.ratio(5 * np.stack([np.ones(40), np.ones(40), right], 1), weights, 2, 0)
    assert once == five
    assert once["low"] < once["mean"] < once["high"]
    assert once["high"] - once["low"] == pytest.approx(2 * 1.96 * right.std() / 40 ** 0.5, rel=0.15)
    hits = 0
    for _ in range(100):                                           # about 95 of 100 intervals hold the truth
        c = np.stack([np.full(40, 4.0), np.full(40, 4.0), rng.binomial(4, 0.3, 40)], 1)
        x = stage.ratio(c, weights[:400], 2, 0)
        hits += x["low"] <= 0.3 <= x["high"]
    assert hits >= 87


def test_a_single_stream_has_no_interval_and_groups_are_drawn_apart():
    assert stage.ratio(np.array([[4.0, 2.0, 1.0]]), stage.resamples([1], 9, 0), 2, 0) == NONE | {"mean": 0.25}
    weights = stage.resamples([3, 2], 100, 0)
    assert weights.shape == (100, 5)
    assert (weights[:, :3].sum(1) == 3).all() and (weights[:, 3:].sum(1) == 2).all()


def test_gains_are_paired_by_stream():
    """A method that is 10 points better on every stream has a gain without spread, however these differ."""
    before = np.array([[10.0, 10, k] for k in (1, 4, 8, 2)])
    gain = stage.ratio(before + [0, 0, 1], stage.resamples([4], 500, 0), 2, 0, before)
    assert gain == {"mean": 10.0, "low": pytest.approx(10), "high": pytest.approx(10)}


def test_transfer_and_gains_by_hand():
    job = lambda m, e="": SimpleNamespace(method=m, environment=e, slug=f"{m}.{e}")
    jobs = [job("base"), job("phase1"), job("dpo-steer", "x"), job("dpo-steer", "y")]
    ask = lambda x, y: [reply(s, e, "A" if right else "insufficient") for e, rights in (("x", x), ("y", y))
                        for s, right in zip("stuv", rights)]
    answers = {"base.": ask([0, 0, 0, 0], [0, 0, 0, 1]), "phase1.": ask([1, 0, 0, 0], [0, 0, 1, 0]),
               "dpo-steer.x": ask([1, 1, 1, 0], [0, 0, 0, 0]), "dpo-steer.y": ask([1, 0, 0, 0], [1, 1, 1, 1])}
    recent = {"x": [reply("w", "x", "A")] * 2 + [reply("w", "x", "B")] * 8, "y": [reply("w", "y", None)] * 10}
    S = SimpleNamespace(RECENT=2)
    units, weights = dict(zip("stuvw", range(5))), stage.resamples([4, 1], 300, 0)
    R = stage.summarise(jobs, answers, recent, units, weights, S)
    accuracy = lambda row: {e: c["accuracy"]["mean"] for e, c in row.items()}
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


def test_tally_and_compare():
    row = lambda **k: {"stream": "s", "memory": "m", "tokens": 9, "faithful": True, "clean": True,
                       "verdicts": {}} | k
    rows = [row(verdicts={"x": "win"}), row(tokens=99, verdicts={"x": "tie", "y": "loss"}), row(clean=False),
            row(memory="", tokens=0, faithful=False, clean=False), row(faithful=None, verdicts={"x": None})]
    assert stage.tally(rows, {"s": 0}, 17).tolist() == [[4, 3, 2, 2, 1, 117, 3, 1, 1, 1]]

    class Biased:                                # prefers what comes first, unless one is "good" or "broken"
        def ask(self, kind, items):
            return [None if "broken" in (i["first"], i["second"]) else
                    "second" if i["second"] == "good" else "first" for i in items]
    pairs = [("good", "bad"), ("bad", "good"), ("bad", "worse"), ("broken", "bad")]
    assert stage.compare(Biased(), ["q"], pairs) == ["win", "loss", "tie", None]


def test_the_reader_gets_nothing_from_after_the_question():
    seen = []

    class Reader:
        def ask(self, kind, items):
            seen.extend(items)
            return ["A" for _ in items]
    memories = [{"stream": "s", "clip": i, "start": 10.0 * i, "end": 10.0 * i + 10, "memory": m}
                for i, m in enumerate(["one", "", "three", "four"])]
    task = {"task": "t", "stream": "s", "environment": "e", "time": 30.0, "question": "?",
            "options": ["A. x"], "answer": "A"}
    assert stage.answer(common.settings({"__doc__": ""}, []), Reader(), [task], memories)[0]["correct"]
    told = [[0.0, 10.0, "one"], [10.0, 20.0, ""], [20.0, 30.0, "three"]]
    assert seen == [{"entries": told, "question": "?", "options": ["A. x"]}]


def test_kept_results_depend_on_their_key(tmp_path):
    made = []
    make = lambda part: made.append(1) or [{"n": len(made)}]
    for key, n in (("a", 1), ("a", 1), ("b", 2)):
        assert stage.kept(tmp_path / "x.jsonl", key, make) == [{"n": n}]
    (tmp_path / "adapter").mkdir()
    prints = set()
    for text in ("one", "two"):
        (tmp_path / "adapter" / "steer.safetensors").write_text(text)
        prints |= {stage.fingerprint({"S": n}, tmp_path / "adapter") for n in (1, 2)}
    assert len(prints) == 4


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
        return __import__("contextlib").nullcontext(self)

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
    common.write_jsonl(tmp_path / "streams" / "streams.jsonl", rows)
    common.write_jsonl(tmp_path / "streams" / "tasks.jsonl", tasks)
    known = [{"stream": s, "clip": t, "facts": truth[s][t]} for s in truth for t in range(6)]
    common.write_jsonl(tmp_path / "streams" / "truth.jsonl", known)
    early = [t | {"reply": "insufficient", "correct": False} for t in tasks if t["stream"][0] == "d"]
    recent = {e: [t for t in early if t["environment"] == e] for e in world.CATEGORIES[:3]}
    common.write_json(tmp_path / "tasks" / "recent.json", recent)
    common.write_jsonl(tmp_path / "tasks" / "cache.jsonl", [])
    common.write_text(tmp_path / "phase1" / "adapter" / "adapter_model.safetensors", "x")
    common.write_text(tmp_path / "phase1" / "log.csv", "step,reward,note\n0,-0.5,\n1,0.2,\n2,nan,\n")
    for e in recent:
        common.write_text(tmp_path / "phase2" / "dpo-steer" / e / "adapter" / "steer.safetensors", e)
        common.write_text(tmp_path / "phase2" / "dpo-steer" / e / "log.csv", "step,loss\n0,0.7\n1,0.3\n")
    policy = Stand(truth)

    def watch(policy, S, streams, questions=(), desc="", path=None, begun=None):
        out = {s["stream"]: [] for s in streams}
        for s in streams:
            for t, clip in enumerate(s["clips"]):
                written = [row["memory"] for row in out[s["stream"]]]
                sample = policy.write(common.make_context(s, t, written), (s["stream"], t, desc))
                out[s["stream"]].append({"stream": s["stream"], "clip": t, "start": clip["start"],
                                         "end": clip["end"], "memory": sample.memory or "", "text": ""})
        return out
    loading = importlib.import_module("loading")
    monkeypatch.setattr(common, "load_policy", lambda S: policy)
    monkeypatch.setattr(loading, "load_adapter", lambda policy, writer, folder: policy.load(writer, folder))
    monkeypatch.setattr(importlib.import_module("03_collect_tasks"), "watch", watch)
    monkeypatch.setattr(common, "rollout", lambda policy, contexts, n, keys, *a, **k: [
        [policy.write(c, key)] for c, key in zip(contexts, keys)])
    monkeypatch.setattr(common, "clip_frames",
                        lambda clip, n: (np.zeros((n, 96, 96, 3), np.uint8), list(range(n))))
    return SimpleNamespace(folder=tmp_path, policy=policy)


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
    memories = common.read_jsonl(out / "memories.jsonl")
    assert len(memories) == (1 + 3 + 1 + 3 + 3) * 36
    assert {m["environment"] for m in memories} == {"", "place", "wear", "action"}
    text = (out / "results.md").read_text()
    widths = {line.count("|") for line in text.split("## ")[1].splitlines() if line.startswith("|")}
    assert widths == {6} and "Phase Two, dpo-steer" in text
    assert "intervals over streams" in text

    # run again: nothing is watched; a new adapter is watched alone
    run.policy.loaded.clear()
    stage.main(arguments)
    assert run.policy.loaded == [] and json.loads((out / "results.json").read_text()) == R
    common.write_text(run.folder / "phase2" / "grpo-steer" / "wear" / "adapter" / "steer.safetensors", "new")
    stage.main(arguments)
    assert [f.parts[-3:-1] for f in run.policy.loaded[1:]] == [("grpo-steer", "wear")]
    assert "Phase Two, grpo-steer (1 of 3)" in (out / "results.md").read_text()


def test_methods_and_forks(run, capsys, tmp_path):
    stage.main([f"--RUN={run.folder}", "--BOOTSTRAP=50", "--METHODS=base+prompt,dpo-steer,dpo-stear-x"])
    rows = json.loads((run.folder / "eval" / "results.json").read_text())["rows"]
    assert {r["method"] for r in rows} == {"base", "base+prompt", "phase1", "dpo-steer"}
    assert "!! dpo-stear-x" in (said := capsys.readouterr().out) and "--ADAPTER=stear --NAME=x" in said
    # a fork with a Phase One of its own must not wear the adapters of the run that it came from
    fork = tmp_path / "fork"
    common.write_text(fork / "phase1" / "adapter" / "adapter_model.safetensors", "another")
    S = SimpleNamespace(RUN=str(fork), FROM=str(run.folder), METHODS="", EXPECT="dpo-steer", MODEL="tiny")
    assert "dpo-steer" not in {j.method for j in stage.find_jobs(S, ["place"])}
    (fork / "phase1" / "adapter" / "adapter_model.safetensors").unlink()
    (fork / "phase1" / "adapter").rmdir()
    assert stage.find_jobs(S, ["place"])[-1].folder == run.folder / "phase2/dpo-steer/place/adapter"


def test_the_page_stands_alone(run):
    name = "dpo-<b>&\"'"                                                     # a folder may be called anything
    common.write_text(run.folder / "phase2" / name / "wear" / "adapter" / "steer.safetensors", "x")
    stage.main([f"--RUN={run.folder}", "--BOOTSTRAP=50"])
    text = (run.folder / "eval" / "report.html").read_text()
    page = Page(text)
    assert page.fetched and all(v.startswith("data:image/jpeg;base64,") for v in page.fetched)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "dpo-<b>&" not in text and name in page.text and "<face_" in page.text and "<face_" not in text
    assert text.count("<svg") == 3 and 'name="viewport"' in text and "prefers-color-scheme:dark" in text
    assert "<mark>" in text


def test_the_examples_in_the_docstrings_hold():
    for module in (stage, report):
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
    job = lambda m: SimpleNamespace(method=m, environment="", slug=m)
    early = [reply("w", "x", "B") | {"task": n} for n in ("first", "second")]
    after = [reply("s", "x", "A"), reply("t", "x", "insufficient")]
    own = [reply("w", "x", "A") | {"task": "first"}, reply("w", "x", "B") | {"task": "second"}]
    units, weights = dict(zip("stw", range(3))), stage.resamples([3], 50, 0)
    R = stage.summarise([job("base"), job("phase1")], {"base": own + after, "phase1": after}, {"x": early},
                        units, weights, SimpleNamespace(RECENT=2))
    row = {(r["method"], r["scope"]): r for r in R["rows"] if r["environment"] == "all"}
    assert [row[m, "after"]["questions"] for m in ("base", "phase1")] == [2, 2]
    assert row["base", "all"]["accuracy"]["mean"] == 0.5 and row["phase1", "all"]["accuracy"]["mean"] == 0.25
