"""One look at a GPU: does it compute what the CPU does, how fast, and what holds it up.

    python -m benchmarks.gpu [--device cuda] [--stages tokens,loss] [--out gpu.json]

Takes at most eight minutes. Each stage runs in a process of its own, which ends when its time is
up; what it had by then is kept. A stage that fails is noted, and the next one runs. The JSON file
is written anew after each. Runs that have been looked at are deleted, since the disk may be small.
With `--device cpu` all stages run at the size of a toy, to try them out.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState

import run_distillation
import run_pseudo_labelling
from benchmarks import machine
from benchmarks.clips import write_noise
from benchmarks.distillation_step import FRAMES, MIXED, write_models
from benchmarks.random_whispers import SHAPES, Shape
from simpler_distil_whisper.atomic import write_atomically
from simpler_distil_whisper.decoding.cached_decoder import CachedDecoder, KeyValueCache
from simpler_distil_whisper.decoding.recorded_steps import MOST_ROWS, RecordingDecoder
from simpler_distil_whisper.decoding.speculative import Assistant
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.processes import join_processes
from simpler_distil_whisper.model.whisper import Whisper, load_whisper
from simpler_distil_whisper.script import run_script
from simpler_distil_whisper.training.log import read_metrics
from simpler_distil_whisper.training.losses import distillation_loss, token_terms
from simpler_distil_whisper.training.trainer import Trainer

Result = dict[str, Any]
Stage = Callable[["Setting"], Iterator[Result]]  # each part of the result as soon as it is there
DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "temperatures": {"temperatures": [0.8]},
    "loops": {"temperatures": [0.0, 0.8], "repetition_threshold": 1},
    "timestamps": {"timestamps": True},
    "drafts": {},
}


@dataclass(frozen=True)
class Setting:
    """What the stages measure.

    Attributes:
        folder: of models, clips and runs.
        shape: of the models whose speed is measured.
        compared: of the models whose results are compared with the CPU's.
        clips: that are labelled.
    """

    folder: Path
    device: torch.device
    shape: Shape
    compared: Shape
    clips: int
    rows: tuple[int, ...]
    workers: tuple[int, ...]
    micro_batches: tuple[int, ...]
    precisions: tuple[str, ...]
    max_steps: int


def on_gpu(folder: Path) -> Setting:
    """Return the sizes that a GPU is measured with."""
    return Setting(
        folder,
        torch.device("cuda"),
        SHAPES["large-v3"],
        SHAPES["tiny"],
        clips=2000,
        rows=(1, 16, 64, 188),
        workers=(1, 8),
        micro_batches=(4, 16, 64),
        precisions=("bf16", "fp16"),
        max_steps=6,
    )


def on_cpu(folder: Path) -> Setting:
    """Return sizes with which all stages take seconds."""
    toy = Shape(32, 2, 2)
    return Setting(
        folder,
        torch.device("cpu"),
        toy,
        toy,
        clips=4,
        rows=(1, 2),
        workers=(0, 1),
        micro_batches=(2,),
        precisions=("bf16",),
        max_steps=3,
    )


# The stages


def versions(setting: Setting) -> Iterator[Result]:
    """Versions, and which kernels of attention torch may choose."""
    facts: Result = {"machine": machine.machine_facts(setting.device, torch.get_num_threads())}
    cuda = torch.backends.cuda
    facts["attention"] = {
        "flash": cuda.flash_sdp_enabled(),
        "memory_efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    facts["cudnn"] = torch.backends.cudnn.version()
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        facts["memory_gigabytes"] = round(properties.total_memory / 2**30, 1)
        facts["capability"] = [properties.major, properties.minor]
    yield facts


def models(setting: Setting) -> Iterator[Result]:
    """Write the models and the clips of all other stages."""
    for name, shape in (("", setting.shape), ("compared", setting.compared)):
        write_models(setting.folder / name, shape, setting.device)
    # 200 files are decoded again and again.
    files = write_noise(setting.folder, [1 + n % 15 for n in range(min(200, setting.clips))])
    rows = []
    for number in range(setting.clips):
        name = files[number % len(files)].name
        text = f" w{300 + number} w{400 + number}" * 8
        rows.append({"id": str(number), "audio": name, "text": text, "language": "en"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (setting.folder / "clips.jsonl").write_text(lines)
    yield {"clips": len(rows)}


def tokens(setting: Setting) -> Iterator[Result]:
    """Compare the tokens that the device and the CPU choose, in float32."""
    features = torch.randn(
        4, setting.compared.mels, FRAMES, generator=torch.Generator().manual_seed(0)
    )
    for name, options in DECODINGS.items():
        texts = []
        for device in (torch.device("cpu"), setting.device):
            transcribe = _transcriber(setting, device, options, drafts=name == "drafts")
            hypotheses = transcribe(features.to(device), ["en"] * 4, keys=range(4))
            texts.append([hypothesis.text for hypothesis in hypotheses])
        equal = [one == other for one, other in zip(*texts, strict=True)]
        yield {name: {"equal": sum(equal), "of": len(equal)}}


def loss(setting: Setting) -> Iterator[Result]:
    """Compare the loss and its gradient with the formula in float64."""
    random = torch.Generator().manual_seed(0)
    width = setting.compared.width
    states, teacher = (torch.randn(2, 40, width, generator=random) for _ in range(2))
    head = torch.randn(setting.compared.vocabulary, width, generator=random) / width**0.5
    labels = torch.randint(0, 50_000, (2, 40), generator=random)
    exact_states = states.double().flatten(0, 1).requires_grad_()
    log_probs = torch.log_softmax(
        teacher.double().flatten(0, 1) @ head.double().T / MIXED.temperature, -1
    )
    exact = token_terms(exact_states @ head.double().T, log_probs, labels.flatten(), MIXED)
    exact.loss.backward()  # type: ignore[no-untyped-call]
    own_states = states.to(setting.device).requires_grad_()
    on_device = [each.to(setting.device) for each in (head, teacher, head, labels)]
    own = distillation_loss(own_states, *on_device, MIXED)
    own.loss.backward()  # type: ignore[no-untyped-call]
    assert own_states.grad is not None and exact_states.grad is not None
    difference = own_states.grad.cpu().double().flatten(0, 1) - exact_states.grad
    yield {
        "relative_error": abs(own.loss.item() / exact.loss.item() - 1),
        "relative_error_of_gradient": (difference.norm() / exact_states.grad.norm()).item(),
    }


def precision(setting: Setting) -> Iterator[Result]:
    """Train a small model for a few steps in each precision."""
    for each in setting.precisions:
        yield {each: _trained(setting, f"precision-{each}", "compared/", precision=each)}


def resume(setting: Setting) -> Iterator[Result]:
    """Stop a small run by a signal, let it go on, and compare its losses with a whole run's."""
    whole = _trained(setting, "whole", "compared/")
    stopped = setting.folder / "stopped"
    threading.Thread(target=_stop_after_a_step, args=(stopped,), daemon=True).start()
    _distil(setting, "stopped", "compared/", codes=(128 + signal.SIGTERM, 0))
    yield {"steps_before_the_stop": len(_metrics(stopped))}
    resumed = _trained(setting, "stopped", "compared/")
    losses = [[step["train/loss"] for step in steps] for steps in (whole, resumed)]
    yield {"largest_difference": max(abs(one - other) for one, other in zip(*losses, strict=True))}


