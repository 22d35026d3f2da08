"""The model between disk and memory: 4-bit weights, what fits the card, and the files of the adapters.

The trick of the 4-bit experts. Qwen3-VL-30B-A3B keeps 93 % of its weights in two 3-D tensors a layer, (E, out, in), one
slice per expert. Plain 4-bit loading replaces `nn.Linear` alone and leaves them in bf16: 56 of 58 GiB. Here each expert
becomes one row of NF4 codes (two values a byte) and one of scales (one per block of 64 values), made while the file
streams in, so the bf16 tensor exists for one layer's tensor at a time. A forward pass sorts the (token, expert) pairs by
expert, unpacks the rows of the experts that were hit, multiplies, and forgets the unpacked weights; the backward pass
unpacks them again. So nothing but codes and scales is ever kept, and router, norms, embeddings and head stay as they are.
Arithmetic is the library's (`dequantize_4bit`, `grouped_mm`): outputs and LoRA gradients are bit-equal to unpacking all.
"""
import functools

from common import FILES, ROOT, Policy, torch, written_aside

BLOCK = 64                       # values that share a scale, as in bitsandbytes; an expert's size is a multiple of it


# ---------------------------------------------------------------- packed experts
def pack(weight, double=False):
    """(E, out, in) floats -> codes (E, out * in / 2) uint8, and scales (E, out * in / 64): fp32, or with `double` a
    tuple of 8-bit scales, one fp32 scale per 256 of them, and their mean. Raises ValueError where a block would reach
    over two experts."""
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise
    E, n = len(weight), weight[0].numel()
    if n % (BLOCK * BLOCK if double else BLOCK):
        raise ValueError(f"an expert of {n} values can't be cut into blocks of {BLOCK}" + f" x {BLOCK}" * double)
    codes, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    codes, scales = codes.view(E, n // 2), state.absmax.view(E, n // BLOCK)
    if double:
        mean = scales.mean()
        size = next(b for b in (256, 128, 64) if scales.shape[1] % b == 0)            # 256 but for tiny experts
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
    return dequantize_4bit(codes[hit].view(-1, 1), QuantState(absmax.flatten(), (len(hit), *shape), dtype=dtype,
                                                              blocksize=BLOCK, quant_type="nf4"))


@functools.cache
def _eight_bits(device):
    from bitsandbytes.functional import create_dynamic_map
    return create_dynamic_map().to(device)


def _packed_linear():
    """The autograd function, made late as torch may be missing (--help)."""
    class PackedLinear(torch.autograd.Function):
        """y = x W_e^T for rows x (S, in) sorted by expert; ends (H,): where each hit expert's rows end. Gradient for x
        alone: the weights are frozen, and are unpacked again instead of kept."""
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
    return out[back].view(-1, k, d).sum(1).to(hidden.dtype)                           # the sum in the library's order


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
