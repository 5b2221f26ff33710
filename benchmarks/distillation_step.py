"""What an optimizer step of distillation takes in time and memory: this project and its peers.

    python -m benchmarks.distillation_step [--shapes tiny,small] [--settings short,clips,loss]

Random weights of the released shapes: the teacher whole, the student with two of its decoder
layers. Log-mels of 30 s and labels go in, updated weights come out; reading audio is not counted.
Each measurement is a process of its own, which has done a step on a short batch before, and the
ways take turns. The Markdown that it prints is what `docs/benchmarks.md` holds.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

import run_distillation
from benchmarks import machine
from benchmarks.random_whispers import END, SHAPES, Shape, write_random_whisper
from simpler_distil_whisper.config import load_config
from simpler_distil_whisper.model.devices import torch_dtype
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.processes import make_accelerator
from simpler_distil_whisper.model.pruning import prune_whisper
from simpler_distil_whisper.model.teacher_cache import CachedDecoderStates, CachedEncoderStates
from simpler_distil_whisper.model.whisper import quieten_libraries, save_whisper
from simpler_distil_whisper.run import Run
from simpler_distil_whisper.training.dataset import TrainingBatch
from simpler_distil_whisper.training.losses import IGNORE_INDEX, distillation_loss
from simpler_distil_whisper.training.options import Objective
from simpler_distil_whisper.training.plan import RunLength, Visit
from simpler_distil_whisper.training.selection import Selection

POSITIONS = 448  # of Whisper's decoder, to which distil-whisper's script pads all labels
FRAMES, STATES = 3000, 1500  # of a window of 30 s: of the log-mel and of the encoder
MIXED = Objective(cross_entropy_weight=0.8, kl_weight=1.0, temperature=2.0)  # HF's
LEARNING_RATE = 1e-5
WARM_UP = (12,)  # tokens of the batch on which every way does one step before

TWO_MODELS = "two full models"
HF_PADDED = "HF distil-whisper, labels padded to 448"
HF = "HF distil-whisper, labels padded to the longest"
OURS = "this project"
ENCODER_STATES_CACHED = "this project, encoder states from the cache"
ALL_CACHED = "this project, teacher's decoder states from the cache too"
AUDIO_CONTEXT = "this project, audio context, teacher's decoder states from the cache"
PLAIN_LOSS = "full logits"
OUR_LOSS = "this project's loss"

TOKENS_PER_SECOND = 4  # of speech, by which the lengths of clips are told

# Tokens of each utterance in a batch. "loss" is the loss alone, with its gradients.
SETTINGS = {
    "short": (20, 33, 47, 60),
    "clips": tuple(range(10, 42, 2)),
    "128": (128,) * 4,
    "448": (POSITIONS,) * 8,
    "loss": (POSITIONS,) * 8,
}
STEPS = (TWO_MODELS, HF_PADDED, HF, OURS, ENCODER_STATES_CACHED, ALL_CACHED, AUDIO_CONTEXT)
LOSSES = (PLAIN_LOSS, OUR_LOSS)


@dataclass(frozen=True)
class Batch:
    """A micro-batch that is a whole optimizer step.

    Attributes:
        features: float32 [B, M, T]: log-mels.
        labels: int64 [B, L]: IGNORE_INDEX behind the end of the shorter ones.
        encoder_states: float32 [B, E, D]: as a cache might have them.
        teacher_states: float32 [B, L, D]: the teacher's last decoder states, as a cache might have
            them.
    """

    features: Tensor
    labels: Tensor
    encoder_states: Tensor
    teacher_states: Tensor

    @property
    def inputs(self) -> Tensor:
        """The decoder's, int64 [B, L]: each label's predecessor, as transformers makes them."""
        start = self.labels.new_full((len(self.labels), 1), END + 1)
        shifted = torch.cat([start, self.labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == IGNORE_INDEX, END)


Step = Callable[[Batch], float | None]  # learns from a batch; returns its loss, if it is known


def main() -> int:
    """Measure and print; 1 if two ways that must have the same loss have not."""
    options = _options()
    quieten_libraries()
    torch.set_num_threads(options.threads)
    if options.way:
        print(json.dumps(_measure_here(options)))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine.print_facts(device, options.threads)
    wrong = []
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            write_models(Path(folder), SHAPES[shape], device)
            for setting in options.settings.split(","):
                wrong += _compare(Path(folder), shape, setting, options)
    for complaint in wrong:
        print(f"WRONG: {complaint}", file=sys.stderr)
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation_step")
    shapes = "large-v3" if gpu else "tiny,small"
    parser.add_argument("--shapes", default=shapes, help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="of these")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each way")
    parser.add_argument(
        "--steps", type=int, default=10 if gpu else 1, help="of each process; their median counts"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--ways", default="", help="only those whose names hold one of these")
    for internal in ("--way", "--folder"):
        parser.add_argument(internal, default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_models(folder: Path, shape: Shape, device: torch.device) -> None:
    """Write the folders "teacher" and "student"."""
    write_random_whisper(folder / "teacher", shape, device)
    teacher = WhisperForConditionalGeneration.from_pretrained(folder / "teacher")
    student = prune_whisper(teacher, range(shape.layers), [0, shape.layers - 1])
    (folder / "student").mkdir()
    save_whisper(student, folder / "teacher", folder / "student")


def _compare(folder: Path, shape: str, setting: str, options: argparse.Namespace) -> list[str]:
    """Measure all ways in turns, print their table and return what is wrong."""
    lengths = SETTINGS[setting]
    ways = LOSSES if setting == "loss" else STEPS
    if max(lengths) == POSITIONS:
        ways = tuple(way for way in ways if way != HF_PADDED)  # there is nothing to pad
    ways = tuple(way for way in ways if any(part in way for part in options.ways.split(",")))
    if not ways:
        return []
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(options.rounds):
        first = number * len(ways) // options.rounds
        for way in (*ways[first:], *ways[:first]):
            measured[way].append(_measure_apart(folder, shape, setting, way, options))
            print(f"{shape} {setting} {way}: {measured[way][-1]}", file=sys.stderr, flush=True)
    _print_table(f"{shape}, {_in_words(setting)}", measured)
    losses = {way: rounds[0]["loss"] for way, rounds in measured.items() if "loss" in rounds[0]}
    expected = next(iter(losses.values()), 0.0)
    return [
        f"{shape}, {setting}: the loss of {way} is {loss}, not {expected}"
        for way, loss in losses.items()
        if abs(loss - expected) > 1e-2 * abs(expected)
    ]


def _in_words(setting: str) -> str:
    lengths = SETTINGS[setting]
    tokens = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else lengths[0]
    what = "the loss of " if setting == "loss" else ""
    return f"{what}{len(lengths)} utterances of {tokens} tokens"


def _print_table(title: str, measured: dict[str, list[dict[str, float]]]) -> None:
    baseline = next(way for way in (HF_PADDED, HF, *measured) if way in measured)
    clock = "wall" if torch.cuda.is_available() else "cpu"
    middle = {
        way: {key: statistics.median(numbers[key] for numbers in rounds) for key in rounds[0]}
        for way, rounds in measured.items()
    }
    print(f"\n### {title}\n")
    print("| way | CPU s a step | s on the clock | times as fast | MB above the models | share |")
    print("|---|---|---|---|---|---|")
    for way, own in middle.items():
        cpu, wall = (
            _with_range([numbers[key] for numbers in measured[way]]) for key in ("cpu", "wall")
        )
        print(
            f"| {way} | {cpu} | {wall} | {middle[baseline][clock] / own[clock]:.2f} "
            f"| {own['peak']:.0f} | {own['peak'] / middle[baseline]['peak']:.2f} |"
        )
    by = "on the clock" if clock == "wall" else "in CPU time"
    print(f"\ntimes as fast, {by}, and share: of {baseline}", flush=True)


def _with_range(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):.2f}"
    return f"{middle} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else middle


# Each measurement in a process of its own


def _measure_apart(
    folder: Path, shape: str, setting: str, way: str, options: argparse.Namespace
) -> dict[str, float]:
    """Return the result of `_measure_here` in a new process."""
    numbers = {"--threads": options.threads, "--steps": options.steps}
    words = {"--shapes": shape, "--settings": setting, "--way": way, "--folder": folder}
    arguments = [str(each) for pair in (numbers | words).items() for each in pair]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.distillation_step", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        stdout=subprocess.PIPE,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure_here(options: argparse.Namespace) -> dict[str, float]:
    """Return seconds a step, peak MB and, if it is known, the loss of the warm-up batch."""
    shape = SHAPES[options.shapes]
    device = make_accelerator("auto", 0).device
    step = _make_step(options.way, Path(options.folder))
    loss = step(_random_batch(WARM_UP, shape, device))
    batch = _random_batch(SETTINGS[options.settings], shape, device)
    before = _start_of_peak(device)
    walls, cpus = [], []
    for _ in range(options.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        step(batch)
        machine.synchronize(device)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    peak = _peak(device) - before
    measured = {"cpu": statistics.median(cpus), "wall": statistics.median(walls), "peak": peak}
    return measured if loss is None else {**measured, "loss": loss}


def _random_batch(lengths: Sequence[int], shape: Shape, device: torch.device) -> Batch:
    random = torch.Generator().manual_seed(0)
    rows, longest = len(lengths), max(lengths)
    labels = torch.full((rows, longest), IGNORE_INDEX)
    for row, length in enumerate(lengths):
        labels[row, :length] = torch.randint(0, 50_000, (length,), generator=random)
    features, encoder_states, teacher_states = (
        torch.randn(rows, *size, generator=random).to(device)
        for size in ((shape.mels, FRAMES), (STATES, shape.width), (longest, shape.width))
    )
    return Batch(features * 0.5, labels.to(device), encoder_states, teacher_states)


def _start_of_peak(device: torch.device) -> float:
    """Return the MB that are held now, and forget the peak so far."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # else what the warm-up has given back would count as held
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _status("VmHWM")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


