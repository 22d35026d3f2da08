"""Attention of the packed row: the G answers to one prompt share its keys and values, in training as in sampling.

A token sees its prompt, and of its own answer what was written up to itself. Two answers a and b of two tokens each,
beside a prompt p of two tokens:

           p p a a b b   <- keys
        p  1                         1  a triangle: the prompt on itself
        p  1 1
        a  2 2 3                     2  a rectangle: all answers on the prompt
        a  2 2 3 3
        b  2 2 . . 3                 3  a triangle for each answer: on itself
        b  2 2 . . 3 3
        ^ queries

Training and prefill compute these parts and nothing else (`PackedAttention`), by torch's own FlashAttention kernels.
A mask (T, T) is never made: at a prompt of 11,000 tokens and 8 answers of 1350 it would have 478 million places, of
which 188 million are needed. A row may hold several groups, one behind the other, that do not see each other.

Sampling adds a token to each answer at a time, and keeps keys and values in a cache (decode.py). There the queries of
a step, few and in any order, see the columns of the cache by a mask (`attention_by_rows`).
"""
from dataclasses import dataclass

from support.ranks import Function, torch

NAME = "packed"                      # under which transformers finds `attention`


# ---------------------------------------------------------------- the row, and who sees whom
@dataclass
class Segments:
    """Where a group lies in a row: a slice of tokens for the prompt, and one for each answer behind it."""
    prompt: slice
    answers: list

    @property
    def all_answers(self):
        last = self.answers[-1] if self.answers else self.prompt
        return slice(self.prompt.stop, last.stop)


def lay_out(groups):
    """Segments of the groups of a row; groups: (tokens of the prompt, [tokens of an answer]) each.

    >>> for segments in lay_out([(2, [2, 2]), (3, [1])]):
    ...     print(segments.prompt, segments.answers)
    slice(0, 2, None) [slice(2, 4, None), slice(4, 6, None)]
    slice(6, 9, None) [slice(9, 10, None)]
    """
    row = []
    end = 0
    for prompt, answers in groups:
        slices = []
        for length in [prompt, *answers]:
            slices.append(slice(end, end + length))
            end += length
        row.append(Segments(slices[0], slices[1:]))
    return row


def share_rows(groups, lengths, limit):
    """Lists of groups that share a row: those that follow each other, while they hold at most `limit` tokens.

    A larger group has a row of its own.

    >>> share_rows(["a", "b", "c", "d", "e"], [2, 1, 4, 2, 1], 3)
    [['a', 'b'], ['c'], ['d', 'e']]
    """
    rows = []
    left = 0
    for group, length in zip(groups, lengths):
        if not rows or length > left:
            rows.append([])
            left = limit
        rows[-1].append(group)
        left -= length
    return rows


def packed_positions(prompt_positions, answers):
    """Positions (3, T) of a group: each answer goes on where the prompt (3, P) ends; answers: lists of token ids."""
    first = prompt_positions.max() + 1
    parts = [prompt_positions]
    for answer in answers:
        places = first + torch.arange(len(answer), device=prompt_positions.device)    # (T_i,)
        parts.append(places.expand(3, -1))
    return torch.cat(parts, dim=1)


def visible(owner_q, owner_k):
    """Who sees whom in sampling: all see the prompt, an answer itself, padding other padding.

    Owners: 0 is the prompt, 1 to G are the answers, -1 is padding. owner_q (R, W), owner_k (R, T)
    -> bool (R, 1, W, T).
    """
    queries = owner_q[:, :, None]                                                     # (R, W, 1)
    keys = owner_k[:, None]                                                           # (R, 1, T)
    return ((keys == 0) | (keys == queries))[:, None]


# ---------------------------------------------------------------- training and prefill: no mask
class PackedAttention(Function):
    """Attention of a row, from triangles and rectangles. q (1, H, T, D); k and v (1, h, T, D), where h divides H.

    A part of the keys gives an output o1 and the logarithm l1 of the sum of its exponentiated scores (lse), another
    part o2 and l2. Over both, l = log(exp l1 + exp l2) and o = exp(l1 - l) o1 + exp(l2 - l) o2, so parts are merged
    without loss. Backward, a kernel finds its weights as exp(score - l): with o and l of the whole it computes
    exactly its part of the gradient, and the parts are added.
    """

    @staticmethod
    def forward(ctx, q, k, v, segments, scale):
        out = torch.empty_like(q)                                                     # (1, H, T, D)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)          # (1, H, T)
        extras = []
        for own in triangles(segments):
            out[:, :, own], lse[:, :, own], extra = flash(q, k, v, own, own, scale, causal=True)
            extras.append(extra)
        for answers, prompt in rectangles(segments):
            out_prompt, lse_prompt, extra = flash(q, k, v, answers, prompt, scale, causal=False)
            out_own = out[:, :, answers]
            lse_own = lse[:, :, answers]
            merged = torch.logaddexp(lse_own, lse_prompt)                             # (1, H, A)
            weight_own = (lse_own - merged).exp()[..., None]
            weight_prompt = (lse_prompt - merged).exp()[..., None]
            out[:, :, answers] = out_own * weight_own + out_prompt * weight_prompt
            lse[:, :, answers] = merged
            extras.append(extra)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments = segments
        ctx.scale = scale
        ctx.extras = extras
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk = torch.empty_like(k)
        dv = torch.empty_like(v)
        extras = iter(ctx.extras)

        def part(queries, keys, causal):
            return flash_backward(
                grad, q, k, v, out, lse, queries, keys, ctx.scale, causal, next(extras))
        # The triangles cover the row, so nothing stays empty; the rectangles add to them.
        for own in triangles(ctx.segments):
            dq[:, :, own], dk[:, :, own], dv[:, :, own] = part(own, own, causal=True)
        for answers, prompt in rectangles(ctx.segments):
            dq_part, dk_part, dv_part = part(answers, prompt, causal=False)
            dq[:, :, answers] += dq_part
            dk[:, :, prompt] += dk_part
            dv[:, :, prompt] += dv_part
        return dq, dk, dv, None, None


