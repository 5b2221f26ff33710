"""The teacher cache: keyed by content, never wrong, bounded, and without effect on training."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from distilling import (
    Setting,
    assemble,
    distil,
    largest_difference,
    logged,
    make_setting,
    weights_in,
    write_config,
)
from safetensors.torch import load_file
from stored import bytes_in, entries_in, some_tensor
from tiny import make_model_folder, write_tone
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.audio import load_audio
from simpler_distil_whisper.data.manifest import Utterance
from simpler_distil_whisper.model import devices, teacher_cache
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.options import CacheOptions
from simpler_distil_whisper.model.teacher_cache import (
    DecoderStateCache,
    EncoderStateCache,
    dtype_of_states,
    open_encoder_cache,
)
from simpler_distil_whisper.model.tensor_store import TensorStore
from simpler_distil_whisper.model.weights import digest_of_weights

ENOUGH = 10**9  # bytes
WINDOW = 2  # seconds
CPU = torch.device("cpu")
LANGUAGES = ["en", "zh"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# Names made of contents


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "teacher", languages=LANGUAGES)


def open_cache(
    teacher: Path,
    folder: Path,
    computed: torch.dtype = torch.float32,
    extractor: WhisperFeatureExtractor | None = None,
    device: str = "cpu",
    **options: Any,
) -> EncoderStateCache:
    facts = read_model_folder(teacher, None, "teacher")
    extractor = extractor or WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW)
    section = CacheOptions(folder=folder, **options)
    cache = open_encoder_cache(section, facts, extractor, computed, torch.device(device))
    assert cache is not None
    return cache


def part(audio: Path, start: float = 0.0, duration: float | None = None) -> Utterance:
    return Utterance(0, "p", "{}", "i", audio, start, duration, None, None)


def test_without_a_folder_there_is_no_cache(teacher: Path) -> None:
    facts = read_model_folder(teacher, None, "teacher")
    extractor = WhisperFeatureExtractor()
    assert open_encoder_cache(CacheOptions(), facts, extractor, torch.float32, CPU) is None


@pytest.mark.parametrize(
    ("device", "bfloat16", "computed", "kept"),
    [
        # On a GPU float16 weights are decoded in float16; a student learns in bfloat16.
        ("cuda", True, torch.float16, torch.bfloat16),
        ("cuda", True, torch.bfloat16, torch.bfloat16),
        # On one without bfloat16 it learns in float32.
        ("cuda", False, torch.float16, torch.float16),
        ("cuda", False, torch.float32, torch.float16),
        ("cpu", False, torch.float32, torch.float32),
        ("cpu", True, torch.float16, torch.float16),
    ],
)
def test_what_labelling_keeps_is_what_training_looks_for(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    bfloat16: bool,
    computed: torch.dtype,
    kept: torch.dtype,
) -> None:
    for module in (devices, teacher_cache):
        monkeypatch.setattr(module, "has_bfloat16", lambda: bfloat16)
    cache = open_cache(teacher, tmp_path / "cache", computed, device=device)
    assert cache.dtype == kept
    if computed != torch.float16:  # as training asks, which computes in one of the others
        assert dtype_of_states(CacheOptions(), computed, torch.device(device)) == kept


@pytest.mark.parametrize(("for_training", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_a_cpu_decodes_for_training_in_the_dtype_of_training(
    monkeypatch: pytest.MonkeyPatch, for_training: bool, dtype: str
) -> None:
    monkeypatch.setattr(devices, "_cpu_has_bfloat16", lambda: True)
    chosen = devices.decoding_dtype("auto", CPU, torch.float16, for_training)
    assert chosen == getattr(torch, dtype)


def test_a_pipe_is_no_audio_to_wait_for(teacher: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    cache = open_cache(teacher, tmp_path / "cache")
    assert cache.entry_name(part(tmp_path / "a.wav")) is None


def test_audio_is_known_by_its_content(teacher: Path, tmp_path: Path) -> None:
    cache = open_cache(teacher, tmp_path / "cache")
    clip = write_tone(tmp_path / "a.wav", seed=1)
    name = cache.entry_name(part(clip))
    moved = tmp_path / "elsewhere" / "b.wav"
    moved.parent.mkdir()
    clip.rename(moved)
    assert cache.entry_name(part(moved)) == name
    assert cache.entry_name(part(clip)) is None
    write_tone(clip, seed=2)  # as long as the other, under its name
    assert cache.entry_name(part(clip)) != name
    whole, *parts = (part(moved, *times) for times in ((0.0, None), (0.5, None), (0.0, 0.5)))
    assert len({cache.entry_name(each) for each in (whole, *parts)}) == 3
    assert cache.entry_name(whole) == name


def changed(teacher: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    model = WhisperForConditionalGeneration.from_pretrained(teacher)
    shutil.copytree(teacher, folder)
    with torch.no_grad():
        change(model.model)
    model.save_pretrained(folder)
    return folder


def test_another_decoder_is_the_same_encoder(teacher: Path, tmp_path: Path) -> None:
    other = changed(teacher, tmp_path / "m", lambda m: m.decoder.layers[0].fc1.weight.add_(1))
    assert digest_of_weights(other, "encoder.") == digest_of_weights(teacher, "encoder.")


def test_one_weight_makes_another_encoder(teacher: Path, tmp_path: Path) -> None:
    other = changed(teacher, tmp_path / "m", lambda m: m.encoder.layers[1].fc2.bias[3].add_(1e-6))
    assert digest_of_weights(other, "encoder.") != digest_of_weights(teacher, "encoder.")


def test_shards_and_the_name_of_the_folder_do_not_matter(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    model = WhisperForConditionalGeneration.from_pretrained(teacher)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert digest_of_weights(tmp_path / "sharded", "encoder.") == digest_of_weights(
        teacher, "encoder."
    )


def test_settings_that_change_the_states_change_the_group(teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"encoder_attention_heads": 4}))
    hop = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW, hop_length=80)
    folder = tmp_path / "cache"
    caches = [
        open_cache(teacher, folder),
        open_cache(other, folder),
        open_cache(teacher, folder, extractor=hop),
        open_cache(teacher, folder, dtype="bfloat16"),
        open_cache(teacher, folder, dtype="float16"),
    ]
    groups = [cache.group for cache in caches]
    assert len(set(groups)) == 5
    about = json.loads((folder / groups[1] / "about.json").read_text())
    assert about["teacher"] == str(other)
    # What is stored is the same whether it was computed so coarsely or rounded.
    bf16 = open_cache(teacher, folder, torch.bfloat16)
    assert bf16.group == groups[3]


def test_a_dtype_finer_than_the_computing_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='teacher_cache.dtype: "float32" is finer than'):
        open_cache(teacher, tmp_path / "cache", torch.bfloat16, dtype="float32")


def test_a_folder_that_cannot_be_made_is_a_mistake_in_the_config(
    teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"teacher_cache\.folder: .*file.* cannot be written"):
        open_cache(teacher, tmp_path / "file")


# Encoder states


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_missing_states_are_computed_and_kept_and_cached_ones_are_not_computed(
    teacher: Path, tmp_path: Path, dtype: str
) -> None:
    encoder = WhisperForConditionalGeneration.from_pretrained(teacher).eval().model.encoder
    clips = [part(write_tone(tmp_path / f"{n}.wav", 0.5 + 0.3 * n, seed=n)) for n in range(5)]
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW)
    sounds = [load_audio(clip.audio) for clip in clips]
    features = extractor(sounds, sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        alone = torch.cat([encoder(log_mel[None]).last_hidden_state for log_mel in features])
    expected = alone.to(getattr(torch, dtype))
    encoded: list[int] = []
    encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    cache = open_cache(teacher, tmp_path / "cache", dtype=dtype)

    def states(*rows: int, keep: bool = True) -> torch.Tensor:
        stored = cache.look_up([clips[row] for row in rows])
        missing = dict.fromkeys(stored.missing) if not keep else stored.missing
        required = features[[rows[place] for place in missing]]
        return cache.complete(type(stored)(stored.states, missing), required, encoder)

    assert torch.equal(states(3, keep=False), expected[[3]])  # as of a file that cannot be decoded
    assert entries_in(tmp_path) == []
    assert torch.equal(states(1, 3), expected[[1, 3]])
    assert torch.equal(states(0, 1, 2, 3), expected[:4])
    assert torch.equal(states(4, 0), expected[[4, 0]])
    assert encoded == [1] * 6
    assert torch.equal(states(4, 1, 0, 2, 3), expected[[4, 1, 0, 2, 3]])
    assert (len(encoded), cache.hits, cache.misses) == (6, 8, 6)


# Training


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Dropout makes every step depend on the random state."""
    setting = make_setting(tmp_path_factory.mktemp("setting"))
    config = json.loads((setting.student / "config.json").read_text())
    (setting.student / "config.json").write_text(json.dumps(config | {"dropout": 0.2}))
    return setting


