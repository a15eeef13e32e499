#!/usr/bin/env python3
"""Text steps of the translation recipes, one subcommand each (prepare.sh of every recipe calls them).

Every output is written to FILE.part and renamed when complete, so that no half-written file is ever taken for a whole one.
"""
import argparse
import contextlib
import functools
import gzip
import hashlib
import itertools
import multiprocessing
import re
import struct
import sys
import zipfile
from pathlib import Path

SPLITS = ("train", "valid", "test")


class InputError(Exception):
    """The data are not what the recipe needs; the message is one line for the user."""


@contextlib.contextmanager
def writing(path):
    part = Path("{}.part".format(path))
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "w", encoding="utf-8", newline="\n") as out:
        yield out
    part.replace(path)


def read_lines(path):
    """Lines of a plain or gzipped file, split at newlines only: a carriage return or U+2028 inside a sentence ends no line."""
    path = Path(path)
    if not path.is_file():
        raise InputError("no such file: {}".format(path))
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    try:
        with opened as lines:
            for line in lines:
                yield line.decode("utf-8").rstrip("\r\n").replace("\r", " ")
    except (EOFError, OSError) as error:
        raise InputError("cannot read {}: {}".format(path, error))
    except UnicodeDecodeError:
        raise InputError("not UTF-8 text: {}".format(path))


def write_lines(path, lines):
    count = 0
    with writing(path) as out:
        for count, line in enumerate(lines, 1):
            out.write(line + "\n")
    return count


def require_equal(what, counts):
    """All languages of one split have the same number of lines, and some."""
    if len(set(counts.values())) > 1 or not all(counts.values()):
        raise InputError("{}: line counts differ or are zero: {}".format(
            what, ", ".join("{} {:,}".format(*item) for item in counts.items())))


def find_text(folder, names, lang):
    candidates = ["{}.{}{}".format(name, lang, end) for name in names for end in ("", ".gz")]
    for candidate in candidates:
        if (folder / candidate).is_file():
            return folder / candidate
    raise InputError("{} has none of: {}".format(folder, ", ".join(candidates)))


def collect(args):
    """Copy parallel files out of a folder, unpacked and under plain names."""
    for rule in args.splits:
        split, _, names = rule.partition("=")
        sources = {lang: find_text(args.folder, names.split(","), lang) for lang in args.langs}
        require_equal(split, {
            lang: write_lines(args.to / "{}.{}".format(split, lang), read_lines(source)) for lang, source in sources.items()})


TOKENIZE = None


def start_tokenizer(lang, normalize, **options):
    global TOKENIZE  # one per worker process: building it costs more than sending it thousands of lines
    from sacremoses import MosesPunctNormalizer, MosesTokenizer
    tokenizer, normalizer = MosesTokenizer(lang=lang), MosesPunctNormalizer(lang) if normalize else None

    def tokenize_words(line):
        return tokenizer.tokenize(normalizer.normalize(line) if normalize else line, **options)

    TOKENIZE = tokenize_words


def tokenize_line(job):
    line, lower = job
    # split() also removes the odd separators (U+0085, U+2028, ...) at which later tools would break the line
    line = " ".join(TOKENIZE(" ".join(line.split())))
    return line.lower() if lower else line


def tokenize(args):
    try:
        import sacremoses  # noqa: F401  (the workers use it)
        from tqdm import tqdm
    except ImportError as error:
        raise InputError("{} (pip install sacremoses tqdm, or activate the environment that has them)".format(error))
    lines = list(read_lines(args.input))
    jobs = ((line, args.lower) for line in lines)
    options = {"escape": args.escape, "aggressive_dash_splits": args.split_hyphens}
    start = functools.partial(start_tokenizer, args.lang, args.normalize, **options)
    with multiprocessing.Pool(args.workers, start) as pool:
        done = pool.imap(tokenize_line, jobs, chunksize=200)
        write_lines(args.output, tqdm(done, total=len(lines), desc="tokenise {}".format(args.input.name), disable=None))


