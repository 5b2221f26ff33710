"""What makes a pruned student of a real Whisper good: one lever of distillation at a time.

    python -m benchmarks.pruned_recipe rates filters --teacher base --train pseudo_labels.jsonl \
        --dev dev.jsonl --cache teacher_cache --steps 100

Each recipe trains one student on labelled rows whose encoder states labelling has put into the
cache; loss, optimizer and schedule are those of `run_distillation.py`. A row of the Markdown table
has KL(teacher || student) per token of the dev references at temperature 1, and the error rate of
the greedy hypotheses, both with 95 % bootstrap intervals over the clips. Seconds are processor time
of a step.
"""

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.clips import existing
from benchmarks.coverage import percentile_interval
from benchmarks.recipe import KL, MIXED, label_tokens, pruned, update
from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.data.manifest import Utterance, read_manifest
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.decoding.batches import in_batches
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.evaluation.intervals import bootstrap_interval
from simpler_distil_whisper.evaluation.metrics import ErrorCounts, Metric, Scorer, total
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions, TeacherCacheOptions
from simpler_distil_whisper.model.teacher_cache import EncoderStateCache, open_encoder_cache
from simpler_distil_whisper.model.whisper import Whisper, load_whisper, quieten_libraries
from simpler_distil_whisper.training.cross_attention import use_fast_cross_attention
from simpler_distil_whisper.training.losses import distillation_loss
from simpler_distil_whisper.training.models import freeze, last_states
from simpler_distil_whisper.training.optimizer import learning_rate_factor, make_optimizer
from simpler_distil_whisper.training.options import ONLY_KL, Freeze, Objective, OptimizerOptions
from simpler_distil_whisper.training.tokens import decoder_sequences

BATCH, POOL = 16, 16  # clips of a step; steps whose clips are sorted by length together
LONGEST = 100  # new tokens of a hypothesis
WARMUP = 0.05  # the share of the steps in which the rate rises


@dataclass(frozen=True)
class Recipe:
    """How a student is made. A study changes one or two of these at a time.

    Attributes:
        layers: the decoder layers that are kept.
        learning_rate: the highest; it falls linearly after the warm-up.
        objective: weights of cross-entropy and KL, and the temperature.
        max_error_rate: rows whose label is worse are left out; None: none.
        freeze: what is not trained.
        share: of the rows that are left, how many: those with the best sums of two ranks, by error
            rate and by the mean log-probability of the tokens.
        rows: of those, how many at most, by chance: as if there were less audio.
        sampled: how often one of a row's sampled texts takes the place of the label.
    """

    layers: tuple[int, ...] = (0, 5)
    learning_rate: float = 2.5e-4
    objective: Objective = KL
    max_error_rate: float | None = 0.5
    freeze: Freeze = Freeze(embed_tokens=True)
    share: float = 1.0
    rows: int | None = None
    sampled: float = 0.0


THREE = Recipe(layers=(0, 3, 5))
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 1e-4)
STUDIES: dict[str, dict[str, Recipe]] = {
    "rates": {f"{rate:g}": Recipe(learning_rate=rate) for rate in RATES},
    "rates of three layers": {f"{rate:g}": replace(THREE, learning_rate=rate) for rate in RATES},
    "filters": {
        "0.2": Recipe(max_error_rate=0.2),
        "as many as with 0.5, by both": Recipe(max_error_rate=None, share=0.84),
        "none": Recipe(max_error_rate=None),
        "0.1": Recipe(max_error_rate=0.1),
    },
    "sampled texts": {
        f"{sampled:g}": Recipe(rows=500, sampled=sampled) for sampled in (0.0, 0.5, 0.75, 1.0)
    },
    "token embedding": {"trained": Recipe(freeze=Freeze()), "frozen": Recipe()},
    # On the same rows and with the same warm-up: what differs is the loss, the rate and the head.
    "huggingface": {
        "its recipe": Recipe(learning_rate=1e-4, objective=MIXED, freeze=Freeze()),
        "ours": Recipe(),
    },
}


