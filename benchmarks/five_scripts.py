"""The five scripts from end to end, with the shipped configs and nothing changed but paths, timed.

    python -m benchmarks.five_scripts --teacher work/base --speech work/speech --output work/run

`--speech` holds train.jsonl, dev.jsonl and test.jsonl. The teacher labels the first, students of
`--decoder-layers` are pruned, distilled and scored on the second, and all of them with the teacher
transcribe the third. Prints what each script took as a row of a Markdown table, then the report of
`eval.py`. Run again after a stop, it goes on where it was, and the table holds what was left to do.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine

ROOT = Path(__file__).parents[1]


class Step(NamedTuple):
    """One run of a script: what it does, and what differs from the script's shipped config.

    `changes` maps dotted keys to values.
    """

    name: str
    script: str
    changes: dict[str, Any]


def chain(teacher: Path, speech: Path, output: Path, decoder_layers: list[int]) -> Iterator[Step]:
    """The runs in their order, from the teacher's folder to one report about all models."""
    labels = output / "labels"
    cache = {"teacher_cache.folder": output / "teacher_cache"}
    yield Step(
        "labelling",
        "run_pseudo_labelling",
        {"teacher.path": teacher, "data.manifest": speech / "train.jsonl", **cache}
        | {"output_dir": labels},
    )
    models = {"teacher": teacher}
    for layers in decoder_layers:
        student, distilled = output / f"student_{layers}", output / f"distilled_{layers}"
        models[f"{layers} layers"] = distilled / "final"
        yield Step(
            f"choosing {layers} layers",
            "create_student_model",
            {"teacher.path": teacher, "student.decoder_layers": layers, **cache}
            | {"layer_scoring.manifest": labels / "pseudo_labels.jsonl", "output_dir": student},
        )
        yield Step(
            f"distillation, {layers} layers",
            "run_distillation",
            {"teacher.path": teacher, "student.path": student, **cache}
            | {"data.train_manifests": [labels / "pseudo_labels.jsonl"]}
            | {"data.dev_manifest": speech / "dev.jsonl", "output_dir": distilled},
        )
    hypotheses = {name: output / f"inference of {name}" for name in models}
    for name, model in models.items():
        yield Step(
            f"inference, {name}",
            "offline_inference",
            {"model.path": model, "data.manifest": speech / "test.jsonl"}
            | {"output_dir": hypotheses[name]},
        )
    systems = [
        {"name": name, "path": folder / "hypotheses.jsonl"} for name, folder in hypotheses.items()
    ]
    yield Step("scores", "eval", {"hypotheses": systems, "output_dir": output / "eval"})


def write_config(step: Step, folder: Path) -> Path:
    """The shipped config of the step's script with the step's changes, written to `folder`."""
    config = json.loads((ROOT / f"{step.script}.json").read_text(encoding="utf-8"))
    for dotted, value in step.changes.items():
        *sections, key = dotted.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[key] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step.name}.json"
    path.write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")
    return path


def processor_seconds() -> float:
    """Processor time of all scripts that have ended, with their worker processes, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run the chain and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--decoder-layers", type=int, nargs="+", default=[2, 3])
    arguments = parser.parse_args()
    speech, output = arguments.speech.resolve(), arguments.output.resolve()
    teacher = arguments.teacher.resolve()
    rows = []
    for step in chain(teacher, speech, output, arguments.decoder_layers):
        config = write_config(step, output / "configs")
        begun, used = time.monotonic(), processor_seconds()
        script = [sys.executable, str(ROOT / f"{step.script}.py"), str(config)]
        subprocess.run(script, check=True)
        rows.append((step.name, time.monotonic() - begun, processor_seconds() - used))
    total = ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))
    facts = machine.machine_facts(torch.device("cpu"), torch.get_num_threads())
    print("\n" + "\n".join(f"- {fact}" for fact in facts))
    print("\n| script | minutes | of processor time |\n|---|---|---|")
    for name, seconds, processor in (*rows, total):
        print(f"| {name} | {seconds / 60:.1f} | {processor / 60:.1f} |")
    print(f"\n{(output / 'eval' / 'report.txt').read_text(encoding='utf-8')}")


if __name__ == "__main__":
    main()
