"""Task `residual_language_modeling`: an energy network on top of a frozen language model (Deng et al. 2020)."""
import logging
import os
from dataclasses import dataclass, field
from typing import Optional

import torch
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import get_available_dataset_impl
from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import FairseqTask, register_task
from fairseq.tasks.language_modeling import SAMPLE_BREAK_MODE_CHOICES
from omegaconf import II

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.base_lm import load_base_lm
from fairseq_earm.sampling.blocks import load_blocks
from fairseq_earm.sampling.continuation import ContinuationSampler
from fairseq_earm.sampling.layout import prefix_continuation
from fairseq_earm.sampling.store import SampleStore
from fairseq_earm.tasks.batching import ExactBatches
from fairseq_earm.tasks.checks import (
    check_criterion, check_energy_network, check_proposal, check_trains, report_idle_proposal, report_other_proposal,
)
from fairseq_earm.tasks.joint_sampling import JointSampling, JointSamplingConfig
from fairseq_earm.tasks.negatives import DTYPES, BaseDtype, OnlineContinuations, StoredContinuations, draw_seed
from fairseq_earm.tasks.residual_data import ResidualDataset

logger = logging.getLogger(__name__)

ONLINE = "online"


@dataclass
class ResidualLanguageModelingConfig(JointSamplingConfig):
    """What `--task residual_language_modeling` takes."""

    data: Optional[str] = field(default=None, metadata={"help": "folder of text binarised with the base model's dictionary"})
    base_lm: Optional[str] = field(
        default=None, metadata={"help": "checkpoint of the language model whose residual is learnt; it is never changed"}
    )
    base_dtype: BaseDtype = field(
        default="float32", metadata={"help": "precision of the base model's parameters"}
    )
    prefix_length: int = field(default=120, metadata={"help": "tokens that are given; the rest of the sequence is predicted"})
    sequence_length: int = field(
        default=160, metadata={"help": "tokens of a sequence, the prefix included; what is shorter in the data is skipped"}
    )
    sample_break_mode: SAMPLE_BREAK_MODE_CHOICES = field(
        default="none",
        metadata={"help": "none: sequences are consecutive blocks of the whole text; otherwise as in language_modeling"},
    )
    negatives: str = field(
        default=ONLINE,
        metadata={
            "help": "online: the base model continues each prefix anew in every update; or a folder in which "
            "fairseq-earm-sample wrote `train`, `valid` and so on, from whose continuations each visit draws"
        },
    )
    negatives_temperature: float = field(
        default=1.0,
        metadata={
            "help": "with online negatives: the base's logits are divided by it. With another value than 1 the energy learns the "
            "residual of that proposal, not of the base; so with the next two flags"
        },
    )
    negatives_topk: int = field(
        default=-1,
        metadata={
            "help": "with online negatives: draw among the k likeliest tokens only; -1 for all, as the residual of the base needs"
        },
    )
    negatives_topp: float = field(
        default=-1.0,
        metadata={
            "help": "with online negatives: draw from the smallest set of tokens with probability p; -1 for all, as the residual of "
            "the base needs"
        },
    )
    train_subset: str = II("dataset.train_subset")
    dataset_impl: Optional[ChoiceEnum(get_available_dataset_impl())] = II("dataset.dataset_impl")
    # What `transformer_lm` asks of its task: without them --arch transformer_lm ends in a traceback of fairseq's configuration,
    # before `build_model` can say that it is no energy network. References, because anything else would be a flag.
    add_bos_token: bool = II("common.tpu")
    tokens_per_sample: int = II("task.sequence_length")
    max_target_positions: Optional[int] = II("task.sequence_length")


