"""Make the tiny base model of the toy world: a mediocre memory writer of the real Qwen3-VL-MoE class.

Four steps: (1) a small byte-level BPE tokenizer; (2) the vision tower, on throw-away probes of what each cell
shows; (3) the language model on cached vision features: listing all facts of single clips, then stating them
one by one, then writing truthful memories from windows; (4) the noisy mix that makes the writer mediocre. A
wrong value is always the neighbour of the right one, so temperature 0.6 does not wipe it out, as it would wrong
values that are spread; the right one stays likelier, so reinforcement learning can repair it. The mix was
calibrated to the rows of the paper's base, and to nothing else: make_base.log has the targets and every try.

The committed base was made in two runs: steps 1 to 3 by this file as it was at commit 66c9d30, the last one, again and
with today's mix, by the second command below. Today's file has not been run from nothing; that would give other weights.

A finished step is kept in runs/base/ and read back, with its log, by a run with the same constants.

Run:  python tiny/make_base.py            (28 minutes on 2 threads, 6 GB, at that commit)
      python tiny/make_base.py FOLDER     (the last step alone, from the base in FOLDER: 5 minutes)
In:   nothing; the streams of the split "base", which no stage uses
Out:  tiny/base/ (config, weights in bf16, tokenizer)
"""
import concurrent.futures
import contextlib
import pathlib
import random
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common
from support.runs import ROOT, written_aside
from support.video import frame_times, frames_to_patches, read_frames
from tiny import world

# ----------------------------------------------------------------
SEED = 0
THREADS = 2
STREAMS = 1600            # rendered, encoded, decoded: 12 clips each
HELD_OUT = 40             # more streams, for the figures at the end
VOCAB = 800               # with the special tokens
VISION_STEPS = 800        # of 96 frame pairs
LIST_STEPS = 900          # of 16 clips x 4 lists of all their facts
SINGLE_STEPS = 420        # of 16 clips x 8 answers of one fact each
PEOPLE_STEPS = 300        # of 24 clips x 4 answers of one fact about a person; twice, warming again
WINDOW_STEPS = 480        # of 8 windows x 6 answers (memories, lists, facts); each third people
NOISY_STEPS = 400         # of 8 windows x 6 answers: the mix
AGAIN_STEPS = 200         # the same, where it begins from a base ...
AGAIN_STREAMS = 400       # ... on the first of the streams
ANSWERS = 6               # answers per window, packed behind one prompt
WRONG = 0.25              # share of facts with the value that theirs is taken for
WRONG_CONNECTOR = 0.05
CAREFUL = 0.80            # share of memories that leave out what the preceding one states
BROKEN = 0.05             # share of responses that break the format
LONG_PLAN = 0.06          # share of responses that think too long
FACTS = {1: 0.05, 2: 0.12, 3: 0.77, 4: 0.05, 5: 0.01}    # facts per memory
ASKED = 2.0               # how much likelier a fact of the asked category is, with questions
# ----------------------------------------------------------------

HERE = pathlib.Path(__file__).resolve().parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}")
GRID = (2, 6, 6)          # of a clip: 4 frames in pairs, patches of 16 px
TOKENS = 9                # vision tokens per frame pair


# ---------------------------------------------------------------- tokenizer

