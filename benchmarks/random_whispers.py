"""Whispers of the released shapes with random weights, which predict a fixed number of tokens.

It means nothing when a random model predicts its end token. So the end token and all others that
are not text are given logits that never win: all systems then decode exactly as many tokens as
requested, without an option that some of them may lack.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from simpler_distil_whisper.text.languages import WHISPER_LANGUAGES

END = 50_257  # the first special token of every multilingual Whisper
NEVER = -100.0  # a logit below all others, and small enough for bfloat16 and int8
SILENT_CHANNEL = 0  # of the decoder's last states: always 1, so that it can carry a bias
# As many tokens as openai/whisper's list of symbols that are never spoken.
SUPPRESSED = tuple(range(1, 50_000, 570))


@dataclass(frozen=True)
class Shape:
    """A released Whisper's sizes."""

    width: int
    layers: int
    heads: int
    mels: int = 80
    languages: int = 99

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows: 51,865 for tiny to large-v2."""
        return END + 2 + self.languages + 6 + 1501


SHAPES = {
    "tiny": Shape(384, 4, 6),
    "base": Shape(512, 6, 8),
    "small": Shape(768, 12, 12),
    "large-v3": Shape(1280, 32, 20, mels=128, languages=100),
}


def write_random_whisper(folder: Path, shape: Shape, device: torch.device) -> None:
    """Write a complete model folder of a shape: float32 weights, tokenizer, feature extractor."""
    tokenizer = _tokenizer(shape)
    ids = tokenizer.get_vocab()
    prompt = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    torch.manual_seed(0)
    with device:
        model = WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=shape.vocabulary,
                num_mel_bins=shape.mels,
                d_model=shape.width,
                encoder_layers=shape.layers,
                decoder_layers=shape.layers,
                encoder_attention_heads=shape.heads,
                decoder_attention_heads=shape.heads,
                encoder_ffn_dim=4 * shape.width,
                decoder_ffn_dim=4 * shape.width,
                pad_token_id=END,
                bos_token_id=END,
                eos_token_id=END,
                decoder_start_token_id=END + 1,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        )
    _never_stop(model, [ids[token] for token in prompt])
    model.generation_config = GenerationConfig(
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=END + 1,
        is_multilingual=True,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        suppress_tokens=[*SUPPRESSED, *(ids[token] for token in prompt)],
        begin_suppress_tokens=[220, END],
        alignment_heads=[[shape.layers - 1, 0]],
        max_length=448,
        lang_to_id={f"<|{code}|>": ids[f"<|{code}|>"] for code in _languages(shape)},
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=shape.mels).save_pretrained(folder)


@torch.no_grad()
def _never_stop(model: WhisperForConditionalGeneration, prompt: list[int]) -> None:
    """Give all tokens that are not text a logit of -100, those of the prompt excepted.

    The prompt's embeddings are also what the decoder reads: they stay as they are, and the
    generation config suppresses these four.
    """
    decoder = model.model.decoder
    decoder.layer_norm.weight[SILENT_CHANNEL] = 0.0
    decoder.layer_norm.bias[SILENT_CHANNEL] = 1.0
    embeddings = decoder.embed_tokens.weight
    embeddings[:, SILENT_CHANNEL] = 0.0
    kept = embeddings[prompt].clone()
    embeddings[END:] = 0.0
    embeddings[END:, SILENT_CHANNEL] = NEVER
    embeddings[prompt] = kept
    # Else it would repeat one token, and predict the same tokens for all audio.
    decoder.embed_positions.weight.mul_(10.0)
    for layer in decoder.layers:
        layer.encoder_attn.q_proj.weight.mul_(10.0)
        layer.encoder_attn.out_proj.weight.mul_(10.0)


def _languages(shape: Shape) -> list[str]:
    return list(WHISPER_LANGUAGES)[: shape.languages]


def _tokenizer(shape: Shape) -> WhisperTokenizer:
    """Return a tokenizer of the real size and order whose words are "w256", "w257", and so on."""
    texts = [*sorted(ByteLevel.alphabet()), *(f"Ġw{number}" for number in range(256, END))]
    end = AddedToken("<|endoftext|>", special=True, normalized=False)
    tokenizer = WhisperTokenizer(
        vocab={text: number for number, text in enumerate(texts)}, merges=[], pad_token=end
    )
    languages = [f"<|{code}|>" for code in _languages(shape)]
    tasks = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>"]
    names = ["<|startoftranscript|>", *languages, *tasks, "<|nospeech|>", "<|notimestamps|>"]
    specials = [AddedToken(name, special=True, normalized=False) for name in names]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    times = [f"<|{step * 0.02:.2f}|>" for step in range(1501)]
    tokenizer.add_tokens([AddedToken(time, special=False, normalized=False) for time in times])
    assert len(tokenizer) == shape.vocabulary
    return tokenizer
