"""Make the tiny base model of the embedded world: a mediocre memory writer of the real Qwen3-VL-MoE class.

Four steps: (1) a small byte-level BPE tokenizer; (2) the vision tower, on throw-away probes of what each cell
shows; (3) the language model on cached vision features: listing all facts of single clips, then stating them
one by one, then writing truthful memories from windows; (4) the noisy mix that makes the writer mediocre. Its
wrong values are spread, so the right one stays the likeliest: reinforcement learning can repair it.

A finished step is kept in runs/base/ and read back, with its log, by a run with the same constants.

Run:  python tiny/make_base.py > tiny/make_base.log      (28 minutes on 2 threads, 6 GB)
In:   nothing; the streams of the split "base", which no stage uses
Out:  tiny/base/ (config, weights in bf16, tokenizer)
"""
import concurrent.futures
import contextlib
import importlib
import pathlib
import random
import sys
import tempfile
import time
import zlib

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common
import loading
import video
from tiny import world

stage2 = importlib.import_module("02_phase1_train")

# ----------------------------------------------------------------------------------------------------------
SEED = 0
THREADS = 2
STREAMS = 1600            # rendered, encoded, decoded: 12 clips each
HELD_OUT = 20             # more streams, for the figures at the end
VOCAB = 800               # with the special tokens
VISION_STEPS = 800        # of 96 frame pairs
LIST_STEPS = 900          # of 16 clips x 4 lists of all their facts
SINGLE_STEPS = 420        # of 16 clips x 8 answers of one fact each
PEOPLE_STEPS = 300        # of 24 clips x 4 answers of one fact about a person; twice: the rate warms again
WINDOW_STEPS = 480        # windows (8 x 6 answers: memories, lists, single facts) and, each third, people
NOISY_STEPS = 400         # of 8 windows x 6 answers: the mix
ANSWERS = 6               # answers per window, packed behind one prompt
WRONG = 0.20              # share of facts with a wrong value
WRONG_CONNECTOR = 0.05
CAREFUL = 0.80            # share of memories that leave out what the preceding one states
BROKEN = 0.05             # share of responses that break the format
LONG_PLAN = 0.06          # share of responses that think too long
FACTS = {1: 0.05, 2: 0.12, 3: 0.77, 4: 0.05, 5: 0.01}    # facts per memory
ASKED = 6.0               # how much likelier a fact of the asked category is, when the prompt holds questions
# ----------------------------------------------------------------------------------------------------------

HERE = pathlib.Path(__file__).resolve().parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
            "{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}")
GRID = (2, 6, 6)          # of a clip: 4 frames in pairs, patches of 16 px
TOKENS = 9                # vision tokens per frame pair


# ---- tokenizer -------------------------------------------------------------------------------------------

