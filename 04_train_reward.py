"""Relevance preferences from the recent questions, and a reward model R(questions, history, memory) fitted on them.

The judge compares the cached memories of every context, once per environment. What survives both orders and the
cycle rule gives a pair per context (for DPO in 05) and trains R (for the on-policy path of 05): a LoRA on the
frozen base and a scalar head, on text alone, with the preferences of all environments together.

Differs from the paper: it stops at the pairs, R is ours. Among equally long paths, pairs of equal quality come first.
Samples with the same text are not judged: they tie by construction.

Run: python 04_train_reward.py [--NAME=value ...]
In:  streams/streams.jsonl (01), tasks/recent.json, cache.jsonl (03), and what the judge needs
Out: reward/preferences.jsonl, pairs.jsonl, pairs_trl.jsonl (the same pairs, row by row, in TRL's preference format),
     verdicts/ (all of them, to resume from and to read), log.csv, checkpoint.pt, model/, report.json
"""
import contextlib
import random
import re
import statistics
import time
from collections import Counter
from itertools import combinations
from types import SimpleNamespace

from common import (F, TASK_PROMPT, Log, append_jsonl, both, build_prompt, interruptible, load_checkpoint, load_judge,
                    load_policy, load_streams, make_context, need, np, read_json, read_jsonl, save_checkpoint,
                    settings, start, torch, visible, write_json, write_jsonl, written_aside)

# ---------------------------------------------------------------- embedded world | Qwen3-VL-30B-A3B
LR = both(4e-3, 1e-4)            # of LoRA and head; up over WARMUP steps, then linearly down to 0
STEPS = both(250, 400)
WARMUP = both(10, 20)            # steps
CONTEXTS = both(8, 32)           # contexts per step, each with all of its preferences
ROWS = both(8, 1)                # contexts per forward pass, bounded by memory; gradients add up over a step
# ---------------------------------------------------------------- the method
RECENT = 5                       # questions that define an environment (paper: 5 to 10); the next 5 validate R
HISTORY = 1                      # earlier memories that R reads, newest last; @@
HELD_OUT = 0.25                  # share of the cached streams on which R never trains
CHUNK = 64                       # contexts per call of the judge: no more than this is lost with a call
PROBES = 64                      # contexts on which order, padding and spread are measured
BOOTSTRAP = 1000                 # resamples of the held-out streams for a 95 % interval
GRAD_CLIP = 1.0
SAVE_EVERY = 50                  # steps between checkpoints
# ----------------------------------------------------------------
# log.csv, a row a step: loss; accuracy (share of the step's pairs that R orders as the judge does, before the
# update); grad_norm before clipping; lr; seconds.


# ================================================================ preferences: a graph per context
def consistent(edges):
    """The edges (loser, winner) outside every strongly connected component (paper, section 2, item 3).

    An edge lies inside one exactly when its winner leads back to its loser.

    >>> consistent([(0, 1), (1, 2), (2, 0), (2, 3)])       # 0 < 1 < 2 < 0 is a contradiction; 2 < 3 stands
    [(2, 3)]
    """
    above = {node: {w for l, w in edges if l == node} for edge in edges for node in edge}
    for via in above:                                      # Warshall: then above[y] is all that y leads to
        for node in above:
            if via in above[node]:
                above[node] |= above[via]
    return [(l, w) for l, w in edges if l not in above[w]]


def longest_paths(edges):
    """{(y, x): edges on the longest directed path from y up to x}, for every x that y leads to; cycles not allowed.

    >>> longest_paths([(0, 1), (1, 2), (0, 2)])            # 0 -> 2 directly, and longer by way of 1
    {(0, 1): 1, (0, 2): 2, (1, 2): 1}
    """
    longest, ends, n = {}, set(edges), 1
    while ends:                                            # ends: (first, last) of all paths of n edges
        longest |= dict.fromkeys(ends, n)
        ends, n = {(y, w) for y, x in ends for l, w in edges if l == x}, n + 1
    return dict(sorted(longest.items()))


