"""Measures Qwen3-VL-30B-A3B on one GPU: its shapes with random weights, and the six stages as commands.

Nothing is downloaded, and no quality is measured. Each figure is written to OUT as soon as it is known, so a
failure loses nothing. A measurement that fails leaves the text of its error, and the next one begins. Without
a GPU all parts run at small shapes, which tests this script and measures nothing.

The parts, in the order in which they run:
  1  versions, the card and its ceilings: a copy, a matrix product, a grouped product at the experts' shapes
  2  attention of a packed row, without a mask, against SDPA with a mask
  3  NF4 packing on the card against a decoder of our own; packed experts against plain ones
  4  attention while decoding: query heads as rows against keys that are repeated for each query head
  5  the whole model: bytes, vision, prefill, rollout, training rows, a packed judge pass, a DPO pair
  7  what would help: a decode step as a CUDA graph
  6  the six stages as commands, on real videos and on a rendered run of the toy world

Run: python experiments/full_size.py [--PARTS=1,2,3] [--OUT=results/full_size.json] [--SECONDS=500]
     [--SMALL=1] [--VIDEOS=folder of mp4 files] [--STREAMS=runs/NAME/streams, by 01 with SOURCE="tiny"]
     (one GPU of 80 GB, ten minutes; part 6 needs VIDEOS or STREAMS)
In:  tiny/base, for its tokenizer and for part 6
Out: OUT: {part: {measurement: figures}}, to which a later run adds. results/full_size.md tells what came out
     on an H100
"""
import contextlib
import gc
import json
import math
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass

START = time.time()
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch                                                                # noqa: E402
import torch.nn.functional as F                                             # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel                      # noqa: E402

import common                                                               # noqa: E402
from support import attention, plan                                         # noqa: E402
from support.weights import loading_options, pack, packed_experts           # noqa: E402
from support.weights import scales_of, unpack, use_exact_kernels            # noqa: E402

GPU = torch.cuda.is_available()

# ---------------------------------------------------------------- options: --NAME=value
OPTIONS = {
    "PARTS": "1,2,3,4,5,7,6",              # they always run in this order
    "OUT": str(ROOT / "results" / "full_size.json"),
    "SECONDS": "500",                      # later than this, no measurement is begun
    "SMALL": "0" if GPU else "1",          # 1: small shapes, for a test of the script
    "VIDEOS": "",                          # a folder with at least two mp4 files, for part 6
    "STREAMS": "",                         # the streams of a run of 01 on the toy world, for part 6
}
for argument in sys.argv[1:]:
    option, _, given = argument.removeprefix("--").partition("=")
    if option not in OPTIONS:
        raise SystemExit(f"unknown argument {argument}; there are {', '.join(OPTIONS)}")
    OPTIONS[option] = given
OUT = pathlib.Path(OPTIONS["OUT"])
SECONDS = float(OPTIONS["SECONDS"])
SMALL = OPTIONS["SMALL"] == "1"

# ---------------------------------------------------------------- shapes
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
TEXT = plan.TEXT                           # what the model's config.json says
VISION = plan.VISION
GROUP = 8                                  # answers to a context
PROMPT = 11070                             # tokens of a full prompt: 5 clips and 4 memories
FRAMES = 20                                # of a clip
FRAME_SIDE = 448                           # pixels
SHORT = 170                                # tokens of a short answer
LONG = 1350                                # tokens of a long one
NEW = 64                                   # tokens that a rollout samples
CLIP = 3000                                # tokens of the one clip that the judge sees
MEMORY = 150                               # tokens of a memory that is judged
REPLY = 6                                  # tokens of a reply of the judge
WARM_UP = 64                               # tokens of the first prompt, which warms up
if SMALL:
    small_sections = {"mrope_section": [6, 5, 5]}
    TEXT = TEXT | {
        "vocab_size": 2000, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 32, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
        "rope_parameters": TEXT["rope_parameters"] | small_sections}
    VISION = VISION | {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
        "out_hidden_size": 128, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}
    PROMPT = 200
    FRAMES = 4
    FRAME_SIDE = 96
    SHORT = 5
    LONG = 12
    NEW = 6
    CLIP = 60
    MEMORY = 8
    WARM_UP = 20
HEADS = TEXT["num_attention_heads"]        # H
KEY_HEADS = TEXT["num_key_value_heads"]    # h: H / h query heads share the keys and values of one
HEAD_DIM = TEXT["head_dim"]                # D
LAYERS = TEXT["num_hidden_layers"]
EXPERTS = TEXT["num_experts"]              # E
EXPERTS_PER_TOKEN = TEXT["num_experts_per_tok"]   # k
HIDDEN = TEXT["hidden_size"]               # d
EXPERT_WIDTH = TEXT["moe_intermediate_size"]      # w
SCALE = HEAD_DIM**-0.5                     # of attention's scores
GIB = 2**30
# ----------------------------------------------------------------


# ================================================================ keeping figures
class Report:
    """All figures, {part: {name: row}}, in a JSON file that is written after each of them."""

    def __init__(self, file):
        self.file = file
        self.parts = json.loads(file.read_text()) if file.exists() else {}
        self.limit = SECONDS                       # later than this, nothing is begun
        self.lock = threading.Lock()

    def keep(self, rows, name, row):
        """Puts a row into `rows`, which is part of the report, and writes all: chains of stages do so at once."""
        with self.lock:
            rows[name] = row
            self.write()

    def write(self):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_suffix(".aside")
        aside.write_text(json.dumps(self.parts, indent=1) + "\n")
        os.replace(aside, self.file)

    def measure(self, part, name, work, *arguments):
        """Keeps the figures that work(*arguments) returns, with its seconds and its peak of memory.

        An error is kept in their place. What would begin after the limit is skipped.
        """
        row = {}
        began = time.time()
        if began - START > self.limit:
            row["skipped"] = f"{self.limit:.0f} s were over"
        else:
            try:
                wait()
                reset_peak()
                row |= work(*arguments)
                wait()
            except (Exception, SystemExit) as error:
                row["error"] = said_by(error)[:1500]
                row["where"] = traceback.format_exc()[-1500:]
            row["wall_s"] = round(time.time() - began, 2)
            row.setdefault("peak_gib", peak())     # some figures hold a peak of their own
        self.keep(self.parts.setdefault(part, {}), name, row)
        shown = row.copy()
        for long in ("where", "table"):
            shown.pop(long, None)
        say(f"{part} {name}: {json.dumps(shown)[:900]}")
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()

    def print_table(self):
        """A line for each measurement: its seconds, its peak, and the start of its figures."""
        print(f"\n{'part':14}{'measured':44}{'s':>8}{'peak GiB':>10}  result")
        for part, rows in self.parts.items():
            if not isinstance(rows, dict):         # a note on the whole file, added by hand
                continue
            for name, row in rows.items():
                wall = row.get("wall_s", 0)
                most = row.get("peak_gib") or 0
                print(f"{part:14}{name:44}{wall:8}{most:10}  {summary(row)[:110]}")


def summary(row):
    """The error of a row, or why it was skipped, or its figures without those that are nested."""
    for reason in ("error", "skipped"):
        if reason in row:
            return row[reason]
    figures = []
    for name, value in row.items():
        if isinstance(value, (int, float, str)) and name not in ("wall_s", "peak_gib"):
            figures.append(f"{name} {value}")
    return ", ".join(figures)


def say(line):
    print(f"[{time.time() - START:5.0f} s] {line}", flush=True)


def said_by(error):
    return f"{type(error).__name__}: {error}"


def wait():
    """Until the card has done all that it was told to do."""
    if GPU:
        torch.cuda.synchronize()


def reset_peak():
    if GPU:
        torch.cuda.reset_peak_memory_stats()


def peak():
    """The most GiB that were allocated since `reset_peak`; None without a card."""
    return in_gib(torch.cuda.max_memory_allocated()) if GPU else None


