"""Trains the demo's Whisper from scratch on shards of synthesized speech.

Besides the decoder's cross-entropy the encoder learns, through a linear layer that is thrown away
afterwards, which token is spoken in each frame. The synthesizer knows it, and attention forms far
sooner with it. The folder that is written holds an average of the weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import WhisperProcessor, WhisperTokenizer

from demo.corpus import MEL_FRAMES_PER_SECOND
from demo.evaluate import error_rate, errors_per_clip, transcribe
from demo.grammar import LANGUAGES
from demo.teacher import generation_config, new_teacher, save_teacher
from demo.tokenizer import WINDOW_SECONDS, build_processor
from demo.windows import cut_windows
from simpler_distil_whisper.model.whisper import run_encoder

_WINDOW_FRAMES = WINDOW_SECONDS * MEL_FRAMES_PER_SECOND
_BATCHES_PER_BUCKET = 12
_FLAT_SHARE = 0.3
_FINAL_FACTOR = 0.02
_AVERAGING = 0.998
_LABEL_SMOOTHING = 0.05
_IGNORED = -100
_MAX_SHIFT = 40

_FULL_WINDOW_SHARE = 0.1
_TIMESTAMP_SHARE = 0.15
# Prompts are long, so they come together: some batches have them in most rows, others have none.
_PROMPT_BATCH_SHARE = 0.35
_PROMPT_SHARE = 0.8
_MAX_PROMPT_SENTENCES = 16
# As many as decoders hand on: half of the decoder's positions.
_MAX_PROMPT_TOKENS = 223
_WINDOWS_SHARE = 0.55
_NO_TASK_SHARE = 0.03
_LANGUAGE_LOSS_SHARE = 0.5


@dataclass(frozen=True)
class Shard:
    """Features and frame labels of many clips, end to end, and a row about each clip."""

    features: np.ndarray
    labels: np.ndarray
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Batch:
    """One training batch; `labels` and `frame_labels` are -100 where there is no loss."""

    features: torch.Tensor
    frame_labels: torch.Tensor
    decoder_inputs: torch.Tensor
    labels: torch.Tensor


def load_shards(folders: list[Path]) -> list[Shard]:
    """Opens the complete shards among the folders."""
    return [
        Shard(
            np.load(folder / "features.npy", mmap_mode="r"),
            np.load(folder / "labels.npy", mmap_mode="r"),
            json.loads((folder / "rows.json").read_text(encoding="utf-8")),
        )
        for folder in folders
        if (folder / "rows.json").exists()
    ]


class TargetBuilder:
    """Turns a row's segments into decoder tokens, with the prefixes that Whisper knows."""

    def __init__(self, tokenizer: WhisperTokenizer, rng: random.Random) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        self._id = tokenizer.convert_tokens_to_ids
        self._first_timestamp = self._id("<|0.00|>")

    def build(
        self, row: dict[str, Any], shift: float, previous: list[dict[str, Any]]
    ) -> tuple[list[int], list[int]]:
        """Returns decoder tokens, and labels that are -100 where the token is given.

        Args:
            row: Clip or window with its language and segments.
            shift: Seconds by which the clip was moved.
            previous: Segments whose texts become the prompt, if there are any.
        """
        start = self._id("<|startoftranscript|>")
        language = self._id(f"<|{row['language']}|>")
        task = [] if self._rng.random() < _NO_TASK_SHARE else [self._id("<|transcribe|>")]
        prompt = self._prompt(previous, row["language"]) if previous else []
        learnt = language if self._rng.random() < _LANGUAGE_LOSS_SHARE else _IGNORED
        if not row["segments"]:
            # Whoever decodes the window all the same shall get an empty text.
            learnt = self._id("<|nospeech|>")
        body = self._body(row, shift)
        tokens = [*prompt, start, language, *task, *body]
        # The choice between <|notimestamps|> and a timestamp is the caller's, never learnt.
        given = 1 if body[0] == self._id("<|notimestamps|>") else 0
        labels = [_IGNORED] * (len(prompt) + 1) + [learnt] + [_IGNORED] * (len(task) + given)
        return tokens, labels + body[given:]

    def _prompt(self, previous: list[dict[str, Any]], language: str) -> list[int]:
        """Text as a user gives it, or with timestamps as sequential decoding hands it on."""
        timed = self._rng.random() < 0.5
        prompt: list[int] = []
        for segment in previous:
            if timed:
                prompt.append(self._timestamp(segment["start"]))
            space = " " if language == "en" or not prompt else ""
            prompt += self._encode(space + segment["text"])
            if timed:
                prompt.append(self._timestamp(segment["end"]))
        return [self._id("<|startofprev|>"), *prompt[-_MAX_PROMPT_TOKENS:]]

    def _body(self, row: dict[str, Any], shift: float) -> list[int]:
        segments = row["segments"]
        # Where a sentence is cut, only its start is told: decoding goes on from there.
        cut = bool(segments) and segments[-1]["cut"]
        timed = cut or row.get("timed", self._rng.random() < _TIMESTAMP_SHARE)
        body = [] if timed else [self._id("<|notimestamps|>")]
        if timed and not segments:
            body = [self._first_timestamp]
        for index, segment in enumerate(segments):
            if timed:
                body.append(self._timestamp(segment["start"] + shift))
            if segment["cut"]:
                break
            # Segments with times are joined as they are, also across windows.
            space = " " if row["language"] == "en" and (index or timed) else ""
            body += self._encode(space + segment["text"])
            if timed:
                body.append(self._timestamp(segment["end"] + shift))
        return [*body, self._tokenizer.eos_token_id]

    def _timestamp(self, seconds: float) -> int:
        return self._first_timestamp + min(round(seconds * 50), WINDOW_SECONDS * 50)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids


