"""Config sections about the rows that are used, which several scripts share."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from simpler_distil_whisper.config import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Ratio,
    StrictModel,
)
from simpler_distil_whisper.data.audio import MEAN
from simpler_distil_whisper.shards import checked, shard_of_job


class Columns(StrictModel):
    """Which key of a row holds what."""

    id: str | None = Field("id", description="The row's id, for logs; null: the line number.")
    audio: str = Field("audio", description="Path of the audio file.")
    text: str = Field("text", description="Transcript; a row may lack it where none is needed.")
    language: str | None = Field(
        "language", description="Language of the row; null: no such column."
    )
    start_seconds: str | None = Field("start_seconds", description="Where a part of a file begins.")
    duration_seconds: str | None = Field("duration_seconds", description="How long the part is.")
    channel: str | None = Field(
        "channel", description='Which channel it is: "mean", "left", "right" or "3".'
    )


class DataLimits(StrictModel):
    """Which utterances are used; part of the `data` section of three scripts."""

    min_duration_seconds: NonNegativeFloat = Field(0.1, description="Shorter audio is rejected.")
    max_duration_seconds: PositiveFloat | None = Field(
        None,
        description="Longer audio is rejected; null: what is longer than the model's window is, "
        "unless decoding.long_form takes it.",
    )
    max_utterances: PositiveInt | None = Field(
        None, description="Take only the first rows, at most this many, of each manifest."
    )
    max_bad_fraction: Ratio = Field(
        0.1, description="End with exit code 3 when a larger share of the rows is unusable."
    )
    num_workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = Field(
        "auto",
        description="Processes that decode audio ahead of the model; 0: the model's own process; "
        "auto: one, beside a GPU up to 8 of the process's cores.",
    )

    @property
    def workers(self) -> int:
        """How many processes decode audio ahead of the model."""
        from simpler_distil_whisper.data.workers import suitable_workers  # it imports torch

        return suitable_workers() if self.num_workers == "auto" else self.num_workers

    @model_validator(mode="after")
    def _min_below_max(self) -> "DataLimits":
        low, high = self.min_duration_seconds, self.max_duration_seconds
        if high is not None and low >= high:
            raise ValueError(f"min_duration_seconds {low} is not below max_duration_seconds {high}")
        return self


class ManifestData(DataLimits):
    """The `data` section of the scripts that write a result for each row."""

    manifest: Path = Field(description="JSON lines, one utterance each.")
    channel: Literal["mean", "left", "right", "each"] = Field(
        "mean",
        description="Of rows that name none: the mean of all channels, one of them, or each, which "
        'makes a row of each channel, with "-left" or "-right" added to its id.',
    )
    shard: tuple[NonNegativeInt, PositiveInt] | Literal["auto"] | None = Field(
        None,
        description="Which share of the rows this job does: [2, 8] is that of the third of eight "
        'jobs; "auto": that of the task of a job array, by SDW_SHARD (such as 2/8) or the '
        "variables of SLURM, outside of one all rows; null: all rows.",
    )
    columns: Columns = Columns()

    @field_validator("shard")
    @classmethod
    def _shard_exists(cls, shard: tuple[int, int] | str | None) -> tuple[int, int] | None:
        pair = shard_of_job(os.environ) if isinstance(shard, str) else shard
        return checked(pair) if pair else None

    @model_validator(mode="after")
    def _channel_has_a_column(self) -> "ManifestData":
        if self.channel != MEAN and self.columns.channel is None:
            raise ValueError(f'channel "{self.channel}" needs a name in columns.channel')
        return self
