"""Phase Two: what to memorize. The Phase One policy stays frozen; for each environment (a kind of question) a small
adapter learns from its recent questions which facts to write (paper, section 3). No answers are used.

Reads as 02 with two differences. What is trained is `ADAPTER`: "steer" is one vector of the hidden size, added after
decoder layer `LAYER`. What it is trained on is `ALGORITHM`: "dpo" (the paper), on the cached pairs of 04, so nothing
is sampled; or "grpo" (ours), on-policy through the very loop of 02, where the reward model R of 04 takes the place of
the richness term: r = r_fmt + r_len + r_qual + RELEVANCE * (R - mean R of the group). Its gate looks at the first
three alone, since R has no natural zero.

Run again after 04, it trains anew for the environments whose recent questions have changed. An adapter serves until
the next one of its environment is written.

Differs from the paper: the on-policy path.

Run: python 05_phase2_train.py [--NAME=value ...]     (--SHOW=1 prints the first pair or group in full and stops)
     (toy world: 75 s by DPO on two cores)
In:  streams/ (01), phase1/adapter (02), tasks/recent.json, cache.jsonl (03), reward/pairs.jsonl, contexts.jsonl,
     model (04)
Out: phase2/ALGORITHM-ADAPTER[-NAME]/ENVIRONMENT/adapter, log.csv, checkpoint.pt, questions.json
"""
import functools
import random
import re
import time
from dataclasses import dataclass

from common import (Context, F, build_prompt, group_advantages, grpo, kl_to, load_judge,
                    load_policy,
                    logprobs_of_row, packed_rows, parse_response, per_model, policy_loss, settings,
                    stage, torch)
from support import hours
from support.checkpoint import Training, begin_anew_unless
from support.hours import Sizes, say_plan, sizes_of
from support.plan import prompt_tokens
from support.ranks import gather, my_share, once, said_once
from support.runs import (fingerprint, have_frames, hold, load_streams, need, next_command, read_json, read_jsonl,
                          say_what_differs, say_what_is_new, slug, start, write_json)
from support.weights import load_adapter, save_adapter

phase1 = stage("02_phase1_train")
collect = stage("03_collect_tasks")
reward_stage = stage("04_train_reward")

# ---------------------------------------------------------------- per_model(toy world, Qwen3-VL-30B-A3B)
LR = per_model(1e-2, 1e-3)       # of the vector (paper: 1e-3) ...
LORA_LR = per_model(5e-4, 5e-5)  # ... of a LoRA instead
ALL_LR = per_model(5e-5, 5e-6)   # ... of the whole decoder
LAYER = per_model(2, 22)         # the vector is added after this layer, from 0 (paper: 22 of 48)
BETA = per_model(0.5, 0.1)       # of DPO (paper: 0.1)
DPO_STEPS = 40                   # dpo: updates (paper: 10 to 40)
PAIRS = per_model(16, 64)        # dpo: pairs per update (paper: 64)
CONTEXTS = per_model(16, 32)     # grpo: contexts per rollout
MINI_BATCH = per_model(4, 8)     # grpo: contexts per optimizer step
GRPO_STEPS = per_model(10, 40)   # grpo: rollouts
KL = 0.0                         # grpo: weight of the KL to the Phase One policy
SAVE_EVERY = per_model(20, 1)    # steps between checkpoints
# ---------------------------------------------------------------- the method
ENVIRONMENT = ""                 # one environment by name; "": all of them, one adapter each
ALGORITHM = "dpo"                # "dpo": on cached pairs (paper); "grpo": on-policy, by R of 04
ADAPTER = "steer"                # "steer": one vector; "lora": on attention;
                                 # "all": the whole decoder, on a CPU alone
NAME = ""                        # suffix of the output folder: variants of a run side by side
SCALE_TO_NORM = 0.0              # > 0: the trained vector is scaled to this norm. The paper's short
                                 # cut: --NAME=short --DPO_STEPS=10 and 0.8 x the `norm` in the last row
                                 # of a 40-step log.csv (0.3 of 0.37 at d = 2048)
RECENT = 5                       # questions that define the environment (paper: 5 to 10)
RELEVANCE = 0.5                  # grpo: weight of R, in units of its spread within a context,
                                 # beside quality's +-0.5
