"""04 and 05 run again: environments whose recent questions have changed are done anew, the others are left, and
whatever is interrupted in between mixes nothing. Questions need no answers."""
import importlib
import random
import shutil
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from support import runs                                                    # noqa: E402
from support.checkpoint import Training                                     # noqa: E402
from support.weights import save_adapter                                    # noqa: E402
from test_reward import make_samples                                        # noqa: E402
from tiny import world                                                      # noqa: E402

reward, phase2 = common.stage("04_train_reward"), common.stage("05_phase2_train")
KINDS = ("place", "wear", "object")
ARGUMENTS = {"04_train_reward": ["--STEPS=3", "--CONTEXTS=3", "--ROWS=3", "--WARMUP=1", "--BOOTSTRAP=20"],
             "05_phase2_train": ["--DPO_STEPS=2", "--PAIRS=3", "--GRPO_STEPS=1", "--GROUP=4", "--CONTEXTS=2",
                                 "--MINI_BATCH=2", "--N_MIN=1", "--N_MAX=2"]}


def stage(name, run, *argv):
    torch.set_num_threads(1)
    importlib.import_module(name).main(
        [f"--RUN={run}", "--CPU_THREADS=1", "--MAX_NEW_TOKENS=32", *ARGUMENTS[name], *argv])


def cache_of(run, tokenizer, numbers):
    """Rows of a rollout cache of some of the deployment streams, as 03 would write them."""
    rows = []
    truth = runs.read_jsonl(run / "streams" / "truth.jsonl")
    for row in truth:
        if row["stream"] in [f"deploy-{n:03d}" for n in numbers]:
            rng = random.Random(f"{row['stream']} {row['clip']}")
            samples = make_samples(rng, row["facts"])
            for sample in samples:
                sample["ids"] = tokenizer(sample["text"], add_special_tokens=False)["input_ids"]
            rows.append({"stream": row["stream"], "clip": row["clip"], "history": [], "environments": [*KINDS],
                         "samples": samples})
    return rows


def questions(kind, first, count=10):
    """Tasks of one kind, numbered: the same numbers are the same questions."""
    rows = []
    for i in range(first, first + count):
        tasks = world.make_tasks("x", world.make_stream(i), random.Random(i), 1)
        rows += [task | {"task": f"{kind}-{i}", "reply": "A", "correct": True} for task in tasks
                 if task["environment"] == kind]
    return rows


@pytest.fixture(scope="module")
def begun(tmp_path_factory, loaded):
    """A run after 04 and 05, with the streams 0, 1 and 2 in the cache."""
    run = tmp_path_factory.mktemp("begun")
    importlib.import_module("01_make_streams").main(
        [f"--RUN={run}", "--TRAIN_STREAMS=1", "--DEPLOY_STREAMS=5", "--TEST_STREAMS=1", "--CLIPS=3"])
    loaded.add("phase1", "lora")
    save_adapter(loaded, "phase1", run / "phase1" / "adapter")
    loaded.drop("phase1")
    runs.write_jsonl(run / "tasks" / "cache.jsonl", cache_of(run, loaded.tokenizer, (0, 1, 2)))
    runs.write_json(run / "tasks" / "recent.json", {kind: questions(kind, 0) for kind in KINDS})
    stage("04_train_reward", run)
    stage("05_phase2_train", run)
    return run


@pytest.fixture
def run(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


def go_on(run, tokenizer, numbers=(1, 2, 3, 4)):
    """What 03 does meanwhile: "wear" asks other questions; the cache has grown and lost its oldest stream."""
    recent = runs.read_json(run / "tasks" / "recent.json")
    runs.write_json(run / "tasks" / "recent.json", recent | {"wear": questions("wear", 3)})
    runs.write_jsonl(run / "tasks" / "cache.jsonl", cache_of(run, tokenizer, numbers))


def rows_of(run, name, kind):
    return [row for row in runs.read_jsonl(run / "reward" / name) if row["environment"] == kind]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "lock"}


