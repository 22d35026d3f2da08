"""Memory format, Phase One's rewards and curriculum, and the loop: resume, signals, what makes it stop."""
import csv
import doctest
import importlib
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from support import decode, runs                                                    # noqa: E402
from support.checkpoint import Training                                     # noqa: E402
from support.plan import Room                                               # noqa: E402

phase1 = importlib.import_module("02_phase1_train")


@pytest.mark.parametrize("name", ["common", "support.runs", "02_phase1_train", "04_train_reward", "05_phase2_train"])
def test_the_examples_in_the_docstrings_are_true(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


# ================================================================ memory format
@pytest.mark.parametrize("text, memory, thinking", [
    ('plan\n</think>\n\n{"description": "now, a red lamp."}', "now, a red lamp.", "plan"),
    ('</think>{"description": "x"}', "x", ""),
    ('</think> \n {"description": " x "} \n', "x", ""),
    ('</think>{"description": "<face_3> says \\"tea\\" \\u00e9"}', '<face_3> says "tea" é', ""),
    ('</think>{"description": "a } { b"}', "a } { b", ""),
    ('{"description": "x"}', None, '{"description": "x"}'),                           # thinking never ends
    ('a</think>b</think>{"description": "x"}', None, "a"),                            # two ends
    ('a</think>{"description": "x"}</think>', None, "a"),
    ('a</think>{"description": "x"} and more', None, "a"),
    ('a</think>so: {"description": "x"}', None, "a"),
    ('a</think>```json\n{"description": "x"}\n```', "x", "a"),
    ('a</think>\n\n```\n {"description": "x"} \n``` \n', "x", "a"),
    ('a</think>```json\n{\n  "description": "take ```b``` out"\n}\n```', "take ```b``` out", "a"),
    ('a</think>```json\n{"description": "x"}\n', None, "a"),                          # the fence stays open
    ('a</think>{"description": "x"}\n```', None, "a"),
    ('a</think>```json\n```json\n{"description": "x"}\n```\n```', None, "a"),         # two fences
    ('a</think>```json\n{"description": "x"}\n```\n```json\n{"description": "x"}\n```', None, "a"),
    ('a</think>Here:\n```json\n{"description": "x"}\n```', None, "a"),               # text outside
    ('a</think>```json\n{"description": "x"}\n```\nDone.', None, "a"),
    ('a</think>```python\n{"description": "x"}\n```', None, "a"),
    ('a</think>```json\n{"description": "x"} yes\n```', None, "a"),
    ('```json\na</think>{"description": "x"}\n```', None, "```json\na"),              # begun in the thinking
    ('a</think>{"description": "x"', None, "a"),                                      # cut off
    ('a</think>{"description": "x"}{"description": "y"}', None, "a"),
    ('a</think>{"description": "x", "description": "y"}', None, "a"),                 # the key twice
    ('a</think>{"description": "x", "mood": "y"}', None, "a"),
    ('a</think>{"Description": "x"}', None, "a"),
    ('a</think>{"description": ""}', None, "a"),
    ('a</think>{"description": "  "}', None, "a"),
    ('a</think>{"description": null}', None, "a"),
    ('a</think>{"description": 3}', None, "a"),
    ('a</think>{"description": ["x"]}', None, "a"),
    ('a</think>{"description": {"description": "x"}}', None, "a"),
    ('a</think>[["description", "x"]]', None, "a"),                                   # not an object
    ('a</think>"description"', None, "a"),
    ('a</think>{}', None, "a"),
    ("a</think>{'description': 'x'}", None, "a"),
    ("a</think>", None, "a"), ("</think>", None, ""), ("", None, "")])
def test_parse_response(text, memory, thinking):
    assert common.parse_response(text) == (memory, thinking)


def rolled_out(policy, context, monkeypatch, tokens, limit):
    """The Sample of a rollout that draws these ids, and the end token after them; limit: MAX_NEW_TOKENS."""
    coming = iter([*tokens, policy.end, None])
    monkeypatch.setattr(decode, "pick", lambda logits, u, how: torch.full_like(u, next(coming), dtype=torch.long))
    monkeypatch.setattr(policy.S, "MAX_NEW_TOKENS", limit)
    [[sample]] = common.rollout(policy, [context], 1, [(1,)])
    return sample


OBJECT = '{"description": "now, a red lamp."}'


@pytest.mark.parametrize("text, unread, is_memory", [
    (OBJECT, "", True),
    (OBJECT + "\n\n\n \t", "", True),                            # white space may follow, until the end token
    (OBJECT + "\n, red", " red", False),                     # anything else is the last token
    (OBJECT + "</think> red", " red", False),
    (f"```json\n{OBJECT}\n```", "", True),                       # a fence that is open is closed
    (f"```json\n{OBJECT}\n```\n", "", True),
    (f"```json\n{OBJECT}\n```\n, red", " red", False),
    (f"```json\n{OBJECT}\nred\n```", "", False)])               # not complete, so it goes on to its end
def test_an_answer_stops_behind_its_object_or_its_fence(policy, contexts, monkeypatch, text, unread, is_memory):
    ids = policy.tokenizer("</think>" + text)["input_ids"]
    sample = rolled_out(policy, contexts[0], monkeypatch, ids, limit=99)
    assert sample.text + unread == "</think>" + text
    assert (sample.ids[-1] == policy.end) == (not unread) and not sample.truncated
    assert sample.memory == ("now, a red lamp." if is_memory else None)


@pytest.mark.parametrize("limit, is_said", [(68, True), (69, False)])
def test_too_little_room_for_an_answer_is_said(monkeypatch, capsys, limit, is_said):
    monkeypatch.setattr(common, "load_model", lambda S: (_ for _ in ()).throw(SystemExit("loaded")))
    S = common.settings({"__doc__": ""}, [f"--MAX_NEW_TOKENS={limit}", "--THINK_TOKENS=16", "--MEMORY_TOKENS=17"])
    with pytest.raises(SystemExit, match="loaded"):
        common.load_policy(S)
    assert (f"*** MAX_NEW_TOKENS={limit} is less than 69" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize("model", ["tiny", "Qwen/Qwen3-VL-30B-A3B-Thinking"])
def test_answers_have_room_by_default(model):
    S = common.settings({"__doc__": ""}, [f"--MODEL={model}"])
    assert S.MAX_NEW_TOKENS >= 2 * S.THINK_TOKENS + S.MEMORY_TOKENS + 20


def test_an_answer_that_is_not_ended_is_malformed(policy, contexts, monkeypatch):
    ids = policy.tokenizer("</think>" + OBJECT)["input_ids"]
    ended = rolled_out(policy, contexts[0], monkeypatch, ids, limit=len(ids) + 1)
    assert ended.memory == "now, a red lamp." and not ended.truncated and ended.ids == [*ids, policy.end]
    cut = rolled_out(policy, contexts[0], monkeypatch, ids, limit=len(ids))
    assert cut.memory is None and cut.truncated and cut.text == ended.text and cut.memory_tokens == 0


# ================================================================ rewards of Phase One
def sample(memory, tokens=5, thinking=0):
    return common.Sample([1, 2], "", memory, thinking, tokens, False)


class FakeJudge:
    """Verdicts by a word in the memory; `rank` by the number of its words; what
    holds "fail" gets no verdict."""

    def __init__(self):
        self.asked = []

    def ask(self, prompt, items):
        kind = prompt.name
        self.asked += [(kind, item) for item in items]
        if kind == "rank":
            return [self.rank(item["memories"]) for item in items]
        return [None if f"fail {kind}" in m else f"not {kind}" not in m
                for m in (item["memory"] for item in items)]

    @staticmethod
    def rank(memories):
        if any("no ranking" in m for m in memories):
            return None
        n = [len(m.split()) for m in memories]
        return [1 + sum(x > y for x in n) + (n.count(y) - 1) / 2 for y in n]        # ties share the mean rank


def reward(contexts, samples, judge=None, richness_weight=0.05):
    """02's reward of samples, as groups."""
    groups = [common.Group(c, s) for c, s in zip(contexts, samples)]
    phase1.rewards(groups, judge or FakeJudge(), max_memory_tokens=17, max_think_tokens=16, format_penalty=-1.5,
                   richness_weight=richness_weight)
    return groups


def context(history=()):
    return common.Context("s", [{"clip": len(history)}], list(history), [])


def test_reward_terms_add_up():
    group = [sample("a lamp"), sample("a red lamp here"), sample("a red cup here"),    # 4 words twice: a tie
             sample("not faithful x"), sample("not clean x"), sample("face_3 x"),
             sample("a long one", tokens=18), sample(None, thinking=99), sample("fail faithful x"),
             sample("fail clean x"), sample("x", thinking=24)]
    judge = FakeJudge()
    reward([context(["before"])], [group], judge)
    # good: 0, 1, 2 and 10; by words 4, 4, 2, 1: ranks 1.5, 1.5, 3, 4; u = 1 - (rank - 1) / 3
    u = {1: 1 - 0.5 / 3, 2: 1 - 0.5 / 3, 0: 1 - 2 / 3, 10: 0.0}
    want = [0.5 + 0.05 * u[0], 0.5 + 0.05 * u[1], 0.5 + 0.05 * u[2], *[-0.5] * 4, -1.5, None, None, 0.5 - 0.5]
    assert [s.reward for s in group] == [None if w is None else pytest.approx(w) for w in want]
    assert [s.gate_value for s in group] == [s.reward for s in group]
    terms = {name: [s.terms[name] for s in group] for name in group[0].terms}
    assert list(terms) == ["format", "length", "quality", "rich"]
    assert terms["format"] == [0.0] * 7 + [-1.5] + [0.0] * 3
    assert terms["length"][7] == 0 and terms["length"][10] == -0.5    # malformed: the format term alone
    assert terms["quality"][:8] == [0.5] * 3 + [-0.5] * 4 + [0.0] and terms["quality"][8:10] == [None, None]
    asked = {item["memory"] for kind, item in judge.asked if kind != "rank"}
    assert not asked & {None, "face_3 x", "a long one"}                   # what breaks a rule needs no judge
    assert all(item["previous"] == "before" for kind, item in judge.asked if kind == "clean")


def test_richness_needs_two_good_memories_a_ranking_and_a_weight():
    two = [sample("a b"), sample("a b c")]
    def rich(group, weight=0.05):
        reward([context()], [group], richness_weight=weight)
        return [s.terms["rich"] for s in group]
    assert rich(two) == [0.0, 0.05]
    assert rich([sample("a b"), sample("a b c not clean"), sample(None)]) == [0.0] * 3
    assert rich([sample("a b"), sample("a no ranking")]) == [0.0] * 2
    assert rich(two, weight=0.0) == [0.0] * 2
    assert rich([sample("a b", thinking=40),
                 sample("a b c", thinking=40)]) == [0.0, 0.05]            # r_len excludes nobody


def test_rewards_keep_groups_apart():
    groups = reward([context(), context(["x"])],
                    [[sample("a b"), sample("a")], [sample("not clean b"), sample("fail clean")]])
    assert [[s.reward for s in g.samples] for g in groups] == [[0.55, 0.5], [-0.5, None]]


@pytest.mark.parametrize("tokens, want", [(0, 0), (16, 0), (17, -1 / 16), (24, -0.5), (32, -1), (33, -1),
                                          (10**6, -1)])
def test_length_reward(tokens, want):
    assert phase1.length_reward(tokens, 16) == pytest.approx(want)


@pytest.mark.parametrize("memory, tokens, holds", [
    ("<face_3> waves at <face_12>", 17, True), ("", 0, True), ("a face", 5, True),
    ("faces of 3 people", 5, True),
    ("<face_3> waves", 18, False), ("face_3 waves", 5, False), ("face 3 waves", 5, False),
    ("face3", 5, False), ("<face_3 waves", 5, False), ("<face_x> waves", 5, False),
    ("<face_3> and face_4", 5, False), ("<face 3>", 5, False)])
def test_rules_hold(memory, tokens, holds):
    assert phase1.rules_hold(memory, tokens, 17) == holds


# ================================================================ the rolling batch
def plain_streams(lengths=(12, 12, 9, 5)):
    return [{"stream": f"s{i}", "clips": [{"clip": t} for t in range(n)]} for i, n in enumerate(lengths)]


def rolling(lengths=(12, 12, 9, 5), **changed):
    constants = dict(seed=0, size=6, off_policy_steps=0, n_min=3, n_max=5, resample=0.0, window=5) | changed
    streams = plain_streams(lengths)
    captions = {s["stream"]: {c["clip"]: f"{s['stream']}/{c['clip']}" for c in s["clips"]} for s in streams}
    return phase1.RollingBatch(streams, captions, **constants)


def write(batch, step, n=3):
    """One step: contexts, and an update with memories that tell where they come from."""
    contexts = batch.next(step)
    batch.advance(step, [common.Group(c, [sample(f"{step}.{slot}.{j}") for j in range(n)])
                        for slot, c in enumerate(contexts)])
    return contexts


def slots(batch):
    """(stream number, first clip, memories) of every slot."""
    return [(s["number"], s["first"], list(s["memories"])) for s in batch.state]


def test_off_policy_history_is_the_captions():
    batch, seen = rolling(off_policy_steps=3), set()
    for step in range(3):
        contexts = write(batch, step)
        assert len(contexts) == 6 and batch.state == []
        for c in contexts:
            first = max(0, c.clip - 4)
            assert [x["clip"] for x in c.clips] == list(range(first, c.clip + 1))
            assert c.history == [f"{c.stream}/{t}" for t in range(first, c.clip)]
            seen.add((c.stream, c.clip))
    assert len(seen) > 10
    assert all(c.history == [] for c in batch.next(3))             # then every slot starts without a memory


@pytest.mark.parametrize("resample", [0.0, 1.0])
def test_extend_below_n_min_resample_above_n_max(resample):
    """RESAMPLE=0: a slot lives to N_MAX + 1 memories; RESAMPLE=1: to N_MIN; both end with their stream."""
    batch, lives = rolling(resample=resample, lengths=(12, 12, 9, 5)), []
    batch.next(0)
    for step in range(40):
        before = slots(batch)
        contexts = write(batch, step)
        for slot, ((i, first, kept), c) in enumerate(zip(before, contexts)):
            length = len(batch.streams[i]["clips"])
            assert c.stream == f"s{i}" and c.clip == first + len(kept) and c.history == kept[-4:]
            i2, first2, kept2 = slots(batch)[slot]
            n, ended = len(kept) + 1, first + len(kept) + 1 >= length
            goes = ended or n > 5 or (resample == 1 and n >= 3)
            if goes:
                lives.append((n, ended))
                assert kept2 == [] and 0 <= first2 < len(batch.streams[i2]["clips"])
            else:
                assert (i2, first2, kept2[:-1]) == (i, first, kept)
                assert kept2[-1] in [f"{step}.{slot}.{j}" for j in range(3)]
    assert {n for n, ended in lives if not ended} == ({3} if resample else {6})
    assert any(ended and n < 6 for n, ended in lives) or resample


def test_resampling_in_between_has_its_chance():
    batch = rolling(lengths=(1000,) * 3, resample=0.13, n_min=3, n_max=22, size=50)
    kept = extended = 0
    batch.next(0)
    for step in range(60):
        due = [3 <= len(k) + 1 <= 22 for _, _, k in slots(batch)]
        write(batch, step)
        kept += sum(d and len(k) > 0 for d, (_, _, k) in zip(due, slots(batch)))
        extended += sum(due)
    assert 1 - kept / extended == pytest.approx(0.13, abs=0.02)


def test_a_malformed_memory_leaves_a_gap_and_state_is_json():
    batch = rolling()
    batch.advance(0, [common.Group(c, [sample(None)]) for c in batch.next(0)])
    assert all(kept in ([], [""]) for _, _, kept in slots(batch)) and any(kept for _, _, kept in slots(batch))
    import json
    assert json.loads(json.dumps(batch.state)) == batch.state


def test_batches_depend_on_seed_and_step_alone():
    def trace(seed, resume_at=None):
        batch, rows = rolling(seed=seed, off_policy_steps=2, resample=0.4), []
        for step in range(12):
            if step == resume_at:
                state, batch = batch.state, rolling(seed=seed, off_policy_steps=2, resample=0.4)
                batch.state = state
            rows.append([(c.stream, c.clip, c.history) for c in write(batch, step)])
        return rows
    assert trace(0) == trace(0) == trace(0, resume_at=1) == trace(0, resume_at=7) != trace(1)


def test_without_captions_the_base_writes_the_history(policy, streams, tmp_path, capsys):
    S = common.settings(vars(phase1), [f"--RUN={tmp_path}"])
    short = [s | {"clips": s["clips"][:2]} for s in streams[:2]]
    found = phase1.written_histories(S, policy, short, tmp_path)
    assert {s: sorted(kept) for s, kept in found.items()} == {s["stream"]: [0, 1] for s in short}
    assert all(isinstance(m, str) for kept in found.values() for m in kept.values())
    assert "captions.jsonl is missing" in capsys.readouterr().out


# ================================================================ the loop: resume, stop
LOOP = ["--STEPS=4", "--GROUP=4", "--CONTEXTS=3", "--MINI_BATCH=2", "--OFF_POLICY_STEPS=1", "--N_MIN=1",
        "--N_MAX=3", "--KL=0.1", "--LR=2e-2", "--SAVE_EVERY=2", "--PRINT_EVERY=99"]
CLOCKS = {"tokens_per_s", "rollout_s", "update_s", "gb"}


def token_reward(groups):
    """A reward that any model can improve on and that differs within a group: the share of even tokens."""
    for group in groups:
        for s in group.samples:
            s.reward = sum(i % 2 == 0 for i in s.ids) / len(s.ids) - 0.5
            s.gate_value = s.reward
            s.terms = {"even": s.reward}


def loop(policy, out, streams, rewards=token_reward, argv=()):
    """Some steps of `common.grpo` on a new LoRA, as 02 runs it -> the LoRA's parameters."""
    S = common.settings(vars(phase1), [*LOOP, *argv])
    out.mkdir(exist_ok=True)
    policy.drop("phase1")
    torch.manual_seed(0)
    params = policy.add("phase1", "lora")
    captions = {s["stream"]: {c["clip"]: f"now, {c['clip']}" for c in s["clips"]} for s in streams}
    batch = phase1.RollingBatch(
        streams, captions, seed=S.SEED, size=S.CONTEXTS, window=S.K, off_policy_steps=S.OFF_POLICY_STEPS,
        n_min=S.N_MIN, n_max=S.N_MAX, resample=S.RESAMPLE)
    run = Training(out, params, steps=S.STEPS, lr=S.LR, save_every=S.SAVE_EVERY, grad_clip=S.GRAD_CLIP, batch=batch)
    common.grpo(policy, run, batch, rewards, phase1.log_row, reference="base", **phase1.loop_constants(S))
    return [p.detach().clone() for p in params]


def rows(path):
    with open(path, newline="") as f:
        return [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(f)]


class Break(Exception):
    pass


def test_k_steps_resume_k_steps_equal_2k_steps_bit_by_bit(policy, streams, tmp_path):
    whole = loop(policy, tmp_path / "whole", streams)
    log = rows(tmp_path / "whole" / "log.csv")
    assert ([r["step"] for r in log] == list("0123") and float(log[-1]["kl"]) > 0
            and float(log[-1]["grad_norm"]) > 0)

    asked = []

    def killed(groups):                                 # in step 3, after the checkpoint of 2 and a row for 2
        asked.append(1)
        if len(asked) == 4:
            raise Break
        token_reward(groups)
    with pytest.raises(Break):
        loop(policy, tmp_path / "cut", streams, killed)
    assert [r["step"] for r in rows(tmp_path / "cut" / "log.csv")] == list("012")
    resumed = loop(policy, tmp_path / "cut", streams)
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole))
    assert rows(tmp_path / "cut" / "log.csv") == log

    asked.clear()

    def terminated(groups):                             # SIGTERM in step 1, where no checkpoint is due
        asked.append(1)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        token_reward(groups)
    with pytest.raises(SystemExit, match="stopped after step 1; run the same command to go on"):
        loop(policy, tmp_path / "term", streams, terminated, ["--SAVE_EVERY=99"])
    assert (tmp_path / "term" / "checkpoint.pt").exists()
    resumed = loop(policy, tmp_path / "term", streams, argv=["--SAVE_EVERY=99"])
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole))
    assert rows(tmp_path / "term" / "log.csv") == log


