"""How 06_eval.py shows its results: tables for the terminal and Markdown, and a page of its own.

What is counted stands in figures.py. The page fetches nothing, so it opens offline and can be sent
as one file: its pictures are data URIs and its charts inline SVG. `results` is everywhere what
results.json holds.
"""
import base64
import csv
import html
import io
import math
import re
import textwrap
from dataclasses import dataclass

from support.overlay import clip_frames
from support.runs import clock

TITLES = {
    "base": "Base",
    "base+prompt": "Base + task prompt",
    "phase1": "Phase One",
    "phase1+prompt": "Phase One + task prompt",
}

# Columns of the training logs that are drawn, with their titles.
CURVES = {
    "reward": "reward",
    "quality": "quality reward",
    "malformed": "malformed share",
    "memory": "tokens of a memory",
    "loss": "loss",
    "margin": "margin",
    "norm": "norm of the adapter",
}

# Paper, table of section 4: accuracy, coverage and precision over all questions, in per cent.
PAPER = {
    "videomme": {
        "base": (61.6, 74.7, 82.5),
        "base+prompt": (64.2, 77.3, 83.0),
        "phase1": (64.4, 75.4, 85.3),
        "dpo-steer": (67.9, 79.3, 85.6),
    },
    "egolife": {
        "base": (38.4, 52.4, 73.3),
        "base+prompt": (40.0, 51.0, 78.4),
        "phase1": (39.6, 51.0, 77.6),
        "dpo-steer": (45.4, 56.4, 80.5),
    },
    "egotempo": {
        "base": (22.3, 38.9, 57.2),
        "base+prompt": (24.5, 42.9, 57.1),
        "phase1": (23.7, 37.5, 63.3),
        "dpo-steer": (27.6, 43.7, 63.2),
    },
}


# ---------------------------------------------------------------- names and numbers
def title(method):
    return TITLES.get(method, f"Phase Two, {method}")


def named(results, method):
    """Title of a method, and where its figures aren't about all environments, about how many."""
    about = set()
    for row in results["rows"]:
        if row["method"] == method:
            about.add(row["environment"])
    served = len(about - {"all"})
    total = len(results["transfer"]["phase1"])
    return title(method) if served == total else f"{title(method)} ({served} of {total})"


def cell(figure, scale=100):
    """Mean and interval as text; the mean alone where there is no interval, else a dash.

    >>> cell({"mean": 0.671, "low": 0.62, "high": 0.719})
    '67.1 (62.0–71.9)'
    >>> cell({"mean": 0.02, "low": -0.01, "high": 0.05})
    '2.0 (-1.0 to 5.0)'
    >>> cell({"mean": None, "low": None, "high": None})
    '–'
    """
    if figure is None or figure["mean"] is None:
        return "–"
    mean = mean_alone(figure, scale)
    if figure["low"] is None:
        return mean
    low = f"{scale * figure['low']:.1f}"
    high = f"{scale * figure['high']:.1f}"
    dash = " to " if low.startswith("-") else "–"
    return f"{mean} ({low}{dash}{high})"


def mean_alone(figure, scale=100):
    return "–" if figure["mean"] is None else f"{scale * figure['mean']:.1f}"


# ---------------------------------------------------------------- tables
@dataclass
class Table:
    name: str
    note: str
    columns: list
    rows: list              # lists of texts, one for each column
    style: str = ""         # "folded": behind a click; "heat": cells coloured by their value


# Heading -> key of a row in `results`.
METRICS = {"Accuracy": "accuracy", "Coverage": "coverage", "Precision": "precision"}
ANSWER_COLUMNS = [*METRICS, "Questions"]


def tables(results):
    """Every table of the results, in the order in which they are shown."""
    yield answers_table(results)
    yield deployed_table(results)
    yield gains_table(results)
    yield types_table(results)
    if results["source"] in PAPER:
        yield paper_table(results)
    if results["readers"]:
        yield readers_table(results)
    for method in adapter_methods(results):
        if was_crossed(results, method):
            yield transfer_table(results, method)
    yield same_contexts_table(results)
    yield environments_table(results)
    yield all_questions_table(results)


def pooled_rows(rows, scope):
    """The rows over all environments, one for each method that has this scope."""
    return [row for row in rows if row["environment"] == "all" and row["scope"] == scope]