def out_of_memory(setting: Setting) -> Iterator[Result]:
    """Label with batches for which the memory that is allowed does not suffice."""
    if setting.device.type != "cuda":
        yield {"left_out": "the memory of a CPU is not limited by torch"}
        return
    weights = sum(path.stat().st_size for path in (setting.folder / "teacher").glob("*.safe*"))
    total = torch.cuda.get_device_properties(setting.device).total_memory
    torch.cuda.set_per_process_memory_fraction((1.7 * weights + 6e9) / total)
    folder = _label(setting, "memory", setting.workers[0], batch_size=setting.rows[-1], clips=200)
    rows = len((folder / "pseudo_labels.jsonl").read_text().splitlines())
    yield {"rows": rows, "rejected": (folder / "rejected.jsonl").read_text()[:2000]}


def steps(setting: Setting) -> Iterator[Result]:
    """Time the encoder and one step of the decoder: until all is launched, and until it is done."""
    whisper = _load(setting, "teacher", setting.device)
    for rows in setting.rows:
        features = torch.randn(rows, setting.shape.mels, FRAMES, device=setting.device)
        features = features.to(whisper.model.dtype)
        with torch.inference_mode():
            encode = functools.partial(whisper.encode, features)
            timed = {"encoder": _timed(setting, encode, 3)}
            decoders = {"decoder": CachedDecoder(whisper.model)}
            if setting.device.type == "cuda" and rows <= MOST_ROWS:
                decoders["recorded"] = RecordingDecoder(whisper.model, rows)
            for name, decoder in decoders.items():
                positions = whisper.model.config.max_target_positions
                cache = decoder.start(encode(), positions, uneven=False)
                ids = torch.full((rows, 1), 300, device=setting.device)
                decode = functools.partial(_decode, decoder, ids, cache)
                timed[name] = _timed(setting, decode, 20)
        yield {f"{rows} rows": timed}


