"""Small corpora in the layouts the translation recipes read, and the running of their scripts."""
import gzip
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "translation"
HELPER = RECIPES / "prepare_text.py"
PROGRAMS = Path(sys.executable).parent
SENTENCE_COUNTS = {"train": 60, "valid": 8, "test": 7}


def run(command, cwd, path=(), **variables):
    path = os.pathsep.join([*map(str, path), str(PROGRAMS), os.environ["PATH"]])
    environment = dict(os.environ, PATH=path, PYTHON=sys.executable, OMP_NUM_THREADS="1", **variables)
    return subprocess.run([str(word) for word in command], cwd=cwd, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding="utf-8")


def prepare(recipe, cwd, *arguments, **options):
    return run([RECIPES / recipe / "prepare.sh", *arguments, "--workers", "1"], cwd, **options)


def prepared(recipe, cwd, *arguments, **options):
    result = prepare(recipe, cwd, *arguments, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def sentences(count, seed, words="der mann sieht eine rote katze und zwei kinder im park neben dem alten haus"):
    draw = random.Random(seed)
    return [" ".join(draw.choices(words.split(), k=draw.randint(4, 12))) for _ in range(count)]


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(line + "\n" for line in lines).encode("utf-8")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def read(path):
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def words_of(lines):
    return [line.replace("@@ ", "") for line in lines]


def write_splits(folder, names=None, end="", langs=("de", "en")):
    """{train,valid,test}.{de,en} (or other names for the splits); returns the lines."""
    texts = {}
    for split, count in SENTENCE_COUNTS.items():
        for lang in langs:
            texts[split, lang] = sentences(count, split + lang)
            write(folder / "{}.{}{}".format((names or {}).get(split, split), lang, end), texts[split, lang])
    return texts


def stub(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/bash\n" + script)
    (folder / name).chmod(0o755)
    return folder


IWSLT_PAIRS = 460


def write_iwslt(folder):
    """The release's layout: 2014-01.tgz around it-en.tgz around it-en/, two talks in the training files."""
    talks = folder / "it-en"
    for lang in ("it", "en"):
        lines = [line.capitalize() + "." for line in sentences(IWSLT_PAIRS, lang)]
        lines = ["{} numero {} {}".format(line, n, "x " * 12) for n, line in enumerate(lines)]  # alike in length: none is cleaned away
        half = IWSLT_PAIRS // 2
        training = []
        for number, part in enumerate((lines[:half], lines[half:])):
            training += ["<url>http://www.ted.com/{}</url>".format(number), "<keywords>talks, TED</keywords>", "<talkid>{}</talkid>".format(number),
                         "<title>Title number {}</title>".format(number), "<description>It's told & done.</description>", *part]
        training += ["Far too long a line for its short companion over there" if lang == "en" else "Breve"]
        write(talks / "train.tags.it-en.{}".format(lang), training)
        for name in ("dev2010", "tst2010", "tst2011", "tst2012"):
            segments = ['<seg id="{}"> {}: it\u2019s Segment {} </seg>'.format(n, name, n) for n in (1, 2)]
            write(talks / "IWSLT14.TED.{}.it-en.{}.xml".format(name, lang), [
                '<?xml version="1.0" encoding="UTF-8"?>', '<mteval>', '<doc docid="1" genre="lectures">', "<title>A talk</title>",
                "<url>http://www.ted.com</url>", *segments, "</doc>", "</mteval>"])
    inner = folder / "2014-01" / "texts" / "it" / "en" / "it-en.tgz"
    inner.parent.mkdir(parents=True)
    with tarfile.open(inner, "w:gz") as archive:
        archive.add(talks, "it-en")
    with tarfile.open(folder / "2014-01.tgz", "w:gz") as archive:
        archive.add(folder / "2014-01", "2014-01")


def assert_in_order(steps):
    """Every step has a name of its own and stands behind what it needs; the names."""
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for number, step in enumerate(steps):
        assert set(step.needs) <= set(names[:number])
    return names
