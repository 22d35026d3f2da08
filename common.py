"""What carries the method, in this order: constants, the memory format, advantages and losses, the loop, the policy
with its adapters, and what a policy does: rollout, log-probs, watch.

Three ideas carry the code:
  1. A group is one row. The G answers to one prompt share its keys and values, in sampling as in training
     (support/attention.py has the picture).
  2. Vision runs once per clip. The tower is frozen, so a clip's features serve rollout, log-probs and training.
  3. A sample's noise depends on (seed, step, context, sample) alone, so a resumed run repeats itself: exactly on a CPU,
     up to rounding on a GPU, whose kernels depend on what is computed side by side.
"""
import contextlib
import importlib
import json
import math
import re
import sys
import time
import zlib
from dataclasses import dataclass, field

from support import judges, runs
from support.ahead import ReadAhead
from support.attention import lay_out, packed_positions, share_rows
from support.decode import HowToSample, decode
from support.hours import first_measured
from support.overlay import clip_frames, is_grey
from support.plan import prompt_tokens
from support.ranks import gather, gather_sum, my_share, progress, said_once, torch
from support.runs import Prompt, append_jsonl, clock, per_model, read_progress, write_jsonl
from support.text import as_text
from support.video import frames_to_patches
from support.weights import (FILES, check_tensors, head_in_fp32, load_model, lora_config,
                             read_tensors, steer_key, steered_layer, that_steer)

try:                                    # --help must work before anything is installed
    import numpy as np
    import torch.nn.functional as F
except ImportError:
    np = F = None

# ---------------------------------------------------------------- constants of all scripts: --NAME=value
# per_model(toy world, full-size model)
RUN = "tiny"                            # results go to runs/RUN/STAGE
FROM = ""                               # another run, read where RUN lacks a stage
MODEL = "tiny"                          # "tiny": tiny/base; else a folder, or a hub name such as
                                        # Qwen/Qwen3-VL-30B-A3B-Thinking
SEED = 0                                # every random choice derives from it
JUDGE = "tiny"                          # who judges and reads: "tiny", "local" or "openai:MODEL"
K = 5                                   # clips per context, the newest and 4 before it (paper: 5)
FRAMES_PER_CLIP = per_model(4, 20)      # 20 a clip is 2 fps, the model's native rate
FRAME_PIXELS = per_model(96**2, 448**2)  # of a frame at most; 32 x 32 pixels of 2 frames: one token
MEMORY_TOKENS = per_model(17, 150)      # budget of one memory (paper: 150); 17 hold three of the
                                        # eight facts of a toy clip
THINK_TOKENS = per_model(16, 1200)      # L of r_len (paper: 1200)
MAX_NEW_TOKENS = per_model(72, 2800)    # 2L of thinking, where r_len ends, then a memory even over its
                                        # budget and its JSON (released run: 8192, for which 80 GB
                                        # are too few here)
BITS = per_model(16, 4)                 # of the weights: 4 packs linears and experts as NF4
VISION_BITS = 16                        # 4: the vision tower's linears too, 0.8 GiB less
DOUBLE_QUANT = 0                        # 1: the scales of packed weights in 8 bits, 1.3 GiB less
FEATURE_CLIPS = per_model(4000, 200)    # clips whose vision features are kept: 30 MB each
ROLLOUT_SEQUENCES = per_model(384, 0)   # answers written side by side; 0: as many as memory holds
ROW_TOKENS = per_model(2500, 0)         # of small groups that share a packed row; 0: a row for each
CPU_THREADS = 2                         # more hurt a small model; fixed, so that results repeat
JUDGE_TOKENS = per_model(16, 128)       # of reasoning before a verdict of JUDGE="local" (authors: about
                                        # 128), but for "prefer"; 0: none
READER_TOKENS = per_model(2000, 32000)  # of memories that the reader sees: the most relevant
LORA_RANK = 16                          # on the language model's attention; alpha = 2 * rank
PLAN = 0                                # 1: 02 to 06 print what they will take, and stop
CARD = "H100"                           # on which card PLAN=1 plans (support/hours.py)
# ----------------------------------------------------------------


def settings(script, argv=None):
    """The constants above and those of a script (its `globals()`), with `--NAME=value` applied: see runs.py."""
    return runs.read_constants(globals(), script, sys.argv[1:] if argv is None else argv)


def stage(name):
    """Another script as a module: `import` can't say it, as a number is no module name."""
    return importlib.import_module(name)


# ================================================================ memory format: the prompt in, the memory out
PROMPT = Prompt("""You keep the memory of an endless video. Below are its latest clips with the \
memories that you wrote for them. Write the memory of the last clip in one or two sentences: what it shows or says, true, \
connected to the memory before, nothing that it already states. Call people by their IDs, like <face_3>. \
Answer with {"description": "..."}.""")
TASK_PROMPT = Prompt("""
These questions were asked lately; similar ones will come, so remember what they need:
""")
# For templates that open no thinking part.
ASK_TO_THINK = Prompt(" First think, then write </think>, then the answer.")


@dataclass
class Context:
    """What a memory is written from: the last K clips (rows of streams.jsonl), the memories of all but the newest,
    and, for a policy that is told them, questions."""
    stream: str
    clips: list
    history: list
    questions: list = field(default_factory=list)

    @property
    def clip(self):
        """The number of the newest clip."""
        return self.clips[-1]["clip"]

    def prompt(self, video, tokenizer):
        return build_prompt(self, video, tokenizer)


@dataclass
class Sample:
    """One answer of a policy. `rewards` of 02 or 05 and the loop fill in what stands below `truncated`."""
    ids: list                           # its tokens, end token included
    text: str
    memory: str | None                  # None where the answer is malformed
    thinking_tokens: int
    memory_tokens: int
    truncated: bool                     # MAX_NEW_TOKENS came before the end
    quality: float | None = None        # r_qual; None where a judge failed
    rich: float = 0.0                   # r_rich
    terms: dict = field(default_factory=dict)     # {name: value} of all terms, for the log
    reward: float | None = None         # r, their sum; None where a judge failed
    gate_value: float | None = None     # the part of r whose sign the NSR gate looks at
    advantage: float = 0.0
    keep: bool = True                   # False: the gate holds it back


