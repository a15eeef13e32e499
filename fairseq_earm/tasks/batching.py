"""Batches that lose no sentence in evaluation, and are the same after a resume."""
from __future__ import annotations


class ExactBatches:
    """For a task, before fairseq's in the order of bases."""

    def get_batch_iterator(self, dataset, *args, **kwargs):
        """The stock iterator, but one that loses no sentence in evaluation and resumes exactly in training.

        fairseq's main branch drops a split's last batch unless its size is a multiple of --required-batch-size-multiple,
        and forms the batches of training data by the epoch in which a run starts: a resumed run had other batches.
        Only the trainer passes an epoch, so that generating from the training subset keeps its last batch too.
        """
        training = dataset is self.datasets.get(self.cfg.train_subset) and "epoch" in kwargs
        if not training:
            kwargs["required_batch_size_multiple"] = 1
        if not training or kwargs.get("update_epoch_batch_itr"):
            return super().get_batch_iterator(dataset, *args, **kwargs)
        epoch, in_use = kwargs["epoch"], self.dataset_to_epoch_iter.get(dataset)
        iterator = super().get_batch_iterator(dataset, *args, **{**kwargs, "epoch": 1})
        if iterator is not in_use:
            dataset.set_epoch(epoch)
            iterator.epoch = max(epoch, 1)
        return iterator
