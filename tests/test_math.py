"""The mathematics that is written by hand, against slow plain references and
against the libraries' own code."""
import importlib
import math
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from support.decode import HowToSample, pick                                # noqa: E402
from support import overlay, plan, runs, video, weights                                                        # noqa: E402


NEAR = 1e-5                              # log-probs in fp32 by two ways of computing them


# ================================================================ advantages, gate, losses
def slow_advantages(rewards, gate):
    n, mean = len(rewards), sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / n) ** 0.5
    advantages, counts = [], []
    for i in range(n):
        a = 0.0 if std < 1e-6 else (rewards[i] - mean) / std
        pushed_down_though_good = a < 0 and gate is not None and gate[i] >= 0
        advantages.append(a)
        counts.append(not pushed_down_though_good)
    return advantages, counts


def test_advantages_and_gate_against_a_slow_reference():
    rng, gated = random.Random(0), 0
    for n in (2, 3, 8):
        for _ in range(200):
            rewards = [rng.choice([-1.5, -0.7, -0.5, 0.0, 0.3, 0.5, 0.55]) for _ in range(n)]
            for gate in (None, rewards, [r + rng.choice([-1, 0, 1]) for r in rewards]):
                got, want = common.group_advantages(rewards, gate), slow_advantages(rewards, gate)
                assert got[0] == pytest.approx(want[0]) and got[1] == want[1]
                gated += want[1].count(False)
    assert gated > 100                                             # the cases hold what they are about


@pytest.mark.parametrize("rewards", [[0.5] * 8, [-1.5] * 8, [0.5, 0.5 + 1e-8]])
def test_group_without_variance_has_no_advantage(rewards):
    assert common.group_advantages(rewards, rewards)[0] == [0.0] * len(rewards)


def slow_loss(logp, old, advantages, counts, ratio, clip):
    """Sample by sample, token by token, in float64."""
    total, clipped = 0.0, 0.0
    for new, was, a, counted in zip(logp, old, advantages, counts):
        if not counted or a == 0:
            continue
        if ratio == "gspo":
            mean = sum(n - w for n, w in zip(new, was)) / len(new)
            ratios = [math.exp(mean)]
        else:
            ratios = [math.exp(n - w) for n, w in zip(new, was)]
        terms = []
        for s in ratios:
            limited = min(max(s, 1 - clip[0]), 1 + clip[1])
            terms.append(min(s * a, limited * a))
            clipped += (s > 1 + clip[1] if a > 0 else s < 1 - clip[0]) / len(ratios)
        total -= sum(terms) / len(terms)
    return total / len(logp), clipped / len(logp)


def group(seed, spread, n=6):
    """logp (leaves with gradient), old, advantages, counts of one random group,
    answers of different lengths."""
    rng = np.random.default_rng(seed)
    old = [torch.tensor(-rng.random(t) * 3) for t in rng.integers(1, 9, n)]
    logp = [(o + torch.tensor(rng.normal(rng.normal(0, spread), spread, len(o)))).requires_grad_()
            for o in old]
    return logp, old, *common.group_advantages(rng.normal(size=n).tolist(), rng.normal(size=n).tolist())


@pytest.mark.parametrize("ratio", ["gspo", "grpo"])
def test_policy_loss_and_gradient_against_a_token_loop(ratio):
    clip, seen = (0.2, 0.28), 0
    for seed in range(30):
        logp, old, advantages, counts = group(seed, 0.3)
        loss, clipped = common.policy_loss(logp, old, advantages, counts, ratio, clip)
        plain = [x.detach().tolist() for x in logp]
        want, share = slow_loss(plain, old, advantages, counts, ratio, clip)
        assert loss.item() == pytest.approx(want, abs=1e-9) and clipped == pytest.approx(share, abs=1e-6)
        seen += 0 < share < 1
        loss.backward()
        for i, row in enumerate(plain):                            # central differences, every token
            for t in range(len(row)):
                ends = []
                for step in (1e-6, -1e-6):
                    moved = [list(r) for r in plain]
                    moved[i][t] += step
                    ends.append(slow_loss(moved, old, advantages, counts, ratio, clip)[0])
                slope = (ends[0] - ends[1]) / 2e-6
                got = 0.0 if logp[i].grad is None else logp[i].grad[t].item()
                assert got == pytest.approx(slope, abs=1e-5)
    assert seen > 10                                           # clipped and unclipped samples in one group


