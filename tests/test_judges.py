"""Judges by prompts: strict replies, the model as its own judge, and an OpenAI-compatible endpoint on loopback."""
import importlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from support import judges, runs                                            # noqa: E402

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
    ("clean", '{"verdict": "true"}', None), ("clean", '{"verdict": true, "why": ""}', None), ("clean", "true", None),
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


# ================================================================ an endpoint
@pytest.fixture
def server(monkeypatch, tmp_path):
    """An endpoint on loopback that answers, fails, waits and talks nonsense, as `plan` says; `seen`: requests."""
    pytest.importorskip("openai")
    monkeypatch.setattr(judges.atexit, "register", lambda report: None)     # the tests' end is no run's end
    seen, plan = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers["Authorization"], body))
            what = plan.pop(0) if plan else "good"
            text = body["messages"][0]["content"][-1]["text"]
            notes = re.search(r"notes, (.*) \(first\) or (.*) \(second\)", text)
            better = "tie" if not notes or len(notes[1]) == len(notes[2]) else \
                "first" if len(notes[1]) > len(notes[2]) else "second"
            candidates = len(re.findall(r"^\d+\. ", text, re.M))
            keys = dict(verdict=True, best_first=list(range(1, candidates + 1)), better=better, answer="A")
            key = re.findall(r'\{"(\w+)":', text)[-1]
            reply = json.dumps({key: keys[key]}) if what in ("good", "slow") else "I would rather not say."
            if what == "slow":
                time.sleep(0.3)
            code = what if isinstance(what, int) else 200
            data = json.dumps({"error": {"message": "no"}} if code != 200 else {
                "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [{"index": 0, "finish_reason": "stop",
                             "message": {"role": "assistant", "content": reply}}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{http.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield seen, plan, common.settings({"__doc__": ""}, ["--JUDGE=openai:some-model", f"--RUN={tmp_path}"])
    http.shutdown()


def test_an_endpoint_judges_every_kind_and_is_paid_once(server, contexts, tmp_path, capsys):
    seen, plan, S = server
    judge = judges.load_judge(S)
    want = {"faithful": True, "clean": True, "rank": [1.0, 2.0, 3.0], "prefer": "first", "answer": "A", "grade": True}
    for kind, item in items(contexts).items():
        assert judge.ask(PROMPTS[kind], [item]) == [want[kind]]
    assert len(seen) == 6 and {body["model"] for _, _, body in seen} == {"some-model"}
    pictures = [sum(c["type"] == "image_url" for c in body["messages"][0]["content"]) for _, _, body in seen]
    assert pictures == [judges.FRAMES, 0, judges.FRAMES, 0, 0, 0]
    for kind, item in items(contexts).items():                                # a resumed run asks nothing again
        assert judges.load_judge(S).ask(PROMPTS[kind], [item]) == [want[kind]]
    assert len(seen) == 6
    kept = "".join(f.read_text() for f in (tmp_path / "judge").iterdir())
    judge.send.report()
    said = capsys.readouterr().out
    assert "tokens_in 42" in said and "tokens_out 18" in said
    assert KEY not in kept + said and "127.0.0.1" not in kept + said


def test_errors_and_nonsense_are_asked_again_then_none(server, contexts, monkeypatch):
    seen, plan, S = server
    item = items(contexts)["clean"]
    ask = lambda n: judges.load_judge(S).ask(phase1.CLEAN, [item | {"memory": f"{n} {i}"} for i in range(3)])
    plan[:] = [500, "nonsense", 429, "slow"]
    assert ask(1) == [True] * 3                                 # retried by the package, or asked again
    plan[:] = ["nonsense"] * 9
    assert ask(2) == [None] * 3 and len(plan) == 0
    monkeypatch.setattr(judges, "RETRIES", 0)
    plan[:] = [400] * 9
    assert ask(3) == [None] * 3
    assert ask(3) == [True] * 3                                               # a failure is not kept


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
@pytest.mark.parametrize("name", ["local", "openai:some-model"])
def test_the_stages_run_with_other_judges(request, name, tmp_path, monkeypatch):
    """02 to 06 with verdicts that are poor or made up: what is shown is the path. To the tiny model all notes are
    tied, and 04 would end with that; so that 05 and 06 have an adapter, its choice between notes is by length."""
    if name != "local":
        seen = request.getfixturevalue("server")[0]
    choose = judges.Local.choose

    def by_length(self, question, text):
        notes = re.search(r"notes, (.*) \(first\) or (.*) \(second\)", question.text)
        made = choose(self, question, text)
        return made if not notes else question.replies()[len(notes[1]) < len(notes[2])]
    monkeypatch.setattr(judges.Local, "choose", by_length)
    run = importlib.import_module("test_stages").stage
    always = [f"--JUDGE={name}", "--MAX_NEW_TOKENS=32"]
    run("01_make_streams", tmp_path, "--TRAIN_STREAMS=2", "--DEPLOY_STREAMS=2", "--TEST_STREAMS=1", "--CLIPS=3")
    run("02_phase1_train", tmp_path, *always, "--GROUP=2", "--STEPS=1", "--CONTEXTS=2")
    run("03_collect_tasks", tmp_path, *always, "--GROUP=2", "--RECENT=2", "--LATER=1")
    run("04_train_reward", tmp_path, *always, "--STEPS=1", "--RECENT=2")
    run("05_phase2_train", tmp_path, *always, "--ENVIRONMENT=place")
    run("06_eval", tmp_path, *always, "--METHODS=dpo-steer", "--VALIDATE=4", "--RECENT=2")
    results = runs.read_json(tmp_path / "eval" / "results.json")
    assert {r["method"] for r in results["rows"]} >= {"base", "phase1"}
    assert len(runs.read_jsonl(tmp_path / "tasks" / "cache.jsonl")) == 6
    if name != "local":
        assert len(seen) > 20 and len(list((tmp_path / "judge").iterdir())) > 20
