"""fairscale's FullyShardedDataParallel on CPU: its streams of CUDA, which only overlap work, are one that does nothing."""
import contextlib

import torch
import torch.distributed as dist


class NoStream:
    """There is one order of things on a CPU, so there is nothing to wait for."""

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        pass


def reduce_scatter(output, contributions, group):
    """The sum of all workers' contributions, cut into as many pieces as there are workers: this worker's piece."""
    total = contributions.flatten().clone()
    dist.all_reduce(total, group=group)
    output.copy_(total.chunk(group.size())[group.rank()].view_as(output))


def install():
    """Have fairscale, and fairseq's trainer where it shards, run on CPU in this process. All else is the real code."""
    from fairscale.nn.data_parallel import fully_sharded_data_parallel as sharded

    stream = NoStream()
    set_up = sharded.FullyShardedDataParallel._setup_streams

    def set_up_streams(self):
        set_up(self)
        self._streams.update(dict.fromkeys(("fp32_to_fp16", "all_gather", "post_backward"), stream))

    sharded.FullyShardedDataParallel._setup_streams = set_up_streams
    sharded._get_default_cuda_device = lambda module: torch.device("cpu")
    torch.cuda.current_stream = lambda device=None: stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = lambda device=None: None
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    # gloo has none, or one that takes no matrix.
    dist._reduce_scatter_base = reduce_scatter