@dataclass
class Group:
    """The G answers to one context, and what the loop finds out about them."""
    context: Context
    samples: list
    # Log-probs of the judged samples, (T_i,) each:
    old_logp: list | None = None        # from before the step's first update
    ref_logp: list | None = None        # by the policy that the KL refers to

    @property
    def judged(self):
        """The samples with a reward: where a judge failed, a sample leaves its group."""
        return [sample for sample in self.samples if sample.reward is not None]

    @property
    def ids(self):
        return [sample.ids for sample in self.judged]

    @property
    def advantages(self):
        return [sample.advantage for sample in self.judged]

    @property
    def keep(self):
        return [sample.keep for sample in self.judged]

    @property
    def has_gradient(self):
        """Whether the group teaches anything: its rewards differ."""
        return any(self.advantages)


def make_context(stream, t, memories, questions=(), k=5):
    """Context of clip t: `memories[i]` is the memory of clip i ("" or missing where there is none)."""
    first = max(0, t - k + 1)
    if not isinstance(memories, dict):
        memories = dict(enumerate(memories[first:t], first))
    history = [memories.get(i, "") for i in range(first, t)]
    return Context(stream["stream"], stream["clips"][first:t + 1], history, list(questions))


def build_prompt(context, video, tokenizer):
    """Prompt text up to where the answer begins: the instruction; of each clip its time, its frame pairs and its
    memory; the questions. video: per clip a list of (seconds in the clip, vision tokens) per frame pair.
    Memories and questions are text, whatever they hold (support/text.py)."""
    text = PROMPT + "\n"
    for i, (clip, pairs) in enumerate(zip(context.clips, video)):
        text += f"\n{clock(clip['start'])}-{clock(clip['end'])} "
        for seconds, tokens in pairs:
            vision = "<|video_pad|>" * tokens
            text += f"<{seconds:.1f} seconds><|vision_start|>{vision}<|vision_end|>"
        if i < len(context.history):
            text += "\n" + as_text(context.history[i] or "(nothing)", tokenizer)
    if context.questions:
        text += TASK_PROMPT + as_text("\n".join(context.questions), tokenizer)
    prompt = as_chat(text, tokenizer)
    if prompt.endswith("<think>\n"):
        return prompt
    return as_chat(text + ASK_TO_THINK, tokenizer)


def as_chat(text, tokenizer):
    turn = {"role": "user", "content": text}
    return tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)


# Many models put JSON into a Markdown fence, as the prompt of the authors' release shows it.
FENCE = re.compile(r"\s*```(?:json)?\s(.*)\s```\s*", re.DOTALL)


def parse_response(text):
    """(memory, thinking) of a response. The memory is None unless it is exactly one `</think>` and then one JSON
    object with the single key `description`, not empty (paper, section 2, r_fmt).

    One Markdown fence may stand around the object, and white space around both; nothing else may.

    >>> parse_response('a cup\\n</think>\\n\\n{"description": "<face_3> waves."}')
    ('<face_3> waves.', 'a cup')
    >>> parse_response('a cup</think>```json\\n{"description": "<face_3> waves."}\\n```')
    ('<face_3> waves.', 'a cup')
    >>> parse_response('a cup, {"description": "<face_3> waves."}')[0]      # the thinking never ends
    """
    thinking, _, rest = text.partition("</think>")
    thinking = thinking.strip()
    if "</think>" in rest:
        return None, thinking
    fenced = FENCE.fullmatch(rest)
    if fenced:
        rest = fenced[1]
    try:
        # An object becomes a tuple of (key, value) pairs, so that a repeated key shows.
        pairs = json.loads(rest, object_pairs_hook=tuple)
    except (RecursionError, ValueError):
        return None, thinking
    if not isinstance(pairs, tuple) or len(pairs) != 1:
        return None, thinking
    key, memory = pairs[0]
    if key != "description" or not isinstance(memory, str) or not memory.strip():
        return None, thinking
    if not is_unicode(memory):
        return None, thinking
    return memory.strip(), thinking


