"""What makes a Whisper good on the clip alone: one lever of `audio_context` at a time.

    python -m benchmarks.context_recipe --teacher base --train pseudo_labels.jsonl --dev dev.jsonl

Each recipe trains an unpruned copy of the teacher for some steps of a few clips; all have the same
clips in the same order. A row of the Markdown table has KL(teacher || student) per token of the dev
references at temperature 1, with the clip alone and with the whole window, and the probability of
the end token. The teacher has the whole window always; its states are computed once. Seconds are
processor time of all threads.
"""

import argparse
import copy
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from benchmarks import machine
from benchmarks.clips import existing, spread_utterances
from benchmarks.recipe import KL, label_tokens, update
from simpler_distil_whisper.data.audio import SAMPLE_RATE, load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.model.audio_context import POSITIONS_PER_SECOND
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.whisper import (
    Whisper,
    load_whisper,
    quieten_libraries,
    run_encoder,
)
from simpler_distil_whisper.training.losses import distillation_loss
from simpler_distil_whisper.training.models import freeze, last_states
from simpler_distil_whisper.training.optimizer import learning_rate_factor, make_optimizer
from simpler_distil_whisper.training.options import ONLY_KL, Freeze, OptimizerOptions
from simpler_distil_whisper.training.tokens import decoder_sequences

LONGEST_SECONDS = 6.0  # of a training clip, for the sake of time
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Recipe:
    """How the student is trained: as docs/audio-context.md recommends, and one thing changed.

    Attributes:
        learning_rate: of the decoder.
        encoder_factor: the encoder's, as a share of it.
        margin, jitter: seconds of silence after the clip; the second is the most that is added.
        full_windows: the share of clips that have the whole window.
        distance: weight of the squared distance between the encoders' states of the clip's own
            positions, as a share of the squared norm of the teacher's.
        rounding: the encoder positions are a multiple of it.
    """

    learning_rate: float = 3e-5
    encoder_factor: float = 1.0
    margin: float = 0.3
    jitter: float = 0.5
    full_windows: float = 0.1
    distance: float = 0.0
    rounding: int = 50


RECIPES = {
    "as recommended": Recipe(),
    "no training": Recipe(learning_rate=0.0, full_windows=0.0),
    "encoder's rate 0.1 of the decoder's": Recipe(encoder_factor=0.1),
    "both rates 1e-4": Recipe(learning_rate=1e-4),
    "with the distance of the encoder states": Recipe(distance=1.0),
    "no whole windows": Recipe(full_windows=0.0),
    "30 % whole windows": Recipe(full_windows=0.3),
    "margin 1 s": Recipe(margin=1.0),
    "positions in tens": Recipe(rounding=10),
}


class Clip(NamedTuple):
    """A clip as both models are given it.

    Attributes:
        features: float32 [1, M, T]: log-mels of the whole window.
        seconds: its length.
        inputs, labels: int64 [1, L].
        states: float32 [1, E, D]: the teacher's encoder states.
        decoded: float32 [1, L, D]: the teacher's last decoder states.
    """

    features: Tensor
    seconds: float
    inputs: Tensor
    labels: Tensor
    states: Tensor
    decoded: Tensor


@torch.no_grad()
def read_clips(teacher: Whisper, manifest: Path, most: int) -> list[Clip]:
    """Return clips of a manifest, evenly spread over it, with the teacher's states."""
    clips: list[Clip] = []
    for utterance in spread_utterances(manifest, 2 * most):
        samples = load_audio(*utterance.clip)
        seconds = len(samples) / SAMPLE_RATE
        if seconds > LONGEST_SECONDS or len(clips) == most:
            continue
        features = log_mel([samples], teacher.feature_extractor)
        tokens = label_tokens(teacher, utterance.text, utterance.language)
        inputs, labels = decoder_sequences([tokens], teacher.tokens.end)
        states = run_encoder(teacher.model.model.encoder, features)
        decoded = last_states(teacher.model.model.decoder, inputs, states)
        clips.append(Clip(features, seconds, inputs, labels, states, decoded))
    return clips