def answer_cells(row):
    """Texts of ANSWER_COLUMNS."""
    cells = [cell(row[key]) for key in METRICS.values()]
    questions = str(row["questions"])
    if row["retrieved"]:
        questions += f" ({row['retrieved']} retrieved)"
    return [*cells, questions]


def answer_rows(results, scope):
    """A row over all environments for each method that has this scope."""
    rows = []
    for row in pooled_rows(results["rows"], scope):
        rows.append([named(results, row["method"]), *answer_cells(row)])
    return rows


def answers_table(results):
    note = (f"Per cent of the questions asked after the update; 95 % intervals over "
            f"{results['unit']}. Accuracy: answered right. Coverage: the memory was enough. "
            "Precision: right among the covered.")
    if any(row["retrieved"] for row in results["rows"]):
        note += " Retrieved: not all fit the reader, who saw the most relevant."
    dropped = sum(results["dropped"].values())
    if dropped:
        note += f" {dropped} verdicts that the judge failed to give are left out."
    note += " Fully right, tokens: of these memories (see below)."
    deployed = {}
    for row in results["deployed"]:
        if row["environment"] == "all":
            cells = [cell(row["fully_right"]), cell(row["tokens"], 1)]
            deployed[named(results, row["method"])] = cells
    rows = []
    for row in answer_rows(results, "after"):
        # A small VALIDATE leaves an examinee of a late environment without a memory to be judged.
        rows.append([*row, *deployed.get(row[0], ["–", "–"])])
    columns = ["Method", *ANSWER_COLUMNS, "Fully right", "Tokens"]
    return Table("Answers from memory", note, columns, rows)


def gains_table(results):
    rows = []
    for method, gains in results["gains"].items():
        rows.append([
            named(results, method),
            gain_cell(gains["over_base"], "accuracy"),
            gain_cell(gains["over_phase1"], "accuracy"),
            gain_cell(gains["mismatched"], "accuracy"),
            gain_cell(gains["over_phase1"], "precision"),
        ])
    columns = ["Method", "Accuracy over base", "Accuracy over Phase One",
               "Mismatched, over Phase One", "Precision over Phase One"]
    note = "In points. Mismatched: an adapter on questions of environments that it did not learn."
    return Table("Gains", note, columns, rows)


def gain_cell(gain, metric):
    """gain: {metric: figure in points}; None where a method is compared with itself."""
    return "–" if gain is None else cell(gain[metric], 1)


def types_table(results):
    found = {}
    for row in results["rows"]:
        if row["scope"] == "after":
            found[row["method"], row["environment"]] = row
    methods = list(results["gains"])
    rows = []
    for environment in [*results["transfer"]["phase1"], "all"]:
        cells = [three_shares(found.get((method, environment))) for method in methods]
        rows.append([environment, *cells])
    note = "Accuracy / coverage / precision in per cent, of the questions asked after the update."
    return Table("By type", note, ["Type", *methods], rows)


def three_shares(row):
    """Whole per cents, without intervals; a dash where a method has no row."""
    if row is None:
        return "–"
    means = [row[key]["mean"] for key in METRICS.values()]
    return " / ".join("–" if mean is None else f"{100 * mean:.0f}" for mean in means)


def paper_table(results):
    paper = PAPER[results["source"]]
    columns = ["Method"]
    for heading in METRICS:
        columns += [heading, "Paper"]
    rows = []
    for row in pooled_rows(results["rows"], "all"):
        if row["method"] in paper:
            cells = [named(results, row["method"])]
            for key, theirs in zip(METRICS.values(), paper[row["method"]]):
                cells += [cell(row[key]), str(theirs)]
            rows.append(cells)
    note = ("Over all questions, the first ones included, as the paper counts them; its numbers are "
            "those of Qwen3-VL-30B-A3B, on Video-MME for short and medium videos.")
    return Table("Beside the paper", note, columns, rows)


def readers_table(results):
    by_reader = {"the usual one": results["rows"], **results["readers"]}
    rows = []
    for method in results["gains"]:
        for reader, rows_of_reader in by_reader.items():
            for row in pooled_rows(rows_of_reader, "after"):
                if row["method"] == method:
                    rows.append([named(results, method), reader, *answer_cells(row)])
    note = "The same memories, read by others."
    return Table("Other readers", note, ["Method", "Reader", *ANSWER_COLUMNS], rows)


