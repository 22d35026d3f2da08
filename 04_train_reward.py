"""Relevance preferences from the recent questions, and a reward model
R(questions, history, memory) fitted on them.

The judge compares the cached memories of every context, once per environment. What survives both orders and
the cycle rule gives a pair per context (for DPO in 05) and trains R (for the on-policy path of 05): a LoRA on
the frozen base and a scalar head, on text alone, with the preferences of all environments together.
Differs from the paper: R is ours; among equally long paths, pairs of equal quality come first; samples with
the same text are not judged, as they tie by construction.

Run: python 04_train_reward.py [--NAME=value ...]
     (embedded world: 52 s and 0.6 GB on 2 cores in use by others)
In:  streams/streams.jsonl (01), tasks/recent.json, cache.jsonl (03), and what the judge needs
Out: reward/verdicts/, preferences.jsonl, pairs.jsonl, pairs_trl.jsonl (the same pairs in TRL's preference
     format), log.csv, checkpoint.pt, model/, report.json
"""
import importlib, random, sys, time
from collections import Counter
from itertools import combinations, groupby
from types import SimpleNamespace

from common import (F, Training, both, load_policy, load_streams, make_context, need, np, read_json,
                    read_jsonl, settings, slug, start, torch, visible, write_json, write_jsonl, written_aside)
from judges import load_judge
from loading import RANK, WORLD, gather, once, save_adapter

# ---------------------------------------------------------------- embedded world | Qwen3-VL-30B-A3B
LR = both(3e-3, 1e-4)            # of LoRA and head; up over WARMUP steps, then linearly down to 0
STEPS, WARMUP = both(200, 400), both(10, 20)
CONTEXTS = both(8, 32)           # contexts per step, each with all of its preferences
ROWS = both(8, 1)                # contexts per forward pass, bounded by memory; gradients add up over a step
SAVE_EVERY = 50                  # steps between checkpoints
# ---------------------------------------------------------------- the method
RECENT = 5                       # questions that define an environment (paper: 5-10); the next 5 validate R
HISTORY = 1                      # earlier memories that R reads; held out: 0.93 with all 4, 0.99 with 1
HELD_OUT = 0.25                  # share of the cached streams (clips, of a single one) where R never trains
CHUNK = 64                       # contexts per call of the judge: no more than this is lost with a call
BOOTSTRAP, GRAD_CLIP = 1000, 1.0  # resamples of the held-out streams for a 95 % interval; norm at most
# ----------------------------------------------------------------
PREFER = """These questions were asked lately, and similar ones will come:
{questions}
Find out what they are after. Which of two notes, {first!r} (first) or {second!r} (second), helps more to
answer such questions? Answer with {{"better": "first"}}, {{"better": "second"}} or {{"better": "tie"}}."""
# log.csv, a row a step: loss; accuracy (on the step's preferences); grad_norm (before clipping); lr; seconds.

# ================================================================ preferences: a graph per context
def consistent(edges):
    """The edges (loser, winner) outside every strongly connected component (paper, section 3, item 3).
    >>> consistent([(0, 1), (1, 2), (2, 0), (2, 3)])       # 0 < 1 < 2 < 0 is a contradiction; 2 < 3 stands
    [(2, 3)]
    """
    above = {node: {w for l, w in edges if l == node} for edge in edges for node in edge}
    for via in above:                                      # Warshall: then above[y] is all that y leads to
        for node in above:
            above[node] |= above[via] if via in above[node] else set()
    return [(l, w) for l, w in edges if l not in above[w]]        # inside: the winner leads back to the loser

def longest_paths(edges):
    """{(y, x): edges on the longest directed path from y up to x}, for every x that y leads to; cycles not
    allowed.
    >>> longest_paths([(0, 1), (1, 2), (0, 2)])            # 0 -> 2 directly, and longer by way of 1
    {(0, 1): 1, (0, 2): 2, (1, 2): 1}
    """
    longest, ends, n = {}, set(edges), 1
    while ends:                                            # ends: (first, last) of all paths of n edges
        longest |= dict.fromkeys(ends, n)
        ends, n = {(y, w) for y, x in ends for l, w in edges if l == x}, n + 1
    return dict(sorted(longest.items()))

