"""Phase Two: what to memorize. The Phase One policy stays frozen; for each environment a small adapter learns
from its recent questions which facts to write (paper, section 3). No answers are used, and by the paper's
path nothing is sampled.

Reads as 02 with two differences: what is trained is `ADAPTER` ("steer": one vector of the hidden size added
after decoder layer `LAYER`), and what it is trained on is `ALGORITHM`: "dpo" (the paper), on the cached pairs
of 04, or "grpo" (ours), on-policy through the very loop of 02, where the reward model of 04 takes the place
of the richness term.

Differs from the paper: the on-policy path; its reward is r_fmt + r_len + r_qual + RELEVANCE * (R - mean R of
the group), and its gate looks at the first three alone, since R has no natural zero.
`python 05_phase2_train.py --SHOW=1` prints one pair (or group) in full and stops.

Run: python 05_phase2_train.py [--NAME=value ...]
In:  streams/ (01), phase1/adapter (02), tasks/recent.json, cache.jsonl (03), reward/pairs.jsonl, model (04)
Out: phase2/ALGORITHM-ADAPTER[-NAME]/ENVIRONMENT/adapter, log.csv, checkpoint.pt
"""
import importlib
import random
import re
import time

from common import (F, Training, both, grpo, load_policy, load_streams, logprobs, make_context, need, read_json,
                    read_jsonl, settings, slug, start, torch)
from judges import load_judge
from loading import RANK, WORLD, command, gather, load_adapter, save_adapter

# ---------------------------------------------------------------- embedded world | Qwen3-VL-30B-A3B
LR = both(1e-2, 1e-3)            # of the vector (paper: 1e-3) ...
LORA_LR = both(5e-4, 5e-5)       # ... of a LoRA instead
ALL_LR = both(5e-5, 5e-6)        # ... of all parameters
LAYER = both(2, 22)              # decoder layer after which the vector is added, from 0 (paper: 22 of 48)
BETA = both(0.5, 0.1)            # of DPO (paper: 0.1)
DPO_STEPS = 40                   # dpo: updates (paper: 10 to 40)
PAIRS = both(16, 64)             # pairs per update (paper: 64)
CONTEXTS = both(16, 32)          # grpo: contexts per rollout
MINI_BATCH = both(4, 8)          # grpo: contexts per optimizer step
GRPO_STEPS = both(10, 40)        # grpo: rollouts
KL = 0.0                         # grpo: weight of the KL to the Phase One policy
N_MIN = both(3, 11)              # grpo: clips of a stream, as in 02
N_MAX = both(9, 22)
PRINT_EVERY = both(10, 1)        # grpo: steps between log lines
SAVE_EVERY = both(20, 1)         # steps between checkpoints
# ---------------------------------------------------------------- the method
ENVIRONMENT = ""                 # one environment by name; "": all of them, one adapter each
ALGORITHM = "dpo"                # "dpo": on cached pairs (paper); "grpo": on-policy against the reward model
ADAPTER = "steer"                # "steer": one vector; "lora": on attention;
                                 # "all": all parameters of the language model, on a CPU alone
NAME = ""                        # suffix of the output folder, to keep variants of one run side by side
SCALE_TO_NORM = 0.0              # > 0: the trained vector is scaled to this norm. The paper's short cut:
                                 # --NAME=short --DPO_STEPS=10 and 0.8 x the `norm` in the last row of a
                                 # 40-step log.csv (0.3 of 0.37 at d = 2048)
RECENT = 5                       # questions that define the environment (paper: 5 to 10)
RELEVANCE = 0.5                  # grpo: weight of R (in units of its spread within a context)
                                 # beside the quality's +-0.5
GROUP = 8                        # grpo: G, samples per context
RATIO = "gspo"                   # grpo: as in 02
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
GATE = 1
RESAMPLE = 0.13
OFF_POLICY_STEPS = 0             # grpo: the history is the policy's own from the start
FORMAT, RICHNESS = -1.5, 0.0     # the reward model takes the place of richness
GRAD_CLIP = 1.0
SHOW = 0                         # 1: print one pair or group in full and stop
# ----------------------------------------------------------------
# log.csv of dpo, a row a step: loss; accuracy (share of pairs whose winner gained more than its loser over
# the reference); margin (mean of beta times that difference); norm (of the vector, or of all trained
# values); grad_norm; seconds.
# Of grpo: 02's columns, kl to the Phase One policy, with relevance (centred, so 0 on average) and R (the
# reward model's value in units of its spread, not in the sum).


