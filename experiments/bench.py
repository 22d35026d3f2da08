"""What the tricks are worth, each as a ratio of ways that take turns in one process (median, least, most).

rollout    common.rollout against transformers' generate(num_return_sequences=8) on the same video contexts,
           left-padded into one batch where there are several. Both sample exactly NEW_TOKENS in each answer (no end
           token), so the gain from finished samples that leave our batch is not counted. generate reads the pixels
           each time.
packing    log-probs of 8 answers and their gradient in a LoRA: one packed row against one row after the other (at
           the toy world's sizes), and against the usual batch of 8 rows at prompts of 256 to 8192 text tokens, there
           with the peak memory of each (in a process of its own, less what it held before).
attention  log-probs and gradient of 8 answers, together as long as their prompt of 1024 to 8192 tokens, from the
           parts of a packed row against one mask for all of it; and the attention of a decode step (8 answers, 32 query heads on 4 key
           heads of 128, 8192 cached tokens) against keys repeated in a cache that is concatenated.
judge      verdicts on the 8 memories of a context, read in one packed row, against a row for each question with its
           allowed replies; of the toy world's clips, and beside a prompt of JUDGE_LENGTH text tokens.
experts    the 4-bit experts' forward pass, of 8 tokens (decoding a group) and of 512: unpacking the experts that
           were hit, against unpacking all, against the same weights unpacked beforehand.
trl        a whole optimisation step on text prompts (8 samples of NEW_TOKENS for each of 4 prompts, one update)
           against TRL's GRPOTrainer on the same model, LoRA and token counts; where `trl` is installed.

The full-size model is measured by full_size.py.

Run: python experiments/bench.py [rollout packing attention judge experts trl] [--json=FILE] [--threads=N] [--repeats=N]
     (about 8 minutes with --threads=1 on an AMD EPYC; Linux, as peak memory is read from /proc)
In:  tiny/base
Out: FILE, if one is named; results/bench.json is such a file
"""
import argparse
import contextlib
import functools
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
from types import SimpleNamespace

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# ----------------------------------------------------------------
GROUP = 8                                      # answers to a context
NEW_TOKENS = 40                                # in each answer: about what the base writes
PROMPT_LENGTHS = (256, 1024, 2048, 4096, 8192)
MASKED_LENGTHS = (1024, 4096, 8192)            # of prompts, for attention with and without a mask
CACHED = 8192                                  # tokens that a decode step sees
JUDGE_LENGTH = 3000                            # tokens before a memory that is judged
TRL_PROMPTS = 4                                # contexts of a step ...
TRL_PROMPT_LENGTH = 500                        # ... and their tokens, before they are tokenised anew
PARTS = ("rollout", "packing", "attention", "judge", "experts", "trl")
# ----------------------------------------------------------------


# ================================================================ measuring
def machine(threads):
    """What the figures depend on beside the code."""
    import torch
    import transformers
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    load = [round(value, 1) for value in os.getloadavg()]
    return {"cpu": name_of_cpu(), "cores": os.cpu_count(), "threads": threads, "load": load, "gpu": gpu,
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__}


def name_of_cpu():
    cpuinfo = pathlib.Path("/proc/cpuinfo")                     # Linux alone has it
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def measure(result, name, ways, repeats, tokens=0):
    """Times `ways`, {name: function}, in turns, after one turn that doesn't count. The first way is ours.

    Puts into result[name], and prints: the median seconds of each way, how many times faster ours is than each of
    the others (median, least and most over the turns), and our tokens per second. Returns that row.
    """
    seconds = {way: [] for way in ways}
    for turn in range(repeats + 1):
        order = list(ways)
        if turn % 2 == 0:                                       # whoever comes second finds a warm cache
            order.reverse()
        for way in order:
            elapsed = time_of(ways[way])
            if turn:
                seconds[way].append(elapsed)
    ours, *others = ways
    row = {}
    for way in ways:
        row[f"{way}_s"] = round(statistics.median(seconds[way]), 4)
    if tokens:
        row["tokens_per_s"] = round(tokens / statistics.median(seconds[ours]), 1)
    for other in others:
        row[f"over_{other}"] = times_faster(seconds[ours], seconds[other])
    result[name] = row
    say(name, row, others)
    return row


