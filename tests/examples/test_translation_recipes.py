"""The translation recipes' prepare.sh scripts, run to the end on small local files, and the commands of their READMEs."""
import gzip
import os
import random
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.examples.small_corpora import (
    HELPER, IWSLT_PAIRS, PROGRAMS, RECIPES, ROOT, SENTENCE_COUNTS, prepare, prepared, read, run, sentences, stub, words_of,
    write, write_iwslt, write_splits,
)

# Answers every download with the file $ANSWER and notes the address.
CURL = 'while [ $# -gt 1 ]; do [ "$1" != --output ] || cp "$ANSWER" "$2"; shift; done; echo "$1" >> "$ANSWER.asked"\n'


@pytest.fixture(scope="module")
def multi30k(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi 30k")
    texts = write_splits(folder / "my data", end=".gz")
    output = prepared("multi30k", folder, "--from", "my data", "--out", "prepared here")
    return folder, texts, output


def test_multi30k_keeps_the_text_and_joins_the_dictionaries(multi30k):
    folder, texts, output = multi30k
    out = folder / "prepared here"
    for (split, lang), lines in texts.items():
        assert words_of(read(out / "text" / "{}.{}".format(split, lang))) == lines
        assert "{}: {} pairs".format(split, SENTENCE_COUNTS[split]) in output
    assert read(out / "text" / "codes")[0].startswith("#version")
    assert read(out / "bin" / "dict.de.txt") == read(out / "bin" / "dict.en.txt")
    assert sorted(path.name for path in out.iterdir()) == ["bin", "text"]


def test_a_failing_run_leaves_the_earlier_data(multi30k, tmp_path):
    folder, _, _ = multi30k
    before = (folder / "prepared here" / "bin" / "train.de-en.de.bin").read_bytes()
    write_splits(tmp_path)
    write(tmp_path / "valid.en", ["one line"])
    result = prepare("multi30k", folder, "--from", tmp_path, "--out", "prepared here")
    assert result.returncode == 1
    assert result.stderr == "error: valid: line counts differ or are zero: de 8, en 1\n"
    assert (folder / "prepared here" / "bin" / "train.de-en.de.bin").read_bytes() == before
    assert sorted(path.name for path in (folder / "prepared here").iterdir()) == ["bin", "text"]


def test_multi30k_on_the_real_data(tmp_path):
    if not os.environ.get("FAIRSEQ_EARM_DATA"):
        pytest.skip("FAIRSEQ_EARM_DATA is not set: no real Multi30k")
    texts = {}
    for split in SENTENCE_COUNTS:
        for lang in ("de", "en"):
            name = "{}.{}".format(split, lang)
            with gzip.open(Path(os.environ["FAIRSEQ_EARM_DATA"]) / "multi30k" / (name + ".gz"), "rt", encoding="utf-8") as lines:
                texts[name] = [line.rstrip("\n") for _, line in zip(range(300), lines)]
            write(tmp_path / "raw" / name, texts[name])
    output = prepared("multi30k", tmp_path, "--from", "raw", "--out", "out")
    assert "train: 300 pairs\nvalid: 300 pairs\ntest: 300 pairs\n" in output
    assert all(words_of(read(tmp_path / "out" / "text" / name)) == lines for name, lines in texts.items())


def test_tatoeba_tokenises_and_keeps_case(tmp_path):
    texts = write_splits(tmp_path / "raw")
    write(tmp_path / "raw" / "test.de", ["Hallo, Welt!", "Das ist Toms \u201eHund\u201c.\r", "z.B. 3,5 km\u2028weit"] + texts["test", "de"][3:])
    prepared("tatoeba", tmp_path, "--from", "raw", "--out", "out")
    assert words_of(read(tmp_path / "out" / "text" / "test.de"))[:3] == [
        "Hallo , Welt !", "Das ist Toms \u201e Hund \u201c .", "z.B. 3,5 km weit"]


def tatoeba_split(folder, rows):
    with zipfile.ZipFile(folder / "deu-eng.zip", "w") as archive:
        archive.writestr("deu.txt", "".join("{}\t{}\tCC-BY 2.0 (France)\n".format(*row) for row in rows))
    result = run([sys.executable, HELPER, "split-tatoeba", "deu-eng.zip", "split", "--held-out", 30], folder)
    assert result.returncode == 0, result.stderr
    return {part: list(zip(read(folder / "split" / (part + ".en")), read(folder / "split" / (part + ".de"))))
            for part in SENTENCE_COUNTS}


def test_tatoeba_split_shares_no_sentence(tmp_path):
    draw = random.Random(1)
    english, german = sentences(300, 1, "a cat sees the dog and runs home fast"), sentences(300, 2)
    rows = [(draw.choice(english).capitalize() + draw.choice(".!"), draw.choice(german)) for _ in range(600)]
    split = tatoeba_split(tmp_path, rows)
    assert len(split["valid"]) == len(split["test"]) == 30
    assert len(split["train"]) > 100
    for part, other in (("test", "train"), ("test", "valid"), ("valid", "train")):
        for side in (0, 1):
            keys = [{re.sub(r"\W", "", pair[side].lower()) for pair in split[name]} for name in (part, other)]
            assert not keys[0] & keys[1]
    draw.shuffle(rows)
    assert tatoeba_split(tmp_path, rows) == split


@pytest.fixture(scope="module")
def iwslt14(tmp_path_factory):
    folder = tmp_path_factory.mktemp("iwslt14")
    write_iwslt(folder)
    output = prepared("iwslt14", folder, "en-it", path=[stub(folder / "stubs", "curl", CURL)], ANSWER=str(folder / "2014-01.tgz"))
    return folder, output


def test_iwslt14_follows_fairseqs_steps(iwslt14):
    folder, output = iwslt14
    text = folder / "data" / "iwslt14" / "it-en" / "text"
    kept = IWSLT_PAIRS + 4  # the titles and descriptions of two talks
    assert "cleaning kept {} of {} pairs".format(kept, kept + 1) in output
    assert "valid: {} pairs".format(kept // 23) in output and "train: {} pairs".format(kept - kept // 23) in output
    train, valid, test = (words_of(read(text / (split + ".en"))) for split in ("train", "valid", "test"))
    assert train[:2] == ["title number 0", "it &apos;s told &amp; done ."]
    assert " numero 20 " in valid[0] and " numero 43 " in valid[1]  # pairs 23 and 46, after two lines of metadata
    assert test == ["{} : it &apos;s segment {}".format(name, n) for name in ("dev2010", "tst2010", "tst2011", "tst2012") for n in (1, 2)]
    assert not any("ted.com" in line or line != line.lower() for line in train + valid + test)


def test_iwslt14_download_is_kept(iwslt14):
    folder, _ = iwslt14
    assert (folder / "data/iwslt14/it-en/download/2014-01.tgz").read_bytes() == (folder / "2014-01.tgz").read_bytes()
    asked = read(folder / "2014-01.tgz.asked")
    assert len(asked) == 1 and asked[0].startswith("https://drive.usercontent.google.com/")


def test_a_download_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "page").write_text("<html>Too many requests</html>")
    path = [stub(tmp_path / "stubs", "curl", CURL)]
    for recipe, arguments in (("iwslt14", ["de-en"]), ("wmt16", []), ("tatoeba", [])):
        result = prepare(recipe, tmp_path, *arguments, "--out", recipe, path=path, ANSWER=str(tmp_path / "page"))
        assert result.returncode == 1
        assert "did not answer with a sound archive" in result.stderr
        assert [path.suffix for path in (tmp_path / recipe / "download").iterdir()] == [".part"]


WMT16_NAMES = {"train": "train.tok.clean.bpe.32000", "valid": "newstest2013.tok.bpe.32000", "test": "newstest2014.tok.bpe.32000"}


def test_wmt16_dictionaries_and_a_second_run(tmp_path):
    texts = write_splits(tmp_path / "raw", WMT16_NAMES)
    symbols = sorted({word for lines in texts.values() for line in lines for word in line.split()})
    write(tmp_path / "raw" / "vocab.bpe.32000", ["<unk>", "<s>", "</s>", *symbols, symbols[0], "unseen@@"])
    with tarfile.open(tmp_path / "raw" / "wmt16_en_de.tar.gz", "w:gz") as archive:
        for path in sorted((tmp_path / "raw").glob("*.32000*")):
            archive.add(path, path.name)
            path.unlink()
    prepared("wmt16", tmp_path, "--from", "raw", "--out", "out")
    assert read(tmp_path / "out" / "text" / "valid.en") == texts["valid", "en"]
    dictionary = read(tmp_path / "out" / "bin" / "dict.en.txt")
    assert [line.split()[0] for line in dictionary if not line.startswith("madeupword")] == [*symbols, "unseen@@"]
    assert read(tmp_path / "out" / "bin" / "dict.de.txt") == dictionary
    prepared("wmt16", tmp_path, "counts", "--from", "raw", "--out", "out")
    counted = [line.split()[0] for line in read(tmp_path / "out" / "bin" / "dict.en.txt")]
    assert "unseen@@" not in counted and set(symbols) <= set(counted)


def break_nothing(folder):
    pass


def remove_english(folder):
    (folder / "test.en").unlink()


def empty_train(folder):
    write(folder / "train.de", [])
    write(folder / "train.en", [])


def cut_archive(folder):
    (folder / "train.de").unlink()
    (folder / "train.de.gz").write_bytes(gzip.compress(b"a line\n" * 999)[:-12])


def broken_zip(folder):
    write(folder / "deu-eng.zip", ["no archive"])


def short_zip(folder):
    with zipfile.ZipFile(folder / "deu-eng.zip", "w") as archive:
        archive.writestr("deu.txt", "Go.\tGeh.\tCC-BY 2.0\n")


def foreign_output(folder):
    write(folder / "out" / "bin" / "mine", ["precious"])


@pytest.mark.parametrize("recipe, arguments, damage, message", [
    ("multi30k", ["--from", "nowhere"], break_nothing, "--from: no such folder: nowhere"),
    ("multi30k", ["--from"], break_nothing, "--from needs a value"),
    ("multi30k", ["--form", "."], break_nothing, "unknown option --form (see --help)"),
    ("multi30k", ["--from", "."], remove_english, ". has none of: test.en, test.en.gz, test_2016_flickr.lc.norm.tok.en, "
                                                  "test_2016_flickr.lc.norm.tok.en.gz"),
    ("multi30k", ["--from", "."], empty_train, "train: line counts differ or are zero: de 0, en 0"),
    ("multi30k", ["--from", "."], cut_archive, "cannot read train.de.gz: Compressed file ended before the end-of-stream marker was reached"),
    ("multi30k", ["--from", "."], foreign_output, "out/bin is not an earlier run's: choose another --out"),
    ("tatoeba", ["--from", "."], remove_english, ". has none of: test.en, test.en.gz"),
    ("tatoeba", ["--from", "."], broken_zip, "cannot read deu.txt in deu-eng.zip: File is not a zip file"),
    ("tatoeba", ["--from", "."], short_zip, "valid: line counts differ or are zero: pairs 0"),
    ("iwslt14", ["--from", "."], break_nothing, "which pair? de-en, it-en or es-en (see --help)"),
    ("iwslt14", ["fr-en", "--from", "."], break_nothing, "unknown pair fr-en: de-en, it-en or es-en (see --help)"),
    ("iwslt14", ["de-en", "--from", "."], break_nothing, ". holds neither de-en/, de-en.tgz nor 2014-01.tgz"),
    ("wmt16", ["words", "--from", "."], break_nothing, "unknown dictionary words: vocabulary or counts (see --help)"),
])
def test_bad_input_is_one_clear_line(tmp_path, recipe, arguments, damage, message):
    write_splits(tmp_path)
    damage(tmp_path)
    result = prepare(recipe, tmp_path, *arguments, "--out", "out")
    assert (result.returncode, result.stderr) == (1, "error: {}\n".format(message))


def test_a_missing_tokenizer_is_one_clear_line(tmp_path):
    write(tmp_path / "sacremoses.py", ["raise ImportError('No module named sacremoses')"])
    write(tmp_path / "text", ["Hallo"])
    result = run([sys.executable, HELPER, "tokenize", "text", "out", "--lang", "de"], tmp_path, PYTHONPATH=str(tmp_path))
    assert result.stderr.startswith("error: No module named sacremoses (pip install") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("recipe", ["multi30k", "tatoeba", "iwslt14", "wmt16"])
def test_help_shows_the_usage(tmp_path, recipe):
    assert "--from FOLDER" in prepared(recipe, tmp_path, "--help")


def readme_commands(recipe, tmp_path):
    """The training and generation commands of a recipe's README as argument lists, as bash expands them."""
    blocks = re.findall(r"```bash\n(.*?)```", (RECIPES / recipe / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    script = "\n".join(block for block in blocks if "prepare.sh" not in block and "compare.py" not in block)
    for written in re.findall(r"> (\S+)", script):
        (tmp_path / written).parent.mkdir(parents=True, exist_ok=True)
    stub(tmp_path / "stubs", "fairseq-earm-tune", "")
    for program in ("fairseq-train", "fairseq-generate"):
        stub(tmp_path / "stubs", program, 'printf "%s\\0" "${0##*/}" "$@" "" >> "$RECORD"\n')
    result = run(["bash", "-euc", script], tmp_path, path=[tmp_path / "stubs"], RECORD=str(tmp_path / "record"))
    assert result.returncode == 0, result.stderr
    return [command.split("\0") for command in (tmp_path / "record").read_text().rstrip("\0").split("\0\0")]


@pytest.mark.parametrize("recipe", ["multi30k", "tatoeba", "iwslt14", "wmt16"])
def test_readme_commands_are_accepted(recipe, tmp_path, monkeypatch):
    from fairseq import options
    parsers = {"fairseq-train": options.get_training_parser, "fairseq-generate": options.get_generation_parser}
    monkeypatch.chdir(ROOT)
    commands = readme_commands(recipe, tmp_path)
    assert {command[0] for command in commands} == set(parsers)
    for program, *arguments in commands:
        monkeypatch.setattr(sys, "argv", [program, *arguments])  # fairseq looks for --user-dir there
        options.parse_args_and_arch(parsers[program](), input_args=arguments)


def test_iwslt14_training_command_trains(iwslt14, tmp_path):
    folder, _ = iwslt14
    command = next(command for command in readme_commands("iwslt14", tmp_path) if "label_smoothed_cross_entropy" in command)
    command = [word.replace("de-en", "it-en").replace("checkpoints/", str(tmp_path) + "/") for word in command]
    command[command.index("de")] = "it"
    command[command.index("fairseq_earm")] = ROOT / "fairseq_earm"
    small = ["--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16, "--decoder-embed-dim", 16, "--max-tokens", 512,
             "--encoder-ffn-embed-dim", 16, "--decoder-ffn-embed-dim", 16, "--max-update", 2, "--cpu", "--no-progress-bar"]
    result = run([shutil.which(command[0], path=str(PROGRAMS)), *command[1:], *small], folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert (tmp_path / "iwslt14" / "it-en" / "cross-entropy" / "checkpoint_best.pt").is_file()
