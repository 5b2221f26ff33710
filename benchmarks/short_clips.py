"""What a clip costs by its length: a student that was trained for short clips, beside its peers.

    python -m benchmarks.short_clips --student FOLDER --teacher FOLDER --manifest test.jsonl

Real weights and real clips, decoded greedily with the language given. This project's decoder gives
the student's encoder the clip alone, and so does CTranslate2 by the lines of docs/audio-context.md;
every other system pads it to the whole window. Log-mels go in, token ids come out. The first table
has the clips as they are, the second one joined clips that are cut to some lengths, which `--plot`
draws. Processor time of all threads: other load on the machine disturbs it least.
"""

import argparse
import copy
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoConfig, WhisperFeatureExtractor

from benchmarks import machine
from benchmarks.clips import existing, spread_utterances
from benchmarks.decoding import Contestant, measure_rounds
from benchmarks.floor import bare_products, matrix_products
from benchmarks.systems import (
    CTRANSLATE2,
    OURS,
    Decode,
    Model,
    System,
    Unavailable,
    all_systems,
)
from simpler_distil_whisper.data.audio import SAMPLE_RATE, load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.folder_check import FRAMES_PER_POSITION
from simpler_distil_whisper.model.options import DecodingDtype, DecodingOptions
from simpler_distil_whisper.model.whisper import load_whisper, quieten_libraries

BATCH_SIZE = 16
ROWS_OF_A_LENGTH = 2
ALONE = "the clip alone"
BARE = f"bare matrix products float32, {ALONE}"
CPU = torch.device("cpu")


class Batch(NamedTuple):
    """Clips of one language, about equally long.

    Attributes:
        features: float32 [B, M, T]: log-mels of whole windows.
        languages: their code, B times.
        seconds: the length of each clip.
    """

    features: Tensor
    languages: list[str]
    seconds: list[float]


def main() -> None:
    """Measure, print Markdown, draw."""
    options = _options()
    quieten_libraries()
    torch.set_num_threads(options.threads)
    machine.print_facts(CPU, options.threads)
    print(f"- {options.rounds} rounds, medians; batches of {BATCH_SIZE}", flush=True)
    waveforms = _read_clips(options.manifest, options.clips)
    extractor = WhisperFeatureExtractor.from_pretrained(options.student)
    batches = [
        _batch(clips[start : start + BATCH_SIZE], language, extractor)
        for language, clips in waveforms.items()
        for start in range(0, len(clips), BATCH_SIZE)
    ]
    contestants = _contestants(options, batches)
    measure_rounds(contestants, options.rounds, CPU)
    _print_clips(contestants, batches)
    if options.seconds:
        _measure_lengths(options, waveforms, extractor)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.short_clips")
    parser.add_argument(
        "--student", type=existing, required=True, help="trained with audio_context"
    )
    parser.add_argument("--teacher", type=existing, required=True)
    parser.add_argument("--manifest", type=existing, required=True, help="real clips")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", default="1,2,5,10,15,20,25,30", help='lengths; "": none')
    parser.add_argument("--plot", type=Path, help="a PNG or SVG of the cost by length")
    return parser.parse_args()


def _read_clips(manifest: Path, count: int) -> dict[str, list[np.ndarray]]:
    """Return about `count` waveforms, evenly chosen, by language, the shortest first."""
    waveforms: dict[str, list[np.ndarray]] = {}
    for utterance in spread_utterances(manifest, count):
        waveform = load_audio(*utterance.clip)
        waveforms.setdefault(utterance.language or "", []).append(waveform)
    return {code: sorted(clips, key=len) for code, clips in waveforms.items()}


def _batch(
    waveforms: Sequence[np.ndarray], language: str, extractor: WhisperFeatureExtractor
) -> Batch:
    seconds = [len(waveform) / SAMPLE_RATE for waveform in waveforms]
    return Batch(log_mel(waveforms, extractor), [language] * len(waveforms), seconds)


def _contestants(
    options: argparse.Namespace, batches: Sequence[Batch], kinds: Sequence[str] = ()
) -> list[Contestant]:
    """Return systems with the student and with the teacher, warmed up; ours comes first.

    Args:
        options: of the command.
        batches: what is decoded.
        kinds: of the systems; empty: all.
    """
    transcribers = {dtype: _transcriber(options, dtype) for dtype in ("float32", "int8")}
    runs: dict[str, Callable[[], list[list[int]]]] = {
        f"student: {OURS} {dtype}, {ALONE}": functools.partial(_decode_short, transcriber, batches)
        for dtype, transcriber in transcribers.items()
    }
    for role, folder in (("student", options.student), ("teacher", options.teacher)):
        for system in _padding_systems(kinds):
            try:
                decode = system.load(Model(folder, CPU, 224, options.threads))
            except Unavailable as reason:
                print(f"- not measured: {system.name}: {reason}")
                continue
            runs[f"{role}: {system.name}"] = functools.partial(_decode_as_given, decode, batches)
            if role == "student" and system.kind == CTRANSLATE2:
                groups = _by_positions(batches, transcribers["float32"])
                name = f"{role}: {system.name}, {ALONE}"
                runs[name] = functools.partial(_decode_as_given, decode, groups)
    count = sum(len(batch.seconds) for batch in batches)
    contestants = []
    for name, run in runs.items():
        contestants.append(Contestant(name, name, "", count, run, run()))
        print(f"{name} is ready", file=sys.stderr)
    return contestants


def _transcriber(options: argparse.Namespace, dtype: DecodingDtype) -> Transcriber:
    folder = read_model_folder(options.student, None, "student")
    whisper = load_whisper(folder, dtype, "auto", CPU)
    decoding = DecodingOptions(batch_size=BATCH_SIZE)
    return Transcriber(whisper, decoding, audio_context=whisper.audio_context)