def run_config(output: Path, setting: Setting, cache: Path | None, **options: Any) -> Path:
    folder = cache and str(cache)
    section = {"folder": folder, "max_gigabytes": 1, "decoder_states": False, **options}
    checkpoints = {"every_steps": 2, "keep_last": 1}
    return write_config(
        output, setting, teacher_cache=section, schedule__max_steps=6, checkpoints=checkpoints
    )


def report(run: Path, kind: str = "encoder_states") -> dict[str, Any]:
    noted: dict[str, Any] = json.loads((run / "run_info.json").read_text())["teacher_cache"]
    return {**noted[kind], "gigabytes_used": noted["gigabytes_used"]}


def assert_same(run: Path, expected: Path) -> None:
    assert logged(run, "train/loss") == logged(expected, "train/loss")
    assert largest_difference(weights_in(run / "final"), weights_in(expected / "final")) == 0


@pytest.fixture(scope="module")
def filling(tmp_path_factory: pytest.TempPathFactory, setting: Setting) -> tuple[Path, Path]:
    """A run of three epochs that began with an empty cache, and the cache."""
    folder = tmp_path_factory.mktemp("filling")
    return distil(run_config(folder / "run", setting, folder / "cache")), folder / "cache"


@pytest.fixture
def cache(filling: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the filled cache."""
    return Path(shutil.copytree(filling[1], tmp_path / "copy"))


def test_the_first_epoch_fills_what_the_others_use(filling: tuple[Path, Path]) -> None:
    run, cache = filling
    assert len(entries_in(cache)) == 8
    facts = report(run)
    assert (facts["hits"], facts["misses"]) == (16, 8)
    assert facts["gigabytes_used"] * 1e9 == pytest.approx(bytes_in(cache), rel=0.02)


def test_a_cache_changes_no_loss(
    tmp_path: Path, setting: Setting, filling: tuple[Path, Path]
) -> None:
    """In float32; an encoder may round a batch otherwise than its rows, so not bit for bit."""
    without = distil(run_config(tmp_path / "without", setting, None))
    for name in ("loss", "kl", "cross_entropy", "grad_norm"):
        losses = logged(filling[0], f"train/{name}")
        assert losses == pytest.approx(logged(without, f"train/{name}"), rel=1e-5)


def test_a_filled_cache_spares_audio_and_encoder_and_changes_no_bit(
    tmp_path: Path, setting: Setting, filling: tuple[Path, Path], cache: Path
) -> None:
    trainer, train, *_ = assemble(run_config(tmp_path / "run", setting, cache))
    encoded: list[object] = []
    encoder = trainer.models.student.model.model.encoder
    encoder.register_forward_hook(lambda *call: encoded.append(call))
    cache_of_states = trainer.models.caches.encoder
    complete, features = cache_of_states.complete, []
    cache_of_states.complete = lambda stored, log_mels, encoder: (  # type: ignore[method-assign]
        features.append(log_mels.numel()),
        complete(stored, log_mels, encoder),
    )[1]
    train()
    assert encoded == []
    assert features == [0] * 6
    assert logged(tmp_path / "run", "train/loss") == logged(filling[0], "train/loss")
    assert (report(tmp_path / "run")["hits"], report(tmp_path / "run")["misses"]) == (24, 0)


@pytest.mark.parametrize("full", [False, True])
def test_what_the_cache_lacks_changes_no_bit(
    tmp_path: Path, setting: Setting, filling: tuple[Path, Path], cache: Path, full: bool
) -> None:
    """Of eight entries two are gone and two are damaged; these are replaced in a full one too."""
    whole = {path: load_file(path)["states"].clone() for path in entries_in(cache)}
    gone, torn = list(whole)[:2], list(whole)[2:4]
    for path in gone:
        path.unlink()
    for path in torn:
        path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    options = {"max_gigabytes": 1e-6} if full else {}
    run = distil(run_config(tmp_path / "run", setting, cache, **options))
    assert_same(run, filling[0])
    assert report(run)["misses"] == (2 * 3 + 2 if full else 4)
    kept = {path: load_file(path)["states"].clone() for path in entries_in(cache)}
    assert whole.keys() - kept.keys() == (set(gone) if full else set())
    assert all(torch.equal(kept[path], whole[path]) for path in kept)


@pytest.mark.slow
def test_states_in_bfloat16_are_rounded_in_the_filling_run_too(
    tmp_path: Path, setting: Setting, filling: tuple[Path, Path]
) -> None:
    first, second = (
        distil(run_config(tmp_path / name, setting, tmp_path / "cache", dtype="bfloat16"))
        for name in ("first", "second")
    )
    assert_same(second, first)
    assert bytes_in(tmp_path / "cache") < 0.6 * bytes_in(filling[1])
    losses = [logged(run, "train/loss") for run in (first, filling[0])]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_killed_run_goes_on_as_if_never_stopped(
    tmp_path: Path, setting: Setting, filling: tuple[Path, Path]
) -> None:
    """It dies within the first epoch, so with a part of the cache filled."""
    path = run_config(tmp_path / "run", setting, tmp_path / "cache")
    trainer, train, *_ = assemble(path)

    def die(optimizer: Any, args: object, kwargs: object) -> None:
        raise KeyboardInterrupt

    trainer.optimizer.optimizer.register_step_pre_hook(die)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert len(entries_in(tmp_path / "cache")) == 4
    assert_same(distil(path), filling[0])


@pytest.mark.slow
def test_workers_read_the_cache_too(
    tmp_path: Path, setting: Setting, filling: tuple[Path, Path], cache: Path
) -> None:
    for path in entries_in(cache)[:3]:
        path.unlink()
    path = run_config(tmp_path / "run", setting, cache)
    config = json.loads(path.read_text())
    config["data"]["num_workers"] = 1
    path.write_text(json.dumps(config))
    assert_same(distil(path), filling[0])


def test_the_states_of_undecodable_audio_are_not_kept(tmp_path: Path) -> None:
    setting = make_setting(tmp_path, 4)
    path = run_config(tmp_path / "run", setting, tmp_path / "cache")
    config = json.loads(path.read_text())
    config["data"]["max_bad_fraction"] = 0.5
    path.write_text(json.dumps(config))
    _, train, *_ = assemble(path)
    (tmp_path / "2.wav").write_bytes(b"no longer audio")
    train()
    assert len(entries_in(tmp_path / "cache")) == 3


def test_where_no_states_are_wanted_nothing_is_kept(tmp_path: Path, setting: Setting) -> None:
    path = run_config(tmp_path / "run", setting, tmp_path / "cache", encoder_states=False)
    config = json.loads(path.read_text())
    config["schedule"]["max_steps"] = 1
    path.write_text(json.dumps(config))
    distil(path)
    assert entries_in(tmp_path / "cache") == []


@pytest.mark.slow
def test_two_processes_share_a_cache(tmp_path: Path, setting: Setting) -> None:
    path = run_config(tmp_path / "run", setting, tmp_path / "cache")
    config = json.loads(path.read_text())
    config["batch"]["micro_batch_size"] = 2
    path.write_text(json.dumps(config))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(REPOSITORY / "run_distillation.py"), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=environment, timeout=200)
    assert report(tmp_path / "run")["misses"] == 8
    assert report(tmp_path / "run")["hits"] == 16
    assert len(entries_in(tmp_path / "cache")) == 8


@pytest.mark.slow
def test_runs_killed_at_any_moment_go_on_as_if_never_stopped(
    tmp_path: Path, setting: Setting, filling: tuple[Path, Path]
) -> None:
    path = run_config(tmp_path / "run", setting, tmp_path / "cache")
    command = [sys.executable, str(REPOSITORY / "run_distillation.py"), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    cache = tmp_path / "cache"
    for entries in (1, 3, 5, 8):  # each time a little further into the filling
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(entries_in(cache)) < entries:
            time.sleep(0.001)
        process.kill()
        process.wait()
    subprocess.run(command, check=True, env=environment, timeout=200)
    assert len(entries_in(cache)) == 8
    assert_same(tmp_path / "run", filling[0])


# The teacher's decoder states


def with_decoder_states(output: Path, setting: Setting, cache: Path | None, **changes: Any) -> Path:
    """A run in which every epoch uses the clean clip and one altered version of it in turn."""
    path = run_config(output, setting, cache, decoder_states=True)
    config = json.loads(path.read_text())
    config["augmentation"] = {"views": 1, "waveform": {"noise_db": [5.0, 10.0]}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, setting: Setting) -> tuple[Path, Path]:
    """A run of three epochs that began with both caches empty, and the cache folder."""
    folder = tmp_path_factory.mktemp("filled")
    return distil(with_decoder_states(folder / "run", setting, folder / "cache")), folder / "cache"


def test_decoder_states_change_no_loss_and_are_kept_for_each_view(
    tmp_path: Path, setting: Setting, filled: tuple[Path, Path]
) -> None:
    """In float32, but for how a product is cut up where a row is encoded alone."""
    without = distil(with_decoder_states(tmp_path / "without", setting, None))
    run, cache = filled
    for name in ("loss", "kl", "cross_entropy", "agreement", "grad_norm"):
        assert logged(run, f"train/{name}") == pytest.approx(
            logged(without, f"train/{name}"), rel=1e-4
        )
    for kind in ("encoder_states", "decoder_states"):
        assert len(entries_in(cache / kind)) == 16
        assert (report(run, kind)["hits"], report(run, kind)["misses"]) == (8, 16)


def test_with_all_decoder_states_there_the_teacher_is_not_loaded_and_no_bit_changes(
    tmp_path: Path, setting: Setting, filled: tuple[Path, Path]
) -> None:
    trainer, train, *_ = assemble(with_decoder_states(tmp_path / "run", setting, filled[1]))
    train()
    assert not trainer.models.teacher.loaded
    assert report(tmp_path / "run", "decoder_states")["misses"] == 0
    assert logged(tmp_path / "run", "train/loss") == logged(filled[0], "train/loss")


@pytest.mark.slow
def test_decoder_states_of_a_student_with_an_encoder_of_its_own_are_kept_too(
    tmp_path: Path, setting: Setting
) -> None:
    """The teacher uses its own encoder, whatever the student's has become, and runs it once."""
    changes = {"freeze__encoder": False}
    cache = tmp_path / "cache"
    without = distil(with_decoder_states(tmp_path / "without", setting, None, **changes))
    filling = distil(with_decoder_states(tmp_path / "filling", setting, cache, **changes))
    trainer, train, *_ = assemble(
        with_decoder_states(tmp_path / "filled", setting, cache, **changes)
    )
    train()
    assert len(entries_in(cache / "encoder_states")) == 16  # two views of each
    assert not trainer.models.teacher.loaded
    shutil.rmtree(cache / "decoder_states")
    refilling = distil(with_decoder_states(tmp_path / "refilling", setting, cache, **changes))
    assert report(refilling)["misses"] == 0
    runs = ("without", "filling", "filled", "refilling")
    losses = [logged(tmp_path / name, "train/loss") for name in runs]
    assert losses[1] == losses[2] == losses[3]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert without != filling


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.decoder.layers[0].fc1.weight.add_(0.5),
        lambda m: m.encoder.layers[0].fc1.weight.add_(0.5),
    ],
    ids=["decoder", "encoder"],
)
def test_another_teacher_gives_other_decoder_states(
    teacher: Path, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    other = changed(teacher, tmp_path / "m", change)
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW)
    store = TensorStore(tmp_path / "cache", ENOUGH)
    groups = {
        DecoderStateCache(
            store, torch.float32, read_model_folder(f, None, "teacher"), extractor, computing
        ).group
        for f in (teacher, other)
        for computing in ("float32", "bfloat16")
    }
    assert len(groups) == 4


