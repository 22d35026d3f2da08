"""What the six stages share and nobody needs to edit to try an idea. Three ideas carry the file:
  1. A group is one row. G answers to one prompt share its keys and values, in sampling as in training:
     every cached or packed token has an owner, and a query sees the prompt and its own answer (`visible`).
  2. Vision runs once per clip. The tower is frozen: a clip's features serve rollout, log-probs and training.
  3. A sample's noise depends on (seed, step, context, sample) alone: a resumed run repeats itself exactly.
"""
import contextlib, csv, difflib, importlib, json, math, re, signal, sys, time
from collections import namedtuple
from types import SimpleNamespace

from loading import (FILES, RANK, ROOT, WORLD, add_gradients, flash, gather, load_model, once, read_json,
                     read_jsonl, write_json, write_jsonl, write_text, written_aside)
from video import clip_frames

try:                                   # --help must work before anything is installed
    import numpy as np
    import torch
    import torch.nn.functional as F
except ImportError:
    np = torch = F = None

both = namedtuple("both", "tiny full")  # two values of a constant: the embedded world's | a full-size model's
# ---------------------------------------------------------------- constants of all scripts: --NAME=value
RUN = "tiny"                            # results go to runs/RUN/STAGE
FROM = ""                               # another run, read where RUN lacks a stage (forks, ablations)
MODEL = "tiny"                 # "tiny": tiny/base; else a hub name (Qwen/Qwen3-VL-30B-A3B-Thinking) or folder
SEED = 0                                # every random choice derives from it
JUDGE = "tiny"                          # who judges and reads: "tiny" is the embedded world's exact one
K = 5                                   # clips per context: the newest and the 4 before it (paper, section 1)
FRAMES_PER_CLIP = both(4, 20)           # 20 a clip is 2 fps, the model's native rate
FRAME_PIXELS = both(96 * 96, 448 * 448)  # of a frame at most; 32 x 32 pixels of 2 frames make one token
MEMORY_TOKENS = both(17, 150)     # budget of one memory (paper, section 2); 17: three of a clip's eight facts
THINK_TOKENS = both(16, 1200)           # L of r_len (paper, section 2)
MAX_NEW_TOKENS = both(72, 2800)         # thinking up to 2L, then the memory
BITS = both(16, 4)                      # of the weights: 4 packs linears and experts as NF4 while they load
VISION_BITS = both(16, 16)              # 4: the vision tower's linears too, 0.8 GiB less
DOUBLE_QUANT = 0                        # 1: the scales of packed weights in 8 bits, 1.3 GiB less
FEATURE_CLIPS = both(4000, 200)         # clips whose vision features are kept: about 30 MB each at full size
ROLLOUT_CONTEXTS = both(48, 0)          # contexts decoded side by side; 0: as many as the card's memory holds
CPU_THREADS = 2                   # more hurt a small model, and results stay the same from machine to machine
READER_TOKENS = both(2000, 32000)       # memories that the reader sees at most; of more, the most relevant
LORA_RANK = 16                          # on the language model's attention; alpha = 2 * rank
# ----------------------------------------------------------------
FIXED = ("PROMPT", "ASK_TO_THINK", "TASK_PROMPT", "DECODE_SECONDS", "RANK", "WORLD")  # not by --NAME=value
HARMLESS = ("RUN", "SHOW", "ENVIRONMENT", "READERS", "PRINT_EVERY", "SAVE_EVERY", "WORKERS", "CPU_THREADS")
# ================================================================ settings and files
def settings(module, argv=None):
    """Namespace of UPPER_CASE constants of common.py and a script (module: its `globals()`): `--NAME=value`
    is applied, each `both` resolved by MODEL. SystemExit (nearest name, expected type) on a bad argument."""
    names = {n: v for n, v in (globals() | module).items()
             if n.isupper() and isinstance(v, (str, int, float, both)) and n not in FIXED and len(str(v)) < 90}
    argv, given = sys.argv[1:] if argv is None else argv, {}
    if {"-h", "--help"} & set(argv):
        print(module["__doc__"] + "\nConstants (--NAME=value; two values: embedded world | full-size model):")
        for n, v in names.items():
            print(f"  {n:20} {v.tiny!r} | {v.full!r}" if isinstance(v, both) else f"  {n:20} {v!r}")
        raise SystemExit(0)
    for arg in argv:
        name, eq, text = arg.removeprefix("--").partition("=")
        if name not in names or not eq or not arg.startswith("--"):
            near, = difflib.get_close_matches(name.upper(), names, 1, 0)
            raise SystemExit(f"unknown argument {arg!r}: write --NAME=value; the nearest name is --{near}")
        given[name] = text
    full = given.get("MODEL", names["MODEL"]) != "tiny"
    S = {n: v[full] if isinstance(v, both) else v for n, v in names.items()}
    for name, text in given.items():
        kind, usual = type(S[name]), S[name]
        try:
            value = int(float(text)) if kind is int and float(text) == int(float(text)) else kind(text)
        except (ValueError, OverflowError):
            raise SystemExit(f"--{name}={text}: expected {kind.__name__}, like {usual!r}") from None
        twin = names[name].tiny if isinstance(names[name], both) and kind is float else None
        if full and twin == value and usual and not 0.1 < value / usual < 10:
            raise SystemExit(f"--{name}={text} is the embedded world's value; "
                             f"for {S['MODEL']} start from {usual}")
        S[name] = value
    return SimpleNamespace(**S)

