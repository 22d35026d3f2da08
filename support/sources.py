"""Where videos come from: what a source holds, which of its files can be read, and how they become clips.

A source is a function of (S, folder, data) that gives the streams that it found, as parts of files, and the
questions about them. S.DATA is `data`, and `folder` is it, or the folder around it where it is one file. To
add a source, write such a function and put it into SOURCES.
"""
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
import time
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from support.camera import time_in_text
from support.overlay import SUBTITLES, decode_text, read_subtitles
from support.ranks import progress
from support.runs import clock, parse_jsonl, read_json, read_jsonl, stamp, write_jsonl
from support.video import (DECODE_SECONDS, VideoError, check_seeks, decord_is_right, frame_times,
                           has_decord, probe_video, read_frames)

# The splits, and the stages that read them.
SPLITS = {"train": "02", "deploy": "03 to 05", "test": "06", "online": "03 to 06"}

# The sources that are a user's own: what lies there is one's life, and the data sets are examinations.
OWN = ("videos", "camera")

YOUNG = 60                   # s since the last change of a file that may still be being written
LOOK_AGAIN = 1.5             # s after which such a file is looked at once more
EDGE = 2**20                 # bytes of a file's beginning and end that tell it from others

SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg",
            ".flv", ".wmv", ".3gp", ".ogv"}


@dataclass
class Part:
    """A part of a file that belongs to a stream."""
    file: pathlib.Path
    start: float | None = None   # s of the file's clock; None: from its beginning
    end: float | None = None     # None: to its end
    at: float | None = None      # s of the stream at which it begins; None: on the file's clock
    cues: list = field(default_factory=list)    # [start, end, text], on the file's clock


@dataclass
class Stream:
    """A stream that a source has found."""
    name: str
    split: str
    parts: list
    cues: list = field(default_factory=list)    # [start, end, text], on the stream's clock


@dataclass
class Found:
    """What a source has found. skipped: [(name, reason)] of what could not be used, or not all of it."""
    streams: list = field(default_factory=list)
    questions: list = field(default_factory=list)
    skipped: list = field(default_factory=list)


@dataclass
class Question:
    """A question of a source, to become a row of tasks.jsonl."""
    stream: str
    environment: str             # the kind of question; those of one kind share an adapter
    text: str
    answer: str | None           # None: nobody knows it
    options: list = field(default_factory=list)
    time: float | None = None    # s of the stream; None: asked at its end
    name: str | None = None      # of the task; None: after the stream
    place: str | None = None     # where a user wrote it, so that a mistake there is an error


# ---------------------------------------------------------------- any videos
# What a folder's name begins with that holds no videos of the user's: of programs, of wastebaskets, of NAS boxes.
HIDDEN = (".", "@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX")

TASK_NEEDS = {"videos": {"video", "question"}, "camera": {"question"}}
TASK_MAY_HAVE = {"answer", "options", "time", "environment", "task"}


def split_of(S):
    """The split of a stream that lies in no folder with the name of one."""
    return S.SPLIT or ("deploy" if S.SOURCE in OWN else "online")


def videos(S, folder, data):
    """Any video file, or all in a folder and below; the questions of its tasks.jsonl."""
    found = Found()
    files, subtitles = own_files(S, folder, data, found)
    called = {}                                  # {what a task may call the video: its stream}
    for file, name in stream_names(folder, files).items():
        inside = file.relative_to(folder)
        first_folder = inside.with_suffix("").parts[0]
        split = first_folder if first_folder in SPLITS else split_of(S)
        cues = cues_of(file, subtitles, folder, found)
        found.streams.append(Stream(name, split, [Part(file)], cues))
        for alias in (name, inside, file):
            called[as_seen(alias)] = name
    found.questions = own_questions(S, folder, called)
    return found


