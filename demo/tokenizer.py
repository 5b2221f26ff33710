"""The demo's Whisper tokenizer: bytes, Mandarin characters, English pieces, Whisper's specials."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, trainers
from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from demo.grammar import draw_sentence

WINDOW_SECONDS = 5
# Whisper computes a language's id as <|startoftranscript|> + 1 + its place in the language list,
# where English and Mandarin come first; <|notimestamps|> has to be the last special token, and
# the timestamps have to follow it.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|zh|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
_ENGLISH_MERGES = 260
_SAMPLED_SENTENCES = 20000


def build_processor() -> WhisperProcessor:
    """Builds the tokenizer from the grammars, and the feature extractor for 5-second windows."""
    vocabulary, merges = _byte_pair_merges()
    tokenizer = WhisperTokenizer(
        vocab=vocabulary, merges=merges, pad_token=_special(SPECIAL_TOKENS[0])
    )
    others = [_special(token) for token in SPECIAL_TOKENS[1:]]
    tokenizer.add_special_tokens({"additional_special_tokens": others})
    steps = range(WINDOW_SECONDS * 50 + 1)
    timestamps = [f"<|{step * 0.02:.2f}|>" for step in steps]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in timestamps])
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW_SECONDS)
    return WhisperProcessor(extractor, tokenizer)


def save_processor(folder: Path) -> None:
    """Writes the processor with the older file names that some tools look for as well."""
    processor = build_processor()
    processor.save_pretrained(folder)
    processor.feature_extractor.save_pretrained(folder)
    vocabulary, merges = _byte_pair_merges()
    dump = json.dumps(vocabulary, ensure_ascii=False)
    (folder / "vocab.json").write_text(dump + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Without this file the tokenizer's normalize() fails.
    (folder / "normalizer.json").write_text("{}\n", encoding="utf-8")


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _byte_pair_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    symbols = bytes_to_unicode()
    vocabulary = {symbol: k for k, symbol in enumerate(symbols.values())}
    merges: dict[tuple[str, str], None] = {}

    def merge(left: str, right: str) -> None:
        vocabulary.setdefault(left + right, len(vocabulary))
        merges.setdefault((left, right))

    for character in _mandarin_characters():
        encoded = [symbols[byte] for byte in character.encode()]
        for k in range(1, len(encoded)):
            merge("".join(encoded[:k]), encoded[k])
    for left, right in _english_merges(symbols):
        merge(left, right)
    return vocabulary, list(merges)


def _mandarin_characters() -> list[str]:
    rng = random.Random(0)
    sentences = (draw_sentence("zh", "train", rng).text for _ in range(_SAMPLED_SENTENCES))
    return sorted({character for text in sentences for character in text})


def _english_merges(symbols: dict[int, str]) -> list[tuple[str, str]]:
    rng = random.Random(0)
    counts: Counter[str] = Counter()
    for _ in range(_SAMPLED_SENTENCES):
        counts.update(draw_sentence("en", "train", rng).units)
    # The square root keeps rare words from being spelt in single letters.
    words = (
        "".join(symbols[byte] for byte in word.encode())
        for word, count in sorted(counts.items())
        for _ in range(round(count**0.5))
    )
    bpe = Tokenizer(models.BPE())
    alphabet = list(symbols.values())
    size = len(alphabet) + _ENGLISH_MERGES
    bpe.train_from_iterator(
        words,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),
    )
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
