"""Training an energy network on the residual of a translation model, and reranking by it, by stock commands."""
import math
import re

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_earm.cli.nbest import read_nbest
from fairseq_earm.errors import UsageError
from fairseq_earm.models.energy_transformer import EnergyModel
from fairseq_earm.sampling.ancestral import AncestralSampler
from fairseq_earm.sampling.frozen import load_frozen
from fairseq_earm.tasks import negatives
from fairseq_earm.tasks.residual_translation import CandidateEnergies, ResidualTranslationConfig, ResidualTranslationTask
from tests.test_distributed import EPOCH, WORKERS, run_workers
from tests.tiny_translation import generate, recorded_log, same_state, tagged, train, train_arguments, used_weights

BIT = "--arch bit_tiny --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-layers 1 --encoder-attention-heads 2".split()
RESIDUAL = ["--task", "residual_translation", "--criterion", "residual_nce", "--lr", 0.005, "--max-epoch", 9]
# Five updates an epoch.
BATCHES = ["--batch-size", 96]
NBEST = ["--beam", 4, "--nbest", 4]


def run(tiny, folder, *arguments, **options):
    """Train a tiny BIT on the residual of model `a`."""
    return train(tiny, folder, *RESIDUAL, "--base-model", tiny.a, *arguments, arch=BIT, **options)


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory):
    return run(tiny, tmp_path_factory.mktemp("uninterrupted"), *BATCHES, "--max-update", 12)


@pytest.fixture(scope="module")
def energy(uninterrupted):
    """An energy network's checkpoint."""
    return uninterrupted.folder / "checkpoint_last.pt"


def setting(tiny, **flags):
    """The task, ready to draw, and a batch of the validation set."""
    known = {"source_lang": "src", "target_lang": "tgt", "train_subset": "train"}
    known.update(dataset_impl=None, required_seq_len_multiple=1)
    task = ResidualTranslationTask.setup_task(
        ResidualTranslationConfig(data=str(tiny.data), base_model=str(tiny.a), **known, **flags)
    )
    task.prepare_negatives(2)
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    return task, dataset.collater([dataset[i] for i in range(5)])


def split(row, shift):
    """A source sentence and its translation, in the words of their own dictionaries, of a row that the network reads."""
    tokens = [token for token in row if token != 1]
    return [t for t in tokens if t < shift], [t - shift for t in tokens if t >= shift]


def unpadded(row):
    return [token for token in row.tolist() if token != 1]


def test_the_network_reads_source_and_translation(tiny):
    task, batch = setting(tiny)
    assert task.shift == len(task.source_dictionary)
    assert len(task.energy_dictionary) == len(task.source_dictionary) + len(task.target_dictionary)
    pairs = [split(row, task.shift) for row in task.sequences(batch).tolist()]
    expected = zip(batch["net_input"]["src_tokens"], batch["target"])
    assert pairs == [(unpadded(source), unpadded(target)) for source, target in expected]
    task.longest = 5
    assert torch.equal(task.sequences(batch), setting(tiny)[0].sequences(batch)[:, :5])


def test_sentences_must_fit_the_base_too(tiny):
    task, _ = setting(tiny)
    assert task.max_positions() == (1024, 1024)
    task.base.model.decoder.max_target_positions = 7
    assert task.max_positions() == (1024, 7)