def test_old_and_reference_logprobs_are_those_from_before_the_step(policy, streams, tmp_path, monkeypatch):
    """One context per mini-batch: the ratio is 1 in the first update alone; the KL
    refers to the base throughout."""
    seen, contexts, samples = [], [], []
    real_loss, real_kl = common.policy_loss, common.kl_to
    monkeypatch.setattr(common, "policy_loss", lambda *given: seen.append([*given[:2]]) or real_loss(*given))
    monkeypatch.setattr(common, "kl_to", lambda new, ref: seen[-1].append(ref) or real_kl(new, ref))

    def spy(groups):
        contexts.extend(g.context for g in groups)
        samples.extend(g.samples for g in groups)
        token_reward(groups)
    loop(policy, tmp_path, streams, spy, ["--STEPS=2", "--MINI_BATCH=1"])
    assert len(seen) == 6                                          # three groups in each of two steps
    near = lambda x, y: torch.allclose(x, y, atol=1e-4)
    for i, (context, group, (new, old, ref)) in enumerate(zip(contexts, samples, seen)):
        with policy.using("base"), torch.no_grad():
            base = common.logprobs(policy, context, [s.ids for s in group])
        for x, o, r, b in zip(new, old, ref, base):
            assert near(r, b)
            assert near(o, b) == (i < 3)                       # a new LoRA is the base until its first update
            assert near(x, o) == (i % 3 == 0)


