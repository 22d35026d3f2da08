"""Identity and speech in the pixels: what is drawn where, sidecar boxes, faces found, speech recognised.

insightface and a trained Whisper are not here. The first is a stand-in, its interface with known faces: our
clustering is what is tested. The second is the real pipeline with random weights, and, for the clock, a plain
callable that is used like it.
"""
import importlib
import json
import pathlib
import re
import shutil
import sys
import threading
import types
import warnings
from fractions import Fraction
from types import SimpleNamespace

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
av = pytest.importorskip("av", reason="PyAV makes the videos and sounds of these tests")
np = pytest.importorskip("numpy")
ImageFont = pytest.importorskip("PIL.ImageFont")

import common                                                               # noqa: E402
from support import overlay, sources                                        # noqa: E402
from support import runs as runs_module                                     # noqa: E402
from support import video as media                                          # noqa: E402
from tiny import world                                                      # noqa: E402

stage = importlib.import_module("01_make_streams")
SHARED = ROOT.parent / "shared"
H, W = 360, 640
THIRD = H - H // 3
LONG = "<face_1>: " + " ".join(f"word{n}" for n in range(60))


def drawn(speech=(), faces=(), seconds=(0.25, 0.75, 1.25, 1.75), shape=(H, W)):
    """Which pixels of grey frames change: (n, H, W) bool."""
    frames = np.full((len(seconds), *shape, 3), 90, np.uint8)
    after = overlay.draw(frames, seconds, {"speech": speech, "faces": faces})
    assert (frames == 90).all() and after.shape == frames.shape and after.dtype == np.uint8
    return (after != 90).any(-1)


def runs(flags):
    """Lengths of the runs of True: lines of text, seen by rows."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


# ---- subtitles ---------------------------------------------------------------------------------------------

def test_a_cue_stands_at_the_bottom_of_the_frames_of_its_time():
    change = drawn([[0.5, 1.4, "Mark it"]])
    assert change.any((1, 2)).tolist() == [False, True, True, False]
    rows, columns = change[1].any(1), change[1].any(0)
    assert not rows[:THIRD].any() and not rows[-2:].any()
    left, right = np.flatnonzero(columns)[[0, -1]]
    assert abs(left - (W - 1 - right)) <= 3                                     # centred


def test_a_cue_between_two_frames_stands_on_the_nearer():
    assert drawn([[0.9, 1.0, "Hm"]]).any((1, 2)).tolist() == [False, True, False, False]
    assert drawn([[5.0, 6.0, "Hm"]]).any((1, 2)).tolist() == [False, False, False, True]


@pytest.mark.parametrize("shape", [(360, 640), (720, 1280), (1280, 720), (68, 160)])
def test_text_is_legible_once_a_frame_has_448_x_448_pixels(shape):
    rows = drawn([[0, 2, "HHH"]], shape=shape)[0].any(1).sum()                  # capitals with their outline
    assert rows * 448 / (shape[0] * shape[1]) ** 0.5 >= 16
    assert rows <= 0.15 * shape[0]


@pytest.mark.parametrize("text", [LONG, LONG.replace(" ", ""), LONG.upper().replace(" ", "W")])
def test_long_text_wraps_stays_inside_and_turns_pages(text):
    seconds = np.arange(0.05, 10, 0.1)
    change = drawn([[0, 10, text]], seconds=seconds)
    assert not change[:, :THIRD].any() and not change[:, :, :8].any() and not change[:, :, -8:].any()
    assert 2 <= len(runs(change[0].any(1))) <= 4
    pages = 1 + sum((a != b).any() for a, b in zip(change, change[1:]))
    font, lines = overlay.wrapped(text, 27, 0.92 * W)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")             # nothing is lost
    assert pages == -(-len(lines) // 3) > 1


def test_overlapping_cues_are_stacked_in_order():
    first, second, both = (drawn(cues)[0] for cues in (
        [[0, 2, "HHH"]], [[0, 2, "HHHHHH"]], [[0, 2, "HHH"], [0, 2, "HHHHHH"]]))
    assert len(runs(both.any(1))) == 2 and not both[:THIRD].any()
    lower = both.copy()
    lower[:np.flatnonzero(second.any(1))[0]] = False
    assert (lower == second).all()                                              # the later one below ...
    rows = np.flatnonzero((both & ~lower).any(1))
    assert rows[-1] < np.flatnonzero(second.any(1))[0]
    assert (both & ~lower).sum() == first.sum()                                 # ... the earlier one above
    many = drawn([[0, 2, LONG]] * 2)[0]
    assert not many[:THIRD].any()


@pytest.fixture
def fonts(monkeypatch):
    """{name: what truetype gives for it}, in place of the system's; asked: the names asked for."""
    real, fonts, asked = ImageFont.truetype, {}, []

    def truetype(font, *arguments, **named):
        if isinstance(font, str):                                               # Pillow's own is no name
            asked.append(font)
            if font not in fonts:
                raise OSError(f"no {font}")
            font = fonts[font]
        return real(font, *arguments, **named)
    monkeypatch.setattr(ImageFont, "truetype", truetype)
    overlay.wrapped.cache_clear()
    yield fonts, asked
    overlay.wrapped.cache_clear()


