"""Pages are whole, escape what is put into them, and need nothing else."""
import base64
import hashlib
from html.parser import HTMLParser

import pytest

from fairseq_earm.evaluation.page import Html, figure, page, table

PNG = b"\x89PNG\r\n\x1a\nrest"
HOSTILE = '<b>"&\'</script><script>alert(1)</script>'


class Parsed(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def test_a_page_escapes_its_title_and_is_whole():
    parsed = Parsed(page(HOSTILE, "<p>{title} {style}</p>", ".mine { color: red; }"))
    assert parsed.named("b") == parsed.named("script") == []
    assert parsed.text.count(HOSTILE) == 2
    assert "{title} {style}" in parsed.text
    assert ".mine" in parsed.text
    assert "default-src 'none'" in str(parsed.named("meta"))


def test_the_page_names_the_one_script_that_runs():
    script = '"use strict";\nconst ä = "{title} {policy}";'
    content = page("x", HOSTILE, script=script)
    written = content.split("<script>")[-1].split("</script>")[0]
    assert written == script and content.count("<script>") == 2
    digest = base64.b64encode(hashlib.sha256(written.encode()).digest()).decode()
    policy = Parsed(page("x", "", script=script)).named("meta")[-1]["content"]
    assert policy.startswith("default-src 'none'; ") and policy.endswith(f"; script-src 'sha256-{digest}'")
    assert "script" not in page("x", "")


def test_a_table_escapes_cells_but_not_html():
    parsed = Parsed(table(["run", HOSTILE], [["a", HOSTILE], ["b", Html("<i>1</i>")]], caption=HOSTILE))
    assert parsed.named("script") == [] and len(parsed.named("i")) == 1
    assert parsed.text.count(HOSTILE) == 3
    assert len(parsed.named("th")) == 4 and len(parsed.named("td")) == 2


@pytest.mark.parametrize("cells, right", [
    (["1", "−2.5", "1,000"], True), (["1.0 ± 0.2", "-", "3e-4"], True), (["+1.2 [0.1, 2.3]", "", "9 (5 %)"], True),
    (["1", "two", "3"], False), (["", "", ""], False),
])
def test_columns_of_numbers_stand_to_the_right(cells, right):
    parsed = Parsed(table(["run", "x"], [["2", cell] for cell in cells]))
    assert {"class": "number"} in parsed.named("td") if right else all(not a for a in parsed.named("td"))
    assert all("class" not in attributes for attributes in parsed.named("th")[2:])


def test_an_empty_table_keeps_its_header():
    assert len(Parsed(table(["a", "b"], [])).named("th")) == 2


def test_pictures_are_in_the_page():
    image = Parsed(figure(PNG, HOSTILE)).named("img")[0]
    assert base64.b64decode(image["src"].split("base64,")[1]) == PNG
    assert image["alt"] == HOSTILE
    drawn = figure(b'<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg width="1"><g/></svg>\n', Html("<i>one &amp; two</i>"))
    assert "<?xml" not in drawn and "DOCTYPE" not in drawn
    assert Parsed(drawn).named("svg") == [{"role": "img", "aria-label": "one & two", "width": "1"}]
    with pytest.raises(ValueError, match="neither"):
        figure(b"GIF89a", "no")
