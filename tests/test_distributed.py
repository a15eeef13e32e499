"""Several workers: they draw their own negatives, skip together, wait for none, and end with the same weights."""
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.distributed import ModuleProxyWrapper
from fairseq.modules import LayerDropModuleList
from omegaconf import OmegaConf

from fairseq_earm.sampling import isolation
from fairseq_earm.sampling.ancestral import AncestralSampler
from tests.known_negatives import known_negatives
from tests.tiny_energy import LENGTHS, SIZES
from tests.tiny_translation import ARCH, PLUGIN, train, train_arguments, used_weights

WORKER = Path(__file__).with_name("distributed_worker.py")
WORKERS = ["--distributed-world-size", 2, "--distributed-backend", "gloo", "--distributed-init-method", "env://"]
WORKERS += ["--distributed-rank", -1, "--distributed-no-spawn"]
# 13 batches of 32 sentences for two workers: the last update has nothing for the second.
EPOCH = ["--required-batch-size-multiple", 1, "--max-epoch", 1]
# By plain gradient descent: Adam makes rounding errors as large as it likes.
EARM = ["--criterion", "earm_cross_entropy", "--earm-start-update", 1, "--earm-weight", 0.5, "--optimizer", "sgd", "--lr", 0.3, *EPOCH]
# Batches come in order of length, and the two workers' next ones make up the one worker's.
IN_ORDER = ["--curriculum", 1, "--dropout", 0, "--label-smoothing", 0.1, "--earm-normalizer-ema", 0.5]


def end_of_workers(folder, arguments, environment):
    """Exit status of two workers of `distributed_worker.py` and what they printed; none outlives the deadline."""
    # Underscores: torch before 2.0 knows no dashes here.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, WORKER, folder, PLUGIN, *arguments, "--user-dir", PLUGIN]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": {**os.environ, **environment}}
    with subprocess.Popen(list(map(str, command)), cwd=folder, start_new_session=True, **pipes) as process:
        try:
            printed = process.communicate(timeout=400)[0]
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun's workers have sessions of their own, and it ends them
            pytest.fail(f"the workers hang: {process.communicate()[0][-3000:]}")
    return process.returncode, printed


def run_workers(folder, arguments, **environment):
    """What two workers printed that come to a good end; `environment` is for `distributed_worker.py`."""
    status, printed = end_of_workers(folder, arguments, environment)
    assert status == 0, printed[-3000:]
    return printed


def train_on_two(tiny, folder, *backend, arch=ARCH, **environment):
    """What two workers printed and left behind after an epoch that uses E-ARM from its second update on.

    `backend` is the one to train with, and further flags; `environment` is for `distributed_worker.py`.
    """
    flags = [*EARM, "--ddp-backend", *backend, *WORKERS]
    printed = run_workers(folder, train_arguments(tiny, folder / "out", *flags, arch=arch), **environment)
    return printed, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def workers(tiny, tmp_path_factory):
    return train_on_two(tiny, tmp_path_factory.mktemp("workers"), "legacy_ddp", FAULT="nan")


def test_workers_end_with_equal_finite_weights(workers):
    first, second = (used_weights(left["weights"]) for left in workers[1])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(bool(torch.isfinite(weight).all()) for weight in first.values())


def test_an_epoch_that_does_not_come_out_even_is_finished(workers):
    printed, left = workers
    entries = updates(printed)
    assert [entry["num_updates"] for entry in entries] == [str(update) for update in range(1, 8)]
    assert ["earm_dv" in entry for entry in entries] == [False] + [True] * 6
    sentences = [int(entry["bsz"]) for entry in entries]
    # What the second worker did for want of a last batch does not count.
    assert sum(sentences) == 403 and sentences[-1] == 32
    assert [worker["drawn"] for worker in left] == [6, 6]


def test_one_workers_bad_loss_makes_all_skip(workers):
    assert workers[0].count("update skipped (1 skipped so far)") == 2


