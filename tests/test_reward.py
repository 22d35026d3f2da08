"""Stage 4: the preference graph against plain searches, what may be compared, and
the reward model's invariances."""
import csv
import doctest
import importlib
import itertools
import os
import random
import shutil
import signal

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file                                     # noqa: E402

import common                                                               # noqa: E402
import loading                                                              # noqa: E402

stage = importlib.import_module("04_train_reward")
world = importlib.import_module("tiny.world")


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(stage)
    assert result.attempted >= 6 and result.failed == 0


# ================================================================ the graph
def walks(edges, start):
    """Every path without a repeated node from `start`, by brute force."""
    todo = [[start]]
    while todo:
        path = todo.pop()
        yield path
        todo += [path + [w] for l, w in edges if l == path[-1] and w not in path]


def random_graph(rng, acyclic):
    nodes = rng.randint(2, 6)
    pairs = [p for p in itertools.permutations(range(nodes), 2) if not acyclic or p[0] < p[1]]
    names = rng.sample(range(8), nodes)                                     # the order of names says nothing
    return [(names[a], names[b]) for a, b in rng.sample(pairs, rng.randint(1, len(pairs)))]


def test_edges_of_strong_components_go_and_all_others_stay():
    rng, removed = random.Random(0), 0
    for _ in range(300):
        edges = random_graph(rng, acyclic=False)
        inside = [(l, w) for l, w in edges if any(path[-1] == l for path in walks(edges, w))]
        assert stage.consistent(edges) == [e for e in edges if e not in inside]
        removed += len(inside)
    assert removed > 300 and stage.consistent([]) == []


def test_two_cycles_joined_by_an_edge_keep_the_edge():
    edges = [(0, 1), (1, 0), (1, 2), (2, 3), (3, 4), (4, 2)]
    assert stage.consistent(edges) == [(1, 2)]


def test_longest_paths_against_brute_force():
    rng = random.Random(1)
    for _ in range(300):
        edges, want = random_graph(rng, acyclic=True), {}
        for start in {n for e in edges for n in e}:
            for path in walks(edges, start):
                if len(path) > 1:
                    want[start, path[-1]] = max(want.get((start, path[-1]), 0), len(path) - 1)
        assert stage.longest_paths(edges) == want


# ================================================================ the pair rules
def test_pair_rules_on_random_graphs():
    rng, found = random.Random(2), 0
    for _ in range(500):
        edges = random_graph(rng, acyclic=True)
        quality, length = [rng.choice([0.5, -0.5]) for _ in range(8)], [rng.randint(5, 25) for _ in range(8)]
        paths = stage.longest_paths(edges)
        allowed = {(x, y): n for (y, x), n in paths.items()
                   if quality[x] >= quality[y] and not (quality[x] < 0 and quality[y] < 0)}
        pair = stage.choose_pair(edges, quality, length)
        assert (pair is None) == (not allowed)
        if pair is None:
            continue
        x, y, path = pair
        found += 1
        assert allowed[x, y] == path == max(allowed.values())
        rivals = [p for p, n in allowed.items() if n == path]
        equal = [p for p in rivals if quality[p[0]] == quality[p[1]]]
        assert (x, y) in (equal or rivals)
        assert abs(length[x] - length[y]) == min(abs(length[a] - length[b]) for a, b in equal or rivals)
    assert found > 200


def test_never_two_of_low_quality():
    assert stage.choose_pair([(0, 1), (1, 2), (0, 2)], [-0.5, -0.5, -0.5], [9, 9, 9]) is None


def test_a_long_path_beats_equal_quality_and_length():
    assert stage.choose_pair([(0, 1), (1, 2), (0, 2)], [-0.5, 0.5, 0.5], [20, 9, 9]) == (2, 0, 2)


# ================================================================ what is judged
class Judge:
    """The judge of the embedded world, with a list of what it was asked and a share of failures."""

    def __init__(self, fail=0.0):
        self.asked, self.inner, self.rng, self.fail = [], world.Judge([]), random.Random(0), fail

    def ask(self, kind, items):
        self.asked += [(kind, item["first"], item["second"]) for item in items]
        return [None if self.rng.random() < self.fail else v for v in self.inner.ask(kind, items)]


