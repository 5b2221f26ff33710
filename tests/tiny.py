"""Small real Whispers and small real audio for tests: nothing here is mocked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from simpler_distil_whisper.text.languages import WHISPER_LANGUAGES

SIXTEEN_KHZ = 16_000
# A random teacher's own evidence is against its labels.
ALL_EVIDENCE = {
    "max_compression_ratio": None,
    "min_average_log_probability": None,
    "max_no_speech_probability": None,
}


def make_tokenizer(
    languages: list[str], window_seconds: int = 30, vocabulary: dict[str, int] | None = None
) -> WhisperTokenizer:
    """A byte-level tokenizer without merges, and Whisper's special tokens in Whisper's order.

    Args:
        vocabulary: the tokens of texts; None: the 256 bytes.
    """
    vocab = vocabulary or {byte: id for id, byte in enumerate(sorted(ByteLevel.alphabet()))}
    end = AddedToken("<|endoftext|>", special=True, normalized=False)
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[], pad_token=end)
    names = [
        "<|startoftranscript|>",
        *(f"<|{code}|>" for code in languages),
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
        "<|startofprev|>",
        "<|nospeech|>",
        "<|notimestamps|>",
    ]
    specials = [AddedToken(name, special=True, normalized=False) for name in names]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    times = [f"<|{step * 0.02:.2f}|>" for step in range(window_seconds * 50 + 1)]
    tokenizer.add_tokens([AddedToken(time, special=False, normalized=False) for time in times])
    return tokenizer


def make_model_folder(
    folder: Path,
    *,
    languages: list[str] | None = None,
    english_only: bool = False,
    mels: int = 80,
    width: int = 16,
    window_seconds: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sharp: float = 4.0,
    talkative: bool = False,
    **config: object,
) -> Path:
    """Write a random Whisper of the given layout.

    Args:
        sharp: factor of the weights: a freshly initialised Whisper is sure of next to nothing.
        talkative: predict different texts of different lengths for different audio, as `sharp`
            alone does not; seed 53 with languages en, zh, ja is a good one.
        config: other fields of `WhisperConfig`.
    """
    codes = list(WHISPER_LANGUAGES)[:99] if languages is None else languages
    tokenizer = make_tokenizer(codes, window_seconds)
    ids = tokenizer.get_vocab()
    end = ids["<|endoftext|>"]
    torch.manual_seed(seed)
    layout: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_target_positions": 448,
        **config,
    }
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            num_mel_bins=mels,
            d_model=width,
            encoder_ffn_dim=2 * width,
            decoder_ffn_dim=2 * width,
            max_source_positions=window_seconds * 50,
            pad_token_id=end,
            bos_token_id=end,
            eos_token_id=end,
            decoder_start_token_id=ids["<|startoftranscript|>"],
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **layout,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "conv" not in name and "encoder.embed_positions" not in name:
                parameter.mul_(sharp)
        if talkative:
            _make_talkative(model, end, ids["<|notimestamps|>"])
    last_layer = layout["decoder_layers"] - 1
    model.generation_config = GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        is_multilingual=not english_only,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        suppress_tokens=[ids["#"], ids["$"]],
        begin_suppress_tokens=[ids["Ġ"], end],
        alignment_heads=[[last_layer, 0], [last_layer, 1]],
        max_length=layout["max_target_positions"],
    )
    if not english_only:
        model.generation_config.lang_to_id = {f"<|{code}|>": ids[f"<|{code}|>"] for code in codes}
        tasks = ("transcribe", "translate")
        model.generation_config.task_to_id = {task: ids[f"<|{task}|>"] for task in tasks}
    if talkative:  # in ASCII, so that its text can be turned back into its tokens
        text = {character: id for character, id in ids.items() if id < end}
        model.generation_config.suppress_tokens = sorted(
            id for character, id in text.items() if not character.isascii() and character != "Ġ"
        )
    model.to(dtype).save_pretrained(folder)
    save_processor(folder, tokenizer, mels, window_seconds)
    return folder


def _make_talkative(model: WhisperForConditionalGeneration, end: int, last_special: int) -> None:
    """Make position, audio and prompt outweigh the last token; make the end token likely."""
    encoder, decoder = model.model.encoder, model.model.decoder
    for convolution in (encoder.conv1, encoder.conv2):
        convolution.weight.mul_(4)
    decoder.embed_positions.weight.mul_(10)
    decoder.embed_tokens.weight[end].normal_(0, 0.1)
    decoder.embed_tokens.weight[end + 1 : last_special].mul_(5)
    for layer in decoder.layers:
        layer.encoder_attn.q_proj.weight.mul_(3)
        layer.encoder_attn.out_proj.weight.mul_(10)
        layer.self_attn.q_proj.weight.mul_(3)
        layer.self_attn.out_proj.weight.mul_(10)


def save_processor(
    folder: Path, tokenizer: WhisperTokenizer, mels: int, window_seconds: int
) -> None:
    tokenizer.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=window_seconds)
    extractor.save_pretrained(folder)


def add_words(folder: Path, words: dict[str, str]) -> Path:
    """Add words to the vocabulary of a model folder, as people do for names and terms.

    Args:
        folder: of the model, which is changed.
        words: each word with the letter in whose place the model will write it.
    """
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    tokenizer.add_tokens(list(words))
    model.resize_token_embeddings(len(tokenizer))
    ids = tokenizer.get_vocab()
    with torch.no_grad():
        for word, letter in words.items():
            rows = model.model.decoder.embed_tokens.weight
            rows[ids[word]] = rows[ids[letter]]
            rows[ids[letter]] *= 0.9
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tone(path: Path, seconds: float = 1.0, rate: int = SIXTEEN_KHZ, seed: int = 0) -> Path:
    """Write a noisy tone; a random Whisper can tell those of different seeds apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    sound = np.sin(2 * np.pi * random.uniform(100, 2000) * time) * random.uniform(0.1, 0.5)
    soundfile.write(path, sound + random.normal(0, 0.05, len(time)), rate)
    return path


def write_rows(path: Path, rows: list[object]) -> Path:
    """Write JSON lines; a string is written as it is, so that a line can be broken."""
    lines = [
        row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, allow_nan=False)
        for row in rows
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_corpus(folder: Path, count: int, *, language: str = "zh", start: int = 0) -> Path:
    """Write `count` clips of 0.4 to 1.6 s with texts, and their manifest."""
    rows = []
    for number in range(start, start + count):
        name = f"audio/{number:04d}.wav"
        write_tone(folder / name, 0.4 + 1.2 * (number % 7) / 6, seed=number)
        text = f"第{number}句" if language == "zh" else f"Sentence {number}."
        rows.append({"id": f"u{number}", "audio": name, "text": text, "language": language})
    return write_rows(folder / f"{language}-{start}.jsonl", rows)
