"""The six stages chained at toy size in a temporary folder, in-process: what they publish, that a second run
changes nothing, the teaching views, and the variants of Phase One and Two."""
import csv
import importlib
import math
import os
import re
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from support import runs                                                    # noqa: E402

ENVIRONMENTS = ["action", "count", "object", "place", "speech", "wear"]
ALWAYS = ["--CPU_THREADS=1", "--MAX_NEW_TOKENS=48"]
LOOP = ["--GROUP=4", "--CONTEXTS=3", "--MINI_BATCH=2", "--N_MIN=1", "--N_MAX=3"]
TOY = ["--TRAIN_STREAMS=4", "--DEPLOY_STREAMS=4", "--TEST_STREAMS=2", "--CLIPS=5", "--QUESTIONS=2"]
STAGES = {"01_make_streams": TOY,
          "02_phase1_train": [*LOOP, "--STEPS=2", "--OFF_POLICY_STEPS=1"],
          "03_collect_tasks": ["--CHUNK=7"],
          "04_train_reward": ["--STEPS=4", "--CONTEXTS=3", "--ROWS=3", "--WARMUP=1", "--BOOTSTRAP=50"],
          "05_phase2_train": [*LOOP, "--DPO_STEPS=2", "--PAIRS=2", "--GRPO_STEPS=1"],
          "06_eval": ["--BOOTSTRAP=50", "--VALIDATE=6", "--EXAMPLES=1",
                      "--METHODS=base+prompt,dpo-steer,grpo-steer"]}
ORDER = [("01_make_streams", ()), ("02_phase1_train", ()), ("03_collect_tasks", ()), ("04_train_reward", ()),
         ("05_phase2_train", ()), ("05_phase2_train", ("--ALGORITHM=grpo", "--ENVIRONMENT=place")),
         ("06_eval", ())]


