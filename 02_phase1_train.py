"""Phase One: how to memorize. Group-relative policy optimisation on video, with judges and no labels (paper, section 2).

G memories are sampled for each context (five clips, the memories of the first four). Each gets the reward
r = r_fmt + r_len + r_qual + r_rich, the group's mean and spread turn rewards into advantages, and the policy moves
towards the better ones.

Where things are. The reward: `rewards` below. The history that a context shows: `RollingBatch` below. The loop:
`grpo` in common.py. The gate: `group_advantages` there. The loss: `policy_loss` there. The prompt: PROMPT there.

To try another reward, add an entry to `sample.terms` in `rewards`: 0 for a malformed sample, None where a judge
failed on it. It is summed, seen by the gate, and logged as a column of its own. A new constant of it is a keyword of
`rewards` with a default, and is handed in by `main`. For a new question to the judge, see support/judges.py; ask it
once for all well-formed samples of all groups, as `quality` does. An edited reward or prompt needs a run of its own:
--RUN=NEWNAME --FROM=OLDRUN.

Differs from the paper: LoRA over a frozen base instead of all parameters; a `KL` to the base in the toy world (the
paper has none: 0); r_qual asks the judges only where the rules hold; groups without variance leave, and the rest is
split evenly into at most CONTEXTS / MINI_BATCH updates; a sample whose judge failed leaves its group before mean
and spread are taken.

Run: python 02_phase1_train.py [--NAME=value ...]     (--SHOW=1 prints the first group in full and stops)
     (toy world: 129 s on two cores)
In:  streams/streams.jsonl (01) and its videos; captions.jsonl (01 for the toy world, else yours, if any)
Out: phase1/adapter (PEFT folder; weights.safetensors with TRAIN="all"), log.csv, checkpoint.pt, settings.json
Ctrl-C finishes the step and saves; the same command goes on from there.
"""
import functools
import math
import random
import re
import resource
import sys

# numpy and torch come by way of common, so that --help works where they are not installed.
from common import (Group, build_prompt, fill_in_advantages, group_advantages, grpo, kl_to,
                    load_judge,
                    load_policy, make_context, np, parse_response, per_model, policy_loss, rollout,
                    settings, torch, watch)
from support.checkpoint import Training
from support.hours import say_plan, sizes_of
from support.judges import Ranking, Verdict
from support.plan import prompt_tokens
from support.runs import find, load_streams, next_command, read_jsonl, start
from support.weights import save_adapter

# ---------------------------------------------------------------- per_model(toy world, Qwen3-VL-30B-A3B)
LR = per_model(5e-4, 1e-5)       # paper: 1e-6 on all parameters; LoRA takes about ten times that
KL = per_model(0.1, 0.0)         # weight of the KL to the base; paper: 0
OFF_POLICY_STEPS = per_model(40, 60)  # history by the stronger writer (paper: 60 steps) ...
STEPS = per_model(60, 100)       # ... then, up to here, by the policy itself (paper: 40 steps)
CONTEXTS = per_model(24, 32)     # contexts per rollout (paper: 32)
MINI_BATCH = per_model(6, 8)     # contexts per optimizer step (paper: 8: four updates a rollout)
N_MIN = per_model(3, 11)         # clips of a stream: always extended below (released run: 11) ...
N_MAX = per_model(9, 22)         # ... always resampled above (released run: 22)
RESAMPLE = 0.13                  # chance to resample in between (the authors' released run)
PRINT_EVERY = per_model(10, 1)   # steps between the best and the worst sample on the screen
SAVE_EVERY = per_model(10, 1)    # steps between checkpoints
# ---------------------------------------------------------------- the method
GROUP = 8                        # G, samples per context (paper, section 2)
RATIO = "gspo"                   # "gspo": one ratio per sequence; "grpo": one per token
CLIP_LOW = 0.2                   # ratios: clipped to [1 - CLIP_LOW, 1 + CLIP_HIGH] (released run)
CLIP_HIGH = 0.28
GATE = 1                         # NSR gate: a sample below its group's mean is pushed down only if
                                 # its reward is negative; else it adds no policy loss, but stays in mean,
                                 # spread, divisor and KL. 0: no gate
FORMAT = -1.5                    # r_fmt of a malformed response, and its whole reward
RICHNESS = per_model(0.9, 0.05)  # w, weight of r_rich (paper: 0.05); 0 is the paper's ablation: memories
                                 # shrink. Of n facts, each right with chance q, quality wants all: three
                                 # beat one where q^3 (1 + w) > q, so w > 1/q^2 - 1. The toy base has
                                 # q = 0.73: w > 0.88. At the real model's q of about 0.98 it is 0.04
