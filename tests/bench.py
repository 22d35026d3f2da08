"""What a group in one row is worth, in one process at the embedded world's sizes.
Two comparisons, G = 8 samples:

(a) rollout: common.rollout (vision features kept, the prompt prefilled once per context) against
    transformers' generate(num_return_sequences=8) on the same contexts, left-padded into one batch where
    there are several. generate reads the pixels each time, as in training loops that call it. Both sample at
    temperature 1 exactly NEW tokens in each answer (no end token on either side), so that finished samples
    leave our batch is not counted.
(b) training pass: log-probs of 8 answers and their gradient in a LoRA, by common.logprobs as one packed row
    against the same function on 8 rows of one answer each; vision features are kept in both.

Run: python tests/bench.py [--json FILE]     (also --threads N, --repeats N, --contexts N of the larger batch)
Prints medians, the ratio per repeat (median, smallest, largest), machine and versions. The two
sides take turns, so that a machine that is slower for a while slows both; measure on an idle one.
About 1 minute on 2 cores.
"""
import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
G, NEW = 8, 40                    # samples a context; new tokens in each answer: about what the base writes


def machine(threads):
    import torch
    import transformers
    name = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    except OSError:
        pass                      # not Linux: what platform knows will do
    return {"cpu": name, "cores": os.cpu_count(), "threads": threads,
            "load": [round(x, 1) for x in os.getloadavg()], "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__}


def make_contexts(folder, n):
    """n contexts as training draws them: of two rendered streams, evenly from the last clip to the first, the
    caption before each clip as history. So most windows are full, and the first one is."""
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
        contexts += [common.make_context(dict(stream=str(i), clips=clips), t, memories)
                     for t in range(len(truth))]
    return sorted(contexts, key=lambda c: -c.clip)[::max(1, len(contexts) // n)][:n]


def generate(policy, contexts, prompts, pixels):
    """generate's tokens for the contexts as one left-padded batch, NEW in each of the
    G answers -> their number."""
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


def take_turns(sides, repeats):
    """{name: seconds per repeat}; one unmeasured turn first."""
    seconds = {name: [] for name in sides}
    for i in range(repeats + 1):
        for name in list(sides)[::1 if i % 2 else -1]:
            began = time.perf_counter()
            sides[name]()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(seconds, tokens):
    """Tokens/s of the new way and of the plain one, and by how much the new one is faster, per repeat."""
    new, plain = seconds.values()
    ratios = [b / a for a, b in zip(new, plain)]
    return {
        f"{name}_tokens_per_s": round(tokens / statistics.median(s), 1) for name, s in seconds.items()} | {
        "ratio": round(statistics.median(ratios), 2), "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2), "repeats": len(ratios), "tokens": tokens}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contexts", type=int, default=12)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))       # before torch counts its threads
    import numpy as np
    import torch
    import importlib
    import common
    import loading
    stage1 = importlib.import_module("01_make_streams")
    policy = common.load_policy(common.settings(
        {"__doc__": ""}, [f"--MAX_NEW_TOKENS={NEW}", f"--CPU_THREADS={options.threads}"]))
    result = {"machine": machine(options.threads), "G": G, "new_tokens": NEW, "rollout": {}}
    with tempfile.TemporaryDirectory() as folder:
        contexts = make_contexts(folder, options.contexts)
        prompts = policy.prepare(contexts)
        frames = lambda c: stage1.clip_frames(c, policy.S.FRAMES_PER_CLIP)[0]
        pixels = [[common.frames_to_patches(frames(c), policy.S.FRAME_PIXELS) for c in x.clips]
                  for x in contexts]
    lengths = sorted(len(p.ids) for p in prompts)
    print(json.dumps(result["machine"]) + f"\nprompts of {lengths[0]} to {lengths[-1]} tokens")

    # ---- (a) rollout: the end token joins the banned ones, so every answer has NEW tokens on both sides
    banned = policy.banned
    for n in sorted({1, options.contexts}):
        policy.banned = torch.cat([banned, torch.tensor([policy.end])])
        keys = [(0, i) for i in range(n)]
        shared = lambda: sum(len(s.ids) for g in common.rollout(policy, contexts[:n], G, keys) for s in g)
        plain = lambda: generate(policy, contexts[:n], prompts[:n], pixels[:n])
        assert shared() == plain() == n * G * NEW
        row = summary(take_turns({"shared": shared, "generate": plain}, options.repeats), n * G * NEW)
        policy.banned = banned
        result["rollout"][f"{n}_contexts"] = row
        print(f"rollout, {n} contexts x {G} answers x {NEW} tokens: shared prefix "
              f"{row['shared_tokens_per_s']} tokens/s, generate {row['generate_tokens_per_s']}, "
              f"ratio {row['ratio']} ({row['ratio_min']} to {row['ratio_max']})")

    # ---- (b) training pass
    rng = np.random.default_rng(0)
    allowed = sorted(set(range(len(policy.tokenizer))) - set(banned.tolist()))
    answers = [rng.choice(allowed, NEW).tolist() for _ in range(G)]
    params = policy.add("phase1", "lora")
    policy.train_only(params)

    def packed():
        torch.stack([x.mean() for x in common.logprobs(policy, contexts[0], answers)]).mean().backward()

    def separate():
        for a in answers:
            (common.logprobs(policy, contexts[0], [a])[0].mean() / G).backward()
    row = result["packing"] = summary(
        take_turns({"packed": packed, "separate": separate}, options.repeats), G * NEW)
    print(f"forward and backward, {G} answers x {NEW} tokens on one context: packed "
          f"{row['packed_tokens_per_s']} tokens/s, separate rows {row['separate_tokens_per_s']}, "
          f"ratio {row['ratio']} ({row['ratio_min']} to {row['ratio_max']})")
    if options.json:
        common.write_json(options.json, result)


if __name__ == "__main__":
    main()