def choose_pair(edges, quality, length):
    """(winner, loser, path) of a context's one pair, or None (paper, section 3, item 4).
    quality: 0.5 or -0.5 per sample; length: its memory's tokens. quality(x) >= quality(y) and not both low
    mean that the winner is good. Ranked by the longest path; then equal quality (ours; relevance stays
    first); then the smaller difference in length; then the index.
    >>> choose_pair([(0, 1), (1, 2), (0, 2)], [-0.5, 0.5, 0.5], [9, 9, 9])   # the longest path
    (2, 0, 2)
    >>> choose_pair([(0, 2), (1, 2)], [-0.5, 0.5, 0.5], [9, 20, 9])          # equal quality
    (2, 1, 1)
    >>> choose_pair([(0, 2), (1, 2)], [0.5, 0.5, 0.5], [14, 11, 10])         # the closer length
    (2, 1, 1)
    >>> choose_pair([(0, 1)], [0.5, -0.5], [9, 9])                           # the more relevant one is worse
    """
    ranked = [(-path, quality[x] != quality[y], abs(length[x] - length[y]), x, y)
              for (y, x), path in longest_paths(edges).items() if quality[x] >= quality[y] and quality[x] > 0]
    return next(((x, y, -path) for path, _, _, x, y in sorted(ranked)), None)

def comparable(samples):
    """Pairs (i, j) worth a verdict: both well formed, of known quality, and not the same text."""
    good = [i for i, s in enumerate(samples) if s["format"] == 0 and s["memory"] and s["quality"] is not None]
    return [(i, j) for i, j in combinations(good, 2) if samples[i]["memory"] != samples[j]["memory"]]

def compare(S, judge, cache, questions, path):
    """Per context [[i, j, what both orders say]]; contexts that the file `path` holds are not asked again.
    Raises SystemExit when the judge fails on most of a call; the calls before it are kept."""
    rows = once(lambda: read_jsonl(path, torn=True) if path.exists() else [])    # in the order of the cache
    for i in range(len(rows), len(cache), S.CHUNK):
        part = [(c, comparable(c["samples"])) for c in cache[i:i + S.CHUNK]]
        answers = once(lambda: judge.ask("prefer", [
            {"questions": questions, "first": c["samples"][a]["memory"], "second": c["samples"][b]["memory"]}
            for c, pairs in part for i, j in pairs for a, b in ((i, j), (j, i))]))
        if answers.count(None) * 2 > len(answers):
            raise SystemExit(f"the judge failed on {answers.count(None)} of {len(answers)} comparisons; mend "
                             f"it and run again: it goes on from {path}")
        said = ("failed" if None in v else "tied" if "tie" in v else v[0] if v[0] != v[1] else "contradicted"
                for v in zip(answers[::2], answers[1::2]))
        rows += [{"stream": c["stream"], "clip": c["clip"],
                  "verdicts": [[*pair, next(said)] for pair in pairs]} for c, pairs in part]
        write_jsonl(path, rows[-len(part):], "a")
    return [r["verdicts"] for r in rows]

def preferences(S, judge, caches, questions, folder, name=""):
    """Groups (what R learns from), pairs (what DPO learns from) and yield figures; caches, questions: rows
    and texts of each environment. A group: environment, stream, clip, history; memories and tokens of all
    samples ("" and 0 where malformed, which no preference names); preferences [(winner, loser)]."""
    groups, pairs, yields = [], [], {}
    folder.mkdir(exist_ok=True)
    for (environment, asked), cache in zip(questions.items(), caches.values()):
        verdicts = compare(S, judge, cache, asked, folder / f"{slug(environment)}{name}.jsonl")
        yields[environment] = figures = Counter(contexts=len(cache), judged=sum(map(len, verdicts)))
        for c, mine in zip(cache, verdicts):
            edges = [(j, i) if v == "first" else (i, j) for i, j, v in mine if v in ("first", "second")]
            kept, tokens = consistent(edges), [x["memory_tokens"] for x in c["samples"]]
            where = {"environment": environment, "stream": c["stream"], "clip": c["clip"]}
            if kept:
                groups.append(where | {
                    "history": c["history"], "memories": [x["memory"] or "" for x in c["samples"]],
                    "tokens": tokens, "preferences": [(w, l) for l, w in kept]})
            pair = choose_pair(kept, [x["quality"] for x in c["samples"]], tokens)
            pairs += [where | dict(zip(("winner", "loser", "path"), pair))] if pair else []
            figures.update([v for *_, v in mine], cyclic=len(edges) - len(kept), kept=len(kept),
                           with_pair=bool(pair))
    return groups, pairs, yields

