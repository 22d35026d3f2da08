"""Between disk, cards and the stages: 4-bit weights that are 4-bit, what fits the card, several ranks, files.

The trick of the 4-bit experts. Qwen3-VL-30B-A3B keeps 93 % of its weights in two 3-D tensors a layer,
(E, out, in), one slice per expert. Plain 4-bit loading replaces `nn.Linear` alone and leaves them in bf16: 56
of 58 GiB. Here each expert becomes one row of NF4 codes (two values a byte) and one of scales (one per block
of 64 values), made while the file streams in, so only one such tensor at a time is ever whole. A forward pass
sorts (token, expert) pairs by expert, unpacks the experts hit, multiplies, and forgets the unpacked weights;
the backward pass unpacks them again. Router, norms, embeddings and head stay as they are. The arithmetic is
the library's (`dequantize_4bit`, `grouped_mm`): outputs and LoRA gradients are bit-equal to unpacking all.
"""
import contextlib, datetime, functools, hashlib, json, logging, os, pathlib, re, shlex, sys

RANK, WORLD = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1)))       # set by torchrun
if RANK:                         # rank 0 alone speaks; set before torch imports tqdm
    sys.stdout, os.environ["TQDM_DISABLE"] = open(os.devnull, "w"), "1"
sys.excepthook = lambda kind, *rest: (print("\nstopped; the same command goes on", file=sys.stderr)
                                      if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest))
try:
    import torch
except ImportError:              # the scripts' --help works before anything is installed
    torch = None

ROOT = pathlib.Path(__file__).resolve().parent
FILES = {"lora": "adapter_model.safetensors", "steer": "steer.safetensors", "all": "weights.safetensors"}
BLOCK = 64               # values that share a scale, as in bitsandbytes; an expert's size is a multiple of it


