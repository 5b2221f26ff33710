"""Finds the decoder's cross-attention heads that follow the speech, for word timestamps.

The synthesizer's own timing tells when each character or word is spoken, so every head can be
scored by the distance of its centre of attention from the middle of the unit.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor

from demo.acoustics import SAMPLE_RATE
from demo.corpus import ENCODER_FRAMES_PER_SECOND, Clip, draw_clip

_CLIPS = 60
_HEADS = 4


def attention_errors(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, clip: Clip
) -> np.ndarray:
    """Returns the seconds between each head's attention and the speech: (layer, head, unit)."""
    tokenizer = processor.tokenizer
    prefix = tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", f"<|{clip.language}|>", "<|transcribe|>", "<|notimestamps|>"]
    )
    ids, rows = list(prefix), []
    for unit, _, _ in clip.units:
        # The row that predicts a token is the one before it.
        rows.append(len(ids) - 1)
        ids += tokenizer(unit, add_special_tokens=False).input_ids
    features = processor.feature_extractor(
        clip.waveform, sampling_rate=SAMPLE_RATE, return_tensors="pt"
    ).input_features
    with torch.no_grad():
        output = model(features, decoder_input_ids=torch.tensor([ids]), output_attentions=True)
    attention = torch.cat(output.cross_attentions)[:, :, rows]
    seconds = torch.arange(attention.shape[-1]) / ENCODER_FRAMES_PER_SECOND
    centres = (attention * seconds).sum(-1) / attention.sum(-1)
    middles = torch.tensor([(start + end) / 2 for _, start, end in clip.units])
    return (centres - middles).abs().numpy()


def main() -> None:
    """Writes the best alignment heads into a model folder's generation settings."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = WhisperForConditionalGeneration.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = WhisperProcessor.from_pretrained(args.model)
    rng = random.Random("alignment heads")
    clips = [draw_clip(("zh", "en")[k % 2], "dev", rng) for k in range(_CLIPS)]
    errors = np.concatenate([attention_errors(model, processor, clip) for clip in clips], axis=-1)
    errors = np.median(errors, axis=-1)
    best = np.argsort(errors, axis=None)[:_HEADS]
    layers, heads = np.unravel_index(best, errors.shape)
    chosen = sorted([int(layer), int(head)] for layer, head in zip(layers, heads, strict=True))
    config = GenerationConfig.from_pretrained(args.model)
    config.alignment_heads = chosen
    config.save_pretrained(args.model)
    print(f"median error in seconds by layer and head:\n{errors.round(3)}\nchosen: {chosen}")


if __name__ == "__main__":
    main()
