"""The packed row without a mask, against the pass that it stands for: one mask (T, T) for all of it.

The masked pass is the slow reference. It lives here and nowhere in the code.
"""
import doctest
import importlib
import random

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from support import attention, decode, weights                              # noqa: E402

NEAR = 1e-5
ROWS = [[(5, [3, 4, 2])], [(1, [1])], [(9, [2, 1]), (3, [7, 1, 1]), (4, [])], [(6, [0, 3]), (2, [2, 0])]]


# ================================================================ the reference
def mask_of(groups):
    """bool (1, 1, T, T): a token sees, of its own group, the prompt and its own answer, up to itself."""
    owner = []
    for number, (prompt, answers) in enumerate(groups):
        owner += [(number, 0)] * prompt
        for i, length in enumerate(answers, 1):
            owner += [(number, i)] * length
    sees = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for q, (group_q, answer_q) in enumerate(owner):
        for k, (group_k, answer_k) in enumerate(owner[:q + 1]):
            sees[q, k] = group_q == group_k and answer_k in (0, answer_q)
    return sees[None, None]


def masked(q, k, v, mask, scale):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@pytest.fixture
def with_a_mask(policy, monkeypatch):
    """`common` reads rows by the library's own attention and one mask."""
    def switch():
        real = common.lay_out

        def read(groups):
            switch.mask = mask_of(groups)
            return real(groups)
        monkeypatch.setattr(common, "lay_out", read)
        # What the layers get is looked up at each call, also when a checkpointed layer runs again.
        from transformers import AttentionInterface
        AttentionInterface.register("masked", lambda module, q, k, v, mask, segments, cache, scaling=None, **_: (
            masked(q, k, v, switch.mask, scaling).transpose(1, 2), None))
        monkeypatch.setattr(policy.lm.config, "_attn_implementation", "masked")
    return switch


# ================================================================ the kernel
def test_the_example_in_the_docstring_is_true():
    result = doctest.testmod(attention)
    assert result.attempted > 1 and result.failed == 0


def test_the_reference_is_the_picture():
    assert mask_of([(2, [2, 2])])[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1]]


@pytest.mark.parametrize("groups", ROWS)
@pytest.mark.parametrize("heads, key_heads", [(4, 2), (8, 1), (3, 3)])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_parts_give_what_one_mask_gives(groups, heads, key_heads, dtype, near):
    """Output and all three gradients; the layout is transformers' own: (1, T, heads, D), seen transposed."""
    T = mask_of(groups).shape[-1]
    generator = torch.Generator().manual_seed(T + heads)
    q, k, v, grad = (torch.randn(1, T, h, 16, generator=generator).transpose(1, 2)
                     for h in (heads, key_heads, key_heads, heads))
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    mine = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    want = masked(*exact, mask_of(groups), 0.3)
    got = attention.PackedAttention.apply(*mine, attention.lay_out(groups), 0.3)
    assert (got - want).abs().max() < near
    for x, y in zip(torch.autograd.grad(got, mine, grad.to(dtype)), torch.autograd.grad(want, exact, grad)):
        assert (x - y).abs().max() < 4 * near


# ================================================================ in the model
def answers(policy, seed, lengths):
    rng, banned = random.Random(seed), set(policy.banned.tolist())
    allowed = [i for i in range(len(policy.tokenizer)) if i not in banned]
    return [rng.choices(allowed, k=n) for n in lengths]


def learn(params, work):
    """(values, gradients) of a list of tensors."""
    for p in params:
        p.grad = None
    values = [x for x in work()]
    sum(x.mean() for x in values).backward()
    return torch.cat([x.detach().flatten() for x in values]), [p.grad.clone() for p in params]


def equal(mine, reference):
    assert (mine[0] - reference[0]).abs().max() < NEAR
    largest = max(g.abs().max().item() for g in reference[1])
    assert largest > 1e-4
    assert max((x - y).abs().max().item() for x, y in zip(mine[1], reference[1])) < NEAR * max(1, largest)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_log_probs_and_gradients_equal_the_masked_pass(policy, contexts, with_a_mask, monkeypatch, checkpointed):
    params = policy.add("phase1", "lora")
    torch.manual_seed(7)
    for p in params:
        torch.nn.init.normal_(p, std=0.05)
    policy.train_only(params)
    groups = [(contexts[0], answers(policy, 1, (4, 1, 9))), (contexts[2], answers(policy, 2, (12, 3))),
              (contexts[3], answers(policy, 3, (1,)))]
    passes = []
    if checkpointed:
        monkeypatch.setattr(policy.S, "MODEL", "another")          # the toy world's own is not
        policy.model.model.language_model.activation_checkpointing_enable()
    count = policy.lm.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(1))

    def work():
        passes.clear()
        return [x for group in common.logprobs_of_groups(policy, groups) for x in group]
    try:
        mine = learn(params, work)
        assert len(passes) == 1 + checkpointed
        alone = [x for context, ids in groups for x in common.logprobs(policy, context, ids)]
        assert (torch.cat(alone) - mine[0]).abs().max() < NEAR     # company in a row changes nothing
        with_a_mask()
        equal(mine, learn(params, work))
    finally:
        count.remove()
        if checkpointed:
            policy.model.model.language_model.activation_checkpointing_disable()


