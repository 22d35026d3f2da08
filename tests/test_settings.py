"""Settings: overrides, what is refused and with which words; what binds a run's folder; --help and import
without any package installed."""
import ast
import importlib
import importlib.util
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
from support import runs                                                    # noqa: E402
from support.runs import per_model                                          # noqa: E402

SCRIPTS = ["01_make_streams", "02_phase1_train", "03_collect_tasks", "04_train_reward", "05_phase2_train",
           "06_eval"]
PACKAGES = ["torch", "numpy", "transformers", "peft", "safetensors", "tqdm", "av", "PIL", "jinja2",
            "bm25s", "pysubs2", "charset_normalizer"]
SCRIPT = {"__doc__": "What it does.", "STEPS": per_model(80, 100), "LR": per_model(2e-4, 1e-5),
          "KL": per_model(0.1, 0.0), "RATIO": "gspo", "GROUP": 8, "SCALE": 0.5, "TABLE": {"a": 1}, "lower": 1,
          "ASK": runs.Prompt("Is it true?")}
BIG = "--MODEL=Qwen/Qwen3-VL-30B-A3B-Thinking"


def settings(*argv):
    return common.settings(SCRIPT, argv)


def refused(*argv):
    with pytest.raises(SystemExit) as stop:
        settings(*argv)
    return str(stop.value)


# ================================================================ constants
def test_values_follow_the_model():
    tiny, full = settings(), settings(BIG)
    assert ((tiny.STEPS, tiny.LR, tiny.KL) == (80, 2e-4, 0.1)
            and (full.STEPS, full.LR, full.KL) == (100, 1e-5, 0.0))
    assert tiny.FRAMES_PER_CLIP == 4 and full.FRAMES_PER_CLIP == 20        # common.py's own
    assert settings("--MODEL=some/folder").STEPS == 100
    assert settings(BIG, "--STEPS=7").STEPS == 7
    assert not any(hasattr(tiny, name) for name in ("TABLE", "lower", "PROMPT", "ASK"))


def test_overrides_keep_their_type():
    S = settings("--STEPS=3", "--LR=1e-3", "--RATIO=grpo", "--SCALE=1", "--GROUP=1e1", "--RUN=a=b")
    assert (S.STEPS, S.LR, S.RATIO, S.SCALE, S.GROUP, S.RUN) == (3, 1e-3, "grpo", 1.0, 10, "a=b")
    assert [type(x) for x in (S.STEPS, S.LR, S.SCALE, S.GROUP)] == [int, float, float, int]
    assert settings().STEPS == 80                              # the script's own constants are as they were
    assert settings(BIG, "--LR=2e-4").LR == 2e-4               # what is asked for is done


@pytest.mark.parametrize("given, nearest", [
    ("--STEP=3", "STEPS"), ("--steps=3", "STEPS"), ("--RATOI=x", "RATIO"), ("--GRUOP=1", "GROUP"),
    ("--MEMORY_TOKEN=3", "MEMORY_TOKENS")])
def test_an_unknown_name_offers_the_nearest(given, nearest):
    said = refused(given)
    assert given in said and said.endswith(f"--{nearest}")


@pytest.mark.parametrize("given", ["STEPS=3", "--STEPS", "-STEPS=3", "--TABLE=1", "--PROMPT=x", "--ASK=x",
                                   "--lower=2", "--=3", "x"])
def test_what_is_no_setting_is_refused(given):
    assert "write --NAME=value" in refused(given)


@pytest.mark.parametrize("given, kind", [("--STEPS=many", "int"), ("--STEPS=2.5", "int"), ("--STEPS=", "int"),
                                         ("--STEPS=nan", "int"), ("--STEPS=inf", "int"),
                                         ("--LR=fast", "float"), ("--SCALE=1,5", "float")])
def test_a_wrong_type_is_refused(given, kind):
    said = refused(given)
    assert f"{given}: expected {kind}" in said and re.search(r"like [\d.e-]+$", said)


def test_the_command_of_another_stage_repeats_what_all_stages_share():
    S = common.settings(vars(importlib.import_module("03_collect_tasks")),
                        ["--RUN=my run", "--JUDGE=local", "--K=3", "--GROUP=4", "--CPU_THREADS=1"])
    said = runs.next_command(S, "04_train_reward.py", "--ADAPTER=lora")
    assert said == "python 04_train_reward.py '--RUN=my run' --JUDGE=local --K=3 --ADAPTER=lora"
    assert runs.next_command(settings("--MODEL=some/model"), "06_eval.py") == (
        "python 06_eval.py --MODEL=some/model")
    assert runs.next_command(settings("--STEPS=3"), "06_eval.py") == "python 06_eval.py"


