"""The evidence behind the README: the whole method on 5 seeds, ablations and variants on 3 of them, with 95 %
intervals over seeds.

Every variant is a run of the six scripts with other constants (MAIN, VARIANTS and ABLATIONS below are their command
lines). The seeds are ones that nothing was developed on. A finished variant of a seed leaves a record in
results/evidence/, to be committed, so that an interrupted evidence goes on here or on another machine. A record's key
is a hash of the scripts (comments and docstrings aside), of the command lines and of the base's weights; records of
another hash are never pooled.

Run: python experiments/evidence.py [JOBS]      (JOBS at a time, one thread each; default 4)
     (hours of one core: see results/evidence.log)
In:  the six scripts, tiny/
Out: results/evidence.json, evidence.md, evidence.log, accuracy.svg, evidence/ (the records); runs/evidence/ (the runs)
"""
import ast
import hashlib
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support.runs import read_json, read_jsonl, write_json, write_text      # noqa: E402

RESULTS = ROOT / "results"
RECORDS = RESULTS / "evidence"
RUNS = ROOT / "runs"

# ---------------------------------------------------------------- what is run
STAGES = ("01_make_streams", "02_phase1_train", "03_collect_tasks", "04_train_reward",
          "05_phase2_train", "06_eval")
SEEDS = range(10, 15)                          # of the main run; nothing was developed on them ...
FEW = range(10, 13)                            # ... of variants and ablations
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}      # t quantile 0.975 for n seeds

# Command lines after the script's number. {run}: the seed's main run; {norm}: 0.8 of the mean norm of its vectors.
# All constants are those of ./run.sh.
PHASE2 = "05 --RUN={run} --CPU_THREADS=1"
MAIN = ["01 --RUN={run}", "02 --RUN={run}", "03 --RUN={run}", "04 --RUN={run}", PHASE2,
        PHASE2 + " --ALGORITHM=grpo"]
VARIANTS = {
    "lora": " --ADAPTER=lora",
    "all": " --ADAPTER=all",
    "ten": " --NAME=ten --DPO_STEPS=10 --SCALE_TO_NORM={norm}",
    "layer0": " --NAME=layer0 --LAYER=0",
    "layer1": " --NAME=layer1 --LAYER=1",
    "layer3": " --NAME=layer3 --LAYER=3"}
ABLATIONS = {
    "norich": "--RICHNESS=0",
    "nogate": "--GATE=0",
    "offpolicy": "--OFF_POLICY_STEPS=60",
    "nokl": "--KL=0"}
# ----------------------------------------------------------------
LOCK = threading.Lock()                        # of the log and of the files in results/


