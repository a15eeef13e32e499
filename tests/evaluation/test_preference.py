"""Blinded pairs and the test of preferences, worked by hand."""
import re
from html import unescape
from html.parser import HTMLParser

import pytest

from fairseq_earm.evaluation.ab_page import choose_pairs, page_and_key
from fairseq_earm.evaluation.preference import binomial_p_value, preference

A = [f"alpha says <b>{i}</b> & more words" for i in range(20)]
B = [f"beta says \"{i}\" and other words" for i in range(20)]
PREFIXES = [f"given <script>{i}" for i in range(20)]


def pairs_of(items=8, checks=4, seed=1, a=A, b=B, prefixes=PREFIXES, real=A):
    return choose_pairs(a, b, prefixes, real, items=items, checks=checks, seed=seed)


def test_pairs_are_of_one_line_and_on_either_side():
    pairs = pairs_of()
    systems = [pair for pair in pairs if pair.left_is in "AB"]
    assert len(systems) == 8 and len({pair.line for pair in systems}) == 8
    assert {pair.left_is for pair in systems} == {"A", "B"}
    for pair in systems:
        texts = (A[pair.line], B[pair.line])
        assert (pair.left, pair.right) == (texts if pair.left_is == "A" else texts[::-1])
        assert pair.prefix == PREFIXES[pair.line]


def test_attention_checks_are_real_text_and_its_shuffled_words():
    checks = [pair for pair in pairs_of() if pair.left_is not in "AB"]
    assert len(checks) == 4
    for pair in checks:
        real, shuffled = (pair.left, pair.right) if pair.left_is == "real" else (pair.right, pair.left)
        assert real == A[pair.line] and shuffled != real
        assert sorted(shuffled.split()) == sorted(real.split())
    positions = [number for number, pair in enumerate(pairs_of()) if pair.left_is not in "AB"]
    assert positions != list(range(8, 12)), "checks are mixed in"


def test_no_line_is_both_a_pair_and_a_check():
    """Whoever sees a text a second time no longer compares it with the other one alone."""
    for seed in range(20):
        pairs = pairs_of(items=12, checks=8, seed=seed)
        assert sorted(pair.line for pair in pairs) == list(range(20))
    with pytest.raises(SystemExit, match="--checks 9: only 8 lines outside the pairs"):
        pairs_of(items=12, checks=9)


def test_lines_that_agree_are_left_out():
    b = B[:5] + A[5:]
    pairs = pairs_of(items=5, checks=0, b=b)
    assert sorted(pair.line for pair in pairs) == [0, 1, 2, 3, 4]
    with pytest.raises(SystemExit, match="--items 6: only 5 lines differ"):
        pairs_of(items=6, checks=0, b=b)


def test_bad_files_are_named():
    with pytest.raises(SystemExit, match="the second file has 19 lines and the first file 20"):
        pairs_of(b=B[1:])
    with pytest.raises(SystemExit, match="--prefixes has 3 lines"):
        pairs_of(prefixes=PREFIXES[:3])
    with pytest.raises(SystemExit, match="--checks 4: only 0 lines outside the pairs have 4 different words"):
        pairs_of(real=["too short"] * 20)


class Reader(HTMLParser):
    """Tags with their attributes, and the texts of the choices."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self._inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag == "span"
        if self._inside:
            self.texts.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.texts[-1] += data


def test_the_page_shows_all_texts_escaped_and_nothing_tells_whose_they_are():
    pairs = pairs_of()
    page, key = page_and_key(pairs, "Fish & <chips>")
    read = Reader(page)
    assert read.texts[:-1] == [text for pair in pairs for text in (pair.left, pair.right)]
    assert [tag for tag, _ in read.tags].count("script") == 1 and "b" not in [tag for tag, _ in read.tags]
    assert "Fish &amp; &lt;chips&gt;" in page
    boxes = [attributes for tag, attributes in read.tags if attributes.get("type") == "radio"]
    assert [(int(box["name"]), box["value"]) for box in boxes] == [(i, s) for i in range(12) for s in ("left", "right")]
    assert not re.search(r"real|shuffled|https?:|src=|@import|url\(", unescape(page).replace("shuffled words", ""))
    assert key["items"] == [{"item": i, "line": pair.line, "left": pair.left_is} for i, pair in enumerate(pairs)]
    assert key["page"] in page
    same, other = page_and_key(pairs_of(), "x")[1], page_and_key(pairs_of(seed=2), "x")[1]
    assert same == key and other["page"] != key["page"]


def test_a_text_cannot_pose_as_a_placeholder():
    page, key = page_and_key(pairs_of(items=1, checks=0, a=["{name} {title}"], b=["b"], prefixes=None, real=["x"]), "title")
    assert "{name} {title}" in page and f'page = "{key["page"]}"' in page


@pytest.mark.parametrize("wins, votes, expected", [(0, 0, 1.0), (3, 3, 1 / 8), (2, 3, 4 / 8), (9, 10, 11 / 1024), (0, 10, 1.0)])
def test_binomial_by_hand(wins, votes, expected):
    assert binomial_p_value(wins, votes) == pytest.approx(expected, rel=1e-12)


def test_binomial_of_many_votes():
    # The normal approximation with continuity correction: z = (1050 − 0.5 − 1000) / sqrt(500) = 2.2137.
    assert binomial_p_value(1050, 2000) == pytest.approx(0.01342, abs=2e-5)


# Pairs 0, 2, 3 have A left, right, left; item 1 is a check with the real text on the left, item 4 one with it on the right.
KEY = {"page": "p", "items": [
    {"item": 0, "line": 5, "left": "A"}, {"item": 1, "line": 0, "left": "real"}, {"item": 2, "line": 6, "left": "B"},
    {"item": 3, "line": 7, "left": "A"}, {"item": 4, "line": 2, "left": "shuffled"},
]}


def rater(name, *sides, page="p"):
    answers = {str(item): {"l": "left", "r": "right"}[side] for item, side in enumerate(sides) if side}
    return {"page": page, "rater": name, "answers": answers}


def test_votes_by_hand():
    attentive = rater("ann", "l", "l", "r", "r", "r")  # A, passed, A, B, passed
    hasty = rater("bob", "r", "r", "l", "r", "r")  # fails item 1: three votes for B that do not count
    partial = rater("", "l", "l", None, "l", "r")  # A, passed, open, A, passed
    found = preference([attentive, hasty, partial], KEY)
    assert found == (4, 1, 6 / 32, 2, ["bob"], 1)
    assert preference([attentive, hasty, partial], KEY, allowed_failures=1) == (4, 4, 163 / 256, 3, [], 1)


def test_an_open_check_is_a_failed_one():
    assert preference([rater("ann", "l", None, "r", "r", "r")], KEY).excluded == ["ann"]


def test_answers_that_do_not_fit():
    with pytest.raises(SystemExit, match="answers of ann are to page q, the key is page p's"):
        preference([rater("ann", "l", page="q")], KEY)
    with pytest.raises(SystemExit, match="answers of rater 1 are not what the page writes"):
        preference([{"page": "p", "answers": {"9": "left"}}], KEY)
