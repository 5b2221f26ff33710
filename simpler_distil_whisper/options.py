"""Config sections that several scripts share and whose parts import torch.

They stand here, apart from those parts, so that a script can check its config, and answer `--help`,
without waiting for that import.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from simpler_distil_whisper.config import PositiveInt, StrictModel
from simpler_distil_whisper.text import whisper_language

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Task = Literal["transcribe", "translate"]


def whisper_code(language: str | None) -> str | None:
    """Return Whisper's code for a language, however a config names it; None stays None."""
    return None if language is None else whisper_language(language)


class ModelOptions(StrictModel):
    """A Whisper that is run, not trained: the teacher, or the model of offline inference."""

    path: Path = Field(description="Hugging Face model folder.")
    processor: Path | None = Field(
        None, description="Folder of tokenizer and feature extractor; null: the model's own."
    )
    dtype: Dtype = Field(
        "auto", description="auto: bfloat16 on GPUs that have it, else float16; float32 on CPUs."
    )
    attention: Attention = Field("auto", description="Attention implementation; auto: sdpa.")


class DecodingLimits(StrictModel):
    """How much is decoded at once and at most."""

    batch_size: PositiveInt = Field(16, description="Utterances decoded at once, per process.")
    max_new_tokens: PositiveInt | None = Field(
        None, description="Longest hypothesis; null: half of the model's positions (real: 224)."
    )


class DecodingOptions(DecodingLimits):
    """How hypotheses are made."""

    language: str | None = Field(
        None, description="Language of the rows that name none; null: the model detects it."
    )
    task: Task = Field("transcribe", description="translate: into English.")

    _code = field_validator("language")(whisper_code)