def note_judge(monkeypatch):
    """The questions that the judge of 04 is asked by."""
    seen, load = [], common.load_judge

    def loads(S, *arguments, **options):
        judge = load(S, *arguments, **options)
        ask = judge.ask
        judge.ask = lambda prompt, items: (seen.extend(tuple(item["questions"]) for item in items), ask(prompt, items))[1]
        return judge
    monkeypatch.setattr(reward, "load_judge", loads)
    return seen


def texts(tasks):
    return [task["question"] for task in tasks]


# ================================================================ 04
def test_only_what_changed_is_judged_again(begun, run, loaded, monkeypatch, capsys):
    go_on(run, loaded.tokenizer)
    seen = note_judge(monkeypatch)
    stage("04_train_reward", run)
    assert "changed: wear; as before: place, object\n" in capsys.readouterr().out
    new = runs.read_json(run / "tasks" / "recent.json")["wear"]
    assert set(seen) == {tuple(texts(new[:5])), tuple(texts(new[5:]))}
    # The others keep verdicts, pairs and preferences, of the lost stream too.
    for kind in ("place", "object"):
        for name in (f"{kind}.jsonl", f"{kind}.later.jsonl"):
            file = f"reward/verdicts/{name}"
            assert (run / file).read_bytes() == (begun / file).read_bytes()
        for name in ("pairs.jsonl", "preferences.jsonl"):
            assert rows_of(run, name, kind) == rows_of(begun, name, kind)
            assert {row["stream"] for row in rows_of(run, name, kind)} == {f"deploy-00{n}" for n in (0, 1, 2)}
    assert {row["stream"] for row in rows_of(run, "preferences.jsonl", "wear")} == {f"deploy-00{n}" for n in (1, 2, 3, 4)}
    # R has learned anew, and from no stream where any environment is validated: 2 of before, 4 of now.
    one, two = (folder / "reward/model/head.safetensors" for folder in (begun, run))
    assert one.read_bytes() != two.read_bytes()
    assert len((run / "reward/log.csv").read_text().splitlines()) == 4


def test_r_never_learns_where_any_environment_is_validated(run, loaded, monkeypatch):
    go_on(run, loaded.tokenizer)
    learned = []
    train = reward.train_reward_model
    monkeypatch.setattr(reward, "train_reward_model", lambda S, out, policy, contexts, *rest: (
        learned.extend(contexts), train(S, out, policy, contexts, *rest))[1])
    tested = []
    validate = reward.validate
    monkeypatch.setattr(reward, "validate", lambda model, contexts, *rest, **options: (
        tested.extend(contexts), validate(model, contexts, *rest, **options))[1])
    stage("04_train_reward", run)
    streams = {kind: {c.stream for c in tested if c.environment == kind} for kind in KINDS}
    assert streams == {"place": {"deploy-002"}, "object": {"deploy-002"}, "wear": {"deploy-004"}}
    assert {c.stream for c in learned if c.environment == "place"} == {"deploy-000", "deploy-001"}
    assert {c.stream for c in learned if c.environment == "wear"} == {"deploy-001", "deploy-003"}


def test_nothing_new_ends_at_once(run, monkeypatch, capsys, loaded):
    def refuse(*arguments, **options):
        raise AssertionError("loaded")
    for module in (reward, phase2):
        for name in ("load_policy", "load_judge"):
            monkeypatch.setattr(module, name, refuse)
    # A cache that has moved on is no reason by itself.
    runs.write_jsonl(run / "tasks" / "cache.jsonl", cache_of(run, loaded.tokenizer, (3, 4)))
    before = contents(run)
    for name in ARGUMENTS:
        capsys.readouterr()
        stage(name, run)
        assert "finished before" in capsys.readouterr().out
    assert contents(run) == before


