"""The JSON files of a model folder: those of their keys that this project relies on, checked.

Owns what a key must be like, so that a wrong value is named before anything is loaded. Other keys
are left to transformers. It knows nothing of weights but their sizes, which it is given.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    ValidationInfo,
)
from tokenizers import Tokenizer

from simpler_distil_whisper.config import ConfigError, NonNegativeFloat, NonNegativeInt, Ratio
from simpler_distil_whisper.files import open_regular_file
from simpler_distil_whisper.text.languages import WHISPER_LANGUAGES

TIMESTAMP = re.compile(r"<\|\d+\.\d\d\|>")
# Whisper's own tokens besides languages and timestamps; tokenizers of early folders do not mark
# each of them as special.
OWN_TOKENS = frozenset(
    f"<|{name}|>"
    for name in (
        *("endoftext", "startoftranscript", "translate", "transcribe", "startoflm"),
        *("startofprev", "nospeech", "nocaptions", "notimestamps", *WHISPER_LANGUAGES),
    )
)
NO_SIZES: Mapping[str, int] = MappingProxyType({})


def _known_token(id: int, info: ValidationInfo) -> int:
    size = (info.context or {}).get("vocab_size")
    if size is not None and id >= size:
        raise ValueError(f"is beyond the vocabulary, whose last token is {size - 1}")
    return id


def _fits_width(heads: int, info: ValidationInfo) -> int:
    width = (info.context or {}).get("d_model", 0)
    if width % heads:
        raise ValueError(f"does not divide d_model, which is {width}")
    return heads


def _as_list(value: object) -> object:
    """Return a list: `eos_token_id` may be null, an id or several."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


TokenId = Annotated[NonNegativeInt, AfterValidator(_known_token)]
OneOrMore = Annotated[list[TokenId], BeforeValidator(_as_list)]
Heads = Annotated[int, Field(gt=0), AfterValidator(_fits_width)]


