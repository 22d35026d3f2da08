"""Pooled ratios and their 95 % intervals, by a bootstrap over streams.

Questions about one stream share its memories, so they are not independent. What is drawn again and
again is the stream, with all of its questions. Each thing that is counted (a reply, a validated
memory) is an object with a `unit`, the name of what it is drawn with, and with a number for
everything that it may be counted as.
"""


def by_stream(row):
    return row["stream"]


def by_question(row):
    """The unit where there are too few streams to draw from: a question, or a validated memory."""
    return f"{row['stream']} {row.get('task', row.get('clip'))}"


class Bootstrap:
    """Draws of units with replacement.

    Every figure uses the same draws, so the difference between two methods is paired by unit.

    groups: lists of units; each list is drawn from by itself (test streams; streams of the recent
    questions). size: how many draws are made, B below. unit_of(row): the unit of a row of the data.
    """

    def __init__(self, groups, size, seed, unit_of=by_stream):
        import numpy as np
        self.unit_of = unit_of
        self.unit = "streams" if unit_of is by_stream else "questions"
        rng = np.random.default_rng(seed)
        units = []
        times = []
        for group in groups:
            if group:
                units += group
                chances = [1 / len(group)] * len(group)
                times.append(rng.multinomial(len(group), chances, size))
        self.column = {unit: i for i, unit in enumerate(units)}
        # (B, units): how often a draw has the unit
        self.times = np.concatenate(times, axis=1).astype(float)

    def ratio(self, counts, part, whole, reference=None):
        """{mean, low, high} of sum(part) / sum(whole); with a reference the lead over it in points.

        counts, reference: what is pooled; part, whole: names of what is summed. Sums are pooled, and
        ratios are not averaged, so that accuracy = coverage x precision. All three are None where
        the whole is 0 (the precision where nothing was covered); low and high also where a single
        unit gives no spread.

        >>> from types import SimpleNamespace
        >>> counts = [SimpleNamespace(unit="a", correct=2, asked=4),
        ...           SimpleNamespace(unit="b", correct=10, asked=12)]
        >>> Bootstrap([["a", "b"]], 9, seed=0).ratio(counts, "correct", "asked")["mean"]
        0.75
        """
        import numpy as np
        values = self.shares(counts, part, whole)                              # (1 + B,)
        if reference is not None:
            values = 100 * (values - self.shares(reference, part, whole))
        if not np.isfinite(values[0]):
            return {"mean": None, "low": None, "high": None}
        figure = {"mean": round(float(values[0]), 6), "low": None, "high": None}
        if np.count_nonzero(self.sums(counts, whole)) > 1:
            low, high = np.nanpercentile(values[1:], [2.5, 97.5]).round(6).tolist()
            figure |= {"low": low, "high": high}
        return figure

    def sums(self, counts, name):
        """(units,) float64: the sum of what is called `name`, for each unit."""
        import numpy as np
        sums = np.zeros(len(self.column))
        for count in counts:
            sums[self.column[count.unit]] += getattr(count, name)
        return sums

    def shares(self, counts, part, whole):
        """(1 + B,): the pooled ratio of the data, then of each draw; nan where it is 0 / 0."""
        import numpy as np
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.totals(counts, part) / self.totals(counts, whole)

    def totals(self, counts, name):
        """(1 + B,): the sum over the data, then over each draw."""
        import numpy as np
        sums = self.sums(counts, name)                                         # (units,)
        return np.concatenate([[sums.sum()], self.times @ sums])