def camera(S, folder, data):
    """All videos in a folder and below as one stream, in the order of their times; the folder's tasks.jsonl.

    Times are read later, by support/camera.py, because some stand within the files.
    """
    found = Found()
    files, subtitles = own_files(S, folder, data, found)
    name = folder.name or "camera"
    parts = []
    for file in files:
        parts.append(Part(file, cues=cues_of(file, subtitles, folder, found)))
    found.streams.append(Stream(name, split_of(S), parts))
    found.questions = own_questions(S, folder, {as_seen(name): name, as_seen(""): name})
    return found


def own_files(S, folder, data, found):
    """(the videos in a user's folder and below, their subtitles by name). SystemExit where there are none."""
    if data.is_file():
        there = [file for file in folder.iterdir() if is_unicode(file.name)]
        files = [data]
    else:
        there, found.skipped = files_below(folder)
        files = [file for file in there if is_video(file)]
    if not files:
        suffixes = " ".join(sorted(SUFFIXES))
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in found.skipped)
        raise SystemExit(f"{data}: no video file in it or below (looked for {suffixes}){reasons}")
    if S.LIMIT:
        files = files[:S.LIMIT]
    return files, subtitles_by_name(there)


def own_questions(S, folder, called):
    """The questions of a user's tasks.jsonl. called: {what it may call a video: the stream}."""
    tasks = written_tasks(S, folder / "tasks.jsonl")
    questions = [written_question(place, row, called) for place, row in tasks]
    return chosen("TYPES", S.TYPES, questions, lambda question: question.environment)


def is_video(file):
    # A name with a leading dot is no video: macOS leaves ._NAME.mp4 beside NAME.mp4 on other disks.
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def is_unicode(name):
    """False for the name of a file that was written in another encoding than UTF-8: no JSON can hold it."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def as_seen(path):
    """A path as people see it: a letter with its accent is one letter on every disk, a backslash is a slash."""
    text = unicodedata.normalize("NFC", str(path)).replace("\\", "/")
    return pathlib.PurePosixPath(text)


def files_below(folder):
    """(the files in a folder and below, in order; [(name, reason)] of what is not looked into).

    Links to folders are followed, yet no folder is read twice: its own name counts, whatever links to it.
    """
    files = []
    skipped = []
    waiting = [folder]
    links = []
    seen = set()
    while waiting or links:
        place = waiting.pop() if waiting else links.pop(0)
        real = place.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            inside = sorted(place.iterdir())
        except OSError as error:
            skipped.append((place.relative_to(folder), f"cannot be looked into ({error.strerror})"))
            continue
        for path in inside:
            if not is_unicode(path.name):
                shown = os.fsencode(path.name).decode(errors="replace")
                skipped.append((shown, "has a name that is not UTF-8, so it is left out: rename it"))
            elif not path.is_dir():
                files.append(path)
            elif path.name.startswith(HIDDEN):
                skipped.append((path.relative_to(folder), "is a hidden folder, which is not looked into"))
            elif path.is_symlink():
                links.append(path)
            else:
                waiting.append(path)
    return sorted(files), skipped


def stream_names(folder, files):
    """{file: name}: its path without the suffix, or with it where a.mp4 lies beside a.mkv, or a.mp4.mkv."""
    bare = {file: as_seen(file.relative_to(folder).with_suffix("")) for file in files}
    count = Counter(bare.values())
    names = {}
    taken = set()
    for file, path in bare.items():
        is_unique = count[path] == 1 and folder / path not in bare
        if not is_unique:
            path = as_seen(file.relative_to(folder))
        name = path.as_posix()
        if name in taken:                        # another spelling of what looks the same
            name = file.relative_to(folder).as_posix()
        taken.add(name)
        names[file] = name
    return names


# ---------------------------------------------------------------- subtitles
LANGUAGE = r"\.[A-Za-z]{2,3}([-_]\w+)?(\.(forced|sdh|cc))?$"


def subtitles_by_name(files):
    """{(folder, name of a video, with or without its suffix): the subtitles for it, the best first}.

    Of a.mp4 these are a.srt, a.mp4.srt, a.en.srt, and so on: of several languages English, or else the first.
    """
    ranked = {}
    for file in sorted(files):
        if file.suffix.lower() not in SUBTITLES:
            continue
        name = file.stem
        ranked.setdefault((file.parent, name), []).append((0, file))
        language = re.search(LANGUAGE, name)
        if language:
            rank = 1 if language[0].lower().startswith(".en") else 2
            plain = name[:language.start()]
            ranked.setdefault((file.parent, plain), []).append((rank, file))
    by_name = {}
    for key, of_name in ranked.items():
        by_name[key] = [file for _, file in sorted(of_name)]
    return by_name


def cues_of(file, subtitles, folder, found):
    """The cues of a video's subtitles; what is wrong with them is added to found.skipped."""
    for name in (file.stem, file.name):
        for path in subtitles.get((file.parent, name), []):
            return read_cues(path, folder, found)
    return []


