"""Who judges memories and who reads them to answer questions: one interface, and what `JUDGE` can name.

A judge has one method, `ask(kind, items) -> list`, with None for a verdict that failed. Kinds and items:
  "faithful"  {context, memory}             -> bool: it is seen or heard in the newest clip, and it connects
  "clean"     {previous, memory}            -> bool: nothing of the memory before, no boxes, no labels
  "rank"      {context, memories}           -> ranks, 1 = richest; ties, if any, share the mean
  "prefer"    {questions, first, second}    -> "first" | "second" | "tie", by what the questions are after
  "answer"    {entries, question, options}  -> a letter, or without options a text; or "insufficient".
                                               entries: [start, end, memory] in s, all the reader gets to see
  "grade"     {question, answer, reply}     -> bool: an open answer means the same as the right one

JUDGE = "tiny"           the embedded world's exact one, which knows a clip's facts as a video judge sees them
        "local"          the model itself with its adapters switched off: no second copy, nothing to pay. It
                         reasons greedily, then the likeliest of the allowed replies is its verdict
        "openai:MODEL"   an OpenAI-compatible endpoint (vLLM, Gemini, GPT) by the optional package `openai`;
                         address and key from OPENAI_BASE_URL and OPENAI_API_KEY alone, never printed or saved
Prompts stand in the stages that use them: 02 (faithful, clean, rank), 03 (answer, open, grade), 04 (prefer).
Of memories that outgrow the reader, a `Retriever` picks the entries that a question is about.
"""
import atexit, base64, hashlib, importlib, io, json, re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from common import ROOT, Context, clock, logprobs, need, np, read_json, read_jsonl, rollout, torch, write_json
from video import clip_frames

FRAMES = 8               # of the newest clip, that an endpoint sees; "local" sees FRAMES_PER_CLIP
TRIES = 3                # a reply that can't be parsed is asked again, then its verdict is None
AT_ONCE = 8              # requests under way at a time
RETRIES, TIMEOUT = 6, 120        # of a failed request, each after a longer wait; s of one request
SHARE = 0.5              # of its relevance that an entry lends each neighbour, for "next" and spans of time
PLACE = {"faithful": ("02_phase1_train", "FAITHFUL"), "clean": ("02_phase1_train", "CLEAN"),
         "rank": ("02_phase1_train", "RICHEST"), "prefer": ("04_train_reward", "PREFER"),
         "answer": ("03_collect_tasks", "ANSWER"), "open": ("03_collect_tasks", "OPEN"),
         "grade": ("03_collect_tasks", "GRADE")}


def load_judge(S, policy=None):
    """The judge and reader of S.JUDGE; policy: a function that gives the policy, for "local". SystemExit for
    an unknown one, or where the package or the key of an endpoint is missing."""
    if S.JUDGE == "tiny":
        if not (need(S, "streams/streams.jsonl").parent / "truth.jsonl").exists():
            raise SystemExit('JUDGE="tiny" judges the embedded world alone: take "local" or "openai:MODEL"')
        return importlib.import_module("tiny.world").Judge(read_jsonl(need(S, "streams/truth.jsonl")))
    if S.JUDGE == "local":
        return TextJudge(Local(policy))
    if S.JUDGE.startswith("openai:") and len(S.JUDGE) > 7:
        return TextJudge(Endpoint(S.JUDGE[7:], ROOT / "runs" / S.RUN / "judge"))
    raise SystemExit(f'JUDGE={S.JUDGE} is unknown: take "tiny" (for the embedded world), '
                     '"local" or "openai:MODEL"')


# ---------------------------------------------------------------- questions and strict replies
def fill(kind, item):
    """(text of the prompt, the clip to be seen or None, allowed replies or None) of one item. "rank" allows
    the beginnings of replies: their order is the ranking."""
    values, clip = dict(item), None
    if "context" in item:
        context, clip = item["context"], item["context"].clips[-1]
        values["previous"] = (context.history or [""])[-1]
        values["heard"] = " ".join(text for _, _, text in clip.get("speech", ())) or "(nothing)"
    values["previous"] = values.get("previous") or "(nothing)"
    if kind == "rank":
        values["memories"] = "\n".join(f"{i}. {m}" for i, m in enumerate(item["memories"], 1))
    if kind == "prefer":
        values["questions"] = "\n".join(item["questions"])
    if kind == "answer":
        values["entries"] = "\n\n".join(printed(entry) for entry in item["entries"] if entry[2])
        values["options"] = "\n".join(item["options"])
        kind = "answer" if item["options"] else "open"
    stage, name = PLACE[kind]
    letters = [*(option[0] for option in item.get("options", ())), "insufficient"]
    replies = {"rank": [f'{{"best_first": [{i + 1}' for i in range(len(item.get("memories", ())))],
               "prefer": [f'{{"better": "{x}"}}' for x in ("first", "second", "tie")],
               "answer": [f'{{"answer": "{x}"}}' for x in letters], "open": None}
    return (getattr(importlib.import_module(stage), name).format(**values), clip,
            replies.get(kind, ['{"verdict": true}', '{"verdict": false}']))


