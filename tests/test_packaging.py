"A wheel built from this folder, installed beside nothing of ours, starts and says who it is."
import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ['settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md', 'tinyvllm']


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel built from a copy of the sources, so that nothing is left in the checkout."
    folder = tmp_path_factory.mktemp('wheel')
    for name in SOURCES:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', 'dist', '.'], cwd=folder, check=True)
    return next((folder / 'dist').glob('*.whl'))


@pytest.fixture(scope='module')
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(unpacked, *args, **env):
    "Run Python with the unpacked wheel first on its path, away from the checkout."
    env = {**os.environ, 'PYTHONPATH': str(unpacked), **env}
    return subprocess.run([sys.executable, *args], cwd=unpacked, env=env, capture_output=True, text=True)


def metadata(unpacked, name='METADATA'):
    return next(unpacked.glob(f'*.dist-info/{name}')).read_text(encoding='utf-8')


def test_wheel_holds_the_package_and_nothing_else(wheel, unpacked):
    assert {p.name for p in unpacked.iterdir()} == {'tinyvllm', f'tinyvllm-{version()}.dist-info'}
    assert files(unpacked / 'tinyvllm', '**/*.py') == files(ROOT / 'tinyvllm', '**/*.py')
    assert files(unpacked / 'tinyvllm/metalsim') == files(ROOT / 'tinyvllm/metalsim')
    assert files(unpacked / 'tinyvllm/kernels', '*.h') == files(ROOT / 'tinyvllm/kernels', '*.h') == {Path('msl_cuda.h'), Path('ptx.h'), Path('vectors.h')}
    assert (unpacked / 'tinyvllm/data/ladder.jsonl').read_bytes() == (ROOT / 'nbs/ladder.jsonl').read_bytes()
    assert (unpacked / 'tinyvllm/data/smollm2_golden.json').read_bytes() == (ROOT / 'tests/golden/smollm2.json').read_bytes()
    assert wheel.name == f'tinyvllm-{version()}-py3-none-any.whl' and wheel.stat().st_size < 1_000_000


def files(folder, pattern='**/*'):
    "What lies in a folder, by its path in it; without what Python leaves there."
    return {p.relative_to(folder) for p in folder.glob(pattern) if p.is_file() and '__pycache__' not in p.parts}


def test_sources_of_the_metal_simulator_are_in_the_source_archive(tmp_path):
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('.'))"
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, capture_output=True, text=True)
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        names = set(archive.getnames())
    wanted = {f'tinyvllm-{version()}/tinyvllm/metalsim/{p}' for p in files(ROOT / 'tinyvllm/metalsim')}
    wanted.add(f'tinyvllm-{version()}/tinyvllm/kernels/msl_cuda.h')
    assert len(wanted) > 15 and not wanted - names


def version():
    config = configparser.ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']['version']


def test_metadata(unpacked):
    text = metadata(unpacked)
    for line in ['Requires-Python: >=3.11', 'License: Apache-2.0', 'License-File: LICENSE',
                 'Requires-Dist: tinygrad==0.14.0', 'Requires-Dist: ziglang==0.17.1; sys_platform == "linux"',
                 'Provides-Extra: dev', 'Provides-Extra: parity', 'Description-Content-Type: text/markdown']:
        assert line in text
    assert 'tinyvllm = tinyvllm.cli.main:main' in metadata(unpacked, 'entry_points.txt')


def test_version_is_the_same_everywhere(unpacked):
    out = run(unpacked, '-c', 'import tinyvllm; print(tinyvllm.__version__, tinyvllm.__file__)').stdout.split()
    assert out[0] == version() and Path(out[1]).is_relative_to(unpacked)
    assert f'\nVersion: {version()}\n' in metadata(unpacked)


def test_every_module_imports_from_the_wheel(unpacked):
    code = """
import importlib, pathlib, tinyvllm
folder = pathlib.Path(tinyvllm.__file__).parent
for path in sorted(folder.rglob('*.py')):
    if path.stem not in ('__init__', '__main__', '_modidx'):
        name = '.'.join(path.relative_to(folder.parent).with_suffix('').parts)
        assert importlib.import_module(name).__doc__, path
"""
    done = run(unpacked, '-c', code, DEV='CPU')
    assert done.returncode == 0, done.stderr


def test_the_command_line_answers(unpacked):
    done = run(unpacked, '-m', 'tinyvllm', '--help')
    assert done.returncode == 0 and 'generate' in done.stdout and not done.stderr


def test_runtime_needs_no_development_package(unpacked):
    "nbdev and fastcore are for authors: importing the package must not pull them in."
    code = """
import sys, importlib, pathlib, tinyvllm
folder = pathlib.Path(tinyvllm.__file__).parent
for path in folder.rglob('*.py'):
    if path.stem in ('__init__', '__main__', '_modidx', 'ops_metal'): continue
    importlib.import_module('.'.join(path.relative_to(folder.parent).with_suffix('').parts))
print([m for m in ('nbdev', 'fastcore', 'IPython', 'torch', 'transformers', 'matplotlib') if m in sys.modules])
"""
    assert run(unpacked, '-c', code, DEV='CPU').stdout.strip() == '[]'