# ================================================================ running
@dataclass
class Run:
    """A seed's main run, or one of its ablations, which is a run of its own."""
    key: str
    seed: int
    ablation: str = ""

    @property
    def name(self):
        suffix = f"-{self.ablation}" if self.ablation else ""
        return f"evidence/{self.key}-s{self.seed}{suffix}"

    @property
    def folder(self):
        return RUNS / self.name

    def call(self, line, **values):
        """Runs one command line of this run; its output goes to a log. SystemExit where it fails."""
        number, *arguments = line.format(run=self.name, **values).split()
        script = script_of(number)
        arguments = [argument for argument in arguments if not argument.startswith("--CPU_THREADS")]
        arguments += ["--CPU_THREADS=1", f"--SEED={self.seed}"]
        log = RUNS / f"{self.name}.log"
        began = time.time()
        with open(log, "a") as file:
            done = subprocess.run(
                [sys.executable, script, *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"})
        seconds = time.time() - began
        failure = f", FAILED with {done.returncode}, see {log}" if done.returncode else ""
        say(f"{script} {' '.join(arguments)}: {seconds:.0f} s{failure}")
        if failure:
            raise SystemExit(f"{script} failed")

    def record_file(self, variant):
        return RECORDS / f"{self.key}-s{self.seed}-{variant}.json"

    def record(self, variant, **more):
        """Keeps what the figures need of this run's results."""
        write_json(self.record_file(variant), {
            "key": self.key, "seed": self.seed, "variant": variant, "commit": commit(),
            "results": slim(self.folder), **more})


def script_of(number):
    return next(f"{stage}.py" for stage in STAGES if stage.startswith(number))


def say(text):
    with LOCK, open(RESULTS / "evidence.log", "a") as log:
        print(text, flush=True)
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=log)


def source_hash():
    """Hash of what the figures depend on: the code without comments and docstrings, the command lines, the base's
    weights."""
    digest = hashlib.sha256(json.dumps([MAIN, VARIANTS, ABLATIONS]).encode())
    for path in sources():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if has_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        digest.update(ast.dump(tree).encode())
    digest.update((ROOT / "tiny" / "base" / "model.safetensors").read_bytes())
    return digest.hexdigest()[:16]


def sources():
    """The files whose code the figures depend on."""
    stages = [ROOT / f"{stage}.py" for stage in STAGES]
    support = sorted((ROOT / "support").glob("*.py"))
    return [*stages, ROOT / "common.py", *support, ROOT / "tiny" / "world.py"]


def has_docstring(node):
    body = getattr(node, "body", None)
    if not isinstance(body, list) or not body:
        return False
    return isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def main_run(run):
    """The seed's main run and its record."""
    if run.record_file("main").exists():
        return
    train_main(run)
    run.call("06 --RUN={run}")
    reward = read_json(run.folder / "reward" / "report.json")
    run.record("main", norm=mean_norm(run.folder), reward=reward)


def train_main(run):
    """Stages 01 to 05. What is finished takes seconds, so this is called wherever they are needed: the record of the
    main run may have been made on another machine."""
    run.folder.mkdir(parents=True, exist_ok=True)
    for line in MAIN:
        run.call(line)
    add_random_vectors(run.folder, run.seed)


def variants(run):
    """Other adapters and layers, trained and evaluated within the seed's main run: only what is new is computed."""
    if run.record_file("side").exists():
        return
    train_main(run)
    norm = f"{0.8 * mean_norm(run.folder):.4f}"
    for arguments in VARIANTS.values():
        run.call(PHASE2 + arguments, norm=norm)
    run.call("06 --RUN={run}")
    run.record("side")


def ablation(run, name):
    """Another Phase One, on the streams of the seed's main run."""
    other = Run(run.key, run.seed, name)
    if other.record_file(name).exists():
        return
    train_main(run)
    other.call("02 --RUN={run} --FROM={main} " + ABLATIONS[name], main=run.name)
    other.call("06 --RUN={run} --FROM={main} --METHODS=base,phase1", main=run.name)
    other.record(name)


def vectors(folder):
    """{file: (key, vector)} of the main run's steering vectors."""
    from safetensors.torch import load_file
    found = {}
    for file in sorted((folder / "phase2" / "dpo-steer").glob("*/adapter/steer.safetensors")):
        [found[file]] = load_file(str(file)).items()
    return found


def add_random_vectors(folder, seed):
    """A control: vectors of random direction with the norms of the trained ones, as one more method, random-steer."""
    import torch
    from safetensors.torch import save_file
    for file, (key, vector) in vectors(folder).items():
        noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))
        environment = file.parts[-3]
        target = folder / "phase2" / "random-steer" / environment / "adapter"
        target.mkdir(parents=True, exist_ok=True)
        scaled = noise * vector.norm() / noise.norm()
        save_file({key: scaled}, str(target / "steer.safetensors"))


def mean_norm(folder):
    norms = [vector.norm().item() for _, vector in vectors(folder).values()]
    return sum(norms) / len(norms)


def slim(folder):
    """What the figures need of eval/results.json: point estimates by method and environment."""
    results = read_json(folder / "eval" / "results.json")
    rows = {}
    for row in results["rows"]:
        if row["scope"] == "after":
            rows[name_of(row)] = means(row, ("accuracy", "coverage", "precision"))
    judged = {}                                # as deployed, and in the same contexts at temperature 1
    for part in ("deployed", "validation"):
        judged[part] = {}
        for row in results[part]:
            measured = [name for name, value in row.items() if isinstance(value, dict)]
            judged[part][name_of(row)] = means(row, measured)
    gains = {}
    for method, gains_of_method in results["gains"].items():
        gains[method] = {}
        for reference, gain in gains_of_method.items():
            gains[method][reference] = None if gain is None else means(gain, gain)
    repeats = share_of_repeats(read_jsonl(folder / "eval" / "memories.jsonl"))
    return {"rows": rows, **judged, "gains": gains, "repeats": repeats}


