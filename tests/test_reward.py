"""Stage 4: the preference graph against plain searches, what may be compared, and
the reward model's invariances."""
import csv
import doctest
import itertools
import os
import random
import shutil
import signal

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file                                     # noqa: E402

import common                                                               # noqa: E402
from support import runs                                                    # noqa: E402
from support.checkpoint import Training                                     # noqa: E402
from tiny import world                                                      # noqa: E402

stage = common.stage("04_train_reward")


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(stage)
    assert result.attempted >= 9 and result.failed == 0


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
    """The judge of the toy world, with a list of what it was asked and a share of failures."""

    def __init__(self, fail=0.0):
        self.asked, self.inner, self.rng, self.fail = [], world.Judge([]), random.Random(0), fail

    def ask(self, prompt, items):
        assert prompt is stage.PREFER
        self.asked += [(item["first"], item["second"]) for item in items]
        return [None if self.rng.random() < self.fail else v for v in self.inner.ask(prompt, items)]


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
    """A run folder with what stages 1 and 3 leave, but an empty video: 4 streams of 4 clips,
    ten questions per environment."""
    folder, rng, streams, truths, cache = tmp_path_factory.mktemp("reward"), random.Random(0), [], [], []
    for n in range(4):
        truth, name = world.make_stream(n, clips=4), f"deploy-{n}"
        clips = [{"clip": t, "start": 10.0 * t, "end": 10.0 * t + 10, "file": "none.mp4",
                  "offset": 10.0 * t, "speech": []} for t in range(4)]
        memories = [world.caption(truth, t, None, rng) for t in range(4)]
        streams.append({"stream": name, "split": "deploy", "source": "tiny", "clips": clips})
        truths += [{"stream": name, "clip": t, "facts": clip} for t, clip in enumerate(truth)]
        cache += [{"stream": name, "clip": t, "history": memories[:t], "environments": [*world.CATEGORIES],
                   "samples": make_samples(rng, clip)} for t, clip in enumerate(truth)]
    tasks = [t for i in range(12) for t in world.make_tasks("x", world.make_stream(i), rng)]
    recent = {e: [t for t in tasks if t["environment"] == e][:10] for e in world.CATEGORIES}
    for name, rows in (("streams/streams", streams), ("streams/truth", truths), ("tasks/cache", cache)):
        runs.write_jsonl(folder / f"{name}.jsonl", rows)
    (folder / "streams" / "none.mp4").touch()
    runs.write_json(folder / "tasks/recent.json", recent)
    return folder


PLACE = {"place": ["Where were the people at 00:00:10?"]}


def settings(run, *more):
    return common.settings(vars(stage), [f"--RUN={run}", *ARGS, *more])


def test_malformed_and_equal_texts_are_never_compared_and_the_second_order_only_where_the_first_is_no_tie(
        run, tmp_path):
    cache, judge = runs.read_jsonl(run / "tasks/cache.jsonl"), Judge()
    contexts, pairs, yields = stage.find_preferences(judge, cache, PLACE, tmp_path / "v", chunk=3)
    assert all(a and b and a != b for a, b in judge.asked)
    tied = {(a, b) for a, b in judge.asked
            if world.Judge().prefer(PLACE["place"], a, b) == "tie"}
    asked = set(judge.asked)
    assert len(tied) > 9 and len(asked - tied) > 9
    assert all((b, a) in asked for a, b in asked - tied)
    wellformed = {(c["stream"], c["clip"]): [i for i, s in enumerate(c["samples"]) if s["format"] == 0]
                  for c in cache}
    for c in contexts:
        assert {i for p in c.preferences for i in p} <= set(wellformed[c.stream, c.clip])
    assert pairs and len(judge.asked) == 2 * yields["place"].compared - yields["place"].tied
    again = Judge()
    assert stage.find_preferences(again, cache, PLACE, tmp_path / "v", chunk=64) == (contexts, pairs, yields)
    assert not again.asked                                              # a finished file is not asked again


