"""A run: its constants, its folder runs/RUN/STAGE, its files, and the next command.

Files are written aside and then put in place in one step, so a reader never sees half a file, and a run that was
killed goes on where it was.
"""
import ast
import contextlib
import datetime
import difflib
import errno
import fcntl
import hashlib
import inspect
import json
import math
import os
import pathlib
import re
import shlex
import signal
import socket
import sys
import textwrap
from collections import namedtuple
from types import SimpleNamespace

from support.ranks import RANK, is_first_rank, once, said_once, torch
from support.text import whole_characters

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A constant with two values: of the toy world (MODEL="tiny"), and of a full-size model.
per_model = namedtuple("per_model", "tiny full")

# What may change within a run. All other constants are compared with settings.json.
NOT_COMPARED = ("RUN", "SCRIPT", "COMMAND", "SHOW", "PLAN", "CARD", "ENVIRONMENT", "READERS",
                "ASK", "ASK_ONLY", "STREAM",
                "PRINT_EVERY", "SAVE_EVERY", "WORKERS", "CPU_THREADS")

# What a number may be. All are finite, at most LARGEST, and not negative unless their default is. Beyond that:
LARGEST = 2**53                                  # up to here, floats tell all integers apart
AT_LEAST_1 = (                                   # nothing can be cut into or drawn from 0
    "K", "FRAMES_PER_CLIP", "FRAME_PIXELS", "MEMORY_TOKENS", "THINK_TOKENS", "MAX_NEW_TOKENS",
    "CPU_THREADS", "READER_TOKENS", "LORA_RANK", "CLIP_SECONDS", "CLIPS", "WORKERS", "SAVE_EVERY",
    "PRINT_EVERY", "GROUP", "CONTEXTS", "MINI_BATCH", "ROWS", "CHUNK", "CACHE_STREAMS",
    "CACHE_CONTEXTS", "WARMUP", "RECENT", "PAIRS", "DPO_STEPS", "GRPO_STEPS", "VALIDATE", "BOOTSTRAP")
AT_MOST_1 = (                                    # shares, and what is 0 or 1
    "GATE", "DOUBLE_QUANT", "TRANSFER", "FACES", "SHOW", "RESAMPLE", "HELD_OUT", "CLIP_LOW",
    "ASK_ONLY")
ONE_OF = {"BITS": (4, 16), "VISION_BITS": (4, 16)}


class DamagedFile(ValueError):
    """A file of ours that is cut or damaged."""


