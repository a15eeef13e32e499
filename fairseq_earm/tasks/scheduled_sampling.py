"""Scheduled sampling as flags of a task, with whatever criterion."""
import math
from dataclasses import dataclass, field, fields

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from omegaconf import II

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.scheduled import PREDICTIONS, SCHEDULES, Predictions, Schedule, check_decoder, scheduled_sampling


@dataclass
class ScheduledSamplingConfig(FairseqDataclass):
    """What tasks with `ScheduledSampling` take."""

    scheduled_sampling: ChoiceEnum(SCHEDULES) = field(
        default="none",
        metadata={
            "help": "schedule of the probability p that the decoder reads the data's token, by the number i of updates since "
            "--scheduled-sampling-start-update; else it reads its own prediction, from a first pass (Mihaylova & Martins 2019). "
            "With p0 the start probability, e the minimum and k the rate, constant: p0; linear: from p0 down to e; exponential: "
            "max(e, p0*k^i); inverse-sigmoid: max(e, p0*k/(k+exp(i/k)))"
        },
    )
    scheduled_sampling_start_probability: float = field(
        default=1.0, metadata={"help": "p0: of reading the data's token, at the start; for constant, all the time"}
    )
    scheduled_sampling_minimum_probability: float = field(default=0.0, metadata={"help": "e: it becomes no lower"})
    scheduled_sampling_decay_updates: int = field(
        default=0, metadata={"help": "linear: updates over which it falls from the start probability to the minimum"}
    )
    scheduled_sampling_rate: float = field(
        default=0.0, metadata={"help": "k of exponential (below 1, such as 0.9999) or inverse-sigmoid (1 or more, such as 2000)"}
    )
    scheduled_sampling_start_update: int = field(
        default=0, metadata={"help": "updates before it starts; until then training is the stock one to the bit"}
    )
    scheduled_sampling_prediction: ChoiceEnum(PREDICTIONS) = field(
        default="argmax",
        metadata={
            "help": "what is read in the data's place: the likeliest token, one drawn from the softmax, or the mean embedding of "
            "the likeliest tokens, weighted by their probabilities"
        },
    )
    scheduled_sampling_topk: int = field(default=5, metadata={"help": "topk-mix: tokens whose embeddings are mixed"})
    scheduled_sampling_temperature: float = field(
        default=1.0, metadata={"help": "sample and topk-mix: temperature of the softmax that is drawn from or weighted by"}
    )
    scheduled_sampling_through_first_pass: bool = field(
        default=False, metadata={"help": "topk-mix: the weights hand the gradient on to the first pass"}
    )
    max_update: int = II("optimization.max_update")


class ScheduledSampling:
    """For a task, before fairseq's in the order of bases; its configuration is one with `ScheduledSamplingConfig`.

    Training alone differs; the log shows the probability as `teacher_forcing`.

    Raises:
        UsageError: flags that cannot work, or a model that they cannot work with.
    """

    def __init__(self, cfg, *args, **kwargs):
        super().__init__(cfg, *args, **kwargs)
        check_flags(cfg, symbols=len(self.target_dictionary))
        self.teacher_forcing = _schedule(cfg)
        self.predictions = Predictions(
            str(cfg.scheduled_sampling_prediction),
            cfg.scheduled_sampling_topk,
            cfg.scheduled_sampling_temperature,
            cfg.scheduled_sampling_through_first_pass,
        )

    def build_model(self, *args, **kwargs):
        """The stock model, if it is one whose decoder can read its own predictions."""
        model = super().build_model(*args, **kwargs)
        if self.teacher_forcing.kind != "none":
            check_decoder(model, self.predictions)
        return model

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        """The stock step, its decoder fed with a mixture; the criterion's `--ignore-prefix-size` tokens stay the data's."""
        if self.teacher_forcing.kind == "none":
            return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)
        probability = self.teacher_forcing.probability(update_num)
        metrics.log_scalar("teacher_forcing", probability, round=4)
        given = max(getattr(criterion, "ignore_prefix_size", 0), 0)
        with scheduled_sampling(model, probability, self.predictions, given=given):
            return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)


