"""Phase One: how to memorize. Group-relative policy optimisation on video with judges and
no labels (paper, section 2).

G memories are sampled for each context (five clips, the memories of the first four), each gets the reward
r = r_fmt + r_len + r_qual + r_rich, the group's mean and spread turn rewards into advantages, and the policy
moves towards the better ones. `rewards` below is the reward, `RollingBatch` the curriculum; the loop is
`common.grpo`, its gate `common.group_advantages`, its loss `common.policy_loss`.

Differs from the paper: LoRA over a frozen base instead of all parameters; a `KL` to the base, on in the
embedded world (the paper has none: 0); r_qual asks the judges only where the rules hold; groups without
variance leave, and the rest is split evenly, into at most CONTEXTS / MINI_BATCH updates; a sample whose judge
failed leaves its group before mean and spread are taken.
`python 02_phase1_train.py --SHOW=1` prints the first group of step 0 in full, its rewards and
advantages, and stops.

Ctrl-C finishes the step and saves; the same command goes on from checkpoint.pt, and a finished run says so
and stops. A changed constant needs a run of its own: --RUN=NEWNAME --FROM=OLDRUN, which trains from step 0.

Run: python 02_phase1_train.py [--NAME=value ...]
In:  streams/streams.jsonl (01) and its videos; captions.jsonl (01 for the embedded world, else yours, if any);
     what the judge needs
Out: phase1/adapter (PEFT folder; weights.safetensors with TRAIN="all"), log.csv, checkpoint.pt, settings.json
"""
import importlib
import math
import random
import re
import resource
import sys

from common import (both, clock, grpo, load_policy, load_streams, make_context, need, np, read_jsonl, settings,
                    start, torch)
from judges import load_judge
from loading import command, save_adapter

# ---------------------------------------------------------------- embedded world | Qwen3-VL-30B-A3B
LR = both(5e-4, 1e-5)            # paper: 1e-6 on all parameters; LoRA takes about ten times that
KL = both(0.1, 0.0)              # weight of the KL to the base; paper: 0
OFF_POLICY_STEPS = both(40, 60)  # history by the stronger writer (paper: 60 steps) ...
STEPS = both(60, 100)            # ... then, up to here, by the policy itself (paper: 40 steps)
CONTEXTS = both(24, 32)          # contexts per rollout (paper: 32)
MINI_BATCH = both(6, 8)          # contexts per optimizer step (paper: 8, so four updates per rollout)
N_MIN = both(3, 11)              # clips of a stream: always extended below (released run: 11) ...
N_MAX = both(9, 22)              # ... always resampled above (released run: 22)
RESAMPLE = 0.13                  # chance to resample in between (released run)
PRINT_EVERY = both(10, 1)        # steps between log lines with the best and the worst sample
SAVE_EVERY = both(10, 1)         # steps between checkpoints (torchrun waits 30 s for a step, then kills)
# ---------------------------------------------------------------- the method
GROUP = 8                        # G, samples per context (paper, section 2)
RATIO = "gspo"                   # "gspo": one ratio per sequence; "grpo": one per token
CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # clip-higher (released run)
GATE = 1                         # NSR gate: a sample below its group's mean is pushed down only if its reward
                                 # is negative; else its loss is 0, but it stays in mean, spread and divisor.
                                 # 0: no gate
FORMAT = -1.5                    # r_fmt of a malformed response, and its whole reward
RICHNESS = 0.05                  # weight of r_rich; 0 is the paper's ablation: memories shrink
TRAIN = "lora"                   # "lora": attention of the language model;
                                 # "all": all of its parameters, in fp32, so on a CPU alone (LR: the paper's)
GRAD_CLIP = 1.0                  # norm of the gradient at most
SHOW = 0                         # 1: print one group in full and stop
# ----------------------------------------------------------------
# log.csv, a row a step: reward, reward_std (over samples that were judged); format, length, quality, rich
# (means of the terms, a malformed sample counting 0 but for format); flat (share of groups without a
# gradient: no variance, or no judge); malformed, truncated, gated (shares of samples); response, thinking,
# memory (tokens per response, thinking part, well-formed memory); kl (to the reference, per token; 0 where
# KL is), clipped (share of ratios), grad_norm (before clipping, the step's largest); tokens_per_s (sampled),
# rollout_s, update_s (seconds, without the judge's), gb (peak memory of rank 0).