def test_negatives_are_the_bases_translations(tiny):
    task, batch = setting(tiny, negatives_max_len_a=0.5, negatives_max_len_b=2)
    base = load_frozen(str(tiny.a), task, flag="--base-model").model
    torch.manual_seed(5)
    state = torch.get_rng_state()
    drawn = task.negatives(batch, 3, training=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(negatives.draw_seed(batch["id"], training=True))
    sampler = AncestralSampler(task.target_dictionary, max_len_a=0.5, max_len_b=2)
    expected = sampler(base, batch["net_input"], 3)
    assert expected.truncated.any() and not expected.truncated.all()
    pairs = [split(row, task.shift) for row in drawn.tolist()]
    sources = [unpadded(source) for source in batch["net_input"]["src_tokens"] for _ in range(3)]
    assert pairs == [(source, row[mask].tolist()) for source, row, mask in zip(sources, expected.tokens, expected.mask)]


def test_a_base_may_have_an_adaptive_softmax(tiny, adaptive, tmp_path):
    left = run(tiny, tmp_path, "--base-model", adaptive.folder / "checkpoint_last.pt", "--max-update", 2)
    assert all(math.isfinite(entry["loss"]) for entry in left.log()) and len(left.log()) == 2


def test_a_base_whose_probabilities_are_no_numbers_ends_it(tiny):
    task, batch = setting(tiny)
    task.base.model.decoder.layers[0].fc1.weight.data.fill_(math.nan)
    with pytest.raises(UsageError, match="probabilities are no numbers"):
        task.negatives(batch, 2, training=True)


def test_draws_are_fresh_in_training_and_fixed_in_validation(tiny):
    task, batch = setting(tiny)

    def draw(seed, training=True, **changes):
        torch.manual_seed(seed)
        return task.negatives({**batch, **changes}, 4, training=training).tolist()

    assert draw(1) == draw(1) != draw(2)
    assert draw(1) != draw(1, id=batch["id"] + 100)
    assert draw(1, training=False) == draw(2, training=False)


@pytest.mark.parametrize("stop", [3, 10], ids=["within-an-epoch", "at-the-end-of-an-epoch"])
def test_a_stopped_run_goes_on_as_if_never_stopped(tiny, tmp_path, uninterrupted, stop):
    run(tiny, tmp_path, *BATCHES, "--max-update", stop, validate=True)
    resumed = run(tiny, tmp_path, *BATCHES, "--max-update", 12, validate=True).checkpoint()
    assert same_state(resumed, uninterrupted.checkpoint())


def test_the_checkpoint_holds_the_energy_network_alone(tiny, energy):
    saved = checkpoint_utils.load_checkpoint_to_cpu(str(energy))
    assert all(name.startswith(("trunk.", "energy_projection.")) for name in saved["model"])
    [model], _, task = checkpoint_utils.load_model_ensemble_and_task([str(energy)])
    assert isinstance(model, EnergyModel) and model.vocabulary_size == len(task.energy_dictionary)
    assert task.base is None and not saved["task_state"]


def test_validation_loses_no_sentence(tiny, tmp_path):
    flags = ["--max-update", 1, "--valid-subset", "valid,test", "--batch-size-valid", 64, "--no-save"]
    done = run(tiny, tmp_path, *flags, validate=True)
    sizes = {r.name: re.search(r'_bsz": "(\d+)"', r.getMessage()) for r in done.records if r.name in ("valid", "test")}
    assert {name: int(found.group(1)) for name, found in sizes.items()} == {"valid": 60, "test": 7}


def test_workers_end_with_equal_weights(tiny, tmp_path):
    """The last update has nothing for the second worker, which runs on a batch that does not count."""
    flags = [*RESIDUAL, "--base-model", tiny.a, *EPOCH, *WORKERS, "--ddp-backend", "legacy_ddp"]
    printed = run_workers(tmp_path, train_arguments(tiny, tmp_path / "out", *flags, arch=BIT))
    left = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    first, second = (used_weights(worker["weights"]) for worker in left)
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)
    assert [worker["drawn"] for worker in left] == [7, 7]
    sentences = [int(size) for size in re.findall(r'train_inner.*?"bsz": "(\d+)"', printed)]
    assert sum(sentences) == 403 and sentences[-1] == 32


def rerank(tiny, energy, *flags, **options):
    return generate(tiny, "--energy-path", energy, *flags, task="residual_translation", **options)


@pytest.mark.parametrize("search", [NBEST, [*NBEST, "--unnormalized"], [*NBEST, "--sampling", "--seed", 3]], ids=str)
def test_weight_zero_prints_what_the_stock_task_prints(tiny, energy, search):
    assert rerank(tiny, energy, *search, "--energy-weight", 0) == generate(tiny, *search, task="translation")


