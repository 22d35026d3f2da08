"""How 06_eval.py shows its results: intervals, tables for the terminal and Markdown, one self-contained page.

What is counted stands in 06. The page fetches nothing, so it opens offline and can be sent as one file; its
pictures are data URIs and its charts inline SVG.
"""
import base64, csv, html, io, math, re

import common

TITLES = {"base": "Base", "base+prompt": "Base + task prompt", "phase1": "Phase One",
          "phase1+prompt": "Phase One + task prompt"}
COLUMNS = {"quality": "quality reward", "malformed": "malformed share", "memory": "tokens of a memory",
           "norm": "norm of the adapter"}


CURVES = "reward,quality,malformed,memory,loss,margin,norm"     # columns of the training logs to draw

# paper, table of section 4: accuracy, coverage and precision over all questions, in per cent
PAPER = {"videomme": {"base": (61.6, 74.7, 82.5), "base+prompt": (64.2, 77.3, 83.0),
                      "phase1": (64.4, 75.4, 85.3), "dpo-steer": (67.9, 79.3, 85.6)},
         "egolife": {"base": (38.4, 52.4, 73.3), "base+prompt": (40.0, 51.0, 78.4),
                     "phase1": (39.6, 51.0, 77.6), "dpo-steer": (45.4, 56.4, 80.5)},
         "egotempo": {"base": (22.3, 38.9, 57.2), "base+prompt": (24.5, 42.9, 57.1),
                      "phase1": (23.7, 37.5, 63.3), "dpo-steer": (27.6, 43.7, 63.2)}}


# ------------------------------------------------------------------------------------------------ intervals
def resamples(groups, n, seed):
    """How often each stream is drawn in each of `n` bootstrap samples: (n, streams of all groups).

    groups: sizes; each is resampled by itself (test streams; streams of the recent questions). Every figure
    uses the same draws, so the differences between methods are paired by stream.
    """
    import numpy as np
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.multinomial(g, [1 / g] * g, n) for g in groups if g], axis=1)


def ratio(counts, weights, top, bottom, minus=None):
    """{mean, low, high} of the pooled ratio sum(top) / sum(bottom); with `minus` the lead over it in points.

    counts, minus (streams, columns); weights (B, streams). All three are None where the bottom is 0
    (precision where nothing was covered); low and high also where a single stream gives no spread.

    >>> import numpy as np
    >>> ratio(np.array([[4., 2.], [12., 10.]]), resamples([2], 9, 0), 1, 0)["mean"]
    0.75
    """
    import numpy as np

    def share(c):
        sums = np.concatenate([np.ones((1, len(c))), weights]) @ c     # (1 + B, columns): the data first
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums[:, top] / sums[:, bottom]                      # (1 + B,)

    values = share(counts) if minus is None else 100 * (share(counts) - share(minus))
    if not np.isfinite(values[0]):
        return {"mean": None, "low": None, "high": None}
    low = high = None
    if (counts[:, bottom] > 0).sum() > 1:
        low, high = np.nanpercentile(values[1:], [2.5, 97.5]).round(6).tolist()
    return {"mean": round(float(values[0]), 6), "low": low, "high": high}


def apart(parts):
    """The same lists of rows, each row a stream of its own."""
    return {k: [r | {"stream": f"{r['stream']} {r.get('task', r.get('clip'))}"} for r in rows]
            for k, rows in parts.items()}


# ------------------------------------------------------------------------------------------------ tables
def title(method):
    return TITLES.get(method, f"Phase Two, {method}")


def named(R, method):
    """Title of a method; how many environments its figures are about, where that is not all of them."""
    have = sum((r["method"], r["scope"]) == (method, "after") for r in R["rows"]) - 1    # "all" is a row too
    total = len(R["transfer"]["phase1"])
    return title(method) + f" ({have} of {total})" * (have < total)


