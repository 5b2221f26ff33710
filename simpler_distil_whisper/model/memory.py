"""What fits into the memory of this process's device, and which errors mean that it does not."""

import sys
from dataclasses import dataclass

import torch
from transformers import WhisperForConditionalGeneration

CPU_CACHE_BYTES = 2 * 2**30  # for the decoder's keys and values
# What errors say, in lower case, where memory has run out, and who says so.
OUT_OF_MEMORY = (
    "out of memory",  # torch's allocators of GPUs, CUDA itself, and NCCL where it quotes CUDA
    "cuda_error_out_of_memory",  # CUDA's driver
    "cudaerrormemoryallocation",  # CUDA's runtime
    "can't allocate memory",  # torch's allocator on CPUs
    "not enough memory",  # the same, on Windows
    "bad_alloc",  # libraries in C++
    "cublas_status_alloc_failed",  # cuBLAS
    "cublas_status_not_initialized",  # cuBLAS, where the rest does not hold its workspace
    "cudnn_status_alloc_failed",  # cuDNN
    "cudnn_status_internal_error_device_allocation_failed",  # cuDNN 9
    "cudnn_status_internal_error_host_allocation_failed",  # cuDNN 9
    "cudnn_status_not_initialized",  # cuDNN, where the rest does not hold its handle
    "cudnn_status_not_supported",  # cuDNN, of a convolution without room for its workspace
    "unable to find an engine",  # torch, of the same convolution
    "failed to cuda calloc",  # NCCL
    "failed to cuda host alloc",  # NCCL
    "failed to malloc",  # NCCL
)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory is exhausted, on the device or beside it.

    Libraries without memory raise errors of many types, most of them plain RuntimeErrors: only
    their words tell.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = str(error).lower()
    return any(phrase in words for phrase in OUT_OF_MEMORY)


@dataclass
class Room:
    """How many rows are decoded at once, as far as memory has proved to suffice.

    Attributes:
        rows: the most rows to try.
        fitted: the most that have fitted.
    """

    rows: int
    fitted: int = 1

    def has_fitted(self, rows: int) -> None:
        """Remember rows for which memory sufficed."""
        self.fitted = max(self.fitted, rows)

    def has_not_fitted(self, rows: int) -> None:
        """Try half of these rows from now on; a single row is to blame itself."""
        self.rows = (rows + 1) // 2 if rows > 1 else self.fitted


def suitable_batch_size(
    model: WhisperForConditionalGeneration,
    beams: int = 1,
    assistant: WhisperForConditionalGeneration | None = None,
    sampled_texts: int = 0,
) -> int:
    """Return how many windows to decode at once: as many as fit into the device's memory.

    Larger batches read the weights less often. The whole memory counts, not what is free now: a
    run that is repeated must form the same batches.

    Args:
        model: what decodes.
        beams: of each window.
        assistant: drafts for the model.
        sampled_texts: of each window, sampled together once it is decoded.
    """
    models = [model, assistant] if assistant is not None else [model]
    window = sum(_cache_bytes(each, beams, sampled_texts) for each in models)
    if model.device.type != "cuda":
        return int(min(32, max(1, CPU_CACHE_BYTES // window)))
    window += sum(_encoder_bytes(each) for each in models)
    memory = torch.cuda.get_device_properties(model.device).total_memory
    room = memory // 2 - sum(_weight_bytes(each) for each in models)
    return int(min(256, max(1, room // window)))


def _cache_bytes(model: WhisperForConditionalGeneration, beams: int, sampled_texts: int = 0) -> int:
    """Return what the decoder keeps of a window: its keys and values, and the logits of a step."""
    config = model.config
    position = 2 * config.decoder_layers * config.d_model * model.dtype.itemsize
    # Beams that change places are copied: then all of them are there twice. Sampled texts never do;
    # one loop in a batch lets the rows of all have as many positions as there can be.
    rows = max(1 if beams == 1 else 2 * beams, sampled_texts)
    logits = 4 * config.vocab_size * 4
    own = rows * config.max_target_positions
    return int(position * (config.max_source_positions + own) + max(beams, sampled_texts) * logits)


def _encoder_bytes(model: WhisperForConditionalGeneration) -> int:
    """Return what a window takes in a layer of the encoder."""
    config = model.config
    return int(16 * config.max_source_positions * config.d_model * model.dtype.itemsize)


def _weight_bytes(model: WhisperForConditionalGeneration) -> int:
    """Return what the weights take, and the copies of projections that the decoder fuses."""
    config = model.config
    fused = 5 * config.decoder_layers * config.d_model**2
    head = 4 * config.vocab_size * config.d_model
    return int((model.num_parameters() + fused) * model.dtype.itemsize + head)


def peak_memory_megabytes(device: torch.device) -> int | None:
    """Return the most memory that this process has used: of the GPU, if it computes on one.

    None where the system does not tell, as Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    try:
        import resource
    except ImportError:
        return None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes // (2**20 if sys.platform == "darwin" else 2**10)
