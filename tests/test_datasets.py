"""Stage 1 on Video-MME, EgoLife and EgoTempo: folders of their form with videos made here, and, where it
exists, ../shared/data with its real annotations."""
import importlib.util
import json
import sys

import pytest

import common
from test_streams import SHARED, make_video, media, numbers, overlay, run, sources

real_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="no ../shared/data, real annotations")


def write(path, rows, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) if lines else json.dumps(rows))


# ---- Video-MME ---------------------------------------------------------------------------------------------

def row(video, n, kind="OCR Problems", duration="short", **more):
    return {"video_id": "001", "duration": duration, "domain": "Knowledge", "sub_category": "x", "url": "none",
            "videoID": video, "question_id": f"{video}-{n}", "task_type": kind, "question": f"What\nis {n}?",
            "options": ["A. one.", "B. two.", "C. three.", "D. four."], "answer": "B"} | more


@pytest.fixture
def videomme(tmp_path):
    """Three short videos (a dash, an underscore, upper case .MP4), a medium .mkv, a long one, two not there."""
    data = tmp_path / "mme"
    (data / "data").mkdir(parents=True)
    (data / "video").mkdir()
    for name in ("data/-O6m.mp4", "data/_u8.mp4", "data/UP.MP4.mp4", "video/mid.mkv", "data/long.mp4"):
        make_video(data / name, frames=110)
    (data / "data" / "UP.MP4.mp4").rename(data / "data" / "UP.MP4")
    (data / "data" / "broken.mp4").write_text("<html>")
    (data / "subtitle").mkdir()
    (data / "subtitle" / "-O6m.srt").write_text(
        '1\n00:00:01,000 --> 00:00:03,000\n<font color="white" size=".72c">one</font>\n\n'
        '2\n00:00:02,000 --> 00:00:04,000\n<font color="white" size=".72c">two</font>\n')
    rows = [row(v, n, k) for v in ("-O6m", "_u8", "UP", "broken", "gone")
            for n, k in ((1, "OCR Problems"), (2, "Counting Problem"))]
    rows += [row("mid", 1, duration="medium"), row("long", 1, "Action Reasoning", "long")]
    write(data / "videomme" / "test.jsonl", rows, lines=True)
    return data


def test_videomme(tmp_path, videomme, capsys):
    streams, tasks = run(tmp_path, "--SOURCE=videomme", f"--DATA={videomme}")
    assert list(streams) == ["-O6m", "_u8", "UP", "mid"]                     # in the order of the table
    assert {(s["split"], s["source"]) for s in streams.values()} == {("online", "videomme")}
    clip, = streams["-O6m"]["clips"]
    assert clip["speech"] == [[1.0, 3.0, "one"], [2.0, 4.0, "two"]] and clip["end"] == 10.0
    assert tasks[0] == {"task": "-O6m-1", "stream": "-O6m", "environment": "OCR Problems", "time": 10.0,
                        "question": "What is 1?", "options": row("x", 1)["options"], "answer": "B"}
    assert len(tasks) == 7 and {t["stream"] for t in tasks} == set(streams)
    said = capsys.readouterr().out
    assert "Counting Problem 3, OCR Problems 4" in said and "broken, gone: 2 tasks left out" in said
    assert "data/broken.mp4: not decodable" in said


def test_a_link_to_nowhere_is_named(tmp_path, egolife, capsys):
    (egolife / "A1_JAKE" / "DAY1" / "DAY1_A1_JAKE_15000000.mp4").symlink_to(tmp_path / "gone.mp4")
    streams, _ = run(tmp_path, "--SOURCE=egolife", f"--DATA={egolife}")
    assert len(streams["A1_JAKE"]["clips"]) == 12
    assert "DAY1_A1_JAKE_15000000.mp4: is not a file" in capsys.readouterr().out


def test_folders_may_be_links(tmp_path, egolife):
    (egolife / "A1_JAKE").rename(tmp_path / "elsewhere")
    (egolife / "A1_JAKE").symlink_to(tmp_path / "elsewhere")
    assert len(run(tmp_path, "--SOURCE=egolife", f"--DATA={egolife}")[0]["A1_JAKE"]["clips"]) == 12


