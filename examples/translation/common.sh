# Shell functions of the translation recipes; every prepare.sh sources this file.
set -euo pipefail
export PYTHONUTF8=1  # the data are UTF-8 whatever the locale

HELPERS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

fail() { echo "error: $*" >&2; exit 1; }
text() { "${PYTHON:-python3}" "$HELPERS/prepare_text.py" "$@"; }
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# Sets FROM, OUT, WORKERS and ARGUMENT (one positional argument, where the recipe has one).
read_options() {
    FROM="" OUT="" ARGUMENT="" WORKERS="$(getconf _NPROCESSORS_ONLN)"
    while [ $# -gt 0 ]; do
        case "$1" in
            -h|--help) usage; exit 0 ;;
            --from|--out|--workers) case "${2:---}" in --*) fail "$1 needs a value" ;; esac ;;
            -*) fail "unknown option $1 (see --help)" ;;
        esac
        case "$1" in
            --from) FROM="$2"; shift 2 ;;
            --out) OUT="$2"; shift 2 ;;
            --workers) WORKERS="$2"; shift 2 ;;
            *) [ -z "$ARGUMENT" ] || fail "unexpected argument $1 (see --help)"; ARGUMENT="$1"; shift ;;
        esac
    done
    [ -z "$FROM" ] || [ -d "$FROM" ] || fail "--from: no such folder: $FROM"
    [[ "$WORKERS" =~ ^[1-9][0-9]*$ ]] || fail "--workers: not a positive number: $WORKERS"
}

# Everything is made in a temporary folder beside the final one: a run that stops half-way leaves the old data as they were.
open_work() {
    local program old
    for program in subword-nmt fairseq-preprocess; do
        command -v "$program" > /dev/null || fail "$program is not on PATH (pip install subword-nmt sacremoses; activate fairseq's environment)"
    done
    for old in text bin; do
        [ ! -e "$OUT/$old" ] || [ -e "$OUT/$old/.prepared" ] || fail "$OUT/$old is not an earlier run's: choose another --out"
    done
    mkdir -p "$OUT"
    WORK="$(mktemp -d "$OUT/.preparing.XXXXXX")"
    trap 'rm -rf "$WORK"' EXIT
}

is_whole() {
    case "$2" in
        *.gz|*.tgz) gzip -t "$1" 2> /dev/null ;;
        *.zip) "${PYTHON:-python3}" -m zipfile -t "$1" > /dev/null 2>&1 ;;
    esac
}

# download URL FILE: FILE is kept for the next run and appears only when the transfer is complete and the archive is sound.
download() {
    [ ! -s "$2" ] || return 0
    mkdir -p "$(dirname "$2")"
    echo "downloading $1"
    curl --fail --location --silent --show-error --retry 2 --user-agent "fairseq-earm recipe" --output "$2.part" "$1" \
        || fail "cannot download $1 (fetch it by hand and pass its folder with --from)"
    is_whole "$2.part" "$2" || fail "$1 did not answer with a sound archive (fetch it by hand and pass its folder with --from)"
    mv "$2.part" "$2"
}

# apply_bpe MERGES LANG...: byte-pair codes of WORK/tok/train in all languages, applied to all of WORK/tok, into WORK/text.
apply_bpe() {
    local merges="$1" split lang
    shift
    mkdir -p "$WORK/text"
    echo "learning $merges merges"
    for lang in "$@"; do cat "$WORK/tok/train.$lang"; done | subword-nmt learn-bpe -s "$merges" > "$WORK/text/codes" 2> "$WORK/bpe.log" \
        || { tail -3 "$WORK/bpe.log" >&2; fail "subword-nmt learn-bpe failed"; }
    for split in train valid test; do
        for lang in "$@"; do
            subword-nmt apply-bpe -c "$WORK/text/codes" < "$WORK/tok/$split.$lang" > "$WORK/text/$split.$lang"
        done
    done
}

# binarise SOURCE TARGET [OPTIONS]: WORK/text -> WORK/bin, then both take the place of an earlier run's.
binarise() {
    local source="$1" target="$2"
    shift 2
    preprocess "" -s "$source" -t "$target" "$@"
    text check "$WORK" --langs "$source" "$target"
    publish
}

# binarise_text LANG [OPTIONS]: the same for text in one language, WORK/text/{train,valid,test}.LANG.
binarise_text() {
    local lang="$1"
    shift
    preprocess ".$lang" --only-source "$@"
    text check "$WORK" --langs "$lang"
    publish
}

preprocess() {
    local ending="$1"
    shift
    echo "binarising"
    fairseq-preprocess --destdir "$WORK/bin" --workers "$WORKERS" --trainpref "$WORK/text/train$ending" \
        --validpref "$WORK/text/valid$ending" --testpref "$WORK/text/test$ending" "$@" > "$WORK/preprocess.log" 2>&1 \
        || { tail -3 "$WORK/preprocess.log" >&2; fail "fairseq-preprocess failed"; }
}

publish() {
    touch "$WORK/text/.prepared" "$WORK/bin/.prepared"
    rm -rf "$OUT/text" "$OUT/bin"
    mv "$WORK/text" "$WORK/bin" "$OUT/"
    echo "ready: $OUT/bin"
}