def cell(x, scale=100):
    """Mean and interval as text; the mean alone where there is no interval, a dash where there is no figure.

    >>> cell({"mean": 0.671, "low": 0.62, "high": 0.719}), cell({"mean": 0.02, "low": -0.01, "high": 0.05})
    ('67.1 (62.0–71.9)', '2.0 (-1.0 to 5.0)')
    >>> cell({"mean": None, "low": None, "high": None})
    '–'
    """
    if x is None or x["mean"] is None:
        return "–"
    mean, low, high = ("" if v is None else f"{scale * v:.1f}" for v in (x["mean"], x["low"], x["high"]))
    return f"{mean} ({low}{' to ' if low[0] == '-' else '–'}{high})" if low else mean


def tables(R):
    """Every table of the results as (title, note, head, rows of texts, looks: "", "folded" or "heat")."""
    asked = ["Accuracy", "Coverage", "Precision", "Questions"]
    line = lambda r, *names: [*names, *(cell(r[m.lower()]) for m in asked[:3]), f"{r['questions']}" + (
        f" ({r['retrieved']} retrieved)" * bool(r["retrieved"]))]
    pooled = lambda rows, name: [r for r in rows if r["environment"] == "all" and r["scope"] == name]
    scope = lambda name: [line(r, named(R, r["method"])) for r in pooled(R["rows"], name)]
    dropped, parts = sum(R["dropped"].values()), sum(r["retrieved"] for r in R["rows"])
    yield ("Answers from memory", "Per cent of the questions asked after the update; 95 % intervals over "
           f"{R['unit']}. "
           "Accuracy: answered right. Coverage: the memory was enough. Precision: right among the covered."
           + " Retrieved: not all fit the reader, who saw the most relevant." * bool(parts)
           + f" {dropped} verdicts that the judge failed to give are left out." * bool(dropped),
           ["Method", *asked], scope("after"), "")
    points = lambda g, name, metric: cell((g[name] or {}).get(metric), 1)
    yield ("Gains", "In points. Mismatched: an adapter on questions of environments that it did not learn.",
           ["Method", "Accuracy over base", "Accuracy over Phase One", "Mismatched, over Phase One",
            "Precision over Phase One"],
           [[named(R, m), points(g, "over_base", "accuracy"), points(g, "over_phase1", "accuracy"),
             points(g, "mismatched", "accuracy"), points(g, "over_phase1", "precision")]
            for m, g in R["gains"].items()], "")
    methods, types = list(R["gains"]), [*R["transfer"]["phase1"], "all"]
    found = {(r["method"], r["environment"]): r for r in R["rows"] if r["scope"] == "after"}
    whole = lambda x: "–" if x["mean"] is None else f"{100 * x['mean']:.0f}"
    three = lambda r: " / ".join(whole(r[m.lower()]) for m in asked[:3])
    yield ("By type", "Accuracy / coverage / precision in per cent, of the questions asked after the update.",
           ["Type", *methods],
           [[e, *(three(found[m, e]) if (m, e) in found else "–" for m in methods)] for e in types], "")
    if R["source"] in PAPER:
        rows = [(r, PAPER[R["source"]][r["method"]]) for r in pooled(R["rows"], "all")
                if r["method"] in PAPER[R["source"]]]
        yield ("Beside the paper", "Over all questions, the first ones included, as the paper counts them; "
               "its numbers are those of Qwen3-VL-30B-A3B, on Video-MME for short and medium videos.",
               ["Method", *(x for m in asked[:3] for x in (m, "Paper"))],
               [[named(R, r["method"]), *(x for m, theirs in zip(asked, paper)
                                          for x in (cell(r[m.lower()]), f"{theirs}"))]
                for r, paper in rows], "")
    if R["readers"]:
        yield ("Other readers", "The same memories, read by others.", ["Method", "Reader", *asked],
               [line(r, named(R, r["method"]), reader) for i in range(len(methods))
                for reader, rows in {"the usual one": R["rows"], **R["readers"]}.items()
                for r in pooled(rows, "after")[i:i + 1]], "")
    mean = lambda row: [cell({**c["accuracy"], "low": None}) for c in row.values()]
    crossed = lambda m: any(c["accuracy"]["mean"] is not None for a, row in R["transfer"][m].items()
                            for e, c in row.items() if a != e)
    for m in [m for m in R["transfer"] if m != "phase1" and crossed(m)]:
        yield (f"Transfer: {title(m)}", "Accuracy in per cent. A row is what an adapter learned, a column "
               "the environment that asks; framed where they are the same.",
               ["Adapter", *R["transfer"]["phase1"]],
               [["Phase One", *mean(R["transfer"]["phase1"])],
                *([a, *mean(row)] for a, row in R["transfer"][m].items())], "heat")
    kinds = {"win": "Win", "tie": "Tie", "loss": "Loss", "faithful": "Faithful",
             "non_redundant": "Not repeating", "fully_right": "Fully right", "well_formed": "Well formed",
             "tokens": "Tokens"}
    yield ("Memories in the same contexts", "Per cent; a memory per context, all with the Phase One history. "
           "Win, tie, loss: against Phase One, by the relevance judge. Faithful: true and within the budget. "
           "Fully right: well formed, faithful and nothing repeated. Tokens: of a well-formed memory.",
           ["Method", *kinds.values()],
           [[named(R, r["method"]), *(cell(r[q], 1 if q == "tokens" else 100) for q in kinds)]
            for r in R["validation"] if r["environment"] == "all"], "")
    yield ("Every environment", "Per cent of the questions asked after the update.",
           ["Method", "Environment", *asked],
           [line(r, named(R, r["method"]), r["environment"]) for r in R["rows"]
            if r["scope"] == "after" and r["environment"] != "all"], "folded")
    yield ("With the first questions", "The same with the recent questions pooled in, which Phase One "
           "answered: the way the paper counts.", ["Method", *asked], scope("all"), "folded")


