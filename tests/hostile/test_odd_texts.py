"""Any text, from any file or any model: it is compared, learnt from or shown, or refused by name.

The texts are random and seeded: a failing test prints the seed.
"""

import importlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from random import Random

import pytest
from conftest import REPOSITORY
from tiny import make_tokenizer, read_rows, write_rows
from training_data import make_special_tokens

from simpler_distil_whisper.data.jsonl import RowError, parse_row
from simpler_distil_whisper.decoding.subtitles import FileNames, cues_of, srt, vtt
from simpler_distil_whisper.evaluation.metrics import Metric, Scorer, align, count_edits
from simpler_distil_whisper.labels.filters import BROKEN_CHARACTER
from simpler_distil_whisper.script import run_script
from simpler_distil_whisper.terminal import VisibleFormatter, visible_in_line
from simpler_distil_whisper.text.languages import join_texts, tokens
from simpler_distil_whisper.text.normalization import (
    INVISIBLE,
    TextNormalization,
    make_normalizer,
)
from simpler_distil_whisper.text.numerals import with_digits
from simpler_distil_whisper.training.tokens import Dropped, LabelTokenizer, learnt_text

SECONDS_FOR_ONE = 5.0  # of processor time
LANGUAGES = (None, "zh", "zh-TW", "yue", "ja", "ko", "en", "de", "th", "ar", "klingon", "")
# First and last code points of what a text may be drawn from.
RANGES = [
    (0, 0x1F),
    (0x20, 0x7E),
    (0x80, 0x24F),
    (0x300, 0x36F),
    (0x590, 0x6FF),
    (0x900, 0xDFF),
    (0x1100, 0x11FF),
    (0x2000, 0x206F),
    (0x3000, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xD800, 0xDFFF),
    (0xE000, 0xF8FF),
    (0xFE00, 0xFFFF),
    (0x10000, 0x10FFFF),
    (0x1D100, 0x1D1FF),
    (0x1F300, 0x1FAFF),
    (0x20000, 0x2FA1F),
    (0xE0000, 0xE01FF),
]
WORDS = """
<|endoftext|> <|startoftranscript|> <|zh|> <|0.00|> <|nospeech|> <| </script> <script>alert(1)
<!-- ]]> {{x}} {%x%} &amp; " ' --> \\ \\u0000 %s {} NaN null 二十三 一億 万万万 ۱۲۳ ½ ² Ⅷ 1e999
1.2.3 $5 £ % don't won't O'Neil ﬁ ß İ ı ſ ǆ ㌔ ﷽ 🏳️‍🌈 👩‍👩‍👧 e\u0301 \u200f \u202e \ufeff \x1b[2J
""".split()  # noqa: SIM905


def odd_text(seed: int) -> str:
    random = Random(seed)
    kind = random.randrange(12)
    if kind == 0:
        return random.choice(["", " ", "\0", "\n" * 9, "\u200b", "\ud800", "\udc80x", "\u3000"])
    if kind == 1:  # one thing many times
        return random.choice([*WORDS, odd_character(random), "零"]) * random.choice([300, 3_000])
    pieces = [
        random.choice(WORDS) if random.random() < 0.3 else odd_word(random)
        for _ in range(random.choice([1, 3, 10, 60]))
    ]
    text = random.choice(["", " ", " ", "\n", "\u3000"]).join(pieces)
    # Two halves that stand side by side are one character.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def odd_word(random: Random) -> str:
    ranges = random.choices(RANGES, k=random.choice([1, 1, 3]))
    return "".join(
        chr(random.randint(*random.choice(ranges))) for _ in range(random.choice([1, 4, 12]))
    )


def odd_character(random: Random) -> str:
    return chr(random.randint(*random.choice(RANGES)))


@pytest.fixture(scope="module")
def tokenizer() -> LabelTokenizer:
    return LabelTokenizer(make_tokenizer(["zh", "en"]), make_special_tokens("zh", "en"), 448)


def check(tokenizer: LabelTokenizer, seeds: Iterable[int]) -> None:
    for seed in seeds:
        before = time.process_time()
        text, other = odd_text(seed), odd_text(seed + 1)
        check_what_is_shown(text, seed)
        if is_usable(text, seed) and is_usable(other, seed):
            check_comparison(text, other, seed)
            check_label(tokenizer, text, seed)
        assert time.process_time() - before < SECONDS_FOR_ONE, seed


def is_usable(text: str, seed: int) -> bool:
    """Return whether a row with this text is read; it is then read as it is."""
    try:
        assert parse_row(json.dumps({"text": text}).encode())["text"] == text, seed
    except RowError as error:
        assert "half a character" in str(error), seed
        assert re.search("[\ud800-\udfff]", text), seed
        return False
    return True