def is_unicode(text):
    """False for half a surrogate pair, which JSON can spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ================================================================ advantages, gate, loss, KL
def group_advantages(rewards, gate_values=None):
    """A_i = (r_i - mean r) / std r over the whole group, and which samples count (the NSR gate; paper, section 2).

    gate_values: per sample the reward that decides whether one below the mean may be pushed down: only if it is
    negative. None: no gate. A group with a population std under 1e-6 gets zeros. Returns (advantages, keep).

    >>> A, keep = group_advantages([0.5, 0.5, -0.5, 0.3], gate_values=[0.5, 0.5, -0.5, 0.3])
    >>> [round(a, 2) for a in A], keep
    ([0.73, 0.73, -1.7, 0.24], [True, True, True, True])
    >>> group_advantages([0.5, 0.4], gate_values=[0.5, 0.4])[1]  # the lower is still good: not pushed down
    [True, False]
    """
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    if std <= 1e-6:
        return [0.0] * len(rewards), [True] * len(rewards)
    advantages = [(r - mean) / std for r in rewards]
    if gate_values is None:
        return advantages, [True] * len(rewards)
    pairs = zip(advantages, gate_values)
    return advantages, [advantage >= 0 or value < 0 for advantage, value in pairs]


def policy_loss(logp, old_logp, advantages, keep, ratio="gspo", clip=(0.2, 0.28)):
    """Clipped loss of one group: -mean_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i) (paper, section 2).

    logp, old_logp: lists of (T_i,). ratio: "gspo" takes s_i = exp(mean_t(logp - old_logp)), one per sequence;
    "grpo" one per token, and then the mean. A sample that the gate holds back adds zero, yet stays in the divisor.
    Returns (loss (), share of ratios that were clipped).
    """
    low = 1 - clip[0]
    high = 1 + clip[1]
    total = 0.0
    clipped = 0.0
    for new, old, advantage, counts in zip(logp, old_logp, advantages, keep):
        if not advantage or not counts:
            continue
        log_ratio = new - old  # (T_i,)
        if ratio == "gspo":
            log_ratio = log_ratio.mean()[None]                                        # (1,)
        s = log_ratio.exp()  # (1,) or (T_i,)
        gain = torch.minimum(s * advantage, s.clamp(low, high) * advantage).mean()    # ()
        total = total - gain
        outside = s > high if advantage > 0 else s < low
        clipped += outside.float().mean().item()
    return total / len(logp), clipped / len(logp)


def kl_to(logp, ref_logp):
    """KL to the reference, per token by the estimator exp(d) - d - 1 with d = ref - logp; mean over samples -> ()."""
    total = 0
    for new, reference in zip(logp, ref_logp):
        gap = reference - new  # (T_i,)
        total = total + (gap.exp() - gap - 1).mean()
    return total / len(logp)


# ================================================================ the loop
def grpo(policy, run, rolling_batch, rewards, log_row, *, reference, seed, group_size,
         mini_batch_size, ratio, clip, gate, kl_weight, print_every):
    """Group-relative policy optimisation: the loop of 02, and of 05 on-policy.

    run: a Training (support/checkpoint.py), which keeps the steps still to do. rolling_batch: 02's; `next(step)`
    gives contexts, `advance(step, groups)` goes on with what was written. rewards(groups) fills in the reward of
    every sample. log_row: 02's. reference: the writer that the KL refers to. All else are constants of 02.
    """
    if ratio not in ("gspo", "grpo"):
        raise SystemExit(f'RATIO={ratio}: take "gspo" (one per sequence) or "grpo" (one per token)')
    policy.train_only(run.params)
    for step in run:
        # ---------------- rollout
        began = time.time()
        contexts = rolling_batch.next(step)
        groups = sample_groups(policy, contexts, group_size, (seed, step))
        rolled = time.time()
        # ---------------- reward
        rewards(groups)
        groups = gather(groups)
        stop_where_the_judge_failed(groups, step)
        judged = time.time()
        # ---------------- advantage
        for group in groups:
            fill_in_advantages(group, gate)
        learning = [group for group in groups if group.has_gradient]
        mini_batches = split_evenly(learning, mini_batch_size)
        # ---------------- update
        # The first mini-batch needs no old_logp: its own forward pass is it, so its ratio is 1.
        with torch.no_grad():
            for group, logp in each_with_logprobs(policy, share_of_each(mini_batches[1:])):
                group.old_logp = logp
            if kl_weight:
                with policy.using(reference):
                    for group, logp in each_with_logprobs(policy, share_of_each(mini_batches)):
                        group.ref_logp = logp
        totals = {"kl": 0.0, "clipped": 0.0, "grad_norm": 0.0}
        for mini_batch in mini_batches:
            # Memory holds one packed row at a time, in the toy world with several groups.
            for row in packed_rows(policy, my_share(mini_batch)):
                row_loss = 0.0
                for group, logp in zip(row, logprobs_of_row(policy, row)):  # (T_i,) per sample
                    old_logp = group.old_logp or [x.detach() for x in logp]
                    loss, clipped = policy_loss(
                        logp, old_logp, group.advantages, group.keep, ratio, clip)
                    kl = kl_to(logp, group.ref_logp) if kl_weight else torch.zeros(())
                    row_loss = row_loss + (loss + kl_weight * kl) / len(mini_batch)
                    totals["kl"] += kl.item()
                    totals["clipped"] += clipped
                row_loss.backward()
            totals["grad_norm"] = max(totals["grad_norm"], run.optimizer_step())
        totals["kl"] = gather_sum(totals["kl"])
        totals["clipped"] = gather_sum(totals["clipped"])
        rolling_batch.advance(step, groups)
        # ---------------- log and save
        row = log_row(step, groups, totals, rolled - began, time.time() - judged)
        run.log(row, "reward", "malformed")
        say_step(run, row, time.time() - began, groups if step % print_every == 0 else [])


def sample_groups(policy, contexts, n, key):
    """This rank's share of the contexts, each with n samples. Noise derives from (*key, number of the context)."""
    numbers = my_share(range(len(contexts)))
    share = [contexts[i] for i in numbers]
    samples = rollout(policy, share, n, [(*key, i) for i in numbers])
    return [Group(context, answers) for context, answers in zip(share, samples)]


def fill_in_advantages(group, gate):
    """Compares the judged samples of a group. Fewer than two keep the advantage 0 and teach nothing."""
    samples = group.judged
    if len(samples) < 2:
        return
    rewards = [sample.reward for sample in samples]
    gate_values = [sample.gate_value for sample in samples] if gate else None
    advantages, keep = group_advantages(rewards, gate_values)
    for sample, advantage, counts in zip(samples, advantages, keep):
        sample.advantage = advantage
        sample.keep = counts


def split_evenly(groups, size):
    """Mini-batches of at most `size`, whose sizes differ by one at most: in a small rest a group would weigh too much.

    >>> [len(part) for part in split_evenly(list(range(13)), 4)]
    [4, 3, 3, 3]
    """
    waiting = list(groups)
    mini_batches = []
    for left in range(math.ceil(len(groups) / size), 0, -1):
        share = math.ceil(len(waiting) / left)
        mini_batches.append(waiting[:share])
        waiting = waiting[share:]
    return mini_batches


def share_of_each(batches):
    """This rank's share of every mini-batch, in one list."""
    share = []
    for groups in batches:
        share += my_share(groups)
    return share


