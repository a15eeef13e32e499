"""Seconds of an update by E-ARM and by cross-entropy, by fairseq's own trainer, and where they go."""
from __future__ import annotations

from typing import Dict, List, NamedTuple, Sequence, Tuple

import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from models import SMALL, dictionary, end_after, parallel_batch, real_batch, trained
from stages import Stages
from tables import Row, Setting, Table
from timing import compare, device, in_own_process

from fairseq_earm.sampling.isolation import isolated
from fairseq_earm.sampling.scoring import decoder_input
from fairseq_earm.tasks.earm_translation import EarmTranslationTask

RECIPE = (
    "--task earm_translation --arch transformer_iwslt_de_en --share-decoder-input-output-embed --dropout 0.3 --optimizer adam "
    "--adam-betas (0.9,0.98) --weight-decay 0.0001 --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 --clip-norm 1.0 "
    "--label-smoothing 0.1 --max-update 1000000"
).split()
SIZES = {"iwslt": [], "small": [word for name, size in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(size))]}
CROSS_ENTROPY = ["--criterion", "label_smoothed_cross_entropy"]
EARM = ["--criterion", "earm_cross_entropy", "--earm-start-update", "0"]
AS_LONG_AS_THE_SOURCE = ["--earm-max-len-a", "1", "--earm-max-len-b", "0"]
STAGES = ("sampling", "forward", "loss head", "backward", "optimizer")
QUICK = (("iwslt", 10000, 1000), ("small", 6000, 4000), ("small", 40000, 1000))
FULL = (
    *(("iwslt", 10000, tokens) for tokens in (1000, 4000, 8000)), ("iwslt", 40000, 4000),
    *(("small", vocabulary, tokens) for vocabulary in (6000, 10000, 40000) for tokens in (1000, 4000, 8000)),
)


class Update(NamedTuple):
    """A call updates a model once, always on the same batch; returns nothing."""

    trainer: Trainer
    batch: dict
    stages: Stages

    def __call__(self) -> None:
        self.stages.begin()
        self.trainer.train_step([self.batch])


def rows(setting: Setting, cases: Sequence[Tuple[str, int, int]] = QUICK, length: int = 20, negatives: int = 1) -> List[Row]:
    """Of both criterions, and of E-ARM if drawing the negatives took no longer than one pass of the decoder over them.

    Each case has a process of its own, as training has.

    Args:
        cases: model ("iwslt" or "small"), symbols of its vocabulary and target tokens of the batch.
        length: tokens of a sentence on average, between 3/4 and 5/4 of it; each negative has as many as its source.
        negatives: for each source.
    """
    found: List[Row] = []
    for size, vocabulary, tokens in cases:
        found += in_own_process(_of_random_words, setting, size, vocabulary, tokens, length, negatives)
    if setting.checkpoint:
        for tokens in sorted({tokens for _, _, tokens in cases}):
            found += in_own_process(_of_a_trained_model, setting, tokens, negatives)
    return found


def _of_random_words(setting: Setting, size: str, vocabulary: int, tokens: int, length: int, negatives: int) -> List[Row]:
    def make(criterion: List[str]) -> Update:
        return update(size, vocabulary, tokens, criterion, length=length, precision=precision(setting))

    return measured({"model": size, "vocabulary": vocabulary, "tokens": tokens}, make, setting, negatives, AS_LONG_AS_THE_SOURCE)


def _of_a_trained_model(setting: Setting, tokens: int, negatives: int) -> List[Row]:
    def make(criterion: List[str]) -> Update:
        return trained_update(setting, tokens, criterion)

    return measured({"model": "trained", "tokens": tokens}, make, setting, negatives, [])


