"""Stage 1: turn a source of video into streams of 10-second clips, and questions into tasks about them.

SOURCE="tiny" renders the embedded world: real mp4 files whose facts are known, so all can be judged exactly.
Every other source indexes video files in the folder DATA. It copies nothing and tries a few frames; what
can't be used is skipped by name, and nothing hangs.
  "videos"     any video file, or every video in a folder and below, a stream each. Beside it, if wanted:
               NAME.srt, its speech. In the folder: tasks.jsonl, a question per line,
               {"video": "trip/day1.mp4", "question": "Who drove?", "options": ["A. Ann", "B. Bob"],
               "answer": "B"} with, if wanted, "time" (s of the stream, when it is asked; else its end),
               "environment" (questions of one kind share an adapter; else all are "questions") and "task" (a
               unique name). No options: an open question.
  "videomme"   Video-MME as published: videomme/*.parquet (by the optional pyarrow; or videomme.jsonl, the
               same rows), data/ID.mp4, subtitle/ID.srt
  "egolife"    EgoLifeQA/EgoLifeQA_A1_JAKE.json, A1_JAKE/DAY1/*.mp4 .., EgoLifeCap/Transcript/..: one stream
               of all days, in s since DAY1 00:00; a task sees what lies before its query time
  "egotempo"   egotempo_openQA.json, and Ego4D's video_540ss/UID.mp4, or else trimmed_clips/CLIP.mp4

Identity and speech are drawn into the frames, as the paper does. Speech: from .srt, or by ASR where there is
none. Faces: from NAME.faces.jsonl beside a video, a line per box,
    {"time": 12.5, "face": 3, "box": [left, top, right, bottom], "name": "Ann"}
(s of the file's clock, held half a second either side; pixels of the video; "name" only if cues name their
speaker: "Ann: hello" is then drawn as "<face_3>: hello"), or found and clustered with FACES=1. A face keeps
its number over a stream. Without any of this the frames stay as they are.

Each later stage reads one split: 02 "train", 03 to 05 "deploy", 06 "test". "online" serves 03 to 06: the
first questions of each kind go to Phase One, those after them to the adapter. "videos" in DATA/train,
DATA/deploy or DATA/test are of that split, all else is of SPLIT.

Run: python 01_make_streams.py [--NAME=value ...]       e.g. --SOURCE=videos --DATA=~/Videos --RUN=mine
Out: streams/streams.jsonl, tasks.jsonl; "tiny": videos/*.mp4, captions.jsonl, truth.jsonl; else files.jsonl
Takes 10 s for the embedded world; for videos 0.4 s per clip of 720p on one core, far less with --CHECK=0.
"""
import bisect, importlib, importlib.util, math, pathlib, re, string, time, warnings
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor

from common import clock, read_json, read_jsonl, settings, start, write_jsonl
from loading import stamp
from video import (DECODE_SECONDS, VideoError, face_finder, frame_times, probe_video, read_frames, read_srt,
                   speech_and_faces, speech_pipeline)

# ------------------------------------------------------------------------------------------------------------
SOURCE = "tiny"          # "tiny" | "videos" | "videomme" | "egolife" | "egotempo"
DATA = ""                # the folder of the source as published, or a video file; unused by "tiny"
LIMIT = 0                # at most so many streams (of each split with "tiny"; files of "egolife"); 0: all
TYPES = ""               # only questions of these types: --TYPES="OCR Problems,Counting Problem"; "": of all
DURATION = "short,medium"        # of "videomme": also long (the paper leaves it out)
CLIP_SECONDS = 10        # s; one clip, one memory (paper)
# ---- "tiny"
TRAIN_STREAMS = 64       # streams for Phase One
DEPLOY_STREAMS = 24      # streams watched after deployment: recent tasks, rollout cache
TEST_STREAMS = 24        # streams for the evaluation
CLIPS = 12               # clips per stream: two minutes
QUESTIONS = 2            # per environment of a deploy or test stream; Phase One sees no question
# ---- all but "tiny"
SPLIT = "online"         # of a video that lies below no folder named train, deploy or test
SHORTEST = 2             # s; a shorter rest at the end of a video is left out, unless it is all there is
CHECK = 3                # frames tried in each clip ("videos") or file, to skip bad ones now; 0: only opened
WORKERS = 4              # videos checked at a time
ASR = ""                 # a Whisper model or its folder, for videos without .srt; "": speech goes unread
FACES = 0                # 1: faces are found where a stream has no NAME.faces.jsonl (insightface)
FACE_SCORE = 0.6         # of the detector, at least, for a face to count
FACE_MATCH = 0.4         # cosine to the mean of a face's embeddings so far, at least, to be that face
SAVE_EVERY = 100         # files checked; an interruption loses no more
# ------------------------------------------------------------------------------------------------------------

