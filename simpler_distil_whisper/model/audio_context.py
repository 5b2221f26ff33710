"""How much of the window an encoder is given: all of it, or a clip and some silence after it.

Owns the number of encoder positions for a clip, and where a model folder states that it was trained
for that. It imports no torch; the encoder itself is run in `whisper.py`.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from simpler_distil_whisper.data.jsonl import is_number

POSITIONS_PER_SECOND = 50
STEP = 50  # positions: so that clips of about the same length are computed together
KEY = "audio_context"  # in config.json


@dataclass(frozen=True)
class AudioContext:
    """A clip and some silence after it.

    Attributes:
        margin_seconds: of silence.
    """

    margin_seconds: float

    def positions(self, seconds: float, window: int) -> int:
        """Return how many encoder positions a clip gets.

        They depend on the clip alone, so its text does not change with what else is in a batch.

        Args:
            seconds: length of the clip.
            window: positions of the whole window, which is the most.
        """
        needed = math.ceil((seconds + self.margin_seconds) * POSITIONS_PER_SECOND)
        return min(math.ceil(needed / STEP) * STEP, window)

    def to_config(self) -> dict[str, float]:
        """Return what config.json states of a model that was trained for it."""
        return asdict(self)


def stated_context(config: dict[str, Any]) -> AudioContext | None:
    """Return the audio context that a model was trained for, by its config.json; None: none."""
    stated = config.get(KEY)
    if not isinstance(stated, dict):
        return None
    margin = stated.get("margin_seconds")
    if not is_number(margin) or margin < 0:
        return None
    return AudioContext(float(margin))
