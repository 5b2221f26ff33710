"""How fast Whispers are decoded: this project, its peers, and the bare arithmetic, in one run.

    python -m benchmarks.decoding [--shapes tiny,base,small,demo] [--rounds 5] [--threads 1]

Random weights of the released shapes, windows of 30 s and 60 forced tokens; "demo" is the demo's
teacher with its own stops. Log-mels go in, token ids and texts come out. Each round runs every
system once, in an order that moves on from round to round, after one round that is not counted. The
Markdown that it prints is what `docs/benchmarks.md` holds.
"""

import argparse
import dataclasses
import functools
import json
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
PAUSE_SECONDS = 0.2  # in which the waiting threads of one system's pool fall asleep


@dataclass(frozen=True)
class Clips:
    """What is decoded.

    Attributes:
        features: float32 [N, M, T]: log-mels, on the CPU.
        languages: code of each.
        seconds: of audio, all together.
        forced: tokens that every answer must have; None where the model stops by itself.
    """

    features: Tensor
    languages: list[str]
    seconds: float
    forced: int | None


@dataclass
class Contestant:
    """What is measured once a round.

    Attributes:
        run: decodes `clips` clips.
        answers: their token ids, those of the first run.
        wall, cpu: milliseconds per clip, one of each round; CPU time is that of all threads.
        same: share of the clips with the reference's tokens.
    """

    name: str
    kind: str
    dtype: str
    clips: int
    run: Callable[[], object]
    answers: list[list[int]] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    same: float | None = None

    @property
    def milliseconds(self) -> float:
        """The median."""
        return statistics.median(self.wall)


def main() -> int:
    """Measure and print; 1 if an answer is wrong, for then its time says nothing."""
    options = _options()
    quieten_libraries()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print("\n".join(f"- {line}" for line in machine.describe(device, options.threads)))
    print(f"- {options.rounds} rounds; medians, in brackets the least and the most", flush=True)
    complaints = []
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            complaints += _compare(shape, Path(folder), device, options)
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
    parser.add_argument("--systems", default="", help="only those whose names hold one of these")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    return parser.parse_args()


def _compare(
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
    wanted = options.systems.split(",")
    chosen = [baseline, *(s for s in others if any(part in s.name for part in wanted))]
    reference = _decode_all(baseline.load(model), clips, max(sizes))
    contestants, notes = _contestants(chosen, model, clips)
    complaints = [_check(contestant, reference, clips.forced) for contestant in contestants]
    if clips.forced:
        contestants += _bare(model, max(sizes), clips.forced)
    _measure(contestants, options.rounds, device)
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
    lines = (DEMO / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [rows[i] for i in range(0, len(rows), len(rows) // DEMO_CLIPS)][:DEMO_CLIPS]
    waveforms = [load_audio(DEMO / row["audio"]) for row in rows]
    extractor = WhisperFeatureExtractor.from_pretrained(DEMO / "teacher")
    seconds = sum(map(len, waveforms)) / SAMPLE_RATE
    return Clips(log_mel(waveforms, extractor), [row["language"] for row in rows], seconds, None)


def _decode_all(decode: Decode, clips: Clips, size: int) -> list[list[int]]:
    """Return the token ids of each clip, decoded in batches."""
    answers = []
    for start in range(0, len(clips.languages), size):
        batch = slice(start, start + size)
        answers += decode(clips.features[batch], clips.languages[batch])
    return answers


def _contestants(
    systems: Sequence[System], model: Model, clips: Clips
) -> tuple[list[Contestant], dict[str, list[str]]]:
    """Return the systems that can be run here, warmed up, and the others by the reason why not."""
    contestants: list[Contestant] = []
    notes: dict[str, list[str]] = {}
    for system in systems:
        # With forced tokens one batch is like any other; with its own stops all clips are needed.
        count = system.batch_size if clips.forced else len(clips.languages)
        part = dataclasses.replace(
            clips, features=clips.features[:count], languages=clips.languages[:count]
        )
        try:
            run = functools.partial(_decode_all, system.load(model), part, system.batch_size)
            answers = run()
        except Unavailable as reason:
            notes.setdefault(str(reason), []).append(system.name)
            continue
        contestants.append(Contestant(system.name, system.kind, system.dtype, count, run, answers))
        print(f"{system.name} is ready", file=sys.stderr)
    return contestants, notes


def _bare(model: Model, windows: int, tokens: int) -> list[Contestant]:
    """Return the bare matrix products of a batch in each dtype that the device computes in."""
    config = AutoConfig.from_pretrained(model.folder)
    found = []
    for dtype in ("float32", "bfloat16"):
        if dtype == "bfloat16" and not machine.computes_in_bfloat16(model.device):
            continue
        products = matrix_products(config, windows, tokens)
        run = bare_products(products, model.device, getattr(torch, dtype))
        name = f"{BARE} {dtype}, batch {windows}"
        found.append(Contestant(name, BARE, dtype, windows, run))
        run()
    return found


def _check(contestant: Contestant, reference: list[list[int]], forced: int | None) -> str | None:
    """Count the reference's answers among a contestant's; return what must not be, if it is."""
    answers = contestant.answers
    same = [ours == theirs for ours, theirs in zip(answers, reference, strict=False)]
    contestant.same = statistics.mean(same)
    lengths = {len(ids) for ids in answers}
    if forced and lengths != {forced}:
        return f"{contestant.name}: {sorted(lengths)} tokens instead of {forced}"
    if contestant.kind == OURS and contestant.dtype == "float32" and contestant.same < 1:
        return f"{contestant.name}: {contestant.same:.0%} of the rows as {HUGGING_FACE} says them"
    return None


def _measure(contestants: Sequence[Contestant], rounds: int, device: torch.device) -> None:
    """Run everyone once a round, each round beginning with another one."""
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
    for one in contestants:
        same = "" if one.same is None else f"{one.same:.0%}"
        print(
            f"| {one.name} | {one.milliseconds:.1f} ({min(one.wall):.1f} to {max(one.wall):.1f}) "
            f"| {statistics.median(one.cpu):.1f} | {seconds * 1000 / one.milliseconds:.0f} "
            f"| {baseline.milliseconds / one.milliseconds:.2f} | {same} |"
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
    for other in {one.name: one for one in (contestants[0], *best.values())}.values():
        ratio = other.milliseconds / ours.milliseconds
        by_cpu = statistics.median(other.cpu) / statistics.median(ours.cpu)
        print(
            f"- {ours.name}: {ratio:.2f} times as fast as {other.name} ({by_cpu:.2f} in CPU time)"
        )
    if clips.forced:
        dtype = getattr(torch, ours.dtype)
        peak = machine.peak_flops(model.device, dtype)
        config = AutoConfig.from_pretrained(model.folder)
        flops = sum(p.flops for p in matrix_products(config, 1, clips.forced))
        share = flops / (peak * ours.milliseconds / 1000)
        print(
            f"- {ours.name}: {share:.0%} of the {peak / 1e9:,.0f} GFLOP/s of one large "
            f"{ours.dtype} product ({flops / 1e9:.1f} GFLOP a window)"
        )


if __name__ == "__main__":
    sys.exit(main())
