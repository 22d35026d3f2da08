"""Judges by prompts: strict replies, the model as its own judge, and an OpenAI-compatible endpoint on loopback."""
import doctest
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from cases import bad_endpoint                                              # noqa: E402
from support import endpoint, judges, local_judge, plan, runs               # noqa: E402

phase1 = common.stage("02_phase1_train")
collect = common.stage("03_collect_tasks")
reward_stage = common.stage("04_train_reward")
PROMPTS = {"faithful": phase1.FAITHFUL, "clean": phase1.CLEAN, "rank": phase1.RICHEST, "prefer": reward_stage.PREFER,
           "answer": collect.ANSWER, "grade": collect.GRADE}
KEY = "sk-not-to-be-seen"


def items(contexts):
    """One item under every prompt."""
    c = contexts[1]
    return {"faithful": {"context": c, "memory": "now, a red cup."}, "clean": {"previous": "", "memory": "a {brace}"},
            "rank": {"context": c, "memories": ["a", "b", "c"]},
            "prefer": {"questions": ["Who?", "When?"], "first": "a 'quoted' one", "second": "b"},
            "answer": {"entries": [[0.0, 10.0, "a cup"], [10.0, 20.0, ""]], "question": "What?",
                       "options": ["A. cup", "B. hat"]},
            "grade": {"question": "What?", "answer": "a cup", "reply": "the cup"}}


@pytest.mark.parametrize("kind, reply, want", [
    ("faithful", '{"verdict": true}', True), ("clean", 'so\n</think>\n```json\n{"verdict": false}\n```', False),
    ("clean", '{"verdict": "true"}', None), ("clean", '{"verdict": true, "why": ""}', True), ("clean", "true", None),
    ("clean", 'Sure: {"verdict": true}', None), ("clean", '[{"verdict": true}]', None), ("grade", "", None),
    ("rank", '{"best_first": [3, 1, 2]}', [2.0, 3.0, 1.0]), ("rank", '{"best_first": [1, 2]}', None),
    ("rank", '{"best_first": [1, 1, 2]}', None), ("rank", '{"best_first": "312"}', None),
    ("rank", '{"best_first": ["3", "1", "2"]}', None), ("rank", '{"best_first": [3, [1], 2]}', None),
    ("clean", '{}', None), ("prefer", '{"better": ["first"]}', None),
    ("prefer", '{"better": "second"}', "second"), ("prefer", '{"better": "2"}', None),
    ("answer", '{"answer": "B"}', "B"), ("answer", '{"answer": "C"}', None), ("answer", '{"answer": "B. hat"}', None),
    ("answer", '{"answer": "insufficient"}', "insufficient"), ("answer", '{"answer": 2}', None)])
def test_replies_are_parsed_strictly(contexts, kind, reply, want):
    assert PROMPTS[kind].parse(reply, items(contexts)[kind]) == want


def test_open_answers_are_texts_and_are_graded(contexts):
    item = items(contexts)["answer"] | {"options": []}
    assert collect.OPEN.parse('{"answer": " a cup "}', item) == "a cup"
    assert "few words" in collect.OPEN.filled(item) and "a cup" in collect.OPEN.filled(item)
    assert collect.OPEN.replies(item) is None                                 # any text counts
    tasks = [{"question": "q", "options": [], "answer": "cup"}] * 3
    tasks += [{"question": "q", "options": ["A. x"], "answer": "A"}]

    class Grader:
        def ask(self, prompt, items):
            assert prompt is collect.GRADE and [x["reply"] for x in items] == ["a cup", "hat"]
            return [True, None]
    assert collect.right(Grader(), tasks, ["a cup", "hat", "insufficient", "A"]) == [True, None, False, True]


def test_tasks_without_options_are_asked_by_their_own_prompt_and_keep_their_place():
    options = [["A. x"], [], ["A. y"], [], []]
    asked = [{"question": str(i), "options": some, "entries": []} for i, some in enumerate(options)]

    class Reader:
        def ask(self, prompt, items):
            assert prompt is (collect.ANSWER if items[0]["options"] else collect.OPEN)
            return [item["question"] for item in items]
    assert collect.ask_reader(Reader(), asked) == ["0", "1", "2", "3", "4"]


