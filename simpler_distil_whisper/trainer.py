"""The training loop: one optimizer step after the other, and what comes due between them.

JSONL line to gradient: `TrainingDataset` -> `Trainer.train_step` -> `TeacherAndStudent.forward` ->
`distillation_loss` -> backward. Called by `run_distillation.py`.
"""

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.devices import leave_a_core_to_audio, torch_dtype
from simpler_distil_whisper.losses import LossTerms
from simpler_distil_whisper.manifest import Manifest, Rejection
from simpler_distil_whisper.row_results import places_in, rejection_line
from simpler_distil_whisper.run import DataError, Interrupted, Progress, Run, log
from simpler_distil_whisper.teacher_cache import TeacherCache
from simpler_distil_whisper.training import (
    Checkpoints,
    MetricsLog,
    TeacherAndStudent,
    TrainerState,
    encoders_are_equal,
    freeze,
    learning_rate_factor,
    parameter_groups,
)
from simpler_distil_whisper.training_data import (
    Example,
    MicroBatches,
    TrainingBatch,
    TrainingDataset,
    TrainingPlan,
)
from simpler_distil_whisper.training_options import DistillationConfig, Objective, RunLength
from simpler_distil_whisper.validation import Score, Validation
from simpler_distil_whisper.whisper import Whisper, save_whisper
from simpler_distil_whisper.workers import load_ahead


