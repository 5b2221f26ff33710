"""Reading a script's JSON file strictly: every problem at once, each with its key and a remedy.

Owns the base class of all config sections, the loader and the `--help` table. It does not know what
the keys mean: the sections are defined beside the code that they configure.
"""

import difflib
import json
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Le, Len, Lt, MinLen
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from simpler_distil_whisper.files import read_regular_file, why_impossible

LARGEST_CONFIG = 2**22  # bytes
MOST_PROBLEMS = 100  # that are listed
LONGEST_QUOTE = 200  # characters of a file's content in a message

# Every number has both bounds: what is computed from it must end, and fit into memory. A key that
# needs narrower ones names both of its own, since pydantic does not narrow those of an alias.
Ratio = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**9)]
PositiveFloat = Annotated[float, Field(gt=0, le=10**9)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
BatchSize = Annotated[int, Field(gt=0, le=4096)]

# Keys of innerNULL/simpler-distil-whisper and huggingface/distil-whisper -> the keys here, some
# with a hint. But for those of some sections, another script may have them in another section.
ONLY_THERE = ("teacher.", "student.", "columns.")
RENAMED_KEYS = {
    "asr_results_path": 'hypotheses (a list of {"name": ..., "path": ...})',
    "audio_duration_col": "columns.duration_seconds",
    "audio_path_col": "columns.audio",
    "common": "data.language",
    "data_path": "data.manifest",
    "decoder_layers_numbers": "student.decoder_layer_indices",
    "dev_jsonl_path": "data.dev_manifest",
    "distil_model_path": "output_dir",
    "freeze_decoder": "freeze.decoder",
    "freeze_embed_positions": "freeze.embed_positions",
    "freeze_encoder": "freeze.encoder",
    "groundtruth_col": "columns.text",
    "lang": "decoding.language",
    "lr_decay_gamma": "schedule.kind",
    "max_audio_duration": "data.max_duration_seconds",
    "max_duration_in_seconds": "data.max_duration_seconds",
    "max_label_length": "data.max_label_tokens",
    "max_sample_size": "data.max_utterances",
    "max_token_num": "data.max_label_tokens",
    "metric_col": "columns.error_rate",
    "metric_to_use": "metric.unit",
    "min_audio_duration": "data.min_duration_seconds",
    "min_duration_in_seconds": "data.min_duration_seconds",
    "min_pseudo_label_metric": "data.max_error_rate (it always was a maximum)",
    "model_name_or_path": "model.path",
    "model_path_or_name": "model.path",
    "num_train_epochs": "schedule.epochs",
    "output_col": "columns.hypothesis",
    "output_path": "output_dir",
    "output_text_col": "output_columns.hypothesis",
    "overwrite_output_dir": "resume",
    "per_device_train_batch_size": "batch.micro_batch_size",
    "processor_name_or_path": "model.processor",
    "processor_path_or_name": "model.processor",
    "resume_from_checkpoint": "resume",
    "save_dir": "output_dir",
    "student_model_decoder_layers": "student.decoder_layers",
    "student_model_dir": "output_dir",
    "student_model_encoder_layers": "student.encoder_layers",
    "student_model_path": "student.path",
    "target_col": "columns.reference",
    "target_text_col": "columns.text",
    "teacher_checkpoint": "teacher.path",
    "teacher_model_name_or_path": "teacher.path",
    "teacher_model_path_or_name": "teacher.path",
    "text_col": "columns.text",
    "text_norm": "metric.normalization",
    "train": "optimizer (and schedule, and batch)",
    "train_jsonl_path": "data.train_manifests (a list)",
    "wer_threshold": "data.max_error_rate (a ratio: 10 % is 0.1)",
}

REMOVED_KEYS = {
    "optimizer.average_decay": "since averaged weights were measured to score no better",
}


class ConfigError(Exception):
    """The config, or something that it names, cannot be used; the script ends with exit code 2."""


class StrictModel(BaseModel):
    """A config section: immutable, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _possible_paths(cls, value: object) -> object:
        for path in value if isinstance(value, list) else [value]:
            if not isinstance(path, Path):
                continue
            if reason := why_impossible(path):
                raise ValueError(reason)
            if path.parts[:1] == ("~",):
                raise ValueError('begins with "~", which only a shell knows: write the whole path')
        return value


class RunOptions(StrictModel):
    """The keys at the top of each config whose run can be continued."""

    output_dir: Path = Field(description="Folder that this run writes.")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue what is in output_dir; never: refuse if it has results."
    )
    seed: Seed = Field(0, description="Of everything that is random.")


Config = TypeVar("Config", bound=StrictModel)


def load_config(path: Path, model: type[Config]) -> Config:
    """Return the validated config in the JSON file `path`.

    Raises:
        ConfigError: the file is unreadable or not JSON, or a key is unknown, duplicate, missing,
            ill-typed or out of range; the message lists every problem, one per line.
    """
    try:
        text = read_regular_file(path, LARGEST_CONFIG).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: cannot read the config: save it in UTF-8") from None
    duplicates: list[str] = []

    def note_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        duplicates.extend(sorted(key for key, count in counts.items() if count > 1))
        return dict(pairs)

    try:
        tree = json.loads(text, object_pairs_hook=note_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets
        raise ConfigError(f"{path}: not JSON that can be read: {error}") from None
    if sentence := _of_another_script(tree, model):
        raise ConfigError(f"{path}: {sentence}")
    problems = [f'"{shortened(key)}": this key stands twice in one object' for key in duplicates]
    try:
        changed = [_drop_unused(tree), _switch_off_what_is_null(tree, model)]
        config = model.model_validate_json(json.dumps(tree) if any(changed) else text)
    except ValidationError as error:
        problems += [_explain(details, model) for details in error.errors()[:MOST_PROBLEMS]]
    if problems:
        del problems[MOST_PROBLEMS:]
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return config


def _of_another_script(tree: object, model: type[StrictModel]) -> str | None:
    """Return a sentence for a file of which this script knows less than half of the sections."""
    known = [*model.model_fields, *RENAMED_KEYS]
    unknown = [key for key in tree if key not in known] if isinstance(tree, dict) else []
    if not isinstance(tree, dict) or len(unknown) <= max(2, len(tree) / 2):
        return None
    return (
        f"is this the config of another script? Unknown here: {shortened(', '.join(unknown))}. "
        f"What this script takes: {', '.join(model.model_fields)}"
    )


def _drop_unused(tree: object) -> bool:
    """Drop removed keys that a file of an earlier version sets to null; return whether it did."""
    dropped = False
    for key in REMOVED_KEYS:
        section, _, name = key.rpartition(".")
        keys = tree.get(section) if isinstance(tree, dict) else None
        if isinstance(keys, dict) and name in keys and keys[name] is None:
            del keys[name]
            dropped = True
    return dropped


def _switch_off_what_is_null(tree: object, model: type[StrictModel]) -> bool:
    """Put the defaults in the place of a null section that has a key `enabled`, false by default.

    Returns:
        Whether there was one.
    """
    changed = False
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        if section is None or not isinstance(tree, dict) or name not in tree:
            continue
        if tree[name] is None and "enabled" in section.model_fields:
            tree[name], changed = {}, True
        else:
            changed |= _switch_off_what_is_null(tree[name], section)
    return changed


def defaults_used(config: StrictModel, prefix: str = "") -> list[str]:
    """Return "key = default" for every key that the file leaves out, for the log."""
    lines: list[str] = []
    for name in type(config).model_fields:
        value = getattr(config, name)
        if name not in config.model_fields_set:
            shown = value.model_dump_json() if isinstance(value, StrictModel) else json.dumps(value)
            lines.append(f"{prefix}{name} = {shown}")
        elif isinstance(value, StrictModel):
            lines += defaults_used(value, f"{prefix}{name}.")
    return lines


def key_paths(model: type[StrictModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted path and the field of every key that a config file can hold."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        if section := _section_of(field.annotation):
            yield from key_paths(section, f"{prefix}{name}.")


class ExplainedKey(NamedTuple):
    """A key of a config file, its type, its default in JSON (None: required) and its meaning."""

    key: str
    type: str
    default: str | None
    meaning: str


def explained_keys(model: type[StrictModel]) -> list[ExplainedKey]:
    """Return every key that a config file can hold, but for the names of sections."""
    return [
        ExplainedKey(
            path,
            _type_name(field),
            None if field.is_required() else _default_of(field),
            field.description or "",
        )
        for path, field in key_paths(model)
        if not _section_of(field.annotation) or get_origin(field.annotation) is list
    ]


def help_table(model: type[StrictModel]) -> str:
    """Return the `--help` table: every key with its type, default and meaning."""
    rows = []
    for key, kind, default, meaning in explained_keys(model):
        stated = "required" if default is None else f"default {default}"
        rows.append(f"  {key}\n      {kind}, {stated}. {meaning}".rstrip())
    return "\n".join(rows)


def _explain(details: ErrorDetails, model: type[StrictModel]) -> str:
    """Return one pydantic error as a sentence for the person who wrote the file."""
    # Members of a union add their own names to the location: keep only keys of the file.
    known = {part for path, _ in key_paths(model) for part in path.split(".")}
    parts = [
        part
        for part in details["loc"]
        if isinstance(part, int) or part in known or details["type"] == "extra_forbidden"
    ]
    path = shortened(".".join(str(part) for part in parts)) or "the file"
    kind, message = details["type"], details["msg"]
    if kind == "extra_forbidden":
        return f"{path}: unknown key{_suggest(path, model)}"
    if kind == "missing":
        return f"{path}: missing; this key is required"
    if kind in ("value_error", "assertion_error"):
        return f"{path}: {shortened(message.removeprefix('Value error, '), 1000)}"
    found = json.dumps(details["input"], ensure_ascii=False, default=str)
    return f"{path}: {shortened(message)}, found {shortened(found)}"


def shortened(text: str, longest: int = LONGEST_QUOTE) -> str:
    """Return a text, or its beginning if it is too long to be quoted in a message."""
    return text if len(text) <= longest else f"{text[:longest]} ..."


def _suggest(path: str, model: type[StrictModel]) -> str:
    """Return the end of a sentence: the new name of a retired key, or the nearest valid key."""
    section, _, name = path.rpartition(".")
    valid = [key for key, _ in key_paths(model)]
    if why := REMOVED_KEYS.get(path):
        return f": it is gone, {why}: delete the key"
    if new := RENAMED_KEYS.get(name):
        return f": it is now {_where_now(*new.split(' ', 1), valid=valid)}"
    siblings = {key.rpartition(".")[2]: key for key in valid if key.rpartition(".")[0] == section}
    if near := difflib.get_close_matches(name, siblings, n=1):
        return f'. Did you mean "{near[0]}"?'
    elsewhere = {key.rpartition(".")[2]: key for key in valid}
    if near := difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8):
        return f'. Did you mean "{elsewhere[near[0]]}"?'
    return f". Valid here: {', '.join(siblings)}" if siblings else ""


def _where_now(new: str, hint: str = "", *, valid: list[str]) -> str:
    """Return the places of a renamed key in this script's config, which can be other sections."""
    found = [key for key in valid if f".{key}".endswith(f".{new}")]
    if not found and not new.startswith(ONLY_THERE):
        found = [key for key in valid if key.rpartition(".")[2] == new.rpartition(".")[2]]
    depth = min((key.count(".") for key in found), default=0)
    keys = [f'"{key}"' for key in found if key.count(".") == depth]
    places = " or ".join(keys) or f'"{new}" of another script'
    return f"{places} {hint}".rstrip()


def _section_of(annotation: object) -> type[StrictModel] | None:
    """Return the section in `Section`, `Section | None` or `list[Section]`, else None."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation if issubclass(annotation, StrictModel) else None
    sections = [_section_of(argument) for argument in get_args(annotation)]
    return next((section for section in sections if section), None)


def _default_of(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    assert default is not PydanticUndefined
    return json.dumps(default, default=str)


def _type_name(field: FieldInfo) -> str:
    """Return a field's type in JSON's words, with its bounds: "number > 0", "string or null"."""
    return " ".join([_json_type(field.annotation), *_bounds(field.metadata)])


def _bounds(rules: list[Any]) -> list[str]:
    bounds = []
    for rule in rules:
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if isinstance(rule, Gt | Ge | Lt | Le | Interval) and (
                (bound := getattr(rule, name, None)) is not None
            ):
                bounds.append(f"{sign} {bound}")
        if isinstance(rule, MinLen | Len) and rule.min_length:
            bounds.append(f"at least {rule.min_length}")
    return bounds


def _json_type(annotation: object) -> str:
    if get_origin(annotation) is Annotated:
        inner, *fields = get_args(annotation)
        rules = [rule for field in fields for rule in getattr(field, "metadata", [field])]
        return " ".join([_json_type(inner), *_bounds(rules)])
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_json_type(argument) for argument in get_args(annotation))
    if get_origin(annotation) is Literal:
        return " | ".join(json.dumps(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (list, tuple):
        return f"list of {_json_type(get_args(annotation)[0])}"
    names = {str: "string", Path: "path", int: "integer", float: "number", bool: "true | false"}
    if annotation is type(None):
        return "null"
    return names.get(annotation, "object")  # type: ignore[call-overload, no-any-return]