def make_tokenizer():
    """Byte-level BPE in which a face ID, a time and a word of the world is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    pieces = r" ?<face_\d>|\d\d:\d\d:\d\d|\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+"
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pieces), "isolated"), to_bytes])
    bpe.decoder = decoders.ByteLevel()
    rng, texts = random.Random(SEED), []
    for i in range(300):
        truth = world.make_stream(world.stream_seed(SEED, "base", i))
        texts += [task["question"] for task in world.make_tasks("s", truth, rng)]
        before = [None, "now, a red cup."]
        texts += [respond(truth, t, before[t % 2], [], rng, honest=True) for t in range(len(truth))]
        texts += [stage2.PROMPT + stage2.ASK_TO_THINK + stage2.TASK_PROMPT + " (nothing) plan: "
                  + ", ".join(world.CATEGORIES)]
        texts += [" '" + word + " " + word for word in world.FIRST + world.SECOND + world.CATEGORIES]
        texts += [f"\n{world.clock(t)}-{world.clock(t + 10)} <2.5 seconds>" for t in range(0, 120, 10)]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 2, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=TEMPLATE)


# ---- the writer that the base imitates -------------------------------------------------------------------

def wrong(fact, rng):
    """The fact with a wrong value: another one at random, for two-part values often only one part."""
    values = {"place": world.PLACES, "wear": world.COLOURS, "action": world.ACTIONS, "count": world.NUMBERS}
    if fact.category in values:
        return fact._replace(value=rng.choice([v for v in values[fact.category] if v != fact.value]))
    a, b = fact.value.split()
    thing = fact.category == "object"
    firsts, seconds = (world.COLOURS, world.OBJECTS) if thing else (world.FIRST, world.SECOND)
    c, d = rng.choice([v for v in firsts if v != a]), rng.choice([v for v in seconds if v != b])
    return fact._replace(value=rng.choice([f"{c} {b}", f"{a} {d}"]))


def choose(pool, count, asked, rng):
    """`count` facts of the pool in random order, all categories equally likely, the asked one likelier."""
    pool, chosen = list(pool), []
    size = {c: sum(f.category == c for f in pool) for c in world.CATEGORIES}
    while pool and len(chosen) < count:
        weights = [ASKED if f.category == asked else 1 / size[f.category] for f in pool]
        chosen.append(pool.pop(rng.choices(range(len(pool)), weights)[0]))
    return chosen


def answer(connector, chosen):
    """A well-formed response that states these facts."""
    plan = ", ".join(fact.category for fact in chosen)
    return f'plan: {plan}\n</think>\n\n{{"description": "{world.sentence(connector, chosen)}"}}'


def respond(truth, t, previous, questions, rng, honest=False, everything=False):
    """A response for clip t without its end token. honest: no noise; everything: lists all facts.

    previous: the memory before, "" or None if there is none. The thinking part names what categories follow.
    """
    asked = world.QUESTIONS[world.read_question(questions[0])[0]][0] if questions else None
    noisy = lambda share: not honest and rng.random() < share
    pool, stated = world.clip_facts(truth[t]), set(world.facts(previous or ""))
    connector = world.connector(previous)
    if noisy(WRONG_CONNECTOR):
        connector = {"now": "still", "still": "now"}[connector]
    count = 8 if everything else 3 if honest else rng.choices(list(FACTS), FACTS.values())[0]
    if not everything and not noisy(1 - CAREFUL):
        pool = [fact for fact in pool if fact not in stated]
    chosen = choose(pool, count, asked, rng)
    plan = [fact.category for fact in chosen]
    if noisy(LONG_PLAN):
        plan = [rng.choice(world.CATEGORIES) for _ in range(rng.randint(6, 11))] + plan
    memory = world.sentence(connector, [wrong(fact, rng) if noisy(WRONG) else fact for fact in chosen])
    head, tail = "plan: " + ", ".join(plan) + "\n</think>\n\n", f'{{"description": "{memory}"}}'
    if noisy(BROKEN):
        return rng.choice([head + tail[:-1], head + tail[:-2] + "}", head + memory, head[:-10] + tail,
                           head + tail.replace('"description"', '"memory"'), head + tail + "}"])
    return head + tail


# ---- clips -----------------------------------------------------------------------------------------------

def decoded_stream(index):
    """One stream of the split "base", truly encoded and decoded: (truth, uint8 (clips, 4, 96, 96, 3))."""
    import decord
    truth = world.make_stream(world.stream_seed(SEED, "base", index))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{index}.mp4"
        world.write_video(path, np.concatenate([world.draw_frames(clip) for clip in truth]))
        length = world.CLIP_SECONDS
        times = [video.frame_times({"start": 0, "end": length, "offset": c * length}, 4)
                 for c in range(len(truth))]
        at = [int(t * world.FPS) for clip in times for t in clip]
        frames = decord.VideoReader(path, num_threads=1).get_batch(at).asnumpy()
    return truth, frames.reshape(len(truth), 4, world.SIDE, world.SIDE, 3)


def decoded_streams(first, count):
    """truths: list of streams; frames: uint8 (count * 12, 4, 96, 96, 3)."""
    with concurrent.futures.ProcessPoolExecutor(THREADS) as pool:
        truths, frames = zip(*pool.map(decoded_stream, range(first, first + count), chunksize=20))
    return list(truths), torch.from_numpy(np.concatenate(frames))


# ---- the vision tower ------------------------------------------------------------------------------------

PROBES = {"place": world.PLACES, "who": "123456789", "wear": list(world.COLOURS), "action": world.ACTIONS,
          "colour": list(world.COLOURS), "shape": world.OBJECTS, "count": world.NUMBERS, "first": world.FIRST,
          "second": world.SECOND, "speaker": "123456789",
          "what": ["place", "object", "count", "person", "empty", "words"]}


def probe_labels(clip):
    """(9, probes) indices, -100 where a cell lacks the thing. Cells row by row, as the merged tokens are."""
    rows = [{"what": what} for what in clip["cells"]]
    rows += [{"what": "person" if who else "empty", **({"who": who, **clip["people"][who]} if who else {})}
             for who in clip["seats"]]
    first, second = clip["speech"][1].split()
    rows += [{"what": "words", "speaker": clip["speech"][0]}, {"what": "words", "first": first},
             {"what": "words", "second": second}]
    colour, shape = clip["object"].split()
    seen = {"place": {"place": clip["place"]}, "object": {"colour": colour, "shape": shape},
            "count": {"count": clip["count"]}}
    for row in rows:
        row.update(seen.get(row["what"], {}))
    return [[list(values).index(row[name]) if name in row else -100 for name, values in PROBES.items()]
            for row in rows]


def train_vision(visual, truths, frames):
    """Trains the tower until linear probes read every attribute off its cell, in both feature streams."""
    labels = torch.tensor([probe_labels(clip) for truth in truths for clip in truth])     # (clips, 9, probes)
    width, sizes = visual.config.out_hidden_size, [len(v) for v in PROBES.values()]
    heads = torch.nn.ModuleList([torch.nn.Linear(width, sum(sizes)) for _ in range(2)])
    params = [*visual.parameters(), *heads.parameters()]
    optimizer, rate = torch.optim.AdamW(params, 2e-3, weight_decay=0.01), schedule(2e-3, VISION_STEPS)
    rng, began = torch.Generator().manual_seed(SEED), time.time()
    for step in range(VISION_STEPS):
        pick, pair = torch.randint(len(labels), (96,), generator=rng), torch.randint(2, (96,), generator=rng)
        pictures = torch.stack([frames[i, 2 * p:2 * p + 2] for i, p in zip(pick, pair)])  # (96, 2, 96, 96, 3)
        patches, _ = common.frames_to_patches(pictures.flatten(0, 1), world.SIDE ** 2)
        out = visual(patches, grid_thw=torch.tensor([[1, 6, 6]] * 96), return_dict=True)
        loss, hits = 0.0, []
        for head, tokens in zip(heads, (out.pooler_output, *out.deepstack_features)):
            for i, logits in enumerate(head(tokens).split(sizes, -1)):          # (96 * 9, values)
                target = labels[pick, :, i].flatten()
                loss = loss + F.cross_entropy(logits, target)
                hits.append((logits.argmax(-1) == target)[target >= 0].float().mean().item())
        # features of moderate size: the language model starts with embeddings of about this scale
        loss = loss + 1e-3 * (out.pooler_output.pow(2).mean() - 1).relu()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        rate(optimizer, step)
        optimizer.step()
        if step % 200 == 0 or step == VISION_STEPS - 1:
            shares = " ".join(f"{name} {hit:.2f}" for name, hit in zip(PROBES, hits))
            print(f"vision {step:5d}  loss {loss.item():6.3f}  {time.time() - began:4.0f} s  {shares}  "
                  f"deepstack mean {np.mean(hits[len(PROBES):]):.2f}", flush=True)


def schedule(peak, steps, warm=50):
    """A function that sets the learning rate: a short warm-up, then a cosine down to a twentieth."""
    def rate(optimizer, step):
        scale = min(1.0, (step + 1) / warm) * (0.05 + 0.475 * (1 + np.cos(np.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = peak * scale
    return rate


@torch.no_grad()
def features(visual, frames):
    """(clips, 2 streams, 18, d): what the language model gets of each clip, pooled and deepstack."""
    rows = []
    for part in frames.split(64):
        patches, _ = common.frames_to_patches(part.flatten(0, 1), world.SIDE ** 2)
        out = visual(patches, grid_thw=torch.tensor([GRID] * len(part)), return_dict=True)
        streams = (out.pooler_output, *out.deepstack_features)
        rows.append(torch.stack([x.view(len(part), 2 * TOKENS, -1) for x in streams], 1))
    return torch.cat(rows)


# ---- the language model ----------------------------------------------------------------------------------

def make_model(tokenizer):
    """The tiny Qwen3VLMoeForConditionalGeneration: 1 to 2 M parameters, head not tied to the embeddings."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
    token = tokenizer.convert_tokens_to_ids
    config = Qwen3VLMoeConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, moe_intermediate_size=64,
            num_experts=8, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[],
            norm_topk_prob=True, max_position_embeddings=4096, initializer_range=0.05, use_cache=True,
            tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5],
                                 mrope_interleaved=True),
            pad_token_id=token("<|endoftext|>"), eos_token_id=token("<|im_end|>"), bos_token_id=None),
        vision_config=dict(
            depth=2, hidden_size=64, num_heads=4, intermediate_size=192, patch_size=16, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=128, num_position_embeddings=36,
            deepstack_visual_indexes=[0]),
        tie_word_embeddings=False,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"))
    model = Qwen3VLMoeForConditionalGeneration(config).float()
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model


