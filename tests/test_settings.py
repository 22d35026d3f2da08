"""Settings: overrides, what is refused and with which words; --help and import
without any package installed."""
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common                                                               # noqa: E402
import judges                                                               # noqa: E402
import loading                                                              # noqa: E402
from common import both                                                     # noqa: E402

SCRIPTS = ["01_make_streams", "02_phase1_train", "03_collect_tasks", "04_train_reward", "05_phase2_train",
           "06_eval"]
PACKAGES = ["torch", "numpy", "transformers", "decord", "peft", "safetensors", "tqdm", "av", "PIL", "jinja2",
            "bm25s"]
SCRIPT = {"__doc__": "What it does.", "STEPS": both(80, 100), "LR": both(2e-4, 1e-5), "KL": both(0.1, 0.0),
          "RATIO": "gspo", "GROUP": 8, "SCALE": 0.5, "TABLE": {"a": 1}, "lower": 1}
BIG = "--MODEL=Qwen/Qwen3-VL-30B-A3B-Thinking"


def settings(*argv):
    return common.settings(SCRIPT, argv)


def refused(*argv):
    with pytest.raises(SystemExit) as stop:
        settings(*argv)
    return str(stop.value)


def test_values_follow_the_model():
    tiny, full = settings(), settings(BIG)
    assert ((tiny.STEPS, tiny.LR, tiny.KL) == (80, 2e-4, 0.1)
            and (full.STEPS, full.LR, full.KL) == (100, 1e-5, 0.0))
    assert tiny.FRAMES_PER_CLIP == 4 and full.FRAMES_PER_CLIP == 20        # common.py's own
    assert settings("--MODEL=some/folder").STEPS == 100
    assert settings(BIG, "--STEPS=7").STEPS == 7
    assert not hasattr(tiny, "TABLE") and not hasattr(tiny, "lower") and not hasattr(tiny, "PROMPT")


def test_overrides_keep_their_type():
    S = settings("--STEPS=3", "--LR=1e-3", "--RATIO=grpo", "--SCALE=1", "--GROUP=1e1", "--RUN=a=b")
    assert (S.STEPS, S.LR, S.RATIO, S.SCALE, S.GROUP, S.RUN) == (3, 1e-3, "grpo", 1.0, 10, "a=b")
    assert [type(x) for x in (S.STEPS, S.LR, S.SCALE, S.GROUP)] == [int, float, float, int]
    assert settings().STEPS == 80                              # the script's own constants are as they were


@pytest.mark.parametrize("given, nearest", [
    ("--STEP=3", "STEPS"), ("--steps=3", "STEPS"), ("--RATOI=x", "RATIO"), ("--GRUOP=1", "GROUP"),
    ("--MEMORY_TOKEN=3", "MEMORY_TOKENS")])
def test_an_unknown_name_offers_the_nearest(given, nearest):
    said = refused(given)
    assert given in said and said.endswith(f"--{nearest}")


@pytest.mark.parametrize("given", ["STEPS=3", "--STEPS", "-STEPS=3", "--TABLE=1", "--PROMPT=x", "--lower=2",
                                   "--=3", "x"])
def test_what_is_no_setting_is_refused(given):
    assert "write --NAME=value" in refused(given)


@pytest.mark.parametrize("given, kind", [("--STEPS=many", "int"), ("--STEPS=2.5", "int"), ("--STEPS=", "int"),
                                         ("--STEPS=nan", "int"), ("--STEPS=inf", "int"),
                                         ("--LR=fast", "float"), ("--SCALE=1,5", "float")])
def test_a_wrong_type_is_refused(given, kind):
    said = refused(given)
    assert f"{given}: expected {kind}" in said and re.search(r"like [\d.e-]+$", said)


def test_the_embedded_worlds_learning_rate_is_refused_for_a_big_model():
    said = refused(BIG, "--LR=2e-4")
    assert "--LR=2e-4 is the embedded world's value" in said and "1e-05" in said
    assert settings(BIG, "--LR=2e-5").LR == 2e-5 and settings("--LR=2e-4").LR == 2e-4


def test_a_layer_that_the_model_lacks(policy):
    for layer in (policy.layers, 22, -1):
        with pytest.raises(SystemExit, match=rf"LAYER={layer}: this model has the layers 0 to "
                                             rf"{policy.layers - 1}; near 2 "):
            policy.S.LAYER = layer
            policy.add("phase2", "steer")


def test_a_model_that_is_not_there_stops_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "ROOT", tmp_path)                         # no tiny/base here
    with pytest.raises(SystemExit, match="MODEL=tiny can't be loaded"):
        common.load_policy(settings("--CPU_THREADS=1"))


def test_a_difference_stops_and_offers_a_new_run(tmp_path):
    pytest.importorskip("torch")
    run = f"--RUN={tmp_path}"
    out = common.start(settings(run), "phase1")
    assert out == tmp_path / "phase1"
    saved = json.loads((out / "settings.json").read_text())
    assert saved["STEPS"] == 80 and saved["KL"] == 0.1
    common.start(settings(run, "--STEPS=90"), "phase1")                  # nothing was made yet: nothing binds
    common.start(settings(run), "phase1")
    (out / "log.csv").write_text("step\n0\n")
    common.start(settings(run), "phase1")                                # the same again: goes on
    with pytest.raises(SystemExit) as stop:
        common.start(settings(run, "--STEPS=90", "--RATIO=grpo"), "phase1")
    said = str(stop.value)
    assert "STEPS: 80 in the run, 90 now" in said and "RATIO: 'gspo' in the run, 'grpo' now" in said
    assert f"--RUN=NEWNAME --FROM={tmp_path}" in said and "LR" not in said
    assert json.loads((out / "settings.json").read_text()) == saved