def read_pairs(prefix, langs):
    sides = [read_lines("{}.{}".format(prefix, lang)) for lang in langs]
    for number, pair in enumerate(itertools.zip_longest(*sides), 1):
        if None in pair:
            raise InputError("{}.{{{}}}: one file ends before line {:,} of the other".format(prefix, ",".join(langs), number))
        yield pair


def write_pairs(prefix, langs, pairs):
    with writing("{}.{}".format(prefix, langs[0])) as first, writing("{}.{}".format(prefix, langs[1])) as second:
        for pair in pairs:
            first.write(pair[0] + "\n")
            second.write(pair[1] + "\n")


def is_clean(pair, longest, ratio):
    one, other = sorted(len(side.split()) for side in pair)
    return 1 <= one and other <= longest and other <= ratio * one


def head(args):
    """The first lines of a text."""
    require_equal(args.input.name, {"lines": write_lines(args.output, itertools.islice(read_lines(args.input), args.lines))})


def clean(args):
    """Moses' clean-corpus-n: drop pairs with an empty or too long side or with too different lengths."""
    pairs = list(read_pairs(args.input, args.langs))
    kept = [pair for pair in pairs if is_clean(pair, args.longest, args.ratio)]
    write_pairs(args.output, args.langs, kept)
    print("cleaning kept {:,} of {:,} pairs".format(len(kept), len(pairs)))


def hold_out(args):
    """Every N-th pair of the input becomes `valid`, the others `train`."""
    pairs = list(read_pairs(args.input, args.langs))
    write_pairs(args.to / "valid", args.langs, pairs[args.every - 1::args.every])
    write_pairs(args.to / "train", args.langs, (pair for n, pair in enumerate(pairs, 1) if n % args.every))


IWSLT_TRAIN_METADATA = ("<url>", "<talkid>", "<keywords>")
IWSLT_TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")


def iwslt_train(path):
    """The lines fairseq's prepare-iwslt14.sh keeps: titles and descriptions are sentences too, other metadata goes."""
    for line in read_lines(path):
        if not any(tag in line for tag in IWSLT_TRAIN_METADATA):
            yield re.sub(r"</?(title|description)>", "", line)


def iwslt_test(folder, pair, lang):
    for name in IWSLT_TEST_SETS:
        path = folder / "IWSLT14.{}.{}.{}.xml".format(name, pair, lang)
        if name.startswith("TEDX") and not path.exists():
            continue  # not every pair has the TEDx set
        for line in read_lines(path):
            segment = re.search(r'<seg id="[0-9]*">\s*(.*?)\s*</seg>', line)
            if segment:
                yield segment.group(1).replace("\u2019", "'")


def iwslt(args):
    langs = args.pair.split("-")
    require_equal("train.tags", {lang: write_lines(
        args.to / "all.{}".format(lang), iwslt_train(args.folder / "train.tags.{}.{}".format(args.pair, lang))) for lang in langs})
    require_equal("test", {lang: write_lines(
        args.to / "test.{}".format(lang), iwslt_test(args.folder, args.pair, lang)) for lang in langs})


def tatoeba_rows(path):
    """(German, English) pairs of manythings.org's deu-eng.zip, or of the deu.txt in it."""
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                lines = archive.read("deu.txt").decode("utf-8").split("\n")
        except (zipfile.BadZipFile, KeyError) as error:
            raise InputError("cannot read deu.txt in {}: {}".format(path, error))
    else:
        lines = read_lines(path)
    for line in lines:
        columns = line.split("\t")
        if len(columns) >= 2 and columns[0].strip() and columns[1].strip():
            yield columns[1].strip(), columns[0].strip()


def sentence_keys(pair):
    """What makes two sentences the same for the split: letters and digits, whatever the case and punctuation."""
    return {(side, "".join(c for c in text.casefold() if c.isalnum()) or text) for side, text in enumerate(pair)}


