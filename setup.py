"All metadata lives in settings.ini, which nbdev reads too; this file hands it to setuptools."
import shlex
from configparser import ConfigParser
from setuptools import setup, find_packages

config = ConfigParser(delimiters=['='], interpolation=None)
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lib = cfg['lib_path']


def words(key):
    "The shell-like words of one setting: requirements with spaces are quoted there."
    return shlex.split(cfg.get(key, ''))


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=open('README.md', encoding='utf-8').read(),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Developers',
        'Intended Audience :: Education',
        'Natural Language :: English',
        'Operating System :: POSIX :: Linux',
        'Operating System :: MacOS',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
    ],
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[lib, lib + '.*']),
    package_data={lib: ['data/*'], lib + '.kernels': ['*.h'], lib + '.server': ['static/*'],
                  lib + '.metalsim': ['rt.cpp', '*.h', 'include/*']},
    install_requires=words('requirements'),
    extras_require={name: words(name + '_requirements') for name in ('hub', 'plot', 'serve', 'dev', 'clients', 'parity')},
    entry_points={'console_scripts': words('console_scripts'), 'nbdev': [f'{lib}={lib}._modidx:d']},
)
