"""What the 30B model needs, shown on the tiny one and on the meta device: 4-bit experts, the byte plan,
rollouts in parts, checkpointed layers, flat memory, and several ranks that equal one process."""
import doctest
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from support import plan, ranks, weights                                    # noqa: E402
from support.runs import ROOT                                               # noqa: E402

TINY = ROOT / "tiny" / "base"
SMALL = ["--FRAMES_PER_CLIP=4", "--FRAME_PIXELS=9216", "--MAX_NEW_TOKENS=32", "--CPU_THREADS=1",
         "--ROLLOUT_SEQUENCES=16"]


def settings(*argv):
    return common.settings({"__doc__": ""}, list(argv))


@pytest.fixture(scope="module")
def sketch():
    """The 30B on the meta device: shapes without bytes."""
    return plan.sketch()


# ================================================================ 4-bit
@pytest.fixture(scope="module", params=[0, 1], ids=["single", "double"])
def four_bit(request):
    pytest.importorskip("bitsandbytes")
    return common.load_policy(settings("--BITS=4", f"--DOUBLE_QUANT={request.param}", "--CPU_THREADS=1"))


def dequantised(policy):
    """The same model with every packed weight unpacked by the library at once, experts as plain matmuls."""
    import bitsandbytes
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
    from transformers import AutoModelForImageTextToText
    plain = AutoModelForImageTextToText.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager").eval()
    packed = 0
    for name, p in plain.named_parameters():
        place, _, kind = name.rpartition(".")
        module = policy.model.get_submodule(place)
        module = getattr(module, "base_layer", module)
        if "experts" in name:
            scales = module.scales[kind]
            if isinstance(scales, weights.DoubleScales):
                small, large, mean = scales
                scales = mean + torch.stack([dequantize_blockwise(
                    s, absmax=a, code=weights.levels_of_8_bits(s.device), blocksize=len(s) // len(a))
                    for s, a in zip(small, large)])
            value = torch.stack([dequantize_4bit(c[:, None], QuantState(
                s.contiguous(), p.shape[1:], dtype=torch.float32, blocksize=64, quant_type="nf4"))
                for c, s in zip(getattr(module, kind).data, scales)])
        elif isinstance(module, bitsandbytes.nn.Linear4bit) and kind == "weight":
            value = dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            continue
        p.data, packed = value, packed + p.numel()
    return plain, packed


def test_packed_weights_are_bit_equal_to_plain_matmuls_on_unpacked_ones(four_bit):
    four_bit.drop("phase1")
    plain, packed = dequantised(four_bit)
    assert packed > 0.6 * sum(p.numel() for p in plain.parameters() if "visual" not in str(p))
    ids = torch.randint(9, 700, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(four_bit.model(input_ids=ids).logits, plain(input_ids=ids).logits)
    # gradients of the same LoRA on both
    torch.manual_seed(1)
    params = four_bit.add("phase1", "lora")
    for p in params:
        torch.nn.init.normal_(p, std=0.05)
    four_bit.train_only(params)
    other = common.Policy(plain, four_bit.tokenizer, plan.Room(most=1), four_bit.S)
    twins = other.add("phase1", "lora")
    for p, q in zip(twins, params):
        p.data.copy_(q.data)
    other.train_only(twins)
    out = [m(input_ids=ids).logits.log_softmax(-1)[..., 5].sum() for m in (four_bit.model, plain)]
    assert torch.equal(*out)
    for loss in out:
        loss.backward()
    assert all(p.grad.abs().max() > 0 and torch.equal(p.grad, q.grad) for p, q in zip(params, twins))
    four_bit.drop("phase1")


def test_only_experts_and_linears_are_packed(four_bit):
    import bitsandbytes
    model = four_bit.model
    assert {p.dtype for n, p in model.named_parameters() if weights.is_expert(n)} == {torch.uint8}
    kinds = {n: type(m) for n, m in model.named_modules()}
    linear = {n for n, k in kinds.items() if issubclass(k, torch.nn.Linear)}
    four = {n for n, k in kinds.items() if issubclass(k, bitsandbytes.nn.Linear4bit)}
    assert {n for n in linear if "language_model" in n} == four and four
    assert all(p.is_floating_point() for n, p in model.named_parameters()
               if "embed" in n or "gate.weight" in n or "norm" in n or "lm_head" in n or "visual" in n)


def test_the_packed_model_is_near_the_whole_one(four_bit, policy, contexts):
    ids = [policy.tokenizer('plan: place\n</think>\n\n{"description": "now, in the kitchen."}')["input_ids"]]
    with torch.no_grad():
        gap = (common.logprobs(four_bit, contexts[1], ids)[0]
               - common.logprobs(policy, contexts[1], ids)[0]).abs()
    assert 0 < gap.mean() < 1.0


def test_adapters_on_a_packed_model_are_saved_and_loaded(four_bit, contexts, tmp_path):
    ids = [list(range(9, 30))]
    read = lambda: common.logprobs(four_bit, contexts[0], ids)[0].detach()
    base = read()
    for kind in ("lora", "steer"):
        four_bit.S.LAYER = 2
        params = four_bit.add("phase2", kind)
        for p in params:
            torch.nn.init.normal_(p, std=0.05)
        tuned = read()
        weights.save_adapter(four_bit, "phase2", tmp_path / kind)
        four_bit.drop("phase2")
        assert torch.equal(read(), base) and not torch.equal(tuned, base)
        weights.load_adapter(four_bit, "phase2", tmp_path / kind)
        assert torch.equal(read(), tuned)
        four_bit.drop("phase2")
    with pytest.raises(SystemExit, match="needs a model in fp32"):
        four_bit.add("phase1", "all")


def test_an_expert_that_blocks_cannot_tile_is_refused():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="an expert of 90 values"):
        weights.pack(torch.randn(2, 9, 10))


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(weights)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("double", [False, True])
def test_few_tokens_unpack_their_experts_and_many_all(tokens, double):
    """Both ways equal plain products in fp32, in output and gradient; shapes follow from the number of tokens."""
    from types import SimpleNamespace
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(tokens)
    E, d, width, k = 8, 64, 64, 2
    module = SimpleNamespace(num_experts=E, hidden_dim=d, intermediate_dim=width, scales={},
                             _apply_gate=lambda x: x[:, :width].tanh() * x[:, width:])
    plain = {}
    for name, shape in (("gate_up_proj", (2 * width, d)), ("down_proj", (d, width))):
        codes, module.scales[name] = weights.pack(torch.randn(E, *shape, generator=generator), double)
        setattr(module, name, codes)
        plain[name] = weights.unpack(codes, module.scales[name], None, shape, torch.float32)
        some = torch.tensor([5, 0, 5])
        assert torch.equal(weights.unpack(codes, module.scales[name], some, shape, torch.float32), plain[name][some])
    x = torch.randn(tokens, d, generator=generator, requires_grad=True)
    chosen = torch.stack([torch.randperm(E, generator=generator)[:k] for _ in range(tokens)])
    share = torch.rand(tokens, k, generator=generator)
    _, hit, ends = weights.sort_by_expert(chosen, E)
    assert (hit is None) == (tokens * k >= E) and len(ends) == min(E, tokens * k)
    want = sum(share[:, i, None] * torch.einsum("nw,ndw->nd", module._apply_gate(
        torch.einsum("nd,nwd->nw", x, plain["gate_up_proj"][chosen[:, i]])), plain["down_proj"][chosen[:, i]])
        for i in range(k))
    got = weights.packed_experts(module, x, chosen, share)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-3)
    grad = torch.randn(tokens, d, generator=generator)
    mine, = torch.autograd.grad(got, x, grad)
    theirs, = torch.autograd.grad(want, x, grad)
    assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("double", [False, True])