def test_characters_that_no_font_has_are_left_out_and_said_so(fonts):
    with pytest.warns(UserWarning, match="lose characters"):
        bilingual = drawn([[0, 2, "Jake: 好然后一个秒表 Yes"]])
    assert (bilingual == drawn([[0, 2, "Jake: Yes"]])).all() and bilingual.any()
    with pytest.warns(UserWarning, match="lose characters"):
        assert not drawn([[0, 2, "好然后一个秒表"]]).any()


def test_a_font_of_the_system_stands_in_where_it_has_more(fonts):
    try:
        ImageFont.FreeTypeFont("DejaVuSans.ttf", 9)
        name = "DejaVuSans.ttf"
    except OSError:
        name = next(iter(pathlib.Path("/usr/share/fonts").rglob("DejaVuSans.ttf")), None)
    if name is None:
        pytest.skip("no DejaVuSans.ttf here")
    fonts[0]["NotoSansCJK-Regular.ttc"] = str(name)             # in place of a Chinese one, which few have
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn([[0, 2, "café – Да"]]).any() and "NotoSansCJK-Regular.ttc" in fonts[1]
        fonts[1].clear()
        assert drawn([[0, 2, "plain"]]).any() and not fonts[1]                  # ASCII is the same everywhere


@pytest.mark.parametrize("text", ["", "\x00a\x1f", "🙂", "a\u00a0b", "עברית", "e\u0301"])
@pytest.mark.filterwarnings("ignore:subtitles")
def test_odd_text_does_no_harm(text):
    assert drawn([[0, 2, text], [0.75, 0.75, "x"]]).any()


# ---- boxes -------------------------------------------------------------------------------------------------

def test_a_box_is_held_half_a_second_either_side():
    box = [200, 100, 300, 220]
    seconds = [0.49, 0.5, 1.0, 1.5, 1.51]
    change = drawn(faces=[[1.0, 3, *box]], seconds=seconds)
    assert change.any((1, 2)).tolist() == [False, True, True, True, False]
    border = np.zeros((H, W), bool)
    border[100:221, 200:301] = True
    border[105:216, 205:296] = False
    label = np.zeros((H, W), bool)
    label[70:101, 195:300] = True                                               # above the top-left corner
    assert not (change[1] & ~border & ~label).any()
    assert change[1][100, 200:301].all() and change[1][220, 200:301].all()
    assert change[1][100:221, 200].all() and change[1][100:221, 300].all()
    assert change[1][70:98, 195:300].sum() > 200


@pytest.mark.parametrize("box", [
    [-40, -30, 60, 50], [600, 320, 900, 700], [600.5, 2, 640, 90], [700, 400, 800, 500]])
def test_a_box_at_the_edge_keeps_its_label_inside(box):
    label = drawn(faces=[[1.0, 12, 300, 200, 301, 201]])[1]
    rows, columns = (np.flatnonzero(label.any(axis))[[0, -1]] for axis in (1, 0))
    change = drawn(faces=[[1.0, 12, *box]])[1]
    assert change.any() and not change[0].any() and not change[:, 0].any() and not change[:, -1].any()
    inside = np.flatnonzero(change.any(0))
    assert inside[-1] - inside[0] >= columns[1] - columns[0] - 2


def test_each_face_has_one_box_the_nearest():
    moving = [[0.5, 3, 10, 100, 60, 150], [1.4, 3, 400, 100, 450, 150], [0.5, 4, 200, 100, 250, 150]]
    change = drawn(faces=moving, seconds=[0.8, 1.0])
    faces = change[:, 100:150]                                                  # below the labels
    assert faces[0, :, :190].any() and faces[0, :, 198:300].any() and not faces[0, :, 380:].any()
    assert not faces[1, :, :190].any() and faces[1, :, 198:300].any() and faces[1, :, 380:].any()


# ---- clips -------------------------------------------------------------------------------------------------

def make_video(path, frames=40, video_start=0.0, spans=(), rate=16000):
    """Grey frames, 10 a second, and a tone in the given spans, s."""
    with av.open(str(path), "w") as box:
        video = box.add_stream("libx264", rate=10, options={"threads": "1"})
        video.width, video.height, video.pix_fmt = 160, 96, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        sound = box.add_stream("aac", rate=rate, layout="mono") if spans else None
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((96, 160, 3), 90, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * (video_start + i / 10)), Fraction(1, 1000)
            box.mux(video.encode(frame))
        box.mux(video.encode())
        for begin, end in spans:
            for n in range(round(begin * rate), round(end * rate), 1024):
                wave = np.sin(np.arange(n, n + 1024) * 2 * np.pi * 440 / rate)[None].astype(np.float32) / 2
                part = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
                part.rate, part.pts, part.time_base = rate, n, Fraction(1, rate)
                box.mux(sound.encode(part))
        if sound:
            box.mux(sound.encode())
    return path