# The ways


def _make_step(way: str, folder: Path) -> Step:
    if way in (TWO_MODELS, HF, HF_PADDED):
        return _full_logits(folder, way != TWO_MODELS, POSITIONS if way == HF_PADDED else None)
    if way in LOSSES:
        return _loss_alone(folder, plain=way == PLAIN_LOSS)
    return _this_project(
        folder,
        encoder_states_cached=way in (ENCODER_STATES_CACHED, ALL_CACHED),
        decoder_states_cached=way in (ALL_CACHED, AUDIO_CONTEXT),
        audio_context=way == AUDIO_CONTEXT,
    )


def _full_logits(folder: Path, shared_encoder: bool, padded_to: int | None) -> Step:
    """Both models run whole, as transformers loads them.

    Args:
        folder: of the models.
        shared_encoder: as in distil-whisper's `run_distillation.py`: the student's encoder is
            frozen and serves both. Else each encodes the audio, and all of the student is trained.
        padded_to: how many labels each row is given; None: as many as the longest.
    """
    accelerator = make_accelerator("auto", 0)
    teacher, student = _load_both(folder, accelerator.device)
    if shared_encoder:
        student.model.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    teacher, student, optimizer = accelerator.prepare(teacher, student, optimizer)

    def step(batch: Batch) -> float:
        more = (padded_to or batch.labels.shape[1]) - batch.labels.shape[1]
        labels = functional.pad(batch.labels, (0, more), value=IGNORE_INDEX)
        own = student(input_features=batch.features, labels=labels)
        given = {"input_features": batch.features}
        if shared_encoder:
            encoded = own.encoder_last_hidden_state.to(teacher.dtype)
            given = {"encoder_outputs": BaseModelOutput(encoded)}
        with torch.no_grad():
            predicted = teacher(**given, labels=labels)
        loss = plain_loss(own.loss, own.logits, predicted.logits, labels)
        accelerator.backward(loss)
        if shared_encoder:
            accelerator.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _load_both(
    folder: Path, device: torch.device
) -> tuple[WhisperForConditionalGeneration, WhisperForConditionalGeneration]:
    """Return the teacher and the student that trains, as transformers loads them."""
    teacher = WhisperForConditionalGeneration.from_pretrained(
        folder / "teacher", dtype=torch_dtype("auto", device)
    )
    student = WhisperForConditionalGeneration.from_pretrained(
        folder / "student", dtype=torch.float32
    )
    return teacher.to(device).eval().requires_grad_(False), student.to(device).train()


