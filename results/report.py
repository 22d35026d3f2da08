"""How 06_eval.py shows its results: tables for the terminal and Markdown, and one self-contained page.

Every figure is made in 06; here they are only laid out. The page fetches nothing, so it opens offline and can be
sent as one file; its pictures are data URIs and its charts inline SVG.
"""
import base64, csv, html, io, re

import common

TITLES = {"base": "Base", "base+prompt": "Base + task prompt", "phase1": "Phase One",
          "phase1+prompt": "Phase One + task prompt"}


def title(method):
    return TITLES.get(method, f"Phase Two, {method}")


def cell(x, scale=100):
    """'67.1 (62.0 to 71.9)', without an interval where there is none, and a dash where there is no figure.

    >>> cell({"mean": 0.671, "low": 0.62, "high": 0.719}), cell({"mean": None, "low": None, "high": None})
    ('67.1 (62.0 to 71.9)', '–')
    """
    if x is None or x["mean"] is None:
        return "–"
    mean, low, high = ("" if v is None else f"{scale * v:.1f}" for v in (x["mean"], x["low"], x["high"]))
    return f"{mean} ({low} to {high})" if low else mean


def tables(R):
    """Every table of the results as (title, note, head, rows of texts, looks), looks: "", "folded" or "heat"."""
    asked = ["Accuracy", "Coverage", "Precision", "Questions"]
    line = lambda r, *names: [*names, *(cell(r[m.lower()]) for m in asked[:3]), str(r["questions"])]
    scope = lambda name: [line(r, title(r["method"])) for r in R["rows"]
                          if r["environment"] == "all" and r["scope"] == name]
    dropped = sum(R["dropped"].values())
    yield ("Answers from memory", "Per cent of the questions asked after the update, with 95 % intervals over streams. "
           "Accuracy: answered right. Coverage: the memory was enough to answer. Precision: right among the covered."
           + f" {dropped} verdicts that the judge failed to give are left out." * bool(dropped),
           ["Method", *asked], scope("after"), "")
    yield ("Gains", "Points of accuracy and precision. Mismatched: an adapter on the questions of the environments "
           "that it did not learn.",
           ["Method", "Accuracy over base", "Accuracy over Phase One", "Mismatched, over Phase One",
            "Precision over Phase One"],
           [[title(m), cell(g["over_base"]["accuracy"], 1), cell(g["over_phase1"]["accuracy"], 1),
             cell((g.get("mismatched") or {}).get("accuracy"), 1), cell(g["over_phase1"]["precision"], 1)]
            for m, g in R["gains"].items()], "")
    mean = lambda row: [cell({"mean": c["accuracy"]["mean"], "low": None, "high": None}) for c in row.values()]
    for m in [m for m in R["transfer"] if m != "phase1"]:
        yield (f"Transfer: {title(m)}", "Accuracy in per cent. A row is the environment that the adapter learned, a "
               "column the environment that asks; framed where they are the same.",
               ["Adapter", *R["transfer"]["phase1"]],
               [["Phase One", *mean(R["transfer"]["phase1"])],
                *([a, *mean(row)] for a, row in R["transfer"][m].items())], "heat")
    yield ("Memories in the same contexts", "Per cent of one memory per context, all with the Phase One history. Win, "
           "tie, loss: against Phase One, under the relevance judge. Faithful: true and within the budget. Fully "
           "right: well formed, faithful and nothing repeated. Tokens: of a well-formed memory.",
           ["Method", "Win", "Tie", "Loss", "Faithful", "Not repeating", "Fully right", "Well formed", "Tokens"],
           [[title(r["method"]), *(cell(r[q], 1 if q == "tokens" else 100) for q in
                                   ("win", "tie", "loss", "faithful", "non_redundant", "fully_right", "well_formed",
                                    "tokens"))] for r in R["validation"] if r["environment"] == "all"], "")
    yield ("Every environment", "Per cent of the questions asked after the update.", ["Method", "Environment", *asked],
           [line(r, title(r["method"]), r["environment"]) for r in R["rows"]
            if r["scope"] == "after" and r["environment"] != "all"], "folded")
    yield ("With the first questions", "The same with the recent questions pooled in, which Phase One answered: the "
           "way the paper counts.", ["Method", *asked], scope("all"), "folded")


def markdown(R):
    """All tables as Markdown."""
    row = lambda cells: "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
    text = [f"# Results of the run {R['run']}: {R['streams']} test streams\n"]
    for name, note, head, rows, _ in tables(R):
        text += [f"## {name}\n\n{note}\n", row(head), "|---" * len(head) + "|", *map(row, rows), ""]
    return "\n".join(text)


def show(R, *numbers):
    """Prints the tables of these numbers on the terminal."""
    for i, (name, _, head, rows, _) in enumerate(tables(R)):
        if i in numbers:
            wide = [max(map(len, column)) for column in zip(head, *rows)]
            print(f"\n{name}")
            for row in [head, *rows]:
                print("  " + "  ".join(text.ljust(w) for text, w in zip(row, wide)).rstrip())


