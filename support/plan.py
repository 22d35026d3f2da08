"""The bytes that a run takes on a card, said before it is begun. Its hours: hours.py."""
import functools
import json
import math
import pathlib
import re
from dataclasses import dataclass

from support.ranks import torch

BLOCK = 64               # values that share a scale in 4-bit weights, as in bitsandbytes
USABLE = 0.92            # of a card's memory; the rest is left to fragments and buffers


# What config.json of Qwen/Qwen3-VL-30B-A3B says, as far as bytes and hours depend on it.
PUBLISHED = ("Qwen/Qwen3-VL-30B-A3B-Thinking", "Qwen/Qwen3-VL-30B-A3B-Instruct")
TEXT = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": 262144, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6,
                            "mrope_section": [24, 20, 20], "mrope_interleaved": True}}
VISION = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
          "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
          "out_hidden_size": 2048, "num_position_embeddings": 2304,
          "deepstack_visual_indexes": [8, 16, 24]}


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
    room: "Room"         # for rollouts
    weights: dict        # {item: bytes}, here and below
    held: dict           # beside the weights, all the time
    prefill: dict        # of one prompt: they take turns
    rollout: dict        # for each context
    training: dict       # for each packed row

    def at_rest(self):
        return sum(self.weights.values()) + sum(self.held.values())

    def in_training(self):
        return self.at_rest() + sum(self.training.values())


@dataclass
class Room:
    """How much is free for a rollout, and what one takes: bytes, but for `most` and `layers`."""
    most: int                    # answers side by side at most, whatever is free; 0: no such limit
    free: float = 10**15         # by the plan
    token_cache: int = 0         # of one cached token
    prefill_token: int = 0       # of one token of the prompt that is read
    mask: int = 0                # of one answer, for each token that it sees or not
    logits: int = 0              # of one answer, while a token is drawn
    layers: int = 1
    is_here: bool = True         # whether the card is this machine's, so that what is free now counts too

    def of_context(self, prompt, samples, limit):
        """Bytes of a prompt of so many tokens with its answers, each as long as it may become."""
        tokens = prompt + samples * limit
        # A layer's cache exists twice while finished rows leave it.
        cache = self.token_cache * tokens * (1 + 1 / self.layers)
        return cache + samples * (self.mask * tokens + self.logits)

    def left(self):
        return min(self.free, free_on_card()) if self.is_here else self.free

    def contexts(self, prompt, samples, limit):
        """How many contexts with so many answers fit side by side, as a fraction."""
        left = self.left() - self.prefill_token * prompt
        contexts = left / max(1, self.of_context(prompt, samples, limit))
        return min(contexts, self.most / samples) if self.most else contexts

    def row_tokens(self):
        """Tokens of the longest row that a pass without gradient can read."""
        return math.floor(self.left() / max(1, self.prefill_token))

    def side_by_side(self, prompt, samples, limit):
        """(contexts, answers to each of them) to be written at a time: all answers, unless one context is too much.

        prompt: tokens of the longest prompt; limit: of an answer. SystemExit where not even one answer fits.
        """
        contexts = self.contexts(prompt, samples, limit)
        if contexts >= 1:
            return math.floor(contexts), samples
        for fewer in range(samples - 1, 0, -1):
            if self.contexts(prompt, fewer, limit) >= 1:
                return 1, fewer
        needed = self.prefill_token * prompt + self.of_context(prompt, 1, limit)
        raise SystemExit(
            f"a prompt of {prompt} tokens with an answer of up to {limit} takes {gib(needed)}, and "
            f"{gib(self.left())} are free: lower FRAME_PIXELS, FRAMES_PER_CLIP, K, "
            "READER_TOKENS or MAX_NEW_TOKENS; nothing is cut")


def free_on_card():
    """Bytes that the card still has, torch's own reserve included; no bound without a card."""
    if not torch.cuda.is_available():
        return math.inf
    free, _ = torch.cuda.mem_get_info()
    reserve = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return USABLE * (free + reserve)


# ---------------------------------------------------------------- bytes
def is_30b(model):
    """Whether S.MODEL is Qwen3-VL-30B-A3B: one of its two names, or a folder with a model of its shapes."""
    file = pathlib.Path(model) / "config.json"
    if model in PUBLISHED or not file.is_file():
        return model in PUBLISHED
    shapes = json.loads(file.read_text(encoding="utf-8")).get("text_config", {})
    names = ("hidden_size", "num_hidden_layers", "num_experts", "moe_intermediate_size")
    return all(shapes.get(name) == TEXT[name] for name in names)