def choose_pair(edges, quality, length):
    """(winner, loser, path) of a context's one pair, or None (paper, section 2, item 4).

    quality: 0.5 or -0.5 per sample; length: its memory's tokens. quality(x) >= quality(y) and not both low mean
    that the winner is good. Ranked by the longest path; then equal quality (ours: the choice is one between equally
    long paths, so that relevance stays first); then the smaller difference in length; then the index.

    >>> choose_pair([(0, 1), (1, 2), (0, 2)], [-0.5, 0.5, 0.5], [9, 9, 9])       # the longest path
    (2, 0, 2)
    >>> choose_pair([(0, 2), (1, 2)], [-0.5, 0.5, 0.5], [9, 20, 9])              # equal quality
    (2, 1, 1)
    >>> choose_pair([(0, 2), (1, 2)], [0.5, 0.5, 0.5], [14, 11, 10])             # the closer length
    (2, 1, 1)
    >>> choose_pair([(0, 1)], [0.5, -0.5], [9, 9])                               # the more relevant one is worse
    """
    ranked = [(-path, quality[x] != quality[y], abs(length[x] - length[y]), x, y)
              for (y, x), path in longest_paths(edges).items() if quality[x] >= quality[y] and quality[x] > 0]
    if ranked:
        path, _, _, x, y = min(ranked)
        return x, y, -path


def comparable(samples):
    """Pairs (i, j) worth a verdict: both well formed, of known quality, and not the same text.

    >>> sample = lambda memory, format=0: {"memory": memory, "format": format, "quality": 0.5 if memory else None}
    >>> comparable([sample("a"), sample(None, -1.5), sample("b"), sample("a")])
    [(0, 2), (2, 3)]
    """
    good = [i for i, s in enumerate(samples) if s["format"] == 0 and s["memory"] and s["quality"] is not None]
    return [(i, j) for i, j in combinations(good, 2) if samples[i]["memory"] != samples[j]["memory"]]


def settle(verdicts):
    """[[i, j, verdict with i first, verdict with j first]] -> edges (loser, winner), and what became of all verdicts.

    >>> settle([[0, 1, "first", "second"], [0, 2, "first", "first"], [1, 2, "tie", "first"], [1, 3, None, "first"]])
    ([(1, 0)], Counter({'agreed': 1, 'contradicted': 1, 'tied': 1, 'failed': 1}))
    """
    edges, fate = [], Counter()
    for i, j, *v in verdicts:
        agreed = v in (["first", "second"], ["second", "first"])
        edges += [(j, i) if v[0] == "first" else (i, j)] if agreed else []
        fate["agreed" if agreed else "failed" if None in v else "tied" if "tie" in v else "contradicted"] += 1
    return edges, fate


def compare(S, judge, cache, questions, path):
    """{(stream, clip): verdicts} on all comparable pairs, both orders; what the file `path` holds isn't asked again.

    Raises SystemExit when the judge fails on most of a call; the calls before it are kept.
    """
    rows = read_jsonl(path, torn=True) if path.exists() else []
    done = {(r["stream"], r["clip"]) for r in rows}
    todo = [c for c in cache if (c["stream"], c["clip"]) not in done]
    for part in (todo[i:i + S.CHUNK] for i in range(0, len(todo), S.CHUNK)):
        asked = [(c["samples"], *order) for c in part for i, j in comparable(c["samples"]) for order in ((i, j), (j, i))]
        answers = judge.ask("prefer", [{"questions": questions, "first": s[a]["memory"], "second": s[b]["memory"]}
                                       for s, a, b in asked])
        if answers.count(None) * 2 > len(answers):
            raise SystemExit(f"the judge failed on {answers.count(None)} of {len(answers)} comparisons; mend it and "
                             f"run again: it goes on from {path}")
        answer = iter(answers)
        new = [{"stream": c["stream"], "clip": c["clip"], "verdicts": [
            [i, j, next(answer), next(answer)] for i, j in comparable(c["samples"])]} for c in part]
        append_jsonl(path, new)
        rows += new
    return {(r["stream"], r["clip"]): r["verdicts"] for r in rows}


