"""What a clip shows and says: frames that can be trusted; drawn on them, as in the paper, speech and faces.

Frames are decoded by decord, each call under a time limit, by the real time of each. Speech and face boxes
lie beside a video (NAME.srt, NAME.faces.jsonl), or are made on demand: faces by the optional package
insightface, speech by a Whisper model of transformers.
"""
import contextlib, functools, json, os, re, textwrap, threading, warnings

from loading import fingerprint, read_json, stamp, write_json, written_aside

try:
    import numpy as np
    import torch
except ImportError:              # the scripts' --help works before anything is installed
    np = torch = None

CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
DECODE_SECONDS = 60     # s that one call may take: decord 0.6.0 hangs for ever on some files
_videos = {}            # the 8 last used open files, since opening one scans all of it


class VideoError(ValueError):
    """A video that cannot be read; the text holds the file, the reason and the cure."""
    def __init__(self, file, reason):
        self.reason = f"{reason}. Leave it out, fetch it again, or re-encode it to H.264 in mp4"
        super().__init__(f"{file}: {self.reason}")


def _open_video(file, size):
    """-> [decord reader, times (n,) of the frames, end, key frames]; times in s on the file's own clock."""
    import decord
    decord.logging.set_level(decord.logging.QUIET)
    with open(file, "rb") as f:
        head = f.read(189)
    # One thread: with more, damage costs more good frames, and short reads gain little.
    reader = decord.VideoReader(file, num_threads=1, **dict(zip(("height", "width"), size or ())))
    stamps = reader.get_frame_timestamp(range(len(reader)))     # (n, 2) start, end
    if len(stamps) == 1:        # a picture, whose time may be missing
        stamps = np.array([[0, 0.04]])
    if head[:1] == head[188:] == b"G" or abs(stamps[0, 0]) > 1e6:   # seen: a key frame late; wrong by a seek
        raise VideoError(file, "is MPEG-TS or lacks time stamps (H.264 in AVI): decord gives wrong frames")
    keys = np.array(reader.get_key_indices())
    if stamps[0, 0] < -1e-3:    # Cut without re-encoding: the frames before 0 are counted, never delivered.
        stamps, keys = stamps[stamps[:, 0] >= -1e-3], keys[:0]   # Index i is the i-th from 0 on (as in PyAV).
    return [reader, stamps[:, 0], float(stamps[-1, 1]), keys]


def _in_time(file, size, work):
    """work(video) in a thread with a time limit, as signals end no hang (which leaves a sleeping thread)."""
    file = os.fspath(file)
    if not os.path.isfile(file) or not os.path.getsize(file):
        raise VideoError(file, "is empty" if os.path.isfile(file) else "is not a file")
    key = (file, size, os.stat(file).st_mtime_ns, os.getpid())  # pid: decord's threads do not survive a fork
    kept, done = _videos.pop(key, None), []                     # popped: a reader serves one thread at a time

    def body():
        try:
            video = kept or _open_video(file, size)
            done.extend((work(video), video))
        except Exception as error:      # decord's own DECORDError is a bare Exception
            reason = f"not decodable, or no video, or AV1 ({' '.join(str(error).split())[-90:]})"
            done.append(error if isinstance(error, VideoError) else VideoError(file, reason))
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(DECODE_SECONDS)
    if len(done) < 2:
        raise done[0] if done else VideoError(file, f"did not decode in DECODE_SECONDS = {DECODE_SECONDS}")
    _videos[key] = done[1]
    for old in list(_videos)[:-8]:
        _videos.pop(old, None)
    return done[0]


def _frame(video, file, size, i):
    """Frame i (H, W, 3), or None. Tried three times, each on a fresh reader: decord's worker runs ahead, and
    whether it meets damage behind a frame before it hands that out is a matter of luck."""
    for _ in range(3):
        try:
            return video[0][i].asnumpy()
        except Exception:
            video[0] = _open_video(file, size)[0]