class SettingsFile(BaseModel):
    """The keys of a file that are relied on; any others may stand beside them."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class TokenSettings(SettingsFile):
    """Ids that stood in config.json before there was a generation_config.json."""

    bos_token_id: TokenId | None = None
    eos_token_id: OneOrMore = []
    pad_token_id: TokenId | None = None
    decoder_start_token_id: TokenId | None = None
    suppress_tokens: list[TokenId] | None = None
    begin_suppress_tokens: list[TokenId] | None = None


class ConfigSettings(TokenSettings):
    """config.json; its sizes are compared with the weights instead."""

    encoder_attention_heads: Heads
    decoder_attention_heads: Heads
    activation_function: str = "gelu"
    dropout: Ratio = 0.0
    attention_dropout: Ratio = 0.0
    activation_dropout: Ratio = 0.0
    encoder_layerdrop: Ratio = 0.0
    decoder_layerdrop: Ratio = 0.0
    scale_embedding: bool = False
    tie_word_embeddings: bool = True
    torch_dtype: str | None = None
    dtype: str | None = None
    transformers_weights: None = None  # it would load these instead of the weights looked at here


class GenerationSettings(TokenSettings):
    """generation_config.json.

    Attributes:
        lang_to_id: "<|zh|>" -> id.
        alignment_heads: pairs of decoder layer and head; students have been published with those of
            their teacher, so a layer may be one that the model does not have.
    """

    is_multilingual: bool | None = None
    lang_to_id: dict[str, TokenId] | None = None
    task_to_id: dict[str, TokenId] | None = None
    no_timestamps_token_id: TokenId | None = None
    prev_sot_token_id: TokenId | None = None
    max_initial_timestamp_index: NonNegativeInt | None = None
    alignment_heads: (
        list[Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]] | None
    ) = None


class FeatureSettings(SettingsFile):
    """The feature extractor: every Whisper takes 16 kHz and a log-mel frame each 10 ms."""

    feature_size: int = 80
    chunk_length: int = 30
    sampling_rate: Literal[16_000] = 16_000
    hop_length: Literal[160] = 160
    n_fft: Literal[400] = 400
    padding_value: Annotated[float, Field(ge=0, le=0)] = 0.0  # silence
    dither: NonNegativeFloat = 0.0
    return_attention_mask: bool = False


class Vocabulary(RootModel[dict[str, NonNegativeInt]]):
    """vocab.json, or added_tokens.json: token -> id."""


class AddedToken(SettingsFile):
    """A token of tokenizer_config.json."""

    content: str
    special: bool = False


class AddedTokens(SettingsFile):
    """tokenizer_config.json: tokens that transformers adds to those of the other files."""

    added_tokens_decoder: dict[Annotated[int, Field(ge=0, strict=False)], AddedToken] = {}


class NumberedToken(AddedToken):
    """A token of tokenizer.json."""

    id: NonNegativeInt


class Tokens(SettingsFile):
    """tokenizer.json: the tokens that are no part of its model."""

    added_tokens: list[NumberedToken] = []


Settings = TypeVar("Settings", bound=BaseModel)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        with open_regular_file(path) as file:
            content = json.loads(file.read().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return content


def checked(
    kind: type[Settings], content: object, path: Path, sizes: Mapping[str, int] = NO_SIZES
) -> Settings:
    """Return the settings in a file's content.

    Args:
        kind: what the file holds.
        content: what was read from it.
        path: the file, for the message.
        sizes: of the weights; empty: not known, so that ids and heads are not held to them.

    Raises:
        ConfigError: a key has a wrong value; each stands in a line of its own.
    """
    try:
        return kind.model_validate(content, context=dict(sizes))
    except ValidationError as error:
        problems = []
        for details in error.errors():
            place = ".".join(map(str, details["loc"])) or "the file"
            message = f"{details['msg']}; it is {details['input']!r:.60}"
            if details["type"] == "missing":
                message = "is missing"
            problems.append(f"{path}: {place}: {message.removeprefix('Value error, ')}")
        raise ConfigError("\n".join(problems)) from None


def read_features(folder: Path) -> FeatureSettings:
    """Return the settings of a folder's feature extractor, from the file that transformers uses.

    Raises:
        ConfigError: they are missing or wrong.
    """
    whole = folder / "processor_config.json"
    part = read_json(whole).get("feature_extractor") if whole.is_file() else None
    if part is not None:
        return checked(FeatureSettings, part, whole)
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise ConfigError(f"{whole} holds no feature_extractor, and there is no {path.name}")
    return checked(FeatureSettings, read_json(path), path)


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Return token -> id of a folder's tokenizer, added tokens included.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    whole = folder / "tokenizer.json"
    vocabulary: dict[str, int] = {}
    for name in ("vocab.json", "added_tokens.json"):
        if (folder / name).is_file() and not (name == "vocab.json" and whole.is_file()):
            content = read_json(folder / name)
            vocabulary |= checked(Vocabulary, content, folder / name).root
    if (path := folder / "tokenizer_config.json").is_file():
        added = checked(AddedTokens, read_json(path), path).added_tokens_decoder
        vocabulary |= {token.content: id for id, token in added.items()}
    if whole.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(whole))
        except Exception as error:  # tokenizers raises no other class
            raise ConfigError(f"{whole} holds no tokenizer that can be read: {error}") from None
        # Another name of a special token, such as <|nocaptions|>, moves no ids.
        named = tokenizer.get_added_tokens_decoder()
        vocabulary = {token: id for token, id in vocabulary.items() if id not in named}
        vocabulary |= tokenizer.get_vocab()
    return vocabulary


def is_added_word(token: str, special: bool) -> bool:
    """Return whether people have added a token to be text, such as a name.

    Args:
        token: one of the added tokens of a tokenizer.
        special: whether the tokenizer marks it as special.
    """
    return not special and token not in OWN_TOKENS and not TIMESTAMP.fullmatch(token)


def read_added_words(folder: Path, end: int) -> list[str]:
    """Return the words that people have added to a folder's tokenizer, behind the end token.

    Raises:
        ConfigError: a file is damaged.
    """
    return [
        token.content
        for id, token in sorted(_read_added_tokens(folder).items())
        if id > end and is_added_word(token.content, token.special)
    ]


def _read_added_tokens(folder: Path) -> dict[int, AddedToken]:
    """Return id -> token of those that are no part of the tokenizer's model."""
    if (path := folder / "tokenizer.json").is_file():
        return {token.id: token for token in checked(Tokens, read_json(path), path).added_tokens}
    tokens: dict[int, AddedToken] = {}
    # Whisper's tokenizer of transformers 4 saves no tokenizer.json, but these.
    if (path := folder / "added_tokens.json").is_file():
        ids = checked(Vocabulary, read_json(path), path).root
        tokens |= {id: AddedToken(content=content) for content, id in ids.items()}
    if (path := folder / "tokenizer_config.json").is_file():
        tokens |= checked(AddedTokens, read_json(path), path).added_tokens_decoder
    return tokens
