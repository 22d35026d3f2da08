"""The evidence behind the README: the whole method on 5 seeds, ablations and variants on 3, with 95 % intervals over seeds.

Every variant is a run of the six scripts with other constants (`RUNS` below are their command lines). A finished variant of
a seed leaves a record, keyed by a hash of the scripts (comments and docstrings aside), the command lines and the base's weights;
records of another hash are never pooled. Interrupt it and run it again: it goes on.

Run: python tests/evidence.py [JOBS]     (JOBS at a time, one thread each; default 4. Hours of CPU: see results/evidence.md)
In:  the six scripts, tiny/
Out: results/evidence.json, evidence.md, evidence.log, accuracy.svg; runs/evidence/ (the runs and the records)
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

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import read_json, write_json, write_text  # noqa: E402

SEEDS, FEW = range(5), range(3)
STAGES = ("01_make_streams", "02_phase1_train", "03_collect_tasks", "04_train_reward", "05_phase2_train", "06_eval")
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}      # t quantile 0.975 for n seeds

# variant -> (seeds, command lines after its scripts' names). {run}: the seed's main run; a variant reads from it what it keeps.
STEER = "05 --RUN={run} --CPU_THREADS=1"
# More steps of Phase One than ./run.sh makes, which must end in minutes: memories shorten first, then richness brings them back.
LONG = " --STEPS=140 --OFF_POLICY_STEPS=90"
MAIN = ["01 --RUN={run}", "02 --RUN={run}" + LONG, "03 --RUN={run}", "04 --RUN={run}", STEER, STEER + " --ALGORITHM=grpo"]
SIDE = {"lora": " --ADAPTER=lora", "all": " --ADAPTER=all", "ten": " --NAME=ten --DPO_STEPS=10 --SCALE_TO_NORM={norm}",
        "layer0": " --NAME=layer0 --LAYER=0", "layer1": " --NAME=layer1 --LAYER=1", "layer3": " --NAME=layer3 --LAYER=3"}
ABLATIONS = {"norich": "--RICHNESS=0", "nogate": "--GATE=0", "offpolicy": "--OFF_POLICY_STEPS=140", "nokl": "--KL=0"}


def run(line, log, **values):
    """One command line "05 --NAME=value ..." as a subprocess, its output in the log. Raises SystemExit where it fails."""
    number, *args = line.format(**values).split()
    script = next(s for s in STAGES if s.startswith(number)) + ".py"
    args = [a for a in args if not a.startswith("--CPU_THREADS")] + ["--CPU_THREADS=1", f"--SEED={values['seed']}"]
    began = time.time()
    with open(log, "a") as f:
        code = subprocess.run([sys.executable, script, *args], cwd=ROOT, stdout=f, stderr=subprocess.STDOUT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    say(f"{script} {' '.join(args)}: {time.time() - began:.0f} s" + (f", FAILED with {code}, see {log}" if code else ""))
    if code:
        raise SystemExit(f"{script} failed")


def say(text, lock=threading.Lock()):
    with lock, open(ROOT / "results" / "evidence.log", "a") as f:
        print(text, flush=True)
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=f)


def source_hash():
    """Hash of what the figures depend on: the code without comments and docstrings, the command lines, the base's weights."""
    digest = hashlib.sha256(json.dumps([MAIN, SIDE, ABLATIONS]).encode())
    for name in [f"{s}.py" for s in STAGES] + ["common.py", "loading.py", "judges.py", "tiny/world.py"]:
        tree = ast.parse((ROOT / name).read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                node.body = body[1:] or [ast.Pass()]
        digest.update(ast.dump(tree).encode())
    digest.update((ROOT / "tiny" / "base" / "model.safetensors").read_bytes())
    return digest.hexdigest()[:16]


def random_vectors(run_dir, seed):
    """A control: vectors of random direction with the norm of the trained ones, as one more method "random-steer"."""
    import torch
    from safetensors.torch import load_file, save_file
    for file in sorted((run_dir / "phase2" / "dpo-steer").glob("*/adapter/steer.safetensors")):
        (key, vector), = load_file(str(file)).items()
        noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))
        target = run_dir / "phase2" / "random-steer" / file.parts[-3] / "adapter"
        target.mkdir(parents=True, exist_ok=True)
        save_file({key: noise * vector.norm() / noise.norm()}, str(target / "steer.safetensors"))


