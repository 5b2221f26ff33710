"""Config sections about models, decoding and the teacher cache, which several scripts share.

They are apart from the code that they configure, because that code imports torch: a script can then
check its config, and print `--help`, without waiting for the import.
"""

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from simpler_distil_whisper.config import (
    BatchSize,
    PositiveFloat,
    PositiveInt,
    Ratio,
    StrictModel,
)
from simpler_distil_whisper.data.speech_activity import SpeechOptions
from simpler_distil_whisper.text.languages import whisper_language

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DecodingDtype = Literal[Dtype, "int8"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Task = Literal["transcribe", "translate"]

Spoken = TypeVar("Spoken", str, str | None)


def whisper_code(language: str | None) -> str | None:
    """Return Whisper's code for a language, however a config names it; None if it names none."""
    return whisper_language(language) if language else None


def written_language(spoken: Spoken, task: Task) -> Spoken:
    """Return the language of a model's text: of a translation it is English, whatever is spoken."""
    return "en" if task == "translate" else spoken


class FolderOptions(StrictModel):
    """Where a Whisper's files are."""

    path: Path = Field(description="Hugging Face model folder.")
    processor: Path | None = Field(
        None, description="Folder of tokenizer and feature extractor; null: the model's own."
    )


AUTO_DTYPE = (
    "auto: on a GPU bfloat16, or float16 where it lacks that or where float16 weights are decoded; "
    "on a CPU float32, or bfloat16 to decode where it computes in it."
)


class ModelOptions(FolderOptions):
    """A Whisper that is run, not trained."""

    dtype: DecodingDtype = Field(
        "auto",
        description=f"{AUTO_DTYPE} int8: products in whole numbers of 8 bits, on a CPU alone; "
        "faster, and nearly the same texts.",
    )
    attention: Attention = Field(
        "auto", description="Attention implementation; auto: sdpa, in bfloat16 on CPUs eager."
    )


class TeacherModelOptions(ModelOptions):
    """A Whisper whose predictions are learnt, so never rounded to 8 bits."""

    dtype: Dtype = Field("auto", description=AUTO_DTYPE)


class AssistantOptions(StrictModel):
    """A student that drafts for the model: the same greedy text, sooner at a batch size of 1."""

    path: Path | None = Field(
        None, description="Model folder of a student of this model; null: it decodes alone."
    )
    processor: Path | None = Field(
        None, description="Folder of tokenizer and feature extractor; null: the student's own."
    )


class DecodingBatch(StrictModel):
    """How much is decoded at once."""

    batch_size: BatchSize | Literal["auto"] = Field(
        "auto", description="Utterances decoded at once, per process; auto: what suits the device."
    )


class DecodingLimits(DecodingBatch):
    """How much is decoded at once and at most."""

    max_new_tokens: PositiveInt | None = Field(
        None, description="Longest hypothesis; null: half of the model's positions (real: 224)."
    )


class VoiceActivityOptions(SpeechOptions):
    """Decoding only where somebody speaks, and what counts as speech."""

    enabled: bool = Field(
        False,
        description="Audio without speech gets an empty text, and in long recordings all but the "
        "speech is silenced.",
    )


class DecodingOptions(DecodingLimits):
    """How hypotheses are made."""

    language: str | None = Field(
        None, description="Language of the rows that name none; null: the model detects it."
    )
    task: Task = Field("transcribe", description="translate: into English.")
    timestamps: bool = Field(
        False, description="Let the model predict when each segment begins and ends."
    )
    prompt: str | None = Field(
        None, description="Text that the model is given as if it came before: names, spelling."
    )
    num_beams: int = Field(1, gt=0, le=100, description="Beams of the beam search; 1: greedy.")
    temperatures: list[Annotated[float, Field(ge=0, le=10)]] = Field(
        [0.0],
        min_length=1,
        description="The first decodes everything; a hypothesis that fails one of the next three "
        "thresholds is sampled again at the next one, as openai/whisper does with 0, 0.2 ... 1. "
        "Where all fail, the most probable is taken that is no loop; of loops alone, the last.",
    )
    compression_ratio_threshold: PositiveFloat | None = Field(
        2.4, description="Text that compresses better is a loop and is sampled again; null: never."
    )
    repetition_threshold: PositiveInt | None = Field(
        10,
        description="So is text in which something stands three times or more in a row, and more "
        "words together than this (characters, in scripts without spaces): in a short text "
        "compression does not show it; null: never.",
    )
    log_probability_threshold: Annotated[float, Field(ge=-1000, le=1000)] | None = Field(
        -1.0, description="An average log-probability below is sampled again; null: never."
    )
    no_speech_threshold: Ratio | None = Field(
        0.6,
        description="A no-speech probability above it, with a log-probability below its "
        "threshold, is silence: sampled again only if it is a loop, left out of recordings; "
        "null: nothing is.",
    )
    long_form: Literal["reject", "sequential", "chunked"] = Field(
        "reject",
        description="What becomes of audio longer than the model's window. sequential: windows "
        "that begin where the last segment ended; chunked: overlapping windows, all at once.",
    )
    condition_on_previous_text: bool = Field(
        True, description="In sequential long-form, give each window the text before it."
    )
    voice_activity: VoiceActivityOptions = VoiceActivityOptions()

    _code = field_validator("language")(whisper_code)

    @property
    def speech_filter(self) -> SpeechOptions | None:
        """What counts as speech where nothing else is decoded; None: everything is."""
        return self.voice_activity if self.voice_activity.enabled else None

    @property
    def with_segments(self) -> bool:
        """Whether the hypotheses come with segments."""
        return self.timestamps or self.long_form != "reject"

    @model_validator(mode="after")
    def _temperatures_rise(self) -> "DecodingOptions":
        if self.temperatures != sorted(set(self.temperatures)):
            raise ValueError(f"temperatures {self.temperatures} do not rise")
        if any(0 < temperature < 0.01 for temperature in self.temperatures):
            raise ValueError(f"temperatures {self.temperatures}: each is 0, or at least 0.01")
        if self.num_beams > 1 and self.temperatures[0] > 0:
            raise ValueError("num_beams is of no use unless the first of temperatures is 0")
        return self


class SampledTexts(StrictModel):
    """Further texts that the teacher gives the same audio, token by token by chance.

    A student that learns them beside the labels learns what its teacher predicts after other words
    too. They are made for utterances that fit into the model's window.
    """

    count: int = Field(0, ge=0, le=100, description="Of each utterance; 0: none.")
    temperature: float = Field(
        0.8, ge=0.01, le=10, description="The higher, the less they are like the label."
    )


AudioContextChoice = Literal["auto", "full"] | Annotated[float, Field(ge=0, le=3600)]


class InferenceDecodingOptions(DecodingOptions):
    """How hypotheses are made, how closely their words are timed, and what the encoder is given."""

    audio_context: AudioContextChoice = Field(
        "auto",
        description="How much of the window the encoder is given. auto: the clip and the margin "
        "that the model was trained for, all of it for models that were not; full: all; a number: "
        "the clip and so many seconds, with which a model that was not trained for it falls apart.",
    )
    word_timestamps: bool = Field(
        False, description="Give every word of the segments its time and its probability."
    )

    @property
    def with_segments(self) -> bool:
        """Whether the hypotheses come with segments."""
        return self.word_timestamps or super().with_segments


class CacheOptions(StrictModel):
    """A folder of the teacher's states, shared by all runs and processes that name it."""

    folder: Path | None = Field(None, description="Any folder, shared or not; null: no cache.")
    dtype: Dtype = Field(
        "auto", description="Of the states kept; auto: the one in which training computes."
    )
    max_gigabytes: PositiveFloat = Field(
        50.0, description="When it is full, nothing is added; what it holds stays in use."
    )


class TeacherCacheOptions(CacheOptions):
    """What distillation reads from the cache, and adds to it where it is missing."""

    encoder_states: bool = Field(
        True, description="The encoder's; float16: 3.8 MB per 30 s of large-v3."
    )
    decoder_states: bool = Field(
        True, description="The teacher's, for the labels; if none is missing, it is not loaded."
    )

    def elsewhere(self, folder: Path) -> "TeacherCacheOptions":
        """Return the same for a small cache in another folder; if there is none, for none."""
        if self.folder is None:
            return self
        return self.model_copy(update={"folder": folder, "max_gigabytes": 2.0})
