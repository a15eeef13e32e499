"""Translation checkpoints put to use on a binarised text: what they translate, and what they say of words in given contexts."""
from __future__ import annotations

import hashlib
import os
from argparse import Namespace
from typing import List, NamedTuple, Sequence

import numpy as np
import torch
from fairseq import checkpoint_utils, tasks, utils
from fairseq.models import FairseqEncoderDecoderModel
from torch import Tensor

from fairseq_earm.ebm.energy import token_energies
from fairseq_earm.errors import UsageError, reason
from fairseq_earm.evaluation.data_folder import check_data_folder
from fairseq_earm.sampling.frozen import first_difference, load_frozen
from fairseq_earm.sampling.isolation import on_its_own
from fairseq_earm.sampling.scoring import MAX_LOGITS, decoder_input, full_logits


class WordScores(NamedTuple):
    """What a model says of T words, each in a context of its own; on the CPU.

    Attributes:
        log_prob: (T,) in nats.
        rank: (T,) 1 where no word of the dictionary is likelier, 2 where one is, and so on.
        logsumexp: (T,) of the logits at each word's step, log μ_k (Wang et al., Eq. 4).
    """

    log_prob: Tensor
    rank: Tensor
    logsumexp: Tensor


class Translator(NamedTuple):
    """A translation model, and a split of its data as its own task reads it. Numbers of sentences are those of the split.

    Attributes:
        model: an encoder-decoder model in eval mode.
        task: the task it was trained with, on this data; never reranking.
        dataset: sentence pairs.
        device: where the model is.
        path: of its checkpoint.
        flag: that gave the path, for messages.
    """

    model: FairseqEncoderDecoderModel
    task: object
    dataset: object
    device: torch.device
    path: str
    flag: str

    def source(self, index: int) -> List[int]:
        """The tokens of a source, end-of-sentence left out."""
        return _words(self.dataset[index]["source"], self.task.source_dictionary)

    def reference(self, index: int) -> List[int]:
        """The tokens of a reference, end-of-sentence left out."""
        return _words(self.dataset[index]["target"], self.task.target_dictionary)

    @torch.no_grad()
    def translate(self, indices: Sequence[int], *, beam: int) -> List[List[int]]:
        """Translate by fairseq's own generator, with its defaults but for the beam; tokens without end-of-sentence."""
        batch = self._batch(indices)
        generator = self.task.build_generator([self.model], Namespace(beam=beam))
        found = self.task.inference_step(generator, [self.model], batch)
        translations: List[List[int]] = [[] for _ in indices]
        for place, hypotheses in zip(batch["id"].tolist(), found):
            translations[place] = _words(hypotheses[0]["tokens"], self.task.target_dictionary)
        return translations

    @torch.no_grad()
    def score(self, indices: Sequence[int], contexts: Sequence[Sequence[int]], words: Sequence[Sequence[int]]) -> List[WordScores]:
        """What the model says of words, each read in a context that need not be made of the words before it.

        Args:
            indices: numbers of R sentences; one may be there several times.
            contexts: R lists of tokens. Step t of a sentence reads the first t − 1 of them, after the start token. The words
                themselves for teacher forcing.
            words: R lists of T_r tokens, T_r at most one more than the length of the context.
        """
        longest = max(map(len, words), default=0)
        rows = max(1, MAX_LOGITS // (max(1, longest) * len(self.task.target_dictionary)))
        found: List[WordScores] = []
        for at in range(0, len(indices), rows):
            part = slice(at, at + rows)
            found += self._score(indices[part], contexts[part], words[part])
        return found

    def _score(self, indices, contexts, words) -> List[WordScores]:
        batch = self._batch(indices)
        places = batch["id"].tolist()
        steps = max(1, max(map(len, words)))
        context, targets = (self._padded([rows[place] for place in places], steps) for rows in (contexts, words))
        inputs = {name: value for name, value in batch["net_input"].items() if name != "prev_output_tokens"}
        read = decoder_input(context, self.task.target_dictionary.eos())
        # The generator leaves its marks on a model's attention.
        with on_its_own(self.model):
            output = self.model.decoder(read, encoder_out=self.model.encoder(**inputs))
        logits = full_logits(self.model.decoder, output)
        energies = token_energies(logits, targets)
        ranks = 1 + (logits > logits.gather(-1, targets.unsqueeze(-1))).sum(-1)
        columns = [column.cpu() for column in (-energies.nll, ranks, energies.logsumexp)]
        rows = {place: row for row, place in enumerate(places)}
        return [WordScores(*(column[rows[place], : len(words[place])] for column in columns)) for place in range(len(words))]

    def _padded(self, rows: Sequence[Sequence[int]], width: int) -> Tensor:
        """(R, width) rows cut or filled up."""
        pad = self.task.target_dictionary.pad()
        return torch.tensor([[*row[:width], *[pad] * (width - len(row))] for row in rows], device=self.device)

    def _batch(self, indices: Sequence[int]) -> dict:
        """The sentences as fairseq makes a batch of them, in an order of its own: `id` is each row's place in `indices`."""
        batch = self.dataset.collater([{**self.dataset[index], "id": place} for place, index in enumerate(indices)])
        return utils.move_to_cuda(batch) if self.device.type == "cuda" else batch


def open_translators(paths: Sequence[tuple], data: str, split: str, *, device: torch.device) -> List[Translator]:
    """Load translation models that share their data and dictionaries.

    Args:
        paths: (flag, checkpoint) of each.
        data: folder of fairseq-preprocess.
        split: the text to translate, with references.
    Raises:
        UsageError: what does not exist, is no translation model, or has other dictionaries.
    """
    translators = [_open(path, data, split, flag=flag, device=device) for flag, path in paths]
    first = translators[0].task
    for other in translators[1:]:
        for side in ("source", "target"):
            difference = first_difference(getattr(other.task, f"{side}_dictionary"), getattr(first, f"{side}_dictionary"))
            if difference:
                raise UsageError(
                    f"{other.flag} {other.path}: its {side} dictionary is not that of {translators[0].flag} "
                    f"{translators[0].path}: {difference}; compare models of the same data and direction"
                )
    return translators


def own_task(path: str, data: str, *, flag: str):
    """The task that a checkpoint was trained with, on `data`, and never reranking.

    Raises:
        UsageError: no such file or folder, or no dictionaries there that the task takes.
    """
    check_data_folder(data)
    if not os.path.isfile(path):
        raise UsageError(f"{flag} {path}: there is no such file; give a checkpoint of fairseq-train")
    try:
        cfg = checkpoint_utils.load_checkpoint_to_cpu(path, {"data": data, "energy_rerank": False})["cfg"].task
        return tasks.setup_task(cfg)
    except Exception as error:  # fairseq raises whatever it likes at files that are no checkpoints, and without dictionaries
        raise UsageError(f"{flag} {path}: not a checkpoint that can be used with {data} ({reason(error)})") from error


def load_pairs(task, data: str, split: str):
    """The dataset of a split, the training set in all of its parts.

    Raises:
        UsageError: there is none, or it has no references.
    """
    try:
        task.load_dataset(split, combine=split == "train")
    except FileNotFoundError as error:
        raise UsageError(f"--gen-subset {split}: {data} has no such split") from error
    dataset = task.dataset(split)
    if getattr(dataset, "tgt", None) is None:
        raise UsageError(f"--gen-subset {split}: {data} has no references for this split; preprocess it with both languages")
    if dataset.supports_prefetch:  # fairseq's format `cached`, of which nothing can be had before
        dataset.prefetch(range(len(dataset)))
    return dataset


def pairs_hash(dataset, indices: Sequence[int]) -> str:
    """SHA-256 of the tokens of some pairs, sources and references."""
    digest = hashlib.sha256()
    for index in indices:
        pair = dataset[index]
        for side in ("source", "target"):
            digest.update(pair[side].long().numpy().tobytes())
    return digest.hexdigest()


def fitting(translators: Sequence[Translator]) -> List[int]:
    """The numbers, ascending, of the pairs that all of the models have positions for.

    Raises:
        UsageError: there are none.
    """
    dataset = translators[0].dataset
    kept = np.arange(len(dataset))
    for translator in translators:
        limits = translator.model.max_positions()
        kept = translator.dataset.filter_indices_by_size(kept, limits)[0]
    if not len(kept):
        raise UsageError(f"--gen-subset: none of its {len(dataset)} sentences fits the positions of every model")
    return sorted(kept.tolist())


def _open(path: str, data: str, split: str, *, flag: str, device: torch.device) -> Translator:
    task = own_task(path, data, flag=flag)
    model = load_frozen(path, task, flag=flag).to(device).model
    if not isinstance(model, FairseqEncoderDecoderModel):
        raise UsageError(f"{flag} {path} is a {type(model).__name__}: for pairs of sentences give an encoder-decoder model")
    return Translator(model, task, load_pairs(task, data, split), device, path, flag)


def _words(tokens: Tensor, dictionary) -> List[int]:
    return [token for token in tokens.tolist() if token not in (dictionary.eos(), dictionary.pad())]