@functools.cache
def sketch():
    """Qwen3-VL-30B-A3B on the meta device: shapes without bytes, by what its config.json says."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
    config = Qwen3VLMoeConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False)
    with torch.device("meta"):
        return Qwen3VLMoeForConditionalGeneration(config)


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


def clip_tokens(S):
    """Tokens of a clip: frame pairs with their times."""
    pairs = math.ceil(S.FRAMES_PER_CLIP / 2)
    # 32 x 32 pixels of both frames make one token; the time of the pair takes 9.
    pair = S.FRAME_PIXELS // 1024 + 9
    return pairs * pair + 20


def prompt_tokens(S):
    """Tokens of a full prompt: K clips, and the memories of K - 1 clips."""
    return S.K * clip_tokens(S) + (S.K - 1) * S.MEMORY_TOKENS + 120


def plan(model, S, card, whole=2):
    """The Plan of a model for S's batch.

    model: may be on the meta device; card: bytes of memory; whole: bytes of a value that is not packed.
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
    # Of the experts that are unpacked, the wider tensor (E, 2 width, d) counts.
    unpacked = experts * 2 * width * d * whole if S.BITS == 4 else 0

    # Of the adapter there are its weights, their gradient and Adam's two moments, all in fp32.
    held = {"adapter and optimizer": 16 * lora_values(model, S),
            "unpacked experts": unpacked,
            "vision features": S.FEATURE_CLIPS * prompt // S.K * d * 4 * whole}
    weights = {kind: size.bytes for kind, size in weight_bytes(model, S, whole).items()}
    at_rest = sum(weights.values()) + sum(held.values())
    # In the mask of a step, the query heads that share a key head have a row each.
    sharing = text.num_attention_heads // text.num_key_value_heads
    # While a token is drawn there are its logits and probabilities in fp32, and their sums in 64 bits.
    room = Room(most=S.ROLLOUT_SEQUENCES, free=USABLE * card - at_rest, token_cache=token_cache,
                prefill_token=mlp + 15 * hidden, mask=2 * whole * sharing,
                logits=32 * text.vocab_size, layers=layers)
    prefill = {"one prompt": prompt * room.prefill_token}
    rollout = {"cache": token_cache * row,
               "masks and logits": group * (room.mask * row + room.logits)}
    training = {"checkpoints": layers * row * hidden,
                "one layer": row * (2 * mlp + 16 * hidden),
                "logits of one answer": S.MAX_NEW_TOKENS * text.vocab_size * 20}
    return Plan(prompt, row, room, weights, held, prefill, rollout, training)


def lora_values(model, S):
    """Values of the LoRA on the language model's attention."""
    ends = 0
    for name, module in model.named_modules():
        if re.fullmatch(r".*language_model.*self_attn\.[qkvo]_proj", name):
            ends += module.in_features + module.out_features
    return S.LORA_RANK * ends


def check_plan(model, S, card, whole=2):
    """Prints the byte plan -> the Room for rollouts.

    model: may be on the meta device; card: bytes of memory; whole: bytes of a value that is not packed.
    Raises SystemExit, with the constants to change, where a step doesn't fit. No prompt is ever cut to fit.
    """
    bytes_of = plan(model, S, card, whole)
    longest = model.config.get_text_config().max_position_embeddings
    if bytes_of.prompt + S.MAX_NEW_TOKENS > longest:
        raise SystemExit(
            f"a prompt of {bytes_of.prompt} tokens and {S.MAX_NEW_TOKENS} new ones exceed the "
            f"model's {longest}: lower FRAME_PIXELS, FRAMES_PER_CLIP or K; nothing is cut")
    trains = hasattr(S, "LR")
    print_plan(bytes_of, S, trains)

    group = getattr(S, "GROUP", 1)
    step = bytes_of.in_training() if trains else bytes_of.at_rest()
    weights = sum(bytes_of.weights.values())
    room = bytes_of.room
    # At least one answer's cache has to fit beside one prompt.
    answers_fit = room.contexts(bytes_of.prompt, 1, S.MAX_NEW_TOKENS) >= 1
    if step > USABLE * card or not answers_fit:
        raise SystemExit(
            f"MODEL={S.MODEL} does not fit: a card of {gib(card)}, weights {gib(weights)}, "
            f"a step {gib(step)}. Change one of BITS=4, VISION_BITS=4, DOUBLE_QUANT=1 "
            f"(now {S.BITS}, {S.VISION_BITS}, {S.DOUBLE_QUANT}), FRAME_PIXELS={S.FRAME_PIXELS}, "
            f"FRAMES_PER_CLIP={S.FRAMES_PER_CLIP}, K={S.K}, FEATURE_CLIPS={S.FEATURE_CLIPS}, "
            f"THINK_TOKENS={S.THINK_TOKENS}, MAX_NEW_TOKENS={S.MAX_NEW_TOKENS}")
    contexts, samples = room.side_by_side(bytes_of.prompt, group, S.MAX_NEW_TOKENS)
    print(f"  a step takes {gib(step)} of {gib(card)}; "
          f"contexts rolled out side by side: {contexts}")
    if S.FEATURE_CLIPS < getattr(S, "CONTEXTS", 0) * S.K:
        print(f"*** FEATURE_CLIPS={S.FEATURE_CLIPS} is less than the {S.CONTEXTS} x {S.K} clips of "
              "a step: vision runs more than once a clip ***")
    if samples < group:
        print(f"*** {samples} of {group} samples fit beside one prompt: "
              "a group is rolled out in parts, from one prefill ***")
    return room


def print_plan(bytes_of, S, trains):
    """A line for each part of the plan, with its items beside it."""
    print(f"byte plan in GiB, for prompts of {bytes_of.prompt} tokens ({S.K} clips x "
          f"{S.FRAMES_PER_CLIP} frames of at most {S.FRAME_PIXELS} pixels) and packed rows of "
          f"{bytes_of.row}:")
    parts = {"weights": bytes_of.weights,
             "beside them": bytes_of.held,
             "prefill": bytes_of.prefill,
             "rollout, a context": bytes_of.rollout}
    if trains:
        parts["training, a row"] = bytes_of.training
    for part, items in parts.items():
        sizes = [f"{item} {size / 2**30:.2f}" for item, size in items.items()]
        print(f"  {part:18} {sum(items.values()) / 2**30:6.2f} = {', '.join(sizes)}")


def gib(size):
    return f"{size / 2**30:.2f} GiB"
