"""Export a model folder for other programs, and verify that the exports give the same texts.

Writes a folder for each of the variants, with "float32" beside "int8" for example, and transcribes
the same clips with the model itself and with each variant, in the program that it is made for.
`exports.md` (a table for people) and `exports.json` show what each variant costs: size, error rate
with its interval, how many texts are the same as the model's, speed. In `verification/` each has
its `hypotheses.jsonl` and `speed.json`, which eval.py can compare with those of other systems.

A folder lies in `.writing` until its clips have been compared. A float32 export whose texts differ
from the model's is then called `<variant>.unverified`, and the run ends with exit code 3.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from pydantic import Field, field_validator

from simpler_distil_whisper.atomic import (
    mark,
    new_folder,
    refuse_others,
    remove_own,
    write_atomically,
)
from simpler_distil_whisper.config import PositiveInt, Ratio, StrictModel
from simpler_distil_whisper.data.manifest import (
    Manifest,
    Rejection,
    Utterance,
    first_reasons,
    read_manifest,
)
from simpler_distil_whisper.data.options import Columns
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer
from simpler_distil_whisper.export.targets import (
    PROGRAMS,
    Format,
    refuse_missing_packages,
    refuse_unsuitable,
    why_not_faster_whisper,
)
from simpler_distil_whisper.launch import is_main_process
from simpler_distil_whisper.model.folder import ModelFolder, read_model_folder
from simpler_distil_whisper.model.options import DecodingOptions, FolderOptions, Task, whisper_code
from simpler_distil_whisper.run import DataError, Run, log
from simpler_distil_whisper.script import run_script
from simpler_distil_whisper.terminal import show

if TYPE_CHECKING:
    from simpler_distil_whisper.export.verification import System, SystemReport
    from simpler_distil_whisper.model.whisper import Whisper

Quantization = Literal[
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
    "int16",
]

QUANTIZATIONS: dict[Format, tuple[str, ...]] = {
    "ctranslate2": get_args(Quantization),
    "openai": ("float32", "float16"),
    "ggml": ("float16",),  # on a CPU, whisper.cpp 1.8.5 aborts where convolutions are in float32
}
ORIGINAL = "original"  # the name of the model itself in tables


class ExportedModel(FolderOptions):
    """The model that is exported."""

    path: Path = Field(description="Hugging Face model folder, such as outputs/distillation/final.")


class Variant(StrictModel):
    """One export of the model."""

    format: Format = Field(
        description="ctranslate2: a folder for faster-whisper and CTranslate2; openai: a model.pt "
        "for openai-whisper, with the same weights as safetensors beside it; ggml: a "
        "ggml-model.bin for whisper.cpp."
    )
    quantization: Quantization = Field(
        description="What the weights are stored in; openai: float32 or float16; ggml: float16."
    )

    @property
    def name(self) -> str:
        """The name of its folder, also in tables."""
        return f"{self.format}-{self.quantization}"

    @property
    def is_exact(self) -> bool:
        """Whether nothing is rounded, so that it must give the model's texts."""
        return self.quantization == "float32"


class Verification(StrictModel):
    """The clips on which exports are compared with the model: greedy, without timestamps."""

    manifest: Path = Field(description="JSON lines, one clip each; none longer than the window.")
    columns: Columns = Columns()
    language: str | None = Field(
        None, description="Language of the rows that name none; null: the model detects it."
    )
    task: Task = Field("transcribe", description="translate: into English.")
    max_utterances: PositiveInt | None = Field(
        100, description="Take only the first so many rows; null: all."
    )
    max_different_fraction: Ratio = Field(
        0.02,
        description="A float32 export may differ from the model in the texts of at most this share "
        "of the clips, since rounding can tip a close choice; quantised exports are only measured.",
    )

    _code = field_validator("language")(whisper_code)