def read_cues(path, folder, found):
    cues, wrong = read_subtitles(path)
    if wrong:
        found.skipped.append((path.relative_to(folder), wrong))
    return cues


# ---------------------------------------------------------------- a user's tasks
def written_tasks(S, path):
    """[(place, row)] of a user's tasks.jsonl; [] where there is none. SystemExit on a row of another form."""
    if not path.exists():
        return []
    try:
        text, _ = decode_text(path.read_bytes())
        rows = parse_jsonl(text, path)
    except ValueError as error:
        raise SystemExit(f"not one JSON object per line: {error}") from None
    needs = TASK_NEEDS[S.SOURCE]
    known = TASK_NEEDS["videos"] | TASK_MAY_HAVE
    tasks = []
    for number, row in enumerate(rows, 1):
        place = f"{path}, task {number}"
        if not isinstance(row, dict) or not needs <= set(row) <= known:
            others = ", ".join(sorted(known - needs))
            raise SystemExit(f"{place}: needs {' and '.join(sorted(needs, reverse=True))}, may have "
                             f"{others}; is {str(row)[:200]}")
        options = row.get("options", [])
        texts = [row.get("answer") or ""]
        texts += [value for key, value in row.items() if key not in ("options", "time", "answer")]
        is_list = isinstance(options, list)
        if not is_list or not all(isinstance(text, str) for text in texts + options):
            raise SystemExit(f"{place}: options is a list, time a number, all else text; is {row}")
        tasks.append((place, row | {"time": asked_at(S, place, row)}))
    return tasks


def asked_at(S, place, row):
    """When a question is asked, in s of its stream; None where its row does not say so. SystemExit on no time."""
    time = row.get("time")
    if isinstance(time, str) and S.SOURCE == "camera":
        try:
            return time_in_text(time)
        except ValueError:
            pass                                 # which is said below
    is_number = isinstance(time, (int, float)) and math.isfinite(time)
    if not is_number and time is not None:
        or_text = ', or a text such as "2026-11-26 18:00"' if S.SOURCE == "camera" else ""
        raise SystemExit(f"{place}: options is a list, time a number{or_text}, all else text; is {row}")
    return time


def written_question(place, row, called):
    """The Question of a row of a user's tasks.jsonl."""
    video = row.get("video", "")
    return Question(
        stream=called.get(as_seen(video), video),
        environment=row.get("environment", "questions"),
        text=row["question"],
        answer=row.get("answer") or None,
        options=row.get("options", []),
        time=row["time"],
        name=row.get("task"),
        place=place)


# ---------------------------------------------------------------- Video-MME
VIDEOMME_TABLES = ("videomme/*.jsonl", "videomme*.jsonl", "videomme/*.parquet", "*.parquet")


def videomme(S, folder, data):
    """Video-MME: a stream per video, in the order of the table."""
    rows = videomme_rows(folder)
    rows = chosen("DURATION", S.DURATION, rows, lambda row: row["duration"])
    rows = chosen("TYPES", S.TYPES, rows, lambda row: row["task_type"])
    files = videos_by_stem(folder, "data", "video")
    names = limited([row["videoID"] for row in rows], files, S.LIMIT)
    found = Found()
    for name in names:
        if name in files:
            path = folder / "subtitle" / f"{name}.srt"
            cues = read_cues(path, folder, found) if path.exists() else []
            found.streams.append(Stream(name, split_of(S), [Part(files[name])], cues))
    for row in rows:
        if row["videoID"] in names:
            found.questions.append(Question(
                stream=row["videoID"],
                environment=row["task_type"],
                text=row["question"],
                answer=row["answer"],
                options=row["options"],
                name=row["question_id"]))
    return found