def time_of(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def times_faster(ours, theirs):
    """Median, least and most of theirs / ours, turn by turn."""
    ratios = [their_seconds / seconds for seconds, their_seconds in zip(ours, theirs)]
    return {"ratio": round(statistics.median(ratios), 2),
            "low": round(min(ratios), 2),
            "high": round(max(ratios), 2)}


def say(name, row, others):
    line = f"{name:34}"
    for other in others:
        gain = row[f"over_{other}"]
        line += f"{gain['ratio']:.2f} times {other} ({gain['low']:.2f} to {gain['high']:.2f})  "
    if "tokens_per_s" in row:
        line += f"{row['tokens_per_s']:.0f} tokens/s"
    print(line, flush=True)


# ================================================================ the toy world's policy, made comparable
def tiny_policy(threads):
    import common
    arguments = [f"--MAX_NEW_TOKENS={NEW_TOKENS}", f"--CPU_THREADS={threads}"]
    return common.load_policy(common.settings({"__doc__": ""}, arguments))


@contextlib.contextmanager
def answers_of_full_length(policy):
    """Neither the end token nor the end of the JSON object ends an answer."""
    import torch
    banned = policy.banned
    closing = policy.closing
    policy.banned = torch.cat([banned, torch.tensor([policy.end])])
    policy.closing = set()
    try:
        yield
    finally:
        policy.banned = banned
        policy.closing = closing


@contextlib.contextmanager
def encoded_prompts(policy):
    """Contexts are prompts that have been encoded already (see `text_prompt`)."""
    policy.prepare = list                                       # hides the method
    policy.prompt_length = tokens_of
    try:
        yield
    finally:
        del policy.prepare
        del policy.prompt_length


def tokens_of(prompt):
    return len(prompt.ids)


@contextlib.contextmanager
def new_lora(policy):
    """Yields the parameters of a LoRA that is taken off again."""
    import torch
    params = policy.add("phase1", "lora")
    policy.train_only(params)
    try:
        yield params
    finally:
        policy.drop("phase1")
        gc.collect()
        torch.set_grad_enabled(True)


def text_prompt(policy, length, seed=0):
    """The EncodedPrompt of `length` random text tokens, without pictures."""
    import torch
    from common import encoded_text
    vocabulary = min(len(policy.tokenizer), policy.head.weight.shape[0])
    unwanted = {*policy.banned.tolist(), policy.end}
    allowed = torch.tensor([token for token in range(vocabulary) if token not in unwanted])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(allowed), (length,), generator=generator)
    prompt = encoded_text(allowed[drawn].tolist(), policy.device)
    prompt.clips = []                                           # of the context, in whose place it stands
    return prompt