@pytest.mark.parametrize("ratio", ["gspo", "grpo"])
def test_ratio_is_one_at_first_and_the_gradient_is_the_plain_policy_gradient(ratio):
    logp, _, advantages, counts = group(1, 0.1)
    loss, clipped = common.policy_loss(logp, [x.detach() for x in logp], advantages, counts, ratio)
    assert clipped == 0 and loss.item() == pytest.approx(-sum(a for a, c in zip(advantages, counts) if c) / 6)
    loss.backward()
    for x, a, c in zip(logp, advantages, counts):
        want = torch.full_like(x, -a / len(x) / 6) if c else None
        assert (x.grad is None and want is None) or torch.allclose(x.grad, want)


@pytest.mark.parametrize("ratio", ["gspo", "grpo"])
def test_clip_higher(ratio):
    """Up to 1.28 the ratio of a good sample counts, beyond it its gradient is gone; for
    a bad one 0.8 is the end."""
    def slope(s, a):
        x = torch.tensor([math.log(s)] * 3, requires_grad=True)
        common.policy_loss([x], [torch.zeros(3)], [a], [True], ratio, (0.2, 0.28))[0].backward()
        return x.grad.sum().item()
    assert slope(1.27, 1.0) == pytest.approx(-1.27, abs=1e-4) and slope(1.29, 1.0) == 0
    assert slope(0.81, -1.0) == pytest.approx(0.81, abs=1e-4) and slope(0.79, -1.0) == 0
    assert (slope(0.5, 1.0) == pytest.approx(-0.5, abs=1e-4)
            and slope(2.0, -1.0) == pytest.approx(2.0, abs=1e-4))


def test_gated_samples_and_flat_groups_have_no_gradient_but_stay_in_the_divisor():
    logp = [torch.zeros(2, requires_grad=True) for _ in range(4)]
    old = [torch.zeros(2)] * 4
    common.policy_loss(logp, old, [1.0, -1.0, -1.0, 1.0], [True, False, True, True])[0].backward()
    assert logp[1].grad is None
    assert logp[0].grad.tolist() == [-0.125, -0.125] and logp[2].grad.tolist() == [0.125, 0.125]
    loss, _ = common.policy_loss(logp, old, [0.0] * 4, [True] * 4)
    assert not getattr(loss, "requires_grad", False) and float(loss) == 0


def test_kl_against_a_token_loop():
    rng = np.random.default_rng(3)
    reference = [torch.tensor(-rng.random(t)) for t in (3, 1, 5)]
    logp = [(r + torch.tensor(rng.normal(0, 0.5, len(r)))).requires_grad_() for r in reference]
    want = 0.0
    for x, r in zip(logp, reference):
        want += sum(math.exp(b - a) - (b - a) - 1 for a, b in zip(x.tolist(), r.tolist())) / len(x) / 3
    kl = common.kl_to(logp, reference)
    kl.backward()
    assert kl.item() == pytest.approx(want) and want > 0
    for x, r in zip(logp, reference):                              # d/dx of exp(r - x) - (r - x) - 1
        assert torch.allclose(x.grad, (1 - (r - x).exp()).detach() / len(x) / 3)
    same = [r.clone().requires_grad_() for r in reference]
    common.kl_to(same, reference).backward()
    assert all(x.grad.abs().max() == 0 for x in same)