def trl_rows(S, streams, cache, pairs, tokenizer):
    """The pairs in TRL's preference format. Each clip is one <|video_pad|>, which Qwen3-VL's processor
    expands into frames and their times; pairs.jsonl and streams.jsonl tell which files those are."""
    build_prompt = importlib.import_module("02_phase1_train").build_prompt
    streams, cached = {s["stream"]: s for s in streams}, {(c["stream"], c["clip"]): c for c in cache}
    for p in pairs:
        t, c = p["clip"], cached[p["stream"], p["clip"]]
        context = make_context(streams[p["stream"]], t,
                               dict(enumerate(c["history"], t - len(c["history"]))), k=S.K)
        prompt = build_prompt(context, [[(0.0, 1)]] * len(context.clips),
                              tokenizer).replace("<0.0 seconds>", "")
        yield {"prompt": prompt} | {name: c["samples"][p[who]]["text"]
                                    for name, who in (("chosen", "winner"), ("rejected", "loser"))}

# ================================================================ the reward model
class RewardModel:
    """R(questions, history, memory): one more writer of the policy, "reward", which is a LoRA on its base and
    does nothing while another is switched on; and a head at a memory's last token. `spread`, the unit of
    `score`, is R's mean standard deviation within a context; `read` counts the tokens read."""

    def __init__(self, policy, S, folder=None):
        from safetensors.torch import load_file
        self.policy, self.S, self.read, writer = policy, S, 0, policy.who
        self.params = policy.add("reward", "lora", folder)
        policy.use(writer)
        head = load_file(str(folder / "head.safetensors")) if folder else {"weight": torch.zeros(policy.hidden)}
        self.spread, self.head = (float(head.get("spread", 1)),
                                  torch.nn.Parameter(head["weight"].to(policy.device)))
        self.params.append(self.head)                                  # (d,)

    def tokens(self, questions, history, memories):
        """Ids of what a context's memories share, then of each memory. A memory stands where the policy would
        write it after a task prompt, so that the LoRA starts from what the base already makes of questions."""
        encode = lambda text: self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        task_prompt = importlib.import_module("02_phase1_train").TASK_PROMPT
        history = [m or "(nothing)" for m in history[max(0, len(history) - self.S.HISTORY):]]
        turn = {"role": "user", "content": "\n".join([task_prompt.strip("\n"), *questions, "", *history])}
        text = self.policy.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        return [encode(text + "\n</think>\n\n"), *(encode(m) + [self.policy.end] for m in memories)]

    def __call__(self, groups, questions):
        """R (M,) in fp32 of each group's memories; questions: a list of texts per group. A group is one row
        [shared | m1 | ... | mM], as in the policy's log-probs: a memory sees the shared part and itself."""
        rows = [self.tokens(q, g["history"], g["memories"]) for g, q in zip(groups, questions)]
        flat = lambda row: torch.tensor([x for part in row for x in part], device=self.policy.device)
        pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence(list(map(flat, rows)), True, value)
        ids = pad(rows, self.policy.end)                                                          # (B, T)
        owner = pad([[[j] * len(part) for j, part in enumerate(row)] for row in rows], -1)        # (B, T)
        starts = [[0] + [len(row[0])] * (len(row) - 1) for row in rows]  # memories follow the shared part
        place = pad([[range(at, at + len(m)) for at, m in zip(*x)] for x in zip(starts, rows)], 0)   # (B, T)
        self.policy.attend(owner)
        hidden = self.policy.lm(input_ids=ids, position_ids=place.expand(3, -1, -1), use_cache=False,
                                attention_mask=visible(owner, owner).tril()).last_hidden_state  # (B, T, d)
        last = (owner > 0) & (owner != F.pad(owner[:, 1:], (0, 1), value=-1))                     # (B, T)
        self.read += ids.numel()
        return (hidden[last].float() @ self.head).split([len(row) - 1 for row in rows])           # (M,) each

    def measure(self, groups, questions):
        """As a call, without gradient and in batches: an array (M,) per group."""
        with self.policy.using("reward"), torch.no_grad():
            return [r.cpu().numpy() for i in range(0, len(groups), self.S.ROWS)
                    for r in self(groups[i:i + self.S.ROWS], questions[i:i + self.S.ROWS])]

    def save(self, folder):
        from safetensors.torch import save_file
        save_adapter(self.policy, "reward", folder)
        with written_aside(folder / "head.safetensors") as aside:
            save_file({"weight": self.head.detach().cpu(), "spread": torch.tensor(self.spread)}, str(aside))

def load_reward_model(S, policy):
    """The reward model of runs/RUN (or FROM) as one more adapter on `policy`, whose writer stays on."""
    folder = need(S, "reward/model/head.safetensors").parent
    return RewardModel(policy, SimpleNamespace(**read_json(folder.parent / "settings.json")), folder)

