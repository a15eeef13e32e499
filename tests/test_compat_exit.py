"""A process that stops within an epoch ends as it should, whatever its thread for batches is doing."""
import subprocess
import sys
import time

import pytest

PROGRAM = """
import time, torch
import fairseq_earm
from fairseq_earm import compat_exit
from fairseq.data.iterators import EpochBatchIterator

class Numbers(torch.utils.data.Dataset):
    supports_fetch_outside_dataloader = True
    def __len__(self): return 1000
    def __getitem__(self, index): return index

def busy(items):
    return torch.randn(400, 400).matmul(torch.randn(400, 400)).sort().values

def stuck(items):
    time.sleep(0 if items == [0] else 600)

compat_exit.PATIENCE = {patience}
batches = EpochBatchIterator(Numbers(), {collate}, [[i] for i in range(1000)], buffer_size={room}).next_epoch_itr(shuffle=False)
next(batches)
time.sleep({wait})
print("done")
"""


@pytest.mark.parametrize("collate, room, wait, patience", [
    pytest.param("busy", 1000, 0, 60, id="within an operation of torch"),  # without the mend it aborts every time
    pytest.param("busy", 2, 0.5, 60, id="waiting for room"),
    pytest.param("stuck", 10, 0, 0.5, id="never to end"),
])
def test_a_run_ends_within_an_epoch(collate, room, wait, patience):
    program = PROGRAM.format(collate=collate, room=room, wait=wait, patience=patience)
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
    assert time.monotonic() - start < 60