def explain_interruption(kind, error, trace):
    """Ctrl-C outside of a training loop ends in a sentence and not in a traceback, and so does another rank's end."""
    if kind is KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)     # a second one does not wait for what is cleaned up
        if is_first_rank():
            print("\nstopped; the same command goes on", file=sys.stderr)
    elif kind is BrokenPipeError:                        # `--help | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)     # for what Python flushes at its end
    elif kind is DamagedFile:
        if is_first_rank():
            print(f"{error}\nThis file was cut or damaged: delete it, or mend it if it is your own, "
                  "and run the script that made it again", file=sys.stderr)
    elif issubclass(kind, RuntimeError) and "Connection closed by peer" in str(error):
        print(f"rank {RANK} stops, because another rank has stopped, which says why", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = explain_interruption


class Prompt(str):
    """A text that a model reads. It is not set by --NAME=value: edit it. A run remembers its hash."""


# ---------------------------------------------------------------- constants
def read_constants(shared, script, argv):
    """A namespace S of the UPPER_CASE constants of common.py (shared) and of a script, with `--NAME=value` applied.

    shared, script: namespaces such as `globals()`. Of a `per_model` constant MODEL chooses the value. S also holds
    SCRIPT (the script's file name) and COMMAND (the shared arguments for the next script). Raises SystemExit with
    the nearest name, or the expected type, where an argument is wrong, and for --help.
    """
    defaults = {}
    of_others = {name: value for name, value in shared.items() if name not in script}
    for name, value in (script | of_others).items():
        settable = isinstance(value, (str, int, float, per_model)) and not isinstance(value, Prompt)
        if name.isupper() and settable:
            defaults[name] = value
    if "-h" in argv or "--help" in argv:
        print_help(script["__doc__"], defaults)
        raise SystemExit(0)
    given = parse_arguments(argv, defaults)
    is_full = given.get("MODEL", defaults["MODEL"]) != "tiny"
    values = {}
    for name, default in defaults.items():
        if isinstance(default, per_model):
            default = default.full if is_full else default.tiny
        values[name] = convert(name, given[name], default) if name in given else default
        check_range(name, values[name], default)
    command = []
    for name, text in given.items():
        if name in shared and (name == "RUN" or name not in NOT_COMPARED):
            command.append(shlex.quote(f"--{name}={text}"))
    values["SCRIPT"] = pathlib.Path(script.get("__file__", "")).name
    values["COMMAND"] = " ".join(command)
    return SimpleNamespace(**values)


def print_help(doc, defaults):
    print(doc)
    print("Constants (--NAME=value; two values: toy world | full-size model):")
    for name, value in defaults.items():
        shown = f"{value.tiny!r} | {value.full!r}" if isinstance(value, per_model) else repr(value)
        print(f"  {name:20} {shown}")


def parse_arguments(argv, names):
    """{name: text} of arguments `--NAME=text`. SystemExit, with the nearest name, where one is unknown."""
    given = {}
    for arg in argv:
        name, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not equals or name not in names:
            nearest = difflib.get_close_matches(name.upper(), names, n=1, cutoff=0)[0]
            raise SystemExit(f"unknown argument {arg!r}: write --NAME=value; "
                             f"the nearest name is --{nearest}")
        given[name] = text
    return given


def convert(name, text, default):
    """`text` as the type of `default`; an int may be written as 1e3, and ~ is the home folder. SystemExit where it
    can't be."""
    kind = type(default)
    if kind is str:
        return os.path.expanduser(text)
    try:
        if kind is float or not re.fullmatch(r"[+-]?\d{1,99}", text):
            number = float(text)
        else:
            number = int(text)                   # a float would round the long ones
        if not math.isfinite(number) or kind(number) != number:
            raise ValueError
        return kind(number)
    except ValueError:
        raise SystemExit(f"--{name}={text}: expected {kind.__name__}, like {default!r}") from None


def check_range(name, value, default):
    """SystemExit, with what is allowed, where a constant is out of its range."""
    if name == "RUN" and not value:
        raise SystemExit("RUN is empty: name the run, like --RUN=mine")
    if isinstance(value, str):
        return
    if name in ONE_OF and value not in ONE_OF[name]:
        raise SystemExit(f"{name}={value}: expected {' or '.join(map(str, ONE_OF[name]))}")
    least = 1 if name in AT_LEAST_1 else 0
    most = 1 if name in AT_MOST_1 else LARGEST
    if default < 0:
        least = -LARGEST
    if not least <= value <= most:
        limit = f"{least} or more" if value < least else f"{most} or less"
        raise SystemExit(f"{name}={value}: it must be {limit}")


def next_command(S, script, *more):
    """How to call another script of this run."""
    return " ".join(part for part in ("python", script, S.COMMAND, *more) if part)


# ---------------------------------------------------------------- run folders
def sources(*functions):
    """{name: hash} of functions, and of what they use in turn: functions of the same script, prompts, tables.

    So a run can tell that a prompt or a reward was edited. Comments, docstrings and line breaks don't count.
    A constant of one number or one word isn't hashed, because it stands in the settings by itself.
    """
    found = {}

    def add(name, text, script):
        code = fingerprint(text)[:12]
        if found.get(name, code) != code:        # 02 and 05 both have `rewards`
            name += f" of {script}"
        found[name] = code

    waiting = [(function.__name__, function) for function in functions]
    seen = set()
    while waiting:
        name, function = waiting.pop(0)
        function = inspect.unwrap(function)      # of a decorated function, what was written
        if function in seen:
            continue
        seen.add(function)
        script = pathlib.Path(inspect.getsourcefile(function)).name
        code = parse_function(function)
        add(name, ast.unparse(code), script)
        for used in names_in(code):
            value = function.__globals__.get(used)
            if isinstance(value, Prompt):
                add(used, value, script)
            elif used.isupper() and type(value) in (tuple, list, dict):
                add(used, without_addresses(value), script)
            elif is_function_of(value, function.__module__):
                waiting.append((used, value))
    return found


def parse_function(function):
    """A function's syntax tree without its docstrings."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        has_body = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if has_body and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def names_in(tree):
    return sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})


def is_function_of(value, module):
    if not callable(value):
        return False
    function = inspect.unwrap(value)
    return inspect.isfunction(function) and function.__module__ == module


def without_addresses(table):
    """A table as text that is the same in every process, even where functions stand in it."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(table))


def start(S, stage, *functions, alone=True):
    """The folder runs/RUN/stage, once S and `functions` were found the same as in the settings saved there.

    functions: those whose edit asks for a new run, such as the reward (see `sources`). SystemExit on a difference.
    alone: no other process may work there meanwhile; SystemExit where one does.
    """
    if torch is None:
        raise SystemExit("torch and numpy are missing: ./run.sh setup "
                         "(or pip install -r requirements.txt)")
    out = ROOT / "runs" / S.RUN / stage                             # an absolute RUN stays as it is
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    if alone:
        hold(out)
    now = {name: value for name, value in vars(S).items() if name not in NOT_COMPARED}
    now["SOURCES"] = sources(*functions)
    file = out / "settings.json"
    if once(lambda: file.exists() and has_results(out)):
        differences = compare_settings(read_json(file), now)
        if differences:
            raise SystemExit(said_once(
                f"{out} was made with other settings:\n" + "\n".join(differences) +
                f"\nTake a new name and read the earlier stages from this run: "
                f"--RUN=NEWNAME --FROM={S.RUN}; or delete that folder"))
    print(f"---- {stage} -> {out}    (all constants: settings.json there)")
    if not getattr(S, "SHOW", 0):
        write_json(file, now | {"SCRIPT": S.SCRIPT})
    return out


def has_results(out):
    """Whether anything in a stage's folder binds it to its settings.

    What 01 has looked up in videos does not.
    """
    harmless = ("settings.json", "files.jsonl", "taken.json", "speech", "faces", LOCK)
    for path in out.iterdir():
        is_empty = path.is_dir() and all(inner.name == LOCK for inner in path.iterdir())
        if path.name not in harmless and ".aside" not in path.name and not is_empty:
            return True
    return False


def compare_settings(saved, now):
    """Lines that tell what differs."""
    lines = []
    for name in sorted((saved.keys() | now.keys()) - {"SCRIPT", "SOURCES"}):
        if saved.get(name) != now.get(name):
            lines.append(f"  {name}: {saved.get(name)!r} in the run, {now.get(name)!r} now")
    before, after = saved.get("SOURCES", {}), now["SOURCES"]
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            lines.append(f"  {name}: the text or code of it has changed since")
    return lines


def say_what_differs(folder, script, *functions):
    """Warns where a stage's folder was made with other prompts or functions than the ones that are used now.

    folder: of the stage that is read. script: the file that `functions` stand in.
    """
    saved = read_json(folder / "settings.json") if (folder / "settings.json").exists() else {}
    before = saved.get("SOURCES", {})
    differing = []
    for name, code in sources(*functions).items():
        if name in before and before[name] != code:
            differing.append(name)
    if differing:
        module = script.removesuffix(".py")
        print(f"*** {folder} was made by {saved.get('SCRIPT')} with another {', '.join(differing)} "
              f"than {script} has. What is used from here on is {script}'s. To use the fork's: put its "
              f"name in the place of {module!r} where the scripts after it import that ***")


def say_what_is_new(parts):
    """Says which environments are worked on: {what they are, such as "changed": their names}."""
    print("; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names))


def find(S, name):
    """Path of runs/RUN/name, or of runs/FROM/name, or None where neither exists."""
    for path in places(S, name):
        if path.exists():
            return path
    return None


def places(S, name):
    return [ROOT / "runs" / run / name for run in (S.RUN, S.FROM) if run]


def need(S, name):
    """The path that `find` finds. Raises SystemExit naming the script that makes it."""
    path = find(S, name)
    if path:
        return path
    stage = name.split("/")[0]
    maker = next(ROOT.glob(f"0?_*{stage}*.py")).name     # a script's name holds its stage's folder
    raise SystemExit(f"{' or '.join(map(str, places(S, name)))} is missing. Make it first: "
                     f"python {maker} --RUN={S.RUN}, or name a run that has it: --FROM=OTHERRUN")


def load_streams(S, split):
    """Rows of streams.jsonl of one split, "online" ones too unless it is "train"; clips get absolute files.

    Raises SystemExit if there are none, or where a video has gone. One's own that were watched after deployment
    may go one by one: that is said.
    """
    path = need(S, "streams/streams.jsonl")
    splits = {split} if split == "train" else {split, "online"}
    rows = [row for row in read_jsonl(path) if row["split"] in splits]
    if not rows:
        raise SystemExit(f"{path} holds no stream of the split {split!r}: "
                         "see SPLIT in 01_make_streams.py")
    for row in rows:
        for clip in row["clips"]:
            clip["file"] = str(path.parent / clip["file"])         # an absolute path stays as it is
    check_files_are_there(path, rows)
    return rows


def check_files_are_there(path, rows):
    """SystemExit where a video of these streams has gone; a warning where it was one of a life that goes on."""
    files = set()
    lost = set()
    may_go = set()
    for row in rows:
        of_stream = {clip["file"] for clip in row["clips"]}
        files |= of_stream
        gone = {file for file in of_stream if not os.path.isfile(file)}
        lost |= gone
        if row["split"] == "deploy" and row["source"] in ("videos", "camera"):
            may_go |= gone
    if not lost:
        return
    there = f"{len(lost)} of the {len(files)} video files of {path} are not there, such as {min(lost)}"
    if lost > may_go or lost == files:
        raise SystemExit(f"{there}. Put them back (is their disk mounted?) and run the same command "
                         "again, or make the streams anew: 01_make_streams.py under another --RUN")
    print(f"*** {there}. Their notes stay, but adapters learn nothing more from them, and a clip that was not "
          "watched in time stops 03 ***")


def have_frames(clips):
    """Whether the video files of these clips are still there."""
    return all(os.path.isfile(file) for file in {clip["file"] for clip in clips})


def as_written(S, streams):
    """The streams with the files of their clips as streams.jsonl names them, or relative to this repository.

    So what is kept under a hash of them stays in use where the run or the repository has moved. Without who
    reads them, too, because the frames are the same.
    """
    places = [f"{need(S, 'streams/streams.jsonl').parent}{os.sep}", f"{ROOT}{os.sep}"]
    rows = []
    for stream in streams:
        clips = []
        for clip in stream["clips"]:
            file = clip["file"]
            for place in places:
                file = file.removeprefix(place)
            row = clip | {"file": file}
            row.pop("reader", None)
            clips.append(row)
        rows.append(stream | {"clips": clips})
    return rows


# ---------------------------------------------------------------- one process a folder
LOCK = "lock"                                    # says who works in a folder, or did so last
held = {}                                        # {folder: its open lock}, while this process lives


def hold(folder):
    """Keeps other processes out of a folder, for all ranks. SystemExit where one works in it.

    The system lets go of it when this process ends, in whatever way.
    """
    refusal = once(lambda: take_lock(folder.resolve()))
    if refusal:
        raise SystemExit(said_once(refusal))


def take_lock(folder):
    """Why the folder can't be held, "" if it can."""
    if folder in held:
        return ""
    path = folder / LOCK
    with writing(path):
        # A bare number: unlike a file object it stays open, in silence, until the process ends.
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"*** {folder} can't be locked ({error.strerror}): start nothing else in it ***")
            return ""
        holder = os.read(lock, 200).decode(errors="replace").strip()
        os.close(lock)
        return f"{folder} is in use by {holder or 'another process'}. Wait for it, or take another --RUN"
    held[folder] = lock
    with writing(path):
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return ""


# ---------------------------------------------------------------- files
@contextlib.contextmanager
def writing(path):
    """Around what writes `path`: where the disk refuses it, SystemExit says which file, and why."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise SystemExit(f"{path} can't be written: {why}. What was there before is whole; "
                         "mend that, and the same command goes on") from None


@contextlib.contextmanager
def written_aside(path, every_rank=False):
    """Yields a temporary path that takes the place of `path` when the block ends well.

    Rank 0 alone writes, unless every rank has something of its own to write.
    """
    path = pathlib.Path(path)
    aside = path.with_name(f"{path.name}.aside{RANK or ''}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            if is_first_rank() or every_rank:
                with open(aside, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):       # after the replacement there is none
            aside.unlink()


def write_text(path, text):
    with written_aside(path) as aside:
        aside.write_bytes(as_bytes(text))


def as_bytes(text):
    """In UTF-8, which can't hold half a surrogate pair: U+FFFD stands for it."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return whole_characters(text).encode()


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path):
    """Raises DamagedFile where it is no JSON."""
    try:
        return parse_json(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(f"{path}: {error}") from None


def parse_json(text):
    """The value of a JSON text, with U+FFFD for half a surrogate pair, which no file of ours can hold."""
    value = json.loads(text)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        value = json.loads(whole_characters(json.dumps(value, ensure_ascii=False)))
    return value


def write_jsonl(path, rows):
    write_text(path, as_lines(rows))


def append_jsonl(path, rows):
    """For work in progress. A kill may tear the last line, so read it back with torn=True."""
    if is_first_rank():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                file.write(as_bytes(as_lines(rows)))


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path, torn=False):
    """Rows of a JSONL file. torn: a last line without its line end is cut off the file first.

    Raises DamagedFile naming the line that is no JSON.
    """
    data = pathlib.Path(path).read_bytes()
    whole = data[:data.rfind(b"\n") + 1] if torn else data        # a cut may go through a letter
    try:
        text = whole.decode()
    except ValueError as error:
        raise DamagedFile(f"{path}: {error}") from None
    if len(whole) < len(data):
        write_text(path, text)
    return parse_jsonl(text, path)


