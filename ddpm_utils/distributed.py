"""Training of one run in several processes.

Each process takes its share of every batch, the gradients are averaged, and process 0 writes the
files. `torchrun` starts the processes, and PyTorch's DistributedDataParallel averages. In a single
process, nothing here has any effect.
"""

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import runtime


class WorkerLost(RuntimeError):
    """Another process of the run has died.

    The message names the step and the last complete checkpoint.
    """


@contextlib.contextmanager
def group(device: str | None = None):
    """Join the run that `torchrun` started, and yield the device of this process.

    Without `torchrun`, it yields `pick_device(device)`.

    On GPUs, each process uses the card with its number on the machine, and the processes
    communicate through NCCL. In all other cases they use the CPU and Gloo.

        with distributed.group() as device:
            state = training.TrainState(cfg, UNet(**cfg.network()), device)
            for record in runs.train(state, images, held_out, folder):
                if distributed.rank() == 0:
                    print(record.step)
    """
    chosen = runtime.pick_device(device)
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield chosen
        return
    if chosen.type == "cuda":
        chosen = runtime.pick_device(f"cuda:{dist.get_node_local_rank()}")
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", device_id=chosen)
    else:
        chosen = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, 0 … world−1.

    Process 0 writes files, measures and prints.
    """
    return dist.get_rank() if world() > 1 else 0


def world() -> int:
    """Return how many processes train together; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(batch_size: int) -> slice:
    """Return which part of the whole batch belongs to this process.

    Raises ValueError if the batch cannot be divided equally among the processes.
    """
    part, left = divmod(batch_size, world())
    if left:
        tries = " or ".join(str(n * world()) for n in (part, part + 1) if n)
        raise ValueError(
            f"batch_size={batch_size} does not divide among {world()} processes: try {tries}"
        )
    return slice(rank() * part, (rank() + 1) * part)


def agree(**facts) -> None:
    """Raise ValueError, in every process, unless `facts` are equal in all of them."""
    if world() == 1:
        return
    everyones = [None] * world()
    dist.all_gather_object(everyones, facts)
    for name, first in everyones[0].items():
        for number, theirs in enumerate(everyones):
            if theirs[name] != first:
                raise ValueError(
                    f"the processes differ: {name} is {first!r} in process 0, {theirs[name]!r} in "
                    f"process {number}. Start all with the same command, and give every machine "
                    "the same data and checkpoint."
                )


def seed_dropout(seed: int, step: int) -> None:
    """Give each of several processes its own dropout masks.

    A resumed run gets the same masks again.
    """
    if world() > 1:
        torch.manual_seed((seed * 1_000_003 + step) * world() + rank())


def first_process_only(action):
    """Call `action` in process 0 and return None.

    An exception in `action` is raised in every process, so that none keeps waiting.
    """
    problem = [None]
    if rank() == 0:
        try:
            action()
        except Exception as error:
            problem = [error]
    if world() > 1:
        dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise problem[0]


def replicate(model: nn.Module, average: nn.Module) -> nn.Module:
    """Wrap `model` so that its gradients are means over all processes, and return it.

    The weights and `average` become those of process 0.
    """
    if world() == 1:
        return model
    for tensor in average.state_dict().values():
        dist.broadcast(tensor, 0)
    # static: some weights may stay out of the loss
    return DistributedDataParallel(model, static_graph=True)


def gather(loss: Tensor, stopped: bool) -> tuple[Tensor, Tensor | bool]:
    """Return the loss of the whole batch, and whether any process was told to stop.

    The host waits for neither value.
    """
    if world() == 1:
        return loss, stopped
    both = torch.stack([loss, torch.full_like(loss, stopped)])
    dist.all_reduce(both)
    return both[0] / world(), both[1] > 0


@contextlib.contextmanager
def lost_worker(message):
    """Turn an error from Gloo about a lost process into a WorkerLost with the text `message()`.

    The same holds for NCCL if it reports the loss.
    """
    try:
        yield
    except RuntimeError as error:
        if world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise WorkerLost(message()) from error
        raise
