"""Stage 1: turn a source of video into streams of 10-second clips, and questions into tasks about them.

SOURCE="tiny" renders the toy world: real mp4 files whose facts are known, so all can be judged exactly. Every
other source indexes video files in the folder DATA (support/sources.py). It copies nothing and tries a few
frames of each; what cannot be used is skipped by name, and nothing hangs. decord reads those files later of
which it gives the same frames here as PyAV, and PyAV the others (or all, with CHECK=0).
  "videos"     any video file, or every video in a folder and below, a stream each; links are followed, hidden
               folders are not looked into. Beside it, if wanted, its speech: NAME.srt, .vtt or .ass, also as
               NAME.en.srt or NAME.mp4.srt. In the folder: tasks.jsonl, a question per line,
               {"video": "trip/day1.mp4", "question": "Who drove?"} with, if wanted, "options": ["A. Ann",
               "B. Bob"] (else it is an open question), "answer": "B" (only 06 needs it), "time" (s of the
               stream, when it is asked; else at its end), "environment" (questions of one kind share an
               adapter; else all are "questions") and "task" (a unique name).
  "camera"     the same, but all videos of the folder are one stream, named after it, in the order of their times:
               those in their names, as cameras and phones write them, else of their metadata, else of their
               last change (support/camera.py). Gaps stay gaps, on a clock with dates. Its questions need no
               "video", and their "time" may be "2026-11-26 18:00".
  "videomme"   Video-MME as published: videomme/*.parquet (by the optional pyarrow; or videomme.jsonl, the
               same rows), data/ID.mp4, subtitle/ID.srt
  "egolife"    EgoLifeQA/EgoLifeQA_A1_JAKE.json, A1_JAKE/DAY1/*.mp4 .., EgoLifeCap/Transcript/..: one stream
               of all days, in s since DAY1 00:00; a task sees what lies before its query time
  "egotempo"   egotempo_openQA.json, and Ego4D's video_540ss/UID.mp4, or else trimmed_clips/CLIP.mp4

Identity and speech are drawn into the frames, as the paper does (support/overlay.py). Speech comes from
subtitles, or by ASR where there is none. Faces come from NAME.faces.jsonl beside a video, a line per box,
    {"time": 12.5, "face": 3, "box": [left, top, right, bottom], "name": "Ann"}
(s of the file's clock, held half a second either side; pixels of the video; "name" only if cues name their
speaker: "Ann: hello" is then drawn as "<face_3>: hello"), or are found and told apart with FACES=1. A face
keeps its number over a stream. Without any of this the frames stay as they are.

Run again, this script only adds. Streams, clips and tasks that it has made stay as they are; new videos and
questions come after them. A video that has grown goes on where it ended, one that became another is an error,
and of what has gone, the clips and tasks stay. A file that is still being written waits for the next run.

Each later stage reads one split: 02 "train", 03 to 05 "deploy", 06 "test". One's own videos are "deploy": 03
watches all and answers each question. Data sets are "online", which serves 03 to 06: the first questions of
each kind go to Phase One, those after them to the adapter. --SPLIT=online examines one's own videos so.
"videos" in DATA/train, DATA/deploy or DATA/test are of that split, all else is of SPLIT.

Run: python 01_make_streams.py [--NAME=value ...]       e.g. --SOURCE=videos --DATA=~/Videos --RUN=mine
In:  nothing for "tiny", else the folder DATA
Out: streams/streams.jsonl, tasks.jsonl; "tiny": videos/*.mp4, captions.jsonl, truth.jsonl; else files.jsonl,
     taken.json
Takes 10 s for the toy world; for videos of 720p on one core 0.4 s per clip and up to 3 s per file, far less
with --CHECK=0.
"""
import importlib.util
import pathlib
import string
from collections import Counter

from common import settings
from support.camera import put_in_order
from support.growth import (Asked, add_tasks, keep_names, leave_what_is_taken, pieces_of, say_new,
                            taken_up, write_taken)