def in_gib(size, digits=2):
    return round(size / GIB, digits)


def seconds(work, *arguments):
    """(seconds of one call, its result)"""
    wait()
    began = time.perf_counter()
    result = work(*arguments)
    wait()
    return round(time.perf_counter() - began, 3), result


def milliseconds(work, repeats=5, warm=2):
    """The median time of work(), after `warm` calls that don't count."""
    for _ in range(warm):
        work()
    time_once = once_on_card if GPU else once_by_clock
    return round(statistics.median([time_once(work) for _ in range(repeats)]), 4)


def once_on_card(work):
    """Milliseconds of one call between two events of the card."""
    first = recorded_event()
    work()
    last = recorded_event()
    last.synchronize()
    return first.elapsed_time(last)


def recorded_event():
    """An event that takes the time when the card gets here, which may be later than the processor."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def once_by_clock(work):
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def three_digits(value):
    return float(f"{value:.3g}")


def distance(x, reference):
    """The norm of the difference over that of the reference; NaN where x holds one."""
    x = x.double()
    reference = reference.double()
    return three_digits(((x - reference).norm() / reference.norm()).item())


def distances(names, tensors, references):
    """{name: distance} of tensors from their references, in the order of the names."""
    row = {}
    for name, x, reference in zip(names, tensors, references):
        row[name] = distance(x, reference)
    return row


def with_gradients(work, inputs, grad):
    """[the output of work(), the gradient of each input], where grad is the output's gradient."""
    out = work()
    return [out, *torch.autograd.grad(out, inputs, grad)]


def random_values(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


# ================================================================ 1: the card
def measure_card(report):
    report.measure("1 card", "versions", versions)
    report.measure("1 card", "ceilings", ceilings)
    report.measure("1 card", "grouped_mm", grouped_products)


def versions():
    """What the figures depend on beside the code."""
    import transformers
    import bitsandbytes
    import peft
    import accelerate
    import tokenizers
    row = {"python": platform.python_version(),
           "torch": torch.__version__,
           "date": time.strftime("%Y-%m-%d"),
           "small": SMALL}
    for library in (transformers, bitsandbytes, peft, accelerate, tokenizers):
        row[library.__name__] = library.__version__
    if GPU:
        properties = torch.cuda.get_device_properties(0)
        row["card"] = properties.name
        row["gib"] = in_gib(properties.total_memory)
        row["cuda"] = torch.version.cuda
        row["processors"] = properties.multi_processor_count
    return row


def ceilings():
    """GB/s of a copy, with both the bytes read and the bytes written; TFLOP/s of a matrix product."""
    side = 256 if SMALL else 8192
    a = random_values(side, side)
    b = random_values(side, side)
    product_ms = milliseconds(lambda: a @ b)
    source = random_values(side * side * (1 if SMALL else 16))
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source))
    return {"copy_gb_s": round(2 * source.nbytes / copy_ms / 1e6, 1),
            "matmul_tflops": tflops(side**3, product_ms)}


def tflops(products, ms):
    """TFLOP/s of so many multiplications, each with an addition, in so many milliseconds."""
    return round(2 * products / ms / 1e9, 1)


