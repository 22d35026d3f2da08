"""Who judges memories, and who reads them to answer questions: one interface, and what `JUDGE` can name.

A judge has one method, judge.ask(prompt, items) -> list, with None for a verdict that failed. A stage hands
in a prompt of its own, so an edited prompt takes effect. The prompts, their items and what is returned:
  faithful  02  {context, memory}             -> bool: it is seen or heard in the newest clip, and it connects
  clean     02  {previous, memory}            -> bool: nothing of the memory before, no boxes, no labels
  rank      02  {context, memories}           -> ranks, 1 is the richest; ties, if any, share the mean rank
  answer    03  {entries, question, options}  -> a letter, or without options a text; or "insufficient".
                                                 entries: [start, end, memory] in s, all that is read
  asked     03  {entries, question}           -> {answer: a text or "insufficient", entries: numbers from 1 of those that
                                                 it rests on}; entries: [start, end, memory, stream]
  grade     03  {question, answer, reply}     -> bool: an open answer means the same as the right one
  prefer    04  {questions, first, second}    -> "first" | "second" | "tie", by what the questions are after

JUDGE = "tiny"           the toy world's exact one, which knows a clip's facts as a video judge sees them
        "local"          the model itself with its adapters switched off: no second copy, nothing to pay. It
                         reasons for JUDGE_TOKENS (never before "prefer", which is asked most often), then the
                         likeliest of the allowed replies is its verdict (support/local_judge.py)
        "openai:MODEL"   an OpenAI-compatible endpoint (vLLM, Gemini, GPT) by the optional package `openai`;
                         address and key from OPENAI_BASE_URL and OPENAI_API_KEY alone, never printed or saved
                         (support/endpoint.py)

A judge question of your own:
  1. In the stage: SHORT = Verdict("short", 'Is "{memory}" short? Answer with {{"verdict": true}} or ...').
  2. Choose the class by the reply that you ask for: Verdict, Ranking, Preference, Answer or SourcedAnswer. What
     many items have in common comes first in the text, because "local" reads it once for all of them.
  3. Where you need it: verdicts = judge.ask(SHORT, [{"memory": sample.memory} for sample in samples]).
  4. The keys of an item are the {fields} of the text. With a "context" among them the judge sees the newest
     clip, and the text may also say {heard} and {previous}.
  5. The toy judge reads no prompts: it needs a method short(self, memory) in tiny/world.py, named as in 1.
"""
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from support.endpoint import Endpoint
from support.local_judge import Local
from support.ranks import gather, my_share
from support.reader import printed
from support.runs import ROOT, Prompt, need, read_json, read_jsonl
from support.text import as_text

TRIES = 3                # a reply that can't be parsed is asked for again, then its verdict is None
MANY = 20                # failures of one kind of question, none of which was ever answered, stop a run
INSUFFICIENT = "insufficient"


def load_judge(S, model=None, shows_frames=True):
    """The judge and reader of S.JUDGE; model: for "local" (common.LocalModel). shows_frames: to be judged.

    SystemExit for an unknown one, or where an endpoint does not answer a first question. So load the judge
    before all that takes time.
    """
    kind, _, name = S.JUDGE.partition(":")
    if S.JUDGE == "tiny":
        return load_toy_judge(S)
    if S.JUDGE == "local":
        return TextJudge(Local(model))
    if kind == "openai" and name:
        endpoint = Endpoint(name, ROOT / "runs" / S.RUN / "judge")
        endpoint.check(Question(READY, {}), TRIES, shows_frames)
        return TextJudge(endpoint)
    raise SystemExit(f'JUDGE={S.JUDGE} is unknown: take "tiny" (for the toy world), "local" or '
                     '"openai:MODEL"')


def load_toy_judge(S):
    truth = find_truth(S)
    if not truth:
        raise SystemExit('JUDGE="tiny" judges the toy world alone: take "local" or "openai:MODEL"')
    from tiny.world import Judge
    print("judge: the toy world's exact one, which reads no prompts (editing FAITHFUL, PREFER, ... "
          "changes nothing)")
    return Judge(read_jsonl(truth))


def find_truth(S):
    """What is known of toy videos: it lies beside the streams, or beside the videos (tiny/my_videos.py)."""
    folder = need(S, "streams/streams.jsonl").parent
    places = [folder]
    if (folder / "settings.json").exists():
        data = read_json(folder / "settings.json").get("DATA")
        places += [Path(data)] if data else []
    for place in places:
        if (place / "truth.jsonl").exists():
            return place / "truth.jsonl"
    return None


