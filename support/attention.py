"""The packed row: G answers to one prompt share the prompt's keys and values, in sampling as in training.

Every token has an owner: 0 is the prompt, 1 to G are the answers, -1 is padding. A token sees the prompt and what
its own answer holds up to itself. Two answers a and b of two tokens each, beside a prompt p of two tokens:

           p p a a b b   <- keys
        p  x
        p  x x
        a  x x x
        a  x x x x
        b  x x . . x
        b  x x . . x x
        ^ queries
"""
from support.ranks import torch


def visible(owner_q, owner_k):
    """Who sees whom, the order of time left aside: all see the prompt, an answer itself, padding other padding.

    owner_q (B, Q), owner_k (B, T) -> bool (B, 1, Q, T).
    """
    queries = owner_q[:, :, None]                                                     # (B, Q, 1)
    keys = owner_k[:, None]                                                           # (B, 1, T)
    return ((keys == 0) | (keys == queries))[:, None]


def packed_owners(prompt_length, answers):
    """Owners (1, T) of the row [prompt | answer 1 | ... | answer G]; answers: lists of token ids."""
    owners = [0] * prompt_length
    for number, answer in enumerate(answers, 1):
        owners += [number] * len(answer)
    return torch.tensor(owners)[None]


def packed_positions(prompt_positions, answers):
    """Positions (3, T) of a packed row: each answer goes on where the prompt (3, P) ends."""
    first = prompt_positions.max() + 1
    parts = [prompt_positions]
    for answer in answers:
        places = first + torch.arange(len(answer), device=prompt_positions.device)    # (T_i,)
        parts.append(places.expand(3, -1))
    return torch.cat(parts, dim=1)


def packed_mask(owners, dtype):
    """The mask (1, 1, T, T) of the picture above, as numbers to add to the attention scores.

    Of booleans, SDPA would make and keep such numbers anew in every layer.
    """
    zero = torch.zeros((), dtype=dtype, device=owners.device)
    return torch.where(visible(owners, owners).tril(), zero, -torch.inf)
