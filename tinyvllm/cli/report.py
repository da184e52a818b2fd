"""`tinyvllm doctor --report FILE`: everything that can be checked and measured here, in one file for an issue.

A report has sections, a section has parts. The file is replaced as a whole after each part: a run that was interrupted
goes on where it stopped, if machine, device, versions and source are the same. A part that fails is written down, and
the rest goes on; one that ends the process is tried once more. A section ends with its time, and the parts that it
leaves are run next time.
"""
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from math import isfinite
from pathlib import Path

from tqdm import tqdm

from tinyvllm.cli.doctor import is_simulated
from tinyvllm.cli.report_sections import SECTIONS, Plan, Section, identity
from tinyvllm.device import write_atomically
from tinyvllm.errors import BadInput

__all__ = ['FORMAT', 'ISSUES', 'VERSION', 'OutOfTime', 'Report', 'Task', 'format_summary', 'list_tasks',
           'read_report', 'remove_private', 'run_task', 'write_report']

FORMAT, VERSION = 'tinyvllm report', 1
MOST_ATTEMPTS = 2   # to run a part: what crashes twice is left out
CRASHED = dict(ok=False, wrong=f'the program ended {MOST_ATTEMPTS} times while this ran: a crash, or Ctrl-C')
ISSUES = 'https://github.com/tinyvllm/tinyvllm/issues/new'


class OutOfTime(BaseException):
    "The time of a section is over. No `Exception`: a kernel's check would write it down as the kernel's failure."


def read_report(path: Path) -> dict:
    "Return what a report's file holds. Raises `BadInput` for a file that is none."
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or 'no JSON'
        raise BadInput(f'{path} is no report of tinyvllm ({reason}); choose another file') from None
    if not isinstance(content, dict) or content.get('format') != FORMAT or not {'about', 'sections'} <= content.keys():
        raise BadInput(f'{path} is no report of tinyvllm; choose another file')
    if content.get('version') != VERSION:
        raise BadInput(f'{path} has version {content.get("version")} of reports, and this is {VERSION}; '
                       'choose another file')
    return content


class Report:
    "The file, and what it holds: it is valid JSON at every moment."

    def __init__(self,
        path: str | Path, # of the file; made if it is not there
        about: dict, # what `identity` returns: parts of another machine, device or version are no part of it
        restart: bool = False, # forget what the file holds
    ):
        "Open or begin the file. Raises `BadInput` if it is no report, another machine's, or not writable."
        self.path = Path(path)
        stored = read_report(self.path) if self.path.exists() else None
        if stored and not restart:
            self.check_same(stored['about'], about)
        fresh = dict(format=FORMAT, version=VERSION, date=date.today().isoformat(), about=about, sections={})
        self.content = stored if stored and not restart else fresh
        self.write()

    def check_same(self, stored: dict, about: dict) -> None:
        "Raises `BadInput` with what differs between the file and this run."
        changed = [f'{key} was {stored.get(key)}, is {about.get(key)}' for key in sorted(stored.keys() | about.keys())
                   if stored.get(key) != about.get(key)]
        if changed:
            raise BadInput(f'{self.path} is about something else: {"; ".join(changed)}. Choose another file name, '
                           'or --restart to begin the file anew')

    def result(self, section: str, part: str) -> dict | None:
        "Return the finished result of a part; None where it failed to run, had no time, or never began."
        found = self.content['sections'].get(section, {}).get(part, {})
        return found if found.get('ok') is not None and 'error' not in found else None

    def begin(self, section: str, part: str) -> int:
        "Note in the file that a part runs now; return how often it has begun and not ended."
        attempts = self.content['sections'].get(section, {}).get(part, {}).get('attempts', 0) + 1
        self.add(section, part, dict(attempts=attempts))
        return attempts

    def add(self, section: str, part: str, result: dict) -> None:
        "Store the result of a part, and replace the file."
        self.content['sections'].setdefault(section, {})[part] = result
        self.write()

    def write(self) -> None:
        "Replace the file as a whole. Raises `BadInput` where that is not possible."
        try:
            write_atomically(self.path, json.dumps(self.content, indent=1) + '\n')
        except OSError as error:
            raise BadInput(f'{self.path} cannot be written ({error.strerror}); choose another file name') from None

    @property
    def wrong(self) -> dict[str, str]:
        "Parts that are not as they should be, and why."
        return {f'{section}, {part}': result.get('error') or result.get('wrong', 'not as it should be')
                for section, parts in self.content['sections'].items() for part, result in parts.items()
                if result.get('ok') is False}

    @property
    def stopped(self) -> list[str]:
        "Parts that had no time."
        return [f'{section}, {part}' for section, parts in self.content['sections'].items()
                for part, result in parts.items() if 'stopped' in result]