def test_dpo_loss_against_numpy_and_its_gradient_signs():
    dpo_loss = importlib.import_module("05_phase2_train").dpo_loss
    rng = np.random.default_rng(4)
    for beta in (0.1, 0.5, 2.0):
        w, l, rw, rl = rng.normal(-20, 4, 4)
        winner, loser = (torch.tensor(x, requires_grad=True) for x in (w, l))
        loss, margin = dpo_loss(winner, loser, torch.tensor(rw), torch.tensor(rl), beta)
        want = beta * ((w - rw) - (l - rl))
        assert margin.item() == pytest.approx(want) and loss.item() == pytest.approx(np.log1p(np.exp(-want)))
        loss.backward()
        assert (winner.grad.item() == pytest.approx(-beta / (1 + np.exp(want)))
                and winner.grad < 0 < loser.grad)
    at_start, _ = dpo_loss(*torch.tensor([-7.0, -9.0, -7.0, -9.0]), beta=0.5)        # policy = reference
    assert at_start.item() == pytest.approx(math.log(2))


# ================================================================ sampling
def slow_pick(logits, u, temperature, top_p, top_k):
    x = np.asarray(logits, dtype=np.float64) / temperature
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    order = np.argsort(-p)
    kept = list(order[:top_k] if top_k else order)
    mass, total, nucleus = 0.0, sum(p[i] for i in kept), []
    for i in kept:
        if mass < top_p:
            nucleus.append(i)
        mass += p[i] / total
    at, goal = 0.0, u * sum(p[i] for i in nucleus)
    for i in sorted(nucleus):
        at += p[i]
        if at > goal:
            return i
    return max(nucleus)


@pytest.mark.parametrize("temperature, top_p, top_k",
                         [(1.0, 1.0, 0), (0.6, 0.95, 20), (2.0, 0.5, 0), (1.0, 1.0, 3)])
def test_pick_against_a_plain_loop_and_the_warpers_of_transformers(temperature, top_p, top_k):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    rng = np.random.default_rng(5)
    logits = torch.tensor(rng.normal(0, 2, (300, 60)), dtype=torch.float32)
    logits[:, 7] = -torch.inf
    u = torch.tensor(rng.random(300))
    got = pick(logits, u, HowToSample(temperature, top_p, top_k))
    assert got.tolist() == [slow_pick(x, v, temperature, top_p, top_k) for x, v in zip(logits, u.tolist())]
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    warped = TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    assert got.tolist() == pick(warped, u, HowToSample()).tolist()
    assert not (got == 7).any()                                    # what has no probability is never picked
    for end in (0.0, 1 - 1e-12):
        token = pick(logits, torch.full((300,), end, dtype=torch.float64),
                     HowToSample(temperature, top_p, top_k))
        assert torch.isfinite(warped.gather(1, token[:, None])).all()


def test_pick_draws_in_proportion():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(10_000, 4)
    share = pick(logits, (torch.arange(10_000) + 0.5) / 10_000, HowToSample()).bincount(minlength=4) / 10_000
    assert share.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=2e-4)


