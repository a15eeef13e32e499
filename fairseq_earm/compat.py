"""Every accommodation to the versions of Python, fairseq, torch and numpy, each guarded, each with its reason.

`apply()` makes them all; making them again changes nothing. fairseq is imported only inside functions, so that
`check_versions()` can speak before fairseq fails on its own.
"""
from __future__ import annotations

import argparse
import functools
import os
import sys
from typing import Callable, Tuple

from fairseq_earm.compat_exit import end_batch_threads
from fairseq_earm.compat_optimizer import fitting_state
from fairseq_earm.compat_versions import check_versions, parse, warn_once
from fairseq_earm.errors import UsageError


def apply() -> None:
    """Refuse what cannot work, mend what can."""
    check_versions()
    from fairseq_earm.compat_loading import load_without_running  # numpy, and `_wrap`
    from fairseq_earm.compat_saving import write_checkpoints_whole

    restore_numpy_names()
    read_numpy_2_arrays()
    load_without_running()
    trust_broadcast_between_workers()
    avoid_encoder_fast_path()
    drop_fast_path_weights()
    renumber_optimizer_states()
    report_left_out_sentences()
    refuse_to_spawn_nothing()
    notice_torchrun()
    wrap_models_on_cpu()
    write_checkpoints_whole()
    train_adaptive_softmax_as_a_whole()
    take_paths_with_colons()
    end_batch_threads()


def restore_numpy_names() -> None:
    """numpy ≥ 1.24 has no np.float, numpy ≥ 2 no np.compat; the fork still uses them.

    Without np.compat.long, language modelling with `--sample-break-mode eos` fails; np.float is in the dynamic CRF.
    """
    import numpy as np

    if parse(np.__version__) >= (1, 24):
        for name, value in (("float", float), ("compat", argparse.Namespace(long=int))):
            if not hasattr(np, name):
                setattr(np, name, value)
    if parse(np.__version__) >= (2, 4):
        _wrap(np, "percentile", _with_interpolation)


def _with_interpolation(original: Callable) -> Callable:
    """numpy ≥ 2.4 knows it as `method` alone; `--num-batch-buckets` gives it by its former name."""

    def percentile(*args, interpolation=None, **kwargs):
        return original(*args, **kwargs, **({} if interpolation is None else {"method": interpolation}))

    return percentile


def read_numpy_2_arrays() -> None:
    """numpy < 1.26 does not know the module in which numpy ≥ 2 pickles arrays, as checkpoints of the fork do.

    Only that module: extensions built for both look for the whole numpy._core, and must go on finding none.
    """
    import numpy as np

    if parse(np.__version__) < (1, 26):
        sys.modules.setdefault("numpy._core.multiarray", np.core.multiarray)


def computes_half_on_cpu() -> bool:
    """Whether this torch computes float16 without a GPU: until about 2.3 it has no LayerNorm of that type there."""
    import torch

    try:
        torch.nn.functional.layer_norm(torch.zeros(1, 2, dtype=torch.float16), (2,))
    except RuntimeError:
        return False
    return True


def trust_broadcast_between_workers() -> None:
    """On several workers a resume sends the checkpoint from the first to the others through torch.save and torch.load.

    torch ≥ 2.6 refuses to load what is in it (the whole configuration). It comes from a worker of this very run, so
    plain pickle will do.
    """
    import torch
    from fairseq.distributed import utils

    if parse(torch.__version__) < (2, 6):
        return

    def replace(original):
        def broadcast(obj, src_rank, group, dist_device):
            box = [obj]
            torch.distributed.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
            return box[0]

        return broadcast

    _wrap(utils, "_broadcast_object_slow", replace)


def _encoder_layer() -> Tuple[type, bool]:
    """fairseq's encoder layer, and whether it has the fast path of 0.12 (later versions took it out again)."""
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

    return TransformerEncoderLayerBase, "_load_from_state_dict" in vars(TransformerEncoderLayerBase)