def test_a_clip_is_drawn_on_by_the_clock_of_its_stream(tmp_path, monkeypatch):
    video = make_video(tmp_path / "a.mp4")
    clip = {"clip": 7, "start": 102.0, "end": 104.0, "file": str(video), "offset": 2.0, "speech": []}
    plain, at = overlay.clip_frames(clip, 20)
    assert len(at) == 4 and (plain == media.read_frames(video, [2 + t for t in at])).all()
    monkeypatch.setattr(overlay, "draw", None)                                  # nothing to draw: not called
    assert (overlay.clip_frames(clip | {"faces": []}, 20)[0] == plain).all()
    monkeypatch.undo()
    said = overlay.clip_frames(clip | {"speech": [[103.0, 104.0, "Hi"]]}, 20)[0]
    assert (said != plain).any((1, 2, 3)).tolist() == [False, False, True, True]
    seen = overlay.clip_frames(clip | {"faces": [[102.5, 3, 20, 30, 60, 70]]}, 20)[0]
    assert (seen != plain).any((1, 2, 3)).tolist() == [True, True, False, False]


@pytest.fixture
def damage(monkeypatch):
    """A set of clips, as (file, offset), whose frames are lost."""
    monkeypatch.setattr(overlay, "_was_grey", {})
    lost, read = set(), media.read_frames

    def damaged(file, times, *reader):
        if any(path == file and 0 < times[0] - offset < 2 for path, offset in lost):
            raise media.VideoError(file, "is damaged")
        return read(file, times, *reader)
    monkeypatch.setattr(overlay, "read_frames", damaged)
    return lost


def test_a_damaged_clip_is_grey_and_a_lost_file_stops(tmp_path, damage, capsys):
    video = make_video(tmp_path / "a.mp4", frames=100)
    clips = [{"clip": n, "start": 2.0 * n, "end": 2.0 * n + 2, "file": str(video), "offset": 2.0 * n,
              "speech": [[0, 9, "Hi"]]} for n in range(5)]
    damage.add((str(video), 0))
    grey, _ = overlay.clip_frames(clips[0], 20)
    assert (grey == 127).all() and overlay.is_grey(clips[0])                    # nothing was seen or heard
    seen, _ = overlay.clip_frames(clips[1], 20)
    assert (seen != 127).any() and not overlay.is_grey(clips[1])
    assert "Clip 0 is watched as grey frames and leaves no memory: 1 grey clips of 1 so far" in capsys.readouterr().out
    damage.update((str(video), clip["offset"]) for clip in clips)
    overlay.clip_frames(clips[0], 20)                                           # the same one again
    overlay.clip_frames(clips[2], 20)
    overlay.clip_frames(clips[3], 20)
    with pytest.raises(SystemExit, match="4 of 5 clips cannot be read, though 01 could.*higher --CHECK"):
        overlay.clip_frames(clips[4], 20)
    damage.clear()
    for content in (None, b"", b"<html>"):
        video.unlink(missing_ok=True)
        if content is not None:
            video.write_bytes(content)
        with pytest.raises(SystemExit, match="a.mp4: .*though 01 could read it. Put it back"):
            overlay.clip_frames(clips[1], 20)


def test_nothing_is_remembered_of_a_damaged_clip(policy, streams, damage, tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "features", {})
    short = [stream | {"clips": stream["clips"][:3]} for stream in streams[:2]]
    damage.add((short[0]["clips"][1]["file"], short[0]["clips"][1]["offset"]))
    plain = {"description": "now, in the office."}
    monkeypatch.setattr(common, "decode", lambda policy, prompts, noise, *_: [
        [policy.tokenizer("x</think>" + json.dumps(plain))["input_ids"] + [policy.end]] for _ in prompts])
    rows = common.watch(policy, short, path=tmp_path / "memories.jsonl")
    written = {name: [(row["memory"], row.get("grey")) for row in rows] for name, rows in rows.items()}
    good = ("now, in the office.", None)
    assert written == {short[0]["stream"]: [good, ("", True), good], short[1]["stream"]: [good] * 3}


def test_a_stage_stops_at_once_where_a_video_has_gone(tmp_path, toy):
    shutil.copytree(toy / "streams", tmp_path / "run" / "streams")
    (tmp_path / "run" / "streams" / "videos" / "train-001.mp4").unlink()
    with pytest.raises(SystemExit, match="1 of the 4 video files .*train-001.mp4. Put them back"):
        importlib.import_module("02_phase1_train").main([f"--RUN={tmp_path / 'run'}"])
    (tmp_path / "run" / "streams" / "videos").rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="1 of the 1 video files .*deploy-000.mp4. Put them back"):
        importlib.import_module("03_collect_tasks").main([f"--RUN={tmp_path / 'run'}"])