# ================================================================ rollout
def video_contexts(folder, n):
    """n contexts as training draws them, from two rendered streams with captions as history.

    Evenly from the last clip to the first: most windows are full, and the first clip's is short.
    """
    contexts = []
    for number in range(2):
        contexts += contexts_of_stream(folder, number)
    contexts.sort(key=lambda context: -context.clip)
    distance = max(1, len(contexts) // n)
    return contexts[::distance][:n]


def contexts_of_stream(folder, number):
    import numpy as np
    from common import make_context
    from tiny import world
    truth = world.make_stream(world.stream_seed(0, "test", number))
    file = pathlib.Path(folder) / f"{number}.mp4"
    world.write_video(file, np.concatenate([world.draw_frames(clip) for clip in truth]))
    clips = []
    memories = []
    for t, clip in enumerate(truth):
        start = 10.0 * t
        clips.append({"clip": t, "start": start, "end": start + 10, "file": str(file),
                      "offset": start, "speech": []})
        three_facts = world.clip_facts(clip)[t % 3:][:3]
        memories.append(world.sentence(world.connector(t), three_facts))
    stream = {"stream": str(number), "clips": clips}
    return [make_context(stream, t, memories) for t in range(len(truth))]


def pixels_of(policy, context):
    """[(patches, grid)] of a context's clips: what generate reads."""
    from support.overlay import clip_frames
    from support.video import frames_to_patches
    pixels = []
    for clip in context.clips:
        frames, _ = clip_frames(clip, policy.S.FRAMES_PER_CLIP)
        pixels.append(frames_to_patches(frames, policy.S.FRAME_PIXELS))
    return pixels


def generate(policy, prompts, pixels):
    """Samples GROUP answers to each prompt by the library, the prompts as one left-padded batch -> new tokens."""
    import torch
    pad_left = functools.partial(
        torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    clips = []
    for clips_of_context in pixels:
        clips += clips_of_context
    ids = pad_left([prompt.ids for prompt in prompts], padding_value=policy.end)                    # (B, P)
    mask = pad_left([torch.ones_like(prompt.ids) for prompt in prompts])
    token_types = pad_left([prompt.visual.int() * 2 for prompt in prompts])           # 2: video
    unwanted = [policy.end, *policy.banned.tolist()]
    out = policy.model.generate(
        input_ids=ids, attention_mask=mask, mm_token_type_ids=token_types,
        pixel_values_videos=torch.cat([patches for patches, _ in clips]),
        video_grid_thw=torch.tensor([grid for _, grid in clips]),
        num_return_sequences=GROUP, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, suppress_tokens=unwanted,
        pad_token_id=policy.end)
    return out[:, ids.shape[1]:].numel()


def bench_rollout(policy, contexts, result, repeats):
    prompts = policy.prepare(contexts)
    pixels = [pixels_of(policy, context) for context in contexts]
    with answers_of_full_length(policy):
        for n in (1, len(contexts)):
            compare_rollouts(policy, contexts[:n], prompts[:n], pixels[:n], result, repeats)


def compare_rollouts(policy, contexts, prompts, pixels, result, repeats):
    from common import rollout
    n = len(contexts)
    tokens = n * GROUP * NEW_TOKENS
    keys = [(0, i) for i in range(n)]

    def ours():
        new_tokens = 0
        for samples in rollout(policy, contexts, GROUP, keys):
            new_tokens += sum(len(sample.ids) for sample in samples)
        return new_tokens

    def theirs():
        return generate(policy, prompts, pixels)
    assert ours() == theirs() == tokens
    measure(result, f"rollout, {n} contexts", {"ours": ours, "generate": theirs}, repeats, tokens)


# ================================================================ packing
def ways_to_train(policy, prompt, length=NEW_TOKENS):
    """{way: function}: forward and backward of GROUP answers, packed, one by one, and as a batch of rows.

    length: tokens of an answer.
    """
    import torch
    from common import logprobs
    answers = [text_prompt(policy, length, 1 + i).ids.tolist() for i in range(GROUP)]

    def learn(logp):                                            # (T_i,) per answer
        torch.stack([values.mean() for values in logp]).mean().backward()

    def packed():
        learn(logprobs(policy, prompt, answers))

    def one_by_one():
        for answer in answers:
            (logprobs(policy, prompt, [answer])[0].mean() / GROUP).backward()

    def batch_of_rows():
        learn(batch_logprobs(policy, prompt, answers))
    return {"packed": packed, "one by one": one_by_one, "batch of rows": batch_of_rows}


def batch_logprobs(policy, prompt, answers):
    """As common.logprobs, for a text prompt, by the usual batch of rows [prompt | answer] of equal lengths."""
    import torch
    P = len(prompt.ids)
    ids = torch.tensor(answers, device=policy.device)                                 # (G, T)
    rows = torch.cat([prompt.ids.expand(len(answers), -1), ids], 1)                   # (G, P + T)
    hidden = policy.lm(input_ids=rows, use_cache=False).last_hidden_state
    logits = policy.head(hidden[:, P - 1:-1]).float()                                 # (G, T, V)
    logits = logits.index_fill(2, policy.banned, -torch.inf)
    logp = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]                   # (G, T)
    return list(logp)


def bench_packing(policy, contexts, result, repeats, threads):
    [video_prompt] = policy.prepare(contexts[:1])
    with new_lora(policy), encoded_prompts(policy):
        ways = ways_to_train(policy, video_prompt)
        del ways["batch of rows"]                               # it takes text alone
        measure(result, "packed row, toy world", ways, repeats, GROUP * NEW_TOKENS)
        for length in PROMPT_LENGTHS:
            ways = ways_to_train(policy, text_prompt(policy, length))
            del ways["one by one"]
            name = f"packed row, prompt of {length}"
            row = measure(result, name, ways, min(repeats, 3), GROUP * NEW_TOKENS)
            compare_peaks(row, ways, length, threads)


def compare_peaks(row, ways, length, threads):
    """Adds the peak memory of each way, measured in a process of its own."""
    peaks = []
    for way in ways:
        command = [sys.executable, __file__, "--peak", way, str(length), f"--threads={threads}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.split()[-1]))
    ours, theirs = peaks
    row["peak_mib"] = [round(ours, 1), round(theirs, 1)]
    row["peak_share"] = round(ours / theirs, 2)
    print(f"{'':34}peak memory {ours:.0f} MiB against {theirs:.0f}: {ours / theirs:.2f}", flush=True)


def peak(way, length, threads):
    """MiB that one pass adds to this process at most, looked up every millisecond."""
    policy = tiny_policy(threads)
    seen = []
    done = threading.Event()

    def look():
        while not done.is_set():
            seen.append(resident_bytes())
            time.sleep(0.001)
    with new_lora(policy), encoded_prompts(policy):
        work = ways_to_train(policy, text_prompt(policy, length))[way]
        gc.collect()
        before = resident_bytes()
        thread = threading.Thread(target=look)
        thread.start()
        work()
        done.set()
        thread.join()
    return (max(seen) - before) / 2**20


def resident_bytes():
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


# ================================================================ attention
def bench_attention(policy, result, repeats):
    with new_lora(policy), encoded_prompts(policy):
        for length in MASKED_LENGTHS:
            # The proportions of the full-size model: 8 answers of 1350 tokens beside a prompt of 11,000.
            answer = length // 8
            packed = ways_to_train(policy, text_prompt(policy, length), answer)["packed"]
            ways = {"parts": packed, "one mask": functools.partial(with_one_mask, policy, packed)}
            turns = min(repeats, 8192 // length)                # the longest takes a minute a turn
            measure(result, f"attention, prompt of {length}", ways, turns, GROUP * answer)
    measure(result, f"attention of a decode step, {CACHED} cached", ways_to_decode(), repeats)


def with_one_mask(policy, work):
    """Runs `work` with a mask (T, T) and the library's own attention in place of the parts of a packed row."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from support.attention import NAME
    masks = {}                                                  # one for all layers of the pass

    def masked(module, q, k, v, mask, segments=None, cache=None, **usual):
        if not masks:
            masks[0] = mask_of(segments, q.dtype)
        return sdpa_attention_forward(module, q, k, v, masks[0], **usual)
    AttentionInterface.register("one mask", masked)
    policy.lm.config._attn_implementation = "one mask"
    try:
        work()
    finally:
        policy.lm.config._attn_implementation = NAME


def mask_of(segments, dtype):
    """What a row's tokens see, as numbers to add to the scores: (1, 1, T, T)."""
    import torch
    from support.attention import visible
    [group] = segments
    lengths = [part.stop - part.start for part in (group.prompt, *group.answers)]
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]   # (1, T)
    return torch.where(visible(owner, owner).tril(), torch.zeros((), dtype=dtype), -torch.inf)


def ways_to_decode():
    """{way: function}: the attention of a layer for the next token of GROUP answers beside one prompt."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from support.attention import attention_by_rows, mask_of_rows, visible
    from support.decode import Cache
    heads, key_heads, d = 32, 4, 128
    config = SimpleNamespace(num_key_value_heads=key_heads, head_dim=d, num_hidden_layers=1)
    lm = SimpleNamespace(config=config, embed_tokens=SimpleNamespace(weight=torch.zeros(1)))
    module = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    cache = Cache(lm, [CACHED], GROUP)
    for room in cache.layers[0]:
        room.normal_()
    before = [room[:, :, :CACHED].clone() for room in cache.layers[0]]
    q = torch.randn(1, GROUP, heads, d).transpose(1, 2)                               # (1, H, W, D)
    k, v = torch.randn(2, 1, key_heads, GROUP, d)                                     # (1, h, W, D)
    owner_q = torch.arange(1, GROUP + 1)[None]                                        # (1, W)
    owner_k = torch.cat([torch.zeros(1, CACHED, dtype=torch.long), owner_q], 1)       # (1, T)

    def rows():
        keys, values = cache.append(0, k, v)
        mask = mask_of_rows(owner_q, owner_k, heads // key_heads, q.dtype)
        return attention_by_rows(q, keys, values, mask, d ** -0.5).transpose(1, 2)

    def repeated():
        keys, values = (torch.cat([old, new], 2) for old, new in zip(before, (k, v)))
        mask = visible(owner_q, owner_k)
        return sdpa_attention_forward(module, q, keys, values, mask, scaling=d ** -0.5)[0]
    assert torch.equal(rows(), repeated())
    return {"rows": rows, "repeated": repeated}


# ================================================================ the judge
def bench_judge(policy, contexts, result, repeats):
    from common import stage
    from support.judges import Question
    phase1 = stage("02_phase1_train")
    memories = []
    for seed in range(GROUP):
        ids = text_prompt(policy, NEW_TOKENS, 1 + seed).ids
        memories.append(policy.tokenizer.decode(ids))
    of_clip = [Question(phase1.FAITHFUL, {"context": contexts[0], "memory": memory})
               for memory in memories]
    # Random tokens are not those into which their text is cut, so there are more of these.
    text = policy.tokenizer.decode(text_prompt(policy, JUDGE_LENGTH).ids)
    long = policy.tokenizer.decode(policy.tokenizer(text)["input_ids"][:JUDGE_LENGTH])
    of_text = [Question(phase1.CLEAN, {"previous": long, "memory": memory}) for memory in memories]
    compare_verdicts(policy, "judge, toy world", of_clip, result, repeats)
    compare_verdicts(policy, f"judge, prompt of {JUDGE_LENGTH}", of_text, result, repeats)


def compare_verdicts(policy, name, questions, result, repeats):
    import torch
    from common import logprobs
    from support.local_judge import scores

    def packed():
        with torch.no_grad():
            scores(policy, questions)

    def one_by_one():
        with torch.no_grad():
            for question in questions:
                ids = policy.tokenizer(question.replies(), add_special_tokens=False)["input_ids"]
                logprobs(policy, question, ids)
    row = measure(result, name, {"packed": packed, "one by one": one_by_one}, repeats)
    row["verdicts_per_s"] = round(len(questions) / row["packed_s"], 1)
    print(f"{'':34}{row['verdicts_per_s']} verdicts/s, questions of "
          f"{policy.prompt_length(questions[0])} tokens", flush=True)


# ================================================================ experts
class Experts:
    """A layer of E experts, packed: what `packed_experts` calls its module; and the same weights unpacked."""
    num_experts = 64
    experts_per_token = 8
    hidden_dim = 512
    intermediate_dim = 256

    def __init__(self):
        import torch
        from support.weights import pack
        torch.manual_seed(0)
        E = self.num_experts
        d = self.hidden_dim
        width = self.intermediate_dim
        gate_up = torch.randn(E, 2 * width, d) / d**0.5
        down = torch.randn(E, d, width) / width**0.5
        self.gate_up_proj, gate_up_scales = pack(gate_up)
        self.down_proj, down_scales = pack(down)
        self.scales = {"gate_up_proj": gate_up_scales, "down_proj": down_scales}
        self.shapes = {"gate_up_proj": gate_up.shape[1:], "down_proj": down.shape[1:]}

    def _apply_gate(self, rows):
        import torch
        gate, up = rows.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    def unpacked(self):
        """{name: weight (E, out, in)} of all experts."""
        import torch
        from support.weights import unpack
        every = torch.arange(self.num_experts)
        weights = {}
        for name, shape in self.shapes.items():
            codes = getattr(self, name)
            weights[name] = unpack(codes, self.scales[name], every, shape, torch.float32)
        return weights

    def plain(self, x, chosen, share, weights):
        """The forward pass (N, d) by the library's arithmetic on unpacked weights."""
        import torch
        grouped_mm = torch.nn.functional.grouped_mm
        expert, order = chosen.flatten().sort(stable=True)
        counts = torch.bincount(expert, minlength=self.num_experts)
        ends = counts.cumsum(0).to(torch.int32)
        token = order // self.experts_per_token
        rows = grouped_mm(x[token], weights["gate_up_proj"].mT, offs=ends)            # (N k, 2 width)
        rows = grouped_mm(self._apply_gate(rows), weights["down_proj"].mT, offs=ends)  # (N k, d)
        rows = rows * share.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, token, rows)


def bench_experts(result, repeats):
    import torch
    experts = Experts()
    ready = experts.unpacked()
    for n in (8, 512):
        x = torch.randn(n, experts.hidden_dim)
        k = experts.experts_per_token
        drawn = [torch.randperm(experts.num_experts)[:k] for _ in range(n)]
        chosen = torch.stack(drawn)                                                   # (N, k)
        share = torch.full((n, k), 1 / k)
        measure(result, f"4-bit experts, {n} tokens",
                ways_through_experts(experts, x, chosen, share, ready), repeats, n)


def ways_through_experts(experts, x, chosen, share, ready):
    import torch
    from support.weights import packed_experts

    @torch.no_grad()
    def hit_alone():
        packed_experts(experts, x, chosen, share)

    @torch.no_grad()
    def unpacking_all():
        experts.plain(x, chosen, share, experts.unpacked())

    @torch.no_grad()
    def never_packed():
        experts.plain(x, chosen, share, ready)
    return {"hit alone": hit_alone, "unpacking all": unpacking_all,
            "weights never packed": never_packed}


# ================================================================ TRL
def bench_trl(policy, result, repeats):
    """Seconds of a step of common.grpo and of trl.GRPOTrainer, on text. Each loop's first step doesn't count.

    TRL's trainer tokenises text prompts, so ours get random prompts of the same lengths.
    """
    try:
        import datasets  # noqa: F401
        import trl
    except ImportError as error:
        print(f"trl: not measured, {error}. To measure, for this bench alone: "
              "pip install trl (1.16.0 was used)")
        result["step, TRL"] = None
        return
    steps = repeats + 1
    texts = []
    for number in range(TRL_PROMPTS):
        prompt = text_prompt(policy, TRL_PROMPT_LENGTH, number)
        texts.append(policy.tokenizer.decode(prompt.ids))
    lengths = [len(policy.tokenizer(text)["input_ids"]) for text in texts]
    ours = our_steps(policy, lengths, steps)
    theirs = steps_of_trl(policy, texts, steps)
    row = {"ours_s": round(statistics.median(ours), 3),
           "trl_s": round(statistics.median(theirs), 3),
           "trl": trl.__version__,
           "prompt_tokens": lengths,
           "over_trl": times_faster(ours, theirs)}
    result["step, TRL"] = row
    say("a whole step", row, ["trl"])


def share_of_even(ids):
    """A reward that costs nothing."""
    return sum(token % 2 == 0 for token in ids) / len(ids)


def our_steps(policy, lengths, steps):
    """Seconds of the steps of common.grpo, as its log.csv tells them."""
    import common
    from support.checkpoint import Training
    phase1 = common.stage("02_phase1_train")
    S = common.settings(vars(phase1), [
        f"--STEPS={steps}", f"--MINI_BATCH={TRL_PROMPTS}", f"--GROUP={GROUP}",
        f"--MAX_NEW_TOKENS={NEW_TOKENS}", "--KL=0", "--GATE=0", "--PRINT_EVERY=999"])
    prompts = [text_prompt(policy, length, number) for number, length in enumerate(lengths)]
    batch = SimpleNamespace(next=lambda step: prompts, advance=lambda step, groups: None, state=None)

    def rewards(groups):
        for group in groups:
            for sample in group.samples:
                sample.reward = share_of_even(sample.ids)
                sample.gate_value = sample.reward
    with tempfile.TemporaryDirectory() as folder, answers_of_full_length(policy), \
            encoded_prompts(policy), new_lora(policy) as params:
        run = Training(pathlib.Path(folder), params, batch=batch, steps=steps, lr=S.LR,
                       save_every=S.SAVE_EVERY, grad_clip=S.GRAD_CLIP)
        common.grpo(policy, run, batch, rewards, phase1.log_row, reference="base",
                    **phase1.loop_constants(S))
    return [float(row["rollout_s"]) + float(row["update_s"]) for row in run.rows[1:]]


def steps_of_trl(policy, texts, steps):
    """Seconds between the ends of the trainer's steps."""
    import datasets
    import torch
    import trl
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, TrainerCallback
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    def reward(completion_ids, **_):
        return [share_of_even(ids) for ids in completion_ids]
    unwanted = [policy.end, *policy.banned.tolist()]
    lora = LoraConfig(r=16, lora_alpha=32,
                      target_modules=r".*language_model.*self_attn\.[qkvo]_proj")
    model = AutoModelForImageTextToText.from_pretrained(ROOT / "tiny" / "base", dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, max_steps=steps, learning_rate=1e-4, beta=0.0, temperature=1.0,
            per_device_train_batch_size=len(texts) * GROUP, num_generations=GROUP,
            max_completion_length=NEW_TOKENS, use_cpu=True, bf16=False, gradient_checkpointing=False,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            generation_kwargs={"suppress_tokens": unwanted, "min_new_tokens": NEW_TOKENS})
        trainer = trl.GRPOTrainer(
            model=model, args=config, processing_class=policy.tokenizer, callbacks=[Clock()],
            reward_funcs=reward, peft_config=lora,
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}))
        trainer.train()
    return [end - before for before, end in zip(ends, ends[1:])]