def parse(kind, reply, item):
    """The verdict in a reply, or None: after any thinking it must be one JSON object with the asked key.

    >>> parse("clean", 'It is fine.\\n</think>\\n{"verdict": true}', {}), parse("clean", 'yes', {})
    (True, None)
    >>> parse("rank", '{"best_first": [2, 1, 3]}', {"memories": "abc"})
    [2.0, 1.0, 3.0]
    >>> parse("prefer", '{"better": "both"}', {})
    """
    text = reply.rpartition("</think>")[2].strip()
    text = text.removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        (key, value), = json.loads(text).items()
    except (ValueError, AttributeError, RecursionError):
        return None
    if kind in ("faithful", "clean", "grade"):
        return value if key == "verdict" and isinstance(value, bool) else None
    if kind == "rank":
        n = len(item["memories"])
        if key != "best_first" or not isinstance(value, list) or sorted(map(str, value)) != sorted(
                map(str, range(1, n + 1))):
            return None
        return [float(value.index(i) + 1) for i in range(1, n + 1)]
    if kind == "prefer":
        return value if key == "better" and value in ("first", "second", "tie") else None
    if key != "answer" or not isinstance(value, str) or not value.strip():
        return None
    letters = [option[0] for option in item["options"]]
    return value.strip() if not letters or value in [*letters, "insufficient"] else None


class TextJudge:
    """A judge by prompts and replies. send(what `fill` makes, in a list, attempt) -> texts, None if failed."""
    def __init__(self, send):
        self.send = send

    def ask(self, kind, items):
        prompts, verdicts = [fill(kind, item) for item in items], [None] * len(items)
        for attempt in range(TRIES):
            todo = [i for i, v in enumerate(verdicts) if v is None]
            replies = self.send([prompts[i] for i in todo], attempt) if todo else []
            for i, reply in zip(todo, replies):
                verdicts[i] = None if reply is None else parse(kind, reply, items[i])
        return verdicts


# ---------------------------------------------------------------- memories that outgrow the reader
ALONE = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"<\w+>|\d+(?::\d\d)+|[{ALONE}]|[^\W{ALONE}]+")
words = lambda text: WORD.findall(text.lower())        # face IDs and times whole; signs, where no spaces are
printed = lambda entry: f"{clock(entry[0])}-{clock(entry[1])}\n{entry[2]}"


class Retriever:
    """What the reader sees of a stream: all memories where they fit, else the most relevant to the question.

    Relevance is the BM25 score of an entry as it is printed, times included, plus SHARE of its neighbours'.
    The index is made once a stream: a word's rarity and the mean length, and only these, also count what was
    written later."""
    def __init__(self, entries, tokenizer):
        """entries: [start, end, memory] (s), in time order."""
        self.entries, self.index, texts = entries, None, [printed(entry) + "\n\n" for entry in entries]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        self.ends = np.array([end for _, end, _ in entries], float)                             # (n,) s
        self.tokens = np.array([len(x) * bool(e[2]) for x, e in zip(ids, entries)], int)        # (n,)

    def relevance(self, query):
        """Scores (n,) of all entries. SystemExit where bm25s is missing."""
        if self.index is None:
            try:
                import bm25s
            except ImportError:
                raise SystemExit("memories beyond READER_TOKENS need bm25s: pip install bm25s") from None
            self.index = bm25s.BM25()
            self.index.index([[*words(printed(e)), f"={e[0]}"] for e in self.entries], show_progress=False)
        asked = words(query)
        for h, m, s in re.findall(r"(\d+):(\d\d):(\d\d)", query):       # "=": the clip that a time falls into
            at = int(h) * 3600 + int(m) * 60 + int(s)
            asked += [f"={start}" for start, end, _ in self.entries if start <= at < end]
        return self.index.get_scores_from_ids(self.index.get_tokens_ids(asked))

    def __call__(self, question, options, time, budget):
        """(entries in time order, whether they were retrieved): at most `budget` tokens, as printed, of what
        was written by `time` (s)."""
        seen = np.flatnonzero(self.ends <= time)
        if self.tokens[seen].sum() <= budget:
            return [self.entries[i] for i in seen], False
        seen, kept = seen[self.tokens[seen] > 0], []                         # a lost memory is never printed
        score = self.relevance("\n".join([question, *(option[2:] for option in options)]))[seen]
        score = score + SHARE * (np.append(score[1:], 0) + np.append(0, score[:-1]))
        for i in seen[np.argsort(-score, kind="stable")]:                    # of equals, the earlier
            if self.tokens[i] <= budget:
                budget -= self.tokens[i]
                kept.append(i)
        return [self.entries[i] for i in sorted(kept)], True