def test_a_prompt_of_ones_own_takes_effect(contexts):
    """As in the docstring of support/judges.py: an edited text is what the judge reads, a new one is one line."""
    read = []

    def send(questions, attempt):
        read.extend(question.text for question in questions)
        return ['{"verdict": false}' for _ in questions]
    short = judges.Verdict("short", 'Is "{memory}" short? Before: {previous} Answer with {{"verdict": true}} or ...')
    assert judges.TextJudge(send).ask(short, [{"memory": "a cup", "context": contexts[1]}]) == [False]
    assert read == [f'Is "a cup" short? Before: {contexts[1].history[-1] or "(nothing)"} '
                    'Answer with {"verdict": true} or ...']
    assert short.name == "short" and isinstance(short, runs.Prompt)           # so start() remembers its hash


def test_the_toy_judge_says_that_prompts_change_nothing(toy, capsys):
    judges.load_judge(common.settings({"__doc__": ""}, [f"--RUN={toy}"]))
    assert "reads no prompts" in capsys.readouterr().out


def questions(contexts):
    return {kind: judges.Question(PROMPTS[kind], item) for kind, item in items(contexts).items()}


def test_prompts_hold_what_they_ask_about(contexts):
    asked = questions(contexts)
    texts = {kind: question.text for kind, question in asked.items()}
    assert all(re.search(r'\{"\w+": ', text) and "{{" not in text for text in texts.values())
    assert {kind for kind, question in asked.items() if question.clips} == {"faithful", "rank"}  # these see the clip
    assert all(question.clips in ([], contexts[1].clips[-1:]) for question in asked.values())
    replies = {kind: question.replies() for kind, question in asked.items()}
    assert len(replies["rank"]) == len(replies["prefer"]) == len(replies["answer"]) == 3
    for kind in ("faithful", "clean", "prefer", "answer", "grade"):
        assert all(asked[kind].parse(reply) is not None for reply in replies[kind])
    assert "a {brace}" in texts["clean"] and "2. b" in texts["rank"]
    assert "00:00:00-00:00:10" in texts["answer"]


def test_the_likeliest_reply_is_a_models_verdict():
    item = {"memories": ["a", "b", "c"]}
    rank = phase1.RICHEST
    reply = rank.likeliest(rank.replies(item), [-3.0, -1.0, -2.0])
    assert rank.parse(reply, item) == [3.0, 1.0, 2.0]
    prefer = reward_stage.PREFER
    assert prefer.likeliest(prefer.replies({}), [-3.0, -1.0, -2.0]) == '{"better": "second"}'


def test_the_model_judges_itself(policy, contexts):
    """Its verdicts are poor, its path is whole: pictures for some kinds, none for others, the same every time."""
    S = common.settings({"__doc__": ""}, ["--JUDGE=local"])
    policy.add("phase1", "lora")
    judge = common.load_judge(S, lambda: policy)
    kinds = {"faithful": bool, "clean": bool, "rank": list, "prefer": str, "answer": str, "grade": bool}
    for kind, item in items(contexts).items():
        prompt = PROMPTS[kind]
        one, two = judge.ask(prompt, [item] * 2)
        assert one == two and isinstance(one, kinds[kind]) and judge.ask(prompt, [item]) == [one]
    assert sorted(judge.ask(phase1.RICHEST, [items(contexts)["rank"]])[0]) == [1.0, 2.0, 3.0]
    assert policy.who == "phase1"
    # it is the base that judges: what the adapter says changes nothing
    prefer = questions(contexts)["prefer"]
    before = judge.send([prefer], 0)
    for p in policy.trainable or [p for n, p in policy.model.named_parameters() if "lora_" in n]:
        torch.nn.init.normal_(p.data)
    assert judge.send([prefer], 0) == before


# ================================================================ its verdicts in packed rows
def plain_scores(policy, question):
    """Log-probs of the allowed replies given that one of them is written: reply by reply, by common.logprobs."""
    replies = policy.tokenizer(question.replies(), add_special_tokens=False)["input_ids"]
    logp = [common.logprobs(policy, question, [reply])[0].tolist() for reply in replies]
    values = []
    for reply in replies:
        value = 0.0
        for i in range(len(reply)):
            follow = {}                                           # what may come here, and how likely it is
            for other, of_other in zip(replies, logp):
                if other[:i] == reply[:i] and len(other) > i:
                    follow[other[i]] = of_other[i]
            value += follow[reply[i]] - torch.tensor(list(follow.values())).logsumexp(0).item()
        values.append(value)
    return values


