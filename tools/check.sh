#!/usr/bin/env bash
# Format, lint, types, spelling: what pre-commit and CI run, so that green here is green there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ruff format --check .
ruff check .
mypy
codespell
find csrc -name '*.cpp' -o -name '*.hpp' | sort | xargs -r clang-format --dry-run --Werror
echo "all checks passed"