def adapter_methods(results):
    """The methods that have an adapter for each environment."""
    return [method for method in results["transfer"] if method != "phase1"]


def was_crossed(results, method):
    """Whether an adapter was asked anything by an environment that it did not learn."""
    for learned, row in results["transfer"][method].items():
        for environment, figures in row.items():
            if environment != learned and figures["accuracy"]["mean"] is not None:
                return True
    return False


def transfer_table(results, method):
    phase1 = results["transfer"]["phase1"]
    rows = []
    for learned, row in {"Phase One": phase1, **results["transfer"][method]}.items():
        cells = [mean_alone(figures["accuracy"]) for figures in row.values()]
        rows.append([learned, *cells])
    note = ("Accuracy in per cent. A row is what an adapter learned, a column the environment that "
            "asks; framed where they are the same.")
    return Table(f"Transfer: {title(method)}", note, ["Adapter", *phase1], rows, "heat")


# Heading -> figure of a judged memory.
KINDS = {
    "Win": "win",
    "Tie": "tie",
    "Loss": "loss",
    "Faithful": "faithful",
    "Not repeating": "non_redundant",
    "Fully right": "fully_right",
    "Well formed": "well_formed",
    "Tokens": "tokens",
}


def deployed_table(results):
    note = ("Per cent, of the memories that the answers came from: written as at deployment, each with "
            "the policy's own memories before it. Win, tie, loss: against Phase One's memory of the "
            "same clip, by the relevance judge. Faithful: true and within the budget. Fully right: well "
            "formed, faithful and nothing repeated. Tokens: of a well-formed memory.")
    return memories_table("Memories as deployed", note, results, "deployed")


def same_contexts_table(results):
    note = ("Per cent, not to be compared with the table above: a memory per context, all with the "
            "Phase One history, at temperature 1 as in training, where answers differ most.")
    return memories_table("Memories in the same contexts, temperature 1", note, results, "validation")


def memories_table(name, note, results, part):
    """part: "deployed" or "validation", two lists of the results with rows of the same form."""
    rows = []
    for row in results[part]:
        if row["environment"] == "all":
            cells = [cell(row[kind], scale_of(kind)) for kind in KINDS.values()]
            rows.append([named(results, row["method"]), *cells])
    return Table(name, note, ["Method", *KINDS], rows)


def scale_of(kind):
    return 1 if kind == "tokens" else 100


def environments_table(results):
    rows = []
    for row in results["rows"]:
        environment = row["environment"]
        if row["scope"] == "after" and environment != "all":
            rows.append([named(results, row["method"]), environment, *answer_cells(row)])
    note = "Per cent of the questions asked after the update."
    columns = ["Method", "Environment", *ANSWER_COLUMNS]
    return Table("Every environment", note, columns, rows, "folded")


def all_questions_table(results):
    note = ("The same with the recent questions pooled in, which Phase One answered: the way the "
            "paper counts.")
    rows = answer_rows(results, "all")
    return Table("With the first questions", note, ["Method", *ANSWER_COLUMNS], rows, "folded")


# ---------------------------------------------------------------- Markdown and terminal
def markdown(results):
    """All tables as Markdown."""
    lines = [f"# Results of the run {results['run']}: {results['streams']} test streams\n"]
    for table in tables(results):
        lines.append(f"## {table.name}\n\n{table.note}\n")
        lines.append(markdown_row(table.columns))
        lines.append("|---" * len(table.columns) + "|")
        lines += [markdown_row(row) for row in table.rows]
        lines.append("")
    return "\n".join(lines)


def markdown_row(cells):
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


def show(results):
    """Prints the answers from memory and what they come to. All else is in the files.

    Beside them, where there are any, the paper's figures and those of other readers.
    """
    print_table(answers_table(results))
    if results["source"] in PAPER:
        print_table(paper_table(results))
    if results["readers"]:
        print_table(readers_table(results))
    print("\n" + textwrap.fill(headline(results), 100))
    dropped = [f"{number} {name}" for name, number in results["dropped"].items()]
    if any(results["dropped"].values()):
        print(f"left out, as the judge failed: {', '.join(dropped)}")
    print()


def print_table(table):
    lines = [table.columns, *table.rows]
    widths = [max(len(text) for text in column) for column in zip(*lines)]
    print(f"\n{table.name}")
    for line in lines:
        padded = [text.ljust(width) for text, width in zip(line, widths)]
        print(("  " + "  ".join(padded)).rstrip())


