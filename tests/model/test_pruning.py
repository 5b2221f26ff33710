"""Students cut from teachers: which layers they keep and what they are still able to do."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import make_model_folder
from transformers import WhisperForConditionalGeneration, WhisperProcessor

import create_student_model
from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.model.folder import read_model_folder
from simpler_distil_whisper.model.pruning import chosen_layers, prune_whisper, spread_layers
from simpler_distil_whisper.model.whisper import PROCESSOR_FILES, load_whisper
from simpler_distil_whisper.run import DataError, Run

Model = WhisperForConditionalGeneration

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(
        tmp_path_factory.mktemp("teacher"),
        languages=["en", "zh"],
        encoder_layers=3,
        decoder_layers=4,
        talkative=True,
        seed=5,
    )


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Model:
    return loaded(teacher_folder)


def loaded(folder: Path) -> Model:
    return load_whisper(read_model_folder(folder, None, "model")).model


def create_student(teacher: Path, output: Path, **student: object) -> Path:
    """What create_student_model.py does, in this process."""
    path = output.with_suffix(".json")
    settings = {"output_dir": str(output), "teacher": {"path": str(teacher)}, "student": student}
    path.write_text(json.dumps(settings))
    config = create_student_model.Config.model_validate_json(path.read_text())
    prepared = create_student_model.prepare(config)
    create_student_model.work(config, prepared, Run("create_student_model", path, config))
    return output


def random_features(model: Model, count: int = 2) -> torch.Tensor:
    frames = 2 * model.config.max_source_positions
    random = torch.Generator().manual_seed(0)
    return torch.randn(count, model.config.num_mel_bins, frames, generator=random)


def compute_logits(model: Model) -> torch.Tensor:
    ids = torch.tensor([[256, 258, 5, 6, 7], [256, 257, 9, 9, 9]])
    with torch.no_grad():
        return model(random_features(model), decoder_input_ids=ids).logits


@pytest.mark.parametrize(
    ("available", "count", "kept"),
    [
        (32, 2, [0, 31]),
        (32, 3, [0, 15, 31]),
        (32, 4, [0, 10, 20, 31]),
        (12, 2, [0, 11]),
        (12, 3, [0, 5, 11]),
        (12, 4, [0, 3, 7, 11]),
        (4, 2, [0, 3]),
        (32, 1, [31]),
        (1, 1, [0]),
        (3, 3, [0, 1, 2]),
    ],
)
def test_spread_layers_by_hand(available: int, count: int, kept: list[int]) -> None:
    assert spread_layers(available, count) == kept
    assert chosen_layers(available, count, None) == kept


@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_spread_layers_are_in_order_and_end_with_the_last(case: tuple[int, int]) -> None:
    available, count = case
    kept = spread_layers(available, count)
    assert kept == sorted(set(kept))
    assert len(kept) == count
    assert kept[-1] == available - 1
    assert count == 1 or kept[0] == 0
    gaps = [after - before for before, after in zip(kept, kept[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert all(type(layer) is int for layer in kept)


def test_explicit_layers_are_taken_as_they_are() -> None:
    assert chosen_layers(12, None, [0, 2, 11]) == [0, 2, 11]
    assert chosen_layers(12, 3, [1, 2, 3]) == [1, 2, 3]
    assert chosen_layers(3, None, None) == [0, 1, 2]


@pytest.mark.parametrize(
    "indices", [[], [0, 0], [-1], [0, -1], [0, 4], [3, 0], [0, 1, 1, 3]], ids=str
)
def test_layers_that_make_no_sense_are_refused(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="layer"):
        chosen_layers(4, None, indices)


@pytest.mark.parametrize("count", [0, -1, 5])
def test_counts_that_do_not_exist_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="cannot be kept"):
        chosen_layers(4, count, None)


def test_a_count_that_disagrees_with_the_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="3 are requested"):
        chosen_layers(4, 3, [0, 3])


@pytest.mark.parametrize(
    ("student", "key"),
    [
        ({"decoder_layer_indices": [0, 0]}, "student.decoder_layer_indices"),
        ({"decoder_layer_indices": [0, -1]}, "student.decoder_layer_indices"),
        ({"decoder_layer_indices": [0, 4]}, "student.decoder_layer_indices"),
        ({"encoder_layer_indices": [2, 0]}, "student.encoder_layer_indices"),
        ({"decoder_layers": 5}, "student.decoder_layers"),
        ({"encoder_layers": 0}, "student.encoder_layers"),
    ],
    ids=str,
)
def test_the_script_refuses_with_exit_code_2(
    tmp_path: Path, teacher_folder: Path, run_script: Any, student: dict[str, object], key: str
) -> None:
    output = tmp_path / "student"
    settings = {
        "output_dir": str(output),
        "teacher": {"path": str(teacher_folder)},
        "student": student,
    }
    done = run_script("create_student_model", settings)
    assert done.returncode == 2, done.stderr
    assert key in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()


def test_keeping_all_layers_changes_no_bit(teacher: Model) -> None:
    student = prune_whisper(teacher, [0, 1, 2], [0, 1, 2, 3])
    assert torch.equal(compute_logits(student), compute_logits(teacher))
    assert student.state_dict().keys() == teacher.state_dict().keys()


def test_the_kept_layers_are_the_teachers_and_the_student_is_its_own(teacher: Model) -> None:
    """Cutting the teacher's lists of layers by hand gives the same forward pass."""
    by_hand = copy.deepcopy(teacher)
    for part, kept in ((by_hand.model.encoder, [0, 2]), (by_hand.model.decoder, [1, 3])):
        part.layers = torch.nn.ModuleList(part.layers[layer] for layer in kept)
    ids = torch.tensor([[256, 258, 5, 6, 7]])
    student = prune_whisper(teacher, [0, 2], [1, 3])
    with torch.no_grad():
        expected, actual = (
            model(random_features(model, 1), decoder_input_ids=ids, use_cache=False).logits
            for model in (by_hand, student)
        )
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, compute_logits(teacher)[:1])
    before = [weight.clone() for weight in teacher.state_dict().values()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    after = teacher.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert teacher.config.decoder_layers == 4


@pytest.mark.parametrize("kept", [[0, 3], [3], [1, 2]])
def test_a_pruned_model_generates_as_it_computes(teacher: Model, kept: list[int]) -> None:
    """A layer with its teacher's number would miss the key-value cache."""
    student = prune_whisper(teacher, [0, 2], kept)
    assert [layer.self_attn.layer_idx for layer in student.model.decoder.layers] == list(
        range(len(kept))
    )
    features = random_features(student)
    ids = student.generate(
        features,
        language="zh",
        task="transcribe",
        max_new_tokens=12,
        force_unique_generate_call=True,
    )
    suppressed = student.generation_config.suppress_tokens
    with torch.no_grad():
        logits = student(features, decoder_input_ids=ids[:, :-1]).logits
    logits[..., suppressed] = -torch.inf
    # The first token has further ids forbidden; from the second on it is the plain argmax.
    assert torch.equal(logits[:, 4:].argmax(-1), ids[:, 5:])


def test_the_config_describes_the_student(
    tmp_path: Path, teacher_folder: Path, teacher: Model
) -> None:
    folder = create_student(
        teacher_folder, tmp_path / "s", encoder_layers=2, decoder_layer_indices=[0, 2]
    )
    config = json.loads((folder / "config.json").read_text())
    assert (config["encoder_layers"], config["decoder_layers"]) == (2, 2)
    layer_map = json.loads((folder / "layer_map.json").read_text())
    assert layer_map == {"teacher": str(teacher_folder), "encoder": [0, 2], "decoder": [0, 2]}
    expected = prune_whisper(teacher, [0, 2], [0, 2])
    assert torch.equal(compute_logits(loaded(folder)), compute_logits(expected))
    assert not (folder / ".writing").exists()


def test_null_keeps_all_layers(tmp_path: Path, teacher_folder: Path, teacher: Model) -> None:
    folder = create_student(teacher_folder, tmp_path / "s")
    assert torch.equal(compute_logits(loaded(folder)), compute_logits(teacher))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trained", ["encoder", "decoder"])
def test_what_was_trained_and_saved_in_float32_beside_halves_is_not_rounded(
    tmp_path: Path, teacher_folder: Path, trained: str, half: torch.dtype
) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / "t")
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if f"{trained}." not in name:
            weights[name] = tensor.to(half)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    student = create_student(folder, tmp_path / "s", decoder_layers=2)
    for name, tensor in load_file(student / "model.safetensors").items():
        if "decoder.layers" not in name:
            assert torch.equal(tensor.float(), weights[name].float()), name


