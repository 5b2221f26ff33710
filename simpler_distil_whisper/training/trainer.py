"""The training loop: one optimizer step after the other, and what comes due between them.

JSONL line to gradient: `TrainingDataset` -> `Trainer.train_step` -> `TeacherAndStudent.terms` ->
`distillation_loss` -> backward. Called by `run_distillation.py`.
"""

import contextlib
import gc
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.manifest import Manifest, Rejection
from simpler_distil_whisper.data.results import places_in, rejection_line
from simpler_distil_whisper.data.workers import load_ahead
from simpler_distil_whisper.model.devices import leave_a_core_to_audio, out_of_memory
from simpler_distil_whisper.model.teacher_cache import EncoderStateCache
from simpler_distil_whisper.model.whisper import Whisper, save_whisper
from simpler_distil_whisper.run import DataError, Interrupted, Progress, Run, log
from simpler_distil_whisper.training.augment import Views
from simpler_distil_whisper.training.dataset import Example, Targets, TrainingBatch, TrainingDataset
from simpler_distil_whisper.training.log import MetricsLog, RunningMeans, draw_curves
from simpler_distil_whisper.training.losses import LossWeights
from simpler_distil_whisper.training.model_card import ModelCard
from simpler_distil_whisper.training.models import (
    Checkpoints,
    MovingAverage,
    TeacherAndStudent,
    TrainerState,
    freeze,
    learning_rate_factor,
    make_optimizer,
)
from simpler_distil_whisper.training.options import DistillationConfig, RunLength
from simpler_distil_whisper.training.plan import MicroBatches, TrainingPlan
from simpler_distil_whisper.training.teacher import Teacher
from simpler_distil_whisper.training.validation import Score, Validation


