"""Criterion `earm_cross_entropy`: label-smoothed cross-entropy plus E-ARM's contrastive loss."""
from __future__ import annotations

import time

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.logging import metrics

from fairseq_earm.criterions.all_workers import AllWorkers
from fairseq_earm.criterions.earm_config import EarmCrossEntropyConfig, check_config, check_effect, check_task
from fairseq_earm.criterions.earm_log import earm_values, log_entries, reduce_earm_metrics
from fairseq_earm.criterions.training_clock import EarmSchedule, NonfiniteGuard, TrainingClock
from fairseq_earm.ebm.earm import batch_statistics, earm_loss, nll_terms
from fairseq_earm.ebm.energy import TokenEnergies, smoothed_nll
from fairseq_earm.ebm.weights import moving_log_normalizer, no_statistics
from fairseq_earm.meter_state import MeterState, restore_state_at_epoch_ends
from fairseq_earm.sampling.encoder_decoder import EncoderDecoderFamily
from fairseq_earm.sampling.scoring import post_tokens, with_post_step


@register_criterion("earm_cross_entropy", dataclass=EarmCrossEntropyConfig)
class EarmCrossEntropyCriterion(LabelSmoothedCrossEntropyCriterion):
    """Cross-entropy + λ · E-ARM (Wang et al., Eqs. 6-16), for every kind of model that the task has a `ModelFamily` for.

    A task without one has encoder-decoder models. Before E-ARM starts, with λ = 0 and in validation this is the stock
    criterion itself; with --earm-loss-rows it is so up to rounding.
    """

    def __init__(self, task, cfg):
        super().__init__(task, cfg.sentence_avg, cfg.label_smoothing, max(cfg.ignore_prefix_size, 0), cfg.report_accuracy)
        check_config(cfg)
        check_task(cfg, task)
        self.cfg = cfg
        build_family = getattr(task, "build_model_family", None)
        self.family = EncoderDecoderFamily(cfg, task) if build_family is None else build_family(cfg)
        check_effect(cfg, self.family.without_effect)
        self.post = cfg.earm_energy_steps == "post"
        self.state = MeterState()
        restore_state_at_epoch_ends()
        self.clock = TrainingClock(task)
        self.schedule = EarmSchedule(cfg, self.clock, self.state)
        self.guard = NonfiniteGuard(task, self._is_active, self.state)
        self.workers = AllWorkers(task, self._shares_normalizer, self._move_normalizer)
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

    def _shares_normalizer(self) -> bool:
        """Whether that step has negatives whose weights are normalised over all workers."""
        return self._is_active() and self.cfg.earm_normalizer == "batch" and not self.cfg.earm_control

    def _forward_in_rows(self, model, sample):
        """Cross-entropy alone, without ever holding all logits."""
        mask, head = self._mask(sample), self.family.forward(model, sample).data
        energies, _, smoothed = self._scores(head, sample["target"], mask, smoothed=True)
        loss, nll = _sum(smoothed, mask), _sum(energies.nll, mask)
        return self._finish(loss, nll, sample, None, head, mask)

    def _forward_with_energy(self, model, sample, weight):
        """One forward pass of data and negatives, cross-entropy and E-ARM from one logsumexp of each."""
        mask, target = self._mask(sample), sample["target"]
        if self.cfg.earm_control:
            passes = self.family.forward(model, sample)
        else:
            started = time.perf_counter()
            samples = self.family.draw(model, sample, self.cfg.earm_negatives)
            seconds = time.perf_counter() - started
            passes = self.family.forward_pair(model, sample, samples)

        energies, alive, smoothed = self._scores(passes.data, target, mask, smoothed=True)
        cross_entropy, nll = _sum(smoothed, mask), _sum(energies.nll, mask)
        if passes.teacher_forced is not passes.data:
            smooth = self.cfg.earm_smooth_history
            energies, alive, smoothed = self._scores(passes.teacher_forced, target, mask, smoothed=smooth)
        energies, alive, smoothed = self._contrasted(energies, alive, smoothed)
        history = smoothed if self.cfg.earm_smooth_history else None
        if self.cfg.earm_control:
            terms = nll_terms(energies, alive, positive_history=history, **self._steps())
            steps = alive if self.cfg.earm_energy_steps == "all" else alive.any(1)
            values = {"earm_batches": 1, "earm_loss": terms.detach(), "earm_steps": steps.sum()}
        else:
            earm = self._earm(energies, alive, history, passes.negatives, samples)
            terms, values = earm.loss, earm_values(earm, samples, seconds)
        loss = cross_entropy + weight * terms
        return self._finish(loss, nll, sample, values, passes.data, mask)

    def _mask(self, sample):
        """(B, T) True on the tokens that count."""
        mask = sample["target"].ne(self.padding_idx)
        mask[:, : self.ignore_prefix_size] = False
        return mask

    def _contrasted(self, energies, alive, smoothed):
        """Energies, mask and smoothed NLL of the data at the steps that negatives are held against."""
        pick = self.family.contrasted
        return TokenEnergies(*map(pick, energies)), pick(alive), pick(smoothed)

    def _scores(self, head, tokens, mask, *, smoothed):
        """Energies, mask and NLL, smoothed or not, of steps: (B, T), or (B, T + 1) with energies read after the last token."""
        epsilon = self.eps if smoothed else 0.0
        found = head.statistics(post_tokens(tokens) if self.post else tokens, mean=epsilon > 0)
        energies, alive = TokenEnergies(found.logsumexp, found.target_logit), mask
        if self.post:
            energies, alive = with_post_step(energies, mask)
        return energies, alive, smoothed_nll(energies, found.mean_logit, head.vocabulary, epsilon)

    def _steps(self) -> dict:
        return {"recent_tokens": self.cfg.earm_recent_tokens, "energy_steps": str(self.cfg.earm_energy_steps)}

    def _earm(self, energies, alive, history, negatives, samples):
        negative, negative_alive, _ = self._scores(negatives, samples.tokens, samples.mask, smoothed=False)
        statistics, log_normalizer = self._shared(alive, negative, negative_alive)
        return earm_loss(
            energies,
            alive,
            negative,
            negative_alive,
            normalizer=str(self.cfg.earm_normalizer),
            sources=samples.sources,
            statistics=statistics,
            log_normalizer=log_normalizer,
            rao_blackwell=self.cfg.earm_variance_reduction == "rao-blackwell" and self.cfg.earm_energy_steps == "all",
            positive_history=history,
            **self._steps(),
        )

    def _shared(self, alive, negative, negative_alive):
        """Statistics of all workers' negatives, and the moving normaliser; None of each where a batch has its own."""
        if self.cfg.earm_normalizer == "source":
            return None, None
        own = batch_statistics(alive, negative, negative_alive, energy_steps=str(self.cfg.earm_energy_steps))
        if not self.clock.dummy:
            return self.workers.join(own), self.moving_normalizer
        # It counts for nobody; and its loss, which fairseq multiplies by zero, is finite by its own weights alone.
        self.workers.join(no_statistics(1))
        return own, None

    def _move_normalizer(self, everyone) -> None:
        """With --earm-normalizer-ema: average the normaliser of all workers over updates, remembered across a resume."""
        if self.cfg.earm_normalizer_ema == 0:
            return
        batch = everyone.log_normalizer.squeeze(0)
        self.moving_normalizer = moving_log_normalizer(self.state.get("log_normalizer"), batch, self.cfg.earm_normalizer_ema)
        if bool(batch.isnan().any() | batch.isposinf().any()):
            self.moving_normalizer = batch
        else:
            self.state.set("log_normalizer", self.moving_normalizer.cpu())

    def _finish(self, loss, nll, sample, values, head, mask):
        """Sample size and log; a loss that is not finite spoils the gradient for sure and is kept out of the log."""
        sentences = sample["target"].size(0)
        sample_size = sentences if self.sentence_avg else sample["ntokens"]
        log = {
            "loss": loss.data, "nll_loss": nll.data, "ntokens": sample["ntokens"], "nsentences": sentences, "sample_size": sample_size,
        }
        finite = bool(torch.isfinite(loss))
        if self.report_accuracy:
            correct = head.likeliest()[:, : mask.size(1)].eq(sample["target"]) & mask
            log["n_correct"], log["total"] = int(correct.sum()), int(mask.sum())
        if not finite:
            loss = loss * float("nan")
            log, values = {key: torch.zeros_like(value) if torch.is_tensor(value) else 0 for key, value in log.items()}, None
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