# ================================================================ frames to patches
def stripes(n, h, w):
    i, y, x, c = np.ogrid[:n, :h, :w, :3]
    return ((i * 53 + y * 7 + x * 3 + c * 31 + (x * y) // 5) % 256).astype(np.uint8)


# Made with Qwen3VLVideoProcessor of transformers 5.23.0 and the resize of torchvision 0.28.0 on
#   processor(videos=[frames as (n, 3, h, w)], do_sample_frames=False, cap_pixels_per_frame=False,
#             size={"shortest_edge": 1024, "longest_edge": pixels * n})
# (torchvision's compiled operators stubbed: on the CPU build of torch they don't load). Per case: frames,
# height, width, pixels | grid | sum of the values | sum of the values times their index modulo 97 | grey
# levels (value + 1) * 127.5 of twelve values spread over the array, of the first six and of the last six.
GOLDEN = [
    ((4, 96, 96, 9216), (2, 6, 6), 103.65490404795855, 789.8509482331574,
     [211, 240, 25, 208, 96, 176, 61, 90, 131, 58, 202, 26],
     [0, 3, 6, 9, 12, 15], [50, 72, 94, 116, 138, 160]),
    ((3, 64, 96, 9216), (2, 4, 6), 215.1529452172108, 7291.121740897186,
     [112, 54, 252, 80, 227, 118, 218, 160, 102, 186, 77, 224],
     [0, 3, 6, 9, 12, 15], [221, 236, 252, 11, 27, 43]),
    ((4, 100, 140, 9216), (2, 4, 6), 39.16078704549, -2147.8430845658295,
     [179, 40, 162, 13, 94, 168, 29, 149, 22, 126, 200, 24],
     [3, 7, 12, 16, 20, 25], [51, 93, 129, 159, 194, 226]),
    ((2, 48, 70, 448 * 448), (1, 4, 4), 218.8627492180094, 14525.274646997917,
     [62, 83, 208, 166, 14, 140, 229, 246, 204, 255, 95, 48],
     [0, 3, 7, 10, 13, 17], [208, 222, 235, 255, 31, 2])]


@pytest.mark.parametrize("case, grid, total, weighted, spread, first, last", GOLDEN,
                         ids=["plain", "odd", "smaller", "larger"])
def test_frames_to_patches_gives_the_library_processors_values(case, grid, total, weighted, spread, first,
                                                               last):
    *shape, pixels = case
    got, got_grid = video.frames_to_patches(stripes(*shape), pixels)
    assert got_grid == grid and got.shape == (math.prod(grid), 1536)
    levels = ((got.flatten() + 1) * 127.5).round().int().tolist()
    step = len(levels) // 12
    assert levels[:6] == first and levels[-6:] == last and levels[step // 2::step][:12] == spread
    x = got.double().flatten()
    assert x.sum().item() == pytest.approx(total, abs=1e-2)
    assert (x * (torch.arange(len(x)) % 97)).sum().item() == pytest.approx(weighted, abs=1e-1)


def test_patch_order_and_sizes_are_the_librarys():
    """Live against the library's code: `patchify` is plain torch, `smart_resize` plain Python."""
    library = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    for n, h, w in ((2, 64, 128), (5, 96, 32)):
        frames = stripes(n, h, w)
        x = (torch.tensor(frames).permute(0, 3, 1, 2)[None].float() / 255 - 0.5) / 0.5
        want, *grid = library.Qwen3VLVideoProcessor.patchify(None, x, 16, 2, 2)
        got, got_grid = video.frames_to_patches(frames, 10**6)
        assert got_grid == tuple(grid) and torch.allclose(got, want[0], atol=1e-6)
    rng = random.Random(6)
    for _ in range(500):
        h, w, pixels = rng.randrange(32, 2200), rng.randrange(32, 2200), rng.choice([9216, 448 * 448, 10**6])
        want = library.smart_resize(4, h, w, 2, 32, 1, 4 * pixels)
        assert video.frame_size(h, w, pixels) == want, (h, w, pixels)


# ================================================================ one row for a group: log-probs
def plain_logprobs(policy, context, prompt, ids):
    """Log-probs of one answer by the library's own forward on tokens and pixels: no
    cache of features, no packing."""
    S, patches, grids = policy.S, [], []
    for clip in context.clips:
        x, grid = video.frames_to_patches(
            overlay.clip_frames(clip, S.FRAMES_PER_CLIP)[0], S.FRAME_PIXELS)
        patches.append(x)
        grids.append(grid)
    tokens = torch.cat([prompt.ids, torch.tensor(ids)])[None]
    kinds = torch.cat([prompt.visual.int() * 2, torch.zeros(len(ids), dtype=torch.int)])[None]
    logits = policy.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), mm_token_type_ids=kinds,
                          pixel_values_videos=torch.cat(patches), video_grid_thw=torch.tensor(grids)).logits
    logits = logits[0].float().index_fill(1, policy.banned, -torch.inf)[len(prompt.ids) - 1:-1]
    return logits.log_softmax(-1).gather(1, tokens[0, len(prompt.ids):, None])[:, 0]


def answers(policy, seed, lengths=(1, 7, 30, 12, 2, 21, 5, 16)):
    """Answers of random allowed tokens: what is compared must not depend on what the weights prefer."""
    rng, banned = random.Random(seed), set(policy.banned.tolist())
    allowed = [i for i in range(len(policy.tokenizer)) if i not in banned]
    return [rng.choices(allowed, k=n) for n in lengths]


def noisy_lora(policy):
    """A LoRA that does something: both of its matrices are random."""
    torch.manual_seed(7)
    params = policy.add("phase1", "lora")
    for p in params:
        torch.nn.init.normal_(p, std=0.05)
    return params


def gradients(params, logp):
    for p in params:
        p.grad = None
    sum(x.mean() for x in logp).backward()
    return [p.grad.clone() for p in params]


def test_packed_rows_equal_separate_rows_and_the_librarys_forward(policy, contexts):
    params = noisy_lora(policy)
    policy.train_only(params)
    for i, lengths in ((0, (9, 2)), (2, (1, 7, 20, 4))):           # one clip, and a full window of five
        prompt, ids = policy.prepare([contexts[i]])[0], answers(policy, i, lengths)
        packed = common.logprobs(policy, contexts[i], ids)
        got = gradients(params, packed)
        for other in (lambda a: common.logprobs(policy, contexts[i], [a])[0],
                      lambda a: plain_logprobs(policy, contexts[i], prompt, a)):
            rows = [other(a) for a in ids]
            assert max((x - y).abs().max().item() for x, y in zip(packed, rows)) < NEAR
            want = gradients(params, rows)
            largest = max(g.abs().max().item() for g in want)
            assert largest > 1e-3
            assert max((x - y).abs().max().item() for x, y in zip(got, want)) < NEAR * max(1, largest)


def test_answers_in_a_row_do_not_see_one_another(policy, contexts):
    """Neither company nor order changes an answer's log-probs, and its gradient
    reaches no token of another's."""
    context, (a, *others) = contexts[1], answers(policy, 8)
    with torch.no_grad():
        alone = common.logprobs(policy, context, [a])[0]
        assert (common.logprobs(policy, context, [*others, a])[-1] - alone).abs().max() < NEAR
    table = policy.lm.embed_tokens.weight
    policy.train_only([table])
    mine, its = answers(policy, 9, (20, 20))
    common.logprobs(policy, context, [mine, its])[0].sum().backward()
    touched = set(table.grad.abs().sum(1).nonzero()[:, 0].tolist())
    shared = set(policy.prepare([context])[0].ids.tolist())
    assert touched - shared == set(mine[:-1]) - shared   # the last token is predicted, but predicts nothing
    assert set(its) - set(mine) - shared


def test_banned_tokens_have_no_probability_and_no_gradient(policy, contexts):
    context = contexts[0]
    banned, size = set(policy.banned.tolist()), policy.head.weight.shape[0]
    assert policy.end not in banned
    names = {"<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>"}
    assert set(policy.tokenizer.convert_tokens_to_ids(list(names))) <= banned
    with torch.no_grad():
        first = torch.cat(common.logprobs(policy, context,                     # of every first token
                                          [[v] for v in range(size)]))
    assert first.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert {v for v in range(size) if first[v] == -torch.inf} == banned
    policy.train_only([policy.head.weight])
    sum(x.sum() for x in common.logprobs(policy, context, answers(policy, 10))).backward()
    untouched = set((policy.head.weight.grad.abs().sum(1) == 0).nonzero()[:, 0].tolist())
    assert untouched == banned
    hot = common.rollout(policy, [context] * 2, 8, [(0, 0), (0, 1)], temperature=100.0)    # nearly uniform
    drawn = [i for g in hot for s in g for i in s.ids]
    assert len(drawn) > 200 and not banned & set(drawn)


# ================================================================ one row for a group: rollout
class Noise:
    """Makes `generate` draw as `rollout` does: token t of row j by inverse CDF
    from that row's t-th number."""

    def __init__(self, policy, key, n, start, warpers):
        self.u = np.stack([np.random.default_rng([*key, j]).random(policy.S.MAX_NEW_TOKENS)
                           for j in range(n)])
        self.banned, self.start, self.warpers = policy.banned, start, warpers

    def __call__(self, ids, scores):
        scores = scores.float().index_fill(1, self.banned, -torch.inf)
        for warper in self.warpers:
            scores = warper(ids, scores)
        cdf = scores.double().softmax(-1).cumsum(-1).numpy()
        now = self.u[:, ids.shape[1] - self.start]
        token = [np.searchsorted(c, v * c[-1], side="right") for c, v in zip(cdf, now)]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.tensor(token)[:, None], 0.0)


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.6, top_p=0.95, top_k=20)],
                         ids=["training", "inference"])