def preferences(S, judge, cache, questions, folder, name=""):
    """Groups (what R learns from), pairs (what DPO learns from) and yield figures of all environments.

    questions: {environment: [text]}. A group: environment, stream, clip, history; memories and tokens of all samples
    ("" and 0 where malformed, which no preference names); preferences [(winner, loser)].
    """
    groups, pairs, yields = [], [], {}
    folder.mkdir(exist_ok=True)
    for environment, asked in questions.items():
        verdicts = compare(S, judge, cache, asked, folder / (re.sub(r"\W+", "_", environment) + name + ".jsonl"))
        figures = yields[environment] = Counter(contexts=len(cache))
        for c in cache:
            edges, fate = settle(verdicts[c["stream"], c["clip"]])
            kept, s = consistent(edges), c["samples"]
            figures.update(fate, judged=fate.total(), cyclic=len(edges) - len(kept), kept=len(kept))
            group = {"environment": environment, "stream": c["stream"], "clip": c["clip"], "history": c["history"],
                     "memories": [x["memory"] or "" for x in s], "tokens": [x["memory_tokens"] for x in s],
                     "preferences": [(w, l) for l, w in kept]}
            groups += [group] if kept else []
            pair = choose_pair(kept, [x["quality"] for x in s], group["tokens"])
            if pair:
                pairs.append({k: group[k] for k in ("environment", "stream", "clip")}
                             | dict(zip(("winner", "loser", "path"), pair)))
                figures["with_pair"] += 1
    return groups, pairs, yields


def trl_rows(S, cache, pairs, tokenizer):
    """The pairs in TRL's preference format. Each clip is one <|video_pad|>, which the processor of Qwen3-VL expands
    into frames with their times; pairs.jsonl and streams.jsonl tell which files those are."""
    streams = {s["stream"]: s for s in load_streams(S, "deploy")}
    cached = {(c["stream"], c["clip"]): c for c in cache}
    for p in pairs:
        t, c = p["clip"], cached[p["stream"], p["clip"]]
        k = len(c["history"])
        context = make_context(streams[p["stream"]], t, dict(enumerate(c["history"], t - k)), k=k + 1)
        prompt = build_prompt(context, [[(0.0, 1)]] * (k + 1), tokenizer).replace("<0.0 seconds>", "")
        yield {"prompt": prompt, **{name: c["samples"][p[who]]["text"]
                                    for name, who in (("chosen", "winner"), ("rejected", "loser"))}}


# ================================================================ the reward model
class RewardModel:
    """R(questions, history, memory): a LoRA named "reward" on the policy's base, and a head at a memory's last token.

    The base's weights are shared: outside of `active` nothing of it works on the policy. `spread`, the unit of
    `score`, is the mean standard deviation of R within a context.
    """

    def __init__(self, policy, S, folder=None):
        self.policy, self.rows, self.history, self.spread = policy, S.ROWS, S.HISTORY, 1.0
        writer = policy.who
        self.params = policy.add_lora("base", "reward", folder)
        policy.lora |= {"base": [], "reward": ["reward"]}                # known to the policy, used by no writer
        policy.use(writer)
        self.head = torch.nn.Parameter(torch.zeros(policy.hidden, device=policy.device))     # (d,): R = 0 at first
        self.params.append(self.head)
        if folder:
            from safetensors.torch import load_file
            saved = load_file(str(folder / "head.safetensors"), device=str(policy.device))
            self.head.data, self.spread = saved["weight"], saved["spread"].item()

    @contextlib.contextmanager
    def active(self):
        with self.policy.using("base"):
            self.policy.model.enable_adapters()
            self.policy.model.set_adapter("reward")
            yield

    def tokens(self, questions, history, memories):
        """Ids of what a context's memories share, and of each memory. A memory stands where the policy would write
        it after a task prompt, so that the LoRA starts from what the base already makes of questions."""
        encode = lambda text: self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        history = [m or "(nothing)" for m in history[max(0, len(history) - self.history):]]
        shared = self.policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": "\n".join([TASK_PROMPT.strip("\n"), *questions, "", *history])}],
            tokenize=False, add_generation_prompt=True)
        return encode(shared + "\n</think>\n\n"), [encode(m) + [self.policy.end] for m in memories]

    def __call__(self, groups, questions):
        """R (M,) in fp32 for each group's memories; questions: a list of texts per group. With gradient if enabled.

        A group is one row [shared | m1 | ... | mM] as in the policy's log-probs: a memory sees the shared part and itself.
        """
        rows = [self.tokens(q, g["history"], g["memories"]) for g, q in zip(groups, questions)]
        pad = lambda lists, value: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(x) for x in lists], True, value).to(self.policy.device)
        ids = pad([sum(own, shared) for shared, own in rows], self.policy.end)                       # (B, T)
        owner = pad([sum(([j] * len(m) for j, m in enumerate([shared, *own])), []) for shared, own in rows], -1)
        place = pad([sum(([len(shared) + i for i in range(len(m))] for m in own), [*range(len(shared))])
                     for shared, own in rows], 0)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        hidden = self.policy.lm(input_ids=ids, position_ids=place.expand(3, -1, -1), use_cache=False,
                                attention_mask=visible(owner, owner) & causal).last_hidden_state     # (B, T, d)
        last = (owner > 0) & (owner != F.pad(owner[:, 1:], (0, 1), value=-1))                        # (B, T)
        return (hidden[last].float() @ self.head).split([len(own) for _, own in rows])               # (M,) each

    def measure(self, groups, questions):
        """As a call, without gradient and in batches: a list of floats per group."""
        cuts = [slice(i, i + self.rows) for i in range(0, len(groups), self.rows)]
        with self.active(), torch.no_grad():
            return [r.tolist() for cut in cuts for r in self(groups[cut], questions[cut])]

    def save(self, folder):
        from safetensors.torch import save_file
        with self.active():
            self.policy.lora["base"] = ["reward"]                        # for once, so that save finds it
            self.policy.save("base", folder)
            self.policy.lora["base"] = []
        with written_aside(folder / "head.safetensors") as aside:
            save_file({"weight": self.head.detach().cpu(), "spread": torch.tensor(self.spread)}, str(aside))


