"""The demo's tiny Whisper: its shape, its generation settings and its folder."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from demo.tokenizer import WINDOW_SECONDS, save_processor

# Replaced by measured heads in alignment.py.
_DEFAULT_ALIGNMENT_HEADS = [[2, 0], [3, 0]]


def new_teacher(tokenizer: WhisperTokenizer) -> WhisperForConditionalGeneration:
    """Returns the teacher with random weights."""
    end = tokenizer.eos_token_id
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=128,
        encoder_layers=3,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_source_positions=WINDOW_SECONDS * 50,
        # As in the published models, so that their generation settings are accepted.
        max_target_positions=448,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config)


def generation_config(tokenizer: WhisperTokenizer) -> GenerationConfig:
    """Returns the settings that multilingual Whisper generation needs."""
    token_id = tokenizer.convert_tokens_to_ids
    # Everything from <|startoftranscript|> to <|nospeech|> belongs to the prefix only.
    specials = range(token_id("<|startoftranscript|>"), token_id("<|nospeech|>") + 1)
    return GenerationConfig(
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=token_id("<|startoftranscript|>"),
        prev_sot_token_id=token_id("<|startofprev|>"),
        no_timestamps_token_id=token_id("<|notimestamps|>"),
        max_initial_timestamp_index=50,
        max_length=128,
        is_multilingual=True,
        lang_to_id={token: token_id(token) for token in ("<|en|>", "<|zh|>")},
        task_to_id={task: token_id(f"<|{task}|>") for task in ("transcribe", "translate")},
        task="transcribe",
        return_timestamps=False,
        suppress_tokens=list(specials),
        begin_suppress_tokens=[token_id("Ġ"), tokenizer.eos_token_id],
        alignment_heads=_DEFAULT_ALIGNMENT_HEADS,
    )


def save_teacher(model: WhisperForConditionalGeneration, folder: Path) -> None:
    """Writes the model in float16 with its processor; readers never see half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = copy.deepcopy(model).to(torch.float16)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        shipped.save_pretrained(name)
        save_processor(Path(name))
        for file in sorted(Path(name).iterdir()):
            file.chmod(0o644)
            shutil.move(file, folder / file.name)
