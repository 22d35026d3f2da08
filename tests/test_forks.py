"""A fork as the README proposes it: a copy of 02 with another judge prompt and another reward, in a copied repository.

The edits take effect; the run remembers which script made it and refuses to go on after another edit; 03 says what
differs, and is silent once it imports the fork.
"""
import csv
import json
import os
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from support import runs                                                    # noqa: E402

SIZES = ["--CPU_THREADS=1", "--MAX_NEW_TOKENS=48"]
PHASE1 = ["--GROUP=3", "--CONTEXTS=2", "--MINI_BATCH=2", "--STEPS=1", "--OFF_POLICY_STEPS=1"]
TASKS = ["--CACHE_CONTEXTS=2", "--GROUP=2"]

# What a reader of 02 would edit: (before, after).
OTHER_PROMPT = ("Is all that the new memory says supported", "Is every word of the new memory supported")
NEW_TERM = ("            sample.terms = {", """\
            r_brief = -0.01 * sample.memory_tokens if well_formed else 0.0
            sample.terms = {"brief": r_brief,
               """)
OTHER_TERM = ("-0.01 * sample.memory_tokens", "-0.02 * sample.memory_tokens")

# The toy world's judge reads no prompts, so what it is asked by is noted.
NOTES = """

ask = Judge.ask


def ask_and_note(self, prompt, items):
    import json
    with open("asked.jsonl", "a") as file:
        file.write(json.dumps([prompt.name, prompt]) + "\\n")
    return ask(self, prompt, items)


Judge.ask = ask_and_note
"""
# 03 up to where it would load the model, which is after it has said what differs.
UP_TO_THE_MODEL = """
import importlib
import sys
collect = importlib.import_module("03_collect_tasks")


def stop(S):
    raise SystemExit(0)


collect.load_policy = stop
collect.main(sys.argv[1:])
"""


def edit(file, *edits):
    text = file.read_text(encoding="utf-8")
    for before, after in edits:
        assert before in text, f"{file.name} no longer holds {before!r}"
        text = text.replace(before, after)
    file.write_text(text, encoding="utf-8")


def call(house, *command, fails=False):
    """What a command prints, run in the copied repository."""
    done = subprocess.run([sys.executable, *command], cwd=house, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    said = done.stdout + done.stderr
    assert bool(done.returncode) == fails, said
    return said


def asked(house):
    """{name: {texts}} of the prompts that the judge was asked by; they are forgotten."""
    notes = house / "asked.jsonl"
    found = {}
    for line in notes.read_text().splitlines():
        name, text = json.loads(line)
        found.setdefault(name, set()).add(text)
    notes.unlink()
    return found


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the repository, with 02_mine.py beside 02."""
    house = tmp_path_factory.mktemp("fork") / "house"
    house.mkdir()
    for file in runs.ROOT.glob("*.py"):
        shutil.copy(file, house)
    for folder in ("support", "tiny"):
        shutil.copytree(runs.ROOT / folder, house / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(house / "02_phase1_train.py", house / "02_mine.py")
    edit(house / "02_mine.py", OTHER_PROMPT, NEW_TERM)
    with open(house / "tiny" / "world.py", "a") as file:
        file.write(NOTES)
    return house


@pytest.fixture(scope="module")
def phase1(house, toy):
    """Arguments of all scripts, once the fork has made a Phase One."""
    arguments = ["--RUN=mine", f"--FROM={toy}", *SIZES]
    call(house, "02_mine.py", *arguments, *PHASE1)
    return arguments


def test_the_fork_takes_effect(house, phase1):
    folder = house / "runs" / "mine" / "phase1"
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    # ---- the new term of the reward has a column of its own, and is in the sum
    with open(folder / "log.csv", newline="") as file:
        [row] = csv.DictReader(file)
    terms = [float(row[name]) for name in ("brief", "format", "length", "quality", "rich")]
    assert terms[0] < -0.05 and sum(terms) == pytest.approx(float(row["reward"]), abs=1e-4)
    # ---- the edited prompt reaches the judge, and the others as they were
    original = common.stage("02_phase1_train")
    found = asked(house)
    assert found["faithful"] == {original.FAITHFUL.replace(*OTHER_PROMPT)}
    assert found["clean"] == {original.CLEAN}
    # ---- the run remembers both
    settings = runs.read_json(folder / "settings.json")
    assert settings["SCRIPT"] == "02_mine.py"
    before = runs.sources(original.rewards, common.build_prompt)
    changed = {name for name, code in before.items() if settings["SOURCES"][name] != code}
    assert changed == {"FAITHFUL", "rewards"}


def test_a_run_does_not_go_on_after_an_edit(house, phase1):
    instruction = ("You keep the memory of an endless video.", "You remember a video.")
    edit(house / "common.py", instruction)
    edit(house / "02_mine.py", OTHER_TERM)
    said = call(house, "02_mine.py", *phase1, *PHASE1, fails=True)
    edit(house / "common.py", instruction[::-1])
    edit(house / "02_mine.py", OTHER_TERM[::-1])
    reasons = [line.strip() for line in said.splitlines() if line.startswith("  ")]
    assert reasons == ["PROMPT: the text or code of it has changed since",
                       "rewards: the text or code of it has changed since"], said
    assert "--RUN=NEWNAME --FROM=mine" in said
    assert "finished before" in call(house, "02_mine.py", *phase1, *PHASE1)      # as it was


def test_what_reads_the_fork_says_so_until_it_imports_it(house, phase1):
    said = call(house, "-c", UP_TO_THE_MODEL, *phase1, *TASKS)
    [warning] = [line for line in said.splitlines() if line.startswith("***")]
    assert "was made by 02_mine.py with another FAITHFUL than 02_phase1_train.py has" in warning
    # ---- the cure that it names, in the one line that it means
    assert "put its name in the place of '02_phase1_train' where the scripts after it import that" in warning
    edit(house / "03_collect_tasks.py", ('stage("02_phase1_train")', 'stage("02_mine")'))
    said = call(house, "03_collect_tasks.py", *phase1, *TASKS)
    assert "02_mine" not in said and "another" not in said, said
    original = common.stage("02_phase1_train")
    assert asked(house)["faithful"] == {original.FAITHFUL.replace(*OTHER_PROMPT)}
    assert len(runs.read_jsonl(house / "runs" / "mine" / "tasks" / "cache.jsonl")) == 2
