"""What the README and results/README.md say is true: commands parse, places exist, figures are the committed ones.

Between `<!-- evidence -->` and `<!-- /evidence -->` every number is looked up. In a table, the row's name and the
column's head say which figure a cell shows (see COLUMNS). In a sentence, one of CLAIMS has to know the number.
"""
import re

import pytest

torch = pytest.importorskip("torch")
import common                                                               # noqa: E402
from experiments import bench, drift, evidence, mixed, retrieval            # noqa: E402
from support import plan                                                    # noqa: E402
from support.runs import ROOT, read_json                                    # noqa: E402
from test_full_size import sketch                                           # noqa: E402, F401

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROVENANCE = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README, "results/README.md": PROVENANCE}
F = read_json(ROOT / "results" / "evidence.json")
DRIFT = read_json(ROOT / "results" / "drift.json")
MIXED = read_json(ROOT / "results" / "mixed.json")
RETRIEVAL = read_json(ROOT / "results" / "retrieval.json")

# Head of a column -> (metric, decimals, factor).
COLUMNS = {
    "accuracy": ("accuracy", 0, 1), "coverage": ("coverage", 0, 1), "precision": ("precision", 0, 1),
    "gain over Phase One, matched": ("matched_gain", 0, 1), "mismatched": ("mismatched_gain", 0, 1),
    "fully right, %": ("fully_right.deployed", 0, 100), "tokens a memory": ("tokens.deployed", 1, 1)}


def mean(name, digits=0, factor=1):
    return f"{factor * F[name]['mean']:.{digits}f}"


def search_share(ranking, setting="right", fraction="10"):
    shares = RETRIEVAL[setting]["share of it"][ranking][fraction]["all"]
    return f"{100 * sum(shares) / len(shares):.0f}"


def drifted(policy):
    """Accuracy of a policy after the first block, with its interval."""
    return evidence.cell(DRIFT["policies"][policy]["after the first block"], 0)


def hours_of_the_log():
    log = (ROOT / "results" / "evidence.log").read_text(encoding="utf-8")
    seconds = sum(map(int, re.findall(r": (\d+) s$", log, re.M)))
    return f"{seconds / 3600:.1f}"


# What a sentence may claim, wherever it stands: pattern of its numbers -> what they have to be.
CLAIMS = {
    r"fully right from (\d+) to (\d+) %, at (\d+) % of the base's tokens": [
        mean("phase1.fully_right.deployed.base", 0, 100), mean("phase1.fully_right.deployed.phase1", 0, 100),
        mean("phase1.tokens_ratio.deployed", 0, 100)],
    r"Accuracy rises by (\d+) points, precision by (\d+)": [
        mean("phase1.gain_over_base"), mean("phase1.precision_change")],
    r"rises by (\d+) points over Phase One, and (\d+) over the task prompt": [
        mean("phase2.matched_gain"), mean("phase2.gain_over_prompt")],
    r"In the others it changes by (-?\d+):": [mean("phase2.mismatched_gain")],
    r"memories fall to (\d+) %": [mean("dpo-steer.fully_right.deployed", 0, 100)],
    r"with all of them (\d+) % are fully right, with a LoRA (\d+) %": [
        mean("dpo-all.fully_right.deployed", 0, 100), mean("dpo-lora.fully_right.deployed", 0, 100)],
    r"pairs rightly in (\d+) %": [mean("reward_model.pair_accuracy", 0, 100)],
    r"environments' questions in (\d+) %": [mean("reward_model.shuffled_accuracy", 0, 100)],
    r"(\d+) seeds of the main run": [str(F["seeds"]["main"])],
    r"(\d+) of each ablation and of the variants": [str(F["seeds"]["side"])],
    r"(\d+) % t intervals": ["95"],
    r"took ([\d.]+) hours of one core, on a machine with (\d+) cores that ran (\d+)": [hours_of_the_log(), "2", "2"],
    r"The agent that goes on answers (\S+ \(\S+ to \S+\)) %": [drifted("agent")],
    r"Phase One (\S+ \(\S+ to \S+\)), the first adapter, kept for ever, (\S+ \(\S+ to \S+\))": [
        drifted("phase1"), drifted("first")],
    r"told the latest questions, (\S+ \(\S+ to \S+\))": [drifted("told")],
    r"of each block, (\d+) seeds": [str(len(DRIFT["records"]))],
    r"keeps (\d+) % of the accuracy": [search_share("BM25, neighbours")],
    r"without neighbours (\d+) %": [search_share("BM25")],
    r"small base (\d+) %": [search_share("embeddings, neighbours")],
    r"last entries (\d+) %": [search_share("the last entries")],
    r"search it is (\d+) %": [search_share("BM25, neighbours", "untimed")],
    r"streams of (\d+) clips": [str(RETRIEVAL["clips"])]}