# ---- which package decodes ---------------------------------------------------------------------------------

READERS = {"h264_intra.mp4": "decord", "m2ts.m2ts": "PyAV", "mpeg4_bf.mp4": "PyAV", "wmv2.wmv": "PyAV",
           "bikes.mp4": "decord", "vfr.mp4": "decord", "hang_cut_copy_ss_before_i.mp4": "PyAV",
           "trunc50_faststart.mp4": "PyAV"}
OURS = ROOT / "tests" / "cases" / "videos"
PLACES = [OURS, SHARED / "cases" / "videos", SHARED / "videos"]
FILES = [path for place in PLACES if place.is_dir() for path in sorted(place.iterdir()) if path.name in READERS]
decord_only = pytest.mark.skipif(not media.has_decord(), reason="decord is not installed")


@pytest.fixture(autouse=True)
def fresh_readers(monkeypatch):
    monkeypatch.setattr(media, "_open_videos", {})
    monkeypatch.setattr(media, "_left_to_pyav", set())


def checked(file, **change):
    S = SimpleNamespace(SOURCE="videos", CLIP_SECONDS=10, SHORTEST=2, CHECK=3)
    vars(S).update(change)
    return sources.check_video(file, [[None, None]], S)


def in_order(path):
    """(times, frames) by PyAV, which decodes one after the other: the plain reference."""
    with av.open(str(path)) as box:
        shown = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in box.decode(video=0)]
    return [time for time, _ in shown], [frame for _, frame in shown]


@decord_only
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.parent.name}-{path.name}")
def test_each_file_gets_the_right_reader_and_the_right_frames(path, capsys):
    row = checked(path)
    assert row["reader"] == READERS[path.name] and row["clips"][0]
    assert checked(path, CHECK=0)["reader"] == "PyAV"
    clips, _ = sources.lay_out(sources.Stream("a", "online", [sources.Part(path)]), {path: row})
    assert all(("reader" in clip) == (row["reader"] == "decord") for clip in clips)
    if path.parent.name != "videos" or path.parent.parent.name != "cases":
        return
    times, shown = in_order(path)
    for clip in clips:
        frames, at = overlay.clip_frames(clip, 20)
        for t, frame in zip(at, frames):
            nearest = np.abs(np.arange(len(shown)) / 10 - clip["offset"] - t)
            right = np.flatnonzero(nearest <= nearest.min() + 1e-4)[0]          # of two as near, the earlier
            assert (frame == shown[right]).all()
    assert "***" not in capsys.readouterr().out


@decord_only
def test_decord_reads_the_toy_world_as_pyav_does_frame_by_frame(tmp_path):
    for seed in range(2):
        file = str(tmp_path / f"{seed}.mp4")
        world.write_stream_video(file, world.make_stream(seed, 3))
        _, shown = in_order(file)
        times = np.arange(len(shown)) / world.FPS
        assert len(shown) == 3 * world.CLIP_SECONDS * world.FPS
        assert (media.read_by_decord(file, times) == shown).all()
        assert (media.read_frames(file, times) == shown).all()
        for i in np.random.default_rng(0).permutation(len(shown)):
            assert (media.read_frames(file, times[i:i + 1], "decord")[0] == shown[i]).all()
        clips = world.stream_row("a", "train", file, 3)["clips"]
        for clip in clips:
            assert clip.pop("reader") == "decord"
            by_pyav, _ = overlay.clip_frames(clip, 4)
            by_decord, _ = overlay.clip_frames(clip | {"reader": "decord"}, 4)
            assert (by_decord == by_pyav).all()
        assert not media._left_to_pyav and media.decord_is_right(file, 3)


@decord_only
def test_of_two_frames_as_near_both_readers_take_the_earlier():
    file = str(OURS / "h264_intra.mp4")
    between = np.arange(119) / 10 + 0.05
    _, shown = in_order(file)
    assert (media.read_frames(file, between) == shown[:119]).all()
    assert (media.read_by_decord(file, between) == shown[:119]).all()


class Wrong:
    """decord's reader, which goes wrong where it is told to."""
    def __init__(self, reader, wrong):
        self.reader, self.wrong = reader, wrong

    def get_batch(self, indices):
        if self.wrong == "refuses":
            raise RuntimeError("decord says no")
        if self.wrong == "hangs":
            threading.Event().wait(20)
        if self.wrong == "one bit":
            return SimpleNamespace(asnumpy=lambda: self.reader.get_batch(indices).asnumpy() ^ 1)
        seeks_wrong = [i + (60 < i < 70) for i in indices.tolist()]
        return self.reader.get_batch(seeks_wrong)


