"""What makes a student good: one lever of distillation at a time, on the demo's data.

    python -m benchmarks.recipe --make-dev work/dev                        # 800 clips, once
    python -m benchmarks.recipe layers objective --dev work/dev/dev.jsonl  # some of the studies
    python -m benchmarks.recipe huggingface --dev demo_data/test.jsonl     # a report, no choice

Each study trains one student per recipe and seed and prints a row of a Markdown table per recipe.
What does not change from recipe to recipe is computed once and kept in memory: the frozen encoder's
states of each view of a clip, and the teacher's decoder states. A step then costs the student's
decoder alone, as in `run_distillation.py` with a full teacher cache; order, views, loss and
schedule are that script's. Seconds are processor time of one thread.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import WhisperForConditionalGeneration

from benchmarks import machine
from benchmarks.clips import existing
from benchmarks.distillation_step import MIXED, plain_loss
from simpler_distil_whisper.data.audio import SAMPLE_RATE, load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.data.manifest import Utterance, read_manifest
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.decoding.batches import in_batches
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.evaluation.metrics import ErrorCounts, Metric, Scorer
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.pruning import prune_whisper
from simpler_distil_whisper.model.whisper import Whisper, load_whisper, quieten_libraries
from simpler_distil_whisper.text.normalization import TextNormalization
from simpler_distil_whisper.training.augment import Views
from simpler_distil_whisper.training.losses import IGNORE_INDEX, LossTerms, distillation_loss
from simpler_distil_whisper.training.models import freeze, last_states
from simpler_distil_whisper.training.optimizer import learning_rate_factor, make_optimizer
from simpler_distil_whisper.training.options import (
    ONLY_KL,
    Augmentation,
    Freeze,
    Objective,
    OptimizerOptions,
)
from simpler_distil_whisper.training.plan import TrainingPlan, Visit
from simpler_distil_whisper.training.tokens import DecoderTokens, decoder_sequences

DEMO = Path("demo_data")
BATCH = 50  # clips encoded or decoded at once
LONGEST = 40  # new tokens of a hypothesis; no clip of the demo has as many
LIVE_STEPS = 5  # of which the fastest counts
WAVE = {
    "speed": [0.92, 1.08],
    "noise_db": [5.0, 25.0],
    "gain_db": [-6.0, 6.0],
    "shift_seconds": 0.3,
}
MASKS = {"time_masks": 2, "max_time_seconds": 0.15, "frequency_masks": 2, "max_mels": 10}
KINDS: dict[str, dict[str, Any]] = {
    "wave": {"waveform": WAVE},
    "speed": {"waveform": {"speed": WAVE["speed"]}},
    "noise": {"waveform": {"noise_db": WAVE["noise_db"]}},
    "wide": {"waveform": {**WAVE, "speed": [0.85, 1.15], "noise_db": [0.0, 25.0]}},
    "masks": {"spec_augment": MASKS},
}

CE = Objective(cross_entropy_weight=1.0, kl_weight=0.0, temperature=1.0)
KL = Objective(cross_entropy_weight=0.0, kl_weight=1.0, temperature=2.0)


def at_temperature(temperature: float) -> Objective:
    """Return the divergence from the teacher alone, at a temperature."""
    return KL.model_copy(update={"temperature": temperature})


@dataclass(frozen=True)
class Recipe:
    """How a student is made. A study changes one or two of these at a time.

    Attributes:
        layers: the decoder layers that are kept.
        steps, batch, learning_rate, warmup_steps: of AdamW without weight decay; the rate falls
            linearly after the warm-up.
        objective: weights of cross-entropy and KL, and the temperature.
        labels: "pseudo" (the teacher's hypotheses) or "reference".
        max_error_rate: clips whose pseudo-label is worse are left out; None: none.
        views, view_kind: how many altered versions of each clip there are, and how they are made.
        on_policy, sampling: share of steps on the student's own hypotheses of the batch, drawn at
            this temperature (0: greedily), with the divergence from the teacher as the only loss.
        unfrozen, encoder_rate: share of steps, the last ones, in which the encoder learns too, and
            its learning rate as a share of the decoder's.
        dropout: in the student's decoder.
    """

    layers: tuple[int, ...] = (0, 2)
    steps: int = 500
    batch: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    objective: Objective = KL
    labels: str = "pseudo"
    max_error_rate: float | None = 0.2
    views: int = 3
    view_kind: str = "wave"
    on_policy: float = 0.0
    sampling: float = 0.0
    unfrozen: float = 0.0
    encoder_rate: float = 0.1
    dropout: float = 0.0

    @property
    def augmentation(self) -> Augmentation:
        """The same as a section of `run_distillation.json`."""
        kind = KINDS[self.view_kind] if self.views else {}
        return Augmentation(views=self.views, **kind)


def huggingface(learning_rate: float) -> Recipe:
    """Return the recipe of huggingface/distil-whisper's training scripts, but for its length.

    Its README trains at 1e-4 after a warm-up of 50 steps; its paper lets the rate fall linearly.
    """
    return Recipe(
        layers=(0, 3),
        learning_rate=learning_rate,
        warmup_steps=50,
        objective=MIXED,
        max_error_rate=None,
        views=0,
    )


STUDIES: dict[str, dict[str, Recipe]] = {
    "layers": {str(kept): Recipe(layers=kept) for kept in ((0, 1), (0, 2), (0, 3), (0, 1, 2))},
    "objective": {
        "CE": Recipe(objective=CE),
        "0.8 CE + 1.0 KL": Recipe(objective=MIXED),
        "0.2 CE + 1.0 KL": Recipe(objective=KL.model_copy(update={"cross_entropy_weight": 0.2})),
        "KL": Recipe(),
        "KL on references": Recipe(labels="reference", max_error_rate=None),
    },
    "temperature": {
        f"{t:g}": Recipe(objective=at_temperature(t)) for t in (1.0, 2.0, 3.0, 4.0, 8.0)
    },
    "rate": {f"{rate:g}": Recipe(learning_rate=rate) for rate in (5e-4, 1e-3, 2e-3, 4e-3)},
    "views": {str(views): Recipe(views=views) for views in (0, 3)},
    "kinds": {kind: Recipe(view_kind=kind) for kind in KINDS},
    "steps": {str(steps): Recipe(steps=steps) for steps in (250, 500, 1000, 1500)},
    "more": {
        "30 % on-policy, greedy": Recipe(on_policy=0.3),
        "30 % on-policy, sampled": Recipe(on_policy=0.3, sampling=1.0),
        "encoder unfrozen for the last 20 %": Recipe(unfrozen=0.2),
        "dropout 0.1": Recipe(dropout=0.1),
    },
    "huggingface": {
        "its recipe, 1e-4": replace(huggingface(1e-4), steps=1000),
        "its recipe, 1e-3": replace(huggingface(1e-3), steps=1000),
        "ours": Recipe(steps=1000),
        "ours without views": Recipe(steps=1000, views=0),
    },
}


class StudentScore(NamedTuple):
    """How a student does on clips: error rates, and its mean divergence from the teacher.

    The divergence, per token of the reference and at temperature 1, is the least noisy of them.
    """

    mandarin: float
    english: float
    kl: float


@dataclass
class EncodedClips:
    """One version of every clip, as both models are given it.

    Attributes:
        features: float32 [N, M, T]: log-mels.
        states: float32 [N, E, D]: the teacher's encoder states.
        teacher_states: kind of labels -> float32 [N, L, D]: the teacher's last decoder states.
    """

    features: Tensor
    states: Tensor
    teacher_states: dict[str, Tensor] = field(default_factory=dict)


class Material:
    """A teacher and clips, with everything that does not change from recipe to recipe.

    Attributes:
        tokens: "pseudo" and "reference" -> the decoder tokens of each clip.
        error_rates: of the pseudo-labels.
    """

    def __init__(self, whisper: Whisper, manifest: Path) -> None:
        """Read the clips and label them."""
        self.whisper = whisper
        self.teacher: WhisperForConditionalGeneration = whisper.model.requires_grad_(False)
        # As the figures of docs/method.md were measured: English by its words as they stand.
        self.scorer = Scorer(Metric(normalization=TextNormalization(whisper=None)))
        self.utterances = list(read_manifest(manifest, Columns()).utterances)
        self.waveforms = [load_audio(*utterance.clip) for utterance in self.utterances]
        self._encoded: dict[tuple[str, int], EncodedClips] = {}
        self.clean = self._encode(Augmentation(), 0)
        labels = self.transcribe(self.teacher, self.clean.states)
        references = [utterance.text or "" for utterance in self.utterances]
        self.tokens = {"pseudo": self._tokens(labels), "reference": self._tokens(references)}
        counts = map(self._count, self.utterances, labels)
        self.error_rates = [count.rate or 0.0 for count in counts]

    def encoded(self, augmentation: Augmentation, use: int) -> EncodedClips:
        """Return the version of each clip that training uses at use number `use`."""
        if not augmentation.views:
            return self.clean
        key = (augmentation.model_dump_json(), use % (augmentation.views + 1))
        if key not in self._encoded:
            # Views of one kind at a time: those of all would not fit into memory.
            self._encoded = {
                other: clips for other, clips in self._encoded.items() if other[0] == key[0]
            }
            self._encoded[key] = self._encode(augmentation, use)
        return self._encoded[key]

    @torch.no_grad()
    def _encode(self, augmentation: Augmentation, use: int) -> EncodedClips:
        features, encoder = self._features(augmentation, use), self.teacher.model.encoder
        states = [encoder(part).last_hidden_state for part in features.split(BATCH)]
        return EncodedClips(features, torch.cat(states))

    def _features(self, augmentation: Augmentation, use: int) -> Tensor:
        extractor = self.whisper.feature_extractor
        views, parts = Views(augmentation, 1.0, float(extractor.chunk_length), seed=0), []
        for part in in_batches(zip(self.utterances, self.waveforms, strict=True), BATCH):
            drawn = [
                views.of(utterance, len(waveform) / SAMPLE_RATE, use, 0)
                for utterance, waveform in part
            ]
            altered = [
                view.of_waveform(waveform) for view, (_, waveform) in zip(drawn, part, strict=True)
            ]
            features = log_mel(altered, extractor)
            for view, waveform, log_mels in zip(drawn, altered, features, strict=True):
                view.mask(log_mels, len(waveform))
            parts.append(features)
        return torch.cat(parts)

    @torch.no_grad()
    def teacher_states(self, clips: EncodedClips, labels: str) -> Tensor:
        """Return float32 [N, L, D]: the teacher's last decoder states for the labels."""
        if labels not in clips.teacher_states:
            inputs, _ = decoder_sequences(self.tokens[labels], self.whisper.tokens.end)
            parts = zip(inputs.split(BATCH), clips.states.split(BATCH), strict=True)
            decoded = [last_states(self.teacher.model.decoder, *part) for part in parts]
            clips.teacher_states[labels] = torch.cat(decoded)
        return clips.teacher_states[labels]

    def _tokens(self, texts: Sequence[str]) -> list[DecoderTokens]:
        pairs = zip(texts, self.utterances, strict=True)
        return [label_tokens(self.whisper, text, own.language) for text, own in pairs]

    def _count(self, utterance: Utterance, text: str) -> ErrorCounts:
        return self.scorer.count(utterance.text or "", text, utterance.language)

    def transcribe(self, model: WhisperForConditionalGeneration, states: Tensor) -> list[str]:
        """Return a model's hypotheses of all clips from encoder states, float [N, E, D]."""
        decoder = transcriber(replace(self.whisper, model=model))
        languages = [utterance.language for utterance in self.utterances]
        parts = zip(states.split(BATCH), in_batches(languages, BATCH), strict=True)
        return [
            hypothesis.text for part in parts for hypothesis in decoder.from_encoder_states(*part)
        ]

    @torch.no_grad()
    def score(self, student: WhisperForConditionalGeneration) -> StudentScore:
        """Return how a student, in evaluation mode, does on the clean clips."""
        states = self.clean.states
        if not same_encoder(student, self.teacher):
            parts = self.clean.features.split(BATCH)
            states = torch.cat([student.model.encoder(part).last_hidden_state for part in parts])
        counts = {"zh": ErrorCounts(), "en": ErrorCounts()}
        hypotheses = self.transcribe(student, states)
        for utterance, text in zip(self.utterances, hypotheses, strict=True):
            counts[utterance.language or ""] += self._count(utterance, text)
        rates = [counts[language].rate or 0.0 for language in ("zh", "en")]
        return StudentScore(rates[0], rates[1], self._divergence(student, states))

    def _divergence(self, student: WhisperForConditionalGeneration, states: Tensor) -> float:
        """Return KL(teacher || student) per token of the reference, at temperature 1.

        Args:
            student: in evaluation mode.
            states: float [N, E, D]: its encoder states of the clean clips.
        """
        inputs, labels = decoder_sequences(self.tokens["reference"], self.whisper.tokens.end)
        whole = (inputs, states, self.teacher_states(self.clean, "reference"), labels)
        terms = [
            self.loss(student, last_states(student.model.decoder, *part[:2]), *part[2:], ONLY_KL)
            for part in zip(*(each.split(BATCH) for each in whole), strict=True)
        ]
        return float(sum(part.kl for part in terms) / sum(part.tokens for part in terms))

    def loss(
        self,
        student: WhisperForConditionalGeneration,
        student_states: Tensor,
        teacher_states: Tensor,
        labels: Tensor,
        objective: Objective,
    ) -> LossTerms:
        """Return the loss of last decoder states, the student's and the teacher's."""
        heads = student.proj_out.weight, self.teacher.proj_out.weight
        return distillation_loss(
            student_states, heads[0], teacher_states, heads[1], labels, objective
        )


class Distillation:
    """One student in training."""

    def __init__(self, material: Material, recipe: Recipe, seed: int) -> None:
        """Prune the student, and plan its steps."""
        self.material, self.recipe, self.seed = material, recipe, seed
        torch.manual_seed(seed)
        self.student = pruned(material.teacher, recipe.layers)
        freeze(self.student, Freeze(encoder=not recipe.unfrozen))
        for module in (self.student.model.decoder, *self.student.model.decoder.layers):
            module.dropout = recipe.dropout
        limit = recipe.max_error_rate
        self.rows = [
            row for row, rate in enumerate(material.error_rates) if limit is None or rate <= limit
        ]
        self.plan = TrainingPlan([1.0] * len(self.rows), self._length, recipe.batch, True, seed)
        self.random = random.Random(seed)

    def _length(self, visit: Visit) -> int:
        sequences = self.material.tokens[self.recipe.labels]
        return len(sequences[self.rows[visit.example]].tokens)

    def run(self) -> None:
        """Train to the end; the student is then what is to be scored."""
        recipe = self.recipe
        optimizer = make_optimizer(self.student, OptimizerOptions(), recipe.encoder_rate)
        encoder = [w for w in self.student.model.encoder.parameters() if w.requires_grad]
        self.student.train()
        for step in range(recipe.steps):
            factor = learning_rate_factor("linear", step, recipe.warmup_steps, recipe.steps)
            unfrozen = step >= recipe.steps * (1 - recipe.unfrozen)
            for weight in encoder:
                weight.requires_grad_(unfrozen)
            terms = self._terms(self.plan.step(step), unfrozen)
            (terms.loss / terms.tokens).backward()
            update(optimizer, recipe.learning_rate * factor)
        self.student.eval()

    def _terms(self, visits: Sequence[Visit], unfrozen: bool) -> LossTerms:
        """Return the loss of one batch."""
        material, recipe, objective = self.material, self.recipe, self.recipe.objective
        rows = [self.rows[visit.example] for visit in visits]
        versions = [material.encoded(recipe.augmentation, visit.use) for visit in visits]
        states = torch.stack([clips.states[row] for clips, row in zip(versions, rows, strict=True)])
        own = states
        if unfrozen:
            features = [clips.features[row] for clips, row in zip(versions, rows, strict=True)]
            own = self.student.model.encoder(torch.stack(features)).last_hidden_state
        if self.random.random() < recipe.on_policy:
            objective = at_temperature(objective.temperature)
            inputs, labels = self._own_hypotheses(rows, own.detach())
            with torch.no_grad():
                teacher_states = last_states(material.teacher.model.decoder, inputs, states)
        else:
            tokens = [material.tokens[recipe.labels][row] for row in rows]
            inputs, labels = decoder_sequences(tokens, material.whisper.tokens.end)
            each = [
                material.teacher_states(clips, recipe.labels)[row, : inputs.shape[1]]
                for clips, row in zip(versions, rows, strict=True)
            ]
            teacher_states = torch.stack(each)
        student_states = last_states(self.student.model.decoder, inputs, own)
        return material.loss(self.student, student_states, teacher_states, labels, objective)

    def _own_hypotheses(self, rows: Sequence[int], states: Tensor) -> tuple[Tensor, Tensor]:
        """Return decoder inputs and labels of the student's present hypotheses of a batch."""
        material, end = self.material, self.material.whisper.tokens.end
        self.student.eval()
        whisper = replace(material.whisper, model=self.student)
        decoder = transcriber(whisper, self.recipe.sampling, self.random.getrandbits(31))
        languages = [material.utterances[row].language or "" for row in rows]
        hypotheses = decoder.from_encoder_states(states, languages, keys=list(rows))
        self.student.train()
        tokens = [
            decoder_tokens(
                whisper, [*hypothesis.token_ids, *([end] if hypothesis.complete else [])], language
            )
            for language, hypothesis in zip(languages, hypotheses, strict=True)
        ]
        return decoder_sequences(tokens, end)


def decoder_tokens(whisper: Whisper, ids: Sequence[int], language: str | None) -> DecoderTokens:
    """Return the prompt and the tokens to learn."""
    prompt = whisper.tokens.prompt(language, "transcribe")
    return DecoderTokens([*prompt, *ids], len(prompt))


def label_tokens(whisper: Whisper, text: str | None, language: str | None) -> DecoderTokens:
    """Return the same of a whole text."""
    ids = whisper.tokenizer(text or "", add_special_tokens=False).input_ids
    return decoder_tokens(whisper, [*ids, whisper.tokens.end], language)


def update(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Take an optimizer step, with gradients whose norm is at most 1."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad()


def pruned(
    teacher: WhisperForConditionalGeneration, layers: Sequence[int]
) -> WhisperForConditionalGeneration:
    """Return the untrained student with all encoder layers and these of the decoder."""
    return prune_whisper(teacher, range(teacher.config.encoder_layers), layers)


def same_encoder(
    student: WhisperForConditionalGeneration, teacher: WhisperForConditionalGeneration
) -> bool:
    """Return whether the student's encoder is still the teacher's."""
    pairs = zip(student.model.encoder.parameters(), teacher.model.encoder.parameters(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def transcriber(whisper: Whisper, temperature: float = 0.0, seed: int = 0) -> Transcriber:
    """Return what decodes a model's hypotheses, each once."""
    options = DecodingOptions(max_new_tokens=LONGEST, temperatures=[temperature])
    return Transcriber(whisper, options, seed)


def live_step_seconds(material: Material) -> float:
    """Return what a step costs as huggingface/distil-whisper's script computes it.

    The shared encoder runs, both decoders see labels padded to all 448 positions, and cross-entropy
    and KL are made of whole logits.
    """
    student = pruned(material.teacher, (0, 3)).train()
    freeze(student, Freeze())
    optimizer = make_optimizer(student, OptimizerOptions())
    short_inputs, short_labels = decoder_sequences(
        material.tokens["pseudo"][:16], material.whisper.tokens.end
    )
    room = (0, student.config.max_target_positions - short_inputs.shape[1])
    inputs = functional.pad(short_inputs, room, value=material.whisper.tokens.end)
    labels = functional.pad(short_labels, room, value=IGNORE_INDEX)
    features, seconds = material.clean.features[:16], []
    for _ in range(LIVE_STEPS):
        start = time.process_time()
        with torch.no_grad():
            states = student.model.encoder(features).last_hidden_state
            taught = last_states(material.teacher.model.decoder, inputs, states)
            teacher_logits = material.teacher.proj_out(taught)
        logits = student.proj_out(last_states(student.model.decoder, inputs, states))
        cross_entropy = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        plain_loss(cross_entropy, logits, teacher_logits, labels).backward()
        update(optimizer, 1e-3)
        seconds.append(time.process_time() - start)
    return min(seconds)


class Outcome(NamedTuple):
    """What one recipe came to with one seed, and what it took without what is computed once."""

    score: StudentScore
    seconds: float


def train(train: Material, dev: Material, recipe: Recipe, seed: int) -> Outcome:
    """Make one student and score it."""
    for use in range(recipe.views + 1):
        train.teacher_states(train.encoded(recipe.augmentation, use), recipe.labels)
    distillation = Distillation(train, recipe, seed)
    start = time.process_time()
    distillation.run()
    seconds = time.process_time() - start
    return Outcome(dev.score(distillation.student), seconds)


def print_row(name: str, outcomes: Sequence[Outcome]) -> None:
    """Print a row of a table: the means over the seeds, and each seed's error rates."""
    zh, en, kl = (
        statistics.mean(each) for each in zip(*(outcome.score for outcome in outcomes), strict=True)
    )
    seconds = statistics.mean(outcome.seconds for outcome in outcomes)
    seeds = ", ".join(
        f"{outcome.score.mandarin:.4f} / {outcome.score.english:.4f}" for outcome in outcomes
    )
    print(f"| {name} | {zh:.4f} | {en:.4f} | {kl:.4f} | {seeds} | {seconds:.0f} |", flush=True)


def make_dev(folder: Path) -> None:
    """Write 600 Mandarin and 200 English clips of the demo's dev voices and dev sentences."""
    # They need the synthesizer, which the studies do not.
    from demo.acoustics import OPUS_COMPRESSION
    from demo.build import SplitPlan, write_clips, write_manifest

    plan, rng = SplitPlan(600, 200, OPUS_COMPRESSION), random.Random("dev of the recipe study")
    write_manifest(folder / "dev.jsonl", write_clips("dev", folder, plan, rng))


def main() -> None:
    """Run studies and print their tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)}; none: all")
    parser.add_argument("--train", type=existing, default=DEMO / "train.jsonl")
    parser.add_argument("--dev", type=existing, default=DEMO / "dev.jsonl", help="what is scored")
    parser.add_argument("--seeds", type=int, default=1, help="students of each recipe")
    parser.add_argument("--make-dev", type=Path, help="only write a larger dev set to this folder")
    args = parser.parse_args()
    if unknown := set(args.studies) - set(STUDIES):
        parser.error(f"no such study: {', '.join(sorted(unknown))}")
    if args.make_dev:
        make_dev(args.make_dev)
        return
    torch.set_num_threads(1)
    quieten_libraries()
    whisper = load_whisper(read_model_folder(DEMO / "teacher", None, "the demo's teacher"))
    train_clips, dev = Material(whisper, args.train), Material(whisper, args.dev)
    machine.print_facts(torch.device("cpu"), 1)
    print(f"- train: {args.train}, {len(train_clips.utterances)} clips; scored: {args.dev}\n")
    for study in args.studies or STUDIES:
        print(f"### {study}\n")
        if study == "huggingface":
            print(f"a step of its way: {live_step_seconds(train_clips):.2f} s\n")
        print("| recipe | zh CER | en WER | KL | each seed | seconds |\n|---|---|---|---|---|---|")
        print_row("teacher", [Outcome(dev.score(whisper.model), 0.0)])
        for name, recipe in STUDIES[study].items():
            seeds = range(args.seeds)
            print_row(name, [train(train_clips, dev, recipe, seed) for seed in seeds])
        print(flush=True)


if __name__ == "__main__":
    main()
