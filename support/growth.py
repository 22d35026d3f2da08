"""A run that goes on: what 01 has taken up stays as it is, and what has come since is added after it.

Rows of streams.jsonl and tasks.jsonl keep their place and their names, and the clips of a stream only become more.
taken.json holds what the video files of the streams were when they were taken up.
"""
import pathlib
from dataclasses import dataclass, field

from support.camera import OVERLAP, TOO_LATE
from support.runs import read_json, read_jsonl, stamp, write_json
from support.sources import Part, Piece, content_of


@dataclass
class Before:
    """What earlier runs of 01 have taken up; nothing where streams.jsonl is not there."""
    streams: dict = field(default_factory=dict)      # {name: row of streams.jsonl}
    tasks: list = field(default_factory=list)        # rows of tasks.jsonl
    files: dict = field(default_factory=dict)        # {file: [bytes, ns of the last change, content]}


def taken_up(out):
    """What stands in 01's folder."""
    if not (out / "streams.jsonl").exists():
        return Before()
    streams = {row["stream"]: row for row in read_jsonl(out / "streams.jsonl")}
    tasks = []
    if (out / "tasks.jsonl").exists():
        # A kill between the two files may have left tasks of streams that never were.
        rows = read_jsonl(out / "tasks.jsonl")
        tasks = [row for row in rows if row["stream"] in streams]
    files = read_json(out / "taken.json") if (out / "taken.json").exists() else {}
    # What a kill has kept from being noted there stands among the files that were checked.
    missing = files_of(streams.values()).keys() - files.keys()
    checked = read_jsonl(out / "files.jsonl") if missing and (out / "files.jsonl").exists() else []
    for row in checked:
        if row["file"] in missing and "content" in row:
            files[row["file"]] = [*row["stamp"], row["content"]]
    if missing:
        write_json(out / "taken.json", files)
    return Before(streams, tasks, files)


def files_of(streams):
    """{file: (stream, its last clip there)} of rows of streams.jsonl."""
    last = {}
    for row in streams:
        for clip in row["clips"]:
            last[clip["file"]] = (row["stream"], clip)
    return last


def write_taken(out, before, streams, rows):
    """Notes what the files of the streams are. rows: of `check_files`, of what was taken up just now."""
    taken = dict(before.files)
    used = files_of(streams)
    for file, row in rows.items():
        if str(file) in used and "content" in row:
            taken[str(file)] = [*row["stamp"], row["content"]]
    write_json(out / "taken.json", taken)


# ---------------------------------------------------------------- streams
def keep_names(found, before):
    """Streams of "videos" keep the names under which they were taken up, whatever lies beside their files now.

    A file that bears the name of one that has gone is another stream.
    """
    taken = files_of(before.streams.values())
    names = {}
    for stream in found.streams:
        file = stream.parts[0].file
        name = stream.name
        if str(file) in taken:
            name = taken[str(file)][0]
        else:
            while name in before.streams:
                name += file.suffix
        names[stream.name] = name
        stream.name = name
    for question in found.questions:
        question.stream = names.get(question.stream, question.stream)


def leave_what_is_taken(found, before, out):
    """Takes from found.streams what was taken up before -> [(name, what is to be said of it)].

    A file that has grown since gives a part with what is new. SystemExit where a file is another one now.
    """
    taken = files_of(before.streams.values())
    grown, said = look_again(taken, before.files, out)
    new = []
    for stream in found.streams:
        row = before.streams.get(stream.name)
        end = row["clips"][-1]["end"] if row else None
        used = files_of([row]) if row else {}
        parts = []
        for part in stream.parts:
            if str(part.file) in used:           # by this stream; another may use another part of it
                part = grown.get(part.file) if part.end is None else None
            if part is None:
                continue
            if row and part.at is not None and part.at < end - OVERLAP:
                said.append((part.file, TOO_LATE))
            else:
                parts.append(part)
        came_late = row and stream.cues and not any(clip["speech"] for clip in row["clips"])
        if came_late and not parts:
            said.append((stream.name, "has subtitles now, but its clips were taken up without: they stay so"))
        stream.parts = parts
        if parts:
            new.append(stream)
    found.streams = new
    return said


def look_again(taken, files, out):
    """({file: a part with what is new of it}, what is to be said) of the files that were taken up.

    taken: see `files_of`. files: of taken.json. SystemExit where a file is another one now.
    """
    grown = {}
    said = []
    replaced = []
    for name, (stream, clip) in taken.items():
        file = pathlib.Path(name)
        fate = fate_of(file, files.get(name))
        if fate == "gone":
            said.append((name, "is no longer there; its clips stay in the streams, and so does what was "
                         "made of them"))
        elif fate == "replaced":
            replaced.append(f"{name} (stream {stream})")
        elif fate == "grown":
            start = round(clip["offset"] + clip["end"] - clip["start"], 3)
            grown[file] = Part(file, start, at=clip["end"])
    if replaced:
        more = f" and {len(replaced) - 5} more" if len(replaced) > 5 else ""
        raise SystemExit(
            f"another video than the one that was taken up: {', '.join(replaced[:5])}{more}. Notes may "
            "have been made of the old one. Put that back; or give the new one a name of its own, and it "
            "is taken up as new; or take a new --RUN. If nothing has been made of these streams yet: "
            f"delete {out}/streams.jsonl and tasks.jsonl, and run this again")
    return grown, said