@decord_only
@pytest.mark.parametrize("wrong", ["refuses", "hangs", "one bit", "seeks", "counts", "stamps"])
def test_a_decord_that_is_wrong_is_not_chosen(monkeypatch, wrong):
    file = OURS / "h264_intra.mp4"
    media.read_frames(file, [0])                                                # PyAV has it open
    plain = media.open_by_decord

    def opened(file):
        video = plain(file)
        if wrong == "counts":
            video.times = video.times[:-1]
        elif wrong == "stamps":
            video.times = video.times + 0.001
        else:
            video.reader = Wrong(video.reader, wrong)
        return video
    assert media.decord_is_right(file, 3)
    monkeypatch.setattr(media, "open_by_decord", opened)
    monkeypatch.setattr(media, "DECODE_SECONDS", 3 if wrong == "hangs" else 60)
    row = checked(file)
    assert row["reader"] == "PyAV" and row["clips"][0] and not row["skipped"]


@decord_only
def test_where_decord_fails_later_pyav_goes_on_and_says_so_once(monkeypatch, capsys):
    file = str(OURS / "h264_intra.mp4")
    clip = {"clip": 0, "start": 0.0, "end": 10.0, "file": file, "offset": 0.0, "speech": []}
    right, _ = overlay.clip_frames(clip, 4)
    assert (overlay.clip_frames(clip | {"reader": "decord"}, 4)[0] == right).all()
    assert "***" not in capsys.readouterr().out
    plain = media.open_by_decord

    def opened(file):
        video = plain(file)
        video.reader = Wrong(video.reader, "refuses")
        return video
    monkeypatch.setattr(media, "open_by_decord", opened)
    for _ in range(2):
        assert (overlay.clip_frames(clip | {"reader": "decord"}, 4)[0] == right).all()
    said = capsys.readouterr().out
    assert said.count("h264_intra.mp4: decord fails here") == 1 and "decord says no" in said
    assert not overlay.is_grey(clip)


def test_all_works_without_decord(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "decord", None)
    file = OURS / "h264_intra.mp4"
    assert checked(file)["reader"] == "PyAV" and not checked(file)["skipped"]
    assert "reader" not in world.stream_row("a", "train", "a.mp4", 1)["clips"][0]
    clip = {"clip": 0, "start": 0.0, "end": 10.0, "file": str(file), "offset": 0.0, "reader": "decord"}
    right = media.read_frames(file, media.frame_times(clip, 4))
    for _ in range(2):                                      # of streams that were made where decord was
        assert (overlay.clip_frames(clip, 4)[0] == right).all()
    assert "decord" not in capsys.readouterr().out