SHOW = 0                         # 1: print one pair or group in full and stop
# ---------------------------------------------------------------- grpo: as in 02
GROUP = phase1.GROUP
RATIO = phase1.RATIO
CLIP_LOW = phase1.CLIP_LOW
CLIP_HIGH = phase1.CLIP_HIGH
GATE = phase1.GATE
FORMAT = phase1.FORMAT
N_MIN = phase1.N_MIN
N_MAX = phase1.N_MAX
RESAMPLE = phase1.RESAMPLE
GRAD_CLIP = phase1.GRAD_CLIP     # dpo too
PRINT_EVERY = phase1.PRINT_EVERY
# ----------------------------------------------------------------


# ================================================================ DPO, on cached pairs
@dataclass
class TokenPair:
    """A context with the memory that serves the questions better, and one that serves them less: token ids."""
    context: Context
    winner: list
    loser: list
    reference: list | None = None        # log-probs of both, summed, by the Phase One policy

    @property
    def ids(self):
        return [self.winner, self.loser]

    @property
    def content(self):
        """What is learned from it, wherever the files of the run are."""
        context = self.context
        return [context.stream, context.clip, context.history, self.winner, self.loser]


def dpo_loss(winner, loser, ref_winner, ref_loser, beta):
    """-log sigmoid(beta * ((log pi - log ref)(winner) - (log pi - log ref)(loser))), summed over the whole response
    (paper, section 3). All arguments () tensors, except beta. Returns (loss, margin).

    >>> loss, margin = dpo_loss(*torch.tensor([-3.0, -5.0, -4.0, -4.0]), beta=0.5)
    >>> round(margin.item(), 3), round(loss.item(), 4)
    (1.0, 0.3133)
    """
    margin = beta * ((winner - ref_winner) - (loser - ref_loser))                     # ()
    return -F.logsigmoid(margin), margin


def sequence_logps(policy, pairs):
    """Log-probs of each pair's winner and loser, summed over its tokens: lists of two () tensors.

    All pairs share one packed row.
    """
    sums = []
    for winner, loser in logprobs_of_row(policy, pairs):                              # (T_i,) each
        sums.append([winner.sum(), loser.sum()])
    return sums


def train_dpo(policy, run, pairs, *, seed, batch_size, beta):
    """DPO against the Phase One policy, whose log-probs are computed once.

    log.csv, a row a step: loss; accuracy (share of pairs whose winner gained more than its loser over the
    reference); margin (mean of beta times that difference); norm (of the vector, or of all trained values);
    grad_norm (before clipping); seconds.
    """
    reference = []
    with policy.using("phase1"), torch.no_grad():
        for row in packed_rows(policy, my_share(pairs)):
            for winner, loser in sequence_logps(policy, row):
                reference.append([winner.item(), loser.item()])
    for pair, logps in zip(pairs, gather(reference)):
        pair.reference = logps
    policy.train_only(run.params)
    for step in run:
        # ---------------- batch
        began = time.time()
        rng = random.Random(f"{seed} dpo {step}")
        batch = rng.sample(pairs, min(batch_size, len(pairs)))
        # ---------------- update
        losses = []
        margins = []
        for row in packed_rows(policy, my_share(batch)):
            row_loss = 0.0
            for pair, logps in zip(row, sequence_logps(policy, row)):
                loss, margin = dpo_loss(*logps, *pair.reference, beta)
                row_loss = row_loss + loss / len(batch)
                losses.append(loss.item())
                margins.append(margin.item())
            row_loss.backward()
        grad_norm = run.optimizer_step()
        losses = gather(losses)
        margins = gather(margins)
        # ---------------- log and save
        run.log({
            "step": step,
            "loss": sum(losses) / len(batch),
            "accuracy": sum(margin > 0 for margin in margins) / len(batch),
            "margin": sum(margins) / len(batch),
            "norm": norm_of(run.params),
            "grad_norm": grad_norm,
            "seconds": time.time() - began}, "loss", "norm")


def norm_of(params):
    return sum(p.detach().float().pow(2).sum() for p in params).sqrt().item()