def many_questions(contexts):
    """Those of every kind about several clips, mixed; some have reasoning, and some are alone."""
    asked = []
    for number, context in enumerate(contexts):
        for memory in ("now, a red cup.", "still, <face_3> waves.", "now, a red cup, in the garden."):
            asked.append(judges.Question(phase1.FAITHFUL, {"context": context, "memory": memory}, "so\n</think>\n\n"))
            asked.append(judges.Question(phase1.CLEAN, {"previous": f"memory {number}", "memory": memory}))
        asked.append(judges.Question(phase1.RICHEST, {"context": context, "memories": [*"abcdefghijkl"][:4 + 6 * number]}))
    for first, second in (("a", "b"), ("a", "a blue hat"), ("b", "a"), ("c", "d")):
        asked.append(judges.Question(reward_stage.PREFER, {"questions": ["Who?", "When was it?"], "first": first,
                                                           "second": second}))
    entries = [[0.0, 10.0, "a cup"], [10.0, 20.0, "a hat, a dog, a garden"]]
    for text in ("What?", "Where were the people?"):
        asked.append(judges.Question(collect.ANSWER, {"entries": entries, "question": text,
                                                      "options": ["A. cup", "B. hat", "C. I"]}, "A cup.\n</think>\n\n"))
    return asked[::2] + asked[1::2]


@pytest.mark.parametrize("tokens", [10**6, 600, 1])
def test_verdicts_of_packed_rows_are_those_of_one_by_one(policy, contexts, monkeypatch, tokens):
    """Whatever shares a row: all that fits, rows that are split, and every question alone."""
    monkeypatch.setattr(policy, "room", plan.Room(most=1, free=tokens, prefill_token=1))
    asked = many_questions(contexts)
    with torch.no_grad():
        found = local_judge.scores(policy, asked)
        plain = [plain_scores(policy, question) for question in asked]
    for question, values, want in zip(asked, found, plain):
        assert values == pytest.approx(want, abs=1e-5), question.judge_prompt.name
        replies = question.replies()
        assert question.judge_prompt.likeliest(replies, values) == question.judge_prompt.likeliest(replies, want)
    assert any(len(question.replies()) > 10 for question in asked)          # as 1 and 10, whose numbers begin alike


@pytest.fixture
def passes(policy, monkeypatch):
    """[tokens of each pass of the policy over a row without cache]: of verdicts, and not of prompts to be continued."""
    lengths = []
    read = policy.read

    def counted(prompts, answers, cache=None):
        hidden, segments = read(prompts, answers, cache)
        if cache is None:
            lengths.append(len(hidden))
        return hidden, segments
    monkeypatch.setattr(policy, "read", counted)
    return lengths


def test_what_questions_share_is_read_once(policy, contexts, passes):
    context = contexts[2]
    asked = [judges.Question(phase1.FAITHFUL, {"context": context, "memory": f"now, cup number {i}."}) for i in range(8)]
    alone = policy.prompt_length(asked[0])
    local_judge.scores(policy, asked)
    assert len(passes) == 1 and alone < passes.pop() < alone + 8 * 40       # the memory and {"verdict":
    asked = [judges.Question(reward_stage.PREFER, {"questions": ["What did they wear?"] * 5, "first": a, "second": b})
             for a in "abcdefgh" for b in "abcdefgh" if a < b]
    alone = policy.prompt_length(asked[0])
    local_judge.scores(policy, asked)
    assert len(passes) == 1 and passes.pop() < alone + 28 * 40


def test_few_clips_are_held_at_a_time(contexts):
    asked = many_questions(contexts)
    lists = local_judge.in_order(asked, 2)
    assert sorted(sum(lists, [])) == list(range(len(asked))) and len(lists) == 3       # four clips, and none
    for some in lists:
        assert len({str(asked[i].clips) for i in some}) <= 2
    assert [len(some) for some in local_judge.in_order(asked, 5)] == [len(asked)] and not local_judge.in_order([], 2)


def test_rows_respect_what_fits(policy, contexts, passes, monkeypatch):
    asked = many_questions(contexts)
    longest = max(policy.prompt_length(question) for question in asked)
    whole = local_judge.scores(policy, asked)
    assert len(passes) == 1                                                 # small groups share a row
    passes.clear()
    monkeypatch.setattr(policy, "room", plan.Room(most=1, free=3000 * (longest + 99), prefill_token=3000))
    assert policy.room.row_tokens() == longest + 99
    split = local_judge.scores(policy, asked)
    beginnings = 99                                                         # of replies, in the columns
    assert len(passes) > 3 and max(passes) <= longest + 99 + beginnings
    assert sum(split, []) == pytest.approx(sum(whole, []), abs=1e-5)