def test_a_new_environment_is_judged_over_the_cache_as_it_is(run, loaded, capsys):
    """The cache may be older than the environment, and not name it."""
    go_on(run, loaded.tokenizer)
    recent = runs.read_json(run / "tasks/recent.json")
    runs.write_json(run / "tasks/recent.json", recent | {"mixed": questions("place", 20, 3) + questions("wear", 20, 2)})
    stage("04_train_reward", run)
    assert "new: mixed; changed: wear; as before: place, object" in capsys.readouterr().out
    assert {row["stream"] for row in rows_of(run, "pairs.jsonl", "mixed")} == {f"deploy-00{n}" for n in (1, 2, 3, 4)}
    stage("05_phase2_train", run, "--ALGORITHM=grpo", "--ENVIRONMENT=mixed")
    assert (run / "phase2/grpo-steer/mixed/adapter/steer.safetensors").exists()


def stop_after(monkeypatch, steps):
    """Interrupts a training, as Ctrl-C does."""
    log = Training.log

    def stops(training, *row):
        log(training, *row)
        if len(training.rows) == steps:
            training.signals.append(0.0)
    monkeypatch.setattr(Training, "log", stops)


def test_an_interrupted_training_of_r_goes_on_only_with_what_it_began_with(begun, run, tmp_path, loaded, monkeypatch):
    """Interrupted, then other questions: as if it had never begun."""
    shutil.copytree(begun, tmp_path / "whole")
    for folder in (run, tmp_path / "whole"):
        go_on(folder, loaded.tokenizer)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit, match="stopped after step 1"):
            stage("04_train_reward", run)
    last = runs.read_json(run / "tasks/recent.json") | {"wear": questions("wear", 7)}
    for folder in (run, tmp_path / "whole"):
        runs.write_json(folder / "tasks/recent.json", last)
        stage("04_train_reward", folder)
    one, two = (contents(folder / "reward" / "model") for folder in (run, tmp_path / "whole"))
    assert one == two
    with monkeypatch.context() as patch:                   # with the same questions it goes on
        runs.write_json(run / "tasks/recent.json", last | {"wear": questions("wear", 9)})
        runs.write_json(tmp_path / "whole/tasks/recent.json", last | {"wear": questions("wear", 9)})
        stop_after(patch, 2)
        with pytest.raises(SystemExit, match="stopped after step 1"):
            stage("04_train_reward", run)
    begins = []
    resume = Training.resume
    with monkeypatch.context() as patch:
        patch.setattr(Training, "resume", lambda training: (resume(training), begins.append(training.first)))
        stage("04_train_reward", run)
    stage("04_train_reward", tmp_path / "whole")
    one, two = (contents(folder / "reward" / "model") for folder in (run, tmp_path / "whole"))
    assert begins == [2] and one == two


def test_what_failed_is_asked_again_until_r_has_begun(run, loaded, monkeypatch, capsys):
    """A failed verdict of a changed environment is asked for again; one that R has learned without is left."""
    go_on(run, loaded.tokenizer)
    file = run / "reward/verdicts/place.jsonl"
    head, *rows = runs.read_jsonl(file)
    rows[0]["verdicts"][0][2] = "failed"
    runs.write_jsonl(file, [head, *rows])
    begun_with = runs.read_json(run / "reward/questions.json")
    seen = note_judge(monkeypatch)
    place = tuple(texts(runs.read_json(run / "tasks/recent.json")["place"][:5]))
    stage("04_train_reward", run)
    assert seen and place not in seen
    seen.clear()
    (run / "reward/questions.json").unlink()               # R had never begun
    stage("04_train_reward", run)
    assert place in seen and begun_with != runs.read_json(run / "reward/questions.json")
    assert all(said != "failed" for row in runs.read_jsonl(file)[-9:] for _, _, said in row["verdicts"])


