"""Measure one checkpoint of a branch: `measure_branch.py DATA CHECKPOINT OUTPUT.json`.

OUTPUT.json gets the numbers of `likelihood.summarize`; beside it, OUTPUT.sentences.json holds NLL and joint NLL of
every test sentence, for intervals over sentences.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fairseq import checkpoint_utils

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fairseq_earm  # noqa: E402, F401  (so that any checkpoint can be read)
from fairseq_earm.ebm.partition import log_partition  # noqa: E402
from fairseq_earm.evaluation.likelihood import CorpusScores, score_corpus, summarize  # noqa: E402
from fairseq_earm.sampling.ancestral import AncestralSampler  # noqa: E402

MAX_TOKENS = 1000


def score(models, task, split: str, args) -> CorpusScores:
    """Scores of one split and of the model's own translations of it."""
    task.load_dataset(split)
    batches = task.get_batch_iterator(task.dataset(split), max_tokens=MAX_TOKENS).next_epoch_itr(shuffle=False)
    sampler = AncestralSampler(task.target_dictionary, max_len_a=args.max_len[0], max_len_b=int(args.max_len[1]))
    found = score_corpus(models[0].eval(), batches, sampler, samples=args.samples, energy_step=args.energy_step)
    assert len(found.lengths) == len(task.dataset(split)), f"{split}: sentences were lost"
    return found


def of_sentences(scores: CorpusScores, temperature: float) -> dict:
    """NLL under q and joint NLL (the upper bound) of every sentence."""
    log_z = log_partition(temperature * scores.sample_log_mu.double()).upper
    joint = -scores.log_q.double() - temperature * scores.log_mu.double() + log_z
    return {"nll": (-scores.log_q.double()).tolist(), "joint_nll": joint.tolist()}


def cli_main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("checkpoint")
    parser.add_argument("output", type=Path)
    parser.add_argument("--samples", type=int, default=8, help="samples per source sentence")
    parser.add_argument("--energy-step", choices=["last", "post"], default="last")
    parser.add_argument("--max-len", nargs=2, type=float, default=(1.5, 10), help="a and b of the longest sample")
    parser.add_argument(
        "--synthetic", action="store_true", help="also measure against the synthetic language's distribution"
    )
    args = parser.parse_args()
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [args.checkpoint], arg_overrides={"data": args.data}
    )
    valid, test = (score(models, task, split, args) for split in ("valid", "test"))
    numbers = summarize(valid, test)
    if args.synthetic:
        from measure import against_truth

        numbers.update(against_truth(task, test))
    else:
        lengths = [len(sample) for samples in test.samples for sample in samples]
        numbers["sample_length"] = sum(lengths) / len(lengths)
    args.output.with_suffix(".sentences.json").write_text(json.dumps(of_sentences(test, numbers["temperature"])))
    args.output.write_text(json.dumps(numbers))


if __name__ == "__main__":
    cli_main()