PROMPT = """You keep the memory of an endless video. Below are its latest clips with the memories that you \
wrote for them. Write the memory of the last clip in one or two sentences: what it shows or says, true, \
connected to the memory before, nothing that it already states. Call people by their IDs, like <face_3>. \
Answer with {"description": "..."}."""
FAITHFUL = """These frames are the newest clip of a video; heard in it: {heard}
The memory before it: {previous}
Its new memory: {memory}
Is all that the new memory says supported by the frames or by what is heard, and does it connect to the \
memory before? Answer with {{"verdict": true}} or {{"verdict": false}}."""
CLEAN = """The memory before: {previous}
The new memory: {memory}
Is the new memory free of all this: anything that the memory before already states; boxes or coordinates; \
talk of "subtitles" or "this video"; a speaker's label within quotation marks? Answer with \
{{"verdict": true}} or {{"verdict": false}}."""
RICHEST = """These frames are the newest clip of a video; heard in it: {heard}
The memory before it: {previous}
Candidates for its new memory:
{memories}
Rank them by how much true information each holds that is neither repeated nor in the memory before. \
Answer with {{"best_first": [...]}}, all numbers from the richest to the poorest."""
# for templates that open no thinking part
ASK_TO_THINK = " First think, then write </think>, then the answer."
TASK_PROMPT = "\nThese questions were asked lately; similar ones will come, so remember what they need:\n"


def build_prompt(context, video, tokenizer):
    """Prompt text up to where the answer begins: instruction; per clip its time, frame pairs and memory; the
    tasks. video: per clip a list of (seconds in the clip, tokens) per frame pair."""
    text = PROMPT + "\n"
    for i, (clip, pairs) in enumerate(zip(context.clips, video)):
        text += f"\n{clock(clip['start'])}-{clock(clip['end'])} "
        text += "".join(f"<{t:.1f} seconds><|vision_start|>{'<|video_pad|>' * n}<|vision_end|>"
                        for t, n in pairs)
        text += f"\n{context.history[i] or '(nothing)'}" if i < len(context.history) else ""
    text += TASK_PROMPT + "\n".join(context.questions) if context.questions else ""
    chat = lambda content: tokenizer.apply_chat_template([{"role": "user", "content": content}],
                                                         tokenize=False, add_generation_prompt=True)
    return chat(text) if chat(text).endswith("<think>\n") else chat(text + ASK_TO_THINK)


def length_reward(tokens, limit):
    """r_len: 0 up to `limit` thinking tokens, then linearly down to -1.0 at twice that (paper, section 2).

    >>> length_reward(1200, 1200), length_reward(1800, 1200), length_reward(9999, 1200)
    (0.0, -0.5, -1.0)
    """
    return 0.0 - min(1.0, max(0.0, tokens / limit - 1))


def rules_hold(memory, tokens, limit):
    """The rules of r_qual: IDs only as <face_3>, never a bare face_3, and at most `limit` memory tokens.

    >>> (rules_hold("<face_3> waves", 5, 17), rules_hold("face_3 waves", 5, 17),
    ...  rules_hold("<face_3> waves", 18, 17))
    (True, False, False)
    """
    return tokens <= limit and not re.search(r"(?i)\bface_?\s*\d|<face", re.sub(r"<face_\d+>", "", memory))


def quality(S, judge, contexts, samples):
    """r_qual per context and sample: +0.5 if the rules hold and both judges agree, -0.5 if not, None if a
    judge failed. Malformed samples get 0.0: they never reach a judge."""
    asked = [(c, s) for c, group in zip(contexts, samples) for s in group
             if s.memory and rules_hold(s.memory, s.memory_tokens, S.MEMORY_TOKENS)]
    clean = judge.ask("clean", [{"previous": c.history[-1] if c.history else "", "memory": s.memory}
                                for c, s in asked])
    faithful = judge.ask("faithful", [{"context": c, "memory": s.memory} for c, s in asked])
    verdict = {id(s): None if a is None or b is None else 0.5 if a and b else -0.5
               for (_, s), a, b in zip(asked, clean, faithful)}
    return [[verdict.get(id(s), -0.5 if s.memory else 0.0) for s in group] for group in samples]


