"""The figures of 06_eval.py: what is counted, which counts are pooled, and what is put beside what.

A figure is the ratio of two sums with its interval (intervals.py), as {mean, low, high}: a share in
[0, 1], or a lead over another method in points. Counts are pooled over questions; ratios are never
averaged. An examinee is a policy that 06 examines: a method with the adapter or the prompt of one
environment.
"""
from collections import Counter
from dataclasses import dataclass

from support.intervals import Bootstrap, by_question, by_stream


# ---------------------------------------------------------------- counts
@dataclass
class AnswerCount:
    """What one reply adds to the sums. A reply that the judge failed to give adds nothing."""
    unit: str                       # what it is drawn with: its stream
    asked: int = 0
    covered: int = 0                # the reader did not call the memories insufficient
    correct: int = 0
    retrieved: int = 0              # answered from a part of the memories: not all fit the reader


# {figure: (part, whole)}
METRICS = {
    "accuracy": ("correct", "asked"),
    "coverage": ("covered", "asked"),
    "precision": ("correct", "covered"),
}


def count_answer(row, bootstrap):
    count = AnswerCount(bootstrap.unit_of(row))
    if row["reply"] is not None:
        count.asked = 1
        count.covered = int(row["reply"] != "insufficient")
        count.correct = int(row["correct"])
        count.retrieved = int(row.get("retrieved", False))
    return count


@dataclass
class MemoryCount:
    """What one validated memory adds to the sums. What the judge failed on adds nothing."""
    unit: str
    samples: int = 0
    well_formed: int = 0
    faithful: int = 0               # true, and within the budget
    clean: int = 0                  # states nothing that the memory before it states
    fully_right: int = 0            # faithful and clean
    tokens: int = 0                 # of a well-formed memory
    comparisons: int = 0
    wins: int = 0
    ties: int = 0
    losses: int = 0


QUALITY = {
    "win": ("wins", "comparisons"),
    "tie": ("ties", "comparisons"),
    "loss": ("losses", "comparisons"),
    "faithful": ("faithful", "samples"),
    "non_redundant": ("clean", "samples"),
    "fully_right": ("fully_right", "samples"),
    "well_formed": ("well_formed", "samples"),
    "tokens": ("tokens", "well_formed"),
}


def count_memory(row, bootstrap, budget):
    """budget: tokens that a memory may have."""
    count = MemoryCount(bootstrap.unit_of(row))
    if row["faithful"] is not None and row["clean"] is not None:
        is_well_formed = bool(row["memory"])
        is_faithful = row["faithful"] and row["tokens"] <= budget
        count.samples = 1
        count.well_formed = int(is_well_formed)
        count.faithful = int(is_faithful)
        count.clean = int(row["clean"])
        count.fully_right = int(is_faithful and row["clean"])
        count.tokens = row["tokens"] if is_well_formed else 0
    verdicts = Counter(row["verdicts"].values())                   # one for each environment
    count.wins = verdicts["win"]
    count.ties = verdicts["tie"]
    count.losses = verdicts["loss"]
    count.comparisons = count.wins + count.ties + count.losses
    return count


def count_dropped(answers, judged):
    """How much the judge failed to give, in lists of answers and of judged memories."""
    replies = 0
    for rows in answers:
        replies += sum(row["reply"] is None for row in rows)
    verdicts = 0
    for rows in judged:
        for row in rows:
            verdicts += None in (row["faithful"], row["clean"], *row["verdicts"].values())
    return {"replies": replies, "verdicts": verdicts}


# ---------------------------------------------------------------- figures
def draw_units(streams, recent, examined_rows, size, seed):
    """A Bootstrap over the test streams and, apart from them, over the streams of recent questions.

    examined_rows: lists of all that is counted, answers and judged memories.

    With fewer than five test streams it is over questions.
    """
    unit_of = by_stream if len(streams) >= 5 else by_question
    examined = set()
    for rows in examined_rows:
        examined.update(unit_of(row) for row in rows)
    earlier = set()
    for rows in recent.values():
        earlier.update(unit_of(row) for row in rows)
    return Bootstrap([sorted(examined), sorted(earlier - examined)], size, seed, unit_of)


def figures(counts, bootstrap, reference=None, metrics=METRICS):
    """{metric: figure}; with reference counts, the leads over them."""
    found = {}
    for name, (part, whole) in metrics.items():
        found[name] = bootstrap.ratio(counts, part, whole, reference)
    return found


def early_tasks(recent):
    """Names of the tasks that were asked before the update."""
    names = set()
    for tasks in recent.values():
        names.update(task["task"] for task in tasks)
    return names


def summarise(examinees, answers, recent, bootstrap):
    """{rows, gains, transfer}, as results.json has them.

    answers: {slug: rows of 06's `answer`}; recent: {environment: its recent questions, with Phase
    One's replies}.
    """
    table = AnswerTable(examinees, answers, recent, bootstrap)
    rows = []
    gains = {}
    transfer = {}
    for method in table.methods:
        rows += method_rows(table, method, bootstrap)
        gains[method] = method_gains(table, method, bootstrap)
        if has_adapters(method):
            transfer[method] = transfer_matrix(table, method, bootstrap)
    transfer["phase1"] = transfer_matrix(table, "phase1", bootstrap)[""]
    return {"rows": rows, "gains": gains, "transfer": transfer}