@decord_only
def test_stage_1_says_who_reads(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    for name in ("h264_intra.mp4", "wmv2.wmv"):
        shutil.copy(OURS / name, tmp_path / "data")
    clips = make(tmp_path)
    assert "video files: 1 read by decord, 1 read by PyAV" in capsys.readouterr().out
    assert [clip.get("reader") for name in sorted(clips) for clip in clips[name]] == ["decord"] * 2 + [None] * 2
    rows = (tmp_path / "run" / "streams" / "files.jsonl").read_text().splitlines()
    assert [json.loads(row)["reader"] for row in rows] == ["decord", "PyAV"]
    monkeypatch.setitem(sys.modules, "decord", None)        # and it looks again where that has changed
    for name in ("streams.jsonl", "tasks.jsonl"):
        (tmp_path / "run" / "streams" / name).unlink()
    assert not any("reader" in clip for name in clips for clip in make(tmp_path)[name])
    assert "video files: 2 read by PyAV" in capsys.readouterr().out


def test_who_reads_changes_no_hash(tmp_path, monkeypatch):
    (tmp_path / "streams").mkdir()
    (tmp_path / "streams" / "streams.jsonl").touch()
    monkeypatch.setattr(runs_module, "need", lambda S, name: tmp_path / name)
    clip = {"clip": 0, "file": "/a.mp4"}
    by_decord = [{"stream": "a", "clips": [clip | {"reader": "decord"}]}]
    assert runs_module.as_written(None, by_decord) == [{"stream": "a", "clips": [clip]}]


# ---- sidecar files -----------------------------------------------------------------------------------------

ROW = {"time": 2.5, "face": 3, "box": [1, 2, 30.5, 40], "name": "Shure"}


def test_read_faces(tmp_path):
    path = tmp_path / "a.faces.jsonl"
    assert overlay.read_faces(path) == ([], {})
    rows = [ROW, ROW | {"time": 0.5, "name": "Sure"}, {"time": 1, "face": 1, "box": [0, 0, 5, 5]}]
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    assert overlay.read_faces(path) == (
        [[0.5, 3, 1, 2, 30.5, 40], [1, 1, 0, 0, 5, 5], [2.5, 3, 1, 2, 30.5, 40]], {"Shure": 3, "Sure": 3})


@pytest.mark.parametrize("bad", [
    "{", "[]", "3", "{}", '"box"', *(json.dumps(ROW | {"name": "B"} | change) for change in (
        {"name": "Shure", "face": 4}, {"face": "3"}, {"face": -1}, {"face": True}, {"time": None},
        {"time": float("nan")}, {"box": 7}, {"box": [1, 2, 3]}, {"box": [1, 2, 3, 4, 5]},
        {"box": [9, 2, 3, 4]}, {"box": [1, 9, 3, 4]}))])
def test_read_faces_names_the_bad_row(tmp_path, bad):
    path = tmp_path / "a.faces.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + bad + "\n")
    with pytest.raises(SystemExit, match=r"a\.faces\.jsonl, line 3: "):
        overlay.read_faces(path)


def test_by_face():
    names = {"Shure": 3, "Lee": 4, "Ann Lee": 5}
    assert overlay.by_face("SHURE : Mark it", names) == "<face_3>: Mark it"
    assert overlay.by_face("Ann Lee: no. Lee： yes", names) == "<face_5>: no. <face_4>: yes"
    for other in ("Mashure: no", "Jake: yes", "Shure said so", "at Lee 12:30", "<face_3>: Hi"):
        assert overlay.by_face(other, names) == other
    assert overlay.by_face("Shure: hi", {}) == "Shure: hi"


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data, a real transcript, is not here")
def test_by_face_on_a_real_transcript():
    path = SHARED / "data" / "A1_JAKE_DAY1_11000000.srt"
    cues = [text for _, _, text in overlay.read_subtitles(path)[0]]
    faced = [overlay.by_face(text, {"Jake": 1, "Shure": 3}) for text in cues]
    assert faced[0] == "<face_1>: Okay, then we need a stopwatch."
    assert faced[1] == "<face_3>: Mark a timestamp, right?"
    assert not any("Jake:" in text or "Shure:" in text for text in faced)
    assert all(a == b for a, b in zip(cues, faced) if "Jake" not in a and "Shure" not in a)


# ---- faces found -------------------------------------------------------------------------------------------

@pytest.fixture
def insightface(monkeypatch):
    """A stand-in: `script` holds, frame by frame, (embedding, score) of its faces; like the real one it gives
    those of a score of det_thresh or more."""
    script, seen = [], []

    class FaceAnalysis:
        def __init__(self, name, allowed_modules):
            assert name == "buffalo_l" and set(allowed_modules) == {"detection", "recognition"}

        def prepare(self, ctx_id, det_thresh=0.5, det_size=(640, 640)):
            self.least = det_thresh

        def get(self, image):
            assert image.flags["C_CONTIGUOUS"] and image.dtype == np.uint8
            seen.append(image)
            return [SimpleNamespace(bbox=np.float32([10 * n, 5, 10 * n + 8, 15]), det_score=score,
                                    normed_embedding=vector / np.linalg.norm(vector))
                    for n, (vector, score) in enumerate(script[len(seen) - 1]) if score >= self.least]
    module = types.ModuleType("insightface.app")
    module.FaceAnalysis = FaceAnalysis
    monkeypatch.setitem(sys.modules, "insightface", types.ModuleType("insightface"))
    monkeypatch.setitem(sys.modules, "insightface.app", module)
    return script, seen


def turned(degrees):
    """A person's embedding: the angle between two is the difference of their degrees."""
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))] + [0.0] * 510)


def test_find_faces_clusters_over_the_stream(insightface, monkeypatch):
    script, seen = insightface
    asked = []

    def read(file, times):
        asked.append((file, *times))
        if (file, *times) == ("b", 21.5):
            raise media.VideoError(file, "is damaged")
        return np.full((1, 4, 4, 3), (1, 2, 3), np.uint8)
    monkeypatch.setattr(overlay, "read_frames", read)
    script += [[(turned(0), 0.9), (turned(200), 0.9)],
               [(turned(195), 0.9), (turned(50), 0.9), (turned(120), 0.55)],     # 50 degrees from face 1
               [(turned(90), 0.9)],                     # 90 from its first sight, 65 from its mean
               [(turned(-10), 0.9)],                    # 100 from its last sight, 57 from its mean
               [(turned(315), 0.7), (turned(318), 0.7)]]                        # two faces of one frame
    app = overlay.face_finder(0.6)
    found = [overlay.find_faces(app, "a", 0, 4), overlay.find_faces(app, "b", 20, 22.2) - 16 * np.eye(1, 517)]
    boxes = overlay.tell_apart(np.concatenate(found), 0.4)
    assert asked == [("a", 0.5), ("a", 1.5), ("a", 2.5), ("a", 3.5), ("b", 20.5), ("b", 21.5)]
    assert [tuple(box[:2]) for box in boxes] == [
        (0.5, 1), (0.5, 2), (1.5, 1), (1.5, 2), (2.5, 1), (3.5, 1), (4.5, 3), (4.5, 4)]
    assert boxes[1] == [0.5, 2, 10.0, 5.0, 18.0, 15.0] and json.dumps(boxes)
    assert (seen[0] == (3, 2, 1)).all()                                         # BGR, as insightface expects