# ---------------------------------------------------------------- prompts, and strict replies
class JudgePrompt(Prompt):
    """The text of a judge question with {fields}, and its name. A subclass says which replies count."""
    key = ""                                     # the one key of the reply's JSON object
    reasons = True                               # whether "local" reasons before it replies

    def __new__(cls, name, text):
        prompt = super().__new__(cls, text)
        prompt.name = name
        return prompt

    def filled(self, item):
        """The text for one item."""
        return self.format(**self.fields(item))

    def fields(self, item):
        fields = dict(item)
        if "context" in item:
            context = item["context"]
            heard = " ".join(text for _, _, text in context.clips[-1].get("speech", ()))
            fields["heard"] = heard or "(nothing)"
            fields["previous"] = context.history[-1] if context.history else ""
        fields["previous"] = fields.get("previous") or "(nothing)"
        return fields

    def replies(self, item):
        """All replies that count; None where any text does."""
        raise NotImplementedError

    def likeliest(self, replies, values):
        """The reply of a model that gives the allowed replies these log-probs."""
        return replies[values.index(max(values))]

    def parse(self, reply, item):
        """The verdict in a reply, or None: after any thinking it must be a JSON object that has the key.

        It may stand within prose if a Markdown fence tells which text is meant.

        >>> CLEAN = Verdict("clean", "...")
        >>> CLEAN.parse('It is fine.\\n</think>\\n{"verdict": true}', {}), CLEAN.parse('yes', {})
        (True, None)
        >>> CLEAN.parse('So:\\n```json\\n{"why": "a box", "verdict": false}\\n```\\nThat is all.', {})
        False
        >>> Ranking("rank", "...").parse('{"best_first": [2, 1, 3]}', {"memories": "abc"})
        [2.0, 1.0, 3.0]
        >>> Preference("prefer", "...").parse('{"better": "both"}', {})
        """
        found = self.json_object(reply)
        return self.verdict(found[self.key], item) if self.key in found else None

    def json_object(self, reply):
        """The JSON object in a reply, {} where there is none."""
        text = reply.rpartition("</think>")[2]
        text = re.sub(r"<\|\w+\|>", "", text)    # control tokens, such as <|begin_of_box|> of GLM
        fenced = re.findall(r"```\w*(.*?)(?:```|$)", text, re.DOTALL)
        if len(fenced) == 1:
            text = fenced[0]
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def verdict(self, value, item):
        """The verdict that the key's value stands for, or None."""
        raise NotImplementedError


class Verdict(JudgePrompt):
    """Asks for {"verdict": true} or {"verdict": false}."""
    key = "verdict"

    def replies(self, item):
        return ['{"verdict": true}', '{"verdict": false}']

    def verdict(self, value, item):
        return value if isinstance(value, bool) else None


# What an endpoint is asked before any work.
READY = Verdict("ready", """Are you ready to judge? Answer with {{"verdict": true}} or {{"verdict": false}}.""")


class Ranking(JudgePrompt):
    """Asks for {"best_first": [...]}, the numbers of the item's memories -> each memory's rank, 1 is best."""
    key = "best_first"

    def fields(self, item):
        fields = super().fields(item)
        numbered = [f"{number}. {memory}" for number, memory in enumerate(item["memories"], 1)]
        fields["memories"] = "\n".join(numbered)
        return fields

    def replies(self, item):
        """Beginnings of replies: the likelier one begins with a memory's number, the better it ranks."""
        return [f'{{"best_first": [{i + 1},' for i in range(len(item["memories"]))]

    def likeliest(self, replies, values):
        order = sorted(range(len(replies)), key=lambda i: -values[i])
        return json.dumps({"best_first": [i + 1 for i in order]})

    def verdict(self, value, item):
        numbers = list(range(1, len(item["memories"]) + 1))
        if not isinstance(value, list) or sorted(map(repr, value)) != sorted(map(repr, numbers)):
            return None                          # repr: strings such as "1" are no numbers
        return [float(value.index(number) + 1) for number in numbers]


class Preference(JudgePrompt):
    """Asks for {"better": "first"}, "second" or "tie"."""
    key = "better"
    reasons = False
    choices = ("first", "second", "tie")

    def fields(self, item):
        fields = super().fields(item)
        fields["questions"] = "\n".join(item["questions"])
        return fields

    def replies(self, item):
        return [f'{{"better": "{choice}"}}' for choice in self.choices]

    def verdict(self, value, item):
        return value if value in self.choices else None


