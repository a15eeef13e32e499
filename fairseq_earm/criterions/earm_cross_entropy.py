"""Criterion `earm_cross_entropy`: label-smoothed cross-entropy plus E-ARM's contrastive loss."""

from __future__ import annotations

import functools
import logging
import time

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.logging import metrics

from fairseq_earm.criterions.all_workers import AllWorkers
from fairseq_earm.criterions.earm_checks import check_config, check_effect, check_task
from fairseq_earm.criterions.earm_config import EarmCrossEntropyConfig, loss_settings
from fairseq_earm.criterions.earm_log import (
    control_values,
    earm_values,
    log_entries,
    reduce_earm_metrics,
    watch_clipping,
)
from fairseq_earm.criterions.training_clock import EarmSchedule, NonfiniteGuard, TrainingClock
from fairseq_earm.ebm import objectives
from fairseq_earm.ebm.contrast import (
    ENERGY_STEPS,
    Scored,
    batch_statistics,
    contrast,
    empty_statistics,
    steps_with_energy,
)
from fairseq_earm.ebm.energy import TokenEnergies, smoothed_nll
from fairseq_earm.ebm.weights import moving_log_normalizer
from fairseq_earm.meter_state import MeterState, restore_state_at_epoch_ends
from fairseq_earm.sampling.encoder_decoder import EncoderDecoderFamily
from fairseq_earm.sampling.scoring import post_tokens, with_post_step

logger = logging.getLogger(__name__)