def dpo_loss(winner, loser, ref_winner, ref_loser, beta):
    """-log sigmoid(beta * ((log pi - log ref)(winner) - (log pi - log ref)(loser))),
    sums over the whole response.

    All arguments () tensors, except beta. Returns (loss, margin).

    >>> loss, margin = dpo_loss(*torch.tensor([-3.0, -5.0, -4.0, -4.0]), beta=0.5)
    >>> round(margin.item(), 3), round(loss.item(), 4)
    (1.0, 0.3133)
    """
    margin = beta * ((winner - ref_winner) - (loser - ref_loser))                        # ()
    return -F.logsigmoid(margin), margin


def train_dpo(policy, S, out, params, pairs):
    """Pairs (context, winner ids, loser ids) -> trained params. Reference log-probs are cached
    once, by the Phase One policy."""
    summed = lambda context, *answers: [x.sum() for x in logprobs(policy, context, answers)]     # () each
    with policy.using("phase1"), torch.no_grad():
        reference = gather([[x.item() for x in summed(*pair)] for pair in pairs[RANK::WORLD]])
    policy.train_only(params)
    run = Training(S, out, params, desc=f"dpo {out.name}")
    for step in run:
        # ---- batch
        began, rng = time.time(), random.Random(f"{S.SEED} dpo {step}")
        batch = rng.sample(range(len(pairs)), min(S.PAIRS, len(pairs)))
        # ---- update
        losses, margins = [], []
        for i in batch[RANK::WORLD]:                                       # of several GPUs, this one's
            loss, margin = dpo_loss(*summed(*pairs[i]), *reference[i], S.BETA)
            (loss / len(batch)).backward()
            losses, margins = losses + [loss.item()], margins + [margin.item()]
        grad_norm, losses, margins = run.update(), gather(losses), gather(margins)
        # ---- log and save
        norm = sum(p.detach().float().pow(2).sum() for p in params).sqrt().item()
        run.log(dict(step=step, loss=sum(losses) / len(batch),
                     accuracy=sum(m > 0 for m in margins) / len(batch), margin=sum(margins) / len(batch),
                     norm=norm, grad_norm=grad_norm, seconds=time.time() - began), "loss", "norm")
    last = {k: float(v) for k, v in run.rows[-1].items()}
    print(f"  {out.name:24} {len(pairs)} pairs  loss {last['loss']:.3f}  accuracy {last['accuracy']:.2f}  "
          f"norm {last['norm']:.3f}")


def rewards(S, judge, model, questions, contexts, samples):
    """As 02's, with RELEVANCE * (R - mean R of the group) in the place of richness, and
    a gate on the rest alone."""
    phase1, reward_model = (importlib.import_module(n) for n in ("02_phase1_train", "04_train_reward"))
    scores = phase1.rewards(S, judge, contexts, samples)
    for context, group, score in zip(contexts, samples, scores):
        valid = [i for i, s in enumerate(group) if s.memory and score["total"][i] is not None]
        R = reward_model.score(model, [
            {"questions": questions, "history": context.history, "memory": group[i].memory} for i in valid])
        score["gate"], score["terms"]["relevance"] = list(score["total"]), [0.0] * len(group)
        score["terms"]["R"] = [None] * len(group)         # as it is, to be seen rising; it is not in the sum
        for i, r in zip(valid, R):
            score["terms"]["R"][i] = r
            score["terms"]["relevance"][i] = S.RELEVANCE * (r - sum(R) / len(R))
            score["total"][i] += score["terms"]["relevance"][i]
    return scores


def cached_pairs(S, environment, streams):
    """(context, winner ids, loser ids) of 04's pairs of one environment, on the contexts of the cache."""
    cache = {(r["stream"], r["clip"]): r for r in read_jsonl(need(S, "tasks/cache.jsonl"))}
    rows = [r for r in read_jsonl(need(S, "reward/pairs.jsonl")) if r["environment"] == environment]
    contexts = []
    for r in rows:
        c, t = cache[r["stream"], r["clip"]], r["clip"]
        contexts.append(make_context(streams[r["stream"]], t,
                                     dict(zip(range(t - len(c["history"]), t), c["history"])), k=S.K))
    samples = [cache[r["stream"], r["clip"]]["samples"] for r in rows]
    return [(c, s[r["winner"]]["ids"], s[r["loser"]]["ids"]) for c, s, r in zip(contexts, samples, rows)]


def seen(S, streams, environment):
    """The streams up to their last context of which the environment may learn."""
    rows, last = importlib.import_module("03_collect_tasks").cached(S, streams)[environment], {}
    for row in rows:
        last[row["stream"]] = max(row["clip"], last.get(row["stream"], 0))
    return [s | {"clips": s["clips"][:last[s["stream"]] + 1]} for s in streams if s["stream"] in last]


