"""Hours of every stage, card by card: for the paper's sizes, and for a recipe that ends within a day on one 80 GB card.

All is planned (support/hours.py): rates of the H100 are fitted to what was measured on one, other cards' are scaled by
their data sheets. A card that is too small takes the constants that results/README.md names for its memory.

Run: python experiments/hours.py [FILE]         (25 s; needs no GPU, no weights and no network)
Out: FILE, results/hours.md without one
"""
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import settings, stage                                          # noqa: E402
from support.hours import CARDS, PAPER, Sizes, estimate                     # noqa: E402
from support.runs import write_text                                         # noqa: E402

# ----------------------------------------------------------------
MODEL = ["--MODEL=Qwen/Qwen3-VL-30B-A3B-Thinking", "--JUDGE=local"]
NO_RUN = ["--RUN=planned"]               # what ./run.sh has made in runs/tiny has no say in the plan
STAGES = {"02": ("02_phase1_train", "train"),
          "03": ("03_collect_tasks", "deploy"),
          "04": ("04_train_reward", "deploy"),
          "05": ("05_phase2_train", "deploy"),
          "06": ("06_eval", "test")}
# What fits a card of so many GiB.
FITS = {141: [],
        80: [],
        48: ["--FRAME_PIXELS=50176"],
        24: ["--VISION_BITS=4", "--DOUBLE_QUANT=1", "--FRAME_PIXELS=50176", "--FRAMES_PER_CLIP=10",
             "--FEATURE_CLIPS=20", "--THINK_TOKENS=200", "--MAX_NEW_TOKENS=600"]}
# The recipe: arguments of all stages, of each stage, and what 01 makes by --LIMIT, --DURATION and --TYPES.
SHORT = ["--THINK_TOKENS=400", "--MAX_NEW_TOKENS=1000"]
RECIPE = {"02": ["--STEPS=40", "--OFF_POLICY_STEPS=24", "--CONTEXTS=16"],
          "03": ["--CACHE_CONTEXTS=400"],
          "04": ["--STEPS=200"],
          "05": ["--DPO_STEPS=20", "--PAIRS=32"],
          "06": ["--METHODS=base+prompt,dpo-steer", "--VALIDATE=40"]}
ASKED = "Object Recognition,Action Recognition,Counting Problem"
MADE = {"train": Sizes("60 videos of 25 clips", 60, 1500),
        "deploy": Sizes("80 short videos", 80, 640, 400, 3, 80),
        "test": Sizes("80 short videos", 80, 640, 400, 3, 80, 192)}
COMMANDS = f"""M="{' '.join(MODEL + SHORT)}"
python 01_make_streams.py --RUN=p1day --SOURCE=videos --DATA=~/Videos --SPLIT=train --LIMIT=60
python 02_phase1_train.py --RUN=p1day $M {' '.join(RECIPE['02'])}
python 01_make_streams.py --RUN=mmeday --SOURCE=videomme --DATA=~/Video-MME --DURATION=short --LIMIT=80 \\
  --TYPES="{ASKED}"
python 03_collect_tasks.py --RUN=mmeday --FROM=p1day $M {' '.join(RECIPE['03'])}
python 04_train_reward.py --RUN=mmeday --FROM=p1day $M {' '.join(RECIPE['04'])}
python 05_phase2_train.py --RUN=mmeday --FROM=p1day $M {' '.join(RECIPE['05'])}
python 06_eval.py --RUN=mmeday --FROM=p1day $M {' '.join(RECIPE['06'])}"""
# ----------------------------------------------------------------


def hours(card, number, arguments, sizes):
    """Hours of a stage."""
    name, split = STAGES[number]
    script = stage(name)
    S = settings(vars(script), NO_RUN + MODEL + arguments + FITS[CARDS[card].gib])
    return estimate(S, script.work, sizes[split], card).hours()


def table(of_stages, sizes):
    """Rows of markdown: a card and the hours of each stage. of_stages: arguments for each."""
    rows = ["| card | " + " | ".join(STAGES) + " | all |", "|---" * (len(STAGES) + 2) + "|"]
    for card in CARDS:
        of_card = [hours(card, number, of_stages[number], sizes) for number in STAGES]
        cells = [card, *[rounded(value) for value in [*of_card, sum(of_card)]]]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def rounded(value):
    """
    >>> rounded(4.56), rounded(1234.5)
    ('4.6', '1,234')
    """
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def page():
    """The tables as markdown."""
    default = {number: [] for number in STAGES} | {"06": ["--METHODS=base+prompt,dpo-steer"]}
    small = "\n".join(f"- {card}: `{' '.join(FITS[CARDS[card].gib])}`" for card in CARDS
                      if FITS.get(CARDS[card].gib))
    recipe = {number: SHORT + RECIPE[number] for number in STAGES}
    return f"""Hours of each stage with the paper's sizes: 326 videos of 25 clips for 02; 100 videos, 2,500 contexts and 12 kinds of
questions for 03 to 05; Video-MME's 600 short and medium videos for 06, and the four rows of the paper's table. All are planned.

{table(default, PAPER)}

Hours of a recipe that ends within a day on one card of 80 GB, planned too:

{table(recipe, MADE)}

```bash
{COMMANDS}
```

Hours of the A100, L40S and 4090 may be too few: by torch's source its grouped matrix product is fast from the H100 on, and a loop over the
experts on older cards, which the plan leaves out.

Cards with less memory take these constants besides, in both tables:

{small}
"""


if __name__ == "__main__":
    file = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results" / "hours.md"
    write_text(file, page())
    print(page())