def share_of_repeats(memories):
    """{method: share of its memories that state a phrase twice}, as deployed; malformed ones are left out.

    >>> share_of_repeats([{"method": "base", "memory": "now, a red cup, a red cup."},
    ...                   {"method": "base", "memory": "still, a red cup."}, {"method": "base", "memory": ""}])
    {'base': 0.5}
    """
    twice = {}
    for row in memories:
        phrases = row["memory"].rstrip(".").split(", ")
        if row["memory"]:
            twice.setdefault(row["method"], []).append(len(set(phrases)) < len(phrases))
    return {method: sum(found) / len(found) for method, found in twice.items()}


def name_of(row):
    return f"{row['method']} {row['environment']}"


def means(row, names):
    return {name: row[name]["mean"] for name in names}


# ================================================================ figures
def interval(values):
    """{mean, low, high, n}: t interval over seeds; low and high are None below two."""
    values = [value for value in values if value is not None]
    n = len(values)
    figure = {"mean": None, "low": None, "high": None, "n": n}
    if n:
        mean = sum(values) / n
        figure["mean"] = round(mean, 4)
    if n > 1:
        variance = sum((value - mean) ** 2 for value in values) / (n - 1)
        half = T95[n] * math.sqrt(variance / n)
        figure["low"] = round(mean - half, 4)
        figure["high"] = round(mean + half, 4)
    return figure


def look_up(value, *names):
    """value[name][name]..., None where something on the way is missing: not every seed ran every method."""
    for name in names:
        if value is None or name not in value:
            return None
        value = value[name]
    return value


def over(records, *names, scale=1):
    """The interval over the records of what stands under `names` in their results."""
    values = [look_up(record["results"], *names) for record in records]
    return interval([None if value is None else scale * value for value in values])


def figures(records):
    """{name: {mean, low, high, n}}; accuracy figures and gains in points, shares in [0, 1]."""
    by_variant = {}
    for record in records:
        by_variant.setdefault(record["variant"], []).append(record)
    main = by_variant.get("main", [])
    found = {}
    for method, records_of_method in sorted(methods_of(main, by_variant.get("side", [])).items()):
        found |= figures_of_method(method, records_of_method)
    found |= figures_of_phases(found, main, by_variant.get("side", []))
    for name in ABLATIONS:
        if name in by_variant:
            found |= figures_of_ablation(name, by_variant[name])
    return {name: figure for name, figure in found.items() if figure["n"]}


def methods_of(main, side):
    """{method: the records that tell of it}: those of the main runs where they do."""
    methods = {}
    for records in (side, main):
        for record in records:
            for row in record["results"]["rows"]:
                methods[row.split()[0]] = records
    return methods


def figures_of_method(method, records):
    found = {}
    row = f"{method} all"
    for metric in ("accuracy", "coverage", "precision"):
        found[f"{method}.{metric}"] = over(records, "rows", row, metric, scale=100)
    for metric in ("fully_right", "well_formed", "tokens", "win", "tie", "loss", "faithful",
                   "non_redundant"):
        found[f"{method}.{metric}.deployed"] = over(records, "deployed", row, metric)
        found[f"{method}.{metric}.same_contexts"] = over(records, "validation", row, metric)
    found[f"{method}.repeats.deployed"] = over(records, "repeats", method)
    gains = ("gains", method)
    found[f"{method}.gain_over_base"] = over(records, *gains, "over_base", "accuracy")
    found[f"{method}.matched_gain"] = over(records, *gains, "over_phase1", "accuracy")
    found[f"{method}.mismatched_gain"] = over(records, *gains, "mismatched", "accuracy")
    return found


def figures_of_phases(found, main, side):
    """What the README says in its sentences, and what is put beside the paper."""
    figures_of = {
        "phase1.precision_change": over(main, "gains", "phase1", "over_base", "precision"),
        "phase1.tokens_ratio.deployed": quotient(main, "deployed", "phase1 all", "base all", "tokens"),
        "phase1.tokens_ratio.same_contexts": quotient(main, "validation", "phase1 all", "base all", "tokens"),
        "phase2.matched_gain": found["dpo-steer.matched_gain"],
        "phase2.mismatched_gain": found["dpo-steer.mismatched_gain"],
        "phase2.gain_over_prompt": difference(
            main, "rows", "dpo-steer all", "base+prompt all", "accuracy"),
        "phase2.precision_change": over(main, "gains", "dpo-steer", "over_phase1", "precision"),
        "reward_model.pair_accuracy": of_reward_model(main, "pair_accuracy"),
        "reward_model.shuffled_accuracy": of_reward_model(main, "shuffled_accuracy")}
    for method in ("base", "phase1"):
        fully_right = found[f"{method}.fully_right.deployed"]
        figures_of[f"phase1.fully_right.deployed.{method}"] = fully_right
    for metric in ("faithful", "non_redundant", "win"):
        figures_of[f"all_parameters.{metric}_over_vector"] = difference(
            side, "deployed", "dpo-all all", "dpo-steer all", metric)
    return figures_of


