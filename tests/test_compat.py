"""Each accommodation does what it is for, on whichever row of the support matrix is installed."""
import argparse
import copy
import importlib
import io
import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, ListDataset, TokenBlockDataset, data_utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.models.transformer import TransformerModel, base_architecture
from fairseq.modules import AdaptiveSoftmax, DynamicCRF
from omegaconf import OmegaConf

from fairseq_earm import compat
from fairseq_earm.compat_versions import parse
from fairseq_earm.errors import UsageError

CHECKS_WHAT_IT_LOADS = parse(torch.__version__) >= (2, 6)
DROPS_LAST_BATCH = len(data_utils.batch_by_size.__wrapped__(np.arange(9), lambda i: 1, required_batch_size_multiple=8)) == 1


# --- applying ---------------------------------------------------------------------------------------------------------


def test_applying_again_changes_nothing():
    layer, _ = compat._encoder_layer()
    places = [
        (data_utils, "batch_by_size"),
        (distributed_utils, "call_main"),
        (distributed_utils, "_broadcast_object_slow"),
        (layer, "_load_from_state_dict"),
        (layer, "upgrade_state_dict_named"),
        (AdaptiveSoftmax, "get_log_prob"),
    ]
    before = [getattr(owner, name) for owner, name in places]
    compat.apply()
    assert [getattr(owner, name) for owner, name in places] == before
    assert not hasattr(data_utils.batch_by_size.__wrapped__, "__wrapped__")


# --- numpy and torch --------------------------------------------------------------------------------------------------


def test_language_modelling_by_sentence_finds_numpys_old_names():
    sentences = ListDataset([torch.full((3,), 5) for _ in range(4)], [3] * 4)
    blocks = TokenBlockDataset(sentences, [3] * 4, None, pad=1, eos=2, break_mode="eos")
    assert len(blocks) == 4
    assert blocks[0].tolist() == [5, 5, 5]


def test_the_crf_of_non_autoregressive_models_finds_numpys_old_names():
    score = DynamicCRF(num_embedding=6, low_rank=2, beam_size=3)(
        torch.zeros(1, 4, 6), torch.tensor([[2, 3, 4, 5]]), torch.ones(1, 4, dtype=torch.bool)
    )
    assert torch.isfinite(score).all()


def test_a_checkpoint_with_arguments_and_bleu_counts_loads():
    saved = {"args": argparse.Namespace(arch="transformer"), "counts": np.array([3, 2, 1, 0])}
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded["args"].arch == "transformer"
    assert loaded["counts"].tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("target", [None, torch.tensor([[3, 7], [8, 4]])], ids=["no target", "target"])
def test_an_adaptive_softmax_has_log_probabilities_with_a_gradient(target):
    torch.manual_seed(1)
    softmax, features = AdaptiveSoftmax(9, 8, [3, 5], dropout=0.0, factor=2.0).double(), torch.randn(2, 2, 8).double()
    log_probs = softmax.get_log_prob(features, target)
    with torch.no_grad():
        stock = softmax.get_log_prob.__wrapped__(softmax, features, None)
    assert torch.equal(log_probs, stock) and torch.allclose(log_probs.exp().sum(-1), torch.ones(2, 2).double())
    tokens = torch.tensor([[3, 7], [8, 4]])
    outputs, targets = softmax(features, tokens)
    expected = sum(
        torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        for logits, wanted in zip(outputs, targets) if logits is not None
    )
    mine = -log_probs.gather(-1, tokens.unsqueeze(-1)).sum()
    weights = list(softmax.parameters())
    for one, other in zip(torch.autograd.grad(mine, weights), torch.autograd.grad(expected, weights)):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grad", [True, False])
