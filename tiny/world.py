"""The toy world: short streams of little pictures whose facts are known, so that a judge can be exact.

A stream is a row of 10 s clips. Each clip holds eight facts in six categories (place, wear, action, object,
count, speech), drawn on 96 x 96 pixels; a memory is a sentence of a controlled language that states some:

    still, <face_3> wears red, a blue lamp, <face_4> says 'tea noon'.

"still" connects a memory to the one before, "now" begins where there is none. The budget of a memory holds
three of the eight facts, so what to write is a real choice. Tasks are multiple-choice questions about single
clips and neighbouring ones, one environment (kind of question) per category. The judge knows the facts of a
clip, as a video judge sees the video; its reader gets the memory texts and the question and nothing else.

Needs numpy, and Pillow and PyAV for pictures and mp4 files; no torch.
"""
import random
import re
from collections import namedtuple
from dataclasses import dataclass

from support.ranks import progress
from support.runs import write_jsonl, written_aside
from support.video import has_decord

# ----------------------------------------------------------------
CELL = 32                 # px; one cell is one vision token (patch 16, merge 2)
SIDE = 3 * CELL           # px; a frame is 3 x 3 cells
FPS = 2                   # stored frames per second
CLIP_SECONDS = 10         # so 20 stored frames per clip
CLIPS = 12                # clips per stream
DAY = 86400               # s
CAST = 4                  # people per stream, two of them in each clip
PLACE_STAYS = 0.5         # chance that the next clip is at the same place
PERSON_STAYS = 0.6        # chance that a person is there in the next clip too
FACT_STAYS = 0.25         # chance that object, count, coat or action stays: a temptation to repeat
FACTS_PER_MEMORY = 3      # what the token budget of a memory holds
MULTI_SHARE = 0.25        # share of questions that need several clips
# ----------------------------------------------------------------

CATEGORIES = ("place", "wear", "action", "object", "count", "speech")
PLACES = ("kitchen", "garden", "office", "library", "garage", "bedroom")
COLOURS = {
    "red": (214, 32, 32),
    "green": (30, 150, 50),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 30),
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "pink": (255, 110, 190),
}
OBJECTS = ("lamp", "cup", "book", "clock", "key", "tent", "kite", "tree")
ACTIONS = ("waving", "sitting", "jumping", "pointing", "reading", "sleeping", "cooking")
NUMBERS = ("one", "two", "three", "four", "five", "six")
FIRST = ("tea", "cat", "sun", "jam", "oil", "fog", "map", "hat", "egg", "rug", "pie", "zoo")
SECOND = ("noon", "west", "left", "soon", "deep", "kind", "half", "back", "much", "grow", "play",
          "exit")
SPLITS = ("train", "deploy", "test", "base")     # "base": streams that made the base model

# who: the digit of a face ID, "" where nobody is named
Fact = namedtuple("Fact", "category who value")

def one_of(words):
    """A regular expression for any of these words."""
    return f"(?:{'|'.join(words)})"


# One phrase per category, in exactly this form; everything else is not part of the language.
FACE = "<face_(?P<who>[1-9])>"
GRAMMAR = {
    "place": f"in the (?P<value>{one_of(PLACES)})",
    "wear": f"{FACE} wears (?P<value>{one_of(COLOURS)})",
    "action": f"{FACE} is (?P<value>{one_of(ACTIONS)})",
    "object": f"a (?P<value>{one_of(COLOURS)} {one_of(OBJECTS)})",
    "count": f"exactly (?P<value>one(?= ball$)|{one_of(NUMBERS[1:])}(?= balls$)) balls?",
    "speech": f"{FACE} says '(?P<value>{one_of(FIRST)} {one_of(SECOND)})'",
}


# ---------------------------------------------------------------- facts and the controlled language

def stream_seed(seed, split, index):
    """The seed of a stream (index < 1,000,000). Splits use disjoint ranges: no two share a stream."""
    return (seed * len(SPLITS) + SPLITS.index(split)) * 1_000_000 + index