def positions(visual):
    """(3, n) positions of a row: text counts on; a frame pair's 3 x 3 tokens by time, row and column.

    visual: list of bool. The same as the model's get_rope_index, which is slow (the tests compare them).
    """
    rows, at, i = [], 0, 0
    while i < len(visual):
        if visual[i]:
            rows += [(at, at + r, at + c) for r in range(3) for c in range(3)]
            at, i = at + 3, i + TOKENS
        else:
            rows.append((at, at, at))
            at, i = at + 1, i + 1
    return torch.tensor(rows).T


def pack(examples, tokenizer, video_token):
    """Rows [prompt | answer 1 | ... | answer G] of (prompt, [answers], [clip indices]), padded on the right.

    Returns ids (B, L), positions (3, B, L), mask (B, 1, L, L) bool, targets (B, L) with -100 outside answers,
    owner (B, L) with 0 for the prompt, 1 to G for answers and -1 for padding, and the clips of all rows.
    """
    rows = []
    for prompt, answers, _ in examples:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        place = positions([i == video_token for i in ids])
        own, owner, target = [place], [0] * len(ids), [-100] * len(ids)
        for a, text in enumerate(answers, 1):
            new = tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
            own.append((place.max() + 1 + torch.arange(len(new))).expand(3, -1))
            owner += [a] * len(new)
            target += new
            ids = ids + new
        rows.append((torch.tensor(ids), torch.cat(own, 1), torch.tensor(owner), torch.tensor(target)))
    longest, size = max(len(r[0]) for r in rows), len(rows)
    ids, target = torch.zeros(size, longest, dtype=torch.long), torch.full((size, longest), -100)
    place, owner = torch.zeros(3, size, longest, dtype=torch.long), torch.full((size, longest), -1)
    for b, row in enumerate(rows):
        n = len(row[0])
        ids[b, :n], place[:, b, :n], owner[b, :n], target[b, :n] = row
    sees = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])          # (B, L, L)
    mask = (sees & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None]
    return ids, place, mask, target, owner, [c for e in examples for c in e[2]]