def test_an_adaptive_softmax_in_half_precision_has_a_finite_loss(grad):
    """20,000 words have log-probabilities that add up to more than float16 can hold."""
    torch.manual_seed(1)
    softmax = AdaptiveSoftmax(20000, 8, [200, 2000], dropout=0.0, factor=2.0).to(torch.bfloat16)
    with torch.set_grad_enabled(grad):
        log_probs = softmax.get_log_prob(torch.randn(1, 3, 8).to(torch.bfloat16), None)
    assert log_probs.dtype == torch.float32
    assert log_probs.sum().abs() > 65504 and torch.allclose(log_probs.logsumexp(-1), torch.zeros(1, 3), atol=1e-4)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_written_by_either_numpy_load(module):
    file = io.BytesIO()
    torch.save({"counts": np.array([3, 2])}, file, _use_new_zipfile_serialization=False)
    own = np.zeros(1).__reduce__()[0].__module__.encode()
    renamed = file.getvalue().replace(b"c" + own + b"\n", b"c" + module + b"\n")
    assert b"c" + module + b"\n_reconstruct" in renamed
    assert torch.load(io.BytesIO(renamed))["counts"].tolist() == [3, 2]


@pytest.mark.skipif(parse(np.__version__) >= (1, 26), reason="this numpy has numpy._core")
def test_extensions_still_find_that_an_old_numpy_is_old():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("numpy._core._multiarray_umath")


@pytest.mark.skipif(not CHECKS_WHAT_IT_LOADS, reason="torch before 2.6 loads everything")
def test_other_types_in_a_checkpoint_are_still_refused():
    file = io.BytesIO()
    torch.save({"command": print}, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="print"):
        torch.load(file)


def test_a_torch_without_half_precision_on_cpu_is_known():
    layer, tokens = torch.nn.LayerNorm(2).half(), torch.ones(1, 2, dtype=torch.float16)
    if compat.computes_half_on_cpu():
        assert torch.isfinite(layer(tokens)).all()
    else:
        with pytest.raises(RuntimeError, match="Half"):
            layer(tokens)