def videomme_rows(folder):
    """The rows of the table, as published in parquet, or as JSON lines."""
    tables = []
    for place in VIDEOMME_TABLES:
        tables += sorted(folder.glob(place))
    if not tables:
        raise SystemExit(f"{folder}: none of {', '.join(VIDEOMME_TABLES)}")
    table = tables[0]
    if table.suffix != ".parquet":
        return read_jsonl(table)
    if importlib.util.find_spec("pyarrow") is None:
        other = folder / "videomme.jsonl"
        raise SystemExit(f"{table} needs the package pyarrow: pip install pyarrow. Or write its rows "
                         f"to {other}, one JSON object a line")
    import pyarrow.parquet
    return pyarrow.parquet.read_table(table).to_pylist()


# ---------------------------------------------------------------- EgoLife
EIGHT_DIGITS = "[0-9]" * 8


def egolife(S, folder, data):
    """EgoLife: all files of one wearer are one stream, with gaps, in s since DAY1 00:00."""
    usual = folder / "EgoLifeQA" / "EgoLifeQA_A1_JAKE.json"
    tables = sorted(usual.parent.glob("EgoLifeQA_*.json"))
    found = Found()
    for table in tables or [usual]:
        wearer = re.match(r"EgoLifeQA_(\w+)", table.name)[1]
        videos_of_days = folder.glob(f"{wearer}/DAY*/DAY*_{wearer}_{EIGHT_DIGITS}.mp4")
        files = sorted(videos_of_days, key=file_instant)
        asked = egolife_questions(wearer, read_json(table))
        if S.LIMIT and S.LIMIT < len(files):
            # What is asked after the next file begins is left out with that file.
            cut = file_instant(files[S.LIMIT])
            asked = [question for question in asked if question.time <= cut]
            files = files[:S.LIMIT]
        if files:
            parts = [Part(file, at=file_instant(file)) for file in files]
            cues = egolife_cues(folder, wearer, found)
            found.streams.append(Stream(wearer, split_of(S), parts, cues))
        found.questions += asked
    found.questions = chosen("TYPES", S.TYPES, found.questions, lambda question: question.environment)
    return found


def egolife_questions(wearer, rows):
    """The questions of one wearer's table, in the order in which they are asked."""
    questions = []
    for row in rows:
        asked_at = row["query_time"]
        questions.append(Question(
            stream=wearer,
            environment=row["type"],
            text=row["question"],
            answer=row["answer"],
            options=[row[f"choice_{letter}"] for letter in "abcd"],
            time=instant(asked_at["date"], asked_at["time"]),
            name=f"{wearer}-{row['ID']}"))
    return sorted(questions, key=lambda question: question.time)


def egolife_cues(folder, wearer, found):
    """Speech of the hourly transcripts, whose times count from the hour, on the stream's clock."""
    cues = []
    transcripts = folder / "EgoLifeCap" / "Transcript" / wearer
    for path in transcripts.glob(f"DAY*/{wearer}_DAY*_{EIGHT_DIGITS}.srt"):
        hour = file_instant(path)
        for start, end, text in read_cues(path, folder, found):
            cues.append([start + hour, end + hour, text])
    return sorted(cues)


def file_instant(path):
    """When a file begins, by its name."""
    day, stamped = re.search(r"(DAY\d+).*_(\d{8})$", path.stem).groups()
    return instant(day, stamped)


def instant(day, stamped):
    """s since DAY1 00:00 of EgoLife's HHMMSSFF. FF counts frames at 20 a second, yet reaches 92: clamped.

    >>> instant("DAY2", "01020392")
    90123.95
    """
    hours, minutes, seconds, frame = [int(pair) for pair in re.findall("..", stamped[:8])]
    days = int(day[3:]) - 1
    return days * 86400 + hours * 3600 + minutes * 60 + seconds + min(frame, 19) / 20