from support.overlay import face_finder, put_on_clips, speech_and_faces, speech_pipeline
from support.runs import clock, next_command, start, write_jsonl
from support.sources import OWN, SOURCES, SPLITS, check_files, is_unicode, lay_out
from tiny.world import write_streams

# ----------------------------------------------------------------
SOURCE = "tiny"          # "tiny" | "videos" | "camera" | "videomme" | "egolife" | "egotempo"
DATA = ""                # the folder of the source as published, or a video file; unused by "tiny"
LIMIT = 0                # streams at most (of each split with "tiny"; files of "egolife" and
                         # "camera"); 0: all
TYPES = ""               # only questions of these: --TYPES="OCR Problems,Counting Problem"; "": all
DURATION = "short,medium"        # of "videomme": also long (the paper leaves it out)
CLIP_SECONDS = 10        # s; one clip, one memory (paper: 10)
# ---- "tiny"
TRAIN_STREAMS = 64       # streams for Phase One
DEPLOY_STREAMS = 24      # streams watched after deployment: recent tasks, rollout cache
TEST_STREAMS = 24        # streams for the evaluation
CLIPS = 12               # clips per stream: two minutes
QUESTIONS = 2            # per environment of a deploy or test stream; Phase One sees no question
# ---- all but "tiny"
SPLIT = ""               # "": "deploy" for "videos" and "camera", "online" for data sets
SHORTEST = 2             # s; a shorter rest of a video is left out, unless it is all of it
CHECK = 3                # frames tried of each clip of one's own or file, to skip bad ones; 0: none
WORKERS = 4              # videos checked at a time
ASR = ""                 # a Whisper model or its folder, for videos without subtitles; "": none
FACES = 0                # 1: find faces where a stream has no NAME.faces.jsonl (insightface)
FACE_SCORE = 0.6         # of the detector, at least, for a face to count
FACE_MATCH = 0.4         # cosine to the mean of a face's embeddings, at least, to be that face
SAVE_EVERY = 100         # files checked; an interruption loses no more
# ----------------------------------------------------------------


def main(argv=None):
    S = settings(globals(), argv)
    data = checked_data(S)
    out = start(S, "streams")
    if S.SOURCE == "tiny":
        streams, tasks = write_streams(S, out)
        write(S, out, streams, tasks, skipped=[])
        return

    # ---------------- find: what the source holds, and what of it is new
    check_packages()
    folder = data.parent if data.is_file() else data
    try:
        found = SOURCES[S.SOURCE](S, folder, data)
    except (KeyError, TypeError, ValueError, OSError) as error:
        what = f"{type(error).__name__} {error}"
        raise SystemExit(f"{data}: no {S.SOURCE} as published ({what})") from None
    before = taken_up(out)
    if S.SOURCE == "videos":
        keep_names(found, before)
    skipped = found.skipped + leave_what_is_taken(found, before, out)

    # ---------------- check files
    # The models come first, because one that is missing should be told before an hour of checks.
    lacks_speech = any(not stream.cues for stream in found.streams)
    recognise = speech_pipeline(S.ASR) if S.ASR and lacks_speech else None
    finder = face_finder(S.FACE_SCORE) if S.FACES and found.streams else None
    files = check_files(S, out / "files.jsonl", found.streams)
    for file, row in files.items():
        skipped += [(file.relative_to(folder), reason) for reason in row["skipped"]]

    # ---------------- clips, and what is drawn on them
    streams = dict(before.streams)
    for stream in found.streams:
        row = streams.get(stream.name)
        earlier = row["clips"] if row else []
        if S.SOURCE == "camera":
            end = earlier[-1]["end"] if earlier else None
            skipped += put_in_order(stream, files, folder, end)
        clips, pieces = lay_out(stream, files, len(earlier))
        cues, boxes, failed = speech_and_faces(S, out, stream, pieces, recognise, finder,
                                               before=pieces_of(row))
        put_on_clips(clips, cues, boxes)
        skipped += failed
        if clips:
            streams[stream.name] = {"stream": stream.name, "split": stream.split,
                                    "source": S.SOURCE, "clips": earlier + clips}

    # ---------------- tasks
    streams = list(streams.values())
    tasks, left_out = as_tasks(found.questions, streams, before.tasks)
    say_new(before, streams, tasks)
    write(S, out, streams, tasks, skipped + left_out)
    write_taken(out, before, streams, files)


