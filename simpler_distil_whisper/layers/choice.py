"""Which of a teacher's decoder layers a student keeps: by score, as they are and refitted.

Owns the order of the two, and the content of `layer_scores.json`.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.layers.refit import refitted_decoder
from simpler_distil_whisper.layers.scoring import EncodedBatch, LayerScorer
from simpler_distil_whisper.layers.search import Layers, ScoredLayers, search_layers
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.memory import out_of_memory
from simpler_distil_whisper.model.options import CacheOptions
from simpler_distil_whisper.model.pruning import spread_layers
from simpler_distil_whisper.model.teacher_cache import open_encoder_cache
from simpler_distil_whisper.model.whisper import load_whisper
from simpler_distil_whisper.progress import Progress
from simpler_distil_whisper.run import log
from simpler_distil_whisper.training.tokens import Example

FINALISTS = 8  # sets that are refitted
BEST_IN_TABLE = 5


@dataclass(frozen=True)
class LayerScores:
    """The content of `layer_scores.json`.

    Attributes:
        teacher: path of its folder.
        encoder: the teacher's encoder layers that the student keeps.
        manifest: path of the rows that the layers were scored on.
        utterances: how many of its rows were used.
        tokens: how many label tokens each score is the mean of.
        scores: the sets of decoder layers: those that were refitted by their KL after it, then the
            others by the KL of the layers as they are.
        refitted: the KL of those that were refitted, after it.
    """

    teacher: str
    encoder: list[int]
    manifest: str
    utterances: int
    tokens: int
    scores: list[ScoredLayers]
    refitted: dict[Layers, float]

    def best(self) -> list[int]:
        """Return the decoder layers that a student is to keep."""
        return list(self.scores[0].layers)

    def to_json(self) -> str:
        """Return the content of the file, in which each set of layers has a line of its own."""
        rows = []
        for layers, found_by, (kl, agreement) in self.scores:
            refitted = self.refitted.get(layers, math.nan)
            row = {
                "layers": layers,
                "refitted_kl": round(refitted, 6) if math.isfinite(refitted) else None,
                "kl": round(kl, 6) if math.isfinite(kl) else None,
                "agreement": round(agreement, 6),
                "found_by": found_by,
            }
            rows.append(json.dumps(row))
        facts = {**asdict(self), "scores": []}
        del facts["refitted"]
        lines = ",\n    ".join(rows)
        text = json.dumps(facts, indent=2)
        return text.replace('"scores": []', f'"scores": [\n    {lines}\n  ]') + "\n"

    def table(self) -> str:
        """Return a table of the best sets and the evenly spread one."""
        lines = [
            f"of {len(self.scores)} sets of decoder layers: KL(teacher || student) per token, "
            "refitted and as they are:"
        ]
        for rank, (numbers, found_by, (kl, agreement)) in enumerate(self.scores, 1):
            if rank <= BEST_IN_TABLE or found_by == "spread":
                layers = " ".join(map(str, numbers))
                refitted = self.refitted.get(numbers)
                shown = f"{'':8}" if refitted is None else f"{refitted:8.4f}"
                lines.append(
                    f"{rank:5}. {shown} {kl:8.4f}  top token {agreement:4.0%}  {layers}  "
                    f"({found_by})"
                )
        return "\n".join(lines)


def choose_layers(
    teacher: ModelFolder,
    encoder_layers: Sequence[int],
    count: int,
    labelled: Sequence[Example],
    manifest: str,
    cache_options: CacheOptions,
    stop_if_asked: Callable[[], None],
) -> LayerScores:
    """Return, and log, the scores of all sets of `count` decoder layers that the search tries.

    The best ones, and the evenly spread one, are refitted and scored again; they come first.

    Args:
        teacher: the model folder.
        encoder_layers: those that the student keeps.
        count: how many decoder layers the student keeps.
        labelled: the utterances to score on, at least one.
        manifest: path of the file that they come from.
        cache_options: which cache of encoder states is used, if the student keeps the encoder.
        stop_if_asked: is called wherever stopping is safe.

    Raises:
        ConfigError: memory does not suffice.
        DataError: no audio could be used, or the teacher's weights are not finite.
    """
    with _advising_when_out_of_memory(len(labelled)):
        scorer = _make_scorer(teacher, encoder_layers, labelled, cache_options, stop_if_asked)
        available = teacher.config["decoder_layers"]
        ranked = search_layers(available, count, scorer)
        refitted = {}
        chosen = finalists(ranked, tuple(spread_layers(available, count)))
        for layers in Progress("refitting", "sets", len(chosen)).over(chosen):
            refitted[layers] = refitted_kl(scorer, layers)
            log.info("  layers %s, refitted: KL %.4f", [*layers], refitted[layers])
    ranked.sort(key=lambda scored: refitted.get(scored.layers, math.inf))
    scores = LayerScores(
        teacher=str(teacher.path),
        encoder=list(encoder_layers),
        manifest=manifest,
        utterances=len(labelled) - len(scorer.rejections),
        tokens=scorer.tokens,
        scores=ranked,
        refitted=refitted,
    )
    log.info("%s", scores.table())
    return scores


@contextlib.contextmanager
def _advising_when_out_of_memory(utterances: int) -> Iterator[None]:
    """Turn an out-of-memory error into advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        what = str(error).partition("\n")[0] or "out of memory"
        raise ConfigError(
            f"layer_scoring: memory does not suffice ({what}): set max_utterances below "
            f"{utterances}, end what else uses the GPU, or score on the CPU, with "
            "CUDA_VISIBLE_DEVICES= before the command"
        ) from error