def make_tokenizer():
    """Byte-level BPE in which a face ID, a time and a word of the world is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    pieces = r" ?<face_\d>|\d\d:\d\d:\d\d|\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+"
    split = pre_tokenizers.Split(Regex(pieces), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 2, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(tokenizer_texts(), trainer)
    thinking = [AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")]
    bpe.add_tokens(thinking)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", chat_template=TEMPLATE)


def tokenizer_texts():
    """What the tokenizer is trained on: questions, responses, the prompt, and every word of the world."""
    rng = random.Random(SEED)
    categories = ", ".join(world.CATEGORIES)
    prompt = common.PROMPT + common.ASK_TO_THINK + common.TASK_PROMPT
    prompt += " (nothing) plan: " + categories
    words = world.FIRST + world.SECOND + world.CATEGORIES
    texts = []
    for i in range(300):
        truth = world.make_stream(world.stream_seed(SEED, "base", i))
        texts += [task["question"] for task in world.make_tasks("s", truth, rng)]
        for t in range(len(truth)):
            before = "now, a red cup." if t % 2 else None
            texts.append(respond(truth, t, before, [], rng, honest=True))
        texts.append(prompt)
        texts += [f" '{word} {word}" for word in words]
        for t in range(0, 120, 10):
            texts.append(f"\n{world.clock(t)}-{world.clock(t + 10)} <2.5 seconds>")
    return texts


# ---------------------------------------------------------------- the writer that the base imitates

def wrong(fact):
    """The fact with the value that its own is taken for."""
    return fact._replace(value=world.neighbour(fact.category, fact.value))


def choose(pool, count, asked, rng):
    """`count` facts of the pool in random order, all categories equally likely, the asked one likelier."""
    pool = list(pool)
    chosen = []
    size = {}
    for category in world.CATEGORIES:
        size[category] = sum(fact.category == category for fact in pool)
    while pool and len(chosen) < count:
        weights = [ASKED if fact.category == asked else 1 / size[fact.category] for fact in pool]
        [spot] = rng.choices(range(len(pool)), weights)
        chosen.append(pool.pop(spot))
    return chosen


def answer(connector, chosen):
    """A well-formed response that states these facts."""
    plan = ", ".join(fact.category for fact in chosen)
    return f'plan: {plan}\n</think>\n\n{{"description": "{world.sentence(connector, chosen)}"}}'


def respond(truth, t, previous, questions, rng, honest=False, everything=False):
    """A response for clip t without its end token. honest: no noise, deaf to questions.
    everything: lists all facts.

    previous: the memory before, "" or None if there is none. The thinking part names what categories follow.
    """
    def noisy(share):
        return not honest and rng.random() < share

    asked = None
    if questions and not honest:
        kind, _ = world.read_question(questions[0])
        asked = world.QUESTIONS[kind][0]
    connector = world.connector(previous)
    if noisy(WRONG_CONNECTOR):
        connector = {"now": "still", "still": "now"}[connector]
    # What to state.
    if everything:
        count = 8
    elif honest:
        count = 3
    else:
        [count] = rng.choices(list(FACTS), FACTS.values())
    pool = world.clip_facts(truth[t])
    if not everything and not noisy(1 - CAREFUL):
        stated = set(world.facts(previous or ""))
        pool = [fact for fact in pool if fact not in stated]
    chosen = choose(pool, count, asked, rng)
    # The thinking part.
    plan = [fact.category for fact in chosen]
    if noisy(LONG_PLAN):
        extra = rng.randint(6, 11)
        plan = [rng.choice(world.CATEGORIES) for _ in range(extra)] + plan
    # The memory.
    told = [wrong(fact) if noisy(WRONG) else fact for fact in chosen]
    memory = world.sentence(connector, told)
    head = "plan: " + ", ".join(plan) + "\n</think>\n\n"
    tail = f'{{"description": "{memory}"}}'
    if noisy(BROKEN):
        return rng.choice(broken_forms(head, tail, memory))
    return head + tail


def broken_forms(head, tail, memory):
    """Ways in which a response breaks the format."""
    return [
        head + tail[:-1],                                            # the brace is missing,
        head + tail[:-2] + "}",                                      # the quotation mark,
        head + memory,                                               # all of the JSON,
        head[:-10] + tail,                                           # the end of thinking
        head + tail.replace('"description"', '"memory"'),
        head + tail + "}",
    ]


# ---------------------------------------------------------------- clips

def decoded_stream(index):
    """One stream of the split "base", truly encoded and decoded: (truth, uint8 (clips, 4, 96, 96, 3))."""
    truth = world.make_stream(world.stream_seed(SEED, "base", index))
    clips = world.stream_row(str(index), "base", "", len(truth))["clips"]
    wanted = []
    for clip in clips:
        wanted += frame_times(clip, 4)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{index}.mp4"
        world.write_stream_video(path, truth)
        frames = read_frames(path, wanted)
    return truth, frames.reshape(len(truth), 4, world.SIDE, world.SIDE, 3)


def decoded_streams(first, count):
    """truths: list of streams; frames: uint8 (count * 12, 4, 96, 96, 3)."""
    with concurrent.futures.ProcessPoolExecutor(THREADS) as pool:
        decoded = pool.map(decoded_stream, range(first, first + count), chunksize=20)
        truths, frames = zip(*decoded)
    return list(truths), torch.from_numpy(np.concatenate(frames))


# ---------------------------------------------------------------- the vision tower

PROBES = {
    "place": world.PLACES,
    "who": "123456789",
    "wear": list(world.COLOURS),
    "action": world.ACTIONS,
    "colour": list(world.COLOURS),
    "shape": world.OBJECTS,
    "count": world.NUMBERS,
    "first": world.FIRST,
    "second": world.SECOND,
    "speaker": "123456789",
    "what": ["place", "object", "count", "person", "empty", "words"],
}


def probe_labels(clip):
    """(9, probes) indices, -100 where a cell lacks the thing. Cells row by row, as the merged tokens are."""
    labels = []
    for cell in seen_in_cells(clip):
        row = []
        for name, values in PROBES.items():
            row.append(list(values).index(cell[name]) if name in cell else -100)
        labels.append(row)
    return labels


def seen_in_cells(clip):
    """For each of the nine cells {probe: what it shows}."""
    colour, shape = clip["object"].split()
    of_upper = {
        "place": {"place": clip["place"]},
        "object": {"colour": colour, "shape": shape},
        "count": {"count": clip["count"]},
    }
    upper = [{"what": what} | of_upper[what] for what in clip["cells"]]
    middle = []
    for who in clip["seats"]:
        if who:
            middle.append({"what": "person", "who": who} | clip["people"][who])
        else:
            middle.append({"what": "empty"})
    speaker, words = clip["speech"]
    first, second = words.split()
    lower = [{"what": "words", "speaker": speaker}, {"what": "words", "first": first},
             {"what": "words", "second": second}]
    return upper + middle + lower


def train_vision(visual, truths, frames):
    """Trains the tower until linear probes read every attribute off its cell, in both feature streams."""
    clips = [clip for truth in truths for clip in truth]
    labels = torch.tensor([probe_labels(clip) for clip in clips])           # (clips, 9, probes)
    width = visual.config.out_hidden_size
    sizes = [len(values) for values in PROBES.values()]
    heads = torch.nn.ModuleList([torch.nn.Linear(width, sum(sizes)) for _ in range(2)])
    params = [*visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, 2e-3, weight_decay=0.01)
    set_rate = schedule(2e-3, VISION_STEPS)
    rng = torch.Generator().manual_seed(SEED)
    began = time.time()
    for step in range(VISION_STEPS):
        pick = torch.randint(len(labels), (96,), generator=rng)
        pair = torch.randint(2, (96,), generator=rng)
        pictures = [frames[i, 2 * p:2 * p + 2] for i, p in zip(pick, pair)]
        pictures = torch.stack(pictures).flatten(0, 1)                      # (96 * 2, 96, 96, 3)
        patches, _ = frames_to_patches(pictures, world.SIDE ** 2)
        grid = torch.tensor([[1, 6, 6]] * 96)
        out = visual(patches, grid_thw=grid, return_dict=True)
        loss = 0.0
        hits = []
        for head, tokens in zip(heads, (out.pooler_output, *out.deepstack_features)):
            for i, logits in enumerate(head(tokens).split(sizes, -1)):      # (96 * 9, values)
                target = labels[pick, :, i].flatten()
                loss = loss + F.cross_entropy(logits, target)
                right = logits.argmax(-1) == target
                hits.append(right[target >= 0].float().mean().item())
        # Features of moderate size, because the language model starts with embeddings of about this scale.
        loss = loss + 1e-3 * (out.pooler_output.pow(2).mean() - 1).relu()
        descend(optimizer, params, loss, set_rate, step)
        if step % 200 == 0 or step == VISION_STEPS - 1:
            shares = " ".join(f"{name} {hit:.2f}" for name, hit in zip(PROBES, hits))
            deepstack = np.mean(hits[len(PROBES):])
            seconds = time.time() - began
            print(f"vision {step:5d}  loss {loss.item():6.3f}  {seconds:4.0f} s  {shares}  "
                  f"deepstack mean {deepstack:.2f}", flush=True)


def descend(optimizer, params, loss, set_rate, step):
    """One step down the gradient."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    set_rate(optimizer, step)
    optimizer.step()