def test_questions_share_a_prompt_where_that_helps():
    def prompt(*ids, features=()):
        return common.EncodedPrompt(torch.tensor(ids), None, None, list(features))

    def groups(prompts, limit=99):
        return [(g.first, g.end, g.shared, g.tokens) for g in local_judge.share_prompts(prompts, limit)]
    long = [1, 2, 3, 4, 5, 6]
    three = [prompt(*long, i) for i in (7, 8, 9)]
    assert groups(three) == [(0, 3, 6, 9)]
    assert groups(three, 8) == [(0, 2, 6, 8), (2, 3, 6, 7)]                  # a row that is split repeats the prompt
    assert groups([*three, prompt(1, 2, 9), prompt(1, 2, 8)]) == [(0, 3, 6, 9), (3, 5, 2, 4)]
    assert groups([*three, prompt(*long[:4], 9, 9)]) == [(0, 4, 4, 4 + 3 * 3 + 2)]
    clip, other = object(), object()
    assert groups([prompt(1, 2, 3, features=[clip]), prompt(1, 2, 4, features=[clip]),
                   prompt(1, 2, 3, features=[other])]) == [(0, 2, 2, 4), (2, 3, 2, 3)]
    assert groups([prompt(1, 2), prompt(1, 2)]) == [(0, 2, 1, 3)]            # the last token is always a column's
    assert doctest.testmod(local_judge).failed == 0


def test_a_verdict_without_reasoning_writes_nothing(policy, contexts, monkeypatch):
    written = []
    rollout = common.rollout

    def counted(policy, asked, n, keys, limit, **how):
        if asked:
            written.append((asked[0].judge_prompt.name, asked[0].reasoning, len(asked), limit))
        return rollout(policy, asked, n, keys, limit=limit, **how)
    monkeypatch.setattr(common, "rollout", counted)
    S = common.settings({"__doc__": ""}, ["--JUDGE=local"])
    judge = common.load_judge(S, lambda: policy)
    of_kind = items(contexts)
    monkeypatch.setattr(policy.S, "JUDGE_TOKENS", 3)
    judge.ask(phase1.CLEAN, clean_items("a", "b", "a"))
    assert written.pop() == ("clean", "", 2, 3)                              # equal questions are asked once
    judge.ask(reward_stage.PREFER, [of_kind["prefer"]])
    assert not written
    monkeypatch.setattr(policy.S, "JUDGE_TOKENS", 0)
    for kind in ("clean", "faithful", "rank", "answer"):
        judge.ask(PROMPTS[kind], [of_kind[kind]])
    assert not written
    judge.ask(collect.OPEN, [of_kind["answer"] | {"options": []}])           # any text counts, so it must be written
    assert written[0] == ("answer", "\n</think>\n\n", 1, local_judge.OPEN_REPLY) and len(written) == judges.TRIES


def test_reasoning_is_cut_and_closed(policy, contexts, monkeypatch):
    monkeypatch.setattr(policy.S, "JUDGE_TOKENS", 5)
    local = judges.Local(common.LocalModel(lambda: policy))
    [question] = local.reason([judges.Question(phase1.CLEAN, clean_items("a cup")[0])], 0)
    body, _, end = question.reasoning.partition("\n</think>\n\n")
    assert 0 < len(policy.tokenizer(body)["input_ids"]) <= 5 and not end
    assert question.reasoning == local.reason([question.__class__(phase1.CLEAN, question.item)], 0)[0].reasoning
    by_chance = {local.reason([judges.Question(phase1.CLEAN, question.item)], i)[0].reasoning for i in range(1, 4)}
    assert len(by_chance) > 1