def stage(name, run, *argv):
    torch.set_num_threads(1)
    return importlib.import_module(name).main([f"--RUN={run}", *ALWAYS, *STAGES[name], *argv])


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder of a run in which all six stages have ended."""
    run = tmp_path_factory.mktemp("chain")
    for name, argv in ORDER:
        stage(name, run, *argv)
    return run


def contents(run):
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def names(folder):
    return {p.name for p in folder.iterdir()}


def same_files(before, after, but=()):
    changed = {n for n in before | after if before.get(n) != after.get(n)}
    return {n for n in changed if not re.search("|".join(but) or "$^", n)} == set()


# ================================================================ what is published
def test_streams_and_tasks(chain):
    streams, tasks = (runs.read_jsonl(chain / "streams" / f"{n}.jsonl") for n in ("streams", "tasks"))
    assert sorted(s["split"] for s in streams) == ["deploy"] * 4 + ["test"] * 2 + ["train"] * 4
    for s in streams:
        assert set(s) == {"stream", "split", "source", "clips"} and len(s["clips"]) == 5
        for t, c in enumerate(s["clips"]):
            assert set(c) - {"reader"} == {"clip", "start", "end", "file", "offset", "speech"}
            assert (c["clip"], c["start"], c["end"]) == (t, 10 * t, 10 * t + 10)
            assert (chain / "streams" / c["file"]).is_file()
    split = {s["stream"]: s["split"] for s in streams}
    for t in tasks:
        assert set(t) == {"task", "stream", "environment", "time", "question", "options", "answer"}
        assert t["answer"] in [o[0] for o in t["options"]] and len(t["options"]) == 4
        assert split[t["stream"]] != "train"
    assert sorted({t["environment"] for t in tasks}) == ENVIRONMENTS
    assert len(tasks) == len({t["task"] for t in tasks}) == 6 * 2 * 6


def test_phase1(chain):
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names(chain / "phase1" / "adapter")
    head, *rows = (chain / "phase1" / "log.csv").read_text().split()
    columns = ("step reward reward_std format length quality rich flat malformed truncated gated response "
               "thinking memory kl clipped grad_norm tokens_per_s rollout_s update_s gb").split()
    assert head.split(",") == columns and len(rows) == 2
    assert all(math.isfinite(float(x)) for row in rows for x in row.split(","))
    explained = (runs.ROOT / "02_phase1_train.py").read_text().split(
        "# log.csv, a row a step:")[1].split("\n\n")[0]
    assert not [c for c in columns[1:] if not re.search(rf"\b{c}\b", explained)]  # the script explains each


def test_tasks_and_cache(chain):
    memories = runs.read_jsonl(chain / "tasks" / "memories.jsonl")
    every = [(f"deploy-{i:03}", t) for i in range(4) for t in range(5)]
    assert sorted((m["stream"], m["clip"]) for m in memories) == every
    assert all({"stream", "clip", "start", "end", "memory", "text"} <= set(m) for m in memories)
    assert any(m["memory"] for m in memories)
    assert len(list((chain / "tasks" / "memories").glob("*.txt"))) == 4
    recent = runs.read_json(chain / "tasks" / "recent.json")
    assert sorted(recent) == ENVIRONMENTS
    for environment, asked in recent.items():
        assert len(asked) == 8 and {t["environment"] for t in asked} == {environment}
        assert len({t["stream"] for t in asked[:4]}) == 4         # the first ones come from many streams
        assert {t["reply"] for t in asked} <= {"A", "B", "C", "D", "insufficient"}
        assert all(t["correct"] == (t["reply"] == t["answer"]) for t in asked)
    cache = runs.read_jsonl(chain / "tasks" / "cache.jsonl")
    written = {(m["stream"], m["clip"]): m["memory"] for m in memories}
    assert len(cache) == 20 and not (chain / "tasks" / "cache.part").exists()
    for row in cache:
        assert row["history"] == [written[row["stream"], t]
                                  for t in range(max(0, row["clip"] - 4), row["clip"])]
        assert len(row["samples"]) == 8
        for s in row["samples"]:
            assert {"ids", "text", "memory", "thinking_tokens", "memory_tokens", "format",
                    "quality"} <= set(s)
            assert s["format"] == (0 if s["memory"] else -1.5) and s["quality"] in (0.5, -0.5, 0.0)
            assert s["memory"] == (None if s["truncated"] else common.parse_response(s["text"])[0])


def test_reward(chain):
    folder = chain / "reward"
    cache = {(r["stream"], r["clip"]): r["samples"]
             for r in runs.read_jsonl(chain / "tasks" / "cache.jsonl")}
    preferences, pairs, trl = (runs.read_jsonl(folder / f"{n}.jsonl")
                               for n in ("preferences", "pairs", "pairs_trl"))
    assert preferences and 0 < len(pairs) == len(trl)
    for p in preferences + pairs:
        winner, loser = (cache[p["stream"], p["clip"]][p[k]] for k in ("winner", "loser"))
        assert winner["memory"] and loser["memory"] and winner["memory"] != loser["memory"]
        assert p["environment"] in ENVIRONMENTS
    for p, row in zip(pairs, trl):
        winner, loser = (cache[p["stream"], p["clip"]][p[k]] for k in ("winner", "loser"))
        assert winner["quality"] >= loser["quality"] and winner["quality"] > 0 and p["path"] >= 1
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert (row["chosen"], row["rejected"]) == (winner["text"], loser["text"])
    assert len({(p["environment"], p["stream"], p["clip"])
                for p in pairs}) == len(pairs)                                   # one per context at most
    assert {"adapter_config.json", "adapter_model.safetensors", "head.safetensors"} <= names(folder / "model")
    assert 0 <= runs.read_json(folder / "report.json")["pair_accuracy"]["mean"] <= 1


def test_phase2(chain):
    from safetensors.torch import load_file
    paired = {p["environment"] for p in runs.read_jsonl(chain / "reward" / "pairs.jsonl")}
    made = {p.parent.parent.name
            for p in (chain / "phase2" / "dpo-steer").glob("*/adapter/steer.safetensors")}
    assert made == paired and paired
    for folder in ([chain / "phase2" / "dpo-steer" / e for e in made]
                   + [chain / "phase2" / "grpo-steer" / "place"]):
        (key, vector), = load_file(str(folder / "adapter" / "steer.safetensors")).items()
        assert key == "model.language_model.layers.2.adapter.steer" and vector.shape == (128,)
        assert 0 < vector.norm() < 10 and (folder / "log.csv").exists()
    head, *rows = (chain / "phase2" / "dpo-steer" / sorted(made)[0] / "log.csv").read_text().split()
    assert head == "step,loss,accuracy,margin,norm,grad_norm,seconds" and len(rows) == 2
    assert float(rows[0].split(",")[1]) == pytest.approx(math.log(2), abs=1e-5)   # first, policy = reference
    assert "relevance" in (chain / "phase2" / "grpo-steer" / "place" / "log.csv").read_text().split("\n")[0]


def test_eval(chain):
    results = runs.read_json(chain / "eval" / "results.json")
    rows = {(r["method"], r["environment"], r["scope"]): r for r in results["rows"]}
    assert {m for m, _, _ in rows} == {"base", "base+prompt", "phase1", "dpo-steer", "grpo-steer"}
    for r in results["rows"]:
        a, c, p = (r[k]["mean"] for k in ("accuracy", "coverage", "precision"))
        assert r["questions"] > 0 and 0 <= a <= c <= 1
        assert p is None and c == 0 or a == pytest.approx(c * p, abs=1e-5)
    assert rows["base", "all", "after"]["questions"] == 2 * 2 * 6
    table = (chain / "eval" / "results.md").read_text().lower()
    for method in ("base", "task prompt", "phase one", "dpo-steer", "grpo-steer"):
        assert re.search(rf"^\| .*{method}", table, re.MULTILINE), method
    page = (chain / "eval" / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "data:image/" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)            # one file that opens offline
    assert (chain / "eval" / "memories.jsonl").exists()


# ================================================================ again, shown, forked
def test_a_second_run_changes_nothing(chain, capsys):
    before = contents(chain)
    for name, argv in ORDER:
        capsys.readouterr()
        stage(name, chain, *argv)
        if name[:2] in ("02", "03", "05"):
            assert "finished before: " in capsys.readouterr().out, name
    assert same_files(before, contents(chain))


def test_show_prints_one_group_in_full_and_stops(chain, capsys):
    before = contents(chain)
    stage("02_phase1_train", chain, "--SHOW=1")
    said = capsys.readouterr().out
    assert "<frames>" in said and "You keep the memory" in said and "<think>" in said
    for i in range(4):
        assert f"\n#{i}  " in said
    terms = re.findall(r"format (\S+)  length (\S+)  quality (\S+)  rich (\S+)  \| total (\S+)", said)
    assert len(terms) == 4
    for *parts, total in terms:
        assert sum(map(float, parts)) == pytest.approx(float(total), abs=2e-3)
    assert len(re.findall(r"advantage [+-]\d\.\d\d  (counts|GATED: no policy loss)", said)) == 4
    stage("05_phase2_train", chain, "--SHOW=1", "--ENVIRONMENT=place")
    said = capsys.readouterr().out
    assert "environment place" in said and "winner (" in said and "loser (" in said
    stage("05_phase2_train", chain, "--SHOW=1", "--ENVIRONMENT=place", "--ALGORITHM=grpo")
    said = capsys.readouterr().out
    assert "relevance " in said and len(re.findall(r"advantage [+-]", said)) == 4
    assert same_files(before, contents(chain))


@pytest.mark.parametrize("argv", [
    ("--ADAPTER=lora",), ("--ADAPTER=all",), ("--ADAPTER=lora", "--ALGORITHM=grpo"),
    ("--SCALE_TO_NORM=0.3",), ("--ALGORITHM=grpo", "--RATIO=grpo", "--KL=0.1", "--GATE=0")], ids=" ".join)
def test_variants_of_phase2_in_a_fork(chain, tmp_path, argv):
    """A fork that repeats only what it changes: everything else is read from the
    chain, which stays as it is."""
    before = contents(chain)
    stage("05_phase2_train", tmp_path, f"--FROM={chain}", "--ENVIRONMENT=place", "--DPO_STEPS=1", *argv)
    files, = [{p.name: p for p in f.iterdir()} for f in tmp_path.glob("phase2/*/place/adapter")]
    from safetensors.torch import load_file
    tensors = load_file(str(next(p for n, p in files.items() if n.endswith(".safetensors"))))
    assert all(torch.isfinite(x).all() for x in tensors.values())
    if "--ADAPTER=lora" in argv:
        assert ("adapter_config.json" in files
                and any(x.abs().max() > 0 for n, x in tensors.items() if "lora_B" in n))
    elif "--ADAPTER=all" in argv:
        assert set(files) == {"weights.safetensors", "questions.json"} and len(tensors) > 30
    elif argv[0].startswith("--SCALE"):
        assert next(iter(tensors.values())).norm().item() == pytest.approx(0.3, abs=1e-5)
    assert same_files(before, contents(chain))


def test_all_parameters_in_phase1_and_an_adapter_on_top(chain, tmp_path):
    stage("02_phase1_train", tmp_path, f"--FROM={chain}", "--TRAIN=all", "--STEPS=1", "--RATIO=grpo",
          "--GATE=0", "--RICHNESS=0")
    assert [p.name for p in (tmp_path / "phase1" / "adapter").iterdir()] == ["weights.safetensors"]
    stage("05_phase2_train", tmp_path, f"--FROM={chain}", "--ENVIRONMENT=place", "--DPO_STEPS=1")
    assert (tmp_path / "phase2" / "dpo-steer" / "place" / "adapter" / "steer.safetensors").exists()


def test_without_tasks_the_memories_are_made_and_that_is_all(chain, tmp_path, capsys):
    """Nobody has to ask: 03 on streams without questions."""
    rows = [r for r in runs.read_jsonl(chain / "streams" / "streams.jsonl") if r["stream"] == "deploy-000"]
    for clip in rows[0]["clips"]:
        clip["file"] = str(chain / "streams" / clip["file"])
    runs.write_jsonl(tmp_path / "streams" / "streams.jsonl", rows)
    runs.write_jsonl(tmp_path / "streams" / "tasks.jsonl", [])
    stage("03_collect_tasks", tmp_path, f"--FROM={chain}")
    assert "no tasks ask about these streams" in capsys.readouterr().out
    assert len(runs.read_jsonl(tmp_path / "tasks" / "memories.jsonl")) == 5


def test_another_layer_than_the_model_has_stops(chain, tmp_path):
    with pytest.raises(SystemExit, match="LAYER=22: this model has the layers 0 to 3"):
        stage("05_phase2_train", tmp_path, f"--FROM={chain}", "--LAYER=22")


# ================================================================ several GPUs: each stage on two ranks
RANKS = """
import importlib, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_stages
for name, argv in test_stages.ORDER[2:]:
    test_stages.stage(name, {run!r}, *argv)