def answer_loss(model, batch, seen):
    """Mean loss over the answers' tokens; the prompt's last token predicts each answer's first."""
    ids, place, mask, target, owner, clips = batch
    visual = ids == model.config.video_token_id                           # (B, L)
    parts = seen[torch.tensor(clips)]                           # (clips, 2, 18, d)
    embeds = model.model.language_model.embed_tokens(ids)
    embeds = embeds.masked_scatter(visual[..., None], parts[:, 0].reshape(-1, embeds.shape[-1]))
    hidden = model.model.language_model(inputs_embeds=embeds, position_ids=place, attention_mask=mask,
                                        visual_pos_masks=visual, use_cache=False,
                                        deepstack_visual_embeds=[parts[:, 1].flatten(0, 1)]).last_hidden_state
    before = (torch.arange(ids.shape[1]) - 1).clamp(0).expand_as(ids).clone()   # who predicts whom
    prompt_end = (owner == 0).sum(1, keepdim=True) - 1
    begins = (owner > 0) & (owner != owner.gather(1, before))
    before = torch.where(begins, prompt_end, before)
    wanted = target >= 0
    logits = model.lm_head(hidden.gather(1, before[..., None].expand_as(hidden))[wanted])   # (tokens, vocab)
    return F.cross_entropy(logits, target[wanted])