def make_stream(seed, clips=CLIPS):
    """The truth of a stream: a list of JSON dicts, one per clip, with eight facts and its looks.

    {"place", "people": {digit: {"wear", "action"}}, "object": "red lamp", "count": "three",
     "speech": [digit, "tea noon"], "cells": what the three top cells show, left to right,
     "seats": the digit or "" of each middle cell, "jitter": 0..2**30}
    """
    rng = random.Random(seed)

    def another(values, last):
        return rng.choice([value for value in values if value != last])

    def again_or_another(values, last):
        if last and rng.random() < FACT_STAYS:
            return last
        return another(values, last)

    objects = [f"{colour} {shape}" for colour in COLOURS for shape in OBJECTS]
    speeches = [f"{first} {second}" for first in FIRST for second in SECOND]
    cast = rng.sample("123456789", CAST)
    cells = rng.sample(["place", "object", "count"], 3)
    truth = []
    last = {}
    for _ in range(clips):
        before = last.get("people", {})
        people = [who for who in before if rng.random() < PERSON_STAYS]
        absent = [who for who in cast if who not in before]
        people += rng.sample(absent, 2 - len(people))
        if last and rng.random() < PLACE_STAYS:
            place = last["place"]
        else:
            place = another(PLACES, last.get("place"))
        clip = {"place": place, "people": {}}
        for who in sorted(people):
            looks = before.get(who, {})
            clip["people"][who] = {
                "wear": again_or_another(COLOURS, looks.get("wear")),
                "action": again_or_another(ACTIONS, looks.get("action"))}
        clip["object"] = again_or_another(objects, last.get("object"))
        clip["count"] = again_or_another(NUMBERS, last.get("count"))
        speaker = rng.choice(people)
        said_before = last["speech"][1] if last else ""
        clip["speech"] = [speaker, another(speeches, said_before)]
        clip["cells"] = cells
        clip["seats"] = rng.sample(people + [""], 3)
        clip["jitter"] = rng.randrange(2 ** 30)
        truth.append(clip)
        last = clip
    return truth


def clip_facts(clip):
    """The eight facts of a clip's truth, as a list of Fact."""
    found = [Fact("place", "", clip["place"])]
    for who, looks in clip["people"].items():
        for category in ("wear", "action"):
            found.append(Fact(category, who, looks[category]))
    for category in ("object", "count"):
        found.append(Fact(category, "", clip[category]))
    speaker, words = clip["speech"]
    found.append(Fact("speech", speaker, words))
    return found


def say(fact):
    """The one phrase that states a fact.

    >>> say(Fact("speech", "3", "tea noon")), say(Fact("count", "", "one"))
    ("<face_3> says 'tea noon'", 'exactly one ball')
    """
    face = f"<face_{fact.who}>"
    balls = "ball" if fact.value == "one" else "balls"
    return {
        "place": f"in the {fact.value}",
        "wear": f"{face} wears {fact.value}",
        "action": f"{face} is {fact.value}",
        "object": f"a {fact.value}",
        "count": f"exactly {fact.value} {balls}",
        "speech": f"{face} says '{fact.value}'",
    }[fact.category]


def phrases(clip):
    """[(category, phrase)] of the eight facts of a clip."""
    return [(fact.category, say(fact)) for fact in clip_facts(clip)]


def parse(memory):
    """(connector or None, [Fact or None]) of a memory; None for a phrase outside the language.

    >>> parse("now, a red lamp, <face_3> is not waving.")
    ('now', [Fact(category='object', who='', value='red lamp'), None])
    """
    hit = re.fullmatch(r"(?:(now|still), )?(.*?)\.?", memory.strip(), re.DOTALL)
    begins, rest = hit.groups()
    return begins, [parse_phrase(phrase) for phrase in rest.split(", ")] if rest else []


def parse_phrase(phrase):
    """The Fact that a phrase states, or None."""
    for category, rule in GRAMMAR.items():
        hit = re.fullmatch(rule, phrase)
        if hit:
            return Fact(category, hit.groupdict().get("who", ""), hit["value"])
    return None


def facts(memory):
    """The distinct facts that a memory states, in order; what doesn't parse is left out."""
    return list(dict.fromkeys(fact for fact in parse(memory)[1] if fact))


def sentence(connector, chosen):
    """The memory that states these facts."""
    return ", ".join([connector, *map(say, chosen)]) + "."


def connector(previous):
    """"still" goes on from a memory, "now" begins where there is none (a stream's start, a lost memory)."""
    return "still" if previous else "now"


def caption(truth, t, previous, rng):
    """A right memory of clip t: three random facts that `previous` (the memory before, or None) lacks."""
    stated = set(facts(previous or ""))
    fresh = [fact for fact in clip_facts(truth[t]) if fact not in stated]
    return sentence(connector(previous), rng.sample(fresh, FACTS_PER_MEMORY))


# ---------------------------------------------------------------- pictures

TINTS = {
    "kitchen": (250, 225, 190),
    "garden": (200, 235, 190),
    "office": (205, 220, 245),
    "library": (225, 205, 180),
    "garage": (205, 205, 210),
    "bedroom": (235, 210, 240),
}
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)
INK = (60, 60, 60)
SKIN = (240, 190, 150)
BROWN = (120, 70, 20)
FLOOR = (150, 110, 70)