def test_rollout_equals_generate_token_for_token(policy, contexts, how):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    warpers = [TemperatureLogitsWarper(0.6), TopKLogitsWarper(20), TopPLogitsWarper(0.95)] if how else []
    noisy_lora(policy)                                             # also with an adapter that does something
    chosen = [contexts[0], contexts[2]]
    prompts, keys = policy.prepare(chosen), [(1, 2, i) for i in range(2)]
    groups = common.rollout(policy, chosen, 8, keys, **how)
    for context, prompt, key, got in zip(chosen, prompts, keys, groups):
        frames = [overlay.clip_frames(c, policy.S.FRAMES_PER_CLIP)[0] for c in context.clips]
        pixels = [video.frames_to_patches(x, policy.S.FRAME_PIXELS) for x in frames]
        out = policy.model.generate(
            input_ids=prompt.ids[None], attention_mask=torch.ones_like(prompt.ids[None]),
            mm_token_type_ids=prompt.visual[None].int() * 2,
            pixel_values_videos=torch.cat([x for x, _ in pixels]),
            video_grid_thw=torch.tensor([g for _, g in pixels]), num_return_sequences=8, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=policy.S.MAX_NEW_TOKENS,
            eos_token_id=policy.end, pad_token_id=policy.end,
            logits_processor=[Noise(policy, key, 8, len(prompt.ids), warpers)])
        for s, row in zip(got, out[:, len(prompt.ids):].tolist()):
            cut = row.index(policy.end) + 1 if policy.end in row else len(row)
            assert s.ids == row[:cut] and s.truncated == (policy.end not in row)
    assert len({tuple(s.ids) for g in groups for s in g}) > 4      # the samples are not all the same


