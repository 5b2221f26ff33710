"""Labelled rows, and what training makes of them with a small tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import make_tokenizer, write_rows, write_tone

from simpler_distil_whisper.data.manifest import read_manifest
from simpler_distil_whisper.model.folder import ModelFolder
from simpler_distil_whisper.model.special_tokens import SpecialTokens, special_tokens
from simpler_distil_whisper.training.filters import ExampleFilter
from simpler_distil_whisper.training.options import TrainingData
from simpler_distil_whisper.training.plan import Visit
from simpler_distil_whisper.training.selection import Selection, select_examples
from simpler_distil_whisper.training.tokens import (
    DecoderTokens,
    Example,
    LabelTokenizer,
    VisitTokens,
)

WINDOW = 2
# The tokenizer's 256 bytes come first: those that print by their value, then the others.
END, START, ZH, EN, TRANSLATE, TRANSCRIBE, NO_TIMESTAMPS = 256, 257, 258, 259, 260, 261, 265
PREVIOUS, TIME = 263, 266  # <|startofprev|>, <|0.00|>
NI_HAO = [160, 121, 254, 161, 98, 121]  # 你好: E4 BD A0, E5 A5 BD
HI = [39, 72]
NEVER, ALWAYS = {"timestamp_probability": 0.0}, {"timestamp_probability": 1.0}

Select = Callable[..., Selection]


def make_special_tokens(*languages: str) -> SpecialTokens:
    config = {"vocab_size": 400, "max_target_positions": 448, "max_source_positions": 50 * WINDOW}
    folder = ModelFolder(Path("m"), Path("m"), config, frozenset(languages))
    return special_tokens(make_tokenizer(["zh", "en"], WINDOW), folder)


def make_select(folder: Path) -> Select:
    """Return what passes rows through the filters of a `data` section; a.wav holds 1 s."""

    def passed(
        *rows: dict[str, Any] | str, english_only: bool = False, positions: int = 448, **data: Any
    ) -> Selection:
        path = write_rows(folder / "train.jsonl", list(rows))
        section = TrainingData(train_manifests=[path], **data)
        tokenizer = make_tokenizer(["zh", "en"], WINDOW)
        tokens = make_special_tokens(*(() if english_only else ("zh", "en")))
        filters = ExampleFilter(
            section, LabelTokenizer(tokenizer, tokens, positions), float(WINDOW)
        )
        return select_examples([read_manifest(path, section.columns)], filters)

    write_tone(folder / "a.wav", 1.0)
    return passed


def row(**fields: Any) -> dict[str, Any]:
    return {"audio": "a.wav", "text": "你好", "language": "zh", **fields}


def timed_row(*segments: tuple[float, float | None, str], **fields: Any) -> dict[str, Any]:
    text = "".join(text for _, _, text in segments)
    rows = [{"start_seconds": s, "end_seconds": e, "text": text} for s, e, text in segments]
    return row(**{"text": text, "language": "en", "segments": rows, **fields})


def visits_to(*examples: int, use: int = 0) -> list[Visit]:
    return [Visit(example, 100 * use + example, use) for example in examples]


def make_visit_tokens(examples: list[Example], positions: int = 448, **data: Any) -> VisitTokens:
    section = TrainingData(train_manifests=[Path("p")], **data)
    return VisitTokens(examples, section, make_special_tokens("zh", "en"), positions, 0)


def decoder_tokens(examples: list[Example]) -> list[DecoderTokens]:
    return [DecoderTokens(example.tokens, example.prompt_length) for example in examples]