def labelling(setting: Setting) -> Iterator[Result]:
    """Label by several numbers of workers, then with a cache; the start of the run is counted."""
    runs: dict[str, Result] = {f"{n} workers": {"workers": n} for n in setting.workers}
    cache = setting.folder / "labelling-cache"
    for way in ("filling", "cached"):
        runs[way] = {"workers": setting.workers[-1], "cache": cache, "clips": setting.clips // 4}
    for name, options in runs.items():
        began = time.perf_counter()
        _label(setting, f"labelling {name}", **options)
        seconds = time.perf_counter() - began
        clips = options.get("clips", setting.clips)
        yield {name: {"clips_per_second": round(clips / seconds, 2)}}
    shutil.rmtree(cache)


def waiting(setting: Setting) -> Iterator[Result]:
    """Train a few steps, in which every wait for the device is a warning; count them by place."""
    if setting.device.type != "cuda":
        yield {"left_out": "nothing waits for a CPU"}
        return
    places: Counter[str] = Counter()

    def count(message: object, category: object, file: str, line: int, *_: object) -> None:
        if "synchronizing" in str(message):
            places[f"{file}:{line}"] += 1

    def watched(*arguments: Any) -> bool:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return train_step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    train_step = Trainer.train_step
    with warnings.catch_warnings(), mock.patch.object(Trainer, "train_step", watched):
        warnings.simplefilter("always")
        warnings.showwarning = count
        _trained(setting, "waiting")
    yield {"steps": setting.max_steps, "waits": dict(places.most_common())}


def training(setting: Setting) -> Iterator[Result]:
    """Train with several micro-batches: without a cache, filling it, and reading it."""
    for size in setting.micro_batches:
        folder = setting.folder / f"cache-{size}"
        cache = {"folder": str(folder)}
        for way, options in (("uncached", {}), ("filling", cache), ("cached", cache)):
            name = f"{way}-{size}"
            changes: Result = {"batch": {"micro_batch_size": size}, "teacher_cache": options}
            yield {name: _trained(setting, name, **changes)[-1]}
        shutil.rmtree(folder)


def profile(setting: Setting) -> Iterator[Result]:
    """Name the operations on which a decoded batch spends its time."""
    from torch.profiler import ProfilerActivity

    rows = setting.rows[1]
    options = {"batch_size": rows, "max_new_tokens": 16}
    transcribe = _transcriber(setting, setting.device, options, speed=True)
    features = torch.randn(rows, setting.shape.mels, FRAMES, device=setting.device)
    features = features.to(transcribe.whisper.model.dtype)
    transcribe(features, ["en"] * rows)
    activities = [ProfilerActivity.CPU]
    if setting.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        transcribe(features, ["en"] * rows)
        machine.synchronize(setting.device)
    key = f"self_{setting.device.type}_time_total".replace("cuda", "device")
    table = profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60)
    yield {"table": table.splitlines()}


STAGES: dict[Stage, int] = {  # seconds that each may take
    versions: 20,
    models: 60,
    tokens: 45,
    loss: 20,
    steps: 40,
    profile: 30,
    precision: 35,
    resume: 35,
    out_of_memory: 35,
    waiting: 25,
    labelling: 75,
    training: 60,
}


# What the stages share


@functools.cache
def _load(setting: Setting, name: str, device: torch.device, *, exact: bool = False) -> Whisper:
    half = device.type == "cuda" and not exact
    folder = read_model_folder(setting.folder / name, None, "model")
    join_processes()  # which also chooses the kernels of attention, as in every script
    return load_whisper(folder, torch.bfloat16 if half else torch.float32, "auto", device)


def _transcriber(
    setting: Setting,
    device: torch.device,
    options: Result,
    *,
    drafts: bool = False,
    speed: bool = False,
) -> Transcriber:
    name = "" if speed else "compared/"
    whisper = _load(setting, f"{name}teacher", device, exact=not speed)
    assistant = None
    if drafts:
        student = _load(setting, f"{name}student", device, exact=not speed)
        assistant = Assistant(student, whisper)
    decoding = DecodingOptions(**{"max_new_tokens": 100, "batch_size": 4, **options})
    return Transcriber(whisper, decoding, 0, assistant, record_steps=True)