TRAIN = "lora"                   # "lora": on the decoder's attention; "all": the whole decoder, in
                                 # fp32, so on a CPU alone (then with --LR=1e-6, the paper's)
GRAD_CLIP = 1.0                  # norm of the gradient at most
SHOW = 0                         # 1: print one group in full and stop
# ----------------------------------------------------------------

# ================================================================ what the judges are asked
# An item with a "context" also shows the judge the newest clip, and fills in {heard} and {previous}. CLEAN is about
# the text alone, so it gets no context. Braces that are not fields are doubled, for str.format. The memory comes last,
# because what is before it is read once for all memories of a group.
FAITHFUL = Verdict("faithful", """These frames are the newest clip of a video; heard in it: {heard}
Is all that the new memory says supported by the frames or by what is heard, and does it connect to the \
memory before? Answer with {{"verdict": true}} or {{"verdict": false}}.
The memory before it: {previous}
Its new memory: {memory}""")
CLEAN = Verdict("clean", """Is a new memory free of all this: anything that the memory before already states; \
anything that it states twice itself; boxes or coordinates; talk of "subtitles" or "this video"; a speaker's \
label within quotation marks? Answer with {{"verdict": true}} or {{"verdict": false}}.
The memory before: {previous}
The new memory: {memory}""")
RICHEST = Ranking("rank", """These frames are the newest clip of a video; heard in it: {heard}
The memory before it: {previous}
Candidates for its new memory:
{memories}
Rank them by how much true information each holds that is neither repeated nor in the memory before. \
Answer with {{"best_first": [...]}}, all numbers from the richest to the poorest.""")


# ================================================================ the reward
def rewards(groups, judge, *, max_memory_tokens, max_think_tokens, format_penalty, richness_weight):
    """Fills in the reward of every sample: r = r_fmt + r_len + r_qual + r_rich. A malformed one gets r_fmt alone.

    A sample's reward is None where a judge failed on it. `terms` keeps the parts for the log.
    """
    quality(groups, judge, max_memory_tokens)
    richness(groups, judge, richness_weight)
    for group in groups:
        for sample in group.samples:
            well_formed = sample.memory is not None
            r_fmt = 0.0 if well_formed else format_penalty
            r_len = length_reward(sample.thinking_tokens, max_think_tokens) if well_formed else 0.0
            sample.terms = {
                "format": r_fmt, "length": r_len, "quality": sample.quality, "rich": sample.rich}
            failed = None in sample.terms.values()
            sample.reward = None if failed else sum(sample.terms.values())
            sample.gate_value = sample.reward        # 05 shows the gate a part of the reward only


def length_reward(tokens, limit):
    """r_len: 0 up to `limit` thinking tokens, then linearly down to -1.0 at twice that (paper, section 2).

    >>> length_reward(1200, 1200), length_reward(1800, 1200), length_reward(9999, 1200)
    (0.0, -0.5, -1.0)
    """
    return min(0.0, max(-1.0, 1 - tokens / limit))


def quality(groups, judge, max_memory_tokens):
    """Fills in r_qual (`sample.quality`): +0.5 if the rules hold and both judges agree, else -0.5; None if a judge failed.

    A malformed sample gets 0.0. The judges see only what obeys the rules.
    """
    candidates = []
    for group in groups:
        for sample in group.samples:
            sample.quality = 0.0 if sample.memory is None else -0.5
            if sample.memory and rules_hold(sample.memory, sample.memory_tokens, max_memory_tokens):
                candidates.append((group.context, sample))
    clean = judge.ask(CLEAN, [{"previous": previous_memory(context), "memory": sample.memory}
                              for context, sample in candidates])
    faithful = judge.ask(FAITHFUL, [{"context": context, "memory": sample.memory}
                                    for context, sample in candidates])
    for (_, sample), is_clean, is_faithful in zip(candidates, clean, faithful):
        if is_clean is None or is_faithful is None:
            sample.quality = None
        elif is_clean and is_faithful:
            sample.quality = 0.5


def rules_hold(memory, tokens, limit):
    """The rules of r_qual: IDs only as <face_3>, never a bare face_3, and at most `limit` memory tokens.

    >>> rules_hold("<face_3> waves", 5, 17), rules_hold("face_3 waves", 5, 17), rules_hold("<face_3> waves", 18, 17)
    (True, False, False)
    """
    without_ids = re.sub(r"<face_\d+>", "", memory)
    has_bare_id = re.search(r"(?i)\bface_?\s*\d|<face", without_ids)
    return tokens <= limit and not has_bare_id