def mean_norm(run_dir):
    from safetensors.torch import load_file
    norms = [next(iter(load_file(str(f)).values())).norm().item()
             for f in (run_dir / "phase2" / "dpo-steer").glob("*/adapter/steer.safetensors")]
    return sum(norms) / len(norms)


def main_run(seed, key):
    """The seed's main run with its side variants, and its record."""
    name = f"evidence/{key}-s{seed}"
    run_dir, log = ROOT / "runs" / name, ROOT / "runs" / f"{name}.log"
    record = ROOT / "runs" / "evidence" / f"{key}-s{seed}-main.json"
    run_dir.mkdir(parents=True, exist_ok=True)
    if not record.exists():
        for line in MAIN:
            run(line, log, run=name, seed=seed)
        random_vectors(run_dir, seed)
        run("06 --RUN={run}", log, run=name, seed=seed)
        write_json(record, dict(key=key, seed=seed, variant="main", results=slim(run_dir), norm=mean_norm(run_dir),
                                reward=read_json(run_dir / "reward" / "report.json")))


def side_run(seed, key):
    """Other adapters and layers, trained and evaluated within the seed's main run; only what is new is computed."""
    name, record = f"evidence/{key}-s{seed}", ROOT / "runs" / "evidence" / f"{key}-s{seed}-side.json"
    run_dir, log = ROOT / "runs" / name, ROOT / "runs" / f"{name}.log"
    if not record.exists():
        for variant in SIDE.values():
            run(STEER + variant, log, run=name, seed=seed, norm=f"{0.8 * mean_norm(run_dir):.4f}")
        run("06 --RUN={run}", log, run=name, seed=seed)
        write_json(record, dict(key=key, seed=seed, variant="side", results=slim(run_dir)))


def ablation(seed, key, variant):
    main, name = f"evidence/{key}-s{seed}", f"evidence/{key}-s{seed}-{variant}"
    record = ROOT / "runs" / f"{name}.json"
    if not record.exists():
        log = ROOT / "runs" / f"{name}.log"
        run("02 --RUN={run} --FROM={main}" + LONG + " " + ABLATIONS[variant], log, run=name, main=main, seed=seed)
        run("06 --RUN={run} --FROM={main} --METHODS=base,phase1", log, run=name, main=main, seed=seed)
        write_json(record, dict(key=key, seed=seed, variant=variant, results=slim(ROOT / "runs" / name)))


def slim(run_dir):
    """What the figures need of eval/results.json: point estimates by method and environment."""
    R = read_json(run_dir / "eval" / "results.json")
    return {"rows": {f"{r['method']} {r['environment']}": {k: r[k]["mean"] for k in ("accuracy", "coverage", "precision")}
                     for r in R["rows"] if r["scope"] == "after"},
            "validation": {f"{v['method']} {v['environment']}": {k: x["mean"] for k, x in v.items() if isinstance(x, dict)}
                           for v in R["validation"]},
            "gains": {m: {ref: g and {k: x["mean"] for k, x in g.items()} for ref, g in gains.items()}
                      for m, gains in R["gains"].items()}}


def interval(values):
    """{mean, low, high, n}: t interval over seeds; low and high None below two."""
    values = [v for v in values if v is not None]
    n = len(values)
    mean = sum(values) / n if n else None
    half = T95[n] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    rounded = lambda x: None if x is None else round(x, 4)
    return dict(mean=rounded(mean), low=rounded(mean - half) if half is not None else None,
                high=rounded(mean + half) if half is not None else None, n=n)


