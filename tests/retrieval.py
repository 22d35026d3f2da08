"""Which entries of a memory that outgrows the reader to read: by BM25, embeddings of the base, or simpler.

On long streams of the embedded world the exact reader answers from what each ranking keeps within 1/5, 1/10
and 1/40 of the whole memory. Shown is its accuracy as a share of that of a reader who sees everything: the
mean over streams (the least to the most). Settings:
  right      true captions; the questions name times at which clips begin
  wrong      a quarter of the captions are of another stream, a tenth is lost
  inside     as `right`, but the questions' times lie 4 s after a clip's beginning
  untimed    as `right`, but the ranking does not get to see the questions' times: most name little else
Then by environment (`right`, 1/10), and the time that a long memory takes: 15,000 entries, 500 questions
spread over it, on one core.

Run: python tests/retrieval.py          (writes results/retrieval.json)
"""
import json
import pathlib
import random
import re
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common                                                               # noqa: E402
import judges                                                               # noqa: E402
from tiny import world                                                      # noqa: E402

STREAMS, CLIPS, ASKED = 5, 240, 20       # streams, clips of each, questions per stream and environment
PARTS = (5, 10, 40)                      # the memory is so many times the reader's budget
LONG = 15_000, 500                       # entries (of five captions each), questions


class Embedded(judges.Retriever):
    """Relevance: cosine of mean-pooled last hidden states of the base."""
    policy, known = None, {}

    def embed(self, texts):
        """Unit vectors (n, hidden)."""
        torch, todo = common.torch, [t for t in dict.fromkeys(texts) if t not in self.known]
        self.policy.tokenizer.padding_side = "right"
        for i in range(0, len(todo), 64):
            x = self.policy.tokenizer(todo[i:i + 64], padding=True, return_tensors="pt")   # adds no token
            ids, mask, model = x["input_ids"], x["attention_mask"], self.policy.model.model        # (b, T)
            with torch.no_grad():
                h = model.language_model(input_ids=ids, attention_mask=mask).last_hidden_state  # (b, T, hidden)
            mean = (h * mask[..., None]).sum(1) / mask.sum(1)[:, None]                           # (b, hidden)
            self.known.update(zip(todo[i:i + 64], torch.nn.functional.normalize(mean, dim=-1)))
        return torch.stack([self.known[t] for t in texts])

    def relevance(self, query):
        return (self.embed([judges.printed(e) for e in self.entries]) @ self.embed([query])[0]).numpy()


class Last(judges.Retriever):
    relevance = lambda self, query: self.ends


class Drawn(judges.Retriever):
    relevance = lambda self, query: common.np.random.default_rng(len(query)).random(len(self.ends))


RANKINGS = {"BM25, neighbours": (judges.Retriever, judges.SHARE), "BM25": (judges.Retriever, 0),
            "embeddings, neighbours": (Embedded, judges.SHARE), "embeddings": (Embedded, 0),
            "the last entries": (Last, 0), "random entries": (Drawn, 0)}


def stream(i, setting):
    """(entries, tasks) of one stream."""
    truth, other = (world.make_stream(world.stream_seed(n, "test", i), CLIPS) for n in (0, 1))
    rng, entries, previous = random.Random(i), [], None
    for t in range(CLIPS):
        previous = world.caption(truth, t, previous, rng)
        draw = random.Random(f"{i} {t}").random() if setting == "wrong" else 1
        untrue = world.caption(other, t, None, random.Random(t))
        told = "" if draw < 0.1 else untrue if draw < 0.35 else previous
        entries.append([10.0 * t, 10.0 * t + 10, told])
    tasks = world.make_tasks(str(i), truth, rng, ASKED)
    if setting == "inside":                                                 # all times of the world end in 0
        for task in tasks:
            task["question"] = re.sub(r"(\d\d:\d\d:\d)0", r"\g<1>4", task["question"])
    return entries, tasks