def headline(results):
    """The result in a few sentences."""
    accuracy = {}
    for row in pooled_rows(results["rows"], "after"):
        accuracy[row["method"]] = mean_alone(row["accuracy"])
    streams = f"{results['streams']} test stream{'' if results['streams'] == 1 else 's'}"
    sentences = [f"From nothing but its own memories of {streams}, the base answers "
                 f"{accuracy['base']}% of the questions and Phase One {accuracy['phase1']}%."]
    for method in adapter_methods(results):
        gains = results["gains"][method]
        points = mean_alone(gains["over_phase1"]["accuracy"], 1)
        elsewhere = ""
        if gains["mismatched"]:
            mismatched = mean_alone(gains["mismatched"]["accuracy"], 1)
            elsewhere = f", against {mismatched} in the other environments"
        sentences.append(
            f"The adapters of {named(results, method)} answer {accuracy[method]}% in the environment "
            f"whose recent questions they learned from: {points} points over Phase One "
            f"there{elsewhere}.")
    return " ".join(sentences)


# ---------------------------------------------------------------- the page
STYLE = """
:root{color-scheme:light dark;--ink:#1d2129;--soft:#59616e;--page:#fff;--rule:#d5d9e0;--heat:#2f7ed8;
--mark:#ffe49a}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaee;--soft:#a9b1be;--page:#15181d;--rule:#3a414c;
--heat:#3d7fc4;--mark:#6b5200}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;font:17px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--page);overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.3rem;margin:2.4rem 0 .3rem}
h3{font-size:1.1rem;margin:2rem 0 .5rem}
p{max-width:46rem;margin:.4rem 0 .9rem}.soft,small{color:var(--soft);font-size:16px}
.box{overflow-x:auto;border:1px solid var(--rule);border-radius:8px}
table{border-collapse:collapse;width:100%;overflow-wrap:normal}
td,th{padding:.4rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule);
font-variant-numeric:tabular-nums}
tr:last-child td{border-bottom:0}th{color:var(--soft);font-weight:600}
th+th{white-space:normal;min-width:6rem}.heat th+th{min-width:0}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:var(--page);
white-space:normal;min-width:6.4rem}
td small{display:block}.heat td+td{background:color-mix(in srgb,var(--heat) var(--h),transparent)}
.own{outline:2px solid var(--ink);outline-offset:-4px}
summary{cursor:pointer;padding:.8rem 0;font-size:1.15rem;font-weight:600}
.grid{display:grid;gap:1rem 1.5rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
.bars{max-width:28rem;margin:1.2rem 0 .4rem}.bars text{fill:var(--ink)}
figure,dl,dd{margin:0}svg{width:100%;height:auto;display:block}svg text{font-size:16px;fill:var(--soft)}
.key span{white-space:nowrap;margin-right:1rem}
.key i{display:inline-block;width:1.6rem;border-top:4px solid;vertical-align:middle;margin-right:.4rem}
.frames{display:grid;gap:6px;grid-template-columns:repeat(auto-fill,minmax(min(46%,220px),1fr));
max-width:60rem;margin-bottom:1rem}
.frames img{width:100%;border-radius:6px;display:block}dt{font-weight:600}
mark{background:var(--mark);color:inherit;border-radius:3px;padding:0 .15em;text-decoration:underline}
@media(min-width:44rem){td,th{padding:.45rem .8rem}td:first-child,th:first-child{min-width:9rem}}
"""
INKS = ["#2f7ed8", "#d9661f", "#1f9d6b", "#b85cc8", "#b8920b", "#d8485f", "#3aa0b5", "#8a8f98"]

def page(results, curves, examples):
    """The report as one HTML document. curves, examples: HTML of the functions below."""
    run = html.escape(results["run"])
    sections = "".join(section(table) for table in tables(results))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{run}: results</title><style>{STYLE}</style></head><body>