def figures(records):
    """{key: {mean, low, high, n}}; accuracy figures and gains in points, shares in [0, 1]."""
    main = [r for r in records if r["variant"] == "main"]
    side = [r for r in records if r["variant"] == "side"]
    over = lambda get, rs=main: interval([get(r) for r in rs])
    methods = {k.split()[0]: side for r in side for k in r["results"]["rows"]}
    methods |= {k.split()[0]: main for r in main for k in r["results"]["rows"]}          # method -> the records that tell of it

    def picked(get):                         # a method may be missing in the seeds that did not run it
        def safe(r):
            try:
                return get(r["results"])
            except (KeyError, TypeError):
                return None
        return safe
    out = {}
    for method, rs in sorted(methods.items()):
        for metric in ("accuracy", "coverage", "precision"):
            out[f"{method}.{metric}"] = over(picked(lambda x: 100 * x["rows"][f"{method} all"][metric]), rs)
        for metric in ("fully_right", "well_formed", "tokens", "win", "tie", "loss", "faithful", "non_redundant"):
            out[f"{method}.{metric}"] = over(picked(lambda x: x["validation"][f"{method} all"][metric]), rs)
        out[f"{method}.matched_gain"] = over(picked(lambda x: x["gains"][method]["over_phase1"]["accuracy"]), rs)
        out[f"{method}.mismatched_gain"] = over(picked(lambda x: x["gains"][method]["mismatched"]["accuracy"]), rs)
    out["phase1.fully_right.base"], out["phase1.fully_right.phase1"] = out["base.fully_right"], out["phase1.fully_right"]
    out["phase1.precision_change"] = over(picked(lambda x: x["gains"]["phase1"]["over_base"]["precision"]))
    out["phase1.tokens_ratio"] = over(picked(lambda x: x["validation"]["phase1 all"]["tokens"] / x["validation"]["base all"]["tokens"]))
    out["phase2.matched_gain"], out["phase2.mismatched_gain"] = (out[f"dpo-steer.{k}"] for k in ("matched_gain", "mismatched_gain"))
    out["phase2.precision_change"] = over(picked(lambda x: x["gains"]["dpo-steer"]["over_phase1"]["precision"]))
    for k in ("pair_accuracy", "shuffled_accuracy"):
        out[f"reward_model.{k}"] = over(lambda r: value(r["reward"][k]))
    for variant in ABLATIONS:
        rs = [r for r in records if r["variant"] == variant]
        for metric in ("fully_right", "tokens", "non_redundant", "faithful") if rs else ():
            out[f"{variant}.{metric}"] = over(picked(lambda x: x["validation"]["phase1 all"][metric]), rs)
        for metric in ("accuracy", "precision") if rs else ():
            out[f"{variant}.{metric}"] = over(picked(lambda x: 100 * x["rows"]["phase1 all"][metric]), rs)
    return {k: v for k, v in out.items() if v["n"]}


def value(x):
    return x["mean"] if isinstance(x, dict) else x


def write_evidence(key, lock=threading.Lock()):
    with lock:
        _write_evidence(key)


