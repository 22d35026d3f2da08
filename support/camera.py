"""When a camera's videos began, and the one stream that they make in the order of their times.

Times are those of the clock on the wall: naive local seconds since 1970-01-01 00:00. A date is read from the
names as cameras, phones and recorders write them; else from what the file says of itself; else from when it was
last written.
"""
import datetime
import re

from support.runs import clock

OVERLAP = 3.0                # s by which a video may begin before the one before it ends: times in names are
                             # rounded, and many dashcams repeat the last second or two
TOO_LATE = ("begins before the end of what stands before it in the stream, so it is left out: it came "
            "late, or is another lens, a copy, or of a wrong clock")
FIRST_YEAR = 1990            # an earlier time is that of a camera whose clock was never set
EPOCH = datetime.datetime(1970, 1, 1)

DATE = r"(?<!\d)(?P<year>\d{4})[-_./]?(?P<month>\d\d)[-_./]?(?P<day>\d\d)"
# Hours, minutes and seconds stand together, or have the same sign between them; thousandths may follow. Z: UTC.
TIME = (r"(?P<hour>\d\d)(?P<sign>[-_.:]?)(?P<minute>\d\d)(?P=sign)(?P<second>\d\d)(\d\d\d)?(?!\d)"
        r"(?P<zone>(Z(?![A-Za-z]))?)")
# What macOS and WhatsApp write: "2024-01-31 at 5.45.12 PM".
CLOCK = r"(?P<hour>\d\d?)\.(?P<minute>\d\d)\.(?P<second>\d\d)\s?(?P<half>[AP]M)?"
# Each is looked for in the file's name, then in its path below DATA. The first whole date and time wins.
FORMS = (
    DATE + r"[-_ ./T]{0,3}" + TIME,
    DATE + r" at " + CLOCK,
    # Folders of a day or an hour: Xiaomi, Wyze, and Frigate with the camera's name between, which is in UTC.
    DATE + r"(?P<hour>\d\d)/(?P<minute>\d\d)M(?P<second>\d\d)S",
    DATE + r"/(?P<hour>\d\d)/(?P<minute>\d\d)$",
    DATE + r"/(?P<hour>\d\d)/(?P<zone>[^/]+)/(?P<minute>\d\d)\.(?P<second>\d\d)$")


# ---------------------------------------------------------------- when a video began
def seconds_of(moment):
    """Naive local s since 1970-01-01 00:00 of a datetime, one with a zone or a local one."""
    if moment.tzinfo:
        moment = moment.astimezone().replace(tzinfo=None)
    return (moment - EPOCH).total_seconds()


def time_in_text(text):
    """s of a text such as "2026-11-26 18:00"; a time with a zone becomes a local one. ValueError on another."""
    return seconds_of(datetime.datetime.fromisoformat(text))


def time_in_name(inside):
    """When a video began by its name or its folders', in s; None where no date and time stand there.

    inside: its path below DATA. Pixel phones (PXL_...) write UTC.

    >>> clock(time_in_name("DJI_20240131_174512_0001.MP4")), time_in_name("VID-20240131-WA0003.mp4")
    ('2024-01-31 17:45:12', None)
    """
    path = str(inside).replace("\\", "/").rpartition(".")[0]
    name = path.rpartition("/")[2]
    for text in (name, path):
        for form in FORMS:
            # A date may stand within what another date has used up, so each beginning is tried.
            for place in re.finditer(r"(?<!\d)\d{4}", text):
                match = re.compile(form).match(text, place.start())
                if match is None or match.end() <= text.rfind("/"):
                    continue                     # a folder's time alone would be that of many files
                seconds = time_of_match(match.groupdict(), name.startswith("PXL_"))
                if seconds is not None:
                    return seconds
    return None


def time_of_match(found, is_utc):
    """s of what a form has found; None where it is no date, no time or an unlikely year."""
    hour = int(found["hour"])
    if found.get("half"):
        hour = hour % 12 + (12 if found["half"] == "PM" else 0)
    second = int(found.get("second", 0))
    numbers = [int(found[unit]) for unit in ("year", "month", "day")]
    try:
        moment = datetime.datetime(*numbers, hour, int(found["minute"]), second)
    except ValueError:
        return None
    if not FIRST_YEAR <= moment.year < 2100:
        return None
    if is_utc or found.get("zone"):
        moment = moment.replace(tzinfo=datetime.timezone.utc)
    return seconds_of(moment)


def time_in_file(created):
    """s of the time of creation in a file's metadata; None where there is none, or an unlikely one."""
    try:
        moment = datetime.datetime.fromisoformat(created)
    except (TypeError, ValueError):
        return None
    return seconds_of(moment) if FIRST_YEAR <= moment.year < 2100 else None


def beginning(file, inside, row):
    """(when a video began in s, which of the three told it). row: of files.jsonl."""
    in_name = time_in_name(inside)
    if in_name is not None:
        return in_name, "name"
    in_file = time_in_file(row["created"])
    if in_file is not None:
        return in_file, "metadata"
    written = datetime.datetime.fromtimestamp(file.stat().st_mtime)
    return seconds_of(written) - row["length"], "last change"


# ---------------------------------------------------------------- one stream
def put_in_order(stream, rows, folder, end):
    """Gives the parts of a camera's stream their times, leaves out those that can't follow -> [(name, reason)].

    rows: of `check_files`. end: s, of what was taken up before; None: nothing was. Prints where times come from.
    """
    parts = []
    told_by = {"name": [], "metadata": [], "last change": []}
    waits = None                                 # s from which on all waits for an unfinished file
    for part in stream.parts:
        row = rows[part.file]
        inside = part.file.relative_to(folder)
        if row.get("unfinished"):
            begins = time_in_name(inside)
            if begins is not None:
                waits = min(begins, waits or begins)
        if not any(row["clips"]):
            continue
        if part.at is None:
            part.at, source = beginning(part.file, inside, row)
            told_by[source].append(part)
        parts.append(part)
    parts.sort(key=lambda part: (part.at, part.file))

    stream.parts = []
    left_out = []
    for part in parts:
        inside = part.file.relative_to(folder)
        if waits is not None and part.at >= waits:
            left_out.append((inside, "waits for the one before it, which is still being written"))
        elif end is not None and part.at < end - OVERLAP:
            left_out.append((inside, TOO_LATE))
        else:
            if end is not None:
                part.at = max(part.at, end)
            row = rows[part.file]
            clips = row["clips"][row["spans"].index([part.start, part.end])]
            end = round(part.at + clips[-1]["end"] - (part.start or 0), 3)
            stream.parts.append(part)
    say_times(told_by, stream.parts, folder)
    return left_out


def say_times(told_by, used, folder):
    """Prints which times came from where, with an example; loudly where they are a guess."""
    for source, parts in told_by.items():
        parts = [part for part in parts if part in used]
        if not parts:
            continue
        example = f"{parts[0].file.relative_to(folder)}: {clock(parts[0].at)}"
        if source == "last change":
            print(f"*** no time stands in the name or the metadata of {len(parts)} video files, so each is "
                  f"taken to end when it was last written ({example}). A copy may have changed that ***")
        else:
            print(f"times from the {source} of {len(parts)} video files ({example})")