def test_a_layer_that_the_model_lacks(policy):
    for layer in (policy.layers, 22, -1):
        with pytest.raises(SystemExit, match=rf"LAYER={layer}: this model has the layers 0 to "
                                             rf"{policy.layers - 1}; near 2 "):
            policy.S.LAYER = layer
            policy.add("phase2", "steer")


def test_a_model_that_is_not_there_stops_with_a_sentence(tmp_path, monkeypatch):
    weights = pytest.importorskip("support.weights")
    monkeypatch.setattr(weights, "ROOT", tmp_path)                         # no tiny/base here
    with pytest.raises(SystemExit, match="MODEL=tiny can't be loaded"):
        common.load_policy(settings("--CPU_THREADS=1"))


# ================================================================ what binds a run's folder
def test_a_difference_stops_and_offers_a_new_run(tmp_path):
    pytest.importorskip("torch")
    run = f"--RUN={tmp_path}"
    out = runs.start(settings(run), "phase1")
    assert out == tmp_path / "phase1"
    saved = json.loads((out / "settings.json").read_text())
    assert saved["STEPS"] == 80 and saved["KL"] == 0.1
    runs.start(settings(run, "--STEPS=90"), "phase1")                    # nothing was made yet: nothing binds
    runs.start(settings(run), "phase1")
    (out / "log.csv").write_text("step\n0\n")
    runs.start(settings(run), "phase1")                                  # the same again: goes on
    runs.start(settings(run, "--CPU_THREADS=1"), "phase1")               # what changes no result may change
    with pytest.raises(SystemExit) as stop:
        runs.start(settings(run, "--STEPS=90", "--RATIO=grpo"), "phase1")
    said = str(stop.value)
    assert "STEPS: 80 in the run, 90 now" in said and "RATIO: 'gspo' in the run, 'grpo' now" in said
    assert f"--RUN=NEWNAME --FROM={tmp_path}" in said and "LR" not in said
    assert json.loads((out / "settings.json").read_text()) == saved


def test_a_stage_says_in_a_line_where_it_works_and_keeps_all_constants_there(tmp_path, capsys):
    pytest.importorskip("torch")
    out = runs.start(settings(f"--RUN={tmp_path}", "--GROUP=3"), "phase1")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(out) in said and "settings.json" in said
    saved = json.loads((out / "settings.json").read_text())
    assert saved | dict(GROUP=3, STEPS=80, LR=0.0002, K=5, SOURCES={}) == saved


FORK = '''"""A script that somebody edits."""
from functools import cache, wraps
from support.runs import Prompt

ASK = Prompt("Is it true?")
OTHER = Prompt("Nobody asks this.")
LEVELS = (0.5, -0.5)
TERMS = {"length": lambda x: x}
WEIGHT = 0.1


def timed(function):
    @wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper


@cache
def length(text):
    return len(text)


@timed
def halved(text):
    """What it is."""
    return length(text) / 2          # half of it


def reward(text):
    def inner(x):
        return LEVELS[0] * x
    return inner(halved(text)) + TERMS["length"](WEIGHT) + len(ASK)


def unused(text):
    return 0
'''


def fork(folder, *edits):
    """FORK with some text replaced, as a module of its own."""
    text = FORK
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "02_mine.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location("mine", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sources_are_those_that_a_function_uses(tmp_path):
    found = runs.sources(fork(tmp_path).reward)
    assert set(found) == {"reward", "halved", "timed", "length", "ASK", "LEVELS", "TERMS"}
    assert runs.sources(fork(tmp_path / "again").reward) == found


@pytest.mark.parametrize("edit, changed", [
    (("Is it true?", "Is it really true?"), {"ASK"}), (("(0.5, -0.5)", "(0.5, -1)"), {"LEVELS"}),
    (("len(text)", "len(text) + 1"), {"length"}), (("/ 2", "/ 3"), {"halved"}), (("[0] * x", "[0] + x"), {"reward"}),
    (("@timed\n", ""), {"halved", "timed"}),
    (("# half of it", "# a half"), set()), (('"""What it is."""', '"""Half."""'), set()),
    (('    """What it is."""\n', ""), set()), (("inner(halved(text)) +", "inner(\n        halved(text)) +"), set()),
    (("Nobody asks this.", "Nobody."), set()), (("return 0", "return 1"), set()),
    (("WEIGHT = 0.1", "WEIGHT = 0.2"), set())])                            # stands in the settings by itself
def test_an_edit_of_what_counts_is_seen(edit, changed, tmp_path):
    before = runs.sources(fork(tmp_path / "before").reward)
    after = runs.sources(fork(tmp_path / "after", edit).reward)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == changed


