#!/usr/bin/env bash
# WikiText-103, tokenised already: binarised as it is, with a dictionary of all of its words.
#
#   prepare.sh --from FOLDER [--out FOLDER] [--workers N]
#
#   --from FOLDER   wiki.{train,valid,test}.tokens[.gz], the word-level release
#   --out FOLDER    where text/ and bin/ go (default: data/wikitext103)

source "$(dirname "${BASH_SOURCE[0]}")/../../translation/common.sh"
read_options "$@"
[ -z "$ARGUMENT" ] || fail "unexpected argument $ARGUMENT (see --help)"
[ -n "$FROM" ] || fail "--from FOLDER is missing: see the README for where the text is"
OUT="${OUT:-data/wikitext103}"
open_work

text collect "$FROM" "$WORK/text" train=wiki.train valid=wiki.valid test=wiki.test --langs tokens
binarise_text tokens