def triangles(segments):
    """The prompts and the answers of a row: each sees itself, up to itself."""
    for group in segments:
        for own in (group.prompt, *group.answers):
            if own.start < own.stop:
                yield own


def rectangles(segments):
    """(answers, prompt) of each group: the answers see the whole prompt."""
    for group in segments:
        if group.all_answers.start < group.all_answers.stop:
            yield group.all_answers, group.prompt


def flash(q, k, v, queries, keys, scale, causal):
    """(out (1, H, Q, D), lse (1, H, Q), what the backward kernel wants besides) of some queries on some keys."""
    q = q[:, :, queries]
    k = k[:, :, keys]
    v = v[:, :, keys]
    if q.device.type == "cuda":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *extra = kernel(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse, extra[:6]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(q, k, v, 0.0, causal, scale=scale)
    return out, lse, []


def flash_backward(grad, q, k, v, out, lse, queries, keys, scale, causal, extra):
    """(dq, dk, dv) of some queries on some keys, given out and lse of the whole."""
    grad = grad[:, :, queries]
    q = q[:, :, queries]
    k = k[:, :, keys]
    v = v[:, :, keys]
    out = out[:, :, queries]
    lse = lse[:, :, queries].contiguous()
    if q.device.type == "cuda":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_backward
        lengths = extra[:4]                      # two tables of no use here, the longest query and key
        no_dropout = extra[4:]
        return kernel(grad, q, k, v, out, lse, *lengths, 0.0, causal, *no_dropout, scale=scale)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(grad, q, k, v, out, lse, 0.0, causal, scale=scale)


# ---------------------------------------------------------------- sampling: few queries, a long cache
def attention_by_rows(q, k, v, mask, scale):
    """Attention of a step. q (R, H, W, D); k and v (R, h, T, D); mask from `mask_of_rows` -> (R, H, W, D).

    H / h query heads share a key head, and SDPA takes no mask for shared heads. The library repeats keys and values
    for each query head, which costs more than the attention itself. Here the heads that share become rows, as if
    they were further queries: nothing is copied.
    """
    R, H, W, D = q.shape
    rows = q.reshape(R, k.shape[1], -1, D)                                            # (R, h, H / h * W, D)
    out = torch.nn.functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    return out.reshape(R, H, W, D)


def mask_of_rows(owner_q, owner_k, sharing, dtype):
    """`visible` for `attention_by_rows`, as numbers to add to the scores: (R, 1, sharing * W, T).

    sharing: query heads to a key head. Of booleans, SDPA would make such numbers anew in every layer.
    """
    zero = torch.zeros((), dtype=dtype, device=owner_q.device)
    mask = torch.where(visible(owner_q, owner_k), zero, -torch.inf)                   # (R, 1, W, T)
    return mask.repeat(1, 1, sharing, 1)


# ---------------------------------------------------------------- as transformers calls it
def attention(module, q, k, v, mask, segments=None, cache=None, scaling=None, **usual):
    """The attention of a decoder layer -> (out (B, T, H, D), None).

    `segments` and `cache` are keyword arguments of the decoder's own call, which hands them down. Without either this
    is the library's attention, so that its own functions, such as `generate`, do what they always do.
    """
    if segments is not None:
        if cache is not None:
            cache.fill(module.layer_idx, k, v, segments)
        out = PackedAttention.apply(q, k, v, segments, scaling)
    elif cache is not None:
        k, v = cache.append(module.layer_idx, k, v)
        out = attention_by_rows(q, k, v, mask, scaling)
    else:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **usual)
    return out.transpose(1, 2), None


def use_packed_attention(decoder):
    """Makes `attention` that of a decoder; masks are made as for the library's own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    decoder.config._attn_implementation = NAME
