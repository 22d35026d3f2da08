"""What the tricks are worth, each as a ratio of sides that take turns in one process (median, least, most).

rollout    common.rollout against transformers' generate(num_return_sequences=8) on the same video contexts,
           left-padded into one batch where there are several. Both sample exactly NEW tokens in each answer
           (no end token), so that finished samples leave our batch is not counted; generate reads the pixels
           each time.
packing    log-probs of 8 answers and their gradient in a LoRA: one packed row against one row after the other
           (at the embedded world's sizes), and against the usual batch of 8 rows at prompts of 256 to 8192
           text tokens, there with the peak memory of each (in a process of its own, less what it held before).
experts    the 4-bit experts' forward pass, of 8 tokens (decoding a group) and of 512: unpacking the experts
           that were hit, against unpacking all, against the same weights unpacked beforehand.
trl        a whole optimisation step on text prompts (8 samples of NEW tokens for each of 4 prompts, one update)
           against TRL's GRPOTrainer on the same model, LoRA and token counts; where `trl` is installed.
full       with a GPU: Qwen3-VL-30B-A3B's shapes with random 4-bit weights: bytes, tokens/s and floors.

Run: python tests/bench.py [rollout packing experts trl full] [--json FILE] [--threads N] [--repeats N]
"""
import argparse
import gc
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
G, NEW = 8, 40                    # samples a context; new tokens in each answer: about what the base writes
LENGTHS = (256, 1024, 2048, 4096, 8192)
PARTS = ("rollout", "packing", "experts", "trl", "full")