class BatchBuilder:
    """Draws augmented batches from shards."""

    def __init__(self, tokenizer: WhisperTokenizer, size: int, rng: random.Random) -> None:
        self.size = size
        self._targets = TargetBuilder(tokenizer, rng)
        self._end = tokenizer.eos_token_id
        self._rng = rng

    def epoch(self, shards: list[Shard]) -> Iterator[Batch]:
        """Yields every clip once, in batches of similar length.

        Where there are recordings, windows are cut out of all of them, and clips are left out
        until the share of windows is right.
        """
        rows = [(shard, row) for shard in shards for row in shard.rows]
        clips = [(shard, row) for shard, row in rows if row["frames"] <= _WINDOW_FRAMES]
        windows = [
            (shard, window)
            for shard, row in rows
            if row["frames"] > _WINDOW_FRAMES
            for window in cut_windows(row, self._rng)
        ]
        self._rng.shuffle(clips)
        if windows:
            clips = clips[: round(len(windows) * (1 / _WINDOWS_SHARE - 1))] + windows
            self._rng.shuffle(clips)
        bucket = self.size * _BATCHES_PER_BUCKET
        for begin in range(0, len(clips) - bucket + 1, bucket):
            ordered = sorted(clips[begin : begin + bucket], key=lambda clip: _width(clip[1]))
            starts = list(range(0, bucket, self.size))
            self._rng.shuffle(starts)
            for start in starts:
                yield self._batch(ordered[start : start + self.size])

    def _batch(self, clips: list[tuple[Shard, dict[str, Any]]]) -> Batch:
        longest = max(_width(row) for _, row in clips)
        width = min(_WINDOW_FRAMES, (longest + 10 + self._rng.randint(0, 60)) // 20 * 20)
        width = max(width, longest)
        if self._rng.random() < _FULL_WINDOW_SHARE:
            width = _WINDOW_FRAMES
        features = np.empty((len(clips), width, 80), np.float32)
        frame_labels = np.full((len(clips), width // 2), self._end, np.int64)
        sequences = []
        prompted = self._rng.random() < _PROMPT_BATCH_SHARE
        # Prompts of about the same length, since they are padded to the longest.
        sentences = self._rng.randint(1, _MAX_PROMPT_SENTENCES)
        for index, (shard, row) in enumerate(clips):
            frames, start = row["frames"], row["start"]
            shift = 2 * self._rng.randint(0, min(_MAX_SHIFT, width - _width(row)) // 2)
            features[index] = row.get("padding", row["silence"])
            features[index, shift : shift + frames] = shard.features[start : start + frames]
            self._mask(features[index], row["silence"], shift, frames)
            spoken = shard.labels[start // 2 : (start + frames) // 2]
            frame_labels[index, shift // 2 : (shift + frames) // 2] = spoken
            previous = self._previous(row, clips, sentences) if prompted else []
            sequences.append(self._targets.build(row, shift / MEL_FRAMES_PER_SECOND, previous))
        inputs, labels = self._pad(sequences)
        mel = torch.from_numpy(features).transpose(1, 2).contiguous()
        return Batch(mel, torch.from_numpy(frame_labels), inputs, labels)

    def _previous(
        self, row: dict[str, Any], clips: list[tuple[Shard, dict[str, Any]]], count: int
    ) -> list[dict[str, Any]]:
        """The sentences before the row, and where they are too few others of the language."""
        if self._rng.random() >= _PROMPT_SHARE:
            return []
        # A prompt with the target itself would teach to copy.
        texts = {segment["text"] for segment in row["segments"]}
        others = [
            segment
            for _, other in clips
            if other["language"] == row["language"]
            for segment in other["segments"]
            if not segment["cut"] and segment["text"] not in texts
        ]
        drawn = self._rng.choices(others, k=count) if others else []
        return [*drawn, *row.get("previous", [])][-count:]

    def _mask(self, features: np.ndarray, silence: float, shift: int, frames: int) -> None:
        """SpecAugment with two masks in each direction."""
        for _ in range(2):
            size = self._rng.randint(0, 10)
            low = self._rng.randint(0, 80 - size)
            features[:, low : low + size] = silence + 0.5 * self._rng.random()
        for _ in range(2):
            size = self._rng.randint(0, 14)
            begin = shift + self._rng.randint(0, max(0, frames - size))
            features[begin : begin + size] = silence

    def _pad(self, sequences: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, ...]:
        """Shifts: the decoder reads all tokens but the last and predicts all but the first."""
        longest = max(len(tokens) for tokens, _ in sequences) - 1
        inputs = torch.full((len(sequences), longest), self._end)
        labels = torch.full((len(sequences), longest), _IGNORED)
        for index, (tokens, learnt) in enumerate(sequences):
            inputs[index, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            labels[index, : len(tokens) - 1] = torch.tensor(learnt[1:])
        return inputs, labels


def _width(row: dict[str, Any]) -> int:
    """Mel frames that a row needs: its own, or the whole window where decoding would pad it."""
    return _WINDOW_FRAMES if "padding" in row else int(row["frames"])


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn.

    Attributes:
        minutes: Training time; evaluation doesn't count.
        peak: Highest learning rate.
        warm_up_steps: Steps until it is reached.
    """

    minutes: float
    peak: float
    warm_up_steps: int


class Trainer:
    """Model, average, optimizer and progress; everything that a checkpoint holds.

    Progress is counted in training minutes, so that the schedule ends when it has to on a machine
    of any speed.
    """

    def __init__(self, processor: WhisperProcessor, schedule: Schedule, seed: int) -> None:
        torch.manual_seed(seed)
        self.processor = processor
        self.model = new_teacher(processor.tokenizer)
        self.model.generation_config = generation_config(processor.tokenizer)
        # With such short sequences and small heads this is the fastest on a CPU.
        self.model.set_attn_implementation("eager")
        self.average = copy.deepcopy(self.model).eval()
        self.frame_head = nn.Linear(self.model.config.d_model, self.model.config.vocab_size)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._averages = [p for p in self.average.parameters() if p.requires_grad]
        trained = [*self._parameters, *self.frame_head.parameters()]
        self.optimizer = torch.optim.AdamW(
            trained, lr=schedule.peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.schedule = schedule
        self.elapsed = 0.0
        self.steps = 0

    def learning_rate(self) -> float:
        """Warm-up by steps, then flat, then linear decay by training time."""
        progress = self.elapsed / (60 * self.schedule.minutes)
        decay = 1 - (progress - _FLAT_SHARE) / (1 - _FLAT_SHARE)
        warm_up = min(1.0, (self.steps + 1) / self.schedule.warm_up_steps)
        return self.schedule.peak * warm_up * min(1.0, max(_FINAL_FACTOR, decay))

    def step(self, batch: Batch) -> tuple[float, float]:
        """One optimizer step. Returns the decoder's and the frame loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        encoded = run_encoder(self.model.model.encoder, batch.features)
        logits = self.model(
            encoder_outputs=(encoded,), decoder_input_ids=batch.decoder_inputs, use_cache=False
        ).logits
        decoder_loss = functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), label_smoothing=_LABEL_SMOOTHING
        )
        # Neighbouring frames hold much the same: every second one halves the cost.
        parity = self.steps % 2
        frame_logits = self.frame_head(encoded[:, parity::2]).flatten(0, 1)
        frame_labels = batch.frame_labels[:, parity::2].flatten()
        frame_loss = functional.cross_entropy(frame_logits, frame_labels)
        (decoder_loss + frame_loss).backward()
        trained = [*self._parameters, *self.frame_head.parameters()]
        nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        # A short memory at first, so that the average does not drag the start along.
        weight = 1 - min(_AVERAGING, self.steps / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._parameters, weight)
        return decoder_loss.item(), frame_loss.item()

    def save(self, path: Path) -> None:
        """Writes the state for a later resumption."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "frame_head": self.frame_head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "elapsed": self.elapsed,
            "steps": self.steps,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path, anew: bool = False) -> None:
        """Restores a saved state; `anew` begins its schedule again."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.frame_head.load_state_dict(state["frame_head"])
        self.optimizer.load_state_dict(state["optimizer"])
        if not anew:
            self.elapsed, self.steps = state["elapsed"], state["steps"]


def development_error(trainer: Trainer, shard: Shard) -> dict[str, float]:
    """Returns zh CER and en WER of the averaged weights on the development shard."""
    rates = {}
    for language in LANGUAGES:
        rows = [row for row in shard.rows if row["language"] == language]
        features = torch.empty(len(rows), 80, _WINDOW_FRAMES)
        for index, row in enumerate(rows):
            features[index] = row["silence"]
            mel = shard.features[row["start"] : row["start"] + row["frames"]]
            features[index, :, : row["frames"]] = torch.from_numpy(np.array(mel.T))
        texts = transcribe(trainer.average, trainer.processor, features, [language] * len(rows))
        references = [row["segments"][0]["text"] for row in rows]
        rates[language] = error_rate(errors_per_clip(language, references, texts))[0]
    return rates


def train(
    trainer: Trainer, batches: BatchBuilder, work: Path, pattern: str, every_minutes: float
) -> None:
    """Trains until the minutes are over; saves and evaluates every few minutes."""
    [development] = load_shards([work / "dev"])
    saved, losses, seconds = trainer.elapsed, [], time.perf_counter()
    while True:
        # Shards that were completed meanwhile join at the next epoch.
        shards = load_shards(sorted(work.glob(pattern)))
        count = sum(len(shard.rows) for shard in shards)
        print(f"epoch from {count} clips and recordings", flush=True)
        for batch in batches.epoch(shards):
            losses.append(trainer.step(batch))
            now = time.perf_counter()
            trainer.elapsed += now - seconds
            seconds = now
            finished = trainer.elapsed >= 60 * trainer.schedule.minutes
            if trainer.steps % 100 == 0:
                _report(trainer, losses)
                losses.clear()
            if finished or trainer.elapsed - saved >= 60 * every_minutes:
                rates = development_error(trainer, development)
                print(f"dev zh CER {rates['zh']:.4f}, en WER {rates['en']:.4f}", flush=True)
                save_teacher(trainer.average, work / "teacher")
                trainer.save(work / "state.pt")
                saved, seconds = trainer.elapsed, time.perf_counter()
            if finished:
                return


def _report(trainer: Trainer, losses: list[tuple[float, float]]) -> None:
    decoder, frames = np.mean(losses, axis=0)
    print(
        f"step {trainer.steps}, {trainer.elapsed / 60:.1f} min, "
        f"decoder loss {decoder:.3f}, frame loss {frames:.3f}",
        flush=True,
    )


def main() -> None:
    """Trains the teacher in a folder that holds the shards; resumes from a saved state."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("work", type=Path, help="folder with train-* and dev shards")
    parser.add_argument("--shards", default="train-*", help="pattern of the training shards")
    parser.add_argument("--minutes", type=float, default=70.0)
    parser.add_argument("--batch", type=int, default=32, help="clips per step")
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--warm-up-steps", type=int, default=200)
    parser.add_argument("--start-from", type=Path, help="state of a training to build upon")
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    schedule = Schedule(args.minutes, args.peak, args.warm_up_steps)
    trainer = Trainer(build_processor(), schedule, args.seed)
    if (args.work / "state.pt").exists():
        trainer.load(args.work / "state.pt")
    elif args.start_from is not None:
        trainer.load(args.start_from, anew=True)
    rng = random.Random(f"{args.seed} {trainer.steps}")
    batches = BatchBuilder(trainer.processor.tokenizer, args.batch, rng)
    train(trainer, batches, args.work, args.shards, args.save_every)


if __name__ == "__main__":
    main()
