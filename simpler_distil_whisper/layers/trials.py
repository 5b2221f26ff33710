"""Short training runs of the sets of layers that score best: from which does a student learn most.

A student's score before any training tells which sets are hopeless, not which of the others is
best: what its layers lack, some are quick to learn and others are not (docs/real.md has figures).
Twenty steps tell them apart.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from simpler_distil_whisper.layers.scoring import EncodedBatch, only
from simpler_distil_whisper.layers.search import Layers
from simpler_distil_whisper.run import log
from simpler_distil_whisper.training.cross_attention import use_fast_cross_attention
from simpler_distil_whisper.training.learning_rates import STEPS, WARMUP_STEPS, ShortRun, search
from simpler_distil_whisper.training.losses import distillation_loss
from simpler_distil_whisper.training.models import last_states
from simpler_distil_whisper.training.optimizer import learning_rate_factor, make_optimizer
from simpler_distil_whisper.training.options import Objective, OptimizerOptions

UTTERANCES, MAX_GRAD_NORM = 16, 1.0
OBJECTIVE = Objective(cross_entropy_weight=0.0, kl_weight=1.0, temperature=2.0)


class Trials:
    """Trains students with some of the teacher's decoder layers, all with the same batches."""

    def __init__(
        self, teacher: Any, batches: Sequence[EncodedBatch], stop_if_asked: Callable[[], None]
    ) -> None:
        """Choose what each step learns from.

        Args:
            teacher: a Whisper in transformers.
            batches: of utterances with labels.
            stop_if_asked: is called before each step.
        """
        self.teacher, self.stop_if_asked = teacher, stop_if_asked
        parts = [part for batch in batches for part in batch.parts(UTTERANCES)]
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(0))
        shuffled = itertools.cycle(parts[place] for place in order.tolist())
        self.steps = list(itertools.islice(shuffled, STEPS))

    def losses(self, sets: Sequence[Layers]) -> dict[Layers, float]:
        """Return what the loss of each set comes to, at the learning rate that suits the first."""
        log.info("training students of %d sets of layers, for %d steps each:", len(sets), STEPS)
        run_first = functools.partial(self.run, sets[0])
        best = min(search(run_first, strides=(2,)), key=lambda run: run.reached)
        runs = {layers: self.run(layers, best.rate) for layers in sets[1:]}
        return {layers: run.reached for layers, run in ({sets[0]: best} | runs).items()}

    def run(self, layers: Layers, rate: float) -> ShortRun:
        """Train the decoder of a student with these layers, at rates that rise to `rate`."""
        decoder = self._decoder(layers)
        optimizer = make_optimizer(decoder, OptimizerOptions())
        losses = []
        for step, batch in enumerate(self.steps):
            self.stop_if_asked()
            terms = distillation_loss(
                last_states(decoder, batch.inputs, batch.encoder_states.float()),
                decoder.embed_tokens.weight,
                batch.teacher_states,
                self.teacher.proj_out.weight.detach(),
                batch.labels,
                OBJECTIVE,
            )
            loss = terms.loss / terms.tokens
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(decoder.parameters(), MAX_GRAD_NORM)
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_factor("linear", step, WARMUP_STEPS, STEPS)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        run = ShortRun(rate, losses)
        shown = f"{run.reached:.4f}" if math.isfinite(run.reached) else "none"
        log.info("  layers %s, learning rate %-9.3g loss %s", [*layers], rate, shown)
        return run

    def _decoder(self, layers: Layers) -> Any:
        """Return a copy of the teacher's decoder with these layers, in float32."""
        decoder = self.teacher.model.decoder
        with only(decoder, layers):
            own = copy.deepcopy(decoder).float().requires_grad_(True)
        use_fast_cross_attention(own)
        return own
