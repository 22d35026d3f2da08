"""Stage 1: turn a source of video into streams of 10-second clips, and questions into tasks about them.

SOURCE="tiny" renders the embedded world: real mp4 files whose facts are known, so all can be judged exactly.
SOURCE="videos" indexes any video file, or every video in a folder and below. It copies nothing and tries a
few frames of each clip, to know now which can be used; a broken file is skipped by name, and nothing hangs.

Each later stage reads one split: 02 "train", 03 to 05 "deploy", 06 "test". Plain videos are all of the split
SPLIT, except in a folder DATA/train, DATA/deploy or DATA/test. Who just wants memories of a folder of videos
needs "deploy" alone: 03 takes Phase One from another run (--FROM=OTHERRUN).

Beside a video: NAME.srt, its speech. In the folder DATA: tasks.jsonl, a question per line,
    {"video": "trip/day1.mp4", "question": "Who drove?", "options": ["A. Ann", "B. Bob"], "answer": "B"}
with, if wanted, "time" (s of the stream after which it is asked; else its end), "environment" (questions of
one kind share an adapter; else all are "questions") and "task" (a unique name). No options: an open question.

Run: python 01_make_streams.py [--NAME=value ...]       e.g. --SOURCE=videos --DATA=~/Videos --RUN=mine
In:  the source
Out: streams/streams.jsonl, tasks.jsonl; "tiny": videos/*.mp4, captions.jsonl, truth.jsonl; else files.jsonl
Takes 10 s for the embedded world; for videos 0.4 s per clip of 720p on one core, far less with --CHECK=0.
"""
import contextlib
import importlib.util
import json
import math
import pathlib
import random
import re
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from common import clock, np, read_jsonl, settings, start, write_jsonl, written_aside
from loading import DECODE_SECONDS, VideoError, frame_times, probe_video, read_frames

# ------------------------------------------------------------------------------------------------------------
SOURCE = "tiny"          # "tiny": the embedded world; "videos": any video file, or a folder of them
DATA = ""                # the video file or folder; unused by "tiny"
LIMIT = 0                # at most so many streams (of each split with "tiny"), for a first try; 0: all
CLIP_SECONDS = 10        # s; one clip, one memory (paper)
# ---- "tiny"
TRAIN_STREAMS = 64       # streams for Phase One
DEPLOY_STREAMS = 24      # streams watched after deployment: recent tasks, rollout cache
TEST_STREAMS = 24        # streams for the evaluation
CLIPS = 12               # clips per stream: two minutes
QUESTIONS = 2            # per environment of a deploy or test stream; Phase One sees no question
# ---- "videos"
SPLIT = "deploy"         # of a video that lies below no folder named train, deploy or test
SHORTEST = 2             # s; a shorter rest at the end of a video is left out, unless it is all there is
CHECK = 3                # frames tried in each clip, to skip bad ones now; 0: files are only opened
WORKERS = 4              # videos checked at a time
SAVE_EVERY = 100         # files checked; an interruption loses no more
FACE_SCORE = 0.6         # of the detector, at least, for a face to count
FACE_MATCH = 0.4         # cosine to the mean of a face's embeddings so far, at least, to be that face
ASR = ""                 # a Whisper model or its folder, for the speech of videos without .srt; "": none
# ------------------------------------------------------------------------------------------------------------

SPLITS = {"train": "02", "deploy": "03 to 05", "test": "06"}        # and the stages that read them
SUFFIXES = set(".mp4 .m4v .mov .mkv .webm .avi .ts .m2ts .mts .mpg .mpeg .flv .wmv .3gp .ogv".split())


# ---- the embedded world ------------------------------------------------------------------------------------

