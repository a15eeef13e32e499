"""fairseq-earm-analyse cases on trained models, against fairseq-generate and scores of whole sequences."""
import re

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data.data_utils import post_process

from fairseq_earm.cli import analyse
from fairseq_earm.cli.case_study import added_texts
from fairseq_earm.sampling.scoring import score_sequences
from tests.evaluation.test_case_page import Reader
from tests.tiny_translation import generate, tagged

FIGURES = re.compile(r"(\d+) tokens, log q (−?[\d.]+), log μ (−?[\d.]+)")


def cases(tiny, path, *arguments, models=(("A", "a"), ("B", "b"))):
    named = [item for name, which in models for item in ("--model", name, getattr(tiny, which))]
    analyse.main([str(item) for item in ("cases", tiny.data, *named, "--output", path, "--cpu", *arguments)])
    return path.read_text()


def sections(html):
    """Number of a sentence → its part of the page."""
    parts = re.split(r"<h2>Sentence (\d+)</h2>", html)
    return dict(zip(map(int, parts[1::2]), (part.split("</section>")[0] for part in parts[2::2])))


def number(text):
    return float(text.replace("−", "-"))


def translations(tiny, model):
    """What fairseq-generate prints: number → (text, its tokens with end-of-sentence)."""
    printed = tagged(generate(tiny, "--beam", 3, "--max-len-b", 200, models=model), "H")
    dictionary = load(tiny, model).decoder.dictionary
    texts = {index: lines[0].split("\t")[1] for index, lines in printed.items()}
    return {index: (text, dictionary.encode_line(text, add_if_not_exist=False).long()) for index, text in texts.items()}


def load(tiny, model):
    return checkpoint_utils.load_model_ensemble([str(getattr(tiny, model))])[0][0].eval()


@pytest.mark.parametrize("step", ["last", "post"])
def test_texts_and_figures(tiny, tmp_path, capsys, step):
    html = cases(tiny, tmp_path / "page.html", "--ids", 6, 2, "--beam", 3, "--energy-step", step)
    assert "2 sentences of test, numbered from 0, chosen by hand" in html and "2 sentences of test" in capsys.readouterr().out
    sources, references = ((tiny.folder / f"test.{side}").read_text().splitlines() for side in ("src", "tgt"))
    found = sections(html)
    assert list(found) == [2, 6]
    for index, section in found.items():
        figures = FIGURES.findall(section)
        expected = {model: translations(tiny, model)[index] for model in "ab"}
        assert Reader(section).texts == [sources[index], references[index], expected["a"][0], expected["b"][0]]
        for model, (tokens, log_q, log_mu) in zip("ab", figures):
            network, target = load(tiny, model), expected[model][1].unsqueeze(0)
            source = network.encoder.dictionary.encode_line(sources[index], add_if_not_exist=False).long().unsqueeze(0)
            inputs = {"src_tokens": source, "src_lengths": torch.tensor([source.size(1)])}
            scores = score_sequences(network, inputs, target, torch.ones_like(target, dtype=torch.bool), energy_step=step)
            assert int(tokens) == target.numel()
            assert number(log_q) == pytest.approx(scores.log_q.sum().item(), abs=0.006)
            assert number(log_mu) == pytest.approx(scores.log_mu.item(), abs=0.0006)
    colours = Reader(html).tokens
    assert len(colours) == sum(int(row[0]) + (step == "post") for row in FIGURES.findall(html))
    assert len({colour for _, colour, _ in colours}) > 3


def test_the_sentences_that_systems_differ_on_are_chosen(tiny, tmp_path):
    texts = {index: text for index, (text, _) in translations(tiny, "a").items()}
    lines = [f"{texts[i]}" if i not in (1, 4) else "<b> & nothing of it" for i in range(7)]
    (tmp_path / "other.txt").write_text("".join(line + "\n" for line in lines))
    other = ["--system", "Other", tmp_path / "other.txt", "--beam", 3]
    html = cases(tiny, tmp_path / "page.html", *other, "--sentences", 2, models=[("A", "a")])
    assert list(sections(html)) == [1, 4] and "&lt;b&gt;" in html and "<b>" not in html
    assert "Out of 7 sentences of test" in html and "differ the most" in html
    assert "<b> & nothing of it" in Reader(html).texts
    drawn = [*other, "--sentences", 3, "--choose", "random"]
    seeds = [cases(tiny, tmp_path / "page.html", *drawn, "--seed", seed, models=[("A", "a")]) for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] and "3 sentences of test, numbered from 0, drawn at random (seed 1)" in seeds[0]
    assert list(sections(seeds[0])) != list(sections(seeds[2]))


def test_output_of_generate_as_another_system(tiny, tmp_path):
    (tmp_path / "b.out").write_text(generate(tiny, "--beam", 3, "--max-len-b", 200, models="b"))
    other = ["--system", "printed", tmp_path / "b.out"]
    html = cases(tiny, tmp_path / "page.html", "--ids", 0, 3, "--beam", 3, *other, models=[("B", "b")])
    for section in sections(html).values():
        *_, own, printed = Reader(section).texts
        assert own == printed


def test_pieces_are_joined(tiny, tmp_path):
    """By fairseq's `letter`, which joins all of this text to one word."""
    html = cases(tiny, tmp_path / "page.html", "--ids", 5, "--beam", 3, "--post-process", "letter", models=[("A", "a")])
    source, reference, own = Reader(html).texts
    text, tokens = translations(tiny, "a")[5]
    assert own == text.replace(" ", "")
    assert reference == (tiny.folder / "test.tgt").read_text().splitlines()[5].replace(" ", "")
    assert len(Reader(html).tokens) == len(tokens) > 2


@pytest.mark.parametrize(
    "symbol,pieces",
    [
        ("@@ ", ["un@@", "known", "dog@@", "s", "."]),
        ("sentencepiece", ["\u2581un", "known", "\u2581", "dogs", "\u2581.", "\u2581a"]),
        ("_EOW", ["un", "known_EOW", "dogs_EOW"]),
        (None, ["un@@", "known", "dogs"]),
    ],
)
def test_added_texts_are_the_text_in_a_row(symbol, pieces):
    added = added_texts(pieces, symbol)
    assert len(added) == len(pieces) and "".join(added) == post_process(" ".join(pieces), symbol)
    assert added[:2] == (["un", "known"] if symbol else ["un@@", " known"])


def test_mistakes_get_one_line(tiny, text, tmp_path):
    (tmp_path / "short.txt").write_text("one\n")
    page = tmp_path / "page.html"
    for arguments, message in (
        (["--sentences", 0], "--sentences 0: give 1 or more"),
        (["--ids", 7], "--ids 7: test has sentences 0 to 6"),
        (["--system", "A", tmp_path / "short.txt"], "two systems have this name"),
        (["--system", "S", tmp_path / "short.txt"], "--system S .*short.txt has 1 sentences, and test of .* has 7"),
        (["--system", "S", tmp_path / "none.txt"], "none.txt cannot be read"),
        (["--model", "C", text.base], "--model C .*: not a checkpoint"),
    ):
        with pytest.raises(SystemExit, match=message):
            cases(tiny, page, *arguments)
    with pytest.raises(SystemExit, match="--output .*: there is no such folder"):
        cases(tiny, tmp_path / "none" / "page.html")
    with pytest.raises(SystemExit, match="--output .* cannot be written"):
        cases(tiny, tmp_path, "--ids", 0)
    assert not page.exists()
