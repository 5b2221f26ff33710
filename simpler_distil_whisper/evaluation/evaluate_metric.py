"""The error rate as a metric of the `evaluate` library, for those whose code expects one.

Owns the adapter; the numbers are `metrics.py`'s. Nothing else imports it, since `evaluate` takes
seconds to load and half a gigabyte of memory.
"""

from typing import Any

import datasets
import evaluate

from simpler_distil_whisper.evaluation.metrics import Metric, Scorer, total


class ErrorRate(evaluate.Metric):  # type: ignore[misc]
    """Corpus error rate as `summary.json` has it: errors added up and divided once.

    Needs no network and writes no files. `evaluate.load` is not for it; make one:

        error_rate = ErrorRate(Metric(unit="character"), language="zh")
        error_rate.compute(predictions=["..."], references=["..."])
    """

    def __init__(
        self, metric: Metric | None = None, language: str | None = None, **settings: Any
    ) -> None:
        """Choose what is counted.

        Args:
            metric: unit and normalisation; None for the standard ones.
            language: of all texts; None lets each reference's script decide its unit.
            settings: of `evaluate.Metric`.
        """
        self._scorer, self._language = Scorer(metric or Metric()), language
        super().__init__(**{"keep_in_memory": True, **settings})

    def _info(self) -> evaluate.MetricInfo:
        texts = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description="Errors per character or word of the references.",
            citation="",
            inputs_description="predictions, references: lists of texts as they are.",
            features=datasets.Features(texts),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        """Return the rate, None where no reference has a token, and the counts behind it."""
        pairs = zip(references, predictions, strict=True)
        counts = total(self._scorer.count(*pair, self._language) for pair in pairs)
        return {
            "error_rate": counts.rate,
            **counts.as_dict(),
            "reference_tokens": counts.reference_tokens,
        }