def test_the_generation_config_survives_saving(tmp_path: Path, teacher_folder: Path) -> None:
    """Plain transformers take language and task by name."""
    folder = create_student(teacher_folder, tmp_path / "s", decoder_layers=2)
    student = Model.from_pretrained(folder)
    features = random_features(student, 1)
    for language in ("en", "zh"):
        ids = student.generate(
            features,
            language=language,
            task="transcribe",
            max_new_tokens=8,
            force_unique_generate_call=True,
        )[0].tolist()
        names = [f"<|{language}|>", "<|transcribe|>", "<|notimestamps|>"]
        tokens = WhisperProcessor.from_pretrained(folder).tokenizer
        assert ids[1:4] == tokens.convert_tokens_to_ids(names)
    before, after = (
        json.loads((path / "generation_config.json").read_text())
        for path in (teacher_folder, folder)
    )
    for key in ("suppress_tokens", "begin_suppress_tokens", "lang_to_id", "task_to_id"):
        assert after[key] == before[key]


def test_forced_ids_of_an_old_teacher_are_gone(tmp_path: Path, teacher_folder: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(teacher_folder, old)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((old / name).read_text())
        settings["forced_decoder_ids"] = [[1, 257], [2, 260], [3, 264]]
        (old / name).write_text(json.dumps(settings))
    folder = create_student(old, tmp_path / "s", decoder_layers=2)
    for name in ("config.json", "generation_config.json"):
        assert not json.loads((folder / name).read_text()).get("forced_decoder_ids")
    student = Model.from_pretrained(folder)
    ids = student.generate(
        random_features(student, 1),
        language="zh",
        max_new_tokens=2,
        force_unique_generate_call=True,
    )
    assert ids[0, 1] == student.generation_config.lang_to_id["<|zh|>"]


def test_alignment_heads_follow_their_layers(teacher: Model) -> None:
    teacher.generation_config.alignment_heads = [[0, 1], [2, 0], [3, 1]]
    student = prune_whisper(teacher, [0, 1, 2], [0, 3])
    assert student.generation_config.alignment_heads == [[0, 1], [1, 1]]
    assert teacher.generation_config.alignment_heads == [[0, 1], [2, 0], [3, 1]]


def test_alignment_heads_of_layers_that_are_gone_are_dropped(
    tmp_path: Path, teacher_folder: Path
) -> None:
    # The fixture's heads are those of the last layer.
    folder = create_student(teacher_folder, tmp_path / "s", decoder_layer_indices=[0, 1])
    assert "alignment_heads" not in json.loads((folder / "generation_config.json").read_text())


def test_word_timestamps_of_transformers_work_with_a_student(
    tmp_path: Path, teacher_folder: Path
) -> None:
    folder = create_student(teacher_folder, tmp_path / "s", decoder_layers=2)
    student = Model.from_pretrained(folder, attn_implementation="eager")
    assert student.generation_config.alignment_heads == [[1, 0], [1, 1]]
    out = student.generate(
        random_features(student, 1),
        language="zh",
        max_new_tokens=6,
        return_timestamps=True,
        return_token_timestamps=True,
        return_dict_in_generate=True,
    )
    assert torch.isfinite(out["segments"][0][0]["token_timestamps"]).all()


def test_processor_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    teacher = make_model_folder(tmp_path / "teacher", languages=["en", "zh"], mels=128)
    # A real folder of transformers 4 holds all of them, whatever version reads it today.
    for name in PROCESSOR_FILES:
        if not (teacher / name).exists():
            (teacher / name).write_text("{}")
    for name in ("processor_config.json", "vocab.json", "merges.txt"):
        (teacher / name).unlink()
    student = create_student(teacher, tmp_path / "s", decoder_layers=1)
    present = [name for name in PROCESSOR_FILES if (teacher / name).exists()]
    assert len(present) == 6
    for name in present:
        assert (student / name).read_bytes() == (teacher / name).read_bytes(), name


def test_a_128_mel_student_is_recognized_by_programs_that_know_only_the_old_file(
    tmp_path: Path,
) -> None:
    """transformers 5 saves processor_config.json alone; faster-whisper would then take 80 mels."""
    teacher = make_model_folder(tmp_path / "teacher", languages=["en", "zh"], mels=128)
    processor = WhisperProcessor.from_pretrained(teacher)
    (teacher / "preprocessor_config.json").unlink()
    processor.save_pretrained(teacher)
    assert not (teacher / "preprocessor_config.json").exists()
    student = create_student(teacher, tmp_path / "s", decoder_layers=1)
    assert json.loads((student / "preprocessor_config.json").read_text())["feature_size"] == 128
    assert WhisperProcessor.from_pretrained(student).feature_extractor.feature_size == 128


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_student_keeps_the_teachers_dtype_on_disk(tmp_path: Path, dtype: torch.dtype) -> None:
    teacher = make_model_folder(tmp_path / "teacher", languages=["en", "zh"], dtype=dtype)
    folder = create_student(teacher, tmp_path / "s", decoder_layers=1)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, teacher))
    assert {weight.dtype for weight in ours.values()} == {dtype}
    for name in ("model.encoder.conv1.weight", "model.decoder.embed_tokens.weight"):
        assert torch.equal(ours[name], theirs[name])
    last = "model.decoder.layers.{}.fc1.weight"
    assert torch.equal(ours[last.format(0)], theirs[last.format(1)])


@pytest.mark.parametrize(
    ("weight", "error", "problem"),
    [
        (torch.nan, ConfigError, "the weights model.decoder.layer_norm.weight are not finite"),
        (3e38, DataError, "its logits are not finite"),
    ],
)
def test_a_broken_teacher_is_not_copied_in_silence(
    tmp_path: Path, weight: float, error: type[Exception], problem: str
) -> None:
    teacher = make_model_folder(tmp_path / "teacher", languages=["en", "zh"])
    model = Model.from_pretrained(teacher)
    with torch.no_grad():
        model.model.decoder.layer_norm.weight.fill_(weight)
    model.save_pretrained(teacher)
    with pytest.raises(error, match=problem):
        create_student(teacher, tmp_path / "s", decoder_layers=1)