class Clips:
    """Utterances, the encoder states of each in the cache, and the teacher's decoder states.

    Behind those that it is given stand, if asked for, copies of them, one for each sampled text.

    Attributes:
        count: how many it is given.
        samples: for each of them, the places of its copies.
        tokens: what the decoder is given and learns, for each utterance.
        decoded: float [L, D] for each: the teacher's last decoder states.
    """

    def __init__(
        self,
        teacher: Whisper,
        cache: EncoderStateCache,
        utterances: Sequence[Utterance],
        with_sampled_texts: bool,
    ) -> None:
        """Encode what the cache lacks, and run the teacher's decoder along all labels."""
        self.teacher, self.cache, self.utterances = teacher, cache, list(utterances)
        self.count, self.samples = len(utterances), list[range]()
        for utterance in utterances:
            texts = (utterance.row.get("sampled_texts") or []) if with_sampled_texts else []
            first = len(self.utterances)
            self.utterances += [replace(utterance, text=text) for text in texts if text.strip()]
            self.samples.append(range(first, len(self.utterances)))
        self.tokens = [label_tokens(teacher, own.text, own.language) for own in self.utterances]
        self.decoded: list[Tensor] = [torch.empty(0)] * len(self.utterances)
        for rows in in_batches(self.by_length(range(len(self.utterances))), BATCH):
            inputs, _ = self.sequences(rows)
            with torch.no_grad():
                states = last_states(teacher.model.model.decoder, inputs, self.encoded(rows))
            for row, own in zip(rows, states, strict=True):
                self.decoded[row] = own[: len(self.tokens[row].tokens) - 1].clone()

    def by_length(self, rows: Sequence[int]) -> list[int]:
        """Return rows in the order of their labels' lengths."""
        return sorted(rows, key=lambda row: len(self.tokens[row].tokens))

    def sequences(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return decoder inputs and labels, both int64 [B, L]."""
        return decoder_sequences([self.tokens[row] for row in rows], self.teacher.tokens.end)

    def encoded(self, rows: Sequence[int]) -> Tensor:
        """Return float32 [B, E, D]: encoder states."""
        own = [self.utterances[row] for row in rows]
        cached = self.cache.look_up(own)
        waveforms = [load_audio(*own[row].clip) for row in cached.missing]
        features = log_mel(waveforms, self.teacher.feature_extractor)
        return self.cache.complete(cached, features, self.teacher.model.model.encoder).float()

    def terms(self, decoder: Any, rows: Sequence[int], objective: Objective) -> Any:
        """Return the terms of a student's loss on some rows."""
        inputs, labels = self.sequences(rows)
        decoded = nn.utils.rnn.pad_sequence([self.decoded[row] for row in rows], batch_first=True)
        states = last_states(decoder, inputs, self.encoded(rows))
        head = self.teacher.model.proj_out.weight.detach()
        return distillation_loss(
            states, decoder.embed_tokens.weight, decoded, head, labels, objective
        )

    def kept(self, recipe: Recipe) -> list[int]:
        """Return the rows with an error rate that pass a recipe's filter."""
        rows = [utterance.row for utterance in self.utterances[: self.count]]
        limit = math.inf if recipe.max_error_rate is None else recipe.max_error_rate
        rates = [math.nan if row["cer/wer"] is None else row["cer/wer"] for row in rows]
        kept = [number for number, rate in enumerate(rates) if rate <= limit]
        columns = (
            [rates[number] for number in kept],
            [-rows[number]["average_log_probability"] for number in kept],
        )
        most = round(recipe.share * len(kept))
        ranks = sum(np.argsort(np.argsort(column, kind="stable")) for column in columns)
        best = sorted(kept[place] for place in np.argsort(ranks, kind="stable")[:most])
        return best if recipe.rows is None else random.Random(0).sample(best, recipe.rows)

    def drawn(self, row: int, sampled: float, random: random.Random) -> int:
        """Return a row, or with the probability `sampled` that of one of its sampled texts."""
        samples = self.samples[row]
        return random.choice(samples) if samples and random.random() < sampled else row


def train(clips: Clips, recipe: Recipe, steps: int, seed: int) -> tuple[Any, float]:
    """Return a student, and the seconds of a step."""
    student = pruned(clips.teacher.model, recipe.layers)
    freeze(student, recipe.freeze)
    decoder: Any = student.model.decoder.train()
    use_fast_cross_attention(decoder)
    optimizer = make_optimizer(student, OptimizerOptions())
    batches = _batches(clips, clips.kept(recipe), random.Random(seed))
    warmup_steps, start = round(WARMUP * steps), time.process_time()
    chance = random.Random(seed)
    for step in range(steps):
        rows = [clips.drawn(row, recipe.sampled, chance) for row in next(batches)]
        terms = clips.terms(decoder, rows, recipe.objective)
        (terms.loss / terms.tokens).backward()
        factor = learning_rate_factor("linear", step, warmup_steps, steps)
        update(optimizer, recipe.learning_rate * factor)
    return student.eval(), (time.process_time() - start) / steps


def _batches(clips: Clips, rows: Sequence[int], drawn: random.Random) -> Iterator[list[int]]:
    """Yield the rows of each step: all in each epoch, those of like length together."""
    while True:
        for pool in in_batches(drawn.sample(rows, len(rows)), BATCH * POOL):
            batches = list(in_batches(clips.by_length(pool), BATCH))
            drawn.shuffle(batches)
            yield from (batch for batch in batches if len(batch) == BATCH)


@torch.no_grad()
def score(clips: Clips, student: Any) -> str:
    """Return the cells of a student's row: KL and error rates on clips."""
    scorer, by_language = Scorer(Metric()), dict[str, Counter[ErrorCounts]]()
    whisper = replace(clips.teacher, model=student)
    transcriber = Transcriber(whisper, DecodingOptions(max_new_tokens=LONGEST))
    kl = []
    for rows in in_batches(clips.by_length(range(clips.count)), BATCH):
        for row in rows:
            terms = clips.terms(student.model.decoder, [row], ONLY_KL)
            kl.append((float(terms.kl), int(terms.tokens)))
        own = [clips.utterances[row] for row in rows]
        languages = [utterance.language for utterance in own]
        hypotheses = transcriber.from_encoder_states(clips.encoded(rows), languages)
        for utterance, hypothesis in zip(own, hypotheses, strict=True):
            counts = scorer.count(utterance.text or "", hypothesis.text, utterance.language)
            by_language.setdefault(utterance.language or "", Counter())[counts] += 1
    everything = sum(by_language.values(), Counter[ErrorCounts]())
    low, high = bootstrap_interval(everything) or (math.nan, math.nan)
    rates = f"{total(everything).rate:.3f} ({low:.3f} to {high:.3f})"
    each = ", ".join(f"{total(counts).rate:.3f}" for _, counts in sorted(by_language.items()))
    return f"{_with_interval(np.array(kl))} | {rates} | {each}"


def _with_interval(sums: np.ndarray) -> str:
    """Return a ratio of sums with its percentile interval, from [N, 2] numerators and tokens."""
    low, high = percentile_interval(sums, 1000, seed=0)
    mean = sums[:, 0].sum() / sums[:, 1].sum()
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Train a student by each recipe of some studies and print a row for it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("studies", nargs="+", choices=STUDIES, metavar="study")
    for name in ("teacher", "train", "dev"):
        parser.add_argument(f"--{name}", type=existing, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quieten_libraries()
    folder = read_model_folder(args.teacher, None, "--teacher")
    whisper = load_whisper(folder, torch.float32)
    whisper.model.requires_grad_(False)
    use_fast_cross_attention(whisper.model.model.decoder)
    options, model = TeacherCacheOptions(folder=args.cache), whisper.model
    cache = open_encoder_cache(
        options, folder, whisper.feature_extractor, model.dtype, model.device
    )
    assert cache is not None
    with_sampled_texts = any(
        recipe.sampled for study in args.studies for recipe in STUDIES[study].values()
    )
    clips, dev = (
        Clips(whisper, cache, read_manifest(path, Columns()).utterances, with_sampled_texts)
        for path in (args.train, args.dev)
    )
    machine.print_facts(torch.device("cpu"), 1)
    print(f"- {clips.count} clips, {args.steps} steps of {BATCH}; scored: {args.dev}\n")
    for study in args.studies:
        print(f"### {study}\n\n| recipe | rows | KL | error rate | by language | s |")
        print("|---|---|---|---|---|---|", flush=True)
        for name, recipe in STUDIES[study].items():
            student, seconds = train(clips, recipe, args.steps, args.seed)
            rows = len(clips.kept(recipe))
            print(f"| {name} | {rows} | {score(dev, student)} | {seconds:.2f} |", flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