# ---------------------------------------------------------------- EgoTempo
def egotempo(S, folder, data):
    """EgoTempo: a stream per clip.

    The full video is preferred, because the published way of trimming breaks about 4 clips in 10.
    """
    tables = sorted(folder.glob("egotempo_openQA*.json"))
    table = tables[0] if tables else folder / "egotempo_openQA.json"
    rows = read_json(table)["annotations"]
    rows = chosen("TYPES", S.TYPES, rows, lambda row: row["question_type"])
    full = videos_by_stem(folder, "video_540ss")
    trimmed = videos_by_stem(folder, "trimmed_clips")
    parts = {}
    for name in [row["clip_id"] for row in rows]:
        video, start, end = name.rsplit("_", 2)
        if video in full:
            start = max(0.0, float(start))       # some start below 0
            parts[name] = Part(full[video], start, float(end), at=0)
        elif name in trimmed:
            parts[name] = Part(trimmed[name])
    names = limited([row["clip_id"] for row in rows], parts, S.LIMIT)
    found = Found([Stream(name, split_of(S), [parts[name]]) for name in names if name in parts])
    for row in rows:
        if row["clip_id"] in names:
            found.questions.append(Question(
                stream=row["clip_id"],
                environment=row["question_type"],
                text=row["question"],
                answer=row["answer"],
                name=row["question_id"]))
    return found


SOURCES = {"videos": videos, "camera": camera, "videomme": videomme, "egolife": egolife,
           "egotempo": egotempo}


# ---------------------------------------------------------------- what the data sets share
def videos_by_stem(folder, *places):
    """{name without suffix: file} of the videos in these folders of `folder`."""
    found = {}
    for place in places:
        if (folder / place).is_dir():
            for file in sorted((folder / place).iterdir()):
                if file.suffix.lower() in SUFFIXES:
                    found[file.stem] = file
    return found


def limited(names, there, limit):
    """Each name once, in order. With a limit, the first of those that are there; else all, so that the
    summary can name those that are not.

    >>> limited(["b", "a", "b", "c"], {"a", "c"}, 1), limited(["b", "a", "b"], {"a"}, 0)
    (['a'], ['b', 'a'])
    """
    names = list(dict.fromkeys(names))
    if not limit:
        return names
    return [name for name in names if name in there][:limit]


def chosen(constant, value, rows, kind_of):
    """The rows of the kinds that the value of a constant names, separated by commas; all of them for "".

    SystemExit where it names a kind that no row is of.
    """
    kinds = sorted({kind_of(row) for row in rows})
    wanted = [name.strip().casefold() for name in value.split(",")]
    wanted = [name for name in wanted if name]
    unknown = set(wanted) - {kind.casefold() for kind in kinds}
    if unknown:
        there = ", ".join(kinds) if kinds else "no type, as there are none"
        raise SystemExit(f"{constant}: no question is of {', '.join(unknown)}, but of {there}")
    if not wanted:
        return rows
    return [row for row in rows if kind_of(row).casefold() in wanted]


# ---------------------------------------------------------------- which files can be read
def check_files(S, index, streams):
    """{file: its row (see `check_video`)} of all files of the streams.

    index: path of files.jsonl, which keeps the rows. A later run looks only at files that are new or changed.
    """
    spans = {}                                   # {file: [[start, end] of each part]}
    for stream in streams:
        for part in stream.parts:
            spans.setdefault(part.file, []).append([part.start, part.end])
    if not spans:
        return {}
    kept = {row["file"]: row for row in read_jsonl(index)} if index.exists() else {}
    new = []
    for file in spans:
        row = kept.get(str(file))
        if row is None or not is_current(row, file, spans[file], S):
            new.append(file)
    unfinished = still_written(new) if S.SOURCE in OWN else set()
    new = [file for file in new if file not in unfinished]
    known = len(spans) - len(new) - len(unfinished)
    print(f"{len(spans)} video files to take up, {known} of them known from {index}")
    if new:
        check_new(S, index, kept, new, spans)
    rows = {}
    for file in spans:
        # No row is kept of a file that is still being written, so the next run looks at it as at a new one.
        rows[file] = unfinished_row(file, spans[file]) if file in unfinished else kept[str(file)]
    return rows