def test_a_long_file_is_tried_once_a_minute(tmp_path, videomme, monkeypatch):
    tried = []
    monkeypatch.setattr(sources, "probe_video", lambda file: {"start": 0.0, "duration": 900.0})
    monkeypatch.setattr(sources, "check_seeks", lambda file, times: None)
    monkeypatch.setattr(sources, "read_frames", lambda file, times: tried.append((file.stem, *times)))
    run(tmp_path, "--SOURCE=videomme", f"--DATA={videomme}", "--LIMIT=1")
    assert len(tried) == 15 and max(b[1] - a[1] for a, b in zip(tried, tried[1:])) == pytest.approx(60)


@pytest.mark.parametrize("chosen, streams, tasks", [
    (["--LIMIT=2"], {"-O6m", "_u8"}, 4), (["--DURATION=long"], {"long"}, 1),
    (["--LIMIT=1", "--DURATION= medium, long"], {"mid"}, 1),
    (["--TYPES=counting problem"], {"-O6m", "_u8", "UP"}, 3),
    (["--TYPES=OCR Problems", "--DURATION=medium"], {"mid"}, 1)])
def test_a_part_of_videomme(tmp_path, videomme, chosen, streams, tasks):
    found, rows = run(tmp_path, "--SOURCE=videomme", f"--DATA={videomme}", *chosen)
    assert found.keys() == streams and len(rows) == tasks


@pytest.mark.parametrize("chosen, message", [
    (["--TYPES=OCR"], "TYPES: no question is of ocr, but of Counting Problem, OCR Problems"),
    (["--DURATION=brief"], "DURATION: no question is of brief, but of long, medium, short")])
def test_an_unknown_part_is_named(tmp_path, videomme, chosen, message):
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, "--SOURCE=videomme", f"--DATA={videomme}", *chosen)


def test_the_published_parquet(tmp_path, videomme):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, used by SOURCE=videomme alone, is missing")
    import pyarrow
    plain = run(tmp_path / "lines", "--SOURCE=videomme", f"--DATA={videomme}")
    rows = [json.loads(line) for line in (videomme / "videomme" / "test.jsonl").read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows),
                        videomme / "videomme" / "test-00000-of-00001.parquet")
    (videomme / "videomme" / "test.jsonl").unlink()
    assert run(tmp_path, "--SOURCE=videomme", f"--DATA={videomme}") == plain