<h1>What the memories can answer: run {run}</h1><p>{html.escape(headline(results))}</p>
{bars(results)}<p class="soft">Per cent answered right, with its 95 % interval; pale: covered.</p>{sections}
<h2>Training</h2><div class="grid">{curves}</div>
<h2>What each policy wrote</h2><p class="soft">Each policy with its own memories as history. Marked: what
Phase One's memory of the same clip does not say.</p>{examples}</body></html>
"""


def section(table):
    name = html.escape(table.name)
    if table.style == "folded":
        return f"<details><summary>{name}</summary>{html_table(table)}</details>"
    return f"<h2>{name}</h2>{html_table(table)}"


def html_table(table):
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = ""
    for row in table.rows:
        cells = "".join(html_cell(table, row, i) for i in range(len(row)))
        body += f"<tr>{cells}</tr>"
    note = html.escape(table.note)
    return (f'<p class="soft">{note}</p><div class="box"><table class="{table.style}">'
            f'<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def html_cell(table, row, i):
    """An interval in brackets gets a line of its own. In a heat table the value sets the colour."""
    text = re.sub(r"^(\S+) \((.*)\)$", r"\1<small>\2</small>", html.escape(row[i]))
    attributes = ""
    if table.style == "heat" and i > 0 and row[i] != "–":
        attributes = f' style="--h:{0.75 * float(row[i]):.0f}%"'
        if row[0] == table.columns[i]:
            attributes += ' class="own"'
    return f"<td{attributes}>{text}</td>"


# ---------------------------------------------------------------- charts
def bars(results):
    """A bar per method: accuracy after the update with its interval, in front of coverage (pale)."""
    rows = [row for row in pooled_rows(results["rows"], "after") if row["questions"]]
    svg = ""
    for i, row in enumerate(rows):
        name = html.escape(named(results, row["method"]))
        svg += bar(name, row["accuracy"], row["coverage"], top=54 * i + 24)
    return (f'<svg class="bars" viewBox="0 0 340 {54 * len(rows)}" role="img" '
            f'aria-label="Accuracy of every method, as in the first table">{svg}</svg>')


def bar(name, accuracy, coverage, top):
    """top: in pixels, of the bar; its name stands above it."""
    svg = (f'<text x="2" y="{top - 6}">{name}</text>'
           f'<text x="336" y="{top + 16}" text-anchor="end">{mean_alone(accuracy)}</text>'
           f'<path fill="var(--rule)" d="M2 {top}H{bar_end(coverage["mean"])}v20H2z"/>'
           f'<path fill="var(--heat)" d="M2 {top}H{bar_end(accuracy["mean"])}v20H2z"/>')
    if accuracy["low"] is not None:
        low = bar_end(accuracy["low"])
        high = bar_end(accuracy["high"])
        svg += (f'<path fill="none" stroke="var(--ink)" stroke-width="2" '
                f'd="M{low} {top + 5}v10m0 -5H{high}m0 -5v10"/>')
    return svg


def bar_end(share):
    return f"{2 + 276 * share:.1f}"


def ticks(low, high):
    """Two to six round numbers between low and high, low < high.

    >>> ticks(-0.54, 0.55), ticks(0, 119)
    ([-0.5, 0.0, 0.5], [0, 50, 100])
    """
    fifth = (high - low) / 5
    power = 10 ** math.floor(math.log10(fifth))
    for factor in (1, 2, 5, 10):
        step = factor * power
        if step >= fifth:
            break
    first = math.ceil(low / step)
    last = math.floor(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def chart(name, lines):
    """A line chart with axes and legend as inline SVG. lines: {label: [(step, value)]}."""
    points = []
    for line in lines.values():
        points += line
    left, right = span([step for step, _ in points])
    bottom, top = span([value for _, value in points])

    def x_of(step):                                                # in pixels
        return 62 + 266 * (step - left) / (right - left)

    def y_of(value):
        return 196 - 180 * (value - bottom) / (top - bottom)

    svg = ""
    for value in ticks(bottom, top):
        y = y_of(value)
        svg += (f'<path d="M62 {y:.0f}H332" stroke="var(--rule)"/>'
                f'<text x="56" y="{y + 5:.0f}" text-anchor="end">{value:g}</text>')
    for step in ticks(left, right):
        svg += f'<text x="{x_of(step):.0f}" y="216" text-anchor="middle">{step:g}</text>'
    keys = ""
    for i, (label, line) in enumerate(lines.items()):
        ink = INKS[i % len(INKS)]
        path = "L".join(f"{x_of(step):.1f} {y_of(value):.1f}" for step, value in line)
        svg += f'<path d="M{path}" fill="none" stroke="{ink}" stroke-width="2"/>'
        keys += f'<span><i style="border-color:{ink}"></i>{html.escape(label)}</span>'
    name = html.escape(name)
    return (f'<figure><figcaption><b>{name}</b></figcaption><svg viewBox="0 0 340 244" role="img" '
            f'aria-label="{name} by step">{svg}<path d="M62 14V196H332" fill="none" '
            f'stroke="var(--soft)"/><text x="197" y="238" text-anchor="middle">step</text></svg>'
            f'<p class="key">{keys}</p></figure>')


def span(values):
    """(least, greatest), made one wide where all are the same."""
    low = min(values)
    high = max(values)
    return low, high + 1 if high == low else high


def training_curves(examinees, phase1_adapter):
    """Charts of the logs of Phase One and the adapters: one for each of CURVES that a log has."""
    logs = {"phase1": {"": read_log(phase1_adapter)}}              # method -> environment -> rows
    for examinee in examinees:
        if examinee.folder:
            logs.setdefault(examinee.method, {})[examinee.environment] = read_log(examinee.folder)
    charts = ""
    for method, runs in logs.items():
        for column, what in CURVES.items():
            lines = {}
            for environment, rows in runs.items():
                line = read_line(rows, column)
                if line:
                    lines[environment or column] = line
            if lines:
                charts += chart(f"{title(method)}: {what}", lines)
    return charts or "<p>No training log was found.</p>"


def read_log(adapter):
    """Rows of the log.csv beside an adapter's folder; none where it is missing."""
    path = adapter.parent / "log.csv"
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        return list(csv.DictReader(file))


