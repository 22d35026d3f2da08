"""Stage 1 and its video decoding, on videos made here and on those of ../shared/videos."""
import doctest
import importlib
import json
import os
import pathlib
import sys
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
av = pytest.importorskip("av", reason="PyAV makes the videos of these tests")
np = pytest.importorskip("numpy")
pytest.importorskip("decord")

from support import overlay, runs, sources                                  # noqa: E402
from support import video as media                                          # noqa: E402
from tiny import world                                                      # noqa: E402

stage = importlib.import_module("01_make_streams")
SHARED = ROOT.parent / "shared"
real_videos = pytest.mark.skipif(not (SHARED / "videos").is_dir(), reason="no ../shared/videos, real videos")


# ---- videos whose every frame shows its number, as eight upright bars: its bits ----------------------------

def make_video(path, frames=60, fps=10, times=None, key_every=25, codec="libx264"):
    """frames numbered 0, 1, ...; times: when each is shown, in s, if not at a constant rate."""
    with av.open(str(path), "w") as box:
        stream = box.add_stream(codec, rate=fps, options={"crf": "14", "g": str(key_every), "threads": "1"})
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
    assert media.read_frames(str(video), [1.0], size=(32, 64)).shape == (1, 32, 64, 3)
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


@pytest.mark.parametrize("codec, name", [("libx265", "open.mp4"), ("libx265", "open.mkv"), ("libx264", "a.mov"),
                                         ("libvpx", "a.webm"), ("libx264", "a.flv"), ("mpeg4", "a.m4v")])
def test_every_frame_of_every_codec_is_the_right_one(tmp_path, codec, name):
    """HEVC's groups are open: after a seek to a key frame decord, left alone, is wrong by up to 8 frames."""
    video, rng = make_video(tmp_path / name, frames=120, codec=codec), np.random.default_rng(0)
    assert [numbers(media.read_frames(video, [i / 10]))[0] for i in range(120)] == list(range(120))
    for wanted in rng.integers(0, 120, (20, 4)):
        media._open_videos.clear()                                             # as by a fresh reader
        assert numbers(media.read_frames(video, wanted / 10)) == wanted.tolist()


def test_av1_is_named(tmp_path):
    with pytest.raises(media.VideoError, match="a.mp4: not decodable, or no video, or AV1"):
        media.probe_video(make_video(tmp_path / "a.mp4", frames=5, codec="libsvtav1"))


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


@pytest.mark.parametrize("name", ["old.avi", "broadcast.ts"])
def test_containers_that_decord_seeks_wrongly_give_right_frames_or_an_error(tmp_path, name):
    video, times = make_video(tmp_path / name), [4.0, 0.5, 2.2]
    try:
        assert numbers(media.read_frames(video, times)) == [40, 5, 22]
    except media.VideoError as error:
        assert name in str(error)


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
    """And with a Path, as 01 hands it over: after a failure the file is opened anew."""
    import decord

    class Reader(decord.VideoReader):
        def get_batch(self, indices):
            raise decord.DECORDError("a hole")

        def __getitem__(self, i):
            if i == 25:
                raise decord.DECORDError("a hole")
            return super().__getitem__(i)
    video = make_video(tmp_path / "hole.mp4")
    monkeypatch.setattr(decord, "VideoReader", Reader)
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
            with pytest.raises(media.VideoError, match=f"{name}.mp4: "):
                read(tmp_path / f"{name}.mp4")


def test_a_hang_ends_within_the_limit(tmp_path, monkeypatch):
    import decord
    video = make_video(tmp_path / "hang.mp4", frames=5)
    quickly(monkeypatch, 0.3)
    monkeypatch.setattr(decord, "VideoReader", lambda *_, **__: threading.Event().wait(20))
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
                assert (frame == min(shown, key=lambda s: abs(s[0] - t))[1]).all()


# ---- subtitles ---------------------------------------------------------------------------------------------

