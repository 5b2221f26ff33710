"""A model folder -> a transcriber on this process's device, with its assistant, warmed up.

Owns what "auto" chooses for decoding, and the log's account of it.
"""

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache

from simpler_distil_whisper.decoding.speculative import Assistant
from simpler_distil_whisper.decoding.speed import Speed, SpeedReport, speed_side_by_side
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.model.audio_context import AudioContext
from simpler_distil_whisper.model.devices import decoding_dtype, keep_freed_memory, share_cores
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.memory import out_of_memory, peak_memory_megabytes
from simpler_distil_whisper.model.options import (
    AudioContextChoice,
    DecodingDtype,
    InferenceDecodingOptions,
    ModelOptions,
)
from simpler_distil_whisper.model.weights import parameter_count, stored_dtype
from simpler_distil_whisper.model.whisper import Whisper, load_whisper, quieten_libraries
from simpler_distil_whisper.run import Run, log


def load_for_decoding(
    folder: ModelFolder,
    options: ModelOptions,
    device: torch.device,
    run: Run,
    for_training: bool = False,
) -> Whisper:
    """Return the model of a folder on this process's device, and log what "auto" has chosen.

    Args:
        folder: of the model.
        options: its section of the config.
        device: of this process.
        run: whose facts are noted.
        for_training: its encoder states are kept for training.
    """
    quieten_libraries()
    dtype: DecodingDtype | torch.dtype = options.dtype
    if options.dtype != "int8":
        dtype = decoding_dtype(options.dtype, device, stored_dtype(folder), for_training)
    whisper = load_whisper(folder, dtype, options.attention, device)
    share_cores(whisper.model)
    keep_freed_memory()
    chosen = {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": whisper.model.config._attn_implementation,
        "torch_threads": torch.get_num_threads(),
    }
    log.info("%s", ", ".join(f"{name} {value}" for name, value in chosen.items()))
    run.note(**chosen)
    return whisper


def load_transcriber(
    folder: ModelFolder,
    assistant_folder: ModelFolder | None,
    model: ModelOptions,
    decoding: InferenceDecodingOptions,
    seed: int,
    device: torch.device,
    run: Run,
) -> Transcriber:
    """Return a transcriber, with its assistant if there is one, that has been warmed up.

    Raises:
        ConfigError: the model or its assistant cannot be loaded or does not suit the options.
    """
    whisper = load_for_decoding(folder, model, device, run)
    assistant = None
    if assistant_folder:
        # The model's own, also where "auto" decodes in another dtype than it trains in.
        dtype = model.dtype if model.dtype == "int8" else whisper.model.dtype
        student = load_whisper(assistant_folder, dtype, model.attention, device)
        assistant = Assistant(student, whisper)
    transcriber = Transcriber(
        whisper,
        decoding,
        seed,
        assistant,
        word_timestamps=decoding.word_timestamps,
        audio_context=_chosen_context(decoding.audio_context, whisper, assistant),
        record_steps=True,
    )
    try:
        transcriber.warm_up()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        transcriber.room.has_not_fitted(transcriber.batch_size)
    clear_device_cache()
    return transcriber


def _chosen_context(
    choice: AudioContextChoice, whisper: Whisper, assistant: Assistant | None
) -> AudioContext | None:
    """Return how much of the window the encoder is given, and log it; None: all of it."""
    context = None
    if choice == "auto":
        context = whisper.audio_context
        if assistant is not None and assistant.student.audio_context != context:
            # The two would be given different parts of the window.
            log.info("audio context: none, since model and assistant were not trained for the same")
            context = None
    elif choice != "full":
        context = AudioContext(choice)
    if context:
        log.info("audio context: each clip and %g s, not the window", context.margin_seconds)
    return context


def speed_report(speed: Speed, transcriber: Transcriber, folder: ModelFolder) -> SpeedReport:
    """Return the speed of all processes together; call it in every one of them."""
    processes: list[Speed] = gather_object([speed])
    return speed_side_by_side(processes).report(
        batch_size=transcriber.batch_size,
        processes=len(processes),
        parameters=parameter_count(folder),
        peak_memory_megabytes=peak_memory_megabytes(transcriber.whisper.model.device),
        model_bytes=folder.weight_bytes,
    )
