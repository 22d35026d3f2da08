"""Sampling: n answers beside one prompt, several prompts at a time.

Each prompt is prefilled once, and its keys and values are never copied. Its n answers are columns of one row: at each
step the row has one query per answer still being written, and a query sees the prompt and its own answer
(attention.py). A finished answer leaves the row, and a row whose answers are all finished leaves the batch.
"""
from dataclasses import dataclass

from support.attention import mask_of_rows, share_rows
from support.ranks import torch


@dataclass
class HowToSample:
    """temperature 1, top_p 1 and top_k 0 sample from the model's own distribution. top_k acts before top_p."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def pick(logits, u, how):
    """Token ids by the inverse of the cumulative distribution: one uniform number decides a token.

    So a sample's noise depends neither on its batch nor on the order of work. logits (..., V), u (...) in [0, 1)
    -> ids (...).
    """
    p = (logits / how.temperature).softmax(-1)  # (..., V)
    ranked = p                                                     # what may be left, the likeliest first
    if 0 < how.top_k < p.shape[-1]:
        ranked = p.topk(how.top_k).values  # (..., k)
        p = p.where(p >= ranked[..., -1:], 0)
    if how.top_p < 1:
        ranked = ranked.sort(-1, descending=True).values
        share = ranked / ranked.sum(-1, keepdim=True)
        before = share.cumsum(-1) - share                          # the mass of all likelier tokens
        count = (before < how.top_p).sum(-1, keepdim=True)
        p = p.where(p >= ranked.gather(-1, count - 1), 0)
    cdf = p.double().cumsum(-1)
    drawn = (cdf <= u[..., None] * cdf[..., -1:]).sum(-1)
    return drawn.clamp(max=p.shape[-1] - 1)


def decode(policy, prompts, noise, how, is_complete, width):
    """Token ids of n answers to each of B prompts: B lists of n lists.

    prompts: encoded ones (common.EncodedPrompt); noise (B, n, T) in [0, 1), where T is the longest answer;
    is_complete(ids): whether an answer may end here although the end token has not come; width: how many answers
    to a prompt are written side by side. Where these are not all n, B is 1, and they take turns.
    """
    n, limit = noise.shape[1:]
    lengths = [len(prompt.ids) for prompt in prompts]
    cache = Cache(policy.lm, lengths, columns=min(width, n) * limit)
    last = prefill(policy, prompts, cache)                                            # (B, 1, d)
    owner = pad_right([torch.zeros_like(prompt.ids) for prompt in prompts], -1)       # (B, P)
    after = torch.stack([prompt.positions.max() + 1 for prompt in prompts])           # (B,)
    answers = [[] for _ in prompts]
    for i in range(0, n, width):
        cache.used = cache.longest
        part = noise[:, i:i + width]                                                  # (B, W, T)
        hidden = last.expand(-1, part.shape[1], -1)                                   # (B, W, d)
        columns = Columns(policy, cache, owner, after, part, how, is_complete)
        for row, new in zip(answers, columns.write(hidden)):
            row += new
    return answers


def prefill(policy, prompts, cache):
    """Fills the cache with prompts -> hidden (B, 1, d) of the last token of each.

    Small prompts share a pass. A large one has its own, so that memory holds the activations of one.
    """
    last = []
    lengths = [len(prompt.ids) for prompt in prompts]
    for some in share_rows(prompts, lengths, policy.S.ROW_TOKENS):
        cache.first = len(last)
        hidden, segments = policy.read(some, [[]] * len(some), cache)                 # (T, d)
        # A view would hold on to all of `hidden`.
        last += [hidden[group.prompt.stop - 1].clone() for group in segments]
    return torch.stack(last)[:, None]


def pad_right(rows, value):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


class Cache:
    """Keys and values: in each row those of a prompt, and behind the longest prompt those of all answers' tokens.

    Room for all is taken at once and written in place. A cache that grows by concatenation is copied whole for
    every token. A prompt shorter than the longest leaves a gap in its row, which has no owner.
    """

    def __init__(self, lm, lengths, columns):
        """lengths: of the prompts; columns: so many tokens are added to each."""
        config = lm.config
        like = lm.embed_tokens.weight
        tokens = max(lengths) + columns
        shape = len(lengths), config.num_key_value_heads, tokens, config.head_dim     # (R, h, T, D)
        # Zeros, because what happens to lie in a gap may be NaN, and a weight of 0 times NaN is NaN.
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape))
                       for _ in range(config.num_hidden_layers)]
        self.longest = max(lengths)
        self.first = 0                       # row of the first prompt of a pass
        self.rows = len(lengths)
        self.used = self.longest             # tokens, so far

    def fill(self, layer, keys, values, segments):
        """Puts the prompts of a packed row, keys and values (1, h, T, D), into rows of their own."""
        for room, new in zip(self.layers[layer], (keys, values)):
            for row, group in enumerate(segments, self.first):
                of_prompt = new[0, :, group.prompt]                                   # (h, P, D)
                room[row, :, :of_prompt.shape[1]] = of_prompt

    def append(self, layer, keys, values):
        """Writes columns (R, h, W, D) -> keys and values (R, h, T, D) so far. `used` moves once all layers have."""
        end = self.used + keys.shape[2]
        seen = []
        for room, new in zip(self.layers[layer], (keys, values)):
            room[:self.rows, :, self.used:end] = new
            seen.append(room[:self.rows, :, :end])
        return seen

    def keep(self, rows):
        """Of all rows these remain, in this order."""
        self.rows = len(rows)
        for both in self.layers:
            for room in both:
                room[:len(rows), :, :self.used] = room[rows, :, :self.used]


class Columns:
    """The answers that are being written side by side, on a filled cache.

    rows: the prompts still in the batch; who (R, W): which answer a column belongs to, -1 where none does.
    """
    def __init__(self, policy, cache, owner, after, noise, how, is_complete):
        self.policy = policy
        self.cache = cache
        self.owner = owner                   # (R, T)
        self.after = after                   # (R,) position of the first new token
        self.noise = noise                   # (B, n, T)
        self.how = how
        self.is_complete = is_complete
        B, n, self.limit = noise.shape
        self.rows = list(range(B))
        self.who = torch.arange(n, device=noise.device).expand(B, n)
        self.answers = [[[] for _ in range(n)] for _ in range(B)]
        self.closed = set()  # (row, answer) that is complete: white space may follow, or one other token

    def write(self, hidden):
        """Answers from hidden (B, n, d), the prompts' last outputs, on."""
        for step in range(self.limit):
            alive = self.append(self.sample(hidden, step))
            if step == self.limit - 1 or not any(alive):
                break
            hidden = self.forward(self.drop_finished_rows(alive), step)
        return self.answers

    def sample(self, hidden, step):
        """Ids (R, W) of the next token of every column."""
        logits = self.policy.logits(hidden)  # (R, W, V)
        u = self.noise[self.rows, :, step].gather(1, self.who.clamp(min=0))  # (R, W)
        return pick(logits, u, self.how)

    def append(self, ids):
        """Adds the tokens to their answers -> per row the (answer, token) pairs that go on."""
        alive = []
        for row, numbers, tokens in zip(self.rows, self.who.tolist(), ids.tolist()):
            going_on = []
            for number, token in zip(numbers, tokens):
                if number >= 0:
                    self.answers[row][number].append(token)
                    may_go_on = (row, number) not in self.closed or token in self.policy.blank
                    if token != self.policy.end and may_go_on:
                        going_on.append((number, token))
            for number, token in going_on:
                if token in self.policy.closing and self.is_complete(self.answers[row][number]):
                    self.closed.add((row, number))
            alive.append(going_on)
        return alive

    def drop_finished_rows(self, alive):
        unfinished = [r for r, going_on in enumerate(alive) if going_on]
        if len(unfinished) < len(self.rows):
            index = torch.tensor(unfinished, device=self.owner.device)
            self.cache.keep(index)
            self.owner = self.owner[index]
            self.after = self.after[index]
            self.rows = [self.rows[r] for r in unfinished]
        return [alive[r] for r in unfinished]

    def forward(self, alive, step):
        """Runs the tokens just sampled -> hidden (R, W, d)."""
        width = max(len(going_on) for going_on in alive)
        padded = []
        for going_on in alive:
            missing = width - len(going_on)
            padded.append(going_on + [(-1, self.policy.end)] * missing)
        pairs = torch.tensor(padded, device=self.owner.device)  # (R, W, 2)
        self.who, ids = pairs.unbind(-1)  # (R, W) each
        owner_q = torch.where(self.who < 0, -1, self.who + 1)  # (R, W)
        self.owner = torch.cat([self.owner, owner_q], 1)  # (R, T)
        positions = (self.after + step)[None, :, None].expand(3, -1, width)  # (3, R, W)
        lm = self.policy.lm
        embeds = lm.embed_tokens(ids)  # (R, W, d)
        sharing = lm.config.num_attention_heads // lm.config.num_key_value_heads
        hidden = lm(
            inputs_embeds=embeds, position_ids=positions, cache=self.cache, use_cache=False,
            attention_mask=mask_of_rows(owner_q, self.owner, sharing, embeds.dtype)
        ).last_hidden_state
        self.cache.used += width
        return hidden