def parse_jsonl(text, path):
    """The rows of a text that stands in `path`. Raises DamagedFile naming the line that is no JSON."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line))
        except ValueError as error:
            raise DamagedFile(f"{path}, line {number}: {error}") from None
    return rows


def read_growing(path):
    """The whole rows of a file that another process may be appending to; none without a file. It stays untouched."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return parse_jsonl(data[:data.rfind(b"\n") + 1].decode(), path)


def read_progress(path):
    """Rows that an interrupted run has appended to `path`, the same on all ranks; none without a path or a file."""
    return once(lambda: read_jsonl(path, torn=True) if path and path.exists() else [])


def fingerprint(*things):
    """Hash of values, and of the contents of every file below a Path: what a kept result depends on."""
    digest = hashlib.sha256()
    for thing in things:
        files = []
        if isinstance(thing, pathlib.Path):
            files = sorted(path for path in thing.rglob("*") if path.is_file())
        contents = [path.read_bytes() for path in files]
        if not files:
            contents = [json.dumps(thing, default=str).encode()]
        for data in contents:
            digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def stamp(file):
    """[bytes, ns of the last change] of a file, [] where there is none."""
    return [file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else []


# ---------------------------------------------------------------- names and times
def slug(name):
    """A name of an environment, a stream or a reader as that of a file: safe, short, and of no other name.

    A plain name stays as it is. Of any other a part is kept, for the eye, before a hash. Where small letters and
    capitals are one to a disk, or two names have the same plain part, the hash tells them apart.

    >>> slug("place"), slug("OCR Problems"), slug("..")
    ('place', 'OCR_Problems.b10609ce', '_.5ec1f7e7')
    """
    if re.fullmatch(r"[a-z0-9_+-]{1,60}", name):
        return name
    plain = re.sub(r"[^\w+-]+", "_", name)
    code = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{plain[:30] or '_'}.{code[:8]}"


def clock(seconds):
    """Stream time as HH:MM:SS, from the second day on with its day; of a camera's clock, with the date.

    A camera's stream counts from 1970 on, and no other lasts for three years.

    >>> clock(75), clock(90000), clock(1795716190)
    ('00:01:15', 'day 2, 01:00:00', '2026-11-26 18:03:10')
    """
    whole = int(seconds)
    if whole >= 100_000_000:
        return str(datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=whole))
    day = f"day {whole // 86400 + 1}, " if whole >= 86400 else ""
    return f"{day}{whole // 3600 % 24:02}:{whole // 60 % 60:02}:{whole % 60:02}"