def fate_of(file, was):
    """What became of a file: "same", "gone", "grown" or "replaced". was: its entry in taken.json, or None.

    It has grown where all that was known of it is still there, and it is longer now. What was only copied or
    touched is the same.
    """
    if not file.is_file():
        return "gone"
    if was is None or stamp(file) == was[:2]:
        return "same"
    size, _, content = was
    if stamp(file)[0] < size or content_of(file, size) != content:
        return "replaced"
    return "same" if stamp(file)[0] == size else "grown"


def pieces_of(row):
    """The pieces of files that a row of streams.jsonl is made of, those that are still there."""
    pieces = []
    for clip in row["clips"] if row else []:
        file = pathlib.Path(clip["file"])
        shift = clip["start"] - clip["offset"]
        end = clip["offset"] + clip["end"] - clip["start"]
        last = pieces[-1] if pieces else None
        if last and last.file == file and abs(last.shift - shift) < 0.01:
            last.end = end
        elif file.is_file():
            pieces.append(Piece(file, clip["offset"], end, shift))
    return pieces


# ---------------------------------------------------------------- tasks
@dataclass
class Asked:
    """A question that stands in a source now. row: of tasks.jsonl, "task" or "time" None where it has none."""
    row: dict
    number: int                  # its place among the questions, from 1 on
    place: str | None            # where a user wrote it


def add_tasks(asked, kept, spans):
    """(the rows `kept`, then the new ones by stream and time; what is to be said, as (stream, text)).

    Of a row that is kept, only the answer may change, because nothing learns from it. spans: {stream: (start,
    end)}. SystemExit where a user gives another question the name of one that was taken up.
    """
    known = recognise(asked, kept)               # {place in `asked`: row}
    answers = {}                                 # {name: the answer that stands there now}
    new = []
    taken = {row["task"] for row in kept} | {question.row["task"] for question in asked}
    said = []
    for i, question in enumerate(asked):
        row = question.row
        if i in known:
            told = what_changed(question, known[i])
            if told:
                said.append((row["stream"], told))
            else:
                answers[known[i]["task"]] = row["answer"]
            continue
        if row["task"] is None:
            number = question.number
            while f"{row['stream']}-{number}" in taken:
                number += 1
            row["task"] = f"{row['stream']}-{number}"
            taken.add(row["task"])
        if row["time"] is None:
            row["time"] = float(spans[row["stream"]][1])
        new.append(row)
    order = {name: i for i, name in enumerate(spans)}
    new.sort(key=lambda row: (order[row["stream"]], row["time"]))
    here = {row["task"] for row in known.values()}
    tasks = []
    for row in kept:
        answer = answers.get(row["task"], row["answer"])
        if row["task"] not in here:
            said.append((row["task"], "no longer stands among the questions; it was taken up, so it stays"))
        elif answer != row["answer"]:
            said.append((row["task"], "has another answer now, which is taken over"))
        tasks.append(row | {"answer": answer})
    return tasks + new, said


def what_changed(asked, known):
    """How a question differs from the one that was taken up under its name, "" if it does not. SystemExit in a
    user's own tasks.jsonl."""
    row = asked.row
    same_time = row["time"] in (None, known["time"])
    if content_of_task(row) == content_of_task(known) and same_time:
        return ""
    if asked.place:
        raise SystemExit(f"{asked.place}: the name {row['task']!r} is that of another question, which "
                         f"was taken up before: {known}. Give this one a name of its own, or none")
    return f"{row['task']} is another question now; the one that was taken up stays"


def recognise(asked, kept):
    """{place in `asked`: the row of `kept` that it is}.

    A task is known by its name; one without a name by what it asks, and when if that was given. One without a
    time keeps the time at which it was taken up.
    """
    free = {row["task"]: row for row in kept}
    found = {}
    for i, question in enumerate(asked):
        if question.row["task"] in free:
            found[i] = free.pop(question.row["task"])
    by_content = {}
    for row in free.values():
        by_content.setdefault(content_of_task(row), []).append(row)
    unnamed = [i for i, question in enumerate(asked) if question.row["task"] is None]
    # Those with a time choose first, because the others may be any.
    for i in sorted(unnamed, key=lambda i: asked[i].row["time"] is None):
        row = asked[i].row
        same = by_content.get(content_of_task(row), [])
        for known in same:
            if row["time"] in (None, known["time"]):
                found[i] = known
                same.remove(known)
                break
    return found


def content_of_task(row):
    return row["stream"], row["environment"], row["question"], tuple(row["options"])


def say_new(before, streams, tasks):
    """Prints what is new and what stayed, where 01 has run before."""
    if not before.streams:
        return
    longer = clips = 0
    for row in streams:
        earlier = before.streams.get(row["stream"], {"clips": []})
        was = len(earlier["clips"])
        clips += len(row["clips"]) - was
        longer += 0 < was < len(row["clips"])
    new = len(streams) - len(before.streams)
    parts = [(new, "new stream"), (longer, "longer stream"), (clips, "new clip"),
             (len(tasks) - len(before.tasks), "new task")]
    shown = [counted(count, what) for count, what in parts if count]
    as_before = counted(len(before.streams) - longer, "stream")
    print(f"\n{', '.join(shown) or 'nothing new'}; {as_before} as before")


def counted(count, what):
    """
    >>> counted(1, "new clip"), counted(0, "stream")
    ('1 new clip', '0 streams')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"
