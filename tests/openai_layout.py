"""Whispers with OpenAI's own vocabulary, which openai-whisper can load once they are exported."""

import base64
from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer, save_processor
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from simpler_distil_whisper.text.languages import WHISPER_LANGUAGES


def openai_tokenizer(*, english_only: bool = False) -> WhisperTokenizer:
    """OpenAI's own vocabulary, as the package openai-whisper brings it along."""
    whisper = pytest.importorskip("whisper")
    name = "gpt2" if english_only else "multilingual"
    lines = (Path(whisper.__file__).parent / "assets" / f"{name}.tiktoken").read_text().split("\n")
    characters = bytes_to_unicode()
    vocabulary = {
        "".join(characters[byte] for byte in base64.b64decode(token)): int(rank)
        for token, rank in (line.split() for line in lines if line)
    }
    if english_only:  # its last entry is a special token
        vocabulary.pop("<|endoftext|>", None)
    return make_tokenizer(list(WHISPER_LANGUAGES)[:99], 30, vocabulary)


def make_openai_whisper(
    folder: Path, tokenizer: WhisperTokenizer, *, mels: int = 80, english_only: bool = False
) -> Path:
    """A random Whisper of OpenAI's vocabulary and window, whose texts are ASCII and differ."""
    ids = tokenizer.get_vocab()
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    torch.manual_seed(3)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer),
            num_mel_bins=mels,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            pad_token_id=end,
            bos_token_id=end,
            eos_token_id=end,
            decoder_start_token_id=start,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )
    words = [id for id in range(1000, 1200) if tokenizer.decode([id]).isascii()][:60]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "encoder.embed_positions" not in name:
                parameter.mul_(4)
        model.model.encoder.conv2.weight.mul_(4)
        words_only = torch.zeros(len(tokenizer), 1)
        words_only[words] = 1
        model.model.decoder.embed_tokens.weight[:end].mul_(words_only[:end])
        # So that it ends: at initialisation this row is zero, for it also pads.
        direction = model.model.decoder.embed_tokens.weight[end].normal_(0, 0.3)
        positions = model.model.decoder.embed_positions.weight.mul_(10)
        positions[40:] += 20 * direction
        for layer in model.model.decoder.layers:
            layer.encoder_attn.q_proj.weight.mul_(3)
            layer.encoder_attn.out_proj.weight.mul_(10)
    model.generation_config = GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        is_multilingual=not english_only,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        suppress_tokens=words[:2],
        begin_suppress_tokens=[220, end],
        alignment_heads=[[1, 0]],
    )
    model.save_pretrained(folder)
    save_processor(folder, tokenizer, mels, 30)
    return folder
