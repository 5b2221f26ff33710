"""Which examples a training run uses when, computed rather than remembered.

Whatever is drawn at random is drawn from the seed and its place in the plan: so it differs from
epoch to epoch, but not with the number of processes and workers, nor after a stop. It knows nothing
of audio or tokens.
"""

import enum
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from simpler_distil_whisper.config import ConfigError
from simpler_distil_whisper.launch import process_count
from simpler_distil_whisper.run import log
from simpler_distil_whisper.training.options import BatchOptions, Schedule

AUTO_STEPS, AUTO_EPOCHS = 1000, (3.0, 12.0)
AUTO_WARMUP_SHARE, MOST_WARMUP_STEPS = 1 / 20, 500
AUTO_VALIDATIONS, MOST_STEPS_BETWEEN = 4, 2000
POOL_OF_STEPS = 32  # how many optimizer steps' utterances are sorted by length together


class RunLength(NamedTuple):
    """How long a run is, in optimizer steps, once the examples are counted.

    Attributes:
        step_size: examples of one optimizer step, in all processes together.
        max_steps: of the whole run.
        warmup_steps: in which the learning rate rises.
        validate_every: steps between two validations.
    """

    step_size: int
    max_steps: int
    warmup_steps: int
    validate_every: int


def run_length(
    schedule: Schedule,
    batch: BatchOptions,
    validate_every: int | Literal["auto"] | None,
    epoch_size: float,
) -> RunLength:
    """Return the optimizer steps that a config comes to, and log them.

    Args:
        schedule: its section of the config.
        batch: its section of the config.
        validate_every: optimizer steps; "auto": four times; None: once in each epoch.
        epoch_size: how many uses of examples make an epoch.

    Raises:
        ConfigError: the run would end within the warm-up.
    """
    step_size = batch.micro_batch_size * batch.gradient_accumulation_steps * process_count()
    max_steps = schedule.max_steps or _steps_from_epochs(schedule.epochs, epoch_size / step_size)
    auto_warmup = min(round(max_steps * AUTO_WARMUP_SHARE), MOST_WARMUP_STEPS)
    warmup_steps = auto_warmup if schedule.warmup_steps == "auto" else schedule.warmup_steps
    if warmup_steps >= max_steps:
        raise ConfigError(
            f"schedule.warmup_steps: {warmup_steps}, but the run has {max_steps} steps of "
            f"{step_size} utterances: the learning rate would never be reached"
        )
    if validate_every == "auto":
        validate_every = min(math.ceil(max_steps / AUTO_VALIDATIONS), MOST_STEPS_BETWEEN)
    every = validate_every or max(1, round(epoch_size / step_size))
    log.info(
        "%d steps of %d utterances, %.1f epochs, %d steps of warm-up, dev scored every %d",
        max_steps,
        step_size,
        max_steps * step_size / epoch_size,
        warmup_steps,
        every,
    )
    return RunLength(step_size, max_steps, warmup_steps, every)


def _steps_from_epochs(epochs: float | Literal["auto"] | None, steps_per_epoch: float) -> int:
    if epochs == "auto":
        fewest, most = AUTO_EPOCHS
        epochs = min(max(AUTO_STEPS / steps_per_epoch, fewest), most)
    return math.ceil((epochs or 0) * steps_per_epoch)


class Drawn(enum.IntEnum):
    """What random numbers are drawn for. The values are part of the seed: never change them."""

    ORDER = 0
    POOL = 1
    LAP = 2
    TIMESTAMPS = 3
    PREVIOUS_TEXT = 4
    VIEW = 5
    AUDIO_CONTEXT = 6
    SAMPLED_TEXT = 7


def draw(seed: int, what: Drawn, *where: int) -> np.random.Generator:
    """Return the random numbers of one place in the plan."""
    return np.random.default_rng([seed, what, *where])


class Visit(NamedTuple):
    """One use of an example.

    Attributes:
        example: which one.
        position: of the use in the endless stream of all uses.
        use: how often the example has been used before.
    """

    example: int
    position: int
    use: int


