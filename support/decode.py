"""Sampling: n answers beside one prompt, several prompts at a time.

Each prompt is prefilled once and its cache is never copied. Its n answers are columns of one row: at each step the
row has one query per answer still being written, and a query sees the prompt and its own answer (attention.py). A
finished answer leaves the row, and a row whose answers are all finished leaves the batch.
"""
from dataclasses import dataclass

from support.attention import visible
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
    p = (logits.float() / how.temperature).softmax(-1)  # (..., V)
    if 0 < how.top_k < p.shape[-1]:
        least = p.topk(how.top_k).values[..., -1:]  # (..., 1)
        p = p.where(p >= least, 0)
    if how.top_p < 1:
        ranked, order = (p / p.sum(-1, keepdim=True)).sort(-1, descending=True)
        before = ranked.cumsum(-1) - ranked                        # the mass of all likelier tokens
        p = p.scatter(-1, order, ranked.where(before < how.top_p, 0))
    cdf = p.double().cumsum(-1)
    drawn = (cdf <= u[..., None] * cdf[..., -1:]).sum(-1)
    return drawn.clamp(max=p.shape[-1] - 1)


def decode(policy, prompts, noise, how, is_complete):
    """Token ids of n answers to each of B prompts: B lists of n lists.

    prompts: encoded ones (common.EncodedPrompt); noise (B, n, T) in [0, 1), where T is the longest answer;
    is_complete(ids): whether an answer may end here although the end token has not come.
    """
    B, n, _ = noise.shape
    cache, owner, last = prefill(policy, prompts)
    after = torch.stack([prompt.positions.max() + 1 for prompt in prompts])           # (B,)
    answers = [[] for _ in prompts]
    # Where n answers don't fit beside one prompt they take turns, and the cache is cut back in between.
    width = policy.samples_at_once if B == 1 else n
    for i in range(0, n, width):
        part = noise[:, i:i + width]  # (B, W, T)
        hidden = last.expand(-1, part.shape[1], -1)  # (B, W, d)
        columns = Columns(policy, cache, owner, after, part, how, is_complete)
        for row, new in zip(answers, columns.write(hidden)):
            row += new
        if i + width < n:
            cache.crop(owner.shape[1] - cache.get_seq_length())
    return answers


def prefill(policy, prompts):
    """Runs the prompts, padded on the left -> (cache, owners (B, P), hidden (B, 1, d) of the last token)."""
    from transformers import DynamicCache
    owner = pad_left([torch.zeros_like(prompt.ids) for prompt in prompts], -1)
    # Without padding no mask is needed: plain causal attention is the fast way.
    mask = None
    if (owner < 0).any():
        mask = visible(owner, owner).tril()
    cache = DynamicCache(config=policy.lm.config)
    policy.attend(mask)
    positions = pad_left([prompt.positions.T for prompt in prompts])  # (B, P, 3)
    deep_layers = zip(*(prompt.deep for prompt in prompts))
    hidden = policy.lm(
        inputs_embeds=pad_left([prompt.embeds for prompt in prompts]),  # (B, P, d)
        position_ids=positions.permute(2, 0, 1),  # (3, B, P)
        attention_mask=mask,
        visual_pos_masks=pad_left([prompt.visual for prompt in prompts]),  # (B, P)
        deepstack_visual_embeds=[torch.cat(layer) for layer in deep_layers],
        past_key_values=cache, use_cache=True).last_hidden_state  # (B, P, d)
    return cache, owner, hidden[:, -1:]


def pad_left(rows, value=0):
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=value, padding_side="left")


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
        self.closed = set()  # (row, answer) that is complete: its next token is the last

    def write(self, hidden):
        """Answers from hidden (B, n, d), the prompts' last outputs, on."""
        self.policy.attend(self.owner)
        for step in range(self.limit):
            alive = self.append(self.sample(hidden, step))
            if step == self.limit - 1 or not any(alive):
                break
            hidden = self.forward(self.drop_finished_rows(alive), step)
        return self.answers

    def sample(self, hidden, step):
        """Ids (R, W) of the next token of every column."""
        logits = self.policy.head(hidden)  # (R, W, V)
        logits[..., self.policy.banned] = -torch.inf
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
                    if token != self.policy.end and (row, number) not in self.closed:
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
            self.cache.batch_select_indices(index)
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
        return self.policy.lm(
            inputs_embeds=self.policy.lm.embed_tokens(ids), position_ids=positions,
            attention_mask=visible(owner_q, self.owner),
            past_key_values=self.cache, use_cache=True).last_hidden_state