def test_rollouts_do_not_depend_on_their_batch(policy, contexts):
    """Other contexts, their order, the padding they bring and how many samples are drawn change nothing."""
    keys = [(3, i) for i in range(4)]
    ids = lambda groups: [[s.ids for s in g] for g in groups]
    together = ids(common.rollout(policy, contexts, 8, keys))
    assert ids(common.rollout(policy, contexts[::-1], 8, keys[::-1]))[::-1] == together
    assert [ids(common.rollout(policy, [c], 8, [k]))[0] for c, k in zip(contexts, keys)] == together
    assert [g[:3] for g in together] == ids(common.rollout(policy, contexts, 3, keys))
    before = policy.room
    for fewer in (8, 24):
        policy.room = plan.Room(most=fewer)
        try:
            assert ids(common.rollout(policy, contexts, 8, keys)) == together
        finally:
            policy.room = before
    assert ids(common.rollout(policy, contexts, 8, [(4, i) for i in range(4)])) != together


# ================================================================ adapters
def reading(policy, context, ids):
    with torch.no_grad():
        return torch.cat(common.logprobs(policy, context, ids))


def add_steer(policy, layer):
    policy.S.LAYER = layer
    return policy.add("phase2", "steer")


def test_steering_vector(policy, contexts, tmp_path):
    context, ids = contexts[1], answers(policy, 11, (6, 9))
    base = reading(policy, context, ids)
    vector, = add_steer(policy, policy.layers // 2)
    assert (vector.shape == (policy.hidden,)
            and torch.equal(reading(policy, context, ids), base))  # zero: no change
    policy.train_only([vector])
    sum(x.sum() for x in common.logprobs(policy, context, ids)).backward()
    assert vector.grad.abs().max() > 0 and all(p.grad is None for p in policy.model.parameters())
    with torch.no_grad():
        vector.copy_(torch.randn(policy.hidden, generator=torch.Generator().manual_seed(0)))
    steered = reading(policy, context, ids)
    assert (steered - base).abs().max() > 1e-3
    with policy.using("phase1"):
        assert torch.equal(reading(policy, context, ids), base)
    weights.save_adapter(policy, "phase2", tmp_path)
    policy.drop("phase2")
    assert torch.equal(reading(policy, context, ids), base)
    weights.load_adapter(policy, "phase2", tmp_path)
    assert torch.equal(reading(policy, context, ids), steered)
    from safetensors.torch import load_file
    assert list(load_file(str(tmp_path / "steer.safetensors"))) == [
        f"model.language_model.layers.{policy.layers // 2}.adapter.steer"]          # the authors' key


def test_of_an_adapters_vectors_the_zero_ones_are_left_out(policy, contexts, tmp_path):
    """As in the authors' release: one for each layer, all but one of them zero."""
    from safetensors.torch import load_file
    context, ids = contexts[1], answers(policy, 11, (6, 9))
    vector, = add_steer(policy, 1)
    with torch.no_grad():
        vector.fill_(0.1)
    steered = reading(policy, context, ids)
    vectors = {f"model.language_model.layers.{layer}.adapter.steer": torch.full((policy.hidden,), 0.1 * (layer == 1))
               for layer in range(policy.layers)}
    weights.write_tensors(tmp_path / "theirs" / "steer.safetensors", vectors)
    weights.load_adapter(policy, "phase2", tmp_path / "theirs")
    assert policy.steer["phase2"][0] == 1 and torch.equal(reading(policy, context, ids), steered)
    assert sum(len(layer._forward_hooks) for layer in policy.lm.layers) == 1
    weights.save_adapter(policy, "phase2", tmp_path / "ours")
    assert list(load_file(str(tmp_path / "ours" / "steer.safetensors"))) == [
        "model.language_model.layers.1.adapter.steer"]


@pytest.mark.parametrize("kind", ["steer", "lora", "all"])
def test_adapters_beside_each_other(policy, contexts, kind):
    """Each writes as if it were alone, on top of Phase One; one goes, the other stays."""
    context, ids = contexts[1], answers(policy, 11, (6, 9))
    policy.S.LAYER = 1
    draw = torch.Generator().manual_seed(0)

    def add(writer, kind):
        params = policy.add(writer, kind)
        with torch.no_grad():
            for p in params:
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
        return reading(policy, context, ids)

    def of(writer):
        with policy.using(writer):
            return reading(policy, context, ids)
    base = reading(policy, context, ids)
    phase1 = add("phase1", "lora")
    first = add("phase2:first", kind)
    second = add("phase2:the second.", kind)
    assert all((one - other).abs().max() > 1e-3 for one, other in ((base, phase1), (phase1, first), (first, second)))
    for _ in range(2):
        assert torch.equal(of("phase2:first"), first) and torch.equal(of("phase2:the second."), second)
        assert torch.equal(of("phase1"), phase1) and torch.equal(of("base"), base)
    policy.drop("phase2:first")
    assert policy.who == "phase1" and torch.equal(of("phase2:the second."), second)
    policy.drop("phase2:the second.")
    assert torch.equal(of("phase1"), phase1)


def test_steering_is_an_addition_to_one_layers_output(policy, contexts):
    context, ids = contexts[0], answers(policy, 12, (5,))
    last = policy.layers - 1
    seen = {}
    hook = policy.lm.norm.register_forward_hook(lambda m, args, out: seen.update(x=args[0].detach()))
    try:
        reading(policy, context, ids)
        before = seen["x"]
        vector, = add_steer(policy, last)
        vector.data += torch.arange(policy.hidden) / 100
        reading(policy, context, ids)
        assert torch.allclose(seen["x"] - before, vector.detach().expand_as(before), atol=1e-5)
    finally:
        hook.remove()


def test_lora_folder_is_a_peft_folder(policy, contexts, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText
    context, ids = contexts[1], answers(policy, 13, (20,))
    base = reading(policy, context, ids)
    noisy_lora(policy)
    tuned = reading(policy, context, ids)
    assert (tuned - base).abs().max() > 1e-3
    weights.save_adapter(policy, "phase1", tmp_path)
    policy.drop("phase1")
    assert torch.equal(reading(policy, context, ids), base)
    weights.load_adapter(policy, "phase1", tmp_path)
    assert torch.equal(reading(policy, context, ids), tuned)
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(
        runs.ROOT / "tiny" / "base", dtype=torch.float32).eval(), str(tmp_path))
    tokens = torch.tensor([answers(policy, 14, (25,))[0]])    # text alone: LoRA is in the language model
    with torch.no_grad():
        assert (plain(input_ids=tokens).logits - policy.model(input_ids=tokens).logits).abs().max() < 1e-4


def test_second_lora_stands_on_the_first(policy, contexts):
    context, ids = contexts[1], answers(policy, 15, (12, 4))
    first = noisy_lora(policy)
    phase1 = reading(policy, context, ids)
    second = policy.add("phase2", "lora")
    assert torch.allclose(reading(policy, context, ids), phase1, atol=NEAR)        # B = 0 at the start
    torch.nn.init.normal_(second[1], std=0.5)
    policy.train_only(second)
    sum(x.sum() for x in common.logprobs(policy, context, ids)).backward()
    assert all(p.grad is None for p in first) and any(p.grad.abs().max() > 0 for p in second)
    assert (reading(policy, context, ids) - phase1).abs().max() > 1e-4
    with policy.using("phase1"):
        assert torch.equal(reading(policy, context, ids), phase1)
    policy.drop("phase2")
    assert torch.equal(reading(policy, context, ids), phase1)


def test_whole_weights_swap_and_come_back_exactly(policy, contexts, tmp_path):
    context, ids = contexts[1], answers(policy, 16, (12, 4))
    base, before = (reading(policy, context, ids),
                    {n: p.detach().clone() for n, p in policy.model.named_parameters()})
    params = policy.add("phase1", "all")
    assert torch.equal(reading(policy, context, ids), base)
    policy.train_only(params)
    frozen = [n for n, p in policy.model.named_parameters() if not p.requires_grad]
    assert frozen and all("visual" in n or "embed_tokens" in n or "lm_head" in n for n in frozen)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in params:
            p.add_(0.01 * torch.randn_like(p))
    tuned = reading(policy, context, ids)
    assert (tuned - base).abs().max() > 1e-3
    for _ in range(2):
        with policy.using("base"):
            assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())
        assert torch.equal(reading(policy, context, ids), tuned)
    weights.save_adapter(policy, "phase1", tmp_path)
    policy.drop("phase1")
    assert torch.equal(reading(policy, context, ids), base)
    weights.load_adapter(policy, "phase1", tmp_path)
    assert torch.equal(reading(policy, context, ids), tuned)