def markdown(R):
    """All tables as Markdown."""
    row = lambda cells: "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
    text = [f"# Results of the run {R['run']}: {R['streams']} test streams\n"]
    for name, note, head, rows, _ in tables(R):
        text += [f"## {name}\n\n{note}\n", row(head), "|---" * len(head) + "|", *map(row, rows), ""]
    return "\n".join(text)


def show(R, *names):
    """Prints the tables of these names on the terminal, those that there are."""
    for name, _, head, rows, _ in tables(R):
        if name in names:
            wide = [max(map(len, column)) for column in zip(head, *rows)]
            print(f"\n{name}")
            for row in [head, *rows]:
                print("  " + "  ".join(text.ljust(w) for text, w in zip(row, wide)).rstrip())
    if any(R["dropped"].values()):
        print("\nleft out, as the judge failed: " + ", ".join(f"{n} {name}" for name, n in R["dropped"].items()))


# ------------------------------------------------------------------------------------------------ the page
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


def bars(R):
    """Accuracy after the update as a bar per method, with its interval, in front of coverage (pale)."""
    rows = [r for r in R["rows"] if r["scope"] == "after" and r["environment"] == "all" and r["questions"]]
    svg, X = "", lambda share: f"{2 + 276 * share:.1f}"
    for i, r in enumerate(rows):
        a, y = r["accuracy"], 54 * i + 24
        svg += (f'<text x="2" y="{y - 6}">{html.escape(named(R, r["method"]))}</text>'
                f'<text x="336" y="{y + 16}" text-anchor="end">{cell({**a, "low": None})}</text>'
                f'<path fill="var(--rule)" d="M2 {y}H{X(r["coverage"]["mean"])}v20H2z"/>'
                f'<path fill="var(--heat)" d="M2 {y}H{X(a["mean"])}v20H2z"/>')
        if a["low"] is not None:
            svg += (f'<path fill="none" stroke="var(--ink)" stroke-width="2" '
                    f'd="M{X(a["low"])} {y + 5}v10m0 -5H{X(a["high"])}m0 -5v10"/>')
    return (f'<svg class="bars" viewBox="0 0 340 {54 * len(rows)}" role="img" aria-label="Accuracy of every '
            f'method, as in the first table">{svg}</svg>')


