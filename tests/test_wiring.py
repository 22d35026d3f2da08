"""How the parts are put together: which gradient a step of the loop takes, what the gate looks at, how a watch
samples, what the KL refers to, and in which layout experts are read. The parts themselves are tested elsewhere.

The helpers of the first two sections alone know the signatures of `grpo` and `rewards`.
"""
import copy
import csv
import importlib
import shutil
import statistics
from collections import namedtuple
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from support import decode, runs, weights                                   # noqa: E402
from support.checkpoint import Training                                     # noqa: E402
from test_loop import FakeJudge, context, sample                            # noqa: E402

TINY = runs.ROOT / "tiny" / "base"
phase1, reward_model, phase2 = (importlib.import_module(name) for name in (
    "02_phase1_train", "04_train_reward", "05_phase2_train"))


# ================================================================ helpers: one step of the real loop
HandMade = namedtuple("HandMade", "rewards gates counts")
# of one group: each sample's reward (None: the judge failed), what the gate looks at, and whether the sample counts
Update = namedtuple("Update", "values gradient")         # of the parameters, flat: before the update, not yet clipped
Step = namedtuple("Step", "S groups updates after row")  # after: values after the last update; row: of log.csv
Group = namedtuple("Group", "context answers advantages counts")        # answers: ids of the samples with a reward


def flat(tensors):
    return torch.cat([t.detach().flatten().clone() for t in tensors])


def hand_made_rewards(table, seen):
    """A reward function as `grpo` takes it, which gives the rewards and gates of `table`; contexts and samples are
    added to `seen`."""
    def reward(groups):
        seen.extend((group.context, group.samples) for group in groups)
        for group, made in zip(groups, table):
            for answer, value, gate in zip(group.samples, made.rewards, made.gates):
                answer.reward = value
                answer.gate_value = gate
                answer.terms = {"made": value}
    return reward


def give_effect(params):
    """A new adapter has no effect; these random values give it one. A steering vector is alone, so it is longer."""
    draw = torch.Generator().manual_seed(0)
    for p in params:
        torch.nn.init.normal_(p, std=0.06 if p.dim() == 2 else 1.0, generator=draw)


def one_step(policy, contexts, table, out, monkeypatch, *argv):
    """One step of `common.grpo`, as 02 runs it, from a LoRA that already differs from the base -> Step."""
    S = common.settings(vars(phase1), ["--STEPS=1", f"--GROUP={len(table[0].rewards)}", *argv])
    params, seen, updates = policy.add("phase1", "lora"), [], []
    give_effect(params)
    clip = torch.nn.utils.clip_grad_norm_

    def record_and_clip(given, *rest):
        updates.append(Update(flat(params), flat(p.grad for p in params)))
        return clip(given, *rest)
    batch = SimpleNamespace(state=None, next=lambda step: contexts, advance=lambda step, groups: None)
    run = Training(out, params, batch=batch, steps=S.STEPS, lr=S.LR, save_every=S.SAVE_EVERY, grad_clip=S.GRAD_CLIP)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", record_and_clip)
        common.grpo(policy, run, batch, hand_made_rewards(table, seen), phase1.log_row, reference="base",
                    **phase1.loop_constants(S))
    groups = [hand_group(context, samples, made) for (context, samples), made in zip(seen, table)]
    return Step(S, groups, updates, flat(params), log_rows(out)[-1])


def hand_group(context, samples, made):
    """Advantages by the textbook: distance to the mean in units of the population's spread."""
    judged = [i for i, r in enumerate(made.rewards) if r is not None]
    rewards = [made.rewards[i] for i in judged]
    mean, spread = statistics.mean(rewards), statistics.pstdev(rewards)
    advantages = [(r - mean) / spread if spread else 0.0 for r in rewards]
    return Group(context, [samples[i].ids for i in judged], advantages, [made.counts[i] for i in judged])