def check_new(S, index, kept, new, spans):
    """Adds the rows of the files `new` to those kept in `index`."""
    # Threads are enough, because FFmpeg works outside of Python's lock.
    pool = ThreadPoolExecutor(S.WORKERS)
    checked = pool.map(lambda file: check_video(file, spans[file], S), new)
    try:
        with warnings.catch_warnings():
            # A frame that is lost here and there costs no clip.
            warnings.simplefilter("ignore")
            for n, row in enumerate(progress(checked, "checking", total=len(new), unit="file")):
                kept[row["file"]] = row
                if (n + 1) % S.SAVE_EVERY == 0:
                    write_jsonl(index, kept.values())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        write_jsonl(index, kept.values())


def still_written(files):
    """Those files that change while one looks at them. Files that nobody has touched for a minute do not."""
    now = time.time()
    before = {}
    for file in files:
        if file.is_file() and now - file.stat().st_mtime < YOUNG:
            before[file] = stamp(file)
    if before:
        time.sleep(LOOK_AGAIN)                   # once for all of them
    return {file for file in before if stamp(file) != before[file]}


def unfinished_row(file, spans):
    reason = "is still being written: it is left to the next run of this script"
    return {"file": str(file), "spans": spans, "clips": [[] for _ in spans], "skipped": [reason],
            "unfinished": True}


def content_of(file, size=None):
    """A hash of the first and the last MB of a file, or of its first `size` bytes; "" where it can't be read."""
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size if size is None else size
            digest = hashlib.sha256(opened.read(min(EDGE, size)))
            opened.seek(max(0, size - EDGE))
            digest.update(opened.read(min(EDGE, size)))
    except OSError:
        return ""
    return digest.hexdigest()[:32]


def is_current(row, file, spans, S):
    """Whether a kept row still tells of a file. What took too long is tried again: a busy disk, perhaps."""
    took_too_long = any("DECODE_SECONDS" in reason for reason in row["skipped"])
    same_file = row["stamp"] == stamp(file) and row["spans"] == spans and "content" in row
    return same_file and row["how"] == how_checked(S) and not took_too_long


def how_checked(S):
    """What a row of files.jsonl depends on: constants, PyAV, of which a newer version may read more, decord."""
    pyav = importlib.metadata.version("av")
    return [S.SOURCE, S.CLIP_SECONDS, S.SHORTEST, S.CHECK, pyav, has_decord()]


def check_video(file, spans, S):
    """A row of files.jsonl: {file, stamp, spans, clips: [[clip ..] per span], skipped: [reasons], how, reader,
    length: s, created: as in its metadata, content: see `content_of`}.

    Times are the file's own, by its time stamps, in which subtitles count too; the first frame is at 0 s even
    where the sound starts earlier. The reader is "decord" where nothing is skipped and decord proves right, else
    "PyAV". Raises nothing: a file that cannot be used has no clips.
    """
    clips = [[] for _ in spans]
    skipped = []
    reader = "PyAV"
    row = {"file": str(file), "stamp": stamp(file), "content": content_of(file), "spans": spans,
           "clips": clips, "skipped": skipped, "how": how_checked(S)}
    created = None
    last = 0.0
    try:
        seen = probe_video(file)
        first = seen["start"]
        last = first + seen["duration"]
        created = seen.get("created")
        if S.CHECK:
            check_seeks(file, frame_times({"start": first, "end": last, "offset": first}, S.CHECK))
        for n, (start, end) in enumerate(spans):
            has_grown = start is not None and end is None
            if has_grown and last - start < S.SHORTEST:
                continue                         # until it is long enough
            start = math.floor(first) if start is None else max(start, first)
            end = last if end is None else min(last, end)
            if start >= last:
                skipped.append(f"has nothing from {start:.1f} s on, as it ends at {last:.1f} s")
                continue
            cut = cut_clips(str(file), start, end, S)
            clips[n], reasons = decodable(file, cut, S)
            skipped += reasons
        if S.CHECK and not skipped and decord_is_right(file, S.CHECK):
            reader = "decord"
    except VideoError as error:
        skipped.append(error.reason)
    return row | {"reader": reader, "length": last, "created": created}