# ---------------------------------------------------------------- the model itself
class Question(Context):
    """A context that asks about its clip in other words than a memory's: `history` holds the text, `questions`
    what the model has reasoned so far."""
    def prompt(self, video, tokenizer):
        frames = "".join(f"<{t:.1f} seconds><|vision_start|>{'<|video_pad|>' * n}<|vision_end|>"
                         for pairs in video for t, n in pairs)
        turn = [{"role": "user", "content": f"{frames}\n{self.history}"}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return text + "".join(self.questions)


class Local:
    """Replies of the policy's base."""
    def __init__(self, policy):
        self.policy = policy

    def __call__(self, prompts, attempt):
        policy = self.policy()
        asked = [Question("", [clip] if clip else [], text, []) for text, clip, _ in prompts]
        with policy.using("base"), torch.no_grad():
            reasoned = rollout(policy, asked, 1, [(0, 11, attempt)] * len(asked), top_k=0 if attempt else 1)
            return [self.choose(policy, question, sample.text, replies)
                    for question, (sample,), (_, _, replies) in zip(asked, reasoned, prompts)]

    def choose(self, policy, question, text, replies):
        """The likeliest reply after the reasoning in `text`; without a choice, the text."""
        if replies is None:
            return text
        ids = [policy.tokenizer(r, add_special_tokens=False)["input_ids"] for r in replies]
        question = question._replace(questions=[text.partition("</think>")[0] + "\n</think>\n\n"])
        values = [x.sum().item() for x in logprobs(policy, question, ids)]
        order = sorted(range(len(replies)), key=lambda i: -values[i])
        if replies[0].startswith('{"best_first"'):
            return json.dumps({"best_first": [i + 1 for i in order]})
        return replies[order[0]]


# ---------------------------------------------------------------- an OpenAI-compatible endpoint
class Endpoint:
    """Replies of `model` at OPENAI_BASE_URL, several at a time; each is kept in `folder` by its content: a
    resumed run pays nothing twice. Tokens and failures are printed at the end."""
    def __init__(self, model, folder):
        try:
            import openai
        except ImportError:
            raise SystemExit('JUDGE="openai:MODEL" needs the package openai: pip install openai') from None
        try:
            self.client = openai.OpenAI(max_retries=RETRIES, timeout=TIMEOUT)
        except openai.OpenAIError as error:
            raise SystemExit(f"JUDGE=openai:{model}: {error}") from None
        self.model, self.folder, self.used, self.failures = model, folder, Counter(), openai.OpenAIError
        atexit.register(self.report)

    def __call__(self, prompts, attempt):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda p: self.reply(*p, attempt), prompts))

    def reply(self, text, clip, _, attempt):
        content = [{"type": "text", "text": text}]
        if clip:
            frames, _ = clip_frames(clip, FRAMES)
            content = [{"type": "image_url", "image_url": {"url": jpeg(f)}} for f in frames] + content
        messages = [{"role": "user", "content": content}]
        content = json.dumps([self.model, attempt, messages]).encode()
        file = self.folder / f"{hashlib.sha256(content).hexdigest()}.json"
        if file.exists():
            self.used["kept"] += 1
            return read_json(file)["reply"]
        try:
            answer = self.client.chat.completions.create(model=self.model, messages=messages,
                                                         temperature=min(attempt, 1))
            reply = answer.choices[0].message.content or ""
        except (self.failures, IndexError, AttributeError, TypeError) as error:
            self.used["failed"] += 1
            self.used[f"  {type(error).__name__}"] += 1
            return None
        self.used.update(asked=1, tokens_in=getattr(answer.usage, "prompt_tokens", 0) or 0,
                         tokens_out=getattr(answer.usage, "completion_tokens", 0) or 0)
        write_json(file, {"reply": reply, "prompt": text})
        return reply

    def report(self):
        if self.used:
            print("judge: " + ", ".join(f"{name.strip()} {n}" for name, n in self.used.items()))


def jpeg(frame):
    """A frame (H, W, 3) as a data address."""
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
