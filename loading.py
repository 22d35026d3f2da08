"""The model and its adapters between disk and memory."""
from common import FILES, ROOT, Policy, torch, written_aside


def load_policy(S):
    """The frozen model of S.MODEL with its tokenizer -> Policy. Raises SystemExit where it can't be used."""
    import transformers
    transformers.logging.set_verbosity_error()   # else a second adapter is reported as missing from the first's file
    torch.set_num_threads(S.CPU_THREADS)
    torch.manual_seed(S.SEED)                    # PEFT draws a new LoRA's A from the global generator
    name, gpu = str(ROOT / "tiny" / "base") if S.MODEL == "tiny" else S.MODEL, torch.cuda.is_available()
    if S.MODEL == "tiny":
        transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            name, dtype=torch.bfloat16 if gpu else torch.float32, attn_implementation="sdpa",
            experts_implementation="grouped_mm", device_map="cuda" if gpu else "cpu").eval()
    except (OSError, ValueError) as e:
        raise SystemExit(f"MODEL={S.MODEL} can't be loaded: {e}") from None
    policy = Policy(model, tokenizer, S)
    if S.MODEL == "tiny" and policy.hidden > 512:
        raise SystemExit(f"tiny/base holds a model {policy.hidden} wide, but MODEL=tiny takes the embedded world's "
                         "constants. Name the model by --MODEL=FOLDER instead")
    count, gib = (sum(f(p) for p in model.parameters()) for f in (torch.numel, lambda p: p.nbytes / 2**30))
    print(f"model {name}: {count / 1e6:.1f} M parameters, {gib:.3f} GiB in {model.dtype}, {policy.layers} layers "
          f"{policy.hidden} wide, on {policy.device}; attention: torch SDPA (packed rows need a mask)")
    if not gpu:
        print("*** no GPU: fp32 on the CPU. Fine for the embedded world; a 30B model is out of reach ***")
    return policy


def save_adapter(policy, writer, folder):
    """What `Policy.add` made: a PEFT folder, a vector under the authors' key, or the decoder's weights."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    kind = policy.kind[writer]
    if kind == "lora":
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
    """Reads what `save_adapter` wrote, in the place of what `writer` had before, and switches it on. SystemExit
    where the folder holds no adapter."""
    kind = next((k for k, file in FILES.items() if (folder / file).exists()), None)
    if kind is None:
        raise SystemExit(f"{folder} holds none of {', '.join(FILES.values())}")
    policy.drop(writer)
    policy.add(writer, kind, folder)
