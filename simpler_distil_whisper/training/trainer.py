"""A training run's models, optimizer and records, and what can be done with them step by step.

Owns the optimizer step, and that every token of a step weighs alike however many micro-batches and
processes share it. The loop in `run_distillation.py` decides when what is done.
"""

import contextlib
import gc
import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.data.manifest import refuse_vanished
from simpler_distil_whisper.launch import is_main_process, process_count
from simpler_distil_whisper.model.devices import share_cores
from simpler_distil_whisper.model.memory import out_of_memory
from simpler_distil_whisper.model.processes import sums_over_processes
from simpler_distil_whisper.model.whisper import save_whisper
from simpler_distil_whisper.run import DataError, Run, log
from simpler_distil_whisper.training.checkpoints import Checkpoints
from simpler_distil_whisper.training.curves import draw_curves
from simpler_distil_whisper.training.dataset import TrainingBatch
from simpler_distil_whisper.training.log import MetricsLog, RejectionLog, RunningMeans
from simpler_distil_whisper.training.model_card import ModelCard
from simpler_distil_whisper.training.models import TeacherAndStudent
from simpler_distil_whisper.training.optimizer import make_optimizer
from simpler_distil_whisper.training.options import (
    BatchOptions,
    CheckpointOptions,
    OptimizerOptions,
)
from simpler_distil_whisper.training.validation import Score, Validation