def cached_pairs(S, environment, streams):
    """04's pairs of one environment, on the contexts that it has kept of the cache. Those of deleted videos are left
    out."""
    file = need(S, "reward/pairs.jsonl")
    kept = read_jsonl(file.with_name("contexts.jsonl"))
    rows = {(row["stream"], row["clip"]): row for row in kept}
    streams = {stream["stream"]: stream for stream in streams}
    pairs = []
    without_frames = 0
    for chosen in read_jsonl(file):
        if chosen["environment"] != environment:
            continue
        row = rows[chosen["stream"], chosen["clip"]]
        context = collect.cached_context(streams[row["stream"]], row, S.K)
        if not have_frames(context.clips):
            without_frames += 1
            continue
        samples = row["samples"]
        winner = samples[chosen["winner"]]
        loser = samples[chosen["loser"]]
        pairs.append(TokenPair(context, winner["ids"], loser["ids"]))
    if without_frames:
        print(f"  {environment:24} {without_frames} pairs are left out, as their videos are gone")
    return pairs


def show_pair(policy, pair, environment, beta):
    """The teaching view of DPO: one pair in full, and the loss that it starts from."""
    prompt = policy.tokenizer.decode(policy.prepare([pair.context])[0].ids)
    print(f"environment {environment}\n" + re.sub(r"(<\|video_pad\|>)+", "<frames>", prompt))
    with torch.no_grad():
        [(winner, loser)] = sequence_logps(policy, [pair])
    for name, ids, logp in (("winner", pair.winner, winner), ("loser", pair.loser, loser)):
        print(f"\n{name} ({len(ids)} tokens, log-prob {logp:.2f}): {policy.tokenizer.decode(ids)}")
    loss, margin = dpo_loss(winner, loser, winner, loser, beta)
    print(f"\nmargin {margin:.3f} (policy = reference at the start), loss {loss:.4f}")


# ================================================================ on-policy: 02's loop with another reward
def rewards(groups, judge, reward_model, questions, *, relevance_weight, **constants_of_02):
    """02's reward without richness, and relevance_weight * (R - mean R of the group) added to it.

    The gate keeps looking at the rest. log.csv has 02's columns, and two more: relevance (centred, so 0 on average)
    and R (the reward model's value in units of its spread, to be seen rising; it is not in the sum).
    """
    phase1.rewards(groups, judge, richness_weight=0.0, **constants_of_02)
    for group in groups:
        for sample in group.samples:
            sample.terms |= {"relevance": 0.0, "R": None}
        comparable = [sample for sample in group.judged if sample.memory]
        memories = [sample.memory for sample in comparable]
        values = reward_model.score(questions, group.context.history, memories)
        for sample, R in zip(comparable, values):
            sample.terms["R"] = R
            sample.terms["relevance"] = relevance_weight * (R - sum(values) / len(values))
            sample.reward += sample.terms["relevance"]


def seen_streams(S, streams, environment):
    """The streams up to their last cached context from which the environment may learn."""
    last = {}
    for row in reward_stage.read_cache(S, streams, [environment]):
        if environment in row["environments"]:
            last[row["stream"]] = max(row["clip"], last.get(row["stream"], 0))
    return [stream | {"clips": stream["clips"][:last[stream["stream"]] + 1]}
            for stream in streams if stream["stream"] in last]