# ---------------------------------------------------------------- files
@contextlib.contextmanager
def written_aside(path):
    """Yields a temporary path that replaces `path` when the block ends well: readers never see half a file.
    Rank 0 alone writes."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.aside{RANK or ''}")
    yield aside
    if RANK:
        return aside.unlink()
    with open(aside, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(aside, path)


def write_text(path, text):
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path, rows, mode="w"):
    """mode "a" appends, for work in progress: a kill may tear a line, so read it back with torn=True."""
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    if mode == "w":
        return write_text(path, text)
    if not RANK:
        with open(path, mode, encoding="utf-8") as f:
            f.write(text)


def read_json(path):
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def read_jsonl(path, torn=False):
    """Rows of a JSONL file; torn: a last line without its line end is cut off the file first. ValueError names
    the line that is no JSON."""
    text = pathlib.Path(path).read_text(encoding="utf-8")
    if torn and not text.endswith("\n"):
        text = text[:text.rfind("\n") + 1]
        write_text(path, text)
    rows = []
    for n, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{path}, line {n}: {error}") from None
    return rows


def command(S, script, *more):
    """How to call another stage of this run: with what differs from the defaults that all stages share."""
    import common
    usual = vars(common.settings({"__doc__": ""}, [f"--MODEL={S.MODEL}"])) | {"MODEL": "tiny"}
    given = [shlex.quote(f"--{n}={v}") for n, v in vars(S).items()
             if n == "RUN" or n in usual and n not in common.HARMLESS and v != usual[n]]
    return " ".join(["python", script, *given, *more])


def fingerprint(*things):
    """Hash of values, and of the contents of every file in a Path: what a kept result depends on."""
    digest = hashlib.sha256()
    for thing in things:
        files = sorted(p for p in thing.rglob("*") if p.is_file()) if isinstance(thing, pathlib.Path) else []
        for data in (p.read_bytes() for p in files) if files else [json.dumps(thing, default=str).encode()]:
            digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def stamp(file):
    """[bytes, ns of the last change] of a file, [] where there is none."""
    return [file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else []


# ---------------------------------------------------------------- several ranks (torchrun)
def join():
    """Joins the process group where torchrun started several ranks."""
    dist = torch.distributed
    if WORLD > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(days=7))      # a judge may keep rank 0 for long


def gather(mine):
    """The whole list from every rank's part of it, on all of them: rank r made the items r, r + WORLD, ..."""
    if WORLD == 1:
        return mine
    join()
    parts = [None] * WORLD
    torch.distributed.all_gather_object(parts, mine)
    return [parts[i % WORLD][i // WORLD] for i in range(sum(map(len, parts)))]


def once(make):
    """make() of rank 0, on all ranks: what is paid for, or must not differ."""
    value = [make() if RANK == 0 else None]
    if WORLD > 1:
        join()
        torch.distributed.broadcast_object_list(value)
    return value[0]


def add_gradients(params):
    """Sums the gradients of all ranks in one flat message; a rank that had nothing to do adds zeros."""
    if WORLD > 1:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = torch.cat([g.flatten() for g in grads])
        torch.distributed.all_reduce(flat)
        for p, g, x in zip(params, grads, flat.split([g.numel() for g in grads])):
            p.grad = x.view_as(g)


# ---------------------------------------------------------------- packed experts
def pack(weight, double=False):
    """(E, out, in) floats -> codes (E, out * in / 2) uint8, and scales (E, out * in / 64): fp32, or with
    `double` a tuple of 8-bit scales, one fp32 scale per 256 of them, and their mean. Raises ValueError where
    a block would reach over two experts."""
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise
    E, n = len(weight), weight[0].numel()
    if n % (BLOCK * BLOCK if double else BLOCK):
        raise ValueError(f"an expert of {n} values can't be cut into blocks of {BLOCK}" +
                         f" x {BLOCK}" * double)
    codes, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    codes, scales = codes.view(E, n // 2), state.absmax.view(E, n // BLOCK)
    if double:
        mean = scales.mean()
        size = next(b for b in (256, 128, 64) if scales.shape[1] % b == 0)          # 256 but for tiny experts
        small, state = quantize_blockwise(scales - mean, blocksize=size)
        scales = (small, state.absmax.view(E, -1), mean)
    return codes, scales


def unpack(codes, scales, hit, shape, dtype):
    """Weights (H, *shape) in `dtype` of the experts `hit` (H,), from what `pack` made."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
    if isinstance(scales, tuple):
        small, large, mean = scales
        absmax = dequantize_blockwise(small[hit], absmax=large[hit].flatten(), code=_eight_bits(codes.device),
                                      blocksize=small.shape[1] // large.shape[1]) + mean
    else:
        absmax = scales[hit]
    return dequantize_4bit(codes[hit].view(-1, 1), QuantState(
        absmax.flatten(), (len(hit), *shape), dtype=dtype, blocksize=BLOCK, quant_type="nf4"))


@functools.cache
def _eight_bits(device):
    from bitsandbytes.functional import create_dynamic_map
    return create_dynamic_map().to(device)


def _packed_linear():
    """The autograd function, made late as torch may be missing (--help)."""
    class PackedLinear(torch.autograd.Function):
        """y = x W_e^T for rows x (S, in) sorted by expert; ends (H,): where each hit expert's rows end.
        Gradient for x alone: the weights are frozen, and are unpacked again instead of kept."""
        @staticmethod
        def forward(ctx, x, codes, scales, hit, ends, shape):
            ctx.packed = codes, scales, hit, ends, shape
            return torch.nn.functional.grouped_mm(x, unpack(codes, scales, hit, shape, x.dtype).mT, offs=ends)

        @staticmethod
        def backward(ctx, grad):
            codes, scales, hit, ends, shape = ctx.packed
            weight = unpack(codes, scales, hit, shape, grad.dtype)
            return torch.nn.functional.grouped_mm(grad.contiguous(), weight, offs=ends), *[None] * 5
    return PackedLinear


def packed_experts(module, hidden, chosen, weights):
    """The experts' forward pass on packed weights: the "nf4" of transformers' table of experts functions.
    hidden (N, d); chosen (N, k) ids of experts; weights (N, k) -> (N, d)."""
    linear, k = _packed_linear(), chosen.shape[1]
    expert, order = chosen.flatten().sort(stable=True)                                # (N k,) pairs by expert
    hit, count = expert.unique_consecutive(return_counts=True)                        # (H,)
    ends = count.cumsum(0).to(torch.int32)
    both = lambda name: (getattr(module, name), module.scales[name])
    d, i = module.hidden_dim, module.intermediate_dim
    out = linear.apply(hidden[order // k], *both("gate_up_proj"), hit, ends, (2 * i, d))   # (N k, 2 i)
    out = linear.apply(module._apply_gate(out), *both("down_proj"), hit, ends, (d, i))     # (N k, d)
    out = out * weights.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return out[back].view(-1, k, d).sum(1).to(hidden.dtype)                   # the sum in the library's order


@functools.cache
def quantization():
    """The class of the 4-bit configuration: the library's own, and its quantiser that packs experts too."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizers_utils import get_module_from_name

    class Pack(Bnb4bitQuantize):
        def convert(self, tensors, full_layer_name=None, model=None, **kwargs):
            (name, value), = tensors.items()
            if not is_expert(name):
                return super().convert(tensors, full_layer_name, model, **kwargs)
            module, kind = get_module_from_name(model, name)
            value = value[0] if isinstance(value, list) else value
            codes, scales = pack(value, self.hf_quantizer.quantization_config.bnb_4bit_use_double_quant)
            module.scales = getattr(module, "scales", {}) | {kind: scales}
            return {name: torch.nn.Parameter(codes, requires_grad=False)}

    @register_quantizer("nf4_experts")
    class Quantizer(Bnb4BitHfQuantizer):
        def param_needs_quantization(self, model, param_name, **kwargs):
            return is_expert(param_name) or super().param_needs_quantization(model, param_name, **kwargs)

        def get_quantize_ops(self):
            return Pack(self)

    @register_quantization_config("nf4_experts")
    class Config(BitsAndBytesConfig):
        def __init__(self, **kwargs):
            super().__init__(load_in_4bit=True, bnb_4bit_quant_type="nf4", **kwargs)
            self.quant_method = "nf4_experts"

    ALL_EXPERTS_FUNCTIONS.register("nf4", packed_experts)
    return Config


def is_expert(name):
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


# ---------------------------------------------------------------- what fits the card
def weight_bytes(model, S, plain=2):
    """{kind: [values, bytes]} of a model's weights under BITS, VISION_BITS and DOUBLE_QUANT; `model` may be
    on the meta device. Kinds: experts, linears, vision linears, embeddings and head, the rest."""
    packed = 1 / 2 + (1 / BLOCK + 4 / BLOCK / 256 if S.DOUBLE_QUANT else 4 / BLOCK)      # bytes a value
    table = {}
    for name, p in model.named_parameters():
        linear = (isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear)
                  and name.endswith("weight"))
        vision = ".visual." in name
        kind = ("experts" if is_expert(name) else
                "embeddings and head" if re.search("embed_tokens|lm_head", name) else
                "the rest" if not linear else "vision linears" if vision else "linears")
        four = (S.BITS == 4 and kind in ("experts", "linears")
                or S.VISION_BITS == 4 and kind == "vision linears")
        row = table.setdefault(kind, [0, 0])
        row[0], row[1] = row[0] + p.numel(), row[1] + int(p.numel() * (packed if four else plain))
    return table


def plan(model, S, plain=2):
    """Byte plan of the weights and of the widest moments of rollout and training, for S's batch: {item:
    bytes}, the weights' sum, and (prompt, tokens of a packed row, cache bytes of a token). plain: bytes of a
    value that is not packed. Weights and cache are exact, the rest estimates."""
    text, G = model.config.get_text_config(), getattr(S, "GROUP", 1)
    d, layers, width = text.hidden_size, text.num_hidden_layers, getattr(text, "moe_intermediate_size", 0)
    kv = 2 * layers * text.num_key_value_heads * text.head_dim * plain               # bytes of a cached token
    prompt, new = prompt_tokens(S), S.MAX_NEW_TOKENS
    row, tokens = prompt + G * new, prompt + G * new                                 # packed; cached by a context
    k = getattr(text, "num_experts_per_tok", 1)
    pair = (2 * d + 3 * (width or text.intermediate_size)) * plain           # a (token, expert) pair's values
    unpacked = 2 * width * d * getattr(text, "num_experts", 0) * plain if S.BITS == 4 else 0
    rank = S.LORA_RANK * sum(m.in_features + m.out_features for n, m in model.named_modules()
                             if re.fullmatch(r".*language_model.*self_attn\.[qkvo]_proj", n))
    repeated = kv * tokens // layers * (text.num_attention_heads // text.num_key_value_heads + 1)
    items = {f"weights: {kind}": size for kind, (_, size) in weight_bytes(model, S, plain).items()}
    weights = sum(items.values())
    items |= {"adapter, its gradient and optimizer": 16 * rank,
              "one layer's experts, unpacked": unpacked,
              "vision features kept": S.FEATURE_CLIPS * prompt // S.K * d * 4 * plain,
              "rollout: cache of a context": kv * tokens,
              "rollout: a layer's keys and values, repeated": repeated,
              "rollout: prefill of a context": prompt * (k * pair + 15 * d * plain) + 5 * prompt * prompt,
              "training: a row's checkpoints": layers * row * d * plain,
              "training: a layer's activations": row * (2 * k * pair + 16 * d * plain),
              "training: mask of a row": 4 * row * row,
              "training: logits of an answer": new * text.vocab_size * 20}
    return items, weights, (prompt, row, kv)


def prompt_tokens(S):
    """Tokens of a full prompt: K clips of frame pairs, each with its time, and memories before the newest."""
    pairs = -(-S.FRAMES_PER_CLIP // 2)
    return S.K * (pairs * (S.FRAME_PIXELS // 1024 + 9) + 20) + (S.K - 1) * S.MEMORY_TOKENS + 120


def check_plan(model, S, card, plain=2):
    """Prints the byte plan and returns how many contexts to roll out side by side, and how many samples of
    one at a time. card: bytes of memory. SystemExit, with the constants to change, where that can't fit."""
    items, weights, (prompt, row, kv) = plan(model, S, plain)
    longest, text = prompt + S.MAX_NEW_TOKENS, model.config.get_text_config()
    if longest > text.max_position_embeddings:
        raise SystemExit(f"a prompt of {prompt} tokens and {S.MAX_NEW_TOKENS} new ones exceed the model's "
                         f"{text.max_position_embeddings}: lower FRAME_PIXELS, FRAMES_PER_CLIP or K; nothing is cut")
    gib = lambda x: f"{x / 2**30:.2f} GiB"
    print(f"byte plan: prompts of {prompt} tokens ({S.K} clips x {S.FRAMES_PER_CLIP} frames of at most "
          f"{S.FRAME_PIXELS} pixels), packed rows of {row}")
    for name, size in items.items():
        print(f"  {name:38} {gib(size):>12}")
    base = weights + sum(items[n] for n in (
        "adapter, its gradient and optimizer", "one layer's experts, unpacked", "vision features kept"))
    train = base + sum(size for name, size in items.items() if name.startswith("training") and hasattr(S, "LR"))
    G, free = getattr(S, "GROUP", 1), 0.92 * card - base                       # 8 % for fragments and buffers
    prefill = items["rollout: prefill of a context"]
    context = sum(size for name, size in items.items() if name.startswith("rollout"))     # all at its widest
    samples = max(0, min(G, int((free - prefill - kv * prompt) // (1.2 * kv * S.MAX_NEW_TOKENS))))
    if samples == 0 or train > 0.92 * card:
        raise SystemExit(
            f"MODEL={S.MODEL} does not fit: a card of {gib(card)}, weights {gib(weights)}, a step "
            f"{gib(train)}. Change one of BITS=4, VISION_BITS=4, DOUBLE_QUANT=1 (now {S.BITS}, "
            f"{S.VISION_BITS}, {S.DOUBLE_QUANT}), FRAME_PIXELS={S.FRAME_PIXELS}, "
            f"FRAMES_PER_CLIP={S.FRAMES_PER_CLIP}, K={S.K}, FEATURE_CLIPS={S.FEATURE_CLIPS}, "
            f"THINK_TOKENS={S.THINK_TOKENS}, MAX_NEW_TOKENS={S.MAX_NEW_TOKENS}")
    contexts = S.ROLLOUT_CONTEXTS or max(1, int(free // context))
    print(f"  in all: {gib(train)} in a step, of {gib(card)}; "
          f"{contexts} contexts rolled out side by side")
    if S.FEATURE_CLIPS < getattr(S, "CONTEXTS", 0) * S.K:
        print(f"*** FEATURE_CLIPS={S.FEATURE_CLIPS} is less than the {S.CONTEXTS} x {S.K} clips of a step: "
              "vision runs more than once a clip ***")
    if samples < G:
        print(f"*** {samples} of {G} samples fit beside one prompt: "
              "a group is rolled out in parts, from one prefill ***")
    return contexts, samples


# ---------------------------------------------------------------- loading
def model_name(S):
    return str(ROOT / "tiny" / "base") if S.MODEL == "tiny" else S.MODEL


def load_tokenizer(S):                          # without the model
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(model_name(S))


def load_model(S):
    """(model, tokenizer, contexts side by side, samples side by side) of S.MODEL, frozen. Prints the byte
    plan before and what is used after. Raises SystemExit where the model can't be had or doesn't fit."""
    import transformers
    transformers.logging.set_verbosity_error()   # else a second adapter is said to be missing from a file
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)      # it misses a CPU kernel that is not used
    torch.set_num_threads(S.CPU_THREADS)
    torch.manual_seed(S.SEED)                    # PEFT draws a new LoRA's A from the global generator
    join()
    name, gpu = model_name(S), torch.cuda.is_available()
    if S.MODEL == "tiny":
        transformers.logging.disable_progress_bar()
    dtype, device = (torch.bfloat16, f"cuda:{torch.cuda.current_device()}") if gpu else (torch.float32, "cpu")
    options, side = (dict(dtype=dtype, attn_implementation="sdpa", device_map=device),
                     (S.ROLLOUT_CONTEXTS or 1, 10**6))
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = load_tokenizer(S)
        if S.BITS == 4:
            skip = ["lm_head"] + ["model.visual"] * (S.VISION_BITS != 4)
            options["quantization_config"] = quantization()(
                bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=bool(S.DOUBLE_QUANT),
                llm_int8_skip_modules=skip)
        if hasattr(config.get_text_config(), "num_experts"):
            options["experts_implementation"] = "nf4" if S.BITS == 4 else "grouped_mm"
        if S.MODEL != "tiny":
            with torch.device("meta"):
                sketch = transformers.AutoModelForImageTextToText.from_config(config)
            card = torch.cuda.get_device_properties(device).total_memory if gpu else (
                os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
            side = check_plan(sketch, S, card, 2 if gpu else 4)
        model = transformers.AutoModelForImageTextToText.from_pretrained(name, **options).eval()
    except (OSError, ValueError, ImportError) as e:
        raise SystemExit(f"MODEL={S.MODEL} can't be loaded: {e}") from None
    for module in model.modules():             # a bf16 kernel that packs anew: neither exact nor for training
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if S.MODEL != "tiny":
        model.model.language_model.activation_checkpointing_enable()
    add_steering(model, name)
    text = model.config.get_text_config()
    if S.MODEL == "tiny" and text.hidden_size > 512:
        raise SystemExit(f"tiny/base holds a model {text.hidden_size} wide, but MODEL=tiny takes the "
                         "embedded world's constants. Name the model by --MODEL=FOLDER instead")
    count = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())
    used = sum(x.nbytes for x in [*model.parameters(), *scales_of(model)])
    print(f"model {name}: {count / 1e6:.1f} M parameters, {used / 2**30:.3f} GiB in " + "NF4 and " * (S.BITS == 4) +
          f"{dtype}, {text.num_hidden_layers} layers {text.hidden_size} wide, on {device}" +
          (f"; allocated {torch.cuda.memory_allocated() / 2**30:.3f} GiB" if gpu else ""))
    print(f"attention: torch SDPA where a pass needs a mask (packed rows, decoding, padded prompts); "
          f"{'flash-attn' if flash(model) else 'SDPA too'} in unpadded prefills")
    if not gpu:
        print("*** no GPU: fp32 on the CPU. Fine for the embedded world; a 30B model is out of reach ***")
    elif not flash(model):
        print("*** flash-attn is missing (requirements-gpu.txt): torch's own attention kernels are used ***")
    return model, tokenizer, *side


def scales_of(model):
    """The scale tensors of all packed weights, which are no parameters."""
    for module in model.modules():
        for scales in getattr(module, "scales", {}).values():
            yield from scales if isinstance(scales, tuple) else (scales,)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            yield state.absmax
            yield from [state.state2.absmax] if state.nested else []


def flash(model):
    """Whether flash-attn can take passes without a mask: it is installed, on a GPU, the model in 16 bits."""
    from transformers.utils import is_flash_attn_2_available
    return model.device.type == "cuda" and model.dtype != torch.float32 and is_flash_attn_2_available()


def add_steering(model, name):
    """A Phase Two checkpoint of the authors holds `...layers.N.adapter.steer`: the vector that it adds to
    layer N's output is put in place for good, under whatever is trained on top."""
    from safetensors import safe_open
    from transformers.utils import cached_file
    get = lambda file: cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    index = get("model.safetensors.index.json")
    place = read_json(index)["weight_map"] if index else {}
    if not index and get("model.safetensors"):
        with safe_open(get("model.safetensors"), "pt") as f:
            place = dict.fromkeys(f.keys(), "model.safetensors")
    for key in (k for k in place if k.endswith(".adapter.steer")):
        with safe_open(get(place[key]), "pt") as f:
            vector, layer = f.get_tensor(key).to(model.device), int(re.search(r"layers\.(\d+)", key)[1])
        model.model.language_model.layers[layer].register_forward_hook(
            lambda _, args, out, vector=vector: out + vector.to(out.dtype))
        print(f"the checkpoint's steering vector (norm {vector.float().norm():.3f}) acts after layer {layer}")


# ---------------------------------------------------------------- adapters
def save_adapter(policy, writer, folder):
    """What `Policy.add` made: a PEFT folder, a vector under the authors' key, or the decoder's weights."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    kind = policy.kind[writer]
    if kind == "lora":
        if not RANK:
            policy.model.peft_config[policy.lora[writer]].save_pretrained(str(folder))
        state = get_peft_model_state_dict(policy.model, adapter_name=policy.lora[writer])
        state = {f"base_model.model.{k}": v for k, v in state.items()}
    elif kind == "steer":
        state = {f"model.language_model.layers.{policy.layer}.adapter.steer": policy.steer}
    else:
        state = policy.whole[writer]
    with written_aside(folder / FILES[kind]) as aside:
        save_file({k: v.detach().contiguous().cpu() for k, v in state.items()}, str(aside))


def load_adapter(policy, writer, folder):
    """Reads what `save_adapter` wrote, in the place of what `writer` had before, and switches it on.
    SystemExit where the folder holds no adapter."""
    kind = next((k for k, file in FILES.items() if (folder / file).exists()), None)
    if kind is None:
        raise SystemExit(f"{folder} holds none of {', '.join(FILES.values())}")
    policy.drop(writer)
    policy.add(writer, kind, folder)