def test_a_rank_asks_for_its_share_alone(monkeypatch):
    """03 to 06 as rank 1 of 2 runs them, which gets nothing from the other here."""
    eval_stage = common.stage("06_eval")
    asked = []

    class Judge:
        def ask(self, prompt, items):
            asked.append((prompt.name, len(items)))
            return ["tie" if prompt.name == "prefer" else True] * len(items)
    for module in (judges, collect, reward_stage, eval_stage):
        monkeypatch.setattr(module, "my_share", lambda items: list(items)[1::2])
        monkeypatch.setattr(module, "gather", lambda share: share)
    S = common.settings({"__doc__": ""}, [])
    tasks = [{"stream": "s", "question": "?", "options": ["A. x"], "time": 9.0, "answer": "x"}] * 5
    memories = {"s": [{"start": 0.0, "end": 9.0, "memory": "a"}]}
    assert collect.answer(S, Judge(), tasks, memories) == ([True] * 2, [False] * 2)
    open_tasks = [task | {"options": []} for task in tasks]
    collect.right(Judge(), open_tasks, ["x"] * 5)
    samples = [{"format": 0.0, "memory": memory, "quality": 0.5} for memory in "ab"]
    cache = [{"stream": "s", "clip": i, "samples": samples} for i in range(5)]
    judged = reward_stage.compare_chunk(Judge(), cache, ["q"])
    assert [row["clip"] for row in judged] == [1, 3]
    assert eval_stage.compare(Judge(), ["q"], [("a", "b")] * 5) == ["tie"] * 2
    rows = [{"memory": "a", "faithful": None, "clean": None} for _ in range(5)]
    eval_stage.judge_quality(Judge(), rows, [common.Context("s", [], [])] * 5)
    assert [ask for ask in asked if ask[1]] == [
        ("answer", 2), ("grade", 2), ("prefer", 2), ("prefer", 2), ("faithful", 2), ("clean", 2)]


