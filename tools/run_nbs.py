"""Run notebooks top to bottom, each in a fresh process, and store their outputs.

    python tools/run_nbs.py                       # all of nbs/
    python tools/run_nbs.py nbs/01_greedy.ipynb   # some
    python tools/run_nbs.py --check               # write nothing; exit 1 if an output would change
    python tools/run_nbs.py --slow nbs/...        # also the cells marked `#| slow`

Cells that are not run here (`#| eval: false`, `#| slow`, `#| metal`, `#| cuda`, `#| bench`) keep
what is stored. `DEV=CPU python tools/run_nbs.py` picks tinygrad's device, as everywhere.
"""
import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.update(IN_TEST='1', PYTHONHASHSEED='0', COLUMNS='80',
                  MPLBACKEND='module://matplotlib_inline.backend_inline')
# Workers are spawned: they find the package through PYTHONPATH, before anything is imported.
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
sys.path.insert(0, str(ROOT))
SETUP_FIGURES = """
import matplotlib_inline.backend_inline as b
b.set_matplotlib_formats('png', metadata={'Software': None})
"""


def stored(cell, flags):
    "Is this cell's stored output kept: not code, `eval: false`, or marked with one of `flags`?"
    from nbdev.process import extract_directives
    if cell.cell_type != 'code':
        return True
    directives = extract_directives(cell, remove=False)
    return bool(flags & directives.keys()) or directives.get('eval:', [''])[0].lower() == 'false'


def run_one(path, flags):
    "Run one notebook: (path, seconds, text before, text after or None where a cell failed)."
    from execnb.nbio import nb2str, read_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    start = time.perf_counter()
    nb = read_nb(path)
    before = nb2str(nb)
    for cell in nb.cells:
        cell.skip_ = stored(cell, flags)
        if not cell.skip_:
            cell.outputs, cell.execution_count = [], None
    shell = CaptureShell(mpl_format='png')
    shell.set_path(path)
    shell._run(SETUP_FIGURES)
    os.chdir(path.parent)
    try:
        shell.run_all(nb, exc_stop=True, preproc=lambda cell: cell.skip_)
    except Exception:
        print(shell.prettytb(fname=path.name), file=sys.stderr)
        return path, time.perf_counter() - start, before, None
    clean_nb(nb, clean_ids=True)
    return path, time.perf_counter() - start, before, nb2str(nb)


def main():
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('nbs', nargs='*', type=Path)
    p.add_argument('--check', action='store_true', help='write nothing, exit 1 on a difference')
    p.add_argument('--slow', action='store_true', help='run the cells marked `#| slow` too')
    p.add_argument('-j', type=int, default=1, help='notebooks at a time (default 1)')
    a = p.parse_args()
    from nbdev.config import get_config
    os.chdir(ROOT)
    flags = set(get_config().tst_flags.split()) - ({'slow'} if a.slow else set())
    files = [f.resolve() for f in a.nbs] or sorted((ROOT/'nbs').glob('[0-9i]*.ipynb'))
    failed = differ = 0
    with ProcessPoolExecutor(a.j, mp_context=get_context('spawn'), max_tasks_per_child=1) as pool:
        for path, seconds, before, after in pool.map(run_one, files, [flags]*len(files)):
            state = 'failed' if after is None else 'changed' if after != before else 'same'
            print(f'{path.name}: {seconds:.1f}s {state}', flush=True)
            failed += state == 'failed'
            differ += state == 'changed'
            if state == 'changed' and not a.check:
                path.write_text(after, encoding='utf-8')
    return 1 if failed or (a.check and differ) else 0


if __name__ == '__main__':
    sys.exit(main())
