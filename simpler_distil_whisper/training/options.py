"""The sections of run_distillation.json.

They stand apart from the parts that they configure, which import torch: so the script checks its
config without waiting for that.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from simpler_distil_whisper.config import (
    BatchSize,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Ratio,
    StrictModel,
)
from simpler_distil_whisper.data.options import Columns, DataLimits
from simpler_distil_whisper.evaluation.metrics import Metric
from simpler_distil_whisper.labels.filters import EvidenceLimits
from simpler_distil_whisper.model.options import (
    Attention,
    DecodingBatch,
    FolderOptions,
    Task,
    TeacherModelOptions,
    whisper_code,
)


class TrainingColumns(Columns):
    """Which key of a labelled row holds what."""

    text: str = Field("text", description="The label: the text that the student learns.")
    reference: str = Field(
        "origin_text", description="The reference; dev rows without this column are scored on text."
    )
    error_rate: str = Field("cer/wer", description="Error rate of the label.")
    segments: str = Field(
        "segments", description="The label's segments with their times, as labelling writes them."
    )
    previous_text: str = Field(
        "previous_text", description="The text before it in the same recording; optional."
    )
    sampled_texts: str = Field(
        "sampled_texts", description="Further texts of the teacher's, as labelling writes them."
    )


class TrainingData(DataLimits, EvidenceLimits):
    """The `data` section of run_distillation.json; the limits hold for training rows alone."""

    max_duration_seconds: PositiveFloat | None = Field(
        None, description="Longer audio is rejected; null: what is longer than the model's window."
    )
    train_manifests: list[Path] = Field(
        min_length=1, description="Labelled manifests: pseudo_labels.jsonl of one or several runs."
    )
    train_weights: list[Annotated[float, Field(ge=0.001, le=1000)]] | None = Field(
        None,
        description="How often an epoch uses the rows of each train manifest: 2 twice, 0.5 every "
        "other epoch; null: once.",
    )
    dev_manifest: Path | None = Field(None, description="For validation; null: none.")
    columns: TrainingColumns = TrainingColumns()
    max_error_rate: Ratio | Literal["auto"] | None = Field(
        None,
        description="Rows with a higher error rate, or with none, are not used; null: all are "
        "used. auto: what label_quality.html suggests; rows without a reference are used.",
    )
    incomplete_labels: Literal["drop", "without_end"] = Field(
        "drop",
        description="Labels that max_new_tokens has cut off: not used, or learnt without an end "
        "token, so that the student does not learn to stop there.",
    )
    max_label_tokens: PositiveInt | None = Field(
        None, description="Rows with a longer label are not used; null: what the decoder can hold."
    )
    language: str | None = Field(None, description="Language of the rows that name none.")
    task: Task = Field("transcribe", description="What the labels are.")
    timestamp_probability: Ratio = Field(
        0.0, description="Share of the uses of a row with segments at which it is learnt with them."
    )
    previous_text_probability: Ratio = Field(
        0.0, description="Share of the uses of a row with previous text at which it is given it."
    )
    sampled_text_probability: Ratio = Field(
        0.0,
        description="Share of the uses of a row with sampled texts at which one of them takes the "
        "place of the label, in every term of the loss. Not where it is learnt with timestamps.",
    )

    _code = field_validator("language")(whisper_code)

    @model_validator(mode="after")
    def _a_weight_per_manifest_named_once(self) -> "TrainingData":
        manifests, weights = len(self.train_manifests), self.train_weights
        if weights is not None and len(weights) != manifests:
            raise ValueError(
                f"train_weights has {len(weights)} weights, but there are {manifests} "
                "train_manifests: name one for each, or null"
            )
        if len(set(self.train_manifests)) < manifests:
            raise ValueError("train_manifests names a file twice: set its weight in train_weights")
        return self


class TeacherOptions(TeacherModelOptions):
    """The model that teaches; it is not loaded while the cache holds all its states."""

    attention: Attention = Field(
        "auto", description="Of both models; auto: sdpa, in bfloat16 on CPUs eager."
    )
    device: str | None = Field(
        None,
        pattern="^(cpu|cuda(:[0-9]{1,2})?)$",
        description='For example "cpu" or "cuda:1", where the student leaves it no room; null: the '
        "student's device.",
    )


class StudentOptions(FolderOptions):
    """The model that is trained, in float32 whatever its weights on disk are."""

    path: Path = Field(description="Model folder, as create_student_model.py writes it.")


class Objective(StrictModel):
    """loss = cross_entropy_weight * CE + kl_weight * T² * KL(teacher || student), per token."""

    cross_entropy_weight: NonNegativeFloat = Field(0.8, description="Of the labels.")
    kl_weight: NonNegativeFloat = Field(1.0, description="Of the teacher's distribution.")
    temperature: float = Field(2.0, ge=0.01, le=1000, description="T of both distributions in KL.")

    @property
    def uses_teacher(self) -> bool:
        """Whether a term of the loss depends on the teacher, which else is never loaded."""
        return self.kl_weight > 0

    @model_validator(mode="after")
    def _some_weight(self) -> "Objective":
        if not self.cross_entropy_weight and not self.uses_teacher:
            raise ValueError("cross_entropy_weight and kl_weight are both 0: nothing to learn")
        return self


# As KL(teacher || student) itself is told, rather than learnt from.
ONLY_KL = Objective(cross_entropy_weight=0.0, kl_weight=1.0, temperature=1.0)


class Freeze(StrictModel):
    """What is not trained."""

    encoder: bool = Field(True, description="A frozen encoder equal to the teacher's runs once.")
    decoder: bool = Field(False, description="All of the decoder, output head included.")
    embed_tokens: bool = Field(
        False, description="The token embedding and the output head, in Whisper the same weights."
    )
    embed_positions: bool = Field(False, description="The decoder's position embedding.")

    @model_validator(mode="after")
    def _something_to_train(self) -> "Freeze":
        if self.encoder and self.decoder:
            raise ValueError("encoder and decoder are both frozen: nothing to train")
        return self


class AudioContextOptions(StrictModel):
    """Training the encoder on the clip alone: it is then fast on short clips."""

    enabled: bool = Field(
        False, description="The student learns from the clip, the teacher from the whole window."
    )
    margin_seconds: NonNegativeFloat = Field(
        0.3, description="Silence after a clip that is part of it, also when the model is used."
    )
    jitter_seconds: NonNegativeFloat = Field(
        0.5, description="In training the margin is longer by up to this much, at random."
    )
    full_window_probability: Ratio = Field(
        0.1, description="Share of the uses with the whole window, as other programs give it."
    )
    encoder_learning_rate_factor: PositiveFloat = Field(
        0.1, description="The encoder's learning rate, as a share of the decoder's."
    )

    @property
    def encoder_factor(self) -> float:
        """The encoder's learning rate, as a share of the decoder's: 1 if this is not enabled."""
        return self.encoder_learning_rate_factor if self.enabled else 1.0


class OptimizerOptions(StrictModel):
    """AdamW."""

    learning_rate: PositiveFloat | Literal["auto"] = Field(
        "auto",
        description="The highest, after the warm-up; auto: the one with which short runs at the "
        "start come lowest, drawn in learning_rate.png.",
    )
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="Decay of the two moments."
    )
    epsilon: PositiveFloat = Field(1e-8, description="Added to the second moment's root.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Not on biases and layer norms.")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="null: gradients are not clipped.")


ScheduleKind = Literal["linear", "cosine", "constant"]


class Schedule(StrictModel):
    """The length of the run and the course of the learning rate."""

    kind: ScheduleKind = Field("linear", description="After warm-up.")
    warmup_steps: NonNegativeInt | Literal["auto"] = Field(
        "auto",
        description="Optimizer steps of linear rise; auto: a twentieth of the run, at most 500.",
    )
    epochs: PositiveFloat | Literal["auto"] | None = Field(
        "auto",
        description="Passes over the kept rows; auto: those that make 1,000 optimizer steps, "
        "but 3 to 12.",
    )
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps; null: from epochs.")

    @model_validator(mode="after")
    def _one_length(self) -> "Schedule":
        both = self.max_steps is not None and self.epochs not in (None, "auto")
        neither = self.max_steps is None and self.epochs is None
        if both or neither:
            raise ValueError("set exactly one of epochs and max_steps, the other one to null")
        return self


class BatchOptions(StrictModel):
    """How an optimizer step is divided."""

    micro_batch_size: BatchSize = Field(16, description="Utterances at once, per process.")
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="Micro-batches per optimizer step, per process."
    )
    length_bucketing: bool = Field(True, description="Labels of similar length in one step.")


Bounds = Annotated[
    list[Annotated[float, Field(ge=-100, le=100)]], Field(min_length=2, max_length=2)
]


class WaveformOptions(StrictModel):
    """What a view does to the sound: [lowest, highest], or null where it does nothing."""

    speed: Bounds | None = Field(
        None, description="Factor of tempo and pitch, 0.5 to 2; a clip never outgrows the window."
    )
    noise_db: Bounds | None = Field(None, description="Speech over added noise, in decibels.")
    gain_db: Bounds | None = Field(None, description="Louder or softer, in decibels.")
    shift_seconds: PositiveFloat | None = Field(
        None, description="Silence before the clip, at most; as much as the window has room for."
    )

    @model_validator(mode="after")
    def _lowest_first(self) -> "WaveformOptions":
        for name in ("speed", "noise_db", "gain_db"):
            bounds = getattr(self, name)
            if bounds and bounds[0] > bounds[1]:
                raise ValueError(f"{name} {bounds}: the lowest value stands first")
        if self.speed and not 0.5 <= self.speed[0] <= self.speed[1] <= 2:
            raise ValueError(f"speed {self.speed}: must lie within 0.5 and 2")
        return self

    @property
    def switched_on(self) -> bool:
        """Whether any of it is done."""
        return any(value is not None for _, value in self)


class SpecAugmentOptions(StrictModel):
    """Stretches of time and bands of frequency that a view silences (Park et al. 2019).

    Together the stretches take no more than half of the speech, the bands half of the mels.
    """

    time_masks: int = Field(0, ge=0, le=100, description="How many stretches of time.")
    max_time_seconds: PositiveFloat = Field(0.5, description="The longest.")
    frequency_masks: int = Field(0, ge=0, le=100, description="How many bands of frequency.")
    max_mels: PositiveInt = Field(20, description="The widest, in mel bins.")

    @property
    def switched_on(self) -> bool:
        """Whether any of it is done."""
        return bool(self.time_masks or self.frequency_masks)


VIEWS_OF_FEW_HOURS = 3
HOURS_WITHOUT_VIEWS = 1.0  # more clips are worth more than views of few, which the teacher computes


class Augmentation(StrictModel):
    """Altered versions of the clips, the same for teacher and student."""

    views: Annotated[int, Field(ge=0, le=10_000)] | Literal["auto"] | None = Field(
        0,
        description="Altered versions of each clip, always the same ones, so that a cache keeps "
        "them; epochs use the clip and its views in turn; 0: none. auto: 3 where less than an hour "
        "of audio is learnt from, else 0. null: a new one at every use.",
    )
    waveform: WaveformOptions = WaveformOptions()
    spec_augment: SpecAugmentOptions = SpecAugmentOptions()

    @model_validator(mode="after")
    def _views_of_something(self) -> "Augmentation":
        if not self._alters_clips and self.views not in (0, "auto"):
            raise ValueError(
                f"views is {'null' if self.views is None else self.views}, but nothing in waveform "
                "and spec_augment is switched on: every view would be the clip itself"
            )
        return self

    @property
    def _alters_clips(self) -> bool:
        return self.waveform.switched_on or self.spec_augment.switched_on

    def views_for(self, hours: float) -> int | None:
        """Return how many views each clip has where so many hours are learnt from."""
        if self.views != "auto":
            return self.views
        return VIEWS_OF_FEW_HOURS if self._alters_clips and hours < HOURS_WITHOUT_VIEWS else 0


class ValidationDecoding(DecodingBatch):
    """How much of the dev rows is decoded at once, and how far."""

    max_new_tokens: PositiveInt | Literal["auto"] | None = Field(
        "auto",
        description="Longest hypothesis; auto: twice as long as the longest reference, since an "
        "untrained student may never end; null: half of the model's positions (real: 224).",
    )


class ValidationOptions(StrictModel):
    """Scoring the student on the dev manifest, against its references."""

    every_steps: PositiveInt | Literal["auto"] | None = Field(
        "auto",
        description="Optimizer steps between two; auto: four times in a run, at least every 2,000 "
        "steps; null: after each epoch.",
    )
    max_utterances: PositiveInt | None = Field(None, description="Only the first so many rows.")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after so many validations without a better score; null: never."
    )
    score_teacher: bool = Field(True, description="Once, before training, to compare with.")
    decoding: ValidationDecoding = ValidationDecoding()
    metric: Metric = Metric()


class CheckpointOptions(StrictModel):
    """What a stopped run continues from."""

    every_steps: PositiveInt = Field(500, description="Optimizer steps between checkpoints.")
    keep_last: PositiveInt = Field(2, description="Older ones are removed.")
    keep_best: bool = Field(True, description="Keep the best student on dev as best/.")


class LoggingOptions(StrictModel):
    """What is written down on the way."""

    every_steps: PositiveInt = Field(10, description="Optimizer steps averaged into one line.")
    tensorboard: bool = Field(True, description="Write logs/ for TensorBoard.")


class CheckOptions(StrictModel):
    """What `--check` does besides what it always does; without effect on a run."""

    learning_rate_range_test: bool = Field(
        False,
        description="Compare a given learning rate with others in short runs, and draw the losses "
        "beside output_dir, as <output_dir>.learning_rate.png; with auto it is always done.",
    )
