"""Error rates of a Whisper folder on a demo manifest, decoded with stock transformers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import jiwer
import numpy as np
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from demo.grammar import LANGUAGES, normalize
from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.manifest import read_manifest
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.decoding.batches import in_batches
from simpler_distil_whisper.model.pruning import prune_whisper

# One window per clip; or windows one after the other, alone or prompted with the earlier text.
DECODINGS = ("window", "sequential", "conditioned")
_BATCH = 40
_RESAMPLES = 1000
_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def transcribe(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    features: torch.Tensor,
    languages: Sequence[str],
) -> list[str]:
    """Transcribes a batch of features greedily, with the languages given."""
    tokens = model.generate(
        features, language=list(languages), task="transcribe", max_new_tokens=60
    )
    return processor.batch_decode(tokens, skip_special_tokens=True)


def transcribe_long(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    waveforms: list[np.ndarray],
    languages: Sequence[str],
    conditioned: bool,
) -> list[str]:
    """Transcribes recordings sequentially, with the fallback thresholds of openai's whisper.

    Args:
        model: Whisper model.
        processor: Its processor.
        waveforms: Recordings at 16 kHz of any length.
        languages: Language of each.
        conditioned: Whether the text of earlier windows prompts the later ones.

    Returns:
        One text per recording.
    """
    texts = []
    for waveform, language in zip(waveforms, languages, strict=True):
        features = processor.feature_extractor(
            waveform,
            sampling_rate=16000,
            return_tensors="pt",
            truncation=False,
            padding="longest",
            return_attention_mask=True,
        )
        torch.manual_seed(0)
        tokens = model.generate(
            features.input_features,
            attention_mask=features.attention_mask,
            language=language,
            task="transcribe",
            return_timestamps=True,
            condition_on_prev_tokens=conditioned,
            temperature=_TEMPERATURES,
            compression_ratio_threshold=2.4,
            logprob_threshold=-1.0,
            no_speech_threshold=0.6,
            max_new_tokens=100,
        )
        texts += processor.batch_decode(tokens, skip_special_tokens=True)
    return texts


def errors_per_clip(
    language: str, references: Sequence[str], hypotheses: Sequence[str]
) -> np.ndarray:
    """Returns the errors and the reference length of every clip: characters in zh, words in en."""
    measure = jiwer.process_characters if language == "zh" else jiwer.process_words
    counts = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        result = measure(normalize(reference), normalize(hypothesis))
        errors = result.substitutions + result.deletions + result.insertions
        counts.append((errors, result.hits + result.substitutions + result.deletions))
    return np.array(counts)


def error_rate(counts: np.ndarray) -> tuple[float, float, float]:
    """Returns the corpus error rate and its 95 % bootstrap interval over clips."""
    rng = np.random.default_rng(0)
    draws = counts[rng.integers(len(counts), size=(_RESAMPLES, len(counts)))].sum(axis=1)
    low, high = np.percentile(draws[:, 0] / draws[:, 1], [2.5, 97.5])
    errors, length = counts.sum(axis=0)
    return float(errors / length), float(low), float(high)


def evaluate(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    manifest: Path,
    decode: str = "window",
) -> dict[str, tuple[float, float, float]]:
    """Returns zh CER and en WER of a model on a manifest, each with its interval.

    Args:
        model: Whisper model.
        processor: Its processor.
        manifest: Manifest of clips or of long recordings.
        decode: One of `DECODINGS`.
    """
    utterances = list(read_manifest(manifest, Columns()).utterances)
    rates = {}
    for language in LANGUAGES:
        chosen = [utterance for utterance in utterances if utterance.language == language]
        hypotheses: list[str] = []
        for batch in in_batches(chosen, _BATCH):
            waveforms = [load_audio(*utterance.clip) for utterance in batch]
            languages = [language] * len(waveforms)
            if decode != "window":
                conditioned = decode == "conditioned"
                hypotheses += transcribe_long(model, processor, waveforms, languages, conditioned)
                continue
            features = processor.feature_extractor(
                waveforms, sampling_rate=16000, return_tensors="pt"
            ).input_features
            hypotheses += transcribe(model, processor, features, languages)
        references = [utterance.text or "" for utterance in chosen]
        rates[language] = error_rate(errors_per_clip(language, references, hypotheses))
    return rates


def main() -> None:
    """Prints zh CER and en WER of a model folder on a manifest."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument(
        "--decode", choices=DECODINGS, default="window", help="sequential: recordings of any length"
    )
    parser.add_argument("--keep-layers", help="decoder layers to keep, such as 0,3")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    model = WhisperForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    if args.keep_layers:
        kept = [int(layer) for layer in args.keep_layers.split(",")]
        model = prune_whisper(model, range(model.config.encoder_layers), kept)
    processor = WhisperProcessor.from_pretrained(args.model)
    rates = evaluate(model, processor, args.manifest, args.decode)
    for language, (rate, low, high) in rates.items():
        unit = "CER" if language == "zh" else "WER"
        print(f"{language} {unit} {rate:.4f} (95 % interval {low:.4f} to {high:.4f})")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
