"""The benchmarks run, and what they compare is the same work."""
import json
import logging
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))

import growth  # noqa: E402
import loss_head  # noqa: E402
import models  # noqa: E402
import operators  # noqa: E402
import rivals  # noqa: E402
import run  # noqa: E402
import stages  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402
import update  # noqa: E402
import ways  # noqa: E402
from floor import MatrixProducts  # noqa: E402

from fairseq_earm.ebm import products  # noqa: E402
from fairseq_earm.ebm.products import bf16_helps  # noqa: E402
from fairseq_earm.sampling.ancestral import AncestralSampler  # noqa: E402
from fairseq_earm.sampling.scoring import score_sequences  # noqa: E402
from fairseq_earm.sampling.transformer_steps import TransformerSteps  # noqa: E402
from tests.tiny_model import tiny_model  # noqa: E402

VOCABULARY, LENGTH = 60, 5


@pytest.fixture
def table(monkeypatch, capsys, tmp_path):
    """Runs one table with given sizes and returns its figures, which are printed too, and kept."""
    threads = torch.get_num_threads()

    def measure(name, *flags, **sizes):
        kept = tmp_path / "figures.json"
        given = [word for size, value in sizes.items() for word in ("--with", f"{size}={json.dumps(value)}")]
        monkeypatch.setattr(sys, "argv", ["run.py", name, "--rounds", "1", "--json", str(kept), *map(str, flags), *given])
        run.main()
        printed, rows = capsys.readouterr().out, json.loads(kept.read_text())["tables"][name]
        assert printed.splitlines()[0] == f"## {run.TABLES[name].title}"
        assert len([line for line in printed.splitlines() if line.startswith("| ")]) == 2 + len(rows)
        assert all(set(row) <= set(run.TABLES[name].columns) for row in rows)
        return rows

    yield measure
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@pytest.mark.skipif(not bf16_helps(timing.device()), reason="this machine does not multiply in bfloat16")
def test_bf16(table, monkeypatch):
    monkeypatch.setattr(products, "LEAST", 1)
    exact, quick = table("bf16", sizes=["small"], vocabulary=VOCABULARY, batch=3, length=LENGTH, negatives=20)
    assert (exact["products"], quick["products"]) == ("float32", "bfloat16")
    assert exact["largest"] < 1e-4 < quick["largest"] < 0.5
    assert abs(quick["KL a token"]) < 0.01 and quick["±"] < 0.01


def test_operators(table):
    rows = table("operators", sizes=["small"], vocabulary=VOCABULARY, batch=3, length=LENGTH)
    assert [row["sampler"] for row in rows] == ["fairseq", "E-ARM, fairseq's steps", "E-ARM"]
    for row in rows:
        assert sum(row[kind] for kind in [*operators.KINDS, operators.REST]) == pytest.approx(row["all"])
        assert all(row[kind] > 0 for kind in ("products with weights", "attention", "drawing"))
    assert [operators.kind(name) for name in ("aten::addmm", "aten::bmm", "aten::multinomial", "aten::copy_", "aten::add")] == [
        *operators.KINDS, operators.REST
    ]
    assert TransformerSteps.knows(tiny_model().decoder)


def test_updates(table, tiny):
    trained = ["--checkpoint", tiny.a, "--data", tiny.data]
    rows = table("update", *trained, cases=[["small", VOCABULARY, 40]], length=LENGTH, negatives=2)
    names = ["cross-entropy", "E-ARM", "E-ARM, drawn at once"]
    assert [(row["model"], row["update"]) for row in rows] == [(model, name) for model in ("small", "trained") for name in names]
    for row in rows:
        assert ("sampling" in row) == (row["update"] != "cross-entropy")
        assert sum(row.get(stage, 0) for stage in update.STAGES) == pytest.approx(row["seconds"], rel=0.2)


def test_ways_to_train(table):
    rows = table("ways", cases=[["small", VOCABULARY, 40]])
    assert [row["update"] for row in rows] == list(ways.WAYS)
    assert rows[0]["of cross-entropy's"] == 1 and all(row["seconds"] > 0 for row in rows)


def test_samplers(table, tiny):
    trained = ["--checkpoint", tiny.a, "--data", tiny.data]
    rows = table("sampler", *trained, sizes=["small"], vocabulary=VOCABULARY, batches=[3], length=LENGTH, mean=3)
    assert [row["length"] for row in rows if row["sampler"] == "E-ARM"] == ["5", "about 3", "natural"]
    assert {row["of the floor"] for row in rows if row["sampler"] == "matrix products alone"} == {1}
    assert all(row["tokens/s"] > 0 for row in rows)