def grouped_products():
    """TFLOP/s of grouped_mm at the experts' shapes: for 64 tokens, and for those of one prompt."""
    shapes = {"gate_up": (HIDDEN, 2 * EXPERT_WIDTH), "down": (EXPERT_WIDTH, HIDDEN)}
    row = {}
    for tokens in (64, PROMPT):
        pairs = tokens * EXPERTS_PER_TOKEN                 # rows; each expert has its equal share
        numbers = torch.arange(1, EXPERTS + 1, device=DEVICE)
        ends = (numbers * pairs // EXPERTS).to(torch.int32)          # (E,)
        for name, (width, out) in shapes.items():
            x = random_values(pairs, width)
            weight = random_values(EXPERTS, out, width)
            ms = milliseconds(lambda: F.grouped_mm(x, weight.mT, offs=ends))
            row[f"{name}_{tokens}_tokens"] = {"ms": ms, "tflops": tflops(pairs * width * out, ms)}
    return row


# ================================================================ 2: a packed row without a mask
# (tokens of a prompt, tokens of each answer to it)
ROWS_TO_CHECK = [(517, [170, 33, 1, 250]),
                 (64, [64] * 8),
                 (1000, [7, 300])]


def measure_packed_row(report):
    report.measure("2 packed row", "errors", packed_errors)
    for prompt in (PROMPT * 37 // 100, PROMPT):
        for length in (SHORT, LONG):
            report.measure("2 packed row", f"{prompt} + 8 x {length}", packed_times, prompt, length)


def packed_attention(q, k, v, prompt, answers):
    """q (1, H, T, D); k and v (1, h, T, D); prompt: its tokens; answers: tokens of each -> (1, H, T, D)."""
    segments = attention.lay_out([(prompt, answers)])
    return attention.PackedAttention.apply(q, k, v, segments, SCALE)


def masked_attention(q, k, v, mask, backend=None):
    """As transformers' "sdpa" does it with a mask: keys and values are repeated for each query head.

    q (B, H, W, D); k and v (B, h, T, D); mask (B or 1, 1, W, T); backend: of SDPA, None for its own choice
    -> (B, H, W, D).
    """
    sharing = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(sharing, dim=1)                          # (B, H, T, D)
    v = v.repeat_interleave(sharing, dim=1)
    choice = sdpa_kernel(backend) if backend else contextlib.nullcontext()
    with choice:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)


def row_mask(prompt, answers, dtype):
    """The mask (1, 1, T, T) of a packed row, for SDPA: 0 where a token sees another, and -inf elsewhere.

    prompt: its tokens; answers: the tokens of each.
    """
    owners = []                                                      # 0: prompt; 1 to G: answers
    for number, length in enumerate([prompt, *answers]):
        owners.append(torch.full((length,), number, device=DEVICE))
    owner = torch.cat(owners)[None]                                  # (1, T)
    sees = attention.visible(owner, owner).tril()                    # (1, 1, T, T)
    zero = torch.zeros((), dtype=dtype, device=DEVICE)
    return torch.where(sees, zero, -torch.inf)


def random_heads(batch, heads, tokens):
    """(batch, heads, tokens, D) as transformers hands it over: a view of (batch, tokens, heads, D)."""
    return random_values(batch, tokens, heads, HEAD_DIM).transpose(1, 2)


def random_row(tokens):
    """([q (1, H, T, D), k (1, h, T, D), v as k], the output's gradient (1, H, T, D)) of a row."""
    inputs = []
    for heads in (HEADS, KEY_HEADS, KEY_HEADS):
        inputs.append(random_heads(1, heads, tokens).requires_grad_())
    grad = random_heads(1, HEADS, tokens)
    return inputs, grad


def packed_errors():
    """Relative errors of out, dq, dk and dv against a masked pass in fp32, on new inputs for each row."""
    row = {}
    for prompt, answers in ROWS_TO_CHECK:
        row[f"{prompt}+{answers}"] = errors_of_row(prompt, answers)
    return row


def errors_of_row(prompt, answers):
    """The errors of the packed pass, and beside them those of a masked pass of the same type."""
    inputs, grad = random_row(prompt + sum(answers))
    inputs_in_fp32 = [x.detach().float().requires_grad_() for x in inputs]

    def exact():
        mask = row_mask(prompt, answers, torch.float32)
        return masked_attention(*inputs_in_fp32, mask, SDPBackend.MATH)

    def packed():
        return packed_attention(*inputs, prompt, answers)

    def masked():
        return masked_attention(*inputs, row_mask(prompt, answers, DTYPE))
    names = ("out", "dq", "dk", "dv")
    expected = with_gradients(exact, inputs_in_fp32, grad.float())
    return {"packed": distances(names, with_gradients(packed, inputs, grad), expected),
            "masked": distances(names, with_gradients(masked, inputs, grad), expected)}


def packed_times(prompt, length):
    """Milliseconds of one layer's attention of a row: a prompt, and GROUP answers of `length` tokens.

    Without a mask ("packed"), with one ("masked"), and with one by SDPA's memory-efficient kernel.
    """
    answers = [length] * GROUP
    tokens = prompt + sum(answers)
    inputs, grad = random_row(tokens)
    efficient = SDPBackend.EFFICIENT_ATTENTION if GPU else None
    mask = row_mask(prompt, answers, DTYPE)
    ways = {"packed": lambda: packed_attention(*inputs, prompt, answers),
            "masked": lambda: masked_attention(*inputs, mask),
            "masked_efficient": lambda: masked_attention(*inputs, mask, efficient)}
    row = {name: attention_times(attend, inputs, grad) for name, attend in ways.items()}
    row["times_faster"] = round(both_ways_ms(row["masked"]) / both_ways_ms(row["packed"]), 2)
    row["tokens"] = tokens
    return row


def both_ways_ms(times):
    return times["forward_ms"] + times["backward_ms"]


def attention_times(attend, inputs, grad):
    """Milliseconds of attend() forward and backward, and the GiB that they take beyond what there was."""
    reset_peak()
    before = torch.cuda.memory_allocated() if GPU else 0
    with torch.no_grad():
        forward_ms = milliseconds(attend, repeats=3, warm=1)
    out = attend()

    def backward():
        torch.autograd.grad(out, inputs, grad, retain_graph=True)
    backward_ms = milliseconds(backward, repeats=3, warm=1)
    extra_gib = in_gib(torch.cuda.max_memory_allocated() - before) if GPU else None
    return {"forward_ms": forward_ms, "backward_ms": backward_ms, "extra_gib": extra_gib}


# ================================================================ 3: NF4
NF4_LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
NF4_BLOCK = 64                             # values that share a scale


def measure_nf4(report):
    report.measure("3 nf4", "unpacking", unpacking_errors)
    report.measure("3 nf4", "experts", experts_errors)
    report.measure("3 nf4", "times", experts_times)


class PackedExperts:
    """A layer of E random experts, packed: what `packed_experts` calls its module.

    weights: {name: (E, out, in)}, the same before they were packed.
    """
    hidden_dim = HIDDEN
    intermediate_dim = EXPERT_WIDTH

    def __init__(self, experts=EXPERTS):
        self.num_experts = experts
        self.weights = {"gate_up_proj": 0.02 * random_values(experts, 2 * EXPERT_WIDTH, HIDDEN),
                        "down_proj": 0.02 * random_values(experts, HIDDEN, EXPERT_WIDTH)}
        self.scales = {}
        for name, weight in self.weights.items():
            codes, self.scales[name] = pack(weight)
            setattr(self, name, codes)

    def _apply_gate(self, rows):
        gate, up = rows.chunk(2, -1)
        return F.silu(gate) * up

    def unpacked(self):
        """{name: weight (E, out, in)} of all experts, from their codes."""
        every = torch.arange(self.num_experts, device=DEVICE)
        weights = {}
        for name, weight in self.weights.items():
            codes = getattr(self, name)
            shape = weight.shape[1:]
            weights[name] = unpack(codes, self.scales[name], every, shape, DTYPE)
        return weights


def decoded(codes, scales, shape):
    """Our own decoder: fp32 weights (E, out, in) from codes (E, out * in / 2) and scales (E, out * in / 64).

    A byte holds two codes, the first in its high half; a code is the number of a level.
    """
    levels = torch.tensor(NF4_LEVELS, device=DEVICE)
    numbers = torch.stack([codes >> 4, codes & 15], -1)              # (E, out * in / 2, 2)
    blocks = levels[numbers.long()].view(len(codes), -1, NF4_BLOCK)  # (E, out * in / 64, 64)
    return (blocks * scales[..., None]).view(shape)


def unpacking_errors():
    """`unpack` against our own decoder, for three of eight experts: unequal values, and relative distances.

    "nf4_error" is what packing itself costs: the distance of what was decoded from the weights before.
    """
    module = PackedExperts(8)
    hit = torch.tensor([1, 2, 5], device=DEVICE)
    row = {}
    for name, weight in module.weights.items():
        shape = weight.shape[1:]
        codes = getattr(module, name)
        scales = module.scales[name]
        expected = decoded(codes, scales, weight.shape)              # (8, out, in), fp32
        found = unpack(codes, scales, hit, shape, DTYPE)             # (3, out, in)
        packed_twice = pack(weight, double=True)
        found_twice = unpack(*packed_twice, hit, shape, DTYPE)
        unequal = found != expected[hit].to(DTYPE)
        row[name] = {"unequal": int(unequal.sum()),
                     "of": found.numel(),
                     "distance": distance(found, expected[hit]),
                     "nf4_error": distance(expected, weight),
                     "double_quant_distance": distance(found_twice, expected[hit])}
    return row


def random_routing(tokens):
    """(chosen (N, k), share (N, k)): which experts each token is sent to, and how much each counts."""
    chosen = torch.rand(tokens, EXPERTS, device=DEVICE).topk(EXPERTS_PER_TOKEN).indices
    share = torch.rand(chosen.shape, device=DEVICE, dtype=DTYPE)
    return chosen, share / share.sum(-1, keepdim=True)


def plain_experts(module, x, chosen, share, weights):
    """The arithmetic of `packed_experts` on weights that are not packed: x (N, d) -> (N, d).

    All experts take part in grouped_mm, those with no token too.
    """
    expert, order = chosen.flatten().sort(stable=True)               # (N k,) each
    counts = torch.bincount(expert, minlength=module.num_experts)
    ends = counts.cumsum(0).to(torch.int32)                          # (E,)
    token = order // chosen.shape[1]
    rows = F.grouped_mm(x[token], weights["gate_up_proj"].mT, offs=ends)      # (N k, 2 w)
    rows = module._apply_gate(rows)                                  # (N k, w)
    rows = F.grouped_mm(rows, weights["down_proj"].mT, offs=ends)    # (N k, d)
    rows = rows * share.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, rows)


def exact_experts(module, x, chosen, share, weights):
    """The same in fp32, expert by expert: x (N, d) in fp32 -> (N, d)."""
    out = torch.zeros_like(x)
    for slot in range(chosen.shape[1]):
        for expert in chosen[:, slot].unique():
            tokens = (chosen[:, slot] == expert).nonzero()[:, 0]
            gate_up = weights["gate_up_proj"][expert].float()        # (2 w, d)
            down = weights["down_proj"][expert].float()              # (d, w)
            inner = module._apply_gate(x[tokens] @ gate_up.T)
            result = (inner @ down.T) * share[tokens, slot, None].float()
            out = out.index_add(0, tokens, result)
    return out


def experts_errors():
    """Relative errors of the output and of the gradient of x, against fp32, by number of tokens.

    Of packed experts, and of plain ones, whose weights were unpacked beforehand: they are the same values.
    """
    module = PackedExperts()
    weights = module.unpacked()
    row = {}
    for tokens in (1, 8, 300):
        x = random_values(tokens, HIDDEN).requires_grad_()           # (N, d)
        grad = torch.randn_like(x)
        chosen, share = random_routing(tokens)
        x_in_fp32 = x.detach().float().requires_grad_()

        def packed():
            return packed_experts(module, x, chosen, share)

        def plain():
            return plain_experts(module, x, chosen, share, weights)

        def exact():
            return exact_experts(module, x_in_fp32, chosen, share, weights)
        expected = with_gradients(exact, [x_in_fp32], grad.float())
        errors = {}
        for name, work in (("packed", packed), ("plain", plain)):
            names = (f"{name} out", f"{name} dx")
            errors |= distances(names, with_gradients(work, [x], grad), expected)
        row[f"{tokens} tokens"] = errors
    return row