def load_reward_model(S, policy):
    """The reward model of runs/RUN (or FROM) as one more adapter on `policy`, whose writer stays switched on."""
    folder = need(S, "reward/model/head.safetensors").parent
    return RewardModel(policy, SimpleNamespace(**read_json(folder.parent / "settings.json")), folder)


def score(model, items):
    """R of items {"questions", "history", "memory"} in units of `spread`; those of one context are read in one row."""
    found = {}
    for i, item in enumerate(items):
        found.setdefault((tuple(item["questions"]), tuple(item["history"])), []).append(i)
    groups = [{"history": h, "memories": [items[i]["memory"] for i in mine]} for (_, h), mine in found.items()]
    values = model.measure(groups, [q for q, _ in found])
    R = {i: v / model.spread for mine, row in zip(found.values(), values) for i, v in zip(mine, row)}
    return [R[i] for i in range(len(items))]


def train(S, model, groups, questions, out):
    """Bradley-Terry: -log sigmoid(R(winner) - R(loser)), mean over a context's preferences, then over contexts.

    Each draw shows one to all of the environment's questions in random order, so that R reads what they are after,
    not how many there are or where. Draws depend on (seed, step) alone; resumes from out/checkpoint.pt.
    """
    from tqdm import tqdm
    optimizer, log, first = torch.optim.AdamW(model.params, lr=S.LR, weight_decay=0.0), Log(out / "log.csv"), 0
    if (out / "checkpoint.pt").exists():
        first, _ = load_checkpoint(out, model.params, optimizer)
        log.keep(first)
    bar = tqdm(range(first, S.STEPS), initial=first, total=S.STEPS, desc="reward", disable=first >= S.STEPS)
    with model.active(), interruptible() as stop:
        model.policy.train_only(model.params)
        for step in bar:
            # ---- batch
            began, draw, gaps, loss = time.time(), random.Random(f"{S.SEED} {step}"), [], 0.0
            batch = draw.sample(groups, min(S.CONTEXTS, len(groups)))
            shown = [draw.sample(q, draw.randint(1, len(q))) for q in (questions[g["environment"]] for g in batch)]
            # ---- loss
            for cut in (slice(i, i + S.ROWS) for i in range(0, len(batch), S.ROWS)):
                part = [torch.stack([r[w] - r[l] for w, l in g["preferences"]])                      # (pairs,) each
                        for g, r in zip(batch[cut], model(batch[cut], shown[cut]))]
                share = -sum(F.logsigmoid(gap).mean() for gap in part) / len(batch)                  # ()
                share.backward()
                loss, gaps = loss + share.item(), gaps + part
            # ---- update
            norm = torch.nn.utils.clip_grad_norm_(model.params, S.GRAD_CLIP).item()
            if not np.isfinite(norm):
                raise SystemExit(f"step {step}: the gradient norm is {norm}; nothing was changed in this step. "
                                 f"Lower LR (now {S.LR}) and run again: it goes on from the last checkpoint")
            lr = S.LR * min((step + 1) / S.WARMUP, 1, (S.STEPS - step) / max(1, S.STEPS - S.WARMUP))
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # ---- log and save
            accuracy = (torch.cat(gaps) > 0).float().mean().item()
            log.write(dict(step=step, loss=loss, accuracy=accuracy, grad_norm=norm, lr=lr, seconds=time.time() - began))
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}")
            if stop.asked or (step + 1) % S.SAVE_EVERY == 0 or step + 1 == S.STEPS:
                save_checkpoint(out, step + 1, model.params, optimizer, None)
            if stop.asked:
                raise SystemExit(f"stopped after step {step}; run the same command to go on")
        model.policy.train_only([])


