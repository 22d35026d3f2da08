"""Speech and faces, drawn on the frames as in the paper, so that a memory can say who spoke.

Speech comes from subtitles beside a video, or by a Whisper model (ASR). Faces come from NAME.faces.jsonl
beside it, or are found and told apart by the optional package insightface (FACES). In rows, a cue is [start,
end, text] and a box is [time, face, left, top, right, bottom], in s and in pixels of the video.
"""
import bisect
import codecs
import contextlib
import functools
import html
import json
import operator
import re
import textwrap
import warnings
from dataclasses import dataclass

from support.ranks import progress
from support.runs import fingerprint, read_json, stamp, write_json, written_aside
from support.video import DECODE_SECONDS, LostVideo, VideoError, frame_times, np, read_frames, torch

GREY_SHARE = 0.03            # of a stage's clips that may be grey, of the first 100 three: 01 has tried frames
                             # of each, so what it missed is rare, and more is a fault that goes on
FACE_HELD = 0.5              # s that a box stands before and after its time
FONTS = ("DejaVuSans.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc")    # the last has the most
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
SOUND_RATE = 16000           # samples a second, as Whisper hears


# ---------------------------------------------------------------- a clip's frames
def clip_frames(clip, n):
    """Frames (n, H, W, 3) uint8 of a clip, its speech and faces on them, and their times, s from its start.

    A clip that is damaged gives grey frames, and says so: 01 tried some of its frames, and others are broken.
    Where the whole file is lost, or more than a few clips are grey, the stage stops.
    """
    times = frame_times(clip, n)
    try:
        frames = read_frames(clip["file"], times, clip.get("reader", "PyAV"))
        if clip.get("speech") or clip.get("faces"):
            in_stream = [t - clip["offset"] + clip["start"] for t in times]
            frames = draw(frames, in_stream, clip)
        _was_grey.setdefault(place_of(clip), False)      # once grey, grey for all who have seen it
    except LostVideo as error:
        raise SystemExit(f"{clip['file']}: {error.fault}, though 01 could read it. Put it back (is its disk "
                         "mounted?) and run the same command again; or make the streams anew without it: "
                         "01_make_streams.py under another --RUN") from None
    except VideoError as error:
        frames = np.full((len(times), 64, 64, 3), 127, np.uint8)
        _was_grey[place_of(clip)] = True
        say_grey(clip, error)
    return frames, [t - clip["offset"] for t in times]


# {place of a clip: whether its frames were grey}, of the clips that this process has watched
_was_grey = {}


def place_of(clip):
    return clip["file"], clip["offset"]


def is_grey(clip):
    """Whether the clip was watched as grey frames, so that nothing that is written on it is true."""
    return _was_grey.get(place_of(clip), False)


def say_grey(clip, error):
    """Says that a clip is grey, and how many are. SystemExit where they are too many."""
    grey = sum(_was_grey.values())
    watched = len(_was_grey)
    print(f"*** {error}. Clip {clip['clip']} is watched as grey frames and leaves no memory: "
          f"{grey} grey clips of {watched} so far ***")
    if grey > GREY_SHARE * max(watched, 100):
        raise SystemExit(f"{grey} of {watched} clips cannot be read, though 01 could read some frames of "
                         "each. Look at the disk; then run 01 anew under another name, with a higher --CHECK, "
                         "so that it leaves them out")


