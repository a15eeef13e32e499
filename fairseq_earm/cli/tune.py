"""fairseq-earm-tune: choose `--energy-weight` and `--lenpen` for BLEU on an n-best list of the validation set.

fairseq's beam search ends a search by the number of finished hypotheses and applies the length penalty afterwards, so one
n-best list holds the candidates for every weight and length penalty.
"""
from __future__ import annotations

import argparse
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from sacrebleu.metrics import BLEU
from tqdm import tqdm

from fairseq_earm.cli.common import check_json, check_seed, interruptible, write_json
from fairseq_earm.cli.nbest import NBest, read_nbest
from fairseq_earm.errors import UsageError
from fairseq_earm.evaluation.significance import draw_multinomial
from fairseq_earm.evaluation.text_scores import bleu_statistics, corpus_bleu

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0)
LENPENS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)
Interval = Tuple[float, float]


class Setting(NamedTuple):
    """One row of the table: the best length penalty of an energy weight. Intervals are 95 % bootstrap percentiles.

    Attributes:
        bleu: corpus BLEU of the translations it chooses.
        gain: its BLEU minus that of weight 0, whose length penalty is chosen in the same way.
    """

    energy_weight: float
    lenpen: float
    bleu: float
    interval: Interval
    gain: float
    gain_interval: Interval


def select(nbest: NBest, weight: float, lenpen: float) -> np.ndarray:
    """(S,) index of each sentence's best candidate by (log q + weight · log μ) / length^lenpen; of equals, the first."""
    with np.errstate(invalid="ignore"):  # 0 · −inf
        energy = np.where(weight == 0, 0.0, weight * nbest.log_mu)
    return ((nbest.log_q + energy) / nbest.lengths**lenpen).argmax(1)


class SentenceStatistics:
    """BLEU's sufficient statistics of single candidates, computed when first asked for."""

    def __init__(self, nbest: NBest, tokenizer: str):
        self._tokenizer = tokenizer
        self._nbest = nbest
        self._known: Dict[Tuple[int, int], np.ndarray] = {}

    def __call__(self, choice: np.ndarray) -> np.ndarray:
        """(S, 2 + 2 · 4) statistics of the candidates chosen, (S,) indices."""
        chosen = [(sentence, int(index)) for sentence, index in enumerate(choice)]
        new = [key for key in chosen if key not in self._known]
        texts = [self._nbest.texts[sentence][index] for sentence, index in new]
        references = [self._nbest.references[sentence] for sentence, _ in new]
        self._known.update(zip(new, bleu_statistics(texts, [references], self._tokenizer)))
        return np.array([self._known[key] for key in chosen])


def tune(
    nbest: NBest, weights: Sequence[float], lenpens: Sequence[float], *, tokenizer: str = "13a", resamples: int = 1000, seed: int = 1
) -> List[Setting]:
    """Try every weight with every length penalty; one `Setting` per weight, in ascending order of the weights.

    Gains are paired: each bootstrap resample draws the same sentences for both systems (Koehn 2004). The intervals do not
    know that the best of several settings was taken, so a gain found here is to be confirmed on other data.

    Args:
        weights: energy weights; 0 is added if missing.
        lenpens: length penalties. Of equal BLEU, the smaller penalty is taken.
        tokenizer: sacreBLEU's.
    """
    statistics = SentenceStatistics(nbest, tokenizer)
    best: Dict[float, Tuple[float, float, np.ndarray]] = {}
    grid = [(weight, lenpen) for weight in sorted({0.0, *weights}) for lenpen in sorted(set(lenpens))]
    for weight, lenpen in tqdm(grid, desc="grid", disable=None):
        rows = statistics(select(nbest, weight, lenpen))
        bleu = corpus_bleu(rows.sum(0))
        if weight not in best or bleu > best[weight][0]:
            best[weight] = bleu, lenpen, rows
    resampled = _bootstrap({weight: rows for weight, (_, _, rows) in best.items()}, resamples, seed)
    settings = []
    for weight, (bleu, lenpen, _) in best.items():
        scores, gains = resampled[weight], resampled[weight] - resampled[0.0]
        settings.append(Setting(weight, lenpen, bleu, _interval(scores), bleu - best[0.0][0], _interval(gains)))
    return settings