# ================================================================ the stage
def main(argv=None):
    S = settings(globals(), argv)
    rates = {"steer": S.LR, "lora": S.LORA_LR, "all": S.ALL_LR}
    steps = {"dpo": S.DPO_STEPS, "grpo": S.GRPO_STEPS}
    if S.ALGORITHM not in steps or S.ADAPTER not in rates:
        raise SystemExit(f"ALGORITHM={S.ALGORITHM}, ADAPTER={S.ADAPTER}: take "
                         f"{' or '.join(steps)}, and {', '.join(rates)}")
    if S.PLAN:
        sizes = sizes_of(S, "deploy")
        sizes.contexts = min(sizes.contexts, collect.CACHE_CONTEXTS.full)
        if S.ENVIRONMENT:
            sizes.environments = 1
        say_plan(S, work, sizes, LEVERS[S.ALGORITHM])
        return
    if not re.fullmatch(r"[\w+-]{0,60}", S.NAME):
        raise SystemExit(f"NAME={S.NAME}: take at most 60 letters, digits and -, + or _, for the "
                         "name of a folder")
    variant = f"{S.ALGORITHM}-{S.ADAPTER}" + (f"-{S.NAME}" if S.NAME else "")
    # Several processes may train environments of their own side by side.
    out = start(S, f"phase2/{variant}", *functions_that_matter(S), alone=False)
    # ---------------- what is to be done
    recent = read_json(need(S, "tasks/recent.json"))
    streams = load_streams(S, "deploy")
    collect.check_recent(S, streams)
    if S.ENVIRONMENT and S.ENVIRONMENT not in recent:
        raise SystemExit(f"ENVIRONMENT={S.ENVIRONMENT}: recent.json holds {', '.join(recent)}")
    environments = [S.ENVIRONMENT] if S.ENVIRONMENT else list(recent)
    questions = {}
    for environment in environments:
        questions[environment] = [task["question"] for task in recent[environment][:S.RECENT]]
    if not S.SHOW:
        environments = not_finished(out, questions)
    if not environments:
        print(f"finished before: {out}; next: {next_command(S, '06_eval.py')}")
        return
    # ---------------- model, judge, reward model
    phase1_adapter = need(S, "phase1/adapter")
    judged = need(S, "reward/pairs.jsonl" if S.ALGORITHM == "dpo" else "reward/model").parent
    check_judged(S, judged, environments, recent)
    say_what_differs(phase1_adapter.parent, "02_phase1_train.py", build_prompt, phase1.rewards)
    is_judged = S.ALGORITHM == "dpo"                          # its pairs are, by 04
    judge = None if is_judged else load_judge(S, lambda: policy)
    cached = len(read_jsonl(need(S, "tasks/cache.jsonl")))
    clips = sum(len(stream["clips"]) for stream in streams)
    sizes = Sizes("those of the cache", len(streams), clips, cached, len(environments))
    planned = say_plan(S, work, sizes, LEVERS[S.ALGORITHM])
    policy = load_policy(S)
    load_adapter(policy, "phase1", phase1_adapter)
    reward_model = None
    if S.ALGORITHM == "grpo":
        reward_model = reward_stage.load_reward_model(S, policy)
    print(f"learning rate of {S.ADAPTER}: {rates[S.ADAPTER]:g}")
    # ---------------- train
    for environment in environments:
        folder = out / slug(environment)
        folder.mkdir(exist_ok=True)
        if not S.SHOW:
            hold(folder)
        # So that an adapter doesn't depend on which ones were trained before it.
        torch.manual_seed(S.SEED)
        policy.drop("phase2")
        params = policy.add("phase2", S.ADAPTER)
        start_training = functools.partial(
            begin_or_go_on, folder, questions[environment], params, steps=steps[S.ALGORITHM], lr=rates[S.ADAPTER],
            save_every=S.SAVE_EVERY, grad_clip=S.GRAD_CLIP,
            planned=planned.hours_of_steps(len(environments)),
            description=f"{S.ALGORITHM} {folder.name}")
        if S.ALGORITHM == "dpo":
            trained = learn_from_pairs(policy, S, environment, streams, start_training)
        else:
            trained = learn_on_policy(
                policy, S, environment, questions[environment], streams, judge, reward_model,
                start_training)
        if S.SHOW:
            return
        if trained:
            scale(params, S)
            save_adapter(policy, "phase2", folder / "adapter")
            write_json(folder / ADAPTED_TO, questions[environment])
    made = sum(has_adapter(out / slug(name)) for name in recent)
    print(f"{made} of {len(recent)} adapters are in {out}; next: {next_command(S, '06_eval.py')}")


def functions_that_matter(S):
    """Those whose edit asks for a new run."""
    if S.ALGORITHM == "dpo":
        return build_prompt, dpo_loss
    return (build_prompt, parse_response, rewards, phase1.rewards, reward_stage.RewardModel.score,
            group_advantages, policy_loss, kl_to)


def has_adapter(folder):
    return any((folder / "adapter").glob("*.safetensors"))


# Written after an adapter's tensors: the questions that it was trained for.
ADAPTED_TO = "adapter/questions.json"


def not_finished(out, questions):
    """The environments of {environment: its recent questions} that lack an adapter for these. Says which are new."""
    # A neighbour may finish one while the ranks look, so rank 0 looks for all.
    made, same = once(lambda: adapters_made(out, questions))
    to_do = [name for name in questions if name not in same]
    if made and to_do:
        new = [name for name in to_do if name not in made]
        changed = [name for name in to_do if name in made]
        say_what_is_new({"new": new, "changed": changed, "as before": same})
    return to_do


def adapters_made(out, questions):
    """(environments with an adapter, those with one for these questions)"""
    made = [name for name in questions if has_adapter(out / slug(name))]
    same = []
    for name in made:
        if read_if_there(out / slug(name) / ADAPTED_TO) == questions[name]:
            same.append(name)
    return made, same