def read_line(rows, column):
    """[(step, value)] of a column, where it has a value. A line that was cut has none."""
    line = []
    for row in rows:
        try:
            point = float(row["step"]), float(row[column])
        except (KeyError, TypeError, ValueError):
            continue
        if all(map(math.isfinite, point)):
            line.append(point)
    return line


# ---------------------------------------------------------------- examples
def examples(examinees, memories, streams, number, frames_per_clip):
    """A `number` of clips spread over the test streams: frames, and what each policy wrote of them.

    memories: {slug: rows}. Phase One comes first, because the others are compared with it.
    """
    shown = [examinee for examinee in examinees if not examinee.is_prompted]
    shown.sort(key=lambda examinee: examinee.slug != "phase1")
    text = ""
    for i in range(min(number, len(streams))):
        stream = streams[i * len(streams) // number]
        clip = stream["clips"][len(stream["clips"]) // 2]
        wrote = []
        for examinee in shown:
            name = title(examinee.method)
            if examinee.environment:
                name += f": {examinee.environment}"
            for row in memories[examinee.slug]:
                if (row["stream"], row["clip"]) == (stream["stream"], clip["clip"]):
                    wrote.append((name, row["memory"]))
        frames, _ = clip_frames(clip, frames_per_clip)
        text += example(stream["stream"], clip["start"], frames, wrote)
    return text


def example(stream, start, frames, wrote):
    """One clip. frames (n, H, W, 3), four are shown; wrote: [(policy, memory)], Phase One first."""
    every = math.ceil(len(frames) / 4)
    images = "".join(image(frame) for frame in frames[::every])
    items = ""
    for policy, memory in wrote:
        _, reference = wrote[0]
        text = marked(memory, reference) if memory else "wrote no well-formed memory"
        items += f"<div><dt>{html.escape(policy)}</dt><dd>{text}</dd></div>"
    return (f'<h3>{html.escape(stream)} at {clock(start)}</h3>'
            f'<div class="frames">{images}</div><dl class="grid">{items}</dl>')


def image(frame):
    """A frame (H, W, 3) uint8 as an <img> with its JPEG inside; small, as the page holds many."""
    from PIL import Image
    picture = Image.fromarray(frame)
    picture.thumbnail((480, 480))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=88)
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{text}">'


def marked(memory, reference):
    """Escaped HTML of a memory; phrases that the reference lacks are marked, wherever they stand.

    >>> marked("now, a cup, tea.", "now, a tent, tea")
    'now, <mark>a cup,</mark> tea.'
    """
    known = {bare(phrase) for phrase in phrases(reference)}
    parts = []
    for phrase in phrases(memory):
        text = html.escape(phrase)
        parts.append(text if bare(phrase) in known else f"<mark>{text}</mark>")
    return " ".join(parts)


def phrases(text):
    return re.split(r"(?<=[,.;:!?])\s+", text)


def bare(phrase):
    return phrase.strip(" ,.;:!?").lower()