def ticks(low, high):
    """Two to six round numbers between low and high, low < high.

    >>> ticks(-0.54, 0.55), ticks(0, 119)
    ([-0.5, 0.0, 0.5], [0, 50, 100])
    """
    ten = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(m * ten for m in (1, 2, 5, 10) if m * ten >= (high - low) / 5)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(name, lines):
    """A line chart with axes and legend as inline SVG. lines: {label: [(step, value)]}, not empty."""
    esc, points = html.escape, [p for line in lines.values() for p in line]
    (x0, x1), (y0, y1) = ((min(v), max(v) + (min(v) == max(v))) for v in zip(*points))
    X, Y = lambda x: 62 + 266 * (x - x0) / (x1 - x0), lambda y: 196 - 180 * (y - y0) / (y1 - y0)
    svg = ""
    for y in ticks(y0, y1):
        svg += (f'<path d="M62 {Y(y):.0f}H332" stroke="var(--rule)"/>'
                f'<text x="56" y="{Y(y) + 5:.0f}" text-anchor="end">{y:g}</text>')
    for x in ticks(x0, x1):
        svg += f'<text x="{X(x):.0f}" y="216" text-anchor="middle">{x:g}</text>'
    for i, line in enumerate(lines.values()):
        path = "L".join(f"{X(x):.1f} {Y(y):.1f}" for x, y in line)
        svg += f'<path d="M{path}" fill="none" stroke="{INKS[i % len(INKS)]}" stroke-width="2"/>'
    keys = "".join(f'<span><i style="border-color:{INKS[i % len(INKS)]}"></i>{esc(label)}</span>'
                   for i, label in enumerate(lines))
    return (f'<figure><figcaption><b>{esc(name)}</b></figcaption><svg viewBox="0 0 340 244" role="img" '
            f'aria-label="{esc(name)} by step">{svg}<path d="M62 14V196H332" fill="none" '
            f'stroke="var(--soft)"/><text x="197" y="238" text-anchor="middle">step</text></svg>'
            f'<p class="key">{keys}</p></figure>')


def curves(S, jobs, phase1):
    """Charts of the training logs of Phase One and the adapters: one per column of CURVES that a log has."""
    logs, charts = {}, []
    adapters = [(j.method, j.environment, j.folder) for j in jobs if j.folder]
    for stage, label, folder in [("phase1", "", phase1), *adapters]:
        if (folder.parent / "log.csv").exists():
            with open(folder.parent / "log.csv", newline="") as f:
                logs.setdefault(stage, {})[label] = list(csv.DictReader(f))
    for stage, runs in logs.items():
        for column in CURVES.split(","):
            lines = {label or column: [(float(r["step"]), float(r[column])) for r in rows
                                       if r.get(column) not in (None, "", "nan", "inf")]
                     for label, rows in runs.items()}
            lines = {label: line for label, line in lines.items() if line}
            charts += [chart(f"{title(stage)}: {COLUMNS.get(column, column)}", lines)] if lines else []
    return "".join(charts) or "<p>No training log was found.</p>"


def marked(memory, reference):
    """Escaped HTML of a memory; phrases that the reference lacks are marked, wherever they stand.

    >>> marked("now, a cup, tea.", "now, a tent, tea")
    'now, <mark>a cup,</mark> tea.'
    """
    bare = lambda phrase: phrase.strip(" ,.;:!?").lower()
    split = lambda text: re.split(r"(?<=[,.;:!?])\s+", text)
    known = {bare(phrase) for phrase in split(reference)}
    return " ".join(html.escape(phrase) if bare(phrase) in known else f"<mark>{html.escape(phrase)}</mark>"
                    for phrase in split(memory))