def train(
    teacher: WhisperForConditionalGeneration,
    clips: Sequence[Clip],
    recipe: Recipe,
    steps: int,
    batch: int,
) -> WhisperForConditionalGeneration:
    """Return a student that has learnt from the clips in their order, round and round."""
    drawn = random.Random(0)
    student = copy.deepcopy(teacher)
    freeze(student, Freeze(encoder=False))
    optimizer = make_optimizer(student, OptimizerOptions(), recipe.encoder_factor)
    for step in range(steps if recipe.learning_rate else 0):
        own = [clips[(step * batch + row) % len(clips)] for row in range(batch)]
        tokens = sum(int(clip.labels.ge(0).sum()) for clip in own)
        for clip in own:
            margin = recipe.margin + recipe.jitter * drawn.random()
            positions = _positions(clip, margin, recipe.rounding)
            if drawn.random() < recipe.full_windows:
                positions = clip.states.shape[1]
            loss = _loss(student, teacher, clip, positions, recipe.distance)
            (loss / tokens).backward()  # type: ignore[no-untyped-call]
        factor = learning_rate_factor("linear", step, WARMUP_STEPS, steps)
        update(optimizer, recipe.learning_rate * factor)
    return student


def _positions(clip: Clip, margin: float, rounding: int) -> int:
    needed = math.ceil((clip.seconds + margin) * POSITIONS_PER_SECOND)
    return min(math.ceil(needed / rounding) * rounding, clip.states.shape[1])


def _loss(
    student: WhisperForConditionalGeneration,
    teacher: WhisperForConditionalGeneration,
    clip: Clip,
    positions: int,
    distance: float,
) -> Tensor:
    """Return the sum over a clip's tokens of KL, and of the distance of the encoder states."""
    states = run_encoder(student.model.encoder, clip.features[..., : 2 * positions])
    heads = student.proj_out.weight, teacher.proj_out.weight
    decoded = last_states(student.model.decoder, clip.inputs, states)
    terms = distillation_loss(decoded, heads[0], clip.decoded, heads[1], clip.labels, KL)
    if not distance:
        return terms.loss
    spoken = min(positions, math.ceil(clip.seconds * POSITIONS_PER_SECOND))
    ours, theirs = states[:, :spoken], clip.states[:, :spoken]
    return (
        terms.loss
        + distance * terms.tokens * (ours - theirs).square().sum() / theirs.square().sum()
    )


@torch.no_grad()
def score(
    student: WhisperForConditionalGeneration,
    teacher: WhisperForConditionalGeneration,
    clips: Sequence[Clip],
    recipe: Recipe | None,
) -> tuple[float, float]:
    """Return KL per token, and the mean probability of the end token.

    Args:
        student: in evaluation mode.
        teacher: for its output head.
        clips: with the teacher's states.
        recipe: by which a clip is given its positions; None: the whole window.
    """
    kl, tokens, ends = 0.0, 0, 0.0
    for clip in clips:
        count = clip.states.shape[1]
        if recipe:
            count = _positions(clip, recipe.margin, recipe.rounding)
        states = run_encoder(student.model.encoder, clip.features[..., : 2 * count])
        decoded = last_states(student.model.decoder, clip.inputs, states)
        heads = student.proj_out.weight, teacher.proj_out.weight
        terms = distillation_loss(decoded, heads[0], clip.decoded, heads[1], clip.labels, ONLY_KL)
        kl, tokens = kl + float(terms.kl), tokens + int(terms.tokens)
        last = (decoded[0, -1] @ heads[0].T).softmax(-1)
        ends += float(last[clip.labels[0, -1]])
    return kl / tokens, ends / len(clips)


def main() -> None:
    """Train a student by each recipe and print a row for it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    names = ", ".join(RECIPES).replace("%", "%%")  # argparse formats its help
    parser.add_argument("recipes", nargs="*", help=f"of {names}; none: all")
    for name in ("teacher", "train", "dev"):
        parser.add_argument(f"--{name}", type=existing, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--train-clips", type=int, default=96)
    parser.add_argument("--dev-clips", type=int, default=24)
    args = parser.parse_args()
    if unknown := set(args.recipes) - set(RECIPES):
        parser.error(f"no such recipe: {', '.join(sorted(unknown))}")
    quieten_libraries()
    whisper = load_whisper(read_model_folder(args.teacher, None, "--teacher"))
    teacher = whisper.model.requires_grad_(False)
    clips = read_clips(whisper, args.train, args.train_clips)
    dev = read_clips(whisper, args.dev, args.dev_clips)
    machine.print_facts(torch.device("cpu"), torch.get_num_threads())
    print(f"- {args.steps} steps of {args.batch}, {len(clips)} clips; dev: {len(dev)} clips\n")
    print("| recipe | KL, the clip alone | end token | KL, whole window | end token | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in args.recipes or RECIPES:
        recipe, start = RECIPES[name], time.process_time()
        student = train(teacher, clips, recipe, args.steps, args.batch)
        seconds = time.process_time() - start
        short, whole = score(student, teacher, dev, recipe), score(student, teacher, dev, None)
        scores = " | ".join(f"{value:.4f} | {end:.2f}" for value, end in (short, whole))
        print(f"| {name} | {scores} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
