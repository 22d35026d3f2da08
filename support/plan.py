"""What a run will cost, said before it is spent: bytes on the card, rollouts, tokens and judge calls."""
import math
import re
from dataclasses import dataclass

from support.ranks import torch

BLOCK = 64               # values that share a scale in 4-bit weights, as in bitsandbytes
USABLE = 0.92            # of a card's memory; the rest is left to fragments and buffers


@dataclass
class Weights:
    """Weights of one kind: how many values, and their bytes once loaded."""
    values: int = 0
    bytes: int = 0


@dataclass
class Plan:
    """Bytes at the widest moments of a step. Weights and cache are exact, the rest are estimates."""
    prompt: int          # tokens of a full prompt
    row: int             # tokens of a context with all its answers, at their longest
    token_cache: int     # bytes of one cached token
    weights: dict        # {item: bytes}, here and below
    held: dict           # beside the weights, all the time
    rollout: dict        # for each context
    training: dict       # for each packed row

    def at_rest(self):
        return sum(self.weights.values()) + sum(self.held.values())

    def in_training(self):
        return self.at_rest() + sum(self.training.values())


# ---------------------------------------------------------------- bytes
def is_expert(name):
    """Whether a parameter's name is that of a tensor with all experts of a layer."""
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


def weight_bytes(model, S, whole=2):
    """{kind: Weights} under BITS, VISION_BITS and DOUBLE_QUANT; `model` may be on the meta device.

    whole: bytes of a value that is not packed. A packed one takes half a byte and a 64th of its scale: of
    4 bytes, or with DOUBLE_QUANT of 1 byte and a 256th of another 4.
    """
    scale = 1 + 4 / 256 if S.DOUBLE_QUANT else 4
    packed = 1 / 2 + scale / BLOCK
    bits = {"experts": S.BITS, "linears": S.BITS, "vision linears": S.VISION_BITS}
    table = {}
    for name, parameter in model.named_parameters():
        kind = kind_of(model, name)
        bytes_each = packed if bits.get(kind) == 4 else whole
        weights = table.setdefault(kind, Weights())
        weights.values += parameter.numel()
        weights.bytes += int(parameter.numel() * bytes_each)
    return table


def kind_of(model, name):
    """Which kind of weight a parameter is, as far as packing goes."""
    module = model.get_submodule(name.rpartition(".")[0])
    if is_expert(name):
        return "experts"
    if re.search("embed_tokens|lm_head", name):
        return "embeddings and head"
    if isinstance(module, torch.nn.Linear) and name.endswith("weight"):
        return "vision linears" if ".visual." in name else "linears"
    return "others"


def prompt_tokens(S):
    """Tokens of a full prompt: K clips of frame pairs with their times, and the memories of K - 1 clips."""
    pairs = math.ceil(S.FRAMES_PER_CLIP / 2)
    # 32 x 32 pixels of both frames make one token; the time of the pair takes 9.
    pair = S.FRAME_PIXELS // 1024 + 9
    clip = pairs * pair + 20
    return S.K * clip + (S.K - 1) * S.MEMORY_TOKENS + 120


