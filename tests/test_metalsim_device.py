"The simulated device METAL under tinygrad: its generated kernels, raw Metal in the graph, TinyJit."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one')


def run(code, **env):
    "Run a script in a process of its own, on METAL."
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'DEV': 'METAL', **env}
    return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)


def test_metal_is_there():
    done = run('import tinyvllm; from tinygrad import Tensor; print((Tensor([1, 2]) + 1).tolist())')
    assert done.stdout == '[2, 3]\n', done.stderr
