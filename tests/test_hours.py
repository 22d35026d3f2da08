"""The plan in hours: rates against what was measured, formulas by hand, and what --PLAN=1 prints without anything."""
import doctest
import importlib
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from experiments import hours as table                                      # noqa: E402
from support import hours, plan                                             # noqa: E402
from support.hours import CARDS, Estimate, Part, Sizes, Speed               # noqa: E402
from support.runs import ROOT, read_json, write_json, write_jsonl           # noqa: E402

THINKING = "Qwen/Qwen3-VL-30B-A3B-Thinking"
MEASURED = read_json(ROOT / "results" / "full_size.json")
H100 = Speed(CARDS["H100"])


def settings(script, *argv):
    module = importlib.import_module(script)
    return module, common.settings(vars(module), [f"--MODEL={THINKING}", "--JUDGE=local", *argv])


def estimated(script, split, *argv, card="H100", **sizes):
    module, S = settings(script, *argv)
    return hours.estimate(S, module.work, hours.replace(hours.PAPER[split], **sizes), card)


def part(estimate, name):
    [found] = [part for part in estimate.parts if part.name == name]
    return found


# ================================================================ rates
def test_the_rates_meet_what_was_measured():
    model = MEASURED["5 model"]
    helps = MEASURED["7 what helps"]
    judge = helps["judge"]
    clip = 2070                                                   # tokens: 10 frame pairs of 196 + 9, and 20
    pairs = [
        (H100.read(11070), helps["rollout, 1 x 8, no cuDNN, rows, room, fixed"]["prefill_s"]),
        (H100.read(11070, 8, 170), model["row without gradient, 8 short answers"]["merged"]["seconds"]),
        (H100.read(11070, 8, 1350), model["row without gradient, 8 long answers"]["merged"]["seconds"]),
        (H100.read(3000, 2, 156), judge["one question alone, 2 columns"]["seconds"]),
        (H100.verdicts(8, 1, 3000, 156, 8), judge["a tree: 8 memories, each with two replies"]["seconds"]),
        (H100.read(3000, 16, 156), judge["16 columns of memory and reply, merged"]["seconds"]),
        (H100.learn(11070, 8, 170), helps["training row, 8 short, cuDNN"]["merged"]["seconds"]),
        (H100.learn(11070, 8, 1350), helps["training row, 8 long, cuDNN"]["merged"]["seconds"]),
        (H100.learn(11070, 2, 1350), helps["DPO pair, cuDNN"]["merged"]["seconds"]),
        (1000 * H100.step(11070, 8, 64, 1), helps["rollout, 1 x 8, no cuDNN, rows, room, fixed"]["step_ms"]),
        (1000 * H100.step(11070, 8, 64, 8), helps["the same, experts of fixed shapes"]["step_ms"]),
        (1000 * H100.step(11070, 8, 64, 16), helps["rollout, 16 x 8, no cuDNN, rows, room, fixed"]["step_ms"]),
        (H100.of["vision"] * clip, model["vision, 1 clip"]["seconds"]),
        (H100.of["vision"] * clip * 5, model["vision, 5 clips"]["seconds"])]
    for planned, measured in pairs:
        assert planned == pytest.approx(measured, rel=0.15)


def test_the_sketch_is_what_was_measured():
    assert sum(p.numel() for p in plan.sketch().parameters()) == MEASURED["5 model"]["build"]["parameters"]


def test_other_cards_are_slower_by_what_bounds_a_rate():
    slow = Speed(hours.Card(80, 989 / 2, 3.35 / 4))
    assert slow.learn(1000, 2, 10) == pytest.approx(2 * H100.learn(1000, 2, 10))
    assert slow.of["seen"] == pytest.approx(4 * H100.of["seen"])
    assert slow.of["pass"] == H100.of["pass"] and slow.of["frame"] == H100.of["frame"]
    assert slow.step(100, 1, 0, 1) == pytest.approx(4 * 0.07 + 4 * 30e-9 * 100)     # no longer the launches


def test_doctests():
    assert all(doctest.testmod(module).failed == 0 for module in (hours, plan, table))