SPLITS = {"train": "02", "deploy": "03 to 05", "test": "06", "online": "03 to 06"}    # and who reads them
SUFFIXES = set(".mp4 .m4v .mov .mkv .webm .avi .ts .m2ts .mts .mpg .mpeg .flv .wmv .3gp .ogv".split())


# ---- what a source holds: streams of parts of files, and rows of questions about them ----------------------

# A stream to be made. parts: (file, begin, end, first): from `begin` to `end` in s of the file's clock (None:
# all of it), put at `first` s of the stream (None: on the file's own clock). cues: as `read_srt`.
Found = namedtuple("Found", "stream split parts cues")


def videos(S, folder, data):
    """Any video file, or all in a folder and below; questions of its tasks.jsonl."""
    # A name with a leading dot is no video: macOS leaves ._NAME.mp4 beside NAME.mp4 on foreign disks.
    files = [data] if data.is_file() else sorted(
        file for file in folder.rglob("[!.]*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise SystemExit(f"{data}: no video file in it or below (looked for {' '.join(sorted(SUFFIXES))})")
    files, found, names = files[:S.LIMIT or None], [], {}
    bare = {file: file.relative_to(folder).with_suffix("") for file in files}
    count = Counter(bare.values())
    for file, path in bare.items():
        whole = file.relative_to(folder)                    # where a.mp4 lies beside a.mkv, or a.mp4.mkv
        name = (path if count[path] == 1 and folder / path not in bare else whole).as_posix()
        split = next((p for p in path.parts[:1] if p in SPLITS), S.SPLIT)
        found.append(Found(name, split, [(file, None, None, None)], read_srt(file.with_suffix(".srt"))))
        names |= {pathlib.PurePath(alias): name for alias in (name, whole, file)}
    path = folder / "tasks.jsonl"
    try:
        rows = list(enumerate(read_jsonl(path) if path.exists() else [], 1))
    except ValueError as error:
        raise SystemExit(f"not one JSON object per line: {error}") from None
    for n, row in rows:
        if not isinstance(row, dict) or not {"video", "question", "answer"} <= set(row) <= {
                "video", "question", "answer", "options", "time", "environment", "task"}:
            raise SystemExit(f"{path}, task {n}: needs video, question and answer, may have options, time, "
                             f"environment and task; is {str(row)[:200]}")
        texts = [row.get(k, "") for k in ("video", "question", "answer", "environment", "task")]
        options, at = row.get("options", []), row.get("time", 0)
        if not (isinstance(options, list) and all(isinstance(text, str) for text in texts + options)
                and isinstance(at, (int, float)) and math.isfinite(at)):
            raise SystemExit(f"{path}, task {n}: options is a list, time a number, all else text; is {row}")
    tasks = [{"environment": "questions"} | row | {
        "video": names.get(pathlib.PurePath(row["video"]), row["video"]), "row": f"{path}, task {n}"}
        for n, row in rows]
    return found, chosen(S, "TYPES", tasks, "environment")


def videomme(S, folder, _):
    """Video-MME: a stream per video, in the order of the table."""
    places = ("videomme/*.jsonl", "videomme*.jsonl", "videomme/*.parquet", "*.parquet")
    table = next((path for place in places for path in sorted(folder.glob(place))), None)
    if table is None:
        raise SystemExit(f"{folder}: none of {', '.join(places)}")
    if table.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise SystemExit(f"{table} needs the package pyarrow: pip install pyarrow. Or write its rows to "
                         f"{folder / 'videomme.jsonl'}, one JSON object a line")
    rows = (importlib.import_module("pyarrow.parquet").read_table(table).to_pylist()
            if table.suffix == ".parquet" else read_jsonl(table))
    rows = chosen(S, "TYPES", chosen(S, "DURATION", rows, "duration"), "task_type")
    files = by_stem(folder, "data", "video")
    ids = limited(S, [r["videoID"] for r in rows], files)
    found = [Found(i, S.SPLIT, [(files[i], None, None, None)], read_srt(folder / "subtitle" / f"{i}.srt"))
             for i in ids if i in files]
    return found, [{"video": r["videoID"], "task": r["question_id"], "environment": r["task_type"],
                    "question": r["question"], "options": r["options"], "answer": r["answer"]}
                   for r in rows if r["videoID"] in ids]


def egolife(S, folder, _):
    """EgoLife: all files of one wearer are one stream, with gaps, in s since DAY1 00:00."""
    found, tasks = [], []
    at = lambda path: instant(*re.search(r"(DAY\d+).*_(\d{8})$", path.stem).groups())
    usual = folder / "EgoLifeQA" / "EgoLifeQA_A1_JAKE.json"
    for table in sorted(usual.parent.glob("EgoLifeQA_*.json")) or [usual]:
        who, eight = re.match(r"EgoLifeQA_(\w+)", table.name)[1], "[0-9]" * 8
        files, rows = sorted(folder.glob(f"{who}/DAY*/DAY*_{who}_{eight}.mp4"), key=at), read_json(table)
        rows = [r | {"at": instant(*(r["query_time"][x] for x in ("date", "time")))} for r in rows]
        if S.LIMIT and S.LIMIT < len(files):          # what is asked later than the last file is left out
            rows, files = [r for r in rows if r["at"] <= at(files[S.LIMIT])], files[:S.LIMIT]
        spoken = folder.glob(f"EgoLifeCap/Transcript/{who}/DAY*/{who}_DAY*_{eight}.srt")
        cues = [[a + at(path), b + at(path), text] for path in spoken for a, b, text in read_srt(path)]
        if files:
            found.append(Found(who, S.SPLIT, [(file, None, None, at(file)) for file in files], sorted(cues)))
        tasks += [{"video": who, "task": f"{who}-{r['ID']}", "environment": r["type"], "time": r["at"],
                   "question": r["question"], "options": [r[f"choice_{x}"] for x in "abcd"],
                   "answer": r["answer"]} for r in sorted(rows, key=lambda r: r["at"])]
    return found, chosen(S, "TYPES", tasks, "environment")


def egotempo(S, folder, _):
    """EgoTempo: a stream per clip. The published way of trimming breaks about 4 clips in 10, so the full
    video is preferred."""
    table = next(iter(sorted(folder.glob("egotempo_openQA*.json"))), folder / "egotempo_openQA.json")
    rows = chosen(S, "TYPES", read_json(table)["annotations"], "question_type")
    full, cut = by_stem(folder, "video_540ss"), by_stem(folder, "trimmed_clips")
    parts = {}
    for i in [r["clip_id"] for r in rows]:
        video, begin, end = i.rsplit("_", 2)
        if video in full or i in cut:
            parts[i] = (full[video], max(0.0, float(begin)), float(end), 0) if video in full else (
                cut[i], None, None, None)
    ids = limited(S, [r["clip_id"] for r in rows], parts)
    found = [Found(i, S.SPLIT, [parts[i]], []) for i in ids if i in parts]
    return found, [{"video": r["clip_id"], "task": r["question_id"], "environment": r["question_type"],
                    "question": r["question"], "answer": r["answer"]}
                   for r in rows if r["clip_id"] in ids]


def instant(day, stamp):
    """s since DAY1 00:00 of EgoLife's HHMMSSFF. FF counts frames at 20 a second, yet reaches 92: clamped.

    >>> instant("DAY2", "01020392")
    90123.95
    """
    h, m, s, frame = (int(stamp[i:i + 2]) for i in (0, 2, 4, 6))
    return (int(day[3:]) - 1) * 86400 + h * 3600 + m * 60 + s + min(frame, 19) / 20


def by_stem(folder, *places):
    return {file.stem: file for place in places if (folder / place).is_dir()
            for file in sorted((folder / place).iterdir()) if file.suffix.lower() in SUFFIXES}


def limited(S, ids, there):
    """The first LIMIT of those that are there, as a dict in order; without LIMIT all, so that the summary can
    name those that are not."""
    return dict.fromkeys([i for i in dict.fromkeys(ids) if i in there][:S.LIMIT] if S.LIMIT else ids)


def chosen(S, constant, rows, key):
    """The rows whose `key` the constant names; "": all. SystemExit where it names one that none has."""
    kinds = sorted({r[key] for r in rows})
    wanted = [x.strip().casefold() for x in getattr(S, constant).split(",") if x.strip()]
    if unknown := set(wanted) - {kind.casefold() for kind in kinds}:
        raise SystemExit(f"{constant}: no question is of {', '.join(unknown)}, but of "
                         f"{', '.join(kinds) or 'no type, as there are none'}")
    return [r for r in rows if not wanted or r[key].casefold() in wanted]


SOURCES = {source.__name__: source for source in (videos, videomme, egolife, egotempo)}


# ---- files to clips ----------------------------------------------------------------------------------------

def check_files(S, out, spans):
    """{file: row of `check_video`}; spans: {file: [[begin, end] ..]}. files.jsonl keeps the rows; a later run
    looks only at files that are new or changed."""
    from tqdm import tqdm
    if importlib.util.find_spec("decord") is None:
        raise SystemExit("decord is missing: ./run.sh setup (or pip install -r requirements.txt)")
    index = out / "files.jsonl"
    known, rows, new = {row["file"]: row for row in read_jsonl(index)} if index.exists() else {}, {}, []
    for file in spans:
        row = known.get(str(file))
        slow = row and any("DECODE_SECONDS" in why for why in row["skipped"])       # of a busy disk, perhaps
        how = [S.SOURCE, S.CLIP_SECONDS, S.SHORTEST, S.CHECK]
        if row and not slow and (row["stamp"], row["spans"], row["how"]) == (stamp(file), spans[file], how):
            rows[file] = row
        else:
            new.append(file)
    print(f"{len(spans)} video files, {len(rows)} of them known from {index}")
    pool = ThreadPoolExecutor(S.WORKERS)            # decord works outside of the interpreter's lock
    checked = pool.map(lambda file: check_video(file, spans[file], S), new)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # a frame lost here and there: the clip is used all the same
            for n, row in enumerate(tqdm(checked, "checking", len(new), unit="file")):
                rows[new[n]] = row
                if n % S.SAVE_EVERY == S.SAVE_EVERY - 1:
                    write_jsonl(index, rows.values())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        write_jsonl(index, rows.values())
    return rows


def indexed(S, out, folder, found):
    """(streams, skipped [(name, reason)]) of what a source has found."""
    recognise = speech_pipeline(S) if S.ASR and not all(f.cues for f in found) else None
    finder, spans, streams = face_finder(S.FACE_SCORE) if S.FACES else None, {}, []
    for file, begin, end, _ in (part for f in found for part in f.parts):
        spans.setdefault(file, []).append([begin, end])
    rows = check_files(S, out, spans)
    skipped = [(file.relative_to(folder), why) for file in spans for why in rows[file]["skipped"]]
    for f in found:
        clips, used = [], []
        for file, begin, end, first in f.parts:
            shift, good = 0 if first is None else first - (begin or 0), rows[file]["clips"][
                spans[file].index([begin, end])]
            for clip in good:   # numbered without gaps, as the rest of the project finds clip n at place n
                times = {x: round(clip[x] + shift, 3) for x in ("start", "end")}
                clips.append(clip | {"clip": len(clips)} | times)
            used += [(file, good[0]["start"], good[-1]["end"], shift)] if good else []
        cues, boxes = speech_and_faces(S, out, f, used, recognise, finder, skipped)
        starts, longest = [cue[0] for cue in cues], max((b - a for a, b, _ in cues), default=0)
        seconds = [box[0] for box in boxes]
        for clip in clips:
            near = bisect.bisect(starts, clip["start"] - longest), bisect.bisect_left(starts, clip["end"])
            clip["speech"] = [cue for cue in cues[slice(*near)] if cue[1] > clip["start"]]
            near = bisect.bisect_left(seconds, clip["start"] - 0.5), bisect.bisect(seconds, clip["end"] + 0.5)
            clip |= {"faces": boxes[slice(*near)]} if boxes else {}
        if clips:
            streams.append({"stream": f.stream, "split": f.split, "source": S.SOURCE, "clips": clips})
    return streams, skipped


def check_video(file, spans, S):
    """A row of files.jsonl: {file, stamp, spans, clips: [[clip ..] per span], skipped: [reasons], how}.

    Times are the file's own, by its time stamps, in which subtitles count too; decord calls the first frame
    0 s even where the sound starts earlier. Raises nothing: an unusable file has no clips.
    """
    clips, skipped = [[] for _ in spans], []
    try:
        seen = probe_video(file)
        first, last = seen["start"], seen["start"] + seen["duration"]
        for n, (begin, end) in enumerate(spans):
            begin = math.floor(first) if begin is None else max(begin, first)
            if begin < last:
                clips[n], bad = decodable(file, cut_clips(str(file), begin, min(last, end or last), S), S)
            else:
                bad = [f"has nothing from {begin:.1f} s on, as it ends at {last:.1f} s"]
            skipped += bad
    except VideoError as error:
        skipped.append(error.reason)
    return {"file": str(file), "stamp": stamp(file), "spans": spans, "clips": clips, "skipped": skipped,
            "how": [S.SOURCE, S.CLIP_SECONDS, S.SHORTEST, S.CHECK]}


def decodable(file, clips, S):
    """(the clips that can be read, why others can't). A data set's files, thousands of them, are tried as a
    whole, by CHECK frames and one a minute; where that fails, clip by clip, as any other video."""
    if not S.CHECK:
        return clips, []
    if S.SOURCE != "videos":
        try:
            length = clips[-1]["end"] - clips[0]["start"]
            for at in frame_times(clips[0] | {"end": clips[-1]["end"]}, max(S.CHECK, round(length / 60))):
                read_frames(file, [at])
            return clips, []
        except VideoError:
            pass
    good, bad = [], []
    for clip in clips:          # one frame would miss a hole, all would take as long as to watch the video
        began = time.monotonic()
        try:
            read_frames(file, frame_times(clip, S.CHECK))
            good.append(clip)
        except VideoError as error:
            bad.append(f"{clock(clip['start'])}-{clock(clip['end'])}: {error.reason}")
            if time.monotonic() - began >= DECODE_SECONDS:       # it hung, and so would the next
                bad[-1] += "; nothing after it was tried"
                break
    return good, bad


def cut_clips(file, first, end, S):
    """Clip rows of one file, from `first` to `end` in s of its clock.

    >>> from types import SimpleNamespace
    >>> S = SimpleNamespace(CLIP_SECONDS=10, SHORTEST=2)
    >>> [(clip["start"], clip["end"]) for clip in cut_clips("a.mp4", 0, 23, S)]
    [(0.0, 10.0), (10.0, 20.0), (20.0, 23.0)]
    """
    count, clips = math.floor((end - first - S.SHORTEST) / S.CLIP_SECONDS) + 1, []
    for n in range(max(1, count)):
        begin = round(float(first + n * S.CLIP_SECONDS), 3)
        clips.append({"clip": n, "start": begin, "end": round(float(min(begin + S.CLIP_SECONDS, end)), 3),
                      "file": file, "offset": begin, "speech": []})
    return clips


# ---- speech and tasks --------------------------------------------------------------------------------------

def as_tasks(rows, streams):
    """(rows of tasks.jsonl in the order of streams and times, what was left out as (name, reason)).
    SystemExit on a bad row of a tasks.jsonl; one of a data set is left out, or gets a name of its own."""
    ends, tasks, lost, names = {s["stream"]: s["clips"][-1]["end"] for s in streams}, [], Counter(), Counter()
    for n, row in enumerate(rows, 1):
        stream, options = row["video"], [" ".join(option.split()) for option in row.get("options") or ()]
        if not all(option.startswith(f"{letter}. ") for letter, option in zip(string.ascii_uppercase, options)):
            options = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options)]
        name, answer = row.get("task", f"{stream}-{n}"), " ".join(str(row["answer"]).split())
        names[name] += 1
        wrong = bool(options) and answer not in [option[0] for option in options] and (
            f"the answer {answer!r} is no letter of {options}")
        if "row" in row and (wrong or names[name] > 1):
            raise SystemExit(f"{row['row']}: {wrong or f'the task name {name!r} stands twice'}")
        if stream in ends and not wrong:
            tasks.append({"task": name + f"-{names[name]}" * (names[name] > 1), "stream": stream,
                          "environment": row["environment"], "time": float(row.get("time", ends[stream])),
                          "question": " ".join(str(row["question"]).split()), "options": options,
                          "answer": answer})
        else:
            lost[wrong or "no usable video of that name", stream] += 1
    place = {stream: i for i, stream in enumerate(ends)}
    return sorted(tasks, key=lambda t: (place[t["stream"]], t["time"])), [
        (video, f"{n} tasks left out: {why}") for (why, video), n in lost.items()]