def window(truths, s, t, history, questions, tokenizer):
    """Prompt text of clip t of stream s, exactly as the stages build it, and the indices of its clips."""
    rows = [{"clip": c, "start": c * 10.0, "end": c * 10.0 + 10, "file": "", "offset": c * 10.0, "speech": []}
            for c in range(len(truths[s]))]
    context = common.make_context({"stream": str(s), "clips": rows}, t, history, questions)
    text = stage2.build_prompt(context, [[(2.5, TOKENS), (7.5, TOKENS)]] * len(context.clips), tokenizer)
    return text, [s * len(rows) + c["clip"] for c in context.clips]


def example(truths, tokenizer, rng, stage):
    """A random (prompt, answers, clips) of a stage: all are truthful but "noisy"."""
    s = rng.randrange(len(truths))
    truth = truths[s]
    if stage == "list":                                    # a clip by itself, as the first of a stream
        text, _ = window([truth[:1]], 0, 0, {}, [], tokenizer)
        t = rng.randrange(len(truth))
        answers = [respond([truth[t]], 0, None, [], rng, True, True) for _ in range(4)]
        return text, answers, [s * len(truth) + t]
    # in a list, whose coat it is follows half of the time from what is left; alone, a fact must be looked up.
    # Nothing is learnt for about 200 steps, then the faces are told apart all at once
    if stage in ("single", "people"):
        text, _ = window([truth[:1]], 0, 0, {}, [], tokenizer)
        t = rng.randrange(len(truth))
        told = [f for f in world.clip_facts(truth[t])
                if stage == "single" or f.category in ("wear", "action")]
        return text, [answer("now", [fact]) for fact in told], [s * len(truth) + t]
    t, history = rng.randrange(len(truth)), {}
    writer = rng.choice(["caption", "noisy"])              # whose memories stand in the window
    for c in range(max(0, t - 4), t):
        previous = history.get(c - 1, "") if c else None
        own = common.parse_response(respond(truth, c, previous, [], rng))[0] or ""
        history[c] = world.caption(truth, c, previous, rng) if writer == "caption" else own
    questions = []
    if rng.random() < 0.4:
        environment = rng.choice(world.CATEGORIES)
        while len(questions) < 5:
            tasks = world.make_tasks("q", truths[rng.randrange(len(truths))], rng, 2)
            questions += [task["question"] for task in tasks if task["environment"] == environment]
    prompt, clips = window(truths, s, t, history, questions[:5], tokenizer)
    previous = history.get(t - 1, "") if t else None
    honest = stage == "window"
    answers = [respond(truth, t, previous, questions[:5], rng, honest, honest and a == 0)
               for a in range(ANSWERS)]
    if honest:                                             # one list, three memories, two facts by themselves
        answers[1:3] = [answer(world.connector(previous), [fact])
                        for fact in rng.sample(world.clip_facts(truth[t]), 2)]
    return prompt, answers, clips


