"""Preferences by the recent questions, and a reward model R(questions, history, memory) fitted on them.

The judge compares the cached memories of every context, once per environment. What survives both orders and
the cycle rule gives one pair per context (for DPO in 05), and it trains R (for the on-policy path of 05): a
LoRA on the frozen base and a scalar head, on text alone, with the preferences of all environments together.

Run again after 03, it judges anew for the environments whose recent questions have changed, over the cache
as it is then. The others keep their contexts, verdicts and pairs. R is trained anew where any has changed.

Differs from the paper: R is ours; among equally long paths, pairs of equal quality come first; samples with
the same text are not judged, as they tie by construction.

Run: python 04_train_reward.py [--NAME=value ...]
     (toy world: 40 s on two cores)
In:  streams/streams.jsonl (01), tasks/recent.json, cache.jsonl (03), and what the judge needs
Out: reward/verdicts/, preferences.jsonl, pairs.jsonl, pairs_trl.jsonl (the same pairs in TRL's preference
     format), contexts.jsonl (what they are about), log.csv, checkpoint.pt, model/, report.json
"""
import random
import sys
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from common import (TASK_PROMPT, F, build_prompt, encoded_text, load_judge, load_policy, np,
                    per_model,
                    settings, stage, torch)
from support import hours
from support.checkpoint import Training, begin_anew_unless, begun_with
from support.hours import Sizes, first_measured, say_plan, sizes_of
from support.judges import Preference
from support.ranks import (gather, gather_sum, is_first_rank, my_share, once, progress,
                           said_once)
from support.runs import (append_jsonl, fingerprint, load_streams, need, next_command, read_json,
                          read_jsonl, read_progress, say_what_is_new, slug, start, write_json,
                          write_jsonl)
from support.text import as_text
from support.weights import check_tensors, read_tensors, save_adapter, write_tensors

collect = stage("03_collect_tasks")

# ---------------------------------------------------------------- per_model(toy world, Qwen3-VL-30B-A3B)
LR = per_model(3e-3, 1e-4)       # of LoRA and head; up over WARMUP steps, then linearly down to 0
STEPS = per_model(200, 400)      # optimizer steps
WARMUP = per_model(10, 20)       # of these, until the full rate
CONTEXTS = per_model(8, 32)      # contexts per step, each with all of its preferences
ROWS = per_model(8, 1)           # contexts per forward pass, bounded by memory; gradients add up
SAVE_EVERY = 50                  # steps between checkpoints
# ---------------------------------------------------------------- the method
RECENT = 5                       # questions that define an environment (paper: 5 to 10)
HISTORY = 1                      # earlier memories that R reads (held out: 0.93 with 4, 0.99 with 
COMPARISONS = 28                 # of two memories of a context at most, per environment; 28: all pairs
                                 # of 8, as the authors (held out, one toy run: 0.93; 16: 0.91, 8: 0.90)
HELD_OUT = 0.25                  # share of the cached streams where R never trains
CHUNK = 64                       # contexts per call of the judge: what is lost with a call
BOOTSTRAP = 1000                 # resamples of the held-out streams for a 95 % interval
GRAD_CLIP = 1.0                  # norm of the gradient at most
# ----------------------------------------------------------------
# All comparisons of an environment begin alike: the local judge reads that once for many of them.
PREFER = Preference("prefer", """These questions were asked lately, and similar ones will come:
{questions}
Find out what they are after. Which of two notes helps more to answer such questions? Answer with \
{{"better": "first"}}, {{"better": "second"}} or {{"better": "tie"}}.
First note: {first!r}
Second note: {second!r}""")


# ================================================================ a graph of preferences for each context
# Nodes are the numbers of a context's samples. An edge (loser, winner) is a preference.
def consistent(edges):
    """The edges outside every strongly connected component (paper, section 3).

    >>> consistent([(0, 1), (1, 2), (2, 0), (2, 3)])       # 0 < 1 < 2 < 0 is a contradiction; 2 < 3 stands
    [(2, 3)]
    """
    above = reachable(edges)
    # An edge lies inside a component where its winner leads back to its loser.
    return [(loser, winner) for loser, winner in edges if loser not in above[winner]]


def reachable(edges):
    """{node: the nodes that it leads to}, by Warshall's algorithm.

    >>> reachable([(0, 1), (1, 2)])
    {0: {1, 2}, 1: {2}, 2: set()}
    """
    above = {}
    for loser, winner in edges:
        above.setdefault(loser, set()).add(winner)
        above.setdefault(winner, set())
    for via in above:
        for node in above:
            if via in above[node]:
                above[node] |= above[via]
    return above


def longest_paths(edges):
    """{(y, x): edges on the longest directed path from y up to x}, for every x that y leads to.

    The edges must hold no cycle: take what `consistent` leaves.

    >>> longest_paths([(0, 1), (1, 2), (0, 2)])            # 0 -> 2 directly, and longer by way of 1
    {(0, 1): 1, (0, 2): 2, (1, 2): 1}
    """
    longest = {}
    ends = set(edges)                            # (first, last) of all paths of `length` edges
    length = 1
    while ends:
        for pair in ends:
            longest[pair] = length
        ends = one_edge_longer(ends, edges)
        length += 1
    return dict(sorted(longest.items()))


