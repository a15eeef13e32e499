#!/usr/bin/env bash
# WMT16 English-German as Google prepared it (4.5 million pairs, BPE of 32,000 merges done): one dictionary for both languages.
#
#   prepare.sh [vocabulary|counts] [--from FOLDER] [--out FOLDER] [--workers N]
#
#   vocabulary      the dictionary is the archive's vocab.bpe.32000 (default)
#   counts          the dictionary is the 32,768 most frequent symbols of the training data, as in fairseq's scaling_nmt recipe
#   --from FOLDER   wmt16_en_de.tar.gz, or the files unpacked from it; otherwise downloads
#   --out FOLDER    where text/ and bin/ go (default: data/wmt16)

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
case "$ARGUMENT" in
    ""|vocabulary|counts) DICTIONARY="${ARGUMENT:-vocabulary}" ;;
    *) fail "unknown dictionary $ARGUMENT: vocabulary or counts (see --help)" ;;
esac
OUT="${OUT:-data/wmt16}"
open_work

if [ -z "$FROM" ]; then
    FROM="$OUT/download"
    drive="https://drive.usercontent.google.com/download?export=download&confirm=t"
    download "$drive&id=0B_bZck-ksdkpM25jRUN2X2UxMm8" "$FROM/wmt16_en_de.tar.gz"
fi
if [ -f "$FROM/wmt16_en_de.tar.gz" ]; then
    mkdir -p "$WORK/orig"
    tar -xzf "$FROM/wmt16_en_de.tar.gz" -C "$WORK/orig" 2> /dev/null || fail "cannot unpack $FROM/wmt16_en_de.tar.gz"
    FROM="$WORK/orig"
fi
text collect "$FROM" "$WORK/text" \
    train=train.tok.clean.bpe.32000 valid=newstest2013.tok.bpe.32000 test=newstest2014.tok.bpe.32000 --langs en de
if [ "$DICTIONARY" = vocabulary ]; then
    text dictionary "$FROM/vocab.bpe.32000" "$WORK/dictionary.txt"
    binarise en de --joined-dictionary --srcdict "$WORK/dictionary.txt"
else
    binarise en de --joined-dictionary --nwordssrc 32768 --nwordstgt 32768
fi