def check_judged(S, folder, environments, recent):
    """SystemExit where 04 has judged by other questions than these environments' recent ones. folder: of 04."""
    if S.ALGORITHM == "dpo":
        judged = read_if_there(folder / "pairs_of.json")
    else:
        judged = read_if_there(folder / "report.json").get("asked", {})
    count = read_if_there(folder / "settings.json").get("RECENT")
    behind = []
    for environment in environments:
        asked = [task["question"] for task in recent[environment][:count]]
        if judged.get(environment) != asked:
            behind.append(environment)
    if behind:
        raise SystemExit(said_once(
            f"04 has not finished with the recent questions of {', '.join(behind)}. Run it first: "
            f"{next_command(S, '04_train_reward.py')}"))


def read_if_there(file):
    return read_json(file) if file.exists() else {}


def begin_or_go_on(folder, questions, params, lesson, **options):
    """The Training in a folder. What was begun there for other questions, or on something else, is forgotten.

    lesson: what is learned from.
    """
    begin_anew_unless(folder, {"questions": questions, "lesson": fingerprint(*lesson)})
    return Training(folder, params, **options)


# What to lower where the plan exceeds a day.
LEVERS = {"dpo": ("environments", "DPO_STEPS", "PAIRS"),
          "grpo": ("environments", "GRPO_STEPS", "CONTEXTS", "THINK_TOKENS")}


def work(plan, S, sizes):
    """What this stage does, for the plan (support/hours.py)."""
    steps = sizes.environments * (S.DPO_STEPS if S.ALGORITHM == "dpo" else S.GRPO_STEPS)
    if S.ALGORITHM == "grpo":
        plan.steps_begin()
        phase1.plan_loop(plan, S, steps, 0)
        return
    pairs = round(hours.PAIRED * sizes.contexts)
    row = prompt_tokens(S), 2, plan.answer
    reference = pairs * sizes.environments
    plan.read("reference", reference, *row)
    plan.see("reference", reference * S.K)
    plan.steps_begin()
    learned = steps * min(S.PAIRS, pairs)
    plan.learn("update", learned, *row)
    # The pairs of a step are drawn by chance, so their clips have been forgotten.
    plan.see("update", learned * S.K)


def learn_from_pairs(policy, S, environment, streams, start_training):
    """DPO for one environment -> whether anything was trained."""
    pairs = cached_pairs(S, environment, streams)
    if not pairs:
        print(f"  {environment:24} no pair: its recent questions prefer none of the cached "
              "memories; no new adapter")
        return False
    if S.SHOW:
        show_pair(policy, pairs[0], environment, S.BETA)
        return False
    run = start_training(lesson=[pair.content for pair in pairs])
    train_dpo(policy, run, pairs, seed=S.SEED, batch_size=S.PAIRS, beta=S.BETA)
    last = {name: float(value) for name, value in run.rows[-1].items()}
    print(f"  {environment:24} {len(pairs)} pairs  loss {last['loss']:.3f}  "
          f"accuracy {last['accuracy']:.2f}  norm {last['norm']:.3f}")
    return True


def learn_on_policy(policy, S, environment, questions, streams, judge, reward_model,
                    start_training):
    """The loop of 02 for one environment -> whether anything was trained."""
    seen = seen_streams(S, streams, environment)
    batch = phase1.RollingBatch(
        seen, {}, seed=S.SEED, size=S.CONTEXTS, window=S.K,
        off_policy_steps=0, n_min=S.N_MIN, n_max=S.N_MAX, resample=S.RESAMPLE)
    reward = functools.partial(
        rewards, judge=judge, reward_model=reward_model, questions=questions,
        relevance_weight=S.RELEVANCE, max_memory_tokens=S.MEMORY_TOKENS,
        max_think_tokens=S.THINK_TOKENS, format_penalty=S.FORMAT)
    if S.SHOW:
        phase1.show_group(policy, phase1.first_group(policy, S, batch, reward))
        return False
    clips = {stream["stream"]: len(stream["clips"]) for stream in seen}
    run = start_training(batch=batch, lesson=[clips, need(S, "reward/model")])
    grpo(policy, run, batch, reward, phase1.log_row, reference="phase1", **phase1.loop_constants(S))
    return True


def scale(params, S):
    if S.SCALE_TO_NORM and S.ADAPTER == "steer":
        with torch.no_grad():
            params[0].mul_(S.SCALE_TO_NORM / params[0].norm())


if __name__ == "__main__":
    main()
