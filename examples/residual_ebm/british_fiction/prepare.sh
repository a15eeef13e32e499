#!/usr/bin/env bash
# British fiction: sentences of novels in reading order, tokenised, byte-pair codes of 3,000 merges.
#
#   prepare.sh [SENTENCES] --from FOLDER [--out FOLDER] [--workers N]
#
#   SENTENCES       how many sentences of the training text to take (default: 80000, which two cores can train on)
#   --from FOLDER   {train,valid,test}.txt[.gz], one sentence per line in reading order, split by novel
#   --out FOLDER    where text/ and bin/ go (default: data/british_fiction)

source "$(dirname "${BASH_SOURCE[0]}")/../../translation/common.sh"
read_options "$@"
SENTENCES="${ARGUMENT:-80000}"
[[ "$SENTENCES" =~ ^[1-9][0-9]*$ ]] || fail "SENTENCES is not a positive number: $SENTENCES"
[ -n "$FROM" ] || fail "--from FOLDER is missing: see the README for where the novels are"
OUT="${OUT:-data/british_fiction}"
open_work

text collect "$FROM" "$WORK/raw" train=train valid=valid test=test --langs txt
text head "$WORK/raw/train.txt" "$WORK/raw/train.txt" --lines "$SENTENCES"
for split in train valid test; do
    text tokenize "$WORK/raw/$split.txt" "$WORK/tok/$split.txt" --lang en --normalize --split-hyphens --workers "$WORKERS"
done
apply_bpe 3000 txt
binarise_text txt