def example(stream, clip, frames, wrote):
    """One clip: four of its frames (n, H, W, 3) at most, and [(policy, memory)] with Phase One first."""
    from PIL import Image
    images, items = [], []
    for frame in frames[::-(-len(frames) // 4)]:
        picture, data = Image.fromarray(frame), io.BytesIO()
        picture.thumbnail((480, 480))                                          # keeps the page small
        picture.save(data, "JPEG", quality=88)
        text = base64.b64encode(data.getvalue()).decode()
        images.append(f'<img alt="" src="data:image/jpeg;base64,{text}">')
    for policy, memory in wrote:
        items.append(f"<div><dt>{html.escape(policy)}</dt><dd>"
                     f"{marked(memory, wrote[0][1]) if memory else 'wrote no well-formed memory'}</dd></div>")
    return (f'<h3>{html.escape(stream)} at {common.clock(clip["start"])}</h3>'
            f'<div class="frames">{"".join(images)}</div><dl class="grid">{"".join(items)}</dl>')


def examples(S, jobs, memories, streams):
    """For a few clips spread over the test streams: the frames and the memory that each policy wrote."""
    out, order = [], sorted((j for j in jobs if not j.told), key=lambda j: j.slug != "phase1")
    for i in range(min(S.EXAMPLES, len(streams))):
        stream = streams[i * len(streams) // S.EXAMPLES]
        clip = stream["clips"][len(stream["clips"]) // 2]
        here = lambda row: row["stream"] == stream["stream"] and row["clip"] == clip["clip"]
        wrote = [(title(j.method) + f": {j.environment}" * bool(j.environment), row["memory"])
                 for j in order for row in memories[j.slug] if here(row)]
        frames, _ = common.clip_frames(clip, S.FRAMES_PER_CLIP)
        out.append(example(stream["stream"], clip, frames, wrote))
    return "".join(out)


def headline(R):
    """The result in a few sentences."""
    mean = lambda x, scale=100: cell({**x, "low": None, "high": None}, scale)
    after = {r["method"]: mean(r["accuracy"]) for r in R["rows"]
             if r["scope"] == "after" and r["environment"] == "all"}
    text = (f"From nothing but its own memories of {R['streams']} test stream{'s' * (R['streams'] != 1)}, the "
            f"base answers {after['base']}% of the questions and Phase One {after['phase1']}%.")
    for m in [m for m in R["transfer"] if m != "phase1"]:
        gain, others = R["gains"][m]["over_phase1"], R["gains"][m]["mismatched"]
        text += (f" The adapters of {named(R, m)} answer {after[m]}% in the environment whose recent "
                 f"questions they learned from: {mean(gain['accuracy'], 1)} points over Phase One there"
                 + (f", against {mean(others['accuracy'], 1)} in the other environments." if others else "."))
    return text


def page(R, S, jobs, memories, streams, phase1):
    """The whole report as one HTML document; nothing is fetched from anywhere."""
    esc, parts = html.escape, []
    split = lambda text: re.sub(r"^(\S+) \((.*)\)$", r"\1<small>\2</small>", esc(text))
    for name, note, head, rows, looks in tables(R):
        def attributes(row, i):
            if looks != "heat" or i == 0 or row[i] == "–":
                return ""
            return f' style="--h:{0.75 * float(row[i]):.0f}%"' + ' class="own"' * (row[0] == head[i])
        cells = lambda row: "".join(f"<td{attributes(row, i)}>{split(x)}</td>" for i, x in enumerate(row))
        body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
        names = "".join(f"<th>{esc(h)}</th>" for h in head)
        table = (f'<p class="soft">{esc(note)}</p><div class="box"><table class="{looks}"><thead><tr>{names}'
                 f'</tr></thead><tbody>{body}</tbody></table></div>')
        parts.append(f"<details><summary>{esc(name)}</summary>{table}</details>" if looks == "folded"
                     else f"<h2>{esc(name)}</h2>{table}")
    name, charts, shown = esc(R["run"]), curves(S, jobs, phase1), examples(S, jobs, memories, streams)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{name}: results</title><style>{STYLE}</style></head><body>
<h1>What the memories can answer: run {name}</h1><p>{esc(headline(R))}</p>
{bars(R)}<p class="soft">Per cent answered right, with its 95 % interval; pale: covered.</p>{"".join(parts)}
<h2>Training</h2><div class="grid">{charts}</div>
<h2>What each policy wrote</h2><p class="soft">Each policy with its own memories as history. Marked: what
Phase One's memory of the same clip does not say.</p>{shown}</body></html>
"""