def blocks(text, name):
    return re.findall(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", text, re.S)


def flat(text):
    """In one line: a pattern may reach over a line break."""
    return " ".join(text.split())


def cells_of(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


# ================================================================ commands and places
# Scripts that the README tells to copy: {copy: original}.
COPIES = {copy: script for script, copy in re.findall(r"^cp (\w+)\.py (\w+)\.py$", README, re.M)}


def commands():
    """(script, arguments) of every command in the pages, with the README's shell variable M put in."""
    text = PROVENANCE + README
    variable = re.search(r'^M="(.*)"$', README, re.M)
    if variable:
        text = text.replace("$M", variable[1])
    found = re.findall(r"python (0\d_\w+)\.py((?: --[A-Z_0-9]+=[^\s`&|]+)*)", text)
    return sorted({(COPIES.get(script, script), arguments.strip()) for script, arguments in found})


@pytest.mark.parametrize("script, arguments", commands())
def test_commands_parse(script, arguments):
    common.settings(vars(common.stage(script)), arguments.split())


def test_there_are_commands():
    assert len(commands()) >= 8


def test_a_wrong_command_would_be_seen():
    with pytest.raises(SystemExit, match="RICHNESS"):
        common.settings(vars(common.stage("02_phase1_train")), ["--RICHNES=0"])


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    folder = (ROOT / page).parent
    for name in re.findall(r"\]\((?!http|#)([\w/.]+)\)", PAGES[page]):
        assert (folder / name).exists(), name
    for name in re.findall(r"python (\w[\w/]*\.py)", PAGES[page]):
        assert name.removesuffix(".py") in COPIES or (ROOT / name).exists(), name


def test_functions_exist():
    places = set(re.findall(r"`(common|0\d)[.:](\w+)", README)) - {("common", "py")}
    assert len(places) >= 15
    for place, name in places:
        module = common
        if place != "common":
            module = common.stage(evidence.script_of(place).removesuffix(".py"))
        assert hasattr(module, name), f"{place}.{name}"


# ================================================================ figures of the evidence
def test_figures_are_those_of_the_records():
    found = evidence.figures(evidence.read_records(F["hash"]))
    assert found == {name: F[name] for name in found} and len(found) > 100
    text = evidence.page(found, F["hash"], F["seeds"]["main"])
    written = (ROOT / "results" / "evidence.md").read_text(encoding="utf-8")
    assert written == text
    assert (ROOT / "results" / "accuracy.svg").read_text(encoding="utf-8") == evidence.picture(found)


def test_evidence_of_other_code_is_called_so():
    """Where the code has changed since, the README names the commit that the figures belong to."""
    if F["hash"] != evidence.source_hash():
        assert re.search(rf"commit `{F['commit'][:7]}`", README), F["commit"]


def figure_name(row):
    """The beginning of a row's figures: by the name of a method, or by the constant that an ablation sets."""
    for method, name in evidence.NAMES.items():
        if row == name:
            return method
    for ablation, flag in evidence.ABLATIONS.items():
        if flag in row.replace("`", " ").split():
            return ablation
    raise AssertionError(f"no figures are known for the row {row!r}")


def check_table(lines):
    """Every cell is its figure, with its interval or without."""
    head, _, *rows = map(cells_of, lines)
    for name, *cells in rows:
        for column, text in zip(head[1:], cells, strict=True):
            metric, digits, factor = COLUMNS[column]
            figure = F.get(f"{figure_name(name)}.{metric}")
            with_interval = evidence.cell(figure, digits, "-", scale=factor)
            assert text in (with_interval, with_interval.partition(" (")[0]), f"{name}, {column}: {with_interval}"


def check_sentences(text):
    """No number is left once those are gone that CLAIMS know, and those in `code` and in addresses."""
    left = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
    for pattern in CLAIMS:
        left = re.sub(pattern, "", left)
    assert not re.search(r"\d", left), f"no claim of this test knows the number in: {left}"


@pytest.mark.parametrize("page", PAGES)
def test_every_number_between_the_marks(page):
    found = blocks(PAGES[page], "evidence")
    assert found
    for block in found:
        tables = re.findall(r"^\|.*(?:\n\|.*)*", block, re.M)
        for table in tables:
            check_table(table.splitlines())
            block = block.replace(table, "")
        check_sentences(flat(block))


def test_the_readme_has_the_main_methods_between_the_marks():
    text = "\n".join(blocks(README, "evidence"))
    for method in ("base", "base+prompt", "phase1", "dpo-steer"):
        assert f"\n| {evidence.NAMES[method]} |" in text


@pytest.mark.parametrize("page", PAGES)
def test_claims_in_sentences(page):
    """Also outside of the marks."""
    text = flat(PAGES[page])
    claimed = 0
    for pattern, expected in CLAIMS.items():
        for match in re.finditer(pattern, text):
            claimed += 1
            assert list(match.groups()) == expected, match[0]
    assert claimed >= 4


def test_the_readme_has_the_ablations_between_the_marks():
    text = "\n".join(blocks(README, "evidence"))
    for flag in evidence.ABLATIONS.values():
        assert f"{flag}` |" in text


def test_the_effects_beside_the_paper():
    assert blocks(README, "effects") == [evidence.table_of_effects(F)]


# ================================================================ figures of bench, search and plan
def test_the_table_of_the_bench():
    assert blocks(PROVENANCE, "bench") == [bench.page(read_json(ROOT / "results" / "bench.json"))]


def test_the_picture_of_drift():
    found = drift.figures(DRIFT["records"])
    assert found == DRIFT["policies"]
    picture = (ROOT / "results" / "drift.svg").read_text(encoding="utf-8")
    assert picture == drift.picture(found, len(DRIFT["records"]))
    for claim in ("The agent that goes on answers", "the first adapter, kept for ever,", "told the latest questions,"):
        assert claim in flat(README)


def test_the_table_of_mixed_questions():
    rows = mixed.rows_of(MIXED["records"])
    assert rows == MIXED["rows"] and blocks(README, "mixed") == [mixed.table(rows)]
    assert (ROOT / "results" / "mixed.md").read_text(encoding="utf-8") == mixed.page(rows, len(MIXED["records"]))


def test_the_table_of_the_search():
    assert blocks(PROVENANCE, "retrieval") == [retrieval.page(RETRIEVAL)]


def rows_below(head):
    """Cells of the table in results/README.md whose first line is `head`."""
    table = PROVENANCE[PROVENANCE.index(head):].split("\n\n")[0]
    return [cells_of(line) for line in table.splitlines()[2:]]


def full_size(text):
    """Constants of Phase One with the arguments that stand in a text."""
    arguments = re.findall(r"--[A-Z_]+=\w+", text)
    return common.settings(vars(common.stage("02_phase1_train")), ["--MODEL=x", *arguments])


def test_planned_bytes(sketch, capsys):                                     # noqa: F811
    weights = rows_below("| weights | planned, GiB | measured, GiB |")
    cards = rows_below("| card, GiB | constants |")
    assert len(weights) == 4 and len(cards) == 3
    measured = read_json(ROOT / "results" / "full_size.json")["5 model"]["build"]["weights_gib"]
    for text, size, on_a_card in weights:
        kinds = plan.weight_bytes(sketch, full_size(text)).values()
        assert f"{sum(kind.bytes for kind in kinds) / 2**30:.2f}" == size, text
        assert on_a_card == (f"{measured:.2f}" if "default" in text else "not measured")
    for card, text, prompt, step, contexts in cards:
        S = full_size(text)
        found = plan.plan(sketch, S, int(card) * 2**30)
        assert [prompt, step] == [str(found.prompt), f"{found.in_training() / 2**30:.0f}"], text
        room = plan.check_plan(sketch, S, int(card) * 2**30)
        assert room.side_by_side(found.prompt, S.GROUP, S.MAX_NEW_TOKENS) == (int(contexts), S.GROUP)


def test_the_hours_are_those_of_the_plan():
    """The rows and commands stand in results/hours.md, which test_hours.py compares with the plan."""
    planned = (ROOT / "results" / "hours.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:H100|A100-80) \|.*$", README, re.M)
    assert len(rows) == 3 and all(row in planned for row in rows)
    [recipe] = re.findall(r"^```bash\n(M=.*?)```$", README, re.M | re.S)
    assert recipe in planned
