"""How noisy is the gradient of one batch? E-ARM's objectives and controls against cross-entropy, on a trained model.

    variance.py DATA CHECKPOINT OUTPUT.json [--batches 24] [--draws 2] [--max-tokens 1000]
    variance.py table OUTPUT.json ...

For each setting the gradient of its loss alone is computed on the same training batches, with fresh negatives and
dropout each time. Two figures come out, as shares of the variance of cross-entropy's gradient over batches: the
variance over batches, negatives and dropout; and the part that is left when the batch is held fixed. The loss is per
token of the batch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Dict, List

import torch
from fairseq import checkpoint_utils
from omegaconf import OmegaConf
from tabulate import tabulate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fairseq_earm  # noqa: E402, F401  (registers the criterion, and lets any checkpoint be read)

ALONE = {"earm_weight": 1.0, "earm_cross_entropy": "replace"}
SETTINGS: Dict[str, dict] = {
    "cross-entropy": {"earm_weight": 0.0},
    "likelihood": {**ALONE, "earm_control": "likelihood"},
    "noise, none": {**ALONE, "earm_control": "noise", "earm_variance_reduction": "none"},
    "noise, full": {**ALONE, "earm_control": "noise"},
    "kl, none": {**ALONE, "earm_variance_reduction": "none"},
    "kl, rao-blackwell": {**ALONE, "earm_variance_reduction": "rao-blackwell"},
    "kl, full": {**ALONE},
    "kl, full, last": {**ALONE, "earm_energy_steps": "last"},
    "nce": {**ALONE, "earm_objective": "nce"},
}
DROPOUT = {"dropout as in training": {}, "E-ARM without dropout": {"earm_dropout": "off"}}


def gradient(criterion, model, batch: dict, seed: int) -> torch.Tensor:
    """(parameters,) of the loss per token; the seed decides dropout and negatives."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss, size, _ = criterion(model, batch)
    (loss / size).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def variances(draws: List[List[torch.Tensor]]) -> dict:
    """Total variance of a gradient, and the part of it within a batch.

    Args:
        draws: for each batch its gradients (parameters,), at least two of them.
    """
    first = [batch[0] for batch in draws]
    mean = sum(first) / len(first)
    total = sum((each - mean).square().sum().item() for each in first) / (len(first) - 1)
    within = [
        sum((each - sum(batch) / len(batch)).square().sum().item() for each in batch) / (len(batch) - 1)
        for batch in draws
    ]
    return {"total": total, "within": sum(within) / len(within)}


def measure(args) -> None:
    """Variances of every setting, written after each."""
    [model], saved, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(args.checkpoint)], arg_overrides={"data": str(args.data)}
    )
    model.train()
    task.load_dataset("train")
    iterator = task.get_batch_iterator(task.dataset("train"), max_tokens=args.max_tokens, seed=1, epoch=1)
    batches = [batch for batch, _ in zip(iterator.next_epoch_itr(shuffle=True), range(args.batches))]
    smoothing = OmegaConf.select(saved.criterion, "label_smoothing") or 0.0 if saved.criterion is not None else 0.0
    found: Dict[str, dict] = {}
    for dropout, extra in DROPOUT.items():
        for name, flags in SETTINGS.items():
            if extra and name == "cross-entropy":
                continue
            if flags.get("earm_energy_steps") and not hasattr(model, "encoder"):
                continue  # text cut into blocks has no last step of its own
            common = {"earm_start_update": 0, "sentence_avg": False, "max_epoch": 0, "max_update": 0, "clip_norm": 0.0}
            criterion = task.build_criterion(
                OmegaConf.create(
                    {"_name": "earm_cross_entropy", "label_smoothing": smoothing, **common, **flags, **extra}
                )
            )
            progress = tqdm(batches, desc=f"{name}, {dropout}")
            draws = [
                [gradient(criterion, model, batch, 1000 * i + k) for k in range(args.draws)]
                for i, batch in enumerate(progress)
            ]
            found[f"{name} | {dropout}"] = variances(draws)
            args.output.write_text(json.dumps(found, indent=1) + "\n")
    table([args.output])


def table(outputs: List[Path]) -> None:
    """Every setting's variances as shares of cross-entropy's."""
    for output in outputs:
        found = json.loads(output.read_text())
        one = found["cross-entropy | dropout as in training"]["total"]
        rows = [
            [*key.split(" | "), f"{each['total'] / one:.2f}", f"{each['within'] / one:.2f}"]
            for key, each in found.items()
        ]
        headers = ["loss alone", "", "variance", "of which within a batch"]
        print(
            f"{output.stem}: shares of the variance of cross-entropy's "
            f"gradient\n\n{tabulate(rows, headers, tablefmt='pipe')}\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if sys.argv[1:2] == ["table"]:
        table([Path(name) for name in sys.argv[2:]])
        return
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--draws", type=int, default=2, help="gradients of each batch")
    parser.add_argument("--max-tokens", type=int, default=1000)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
