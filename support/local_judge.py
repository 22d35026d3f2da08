"""The model itself as the judge: it may reason first, then the likeliest of the allowed replies is its verdict.

A verdict is read off and not written. Questions that are asked together have most of their tokens in common: the frames
of a clip, the questions of an environment, the memories of a stream. In a packed row (attention.py) these stand once,
and each question adds a column: the rest of its own text, its reasoning, and the replies' beginning up to where they
part, such as {"better": ". What the model expects next, of "first", "second" and "tie", is the verdict.

Which token comes where the replies part is all that is asked. The tokens behind it are forced, since no other reply
goes on so, and have no say. So this is the likeliest reply of a model that may write nothing but the allowed replies.
"""
from dataclasses import dataclass, replace

from support.attention import share_rows
from support.ranks import torch
from support.text import as_text

ROW = 16_384             # tokens of a packed row at most: longer ones are hardly faster
OPEN_REPLY = 64          # tokens of a reply where any text counts


class Local:
    """Replies of the policy's base. model: common.LocalModel, so that this file need not know common."""

    def __init__(self, model):
        self.model = model

    def __call__(self, questions, attempt):
        """Replies to questions of one kind: of the allowed ones the likeliest; where any text counts, what the model
        writes.
        """
        policy = self.model.policy
        with policy.using("base"), torch.no_grad():
            reasoned = self.reason(questions, attempt)
            if any(question.replies() is None for question in questions):
                return self.write(reasoned, attempt, OPEN_REPLY)
            return likeliest(policy, reasoned)

    def reason(self, questions, attempt):
        """The questions with their reasoning, which is cut at JUDGE_TOKENS, and closed."""
        policy = self.model.policy
        limit = policy.S.JUDGE_TOKENS
        texts = [""] * len(questions)
        if limit and all(question.judge_prompt.reasons for question in questions):
            texts = self.write(questions, attempt, limit)
        closed = []
        for question, text in zip(questions, texts):
            reasoning = as_text(text.partition("</think>")[0], policy.tokenizer)
            closed.append(replace(question, reasoning=reasoning + "\n</think>\n\n"))
        return closed

    def write(self, questions, attempt, limit):
        """Texts of at most `limit` tokens: the likeliest ones first, in later attempts by chance."""
        keys = [(0, 11, attempt)] * len(questions)
        top_k = 1 if attempt == 0 else 0
        groups = self.model.rollout(questions, 1, keys, limit=limit, top_k=top_k)
        return [sample.text for [sample] in groups]


# ---------------------------------------------------------------- verdicts
@dataclass
class Asked:
    """A question as the model reads it, and what may follow."""
    prompt: object                       # common.EncodedPrompt
    replies: list                        # tuples of ids
    forks: dict                          # see `forks`

    def columns(self, shared):
        """Behind so many tokens that it shares: the rest of the question, once for each fork."""
        rest = self.prompt.ids[shared:].tolist()
        return [rest + list(beginning) for beginning in self.forks]


def likeliest(policy, questions):
    """The likeliest of the allowed replies to each question."""
    replies = []
    for question, values in zip(questions, scores(policy, questions)):
        replies.append(question.judge_prompt.likeliest(question.replies(), values))
    return replies


def scores(policy, questions):
    """Log-probs of the allowed replies to each question, given that one of them is written."""
    found = [None] * len(questions)
    for some in in_order(questions, policy.S.FEATURE_CLIPS):
        asked = encode(policy, [questions[i] for i in some])
        for i, values in zip(some, scores_of(policy, asked)):
            found[i] = values
    return found


def in_order(questions, most):
    """Numbers of the questions: those that begin alike follow each other, in lists about at most so many clips."""
    shown = [repr(question.clips) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: (shown[i], questions[i].text))
    lists = []
    clips = set()
    for i in order:
        clips.add(shown[i])
        if not lists or len(clips) > most:
            lists.append([])
            clips = {shown[i]}
        lists[-1].append(i)
    return lists


