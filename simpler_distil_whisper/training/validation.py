"""Scoring a model on the dev manifest during training.

Owns the dev rows and their references; the error rate is that of the whole corpus, summed over all
processes. Decoding is in `decoding/`, counting in `evaluation/`.
"""

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from accelerate.utils import gather_object

from simpler_distil_whisper.data.manifest import Manifest, Utterance, refuse_vanished
from simpler_distil_whisper.data.options import DataLimits
from simpler_distil_whisper.decoding.batches import SpeechReader, in_batches, speech_batches
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.decoding.transcription import decode_halving, transcribe_batch
from simpler_distil_whisper.evaluation.intervals import bootstrap_interval
from simpler_distil_whisper.evaluation.metrics import ErrorCounts, Scorer, total
from simpler_distil_whisper.launch import process_count, process_rank
from simpler_distil_whisper.model.options import DecodingOptions, written_language
from simpler_distil_whisper.model.processes import smallest_of_all, wait_for_everyone
from simpler_distil_whisper.model.whisper import Whisper
from simpler_distil_whisper.run import DataError, log
from simpler_distil_whisper.training.models import TeacherAndStudent
from simpler_distil_whisper.training.options import TrainingData, ValidationOptions

# A hypothesis may have this many per reference token: Chinese in the other script takes more.
TOKENS_PER_REFERENCE_TOKEN = 2
TOKENS_TO_SPARE = 16


@dataclass(frozen=True)
class Score:
    """The errors of a model on the dev manifest.

    Attributes:
        counts: language -> error counts of each of its utterances, in the metric's unit.
        examples: a few references with their hypotheses.
    """

    counts: dict[str, Counter[ErrorCounts]]
    examples: list[tuple[str, str]]

    @property
    def error_rate(self) -> float | None:
        """The corpus error rate over all languages; None if no reference has a token."""
        return total(self._all_languages).rate

    @property
    def _all_languages(self) -> Counter[ErrorCounts]:
        return sum(self.counts.values(), Counter())

    def values(self, prefix: str) -> dict[str, float | None]:
        """Return the rates by name, and the interval of all languages together, for the log."""
        low, high = bootstrap_interval(self._all_languages) or (None, None)
        rates = {f"{prefix}error_rate": self.error_rate, f"{prefix}low": low, f"{prefix}high": high}
        if len(self.counts) > 1:
            for language, counts in sorted(self.counts.items()):
                rates[f"{prefix}error_rate/{language}"] = total(counts).rate
        return rates


class Validation:
    """The dev utterances with their references; no training filter touches them."""

    def __init__(
        self,
        dev: Manifest,
        data: TrainingData,
        options: ValidationOptions,
        models: TeacherAndStudent,
    ) -> None:
        """Take the rows that have a reference.

        Args:
            dev: the dev manifest.
            data: its section of the config.
            options: its section of the config.
            models: their cache of encoder states is read if both have the same encoder.

        Raises:
            DataError: no row has one that is not empty.
        """
        self.references = {
            utterance.number: reference
            for utterance in dev.utterances
            if (reference := _reference(utterance, data.columns.reference)) is not None
        }
        if missing := len(dev.utterances) - len(self.references):
            log.warning("%s: %d rows have no reference and are not scored", dev.path, missing)
        self.scorer = Scorer(options.metric)
        if not any(self._has_tokens(reference) for reference in self.references.values()):
            columns = data.columns
            raise DataError(
                f'{dev.path}: no row has a reference, neither under "{columns.reference}" '
                f'(data.columns.reference) nor under "{columns.text}" (data.columns.text), so '
                "nothing can be scored"
            )
        self.utterances = [u for u in dev.utterances if u.number in self.references]
        limit = options.decoding.max_new_tokens
        self.decoding = DecodingOptions(
            language=data.language,
            task=data.task,
            batch_size=options.decoding.batch_size,
            max_new_tokens=self._auto_limit(models.student) if limit == "auto" else limit,
        )
        self.limits = DataLimits(min_duration_seconds=0.0, num_workers=data.num_workers)
        self.options, self.accelerator = options, models.accelerator
        self.cache = models.caches.encoder if models.teacher.shared_encoder else None
        self.path = dev.path

    def _has_tokens(self, reference: str) -> bool:
        return self.scorer.count(reference, "", None).reference_tokens > 0

    def _auto_limit(self, student: Whisper) -> int:
        """Return how many tokens a hypothesis may have: twice those of the longest reference."""
        texts = list(self.references.values())
        longest = max(map(len, student.tokenizer(texts, add_special_tokens=False).input_ids))
        most = student.model.config.max_target_positions // 2
        return int(min(TOKENS_PER_REFERENCE_TOKEN * longest + TOKENS_TO_SPARE, most))

    def score(self, whisper: Whisper) -> Score:
        """Return the error counts of a model; call it in every process.

        Raises:
            DataError: audio has vanished: a rate of other rows would be no rate to compare.
        """
        context = None if self.cache else whisper.audio_context  # the cache has whole windows
        transcriber = Transcriber(whisper, self.decoding, audio_context=context)
        batches = list(in_batches(self.utterances, smallest_of_all(transcriber.batch_size)))
        own = batches[process_rank() :: process_count()]
        read = SpeechReader(whisper.feature_extractor, self.limits, self.cache)
        decode = functools.partial(transcribe_batch, transcriber, self.cache)
        counted: list[tuple[str, ErrorCounts]] = []
        examples: list[tuple[str, str]] = []
        with self.accelerator.autocast():
            for loaded in speech_batches(own, read, self.limits.workers):
                batch, hypotheses = decode_halving(decode, loaded, transcriber.room)
                refuse_vanished(batch.rejections)
                for rejection in batch.rejections:
                    log.warning("not scored: %s: %s", rejection.place, rejection.reason)
                for utterance, hypothesis in zip(batch.utterances, hypotheses, strict=True):
                    reference = self.references[utterance.number]
                    # Not the detected language: the unit must not depend on the model.
                    language = utterance.language or self.decoding.language
                    written = written_language(language, self.decoding.task)
                    counts = self.scorer.count(reference, hypothesis.text, written)
                    counted.append((language or "unknown", counts))
                    examples.append((reference, hypothesis.text.strip()))
        wait_for_everyone()
        return Score(_by_language(gather_object(counted)), examples[:3])


def _reference(utterance: Utterance, column: str) -> str | None:
    """Return the reference: labelled rows have a column for it, in other rows it is the text."""
    row = utterance.row
    if column not in row:
        return utterance.text
    reference = row[column]
    return reference if isinstance(reference, str) else None


def _by_language(counted: Iterable[tuple[str, ErrorCounts]]) -> dict[str, Counter[ErrorCounts]]:
    counts: dict[str, Counter[ErrorCounts]] = {}
    for language, errors in counted:
        counts.setdefault(language, Counter())[errors] += 1
    return counts
