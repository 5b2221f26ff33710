"""The generation config that a Whisper needs in transformers' `generate`, whatever a folder has."""

import copy

from transformers import GenerationConfig, WhisperForConditionalGeneration

from simpler_distil_whisper.model.special_tokens import SpecialTokens
from simpler_distil_whisper.run import log

SETTINGS_OF_SAMPLING = (
    *("temperature", "top_k", "top_p", "top_h", "min_p"),
    *("typical_p", "epsilon_cutoff", "eta_cutoff"),
)


def completed_generation_config(
    model: WhisperForConditionalGeneration, tokens: SpecialTokens
) -> GenerationConfig:
    """Return a copy of the model's generation config, complete and without forced ids.

    A folder without `generation_config.json`, or one saved by an early version, lacks the ids by
    which `generate(language=...)` works. Forced ids, which old checkpoints have, would silently
    override the requested language.
    """
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    config._from_model_config = False  # else transformers drops these additions when it reloads
    config.forced_decoder_ids = None
    if hasattr(model.config, "forced_decoder_ids"):
        model.config.forced_decoder_ids = None
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if getattr(config, name, None) is None:
            setattr(config, name, getattr(model.config, name, None))
    _keep_existing_heads(config, model)
    _drop_unused_settings(config)
    if config.max_length is None:  # else transformers stops after 20 tokens
        config.max_length = model.config.max_target_positions
    stated = config.eos_token_id
    if tokens.end not in (stated if isinstance(stated, list) else [stated]):
        config.eos_token_id = tokens.end  # else `generate` would go on after the end of a text
    config.decoder_start_token_id = tokens.start
    config.prev_sot_token_id = tokens.previous
    config.no_timestamps_token_id = tokens.no_timestamps
    config.is_multilingual = bool(tokens.languages)
    if tokens.languages:
        config.lang_to_id = {f"<|{code}|>": id for code, id in tokens.languages.items()}
        tasks = {"transcribe": tokens.transcribe, "translate": tokens.translate}
        config.task_to_id = {task: id for task, id in tasks.items() if id is not None}
    return config


def _drop_unused_settings(config: GenerationConfig) -> None:
    """Drop settings of sampling where nothing is sampled, and the like: of no effect in `generate`.

    transformers reads such a config, but refuses to write it.
    """
    unused: tuple[str, ...] = ()
    if config.do_sample is not True:
        unused += SETTINGS_OF_SAMPLING
    if config.num_beams in (None, 1):
        unused += ("early_stopping", "length_penalty")
    if config.return_dict_in_generate is not True:
        unused += ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
    for name in unused:
        setattr(config, name, None)


def _keep_existing_heads(config: GenerationConfig, model: WhisperForConditionalGeneration) -> None:
    """Drop alignment heads that the model lacks: students were published with their teacher's."""
    stated = getattr(config, "alignment_heads", None)
    if not stated:
        return
    layers, heads = model.config.decoder_layers, model.config.decoder_attention_heads
    kept = [[layer, head] for layer, head in stated if layer < layers and head < heads]
    if len(kept) < len(stated):
        log.warning(
            "alignment_heads: %d of %d are not in this model", len(stated) - len(kept), len(stated)
        )
        config.alignment_heads = kept or None