def _padding_systems(kinds: Sequence[str]) -> list[System]:
    return [
        system
        for system in all_systems(CPU, (BATCH_SIZE,))
        if system.batch_size == BATCH_SIZE
        and system.dtype in ("float32", "int8")
        and system.setting != "eager"
        and (not kinds or system.kind in kinds)
    ]


def _by_positions(batches: Sequence[Batch], transcriber: Transcriber) -> list[Batch]:
    """Return batches of clips with as many encoder positions, their log-mels as long as that."""
    groups: dict[tuple[str, int], list[tuple[Tensor, float]]] = {}
    for features, languages, seconds in batches:
        for row, length in enumerate(seconds):
            positions = transcriber.encoder_positions(length)
            clip = features[row, :, : FRAMES_PER_POSITION * positions]
            groups.setdefault((languages[row], positions), []).append((clip, length))
    return [
        Batch(torch.stack([clip for clip, _ in clips]), [code] * len(clips), [s for _, s in clips])
        for (code, _), clips in groups.items()
    ]


def _decode_as_given(decode: Decode, batches: Sequence[Batch]) -> list[list[int]]:
    """Return the token ids of each clip, whose encoder is given all of its log-mel."""
    return [ids for batch in batches for ids in decode(batch.features, batch.languages)]


def _decode_short(transcriber: Transcriber, batches: Sequence[Batch]) -> list[list[int]]:
    """Return the token ids of each clip, whose encoder is given the clip alone."""
    tokens: list[list[int]] = []
    for features, languages, seconds in batches:
        states = transcriber.encode(features, [transcriber.encoder_positions(s) for s in seconds])
        hypotheses = transcriber.from_encoder_states(states, languages)
        tokens += [list(hypothesis.token_ids) for hypothesis in hypotheses]
    return tokens


def _print_clips(contestants: Sequence[Contestant], batches: Sequence[Batch]) -> None:
    seconds = [length for batch in batches for length in batch.seconds]
    mean = statistics.mean(seconds)
    print(f"\n### {len(seconds)} clips of {min(seconds):.1f} to {max(seconds):.1f} s", end="")
    print(f", {mean:.1f} s on average\n")
    print("| system | CPU ms a clip | times real time | tokens a clip | ratio |")
    print("|---|---|---|---|---|")
    first = statistics.median(contestants[0].cpu)
    for row in contestants:
        cost = statistics.median(row.cpu)
        tokens = statistics.mean(map(len, row.tokens))
        print(
            f"| {row.name} | {cost:.0f} ({min(row.cpu):.0f} to {max(row.cpu):.0f}) "
            f"| {mean * 1000 / cost:.1f} | {tokens:.1f} | {cost / first:.2f} |"
        )
    print("\nratio: of the processor time to that of the first row", flush=True)


def _measure_lengths(
    options: argparse.Namespace,
    waveforms: dict[str, list[np.ndarray]],
    extractor: WhisperFeatureExtractor,
) -> None:
    """Print and draw the processor time of a clip by its length."""
    lengths = [float(part) for part in options.seconds.split(",")]
    language, clips = max(waveforms.items(), key=lambda pair: len(pair[1]))
    speech = np.concatenate(clips)
    costs: dict[str, list[float]] = {}
    for seconds in lengths:
        samples = int(seconds * SAMPLE_RATE)
        starts = [row * len(speech) // ROWS_OF_A_LENGTH for row in range(ROWS_OF_A_LENGTH)]
        cut = [np.roll(speech, -start)[:samples] for start in starts]
        batch = _batch(cut, language, extractor)
        contestants = _contestants(options, [batch], (OURS, CTRANSLATE2))
        contestants.append(_floor(contestants[0], options.student, seconds))
        measure_rounds(contestants, options.rounds, CPU)
        for contestant in contestants:
            costs.setdefault(contestant.name, []).append(statistics.median(contestant.cpu))
    print("\n| CPU ms of a clip of | " + " | ".join(f"{s:g} s" for s in lengths) + " |")
    print("|---|" + "---|" * len(lengths))
    for name, each in costs.items():
        print(f"| {name} | " + " | ".join(f"{cost:.0f}" for cost in each) + " |", flush=True)
    if options.plot:
        _draw(lengths, costs, options.plot)


def _floor(short: Contestant, folder: Path, seconds: float) -> Contestant:
    """Return the products that the first contestant cannot do without, at its positions."""
    config = copy.copy(AutoConfig.from_pretrained(folder))
    config.max_source_positions = min(round(seconds * 50), config.max_source_positions)
    tokens = max(2, round(statistics.mean(map(len, short.tokens))))
    run = bare_products(matrix_products(config, ROWS_OF_A_LENGTH, tokens), CPU, torch.float32)
    run()
    return Contestant(f"student: {BARE}", BARE, "", ROWS_OF_A_LENGTH, run)


def _draw(lengths: Sequence[float], costs: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.add_subplot()
    engines: list[str] = []
    for name, each in costs.items():
        role, _, system = name.partition(": ")
        engine = system.removesuffix(f", {ALONE}").removesuffix(f", batch {BATCH_SIZE}")
        engines += [engine] if engine not in engines else []
        style = "--" if role == "teacher" else ":" if BARE in name else "-"
        style += f"C{engines.index(engine)}"
        width = 2.5 if ALONE in name else 1.2
        axes.plot(lengths, each, style, marker="o", linewidth=width, label=name)
    axes.set(xlabel="seconds of audio", ylabel="milliseconds of processor time", ylim=(0, None))
    axes.set_title("What a clip costs by its length")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
