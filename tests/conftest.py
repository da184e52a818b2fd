"What all tests share: `--slow`, and an environment that is the same for every worker."
import os

import pytest

os.environ.setdefault('PYTHONHASHSEED', '0')
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow too')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; skipped unless --slow')


def pytest_collection_modifyitems(config, items):
    if not config.getoption('--slow'):
        for item in items:
            if item.get_closest_marker('slow'):
                item.add_marker(pytest.mark.skip(reason='slow: run with --slow'))
