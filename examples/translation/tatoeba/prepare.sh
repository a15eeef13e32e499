#!/usr/bin/env bash
# Tatoeba German-English: raw case, tokenised with sacremoses, joint BPE of 8,000 merges, one dictionary for both languages.
#
#   prepare.sh [--from FOLDER] [--out FOLDER] [--workers N]
#
#   --from FOLDER   {train,valid,test}.{de,en}[.gz], or manythings.org's deu-eng.zip or deu.txt; otherwise downloads deu-eng.zip
#   --out FOLDER    where text/ and bin/ go (default: data/tatoeba)

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
read_options "$@"
[ -z "$ARGUMENT" ] || fail "unexpected argument $ARGUMENT (see --help)"
OUT="${OUT:-data/tatoeba}"
open_work

if [ -z "$FROM" ]; then
    FROM="$OUT/download"
    download https://www.manythings.org/anki/deu-eng.zip "$FROM/deu-eng.zip"
fi
if [ -f "$FROM/deu-eng.zip" ]; then
    text split-tatoeba "$FROM/deu-eng.zip" "$WORK/raw"
elif [ -f "$FROM/deu.txt" ]; then
    text split-tatoeba "$FROM/deu.txt" "$WORK/raw"
else
    text collect "$FROM" "$WORK/raw" train=train valid=valid test=test --langs de en
fi
for split in train valid test; do
    for lang in de en; do
        text tokenize "$WORK/raw/$split.$lang" "$WORK/tok/$split.$lang" --lang "$lang" --workers "$WORKERS"
    done
done
apply_bpe 8000 de en
binarise de en --joined-dictionary
