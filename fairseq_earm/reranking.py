"""Order candidate translations by the model's own energy, or draw one of them by it.

A softmax q and its free offset make p_θ(x) = q(x) · μ(x) / Z, log μ(x) being the logsumexp at the last step (Wang et al.,
Eq. 4). Candidates come from fairseq's own generator, which is wrapped and never changed.
"""
from __future__ import annotations

import json
import logging
from typing import Callable, Dict, List, Optional, Sequence

import torch
from fairseq.search import Sampling
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fairseq_earm.ebm.weights import resample
from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.isolation import on_its_own
from fairseq_earm.sampling.scoring import MAX_LOGITS, score_sequences

logger = logging.getLogger(__name__)

Hypotheses = List[List[Dict[str, Tensor]]]


class EnergyReranker:
    """A fairseq generator whose hypotheses come in the order of score and energy, or of draws by energy.

    Every hypothesis keeps its keys; `score` becomes (log q(x) + weight · log μ(x)) / length^lenpen in nats, the division
    left out under `--unnormalized`, and `log_mu` is added. log q is what the wrapped generator says it is: with the
    temperature, penalties and language model it was given. `positional_scores` stay those of log q, so they no longer
    add up to `score`.

    Args:
        generator: a fairseq SequenceGenerator, by beam search or by sampling. Its other attributes show through.
        models: the models it generates with; log μ is the mean over them.
        weight: factor of log μ, finite and not negative. 0 keeps the stock scores and order.
        select: "best" sorts by score, ties in the stock order. "resample" orders by draws without replacement with
            probability proportional to μ^weight: the first is the draw of Algorithm 1 (Deng et al. 2020), exact in the
            limit of many candidates drawn from q. With top-k, top-p or a temperature, q is that proposal, as there.
        energy_step: "last" reads log μ at the last token's step, "post" one step after it.
        log_weight: what takes the place of log μ, −E of an energy network for one: (the batch's `net_input`, hypotheses of
            its sentences) → (R,) of every hypothesis, sentence after sentence, in nats. `energy_step` is not used then.
    Raises:
        UsageError: a model that is no encoder-decoder, a generator that has no candidates to choose from.
    """

    def __init__(
        self, generator, models: Sequence, *, weight: float = 1.0, select: str = "best", energy_step: str = "last",
        log_weight: Optional[Callable[[dict, Hypotheses], Tensor]] = None,
    ):
        if log_weight is None:
            _check_models(models)
        _check_candidates(generator, select)
        self.log_weight = log_weight
        self.generator = generator
        self.weight = weight
        self.select = select
        self.energy_step = energy_step
        self.lenpen = generator.len_penalty if generator.normalize_scores else 0.0
        # A stream of its own, from --seed: drawing from the global one would change which candidates --sampling finds.
        self._random = torch.Generator().manual_seed(torch.initial_seed())
        self._non_finite = 0
        # fairseq-earm-tune reads this line: with it, log μ can be told from the printed scores.
        settings = {"energy_weight": weight, "lenpen": self.lenpen, "select": str(select)}
        if log_weight is None:
            settings["energy_step"] = str(energy_step)
        logger.info("energy reranking: %s", json.dumps(settings))

    def __getattr__(self, name: str):
        if name == "generator":  # absent while unpickling: do not look for it in itself
            raise AttributeError(name)
        return getattr(self.generator, name)

    @torch.no_grad()
    def generate(self, models: Sequence, sample: dict, **kwargs) -> Hypotheses:
        """Generate as the wrapped generator does, with its keyword arguments, and put its hypotheses in the new order."""
        hypotheses = self.generator.generate(models, sample, **kwargs)
        if self.log_weight is not None:
            log_mu = self.log_weight(sample["net_input"], hypotheses)
        else:
            log_mu = candidate_log_mu(models, sample["net_input"], hypotheses, energy_step=self.energy_step)
        self._warn_of_non_finite(log_mu)
        counts = [len(candidates) for candidates in hypotheses]
        return [self._reorder(candidates, mu) for candidates, mu in zip(hypotheses, log_mu.split(counts))]

    def _reorder(self, candidates: List[Dict[str, Tensor]], log_mu: Tensor) -> List[Dict[str, Tensor]]:
        """Rescore and order the hypotheses of one sentence; those without a finite log μ (K,) come last."""
        if not candidates:
            return candidates
        if self.weight == 0:
            weighted = torch.zeros_like(log_mu)
        else:
            weighted = (self.weight * log_mu).masked_fill(~log_mu.isfinite(), -float("inf"))
        lengths = log_mu.new_tensor([len(hypothesis["tokens"]) for hypothesis in candidates])
        scores = torch.stack([hypothesis["score"] for hypothesis in candidates]) + weighted / lengths**self.lenpen
        if self.select == "resample":
            order = resample(weighted.cpu(), self._random)
        else:
            order = scores.sort(descending=True, stable=True).indices
        return [{**candidates[i], "score": scores[i], "log_mu": log_mu[i]} for i in order.tolist()]

    def _warn_of_non_finite(self, log_mu: Tensor) -> None:
        count = int((~log_mu.isfinite()).sum())
        self._non_finite += count
        if count:
            logger.warning(
                "the energy of %d of %d candidates is not finite (%d so far): they are put last",
                count, log_mu.numel(), self._non_finite,
            )