def log_rows(folder):
    with open(folder / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


# ================================================================ helpers: the plain loss and its gradient
def log_probabilities(policy, group, writer):
    """Log-probs of a group's answers by a writer, each answer in a row of its own."""
    with policy.using(writer):
        return [common.logprobs(policy, group.context, [ids])[0] for ids in group.answers]


def divergence(logp, reference):
    """KL from its estimator ref/pi - log(ref/pi) - 1: mean over an answer's tokens, then over the answers."""
    terms = []
    for new, ref in zip(logp, reference):
        quotient = (ref - new).exp()
        terms.append((quotient - quotient.log() - 1).mean())
    return sum(terms) / len(terms)


def objective(S, group, logp, old):
    """The clipped objective, which is to rise: mean over an answer's ratios, then over the answers."""
    terms = []
    for new, was, advantage, counts in zip(logp, old, group.advantages, group.counts):
        ratio = (new - was).mean().exp() if S.RATIO == "gspo" else (new - was).exp()
        clipped = ratio.clamp(1 - S.CLIP_LOW, 1 + S.CLIP_HIGH)
        terms.append(torch.min(ratio * advantage, clipped * advantage).mean() * counts)
    return sum(terms) / len(terms)


def put(params, values):
    """Puts flat values into the parameters."""
    with torch.no_grad():
        for p, v in zip(params, values.split([p.numel() for p in params])):
            p.copy_(v.view_as(p))


def hand_gradient(policy, S, groups, start, now):
    """Gradient of a mini-batch's loss where the parameters are `now`; the step began with them at `start`."""
    params = policy.trainable
    with torch.no_grad():
        put(params, start)
        old = [log_probabilities(policy, g, "phase1") for g in groups]
        base = [log_probabilities(policy, g, "base") for g in groups]
    put(params, now)
    losses = []
    for group, was, ref in zip(groups, old, base):
        logp = log_probabilities(policy, group, "phase1")
        losses.append(S.KL * divergence(logp, ref) - objective(S, group, logp, was))
    loss = sum(losses) / len(losses)
    return flat(torch.autograd.grad(loss, params))


def hand_updates(S, updates):
    """Values of the parameters after each update, by a plain AdamW on the clipped gradients."""
    values = torch.nn.Parameter(updates[0].values.clone())
    optimizer, after = torch.optim.AdamW([values], lr=S.LR, weight_decay=0.0), []
    for update in updates:
        values.grad = update.gradient * min(1.0, S.GRAD_CLIP / update.gradient.norm().item())
        optimizer.step()
        after.append(values.detach().clone())
    return after


def gap(gradient, wanted):
    """How far a gradient is from the wanted one, in units of its norm; rounding alone makes about 1e-5."""
    return ((gradient - wanted).norm() / wanted.norm()).item()


# ================================================================ the gradient
# Four groups: one plain; one flat, which leaves; one with a sample that could not be judged and one whose
# rewards and gates differ in sign. Below the mean, only a negative gate counts.
TABLE = [HandMade([0.5, -0.5, 0.3, -1.5], [0.5, -0.5, 0.3, -1.5], [True, True, True, True]),
         HandMade([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [True, True, True, True]),
         HandMade([0.6, None, -0.2, 0.1], [0.5, None, 0.2, -0.5], [True, None, False, True]),
         HandMade([1.0, 0.2, -0.4, 0.5], [-0.5, -0.1, 0.1, 0.5], [True, True, False, True])]


@pytest.mark.parametrize("ratio", ["gspo", "grpo"])
def test_a_step_takes_the_gradient_of_the_plain_loss(policy, contexts, tmp_path, monkeypatch, ratio):
    """Three groups with a gradient and mini-batches of two make two updates: of two groups, then of one.
    A clip as close as CLIP_LOW acts in the second."""
    step = one_step(policy, contexts, TABLE, tmp_path, monkeypatch,
                    "--MINI_BATCH=2", "--KL=1", "--LR=3e-3", "--GRAD_CLIP=0.1",
                    "--CLIP_LOW=0.002", "--CLIP_HIGH=0.5", f"--RATIO={ratio}")
    batches = [[step.groups[0], step.groups[2]], [step.groups[3]]]
    assert len(step.updates) == 2
    start = step.updates[0].values
    for groups, update in zip(batches, step.updates):
        wanted = hand_gradient(policy, step.S, groups, start, update.values)
        assert gap(update.gradient, wanted) < 1e-4
    # between the gradients lie plain steps of the optimizer
    first, second = hand_updates(step.S, step.updates)
    assert torch.allclose(step.updates[1].values, first, atol=1e-6)
    assert torch.allclose(step.after, second, atol=1e-6)
    # and these are in the log
    norms = [u.gradient.norm().item() for u in step.updates]
    assert min(norms) > step.S.GRAD_CLIP
    assert float(step.row["grad_norm"]) == pytest.approx(max(norms), rel=1e-4)
    assert float(step.row["gated"]) == pytest.approx(2 / 15, rel=1e-4)
    assert float(step.row["flat"]) == 1 / 4


def test_without_a_kl_the_gradient_is_that_of_the_objective(policy, contexts, tmp_path, monkeypatch):
    step = one_step(policy, contexts[:2], TABLE[2:], tmp_path, monkeypatch, "--MINI_BATCH=2", "--KL=0")
    update, = step.updates
    wanted = hand_gradient(policy, step.S, step.groups, update.values, update.values)
    assert gap(update.gradient, wanted) < 1e-4
    assert float(step.row["kl"]) == 0


# ================================================================ the reward with R
def relevance_rewards(groups, R):
    """05's rewards where the judge goes by words in a memory and the reward model gives R[memory] -> per group
    (rewards, gates, terms), and what the reward model was asked."""
    asked = []

    def score(questions, history, memories):
        asked.append((questions, history, memories))
        return [R[memory] for memory in memories]
    groups = [common.Group(context([f"before {i}"]), samples) for i, samples in enumerate(groups)]
    phase2.rewards(groups, FakeJudge(), SimpleNamespace(score=score), ["where?"], relevance_weight=0.5,
                   max_memory_tokens=17, max_think_tokens=16, format_penalty=-1.5)
    found = []
    for group in groups:
        terms = {name: [s.terms[name] for s in group.samples] for name in group.samples[0].terms}
        found.append(([s.reward for s in group.samples], [s.gate_value for s in group.samples], terms))
    return found, asked


def test_r_is_centred_in_its_group_and_not_seen_by_the_gate():
    """R of the first group has the mean 2, that of the second 12, so that no shared mean would do."""
    R = {"a lamp": 0.0, "a cup": 3.0, "not faithful": 5.0, "a long path": 0.0, "a book": 10.0, "not clean": 14.0}
    first = [sample("a lamp"), sample("a cup"), sample("not faithful"), sample(None),
             sample("fail clean"), sample("a long path", thinking=24)]
    second = [sample("a book"), sample("not clean")]
    (one, two), asked = relevance_rewards([first, second], R)

    rewards, gates, terms = one
    assert gates == [0.5, 0.5, -0.5, -1.5, None, 0.0]                       # of format, length and quality alone
    assert terms["R"] == [0.0, 3.0, 5.0, None, None, 0.0]
    assert terms["relevance"] == [-1.0, 0.5, 1.5, 0.0, 0.0, -1.0]           # 0.5 * (R - 2)
    assert rewards == [-0.5, 1.0, 1.0, -1.5, None, -1.0]
    rewards, gates, terms = two
    assert gates == [0.5, -0.5]
    assert terms["relevance"] == [-1.0, 1.0]                                # 0.5 * (R - 12)
    assert rewards == [-0.5, 0.5]

    # what has no memory or no verdict is not read
    assert asked == [
        (["where?"], ["before 0"], ["a lamp", "a cup", "not faithful", "a long path"]),
        (["where?"], ["before 1"], ["a book", "not clean"])]


# ================================================================ how is sampled
def record_sampling(monkeypatch):
    """A list that gets (temperature, top-p, top-k) of every token drawn from now on."""
    drawn, pick = [], decode.pick

    def record(logits, u, how):
        drawn.append((how.temperature, how.top_p, how.top_k))
        return pick(logits, u, how)
    monkeypatch.setattr(decode, "pick", record)
    return drawn


def test_a_watch_samples_as_in_deployment(policy, streams, monkeypatch):
    drawn = record_sampling(monkeypatch)
    common.watch(policy, [streams[0] | {"clips": streams[0]["clips"][:2]}])
    assert set(drawn) == {(0.6, 0.95, 20)}


def test_training_samples_from_the_policy_as_it_is(policy, contexts, tmp_path, monkeypatch):
    """A ratio of 1 in the first mini-batch holds for the policy itself alone: temperature 1, nothing cut."""
    drawn = record_sampling(monkeypatch)
    one_step(policy, contexts[:1], TABLE[:1], tmp_path, monkeypatch)
    assert set(drawn) == {(1.0, 1.0, 0)}


# ================================================================ what the KL refers to
def run_main(script, writer, monkeypatch, *argv):
    """main of 02 or 05 on hand-made rewards, where `writer` starts with an effect -> its policy, with `writer` as it
    was before the step, and the groups."""
    seen, begun, add = [], {}, common.Policy.add
    table = [HandMade([0.5, -0.5], [0.5, -0.5], [True, True])] * 2

    def add_with_effect(policy, name, kind, folder=None):
        params = add(policy, name, kind, folder)
        if name == writer:
            give_effect(params)
            begun.update(policy=policy, params=params, values=flat(params))
        return params
    monkeypatch.setattr(common.Policy, "add", add_with_effect)
    reward = hand_made_rewards(table, seen)
    monkeypatch.setattr(script, "rewards", lambda groups, **constants: reward(groups))
    script.main(["--CPU_THREADS=1", "--MAX_NEW_TOKENS=24", "--GROUP=2", "--CONTEXTS=2", "--MINI_BATCH=2", "--KL=0.1",
                 *argv])
    put(begun["params"], begun["values"])
    return begun["policy"], [hand_group(context, samples, made) for (context, samples), made in zip(seen, table)]


def hand_kl(policy, groups, writer, reference):
    with torch.no_grad():
        values = [divergence(log_probabilities(policy, g, writer), log_probabilities(policy, g, reference))
                  for g in groups]
    return sum(values).item() / len(values)


def test_phase_one_keeps_to_the_base(toy, tmp_path, monkeypatch):
    policy, groups = run_main(phase1, "phase1", monkeypatch, f"--RUN={tmp_path}", f"--FROM={toy}", "--STEPS=1",
                              "--OFF_POLICY_STEPS=1")
    wanted = hand_kl(policy, groups, "phase1", "base")
    assert wanted > 1e-3                                                    # to itself it would be 0
    row, = log_rows(tmp_path / "phase1")
    assert float(row["kl"]) == pytest.approx(wanted, rel=1e-3)


@pytest.fixture
def before_phase2(policy, streams, toy, tmp_path):
    """A run with what 05 reads on-policy: a Phase One adapter that differs from the base, the questions of one
    environment, and contexts of which it may learn."""
    give_effect(policy.add("phase1", "lora"))
    weights.save_adapter(policy, "phase1", tmp_path / "phase1" / "adapter")
    policy.drop("phase1")
    stream, = (r for r in runs.read_jsonl(toy / "streams" / "streams.jsonl") if r["split"] == "deploy")
    runs.write_json(tmp_path / "tasks" / "recent.json", {"place": [{
        "task": "1", "stream": stream["stream"], "environment": "place", "time": 60.0, "question": "where?"}]})
    runs.write_jsonl(tmp_path / "tasks" / "cache.jsonl", [
        {"stream": stream["stream"], "clip": 5, "history": [], "environments": ["place"], "samples": []}])
    (tmp_path / "reward" / "model").mkdir(parents=True)
    runs.write_json(tmp_path / "reward" / "report.json", {"asked": {"place": ["where?"]}})
    return tmp_path


def test_phase_two_keeps_to_phase_one(before_phase2, toy, monkeypatch):
    monkeypatch.setattr(reward_model, "load_reward_model", lambda S, policy: None)
    policy, groups = run_main(phase2, "phase2", monkeypatch, f"--RUN={before_phase2}", f"--FROM={toy}",
                              "--ALGORITHM=grpo", "--GRPO_STEPS=1")
    wanted, to_base = (hand_kl(policy, groups, "phase2", reference) for reference in ("phase1", "base"))
    assert wanted > 1e-3 and not 0.9 < to_base / wanted < 1.1               # the three writers differ
    row, = log_rows(before_phase2 / "phase2" / "grpo-steer" / "place")
    assert float(row["kl"]) == pytest.approx(wanted, rel=1e-3)


# ================================================================ experts in the hub's layout
HIDDEN, WIDTH, EXPERTS = 128, 192, 8                # 2 * WIDTH, HIDDEN and WIDTH all differ, so no expert is square


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(folder, model): a small random model with its weights set by hand, and the folder of a checkpoint of it in the
    hub's layout. Experts lie there as (E, in, out), in the library's memory as (E, out, in)."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText
    folder = tmp_path_factory.mktemp("hub") / "model"
    shutil.copytree(TINY, folder)
    config = runs.read_json(folder / "config.json")
    config["text_config"] |= {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "num_local_experts": EXPERTS,
                              "num_hidden_layers": 2}
    runs.write_json(folder / "config.json", config)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation="sdpa",
        experts_implementation="grouped_mm").eval()
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        values = 0.05 * torch.randn(p.shape, generator=draw) + (p.dim() == 1)      # norms lie around 1
        p.data = values.bfloat16().float()                                        # which a file in 16 bits can hold
    state = {}
    for name, value in model.state_dict().items():
        value = value.transpose(1, 2) if weights.is_expert(name) else value
        state[name] = value.bfloat16().contiguous()
    place = "model.language_model.layers.0.mlp.experts."
    assert state[place + "gate_up_proj"].shape == (EXPERTS, HIDDEN, 2 * WIDTH)
    assert state[place + "down_proj"].shape == (EXPERTS, WIDTH, HIDDEN)
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder, model


def load(folder, bits):
    S = common.settings({"__doc__": ""}, [
        f"--MODEL={folder}", f"--BITS={bits}", "--CPU_THREADS=1", "--FRAMES_PER_CLIP=4", "--FRAME_PIXELS=9216",
        "--MAX_NEW_TOKENS=32"])
    return weights.load_model(S)[0]


def logits(model):
    ids = torch.randint(9, 700, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids.to(model.device)).logits


def rounded(weight):
    """A matrix (out, in) as NF4 keeps it, by the library alone."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    return dequantize_4bit(*quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4"))


def test_experts_of_the_hub_are_read_in_16_bits(hub):
    folder, model = hub
    loaded = load(folder, 16)
    for name, p in loaded.named_parameters():
        assert torch.equal(p.cpu().float(), model.get_parameter(name))
    assert torch.equal(logits(loaded), logits(copy.deepcopy(model).to(loaded.device, loaded.dtype)))


def test_experts_of_the_hub_are_packed_in_4_bits(hub):
    pytest.importorskip("bitsandbytes")
    folder, model = hub
    plain = copy.deepcopy(model)
    for name, p in plain.model.language_model.named_parameters():
        if weights.is_expert(name):
            p.data = torch.stack([rounded(expert) for expert in p.data])
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            p.data = rounded(p.data)
    loaded = load(folder, 4)
    assert torch.equal(logits(loaded), logits(plain.to(loaded.device, loaded.dtype)))
    assert not torch.allclose(logits(plain), logits(copy.deepcopy(model).to(plain.device, plain.dtype)), atol=1e-2)