# ================================================================ the table
# What stands in the table of results/README.md: (label, measurement, the way that ours is compared with).
ROLLOUT_ROWS = [
    ("rollout of 12 contexts x 8 samples, against `generate(num_return_sequences=8)`",
     "rollout, 12 contexts", "generate"),
    ("the same with one context", "rollout, 1 contexts", "generate"),
    ("packed row, against one answer after the other (the toy world's sizes)",
     "packed row, toy world", "one by one")]
EXPERTS_ROWS = [
    ("4-bit experts that were hit, 8 tokens, against unpacking all",
     "4-bit experts, 8 tokens", "unpacking all"),
    ("the same, against weights never packed", "4-bit experts, 8 tokens", "weights never packed"),
    ("4-bit experts that were hit, 512 tokens, against unpacking all",
     "4-bit experts, 512 tokens", "unpacking all"),
    ("the same, against weights never packed", "4-bit experts, 512 tokens", "weights never packed"),
    ("a whole optimisation step on text, against TRL's GRPOTrainer", "step, TRL", "trl")]


def page(result):
    """The machine and the table of results/README.md, from the JSON file: a test compares them."""
    where = result["machine"]
    lines = [
        f"Measured on an {where['cpu']} with {where['cores']} cores, of which {where['threads']} was used, "
        f"under a load of {where['load'][0]} at the start; Python {where['python']}, "
        f"torch {where['torch']}, transformers {where['transformers']}, TRL {result['step, TRL']['trl']}."]
    if "later" in result:
        # Parts that were run by themselves, with another --json, and copied into the file.
        later = result["later"]
        lines[0] += (f" The rows on masks, a decode step and verdicts were measured later, on a machine with "
                     f"{later['cores']} cores, under a load of {later['load'][0]}.")
    lines += ["", "| | times faster | peak memory |", "|---|---|---|"]
    rows = list(ROLLOUT_ROWS)
    for length in PROMPT_LENGTHS:
        label = f"packed row, prompt of {length} tokens, against a batch of 8 rows"
        rows.append((label, f"packed row, prompt of {length}", "batch of rows"))
    for length in MASKED_LENGTHS:
        rows.append((f"the same without a mask, prompt of {length} tokens, against one with a mask",
                     f"attention, prompt of {length}", "one mask"))
    rows.append((f"attention of a decode step, {CACHED} cached tokens, against repeated keys",
                 f"attention of a decode step, {CACHED} cached", "repeated"))
    rows.append(("verdicts on 8 memories of a clip, against a row for each question",
                 "judge, toy world", "one by one"))
    rows.append((f"the same beside {JUDGE_LENGTH} tokens of text", f"judge, prompt of {JUDGE_LENGTH}",
                 "one by one"))
    for label, name, other in rows + EXPERTS_ROWS:
        if name not in result:                                  # an older file
            continue
        row = result[name]
        gain = row[f"over_{other}"]
        times = f"{gain['ratio']:.1f} ({gain['low']:.1f} to {gain['high']:.1f})"
        memory = f"{row['peak_share']:.2f} of it" if "peak_share" in row else ""
        lines.append(f"| {label} | {times} | {memory} |")
    return "\n".join(lines)