def plain_loss(
    cross_entropy: Tensor, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
) -> Tensor:
    """Return the mean loss from full logits [B, L, V], in as many operations as distil-whisper."""
    temperature = MIXED.temperature
    target = (teacher_logits / temperature).softmax(-1)
    divergence = nn.KLDivLoss(reduction="none")(
        (student_logits / temperature).log_softmax(-1), target
    )
    real = (labels >= 0).unsqueeze(-1)
    kl = (divergence * real).sum() / real.sum() * temperature**2
    return MIXED.cross_entropy_weight * cross_entropy + MIXED.kl_weight * kl


def _loss_alone(folder: Path, plain: bool) -> Step:
    """The loss of random states under the teacher's head, and its gradients."""
    accelerator = make_accelerator("auto", 0)
    head = _load_both(folder, accelerator.device)[0].proj_out.weight.detach().float()
    learnt = head.clone().requires_grad_()

    def step(batch: Batch) -> float:
        states = batch.teacher_states.requires_grad_()
        teacher_states = batch.encoder_states[:, : states.shape[1]]  # any random ones will do
        with accelerator.autocast():
            if plain:
                logits = functional.linear(states, learnt)
                with torch.no_grad():
                    teacher_logits = functional.linear(teacher_states, head)
                labels = batch.labels.flatten()
                cross_entropy = functional.cross_entropy(logits.flatten(0, 1), labels)
                loss = plain_loss(cross_entropy, logits, teacher_logits, batch.labels)
            else:
                terms = distillation_loss(states, learnt, teacher_states, head, batch.labels, MIXED)
                loss = terms.loss / terms.tokens
        loss.backward()
        learnt.grad = states.grad = None
        return loss.item()

    return step