def test_sharded_workers_learn_the_same(tiny, workers, tmp_path):
    pytest.importorskip("fairscale", reason="--ddp-backend fully_sharded needs fairscale, which is not installed")
    printed, left = train_on_two(tiny, tmp_path, "fully_sharded", "--min-params-to-wrap", 1, FAULT="nan")
    assert printed.count("update skipped (1 skipped so far)") == 2
    assert [worker["drawn"] for worker in left] == [6, 6]
    expected, found = workers[1][0]["weights"], left[0]["weights"]
    assert expected.keys() == found.keys()
    for name, weight in used_weights(expected).items():
        assert torch.allclose(weight, found[name], rtol=0, atol=1e-5), name
    # The checkpoint is a plain one.
    [model] = load_model_ensemble_and_task([str(tmp_path / "out" / "checkpoint_last.pt")])[0]
    saved = used_weights(model.state_dict())
    assert all(torch.equal(weight, saved[name]) for name, weight in used_weights(found).items())


def updates(printed):
    """What was logged of each update."""
    lines = [line[line.index("{"):] for line in printed.splitlines() if "train_inner" in line and "{" in line]
    return [json.loads(line) for line in lines]


def moving_normalizer(checkpoint):
    """The moving normaliser that a resume would go on from."""
    state = checkpoint["extra_state"]["metrics"]["earm_state"]
    [value] = [meter["val"] for _, key, _, meter in state if key == "log_normalizer"]
    return value


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """One worker that has the two workers' batches and negatives."""
    with mock.patch.object(AncestralSampler, "__call__", lambda sampler, *args: known_negatives(*args)):
        return train(tiny, tmp_path_factory.mktemp("whole"), *EARM, *IN_ORDER, "--batch-size", 64)


@pytest.mark.parametrize("flags", [
    "c10d", "c10d --earm-loss-rows 8", "no_c10d --earm-loss-rows 8", "c10d --earm-dropout off",
    "no_c10d --earm-dropout off",
])
def test_two_workers_are_one_with_twice_the_batch(tiny, whole, tmp_path, flags):
    flags = flags.split()
    unused = ["--find-unused-parameters"] if flags[0] == "c10d" and has_unused_weights(tiny.a) else []
    printed, _ = train_on_two(tiny, tmp_path, *flags, *unused, *IN_ORDER, KNOWN_NEGATIVES="yes")
    found, expected = torch.load(tmp_path / "out" / "checkpoint_last.pt", weights_only=False), whole.checkpoint()
    assert found["optimizer_history"][-1]["num_updates"] == expected["optimizer_history"][-1]["num_updates"] == 7
    weights = used_weights(found["model"])
    for name, weight in used_weights(expected["model"]).items():
        assert torch.allclose(weight, weights[name], rtol=0, atol=1e-6), name
    assert torch.allclose(moving_normalizer(found), moving_normalizer(expected), rtol=0, atol=1e-6)
    for one, other in zip(updates(printed), whole.log()):
        for figure in ("loss", "earm_loss", "earm_dv", "earm_ess", "earm_energy_gap", "earm_log_normalizer", "gnorm"):
            assert figure not in other or float(one[figure]) == pytest.approx(other[figure], abs=2e-3), figure


@pytest.mark.parametrize("fault", ["out of memory", "out of memory between"])
def test_a_worker_out_of_memory_loses_its_batch_and_no_one_waits(tiny, tmp_path, fault):
    """As with any criterion, in the last of an update's batches alone: elsewhere fairseq loses the thread."""
    printed, left = train_on_two(tiny, tmp_path, "legacy_ddp", "--update-freq", 2, FAULT=fault)
    assert printed.count("attempting to recover from OOM") == 1
    first, second = (used_weights(found["weights"]) for found in left)
    assert all(torch.equal(weight, second[name]) and bool(torch.isfinite(weight).all()) for name, weight in first.items())
    assert torch.load(tmp_path / "out" / "checkpoint_last.pt", weights_only=False)["optimizer_history"][-1]["num_updates"] == 4
    lost = 403 - sum(int(entry["bsz"]) for entry in updates(printed))
    assert lost in (19, 32)  # one batch


@pytest.mark.parametrize("fault", ["error", "error between"])
def test_a_worker_s_error_ends_the_run(tiny, tmp_path, fault):
    arguments = train_arguments(tiny, tmp_path / "out", *EARM, "--ddp-backend", "legacy_ddp", *WORKERS)
    status, printed = end_of_workers(tmp_path, arguments, {"FAULT": fault})
    assert status != 0 and "ValueError: something else" in printed
    assert not (tmp_path / "out" / "checkpoint_last.pt").exists()


