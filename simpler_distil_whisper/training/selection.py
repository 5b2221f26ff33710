"""Labelled manifests -> the rows that are learnt from, and why the others are not.

Owns the report of rows and hours for each reason, the lengths of the rows, and the limit that all
of them decide together. What becomes of a single row is up to `filters`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from simpler_distil_whisper.data.audio import AudioError, audio_seconds
from simpler_distil_whisper.data.manifest import (
    Manifest,
    Rejection,
    Utterance,
    first_reasons,
    reject,
)
from simpler_distil_whisper.decoding.batches import in_batches
from simpler_distil_whisper.files import read_files
from simpler_distil_whisper.labels.threshold import suggest_for_rows
from simpler_distil_whisper.progress import Progress
from simpler_distil_whisper.run import DataError, log
from simpler_distil_whisper.training.filters import WITH_SEGMENTS, ExampleFilter
from simpler_distil_whisper.training.options import TrainingData
from simpler_distil_whisper.training.tokens import Dropped, Example

UNREADABLE = "unreadable audio"
BAD = ("unusable row", UNREADABLE)  # the reasons that count against max_bad_fraction


class Selection(NamedTuple):
    """The examples that passed all filters, and the rows that did not.

    Attributes:
        examples: what is trained on.
        rejections: every other row, with the reason.
        report: kind of reason, or "kept" -> {"rows": ..., "hours": ...}.
        max_error_rate: up to which rows were kept; None: any.
    """

    examples: list[Example]
    rejections: list[Rejection]
    report: dict[str, dict[str, float]]
    max_error_rate: float | None

    @property
    def epoch_size(self) -> float:
        """How many uses of examples make an epoch."""
        return sum(example.weight for example in self.examples)

    def check(self, max_bad_fraction: float) -> "Selection":
        """Return the selection itself, with the report logged.

        Raises:
            DataError: more than `max_bad_fraction` of the rows is unusable, or none is left.
        """
        for kind, count in self.report.items():
            log.info("training rows, %s: %d (%.2f h)", kind, count["rows"], count["hours"])
        bad = sum(self.report[kind]["rows"] for kind in BAD if kind in self.report)
        rows = len(self.examples) + len(self.rejections)
        if bad > max_bad_fraction * rows or not self.examples:
            raise DataError(
                f"of {rows} training rows {bad} are unusable, data.max_bad_fraction is "
                f"{max_bad_fraction:g}, and {len(self.examples)} pass the filters. "
                f"The first reasons:{first_reasons(self.rejections)}"
            )
        return self


def select_examples(manifests: Sequence[Manifest], filters: ExampleFilter) -> Selection:
    """Return the examples of all manifests; rows and hours are counted for every reason."""
    data = filters.data
    examples: list[Example] = []
    rejections = [rejection for manifest in manifests for rejection in manifest.rejections]
    hours: dict[str, list[float]] = {"kept": [], "unusable row": [0.0] * len(rejections)}
    weights = data.train_weights or [1.0] * len(manifests)
    weighted = [
        (utterance, weight)
        for manifest, weight in zip(manifests, weights, strict=True)
        for utterance in manifest.utterances
    ]
    utterances = [utterance for utterance, _ in weighted]
    filters.kept.clear()
    max_error_rate = _max_error_rate(utterances, data)
    lengths = _lengths(utterances, data.min_duration_seconds, filters.max_seconds)
    progress = Progress("reading rows and audio headers", "rows", len(utterances))
    for (utterance, weight), length in progress.over(zip(weighted, lengths, strict=True)):
        seconds = 0.0 if isinstance(length, Dropped) else length
        try:
            if isinstance(length, Dropped):
                raise length
            examples.append(filters.example(utterance, seconds, weight, max_error_rate))
            kind = "kept"
        except Dropped as dropped:
            kind = dropped.kind
            rejections.append(reject(utterance, str(dropped)))
        hours.setdefault(kind, []).append(seconds / 3600)
    report = {
        kind: {"rows": len(each), "hours": round(sum(each), 4)}
        for kind, each in hours.items()
        if each or kind == "kept"
    }
    _log_how_they_are_learnt(examples, filters)
    return Selection(examples, rejections, report, max_error_rate)


def _max_error_rate(utterances: Sequence[Utterance], data: TrainingData) -> float | None:
    """Return the config's highest error rate, or the one that these rows suggest."""
    if data.max_error_rate != "auto":
        return data.max_error_rate
    rows = (utterance.row for utterance in utterances)
    columns = data.columns
    suggestion = suggest_for_rows(rows, columns.error_rate)
    threshold = suggestion.max_error_rate
    if threshold is None:
        log.warning(
            'data.max_error_rate "auto": none, since no row has an error rate under "%s": the rows '
            'have no references, or labelling has not written them. What is under "%s" is learnt',
            columns.error_rate,
            columns.text,
        )
    else:
        reasoning = " ".join(suggestion.reasoning)
        log.info('data.max_error_rate "auto": %.2f. %s', threshold, reasoning)
    return threshold


def _log_how_they_are_learnt(examples: Sequence[Example], filters: ExampleFilter) -> None:
    for kind, count in (+filters.kept).items():
        log.info("kept training rows, %s: %d", kind, count)
    if filters.data.timestamp_probability and not filters.kept[WITH_SEGMENTS]:
        log.warning(
            "data.timestamp_probability is %g, but no row can be learnt with timestamps: set "
            "decoding.timestamps or pack.enabled when labelling",
            filters.data.timestamp_probability,
        )
    if filters.data.previous_text_probability:
        count = sum(bool(example.previous) for example in examples)
        write = log.info if count else log.warning
        write("kept training rows, with previous text: %d", count)


def _lengths(
    utterances: Sequence[Utterance], shortest: float, longest: float
) -> Iterator[float | Dropped]:
    """Yield the length of each utterance, or why it cannot be used.

    A length that the row states is relied on until the audio is decoded. Only the headers of others
    are read.
    """
    for some in in_batches(utterances, 1000):
        stated = [_trusted_seconds(utterance, shortest, longest) for utterance in some]
        unknown = [row for row, seconds in zip(some, stated, strict=True) if seconds is None]
        read = iter(read_files(_header_seconds, unknown))
        yield from (next(read) if seconds is None else seconds for seconds in stated)


def _trusted_seconds(utterance: Utterance, shortest: float, longest: float) -> float | None:
    """Return the length that a row states; None where its header is to be read.

    No row is dropped for a length that labelling has measured: the file may be another one by now.
    """
    stated = utterance.stated_seconds
    is_part = utterance.duration_seconds is not None
    return stated if stated is None or is_part or shortest <= stated <= longest else None


def _header_seconds(utterance: Utterance) -> float | Dropped:
    try:
        return audio_seconds(*utterance.clip)
    except AudioError as error:
        return Dropped(UNREADABLE, f"{utterance.audio}: {error}")