@torch.no_grad()
def experts_times():
    """Milliseconds of one layer's experts by number of tokens: packed, and plain, on weights never packed."""
    module = PackedExperts()
    weights = module.weights
    row = {"unpack_all_ms": milliseconds(module.unpacked)}
    for tokens in (1, 8, 64, 1360, PROMPT):
        x = random_values(tokens, HIDDEN)                            # (N, d)
        chosen, share = random_routing(tokens)
        row[f"{tokens} tokens"] = {
            "packed_ms": milliseconds(lambda: packed_experts(module, x, chosen, share)),
            "plain_ms": milliseconds(lambda: plain_experts(module, x, chosen, share, weights))}
    return row


# ================================================================ 4: attention while decoding
FP32_FITS = 12000                          # cached tokens; with more, fp32 takes too much memory


def measure_decoding(report):
    steps = [(8, GROUP, PROMPT),
             (8, GROUP, PROMPT * 19 // 10),
             (64, 1, PROMPT)]
    for contexts, samples, cached in steps:
        name = f"{contexts} contexts x {samples}, {cached} cached"
        report.measure("4 decoding", name, decode_attention, contexts, samples, cached)


def decode_attention(contexts, samples, cached):
    """One layer's attention in one step: B contexts of W samples, which see the prompt and their own tokens.

    cached: tokens of a context, of which a 20th are the samples' own. Query heads become rows ("rows"), or
    keys and values are repeated for each query head ("repeated").
    """
    own = cached // 20
    prompt = cached - own
    q = random_heads(contexts, HEADS, samples)                       # (B, H, W, D)
    k = random_values(contexts, KEY_HEADS, cached, HEAD_DIM)         # (B, h, T, D)
    v = random_values(contexts, KEY_HEADS, cached, HEAD_DIM)
    owner_of_prompt = torch.zeros(prompt, device=DEVICE).long()
    owner_of_own = torch.arange(own, device=DEVICE) % samples + 1    # the samples take turns
    owner_k = torch.cat([owner_of_prompt, owner_of_own]).expand(contexts, -1)          # (B, T)
    owner_q = (torch.arange(samples, device=DEVICE) + 1).expand(contexts, -1)          # (B, W)
    mask = attention.visible(owner_q, owner_k)                       # (B, 1, W, T)
    mask_of_rows = attention.mask_of_rows(owner_q, owner_k, HEADS // KEY_HEADS, DTYPE)

    # ---- whether both ways give the same
    ways = {"repeated": lambda: masked_attention(q, k, v, mask),
            "rows": lambda: attention.attention_by_rows(q, k, v, mask_of_rows, SCALE)}
    row = decode_errors(ways, q, k, v, mask)

    # ---- how long they take, and what else a step may have to do
    for name, attend in ways.items():
        row[f"{name}_ms"] = milliseconds(attend)
    rows = q.reshape(contexts, KEY_HEADS, -1, HEAD_DIM)              # (B, h, H / h * W, D)
    everything = slice(None)
    seen_by_all = slice(0, prompt)
    row["rows_on_prompt_without_mask_ms"] = milliseconds(
        lambda: attention.flash(rows, k, v, everything, seen_by_all, SCALE, causal=False))
    new = k[:, :, -samples:]

    def concatenate():
        return [torch.cat([x, new], 2) for x in (k, v)]
    row["concatenate_k_and_v_ms"] = milliseconds(concatenate)
    row["gb_to_read"] = round((k.nbytes + v.nbytes) / 1e9, 3)
    return row


def decode_errors(ways, q, k, v, mask):
    """How far the ways are apart, and, where memory allows it, how far each of them is from fp32."""
    exact = None
    if k.shape[2] < FP32_FITS:
        exact = masked_attention(q.float(), k.float(), v.float(), mask, SDPBackend.MATH)
    outs = {name: attend() for name, attend in ways.items()}
    row = {"rows_against_repeated": distance(outs["rows"], outs["repeated"])}
    if exact is not None:
        for name, out in outs.items():
            row[f"{name}_error"] = distance(out, exact)
    return row


# ================================================================ 5: the whole model
def measure_whole_model(report):
    from transformers import AttentionInterface
    AttentionInterface.register(MASKED, masked_interface)
    policy = measure_build(report, "5 model")
    if policy is None:
        return

    def measure(name, work, *arguments):
        report.measure("5 model", name, work, policy, *arguments)
    measure("vision, 1 clip", see, 1)
    measure("vision, 5 clips", see, 5)
    # Of a rollout: contexts, samples of each, tokens of a prompt, new tokens of a sample.
    measure("warm up", sample, 1, 2, WARM_UP, 4)
    measure("rollout, 1 context x 1", sample, 1, 1, PROMPT, NEW // 2)
    measure("rollout, 1 context x 8", sample, 1, GROUP, PROMPT, NEW)
    measure("rollout, 8 contexts x 8", sample, 8, GROUP, PROMPT, NEW)
    measure("rollout, 16 contexts x 8", sample, 16, GROUP, PROMPT, NEW // 2)
    # Of a row: tokens of an answer, answers to the prompt, the ways in the order of their turns.
    measure("training row, 8 short answers", train_lora, SHORT, GROUP, (MASKED, PACKED))
    measure("training row, 8 long answers", train_lora, LONG, GROUP, (PACKED, MASKED))
    measure("rollout, 1 context x 8, with a LoRA", sample_with_lora, 1, GROUP, PROMPT, NEW // 2)
    measure("judge", judge_pass)
    measure("DPO pair, forward and backward", train_steering_vector, LONG, 2, (MASKED, PACKED))
    measure("row without gradient, 8 long answers", read_row, LONG, GROUP)
    measure("row without gradient, 8 short answers", read_row, SHORT, GROUP)
    if GPU:
        measure("decode step, 8 x 8", decode_split, 8, GROUP, PROMPT)
        measure("decode step, 1 x 8", decode_split, 1, GROUP, PROMPT)
        measure("kernels, 8 x 8", decode_kernels, 8, GROUP, PROMPT)
        measure("kernels, 1 x 8", decode_kernels, 1, GROUP, PROMPT)
    measure("rollout, 64 contexts x 1, short prompts", sample, 64, 1, PROMPT // 5, NEW // 2)


def measure_build(report, part):
    """Builds the model as a measurement -> the policy, or None where that failed or was skipped."""
    built = []

    def build_and_keep():
        policy, figures = build()
        built.append(policy)
        return figures
    report.measure(part, "build", build_and_keep)
    return built[0] if built else None


# ---------------------------------------------------------------- 5: building it
def build():
    """(policy, figures) of the model, with random weights that are packed as support/weights.py does it."""
    from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig
    from transformers.quantizers.auto import AutoHfQuantizer
    S = common.settings({"__doc__": ""}, ["--MODEL=random", f"--MAX_NEW_TOKENS={NEW}"])
    S.LAYER = LAYERS * 22 // 48            # that a steering vector is added to: the paper's depth
    config = Qwen3VLMoeConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False)
    options = loading_options(S, config, DTYPE)
    config._attn_implementation = options["attn_implementation"]
    config._experts_implementation = options["experts_implementation"]
    with torch.device("meta"):             # shapes without bytes
        model = AutoModelForImageTextToText.from_config(config, dtype=DTYPE)
    kinds = plan.weight_bytes(model, S, DTYPE.itemsize).values()
    planned = sum(kind.bytes for kind in kinds)
    quantizer = AutoHfQuantizer.from_config(options["quantization_config"], pre_quantized=False)
    quantizer._process_model_before_weight_loading(model, device_map=None)
    draw_parameters(model, quantizer)
    compute_buffers(model, type(config))
    policy = policy_of(model, S)
    return policy, {"planned_gib": in_gib(planned, 3)} | figures_of(model)


def draw_parameters(model, quantizer):
    """Puts random weights into a model without any, one tensor at a time. The quantizer packs its share."""
    for name, parameter in list(model.named_parameters()):
        place, _, own_name = name.rpartition(".")
        module = model.get_submodule(place)
        shape = parameter.shape
        if "4bit" in type(module).__name__ and own_name == "weight":
            shape = (module.out_features, module.in_features)        # as it is before it is packed
        if "norm" in name:
            value = torch.ones(shape, dtype=DTYPE, device=DEVICE)
        else:
            value = 0.02 * random_values(*shape)
        if quantizer.param_needs_quantization(model, name):
            packing = quantizer.get_quantize_ops()
            value = packing.convert({name: value}, full_layer_name=name, model=model)[name]
        if not isinstance(value, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=False)
        setattr(module, own_name, value)


def compute_buffers(model, config_class):
    """Gives the model its buffers. They are rotary tables, the same for one with few layers and experts."""
    from transformers import AutoModelForImageTextToText
    small_text = TEXT | {"num_hidden_layers": 1, "num_experts": 8, "vocab_size": 128}
    small_vision = VISION | {"depth": 1, "deepstack_visual_indexes": [0]}
    small_config = config_class(text_config=small_text, vision_config=small_vision)
    buffers = dict(AutoModelForImageTextToText.from_config(small_config).named_buffers())
    for name, _ in list(model.named_buffers()):
        place, _, own_name = name.rpartition(".")
        if name in buffers:
            setattr(model.get_submodule(place), own_name, buffers[name].to(DEVICE))


def policy_of(model, S):
    """The Policy of the model, set up as in weights.load_model.

    Its contexts are prompts that are encoded already (`random_prompt`). Its answers end at their limit alone,
    so that all are of one length.
    """
    from transformers import AutoTokenizer
    model.eval()
    model.requires_grad_(False)
    use_exact_kernels(model)
    model.model.language_model.activation_checkpointing_enable()
    attention.use_packed_attention(model.model.language_model)
    torch.backends.cuda.enable_cudnn_sdp(False)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "base")
    policy = common.Policy(model, tokenizer, plan.Room(most=0), S)
    policy.prepare = list                          # hides the method
    policy.prompt_length = tokens_of
    end = torch.tensor([policy.end], device=policy.device)
    policy.banned = torch.cat([policy.banned, end])
    policy.closing = set()
    return policy


def tokens_of(prompt):
    return len(prompt.ids)


def figures_of(model):
    """GiB of the weights, names of those left on the meta device, GiB on the card, number of values."""
    parameters = dict(model.named_parameters())
    values = 0
    for parameter in parameters.values():
        values_in_a_byte = 2 if parameter.dtype == torch.uint8 else 1
        values += parameter.numel() * values_in_a_byte
    weights = [*parameters.values(), *scales_of(model)]
    on_meta = [name for name, parameter in parameters.items() if parameter.is_meta]
    return {"weights_gib": in_gib(sum(weight.nbytes for weight in weights), 3),
            "on_meta": on_meta[:5],
            "allocated_gib": in_gib(torch.cuda.memory_allocated(), 3) if GPU else None,
            "parameters": values}


# ---------------------------------------------------------------- 5: what it reads
def random_ids(policy, tokens):
    """(tokens,) ids, none of the first thousand."""
    return torch.randint(1000, TEXT["vocab_size"], (tokens,), device=policy.device)


def random_answers(policy, answers, length):
    """So many lists of `length` ids."""
    return [random_ids(policy, length).tolist() for _ in range(answers)]


def random_prompt(policy, tokens):
    """An EncodedPrompt whose tokens are vision, except for a 20th at either end, with random features."""
    ids = random_ids(policy, tokens)                                 # (P,)
    edge = tokens / 20
    visual = torch.zeros(tokens, dtype=torch.bool, device=policy.device)
    visual[math.floor(edge):tokens - math.ceil(edge)] = True
    count = int(visual.sum())                                        # V
    layers = 1 + len(VISION["deepstack_visual_indexes"])             # the prompt's, and the deepstack's
    features = [0.02 * random_values(count, policy.hidden) for _ in range(layers)]     # (V, d) each
    clip = common.ClipFeatures(grid=(1, 2, 2), times=[0.0], layers=features)
    positions = torch.arange(tokens, device=policy.device).expand(3, -1)
    prompt = common.EncodedPrompt(ids, positions, visual, [clip])
    prompt.clips = []                              # of the context, in whose place it stands
    return prompt


def random_prompts(policy, contexts, tokens):
    return [random_prompt(policy, tokens) for _ in range(contexts)]


# ---------------------------------------------------------------- 5: vision, rollout
def see(policy, clips):
    """Seconds of the vision tower on random frames of so many clips, as Policy._see runs it."""
    frames = torch.randint(0, 256, (FRAMES, FRAME_SIDE, FRAME_SIDE, 3), dtype=torch.uint8)
    preparing, (patches, grid) = seconds(common.frames_to_patches, frames, FRAME_SIDE**2)
    patches = torch.cat([patches] * clips)
    tower = policy.model.model.visual

    def look():
        pixels = patches.to(policy.device, tower.dtype)
        grids = torch.tensor([grid] * clips, device=policy.device)
        with torch.no_grad():
            return tower(pixels, return_dict=True, grid_thw=grids)
    look()
    reset_peak()
    took, out = seconds(look)
    return {"seconds": took, "tokens": len(out.pooler_output), "frames_to_patches_s": preparing}


def roll_out(policy, prompts, samples, new_tokens):
    """The repository's rollout: so many samples of each prompt, all of `new_tokens` tokens."""
    keys = [(1, i) for i in range(len(prompts))]
    return common.rollout(policy, prompts, samples, keys, limit=new_tokens)


def sample(policy, contexts, samples, prompt_tokens, new_tokens):
    """Seconds of prefill with the first token; tokens/s, and milliseconds a step, of the other tokens."""
    prompts = random_prompts(policy, contexts, prompt_tokens)
    took = {}
    for limit in (1, new_tokens):
        reset_peak()
        took[limit], groups = seconds(roll_out, policy, prompts, samples, limit)
        for group in groups:
            assert all(len(drawn.ids) == limit for drawn in group)
    sequences = contexts * samples
    steps = new_tokens - 1
    decoding = took[new_tokens] - took[1]
    return {"prompt_tokens": prompt_tokens,
            "sequences": sequences,
            "prefill_s": took[1],
            "rollout_s": took[new_tokens],
            "tokens_per_s": round(sequences * steps / decoding, 1),
            "step_ms": round(1000 * decoding / steps, 1),
            "peak_gib": peak()}


def sample_with_lora(policy, *how):
    policy.add("phase1", "lora")
    try:
        return sample(policy, *how)
    finally:
        policy.drop("phase1")


# ---------------------------------------------------------------- 5: packed rows
# The two ways to compute a row's attention, by their names for transformers and in the report.
PACKED = attention.NAME
MASKED = "masked"


def masked_interface(module, query, key, value, mask, segments=None, **_):
    """The attention of a row by one mask, which is made anew in each layer: the slow reference."""
    group = segments[0]
    answers = [answer.stop - answer.start for answer in group.answers]
    mask = row_mask(group.prompt.stop, answers, query.dtype)
    return masked_attention(query, key, value, mask).transpose(1, 2), None


@contextlib.contextmanager
def attention_by(policy, way):
    """Changes the decoder's attention. It lasts over backward, where checkpointed layers run once more."""
    policy.lm.config._attn_implementation = way
    try:
        yield
    finally:
        policy.lm.config._attn_implementation = PACKED


def train_lora(policy, length, answers, ways):
    return train_row(policy, "phase1", "lora", length, answers, ways)


def train_steering_vector(policy, length, answers, ways):
    return train_row(policy, "phase2", "steer", length, answers, ways)


def train_row(policy, writer, kind, length, answers, ways):
    """Forward and backward of a prompt with answers of `length` tokens, both ways, and how far these differ.

    writer, kind: what is trained, see Policy.add; ways: PACKED and MASKED, in the order of their turns.
    """
    prompt = random_prompt(policy, PROMPT)
    ids = random_answers(policy, answers, length)
    params = policy.add(writer, kind)
    policy.train_only(params)
    row = {}
    logp = {}
    gradient = {}
    try:
        for way in ways:
            row[way], logp[way], gradient[way] = train_one_way(policy, way, prompt, ids, params)
        row["tokens"] = PROMPT + length * answers
        row["times_faster"] = round(row[MASKED]["seconds"] / row[PACKED]["seconds"], 2)
        gap = (logp[PACKED] - logp[MASKED]).abs().mean()
        row["logprob_gap"] = three_digits(gap.item())
        row["gradient_distance"] = distance(gradient[PACKED], gradient[MASKED])
    finally:
        policy.drop(writer)
    return row


def train_one_way(policy, way, prompt, ids, params):
    """(figures, log-probs of all answers in one vector, gradient in one vector) of forward and backward."""
    gc.collect()
    reset_peak()
    with attention_by(policy, way):
        forward_s, logp = seconds(common.logprobs, policy, prompt, ids)        # (T_i,) each
        loss = torch.stack([values.mean() for values in logp]).mean()
        backward_s, _ = seconds(loss.backward)
    gradient = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
    for p in params:
        p.grad = None
    figures = {"forward_s": forward_s,
               "backward_s": backward_s,
               "seconds": round(forward_s + backward_s, 3),
               "peak_gib": peak(),
               "gradient_norm": three_digits(gradient.norm().item())}
    return figures, torch.cat(logp).detach(), gradient


def read_row(policy, length, answers):
    """Seconds and peak of a row without gradient, as for old log-probs or a reference, both ways."""
    row = {"tokens": PROMPT + length * answers}
    prompt = random_prompt(policy, PROMPT)
    ids = random_answers(policy, answers, length)
    for way in (MASKED, PACKED):
        reset_peak()
        with torch.no_grad(), attention_by(policy, way):
            took, _ = seconds(common.logprobs, policy, prompt, ids)
        row[way] = {"seconds": took, "peak_gib": peak()}
    return row


# ---------------------------------------------------------------- 5: the judge
class Tree:
    """A row of a clip, memories behind it, and replies behind each memory, where every token stands once.

    A memory m sees the clip c and itself, and a reply r also its memory:

           c  m1 r1 r2 m2 r1 r2   <- keys
       c   1
       m1  1  1
       r1  1  1  1
       r2  1  1  .  1
       m2  1  .  .  .  1
       r1  1  .  .  .  1  1
       r2  1  .  .  .  1  .  1
       ^ queries
    """

    def __init__(self, clip):
        tokens = len(clip.ids)
        self.clip = clip
        self.ids = []                              # of all tokens behind the clip
        self.memory = [0] * tokens                 # which memory a token belongs to; 0: the clip's
        self.reply = [0] * tokens                  # which reply; 0: none
        self.positions = clip.positions[0].tolist()

    def add(self, ids, memory, reply, first):
        """Adds tokens of a memory or of a reply, from position `first` on."""
        self.ids += ids
        self.memory += [memory] * len(ids)
        self.reply += [reply] * len(ids)
        self.positions += range(first, first + len(ids))

    def sees(self):
        """(T, T) bool: queries down, keys across."""
        memory = torch.tensor(self.memory, device=DEVICE)            # (T,)
        reply = torch.tensor(self.reply, device=DEVICE)
        in_clip = memory == 0
        same_memory = memory == memory[:, None]
        on_branch = (reply == 0) | (reply == reply[:, None])
        return (in_clip | (same_memory & on_branch)).tril()


def tree_of(clip, memories, replies):
    """The Tree of a clip (an EncodedPrompt) and memories (lists of ids), with all replies to each memory."""
    tree = Tree(clip)
    end_of_clip = len(clip.ids)
    for number, memory in enumerate(memories, 1):
        tree.add(memory, number, 0, first=end_of_clip)
        for reply_number, reply in enumerate(replies, 1):
            tree.add(reply, number, reply_number, first=end_of_clip + len(memory))
    return tree


def reader_of(policy, tree):
    """A function that reads the tree's row of T tokens -> log-probs (T - C,) of those behind the clip of C.

    Each token is predicted from the one before it in the row. That is the right one, except where a memory or
    a reply begins that is not the first. So the first memory with its first reply can be checked.
    """
    clip = tree.clip
    ids = torch.tensor(tree.ids, device=DEVICE)                      # (T - C,)
    visual = F.pad(clip.visual, (0, len(ids)))                       # (T,)
    features, *deepstack = clip.features[0].layers                   # (V, d) each
    embeds = policy.lm.embed_tokens(torch.cat([clip.ids, ids]))      # (T, d)
    embeds = embeds.index_put((visual,), features)
    positions = torch.tensor(tree.positions, device=DEVICE).expand(3, -1)      # (3, T)
    sees = tree.sees()                                               # (T, T)

    def read():
        mask = torch.where(sees, embeds.new_zeros(()), -torch.inf)[None, None]
        hidden = policy.lm(
            inputs_embeds=embeds[None], position_ids=positions[:, None], attention_mask=mask,
            visual_pos_masks=visual[None], deepstack_visual_embeds=deepstack,
            use_cache=False).last_hidden_state[0]                    # (T, d)
        before = hidden[len(clip.ids) - 1:-1]                        # (T - C, d)
        logits = policy.head(before).float().index_fill(1, policy.banned, -torch.inf)
        return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)
    return read


def judge_pass(policy):
    """Verdicts on GROUP memories of one clip, each asked for by the log-probs of two replies.

    As columns of a packed row, each of which is a memory and a reply; as a tree, where a memory is read once
    for both replies; and for one memory alone.
    """
    clip = random_prompt(policy, CLIP)
    memories = random_answers(policy, GROUP, MEMORY)
    replies = random_answers(policy, 2, REPLY)
    columns = []
    for memory in memories:
        columns += [memory + reply for reply in replies]
    column = MEMORY + REPLY                                          # tokens of one
    row = {}

    def read_columns(columns):
        return common.logprobs(policy, clip, columns)
    row["16 columns of memory and reply"], logp = second_pass(
        CLIP + len(columns) * column, read_columns, columns)

    tree = tree_of(clip, memories, replies)
    row["a tree: 8 memories, each with two replies"], logp_of_tree = second_pass(
        CLIP + len(tree.ids), reader_of(policy, tree))
    # Both have the first memory with its first reply.
    gap = (logp_of_tree[:column] - logp[0]).abs().mean()
    row["tree_logprob_gap"] = three_digits(gap.item())

    row["one question alone, 2 columns"], _ = second_pass(
        CLIP + 2 * column, read_columns, columns[:2])
    return row


@torch.no_grad()
def second_pass(tokens, work, *arguments):
    """(figures, result) of a pass over so many tokens without gradient. The second of two runs is timed."""
    work(*arguments)
    reset_peak()
    took, result = seconds(work, *arguments)
    return {"seconds": took, "tokens": tokens, "peak_gib": peak()}, result


# ---------------------------------------------------------------- 5: where a decode step's time goes
class Stopwatch:
    """Takes the card's time around modules of one kind, whenever they run on few columns: not in prefill."""

    def __init__(self, modules):
        self.begun = None
        self.pairs = []                            # (event before, event after)
        self.hooks = []
        for module in modules:
            self.hooks.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(self.after))

    def before(self, module, arguments, named):
        x = arguments[0] if arguments else named["hidden_states"]    # (B, W, d)
        if x.shape[1] <= GROUP:
            self.begun = recorded_event()

    def after(self, module, arguments, output):
        if self.begun is not None:
            self.pairs.append((self.begun, recorded_event()))
            self.begun = None

    def milliseconds(self):
        return sum(first.elapsed_time(last) for first, last in self.pairs)

    def stop(self):
        for hook in self.hooks:
            hook.remove()


def decode_split(policy, contexts, samples, prompt_tokens, new_tokens=17):
    """Milliseconds of a decode step: attention with its projections, experts with their router, the rest."""
    prompts = random_prompts(policy, contexts, prompt_tokens)
    steps = new_tokens - 1
    prefill, _ = seconds(roll_out, policy, prompts, samples, 1)
    watches = {"attention": Stopwatch([layer.self_attn for layer in policy.lm.layers]),
               "experts": Stopwatch([layer.mlp for layer in policy.lm.layers])}
    try:
        whole, _ = seconds(roll_out, policy, prompts, samples, new_tokens)
    finally:
        for watch in watches.values():
            watch.stop()
    step_ms = 1000 * (whole - prefill) / steps
    row = {"step_ms": round(step_ms, 2)}
    rest = step_ms
    for name, watch in watches.items():
        row[name] = round(watch.milliseconds() / steps, 2)
        rest -= row[name]
    row["rest"] = round(rest, 2)
    row["sequences"] = contexts * samples
    return row


@dataclass
class Kernel:
    """What the card spends on one kernel: milliseconds, and how often it runs."""
    ms: float = 0.0
    calls: float = 0.0


def kernels_of(work, *arguments):
    """{name: Kernel} of one call of work(*arguments)."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work(*arguments)
        wait()
    kernels = {}
    for event in profiler.key_averages():
        kernel = kernels.setdefault(event.key[:90], Kernel())
        kernel.ms += event.self_device_time_total / 1000
        kernel.calls += event.count
    return kernels


def decode_kernels(policy, contexts, samples, prompt_tokens, new_tokens=4):
    """Busy milliseconds of the card in a decode step, in all and by kernel.

    What a rollout of several tokens takes beyond one of a single token, over its further steps.
    """
    prompts = random_prompts(policy, contexts, prompt_tokens)
    prefill = kernels_of(roll_out, policy, prompts, samples, 1)
    whole = kernels_of(roll_out, policy, prompts, samples, new_tokens)
    steps = new_tokens - 1
    of_step = {}
    for name in prefill | whole:
        more = whole.get(name, Kernel())
        less = prefill.get(name, Kernel())
        ms = more.ms - less.ms
        calls = more.calls - less.calls
        of_step[name] = Kernel(ms / steps, calls / steps)
    table = {}
    for name in sorted(of_step, key=lambda name: -of_step[name].ms)[:20]:
        kernel = of_step[name]
        table[name] = {"ms": round(kernel.ms, 3), "calls": round(kernel.calls)}
    return {"busy_ms_a_step": round(sum(kernel.ms for kernel in of_step.values()), 2),
            "kernels_a_step": round(sum(kernel.calls for kernel in of_step.values())),
            "table": table}


# ================================================================ 7: what would help
def measure_what_helps(report):
    policy = measure_build(report, "7 what helps")
    if policy is None:
        return
    steps = [(1, 1),
             (1, GROUP),
             (8, GROUP),
             (16, GROUP)]
    for contexts, samples in steps:
        name = f"a decode step, {contexts} x {samples}"
        report.measure("7 what helps", name, decode_graph, policy, contexts, samples, PROMPT)


@dataclass
class GrownCache:
    """Hands out the columns so far, as support.decode.Cache does: shapes change from step to step."""
    layers: list                                   # keys and values (B, h, room, D) of each layer
    cached: int                                    # tokens, before the step
    end: int                                       # tokens, after it

    def append(self, layer, keys, values):
        seen = []
        for room, new in zip(self.layers[layer], (keys, values)):
            room[:, :, self.cached:self.end] = new
            seen.append(room[:, :, :self.end])
        return seen


@dataclass
class FixedCache:
    """Hands out all of the room, whatever is written of it: shapes stay, as a CUDA graph needs it."""
    layers: list
    places: object                                 # (W,) where the step's tokens go, on the card

    def append(self, layer, keys, values):
        for room, new in zip(self.layers[layer], (keys, values)):
            room.index_copy_(2, self.places, new)
        return self.layers[layer]


@torch.no_grad()
def decode_graph(policy, contexts, samples, cached):
    """One step of B contexts of W samples on a random cache: the repository's way, and with fixed shapes.

    With fixed shapes it also runs as a CUDA graph, so that the processor hands one graph over to the card and
    not thousands of kernels, one after the other.
    """
    # ---- a cache with room for 64 tokens of each sample, and the step's tokens
    room = cached + 64 * samples
    shape = (contexts, KEY_HEADS, room, HEAD_DIM)
    layers = [(random_values(*shape), random_values(*shape)) for _ in range(policy.layers)]
    ids = random_ids(policy, contexts * samples)
    embeds = policy.lm.embed_tokens(ids).view(contexts, samples, -1)           # (B, W, d)
    positions = torch.full((3, contexts, samples), cached, device=policy.device)
    numbers = torch.arange(samples, device=policy.device)                      # (W,)
    places = cached + numbers

    # ---- who sees whom: nobody sees the room that is left
    owner_q = (numbers + 1).expand(contexts, -1)                               # (B, W)
    owner_k = torch.full((contexts, room), -1, device=policy.device)           # (B, room)
    owner_k[:, :cached] = 0
    owner_k[:, places] = owner_q
    mask = attention.mask_of_rows(owner_q, owner_k, HEADS // KEY_HEADS, DTYPE)

    def logits(cache, mask):                                                   # (B, W, V)
        hidden = policy.lm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions,
                           cache=cache, use_cache=False).last_hidden_state
        return policy.head(hidden)

    def usual():
        end = cached + samples
        return logits(GrownCache(layers, cached, end), mask[..., :end])

    def fixed():
        return logits(FixedCache(layers, places), mask)

    # ---- the figures
    sequences = contexts * samples
    row = {"sequences": sequences, "cached": cached}
    usual_logits = usual()
    row["usual_ms"] = milliseconds(usual, repeats=3, warm=1)
    fixed_logits = fixed()
    row["fixed_ms"] = milliseconds(fixed, repeats=3, warm=1)
    if GPU:
        row |= graph_figures(fixed, usual_logits, sequences)
    row["fixed_against_usual"] = distance(fixed_logits, usual_logits)
    same = fixed_logits.argmax(-1) == usual_logits.argmax(-1)                  # (B, W)
    row["same_likeliest"] = round(same.float().mean().item(), 3)
    return row


def graph_figures(step, usual, sequences):
    """Figures of step() as a CUDA graph, or the text of the error: not everything can be captured.

    usual: what the usual step gives; sequences: tokens that a step makes.
    """
    try:
        row = replayed(step, usual)
    except Exception as error:
        return {"graph_error": said_by(error)[:600]}
    row["graph_tokens_per_s"] = round(1000 * sequences / row["graph_ms"])
    return row


def replayed(step, usual):
    """Seconds of the capture, milliseconds of a replay, and how far its result is from the usual one."""
    # CUDA wants a first run on a stream of its own before it captures.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    began = time.time()
    with torch.cuda.graph(graph):
        result = step()
    captured = time.time() - began
    graph.replay()
    wait()
    return {"capture_s": round(captured, 2),
            "graph_against_usual": distance(result, usual),
            "graph_ms": milliseconds(graph.replay)}


# ================================================================ 6: the six stages as commands
ALWAYS = ["--MAX_NEW_TOKENS=48", "--CPU_THREADS=1"]
LOOP = ["--GROUP=4", "--CONTEXTS=2", "--MINI_BATCH=2", "--N_MIN=1", "--N_MAX=3"]
PHASE2 = [*LOOP, "--DPO_STEPS=2", "--PAIRS=2", "--GRPO_STEPS=1", "--RECENT=2"]
STAGES = [
    ("02_phase1_train", [*LOOP, "--STEPS=2", "--OFF_POLICY_STEPS=1"]),
    ("03_collect_tasks", ["--CHUNK=4", "--GROUP=4", "--CACHE_STREAMS=2", "--CACHE_CONTEXTS=4",
                          "--RECENT=3"]),
    ("04_train_reward", ["--STEPS=3", "--CONTEXTS=2", "--ROWS=2", "--WARMUP=1", "--BOOTSTRAP=50",
                         "--RECENT=2"]),
    ("05_phase2_train", PHASE2),
    ("05_phase2_train", [*PHASE2, "--ALGORITHM=grpo"]),
    ("06_eval", ["--BOOTSTRAP=50", "--VALIDATE=4", "--EXAMPLES=1", "--RECENT=2",
                 "--METHODS=base+prompt,dpo-steer,grpo-steer"])]
SMALL_FRAMES = ["--FRAMES_PER_CLIP=4", "--FRAME_PIXELS=9216"]
LARGE_FRAMES = ["--FRAMES_PER_CLIP=8", "--FRAME_PIXELS=50176"]
# About the videos, whatever they show.
QUESTIONS = [
    ("What moves?", ["A. a rocket", "B. a bicycle", "C. a cat", "D. nothing"], "B"),
    ("What is the weather like?", ["A. rain", "B. snow", "C. sun", "D. fog"], "C"),
    ("What is said?", [], "nothing"),
    ("Where is it?", ["A. a street", "B. a kitchen", "C. a lake", "D. a room"], "A"),
    ("How many people are there?", ["A. one", "B. two", "C. three", "D. four"], "B"),
    ("What colour is the sky?", ["A. grey", "B. blue", "C. black", "D. red"], "B")]


@dataclass
class Chain:
    """One run of the stages.

    arguments: of all its commands; phase2: further ones of 05; videos: the folder that 01 makes streams from,
    None where the run takes those of STREAMS.
    """
    name: str
    arguments: list
    phase2: list
    videos: object = None

    def commands(self):
        """[(stage, its arguments)] in their order."""
        commands = []
        if self.videos:
            source = ["--SOURCE=videos", f"--DATA={self.videos}", "--SPLIT=online"]
            commands.append(("01_make_streams", source))
        for stage, arguments in STAGES:
            more = self.phase2 if stage.startswith("05") else []
            commands.append((stage, arguments + more))
        return commands


def measure_stages(report):
    with tempfile.TemporaryDirectory() as folder:
        report.measure("6 stages", "all", run_chains, report, pathlib.Path(folder))


def run_chains(report, folder):
    """Runs all chains, side by side on a GPU, of which they fill little. Each reports under its own name."""
    threads = []
    for number, chain in enumerate(make_chains(folder)):
        run = folder / f"run{number}"
        if not chain.videos:
            shutil.copytree(OPTIONS["STREAMS"], run / "streams")
        threads.append(threading.Thread(target=run_chain, args=(report, chain, run)))
    for thread in threads:
        thread.start()
        if not GPU:
            thread.join()
    for thread in threads:
        thread.join()
    return {}


def make_chains(folder):
    """The Chains that VIDEOS and STREAMS allow; puts the models and videos that they need into `folder`."""
    base = folder / "base"
    shutil.copytree(ROOT / "tiny" / "base", base)
    steer_layer = ["--LAYER=2"]            # 05's own is too deep for these models, but for MODEL=tiny
    chains = []
    if OPTIONS["VIDEOS"]:
        videos = folder / "videos"
        dense = folder / "dense"
        copy_videos(videos)
        save_dense_model(dense)
        limits = ["--THINK_TOKENS=24", "--FEATURE_CLIPS=50"]
        chains.append(Chain(
            "videos, dense, 16 bits, local judge",
            [*ALWAYS, *LARGE_FRAMES, *limits, f"--MODEL={dense}", "--BITS=16", "--JUDGE=local"],
            steer_layer, videos))
        chains.append(Chain(
            "videos, toy world's model, 4 bits, local judge",
            [*ALWAYS, *SMALL_FRAMES, "--MEMORY_TOKENS=30", *limits, f"--MODEL={base}", "--BITS=4",
             "--JUDGE=local"],
            steer_layer, videos))
    if OPTIONS["STREAMS"]:
        limits = ["--MEMORY_TOKENS=17", "--THINK_TOKENS=16", "--FEATURE_CLIPS=50"]
        chains.append(Chain(
            "toy world, its model by path, 4 bits, exact judge",
            [*ALWAYS, *SMALL_FRAMES, *limits, f"--MODEL={base}", "--BITS=4", "--JUDGE=tiny"],
            steer_layer))
        chains.append(Chain("toy world, MODEL=tiny", ALWAYS, []))
    return chains


def run_chain(report, chain, run):
    """The stages of one chain, each with its exit code, its seconds and its last words."""
    table = {}
    report.keep(report.parts.setdefault("6 stages", {}), chain.name, table)
    for stage, arguments in chain.commands():
        key = f"{stage} grpo" if "--ALGORITHM=grpo" in arguments else stage
        left = START + SECONDS + 60 - time.time()
        if left < 15:
            report.keep(table, key, {"skipped": "no time left"})
            continue
        command = [sys.executable, f"{stage}.py", f"--RUN={run}", *arguments, *chain.arguments]
        row = run_command(command, left)
        report.keep(table, key, row)
        words = row["err"] if row["code"] else row["out"]
        say(f"6 {chain.name}: {key}: {row['code']}, {row['seconds']} s  {words.strip()[-200:]!r}")


def run_command(command, limit):
    """The row of a command; its code is "time" where it took more than `limit` seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began = time.time()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=limit)
        code = done.returncode
        out = done.stdout
        err = done.stderr
    except subprocess.TimeoutExpired as error:
        code = "time"
        out = str(error.stdout)
        err = str(error.stderr)
    return {"code": code,
            "seconds": round(time.time() - began, 1),
            "out": out[-700:],
            "err": err[-1500:] if code else err[-200:]}


def copy_videos(folder):
    """Copies two of VIDEOS, one of them to train on and both to watch, and writes questions about them."""
    files = sorted(pathlib.Path(OPTIONS["VIDEOS"]).glob("*.mp4"))[:2]
    if len(files) < 2:
        raise SystemExit("--VIDEOS names no folder with two mp4 files")
    (folder / "train").mkdir(parents=True)
    shutil.copy(files[-1], folder / "train" / "train.mp4")
    lines = []
    for file in files:
        shutil.copy(file, folder / file.name)
        for kind in ("things", "places"):
            for question, options, answer in QUESTIONS:
                row = {"video": file.name, "question": question, "options": options,
                       "answer": answer, "environment": kind}
                lines.append(json.dumps(row) + "\n")
    (folder / "tasks.jsonl").write_text("".join(lines))


def save_dense_model(folder):
    """Saves a small dense Qwen3-VL with random weights and the toy world's tokenizer: a folder to load."""
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "base")
    width = 128 if SMALL else 512
    heads = width // 64
    text = {"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width,
            "num_hidden_layers": 4, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
            "head_dim": 64, "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                "mrope_section": [12, 10, 10], "mrope_interleaved": True}}
    vision = VISION | {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2,
                       "out_hidden_size": width, "num_position_embeddings": 576,
                       "deepstack_visual_indexes": [0]}
    token_ids = {}
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        key = name.replace("_pad", "") + "_token_id"
        token_ids[key] = tokenizer.convert_tokens_to_ids(f"<|{name}|>")
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **token_ids)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ================================================================ the whole
def main():
    torch.manual_seed(int(START))                  # fresh inputs for each check
    torch.set_num_threads(16 if GPU else 1)
    report = Report(OUT)
    parts = OPTIONS["PARTS"].split(",")
    if "1" in parts:
        measure_card(report)
    if "2" in parts:
        measure_packed_row(report)
    if "3" in parts:
        measure_nf4(report)
    if "4" in parts:
        measure_decoding(report)
    if "5" in parts:
        if "6" in parts:
            report.limit = SECONDS - 110           # the rest is for the stages
        measure_whole_model(report)
        report.limit = SECONDS
    if "7" in parts:
        measure_what_helps(report)
    if "6" in parts:
        measure_stages(report)
    report.print_table()


if __name__ == "__main__":
    main()
