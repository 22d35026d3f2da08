"""The embedded world: short streams of little pictures whose facts are known, so that a judge can be exact.

A stream is a row of 10 s clips. Each clip holds eight facts in six categories (place, wear, action, object,
count, speech), drawn on 96 x 96 pixels; a memory is a sentence of a controlled language that states some:

    still, <face_3> wears red, a blue lamp, <face_4> says 'tea noon'.

"still" connects a memory to the one before, "now" begins where there is none. The budget of a memory
holds three of the eight facts, so what to write is a real choice. Tasks are multiple-choice questions about
single clips and neighbouring ones, one environment per category. The judge knows the facts of a clip, as a
video judge sees the video; its reader gets the memory texts and the question and nothing else.

Needs numpy, and Pillow and PyAV for pictures and mp4 files; no torch.
"""
import random
import re
from collections import namedtuple

# ----------------------------------------------------------------------------------------------------------
CELL = 32                 # px; one cell is one vision token (patch 16, merge 2)
SIDE = 3 * CELL           # px; a frame is 3 x 3 cells
FPS = 2                   # stored frames per second
CLIP_SECONDS = 10         # so 20 stored frames per clip
CLIPS = 12                # clips per stream
CAST = 4                  # people per stream, two of them in each clip
PLACE_STAYS = 0.5         # chance that the next clip is at the same place
PERSON_STAYS = 0.6        # chance that a person is there in the next clip too
FACT_STAYS = 0.25         # chance that object, count, coat or action stays as it was: a temptation to repeat
FACTS_PER_MEMORY = 3      # what the token budget of a memory holds
MULTI_SHARE = 0.25        # share of questions that need several clips
CRF = 14                  # x264 quality: small text survives
# ----------------------------------------------------------------------------------------------------------

CATEGORIES = ("place", "wear", "action", "object", "count", "speech")
PLACES = ("kitchen", "garden", "office", "library", "garage", "bedroom")
COLOURS = {"red": (214, 32, 32), "green": (30, 150, 50), "blue": (40, 70, 220), "yellow": (245, 215, 30),
           "white": (255, 255, 255), "black": (20, 20, 20), "pink": (255, 110, 190)}
OBJECTS = ("lamp", "cup", "book", "clock", "key", "tent", "kite", "tree")
ACTIONS = ("waving", "sitting", "jumping", "pointing", "reading", "sleeping", "cooking")
NUMBERS = ("one", "two", "three", "four", "five", "six")
FIRST = ("tea", "cat", "sun", "jam", "oil", "fog", "map", "hat", "egg", "rug", "pie", "zoo")
SECOND = ("noon", "west", "left", "soon", "deep", "kind", "half", "back", "much", "grow", "play", "exit")
SPLITS = ("train", "deploy", "test", "base")          # "base" is for the streams that made the base model

Fact = namedtuple("Fact", "category who value")       # who: the digit of a face ID, "" where nobody is named

# One phrase per category, in exactly this form; everything else is not part of the language.
GRAMMAR = {
    "place": rf"in the (?P<value>{'|'.join(PLACES)})",
    "wear": rf"<face_(?P<who>[1-9])> wears (?P<value>{'|'.join(COLOURS)})",
    "action": rf"<face_(?P<who>[1-9])> is (?P<value>{'|'.join(ACTIONS)})",
    "object": rf"a (?P<value>(?:{'|'.join(COLOURS)}) (?:{'|'.join(OBJECTS)}))",
    "count": rf"exactly (?P<value>one(?= ball$)|(?:{'|'.join(NUMBERS[1:])})(?= balls$)) balls?",
    "speech": rf"<face_(?P<who>[1-9])> says '(?P<value>(?:{'|'.join(FIRST)}) (?:{'|'.join(SECOND)}))'",
}


