"""A judge behind an OpenAI-compatible endpoint: what it is asked, what is kept, and when to give up.

Servers fail in many ways: a wrong key, a sign-in page with status 200, half a reply, no reply at all. Whatever
happens, one request ends as one `Outcome`: a text, or the reason why there is none.

  what is kept       a reply that its question can parse, and nothing else, so a mended endpoint is asked again
                     for exactly what is missing and nothing is paid twice
  what is said       the first problem of each kind; tokens and failures at the end; never the key or the address
  what is asked again    a failed request by the package `openai`, after longer and longer waits; a reply that
                     can't be read by `TextJudge`
  when to give up    before any work, where a first question is not answered; after GIVE_UP failures in a row

Requests run in daemon threads, so that the main thread hears Ctrl-C while a server is silent.
"""
import atexit
import base64
import hashlib
import io
import json
import multiprocessing
import re
from collections import Counter
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

from support.overlay import clip_frames, is_grey
from support.ranks import once, said_once
from support.runs import read_json, written_aside

FRAMES = 8               # of the newest clip, that an endpoint sees; "local" sees FRAMES_PER_CLIP
AT_ONCE = 8              # requests under way at a time
TIMEOUT = 120            # s of one request
RETRIES = 8              # of a failed one: in all about 40 s of waiting, or as the server says
SILENCE = 300            # s in which no request ends: those under way have failed
GIVE_UP = 16             # failures in a row, after which the endpoint is gone
FIRST_ANSWER = 60        # s for the first question, which is asked before any work
FIRST_RETRIES = 2        # of it: by then nothing is lost by stopping
SHOWN = 200              # letters of a problem or a reply that are printed
# Statuses that tell of this one request, such as one that is too long; others tell of the endpoint.
ABOUT_THE_REQUEST = (400, 403, 413, 415, 422)


@dataclass
class Outcome:
    """How a request ended."""
    reply: str | None = None
    problem: str = ""            # why there is no reply
    is_gone: bool = False        # the problem is the endpoint's and not this request's
    tokens_in: int = 0
    tokens_out: int = 0
    file: Path | None = None     # where the reply is kept, if it parses
    is_kept: bool = False        # the reply was kept before