# ================================================================ validation
def pair_accuracy(S, groups, values):
    """{mean, low, high}: share of preferences that `values` order as the judge does (equal ones count half), 95 % by
    bootstrap over streams, as the preferences of one stream are not independent."""
    table = {}
    for g, v in zip(groups, values):
        right = sum((v[w] > v[l]) + 0.5 * (v[w] == v[l]) for w, l in g["preferences"])
        table[g["stream"]] = table.get(g["stream"], 0) + np.array([right, len(g["preferences"])])
    table = np.stack(list(table.values()))                                                           # (streams, 2)
    drawn = np.random.default_rng(S.SEED).integers(len(table), size=(S.BOOTSTRAP, len(table)))
    right, total = table[drawn].sum(1).T                                                             # (BOOTSTRAP,)
    low, high = np.percentile(right / total, [2.5, 97.5]).tolist()
    return {"mean": float(table[:, 0].sum() / table[:, 1].sum()), "low": low, "high": high}


def validate(S, model, groups, questions):
    """Figures on groups of held-out streams, judged and read by held-out questions {environment: [text]}."""
    draw, asked = random.Random(S.SEED), [questions[g["environment"]] for g in groups]
    others = [draw.choice([q for q in questions.values() if q != mine] or [mine]) for mine in asked]
    R, tokens = model.measure(groups, asked), [g["tokens"] for g in groups]
    some = draw.sample(range(len(groups)), min(S.PROBES, len(groups)))
    mixed = model.measure([groups[i] for i in some], [draw.sample(asked[i], len(asked[i])) for i in some])
    kept = [(groups[i]["preferences"], R[i], again) for i, again in zip(some, mixed)]
    alone = [abs(r - model.measure([groups[i] | {"memories": [m]}], [asked[i]])[0][0])
             for i in some[:8] for m, r in zip(groups[i]["memories"], R[i])]
    # within contexts, as only differences there mean anything; a malformed sample has no length
    a, b = np.concatenate([np.stack([v - v.mean() for v in np.array([r, t])[:, np.array(t) > 0]])
                           for r, t in zip(R, tokens)], axis=1)
    return {"pair_accuracy": pair_accuracy(S, groups, R),
            "other_questions": pair_accuracy(S, groups, model.measure(groups, others)),  # another environment's: chance
            "longer_wins": pair_accuracy(S, groups, tokens),                             # what length alone would get
            "length_correlation": float((a * b).sum() / max(1e-9, np.sqrt((a * a).sum() * (b * b).sum()))),
            "order_agreement": statistics.mean((r[w] > r[l]) == (m[w] > m[l]) for p, r, m in kept for w, l in p),
            "order_change": statistics.mean(abs(x - y) for _, r, m in kept for x, y in zip(r, m)) / model.spread,
            "padding_change": max(alone)}                                                # alone | packed and padded


