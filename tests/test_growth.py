"""Stage 1 again and again: cameras' times, and streams and tasks that only become more."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from test_datasets import egolife, egotempo                                 # noqa: F401 (fixtures)
from test_streams import ROOT, SHARED, av, make_video, real_videos, run, runs, sources

from support import camera, growth

DAY = 1706659200                                 # 2024-01-31 00:00
AT = DAY + 17 * 3600 + 45 * 60 + 12              # 17:45:12


@pytest.fixture
def berlin(monkeypatch):
    """An hour before UTC in winter."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def data(tmp_path):
    (tmp_path / "life").mkdir()
    return tmp_path / "life"


def make(path, seconds=12, created=None, written=None):
    """A video of so many seconds; created: in its metadata; written: when, in s since 1970 of UTC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".ts" or created is None:
        make_video(path, frames=10 * seconds)
    else:
        plain = make_video(path.with_name(f"plain{path.suffix}"), frames=10 * seconds)
        with av.open(str(plain)) as source, av.open(str(path), "w") as target:
            target.metadata["creation_time"] = created
            copy = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = copy
                    target.mux(packet)
        plain.unlink()
    written = time.time() - 3600 if written is None else written
    os.utime(path, (written, written))
    return path


def films(tmp_path, data, *arguments):
    return run(tmp_path, "--SOURCE=camera", f"--DATA={data}", *arguments)


def folder_of(tmp_path, data, *arguments):
    return run(tmp_path, "--SOURCE=videos", f"--DATA={data}", *arguments)


def ask(data, *rows):
    (data / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def files(tmp_path, name="run"):
    """The bytes of what the later stages read."""
    out = tmp_path / name / "streams"
    return [(out / name).read_bytes() for name in ("streams.jsonl", "tasks.jsonl")]


# ---- when a video began ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [
    "DJI_20240131_174512_0001.MP4", "DJI_20240131174512_0001_D.MP4",        # drones and pocket cameras
    "VID_20240131_174512.mp4", "20240131_174512.mp4", "20240131_174512(0).mp4",         # Android, Samsung
    "PXL_20240131_164512345.mp4", "PXL_20240131_164512345.TS.mp4",          # Pixel: UTC
    "cam_01_20240131174512.mp4", "192.168.1.64_01_20240131174512345_TIMING_RECORD.mp4",     # Reolink, Hikvision
    "RecM02_20240131_174512_174530_0_A.mp4", "20240131_174512_tp00001.mp4",             # Reolink, Tapo
    "2024-01-31T17-45-12.mp4", "2024-01-31T16:45:12Z.mp4", "2024-01-31 17-45-12.mkv",   # recorders, OBS
    "2024_0131_174512_001.MP4", "NO20240131-174512-000123F.MP4", "REC_2024_01_31_17_45_12_F.MP4",   # dashcams
    "2024-01-31_17-45-12-front.mp4", "20240131_174512_NF.mp4",              # Tesla, BlackVue
    "Screenrecorder-2024-01-31-17-45-12-123.mp4", "Screen Recording 2024-01-31 at 5.45.12\u202fPM.mov",
    "WhatsApp Video 2024-01-31 at 17.45.12.mp4",
    "2024-01-31/17-45-12.mp4", "2024/01/31/17.45.12.mp4", "2024013117/45M12S_1706723112.mp4",
    "recordings/2024-01-31/16/front_door/45.12.mp4",                        # Frigate: UTC
    "backup 2024-02-01 10.00.00/VID_20240131_174512.mp4", "20261399_20240131_174512.mp4",
    "20261399_101010_20240131_174512.mp4"])
def test_times_in_names(berlin, name):
    assert camera.time_in_name(pathlib.Path(name)) == AT, name


def test_times_of_minutes():
    for name in ("2024/01/31/17/45.mp4", "record/20240131/17/45.mp4"):
        assert camera.time_in_name(pathlib.Path(name)) == AT - 12


@pytest.mark.parametrize("name", [
    "GX010042.MP4", "IMG_1234.MOV", "VID-20240131-WA0003.mp4", "20261399_101010.mp4", "20240131_994512.mp4",
    "20240131_0001.mp4", "20240131.mp4", "1706723112345.mp4", "VID_19040131_174512.mp4", "20240230_101010.mp4",
    "backup 2024-02-01 10.00.00/IMG_1234.MOV", "2024-01-31/IMG_1234.MOV", "12_3456_789012_345678.mp4"])
def test_names_that_tell_no_time(name):
    assert camera.time_in_name(pathlib.Path(name)) is None


def test_where_times_come_from_is_said(berlin, tmp_path, data, capsys):
    make(data / "VID_20240131_174512.mp4")
    make(data / "GX010042.MP4", created="2024-01-31T17:00:00.000000Z")
    make(data / "old.mp4", created="1904-01-01T00:00:00.000000Z", written=1706727612)      # 20:00:12 in Berlin
    streams, _ = films(tmp_path, data)
    assert list(streams) == ["life"] and streams["life"]["split"] == "deploy"
    clips = streams["life"]["clips"]
    starts = [(clip["start"] - DAY) / 3600 for clip in clips if not clip["offset"]]
    assert starts == pytest.approx([17 + 45.2 / 60, 18, 20], abs=1e-6)
    said = capsys.readouterr().out
    assert "times from the name of 1 video files (VID_20240131_174512.mp4: 2024-01-31 17:45:12)" in said
    assert "times from the metadata of 1 video files (GX010042.MP4: 2024-01-31 18:00:00)" in said
    assert "*** no time stands in the name or the metadata of 1 video files" in said
    assert "old.mp4: 2024-01-31 20:00" in said


def test_gopro_writes_local_time(berlin):
    video = SimpleNamespace(container=SimpleNamespace(metadata={"creation_time": "2024-01-31T17:45:12.000000Z"}),
                            stream=SimpleNamespace(metadata={"handler_name": "GoPro AVC"}))
    assert camera.time_in_file(sources.probe_video.__globals__["created_at"](video)) == AT
    video.stream.metadata = {}
    assert camera.time_in_file(sources.probe_video.__globals__["created_at"](video)) == AT + 3600


# ---- one stream --------------------------------------------------------------------------------------------

def test_a_camera_is_one_stream_with_gaps(tmp_path, data, capsys):
    make(data / "b" / "VID_20240131_174510.mp4", 25)
    make(data / "2024-02-01" / "08-00-00.mp4", 12)
    make(data / "DJI_20240131_174458_0001.mp4", 14)          # ends at 12, two seconds after the next begins
    make(data / "b" / "VID_20240131_174510_R.mp4", 25)             # another lens
    (data / "b" / "VID_20240131_174510.srt").write_text("00:00:21,000 --> 00:00:22,000\nhello\n")
    streams, _ = films(tmp_path, data)
    clips = streams["life"]["clips"]
    at = [(clip["clip"], clip["start"] - AT, clip["end"] - AT, clip["offset"]) for clip in clips]
    morning = (14 * 60 + 14) * 60 + 48
    assert at == [(0, -14, -4, 0), (1, -4, 0, 10), (2, 0, 10, 0), (3, 10, 20, 10), (4, 20, 25, 20),
                  (5, morning, morning + 10, 0), (6, morning + 10, morning + 12, 10)]
    assert [(clip["clip"], clip["speech"]) for clip in clips if clip["speech"]] == [(4, [[AT + 21, AT + 22, "hello"]])]
    assert "skipped: 1\n  b/VID_20240131_174510_R.mp4: begins before the end of what" in capsys.readouterr().out


def test_questions_to_a_camera(berlin, tmp_path, data):
    make(data / "VID_20240131_174512.mp4")
    ask(data, {"question": "Who?", "time": "2024-01-31 17:45:20"}, {"question": "What?", "answer": ""},
        {"question": "Where?", "time": AT + 3, "video": "life", "answer": None},
        {"question": "When?", "time": "2024-01-31T16:45:14Z", "answer": "now"}, {"question": "Why?", "video": "x"})
    _, tasks = films(tmp_path, data)
    assert [(t["question"], t["time"] - AT, t["answer"]) for t in tasks] == [
        ("When?", 2, "now"), ("Where?", 3, None), ("Who?", 8, None), ("What?", 12, None)]
    for wrong, message in (("26 November", 'time a number, or a text such as "2026-11-26 18:00"'),
                           (75, "task 1: it is asked at 00:01:15, and its stream begins at 2024-01-31 17:45:12")):
        ask(data, {"question": "Who?", "time": wrong})
        with pytest.raises(SystemExit, match=message):
            films(tmp_path, data)


def test_a_camera_goes_on_and_what_comes_late_is_left_out(tmp_path, data, capsys):
    make(data / "VID_20240131_174512.mp4", 22)
    films(tmp_path, data)
    before = files(tmp_path)
    make(data / "VID_20240131_174533.mp4", 12)               # a second before the end: laid behind it
    make(data / "VID_20240131_174500.mp4", 12)
    streams, _ = films(tmp_path, data)
    clips = streams["life"]["clips"]
    assert [clip["start"] - AT for clip in clips] == [0, 10, 20, 22, 32] and clips[3]["offset"] == 0
    assert files(tmp_path)[0].startswith(before[0].rstrip(b"\n]}"))
    said = capsys.readouterr().out
    assert "VID_20240131_174500.mp4: begins before the end of what stands before it in the stream" in said
    assert "1 longer stream, 2 new clips; 0 streams as before" in said


def test_a_folder_that_is_no_folder_is_an_error(tmp_path, data):
    video = make(data / "VID_20240131_174512.mp4")
    with pytest.raises(SystemExit, match="SOURCE=camera needs --DATA=FOLDER"):
        films(tmp_path, video)


# ---- files that are still being written --------------------------------------------------------------------

def growing(monkeypatch, file, more):
    """While 01 waits to look again, `more` is written to a file."""
    waited = []

    def write(seconds):
        waited.append(seconds)
        with open(file, "ab") as opened:
            opened.write(more)
    monkeypatch.setattr(sources, "time", SimpleNamespace(sleep=write, time=time.time, monotonic=time.monotonic))
    return waited


@pytest.mark.parametrize("source", ["videos", "camera"])
def test_a_file_that_is_still_being_written_waits(tmp_path, data, monkeypatch, capsys, source):
    make(data / "VID_20240131_170000.mp4")
    late = make(data / "VID_20240131_174512.ts", 24)
    whole = late.read_bytes()
    late.write_bytes(whole[:188 * 60])
    make(data / "VID_20240131_190000.mp4", written=time.time())
    waited = growing(monkeypatch, late, whole[188 * 60:188 * 80])
    first, _ = run(tmp_path, f"--SOURCE={source}", f"--DATA={data}")
    said = capsys.readouterr().out
    assert waited == [sources.LOOK_AGAIN] and "VID_20240131_174512.ts: is still being written" in said
    assert not any("174512" in clip["file"] for row in first.values() for clip in row["clips"])
    # What follows it in a camera's stream waits with it, because nothing can be inserted later.
    assert ("VID_20240131_190000.mp4: waits for the one before it" in said) == (source == "camera")
    monkeypatch.undo()
    late.write_bytes(whole)
    os.utime(late, (1, 1))
    later, _ = run(tmp_path, f"--SOURCE={source}", f"--DATA={data}")
    shutil.rmtree(tmp_path / "run")
    at_once, _ = run(tmp_path, f"--SOURCE={source}", f"--DATA={data}")
    assert later == at_once and "still being written" not in capsys.readouterr().out


def test_nobody_waits_for_old_or_known_files(tmp_path, data, monkeypatch):
    make(data / "old.mp4")
    waited = growing(monkeypatch, tmp_path / "other", b"x")
    folder_of(tmp_path, data)
    assert not waited
    make(data / "new.mp4", written=time.time())
    folder_of(tmp_path, data)
    folder_of(tmp_path, data)
    assert len(waited) == 1


# ---- streams that were taken up ----------------------------------------------------------------------------

def test_a_known_folder_costs_a_look_at_its_files(tmp_path, data, monkeypatch, capsys):
    for n in range(4):
        make(data / f"{n}.mp4")
    ask(data, {"video": "1.mp4", "question": "Who?"})
    folder_of(tmp_path, data)
    before = files(tmp_path)
    for name in ("check_video", "content_of", "probe_video"):
        monkeypatch.setattr(sources, name, None)
    monkeypatch.setattr(growth, "content_of", None)
    folder_of(tmp_path, data)
    assert files(tmp_path) == before
    assert "nothing new; 4 streams as before" in capsys.readouterr().out


def test_a_video_that_was_replaced_is_named(tmp_path, data):
    for n in range(7):
        make(data / f"{n}.mp4")
    folder_of(tmp_path, data)
    before = files(tmp_path)
    old = (data / "3.mp4").read_bytes()
    make(data / "3.mp4", 22)
    with pytest.raises(SystemExit, match=r"another video than .*life/3.mp4 \(stream 3\)\. .*name of its own"):
        folder_of(tmp_path, data)
    (data / "3.mp4").write_bytes(old[:-1] + b"x")            # as long, but not the same
    with pytest.raises(SystemExit, match="another video"):
        folder_of(tmp_path, data)
    (data / "3.mp4").write_bytes(old[:-50])                  # shorter
    with pytest.raises(SystemExit, match="another video"):
        folder_of(tmp_path, data)
    assert files(tmp_path) == before
    (data / "3.mp4").write_bytes(old)                        # put back: a copy with another time
    folder_of(tmp_path, data)
    assert files(tmp_path) == before
    (data / "3.mp4").rename(data / "x.mp4")                  # the second cure
    make(data / "3 new.mp4")
    streams, _ = folder_of(tmp_path, data)
    assert list(streams)[-2:] == ["3 new", "x"] and len(streams) == 9


def test_a_video_that_has_grown_goes_on(tmp_path, data, capsys):
    whole = make(data / "day.ts", 31).read_bytes()
    make_video(data / "other.mp4", frames=30)
    at_once, _ = folder_of(tmp_path / "whole", data)
    (data / "day.ts").write_bytes(whole[:int(188 * (len(whole) / 188 * 2 // 3))])
    before, _ = folder_of(tmp_path, data)
    (data / "day.ts").write_bytes(whole)
    os.utime(data / "day.ts", (9, 9))
    capsys.readouterr()
    streams, _ = folder_of(tmp_path, data)
    clips = streams["day"]["clips"]
    count = len(before["day"]["clips"])
    assert clips[:count] == before["day"]["clips"] and len(clips) > count
    assert [clip["clip"] for clip in clips] == list(range(len(clips)))
    assert all(a["end"] == b["start"] == b["offset"] for a, b in zip(clips, clips[1:]))
    assert clips[-1]["end"] == pytest.approx(at_once["day"]["clips"][-1]["end"], abs=3)
    assert "1 longer stream" in capsys.readouterr().out
    folder_of(tmp_path, data)
    assert "nothing new; 2 streams as before" in capsys.readouterr().out


def test_what_a_video_has_grown_by_waits_until_it_is_long_enough(tmp_path, data):
    video = make(data / "day.mp4", 31)
    S = SimpleNamespace(SOURCE="videos", CLIP_SECONDS=10, SHORTEST=2, CHECK=3)
    for start, ends in ((30.0, []), (31.0, []), (28.0, [31.0]), (10.0, [20.0, 30.0])):
        row = sources.check_video(video, [[start, None]], S)
        assert [clip["end"] for clip in row["clips"][0]] == ends and not row["skipped"]


def test_videos_that_have_gone_keep_their_streams(tmp_path, data, capsys):
    for name in "abc":
        make(data / f"{name}.mp4")
    ask(data, {"video": "b.mp4", "question": "Who?"})
    before, tasks = folder_of(tmp_path, data)
    (data / "b.mp4").unlink()
    make(data / "d.mp4")
    streams, again = folder_of(tmp_path, data)
    assert list(streams) == ["a", "b", "c", "d"] and again == tasks and streams["b"] == before["b"]
    assert "b.mp4: is no longer there; its clips stay" in capsys.readouterr().out
    S = SimpleNamespace(RUN=str(tmp_path / "run"), FROM="")
    assert len(runs.load_streams(S, "deploy")) == 4
    assert "*** 1 of the 4 video files of" in capsys.readouterr().out
    shutil.rmtree(data)
    with pytest.raises(SystemExit, match="4 of the 4 video files of .*is their disk mounted"):
        runs.load_streams(S, "deploy")


def test_a_benchmark_needs_all_its_videos(tmp_path, data):
    for name in "ab":
        make(data / f"{name}.mp4")
    folder_of(tmp_path, data, "--SPLIT=online")
    (data / "a.mp4").unlink()
    with pytest.raises(SystemExit, match="1 of the 2 video files of .*a.mp4. Put them back"):
        runs.load_streams(SimpleNamespace(RUN=str(tmp_path / "run"), FROM=""), "deploy")


def test_names_of_streams_stay(tmp_path, data):
    make(data / "a.mp4")
    make(data / "c.mp4")
    ask(data, {"video": "a.mp4", "question": "Who?"})
    first, tasks = folder_of(tmp_path, data)
    make(data / "a.mkv", 22)                                 # by itself, a.mp4 would now be called so
    (data / "c.mp4").unlink()
    make(data / "c.mov", 22)                                 # and this one c
    ask(data, {"video": "a.mkv", "question": "What?"}, {"video": "a.mp4", "question": "Who?"},
        {"video": "c.mov", "question": "Where?"})
    streams, more = folder_of(tmp_path, data)
    assert list(streams) == ["a", "c", "a.mkv", "c.mov"] and streams["a"] == first["a"] and streams["c"] == first["c"]
    assert [(task["task"], task["stream"]) for task in more] == [
        ("a-1", "a"), ("a.mkv-1", "a.mkv"), ("c.mov-3", "c.mov")]
    assert folder_of(tmp_path, data) == (streams, more)


def test_subtitles_that_come_late_are_said(tmp_path, data, capsys):
    make(data / "a.mp4")
    folder_of(tmp_path, data)
    (data / "a.srt").write_text("00:00:00,000 --> 00:00:01,000\nlate\n")
    streams, _ = folder_of(tmp_path, data)
    assert streams["a"]["clips"][0]["speech"] == []
    assert "a: has subtitles now, but its clips were taken up without" in capsys.readouterr().out


def test_faces_keep_their_numbers_where_a_stream_grows(tmp_path, data):
    box = {"time": 1.0, "face": 7, "box": [1, 1, 9, 9], "name": "Ann"}
    make(data / "VID_20240131_174512.mp4")
    (data / "VID_20240131_174512.faces.jsonl").write_text(json.dumps(box) + "\n")
    films(tmp_path, data)
    make(data / "VID_20240131_190000.mp4")
    (data / "VID_20240131_190000.srt").write_text("00:00:00,000 --> 00:00:01,000\nAnn: hi\n")
    streams, _ = films(tmp_path, data)
    assert [clip["speech"] for clip in streams["life"]["clips"]][2][0][2] == "<face_7>: hi"


def test_a_data_set_grows_at_its_end_alone(tmp_path, egolife, capsys):     # noqa: F811
    day2 = egolife / "A1_JAKE" / "DAY2" / "DAY2_A1_JAKE_09000000.mp4"
    day2.rename(tmp_path / "later.mp4")
    before, _ = run(tmp_path, "--SOURCE=egolife", f"--DATA={egolife}")
    (tmp_path / "later.mp4").rename(day2)
    make(egolife / "A1_JAKE" / "DAY1" / "DAY1_A1_JAKE_13000000.mp4")
    after, _ = run(tmp_path, "--SOURCE=egolife", f"--DATA={egolife}")
    clips = after["A1_JAKE"]["clips"]
    assert len(before["A1_JAKE"]["clips"]) == 9 and len(clips) == 12 and clips[:9] == before["A1_JAKE"]["clips"]
    assert "DAY1_A1_JAKE_13000000.mp4: begins before the end" in capsys.readouterr().out


def test_a_new_part_of_a_known_file_is_a_new_stream(tmp_path, egotempo):    # noqa: F811
    table = egotempo / "egotempo_openQA.json"
    rows = json.loads(table.read_text())["annotations"]
    table.write_text(json.dumps({"annotations": rows[:2]}))
    first, few = run(tmp_path, "--SOURCE=egotempo", f"--DATA={egotempo}")
    table.write_text(json.dumps({"annotations": rows}))
    streams, tasks = run(tmp_path, "--SOURCE=egotempo", f"--DATA={egotempo}")
    whole, of_whole = run(tmp_path / "whole", "--SOURCE=egotempo", f"--DATA={egotempo}")
    for row in (*streams.values(), *whole.values()):
        for clip in row["clips"]:
            clip.pop("reader", None)                         # decord reads no file that something was skipped of
    assert streams == whole and tasks == of_whole
    assert len(first) == 1 and len(streams) == 3 and tasks[:2] == few and len(tasks) == 4


# ---- tasks that were taken up ------------------------------------------------------------------------------

def test_tasks_keep_names_and_times(tmp_path, data, capsys):
    make(data / "VID_20240131_174512.mp4")
    who = {"question": "Who?", "options": ["Ann", "Bob"]}
    ask(data, who, {"question": "When?", "time": AT + 5}, who | {"environment": "people"})
    _, first = films(tmp_path, data)
    assert [(t["task"], t["time"] - AT) for t in first] == [("life-2", 5), ("life-1", 12), ("life-3", 12)]
    make(data / "VID_20240131_190000.mp4")
    new = {"question": "What?"}
    rows = [new, {"question": "When?", "time": AT + 6}, who | {"environment": "people"},
            {"question": "When?", "time": AT + 5},
            who | {"options": ["Ann", "Eve"]}, who, who]     # moved, edited, asked once more
    ask(data, *rows)
    _, tasks = films(tmp_path, data)
    end = 3600 + 14 * 60 + 48 + 12
    assert tasks[:3] == first
    assert [(t["task"], t["question"], t["time"] - AT) for t in tasks[3:]] == [
        ("life-5", "When?", 6), ("life-4", "What?", end), ("life-6", "Who?", end), ("life-7", "Who?", end)]
    assert "4 new tasks" in capsys.readouterr().out
    ask(data, *reversed(rows[1:]))
    _, again = films(tmp_path, data)
    said = capsys.readouterr().out
    assert again == tasks and "nothing new" in said
    [gone] = [task["task"] for task in tasks if task["question"] == "What?"]
    assert f"{gone}: no longer stands among the questions; it was taken up, so it stays" in said


def test_a_question_with_its_time_is_known_before_one_without(tmp_path, data):
    make(data / "VID_20240131_174512.mp4")
    ask(data, {"question": "Who?", "time": AT + 5})
    _, first = films(tmp_path, data)
    ask(data, {"question": "Who?"}, {"question": "Who?", "time": AT + 5})
    _, tasks = films(tmp_path, data)
    assert tasks[:1] == first and [task["time"] - AT for task in tasks] == [5, 12]


def test_answers_may_come_later_and_nothing_else_may_change(tmp_path, data, capsys):
    make(data / "a.mp4")
    named = {"video": "a.mp4", "question": "Who?", "options": ["Ann", "Bob"], "task": "who"}
    ask(data, named, {"video": "a.mp4", "question": "What?"})
    _, first = folder_of(tmp_path, data)
    assert [task["answer"] for task in first] == [None, None]
    assert "questions 2; 2 without an answer" in capsys.readouterr().out
    ask(data, named | {"answer": "B"}, {"video": "a.mp4", "question": "What?", "answer": "a cat"})
    _, tasks = folder_of(tmp_path, data)
    assert tasks == [first[0] | {"answer": "B"}, first[1] | {"answer": "a cat"}]
    said = capsys.readouterr().out
    assert "who, a-2: has another answer now" in said and "without an answer" not in said
    for change in ({"options": ["Ann", "Eve"]}, {"question": "Which?"}, {"time": 3}, {"environment": "x"}):
        ask(data, named | change)
        with pytest.raises(SystemExit, match="task 1: the name 'who' is that of another question.*Give this"):
            folder_of(tmp_path, data)
    ask(data, named | {"answer": "C"})
    with pytest.raises(SystemExit, match="the answer 'C' is no letter"):
        folder_of(tmp_path, data)
    ask(data, {"video": "a.mp4", "question": "New?", "task": "a-2"})
    with pytest.raises(SystemExit, match="'a-2' is that of another"):
        folder_of(tmp_path, data)
    ask(data, {"video": "a.mp4", "question": "Now?"}, {"video": "a.mp4", "question": "New?", "task": "a-1"})
    _, tasks = folder_of(tmp_path, data)
    assert [(task["task"], task["question"]) for task in tasks[2:]] == [("a-3", "Now?"), ("a-1", "New?")]


# ---- in steps, and killed ----------------------------------------------------------------------------------

def steps(folder, source):
    """Three steps of a folder, each of which adds to the one before it."""
    names = ["VID_20240131_174512", "VID_20240131_190000", "VID_20240201_080000", "VID_20240203_080000"]
    rows = [{"video": f"{name}.mp4", "question": f"Who {name}?"} for name in names]
    if source == "camera":
        rows = [{"question": row["question"], "time": f"2024-01-31 {17 + n}:59"} for n, row in enumerate(rows)]
    for number, some in enumerate(([0], [1, 2], [3])):
        for n in some:
            make(folder / f"{names[n]}.mp4", 12 + n)
        ask(folder, *rows[:some[-1] + 1])
        yield number


@pytest.mark.parametrize("source", ["videos", "camera"])
def test_a_run_in_steps_is_one_over_the_whole(tmp_path, data, source):
    for _ in steps(data, source):
        run(tmp_path / "steps", f"--SOURCE={source}", f"--DATA={data}")
    run(tmp_path / "whole", f"--SOURCE={source}", f"--DATA={data}")
    assert files(tmp_path / "steps") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")[1].splitlines()) == 4


KILLED = """
import importlib, os, signal, sys
sys.path.insert(0, {root!r})
stage = importlib.import_module("01_make_streams")
replace = os.replace