def test_find_faces_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface", None)
    with pytest.raises(SystemExit, match="pip install insightface onnxruntime"):
        overlay.face_finder(0.6)


# ---- speech ------------------------------------------------------------------------------------------------

def listener(chunks):
    """A callable of the pipeline's interface, which hears `chunks` in whatever it gets."""
    pieces = []

    def recognise(inputs, return_timestamps):
        assert return_timestamps is True and inputs["sampling_rate"] == 16000
        assert inputs["raw"].dtype == np.float32 and inputs["raw"].ndim == 1
        pieces.append(inputs["raw"].copy())
        return {"text": "", "chunks": [dict(timestamp=t, text=text) for t, text in chunks]}
    return recognise, pieces


def loud(wave):
    """For each half second of a wave, whether there is sound in it."""
    return [bool(np.abs(wave[n:n + 8000]).mean() > 0.2) for n in range(0, len(wave) - 4000, 8000)]


@pytest.mark.parametrize("name, named, heard", [
    ("gap.mp4", dict(frames=80, spans=[(0, 2), (5, 7)], rate=44100), "1111000000 1111"),  # later words stay late
    ("late.mp4", dict(frames=40, spans=[(3, 5)]), "000000 1111"),
    # The sound begins 2 s before the first frame, which is 0 s to us.
    ("early.mkv", dict(frames=20, video_start=2.0, spans=[(0, 4)]), "1111")])
def test_sound_keeps_the_clock_of_the_frames(tmp_path, name, named, heard):
    wave = overlay.read_sound(make_video(tmp_path / name, **named))
    assert wave.dtype == np.float32 and loud(wave)[:len(heard.replace(" ", ""))] == [
        c == "1" for c in heard.replace(" ", "")]
    assert len(wave) / 16000 == pytest.approx(len(heard.replace(" ", "")) / 2, abs=0.2)
    assert media.probe_video(tmp_path / name)["start"] == 0


def test_transcribe(tmp_path):
    recognise, pieces = listener([((1, None), "two "), ((None, 1), " one"), ((1.5, 2), ""), ((90, 91), "x")])
    cues = overlay.transcribe(make_video(tmp_path / "a.mp4", 40, spans=[(0, 4)]), recognise)
    assert [text for *_, text in cues] == ["one", "two"] and len(pieces) == 1
    assert cues[0][:2] == [0, 1] and cues[1] == [1, pytest.approx(4, abs=0.1), "two"]


def test_transcribe_without_sound_or_without_a_file(tmp_path):
    recognise, pieces = listener([])
    assert overlay.transcribe(make_video(tmp_path / "silent.mp4", 5), recognise) == [] and not pieces
    (tmp_path / "page.mp4").write_text("<html>")
    for name in ("page.mp4", "missing.mp4"):
        with pytest.raises(media.VideoError, match=f"{name}: "):
            overlay.transcribe(tmp_path / name, recognise)
    whole = make_video(tmp_path / "whole.mkv", 100, spans=[(0, 10)]).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[:len(whole) * 7 // 10])
    overlay.transcribe(tmp_path / "cut.mkv", recognise)
    assert 1 < len(pieces[0]) / 16000 < 9.9                                     # what is there is heard


@pytest.fixture(scope="session")
def whisper(tmp_path_factory):
    """A folder with a Whisper of 0.1 M random weights, its feature extractor, and a tokenizer of bytes."""
    t = pytest.importorskip("transformers")
    from tokenizers import pre_tokenizers
    folder = tmp_path_factory.mktemp("whisper")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = t.WhisperTokenizerFast(vocab={c: i for i, c in enumerate(letters)}, merges=[])
    special = [f"<|{name}|>" for name in "startoftranscript en translate transcribe startoflm startofprev "
                                         "nospeech notimestamps".split()]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([f"<|{n * 0.02:.2f}|>" for n in range(1501)])
    end, begin, *_, none = tokenizer.convert_tokens_to_ids(["<|endoftext|>", *special])
    ids = dict(pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=begin)
    importlib.import_module("torch").manual_seed(0)
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder")
             for name, n in dict(layers=1, attention_heads=2, ffn_dim=32).items()}
    model = t.WhisperForConditionalGeneration(t.WhisperConfig(
        vocab_size=len(tokenizer), d_model=32, max_target_positions=64, suppress_tokens=None,
        begin_suppress_tokens=None, **sizes, **ids))
    model.generation_config = t.GenerationConfig(
        no_timestamps_token_id=none, is_multilingual=False, max_length=64, max_initial_timestamp_index=50,
        return_timestamps=True, **ids)
    for part in (model, tokenizer, t.WhisperFeatureExtractor()):
        part.save_pretrained(folder)
    return folder


