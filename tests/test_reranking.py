import copy
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from fairseq.checkpoint_utils import load_model_ensemble
from fairseq.data import data_utils
from fairseq.models.bart import BARTModel, bart_base_architecture
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator

from fairseq_earm import reranking
from fairseq_earm.reranking import EnergyReranker, candidate_log_mu
from tests.tiny_model import log_probs_of


@pytest.fixture(scope="module")
def models(tiny):
    return load_model_ensemble([str(tiny.a), str(tiny.b)])[0]


@pytest.fixture(scope="module")
def dictionary(models):
    return models[0].decoder.dictionary


def batch(dictionary, sentences, left_pad=True):
    """A batch of source sentences, padded on the left as fairseq does."""
    rows = [dictionary.encode_line(s, add_if_not_exist=False, line_tokenizer=str.split).long() for s in sentences]
    tokens = data_utils.collate_tokens(rows, dictionary.pad(), dictionary.eos(), left_pad)
    lengths = torch.tensor([len(row) for row in rows])
    return {"net_input": {"src_tokens": tokens, "src_lengths": lengths}}


SENTENCES = ["a b c d e", "f", "g h a", "b b b b b b", "c d"]


def oracle(model, source, target, energy_step="last"):
    """(log q, log μ) of one target given one source, unpadded, by plain log-softmax of a float64 model."""
    encoder_out = model.encoder(source.unsqueeze(0), src_lengths=torch.tensor([len(source)]))
    eos = torch.tensor([model.decoder.dictionary.eos()])
    with torch.no_grad():
        output = model.decoder(torch.cat([eos, target]).unsqueeze(0), encoder_out=encoder_out)
        log_q = log_probs_of(model.decoder, output)[0, :-1].gather(1, target.unsqueeze(1)).sum().item()
        softmax, step = model.decoder.adaptive_softmax, -2 if energy_step == "last" else -1
        scores = output[0][0, step] if softmax is None else softmax.head(output[0][0, step])
    return log_q, scores.exp().sum().log().item()


def sources(sample):
    pad = 1
    return [row[row != pad] for row in sample["net_input"]["src_tokens"]]


def generator(models, dictionary, **kwargs):
    return SequenceGenerator(models, dictionary, **{"beam_size": 4, "max_len_b": 10, **kwargs})


@pytest.mark.parametrize("energy_step", ["last", "post"])
@pytest.mark.parametrize("lenpen, normalize", [(1.0, True), (0.3, True), (1.0, False)])
@pytest.mark.parametrize("size", [1, 2])
def test_scores_and_order_are_those_of_a_float64_oracle(models, dictionary, energy_step, lenpen, normalize, size):
    models, sample = models[:size], batch(dictionary, SENTENCES)
    exact = [copy.deepcopy(model).double().eval() for model in models]
    stock = generator(models, dictionary, len_penalty=lenpen, normalize_scores=normalize)
    hypotheses = EnergyReranker(stock, models, weight=0.7, energy_step=energy_step).generate(models, sample)
    assert len(hypotheses) == len(SENTENCES)
    for source, candidates in zip(sources(sample), hypotheses):
        expected = []
        for hypothesis in candidates:
            scores = [oracle(model, source, hypothesis["tokens"], energy_step) for model in exact]
            log_mu = sum(mu for _, mu in scores) / size
            assert hypothesis["log_mu"].item() == pytest.approx(log_mu, abs=1e-4)
            if size == 1:
                log_q = scores[0][0]
                assert hypothesis["positional_scores"].sum().item() == pytest.approx(log_q, abs=1e-4)
            else:  # the stock ensemble averages probabilities token by token
                log_q = hypothesis["positional_scores"].sum().item()
            length = len(hypothesis["tokens"]) ** (lenpen if normalize else 0)
            expected.append((log_q + 0.7 * log_mu) / length)
        assert [h["score"].item() for h in candidates] == pytest.approx(expected, abs=1e-4)
        assert expected == pytest.approx(sorted(expected, reverse=True), abs=1e-4)


@pytest.mark.parametrize("energy_step", ["last", "post"])
def test_an_adaptive_softmax_has_the_energies_of_its_head(adaptive, energy_step):
    models = load_model_ensemble([str(adaptive.folder / "checkpoint_last.pt")])[0]
    exact, sample = copy.deepcopy(models[0]).double().eval(), batch(models[0].decoder.dictionary, SENTENCES)
    stock = generator(models, models[0].decoder.dictionary)
    seen = set()
    for source, candidates in zip(sources(sample), EnergyReranker(stock, models, energy_step=energy_step).generate(models, sample)):
        for hypothesis in candidates:
            log_q, log_mu = oracle(exact, source, hypothesis["tokens"], energy_step)
            assert hypothesis["log_mu"].item() == pytest.approx(log_mu, abs=1e-4)
            assert hypothesis["score"].item() == pytest.approx((log_q + log_mu) / len(hypothesis["tokens"]), abs=1e-4)
            seen.update(hypothesis["tokens"].tolist())
    assert max(seen) >= 10 and exact.decoder.adaptive_softmax.cutoff[:2] == [6, 10], "words of every cluster should be said"