class Endpoint:
    """Replies of `model` at OPENAI_BASE_URL, several at a time. What parses is kept in `folder`."""

    def __init__(self, model, folder):
        try:
            import openai
        except ImportError:
            raise SystemExit('JUDGE="openai:MODEL" needs a package: pip install openai') from None
        try:
            self.client = openai.OpenAI(max_retries=RETRIES, timeout=TIMEOUT)
        except openai.OpenAIError as error:
            raise SystemExit(f"JUDGE=openai:{model}: {error}") from None
        self.openai = openai
        self.model = model
        self.folder = folder
        self.takes_temperature = True
        self.used = Counter()                    # printed at the end
        self.said = set()                        # kinds of problems that were printed
        self.in_a_row = 0                        # failures since the last reply that parsed
        atexit.register(self.report)

    # ---------------------------------------------------------------- before any work
    def check(self, question, tries, shows_frames):
        """Asks one cheap question. SystemExit, with the reason, where it is not answered."""
        shown = f" with {FRAMES} frames" if shows_frames else ""
        print(f"judge: a first question{shown} to {self.model} (at most {FIRST_ANSWER} s)")
        problem = once(lambda: self.first_problem(question, tries, shows_frames))
        if problem:
            raise SystemExit(said_once(
                f"JUDGE=openai:{self.model} does not answer a first question{shown}: {problem}\n"
                "Mend it (OPENAI_BASE_URL, OPENAI_API_KEY, JUDGE) and run the same command again"))

    def first_problem(self, question, tries, shows_frames):
        """Why the question is not answered; "" where it is."""
        client = self.client.with_options(max_retries=FIRST_RETRIES)
        pictures = [grey_picture()] * FRAMES if shows_frames else []
        messages = as_messages(pictures, question.text)

        problems = []

        def ask():
            for attempt in range(tries):
                outcome = self.request(client, messages, attempt)
                problems.append(self.problem_of(question, outcome))
                if not problems[-1]:
                    break
            return problems[-1]

        with ThreadPool(1) as pool:
            try:
                return pool.apply_async(ask).get(FIRST_ANSWER)
            except multiprocessing.TimeoutError:
                return "; ".join([*problems[-1:], f"no answer within {FIRST_ANSWER} s"])

    # ---------------------------------------------------------------- questions and replies
    def __call__(self, questions, attempt):
        """Their replies, None where there is none."""
        replies = [None] * len(questions)

        def ask(number):
            try:
                return number, self.ask(questions[number], attempt)
            except SystemExit as stop:           # a lost video: in a thread it would end the thread alone
                return number, stop

        waiting = set(range(len(questions)))
        with ThreadPool(AT_ONCE) as pool:
            outcomes = pool.imap_unordered(ask, list(waiting))
            while waiting:
                try:
                    number, outcome = outcomes.next(SILENCE)
                except multiprocessing.TimeoutError:
                    break
                if isinstance(outcome, SystemExit):
                    raise outcome
                waiting.remove(number)
                replies[number] = self.take(questions[number], outcome)
        silent = Outcome(problem=f"no request ended within {SILENCE} s", is_gone=True)
        for number in waiting:
            self.take(questions[number], silent)
        return replies

    def ask(self, question, attempt):
        """The outcome of a question, from the folder where its reply is kept. Runs in a thread."""
        pictures = pictures_of(question)
        if any(is_grey(clip) for clip in question.clips):
            return Outcome(problem="the video is damaged here, so there is nothing to be judged")
        messages = as_messages(pictures, question.text)
        asked = json.dumps([self.model, messages])
        file = self.folder / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"
        reply = kept_reply(file)
        if reply is not None and question.parse(reply) is not None:
            return Outcome(reply, is_kept=True)
        outcome = self.request(self.client, messages, attempt)
        outcome.file = file
        return outcome

    def request(self, client, messages, attempt):
        options = {}
        if self.takes_temperature:
            options["temperature"] = min(attempt, 1)
        create = client.chat.completions.with_raw_response.create
        try:
            text = create(model=self.model, messages=messages, **options).text
        except self.openai.APIStatusError as error:
            is_about_request = error.status_code in ABOUT_THE_REQUEST
            if options and is_about_request and "temperature" in str(error):
                # Threads may come here side by side: each leaves it out and asks once more.
                self.takes_temperature = False
                return self.request(client, messages, attempt)
            return Outcome(problem=self.described(error), is_gone=not is_about_request)
        except (self.openai.OpenAIError, ValueError) as error:
            return Outcome(problem=self.described(error), is_gone=True)
        return read_completion(text, self.without_secrets)

    def take(self, question, outcome):
        """Counts an outcome, keeps its reply if that parses -> the reply.

        SystemExit after GIVE_UP failures in a row. Those that tell of one request don't count: an endpoint may
        refuse a few videos and judge the others.
        """
        if outcome.is_kept:
            self.used["kept"] += 1
            return outcome.reply
        self.used["asked"] += 1
        self.used["tokens_in"] += outcome.tokens_in
        self.used["tokens_out"] += outcome.tokens_out
        if not self.takes_temperature:
            self.say("it refuses a temperature, which is left out from now on")
        problem = self.problem_of(question, outcome)
        if not problem:
            self.in_a_row = 0
            self.keep(outcome, question.text)
            return outcome.reply
        self.used["failed" if outcome.reply is None else "unparsable"] += 1
        self.say(problem)
        if outcome.is_gone:
            self.in_a_row += 1
        if self.in_a_row >= GIVE_UP:
            raise SystemExit(
                f"JUDGE=openai:{self.model} failed {self.in_a_row} times in a row, at last with {problem}\nMend it and run the same command again: what was answered is kept")
        return outcome.reply

    def problem_of(self, question, outcome):
        """Why an outcome is no verdict; "" where it is one."""
        if outcome.reply is None:
            return outcome.problem
        if question.parse(outcome.reply) is None:
            return self.without_secrets(f"a reply that can't be parsed: {outcome.reply!r}")
        return ""

    def keep(self, outcome, text):
        """Every rank keeps what it was told, else it would be paid again after an interruption."""
        kept = json.dumps({"reply": outcome.reply, "prompt": text}, indent=1)
        with written_aside(outcome.file, every_rank=True) as aside:
            aside.write_text(kept + "\n", encoding="utf-8")

    # ---------------------------------------------------------------- what is said
    def say(self, problem):
        """Prints the first problem of each kind. Words with digits, such as numbers of requests, make no kind."""
        kind = re.sub(r"\S*\d\S*", "", problem)[:60]
        if kind not in self.said:
            self.said.add(kind)
            print(f"judge: {problem}")

    def described(self, error):
        """An error in SHOWN letters."""
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        return self.without_secrets(f"{type(error).__name__}: {error}{cause}")

    def without_secrets(self, text):
        """The beginning of a text in one line, without the key and without any address."""
        address = self.client.base_url
        text = re.sub(r"https?://\S+", "(address)", text)
        for name in (address.netloc.decode(), address.host):
            text = re.sub(rf"\b{re.escape(name)}\b", "(address)", text)
        key = re.escape(self.client.api_key)
        text = re.sub(rf"\b{key}\b", "(key)", text)
        if len(key) > 8:                         # servers repeat its first letters
            text = re.sub(re.escape(self.client.api_key[:6]) + r"\S*", "(key)", text)
        printable = "".join(letter if letter.isprintable() else " " for letter in text)
        return " ".join(printable.split())[:SHOWN]

    def report(self):
        if self.used:
            print("judge: " + ", ".join(f"{name} {count}" for name, count in self.used.items()))