def pairs_of_values(records, part, row, other, metric):
    """[(value of row, value of the other)] of the records that have both."""
    pairs = []
    for record in records:
        value = look_up(record["results"], part, row, metric)
        reference = look_up(record["results"], part, other, metric)
        if None not in (value, reference):
            pairs.append((value, reference))
    return pairs


def difference(records, *place):
    """The interval over the records of a row's lead over another, in points."""
    return interval([100 * (value - other) for value, other in pairs_of_values(records, *place)])


def quotient(records, *place):
    return interval([value / other for value, other in pairs_of_values(records, *place)])


def of_reward_model(main, name):
    return interval([record["reward"][name]["mean"] for record in main])


def figures_of_ablation(name, records):
    found = {}
    for metric in ("fully_right", "tokens", "non_redundant", "faithful"):
        found[f"{name}.{metric}.deployed"] = over(records, "deployed", "phase1 all", metric)
        found[f"{name}.{metric}.same_contexts"] = over(records, "validation", "phase1 all", metric)
    found[f"{name}.repeats.deployed"] = over(records, "repeats", "phase1")
    for metric in ("accuracy", "precision"):
        found[f"{name}.{metric}"] = over(records, "rows", "phase1 all", metric, scale=100)
    return found


# ================================================================ tables
# Methods in the README's table, in its order.
NAMES = {"base": "base", "base+prompt": "base + task prompt", "phase1": "Phase One",
         "phase1+prompt": "Phase One + task prompt", "dpo-steer": "Phase Two, DPO (the paper)",
         "grpo-steer": "Phase Two, on-policy", "dpo-lora": "Phase Two, LoRA",
         "dpo-all": "Phase Two, all parameters", "dpo-steer-ten": "Phase Two, 10 steps scaled",
         "random-steer": "random vectors", "dpo-steer-layer0": "after layer 0",
         "dpo-steer-layer1": "after layer 1", "dpo-steer-layer3": "after layer 3 (the last)"}


def cell(figure, digits, missing="", scale=1):
    """A figure with its interval, as text; `missing` where there is none."""
    if not figure or figure["mean"] is None:
        return missing
    text = f"{scale * figure['mean']:.{digits}f}"
    if figure["low"] is None:
        return text
    low = f"{scale * figure['low']:.{digits}f}"
    high = f"{scale * figure['high']:.{digits}f}"
    return f"{text} ({low} to {high})"


def table_row(cells):
    return "| " + " | ".join(cells) + " |"


def readme_table(F):
    """The results table of the README, from the figures: a test compares it with what stands there."""
    head = ["method", "accuracy", "coverage", "precision", "gain over Phase One, matched", "mismatched",
            "fully right, %", "tokens a memory"]
    lines = [table_row(head), "|---" * len(head) + "|"]
    for method, name in NAMES.items():
        if f"{method}.accuracy" not in F:
            continue
        cells = [name]
        for metric in ("accuracy", "coverage", "precision", "matched_gain", "mismatched_gain"):
            cells.append(cell(F.get(f"{method}.{metric}"), 0, "-"))
        cells.append(cell(F.get(f"{method}.fully_right.deployed"), 0, "-", scale=100))
        cells.append(cell(F.get(f"{method}.tokens.deployed"), 1, "-"))
        lines.append(table_row(cells))
    return "\n".join(lines)


