"""Training an energy network on the residual of a language model, by stock commands."""
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_earm.cli import sample as sample_command
from fairseq_earm.errors import UsageError
from fairseq_earm.models.energy_transformer import EnergyModel
from fairseq_earm.sampling.continuation import ContinuationSampler
from fairseq_earm.tasks import negatives
from fairseq_earm.tasks.residual_language_modeling import ResidualLanguageModelingConfig, ResidualLanguageModelingTask
from tests.test_resuming import kill_after
from tests.tiny_translation import PLUGIN, command, recorded_log, same_state, train, train_arguments, used_weights

PREFIX, LENGTH = 8, 12
BIT = "--arch bit_tiny --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-layers 1 --encoder-attention-heads 2".split()
LENGTHS = ["--prefix-length", PREFIX, "--sequence-length", LENGTH]
# Five updates an epoch.
RESIDUAL = ["--task", "residual_language_modeling", "--criterion", "residual_nce", *LENGTHS, "--lr", 0.001, "--max-epoch", 9]


def run(text, folder, *arguments, base=True, **options):
    """Train a tiny BIT on the residual of the base."""
    known = ["--base-lm", text.base] if base else []
    return train(text, folder, *RESIDUAL, *known, *arguments, arch=BIT, **options)


def setting(text, **flags):
    """The task, ready to draw, and the first batches of the validation set."""
    flags = {"prefix_length": PREFIX, "sequence_length": LENGTH, "base_lm": str(text.base), **flags}
    known = {"train_subset": "train", "dataset_impl": None, "data": str(text.data)}
    task = ResidualLanguageModelingTask.setup_task(ResidualLanguageModelingConfig(**known, **flags))
    task.prepare_negatives(2)
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    return task, [dataset.collater([dataset[i] for i in range(start, start + 4)]) for start in (0, 4)]


def test_a_batch(text):
    task, (first, second) = setting(text)
    blocks = task.dataset("valid").blocks
    tokens = first["net_input"]["src_tokens"]
    assert tokens.tolist() == [blocks[i].tolist() for i in range(4)]
    assert torch.equal(first["target"], tokens[:, PREFIX:])
    assert (first["nsentences"], first["ntokens"]) == (4, 4 * LENGTH)
    assert second["id"].tolist() == [4, 5, 6, 7]
    assert task.dataset("valid").collater([]) == {}
    assert torch.equal(task.sequences(first), tokens)


@pytest.mark.parametrize("proposal", [{}, {"temperature": 0.5}, {"topk": 2}, {"topp": 0.7}], ids=str)
def test_negatives_are_the_bases_continuations(text, proposal):
    task, (batch, _) = setting(text, **{f"negatives_{name}": value for name, value in proposal.items()})
    torch.manual_seed(5)
    drawn = task.negatives(batch, 3, training=True)
    prefixes = task.sequences(batch)[:, :PREFIX]
    assert torch.equal(drawn[:, :PREFIX], prefixes.repeat_interleave(3, 0))
    generator = torch.Generator().manual_seed(negatives.draw_seed(batch["id"], training=True))
    sampler = ContinuationSampler(task.dictionary, LENGTH - PREFIX, **proposal)
    assert torch.equal(drawn[:, PREFIX:], sampler(task.source.base.model, prefixes, 3, generator=generator).tokens)


def test_draws_are_fresh_in_training_and_fixed_in_validation(text, monkeypatch):
    task, (first, second) = setting(text)
    # The same text in two batches of an update is told apart by its place in the data.
    again = {**second, "net_input": first["net_input"]}

    def draw(batch, seed, training=True):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        drawn = task.negatives(batch, 4, training=training)
        assert torch.equal(torch.get_rng_state(), state)
        return drawn.tolist()

    here = draw(first, 1)
    assert here == draw(first, 1)
    assert here != draw(first, 2)
    assert here != draw(again, 1)
    valid = draw(first, 1, training=False)
    assert valid == draw(first, 2, training=False) != draw(again, 1, training=False)
    monkeypatch.setattr(negatives, "get_global_rank", lambda: 1)
    assert here != draw(first, 1)
    assert valid == draw(first, 1, training=False)


def test_the_base_has_the_type_asked_for(text):
    task, (batch, _) = setting(text, base_dtype="bfloat16")
    assert {p.dtype for p in task.source.base.model.parameters()} == {torch.bfloat16}
    assert task.negatives(batch, 2, training=True).shape == (8, LENGTH)


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    return run(text, tmp_path_factory.mktemp("uninterrupted"), "--max-update", 8, "--update-freq", 2, validate=True)


