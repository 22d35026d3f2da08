"""Measures the full-size model on one GPU: Qwen3-VL-30B-A3B's shapes with random weights, and the six stages.

Nothing is downloaded. Each figure is written to OUT when it is known, so a failure loses nothing; a failed one
leaves its error text. Without a GPU all parts run at small shapes, which tests the script and measures nothing.

  1  versions, the card, its ceilings: copy, matrix product, grouped product at the experts' shapes
  2  attention of a packed row, without a mask, against masked SDPA
  3  NF4 packing on the card against an own decoder of the codes; packed experts against plain ones
  4  attention while decoding: query heads as rows against keys repeated for each query head
  5  the whole model: bytes, vision, prefill, rollout, training rows, a packed judge pass, a DPO pair
  7  what would help: a decode step as a CUDA graph
  6  the six stages as commands, on real videos and on a rendered run of the toy world

Run: python experiments/full_size.py [--PARTS=1,2,3] [--OUT=results/full_size.json] [--SECONDS=500] [--SMALL=1]
     [--VIDEOS=folder of mp4 files] [--STREAMS=folder of a run of 01 with SOURCE="tiny"]
"""
import contextlib
import gc
import importlib
import json
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

START = time.time()
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch                                                                # noqa: E402
import torch.nn.functional as F                                             # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel                      # noqa: E402

import common                                                               # noqa: E402
from support import attention, plan                                         # noqa: E402
from support import weights as weights_module                               # noqa: E402

GPU = torch.cuda.is_available()
OPTIONS = dict(PARTS="1,2,3,4,5,7,6", OUT=str(ROOT / "results" / "full_size.json"), SECONDS="500",
               SMALL=str(int(not GPU)), VIDEOS="", STREAMS="")
for argument in sys.argv[1:]:
    key, _, value = argument.removeprefix("--").partition("=")
    if key not in OPTIONS:
        raise SystemExit(f"unknown argument {argument}; there are {', '.join(OPTIONS)}")
    OPTIONS[key] = value
SMALL, SECONDS, OUT = OPTIONS["SMALL"] == "1", float(OPTIONS["SECONDS"]), pathlib.Path(OPTIONS["OUT"])
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
GIB = 2**30

# what Qwen3-VL-30B-A3B's config.json says, as far as bytes and operations depend on it
TEXT = dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
            num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
            decoder_sparse_step=1, mlp_only_layers=[], max_position_embeddings=262144, tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20],
                                 mrope_interleaved=True))
VISION = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, in_channels=3, patch_size=16,
              spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=2048, num_position_embeddings=2304,
              deepstack_visual_indexes=[8, 16, 24])
PROMPT, FRAMES, SHORT, LONG, NEW, CLIP, MEMORY = 11070, 20, 170, 1350, 64, 3000, 150
if SMALL:
    TEXT |= dict(vocab_size=2000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
                 num_key_value_heads=2, head_dim=32, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2,
                 rope_parameters=TEXT["rope_parameters"] | dict(mrope_section=[6, 5, 5]))
    VISION |= dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128,
                   num_position_embeddings=36, deepstack_visual_indexes=[0, 1])
    PROMPT, FRAMES, SHORT, LONG, NEW, CLIP, MEMORY = 200, 4, 5, 12, 6, 60, 8
HEADS, KV, DIM = TEXT["num_attention_heads"], TEXT["num_key_value_heads"], TEXT["head_dim"]
GROUP = 8


# ---------------------------------------------------------------- keeping figures
class Report:
    """All figures by part and name, in a JSON file that is written after each of them."""

    def __init__(self, file):
        self.file = file
        self.parts = json.loads(file.read_text()) if file.exists() else {}
        self.limit = SECONDS

    def write(self):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_suffix(".aside")
        aside.write_text(json.dumps(self.parts, indent=1) + "\n")
        os.replace(aside, self.file)

    def measure(self, part, name, work):
        """Keeps work()'s dict with its seconds and peak, or the text of its error. Late ones are not begun."""
        row, began = {}, time.time()
        if began - START > self.limit:
            row["skipped"] = f"{self.limit:.0f} s were over"
        else:
            try:
                wait()
                reset_peak()
                row |= work() or {}
                wait()
            except (Exception, SystemExit) as error:
                row["error"] = f"{type(error).__name__}: {error}"[:1500]
                row["where"] = traceback.format_exc()[-1500:]
            row["wall_s"] = round(time.time() - began, 2)
            row.setdefault("peak_gib", peak())
        self.parts.setdefault(part, {})[name] = row
        self.write()
        shown = {k: v for k, v in row.items() if k not in ("where", "table")}
        print(f"[{time.time() - START:5.0f} s] {part} {name}: {json.dumps(shown)[:900]}", flush=True)
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
        return row


def wait():
    if GPU:
        torch.cuda.synchronize()


def reset_peak():
    if GPU:
        torch.cuda.reset_peak_memory_stats()


def peak():
    return round(torch.cuda.max_memory_allocated() / GIB, 2) if GPU else None