def test_printed_scores_are_log_q_and_the_energy(tiny, energy):
    """H-lines are (log q − weight · E) / length^lenpen in base 2 and sorted; P-lines those of the stock task."""
    stock = generate(tiny, *NBEST, task="translation")
    weight, lenpen = 3.0, 0.7
    printed = rerank(tiny, energy, *NBEST, "--energy-weight", weight, "--lenpen", lenpen)
    [network], _, task = checkpoint_utils.load_model_ensemble_and_task([str(energy)])
    network.eval()
    sources, moved = tagged(printed, "S"), 0
    for sentence, lines in tagged(printed, "H").items():
        scores, texts = zip(*((float(score), text) for score, text in (line.split("\t") for line in lines)))
        assert list(scores) == sorted(scores, reverse=True)
        before = [line.split("\t")[1] for line in tagged(stock, "H")[sentence]]
        assert sorted(texts) == sorted(before)
        moved += list(texts) != before
        [source] = sources[sentence]
        for score, text, tokens in zip(scores, texts, tagged(printed, "P")[sentence]):
            read = task.source_dictionary.encode_line(source, add_if_not_exist=False).tolist()
            read += (task.target_dictionary.encode_line(text, add_if_not_exist=False) + task.shift).tolist()
            log_q = [float(token) * math.log(2) for token in tokens.split()]
            expected = (sum(log_q) - weight * network(torch.tensor([read])).item()) / len(log_q) ** lenpen
            assert score * math.log(2) == pytest.approx(expected, abs=2e-3)
    assert moved


def test_candidates_are_scored_alike_in_pieces_and_behind_any_padding(tiny, energy, monkeypatch):
    task, batch = setting(tiny)
    source = CandidateEnergies(load_frozen(str(energy), task, flag="--energy-path"))
    words = torch.arange(4, 8)
    hypotheses = [[{"tokens": words[: 1 + (i + j) % 4]} for j in range(i % 3)] for i in range(5)]
    whole = source(batch["net_input"], hypotheses)
    assert len(whole) == sum(map(len, hypotheses))
    monkeypatch.setattr("fairseq_earm.tasks.residual_translation.MAX_TOKENS", 1)
    torch.testing.assert_close(source(batch["net_input"], hypotheses), whole)
    right = [unpadded(row) + [1] * int(row.eq(1).sum()) for row in batch["net_input"]["src_tokens"]]
    torch.testing.assert_close(source({"src_tokens": torch.tensor(right)}, hypotheses), whole)
    assert source(batch["net_input"], [[] for _ in range(5)]).shape == (0,)


def test_candidates_that_are_cut_are_reported(tiny, energy, monkeypatch, caplog):
    monkeypatch.setattr("fairseq_earm.sampling.layout._warned_of", set())
    monkeypatch.setattr(EnergyModel, "max_positions", lambda model: 5)
    task, batch = setting(tiny)
    hypotheses = [[{"tokens": torch.arange(4, 4 + length)} for length in (1, 3)] for _ in range(5)]
    sources = [len(unpadded(row)) for row in batch["net_input"]["src_tokens"]]
    cut = sum(source + target > 5 for source in sources for target in (1, 3))
    candidates = CandidateEnergies(load_frozen(str(energy), task, flag="--energy-path"))
    assert 0 < cut < 10 and candidates(batch["net_input"], hypotheses).isfinite().all()
    assert f"{cut} of 10 sequences of a batch" in caplog.text


def test_resampling_follows_the_seed(tiny, energy):
    flags = ["--beam", 6, "--nbest", 6, "--sampling", "--energy-select", "resample"]
    first = rerank(tiny, energy, *flags, "--seed", 3)
    assert first == rerank(tiny, energy, *flags, "--seed", 3) != rerank(tiny, energy, *flags, "--seed", 4)