def test_a_limit_on_comparisons_takes_the_same_pairs_again_and_joins_all_memories(run, tmp_path):
    for n in range(2, 12):
        everything = stage.around(n)
        assert {frozenset(pair) for pair in everything} == {frozenset(pair) for pair in itertools.combinations(range(n), 2)}
        assert len(everything) == n * (n - 1) // 2
        joined = {0}
        for _ in range(n):
            for a, b in everything[:n - 1]:
                joined |= {a, b} if joined & {a, b} else set()
        assert joined == set(range(n))
    samples = make_samples(random.Random(3), world.make_stream(0)[0])     # five texts, one of them twice
    assert stage.comparable(samples, 5) == [(0, 1), (0, 4), (1, 2), (1, 5), (2, 3), (3, 4), (4, 5)]
    assert stage.comparable(samples, 10) == stage.comparable(samples)
    cache, judge = runs.read_jsonl(run / "tasks/cache.jsonl"), Judge()
    found = stage.find_preferences(judge, cache, PLACE, tmp_path, chunk=3, limit=5)
    first_orders = {tuple(sorted(pair)) for pair in judge.asked}
    assert 0 < len(first_orders) <= 5 * len(cache) and found[2]["place"].compared == stage.count_comparisons(
        [row | {"environments": ["place"]} for row in cache], 5)
    again = Judge()
    assert stage.find_preferences(again, cache, PLACE, tmp_path, chunk=64, limit=5) == found and not again.asked


def test_the_yield_adds_up(run, tmp_path):
    cache = runs.read_jsonl(run / "tasks/cache.jsonl")
    contexts, pairs, yields = stage.find_preferences(Judge(fail=0.2), cache, PLACE, tmp_path, chunk=64)
    y = yields["place"]
    assert y.compared == y.failed + y.tied + y.contradicted + y.cyclic + y.preferences
    assert min(y.failed, y.tied, y.preferences) > 0 and y.contexts == len(cache)
    assert y.preferences == sum(len(c.preferences) for c in contexts) and y.contexts_with_pair == len(pairs)
    assert stage.summed({"a": y, "b": y}).compared == 2 * y.compared


def test_an_environment_learns_from_its_own_rows_alone(run, tmp_path):
    cache = runs.read_jsonl(run / "tasks/cache.jsonl")
    for row in cache[5:]:
        row["environments"] = ["wear"]
    contexts, pairs, yields = stage.find_preferences(Judge(), cache, PLACE, tmp_path, chunk=64)
    assert yields["place"].contexts == 5
    allowed = {(row["stream"], row["clip"]) for row in cache[:5]}
    assert {(c.stream, c.clip) for c in [*contexts, *pairs]} <= allowed
    assert stage.count_comparisons(cache) == sum(len(stage.comparable(row["samples"])) * len(row["environments"])
                                                 for row in cache)


def test_a_failed_verdict_drops_out_and_a_failed_judge_stops(run, tmp_path):
    cache = runs.read_jsonl(run / "tasks/cache.jsonl")
    all_of_them, _, _ = stage.find_preferences(Judge(), cache, PLACE, tmp_path / "a", chunk=64)
    some, _, yields = stage.find_preferences(Judge(fail=0.3), cache, PLACE, tmp_path / "b", chunk=64)
    count = lambda contexts: sum(len(c.preferences) for c in contexts)
    assert yields["place"].failed > 0 and 0 < count(some) < count(all_of_them)
    without, _, _ = stage.find_preferences(None, cache, PLACE, tmp_path / "b", chunk=64)
    assert without == some                                    # what has begun to train asks no more
    again = Judge()
    mended, _, _ = stage.find_preferences(again, cache, PLACE, tmp_path / "b", chunk=64)
    assert mended == all_of_them and again.asked              # else what failed is asked for again
    with pytest.raises(SystemExit, match="the judge failed on"):
        stage.find_preferences(Judge(fail=0.9), cache, PLACE, tmp_path / "c", chunk=64)


def test_both_orders_must_agree():
    words = ("first", "second", "tie", None)
    said = {(a, b): stage.agreed(a, b) for a in words for b in words}
    assert [pair for pair, word in said.items() if word in ("first", "second")] == [("first", "second"),
                                                                                    ("second", "first")]
    assert {pair for pair, word in said.items() if word == "failed"} == {
        pair for pair in said if None in pair and "tie" not in pair}
    assert said["first", "first"] == said["second", "second"] == "contradicted" and said["tie", "tie"] == "tied"


