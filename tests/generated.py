"""The tokens of transformers' own `generate`, as an oracle."""

import copy

from torch import Tensor

from simpler_distil_whisper.model.whisper import Whisper


def never_text(whisper: Whisper) -> list[int]:
    """What greedy decoding must not choose: the model's own list, and special tokens but end."""
    special = set(range(whisper.tokens.start, len(whisper.tokenizer)))
    return sorted(special | set(whisper.model.generation_config.suppress_tokens))


def generated_tokens(
    whisper: Whisper,
    features: Tensor,
    languages: list[str | None],
    max_new_tokens: int,
    *,
    beams: int = 1,
    timestamps: bool = False,
) -> list[list[int]]:
    """The oracle: `generate`, one pass, with nothing but text and timestamps to choose from."""
    settings = copy.deepcopy(whisper.model.generation_config)
    times = set(whisper.tokens.timestamps) if timestamps else set()
    settings.suppress_tokens = sorted(set(never_text(whisper)) - times)
    spoken = {"language": [f"<|{code}|>" for code in languages], "task": "transcribe"}
    ids = whisper.model.generate(
        features,
        generation_config=settings,
        max_new_tokens=max_new_tokens,
        force_unique_generate_call=True,
        do_sample=False,
        num_beams=beams,
        return_timestamps=timestamps,
        **(spoken if whisper.tokens.languages else {}),
    )
    end, times = whisper.tokens.end, whisper.tokens.timestamps
    return [[id for id in row if id < end or id in times] for row in ids.tolist()]
