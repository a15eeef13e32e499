"""Pages of HTML show hostile text as text, wherever it stands."""
import re
from pathlib import Path

import pytest

from fairseq_earm.cli.common import write_text
from fairseq_earm.evaluation.ab_page import Pair, page_and_key
from fairseq_earm.evaluation.case_page import Case, Piece, Translation, case_page
from fairseq_earm.evaluation.page import Html, figure, page, printable, table
from fairseq_earm.evaluation.run_folder import Checkpoint, Run
from fairseq_earm.evaluation.samples_of_runs import Sample
from fairseq_earm.evaluation.score_tables import Table
from tests.evaluation.test_page import Parsed

# Ends of whatever it may stand in, a script, text that turns around, a null byte, a bell, half of a surrogate pair, a placeholder.
VISIBLE = '"\'&</td></title></svg>--><!-- <script>alert(1)</script><img src=x onerror=alert(1)> \u202eabc {title}{body}{sections} javascript:'
HOSTILE = VISIBLE + "\0\a\x1b\x9b\ud800\uffff"
SHOWN = VISIBLE + "\ufffd" * 6
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><g/></svg>'


def said(text, scripts=0):
    """All text of a page that runs nothing, and the values of its attributes."""
    text.encode("utf-8")
    assert not re.search("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text)
    parsed = Parsed(text)
    assert len(parsed.named("script")) == scripts and len(parsed.named("img")) == 0
    names = {name for _, attributes in parsed.tags for name in attributes}
    assert not any(name.startswith("on") for name in names) and not names & {"src", "href"}
    values = " ".join(str(value) for _, attributes in parsed.tags for value in attributes.values())
    return parsed.text, values


def test_every_part_of_a_page():
    body = table([HOSTILE, HOSTILE], [[HOSTILE, HOSTILE], [HOSTILE, 1]], caption=HOSTILE) + figure(SVG, HOSTILE)
    text, values = said(page(HOSTILE, body, ".x { color: red; }"))
    assert text.count(SHOWN) == 2 + 2 + 3 + 1 + 1
    assert values.count(SHOWN) == 1  # the figure's alternative text


def test_a_caption_that_is_html_is_plain_in_the_alternative_text():
    text, values = said(page("x", figure(SVG, Html("<b>&lt;script&gt;</b>"))))
    assert "<script>" in text and "<script>" in values and "<b>" not in values


def test_a_page_of_cases():
    pieces = [Piece(HOSTILE, 1.0, -1.0, HOSTILE), Piece("", 2.0, None, HOSTILE)]
    cases = [Case(0, HOSTILE, f"some more {HOSTILE} left out", [Translation(HOSTILE, HOSTILE, pieces), Translation("other", HOSTILE)])]
    text, values = said(case_page(cases, title=HOSTILE, chosen=HOSTILE, origins={HOSTILE: HOSTILE, "other": HOSTILE}))
    plain = re.sub("‸", "", text)
    assert plain.count(SHOWN) >= 2 + 1 + 3 + 2 + 1 + 2
    assert SHOWN in values


def test_a_page_to_choose_from():
    pairs = [Pair(0, HOSTILE, HOSTILE, HOSTILE, "A"), Pair(1, "", HOSTILE, "x", "B")]
    content, key = page_and_key(pairs, HOSTILE)
    text, values = said(content, scripts=1)
    assert text.count(SHOWN) == 2 + 3 + 1 and key["page"] in text
    assert HOSTILE not in str(key)


def hostile_run(folder):
    record = {"num_updates": 3.0, "epoch": 1.0, "loss": 2.0, "nll_loss": 1.5, HOSTILE: 1.0, "earm_loss": float("nan"), "earm_dv": float("inf")}
    history = {"train_inner": [record, {**record, "num_updates": 4.0}], "train": [record], HOSTILE: [record], "valid": [record]}
    settings_ = {HOSTILE: HOSTILE, "arch": HOSTILE, "task": HOSTILE, "criterion": HOSTILE, "data": HOSTILE, "earm_weight": HOSTILE, "lr": [HOSTILE]}
    facts = {name: HOSTILE for name in ("parameters", "devices", "gpu", "model", "criterion", "begun", "ended")}
    checkpoint = Checkpoint(folder / HOSTILE.replace("\0", "").replace("/", ""), settings_, 3, None)
    return Run(HOSTILE, folder, [Path(HOSTILE)], history, facts, checkpoint, [], [], [], [HOSTILE])


def test_a_report(tmp_path):
    pytest.importorskip("matplotlib")
    from fairseq_earm.evaluation.report_page import report_page

    runs = [hostile_run(tmp_path), hostile_run(tmp_path)._replace(name="other")]
    sample = Sample(0, HOSTILE, HOSTILE, {HOSTILE: HOSTILE})
    content = report_page(
        runs, title=HOSTILE, results=[(HOSTILE, [Table(HOSTILE, [HOSTILE, "x"], [[HOSTILE, HOSTILE]])])], unknown=[HOSTILE],
        samples=[(HOSTILE, [sample])], notes=[HOSTILE],
    )
    text, _ = said(content)
    assert text.count(SHOWN) > 40


def test_a_page_and_a_table_of_such_text_can_be_written(tmp_path):
    path = tmp_path / "page.html"
    write_text(str(path), HOSTILE)
    assert path.read_text(encoding="utf-8").startswith(VISIBLE)


@pytest.mark.parametrize("kept", ["ä 数据 \U0001f600 \t\r\n", "\u202eright to left\u202c", "\u200f"])
def test_other_text_stays(kept):
    assert printable(kept) == kept