def machine(threads):
    import torch
    import transformers
    name = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    except OSError:
        pass                      # not Linux: what platform knows will do
    return {"cpu": name, "cores": os.cpu_count(), "threads": threads, "load": [round(x, 1) for x in os.getloadavg()],
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def compare(result, name, sides, repeats, tokens=None):
    """Times `sides` {name: function} in turns, one unmeasured turn first; the first side is ours. Adds to
    `result` and prints: seconds of each, and how many times faster the first is than each other."""
    seconds = {side: [] for side in sides}
    for i in range(repeats + 1):
        for side in list(sides)[::1 if i % 2 else -1]:
            began = time.perf_counter()
            sides[side]()
            if i:
                seconds[side].append(time.perf_counter() - began)
    ours, *others = seconds
    row = {f"{s}_s": round(statistics.median(x), 4) for s, x in seconds.items()}
    if tokens:
        row["tokens_per_s"] = round(tokens / statistics.median(seconds[ours]), 1)
    for other in others:
        ratios = sorted(b / a for a, b in zip(seconds[ours], seconds[other]))
        row[f"over_{other}"] = dict(ratio=round(statistics.median(ratios), 2), low=round(ratios[0], 2),
                                    high=round(ratios[-1], 2))
    result[name] = row
    print(f"{name:34}" + "  ".join(
        f"{x['ratio']:.2f} times {k[5:]} ({x['low']:.2f} to {x['high']:.2f})"
        for k, x in row.items() if k[:5] == "over_") + (
        f"  {row['tokens_per_s']:.0f} tokens/s" if tokens else ""), flush=True)
    return row


# ---------------------------------------------------------------- rollout
def video_contexts(folder, n):
    """n contexts as training draws them: of two rendered streams, evenly from the last clip to the first, the caption
    before each clip as history. So most windows are full, and the first one is."""
    import numpy as np
    import common
    from tiny import world
    contexts = []
    for i in range(2):
        truth = world.make_stream(world.stream_seed(0, "test", i))
        file = pathlib.Path(folder) / f"{i}.mp4"
        world.write_video(file, np.concatenate([world.draw_frames(clip) for clip in truth]))
        clips = [dict(clip=t, start=10.0 * t, end=10.0 * t + 10, file=str(file), offset=10.0 * t, speech=[])
                 for t in range(len(truth))]
        memories = [world.sentence(world.connector(t), world.clip_facts(clip)[t % 3:][:3])
                    for t, clip in enumerate(truth)]
        contexts += [common.make_context(dict(stream=str(i), clips=clips), t, memories) for t in range(len(truth))]
    return sorted(contexts, key=lambda c: -c.clip)[::max(1, len(contexts) // n)][:n]


def generate(policy, prompts, pixels):
    """generate's tokens for the prompts as one left-padded batch, NEW in each of the G answers -> their number."""
    import torch
    P = max(len(p.ids) for p in prompts)
    rows = [(torch.nn.functional.pad(x, (P - len(x), 0), value=v) for x, v in
             ((p.ids, policy.end), (torch.ones_like(p.ids), 0), (p.visual.int() * 2, 0))) for p in prompts]
    ids, mask, kinds = (torch.stack(x) for x in zip(*rows))
    out = policy.model.generate(
        input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds,
        pixel_values_videos=torch.cat([x for c in pixels for x, _ in c]),
        video_grid_thw=torch.tensor([g for c in pixels for _, g in c]),
        num_return_sequences=G, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=NEW, min_new_tokens=NEW, suppress_tokens=[policy.end, *policy.banned.tolist()],
        pad_token_id=policy.end)
    return out[:, P:].numel()


def bench_rollout(policy, contexts, result, repeats):
    import torch
    import common
    banned = policy.banned
    prompts = policy.prepare(contexts)
    pixels = [[common.frames_to_patches(common.clip_frames(c, policy.S.FRAMES_PER_CLIP)[0], policy.S.FRAME_PIXELS)
               for c in x.clips] for x in contexts]
    policy.banned = torch.cat([banned, torch.tensor([policy.end])])
    policy.closing, closing = set(), policy.closing       # nor does an answer end with its JSON
    for n in (1, len(contexts)):
        keys = [(0, i) for i in range(n)]
        ours = lambda: sum(len(s.ids) for g in common.rollout(policy, contexts[:n], G, keys) for s in g)
        theirs = lambda: generate(policy, prompts[:n], pixels[:n])
        assert ours() == theirs() == n * G * NEW
        compare(result, f"rollout, {n} contexts", {"ours": ours, "generate": theirs}, repeats, n * G * NEW)
    policy.banned, policy.closing = banned, closing


# ---------------------------------------------------------------- packing
def text_prompt(policy, length, seed=0):
    """A prompt of random text tokens: what `policy.prepare` would make of a context without pictures."""
    import torch
    import common
    allowed = torch.tensor(sorted(set(range(min(len(policy.tokenizer), policy.head.weight.shape[0])))
                                  - set(policy.banned.tolist()) - {policy.end}), device=policy.device)
    draw = torch.randint(len(allowed), (length,), generator=torch.Generator().manual_seed(seed))
    ids = allowed[draw.to(policy.device)]
    positions = torch.arange(length, device=policy.device).expand(3, -1)
    return common.Prompt(ids, policy.lm.embed_tokens(ids).detach(), positions,
                         torch.zeros_like(ids, dtype=torch.bool), [])


def batch_logprobs(policy, prompt, answers):
    """As common.logprobs for a text prompt, by the usual batch of G rows [prompt | answer]; equal lengths."""
    import torch
    n, ids = len(prompt.ids), torch.tensor(answers, device=policy.device)
    rows = torch.cat([prompt.ids.expand(len(answers), -1), ids], 1)
    hidden = policy.lm(input_ids=rows, use_cache=False).last_hidden_state[:, n - 1:-1]
    logits = policy.head(hidden).float().index_fill(2, policy.banned, -torch.inf)
    return list(logits.log_softmax(-1).gather(2, ids[..., None])[..., 0])


def passes(policy, prompt):
    """{side: function}: forward and backward of G answers of NEW tokens: packed, one by one, a batch of rows."""
    import torch
    import common
    policy.prepare = lambda prompts: prompts
    answers = [text_prompt(policy, NEW, 1 + i).ids.tolist() for i in range(G)]
    back = lambda logp: torch.stack([x.mean() for x in logp]).mean().backward()
    one = lambda a: (common.logprobs(policy, prompt, [a])[0].mean() / G).backward()
    return {"packed": lambda: back(common.logprobs(policy, prompt, answers)),
            "one by one": lambda: [one(a) for a in answers],
            "batch of rows": lambda: back(batch_logprobs(policy, prompt, answers))}


def tiny_policy(threads):
    import common
    return common.load_policy(common.settings(
        {"__doc__": ""}, [f"--MAX_NEW_TOKENS={NEW}", f"--CPU_THREADS={threads}"]))


def peak(side, length, threads):
    """MiB that one pass adds to its process at most, looked up every millisecond (Linux)."""
    policy = tiny_policy(threads)
    policy.train_only(policy.add("phase1", "lora"))
    work, resident, done = passes(policy, text_prompt(policy, length)), pathlib.Path("/proc/self/statm"), []
    used = lambda: int(resident.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    gc.collect()
    seen = [used()]

    def look():
        while not done:
            seen.append(used())
            time.sleep(0.001)
    thread = threading.Thread(target=look)
    thread.start()
    work[side]()
    done.append(True)
    thread.join()
    return (max(seen) - seen[0]) / 2**20


def bench_packing(policy, contexts, result, repeats, threads):
    import torch
    policy.train_only(policy.add("phase1", "lora"))
    work = passes(policy, None)
    prompt, = type(policy).prepare(policy, contexts[:1])
    sides = passes(policy, prompt)
    compare(result, "packed row, embedded world", {k: sides[k] for k in ("packed", "one by one")}, repeats, G * NEW)
    for length in LENGTHS:
        sides = passes(policy, text_prompt(policy, length))
        row = compare(result, f"packed row, prompt of {length}", {k: sides[k] for k in ("packed", "batch of rows")},
                      min(repeats, 3), G * NEW)
        mib = [float(subprocess.run([sys.executable, __file__, "--peak", side, str(length), "--threads", str(threads)],
                                    capture_output=True, text=True, check=True).stdout.split()[-1])
               for side in ("packed", "batch of rows")]
        row["peak_mib"], row["peak_share"] = [round(x, 1) for x in mib], round(mib[0] / mib[1], 2)
        print(f"{'':34}peak memory {mib[0]:.0f} MiB against {mib[1]:.0f}: {mib[0] / mib[1]:.2f}", flush=True)
    policy.drop("phase1")
    del policy.prepare, work
    gc.collect()
    torch.set_grad_enabled(True)


# ---------------------------------------------------------------- experts
def bench_experts(result, repeats, device="cpu"):
    import torch
    from types import SimpleNamespace
    import loading
    E, d, i, k = (128, 2048, 768, 8) if device == "cuda" else (64, 512, 256, 8)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    weights = {"gate_up_proj": torch.randn(E, 2 * i, d, device=device, dtype=dtype) / d**0.5,
               "down_proj": torch.randn(E, d, i, device=device, dtype=dtype) / i**0.5}
    packed = {n: loading.pack(w) for n, w in weights.items()}
    gate = lambda x: torch.nn.functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    module = SimpleNamespace(hidden_dim=d, intermediate_dim=i, _apply_gate=gate, num_experts=E,
                             scales={n: s for n, (_, s) in packed.items()}, **{n: c for n, (c, _) in packed.items()})

    def grouped(x, chosen, share, w):
        expert, order = chosen.flatten().sort(stable=True)
        ends = torch.bincount(expert, minlength=E).cumsum(0).to(torch.int32)
        mm = torch.nn.functional.grouped_mm
        out = mm(gate(mm(x[order // k], w["gate_up_proj"].mT, offs=ends)), w["down_proj"].mT, offs=ends)
        return torch.zeros_like(x).index_add_(0, order // k, out * share.flatten()[order, None])
    every = torch.arange(E, device=device)
    unpacked = lambda: {n: loading.unpack(c, s, every, weights[n].shape[1:], dtype) for n, (c, s) in packed.items()}
    ready = unpacked()
    for n in (8, 512):
        x = torch.randn(n, d, device=device, dtype=dtype)
        chosen = torch.stack([torch.randperm(E)[:k] for _ in range(n)]).to(device)
        share = torch.full((n, k), 1 / k, device=device, dtype=dtype)
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None

        def run(work):
            with torch.no_grad():
                work()
            wait()
        compare(result, f"4-bit experts, {n} tokens", {
            "hit alone": lambda: run(lambda: loading.packed_experts(module, x, chosen, share)),
            "unpacking all": lambda: run(lambda: grouped(x, chosen, share, unpacked())),
            "weights never packed": lambda: run(lambda: grouped(x, chosen, share, ready))}, repeats, n)


# ---------------------------------------------------------------- TRL
def bench_trl(policy, result, repeats, threads):
    """Seconds of a step of common.grpo and of trl.GRPOTrainer, text only; TRL's trainer tokenises text prompts,
    so both get the same number of tokens. Steps are timed inside each loop, the first left out."""
    try:
        import datasets
        import trl
    except ImportError as error:
        print(f"trl: not measured, {error}. To measure: pip install trl (1.16.0 was used), for this bench alone")
        result["trl"] = None
        return
    import torch
    import common
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText
    phase1, steps, contexts = importlib.import_module("02_phase1_train"), repeats + 1, 4
    texts = [policy.tokenizer.decode(text_prompt(policy, 500, i).ids) for i in range(contexts)]
    lengths = [len(policy.tokenizer(t)["input_ids"]) for t in texts]
    even = lambda ids: sum(i % 2 == 0 for i in ids) / len(ids)
    # ---- ours
    S = common.settings(vars(phase1), [
        f"--STEPS={steps}", f"--CONTEXTS={contexts}", f"--MINI_BATCH={contexts}", "--KL=0", f"--GROUP={G}",
        f"--MAX_NEW_TOKENS={NEW}", "--PRINT_EVERY=999", "--GATE=0"])
    policy.prepare = lambda prompts: prompts
    prompts = [text_prompt(policy, n, i) for i, n in enumerate(lengths)]
    from types import SimpleNamespace
    batch = SimpleNamespace(next=lambda step: prompts, update=lambda step, samples: None, state=None)

    def reward(contexts, samples):
        total = [[even(s.ids) for s in g] for g in samples]
        return [dict(total=t, gate=t, terms={}) for t in total]
    banned, closing = policy.banned, policy.closing
    policy.banned, policy.closing = torch.cat([banned, torch.tensor([policy.end])]), set()
    with tempfile.TemporaryDirectory() as folder:
        params = policy.add("phase1", "lora")
        common.grpo(policy, S, pathlib.Path(folder), params, batch, reward, phase1.log_row, "base")
        rows = (pathlib.Path(folder) / "log.csv").read_text().splitlines()
    at = [rows[0].split(",").index(c) for c in ("rollout_s", "update_s")]
    ours = [sum(float(r.split(",")[i]) for i in at) for r in rows[2:]]
    policy.banned, policy.closing = banned, closing
    policy.drop("phase1")
    del policy.prepare
    # ---- TRL's
    times = []
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=contexts * G, num_generations=G, max_completion_length=NEW,
            max_steps=steps, learning_rate=1e-4, beta=0.0, temperature=1.0, report_to=[], save_strategy="no",
            logging_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
            generation_kwargs=dict(suppress_tokens=[policy.end, *banned.tolist()], min_new_tokens=NEW))
        model = AutoModelForImageTextToText.from_pretrained(ROOT / "tiny" / "base", dtype=torch.float32)
        trainer = trl.GRPOTrainer(
            model=model, args=config, processing_class=policy.tokenizer, callbacks=[Clock()],
            reward_funcs=lambda completion_ids, **_: [even(ids) for ids in completion_ids],
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}), peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules=r".*language_model.*self_attn\.[qkvo]_proj"))
        trainer.train()
    theirs = [b - a for a, b in zip(times, times[1:])]
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    result["step, TRL"] = dict(ours_s=round(statistics.median(ours), 3), trl_s=round(statistics.median(theirs), 3),
                               trl=trl.__version__, prompt_tokens=lengths, over_trl=dict(
        ratio=round(statistics.median(ratios), 2), low=round(ratios[0], 2), high=round(ratios[-1], 2)))
    print(f"{'a whole step':34}{statistics.median(ratios):.2f} times TRL {trl.__version__} ({ratios[0]:.2f} to "
          f"{ratios[-1]:.2f})  {statistics.median(ours):.2f} s against {statistics.median(theirs):.2f} s")


# ---------------------------------------------------------------- the full-size model with random weights
def random_model(config, S, device):
    """The model of `config` with random weights, packed as `loading` packs what it reads, one tensor at a time."""
    import torch
    from transformers import AutoModelForImageTextToText
    import loading
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config._attn_implementation, config._experts_implementation = "sdpa", "nf4" if S.BITS == 4 else "grouped_mm"
    Config = loading.quantization()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    quantizer = None
    if S.BITS == 4:
        from transformers.quantizers.auto import AutoHfQuantizer
        quantizer = AutoHfQuantizer.from_config(Config(
            bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=bool(S.DOUBLE_QUANT),
            llm_int8_skip_modules=["lm_head"] + ["model.visual"] * (S.VISION_BITS != 4)), pre_quantized=False)
        quantizer._process_model_before_weight_loading(model, device_map=None)
    for name, p in list(model.named_parameters()):
        place, _, kind = name.rpartition(".")
        module = model.get_submodule(place)
        packed = "4bit" in type(module).__name__ and kind == "weight"
        shape = (module.out_features, module.in_features) if packed else p.shape
        value = torch.ones(shape, dtype=dtype, device=device) if "norm" in name else \
            torch.randn(shape, dtype=dtype, device=device) * 0.02
        if quantizer and quantizer.param_needs_quantization(model, name):
            value = quantizer.get_quantize_ops().convert({name: value}, full_layer_name=name, model=model)[name]
        setattr(module, kind, value if isinstance(value, torch.nn.Parameter) else torch.nn.Parameter(value, False))
    small = type(config)(text_config=config.text_config.to_dict() | {"num_hidden_layers": 1},
                         vision_config=config.vision_config.to_dict() | {"depth": 1, "deepstack_visual_indexes": [0]})
    buffers = dict(AutoModelForImageTextToText.from_config(small).named_buffers())       # rotary tables: of no layer
    for name, _ in list(model.named_buffers()):
        place, _, kind = name.rpartition(".")
        if not kind.endswith(("_scales", "absmax")):
            setattr(model.get_submodule(place), kind, buffers[name].to(device))
    for module in model.modules():               # as in loading.load_model
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def full_size(result, device="cuda", text=None, vision=None, prompt=10_000, new=256):
    """Bytes after loading, peaks and speeds of the 30B's shapes with random weights in 4 bits: a rollout of 8
    samples, a step of Phase One (a LoRA, one packed row) and of Phase Two (a vector, a pair), and the cards (GB) that
    each peak fits. Beside them the floors, from this machine's copy and matmul speeds: decoding must read, each step,
    the weights that are hit and the cache; prefill must do 2 operations per active parameter and token."""
    import torch
    from transformers import AutoTokenizer, Qwen3VLMoeConfig
    import common
    import loading
    import test_full_size as shapes
    S = common.settings({"__doc__": ""}, ["--MODEL=random", f"--MAX_NEW_TOKENS={new}"])
    S.GROUP, S.LAYER = G, (text or shapes.TEXT)["num_hidden_layers"] * 22 // 48
    config = Qwen3VLMoeConfig(text_config=text or shapes.TEXT, vision_config=vision or shapes.VISION,
                              tie_word_embeddings=False)
    gpu, wait = device == "cuda", torch.cuda.synchronize if device == "cuda" else lambda: None
    allocated = lambda f: round(f() / 2**30, 2) if gpu else None
    began, row = time.time(), {}
    model = random_model(config, S, device)
    model.model.language_model.activation_checkpointing_enable()
    policy = common.Policy(model, AutoTokenizer.from_pretrained(ROOT / "tiny" / "base"), 1, G, S)
    policy.prepare = lambda prompts: prompts
    policy.banned = torch.cat([policy.banned, torch.tensor([policy.end], device=policy.device)])
    policy.closing = set()
    row["load_s"], row["loaded_gib"] = round(time.time() - began, 1), allocated(torch.cuda.memory_allocated)

    def measured(name, work, tokens=0):
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        wait()
        began = time.perf_counter()
        work()
        wait()
        seconds = time.perf_counter() - began
        top = allocated(torch.cuda.max_memory_allocated)
        row[name] = dict(seconds=round(seconds, 3), peak_gib=top, fits_gb=[c for c in (24, 48, 80) if top and top < c],
                         tokens_per_s=round(tokens / seconds, 1) if tokens else None)
        print(f"  {name:28}{row[name]}", flush=True)
    long, short = text_prompt(policy, prompt), text_prompt(policy, 64)
    with torch.no_grad():
        common.rollout(policy, [short], G, [(0, 0)])                                     # kernels are chosen here
        policy.S.MAX_NEW_TOKENS = 1
        measured("prefill", lambda: common.rollout(policy, [long], G, [(0, 1)]), prompt)
        policy.S.MAX_NEW_TOKENS = new
        measured("rollout of 8 samples", lambda: common.rollout(policy, [long], G, [(0, 2)]), G * new)
    answers = [text_prompt(policy, new, i).ids.tolist() for i in range(G)]
    for name, kind, mine in (("Phase One step, a group", "lora", answers),
                             ("Phase Two step, a pair", "steer", answers[:2])):
        params = policy.add("phase2", kind)
        policy.train_only(params)
        optimizer = torch.optim.AdamW(params, lr=1e-5)

        def step():
            torch.stack([x.mean() for x in common.logprobs(policy, long, mine)]).mean().backward()
            optimizer.step()
        measured(name, step, prompt + sum(map(len, mine)))
        policy.drop("phase2")
    weights = sum(x.nbytes for x in [*model.parameters(), *loading.scales_of(model)])
    row["weights_gib"] = round(weights / 2**30, 2)
    # ---- floors
    n = min(4096, 64 * policy.hidden)
    a = torch.randn(n, n, device=device, dtype=model.dtype)
    speed = {}
    for what, work in (("copy", lambda: a.clone()), ("matmul", lambda: a @ a)):
        work()
        wait()
        began = time.perf_counter()
        for _ in range(20):
            work()
        wait()
        speed[what] = 20 * (2 * a.nbytes if what == "copy" else 2 * n**3) / (time.perf_counter() - began)
    c = config.text_config
    share = c.num_experts_per_tok / c.num_experts                       # of the experts that one token hits
    experts = sum(p.nbytes for name, p in model.named_parameters() if loading.is_expert(name)) * 9 / 8   # and scales
    others = sum(p.nbytes for name, p in model.named_parameters() if not loading.is_expert(name)
                 and "visual" not in name and "embed_tokens" not in name)
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * a.element_size()
    read = new * (others + experts * (1 - (1 - share)**G)) + kv * sum(prompt + G * t for t in range(new))
    heads = 2 * (c.num_attention_heads + c.num_key_value_heads)
    active = c.num_hidden_layers * c.hidden_size * c.head_dim * heads + 2 * experts / (9 / 8) * share    # two a byte
    row["floors"] = dict(copy_gb_s=round(speed["copy"] / 1e9, 1), matmul_tflops=round(speed["matmul"] / 1e12, 2),
                         rollout_s=round(read / speed["copy"], 3),
                         prefill_s=round(2 * active * prompt / speed["matmul"], 3))
    print(f"  floors: {row['floors']}")
    result["full"] = row
    print(f"  {json.dumps({k: row[k] for k in ('load_s', 'loaded_gib', 'weights_gib')})}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contexts", type=int, default=12)
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "LENGTH"), help="prints the MiB of one pass, for `packing`")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))       # before torch counts its threads
    import torch
    if options.peak:
        return print(peak(options.peak[0], int(options.peak[1]), options.threads))
    result = {"machine": machine(options.threads), "G": G, "new_tokens": NEW, "repeats": options.repeats}
    print(json.dumps(result["machine"]))
    with tempfile.TemporaryDirectory() as folder:
        if {"rollout", "packing", "trl"} & set(options.parts):
            policy = tiny_policy(options.threads)
        if {"rollout", "packing"} & set(options.parts):
            contexts = video_contexts(folder, options.contexts)
        if "rollout" in options.parts:
            bench_rollout(policy, contexts, result, options.repeats)
        if "packing" in options.parts:
            bench_packing(policy, contexts, result, options.repeats, options.threads)
        if "experts" in options.parts:
            bench_experts(result, options.repeats, "cuda" if torch.cuda.is_available() else "cpu")
        if "trl" in options.parts:
            bench_trl(policy, result, options.repeats, options.threads)
        if "full" in options.parts and torch.cuda.is_available():
            full_size(result)
        elif "full" in options.parts:
            print("full: not measured, there is no GPU")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