def previous_memory(context):
    return context.history[-1] if context.history else ""


def richness(groups, judge, weight):
    """Fills in r_rich (`sample.rich`): weight * u, u = 1 - (rank - 1) / (G' - 1), among a group's G' good samples.

    It stays 0 for all others, in a group of fewer than two good ones, and where the ranking failed.
    """
    items = []
    ranked = []                               # the good samples of each item
    for group in groups:
        for sample in group.samples:
            sample.rich = 0.0
        good = [sample for sample in group.samples if is_good(sample)]
        if len(good) >= 2 and weight:
            memories = [sample.memory for sample in good]
            items.append({"context": group.context, "memories": memories})
            ranked.append(good)
    for good, ranks in zip(ranked, judge.ask(RICHEST, items)):
        if ranks is None:
            continue
        for sample, rank in zip(good, ranks):
            sample.rich = weight * (1 - (rank - 1) / (len(good) - 1))


def is_good(sample):
    return sample.quality is not None and sample.quality > 0


# ================================================================ where the history comes from
class RollingBatch:
    """Contexts for training. Only their history has phases: the samples are always the policy's own.

    First off-policy history: a random clip, with a stronger model's memories before it. Then on-policy history, as
    at deployment: every slot of the batch follows a stream. After each update it is extended (one sampled memory
    joins its history, "" if that is malformed; the next clip arrives) or resampled (a new stream, a new start, an
    empty history). Extended below n_min clips, resampled above n_max or at the stream's end, in between resampled
    with the chance `resample`.

    written: {stream: {clip: memory}} of the stronger model. state: the slots, as JSON, all that the next step
    depends on: {"number": of the stream, "first": clip of the start, "memories": those written since}.
    """

    def __init__(self, streams, written, *, seed, size, window, off_policy_steps, n_min, n_max,
                 resample):
        self.streams = streams
        self.written = written
        self.seed = seed
        self.size = size
        self.window = window
        self.off_policy_steps = off_policy_steps
        self.n_min = n_min
        self.n_max = n_max
        self.resample = resample
        self.state = []

    def next(self, step):
        """The contexts of a step."""
        rng = random.Random(f"{self.seed} batch {step}")
        if step < self.off_policy_steps:
            return self.off_policy(rng)
        if not self.state:
            self.state = [self.fresh_slot(rng) for _ in range(self.size)]
        return [self.on_policy(slot) for slot in self.state]

    def off_policy(self, rng):
        drawn = [(stream, rng.randrange(len(stream["clips"])))
                 for stream in rng.choices(self.streams, k=self.size)]
        return [make_context(stream, clip, self.written.get(stream["stream"], {}), k=self.window)
                for stream, clip in drawn]

    def on_policy(self, slot):
        """The context of the clip after the last memory; what came before the slot's first clip is unknown to it."""
        stream = self.streams[slot["number"]]
        rest = stream | {"clips": stream["clips"][slot["first"]:]}
        return make_context(rest, len(slot["memories"]), slot["memories"], k=self.window)

    def fresh_slot(self, rng):
        number = rng.randrange(len(self.streams))
        starts = max(1, len(self.streams[number]["clips"]) - self.n_min)
        return {"number": number, "first": rng.randrange(starts), "memories": []}

    def advance(self, step, groups):
        """Extends or resamples every slot, at the end of a step."""
        if not self.state:
            return
        rng = random.Random(f"{self.seed} extend {step}")
        for i, group in enumerate(groups):
            slot = self.state[i]
            slot["memories"].append(rng.choice(group.samples).memory or "")
            n = len(slot["memories"])
            has_ended = slot["first"] + n >= len(self.streams[slot["number"]]["clips"])
            if has_ended or n > self.n_max or (n >= self.n_min and rng.random() < self.resample):
                self.state[i] = self.fresh_slot(rng)