def kept(setting, tokenizer):
    """{ranking: {times: {"all" or environment: [accuracy over the whole reader's, per stream]}}}, and the
    accuracy of the whole reader per stream."""
    judge, table, accuracy = world.Judge(), {}, []
    right = lambda task, entries: judge.answer(entries, task["question"], task["options"]) == task["answer"]
    shown = lambda question: re.sub(r"\d\d:\d\d:\d\d", "", question) if setting == "untimed" else question
    for i in range(STREAMS):
        entries, tasks = stream(i, setting)
        whole = [right(t, entries) for t in tasks]
        accuracy.append(round(sum(whole) / len(tasks), 3))
        for name, (kind, share) in RANKINGS.items():
            judges.SHARE, retriever = share, kind(entries, tokenizer)
            for times in PARTS:
                budget = retriever.tokens.sum() // times
                told = [retriever(shown(t["question"]), t["options"], t["time"], budget)[0] for t in tasks]
                good = [right(t, part) for t, part in zip(tasks, told)]
                for e in ("all", *world.CATEGORIES):
                    mine = [j for j, t in enumerate(tasks) if e in ("all", t["environment"])]
                    top, bottom = (sum(x[j] for j in mine) for x in (good, whole))
                    row = table.setdefault(name, {}).setdefault(str(times), {}).setdefault(e, [])
                    row += [round(top / bottom, 3)] if bottom else []     # the whole reader may know nothing
    judges.SHARE = RANKINGS["BM25, neighbours"][1]
    return table, accuracy


def long_memory(tokenizer):
    """Seconds for LONG, at the full model's budget, and the mean tokens of an entry."""
    n, asked = LONG
    truth, rng = world.make_stream(0, n), random.Random(0)
    entries = [[10.0 * t, 10.0 * t + 10, " ".join(world.caption(truth, t, None, rng) for _ in range(5))]
               for t in range(n)]
    tasks = world.make_tasks("long", truth[:CLIPS], rng, -(-asked // len(world.CATEGORIES)))[:asked]
    budget, began = common.settings({"__doc__": ""}, ["--MODEL=full"]).READER_TOKENS, time.perf_counter()
    retriever = judges.Retriever(entries, tokenizer)
    built = time.perf_counter()
    used = [retriever(t["question"], t["options"], 10.0 * n * (i + 1) / asked, budget)[1]
            for i, t in enumerate(tasks)]
    return {"entries": n, "questions": asked, "retrieved": sum(used), "budget": budget,
            "tokens_an_entry": round(float(retriever.tokens.mean()), 1),
            "counting_s": round(built - began, 1), "asking_s": round(time.perf_counter() - built, 1)}


def main():
    Embedded.policy = common.load_policy(common.settings({"__doc__": ""}, ["--CPU_THREADS=1"]))
    tokenizer, result = Embedded.policy.tokenizer, {"streams": STREAMS, "clips": CLIPS, "share": judges.SHARE}
    spread = lambda x: f"{statistics.mean(x):.2f} ({min(x):.2f} to {max(x):.2f})"
    for setting in ("right", "wrong", "inside", "untimed"):
        table, accuracy = kept(setting, tokenizer)
        result[setting] = {"accuracy of the whole": accuracy, "kept": table}
        print(f"\n{setting}: the whole reader's accuracy is {spread(accuracy)}\n"
              f"{'':28}" + "".join(f"1/{times:<22}" for times in PARTS))
        for name, row in table.items():
            print(f"{name:28}" + "".join(f"{spread(row[str(times)]['all']):24}" for times in PARTS))
    print("\nright, 1/10" + " " * 17 + "".join(f"{e:10}" for e in world.CATEGORIES))
    for name, row in result["right"]["kept"].items():
        print(f"{name:28}" + "".join(f"{statistics.mean(row['10'][e]):<10.2f}" for e in world.CATEGORIES))
    result["long"] = long_memory(tokenizer)
    print(f"\na long memory: {result['long']}")
    file = ROOT / "results/retrieval.json"
    text = json.dumps(result, indent=1) + "\n"
    file.write_text(re.sub(r"\[[^][{}]*\]", lambda x: " ".join(x[0].split()), text))       # a list is a line
    print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