def test_equal_names_of_two_scripts_are_kept_apart(tmp_path):
    one = fork(tmp_path / "one")
    two = fork(tmp_path / "two", ("/ 2", "/ 3"))
    both = runs.sources(one.reward, two.reward)
    assert both["halved"] == runs.sources(one.reward)["halved"]
    assert both["halved of 02_mine.py"] == runs.sources(two.reward)["halved"]


def test_an_edited_prompt_or_reward_asks_for_a_new_run(tmp_path, capsys):
    pytest.importorskip("torch")
    S = settings(f"--RUN={tmp_path / 'run'}")
    out = runs.start(S, "phase1", fork(tmp_path).reward)
    (out / "log.csv").write_text("step\n0\n")
    runs.start(S, "phase1", fork(tmp_path / "comment", ("# half of it", "# a half")).reward)
    with pytest.raises(SystemExit) as stop:
        runs.start(S, "phase1", fork(tmp_path / "edited", ("Is it true?", "Is it?"), ("/ 2", "/ 3")).reward)
    said = str(stop.value)
    assert "ASK: the text or code of it has changed" in said and "halved: the text or code" in said
    assert "reward:" not in said and f"--RUN=NEWNAME --FROM={S.RUN}" in said


def test_a_later_script_says_what_differs_from_a_fork(tmp_path, capsys):
    """02_mine.py was run; 03 uses what 02_phase1_train.py has."""
    pytest.importorskip("torch")
    S = settings(f"--RUN={tmp_path / 'run'}")
    S.SCRIPT = "02_mine.py"
    out = runs.start(S, "phase1", fork(tmp_path, ("Is it true?", "Is it?")).reward)
    capsys.readouterr()
    original = fork(tmp_path / "original")
    runs.say_what_differs(out, "02_phase1_train.py", original.reward)
    said = capsys.readouterr().out
    assert "made by 02_mine.py with another ASK than 02_phase1_train.py has" in said and "'02_phase1_train'" in said
    runs.say_what_differs(out, "02_phase1_train.py", original.length)      # the same in both
    runs.say_what_differs(tmp_path, "02_phase1_train.py", original.reward)  # made by hand: no settings
    assert capsys.readouterr().out == ""