def _bootstrap(rows: Dict[float, np.ndarray], resamples: int, seed: int) -> Dict[float, np.ndarray]:
    """Name of each system → (resamples,) its corpus BLEU; each resample draws the same sentences for all.

    Args:
        rows: name → (S, K) statistics of its sentences.
    """
    scores: Dict[float, List[float]] = {name: [] for name in rows}
    # Sums of counts are whole numbers, which float64 holds to the digit and multiplies much faster.
    statistics = {name: own.astype(np.float64) for name, own in rows.items()}
    with tqdm(desc="bootstrap", total=resamples, disable=None) as progress:
        for counts in draw_multinomial(len(statistics[0.0]), resamples, seed):
            for name, own in statistics.items():
                scores[name] += [corpus_bleu(total) for total in counts @ own]
            progress.update(len(counts))
    return {name: np.array(values) for name, values in scores.items()}


def _interval(scores: np.ndarray) -> Interval:
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def _table(settings: Sequence[Setting]) -> str:
    lines = [f"{'weight':>7} {'lenpen':>7} {'BLEU':>7}  {'95 % interval':<16} {'gain':>6}  95 % interval, paired"]
    for row in settings:
        interval, gain = ("[{:6.2f}, {:6.2f}]".format(*pair) for pair in (row.interval, row.gain_interval))
        lines.append(f"{row.energy_weight:7g} {row.lenpen:7g} {row.bleu:7.2f}  {interval} {row.gain:+6.2f}  {gain}")
    return "\n".join(lines)


def _numbers(name: str, *, negative: bool = False):
    """An argparse type: a finite number, by default 0 or more."""

    def parse(text: str) -> float:
        value = float(text)
        if not np.isfinite(value) or (value < 0 and not negative):
            raise argparse.ArgumentTypeError(f"{text} is not a finite {name}{'' if negative else ' of 0 or more'}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fairseq-earm-tune", description=__doc__.split("\n")[0])
    parser.add_argument(
        "nbest", nargs="+", help="what fairseq-generate --task earm_translation --energy-rerank --beam N --nbest N wrote about "
        "the validation set: its output and, if that went elsewhere, its log",
    )
    weight, lenpen = _numbers("energy weight"), _numbers("length penalty", negative=True)
    parser.add_argument("--energy-weight", type=weight, nargs="+", default=WEIGHTS, metavar="W", help="weights to try")
    parser.add_argument("--lenpen", type=lenpen, nargs="+", default=LENPENS, metavar="L", help="length penalties to try")
    parser.add_argument(
        "--generated-energy-weight", type=weight, metavar="W", help="--energy-weight the list was generated with, if its log is lost",
    )
    parser.add_argument(
        "--generated-lenpen", type=lenpen, metavar="L", help="--lenpen the list was generated with (0 for --unnormalized), "
        "if its log is lost",
    )
    parser.add_argument(
        "--sacrebleu-tokenize", choices=sorted(BLEU.TOKENIZERS), default="13a",
        help="tokenizer of sacreBLEU (default: 13a); none for text that is tokenized already",
    )
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the bootstrap (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    return parser


@interruptible()
def main(argv: Optional[Sequence[str]] = None) -> None:
    """The console script; prints a table and the flags of the best setting."""
    args = _parser().parse_args(argv)
    if args.resamples < 1:
        raise UsageError(f"--resamples {args.resamples} gives no interval: give 1 or more, 1000 as a rule")
    check_seed(args.seed)
    check_json(args.json)
    nbest = read_nbest(args.nbest, weight=args.generated_energy_weight, lenpen=args.generated_lenpen)
    settings = tune(
        nbest, args.energy_weight, args.lenpen, tokenizer=args.sacrebleu_tokenize, resamples=args.resamples, seed=args.seed
    )
    best = max(settings, key=lambda row: row.bleu)
    flags = f"--energy-weight {best.energy_weight:g} --lenpen {best.lenpen:g}"
    print(_table(settings))
    print(f"Best of {len(nbest.texts)} sentences (sacreBLEU, tok:{args.sacrebleu_tokenize}): {flags}")
    if args.json:
        write_json(args.json, _report(args, settings, best, len(nbest.texts)))


def _report(args: argparse.Namespace, settings: Sequence[Setting], best: Setting, sentences: int) -> dict:
    return {
        "best": best._asdict(),
        "settings": [row._asdict() for row in settings],
        "sentences": sentences,
        "sacrebleu_tokenize": args.sacrebleu_tokenize,
        "resamples": args.resamples,
        "seed": args.seed,
    }