def _decode(decoder: CachedDecoder, ids: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    return decoder.logits(decoder.read(ids, cache))


def _timed(setting: Setting, work: Callable[[], object], count: int) -> Result:
    """Return the milliseconds that each of several calls takes."""
    work()
    machine.synchronize(setting.device)
    began = time.perf_counter()
    for _ in range(count):
        work()
    launched = time.perf_counter()
    machine.synchronize(setting.device)
    done = time.perf_counter()
    milliseconds = [round(1000 * (end - began) / count, 3) for end in (launched, done)]
    return dict(zip(("launched_ms", "done_ms"), milliseconds, strict=True))


def _label(
    setting: Setting,
    name: str,
    workers: int,
    *,
    batch_size: int | str = "auto",
    clips: int | None = None,
    cache: Path | None = None,
) -> Path:
    data = {"manifest": str(setting.folder / "clips.jsonl"), "num_workers": workers}
    config = {
        "teacher": {"path": str(setting.folder / "teacher")},
        "data": {**data, "max_utterances": clips},
        "decoding": {"batch_size": batch_size, "max_new_tokens": 16},
        "teacher_cache": {"folder": cache and str(cache)},
    }
    return _run(setting, run_pseudo_labelling, name, config, (0,))


def _trained(setting: Setting, name: str, models: str = "", **changes: Any) -> list[Result]:
    """Train, and return the metrics of the steps; the folder, of gigabytes, is deleted."""
    folder = _distil(setting, name, models, **changes)
    metrics = _metrics(folder)
    shutil.rmtree(folder)
    return metrics


def _distil(
    setting: Setting, name: str, models: str, codes: tuple[int, ...] = (0,), **changes: Any
) -> Path:
    """Train; `models` is what the names of the teacher's and the student's folder begin with."""
    config = {
        "teacher": {"path": str(setting.folder / f"{models}teacher")},
        "student": {"path": str(setting.folder / f"{models}student")},
        "data": {
            "train_manifests": [str(setting.folder / "clips.jsonl")],
            "num_workers": setting.workers[-1],
        },
        "optimizer": {"learning_rate": 1e-5},
        "schedule": {"warmup_steps": 0, "max_steps": setting.max_steps, "epochs": None},
        "batch": {"micro_batch_size": setting.micro_batches[0]},
        "logging": {"every_steps": 1, "tensorboard": False},
        "checkpoints": {"every_steps": setting.max_steps},
        **changes,
    }
    return _run(setting, run_distillation, name, config, codes)


def _run(setting: Setting, script: Any, name: str, config: Result, codes: tuple[int, ...]) -> Path:
    """Run a script in this process; return its output folder."""
    output = setting.folder / name
    path = setting.folder / f"{name}.json"
    path.write_text(json.dumps({"output_dir": str(output), **config}))
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.argv = [script.__name__, str(path)]
    code = run_script(script.__name__, "", script.Config, script.prepare, script.work)
    if code not in codes:
        raise RuntimeError(f"{script.__name__} has ended with code {code}; its messages say why")
    return output


def _metrics(folder: Path) -> list[Result]:
    """Return the lines of `metrics.jsonl` with a training loss."""
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return [line for line in lines if "train/loss" in line]


def _stop_after_a_step(folder: Path) -> None:
    while not _metrics(folder):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


# Stage by stage


def main() -> int:
    """Run the stages; 1 if one has failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    names = [stage.__name__ for stage in STAGES]
    parser.add_argument("--stages", default=",".join(names), help="models is needed by most")
    options = parser.parse_args()
    if unknown := set(options.stages.split(",")) - set(names):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        setting = (on_cpu if options.device == "cpu" else on_gpu)(Path(folder))
        for stage, seconds in STAGES.items():
            if stage.__name__ in options.stages.split(","):
                results[stage.__name__] = _in_own_process(stage, setting, seconds)
                write_atomically(options.out, json.dumps(results, indent=2).encode())
                print(json.dumps({stage.__name__: results[stage.__name__]}), flush=True)
    return int(any("failed" in result for result in results.values()))


def _in_own_process(stage: Stage, setting: Setting, seconds: int) -> Result:
    """Return what a stage had in its time, why it failed if it did, and the seconds it took."""
    context = multiprocessing.get_context("fork")  # nothing has used the GPU here
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(stage, setting, sender))
    began = time.perf_counter()
    process.start()
    sender.close()
    result: Result = {}
    end = began + seconds if setting.device.type == "cuda" else math.inf
    try:
        while (part := _next_part(receiver, end)) is not None:
            result |= part
    except TimeoutError:
        result["failed"] = f"not done within {seconds} s"
    except EOFError:
        result["failed"] = "its process has died"
    if process.is_alive() and process.pid and "failed" in result:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too
    process.join()
    return {**result, "seconds": round(time.perf_counter() - began, 2)}


def _next_part(receiver: Any, end: float) -> Result | None:
    """Return the next part of a stage's result; None: there is none.

    Raises:
        TimeoutError: it has not come before the end.
        EOFError: the process has died.
    """
    left = None if end == math.inf else max(0.0, end - time.perf_counter())
    if not receiver.poll(left):
        raise TimeoutError
    part: Result | None = receiver.recv()
    return part


def _work(stage: Stage, setting: Setting, sender: Any) -> None:
    os.setsid()
    try:
        for part in stage(setting):
            sender.send(part)
    except Exception:
        sender.send({"failed": traceback.format_exc()[-3000:]})
    sender.send(None)


if __name__ == "__main__":
    sys.exit(main())