class Config(StrictModel):
    """export.json."""

    output_dir: Path = Field(description="Folder that this run makes.")
    model: ExportedModel
    variants: list[Variant] = Field(min_length=1, description="The exports to make.")
    verification: Verification
    metric: Metric = Metric()

    @field_validator("variants")
    @classmethod
    def _each_once_and_possible(cls, variants: list[Variant]) -> list[Variant]:
        names = [variant.name for variant in variants]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"these stand twice: {', '.join(twice)}")
        for variant in variants:
            known = QUANTIZATIONS[variant.format]
            if variant.quantization not in known:
                program = PROGRAMS[variant.format]
                raise ValueError(
                    f"{program} takes {' or '.join(known)}, not {variant.quantization}"
                )
        return variants


class Prepared(NamedTuple):
    """The model's folder and the rows to verify its exports on, both checked."""

    folder: ModelFolder
    manifest: Manifest


def prepare(config: Config) -> Prepared:
    """Return the model's folder and the rows to verify on.

    Raises:
        ConfigError: a variant cannot be made of this model, or its program is not installed.
        DataError: no row of the manifest can be used.
    """
    folder = read_model_folder(config.model.path, config.model.processor, "model")
    options = config.verification
    folder.check_language_and_task(options.language, options.task, "verification")
    formats = dict.fromkeys(variant.format for variant in config.variants)
    for format in formats:
        refuse_missing_packages(format)
        refuse_unsuitable(format, folder)
    if "ctranslate2" in formats and (reason := why_not_faster_whisper(folder)):
        log.warning("What is exported is for CTranslate2 itself, not faster-whisper: %s", reason)
    manifest = read_manifest(
        options.manifest,
        options.columns,
        max_utterances=options.max_utterances,
        languages=folder.row_languages,
        new_fields=["hypothesis"],
    )
    if not manifest.utterances:
        raise DataError(f"{options.manifest}: no row can be used{reasons_in(manifest.rejections)}")
    if "openai" in formats:
        from simpler_distil_whisper.export.formats import check_openai_vocabulary  # takes seconds

        check_openai_vocabulary(folder)
    return Prepared(folder, manifest)


def work(config: Config, prepared: Prepared, run: Run) -> str:
    """Write and verify every variant; write the tables."""
    if not is_main_process():  # there is nothing to share
        return ""
    from simpler_distil_whisper.export.formats import original_system
    from simpler_distil_whisper.export.verification import report_on, transcribe, write_hypotheses
    from simpler_distil_whisper.model.whisper import load_whisper, quieten_libraries

    quieten_libraries()
    for variant in config.variants:
        for place in places_of(variant, run):
            refuse_others(place)
    folder, options, scorer = prepared.folder, config.verification, Scorer(config.metric)
    whisper = load_whisper(folder)
    parameters = whisper.model.num_parameters()
    clips = clips_to_compare(prepared)
    hypotheses, writing = run.folder / "verification", run.folder / ".writing"

    decoding = DecodingOptions(language=options.language, task=options.task)
    system = original_system(whisper, folder, decoding)
    original = transcribe(ORIGINAL, system, clips, [clip.language for clip in clips], run)
    reports = {ORIGINAL: report_on(original, original, clips, scorer, None)}
    write_hypotheses(hypotheses / ORIGINAL, clips, original, options.columns, parameters)
    # Where a row names no language, every variant is given the one that the model has detected.
    languages = [transcript.language for transcript in original.transcripts]
    for variant in config.variants:
        run.stop_if_asked()
        for left_over in places_of(variant, run):  # by a run of this config that did not finish
            if left_over.exists():  # a kill while it is removed leaves no half of it under its name
                left_over.replace(new_folder(writing) / left_over.name)
        written = new_folder(writing) / variant.name
        system = write(variant, whisper, folder, written, options.task)
        mark(written)
        exported = transcribe(variant.name, system, clips, languages, run)
        limit = options.max_different_fraction if variant.is_exact else None
        report = report_on(exported, original, clips, scorer, limit)
        write_hypotheses(hypotheses / variant.name, clips, exported, options.columns, parameters)
        reports[variant.name] = report
        same = f"{report.identical} of {report.clips} texts are the model's"
        log.info("%s, run by %s: %s", variant.name, report.library, same)
        verified, unverified = places_of(variant, run)
        written.replace(unverified if report.verified is False else verified)
        remove_own(writing)
    return conclude(config, prepared, clips, reports, run)