def check_comparison(reference: str, hypothesis: str, seed: int) -> None:
    random = Random(seed)
    language = random.choice(LANGUAGES)
    options = TextNormalization(
        unicode=random.choice(["NFC", "NFKC", None]),
        chinese_script=random.choice(["auto", "simplified", "traditional", None]),
        whisper=random.choice(["auto", "english", "basic", None]),
        fillers=random.choice([[], ["um", "嗯", "."]]),
        numerals=random.random() < 0.5,
    )
    normalized = make_normalizer(options)(reference, language)
    assert make_normalizer(options)(reference, language) == normalized, seed
    scorer = Scorer(Metric(unit=random.choice(["auto", "word", "mixed"]), normalization=options))
    unit = scorer.unit(normalized, scorer.normalize(hypothesis, language), language)
    counts = scorer.count(reference, hypothesis, language)
    assert counts.reference_tokens == len(tokens(normalized, unit)), seed
    assert scorer.count(reference, reference, language).errors == 0, seed
    edits = align(reference, hypothesis, unit)
    assert count_edits(edits).reference_tokens == len(tokens(reference, unit)), seed


def check_label(tokenizer: LabelTokenizer, text: str, seed: int) -> None:
    """Tokens are those of the text and no others; commands and broken characters are refused."""
    try:
        ids = tokenizer(text)
    except Dropped as error:
        learnt = learnt_text(text)
        if BROKEN_CHARACTER in learnt:
            assert "the label holds U+FFFD" in str(error), seed
        else:
            assert "<|" in INVISIBLE.sub("", learnt), seed
            assert "which is no speech" in str(error), seed
        return
    assert BROKEN_CHARACTER not in learnt_text(text), seed
    assert tokenizer.tokenizer.decode(ids) == learnt_text(text), seed
    join_texts([text, text])
    with_digits(text)


def check_what_is_shown(text: str, seed: int) -> None:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "%s: %s", (text, [text]), None)
    shown = VisibleFormatter().format(record)
    for line in (shown, visible_in_line(text)):
        line.encode()
        assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", line), seed
    segment = {"start_seconds": 0.0, "end_seconds": 2.0, "text": text}
    for subtitles in (srt(cues_of([segment])), vtt(cues_of([segment]))):
        assert subtitles.count("-->") == len(cues_of([segment])), seed
    if is_usable(text, seed):
        name = FileNames().new(text, 7)
        assert name, seed
        assert not {"/", "\0"} & set(name), seed
        assert len(os.fsencode(name)) <= 250, seed


def test_odd_texts_are_compared_learnt_and_shown(tokenizer: LabelTokenizer) -> None:
    check(tokenizer, range(100))


@pytest.mark.slow
def test_many_odd_texts_are_compared_learnt_and_shown(tokenizer: LabelTokenizer) -> None:
    first = int(os.environ.get("SDW_SEED", "1000"))
    check(tokenizer, range(first, first + int(os.environ.get("SDW_INPUTS", "1500"))))


def page_of(folder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Evaluate hypotheses of these texts; return the page."""
    rows = [
        {"id": text + str(n), "text": text, "hypothesis": text, "language": "zh"}
        for n, text in enumerate(texts)
    ]
    write_rows(folder / "rows.jsonl", [{**row, "speaker": row["text"][:60]} for row in rows])
    config = json.loads((REPOSITORY / "eval.json").read_text(encoding="utf-8"))
    config |= {"output_dir": "out", "hypotheses": [{"name": "</td>{{", "path": "rows.jsonl"}]}
    config["columns"] |= {"speaker": "speaker", "audio": None, "duration_seconds": None}
    config["bootstrap_samples"] = 100
    (folder / "eval.json").write_text(json.dumps(config))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["eval.py", "eval.json"])
    module = importlib.import_module("eval")
    assert run_script("eval", None, module.Config, module.prepare, module.work, overwrite=True) == 0
    assert len(read_rows(folder / "out/utterances.jsonl")) == len(texts)
    return (folder / "out/report.html").read_text(encoding="utf-8")


def test_a_report_of_odd_texts_has_no_other_elements_than_one_of_plain_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = [text for text in map(odd_text, range(60)) if is_usable(text, 0)]
    elements = [
        set(re.findall(r"<([/!]?[a-zA-Z-][^\s>]*)", page_of(tmp_path, texts, monkeypatch)))
        for texts in (odd, [f"第{number}句" for number in range(len(odd))])
    ]
    assert elements[0] == elements[1]
    assert "script" in elements[0]
    shown = capsys.readouterr()
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown.out + shown.err)