def score(model, items):
    """R of items {questions, history, memory} in units of `spread`; neighbours of one context share a row."""
    rows = [(q, {"history": h, "memories": [x["memory"] for x in mine]})
            for (q, h), mine in groupby(items, key=lambda x: (x["questions"], x["history"]))]
    values = model.measure([g for _, g in rows], [q for q, _ in rows])
    return [r / model.spread for row in values for r in row.tolist()]

def train(S, model, groups, questions, out):
    """Bradley-Terry: -log sigmoid(R(winner) - R(loser)), mean over a context's preferences, then over
    contexts. Each draw shows one to all of the environment's questions in random order, so that R
    reads what they are after, not how many there are or where. Draws depend on (seed, step) alone;
    resumes from out/checkpoint.pt."""
    run = Training(S, out, model.params)
    with model.policy.using("reward"):
        model.policy.train_only(model.params)
        for step in run:
            # ---- batch
            began, draw, gaps, loss = time.time(), random.Random(f"{S.SEED} {step}"), [], 0.0
            batch = draw.sample(groups, min(S.CONTEXTS, len(groups)))
            shown = [draw.sample(q, draw.randint(1, len(q)))
                     for q in (questions[g["environment"]] for g in batch)]
            # ---- loss
            mine, shown = batch[RANK::WORLD], shown[RANK::WORLD]             # of several GPUs, this one's
            for i in range(0, len(mine), S.ROWS):
                R = model(mine[i:i + S.ROWS], shown[i:i + S.ROWS])                                # (M,) each
                gaps += [torch.stack([r[w] - r[l] for w, l in g["preferences"]])
                         for g, r in zip(mine[i:], R)]
                share = -sum(F.logsigmoid(gap).mean() for gap in gaps[i:]) / len(batch)           # ()
                share.backward()
                loss += share.item()
            # ---- update and log
            lr = S.LR * min((step + 1) / S.WARMUP, 1, (S.STEPS - step) / max(1, S.STEPS - S.WARMUP))
            norm, right = run.update(lr), sum(gather([(gap > 0).tolist() for gap in gaps]), [])
            run.log(dict(step=step, loss=sum(gather([loss])), accuracy=sum(right) / len(right),
                         grad_norm=norm, lr=lr, seconds=time.time() - began), "loss", "accuracy")

# ================================================================ validation
def pair_accuracy(S, groups, values):
    """{mean, low, high}: share of preferences that `values` order as the judge does (equal ones count half),
    95 % by a bootstrap over streams (over clips of a single one), whose preferences are not independent."""
    right, total, single = Counter(), Counter(), len({g["stream"] for g in groups}) == 1
    for g, v in zip(groups, values):
        right[g["stream"], single * g["clip"]] += sum((v[w] > v[l]) + 0.5 * (v[w] == v[l])
                                                      for w, l in g["preferences"])
        total[g["stream"], single * g["clip"]] += len(g["preferences"])
    right, total = (np.array([counts[s] for s in sorted(total)], dtype=float) for counts in (right, total))
    drawn = np.random.default_rng(S.SEED).integers(len(right), size=(S.BOOTSTRAP, len(right)))
    low, high = np.percentile(right[drawn].sum(1) / total[drawn].sum(1), [2.5, 97.5]).tolist()
    return {"mean": float(right.sum() / total.sum()), "low": low, "high": high}

def validate(S, model, groups, questions):
    """Figures on groups of held-out streams, judged and read by held-out questions {environment: [text]}."""
    draw, asked = random.Random(S.SEED), [questions[g["environment"]] for g in groups]
    others = [draw.choice([q for q in questions.values() if q != mine] or [mine]) for mine in asked]
    R, mixed = model.measure(groups, asked), model.measure(groups, [draw.sample(q, len(q)) for q in asked])
    same = [(r[w] > r[l]) == (m[w] > m[l]) for g, r, m in zip(groups, R, mixed) for w, l in g["preferences"]]
    alone = [abs(r - model.measure([g | {"memories": [m]}], [q])[0][0])
             for g, q, row in zip(groups[:8], asked, R) for m, r in zip(g["memories"], row)]
    tokens = [np.array(g["tokens"]) for g in groups]                     # 0 where malformed
    a, b = (np.concatenate([v[n > 0] - v[n > 0].mean() for v, n in zip(x, tokens)]) for x in (R, tokens))
    return {"pair_accuracy": pair_accuracy(S, groups, R),
            "shuffled_accuracy": pair_accuracy(S, groups, model.measure(groups, others)),  # others' questions
            "length_correlation": float(a @ b / max(1e-9, np.sqrt(a @ a * (b @ b)))),    # within contexts
            "order_agreement": float(np.mean(same)),                                     # questions reordered
            "order_change": float(np.abs(np.concatenate(R) - np.concatenate(mixed)).mean() / model.spread),
            "padding_change": float(max(alone))}                                         # packed | one by one