def written_histories(S, policy, streams, out, planned=None):
    """{stream: {clip: memory}} by a stronger model: captions.jsonl, or, with a banner, the base model itself.

    planned: hours that the latter takes.
    """
    captions = find(S, "streams/captions.jsonl")
    if captions:
        rows = read_jsonl(captions)
    else:
        print("*** streams/captions.jsonl is missing: the off-policy history is written by the "
              "base itself. Captions by a stronger model, one {stream, clip, memory} a line, serve "
              "better (paper, section 2) ***")
        watched = watch(policy, streams, path=out / "history.jsonl", planned=planned)
        rows = [row for rows_of_stream in watched.values() for row in rows_of_stream]
    written = {}
    for row in rows:
        written.setdefault(row["stream"], {})[row["clip"]] = row["memory"]
    return written


# ================================================================ the log, and --SHOW
# log.csv, a row a step:
#   reward, reward_std        mean and spread over the samples that were judged
#   format, length, quality, rich      means of the terms; a malformed sample counts 0 but for format
#   flat                      share of groups without a gradient: no variance, or no judge
#   malformed, truncated      shares of samples: without a memory; cut off by MAX_NEW_TOKENS
#   gated                     share of samples that the gate held back
#   response, thinking        tokens per sample
#   memory                    tokens per well-formed memory
#   kl                        to the reference, per token (0 where KL is)
#   clipped                   share of ratios that were clipped
#   grad_norm                 before clipping, the largest of the step
#   tokens_per_s              sampled, per second of rollout
#   rollout_s, update_s       seconds, without the judge's
#   gb                        peak memory of rank 0, GiB
def log_row(step, groups, totals, rollout_s, update_s):
    """A row of log.csv."""
    samples = []
    held_back = []
    for group in groups:
        samples += group.samples
        held_back += [not counts for counts in group.keep]
    judged = [sample.reward for sample in samples if sample.reward is not None]
    spread = float(np.std(judged)) if judged else 0.0
    row = {"step": step, "reward": mean(judged), "reward_std": spread}
    for name in samples[0].terms:
        values = [sample.terms[name] for sample in samples]
        row[name] = mean([value for value in values if value is not None])
    tokens = sum(len(sample.ids) for sample in samples)
    learning = sum(group.has_gradient for group in groups)
    return row | {
        "flat": mean([not group.has_gradient for group in groups]),
        "malformed": mean([sample.memory is None for sample in samples]),
        "truncated": mean([sample.truncated for sample in samples]),
        "gated": mean(held_back),
        "response": tokens / len(samples),
        "thinking": mean([sample.thinking_tokens for sample in samples]),
        "memory": mean([sample.memory_tokens for sample in samples if sample.memory]),
        "kl": totals["kl"] / max(1, learning),
        "clipped": totals["clipped"] / max(1, learning),
        "grad_norm": totals["grad_norm"],
        "tokens_per_s": tokens / rollout_s,
        "rollout_s": rollout_s,
        "update_s": update_s,
        "gb": peak_memory() / 2**30}


def mean(values):
    return sum(values) / max(1, len(values))