def one_edge_longer(ends, edges):
    longer = set()
    for first, last in ends:
        for loser, winner in edges:
            if loser == last:
                longer.add((first, winner))
    return longer


def choose_pair(edges, quality, length):
    """(winner, loser, path) of a context's one pair, or None (paper, section 3).

    quality: 0.5 or -0.5 per sample; length: its memory's tokens. The winner's quality is not below the
    loser's, and not both are low: so the winner is good. The longest path comes first; then equal quality
    (ours: relevance stays first); then the smaller difference in length; then the lower number.

    >>> choose_pair([(0, 1), (1, 2), (0, 2)], [-0.5, 0.5, 0.5], [9, 9, 9])   # the longest path
    (2, 0, 2)
    >>> choose_pair([(0, 2), (1, 2)], [-0.5, 0.5, 0.5], [9, 20, 9])          # equal quality
    (2, 1, 1)
    >>> choose_pair([(0, 2), (1, 2)], [0.5, 0.5, 0.5], [14, 11, 10])         # the closer length
    (2, 1, 1)
    >>> choose_pair([(0, 1)], [0.5, -0.5], [9, 9])                           # the more relevant one is worse
    """
    allowed = []
    for (loser, winner), path in longest_paths(edges).items():
        if quality[winner] > 0 and quality[winner] >= quality[loser]:
            allowed.append((winner, loser, path))

    def best_first(candidate):
        winner, loser, path = candidate
        quality_differs = quality[winner] != quality[loser]
        difference = abs(length[winner] - length[loser])
        return -path, quality_differs, difference, winner, loser
    return min(allowed, key=best_first, default=None)


# ================================================================ verdicts
def agreed(verdict, swapped):
    """What the judge says of two memories in both orders together (paper, section 3).

    swapped: its verdict with the second memory shown first; None after a tie, where it is not asked. "first" and
    "second" count only where both verdicts mean the same memory. 06 takes all that is neither of these nor "failed"
    for a tie.

    >>> agreed("first", "second"), agreed("second", "first")
    ('first', 'second')
    >>> agreed("first", "first"), agreed("first", "tie"), agreed("tie", None), agreed("first", None)
    ('contradicted', 'tied', 'tied', 'failed')
    """
    if "tie" in (verdict, swapped):
        return "tied"
    if verdict is None or swapped is None:
        return "failed"
    return "contradicted" if verdict == swapped else verdict


def comparable(samples, limit=None):
    """Pairs (i, j) worth a verdict: both are well formed and of known quality, and their texts differ.

    limit: pairs of different texts at most, None for all. Samples with the same text share its verdicts.
    """
    formed = []
    for i, sample in enumerate(samples):
        if sample["format"] == 0 and sample["memory"] and sample["quality"] is not None:
            formed.append(i)
    texts = list(dict.fromkeys(samples[i]["memory"] for i in formed))
    compared = [{texts[a], texts[b]} for a, b in around(len(texts))[:limit]]
    pairs = []
    for i, j in combinations(formed, 2):
        if {samples[i]["memory"], samples[j]["memory"]} in compared:
            pairs.append((i, j))
    return pairs