# ================================================================ formulas, by hand
@pytest.fixture
def by_hand():
    """An Estimate whose card holds 4 contexts side by side."""
    _, S = settings("02_phase1_train")
    room = SimpleNamespace(side_by_side=lambda prompt, samples, limit: (4, samples))
    return Estimate(S, H100, room)


def seconds(estimate):
    return estimate.parts[-1].seconds


def test_a_rollout_by_hand(by_hand):
    # 10 contexts in one call are 3 batches. 27 sequences see 1400 tokens, so the card waits for launches: 0.11 s a token.
    # The longest answer has 150 tokens. A pass over 1000 tokens takes 0.1 + 0.0185 + 0.001325 s.
    by_hand.sample("x", 10, 8, 10, prompt=1000, tokens=100, clips=1)
    assert seconds(by_hand) == pytest.approx(3 * 150 * 0.11 + 10 * 0.119825)
    assert "4 x 8 side by side" in by_hand.parts[-1].work
    assert by_hand.tokens == 10 * 8 * 100
    # Two calls of 5 are two batches each.
    by_hand.sample("x", 10, 8, 5, prompt=1000, tokens=100, clips=1)
    assert seconds(by_hand) == pytest.approx(4 * 150 * 0.11 + 10 * 0.119825)
    # A call of fewer than could be handed over is one batch.
    by_hand.sample("x", 2, 8, 10, prompt=1000, tokens=100, clips=1)
    assert seconds(by_hand) == pytest.approx(150 * 0.11 + 2 * 0.119825)
    # Beside long prompts the card is busy: 4 x 8 sequences see 100,000 + 8 x 50 tokens.
    by_hand.sample("x", 4, 8, 4, prompt=100000, tokens=100, clips=1)
    step = 0.07 + 30e-9 * 32 * 100400
    passes = 4 * (0.1 + 18.5e-6 * 1e5 + 2.65e-9 * 5e9)
    assert seconds(by_hand) == pytest.approx(100 * step + 50 * 0.11 + passes)


def test_side_by_side_are_as_many_as_features_and_the_call_allow(by_hand):
    by_hand.S.FEATURE_CLIPS = 10
    by_hand.sample("x", 100, 1, 100)
    assert "2 x 1 side by side" in by_hand.parts[-1].work
    by_hand.sample("x", 100, 1, 1)
    assert "1 x 1 side by side" in by_hand.parts[-1].work


def test_a_group_in_parts_by_hand(by_hand):
    by_hand.room.side_by_side = lambda prompt, samples, limit: (1, 2)    # 2 of 8 answers fit
    by_hand.sample("x", 3, 8, 3, prompt=1000, tokens=100, clips=1)
    assert seconds(by_hand) == pytest.approx(3 * 4 * 150 * 0.11 + 3 * 0.119825)


def test_rows_by_hand(by_hand):
    by_hand.read("x", 3, 1000, 2, 100)                            # 1200 tokens, 710,000 pairs, 200 log-probs
    assert seconds(by_hand) == pytest.approx(3 * (0.1 + 0.0222 + 0.0018815 + 0.0026))
    by_hand.learn("x", 3, 1000, 2, 100)
    assert seconds(by_hand) == pytest.approx(3 * (0.144 + 0.008875))


def test_a_judge_by_hand(by_hand):
    by_hand.S.JUDGE_TOKENS = 100
    # 880 and 120 of the instruction are shared by 5 questions, each adds 94, its reasoning and 6 of the reply.
    by_hand.judge("x", 10, 10, 880, 94, together=5)
    row = 1000 + 5 * 200
    pairs = 1000 ** 2 / 2 + 5 * 200 ** 2 / 2 + 5 * 200 * 1000
    scored = 0.1 + 2 * (18.5e-6 * row + 2.65e-9 * pairs)          # both groups share a row
    prompt = 0.1 + 18.5e-6 * 1094 + 2.65e-9 * 1094 ** 2 / 2
    assert seconds(by_hand) == pytest.approx(3 * 100 * 0.11 + 10 * prompt + scored)
    assert by_hand.calls == 10 and by_hand.tokens == 10 * 100
    # Without reasoning nothing is written. 10 columns of 3,000 take two rows, and 5 stand in each.
    by_hand.judge("x", 10, 10, 880, 2994, together=10, reasons=False)
    pairs = 1000 ** 2 / 2 + 5 * 3000 ** 2 / 2 + 5 * 3000 * 1000
    assert seconds(by_hand) == pytest.approx(2 * (0.1 * 16000 / 16384 + 18.5e-6 * 16000 + 2.65e-9 * pairs))
    assert by_hand.tokens == 10 * 100 and "10 judge calls without reasoning" in by_hand.parts[-1].work
    by_hand.S.JUDGE = "openai:x"
    by_hand.judge("x", 10, 10, 680, 200)
    assert seconds(by_hand) is None and "10 at openai:x, about 10,000 tokens" in by_hand.parts[-1].work


