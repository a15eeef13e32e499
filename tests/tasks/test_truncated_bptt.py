"""Text read as parallel streams, and the memory carried along them: in training, validation, evaluation and over a resume."""
import math
import re

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_earm.errors import UsageError
from fairseq_earm.sampling.isolation import on_its_own
from fairseq_earm.sampling.language_model import LanguageModelFamily
from fairseq_earm.tasks.earm_language_modeling import EarmLanguageModelingConfig, EarmLanguageModelingTask
from fairseq_earm.tasks.truncated_bptt import stream_batches
from tests.tiny_translation import command, recorded_log, same_state, train


SMALL = (
    "--arch transformer_xl_lm --decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2 "
    "--dropout 0.1 --mem-len 10 --share-decoder-input-output-embed"
).split()
TASK = "--task earm_language_modeling --tokens-per-sample 12 --sample-break-mode none".split()
CARRY = [*TASK, "--carry-memory"]
TRAINING = [*CARRY, "--criterion", "cross_entropy", "--batch-size", 8, "--lr", 0.01]
BLOCK = 12
EPOCH = 19  # updates
END = 24


def xl_train(text, folder, *arguments, **options):
    return train(text, folder, *TRAINING, "--max-epoch", 9, *arguments, arch=SMALL, **options)


@pytest.mark.parametrize("blocks, streams, shards", [(20, 4, 1), (23, 4, 1), (23, 2, 3), (3, 5, 1), (7, 4, 2), (9, 1, 2)])
def test_streams_hold_the_whole_text_in_order(blocks, streams, shards):
    batches = stream_batches(blocks, streams, shards, whole=False)
    assert sorted(block for batch in batches for block in batch) == list(range(blocks))
    for shard in range(shards):
        own = batches[shard::shards]
        assert len(own) == math.ceil(blocks / (streams * shards))
        assert all(len(batch) == min(streams, len(own[0])) for batch in own[:-1])
        for batch, following in zip(own, own[1:]):
            assert following == [block + 1 for block in batch[: len(following)]]


def test_streams_of_equal_length():
    assert stream_batches(11, 2, 2, whole=True) == [[0, 2], [4, 6], [1, 3], [5, 7]]


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """A run that validates every seven updates."""
    flags = ["--max-update", END, "--validate-interval-updates", 7, "--valid-subset", "valid,test"]
    return xl_train(text, tmp_path_factory.mktemp("uninterrupted"), *flags, validate=True)


def test_the_trainers_batches_continue_each_other(text, tmp_path, monkeypatch):
    read = []
    step = EarmLanguageModelingTask.train_step

    def remembering(task, sample, model, *args, **kwargs):
        result = step(task, sample, model, *args, **kwargs)
        memory = model.decoder.carried
        assert memory is task.training_memory
        read.append((sample["id"].tolist(), 0 if memory.read is None else memory.read.size(2), memory.left.clone()))
        return result

    monkeypatch.setattr(EarmLanguageModelingTask, "train_step", remembering)
    xl_train(text, tmp_path, "--max-epoch", 2, "--update-freq", 2)
    assert len(read) == 2 * EPOCH
    epochs = read[:EPOCH], read[EPOCH:]
    for epoch in epochs:
        assert [blocks for blocks, _, _ in epoch] == [[EPOCH * row + step for row in range(8)] for step in range(EPOCH)]
        assert [length for _, length, _ in epoch] == [0] + [10] * (EPOCH - 1)
    assert all(left.shape == (2, 8, 10, 16) for _, _, left in read)


def test_validation_leaves_training_alone(text, tmp_path, uninterrupted):
    plain = xl_train(text, tmp_path, "--max-update", END)
    assert same_state(plain.checkpoint(), uninterrupted.checkpoint())


def carried(checkpoint):
    meters = {name: meter["val"] for _, name, _, meter in checkpoint["extra_state"]["metrics"]["earm_state"]}
    return meters["carried_memory"], meters["carried_blocks"]


@pytest.mark.parametrize("stop", [7, EPOCH], ids=["within-an-epoch", "at-the-end-of-an-epoch"])
def test_a_stopped_run_goes_on_as_if_never_stopped(text, tmp_path, uninterrupted, stop):
    stopped = xl_train(text, tmp_path, "--max-update", stop)
    memory, blocks = carried(stopped.checkpoint())
    if stop == EPOCH:
        assert memory is None and blocks is None
    else:
        assert type(memory) is torch.Tensor and memory.shape == (2, 8, 10, 16)
        assert blocks.tolist() == [EPOCH * row + stop - 1 for row in range(8)]
    resumed = xl_train(text, tmp_path, "--max-update", END)
    assert same_state(resumed.checkpoint(), uninterrupted.checkpoint())
    assert torch.equal(carried(resumed.checkpoint())[0], carried(uninterrupted.checkpoint())[0])
    assert not [line for line in resumed.warnings() if "--carry-memory" in line]


