#!/usr/bin/env bash
# Everything CI runs: `make test` calls it inside the project's own environment.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }
state() { cksum nbs/*.ipynb README.md _quarto.yml benchmarks/README.md $(find tinyvllm -name '*.py'); }

say 'notebooks, package, sidebar and README agree'
before=$(state)
nbdev_export
nbdev_clean
python tools/chapters.py
python tools/readme.py
python tools/benchmarks.py
diff <(echo "$before") <(state) || {
  echo 'out of sync: the files above were rewritten from the notebooks; look at the change and commit it'
  exit 1
}

say 'notebooks keep the shape of the course'
python tools/nbcheck.py

say 'site'
python tools/docs.py --engine smalldocs --strict

say 'tests: everything in tests/, with each notebook in a Jupyter kernel'
python -m pytest -q -n 2 --dist worksteal --durations=10 tests "$@"