def test_a_packed_row_is_its_expert_alone(double):
    """Some experts, in any order, come back as if each had been packed by itself, near to what they were."""
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(5, 64, 256, generator=torch.Generator().manual_seed(0))
    codes, scales = weights.pack(weight, double)
    assert codes.shape == (5, 64 * 256 // 2) and codes.dtype == torch.uint8
    hit = torch.tensor([3, 0])
    back = weights.unpack(codes, scales, hit, (64, 256), torch.float32)
    assert back.shape == (2, 64, 256) and (back - weight[hit]).abs().mean() < 0.1
    for i, one in zip(hit, back):
        if not double:                                     # the mean of double scales is over all experts
            alone = weights.pack(weight[i:i + 1])
            assert torch.equal(weights.unpack(*alone, torch.tensor([0]), (64, 256), torch.float32)[0], one)
    blocks = weight[hit].view(2, 256, 64).abs().amax(-1)                # a block's scale is its largest value
    found = weights.unpack_scales(scales, hit).view(2, 256) if double else scales[hit]
    assert torch.allclose(found, blocks, atol=0.1 if double else 0)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_lora_on_a_16_bit_model_comes_back_in_full(bits, tmp_path):
    """It trains and is kept in fp32: reading it must not round it to the model's type."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    pytest.importorskip("bitsandbytes")
    config = weights.quantization()(bnb_4bit_compute_dtype=torch.bfloat16,
                                    llm_int8_skip_modules=["lm_head", "model.visual"])
    options = {} if bits == 16 else dict(experts_implementation="nf4", quantization_config=config)
    model = AutoModelForImageTextToText.from_pretrained(
        TINY, dtype=torch.bfloat16, attn_implementation="sdpa", **options)
    other = common.Policy(model.eval(), AutoTokenizer.from_pretrained(TINY), plan.Room(most=1),
                          settings(f"--BITS={bits}"))
    params = other.add("phase1", "lora")
    for p in params:
        torch.nn.init.normal_(p, std=0.05)
    kept = [p.detach().clone() for p in params]
    weights.save_adapter(other, "phase1", tmp_path)
    weights.load_adapter(other, "phase1", tmp_path)
    again = [p for n, p in other.model.named_parameters() if f".{other.lora['phase1']}." in n]
    assert len(again) == len(kept) and all(
        p.dtype == torch.float32 and torch.equal(p, q) and not torch.equal(p, p.bfloat16().float())
        for p, q in zip(again, kept))


# ================================================================ bytes
@pytest.mark.parametrize("argv, gib", [
    (["--VISION_BITS=4"], 17.1), ([], 17.9), (["--VISION_BITS=4", "--DOUBLE_QUANT=1"], 15.8)])
def test_bytes_of_the_30b(sketch, argv, gib):
    table = plan.weight_bytes(sketch, settings("--MODEL=x", *argv))
    assert table["experts"].values == 48 * 128 * 3 * 768 * 2048
    assert sum(kind.values for kind in table.values()) == pytest.approx(31.07e9, rel=1e-3)
    assert sum(kind.bytes for kind in table.values()) / 2**30 == pytest.approx(gib, abs=0.1)


def test_the_plan_is_printed_and_refuses_before_loading(sketch, capsys):
    S = settings("--MODEL=x")
    S.GROUP, S.LR = 8, 1e-5
    assert 9000 < plan.prompt_tokens(S) < 12000
    room = plan.check_plan(sketch, S, 80 * 2**30)
    said = capsys.readouterr().out
    found = plan.plan(sketch, S, 80 * 2**30)
    assert found.prompt == plan.prompt_tokens(S) and found.room == room
    assert found.row == found.prompt + 8 * 2800                         # the longest answers, not the usual ones
    contexts, samples = room.side_by_side(found.prompt, 8, 2800)
    wide = contexts * sum(found.rollout.values()) + sum(found.prefill.values())
    assert found.at_rest() + wide < 0.92 * 80 * 2**30
    assert contexts >= 8 and samples == 8 and "experts" in said and "GiB" in said and "prompts of" in said
    assert f"side by side: {contexts}\n" in said and "mask" not in found.training
    assert len(said.splitlines()) == 7 and max(map(len, said.splitlines())) < 125       # to be read
    for part in (found.weights, found.held, found.prefill, found.rollout, found.training):
        line = next(x for x in said.splitlines() if next(iter(part)) in x)
        assert f"{sum(part.values()) / 2**30:.2f} =" in line and all(item in line for item in part)
    with pytest.raises(SystemExit,
                       match=r"does not fit: a card of 16.00 GiB, weights 17.\d+ GiB.*FRAME_PIXELS"):
        plan.check_plan(sketch, S, 16 * 2**30)
    assert found.rollout["cache"] == 96 * 1024 * (plan.prompt_tokens(S) + 8 * S.MAX_NEW_TOKENS)
    small = settings("--MODEL=x", "--VISION_BITS=4", "--DOUBLE_QUANT=1", "--FRAME_PIXELS=50176",
                     "--FRAMES_PER_CLIP=10", "--FEATURE_CLIPS=20", "--THINK_TOKENS=200", "--MAX_NEW_TOKENS=600")
    small.GROUP, small.LR = 8, 1e-5
    prompt = plan.prompt_tokens(small)
    room = plan.check_plan(sketch, small, 24 * 2**30)
    assert room.side_by_side(prompt, 8, 600)[1] == 8                 # what the README names for 24 GB
    with pytest.raises(SystemExit, match=r"exceed the model's 262144.*nothing is cut"):
        plan.check_plan(sketch, settings("--MODEL=x", "--FRAMES_PER_CLIP=600"), 80 * 2**30)


def test_as_many_fit_side_by_side_as_a_call_leaves_room_for(sketch, monkeypatch):
    """By the call's own samples, prompts and limit, and by what the card has left; never more than that."""
    S = settings("--MODEL=x")
    S.GROUP = 8
    room = plan.plan(sketch, S, 80 * 2**30).room
    sizes = {}
    for prompt, samples, limit in ((11070, 8, 2800), (11070, 1, 2800), (3000, 1, 128), (32000, 1, 1000)):
        contexts, width = room.side_by_side(prompt, samples, limit)
        sizes[prompt, samples] = contexts
        taken = contexts * room.of_context(prompt, samples, limit) + prompt * room.prefill_token
        assert width == samples and taken <= room.free < taken + room.of_context(prompt, samples, limit)
    assert sizes[11070, 1] > 2 * sizes[11070, 8] and sizes[3000, 1] > 10 * sizes[11070, 8]
    assert sizes[32000, 1] >= 5
    few = plan.plan(sketch, settings("--MODEL=x", "--ROLLOUT_SEQUENCES=16"), 80 * 2**30).room
    assert few.side_by_side(11070, 8, 2800) == (2, 8) and few.side_by_side(11070, 1, 2800) == (16, 1)
    for gib in (1, 2, 4, 8):                                            # the card is nearly full
        monkeypatch.setattr(plan, "free_on_card", lambda: gib * 2**30)
        try:
            contexts, width = room.side_by_side(11070, 8, 2800)
        except SystemExit as error:
            assert gib < 4 and "a prompt of 11070 tokens" in str(error) and f"{gib}.00 GiB are free" in str(error)
        else:
            taken = contexts * room.of_context(11070, width, 2800) + 11070 * room.prefill_token
            assert taken <= gib * 2**30 and (width == 8) == (gib == 8)


def test_contexts_of_like_length_go_together(policy, contexts, monkeypatch):
    many = [contexts[i % 4] for i in range(10)]
    lengths = [policy.prompt_length(context) for context in many]
    token = 1000
    monkeypatch.setattr(policy, "room", plan.Room(most=0, free=3 * token * (max(lengths) + 2 * 5), token_cache=token,
                                                  layers=10**9))
    seen = list(common.batches(policy, many, 2, 5))
    assert sorted(sum((numbers for numbers, _ in seen), [])) == list(range(10))
    order = [lengths[i] for numbers, _ in seen for i in numbers]
    assert order == sorted(lengths, reverse=True) and {width for _, width in seen} == {2}
    assert len(seen[0][0]) == 2 and len(seen[-2][0]) > 3                # the shorter, the more
    monkeypatch.setattr(policy.S, "FEATURE_CLIPS", 6)                   # and their clips' features are held too
    assert all(sum(len(many[i].clips) for i in numbers) <= 6 for numbers, _ in common.batches(policy, many, 2, 5))


# ================================================================ rollouts and passes of a full-size model
def test_a_group_in_parts_draws_the_same_tokens(policy, contexts):
    keys, ids = [(5, i) for i in range(4)], lambda groups: [[s.ids for s in g] for g in groups]
    whole = ids(common.rollout(policy, contexts, 8, keys))
    before = policy.room
    try:
        for samples in (1, 3, 5):
            policy.room = plan.Room(most=samples)
            assert policy.room.side_by_side(300, 8, 32) == (1, samples)
            assert ids(common.rollout(policy, contexts, 8, keys)) == whole
    finally:
        policy.room = before


def test_an_answer_stops_at_the_end_of_its_json(policy, contexts):
    """With the end token out of reach, an answer that closes its object gets one more, and is malformed."""
    groups = common.rollout(policy, contexts, 8, [(6, i) for i in range(4)])
    closed = [s for g in groups for s in g if s.memory]
    assert closed and all(s.ids[-1] == policy.end for s in closed)
    policy.banned, before = torch.cat([policy.banned, torch.tensor([policy.end])]), policy.banned
    try:
        again = common.rollout(policy, contexts, 8, [(6, i) for i in range(4)])
    finally:
        policy.banned = before
    tails = [s for g in again for s in g if common.parse_response(policy.tokenizer.decode(s.ids[:-1]))[0]]
    assert tails and all(s.memory is None and not s.truncated for s in tails)
    for s in (s for g in again for s in g):
        assert not any(common.parse_response(policy.tokenizer.decode(s.ids[:n]))[0]
                       for n in range(1, len(s.ids) - 1))


def test_logits_exist_for_one_answer_only(policy, contexts):
    params = policy.add("phase1", "lora")
    policy.train_only(params)
    answers, seen = [list(range(9, 9 + n)) for n in (30, 20, 25)], []
    def keep(x):
        seen.append(tuple(x.shape))
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logp = common.logprobs(policy, contexts[2], answers)
    wide = [s for s in seen if s and s[-1] == policy.head.weight.shape[0] and len(s) > 1
            and s[0] != policy.hidden]
    assert not wide                                                     # the head runs again in backward
    sum(x.sum() for x in logp).backward()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The tiny weights under a folder's name: all code paths of a full-size model, and the authors' key."""
    from safetensors.torch import load_file, save_file
    folder = tmp_path_factory.mktemp("model") / "base"
    shutil.copytree(TINY, folder)
    state = load_file(str(folder / "model.safetensors"))
    vector = torch.linspace(-0.2, 0.2, 128)
    vectors = {f"model.language_model.layers.{layer}.adapter.steer": vector if layer == 1 else torch.zeros(128)
               for layer in range(4)}                                          # as the authors' files: one a layer
    save_file(state | vectors,
              str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder, vector


def test_a_checkpoint_with_a_steering_vector_is_steered(full, policy, contexts, capsys):
    folder, vector = full
    other = common.load_policy(settings(f"--MODEL={folder}", "--BITS=16", *SMALL))
    said = [line for line in capsys.readouterr().out.splitlines() if "steering vector" in line]
    assert len(said) == 1 and said[0].endswith("acts after layer 1")
    assert [len(layer._forward_hooks) for layer in other.lm.layers] == [0, 1, 0, 0]
    ids = [list(range(9, 40))]
    policy.S.LAYER = 1
    mine, = policy.add("phase2", "steer")
    with torch.no_grad():
        mine.copy_(vector)
        assert torch.equal(common.logprobs(policy, contexts[1], ids)[0],
                           common.logprobs(other, contexts[1], ids)[0])


def test_checkpointed_layers_change_no_gradient(full, policy, contexts):
    other = common.load_policy(settings(f"--MODEL={full[0]}", "--BITS=16", *SMALL))
    ids, grads = [list(range(9, 40)), list(range(50, 60))], {}
    for steps in (True, False):
        other.S.MODEL = str(full[0]) if steps else "tiny"
        other.S.LAYER = 2
        params = [*other.add("phase1", "lora"), *other.add("phase2", "steer")]
        for i, p in enumerate(params):
            torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(i))
        other.train_only(params)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = sum(x.mean() for x in common.logprobs(other, contexts[2], ids))
        loss.backward()
        grads[steps] = [p.grad for p in params], sum(kept)
        other.drop("phase2")
        other.drop("phase1")
    assert all(torch.allclose(a, b, atol=1e-6) and a.abs().max() > 0
               for a, b in zip(grads[True][0], grads[False][0]))
    assert grads[True][1] < 0.5 * grads[False][1]                       # and far less is kept


# ================================================================ memory stays flat
def test_memory_stays_flat_over_steps(policy, streams, tmp_path):
    from test_loop import loop, token_reward
    used = []

    def rewards(groups):
        pages = pathlib.Path("/proc/self/statm")                                # Linux; elsewhere the peak
        used.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else
                    int(pages.read_text().split()[1]) * 4096 if pages.exists() else
                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        token_reward(groups)
    loop(policy, tmp_path, streams, rewards, ["--STEPS=26", "--SAVE_EVERY=99", "--OFF_POLICY_STEPS=26"])
    assert len(used) == 26 and max(used[-5:]) - max(used[:6]) < 20 * 2**20, [u >> 20 for u in used]


# ================================================================ several ranks
RANKS = """
import importlib, random, sys
sys.path.insert(0, {root!r})
import torch, common
from pathlib import Path
from support.checkpoint import Training
from support.ranks import gather, is_first_rank
from support.runs import load_streams
phase1 = importlib.import_module("02_phase1_train")
S = common.settings(vars(phase1), [
    "--RUN={run}", "--STEPS=3", "--GROUP=4", "--CONTEXTS=5", "--MINI_BATCH=2", "--KL=0.1", "--OFF_POLICY_STEPS=2",
    "--N_MIN=1", "--LR=1e-2", "--MAX_NEW_TOKENS=24", "--CPU_THREADS=1", "--PRINT_EVERY=1"])
policy, streams, out = common.load_policy(S), load_streams(S, "train"), Path({out!r})
out.mkdir(exist_ok=True)
batch = phase1.RollingBatch(streams, {{}}, seed=S.SEED, size=S.CONTEXTS, window=S.K,
                            off_policy_steps=S.OFF_POLICY_STEPS, n_min=S.N_MIN, n_max=S.N_MAX, resample=S.RESAMPLE)
drawn = gather(common.sample_groups(policy, batch.next(0), 4, (0,)))
watched = common.watch(policy, streams[:3])
def fixed(policy, contexts, n, keys, *how):
    rng = lambda key, j: random.Random(str((key, j)))
    pick = lambda r: [r.randrange(20, 700) for _ in range(r.randrange(3, 20))] + [policy.end]
    return [[common.as_sample(policy, pick(rng(key, j))) for j in range(n)] for key in keys]
common.rollout = fixed
def rewards(groups):
    for s in (s for g in groups for s in g.samples):
        s.reward = s.gate_value = sum(i % 2 == 0 for i in s.ids) / len(s.ids) - 0.5
        s.terms = dict(even=s.reward)
params = policy.add("phase1", "lora")
run = Training(out, params, steps=S.STEPS, lr=S.LR, save_every=S.SAVE_EVERY, grad_clip=S.GRAD_CLIP, batch=batch)
common.grpo(policy, run, batch, rewards, phase1.log_row, reference="base", **phase1.loop_constants(S))
if is_first_rank():
    torch.save(dict(params=[p.detach() for p in params], drawn=[[s.ids for s in g.samples] for g in drawn], \
watched=watched), out / "end.pt")
"""


def test_two_ranks_equal_one_process(toy, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    script, ends = tmp_path / "ranks.py", {}
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}"
        script.write_text(RANKS.format(root=str(ROOT), run=toy, out=str(out)))
        command = [sys.executable, str(script)] if ranks == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        ends[ranks] = torch.load(out / "end.pt")
        assert len((out / "log.csv").read_text().splitlines()) == 4
        assert done.stdout.count("M parameters") == done.stdout.count("\nstep   0 ") == 1, done.stdout
    assert ends[1]["drawn"] == ends[2]["drawn"]
    assert ends[1]["watched"] == ends[2]["watched"]
    watched = sum(ends[1]["watched"].values(), [])
    assert 0 < sum("tries" in row for row in watched) and len(watched) == 18   # some were sampled again
    # The matrices B, zero at the start. Where a gradient is hardly more than rounding, Adam makes a step of it all the
    # same, so single values may differ.
    one, two = [torch.cat([p.flatten() for p in ends[ranks]["params"][1::2]]) for ranks in (1, 2)]
    assert (one - two).norm() < 1e-3 * one.norm() and ((one - two).abs() > 1e-5).float().mean() < 0.01 and one.norm() > 0.1


QUIET = """
import sys
sys.path.insert(0, {root!r})
from support.ranks import progress
import common, tqdm
S = common.settings({{"__doc__": ""}}, {argv!r})
model, *_ = common.load_model(S)
for items in (progress(range(3), "ours"), tqdm.tqdm(range(3), "a library's")):
    list(items)
print("spoken")
assert model.device.type in ("cpu", "cuda")
"""


def test_only_rank_0_speaks_and_draws_bars(full, tmp_path):
    """Also while a library loads a model."""
    argv = [f"--MODEL={full[0]}", "--BITS=16", *SMALL]
    script = tmp_path / "quiet.py"
    script.write_text(QUIET.format(root=str(ROOT), argv=argv))
    running = [subprocess.Popen([sys.executable, str(script)], env=os.environ | {"RANK": rank, "OMP_NUM_THREADS": "1"},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in "01"]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert "spoken" in said[0][0] and "byte plan" in said[0][0]
    assert all(name in said[0][1] for name in ("ours", "a library's", "Loading weights"))
    assert said[1] == ("", "")


def test_gather_puts_parts_in_order(monkeypatch):
    whole = list(range(7))
    monkeypatch.setattr(ranks, "WORLD", 3)
    monkeypatch.setattr(ranks, "join", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_gather_object",
                        lambda parts, mine: parts.__setitem__(slice(None), [whole[r::3] for r in range(3)]))
    assert ranks.gather(whole[0::3]) == whole


# ================================================================ a dense model
@pytest.mark.parametrize("bits", [16, 4])
def test_a_dense_model_takes_the_same_path(bits, contexts, tmp_path):
    """Qwen3-VL 2B, 4B and 8B have no experts: a small one with random weights loads, samples and learns."""
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    token = tokenizer.convert_tokens_to_ids
    text = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=4096,
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[6, 5, 5],
                                     mrope_interleaved=True))
    vision = plan.VISION | dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=64,
                           num_position_embeddings=36, deepstack_visual_indexes=[0])
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        **{f"{x}_token_id": token(f"<|{x}_pad|>") for x in ("image", "video")},
        **{f"vision_{x}_token_id": token(f"<|vision_{x}|>") for x in ("start", "end")}))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = common.load_policy(settings(f"--MODEL={tmp_path}", f"--BITS={bits}", *SMALL))
    groups = common.rollout(policy, contexts[:2], 2, [(0, 0), (0, 1)])
    assert all(s.ids for g in groups for s in g)
    params = policy.add("phase1", "lora")
    policy.train_only(params)
    sum(x.mean() for x in common.logprobs(policy, contexts[1], [s.ids for s in groups[1]])).backward()
    assert all(p.grad is not None for p in params) and any(p.grad.abs().max() > 0 for p in params)


# ================================================================ the measurement that waits for a GPU
def test_the_full_size_measurement_runs_at_small_shapes(tmp_path):
    """So that it needs nothing but the card: the same script, with shapes that a CPU takes."""
    pytest.importorskip("bitsandbytes")
    script = ROOT / "experiments" / "full_size.py"
    if not script.exists():
        pytest.skip("experiments/full_size.py is not here yet")
    out = tmp_path / "full_size.json"
    done = subprocess.run([sys.executable, str(script), "--PARTS=1,2,3,4,5,7", "--SMALL=1", f"--OUT={out}"],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    failed = [(part, name) for part, rows in found.items() for name, row in rows.items() if "error" in row]
    assert not failed and len(found) == 6, done.stdout
    model = found["5 model"]
    assert model["build"]["weights_gib"] > 0 and model["rollout, 1 context x 8"]["rollout_s"] > 0
    assert model["training row, 8 long answers"]["gradient_distance"] < 1e-5
    assert found["4 decoding"]["8 contexts x 8, 200 cached"]["rows_against_repeated"] == 0
    assert found["7 what helps"]["a decode step, 8 x 8"]["fixed_against_usual"] < 1e-5