def read_frames(file, times, size=None):
    """The frames nearest to times (s on the file's own clock, which begins at probe_video's start) by their
    real time stamps -> uint8 (n, H, W, 3), resized to size = (H, W) if given. Where the file is damaged the
    nearest other wanted frame stands in, with a warning. VideoError: under half decode, or a time is > 1 s
    outside the video."""
    file, times = os.fspath(file), np.asarray(times, dtype=float)
    span = f"from {times.min():.1f} to {times.max():.1f} s"

    def work(video):
        _, stamps, end, keys = video
        if times.min() < stamps[0] - 1 or times.max() > end + 1:
            raise VideoError(file, f"has no frames {span}, only from {stamps[0]:.1f} to {end:.1f} s")
        wanted, back = np.unique(np.abs(stamps - times[:, None]).argmin(1), return_inverse=True)
        # A seek to the key frame of an open group, as HEVC has them, drops the frames that lead up to it, and
        # decord miscounts: what follows a key frame at once is read on from the group before.
        group, lead = np.searchsorted(keys, wanted, "right") - 1, [wanted]
        for i, n in zip(wanted, group):
            if n > 0 and i - keys[n] < 8 < keys[n] - keys[n - 1]:
                lead.append(np.arange(keys[n] - 1, i))
        read = np.unique(np.concatenate(lead))
        try:
            return video[0].get_batch(read).asnumpy()[np.searchsorted(read, wanted)][back]
        except Exception:       # one by one, and after a failure on a fresh reader: only the bad ones go
            video[0] = _open_video(file, size)[0]
        good = {i: frame for i in wanted.tolist() if (frame := _frame(video, file, size, i)) is not None}
        lost = f"is damaged: {len(wanted) - len(good)} of {len(wanted)} frames {span} are lost"
        if 2 * len(good) < len(wanted):
            raise VideoError(file, lost)
        warnings.warn(f"{file} {lost}")
        return np.stack([good[min(good, key=lambda j: abs(j - i))] for i in wanted])[back]
    return _in_time(file, size, work)


def frame_times(clip, n):
    """Seconds in the clip's file of its frames; a shorter last clip gets fewer, two at least."""
    length = clip["end"] - clip["start"]
    n = max(2, round(n * min(1, length / 10)))
    return [clip["offset"] + (i + 0.5) * length / n for i in range(n)]


def probe_video(file):
    """-> {duration, start: s, frames, width, height}; decodes the first frame. Raises VideoError."""
    file = os.fspath(file)

    def work(video):
        if (frame := _frame(video, file, None, 0)) is None:
            raise VideoError(file, "gives no first frame")
        (height, width), start = frame.shape[:2], float(video[1][0])
        return dict(duration=video[2] - start, start=start, frames=len(video[1]), width=width, height=height)
    return _in_time(file, None, work)


# ---------------------------------------------------------------- what is drawn
@functools.lru_cache(1000)
def _wrapped(text, size, width):
    """(font of `size` px, lines of text at most `width` px wide); what no font here has is left out."""
    from PIL import ImageFont
    font = ImageFont.load_default(size)                 # the same everywhere, but hardly more than ASCII
    lacks = lambda: {c for c in text if c != " " and bytes(font.getmask(c)) == bytes(font.getmask("\uffff"))}
    for name in lacks() and ("DejaVuSans.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc"):
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, size)       # the last that is there has the most
    if lost := lacks():
        warnings.warn("subtitles lose characters that no font here has (apt install fonts-noto-cjk)")
        return _wrapped(" ".join("".join(c for c in text if c not in lost).split()), size, width)
    wraps = (textwrap.wrap(text, n) for n in range(4 * int(width / size) + 1, 0, -1))
    return font, next((w for w in wraps if all(font.getlength(line) <= width for line in w)), [])