# ---- the stage ---------------------------------------------------------------------------------------------

def summary(streams, tasks, skipped):
    """Prints what was made, what was not and why, and which stages can use it."""
    print(f"\n{'split':8}{'streams':>9}{'clips':>8}{'hours':>8}{'cues':>8}{'faces':>8}   read by")
    for split, stages in SPLITS.items():
        mine = [s["clips"] for s in streams if s["split"] == split]
        clips = [clip for row in mine for clip in row]
        hours, cues = sum(c["end"] - c["start"] for c in clips) / 3600, sum(len(c["speech"]) for c in clips)
        faces = len({(s, box[1]) for s, row in enumerate(mine) for c in row for box in c.get("faces", ())})
        print(f"{split:8}{len(mine):9}{len(clips):8}{hours:8.2f}{cues:8}{faces:8}   {stages}")
    kinds = sorted(Counter(t["environment"] for t in tasks).items())
    print("tasks: " + (", ".join(f"{kind} {n}" for kind, n in kinds) or "none, so only memories can be made"))
    print(f"skipped: {len(skipped)}")
    for why in dict.fromkeys(why for _, why in skipped):
        names = [str(name) for name, same in skipped if same == why]
        print(f"  {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}: {why}")
    have = {s["split"] for s in streams}
    have |= {"deploy", "test"} if "online" in have else {"online"}
    for split in sorted(SPLITS.keys() - have):
        print(f"no {split} stream: stage {SPLITS[split]} wants some, by --SPLIT={split} or from DATA/{split}"
              + ("; or a run that has done it: --FROM=RUN" if split == "train" else ""))


