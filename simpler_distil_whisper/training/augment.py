"""Views: altered versions of a clip, the same for teacher and student.

Owns what is drawn for a view, and what it does to the waveform, to the log-mel and to the times of
a label. Both models are given the view: a teacher that is given the clean clip teaches worse.
"""

import dataclasses
import functools
import json
import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import soxr
from torch import Tensor

from simpler_distil_whisper.data.audio import SAMPLE_RATE
from simpler_distil_whisper.data.features import DYNAMIC_RANGE
from simpler_distil_whisper.data.manifest import Utterance
from simpler_distil_whisper.model.folder_check import FRAMES_PER_SECOND
from simpler_distil_whisper.training.options import Augmentation
from simpler_distil_whisper.training.plan import Drawn, draw

# Raise it whenever a view of the same key comes to sound different: what a teacher cache has kept
# of the old one would be taken for the new one's.
VIEW_RECIPE = 1
NOISE_SAMPLES = 1 << 20  # a minute; every view begins at another of them
LOWEST_NOISE_HERTZ = 50


class Mask(NamedTuple):
    """A stretch of time or a band of frequency that is silenced.

    Attributes:
        place: 0 at the very beginning of the speech, or at the lowest mel, 1 at the other end.
        width: in frames or in mels, at most.
    """

    place: float
    width: int

    def within(self, size: int, masks: int) -> slice:
        """Return the frames or mels of `size` that it silences; all masks together leave half."""
        width = min(self.width, size // (2 * masks))
        first = round(self.place * (size - width))
        return slice(first, first + width)


@dataclass(frozen=True, slots=True)
class View:
    """One version of a clip, as it was drawn; by default the clip itself.

    Attributes:
        speed: factor of tempo and pitch, as if a tape ran faster.
        noise_db: power of the clip over that of the noise; None: no noise.
        noise_start: where in the noise it begins, in samples.
        gain_db: louder or softer.
        shift_seconds: of silence before the clip.
        time_masks: what is silenced of the speech, in frames.
        frequency_masks: which bands are, in mels.
        reusable: whether it is used more than once, so that a cache may keep its states.
    """

    speed: float = 1.0
    noise_db: float | None = None
    noise_start: int = 0
    gain_db: float = 0.0
    shift_seconds: float = 0.0
    time_masks: tuple[Mask, ...] = ()
    frequency_masks: tuple[Mask, ...] = ()
    reusable: bool = True

    @property
    def key(self) -> str:
        """What distinguishes the view from others of the clip, as JSON; "" for the clip itself."""
        values = dataclasses.asdict(self)
        changed = {
            field.name: values[field.name]
            for field in dataclasses.fields(self)
            if values[field.name] != field.default and field.name != "reusable"
        }
        return json.dumps({"recipe": VIEW_RECIPE, **changed}) if changed else ""

    def of_waveform(self, waveform: np.ndarray) -> np.ndarray:
        """Return float32 [S']: a clip, float32 [S], faster, noisier, louder and later."""
        if self.speed != 1:
            waveform = soxr.resample(waveform, self.speed * SAMPLE_RATE, SAMPLE_RATE, "MQ")
        if self.noise_db is not None:
            noise = _noise()[self.noise_start : self.noise_start + len(waveform)]
            ratio = _power(waveform) / _power(noise) / 10 ** (self.noise_db / 10)
            waveform = waveform + np.float32(math.sqrt(ratio)) * noise
        if self.gain_db:
            waveform = waveform * np.float32(10 ** (self.gain_db / 20))
        if silence := round(self.shift_seconds * SAMPLE_RATE):
            waveform = np.concatenate([np.zeros(silence, np.float32), waveform])
        return waveform

    def of_time(self, seconds: float) -> float:
        """Return the time in the view of a time in the clip."""
        return seconds / self.speed + self.shift_seconds

    def mask(self, log_mel: Tensor, samples: int) -> None:
        """Silence what is masked, in place, and nothing outside the speech.

        What is masked becomes what digital silence is, not the mean as in the paper: a frozen
        encoder knows pauses and narrow telephone bands, but no sound that is equally loud in every
        band and at every time.

        Args:
            log_mel: float32 [M, T]: of the view, padded to the window.
            samples: how long the view is without the padding.
        """
        if not self.time_masks and not self.frequency_masks:
            return
        hop = SAMPLE_RATE // FRAMES_PER_SECOND
        first = math.ceil(round(self.shift_seconds * SAMPLE_RATE) / hop)
        speech = log_mel[:, first : math.ceil(samples / hop)]
        silence = log_mel.max() - DYNAMIC_RANGE / 4.0
        for mask in self.time_masks:
            speech[:, mask.within(speech.shape[1], len(self.time_masks))] = silence
        for mask in self.frequency_masks:
            speech[mask.within(speech.shape[0], len(self.frequency_masks))] = silence


class Views:
    """Which version of a clip each of its uses is."""

    def __init__(
        self, options: Augmentation, hours: float, window_seconds: float, seed: int
    ) -> None:
        """Remember what may be drawn.

        Args:
            options: the config's section.
            hours: of all the clips.
            window_seconds: which no view outgrows.
            seed: by which views are drawn that are used but once; the others are the same in every
                run, so that runs with other seeds find them in the cache.
        """
        self.options = options
        self.count = options.views_for(hours)
        self.window = window_seconds
        self.seed = seed

    def of(self, utterance: Utterance, seconds: float, use: int, position: int) -> View:
        """Return the view for one use of a clip.

        Args:
            utterance: the clip.
            seconds: how long it is.
            use: how often it has been used before.
            position: of the use in the stream of all uses.
        """
        if self.count is None:
            return self._random_view(draw(self.seed, Drawn.VIEW, position), seconds)
        # Not the id, which may be a line number, nor the whole path, lest a moved folder has other
        # views; the last folder is part of it, as there are corpora of folders with one audio.wav.
        name = "/".join(utterance.audio.parts[-2:])
        part = f"{name} {utterance.start_seconds} {utterance.duration_seconds}"
        clip = zlib.crc32(part.encode(errors="surrogateescape"))
        # Clips begin with different views, or whole epochs would be clean and others noisy.
        view = (use + clip) % (self.count + 1)
        return self._random_view(np.random.default_rng([clip, view]), seconds) if view else View()

    def _random_view(self, random: np.random.Generator, seconds: float) -> View:
        waveform, spec = self.options.waveform, self.options.spec_augment

        def between(bounds: list[float]) -> float:
            low, high = bounds
            return round(random.uniform(low, high), 4)

        # What would be longer than the window is slowed down and shifted by less.
        speed = between(waveform.speed) if waveform.speed else 1.0
        speed = max(speed, math.ceil(1e4 * seconds / self.window) / 1e4)
        room = max(0.0, math.floor(1e4 * (self.window - seconds / speed)) / 1e4)
        return View(
            speed=speed,
            noise_db=between(waveform.noise_db) if waveform.noise_db else None,
            noise_start=int(random.integers(NOISE_SAMPLES)) if waveform.noise_db else 0,
            gain_db=between(waveform.gain_db) if waveform.gain_db else 0.0,
            shift_seconds=min(between([0, waveform.shift_seconds or 0]), room),
            time_masks=_masks(random, spec.time_masks, spec.max_time_seconds * FRAMES_PER_SECOND),
            frequency_masks=_masks(random, spec.frequency_masks, spec.max_mels),
            reusable=self.count is not None,
        )


def _masks(random: np.random.Generator, count: int, widest: float) -> tuple[Mask, ...]:
    return tuple(
        Mask(round(random.random(), 4), int(random.integers(round(widest) + 1)))
        for _ in range(count)
    )


@functools.cache
def _noise() -> np.ndarray:
    """Return float32 [2 * NOISE_SAMPLES]: twice the same noise, equally loud in every octave.

    It is made once: new noise for every view would take longer than all other changes to it.
    """
    random = np.random.default_rng(0)
    spectrum = np.fft.rfft(random.standard_normal(NOISE_SAMPLES))
    hertz = np.arange(len(spectrum)) * SAMPLE_RATE / NOISE_SAMPLES
    spectrum /= np.sqrt(np.maximum(hertz, LOWEST_NOISE_HERTZ))
    noise = np.fft.irfft(spectrum).astype(np.float32)
    return np.concatenate([noise, noise])


def _power(waveform: np.ndarray) -> float:
    return float(np.dot(waveform, waveform)) / len(waveform)
