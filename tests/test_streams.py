"""Stage 1 and its video decoding, on videos made here and on those of ../shared/videos."""
import doctest
import importlib
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from fractions import Fraction
from types import SimpleNamespace

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
av = pytest.importorskip("av", reason="PyAV makes the videos of these tests")
np = pytest.importorskip("numpy")
pytest.importorskip("pysubs2")

from support import overlay, runs, sources                                  # noqa: E402
from support import video as media                                          # noqa: E402
from tiny import world                                                      # noqa: E402

stage = importlib.import_module("01_make_streams")
SHARED = ROOT.parent / "shared"
CASES = ROOT / "tests" / "cases"
real_videos = pytest.mark.skipif(not (SHARED / "videos").is_dir(), reason="no ../shared/videos, real videos")


# ---- videos whose every frame shows its number, as eight upright bars: its bits ----------------------------

def make_video(path, frames=60, fps=10, times=None, key_every=25, codec="libx264", **options):
    """frames numbered 0, 1, ...; times: when each is shown, in s, if not at a constant rate. options: of the codec."""
    with av.open(str(path), "w") as box:
        options = {"crf": "14", "g": str(key_every), "threads": "1"} | options
        stream = box.add_stream(codec, rate=fps, options=options)
        stream.width = stream.height = 96
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        for i in range(frames):
            image = np.zeros((96, 96, 3), np.uint8)
            for bit in range(8):
                image[:, bit * 12:bit * 12 + 12] = 255 * (i >> bit & 1)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(1000 * (times[i] if times else i / fps)), Fraction(1, 1000)
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
    return path


def numbers(frames):
    return [sum(int(f[48, bit * 12 + 6].mean() > 128) << bit for bit in range(8)) for f in frames]


def cut_without_encoding(source, target, at):
    """As `ffmpeg -ss AT -i SOURCE -c copy TARGET`: those from a key frame to AT are there, but hidden."""
    with av.open(str(source)) as i, av.open(str(target), "w", options={"avoid_negative_ts": "disabled"}) as o:
        stream = i.streams.video[0]
        copy, shift = o.add_stream_from_template(stream), int(at / stream.time_base)
        i.seek(shift, stream=stream)
        for packet in i.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                o.mux(packet)
    return target


def make_sound(path):
    with av.open(str(path), "w") as box:
        stream = box.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.rate = 16000
        box.mux(stream.encode(sound))
        box.mux(stream.encode())
    return path


def quickly(monkeypatch, seconds=10):
    monkeypatch.setattr(media, "DECODE_SECONDS", seconds)


# ---- decoding ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["plain.mp4", "-dash first.mp4", "two words é.mkv"])
def test_frames_are_those_of_the_wanted_times(tmp_path, name):
    video = make_video(tmp_path / name)
    frames = media.read_frames(video, [0.0, 5.9, 2.52, 2.48, 2.5])         # any order, twice the same
    assert frames.dtype == np.uint8 and frames.shape == (5, 96, 96, 3)
    assert numbers(frames) == [0, 59, 25, 25, 25]
    seen = media.probe_video(video)
    assert (seen["frames"], seen["width"], seen["height"], seen["start"]) == (60, 96, 96, 0.0)
    assert seen["duration"] == pytest.approx(6, abs=0.05)
    with pytest.raises(media.VideoError, match="100.0"):                    # never silently the last frame
        media.read_frames(video, [100.0])


def test_a_changed_file_is_opened_anew(tmp_path):
    video = make_video(tmp_path / "a.mp4", frames=20)
    assert numbers(media.read_frames(video, [1.9])) == [19]
    make_video(video, frames=40)
    os.utime(video, ns=(1, 1))
    assert numbers(media.read_frames(video, [3.9])) == [39]


def test_variable_frame_rate(tmp_path):
    times = list(np.cumsum([0.04 if i % 20 < 15 else 1.0 for i in range(60)]).round(3) - 0.04)
    video = make_video(tmp_path / "vfr.mkv", times=times)
    wanted = np.arange(0.013, times[-1], 0.31)
    nearest = [int(np.abs(np.array(times) - t).argmin()) for t in wanted]
    assert numbers(media.read_frames(video, wanted)) == nearest
    by_rate = [min(59, round(t * 60 / times[-1])) for t in wanted]
    assert max(abs(a - b) for a, b in zip(by_rate, nearest)) > 3    # index by rate would be wrong here


@pytest.mark.parametrize("at", [3.3, 4.95])
def test_cut_without_encoding(tmp_path, monkeypatch, at):
    quickly(monkeypatch)
    cut = cut_without_encoding(make_video(tmp_path / "whole.mp4"), tmp_path / "cut.mp4", at)
    with av.open(str(cut)) as box:              # PyAV decodes one after the other: the plain reference
        shown = [(f.time, numbers([f.to_ndarray(format="rgb24")])[0]) for f in box.decode(video=0)]
    assert media.probe_video(cut)["frames"] == len(shown) < 60
    frames = media.read_frames(cut, [t for t, _ in reversed(shown)])
    assert numbers(frames) == [n for _, n in reversed(shown)]