def test_held_out_are_whole_streams_or_the_clips_of_a_single_one():
    rows = [{"stream": s, "clip": t} for s in "abcde" for t in range(4)]
    assert stage.hold_out(rows, 0.25) == {("e", t) for t in range(4)}
    assert stage.hold_out(rows, 0.5) == {(s, t) for s in "de" for t in range(4)}
    assert stage.hold_out(rows[:4], 0.25) == {("a", 3)}
    assert stage.hold_out(rows[:8], 0.01) == {("b", t) for t in range(4)} and stage.hold_out([], 0.25) == set()


def test_pair_accuracy_by_hand():
    context = lambda stream, clip, pairs: stage.JudgedContext("e", stream, clip, [], [""] * 3, [1] * 3, pairs)
    R = torch.tensor([1.0, 2.0, 2.0]).numpy()
    some = [context("a", 0, [(1, 0), (0, 2)]), context("a", 1, [(1, 2)]), context("b", 0, [(2, 0)])]
    found = stage.pair_accuracy(some, [R] * 3, resamples=200, seed=0)
    assert found["mean"] == (1 + 0 + 0.5 + 1) / 4 and (found["low"], found["high"]) == (0.5, 1.0)    # 1.5 of 3, 1 of 1
    single = stage.pair_accuracy(some[:2], [R] * 2, resamples=200, seed=0)            # then over clips
    assert single["mean"] == single["low"] == single["high"] == 0.5


def test_r_is_shown_any_number_of_questions_in_any_order():
    draw, questions = random.Random(0), list("abcde")
    shown = [stage.some_questions(draw, questions) for _ in range(2000)]
    assert {len(some) for some in shown} == {1, 2, 3, 4, 5} and all(len(set(some)) == len(some) for some in shown)
    first = [sum(some[0] == q for some in shown) for q in questions]
    assert min(first) > 330 and questions == list("abcde")


# ================================================================ the whole stage, the model, TRL's format
ARGS = ["--STEPS=4", "--CONTEXTS=4", "--ROWS=2", "--WARMUP=1", "--BOOTSTRAP=50"]


@pytest.fixture(scope="module")
def trained(run):
    """The run after stage 4 in one go."""
    stage.main([f"--RUN={run}", *ARGS])
    return run


def test_outputs(trained):
    report = runs.read_json(trained / "reward/report.json")
    assert 0 <= report["pair_accuracy"]["low"] <= report["pair_accuracy"]["high"] <= 1
    assert {"shuffled_accuracy", "length_correlation", "spread", "yield"} <= set(report)
    assert set(report["yield"]) == {*world.CATEGORIES, "all"} and report["yield"]["all"]["failed"] == 0
    with open(trained / "reward/log.csv", newline="") as f:
        assert [r["step"] for r in csv.DictReader(f)] == list("0123")
    kept = {(r["environment"], r["stream"], r["clip"], r["winner"], r["loser"])
            for r in runs.read_jsonl(trained / "reward/preferences.jsonl")}
    for r in runs.read_jsonl(trained / "reward/pairs.jsonl"):
        assert r["path"] > 1 or (r["environment"], r["stream"], r["clip"], r["winner"], r["loser"]) in kept


def test_an_edited_prompt_is_not_continued(trained, monkeypatch):
    monkeypatch.setattr(stage, "PREFER", type(stage.PREFER)("prefer", stage.PREFER + " Be strict."))
    with pytest.raises(SystemExit, match="PREFER"):
        stage.main([f"--RUN={trained}", *ARGS])


def test_pairs_are_in_trl_format(trained):
    rows, pairs = (runs.read_jsonl(trained / f"reward/{n}.jsonl") for n in ("pairs_trl", "pairs"))
    cache = {(c["stream"], c["clip"]): c for c in runs.read_jsonl(trained / "tasks/cache.jsonl")}
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
    rows = datasets.Dataset.from_list(runs.read_jsonl(trained / "reward/pairs_trl.jsonl"))
    assert (not trl.data_utils.is_conversational(rows[0])
            and set(rows.column_names) == {"prompt", "chosen", "rejected"})


MEMORIES = ["now, in the kitchen.", "still, a red lamp, <face_3> says 'tea noon', exactly one ball.", "now."]
HISTORIES = [[], ["now, a red lamp."] * 4, ["still, <face_1> wears red, a blue cup."]]