def plan(model, S, whole=2):
    """The Plan of a model for S's batch.

    model: may be on the meta device; whole: bytes of a value that is not packed.
    """
    text = model.config.get_text_config()
    d = text.hidden_size
    layers = text.num_hidden_layers
    experts = getattr(text, "num_experts", 0)
    experts_per_token = getattr(text, "num_experts_per_tok", 1)
    width = text.moe_intermediate_size if experts else text.intermediate_size
    group = getattr(S, "GROUP", 1)
    prompt = prompt_tokens(S)
    row = prompt + group * S.MAX_NEW_TOKENS

    # What a token takes in a layer: a hidden vector, what its experts (or the MLP) see and make, its cache.
    hidden = d * whole
    mlp = experts_per_token * (2 * d + 3 * width) * whole
    layer_cache = 2 * text.num_key_value_heads * text.head_dim * whole         # keys and values
    token_cache = layers * layer_cache
    # A layer at work has its keys and values once more as they grow, and once for each head that shares them.
    copies = 1 + text.num_attention_heads // text.num_key_value_heads
    # Of the experts that are unpacked, the wider tensor (E, 2 width, d) counts.
    unpacked = experts * 2 * width * d * whole if S.BITS == 4 else 0

    # Of the adapter there are its weights, their gradient and Adam's two moments, all in fp32.
    held = {"adapter and optimizer": 16 * lora_values(model, S),
            "unpacked experts": unpacked,
            "vision features": S.FEATURE_CLIPS * prompt // S.K * d * 4 * whole}
    rollout = {"cache": token_cache * row,
               "attention": layer_cache * row * copies,
               "prefill": prompt * (mlp + 15 * hidden) + 5 * prompt * prompt}
    training = {"checkpoints": layers * row * hidden,
                "one layer": row * (2 * mlp + 16 * hidden),
                "mask": 4 * row * row,
                "logits of one answer": S.MAX_NEW_TOKENS * text.vocab_size * 20}
    weights = {kind: size.bytes for kind, size in weight_bytes(model, S, whole).items()}
    return Plan(prompt, row, token_cache, weights, held, rollout, training)


def lora_values(model, S):
    """Values of the LoRA on the language model's attention."""
    ends = 0
    for name, module in model.named_modules():
        if re.fullmatch(r".*language_model.*self_attn\.[qkvo]_proj", name):
            ends += module.in_features + module.out_features
    return S.LORA_RANK * ends


def check_plan(model, S, card, whole=2):
    """Prints the byte plan -> (contexts to roll out side by side, samples of one context at a time).

    model: may be on the meta device; card: bytes of memory; whole: bytes of a value that is not packed.
    Raises SystemExit, with the constants to change, where a step doesn't fit. No prompt is ever cut to fit.
    """
    bytes_of = plan(model, S, whole)
    longest = model.config.get_text_config().max_position_embeddings
    if bytes_of.prompt + S.MAX_NEW_TOKENS > longest:
        raise SystemExit(
            f"a prompt of {bytes_of.prompt} tokens and {S.MAX_NEW_TOKENS} new ones exceed the "
            f"model's {longest}: lower FRAME_PIXELS, FRAMES_PER_CLIP or K; nothing is cut")
    trains = hasattr(S, "LR")
    print_plan(bytes_of, S, trains)

    group = getattr(S, "GROUP", 1)
    step = bytes_of.in_training() if trains else bytes_of.at_rest()
    free = USABLE * card - bytes_of.at_rest()
    # Beside one prompt and its prefill, at least one answer's cache has to fit, with a fifth in reserve.
    for_answers = free - bytes_of.rollout["prefill"] - bytes_of.token_cache * bytes_of.prompt
    samples = int(for_answers // (1.2 * bytes_of.token_cache * S.MAX_NEW_TOKENS))
    samples = max(0, min(group, samples))
    weights = sum(bytes_of.weights.values())
    if samples == 0 or step > USABLE * card:
        raise SystemExit(
            f"MODEL={S.MODEL} does not fit: a card of {gib(card)}, weights {gib(weights)}, "
            f"a step {gib(step)}. Change one of BITS=4, VISION_BITS=4, DOUBLE_QUANT=1 "
            f"(now {S.BITS}, {S.VISION_BITS}, {S.DOUBLE_QUANT}), FRAME_PIXELS={S.FRAME_PIXELS}, "
            f"FRAMES_PER_CLIP={S.FRAMES_PER_CLIP}, K={S.K}, FEATURE_CLIPS={S.FEATURE_CLIPS}, "
            f"THINK_TOKENS={S.THINK_TOKENS}, MAX_NEW_TOKENS={S.MAX_NEW_TOKENS}")
    contexts = S.ROLLOUT_CONTEXTS or max(1, int(free // sum(bytes_of.rollout.values())))
    print(f"  a step takes {gib(step)} of {gib(card)}; "
          f"contexts rolled out side by side: {contexts}")
    if S.FEATURE_CLIPS < getattr(S, "CONTEXTS", 0) * S.K:
        print(f"*** FEATURE_CLIPS={S.FEATURE_CLIPS} is less than the {S.CONTEXTS} x {S.K} clips of "
              "a step: vision runs more than once a clip ***")
    if samples < group:
        print(f"*** {samples} of {group} samples fit beside one prompt: "
              "a group is rolled out in parts, from one prefill ***")
    return contexts, samples


def print_plan(bytes_of, S, trains):
    """A line for each part of the plan, with its items beside it."""
    print(f"byte plan in GiB, for prompts of {bytes_of.prompt} tokens ({S.K} clips x "
          f"{S.FRAMES_PER_CLIP} frames of at most {S.FRAME_PIXELS} pixels) and packed rows of "
          f"{bytes_of.row}:")
    parts = {"weights": bytes_of.weights,
             "beside them": bytes_of.held,
             "rollout, a context": bytes_of.rollout}
    if trains:
        parts["training, a row"] = bytes_of.training
    for part, items in parts.items():
        sizes = [f"{item} {size / 2**30:.2f}" for item, size in items.items()]
        print(f"  {part:18} {sum(items.values()) / 2**30:6.2f} = {', '.join(sizes)}")


def gib(size):
    return f"{size / 2**30:.2f} GiB"


# ---------------------------------------------------------------- rollouts, tokens, judge calls
def announce(groups, samples_each, judge_calls, S, what=""):
    """Prints one line on the work to come: `groups` of `samples_each` rollouts, `judge_calls` in all.

    what: the name of this work; samples_each: 0 where nothing is sampled. An answer is taken to use its
    budget of thinking and memory.
    """
    rollouts = groups * samples_each
    tokens = rollouts * (S.THINK_TOKENS + S.MEMORY_TOKENS)
    name = f"{what}: " if what else ""
    product = f"{groups:,} groups x {samples_each} samples = " if samples_each > 1 else ""
    if rollouts:
        sampled = (f"{product}{rollouts:,} rollouts, about {tokens:,} tokens "
                   f"(at most {S.MAX_NEW_TOKENS:,} each)")
    else:
        sampled = f"{groups:,} in all, nothing is sampled"
    print(f"cost: {name}{sampled}, {judge_calls:,} judge calls, "
          f"prompts of at most {prompt_tokens(S):,} tokens")
