"""Measure one checkpoint against the language's true distribution: `measure.py DATA CHECKPOINT OUTPUT.json`."""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import List

import torch
from fairseq import checkpoint_utils

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import language  # noqa: E402
from fairseq_earm.ebm.weights import effective_sample_size  # noqa: E402
from fairseq_earm.evaluation.likelihood import CorpusScores, score_corpus, summarize  # noqa: E402
from fairseq_earm.sampling.ancestral import AncestralSampler  # noqa: E402

# Longest sample: no sentence of the language is longer than twice its source plus five.
MAX_LEN_A, MAX_LEN_B = 2.0, 5
MAX_TOKENS = 2000


def measure(binary: str, checkpoint: str, samples: int, energy_step: str) -> dict:
    """All numbers of a checkpoint, on test data but for the fitted temperatures and what is named valid."""
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([checkpoint], arg_overrides={"data": binary})
    model = models[0].eval()
    corpora = {split: score_split(model, task, split, samples, energy_step) for split in ("valid", "test")}
    return {
        **summarize(corpora["valid"], corpora["test"]),
        **against_truth(task, corpora["test"]),
        "ess_share": ess_share(corpora["test"].sample_log_mu),
        "energies_data": (-corpora["test"].log_mu).tolist(),
        "energies_samples": (-corpora["test"].sample_log_mu[:, 0]).tolist(),
    }


def score_split(model, task, split: str, samples: int, energy_step: str) -> CorpusScores:
    """Scores of one split and of the model's own translations of it."""
    task.load_dataset(split)
    dataset = task.dataset(split)
    batches = task.get_batch_iterator(dataset, max_tokens=MAX_TOKENS).next_epoch_itr(shuffle=False)
    sampler = AncestralSampler(task.target_dictionary, max_len_a=MAX_LEN_A, max_len_b=MAX_LEN_B)
    scores = score_corpus(model, batches, sampler, samples=samples, energy_step=energy_step)
    if len(scores.lengths) != len(dataset):
        raise RuntimeError(f"{split}: {len(dataset)} sentences, but {len(scores.lengths)} were scored")
    return scores


def against_truth(task, scores: CorpusScores) -> dict:
    """KL(p ‖ q) on the test pairs, and what the samples have to do with the language."""
    dataset = task.dataset("test")
    items = [dataset[i] for i in range(len(dataset))]
    sources = [words(task.source_dictionary, item["source"]) for item in items]
    targets = [words(task.target_dictionary, item["target"]) for item in items]
    log_p = torch.tensor([language.log_probability(s, t) for s, t in zip(sources, targets)], dtype=torch.float64)
    drawn = [[words(task.target_dictionary, torch.tensor(row)) for row in rows] for rows in scores.samples]
    inside = [language.is_translation(s, text) for s, texts in zip(sources, drawn) for text in texts]
    lengths = [len(text) for texts in drawn for text in texts]
    return {
        "entropy": sum(map(language.entropy, sources)) / len(sources),
        "true_nll": -float(log_p.mean()),
        "kl": float((log_p - scores.log_q.double()).mean()),
        "in_language": sum(inside) / len(inside),
        "sample_length": sum(lengths) / len(lengths),
        "data_length": sum(map(len, targets)) / len(targets),
    }


def words(dictionary, tokens: torch.Tensor) -> tuple:
    """The words of token indices, end-of-sentence left out."""
    return tuple(dictionary[i] for i in tokens.tolist() if i != dictionary.eos())


def ess_share(sample_log_mu: torch.Tensor) -> List[float]:
    """(S,) effective sample size of μ's weights among each source's samples, as a share of their number."""
    return (effective_sample_size(sample_log_mu.double(), 1) / sample_log_mu.size(1)).tolist()


def cli_main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder written by fairseq-preprocess")
    parser.add_argument("checkpoint")
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=16, help="samples per source sentence")
    parser.add_argument("--energy-step", choices=["last", "post"], default="last")
    args = parser.parse_args()
    numbers = measure(args.data, args.checkpoint, args.samples, args.energy_step)
    args.output.write_text(json.dumps(numbers))


if __name__ == "__main__":
    cli_main()