@register_criterion("earm_cross_entropy", dataclass=EarmCrossEntropyConfig)
class EarmCrossEntropyCriterion(LabelSmoothedCrossEntropyCriterion):
    """Cross-entropy + λ · E-ARM (Wang et al., Eqs. 6-16), for every kind of model that the task has a `ModelFamily` for.

    A task without one has encoder-decoder models. Before E-ARM starts, with λ = 0 and in validation this is the stock
    criterion itself; with --earm-loss-rows it is so up to rounding.
    """

    def __init__(self, task, cfg):
        super().__init__(
            task, cfg.sentence_avg, cfg.label_smoothing, max(cfg.ignore_prefix_size, 0), cfg.report_accuracy
        )
        check_config(cfg)
        check_task(cfg, task)
        self.cfg = cfg
        build_family = getattr(task, "build_model_family", None)
        self.family = EncoderDecoderFamily(cfg, task) if build_family is None else build_family(cfg)
        check_effect(cfg, self.family.without_effect)
        self.settings = loss_settings(cfg)
        self.control = objectives.control_named(cfg.earm_control)
        self.objective = objectives.noise if self.control == "noise" else objectives.OBJECTIVES[str(cfg.earm_objective)]
        self.post = self.settings.energy_steps == "post"
        self.state = MeterState()
        restore_state_at_epoch_ends()
        self.clock = TrainingClock(task)
        self.schedule = EarmSchedule(cfg, self.clock, self.state)
        self.guard = NonfiniteGuard(task, self._is_active, self.state)
        if cfg.earm_every > 1:
            watch_clipping(task, self._is_active, cfg.clip_norm)
        nothing = functools.partial(empty_statistics, self.settings)
        self.workers = AllWorkers(task, self._shares_normalizer, self._move_normalizer, nothing)
        self.moving_normalizer = None
        self.checked = False

    def forward(self, model, sample, reduce=True):
        """Loss, sample size and logging output of one batch, as in the stock criterion."""
        if not self.checked and (self.cfg.earm_weight > 0 or self.cfg.earm_loss_rows):
            self.family.check(model)
            self.checked = True
        weight = self.schedule.current_weight() if model.training else 0.0
        if weight == 0 and self.cfg.earm_loss_rows:
            return self._forward_in_rows(model, sample)
        if weight == 0:
            loss, sample_size, logging_output = super().forward(model, sample, reduce)
            logging_output.update(log_entries(loss))
            return loss, sample_size, logging_output
        return self._forward_with_energy(model, sample, weight)

    def _is_active(self) -> bool:
        """Whether E-ARM is used in the training step under way."""
        return self.schedule.current_weight() > 0

    def _draws(self) -> bool:
        """Whether the loss needs negatives."""
        return self.control not in objectives.WITHOUT_NEGATIVES

    def _shares_normalizer(self) -> bool:
        """Whether the step under way has negatives whose weights are normalised over all workers."""
        shared = self.settings.normalizer == "batch" and self.objective is not objectives.nce
        return shared and self._draws() and self._is_active()

    def _forward_in_rows(self, model, sample):
        """Cross-entropy alone, without ever holding all logits."""
        mask, head = self._mask(sample), self.family.forward(model, sample, energies=False).data
        seen = self._score(head, sample["target"], mask, smoothed=True)
        return self._finish(_sum(seen.past, mask), _sum(seen.energies.nll, mask), sample, None, head, mask)

    def _forward_with_energy(self, model, sample, weight):
        """One forward of the model on data and negatives; cross-entropy and E-ARM from one logsumexp of each pass."""
        mask, started = self._mask(sample), time.perf_counter()
        samples = self.family.draw(model, sample, self.cfg.earm_negatives) if self._draws() else None
        seconds = time.perf_counter() - started
        passes = self.family.forward(model, sample, samples)
        seen = self._score(passes.data, sample["target"], mask, smoothed=True)
        cross_entropy, nll = _sum(seen.past, mask), _sum(seen.energies.nll, mask)
        data = self._score_data(passes, seen, sample["target"], mask)
        if samples is None:
            terms = self._data_control(data)
            values = control_values(terms, steps_with_energy(self.settings, data).mask)
        else:
            earm = self.objective(
                self._contrast(data, self._score(passes.negatives, samples.tokens, samples.mask), samples)
            )
            terms, values = earm.loss, earm_values(earm, samples, seconds)
        kept = 1.0 if self.cfg.earm_cross_entropy == "add" else 1.0 - weight / self.cfg.earm_weight
        return self._finish(kept * cross_entropy + weight * terms, nll, sample, values, passes.data, mask)

    def _mask(self, sample):
        """(B, T) True on the tokens that count."""
        mask = sample["target"].ne(self.padding_idx)
        mask[:, : self.ignore_prefix_size] = False
        return mask

    def _score(self, head, tokens, mask, *, smoothed=False) -> Scored:
        """What a pass says at the steps (B, T), or (B, T + 1) with energies read after the last token."""
        epsilon = self.eps if smoothed else 0.0
        found = head.statistics(post_tokens(tokens) if self.post else tokens, mean=epsilon > 0)
        energies = TokenEnergies(found.logsumexp, found.target_logit)
        if self.post:
            energies, mask = with_post_step(energies, mask)
        past = smoothed_nll(energies, found.mean_logit, head.vocabulary, epsilon) if smoothed else None
        return Scored(energies, mask, past)

    def _score_data(self, passes, seen: Scored, target, mask) -> Scored:
        """The data's energies, at the steps that negatives are held against; `seen` is what cross-entropy sees."""
        smoothed, pick = self.cfg.earm_smooth_history, self.family.contrasted
        repeated = passes.without_dropout if self.cfg.earm_dropout == "off" else passes.teacher_forced
        scored = seen if repeated is passes.data else self._score(repeated, target, mask, smoothed=smoothed)
        if self.cfg.earm_dropout == "energy-off":
            lse = self._score(passes.without_dropout, target, mask).energies.logsumexp
            scored = scored._replace(energies=TokenEnergies(lse, lse - scored.energies.nll))
        past = pick(scored.past) if smoothed else None
        return Scored(TokenEnergies(*map(pick, scored.energies)), pick(scored.mask), past)

    def _data_control(self, data: Scored):
        """The loss of the controls that have no negatives."""
        steps = steps_with_energy(self.settings, data)
        if self.control == "flat":
            return objectives.flat(steps, self.cfg.earm_control_weight)
        return objectives.likelihood(steps)

    def _contrast(self, data: Scored, negatives: Scored, samples):
        """Data beside negatives, with the statistics of all workers and the moving normaliser where they are shared."""
        rows = {"sources": samples.sources, "limits": samples.limits}
        statistics = log_normalizer = None
        if self.settings.normalizer == "batch":
            own = functools.partial(batch_statistics, self.settings, data.mask, negatives, **rows)
            statistics, log_normalizer = self._shared(max(data.mask.size(1), negatives.mask.size(1)), own)
        return contrast(self.settings, data, negatives, **rows, statistics=statistics, log_normalizer=log_normalizer)

    def _shared(self, steps, own):
        """Statistics of all workers' negatives, and the moving normaliser; None of each where a batch has its own."""
        if not self._shares_normalizer():
            return None, None
        if not self.clock.dummy:
            return self.workers.join(steps, lambda longest: own(steps=longest)), self.moving_normalizer
        # It counts for nobody; and its loss, which fairseq multiplies by zero, is finite by its own weights alone.
        self.workers.join(1, functools.partial(empty_statistics, self.settings))
        return None, None

    def _move_normalizer(self, everyone) -> None:
        """With --earm-normalizer-ema: average the normaliser of all workers over updates, remembered across a resume."""
        if self.cfg.earm_normalizer_ema == 0:
            return
        batch = everyone.log_normalizer.squeeze(0)
        self.moving_normalizer = moving_log_normalizer(self._average_so_far(), batch, self.cfg.earm_normalizer_ema)
        if bool(batch.isnan().any() | batch.isposinf().any()):
            self.moving_normalizer = batch
        else:
            self.state.set("log_normalizer", self.moving_normalizer.cpu())
            self.state.set("normalizer_steps", ENERGY_STEPS.index(self.settings.energy_steps))

    def _average_so_far(self):
        """The moving normaliser of the updates before; None at first, and where it is one of other energy steps."""
        own = ENERGY_STEPS.index(self.settings.energy_steps)
        stored = int(self.state.get("normalizer_steps", own))
        if stored == own:
            return self.state.get("log_normalizer")
        logger.warning(
            f"--earm-energy-steps {self.settings.energy_steps}: the checkpoint's moving normaliser is one of "
            f"--earm-energy-steps {ENERGY_STEPS[stored]}; it starts anew"
        )
        return None

    def _finish(self, loss, nll, sample, values, head, mask):
        """Sample size and log; a loss that is not finite spoils the gradient for sure and is kept out of the log."""
        sentences = sample["target"].size(0)
        sample_size = sentences if self.sentence_avg else sample["ntokens"]
        log = {
            "loss": loss.data,
            "nll_loss": nll.data,
            "ntokens": sample["ntokens"],
            "nsentences": sentences,
            "sample_size": sample_size,
        }
        finite = bool(torch.isfinite(loss))
        if self.report_accuracy:
            correct = head.likeliest()[:, : mask.size(1)].eq(sample["target"]) & mask
            log["n_correct"], log["total"] = int(correct.sum()), int(mask.sum())
        if not finite:
            loss = loss * float("nan")
            log, values = {
                key: torch.zeros_like(value) if torch.is_tensor(value) else 0 for key, value in log.items()
            }, None
        log.update(log_entries(loss, values))
        return loss, sample_size, log

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Aggregate logging outputs of all workers: the stock criterion's figures and, while active, E-ARM's."""
        if sum(log.get("sample_size", 0) for log in logging_outputs) == 0:
            metrics.log_scalar("loss", float("nan"), weight=0, round=3)
        else:
            super().reduce_metrics(logging_outputs)
        reduce_earm_metrics(logging_outputs)


def _sum(values, mask):
    """Sum of the values of the steps in a mask (B, T), which may lack the last step of (B, T + 1) values."""
    return values[:, : mask.size(1)].masked_fill(~mask, 0.0).sum()