# (what, the paper's figures in points, ours). On Video-MME, EgoLife, EgoTempo; or in object recognition on Video-MME.
EFFECTS = (
    ("task prompt over base", (2.6, 1.6, 2.2), "base+prompt.gain_over_base"),
    ("Phase One over base", (2.8, 1.2, 1.4), "phase1.gain_over_base"),
    ("Phase One over base, precision", (2.8, 4.3, 6.1), "phase1.precision_change"),
    ("Phase Two over Phase One", (3.5, 5.8, 3.9), "phase2.matched_gain"),
    ("Phase Two over Phase One, precision", (0.3, 2.9, -0.1), "phase2.precision_change"),
    ("Phase Two over base + task prompt", (3.7, 5.4, 3.1), "phase2.gain_over_prompt"),
    ("adapter of another environment over Phase One", (-0.7,), "phase2.mismatched_gain"),
    ("all parameters over the vector, faithful", (-1.6,), "all_parameters.faithful_over_vector"),
    ("all parameters over the vector, not repeating", (-3.5,), "all_parameters.non_redundant_over_vector"),
    ("all parameters over the vector, win rate", (4.8,), "all_parameters.win_over_vector"))


def table_of_effects(F):
    """Each effect of the paper beside ours, and whether they have the same sign."""
    lines = [table_row(["effect, in points", "paper", "here", "sign"]), "|---|---|---|---|"]
    for what, paper, name in EFFECTS:
        figure = F.get(name)
        shown = ", ".join(f"{points:+.1f}" for points in paper)
        lines.append(table_row([what, shown, cell(figure, 1, "not measured"), sign_beside(paper, figure)]))
    return "\n".join(lines)


def sign_beside(paper, figure):
    """"same", "opposite", or "open" where either is not clearly on one side of 0.

    >>> sign_beside((2.8, 1.2), {"mean": 3.0, "low": 1.0, "high": 5.0}), sign_beside((-0.7,), None)
    ('same', '-')
    >>> sign_beside((0.3, -0.1), {"mean": 3.0, "low": 1.0, "high": 5.0})
    'open'
    """
    if not figure or figure["low"] is None:
        return "-"
    is_clear = figure["low"] * figure["high"] > 0 and min(paper) * max(paper) > 0
    if not is_clear:
        return "open"
    return "same" if figure["mean"] * paper[0] > 0 else "opposite"


def page(F, key, seeds):
    """The text of evidence.md. seeds: of the main run."""
    lines = [
        f"# Evidence: {seeds} seeds, mean (95 % interval, t over seeds)", "",
        f"`python experiments/evidence.py`, hash {key}, {platform.machine()}, one thread a run. Test streams, "
        "questions after the update; accuracy figures and gains in points, shares in [0, 1].", ""]
    for part, title in PARTS.items():
        lines += [f"## {title}", "", *table_of_methods(F, part), "", *table_of_ablations(F, part), ""]
    lines += ["## Beside the paper", "", table_of_effects(F), "", "## Figures", ""]
    lines += ["| figure | value |", "|---|---|"]
    for name in F:
        if name.startswith(("phase1.", "phase2.", "all_parameters.", "reward_model.")):
            lines.append(table_row([name, cell(F[name], 3)]))
    return "\n".join(lines) + "\n"


# How the memories were written that are judged. Figures of the two are never compared.
PARTS = {"deployed": "The memories that the answers came from (temperature 0.6, own history)",
         "same_contexts": "One memory per context at temperature 1, all with Phase One's history"}


def table_of_methods(F, part):
    answers = {"accuracy": 1, "coverage": 1, "precision": 1, "matched_gain": 1, "mismatched_gain": 1}
    memories = {"fully_right": 2, "faithful": 2, "non_redundant": 2, "repeats": 2, "tokens": 1, "win": 2, "loss": 2}
    names = [metric.replace("_", " ") for metric in (*answers, *memories)]
    lines = [table_row(["method", *names]), "|---" * (1 + len(names)) + "|"]
    for name in F:
        method, _, metric = name.rpartition(".")
        if metric == "coverage":
            cells = [cell(F.get(f"{method}.{metric}"), n) for metric, n in answers.items()]
            cells += [cell(F.get(f"{method}.{metric}.{part}"), n) for metric, n in memories.items()]
            lines.append(table_row([method, *cells]))
    return lines


def table_of_ablations(F, part):
    memories = {"fully_right": 2, "tokens": 1, "non_redundant": 2, "repeats": 2}
    answers = {"accuracy": 1, "precision": 1}
    names = [metric.replace("_", " ") for metric in (*memories, *answers)]
    lines = [table_row(["Phase One ablation", *names]), "|---" * (1 + len(names)) + "|"]
    for name in ("base", "phase1", *ABLATIONS):
        cells = [cell(F.get(f"{name}.{metric}.{part}"), n) for metric, n in memories.items()]
        cells += [cell(F.get(f"{name}.{metric}"), n) for metric, n in answers.items()]
        lines.append(table_row([name, *cells]))
    return lines