def places_of(variant: Variant, run: Run) -> tuple[Path, Path]:
    """Return the folder of a variant that gives the model's texts, and of one that does not."""
    return run.folder / variant.name, run.folder / f"{variant.name}.unverified"


def clips_to_compare(prepared: Prepared) -> list[Utterance]:
    """Return the usable clips, and log the first reasons why others cannot be used.

    Raises:
        DataError: none can be used.
    """
    from simpler_distil_whisper.export.verification import usable_clips

    folder, manifest = prepared
    clips, unusable = usable_clips(manifest.utterances, folder.window_seconds)
    unusable = [*manifest.rejections, *unusable]
    if not clips:
        raise DataError(f"{manifest.path}: no row can be used{reasons_in(unusable)}")
    if unusable:
        log.warning("%d rows cannot be used%s", len(unusable), reasons_in(unusable))
    log.info("%d clips to compare on.", len(clips))
    return clips


def reasons_in(unusable: list[Rejection]) -> str:
    """Return the first reasons, as the end of a message."""
    return f". The first reasons:{first_reasons(unusable)}"


def write(
    variant: Variant, whisper: "Whisper", folder: ModelFolder, target: Path, task: Task
) -> "System":
    """Write one variant and return it loaded by the program that it is made for."""
    from simpler_distil_whisper.export.formats import (
        ctranslate2_system,
        openai_system,
        write_ctranslate2,
        write_openai,
    )
    from simpler_distil_whisper.export.ggml import ggml_system, write_ggml

    if variant.format == "openai":
        write_openai(whisper, "float16" if variant.quantization == "float16" else "float32", target)
        return openai_system(whisper, target, task)
    if variant.format == "ggml":
        write_ggml(whisper, target)
        return ggml_system(whisper, target, task)
    write_ctranslate2(whisper, folder, variant.quantization, target)
    return ctranslate2_system(whisper, folder, target, task)


def conclude(
    config: Config,
    prepared: Prepared,
    clips: list[Utterance],
    reports: "dict[str, SystemReport]",
    run: Run,
) -> str:
    """Write and show the tables; return the closing words.

    Raises:
        DataError: a float32 export does not give the model's texts.
    """
    from simpler_distil_whisper.export.verification import as_json, as_table

    facts = {
        "model": str(config.model.path),
        "manifest": str(config.verification.manifest),
        "clips": len(clips),
        "unusable_rows": prepared.manifest.row_count - len(clips),
        "max_different_fraction": config.verification.max_different_fraction,
    }
    write_atomically(run.folder / "exports.json", as_json(reports, facts).encode())
    table = as_table(reports)
    write_atomically(run.folder / "exports.md", table.encode())
    show(table)
    wrong = [name for name, report in reports.items() if report.verified is False]
    if wrong:
        counts = ", ".join(
            f"{name} in {reports[name].clips - reports[name].identical} of {len(clips)} clips"
            for name in wrong
        )
        raise DataError(
            f"Not the model's texts: {counts}; verification.max_different_fraction is "
            f"{config.verification.max_different_fraction:g}. Do not use {run.folder}/"
            f"{wrong[0]}.unverified. The texts are in {run.folder / 'verification'}."
        )
    return (
        f"{run.folder} holds {', '.join(variant.name for variant in config.variants)}; exports.md "
        "(this table) and exports.json; verification, whose hypotheses eval.py compares."
    )


if __name__ == "__main__":
    command = "python -m simpler_distil_whisper.export"
    sys.exit(run_script("export", __doc__, Config, prepare, work, command=command))