class Trainer:
    """A student on its way from the pruned to the distilled model.

    Attributes:
        state: the optimizer steps done, and the best score so far.
    """

    def __init__(
        self,
        config: DistillationConfig,
        length: RunLength,
        run: Run,
        accelerator: Accelerator,
        teacher: Whisper,
        student: Whisper,
        cache: TeacherCache | None = None,
    ) -> None:
        """Assemble models and optimizer and continue from the last checkpoint, if there is one.

        Args:
            config: of the run.
            length: of the run, in optimizer steps.
            run: whose folder is written and whose stop signal is obeyed.
            accelerator: device and other processes.
            teacher: in float32, on the CPU; cast and placed here.
            student: in float32, on the CPU; trained in place.
            cache: of the teacher's encoder states; used if the student's encoder is the same.
        """
        self.config, self.length, self.run = config, length, run
        self.accelerator, self.teacher, self.student = accelerator, teacher, student
        leave_a_core_to_audio()
        freeze(student.model, **config.freeze.model_dump())
        shared = config.freeze.encoder and encoders_are_equal(student.model, teacher.model)
        log.info("one encoder for both models: %s", "yes" if shared else "no")
        self.cache = cache if shared else None
        if cache and not shared:
            log.warning(
                "teacher_cache: not used, since the student's encoder is trained or is another one"
            )
        dtype = torch_dtype(config.teacher.dtype, accelerator.device)
        teacher.model.to(accelerator.device, dtype)
        models = TeacherAndStudent(
            student.model, teacher.model, config.objective.temperature, shared
        )
        options = config.optimizer
        optimizer = torch.optim.AdamW(
            parameter_groups(models, options.weight_decay),
            lr=options.learning_rate,
            betas=(options.betas[0], options.betas[1]),
            eps=options.epsilon,
        )
        self.models, self.optimizer = accelerator.prepare(models, optimizer)
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
        self.interval = Interval(accelerator, config.objective)
        self.validation: Validation | None = None
        log.info(
            "%s, precision %s, teacher in %s",
            *(accelerator.device, accelerator.mixed_precision.replace("no", "float32"), dtype),
        )
        run.note(
            device=str(accelerator.device),
            precision=accelerator.mixed_precision,
            teacher_dtype=str(dtype).removeprefix("torch."),
            shared_encoder=shared,
        )

    def validate_on(self, dev: Manifest) -> None:
        """Score the student on these rows when validation is due, and the teacher once, now."""
        options = self.config.validation
        self.validation = Validation(
            dev, self.config.data, options.decoding, options.metric, self.accelerator
        )
        if options.score_teacher and self.state.teacher_error_rate is None:
            score = self.validation.score(self.teacher)
            self.state.teacher_error_rate = score.error_rate
            self._log_score("teacher", score)

    def train(self, examples: Sequence[Example]) -> None:
        """Run the steps that are left.

        Raises:
            Interrupted: a stop signal came; the last step is in a checkpoint.
            DataError: the loss or a weight is no longer finite.
            ConfigError: the checkpoint counts other steps than this run would.
        """
        self._refuse_other_plan(examples)
        every = self.config.checkpoints.every_steps
        steps = self._micro_batches_of_each_step(examples)
        progress = Progress("training", "steps", self.length.max_steps, self.state.step)
        for group in progress.over(steps):
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
                self.checkpoints.save(self.state)
            if stop or last:
                self._report_cache()
            if stop and not last:
                raise Interrupted

    def _report_cache(self) -> None:
        """Say how many rows of this run the cache has spared the encoder."""
        if self.cache is None:
            return
        counts = torch.tensor([self.cache.found, self.cache.computed])
        found, computed = self.accelerator.reduce(counts.to(self.accelerator.device)).tolist()
        gigabytes = round(self.cache.store.used() / 1e9, 6)
        log.info(
            "teacher cache: %d rows found, %d computed, %.3f GB used", found, computed, gigabytes
        )
        self.run.note(
            teacher_cache={"found": found, "computed": computed, "gigabytes_used": gigabytes}
        )

    def _refuse_other_plan(self, examples: Sequence[Example]) -> None:
        digest = hashlib.sha256(str(self.length).encode())
        for example in examples:
            digest.update(f"{example.utterance.json} {example.tokens}".encode())
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
        accelerator, weights = self.accelerator, self.config.objective
        rate = self._set_learning_rate()
        tokens, stop = self._tokens_and_stop(group)
        self.models.train()
        for number, batch in enumerate(group, 1):
            last = number == len(group)
            with contextlib.nullcontext() if last else accelerator.no_sync(self.models):
                batch = batch.to(accelerator.device)
                terms: LossTerms = self.models(batch, self._encoder_states(batch))
                loss = weights.cross_entropy_weight * terms.cross_entropy
                loss = loss + weights.kl_weight * terms.kl
                # The processes' gradients are averaged, but every token of the step is to count
                # alike: multiply the average back to a sum and divide once by all tokens.
                accelerator.backward(loss * accelerator.num_processes / tokens)
            self.interval.add(terms, batch)
            self._keep_rejections(batch.rejections)
        limit = self.config.optimizer.max_grad_norm or math.inf
        norm = accelerator.clip_grad_norm_(self.models.parameters(), limit)
        self.interval.end_step(norm, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return stop

    def _encoder_states(self, batch: TrainingBatch) -> torch.Tensor | None:
        """Return float [B, E, D], partly or wholly from the cache; None where there is no cache."""
        if self.cache is None or batch.stored is None:
            return None
        with self.accelerator.autocast():
            return self.cache.complete(
                batch.stored, batch.input_features, self.student.model.model.encoder
            )

    def _micro_batches_of_each_step(
        self, examples: Sequence[Example]
    ) -> Iterator[tuple[TrainingBatch, ...]]:
        batch, accelerator = self.config.batch, self.accelerator
        plan = TrainingPlan(
            [len(example.tokens) for example in examples],
            self.length.step_size,
            batch.length_bucketing,
            self.config.seed,
        )
        steps = range(self.state.step, self.length.max_steps)
        rank, processes = accelerator.process_index, accelerator.num_processes
        own = MicroBatches(plan, steps, batch.micro_batch_size, rank, processes)
        dataset = TrainingDataset(
            examples, own, self.student.feature_extractor, self.student.tokens.end, self.cache
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
        counts = torch.tensor([own, int(self.run.stop_signal is not None)])
        tokens, stop = self.accelerator.reduce(counts.to(self.accelerator.device)).tolist()
        return max(tokens, 1), stop > 0

    def _keep_rejections(self, rejections: Iterable[Rejection]) -> None:
        """Say once of each example that its audio, whose header was good, cannot be decoded."""
        for rejection in rejections:
            if rejection.place in self.known_rejections:
                continue
            self.known_rejections.add(rejection.place)
            log.warning("not learnt from: %s: %s", rejection.place, rejection.reason)
            with self.rejected.open("a", encoding="utf-8") as file:
                file.write(rejection_line(rejection))

    def _log_interval(self) -> None:
        values = self.interval.end()
        if not math.isfinite(values["train/loss"]):
            raise self._diverged(f"the loss is {values['train/loss']}")
        self.metrics.log(self.state.step, dict(values))

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
        self.models.eval()
        score = validation.score(self.student)
        self._log_score("student", score)
        best, rate = self.state.best_error_rate, score.error_rate
        if rate is not None and (best is None or rate < best):
            self.state.best_error_rate = rate
            if self.config.checkpoints.keep_best and self.accelerator.is_main_process:
                best_folder = self.run.folder / "best"
                save_whisper(self.student.model, self.student.processor_folder, best_folder)

    def _log_score(self, who: str, score: Score) -> None:
        self.metrics.log(self.state.step, score.values(f"validation/{who}/"))
        rates = ", ".join(
            f"{name} {rate:.4f}" for name, rate in score.values("").items() if rate is not None
        )
        log.info("step %d: %s on dev: %s", self.state.step, who, rates)
        for reference, hypothesis in score.examples:
            log.info("    said %s | %s heard %s", reference, who, hypothesis)


class Interval:
    """What was learnt since the last line of the log, in all processes together."""

    def __init__(self, accelerator: Accelerator, objective: Objective) -> None:
        """Start the first interval."""
        self.accelerator = accelerator
        self.objective = objective
        self._restart()

    def add(self, terms: LossTerms, batch: TrainingBatch) -> None:
        """Count one micro-batch; nothing waits for the device here."""
        self._terms.append(torch.stack([term.detach().float() for term in terms]))
        self._seconds += batch.seconds

    def end_step(self, grad_norm: torch.Tensor, learning_rate: float) -> None:
        """Keep what belongs to a step as a whole; the log shows the last one's."""
        self._grad_norm, self._learning_rate = grad_norm, learning_rate

    def end(self) -> dict[str, float]:
        """Return the means per token, and the speed; start the next interval."""
        terms = torch.stack(self._terms).cpu().double().sum(0)  # not every device has float64
        own = torch.cat([terms, torch.tensor([self._seconds], dtype=torch.float64)])
        everyone = self.accelerator.reduce(own.float().to(self.accelerator.device)).tolist()
        cross_entropy, kl, tokens, audio_seconds = everyone
        cross_entropy, kl = cross_entropy / max(tokens, 1), kl / max(tokens, 1)
        weights = self.objective
        elapsed = time.perf_counter() - self._started
        values = {
            "train/loss": weights.cross_entropy_weight * cross_entropy + weights.kl_weight * kl,
            "train/cross_entropy": cross_entropy,
            "train/kl": kl,
            "train/grad_norm": float(self._grad_norm),
            "train/learning_rate": self._learning_rate,
            "train/audio_seconds_per_second": audio_seconds / elapsed,
        }
        self._restart()
        return values

    def _restart(self) -> None:
        self._terms: list[torch.Tensor] = []
        self._seconds = 0.0
        self._started = time.perf_counter()