def test_reranking_and_joint_generation(table):
    rows = table("reranking", sizes=["small"], vocabulary=VOCABULARY, batch=3, beam=2, length=LENGTH, starts=2, candidates=4)
    assert [(row["candidates"], row["generator"]) for row in rows] == [
        (6, "fairseq"), (6, "reranked by energy"), (6, "energies of known candidates"), (8, "base alone"), (8, "drawn by energy"),
    ]


def test_continuations(table):
    rows = table("offline", cases=[["small", VOCABULARY, 3, 2]], prefix=4, length=LENGTH)
    assert [(row["sampler"], row["rows"]) for row in rows] == [("fairseq", 6), ("fairseq-earm-sample", 6)]


def test_growth_and_its_plot(table, tmp_path):
    base = {"length": LENGTH, "vocabulary": VOCABULARY, "batch": 2, "negatives": 1}
    rows = table("growth", "--plots", tmp_path / "plots", grows={"length": [4, 6], "negatives": [1, 2]}, base=base)
    assert [(row["grows"], row["value"]) for row in rows] == [("length", 4), ("length", 6), ("negatives", 1), ("negatives", 2)]
    assert (tmp_path / "plots" / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert growth.MEANING.keys() == growth.BASE.keys() == growth.QUICK.keys() == growth.FULL.keys()


def test_loss_heads(table):
    rows = table("loss_head", tokens=20, vocabularies=[30], dim=4, block=8)
    assert [row["loss head"] for row in rows] == [
        "fairseq, from logits", "one gradient buffer", "fairseq, from states", "one gradient buffer", "8 rows at once",
    ]
    assert [row["time of fairseq's"] for row in rows if row["loss head"].startswith("fairseq")] == [1, 1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["samplers"], "no table 'samplers': there are update, ways, sampler"),
        (["sampler", "--data", "x"], "--checkpoint and --data go together"),
        (["--with", "length=3"], "--with goes with one table"),
    ],
)
def test_flags_that_cannot_be(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    with pytest.raises(SystemExit):
        run.main()
    assert message in capsys.readouterr().err


def test_every_loss_head_has_the_same_loss():
    torch.manual_seed(1)
    hidden, weight, target = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
    logits = hidden @ weight.T
    expected = loss_head.fairseqs(logits, target)
    found = [
        loss_head.ours(loss_head.token_statistics(logits, target), 9),
        loss_head.ours(loss_head.projected_statistics(hidden, weight, target, rows=4), 9),
    ]
    torch.testing.assert_close(found, [expected, expected])


def test_lengths_are_what_a_model_was_made_for():
    torch.manual_seed(1)
    endless, ending = (models.translation_model("small", 500, **length) for length in ({}, {"length": 6}))
    symbols = models.symbols_of(endless)
    sampler, net_input = AncestralSampler(symbols, max_len_a=0, max_len_b=40), models.sources(endless, 100, LENGTH)
    assert sampler(endless, net_input).truncated.all()
    assert sampler(ending, net_input).mask.sum(1).float().mean() == pytest.approx(6, abs=2)


def test_a_batch_has_about_as_many_tokens_as_asked_for():
    symbols = models.dictionary(VOCABULARY)
    batch = models.parallel_batch(symbols, 4000, 20)
    assert len(symbols) == VOCABULARY
    assert batch["ntokens"] == int(batch["target"].ne(symbols.pad()).sum()) == pytest.approx(4000, rel=0.05)
    previous, target = batch["net_input"]["prev_output_tokens"], batch["target"]
    assert (previous[:, 0] == symbols.eos()).all()
    inside = previous[:, 1:].ne(symbols.pad())
    assert torch.equal(previous[:, 1:][inside], target[:, :-1][inside])
    assert int(inside.sum()) == batch["ntokens"] - len(target)


def test_the_floor_has_all_products_and_no_others():
    flop_counter = pytest.importorskip("torch.utils.flop_counter")
    model = models.translation_model("small", VOCABULARY)
    dim, ffn, layers, sources, length, alive = 128, 512, 2, 3, 4, [6, 6, 4, 1]
    once = 3 * dim**2 + 2 * length * dim + dim**2 + 2 * dim * ffn  # of a token and a layer of the encoder
    expected = sources * length * layers * (once + 2 * dim**2)
    for step, rows in enumerate(alive, start=1):
        full = 2 * (rows // 2)  # two rows read the same source
        layer = rows * (3 * dim**2 + 2 * step * dim + 3 * dim**2 + 2 * dim * ffn) + full * 2 * length * dim
        expected += layers * layer + rows * dim * VOCABULARY
    products = MatrixProducts(model, sources, length, alive)
    with flop_counter.FlopCounterMode(display=False) as counter:
        assert products() == sum(alive)
    assert counter.get_total_flops() == 2 * expected


def test_hugging_faces_model_says_what_fairseqs_says():
    pytest.importorskip("transformers")
    model = models.translation_model("small", VOCABULARY, length=4)
    assert rivals.is_marian(model)
    net_input = models.sources(model, 4, LENGTH)
    read = torch.randint(4, VOCABULARY, (4, 3))
    expected = model(**net_input, prev_output_tokens=read)[0]
    pad = models.symbols_of(model).pad()
    tokens = net_input["src_tokens"]
    found = rivals.marian_model(model)(tokens, attention_mask=tokens.ne(pad).long(), decoder_input_ids=read).logits
    assert found[..., pad].isneginf().all()
    words = torch.arange(VOCABULARY) != pad
    torch.testing.assert_close(found[..., words], expected[..., words], atol=1e-4, rtol=0)


def test_ctranslate2s_model_says_what_fairseqs_says():
    pytest.importorskip("ctranslate2")
    model = models.translation_model("small", VOCABULARY, length=4)
    net_input, symbols = models.sources(model, 4, LENGTH), models.symbols_of(model)
    target = torch.randint(symbols.nspecial, VOCABULARY, (4, 3))
    tokens = torch.cat([target, torch.full((4, 1), symbols.eos())], 1)
    expected = score_sequences(model, net_input, tokens, torch.ones_like(tokens, dtype=torch.bool)).log_q
    translator = rivals.translator(model, threads=1, device="cpu")
    written = [[symbols[token] for token in row] for row in target.tolist()]
    found = translator.score_batch(rivals.written(symbols, net_input["src_tokens"]), written)
    torch.testing.assert_close(torch.tensor([score.log_probs for score in found]), expected, atol=1e-4, rtol=0)


def test_a_stage_is_without_those_inside_it(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(stages, "now", lambda: next(clock))

    class Work:
        def outer(self):
            return self.inner() + self.inner()

        def inner(self):
            return 1

    work, found = Work(), stages.Stages()
    found.watch(work, "outer", "outside")
    found.watch(work, "inner", "inside")
    for _ in range(2):
        found.begin()
        assert work.outer() == 2
    assert found.medians(2) == {"inside": 2, "outside": 3}  # five ticks from its begin to its end


def test_ratios_are_for_one_thing_where_things_are_counted(monkeypatch):
    seconds = {"slow": 4.0, "fast": 2.0, "half": 2.0}
    made = {"slow": 8, "fast": 8, "half": 4}
    monkeypatch.setattr(timing, "peak_memory", lambda variant: 0.0)
    monkeypatch.setattr(timing, "_time", lambda variant: (seconds[variant()], made[variant()]))
    costs = timing.compare({name: lambda name=name: name for name in seconds}, rounds=3)
    assert [(cost.rate, cost.ratio) for cost in costs.values()] == [(2, 1), (4, 0.5), (2, 1)]
    made.update(dict.fromkeys(made))
    costs = timing.compare({name: lambda name=name: name for name in seconds}, rounds=3)
    assert [cost.ratio for cost in costs.values()] == [1, 0.5, 0.5]
    assert all(math.isnan(cost.rate) for cost in costs.values())


def test_a_missing_figure_is_a_dash():
    shown = tables.show(tables.Table("Title", {"a": "", "b": ".1f"}, None), [{"a": "x"}, {"a": "y", "b": 0.25}], tables.Setting())
    assert shown.splitlines()[-2:] == ["| x | - |", "| y | 0.2 |"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the process's memory")
def test_memory_is_what_a_call_holds_at_most():
    def hold_and_free():
        for _ in range(3):
            torch.ones(2**24)  # 64 MB, freed before the next

    assert timing.peak_memory(hold_and_free) == pytest.approx(64, abs=16)