# ---------------------------------------------------------------- what is drawn
@dataclass
class Canvas:
    """A frame that is drawn on. size: the height of the text, in pixels like height and width."""
    pen: object              # Pillow's ImageDraw
    height: int
    width: int
    size: int

    def write(self, place, text, font, anchor, **options):
        """White text with a black outline; `anchor` tells which point of it stands at `place` (x, y)."""
        outline = max(1, self.size // 12)
        self.pen.text(place, text, font=font, anchor=anchor, fill="white", stroke_fill="black",
                      stroke_width=outline, **options)


def draw(frames, seconds, clip):
    """A copy of frames (n, H, W, 3) uint8 with the speech and faces of the clip on them.

    seconds: (n,) when the frames are shown, on the stream's clock. A cue between two frames stands on the
    nearer.
    """
    from PIL import Image, ImageDraw
    frames = frames.copy()
    seconds = np.asarray(seconds, dtype=float)
    height, width = frames.shape[1:3]
    # 25 pixels, once a frame is made as small as 448 x 448.
    size = max(10, round((height * width) ** 0.5 / 18))
    cues = clip.get("speech") or []
    boxes = clip.get("faces") or []
    is_shown = [shown_on(cue, seconds) for cue in cues]
    for i, at in enumerate(seconds):
        image = Image.fromarray(frames[i])
        canvas = Canvas(ImageDraw.Draw(image), height, width, size)
        for face, box in faces_at(boxes, at).items():
            draw_face(canvas, face, box)
        heard = [cue for cue, shown in zip(cues, is_shown) if shown[i]]
        draw_speech(canvas, at, heard)
        frames[i] = np.asarray(image)
    return frames


def shown_on(cue, seconds):
    """(n,) bool: the frames of its time, or else the nearest."""
    start, end, _ = cue
    distance = np.maximum(start - seconds, seconds - end).clip(0)
    return distance == distance.min()


def faces_at(boxes, at):
    """{face: [left, top, right, bottom]} of the boxes that stand at a time; of two of one face the nearer."""
    near = [box for box in boxes if abs(box[0] - at) <= FACE_HELD]
    near.sort(key=lambda box: -abs(box[0] - at))         # so the nearest comes last, and stays
    return {face: box for _, face, *box in near}


def draw_face(canvas, face, box):
    """A red box with the face's ID above its left corner, both held inside the frame."""
    limits = [canvas.width - 4, canvas.height - 4] * 2
    box = np.clip(box, 3, limits).tolist()
    canvas.pen.rectangle(box, outline="red", width=max(2, canvas.size // 10))
    name = f"<face_{face}>"
    font, _ = wrapped(name, max(8, canvas.size * 3 // 4), 10**6)
    left = min(box[0], canvas.width - 4 - font.getlength(name))
    bottom = max(box[1], canvas.size)
    canvas.write((left, bottom), name, font, "ld")


def draw_speech(canvas, at, cues):
    """The cues of a time at the bottom of the frame, in their order, the last one lowest.

    They share a third of the height. A cue that is too long for its share turns pages over its time.
    """
    size = canvas.size
    y = canvas.height - 0.4 * size
    for start, end, text in reversed(cues):
        font, lines = wrapped(" ".join(text.split()), size, 0.92 * canvas.width)
        # In lines, of which each is 1.25 times as high as the text.
        share = max(1, int(canvas.height / 3.75 / size) // len(cues))
        pages = -(-len(lines) // share)
        length = end - start
        done = np.clip((at - start) / (length or 1), 0, 0.999)
        first = share * int(done * pages)
        page = lines[first:first + share]
        text = "\n".join(page)
        if first + share < len(lines):
            text += " ..."
        middle = canvas.width / 2
        canvas.write((middle, y), text, font, "md", align="center", spacing=size // 6)
        y -= 1.25 * size * max(1, len(page))


@functools.lru_cache(1000)
def wrapped(text, size, width):
    """(font of `size` px, lines of text at most `width` px wide).

    What no font here has is left out, with a warning.
    """
    font = font_for(text, size)
    lost = lacking(font, text)
    if lost:
        cure = "apt install fonts-noto-cjk"
        warnings.warn(f"subtitles lose characters that no font here has ({cure})")
        rest = "".join(character for character in text if character not in lost)
        return wrapped(" ".join(rest.split()), size, width)
    # The longest lines that fit, found by their number of characters.
    for characters in range(4 * int(width / size) + 1, 0, -1):
        lines = textwrap.wrap(text, characters)
        if all(font.getlength(line) <= width for line in lines):
            return font, lines
    return font, []


def font_for(text, size):
    """Pillow's own font, the same everywhere; where it lacks a character, the system's that has the most."""
    from PIL import ImageFont
    font = ImageFont.load_default(size)                  # it has hardly more than ASCII
    if lacking(font, text):
        for name in FONTS:
            with contextlib.suppress(OSError):           # not installed here
                font = ImageFont.truetype(name, size)
    return font


def lacking(font, text):
    """The characters that the font draws as it draws what no font has."""
    unknown = bytes(font.getmask("\uffff"))
    drawn = {character: bytes(font.getmask(character)) for character in text if character != " "}
    return {character for character, pixels in drawn.items() if pixels == unknown}


# ---------------------------------------------------------------- subtitles
SUBTITLES = (".srt", ".vtt", ".ass", ".ssa")

# Times as people and programs write them: without hours or fractions, with spaces, with many decimals ...
A_TIME = r"(-?)(?:(\d+)[ \t]*:[ \t]*)?(\d\d?)[ \t]*:[ \t]*(\d\d?)(?:[ \t]*[,.:][ \t]*(\d+))?"
# ... with arrows of several kinds between them, and positions behind.
TWO_TIMES = rf"^[ \t]*{A_TIME}[ \t]*[-=\u2013\u2014 ]*[>\u2192][ \t]*{A_TIME}.*$"
A_NUMBER = r"(?:^[ \t]*\d+[ \t]*\n\s*)?"
NO_TIMES = r"^(?!\d\d:\d\d:\d\d,\d{3} -->).*-->.*$"
UNTIMED = re.compile(r"\n[ \t]*\n[ \t]*\d+[ \t]*\n(?!\d\d:\d\d:\d\d,\d{3} -->)(?=[ \t]*\S)")
UNREADABLE = "00:00:00,000 --> 00:00:00,000"          # stands for the times of a cue that has none


def read_subtitles(path):
    """(cues by start, what is wrong with the file or ""). Cues that overlap stay so.

    pysubs2 reads them, once the times are written as it expects. A cue without times costs no other one.
    """
    import pysubs2
    text, encoding = decode_text(path.read_bytes())
    if encoding is None:
        return [], "is no text in any encoding that is known: write it as UTF-8"
    text = re.sub(r"\r*\n|\r", "\n", text)
    is_vtt = text.lstrip().startswith("WEBVTT")
    text = re.sub(r"<[\d:.]+>", "", text)               # of karaoke: when a word is sung
    number = "" if is_vtt else A_NUMBER
    text, timed = re.subn(number + TWO_TIMES, plain_times, text, flags=re.MULTILINE)
    text = re.sub(number + NO_TIMES, f"0\n{UNREADABLE}", text, flags=re.MULTILINE)
    if not is_vtt:
        text = UNTIMED.sub(f"\n\n0\n{UNREADABLE}\n", text)
    try:
        # The last cue is ours, because pysubs2 takes a last line of digits for the number of another cue.
        if timed:
            text += f"\n\n0\n{UNREADABLE}\n"
            *events, _ = pysubs2.SSAFile.from_string(text, "srt", keep_html_tags=True)
        else:
            events = list(pysubs2.SSAFile.from_string(text))
    except (pysubs2.exceptions.Pysubs2Error, ValueError):
        events = []
    cues = []
    unread = 0
    for event in events:
        body = re.sub(r"\\[Nn]", "\n", event.text).replace("\\h", " ")
        if is_vtt:                                      # a blank line ends a cue; a note may follow
            body = body.split("\n\n")[0]
        words = cue_words(body)
        if event.end <= event.start:
            unread += 1
        elif words and not event.is_comment and not event.is_drawing:
            cues.append([event.start / 1000, event.end / 1000, words])
    wrong = []
    if unread:
        wrong.append(f"{unread} of {len(events)} cues have no times that can be read")
    if not cues and not unread:
        wrong.append("holds no cue that can be read")
    if encoding != "utf-8":
        wrong.append(f"is not UTF-8, but by all appearances {encoding}")
    return sorted(cues), "; ".join(wrong)


def decode_text(data):
    """(text, its encoding) of a file that people write, without a BOM; ("", None) where it is no text."""
    import charset_normalizer
    for bom, encoding in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
                          (codecs.BOM_UTF16_BE, "utf-16-be")):
        if data.startswith(bom):
            return data[len(bom):].decode(encoding, "replace"), "utf-8"
    with contextlib.suppress(UnicodeDecodeError):
        if b"\0" not in data:
            return data.decode(), "utf-8"
    text = data.decode(errors="replace")
    bad = text.count("\ufffd")
    if 10 * bad <= len(data) - len(text):               # a few bad bytes among letters of more than one byte
        return text.replace("\ufffd", ""), f"UTF-8 with {bad} bad bytes"
    guesses = list(charset_normalizer.from_bytes(data))
    if not guesses:
        return "", None
    best = guesses[0]
    for guess in guesses:
        # Of those that are as likely, the one that most programs write.
        if guess.encoding == "cp1252" and guess.chaos <= best.chaos:
            best = guess
    return str(best), best.encoding


def plain_times(match):
    """The two times of a cue as pysubs2 reads them, below a number, which it takes off."""
    parts = match.groups()
    times = [as_milliseconds(*parts[:5]), as_milliseconds(*parts[5:])]
    if max(times) >= 100 * 3600 * 1000:                 # more than the format can hold
        return f"0\n{UNREADABLE}"
    written = []
    for time in times:
        seconds, fraction = divmod(time, 1000)
        written.append(f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02},{fraction:03}")
    return "0\n" + " --> ".join(written)


def as_milliseconds(sign, hours, minutes, seconds, fraction):
    """A time of a cue; what lies before 0 begins at 0."""
    if sign:
        return 0
    whole = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)
    return whole * 1000 + round(1000 * float(f"0.{fraction or 0}"))


def cue_words(body):
    """The text of a cue on one line. Of a bilingual cue the lines in Chinese, Japanese or Korean go.

    Markup goes too (<font ...>, {\\an8}), but face IDs such as <face_3> stay.
    """
    body = re.sub(r"</?(?!face_)[a-zA-Z][^<>]*>|\{\\[^}]*\}", "", body)
    lines = [line for line in body.splitlines() if line.strip()]
    others = [line for line in lines if not CJK.search(line)]
    if others:
        lines = others
    return " ".join(html.unescape(" ".join(lines)).split())


# ---------------------------------------------------------------- NAME.faces.jsonl
def read_faces(path):
    """(boxes by time, {name: face}) of NAME.faces.jsonl; [], {} where there is none.

    SystemExit, with file and line, on a row that is no box, or a name that two faces have.
    """
    boxes = []
    names = {}
    lines = decode_text(path.read_bytes())[0].split("\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            box = checked_box(row)
            face = box[1]
            if "name" in row:
                name = str(row["name"])
                if names.setdefault(name, face) != face:
                    raise ValueError(f"{row['name']} was face {names[name]} before")
        except (KeyError, TypeError, ValueError) as error:
            form = '{"time": s, "face": n, "box": [left, top, right, bottom]}, in pixels'
            place = f"{path}, line {number}"
            raise SystemExit(f"{place}: {line[:80]} is no {form} ({error!r})") from None
        boxes.append(box)
    return sorted(boxes), names


def checked_box(row):
    """A box from a row of NAME.faces.jsonl. Raises KeyError, TypeError or ValueError where it is none."""
    face = row["face"]
    time, left, top, right, bottom = map(float, [row["time"], *row["box"]])
    is_face = type(face) is int and face >= 0
    is_box = left < right and top < bottom
    is_time = abs(time) < 1e9                            # which NaN is not either
    if not (is_face and is_box and is_time):
        raise ValueError("a time, a number or a box that cannot be")
    return [time, face, left, top, right, bottom]


def by_face(text, names):
    """A cue with its known speakers, one or more, as face IDs.

    >>> by_face("Ann: Hi", {"Ann": 3})
    '<face_3>: Hi'
    """
    for name in sorted(names, key=len, reverse=True):    # "Ann Lee" before "Lee"
        speaker = re.compile(rf"(?<!\S){re.escape(name)}\s*[:\uff1a]", re.IGNORECASE)
        text = speaker.sub(f"<face_{names[name]}>:", text)
    return text


# ---------------------------------------------------------------- faces that nobody wrote down
def face_finder(score):
    """An insightface app that finds faces of at least this score. SystemExit without it or its models."""
    try:
        from insightface.app import FaceAnalysis
        app = FaceAnalysis(name="buffalo_l", allowed_modules=["detection", "recognition"])
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        cure = ("pip install insightface onnxruntime, which fetches its models when first used; "
                "or write NAME.faces.jsonl")
        raise SystemExit(f"no face finder ({error}): {cure}") from None
    device = 0 if torch.cuda.is_available() else -1
    app.prepare(ctx_id=device, det_thresh=score, det_size=(640, 640))
    return app


def find_faces(app, file, start, end):
    """The faces on the middle frame of each second (paper), (n, 5 + 512) float32.

    A row: s of the file's clock, left, top, right, bottom, embedding. A frame that cannot be read has none.
    """
    rows = [np.zeros((0, 517))]
    for at in np.arange(start + 0.5, end):
        with contextlib.suppress(VideoError):
            image = read_frames(file, [at])[0]           # (H, W, 3), RGB
            bgr = image[:, :, ::-1].copy()
            for face in app.get(bgr):
                rows.append([[at, *face.bbox, *face.normed_embedding]])
    return np.concatenate(rows).astype(np.float32)


def tell_apart(found, match):
    """Boxes by time of found faces (n, 517; see `find_faces`), numbered from 1 on.

    Each face is the known one whose mean embedding so far has the highest cosine, at least `match`, or else
    new. Two faces of one frame never are the same.
    """
    boxes = []
    sums = {}                                            # {face: sum of its embeddings so far}
    seen_at = {}                                         # {time: faces of that frame}
    by_time = np.argsort(found[:, 0], kind="stable")
    for time, left, top, right, bottom, *embedding in found[by_time]:
        embedding = np.array(embedding)
        taken = seen_at.setdefault(time, set())
        cosine = {}
        for face in sums.keys() - taken:
            cosine[face] = embedding @ sums[face] / np.linalg.norm(sums[face])
        face = max(cosine, key=cosine.get, default=None)
        if face is None or cosine[face] < match:
            face = len(sums) + 1
        taken.add(face)
        sums[face] = sums.get(face, 0) + embedding
        edges = [round(float(x), 1) for x in (left, top, right, bottom)]
        boxes.append([round(float(time), 3), face, *edges])
    return sorted(boxes)


# ---------------------------------------------------------------- speech that nobody wrote down
def speech_pipeline(model):
    """The transformers pipeline of a Whisper model. SystemExit with the cure."""
    from transformers import pipeline
    try:
        recognise = pipeline("automatic-speech-recognition", model=model)
        kind = type(recognise.model).__name__
        assert recognise.type == "seq2seq_whisper", f"{kind} tells no times"
    except Exception as error:           # of any kind: no network, no such model, another architecture
        reason = " ".join(str(error).split())[:200]
        wanted = "Whisper model, such as openai/whisper-small, or its folder"
        raise SystemExit(f"ASR={model}: no {wanted} ({reason})") from None
    return recognise


def transcribe(file, recognise):
    """The cues of what is said in a file, on its clock; [] where it has no sound.

    recognise: see `speech_pipeline`. Raises VideoError where the sound cannot be read.
    """
    import av
    try:
        wave = read_sound(file)
    except av.FFmpegError as error:
        raise VideoError(file, f"has sound that can't be read ({error})") from None
    if not len(wave):
        return []
    length = len(wave) / SOUND_RATE
    heard = recognise({"raw": wave, "sampling_rate": SOUND_RATE}, return_timestamps=True)
    cues = []
    for chunk in heard["chunks"]:
        start, end = chunk["timestamp"]
        # Whisper gives None for a time that it did not hear.
        start = 0.0 if start is None else round(start, 3)
        end = round(length if end is None else min(length, end), 3)
        text = " ".join(chunk["text"].split())
        if text and start < end:
            cues.append([start, end, text])
    return sorted(cues)


def read_sound(file):
    """Samples (n,) float32 in [-1, 1] at SOUND_RATE, from 0 s of the file's clock on; none without sound.

    Where the file has a gap or damage there is silence.
    """
    import av
    pieces = []                                          # (s, samples)
    with av.open(str(file), timeout=DECODE_SECONDS) as container:
        # 0 s is the first frame, even where the sound starts earlier.
        first = 0.0
        video = container.streams.best("video")
        if video:
            first = float((video.start_time or 0) * video.time_base)
        resampler = av.AudioResampler("flt", "mono", SOUND_RATE)
        packets = container.demux(audio=0) if container.streams.audio else []
        for packet in packets:
            with contextlib.suppress(av.FFmpegError, ValueError):    # damage, which leaves a gap
                pieces += sound_of(packet, resampler, first)
    length = max((begin + len(samples) for begin, samples in pieces), default=0)
    wave = np.zeros(length, np.float32)
    for begin, samples in pieces:
        end = begin + len(samples)
        before = max(0, -begin)                          # what was heard before 0 s goes
        wave[max(0, begin):max(0, end)] = samples[before:]
    return wave


def sound_of(packet, resampler, first):
    """[(index of the first sample, samples (n,))] of a packet; index 0 is at `first` s."""
    pieces = []
    for frame in packet.decode():
        for piece in resampler.resample(frame):
            if piece.time is not None:
                begin = round(SOUND_RATE * (piece.time - first))
                pieces.append((begin, piece.to_ndarray()[0]))
    return pieces


# ---------------------------------------------------------------- the speech and faces of a stream
def speech_and_faces(S, out, stream, pieces, recognise, finder, before=()):
    """(cues, boxes, what was skipped as (file name, reason)) of new pieces of a stream, on its clock.

    What was written down counts; where there is none, speech is recognised and faces are found, which `out`
    keeps by file. stream: of support/sources.py, as the pieces of files that it is made of. recognise,
    finder: None: not asked for. before: the pieces that the stream had already, because a face keeps its number
    over all of it.
    """
    cues = stream.cues
    skipped = []
    if recognise and not cues:
        cues, skipped = recognised_speech(stream.name, pieces, out / "speech", recognise)
    boxes, names = written_faces(stream.name, [*before, *pieces])
    if finder and not boxes:
        boxes = found_faces(stream.name, [*before, *pieces], out / "faces", finder, S.FACE_MATCH)
    cues = [[start, end, by_face(text, names)] for start, end, text in cues]
    return sorted(cues), sorted(boxes), skipped


def recognised_speech(name, pieces, folder, recognise):
    """(cues, skipped) of a stream by ASR. Each file's are kept in `folder`, on the file's clock."""
    cues = []
    skipped = []
    for piece in progress(pieces, f"speech of {name}", leave=False):
        path = folder / f"{file_key(piece.file)}.json"
        try:
            if not path.exists():
                write_json(path, transcribe(piece.file, recognise))
        except VideoError as error:
            skipped.append((piece.file.name, error.reason))
            continue
        for start, end, text in read_json(path):
            cues.append([start + piece.shift, end + piece.shift, text])
    return cues, skipped


def written_faces(name, pieces):
    """(boxes, {name: face}) of a stream from NAME.faces.jsonl. SystemExit where two files contradict."""
    boxes = []
    names = {}
    for piece in pieces:
        in_file, called = read_faces(piece.file.with_suffix(".faces.jsonl"))
        boxes += [[at + piece.shift, *box] for at, *box in in_file]
        for person, face in called.items():
            before = names.setdefault(person, face)
            if before != face:
                raise SystemExit(f"{piece.file}: {person} is face {face} here, but {before} in an earlier "
                                 f"file of the stream {name}: a face keeps its number over a stream")
    return boxes, names


def found_faces(name, pieces, folder, finder, match):
    """Boxes of a stream by `finder`, told apart over all of it. Each piece's faces are kept in `folder`."""
    found = []
    for piece in progress(pieces, f"faces of {name}", leave=False):
        path = folder / f"{file_key(piece.file, piece.start, piece.end)}.npy"
        if not path.exists():
            with written_aside(path) as aside, open(aside, "wb") as opened:
                np.save(opened, find_faces(finder, piece.file, piece.start, piece.end))
        faces = np.load(path).astype(float)              # (n, 517)
        faces[:, 0] += piece.shift
        found.append(faces)
    return tell_apart(np.concatenate(found), match) if found else []


def file_key(file, *span):
    """What is kept of a file is found again by this, as long as the file stays as it is."""
    return fingerprint(str(file), stamp(file), *span)[:16]


def put_on_clips(clips, cues, boxes):
    """Gives each clip the cues and boxes of its time, from those of a stream, sorted by time.

    Boxes are held for half a second, so a clip also has those just outside of it.
    """
    longest = max((end - start for start, end, _ in cues), default=0)
    for clip in clips:
        start, end = clip["start"], clip["end"]
        near = between(cues, start - longest, end)
        clip["speech"] = [cue for cue in near if cue[0] < end and cue[1] > start]
        if boxes:
            clip["faces"] = between(boxes, start - FACE_HELD, end + FACE_HELD)


def between(rows, first, last):
    """Those of `rows` whose time, which they begin with and are sorted by, is from `first` to `last`."""
    time = operator.itemgetter(0)
    return rows[bisect.bisect_left(rows, first, key=time):bisect.bisect(rows, last, key=time)]