def stop_where_the_judge_failed(groups, step):
    """Raises SystemExit where most samples have no reward. A few are dropped: see `Group.judged`."""
    total = sum(len(group.samples) for group in groups)
    failed = total - sum(len(group.judged) for group in groups)
    if failed * 2 > total:
        raise SystemExit(said_once(f"step {step}: the judge failed on {failed} of {total} samples; "
                                   "mend it and run again, it goes on from the last checkpoint"))


def say_step(run, row, seconds, groups):
    """One line a step, after the first one what was cut off; where groups are given, the best and the worst sample
    of the first one below it."""
    line = f"step {row['step']:3}  reward {row['reward']:+.3f}  "
    if "quality" in row:
        line += f"quality {row['quality']:+.3f}  "
    run.bar.write(line + f"memory {row['memory']:.1f} tokens  {seconds:.1f} s")
    if row["step"] == 0 and row["truncated"]:
        run.bar.write(f"*** {row['truncated']:.0%} of the answers were cut off by MAX_NEW_TOKENS, and are "
                      "malformed; where they were well on their way, raise it ***")
    samples = [sample for group in groups[:1] for sample in group.judged]
    samples.sort(key=lambda sample: sample.reward)
    if samples:
        for name, sample in (("best", samples[-1]), ("worst", samples[0])):
            run.bar.write(f"    {name:5} {sample.reward:+.2f}: {sample.text!r}")


# ================================================================ the policy: one frozen model, its adapters
# Who can write, and what each builds on.
WRITERS = {"base": ["base"], "phase1": ["base", "phase1"], "phase2": ["base", "phase1", "phase2"],
           "reward": ["base", "reward"]}


def layers_of(writer):
    """A writer and what it builds on, the base first. Several of a sort have names of their own behind a colon.

    >>> layers_of("phase1"), layers_of("phase2:wear")
    (['base', 'phase1'], ['base', 'phase1', 'phase2:wear'])
    """
    *below, _ = WRITERS[writer.partition(":")[0]]
    return [*below, writer]


@dataclass
class EncodedPrompt:
    """A prompt of P tokens, V of which are vision."""
    ids: object                         # (P,)
    positions: object                   # (3, P): time, height, width
    visual: object                      # (P,) bool
    features: list                      # ClipFeatures, V tokens in all


def encoded_text(ids, device):
    """The EncodedPrompt of a list of ids without pictures."""
    ids = torch.tensor(ids, device=device)  # (P,)
    positions = torch.arange(len(ids), device=device).expand(3, -1)  # (3, P)
    visual = torch.zeros_like(ids, dtype=torch.bool)
    return EncodedPrompt(ids, positions, visual, features=[])


@dataclass
class ClipFeatures:
    """What the vision tower makes of a clip."""
    grid: tuple  # (frame pairs, h, w), h and w in patches of 16 pixels
    times: list                         # seconds in the clip, one per frame pair
    layers: list  # (V, d) each: for the prompt, then the deepstack layers