def avoid_encoder_fast_path() -> None:
    """Stock fairseq's fast path calls torch as it was before 1.13: "Mask Type should be defined".

    It is taken by encoders that were loaded and never trained, that is, by fairseq-generate.
    """
    layer, has_fast_path = _encoder_layer()
    if not has_fast_path:
        return

    def replace(original):
        def load(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.can_use_fastpath = False

        return load

    _wrap(layer, "_load_from_state_dict", replace)


def drop_fast_path_weights() -> None:
    """Checkpoints of stock fairseq hold a second copy of each encoder layer's weights for the fast path.

    A fairseq without the fast path finds these keys unexpected and refuses the checkpoint.
    """
    layer, has_fast_path = _encoder_layer()
    if has_fast_path:
        return

    def replace(original):
        def upgrade(self, state_dict, name):
            original(self, state_dict, name)
            for part in ("in_proj", "out_proj", "fc1", "fc2"):
                for kind in ("weight", "bias"):
                    state_dict.pop(f"{name}.{part}_{kind}", None)

        return upgrade

    _wrap(layer, "upgrade_state_dict_named", replace)


def renumber_optimizer_states() -> None:
    """A run goes on under the other fairseq with its optimizer's moments, see `compat_optimizer`."""
    from fairseq.trainer import Trainer

    layer, has_fast_path = _encoder_layer()

    def replace(original):
        def build(self):
            original(self)
            optimizer, load = self._optimizer, self._optimizer.load_state_dict
            optimizer.load_state_dict = lambda state, *args, **kwargs: load(
                fitting_state(state, optimizer, self.model, layer, has_fast_path), *args, **kwargs
            )

        return build

    _wrap(Trainer, "_build_optimizer", replace)


def report_left_out_sentences() -> None:
    """Versions of fairseq after 0.12.2 silently drop an incomplete last batch, of the test set too.

    Batches stay as they are, but the number of sentences left out is said.
    """
    import numpy as np
    from fairseq.data import data_utils

    def replace(original):
        def batch_by_size(indices, *args, **kwargs):
            if not isinstance(indices, np.ndarray):
                indices = np.fromiter(indices, dtype=np.int64, count=-1)
            batches = original(indices, *args, **kwargs)
            left_out = len(indices) - sum(len(batch) for batch in batches)
            if left_out > 0:
                warn_once(
                    f"fairseq leaves {left_out} of {len(indices)} sentences out of its batches; "
                    "--required-batch-size-multiple 1 keeps them"
                )
            return batches

        return batch_by_size

    _wrap(data_utils, "batch_by_size", replace)


def refuse_to_spawn_nothing() -> None:
    """fairseq starts one worker per GPU; with none it starts none and exits with success, having trained nothing."""
    import torch
    from fairseq.distributed import utils

    def replace(original):
        def call_main(cfg, main, **kwargs):
            distributed = cfg.distributed_training
            spawns = distributed.distributed_init_method is not None and not distributed.distributed_no_spawn
            if spawns and torch.cuda.device_count() == 0:
                raise ValueError(
                    "without a GPU fairseq starts no workers by itself; "
                    "start them with torchrun and give --distributed-no-spawn"
                )
            if distributed.distributed_init_method is not None:
                _refuse_single_workers(distributed)
            original(cfg, main, **kwargs)

        return call_main

    _wrap(utils, "call_main", replace)


def notice_torchrun() -> None:
    """Where it sees at most one GPU, fairseq after 0.12.2 takes each worker that torchrun started for a single one."""
    from fairseq.distributed import utils

    def replace(original):
        def infer_init_method(cfg, *args, **kwargs):
            original(cfg, *args, **kwargs)
            _refuse_single_workers(cfg)

        return infer_init_method

    _wrap(utils, "infer_init_method", replace)


def _refuse_single_workers(distributed) -> None:
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1 and distributed.distributed_world_size == 1:
        raise UsageError(
            f"--distributed-world-size 1, but torchrun started {started} workers, each of which would train a model of its own "
            f"into the same --save-dir; give --distributed-world-size {started} (on CPU with the other flags that the README "
            "names), or start one worker"
        )


def wrap_models_on_cpu() -> None:
    """Under c10d fairseq names a GPU to torch's wrapper also with --cpu, and torch refuses a model that is not on it."""
    from fairseq.models import distributed_fairseq_model

    def replace(original):
        def wrapper(module, **kwargs):
            if next(module.parameters()).device.type == "cpu":
                kwargs.update(device_ids=None, output_device=None)
            return original(module, **kwargs)

        return wrapper

    _wrap(distributed_fairseq_model, "DistributedDataParallel", replace)


def train_adaptive_softmax_as_a_whole() -> None:
    """fairseq's log-probabilities of an adaptive softmax are made in place, which autograd refuses to differentiate.

    Only `adaptive_loss`, which does without them, can train such a model; so could no criterion of probabilities. And
    unlike those of any other softmax they stay in half precision, in which their sum over a vocabulary is infinite, and
    label smoothing's 0 times it no number.
    """
    import torch
    from fairseq.modules import AdaptiveSoftmax

    from fairseq_earm.ebm.energy import widen

    def replace(original):
        def get_log_prob(self, input, target):
            if not torch.is_grad_enabled() and input.dtype in (torch.float32, torch.float64):
                return original(self, input, target)
            steps = input.contiguous().view(-1, input.size(-1))
            head, *tails = (self.lsm(widen(part(steps))) for part in (self.head, *self.tail))
            shortlist = self.cutoff[0]
            clusters = [tail + head[:, shortlist + number, None] for number, tail in enumerate(tails)]
            return torch.cat([head[:, :shortlist], *clusters], 1).view(input.size(0), input.size(1), -1)

        return get_log_prob

    _wrap(AdaptiveSoftmax, "get_log_prob", replace)


def take_paths_with_colons() -> None:
    """fairseq takes a colon for the end of a path, of data and of checkpoints, though there is a file or folder of the whole name."""
    from fairseq import utils

    def replace(original):
        def split_paths(paths, *args, **kwargs):
            return [paths] if os.path.exists(paths) else original(paths, *args, **kwargs)

        return split_paths

    _wrap(utils, "split_paths", replace)


def _wrap(owner, name: str, replace: Callable) -> None:
    """Replace owner.name by replace(owner.name), once however often it is asked for."""
    original = getattr(owner, name)
    if getattr(original, "is_fairseq_earm", False):
        return
    wrapper = functools.wraps(original)(replace(original))
    wrapper.is_fairseq_earm = True
    setattr(owner, name, wrapper)