OPEN = {"x264-params": "open-gop=1:keyint=25:scenecut=0"}


@pytest.mark.parametrize("codec, name, options", [
    ("libx265", "open.mp4", {}), ("libx265", "open.mkv", {}), ("libx264", "open.mkv", OPEN), ("libx264", "a.mov", {}),
    ("libvpx", "a.webm", {}), ("libx264", "a.flv", {}), ("mpeg4", "a.m4v", {}), ("libsvtav1", "av1.mp4", {}),
    ("libx264", "broadcast.ts", {}), ("libx265", "hevc.ts", {}), ("libx264", "camera.m2ts", OPEN),
    ("libx264", "old.avi", {}), ("mpeg4", "b.avi", {"bf": "2"}), ("wmv2", "a.wmv", {})])
def test_every_frame_of_every_codec_is_the_right_one(tmp_path, codec, name, options):
    """Groups of HEVC are open, seeks in MPEG-TS end too late, AVI has no time stamps: none of that shows."""
    video = make_video(tmp_path / name, frames=120, codec=codec, **options)
    rng = np.random.default_rng(0)
    count = 119 if name == "b.avi" else 120         # FFmpeg makes up one time for the last two frames of that
    assert [numbers(media.read_frames(video, [i / 10]))[0] for i in range(count)] == list(range(count))
    for wanted in rng.integers(0, count, (12, 4)):
        media._open_videos.clear()                                             # as by a fresh reader
        assert numbers(media.read_frames(video, wanted / 10)) == wanted.tolist()
    media.check_seeks(video, [1, 5, 9])