# ---- facts and the controlled language -------------------------------------------------------------------

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
    other = lambda values, last: rng.choice([v for v in values if v != last])
    again = lambda values, last: last if last and rng.random() < FACT_STAYS else other(values, last)
    things = [f"{colour} {shape}" for colour in COLOURS for shape in OBJECTS]
    words = [f"{first} {second}" for first in FIRST for second in SECOND]
    cast, cells = rng.sample("123456789", CAST), rng.sample(["place", "object", "count"], 3)
    last, truth = {}, []
    for _ in range(clips):
        there = [who for who in last.get("people", ()) if rng.random() < PERSON_STAYS]
        there += rng.sample([who for who in cast if who not in last.get("people", ())], 2 - len(there))
        known = {who: last.get("people", {}).get(who, {}) for who in there}
        place = last["place"] if last and rng.random() < PLACE_STAYS else other(PLACES, last.get("place"))
        last = {
            "place": place,
            "people": {who: {"wear": again(COLOURS, known[who].get("wear")),
                             "action": again(ACTIONS, known[who].get("action"))} for who in sorted(there)},
            "object": again(things, last.get("object")),
            "count": again(NUMBERS, last.get("count")),
            "speech": [rng.choice(there), other(words, last.get("speech", ["", ""])[1])],
            "cells": cells, "seats": rng.sample(there + [""], 3), "jitter": rng.randrange(2 ** 30),
        }
        truth.append(last)
    return truth


def clip_facts(clip):
    """The eight facts of a clip's truth, as a list of Fact."""
    people = [Fact(category, who, looks[category]) for who, looks in clip["people"].items()
              for category in ("wear", "action")]
    return [Fact("place", "", clip["place"]), *people, Fact("object", "", clip["object"]),
            Fact("count", "", clip["count"]), Fact("speech", *clip["speech"])]


def say(fact):
    """The one phrase that states a fact.

    >>> say(Fact("speech", "3", "tea noon")), say(Fact("count", "", "one"))
    ("<face_3> says 'tea noon'", 'exactly one ball')
    """
    face = f"<face_{fact.who}>"
    return {"place": f"in the {fact.value}", "wear": f"{face} wears {fact.value}",
            "action": f"{face} is {fact.value}", "object": f"a {fact.value}",
            "count": f"exactly {fact.value} ball" + "s" * (fact.value != "one"),
            "speech": f"{face} says '{fact.value}'"}[fact.category]


def phrases(clip):
    """[(category, phrase)] of the eight facts of a clip."""
    return [(fact.category, say(fact)) for fact in clip_facts(clip)]


def parse(memory):
    """(connector or None, [Fact or None]) of a memory; None for a phrase outside the language.

    >>> parse("now, a red lamp, <face_3> is not waving.")
    ('now', [Fact(category='object', who='', value='red lamp'), None])
    """
    shape = re.fullmatch(r"(?:(now|still), )?(.*?)\.?", memory.strip(), re.DOTALL)
    found = []
    for phrase in shape[2].split(", ") if shape[2] else []:
        hits = [(category, re.fullmatch(rule, phrase)) for category, rule in GRAMMAR.items()]
        made = [Fact(category, hit.groupdict().get("who", ""), hit["value"]) for category, hit in hits if hit]
        found.append(made[0] if made else None)
    return shape[1], found


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


# ---- pictures --------------------------------------------------------------------------------------------

TINTS = {"kitchen": (250, 225, 190), "garden": (200, 235, 190), "office": (205, 220, 245),
         "library": (225, 205, 180), "garage": (205, 205, 210), "bedroom": (235, 210, 240)}
INK, SKIN = (60, 60, 60), (240, 190, 150)


