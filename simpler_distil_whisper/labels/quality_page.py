"""`label_quality.json` and its page, `label_quality.html`, written; the gist of both in the log.

Owns the files and the log lines. The numbers come from `quality` and `rejected`; words and
charts are in the template.
"""

import json
from dataclasses import asdict
from pathlib import Path

from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.evaluation.metrics import Scorer
from simpler_distil_whisper.labels.quality import QualityOptions, summarize_labels
from simpler_distil_whisper.labels.quality_summary import LabelQuality
from simpler_distil_whisper.labels.recordings import RECORDINGS, REJECTED_SEGMENTS
from simpler_distil_whisper.labels.rejected import (
    Segmentation,
    summarize_rejected,
    summarize_segmentation,
)
from simpler_distil_whisper.labels.rows import LabelColumns
from simpler_distil_whisper.pages import render, stacks
from simpler_distil_whisper.run import log

LOGGED_THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.5)


def assess_labels(
    labels: Path,
    columns: LabelColumns,
    options: QualityOptions,
    scorer: Scorer,
    manifest_folder: Path,
) -> None:
    """Write `label_quality.json` and `.html` beside the labels, and log which threshold suits them.

    Args:
        labels: the labelled manifest; `rejected.jsonl` lies beside it.
        columns: which key of a row holds what.
        options: what is shown.
        scorer: the one that has counted the error rates.
        manifest_folder: from which relative paths in rejected rows begin.
    """
    rejected = summarize_rejected(labels.with_name("rejected.jsonl"), columns, manifest_folder)
    segmentation = None
    recordings = labels.with_name(RECORDINGS)
    if recordings.exists():
        cut = labels.with_name(REJECTED_SEGMENTS)
        segmentation = summarize_segmentation(labels, recordings, cut, columns)
        _log_segmentation(segmentation)
    quality = summarize_labels(labels, columns, options, scorer, rejected, segmentation)
    write_label_quality(labels.parent, quality)
    suggestion = quality.suggestion
    threshold = suggestion.max_error_rate
    for kept in quality.thresholds:
        if threshold is not None and kept.max_error_rate in LOGGED_THRESHOLDS:
            log.info(
                "data.max_error_rate %.2f keeps %d of %d rows",
                kept.max_error_rate,
                kept.rows,
                quality.rows,
            )
    suspicious = quality.signs.any.rows
    log.info("rows with a sign of a failed label, which needs no reference: %d", suspicious)
    shown = "no threshold" if threshold is None else f"{threshold:.2f}"
    log.info('data.max_error_rate "auto" takes %s. %s', shown, " ".join(suggestion.reasoning))


def _log_segmentation(cut: Segmentation) -> None:
    log.info(
        "long recordings: %d, %.2f h; cut into rows: %d, %.2f h; %.2f h without speech left out, "
        "%.2f h rejected",
        cut.recordings,
        cut.hours,
        cut.rows,
        cut.hours_in_rows,
        cut.hours_without_speech,
        cut.rejected.hours,
    )
    for kind in cut.rejected.reasons:
        log.info("rejected stretches, %s: %d, %.2f h", kind.reason, kind.rows, kind.hours)
    for reason, rows in cut.rows_without_reference.items():
        log.info("rows without their part of the reference, since %s: %d", reason, rows)


def write_label_quality(folder: Path, quality: LabelQuality) -> None:
    """Write `label_quality.json` and the same as a page, `label_quality.html`."""
    content = json.dumps(asdict(quality), ensure_ascii=False, indent=1, allow_nan=False)
    write_atomically(folder / "label_quality.json", f"{content}\n".encode())
    histogram = quality.histogram
    page = render(
        "label_quality.html",
        quality=quality,
        kept_shares=[kept.hours / (quality.hours or 1) for kept in quality.thresholds],
        dropped_rows=[
            rows - kept for rows, kept in zip(histogram.rows, histogram.rows_kept, strict=True)
        ],
        stacks=stacks,
    )
    write_atomically(folder / "label_quality.html", page.encode())
