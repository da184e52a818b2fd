"""Notebooks run top to bottom as `nbdev_test` runs them, each in a process of its own.

test_jupyter.py runs the same cells of every notebook in a kernel, so that without `--slow` a few are enough.
"""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FEW = ['index', '02_paging', '03_batching']
NOTEBOOKS = [pytest.param(path, id=path.stem, marks=[] if path.stem in FEW else pytest.mark.slow)
             for path in sorted((ROOT / 'nbs').glob('*.ipynb'))]
RUN = 'import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], n_workers=0)'


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_notebook(notebook):
    done = subprocess.run([sys.executable, '-c', RUN, str(notebook)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 'Success.' in done.stdout, done.stdout + done.stderr
