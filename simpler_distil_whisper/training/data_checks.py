"""What can be wrong with the rows of a run although each of them is usable.

Owns the checks that need no model, only its tokenizer: too little audio, labels that do not survive
the tokenizer, dev rows that hold pseudo-labels or are trained on.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from simpler_distil_whisper.data.audio import Clip
from simpler_distil_whisper.data.jsonl import Row
from simpler_distil_whisper.data.manifest import Manifest, Utterance, clip_of
from simpler_distil_whisper.labels.filters import BROKEN_CHARACTER
from simpler_distil_whisper.model.teacher_cache import audio_digest
from simpler_distil_whisper.model.whisper import Whisper
from simpler_distil_whisper.run import DataError, log
from simpler_distil_whisper.text.languages import without_spaces
from simpler_distil_whisper.training.augment import View
from simpler_distil_whisper.training.options import TrainingColumns, TrainingData
from simpler_distil_whisper.training.plan import Visit
from simpler_distil_whisper.training.selection import Selection
from simpler_distil_whisper.training.tokens import Example, VisitTokens, learnt_text

FEW_HOURS = 25
# Published sizes of filtered data against error rates, for the deepest cut; from the statistics
# beside https://huggingface.co/kotoba-tech/kotoba-whisper-v1.0 (CER on Japanese Common Voice 8).
EVIDENCE_OF_HOURS = (
    "kotoba-whisper, which keeps 2 of large-v3's 32 decoder layers, came to a CER of 94 % from 2 "
    "hours, 30 % from 25, 10.9 % from 251 and 9.4 % from 1,253 hours; its teacher has 8.5 %"
)
LABELS_READ_BACK = 200
# What labelling writes beside a label, whatever its columns are called.
SIGNS_OF_A_LABEL = ("average_log_probability", "compression_ratio")
SHARED_SECONDS = 0.05  # times in manifests are rounded: less in common is none
BYTES_COMPARED = 4_000_000_000  # of files that have the size of a dev file


def check_data(
    selection: Selection, dev: Manifest | None, data: TrainingData, student: Whisper
) -> dict[str, int | float]:
    """Warn of what looks wrong; return what was counted, by name.

    Raises:
        DataError: too many labels do not survive the tokenizer.
    """
    counted: dict[str, int | float] = {
        "hours": check_hours(selection),
        "labels_not_given_back": check_labels(selection.examples, data, student),
    }
    if dev:
        counted["dev_rows_with_labels_for_references"] = check_references(dev, data.columns)
        counted["train_rows_heard_in_dev"] = check_shared_audio(
            selection.examples, dev, data.columns
        )
    return counted


def check_hours(selection: Selection) -> float:
    """Return how many hours are trained on; warn if that is little by published experience."""
    hours = selection.report["kept"]["hours"]
    if hours < FEW_HOURS:
        log.warning(
            "only %.2f h of audio are trained on. What is published for large teachers: %s. A "
            "smaller teacher, or a student that keeps more layers, needs less: judge by the error "
            "rate on dev",
            hours,
            EVIDENCE_OF_HOURS,
        )
    return hours


def check_labels(examples: Sequence[Example], data: TrainingData, student: Whisper) -> int:
    """Return how many of up to 200 labels, decoded from their tokens, are another text.

    Raises:
        DataError: more than `data.max_bad_fraction` of them.
    """
    options = ("timestamp_probability", "previous_text_probability")
    labels = {"sampled_text_probability": 0.0}  # which take the place of labels
    never = labels | {name: 0.0 for name in options}
    always = labels | {name: 1.0 if getattr(data, name) else 0.0 for name in options}
    positions = student.model.config.max_target_positions
    plain, full = (
        VisitTokens(examples, data.model_copy(update=fixed), student.tokens, positions, seed=0)
        for fixed in (never, always)
    )
    checked = range(0, len(examples), math.ceil(len(examples) / LABELS_READ_BACK))
    problems = []
    for number in checked:
        problem = _misreading(plain, number, student) or _misreading(full, number, student)
        if problem:
            problems.append(problem)
    if not problems:
        log.info("all labels that were read back (%d) survive the tokenizer", len(checked))
        return 0
    message = (
        f"the labels of {len(problems)} of {len(checked)} rows do not survive the tokenizer, so "
        f"that another text would be learnt: the one in {student.processor_folder} "
        "(student.processor) changes them or lacks some of their characters. The first:"
        + "".join(f"\n  {problem}" for problem in problems[:3])
    )
    if len(problems) > data.max_bad_fraction * len(checked):
        raise DataError(message)
    log.warning("%s", message)
    return len(problems)


def _misreading(visit_tokens: VisitTokens, number: int, student: Whisper) -> str | None:
    """Return how an example's text differs when decoded from its tokens; None: it does not."""
    example, special = visit_tokens.examples[number], student.tokens
    utterance = example.utterance
    tokens, prompt_length = visit_tokens.of(Visit(number, position=0, use=0), View())
    given, learnt = tokens[:prompt_length], [t for t in tokens[prompt_length:] if t != special.end]
    text_tokens = [id for id in learnt if id not in special.timestamps]
    label = learnt_text(utterance.text or "", example.complete)
    decoded = student.text_of(text_tokens)
    if len(text_tokens) < len(learnt):  # between segments with times there may be a space or none
        label, decoded = without_spaces(label), without_spaces(decoded)
    if decoded != label:
        return f'{utterance.place}: "{label}" comes back as "{decoded}"'
    if given[0] == special.previous:
        previous = learnt_text(utterance.row[visit_tokens.data.columns.previous_text])
        decoded = student.text_of(given[1 : given.index(special.start)])
        # It may begin within a character of several tokens.
        if not previous.endswith(decoded.lstrip(BROKEN_CHARACTER)):
            return f'{utterance.place}: previous text "{previous}" comes back as "{decoded}"'
    return None