def has_unused_weights(path):
    """Stock fairseq has weights that are never trained; there torch.distributed needs fairseq's --find-unused-parameters."""
    [model] = load_model_ensemble_and_task([str(path)])[0]
    return len(used_weights(dict(model.named_parameters()))) < len(list(model.parameters()))


def gradients(model, wrapped, rank, path, seed=1):
    """The mean loss's gradient on one worker's share of the test sentences, at the same seed on all."""
    task = load_model_ensemble_and_task([str(path)])[2]
    task.load_dataset("test")
    batch = task.dataset("test").collater([task.dataset("test")[i] for i in range(3 * rank, 3 * rank + 3)])
    flags = {"earm_start_update": 0, "earm_energy_steps": "post", "sentence_avg": False, "max_epoch": 0, "max_update": 0}
    criterion = task.build_criterion(OmegaConf.create({"_name": "earm_cross_entropy", **flags}))
    torch.manual_seed(seed)
    criterion(wrapped.train(), batch)[0].backward()
    used = used_weights(dict(model.named_parameters()))
    return {name: parameter.grad.clone() for name, parameter in used.items()}


def negatives(model, path):
    """What a worker draws for the same sentences at the same seed as the others."""
    task = load_model_ensemble_and_task([str(path)])[2]
    task.load_dataset("test")
    batch = task.dataset("test").collater([task.dataset("test")[i] for i in range(7)])
    torch.manual_seed(1)
    return AncestralSampler(task.target_dictionary)(model, batch["net_input"]).tokens


def load_double(path):
    return load_model_ensemble_and_task([str(path)])[0][0].double()


def wrapped_worker(rank, folder, path):
    """One worker of torch's DistributedDataParallel as fairseq wraps it (its own wrapper asks for a GPU)."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", world_size=2, rank=rank)
    model = load_double(path)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=has_unused_weights(path))
    wrapped = ModuleProxyWrapper(wrapped)
    found = {"gradients": gradients(model, wrapped, rank, path), "negatives": negatives(wrapped, path)}
    # The one decoder layer is left out of the data's pass, of the negatives', of both or of none.
    model.decoder.layers = LayerDropModuleList(0.5, model.decoder.layers)
    dropping = ModuleProxyWrapper(torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True))
    found["with dropped layers"] = [gradients(model, dropping, rank, path, seed) for seed in range(6)]
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def wrapped(tiny, tmp_path_factory):
    """What each of two wrapped workers found."""
    folder, context = tmp_path_factory.mktemp("wrapped"), multiprocessing.get_context("fork")
    processes = [context.Process(target=wrapped_worker, args=(rank, folder, tiny.a), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_torchs_wrapper_averages_both_phases(tiny, wrapped, monkeypatch):
    alone = []
    for rank in (0, 1):
        monkeypatch.setattr(isolation, "_rank", lambda rank=rank: rank)
        model = load_double(tiny.a)
        alone.append(gradients(model, model, rank, tiny.a))
    for together in wrapped:
        for name, gradient in together["gradients"].items():
            assert torch.allclose(gradient, (alone[0][name] + alone[1][name]) / 2, rtol=1e-9, atol=1e-12), name


def test_torchs_wrapper_knows_of_layers_that_only_negatives_pass(wrapped):
    first, second = (found["with dropped layers"] for found in wrapped)
    assert all(torch.equal(one[name], other[name]) for one, other in zip(first, second) for name in one)


def test_workers_draw_different_negatives(tiny, wrapped):
    first, second = (found["negatives"] for found in wrapped)
    assert torch.equal(first, negatives(load_double(tiny.a), tiny.a))
    assert not torch.equal(first, second)


def test_workers_end_together_when_one_s_energies_are_no_numbers(text, tmp_path):
    """Each with the same line, not by what launches them."""
    task = ["--task", "residual_language_modeling", "--criterion", "residual_nce", *LENGTHS, "--base-lm", text.base]
    arguments = train_arguments(text, tmp_path / "out", *task, "--ddp-backend", "legacy_ddp", *WORKERS, arch=["--arch", "bit_tiny", *SIZES])
    status, _ = end_of_workers(tmp_path, arguments, {"FAULT": "energy"})
    lines = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert lines[0] == lines[1] and "the gradient of all workers together is not finite, training has diverged" in lines[0]
    assert status != 0
