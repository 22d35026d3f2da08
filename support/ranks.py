"""Several GPUs: `torchrun --nproc-per-node=4 02_phase1_train.py` starts one process (a rank) for each.

Every rank runs the same script. It works on its own share of the contexts, `gather` puts the shares
together, and all ranks then hold the same list. With one process each function here hands back what it
was given.
"""
import datetime
import io
import os
import sys

RANK = int(os.environ.get("RANK", 0))                # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))

if RANK:                                             # rank 0 alone speaks, and draws bars
    sys.stdout = open(os.devnull, "w")
    os.environ["TQDM_DISABLE"] = "1"                 # for libraries' bars; read as tqdm is imported

# A file's name or a memory may hold what a terminal can't show.
for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")

# Without it the rows of a rollout, each as long as it happens to be, leave gaps in the card's memory.
# torch reads it when it is imported.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

try:
    import torch
    Function = torch.autograd.Function               # to build a class on
except ImportError:                                  # --help works before anything is installed
    torch = None
    Function = object


def is_first_rank():
    return RANK == 0


def my_share(items):
    """The items of this rank: of 7 items and 2 ranks, rank 0 takes 0, 2, 4 and 6, rank 1 the others."""
    return list(items)[RANK::WORLD]


def join():
    """Joins the process group where torchrun started several ranks."""
    if WORLD == 1 or torch.distributed.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    # A judge may keep one rank busy for long while the others wait.
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(days=7))


def gather(share):
    """The whole list, on every rank, from the share of each (see `my_share`)."""
    if WORLD == 1:
        return share
    join()
    shares = [None] * WORLD
    torch.distributed.all_gather_object(shares, share)
    total = sum(len(each) for each in shares)
    return [shares[i % WORLD][i // WORLD] for i in range(total)]


def gather_sum(number):
    """The sum of every rank's number."""
    return sum(gather([number]))


def once(make):
    """make() of rank 0, on all ranks: for what is paid for, or must not differ."""
    value = [make() if RANK == 0 else None]
    if WORLD > 1:
        join()
        torch.distributed.broadcast_object_list(value)
    return value[0]


def said_once(sentence):
    """What to end with, as in `raise SystemExit(said_once("why"))`, where all ranks come to the same end.

    Rank 0 says it, the others end with the exit status 1.
    """
    return sentence if is_first_rank() else 1


def add_gradients(params):
    """Sums the gradients of all ranks in one flat message. A rank that had nothing to do adds zeros."""
    if WORLD == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(flat)
    pieces = flat.split([grad.numel() for grad in grads])
    for p, piece in zip(params, pieces):
        p.grad = piece.view_as(p)


def progress(items, description, **options):
    """A tqdm bar over `items`, drawn by rank 0 alone."""
    from tqdm import tqdm
    return tqdm(items, desc=description, disable=RANK > 0, **options)