def split_tatoeba(args):
    """A split that depends on the pairs alone: no sentence of `test` or `valid` stands in another part, in either language."""
    ranked = sorted(set(tatoeba_rows(args.input)), key=lambda pair: hashlib.sha256("\t".join(pair).encode("utf-8")).digest())
    parts, taken, rest = {"test": [], "valid": []}, set(), []
    for pair in ranked:
        part = next((part for part, chosen in parts.items() if len(chosen) < args.held_out), None)
        if part and not taken & sentence_keys(pair):
            parts[part].append(pair)
            taken |= sentence_keys(pair)
        else:
            rest.append(pair)
    parts["train"] = [pair for pair in rest if not taken & sentence_keys(pair)]
    for part, pairs in parts.items():
        require_equal(part, {"pairs": len(pairs)})
        write_pairs(args.to / part, ("de", "en"), pairs)


def dictionary(args):
    """A list of symbols (one per line) as a fairseq dictionary; fairseq adds its own special symbols."""
    special = {"<unk>", "<s>", "</s>", "<pad>"}
    symbols = dict.fromkeys(line for line in read_lines(args.input) if line not in special and len(line.split()) == 1)
    require_equal(args.input.name, {"symbols": write_lines(args.output, ("{} 1".format(symbol) for symbol in symbols))})


def indexed_sentences(path):
    with open(path, "rb") as index:
        return struct.unpack("<9sQBQ", index.read(26))[3]  # magic, version, type, number of sentences


def check(args):
    """Every split has as many sentences in each language as text and as fairseq's binary data."""
    pair = ".{}.".format("-".join(args.langs)) if len(args.langs) > 1 else None
    for split in SPLITS:
        counts = {}
        for lang in args.langs:
            counts[lang] = sum(1 for _ in read_lines(args.folder / "text" / "{}.{}".format(split, lang)))
            name = split + pair + lang if pair else split
            counts["binary " + lang] = indexed_sentences(args.folder / "bin" / (name + ".idx"))
        require_equal(split, counts)
        print("{}: {:,} {}".format(split, counts[args.langs[0]], "pairs" if pair else "lines"))


def add_command(commands, function, *positional, langs=True):
    command = commands.add_parser(function.__name__.replace("_", "-"), help=function.__doc__)
    command.set_defaults(function=function)
    if langs:
        command.add_argument("--langs", nargs="+", required=True, help="two languages, or one name ending for text in one language")
    for name in positional:
        command.add_argument(name, type=Path)
    return command


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    add_command(commands, collect, "folder", "to").add_argument("splits", nargs="+", metavar="SPLIT=NAME[,OTHER_NAME]")
    command = add_command(commands, tokenize, "input", "output", langs=False)
    command.add_argument("--lang", required=True)
    command.add_argument("--lower", action="store_true")
    command.add_argument("--escape", action="store_true", help="write & < > ' \" | [ ] as XML entities, as Moses does")
    command.add_argument("--normalize", action="store_true", help="first make punctuation uniform, as Moses does")
    command.add_argument("--split-hyphens", action="store_true", help="hyphens between letters become words, @-@")
    command.add_argument("--workers", type=int, default=1)
    command = add_command(commands, head, "input", "output", langs=False)
    command.add_argument("--lines", type=int, required=True)
    command = add_command(commands, clean, "input", "output")
    command.add_argument("--longest", type=int, default=175)
    command.add_argument("--ratio", type=float, default=1.5)
    add_command(commands, hold_out, "input", "to").add_argument("--every", type=int, default=23)
    add_command(commands, iwslt, "folder", "to", langs=False).add_argument("--pair", required=True)
    add_command(commands, split_tatoeba, "input", "to", langs=False).add_argument("--held-out", type=int, default=2000)
    add_command(commands, dictionary, "input", "output", langs=False)
    add_command(commands, check, "folder")
    return parser


if __name__ == "__main__":
    arguments = get_parser().parse_args()
    try:
        arguments.function(arguments)
    except InputError as error:
        sys.exit("error: {}".format(error))
