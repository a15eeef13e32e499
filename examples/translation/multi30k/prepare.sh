#!/usr/bin/env bash
# Multi30k German-English (task 1, lower-cased, normalised, tokenised): joint BPE of 4,000 merges, one dictionary for both languages.
#
#   prepare.sh [--from FOLDER] [--out FOLDER] [--workers N]
#
#   --from FOLDER   {train,valid,test}.{de,en}[.gz], or data/task1/tok of a clone of github.com/multi30k/dataset; otherwise downloads
#   --out FOLDER    where text/ and bin/ go (default: data/multi30k)

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
[ -z "$ARGUMENT" ] || fail "unexpected argument $ARGUMENT (see --help)"
OUT="${OUT:-data/multi30k}"
open_work

if [ -z "$FROM" ]; then
    FROM="$OUT/download"
    for split in train val test_2016_flickr; do
        for lang in de en; do
            file="$split.lc.norm.tok.$lang"
            download "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/tok/$file" "$FROM/$file"
        done
    done
fi
text collect "$FROM" "$WORK/tok" \
    train=train,train.lc.norm.tok valid=valid,val.lc.norm.tok test=test,test_2016_flickr.lc.norm.tok --langs de en
apply_bpe 4000 de en
binarise de en --joined-dictionary
