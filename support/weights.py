"""The model: 4-bit experts, loading, and adapters on disk.

The trick of the 4-bit experts. Qwen3-VL-30B-A3B keeps 93 % of its weights in two tensors a layer,
each (E, out, in): one matrix for each of E experts. The library's 4-bit loading replaces `nn.Linear`
alone and leaves these tensors in bf16, 56 of 58 GiB. Here they are packed as well. An expert becomes
one row of codes and one row of scales, so the experts that a batch needs are picked by row number:

    weight (E, out, in), say (3, 2, 64)       codes (3, 64) uint8         scales (3, 2) fp32
    expert 0  [ 64 values | 64 values ]  ->   [ 32 bytes | 32 bytes ]     [ 0.31 | 0.28 ]
    expert 1  [ 64 values | 64 values ]  ->   [ 32 bytes | 32 bytes ]     [ 0.25 | 0.30 ]
    expert 2  [ 64 values | 64 values ]  ->   [ 32 bytes | 32 bytes ]     [ 0.27 | 0.33 ]

A byte holds two codes of 4 bits. A code is the number of one of NF4's 16 levels between -1 and 1, and
the scale of a block is the largest magnitude among its 64 values. Code 12 is the level 0.44, and in the
first block it stands for 0.44 * 0.31 = 0.14. So a value takes 4.5 bits: 4, and 32 / 64 for its scale.

- Loading (`quantization`): a tensor is packed as soon as it is read. Only one at a time is ever whole.
- Forward (`packed_experts`): experts are unpacked, multiplied and forgotten: all of them for many tokens, for
  few those that were chosen.
- Backward (`PackedLinear`): they are unpacked once more. Frozen weights need no gradient themselves.

The arithmetic is the library's own (`dequantize_4bit`, `grouped_mm`), so outputs and LoRA gradients are
bit-equal to those of a model that was unpacked as a whole. Router, norms, embeddings and head stay as
they are.
"""
import functools
import logging
import os
import re
import warnings
from collections import namedtuple

from support.attention import use_packed_attention
from support.plan import BLOCK, Room, check_plan, is_expert
from support.ranks import Function, is_first_rank, join, said_once, torch
from support.runs import ROOT, read_json, writing, written_aside

# What an adapter's folder holds, by the kind of adapter.
FILES = {"lora": "adapter_model.safetensors",
         "steer": "steer.safetensors",
         "all": "weights.safetensors"}
TINY_WIDTH = 512                 # a model wider than this is none of the toy world's

# Scales that are packed themselves: 8-bit codes (E, S), an fp32 scale for 256 codes (E, S / 256), and the
# mean that was taken off before ().
DoubleScales = namedtuple("DoubleScales", "codes scales mean")


