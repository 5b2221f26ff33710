"""Recorded steps against the same steps computed anew.

On a CPU they are recorded as a graph of torch's operations, which like a CUDA graph has fixed
shapes and places, and to which no Python state gets through.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import make_corpus, read_rows
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.features import log_mel
from simpler_distil_whisper.decoding.cached_decoder import CachedDecoder, KeyValueCache
from simpler_distil_whisper.decoding.hypothesis import Hypothesis
from simpler_distil_whisper.decoding.recorded_steps import RecordingDecoder, Step, fastest_decoder
from simpler_distil_whisper.decoding.transcriber import Transcriber
from simpler_distil_whisper.model.options import DecodingOptions
from simpler_distil_whisper.model.whisper import Whisper

UTTERANCES = 8
LANGUAGES = ["zh", "en", "ja", "zh", "en", "ja", "zh", "en"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, whisper: Whisper) -> Tensor:
    folder = tmp_path_factory.mktemp("corpus")
    rows = read_rows(make_corpus(folder, UTTERANCES))
    return log_mel([load_audio(folder / row["audio"]) for row in rows], whisper.feature_extractor)


class Recorder:
    """Records steps, and counts how often they are replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step: Step) -> Step:
        graph = make_fx(step)()
        self.recorded += 1

        def replay() -> Tensor:
            self.replayed += 1
            output: Tensor = graph()
            return output

        return replay


def transcribed(
    whisper: Whisper,
    features: Tensor,
    record: Callable[[Step], Step] | None,
    rows: int = UTTERANCES,
    **options: Any,
) -> list[Hypothesis]:
    transcriber = Transcriber(whisper, DecodingOptions(**options))
    if record:
        transcriber.decoder = RecordingDecoder(whisper.model, rows, record)
    languages = LANGUAGES[: len(features)]
    # Twice: the second batch finds the memory and the recordings of the first one.
    first = transcriber(features.flip(0), languages, keys=range(len(features)))
    return first + transcriber(features, languages, keys=range(len(features)))


@pytest.mark.parametrize(
    "options",
    [
        {"timestamps": True},
        pytest.param(
            {"temperatures": [0.0, 0.4], "log_probability_threshold": -1e-3},
            marks=pytest.mark.slow,
        ),
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"prompt": "w300 w301 w302"}, marks=pytest.mark.slow),
    ],
)
def test_recorded_steps_change_no_token(
    whisper: Whisper, features: Tensor, options: dict[str, Any]
) -> None:
    options = {**options, "max_new_tokens": 40}
    recorder = Recorder()
    recorded = transcribed(whisper, features, recorder, **options)
    computed = transcribed(whisper, features, None, **options)
    assert [h.token_ids for h in recorded] == [h.token_ids for h in computed]
    for one, other in zip(recorded, computed, strict=True):
        assert one.average_log_probability == pytest.approx(other.average_log_probability, abs=1e-5)
        assert one.no_speech_probability == pytest.approx(other.no_speech_probability, abs=1e-6)
    assert len({h.token_ids for h in computed}) > 4
    assert recorder.replayed > 10 * recorder.recorded > 0


@pytest.mark.slow
def test_only_the_last_rows_of_a_batch_are_recorded(whisper: Whisper, features: Tensor) -> None:
    recorder = Recorder()
    recorded = transcribed(whisper, features, recorder, rows=4)
    assert [h.token_ids for h in recorded] == [
        h.token_ids for h in transcribed(whisper, features, None)
    ]
    expected = 0
    for batch in (recorded[:UTTERANCES], recorded[UTTERANCES:]):
        lengths = sorted(hypothesis.token_count for hypothesis in batch)
        expected += lengths[-1] - lengths[-5]  # once the fourth of the eight has ended
    assert recorder.replayed == pytest.approx(expected, abs=4)
    assert expected > 20


def test_beams_go_on_as_before(whisper: Whisper, features: Tensor) -> None:
    recorder = Recorder()
    options = {"num_beams": 3, "max_new_tokens": 20}
    recorded = transcribed(whisper, features, recorder, **options)
    computed = transcribed(whisper, features, None, **options)
    assert [h.token_ids for h in recorded] == [h.token_ids for h in computed]
    assert recorder.recorded == 0


def test_a_device_that_cannot_record_goes_on_without(
    whisper: Whisper, features: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")

    recorded = transcribed(whisper, features, fails, max_new_tokens=30)
    computed = transcribed(whisper, features, None, max_new_tokens=30)
    assert [h.token_ids for h in recorded] == [h.token_ids for h in computed]
    assert caplog.text.count("Steps of the decoder are not recorded: operation not permitted") == 1


def test_no_step_looks_at_a_value(whisper: Whisper) -> None:
    """On tensors without values every look at one fails, as it would while recording."""
    model = copy.deepcopy(whisper.model).to("meta")
    decoder = RecordingDecoder(model, 2, lambda step: step)
    shape = (len(model.model.decoder.layers), 2, 2, decoder.heads)
    own, cross = (
        torch.empty(*shape, length, decoder.head_width, device="meta")
        for length in (model.config.max_target_positions, model.config.max_source_positions)
    )
    lengths = torch.empty(2, dtype=torch.int64, device="meta")
    cache = KeyValueCache(own, cross, None, lengths, longest=4, even=True)
    with torch.inference_mode():
        assert decoder.read(torch.ones(2, 1, dtype=torch.int64, device="meta"), cache).is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_records_and_replays(whisper: Whisper, features: Tensor) -> None:
    model = copy.deepcopy(whisper.model).cuda()
    decoder = fastest_decoder(model, UTTERANCES)
    assert isinstance(decoder, RecordingDecoder)
    read: list[list[Tensor]] = []
    with torch.inference_mode():
        for each in (decoder, CachedDecoder(model)):
            read.append([])
            for batch in (features, features.flip(0)):
                states = model.model.encoder(batch.cuda()).last_hidden_state
                cache = each.start(states, model.config.max_target_positions, uneven=False)
                for id in range(300, 440):  # past 64 and 128 tokens
                    if id in (310, 370):  # rows end: 6 are left, then 3
                        cache.keep(torch.arange(1, len(cache.lengths) // 2 + 3, device="cuda"))
                    ids = torch.full((len(cache.lengths), 1), id, device="cuda")
                    read[-1].append(each.read(ids, cache))
                    cache.advance(1)
    torch.testing.assert_close(*read)


def test_a_cpu_records_nothing(whisper: Whisper) -> None:
    assert type(fastest_decoder(whisper.model, 8)) is CachedDecoder


def test_autocast_does_not_round_the_logits(whisper: Whisper) -> None:
    """A student is scored in it, and must write what it will write without it."""
    decoder = CachedDecoder(whisper.model)
    states = torch.randn(3, 1, decoder.width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = decoder.logits(states)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(decoder.logits(states), expected)