def test_reranking_keeps_candidates_and_changes_an_order(models, dictionary):
    sample = batch(dictionary, SENTENCES)
    stock = generator(models[:1], dictionary).generate(models[:1], sample)
    energy = EnergyReranker(generator(models[:1], dictionary), models[:1], weight=5.0).generate(models[:1], sample)
    texts = [[[tuple(h["tokens"].tolist()) for h in candidates] for candidates in side] for side in (stock, energy)]
    assert [sorted(row) for row in texts[0]] == [sorted(row) for row in texts[1]]
    assert texts[0] != texts[1]


def test_weight_zero_is_the_stock_output_even_without_finite_energies(models, dictionary, monkeypatch):
    sample = batch(dictionary, SENTENCES)
    stock = generator(models, dictionary).generate(models, sample)
    monkeypatch.setattr(reranking, "candidate_log_mu", lambda *args, **kwargs: torch.full((20,), math.nan))
    energy = EnergyReranker(generator(models, dictionary), models, weight=0.0).generate(models, sample)
    for before, after in zip(stock, energy):
        for left, right in zip(before, after):
            assert torch.equal(left["tokens"], right["tokens"]) and torch.equal(left["score"], right["score"])
            assert torch.equal(left["positional_scores"], right["positional_scores"])


def test_candidates_without_finite_energy_come_last_and_are_counted(models, dictionary, monkeypatch, caplog):
    sample = batch(dictionary, SENTENCES[:1])
    stock = generator(models, dictionary).generate(models, sample)[0]
    log_mu = torch.tensor([math.inf, 1.0, math.nan, 1.0])
    monkeypatch.setattr(reranking, "candidate_log_mu", lambda *args, **kwargs: log_mu)
    for select in ("best", "resample"):
        reranker = EnergyReranker(generator(models, dictionary), models, select=select)
        for _ in range(2):
            caplog.clear()
            order = [h["tokens"].tolist() for h in reranker.generate(models, sample)[0]]
            assert sorted(order[:2]) == sorted(stock[i]["tokens"].tolist() for i in (1, 3))
            if select == "best":
                assert order[2:] == [stock[i]["tokens"].tolist() for i in (0, 2)]
        assert [r.message for r in caplog.records] == ["the energy of 2 of 4 candidates is not finite (4 so far): they are put last"]


def chi_square(counts, expected):
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected))


def test_resampled_first_candidates_have_the_exact_frequencies(models, dictionary):
    models, draws = models[:1], 3000
    sample = batch(dictionary, ["a b c"] * draws)
    torch.manual_seed(1)
    reranker = EnergyReranker(generator(models, dictionary), models, weight=20.0, select="resample")
    hypotheses = reranker.generate(models, sample)
    log_mu = {tuple(h["tokens"].tolist()): h["log_mu"].item() for h in hypotheses[0]}
    weights = {tokens: math.exp(20 * (mu - max(log_mu.values()))) for tokens, mu in log_mu.items()}
    first = [tuple(candidates[0]["tokens"].tolist()) for candidates in hypotheses]
    counts = [first.count(tokens) for tokens in weights]
    expected = [draws * weight / sum(weights.values()) for weight in weights.values()]
    assert len(counts) == 4
    assert chi_square(counts, expected) < 16.3  # 3 degrees of freedom: exceeded once in 1,000
    assert chi_square(counts, [draws / 4] * 4) > 31  # once in a million: the weights matter


def test_resampling_follows_the_seed_and_leaves_the_global_stream_alone(models, dictionary):
    sample = batch(dictionary, SENTENCES * 10)

    def draw(seed):
        torch.manual_seed(seed)
        reranker = EnergyReranker(generator(models, dictionary), models, select="resample")
        before = torch.get_rng_state()
        hypotheses = reranker.generate(models, sample)
        assert torch.equal(before, torch.get_rng_state())
        return [candidates[0]["tokens"].tolist() for candidates in hypotheses]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("max_logits", [1, 700])
def test_chunks_change_nothing(models, dictionary, max_logits):
    sample = batch(dictionary, SENTENCES)
    hypotheses = generator(models, dictionary).generate(models, sample)
    whole = candidate_log_mu(models, sample["net_input"], hypotheses)
    assert whole.shape == (20,)
    parts = candidate_log_mu(models, sample["net_input"], hypotheses, max_logits=max_logits)
    torch.testing.assert_close(whole, parts)