def cut_clips(file, first, end, S):
    """Clip rows of one file, from `first` to `end` in s of its clock.

    >>> from types import SimpleNamespace
    >>> S = SimpleNamespace(CLIP_SECONDS=10, SHORTEST=2)
    >>> [(clip["start"], clip["end"]) for clip in cut_clips("a.mp4", 0, 23, S)]
    [(0.0, 10.0), (10.0, 20.0), (20.0, 23.0)]
    """
    count = math.floor((end - first - S.SHORTEST) / S.CLIP_SECONDS) + 1
    clips = []
    for n in range(max(1, count)):
        start = round(float(first + n * S.CLIP_SECONDS), 3)
        stop = round(float(min(start + S.CLIP_SECONDS, end)), 3)
        clips.append({"clip": n, "start": start, "end": stop, "file": file, "offset": start,
                      "speech": []})
    return clips


def decodable(file, clips, S):
    """(the clips that can be read, the reasons why others cannot).

    A data set has thousands of files, so they are tried as a whole; where that fails, clip by clip as any
    other video.
    """
    if not S.CHECK:
        return clips, []
    if S.SOURCE not in OWN and reads_as_a_whole(file, clips, S):
        return clips, []
    good = []
    reasons = []
    # Some frames of each clip: one of the file would miss a hole, and all would take as long as to watch it.
    for clip in clips:
        began = time.monotonic()
        try:
            read_frames(file, frame_times(clip, S.CHECK))
            good.append(clip)
        except VideoError as error:
            reason = f"{clock(clip['start'])}-{clock(clip['end'])}: {error.reason}"
            hung = time.monotonic() - began >= DECODE_SECONDS
            if hung:                             # and so would the next
                reasons.append(f"{reason}; nothing after it was tried")
                break
            reasons.append(reason)
    return good, reasons


def reads_as_a_whole(file, clips, S):
    """Whether CHECK frames of a file, or one a minute, can be read."""
    whole = clips[0] | {"end": clips[-1]["end"]}
    minutes = (whole["end"] - whole["start"]) / 60
    try:
        for at in frame_times(whole, max(S.CHECK, round(minutes))):
            read_frames(file, [at])
    except VideoError:
        return False
    return True


# ---------------------------------------------------------------- from files to streams
@dataclass
class Piece:
    """What a stream uses of a file. start, end: s of its clock; shift: to be added for the stream's."""
    file: pathlib.Path
    start: float
    end: float
    shift: float


def lay_out(stream, rows, before=0):
    """(clip rows of a stream on its clock, its pieces); rows: of `check_files`.

    before: clips that the stream has already. The cues of parts become those of the stream.
    """
    clips = []
    pieces = []
    for part in stream.parts:
        row = rows[part.file]
        usable = row["clips"][row["spans"].index([part.start, part.end])]
        if not usable:
            continue
        shift = 0
        if part.at is not None:
            starts_at = 0 if part.start is None else part.start
            shift = part.at - starts_at
        for clip in usable:
            start = round(clip["start"] + shift, 3)
            end = round(clip["end"] + shift, 3)
            # Numbered without gaps, because the rest of the project finds clip n at place n.
            clips.append(clip | {"clip": before + len(clips), "start": start, "end": end})
            if row["reader"] == "decord":
                clips[-1]["reader"] = "decord"
        pieces.append(Piece(part.file, usable[0]["start"], usable[-1]["end"], shift))
        for start, end, text in part.cues:
            stream.cues.append([start + shift, end + shift, text])
    return clips, pieces