def test_frames_by_hand(by_hand):
    vision, reading = 10 * 2070 * 25e-6, 10 * 20 * 0.015         # 0.5 and 3 s
    for beside, want in ((5.0, vision), (1.0, reading - 1.0), (None, reading)):
        by_hand.parts = [Part("other", "", 99.0)] + ([Part("x", "", beside)] if beside else [])
        by_hand.see("x", 10)                                      # 3 s of reading hide behind 5 s of x, not behind 1
        assert seconds(by_hand) == pytest.approx(want) and by_hand.parts[-1].name == "x: frames"


def test_a_watch_by_hand(by_hand):
    """Four streams at a time, whose clips are seen once: 400 clips of 90 streams are 100 rounds."""
    by_hand.watch("w", 400, 90)
    sampled, frames = by_hand.parts
    alone = Estimate(by_hand.S, H100, by_hand.room)
    alone.sample("w", 400, 1, 4)
    assert sampled.seconds == alone.parts[0].seconds and "4 x 1 side by side" in sampled.work
    assert frames.seconds == pytest.approx(400 * 2070 * 25e-6) and "400 clips" in frames.work


def test_sums(by_hand):
    by_hand.see("a", 10)
    by_hand.steps_begin()
    by_hand.see("b", 20)
    each = 0.3 / 3600
    assert by_hand.hours() == pytest.approx(30 * each)
    assert by_hand.hours_of("a") == pytest.approx(10 * each)
    assert by_hand.hours_of("a", shares=2) == pytest.approx(5 * each)
    assert by_hand.hours_of_steps(4) == pytest.approx(5 * each)


# ================================================================ what the stages do
def test_counts_of_the_stages():
    phase1 = estimated("02_phase1_train", "train")
    assert "8,150 answers" in part(phase1, "histories").work
    assert "3,200 x 8 answers" in part(phase1, "rollout").work
    assert "25,600 judge calls" in part(phase1, "judge: clean").work
    assert "2,400 rows" in part(phase1, "update: old log-probs").work
    assert "10,880 clips" in part(phase1, "rollout: frames").work          # 60 x 32 x 5 + 40 x 32
    cache = estimated("03_collect_tasks", "deploy")
    assert "2,500 x 8 answers" in part(cache, "cache").work
    assert "120 judge calls" in part(cache, "answers").work
    reward = estimated("04_train_reward", "deploy")
    assert "1,575,000 judge calls" in part(reward, "judge: prefer").work     # 28 x 1.5 x 2500 x 1.25 x 12
    assert reward.hours() < 6
    fewer = estimated("04_train_reward", "deploy", "--COMPARISONS=14")
    assert "787,500 judge calls" in part(fewer, "judge: prefer").work
    dpo = estimated("05_phase2_train", "deploy")
    assert "30,720 rows of 11,070 + 2 x 1,350 tokens" in part(dpo, "update").work
    on_policy = estimated("05_phase2_train", "deploy", "--ALGORITHM=grpo")
    assert "15,360 x 8 answers" in part(on_policy, "rollout").work
    four_rows = estimated("06_eval", "test", "--METHODS=base+prompt,dpo-steer")
    assert "36,000 answers" in part(four_rows, "watch: base, Phase One").work
    assert "90,000 answers" in part(four_rows, "watch: the others").work     # 126,000 in all
    few = estimated("06_eval", "test", "--STREAMS=48")             # of which 10 are asked about by an environment
    assert "10 x 1 side by side" in part(few, "watch: the others").work