def measured(what: Row, make, setting: Setting, negatives: int, lengths: List[str]) -> List[Row]:
    """The rows of one model and batch, which `make` makes for the flags of a criterion."""
    earm = [*EARM, "--earm-negatives", str(negatives), *lengths]
    updates: Dict[str, Update] = {"cross-entropy": make(CROSS_ENTROPY), "E-ARM": make(earm), "E-ARM, drawn at once": make(earm)}
    _draw_at_once(updates["E-ARM, drawn at once"])
    costs = compare(updates, setting.rounds)
    return [
        {
            **what, "update": name, "seconds": cost.seconds, "of cross-entropy's": cost.ratio, "MB": cost.megabytes,
            **updates[name].stages.medians(setting.rounds),
        }
        for name, cost in costs.items()
    ]


def update(size: str, vocabulary: int, tokens: int, criterion: List[str], *, length: int = 20, precision: Sequence[str] = ()) -> Update:
    """For a model with random weights and random sentences."""
    cfg = configuration([*RECIPE, *SIZES[size], *criterion, *precision])
    symbols = dictionary(vocabulary)
    torch.manual_seed(1)
    task = EarmTranslationTask(cfg.task, symbols, symbols)
    model = task.build_model(cfg.model)
    end_after(model)
    return _update(cfg, task, model, parallel_batch(symbols, tokens, length))


def trained_update(setting: Setting, tokens: int, criterion: List[str]) -> Update:
    """For a trained model, its own flags and a batch of the text that it was trained on."""
    model, cfg, task = trained(setting.checkpoint, setting.data)
    cfg.criterion = configuration([*RECIPE, *criterion]).criterion
    cfg.common.cpu = device().type == "cpu"
    return _update(cfg, task, model, real_batch(task, "train", max_tokens=tokens))


def configuration(flags: Sequence[str]):
    """fairseq's configuration for flags of `fairseq-train`; there is no data."""
    on_cpu = ["--cpu"] if device().type == "cpu" else []
    args = options.parse_args_and_arch(options.get_training_parser(), ["none", *flags, *on_cpu])
    return convert_namespace_to_omegaconf(args)


def precision(setting: Setting) -> List[str]:
    """Flags of the setting's precision."""
    return {"float32": [], "float16": ["--fp16"], "bfloat16": ["--bf16"]}[setting.dtype]


def _update(cfg, task, model, batch: dict) -> Update:
    criterion = task.build_criterion(cfg.criterion)
    trainer, stages = Trainer(cfg, task, model, criterion), Stages()
    stages.watch(trainer, "train_step", "optimizer")  # what is left of it: clipping, Adam's step, the log
    stages.watch(trainer.criterion, "forward", "loss head")
    stages.watch(trainer.optimizer, "backward", "backward")
    family = getattr(trainer.criterion, "family", None)
    if family is None:
        stages.watch(trainer.model, "forward", "forward")
    else:
        stages.watch(family, "draw", "sampling")
        stages.watch(family, "forward", "forward")
    return Update(trainer, batch, stages)


def _draw_at_once(update: Update) -> None:
    """Take the same negatives in every update, and spend one pass of the decoder over them without gradients."""
    family, known = update.trainer.criterion.family, []
    draw_step_by_step = family.draw

    def draw(model, sample: dict, negatives: int):
        source = {key: sample["net_input"][key] for key in ("src_tokens", "src_lengths")}
        if not known:
            known.append(draw_step_by_step(model, sample, negatives))
            with isolated(model, source["src_tokens"]):
                known.append(model.encoder.reorder_encoder_out(model.encoder(**source), known[0].sources))
        samples, encoder_out = known
        with isolated(model, source["src_tokens"]):
            model.decoder(decoder_input(samples.tokens, family.eos), encoder_out=encoder_out)
        return samples

    family.draw = draw
    update.stages.watch(family, "draw", "sampling")


TABLE = Table(
    "An update",
    {
        "model": "", "vocabulary": ",", "tokens": ",", "update": "", "seconds": ".3f", "of cross-entropy's": ".2f",
        **{stage: ".3f" for stage in STAGES}, "MB": ",.0f",
    },
    rows, {"cases": QUICK}, {"cases": FULL},
)