def part_of(states: torch.Tensor) -> Callable[[list[int], int], torch.Tensor]:
    return lambda rows, length: states[rows, :length]


def test_decoder_states_belong_to_their_audio_view_and_tokens(
    teacher: Path, tmp_path: Path
) -> None:
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW)
    store = TensorStore(tmp_path / "cache", ENOUGH)
    facts = read_model_folder(teacher, None, "teacher")
    cache = DecoderStateCache(store, torch.float32, facts, extractor, "float32")
    first, second = (part(write_tone(tmp_path / f"{n}.wav", seed=n)) for n in range(2))
    states_of_batch = some_tensor(0, 2, 4, 16)
    states_of_batch[1, 2:] = 0
    batch = cache.look_up([first, second], ["", "noisy"], [[1, 2, 3, 4], [1, 2]])
    assert torch.equal(cache.complete(batch, part_of(states_of_batch)), states_of_batch)

    def is_cached(audio: Utterance, view: str | None, *ids: int) -> bool:
        return cache.look_up([audio], [view], [ids]).missing == {}

    assert is_cached(first, "", 1, 2, 3, 4)
    assert is_cached(second, "noisy", 1, 2)
    assert not is_cached(first, "noisy", 1, 2, 3, 4)
    assert not is_cached(second, "", 1, 2)
    assert not is_cached(first, "", 1, 2, 3)
    assert not is_cached(first, "", 1, 2, 3, 5)
    assert not is_cached(second, None, 1, 2)
    # Of a batch of which a part is there, the rest alone is computed.
    batch = cache.look_up([second, first], ["noisy", ""], [[1, 2], [7, 8, 9]])
    again = some_tensor(1, 2, 3, 16)
    asked: list[tuple[list[int], int]] = []
    states = cache.complete(batch, lambda *rows: (asked.append(rows), part_of(again)(*rows))[1])
    assert asked == [([1], 3)]
    assert torch.equal(states[0, :2], states_of_batch[1, :2])
    assert torch.equal(states[1], again[1])
    assert (cache.hits, cache.misses) == (1, 3)