def test_transcribe_by_the_real_pipeline(tmp_path, whisper):
    recognise = overlay.speech_pipeline(str(whisper))
    cues = overlay.transcribe(make_video(tmp_path / "a.mp4", 5, spans=[(0, 3), (40, 43)]), recognise)
    assert cues and cues == sorted(cues)
    assert all(text and 0 <= start < end <= 43.2 for start, end, text in cues)
    assert max(end for _, end, _ in cues) > 30                                  # beyond Whisper's window


def test_speech_pipeline_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="ASR=.*nothing.*no Whisper model"):
        overlay.speech_pipeline(str(tmp_path / "nothing"))
    with pytest.raises(SystemExit, match="no Whisper model"):
        overlay.speech_pipeline(str(ROOT / "tiny" / "base"))
    monkeypatch.setattr("transformers.pipeline", lambda *_, **__: SimpleNamespace(type="ctc", model=0))
    with pytest.raises(SystemExit, match="no Whisper model.*tells no times"):
        overlay.speech_pipeline("other")


# ---- stage 1 with all of it --------------------------------------------------------------------------------

def make(tmp_path, *arguments):
    stage.main([f"--RUN={tmp_path / 'run'}", "--SOURCE=videos", f"--DATA={tmp_path / 'data'}", *arguments])
    rows = (tmp_path / "run" / "streams" / "streams.jsonl").read_text().splitlines()
    return {row["stream"]: row["clips"] for row in map(json.loads, rows)}


def test_sidecars_reach_the_clips_and_the_frames(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    make_video(tmp_path / "data" / "a.mp4", frames=240)
    make_video(tmp_path / "data" / "b.mp4", frames=40)
    (tmp_path / "data" / "a.srt").write_text("00:00:02,000 --> 00:00:03,000\nShure: Hi\n")
    (tmp_path / "data" / "a.faces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        ROW, ROW | {"time": 10.3}, ROW | {"time": 22.0, "face": 9, "name": "Ann"})))
    clips = make(tmp_path)
    first, second, third = clips["a"]
    assert first["speech"] == [[2.0, 3.0, "<face_3>: Hi"]]
    assert [box[0] for box in first["faces"]] == [2.5, 10.3]            # held half a second either side
    assert [box[:2] for box in second["faces"]] == [[10.3, 3]] and [box[1] for box in third["faces"]] == [9]
    assert "faces" not in clips["b"][0] and clips["b"][0]["speech"] == []
    frames, at = overlay.clip_frames(first, 20)
    plain = media.read_frames(first["file"], [first["offset"] + t for t in at])
    assert [i for i, t in enumerate(at) if (frames[i] != plain[i]).any()] == [
        i for i, t in enumerate(at) if 2 <= t <= 3 or abs(t - 2.5) <= 0.5 or abs(t - 10.3) <= 0.5]
    assert re.search(r"^deploy +2 +4 +0.01 +1 +2 ", capsys.readouterr().out, re.M)       # 1 cue, 2 faces


def test_stage_1_listens_and_looks_where_it_is_told_to_and_only_once(tmp_path, whisper, insightface):
    script, seen = insightface
    (tmp_path / "data").mkdir()
    make_video(tmp_path / "data" / "a.mp4", frames=40, spans=[(0, 4)])
    make_video(tmp_path / "data" / "b.mp4", frames=40, spans=[(0, 4)])
    (tmp_path / "data" / "b.srt").write_text("00:00:02,000 --> 00:00:03,000\nwritten\n")
    (tmp_path / "data" / "b.faces.jsonl").write_text(json.dumps(ROW) + "\n")
    script += [[(turned(0), 0.9)]] * 4
    clips = make(tmp_path, f"--ASR={whisper}", "--FACES=1")
    assert [text for *_, text in clips["b"][0]["speech"]] == ["written"] and len(clips["b"][0]["faces"]) == 1
    assert clips["a"][0]["speech"] and all(0 <= a < b <= 4.1 for a, b, _ in clips["a"][0]["speech"])
    assert [box[:2] for box in clips["a"][0]["faces"]] == [[0.5, 1], [1.5, 1], [2.5, 1], [3.5, 1]]
    assert len(seen) == 4
    assert make(tmp_path, f"--ASR={whisper}", "--FACES=1") == clips and len(seen) == 4      # kept


def test_sound_that_cannot_be_read_costs_the_video_nothing(tmp_path, whisper, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    make_video(tmp_path / "data" / "a.mp4", frames=40)

    def broken(file, recognise):
        raise media.VideoError(file, "has sound that can't be read")
    monkeypatch.setattr(overlay, "transcribe", broken)
    assert len(make(tmp_path, f"--ASR={whisper}")["a"]) == 1
    assert "a.mp4: has sound that can't be read" in capsys.readouterr().out