# ================================================================ 05
@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_only_adapters_of_other_questions_are_trained_again(begun, run, loaded, monkeypatch, capsys, algorithm):
    argv = [f"--ALGORITHM={algorithm}"]
    stage("05_phase2_train", run, *argv)
    folder = run / "phase2" / f"{algorithm}-steer"
    before = contents(folder)
    go_on(run, loaded.tokenizer)
    with pytest.raises(SystemExit, match="04 has not finished with the recent questions of wear. Run it first"):
        stage("05_phase2_train", run, *argv)
    stage("04_train_reward", run)
    # The old adapter serves until the new one is written.
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(SystemExit, match="stopped after step 0"):
            stage("05_phase2_train", run, *argv)
    held = contents(folder)
    assert {n for n in before if "/adapter/" in n and held[n] != before[n]} == set()
    capsys.readouterr()
    stage("05_phase2_train", run, *argv)
    assert "changed: wear; as before: place, object" in capsys.readouterr().out
    after = contents(folder)
    assert {n for n in after if after[n] != before.get(n)} >= {
        "wear/adapter/steer.safetensors", "wear/adapter/questions.json", "wear/questions.json"}
    assert not {n for n in after if after[n] != before.get(n) and not n.startswith("wear/")}
    new = texts(runs.read_json(run / "tasks/recent.json")["wear"][:5])
    assert runs.read_json(folder / "wear/adapter/questions.json") == new


def test_an_interrupted_adapter_goes_on_only_with_what_it_began_with(run, tmp_path, loaded, monkeypatch):
    shutil.copytree(run, tmp_path / "whole")
    for folder in (run, tmp_path / "whole"):
        go_on(folder, loaded.tokenizer)
        stage("04_train_reward", folder)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(SystemExit, match="stopped after step 0"):
            stage("05_phase2_train", run)
    for folder in (run, tmp_path / "whole"):
        recent = runs.read_json(folder / "tasks/recent.json")
        runs.write_json(folder / "tasks/recent.json", recent | {"wear": questions("wear", 7)})
        stage("04_train_reward", folder)
        stage("05_phase2_train", folder)
    one, two = (contents(folder / "phase2" / "dpo-steer" / "wear" / "adapter") for folder in (run, tmp_path / "whole"))
    assert one == two


def test_pairs_of_contexts_that_the_cache_has_lost_are_learned_from(run, loaded):
    """Another variant, made later, of an environment that has not changed."""
    go_on(run, loaded.tokenizer, numbers=(3, 4))
    stage("04_train_reward", run)
    stage("05_phase2_train", run, "--ENVIRONMENT=place", "--NAME=later")
    one, two = (run / "phase2" / name / "place/adapter/steer.safetensors" for name in ("dpo-steer", "dpo-steer-later"))
    assert one.read_bytes() == two.read_bytes()


def test_pairs_of_deleted_videos_are_left_out(run, capsys):
    S = SimpleNamespace(RUN=str(run), FROM="", K=2)
    streams = runs.load_streams(S, "deploy")
    every = phase2.cached_pairs(S, "wear", streams)
    for clip in streams[1]["clips"][:2]:
        clip["file"] = "gone.mp4"
    there = phase2.cached_pairs(S, "wear", streams)
    lost = [pair for pair in every if pair.context.stream == "deploy-001"]
    assert 0 < len(lost) == len(every) - len(there) and len(there) > 0
    assert all(pair.context.stream != "deploy-001" for pair in there)
    assert f"wear                     {len(lost)} pairs are left out, as their videos are gone" in capsys.readouterr().out


# ================================================================ questions without answers
def test_adapters_are_the_same_without_answers(begun, tmp_path):
    for name in ("streams", "phase1", "tasks"):
        shutil.copytree(begun / name, tmp_path / name)
    recent = runs.read_json(tmp_path / "tasks/recent.json")
    for tasks in recent.values():
        for task in tasks:
            task |= {"answer": None, "correct": None}
    runs.write_json(tmp_path / "tasks/recent.json", recent)
    for name in ARGUMENTS:
        stage(name, tmp_path)
    for folder in (begun, tmp_path):
        stage("05_phase2_train", folder, "--ALGORITHM=grpo", "--ENVIRONMENT=place")
    for variant in ("dpo-steer", "grpo-steer"):
        one, two = ({name: data for name, data in contents(folder / "phase2" / variant).items() if "adapter/" in name}
                    for folder in (begun, tmp_path))
        assert one == two and any(name.endswith("steer.safetensors") for name in one)