class AnswerTable:
    """Counts of all answers, to be pooled by method and environment."""

    def __init__(self, examinees, answers, recent, bootstrap):
        self.environments = list(recent)
        self.methods = list(dict.fromkeys(examinee.method for examinee in examinees))
        # Of later questions: (method, environment of the examinee, environment that asks) -> counts.
        self.after = {}
        # Of the recent questions: environment -> counts, answered by the base and by Phase One (03).
        self.before_by_base = {}
        self.before_by_phase1 = {}
        for environment, tasks in recent.items():
            self.before_by_base[environment] = []
            self.before_by_phase1[environment] = [count_answer(task, bootstrap) for task in tasks]
        early = early_tasks(recent)
        for examinee in examinees:
            for environment in recent:
                self.after[examinee.method, examinee.environment, environment] = []
            for row in answers[examinee.slug]:
                asks = row["environment"]
                count = count_answer(row, bootstrap)
                if row["task"] not in early:
                    self.after[examinee.method, examinee.environment, asks].append(count)
                elif examinee.method == "base":
                    self.before_by_base[asks].append(count)

    def trained_for(self, method, environment):
        """The environment of the examinee that is meant for `environment`; None if there is none."""
        for own in (environment, ""):
            if (method, own, environment) in self.after:
                return own
        return None

    def served(self, method):
        """The environments that a method has an examinee for."""
        return [each for each in self.environments if self.trained_for(method, each) is not None]

    def pool_after(self, method, environments):
        """Counts of the later questions, answered by the examinees that are meant for them."""
        counts = []
        for environment in environments:
            counts += self.after[method, self.trained_for(method, environment), environment]
        return counts

    def pool_before(self, method, environments):
        """Counts of the recent questions. The base answers them itself; Phase One for all others."""
        before = self.before_by_base if method.startswith("base") else self.before_by_phase1
        counts = []
        for environment in environments:
            counts += before[environment]
        return counts


def has_adapters(method):
    return method not in ("base", "phase1") and not method.endswith("+prompt")


def method_rows(table, method, bootstrap):
    """Rows for each environment and for "all" of them, each in the scopes "after" and "all"."""
    served = table.served(method)
    pools = {environment: [environment] for environment in served}
    pools["all"] = served
    # The base answers recent questions in online streams only, so elsewhere it has no scope "all".
    before = table.pool_before(method, table.environments)
    has_before = not method.startswith("base") or any(count.asked for count in before)
    rows = []
    for environment, pooled in pools.items():
        scopes = {"after": table.pool_after(method, pooled)}
        if has_before:
            scopes["all"] = scopes["after"] + table.pool_before(method, pooled)
        for scope, counts in scopes.items():
            rows.append({
                "method": method,
                "environment": environment,
                "scope": scope,
                **figures(counts, bootstrap),
                "questions": sum(count.asked for count in counts),
                "retrieved": sum(count.retrieved for count in counts),
            })
    return rows


def method_gains(table, method, bootstrap):
    """Leads over base and Phase One; mismatched: of adapters where other environments ask."""
    served = table.served(method)
    counts = table.pool_after(method, served)
    gains = {"over_base": None, "over_phase1": None, "mismatched": None}
    for reference in ("base", "phase1"):
        if method != reference:
            others = table.pool_after(reference, served)
            gains[f"over_{reference}"] = figures(counts, bootstrap, others)
    if not has_adapters(method):
        return gains
    mismatched = []
    by_phase1 = []
    for own in served:
        for environment in table.environments:
            counts = table.after[method, own, environment]
            if environment != own and any(count.asked for count in counts):
                mismatched += counts
                by_phase1 += table.pool_after("phase1", [environment])
    if mismatched:
        gains["mismatched"] = figures(mismatched, bootstrap, by_phase1)
    return gains


def transfer_matrix(table, method, bootstrap):
    """{environment of the examinee: {environment that asks: figures}}"""
    matrix = {}
    for (of_method, own, environment), counts in table.after.items():
        if of_method == method:
            matrix.setdefault(own, {})[environment] = figures(counts, bootstrap)
    return matrix


def summarise_validation(examinees, checked, environments, budget, bootstrap):
    """Rows {method, environment, figures of QUALITY}, for each environment and for "all" of them.

    checked: {slug: rows of 06's `validate` or `judge_deployed`}; budget: tokens that a memory may have.
    """
    rows = []
    for method in dict.fromkeys(examinee.method for examinee in examinees):
        for environment in [*environments, "all"]:
            counts = []
            for examinee in examinees:
                if examinee.method == method and environment in ("all", examinee.environment):
                    for row in checked[examinee.slug]:
                        counts.append(count_memory(row, bootstrap, budget))
            if counts:
                quality = figures(counts, bootstrap, metrics=QUALITY)
                rows.append({"method": method, "environment": environment, **quality})
    return rows