"""


def test_two_ranks_publish_what_one_process_does(chain, tmp_path):
    """03 to 06 by torchrun on a copy of 01's and 02's output: the same memories, cache and file names."""
    for name in ("streams", "phase1"):
        shutil.copytree(chain / name, tmp_path / name)
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=str(runs.ROOT), tests=str(runs.ROOT / "tests"),
                                   run=str(tmp_path)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node=2", str(script)], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    script.unlink()
    one, two = contents(chain), contents(tmp_path)
    assert {n.partition(".part")[0] for n in two} == {n for n in one if n.startswith(
        ("streams", "phase1", "tasks", "reward", "phase2", "eval"))}
    for name in ("tasks/memories.jsonl", "tasks/cache.jsonl", "tasks/recent.json", "reward/pairs.jsonl"):
        assert two[name] == one[name], name
    figures = lambda run: [{k: float(v) for k, v in r.items() if k != "seconds"} for r in csv.DictReader(
        (run / "phase2" / "dpo-steer" / "place" / "log.csv").read_text().splitlines())]
    for a, b in zip(figures(chain), figures(tmp_path), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    assert runs.read_json(tmp_path / "reward/report.json")["yield"] == runs.read_json(
        chain / "reward/report.json")["yield"]


# ================================================================ killed at random moments, and resumed
KILLS = """
import os, pathlib, random, sys
sys.path[:0] = [{root!r}, {tests!r}]
import killed, test_stages
from support import runs