@dataclass(frozen=True)
class Task:
    "A part that a run of the report has to do."
    section: str
    part: str
    run: Callable[[Callable], dict]   # takes a function to call now and then; returns a result
    budget: float                     # seconds from the start of the run, after which it stops


def list_tasks(sections: tuple[Section, ...], plan: Plan) -> list[Task]:
    "List the parts of all sections. What a section leaves of its time is the next one's."
    tasks, budget = [], 0.0
    for section in sections:
        budget += section.seconds
        try:
            parts = section.list_parts(plan)
        except Exception as error:   # a list that cannot be made is one part that fails
            parts = {'all': fail_with(error)}
        tasks += [Task(section.name, part, run, budget) for part, run in parts.items()]
    return tasks


def fail_with(error: Exception) -> Callable:
    "Return a part that raises an error."
    def run(tick):
        raise error
    return run


def run_task(
    task: Task, # what to do
    start: float, # of the run, by `time.monotonic`
    is_timed: bool = True, # do times mean anything on this device?
) -> dict: # 'ok' and what the part returns; or 'error', or 'stopped'
    "Run a part until its time is over; what it raises is its result."
    begun = time.monotonic()

    def tick():
        if time.monotonic() > start + task.budget:
            raise OutOfTime
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        try:
            tick()
            result = dict(ok=True) | task.run(tick)
        except OutOfTime:
            result = dict(stopped=f'after {time.monotonic() - begun:.0f} s: the time of this section was over')
        except Exception as error:   # whatever a compiler, a driver or a kernel raises
            result = dict(ok=False, error=str(error).strip() or type(error).__name__)
    if warned:   # such as a kernel that was refused, so that portable operations run
        result['warnings'] = [remove_private(str(w.message)) for w in warned]
    for key, value in result.items():
        if key in ('error', 'wrong', 'note'):
            result[key] = remove_private(value)
        elif isinstance(value, float) and not isfinite(value):   # JSON has no word for it
            result[key] = None
    return result | (dict(seconds=round(time.monotonic() - begun, 2)) if is_timed else {})


def remove_private(text: str) -> str:
    "Remove folders, the user's name and the host's name from a message."
    for folder in Path(__file__).parents[2], Path.cwd(), Path.home():   # they may hold spaces
        text = text.replace(f'{folder}/', '/')
    text = re.sub(r'''(?<![\w/.:])~?/(?:[^\s/'"():,]+/)*''', '', text)
    names = {Path.home().name, os.environ.get('USER'), os.environ.get('LOGNAME'), platform.node(),
             platform.node().partition('.')[0]}
    for name in sorted(filter(None, names), key=len, reverse=True):
        text = re.sub(rf'\b{re.escape(name)}\b', 'NAME', text)
    return text


def write_report(
    path: str | Path, # of the file
    plan: Plan, # what to run
    restart: bool = False, # forget what the file holds
    sections: tuple[Section, ...] = SECTIONS, # in this order
) -> Report:
    "Run what the file lacks, and store each result at once. Raises `BadInput` for a file that cannot be used."
    report = Report(path, identity(plan), restart)
    tasks, start = list_tasks(sections, plan), time.monotonic()
    with tqdm(tasks, unit='part', disable=None) as bar:
        for task in bar:
            bar.set_description(f'{task.section}: {task.part}')
            if report.result(task.section, task.part) is None:
                crashed = report.begin(task.section, task.part) > MOST_ATTEMPTS
                result = CRASHED if crashed else run_task(task, start, not is_simulated(plan.device))
                report.add(task.section, task.part, result)
    return report


def format_summary(report: Report) -> str:
    "Format what was found and what to do with the file: the last lines that a user sees."
    lines = []
    for section, parts in report.content['sections'].items():
        seconds = sum(result.get('seconds', 0) for result in parts.values())
        right = sum(result.get('ok') is True for result in parts.values())
        skipped = next((result['skipped'] for result in parts.values() if 'skipped' in result), None)
        took = f', {seconds:.0f} s' if seconds else ''
        found = f'skipped: {skipped}' if skipped else f'{right:3} of {len(parts)} right{took}'
        lines.append(f'{section:10} {found}')
    lines += [f'wrong: {name}: {why.splitlines()[0][:200]}' for name, why in report.wrong.items()]
    if report.stopped:
        lines.append(f'no time for {"; ".join(report.stopped)}: the same command again goes on there')
    held = 'holds the rest' if report.stopped else 'is complete'
    lines += [f'{report.path} {held}. Please attach it to an issue: {ISSUES}',
              'It holds no user name, host name or folder; read it first if you like.']
    return '\n'.join(lines)
