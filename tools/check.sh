#!/usr/bin/env bash
# Format, lint, types, spelling: what pre-commit and CI run, so that green here is green there. Tools are run as modules
# of the python on PATH: where its packages are shared, the environment has no scripts of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python -m ruff format --check .
python -m ruff check .
python -m mypy
python -m codespell_lib
find csrc -name '*.cpp' -o -name '*.hpp' | sort | xargs python -c \
    'import sys, clang_format; sys.argv[1:1] = ["--dry-run", "--Werror"]; clang_format.clang_format()'
echo "all checks passed"