def checked_data(S):
    """The path of DATA. SystemExit where it, or another constant, cannot be."""
    for name, possible in (("SOURCE", ["tiny", *SOURCES]), ("SPLIT", SPLITS)):
        value = getattr(S, name)
        if value not in possible and (name, value) != ("SPLIT", ""):
            raise SystemExit(f"{name}={value!r}: expected one of {', '.join(possible)}")
    data = pathlib.Path(S.DATA).expanduser().resolve()
    is_there = data.is_dir() or (S.SOURCE == "videos" and data.is_file())
    if S.SOURCE != "tiny" and not (S.DATA and is_there):
        raise SystemExit(f"SOURCE={S.SOURCE} needs --DATA=FOLDER, see the head of this file; "
                         f"DATA={S.DATA}: no such file or folder (looked at {data})")
    if not is_unicode(data):
        raise SystemExit(f"DATA={ascii(S.DATA)}: a name in this path is not UTF-8: rename it")
    return data


def check_packages():
    for package in ("av", "pysubs2", "charset_normalizer"):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"{package} is missing: ./run.sh setup, or install requirements.txt")


# ---------------------------------------------------------------- tasks
def as_tasks(questions, streams, kept):
    """(rows of tasks.jsonl: `kept`, then new ones by stream and time; what is to be said, as (stream, reason)).

    kept: the rows of earlier runs. A mistake in a user's own tasks.jsonl ends in SystemExit. In a data set, a
    question with a wrong answer is left out, and one whose name another has gets a name of its own.
    """
    spans = {}                                   # {stream: (start, end)}
    for stream in streams:
        clips = stream["clips"]
        spans[stream["stream"]] = (clips[0]["start"], clips[-1]["end"])
    asked = []
    left_out = Counter()                         # {(stream, reason): questions}
    names = Counter()
    for number, question in enumerate(questions, 1):
        row = as_task(question)
        name = question.name
        mistake = mistake_in(question, row, spans)
        if name is not None:
            names[name] += 1
            if names[name] > 1:
                row["task"] = f"{name}-{names[name]}"
        if question.place and names[name] > 1:
            mistake = f"the task name {name!r} stands twice"
        if question.place and mistake:
            raise SystemExit(f"{question.place}: {mistake}")
        if mistake or question.stream not in spans:
            left_out[question.stream, mistake or "no usable video of that name"] += 1
            continue
        asked.append(Asked(row, number, question.place))
    tasks, said = add_tasks(asked, kept, spans)
    for (stream, reason), count in left_out.items():
        said.append((stream, f"{count} tasks left out: {reason}"))
    return tasks, said


def mistake_in(question, row, spans):
    """What is wrong with a question, "" if nothing is. spans: {stream: (start, end)}."""
    letters = [option[0] for option in row["options"]]
    if len(question.options) > len(string.ascii_uppercase):
        return f"{len(question.options)} options, and there are letters for 26"
    if letters and row["answer"] not in [None, *letters]:
        return f"the answer {row['answer']!r} is no letter of {row['options']}"
    start, _ = spans.get(question.stream, (0, 0))
    if question.place and question.time is not None and question.time < start:
        return f"it is asked at {clock(question.time)}, and its stream begins at {clock(start)}"
    return ""


def as_task(question):
    """The row of tasks.jsonl of a question; without a name or a time where it has none."""
    answer = question.answer
    return {"task": question.name, "stream": question.stream, "environment": question.environment,
            "time": None if question.time is None else float(question.time),
            "question": in_one_line(question.text), "options": with_letters(question.options),
            "answer": None if answer is None else in_one_line(answer)}


