"""Running text read in order, by models that carry a memory from batch to batch (truncated backpropagation through time)."""
import logging
from dataclasses import dataclass, field
from typing import List, Optional

import torch
from fairseq.data import iterators
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from omegaconf import II

from fairseq_earm.errors import UsageError
from fairseq_earm.meter_state import MeterState
from fairseq_earm.models.carried_memory import CarriedMemory

logger = logging.getLogger(__name__)


@dataclass
class TruncatedBpttConfig(FairseqDataclass):
    """What `TruncatedBptt` takes."""

    carry_memory: bool = field(
        default=False,
        metadata={
            "help": "read the text as --batch-size parallel streams in their order, and carry the memory of a model that has "
            "one (transformer_xl_lm) from each batch to the next"
        },
    )
    train_subset: str = II("dataset.train_subset")


class TruncatedBptt:
    """For a language-modelling task, before fairseq's in the order of bases: `--carry-memory`.

    The decoder reads and leaves the memory that it was lent last. Training and evaluation have one each, so a
    validation within an epoch leaves training's as it was; and whatever is drawn in a training step, before the data
    is read, starts from training's. A memory ends with the text: each epoch and each evaluation starts without.

    Raises:
        UsageError: flags under which blocks do not continue each other.
    """

    def __init__(self, args, *others, **settings):
        super().__init__(args, *others, **settings)
        self.carries = args.carry_memory
        if self.carries:
            _check(args)
        self.training_memory, self.evaluation_memory = CarriedMemory(), CarriedMemory()
        self._saved = _SavedMemory(self.training_memory)

    def build_model(self, *args, **kwargs):
        """The stock method; the model must have a memory to carry along."""
        model = super().build_model(*args, **kwargs)
        kind = type(model).__name__
        remembers = hasattr(getattr(model, "decoder", None), "carried")
        if not self.carries:
            if remembers:
                logger.warning("%s without --carry-memory: each block of text is read without those before it", kind)
            return model
        if not remembers:
            raise UsageError(f"--carry-memory: a {kind} has no memory; give --arch transformer_xl_lm, or leave it out")
        model.decoder.carried = self.evaluation_memory
        return model

    def get_batch_iterator(self, dataset, *args, **kwargs):
        """With a memory to carry, batches whose row i continues row i of the batch before; they are never shuffled.

        Training leaves out up to one block a stream, so that all batches are of one size; evaluation reads everything,
        the last batch having the first rows alone.

        Raises:
            UsageError: no batch size, or more streams than blocks of text.
        """
        if not self.carries:
            return super().get_batch_iterator(dataset, *args, **kwargs)
        training = dataset is self.datasets.get(self.args.train_subset) and "epoch" in kwargs
        shards, shard = kwargs.get("num_shards", 1), kwargs.get("shard_id", 0)
        streams = kwargs.get("max_sentences") or (None if training else 1)
        if training:
            _check_streams(streams, shards, len(dataset), kwargs.get("max_tokens"))
        else:
            self.evaluation_memory.clear()
        batches = stream_batches(len(dataset), streams, shards, whole=training)
        if training:
            self._saved.expect(batches[shard], batches[len(batches) - shards + shard], shards, shard)
        return iterators.EpochBatchIterator(
            dataset=dataset,
            collate_fn=dataset.collater,
            batch_sampler=batches,
            seed=kwargs.get("seed", 1),
            num_shards=shards,
            shard_id=shard,
            num_workers=kwargs.get("num_workers", 0),
            epoch=kwargs.get("epoch", 1),
            buffer_size=kwargs.get("data_buffer_size", 0),
            disable_shuffling=True,
            skip_remainder_batch=kwargs.get("skip_remainder_batch", False),
        )

    def begin_epoch(self, epoch, model):
        super().begin_epoch(epoch, model)
        self.training_memory.clear()

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **extra):
        """The stock method, after the model was lent training's memory."""
        if self.carries:
            self._saved.attach(sample["id"])
            self._lend(model, self.training_memory, sample)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad, **extra)

    def valid_step(self, sample, model, criterion, **extra):
        """The stock method, after the model was lent evaluation's memory."""
        if self.carries:
            self._lend(model, self.evaluation_memory, sample)
        return super().valid_step(sample, model, criterion, **extra)

    def eval_lm_dataloader(self, dataset, *args, **kwargs):
        """The stock method; each batch that it hands out moves the memory on.

        Raises:
            UsageError: a context window, which a memory takes the place of.
        """
        if self.carries and kwargs.get("context_window", 0) > 0:
            raise UsageError(
                f"--context-window {kwargs['context_window']}: with --carry-memory every token has its context already; leave it "
                "out, or give --model-overrides \"{'mem_len': N}\""
            )
        batches = super().eval_lm_dataloader(dataset, *args, **kwargs)
        return _InStep(batches, self.evaluation_memory) if self.carries else batches

    def _lend(self, model, memory: CarriedMemory, sample: dict) -> None:
        memory.begin(sample["id"])
        model.decoder.carried = memory


