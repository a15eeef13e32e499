"""`fairseq-train` as one of several workers that leaves behind its weights and how often it drew negatives; see `test_distributed`.

    torchrun ... distributed_worker.py FOLDER PLUGIN [arguments of fairseq-train]

What the environment's FAULT says befalls the second worker: `nan`, the loss of update 3; `energy`, the energies of its third batch;
`out of memory` or `error`, when it draws for the fourth time; `... between`, the same just after the first of that step's two
collectives. A worker that ends with a line leaves it behind too. With KNOWN_NEGATIVES all draw what `known_negatives` says.
`--ddp-backend fully_sharded` runs on CPU, see `fairscale_on_cpu`.
"""
import math
import os
import sys
from argparse import Namespace
from pathlib import Path

import fairscale_on_cpu
import torch
from fairseq import utils
from fairseq.trainer import Trainer
from fairseq_cli.train import cli_main
from known_negatives import known_negatives

FAULTS = {"out of memory": RuntimeError("CUDA out of memory. (not really)"), "error": ValueError("something else")}
BETWEEN = {f"{name} between": error for name, error in FAULTS.items()}


def main(folder, plugin):
    torch.set_num_threads(1)
    utils.import_user_module(Namespace(user_dir=plugin))
    from fairseq_earm.criterions.earm_cross_entropy import EarmCrossEntropyCriterion
    from fairseq_earm.ebm.weights import StepStatistics
    from fairseq_earm.sampling.ancestral import AncestralSampler

    rank, drawn, trainers, fault = int(os.environ["RANK"]), 0, set(), os.environ.get("FAULT")
    sample, forward, train_step = AncestralSampler.__call__, EarmCrossEntropyCriterion.forward, Trainer.train_step

    def counted(sampler, *args, **kwargs):
        nonlocal drawn
        drawn += 1
        if rank == 1 and drawn == 4 and fault in FAULTS:
            raise FAULTS[fault]
        if "KNOWN_NEGATIVES" in os.environ:
            return known_negatives(*args)
        return sample(sampler, *args, **kwargs)

    def lost_between(statistics, steps):
        nonlocal fault
        if rank == 1 and drawn == 4 and fault in BETWEEN:
            error, fault = BETWEEN[fault], None
            raise error
        return up_to(statistics, steps)

    def spoilt(criterion, *args, **kwargs):
        loss, *rest = forward(criterion, *args, **kwargs)
        bad = rank == 1 and fault == "nan" and criterion.clock.num_updates == 3
        return (loss * math.nan if bad else loss, *rest)

    def remembered(trainer, *args, **kwargs):
        trainers.add(trainer)
        return train_step(trainer, *args, **kwargs)

    up_to, StepStatistics.up_to = StepStatistics.up_to, lost_between
    AncestralSampler.__call__, EarmCrossEntropyCriterion.forward, Trainer.train_step = counted, spoilt, remembered
    if rank == 1 and fault == "energy":
        spoil_energies()
    if "fully_sharded" in sys.argv:
        fairscale_on_cpu.install()
    cli_main()
    [trainer] = trainers
    torch.save({"weights": trainer.get_model().state_dict(), "drawn": drawn}, folder / f"{rank}.pt")


def spoil_energies():
    from fairseq_earm.models.energy_transformer import EnergyModel

    forward, passes = EnergyModel.forward, 0

    def spoilt(model, src_tokens):
        nonlocal passes
        passes += model.training
        return forward(model, src_tokens) * (math.nan if passes == 3 else 1)

    EnergyModel.forward = spoilt


if __name__ == "__main__":
    own, sys.argv[1:] = sys.argv[1:3], sys.argv[3:]
    try:
        main(Path(own[0]), own[1])
    except SystemExit as end:
        Path(own[0], f"{os.environ['RANK']}.txt").write_text(str(end))
        raise