def start(S, stage):
    """Folder runs/RUN/stage, after comparing S with the settings saved there. SystemExit on a difference."""
    if torch is None:
        raise SystemExit("torch and numpy are missing: ./run.sh setup (or pip install -r requirements.txt)")
    out = ROOT / "runs" / S.RUN / stage                             # an absolute RUN stays as it is
    out.mkdir(parents=True, exist_ok=True)
    now, file = {n: v for n, v in vars(S).items() if n not in HARMLESS}, out / "settings.json"
    binds = lambda p: p.name not in ("settings.json", "files.jsonl", "speech", "faces")     # a failed try: none
    begun = once(lambda: file.exists() and any(map(binds, out.iterdir())))
    saved = read_json(file) if begun else now
    changed = [f"  {n}: {saved.get(n)!r} in the run, {now.get(n)!r} now\n" for n in sorted(saved | now)
               if saved.get(n) != now.get(n)]
    if changed:
        raise SystemExit(f"{out} was made with other settings:\n{''.join(changed)}Take a new name and read the "
                         f"earlier stages from this run: --RUN=NEWNAME --FROM={S.RUN}; or delete that folder")
    print(f"---- {stage} -> {out}\n" + "  ".join(f"{n}={v}" for n, v in now.items()))
    if not getattr(S, "SHOW", 0):
        write_json(file, now)
    return out

def need(S, name):
    """Path of runs/RUN/name, or of runs/FROM/name. Raises SystemExit naming the script that makes it."""
    paths = [ROOT / "runs" / run / name for run in (S.RUN, S.FROM) if run]
    if found := [p for p in paths if p.exists()]:
        return found[0]
    maker = next(ROOT.glob(f"0?_*{name.split('/')[0]}*.py")).name   # a script's name holds its stage's folder
    raise SystemExit(f"{' or '.join(map(str, paths))} is missing. Make it first: "
                     f"python {maker} --RUN={S.RUN}, or name a run that has it: --FROM=OTHERRUN")

def load_streams(S, split):
    """Stream rows of one split, with clip files made absolute. Raises SystemExit if there are none."""
    path, online = need(S, "streams/streams.jsonl"), "online" if split != "train" else split
    rows = [r for r in read_jsonl(path) if r["split"] in (split, online)]
    if not rows:
        raise SystemExit(f"{path} holds no stream of the split {split!r}: see SPLIT in 01_make_streams.py")
    for clip in (c for r in rows for c in r["clips"]):
        clip["file"] = str(path.parent / clip["file"])              # an absolute path stays as it is
    return rows

def clock(seconds):                             # stream time as HH:MM:SS, from the second day on with its day
    s = int(seconds)
    return f"day {s // 86400 + 1}, " * (s >= 86400) + f"{s // 3600 % 24:02}:{s // 60 % 60:02}:{s % 60:02}"
slug = lambda name: re.sub(r"[^\w+.-]+", "_", name)                   # an environment's name as a folder's
# ================================================================ memory format
class Context(namedtuple("Context", "stream clips history questions")):
    """The last k clips (rows of streams.jsonl), memories of all but the newest, and questions."""
    clip = property(lambda self: self.clips[-1]["clip"])
    prompt = lambda self, *how: importlib.import_module("02_phase1_train").build_prompt(self, *how)
Sample = namedtuple("Sample", "ids text memory thinking_tokens memory_tokens truncated")
Sample.__doc__ = "One answer. ids: its tokens, end token included; memory: None when malformed; *_tokens: counts."

def make_context(stream, t, memories, questions=(), k=5):
    """Context of clip t: `memories[i]` is the memory of clip i ("" or missing where none was kept)."""
    first = max(0, t - k + 1)
    memories = memories if isinstance(memories, dict) else dict(enumerate(memories))
    return Context(stream["stream"], stream["clips"][first:t + 1],
                   [memories.get(i, "") for i in range(first, t)], list(questions))

def parse_response(text):
    """(memory, thinking) of a response; memory is None unless it is exactly one `</think>` and then one JSON
    object with the single key `description`, not empty (paper, section 2, r_fmt).
    >>> parse_response('a cup\\n</think>\\n\\n{"description": "<face_3> waves."}')
    ('<face_3> waves.', 'a cup')
    """
    thinking, _, rest = text.partition("</think>")
    try:
        pairs = json.loads(rest, object_pairs_hook=tuple)     # a tuple of pairs, so that a repeated key shows
        (key, memory), = pairs
        ok = (isinstance(pairs, tuple) and key == "description" and "</think>" not in rest
              and memory.strip().encode())
    except (AttributeError, RecursionError, TypeError, ValueError):
        ok = False
    return memory.strip() if ok else None, thinking.strip()