def _make_scorer(
    teacher: ModelFolder,
    encoder_layers: Sequence[int],
    labelled: Sequence[Example],
    cache_options: CacheOptions,
    stop_if_asked: Callable[[], None],
) -> LayerScorer:
    """Load the teacher, encode the utterances, and log what is in the cache or unusable."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whisper = load_whisper(teacher, "auto", device=device)
    log.info("layer_scoring: in %s on %s", whisper.model.dtype, device)
    cache = None
    if len(encoder_layers) == teacher.config["encoder_layers"]:
        extractor, model = whisper.feature_extractor, whisper.model
        cache = open_encoder_cache(cache_options, teacher, extractor, model.dtype, model.device)
    scorer = LayerScorer(whisper, tuple(encoder_layers), labelled, stop_if_asked, cache)
    if cache:
        cache.finish()
        log.info("teacher cache, encoder states: %d of %d hits", scorer.hits, len(labelled))
    for rejection in scorer.rejections:
        log.warning("not scored on: %s: %s", rejection.place, rejection.reason)
    return scorer


def refitted_kl(scorer: LayerScorer, layers: Layers) -> float:
    """Return the KL per token of a set of layers, refitted; infinite where it is not finite.

    They are fitted on half of the utterances and scored on the others, and the other way round:
    large models have more weights to fit than the utterances have tokens.
    """
    halves: list[list[EncodedBatch]] = [[], []]
    utterances = 0
    for batch in scorer.batches:  # batches of one, where memory is scarce, take turns
        for first in (0, 1):
            if len((part := batch.every_other(first)).labels):
                halves[(utterances + first) % 2].append(part)
        utterances += len(batch.labels)
    kl = 0.0
    for fitted_on, others in (halves, reversed(halves)):
        decoder = refitted_decoder(scorer.model.model.decoder, layers, fitted_on)
        kl += scorer.kl_of(decoder, others)
    return kl / scorer.tokens if math.isfinite(kl) else math.inf


def finalists(ranked: Sequence[ScoredLayers], spread: Layers) -> list[Layers]:
    """Return the evenly spread set, then the best others of a ranking."""
    others = [scored.layers for scored in ranked if scored.layers != spread]
    return [spread, *others[: FINALISTS - 1]]