def encode(policy, questions):
    known = {}                           # {texts of replies: their ids}; most questions have the same
    asked = []
    for question, prompt in zip(questions, policy.prepare(questions)):
        texts = tuple(question.replies())
        if texts not in known:
            ids = policy.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            known[texts] = [tuple(reply) for reply in ids]
        asked.append(Asked(prompt, known[texts], forks(known[texts])))
    return asked


def forks(replies):
    """{beginning: what may follow it}, wherever replies, tuples of ids, part.

    >>> forks([(7, 1, 9), (7, 2, 9), (7, 3, 9)])
    {(7,): [1, 2, 3]}
    >>> forks([(7, 1, 9), (7, 1, 0, 9), (7, 2, 9)])        # as of 1, 10 and 2
    {(7,): [1, 2], (7, 1): [9, 0]}
    """
    following = {}
    for reply in replies:
        for i, token in enumerate(reply):
            tokens = following.setdefault(reply[:i], [])
            if token not in tokens:
                tokens.append(token)
    return {beginning: tokens for beginning, tokens in following.items() if len(tokens) > 1}


def scores_of(policy, asked):
    """As `scores`, of questions in the order in which they are packed."""
    limit = min(ROW, policy.room.row_tokens())
    groups = share_prompts([question.prompt for question in asked], limit)
    found = []
    for row in share_rows(groups, [group.tokens for group in groups], limit):
        prompts = []
        columns = []
        for group in row:
            prompts.append(beginning_of(asked[group.first].prompt, group.shared))
            columns.append([])
            for question in asked[group.first:group.end]:
                columns[-1] += question.columns(group.shared)
        hidden, segments = policy.read(prompts, columns)                              # (T, d)
        last = [column.stop - 1 for group in segments for column in group.answers]
        logits = iter(policy.logits(hidden[last]))                                    # (columns, V)
        for group in row:
            found += [values_of(question, logits) for question in asked[group.first:group.end]]
    return found


def values_of(question, logits):
    """Log-probs of the replies. logits: an iterator that comes to the question's columns, (V,) each."""
    logp = {}
    for beginning, tokens in question.forks.items():
        of_tokens = next(logits)[tokens].log_softmax(0).tolist()
        logp[beginning] = dict(zip(tokens, of_tokens))
    values = []
    for reply in question.replies:
        value = 0.0
        for i, token in enumerate(reply):
            if reply[:i] in logp:
                value += logp[reply[:i]][token]
        values.append(value)
    return values


# ---------------------------------------------------------------- what questions share
@dataclass
class Group:
    """Questions first to end - 1, which share the first tokens of their prompts."""
    first: int
    end: int
    shared: int
    tokens: int                          # of the shared part and of all that is behind it


def share_prompts(prompts, limit):
    """Groups of prompts that follow each other, of at most `limit` tokens each; a longer prompt stands alone.

    A group ends where two neighbours have less than half in common of what either has in common with its other
    neighbour: otherwise one that hardly fits would make all others repeat what they share.
    """
    alike = [0, *map(in_common, prompts, prompts[1:]), 0]      # with the one before; none before the first
    groups = []
    for i, prompt in enumerate(prompts):
        length = len(prompt.ids)
        fits = alike[i] > 0 and 2 * alike[i] >= max(alike[i - 1], alike[i + 1])
        if fits:
            last = groups[-1]
            shared = min(last.shared, alike[i])
            # What the others no longer share, they repeat.
            tokens = last.tokens + (last.end - last.first - 1) * (last.shared - shared) + length - shared
            fits = tokens <= limit
        if fits:
            groups[-1] = Group(last.first, i + 1, shared, tokens)
        else:
            groups.append(Group(i, i + 1, length - 1, length))
    return groups


def in_common(one, other):
    """How many tokens two prompts begin with alike; 0 where they show different clips. The last one never counts."""
    if list(map(id, one.features)) != list(map(id, other.features)):
        return 0
    length = min(len(one.ids), len(other.ids)) - 1
    same = one.ids[:length] == other.ids[:length]
    return int(same.cumprod(0).sum())


def beginning_of(prompt, tokens):
    """The first tokens of an EncodedPrompt, all its frames among them."""
    return replace(prompt, ids=prompt.ids[:tokens], positions=prompt.positions[:, :tokens],
                   visual=prompt.visual[:tokens])
