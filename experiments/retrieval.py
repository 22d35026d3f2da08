"""Which entries of a memory that outgrows the reader to read: by BM25, by embeddings of the base, or simpler.

On long streams of the toy world the exact reader answers from what each ranking keeps within 1/5, 1/10 and 1/40 of
the whole memory. Shown is its accuracy as a share of that of a reader who sees everything: the mean over streams
(the least to the most). Settings:
  right      true captions; the questions name times at which clips begin
  wrong      a quarter of the captions are of another stream, a tenth is lost
  inside     as `right`, but the questions' times lie 4 s after a clip's beginning
  untimed    as `right`, but the ranking does not get to see the questions' times: most name little else
Then by environment (`right`, 1/10), and the time that a long memory takes: 15,000 entries, 500 questions spread over
it, on one core.

Run: python experiments/retrieval.py          (1 min 43 s on one core of an AMD EPYC)
In:  tiny/base
Out: results/retrieval.json
"""
import json
import pathlib
import random
import re
import statistics
import sys
import time
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import load_policy, np, settings, torch                         # noqa: E402
from support import reader                                                  # noqa: E402
from support.reader import Retriever, printed                               # noqa: E402
from support.runs import write_text                                         # noqa: E402
from tiny import world                                                      # noqa: E402

# ----------------------------------------------------------------
STREAMS = 5
CLIPS = 240                      # of each stream
QUESTIONS = 20                   # per stream and environment
FRACTIONS = (5, 10, 40)          # the memory is so many times the reader's budget
LONG_ENTRIES = 15_000            # of five captions each
LONG_QUESTIONS = 500
SETTINGS = ("right", "wrong", "inside", "untimed")
# ----------------------------------------------------------------


