"""Task `residual_translation`: an energy network on top of a frozen translation model (Deng et al. 2020, with a source)."""
import logging
from dataclasses import dataclass, field
from typing import Optional

import torch
from fairseq import utils
from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch.nn.utils.rnn import pad_sequence

from fairseq_earm.errors import UsageError
from fairseq_earm.models.load_energy import load_energy, report_other_base
from fairseq_earm.reranking import EnergyReranker
from fairseq_earm.sampling.ancestral import AncestralSampler
from fairseq_earm.sampling.continuation import finite_log_q
from fairseq_earm.sampling.frozen import FrozenModel, load_frozen
from fairseq_earm.sampling.layout import joint_dictionary, source_target
from fairseq_earm.tasks.batching import ExactBatches
from fairseq_earm.tasks.checks import check_criterion, check_energy_flags, check_energy_network, check_trains, generating
from fairseq_earm.tasks.negatives import DTYPES, BaseDtype, draw_seed, own_random_numbers

logger = logging.getLogger(__name__)

# Tokens that the energy network reads in one pass while candidates are scored.
MAX_TOKENS = 2**14


@dataclass
class ResidualTranslationConfig(TranslationConfig):
    """What `--task residual_translation` takes beside the flags of `translation`."""

    base_model: Optional[str] = field(
        default=None,
        metadata={"help": "in training: checkpoint of the translation model whose residual is learnt; it is never changed"},
    )
    base_dtype: BaseDtype = field(default="float32", metadata={"help": "precision of the base model's parameters"})
    negatives_max_len_a: float = field(
        default=1.5, metadata={"help": "negatives have at most a·(source length) + b tokens: a"}
    )
    negatives_max_len_b: int = field(
        default=10, metadata={"help": "negatives have at most a·(source length) + b tokens: b"}
    )
    energy_path: Optional[str] = field(
        default=None,
        metadata={
            "help": "in generation: checkpoint of an energy network; candidates are ordered by (log q(x|source) - "
            "energy-weight * E(source, x)) / length^lenpen. H- and D-lines then show this score in base 2, P-lines still log q"
        },
    )
    energy_weight: float = field(default=1.0, metadata={"help": "weight of -E, 0 or more; 0 is the stock order"})
    energy_select: ChoiceEnum(["best", "resample"]) = field(
        default="best",
        metadata={
            "help": "best: sort candidates by score. resample: with --sampling, draw one of them with probability "
            "proportional to exp(-energy-weight * E) (Algorithm 1) and order the others by further draws, repeatable by --seed"
        },
    )