# ================================================================ an endpoint
@pytest.fixture
def server(monkeypatch, tmp_path):
    """An endpoint on loopback, which misbehaves as `server.mode` says (cases/bad_endpoint.py)."""
    pytest.importorskip("openai")
    monkeypatch.setattr(endpoint.atexit, "register", lambda report: None)   # the tests' end is no run's end
    http = bad_endpoint.serve("good")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{http.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    monkeypatch.setattr(endpoint, "FIRST_RETRIES", 0)
    http.S = common.settings({"__doc__": ""}, ["--JUDGE=openai:some-model", f"--RUN={tmp_path}"])
    yield http
    http.released.set()
    http.shutdown()


def clean_items(*names):
    return [{"previous": "", "memory": name} for name in names]


def kept(run):
    return sorted((run / "judge").glob("*"))


def test_an_endpoint_judges_every_kind_and_is_paid_once(server, contexts, tmp_path, capsys):
    judge = judges.load_judge(server.S)
    assert len(server.seen) == 1                                              # the first question, before any work
    want = {"faithful": True, "clean": True, "rank": [1.0, 2.0, 3.0], "prefer": "first", "answer": "A", "grade": True}
    for kind, item in items(contexts).items():
        assert judge.ask(PROMPTS[kind], [item]) == [want[kind]]
    assert len(server.seen) == 7 and {body["model"] for body in server.seen} == {"some-model"}
    pictures = [sum(part["type"] == "image_url" for part in body["messages"][0]["content"]) for body in server.seen]
    assert pictures == [endpoint.FRAMES, endpoint.FRAMES, 0, endpoint.FRAMES, 0, 0, 0]
    for kind, item in items(contexts).items():                                # a resumed run asks nothing again
        assert judges.load_judge(server.S).ask(PROMPTS[kind], [item]) == [want[kind]]
    assert len(server.seen) == 7 + 6                                          # but the first question
    judge.send.report()
    said = capsys.readouterr().out
    assert "tokens_in 42" in said and "tokens_out 18" in said
    assert KEY not in said + "".join(file.read_text() for file in kept(tmp_path)) and "127.0.0.1" not in said


@pytest.mark.parametrize("mode", [*bad_endpoint.READABLE, *bad_endpoint.USAGES, "temperature", "no_temperature"])
def test_what_is_unambiguous_is_read(server, contexts, mode, tmp_path):
    server.mode = mode
    judge = judges.load_judge(server.S)
    want = {"faithful": True, "rank": [1.0, 2.0, 3.0], "prefer": "first", "answer": "A"}
    for kind, right in want.items():
        assert judge.ask(PROMPTS[kind], [items(contexts)[kind]]) == [right]
    assert len(kept(tmp_path)) == 4 and judge.send.used["failed"] == judge.send.used["unparsable"] == 0


FAILING = ["images", "text_only", "cut_json", "cut_body", *bad_endpoint.ERRORS, *bad_endpoint.BODIES,
           *bad_endpoint.UNREADABLE]
REASONS = {"images": "400 - At most 1 image", "text_only": "not a multimodal", "key": "401 - Incorrect API key",
           "no_model": "404 - The model", "quota": "429 - You exceeded", "context": "maximum context length",
           "html": "no JSON: '<html>", "no_message": "content_filter", "error200": "upstream overloaded",
           "prose": "can't be parsed: 'I would rather not say", "cut_body": "peer closed connection"}


@pytest.mark.parametrize("mode", FAILING)
def test_a_failing_endpoint_stops_before_any_work_with_its_reason(server, mode, tmp_path):
    server.mode = mode
    with pytest.raises(SystemExit) as stop:
        judges.load_judge(server.S)
    said = str(stop.value)
    assert "does not answer a first question" in said and REASONS.get(mode, "") in said and len(said) < 500
    assert KEY not in said and KEY[:9] not in said and str(server.server_port) not in said
    assert len(server.seen) <= judges.TRIES and not kept(tmp_path)


@pytest.mark.parametrize("mode", FAILING)
def test_one_that_fails_later_stops_and_is_asked_again_for_what_is_missing(server, contexts, mode, tmp_path, capsys):
    """Half of the questions are answered. What failed is kept nowhere, in whatever way it failed."""
    kind = "faithful" if mode in ("images", "text_only") else "clean"
    asked = [items(contexts)[kind] | {"memory": f"memory {i}."} for i in range(40)]
    judges.load_judge(server.S).ask(PROMPTS[kind], asked[:2])
    judge = judges.load_judge(server.S)
    server.mode = mode
    capsys.readouterr()
    with pytest.raises(SystemExit, match="in a row|judge failed on all of 38"):
        judge.ask(PROMPTS[kind], asked[2:])
    said = capsys.readouterr().out
    assert said.count("judge: ") == 1 and REASONS.get(mode, "") in said
    assert len(kept(tmp_path)) == 2
    server.mode = "good"
    judge = judges.load_judge(server.S)
    server.seen.clear()
    assert judge.ask(PROMPTS[kind], asked) == [True] * 40 and len(kept(tmp_path)) == 40
    texts = [body["messages"][0]["content"][-1]["text"] for body in server.seen]
    assert not [text for text in texts if "memory 0." in text or "memory 1." in text]


def test_a_failed_try_is_asked_again_and_a_few_failures_are_none(server, tmp_path):
    judge = judges.load_judge(server.S)
    tries = ["prose", "overloaded", "html", "cut_json", "slow", "slow"]
    server.mode = lambda body: tries.pop(0) if tries else "good"
    assert judge.ask(phase1.CLEAN, clean_items("a", "b", "c", "d")) == [True] * 4
    server.mode = lambda body: "refusal" if "memory: bad" in body["messages"][0]["content"][-1]["text"] else "good"
    refused = [f"bad {i}" for i in range(30)]
    assert judge.ask(phase1.CLEAN, clean_items("e", *refused)) == [True] + [None] * 30
    assert judge.send.used["failed"] == 3 + 30 * judges.TRIES and len(kept(tmp_path)) == 5
    # Of a resumed run these may be the only questions left.
    assert judges.load_judge(server.S).ask(phase1.CLEAN, clean_items(*refused[:19])) == [None] * 19


def test_equal_questions_are_asked_once_and_a_damaged_reply_again(server, tmp_path):
    judge = judges.load_judge(server.S)
    assert judge.ask(phase1.CLEAN, clean_items(*["a"] * 200, "b")) == [True] * 201
    assert len(server.seen) == 3 and len(kept(tmp_path)) == 2
    kept(tmp_path)[0].write_text('{"reply": "{')
    assert judge.ask(phase1.CLEAN, clean_items("a", "b")) == [True, True] and len(server.seen) == 4


def test_every_rank_keeps_its_replies(server, tmp_path, monkeypatch):
    judge = judges.load_judge(server.S)
    monkeypatch.setattr(runs, "RANK", 1)
    monkeypatch.setattr(runs, "is_first_rank", lambda: False)
    assert judge.ask(phase1.CLEAN, clean_items("a")) == [True] and len(kept(tmp_path)) == 1


def test_kinds_of_problems_are_said_once_without_key_and_address(server, capsys):
    judge = judges.load_judge(server.S).send
    capsys.readouterr()
    for number in (12, 345):
        judge.say(judge.without_secrets(f"request req-{number} with {KEY} or {KEY[:9]}*** of "
                                        f"{judge.client.base_url} and 127.0.0.1 is\x1b[2J too long {'x' * 300}"))
    said = capsys.readouterr().out
    assert said == "judge: request req-12 with (key) or (key) of (address) and (address) is [2J too long " + \
        said.partition("too long ")[2] and len(said) < 210 and said.count("judge:") == 1


@pytest.mark.parametrize("where", ["tarpit", "dead"])
def test_a_silent_or_dead_address_is_given_up(server, where, monkeypatch, tmp_path):
    monkeypatch.setattr(endpoint, "FIRST_ANSWER", 0.5)
    monkeypatch.setattr(endpoint, "SILENCE", 0.5)
    judge = judges.load_judge(server.S)
    if where == "dead":
        server.shutdown()
        server.server_close()
    server.mode = where
    with pytest.raises(SystemExit, match="no answer within|Connection refused"):
        judges.load_judge(server.S)
    began = time.time()
    with pytest.raises(SystemExit, match="16 times in a row.*(no request ended|Connection refused)"):
        judge.ask(phase1.CLEAN, clean_items(*"abcdefghijklmnopqrstuvwxyz"))
    assert time.time() - began < 10 and not kept(tmp_path)


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import common
from support import judges
S = common.settings({"__doc__": ""}, ["--JUDGE=openai:m", "--RUN=" + sys.argv[2]])
judge = judges.load_judge(S)
clean = judges.Verdict("clean", '{memory} {{"verdict": true}}')
judge.ask(clean, [{"memory": "a"}])
print("answered", flush=True)
judge.ask(clean, [{"memory": str(i)} for i in range(20)])
"""


@pytest.mark.parametrize("number, early", [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False)])
def test_a_signal_ends_the_wait_for_a_silent_server(server, tmp_path, number, early):
    root = str(runs.ROOT)
    server.mode = lambda body: "tarpit" if early or len(server.seen) > 2 else "good"
    process = subprocess.Popen([sys.executable, "-c", CHILD, root, str(tmp_path)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    while len(server.seen) < (1 if early else 3) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    if number == signal.SIGINT:
        assert process.stderr.readline() + process.stderr.readline() == "\nstopped; the same command goes on\n"
        process.send_signal(number)                      # while Python cleans up
    began = time.time()
    _, said = process.communicate(timeout=20)
    assert time.time() - began < 5 and process.returncode == -number and not said


def test_an_endpoint_without_key_or_package_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    S = common.settings({"__doc__": ""}, ["--JUDGE=openai:m", f"--RUN={tmp_path}"])
    with pytest.raises(SystemExit, match="openai"):
        judges.load_judge(S)
    for bad in ("oracle", "openai:", "openai"):
        S.JUDGE = bad
        with pytest.raises(SystemExit, match='take "tiny".*"local" or "openai:MODEL"'):
            judges.load_judge(S)


# ================================================================ the stages
ALWAYS = ["--MAX_NEW_TOKENS=32"]
ARGUMENTS = {
    "01_make_streams": ["--TRAIN_STREAMS=2", "--DEPLOY_STREAMS=2", "--TEST_STREAMS=1", "--CLIPS=3"],
    "02_phase1_train": ["--GROUP=2", "--STEPS=1", "--CONTEXTS=2"],
    "03_collect_tasks": ["--GROUP=2", "--RECENT=2", "--LATER=1"],
    "04_train_reward": ["--STEPS=1", "--RECENT=2"],
    "05_phase2_train": ["--ENVIRONMENT=place", "--RECENT=2"],
    "06_eval": ["--METHODS=dpo-steer", "--VALIDATE=4", "--RECENT=2"]}


def run_stage(name, run, judge):
    importlib.import_module("test_stages").stage(name, run, f"--JUDGE={judge}", *ALWAYS, *ARGUMENTS[name])


scores = local_judge.scores


def by_length(policy, asked):
    """To the tiny model all notes are tied, and 04 would end with that; so that 05 and 06 have an adapter, its choice
    between notes is by length."""
    found = scores(policy, asked)
    for values, question in zip(found, asked):
        notes = re.search(r"First note: (.*)\nSecond note: (.*)", question.text)
        if notes:
            values[:] = [len(notes[1]), len(notes[2]), -1]
    return found


def test_the_stages_run_with_the_model_as_judge(tmp_path, monkeypatch):
    """02 to 06 with verdicts that are poor: what is shown is the path."""
    monkeypatch.setattr(local_judge, "scores", by_length)
    run_stage("01_make_streams", tmp_path, "tiny")
    for name in [*ARGUMENTS][1:]:
        run_stage(name, tmp_path, "local")
    check_results(tmp_path)


RANKS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_judges
from support import local_judge
local_judge.scores = test_judges.by_length
for name in [*test_judges.ARGUMENTS][1:]:
    test_judges.run_stage(name, {run!r}, "local")
"""


def test_two_ranks_with_the_model_as_judge_publish_what_one_process_does(tmp_path, monkeypatch):
    """02 to 06 by torchrun, where every rank asks for its share of the verdicts."""
    one, two = tmp_path / "one", tmp_path / "two"
    run_stage("01_make_streams", one, "tiny")
    shutil.copytree(one, two)
    monkeypatch.setattr(local_judge, "scores", by_length)
    for name in [*ARGUMENTS][1:]:
        run_stage(name, one, "local")
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(runs.ROOT), tests=str(runs.ROOT / "tests"), run=str(two)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                           str(script)], capture_output=True, text=True, timeout=500,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    want, got = published(one), published(two)
    assert got.keys() == want.keys() and len(want) > 30
    verdicts = [name for name in want if name.startswith("reward/verdicts")]
    assert len(verdicts) == 12 and [name for name in want if name.startswith("eval/checked")]
    for name in want:                                  # sums of gradients differ in their last digits
        if not name.endswith(".safetensors") and name not in ("reward/report.json", "eval/results.json"):
            assert got[name] == want[name], name