def richness(S, judge, contexts, samples, qualities):
    """r_rich = RICHNESS * u, u = 1 - (rank - 1) / (G' - 1) among the G' samples of a group
    with good quality; else 0."""
    rich = [[0.0] * len(group) for group in samples]
    valid = [[i for i, s in enumerate(group) if s.memory and q[i] is not None and q[i] >= 0]
             for group, q in zip(samples, qualities)]
    asked = [g for g, v in enumerate(valid) if len(v) >= 2 and S.RICHNESS]
    ranks = judge.ask("rank", [{"context": contexts[g], "memories": [samples[g][i].memory for i in valid[g]]}
                               for g in asked])
    for g, rank in zip(asked, ranks):
        for i, r in zip(valid[g], rank or ()):           # a failed ranking leaves the group without this term
            rich[g][i] = S.RICHNESS * (1 - (r - 1) / (len(valid[g]) - 1))
    return rich


def rewards(S, judge, contexts, samples):
    """Per context {"total", "gate", "terms"}: r = r_fmt + r_len + r_qual + r_rich; a format
    violation gets r_fmt alone."""
    qualities = quality(S, judge, contexts, samples)
    rich = richness(S, judge, contexts, samples, qualities)
    scores = []
    for group, r_qual, r_rich in zip(samples, qualities, rich):
        r_fmt = [0.0 if s.memory else S.FORMAT for s in group]
        r_len = [length_reward(s.thinking_tokens, S.THINK_TOKENS) if s.memory else 0.0 for s in group]
        terms = {"format": r_fmt, "length": r_len, "quality": r_qual, "rich": r_rich}
        total = [None if None in each else sum(each) for each in zip(*terms.values())]
        # "gate": the reward whose sign the gate looks at; here the reward itself, in 05 the reward without R
        scores.append({"total": total, "gate": total, "terms": terms})
    return scores


class RollingBatch:
    """Contexts for training. First off-policy history: a random clip with the stronger writer's memories
    before it. Then on-policy history, as at deployment: after each update every stream is extended (one
    sampled memory joins its history, "" if it is malformed; the next clip arrives) or resampled (a new
    stream, a new start, an empty history): extended below N_MIN clips, resampled above N_MAX or at the
    stream's end, in between resampled with chance RESAMPLE.

    `state` (JSON) holds all that the next step depends on.
    """

    def __init__(self, S, streams, captions):
        self.S, self.streams, self.captions = S, streams, captions
        self.state = []                            # per slot: [stream index, first clip, memories since then]

    def next(self, step):
        rng = random.Random(f"{self.S.SEED} batch {step}")
        if step < self.S.OFF_POLICY_STEPS:
            picked = [(s, rng.randrange(len(s["clips"])))
                      for s in rng.choices(self.streams, k=self.S.CONTEXTS)]
            return [make_context(s, t, self.captions.get(s["stream"], {}), k=self.S.K) for s, t in picked]
        self.state = self.state or [self.fresh(rng) for _ in range(self.S.CONTEXTS)]
        return [make_context(self.cut(i, first), len(kept), kept, k=self.S.K)
                for i, first, kept in self.state]

    def cut(self, i, first):
        return self.streams[i] | {"clips": self.streams[i]["clips"][first:]}

    def fresh(self, rng):
        i = rng.randrange(len(self.streams))
        return [i, rng.randrange(max(1, len(self.streams[i]["clips"]) - self.S.N_MIN)), []]

    def update(self, step, samples):
        rng = random.Random(f"{self.S.SEED} extend {step}")
        for slot, group in enumerate(samples if self.state else ()):
            i, first, kept = self.state[slot]
            kept.append(rng.choice(group).memory or "")
            ended, n = first + len(kept) >= len(self.streams[i]["clips"]), len(kept)
            if ended or n > self.S.N_MAX or (n >= self.S.N_MIN and rng.random() < self.S.RESAMPLE):
                self.state[slot] = self.fresh(rng)


