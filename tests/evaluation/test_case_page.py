"""The page of single translations: what its HTML says, read back by a parser."""
import re
from html.parser import HTMLParser

import pytest

from fairseq_earm.evaluation.case_page import Case, Piece, Translation, case_page, differences, disagreement, scale_of


class Reader(HTMLParser):
    """Texts of the page's <dd>, the coloured tokens in it as (text, colour, title), underlined words, and what it would load."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.tokens, self.underlined, self.gaps, self.loads = [], [], [], [], [], []
        self.feed(html)
        self.close()
        self.texts = [text.strip() for text in self.texts]

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        loading = ("src", "href", "srcset", "data", "action")
        self.loads += [(tag, name) for name in attributes if name in loading or name.startswith("on")]
        if tag in ("meta", "link", "br"):
            return
        self.open.append((tag, attributes.get("class")))
        if tag == "dd":
            self.texts.append("")
        if (tag, attributes.get("class")) == ("span", "piece") and "title" in attributes:
            self.tokens.append(("", attributes["style"], attributes["title"]))
        if attributes.get("class") == "gap" and "title" in attributes:
            self.gaps.append(attributes.get("title"))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        kinds = [tag for tag, _ in self.open]
        if "details" in kinds or "dd" not in kinds or self.open[-1][1] == "gap":
            return
        if ("span", "piece") in self.open:
            text, *rest = self.tokens[-1]
            self.tokens[-1] = (text + data, *rest)
        if kinds[-1] == "u":
            self.underlined.append(data)
        if kinds[-1] != "small":
            self.texts[-1] += data


def pieces(*columns):
    """(text, energy) of each token and of end-of-sentence; every token has log-probability −½."""
    return [Piece(text, energy, -0.5, text.strip() or "</s>") for text, energy in columns]


def show(*cases, **origins):
    systems = {t.system: "file.pt" for case in cases for t in case.translations}
    return case_page(cases, title="T", chosen="By hand.", origins={**systems, **origins})


def test_differences():
    assert differences("a big dog", "a dog") == ([(2, 5)], {})
    assert differences("a dog runs", "a small dog") == ([(6, 10)], {1: "small"})
    assert differences("x", "a b") == ([(0, 1)], {})
    assert differences("", "a b") == ([], {0: "a b"})
    assert differences("a", "a b c") == ([], {1: "b c"})
    assert differences("b", "a b") == ([], {0: "a"})


def test_disagreement():
    assert disagreement(["a b"]) == disagreement(["a b", "a b", "a  b"]) == 0
    assert disagreement(["a b", "c"]) == 1
    assert disagreement(["a b", "a c", "a b"]) == pytest.approx((0.5 + 0 + 0.5) / 3)


def test_colours_are_energies_from_each_models_mean():
    """Means 2 and −10; 20 of all 22 distances are 1, so that the scale ends near there and the two of 5 are beyond it."""
    even = [(" w", 1.0), (" w", 3.0)] * 5
    same = Translation("M", "w" + " w" * 9, pieces(("w", 1.0), *even[1:]))
    far = Translation("N", "u v", pieces(("u", -15.0), (" v", -5.0)))
    cases = [Case(0, "s", "w", [same, far]), Case(4, "s", "w", [same])]
    scale = scale_of(cases)
    assert scale.means == {"M": pytest.approx(2.0), "N": pytest.approx(-10.0)}
    assert 1 < scale.limit < 5
    html = show(*cases)
    tokens = Reader(html).tokens
    half = f"{0.5 / scale.limit:.3f}"
    assert tokens[0] == ("w", f"background:rgba(0,114,178,{half})", "w: energy 1.000, −1.000 from the mean")
    assert tokens[1] == ("w", f"background:rgba(230,159,0,{half})", "w: energy 3.000, +1.000 from the mean")
    assert tokens[10] == ("u", "background:rgba(0,114,178,0.500)", "u: energy −15.000, −5.000 from the mean")
    assert tokens[11] == ("v", "background:rgba(230,159,0,0.500)", "v: energy −5.000, +5.000 from the mean")
    assert scale.colour(0.0).endswith(",0.000)") and scale.colour(scale.limit) == "rgba(230,159,0,0.500)"
    assert f"−{scale.limit:.2f}" in html and f"+{scale.limit:.2f}" in html


def test_figures_can_be_read_without_colours():
    row = pieces(("a", 1.25), (" b", -0.5), ("", 2.5))
    html = show(Case(0, "s", "a b", [Translation("M", "a b", row)]))
    assert "3 tokens, log q −1.50, log μ −2.500" in html
    cells = re.findall(r"<tr><th[^>]*>(.*?)</th>" + r"<td[^>]*>(.*?)</td>" * 3 + "</tr>", html)
    assert ("b", "−0.500", "−1.583", "−0.500") in cells and ("&lt;/s&gt;", "2.500", "+1.417", "−0.500") in cells


def test_the_step_after_the_last_token_is_no_token():
    row = [*pieces(("a", 1.0), ("", 2.0)), Piece("", 7.0, None, "after it")]
    html = show(Case(0, "s", "a", [Translation("M", "a", row)]))
    assert "2 tokens, log q −1.00, log μ −7.000" in html
    assert Reader(html).tokens[-1][0].strip() == "after it"


def test_pieces_of_a_word_stand_together_and_differences_are_underlined():
    row = pieces(("un", 1.0), ("known", 2.0), (" dog", 3.0), ("s", 1.0), ("", 0.0))
    reader = Reader(show(Case(0, "s", "unknown big dog .", [Translation("M", "unknown dogs", row)])))
    assert reader.texts == ["s", "unknown big dog .", "unknown dogs"]
    assert [text.strip() for text, *_ in reader.tokens] == ["un", "known", "dog", "s", "</s>"]
    assert reader.underlined == ["dog", "s"]


def test_words_left_out_have_a_sign():
    plain = Reader(show(Case(0, "s", "a b c d", [Translation("M", "b d"), Translation("N", ""), Translation("O", "a b")])))
    assert plain.gaps == ["left out: a", "left out: c", "left out: a b c d", "left out: c d"]
    assert plain.texts[2:] == ["b d", "", "a b"] and plain.underlined == []


HOSTILE = ["<b>", "&", "&lt;", '"', "'", "</dd>", "<script>alert(1)</script>", "{body}", "<img/src=http://x>"]


def test_nothing_in_a_text_is_taken_for_html():
    """Tokens, words, names and files come back as they were, and nothing is left open."""
    text, name = " ".join(HOSTILE), '<i>"M" & co</i>'
    row = pieces(*((" " * (place > 0) + token, 1.0 + place) for place, token in enumerate(HOSTILE)), ("", 0.0))
    case = Case(0, text, f"{text} <left> out", [Translation(name, text, row), Translation("<N>", text)])
    html = case_page([case], title="<T> & {style}", chosen="<chosen>", origins={name: "a<b>.pt", "<N>": "c&d"})
    reader = Reader(html)
    assert reader.open == [] and reader.loads == []
    assert reader.texts == [text, f"{text} <left> out", text, text]
    assert [token.strip() for token, *_ in reader.tokens] == [*HOSTILE, "</s>"]
    assert "left out: <left> out" in reader.gaps
    assert "<script" not in html and "<img" not in html and "&lt;chosen&gt;" in html and "a&lt;b&gt;.pt" in html


def test_the_page_needs_nothing_else():
    html = show(Case(0, "s", "a", [Translation("M", "a", pieces(("a", 1.0), ("", 2.0)))]))
    assert html.startswith("<!DOCTYPE html>") and Reader(html).loads == []
    assert not re.search(r"https?:|<script|<link|url\(|@import", html)


def test_without_energies_there_is_no_legend():
    html = show(Case(3, "s", "a b", [Translation("N", "a c")]))
    assert "nats from the mean" not in html and "Sentence 3" in html and Reader(html).underlined == ["c"]
