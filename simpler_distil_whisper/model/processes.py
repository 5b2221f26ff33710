"""The processes of one run: how they join, wait for one another, and agree.

Three connections serve three ends. One carries tensors, between GPUs by NCCL; one, of gloo, sums
of numbers on the CPU. A process that does not answer there within half an hour is lost, and the
others' GPUs are not kept for it. By the third, of gloo too, processes wait for hours until another
has labelled its share.
"""

import datetime
import functools
import os
import platform
from collections import Counter, defaultdict
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from torch import Tensor, distributed

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.launch import is_main_process, process_count, process_rank
from simpler_distil_whisper.run import ProcessLost, log

FOR_TENSORS = datetime.timedelta(minutes=30)
FOR_WORK = datetime.timedelta(days=1)
FOR_THE_START = datetime.timedelta(minutes=10)
NOT_JOINED = "accelerate has not joined all processes"


def join_processes() -> torch.device:
    """Connect this process to the others, if several were launched, and return its device.

    Raises:
        ConfigError: the processes do not reach one another, or two share a GPU.
    """
    _count_among_visible_gpus()
    try:
        state = PartialState(cpu=_several_on_cpu(), timeout=FOR_TENSORS)
    except (RuntimeError, ValueError) as error:
        raise _not_connected(error) from error
    assert state.num_processes == process_count(), NOT_JOINED
    _check_connections(state.device)
    _prefer_kernels_without_plans()
    _let_float32_be_float32()
    device: torch.device = state.device
    return device


def make_accelerator(
    precision: Literal["auto", "float32", "bf16", "fp16"], seed: int
) -> Accelerator:
    """Return the accelerator for training on this device, with all random states seeded.

    Raises:
        ConfigError: the device cannot compute in this precision, the launcher shards models, or
            the processes do not reach one another.
    """
    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "").lower() in ("1", "true"):
            raise ConfigError(
                f"the launcher asks for {plugin}, which splits a model into parts: a student fits "
                "into one GPU, so launch with plain data parallelism (DDP). For a teacher that "
                'leaves it no room: teacher.dtype "bfloat16", teacher.device, or a '
                "teacher_cache.folder"
            )
    gpu = torch.cuda.is_available()
    if precision == "fp16" and not gpu:
        raise ConfigError('precision: "fp16" needs a GPU; "float32" and "bf16" run everywhere')
    if precision == "auto":
        precision = "bf16" if gpu and has_bfloat16() else "float32"
    join_processes()
    set_seed(seed)
    try:
        accelerator = Accelerator(
            mixed_precision="no" if precision == "float32" else precision,
            cpu=_several_on_cpu(),
            # Gradients become parts of what is exchanged: not kept twice, and not copied back.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except ValueError as error:  # of a precision that this build of torch has not
        if precision == "float32":
            raise
        raise ConfigError(f'precision: "{precision}": {error}; use "float32"') from None
    assert accelerator.num_processes == process_count(), NOT_JOINED
    return accelerator


def wait_for_everyone(patience: datetime.timedelta = FOR_WORK) -> None:
    """Return once every process has called this: others may be at work for hours.

    Raises:
        ProcessLost: a process has ended, or did not come in time; the message names it.
    """
    if process_count() == 1:
        return
    try:
        distributed.monitored_barrier(_waiting_group(), timeout=patience, wait_all_ranks=True)
    except RuntimeError as error:
        raise ProcessLost(
            f"process {process_rank()} waits for others in vain: {_first_line(error)}. Their own "
            "messages say why; run the same command again to continue"
        ) from error


def sums_over_processes(numbers: Tensor) -> Tensor:
    """Return the sum of each number, on the CPU as they are; call it in every process.

    A sum between GPUs would wait until they have done all that they were given.
    """
    if process_count() > 1:
        distributed.all_reduce(numbers, group=_counting_group())
    return numbers


def smallest_of_all(number: int) -> int:
    """Return the smallest of the processes' numbers; call it in every one of them."""
    numbers: list[int] = gather_object([number])
    return min(numbers)


class SharedSums:
    """Sums to which each process adds when it likes; nobody waits for another.

    The main process keeps them: it must live until the others have added their last.
    """

    def __init__(self) -> None:
        """Begin with nothing; to be called in every process."""
        self._own: Counter[str] = Counter()
        self._store: Any = None
        if process_count() > 1:
            self._store = self._connected(0) if is_main_process() else None
            [port] = broadcast_object_list([self._store.port if self._store else None])
            self._store = self._store or self._connected(port)

    def add(self, name: str, number: int) -> int:
        """Add to the sum of that name, and return it."""
        if self._store:
            return int(self._store.add(name, number))
        self._own[name] += number
        return self._own[name]

    @staticmethod
    def _connected(port: int) -> Any:
        return distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], port, is_master=port == 0, wait_for_workers=False
        )