class Policy:
    """Qwen3-VL and what can be switched on it.

    `use(writer)` chooses who writes: "base"; "phase1", with what 02 trained; "phase2", with 05's adapter on top
    (several beside each other: "phase2:NAME"); or "reward", 04's LoRA, which reads and doesn't write.
    lm: the decoder; hidden: d; end: id of the end token;
    banned: ids that are never sampled (<|video_pad|> would crash the next pass), masked in log-probs too;
    closing: ids that may end a JSON object, or the fence around it; blank: ids of white space; room: what fits in memory (support/plan.py).
    """
    def __init__(self, model, tokenizer, room, S):
        self.model = model
        self.lm = model.model.language_model
        self.head = model.lm_head
        self.tokenizer = tokenizer
        self.S = S
        self.device = model.device
        self.room = room
        self.hidden = self.lm.config.hidden_size
        self.layers = len(self.lm.layers)
        self.features = {}              # ClipFeatures of the last FEATURE_CLIPS clips
        self.frames = ReadAhead(self._read)
        self.who = "base"
        self.trainable = []
        self.kind = {}                  # writer: "lora", "steer" or "all"
        self.lora = {}                  # writer: the name of its LoRA in PEFT
        self.steer = {}                 # writer: (layer, vector (d,), what takes it off)
        self.whole = {}                 # writer: {name: weight} of a whole decoder
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        special = {i for i, token in tokenizer.added_tokens_decoder.items()
                   if re.fullmatch(r"<\|.*\|>", token.content)}
        self.banned = torch.tensor(sorted(special - {self.end}), device=self.device)
        vocabulary = tokenizer.get_vocab().items()
        self.closing = {i for token, i in vocabulary if "}" in token or "`" in token}
        # In a vocabulary a space is written Ġ, and a line's end Ċ.
        self.blank = {i for token, i in vocabulary if re.fullmatch("[ĠĊĉč]+", token)}

    # ---------------- adapters
    def add(self, writer, kind, folder=None):
        """Adds to a writer, and switches it on -> the new parameters.

        kind: "lora" on the decoder's attention; "steer", a vector (d,) added to a decoder layer's output,
        h <- h + a (paper, section 3); "all", a whole new decoder (vision, embeddings and head stay frozen).
        folder: what `save_adapter` wrote; without it the adapter is new and has no effect yet.
        Raises SystemExit where the model has no such layer, or can't be trained as a whole.
        """
        saved = read_tensors(folder / FILES[kind], self.device) if folder else {}
        if kind == "lora":
            params = self._add_lora(writer, folder, saved)
        elif kind == "steer":
            params = self._add_steering_vector(writer, folder, saved)
        else:
            params = self._add_decoder(writer, folder, saved)
        self.kind[writer] = kind
        self.use(writer)
        return params

    def _add_lora(self, writer, folder, saved):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        name = f"{writer.partition(':')[0]}_{time.time_ns()}"       # a name that was never used
        try:
            self.model.add_adapter(lora_config(folder, self.S.LORA_RANK), name)
        except ValueError as error:
            raise SystemExit(f"{folder} does not fit this model: {error}") from None
        self.lora[writer] = name
        params = [p for key, p in self.model.named_parameters() if f".{name}." in key]
        # In bf16 the updates of a low learning rate would round to nothing.
        for p in params:
            p.data = p.data.float()
        if folder:
            state = {key.removeprefix("base_model.model."): value for key, value in saved.items()}
            needed = get_peft_model_state_dict(
                self.model, adapter_name=name, save_embedding_layers=False)
            check_tensors(folder / FILES["lora"], state, needed)
            set_peft_model_state_dict(self.model, state, name)
        return params

    def _add_steering_vector(self, writer, folder, saved):
        vector = torch.zeros(self.hidden)
        if not folder:
            layer = self.S.LAYER
        else:
            saved = that_steer(saved)
            layer = min(steered_layer(saved), self.layers - 1)
            check_tensors(folder / FILES["steer"], saved, {steer_key(layer): vector})
            vector = saved[steer_key(layer)]
        if not 0 <= layer < self.layers:
            raise SystemExit(
                f"LAYER={layer}: this model has the layers 0 to {self.layers - 1}; "
                f"near {round(self.layers * 22 / 48)} is the paper's depth (22 of 48)")
        steer = torch.nn.Parameter(vector.to(self.device))

        def add_vector(module, arguments, output):
            return output + steer.to(output.dtype) if self.who == writer else None
        hook = self.lm.layers[layer].register_forward_hook(add_vector)
        self.steer[writer] = layer, steer, hook
        return [steer]

    def _add_decoder(self, writer, folder, saved):
        if self.model.dtype != torch.float32 or self.S.BITS == 4:
            raise SystemExit('training all parameters needs a model in fp32: '
                             'use TRAIN="lora" or ADAPTER="steer"')
        params = self._decoder()
        if folder:
            check_tensors(folder / FILES["all"], saved, params)
        if "base" not in self.whole:
            self.whole["base"] = {name: p.data for name, p in params.items()}
        self.whole[writer] = saved or {name: p.data.clone() for name, p in params.items()}
        return list(params.values())

    def _decoder(self):
        """{name: parameter} of the decoder layers, whatever LoRA sits on them."""
        params = {}
        for name, p in self.lm.named_parameters():
            if "lora_" not in name and "embed_tokens" not in name:
                params[name.replace(".base_layer", "")] = p
        return params

    def use(self, writer):
        """Switches the writer. Weights that were trained whole change places with those in the model."""
        whole = [self.whole[name] for name in layers_of(writer) if name in self.whole]
        if whole:
            for name, p in self._decoder().items():
                p.data = whole[-1][name]
        loras = [self.lora[name] for name in layers_of(writer) if name in self.lora]
        if loras:
            self.model.enable_adapters()
            self.model.set_adapter(loras)
        elif self.lora:
            self.model.disable_adapters()
        self.who = writer
        self.train_only(self.trainable)

    @contextlib.contextmanager
    def using(self, writer):
        before = self.who
        self.use(writer)
        try:
            yield self
        finally:
            self.use(before)

    def drop(self, writer):
        """Forgets what was added to `writer`, and switches on the one that it builds on."""
        self.use(layers_of(writer)[-2])
        kind = self.kind.pop(writer, None)
        if kind == "lora":
            self.model.delete_adapter(self.lora.pop(writer))
        elif kind == "steer":
            _, _, hook = self.steer.pop(writer)
            hook.remove()
        elif kind == "all":
            self.whole.pop(writer)

    def train_only(self, params):
        self.trainable = params
        self.model.requires_grad_(False)
        for p in params:
            p.requires_grad_(True)

    # ---------------- prompts
    def look_ahead(self, contexts):
        """Says which contexts come next, so that the frames of their clips are read in the meantime."""
        self.frames.expect(self._unseen(contexts))

    def _unseen(self, contexts):
        """{key: clip} of the clips without features."""
        unseen = {}
        for context in contexts:
            for clip in context.clips:
                if clip_key(clip) not in self.features:
                    unseen[clip_key(clip)] = clip
        return unseen

    def prepare(self, contexts):
        """Encoded prompts of contexts. Vision features come from memory where a clip was seen before."""
        unseen = self._unseen(contexts)
        self.frames.expect(unseen)
        keys = list(unseen)
        clips_at_once = max(1, 256 // self.S.FRAMES_PER_CLIP)       # many small clips in one pass
        for i in range(0, len(keys), clips_at_once):
            some = keys[i:i + clips_at_once]
            for key, features in zip(some, self._see([unseen[key] for key in some])):
                self.features[key] = features
        prompts = [self._encode(context) for context in contexts]
        while len(self.features) > self.S.FEATURE_CLIPS:            # the oldest go first
            del self.features[next(iter(self.features))]
        return prompts

    def _see(self, clips):
        """ClipFeatures of clips, by one pass of the vision tower."""
        patches = []
        grids = []
        times = []
        for clip in clips:
            clip_patches, grid, at = self.frames.take(clip_key(clip), clip)
            patches.append(clip_patches)
            grids.append(grid)
            times.append(at)
        tower = self.model.model.visual
        pixels = torch.cat(patches).to(self.device)
        with torch.no_grad():
            out = tower(pixels, return_dict=True, grid_thw=torch.tensor(grids, device=self.device))
        sizes = [t * h * w // 4 for t, h, w in grids]               # tokens of each clip
        layers = [layer.split(sizes) for layer in (out.pooler_output, *out.deepstack_features)]
        of_clips = zip(*layers)                                     # per clip (V, d) of each layer
        return [ClipFeatures(grid, at, [layer.clone() for layer in of_clip])
                for grid, at, of_clip in zip(grids, times, of_clips)]

    def _read(self, clip):
        """(patches, grid, times of the frame pairs) of a clip's frames."""
        frames, seconds = clip_frames(clip, self.S.FRAMES_PER_CLIP)  # (n, H, W, 3)
        patches, grid = frames_to_patches(frames, self.S.FRAME_PIXELS)
        return patches.to(self.model.model.visual.dtype), grid, pair_times(seconds)

    def _prompt_ids(self, context):
        """Token ids of a prompt. Of a clip that was not seen yet the frames are taken to be of full size."""
        video = []
        for clip in context.clips:
            features = self.features.get(clip_key(clip))
            if features:
                _, h, w = features.grid
                video.append([(seconds, h * w // 4) for seconds in features.times])
            else:
                length = clip["end"] - clip["start"]
                pairs = math.ceil(self.S.FRAMES_PER_CLIP / 2)
                tokens = self.S.FRAME_PIXELS // 1024
                video.append([(length * i / pairs, tokens) for i in range(pairs)])
        text = context.prompt(video, self.tokenizer)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt_length(self, context):
        """Tokens of a context's prompt; a little more than it will have where its clips were not seen yet."""
        return len(self._prompt_ids(context))

    def _encode(self, context):
        """The EncodedPrompt of a context whose clips have been seen."""
        features = [self.features[clip_key(clip)] for clip in context.clips]
        ids = torch.tensor(self._prompt_ids(context))
        visual = ids == self.model.config.video_token_id
        grid = torch.tensor([clip.grid for clip in features]) if features else None
        token_types = visual[None].int() * 2                        # 2: video
        positions, _ = self.model.model.get_rope_index(ids[None], token_types, video_grid_thw=grid)
        return EncodedPrompt(
            ids.to(self.device), positions[:, 0].to(self.device), visual.to(self.device), features)

    # ---------------- a pass
    def logits(self, hidden):
        """What the head makes of outputs (..., d): (..., V) in fp32, -inf for what is never sampled."""
        return head_in_fp32(self.head, hidden).index_fill_(-1, self.banned, -torch.inf)

    def read(self, prompts, answers, cache=None):
        """One pass over a packed row of groups (support/attention.py) -> (outputs (T, d), Segments of each group).

        answers: for each prompt a list of lists of ids. cache: keeps the prompts (support/decode.py).
        """
        # ---- the row: its tokens, their places, and which of them are pictures
        parts = []
        positions = []
        visual = []
        lengths = []
        for prompt, of_prompt in zip(prompts, answers):
            new = torch.tensor(sum(of_prompt, []), dtype=torch.long, device=self.device)
            parts += [prompt.ids, new]
            positions.append(packed_positions(prompt.positions, of_prompt))
            visual.append(F.pad(prompt.visual, (0, len(new))))
            lengths.append((len(prompt.ids), [len(answer) for answer in of_prompt]))
        visual = torch.cat(visual)  # (T,)
        embeds = self.lm.embed_tokens(torch.cat(parts))  # (T, d)
        # ---- vision features in the place of their tokens
        clips = []
        for prompt in prompts:
            clips += [clip.layers for clip in prompt.features]
        # (V, d) each: for the prompt, then the deepstack.
        layers = [torch.cat(of_clips) for of_clips in zip(*clips)]
        if layers:
            embeds = embeds.index_put((visual,), layers[0].to(embeds.dtype))
        # ---- the pass; in training mode the layers are checkpointed
        segments = lay_out(lengths)
        self.lm.train(torch.is_grad_enabled() and self.S.MODEL != "tiny")
        hidden = self.lm(
            inputs_embeds=embeds[None], position_ids=torch.cat(positions, 1)[:, None],
            visual_pos_masks=visual[None], deepstack_visual_embeds=layers[1:],
            segments=segments, cache=cache, use_cache=False).last_hidden_state[0]
        return hidden, segments


def pair_times(seconds):
    """Times of frame pairs; an odd last frame pairs with itself."""
    if len(seconds) % 2:
        seconds = seconds + seconds[-1:]
    return [(first + second) / 2 for first, second in zip(seconds[::2], seconds[1::2])]


def clip_key(clip):
    """What a clip's features are remembered by."""
    return clip["file"], clip["offset"], clip["end"] - clip["start"]


def load_policy(S):
    """S.MODEL, frozen, with its tokenizer, ready to take adapters. SystemExit where it can't be used."""
    longest = 2 * S.THINK_TOKENS + S.MEMORY_TOKENS + 20             # 20: the JSON and a fence
    if S.MAX_NEW_TOKENS < longest:
        print(f"*** MAX_NEW_TOKENS={S.MAX_NEW_TOKENS} is less than {longest}: 2 x THINK_TOKENS, which r_len "
              "punishes step by step, MEMORY_TOKENS and the JSON. An answer that long is cut off, "
              "and malformed ***")
    model, tokenizer, room = load_model(S)
    return Policy(model, tokenizer, room, S)


# ================================================================ rollout, log-probs, watch
def rollout(policy, contexts, n, keys, temperature=1.0, top_p=1.0, top_k=0, limit=None):
    """n samples of each context, by the writer that is switched on -> a list of n Samples per context.

    keys: a tuple of ints >= 0 per context; sample j draws its noise from (*key, j) alone. An answer stops at the end
    token, at any other that is not white space behind its object (or the fence around that), or at `limit` tokens,
    which is MAX_NEW_TOKENS where it is None.
    """
    how = HowToSample(temperature, top_p, top_k)
    limit = limit or policy.S.MAX_NEW_TOKENS

    def is_complete(ids):
        return parse_response(policy.tokenizer.decode(ids))[0] is not None
    samples = [None] * len(contexts)
    for numbers, width in batches(policy, contexts, n, limit):
        some = [contexts[i] for i in numbers]
        noise = [draw_noise(keys[i], n, limit) for i in numbers]
        noise = torch.tensor(np.stack(noise), device=policy.device)  # (B, n, T)
        with torch.no_grad():
            answers = decode(policy, policy.prepare(some), noise, how, is_complete, width)
        for i, group in zip(numbers, answers):
            samples[i] = [as_sample(policy, ids) for ids in group]
            if contexts[i].clips and is_grey(contexts[i].clips[-1]):
                for sample in samples[i]:
                    sample.memory = None            # what was written on no frames is no memory
    return samples


def batches(policy, contexts, n, limit):
    """What is written side by side: (numbers of contexts, how many answers to each of them at a time).

    Contexts of like length go together, the longest first, as many as fit beside each other now: the longer the
    prompts, the answers or the group, the fewer.
    """
    lengths = [policy.prompt_length(context) for context in contexts]
    numbers = sorted(range(len(contexts)), key=lambda i: -lengths[i])
    policy.look_ahead([contexts[i] for i in numbers])
    while numbers:
        first = numbers[0]
        count, width = policy.room.side_by_side(lengths[first], n, limit)
        # All of them hold on to the features of their clips.
        clips = max(1, len(contexts[first].clips))
        count = min(count, len(numbers), max(1, policy.S.FEATURE_CLIPS // clips))
        yield numbers[:count], width
        numbers = numbers[count:]


def draw_noise(key, n, limit):
    """(n, limit) uniform numbers: one for each token of n samples."""
    generators = [np.random.default_rng([*key, j]) for j in range(n)]
    return np.stack([generator.random(limit) for generator in generators])


def as_sample(policy, ids):
    """The Sample of an answer's tokens. One without the end token is malformed, though its object may be whole."""
    ended = bool(ids) and ids[-1] == policy.end
    text = policy.tokenizer.decode(ids[:-1] if ended else ids)
    memory, thinking = parse_response(text)
    if not ended:
        memory = None
    return Sample(
        ids=list(ids), text=text, memory=memory,
        thinking_tokens=count_tokens(policy, thinking),
        memory_tokens=count_tokens(policy, memory or ""),
        truncated=not ended and len(ids) == policy.S.MAX_NEW_TOKENS)


def count_tokens(policy, text):
    return len(policy.tokenizer(text)["input_ids"])


def logprobs(policy, context, answers):
    """Log-probs of the tokens of answers (lists of ids) to a context -> a list of (T_i,) fp32 tensors.

    With gradient, where that is enabled.
    """
    [logp] = logprobs_of_groups(policy, [(context, answers)])
    return logp


def packed_rows(policy, groups):
    """Lists of groups that share a packed row (ROW_TOKENS). A group is what has a `context` and `ids`, its answers."""
    policy.look_ahead([group.context for group in groups])
    lengths = []
    for group in groups:
        lengths.append(policy.prompt_length(group.context) + sum(len(ids) for ids in group.ids))
    return share_rows(groups, lengths, policy.S.ROW_TOKENS)


def each_with_logprobs(policy, groups):
    """(group, its log-probs) of each, computed row by row."""
    for row in packed_rows(policy, groups):
        yield from zip(row, logprobs_of_row(policy, row))


def logprobs_of_row(policy, groups):
    return logprobs_of_groups(policy, [(group.context, group.ids) for group in groups])


def logprobs_of_groups(policy, groups):
    """As `logprobs`, of several (context, answers) in one packed row -> a list for each.

    The head runs one answer at a time under checkpointing, so logits (T_i, V) exist for one answer only.
    """
    from torch.utils.checkpoint import checkpoint
    prompts = policy.prepare([context for context, _ in groups])
    answers = [of_context for _, of_context in groups]
    hidden, segments = policy.read(prompts, answers)  # (T, d)

    def logp_of_answer(rows, ids):                                 # (T_i, d), (T_i,)
        logits = policy.logits(rows)  # (T_i, V)
        return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)  # (T_i,)
    logp = []
    for group, of_context in zip(segments, answers):
        # A token is predicted by the row before it, so the prompt's last row predicts every answer's first token.
        last_of_prompt = hidden[group.prompt][-1:]
        logp.append([])
        for answer, ids in zip(group.answers, of_context):
            rows = torch.cat([last_of_prompt, hidden[answer][:-1]])
            ids = torch.tensor(ids, device=policy.device)
            logp[-1].append(checkpoint(logp_of_answer, rows, ids, use_reentrant=False))
    return logp


@dataclass
class Notes:
    """What a writer makes of the streams, clip by clip. `watch` adds to the memories and to the file."""
    writer: str                         # see Policy
    memories: dict                      # {stream: rows so far}
    path: object = None                 # of a JSONL
    questions: tuple = ()               # that the writer is told
    policy: str = ""                    # who this is, for the rows


def watch(policy, streams, questions=(), path=None, begun=None, desc="watch", planned=None,
          beside=()):
    """The policy watches streams side by side, clip by clip, with its own memories as history
    -> {stream: [row per clip]}.

    Rows are {stream, clip, start, end, memory, text}; "grey" where the clip is damaged, which leaves the memory "",
    and "tries" where an answer was malformed (see `write_memories`). path: a JSONL that rows are appended to as they
    come; an interrupted watch goes on from it. begun: {stream: rows of its first clips} that another policy wrote;
    this one goes on after them. planned: hours, which the first measured round corrects. beside: Notes of other
    writers, who write of the same clips just before, in one pass over the frames.
    """
    own = Notes(policy.who, {stream["stream"]: [] for stream in streams}, path, questions)
    for name, rows in (begun or {}).items():
        if name in own.memories:
            own.memories[name] += rows
    go_on(own.memories, path)
    width = streams_at_once(policy)
    rounds = watch_rounds(streams, own.memories, width)
    with_the_next = list(zip(rounds, [*rounds[1:], []]))
    bar = progress(with_the_next, desc, leave=False)
    what = f"a clip of {width} streams"
    # The first contexts have fewer clips than K.
    steps = first_measured(bar, len(rounds), planned, what, skip=policy.S.K - 1)
    new = []
    for places, next_places in steps:
        for notes in [*beside, own]:
            new += write_round(policy, notes, places, next_places)
    say_malformed(new)
    return own.memories


def write_round(policy, notes, places, next_places):
    """The writer's memory of a clip of each stream, added to its notes -> the new rows.

    places: (stream, number of a clip); what an interrupted watch has written of them is not written again.
    """
    memories = notes.memories
    places = [(stream, t) for stream, t in places if len(memories[stream["stream"]]) == t]
    share = my_share(places)
    contexts = watch_contexts(share, memories, notes.questions, policy.S.K)
    coming = watch_contexts(my_share(next_places), memories, notes.questions, policy.S.K)
    policy.look_ahead(contexts + coming)
    keys = []
    for stream, t in share:
        number = zlib.crc32(stream["stream"].encode())
        keys.append((policy.S.SEED, 7, number, t))           # 7: noise of its own, not training's
    with policy.using(notes.writer):
        written = write_memories(policy, contexts, keys)
    rows = []
    for (stream, t), (sample, tries) in zip(share, written):
        row = watch_row(stream, t, sample, tries)
        if notes.policy:
            row["policy"] = notes.policy
        rows.append(row)
    rows = gather(rows)
    for row in rows:
        memories[row["stream"]].append(row)
    if notes.path and rows:
        append_jsonl(notes.path, rows)
    return rows


def streams_at_once(policy):
    """How many streams are watched side by side: as many as are written at a time, and as have all K clips of their
    contexts remembered from one clip to the next (FEATURE_CLIPS). On all ranks together."""
    S = policy.S
    fit, _ = policy.room.side_by_side(prompt_tokens(S), 1, S.MAX_NEW_TOKENS)
    return sum(gather([max(1, min(fit, S.FEATURE_CLIPS // S.K))]))


def watch_rounds(streams, memories, width):
    """What is watched, round by round: lists of (stream, number of its next clip).

    At most `width` streams are under way, those first that have the most clips left. Where one ends, the next begins.
    """
    next_clip = {stream["stream"]: len(memories[stream["stream"]]) for stream in streams}

    def clips_left(stream):
        return len(stream["clips"]) - next_clip[stream["stream"]]
    waiting = sorted(streams, key=clips_left, reverse=True)
    rounds = []
    while waiting := [stream for stream in waiting if clips_left(stream) > 0]:
        places = [(stream, next_clip[stream["stream"]]) for stream in waiting[:width]]
        for stream, _ in places:
            next_clip[stream["stream"]] += 1
        rounds.append(places)
    return rounds


def watch_contexts(places, memories, questions, k):
    """The Context of each (stream, number of a clip), with the memories that there are so far."""
    contexts = []
    for stream, t in places:
        latest = memories[stream["stream"]][-k:]
        history = {row["clip"]: row["memory"] for row in latest}
        contexts.append(make_context(stream, t, history, questions, k))
    return contexts


def watch_row(stream, t, sample, tries):
    """The row of a clip; see `watch`."""
    clip = stream["clips"][t]
    row = {"stream": stream["stream"], "clip": t, "start": clip["start"], "end": clip["end"],
           "memory": sample.memory or "", "text": sample.text}
    if is_grey(clip):
        row["grey"] = True
    if tries > 1:
        row["tries"] = tries
    return row


def write_memories(policy, contexts, keys, most=4):
    """A (Sample, how often it was sampled) of each context, sampled as for inference (paper, section 1).

    A malformed answer would leave a gap in all later histories, so it is sampled again, with noise of its own, up to
    `most` times in all. Training never does that: there it is what r_fmt punishes.
    """
    written = [None] * len(contexts)
    waiting = range(len(contexts))
    for tries in range(1, most + 1):
        again = (tries,) if tries > 1 else ()
        some = [contexts[i] for i in waiting]
        their_keys = [keys[i] + again for i in waiting]
        groups = rollout(policy, some, 1, their_keys, temperature=0.6, top_p=0.95, top_k=20)
        for i, (sample,) in zip(waiting, groups):
            written[i] = sample, tries
        waiting = [i for i in waiting
                   if written[i][0].memory is None and not is_grey(contexts[i].clips[-1])]
        if not waiting:
            break
    return written


def say_malformed(rows):
    """Says how many of the rows of a watch were malformed at first, and how many remained so."""
    again = sum("tries" in row for row in rows)
    empty = sum(not row["memory"] and "grey" not in row for row in rows)
    if again:
        print(f"  {again} of {len(rows)} answers were malformed and sampled again")
    if empty:
        print(f"*** {empty} of {len(rows)} clips have no memory, as their answers stayed malformed; "
              "where these break off, raise MAX_NEW_TOKENS ***")


def go_on(memories, path):
    """Adds to memories {stream: rows} what an interrupted watch has written to `path`: each clip once, in order."""
    written = {}
    before = read_progress(path)
    for row in before:
        written.setdefault((row["stream"], row["clip"]), row)
    for stream, rows in memories.items():
        while (stream, len(rows)) in written:
            rows.append(written.pop((stream, len(rows))))
    # Two processes wrote at once: some clips twice, or after a gap. Streams that have gone keep their rows.
    gaps = [key for key in written if key[0] in memories and key[1] > len(memories[key[0]])]
    repeated = len(before) - len({(row["stream"], row["clip"]) for row in before})
    if repeated or gaps:
        print(f"*** {path} held {repeated + len(gaps)} rows that don't fit: they are left out ***")
        rest = [row for key, row in written.items() if key not in gaps]
        used = [row for rows in memories.values() for row in rows]
        write_jsonl(path, sorted(used + rest, key=lambda row: row["clip"]))


# ================================================================ the judge
class LocalModel:
    """What JUDGE="local" asks: the policy with its adapters off. get_policy: gives it when it is first needed."""
    def __init__(self, get_policy):
        self.get_policy = get_policy

    @property
    def policy(self):
        return self.get_policy()

    def rollout(self, questions, n, keys, **how):
        return rollout(self.policy, questions, n, keys, **how)


def load_judge(S, get_policy, shows_frames=True):
    """Who judges memories and answers questions, by S.JUDGE (support/judges.py)."""
    return judges.load_judge(S, LocalModel(get_policy), shows_frames)
