"""Memories that outgrow the reader: which entries of a stream's memory the one who answers gets to see.

An entry is [start, end, memory], in seconds of the stream, with the stream's name after these where entries of
several are read. Where all entries fit the reader's budget of
tokens, all are read. Of more, those are read that the question is about.
"""
import re

from support.runs import clock

try:
    import numpy as np
except ImportError:                                  # --help works before anything is installed
    np = None

# The share of its relevance that an entry lends to each neighbour. Questions ask what came next, or name a
# span of time, which no entry in the middle of it mentions.
SHARE = 0.5

# Signs of scripts without spaces, such as Thai, Japanese, Chinese and Korean: each is a word.
SIGNS = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"<\w+>|\d+(?::\d\d)+|[{SIGNS}]|[^\W{SIGNS}]+")


def words(text):
    """The words of a text for a search: IDs of faces and times stay whole.

    >>> words("<face_3> waves at 00:01:30.")
    ['<face_3>', 'waves', 'at', '00:01:30']
    """
    return WORD.findall(text.lower())


def printed(entry):
    """An entry as the reader sees it.

    >>> printed([60.0, 70.0, "A cup."]), printed([60.0, 70.0, "A cup.", "kitchen"])
    ('00:01:00-00:01:10\\nA cup.', 'kitchen, 00:01:00-00:01:10\\nA cup.')
    """
    start, end, memory, *stream = entry
    place = "".join(f"{name}, " for name in stream)
    return f"{place}{clock(start)}-{clock(end)}\n{memory}"


def times_in(text):
    """Seconds of the times HH:MM:SS that a text names.

    >>> times_in("Where was <face_3> at 00:01:30?")
    [90]
    """
    times = []
    for hours, minutes, seconds in re.findall(r"(\d+):(\d\d):(\d\d)", text):
        times.append(int(hours) * 3600 + int(minutes) * 60 + int(seconds))
    return times


def starts_at(seconds):
    """A made-up word for the clip that starts at this time. No text holds it, because "=" is in no word."""
    return f"={seconds}"


class Retriever:
    """What the reader sees of one stream, or of several: all memories where they fit, else those most relevant to the
    question.

    Relevance is the BM25 score of an entry as it is printed, times included, and SHARE of its neighbours'
    scores. The index is made once a stream, so a word's rarity and the mean length also count what was
    written after the question. Nothing else of that is used.
    """

    def __init__(self, entries, tokenizer):
        """entries: in the order of time, of several streams one after the other."""
        self.entries = entries
        self.index = None                        # made when memories first exceed the budget
        ids = []
        if entries:
            texts = [printed(entry) + "\n\n" for entry in entries]
            ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        tokens = []
        for entry, tokens_of_entry in zip(entries, ids):
            tokens.append(len(tokens_of_entry) if entry[2] else 0)  # a lost memory is never printed
        self.tokens = np.array(tokens, int)                                           # (n,)
        self.starts = np.array([entry[0] for entry in entries], float)                # (n,) s
        self.ends = np.array([entry[1] for entry in entries], float)                  # (n,) s

    def __call__(self, question, options, time, budget):
        """(entries in the order of time, whether they were retrieved).

        At most `budget` tokens, as printed, of what was written by `time` (s).
        """
        written = np.flatnonzero(self.ends <= time)
        if self.tokens[written].sum() <= budget:
            return [self.entries[i] for i in written], False
        written = written[self.tokens[written] > 0]
        option_texts = [option[2:] for option in options]                # without "A."
        relevance = self.relevance("\n".join([question, *option_texts]))[written]
        after = np.append(relevance[1:], 0)
        before = np.append(0, relevance[:-1])
        score = relevance + SHARE * (after + before)                                  # (written,)
        chosen = []
        shortest = self.tokens[written].min()
        best_first = np.argsort(-score, kind="stable")              # of equals, the earlier comes first
        for i in written[best_first]:
            if budget < shortest:
                break
            if self.tokens[i] <= budget:
                budget -= self.tokens[i]
                chosen.append(i)
        return [self.entries[i] for i in sorted(chosen)], True

    def relevance(self, query):
        """Scores (n,) of all entries. SystemExit where bm25s is missing."""
        if self.index is None:
            self.index = self.make_index()
        searched = words(query)
        for time in times_in(query):
            for i in np.flatnonzero((self.starts <= time) & (time < self.ends)):
                searched.append(starts_at(self.entries[i][0]))      # the clip that a time falls into
        return self.index.get_scores_from_ids(self.index.get_tokens_ids(searched))

    def make_index(self):
        try:
            import bm25s
        except ImportError:
            why = "memories beyond READER_TOKENS need bm25s: pip install bm25s"
            raise SystemExit(why) from None
        index = bm25s.BM25()
        texts = [[*words(printed(entry)), starts_at(entry[0])] for entry in self.entries]
        index.index(texts, show_progress=False)
        return index