def tiny_streams(S, out):
    """Renders the embedded world into out/videos; videos that exist are kept. Returns streams, tasks, [].

    All about a stream follows from (SEED, split, number), so an interrupted run just goes on.
    """
    from tqdm import tqdm
    from tiny import world
    if S.CLIP_SECONDS != world.CLIP_SECONDS:
        raise SystemExit(f"CLIP_SECONDS={S.CLIP_SECONDS}: tiny clips are {world.CLIP_SECONDS} s long")
    (out / "videos").mkdir(exist_ok=True)
    streams, tasks, captions, facts = [], [], [], []
    sizes = {"train": S.TRAIN_STREAMS, "deploy": S.DEPLOY_STREAMS, "test": S.TEST_STREAMS}
    names = [(split, i) for split, n in sizes.items() for i in range(min(n, S.LIMIT or n))]
    for split, i in tqdm(names, desc="rendering", unit="stream"):
        name = f"{split}-{i:03d}"
        truth = world.make_stream(world.stream_seed(S.SEED, split, i), S.CLIPS)
        video = out / "videos" / f"{name}.mp4"
        if not video.exists():
            with written_aside(video) as aside:
                world.write_video(aside, np.concatenate([world.draw_frames(clip) for clip in truth]))
        # The subtitles are in the pixels already; a cue would only tell the policy what it should read.
        clips = cut_clips(f"videos/{name}.mp4", 0, len(truth) * S.CLIP_SECONDS, [], S)
        streams.append({"stream": name, "split": split, "source": "tiny", "clips": clips})
        facts += [{"stream": name, "clip": t, "facts": clip} for t, clip in enumerate(truth)]
        rng, memory = random.Random(f"{S.SEED} {name}"), None
        for t in range(len(truth)):
            memory = world.caption(truth, t, memory, rng)
            captions.append({"stream": name, "clip": t, "memory": memory})
        if split != "train":
            tasks += world.make_tasks(name, truth, rng, S.QUESTIONS)
    write_jsonl(out / "captions.jsonl", captions)
    write_jsonl(out / "truth.jsonl", facts)
    return streams, tasks, []


# ---- plain videos ------------------------------------------------------------------------------------------