def test_the_table_is_printed(tmp_path, capsys):
    pytest.importorskip("torch")
    common.start(settings(f"--RUN={tmp_path}", "--GROUP=3"), "phase1")
    said = capsys.readouterr().out
    assert all(f"{n}={v}" in said for n, v in dict(GROUP=3, STEPS=80, LR=0.0002, K=5).items())


@pytest.mark.parametrize("name, maker", [
    ("streams/streams.jsonl", "01_make_streams"), ("streams/tasks.jsonl", "01_make_streams"),
    ("phase1/adapter", "02_phase1_train"), ("tasks/recent.json", "03_collect_tasks"),
    ("tasks/cache.jsonl", "03_collect_tasks"), ("reward/pairs.jsonl", "04_train_reward"), 
    ("phase2/dpo-steer", "05_phase2_train"), ("eval/results.json", "06_eval")])
def test_a_missing_input_names_its_script(name, maker, tmp_path):
    S = settings(f"--RUN={tmp_path / 'a'}", f"--FROM={tmp_path / 'b'}")
    with pytest.raises(SystemExit) as stop:
        common.need(S, name)
    said = str(stop.value)
    assert f"{name} is missing" in said and f"python {maker}.py --RUN={S.RUN}" in said
    assert S.RUN in said and S.FROM in said and (ROOT / f"{maker}.py").exists()


@pytest.mark.parametrize("script, missing, maker", [
    ("02_phase1_train", "streams/streams.jsonl", "01"), ("03_collect_tasks", "streams/streams.jsonl", "01"),
    ("04_train_reward", "tasks/recent.json", "03"), ("05_phase2_train", "tasks/recent.json", "03"),
    ("06_eval", "streams/streams.jsonl", "01")])
def test_each_script_says_what_it_misses(script, missing, maker, tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(SystemExit, match=rf"{missing} is missing.*{maker}_\w+\.py"):
        importlib.import_module(script).main([f"--RUN={tmp_path}"])


def test_from_reads_what_the_run_lacks(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for run, name in ((one, "streams/x"), (one, "tasks/x"), (two, "tasks/x")):
        common.write_json(run / name, 0)
    S = settings(f"--RUN={two}", f"--FROM={one}")
    assert common.need(S, "streams/x") == one / "streams" / "x"
    assert common.need(S, "tasks/x") == two / "tasks" / "x"               # its own comes first
    with pytest.raises(SystemExit):
        common.need(settings(f"--RUN={two}"), "streams/x")


def test_other_judges_and_bad_choices_stop_with_a_sentence(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(SystemExit, match="JUDGE=oracle"):
        judges.load_judge(settings("--JUDGE=oracle"))
    phase2 = importlib.import_module("05_phase2_train")
    for given in ("--ALGORITHM=ppo", "--ADAPTER=prompt"):
        with pytest.raises(SystemExit, match=f"{given[2:]}.*take"):
            phase2.main([given, f"--RUN={tmp_path}"])
    with pytest.raises(SystemExit, match="SOURCE='web': expected one of tiny, videos"):
        importlib.import_module("01_make_streams").main(["--SOURCE=web", f"--RUN={tmp_path}"])


def test_help_and_import_need_no_package(tmp_path):
    """Side by side, each in a process in which nothing of requirements.txt can be imported."""
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    begin = lambda *argv: subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=env, text=True,
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    blocked = begin("-c", "import torch")                                  # the block works
    running = {s: begin(f"{s}.py", "--help") for s in SCRIPTS}
    wants = {s: begin(f"{s}.py", f"--RUN={tmp_path / s}") for s in SCRIPTS}
    assert blocked.communicate()[1].endswith("torch is blocked\n")
    for script, process in running.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and not err, (script, err)
        doc = re.search(r'"""(.*?)\n', (ROOT / f"{script}.py").read_text()).group(1)
        assert out.startswith(doc) and re.search(r"^Run: ", out, re.MULTILINE), script
        for name in ("RUN", "FROM", "MODEL", "SEED"):
            assert re.search(rf"^  {name} ", out, re.MULTILINE), (script, name)
    for script, process in wants.items():      # without --help: what to install, no traceback
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "run.sh setup" in err and "Traceback" not in err, (script, err)


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_help_shows_both_values(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert not stop.value.code
    said = capsys.readouterr().out
    for name, value in vars(module).items():
        if name.isupper() and isinstance(value, both):
            values = re.escape(f"{value.tiny!r} | {value.full!r}")
            assert re.search(rf"^  {name} +{values}$", said, re.MULTILINE)


def test_the_command_of_another_stage_repeats_what_all_stages_share():
    S = common.settings(vars(importlib.import_module("03_collect_tasks")),
                        ["--RUN=my run", "--JUDGE=local", "--K=3", "--GROUP=4", "--CPU_THREADS=1"])
    said = loading.command(S, "04_train_reward.py", "--ADAPTER=lora")
    assert said == "python 04_train_reward.py '--RUN=my run' --JUDGE=local --K=3 --ADAPTER=lora"
    S = common.settings({"__doc__": ""}, ["--MODEL=some/model"])
    assert loading.command(S, "06_eval.py") == "python 06_eval.py --RUN=tiny --MODEL=some/model"


def test_an_interruption_is_a_sentence():
    """Ctrl-C outside of a training loop, which saves first: no traceback, as all stages go on where they were."""
    code = "import loading\nraise {}"
    ended = lambda error: subprocess.run([sys.executable, "-c", code.format(error)], cwd=ROOT, text=True,
                                         capture_output=True)
    assert "stopped; the same command goes on" in ended("KeyboardInterrupt").stderr
    assert "Traceback" not in ended("KeyboardInterrupt").stderr and ended("KeyboardInterrupt").returncode
    assert "Traceback" in ended("ValueError('x')").stderr