def _sign(draw, x, y, place):
    """The place's own pattern, as on a sign at its door."""
    kind, right, low = PLACES.index(place), x + 27, y + 27
    draw.rectangle((x + 4, y + 4, right, low), (255, 255, 255), INK)
    for i in range(0, 24, 6):
        if kind == 0:                                                          # chequered
            for j in range((i // 6) % 2 * 6, 24, 12):
                draw.rectangle((x + 4 + i, y + 4 + j, x + 9 + i, y + 9 + j), (200, 90, 40))
        elif kind == 1:                                                        # upright bars
            draw.rectangle((x + 5 + i, y + 5, x + 7 + i, low - 1), (40, 140, 40))
        elif kind == 2:                                                        # lying bars
            draw.rectangle((x + 5, y + 5 + i, right - 1, y + 7 + i), (40, 70, 160))
        elif kind == 3:                                                        # brown frames, nested
            j = i // 2
            draw.rectangle((x + 5 + j, y + 5 + j, right - 1 - j, low - 1 - j), None, (120, 70, 20), 2)
        elif kind == 4:                                                        # slanting bars
            draw.line((x + 5, y + 8 + i, x + 8 + i, y + 5), INK, 3)
        else:                                                                  # dots
            for j in range(0, 24, 6):
                draw.ellipse((x + 5 + i, y + 5 + j, x + 8 + i, y + 8 + j), (150, 50, 170))


def _object(draw, x, y, thing):
    """One of eight shapes in one of seven colours."""
    colour, shape = thing.split()
    fill, at = COLOURS[colour], lambda *points: [(x + a, y + b) for a, b in points]
    if shape == "lamp":
        draw.line((x + 16, y + 14, x + 16, y + 28), INK, 2)
        draw.polygon(at((10, 4), (22, 4), (28, 17), (4, 17)), fill, INK)
    elif shape == "cup":
        draw.ellipse((x + 18, y + 10, x + 28, y + 22), None, INK, 2)
        draw.rectangle((x + 5, y + 7, x + 22, y + 27), fill, INK)
    elif shape == "book":
        draw.rectangle((x + 3, y + 8, x + 28, y + 25), fill, INK)
        draw.line((x + 16, y + 8, x + 16, y + 25), INK, 3)
    elif shape == "clock":
        draw.ellipse((x + 3, y + 3, x + 28, y + 28), fill, INK)
        draw.line(at((16, 7), (16, 16), (24, 16)), (130, 130, 130), 2)
    elif shape == "key":
        draw.ellipse((x + 2, y + 9, x + 15, y + 22), fill, INK)
        draw.rectangle((x + 15, y + 13, x + 29, y + 18), fill, INK)
        draw.rectangle((x + 24, y + 18, x + 29, y + 24), fill, INK)
    elif shape == "tent":
        draw.polygon(at((16, 4), (30, 28), (2, 28)), fill, INK)
    elif shape == "kite":
        draw.polygon(at((16, 1), (28, 12), (16, 24), (4, 12)), fill, INK)
        draw.line(at((16, 24), (12, 27), (20, 30)), INK, 2)
    else:
        draw.rectangle((x + 13, y + 16, x + 19, y + 29), (120, 70, 20))
        draw.ellipse((x + 4, y + 1, x + 28, y + 20), fill, INK)


def _person(draw, x, y, who, looks, bob, font):
    """A person in a coat; the ID stands in a box at the top-left of the head, as in a real video."""
    coat, action = COLOURS[looks["wear"]], looks["action"]
    limb = lambda *points: draw.line([(x + a, y + b) for a, b in points], INK, 2)
    lift = {"jumping": -3 - bob, "sitting": 2}.get(action, 0)
    top = y + 14 + lift                                                        # of the coat
    if action == "sleeping":                                                   # lies along the floor
        draw.rectangle((x + 2, y + 27, x + 30, y + 30), (150, 110, 70))
        draw.rectangle((x + 11, y + 18 + bob, x + 28, y + 26), coat, INK)
        draw.ellipse((x + 2, y + 18, x + 10, y + 26), SKIN, INK)
    else:
        draw.rectangle((x + 12, top, x + 20, top + 10), coat, INK)
        draw.ellipse((x + 12, y + 5 + lift, x + 20, y + 13 + lift), SKIN, INK)
    if action == "waving":
        limb((13, 24), (13, 31)), limb((19, 24), (19, 31)), limb((20, 16), (26, 9), (24 + 4 * bob, 3))
    elif action == "sitting":
        limb((14, 26), (25, 26), (25, 31)), limb((10, 19), (10, 31)), limb((20, 19), (24, 22 + bob))
    elif action == "jumping":
        limb((13, 20), (8, 27)), limb((19, 20), (24, 27)), limb((20, 12), (28, 8)), limb((12, 12), (5, 17))
        draw.line((x + 8, y + 31, x + 24, y + 31), (150, 110, 70), 1)
    elif action == "pointing":
        limb((13, 24), (13, 31)), limb((19, 24), (19, 31)), limb((20, 17), (31, 17 - bob))
    elif action == "reading":
        limb((13, 24), (13, 31)), limb((19, 24), (19, 31))
        draw.rectangle((x + 21, y + 13 + bob, x + 30, y + 21 + bob), (255, 255, 255), INK)
        draw.line((x + 25, y + 13 + bob, x + 25, y + 21 + bob), (200, 40, 40), 2)
    elif action == "cooking":
        limb((13, 24), (13, 31)), limb((19, 24), (19, 31)), limb((20, 18), (22, 21))
        draw.rectangle((x + 22, y + 21, x + 30, y + 25), (20, 20, 20))
        draw.polygon([(x + 22, y + 31), (x + 26, y + 26 - bob), (x + 30, y + 31)], (255, 130, 0))
    draw.rectangle((x, y, x + 8, y + 11), (255, 255, 255), (0, 0, 200))
    draw.text((x + 4.5, y + 6), who, (0, 0, 0), font, "mm")


def draw_frames(clip, blank=False):
    """The frames of one clip, uint8 (20, 96, 96, 3), RGB. People move a little; blank: grey, no facts."""
    import numpy
    from PIL import Image, ImageDraw, ImageFont
    if blank:
        return numpy.full((FPS * CLIP_SECONDS, SIDE, SIDE, 3), 127, numpy.uint8)
    small, large = ImageFont.load_default(11), ImageFont.load_default(13)
    poses = []
    for bob in (0, 1):
        rng = random.Random(clip["jitter"])                                    # both poses at the same spots
        image = Image.new("RGB", (SIDE, SIDE), TINTS[clip["place"]])
        draw = ImageDraw.Draw(image)
        for i, what in enumerate(clip["cells"]):
            x, y = i * CELL + rng.randint(-1, 1), rng.randint(-1, 1)
            if what == "place":
                _sign(draw, x, y, clip["place"])
            elif what == "object":
                _object(draw, x, y, clip["object"])
            else:
                for spot in rng.sample(range(9), NUMBERS.index(clip["count"]) + 1):
                    a, b = x + 3 + spot % 3 * 9, y + 3 + spot // 3 * 9
                    draw.ellipse((a, b, a + 7, b + 7), (90, 60, 160), INK)
        for i, who in enumerate(clip["seats"]):
            x, y = i * CELL, CELL + rng.randint(0, 1)
            if who:
                _person(draw, x, y, who, clip["people"][who], bob, small)
        draw.rectangle((0, 2 * CELL + 2, SIDE, SIDE), (0, 0, 0))               # subtitle: speaker, two words
        for i, word in enumerate([clip["speech"][0] + ":", *clip["speech"][1].split()]):
            draw.text((i * CELL + 16, SIDE - 15), word, (255, 255, 255), large, "mm")
        poses.append(numpy.asarray(image))
    return numpy.stack([poses[i % 4 // 2] for i in range(FPS * CLIP_SECONDS)])


def write_video(path, frames):
    """Encode uint8 (n, height, width, 3) frames as an mp4 (H.264) at FPS, a key frame per clip."""
    import av
    with av.open(str(path), "w", format="mp4") as box:
        options = {"crf": str(CRF), "g": str(FPS * CLIP_SECONDS), "threads": "1"}
        stream = box.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            box.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        box.mux(stream.encode())


# ---- tasks -----------------------------------------------------------------------------------------------

# kind: (environment, paraphrases). {t} and {u} are clip borders as HH:MM:SS, {who} a face ID, {x} a value.
QUESTIONS = {
    "place_at": ("place", "Where were the people at {t}?", "Which place was shown at {t}?"),
    "place_many": ("place", "How many different places were shown from {t} to {u}?",
                   "From {t} to {u}, how many different places were there?"),
    "wear_at": ("wear", "What colour did {who} wear at {t}?", "Which colour was the coat of {who} at {t}?"),
    "wear_many": ("wear", "How many different people were seen from {t} to {u}?",
                  "From {t} to {u}, how many different people were there?"),
    "action_at": ("action", "What was {who} doing at {t}?", "Which action did {who} do at {t}?"),
    "action_next": ("action", "What did {who} do right after {x} at {t}?",
                    "After {x} at {t}, what did {who} do next?"),
    "object_at": ("object", "Which object was shown at {t}?", "What object was there at {t}?"),
    "object_colour": ("object", "What colour was the {x} at {t}?", "Which colour was the {x} shown at {t}?"),
    "object_next": ("object", "Which object came right after the {x} of {t}?",
                    "After the {x} of {t}, which object came next?"),
    "count_at": ("count", "How many balls were there at {t}?", "How many balls were shown at {t}?"),
    "count_next": ("count", "How many balls came right after the {x} of {t}?",
                   "After the {x} balls of {t}, how many came next?"),
    "speech_at": ("speech", "What did {who} say at {t}?", "Which words did {who} say at {t}?"),
    "speech_next": ("speech", "What was said right after '{x}' of {t}?",
                    "After '{x}' of {t}, what was said next?"),
}
_FIELDS = {"{t}": r"(?P<t>\d\d:\d\d:\d\d)", "{u}": r"(?P<u>\d\d:\d\d:\d\d)",
           "{who}": r"<face_(?P<who>[1-9])>", "{x}": r"(?P<x>[a-z ]+)"}


def _pattern(text):
    rule = re.escape(text)
    for field, expression in _FIELDS.items():
        rule = rule.replace(re.escape(field), expression)
    return re.compile(rule)


_PATTERNS = [(kind, _pattern(text)) for kind, (_, *texts) in QUESTIONS.items() for text in texts]


def clock(seconds):
    """Seconds as HH:MM:SS."""
    return f"{int(seconds) // 3600:02d}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def read_question(text):
    """(kind, fields with t and u in seconds), or (None, {}) if it isn't a question of this world."""
    for kind, rule in _PATTERNS:
        hit = rule.fullmatch(text.strip())
        if hit:
            fields = hit.groupdict()
            for name in fields.keys() & {"t", "u"}:
                h, m, s = fields[name].split(":")
                fields[name] = int(h) * 3600 + int(m) * 60 + int(s)
            return kind, fields
    return None, {}


class Notes:
    """What can be known from memories alone. entries: [[start, end, memory]] in seconds."""

    def __init__(self, entries):
        self.entries = sorted((entry[0], entry[1], parse(entry[2] or "")[1]) for entry in entries)

    def index(self, seconds):
        return next((i for i, entry in enumerate(self.entries) if entry[0] <= seconds < entry[1]), None)

    def next(self, i):
        """The entry right after i, without a gap; None if there is none."""
        follows = i is not None and i + 1 < len(self.entries) and self.entries[i + 1][0] == self.entries[i][1]
        return i + 1 if follows else None

    def value(self, i, category, who=None):
        """The one value that entry i states; None if it states none, or two different ones."""
        if i is None:
            return None
        values = {(f.who, f.value) for f in self.entries[i][2]
                  if f and f.category == category and who in (None, f.who)}
        return values.pop()[1] if len(values) == 1 else None

    def people(self, i):
        """The people named by any fact of entry i; None unless both of the clip are named, and no third."""
        named = set() if i is None else {f.who for f in self.entries[i][2] if f and f.who}
        return named if len(named) == 2 else None


def solve(kind, fields, notes):
    """The answer as text, or None if the notes don't hold it."""
    environment = QUESTIONS[kind][0]
    i, who, x = notes.index(fields["t"]), fields.get("who"), fields.get("x")
    if kind.endswith("_at"):
        return notes.value(i, environment, who)
    if kind.endswith("_next"):
        return notes.value(notes.next(i), environment, who) if notes.value(i, environment, who) == x else None
    if kind == "object_colour":
        colour, shape = (notes.value(i, "object") or "none none").split()
        return colour if shape == x else None
    rows = [notes.index(t) for t in range(fields["t"], fields["u"], CLIP_SECONDS)]
    if kind == "place_many":
        known = [{place} if (place := notes.value(i, "place")) else None for i in rows]
    else:
        known = [notes.people(i) for i in rows]
    return NUMBERS[len(set().union(*known)) - 1] if known and all(known) else None


def _alternatives(kind, right, rng):
    """Three wrong but plausible options."""
    values = {"place": PLACES, "wear": COLOURS, "action": ACTIONS, "count": NUMBERS}.get(QUESTIONS[kind][0])
    if kind == "object_colour":
        values = COLOURS
    elif kind.endswith("_many"):                                     # two to four people, one to three places
        values = NUMBERS[:4] if kind == "place_many" else NUMBERS[1:5]
    elif kind.startswith(("object", "speech")):                        # one part wrong, the other, both
        a, b = right.split()
        firsts, seconds = (COLOURS, OBJECTS) if kind.startswith("object") else (FIRST, SECOND)
        c, d = rng.choice([v for v in firsts if v != a]), rng.choice([v for v in seconds if v != b])
        return [f"{c} {b}", f"{a} {d}", f"{c} {d}"]
    return rng.sample([value for value in values if value != right], 3)


def _questions(truth, environment):
    """Every (kind, fields) of an environment that a truthful writer, who may not repeat, can serve."""
    told = [clip_facts(clip) for clip in truth]
    new = [[f for f in now if f.category == environment and f not in before]
           for now, before in zip(told, [[]] + told)]
    for t, fresh in enumerate(new):
        seconds = {"t": t * CLIP_SECONDS}
        for fact in fresh:
            ask = {**seconds, "who": fact.who}
            yield f"{environment}_at", ask
            if environment == "object":
                yield "object_colour", {**seconds, "x": fact.value.split()[1]}
            after = new[t + 1] if t + 1 < len(truth) else []
            if environment == "action" and any(f.who == fact.who for f in after):
                yield "action_next", {**ask, "x": fact.value}
            elif environment in ("object", "count", "speech") and after:
                yield f"{environment}_next", {**seconds, "x": fact.value}
        # a place that stays can't be stated again, so places are counted where they change from clip to clip
        span = {"place": 3, "wear": 2}.get(environment)
        if span and t + span <= len(truth) and (environment == "wear" or all(new[t:t + span])):
            yield f"{environment}_many", {**seconds, "u": (t + span) * CLIP_SECONDS}


def make_tasks(stream, truth, rng, per_environment=2):
    """The tasks of one stream: rows of streams/tasks.jsonl, `per_environment` different ones per category.

    Asked after the stream's end. A stream's clock starts at 0; the right option's letter is random.
    """
    full = Notes([[t * CLIP_SECONDS, (t + 1) * CLIP_SECONDS, sentence("now", clip_facts(clip))]
                  for t, clip in enumerate(truth)])
    rows = []
    for environment in CATEGORIES:
        pool = [(*question, rng.randrange(2)) for question in _questions(truth, environment)]
        rng.shuffle(pool)
        # the other wording comes last, for short streams with too few new facts
        pool += [(kind, fields, 1 - wording) for kind, fields, wording in pool]
        several = [q for q in pool if q[0].endswith(("_many", "_next"))]
        single = [q for q in pool if q not in several]
        for n in range(per_environment):
            source = several if several and (not single or rng.random() < MULTI_SHARE) else single
            if not source:
                break
            kind, fields, wording = source.pop(0)
            who = f"<face_{fields['who']}>" if fields.get("who") else ""
            right = solve(kind, fields, full)
            options = rng.sample([right, *_alternatives(kind, right, rng)], 4)
            texts = {**fields, "who": who, "t": clock(fields["t"]), "u": clock(fields.get("u", 0))}
            rows.append({"task": f"{stream}-{environment}-{n + 1}", "stream": stream,
                         "environment": environment, "time": float(len(truth) * CLIP_SECONDS),
                         "question": QUESTIONS[kind][1 + wording].format(**texts),
                         "options": [f"{letter}. {option}" for letter, option in zip("ABCD", options)],
                         "answer": "ABCD"[options.index(right)]})
    return rows


# ---- streams ---------------------------------------------------------------------------------------------

def write_streams(S, out):
    """Renders the streams of 01 into out/videos, with captions.jsonl and truth.jsonl -> (streams, tasks).

    All about a stream follows from (SEED, split, number), so an interrupted run just goes on: videos that exist
    are kept. SystemExit where CLIP_SECONDS is another.
    """
    import numpy
    from tqdm import tqdm
    from support.runs import write_jsonl, written_aside
    if S.CLIP_SECONDS != CLIP_SECONDS:
        raise SystemExit(f"CLIP_SECONDS={S.CLIP_SECONDS}: tiny clips are {CLIP_SECONDS} s long")
    (out / "videos").mkdir(exist_ok=True)
    streams, tasks, captions, facts = [], [], [], []
    sizes = {"train": S.TRAIN_STREAMS, "deploy": S.DEPLOY_STREAMS, "test": S.TEST_STREAMS}
    names = [(split, i) for split, n in sizes.items() for i in range(min(n, S.LIMIT or n))]
    for split, i in tqdm(names, desc="rendering", unit="stream"):
        name = f"{split}-{i:03d}"
        truth = make_stream(stream_seed(S.SEED, split, i), S.CLIPS)
        video = out / "videos" / f"{name}.mp4"
        if not video.exists():
            with written_aside(video) as aside:
                write_video(aside, numpy.concatenate([draw_frames(clip) for clip in truth]))
        # The subtitles are in the pixels already; a cue would only tell the policy what it should read.
        clips = [{"clip": t, "start": float(t * CLIP_SECONDS), "end": float((t + 1) * CLIP_SECONDS),
                  "file": f"videos/{name}.mp4", "offset": float(t * CLIP_SECONDS), "speech": []}
                 for t in range(len(truth))]
        streams.append({"stream": name, "split": split, "source": "tiny", "clips": clips})
        facts += [{"stream": name, "clip": t, "facts": clip} for t, clip in enumerate(truth)]
        rng, memory = random.Random(f"{S.SEED} {name}"), None
        for t in range(len(truth)):
            memory = caption(truth, t, memory, rng)
            captions.append({"stream": name, "clip": t, "memory": memory})
        if split != "train":
            tasks += make_tasks(name, truth, rng, S.QUESTIONS)
    write_jsonl(out / "captions.jsonl", captions)
    write_jsonl(out / "truth.jsonl", facts)
    return streams, tasks


# ---- the exact judge -------------------------------------------------------------------------------------

class Judge:
    """Judge and reader, with the one method that all judges have: `ask(kind, items) -> list`. It never fails.

    truth_rows: rows of streams/truth.jsonl. Only "faithful" and "rank" look at them; the others read texts.
    """

    def __init__(self, truth_rows=()):
        self.truth = {(row["stream"], row["clip"]): row["facts"] for row in truth_rows}

    def ask(self, prompt, items):
        """prompt: of support/judges.py; items: dicts of the arguments of the method of its name."""
        method = getattr(self, prompt.name, None)
        if method is None:
            known = [name for name in vars(Judge) if name[0] != "_" and name != "ask"]
            raise ValueError(f"the toy world's judge has no method {prompt.name!r}, but {', '.join(known)}: "
                             "add it to Judge in tiny/world.py")
        return [method(**item) for item in items]

    def faithful(self, context, memory):
        """Every phrase is of the language and true in the newest clip; it connects to the memory before."""
        begins, found = parse(memory)
        connected = begins == connector(context.history[-1] if context.history else "")
        true = set(clip_facts(self.truth[context.stream, context.clip]))
        return bool(found) and connected and memory.endswith(".") and set(found) <= true

    def clean(self, previous, memory):
        """Nothing that the preceding memory states; no coordinates, no talk of the video, no labels."""
        said = lambda text: set(re.sub(r"^(now|still), |\.$", "", text.strip()).split(", ")) - {""}
        unwanted = (r"\[\s*\d+(\s*,\s*\d+)+|\b(this video|the video|subtitles?|bounding box)\b"
                    r"|['\"][^'\"]*<face_\d+>\s*:")
        return not said(previous or "") & said(memory) and not re.search(unwanted, memory, re.IGNORECASE)

    def rank(self, context, memories):
        """Ranks by the number of distinct true facts that the preceding memory doesn't state; 1 is best."""
        old = set(facts(context.history[-1] or "")) if context.history else set()
        true = set(clip_facts(self.truth[context.stream, context.clip])) - old
        counts = [len(true & set(facts(memory))) for memory in memories]
        return [sum(c > own for c in counts) + (counts.count(own) + 1) / 2 for own in counts]

    def prefer(self, questions, first, second):
        """Which memory serves such questions better: "first", "second" or "tie". Texts only.

        A question is after its category; a memory scores the distinct things of that category that it tells
        of, so that two contradicting values for one thing count once.
        """
        kinds = [read_question(question)[0] for question in questions]
        after = [QUESTIONS[kind][0] for kind in kinds if kind]
        scores = [sum(after.count(category) for category, _ in {(f.category, f.who) for f in facts(memory)})
                  for memory in (first, second)]
        return "tie" if scores[0] == scores[1] else "first" if scores[0] > scores[1] else "second"

    def answer(self, entries, question, options):
        """The letter of the option that the memories hold, "insufficient" if there is none. Texts only."""
        kind, fields = read_question(question)
        found = solve(kind, fields, Notes(entries)) if kind else None
        return next((option[0] for option in options if found and option[3:] == found), "insufficient")