def stream_batches(blocks: int, streams: int, shards: int = 1, *, whole: bool) -> List[List[int]]:
    """Numbers of the blocks of text in each batch, batch t of worker w at place t · shards + w.

    The text is cut into streams · shards streams of equal length, worker w having those from w · streams on; where the
    numbers do not come out even, the first ones are one block longer.

    Args:
        blocks: how many the text has.
        streams: rows of a worker's batch.
        shards: number of workers.
        whole: leave out the last blocks instead, so that all streams are equally long.
    """
    total = streams * shards
    length, longer = divmod(blocks, total)
    if whole:
        longer = 0
    starts = [row * length + min(row, longer) for row in range(total)]
    batches = []
    for step in range(length + (longer > 0)):
        rows = total if step < length else longer
        for shard in range(shards):
            batches.append([starts[row] + step for row in range(shard * streams, min((shard + 1) * streams, rows))])
    return batches


class _InStep:
    """Batches, each of which moves a memory on when it is handed out."""

    def __init__(self, batches, memory: CarriedMemory):
        self.batches = batches
        self.memory = memory

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            if batch:  # one of several shards may have none
                self.memory.begin(batch["id"])
            yield batch


class _SavedMemory:
    """Training's memory in checkpoints that are written within an epoch, and back from them.

    It is large, so it is not copied at every update: the meters that stand for it are asked when a checkpoint is
    written. Only the first of several workers writes one.
    """

    STATES, BLOCKS = "carried_memory", "carried_blocks"

    def __init__(self, memory: CarriedMemory):
        self.memory = memory
        self.meter = None

    def expect(self, first: List[int], last: List[int], shards: int, shard: int) -> None:
        """Say which batches an epoch begins and ends with, and which worker this is."""
        self.first, self.last = torch.tensor(first), torch.tensor(last)
        self.shards, self.shard = shards, shard

    def attach(self, blocks: torch.Tensor) -> None:
        """Take over what a checkpoint has brought, before the first update, and see to it that the next one has it.

        Args:
            blocks: (B,) those of the batch that is about to be read.
        """
        state = MeterState()
        if self.meter is not None and metrics.get_meter(state.aggregator, self.BLOCKS) is self.meter:
            return
        self.memory.blocks, self.memory.left = state.get(self.BLOCKS), state.get(self.STATES)
        for key, value in ((self.STATES, lambda: self.memory.left), (self.BLOCKS, lambda: self.memory.blocks)):
            state.set(key, None)  # there is a meter now
            self.meter = metrics.get_meter(state.aggregator, key)
            self.meter.reset()
            self.meter.state_dict = self._read_when_saved(value)
        self._report(blocks.cpu())

    def _read_when_saved(self, value):
        def state_dict():
            blocks = self.memory.blocks
            ended = blocks is None or torch.equal(blocks, self.last)
            return {"val": None if ended else value(), "sum": 0, "count": 0, "round": None}

        return state_dict

    def _report(self, blocks: torch.Tensor) -> None:
        resumed = not torch.equal(blocks, self.first)
        lost = self.memory.blocks is None or not torch.equal(self.memory.blocks + 1, blocks)
        if resumed and self.shard == 0 and (lost or self.shards > 1):
            whose = "memory" if lost else "memory of all workers but the first"
            logger.warning("--carry-memory: training goes on within an epoch, and the %s starts empty", whose)


def _check(args) -> None:
    """Refuse flags under which blocks do not continue each other (UsageError)."""
    mode = str(args.sample_break_mode or "none")
    if mode != "none":
        raise UsageError(f"--sample-break-mode {mode}: --carry-memory reads running text; give none, or leave --carry-memory out")
    if args.add_bos_token:
        raise UsageError("--add-bos-token: with --carry-memory blocks continue each other; leave one of the two out")


def _check_streams(streams: Optional[int], shards: int, blocks: int, max_tokens: Optional[int]) -> None:
    if streams is None:
        raise UsageError("--carry-memory: give --batch-size, the number of streams of text that are read side by side")
    if streams * shards > blocks:
        raise UsageError(
            f"--batch-size {streams}: the text has {blocks} blocks of --tokens-per-sample, too few for {streams * shards} "
            "streams; give a smaller batch size, or shorter blocks"
        )
    if max_tokens is not None:
        logger.warning("--max-tokens %s: no effect with --carry-memory, which reads --batch-size streams", max_tokens)