def draw(frames, seconds, clip):
    """A copy of frames (n, H, W, 3) uint8 at seconds (n,) of the stream, with faces and speech on them. A cue
    between two frames stands on the nearer; one too long for its share of a third of H turns pages."""
    from PIL import Image, ImageDraw
    frames, seconds, (H, W) = frames.copy(), np.asarray(seconds, dtype=float), frames.shape[1:3]
    size = max(10, round((H * W) ** 0.5 / 18))          # px; 25 once a frame is made as small as 448 x 448
    pen = dict(fill="white", stroke_width=max(1, size // 12), stroke_fill="black")
    cues = [(c, np.maximum(c[0] - seconds, seconds - c[1]).clip(0)) for c in clip.get("speech") or ()]
    for i, at in enumerate(seconds):
        canvas = ImageDraw.Draw(image := Image.fromarray(frames[i]))
        faces = sorted(clip.get("faces") or (), key=lambda face: -abs(face[0] - at))    # the nearest stays
        for n, box in {n: box for when, n, *box in faces if abs(when - at) <= 0.5}.items():
            box = np.clip(box, 3, [W - 4, H - 4] * 2).tolist()
            canvas.rectangle(box, outline="red", width=max(2, size // 10))
            font, (name,) = _wrapped(f"<face_{n}>", max(8, size * 3 // 4), 10**6)
            place = min(box[0], W - 4 - font.getlength(name)), max(box[1], size)
            canvas.text(place, name, font=font, anchor="ld", **pen)
        heard, y = [cue for cue, off in cues if off[i] == off.min()], H - 0.4 * size
        for start, end, text in reversed(heard):
            font, lines = _wrapped(" ".join(text.split()), size, 0.92 * W)
            room = max(1, int(H / 3.75 / size) // len(heard))               # lines; one is 1.25 x size high
            page = room * int(np.clip((at - start) / (end - start or 1), 0, 0.999) * -(-len(lines) // room))
            text = "\n".join(lines[page:page + room]) + " ..." * (page + room < len(lines))
            canvas.text((W / 2, y), text, font=font, anchor="md", align="center", spacing=size // 6, **pen)
            y -= 1.25 * size * len(text.split("\n"))
        frames[i] = np.asarray(image)
    return frames


def clip_frames(clip, n):
    """Frames (n, H, W, 3) uint8 of a clip, and their seconds in it. Grey frames, said so, where it can't be
    read: 01 tried some frames, and the file is broken elsewhere."""
    at = frame_times(clip, n)
    try:
        frames = read_frames(clip["file"], at)
        if clip.get("speech") or clip.get("faces"):
            frames = draw(frames, [t - clip["offset"] + clip["start"] for t in at], clip)
    except VideoError as error:
        print(f"*** {error}. Clip {clip['clip']} is watched as grey frames ***")
        frames = np.full((len(at), 64, 64, 3), 127, np.uint8)
    return frames, [t - clip["offset"] for t in at]


# ---------------------------------------------------------------- beside a video: speech and faces
def read_srt(path):
    """[[start, end, text]] of an .srt file, by start, in s; [] where there is none. Overlaps stay.

    Lines of a cue are joined; of a bilingual one, those in Chinese, Japanese or Korean go. Markup goes too
    (<font ...>, {\\an8}), but face IDs such as <face_3> stay. A block without times is skipped: such files
    are mended by hand, and one bad cue must not cost the others.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    stamp = r"(\d+):(\d\d?):(\d\d?)(?:[,.](\d{1,3}))?"
    times = re.compile(rf"^[ \t]*{stamp}[ \t]*-->[ \t]*{stamp}.*$", re.MULTILINE)
    seconds = lambda h, m, s, ms: round(int(h) * 3600 + int(m) * 60 + int(s) + float(f"0.{ms or 0}"), 3)
    cues, found = [], list(times.finditer(text))
    for hit, after in zip(found, found[1:] + [None]):
        body = text[hit.end():after.start() if after else len(text)]
        body = re.split(r"\n[ \t]*\n", body)[0]         # a blank line ends a cue; where there is none, ...
        body = re.sub(r"\n[ \t]*\d+[ \t]*\n\Z", "", body) if after else body  # ... the next number goes
        body = re.sub(r"</?(?!face_)[a-zA-Z][^<>]*>|\{\\[^}]*\}", "", body)
        lines = [line for line in body.splitlines() if line.strip()]
        words = " ".join(" ".join([line for line in lines if not CJK.search(line)] or lines).split())
        begin, end = seconds(*hit.groups()[:4]), seconds(*hit.groups()[4:])
        if words and end > begin:
            cues.append([begin, end, words])
    return sorted(cues)


def read_faces(path):
    """([[s, n, left, top, right, bottom]] by time, {name: n}) of NAME.faces.jsonl; [], {} without one.
    SystemExit, with file and line, on a row that is no box, or a name that two faces have."""
    boxes, names = [], {}
    lines = path.read_text(encoding="utf-8-sig").split("\n") if path.exists() else []
    for n, line in [(n, line) for n, line in enumerate(lines, 1) if line.strip()]:
        try:
            row = json.loads(line)
            face, (at, left, top, right, bottom) = row["face"], map(float, (row["time"], *row["box"]))
            if type(face) is not int or not (face >= 0 and left < right and top < bottom and abs(at) < 1e9):
                raise ValueError("a time, a number or a box that cannot be")
            if "name" in row and names.setdefault(str(row["name"]), face) != face:
                raise ValueError(f"{row['name']} was face {names[str(row['name'])]} before")
            boxes.append([at, face, left, top, right, bottom])
        except (KeyError, TypeError, ValueError) as error:
            raise SystemExit(f'{path}, line {n}: {line[:80]} is no {{"time": s, "face": n, "box": [left, '
                             f'top, right, bottom]}}, in pixels ({error!r})') from None
    return sorted(boxes), names


def by_face(text, names):
    """A cue with its known speakers, one or more, as IDs: "Ann: Hi", {"Ann": 3} -> "<face_3>: Hi"."""
    for name in sorted(names, key=len, reverse=True):                           # "Ann Lee" before "Lee"
        said = re.compile(rf"(?<!\S){re.escape(name)}\s*[:\uff1a]", re.IGNORECASE)
        text = said.sub(f"<face_{names[name]}>:", text)
    return text


# ---------------------------------------------------------------- where nobody wrote them down
def face_finder(score):
    """An insightface app that finds faces of at least this score. SystemExit without it or its models."""
    try:
        from insightface.app import FaceAnalysis
        app = FaceAnalysis(name="buffalo_l", allowed_modules=["detection", "recognition"])
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise SystemExit(f"no face finder ({error}): pip install insightface onnxruntime, which fetches its "
                         "models when first used; or write NAME.faces.jsonl") from None
    app.prepare(ctx_id=0 if torch.cuda.is_available() else -1, det_thresh=score, det_size=(640, 640))
    return app


def find_faces(app, file, begin, end):
    """(n, 5 + 512) of the faces on the middle frame of each second (paper): s of the file's clock, left, top,
    right, bottom, embedding. A frame that can't be read has none."""
    rows = [np.zeros((0, 517))]
    for at in np.arange(begin + 0.5, end):
        with contextlib.suppress(VideoError):
            image = read_frames(file, [at])[0, :, :, ::-1].copy()               # (H, W, 3), BGR
            rows += [[[at, *face.bbox, *face.normed_embedding]] for face in app.get(image)]
    return np.concatenate(rows).astype(np.float32)


def tell_apart(found, match):
    """Boxes [s, n, left, top, right, bottom] by time of found (n, 517): each face is the known one whose mean
    embedding so far has the highest cosine, at least `match`, or else new. Two of one frame never are the
    same."""
    boxes, sums, there = [], {}, {}
    for at, *rest in found[np.argsort(found[:, 0], kind="stable")]:
        box, vector, taken = rest[:4], np.array(rest[4:]), there.setdefault(at, set())
        cosine = {n: vector @ sums[n] / np.linalg.norm(sums[n]) for n in sums.keys() - taken}
        n = max(cosine, key=cosine.get, default=0)
        n = n if n and cosine[n] >= match else len(sums) + 1
        taken.add(n)
        sums[n] = sums.get(n, 0) + vector
        boxes.append([round(float(at), 3), n, *(round(float(x), 1) for x in box)])
    return sorted(boxes)


def read_sound(file):
    """Samples (n,) float32 in [-1, 1], 16 kHz, mono, from 0 s of the file's clock on; silence where there is
    none, none without sound. By PyAV: decord's AudioReader closes gaps, and the rest comes early."""
    import av
    parts = []
    with av.open(str(file), timeout=DECODE_SECONDS) as box:
        first = sum(float((v.start_time or 0) * v.time_base) for v in box.streams.video[:1])    # decord's 0 s
        resample = av.AudioResampler("flt", "mono", 16000)
        for packet in box.demux(audio=0) if box.streams.audio else ():
            with contextlib.suppress(av.FFmpegError, ValueError):               # damage leaves a gap
                parts += [(part.time - first, part.to_ndarray()[0]) for frame in packet.decode()
                          for part in resample.resample(frame) if part.time is not None]
    wave = np.zeros(max((round(16000 * at) + len(x) for at, x in parts), default=0), np.float32)
    for at, x in parts:
        begin = round(16000 * at)
        wave[max(0, begin):max(0, begin + len(x))] = x[max(0, -begin):]
    return wave


def transcribe(file, recognise):
    """[[start, end, text]] of what is said in a file, in s on its clock; [] where it has no sound. VideoError
    where that can't be read. recognise: a transformers speech pipeline of a Whisper model."""
    import av
    try:
        wave = read_sound(file)
    except av.FFmpegError as error:
        raise VideoError(file, f"has sound that can't be read ({error})") from None
    if not len(wave):
        return []
    said, length = recognise({"raw": wave, "sampling_rate": 16000}, return_timestamps=True), len(wave) / 16000
    cues = [[round(start or 0.0, 3), round(min(length, length if end is None else end), 3), text]
            for (start, end), text in ((x["timestamp"], " ".join(x["text"].split())) for x in said["chunks"])]
    return sorted(cue for cue in cues if cue[2] and cue[0] < cue[1])


def speech_pipeline(S):
    """The transformers pipeline of the Whisper model S.ASR. SystemExit with the cure."""
    from transformers import pipeline
    try:
        recognise = pipeline("automatic-speech-recognition", model=S.ASR)
        assert recognise.type == "seq2seq_whisper", f"{type(recognise.model).__name__} tells no times"
    except Exception as error:          # of every kind: no network, no such model, another architecture
        raise SystemExit(f"ASR={S.ASR}: no Whisper model, such as openai/whisper-small, or its folder "
                         f"({' '.join(str(error).split())[:200]})") from None
    return recognise


def speech_and_faces(S, out, f, used, recognise, finder, skipped):
    """(cues, boxes) of a stream, on its clock: what lies beside its files, or else what ASR and FACES find,
    kept in `out` by file. used: [(file, begin, end, shift)], s of the file, and to add for the stream's."""
    from tqdm import tqdm
    key = lambda file, *span: fingerprint(str(file), stamp(file), *span)[:16]
    cues, boxes, names, seen = list(f.cues), [], {}, []
    for file, begin, end, shift in tqdm(used, f"speech of {f.stream}", disable=not recognise, leave=False):
        if recognise and not f.cues:
            path = out / "speech" / f"{key(file)}.json"
            try:
                if not path.exists():
                    write_json(path, transcribe(file, recognise))
                cues += [[a + shift, b + shift, text] for a, b, text in read_json(path)]
            except VideoError as error:
                skipped.append((file.name, error.reason))
        mine, called = read_faces(file.with_suffix(".faces.jsonl"))
        boxes += [[at + shift, *box] for at, *box in mine]
        for name, n in called.items():
            if names.setdefault(name, n) != n:
                raise SystemExit(f"{file}: {name} is face {n} here, but {names[name]} in an earlier file of "
                                 f"the stream {f.stream}: a face keeps its number over a stream")
    look = used if finder and not boxes else ()
    for file, begin, end, shift in tqdm(look, f"faces of {f.stream}", disable=not look, leave=False):
        path = out / "faces" / f"{key(file, begin, end)}.npy"
        if not path.exists():
            with written_aside(path) as aside, open(aside, "wb") as opened:
                np.save(opened, find_faces(finder, file, begin, end))
        seen.append(np.load(path).astype(float) + np.eye(1, 517) * shift)       # the first column: s
    if seen:
        boxes = tell_apart(np.concatenate(seen), S.FACE_MATCH)
    return sorted([a, b, by_face(text, names)] for a, b, text in cues), sorted(boxes)