def test_the_checkpoint_holds_the_energy_network_alone(text, uninterrupted):
    saved = uninterrupted.checkpoint()
    base = checkpoint_utils.load_checkpoint_to_cpu(str(text.base))
    assert all(name.startswith(("trunk.", "energy_projection.")) for name in saved["model"])
    assert not set(saved["model"]) & set(base["model"])
    assert saved.get("criterion") in (None, {}) and not saved["task_state"]
    [model], cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(uninterrupted.folder / "checkpoint_last.pt")])
    assert isinstance(model, EnergyModel) and task.source is None
    assert len(saved["last_optimizer_state"]["state"]) == len(used_weights(dict(model.named_parameters())))
    assert cfg.task.base_lm == str(text.base) and cfg.task.prefix_length == PREFIX


def test_the_log(uninterrupted):
    entries = uninterrupted.log()
    assert [entry["num_updates"] for entry in entries] == list(range(1, 9))
    keys = {"loss", *(f"nce_{name}" for name in (
        "accuracy_data", "accuracy_negatives", "energy_data", "energy_negatives", "energy_gap", "self_normalisation"))}
    assert all(keys <= set(entry) for entry in entries)
    counted = [r.getMessage() for r in uninterrupted.records if "shorter ones skipped" in r.getMessage()]
    assert len(counted) == 2


@pytest.mark.parametrize("stop", [2, 3], ids=["within-an-epoch", "at-the-end-of-an-epoch"])
def test_a_stopped_run_goes_on_as_if_never_stopped(text, tmp_path, uninterrupted, stop):
    run(text, tmp_path, "--max-update", stop, "--update-freq", 2, validate=True)
    resumed = run(text, tmp_path, "--max-update", 8, "--update-freq", 2, validate=True)
    assert same_state(resumed.checkpoint(), uninterrupted.checkpoint())


def test_a_killed_run_goes_on_as_if_never_killed(text, tmp_path):
    killed = tmp_path / "killed"
    flags = [*RESIDUAL, "--base-lm", text.base, "--max-epoch", 1000, "--save-interval-updates", 1, "--user-dir", PLUGIN]
    kill_after(8, train_arguments(text, killed, *flags, arch=BIT, validate=True), killed)
    path = killed / "checkpoint_last.pt"
    last = checkpoint_utils.load_checkpoint_to_cpu(str(path))["optimizer_history"][-1]["num_updates"]
    end = ["--max-update", last + 3, "--max-epoch", 1000]
    resumed = run(text, tmp_path / "resumed", *end, "--restore-file", path).checkpoint()
    assert same_state(resumed, run(text, tmp_path / "never", *end).checkpoint())


def test_validation_draws_do_not_change_what_is_trained(text, tmp_path, uninterrupted):
    without = run(text, tmp_path, "--max-update", 8, "--update-freq", 2)
    assert same_state(without.checkpoint(), uninterrupted.checkpoint())


def test_validation_loses_no_sequence_and_repeats_itself(text, uninterrupted, monkeypatch):
    def validated(seed):
        flags = ["--task", "residual_language_modeling", *LENGTHS, "--batch-size", 8, "--cpu", "--num-workers", 0]
        with recorded_log() as records:
            path = uninterrupted.folder / "checkpoint_last.pt"
            command("validate", text.data, "--path", path, *flags, "--seed", seed, "--log-format", "json")
        return [json.loads(r.getMessage()) for r in records if r.name == "valid" and r.getMessage().startswith("{")]

    [first], [second] = validated(1), validated(2)
    assert first == second and first["valid_bsz"] is not None
    dataset = setting(text)[0].dataset("valid")
    sizes = [json.loads(r.getMessage()) for r in uninterrupted.records if r.name == "valid" and "valid_bsz" in r.getMessage()]
    assert len(dataset) == 30 and all(float(entry["valid_wpb"]) == 30 * LENGTH for entry in sizes)