def test_a_judge_that_fails_on_most_samples_stops_the_loop(policy, streams, tmp_path):
    def failing(n):
        def some(groups):
            token_reward(groups)
            for group in groups:
                for s in group.samples[:n]:
                    s.reward = None
        return some
    with pytest.raises(SystemExit, match=r"judge failed on 9 of 12 samples"):
        loop(policy, tmp_path / "most", streams, failing(3), ["--STEPS=1"])
    assert not (tmp_path / "most" / "checkpoint.pt").exists() and not (tmp_path / "most" / "log.csv").exists()
    loop(policy, tmp_path / "half", streams, failing(2), ["--STEPS=1"])    # half: dropped, training goes on
    assert len(rows(tmp_path / "half" / "log.csv")) == 1


def test_a_gradient_that_is_not_finite_changes_nothing(policy, streams, tmp_path, monkeypatch):
    before, real = [], common.policy_loss

    def broken(logp, *args):
        before[:] = before or [p.detach().clone() for p in policy.trainable]
        loss, clipped = real(logp, *args)
        return loss * float("inf"), clipped
    monkeypatch.setattr(common, "policy_loss", broken)
    with pytest.raises(SystemExit, match="gradient norm is (nan|inf).*lower learning rate"):
        loop(policy, tmp_path, streams, argv=["--STEPS=1"])
    assert before and all(torch.equal(a, b) for a, b in zip(before, policy.trainable))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_what_is_cut_off_is_said_once_after_the_first_step(policy, streams, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(policy.S, "MAX_NEW_TOKENS", 72)
    loop(policy, tmp_path / "whole", streams, argv=["--STEPS=1"])
    assert rows(tmp_path / "whole" / "log.csv")[0]["truncated"] == "0" and "cut off" not in capsys.readouterr().out
    monkeypatch.setattr(policy.S, "MAX_NEW_TOKENS", 8)
    loop(policy, tmp_path / "cut", streams, argv=["--STEPS=2"])
    assert [row["truncated"] for row in rows(tmp_path / "cut" / "log.csv")] == ["1", "1"]
    said = [line for line in capsys.readouterr().out.splitlines() if "cut off by MAX_NEW_TOKENS" in line]
    assert len(said) == 1 and "*** 100% of the answers" in said[0]


def test_flat_groups_and_gated_ones_leave_the_policy_as_it_is(policy, streams, tmp_path):
    def flat(groups):
        for group in groups:
            for s in group.samples:
                s.reward = s.gate_value = 0.5
    start = loop(policy, tmp_path / "none", streams, argv=["--STEPS=0"])
    same = loop(policy, tmp_path / "flat", streams, flat, ["--STEPS=1"])
    assert all(torch.equal(a, b) for a, b in zip(start, same))
    assert rows(tmp_path / "flat" / "log.csv")[0]["flat"] == "1"


def wait_for(path, process, seconds=120):
    end = time.time() + seconds
    while not path.exists():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.01)


