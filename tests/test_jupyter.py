"Every notebook runs in a Jupyter kernel of its own, where nothing was imported before it and there is no clang."
import importlib.util
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbdev.config import get_config
from nbdev.process import extract_directives

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
FLAGS = set(get_config(path=ROOT).tst_flags.split())
CHOICES = ('DEV', 'CC', 'CACHEDB')  # what `import tinyvllm` chose in this process


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    "This process's environment without tinyvllm's choices and, where the ziglang wheel stands in, without clang."
    env = {key: value for key, value in os.environ.items() if key not in CHOICES}
    env.update(IN_TEST='1', PYTHONPATH=str(ROOT), IPYTHONDIR=str(tmp_path_factory.mktemp('ipython')))
    env.pop('MPLBACKEND', None)  # the kernel's own, which draws into the notebook
    if importlib.util.find_spec('ziglang'):
        env['PATH'] = os.pathsep.join(str(without_clang(folder, tmp_path_factory)) for folder in env['PATH'].split(os.pathsep))
    return env


def without_clang(folder, tmp_path_factory):
    "The folder, or one of links to all its files except the compilers when clang is among them."
    if not list(Path(folder).glob('clang*')):
        return folder
    links = tmp_path_factory.mktemp('bin')
    for file in Path(folder).iterdir():
        if not file.name.startswith('clang'):
            (links / file.name).symlink_to(file)
    return links


def is_skipped(cell):
    "Does nbdev_test skip this cell?"
    if cell.cell_type != 'code':
        return False
    directives = extract_directives(cell, remove=False)
    return bool(FLAGS & directives.keys()) or directives.get('eval:') == ['false'] or 'nbdev_export(' in cell.source


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(notebook, environment):
    content = nbformat.read(notebook, as_version=4)
    content.cells = [cell for cell in content.cells if not is_skipped(cell)]
    client = NotebookClient(content, timeout=900, kernel_name='python3', resources={'metadata': {'path': notebook.parent}})
    client.execute(env=environment)
    assert all(cell.execution_count for cell in content.cells if cell.cell_type == 'code' and cell.source)