def schedule(peak, steps, warm=50):
    """A function that sets the learning rate: a short warm-up, then a cosine down to a twentieth."""
    def set_rate(optimizer, step):
        warmth = min(1.0, (step + 1) / warm)
        cosine = 1 + np.cos(np.pi * step / steps)
        scale = warmth * (0.05 + 0.475 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = peak * scale
    return set_rate


@torch.no_grad()
def features(visual, frames):
    """(clips, 2 streams, 18, d): what the language model gets of each clip, pooled and deepstack."""
    rows = []
    for some in frames.split(64):
        patches, _ = frames_to_patches(some.flatten(0, 1), world.SIDE ** 2)
        grid = torch.tensor([GRID] * len(some))
        out = visual(patches, grid_thw=grid, return_dict=True)
        both_streams = [out.pooler_output, *out.deepstack_features]
        by_clip = [tokens.view(len(some), 2 * TOKENS, -1) for tokens in both_streams]
        rows.append(torch.stack(by_clip, 1))
    return torch.cat(rows)


# ---------------------------------------------------------------- the language model

def make_model(tokenizer):
    """The tiny Qwen3VLMoeForConditionalGeneration: 1 to 2 M parameters, head not tied to the embeddings."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5],
            "mrope_interleaved": True}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "max_position_embeddings": 4096, "initializer_range": 0.05, "use_cache": True,
        "tie_word_embeddings": False, "rope_parameters": rope,
        "pad_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>"),
        "bos_token_id": None,
    }
    vision = {
        "depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 192, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 128,
        "num_position_embeddings": 36, "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLMoeConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"))
    model = Qwen3VLMoeForConditionalGeneration(config).float()
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model


def positions(visual):
    """(3, n) positions of a row: text counts on; a frame pair's 3 x 3 tokens by time, row and column.

    visual: list of bool. The same as the model's get_rope_index, which is slow (the tests compare them).
    """
    rows = []
    at = 0
    i = 0
    while i < len(visual):
        if visual[i]:
            for row in range(3):
                rows += [(at, at + row, at + column) for column in range(3)]
            at += 3
            i += TOKENS
        else:
            rows.append((at, at, at))
            at += 1
            i += 1
    return torch.tensor(rows).T


@dataclass
class Batch:
    """Rows [prompt | answer 1 | ... | answer G], padded on the right to length L."""
    ids: torch.Tensor        # (B, L)
    positions: torch.Tensor  # (3, B, L)
    mask: torch.Tensor       # (B, 1, L, L) bool: who sees whom
    targets: torch.Tensor    # (B, L), -100 outside of answers
    owner: torch.Tensor      # (B, L): 0 prompt, 1 to G answers, -1 padding
    clips: list              # indices of the clips of all rows


def pack(examples, tokenizer, video_token):
    """A Batch of examples (prompt, [answers], [clip indices])."""
    rows = [pack_row(prompt, answers, tokenizer, video_token) for prompt, answers, _ in examples]
    size = len(rows)
    longest = max(len(ids) for ids, _, _, _ in rows)
    ids = torch.zeros(size, longest, dtype=torch.long)
    places = torch.zeros(3, size, longest, dtype=torch.long)
    targets = torch.full((size, longest), -100)
    owner = torch.full((size, longest), -1)
    for b, (row_ids, row_places, row_owner, row_targets) in enumerate(rows):
        n = len(row_ids)
        ids[b, :n] = row_ids
        places[:, b, :n] = row_places
        owner[b, :n] = row_owner
        targets[b, :n] = row_targets
    # A token sees the prompt and the earlier part of its own answer.
    who = owner[:, None, :]
    sees = (who == 0) | (who == owner[:, :, None])                          # (B, L, L)
    earlier = torch.ones(longest, longest, dtype=torch.bool).tril()
    clips = [clip for _, _, clips_of_row in examples for clip in clips_of_row]
    return Batch(ids, places, (sees & earlier)[:, None], targets, owner, clips)


def pack_row(prompt, answers, tokenizer, video_token):
    """(ids (n,), positions (3, n), owner (n,), targets (n,)) of one prompt with its answers."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    prompt_places = positions([i == video_token for i in ids])
    places = [prompt_places]
    owner = [0] * len(ids)
    targets = [-100] * len(ids)
    for number, text in enumerate(answers, 1):
        answer_ids = tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
        # Each answer begins where the prompt ends.
        answer_places = prompt_places.max() + 1 + torch.arange(len(answer_ids))
        places.append(answer_places.expand(3, -1))
        owner += [number] * len(answer_ids)
        targets += answer_ids
        ids = ids + answer_ids
    return torch.tensor(ids), torch.cat(places, 1), torch.tensor(owner), torch.tensor(targets)


def answer_loss(model, batch, seen):
    """Mean loss over the answers' tokens; the prompt's last token predicts each answer's first."""
    decoder = model.model.language_model
    visual = batch.ids == model.config.video_token_id                       # (B, L)
    vision = seen[torch.tensor(batch.clips)]                                # (clips, 2, 18, d)
    embeds = decoder.embed_tokens(batch.ids)                                # (B, L, d)
    pooled = vision[:, 0].reshape(-1, embeds.shape[-1])
    embeds = embeds.masked_scatter(visual[..., None], pooled)
    hidden = decoder(
        inputs_embeds=embeds, position_ids=batch.positions, attention_mask=batch.mask,
        visual_pos_masks=visual, use_cache=False,
        deepstack_visual_embeds=[vision[:, 1].flatten(0, 1)]
    ).last_hidden_state                                                     # (B, L, d)
    # Who predicts whom: the token before, and an answer's first token the prompt's last.
    owner = batch.owner
    before = (torch.arange(owner.shape[1]) - 1).clamp(0)
    before = before.expand_as(owner).clone()                                # (B, L)
    prompt_end = (owner == 0).sum(1, keepdim=True) - 1
    begins = (owner > 0) & (owner != owner.gather(1, before))
    before = torch.where(begins, prompt_end, before)
    wanted = batch.targets >= 0
    predicting = hidden.gather(1, before[..., None].expand_as(hidden))
    logits = model.lm_head(predicting[wanted])                              # (tokens, vocab)
    return F.cross_entropy(logits, batch.targets[wanted])


def window(truths, s, t, history, questions, tokenizer):
    """Prompt text of clip t of stream s, exactly as the stages build it, and the indices of its clips."""
    clips = len(truths[s])
    row = world.stream_row(str(s), "base", "", clips)
    context = common.make_context(row, t, history, questions)
    video = [[(2.5, TOKENS), (7.5, TOKENS)]] * len(context.clips)
    text = context.prompt(video, tokenizer)
    return text, [s * clips + clip["clip"] for clip in context.clips]


def example(truths, tokenizer, rng, stage):
    """A random (prompt, answers, clips) of a stage: all are truthful but "noisy"."""
    s = rng.randrange(len(truths))
    if stage in ("list", "single", "people"):
        return clip_example(truths, s, tokenizer, rng, stage)
    return window_example(truths, s, tokenizer, rng, honest=stage == "window")


def clip_example(truths, s, tokenizer, rng, stage):
    """Of a clip by itself, as the first of a stream: four lists of all its facts, or each fact alone.

    In a list, whose coat it is follows half of the time from what is left; alone, a fact must be looked up.
    Nothing is learnt for about 200 steps, then the faces are told apart all at once.
    """
    truth = truths[s]
    text, _ = window([truth[:1]], 0, 0, {}, [], tokenizer)
    t = rng.randrange(len(truth))
    told = world.clip_facts(truth[t])
    if stage == "list":
        answers = []
        for _ in range(4):
            listing = respond([truth[t]], 0, None, [], rng, honest=True, everything=True)
            answers.append(listing)
    else:
        if stage == "people":
            told = [fact for fact in told if fact.category in ("wear", "action")]
        answers = [answer("now", [fact]) for fact in told]
    return text, answers, [s * len(truth) + t]


def window_example(truths, s, tokenizer, rng, honest):
    """Of a window of five clips with its memories and, at times, questions."""
    truth = truths[s]
    t = rng.randrange(len(truth))
    writer = rng.choice(["caption", "noisy"])            # whose memories stand in the window
    history = {}
    for c in range(max(0, t - 4), t):
        previous = history.get(c - 1, "") if c else None
        memory, _ = common.parse_response(respond(truth, c, previous, [], rng, honest))
        if writer == "caption":
            memory = world.caption(truth, c, previous, rng)
        history[c] = memory or ""
    questions = []
    if rng.random() < 0.4:
        environment = rng.choice(world.CATEGORIES)
        while len(questions) < 5:
            other = truths[rng.randrange(len(truths))]
            tasks = world.make_tasks("q", other, rng, 2)
            questions += [task["question"] for task in tasks if task["environment"] == environment]
    questions = questions[:5]
    prompt, clips = window(truths, s, t, history, questions, tokenizer)
    previous = history.get(t - 1, "") if t else None
    answers = []
    for number in range(ANSWERS):
        everything = honest and number == 0
        answers.append(respond(truth, t, previous, questions, rng, honest, everything))
    if honest:                                           # one list, three memories, two facts alone
        alone = rng.sample(world.clip_facts(truth[t]), 2)
        answers[1:3] = [answer(world.connector(previous), [fact]) for fact in alone]
    return prompt, answers, clips


def train_language(model, tokenizer, truths, seen, stage, steps, batch_size, peak):
    """One stage of the language model's training; `seen` holds the frozen vision tower's features."""
    params = [p for name, p in model.named_parameters() if ".visual." not in name]
    optimizer = torch.optim.AdamW(params, peak, betas=(0.9, 0.98), weight_decay=0.01)
    set_rate = schedule(peak, steps)
    rng = random.Random(f"{SEED} {stage}")
    began = time.time()
    mean = 0.0
    for step in range(steps):
        kind = stage.split()[0]
        size = batch_size
        # Whose coat, whose action: learnt last, and forgotten in windows unless it is kept up.
        if stage == "window" and step % 3 == 2:
            kind = "people"
            size = 24
        examples = [example(truths, tokenizer, rng, kind) for _ in range(size)]
        batch = pack(examples, tokenizer, model.config.video_token_id)
        loss = answer_loss(model, batch, seen)
        descend(optimizer, params, loss, set_rate, step)
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            row = batch.ids.shape[1]
            seconds = time.time() - began
            print(f"{stage} {step:5d}  loss {mean:.3f}  row {row}  {seconds:4.0f} s", flush=True)


# ---------------------------------------------------------------- what the base can do

def held_out(folder, first, count, blank=False):
    """Streams as 01 writes them (rows, tasks, judge), truly encoded; blank: grey frames, no facts."""
    rng = random.Random(SEED)
    rows = []
    tasks = []
    truth_rows = []
    for i in range(first, first + count):
        truth = world.make_stream(world.stream_seed(SEED, "base", i))
        name = f"base-{i}"
        path = pathlib.Path(folder) / (f"{name}-blank.mp4" if blank else f"{name}.mp4")
        world.write_stream_video(path, truth, blank)
        rows.append(world.stream_row(name, "base", str(path), len(truth)))
        truth_rows += world.truth_rows(name, truth)
        tasks += world.make_tasks(name, truth, rng)
    return rows, tasks, world.Judge(truth_rows)


def caption_contexts(rows, judge, count, k, rng):
    """`count` random windows of each stream, their histories written by the world's captions."""
    contexts = []
    for row in rows:
        truth = [judge.truth[row["stream"], clip["clip"]] for clip in row["clips"]]
        history = []
        previous = None
        for t in range(len(truth)):
            previous = world.caption(truth, t, previous, rng)
            history.append(previous)
        times = rng.sample(range(len(truth)), count)
        contexts += [common.make_context(row, t, history, (), k) for t in times]
    return contexts


# Per category the alternatives of each word of a value.
ALTERNATIVES = {
    "place": [world.PLACES],
    "wear": [list(world.COLOURS)],
    "action": [world.ACTIONS],
    "object": [list(world.COLOURS), world.OBJECTS],
    "count": [world.NUMBERS],
    "speech": [world.FIRST, world.SECOND],
}


@torch.no_grad()
def forced_decoding(policy, contexts, judge):
    """{category: share of facts that are right when the phrase up to the value is given}: what is perceived.

    The likeliest of all alternatives of each word of the value counts; a fact is right if all its words are.
    """
    right = {category: [] for category in world.CATEGORIES}
    for context in contexts:
        for fact, hits in forced_words(policy, context, judge):
            right[fact.category].append(all(hits))
    return {category: float(np.mean(hits)) for category, hits in right.items()}


def forced_words(policy, context, judge):
    """[(fact, [whether each word of its value is the likeliest])] of the newest clip's facts."""
    connector = world.connector(context.history[-1] if context.history else "")
    choices = []         # (fact, place of its first option in answers, which of its options is right)
    answers = []
    for fact in world.clip_facts(judge.truth[context.stream, context.clip]):
        phrase = world.say(fact)
        lead = f'plan: {fact.category}\n</think>\n\n{{"description": "{connector}, '
        lead += phrase[:phrase.index(fact.value)]
        for word, options in zip(fact.value.split(), ALTERNATIVES[fact.category]):
            choices.append((fact, len(answers), options.index(word)))
            texts = [lead + option for option in options]
            answers += policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
            lead += word + " "
    last = [row[-1] for row in common.logprobs(policy, context, answers)]
    last = torch.stack(last)                                                # (answers,)
    ends = [begin for _, begin, _ in choices[1:]] + [len(answers)]
    found = {}
    for (fact, begin, wanted), end in zip(choices, ends):
        likeliest = last[begin:end].argmax().item()
        found.setdefault(fact, []).append(likeliest == wanted)
    return list(found.items())


def watch(policy, rows, questions=()):
    """Writes clip by clip at inference sampling with its own history.

    Returns {stream: [[start, end, memory]]} and [(context, Sample)] of the same.
    """
    samples = []
    written = {row["stream"]: [] for row in rows}
    for t in range(len(rows[0]["clips"])):
        contexts = [context_of(row, t, written, questions) for row in rows]
        keys = [(SEED, 2, i, t) for i in range(len(rows))]
        groups = common.rollout(policy, contexts, 1, keys, 0.6, 0.95, 20)
        for row, context, [sample] in zip(rows, contexts, groups):
            samples.append((context, sample))
            clip = row["clips"][t]
            written[row["stream"]].append([clip["start"], clip["end"], sample.memory or ""])
    return written, samples


def context_of(row, t, written, questions=()):
    """The context of clip t after what `watch` has written."""
    memories = [memory for _, _, memory in written[row["stream"]]]
    return common.make_context(row, t, memories, questions)


def writing(policy, S, samples, judge):
    """Shares of `samples` [(context, Sample)] that are good or bad in some way, and what their facts are worth."""
    kinds = ("broken", "long_thinking", "over_budget", "unfaithful", "unclean", "twice", "fully_right")
    count = dict.fromkeys(kinds, 0)
    told = true = 0
    for context, sample in samples:
        count["broken"] += sample.memory is None
        count["long_thinking"] += sample.thinking_tokens > S.THINK_TOKENS
        if sample.memory is None:
            continue
        previous = context.history[-1] if context.history else ""
        is_faithful = judge.faithful(context, sample.memory)
        is_clean = judge.clean(previous, sample.memory)
        is_over = sample.memory_tokens > S.MEMORY_TOKENS
        phrases = world.phrases_of(sample.memory)
        count["over_budget"] += is_over
        count["unfaithful"] += not is_faithful
        count["unclean"] += not is_clean
        count["twice"] += len(phrases) > len(set(phrases))
        count["fully_right"] += is_faithful and is_clean and not is_over
        stated = world.facts(sample.memory)
        told += len(stated)
        true += len(set(stated) & set(world.clip_facts(judge.truth[context.stream, context.clip])))
    shares = {kind: n / len(samples) for kind, n in count.items()}
    tokens = np.mean([sample.memory_tokens for _, sample in samples if sample.memory])
    return shares | {"q": true / told, "facts": told / (len(samples) - count["broken"]),
                     "tokens": float(tokens)}


def samples_at_temperature_1(policy, rows, written):
    """[(context, Sample)], 8 for each clip, the histories being `written`."""
    contexts = []
    for row in rows:
        contexts += [context_of(row, t, written) for t in range(len(row["clips"]))]
    keys = [(SEED, 1, i) for i in range(len(contexts))]
    groups = common.rollout(policy, contexts, 8, keys)
    return [(context, sample) for context, group in zip(contexts, groups) for sample in group]


def answers(judge, tasks, written):
    """Accuracy, coverage and precision of the reader's answers, in %, pooled over the tasks."""
    right = covered = 0
    for task in tasks:
        reply = judge.answer(written[task["stream"]], task["question"], task["options"])
        right += reply == task["answer"]
        covered += reply != "insufficient"
    return {"accuracy": 100 * right / len(tasks), "coverage": 100 * covered / len(tasks),
            "precision": 100 * right / max(1, covered)}


def in_a_row(figures, digits=3):
    return "  ".join(f"{name} {value:.{digits}f}" for name, value in figures.items())


def measure(folder):
    """Prints the figures of the saved base: what it perceives, how it writes, what its memories answer.

    Base and base + task prompt are measured as 06 does it, on streams and with recent questions of the split
    "base" that nothing was trained on. It is all that the base is calibrated by.
    """
    S = common.settings({"__doc__": ""}, [f"--CPU_THREADS={THREADS}"])
    policy = common.load_policy(S)
    mix = {name: globals()[name] for name in MIX}
    print(f"mix: {mix}")
    rows, tasks, judge = held_out(folder, STREAMS, HELD_OUT)
    blanked, _, _ = held_out(folder, STREAMS, 20, blank=True)
    for name, streams in (("seen", rows[:20]), ("blanked", blanked)):
        contexts = caption_contexts(streams, judge, 4, S.K, random.Random(SEED))
        shares = forced_decoding(policy, contexts, judge)
        print(f"forced decoding, {name}, {len(contexts)} clips: {in_a_row(shares)}", flush=True)
    written, deployed = watch(policy, rows)
    print(f"temperature 0.6, own history: {in_a_row(writing(policy, S, deployed, judge))}")
    samples = samples_at_temperature_1(policy, rows[:20], written)
    print(f"temperature 1, the same history: {in_a_row(writing(policy, S, samples, judge))}", flush=True)
    plain = answers(judge, tasks, written)
    print(f"base, {len(tasks)} questions: {in_a_row(plain, 1)}")
    _, others, _ = held_out(folder, STREAMS + HELD_OUT, 5)
    prompted = []
    for environment in world.CATEGORIES:
        recent = [task["question"] for task in others if task["environment"] == environment][:5]
        asked = [task for task in tasks if task["environment"] == environment]
        without = answers(judge, asked, written)
        prompted.append(answers(judge, asked, watch(policy, rows, recent)[0]))
        print(f"  {environment:8} {in_a_row(without, 1)}   + task prompt: {in_a_row(prompted[-1], 1)}",
              flush=True)
    # Every environment has as many questions.
    accuracy = np.mean([row["accuracy"] for row in prompted])
    coverage = np.mean([row["coverage"] for row in prompted])
    print(f"base + task prompt: accuracy {accuracy:.1f}  coverage {coverage:.1f}  "
          f"precision {100 * accuracy / coverage:.1f}  gain {accuracy - plain['accuracy']:+.1f} points")


def save(model, tokenizer, folder):
    """Weights in bf16, config and tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    model.float()
    tokenizer.save_pretrained(folder)
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    shown = "  ".join(f"{name} {size:,} bytes" for name, size in sizes.items())
    print(f"saved {folder.name}: {shown}", flush=True)


class Tee:
    """Prints to the screen and keeps what was printed."""

    def __init__(self, screen):
        self.screen = screen
        self.printed = []

    def write(self, text):
        self.printed.append(text)
        return self.screen.write(text)

    def flush(self):
        self.screen.flush()


def kept_step(name, model, key, work):
    """Runs work(), which trains `model`, and keeps weights and log; a like run reads them back.

    Every step of the making starts from a fresh optimizer and its own seed, so reading back equals running.
    Returns (the key for the next step, seconds that the work took).
    """
    key = f"{zlib.crc32(repr((name, key)).encode()):08x}"
    path = ROOT / "runs" / "base" / f"{name}-{key}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        print(saved["log"], end="", flush=True)
    else:
        began = time.time()
        tee = Tee(sys.stdout)
        with contextlib.redirect_stdout(tee):
            work()
        saved = {"weights": model.state_dict(), "log": "".join(tee.printed),
                 "seconds": time.time() - began}
        with written_aside(path) as aside:
            torch.save(saved, aside)
    model.load_state_dict(saved["weights"])
    return key, saved["seconds"]


# The steps of the language model: (name, steps, batch size, peak of the learning rate).
LANGUAGE_STEPS = [
    ("list", LIST_STEPS, 16, 2e-3),
    ("single", SINGLE_STEPS, 16, 2e-3),
    ("people", PEOPLE_STEPS, 24, 2e-3),
    ("people again", PEOPLE_STEPS, 24, 2e-3),
    ("window", WINDOW_STEPS, 8, 1.5e-3),
    ("noisy", NOISY_STEPS, 8, 1e-3),
]


MIX = ("WRONG", "WRONG_CONNECTOR", "CAREFUL", "BROKEN", "LONG_PLAN", "FACTS", "ASKED")


def main():
    start = sys.argv[1] if len(sys.argv) > 1 else ""
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    began = time.time()
    tokenizer = load_or_make_tokenizer()
    model = make_model(tokenizer)
    model.set_experts_implementation("grouped_mm")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    truths, frames = decoded_streams(0, AGAIN_STREAMS if start else STREAMS)
    spent = time.time() - began
    print(f"{len(frames)} clips rendered, encoded and decoded in {spent:.0f} s", flush=True)

    # ---------------- the vision tower, or a whole base to begin from
    visual = model.model.visual
    steps_to_do = LANGUAGE_STEPS
    if start:
        weights = load_file(f"{start}/model.safetensors")
        model.load_state_dict(weights)
        key = (start, zlib.crc32((pathlib.Path(start) / "model.safetensors").read_bytes()))
        steps_to_do = [("noisy", AGAIN_STEPS, 8, 1e-3)]
    else:
        key, seconds = kept_step("vision", model, (SEED, STREAMS, VISION_STEPS),
                                 lambda: train_vision(visual, truths, frames))
        spent += seconds
    seen = features(visual, frames)
    del frames

    # ---------------- the language model
    mix = tuple(globals()[name] for name in MIX)
    for name, steps, size, peak in steps_to_do:
        key = (key, steps, size, peak, ANSWERS, mix if name == "noisy" else ())
        key, seconds = kept_step(
            name, model, key,
            lambda: train_language(model, tokenizer, truths, seen, name, steps, size, peak))
        spent += seconds

    # ---------------- save, and what it can do
    began = time.time()
    save(model, tokenizer, HERE / "base")
    with tempfile.TemporaryDirectory() as folder:
        measure(folder)
    print(f"{(spent + time.time() - began) / 60:.1f} minutes in all")


def load_or_make_tokenizer():
    """A tokenizer that is there stays, because kept steps and adapters of runs are trained on its ids."""
    from transformers import AutoTokenizer
    if (HERE / "base" / "tokenizer.json").exists():
        return AutoTokenizer.from_pretrained(HERE / "base")
    return make_tokenizer()


if __name__ == "__main__":
    main()