def test_right_padded_sources_score_the_same(models, dictionary):
    left, right = batch(dictionary, SENTENCES), batch(dictionary, SENTENCES, left_pad=False)
    hypotheses = generator(models, dictionary).generate(models, left)
    scores = [candidate_log_mu(models, sample["net_input"], hypotheses) for sample in (left, right)]
    torch.testing.assert_close(*scores)


def test_sentences_without_candidates_stay_empty(models, dictionary):
    sample = batch(dictionary, SENTENCES[:2])
    stock = generator(models, dictionary)
    found = stock.generate(models, sample)
    stock.generate = lambda *args, **kwargs: [[], found[1]]
    assert [len(candidates) for candidates in EnergyReranker(stock, models).generate(models, sample)] == [0, 4]
    stock.generate = lambda *args, **kwargs: [[], []]
    assert EnergyReranker(stock, models).generate(models, sample) == [[], []]


def test_scoring_is_in_eval_mode_and_restores_every_module(models, dictionary):
    model = copy.deepcopy(models[0])
    sample = batch(dictionary, SENTENCES)
    hypotheses = generator([model], dictionary).generate([model], sample)
    expected = candidate_log_mu([model], sample["net_input"], hypotheses)
    model.train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(candidate_log_mu([model], sample["net_input"], hypotheses), expected)
    assert [module.training for module in model.modules()] == modes


def test_half_precision_models_have_float32_energies(models, dictionary):
    sample = batch(dictionary, SENTENCES)
    hypotheses = generator(models, dictionary).generate(models, sample)
    expected = candidate_log_mu(models, sample["net_input"], hypotheses)
    halves = [copy.deepcopy(model).bfloat16() for model in models]  # float16 needs a GPU in older torch
    log_mu = candidate_log_mu(halves, sample["net_input"], hypotheses)
    assert log_mu.dtype == torch.float32
    torch.testing.assert_close(log_mu, expected, atol=0.1, rtol=0.1)


def test_models_whose_attention_was_told_of_beams(dictionary):
    """BART's cross-attention takes every `beam_size` rows for one source once a generator exists."""
    torch.manual_seed(0)
    sizes = {"layers": 1, "embed_dim": 16, "ffn_embed_dim": 16, "attention_heads": 2}
    names = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sizes.items()}
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    args = SimpleNamespace(**names, max_source_positions=32, max_target_positions=32, share_all_embeddings=True)
    bart_base_architecture(args)
    model = BARTModel.build_model(args, task).eval()
    fresh = copy.deepcopy(model).double()
    sample = batch(dictionary, SENTENCES)
    stock = generator([model], dictionary, beam_size=3, max_len_b=5)
    hypotheses = stock.generate([model], sample)
    beams = [module.beam_size for module in model.modules() if hasattr(module, "beam_size")]
    log_mu = candidate_log_mu([model], sample["net_input"], hypotheses, max_logits=500)
    assert [module.beam_size for module in model.modules() if hasattr(module, "beam_size")] == beams
    flat = [(s, h["tokens"]) for s, candidates in zip(sources(sample), hypotheses) for h in candidates]
    assert log_mu.tolist() == pytest.approx([oracle(fresh, *pair)[1] for pair in flat], abs=1e-4)
    again = stock.generate([model], sample)
    assert [[h["tokens"].tolist() for h in row] for row in again] == [[h["tokens"].tolist() for h in row] for row in hypotheses]


def test_attributes_of_the_stock_generator_show_through(models, dictionary):
    stock = generator(models, dictionary)
    reranker = EnergyReranker(stock, models)
    assert reranker.symbols_to_strip_from_output is stock.symbols_to_strip_from_output
    assert reranker.beam_size == 4
    with pytest.raises(AttributeError):
        reranker.no_such_attribute
    with pytest.raises(AttributeError):
        EnergyReranker.__new__(EnergyReranker).beam_size


def test_warnings_about_settings(models, dictionary, caplog):
    EnergyReranker(generator(models, dictionary), models, select="resample")
    assert "beam candidates are not draws" in caplog.text
    caplog.clear()
    EnergyReranker(generator(models, dictionary, beam_size=1), models)
    assert "--beam 1" in caplog.text
    caplog.clear()
    sampling = generator(models, dictionary, search_strategy=Sampling(dictionary))
    EnergyReranker(sampling, models, select="resample")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_bad_settings_are_named(models, dictionary):
    stock = generator(models, dictionary)
    with pytest.raises(SystemExit, match="--energy-select resample .* --beam 1: give --beam 2"):
        EnergyReranker(generator(models, dictionary, beam_size=1), models, select="resample")
    with pytest.raises(SystemExit, match="--score-reference"):
        EnergyReranker(SimpleNamespace(), models)
    with pytest.raises(SystemExit, match="encoder-decoder"):
        EnergyReranker(stock, [SimpleNamespace(decoder=None)])
