"""`fairseq-generate` and `fairseq-interactive` for a task of language-model sequences with an energy network."""
import logging
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import torch
from fairseq import utils
from fairseq.data import IdDataset, ListDataset, NestedDictionaryDataset, NumelDataset, PadDataset
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.configs import GenerationConfig
from omegaconf import II

from fairseq_earm.errors import UsageError
from fairseq_earm.joint_generation import JointGenerator, check_prefix, chunk_of
from fairseq_earm.models.load_energy import load_energy, report_other_base
from fairseq_earm.sampling.base_lm import load_base_lm
from fairseq_earm.tasks.checks import check_proposal, generating

logger = logging.getLogger(__name__)

PROPOSAL_FLAGS = ("--temperature", "--sampling-topk", "--sampling-topp")
# Flags of fairseq's generation that a sample of fixed length cannot obey.
WITHOUT_EFFECT = (
    "prefix_size", "max_len_a", "max_len_b", "min_len", "unkpen", "no_repeat_ngram_size", "match_source_len", "constraints",
    "diverse_beam_groups", "diversity_rate", "lm_path", "score_reference", "print_alignment", "retain_dropout",
)


@dataclass
class JointSamplingConfig(FairseqDataclass):
    """What the task takes for generating."""

    energy_path: Optional[str] = field(
        default=None,
        metadata={"help": "generate from the joint model P_LM * exp(-E): --path is the base, and this the energy's checkpoint"},
    )
    energy_candidates: int = field(
        default=10000,
        metadata={"help": "continuations drawn from the base for each prefix; the more, the closer to the joint model"},
    )
    energy_select: ChoiceEnum(["resample", "best"]) = field(
        default="resample",
        metadata={
            "help": "resample: draw candidates with probability proportional to exp(-E) (Algorithm 1), further hypotheses "
            "without replacement. best: those with the highest log q - E"
        },
    )
    energy_chunk: int = field(
        default=0, metadata={"help": "candidates drawn and scored at a time; 0: as many as make --max-tokens"}
    )
    max_tokens: Optional[int] = II("dataset.max_tokens")


class JointSampling:
    """For a task, before fairseq's in the order of bases: its generator is a `JointGenerator`.

    S-lines show the prefix and T-lines how the text went on; H- and D-lines show (log q − E) / T^lenpen in base 2, which is
    log q per token where there is no energy; P-lines log q of each token. fairseq prints no end-of-sentence, but P-lines
    count them.

    Attributes:
        base_path: `--path`, when generating.
    """

    base_path: Optional[str] = None

    @classmethod
    def add_args(cls, parser):
        """The task's flags. fairseq wants --beam to be --nbest under --sampling, and there is no beam here: both are 1."""
        super().add_args(parser)
        parser.set_defaults(beam=1)

    def check_base(self) -> None:
        """When generating, refuse a `--path` that is no base for this data, before fairseq trips over it.

        fairseq loads that model by itself and without looking at dictionaries, so it is loaded here once more.

        Raises:
            UsageError: see `load_base_lm`.
        """
        settings = generating(self.cfg)
        if settings is None or not settings.generation.sampling:
            return
        paths = utils.split_paths(settings.common_eval.path)
        if len(paths) != 1:
            raise UsageError(f"--path names {len(paths)} models: give the one base model")
        load_base_lm(paths[0], self, flag="--path", sequence_length=self.cfg.sequence_length)
        self.base_path = paths[0]

    def build_generator(self, models, args, *rest, **kwargs):
        """A `JointGenerator` by the flags.

        Raises:
            UsageError: an energy that does not fit the base, flags without meaning here.
        """
        cfg = self.cfg
        _check_flags(cfg, args)
        check_proposal(
            args.temperature, args.sampling_topk, args.sampling_topp, symbols=len(self.source_dictionary), flags=PROPOSAL_FLAGS
        )
        base = models[0]
        energy = None
        if cfg.energy_path is not None:
            weights = next(base.parameters())
            energy = load_energy(cfg.energy_path, self, dtype=weights.dtype).to(weights.device)
            _check_lengths(cfg, energy.task.cfg)
            if self.base_path is not None:
                report_other_base(energy, cfg.energy_path, self.base_path)
        generator = JointGenerator(
            base, cfg.sequence_length - cfg.prefix_length, energy=None if energy is None else energy.model,
            candidates=cfg.energy_candidates, select=str(cfg.energy_select), nbest=args.nbest,
            chunk=cfg.energy_chunk or chunk_of(cfg.sequence_length, cfg.max_tokens), temperature=args.temperature,
            topk=args.sampling_topk, topp=args.sampling_topp, lenpen=0.0 if args.unnormalized else args.lenpen,
        )
        self.room = generator.room
        return generator

    def build_dataset_for_inference(self, src_tokens, src_lengths, **kwargs):
        """Lines as prefixes, without the end-of-sentence that reading them appended."""
        prefixes = [tokens[:-1] for tokens in src_tokens]
        sizes = np.array([len(prefix) for prefix in prefixes])
        check_prefix(int(sizes.max()), self.cfg.sequence_length - self.cfg.prefix_length, self.room)
        lines = ListDataset(prefixes, sizes)
        inputs = {
            "src_tokens": PadDataset(lines, pad_idx=self.source_dictionary.pad(), left_pad=False),
            "src_lengths": NumelDataset(lines, reduce=False),
        }
        return NestedDictionaryDataset({"id": IdDataset(), "net_input": inputs}, sizes=[sizes])

    def inference_step(self, generator, models, sample, prefix_tokens=None, constraints=None):
        """Continue the prefixes of a batch of the data, or of lines."""
        inputs = sample["net_input"]
        if sample.get("target") is not None:
            # fairseq-generate prints these after this call: as S-lines, without the continuation.
            inputs["src_tokens"] = inputs["src_tokens"][:, : self.cfg.prefix_length]
        with torch.no_grad():
            return generator.generate(models, sample, prefix_tokens=inputs["src_tokens"])


def _check_flags(cfg, args) -> None:
    if not args.sampling:
        raise UsageError("--task residual_language_modeling generates by sampling, not by search: add --sampling")
    defaults = GenerationConfig()
    idle = [name for name in WITHOUT_EFFECT if getattr(args, name, None) != getattr(defaults, name)]
    if idle:
        flag = f"--{idle[0].replace('_', '-')}"
        raise UsageError(f"{flag} means nothing to samples of {cfg.sequence_length - cfg.prefix_length} tokens: leave it out")
    chosen, defaults = (cfg.energy_candidates, str(cfg.energy_select)), (JointSamplingConfig.energy_candidates, "resample")
    if cfg.energy_path is None and chosen != defaults:
        raise UsageError("--energy-candidates and --energy-select choose by an energy: give its checkpoint as --energy-path")
    if cfg.energy_chunk < 0:
        raise UsageError(f"--energy-chunk {cfg.energy_chunk}: give 1 or more, or leave it out")


def _check_lengths(cfg, trained) -> None:
    if not hasattr(trained, "prefix_length"):
        raise UsageError(
            f"--energy-path {cfg.energy_path} is an energy of sentence pairs: give one of residual_language_modeling"
        )
    mine, its = ((c.prefix_length, c.sequence_length) for c in (cfg, trained))
    if mine != its:
        raise UsageError(
            f"--prefix-length {mine[0]} --sequence-length {mine[1]}: the energy of {cfg.energy_path} was trained with "
            f"--prefix-length {its[0]} --sequence-length {its[1]}; give these"
        )