def test_score_depends_neither_on_padding_nor_on_company_nor_on_the_writer(trained):
    S = settings(trained)
    policy = common.load_policy(S)
    model = stage.load_reward_model(S, policy)
    questions = [["Where were the people at 00:00:10?"] * n for n in (1, 5, 2)]
    readings = [stage.Reading(q, h, MEMORIES) for q, h in zip(questions, HISTORIES)]
    # together: rows of different lengths, padded; else each memory alone in a row of its own
    model.rows = 3
    together = [(R / model.spread).tolist() for R in model.measure(readings)]
    scores = [model.score(q, h, MEMORIES) for q, h in zip(questions, HISTORIES)]
    alone = [[model.score(q, h, [m])[0] for m in MEMORIES] for q, h in zip(questions, HISTORIES)]
    for row, packed, single in zip(together, scores, alone):
        assert row == pytest.approx(packed, abs=1e-4) and packed == pytest.approx(single, abs=1e-4)
    assert len({R for row in together for R in row}) == 9 and model.score(questions[0], [], []) == []
    assert policy.who == "base"
    # the policy is what it was: the reward model's LoRA is off, whoever writes
    ids = torch.tensor([policy.tokenizer("still, a red lamp.")["input_ids"]])
    with torch.no_grad():
        bare = common.load_policy(S).lm(input_ids=ids).last_hidden_state
        assert torch.equal(policy.lm(input_ids=ids).last_hidden_state, bare)
        policy.add("phase1", "lora")
        assert torch.equal(policy.lm(input_ids=ids).last_hidden_state, bare)             # a new LoRA is zero
        again = model.score(questions[1], HISTORIES[1], MEMORIES)
        assert again == pytest.approx(scores[1], abs=1e-6) and policy.who == "phase1"
        assert torch.equal(policy.lm(input_ids=ids).last_hidden_state, bare)


def test_the_order_of_the_questions_hardly_matters(trained):
    """What R prefers stays for most pairs of memories, and R moves by less than its spread."""
    model = stage.load_reward_model(settings(trained), common.load_policy(settings(trained)))
    draw, asked, mixed = random.Random(0), [], []
    for tasks in runs.read_json(trained / "tasks/recent.json").values():
        questions = [task["question"] for task in tasks[:5]]
        for row in runs.read_jsonl(trained / "tasks/cache.jsonl")[::5]:
            memories = [s["memory"] for s in row["samples"] if s["memory"]]
            asked.append(stage.Reading(questions, row["history"], memories))
            mixed.append(stage.Reading(draw.sample(questions, 5), row["history"], memories))
    one, two = (torch.stack([torch.tensor(R) for R in model.measure(readings)])                # (24, 6)
                for readings in (asked, mixed))
    same = [(a[i] > a[j]) == (b[i] > b[j]) for a, b in zip(one, two) for i, j in itertools.combinations(range(5), 2)]
    assert sum(same) / len(same) > 0.75 and (one - two).abs().mean() < model.spread


def test_stop_and_resume_give_the_same_model(trained, tmp_path, monkeypatch):
    """Two steps, a stop, two more: bit-equal to four at once."""
    for name in ("streams", "tasks"):
        shutil.copytree(trained / name, tmp_path / name)

    def stage_log():
        with open(tmp_path / "reward/log.csv", newline="") as f:
            return list(csv.DictReader(f))

    with monkeypatch.context() as patch:
        log = Training.log

        def stop_after_two_steps(run, *row):
            log(run, *row)
            if len(run.rows) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        patch.setattr(Training, "log", stop_after_two_steps)
        with pytest.raises(SystemExit, match="stopped after step 1"):
            stage.main([f"--RUN={tmp_path}", *ARGS])
    assert (tmp_path / "reward/checkpoint.pt").exists() and not (tmp_path / "reward/report.json").exists()
    stage.main([f"--RUN={tmp_path}", *ARGS])
    assert [row["step"] for row in stage_log()] == list("0123")
    for name in ("head.safetensors", "adapter_model.safetensors"):
        one, two = (load_file(folder / "reward/model" / name) for folder in (trained, tmp_path))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