def make_samples(rng, clip):
    """Eight samples: true ones, a wrong one, two alike, and two malformed."""
    facts = world.clip_facts(clip)
    texts = [world.sentence("now", rng.sample(facts, 3)) for _ in range(6)]
    texts[5] = texts[0]
    samples = [{"text": f'plan: x\n</think>\n\n{{"description": "{m}"}}', "memory": m,
                "memory_tokens": 12 + i, "format": 0, "quality": -0.5 if i == 2 else 0.5,
                "thinking_tokens": 4, "ids": [1]} for i, m in enumerate(texts)]
    return samples + [{"text": "broken", "memory": None, "memory_tokens": 0, "format": -1.5, "quality": None,
                       "thinking_tokens": 0, "ids": [1]} for _ in range(2)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with what stages 1 and 3 leave, but no videos: 4 streams of 4 clips,
    ten questions per environment."""
    folder, rng, streams, truths, cache = tmp_path_factory.mktemp("reward"), random.Random(0), [], [], []
    for n in range(4):
        truth, name = world.make_stream(n, clips=4), f"deploy-{n}"
        clips = [{"clip": t, "start": 10.0 * t, "end": 10.0 * t + 10, "file": "none.mp4",
                  "offset": 10.0 * t, "speech": []} for t in range(4)]
        memories = [world.caption(truth, t, None, rng) for t in range(4)]
        streams.append({"stream": name, "split": "deploy", "source": "tiny", "clips": clips})
        truths += [{"stream": name, "clip": t, "facts": clip} for t, clip in enumerate(truth)]
        cache += [{"stream": name, "clip": t, "history": memories[:t], "samples": make_samples(rng, clip)}
                  for t, clip in enumerate(truth)]
    tasks = [t for i in range(12) for t in world.make_tasks("x", world.make_stream(i), rng)]
    recent = {e: [t for t in tasks if t["environment"] == e][:10] for e in world.CATEGORIES}
    for name, rows in (("streams/streams", streams), ("streams/truth", truths), ("tasks/cache", cache)):
        common.write_jsonl(folder / f"{name}.jsonl", rows)
    common.write_json(folder / "tasks/recent.json", recent)
    return folder


def settings(run, *more):
    return common.settings(vars(stage), [f"--RUN={run}", *ARGS, *more])


def test_malformed_and_equal_texts_are_never_compared_and_both_orders_are_asked(run, tmp_path):
    cache, judge = common.read_jsonl(run / "tasks/cache.jsonl"), Judge()
    questions = ["Where were the people at 00:00:10?"]
    groups, pairs, figures = stage.preferences(settings(run), judge, {"place": cache}, {"place": questions},
                                               tmp_path / "v")
    asked = {(a, b) for _, a, b in judge.asked}
    assert all(a and b and a != b for a, b in asked) and asked == {(b, a) for a, b in asked}
    wellformed = {(c["stream"], c["clip"]): [i for i, s in enumerate(c["samples"]) if s["format"] == 0]
                  for c in cache}
    for g in groups:
        assert {i for p in g["preferences"] for i in p} <= set(wellformed[g["stream"], g["clip"]])
    assert pairs and figures["place"]["judged"] * 2 == len(judge.asked)
    again = Judge()
    assert stage.preferences(settings(run), again, {"place": cache}, {"place": questions},
                             tmp_path / "v")[:2] == (groups, pairs)
    assert not again.asked                                              # a finished file is not asked again


def test_a_failed_verdict_drops_out_and_a_failed_judge_stops(run, tmp_path):
    cache, asked = (common.read_jsonl(run / "tasks/cache.jsonl"),
                    {"place": ["Where were the people at 00:00:10?"]})
    all_of_them, _, _ = stage.preferences(settings(run), Judge(), dict.fromkeys(asked, cache), asked, tmp_path / "a")
    some, _, figures = stage.preferences(settings(run), Judge(fail=0.3), dict.fromkeys(asked, cache), asked,
                                         tmp_path / "b")
    count = lambda groups: sum(len(g["preferences"]) for g in groups)
    assert figures["place"]["failed"] > 0 and 0 < count(some) < count(all_of_them)
    with pytest.raises(SystemExit, match="the judge failed on"):
        stage.preferences(settings(run), Judge(fail=0.9), dict.fromkeys(asked, cache), asked, tmp_path / "c")


# ================================================================ the whole stage, the model, TRL's format
ARGS = ["--STEPS=4", "--CONTEXTS=4", "--ROWS=2", "--WARMUP=1", "--BOOTSTRAP=50"]


@pytest.fixture(scope="module")
def trained(run):
    """The run after stage 4 in one go."""
    stage.main([f"--RUN={run}", *ARGS])
    return run


def test_outputs(trained):
    report = common.read_json(trained / "reward/report.json")
    assert (report["padding_change"] < 1e-4
            and 0 <= report["pair_accuracy"]["low"] <= report["pair_accuracy"]["high"] <= 1)
    assert {"shuffled_accuracy", "length_correlation", "order_agreement", "yield"} <= set(report)
    with open(trained / "reward/log.csv", newline="") as f:
        assert [r["step"] for r in csv.DictReader(f)] == list("0123")
    kept = {(r["environment"], r["stream"], r["clip"], r["winner"], r["loser"])
            for r in common.read_jsonl(trained / "reward/preferences.jsonl")}
    for r in common.read_jsonl(trained / "reward/pairs.jsonl"):
        assert r["path"] > 1 or (r["environment"], r["stream"], r["clip"], r["winner"], r["loser"]) in kept


def test_pairs_are_in_trl_format(trained):
    rows, pairs = (common.read_jsonl(trained / f"reward/{n}.jsonl") for n in ("pairs_trl", "pairs"))
    cache = {(c["stream"], c["clip"]): c for c in common.read_jsonl(trained / "tasks/cache.jsonl")}
    assert len(rows) == len(pairs) > 0
    for row, p in zip(rows, pairs):
        c = cache[p["stream"], p["clip"]]
        assert (set(row) == {"prompt", "chosen", "rejected"}
                and all(isinstance(v, str) and v for v in row.values()))
        assert row["chosen"] == c["samples"][p["winner"]]["text"] != row["rejected"]
        assert row["prompt"].count("<|video_pad|>") == len(c["history"]) + 1
        assert all(m in row["prompt"] for m in c["history"]) and row["prompt"].endswith("<think>\n")


def test_pairs_load_in_trl(trained):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    rows = datasets.Dataset.from_list(common.read_jsonl(trained / "reward/pairs_trl.jsonl"))
    assert (not trl.data_utils.is_conversational(rows[0])
            and set(rows.column_names) == {"prompt", "chosen", "rejected"})


def test_score_depends_neither_on_padding_nor_on_company_nor_on_the_writer(trained):
    S = settings(trained)
    policy = common.load_policy(S)
    model = stage.load_reward_model(S, policy)
    memories = ["now, in the kitchen.", "still, a red lamp, <face_3> says 'tea noon', exactly one ball.",
                "now."]
    histories = [[], ["now, a red lamp."] * 4, ["still, <face_1> wears red, a blue cup."]]
    items = [{"questions": ["Where were the people at 00:00:10?"] * n, "history": h, "memory": m}
             for n, h in zip((1, 5, 2), histories) for m in memories]
    together, alone = stage.score(model, items), [stage.score(model, [item])[0] for item in items]
    assert together == pytest.approx(alone, abs=1e-4) and len(set(together)) == len(items)
    assert policy.who == "base"
    # the policy is what it was: the reward model's LoRA is off, whoever writes
    ids = torch.tensor([policy.tokenizer("still, a red lamp.")["input_ids"]])
    with torch.no_grad():
        bare = common.load_policy(S).lm(input_ids=ids).last_hidden_state
        assert torch.equal(policy.lm(input_ids=ids).last_hidden_state, bare)
        policy.add("phase1", "lora")
        assert torch.equal(policy.lm(input_ids=ids).last_hidden_state, bare)             # a new LoRA is zero
        assert stage.score(model, items) == pytest.approx(together, abs=1e-6) and policy.who == "phase1"
        assert torch.equal(policy.lm(input_ids=ids).last_hidden_state, bare)


def test_stop_and_resume_give_the_same_model(trained, tmp_path, monkeypatch):
    """Two steps, a stop, two more: bit-equal to four at once."""
    for name in ("streams", "tasks"):
        shutil.copytree(trained / name, tmp_path / name)

    def stage_log():
        with open(tmp_path / "reward/log.csv", newline="") as f:
            return list(csv.DictReader(f))

    with monkeypatch.context() as patch:
        log = common.Training.log

        def stop_after_two_steps(run, *row):
            log(run, *row)
            if len(run.rows) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        patch.setattr(common.Training, "log", stop_after_two_steps)
        with pytest.raises(SystemExit, match="stopped after step 1"):
            stage.main([f"--RUN={tmp_path}", *ARGS])
    assert (tmp_path / "reward/checkpoint.pt").exists() and not (tmp_path / "reward/report.json").exists()
    stage.main([f"--RUN={tmp_path}", *ARGS])
    assert [row["step"] for row in stage_log()] == list("0123")
    for name in ("head.safetensors", "adapter_model.safetensors"):
        one, two = (load_file(folder / "reward/model" / name) for folder in (trained, tmp_path))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