# ================================================================ rankings
class Embedded(Retriever):
    """Relevance: cosine of mean-pooled last hidden states of the base."""
    policy = None
    known = {}                                   # {text: unit vector (hidden,)}

    def embed(self, texts):
        """Unit vectors (n, hidden)."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self.known]
        self.policy.tokenizer.padding_side = "right"
        for i in range(0, len(unknown), 64):
            some = unknown[i:i + 64]
            self.known.update(zip(some, self.encode(some)))
        return torch.stack([self.known[text] for text in texts])

    def encode(self, texts):
        inputs = self.policy.tokenizer(texts, padding=True, return_tensors="pt")      # adds no token
        mask = inputs["attention_mask"]                                               # (b, T)
        with torch.no_grad():
            hidden = self.policy.lm(
                input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state  # (b, T, hidden)
        total = (hidden * mask[..., None]).sum(1)
        mean = total / mask.sum(1)[:, None]                                           # (b, hidden)
        return torch.nn.functional.normalize(mean, dim=-1)

    def relevance(self, query):
        entries = self.embed([printed(entry) for entry in self.entries])
        return (entries @ self.embed([query])[0]).numpy()


class Last(Retriever):
    """The last entries are the most relevant."""
    def relevance(self, query):
        return self.ends


class Drawn(Retriever):
    """Entries at random."""
    def relevance(self, query):
        return np.random.default_rng(len(query)).random(len(self.ends))


@dataclass
class Ranking:
    retriever: type
    share: float                                 # of its relevance that an entry lends to each neighbour


RANKINGS = {
    "BM25, neighbours": Ranking(Retriever, reader.SHARE),
    "BM25": Ranking(Retriever, 0),
    "embeddings, neighbours": Ranking(Embedded, reader.SHARE),
    "embeddings": Ranking(Embedded, 0),
    "the last entries": Ranking(Last, 0),
    "random entries": Ranking(Drawn, 0)}


# ================================================================ memories and questions
def make_stream(number, setting):
    """(entries, tasks) of one stream."""
    truth = world.make_stream(world.stream_seed(0, "test", number), CLIPS)
    other = world.make_stream(world.stream_seed(1, "test", number), CLIPS)
    rng = random.Random(number)
    entries = []
    caption = None
    for t in range(CLIPS):
        caption = world.caption(truth, t, caption, rng)
        memory = caption
        if setting == "wrong":
            draw = random.Random(f"{number} {t}").random()
            if draw < 0.1:
                memory = ""
            elif draw < 0.35:
                memory = world.caption(other, t, None, random.Random(t))
        entries.append([10.0 * t, 10.0 * t + 10, memory])
    tasks = world.make_tasks(str(number), truth, rng, QUESTIONS)
    if setting == "inside":                                     # all times of the world end in 0
        for task in tasks:
            task["question"] = re.sub(r"(\d\d:\d\d:\d)0", r"\g<1>4", task["question"])
    return entries, tasks


def is_right(task, entries):
    """Whether the exact reader answers from these entries as it should."""
    reply = world.Judge().answer(entries, task["question"], task["options"])
    return reply == task["answer"]


def seen_by_ranking(question, setting):
    if setting == "untimed":
        return re.sub(r"\d\d:\d\d:\d\d", "", question)
    return question


# ================================================================ figures
def compare_rankings(setting, tokenizer):
    """The accuracy of the whole reader per stream, and the share of it that each ranking keeps.

    Shares are {ranking: {fraction: {"all" or environment: [share per stream]}}}.
    """
    accuracies = []
    shares = {}
    for number in range(STREAMS):
        entries, tasks = make_stream(number, setting)
        whole = [is_right(task, entries) for task in tasks]
        accuracies.append(round(sum(whole) / len(tasks), 3))
        for name, ranking in RANKINGS.items():
            reader.SHARE = ranking.share                        # a constant: this script alone varies it
            retriever = ranking.retriever(entries, tokenizer)
            for fraction in FRACTIONS:
                budget = retriever.tokens.sum() // fraction
                right = answer_from_part(retriever, tasks, budget, setting)
                row = shares.setdefault(name, {}).setdefault(str(fraction), {})
                add_shares(row, tasks, right, whole)
    reader.SHARE = RANKINGS["BM25, neighbours"].share
    return accuracies, shares


def answer_from_part(retriever, tasks, budget, setting):
    """Whether each task is answered rightly from the entries that the ranking keeps."""
    right = []
    for task in tasks:
        question = seen_by_ranking(task["question"], setting)
        entries, _ = retriever(question, task["options"], task["time"], budget)
        right.append(is_right(task, entries))
    return right


def add_shares(row, tasks, right, whole):
    """Appends to row[environment], and row["all"], the right answers over those of the whole reader."""
    for environment in ("all", *world.CATEGORIES):
        top = 0
        bottom = 0
        for task, from_part, from_whole in zip(tasks, right, whole):
            if environment in ("all", task["environment"]):
                top += from_part
                bottom += from_whole
        shares = row.setdefault(environment, [])
        if bottom:                                              # the whole reader may know nothing
            shares.append(round(top / bottom, 3))


def long_memory(tokenizer):
    """Seconds for a long memory, at the full-size model's budget, and the mean tokens of an entry."""
    truth = world.make_stream(0, LONG_ENTRIES)
    rng = random.Random(0)
    entries = []
    for t in range(LONG_ENTRIES):
        captions = [world.caption(truth, t, None, rng) for _ in range(5)]
        entries.append([10.0 * t, 10.0 * t + 10, " ".join(captions)])
    per_environment = -(-LONG_QUESTIONS // len(world.CATEGORIES))
    tasks = world.make_tasks("long", truth[:CLIPS], rng, per_environment)[:LONG_QUESTIONS]
    budget = settings({"__doc__": ""}, ["--MODEL=full"]).READER_TOKENS
    began = time.perf_counter()
    retriever = Retriever(entries, tokenizer)
    counted = time.perf_counter()
    retrieved = 0
    for number, task in enumerate(tasks, 1):
        asked_at = 10.0 * LONG_ENTRIES * number / LONG_QUESTIONS
        _, is_part = retriever(task["question"], task["options"], asked_at, budget)
        retrieved += is_part
    ended = time.perf_counter()
    return {"entries": LONG_ENTRIES, "questions": LONG_QUESTIONS, "retrieved": retrieved,
            "budget": budget, "tokens_an_entry": round(float(retriever.tokens.mean()), 1),
            "counting_s": round(counted - began, 1), "asking_s": round(ended - counted, 1)}


# ================================================================ the tables
def page(result):
    """The table of results/README.md, from the JSON file: a test compares them. Means over the streams, in %."""
    head = [f"1/{fraction}" for fraction in FRACTIONS]
    lines = ["| ranking | " + " | ".join(head) + " | 1/10, times hidden |", "|---" * (2 + len(head)) + "|"]
    for name in RANKINGS:
        cells = [mean_share(result["right"], name, fraction) for fraction in FRACTIONS]
        cells.append(mean_share(result["untimed"], name, 10))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_share(setting, name, fraction):
    shares = setting["share of it"][name][str(fraction)]["all"]
    return f"{100 * statistics.mean(shares):.0f}"


def spread(values):
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def show_setting(setting, accuracies, shares):
    print(f"\n{setting}: the whole reader's accuracy is {spread(accuracies)}")
    print(f"{'':28}" + "".join(f"1/{fraction:<22}" for fraction in FRACTIONS))
    for name, row in shares.items():
        cells = [f"{spread(row[str(fraction)]['all']):24}" for fraction in FRACTIONS]
        print(f"{name:28}" + "".join(cells))


def show_environments(shares):
    print(f"\n{'right, 1/10':28}" + "".join(f"{name:10}" for name in world.CATEGORIES))
    for name, row in shares.items():
        means = [statistics.mean(row["10"][environment]) for environment in world.CATEGORIES]
        print(f"{name:28}" + "".join(f"{mean:<10.2f}" for mean in means))


# ================================================================ the whole
def main():
    Embedded.policy = load_policy(settings({"__doc__": ""}, ["--CPU_THREADS=1"]))
    tokenizer = Embedded.policy.tokenizer
    result = {"streams": STREAMS, "clips": CLIPS, "share": reader.SHARE}
    for setting in SETTINGS:
        accuracies, shares = compare_rankings(setting, tokenizer)
        result[setting] = {"accuracy of the whole": accuracies, "share of it": shares}
        show_setting(setting, accuracies, shares)
    show_environments(result["right"]["share of it"])
    result["long"] = long_memory(tokenizer)
    print(f"\na long memory: {result['long']}")
    text = json.dumps(result, indent=1) + "\n"
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)     # a list is a line
    file = ROOT / "results" / "retrieval.json"
    write_text(file, text)
    print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