def main(argv=None):
    S = settings(globals(), argv)
    out = start(S, "reward")
    recent = read_json(need(S, "tasks/recent.json"))
    asked = {e: [r["question"] for r in rows[:S.RECENT]] for e, rows in recent.items()}
    later = {e: [r["question"] for r in rows[S.RECENT:2 * S.RECENT]] or asked[e] for e, rows in recent.items()}
    if any(q is asked[e] for e, q in later.items()):
        print("*** too few questions to hold some out: where they lack, R is validated on its own ***")
    streams, stage3 = load_streams(S, "deploy"), importlib.import_module("03_collect_tasks")
    caches = stage3.cached(S, streams)
    every = [c for mine in caches.values() for c in mine]
    unit = lambda c: c["stream"] if len({c["stream"] for c in every}) > 1 else (c["stream"], c["clip"])
    units = sorted({unit(c) for c in every})         # streams; of a single endless one, its clips
    held = set(units[len(units) - max(1, round(S.HELD_OUT * len(units))):])
    unseen = {e: [c for c in mine if unit(c) in held] for e, mine in caches.items()}
    asks = lambda parts: sum(len(comparable(c["samples"])) for mine in parts.values() for c in mine)
    print(f"cost: {2 * asks(caches) + 2 * asks(unseen)} judge calls, both orders, on {len(every)} contexts of "
          f"{len(asked)} environments; {len(held)} of {len(units)} streams once more with held-out questions")
    # ---- preferences
    policy = load_policy(S)
    judge = load_judge(S, lambda: policy)
    groups, pairs, yields = preferences(S, judge, caches, asked, out / "verdicts")
    tests, _, _ = preferences(S, judge, unseen, later, out / "verdicts", "-later")
    write_jsonl(out / "pairs.jsonl", pairs)
    write_jsonl(out / "preferences.jsonl", [
        {k: g[k] for k in ("environment", "stream", "clip")} | {"winner": w, "loser": l}
        for g in groups for w, l in g["preferences"]])
    yields["all"] = sum(yields.values(), Counter())
    for e, y in yields.items():
        print(f"{e:16}",
              *(f"{y[k]} {k}, " for k in ("judged", "failed", "tied", "contradicted", "cyclic", "kept")),
              f"{y['with_pair'] / y['contexts']:.2%} of contexts have a pair (paper: 29.17 %)")
    # ---- reward model
    write_jsonl(out / "pairs_trl.jsonl", trl_rows(S, streams, every, pairs, policy.tokenizer))
    learn = [g for g in groups if unit(g) not in held]
    if not learn or not tests:
        few = (f"no reward model: preferences in {len(learn)} contexts to learn from, in {len(tests)} to test on; "
               f"{yields['all']['tied']} of {yields['all']['judged']} comparisons were ties")
        return print(f"*** {few}. 05 with dpo has {len(pairs)} pairs ***") if pairs else sys.exit(few)
    torch.manual_seed(S.SEED)                                          # of the LoRA's first values
    model, began, few = RewardModel(policy, S), time.time(), random.Random(S.SEED).choices(learn, k=64)
    model.measure(few, [asked[g["environment"]] for g in few])
    work = S.STEPS * S.CONTEXTS / len(few)                             # a step takes 3 times its forward pass
    print(f"cost: {sum(p.numel() for p in model.params)} trainable parameters, {S.STEPS} steps x {S.CONTEXTS}"
          f" of {len(learn)} contexts with {sum(len(g['preferences']) for g in learn)} preferences, "
          f"{model.read * work / 1e6:.2f} M tokens, about {3 * work * (time.time() - began) / 60:.1f} min")
    train(S, model, learn, asked, out)
    values = model.measure(few, [asked[g["environment"]] for g in few])
    model.spread = float(np.mean([v[np.array(g["tokens"]) > 0].std() for g, v in zip(few, values)])) or 1.0
    model.save(out / "model")
    report = validate(S, model, tests, later) | {"spread": model.spread, "yield": yields}
    write_json(out / "report.json", report)
    for name, value in list(report.items())[:-1]:
        print(f"{name:20}", value if isinstance(value, dict) else round(value, 6))

if __name__ == "__main__":
    main()