def main(argv=None):
    S = settings(globals(), argv)
    out = start(S, "reward")
    recent, cache = read_json(need(S, "tasks/recent.json")), read_jsonl(need(S, "tasks/cache.jsonl"))
    asked, later = ({e: [r["question"] for r in rows[i:i + S.RECENT]] for e, rows in recent.items()}
                    for i in (0, S.RECENT))
    if not all(later.values()):
        print("*** too few questions to hold some out: where they lack, R is validated on its own ***")
        later = {e: q or asked[e] for e, q in later.items()}
    streams = sorted({c["stream"] for c in cache})
    held = set(streams[len(streams) - max(1, round(S.HELD_OUT * len(streams))):])
    unseen = [c for c in cache if c["stream"] in held]
    calls = [2 * len(asked) * sum(len(comparable(c["samples"])) for c in part) for part in (cache, unseen)]
    print(f"cost: {calls[0]} judge calls on {len(cache)} contexts x {len(asked)} environments, both orders; "
          f"{calls[1]} more to validate on {len(held)} held-out streams")

    # ---- preferences
    judge, began = load_judge(S), time.time()
    groups, pairs, yields = preferences(S, judge, cache, asked, out / "verdicts")
    tests, _, _ = preferences(S, judge, unseen, later, out / "verdicts", "-later")
    write_jsonl(out / "pairs.jsonl", pairs)
    write_jsonl(out / "preferences.jsonl", [{k: g[k] for k in ("environment", "stream", "clip")}
                                            | {"winner": w, "loser": l} for g in groups for w, l in g["preferences"]])
    names = ("judged", "failed", "tied", "contradicted", "agreed", "cyclic", "kept", "contexts", "with_pair")
    print(f"judged in {time.time() - began:.0f} s\n{'':20}" + "".join(f"{n:>13}" for n in names))
    yields["all"] = sum(yields.values(), Counter())
    for e, y in yields.items():
        y["share"] = round(y["with_pair"] / y["contexts"], 4)
        print(f"{e:20}" + "".join(f"{y[n]:13}" for n in names) + f"  {y['share']:.2%} (paper: 29.17 %)")

    # ---- reward model
    torch.manual_seed(S.SEED)                                            # of the LoRA's first values
    policy = load_policy(S)
    write_jsonl(out / "pairs_trl.jsonl", trl_rows(S, cache, pairs, policy.tokenizer))
    model, learn = RewardModel(policy, S), [g for g in groups if g["stream"] not in held]
    if not learn or not tests:
        raise SystemExit(f"{len(learn)} contexts with preferences to learn from and {len(tests)} to test on, in "
                         f"{len(streams)} streams: too few. Cache more streams with 03_collect_tasks.py")
    probe = random.Random(S.SEED).choices(learn, k=S.PROBES)
    read = [asked[g["environment"]] for g in probe]
    tokens = statistics.mean(len(sum(*model.tokens(q, g["history"], g["memories"])[::-1])) for g, q in zip(probe, read))
    began = time.time()
    model.measure(probe, read)
    seconds = 3 * (time.time() - began) / S.PROBES * S.CONTEXTS * S.STEPS   # a step is forward and twice that backward
    print(f"cost: {sum(p.numel() for p in model.params)} trainable parameters, {sum(len(g['preferences']) for g in learn)} "
          f"preferences in {len(learn)} contexts; {S.STEPS} steps x {S.CONTEXTS} contexts x {tokens:.0f} tokens = "
          f"{S.STEPS * S.CONTEXTS * tokens / 1e6:.2f} M tokens, about {seconds / 60:.1f} min")
    train(S, model, learn, asked, out)
    model.spread = statistics.mean(statistics.pstdev(v for v, t in zip(r, g["tokens"]) if t)
                                   for g, r in zip(probe, model.measure(probe, read))) or 1.0
    model.save(out / "model")
    report = validate(S, model, tests, later) | {"spread": model.spread, "yield": yields}
    write_json(out / "report.json", report)
    for name, value in list(report.items())[:-1]:
        print(f"{name:20}", *([f"{value:.5f}"] if isinstance(value, float) else (f"{k} {v:.3f}" for k, v in value.items())))


if __name__ == "__main__":
    main()