# ------------------------------------------------------------------------------------------------ the page
STYLE = """
:root{color-scheme:light dark;--ink:#1d2129;--soft:#59616e;--page:#fff;--rule:#d5d9e0;--heat:#2f7ed8;--mark:#ffe49a}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaee;--soft:#a9b1be;--page:#15181d;--rule:#3a414c;--heat:#3d7fc4;
--mark:#6b5200}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;font:17px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--page);overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.3rem;margin:2.4rem 0 .3rem}h3{font-size:1.1rem}
p{max-width:46rem;margin:.4rem 0 .9rem}.soft,small{color:var(--soft);font-size:1rem}
.box{overflow-x:auto;border:1px solid var(--rule);border-radius:8px}
table{border-collapse:collapse;width:100%;overflow-wrap:normal}
td,th{padding:.45rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule);
font-variant-numeric:tabular-nums}
tr:last-child td{border-bottom:0}th{color:var(--soft);font-weight:600}
th+th{white-space:normal;min-width:6.5rem}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:var(--page);white-space:normal;
min-width:8rem}
td small{display:block}.heat td+td{background:color-mix(in srgb,var(--heat) var(--h),transparent)}
.heat th+th{min-width:0}.own{outline:2px solid var(--ink);outline-offset:-4px}
summary{cursor:pointer;padding:.8rem 0;font-size:1.15rem;font-weight:600}
.grid{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
figure{margin:0}svg{width:100%;height:auto;display:block}svg text{font-size:16px;fill:var(--soft)}
.key span{white-space:nowrap;margin-right:1rem}
.key i{display:inline-block;width:1.6rem;border-top:4px solid;vertical-align:middle;margin-right:.4rem}
.frames{display:grid;gap:6px;grid-template-columns:repeat(auto-fill,minmax(min(46%,220px),1fr));max-width:60rem}
.frames img{width:100%;border-radius:6px;display:block}
dt{font-weight:600;margin-top:.7rem}dd{margin:0}
mark{background:var(--mark);color:inherit;border-radius:3px;padding:0 .15em;text-decoration:underline}
"""
INKS = ["#2f7ed8", "#d9661f", "#1f9d6b", "#b85cc8", "#b8920b", "#d8485f", "#3aa0b5", "#8a8f98"]


def chart(name, lines):
    """A line chart with axes and legend as inline SVG. lines: {label: [(step, value)]}, not empty."""
    esc, points = html.escape, [p for line in lines.values() for p in line]
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    x1, y1 = x1 + (x1 == x0), y1 + (y1 == y0)
    X, Y = lambda x: 62 + 266 * (x - x0) / (x1 - x0), lambda y: 196 - 180 * (y - y0) / (y1 - y0)
    svg = ""
    for i, anchor in enumerate(("start", "middle", "end")):                    # three ticks on each axis
        x, y = x0 + (x1 - x0) * i / 2, y0 + (y1 - y0) * i / 2
        svg += (f'<path d="M62 {Y(y):.0f}H332" stroke="var(--rule)"/><text x="56" y="{Y(y) + 5:.0f}" '
                f'text-anchor="end">{y:.3g}</text><text x="{X(x):.0f}" y="216" text-anchor="{anchor}">{x:.4g}</text>')
    for i, line in enumerate(lines.values()):
        path = "L".join(f"{X(x):.1f} {Y(y):.1f}" for x, y in line)
        svg += f'<path d="M{path}" fill="none" stroke="{INKS[i % len(INKS)]}" stroke-width="2"/>'
    keys = "".join(f'<span><i style="border-color:{INKS[i % len(INKS)]}"></i>{esc(label)}</span>'
                   for i, label in enumerate(lines))
    return (f'<figure><figcaption><b>{esc(name)}</b></figcaption><svg viewBox="0 0 340 244" role="img" aria-label="'
            f'{esc(name)} by step">{svg}<path d="M62 14V196H332" fill="none" stroke="var(--soft)"/><text x="197" '
            f'y="238" text-anchor="middle">step</text></svg><p class="key">{keys}</p></figure>')


def curves(S):
    """Charts of the training logs of Phase One and of the adapters: one per column of CURVES that a log has."""
    logs, charts = {}, []
    for run in [r for r in (S.FROM, S.RUN) if r]:                              # what RUN has replaces what FROM has
        root = common.ROOT / "runs" / run
        for path in [*root.glob("phase1/log.csv"), *sorted(root.glob("phase2/*/*/log.csv"))]:
            stage, label = ("phase1", "") if path.parent.name == "phase1" else path.parts[-3:-1]
            with open(path, newline="") as f:
                logs.setdefault(stage, {})[label] = list(csv.DictReader(f))
    for stage, runs in logs.items():
        for column in S.CURVES.split(","):
            lines = {label or column: [(float(r["step"]), float(r[column])) for r in rows
                                       if r.get(column) not in (None, "", "nan")] for label, rows in runs.items()}
            lines = {label: line for label, line in lines.items() if line}
            charts += [chart(f"{title(stage)}: {column}", lines)] if lines else []
    return "".join(charts) or "<p>No training log was found.</p>"