def with_letters(options):
    """Options as "A. ...", "B. ...". They get the letters unless all have them already.

    >>> with_letters(["Ann", "A. Smith"]), with_letters(["A. Ann", "B. Bob"])
    (['A. Ann', 'B. A. Smith'], ['A. Ann', 'B. Bob'])
    """
    options = [in_one_line(option) for option in options]
    lettered = list(zip(string.ascii_uppercase, options))
    if all(option.startswith(f"{letter}. ") for letter, option in lettered):
        return options
    return [f"{letter}. {option}" for letter, option in lettered]


def in_one_line(text):
    return " ".join(str(text).split())


# ---------------------------------------------------------------- write, and say what was made
def write(S, out, streams, tasks, skipped):
    """Writes streams and tasks, and prints what was made, what was not and why, and what comes next."""
    if not streams:
        lines = [f"no stream could be made of {S.DATA or S.SOURCE}:"]
        lines += [f"{name}: {reason}" for name, reason in skipped]
        raise SystemExit("\n  ".join(lines))
    write_jsonl(out / "tasks.jsonl", tasks)
    write_jsonl(out / "streams.jsonl", streams)  # last: until it is there, later stages ask for 01

    print(f"\n{'split':8}{'streams':>9}{'clips':>8}{'hours':>8}{'cues':>8}{'faces':>8}   read by")
    for split, readers in SPLITS.items():
        of_split = [stream for stream in streams if stream["split"] == split]
        print(f"{split:8}{counts(of_split)}   {readers}")
    kinds = Counter(task["environment"] for task in tasks)
    shown = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    readers = Counter(readers_of_files(streams).values())
    print("video files:", ", ".join(f"{count} read by {name}" for name, count in readers.items()))
    without = sum(task["answer"] is None for task in tasks)
    more = f"; {without} without an answer, which 06 leaves out" if without else ""
    print(f"tasks: {shown or 'none, so only memories can be made'}{more}")
    print(f"skipped: {len(skipped)}")
    print_skipped(skipped)

    splits = {stream["split"] for stream in streams}
    served = splits | ({"deploy", "test"} if "online" in splits else {"online"})
    hints = {"train": "; or a run that has done it: --FROM=RUN"}
    if S.SOURCE in OWN:
        hints["test"] = "; or --SPLIT=online, to examine by the later questions"
    for split in sorted(SPLITS.keys() - served):
        place = f" or from DATA/{split}" if S.SOURCE == "videos" else ""
        print(f"no {split} stream: stage {SPLITS[split]} wants some, by --SPLIT={split}{place}"
              f"{hints.get(split, '')}")
    print(f"streams and tasks are in {out}; next: {next_step(S, splits)}")


def counts(streams):
    """The columns of the table: streams, clips, hours, cues and different faces."""
    clips = seconds = cues = faces = 0
    for stream in streams:
        faces_of_stream = set()
        for clip in stream["clips"]:
            clips += 1
            seconds += clip["end"] - clip["start"]
            cues += len(clip["speech"])
            faces_of_stream |= {face for _, face, *_ in clip.get("faces", ())}
        faces += len(faces_of_stream)
    return f"{len(streams):9}{clips:8}{seconds / 3600:8.2f}{cues:8}{faces:8}"


def readers_of_files(streams):
    """{file: the package that decodes it}: decord where it proved right, else PyAV."""
    readers = {}
    for stream in streams:
        for clip in stream["clips"]:
            readers[clip["file"]] = clip.get("reader", "PyAV")
    return readers


def print_skipped(skipped):
    """A line per reason, with the first five names."""
    by_reason = {}
    for name, reason in skipped:
        by_reason.setdefault(reason, []).append(str(name))
    for reason, names in by_reason.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        print(f"  {', '.join(names[:5])}{more}: {reason}")


def next_step(S, splits):
    """The command of the first later stage that these streams are for."""
    if "train" in splits:
        return next_command(S, "02_phase1_train.py")
    if splits == {"test"}:
        return next_command(S, "06_eval.py")
    more = [] if S.FROM else ["--FROM=RUN"]      # a run that has trained Phase One
    return next_command(S, "03_collect_tasks.py", *more)


if __name__ == "__main__":
    main()