# ================================================================ the picture
PICTURED = [*list(NAMES)[:6], "random-steer"]
LEFT = 228                                     # pixels: where the bars begin ...
TOP = 46                                       # ... the first bar
BAR_STEP = 34                                  # from bar to bar
POINT = 4.2                                    # pixels of a point


def picture(F):
    """accuracy.svg: accuracy of the main methods as bars with their intervals."""
    methods = [method for method in PICTURED if f"{method}.accuracy" in F]
    bottom = TOP + BAR_STEP * len(methods)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {bottom + 30}" '
             'font-family="sans-serif" font-size="15">'
             '<rect width="100%" height="100%" fill="white"/><text x="12" y="26" font-weight="bold">'
             'Questions answered from memory alone, % (mean and 95 % interval over seeds)</text>']
    for number, method in enumerate(methods):
        lines += bar(method, F[f"{method}.accuracy"], TOP + BAR_STEP * number)
    lines.append(f'<text x="12" y="{bottom + 18}" font-size="13" fill="#555">Toy world, test streams '
                 'never seen in training; python experiments/evidence.py</text></svg>')
    return "\n".join(lines) + "\n"


def bar(method, accuracy, y):
    """SVG elements of one bar whose top is at y."""
    colour = "#1f6f4a" if method.startswith(("dpo", "grpo")) else "#8a93a0"
    mean = accuracy["mean"]
    lines = [f'<text x="218" y="{y + 17}" text-anchor="end">{NAMES[method]}</text>'
             f'<rect x="{LEFT}" y="{y}" width="{mean * POINT:.1f}" height="24" fill="{colour}"/>']
    end = mean
    if accuracy["low"] is not None:
        end = max(mean, accuracy["high"])
        low = LEFT + accuracy["low"] * POINT
        high = LEFT + accuracy["high"] * POINT
        lines.append(f'<path d="M{low:.1f} {y + 12}H{high:.1f}" stroke="black" stroke-width="2"/>')
    lines.append(f'<text x="{LEFT + 8 + end * POINT:.1f}" y="{y + 17}">{mean:.0f}</text>')
    return lines


# ================================================================ the whole
def write_evidence(key):
    """Writes the files in results/ from the records that there are."""
    with LOCK:
        records = read_records(key)
        if not records:
            return
        F = figures(records)
        seeds = {}
        for record in records:
            seeds[record["variant"]] = seeds.get(record["variant"], 0) + 1
        commits = sorted({record["commit"] for record in records})
        provenance = {"hash": key, "commit": ", ".join(commits), "seeds": seeds}
        write_json(RESULTS / "evidence.json", F | provenance)
        write_text(RESULTS / "evidence.md", page(F, key, seeds.get("main", 0)))
        write_text(RESULTS / "accuracy.svg", picture(F))


def read_records(key):
    """The records of a hash, by seed and variant."""
    return [read_json(file) for file in sorted(RECORDS.glob(f"{key}-s*.json"))]


def commit():
    """The commit that is checked out, with a + where the code differs from it."""
    code = ["*.py", "tiny/base"]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return git("rev-parse", "HEAD") + ("+" if changed else "")


def git(*arguments):
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def main():
    key = source_hash()
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    (RUNS / "evidence").mkdir(parents=True, exist_ok=True)
    say(f"evidence {key}: {jobs} jobs on {os.cpu_count()} cores")

    def do(work, run, *more):
        if work is not main_run:
            main_runs[run.seed].result()                        # its streams and vectors come first
        work(run, *more)
        write_evidence(key)
    with ThreadPoolExecutor(jobs) as pool:
        main_runs = {seed: pool.submit(do, main_run, Run(key, seed)) for seed in SEEDS}
        waiting = list(main_runs.values())
        waiting += [pool.submit(do, variants, Run(key, seed)) for seed in FEW]
        for seed in FEW:
            waiting += [pool.submit(do, ablation, Run(key, seed), name) for name in ABLATIONS]
        failures = [work.exception() for work in waiting if work.exception()]
    write_evidence(key)
    say(f"done, {len(failures)} failures" + "".join(f"\n  {failure}" for failure in failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