def milliseconds(work, repeats=5, warm=2):
    """Median time of work() by events on the card, by the clock elsewhere."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeats):
        if GPU:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            work()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        else:
            began = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times), 4)


def seconds(work):
    """(seconds of one call, its result)"""
    wait()
    began = time.perf_counter()
    result = work()
    wait()
    return round(time.perf_counter() - began, 3), result


def distance(x, reference):
    """Relative norm of the difference; NaN where x holds one."""
    x, reference = x.double(), reference.double()
    return float(f"{((x - reference).norm() / reference.norm()).item():.3g}")


# ================================================================ 1: the card
def versions():
    row = dict(python=platform.python_version(), torch=torch.__version__, date=time.strftime("%Y-%m-%d"), small=SMALL)
    for name in ("transformers", "bitsandbytes", "peft", "accelerate", "tokenizers"):
        row[name] = importlib.import_module(name).__version__
    if GPU:
        properties = torch.cuda.get_device_properties(0)
        row |= dict(card=properties.name, gib=round(properties.total_memory / GIB, 2), cuda=torch.version.cuda,
                    processors=properties.multi_processor_count)
    return row


def ceilings():
    n = 256 if SMALL else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    product = milliseconds(lambda: a @ b)
    source = torch.randn(n * n * (1 if SMALL else 16), device=DEVICE, dtype=DTYPE)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    return dict(copy_gb_s=round(2 * source.nbytes / copy / 1e6, 1), matmul_tflops=round(2 * n**3 / product / 1e9, 1))


def grouped():
    """TFLOP/s of grouped_mm at the experts' shapes, for the tokens of one prompt, and for 64 tokens."""
    row, E, d, i = {}, TEXT["num_experts"], TEXT["hidden_size"], TEXT["moe_intermediate_size"]
    for tokens in (64, PROMPT):
        pairs = tokens * TEXT["num_experts_per_tok"]
        ends = (torch.arange(1, E + 1, device=DEVICE) * pairs // E).to(torch.int32)
        for name, (wide, out) in dict(gate_up=(d, 2 * i), down=(i, d)).items():
            x = torch.randn(pairs, wide, device=DEVICE, dtype=DTYPE)
            w = torch.randn(E, out, wide, device=DEVICE, dtype=DTYPE)
            ms = milliseconds(lambda: F.grouped_mm(x, w.mT, offs=ends))
            row[f"{name}_{tokens}_tokens"] = dict(ms=ms, tflops=round(2 * pairs * wide * out / ms / 1e9, 1))
    return row


# ================================================================ 2: a packed row without a mask
def row_mask(prompt, lengths, dtype):
    """What a masked pass gives to SDPA: (1, 1, T, T) of 0 and -inf."""
    owner = torch.cat([torch.full((n,), i, device=DEVICE) for i, n in enumerate([prompt, *lengths])])[None]
    zero = torch.zeros((), dtype=dtype, device=DEVICE)
    return torch.where(attention.visible(owner, owner).tril(), zero, -torch.inf)


def packed_attention(q, k, v, prompt, lengths, scale):
    return attention.PackedAttention.apply(q, k, v, attention.lay_out([(prompt, lengths)]), scale)


def masked_attention(q, k, v, mask, scale, backend=None):
    """As transformers' "sdpa" does it with a mask: keys and values are repeated for each query head."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def random_row(tokens, dtype):
    """q, k, v, grad as transformers hands them over: (1, tokens, heads, dim) seen as (1, heads, tokens, dim)"""
    make = lambda heads: torch.randn(1, tokens, heads, DIM, device=DEVICE, dtype=dtype).transpose(1, 2)
    return *(make(h).requires_grad_() for h in (HEADS, KV, KV)), make(HEADS)


def packed_is_right():
    """Relative errors of out, dq, dk, dv against a masked pass in fp32, fresh inputs for each of the cases."""
    row, scale = {}, DIM ** -0.5
    for prompt, lengths in ((517, (170, 33, 1, 250)), (64, (64,) * 8), (1000, (7, 300))):
        q, k, v, grad = random_row(prompt + sum(lengths), DTYPE)
        wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
        exact = masked_attention(*wide, row_mask(prompt, lengths, torch.float32), scale, SDPBackend.MATH)
        true = exact, *torch.autograd.grad(exact, wide, grad.float())
        errors = {}
        for name, attend in dict(
                packed=lambda: packed_attention(q, k, v, prompt, lengths, scale),
                masked=lambda: masked_attention(q, k, v, row_mask(prompt, lengths, DTYPE), scale)).items():
            out = attend()
            mine = out, *torch.autograd.grad(out, (q, k, v), grad)
            errors[name] = {what: distance(x, y) for what, x, y in zip(("out", "dq", "dk", "dv"), mine, true)}
        row[f"{prompt}+{list(lengths)}"] = errors
    return row


def packed_times(prompt, length):
    """Milliseconds of one layer's attention, merged and masked, forward and backward, and each one's peak."""
    row, scale, lengths = {}, DIM ** -0.5, [length] * GROUP
    tokens = prompt + sum(lengths)
    q, k, v, grad = random_row(tokens, DTYPE)
    backend = SDPBackend.EFFICIENT_ATTENTION if GPU else None
    mask = row_mask(prompt, lengths, DTYPE)
    for name, attend in dict(packed=lambda: packed_attention(q, k, v, prompt, lengths, scale),
                             masked=lambda: masked_attention(q, k, v, mask, scale),
                             masked_efficient=lambda: masked_attention(q, k, v, mask, scale, backend)).items():
        reset_peak()
        before = torch.cuda.memory_allocated() if GPU else 0
        with torch.no_grad():
            forward = milliseconds(attend, 3, 1)
        out = attend()
        back = milliseconds(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), 3, 1)
        del out
        row[name] = dict(forward_ms=forward, backward_ms=back,
                         extra_gib=round((torch.cuda.max_memory_allocated() - before) / GIB, 2) if GPU else None)
    row["times_faster"] = round(sum(row["masked"][x] for x in ("forward_ms", "backward_ms"))
                                / sum(row["packed"][x] for x in ("forward_ms", "backward_ms")), 2)
    row["tokens"] = tokens
    return row


# ================================================================ 3: NF4
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def some_experts(E=None):
    from types import SimpleNamespace
    E, d, i = E or TEXT["num_experts"], TEXT["hidden_size"], TEXT["moe_intermediate_size"]
    weights = dict(gate_up_proj=torch.randn(E, 2 * i, d, device=DEVICE, dtype=DTYPE) * 0.02,
                   down_proj=torch.randn(E, d, i, device=DEVICE, dtype=DTYPE) * 0.02)
    packed = {name: weights_module.pack(w) for name, w in weights.items()}
    module = SimpleNamespace(hidden_dim=d, intermediate_dim=i, num_experts=E,
                             scales={n: s for n, (_, s) in packed.items()},
                             _apply_gate=lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
                             **{n: codes for n, (codes, _) in packed.items()})
    return module, weights


def unpacking_is_right():
    """weights_module.unpack against a decoder of the codes written here: high half byte first, a scale a block of 64."""
    row, table = {}, torch.tensor(NF4, device=DEVICE)
    module, weights = some_experts(8)
    hit = torch.tensor([1, 2, 5], device=DEVICE)
    for name, w in weights.items():
        codes, scales = getattr(module, name), module.scales[name]
        pairs = torch.stack([codes >> 4, codes & 15], -1).flatten(1).long()                     # (E, n)
        mine = (table[pairs].view(len(codes), -1, 64) * scales[..., None]).view(w.shape)        # fp32
        theirs = weights_module.unpack(codes, scales, hit, w.shape[1:], DTYPE)
        row[name] = dict(unequal=int((theirs != mine[hit].to(DTYPE)).sum()), of=theirs.numel(),
                         distance=distance(theirs, mine[hit]), nf4_error=distance(mine, w))
        codes, scales = weights_module.pack(w, double=True)
        row[name]["double_quant_distance"] = distance(weights_module.unpack(codes, scales, hit, w.shape[1:], DTYPE), mine[hit])
    return row


def routing(tokens, E):
    chosen = torch.rand(tokens, E, device=DEVICE).topk(TEXT["num_experts_per_tok"]).indices
    share = torch.rand(chosen.shape, device=DEVICE, dtype=DTYPE)
    return chosen, share / share.sum(-1, keepdim=True)


def plain_experts(module, x, chosen, share, weights):
    """The same arithmetic on weights that were never packed; all experts take part in grouped_mm."""
    expert, order = chosen.flatten().sort(stable=True)
    k, ends = chosen.shape[1], torch.bincount(expert, minlength=module.num_experts).cumsum(0).to(torch.int32)
    out = F.grouped_mm(x[order // k], weights["gate_up_proj"].mT, offs=ends)
    out = F.grouped_mm(module._apply_gate(out), weights["down_proj"].mT, offs=ends) * share.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, order // k, out)


def experts_are_right():
    """Output and gradient of x: packed, plain in 16 bits, both against plain in fp32 on the same weights."""
    module, weights = some_experts()
    E, every = module.num_experts, torch.arange(module.num_experts, device=DEVICE)
    ready = {n: weights_module.unpack(getattr(module, n), module.scales[n], every, w.shape[1:], DTYPE)
             for n, w in weights.items()}
    row = {}
    for tokens in (1, 8, 300):
        x = torch.randn(tokens, module.hidden_dim, device=DEVICE, dtype=DTYPE, requires_grad=True)
        grad, (chosen, share) = torch.randn_like(x), routing(tokens, E)
        results = {}
        for name, out in dict(packed=weights_module.packed_experts(module, x, chosen, share),
                              plain=plain_experts(module, x, chosen, share, ready)).items():
            results[name] = out, *torch.autograd.grad(out, x, grad)
        exact_x, exact = x.detach().float().requires_grad_(), 0
        for slot in range(chosen.shape[1]):
            for e in chosen[:, slot].unique():
                at = chosen[:, slot] == e
                inner = module._apply_gate(exact_x[at] @ ready["gate_up_proj"][e].float().T)
                part = (inner @ ready["down_proj"][e].float().T) * share[at, slot, None].float()
                exact = exact + torch.zeros_like(exact_x).index_put((at.nonzero()[:, 0],), part)
        true = exact, *torch.autograd.grad(exact, exact_x, grad.float())
        row[f"{tokens} tokens"] = {f"{name} {what}": distance(x, y) for name, mine in results.items()
                                   for what, x, y in zip(("out", "dx"), mine, true)}
    return row


def experts_times():
    """Milliseconds of one layer's experts by number of tokens: packed, and on weights that were never packed."""
    module, weights = some_experts()
    every, row = torch.arange(module.num_experts, device=DEVICE), {}
    row["unpack_all_ms"] = milliseconds(lambda: [weights_module.unpack(
        getattr(module, n), module.scales[n], every, w.shape[1:], DTYPE) for n, w in weights.items()])
    for tokens in (1, 8, 64, 1360, PROMPT):
        x, (chosen, share) = torch.randn(tokens, module.hidden_dim, device=DEVICE, dtype=DTYPE), routing(
            tokens, module.num_experts)
        with torch.no_grad():
            row[f"{tokens} tokens"] = dict(
                packed_ms=milliseconds(lambda: weights_module.packed_experts(module, x, chosen, share)),
                plain_ms=milliseconds(lambda: plain_experts(module, x, chosen, share, weights)))
    return row


# ================================================================ 4: attention while decoding
def decode_attention(B, width, cached):
    """One layer, one step: B contexts of `width` samples, each seeing the prompt and its own columns."""
    scale, own = DIM ** -0.5, cached // 20
    q = torch.randn(B, width, HEADS, DIM, device=DEVICE, dtype=DTYPE).transpose(1, 2)
    k, v = (torch.randn(B, KV, cached, DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
    owner = torch.cat([torch.zeros(cached - own, device=DEVICE).long(), torch.arange(own, device=DEVICE) % width + 1])
    owners = (torch.arange(width, device=DEVICE) + 1).expand(B, -1), owner.expand(B, -1)
    mask = attention.visible(*owners)
    rows_mask = attention.mask_of_rows(*owners, HEADS // KV, DTYPE)
    exact = masked_attention(q.float(), k.float(), v.float(), mask, scale, SDPBackend.MATH) if cached < 12000 else None
    ways = dict(repeated=lambda: masked_attention(q, k, v, mask, scale),
                rows=lambda: attention.attention_by_rows(q, k, v, rows_mask, scale))
    row, outs = {}, {name: way() for name, way in ways.items()}
    row["rows_against_repeated"] = distance(outs["rows"], outs["repeated"])
    if exact is not None:
        row |= {f"{name}_error": distance(out, exact) for name, out in outs.items()}
    del exact, outs
    row |= {f"{name}_ms": milliseconds(way) for name, way in ways.items()}
    prompt = slice(0, cached - own)
    rows = q.reshape(B, KV, -1, DIM)
    row["rows_on_prompt_without_mask_ms"] = milliseconds(
        lambda: attention.flash(rows, k, v, slice(None), prompt, scale, causal=False))
    new = k[:, :, -width:]
    row["concatenate_k_and_v_ms"] = milliseconds(lambda: [torch.cat([x, new], 2) for x in (k, v)])
    row["gb_to_read"] = round((k.nbytes + v.nbytes) / 1e9, 3)
    return row


# ================================================================ 5: the whole model
def build():
    """(policy, figures): random weights, packed as `weights` packs what it reads, one tensor at a time."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen3VLMoeConfig
    from transformers.quantizers.auto import AutoHfQuantizer
    S = common.settings({"__doc__": ""}, ["--MODEL=random", f"--MAX_NEW_TOKENS={NEW}"])
    S.GROUP, S.LAYER = GROUP, TEXT["num_hidden_layers"] * 22 // 48
    config = Qwen3VLMoeConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False)
    config._attn_implementation, config._experts_implementation = "sdpa", "nf4"
    quantization = weights_module.quantization()(bnb_4bit_compute_dtype=DTYPE, bnb_4bit_use_double_quant=bool(S.DOUBLE_QUANT),
                                          llm_int8_skip_modules=["lm_head", "model.visual"])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=DTYPE)
    planned = sum(kind.bytes for kind in plan.weight_bytes(model, S, DTYPE.itemsize).values())
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer._process_model_before_weight_loading(model, device_map=None)
    for name, p in list(model.named_parameters()):
        place, _, kind = name.rpartition(".")
        module = model.get_submodule(place)
        packed = "4bit" in type(module).__name__ and kind == "weight"
        shape = (module.out_features, module.in_features) if packed else p.shape
        value = torch.randn(shape, dtype=DTYPE, device=DEVICE) * 0.02 if "norm" not in name else torch.ones(
            shape, dtype=DTYPE, device=DEVICE)
        if quantizer.param_needs_quantization(model, name):
            value = quantizer.get_quantize_ops().convert({name: value}, full_layer_name=name, model=model)[name]
        setattr(module, kind, value if isinstance(value, torch.nn.Parameter) else torch.nn.Parameter(value, False))
    few = type(config)(text_config=TEXT | dict(num_hidden_layers=1, num_experts=8, vocab_size=128),
                       vision_config=VISION | dict(depth=1, deepstack_visual_indexes=[0]))
    buffers = dict(AutoModelForImageTextToText.from_config(few).named_buffers())        # rotary tables: of no layer
    for name, _ in list(model.named_buffers()):
        place, _, kind = name.rpartition(".")
        if name in buffers:
            setattr(model.get_submodule(place), kind, buffers[name].to(DEVICE))
    for module in model.modules():                                                  # as in weights.load_model
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.eval().requires_grad_(False)
    model.model.language_model.activation_checkpointing_enable()
    attention.use_packed_attention(model.model.language_model)
    torch.backends.cuda.enable_cudnn_sdp(False)
    policy = common.Policy(model, AutoTokenizer.from_pretrained(ROOT / "tiny" / "base"), plan.Room(most=0), S)
    policy.prepare = lambda prompts: prompts                                          # prompts are made here
    policy.prompt_length = lambda prompt: len(prompt.ids)
    policy.banned = torch.cat([policy.banned, torch.tensor([policy.end], device=policy.device)])      # no early end
    policy.closing = set()
    weights = sum(x.nbytes for x in [*model.parameters(), *weights_module.scales_of(model)])
    left = [n for n, p in model.named_parameters() if p.device.type == "meta"]
    return policy, dict(planned_gib=round(planned / GIB, 3), weights_gib=round(weights / GIB, 3), on_meta=left[:5],
                        allocated_gib=round(torch.cuda.memory_allocated() / GIB, 3) if GPU else None,
                        parameters=sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters()))


def random_ids(policy, n):
    return torch.randint(1000, TEXT["vocab_size"], (n,), device=policy.device)


def random_prompt(policy, n):
    """A prompt whose middle is vision tokens, with features as the tower would give them."""
    ids, visual = random_ids(policy, n), torch.zeros(n, dtype=torch.bool, device=policy.device)
    visual[n // 20:-n // 20] = True
    vision = [torch.randn(int(visual.sum()), policy.hidden, device=policy.device, dtype=DTYPE) * 0.02
              for _ in range(1 + len(VISION["deepstack_visual_indexes"]))]
    clip = common.ClipFeatures((1, 2, 2), [0.0], vision)
    prompt = common.EncodedPrompt(ids, torch.arange(n, device=policy.device).expand(3, -1), visual, [clip])
    prompt.clips = []                                              # of the context, in whose place it stands
    return prompt


def see(policy, clips):
    """The vision tower on random frames of `clips` clips, as Policy._see runs it."""
    side = 96 if SMALL else 448
    frames = torch.randint(0, 256, (FRAMES, side, side, 3), dtype=torch.uint8)
    preparing, (patches, grid) = seconds(lambda: common.frames_to_patches(frames, side * side))
    visual = policy.model.model.visual
    patches = torch.cat([patches] * clips)

    def look():
        with torch.no_grad():
            return visual(patches.to(policy.device, visual.dtype), return_dict=True,
                          grid_thw=torch.tensor([grid] * clips, device=policy.device))
    look()
    reset_peak()
    took, out = seconds(look)
    return dict(seconds=took, tokens=len(out.pooler_output), frames_to_patches_s=preparing)


def sample(policy, contexts, samples, length, new=NEW):
    """The repository's rollout: seconds of prefill and first token, then tokens/s and ms a step of the others."""
    prompts = [random_prompt(policy, length) for _ in range(contexts)]
    row = {}
    for limit in (1, new):
        policy.S.MAX_NEW_TOKENS = limit
        reset_peak()
        keys = [(limit, i) for i in range(contexts)]
        row[limit], drawn = seconds(lambda: common.rollout(policy, prompts, samples, keys))
        assert all(len(s.ids) == limit for g in drawn for s in g)
    decoding = row[new] - row[1]
    return dict(prompt_tokens=length, sequences=contexts * samples, prefill_s=row[1], rollout_s=row[new],
                tokens_per_s=round(contexts * samples * (new - 1) / decoding, 1),
                step_ms=round(1000 * decoding / (new - 1), 1), peak_gib=peak())


def sample_with_lora(policy, *how):
    policy.add("phase1", "lora")
    try:
        return sample(policy, *how)
    finally:
        policy.drop("phase1")


def masked_interface(module, query, key, value, mask, scaling=None, segments=None, **_):
    """The attention of a row by one mask, which is made anew in each layer: the slow reference."""
    group = segments[0]
    lengths = [own.stop - own.start for own in group.answers]
    mask = row_mask(group.prompt.stop, lengths, query.dtype)
    return masked_attention(query, key, value, mask, scaling).transpose(1, 2), None


@contextlib.contextmanager
def attention_named(policy, name):
    """Stays on until backward has ended: with checkpointing the layers run again."""
    policy.lm.config._attn_implementation = name
    try:
        yield
    finally:
        policy.lm.config._attn_implementation = attention.NAME


WAYS = dict(masked="masked", packed=attention.NAME)


def training_row(policy, kind, writer, length, answers, ways=("masked", "packed")):
    """Forward and backward of one packed row: seconds, peak, and how far the two ways' results are apart."""
    row, kept, prompt = {}, {}, random_prompt(policy, PROMPT)
    ids = [random_ids(policy, length).tolist() for _ in range(answers)]
    params = policy.add(writer, kind)
    policy.train_only(params)
    try:
        for name in ways:
            logp, loss = None, None
            gc.collect()
            reset_peak()
            with attention_named(policy, WAYS[name]):
                forward, logp = seconds(lambda: common.logprobs(policy, prompt, ids))
                loss = torch.stack([x.mean() for x in logp]).mean()
                backward, _ = seconds(loss.backward)
            grads = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
            kept[name] = torch.cat([x.detach() for x in logp]), grads
            row[name] = dict(forward_s=forward, backward_s=backward, seconds=round(forward + backward, 3),
                             peak_gib=peak(), gradient_norm=float(f"{grads.norm().item():.3g}"))
            for p in params:
                p.grad = None
        row["tokens"] = PROMPT + length * answers
        if len(kept) == 2:
            row["times_faster"] = round(row["masked"]["seconds"] / row["packed"]["seconds"], 2)
            row["logprob_gap"] = float(f"{(kept['packed'][0] - kept['masked'][0]).abs().mean().item():.3g}")
            row["gradient_distance"] = distance(kept["packed"][1], kept["masked"][1])
    finally:
        policy.drop(writer)
    return row


def forward_row(policy, length, answers):
    """Seconds and peak of a packed row without gradient (old log-probs, a reference), both ways."""
    row, prompt = dict(tokens=PROMPT + length * answers), random_prompt(policy, PROMPT)
    ids = [random_ids(policy, length).tolist() for _ in range(answers)]
    for name, way in WAYS.items():
        reset_peak()
        with torch.no_grad(), attention_named(policy, way):
            took, _ = seconds(lambda: common.logprobs(policy, prompt, ids))
        row[name] = dict(seconds=took, peak_gib=peak())
    return row


def judge_pass(policy):
    """Verdicts on 8 memories of one clip, each asked for by the log-probs of two replies of 6 tokens."""
    clip, reply, row = random_prompt(policy, CLIP), 6, {}
    memories = [random_ids(policy, MEMORY).tolist() for _ in range(GROUP)]
    replies = [random_ids(policy, reply).tolist() for _ in range(2)]
    columns = [m + r for m in memories for r in replies]

    def timed(name, work, tokens):
        with torch.no_grad():
            work()
            reset_peak()
            took, out = seconds(work)
        row[name] = dict(seconds=took, tokens=tokens, peak_gib=peak())
        return out
    whole = CLIP + len(columns) * (MEMORY + reply)
    columns_logp = timed("16 columns of memory and reply",
                         lambda: common.logprobs(policy, clip, columns), whole)

    # one memory, then both replies beside each other: a tree of three levels
    parts = [(0, 0, CLIP, clip.positions[0])]                                      # memory, reply, tokens, positions
    for i in range(GROUP):
        parts.append((i + 1, 0, MEMORY, CLIP + torch.arange(MEMORY, device=DEVICE)))
        parts += [(i + 1, j + 1, reply, CLIP + MEMORY + torch.arange(reply, device=DEVICE)) for j in range(2)]
    memory, branch = (torch.cat([torch.full((p[2],), p[at], device=DEVICE) for p in parts]) for at in (0, 1))
    sees = (memory == 0) | (memory == memory[:, None]) & ((branch == 0) | (branch == branch[:, None]))
    ids = torch.tensor([x for m in memories for x in m + replies[0] + replies[1]], device=DEVICE)
    embeds = torch.cat([policy.lm.embed_tokens(clip.ids), policy.lm.embed_tokens(ids)])
    vision, *deep = clip.features[0].layers
    embeds[:CLIP][clip.visual] = vision
    positions = torch.cat([p[3] for p in parts]).expand(3, -1)

    def tree():
        mask = torch.where(sees.tril(), embeds.new_zeros(()), -torch.inf)[None, None]
        hidden = policy.lm(inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=False,
                           attention_mask=mask, deepstack_visual_embeds=deep,
                           visual_pos_masks=F.pad(clip.visual[None], (0, len(ids)))).last_hidden_state[0]
        logits = policy.head(hidden[CLIP - 1:-1]).float().index_fill(1, policy.banned, -torch.inf)
        return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)
    out = timed("a tree: 8 memories, each with two replies", tree, len(embeds))
    first = torch.cat(columns_logp).view(GROUP, 2, -1)[0, 0]
    row["tree_logprob_gap"] = float(f"{(out[:MEMORY + reply] - first).abs().mean().item():.3g}")

    one = [memories[0] + r for r in replies]
    timed("one question alone, 2 columns", lambda: common.logprobs(policy, clip, one), CLIP + 2 * len(one[0]))
    return row


# ---------------------------------------------------------------- decoding: where a step goes, and what helps
@contextlib.contextmanager
def split_by_events(policy, found):
    """Adds to `found` the events around attention and experts of every pass over few columns."""
    hooks, begun = [], {}

    def before(kind):
        def hook(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            if x.shape[1] <= GROUP:
                begun[kind] = torch.cuda.Event(enable_timing=True)
                begun[kind].record()
        return hook

    def after(kind):
        def hook(module, args, out):
            if kind in begun:
                end = torch.cuda.Event(enable_timing=True)
                end.record()
                found.setdefault(kind, []).append((begun.pop(kind), end))
        return hook
    for layer in policy.lm.layers:
        for kind, module in (("attention", layer.self_attn), ("experts", layer.mlp)):
            hooks += [module.register_forward_pre_hook(before(kind), with_kwargs=True),
                      module.register_forward_hook(after(kind))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def decode_split(policy, contexts, samples, length, new=17):
    """Milliseconds of a decode step in attention (with its projections), experts (with the router), the rest."""
    prompts, policy.S.MAX_NEW_TOKENS = [random_prompt(policy, length) for _ in range(contexts)], 1
    keys = [(1, i) for i in range(contexts)]
    prefill, _ = seconds(lambda: common.rollout(policy, prompts, samples, keys))
    policy.S.MAX_NEW_TOKENS, found = new, {}
    with split_by_events(policy, found):
        whole, _ = seconds(lambda: common.rollout(policy, prompts, samples, keys))
    step = 1000 * (whole - prefill) / (new - 1)
    row = {kind: round(sum(a.elapsed_time(b) for a, b in pairs) / (new - 1), 2) for kind, pairs in found.items()}
    return dict(step_ms=round(step, 2), **row, rest=round(step - sum(row.values()), 2), sequences=contexts * samples)


def kernels(policy, contexts, samples, length, new=4):
    """Busy milliseconds of the card in a decode step, by kernel, against the step's length by the clock."""
    from torch.profiler import ProfilerActivity, profile
    prompts = [random_prompt(policy, length) for _ in range(contexts)]
    keys, busy, table = [(1, i) for i in range(contexts)], {}, {}
    for limit in (1, new):
        policy.S.MAX_NEW_TOKENS = limit
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            common.rollout(policy, prompts, samples, keys)
            wait()
        for e in p.key_averages():
            table.setdefault(e.key[:90], [0, 0])
            sign = 1 if limit == new else -1
            table[e.key[:90]][0] += sign * e.self_device_time_total / 1000 / (new - 1)
            table[e.key[:90]][1] += sign * e.count / (new - 1)
        busy[limit] = sum(e.self_device_time_total for e in p.key_averages()) / 1000
    top = sorted(table.items(), key=lambda x: -x[1][0])[:20]
    return dict(busy_ms_a_step=round((busy[new] - busy[1]) / (new - 1), 2),
                kernels_a_step=round(sum(n for _, n in table.values())),
                table={name: dict(ms=round(ms, 3), calls=round(n)) for name, (ms, n) in top})


def whole_model(report):
    from transformers import AttentionInterface
    AttentionInterface.register("masked", masked_interface)
    held = {}

    def make():
        held["policy"], row = build()
        return row
    report.measure("5 model", "build", make)
    if "policy" not in held:
        return
    policy = held["policy"]
    sampled = lambda *how: lambda: sample(policy, *how)
    measure = lambda name, work: report.measure("5 model", name, work)
    measure("vision, 1 clip", lambda: see(policy, 1))
    measure("vision, 5 clips", lambda: see(policy, 5))
    measure("warm up", lambda: sample(policy, 1, 2, 64 if not SMALL else 20, 4))
    measure("rollout, 1 context x 1", sampled(1, 1, PROMPT, NEW // 2))
    measure("rollout, 1 context x 8", sampled(1, GROUP, PROMPT))
    measure("rollout, 8 contexts x 8", sampled(8, GROUP, PROMPT))
    measure("rollout, 16 contexts x 8", sampled(16, GROUP, PROMPT, NEW // 2))
    measure("training row, 8 short answers", lambda: training_row(policy, "lora", "phase1", SHORT, GROUP))
    measure("training row, 8 long answers", lambda: training_row(policy, "lora", "phase1", LONG, GROUP,
                                                                ("packed", "masked")))
    measure("rollout, 1 context x 8, with a LoRA", lambda: sample_with_lora(policy, 1, GROUP, PROMPT, NEW // 2))
    measure("judge", lambda: judge_pass(policy))
    measure("DPO pair, forward and backward", lambda: training_row(policy, "steer", "phase2", LONG, 2))
    measure("row without gradient, 8 long answers", lambda: forward_row(policy, LONG, GROUP))
    measure("row without gradient, 8 short answers", lambda: forward_row(policy, SHORT, GROUP))
    if GPU:
        measure("decode step, 8 x 8", lambda: decode_split(policy, 8, GROUP, PROMPT))
        measure("decode step, 1 x 8", lambda: decode_split(policy, 1, GROUP, PROMPT))
        measure("kernels, 8 x 8", lambda: kernels(policy, 8, GROUP, PROMPT))
        measure("kernels, 1 x 8", lambda: kernels(policy, 1, GROUP, PROMPT))
    measure("rollout, 64 contexts x 1, short prompts", sampled(64, 1, PROMPT // 5, NEW // 2))
    held.clear()


# ================================================================ 7: what would help
def replayed(step, usual):
    """Milliseconds of step() as a CUDA graph, of its capture, and how far its result is from the usual one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph, began = torch.cuda.CUDAGraph(), time.time()
    with torch.cuda.graph(graph):
        result = step()
    captured = time.time() - began
    graph.replay()
    wait()
    return dict(capture_s=round(captured, 2), graph_against_usual=distance(result, usual),
                graph_ms=milliseconds(graph.replay))


def decode_graph(policy, B, width, cached):
    """One decode step on a random cache: the repository's way, and with all shapes fixed, as a CUDA graph."""
    room, layers, device = cached + 64 * width, policy.layers, policy.device
    make = lambda: torch.randn(B, KV, room, DIM, device=device, dtype=DTYPE)
    store = [(make(), make()) for _ in range(layers)]
    at = torch.arange(width, device=device) + cached

    class Grown:
        """The columns so far, as support.decode.Cache hands them out."""
        def append(self, layer, *new):
            for x, columns in zip(store[layer], new):
                x[:, :, cached:cached + width] = columns
            return [x[:, :, :cached + width] for x in store[layer]]

    class Fixed:
        """All of the room, whatever is written of it."""
        def append(self, layer, *new):
            for x, columns in zip(store[layer], new):
                x.index_copy_(2, at, columns)
            return store[layer]
    embeds = policy.lm.embed_tokens(random_ids(policy, B * width)).view(B, width, -1)
    positions = torch.full((3, B, width), cached, device=device)
    owner_q = (torch.arange(width, device=device) + 1).expand(B, -1)
    owner_k = torch.full((B, room), -1, device=device)
    owner_k[:, :cached] = 0
    owner_k[:, at] = owner_q
    mask = attention.mask_of_rows(owner_q, owner_k, HEADS // KV, DTYPE)
    row, results = dict(sequences=B * width, cached=cached), {}

    def step(cache, mask):
        hidden = policy.lm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, cache=cache,
                           use_cache=False).last_hidden_state
        return policy.head(hidden)

    def usual():
        return step(Grown(), mask[..., :cached + width])

    def fixed():
        return step(Fixed(), mask)
    with torch.no_grad():
        results["usual"] = usual()
        row["usual_ms"] = milliseconds(usual, 3, 1)
        results["fixed"] = fixed()
        row["fixed_ms"] = milliseconds(fixed, 3, 1)
        if GPU:
            try:
                row |= replayed(fixed, results["usual"])
                row["graph_tokens_per_s"] = round(1000 * B * width / row["graph_ms"])
            except Exception as error:
                row["graph_error"] = f"{type(error).__name__}: {error}"[:600]
    row["fixed_against_usual"] = distance(results["fixed"], results["usual"])
    row["same_likeliest"] = round((results["fixed"].argmax(-1) == results["usual"].argmax(-1)).float().mean().item(), 3)
    return row


def what_helps(report):
    held = {}
    measure = lambda name, work: report.measure("7 what helps", name, work)

    def make():
        held["policy"], row = build()
        return row
    measure("build", make)
    if "policy" not in held:
        return
    policy = held["policy"]

    for B, width in ((1, 1), (1, GROUP), (8, GROUP), (16, GROUP)):
        measure(f"a decode step, {B} x {width}", lambda: decode_graph(policy, B, width, PROMPT))
    held.clear()


# ================================================================ 6: the six stages as commands
TINY = ["--MAX_NEW_TOKENS=48", "--CPU_THREADS=1"]
LOOP = ["--GROUP=4", "--CONTEXTS=2", "--MINI_BATCH=2", "--N_MIN=1", "--N_MAX=3"]
STAGES = [("02_phase1_train", [*LOOP, "--STEPS=2", "--OFF_POLICY_STEPS=1"]),
          ("03_collect_tasks", ["--CHUNK=4", "--GROUP=4", "--CACHE_STREAMS=2", "--CACHE_CONTEXTS=4", "--RECENT=3"]),
          ("04_train_reward", ["--STEPS=3", "--CONTEXTS=2", "--ROWS=2", "--WARMUP=1", "--BOOTSTRAP=50", "--RECENT=2"]),
          ("05_phase2_train", [*LOOP, "--DPO_STEPS=2", "--PAIRS=2", "--GRPO_STEPS=1", "--RECENT=2"]),
          ("05_phase2_train", [*LOOP, "--DPO_STEPS=2", "--PAIRS=2", "--GRPO_STEPS=1", "--RECENT=2",
                               "--ALGORITHM=grpo"]),
          ("06_eval", ["--BOOTSTRAP=50", "--VALIDATE=4", "--EXAMPLES=1", "--RECENT=2",
                       "--METHODS=base+prompt,dpo-steer,grpo-steer"])]
QUESTIONS = [("What moves?", ["A. a rocket", "B. a bicycle", "C. a cat", "D. nothing"], "B"),
             ("What is the weather like?", ["A. rain", "B. snow", "C. sun", "D. fog"], "C"),
             ("What is said?", [], "nothing"),
             ("Where is it?", ["A. a street", "B. a kitchen", "C. a lake", "D. a room"], "A"),
             ("How many people are there?", ["A. one", "B. two", "C. three", "D. four"], "B"),
             ("What colour is the sky?", ["A. grey", "B. blue", "C. black", "D. red"], "B")]


def dense_model(folder):
    """A small dense Qwen3-VL with random weights, and the toy world's tokenizer, as a folder to load."""
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny" / "base")
    token, size = tokenizer.convert_tokens_to_ids, 128 if SMALL else 512
    heads = size // 64
    text = dict(vocab_size=len(tokenizer), hidden_size=size, intermediate_size=2 * size, num_hidden_layers=4,
                num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=64, max_position_embeddings=32768,
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[12, 10, 10],
                                     mrope_interleaved=True))
    vision = VISION | dict(depth=2, hidden_size=128, intermediate_size=256, num_heads=2, out_hidden_size=size,
                           num_position_embeddings=576, deepstack_visual_indexes=[0])
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        **{f"{x}_token_id": token(f"<|{x}_pad|>") for x in ("image", "video")},
        **{f"vision_{x}_token_id": token(f"<|vision_{x}|>") for x in ("start", "end")})).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def video_folder(folder):
    """One video to train on, two that are watched online, questions about them."""
    files = sorted(pathlib.Path(OPTIONS["VIDEOS"]).glob("*.mp4"))[:2]
    if len(files) < 2:
        raise SystemExit("--VIDEOS names no folder with two mp4 files")
    (folder / "train").mkdir(parents=True)
    shutil.copy(files[-1], folder / "train" / "train.mp4")
    rows = []
    for file in files:
        shutil.copy(file, folder / file.name)
        rows += [dict(video=file.name, question=q, options=o, answer=a, environment=kind)
                 for kind in ("things", "places") for q, o, a in QUESTIONS]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def chain(report, name, run, arguments, rows):
    """The stages of one run as commands, each with its exit code, seconds and last lines."""
    environment, table = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, {}
    report.parts.setdefault("6 stages", {})[name] = table
    for stage, own in rows:
        key, began = stage + " grpo" * ("--ALGORITHM=grpo" in own), time.time()
        left = SECONDS + 60 - (began - START)
        if left < 15:
            table[key] = dict(skipped="no time left")
            continue
        try:
            done = subprocess.run([sys.executable, f"{stage}.py", f"--RUN={run}", *own, *arguments], cwd=ROOT,
                                  env=environment, capture_output=True, text=True, timeout=left)
            code, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            code, out, err = "time", str(error.stdout), str(error.stderr)
        table[key] = dict(code=code, seconds=round(time.time() - began, 1), out=out[-700:],
                          err=err[-1500:] if code else err[-200:])
        report.write()
        print(f"[{time.time() - START:5.0f} s] 6 {name}: {key}: {code}, {table[key]['seconds']} s  "
              f"{(err if code else out).strip()[-200:]!r}", flush=True)


def stages(report, folder):
    full = ["--FRAMES_PER_CLIP=8", "--FRAME_PIXELS=50176", "--THINK_TOKENS=24", "--FEATURE_CLIPS=50"]
    chains = {}
    base = folder / "base"
    shutil.copytree(ROOT / "tiny" / "base", base)
    if OPTIONS["VIDEOS"]:
        video_folder(folder / "videos")
        dense_model(folder / "dense")
        index = [("01_make_streams", ["--SOURCE=videos", f"--DATA={folder / 'videos'}", "--SPLIT=online"])]
        chains["videos, dense, 16 bits, local judge"] = (
            [*TINY, *full, f"--MODEL={folder / 'dense'}", "--BITS=16", "--JUDGE=local"], index)
        chains["videos, toy world's model, 4 bits, local judge"] = (
            [*TINY, "--FRAMES_PER_CLIP=4", "--FRAME_PIXELS=9216", "--MEMORY_TOKENS=30", "--THINK_TOKENS=24",
             "--FEATURE_CLIPS=50", f"--MODEL={base}", "--BITS=4", "--JUDGE=local"], index)
    if OPTIONS["STREAMS"]:
        world = ["--FRAMES_PER_CLIP=4", "--FRAME_PIXELS=9216", "--MEMORY_TOKENS=17", "--THINK_TOKENS=16"]
        chains["toy world, its model by path, 4 bits, exact judge"] = (
            [*TINY, *world, "--FEATURE_CLIPS=50", f"--MODEL={base}", "--BITS=4", "--JUDGE=tiny"], [])
        chains["toy world, MODEL=tiny"] = ([*TINY], [])
    threads = []
    for i, (name, (arguments, first)) in enumerate(chains.items()):
        run = folder / f"run{i}"
        if not first:
            shutil.copytree(OPTIONS["STREAMS"], run / "streams")
        layer = [] if "MODEL=tiny" in name else ["--LAYER=2"]
        rows = [*first, *((stage, own + layer * stage.startswith("05")) for stage, own in STAGES)]
        threads.append(threading.Thread(target=chain, args=(report, name, run, arguments, rows)))
    for thread in threads:                                # side by side on a GPU, which they fill little of
        thread.start()
        if not GPU:
            thread.join()
    for thread in threads:
        thread.join()


# ================================================================ all of it
def main():
    torch.manual_seed(int(START))                                           # fresh inputs for each check
    torch.set_num_threads(16 if GPU else 1)
    report, parts = Report(OUT), OPTIONS["PARTS"].split(",")
    measure = report.measure
    if "1" in parts:
        measure("1 card", "versions", versions)
        measure("1 card", "ceilings", ceilings)
        measure("1 card", "grouped_mm", grouped)
    if "2" in parts:
        measure("2 packed row", "errors", packed_is_right)
        for prompt in (PROMPT * 37 // 100, PROMPT):
            for length in (SHORT, LONG):
                measure("2 packed row", f"{prompt} + 8 x {length}", lambda: packed_times(prompt, length))
    if "3" in parts:
        measure("3 nf4", "unpacking", unpacking_is_right)
        measure("3 nf4", "experts", experts_are_right)
        measure("3 nf4", "times", experts_times)
    if "4" in parts:
        for B, width, cached in ((8, GROUP, PROMPT), (8, GROUP, PROMPT * 19 // 10), (64, 1, PROMPT)):
            measure("4 decoding", f"{B} contexts x {width}, {cached} cached",
                    lambda: decode_attention(B, width, cached))
    if "5" in parts:
        report.limit -= 110 * ("6" in parts)                                        # for what comes after
        whole_model(report)
        report.limit = SECONDS
    if "7" in parts:
        what_helps(report)
    if "6" in parts:
        with tempfile.TemporaryDirectory() as folder:
            measure("6 stages", "all", lambda: stages(report, pathlib.Path(folder)))
    print(f"\n{'part':14}{'measured':44}{'s':>8}{'peak GiB':>10}  result")
    for part, rows in report.parts.items():
        for name, row in rows.items():
            text = row.get("error") or row.get("skipped") or ", ".join(
                f"{k} {v}" for k, v in row.items()
                if isinstance(v, (int, float, str)) and k not in ("wall_s", "peak_gib"))
            print(f"{part:14}{name:44}{row.get('wall_s', 0):8}{row.get('peak_gib') or 0:10}  {text[:110]}")


if __name__ == "__main__":
    main()
