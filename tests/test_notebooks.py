"Every notebook runs top to bottom as `nbdev_test` runs it, each in a process of its own."
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
RUN = 'import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], n_workers=0)'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook):
    done = subprocess.run([sys.executable, '-c', RUN, str(notebook)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 'Success.' in done.stdout, done.stdout + done.stderr