class Trainer:
    """A student on its way from the pruned to the distilled model.

    Attributes:
        state: the optimizer steps done, and the best score so far.
        card: what is written into the model folders beside the model.
    """

    def __init__(
        self,
        config: DistillationConfig,
        length: RunLength,
        run: Run,
        accelerator: Accelerator,
        teacher: Teacher,
        student: Whisper,
        cache: EncoderStateCache | None = None,
    ) -> None:
        """Assemble models and optimizer and continue from the last checkpoint, if there is one.

        Args:
            config: of the run.
            length: of the run, in optimizer steps.
            run: whose folder is written and whose stop signal is obeyed.
            accelerator: device and other processes.
            teacher: what the student is to be like.
            student: in float32, on the CPU; trained in place.
            cache: of the encoder states that both models share.
        """
        self.config, self.length, self.run = config, length, run
        self.accelerator, self.teacher, self.student = accelerator, teacher, student
        leave_a_core_to_audio()
        freeze(student.model, **config.freeze.model_dump())
        if config.activation_checkpointing:
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.compile:
            student.model.model.decoder.compile(dynamic=True)
        objective = config.objective
        weights = LossWeights(
            objective.cross_entropy_weight, objective.kl_weight, objective.temperature
        )
        self.models = TeacherAndStudent(accelerator, teacher, student, weights, cache)
        optimizer = make_optimizer(self.models.module, config.optimizer)
        self.models.module, self.optimizer = accelerator.prepare(self.models.module, optimizer)
        self.average: MovingAverage | None = None
        if config.optimizer.average_decay is not None:
            decay = config.optimizer.average_decay
            self.average = MovingAverage(student.model.parameters(), decay)
            accelerator.register_for_checkpointing(self.average)
        keep = config.checkpoints.keep_last
        self.checkpoints = Checkpoints(run.folder / "checkpoints", keep, accelerator)
        self.state = self.checkpoints.restore_last() or TrainerState()
        if self.state.step:
            log.info("continuing after step %d", self.state.step)
        self.metrics = MetricsLog(
            run.folder, self.state.step, config.logging.tensorboard, accelerator.is_main_process
        )
        self.rejected = run.folder / "rejected.jsonl"
        self.known_rejections = places_in(self.rejected)
        self.means = RunningMeans(accelerator, weights.kl > 0, self.state.unlogged)
        self.validation: Validation | None = None
        self.card: ModelCard | None = None
        self._say_what_was_chosen()

    def _say_what_was_chosen(self) -> None:
        accelerator, teacher = self.accelerator, self.teacher
        log.info(
            "%s, precision %s, teacher in %s, one encoder for both models: %s",
            *(accelerator.device, accelerator.mixed_precision.replace("no", "float32")),
            *(teacher.dtype, "yes" if teacher.shared_encoder else "no"),
        )
        self.run.note(
            device=str(accelerator.device),
            precision=accelerator.mixed_precision,
            teacher_dtype=str(teacher.dtype).removeprefix("torch."),
            shared_encoder=teacher.shared_encoder,
        )

    def validate_on(self, dev: Manifest) -> None:
        """Score the student on these rows when validation is due, and the teacher once, now."""
        options = self.config.validation
        self.validation = Validation(
            dev, self.config.data, options.decoding, options.metric, self.accelerator
        )
        if options.score_teacher and self.state.teacher_error_rate is None:
            with _hint_if_memory_ends(self.config, self.state.step):
                score = self.validation.score(self.teacher.load())
            self.state.teacher_error_rate = score.error_rate
            self._log_score("teacher", score)

    def train(self, examples: Sequence[Example]) -> None:
        """Run the steps that are left, then leave the student with the weights to be kept.

        Raises:
            Interrupted: a stop signal came; the last step is in a checkpoint.
            DataError: the loss or a weight is no longer finite, or the disk is full.
            ConfigError: the checkpoint counts other steps than this run would, or memory does not
                suffice.
        """
        self._refuse_other_plan(examples)
        every = self.config.checkpoints.every_steps
        steps = self.micro_batches_of_each_step(examples)
        self.means.start_clock()
        progress = Progress("training", "steps", self.length.max_steps, self.state.step)
        for group in () if self._has_stopped_improving() else progress.over(steps):
            stop = self.train_step(group)
            self.state.step += 1
            step, last = self.state.step, self.state.step == self.length.max_steps
            if last or step % self.config.logging.every_steps == 0:
                self._log_interval()
            validate = last or step % self.length.validate_every == 0
            save = stop or step % every == 0
            if validate or save:
                self._check_weights()
            if self.validation and validate:
                self._validate(self.validation)
            if save:
                self.state.unlogged = self.means.sums()
                self.checkpoints.save(self.state)
            if stop and not last:
                self._report_cache()
                self._let_go_of_the_others()
                raise Interrupted
            if self._has_stopped_improving():
                break
        self._report_cache()
        self._let_go_of_the_others()
        self._draw_curves()
        if self.average:
            self.average.leave_in_place()

    def save_student(self, folder: Path) -> None:
        """Write the student as it is as a complete model folder, with its card if it has one."""
        documents = self.card.documents(self.state.step) if self.card else {}
        save_whisper(self.student.model, self.student.processor_folder, folder, documents)

    def _has_stopped_improving(self) -> bool:
        patience = self.config.validation.early_stopping_patience
        stop = patience is not None and self.state.validations_since_best >= patience
        if stop:
            log.info(
                "step %d: no better on dev in the last %d validations: stopping early",
                *(self.state.step, self.state.validations_since_best),
            )
        return stop

    def _let_go_of_the_others(self) -> None:
        """Give up what reduces gradients, before the connection to the other processes ends.

        As the last to hold the connection it would end it with Python's lock in hand and wait for
        gloo's thread, which may be waiting for that lock to free a tensor (torch 2.13).
        """
        if self.accelerator.num_processes > 1:
            self.models.module = self.accelerator.unwrap_model(self.models.module)
            self.accelerator.free_memory()
            gc.collect()

    def _report_cache(self) -> None:
        """Say how many rows of this run the cache has spared encoder and teacher."""
        kinds = {"encoder_states": self.models.cache, "decoder_states": self.teacher.decoder_cache}
        noted = {}
        for kind, cache in kinds.items():
            if cache is None:
                continue
            counts = torch.tensor([cache.hits, cache.misses]).to(self.accelerator.device)
            found, computed = self.accelerator.reduce(counts).tolist()
            gigabytes = round(cache.store.used() / 1e9, 6)
            noted[kind] = {"found": found, "computed": computed}
            log.info(
                "teacher cache, %s: %d rows found, %d computed, %.3f GB used in all",
                *(kind.replace("_", " "), found, computed, gigabytes),
            )
        if noted:
            self.run.note(teacher_cache={**noted, "gigabytes_used": gigabytes})

    def _refuse_other_plan(self, examples: Sequence[Example]) -> None:
        digest = hashlib.sha256(str(self.length).encode())
        for example in examples:
            digest.update(f"{example.utterance.json} {example.tokens} {example.weight}".encode())
        plan = digest.hexdigest()
        if self.state.plan not in ("", plan):
            raise ConfigError(
                f"resume: the checkpoint in {self.checkpoints.folder} belongs to other training "
                "rows or another number of processes, so its step is no place in this run: restore "
                'them or choose another "output_dir"'
            )
        self.state.plan = plan

    def train_step(self, group: Sequence[TrainingBatch]) -> bool:
        """Learn from one optimizer step's micro-batches; return whether to stop after it."""
        rate = self._set_learning_rate()
        tokens, stop = self._tokens_and_stop(group)
        self.models.module.train()
        for number, batch in enumerate(group, 1):
            last = number == len(group)
            with (
                contextlib.nullcontext() if last else self.accelerator.no_sync(self.models.module),
                _hint_if_memory_ends(self.config, self.state.step),
            ):
                self._learn_from(batch, tokens)
            self._keep_rejections(batch.rejections)
        limit = self.config.optimizer.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.models.module.parameters(), limit)
        self.means.end_step(norm, rate)
        with _hint_if_memory_ends(self.config, self.state.step):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update()
        return stop

    def _learn_from(self, batch: TrainingBatch, tokens: int) -> None:
        """Add a micro-batch's share to the gradients of a step of `tokens` label tokens."""
        terms = self.models.terms(batch.to(self.accelerator.device))
        # The processes' gradients are averaged, but every token of the step is to count alike:
        # multiply the average back to a sum and divide once by all tokens.
        self.accelerator.backward(terms.loss * self.accelerator.num_processes / tokens)
        self.means.add(terms, batch)

    def micro_batches_of_each_step(
        self, examples: Sequence[Example]
    ) -> Iterator[tuple[TrainingBatch, ...]]:
        """Yield this process's micro-batches of each step that is left, loaded ahead of use."""
        batch, accelerator, seed = self.config.batch, self.accelerator, self.config.seed
        student, data = self.student, self.config.data
        positions = student.model.config.max_target_positions
        targets = Targets(examples, data, student.tokens, positions, seed)
        plan = TrainingPlan(
            [example.weight for example in examples],
            targets.length,
            self.length.step_size,
            batch.length_bucketing,
            seed,
        )
        steps = range(self.state.step, self.length.max_steps)
        rank, processes = accelerator.process_index, accelerator.num_processes
        own = MicroBatches(plan, steps, batch.micro_batch_size, rank, processes)
        dataset = TrainingDataset(
            own,
            targets,
            Views(self.config.augmentation, student.window_seconds, seed),
            student.feature_extractor,
            self.models.cache,
            self.teacher.decoder_cache,
        )
        loader = iter(load_ahead(dataset, self.config.data.num_workers))
        for _ in steps:
            yield tuple(itertools.islice(loader, batch.gradient_accumulation_steps))

    def _set_learning_rate(self) -> float:
        """Set the learning rate of the coming step and return it."""
        schedule = self.config.schedule
        factor = learning_rate_factor(
            schedule.kind, self.state.step, schedule.warmup_steps, self.length.max_steps
        )
        rate = factor * self.config.optimizer.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _tokens_and_stop(self, group: Iterable[TrainingBatch]) -> tuple[int, bool]:
        """Return the label tokens of this step in all processes, and whether one is to stop."""
        own = sum(batch.label_tokens for batch in group)
        counts = torch.tensor([own, int(self.run.asked_to_stop)])
        tokens, stop = self.accelerator.reduce(counts.to(self.accelerator.device)).tolist()
        return max(tokens, 1), stop > 0

    def _keep_rejections(self, rejections: Iterable[Rejection]) -> None:
        """Say once of each example that its audio, whose header was good, cannot be decoded."""
        for rejection in rejections:
            if rejection.place not in self.known_rejections:
                self.known_rejections = places_in(self.rejected)  # the others add to it too
            if rejection.place in self.known_rejections:
                continue
            self.known_rejections.add(rejection.place)
            log.warning("not learnt from: %s: %s", rejection.place, rejection.reason)
            with self.rejected.open("a", encoding="utf-8") as file:
                file.write(rejection_line(rejection))

    def _log_interval(self) -> None:
        values = self.means.end()
        loss = values["train/loss"]
        if loss is None or not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        self.metrics.log(self.state.step, values)

    def _check_weights(self) -> None:
        """Raise DataError rather than save what no run could continue from."""
        if not all(torch.isfinite(weight).all() for weight in self.student.model.parameters()):
            raise self._diverged("a weight is not finite")

    def _diverged(self, sign: str) -> DataError:
        return DataError(
            f"step {self.state.step}: {sign}: lower optimizer.learning_rate, raise "
            'schedule.warmup_steps or use precision "float32"'
        )

    def _validate(self, validation: Validation) -> None:
        """Score the student; keep it as `best/` if it is the best so far."""
        self.models.module.eval()
        with self.average.in_place() if self.average else contextlib.nullcontext():
            with _hint_if_memory_ends(self.config, self.state.step):
                score = validation.score(self.student)
            self._log_score("student", score)
            best, rate = self.state.best_error_rate, score.error_rate
            if rate is not None and (best is None or rate < best):
                self.state.best_error_rate, self.state.validations_since_best = rate, 0
                if self.config.checkpoints.keep_best and self.accelerator.is_main_process:
                    self.save_student(self.run.folder / "best")
            else:
                self.state.validations_since_best += 1
        self._draw_curves()

    def _draw_curves(self) -> None:
        if self.accelerator.is_main_process:
            draw_curves(self.run.folder / "metrics.jsonl", self.run.folder / "training_curves.png")

    def _log_score(self, who: str, score: Score) -> None:
        self.metrics.log(self.state.step, score.values(f"validation/{who}/"))
        rates = ", ".join(
            f"{name} {rate:.4f}" for name, rate in score.values("").items() if rate is not None
        )
        log.info("step %d: %s on dev: %s", self.state.step, who, rates)
        for reference, hypothesis in score.examples:
            log.info("    said %s | %s heard %s", reference, who, hypothesis)


@contextlib.contextmanager
def _hint_if_memory_ends(config: DistillationConfig, step: int) -> Iterator[None]:
    """Turn the end of the memory into advice: nothing smaller is tried behind anyone's back."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        batch, (what, *_) = config.batch, [*str(error).splitlines(), type(error).__name__]
        raise ConfigError(
            f"step {step + 1}: memory does not suffice ({what}). The same "
            f"steps in less of it: batch.micro_batch_size below {batch.micro_batch_size}, with "
            f"batch.gradient_accumulation_steps as much above {batch.gradient_accumulation_steps}; "
            f'or activation_checkpointing true, precision "bf16", a teacher_cache.folder (with '
            "all in it no teacher is loaded), or another teacher.device. While dev is scored: "
            "validation.decoding.batch_size"
        ) from None