SMALL = [("03_collect_tasks", ("--CACHE_STREAMS=2", "--CACHE_CONTEXTS=8", "--CHUNK=3", "--LATER=2")),
         ("04_train_reward", ("--STEPS=3", "--SAVE_EVERY=1", "--CHUNK=2")),
         ("05_phase2_train", ("--ENVIRONMENT=place", "--DPO_STEPS=3", "--SAVE_EVERY=1")),
         ("06_eval", ("--STREAMS=1", "--METHODS=dpo-steer", "--VALIDATE=2", "--TRANSFER=0"))]
AGAIN = SMALL[1:3]                           # once more, for other questions
whole, cut = map(pathlib.Path, sys.argv[1:])
draw = random.Random(7)
killed.load_model_once(test_stages.ALWAYS)


def go_on(run):                              # as 03 does: an environment asks others, and the cache moves on
    file = run / "tasks" / "recent.json"
    recent = runs.read_json(file)
    recent["place"].reverse()
    runs.write_json(file, recent)
    file = run / "tasks" / "cache.jsonl"
    runs.write_jsonl(file, runs.read_jsonl(file)[1:])


for number, (name, argv) in enumerate([*SMALL[:3], *AGAIN, SMALL[3]]):
    if number == 3:
        go_on(whole)
        go_on(cut)
    assert killed.finishes(test_stages.stage, name, whole, *argv, kill_at=10**9)
    kills = 0
    while not killed.finishes(test_stages.stage, name, cut, *argv, kill_at=draw.randint(1, 9 * 3 ** kills)):
        kills += 1
        for part in [*cut.glob("*/*.part"), *cut.glob("*/*/*.part")]:      # and its last line may be torn
            os.truncate(part, max(0, part.stat().st_size - draw.choice([0, 5])))
    print(name, "was killed", kills, "times", flush=True)
"""


def test_killed_stages_go_on_to_the_same_bytes(chain, tmp_path):
    """03 to 06, and in between 04 and 05 again for other questions, each killed by SIGKILL at random writes: nothing is
    lost, made twice, mixed, or kept locked."""
    one, two = tmp_path / "one", tmp_path / "two"
    for run in (one, two):
        for name in ("streams", "phase1"):
            shutil.copytree(chain / name, run / name)
    done = subprocess.run(
        [sys.executable, "-c", KILLS.format(root=str(runs.ROOT), tests=str(runs.ROOT / "tests")), one, two],
        capture_output=True, text=True, timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    kills = [int(line.split()[-2]) for line in done.stdout.splitlines() if "was killed" in line]
    assert len(kills) == 6 and min(kills) >= 1 and "Traceback" not in done.stderr, done.stdout
    before, after = contents(one), contents(two)
    assert before.keys() == after.keys()
    # What holds seconds, or the name of the run or of a process.
    assert same_files(before, after, but=["lock$", r"log\.csv$", r"checkpoint\.pt$", "eval/re"])
    results = [runs.read_json(run / "eval/results.json") | {"run": ""} for run in (one, two)]
    assert results[0] == results[1]