def check_results(run):
    results = runs.read_json(run / "eval" / "results.json")
    assert {row["method"] for row in results["rows"]} >= {"base", "phase1"}
    assert len(runs.read_jsonl(run / "tasks" / "cache.jsonl")) == 6


def fails_later(server):
    """A mode: the first question and three more are answered, no other."""
    first = len(server.seen)
    return lambda body: "good" if len(server.seen) <= first + 4 else "html"


def refuses_some(body):
    """A mode: every fifth text is refused, always the same ones; never the first question."""
    text = body["messages"][0]["content"][-1]["text"]
    return "refusal" if zlib.crc32(text.encode()) % 5 == 0 and "ready" not in text else "good"


def published(run):
    """The files of a run, but for those with times or with places of files in them."""
    files = {}
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".safetensors", ".md"):
            if "judge" not in path.parts and path.name != "settings.json":
                data = re.sub(rb'^{"fingerprint".*', b"", path.read_bytes())
                files[str(path.relative_to(run))] = data.replace(str(run).encode(), b"RUN")
    return files


def test_stages_whose_endpoint_fails_end_as_if_nothing_had_been(server, tmp_path, capsys):
    """Each of 02, 03, 04 and 06 is run in a copy of a run in which nothing fails. There it meets a wrong key, then an
    endpoint that fails after a few answers, then one that refuses some questions, and a good one in the end."""
    judge = "openai:some-model"
    whole = tmp_path / "whole"
    run_stage("01_make_streams", whole, "tiny")
    for name in [*ARGUMENTS][1:]:
        copy = tmp_path / name
        if name != "05_phase2_train":
            shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("judge"))
            before = published(copy)
            server.mode = "key"
            with pytest.raises(SystemExit, match="Incorrect API key"):
                run_stage(name, copy, judge)
            assert not published(copy).keys() - before.keys()
            server.mode = fails_later(server)
            with pytest.raises(SystemExit, match="failed"):
                run_stage(name, copy, judge)
            # A failed reply stands in asked.jsonl; contexts.jsonl is copied from the cache, malformed memories too.
            new = [file for file in published(copy).keys() - before.keys()
                   if not any(name in file for name in ("checked", "asked", "contexts.jsonl"))]
            assert b"null" not in b"".join(published(copy)[file] for file in new)
        if name in ("03_collect_tasks", "06_eval"):
            server.mode = refuses_some
            run_stage(name, copy, judge)
        server.mode = "good"
        run_stage(name, whole, judge)
        if copy.exists():
            server.seen.clear()
            capsys.readouterr()
            run_stage(name, copy, judge)
            assert published(copy) == published(whole)
            kept_texts = [runs.read_json(file)["prompt"] for file in kept(copy)]
            assert len(set(kept_texts)) == len(kept_texts) and len(server.seen) < len(kept_texts)
            shutil.rmtree(copy)
    server.seen.clear()
    for name in [*ARGUMENTS][1:]:                      # what is finished needs no judge
        run_stage(name, whole, judge)
    assert not server.seen
    check_results(whole)