class Trainer:
    """The optimizer step, and what comes between steps: validation, checkpoints, the log.

    Attributes:
        state: optimizer steps done, and the best score so far.
        means: of the loss terms since the last line of the log.
    """

    def __init__(
        self,
        run: Run,
        digest: str,
        models: TeacherAndStudent,
        optimizer: OptimizerOptions,
        batch: BatchOptions,
        checkpoints: CheckpointOptions,
        card: ModelCard,
        *,
        encoder_factor: float,
        max_bad_rows: float,
        validation: Validation | None,
        tensorboard: bool,
    ) -> None:
        """Make the optimizer, and continue from the last checkpoint if there is one.

        Args:
            run: whose folder is written and whose stop signal is obeyed.
            digest: hash of what the steps learn from.
            models: the student in float32, trained in place; parameters that require no gradient
                are frozen.
            optimizer: its section of the config.
            batch: its section of the config, for the advice when memory does not suffice.
            checkpoints: its section of the config.
            card: README.md and distillation.json of the model folders.
            encoder_factor: the encoder's learning rate, as a share of the decoder's.
            max_bad_rows: how many rows may turn out not to decode.
            validation: scores models on the dev manifest; None: there is none.
            tensorboard: write for TensorBoard too.

        Raises:
            ConfigError: the checkpoint belongs to other steps.
        """
        share_cores(models.student.model)
        accelerator = models.accelerator
        self.run, self.models, self.accelerator = run, models, accelerator
        self.batch, self.checkpoint_options = batch, checkpoints
        self.card, self.validation = card, validation
        self.max_grad_norm = optimizer.max_grad_norm or math.inf
        adamw = make_optimizer(models.module, optimizer, encoder_factor)
        models.module, self.optimizer = accelerator.prepare(models.module, adamw)
        folder = run.folder / "checkpoints"
        self.checkpoints = Checkpoints(folder, checkpoints.keep_last, accelerator)
        self.state = self.checkpoints.restore_last(digest)
        if self.state.step:
            log.info("continuing after step %d", self.state.step)
        self.metrics = MetricsLog(
            run.folder, self.state.step, tensorboard, enabled=is_main_process()
        )
        self.rejections = RejectionLog(run.folder / "rejected.jsonl", max_bad_rows)
        self.means = RunningMeans(
            accelerator.device, models.objective.uses_teacher, self.state.unlogged
        )
        self._record_setup()

    def _record_setup(self) -> None:
        models, device = self.models, str(self.accelerator.device)
        dtype = str(models.teacher.dtype).removeprefix("torch.")
        shared = models.teacher.shared_encoder
        log.info(
            "%s, precision %s, teacher in %s, one encoder for both models: %s",
            device,
            models.precision,
            dtype,
            "yes" if shared else "no",
        )
        self.run.note(
            device=device,
            precision=models.precision,
            teacher_dtype=dtype,
            shared_encoder=shared,
        )

    def train_step(self, micro_batches: Sequence[TrainingBatch], learning_rate: float) -> bool:
        """Learn from one optimizer step's micro-batches; return whether to stop after it.

        Raises:
            ConfigError: memory does not suffice.
            DataError: audio has vanished, or too much of it cannot be decoded.
        """
        with self.advise_when_out_of_memory():
            module = self.models.module
            tokens, stop = self._tokens_and_stop(micro_batches)
            module.train()
            refuse_vanished(each for batch in micro_batches for each in batch.rejections)
            for number, batch in enumerate(micro_batches, 1):
                last = number == len(micro_batches)
                # Gradients are exchanged once, with the last micro-batch.
                with contextlib.nullcontext() if last else self.accelerator.no_sync(module):
                    terms = self.models.loss_terms(batch.to(self.accelerator.device))
                    # The processes' gradients are averaged, but every token of the step is to
                    # count alike: multiply back to a sum and divide once by all tokens.
                    self.accelerator.backward(terms.loss * process_count() / tokens)
                self.means.add(terms, batch)
                self.rejections.add(batch.rejections)
            norm = self.accelerator.clip_grad_norm_(module.parameters(), self.max_grad_norm)
            self.means.end_step(norm, learning_rate)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_scale"]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        return stop

    def _tokens_and_stop(self, micro_batches: Iterable[TrainingBatch]) -> tuple[int, bool]:
        """Return the label tokens of a step in all processes, and whether any is asked to stop."""
        own = sum(batch.label_tokens for batch in micro_batches)
        counts = torch.tensor([own, int(self.run.asked_to_stop)])
        tokens, stop = sums_over_processes(counts).tolist()
        return max(tokens, 1), stop > 0

    def log_means(self) -> None:
        """Write the means since the last line into the log.

        Raises:
            DataError: the loss is not finite.
        """
        values = self.means.end()
        loss = values["train/loss"]
        if loss is not None and not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        self.metrics.log(self.state.step, values)

    def score_teacher(self) -> None:
        """Score the teacher on dev, once in a run, if the config asks for it.

        Raises:
            DataError: no row of dev can be scored, so the student's could not be either.
        """
        if self.validation is None or not self.validation.options.score_teacher:
            return
        if self.state.teacher_error_rate is not None:
            return
        with self.advise_when_out_of_memory():
            score = self.validation.score(self.models.teacher.load())
        if score.error_rate is None:
            raise DataError(
                f"{self.validation.path}: no row that has a reference can be transcribed, so "
                "nothing can be scored: the reasons are above"
            )
        self.state.teacher_error_rate = score.error_rate
        self._log_score("teacher", score)

    def has_stopped_improving(self) -> bool:
        """Return whether the last `early_stopping_patience` validations brought no better score."""
        if self.validation is None:
            return False
        patience = self.validation.options.early_stopping_patience
        if patience is None or self.state.validations_since_best < patience:
            return False
        log.info(
            "step %d: no better on dev in the last %d validations: stopping early",
            self.state.step,
            self.state.validations_since_best,
        )
        return True

    def validate(self) -> None:
        """Score the student on dev; keep it as `best/` if it is the best so far.

        Raises:
            DataError: a weight is not finite.
        """
        self._check_weights()
        if self.validation is None:
            return
        self.models.module.eval()
        with self.means.paused(), self.advise_when_out_of_memory():
            score = self.validation.score(self.models.student)
        self._log_score("student", score)
        is_best = self.state.record_validation(score.error_rate)
        if is_best and self.checkpoint_options.keep_best:
            self.save_student("best")
        self.draw_curves()

    def save_checkpoint(self) -> None:
        """Save what a stopped run continues from.

        Raises:
            DataError: a weight is not finite, or the disk is full.
        """
        self._check_weights()
        self.state.unlogged = self.means.sums()
        with self.means.paused():
            self.checkpoints.save(self.state)

    def save_student(self, name: str) -> None:
        """Write the student as it is as a complete model folder, with its card."""
        if is_main_process():
            student, folder = self.models.student, self.run.folder / name
            documents = self.card.documents(self.state.step, self.state.learning_rate)
            save_whisper(student.model, student.processor_folder, folder, documents)

    def draw_curves(self) -> None:
        """Draw the log so far as `training_curves.png`."""
        if is_main_process():
            folder = self.run.folder
            draw_curves(folder / "metrics.jsonl", folder / "training_curves.png")

    def close(self) -> None:
        """Report how many rows the caches held, and let go of the other processes.

        DDP's reducer must not be the last to hold the connection: it would end it with Python's
        lock in hand and wait for gloo's thread, which may be waiting for that lock to free a tensor
        (torch 2.13).
        """
        self._report_caches()
        if process_count() > 1:
            self.models.module = self.accelerator.unwrap_model(self.models.module)
            self.accelerator.free_memory()
            gc.collect()

    def _report_caches(self) -> None:
        rows = {}
        caches = self.models.caches
        caches.finish()
        for kind, cache in (("encoder", caches.encoder), ("decoder", caches.decoder)):
            if cache is None:
                continue
            hits, misses = sums_over_processes(torch.tensor([cache.hits, cache.misses])).tolist()
            gigabytes = round(cache.store.used() / 1e9, 6)
            rows[f"{kind}_states"] = {"hits": hits, "misses": misses}
            log.info(
                "teacher cache, %s states: %d hits, %d misses, %.3f GB used in all",
                kind,
                hits,
                misses,
                gigabytes,
            )
        if rows:
            self.run.note(teacher_cache={**rows, "gigabytes_used": gigabytes})

    def _check_weights(self) -> None:
        """Raise DataError rather than save what no run could continue from."""
        parameters = self.models.student.model.parameters()
        if not all(torch.isfinite(weight).all() for weight in parameters):
            raise self._diverged("a weight is not finite")

    def _diverged(self, sign: str) -> DataError:
        return DataError(
            f"step {self.state.step}: {sign}: lower optimizer.learning_rate, raise "
            'schedule.warmup_steps or use precision "float32"'
        )

    def _log_score(self, model: str, score: Score) -> None:
        self.metrics.log(self.state.step, score.values(f"validation/{model}/"))
        rates = ", ".join(
            f"{name} {rate:.4f}" for name, rate in score.values("").items() if rate is not None
        )
        log.info("step %d: %s on dev: %s", self.state.step, model, rates)
        for reference, hypothesis in score.examples:
            log.info("    reference %s | %s %s", reference, model, hypothesis)

    @contextlib.contextmanager
    def advise_when_out_of_memory(self) -> Iterator[None]:
        """Turn an out-of-memory error into advice; batch sizes are never reduced silently."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            batch = self.batch
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"step {self.state.step + 1}: memory does not suffice ({reason}). The same steps "
                f"in less of it: batch.micro_batch_size below {batch.micro_batch_size}, with "
                "batch.gradient_accumulation_steps as much above "
                f"{batch.gradient_accumulation_steps}; or activation_checkpointing true. In a new "
                'output_dir: precision "bf16", a teacher_cache.folder (with all in it no teacher '
                "is loaded), or another teacher.device"
            ) from None