def test_sources_of_a_script_that_is_run(tmp_path):
    """Its functions are those of `__main__`; an import of it finds the same."""
    fork(tmp_path)
    with open(tmp_path / "02_mine.py", "a") as file:
        file.write(f"\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                   "from support.runs import sources\nprint(__name__, sources(reward))\n")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "02_mine.py"], env=env, capture_output=True, text=True)
    assert done.stdout == f"__main__ {runs.sources(fork(tmp_path / 'again').reward)}\n", done.stderr


@pytest.mark.parametrize("name", ["02_phase1_train", "03_collect_tasks", "05_phase2_train"])
def test_the_stages_bind_their_prompts_and_rewards(name, monkeypatch, tmp_path):
    """What a stage hands to `start` holds the prompts that its judges or its policy read."""
    pytest.importorskip("torch")
    module = importlib.import_module(name)
    handed = []

    def note(S, stage, *functions, **options):
        handed.extend(functions)
        raise SystemExit("seen")
    monkeypatch.setattr(module, "start", note)
    monkeypatch.setattr(module, "need", lambda S, name: tmp_path, raising=False)
    with pytest.raises(SystemExit, match="seen"):
        module.main([f"--RUN={tmp_path}"])
    found = runs.sources(*handed)
    expected = {"02_phase1_train": {"rewards", "quality", "FAITHFUL", "CLEAN", "RICHEST", "PROMPT", "TASK_PROMPT"},
                "03_collect_tasks": {"ANSWER", "GRADE", "FAITHFUL", "CLEAN", "PROMPT"},
                "05_phase2_train": {"PROMPT", "TASK_PROMPT"}}[name]
    assert expected <= found.keys(), expected - found.keys()


# ================================================================ inputs
@pytest.mark.parametrize("name, maker", [
    ("streams/streams.jsonl", "01_make_streams"), ("streams/tasks.jsonl", "01_make_streams"),
    ("phase1/adapter", "02_phase1_train"), ("tasks/recent.json", "03_collect_tasks"),
    ("tasks/cache.jsonl", "03_collect_tasks"), ("reward/pairs.jsonl", "04_train_reward"),
    ("phase2/dpo-steer", "05_phase2_train"), ("eval/results.json", "06_eval")])
def test_a_missing_input_names_its_script(name, maker, tmp_path):
    S = settings(f"--RUN={tmp_path / 'a'}", f"--FROM={tmp_path / 'b'}")
    with pytest.raises(SystemExit) as stop:
        runs.need(S, name)
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
        runs.write_json(run / name, 0)
    S = settings(f"--RUN={two}", f"--FROM={one}")
    assert runs.need(S, "streams/x") == one / "streams" / "x"
    assert runs.need(S, "tasks/x") == two / "tasks" / "x"                 # its own comes first
    with pytest.raises(SystemExit):
        runs.need(settings(f"--RUN={two}"), "streams/x")


def test_other_judges_and_bad_choices_stop_with_a_sentence(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(SystemExit, match="JUDGE=oracle"):
        common.load_judge(settings("--JUDGE=oracle"), lambda: None)
    phase2 = importlib.import_module("05_phase2_train")
    for given in ("--ALGORITHM=ppo", "--ADAPTER=prompt"):
        with pytest.raises(SystemExit, match=f"{given[2:]}.*take"):
            phase2.main([given, f"--RUN={tmp_path}"])
    with pytest.raises(SystemExit, match="SOURCE='?web'?: expected one of tiny, videos"):
        importlib.import_module("01_make_streams").main(["--SOURCE=web", f"--RUN={tmp_path}"])


# ================================================================ --help, and nothing installed
def test_help_and_import_need_no_package(tmp_path):
    """Side by side, each in a process in which nothing of requirements.txt can be imported."""
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}

    def begin(*argv):
        return subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=env, text=True,
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


def test_every_room_can_be_imported_without_a_package(tmp_path):
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')")
    rooms = sorted(f"support.{path.stem}" for path in (ROOT / "support").glob("*.py") if path.stem != "__init__")
    code = "".join(f"import {room}\n" for room in rooms)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_help_shows_both_values(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert not stop.value.code
    said = capsys.readouterr().out
    for name, value in vars(module).items():
        if name.isupper() and isinstance(value, per_model):
            values = re.escape(f"{value.tiny!r} | {value.full!r}")
            assert re.search(rf"^  {name} +{values}$", said, re.MULTILINE)


def test_help_offers_no_constant_of_the_machinery(capsys):
    """Only what a script or common.py says in its fenced block."""
    with pytest.raises(SystemExit):
        common.settings(vars(importlib.import_module("02_phase1_train")), ["--help"])
    said = capsys.readouterr().out
    assert not re.search(r"^  (ROOT|RANK|WORLD|FILES|PROMPT|WRITERS|UNLIMITED|BLOCK|F) ", said, re.MULTILINE)


def test_an_interruption_is_a_sentence(tmp_path):
    """Ctrl-C outside of a training loop, which saves first: no traceback, as all stages go on where they were."""
    (tmp_path / "torch.py").write_text("raise ImportError('not needed here, and slow')")

    def ended(error, rank="0"):
        env = os.environ | {"RANK": rank, "PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", f"import support.runs\nraise {error}"], cwd=ROOT, env=env,
                              text=True, capture_output=True)
    interrupted = ended("KeyboardInterrupt")
    assert "stopped; the same command goes on" in interrupted.stderr and interrupted.returncode
    assert "Traceback" not in interrupted.stderr
    assert ended("KeyboardInterrupt", rank="1").stderr == ""               # rank 0 alone says so
    assert "Traceback" in ended("ValueError('x')").stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_imported_number_is_no_setting(script):
    """It would show in --help, do nothing there, and bind the runs that know it."""
    assigned = set()
    for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
        if isinstance(node, ast.Assign):
            assigned |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    shared = vars(common.settings({"__doc__": ""}, []))
    own = vars(common.settings(vars(importlib.import_module(script)), [])).keys() - shared.keys()
    assert own <= assigned and own


def test_a_refused_try_binds_nothing(tmp_path):
    """Of 05 with a layer that the model lacks stays an empty folder with a lock."""
    pytest.importorskip("torch")
    out = runs.start(settings(f"--RUN={tmp_path}"), "phase2/dpo-steer")
    (out / "place").mkdir()
    (out / "place" / "lock").write_text("process 1 on there")
    (out / "settings.json.aside").write_text("{")
    assert runs.start(settings(f"--RUN={tmp_path}", "--STEPS=7"), "phase2/dpo-steer") == out
    (out / "place" / "log.csv").write_text("step")
    with pytest.raises(SystemExit, match="was made with other settings"):
        runs.start(settings(f"--RUN={tmp_path}", "--STEPS=8"), "phase2/dpo-steer")


def test_a_reader_who_has_enough_sees_no_traceback():
    """--help | head"""
    process = subprocess.Popen([sys.executable, "-u", "06_eval.py", "--help"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60)