# ---------------------------------------------------------------- 4-bit experts: pack and unpack
def pack(weight, double=False):
    """Codes (E, out * in / 2) uint8 and scales of a weight (E, out, in).

    The scales are fp32 (E, out * in / 64), or DoubleScales with `double`. Raises ValueError where a block
    would reach over two experts.
    """
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise
    experts = len(weight)
    values = weight[0].numel()
    tile = BLOCK * BLOCK if double else BLOCK
    if values % tile:
        raise ValueError(f"an expert of {values} values can't be cut into blocks of {tile}")
    codes, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    codes = codes.view(experts, values // 2)
    scales = state.absmax.view(experts, values // BLOCK)
    if double:
        mean = scales.mean()
        # 256 scales share a scale of their own. An expert of the toy world has fewer.
        block = next(size for size in (256, 128, 64) if scales.shape[1] % size == 0)
        small, state = quantize_blockwise(scales - mean, blocksize=block)
        scales = DoubleScales(small, state.absmax.view(experts, -1), mean)
    return codes, scales


def unpack(codes, scales, hit, shape, dtype):
    """Weights (H, out, in) in `dtype` of the experts `hit` (H,), from what `pack` made; of all where hit is None.

    shape: (out, in).
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit
    if hit is not None:
        codes = codes[hit]
    if isinstance(scales, DoubleScales):
        scales = unpack_scales(scales, hit)                                   # (H, out * in / 64)
    elif hit is not None:
        scales = scales[hit]
    whole = (len(codes), *shape)
    state = QuantState(scales.flatten(), whole, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(codes.view(-1, 1), state)


def unpack_scales(double, hit):
    """fp32 scales (H, out * in / 64) of the experts `hit` (H,), or of all where it is None."""
    from bitsandbytes.functional import dequantize_blockwise
    block = double.codes.shape[1] // double.scales.shape[1]
    levels = levels_of_8_bits(double.codes.device)
    codes, absmax, mean = double
    if hit is not None:
        codes = codes[hit]
        absmax = absmax[hit]
    scales = dequantize_blockwise(codes, absmax=absmax.flatten(), code=levels, blocksize=block)
    return scales + mean


@functools.cache
def levels_of_8_bits(device):
    from bitsandbytes.functional import create_dynamic_map
    return create_dynamic_map().to(device)


# ---------------------------------------------------------------- 4-bit experts: forward and backward
def sort_by_expert(chosen, experts):
    """Sorts the (token, expert) pairs of chosen (N, k) by expert -> (order, hit, ends).

    order (N k,): the pairs' places in chosen.flatten(); hit (H,): the experts to unpack; ends (H,): where the
    rows of each of them end. Shapes follow from N alone, never from which experts were chosen, so the processor
    need not wait for the card. With at least as many pairs as experts, all are unpacked, where they lie: hit is
    None. Three tokens, each sent to two of six experts:

    >>> order, hit, ends = sort_by_expert(torch.tensor([[5, 2], [2, 4], [5, 2]]), experts=6)
    >>> (order // 2).tolist()                # the token of each row
    [0, 1, 2, 1, 0, 2]
    >>> hit, ends.tolist()                   # rows 0, 1, 2 are expert 2's, 3 is expert 4's, 4 and 5 expert 5's
    (None, [0, 0, 3, 3, 4, 6])

    With fewer, each pair unpacks its own, and an expert may come twice:

    >>> _, hit, ends = sort_by_expert(torch.tensor([[5, 2], [2, 4]]), experts=6)
    >>> hit.tolist(), ends.tolist()
    ([2, 2, 4, 5], [1, 2, 3, 4])
    """
    expert, order = chosen.flatten().sort(stable=True)
    if len(expert) < experts:
        ends = torch.arange(1, len(expert) + 1, device=chosen.device)
        return order, expert, ends.to(torch.int32)
    every = torch.arange(experts, device=chosen.device)
    ends = torch.searchsorted(expert, every, right=True)
    return order, None, ends.to(torch.int32)


class PackedLinear(Function):
    """Rows x (R, in), sorted by expert, each times its expert's weight (out, in) -> (R, out).

    codes, scales, shape: see `unpack`; hit, ends: see `sort_by_expert`. The gradient is for x alone.
    """

    @staticmethod
    def forward(ctx, x, codes, scales, hit, ends, shape):
        ctx.unpacked = functools.partial(unpack, codes, scales, hit, shape)
        ctx.ends = ends
        weight = ctx.unpacked(x.dtype)                                        # (H, out, in)
        return torch.nn.functional.grouped_mm(x, weight.mT, offs=ends)        # (R, out)

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.unpacked(grad.dtype)
        grad = grad.contiguous()
        grad_x = torch.nn.functional.grouped_mm(grad, weight, offs=ctx.ends)  # (R, in)
        return grad_x, None, None, None, None, None


def packed_experts(module, hidden, chosen, weights):
    """The forward pass of a layer's experts, which transformers finds under the name "nf4".

    hidden (N, d); chosen (N, k): the experts that the router sends a token to; weights (N, k) -> (N, d).
    """
    experts_per_token = chosen.shape[1]
    order, hit, ends = sort_by_expert(chosen, module.num_experts)

    def linear(name, rows, shape):
        codes = getattr(module, name)
        return PackedLinear.apply(rows, codes, module.scales[name], hit, ends, shape)

    d = module.hidden_dim
    width = module.intermediate_dim
    rows = hidden[order // experts_per_token]                                 # (N k, d)
    rows = linear("gate_up_proj", rows, (2 * width, d))                       # (N k, 2 width)
    rows = module._apply_gate(rows)                                           # (N k, width)
    rows = linear("down_proj", rows, (d, width))                              # (N k, d)
    rows = rows * weights.flatten()[order, None]
    # A token's k results are summed in the router's order, as the library does: float sums depend on it.
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return rows[place].view(-1, experts_per_token, d).sum(1).to(hidden.dtype)


# ---------------------------------------------------------------- 4-bit experts: packed while they load
@functools.cache
def quantization():
    """The class of the 4-bit configuration: the library's own, whose quantiser packs experts too."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizers_utils import get_module_from_name

    class Pack(Bnb4bitQuantize):
        """What the library calls with each tensor that it has read."""

        def convert(self, tensors, full_layer_name=None, model=None, **kwargs):
            [(name, value)] = tensors.items()
            if not is_expert(name):
                return super().convert(tensors, full_layer_name, model, **kwargs)
            if isinstance(value, list):
                value = value[0]
            double = self.hf_quantizer.quantization_config.bnb_4bit_use_double_quant
            codes, scales = pack(value, double)
            module, tensor_name = get_module_from_name(model, name)
            module.scales = getattr(module, "scales", {}) | {tensor_name: scales}
            return {name: torch.nn.Parameter(codes, requires_grad=False)}

    @register_quantizer("nf4_experts")
    class Quantizer(Bnb4BitHfQuantizer):
        def param_needs_quantization(self, model, param_name, **kwargs):
            usual = super().param_needs_quantization(model, param_name, **kwargs)
            return is_expert(param_name) or usual

        def get_quantize_ops(self):
            return Pack(self)

    @register_quantization_config("nf4_experts")
    class Config(BitsAndBytesConfig):
        def __init__(self, **kwargs):
            super().__init__(load_in_4bit=True, bnb_4bit_quant_type="nf4", **kwargs)
            self.quant_method = "nf4_experts"

    ALL_EXPERTS_FUNCTIONS.register("nf4", packed_experts)
    return Config


def scales_of(model):
    """The scale tensors of all packed weights, which are no parameters of the model."""
    for module in model.modules():
        for scales in getattr(module, "scales", {}).values():              # experts
            if isinstance(scales, DoubleScales):
                yield from scales
            else:
                yield scales
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)                       # linears, by the library
        if state is not None:
            yield state.absmax
            if state.nested:
                yield state.state2.absmax


# ---------------------------------------------------------------- loading
def model_name(S):
    return str(ROOT / "tiny" / "base") if S.MODEL == "tiny" else S.MODEL


def load_tokenizer(S):
    """The tokenizer of S.MODEL, without the model."""
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(model_name(S))


def load_model(S):
    """(model, tokenizer, the Room for rollouts) of S.MODEL. Prints a byte plan first, and then what was loaded.

    Raises SystemExit where the model can't be had or doesn't fit.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    silence_libraries(S)
    torch.set_num_threads(S.CPU_THREADS)
    torch.manual_seed(S.SEED)                # PEFT draws a new LoRA's A from the global generator
    join()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        refuse_an_old_card(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    # cuDNN's attention plans anew for each new length of a row, and in sampling every step has one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    name = model_name(S)
    try:
        config = AutoConfig.from_pretrained(name)
        refuse_a_large_tiny_base(S, config)
        tokenizer = load_tokenizer(S)
        options = loading_options(S, config, dtype)
        options |= {"dtype": dtype, "device_map": device}
        room = Room(most=S.ROLLOUT_SEQUENCES)             # the toy world's model is small enough
        if S.MODEL != "tiny":
            with torch.device("meta"):       # shapes without bytes
                sketch = AutoModelForImageTextToText.from_config(config)
            room = check_plan(sketch, S, memory_of(device), dtype.itemsize)
        model = AutoModelForImageTextToText.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"MODEL={S.MODEL} can't be loaded: {error}") from None
    model.eval()
    use_exact_kernels(model)
    use_packed_attention(model.model.language_model)
    if S.MODEL != "tiny":
        model.model.language_model.activation_checkpointing_enable()
    add_steering(model, name)
    print_model(model, name, S)
    return model, tokenizer, room


def refuse_an_old_card(name, capability):
    if capability < (8, 0):
        major, minor = capability
        raise SystemExit(f"{name} has compute capability {major}.{minor}, and attention "
                         "(support/attention.py) needs 8.0: an A100, an RTX 30 or a later card")


def silence_libraries(S):
    """No warnings about what is meant so, and no bar but rank 0's."""
    import transformers
    # Otherwise a second adapter is said to be missing from a file.
    transformers.logging.set_verbosity_error()
    # It misses a CPU kernel that is not used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT asks whether several adapters are meant. They are.
    warnings.filterwarnings("ignore", "Already found a `peft_config`")
    if S.MODEL == "tiny" or not is_first_rank():
        transformers.logging.disable_progress_bar()


def refuse_a_large_tiny_base(S, config):
    """MODEL=tiny takes the toy world's constants, which are wrong for another model in its place."""
    width = config.get_text_config().hidden_size
    if S.MODEL == "tiny" and width > TINY_WIDTH:
        raise SystemExit(f"tiny/base holds a model {width} wide, but MODEL=tiny takes the toy "
                         "world's constants. Name the model by --MODEL=FOLDER instead")


def loading_options(S, config, dtype):
    """Arguments of `from_pretrained`: torch's own attention, and 4 bits where BITS says so."""
    options = {"attn_implementation": "sdpa"}
    if S.BITS == 4:
        left_whole = ["lm_head"] if S.VISION_BITS == 4 else ["lm_head", "model.visual"]
        options["quantization_config"] = quantization()(
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=bool(S.DOUBLE_QUANT),
            llm_int8_skip_modules=left_whole)
    if hasattr(config.get_text_config(), "num_experts"):
        options["experts_implementation"] = "nf4" if S.BITS == 4 else "grouped_mm"
    return options


def memory_of(device):
    """Bytes of the card's memory, or of the machine's where there is none."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def use_exact_kernels(model):
    """Switches off a CPU kernel of the library that packs weights anew: it is not exact, nor for training."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def head_in_fp32(head, hidden):
    """Logits (..., V) in fp32 of outputs (..., d), whatever the head's type.

    A 16-bit head sums in fp32 and rounds the sums to three digits, which would move log-probs by a hundredth.
    """
    if hidden.dtype == torch.float32:
        return head(hidden)
    if hidden.device.type == "cpu":
        return torch.nn.functional.linear(hidden.float(), head.weight.float())
    rows = hidden.reshape(-1, hidden.shape[-1])                               # (N, d)
    return UnroundedLinear.apply(rows, head.weight).view(*hidden.shape[:-1], -1)


class UnroundedLinear(Function):
    """Rows x (N, in) in 16 bits times a frozen weight (out, in) of that type -> (N, out) in fp32."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        weight, = ctx.saved_tensors
        return grad.to(weight.dtype) @ weight, None


def print_model(model, name, S):
    """One line on what was loaded, and what it has to do without."""
    values = 0
    for p in model.parameters():
        codes_in_a_value = 2 if p.dtype == torch.uint8 else 1
        values += p.numel() * codes_in_a_value
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *scales_of(model)])
    text = model.config.get_text_config()
    kind = f"NF4 and {model.dtype}" if S.BITS == 4 else f"{model.dtype}"
    print(f"model {name}: {values / 1e6:.1f} M parameters, {size / 2**30:.3f} GiB in {kind}, "
          f"{text.num_hidden_layers} layers {text.hidden_size} wide, on {model.device}")
    if model.device.type == "cpu" and S.MODEL != "tiny":
        print("*** no GPU: fp32 on the CPU, where a 30B model is out of reach ***")


# ---------------------------------------------------------------- a steering vector in a checkpoint
def add_steering(model, name):
    """Puts the steering vector of a Phase Two checkpoint in place for good, under whatever is trained on top.

    The authors keep it as `...layers.N.adapter.steer`: a vector (d,) that is added to layer N's output. Their files
    hold one for each layer, but all except one are zero.
    """
    from safetensors import safe_open
    for key, file in tensor_files(name).items():
        if not key.endswith(".adapter.steer"):
            continue
        with safe_open(file_of_model(name, file), "pt") as tensors:
            vector = tensors.get_tensor(key).to(model.device)
        if not vector.any():
            continue
        layer = int(re.search(r"layers\.(\d+)", key)[1])
        hook = functools.partial(add_vector, vector)
        model.model.language_model.layers[layer].register_forward_hook(hook)
        norm = vector.float().norm()
        print(f"the checkpoint's steering vector (norm {norm:.3f}) acts after layer {layer}")


def add_vector(vector, layer, args, output):
    """A forward hook of `layer`."""
    return output + vector.to(output.dtype)


def tensor_files(name):
    """{name of a tensor: name of the file that holds it} of a model's folder or hub name."""
    from safetensors import safe_open
    index = file_of_model(name, "model.safetensors.index.json")
    if index:
        return read_json(index)["weight_map"]
    single = file_of_model(name, "model.safetensors")
    if not single:
        return {}
    with safe_open(single, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), "model.safetensors")


def file_of_model(name, file):
    """The path of a model's file, from the cache or the hub; None if the model has no such file."""
    from transformers.utils import cached_file
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False)


