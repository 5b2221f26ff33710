"""What is known of the audio of an open file, whichever library decodes it."""

from collections.abc import Iterator
from typing import Protocol, TypeAlias

import numpy as np

# Times in manifests are rounded, and encoders add and drop some milliseconds.
TOLERANCE_SECONDS = 0.05
BLOCK_FRAMES = 2**20  # read at once
LONGEST_SECONDS = 86_400.0  # of one row, which takes six gigabytes of memory, and of its pauses

Block: TypeAlias = tuple[int, np.ndarray]  # the sample rate, float32 [S, C]


class DecodingError(Exception):
    """A file that cannot be decoded; the message is the reason in a few words."""


class CutOffError(DecodingError):
    """A file that ends too early for any of it to be decoded."""


class Sound(Protocol):
    """The audio of an open file.

    Attributes:
        seconds: its length; NaN until all of it is decoded, where only that tells.
        promised_seconds: the length by its header, where less is there; infinite where the end is
            missing, but nothing tells how much that is; NaN: it is whole.
        channels: how many.
        remark: what is odd about it, for the log.
    """

    seconds: float
    promised_seconds: float
    channels: int
    remark: str | None

    def blocks(self, start_seconds: float, duration_seconds: float | None) -> Iterator[Block]:
        """Yield the samples of a part, or as many of them as there are; zeros for pauses.

        Raises:
            soundfile.LibsndfileError: libsndfile cannot decode them.
            DecodingError: FFmpeg cannot decode them.
        """
        ...

    def measure(self) -> None:
        """Decode the file if need be, so that `seconds` is known."""
        ...

    def close(self) -> None:
        """Free what decoding takes."""
        ...