def test_srt(tmp_path):
    path = tmp_path / "a.srt"
    path.write_bytes("\ufeff1\r\n00:00:01,500 --> 00:00:04,000 X1:10\r\n"
                     "<font color=\"white\" size=\".72c\">two\nlines</font>\r\n\r\n"
                     "2\r\nnot a time\r\nlost\r\n\r\n"
                     "3\r\n00:00:03,000 --> 00:00:05,000\r\n{\\an8}<i>over</i>lapping\r\n\r\n"
                     "4\r\n01:00:00.250 --> 01:00:01\r\n<face_3>: 你好\r\n<face_3>: hello 42\r\n\r\n"
                     "5\r\n00:00:09,000 --> 00:00:08,000\r\nbackwards\r\n\r\n"
                     "6\r\n00:00:10,000 --> 00:00:11,000\r\n\r\n".encode())
    cues = overlay.read_srt(path)
    assert cues == [
        [1.5, 4.0, "two lines"], [3.0, 5.0, "overlapping"], [3600.25, 3601.0, "<face_3>: hello 42"]]
    assert overlay.read_srt(tmp_path / "none.srt") == []
    path.write_text("00:00:01,000 --> 00:00:02,000\n只有中文\n一二三\n", encoding="utf-8")
    assert overlay.read_srt(path) == [[1.0, 2.0, "只有中文 一二三"]]          # all there is


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data, a real transcript, is not here")
def test_real_transcript():
    cues = overlay.read_srt(SHARED / "data" / "A1_JAKE_DAY1_11000000.srt")
    assert cues[0] == [587.1, 590.766, "Jake: Okay, then we need a stopwatch."]
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
        "-day one": "online", "one.mp4": "online", "one.mkv": "online", "train/b.MKV": "train"}
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
    assert "no train stream" not in said


def test_videos_again_looks_only_at_what_is_new(tmp_path, folder, monkeypatch):
    before, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={folder}")
    make_video(folder / "new.mp4", frames=30)
    (folder / "new.srt").write_text("00:00:00,000 --> 00:00:01,000\nhi\n")
    (folder / "one.srt").write_text("00:00:00,000 --> 00:00:01,000\nlate\n")
    looked, check = [], sources.check_video
    monkeypatch.setattr(sources, "check_video", lambda file, *more: looked.append(file.name) or check(file, *more))
    after, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={folder}")
    assert looked == ["new.mp4"] and set(after) - set(before) == {"new"}
    assert after["new"]["clips"][0]["speech"] == [[0.0, 1.0, "hi"]]
    assert after["one.mkv"]["clips"][0]["speech"] == [[0.0, 1.0, "late"]]


def test_a_clip_that_does_not_decode_is_left_out_by_name(tmp_path, monkeypatch, capsys):
    video, read = make_video(tmp_path / "hole.mp4", frames=230), media.read_frames

    def hole(file, times, size=None):
        if 10 <= times[0] < 20:
            raise media.VideoError(file, "is damaged")
        return read(file, times, size)
    monkeypatch.setattr(sources, "read_frames", hole)
    streams, _ = run(tmp_path, "--SOURCE=videos", f"--DATA={video}")
    clips = streams["hole"]["clips"]
    assert [(c["clip"], c["start"], c["offset"]) for c in clips] == [(0, 0.0, 0.0), (1, 20.0, 20.0)]
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
                           ({"video": "-day one.mp4"}, "task 1: needs video, question and answer"),
                           ("text", "task 1: needs video, question and answer"),
                           (good | {"enviroment": "cats"}, "may have options, time"),
                           *((good | change, "task 1: options is a list, time a number, all else text")
                             for change in ({"time": "00:10"}, {"time": float("nan")}, {"environment": 3},
                                            {"options": "A. x"}, {"options": [1]}, {"answer": None}))):
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
            nearest = [np.abs(drawn.astype(int) - f).mean((1, 2, 3)).min() for f in seen]
            assert max(nearest) < 8                         # the pixels of this very clip, but for the codec
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