# ---------------------------------------------------------------- adapters on disk
def save_adapter(policy, writer, folder):
    """Saves what `Policy.add` made: a PEFT folder, a vector under the authors' key, a decoder's weights."""
    from peft import get_peft_model_state_dict
    kind = policy.kind[writer]
    if kind == "lora":
        name = policy.lora[writer]
        if is_first_rank():
            with writing(folder):
                policy.model.peft_config[name].save_pretrained(str(folder))
        state = {}
        for key, value in get_peft_model_state_dict(policy.model, adapter_name=name).items():
            state[f"base_model.model.{key}"] = value
    elif kind == "steer":
        layer, vector, _ = policy.steer[writer]
        state = {steer_key(layer): vector}
    else:
        state = policy.whole[writer]
    write_tensors(folder / FILES[kind], state)


def write_tensors(file, tensors):
    from safetensors.torch import save
    tensors = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
    # The library's own writing hides it from others, and does not say why a disk refused.
    with written_aside(file) as aside:
        aside.write_bytes(save(tensors))


def read_tensors(file, device="cpu"):
    """{name: tensor} of a safetensors file. SystemExit where it is broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(str(file), str(device))
    except (OSError, SafetensorError) as error:
        raise SystemExit(said_once(f"{file} can't be read ({error}): it was cut or damaged. Delete "
                                   "its folder, and run the script that made it again")) from None


def check_tensors(file, saved, needed):
    """SystemExit unless what a file holds is what is needed: {name: tensor} each, the same names and shapes.

    Otherwise the model would go on without a part of it, or with none, and nobody would see that.
    """
    missing = [name for name in needed if name not in saved]
    unknown = [name for name in saved if name not in needed]
    misshapen = []
    for name, tensor in saved.items():
        if name in needed and tensor.shape != needed[name].shape:
            shape = tuple(tensor.shape)
            misshapen.append(f"{name} {shape} in the place of {tuple(needed[name].shape)}")
    wrong = []
    for what, names in (("missing", missing), ("unknown to this model", unknown),
                        ("of another shape", misshapen)):
        if names:
            wrong.append(f"{len(names)} {what}, such as {names[0]}")
    if wrong:
        raise SystemExit(said_once(
            f"{file} does not fit this model. It holds {len(saved)} tensors, {len(needed)} are "
            f"needed: {'; '.join(wrong)}. Name the model that it was made for (--MODEL), or make it "
            "anew for this one (--RUN=NEWNAME)"))


def lora_config(folder, rank):
    """The configuration of the LoRA in a folder; without one, of a new LoRA on the decoder's attention."""
    from peft import LoraConfig, PeftConfig
    if not folder:
        attention = r".*language_model.*self_attn\.[qkvo]_proj"
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=attention)
    file = folder / "adapter_config.json"
    if not file.exists():
        raise SystemExit(said_once(f"{file} is missing: a LoRA is {FILES['lora']} and that file"))
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(said_once(f"{file} can't be read ({type(error).__name__}: {error}). Delete its "
                                   "folder, and run the script that made it again")) from None
    if not isinstance(config, LoraConfig):
        raise SystemExit(said_once(f"{file} is of the kind {config.peft_type}: take a LoRA"))
    return config


def steer_key(layer):
    """The authors' name of a steering vector after this layer."""
    return f"model.language_model.layers.{layer}.adapter.steer"


def that_steer(tensors):
    """Of an adapter's vectors those that are not zero; all of them, where none is."""
    acting = {key: vector for key, vector in tensors.items() if vector.any()}
    return acting or tensors


def steered_layer(tensors):
    """The layer that such a name among `tensors` speaks of; 0 where there is none."""
    layers = re.findall(r"layers\.(\d+)\.adapter\.steer", " ".join(tensors))
    return int(layers[0]) if layers else 0


def load_adapter(policy, writer, folder):
    """Puts what `save_adapter` wrote in the place of what `writer` had before, and switches it on.

    Raises SystemExit where the folder holds no adapter.
    """
    kinds = [kind for kind, file in FILES.items() if (folder / file).exists()]
    if not kinds:
        raise SystemExit(f"{folder} holds none of {', '.join(FILES.values())}")
    policy.drop(writer)
    policy.add(writer, kinds[0], folder)