def has_bfloat16() -> bool:
    """Return whether the GPU computes in bfloat16 itself; emulated, it is slower than float32."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _count_among_visible_gpus() -> None:
    """Let LOCAL_RANK number this process's GPU, also where each process sees only its own.

    accelerate takes its remainder for the device, but the number itself for that of DDP.
    """
    local_rank = os.environ.get("LOCAL_RANK", "")
    if local_rank.isdigit() and torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(int(local_rank) % torch.cuda.device_count())


def _several_on_cpu() -> bool:
    """Return whether accelerate has to be told that the launched processes share the CPU.

    It would otherwise take each of them for the only one, and each would do all of the work.
    """
    return process_count() > 1 and not torch.cuda.is_available()


@functools.cache
def _waiting_group() -> Any:
    """Return the connection for waiting; the first call of each process must be the same one."""
    return distributed.new_group(backend="gloo", timeout=FOR_WORK)


@functools.cache
def _counting_group() -> Any:
    """Return the connection for sums of numbers; the first call must be made by all together."""
    return distributed.new_group(backend="gloo", timeout=FOR_TENSORS)


@functools.cache
def _check_connections(device: torch.device) -> None:
    """Use all connections once: what does not work ends the run before its work, not after.

    Raises:
        ConfigError: a process cannot be reached, or two compute on the same GPU.
    """
    if process_count() == 1:
        return
    places: list[tuple[str, str] | None] = [None] * process_count()
    try:
        wait_for_everyone(FOR_THE_START)
        distributed.all_gather_object(places, _place(device), _waiting_group())
        _refuse_shared_gpus(places)
        ones = torch.ones(1, device=device)
        distributed.all_reduce(ones)
        sums = int(ones), int(sums_over_processes(torch.ones(1)))
        assert sums == (process_count(), process_count()), NOT_JOINED
    except (RuntimeError, ProcessLost) as error:
        raise _not_connected(error) from error
    hosts = {host for host, _ in filter(None, places)}
    log.info("%d processes on %d machines are connected", process_count(), len(hosts))


def _place(device: torch.device) -> tuple[str, str]:
    """Return the machine and the GPU of this process; "" if it computes on the CPU."""
    if device.type != "cuda":
        return platform.node(), ""
    return platform.node(), str(torch.cuda.get_device_properties(device).uuid)


def _refuse_shared_gpus(places: list[tuple[str, str] | None]) -> None:
    ranks = defaultdict(list)
    for rank, place in enumerate(places):
        ranks[place].append(rank)
    for place, several in ranks.items():
        if place and place[1] and len(several) > 1:
            raise ConfigError(
                f"processes {', '.join(map(str, several))} compute on the same GPU of {place[0]}: "
                "launch as many processes per machine as it has GPUs"
            )


def _not_connected(error: Exception) -> ConfigError:
    return ConfigError(
        f"process {process_rank()} of {process_count()} has no connection to all others: "
        f"{_first_line(error)}. On several machines MASTER_ADDR and MASTER_PORT must be reachable "
        "from each, and GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME may have to name the network"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _prefer_kernels_without_plans() -> None:
    """Let attention be computed without cuDNN, which plans anew for every shape.

    A decoder's shapes change with every token, and a training step's with every batch. torch
    prefers cuDNN on recent GPUs.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _let_float32_be_float32() -> None:
    """Let convolutions in float32 be computed in it, as products are; cuDNN would drop 13 bits.

    Not by the `fp32_precision` of newer versions of torch: what still reads `allow_tf32`, as
    torch.compile does, would then fail.
    """
    torch.backends.cudnn.allow_tf32 = False