def test_sigterm_and_sigkill_in_a_real_process(toy, tmp_path):
    """Two runs of 02, one asked to stop, one killed at a random moment; run again, both
    end in a whole run's bytes."""
    argv = lambda name: [f"--RUN={tmp_path / name}", f"--FROM={toy}", "--CPU_THREADS=1", "--STEPS=4",
                         "--GROUP=2", "--CONTEXTS=2", "--MINI_BATCH=1", "--OFF_POLICY_STEPS=2", "--N_MIN=1",
                         "--N_MAX=3", "--SAVE_EVERY=1", "--LR=1e-2"]
    begin = lambda name: subprocess.Popen([sys.executable, phase1.__file__, *argv(name)], text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    running = {n: begin(n) for n in ("term", "kill")}
    try:
        wait_for(tmp_path / "term" / "phase1" / "log.csv", running["term"])
        running["term"].send_signal(signal.SIGTERM)
        wait_for(tmp_path / "kill" / "phase1" / "checkpoint.pt", running["kill"])
        time.sleep(random.random() * 0.5)
        running["kill"].kill()
        said = {n: p.communicate(timeout=120)[0] for n, p in running.items()}
    finally:
        for p in running.values():
            p.kill()
    assert running["term"].returncode == 1 and "run the same command to go on" in said["term"], said["term"]
    assert not (tmp_path / "term" / "phase1" / "adapter").exists()
    for n in ("whole", "term", "kill"):
        phase1.main(argv(n))
    file = lambda n: (tmp_path / n / "phase1" / "adapter" / "adapter_model.safetensors").read_bytes()
    log = lambda n: rows(tmp_path / n / "phase1" / "log.csv")
    assert len(log("whole")) == 4 and file("whole") == file("term") == file("kill")
    assert log("whole") == log("term") == log("kill")


# ================================================================ files of a run
def test_files_are_written_aside(tmp_path):
    path = tmp_path / "x.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises(Break):
        with runs.written_aside(path) as aside:
            aside.write_text("half")
            raise Break
    assert runs.read_json(path) == {"a": 1}                      # readers never see half a file


def test_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "x.jsonl"
    runs.write_jsonl(path, [{"i": i, "text": "é\u2028"} for i in range(3)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert [r["i"] for r in runs.read_jsonl(path, torn=True)] == [0, 1]
    runs.append_jsonl(path, [{"i": 2, "text": "é\u2028"}])
    assert path.read_bytes() == whole


def always_malformed_at_first(monkeypatch, ends_well):
    """Rollouts whose answers are malformed unless ends_well(key) -> the keys that were asked for, call by call."""
    asked, honest = [], common.rollout

    def rollout(policy, contexts, n, keys, **how):
        asked.append(list(keys))
        groups = honest(policy, contexts, n, keys, **how)
        for (sample,), key in zip(groups, keys):
            sample.memory = f"memory by {key}" if ends_well(key) else None
        return groups
    monkeypatch.setattr(common, "rollout", rollout)
    return asked


def test_a_malformed_answer_is_sampled_again_with_noise_of_its_own(policy, streams, monkeypatch, capsys):
    short = [s | {"clips": s["clips"][:1]} for s in streams[:3]]
    number = {s["stream"]: zlib.crc32(s["stream"].encode()) for s in short}
    first, second, third = (number[s["stream"]] for s in short)
    # The first is well formed at once, the second at its third try, the third never.
    asked = always_malformed_at_first(monkeypatch, lambda key: key[2] == first or key[2] == second and key[4:] == (3,))
    memories = common.watch(policy, short)
    seed = policy.S.SEED
    assert asked == [
        [(seed, 7, first, 0), (seed, 7, second, 0), (seed, 7, third, 0)],
        [(seed, 7, second, 0, 2), (seed, 7, third, 0, 2)],
        [(seed, 7, second, 0, 3), (seed, 7, third, 0, 3)],
        [(seed, 7, third, 0, 4)]]
    rows = [memories[s["stream"]][0] for s in short]
    assert [row.get("tries", 1) for row in rows] == [1, 3, 4]
    assert [row["memory"] for row in rows] == [
        f"memory by {(seed, 7, first, 0)}", f"memory by {(seed, 7, second, 0, 3)}", ""]
    said = capsys.readouterr().out
    assert "2 of 3 answers were malformed and sampled again" in said
    assert "*** 1 of 3 clips have no memory" in said


def test_no_noise_of_an_attempt_equals_anothers():
    noise = [common.draw_noise((0, 7, 99, 0) + again, 2, 5) for again in ((), (2,), (3,), (4,))]
    drawn = np.concatenate(noise).ravel()
    assert len(np.unique(drawn)) == len(drawn) == 40


def test_a_grey_clip_is_not_sampled_again(policy, streams, monkeypatch, capsys):
    asked = always_malformed_at_first(monkeypatch, lambda key: False)
    monkeypatch.setattr(common, "is_grey", lambda clip: True)
    common.watch(policy, [streams[0] | {"clips": streams[0]["clips"][:1]}])
    assert len(asked) == 1 and "malformed" not in capsys.readouterr().out


def test_rounds_of_a_watch():
    """At most two streams at a time, the longest first; b has begun before; where one ends the next begins."""
    lengths = {"a": 1, "b": 4, "c": 2, "d": 0}
    streams = [{"stream": name, "clips": list(range(n))} for name, n in lengths.items()]
    rounds = common.watch_rounds(streams, {"a": [], "b": ["written"], "c": [], "d": []}, width=2)
    assert [[(stream["stream"], t) for stream, t in places] for places in rounds] == [
        [("b", 1), ("c", 0)], [("b", 2), ("c", 1)], [("b", 3), ("a", 0)]]


@pytest.mark.parametrize("clips, room, width", [(4000, 384, 384), (12, 384, 2), (3, 384, 1), (4000, 6, 6)])
def test_streams_whose_windows_are_remembered_are_watched_at_once(policy, monkeypatch, clips, room, width):
    monkeypatch.setattr(policy.S, "FEATURE_CLIPS", clips)
    monkeypatch.setattr(policy, "room", Room(most=room))
    assert common.streams_at_once(policy) == width


def test_a_watch_of_few_at_a_time_writes_the_same_and_sees_each_clip_once(policy, streams, monkeypatch):
    whole = common.watch(policy, streams)
    policy.features.clear()
    seen, honest = [], policy._see
    monkeypatch.setattr(policy, "_see", lambda clips: seen.extend(map(common.clip_key, clips)) or honest(clips))
    monkeypatch.setattr(policy.S, "FEATURE_CLIPS", 2 * policy.S.K)
    assert common.watch(policy, streams) == whole
    assert len(streams) > 2 and len(seen) == len(set(seen)) == sum(len(s["clips"]) for s in streams)


def test_an_interrupted_watch_goes_on(policy, streams, tmp_path):
    S = common.settings(vars(phase1), ["--MAX_NEW_TOKENS=16"])
    short = [s | {"clips": s["clips"][:3]} for s in streams[:2]]
    before, policy.S = policy.S, S
    whole = common.watch(policy, short, path=tmp_path / "whole.jsonl")
    assert [r["clip"] for r in whole[short[0]["stream"]]] == [0, 1, 2]
    lines = (tmp_path / "whole.jsonl").read_bytes().split(b"\n")
    (tmp_path / "cut.jsonl").write_bytes(b"\n".join(lines[:3]) + b"\n" + lines[3][:10])
    assert common.watch(policy, short, path=tmp_path / "cut.jsonl") == whole
    policy.S = before
    key = lambda r: (r["clip"], r["stream"])
    assert (sorted(runs.read_jsonl(tmp_path / "cut.jsonl"), key=key)
            == sorted(runs.read_jsonl(tmp_path / "whole.jsonl"), key=key))