def child(kill_after):
    \"\"\"The exit code of 01 in a process that kills itself after so many files.\"\"\"
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    written = []

    def count(*paths):
        replace(*paths)
        written.append(paths)
        if len(written) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = count
    stage.main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)


codes = [child(1)]
while codes[-1] == -signal.SIGKILL:
    codes.append(child(len(codes) + 1))
print("killed", len(codes) - 1)
sys.exit(codes[-1])
"""


def test_a_kill_between_any_two_files_loses_nothing(tmp_path, data):
    """Each run is killed after its first, second, .. file; in between, the folder grows."""
    arguments = ["--SOURCE=camera", f"--DATA={data}", "--SAVE_EVERY=1"]
    recording = data / "VID_20240204_080000.ts"
    whole = make(recording, 31).read_bytes()
    recording.unlink()

    def compare():
        done = subprocess.run([sys.executable, "-c", KILLED.format(root=str(ROOT)), *arguments,
                               f"--RUN={tmp_path / 'killed' / 'run'}"], capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        run(tmp_path / "calm", *arguments)
        assert files(tmp_path / "killed") == files(tmp_path / "calm")
        return int(done.stdout.split()[-1])
    kills = [compare() for _ in steps(data, "camera")]
    for part in (0.6, 1.0):                                  # and a file that grows by appending
        recording.write_bytes(whole[:188 * int(part * len(whole) / 188)])
        os.utime(recording, (9, 9 + part))
        kills.append(compare())
    assert min(kills) >= 4
    last = run(tmp_path / "calm", *arguments)[0]["life"]["clips"][-1]
    assert last["file"] == str(recording) and last["offset"] + last["end"] - last["start"] > 29


@real_videos
def test_real_videos_in_steps(tmp_path, data, capsys):
    """Odd real files come in two steps, and one over all of them makes the same streams."""
    odd = ["audio_only.mp4", "hang_cut_copy_ss_before_i.mp4", "single_frame.mp4", "trunc50_faststart.mp4", "vfr.mp4"]
    for some in (odd[::2], odd):
        for name in some:
            shutil.copy2(SHARED / "videos" / name, data)
        grown, _ = folder_of(tmp_path / "steps", data)
    whole, _ = folder_of(tmp_path / "whole", data)
    assert grown == whole and len(whole) == 4
    said = capsys.readouterr().out
    assert "audio_only.mp4: " in said and "2 new streams" in said


def test_toy_videos_to_be_used_as_ones_own(tmp_path):
    """tiny/my_videos.py: the toy judge finds what they show, also of one that comes later; those there are kept."""
    from support import judges
    from tiny import my_videos, world
    folder = tmp_path / "my"
    my_videos.make_videos(folder, ["monday", "tuesday"])
    monday = (folder / "monday.mp4").read_bytes()
    ask(folder, {"video": "monday.mp4", "question": "What colour did <face_3> wear at 00:00:50?"})
    folder_of(tmp_path, folder)
    my_videos.make_videos(folder, ["monday", "wednesday"])
    streams, _ = folder_of(tmp_path, folder)
    assert (folder / "monday.mp4").read_bytes() == monday
    assert [(name, row["split"], len(row["clips"])) for name, row in streams.items()] == [
        (name, "deploy", 12) for name in ("monday", "tuesday", "wednesday")]
    S = SimpleNamespace(RUN=str(tmp_path / "run"), FROM="", JUDGE="tiny")
    judge = judges.load_judge(S)
    said = world.sentence("now", world.clip_facts(judge.truth["wednesday", 3])[:2])

    def is_true(stream):
        return judge.faithful(SimpleNamespace(stream=stream, clip=3, history=[]), said)
    assert is_true("wednesday") and not is_true("monday")
    (folder / "truth.jsonl").unlink()
    with pytest.raises(SystemExit, match="toy world alone"):
        judges.load_judge(S)