def around(n):
    """All pairs of n things that stand in a circle: first the neighbours, then those with one between them, and so on.

    So the first n of them join all things, and each thing is compared as often as any other.

    >>> around(4)
    [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3)]
    """
    pairs = []
    for distance in range(1, n // 2 + 1):
        # Half way round, each pair comes from both sides.
        starts = distance if 2 * distance == n else n
        pairs += [(i, (i + distance) % n) for i in range(starts)]
    return pairs


def compare(judge, cache, questions, path, chunk, planned=None, limit=None):
    """Per row of the cache its verdicts: [[i, j, what `agreed` says]].

    What the file `path` holds is not asked again, unless a verdict failed: then its chunk is, and a judge that
    keeps its replies asks for what is missing alone. Without a judge a failed verdict stays one. Raises
    SystemExit when the judge fails on most of a chunk; the chunks before it are kept.
    """
    done = {}
    for row in read_progress(path):          # a later row takes the place of an earlier one
        if "verdicts" in row:                # all but the first, see `judged_rows`
            done[row["stream"], row["clip"]] = row["verdicts"]
    firsts = range(0, len(cache), chunk)
    chunks = progress(firsts, f"judge {path.stem}", leave=False)
    for first in first_measured(chunks, len(firsts), planned, f"for {chunk} contexts"):
        rows = cache[first:first + chunk]
        if judge and not all(is_judged(row, done, limit) for row in rows):
            judged = compare_chunk(judge, rows, questions, limit)
            append_jsonl(path, judged)
            for row in judged:
                done[row["stream"], row["clip"]] = row["verdicts"]
    return [done[row["stream"], row["clip"]] for row in cache]


def is_judged(row, done, limit=None):
    """Whether there is a verdict for each pair that is to be compared in a row of the cache."""
    verdicts = done.get((row["stream"], row["clip"]), [])
    judged = [(i, j) for i, j, said in verdicts if said != "failed"]
    return (row["stream"], row["clip"]) in done and judged == comparable(row["samples"], limit)


def compare_chunk(judge, rows, questions, limit=None):
    """Rows {stream, clip, verdicts}. Each rank has its share of the contexts judged."""
    share = my_share(rows)
    pairs = [comparable(row["samples"], limit) for row in share]
    memories = []
    for row, pairs_of_row in zip(share, pairs):
        texts = [sample["memory"] for sample in row["samples"]]
        memories += [(texts[i], texts[j]) for i, j in pairs_of_row]
    said = iter(in_both_orders(judge, questions, memories))
    judged = []
    for row, pairs_of_row in zip(share, pairs):
        verdicts = [[i, j, next(said)] for i, j in pairs_of_row]
        judged.append({"stream": row["stream"], "clip": row["clip"], "verdicts": verdicts})
    judged = gather(judged)
    words = [word for row in judged for _, _, word in row["verdicts"]]
    failed = words.count("failed")
    if failed * 2 > len(words):
        raise SystemExit(said_once(f"the judge failed on {failed} of {len(words)} comparisons; "
                                   "mend it and run the same command again: it goes on from there"))
    return judged


def in_both_orders(judge, questions, pairs):
    """What `agreed` says of each pair of memories. The second order is asked only where the first was no tie."""
    def ask(pairs):
        items = [{"questions": questions, "first": one, "second": two} for one, two in pairs]
        return judge.ask(PREFER, items)
    verdicts = ask(pairs)
    decided = [i for i, verdict in enumerate(verdicts) if verdict not in ("tie", None)]
    swapped = [None] * len(pairs)
    for i, verdict in zip(decided, ask([pairs[i][::-1] for i in decided])):
        swapped[i] = verdict
    return list(map(agreed, verdicts, swapped))


# ================================================================ which contexts, by which questions
LATER = ".later"                 # part of the name of a file of verdicts on held-out contexts


def verdict_file(folder, environment, suffix=""):
    return folder / f"{slug(environment)}{suffix}.jsonl"


def heading(path):
    """The first row of a file of verdicts, {questions, contexts: [[stream, clip]]}; {} without one."""
    rows = read_progress(path)
    return rows[0] if rows and "questions" in rows[0] else {}


def judged_rows(path, questions, rows, kept):
    """The rows of the cache that the verdicts in `path` are about.

    The same questions keep to the contexts that they began with, whatever has become of the cache. Other
    questions begin the file anew, about `rows`. kept: {place: row} of all contexts that are known.
    """
    known = heading(path)
    if known.get("questions") != questions:
        known = {"questions": questions, "contexts": [place_of(row) for row in rows]}
        write_jsonl(path, [known])
    places = places_in(known) - kept.keys()
    if places:
        raise SystemExit(said_once(f"{path} is about {len(places)} contexts that neither 03's cache nor "
                                   "contexts.jsonl beside it holds. Delete it, and they are judged anew"))
    return [kept[tuple(place)] for place in known["contexts"]]


def place_of(row):
    """What names a context of the cache."""
    return row["stream"], row["clip"]


@dataclass
class Case:
    """What is judged: contexts and questions. It tells apart what is new, and what stays from an earlier time."""
    folder: Path                 # of the verdicts
    asked: dict                  # {environment: its recent questions}
    later: dict                  # {environment: those that R is validated by}
    cache: list                  # rows of 03's cache: what new questions are judged on
    test_cache: list             # of these, those that R is validated on
    new: list                    # environments that were never judged
    changed: list                # environments with other questions than at the last time
    same: list                   # environments with the same ones, which keep to their contexts
    settled: list                # of these, those that R has begun to learn from: nothing is asked again
    kept: dict                   # {(stream, clip): row} of the cache, and of what it has lost since
    held_out: set                # (stream, clip) where R never trains


def make_case(out, cache, asked, later, share):
    """The Case of a folder. share: HELD_OUT."""
    held_out = hold_out(cache, share)
    test_cache = [row for row in cache if place_of(row) in held_out]
    case = Case(out / "verdicts", asked, later, cache, test_cache, [], [], [], [], {}, held_out)
    begun = begun_with(out)
    places = set()                               # of all contexts with verdicts
    for environment in asked:
        first = heading(verdict_file(case.folder, environment))
        second = heading(verdict_file(case.folder, environment, LATER))
        tests = places_in(second)
        places |= places_in(first) | tests
        questions = [asked[environment], later[environment]]
        if not first:
            case.new.append(environment)
        elif questions != [first["questions"], second.get("questions")]:
            case.changed.append(environment)
        else:
            case.same.append(environment)
            case.held_out |= tests
            if begun.get("questions", {}).get(environment) == questions:
                case.settled.append(environment)
    case.kept = known_contexts(out / "contexts.jsonl", cache, places)
    return case


def places_in(heading):
    return {(stream, clip) for stream, clip in heading.get("contexts", [])}


def known_contexts(path, cache, places):
    """{place: row} of 03's cache, and of the contexts at `places` that it has lost since `path` was written."""
    rows = {}
    for row in read_progress(path):
        if place_of(row) in places:
            rows[place_of(row)] = row
    for row in cache:
        rows[place_of(row)] = row
    return rows


# ================================================================ preferences and pairs
@dataclass
class JudgedContext:
    """What R learns from: a cached context with its preferences under the questions of an environment."""
    environment: str
    stream: str
    clip: int
    history: list                # memories of the clips before
    memories: list               # of all samples, "" where malformed; no preference names those
    tokens: list                 # of the memories, 0 where malformed
    preferences: list            # (winner, loser), the samples' numbers

    def reading(self, questions):
        return Reading(questions, self.history, self.memories)


@dataclass
class Pair:
    """What DPO learns from: two samples of a cached context."""
    environment: str
    stream: str
    clip: int
    winner: int
    loser: int
    path: int                    # edges between them


@dataclass
class Yield:
    """How many preferences and pairs come of how many comparisons."""
    contexts: int = 0
    compared: int = 0            # pairs of memories
    failed: int = 0              # of these, in one order at least without a verdict
    tied: int = 0                # in one order at least
    contradicted: int = 0        # the two orders name different memories
    cyclic: int = 0              # part of a contradiction among several memories
    preferences: int = 0         # what is left of `compared` without all these
    contexts_with_pair: int = 0

    def add(self, other):
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


def find_preferences(judge, cache, questions, folder, chunk, suffix="", planned=None, limit=None,
                     kept=None, settled=()):
    """(judged contexts that have preferences, pairs, {environment: Yield}).

    cache: rows of cache.jsonl; questions: {environment: [text]}. Verdicts go into a file per environment of
    `folder`. planned: hours for each environment. kept: as `known_contexts` says, None: the cache alone.
    settled: environments of which nothing is asked.
    """
    folder.mkdir(exist_ok=True)
    if kept is None:
        kept = {place_of(row): row for row in cache}
    contexts = []
    pairs = []
    yields = {}
    for environment, asked in questions.items():
        rows = [row for row in cache if environment in row["environments"]]
        file = verdict_file(folder, environment, suffix)
        rows = judged_rows(file, asked, rows, kept)
        who_judges = None if environment in settled else judge
        verdicts = compare(who_judges, rows, asked, file, chunk, planned, limit)
        yields[environment] = Yield()
        for row, verdicts_of_row in zip(rows, verdicts):
            context, pair, counts = learn_from(environment, row, verdicts_of_row)
            yields[environment].add(counts)
            if context.preferences:
                contexts.append(context)
            if pair:
                pairs.append(pair)
    return contexts, pairs, yields


def learn_from(environment, row, verdicts):
    """(JudgedContext, Pair or None, Yield) of one row of the cache."""
    edges = []
    for i, j, said in verdicts:
        if said == "first":
            edges.append((j, i))
        if said == "second":
            edges.append((i, j))
    kept = consistent(edges)
    place = environment, row["stream"], row["clip"]
    memories = [sample["memory"] or "" for sample in row["samples"]]
    tokens = [sample["memory_tokens"] for sample in row["samples"]]
    quality = [sample["quality"] for sample in row["samples"]]
    preferences = [(winner, loser) for loser, winner in kept]
    context = JudgedContext(*place, row["history"], memories, tokens, preferences)
    chosen = choose_pair(kept, quality, tokens)
    pair = Pair(*place, *chosen) if chosen else None
    said = [word for _, _, word in verdicts]
    counts = Yield(
        contexts=1,
        compared=len(verdicts),
        failed=said.count("failed"),
        tied=said.count("tied"),
        contradicted=said.count("contradicted"),
        cyclic=len(edges) - len(kept),
        preferences=len(kept),
        contexts_with_pair=1 if pair else 0)
    return context, pair, counts


def trl_rows(streams, cache, pairs, tokenizer, window):
    """The pairs in TRL's preference format.

    Each clip is one <|video_pad|>, which Qwen3-VL's processor expands into frames and their times;
    pairs.jsonl and streams.jsonl tell which files those are.
    """
    streams = {stream["stream"]: stream for stream in streams}
    cached = {(row["stream"], row["clip"]): row for row in cache}
    rows = []
    for pair in pairs:
        row = cached[pair.stream, pair.clip]
        context = collect.cached_context(streams[pair.stream], row, window)
        one_pad_each = [[(0.0, 1)]] * len(context.clips)
        prompt = build_prompt(context, one_pad_each, tokenizer).replace("<0.0 seconds>", "")
        samples = row["samples"]
        rows.append({"prompt": prompt, "chosen": samples[pair.winner]["text"],
                     "rejected": samples[pair.loser]["text"]})
    return rows


# ================================================================ the reward model
@dataclass
class Reading:
    """What R reads: recent questions, a context's earlier memories, and the memories to be valued."""
    questions: list
    history: list
    memories: list


class RewardModel:
    """R(questions, history, memory): one more writer of the policy, "reward", and a linear head.

    The writer is a LoRA on the base and does nothing while another is switched on. The head reads the output
    at a memory's last token. spread: R's mean standard deviation within a context, the unit of `score`.
    """

    def __init__(self, policy, *, history, rows, folder=None):
        """history: earlier memories that R reads; rows: readings per pass; folder: what `save` wrote."""
        self.policy = policy
        self.history = history
        self.rows = rows
        self.spread = 1.0
        weight = torch.zeros(policy.hidden)
        with policy.using("reward"):                       # afterwards the writer is who it was
            self.params = policy.add("reward", "lora", folder)
        if folder:
            file = folder / "head.safetensors"
            saved = read_tensors(file)
            check_tensors(file, saved, {"weight": weight, "spread": torch.tensor(self.spread)})
            weight = saved["weight"]
            self.spread = float(saved["spread"])
        self.head = torch.nn.Parameter(weight.to(policy.device))                      # (d,)
        self.params.append(self.head)

    def tokens(self, reading):
        """Ids of what a reading's memories share, and a list of the ids of each memory.

        A memory stands where the policy would write it after a task prompt, so the LoRA starts from what the
        base already makes of questions.
        """
        first = max(0, len(reading.history) - self.history)
        earlier = [memory or "(nothing)" for memory in reading.history[first:]]
        content = "\n".join([TASK_PROMPT.strip("\n"), *reading.questions, "", *earlier])
        turn = {"role": "user", "content": as_text(content, self.policy.tokenizer)}
        text = self.policy.tokenizer.apply_chat_template(
            [turn], tokenize=False, add_generation_prompt=True)
        shared = self.ids(text + "\n</think>\n\n")
        memories = [as_text(memory, self.policy.tokenizer) for memory in reading.memories]
        return shared, [self.ids(memory) + [self.policy.end] for memory in memories]

    def ids(self, text):
        return self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __call__(self, readings):
        """R (M,) in fp32 of each reading's memories.

        A reading is a group of a packed row, [shared | m1 | ... | mM], as in the policy's log-probs
        (support/attention.py): a memory sees the shared part and itself.
        """
        prompts = []
        memories = []
        for reading in readings:
            shared, of_reading = self.tokens(reading)
            prompts.append(encoded_text(shared, self.policy.device))
            memories.append(of_reading)
        hidden, segments = self.policy.read(prompts, memories)                        # (T, d)
        values = []
        for group in segments:
            last = [memory.stop - 1 for memory in group.answers]
            values.append(hidden[last].float() @ self.head)                           # (M,)
        return values

    def measure(self, readings):
        """As a call, without gradient and in batches -> an array (M,) per reading."""
        values = []
        with self.policy.using("reward"), torch.no_grad():
            for i in range(0, len(readings), self.rows):
                batch = self(readings[i:i + self.rows])
                values += [R.cpu().numpy() for R in batch]
        return values

    def score(self, questions, history, memories):
        """R of each of one context's memories, in units of `spread`."""
        if not memories:
            return []
        values = self.measure([Reading(questions, history, memories)])[0]             # (M,)
        return [R / self.spread for R in values.tolist()]

    def save(self, folder):
        save_adapter(self.policy, "reward", folder)
        head = {"weight": self.head, "spread": torch.tensor(self.spread)}
        write_tensors(folder / "head.safetensors", head)


def load_reward_model(S, policy):
    """The reward model of runs/RUN (or FROM) as one more adapter on `policy`, whose writer stays on."""
    folder = need(S, "reward/model/head.safetensors").parent
    saved = read_json(need(S, "reward/settings.json"))
    return RewardModel(policy, history=saved["HISTORY"], rows=saved["ROWS"], folder=folder)


# ================================================================ training
# log.csv, a row a step:
#   loss          see `train`
#   accuracy      share of the step's preferences that R orders as the judge does
#   grad_norm     before clipping
#   lr            learning rate
#   seconds       of the step
def train(run, model, contexts, questions, *, seed, batch_size, lr, warmup):
    """Bradley-Terry: the loss is -log sigmoid(R(winner) - R(loser)), a context's mean, then over contexts.

    run: the Training; questions: {environment: [text]}. A step's draws depend on (seed, step) alone.
    """
    model.policy.train_only(model.params)
    for step in run:
        # ---------------- batch
        began = time.time()
        draw = random.Random(f"{seed} {step}")
        batch = draw.sample(contexts, min(batch_size, len(contexts)))
        shown = [some_questions(draw, questions[context.environment]) for context in batch]
        # ---------------- loss
        share = my_share(zip(batch, shown))
        loss = 0.0
        right = []                               # whether R orders a preference as the judge does
        for i in range(0, len(share), model.rows):
            part = share[i:i + model.rows]
            values = model([context.reading(asked) for context, asked in part])       # (M,) each
            losses = []
            for (context, _), R in zip(part, values):
                margin = margins(context.preferences, R)                              # (pairs,)
                losses.append(-F.logsigmoid(margin).mean())                           # ()
                right += (margin > 0).tolist()
            part_loss = sum(losses) / len(batch)                                      # ()
            part_loss.backward()
            loss += part_loss.item()
        # ---------------- update
        rate = learning_rate(step, run.steps, lr, warmup)
        grad_norm = run.optimizer_step(rate)
        # ---------------- log and save
        accuracy = gather_sum(sum(right)) / gather_sum(len(right))
        row = {"step": step, "loss": gather_sum(loss), "accuracy": accuracy, "grad_norm": grad_norm,
               "lr": rate, "seconds": time.time() - began}
        run.log(row, "loss", "accuracy")


def some_questions(draw, questions):
    """One to all of the questions in random order: R shall read what they are after, not how many."""
    count = draw.randint(1, len(questions))
    return draw.sample(questions, count)


def margins(preferences, R):
    """R(winner) - R(loser) of each preference; R (M,) -> (pairs,)."""
    return torch.stack([R[winner] - R[loser] for winner, loser in preferences])


def learning_rate(step, steps, lr, warmup):
    """Up over `warmup` steps, then linearly down to 0."""
    up = (step + 1) / warmup
    down = (steps - step) / max(1, steps - warmup)
    return lr * min(up, 1, down)


# ================================================================ validation
def validate(model, contexts, questions, *, resamples, seed):
    """Figures on held-out contexts, judged and read by held-out questions {environment: [text]}.

    pair_accuracy: on the questions that the judge had; shuffled_accuracy: on those of another environment, so
    it tells how much R reads the questions at all.
    """
    draw = random.Random(seed)
    readings = []
    shuffled = []
    for context in contexts:
        asked = questions[context.environment]
        others = [other for other in questions.values() if other != asked]
        readings.append(context.reading(asked))
        shuffled.append(context.reading(draw.choice(others or [asked])))
    values = model.measure(readings)
    shuffled_values = model.measure(shuffled)
    return {"pair_accuracy": pair_accuracy(contexts, values, resamples, seed),
            "shuffled_accuracy": pair_accuracy(contexts, shuffled_values, resamples, seed),
            "length_correlation": length_correlation(contexts, values),
            "spread": model.spread}


def pair_accuracy(contexts, values, resamples, seed):
    """{mean, low, high}: the share of preferences ordered as by the judge; equal values count half.

    The interval holds 95 % of a bootstrap over streams (over clips of a single one), because preferences of
    one stream are not independent.
    """
    one_stream = len({context.stream for context in contexts}) == 1
    counts = {}                                            # {unit: [right, preferences]}
    for context, R in zip(contexts, values):
        unit = context.stream, context.clip if one_stream else 0
        of_unit = counts.setdefault(unit, [0.0, 0.0])
        for winner, loser in context.preferences:
            of_unit[0] += (1 + np.sign(R[winner] - R[loser])) / 2    # 1 right, 0.5 equal, 0 wrong
            of_unit[1] += 1
    table = np.array([counts[unit] for unit in sorted(counts)])                       # (U, 2)
    n = len(table)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(n, size=(resamples, n))                              # (resamples, U)
    right, preferences = table[drawn].sum(1).T                                        # (resamples,)
    low, high = np.percentile(right / preferences, [2.5, 97.5]).tolist()
    mean = table[:, 0].sum() / table[:, 1].sum()
    return {"mean": float(mean), "low": low, "high": high}


def length_correlation(contexts, values):
    """Correlation of R with the memory's length within contexts: whether R merely rewards long memories."""
    R_centred = []
    tokens_centred = []
    for context, R in zip(contexts, values):
        tokens = np.array(context.tokens)                                             # (M,)
        R = R[tokens > 0]                                  # of the well-formed memories
        tokens = tokens[tokens > 0]
        R_centred.append(R - R.mean())
        tokens_centred.append(tokens - tokens.mean())
    a = np.concatenate(R_centred)
    b = np.concatenate(tokens_centred)
    norms = np.sqrt(a @ a * (b @ b))
    return float(a @ b / max(1e-9, norms))


def mean_spread(contexts, values):
    """Mean over contexts of R's standard deviation over the well-formed memories; 1 where R is constant."""
    deviations = []
    for context, R in zip(contexts, values):
        formed = np.array(context.tokens) > 0
        deviations.append(R[formed].std())
    spread = float(np.mean(deviations))
    return spread if spread > 0 else 1.0


# ================================================================ the stage
LEVERS = ("contexts", "environments", "COMPARISONS")     # lowered where the plan exceeds a day


def work(plan, S, sizes):
    """What this stage does, for the plan (support/hours.py)."""
    asked = S.RECENT * hours.QUESTION
    # The held-out contexts are judged once more, by later questions.
    contexts = round(sizes.contexts * (1 + S.HELD_OUT))
    pairs = min(sizes.comparisons, S.COMPARISONS)
    plan_comparisons(plan, S, round(contexts * sizes.environments * pairs), round(S.CHUNK * pairs))
    plan.steps_begin()
    shared = hours.INSTRUCTION + asked + S.HISTORY * S.MEMORY_TOKENS
    plan.learn("reward model", S.STEPS * S.CONTEXTS, shared, collect.GROUP, S.MEMORY_TOKENS)


def plan_comparisons(plan, S, pairs, at_once):
    """What `in_both_orders` asks about so many pairs, `at_once` in a call, in which all share the questions."""
    calls = round(pairs * (1 + hours.DECIDED))
    plan.judge("judge: prefer", calls, at_once, S.RECENT * hours.QUESTION, 2 * S.MEMORY_TOKENS,
               together=at_once, reasons=False)


def main(argv=None):
    S = settings(globals(), argv)
    if S.PLAN:
        sizes = sizes_of(S, "deploy")
        sizes.contexts = min(sizes.contexts, collect.CACHE_CONTEXTS.full)
        say_plan(S, work, sizes, LEVERS)
        return
    out = start(S, "reward", find_preferences, train, RewardModel.tokens)
    # ---------------- questions, and the contexts that may be learned from
    recent = read_json(need(S, "tasks/recent.json"))
    asked, later = split_questions(recent, S.RECENT)
    streams = load_streams(S, "deploy")
    collect.check_recent(S, streams)
    cache = read_cache(S, streams, recent)
    # ---------------- what is new
    case = make_case(out, cache, asked, later, S.HELD_OUT)
    if case.settled == list(recent) and is_finished(out, case):
        print(f"finished before, with the same recent questions: {out}; "
              f"next: {next_command(S, '05_phase2_train.py')}")
        return
    if case.changed or case.same:
        say_what_is_new({"new": case.new, "changed": case.changed, "as before": case.same})
    # ---------------- judge and plan
    to_judge = len(recent) - len(case.settled)
    comparisons = count_comparisons(cache, S.COMPARISONS) / max(1, len(cache) * len(recent))
    sizes = Sizes("03's cache", len({row["stream"] for row in cache}), len(cache), len(cache),
                  to_judge, comparisons=comparisons)
    planned = say_plan(S, work, sizes, LEVERS)
    judge = load_judge(S, lambda: policy, shows_frames=False) if to_judge else None
    policy = load_policy(S)
    # ---------------- preferences and pairs
    if case.new or case.changed:
        write_jsonl(out / "contexts.jsonl", list(case.kept.values()))
    planned_hours = planned.hours_of("judge", shares=max(1, (1 + S.HELD_OUT) * to_judge))
    found = judge_case(case, judge, S.CHUNK, S.COMPARISONS, planned_hours)
    print_yields(found.yields)
    publish_pairs(S, out, streams, case, found, policy.tokenizer)
    # ---------------- reward model
    if not found.learn or not found.tests:
        say_why_no_reward_model(S, found)
        return
    questions = {name: [asked[name], later[name]] for name in asked}
    begin_anew_unless(out, {"lesson": found.lesson, "questions": questions})
    model = train_reward_model(S, out, policy, found.learn, asked, planned.hours_of_steps())
    report = validate(model, found.tests, later, resamples=S.BOOTSTRAP, seed=S.SEED)
    print_report(report)
    report["yield"] = {environment: vars(counts) for environment, counts in found.yields.items()}
    report["lesson"] = found.lesson
    report["asked"] = asked
    write_json(out / "report.json", report)
    print(f"{len(found.pairs)} pairs and the reward model are in {out}; "
          f"next: {next_command(S, '05_phase2_train.py')}")


@dataclass
class Found:
    """What the verdicts have come to."""
    pairs: list
    preferences: list            # rows of preferences.jsonl
    yields: dict                 # {environment, and "all": Yield}
    learn: list                  # JudgedContexts for R to learn from ...
    tests: list                  # ... and to be validated on
    lesson: str                  # hash of all that R depends on beside the constants


def judge_case(case, judge, chunk, limit, planned=None):
    """Has the case judged, as far as it isn't, except for what is settled -> Found."""
    contexts, pairs, yields = find_preferences(
        judge, case.cache, case.asked, case.folder, chunk,
        planned=planned, limit=limit, kept=case.kept, settled=case.settled)
    tests, _, _ = find_preferences(
        judge, case.test_cache, case.later, case.folder, chunk, LATER,
        limit=limit, kept=case.kept, settled=case.settled)
    yields["all"] = summed(yields)
    learn = [context for context in contexts if place_of(vars(context)) not in case.held_out]
    learned_from = [list(map(vars, learn)), list(map(vars, tests))]
    lesson = fingerprint(case.asked, case.later, learned_from)
    return Found(pairs, preference_rows(contexts), yields, learn, tests, lesson)


def is_finished(out, case):
    """Whether the reward model is of these very verdicts."""
    file = out / "report.json"
    report = once(lambda: read_json(file) if file.exists() else {})
    return bool(report) and report.get("lesson") == judge_case(case, None, chunk=1, limit=0).lesson


def publish_pairs(S, out, streams, case, found, tokenizer):
    """Writes what 05 by DPO reads, and at last by which questions it is."""
    if is_first_rank():
        (out / "pairs_of.json").unlink(missing_ok=True)
    write_jsonl(out / "preferences.jsonl", found.preferences)
    write_jsonl(out / "pairs.jsonl", [vars(pair) for pair in found.pairs])
    cache = list(case.kept.values())
    rows = trl_rows(streams, cache, found.pairs, tokenizer, S.K)
    write_jsonl(out / "pairs_trl.jsonl", rows)
    write_json(out / "pairs_of.json", case.asked)


def read_cache(S, streams, environments):
    """Rows of 03's cache. Each names the environments that may learn from it: all, where no stream is online."""
    rows = read_jsonl(need(S, "tasks/cache.jsonl"))
    if not collect.is_benchmark(streams):
        for row in rows:                         # an environment may be newer than the cache
            row["environments"] = list(environments)
    return [row for row in rows if row["environments"]]


def split_questions(recent, n):
    """({environment: its first n questions}, {environment: the n after them, on which R is validated})."""
    asked = {}
    later = {}
    for environment, tasks in recent.items():
        questions = [task["question"] for task in tasks]
        asked[environment] = questions[:n]
        later[environment] = questions[n:2 * n]
    lacking = [environment for environment in recent if not later[environment]]
    for environment in lacking:
        later[environment] = asked[environment]
    if lacking:
        print("*** too few questions to hold some out: R is validated on those that it learned "
              f"from, of {', '.join(lacking)} ***")
    return asked, later


def hold_out(cache, share):
    """{(stream, clip)} of the last cached streams, a share of all; of the last clips of a single stream."""
    places = sorted((row["stream"], row["clip"]) for row in cache)
    streams = sorted({stream for stream, _ in places})
    if len(streams) == 1:
        return set(last_share(places, share))
    held_out = last_share(streams, share)
    return {(stream, clip) for stream, clip in places if stream in held_out}


def last_share(items, share):
    """The last items, a share of all but at least one."""
    return items[-max(1, round(share * len(items))):]


def count_comparisons(cache, limit=None):
    count = 0
    for row in cache:
        count += len(comparable(row["samples"], limit)) * len(row["environments"])
    return count


def preference_rows(contexts):
    rows = []
    for context in contexts:
        for winner, loser in context.preferences:
            rows.append({"environment": context.environment, "stream": context.stream,
                         "clip": context.clip, "winner": winner, "loser": loser})
    return rows


def summed(yields):
    whole = Yield()
    for counts in yields.values():
        whole.add(counts)
    return whole


def print_yields(yields):
    """A table whose columns `Yield` explains."""
    columns = ["compared", "failed", "tied", "contradicted", "cyclic", "preferences"]
    heads = "".join(f"{name:>14}" for name in columns)
    print(f"  {'':16}{heads}   contexts with a pair (paper: 29.17 %)")
    for environment, counts in yields.items():
        numbers = "".join(f"{getattr(counts, name):14}" for name in columns)
        share = counts.contexts_with_pair / max(1, counts.contexts)
        print(f"  {environment:16}{numbers}   {share:.2%}")


def print_report(report):
    for name, value in report.items():
        if isinstance(value, dict):
            print(f"  {name:20} {value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})")
        else:
            print(f"  {name:20} {value:.3f}")


def say_why_no_reward_model(S, found):
    """SystemExit where there is no pair either."""
    counts = found.yields["all"]
    why = (f"no reward model: preferences in {len(found.learn)} contexts to learn from, in "
           f"{len(found.tests)} to test on; {counts.tied} of {counts.compared} comparisons were ties")
    if not found.pairs:
        sys.exit(why)
    print(f"*** {why}. 05 with dpo has {len(found.pairs)} pairs ***")
    print(f"next: {next_command(S, '05_phase2_train.py')}")


def train_reward_model(S, out, policy, contexts, questions, planned=None):
    """Trains R on judged contexts, saves it in out/model and hands it back."""
    torch.manual_seed(S.SEED)                              # of the LoRA's first values
    model = RewardModel(policy, history=S.HISTORY, rows=S.ROWS)
    count = sum(len(context.preferences) for context in contexts)
    trainable = sum(p.numel() for p in model.params)
    print(f"cost: {S.STEPS} steps x {S.CONTEXTS} of {len(contexts)} contexts with {count} "
          f"preferences; {trainable} trainable parameters")
    run = Training(
        out, model.params, steps=S.STEPS, lr=S.LR, save_every=S.SAVE_EVERY, grad_clip=S.GRAD_CLIP,
        planned=planned)
    with policy.using("reward"):
        train(
            run, model, contexts, questions,
            seed=S.SEED, batch_size=S.CONTEXTS, lr=S.LR, warmup=S.WARMUP)
    some = random.Random(S.SEED).choices(contexts, k=64)
    values = model.measure([context.reading(questions[context.environment]) for context in some])
    model.spread = mean_spread(some, values)
    # Without a report 05 takes the model for none: it may be half the old one and half the new.
    if is_first_rank():
        (out / "report.json").unlink(missing_ok=True)
    model.save(out / "model")
    return model


if __name__ == "__main__":
    main()