def _write_evidence(key):
    records = [read_json(f) for f in sorted((ROOT / "runs" / "evidence").glob(f"{key}-s*.json"))]
    if not records:
        return
    F = figures(records)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    write_json(ROOT / "results" / "evidence.json", dict(F, hash=key, commit=commit, seeds={v: sum(r["variant"] == v for r in records) for v in
                                                        dict.fromkeys(r["variant"] for r in records)}, records=records))
    cell = lambda x, n=1: "" if x is None else f"{x['mean']:.{n}f}" + (f" ({x['low']:.{n}f} to {x['high']:.{n}f})"
                                                                      if x["low"] is not None else "")
    lines = [f"# Evidence: {len([r for r in records if r['variant'] == 'main'])} seeds, mean (95 % interval, t over seeds)", "",
             f"`python tests/evidence.py`, hash {key}, {platform.machine()}, one thread a run. Test streams, questions after the "
             "update; accuracy figures and gains in points, shares in [0, 1]; one memory per context at temperature 1 for `fully "
             "right`, `faithful`, `non-redundant`, win / tie / loss.", ""]
    methods = dict.fromkeys(k.rsplit(".", 1)[0] for k in F if k.endswith(".coverage"))
    columns = ("accuracy", "coverage", "precision", "matched_gain", "mismatched_gain", "fully_right", "non_redundant", "win", "loss")
    lines += ["| method | " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {m} | " + " | ".join(cell(F.get(f"{m}.{c}"), 1 if i < 5 else 2) for i, c in enumerate(columns)) + " |" for m in methods]
    lines += ["", "| Phase One ablation | fully right | tokens | non-redundant | accuracy | precision |", "|---|---|---|---|---|---|"]
    rows = ("fully_right", "tokens", "non_redundant", "accuracy", "precision")
    lines += [f"| {v} | " + " | ".join(cell(F.get(f"{v}.{c}"), 2 if i in (0, 2) else 1) for i, c in enumerate(rows)) + " |"
              for v in ("base", "phase1", *ABLATIONS)]
    lines += ["", "| figure | value |", "|---|---|"]
    lines += [f"| {k} | {cell(F[k], 3)} |" for k in F if k.startswith(("phase1.", "phase2.", "reward_model."))]
    picture(F)
    write_text(ROOT / "results" / "evidence.md", "\n".join(lines) + "\n")


NAMES = {"base": "base", "base+prompt": "base + task prompt", "phase1": "Phase One", "phase1+prompt": "Phase One + task prompt",
         "dpo-steer": "Phase Two, DPO (the paper)", "grpo-steer": "Phase Two, on-policy", "dpo-lora": "Phase Two, LoRA",
         "dpo-all": "Phase Two, all parameters", "dpo-steer-ten": "Phase Two, 10 steps scaled", "random-steer": "random vectors",
         "dpo-steer-layer0": "after layer 0", "dpo-steer-layer1": "after layer 1", "dpo-steer-layer3": "after layer 3 (the last)"}


def readme_table(F):
    """The results table of the README, from the figures: a test compares it with what stands there."""
    cell = lambda x, n=0: "-" if not x or x["mean"] is None else f"{x['mean']:.{n}f}" + (
        f" ({x['low']:.{n}f} to {x['high']:.{n}f})" if x["low"] is not None else "")
    rows = ["| method | accuracy | coverage | precision | gain over Phase One, matched | mismatched | fully right, % |",
            "|---|---|---|---|---|---|---|"]
    for m, name in NAMES.items():
        if f"{m}.accuracy" in F:
            right = F.get(f"{m}.fully_right")
            right = right and {k: v and 100 * v for k, v in right.items()}
            rows.append(f"| {name} | " + " | ".join([cell(F[f"{m}.{k}"]) for k in ("accuracy", "coverage", "precision")] + [
                cell(F.get(f"{m}.{k}")) for k in ("matched_gain", "mismatched_gain")] + [cell(right)]) + " |")
    return "\n".join(rows)


def picture(F):
    """results/accuracy.svg: accuracy of the main methods as bars with their intervals."""
    shown = [m for m in list(NAMES)[:6] + ["random-steer"] if f"{m}.accuracy" in F]
    scale, top = 4.2, 46                                     # pixels per point; first bar
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {top + 34 * len(shown) + 30}" font-family="sans-serif" '
             'font-size="15"><rect width="100%" height="100%" fill="white"/><text x="12" y="26" font-weight="bold">Questions '
             'answered from memory alone, % (mean and 95 % interval over seeds)</text>']
    for i, m in enumerate(shown):
        x, y = F[f"{m}.accuracy"], top + 34 * i
        colour = "#1f6f4a" if m.startswith(("dpo", "grpo")) else "#8a93a0"
        parts.append(f'<text x="218" y="{y + 17}" text-anchor="end">{NAMES[m]}</text>'
                     f'<rect x="228" y="{y}" width="{x["mean"] * scale:.1f}" height="24" fill="{colour}"/>')
        end = x["mean"]
        if x["low"] is not None:
            end = max(end, x["high"])
            parts.append(f'<path d="M{228 + x["low"] * scale:.1f} {y + 12}H{228 + x["high"] * scale:.1f}" stroke="black" stroke-width="2"/>')
        parts.append(f'<text x="{236 + end * scale:.1f}" y="{y + 17}">{x["mean"]:.0f}</text>')
    parts.append(f'<text x="12" y="{top + 34 * len(shown) + 18}" font-size="13" fill="#555">Embedded world, test streams never seen in '
                 'training; python tests/evidence.py</text></svg>')
    write_text(ROOT / "results" / "accuracy.svg", "\n".join(parts) + "\n")


def chain(seed, key):
    main_run(seed, key)
    write_evidence(key)


def main():
    key, jobs = source_hash(), int(sys.argv[1]) if len(sys.argv) > 1 else 4
    (ROOT / "runs" / "evidence").mkdir(parents=True, exist_ok=True)
    say(f"evidence {key}: {jobs} jobs on {os.cpu_count()} cores")
    with ThreadPoolExecutor(jobs) as pool:
        mains = {seed: pool.submit(chain, seed, key) for seed in SEEDS}

        def after(work, seed, *args):
            mains[seed].result()
            work(seed, key, *args)
            write_evidence(key)
        late = [pool.submit(after, ablation, s, v) for s in FEW for v in ABLATIONS]
        late += [pool.submit(after, side_run, s) for s in FEW]
        failed = [f.exception() for f in [*mains.values(), *late] if f.exception()]
    write_evidence(key)
    say(f"done, {len(failed)} failures" + "".join(f"\n  {e}" for e in failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