def send_checkpoint(rank, meeting, answers):
    """What one of two workers gets when the first resumes from a checkpoint and sends it round."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", world_size=2, rank=rank)
    state = {"cfg": OmegaConf.create({"lr": [0.5]}), "model": {"weight": torch.arange(3)}} if rank == 0 else None
    got = distributed_utils.broadcast_object(state, src_rank=0, group=torch.distributed.group.WORLD)
    answers.put((rank, got["cfg"].lr[0], got["model"]["weight"].tolist()))
    torch.distributed.barrier()


def test_workers_get_the_checkpoint_of_the_first(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=send_checkpoint, args=(rank, tmp_path / "meeting", answers)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(answers.get(timeout=5) for _ in workers) == [(rank, 0.5, [0, 1, 2]) for rank in (0, 1)]


# --- fairseq ----------------------------------------------------------------------------------------------------------


def small_transformer():
    words = Dictionary()
    for word in "abcdef":
        words.add_symbol(word)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
             (("layers", 1), ("embed_dim", 8), ("ffn_embed_dim", 8), ("attention_heads", 2))}
    args = argparse.Namespace(dropout=0.0, max_source_positions=16, max_target_positions=16, **sizes)
    base_architecture(args)
    return TransformerModel.build_model(args, argparse.Namespace(source_dictionary=words, target_dictionary=words))


def encode(model):
    padded = torch.tensor([[4, 5, 6, 2], [7, 2, 1, 1]])
    with torch.no_grad():
        out = model.eval().encoder(padded, src_lengths=torch.tensor([4, 2]))
    return out["encoder_out"][0].masked_fill((padded == 1).t().unsqueeze(-1), 0)


def test_a_loaded_encoder_encodes_as_before():
    model = small_transformer()
    loaded = small_transformer()
    loaded.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(encode(loaded), encode(model))
    assert encode(model).abs().sum() > 0


@pytest.mark.skipif(compat._encoder_layer()[1], reason="stock fairseq has these weights")
def test_checkpoints_of_stock_fairseq_load():
    model = small_transformer()
    layer = model.encoder.layers[0]
    state = copy.deepcopy(model.state_dict())
    stock = copy.deepcopy(state)
    prefix = "encoder.layers.0."
    for kind in ("weight", "bias"):
        projections = [getattr(getattr(layer.self_attn, name), kind) for name in ("q_proj", "k_proj", "v_proj")]
        stock[f"{prefix}in_proj_{kind}"] = torch.cat(projections).detach()
        stock[f"{prefix}out_proj_{kind}"] = getattr(layer.self_attn.out_proj, kind).detach()
        stock[f"{prefix}fc1_{kind}"] = getattr(layer.fc1, kind).detach()
        stock[f"{prefix}fc2_{kind}"] = getattr(layer.fc2, kind).detach()
    loaded = small_transformer()
    loaded.load_state_dict(stock)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("as_generator", [False, True])
def test_sentences_left_out_are_counted_and_batches_unchanged(warnings, as_generator):
    def batches_of(batch_by_size):
        indices = (i for i in range(61)) if as_generator else np.arange(61)
        return [list(b) for b in batch_by_size(indices, lambda i: 1, max_sentences=16, required_batch_size_multiple=8)]

    batches = batches_of(data_utils.batch_by_size)
    batches_of(data_utils.batch_by_size)
    assert batches == batches_of(data_utils.batch_by_size.__wrapped__)
    if DROPS_LAST_BATCH:
        [line] = warnings()
        assert "leaves 5 of 61 sentences out" in line and "--required-batch-size-multiple 1" in line
    else:
        assert sum(map(len, batches)) == 61 and not warnings()


def test_nothing_is_said_where_nothing_is_left_out(warnings):
    batches = data_utils.batch_by_size(np.arange(61), lambda i: 1, max_sentences=16, required_batch_size_multiple=1)
    assert sum(map(len, batches)) == 61
    assert not warnings()


def distributed_config(**settings):
    config = OmegaConf.structured(FairseqConfig)
    config.distributed_training.update(settings)
    return config


def test_workers_that_nobody_would_start_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = distributed_config(distributed_init_method="env://", distributed_world_size=2, distributed_no_spawn=False)
    with pytest.raises(ValueError, match="--distributed-no-spawn"):
        distributed_utils.call_main(config, lambda cfg: None)


def test_a_single_worker_starts_as_ever():
    config = distributed_config(distributed_world_size=1)
    seen = []
    distributed_utils.call_main(config, lambda cfg, note: seen.append(note), note="started")
    assert seen == ["started"]


@pytest.mark.parametrize("settings", [{}, {"distributed_init_method": "env://", "distributed_no_spawn": True}])
def test_workers_that_would_each_train_alone_are_refused(monkeypatch, settings):
    monkeypatch.setenv("WORLD_SIZE", "2")
    started = []
    with pytest.raises(UsageError, match="--distributed-world-size 1, but .* 2 workers.* --distributed-world-size 2"):
        distributed_utils.call_main(distributed_config(distributed_world_size=1, **settings), started.append)
    assert started == []


def test_workers_whose_number_fairseq_infers_are_taken(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = distributed_config(distributed_world_size=1).distributed_training

    def infer(cfg):
        cfg.distributed_world_size = 2

    monkeypatch.setattr(distributed_utils, "infer_init_method", infer)
    compat.notice_torchrun()
    distributed_utils.infer_init_method(config)
    assert config.distributed_world_size == 2


def test_a_checkpoint_copy_that_is_cut_off_leaves_the_former_one(tmp_path, monkeypatch):
    new, last = tmp_path / "new.pt", tmp_path / "checkpoint_last.pt"
    new.write_text("new and longer")
    last.write_text("former")
    whole = shutil.copyfileobj

    def cut_off(source, target, *args, **kwargs):
        target.write(source.read(3))
        target.flush()
        raise KeyboardInterrupt

    for name in ("copyfileobj", "_fastcopy_sendfile"):
        monkeypatch.setattr(shutil, name, cut_off, raising=False)
    with pytest.raises(KeyboardInterrupt):
        PathManager.copy(str(new), str(last), overwrite=True)
    assert last.read_text() == "former"
    for name in ("copyfileobj", "_fastcopy_sendfile"):
        monkeypatch.setattr(shutil, name, lambda source, target, *rest: whole(source, target), raising=False)
    assert PathManager.copy(str(new), str(last), overwrite=True)
    assert last.read_text() == "new and longer" and not list(tmp_path.glob("*.copying"))