def test_without_pyarrow_or_table_it_says_so(tmp_path, videomme, monkeypatch):
    (videomme / "videomme" / "test.jsonl").unlink()
    with pytest.raises(SystemExit, match="none of videomme/"):
        run(tmp_path, "--SOURCE=videomme", f"--DATA={videomme}")
    (videomme / "videomme" / "test.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else True)
    with pytest.raises(SystemExit, match="pip install pyarrow.*videomme.jsonl"):
        run(tmp_path, "--SOURCE=videomme", f"--DATA={videomme}")


# ---- EgoLife -----------------------------------------------------------------------------------------------

def question(n, day, stamp, kind="EntityLog", **more):
    return {"ID": str(n), "query_time": {"date": day, "time": stamp}, "type": kind, "question": f"Who {n}?",
            "choice_a": "Ann", "choice_b": "Bob", "choice_c": "Ann", "choice_d": "Eve", "answer": "C",
            "target_time": {"date": "Day1", "time": "11153417DAY1_11181201"}, "question_chinese": "谁?"} | more


@pytest.fixture
def egolife(tmp_path):
    """Four files of 30 s on two days, one of which is broken, and an hourly transcript."""
    data = tmp_path / "ego"
    for day, stamp in ((1, "11094200"), (1, "11101200"), (1, "14000310"), (2, "09000000")):
        path = data / "A1_JAKE" / f"DAY{day}" / f"DAY{day}_A1_JAKE_{stamp}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_video(path, frames=301)
    (data / "A1_JAKE" / "DAY1" / "DAY1_A1_JAKE_11104200.mp4").touch()
    write(data / "EgoLifeQA" / "EgoLifeQA_A1_JAKE.json",
          [question(1, "DAY1", "11103792"), question(2, "DAY1", "12000000", "HabitInsight"),
           question(3, "Day1", "14002000"), question(4, "DAY2", "10000000", answer="A")])
    spoken = data / "EgoLifeCap" / "Transcript" / "A1_JAKE" / "DAY1" / "A1_JAKE_DAY1_11000000.srt"
    spoken.parent.mkdir(parents=True)
    spoken.write_text("1\n00:09:47,100 --> 00:09:50,766\nJake: 好\nJake: Okay.\n\n"
                      "2\n00:10:50,000 --> 00:10:55,000\nin the gap\n", encoding="utf-8")
    notes = data / "EgoLifeCap" / "DenseCaption" / "A1_JAKE" / "DAY1" / spoken.name
    notes.parent.mkdir(parents=True)
    notes.write_text("1\n00:09:47,100 --> 00:09:50,766\nI pick up a screwdriver\n")       # nobody says that
    return data


def test_egolife_is_one_stream_on_the_clock_of_the_days(tmp_path, egolife, capsys):
    streams, tasks = run(tmp_path, "--SOURCE=egolife", f"--DATA={egolife}")
    clips = streams["A1_JAKE"]["clips"]
    eleven = 11 * 3600
    assert [c["start"] - eleven for c in clips[:6]] == [582, 592, 602, 612, 622, 632]
    assert clips[6]["start"] == 14 * 3600 + 3.5 and clips[9]["start"] == (24 + 9) * 3600     # FF 10 of 20
    assert [c["clip"] for c in clips] == list(range(12))
    assert [c["offset"] for c in clips[6:9]] == [0, 10, 20] and "14000310" in clips[8]["file"]
    assert clips[0]["speech"] == [[eleven + 587.1, eleven + 590.766, "Jake: Okay."]]
    assert not any(c["speech"] for c in clips[1:])
    assert [t["time"] for t in tasks] == [eleven + 637.95, 43200, 50420, 122400]       # FF 92 is clamped
    assert tasks[0]["options"] == ["A. Ann", "B. Bob", "C. Ann", "D. Eve"] and tasks[0]["answer"] == "C"
    said = capsys.readouterr().out
    assert "DAY1_A1_JAKE_11104200.mp4: is empty" in said and "EntityLog 3, HabitInsight 1" in said


def test_the_reader_sees_only_what_lies_before_the_query(tmp_path, egolife):
    streams, tasks = run(tmp_path, "--SOURCE=egolife", f"--DATA={egolife}")
    stage3, seen = common.stage("03_collect_tasks"), []

    class Reader:
        def ask(self, prompt, items):
            seen.extend(items)
            return ["insufficient"] * len(items)
    rows = [{"start": c["start"], "end": c["end"], "memory": f"clip {c['clip']}."}
            for c in streams["A1_JAKE"]["clips"]]
    stage3.answer(common.settings({"__doc__": ""}, []), Reader(), tasks, {"A1_JAKE": rows})
    assert [len(item["entries"]) for item in seen] == [5, 6, 7, 12]     # the first is asked within clip 5


def test_a_part_of_egolife(tmp_path, egolife):
    streams, tasks = run(tmp_path, "--SOURCE=egolife", f"--DATA={egolife}", "--LIMIT=2")
    assert len(streams["A1_JAKE"]["clips"]) == 6
    assert [t["task"] for t in tasks] == ["A1_JAKE-1"]                  # asked before the third file begins
    _, tasks = run(tmp_path / "types", "--SOURCE=egolife", f"--DATA={egolife}", "--TYPES=HabitInsight")
    assert [t["task"] for t in tasks] == ["A1_JAKE-2"]


# ---- EgoTempo ----------------------------------------------------------------------------------------------

@pytest.fixture
def egotempo(tmp_path):
    data = tmp_path / "tempo"
    (data / "video_540ss").mkdir(parents=True)
    (data / "trimmed_clips").mkdir()
    make_video(data / "video_540ss" / "11aa-22.mp4", frames=250)
    make_video(data / "trimmed_clips" / "33bb-44_100.25_112.5.mp4", frames=122)
    make_video(data / "trimmed_clips" / "11aa-22_4.0_17.0.mp4", frames=10)      # the full one is preferred
    ask = lambda clip, n, kind, answer="Two. ": {"question_id": f"{clip}_{n}", "clip_id": clip,
                                                 "question_type": kind, "question": "How\nmany? ", "answer": answer}
    write(data / "egotempo_openQA.json", {"info": {}, "annotations": [
        ask("11aa-22_4.0_17.0", 0, "counting objects"), ask("11aa-22_4.0_17.0", 1, "object sequence"),
        ask("11aa-22_-0.35_5.5", 0, "counting objects"), ask("33bb-44_100.25_112.5", 0, "counting objects"),
        ask("11aa-22_300.0_310.0", 0, "counting objects"), ask("55cc_1.0_2.0", 0, "object sequence")]})
    return data


def test_egotempo(tmp_path, egotempo, capsys):
    streams, tasks = run(tmp_path, "--SOURCE=egotempo", f"--DATA={egotempo}")
    where = lambda name: [(c["start"], c["end"], c["offset"]) for c in streams[name]["clips"]]
    assert where("11aa-22_4.0_17.0") == [(0.0, 10.0, 4.0), (10.0, 13.0, 14.0)]
    assert where("11aa-22_-0.35_5.5") == [(0.0, 5.5, 0.0)]                      # a negative start: 0
    assert where("33bb-44_100.25_112.5") == [(0.0, 10.0, 0.0), (10.0, 12.2, 10.0)]
    clip = streams["11aa-22_4.0_17.0"]["clips"][1]
    assert numbers(media.read_frames(clip["file"], [clip["offset"] + 0.5])) == [145]
    assert tasks[0] == {"task": "11aa-22_4.0_17.0_0", "stream": "11aa-22_4.0_17.0", "time": 13.0,
                        "environment": "counting objects", "question": "How many?", "options": [],
                        "answer": "Two."}
    assert len(tasks) == 4
    said = capsys.readouterr().out
    assert "has nothing from 300.0 s on, as it ends at 25.0 s" in said and "55cc_1.0_2.0: 1 tasks left" in said


def test_one_part_outside_of_a_video_costs_the_others_nothing(tmp_path, egotempo):
    table = json.loads((egotempo / "egotempo_openQA.json").read_text())
    table["annotations"].insert(0, table["annotations"].pop(4))                 # the part that is not there
    write(egotempo / "egotempo_openQA.json", table)
    streams, _ = run(tmp_path, "--SOURCE=egotempo", f"--DATA={egotempo}")
    assert len(streams) == 3


# ---- all of them -------------------------------------------------------------------------------------------

def test_odd_rows_of_a_data_set_cost_no_others(tmp_path, egolife, egotempo, capsys):
    rows = json.loads((egolife / "EgoLifeQA" / "EgoLifeQA_A1_JAKE.json").read_text())
    rows[1] |= {"answer": "?"}
    rows[3] |= {"ID": "1", "choice_b": "A. Smith"}
    write(egolife / "EgoLifeQA" / "EgoLifeQA_A1_JAKE.json", rows)
    _, tasks = run(tmp_path, "--SOURCE=egolife", f"--DATA={egolife}")
    assert [t["task"] for t in tasks] == ["A1_JAKE-1", "A1_JAKE-3", "A1_JAKE-1-2"]
    assert tasks[2]["options"] == ["A. Ann", "B. A. Smith", "C. Ann", "D. Eve"]
    assert "A1_JAKE: 1 tasks left out: the answer '?' is no letter" in capsys.readouterr().out


def test_annotations_of_another_form_are_named(tmp_path, egotempo, egolife):
    write(egotempo / "egotempo_openQA.json", {"annotations": [{"clip": "x"}]})
    with pytest.raises(SystemExit, match="no egotempo as published .KeyError 'question_type'"):
        run(tmp_path / "a", "--SOURCE=egotempo", f"--DATA={egotempo}")
    (egotempo / "egotempo_openQA.json").write_text("not JSON")
    with pytest.raises(SystemExit, match="no egotempo as published"):
        run(tmp_path / "b", "--SOURCE=egotempo", f"--DATA={egotempo}")
    with pytest.raises(SystemExit, match="no egolife as published .FileNotFoundError.*EgoLifeQA_A1_JAKE.json"):
        run(tmp_path / "d", "--SOURCE=egolife", f"--DATA={egotempo}")
    with pytest.raises(SystemExit, match="needs --DATA=FOLDER"):
        run(tmp_path / "c", "--SOURCE=egolife", f"--DATA={egolife}/none")


def test_a_damaged_file_of_a_data_set_gives_its_good_clips(tmp_path, egolife, capsys, monkeypatch):
    tried, read = [], media.read_frames

    def hole(file, times):
        tried.append(file.name)
        if "DAY2" in file.name and any(10 <= t < 20 for t in times):
            raise media.VideoError(file, "is damaged")
        return read(file, times)
    monkeypatch.setattr(sources, "read_frames", hole)
    streams, _ = run(tmp_path, "--SOURCE=egolife", f"--DATA={egolife}")
    clips = streams["A1_JAKE"]["clips"]
    assert [c["offset"] for c in clips[-2:]] == [0, 20] and len(clips) == 11
    assert tried.count("DAY1_A1_JAKE_11094200.mp4") == 3            # of a good file no more than CHECK frames
    assert "DAY2_A1_JAKE_09000000.mp4: 00:00:10-00:00:20: " in capsys.readouterr().out


@real_data
def test_real_egolife(tmp_path):
    table = SHARED / "data" / "EgoLifeQA_A1_JAKE.slice.json"
    data = tmp_path / "ego"
    (data / "EgoLifeQA").mkdir(parents=True)
    (data / "EgoLifeQA" / table.name).write_bytes(table.read_bytes())
    spoken = data / "EgoLifeCap" / "Transcript" / "A1_JAKE" / "DAY1" / "A1_JAKE_DAY1_11000000.srt"
    spoken.parent.mkdir(parents=True)
    spoken.write_bytes((SHARED / "data" / spoken.name).read_bytes())
    (data / "A1_JAKE" / "DAY1").mkdir(parents=True)
    make_video(data / "A1_JAKE" / "DAY1" / "DAY1_A1_JAKE_11094208.mp4", frames=300)
    streams, tasks = run(tmp_path, "--SOURCE=egolife", f"--DATA={data}")
    assert len(tasks) == 42 and tasks == sorted(tasks, key=lambda t: t["time"])
    assert tasks[0]["time"] == 11 * 3600 + 21 * 60 + 2.85 and tasks[-1]["time"] > 6 * 86400
    heard = {text for clip in streams["A1_JAKE"]["clips"] for _, _, text in clip["speech"]}
    assert "Jake: Okay, then we need a stopwatch." in heard and not any(overlay.CJK.search(x) for x in heard)


@real_data
def test_real_egotempo(tmp_path):
    table = SHARED / "data" / "egotempo_openQA.slice.json"
    data, rows = tmp_path / "tempo", json.loads(table.read_text())["annotations"]
    (data / "trimmed_clips").mkdir(parents=True)
    (data / table.name).write_bytes(table.read_bytes())
    for clip in {r["clip_id"] for r in rows}:
        video = make_video(tmp_path / "v.mp4", frames=30) if not (tmp_path / "v.mp4").exists() else video
        (data / "trimmed_clips" / f"{clip}.mp4").write_bytes(video.read_bytes())
    streams, tasks = run(tmp_path, "--SOURCE=egotempo", f"--DATA={data}")
    assert len(tasks) == len(rows) == 43 and len({t["environment"] for t in tasks}) == 10
    assert len(streams) == len({r["clip_id"] for r in rows})
    assert all(t["answer"] == t["answer"].strip() and t["options"] == [] for t in tasks)