def check_references(dev: Manifest, columns: TrainingColumns) -> int:
    """Return how many dev rows would be scored against pseudo-labels; warn of them.

    A labelled row keeps its reference, or null, beside the label. Where that column is missing, the
    label itself would be taken for the reference.
    """
    places = [
        utterance.place
        for utterance in dev.utterances
        if _is_labelled(row := utterance.row)
        and (columns.reference not in row or columns.reference == columns.text)
    ]
    if places:
        log.warning(
            'data.dev_manifest: %d of %d rows are pseudo-labelled, but have no "%s": the student '
            'would be scored against the teacher\'s own "%s". Name the column of references in '
            "data.columns.reference, or take the rows from before labelling. The first: %s",
            len(places),
            len(dev.utterances),
            columns.reference,
            columns.text,
            ", ".join(places[:3]),
        )
    return len(places)


def _is_labelled(row: Row) -> bool:
    return all(name in row for name in SIGNS_OF_A_LABEL)


class Shared(NamedTuple):
    """A training row and a dev row that share audio."""

    train: str
    dev: str


def check_shared_audio(examples: Sequence[Example], dev: Manifest, columns: TrainingColumns) -> int:
    """Return how many training rows share audio with dev; warn of them."""
    train = [example.utterance for example in examples]
    shared = list(shared_audio(train, dev.utterances, columns))
    if shared:
        log.warning(
            "%d training rows share audio with data.dev_manifest, so that its error rate tells "
            "little about audio that is new to the student; take them out of either. The first:%s",
            len(shared),
            "".join(f"\n  {train} and {dev}" for train, dev in shared[:3]),
        )
    return len(shared)


def shared_audio(
    train: Sequence[Utterance], dev: Iterable[Utterance], columns: TrainingColumns
) -> Iterator[Shared]:
    """Yield each training row that shares some audio with a dev row: the same file or a copy.

    Args:
        train: the training rows.
        dev: the dev rows.
        columns: where the parts of packs tell what they are of.
    """
    in_file: dict[str, list[tuple[str, Clip]]] = {}
    for utterance in dev:
        for clip in _clips(utterance, columns):
            in_file.setdefault(os.path.realpath(clip.path), []).append((utterance.place, clip))
    paths = {clip.path for utterance in train for clip in _clips(utterance, columns)}
    files = {path: os.path.realpath(path) for path in paths}
    copies = _copies(set(files.values()) - in_file.keys(), in_file.keys())
    files = {path: copies.get(file, file) for path, file in files.items()}
    for utterance in train:
        places = (
            place
            for clip in _clips(utterance, columns)
            for place, other in in_file.get(files[clip.path], ())
            if _seconds_shared(clip, other) > SHARED_SECONDS
        )
        if place := next(places, None):
            yield Shared(utterance.place, place)


def _clips(utterance: Utterance, columns: TrainingColumns) -> Iterator[Clip]:
    """Yield the audio of a row and, of a pack, that of its parts, which lies in other files."""
    yield utterance.clip
    if '"parts"' not in utterance.json:  # reading the rows would take longer than all the rest
        return
    parts = utterance.row.get("parts")
    for part in parts if isinstance(parts, list) else ():
        path = part.get(columns.audio) if isinstance(part, dict) else None
        if isinstance(path, str):
            yield clip_of(part, path, columns)


def _seconds_shared(one: Clip, other: Clip) -> float:
    """Return how long two parts of a file overlap, below 0 if they do not."""
    parts = [(each.start_seconds, each.duration_seconds or math.inf) for each in (one, other)]
    end = min(start + duration for start, duration in parts)
    return end - max(start for start, _ in parts)


def _copies(files: Iterable[str], originals: Iterable[str]) -> dict[str, str]:
    """Return file -> original for the files that hold the same bytes as one of the originals.

    Only files of equal size are read, and of those no more than can be read in some seconds.
    """
    by_size: dict[int, list[str]] = {}
    for original in originals:
        by_size.setdefault(_size(original), []).append(original)
    sizes = {file: _size(file) for file in sorted(files)}
    candidates = {file: size for file, size in sizes.items() if size and size in by_size}
    copies: dict[str, str] = {}
    to_read = BYTES_COMPARED
    for number, (file, size) in enumerate(candidates.items()):
        to_read -= size
        if to_read < 0:
            log.info(
                "%d of %d files as large as a dev file were compared with it; the others are many",
                number,
                len(candidates),
            )
            break
        digest = _digest(file)
        same = [one for one in by_size[size] if digest and _digest(one) == digest]
        if same:
            copies[file] = same[0]
    return copies


def _size(file: str) -> int:
    """Return a file's size in bytes; 0 if it is gone, which loading its audio reports."""
    try:
        return Path(file).stat().st_size
    except OSError:
        return 0


def _digest(file: str) -> str | None:
    try:
        return audio_digest(Path(file))
    except OSError:
        return None