def marked(memory, reference):
    """Escaped HTML of a memory; phrases that the reference lacks are marked, wherever they stand.

    >>> marked("now, a cup, tea.", "now, a tent, tea")
    'now, <mark>a cup,</mark> tea.'
    """
    bare = lambda phrase: phrase.strip(" ,.;:!?").lower()
    split = lambda text: re.split(r"(?<=[,.;:!?])\s+", text)
    known = {bare(phrase) for phrase in split(reference)}
    return " ".join(html.escape(p) if bare(p) in known else f"<mark>{html.escape(p)}</mark>" for p in split(memory))


def example(stream, clip, frames, wrote):
    """One clip: at most four of its frames (n, H, W, 3), and [(policy, memory)], the first being Phase One's."""
    from PIL import Image
    images, items = [], []
    for frame in frames[::-(-len(frames) // 4)]:
        picture, data = Image.fromarray(frame), io.BytesIO()
        picture.thumbnail((480, 480))                                          # keeps the page small
        picture.save(data, "JPEG", quality=88)
        images.append(f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">')
    for policy, memory in wrote:
        items.append(f"<dt>{html.escape(policy)}</dt><dd>"
                     f"{marked(memory, wrote[0][1]) if memory else 'wrote no well-formed memory'}</dd>")
    return (f"<h3>{html.escape(stream)} at {common.clock(clip['start'])}</h3><div class=\"frames\">{''.join(images)}"
            f"</div><dl>{''.join(items)}</dl>")


def examples(S, jobs, memories, streams):
    """For a few clips spread over the test streams: the frames and the memory that each policy wrote."""
    out, order = [], sorted((j for j in jobs if not j.told), key=lambda j: j.slug != "phase1")
    for i in range(min(S.EXAMPLES, len(streams))):
        stream = streams[i * len(streams) // S.EXAMPLES]
        clip = stream["clips"][len(stream["clips"]) // 2]
        wrote = [(title(j.method) + f": {j.environment}" * bool(j.environment), row["memory"]) for j in order
                 for row in memories[j.slug] if (row["stream"], row["clip"]) == (stream["stream"], clip["clip"])]
        frames = common.read_frames(clip["file"], common.frame_times(clip, S.FRAMES_PER_CLIP))
        out.append(example(stream["stream"], clip, frames, wrote))
    return "".join(out)


def headline(R):
    """The result in two sentences."""
    after = {r["method"]: r for r in R["rows"] if r["scope"] == "after" and r["environment"] == "all"}
    texts = [f"{title(m)} {100 * r['accuracy']['mean']:.1f} %" for m, r in after.items() if r["questions"]]
    return (f"Share of questions answered rightly from nothing but each policy's own memories of {R['streams']} "
            f"unseen streams: {'; '.join(texts)}.")


def page(R, S, jobs, memories, streams):
    """The whole report as one HTML document; nothing is fetched from anywhere."""
    esc, parts = html.escape, []
    split = lambda text: re.sub(r"^(\S+) \((.*)\)$", r"\1<small>\2</small>", esc(text))
    for name, note, head, rows, looks in tables(R):
        def attributes(row, i):
            if looks != "heat" or i == 0 or row[i] == "–":
                return ""
            return f' style="--h:{0.75 * float(row[i]):.0f}%"' + ' class="own"' * (row[0] == head[i])
        body = "".join("<tr>" + "".join(f"<td{attributes(row, i)}>{split(text)}</td>" for i, text in enumerate(row))
                       + "</tr>" for row in rows)
        table = (f'<p class="soft">{esc(note)}</p><div class="box"><table class="{looks}"><thead><tr>'
                 f'{"".join(f"<th>{esc(h)}</th>" for h in head)}</tr></thead><tbody>{body}</tbody></table></div>')
        parts.append(f"<details><summary>{esc(name)}</summary>{table}</details>" if looks == "folded"
                     else f"<h2>{esc(name)}</h2>{table}")
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-'
            f'width,initial-scale=1"><title>{esc(R["run"])}: results</title><style>{STYLE}</style></head><body>'
            f'<h1>What the memories can answer: run {esc(R["run"])}</h1><p>{esc(headline(R))}</p>{"".join(parts)}'
            f'<h2>Training</h2><div class="grid">{curves(S)}</div><h2>What each policy wrote</h2><p class="soft">Each '
            f"policy with its own memories as history. Marked: what Phase One's memory of the same clip does not say."
            f'</p>{examples(S, jobs, memories, streams)}</body></html>\n')