def test_batches_of_one_update_and_visits_of_one_sequence_get_other_negatives(text, tmp_path, monkeypatch):
    seen, draw = [], ResidualLanguageModelingTask.negatives

    def remembered(task, sample, count, *, training):
        drawn = draw(task, sample, count, training=training)
        seen.append((tuple(sample["id"].tolist()), drawn[:, PREFIX:].tolist()))
        return drawn

    monkeypatch.setattr(ResidualLanguageModelingTask, "negatives", remembered)
    run(text, tmp_path, "--max-update", 9, "--update-freq", 2)
    visits = {}
    for ids, drawn in seen:
        for index, continuation in zip(ids, drawn):
            visits.setdefault(index, []).append(continuation)
    often = [found for found in visits.values() if len(found) > 2]
    assert len(often) > 100
    assert sum(len({tuple(c) for c in found}) > 1 for found in often) > 0.9 * len(often)


def stored(text, folder, splits=("train", "valid"), **flags):
    """Pre-generated samples of the splits."""
    settings = {"samples": 4, "prefix_length": PREFIX, "sequence_length": LENGTH, **flags}
    given = [str(value) for name, setting in settings.items() for value in (f"--{name.replace('_', '-')}", setting)]
    for split in splits:
        where = [text.data, "--path", text.base, "--output", folder, "--gen-subset", split, "--cpu", "--batch-size", 32]
        sample_command.main([*map(str, where), *given])
    return folder


@pytest.fixture(scope="module")
def samples(text, tmp_path_factory):
    return stored(text, tmp_path_factory.mktemp("samples"))


def test_stored_negatives_are_drawn_uniformly(text, samples):
    task, (first, _) = setting(text, negatives=str(samples), base_lm=None)
    store, counts = task.source.stores["valid"], torch.zeros(4, 4)
    for seed in range(200):
        torch.manual_seed(seed)
        drawn = task.negatives(first, 2, training=True)
        assert torch.equal(drawn[:, :PREFIX], task.sequences(first)[:, :PREFIX].repeat_interleave(2, 0))
        for row, continuation in enumerate(drawn[:, PREFIX:]):
            counts[row // 2] += store.all(row // 2).eq(continuation).all(1)
    distinct = [len(store.all(row).unique(dim=0)) == 4 for row in range(4)]
    assert any(distinct) and (counts[distinct].sub(100).abs() < 40).all()
    assert torch.equal(task.negatives(first, 2, training=False), task.negatives(first, 2, training=False))


def test_training_on_stored_negatives_resumes_exactly(text, samples, tmp_path):
    flags = ["--negatives", samples, "--nce-negatives-per-positive", 2]
    whole = run(text, tmp_path / "whole", *flags, "--max-update", 7, base=False, validate=True)
    run(text, tmp_path / "stopped", *flags, "--max-update", 3, base=False)
    resumed = run(text, tmp_path / "stopped", *flags, "--max-update", 7, base=False)
    assert same_state(resumed.checkpoint(), whole.checkpoint())


def refused(text, folder, *arguments, **options):
    """The one line that a command ends with, nothing having been trained."""
    with pytest.raises(UsageError) as error:
        run(text, folder, *arguments, **options)
    assert not list(folder.glob("*.pt")) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("flags, message", [
    (["--prefix-length", 12], "--prefix-length 12: nothing is left to predict of --sequence-length 12"),
    (["--prefix-length", 13], "--prefix-length 13"),
    (["--prefix-length", -1], "--prefix-length -1: give at least 0"),
    (["--negatives-temperature", 0], "--negatives-temperature 0.0: give"),
    (["--negatives-topk", 0], "--negatives-topk 0: give 1 to"),
    (["--negatives-topk", 1000], "--negatives-topk 1000: give 1 to"),
    (["--negatives-topp", 1.5], "--negatives-topp 1.5: give"),
    (["--negatives-topk", 3, "--negatives-topp", 0.5], "give one of the two"),
    (["--nce-negatives-per-positive", 0], "--nce-negatives-per-positive 0: give at least 1"),
    (["--sequence-length", 13], "--sequence-length 13: --base-lm .* has 12 positions"),
    (["--max-positions", 12], "--sequence-length 12: the energy network reads 11 tokens at most"),
    (["--base-lm", "nothing.pt"], "--base-lm nothing.pt: there is no such file"),
    (["--arch", "transformer"], "--arch transformer is no energy network"),
    (["--arch", "transformer_lm"], "--arch transformer_lm is no energy network"),
    (["--criterion", "cross_entropy"], "--criterion cross_entropy does not train an energy network"),
    (["--negatives", "nowhere"], "--negatives nowhere/(train|valid): these samples do not exist"),
    (["--energy-path", "energy.pt"], "--energy-path energy.pt is for generating"),
    (["--sample-break-mode", "eos"], "--sequence-length 12: .* no sequence that long .*--sample-break-mode eos"),
])
def test_bad_settings_are_named(text, tmp_path, flags, message):
    arch = [] if "--arch" in flags else BIT
    with pytest.raises(UsageError, match=message):
        train(text, tmp_path, *RESIDUAL, "--base-lm", text.base, *flags, arch=arch)
    assert not list(tmp_path.glob("*.pt"))


def test_data_without_a_dictionary_is_named(text, tmp_path):
    with pytest.raises(UsageError, match="nowhere/dict.txt: there is no such file"):
        run(SimpleNamespace(data=tmp_path / "nowhere", base=text.base), tmp_path)


def test_other_proposals_than_the_bases_softmax_are_reported(text, tmp_path, caplog):
    """The energy then learns another residual, and nothing else would say so."""
    folder = stored(text, tmp_path, splits=["valid"], sampling_topk=2)
    for flags, message in (
        ({}, None),
        ({"negatives_topp": 1.0}, None),
        ({"negatives_topk": 3}, "temperature 1, top-k 3, top-p -1: the energy learns the residual of this proposal"),
        ({"negatives": str(folder)}, f"{folder}/valid: temperature 1, top-k 2, top-p -1: the energy learns"),
    ):
        caplog.clear()
        setting(text, **flags)
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "residual of" in r.getMessage()]
        assert len(warnings) == bool(message) and all(message in warning for warning in warnings)