def kept_reply(file):
    try:
        return read_json(file)["reply"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None                              # a damaged file: the question is asked again


# ---------------------------------------------------------------- what a server may send
def read_completion(text, shorten):
    """The outcome that a response's body stands for. shorten: makes a problem of a text."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return Outcome(problem=shorten(f"a response that is no JSON: {text!r}"), is_gone=True)
    choice = first_choice(body)
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    reply = text_of(content)
    if reply is None:
        found = json.dumps(choice or body)
        return Outcome(problem=shorten(f"a response without a text: {found}"), is_gone=not choice)
    usage = body.get("usage")
    return Outcome(reply, tokens_in=number_in(usage, "prompt_tokens"),
                   tokens_out=number_in(usage, "completion_tokens"))


def first_choice(body):
    """The first of the choices; {} where there is none."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    return {}


def text_of(content):
    """The text of a message's content, None where it has none.

    >>> text_of([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": '{"verdict": '},
    ...          {"type": "text", "text": "true}"}])
    '{"verdict": true}'
    >>> text_of({"verdict": True}), text_of({"text": "yes"}), text_of(1), text_of(" ")
    ('{"verdict": true}', 'yes', None, None)
    """
    if isinstance(content, list):
        texts = []
        for part in content:
            if isinstance(part, dict) and part.get("type") == "text":
                texts.append(str(part.get("text")))
        content = "".join(texts)
    if isinstance(content, dict):
        content = content["text"] if list(content) == ["text"] else json.dumps(content)
    if not isinstance(content, str):
        return None
    # Half an emoji can't be written to a file, and a NUL is no text.
    content = content.encode("utf-8", "ignore").decode().replace("\0", "")
    return content if content.strip() else None


def number_in(usage, name):
    """A number of tokens, 0 where a server tells none."""
    try:
        return int(usage[name])
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0


# ---------------------------------------------------------------- what it is sent
def as_messages(pictures, text):
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def pictures_of(question):
    """The frames of the question's clip as parts of a message."""
    from PIL import Image
    parts = []
    for clip in question.clips:
        frames, _ = clip_frames(clip, FRAMES)
        for frame in frames:
            parts.append(as_part(Image.fromarray(frame)))
    return parts


def grey_picture():
    from PIL import Image
    return as_part(Image.new("RGB", (64, 64), "grey"))


def as_part(picture):
    """A picture as a part of a message: an address that holds its own data."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