def histories(S, policy, streams, out):
    """{stream: {clip: memory}} by a stronger writer: the world's captions, or, with a
    banner, the base model itself."""
    try:
        rows = read_jsonl(need(S, "streams/captions.jsonl"))
    except SystemExit:
        print("*** streams/captions.jsonl is missing: the off-policy history is written by the base itself. "
              "Captions by a stronger model, one {stream, clip, memory} a line, serve better (paper, "
              "section 2) ***")
        watched = importlib.import_module("03_collect_tasks").watch(policy, S, streams,
                                                                    path=out / "history.jsonl")
        return {s: {i: m["memory"] for i, m in enumerate(kept)} for s, kept in watched.items()}
    written = {}
    for r in rows:
        written.setdefault(r["stream"], {})[r["clip"]] = r["memory"]
    return written


def log_row(step, samples, scores, groups, sums, rollout_s, update_s):
    """A row of log.csv, whose columns are explained above; scores and groups as `grpo` has them."""
    flat = [s for g in samples for s in g]
    total = [t for r in scores for t in r["total"] if t is not None]
    mean = lambda x: sum(x) / max(1, len(x))
    terms = {k: mean([v for r in scores for v in r["terms"][k] if v is not None]) for k in scores[0]["terms"]}
    tokens, n = sum(len(s.ids) for s in flat), max(1, sum(1 for g in groups if g and any(g["advantages"])))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gb = (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident) / 2**30
    return dict(step=step, reward=mean(total), reward_std=float(np.std(total or [0])), **terms,
                flat=mean([not g or not any(g["advantages"]) for g in groups]),
                malformed=mean([s.memory is None for s in flat]), truncated=mean([s.truncated for s in flat]),
                gated=mean([not c for g in groups if g for c in g["counts"]]), response=tokens / len(flat),
                thinking=mean([s.thinking_tokens for s in flat]),
                memory=mean([s.memory_tokens for s in flat if s.memory]),
                kl=sums["kl"] / n, clipped=sums["clipped"] / n, grad_norm=sums["grad_norm"],
                tokens_per_s=tokens / rollout_s, rollout_s=rollout_s, update_s=update_s, gb=gb)


def show_group(policy, context, samples, score, group):
    """The teaching view: one group in full, its rewards term by term, the
    advantages and what the gate does."""
    print(re.sub(r"(<\|video_pad\|>)+", "<frames>",
                 policy.tokenizer.decode(policy.prepare([context])[0].ids)))
    for i, s in enumerate(samples):
        terms = "  ".join(f"{k} {v[i] if v[i] is None else round(v[i], 3)}"
                          for k, v in score["terms"].items())
        print(f"\n#{i}  {s.text}\n    {terms}  | total {score['total'][i]}")
        if group and i in group["kept"]:
            j = group["kept"].index(i)
            print(f"    advantage {group['advantages'][j]:+.2f}  "
                  f"{'counts' if group['counts'][j] else 'GATED: no loss'}")


def main(argv=None):
    S = settings(globals(), argv)
    out, stage3 = start(S, "phase1"), importlib.import_module("03_collect_tasks")
    if S.TRAIN not in ("lora", "all"):
        raise SystemExit(f'TRAIN={S.TRAIN}: take "lora" or "all"')
    if any((out / "adapter").glob("*.safetensors")) and not S.SHOW:
        return print(f"finished before: {out}; next: {command(S, '03_collect_tasks.py')}")
    streams, judge = load_streams(S, "train"), load_judge(S, lambda: policy)
    policy = load_policy(S)
    batch = RollingBatch(S, streams, histories(S, policy, streams, out))
    params = policy.add("phase1", S.TRAIN)
    print(f"{sum(p.numel() for p in params) / 1e6:.2f} M trainable parameters; {S.STEPS} steps of "
          f"{S.CONTEXTS} contexts, {math.ceil(S.CONTEXTS / S.MINI_BATCH)} updates a step")
    stage3.announce(S, policy, batch.next(0), S.STEPS * S.CONTEXTS, 2 * S.GROUP + 1, 5 if S.KL else 4)
    shown = grpo(policy, S, out, params, batch, lambda c, s: rewards(S, judge, c, s), log_row,
                 reference="base")                           # what KL refers to
    if shown:
        return show_group(policy, *shown)
    save_adapter(policy, "phase1", out / "adapter")
    print(f"Phase One is in {out / 'adapter'}; next: {command(S, '03_collect_tasks.py')}")


if __name__ == "__main__":
    main()