def show_pair(policy, pair, environment, beta):
    """The teaching view of DPO: one pair in full, and the loss that it starts from."""
    context, *answers = pair
    prompt = policy.tokenizer.decode(policy.prepare([context])[0].ids)
    print(f"environment {environment}\n" + re.sub(r"(<\|video_pad\|>)+", "<frames>", prompt))
    with torch.no_grad():
        summed = [x.sum() for x in logprobs(policy, context, answers)]
    for name, ids, logp in zip(("winner", "loser"), answers, summed):
        print(f"\n{name} ({len(ids)} tokens, log-prob {logp:.2f}): {policy.tokenizer.decode(ids)}")
    loss, margin = dpo_loss(*summed, *summed, beta)
    print(f"\nmargin {margin:.3f} (policy = reference at the start), loss {loss:.4f}")


def train_environment(policy, S, out, environment, questions, streams, judge, model):
    torch.manual_seed(S.SEED)         # so that an adapter doesn't depend on which ones were trained before it
    policy.drop("phase2")
    params = policy.add("phase2", S.ADAPTER)
    if S.ALGORITHM == "dpo":
        pairs = cached_pairs(S, environment, {s["stream"]: s for s in streams})
        if not pairs:
            return print(f"  {environment:24} no pair: its recent questions prefer none of the cached "
                         "memories; no adapter")
        if S.SHOW:
            return show_pair(policy, pairs[0], environment, S.BETA)
        train_dpo(policy, S, out, params, pairs)
    else:
        phase1 = importlib.import_module("02_phase1_train")
        batch = phase1.RollingBatch(S, seen(S, streams, environment), {})
        score = lambda contexts, samples: rewards(S, judge, model, questions, contexts, samples)
        shown = grpo(policy, S, out, params, batch, score, phase1.log_row, reference="phase1")
        if shown:
            return phase1.show_group(policy, *shown)
    if S.SHOW:
        return
    if S.SCALE_TO_NORM and S.ADAPTER == "steer":
        with torch.no_grad():
            params[0].mul_(S.SCALE_TO_NORM / params[0].norm())
    save_adapter(policy, "phase2", out / "adapter")


def main(argv=None):
    S = settings(globals(), argv)
    rates = {"steer": S.LR, "lora": S.LORA_LR, "all": S.ALL_LR}
    if S.ALGORITHM not in ("dpo", "grpo") or S.ADAPTER not in rates:
        raise SystemExit(f"ALGORITHM={S.ALGORITHM}, ADAPTER={S.ADAPTER}: take dpo or grpo, and "
                         f"{', '.join(rates)}")
    out = start(S, f"phase2/{S.ALGORITHM}-{S.ADAPTER}" + (f"-{S.NAME}" if S.NAME else ""))
    S.LR, S.STEPS = rates[S.ADAPTER], S.DPO_STEPS if S.ALGORITHM == "dpo" else S.GRPO_STEPS
    print(f"learning rate of {S.ADAPTER}: {S.LR:g}")
    recent, streams = read_json(need(S, "tasks/recent.json")), load_streams(S, "deploy")
    judge = load_judge(S, lambda: policy) if S.ALGORITHM == "grpo" else None           # pairs are judged
    if S.ENVIRONMENT and S.ENVIRONMENT not in recent:
        raise SystemExit(f"ENVIRONMENT={S.ENVIRONMENT}: tasks/recent.json holds {', '.join(recent)}")
    todo = [e for e in recent if e == (S.ENVIRONMENT or e)
            and (S.SHOW or not any((out / slug(e) / "adapter").glob("*.safetensors")))]
    if not todo:
        return print(f"finished before: {out}; next: {command(S, '06_eval.py')}")
    adapter, _ = (need(S, "phase1/adapter"),
                  need(S, "reward/pairs.jsonl" if S.ALGORITHM == "dpo" else "reward/model"))
    policy = load_policy(S)
    load_adapter(policy, "phase1", adapter)
    model = (importlib.import_module("04_train_reward").load_reward_model(S, policy)
             if S.ALGORITHM == "grpo" else None)
    contexts = [make_context(s, len(s["clips"]) // 2, {}, k=S.K) for s in streams]
    groups = len(todo) * S.STEPS * (S.PAIRS if S.ALGORITHM == "dpo" else S.CONTEXTS)
    importlib.import_module("03_collect_tasks").announce(
        S, policy, contexts, groups, 0 if S.ALGORITHM == "dpo" else 2 * S.GROUP,
        3 if S.ALGORITHM == "dpo" else 5 if S.KL else 4, S.ALGORITHM != "dpo")
    for environment in todo:
        (out / slug(environment)).mkdir(exist_ok=True)
        questions = [t["question"] for t in recent[environment][:S.RECENT]]
        train_environment(policy, S, out / slug(environment), environment, questions, streams, judge, model)
        if S.SHOW:
            return
    made = sum(any((out / slug(e) / "adapter").glob("*.safetensors")) for e in recent)
    print(f"{made} of {len(recent)} adapters are in {out}; next: {command(S, '06_eval.py')}")


if __name__ == "__main__":
    main()