@register_task("residual_translation", dataclass=ResidualTranslationConfig)
class ResidualTranslationTask(ExactBatches, TranslationTask):
    """Sentence pairs, and translations of the same sources by a frozen base model.

    The energy network reads the source sentence and the translation behind it, and of these the first `max_positions`
    tokens. The base model is in no checkpoint and no optimizer; it is loaded for training only.

    Attributes:
        energy_dictionary: the dictionary an energy network is built for.
        energy_pad: index of padding in what the energy network reads.
    Raises:
        UsageError: an energy weight that is negative or not finite, lengths that leave no token.
    """

    def __init__(self, cfg, src_dict, tgt_dict):
        super().__init__(cfg, src_dict, tgt_dict)
        check_energy_flags(cfg, cfg.energy_path is not None, "--energy-path")
        _check_lengths(cfg)
        self.energy_dictionary, self.shift = joint_dictionary(src_dict, tgt_dict)
        self.energy_pad = self.energy_dictionary.pad()
        self.longest = None  # that the energy network reads
        self.base = None

    def build_model(self, cfg, from_checkpoint=False):
        """The stock method; what is to be trained must be an energy network."""
        if not from_checkpoint:
            check_energy_network(cfg)
            if self.cfg.eval_bleu:
                raise UsageError("--eval-bleu: an energy network writes no translations; leave the flag out")
        model = super().build_model(cfg, from_checkpoint)
        self.longest = model.max_positions()
        return model

    def build_criterion(self, cfg, *args, **kwargs):
        """The stock method; it must be a criterion that asks for negatives."""
        criterion = super().build_criterion(cfg, *args, **kwargs)
        check_criterion(cfg, self.base is not None)
        return criterion

    def max_positions(self):
        """(source, target) tokens at most, for the base model too once it is there."""
        own = super().max_positions()
        return own if self.base is None else utils.resolve_max_positions(own, self.base.model.max_positions())

    def prepare_negatives(self, count: int) -> None:
        """Load the base model; the criterion calls this before any data is loaded."""
        check_trains(self.cfg)
        path = self.cfg.base_model
        if path is None:
            raise UsageError("--base-model is missing: give the checkpoint of the translation model whose residual is learnt")
        if self.cfg.left_pad_target:
            raise UsageError("--left-pad-target True: negatives start where padding would be; leave the flag out")
        base = load_frozen(path, self, flag="--base-model", dtype=DTYPES[str(self.cfg.base_dtype)])
        kind = type(base.model).__name__
        if not (hasattr(base.model, "encoder") and hasattr(base.model, "decoder")):
            raise UsageError(f"--base-model {path} is a {kind}: give a translation model (fairseq-train --task translation)")
        self.base = base
        self.sampler = AncestralSampler(
            self.target_dictionary, max_len_a=self.cfg.negatives_max_len_a, max_len_b=self.cfg.negatives_max_len_b
        )

    def sequences(self, sample: dict) -> torch.Tensor:
        """(B, L) the data as the energy network reads it, right-padded."""
        return self._joint(sample["net_input"]["src_tokens"], sample["target"])

    def negatives(self, sample: dict, count: int, *, training: bool) -> torch.Tensor:
        """(B·count, L) the same sources with translations by the base model, `count` of one source after the other.

        Args:
            sample: a batch.
            training: fresh draws in each update; otherwise the same ones for the same batch.
        Raises:
            UsageError: the base model's probabilities are no numbers.
        """
        inputs = sample["net_input"]
        device = inputs["src_tokens"].device
        base = self.base.to(device).model
        with own_random_numbers(draw_seed(sample["id"], training=training), device):
            drawn = self.sampler(base, inputs, count)
        finite_log_q(drawn.log_q)
        return self._joint(inputs["src_tokens"], drawn.tokens, drawn.sources)

    def _joint(self, src_tokens, target, sources=None) -> torch.Tensor:
        return source_target(
            src_tokens, target, sources, pad=self.energy_pad, shift=self.shift, longest=self.longest
        )

    def build_generator(self, models, args, *rest, **kwargs):
        """The stock generator, wrapped in an `EnergyReranker` under `--energy-path`."""
        generator = super().build_generator(models, args, *rest, **kwargs)
        if self.cfg.energy_path is None:
            return generator
        log_weight = CandidateEnergies(self._load_energy())
        return EnergyReranker(
            generator, models, weight=self.cfg.energy_weight, select=self.cfg.energy_select, log_weight=log_weight
        )

    def _load_energy(self) -> FrozenModel:
        energy = load_energy(self.cfg.energy_path, self)
        if not isinstance(energy.task, ResidualTranslationTask):
            raise UsageError(
                f"--energy-path {self.cfg.energy_path}: trained for {type(energy.task).__name__}; give an energy network trained "
                "with --task residual_translation"
            )
        settings = generating(self.cfg)
        for path in [] if settings is None else utils.split_paths(settings.common_eval.path):
            report_other_base(energy, self.cfg.energy_path, path)
        return energy


class CandidateEnergies:
    """−E of candidate translations, as `EnergyReranker` asks for it.

    Args:
        energy: an energy network of `residual_translation`.
    """

    def __init__(self, energy: FrozenModel):
        self.energy = energy
        self.pad = energy.task.energy_pad
        self.layout = {"pad": self.pad, "shift": energy.task.shift, "longest": energy.model.max_positions()}

    @torch.no_grad()
    def __call__(self, net_input: dict, hypotheses: list) -> torch.Tensor:
        """(R,) of every hypothesis, sentence after sentence."""
        src_tokens = net_input["src_tokens"]
        flat = [hypothesis["tokens"] for candidates in hypotheses for hypothesis in candidates]
        if not flat:
            return torch.zeros(0, device=src_tokens.device)
        counts = torch.tensor([len(candidates) for candidates in hypotheses], device=src_tokens.device)
        sources = torch.arange(len(hypotheses), device=src_tokens.device).repeat_interleave(counts)
        target = pad_sequence(flat, batch_first=True, padding_value=self.pad).long()
        tokens = source_target(src_tokens, target, sources, **self.layout)
        model = self.energy.to(tokens.device).model
        return torch.cat([-model(src_tokens=part) for part in tokens.split(max(1, MAX_TOKENS // tokens.size(1)))])


def _check_lengths(cfg) -> None:
    a, b = cfg.negatives_max_len_a, cfg.negatives_max_len_b
    if not 0 <= a < float("inf"):
        raise UsageError(f"--negatives-max-len-a {a}: give a finite number of at least 0")
    if b < 0 or a == b == 0:
        raise UsageError(f"--negatives-max-len-b {b}: give a number of at least 0 that leaves negatives a token")