def train_language(model, tokenizer, truths, seen, stage, steps, batch_size, peak):
    """One stage of the language model's training; `seen` holds the frozen vision tower's features."""
    params = [p for n, p in model.named_parameters() if ".visual." not in n]
    optimizer = torch.optim.AdamW(params, peak, betas=(0.9, 0.98), weight_decay=0.01)
    rate, video = schedule(peak, steps), model.config.video_token_id
    rng, began, mean = random.Random(f"{SEED} {stage}"), time.time(), 0.0
    for step in range(steps):
        # whose coat, whose action: learnt last, and forgotten in windows unless it is kept up
        size, kind = (24, "people") if stage == "window" and step % 3 == 2 else (batch_size, stage.split()[0])
        batch = pack([example(truths, tokenizer, rng, kind) for _ in range(size)], tokenizer, video)
        loss = answer_loss(model, batch, seen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        rate(optimizer, step)
        optimizer.step()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            row, seconds = batch[0].shape[1], time.time() - began
            print(f"{stage} {step:5d}  loss {mean:.3f}  row {row}  {seconds:4.0f} s", flush=True)


# ---- what the base can do --------------------------------------------------------------------------------

def held_out(folder, first, count, blank=False):
    """Streams as 01 writes them (rows, tasks, judge), truly encoded; blank: grey frames, no facts."""
    rows, truth_rows, tasks, rng = [], [], [], random.Random(SEED)
    for i in range(first, first + count):
        truth, name = world.make_stream(world.stream_seed(SEED, "base", i)), f"base-{i}"
        path = pathlib.Path(folder) / f"{name}{'-blank' * blank}.mp4"
        world.write_video(path, np.concatenate([world.draw_frames(clip, blank) for clip in truth]))
        clips = [{"clip": c, "start": c * 10.0, "end": c * 10.0 + 10, "file": str(path), "offset": c * 10.0,
                  "speech": []} for c in range(len(truth))]
        rows.append({"stream": name, "split": "base", "source": "tiny", "clips": clips})
        truth_rows += [{"stream": name, "clip": c, "facts": clip} for c, clip in enumerate(truth)]
        tasks += world.make_tasks(name, truth, rng)
    return rows, tasks, world.Judge(truth_rows)


def caption_contexts(rows, judge, count, k, rng):
    """`count` random windows of each stream, their histories written by the world's captions."""
    contexts = []
    for row in rows:
        truth, history = [judge.truth[row["stream"], c] for c in range(len(row["clips"]))], []
        for t in range(len(truth)):
            history.append(world.caption(truth, t, history[-1] if history else None, rng))
        times = rng.sample(range(len(truth)), count)
        contexts += [common.make_context(row, t, history, (), k) for t in times]
    return contexts


# per category the alternatives of each word of a value
ALTERNATIVES = {"place": [world.PLACES], "wear": [list(world.COLOURS)], "action": [world.ACTIONS],
                "object": [list(world.COLOURS), world.OBJECTS], "count": [world.NUMBERS],
                "speech": [world.FIRST, world.SECOND]}


@torch.no_grad()
def forced_decoding(policy, contexts, judge):
    """{category: share of facts that are right when the phrase up to the value is given}: what is perceived.

    The likeliest of all alternatives of each word of the value counts; a fact is right if all its words are.
    """
    right = {category: [] for category in world.CATEGORIES}
    for context in contexts:
        starts, answers = [], []
        for fact in world.clip_facts(judge.truth[context.stream, context.clip]):
            text, words, known = world.say(fact), fact.value.split(), []
            connector = world.connector(context.history[-1] if context.history else "")
            head = f'plan: {fact.category}\n</think>\n\n{{"description": "{connector}, '
            head += text[:text.index(fact.value)]
            for word, options in zip(words, ALTERNATIVES[fact.category]):
                final = len(known) + 1 == len(words)
                starts.append((fact.category, len(answers), options.index(word), final))
                lead = head + "".join(w + " " for w in known)
                texts = [lead + option for option in options]
                answers += [policy.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
                known.append(word)
        last = torch.stack([row[-1] for row in common.logprobs(policy, context, answers)])     # (answers,)
        ends, good = [s[1] for s in starts[1:]] + [len(answers)], True
        for (category, begin, wanted, final), end in zip(starts, ends):
            good = good and last[begin:end].argmax().item() == wanted
            if final:
                right[category].append(good)
                good = True
    return {category: float(np.mean(hits)) for category, hits in right.items()}


def watch(policy, rows, questions=()):
    """{stream: [[start, end, memory]]}, written clip by clip at inference sampling with its own history."""
    kept = {row["stream"]: [] for row in rows}
    for t in range(len(rows[0]["clips"])):
        contexts = [common.make_context(row, t, [m for _, _, m in kept[row["stream"]]], questions)
                    for row in rows]
        keys = [(SEED, 2, i, t) for i in range(len(rows))]
        groups = common.rollout(policy, contexts, 1, keys, 0.6, 0.95, 20)
        for row, (sample,) in zip(rows, groups):
            clip = row["clips"][t]
            kept[row["stream"]].append([clip["start"], clip["end"], sample.memory or ""])
    return kept


def measure_writing(policy, S, rows, kept, judge):
    """Prints what 8 samples per clip at temperature 1 are worth, their histories being `kept`."""
    contexts = [common.make_context(row, t, [m for _, _, m in kept[row["stream"]]])
                for row in rows for t in range(len(row["clips"]))]
    groups = common.rollout(policy, contexts, 8, [(SEED, 1, i) for i in range(len(contexts))])
    samples = [(context, sample) for context, group in zip(contexts, groups) for sample in group]
    kinds = "broken long_thinking over_budget unfaithful repeats fully_right"
    count, shares = dict.fromkeys(kinds.split(), 0), dict.fromkeys(world.CATEGORIES, 0)
    told, true = 0, 0
    for context, sample in samples:
        count["broken"] += sample.memory is None
        count["long_thinking"] += sample.thinking_tokens > S.THINK_TOKENS
        if sample.memory is None:
            continue
        faithful = judge.faithful(context, sample.memory)
        clean = judge.clean(context.history[-1] if context.history else "", sample.memory)
        over = sample.memory_tokens > S.MEMORY_TOKENS
        for kind, found in (("over_budget", over), ("unfaithful", not faithful), ("repeats", not clean),
                            ("fully_right", faithful and clean and not over)):
            count[kind] += found
        stated = world.facts(sample.memory)
        told += len(stated)
        true += len(set(stated) & set(world.clip_facts(judge.truth[context.stream, context.clip])))
        for fact in stated:
            shares[fact.category] += 1
    print(f"temperature 1, {len(samples)} samples: "
          + "  ".join(f"{k} {v / len(samples):.3f}" for k, v in count.items()))
    print(f"fact accuracy {true / told:.3f}  facts per memory {told / (len(samples) - count['broken']):.2f}  "
          "share of facts: " + "  ".join(f"{k} {v / told:.3f}" for k, v in shares.items()), flush=True)


def measure(folder):
    """Prints the figures of the saved base: what it perceives, how it writes, what its memories answer."""
    S = common.settings({"__doc__": ""}, [])
    policy = common.load_policy(S)
    rows, tasks, judge = held_out(folder, STREAMS, HELD_OUT)
    for name, streams in (("seen", rows), ("blanked", held_out(folder, STREAMS, HELD_OUT, blank=True)[0])):
        contexts = caption_contexts(streams, judge, 4, S.K, random.Random(SEED))
        print(f"forced decoding, {name}, {len(contexts)} clips: " + "  ".join(
            f"{k} {v:.3f}" for k, v in forced_decoding(policy, contexts, judge).items()), flush=True)
    bare = watch(policy, rows)
    measure_writing(policy, S, rows, bare, judge)
    for prompted in (False, True):
        right, covered = [], []
        for environment in world.CATEGORIES:
            asked = [t for t in tasks if t["environment"] == environment]
            kept = watch(policy, rows, [t["question"] for t in asked[-5:]]) if prompted else bare
            replies = [judge.answer(kept[t["stream"]], t["question"], t["options"]) for t in asked]
            right.append(np.mean([reply == t["answer"] for reply, t in zip(replies, asked)]))
            covered.append(np.mean([reply != "insufficient" for reply in replies]))
        print(f"{'with' if prompted else 'without'} a task prompt, temperature 0.6: "
              f"accuracy {np.mean(right):.3f}  coverage {np.mean(covered):.3f}   "
              + "  ".join(f"{k} {a:.2f}" for k, a in zip(world.CATEGORIES, right)), flush=True)


def save(model, tokenizer, folder):
    """Weights in bf16, config and tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    model.float()
    tokenizer.save_pretrained(folder)
    sizes = {f.name: f.stat().st_size for f in sorted(folder.iterdir())}
    print(f"saved {folder.name}: " + "  ".join(f"{k} {v:,} bytes" for k, v in sizes.items()), flush=True)


class Tee:
    """Prints to the screen and keeps what was printed."""

    def __init__(self, screen):
        self.screen, self.kept = screen, []

    def write(self, text):
        self.kept.append(text)
        return self.screen.write(text)

    def flush(self):
        self.screen.flush()


def once(name, model, key, work):
    """Runs work(), which trains `model`, and keeps weights and log; a like run reads them back.

    Every step of the making starts from a fresh optimizer and its own seed, so reading back equals running.
    Returns (the key for the next step, seconds that the work took).
    """
    key = f"{zlib.crc32(repr((name, key)).encode()):08x}"
    path = common.ROOT / "runs" / "base" / f"{name}-{key}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        print(saved["log"], end="", flush=True)
    else:
        began, tee = time.time(), Tee(sys.stdout)
        with contextlib.redirect_stdout(tee):
            work()
        saved = {"weights": model.state_dict(), "log": "".join(tee.kept), "seconds": time.time() - began}
        with common.written_aside(path) as aside:
            torch.save(saved, aside)
    model.load_state_dict(saved["weights"])
    return key, saved["seconds"]


def main():
    from transformers import AutoTokenizer
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    began = time.time()
    # a tokenizer that is there stays: kept steps and adapters of runs are trained on its ids
    kept = (HERE / "base" / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "base") if kept else make_tokenizer()
    model = make_model(tokenizer)
    model.set_experts_implementation("grouped_mm")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    truths, frames = decoded_streams(0, STREAMS)
    print(f"{len(frames)} clips rendered, encoded and decoded in {time.time() - began:.0f} s", flush=True)
    spent = time.time() - began
    key, seconds = once("vision", model, (SEED, STREAMS, VISION_STEPS),
                        lambda: train_vision(model.model.visual, truths, frames))
    seen, spent = features(model.model.visual, frames), spent + seconds
    del frames
    mix = (WRONG, WRONG_CONNECTOR, CAREFUL, BROKEN, LONG_PLAN, FACTS, ASKED)
    for name, steps, size, peak, chosen in (("list", LIST_STEPS, 16, 2e-3, ()),
                                            ("single", SINGLE_STEPS, 16, 2e-3, ()),
                                            ("people", PEOPLE_STEPS, 24, 2e-3, ()),
                                            ("people again", PEOPLE_STEPS, 24, 2e-3, ()),
                                            ("window", WINDOW_STEPS, 8, 1.5e-3, ()),
                                            ("noisy", NOISY_STEPS, 8, 1e-3, mix)):
        key, seconds = once(name, model, (key, steps, size, peak, ANSWERS, chosen),
                            lambda: train_language(model, tokenizer, truths, seen, name, steps, size, peak))
        spent += seconds
    began = time.time()
    save(model, tokenizer, HERE / "base")
    with tempfile.TemporaryDirectory() as folder:
        measure(folder)
    print(f"{(spent + time.time() - began) / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