def test_a_missing_base_is_named(text, tmp_path):
    assert "--base-lm is missing" in refused(text, tmp_path, base=False)


def test_a_base_of_another_kind_is_refused(text, tiny, tmp_path):
    """A translation model whose dictionaries happen to be the data's."""
    data = tmp_path / "data"
    shutil.copytree(text.data, data)
    shutil.copy(tiny.data / "dict.src.txt", data / "dict.txt")
    with pytest.raises(UsageError, match="is a TransformerModel: give a language model"):
        run(SimpleNamespace(data=data), tmp_path / "out", "--base-lm", tiny.a, base=False)


def test_text_with_another_dictionary_is_refused(text, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(text.data, data)
    lines = (data / "dict.txt").read_text().splitlines()
    (data / "dict.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(UsageError, match="its source dictionary is not the data's: index 4 is"):
        command("train", data, *RESIDUAL, "--base-lm", text.base, *BIT, "--save-dir", tmp_path, "--batch-size", 8, "--cpu")


def test_samples_that_do_not_fit_are_refused(text, samples, tmp_path):
    few = ["--negatives", samples, "--nce-negatives-per-positive", 5]
    assert "holds 4 continuations of a prefix" in refused(text, tmp_path, *few)
    assert "--prefix-length 8, here it is 7" in refused(text, tmp_path, "--negatives", samples, "--prefix-length", 7)
    other = tmp_path / "folder" / "another.pt"
    other.parent.mkdir()
    other.write_bytes(text.base.read_bytes() + b" ")
    drawn = refused(text, tmp_path, "--negatives", samples, "--base-lm", other)
    assert "was drawn from another checkpoint" in drawn and str(text.base) in drawn


def test_samples_are_refused_where_the_data_change_with_the_epoch(text, samples, tmp_path):
    shards = SimpleNamespace(data=f"{text.data}:{text.data}", base=text.base)
    message = refused(shards, tmp_path / "stored", "--negatives", samples)
    assert f"--negatives {samples}: these samples continue the text of one folder, and {shards.data} names 2" in message
    assert "or give --negatives online" in message
    assert len(run(shards, tmp_path / "online", "--max-epoch", 2).log("train")) == 2


def test_flags_of_online_draws_are_reported_with_stored_ones(text, samples, tmp_path):
    done = run(text, tmp_path, "--negatives", samples, "--negatives-topk", 3, "--max-update", 1, "--no-save")
    assert f"--negatives-topk 3 with --negatives {samples}: no effect" in done.warnings()


def test_energies_that_are_not_finite_end_training(text, tmp_path, monkeypatch):
    forward, calls = EnergyModel.forward, []

    def spoilt(model, src_tokens):
        calls.append(1)
        return forward(model, src_tokens) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(EnergyModel, "forward", spoilt)
    with pytest.raises(UsageError, match="64 of 64 energies are not finite"):
        run(text, tmp_path, "--max-update", 5, "--save-interval-updates", 1)
    kept = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))
    assert kept["optimizer_history"][-1]["num_updates"] == 2