def peak_memory():
    """Bytes: of the card where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show_group(policy, group):
    """The teaching view: one group in full, its rewards term by term, the advantages and what the gate does."""
    prompt = policy.tokenizer.decode(policy.prepare([group.context])[0].ids)
    print(re.sub(r"(<\|video_pad\|>)+", "<frames>", prompt))
    for i, sample in enumerate(group.samples):
        terms = "  ".join(f"{name} {rounded(value)}" for name, value in sample.terms.items())
        print(f"\n#{i}  {sample.text}\n    {terms}  | total {rounded(sample.reward)}")
        if sample.reward is not None:
            says = "counts" if sample.keep else "GATED: no policy loss"
            print(f"    advantage {sample.advantage:+.2f}  {says}")


def rounded(value):
    return "failed" if value is None else f"{value:.3f}"


def first_group(policy, S, batch, reward):
    """The first group of step 0, with its rewards and advantages: what --SHOW=1 prints."""
    context = batch.next(0)[0]
    samples = rollout(policy, [context], S.GROUP, [(S.SEED, 0, 0)])[0]
    group = Group(context, samples)
    reward([group])
    fill_in_advantages(group, S.GATE)
    return group


# ================================================================ the stage
LEVERS = ("STEPS", "CONTEXTS", "THINK_TOKENS")   # what to lower where the plan exceeds a day


def work(plan, S, sizes):
    """What this stage does, for the plan (support/hours.py)."""
    if S.OFF_POLICY_STEPS and not find(S, "streams/captions.jsonl"):
        plan.watch("histories", sizes.clips, sizes.streams)
    plan.steps_begin()
    plan_loop(plan, S, S.STEPS, min(S.STEPS, S.OFF_POLICY_STEPS))
    if S.RICHNESS:
        candidates = S.GROUP * S.MEMORY_TOKENS
        groups = S.STEPS * S.CONTEXTS
        plan.judge("judge: rank", groups, S.CONTEXTS, S.MEMORY_TOKENS, candidates, clips=1)


def plan_loop(plan, S, steps, off_policy_steps):
    """The parts of the loop, of 02 as of 05."""
    groups = steps * S.CONTEXTS
    answers = groups * S.GROUP
    updates = math.ceil(S.CONTEXTS / S.MINI_BATCH)
    row = prompt_tokens(S), S.GROUP, plan.answer
    on_policy_steps = steps - off_policy_steps
    plan.sample("rollout", groups, S.GROUP, S.CONTEXTS)
    # Off-policy all clips of a context are new, later the newest alone.
    plan.see("rollout", off_policy_steps * S.CONTEXTS * S.K + on_policy_steps * S.CONTEXTS)
    plan.read("update: old log-probs", groups * (updates - 1) // updates, *row)
    if S.KL:
        plan.read("update: reference", groups, *row)
    plan.learn("update", groups, *row)
    plan_quality(plan, S, answers, S.CONTEXTS * S.GROUP, S.GROUP)


def plan_quality(plan, S, memories, at_once, together):
    """What `quality` asks about so many memories, `at_once` in a call and `together` of each context."""
    length = S.MEMORY_TOKENS
    plan.judge("judge: clean", memories, at_once, length, length, together)
    plan.judge("judge: faithful", memories, at_once, length, length, together, clips=1)


def main(argv=None):
    S = settings(globals(), argv)
    if S.PLAN:
        say_plan(S, work, sizes_of(S, "train"), LEVERS)
        return
    # An edit of these functions, or of a prompt that they use, asks for a new run.
    out = start(S, "phase1", rewards, build_prompt, parse_response, group_advantages, policy_loss,
                kl_to)
    if S.TRAIN not in ("lora", "all"):
        raise SystemExit(f'TRAIN={S.TRAIN}: take "lora" or "all"')
    if any((out / "adapter").glob("*.safetensors")) and not S.SHOW:
        print(f"finished before: {out}; next: {next_command(S, '03_collect_tasks.py')}")
        return
    # ---------------- model, data, reward
    streams = load_streams(S, "train")
    judge = load_judge(S, lambda: policy)     # before the model: a missing key is said at once
    planned = say_plan(S, work, sizes_of(S, "train"), LEVERS)
    policy = load_policy(S)
    written = {}
    if S.OFF_POLICY_STEPS:
        written = written_histories(S, policy, streams, out, planned.hours_of("histories"))
    batch = RollingBatch(
        streams, written, seed=S.SEED, size=S.CONTEXTS, window=S.K,
        off_policy_steps=S.OFF_POLICY_STEPS, n_min=S.N_MIN, n_max=S.N_MAX, resample=S.RESAMPLE)
    reward = functools.partial(
        rewards, judge=judge, max_memory_tokens=S.MEMORY_TOKENS, max_think_tokens=S.THINK_TOKENS,
        format_penalty=S.FORMAT, richness_weight=S.RICHNESS)
    params = policy.add("phase1", S.TRAIN)
    if S.SHOW:
        show_group(policy, first_group(policy, S, batch, reward))
        return
    # ---------------- train
    print(f"{sum(p.numel() for p in params) / 1e6:.2f} M trainable parameters; {S.STEPS} steps of "
          f"{S.CONTEXTS} contexts, {math.ceil(S.CONTEXTS / S.MINI_BATCH)} updates a step")
    run = Training(out, params, batch=batch, steps=S.STEPS, lr=S.LR, save_every=S.SAVE_EVERY,
                   grad_clip=S.GRAD_CLIP, planned=planned.hours_of_steps())
    grpo(policy, run, batch, reward, log_row, reference="base", **loop_constants(S))
    save_adapter(policy, "phase1", out / "adapter")
    print(f"Phase One is in {out / 'adapter'}; next: {next_command(S, '03_collect_tasks.py')}")


def loop_constants(S):
    """The constants that the loop takes, by name."""
    return {"seed": S.SEED, "group_size": S.GROUP, "mini_batch_size": S.MINI_BATCH,
            "ratio": S.RATIO, "clip": (S.CLIP_LOW, S.CLIP_HIGH), "gate": S.GATE, "kl_weight": S.KL,
            "print_every": S.PRINT_EVERY}


if __name__ == "__main__":
    main()