def test_tuning_reads_the_energies_back(tiny, energy, tmp_path):
    with recorded_log() as records:
        printed = rerank(tiny, energy, *NBEST, "--energy-weight", 2)
    lines = [r.getMessage() for r in records if r.getMessage().startswith("energy reranking")]
    assert lines == ['energy reranking: {"energy_weight": 2.0, "lenpen": 1.0, "select": "best"}']
    for name, text in (("out", printed), ("log", lines[0] + "\n")):
        (tmp_path / name).write_text(text)
    nbest = read_nbest([str(tmp_path / "out"), str(tmp_path / "log")])
    assert nbest.log_mu.shape == (7, 4) and (nbest.log_mu.std(1) > 0).any()


def test_energies_that_are_not_finite_come_last(tiny, energy, monkeypatch, caplog):
    forward = EnergyModel.forward

    def spoilt(model, src_tokens):
        energies = forward(model, src_tokens)
        return energies.index_fill(0, torch.tensor([0]), math.nan)

    monkeypatch.setattr(EnergyModel, "forward", spoilt)
    printed = rerank(tiny, energy, *NBEST, "--batch-size", 7)
    assert "the energy of 1 of 28 candidates is not finite (1 so far): they are put last" in caplog.text
    assert "-inf" in printed


@pytest.mark.parametrize("flags, message", [
    (["--base-model", "nothing.pt"], "--base-model nothing.pt: there is no such file"),
    (["--negatives-max-len-a", -1], "--negatives-max-len-a -1.0: give"),
    (["--negatives-max-len-a", 0, "--negatives-max-len-b", 0], "--negatives-max-len-b 0: give"),
    (["--negatives-max-len-b", -1], "--negatives-max-len-b -1: give"),
    (["--left-pad-target"], "--left-pad-target True"),
    (["--eval-bleu"], "--eval-bleu"),
    (["--arch", "transformer"], "--arch transformer is no energy network"),
    (["--criterion", "cross_entropy"], "--criterion cross_entropy does not train an energy network"),
    (["--energy-path", "energy.pt"], "--energy-path energy.pt is for generating"),
    (["--energy-weight", -1], "--energy-weight -1.0 is not a finite number"),
])
def test_bad_settings_are_named(tiny, tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        train(tiny, tmp_path, *RESIDUAL, "--base-model", tiny.a, *flags, arch=[] if "--arch" in flags else BIT)
    assert not list(tmp_path.glob("*.pt"))


def test_a_missing_base_and_bases_of_another_kind_are_named(tiny, energy, tmp_path):
    with pytest.raises(UsageError, match="--base-model is missing"):
        train(tiny, tmp_path, *RESIDUAL, arch=BIT)
    with pytest.raises(UsageError, match="is a BidirectionalEnergyTransformer: give a translation model"):
        run(tiny, tmp_path, "--base-model", energy)


def test_energy_paths_that_do_not_fit_are_named(tiny, energy, text):
    wrong = (("nothing.pt", "there is no such file"), (tiny.a, "give an energy network"), (text.base, "--energy-path"))
    for path, message in wrong:
        with pytest.raises(UsageError, match=message):
            rerank(tiny, path, *NBEST)
    with pytest.raises(UsageError, match="--energy-select resample has nothing to draw from with --beam 1"):
        rerank(tiny, energy, "--beam", 1, "--energy-select", "resample")


def test_another_base_than_the_energy_s_own_is_warned_about(tiny, energy, caplog):
    rerank(tiny, energy, *NBEST)
    assert "is not the base that" not in caplog.text
    rerank(tiny, energy, *NBEST, models="b")
    assert f"--path {tiny.b} is not the base that --energy-path {energy} was trained on, {tiny.a}" in caplog.text


def test_energy_flags_without_an_energy_are_reported(tiny, caplog):
    stock = generate(tiny, *NBEST, task="translation")
    caplog.clear()
    assert generate(tiny, *NBEST, "--energy-weight", 0.5, task="residual_translation") == stock
    assert "--energy-weight 0.5 without --energy-path: no effect" in caplog.text