@register_task("residual_language_modeling", dataclass=ResidualLanguageModelingConfig)
class ResidualLanguageModelingTask(ExactBatches, JointSampling, FairseqTask):
    """Text in sequences of one length, and continuations of their prefixes from a frozen base model.

    The base model is in no checkpoint and no optimizer; it is loaded for training only.

    Attributes:
        energy_pad: index of padding in what the energy network reads.
    Raises:
        UsageError: lengths that leave no prefix or continuation, settings that cannot be sampled from.
    """

    def __init__(self, cfg, dictionary):
        super().__init__(cfg)
        _check_lengths(cfg)
        check_proposal(cfg.negatives_temperature, cfg.negatives_topk, cfg.negatives_topp, symbols=len(dictionary))
        self.dictionary = dictionary
        self.energy_pad = dictionary.pad()
        self.source = None  # of negatives, in training
        self.check_base()

    @classmethod
    def setup_task(cls, cfg, **kwargs):
        """Load the dictionary of the data.

        Raises:
            UsageError: there is none.
        """
        if not cfg.data:
            raise UsageError("no data: give the folder that fairseq-preprocess wrote as the first argument")
        path = os.path.join(utils.split_paths(cfg.data)[0], "dict.txt")
        if not os.path.isfile(path):
            raise UsageError(f"{path}: there is no such file; give a folder that fairseq-preprocess --only-source wrote")
        dictionary = Dictionary.load(path)
        logger.info(f"dictionary: {len(dictionary)} types")
        return cls(cfg, dictionary)

    @property
    def source_dictionary(self):
        return self.dictionary

    @property
    def target_dictionary(self):
        return self.dictionary

    def load_dataset(self, split, epoch=1, combine=False, **kwargs):
        """Load a split as a `ResidualDataset`."""
        paths = utils.split_paths(self.cfg.data)
        path = os.path.join(paths[(epoch - 1) % len(paths)], split)
        blocks = load_blocks(
            path, self.dictionary, sequence_length=self.cfg.sequence_length, break_mode=str(self.cfg.sample_break_mode),
            dataset_impl=self.cfg.dataset_impl, combine=combine,
        )
        if isinstance(self.source, StoredContinuations):
            self._open_store(split, blocks)
        self.datasets[split] = ResidualDataset(blocks, self.cfg.prefix_length, split, shuffle=split == self.cfg.train_subset)

    def _open_store(self, split: str, blocks) -> None:
        path = os.path.join(self.cfg.negatives, split)
        store = SampleStore.open(path, blocks, dictionary=self.dictionary, prefix_length=self.cfg.prefix_length)
        self.source.add(split, store, self.count)

    def build_model(self, cfg, from_checkpoint=False):
        """The stock method; what is to be trained must be an energy network with a position for every token."""
        if from_checkpoint:
            return super().build_model(cfg, from_checkpoint)
        check_energy_network(cfg)
        model = super().build_model(cfg, from_checkpoint)
        if self.cfg.sequence_length > model.max_positions():
            raise UsageError(
                f"--sequence-length {self.cfg.sequence_length}: the energy network reads {model.max_positions()} tokens at most; "
                "give a smaller length, or a larger --max-positions"
            )
        return model

    def build_criterion(self, cfg, *args, **kwargs):
        """The stock method; it must be a criterion that asks for negatives."""
        criterion = super().build_criterion(cfg, *args, **kwargs)
        check_criterion(cfg, self.source is not None)
        return criterion

    def prepare_negatives(self, count: int) -> None:
        """Get ready to give `count` negatives for each sequence; the criterion calls this before any data is loaded."""
        check_trains(self.cfg)
        self.count = count
        if self.cfg.negatives == ONLINE:
            self.source = self._online()
        else:
            _check_one_folder(self.cfg)
            report_idle_proposal(self.cfg)
            self.source = StoredContinuations(self.cfg.base_lm)

    def _online(self) -> OnlineContinuations:
        cfg = self.cfg
        if cfg.base_lm is None:
            raise UsageError("--base-lm is missing: give the checkpoint of the language model whose residual is learnt")
        length, dtype = cfg.sequence_length, DTYPES[str(cfg.base_dtype)]
        base = load_base_lm(cfg.base_lm, self, flag="--base-lm", sequence_length=length, dtype=dtype)
        proposal = {"temperature": cfg.negatives_temperature, "topk": cfg.negatives_topk, "topp": cfg.negatives_topp}
        report_other_proposal("--negatives-temperature, --negatives-topk, --negatives-topp", **proposal)
        return OnlineContinuations(base, ContinuationSampler(self.dictionary, length - cfg.prefix_length, **proposal))

    def sequences(self, sample: dict) -> torch.Tensor:
        """(B, L) the data as the energy network reads it."""
        return sample["net_input"]["src_tokens"]

    def negatives(self, sample: dict, count: int, *, training: bool) -> torch.Tensor:
        """(B·count, L) the same prefixes with continuations from the base model, `count` of one prefix after the other.

        Args:
            sample: a batch.
            training: fresh draws in each update; otherwise the same ones for the same batch.
        """
        drawn = self.source(sample, count, draw_seed(sample["id"], training=training))
        return prefix_continuation(self.sequences(sample)[:, : self.cfg.prefix_length], drawn)


def _check_one_folder(cfg) -> None:
    """Refuse stored negatives for data whose sequences are others in the next epoch."""
    folders = utils.split_paths(cfg.data)
    if len(folders) > 1:
        raise UsageError(
            f"--negatives {cfg.negatives}: these samples continue the text of one folder, and {cfg.data} names "
            f"{len(folders)}; put all of it into one folder, as train, train1, train2 and so on, and make them again, "
            "or give --negatives online"
        )


def _check_lengths(cfg) -> None:
    if cfg.prefix_length < 0:
        raise UsageError(f"--prefix-length {cfg.prefix_length}: give at least 0")
    if cfg.prefix_length >= cfg.sequence_length:
        raise UsageError(
            f"--prefix-length {cfg.prefix_length}: nothing is left to predict of --sequence-length {cfg.sequence_length}; "
            "give a shorter prefix or a longer sequence"
        )