@pytest.mark.parametrize("name", ["h264_intra.mp4", "m2ts.m2ts", "wmv2.wmv", "mpeg4_bf.mp4"])
def test_frames_by_seek_are_those_of_decoding_from_the_beginning(name):
    """The kinds of tests/cases/videos, whose frame i stands from i / 10 s on and tells its number by brightness."""
    video = CASES / "videos" / name
    with av.open(str(video)) as box:
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in box.decode(video=0)])
    height, width = shown.shape[1:3]
    tens = shown[:, height // 4:3 * height // 4, width // 8:3 * width // 8].mean((1, 2, 3)) / 20
    ones = (shown[:, height // 4:3 * height // 4, 5 * width // 8:7 * width // 8].mean((1, 2, 3)) - 40) / 15
    assert np.abs(10 * tens.round() + ones.round() - np.arange(120)).max() <= 1
    media._open_videos.clear()
    for i in np.random.default_rng(0).permutation(120):
        assert (media.read_frames(video, [i / 10])[0] == shown[i]).all()


def test_a_format_whose_seeks_deceive_is_refused(tmp_path, capsys):
    """Open groups in AVI: without time stamps nothing tells how many frames a seek loses."""
    video = make_video(tmp_path / "open.avi", frames=120, **OPEN)
    with pytest.raises(media.VideoError, match="open.avi: gives another frame at .* s after a seek"):
        media.check_seeks(video, [2, 5, 9])
    make_video(tmp_path / "good.avi", frames=120)
    streams, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={tmp_path}")
    assert set(streams) == {"good"} and "open.avi: gives another frame" in capsys.readouterr().out


def test_files_joined_without_encoding_are_refused(tmp_path):
    part = make_video(tmp_path / "part.ts").read_bytes()
    (tmp_path / "joined.ts").write_bytes(part + part)
    with pytest.raises(media.VideoError, match="joined.ts: has time stamps that begin anew"):
        media.probe_video(tmp_path / "joined.ts")


def test_a_broadcast_that_begins_within_a_group(tmp_path):
    whole = make_video(tmp_path / "whole.ts", frames=120).read_bytes()
    (tmp_path / "late.ts").write_bytes(whole[188 * 40:])
    seen = media.probe_video(tmp_path / "late.ts")
    first, = numbers(media.read_frames(tmp_path / "late.ts", [seen["start"]]))
    frames = media.read_frames(tmp_path / "late.ts", seen["start"] + np.arange(seen["frames"]) / 10)
    assert first > 0 and numbers(frames) == list(range(first, 120))


@pytest.mark.parametrize("name, options", [("a.ts", {}), ("a.mov", {}), ("open.mkv", OPEN)])
def test_frames_after_damage_are_lost_and_not_wrong(tmp_path, name, options):
    data = bytearray(make_video(tmp_path / name, frames=120, **options).read_bytes())
    at = int(0.6 * len(data))
    data[at:at + 200] = np.random.default_rng(1).bytes(200)
    (tmp_path / name).write_bytes(data)
    wrong = lost = 0
    for i in range(120):
        try:
            wrong += abs(numbers(media.read_frames(tmp_path / name, [i / 10]))[0] - i) > 1
        except media.VideoError:
            lost += 1
    assert not wrong and 0 < lost < 60


def test_a_phone_that_was_held_upright(tmp_path):
    video = make_video(tmp_path / "a.mov")
    upright = media.read_frames(video, [2.1])[0]
    data = bytearray(video.read_bytes())
    at = data.find(b"tkhd") + 44                            # the matrix: a quarter turn
    data[at:at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    video.write_bytes(data)
    os.utime(video, ns=(1, 1))
    assert (media.read_frames(video, [2.1])[0] == np.rot90(upright, 3)).all()


def test_odd_sizes_and_a_tenth_of_a_second(tmp_path):
    with av.open(str(tmp_path / "odd.mkv"), "w") as box:
        stream = box.add_stream("libx264", rate=10, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = 99, 51, "yuv444p"
        frame = av.VideoFrame.from_ndarray(np.full((51, 99, 3), 200, np.uint8), format="rgb24")
        frame.pts, frame.time_base = 0, Fraction(1, 10)
        box.mux(stream.encode(frame))
        box.mux(stream.encode())
    frames = media.read_frames(tmp_path / "odd.mkv", [0.0, 0.05])
    assert frames.shape == (2, 51, 99, 3) and abs(frames.astype(int) - 200).max() < 12


def test_truncated_file_gives_its_good_frames(tmp_path, monkeypatch):
    quickly(monkeypatch)
    whole = make_video(tmp_path / "whole.mkv", frames=200).read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[:len(whole) * 6 // 10])
    last = media.probe_video(cut)["frames"] - 3
    assert 60 < last < 180
    assert numbers(media.read_frames(cut, [1.0, last / 10 - 1])) == [10, last - 10]
    with pytest.raises(media.VideoError, match="cut.mkv"):
        media.read_frames(cut, [19.0, 19.5])


def test_one_bad_frame_costs_no_other(tmp_path, monkeypatch):
    video, read = make_video(tmp_path / "hole.mp4"), media.frame_at
    monkeypatch.setattr(media, "frame_at", lambda opened, i, *more: None if i == 25 else read(opened, i, *more))
    with pytest.warns(UserWarning, match="hole.mp4 is damaged: 1 of 3 frames"):
        assert numbers(media.read_frames(video, [1.0, 2.5, 4.0])) == [10, 10, 40]
    with pytest.raises(media.VideoError, match="1 of 1 frames"):
        media.read_frames(video, [2.5])


def test_no_video_at_all(tmp_path, monkeypatch):
    quickly(monkeypatch)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><html>404 not found</html>" * 9)
    (tmp_path / "folder.mp4").mkdir()
    make_sound(tmp_path / "sound.mp4")
    head = make_video(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "no_moov.mp4").write_bytes(head[:len(head) // 2])            # its index stood at the end
    for name in ("empty", "page", "folder", "sound", "no_moov", "missing"):
        for read in (media.probe_video, lambda file: media.read_frames(file, [0])):
            with pytest.raises(media.LostVideo, match=f"{name}.mp4: "):
                read(tmp_path / f"{name}.mp4")


def test_a_hang_ends_within_the_limit(tmp_path, monkeypatch):
    video = make_video(tmp_path / "hang.mp4", frames=5)
    quickly(monkeypatch, 0.3)
    monkeypatch.setattr(av, "open", lambda *_, **__: threading.Event().wait(20))
    began = time.monotonic()
    with pytest.raises(media.VideoError, match="hang.mp4.*DECODE_SECONDS"):
        media.read_frames(video, [0])
    assert time.monotonic() - began < 3


@real_videos
def test_real_videos(monkeypatch):
    quickly(monkeypatch, 20)
    bad = {"audio_only.mp4", "html_error_page.mp4", "zero_byte.mp4"}
    for video in sorted((SHARED / "videos").glob("*.m*")):
        if video.name in bad:
            with pytest.raises(media.VideoError, match=video.name):
                media.probe_video(video)
            continue
        seen = media.probe_video(video)
        times = seen["start"] + np.linspace(0.013, max(0.013, seen["duration"] - 0.3), 7)
        frames = media.read_frames(video, times)
        assert frames.shape == (7, seen["height"], seen["width"], 3) and frames.std() > 5
        if video.name in ("vfr.mp4", "hang_cut_copy_ss_before_i.mp4"):
            with av.open(str(video)) as box:
                shown = [(f.time, f.to_ndarray(format="rgb24")) for f in box.decode(video=0)]
            for t, frame in zip(times, frames):
                assert (frame == min(shown, key=lambda s: round(abs(s[0] - t), 4))[1]).all()


# ---- subtitles ---------------------------------------------------------------------------------------------

def cues_of(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return overlay.read_subtitles(path)


def test_srt(tmp_path):
    text = ("\ufeff1\r\n00:00:01,500 --> 00:00:04,000 X1:10\r\n"
            "<font color=\"white\" size=\".72c\">two\nlines</font>\r\n\r\n"
            "2\r\nnot a time\r\nlost\r\n\r\n"
            "3\r\n00:00:03,000 --> 00:00:05,000\r\n{\\an8}<i>over</i>lapping\r\n\r\n"
            "4\r\n01:00:00.250 --> 01:00:01\r\n<face_3>: 你好\r\n<face_3>: hello 42\r\n\r\n"
            "5\r\n00:00:09,000 --> 00:00:08,000\r\nbackwards\r\n\r\n"
            "6\r\n00:00:10,000 --> 00:00:11,000\r\n\r\n")
    cues, wrong = cues_of(tmp_path / "a.srt", text)
    assert cues == [
        [1.5, 4.0, "two lines"], [3.0, 5.0, "overlapping"], [3600.25, 3601.0, "<face_3>: hello 42"]]
    assert wrong == "2 of 6 cues have no times that can be read"
    cues, wrong = cues_of(tmp_path / "a.srt", "00:00:01,000 --> 00:00:02,000\n只有中文\n一二三\n")
    assert cues == [[1.0, 2.0, "只有中文 一二三"]] and not wrong          # all there is


PLAIN = [[1, 3, "Hello there"], [4, 6.5, "Grüße, señor"], [7, 9, "1984"]]
RIGHT = {"blank_in_text": [[1, 3, "first line second line after a blank"], [4, 5, "next"]],
         "negative": [[0, 3, "starts before 0"], [4, 5, "next"]],
         "entities": [[1, 3, ">> Tom & Ann say <hi>"]], "karaoke": [[1, 3, "so what"]]}


@pytest.mark.parametrize("path", sorted((CASES / "srt").iterdir()), ids=lambda path: path.stem)
def test_subtitles_as_people_have_them(path):
    cues, wrong = overlay.read_subtitles(path)
    assert cues == RIGHT.get(path.stem, PLAIN)
    assert wrong == ("is not UTF-8, but by all appearances cp1252" if path.stem == "latin1" else "")


ASS = """[Script Info]
ScriptType: v4.00+
[V4+ Styles]
[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Dialogue: 0,0:00:01.00,0:00:03.00,Default,,0,0,0,,{\\i1}Hello{\\i0}\\Nyou
Comment: 0,0:00:01.00,0:00:03.00,Default,,0,0,0,,no
"""


@pytest.mark.parametrize("text", [
    "0:0:1 -> 0:0:3\nHello\nyou", "1\n00 : 00 : 01 , 0 -- > 00 : 00 : 03 , 000\nHello you\n",
    "1\n00:00:01:000 --> 00:00:03:000\nHello\nyou\n", "1\r00:00:01,0 --> 00:00:03,0\rHello\ryou\r\r",
    "1\n\n00:00:01,0 --> 00:00:03,0\n\nHello\n\nyou\n\n",
    "WEBVTT - a\n\nNOTE b\n\nc\n00:01.000 --> 00:03.000 line:0\n<v Ann>Hello</v>\nyou\n\nNOTE d\n\ne", ASS])
def test_subtitles_of_other_hands(tmp_path, text):
    assert cues_of(tmp_path / "a.srt", text) == ([[1, 3, "Hello you"]], "")


def test_numbers_that_are_spoken_stay(tmp_path):
    text = "1\n00:00:01,0 --> 00:00:03,0\nYear\n1984\n\n2\n00:00:04,0 --> 00:00:05,0\nEnd\n42"
    assert [words for *_, words in cues_of(tmp_path / "a.srt", text)[0]] == ["Year 1984", "End 42"]
    text = "WEBVTT\n\n00:01.000 --> 00:03.000\nYear\n1984\n\n00:04.000 --> 00:05.000\nEnd\n42"
    assert [words for *_, words in cues_of(tmp_path / "a.vtt", text)[0]] == ["Year 1984", "End 42"]


@pytest.mark.parametrize("words, encoding, guessed", [
    ("Привет, как дела? Я иду домой.", "cp1251", "cp1251"), ("你好，我们现在回家吧。今天天气很好", "gb18030", "gb18030"),
    ("Grüße", "utf-16", ""), ("Grüße", "utf-16-le", "utf_16_le")])
def test_encodings(tmp_path, words, encoding, guessed):
    cues, wrong = cues_of(tmp_path / "a.srt", f"1\n00:00:01,0 --> 00:00:03,0\n{words}\n", encoding)
    assert cues == [[1, 3, words]] and wrong.endswith(guessed) and bool(wrong) == bool(guessed)


def test_what_is_no_subtitle_is_said(tmp_path):
    for text in ("", "just words\n", "{}"):
        assert cues_of(tmp_path / "a.srt", text) == ([], "holds no cue that can be read")
    cues, wrong = cues_of(tmp_path / "a.srt", "1\n00:00:xx --> 00:00:03\nbad\n\n2\n00:00:04,0 --> 00:00:05,0\nok\n\n"
                          "3\n100:00:00,0 --> 100:00:01,0\nlate\n")
    assert cues == [[4, 5, "ok"]] and wrong == "2 of 3 cues have no times that can be read"
    chinese = "1\n00:00:01,0 --> 00:00:03,0\n你好，我们现在回家吧。今天天气很好\n".encode()
    (tmp_path / "a.srt").write_bytes(chinese[:-8] + chinese[-7:])
    cues, wrong = overlay.read_subtitles(tmp_path / "a.srt")
    assert cues[0][2].startswith("你好，我们现在回家吧。今天") and "UTF-8 with" in wrong


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data, a real transcript, is not here")
def test_real_transcript():
    cues, wrong = overlay.read_subtitles(SHARED / "data" / "A1_JAKE_DAY1_11000000.srt")
    assert cues[0] == [587.1, 590.766, "Jake: Okay, then we need a stopwatch."] and not wrong
    assert len(cues) == 80 and all(end > begin and "-->" not in text for begin, end, text in cues)


# ---- stage 1 on plain videos -------------------------------------------------------------------------------

def run(tmp_path, *arguments):
    stage.main([f"--RUN={tmp_path / 'run'}", *arguments])
    out = tmp_path / "run" / "streams"
    streams, tasks = (runs.read_jsonl(out / name) for name in ("streams.jsonl", "tasks.jsonl"))
    return {s["stream"]: s for s in streams}, tasks


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Good videos of 23 and 11 s and of one frame, two that differ in the suffix alone, three broken ones."""
    quickly(monkeypatch)
    data = tmp_path / "my videos"
    (data / "train").mkdir(parents=True)
    make_video(data / "-day one.mp4", frames=230)
    make_video(data / "train" / "b.MKV.mkv", frames=110)
    make_video(data / "one.mp4", frames=1)
    make_video(data / "one.mkv", frames=31)
    (data / "empty.mp4").touch()
    (data / "._-day one.mp4").write_text("what macOS leaves behind")
    (data / "page.webm").write_text("<html>")
    make_sound(data / "sound.mov")
    (data / "-day one.srt").write_text("1\n00:00:09,000 --> 00:00:12,000\nhello\n")
    return data


def test_videos(tmp_path, folder, capsys):
    streams, tasks = run(tmp_path, "--SOURCE=videos", f"--DATA={folder}")
    assert {name: s["split"] for name, s in streams.items()} == {
        "-day one": "deploy", "one.mp4": "deploy", "one.mkv": "deploy", "train/b.MKV": "train"}
    assert tasks == []
    clips = streams["-day one"]["clips"]
    assert [(c["clip"], c["start"], c["end"], c["offset"]) for c in clips] == [
        (0, 0.0, 10.0, 0.0), (1, 10.0, 20.0, 10.0), (2, 20.0, 23.0, 20.0)]      # a rest of 3 s is a clip ...
    assert [c["end"] for c in streams["train/b.MKV"]["clips"]] == [10.0]        # ... one of 1 s is not ...
    assert len(streams["one.mp4"]["clips"]) == 1                    # ... unless the whole file is no longer
    assert [len(c["speech"]) for c in clips] == [1, 1, 0] and clips[0]["speech"] == [[9.0, 12.0, "hello"]]
    assert all(pathlib.Path(c["file"]).is_absolute() for s in streams.values() for c in s["clips"])
    said = capsys.readouterr().out
    assert "skipped: 3" in said
    assert all(f"  {name}: " in said for name in ("empty.mp4", "page.webm", "sound.mov"))
    assert "no train stream" not in said and "--SPLIT=online, to examine" in said
    streams, _ = run(tmp_path / "examined", "--SOURCE=videos", f"--DATA={folder}", "--SPLIT=online")
    assert {name for name, s in streams.items() if s["split"] == "online"} == {"-day one", "one.mp4", "one.mkv"}


def test_videos_again_looks_only_at_what_is_new(tmp_path, folder, monkeypatch):
    before, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={folder}")
    make_video(folder / "new.mp4", frames=30)
    (folder / "new.srt").write_text("00:00:00,000 --> 00:00:01,000\nhi\n")
    looked, check = [], sources.check_video
    monkeypatch.setattr(sources, "check_video", lambda file, *more: looked.append(file.name) or check(file, *more))
    after, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={folder}")
    assert looked == ["new.mp4"] and set(after) - set(before) == {"new"}
    assert after["new"]["clips"][0]["speech"] == [[0.0, 1.0, "hi"]]
    assert {name: after[name] for name in before} == before


def test_a_clip_that_does_not_decode_is_left_out_by_name(tmp_path, monkeypatch, capsys):
    video, read = make_video(tmp_path / "hole.mp4", frames=230), media.read_frames

    def hole(file, times):
        if 10 <= times[0] < 20:
            raise media.VideoError(file, "is damaged")
        return read(file, times)
    monkeypatch.setattr(sources, "read_frames", hole)
    streams, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={video}")
    clips = streams["hole"]["clips"]
    assert [(c["clip"], c["start"], c["offset"]) for c in clips] == [(0, 0.0, 0.0), (1, 20.0, 20.0)]
    assert not any("reader" in clip for clip in clips)      # damage is PyAV's, whatever decord makes of the rest
    assert "hole.mp4: 00:00:10-00:00:20: is damaged" in capsys.readouterr().out


def test_tasks_of_videos(tmp_path, folder, capsys):
    good = {"video": "-day one.mp4", "question": "Who?", "options": ["Ann", "Bob"], "answer": "B"}
    rows = [good, {"video": str(folder / "train" / "b.MKV.mkv"), "question": "What?", "answer": "a cat", "time": 7,
                   "environment": "cats", "task": "cat"},
            {"video": "page.webm", "question": "Lost?", "answer": "yes"}]
    write = lambda: (folder / "tasks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write()
    _, tasks = run(tmp_path, "--SOURCE=videos", f"--DATA={folder}")
    assert tasks == [
        {"task": "-day one-1", "stream": "-day one", "environment": "questions", "time": 23.0,
         "question": "Who?", "options": ["A. Ann", "B. Bob"], "answer": "B"},
        {"task": "cat", "stream": "train/b.MKV", "environment": "cats", "time": 7.0,
         "question": "What?", "options": [], "answer": "a cat"}]
    assert "page: 1 tasks left out" in capsys.readouterr().out
    for wrong, message in ((good | {"answer": "C"}, "task 1: the answer 'C' is no letter"),
                           (good | {"task": "cat"}, "'cat' stands twice"),
                           ({"video": "-day one.mp4"}, "task 1: needs video and question, may have answer"),
                           ("text", "task 1: needs video and question, may have answer"),
                           (good | {"enviroment": "cats"}, "may have answer, environment"),
                           *((good | change, "task 1: options is a list, time a number, all else text")
                             for change in ({"time": "00:10"}, {"time": float("nan")}, {"environment": 3},
                                            {"options": "A. x"}, {"options": [1]}, {"answer": 3}))):
        rows[0] = wrong
        write()
        with pytest.raises(SystemExit, match=message):
            run(tmp_path, "--SOURCE=videos", f"--DATA={folder}")


@pytest.mark.parametrize("arguments, message", [
    (["--SOURCE=video"], "expected one of tiny, videos"), (["--SOURCE=videos"], "--DATA=FOLDER"),
    (["--SOURCE=videos", "--DATA=/no/such"], "no such file"),
    (["--SOURCE=videos", "--DATA=."], "no video file"),
    (["--SOURCE=videos", "--DATA=.", "--SPLIT=dev"], "expected one of train, deploy, test"),
    (["--CLIP_SECONDS=5"], "are 10 s long"), (["--CLIP_SECONDS=0"], "must be 1 or more"),
    (["--WORKERS=0"], "must be 1 or more")])
def test_errors_say_what_to_do(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path / "nothing")
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, *arguments)


def test_a_folder_of_broken_files_is_an_error_with_reasons(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(SystemExit, match="a.mp4: is empty"):
        run(tmp_path, "--SOURCE=videos", f"--DATA={tmp_path}")


def make_small(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return make_video(path, frames=30)


def test_links_are_followed_once_and_hidden_folders_are_not_looked_into(tmp_path, capsys):
    data = tmp_path / "data"
    for name in ("b/c.mp4", ".git/x.mp4", ".Trash-1000/y.mp4", "b/@eaDir/z.mp4", "b/.hidden.mp4"):
        make_small(data / name)
    make_small(tmp_path / "other disk" / "d.mp4")
    (data / "a link").symlink_to(data / "b")                    # comes first by name, yet b is b
    (data / "b" / "loop").symlink_to(data)
    (data / "far").symlink_to(tmp_path / "other disk")
    (data / "far too").symlink_to(tmp_path / "other disk")
    (data / "gone").symlink_to(tmp_path / "nothing")
    streams, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={data}")
    assert list(streams) == ["b/c", "far/d"]
    said = capsys.readouterr().out
    assert "skipped: 3" in said
    for name in (".git", ".Trash-1000", "b/@eaDir"):
        assert re.search(rf"{re.escape(name)}.*: is a hidden folder, which is not looked into", said)


def test_names_are_compared_as_people_see_them(tmp_path):
    """A decomposed name, as macOS writes them, a composed one in tasks.jsonl; a backslash of Windows."""
    data = tmp_path / "data"
    decomposed = unicodedata.normalize("NFD", "été/café.mp4")
    make_small(data / decomposed)
    make_small(data / "trip" / "day 1.mp4")
    tasks = [{"video": name, "question": "Who?", "answer": "Ann"}
             for name in ("été/café.mp4", decomposed, "été\\café", "trip\\day 1.mp4")]
    (data / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    streams, written = run(tmp_path, "--SOURCE=videos", f"--DATA={data}")
    assert set(streams) == {"été/café", "trip/day 1"} and len(written) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names that are not Unicode")
def test_a_name_that_is_not_utf8_is_named_and_costs_no_other(tmp_path, capsys):
    data = tmp_path / "data"
    make_small(data / "good.mp4")
    os.link(data / "good.mp4", os.fsencode(data) + b"/caf\xe9.mp4")
    os.mkdir(os.fsencode(data) + b"/\xe9t\xe9")
    streams, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={data}")
    assert set(streams) == {"good"}
    assert "caf\ufffd.mp4, \ufffdt\ufffd: has a name that is not UTF-8" in capsys.readouterr().out
    assert set(run(tmp_path / "one", "--SOURCE=videos", f"--DATA={data / 'good.mp4'}")[0]) == {"good"}
    with pytest.raises(SystemExit, match="not UTF-8: rename it"):
        run(tmp_path, "--SOURCE=videos", f"--DATA={os.fsdecode(os.fsencode(data) + bytes([47, 233, 116, 233]))}")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_tasks_in_any_encoding(tmp_path, encoding):
    make_small(tmp_path / "data" / "a.mp4")
    text = json.dumps({"video": "a.mp4", "question": "Wer grüßt? \ud83d", "answer": "Ann"}, ensure_ascii=False)
    text = text.replace("\ud83d", "\\ud83d")                   # half a pair, as JSON can spell it
    (tmp_path / "data" / "tasks.jsonl").write_bytes(text.encode(encoding))
    _, tasks = run(tmp_path, "--SOURCE=videos", f"--DATA={tmp_path / 'data'}")
    assert [task["question"] for task in tasks] == ["Wer grüßt? \ufffd"]


def test_subtitles_by_the_names_that_people_give_them(tmp_path, capsys):
    data = tmp_path / "data"
    names = {"a": "a.SRT", "b": "b.en.srt", "c": "c.mp4.srt", "d": "d.vtt", "e": "e.zh-CN.srt", "f": "f.srt",
             "g.en": "g.en.srt", "g": "g.part2.srt"}
    for video, subtitles in names.items():
        make_small(data / f"{video}.mp4")
        (data / subtitles).write_text(f"1\n00:00:00,000 --> 00:00:01,000\n{subtitles}\n")
    (data / "b.de.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\ndeutsch\n")
    (data / "f.en.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nnot the plain one\n")
    (data / "a.SRT").write_text("1\n00:00:00,000 --> 00:00:01,000\na.SRT\n\n2\n00:00:xx --> 1\nlost\n")
    streams, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={data}")
    heard = {name: [text for *_, text in stream["clips"][0]["speech"]] for name, stream in streams.items()}
    names["g"] = "g.en.srt"                                     # which is that of g.en too
    assert heard == {video: [subtitles] for video, subtitles in names.items()}
    said = capsys.readouterr().out
    assert "skipped: 1" in said and "a.SRT: 1 of 2 cues have no times that can be read" in said


def test_a_line_that_is_no_json_is_named(tmp_path, folder):
    (folder / "tasks.jsonl").write_text('{"video": "one.mkv", "question": "a", "answer": "b"}\n\n{"video": "o"\n')
    with pytest.raises(SystemExit, match="tasks.jsonl, line 3: "):
        run(tmp_path, "--SOURCE=videos", f"--DATA={folder}")


def test_a_try_that_made_no_stream_binds_nothing(tmp_path, folder, monkeypatch):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").touch()
    with pytest.raises(SystemExit, match="no stream could be made"):
        run(tmp_path, "--SOURCE=videos", f"--DATA={tmp_path / 'bad'}")
    looked, check = [], sources.check_video
    monkeypatch.setattr(sources, "check_video", lambda file, *more: looked.append(file.name) or check(file, *more))
    with pytest.raises(SystemExit, match="pip install insightface"):            # said before any file is checked
        run(tmp_path, "--SOURCE=videos", f"--DATA={folder}", "--FACES=1")
    assert not looked
    streams, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={folder}", "--CLIP_SECONDS=5")
    assert streams["-day one"]["clips"][1]["start"] == 5.0
    with pytest.raises(SystemExit, match="CLIP_SECONDS: 5 in the run, 10 now(?s:.)*delete that folder"):
        run(tmp_path, "--SOURCE=videos", f"--DATA={folder}")
    (tmp_path / "run" / "streams" / "streams.jsonl").unlink()
    (tmp_path / "run" / "streams" / "tasks.jsonl").unlink()
    streams, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={folder}")           # other clips: checked anew
    assert streams["-day one"]["clips"][1]["start"] == 10.0


def test_tasks_come_in_the_order_in_which_they_are_asked(tmp_path, folder):
    ask = lambda video, time, **more: {"video": video, "question": "Who?", "answer": "B", "time": time} | more
    rows = [ask("one.mkv", 3), ask("-day one", 20), ask("-day one", 5, options=["A. Ann", "A. Bob"]),
            ask("-day one", 5, options=["B. x", "A. y\nz"])]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    _, tasks = run(tmp_path, "--SOURCE=videos", f"--DATA={folder}")
    assert [(t["stream"], t["time"]) for t in tasks] == [
        ("-day one", 5), ("-day one", 5), ("-day one", 20), ("one.mkv", 3)]
    assert [t["options"] for t in tasks[:2]] == [["A. A. Ann", "B. A. Bob"], ["A. B. x", "B. A. y z"]]


def test_names_that_differ_in_the_suffix(tmp_path):
    (tmp_path / "v").mkdir()
    for name in ("a.mp4", "a.mkv", "a.mp4.mkv"):
        make_video(tmp_path / "v" / name, frames=30)
    streams, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={tmp_path / 'v'}")
    assert set(streams) == {"a.mp4", "a.mkv", "a.mp4.mkv"}
    assert all(s["clips"][0]["file"].endswith("/" + name) for name, s in streams.items())


def test_what_took_too_long_is_tried_again(tmp_path, monkeypatch):
    video, probe = make_video(tmp_path / "slow.mp4", frames=30), media.probe_video
    make_video(tmp_path / "good.mp4", frames=30)

    def busy(file):
        if "slow" in str(file):
            raise media.VideoError(file, "did not decode in DECODE_SECONDS = 60")
        return probe(file)
    monkeypatch.setattr(sources, "probe_video", busy)
    assert set(run(tmp_path, "--SOURCE=videos", f"--DATA={tmp_path}")[0]) == {"good"}
    monkeypatch.undo()
    assert set(run(tmp_path, "--SOURCE=videos", f"--DATA={tmp_path}")[0]) == {"good", video.stem}


@real_videos
def test_real_folder(tmp_path, monkeypatch, capsys):
    quickly(monkeypatch, 20)
    streams, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={SHARED / 'videos'}")
    assert {"-O6mJ0VBTc4", "vfr", "trunc50_faststart", "hang_cut_copy_ss_before_i"} <= streams.keys()
    said = capsys.readouterr().out
    for name in ("audio_only.mp4", "zero_byte.mp4", "html_error_page.mp4"):
        assert f"  {name}: " in said and name[:-4] not in streams


# ---- stage 1 on the toy world ------------------------------------------------------------------------------

TOY = ("--TRAIN_STREAMS=2", "--DEPLOY_STREAMS=2", "--TEST_STREAMS=1", "--CLIPS=4")


def test_tiny(tmp_path):
    streams, tasks = run(tmp_path, *TOY)
    out = tmp_path / "run" / "streams"
    assert list(streams) == ["train-000", "train-001", "deploy-000", "deploy-001", "test-000"]
    facts = {(r["stream"], r["clip"]): r["facts"] for r in runs.read_jsonl(out / "truth.jsonl")}
    captions = {(r["stream"], r["clip"]): r["memory"] for r in runs.read_jsonl(out / "captions.jsonl")}
    judge = world.Judge(runs.read_jsonl(out / "truth.jsonl"))
    assert len({json.dumps(f) for f in facts.values()}) == len(facts) == len(captions) == 5 * 4   # none twice
    for name, stream in streams.items():
        assert [c["clip"] for c in stream["clips"]] == [0, 1, 2, 3]
        for clip in stream["clips"]:
            t = clip["clip"]
            drawn = world.draw_frames(facts[name, t])
            seen = media.read_frames(out / clip["file"], media.frame_times(clip, 4))
            # The pixels of this very clip.
            assert all((drawn == frame).all((1, 2, 3)).any() for frame in seen)
            history = [captions[name, t - 1]] if t else []
            context = SimpleNamespace(stream=name, clip=t, history=history)
            assert judge.faithful(context, captions[name, t])
            assert judge.clean(history[-1] if history else "", captions[name, t])
    assert {t["stream"] for t in tasks} == {"deploy-000", "deploy-001", "test-000"}
    assert {t["environment"] for t in tasks} == set(world.CATEGORIES)


def test_tiny_resumes_and_repeats_itself(tmp_path):
    run(tmp_path, *TOY)
    out = tmp_path / "run" / "streams"
    texts = {p.name: p.read_text() for p in out.glob("*.jsonl")}
    (out / "videos" / "train-001.mp4").unlink()
    kept = {p.name: p.stat().st_mtime_ns for p in (out / "videos").iterdir()}
    (out / "videos" / "test-000.mp4.aside").write_text("left by an interruption")
    (out / "streams.jsonl").unlink()
    run(tmp_path, *TOY)
    assert {p.name: p.read_text() for p in out.glob("*.jsonl")} == texts
    assert {p: (out / "videos" / p).stat().st_mtime_ns for p in kept} == kept
    assert (out / "videos" / "train-001.mp4").exists()
    with pytest.raises(SystemExit, match="CLIPS"):
        run(tmp_path, *TOY[:-1], "--CLIPS=5")


def test_two_processes_make_the_same_streams_to_the_byte(tmp_path):
    made = []
    for name in ("one", "two"):
        command = [sys.executable, str(ROOT / "01_make_streams.py"), f"--RUN={tmp_path / name}",
                   "--TRAIN_STREAMS=8", "--DEPLOY_STREAMS=3", "--TEST_STREAMS=3"]
        subprocess.run(command, check=True, capture_output=True)
        folder = tmp_path / name / "streams"
        files = [file for file in folder.rglob("*") if file.is_file() and file.name != "lock"]
        made.append({str(file.relative_to(folder)): file.read_bytes() for file in files})
    assert made[0] == made[1] and sum(name.endswith(".mp4") for name in made[0]) == 14


def test_limit_and_seed(tmp_path):
    streams, _ = run(tmp_path, *TOY, "--LIMIT=1")
    assert list(streams) == ["train-000", "deploy-000", "test-000"]
    stage.main([f"--RUN={tmp_path / 'other'}", *TOY, "--LIMIT=1", "--SEED=1"])
    truths = [(tmp_path / run / "streams" / "truth.jsonl").read_text() for run in ("run", "other")]
    assert truths[0] != truths[1]


def test_examples_in_docstrings():
    for module in (stage, media, overlay, sources, world):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed, module.__name__