def candidate_log_mu(
    models: Sequence, net_input: dict, hypotheses: Hypotheses, *, energy_step: str = "last", max_logits: int = MAX_LOGITS
) -> Tensor:
    """(R,) log μ of every hypothesis, sentence after sentence, in nats; the mean over the models (Eq. 4).

    Args:
        models: unwrapped encoder-decoder models; they are scored in eval mode and left in the mode they were in.
        net_input: the batch's `net_input`, B sentences padded on either side.
        hypotheses: for each of the B sentences, dictionaries whose `tokens` (T,) end with end-of-sentence.
        energy_step: "last" or "post", see `score_sequences`.
        max_logits: bound on candidates × length × vocabulary in one decoder pass.
    """
    flat = [hypothesis["tokens"] for candidates in hypotheses for hypothesis in candidates]
    device = net_input["src_tokens"].device
    if not flat:
        return torch.zeros(0, device=device)
    counts = torch.tensor([len(candidates) for candidates in hypotheses], device=device)
    sources = torch.arange(len(hypotheses), device=device).repeat_interleave(counts)
    lengths = torch.tensor([tokens.numel() for tokens in flat], device=device)
    tokens = pad_sequence(flat, batch_first=True, padding_value=models[0].decoder.dictionary.pad()).long()
    mask = torch.arange(tokens.size(1), device=device) < lengths.unsqueeze(1)
    rows = max(1, max_logits // ((tokens.size(1) + 1) * len(models[0].decoder.dictionary)))
    scored = []
    for model in models:
        with on_its_own(model):
            parts = [
                _score_part(model, net_input, tokens[at : at + rows], mask[at : at + rows], sources[at : at + rows], energy_step)
                for at in range(0, len(flat), rows)
            ]
        scored.append(torch.cat(parts))
    return torch.stack(scored).mean(0)


def _score_part(model, net_input: dict, tokens: Tensor, mask: Tensor, sources: Tensor, energy_step: str) -> Tensor:
    """(R,) log μ of some rows, with only the sentences and the steps that they need."""
    needed, local = sources.unique(return_inverse=True)
    # Without the reference's decoder input, which under --left-pad-target starts with padding.
    kept = {k: v for k, v in net_input.items() if k != "prev_output_tokens"}
    inputs = {k: v.index_select(0, needed) if torch.is_tensor(v) else v for k, v in kept.items()}
    steps = int(mask.sum(1).max())
    return score_sequences(
        model, inputs, tokens[:, :steps], mask[:, :steps], sources=local, energy_step=energy_step
    ).log_mu


def _check_models(models: Sequence) -> None:
    for model in models:
        name = type(model).__name__
        if not (hasattr(model, "encoder") and hasattr(model, "decoder")):
            raise UsageError(f"--energy-rerank needs encoder-decoder models, and {name} is none: leave the flag out")


def _check_candidates(generator, select: str) -> None:
    if not hasattr(generator, "beam_size"):
        raise UsageError("reranking by energy has no candidates to order under --score-reference: leave one of the two out")
    beam = generator.beam_size
    if select == "resample" and beam == 1:
        raise UsageError("--energy-select resample has nothing to draw from with --beam 1: give --beam 2 or more")
    if beam == 1:
        logger.warning("reranking by energy with --beam 1 has one candidate per sentence: it changes scores, not translations")
    if select == "resample" and not isinstance(generator.search, Sampling):
        logger.warning(
            "--energy-select resample with beam search: beam candidates are not draws from the model, so the choice does "
            "not follow Algorithm 1; add --sampling for that"
        )