# ================================================================ frames to patches
def frame_size(height, width, pixels):
    """(height, width) in multiples of 32, at most `pixels`, the aspect ratio kept as well as that allows."""
    h, w = max(1, round(height / 32)) * 32, max(1, round(width / 32)) * 32
    if h * w > pixels:
        scale = math.sqrt(height * width / pixels)
        h, w = (max(32, math.floor(x / scale / 32) * 32) for x in (height, width))
    return h, w

def frames_to_patches(frames, pixels):
    """Frames (n, H, W, 3) uint8 to what the vision tower reads (as Qwen3VLVideoProcessor, which needs
    torchvision). An odd n repeats the last frame. Returns patches (n/2 * h * w, 3 * 2 * 16 * 16) in merge
    order, normalised to [-1, 1], and the grid (n/2, h, w) in patches of 16 pixels."""
    x = torch.as_tensor(frames).permute(0, 3, 1, 2)                                   # (n, 3, H, W) uint8
    size = frame_size(*x.shape[2:], pixels)
    if size != tuple(x.shape[2:]):                                                  # of uint8, as the library
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
    x = torch.cat([x, x[-1:]]) if len(x) % 2 else x
    t, h, w = len(x) // 2, size[0] // 16, size[1] // 16
    x = (x.float() / 127.5 - 1).view(t, 2, 3, h // 2, 2, 16, w // 2, 2, 16)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)   # (t, h/2, w/2, 2, 2, 3, 2, 16, 16): a token's 4 are neighbours
    return x.reshape(t * h * w, -1), (t, h, w)
# ================================================================ the policy: one frozen model, its adapters
Prompt = namedtuple("Prompt", "ids embeds positions visual deep")
# ids (P,); embeds (P, d) with vision in; positions (3, P); visual (P,) bool; deep: (V, d) a deepstack layer
WRITERS = {"base": ["base"], "phase1": ["base", "phase1"], "phase2": ["base", "phase1", "phase2"],
           "reward": ["base", "reward"]}                             # and what each builds on

class Policy:
    """Qwen3-VL and what can be switched on it. `use(writer)` chooses who writes: "base", "phase1" (with what
    02 trained), "phase2" (and 05's adapter); or "reward", 04's LoRA, which reads. lm: its decoder; hidden: d;
    end: id of the end token; banned: ids never sampled (<|video_pad|> would crash the next pass), masked in
    log-probs too; closing: ids that may end a JSON object; side: contexts, and samples of one, that fit."""
    def __init__(self, model, tokenizer, contexts, samples, S):
        self.model, self.lm, self.head = model, model.model.language_model, model.lm_head
        self.tokenizer, self.S, self.device, self.side = tokenizer, S, model.device, (contexts, samples)
        self.hidden, self.layers = self.lm.config.hidden_size, len(self.lm.layers)
        self.who, self.trainable, self.features, self.flash = "base", [], {}, flash(model)
        self.kind, self.lora, self.whole = {}, {}, {}   # per writer: "lora" ..; its PEFT name; its weights
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        special = {i for i, t in tokenizer.added_tokens_decoder.items()
                   if re.fullmatch(r"<\|.*\|>", t.content)}
        self.banned = torch.tensor(sorted(special - {self.end}), device=self.device)
        self.closing = {i for token, i in tokenizer.get_vocab().items() if "}" in token}

    def add(self, writer, kind, folder=None):
        """Adds to a writer: "lora" (on the language model's attention), "steer" (as in the paper: a vector
        (d,) on a decoder layer's output, h <- h + a) or "all" (a whole new decoder; vision, embeddings, head
        stay frozen). New, then without effect, or what `save_adapter` wrote to `folder` -> its parameters."""
        from safetensors.torch import load_file
        saved = load_file(str(folder / FILES[kind]), str(self.device)) if folder else {}
        if kind == "lora":
            from peft import LoraConfig, set_peft_model_state_dict
            self.lora[writer] = name = f"{writer}_{time.time_ns()}"               # a name that was never used
            self.model.add_adapter(LoraConfig.from_pretrained(str(folder)) if folder else LoraConfig(
                r=self.S.LORA_RANK, lora_alpha=2 * self.S.LORA_RANK,
                target_modules=r".*language_model.*self_attn\.[qkvo]_proj"), name)
            params = [p for n, p in self.model.named_parameters() if f".{name}." in n]
            torch.nn.ParameterList(params).float()   # in bf16 the updates of a low rate would round to nothing
            state = {k.removeprefix("base_model.model."): v for k, v in saved.items()}
            set_peft_model_state_dict(self.model, state, name) if folder else None
        elif kind == "steer":
            (key, vector), = saved.items() or [(f"layers.{self.S.LAYER}.", torch.zeros(self.hidden))]
            self.layer = int(key.split("layers.")[1].split(".")[0])
            if not 0 <= self.layer < self.layers:
                raise SystemExit(f"LAYER={self.layer}: this model has the layers 0 to {self.layers - 1}; "
                                 f"near {round(self.layers * 22 / 48)} is the paper's depth (22 of 48)")
            self.steer = torch.nn.Parameter(vector.to(self.device))
            self.hook = self.lm.layers[self.layer].register_forward_hook(lambda _, args, out: (
                out + self.steer.to(out.dtype) if self.who == "phase2" else None))
            params = [self.steer]
        else:
            if self.model.dtype != torch.float32 or self.S.BITS == 4:
                raise SystemExit("training all parameters needs a model in fp32: "
                                 'use TRAIN="lora" or ADAPTER="steer"')
            params = list(self._decoder().values())
            self.whole.setdefault("base", {n: p.data for n, p in self._decoder().items()})
            self.whole[writer] = saved or {n: p.data.clone() for n, p in self._decoder().items()}
        self.kind[writer] = kind
        self.use(writer)
        return params

    def _decoder(self):
        return {n.replace(".base_layer", ""): p for n, p in self.lm.named_parameters() if "lora_" not in n
                and "embed_tokens" not in n}

    def use(self, writer):
        """Switches the writer; weights trained whole change places with those in the model."""
        whole = next((self.whole[w] for w in WRITERS[writer][::-1] if w in self.whole), None)
        for n, p in self._decoder().items() if whole else ():
            p.data = whole[n]
        self.who, names = writer, [self.lora[w] for w in WRITERS[writer] if w in self.lora]
        if names:
            self.model.enable_adapters()
            self.model.set_adapter(names)
        elif self.lora:
            self.model.disable_adapters()
        self.train_only(self.trainable)

    def train_only(self, params):
        self.trainable = params
        self.model.requires_grad_(False)
        torch.nn.ParameterList(params).requires_grad_(True)

    def attend(self, mask):
        """Before a pass: flash-attn takes no mask, SDPA any. Only training mode checkpoints the layers."""
        self.lm.config._attn_implementation = "flash_attention_2" if mask is None and self.flash else "sdpa"
        self.lm.train(torch.is_grad_enabled() and self.S.MODEL != "tiny")

    @contextlib.contextmanager
    def using(self, writer):
        before = self.who
        self.use(writer)
        try:
            yield self
        finally:
            self.use(before)

    def drop(self, writer):
        """Forgets what `writer` has beyond those it builds on; the last of them is switched on."""
        self.use(WRITERS[writer][-2])
        kind = self.kind.pop(writer, None)
        if kind == "lora":
            self.model.delete_adapter(self.lora.pop(writer))
        elif kind:
            self.hook.remove() if kind == "steer" else self.whole.pop(writer)

    def prepare(self, contexts):
        """Prompts of contexts; vision features come from a cache, as the tower is frozen."""
        key = lambda clip: (clip["file"], clip["offset"], clip["end"] - clip["start"])
        new = list({key(c): c for x in contexts for c in x.clips if key(c) not in self.features}.items())
        size = max(1, 256 // self.S.FRAMES_PER_CLIP)                            # many small clips in one pass
        for i in range(0, len(new), size):
            self._see(dict(new[i:i + size]))
        prompts = [self._prompt(x, [self.features[key(c)] for c in x.clips]) for x in contexts]
        while len(self.features) > self.S.FEATURE_CLIPS:                          # oldest first
            del self.features[next(iter(self.features))]
        return prompts

    def _see(self, clips):
        patches, grids, times = [], [], []
        for clip in clips.values():
            frames, at = clip_frames(clip, self.S.FRAMES_PER_CLIP)             # (n, H, W, 3), seconds
            p, grid = frames_to_patches(frames, self.S.FRAME_PIXELS)
            at += at[-1:] * (len(at) % 2)
            times.append([(a + b) / 2 for a, b in zip(at[::2], at[1::2])])            # one per pair of frames
            patches, grids = patches + [p], grids + [grid]
        visual, sizes = self.model.model.visual, [t * h * w // 4 for t, h, w in grids]   # tokens of each clip
        with torch.no_grad():
            out = visual(torch.cat(patches).to(self.device, visual.dtype), return_dict=True,
                         grid_thw=torch.tensor(grids, device=self.device))
        layers = [x.split(sizes) for x in (out.pooler_output, *out.deepstack_features)]  # of each clip (V, d)
        for name, grid, at, *features in zip(clips, grids, times, *layers):
            self.features[name] = grid, at, [x.clone() for x in features]

    def _prompt(self, context, features):
        video = [[(t, h * w // 4) for t in times] for (_, h, w), times, _ in features]
        text = context.prompt(video, self.tokenizer)
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        visual = ids == self.model.config.video_token_id
        grid = torch.tensor([g for g, _, _ in features]) if features else None
        positions, _ = self.model.model.get_rope_index(ids[None], visual[None].int() * 2, video_grid_thw=grid)
        ids, positions, visual = (x.to(self.device) for x in (ids, positions[:, 0], visual))
        embeds = self.lm.embed_tokens(ids).detach().clone()                           # (P, d)
        none = [embeds[:0]] * (1 + len(self.model.config.vision_config.deepstack_visual_indexes))
        pooled, *deep = [torch.cat(x) for x in zip(none, *(f for _, _, f in features))]    # (V, d) each
        embeds[visual] = pooled.to(embeds.dtype)
        return Prompt(ids, embeds, positions, visual, deep)
# ================================================================ rollout and log-probs: a group is one row
def visible(owner_q, owner_k):
    """Who sees whom: the prompt (owner 0) is seen by all, an answer (owner 1..G) by itself, padding (-1) by
    padding. owner_q (B, Q), owner_k (B, T) -> bool (B, 1, Q, T)."""
    return ((owner_k[:, None] == 0) | (owner_k[:, None] == owner_q[:, :, None]))[:, None]

def pick(logits, u, temperature=1.0, top_p=1.0, top_k=0):
    """Tokens by the inverse CDF: one uniform number a token, so that noise is independent of batch and order.
    logits (..., V), u (...) in [0, 1) -> (...) ids. top_k acts before top_p, as in transformers' generate."""
    p = (logits.float() / temperature).softmax(-1)                                    # (..., V)
    if 0 < top_k < p.shape[-1]:
        p = p.where(p >= p.topk(top_k).values[..., -1:], 0)
    if top_p < 1:
        ranked, order = (p / p.sum(-1, keepdim=True)).sort(-1, descending=True)
        p = p.scatter(-1, order, ranked.where(ranked.cumsum(-1) - ranked < top_p, 0))
    cdf = p.double().cumsum(-1)
    return (cdf <= u[..., None] * cdf[..., -1:]).sum(-1).clamp(max=p.shape[-1] - 1)

def rollout(policy, contexts, n, keys, temperature=1.0, top_p=1.0, top_k=0):
    """n samples per context -> list of lists of Sample, by the writer that is switched on. keys: a tuple of
    ints >= 0 per context; sample j draws its noise from (*key, j) alone. Each prompt is prefilled once and
    its cache is never copied: the n samples are columns of one row, and a finished one leaves the row."""
    size, limit, answers = policy.side[0], policy.S.MAX_NEW_TOKENS, []
    for i in range(0, len(contexts), size):
        noise = np.stack([[np.random.default_rng([*k, j]).random(limit) for j in range(n)]
                          for k in keys[i:i + size]])
        noise = torch.tensor(noise, device=policy.device)                             # (B, n, T)
        with torch.no_grad():
            answers += _decode(policy, policy.prepare(contexts[i:i + size]), noise, temperature, top_p, top_k)
    return [[as_sample(policy, ids) for ids in group] for group in answers]

def _decode(policy, prompts, noise, temperature, top_p, top_k):
    """noise (B, n, T) -> B lists of n lists of ids. Where n samples don't fit beside one prompt, they are
    columns of the row in turns, and the cache is cut back to the prompt in between."""
    from transformers import DynamicCache
    (B, n, _), device = noise.shape, policy.device
    pad = lambda rows, value=0: torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side="left")
    owner = pad([p.ids * 0 for p in prompts], -1)                                     # (B, P)
    mask = visible(owner, owner).tril() if (owner < 0).any() else None              # None: plain causal, fast
    cache = DynamicCache(config=policy.lm.config)
    policy.attend(mask)
    hidden = policy.lm(inputs_embeds=pad([p.embeds for p in prompts]), attention_mask=mask,       # (B, P, d)
                       position_ids=pad([p.positions.T for p in prompts]).permute(2, 0, 1),       # (3, B, P)
                       visual_pos_masks=pad([p.visual for p in prompts]),                         # (B, P)
                       deepstack_visual_embeds=[torch.cat(x) for x in zip(*(p.deep for p in prompts))],
                       past_key_values=cache, use_cache=True).last_hidden_state
    after = torch.stack([p.positions.max() + 1 for p in prompts])                   # (B,) of the first tokens
    answers, width = [[] for _ in prompts], policy.side[1] if B == 1 else n
    for i in range(0, n, width):
        u = noise[:, i:i + width]
        for mine, new in zip(answers, _columns(policy, cache, hidden[:, -1:].expand(-1, u.shape[1], -1),
                                               owner, after, u, (temperature, top_p, top_k))):
            mine += new
        if i + width < n:
            cache.crop(owner.shape[1] - cache.get_seq_length())
    return answers

def _columns(policy, cache, hidden, owner, after, noise, how):
    """`_decode` on a filled cache: hidden (B, n, d) of the last prompt token, owner (B, P), after (B,). An
    answer ends with its end token, or any other after its JSON object, as that is malformed anyway."""
    (B, n, limit), device = noise.shape, policy.device
    answers, rows, closed = [[[] for _ in range(n)] for _ in range(B)], list(range(B)), set()
    who = torch.arange(n, device=device).expand(B, n)                               # (R, W) sample, -1 = none
    policy.attend(owner)
    for step in range(limit):
        logits = policy.head(hidden)                                                  # (R, W, V)
        logits[..., policy.banned] = -torch.inf
        u = noise[rows, :, step].gather(1, who.clamp(min=0))                          # (R, W)
        alive = []                                                                  # a row's (sample, token)s
        for row, names, ids in zip(rows, who.tolist(), pick(logits, u, *how).tolist()):
            for j, token in (drawn := [x for x in zip(names, ids) if x[0] >= 0]):
                answers[row][j].append(token)
            alive.append([(j, token) for j, token in drawn if token != policy.end and (row, j) not in closed])
            closed |= {(row, j) for j, token in alive[-1] if token in policy.closing
                       and parse_response(policy.tokenizer.decode(answers[row][j]))[0]}
        width = max(map(len, alive))
        if width == 0 or step == limit - 1:
            return answers
        keep = [r for r, a in enumerate(alive) if a]
        if len(keep) < len(rows):                                                     # finished prompts leave
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            rows, alive, owner, after = (
                [rows[r] for r in keep], [alive[r] for r in keep], owner[index], after[index])
        padded = [a + [(-1, policy.end)] * (width - len(a)) for a in alive]
        who, ids = torch.tensor(padded, device=device).unbind(-1)                     # (R, W) each
        label = torch.where(who < 0, -1, who + 1)
        owner = torch.cat([owner, label], 1)                                          # (R, T)
        hidden = policy.lm(inputs_embeds=policy.lm.embed_tokens(ids), attention_mask=visible(label, owner),
                           position_ids=(after + step)[None, :, None].expand(3, -1, width),
                           past_key_values=cache, use_cache=True).last_hidden_state   # (R, W, d)

def as_sample(policy, ids):
    ended, count = bool(ids) and ids[-1] == policy.end, lambda text: len(policy.tokenizer(text)["input_ids"])
    text, cut = policy.tokenizer.decode(ids[:-1] if ended else ids), len(ids) == policy.S.MAX_NEW_TOKENS
    memory, thinking = parse_response(text)
    return Sample(list(ids), text, memory, count(thinking), count(memory or ""), cut and not ended)

def logprobs(policy, context, answers):
    """Log-probs of each answer's tokens given the context, all packed into one row [prompt | a1 | ... | aG].
    answers: lists of ids. Returns a list of (T_i,) fp32 tensors, with gradient where it is enabled. The head
    runs one answer at a time under checkpointing: (T, V) logits exist for one answer only."""
    from torch.utils.checkpoint import checkpoint
    prompt, = policy.prepare([context])
    P, ids = len(prompt.ids), [torch.tensor(a, device=policy.device) for a in answers]
    owner = torch.cat([prompt.ids * 0] + [torch.full_like(a, j + 1) for j, a in enumerate(ids)])[None]
    own = [prompt.positions.max() + 1 + torch.arange(len(a), device=policy.device) for a in ids]
    positions = torch.cat([prompt.positions] + [x.expand(3, -1) for x in own], 1)
    embeds = torch.cat([prompt.embeds, policy.lm.embed_tokens(torch.cat(ids)).to(prompt.embeds.dtype)])
    policy.attend(owner)                       # owner (1, T), positions (3, T), embeds and hidden (T, d)
    # as numbers: of booleans, SDPA would make and keep such a (T, T) in every layer
    mask = torch.where(visible(owner, owner).tril(), embeds.new_zeros(()), -torch.inf)
    hidden = policy.lm(inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=False,
                       attention_mask=mask, deepstack_visual_embeds=prompt.deep,
                       visual_pos_masks=F.pad(prompt.visual[None], (0, len(embeds) - P))).last_hidden_state[0]
    def of_answer(rows, a):                                                          # rows (T_i, d), a (T_i,)
        logits = policy.head(rows).float().index_fill(1, policy.banned, -torch.inf)   # (T_i, V)
        return logits.gather(1, a[:, None])[:, 0] - logits.logsumexp(1)               # (T_i,)
    first, own = hidden[P - 1:P], hidden[P:].split([len(a) for a in ids])   # row P - 1 predicts every first
    return [checkpoint(of_answer, torch.cat([first, x[:-1]]), a, use_reentrant=False)
            for x, a in zip(own, ids)]
# ================================================================ group-relative policy optimisation
def group_advantages(rewards, gate=None):
    """A_i = (r_i - mean r) / std r over the whole group, and which samples count (the NSR gate; paper,
    section 2). gate: the reward that decides whether a sample below the mean may be pushed down: only if its
    gate is negative. None: no gate. A group with a population std under 1e-6 gets zeros.
    >>> A, counts = group_advantages([0.5, 0.5, -0.5, 0.3], gate=[0.5, 0.5, -0.5, 0.3])
    >>> [round(a, 2) for a in A], counts
    ([0.73, 0.73, -1.7, 0.24], [True, True, True, True])
    >>> group_advantages([0.5, 0.4], gate=[0.5, 0.4])[1]  # the lower is still a good memory: not pushed down
    [True, False]
    """
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    advantages = [(r - mean) / std if std > 1e-6 else 0.0 for r in rewards]
    return advantages, [a >= 0 or gate is None or g < 0 for a, g in zip(advantages, gate or rewards)]

def policy_loss(logp, old, advantages, counts, ratio="gspo", clip=(0.2, 0.28)):
    """Clipped loss of one group: -mean_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i) (paper, section 2).
    logp, old: lists of (T_i,); ratio "gspo": s_i = exp(mean_t(logp - old)) per sequence, "grpo": per token,
    then the mean. A sample that doesn't count adds zero, yet is in the divisor -> (loss, clipped share)."""
    total, clipped, low, high = 0.0, 0.0, 1 - clip[0], 1 + clip[1]
    for new, was, A, counted in zip(logp, old, advantages, counts):
        if A and counted:
            s = (new - was).mean().exp()[None] if ratio == "gspo" else (new - was).exp()  # (1,) or (T,)
            total = total - torch.minimum(s * A, s.clamp(low, high) * A).mean()           # ()
            clipped += ((s > high) if A > 0 else (s < low)).float().mean().item()
    return total / len(logp), clipped / len(logp)

def kl_to(logp, reference):
    """KL to the reference, per token by the estimator exp(d) - d - 1, d = ref - logp; mean over samples."""
    gap = [r - n for n, r in zip(logp, reference)]
    return sum((g.exp() - g - 1).mean() for g in gap) / len(gap)

def grpo(policy, S, out, params, batch, reward, log_row, reference):
    """The loop of 02 (and of 05 on-policy): rollout, reward, advantage, update, log, save; resumes from
    `out`. batch: `next(step)` -> contexts, `update(step, samples)`, and `state` (any JSON). reward(contexts,
    samples) -> per group {"total": [..], "gate": [..], "terms": {name: [..]}}, None where a judge failed.
    log_row: 02's. reference: the writer that KL refers to. With SHOW the first group is returned."""
    if S.RATIO not in ("gspo", "grpo"):
        raise SystemExit(f'RATIO={S.RATIO}: take "gspo" (a ratio per sequence) or "grpo" (per token)')
    policy.train_only(params)
    run = Training(S, out, params, batch)
    for step in run:
        # ---- rollout
        began, contexts = time.time(), batch.next(step)
        mine = range(RANK, len(contexts), WORLD)                                 # of several GPUs, this one's
        samples = rollout(policy, [contexts[i] for i in mine], S.GROUP, [(S.SEED, step, i) for i in mine])
        rolled = time.time()
        # ---- reward and advantage
        scores = gather(reward([contexts[i] for i in mine], samples))
        samples, judged = gather(samples), time.time()
        groups = [_group(c, s, r, S.GATE) for c, s, r in zip(contexts, samples, scores)]
        if S.SHOW:
            return contexts[0], samples[0], scores[0], groups[0]
        lost = sum(t is None for r in scores for t in r["total"])
        if lost * 2 > S.GROUP * len(contexts):
            raise SystemExit(f"step {step}: the judge failed on {lost} of {S.GROUP * len(contexts)} samples; "
                             f"mend it and run again, it goes on from the last checkpoint")
        # ---- update: the ratio is 1 in the first mini-batch, the others need the log-probs from before it
        used = [(g, i % WORLD == RANK) for i, g in enumerate(groups) if g and any(g["advantages"])]
        size = math.ceil(len(used) / math.ceil(max(1, len(used)) / S.MINI_BATCH))     # even mini-batches
        with torch.no_grad():
            for g in [g for g, here in used[size:] if here]:
                g["old"] = logprobs(policy, g["context"], g["ids"])
            with policy.using(reference):
                for g in [g for g, here in used if here and S.KL]:
                    g["reference"] = logprobs(policy, g["context"], g["ids"])
        sums, clip = dict(kl=0.0, clipped=0.0, grad_norm=0.0), (S.CLIP_LOW, S.CLIP_HIGH)
        for i in range(0, len(used), max(1, size)):
            for g in [g for g, here in used[i:i + size] if here]:                # memory holds one packed row
                logp = logprobs(policy, g["context"], g["ids"])
                old = g.get("old") or [x.detach() for x in logp]
                loss, clipped = policy_loss(logp, old, g["advantages"], g["counts"], S.RATIO, clip)
                kl = kl_to(logp, g["reference"]) if S.KL else torch.zeros(())
                ((loss + S.KL * kl) / len(used[i:i + size])).backward()
                sums["kl"], sums["clipped"] = sums["kl"] + kl.item(), sums["clipped"] + clipped
            sums["grad_norm"] = max(sums["grad_norm"], run.update())
        sums |= {k: sum(gather([sums[k]])) for k in ("kl", "clipped")}
        batch.update(step, samples)
        # ---- log and save
        row = log_row(step, samples, scores, groups, sums, rolled - began, time.time() - judged)
        run.log(row, "reward", "malformed")
        if step % S.PRINT_EVERY == 0:
            rated = [(t, s.text) for t, s in zip(scores[0]["total"], samples[0])
                     if t is not None] or [(0, "")]
            run.bar.write("  ".join(f"{k} {v:.3g}" for k, v in row.items()) +
                          "\n  best {:+.2f}: {!r}\n  worst {:+.2f}: {!r}".format(*max(rated), *min(rated)))

def _group(context, samples, score, gate):
    """Samples with a reward, their advantages and ids; None if fewer than two are left."""
    kept = [i for i, t in enumerate(score["total"]) if t is not None]
    if len(kept) < 2:
        return None
    gates = [score["gate"][i] for i in kept] if gate else None
    A, counts = group_advantages([score["total"][i] for i in kept], gates)
    return dict(context=context, ids=[samples[i].ids for i in kept], advantages=A, counts=counts, kept=kept)
# ================================================================ keeping a run alive
class Training:
    """The steps of a run still to do, for 02, 04 and 05: `for step in run:`, ending in run.log(row). Resumes
    from out/checkpoint.pt; saves every SAVE_EVERY steps, at the end, and after the step in hand on Ctrl-C or
    SIGTERM. Noise derives from (seed, step), so no RNG state is kept. batch: its `state` is."""
    def __init__(self, S, out, params, batch=None, desc=None):
        self.S, self.out, self.params, self.batch = S, out, params, batch or SimpleNamespace(state=None)
        self.optimizer, self.rows = torch.optim.AdamW(params, lr=S.LR, weight_decay=0.0), []
        self.first, self.desc, file = 0, desc or out.name, out / "checkpoint.pt"
        if file.exists() and not getattr(S, "SHOW", 0):
            saved = torch.load(file, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for p, v in zip(params, saved["params"], strict=True):
                    p.copy_(v)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.first, self.batch.state = saved["step"], json.loads(saved["state"])
            self.rows = list(csv.DictReader((out / "log.csv").read_text().splitlines()))[:self.first]

    def __iter__(self):
        from tqdm import tqdm
        asked = []
        old = {s: signal.signal(s, lambda s, _: asked.append(s)) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(range(self.first, self.S.STEPS), self.desc, initial=self.first, total=self.S.STEPS,
                        disable=self.first >= self.S.STEPS)
        try:
            for step in self.bar:
                yield step
                stop = any(gather([bool(asked)]))
                if stop or (step + 1) % self.S.SAVE_EVERY == 0 or step + 1 == self.S.STEPS:
                    values = [p.detach().cpu() for p in self.params]
                    with written_aside(self.out / "checkpoint.pt") as aside:
                        torch.save(dict(step=step + 1, params=values, optimizer=self.optimizer.state_dict(),
                                        state=json.dumps(self.batch.state)), aside)
                if stop:
                    raise SystemExit(f"stopped after step {step}; run the same command to go on")
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def update(self, lr=None):
        """One optimizer step on the clipped gradients -> their norm before. SystemExit where not finite."""
        add_gradients(self.params)
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.S.GRAD_CLIP).item()
        if not math.isfinite(norm):
            raise SystemExit(f"step {len(self.rows)}: the gradient norm is {norm}; this update was not made. "
                             f"Start again with a lower learning rate (now {self.S.LR:g}), as another run: "
                             f"--RUN=NEWNAME --FROM={self.S.RUN}")
        self.optimizer.param_groups[0]["lr"] = lr or self.S.LR
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def log(self, row, *shown):
        """Adds a row to log.csv; `shown` are the columns beside the bar."""
        self.rows.append({k: f"{v:.6g}" for k, v in row.items()})
        self.bar.set_postfix({k: f"{row[k]:.3f}" for k in shown})
        with written_aside(self.out / "log.csv") as aside, open(aside, "w", newline="") as f:
            w = csv.DictWriter(f, list(self.rows[-1]))
            w.writeheader()
            w.writerows(self.rows)

def load_policy(S):
    """S.MODEL, frozen, with its tokenizer, ready to take adapters. SystemExit where it can't be used."""
    return Policy(*load_model(S), S)