def test_the_reward_model_equals_its_masked_pass(policy, with_a_mask):
    reward = importlib.import_module("04_train_reward")
    torch.manual_seed(3)
    model = reward.RewardModel(policy, history=3, rows=4)
    try:
        for p in model.params:
            torch.nn.init.normal_(p, std=0.05)
        policy.train_only(model.params)
        readings = [reward.Reading(["What is red?"], ["now, a cup."], ["a blue lamp.", "red."]),
                    reward.Reading(["Who?", "Where?"], [], ["then, <face_1>.", "nobody.", "in the kitchen."])]
        with policy.using("reward"):
            mine = learn(model.params, lambda: model(readings))
            with_a_mask()
            equal(mine, learn(model.params, lambda: model(readings)))
    finally:
        policy.drop("reward")


def test_pairs_of_dpo_in_one_row_equal_the_masked_pass(policy, contexts, with_a_mask):
    phase2 = importlib.import_module("05_phase2_train")
    policy.S.LAYER = 2
    params = policy.add("phase2", "steer")
    torch.nn.init.normal_(params[0], std=0.05)
    policy.train_only(params)
    pairs = [phase2.TokenPair(contexts[i], *answers(policy, i, (9, 6))) for i in (1, 2)]

    def work():
        return [phase2.dpo_loss(*logps, -20.0, -30.0, 0.5)[0] for logps in phase2.sequence_logps(policy, pairs)]
    mine = learn(params, work)
    with_a_mask()
    equal(mine, learn(params, work))


def test_groups_share_rows_and_large_ones_do_not(policy, contexts, monkeypatch):
    groups = [common.Group(context, []) for context in contexts]
    tokens = [policy.prompt_length(context) for context in contexts]
    for limit, rows in ((0, 4), (max(tokens), 3), (sum(tokens), 1)):
        monkeypatch.setattr(policy.S, "ROW_TOKENS", limit)
        packed = common.packed_rows(policy, groups)
        assert len(packed) >= rows and sum(packed, []) == groups
        for row in packed:
            assert len(row) == 1 or sum(policy.prompt_length(g.context) for g in row) <= limit
    assert len(packed) == 1


def test_the_librarys_own_passes_stay_what_they_are(policy):
    """Padding is masked for it, and its own cache works: nothing but `segments` and `cache` changes attention."""
    ids = torch.tensor(answers(policy, 5, (12,)))
    padded = torch.cat([torch.full((1, 3), policy.end), ids], 1)
    with torch.no_grad():
        want = policy.model(input_ids=ids).logits
        mask = (torch.arange(15) >= 3)[None].long()
        positions = (torch.arange(15) - 3).clamp(min=0).expand(3, 1, -1)
        got = policy.model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
        assert (got[:, 3:] - want).abs().max() < 1e-4
        policy.lm.config._attn_implementation = "sdpa"
        try:
            assert torch.equal(policy.model(input_ids=ids).logits, want)
        finally:
            policy.lm.config._attn_implementation = attention.NAME


# ================================================================ sampling
@pytest.mark.parametrize("heads, key_heads", [(4, 2), (8, 1), (32, 4)])
def test_queries_as_rows_are_exact(heads, key_heads):
    """Difference 0.0 to what transformers does, which repeats keys and values for each query head."""
    from types import SimpleNamespace
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    generator = torch.Generator().manual_seed(heads)
    R, W, T = 3, 5, 70
    q = torch.randn(R, W, heads, 16, generator=generator).transpose(1, 2)
    k, v = (torch.randn(R, key_heads, T, 16, generator=generator) for _ in range(2))
    owner_k = torch.randint(-1, W + 1, (R, T), generator=generator)
    owner_q = torch.arange(1, W + 1).expand(R, -1).clone()
    owner_q[1, 3:] = -1                                            # columns of answers that have ended
    owner_k[:, -W:] = owner_q
    mask = attention.visible(owner_q, owner_k)
    module = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    want, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=0.25)
    rows = attention.mask_of_rows(owner_q, owner_k, heads // key_heads, q.dtype)
    assert torch.equal(attention.attention_by_rows(q, k, v, rows, 0.25).transpose(1, 2), want)


def test_the_cache_is_filled_written_and_thinned_out(policy):
    def drawn(*shape):
        return torch.randn(1, 2, *shape, 32)
    cache = decode.Cache(policy.lm, [3, 5, 2], columns=4)
    prompts = [(drawn(n), drawn(n)) for n in (3, 5, 2)]
    for first, some in ((0, prompts[:2]), (2, prompts[2:])):
        cache.first = first
        packed = [torch.cat(both, 2) for both in zip(*some)]
        cache.fill(1, *packed, attention.lay_out([(x.shape[2], []) for x, _ in some]))
    new = [torch.randn(3, 2, 2, 32) for _ in range(2)]
    seen = cache.append(1, *new)
    for both, whole, columns in zip(zip(*prompts), seen, new):
        assert whole.shape == (3, 2, 7, 32) and torch.equal(whole[:, :, 5:], columns)
        for row, prompt in enumerate(both):
            n = prompt.shape[2]
            assert torch.equal(whole[row, :, :n], prompt[0]) and not whole[row, :, n:5].any()
    before = [whole.clone() for whole in seen]
    cache.used += 2
    cache.keep(torch.tensor([0, 2]))
    assert cache.rows == 2
    again = cache.append(1, *(x[[0, 2]] for x in new))
    for whole, old in zip(again, before):
        assert torch.equal(whole[:, :, :7], old[[0, 2]]) and whole.shape[2] == 9
    cache.used = cache.longest                                     # the next answers take their turn
    assert cache.append(1, *(x[[0, 2]] for x in new))[0].shape[2] == 7


def test_a_card_without_the_kernels_is_refused_in_a_sentence():
    weights.refuse_an_old_card("H100", (9, 0))
    with pytest.raises(SystemExit, match=r"T4 has compute capability 7\.5, and attention .* needs 8\.0"):
        weights.refuse_an_old_card("T4", (7, 5))