# ================================================================ the whole
def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contexts", type=int, default=12)
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "LENGTH"),
                        help="prints the MiB of one pass: for `packing`")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return options


def main():
    options = parse_arguments()
    # torch counts its threads when it is imported, so nothing above imports it.
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    if options.peak:
        way, length = options.peak
        print(peak(way, int(length), options.threads))
        return
    repeats = options.repeats
    result = {"machine": machine(options.threads), "G": GROUP, "new_tokens": NEW_TOKENS,
              "repeats": repeats}
    print(json.dumps(result["machine"]))
    policy = tiny_policy(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        contexts = video_contexts(folder, options.contexts)
        policy.prepare(contexts)                                # sees the clips once
        if "rollout" in options.parts:
            bench_rollout(policy, contexts, result, repeats)
        if "packing" in options.parts:
            bench_packing(policy, contexts, result, repeats, options.threads)
        if "attention" in options.parts:
            bench_attention(policy, result, repeats)
        if "judge" in options.parts:
            bench_judge(policy, contexts, result, repeats)
        if "experts" in options.parts:
            bench_experts(result, repeats)
        if "trl" in options.parts:
            bench_trl(policy, result, repeats)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    if set(options.parts) == set(PARTS) and result["step, TRL"]:
        print(page(result))


if __name__ == "__main__":
    main()
