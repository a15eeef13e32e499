from types import SimpleNamespace

import pytest
from fairseq.tasks import FairseqTask

from fairseq_earm.evaluation.generated import Generated, is_generated, read_generated, text_lines
from tests.tiny_translation import generate, tagged

PRINTED = """\
2024-01-01 | INFO | a line of the log
S-1\tx y
T-1\ta b\u2028c
H-1\t-0.5\ta b
D-1\t-0.5\tA b.
P-1\t-1.0 -1.0
H-1\t-0.6\tworse
D-1\t-0.6\tworse
S-0\tz
T-0\t
H-0\t-0.1\t
D-0\t-0.1\t
Generate test with beam=5: BLEU4 = 1.00
"""


def write(folder, text):
    path = folder / "printed"
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def test_best_hypotheses_in_the_order_of_sentences(tmp_path):
    expected = Generated(["z", "x y"], ["", "a b\u2028c"], ["", "a b"], ["", "A b."])
    assert read_generated(write(tmp_path, PRINTED)) == expected
    assert read_generated(write(tmp_path, PRINTED.replace("\n", "\r\n"))) == expected


def test_output_of_fairseq_generate(tiny, tmp_path):
    printed = generate(tiny, "--beam", 3, "--nbest", 2)
    path = write(tmp_path, printed)
    assert is_generated(text_lines(path))
    found = read_generated(path)
    assert len(found.hypotheses) == len(tagged(printed, "T")) > 5
    for sentence, lines in tagged(printed, "D").items():
        assert found.detokenised[sentence] == found.hypotheses[sentence] == lines[0].split("\t")[1]
        assert [found.references[sentence]] == tagged(printed, "T")[sentence]
        assert [found.sources[sentence]] == tagged(printed, "S")[sentence]


def test_t_lines_are_detokenised_as_d_lines_are(tiny, tmp_path, monkeypatch):
    without_spaces = SimpleNamespace(decode=lambda text: text.replace(" ", ""))
    monkeypatch.setattr(FairseqTask, "build_tokenizer", lambda *_: without_spaces)
    printed = generate(tiny, "--beam", 1)
    found = read_generated(write(tmp_path, printed))
    assert any(" " in text for text in found.hypotheses)
    assert not any(" " in text for text in found.detokenised + found.references + found.sources)


def test_output_without_sources_and_references(tmp_path):
    text = "".join(line for line in PRINTED.splitlines(keepends=True) if line[0] not in "ST")
    assert read_generated(write(tmp_path, text)) == Generated(None, None, ["", "a b"], ["", "A b."])


def test_plain_text_is_no_output(tmp_path):
    path = write(tmp_path, "A sentence.\nH-line and T-shirt\r\n\nS-1 x\n")
    assert not is_generated(text_lines(path))
    assert list(text_lines(path)) == ["A sentence.", "H-line and T-shirt", "", "S-1 x"]


@pytest.mark.parametrize(
    "text, message",
    [
        (PRINTED + PRINTED, "sentence 1 has two S-lines"),
        (PRINTED.replace("S-0\tz\n", ""), "1 of 2 sentences have no S-line, the first is sentence 0"),
        (PRINTED.replace("T-1", "X-1"), "1 of 2 sentences have no T-line, the first is sentence 1"),
        (PRINTED.replace("D-0", "X-0"), "1 of 2 sentences have no D-line, the first is sentence 0"),
        (PRINTED.replace("-1\t", "-3\t"), "2 of 4 sentences have no S-line, the first is sentence 1"),
        (PRINTED.replace("H-", "X-"), "no hypotheses"),
        ("plain text\n", "no hypotheses"),
        ("", "no hypotheses"),
    ],
)
def test_what_is_missing_or_double_is_said(tmp_path, text, message):
    with pytest.raises(SystemExit, match=message):
        read_generated(write(tmp_path, text))


def test_unreadable_files(tmp_path):
    with pytest.raises(SystemExit, match="absent cannot be read: No such file"):
        read_generated(str(tmp_path / "absent"))
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    with pytest.raises(SystemExit, match="latin cannot be read: not UTF-8 text"):
        list(text_lines(str(tmp_path / "latin")))