@dataclass
class Cell:
    """A place on a frame to draw at. Points are flat, x, y, x, y .., in pixels from its top left corner."""
    draw: object             # Pillow's ImageDraw
    x: int
    y: int

    def at(self, points):
        corner = [self.x, self.y] * (len(points) // 2)
        return [start + value for start, value in zip(corner, points)]

    def line(self, points, colour=INK, width=2):
        self.draw.line(self.at(points), colour, width)

    def box(self, points, fill, outline=None, width=1):
        self.draw.rectangle(self.at(points), fill, outline, width)

    def round(self, points, fill, outline=None, width=1):
        self.draw.ellipse(self.at(points), fill, outline, width)

    def shape(self, points, fill, outline=None):
        self.draw.polygon(self.at(points), fill, outline)


def draw_sign(cell, place):
    """The place's own pattern, as on a sign at its door."""
    cell.box((4, 4, 27, 27), WHITE, INK)
    for i in range(0, 24, 6):
        if place == "kitchen":                                       # chequered
            for j in range(i % 12, 24, 12):
                cell.box((4 + i, 4 + j, 9 + i, 9 + j), (200, 90, 40))
        elif place == "garden":                                      # upright bars
            cell.box((5 + i, 5, 7 + i, 26), (40, 140, 40))
        elif place == "office":                                      # lying bars
            cell.box((5, 5 + i, 26, 7 + i), (40, 70, 160))
        elif place == "library":                                     # frames in one another
            j = i // 2
            cell.box((5 + j, 5 + j, 26 - j, 26 - j), None, BROWN, 2)
        elif place == "garage":                                      # slanting bars
            cell.line((5, 8 + i, 8 + i, 5), INK, 3)
        else:                                                        # dots
            for j in range(0, 24, 6):
                cell.round((5 + i, 5 + j, 8 + i, 8 + j), (150, 50, 170))


def draw_object(cell, thing):
    """One of eight shapes in one of seven colours."""
    colour, shape = thing.split()
    fill = COLOURS[colour]
    if shape == "lamp":
        cell.line((16, 14, 16, 28))
        cell.shape((10, 4, 22, 4, 28, 17, 4, 17), fill, INK)
    elif shape == "cup":
        cell.round((18, 10, 28, 22), None, INK, 2)
        cell.box((5, 7, 22, 27), fill, INK)
    elif shape == "book":
        cell.box((3, 8, 28, 25), fill, INK)
        cell.line((16, 8, 16, 25), INK, 3)
    elif shape == "clock":
        cell.round((3, 3, 28, 28), fill, INK)
        cell.line((16, 7, 16, 16, 24, 16), (130, 130, 130))
    elif shape == "key":
        cell.round((2, 9, 15, 22), fill, INK)
        cell.box((15, 13, 29, 18), fill, INK)
        cell.box((24, 18, 29, 24), fill, INK)
    elif shape == "tent":
        cell.shape((16, 4, 30, 28, 2, 28), fill, INK)
    elif shape == "kite":
        cell.shape((16, 1, 28, 12, 16, 24, 4, 12), fill, INK)
        cell.line((16, 24, 12, 27, 20, 30))
    else:                                                            # a tree
        cell.box((13, 16, 19, 29), BROWN)
        cell.round((4, 1, 28, 20), fill, INK)


def draw_person(cell, who, looks, bob, font):
    """A person in a coat, with the ID in a box at the top left of the head, as in a real video.

    bob: 0 or 1, the two poses between which the person moves.
    """
    action = looks["action"]
    draw_body(cell, action, COLOURS[looks["wear"]], bob)
    if action in ("waving", "pointing", "reading", "cooking"):       # those who stand have legs
        cell.line((13, 24, 13, 31))
        cell.line((19, 24, 19, 31))
    if action == "waving":
        cell.line((20, 16, 26, 9, 24 + 4 * bob, 3))
    elif action == "sitting":
        cell.line((14, 26, 25, 26, 25, 31))
        cell.line((10, 19, 10, 31))
        cell.line((20, 19, 24, 22 + bob))
    elif action == "jumping":
        cell.line((13, 20, 8, 27))
        cell.line((19, 20, 24, 27))
        cell.line((20, 12, 28, 8))
        cell.line((12, 12, 5, 17))
        cell.line((8, 31, 24, 31), FLOOR, 1)
    elif action == "pointing":
        cell.line((20, 17, 31, 17 - bob))
    elif action == "reading":
        cell.box((21, 13 + bob, 30, 21 + bob), WHITE, INK)
        cell.line((25, 13 + bob, 25, 21 + bob), (200, 40, 40))
    elif action == "cooking":
        cell.line((20, 18, 22, 21))
        cell.box((22, 21, 30, 25), (20, 20, 20))
        cell.shape((22, 31, 26, 26 - bob, 30, 31), (255, 130, 0))
    cell.box((0, 0, 8, 11), WHITE, (0, 0, 200))
    cell.draw.text(cell.at((4.5, 6)), who, BLACK, font, "mm")


def draw_body(cell, action, coat, bob):
    """The coat and the head."""
    if action == "sleeping":
        cell.box((2, 27, 30, 30), FLOOR)
        cell.box((11, 18 + bob, 28, 26), coat, INK)
        cell.round((2, 18, 10, 26), SKIN, INK)
        return
    lift = {"jumping": -3 - bob, "sitting": 2}.get(action, 0)
    cell.box((12, 14 + lift, 20, 24 + lift), coat, INK)
    cell.round((12, 5 + lift, 20, 13 + lift), SKIN, INK)


def draw_frames(clip, blank=False):
    """The frames of one clip, uint8 (20, 96, 96, 3), RGB. People move a little; blank: grey, no facts."""
    import numpy
    if blank:
        return numpy.full((FPS * CLIP_SECONDS, SIDE, SIDE, 3), 127, numpy.uint8)
    poses = [draw_pose(clip, 0), draw_pose(clip, 1)]
    return numpy.stack([poses[i % 4 // 2] for i in range(FPS * CLIP_SECONDS)])


def draw_pose(clip, bob):
    """One picture of a clip, (96, 96, 3)."""
    import numpy
    from PIL import Image, ImageDraw, ImageFont
    small = ImageFont.load_default(11)
    large = ImageFont.load_default(13)
    rng = random.Random(clip["jitter"])              # both poses stand at the same spots
    image = Image.new("RGB", (SIDE, SIDE), TINTS[clip["place"]])
    draw = ImageDraw.Draw(image)
    # The upper row: place, object and count, in the order of the stream.
    for i, what in enumerate(clip["cells"]):
        x = i * CELL + rng.randint(-1, 1)
        y = rng.randint(-1, 1)
        cell = Cell(draw, x, y)
        if what == "place":
            draw_sign(cell, clip["place"])
        elif what == "object":
            draw_object(cell, clip["object"])
        else:
            balls = NUMBERS.index(clip["count"]) + 1
            for spot in rng.sample(range(9), balls):
                left = 3 + spot % 3 * 9
                top = 3 + spot // 3 * 9
                cell.round((left, top, left + 7, top + 7), (90, 60, 160), INK)
    # The middle row: two people and an empty seat.
    for i, who in enumerate(clip["seats"]):
        cell = Cell(draw, i * CELL, CELL + rng.randint(0, 1))
        if who:
            draw_person(cell, who, clip["people"][who], bob, small)
    # The lower row, a subtitle: the speaker and two words.
    draw.rectangle((0, 2 * CELL + 2, SIDE, SIDE), BLACK)
    speaker, words = clip["speech"]
    for i, word in enumerate([speaker + ":", *words.split()]):
        draw.text((i * CELL + 16, SIDE - 15), word, WHITE, large, "mm")
    return numpy.asarray(image)


def write_video(path, frames):
    """Encode uint8 (n, height, width, 3) frames as an mp4 (H.264) at FPS, a key frame per clip, without loss.

    The same frames give the same bytes. What x264 leaves out where it may lose something differs now and then
    from process to process, even with one thread.
    """
    import av
    options = {"qp": "0", "g": str(FPS * CLIP_SECONDS), "threads": "1"}
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=FPS, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


# ---------------------------------------------------------------- tasks

# {kind: (environment, two wordings)}. {t} and {u} are clip borders as HH:MM:SS, {who} a face ID, {x} a value.
QUESTIONS = {
    "place_at": (
        "place", "Where were the people at {t}?", "Which place was shown at {t}?"),
    "place_many": (
        "place", "How many different places were shown from {t} to {u}?",
        "From {t} to {u}, how many different places were there?"),
    "wear_at": (
        "wear", "What colour did {who} wear at {t}?", "Which colour was the coat of {who} at {t}?"),
    "wear_many": (
        "wear", "How many different people were seen from {t} to {u}?",
        "From {t} to {u}, how many different people were there?"),
    "action_at": (
        "action", "What was {who} doing at {t}?", "Which action did {who} do at {t}?"),
    "action_next": (
        "action", "What did {who} do right after {x} at {t}?",
        "After {x} at {t}, what did {who} do next?"),
    "object_at": (
        "object", "Which object was shown at {t}?", "What object was there at {t}?"),
    "object_colour": (
        "object", "What colour was the {x} at {t}?", "Which colour was the {x} shown at {t}?"),
    "object_next": (
        "object", "Which object came right after the {x} of {t}?",
        "After the {x} of {t}, which object came next?"),
    "count_at": (
        "count", "How many balls were there at {t}?", "How many balls were shown at {t}?"),
    "count_next": (
        "count", "How many balls came right after the {x} of {t}?",
        "After the {x} balls of {t}, how many came next?"),
    "speech_at": (
        "speech", "What did {who} say at {t}?", "Which words did {who} say at {t}?"),
    "speech_next": (
        "speech", "What was said right after '{x}' of {t}?",
        "After '{x}' of {t}, what was said next?"),
}
FIELDS = {
    "{t}": r"(?P<t>\d\d:\d\d:\d\d)",
    "{u}": r"(?P<u>\d\d:\d\d:\d\d)",
    "{who}": r"<face_(?P<who>[1-9])>",
    "{x}": r"(?P<x>[a-z ]+)",
}


def question_patterns():
    """[(kind, the regular expression of one of its wordings)]."""
    patterns = []
    for kind, (_, *wordings) in QUESTIONS.items():
        for wording in wordings:
            rule = re.escape(wording)
            for field, expression in FIELDS.items():
                rule = rule.replace(re.escape(field), expression)
            patterns.append((kind, re.compile(rule)))
    return patterns


PATTERNS = question_patterns()


def clock(seconds):
    """Seconds as HH:MM:SS."""
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def read_question(text):
    """(kind, fields with t and u in seconds), or (None, {}) if it isn't a question of this world."""
    for kind, rule in PATTERNS:
        hit = rule.fullmatch(text.strip())
        if hit:
            fields = hit.groupdict()
            for name in fields.keys() & {"t", "u"}:
                hours, minutes, seconds = fields[name].split(":")
                fields[name] = int(hours) * 3600 + int(minutes) * 60 + int(seconds)
            return kind, fields
    return None, {}


# facts: with None for a phrase that is not of the language
Entry = namedtuple("Entry", "start end facts")


class Notes:
    """What can be known from memories alone. entries: [[start, end, memory]] in seconds.

    Questions tell the time of day. So a stream that a camera's clock dates has to be of one day.
    """

    def __init__(self, entries):
        self.entries = []
        for start, end, memory in entries:
            _, stated = parse(memory or "")
            midnight = start - start % DAY
            self.entries.append(Entry(start - midnight, end - midnight, stated))
        self.entries.sort()

    def index(self, seconds):
        """Of the entry at a time; None if there is none."""
        for i, entry in enumerate(self.entries):
            if entry.start <= seconds < entry.end:
                return i
        return None

    def next(self, i):
        """The index of the entry right after i, without a gap; None if there is none."""
        if i is None or i + 1 >= len(self.entries):
            return None
        follows = self.entries[i + 1].start == self.entries[i].end
        return i + 1 if follows else None

    def value(self, i, category, who=None):
        """The one value that entry i states; None if it states none, or two different ones."""
        if i is None:
            return None
        stated = [fact for fact in self.entries[i].facts if fact and fact.category == category]
        values = {(fact.who, fact.value) for fact in stated if who in (None, fact.who)}
        return values.pop()[1] if len(values) == 1 else None

    def people(self, i):
        """The people named by any fact of entry i; None unless both of the clip are named, and no third."""
        if i is None:
            return None
        named = {fact.who for fact in self.entries[i].facts if fact and fact.who}
        return named if len(named) == 2 else None


def solve(kind, fields, notes):
    """The answer as text, or None if the notes don't hold it."""
    environment = QUESTIONS[kind][0]
    i = notes.index(fields["t"])
    who = fields.get("who")
    if kind.endswith("_at"):
        return notes.value(i, environment, who)
    if kind.endswith("_next"):
        is_known = notes.value(i, environment, who) == fields["x"]
        return notes.value(notes.next(i), environment, who) if is_known else None
    if kind == "object_colour":
        thing = notes.value(i, "object")
        if thing is None:
            return None
        colour, shape = thing.split()
        return colour if shape == fields["x"] else None
    # How many different places or people there were over several clips: each clip has to be known.
    known = []
    for t in range(fields["t"], fields["u"], CLIP_SECONDS):
        i = notes.index(t)
        if kind == "place_many":
            place = notes.value(i, "place")
            known.append({place} if place else None)
        else:
            known.append(notes.people(i))
    if not known or not all(known):
        return None
    return NUMBERS[len(set().union(*known)) - 1]


# Per category the values of a fact; of objects and speech, of its first word.
VALUES = {"place": PLACES, "wear": list(COLOURS), "action": ACTIONS, "object": list(COLOURS),
          "count": NUMBERS, "speech": FIRST}


def neighbour(category, value):
    """The one value that this one is taken for: the next in its list; of two words, the first is the next.

    >>> neighbour("place", "kitchen"), neighbour("object", "pink cup"), neighbour("object", "red")
    ('garden', 'red cup', 'green')
    """
    first, *second = value.split()
    values = VALUES[category]
    following = values[(values.index(first) + 1) % len(values)]
    return " ".join([following, *second])


def wrong_options(kind, right, rng):
    """Three wrong but plausible options. The neighbour of a right value is one of them."""
    environment = QUESTIONS[kind][0]
    if kind == "place_many":
        return [value for value in NUMBERS[:4] if value != right]    # one to three places
    if kind == "wear_many":
        return [value for value in NUMBERS[1:5] if value != right]   # two to four people
    taken_for = neighbour(environment, right)
    if environment in ("object", "speech") and kind != "object_colour":
        # One word is wrong, or the other, or both.
        first, second = right.split()
        seconds = OBJECTS if environment == "object" else SECOND
        other_second = rng.choice([value for value in seconds if value != second])
        other_first = taken_for.split()[0]
        return [taken_for, f"{first} {other_second}", f"{other_first} {other_second}"]
    others = [value for value in VALUES[environment] if value not in (right, taken_for)]
    return [taken_for, *rng.sample(others, 2)]


def possible_questions(truth, environment):
    """Every (kind, fields) of an environment that a truthful writer, who may not repeat, can serve."""
    # Of each clip the facts that the one before lacks.
    new = []
    before = []
    for clip in truth:
        now = clip_facts(clip)
        unsaid = [fact for fact in now if fact not in before]
        new.append([fact for fact in unsaid if fact.category == environment])
        before = now
    for clip, fresh in enumerate(new):
        t = clip * CLIP_SECONDS
        following = new[clip + 1] if clip + 1 < len(truth) else []
        for fact in fresh:
            yield f"{environment}_at", {"t": t, "who": fact.who}
            if environment == "object":
                yield "object_colour", {"t": t, "x": fact.value.split()[1]}
            if environment == "action" and any(other.who == fact.who for other in following):
                yield "action_next", {"t": t, "who": fact.who, "x": fact.value}
            elif environment in ("object", "count", "speech") and following:
                yield f"{environment}_next", {"t": t, "x": fact.value}
        # A place that stays can't be stated again, so places are counted where each clip has a new one.
        clips = {"place": 3, "wear": 2}.get(environment)
        if clips is None or clip + clips > len(truth):
            continue
        if environment == "wear" or all(new[clip:clip + clips]):
            yield f"{environment}_many", {"t": t, "u": t + clips * CLIP_SECONDS}


def make_tasks(stream, truth, rng, per_environment=2):
    """The tasks of one stream: rows of streams/tasks.jsonl, `per_environment` different ones per category.

    Asked after the stream's end. A stream's clock starts at 0; the right option's letter is random.
    """
    everything = []
    for clip, facts_there in enumerate(map(clip_facts, truth)):
        start = clip * CLIP_SECONDS
        everything.append([start, start + CLIP_SECONDS, sentence("now", facts_there)])
    notes = Notes(everything)
    rows = []
    for environment in CATEGORIES:
        pool = []
        for kind, fields in possible_questions(truth, environment):
            pool.append((kind, fields, rng.randrange(2)))
        rng.shuffle(pool)
        # The other wording comes last, for short streams with too few new facts.
        pool += [(kind, fields, 1 - wording) for kind, fields, wording in pool]
        over_clips = [question for question in pool if question[0].endswith(("_many", "_next"))]
        single = [question for question in pool if question not in over_clips]
        for n in range(per_environment):
            several = over_clips and (not single or rng.random() < MULTI_SHARE)
            chosen = over_clips if several else single
            if not chosen:
                break
            kind, fields, wording = chosen.pop(0)
            row = {"task": f"{stream}-{environment}-{n + 1}", "stream": stream,
                   "environment": environment, "time": float(len(truth) * CLIP_SECONDS)}
            rows.append(row | make_task(kind, fields, wording, notes, rng))
    return rows


def make_task(kind, fields, wording, notes, rng):
    """{question, options, answer} of a question; notes: of everything that is true."""
    right = solve(kind, fields, notes)
    options = rng.sample([right, *wrong_options(kind, right, rng)], 4)
    shown = fields | {"t": clock(fields["t"]), "u": clock(fields.get("u", 0))}
    if fields.get("who"):
        shown["who"] = f"<face_{fields['who']}>"
    return {"question": QUESTIONS[kind][1 + wording].format(**shown),
            "options": [f"{letter}. {option}" for letter, option in zip("ABCD", options)],
            "answer": "ABCD"[options.index(right)]}


# ---------------------------------------------------------------- streams

def write_streams(S, out):
    """Renders the streams of 01 into out/videos, with captions.jsonl and truth.jsonl -> (streams, tasks).

    All about a stream follows from (SEED, split, number), so an interrupted run just goes on: videos that
    exist are kept. SystemExit where CLIP_SECONDS is another.
    """
    if S.CLIP_SECONDS != CLIP_SECONDS:
        raise SystemExit(f"CLIP_SECONDS={S.CLIP_SECONDS}: tiny clips are {CLIP_SECONDS} s long")
    (out / "videos").mkdir(exist_ok=True)
    names = []
    sizes = {"train": S.TRAIN_STREAMS, "deploy": S.DEPLOY_STREAMS, "test": S.TEST_STREAMS}
    for split, count in sizes.items():
        if S.LIMIT:
            count = min(count, S.LIMIT)
        names += [(split, i) for i in range(count)]
    streams = []
    tasks = []
    captions = []
    facts_of_clips = []
    for split, i in progress(names, "rendering", unit="stream"):
        name = f"{split}-{i:03d}"
        truth = make_stream(stream_seed(S.SEED, split, i), S.CLIPS)
        file = f"videos/{name}.mp4"
        if not (out / file).exists():
            with written_aside(out / file) as aside:
                write_stream_video(aside, truth)
        streams.append(stream_row(name, split, file, len(truth)))
        facts_of_clips += truth_rows(name, truth)
        rng = random.Random(f"{S.SEED} {name}")
        memory = None
        for t in range(len(truth)):
            memory = caption(truth, t, memory, rng)
            captions.append({"stream": name, "clip": t, "memory": memory})
        if split != "train":
            tasks += make_tasks(name, truth, rng, S.QUESTIONS)
    write_jsonl(out / "captions.jsonl", captions)
    write_jsonl(out / "truth.jsonl", facts_of_clips)
    return streams, tasks


def truth_rows(name, truth):
    """The rows of truth.jsonl of a stream."""
    return [{"stream": name, "clip": t, "facts": clip} for t, clip in enumerate(truth)]


def write_stream_video(path, truth, blank=False):
    """Draws all clips of a stream and encodes them; blank: grey, no facts."""
    import numpy
    frames = [draw_frames(clip, blank) for clip in truth]
    write_video(path, numpy.concatenate(frames))


def stream_row(name, split, file, clips):
    """The row of streams.jsonl of a stream of so many clips.

    Its speech is empty, because the subtitles are in the pixels already; a cue would only tell the policy
    what it should read. decord, if installed, reads these videos right, as a test proves.
    """
    rows = []
    for t in range(clips):
        start = float(t * CLIP_SECONDS)
        rows.append({"clip": t, "start": start, "end": start + CLIP_SECONDS, "file": file,
                     "offset": start, "speech": []})
        if has_decord():
            rows[-1]["reader"] = "decord"
    return {"stream": name, "split": split, "source": "tiny", "clips": rows}


# ---------------------------------------------------------------- the exact judge

class Judge:
    """Judge and reader, with the one method that all judges have, `ask`. It never fails.

    rows: of streams/truth.jsonl. Only "faithful" and "rank" look at them; the others read texts. It reads no
    prompt, but knows its name: a new one needs a method of that name here.
    """

    def __init__(self, rows=()):
        self.truth = {(row["stream"], row["clip"]): row["facts"] for row in rows}

    def ask(self, prompt, items):
        """prompt: of support/judges.py; items: dicts of the arguments of the method of its name."""
        method = getattr(self, prompt.name, None)
        if not callable(method):
            known = [name for name in vars(Judge) if name[0] != "_" and name != "ask"]
            raise ValueError(f"the toy world's judge has no method {prompt.name!r}, but "
                             f"{', '.join(known)}: add it to Judge in tiny/world.py")
        return [method(**item) for item in items]

    def _true_facts(self, context):
        """The facts of a context's newest clip."""
        return set(clip_facts(self.truth[context.stream, context.clip]))

    def faithful(self, context, memory):
        """Every phrase is of the language and true in the newest clip; it connects to the memory before."""
        begins, found = parse(memory)
        previous = context.history[-1] if context.history else ""
        is_connected = begins == connector(previous)
        is_true = set(found) <= self._true_facts(context)
        return bool(found) and is_connected and memory.endswith(".") and is_true

    def clean(self, previous, memory):
        """Nothing that the preceding memory states, and nothing twice; no coordinates, no labels and the like."""
        stated = phrases_of(memory)
        is_said_twice = len(stated) > len(set(stated))
        is_said_before = not set(stated).isdisjoint(phrases_of(previous or ""))
        return not (is_said_twice or is_said_before or UNWANTED.search(memory))

    def rank(self, context, memories):
        """Ranks by the number of distinct true facts that the preceding memory doesn't state; 1 is best."""
        previous = context.history[-1] if context.history else ""
        new = self._true_facts(context) - set(facts(previous or ""))
        counts = [len(new & set(facts(memory))) for memory in memories]
        ranks = []
        for count in counts:
            better = sum(other > count for other in counts)
            # Equal ones, itself included, share the mean of their ranks.
            equal = counts.count(count)
            ranks.append(better + (equal + 1) / 2)
        return ranks

    def prefer(self, questions, first, second):
        """Which memory serves such questions better: "first", "second" or "tie". Texts only.

        A question is after its category; a memory scores the distinct things of that category that it tells
        of, so that two contradicting values for one thing count once.
        """
        wanted = []
        for question in questions:
            kind, _ = read_question(question)
            if kind:
                wanted.append(QUESTIONS[kind][0])
        scores = []
        for memory in (first, second):
            things = {(fact.category, fact.who) for fact in facts(memory)}
            scores.append(sum(wanted.count(category) for category, _ in things))
        if scores[0] == scores[1]:
            return "tie"
        return "first" if scores[0] > scores[1] else "second"

    def answer(self, entries, question, options):
        """The letter of the option that the memories hold, "insufficient" if there is none. Texts only."""
        kind, fields = read_question(question)
        found = solve(kind, fields, Notes(entries)) if kind else None
        for option in options:
            if found and option[3:] == found:
                return option[0]
        return "insufficient"

    def asked(self, entries, question):
        """{answer, entries: the numbers, from 1, of those that it rests on}; "insufficient" where no stream tells.

        entries: [start, end, memory, stream]. What streams tell differently is told of each. SystemExit for a
        question that is not of this world.
        """
        kind, fields = read_question(question)
        if not kind:
            raise SystemExit("the toy world's reader understands the questions of the toy world alone, such as "
                             f"'Where were the people at 00:01:00?' (QUESTIONS in tiny/world.py); not {question!r}")
        numbers = {}                                 # {stream: numbers of its entries}
        for number, entry in enumerate(entries, 1):
            numbers.setdefault(entry[3], []).append(number)
        told = {}                                    # {what is told: by which streams}
        rests_on = []
        for stream, of_stream in numbers.items():
            notes = Notes([entries[number - 1][:3] for number in of_stream])
            found = solve(kind, fields, notes)
            if found:
                told.setdefault(found, []).append(stream)
                rests_on += [of_stream[i] for i in asked_about(kind, fields, notes)]
        if len(told) > 1:
            told = {"; ".join(f"{found} ({', '.join(streams)})" for found, streams in told.items()): []}
        return {"answer": next(iter(told), "insufficient"), "entries": rests_on}


def asked_about(kind, fields, notes):
    """The indices of the entries that `solve` has looked at, where it has found an answer."""
    first = notes.index(fields["t"])
    if kind.endswith("_next"):
        return [first, first + 1]
    if kind.endswith("_many"):
        return [notes.index(t) for t in range(fields["t"], fields["u"], CLIP_SECONDS)]
    return [first]


UNWANTED = re.compile(
    r"\[\s*\d+(\s*,\s*\d+)+"                                         # coordinates
    r"|\b(this video|the video|subtitles?|bounding box)\b"
    r"|['\"][^'\"]*<face_\d+>\s*:", re.IGNORECASE)                   # a label, copied from a cue


def phrases_of(memory):
    """The phrases of a memory, of the language or not, in order."""
    bare = re.sub(r"^(now|still), |\.$", "", memory.strip())
    return [phrase for phrase in bare.split(", ") if phrase]