class TrainingPlan:
    """Which examples each optimizer step learns from, computed from the step's number alone.

    One endless stream of shuffled epochs is cut into steps of equal size. So there is no smaller
    last step to weigh wrongly, a resumed run goes on where it stopped, and a step holds the same
    examples however many processes and micro-batches share it.
    """

    def __init__(
        self,
        weights: Sequence[float],
        length: Callable[[Visit], int],
        step_size: int,
        bucketing: bool,
        seed: int,
    ) -> None:
        """Group the examples by weight, and choose the size of the pools.

        Args:
            weights: of each example, how often an epoch uses it.
            length: returns how many tokens a visit has.
            step_size: examples of one optimizer step, in all processes together.
            bucketing: fill steps with examples of similar length, so that less is padded.
            seed: of the shuffling.
        """
        each = np.asarray(weights, dtype=float)
        self._groups = [
            (float(weight), np.flatnonzero(each == weight)) for weight in np.unique(each)
        ]
        self.length = length
        self.step_size = step_size
        self.seed = seed
        steps_per_epoch = max(1, round(each.sum()) // step_size)
        # Far smaller than an epoch: else examples of similar length would always share a step.
        self.pool_steps = max(1, min(POOL_OF_STEPS, steps_per_epoch // 4)) if bucketing else 1
        self._pool: tuple[int, list[list[Visit]]] = (-1, [])
        self._epoch: tuple[range, np.ndarray] = (range(0), np.empty(0))

    def step(self, number: int) -> list[Visit]:
        """Return the visits of step `number`, from 0, the shortest first."""
        pool, place = divmod(number, self.pool_steps)
        if self._pool[0] != pool:
            self._pool = (pool, self._make_pool(pool))
        return self._pool[1][place]

    def _make_pool(self, pool: int) -> list[list[Visit]]:
        """Return the visits of each of a pool's steps, sorted by length within the pool."""
        size = self.pool_steps * self.step_size
        visits = [self._at(position) for position in range(pool * size, (pool + 1) * size)]
        by_length = np.argsort([self.length(visit) for visit in visits], kind="stable")
        steps = by_length.reshape(self.pool_steps, self.step_size)
        shuffled = self._random(Drawn.POOL, pool).permutation(steps).tolist()
        return [[visits[place] for place in step] for step in shuffled]

    def _at(self, position: int) -> Visit:
        """Return the visit at a position of the endless stream."""
        if position not in self._epoch[0]:
            self._epoch = self._epoch_around(position)
        positions, visits = self._epoch
        example, use = visits[position - positions.start].tolist()
        return Visit(example, position, use)

    def _epoch_around(self, position: int) -> tuple[range, np.ndarray]:
        """Return the positions of the epoch that holds `position`, and int64 [size, 2]: its uses.

        Each use is an example and how often it was used before.
        """
        epoch = int(position / sum(weight * len(rows) for weight, rows in self._groups))
        # The sizes of epochs whose weights are no whole numbers differ by one.
        while self._first_of(epoch) > position:
            epoch -= 1
        while self._first_of(epoch + 1) <= position:
            epoch += 1
        uses = np.concatenate([self._uses(group, epoch) for group in range(len(self._groups))])
        shuffled = uses[self._random(Drawn.ORDER, epoch).permutation(len(uses))]
        return range(self._first_of(epoch), self._first_of(epoch + 1)), shuffled

    def _first_of(self, epoch: int) -> int:
        return sum(self._used_before(group, epoch) for group in range(len(self._groups)))

    def _used_before(self, group: int, epoch: int) -> int:
        """Return how many uses of a group's examples come before an epoch."""
        weight, rows = self._groups[group]
        return round(weight * len(rows) * epoch)

    def _uses(self, group: int, epoch: int) -> np.ndarray:
        """Return int64 [uses, 2]: an epoch's part of the endless laps through a group's examples.

        Each lap has every example once, in an order of its own, so that those of weight 0.5 do not
        always come together.
        """
        first, last = self._used_before(group, epoch), self._used_before(group, epoch + 1)
        _, rows = self._groups[group]
        parts = [np.empty((0, 2), dtype=np.int64)]
        for lap in range(first // len(rows), -(-last // len(rows))):
            order = self._random(Drawn.LAP, group, lap).permutation(rows)
            begin = lap * len(rows)
            some = np.sort(order[max(first - begin, 0) : last - begin])
            parts.append(np.stack([some, np.full_like(some, lap)], axis=1))
        return np.concatenate(parts)

    def _random(self, what: Drawn, *where: int) -> np.random.Generator:
        return draw(self.seed, what, *where)


class MicroBatches:
    """One process's micro-batches, in the order of their use; each is computed when asked for."""

    def __init__(
        self, plan: TrainingPlan, steps: range, size: int, rank: int, processes: int
    ) -> None:
        """Take the share of process `rank`, `size` examples at a time."""
        self.plan, self.steps, self.size = plan, steps, size
        self.rank, self.processes = rank, processes
        self.per_step = plan.step_size // (size * processes)

    def __len__(self) -> int:
        """Return how many there are over all steps."""
        return len(self.steps) * self.per_step

    def __getitem__(self, index: int) -> list[Visit]:
        """Return the visits of one micro-batch; those of the processes alternate in length."""
        step, place = divmod(index, self.per_step)
        start = (place * self.processes + self.rank) * self.size
        return self.plan.step(self.steps[step])[start : start + self.size]