def _schedule(cfg) -> Schedule:
    return Schedule(
        str(cfg.scheduled_sampling),
        cfg.scheduled_sampling_start_probability,
        cfg.scheduled_sampling_minimum_probability,
        cfg.scheduled_sampling_decay_updates,
        cfg.scheduled_sampling_rate,
        cfg.scheduled_sampling_start_update,
    )


def check_flags(cfg, *, symbols: int) -> None:
    """Refuse settings that cannot work, before any training.

    Args:
        cfg: the task's configuration.
        symbols: size of the target dictionary.
    Raises:
        UsageError: one line with the flag, its value and the remedy.
    """
    problems = _without_schedule(cfg) if cfg.scheduled_sampling == "none" else _problems(cfg, symbols)
    for problem, name, remedy in problems:
        if problem:
            flag = "--scheduled-sampling-" + name.replace("_", "-")
            raise UsageError(f"{flag} {_value(cfg, name)}: {remedy}")


def _value(cfg, name: str):
    return getattr(cfg, f"scheduled_sampling_{name}")


def _without_schedule(cfg):
    for entry in fields(ScheduledSamplingConfig):
        if entry.name.startswith("scheduled_sampling_"):
            given = getattr(cfg, entry.name) != entry.default
            yield given, entry.name[len("scheduled_sampling_"):], "no effect without a schedule; give --scheduled-sampling too"


def _problems(cfg, symbols: int):
    """Pairs of a condition that must not hold and what to say of it: (condition, flag, remedy)."""
    yield from _schedule_problems(cfg, str(cfg.scheduled_sampling))
    kind, through = str(cfg.scheduled_sampling_prediction), cfg.scheduled_sampling_through_first_pass
    topk, temperature = cfg.scheduled_sampling_topk, cfg.scheduled_sampling_temperature
    most = symbols - 1  # padding is no prediction
    mixes = "topk-mix alone has it; give --scheduled-sampling-prediction topk-mix, or leave it out"
    yield kind != "topk-mix" and topk != Predictions().topk, "topk", mixes
    yield not 1 <= topk <= most and kind == "topk-mix", "topk", f"give 1 to {most}, the symbols of the dictionary without padding"
    yield not 0 < temperature < math.inf, "temperature", "give a finite number above 0"
    yield kind == "argmax" and temperature != 1, "temperature", "the likeliest token is the same at any; leave it out"
    yield kind != "topk-mix" and through, "through_first_pass", (
        f"a token ({kind}) hands on no gradient; give --scheduled-sampling-prediction topk-mix, or leave it out"
    )


def _schedule_problems(cfg, kind: str):
    start, minimum = cfg.scheduled_sampling_start_probability, cfg.scheduled_sampling_minimum_probability
    updates, rate = cfg.scheduled_sampling_decay_updates, cfg.scheduled_sampling_rate
    begin, end = cfg.scheduled_sampling_start_update, cfg.max_update or 0
    yield not 0 <= start <= 1, "start_probability", "give a probability, from 0 to 1"
    yield not 0 <= minimum < 1, "minimum_probability", "give a probability below 1"
    yield minimum > start, "minimum_probability", f"is above the start probability, {start}; give a lower one"
    if kind == "constant":
        yield start == 1, "start_probability", "a constant 1 is no scheduled sampling; give less"
        yield minimum != 0, "minimum_probability", "constant has no minimum; leave it out, or give another schedule"
    if kind == "linear":
        yield updates < 1, "decay_updates", "linear needs the number of updates it falls over; give at least 1"
    else:
        yield updates != 0, "decay_updates", f"{kind} has none; leave it out, or give --scheduled-sampling linear"
    if kind == "exponential":
        yield not 0 < rate < 1, "rate", "exponential needs a number between 0 and 1, such as 0.9999"
    elif kind == "inverse-sigmoid":
        yield not 1 <= rate < math.inf, "rate", "inverse-sigmoid needs a number of at least 1, such as 2000"
    else:
        yield rate != 0, "rate", f"{kind} has none; leave it out, or give exponential or inverse-sigmoid"
    yield begin < 0, "start_update", "give a number of at least 0"
    yield 0 < end <= begin, "start_update", f"training ends with --max-update {end}, so it would never start; start earlier"
