#!/usr/bin/env bash
# IWSLT14 TED talks, prepared as fairseq's prepare-iwslt14.sh does, with sacremoses in the place of Moses' Perl scripts.
#
#   prepare.sh PAIR [--from FOLDER] [--out FOLDER] [--workers N]
#
#   PAIR            de-en, it-en or es-en; en-de, en-it and en-es make the same data: one folder trains both directions
#   --from FOLDER   the WIT3 release 2014-01: 2014-01.tgz, or PAIR.tgz, or the folder PAIR unpacked from it; otherwise downloads
#   --out FOLDER    where text/ and bin/ go (default: data/iwslt14/PAIR)

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
case "$ARGUMENT" in
    de-en|en-de) PAIR=de-en ;;
    it-en|en-it) PAIR=it-en ;;
    es-en|en-es) PAIR=es-en ;;
    "") fail "which pair? de-en, it-en or es-en (see --help)" ;;
    *) fail "unknown pair $ARGUMENT: de-en, it-en or es-en (see --help)" ;;
esac
LANGUAGE="${PAIR%-en}"
OUT="${OUT:-data/iwslt14/$PAIR}"
open_work

# The release holds 2014-01/texts/de/en/de-en.tgz and the like; fairseq keeps a copy of de-en.tgz.
if [ -z "$FROM" ]; then
    FROM="$OUT/download"
    if [ "$PAIR" = de-en ]; then
        download https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz "$FROM/de-en.tgz"
    else
        drive="https://drive.usercontent.google.com/download?export=download&confirm=t"
        download "$drive&id=1GnBarJIbNgEIIDvUyKDtLmv35Qcxg6Ed" "$FROM/2014-01.tgz"
    fi
fi

# unpack ARCHIVE [MEMBER]
unpack() {
    mkdir -p "$WORK/orig"
    tar -xzf "$1" -C "$WORK/orig" ${2+"$2"} 2> /dev/null || fail "cannot unpack ${2:+$2 from }$1"
}
if [ -d "$FROM/$PAIR" ]; then
    TALKS="$FROM/$PAIR"
elif [ -f "$FROM/train.tags.$PAIR.en" ]; then
    TALKS="$FROM"
else
    TALKS="$WORK/orig/$PAIR"
    inner="2014-01/texts/$LANGUAGE/en/$PAIR.tgz"
    if [ -f "$FROM/$PAIR.tgz" ]; then
        unpack "$FROM/$PAIR.tgz"
    elif [ -f "$FROM/$inner" ]; then
        unpack "$FROM/$inner"
    elif [ -f "$FROM/2014-01.tgz" ]; then
        unpack "$FROM/2014-01.tgz" "$inner"
        unpack "$WORK/orig/$inner"
    else
        fail "$FROM holds neither $PAIR/, $PAIR.tgz nor 2014-01.tgz"
    fi
fi

text iwslt "$TALKS" "$WORK/raw" --pair "$PAIR"
for lang in "$LANGUAGE" en; do
    for name in all test; do
        text tokenize "$WORK/raw/$name.$lang" "$WORK/tok/$name.$lang" --lang "$lang" --lower --escape --workers "$WORKERS"
    done
done
text clean "$WORK/tok/all" "$WORK/tok/clean" --langs "$LANGUAGE" en --longest 175 --ratio 1.5
text hold-out "$WORK/tok/clean" "$WORK/tok" --langs "$LANGUAGE" en --every 23
apply_bpe 10000 "$LANGUAGE" en
binarise "$LANGUAGE" en
