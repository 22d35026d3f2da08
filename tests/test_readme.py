"""The README is true: its commands parse, its line counts are those of the files, its figures those
of the committed evidence."""
import importlib
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common                                                               # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "tests"))
evidence = importlib.import_module("evidence")


def commands():
    """(script, arguments) of every command in the README, with its shell variable M put in."""
    text = README.replace("$M", re.search(r'^M="(.*)"$', README, re.M)[1])
    found = re.findall(r"python (0\d_\w+)\.py((?: --[A-Z_0-9]+=[^\s`&|]+)*)", text)
    return sorted({(script, args.strip()) for script, args in found})


@pytest.mark.parametrize("script, args", commands())
def test_commands_parse(script, args):
    common.settings(vars(importlib.import_module(script)), args.split())


def test_a_wrong_command_would_be_seen():
    with pytest.raises(SystemExit, match="RICHNESS"):
        common.settings(vars(importlib.import_module("02_phase1_train")), ["--RICHNES=0"])


def test_there_are_commands():
    assert len(commands()) >= 8


def test_line_counts():
    for name, lines in re.findall(r"^\| \[(\w+\.py)\].*\| (\d+) \|$", README, re.M):
        assert int(lines) == (ROOT / name).read_text(encoding="utf-8").count("\n"), name
    assert len(re.findall(r"^\| \[0\d_\w+\.py\]", README, re.M)) == 6
    common_lines = int(re.search(r"\[common\.py\]\(common\.py\) \((\d+) lines\)", README)[1])
    assert common_lines == (ROOT / "common.py").read_text(encoding="utf-8").count("\n")
    assert README.count("\n") <= 220


def test_files_and_functions_exist():
    for name in re.findall(r"\]\((?!http)([\w/.]+)\)", README):
        assert (ROOT / name).exists(), name
    stages = {p.name[:2]: importlib.import_module(p.stem) for p in ROOT.glob("0*.py")}
    places = set(re.findall(r"`(common|0\d)[.:](\w+)", README)) - {("common", "py")}
    assert len(places) >= 15
    for place, name in places:
        assert hasattr(common if place == "common" else stages[place], name), f"{place}.{name}"


def test_results_are_those_of_the_committed_evidence():
    F = common.read_json(ROOT / "results" / "evidence.json")
    block = re.search(r"<!-- evidence -->\n(.*?)\n<!-- /evidence -->", README, re.S)[1]
    assert block == evidence.readme_table(F)
    assert evidence.figures(F["records"]) == {                                  # and those of the records
        k: F[k] for k in evidence.figures(F["records"])}


def test_figures_of_the_search_are_those_of_the_committed_run():
    R = common.read_json(ROOT / "results" / "retrieval.json")
    text = " ".join(README[README.index("**Memories beyond"):README.index("What the tricks")].split())
    share = lambda how, case="right": round(100 * sum(R[case]["kept"][how]["10"]["all"]) / R["streams"])
    for pattern, value in ((r"keeps (\d+) %", share("BM25, neighbours")),
                           (r"without neighbours (\d+) %", share("BM25")),
                           (r"small base (\d+) %", share("embeddings, neighbours")),
                           (r"last entries (\d+) %", share("the last entries")),
                           (r"it is (\d+) %", share("BM25, neighbours", "untimed"))):
        assert int(re.search(pattern, text)[1]) == value, pattern
    assert f"five embedded streams of {R['clips']} clips" in text and R["streams"] == 5


def test_numbers_in_the_text():
    """Every `{key}`-like claim in "What you should see" and the ablation table stands
    in the evidence, rounded."""
    F = common.read_json(ROOT / "results" / "evidence.json")
    shown = README[README.index("## What you should see"):README.index("## Results on")]
    claims = {r"about (\d+) % of its memories fully right": 100 * F["phase1.fully_right.base"]["mean"],
              r"raises that to (\d+) %": 100 * F["phase1.fully_right.phase1"]["mean"],
              r"rises by (\d+) points": F["phase2.matched_gain"]["mean"],
              r"changes by (-?\d+)": F["phase2.mismatched_gain"]["mean"]}
    for pattern, value in claims.items():
        assert int(re.search(pattern, shown, re.S)[1]) == round(value), pattern
    for variant, flag in evidence.ABLATIONS.items():
        row = next(line for line in README.splitlines() if flag in line and line.startswith("|"))
        measured = [f"{F[f'{variant}.{name}']['mean']:.{digits}f}"
                    for name, digits in (("fully_right", 2), ("tokens", 1))
                    if f"{variant}.{name}" in F] or ["not yet measured"]
        assert all(text in row for text in measured), (variant, measured)