def test_less_to_do_takes_less():
    whole = estimated("06_eval", "test").hours()
    assert estimated("06_eval", "test", "--STREAMS=300").hours() == pytest.approx(whole / 2, rel=0.1)
    without = estimated("02_phase1_train", "train", "--RICHNESS=0", "--OFF_POLICY_STEPS=0")
    assert not [p for p in without.parts if p.name == "judge: rank" or p.name.startswith("histories")]
    assert part(estimated("02_phase1_train", "train", "--KL=0.1"), "update: reference").seconds > 0


# ================================================================ --PLAN=1
def run(script, *argv):
    """A script as a user starts it, with no network and with a home that holds no model."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, script, *argv], cwd=ROOT, env=env, capture_output=True, text=True)


def test_plan_of_04_without_weights_network_or_run(tmp_path):
    missing = tmp_path / "none"
    done = run("04_train_reward.py", "--PLAN=1", f"--MODEL={THINKING}", f"--RUN={missing}")
    assert done.returncode == 0 and not done.stderr and not missing.exists()
    said = done.stdout
    assert "weights             17.85" in said and "on one H100" in said and "the paper's sizes" in said
    total = estimated("04_train_reward", "deploy").hours()
    assert f"{total:7.1f} h  in all: 0 tokens are written, and 1,575,000 judge calls" in said
    assert "more than a day" not in said


@pytest.mark.parametrize("script", [script for script, _ in table.STAGES.values()])
def test_every_stage_plans_without_a_run(script, tmp_path, capsys):
    stage = importlib.import_module(script)
    stage.main([f"--RUN={tmp_path / 'none'}", "--PLAN=1", f"--MODEL={THINKING}"])
    said = capsys.readouterr().out
    assert f"plan of {script}.py, {THINKING} on one H100" in said and "h  in all: " in said
    assert "byte plan in GiB" in said and not (tmp_path / "none").exists()


def test_plan_on_other_cards(capsys):
    module, S = settings("02_phase1_train", "--PLAN=1", "--CARD=B9")
    with pytest.raises(SystemExit, match="CARD=B9 is unknown: take one of H100, H200"):
        hours.say_plan(S, module.work, hours.PAPER["train"])
    S.CARD = "4090"
    with pytest.raises(SystemExit, match="does not fit: a card of 24.00 GiB"):
        hours.say_plan(S, module.work, hours.PAPER["train"])
    S.CARD = "H200"
    there = hours.say_plan(S, module.work, hours.PAPER["train"])
    assert there.hours() < estimated("02_phase1_train", "train").hours()


def test_what_brings_it_below_a_day(capsys):
    module, S = settings("02_phase1_train", "--PLAN=1")
    planned = hours.say_plan(S, module.work, hours.PAPER["train"], ["STEPS", "KL"])
    assert planned.hours() > hours.DAY
    said = capsys.readouterr().out
    steps = int(re.search(r"--STEPS=(\d+) instead of 100", said)[1])
    assert estimated("02_phase1_train", "train", f"--STEPS={steps}").hours() < hours.DAY
    assert estimated("02_phase1_train", "train", f"--STEPS={steps + 1}").hours() >= hours.DAY
    module, S = settings("06_eval", "--PLAN=1")
    hours.say_plan(S, module.work, hours.PAPER["test"], ["THINK_TOKENS"])
    assert "none of THINK_TOKENS alone" in capsys.readouterr().out
    few = ["--METHODS=dpo-steer", "--THINK_TOKENS=400"]
    _, S = settings("06_eval", "--PLAN=1", *few)
    hours.say_plan(S, module.work, hours.PAPER["test"], ["STREAMS"])
    streams = int(re.search(r"--STREAMS=(\d+) instead of 600", capsys.readouterr().out)[1])
    assert estimated("06_eval", "test", f"--STREAMS={streams}", *few).hours() < hours.DAY


def test_the_judge_of_the_toy_world_is_planned_as_the_local_one(capsys):
    module, S = settings("04_train_reward", "--PLAN=1", "--JUDGE=tiny")
    planned = hours.say_plan(S, module.work, hours.PAPER["deploy"]).hours()
    assert planned == estimated("04_train_reward", "deploy").hours()


def test_sizes_are_those_of_the_streams_that_there_are(tmp_path):
    rows = [{"stream": name, "split": split, "clips": [{}] * clips}
            for name, split, clips in [("a", "test", 3), ("b", "online", 4), ("c", "train", 9)]]
    write_jsonl(tmp_path / "streams" / "streams.jsonl", rows)
    tasks = [{"stream": stream, "environment": kind} for stream, kind in ["aX", "bX", "bY", "bY", "cZ"]]
    write_jsonl(tmp_path / "streams" / "tasks.jsonl", tasks)
    S = common.settings({"__doc__": ""}, [f"--RUN={tmp_path}"])
    found = hours.sizes_of(S, "test")
    assert (found.streams, found.clips, found.environments, found.questions) == (2, 7, 2, 4)
    assert found.clips_asked == (3 + 4 + 4) // 2 and "streams.jsonl" in found.source
    assert hours.sizes_of(S, "train").clips == 9
    S.RUN = "nothing"
    assert hours.sizes_of(S, "train").streams == 326


def test_a_folder_with_a_30b_is_known_by_its_shapes(tmp_path):
    write_json(tmp_path / "config.json", {"text_config": plan.TEXT})
    assert plan.is_30b(str(tmp_path)) and plan.is_30b(THINKING)
    write_json(tmp_path / "config.json", {"text_config": plan.TEXT | {"num_experts": 4}})
    assert not plan.is_30b(str(tmp_path)) and not plan.is_30b("Qwen/Qwen3-VL-8B-Instruct")


# ================================================================ on a run
def test_a_run_says_its_plan_before_it_loads_anything(toy, tmp_path, monkeypatch, capsys):
    phase1 = importlib.import_module("02_phase1_train")

    def stop(S):
        raise SystemExit("loading")
    monkeypatch.setattr(phase1, "load_policy", stop)
    with pytest.raises(SystemExit, match="loading"):
        phase1.main([f"--RUN={tmp_path}", f"--FROM={toy}"])
    said = capsys.readouterr().out
    assert "plan: 4 streams of 24 clips" in said and "judge calls made" in said


def test_the_first_measured_step_corrects_the_plan(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(hours.time, "time", lambda: clock[0])
    said = []

    def walk(durations, planned, skip=0):
        for duration in hours.first_measured(durations, 100, planned, "a step", skip, said.append):
            clock[0] += duration
    walk([672, 5], 12.04)
    assert said == ["measured: 11.2 min a step, so 18.7 h for 100; planned 12.0 h"]
    walk([0.0, 0.5, 36, 99], 2.0)                                 # what was done before takes no time
    assert said[1:] == ["measured: 0.6 min a step, so 1.0 h for 100; planned 2.0 h"]
    walk([36, 36, 72], 2.0, skip=2)                               # the first ones are shorter
    assert said[2:] == ["measured: 1.2 min a step, so 2.0 h for 100; planned 2.0 h"]
    walk([672], None)
    assert len(said) == 3


# ================================================================ the table
def test_the_table_of_hours():
    assert (ROOT / "results" / "hours.md").read_text() == table.page()
    recipe = {number: table.SHORT + table.RECIPE[number] for number in table.STAGES}
    assert sum(table.hours("H100", number, recipe[number], table.MADE) for number in table.STAGES) < hours.DAY


def test_the_commands_of_the_recipe_are_understood():
    for line in table.COMMANDS.replace("\\\n", " ").splitlines()[1:]:
        script = line.split()[1].removesuffix(".py")
        arguments = re.findall(r'--\w+=(?:"[^"]*"|\S+)', line)
        common.settings(vars(importlib.import_module(script)), arguments)


@pytest.fixture(autouse=True)
def no_runs(monkeypatch, tmp_path):
    """What ./run.sh has made in runs/ has no say in these figures."""
    from support import runs
    monkeypatch.setattr(runs, "ROOT", tmp_path)


def test_the_table_of_hours_does_not_depend_on_runs(tmp_path):
    """Captions save 02 its histories; those of the toy world's run have nothing to do with the 30B."""
    from experiments import hours
    before = hours.hours("H100", "02", [], hours.PAPER)
    streams = tmp_path / "runs" / "tiny" / "streams"
    streams.mkdir(parents=True)
    (streams / "captions.jsonl").write_text("")
    assert hours.hours("H100", "02", [], hours.PAPER) == before
