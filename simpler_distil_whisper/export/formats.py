"""A Whisper's weights in the layouts of other programs, and these programs at work on them.

Owns what is known of CTranslate2, faster-whisper and openai-whisper, which are imported only where
they are needed. Whether their texts are the right ones is for `verification`.
"""

import copy
import dataclasses
import importlib.metadata
import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers.decoders import ByteLevel
from torch import Tensor

from simpler_distil_whisper import __version__
from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.audio import SAMPLE_RATE
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.export.targets import (
    FEWEST_MULTILINGUAL_TOKENS,
    openai_language_count,
    why_not_faster_whisper,
)
from simpler_distil_whisper.export.verification import System, TranscribeBatch, Transcript
from simpler_distil_whisper.model.devices import torch_dtype
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.options import DecodingOptions, Dtype, Task
from simpler_distil_whisper.model.special_tokens import special_tokens
from simpler_distil_whisper.model.whisper import Whisper, copy_processor, load_tokenizer
from simpler_distil_whisper.run import DataError

OTHER_NAMES = {("<|nocaptions|>", "<|nospeech|>")}  # of tokens in Hugging Face's early folders

OPENAI_NAMES = (  # transformers' name -> openai's, one after the other
    (r"^model\.", ""),
    (r"\.layers\.", ".blocks."),
    (r"\.embed_tokens\.", ".token_embedding."),
    (r"\.embed_positions\.weight", ".positional_embedding"),
    (r"\.self_attn_layer_norm\.", ".attn_ln."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attn_ln."),
    (r"\.final_layer_norm\.", ".mlp_ln."),
    (r"\.self_attn\.", ".attn."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.out_proj\.", ".out."),
    (r"\.fc1\.", ".mlp.0."),
    (r"\.fc2\.", ".mlp.2."),
    (r"^encoder\.layer_norm\.", "encoder.ln_post."),
    (r"^decoder\.layer_norm\.", "decoder.ln."),
)


def original_system(whisper: Whisper, folder: ModelFolder, options: DecodingOptions) -> System:
    """Return the model itself, decoded by this project."""
    transcriber = Transcriber(whisper, options)

    def transcribe(
        waveforms: Sequence[np.ndarray], languages: Sequence[str | None]
    ) -> list[Transcript]:
        features = log_mel(waveforms, whisper.feature_extractor)
        return [
            Transcript(hypothesis.text.strip(), hypothesis.language, hypothesis.token_count)
            for hypothesis in transcriber(features, languages)
        ]

    return System(
        f"this project {__version__}",
        str(whisper.model.dtype).removeprefix("torch."),
        transcriber.batch_size,
        folder.weight_bytes,
        transcribe,
    )


def write_ctranslate2(
    whisper: Whisper, folder: ModelFolder, quantization: str, target: Path
) -> None:
    """Write the folder that CTranslate2 and faster-whisper load.

    Raises:
        DataError: the tokenizer cannot be written.
    """
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):  # type: ignore[misc]
        """Takes the model and the tokenizer as loaded here, instead of loading them itself."""

        def load_model(self, *arguments: object, **options: object) -> object:
            return copy.deepcopy(whisper.model)  # it rounds to integers in place

        def load_tokenizer(self, *arguments: object, **options: object) -> object:
            return whisper.tokenizer

    Converter(str(folder.path)).convert(str(target), quantization=quantization)
    # Without tokenizer.json faster-whisper would download one; without preprocessor_config.json it
    # would compute 80 mels, whatever the model takes.
    copy_processor(folder.processor, target)
    if (target / "tokenizer.json").exists():
        return
    try:
        whisper.tokenizer.save_pretrained(target)
    except Exception as error:  # tokenizers raises no other class, also where the disk is full
        raise DataError(_cannot_be_written(target, error)) from None


def ctranslate2_system(whisper: Whisper, folder: ModelFolder, target: Path, task: Task) -> System:
    """Return an exported folder in faster-whisper, or in CTranslate2 where that cannot take it."""
    import ctranslate2

    # It would warn where it computes in another type than it stores; the table shows both.
    ctranslate2.set_log_level(logging.ERROR)
    if why_not_faster_whisper(folder):
        return _bare_ctranslate2(whisper, target, task)
    import faster_whisper

    model = faster_whisper.WhisperModel(
        str(target), device="cpu", cpu_threads=torch.get_num_threads(), local_files_only=True
    )
    window = round(folder.window_seconds * SAMPLE_RATE)
    options = _faster_whisper_options(whisper, task)

    # It would fill the window with zeros of the log-mel, which are no silence.
    def transcribe(padded: np.ndarray, language: str | None) -> Transcript:
        iterator, info = model.transcribe(padded, language=language, **options)
        segments = list(iterator)
        text = "".join(segment.text for segment in segments).strip()
        return Transcript(text, info.language, sum(len(segment.tokens) for segment in segments))

    return System(
        with_version("faster-whisper"),
        model.model.compute_type,
        1,
        (target / "model.bin").stat().st_size,
        padded_one_by_one(window, transcribe),
    )


def padded_one_by_one(
    window: int, transcribe: Callable[[np.ndarray, str | None], Transcript]
) -> TranscribeBatch:
    """Return what transcribes a batch with a function of one clip and its language.

    Args:
        window: samples, to which each clip is padded with silence.
        transcribe: takes a padded clip, float32 [window].
    """

    def transcribe_batch(
        waveforms: Sequence[np.ndarray], languages: Sequence[str | None]
    ) -> list[Transcript]:
        return [
            transcribe(np.pad(waveform, (0, window - len(waveform))), language)
            for waveform, language in zip(waveforms, languages, strict=True)
        ]

    return transcribe_batch


def _faster_whisper_options(whisper: Whisper, task: Task) -> dict[str, Any]:
    """Return the options by which faster-whisper decodes as this project: greedily, in one go."""
    return {
        "task": task,
        "beam_size": 1,
        "temperature": 0.0,
        "without_timestamps": True,
        "compression_ratio_threshold": None,
        "log_prob_threshold": None,
        "no_speech_threshold": None,
        "condition_on_previous_text": False,
        "suppress_tokens": suppressed_tokens(whisper),
        "suppress_blank": suppresses_blank(whisper),
    }


def _bare_ctranslate2(whisper: Whisper, target: Path, task: Task) -> System:
    """Return the engine beneath faster-whisper, with this project's log-mels and prompts."""
    import ctranslate2

    engine = ctranslate2.models.Whisper(
        str(target), device="cpu", intra_threads=torch.get_num_threads()
    )
    transcriber = Transcriber(whisper, DecodingOptions())
    suppressed = suppressed_tokens(whisper)

    def transcribe(
        waveforms: Sequence[np.ndarray], languages: Sequence[str | None]
    ) -> list[Transcript]:
        mels = log_mel(waveforms, whisper.feature_extractor).numpy()
        results = engine.generate(
            ctranslate2.StorageView.from_array(np.ascontiguousarray(mels)),
            [whisper.tokens.prompt(language, task) for language in languages],
            beam_size=1,
            # It stops at half of this: the other half of a Whisper's positions is for the prompt.
            max_length=2 * transcriber.max_new_tokens,
            suppress_tokens=suppressed,
            suppress_blank=suppresses_blank(whisper),
        )
        sequences = [result.sequences_ids[0] for result in results]
        return [
            Transcript(transcriber.text_of(tokens).strip(), language or "en", len(tokens))
            for tokens, language in zip(sequences, languages, strict=True)
        ]

    return System(
        with_version("ctranslate2"),
        engine.compute_type,
        transcriber.batch_size,
        (target / "model.bin").stat().st_size,
        transcribe,
    )


def write_openai(whisper: Whisper, quantization: Dtype, target: Path) -> None:
    """Write `model.pt`, which `whisper.load_model` takes, and the same as `model.safetensors`.

    Raises:
        DataError: they cannot be written.
    """
    dtype = torch_dtype(quantization, torch.device("cpu"))
    weights, dims = openai_weights(whisper), openai_dimensions(whisper)
    named = {name: value.to(dtype).contiguous() for name, value in weights.items()}
    target.mkdir()
    try:
        torch.save({"dims": dims, "model_state_dict": named}, target / "model.pt")
        save_file(named, target / "model.safetensors", metadata={"dims": json.dumps(dims)})
    except (RuntimeError, SafetensorError) as error:  # no OSError, also where the disk is full
        raise DataError(_cannot_be_written(target, error)) from None
    shutil.copymode(target / "model.pt", target / "model.safetensors")


def _cannot_be_written(target: Path, error: Exception) -> str:
    return f"{target} cannot be written: {error}: make room, and run the same command again"


def openai_dimensions(whisper: Whisper) -> dict[str, int]:
    """Return the sizes of a model by openai-whisper's names."""
    config = whisper.model.config
    return {
        "n_mels": config.num_mel_bins,
        "n_audio_ctx": config.max_source_positions,
        "n_audio_state": config.d_model,
        "n_audio_head": config.encoder_attention_heads,
        "n_audio_layer": config.encoder_layers,
        "n_vocab": config.vocab_size,
        "n_text_ctx": config.max_target_positions,
        "n_text_state": config.d_model,
        "n_text_head": config.decoder_attention_heads,
        "n_text_layer": config.decoder_layers,
    }


def openai_weights(whisper: Whisper) -> dict[str, Tensor]:
    """Return the weights of a model by openai-whisper's names."""
    weights = whisper.model.state_dict()
    weights.pop("proj_out.weight")  # it is the embedding of the tokens
    return {openai_name(name): weight for name, weight in weights.items()}


def openai_name(name: str) -> str:
    """Return openai-whisper's name of a weight, given transformers' name."""
    for pattern, replacement in OPENAI_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def check_openai_vocabulary(folder: ModelFolder) -> None:
    """Raise ConfigError if the tokens are not those of the vocabulary built into openai-whisper."""
    from whisper.tokenizer import get_tokenizer

    multilingual = folder.config["vocab_size"] >= FEWEST_MULTILINGUAL_TOKENS
    # It knows 100 languages; a vocabulary has as many as its size leaves room for.
    languages = openai_language_count(folder.config["vocab_size"])
    theirs = get_tokenizer(multilingual, num_languages=languages).encoding
    tokenizer, decoder = load_tokenizer(folder), ByteLevel()
    end = special_tokens(tokenizer, folder).end
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    for id, token in enumerate(tokens):
        text = token if id >= end else decoder.decode([token])
        expected = theirs.decode([id]) if id < theirs.n_vocab else "no token"
        if text != expected and (text, expected) not in OTHER_NAMES:
            raise ConfigError(
                f"variants: {folder.processor}: token {id} is {text!r}; openai-whisper has "
                f"OpenAI's own vocabulary built in, where it is {expected!r}"
            )


def openai_system(whisper: Whisper, target: Path, task: Task) -> System:
    """Return an exported `model.pt` in openai-whisper."""
    import whisper as openai

    model = openai.load_model(str(target / "model.pt"), device="cpu")
    options = openai.DecodingOptions(
        task=task,
        without_timestamps=True,
        suppress_tokens=suppressed_tokens(whisper),
        suppress_blank=suppresses_blank(whisper),
        fp16=False,
    )

    def transcribe(padded: np.ndarray, language: str | None) -> Transcript:
        mel = openai.log_mel_spectrogram(torch.from_numpy(padded), model.dims.n_mels)
        result = openai.decode(model, mel, dataclasses.replace(options, language=language))
        return Transcript(result.text.strip(), result.language, len(result.tokens))

    weights = (target / "model.pt").stat().st_size
    transcribe_batch = padded_one_by_one(openai.audio.N_SAMPLES, transcribe)
    return System(with_version("openai-whisper"), "float32", 1, weights, transcribe_batch)


def suppressed_tokens(whisper: Whisper) -> list[int]:
    """Return the tokens that this project's decoder never chooses, for another's options."""
    stated = whisper.model.generation_config.suppress_tokens or ()
    return sorted({*whisper.tokens.control, *stated} - {whisper.tokens.end})


def suppresses_blank(whisper: Whisper) -> bool:
    """Return whether the text may neither be empty nor begin with a space alone."""
    return bool(whisper.model.generation_config.begin_suppress_tokens)


def with_version(package: str) -> str:
    """Return the name of an installed package with its version."""
    return f"{package} {importlib.metadata.version(package)}"
