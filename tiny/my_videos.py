"""Videos of the toy world in a folder, to be used as if they were your own; the README shows how.

Beside them lies truth.jsonl, from which JUDGE="tiny" knows what they show. No other stage reads it.

Run: python tiny/my_videos.py FOLDER NAME [NAME ...]      makes FOLDER/NAME.mp4, two minutes each
"""
import pathlib
import sys
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from support.runs import read_jsonl, write_jsonl                             # noqa: E402
from tiny import world                                                       # noqa: E402


def make_videos(folder, names):
    """Videos that are there stay as they are. What a video shows follows from its name."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "truth.jsonl"
    known = read_jsonl(file) if file.exists() else []
    there = {row["stream"] for row in known}
    for name in names:
        if name in there:
            continue
        number = zlib.crc32(name.encode()) % 1_000_000
        truth = world.make_stream(world.stream_seed(0, "test", number))
        world.write_stream_video(folder / f"{name}.mp4", truth)
        known += world.truth_rows(name, truth)
    write_jsonl(file, known)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    make_videos(pathlib.Path(sys.argv[1]).expanduser(), sys.argv[2:])