def main(argv=None):
    S = settings(globals(), argv)
    if min(S.CLIP_SECONDS, S.WORKERS, S.SAVE_EVERY) < 1:
        raise SystemExit("CLIP_SECONDS, WORKERS and SAVE_EVERY must be 1 or more")
    for name, value, known in (("SOURCE", S.SOURCE, ("tiny", *SOURCES)), ("SPLIT", S.SPLIT, SPLITS)):
        if value not in known:
            raise SystemExit(f"{name}={value!r}: expected one of {', '.join(known)}")
    data = pathlib.Path(S.DATA).expanduser().resolve()
    if S.SOURCE != "tiny" and not (S.DATA and (data.is_dir() or S.SOURCE == "videos" and data.is_file())):
        raise SystemExit(f"SOURCE={S.SOURCE} needs --DATA=FOLDER, see the head of this file; DATA={S.DATA}: "
                         f"no such file or folder (looked at {data})")
    out, folder = start(S, "streams"), data.parent if data.is_file() else data
    if S.SOURCE == "tiny":
        streams, tasks, skipped = *importlib.import_module("tiny.world").write_streams(S, out), []
    else:
        try:
            found, rows = SOURCES[S.SOURCE](S, folder, data)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise SystemExit(f"{data}: no {S.SOURCE} as published ({type(error).__name__} {error})") from None
        streams, skipped = indexed(S, out, folder, found)
        tasks, lost = as_tasks(rows, streams)
        skipped += lost
    if not streams:
        raise SystemExit("\n  ".join([f"no stream could be made of {S.DATA or S.SOURCE}:", *(
            f"{name}: {why}" for name, why in skipped)]))
    write_jsonl(out / "tasks.jsonl", tasks)
    write_jsonl(out / "streams.jsonl", streams)     # last: until it is there, later stages ask for 01
    summary(streams, tasks, skipped)


if __name__ == "__main__":
    main()