def _this_project(
    folder: Path, encoder_states_cached: bool, decoder_states_cached: bool, audio_context: bool
) -> Step:
    """The training loop's own step, from the assembled trainer of `run_distillation.py`."""
    path = folder / f"{os.getpid()}.json"
    output = folder / str(os.getpid())
    cached = encoder_states_cached or decoder_states_cached
    cache = {"folder": str(output / "cache") if cached else None}
    config = {
        "output_dir": str(output),
        "teacher": {"path": str(folder / "teacher")},
        "student": {"path": str(folder / "student")},
        "data": {"train_manifests": ["none"]},
        "schedule": {"max_steps": 1000, "epochs": None},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "objective": MIXED.model_dump(),
        "teacher_cache": {**cache, "decoder_states": decoder_states_cached},
        "logging": {"tensorboard": False},
        "freeze": {"encoder": not audio_context},
        "audio_context": {"enabled": audio_context},
    }
    path.write_text(json.dumps(config))
    checked = load_config(path, run_distillation.Config)
    teacher = read_model_folder(folder / "teacher", None, "teacher")
    student = read_model_folder(folder / "student", None, "student")
    nothing = Selection([], [], {"kept": {"rows": 0, "hours": 0.0}}, None)
    prepared = run_distillation.Prepared(
        teacher, student, nothing, None, RunLength(1, 1000, 0, 1000)
    )
    run = Run("run_distillation", path, checked)
    trainer, steps = run_distillation.assemble(checked, prepared, run)

    def step(batch: Batch) -> float | None:
        given = TrainingBatch(batch.features, batch.inputs, batch.labels, 0.0, [])
        if encoder_states_cached:
            kept = CachedEncoderStates(batch.encoder_states, {})
            given = replace(given, input_features=batch.features[:0], cached_encoder_states=kept)
        if decoder_states_cached:
            rows, length = batch.labels.shape
            lengths = [length] * rows
            given = replace(
                given,
                cached_decoder_states=CachedDecoderStates(batch.teacher_states, lengths, {}),
            )
        if steps.contexts:
            lengths = (batch.labels != IGNORE_INDEX).sum(1).tolist()
            drawn = [
                steps.contexts.positions(Visit(0, row, 0), tokens / TOKENS_PER_SECOND)
                for row, tokens in enumerate(lengths)
            ]
            given = replace(given, positions=drawn)
        loss = None
        if not (encoder_states_cached or decoder_states_cached) and len(batch.labels) == len(
            WARM_UP
        ):
            with torch.no_grad():
                terms = trainer.models.loss_terms(given)
            loss = (terms.loss / terms.tokens).item()
        trainer.train_step([given], LEARNING_RATE)
        return loss

    return step


if __name__ == "__main__":
    sys.exit(main())
