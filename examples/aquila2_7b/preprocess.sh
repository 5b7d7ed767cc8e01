#!/usr/bin/env bash
# JSON lines to the .bin/.idx pair that pretrain.yaml names.
#   examples/aquila2_7b/preprocess.sh corpus.jsonl [more.jsonl ...] [--overwrite]
# OUTPUT_PREFIX, TOKENIZER_DIR (vocab.json, merges.txt, special_tokens.txt) and WORKERS may be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ $# -eq 0 ]]; then
    echo "usage: $0 corpus.jsonl [more.jsonl ...] [--overwrite]" >&2
    exit 2
fi
prefix=${OUTPUT_PREFIX:-data/aquila}
tokenizer=${TOKENIZER_DIR:-tokenizer}
mkdir -p "$(dirname "$prefix")"

exec "${PYTHON:-python}" tools/preprocess_data.py \
    --input "$@" \
    --json-keys text \
    --tokenizer-type AquilaTokenizer \
    --vocab-file "$tokenizer/vocab.json" \
    --merge-file "$tokenizer/merges.txt" \
    --special-tokens-file "$tokenizer/special_tokens.txt" \
    --append-eod \
    --workers "${WORKERS:-$(nproc)}" \
    --output-prefix "$prefix"