class Answer(JudgePrompt):
    """Asks for {"answer": a letter of the item's options}, or a text where it has none; or "insufficient"."""
    key = "answer"

    def fields(self, item):
        fields = super().fields(item)
        fields["entries"] = "\n\n".join(printed(entry) for entry in item["entries"] if entry[2])
        fields["options"] = "\n".join(item["options"])
        return fields

    def choices(self, item):
        letters = [option[0] for option in item["options"]]
        return [*letters, INSUFFICIENT]

    def replies(self, item):
        if not item["options"]:
            return None
        return [f'{{"answer": "{choice}"}}' for choice in self.choices(item)]

    def verdict(self, value, item):
        if not isinstance(value, str) or not value.strip():
            return None
        if not item["options"]:
            return value.strip()
        return value if value in self.choices(item) else None


class SourcedAnswer(JudgePrompt):
    """Asks for {"answer": a text, "entries": the numbers of the item's entries that it rests on}, or for
    {"answer": "insufficient"} -> {answer, entries}."""
    key = "answer"

    def fields(self, item):
        numbered = [f"{number}. {printed(entry)}" for number, entry in enumerate(item["entries"], 1)]
        return {"question": item["question"], "entries": "\n\n".join(numbered)}

    def replies(self, item):
        return None

    def parse(self, reply, item):
        found = self.json_object(reply)
        text = found.get("answer")
        entries = found.get("entries")
        if not isinstance(text, str) or not text.strip():
            return None
        if text.strip() == INSUFFICIENT:
            return {"answer": INSUFFICIENT, "entries": []}
        if not isinstance(entries, list) or not entries:
            return None                          # an answer that rests on nothing is none
        numbers = range(1, len(item["entries"]) + 1)
        if not all(type(entry) is int and entry in numbers for entry in entries):
            return None
        return {"answer": text.strip(), "entries": sorted(set(entries))}


@dataclass
class Question:
    """One item under a prompt. To the model it is a context like those of common, of one clip or none."""
    judge_prompt: JudgePrompt
    item: dict
    reasoning: str = ""                          # what the model has written so far

    @property
    def text(self):
        return self.judge_prompt.filled(self.item)

    @property
    def clips(self):
        return self.item["context"].clips[-1:] if "context" in self.item else []

    @property
    def asked(self):
        """All that a judge is shown: equal where questions are."""
        return json.dumps([self.text, self.clips], default=str)

    def replies(self):
        return self.judge_prompt.replies(self.item)

    def parse(self, reply):
        return self.judge_prompt.parse(reply, self.item)

    def prompt(self, video, tokenizer):
        """As Context.prompt, in other words: the frames with their times, then the question."""
        frames = ""
        for pairs in video:
            for seconds, tokens in pairs:
                pads = "<|video_pad|>" * tokens
                frames += f"<{seconds:.1f} seconds><|vision_start|>{pads}<|vision_end|>"
        turn = {"role": "user", "content": f"{frames}\n{as_text(self.text, tokenizer)}"}
        text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        return text + self.reasoning


class TextJudge:
    """A judge by prompts and replies. send(questions, attempt) -> their replies, None where one failed."""

    def __init__(self, send):
        self.send = send
        self.asked = Counter()                   # {name of a prompt: questions so far}
        self.failed = Counter()                  # of these, without a verdict

    def ask(self, prompt, items):
        """A verdict for each item, None where it failed. Equal questions are asked once.

        SystemExit where all MANY of a kind failed.
        """
        questions = [Question(prompt, item) for item in items]
        different = {question.asked: question for question in questions}
        verdicts = dict.fromkeys(different)
        for attempt in range(TRIES):
            missing = [asked for asked, verdict in verdicts.items() if verdict is None]
            if not missing:
                break
            replies = self.send([different[asked] for asked in missing], attempt)
            for asked, reply in zip(missing, replies):
                if reply is not None:
                    verdicts[asked] = different[asked].parse(reply)
        found = [verdicts[question.asked] for question in questions]
        self.asked[prompt.name] += len(items)
        self.failed[prompt.name] += found.count(None)
        self.stop_where_all_failed(prompt.name)
        return found

    def stop_where_all_failed(self, name):
        """Where most have failed, the stages stop by rules of their own. A clip that is refused ends no run."""
        failed = self.failed[name]
        if failed == self.asked[name] and failed >= MANY:
            raise SystemExit(f"the judge failed on all of {failed} questions {name!r}; mend it and run the "
                             "same command again: what was answered is kept")


def ask_in_shares(judge, prompt, items):
    """As judge.ask, where all ranks hold the same items: each asks for its share, and all get all verdicts."""
    return gather(judge.ask(prompt, my_share(items)))