def video_streams(S, out):
    """Indexes the video files of DATA, a stream each. Returns streams, tasks, skipped [(name, reason)].

    files.jsonl keeps what was found in each file; a later run looks only at files that are new or changed.
    """
    from tqdm import tqdm
    if importlib.util.find_spec("decord") is None:
        raise SystemExit("decord is missing: ./run.sh setup (or pip install -r requirements.txt)")
    folder, files = find_videos(S)
    index = out / "files.jsonl"
    known = {row["file"]: row for row in read_jsonl(index)} if index.exists() else {}
    rows, new = {}, []
    for file in files:
        row, stat = known.get(str(file)), file.stat()
        if row and (row["bytes"], row["changed"]) == (stat.st_size, stat.st_mtime_ns):
            rows[file] = row
        else:
            new.append(file)
    print(f"{len(files)} video files, {len(rows)} of them known from {index}")
    pool = ThreadPoolExecutor(S.WORKERS)            # decord works outside of the interpreter's lock
    checked = tqdm(pool.map(lambda file: check_video(file, S), new), "checking", len(new), unit="file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # a frame lost here and there: the clip is used all the same
            for n, row in enumerate(checked):
                rows[new[n]] = row
                if n % S.SAVE_EVERY == S.SAVE_EVERY - 1:
                    write_jsonl(index, rows.values())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        write_jsonl(index, rows.values())
    names = stream_names(folder, files)
    streams, skipped = [], []
    for file in files:
        row, cues = rows[file], read_srt(file.with_suffix(".srt"))
        skipped += [(file.relative_to(folder), reason) for reason in row["skipped"]]
        if row["clips"]:
            # Numbered without gaps, as the rest of the project finds clip n at place n. Speech is not kept in
            # files.jsonl: subtitles may come later than their video.
            clips = [clip | {"clip": n, "speech": heard(cues, clip)} for n, clip in enumerate(row["clips"])]
            split = next((p for p in file.relative_to(folder).parts[:1] if p in SPLITS), S.SPLIT)
            streams.append({"stream": names[file], "split": split, "source": "videos", "clips": clips})
    paths = {names[file]: file.relative_to(folder) for file in files}
    tasks, lost = read_tasks(folder / "tasks.jsonl", streams, paths)
    return streams, tasks, skipped + lost


def find_videos(S):
    """(folder, sorted video files) of DATA. Raises SystemExit where there are none."""
    if not S.DATA:
        raise SystemExit("SOURCE=videos needs --DATA=FILE or --DATA=FOLDER, a video or a folder of them")
    if S.SPLIT not in SPLITS:
        raise SystemExit(f"SPLIT={S.SPLIT!r}: expected one of {', '.join(SPLITS)}")
    data = pathlib.Path(S.DATA).expanduser().resolve()
    if data.is_file():
        return data.parent, [data]
    if not data.is_dir():
        raise SystemExit(f"DATA={S.DATA}: no such file or folder (looked at {data})")
    # A name with a leading dot is no video: macOS leaves ._NAME.mp4 beside NAME.mp4 on foreign disks.
    files = sorted(file for file in data.rglob("[!.]*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise SystemExit(f"{data}: no video file in it or below (looked for {' '.join(sorted(SUFFIXES))})")
    return data, files[:S.LIMIT or None]


def stream_names(folder, files):
    """{file: stream}: its path below the folder without suffix, or with it where two would have the same."""
    paths = {file: file.relative_to(folder) for file in files}
    count = Counter(path.with_suffix("") for path in paths.values())
    return {file: (path if count[path.with_suffix("")] > 1 else path.with_suffix("")).as_posix()
            for file, path in paths.items()}


def check_video(file, S):
    """A row of files.jsonl: {file, bytes, changed, clips, skipped: [reasons]}; CHECK frames try every clip.

    Times are the file's own, by its time stamps, in which subtitles count too; decord calls the first frame
    0 s even where the sound starts earlier. Raises nothing: an unusable file has no clips.
    """
    stat, clips, skipped = file.stat(), [], []
    # One frame would miss a hole, and all of them would take as long as to watch the video.
    try:
        seen = probe_video(file)
        first, end = math.floor(seen["start"]), seen["start"] + seen["duration"]
        for clip in cut_clips(str(file), first, end, [], S):
            began = time.monotonic()
            try:
                if S.CHECK:
                    read_frames(file, frame_times(clip, S.CHECK))
                clips.append(clip)
            except VideoError as error:
                skipped.append(f"{clock(clip['start'])}-{clock(clip['end'])}: {reason(error, file)}")
                if time.monotonic() - began >= DECODE_SECONDS:       # it hung, and so would the next
                    skipped[-1] += "; nothing after it was tried"
                    break
    except VideoError as error:
        skipped.append(reason(error, file))
    return {"file": str(file), "bytes": stat.st_size, "changed": stat.st_mtime_ns, "clips": clips,
            "skipped": skipped}


def reason(error, file):
    """The text of a VideoError without the file, which the summary prints in front of it."""
    return str(error).removeprefix(f"{file}: ")


# ---- clips, speech, tasks ----------------------------------------------------------------------------------

def cut_clips(file, first, end, cues, S, offset=None):
    """Clip rows of one file, from `first` to `end` in s of the stream. offset: where `first` lies in the
    file, in s; None: at `first` there too (streams of several files have their own clock).

    >>> from types import SimpleNamespace
    >>> S = SimpleNamespace(CLIP_SECONDS=10, SHORTEST=2)
    >>> [(clip["start"], clip["end"]) for clip in cut_clips("a.mp4", 0, 23, [], S)]
    [(0.0, 10.0), (10.0, 20.0), (20.0, 23.0)]
    """
    clips, shift = [], 0 if offset is None else offset - first
    count = math.floor((end - first - S.SHORTEST) / S.CLIP_SECONDS) + 1
    for n in range(max(1, count)):
        begin = first + n * S.CLIP_SECONDS
        clip = {"clip": n, "start": float(begin), "end": round(float(min(begin + S.CLIP_SECONDS, end)), 3),
                "file": file, "offset": float(begin + shift)}
        clips.append(clip | {"speech": heard(cues, clip)})
    return clips


def heard(cues, clip):
    """The cues that overlap a clip; one that spans two clips is heard in both."""
    return [cue for cue in cues if cue[0] < clip["end"] and cue[1] > clip["start"]]


def read_srt(path):
    """[[start, end, text]] of an .srt file, by start, in s; [] where there is none. Overlaps stay.

    Lines of a cue are joined. Markup goes (<font ...>, {\\an8}), but face IDs such as <face_3> stay. A block
    without times is skipped: such files are mended by hand, and one bad cue must not cost the others.
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
        words = " ".join(body.split())
        begin, end = seconds(*hit.groups()[:4]), seconds(*hit.groups()[4:])
        if words and end > begin:
            cues.append([begin, end, words])
    return sorted(cues)


def read_tasks(path, streams, files):
    """(task rows, what was left out as (name, reason)) of a tasks.jsonl, which the header explains.

    files: {stream: path below the folder}. Raises SystemExit, with file and line, on a row that is no task.
    """
    if not path.exists():
        return [], []
    ends = {s["stream"]: s["clips"][-1]["end"] for s in streams}
    names = {pathlib.PurePath(alias): s for s, p in files.items() for alias in (s, p)}  # suffix or not
    tasks, lost = [], Counter()
    try:
        rows = read_jsonl(path)
    except ValueError as error:
        raise SystemExit(f"{path}: not one JSON object per line ({error})") from None
    for n, row in enumerate(rows, 1):
        where = f"{path}, task {n}"
        if not {"video", "question", "answer"} <= set(row):
            raise SystemExit(f"{where}: needs video, question and answer; has {', '.join(row)}")
        stream = names.get(pathlib.PurePath(row["video"]))
        if stream not in ends:
            lost[str(row["video"])] += 1
            continue
        options = [o if re.match(r"[A-Z]\. ", o) else f"{letter}. {o}"
                   for letter, o in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", row.get("options") or [])]
        if options and row["answer"] not in [o[0] for o in options]:
            raise SystemExit(f"{where}: the answer {row['answer']!r} is none of the letters of {options}")
        tasks.append({"task": row.get("task", f"{stream}-{n}"), "stream": stream,
                      "environment": row.get("environment", "questions"),
                      "time": float(row.get("time", ends[stream])),
                      "question": row["question"], "options": options, "answer": row["answer"]})
    double = [name for name, count in Counter(t["task"] for t in tasks).items() if count > 1]
    if double:
        raise SystemExit(f"{path}: the task name {double[0]!r} stands twice; task names must be unique")
    return tasks, [(video, f"{n} tasks left out: no usable video of that name") for video, n in lost.items()]


# ---- summary -----------------------------------------------------------------------------------------------

def summary(streams, tasks, skipped):
    """Prints what was made, what was not and why, and which stages can use it."""
    print(f"\n{'split':8}{'streams':>9}{'clips':>8}{'hours':>8}{'cues':>8}   read by")
    for split, stages in SPLITS.items():
        mine = [s["clips"] for s in streams if s["split"] == split]
        clips = [clip for row in mine for clip in row]
        hours, cues = sum(c["end"] - c["start"] for c in clips) / 3600, sum(len(c["speech"]) for c in clips)
        print(f"{split:8}{len(mine):9}{len(clips):8}{hours:8.2f}{cues:8}   {stages}")
    kinds = sorted(Counter(t["environment"] for t in tasks).items())
    print("tasks: " + (", ".join(f"{kind} {n}" for kind, n in kinds) or "none, so only memories can be made"))
    print(f"skipped: {len(skipped)}")
    for name, why in skipped:
        print(f"  {name}: {why}")
    for split in sorted(SPLITS.keys() - {s["split"] for s in streams}):
        print(f"no {split} stream: stage {SPLITS[split]} would want videos in a folder DATA/{split}"
              + (", or skip it with --FROM=RUN, a run that has done it" if split == "train" else ""))


# ---- faces and speech that nobody wrote down ---------------------------------------------------------------

def read_faces(path):
    """([[s, n, left, top, right, bottom]] by time, {name: n}) of NAME.faces.jsonl; [], {} without one.
    Raises SystemExit, with file and line, on a row that is no box, or a name that two faces have."""
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


def find_faces(parts, S):
    """Boxes, as of read_faces, on a stream's clock: on the middle frame of each second (paper), told apart by
    their embeddings in time order; two of one frame are never the same. parts: [(file, begin, end, shift)],
    s of the file, and what to add for the stream's. SystemExit without insightface or its models."""
    try:
        from insightface.app import FaceAnalysis
        app = FaceAnalysis(name="buffalo_l", allowed_modules=["detection", "recognition"])
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise SystemExit(f"no face finder ({error}): pip install insightface onnxruntime, which fetches its "
                         "models when first used; or write NAME.faces.jsonl") from None
    gpu, boxes, sums = importlib.import_module("torch").cuda.is_available(), [], {}
    app.prepare(ctx_id=0 if gpu else -1, det_thresh=S.FACE_SCORE, det_size=(640, 640))
    for file, at, shift in [(f, t, d) for f, begin, end, d in parts for t in np.arange(begin + 0.5, end)]:
        try:
            image = read_frames(file, [at])[0, :, :, ::-1].copy()               # (H, W, 3), BGR
        except VideoError:
            continue
        there = set()
        for face in app.get(image):
            vector = face.normed_embedding                                      # (512,)
            cosine = {n: vector @ sums[n] / np.linalg.norm(sums[n]) for n in sums.keys() - there}
            n = max(cosine, key=cosine.get, default=0)
            n = n if n and cosine[n] >= S.FACE_MATCH else len(sums) + 1
            there.add(n)
            sums[n] = sums.get(n, 0) + vector
            boxes.append([round(float(at + shift), 3), n, *(round(float(x), 1) for x in face.bbox)])
    return sorted(boxes)


def speech_pipeline(S):
    """The transformers pipeline of the Whisper model S.ASR. Raises SystemExit with the cure."""
    from transformers import pipeline
    try:
        recognise = pipeline("automatic-speech-recognition", model=S.ASR)
        assert recognise.type == "seq2seq_whisper", f"{type(recognise.model).__name__} tells no times"
    except Exception as error:          # of every kind: no network, no such model, another architecture
        raise SystemExit(f"ASR={S.ASR}: no Whisper model, such as openai/whisper-small, or its folder "
                         f"({' '.join(str(error).split())[:200]})") from None
    return recognise


def read_sound(file):
    """Yields (begin, samples): s on the file's clock, up to 30 s (Whisper's window) of float32, 16 kHz, mono.
    PyAV: decord's AudioReader holds a whole file, 0.9 GB an hour, and closes gaps: the rest comes early."""
    import av
    waves, n, begin, level = [], 0, 0.0, 0.0
    with av.open(str(file), timeout=DECODE_SECONDS) as box:
        first = sum(float((v.start_time or 0) * v.time_base) for v in box.streams.video[:1])    # decord's 0 s
        resample = av.AudioResampler("flt", "mono", 16000)
        for packet in box.demux(audio=0) if box.streams.audio else ():
            frames = []
            with contextlib.suppress(av.FFmpegError, ValueError):               # damage leaves a gap
                frames = [part for frame in packet.decode() for part in resample.resample(frame)]
            for frame in frames:
                wave, now = frame.to_ndarray()[0], begin + n / 16000
                at, loud = now if frame.time is None else frame.time - first, np.abs(wave).mean()
                pause = n > 28 * 16000 or n > 24 * 16000 and loud < 0.2 * level
                if n and (pause or abs(at - now) > 0.3):
                    yield begin, np.concatenate(waves)
                    waves, n, level = [], 0, 0.0
                begin, n = begin if n else at, n + len(wave)
                level += (loud - level) * len(wave) / n                         # the mean so far
                waves.append(wave)
    if n:
        yield begin, np.concatenate(waves)


def transcribe(file, recognise):
    """[[start, end, text]] of what is said in a file, in s on its clock; [] where it has no sound. VideoError
    where that can't be read. recognise: made by speech_pipeline."""
    import av
    cues = []
    try:
        for begin, samples in read_sound(file):
            heard = recognise({"raw": samples, "sampling_rate": 16000}, return_timestamps=True)["chunks"]
            for (start, end), text in [(part["timestamp"], " ".join(part["text"].split())) for part in heard]:
                length = len(samples) / 16000
                start, end = begin + (start or 0), begin + min(length, length if end is None else end)
                if text and end > start and end > 0:
                    cues.append([round(max(0, start), 3), round(end, 3), text])
    except av.FFmpegError as error:
        raise VideoError(file, f"has sound that can't be read ({error})") from None
    return sorted(cues)


# ---- the stage ---------------------------------------------------------------------------------------------

def main(argv=None):
    S = settings(globals(), argv)
    sources = {"tiny": tiny_streams, "videos": video_streams}
    if S.SOURCE not in sources:
        raise SystemExit(f"SOURCE={S.SOURCE!r}: expected one of {', '.join(sources)}")
    out = start(S, "streams")
    streams, tasks, skipped = sources[S.SOURCE](S, out)
    if not streams:
        lines = "\n".join(f"  {name}: {why}" for name, why in skipped)
        raise SystemExit(f"no stream could be made of {S.DATA or S.SOURCE}:\n{lines}")
    write_jsonl(out / "tasks.jsonl", tasks)
    write_jsonl(out / "streams.jsonl", streams)     # last: until it is there, later stages ask for 01
    summary(streams, tasks, skipped)


if __name__ == "__main__":
    main()
