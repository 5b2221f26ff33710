"""How fast Whispers are decoded: this project, its peers, and the bare arithmetic, in one run.

    python -m benchmarks.decoding [--shapes tiny,base,small,demo] [--rounds 5] [--threads 1]

Random weights of the released shapes, windows of 30 s and 60 forced tokens; "demo" is the demo's
teacher, which ends its texts itself. Log-mels go in, token ids and texts come out. Each round runs
every system once, beginning with another one each time, after a round that is not counted. It
prints the Markdown of `docs/benchmarks.md`.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, WhisperFeatureExtractor

from benchmarks import machine
from benchmarks.clips import spread_utterances
from benchmarks.floor import bare_products, matrix_products
from benchmarks.random_whispers import SHAPES, write_random_whisper
from benchmarks.systems import (
    HUGGING_FACE,
    OURS,
    Decode,
    Model,
    System,
    Unavailable,
    all_systems,
)
from simpler_distil_whisper.data.audio import SAMPLE_RATE, load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.model.whisper import quieten_libraries

TOKENS = 60
WINDOW_SECONDS = 30.0
DEMO = Path("demo_data")
DEMO_CLIPS = 100
DEMO_TOKENS = 64  # no clip of the demo has as many
BARE = "bare matrix products"
PAUSE_SECONDS = 0.2  # for the waiting threads of the last system's pool to fall asleep


@dataclass(frozen=True)
class Clips:
    """The audio to decode.

    Attributes:
        features: float32 [N, M, T]: log-mels, on the CPU.
        languages: code of each clip.
        seconds: of all clips together.
        forced: how many tokens every clip must have; None: the model ends the texts itself.
    """

    features: Tensor
    languages: list[str]
    seconds: float
    forced: int | None


@dataclass
class Contestant:
    """A system, or the bare arithmetic, with its measurements.

    Attributes:
        run: decodes `clips` clips.
        tokens: token ids of each clip, from the first run.
        wall: milliseconds per clip, of each round.
        cpu: the same in CPU time of all threads.
        same: share of the clips with the reference's tokens.
    """

    name: str
    kind: str
    dtype: str
    clips: int
    run: Callable[[], object]
    tokens: list[list[int]] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    same: float | None = None

    @property
    def milliseconds(self) -> float:
        """The median of the wall times."""
        return statistics.median(self.wall)


def main() -> int:
    """Measure and print; return 1 if tokens are wrong, which makes their time meaningless."""
    options = _options()
    quieten_libraries()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    machine.print_facts(device, options.threads)
    print(f"- {options.rounds} rounds; medians, in brackets the least and the most", flush=True)
    complaints = []
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            complaints += _measure_shape(shape, Path(folder), device, options)
    for complaint in complaints:
        print(f"WRONG: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


def _options() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding")
    known = ", ".join([*SHAPES, "demo"])
    shapes = "large-v3" if gpu else "tiny,base,small,demo"
    parser.add_argument("--shapes", default=shapes, help=f"of {known}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--batches", default="16,64" if gpu else "1,8,16", help="batch sizes")
    parser.add_argument("--systems", default="", help="only those whose names contain one of these")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    return parser.parse_args()


def _measure_shape(
    shape: str, folder: Path, device: torch.device, options: argparse.Namespace
) -> list[str]:
    """Measure all systems at one shape, print their table and return what is wrong."""
    sizes = [int(size) for size in options.batches.split(",")]
    if shape == "demo":
        clips, folder = _demo_clips(), DEMO / "teacher"
    else:
        clips = _random_clips(shape, folder, max(sizes), device)
    model = Model(folder, device, clips.forced or DEMO_TOKENS, options.threads)
    baseline, *others = all_systems(device, sizes)
    parts = options.systems.split(",")
    chosen = [baseline, *(s for s in others if any(part in s.name for part in parts))]
    reference = _decode_all(baseline.load(model), clips, max(sizes))
    contestants, notes = _contestants(chosen, model, clips)
    complaints = [_check(contestant, reference, clips.forced) for contestant in contestants]
    if clips.forced:
        contestants += _bare_contestants(model, max(sizes), clips.forced)
    measure_rounds(contestants, options.rounds, device)
    _print_table(shape, clips, contestants)
    _print_ratios(contestants, model, clips)
    for reason, names in notes.items():
        print(f"- not measured: {'; '.join(names)}: {reason}", flush=True)
    return [f"{shape}: {complaint}" for complaint in complaints if complaint]


def _random_clips(shape: str, folder: Path, count: int, device: torch.device) -> Clips:
    write_random_whisper(folder, SHAPES[shape], device)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, SHAPES[shape].mels, 3000, generator=generator) * 0.5
    return Clips(features, ["en"] * count, WINDOW_SECONDS * count, TOKENS)


def _demo_clips() -> Clips:
    """Return clips of both languages, alternating, and so of different lengths in each batch."""
    utterances = spread_utterances(DEMO / "test.jsonl", DEMO_CLIPS)
    waveforms = [load_audio(*utterance.clip) for utterance in utterances]
    extractor = WhisperFeatureExtractor.from_pretrained(DEMO / "teacher")
    seconds = sum(map(len, waveforms)) / SAMPLE_RATE
    languages = [utterance.language or "" for utterance in utterances]
    return Clips(log_mel(waveforms, extractor), languages, seconds, None)


def _decode_all(decode: Decode, clips: Clips, size: int) -> list[list[int]]:
    """Return the token ids of each clip, decoded in batches."""
    tokens = []
    for start in range(0, len(clips.languages), size):
        batch = slice(start, start + size)
        tokens += decode(clips.features[batch], clips.languages[batch])
    return tokens


def _contestants(
    systems: Sequence[System], model: Model, clips: Clips
) -> tuple[list[Contestant], dict[str, list[str]]]:
    """Return the systems that can be run here, warmed up, and the others by the reason why not."""
    contestants: list[Contestant] = []
    notes: dict[str, list[str]] = {}
    for system in systems:
        # With forced tokens all batches cost the same; otherwise all clips are needed.
        count = system.batch_size if clips.forced else len(clips.languages)
        part = dataclasses.replace(
            clips, features=clips.features[:count], languages=clips.languages[:count]
        )
        try:
            run = functools.partial(_decode_all, system.load(model), part, system.batch_size)
            tokens = run()
        except Unavailable as reason:
            notes.setdefault(str(reason), []).append(system.name)
            continue
        contestants.append(Contestant(system.name, system.kind, system.dtype, count, run, tokens))
        print(f"{system.name} is ready", file=sys.stderr)
    return contestants, notes


def _bare_contestants(model: Model, windows: int, tokens: int) -> list[Contestant]:
    """Return the bare matrix products of a batch in each dtype that the device computes in."""
    config = AutoConfig.from_pretrained(model.folder)
    contestants = []
    for dtype in ("float32", "bfloat16"):
        if dtype == "bfloat16" and not machine.computes_in_bfloat16(model.device):
            continue
        products = matrix_products(config, windows, tokens)
        run = bare_products(products, model.device, getattr(torch, dtype))
        name = f"{BARE} {dtype}, batch {windows}"
        contestants.append(Contestant(name, BARE, dtype, windows, run))
        run()
    return contestants


def _check(contestant: Contestant, reference: list[list[int]], forced: int | None) -> str | None:
    """Compare a contestant's tokens with the reference's; return what is wrong, if anything is."""
    same = [ours == theirs for ours, theirs in zip(contestant.tokens, reference, strict=False)]
    contestant.same = statistics.mean(same)
    lengths = {len(ids) for ids in contestant.tokens}
    if forced and lengths != {forced}:
        return f"{contestant.name}: {sorted(lengths)} tokens instead of {forced}"
    if contestant.kind == OURS and contestant.dtype == "float32" and contestant.same < 1:
        return f"{contestant.name}: {contestant.same:.0%} of the rows as by {HUGGING_FACE}"
    return None


def measure_rounds(contestants: Sequence[Contestant], rounds: int, device: torch.device) -> None:
    """Run every contestant once a round, beginning with another one each time."""
    for number in range(rounds):
        first = number * len(contestants) // rounds
        for contestant in [*contestants[first:], *contestants[:first]]:
            time.sleep(PAUSE_SECONDS)
            machine.synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            contestant.run()
            machine.synchronize(device)
            contestant.wall.append((time.perf_counter() - wall) * 1000 / contestant.clips)
            contestant.cpu.append((time.process_time() - cpu) * 1000 / contestant.clips)


def _print_table(shape: str, clips: Clips, contestants: Sequence[Contestant]) -> None:
    baseline = contestants[0]
    seconds = clips.seconds / len(clips.languages)
    what = f"{clips.forced} forced tokens" if clips.forced else "their own stops"
    print(f"\n### {shape}: clips of {seconds:.1f} s, {what}\n")
    print("| system | ms a clip | CPU ms | times real time | ratio | same rows |")
    print("|---|---|---|---|---|---|")
    for row in contestants:
        same = "" if row.same is None else f"{row.same:.0%}"
        print(
            f"| {row.name} | {row.milliseconds:.1f} ({min(row.wall):.1f} to {max(row.wall):.1f}) "
            f"| {statistics.median(row.cpu):.1f} | {seconds * 1000 / row.milliseconds:.0f} "
            f"| {baseline.milliseconds / row.milliseconds:.2f} | {same} |"
        )
    print(f"\nratio: to {baseline.name}; same rows: with the tokens of {HUGGING_FACE}\n")


def _print_ratios(contestants: Sequence[Contestant], model: Model, clips: Clips) -> None:
    """Print how the fastest setting of this decoder compares with the fastest of the others."""
    kinds = dict.fromkeys(contestant.kind for contestant in contestants)
    best = {
        kind: min((c for c in contestants if c.kind == kind), key=lambda c: c.milliseconds)
        for kind in kinds
    }
    ours = best.pop(OURS, None)
    if ours is None:
        return
    others = {other.name: other for other in (contestants[0], *best.values())}
    for other in others.values():
        ratio = other.milliseconds / ours.milliseconds
        by_cpu = statistics.median(other.cpu) / statistics.median(ours.cpu)
        print(
            f"- {ours.name}: {ratio:.2f} times as fast as {other.name} ({by_cpu:.2f} in CPU time)"
        )
    # torch has no fast product of int8, so there is no peak to compare with.
    floats = [c for c in contestants if c.kind == OURS and c.dtype != "int8"]
    if clips.forced and floats:
        ours = min(floats, key=lambda c: c.milliseconds)
        peak = machine.peak_flops(model.device, getattr(torch, ours.dtype))
        config = AutoConfig.from_pretrained(model.folder)
        flops = sum(p.flops for p in matrix_products(config, 1, clips.forced))
        share = flops / (peak * ours.milliseconds / 1000)
        print(
            f"- {ours.name}: {share:.0%} of the {peak / 1e9:,.0f} GFLOP/s of one large "
            f"{ours.dtype} product ({flops / 1e9:.1f} GFLOP a window)"
        )


if __name__ == "__main__":
    sys.exit(main())