def test_a_memory_that_is_lost_is_missed(text, tmp_path, uninterrupted):
    xl_train(text, tmp_path, "--max-update", 7)
    forgetful = xl_train(text, tmp_path, "--max-update", END, "--reset-meters")
    assert not same_state(forgetful.checkpoint(), uninterrupted.checkpoint())
    assert len([line for line in forgetful.warnings() if "the memory starts empty" in line]) == 1


def load(path, dtype=torch.float64):
    [model], _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    return model.to(dtype).eval(), task


@torch.no_grad()
def bits_by_hand(path, subset, streams):
    """Bits per token of a subset: every stream read in one go, block by block, the last states before it given as its memory."""
    model, task = load(path)
    task.load_dataset(subset)
    dataset, bits, tokens = task.dataset(subset), 0.0, 0
    length, longer = divmod(len(dataset), streams)
    first = 0
    for row in range(streams):
        memory = model.decoder.select_memory(torch.tensor([0]))
        for block in range(first, first + length + (row < longer)):
            source, target = dataset[block]["source"].unsqueeze(0), dataset[block]["target"]
            log_probs = model.decoder(source, memory=memory)[0].log_softmax(-1)[0]
            bits -= log_probs.gather(1, target.unsqueeze(1)).sum().item() / math.log(2)
            tokens += len(target)
            memory = states_after(model, source, memory)
        first += length + (row < longer)
    assert first == len(dataset)
    return bits / tokens


def states_after(model, source, memory):
    """What a layer reads is what the one before has computed; recorded by hooks."""
    read = []
    hooks = [layer.register_forward_pre_hook(lambda layer, given: read.append(given[1])) for layer in model.decoder.layers]
    model.decoder(source, memory=memory)
    for hook in hooks:
        hook.remove()
    return torch.stack(read)[:, :, -model.decoder.mem_len :]


def evaluate(text, path, *arguments, task=CARRY):
    with recorded_log() as records:
        command("eval_lm", text.data, *task, "--path", path, "--cpu", "--no-progress-bar", "--num-workers", 0, *arguments)
    lines = [re.search(r"Loss \(base 2\): ([\d.]+)", record.getMessage()) for record in records]
    return float(next(match for match in lines if match).group(1))


@pytest.fixture(scope="module")
def wild(uninterrupted):
    """Checkpoint of a model with large random weights, whose words depend on everything it reads."""
    state, path = uninterrupted.checkpoint(), uninterrupted.folder / "wild.pt"
    generator = torch.Generator().manual_seed(1)
    for name, weight in state["model"].items():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.8 + ("norm.weight" in name))
    torch.save(state, path)
    return path


def test_stock_evaluation_carries_the_memory(text, wild):
    found = [evaluate(text, wild, "--batch-size", streams) for streams in (1, 4)]
    assert found == pytest.approx([bits_by_hand(wild, "test", streams) for streams in (1, 4)], abs=1e-3)
    assert evaluate(text, wild) == found[0]
    found += [evaluate(text, wild, task=TASK), evaluate(text, wild, "--batch-size", 1, "--model-overrides", "{'mem_len': 3}")]
    assert min(abs(one - other) for i, one in enumerate(found) for other in found[:i]) > 0.01


def test_validation_is_evaluation(text, uninterrupted):
    """Every subset starts anew, and its losses are those of fairseq-eval-lm."""
    path = uninterrupted.folder / "checkpoint_last.pt"
    for subset in ("valid", "test"):
        last = uninterrupted.log(subset)[-1]
        assert last[f"{subset}_num_updates"] == END
        assert last[f"{subset}_loss"] == pytest.approx(evaluate(text, path, "--gen-subset", subset, "--batch-size", 8), abs=2e-3)


def test_adaptive_loss(text, tmp_path):
    # In the tails fairseq's adaptive_loss takes the second word for padding: here it is one that the text does not have.
    flags = ["--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp", "--adaptive-softmax-cutoff", 9, "--max-update", 4]
    arch = [flag for flag in SMALL if "share" not in flag]
    run = train(text, tmp_path, *TRAINING, *flags, arch=arch, validate=True)
    evaluated = evaluate(text, tmp_path / "checkpoint_last.pt", "--gen-subset", "valid", "--batch-size", 8)
    assert run.log("valid")[-1]["valid_loss"] == pytest.approx(evaluated, abs=2e-3)


def test_several_workers_have_streams_of_their_own(text):
    """As fairseq-train asks for the batches of each; the last one of an evaluation may have none for some."""
    seen = []
    for shard in (0, 1):
        task = streams_task(text)
        task.load_dataset("train")
        iterator = task.get_batch_iterator(
            task.dataset("train"), max_sentences=4, num_shards=2, shard_id=shard, epoch=1, seed=1
        ).next_epoch_itr(shuffle=True)
        ids = [batch["id"].tolist() for batch in iterator]
        assert ids == [[EPOCH * row + step for row in range(4 * shard, 4 * shard + 4)] for step in range(EPOCH)]
        seen += [block for batch in ids for block in batch]
    assert sorted(seen) == list(range(8 * EPOCH))
    task.load_dataset("test")
    loading = {"batch_size": 3, "num_shards": 2, "num_workers": 0, "data_buffer_size": 0}
    one_each = [task.eval_lm_dataloader(task.dataset("test"), shard_id=shard, **loading) for shard in (0, 1)]
    found = [[batch["id"].tolist() if batch else [] for batch in shard] for shard in one_each]
    assert sorted(block for shard in found for batch in shard for block in batch) == list(range(len(task.dataset("test"))))
    assert len(found[0]) == len(found[1]) == len(one_each[0])


