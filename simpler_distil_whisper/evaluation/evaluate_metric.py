"""The error rate as a metric of the `evaluate` library, for code that expects one.

Only the adapter is here; the numbers come from `metrics.py`. Nothing in this package imports it,
since `evaluate` takes seconds to load and half a gigabyte of memory.
"""

from dataclasses import asdict
from typing import Any

import datasets
import evaluate

from simpler_distil_whisper.evaluation.metrics import Metric, Scorer, total


class ErrorRate(evaluate.Metric):  # type: ignore[misc]
    """The corpus error rate of `summary.json`: errors are added up and divided once.

    It needs no network and writes no files. Make one directly, not with `evaluate.load`:

        error_rate = ErrorRate(Metric(unit="character"), language="zh")
        error_rate.compute(predictions=["..."], references=["..."])
    """

    def __init__(
        self, metric: Metric | None = None, language: str | None = None, **settings: Any
    ) -> None:
        """Prepare a metric.

        Args:
            metric: unit and normalisation; None for the defaults.
            language: the language of all texts; None: the script of each reference decides its
                unit.
            settings: passed on to `evaluate.Metric`.
        """
        self._scorer = Scorer(metric or Metric())
        self._language = language
        super().__init__(**{"keep_in_memory": True, **settings})

    def _info(self) -> evaluate.MetricInfo:
        texts = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description="Errors per character or word of the references.",
            citation="",
            inputs_description="predictions, references: lists of texts, not normalised.",
            features=datasets.Features(texts),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        """Return the rate, None where no reference has a token, and the counts behind it."""
        counts = total(
            self._scorer.count(reference, prediction, self._language)
            for reference, prediction in zip(references, predictions, strict=True)
        )
        return {
            "error_rate": counts.rate,
            **asdict(counts),
            "reference_tokens": counts.reference_tokens,
        }