def streams_task(text, **settings):
    flags = {"data": str(text.data), "tokens_per_sample": BLOCK, "carry_memory": True, "train_subset": "train", **settings}
    flags = {"seed": 1, "batch_size": 8, "batch_size_valid": 8, "dataset_impl": None, "use_plasma_view": False, **flags}
    return EarmLanguageModelingTask.setup_task(EarmLanguageModelingConfig(**flags))


@pytest.mark.parametrize(
    "settings, message", [({"sample_break_mode": "eos"}, "--sample-break-mode eos"), ({"add_bos_token": True}, "--add-bos-token")]
)
def test_blocks_that_do_not_continue_each_other_are_refused(text, settings, message):
    with pytest.raises(UsageError, match=message):
        streams_task(text, **settings)


@pytest.mark.parametrize("streams, message", [(None, "give --batch-size"), (999, "--batch-size 999: .* too few for 1998 streams")])
def test_numbers_of_streams_that_cannot_be_read_are_refused(text, streams, message):
    task = streams_task(text)
    task.load_dataset("train")
    with pytest.raises(UsageError, match=message):
        task.get_batch_iterator(task.dataset("train"), max_sentences=streams, num_shards=2, epoch=1)


def test_a_model_without_a_memory_is_refused(text, tmp_path):
    other = "--arch transformer_lm --decoder-layers 1 --decoder-embed-dim 16 --decoder-attention-heads 2".split()
    with pytest.raises(UsageError, match="TransformerLanguageModel has no memory"):
        train(text, tmp_path, *TRAINING, arch=other)
    assert not list(tmp_path.glob("*.pt"))


def test_a_context_window_is_refused(text, uninterrupted):
    with pytest.raises(UsageError, match="--context-window 4"):
        evaluate(text, uninterrupted.folder / "checkpoint_last.pt", "--context-window", 4)


def test_max_tokens_is_said_to_have_no_effect(text, tmp_path):
    run = xl_train(text, tmp_path, "--max-tokens", 50, "--max-update", 1)
    assert [line for line in run.warnings() if line.startswith("--max-tokens 50: no effect")]


EARM = ["--criterion", "earm_cross_entropy", "--earm-start-update", 2, "--earm-weight", 0.5, "--earm-negative-length", 6]


def test_negatives_continue_the_memory(text, tmp_path, monkeypatch):
    """What was drawn before the data was read has, from the memory of that very batch, the probability it was drawn with."""
    pad, found = streams_task(text).dictionary.pad(), []
    draw = LanguageModelFamily.draw

    def checked(family, model, sample, negatives):
        samples = draw(family, model, sample, negatives)
        with torch.no_grad(), on_its_own(model):
            read = torch.cat([sample["net_input"]["src_tokens"][samples.sources, :1], samples.tokens[:, :-1]], 1)
            memory = model.decoder.select_memory(samples.sources)
            log_probs = model.decoder(read, memory=memory)[0].index_fill(-1, torch.tensor([pad]), -math.inf).log_softmax(-1)
        scored = log_probs.gather(-1, samples.tokens.unsqueeze(-1)).squeeze(-1)
        found.append((memory.size(2), (scored - samples.log_q).abs().max().item()))
        return samples

    monkeypatch.setattr(LanguageModelFamily, "draw", checked)
    run = xl_train(text, tmp_path, *EARM, "--max-update", EPOCH + 2, "--validate-interval-updates", 3, validate=True)
    assert [length for length, _ in found] == [10] * (EPOCH - 2) + [0, 10]
    assert max(error for _, error in found) < 1e-5
    assert all(math.isfinite(entry["loss"]) for entry in run.log())
    assert "earm_dv" in run.log()[-1]


def test_energy_training_resumes_exactly(text, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    whole = xl_train(text, once, *EARM, "--max-update", 8).checkpoint()
    for end in (5, 8):
        resumed = xl_train(text, twice, *EARM, "--max-update", end).checkpoint()
    assert same_state(resumed, whole)


def test_without_the_flag_all_is_as_ever(text, tmp_path):
    folders = [tmp_path / name for name in ("stock", "ours")]
    flags = ["--criterion", "cross_entropy", "--max-update", 3]
    ours = train(text, folders[1], *TASK, *flags, arch=SMALL)
    stock = train(text, folders[0], *TASK, "--task", "language_modeling", *flags, arch=SMALL)
    assert same_state(ours.checkpoint(), stock.checkpoint())
    said = [[line for line in run.warnings() if "without --carry-memory" in line] for run in (ours, stock)]
    assert [len(lines) for lines in said] == [1, 0]
