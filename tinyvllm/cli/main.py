"The command line: `tinyvllm pull | generate | chat | serve | top | bench | doctor | info`."
import argparse
import json
import os
import platform
import sys
from contextlib import suppress

from tinyvllm import __version__
from tinyvllm.cli import bench, generate, serve, top
from tinyvllm.cli.options import Parser, add_commands, check_least, device_option
from tinyvllm.errors import BadInput, DeviceError

# Modules that import tinygrad are imported inside the commands: `--device` must be settled first,
# and `--help` must not take a second.

CASES = 20   # of each kernel and dtype

EXAMPLES = """\
examples:
  tinyvllm generate "The capital of France is"     complete a text with the default model
  tinyvllm chat                                    talk to it
  tinyvllm serve                                   let others talk to it: an OpenAI server
  tinyvllm info                                    what this machine has
  tinyvllm bench                                   how fast it is, beside the stored results
  tinyvllm doctor                                  is every kernel right here?
  tinyvllm doctor --report mac.json                all of that in one file, to attach to an issue"""

PULL_EXAMPLES = """\
examples:
  tinyvllm pull                                    SmolLM2-135M-Instruct, the default model (93 MB)
  tinyvllm pull HuggingFaceTB/SmolLM2-360M         a Hugging Face repository (needs tinyvllm[hub])"""

DOCTOR_EXAMPLES = """\
examples:
  tinyvllm doctor                                  every kernel on this machine, in a minute or two
  tinyvllm doctor --cases 200                      as thoroughly as a release
  tinyvllm doctor --kernel softmax.decode          one of them; `softmax` is all of that module
  tinyvllm doctor --device METAL                   on Linux: simulated, with races and bounds checked
  tinyvllm doctor --json > doctor.json             for a program
  tinyvllm doctor --report mac.json                all that can be checked and measured, in one file

A report holds facts of the machine, a test of the compiler, every kernel's check and timing, memory bandwidth, greedy
tokens beside those of transformers, counts for each token, and rows of the ladder. It takes at most 10 minutes, and
the download of the default model (93 MB) before. Interrupt it whenever you like: the same command goes on where it
stopped, and runs again what could not run. The file holds no user name, host name or folder, and nothing is sent:
attach it to an issue yourself. https://tinyvllm.github.io/tinyvllm/mac.html explains each number.

exit code: 0 if everything is right, 1 if something is not, 2 if there is no kernel for the device or a wrong option"""

INFO_EXAMPLES = """\
examples:
  tinyvllm info
  tinyvllm info --device CPU"""


def parser() -> Parser:
    "The commands and their options."
    root = Parser('tinyvllm', description='Run language models on tinygrad.', epilog=EXAMPLES,
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    root.add_argument('--version', action='version', version=f'tinyvllm {__version__}')
    commands = root.add_subparsers(dest='command', required=True, metavar='COMMAND')
    add_commands(commands, [
        (pull, 'pull', 'Download a model into the cache.', PULL_EXAMPLES, pull_options),
        (generate.generate, 'generate', 'Complete a text, word by word, or all texts of a file.',
         generate.GENERATE_EXAMPLES, generate.generate_options),
        (generate.chat, 'chat', 'Talk to a model, with its own chat template.', generate.CHAT_EXAMPLES,
         generate.chat_options),
        (serve.serve, 'serve', 'Answer over HTTP, as OpenAI does.', serve.EXAMPLES, serve.serve_options),
        (top.top, 'top', 'Watch a running server.', top.EXAMPLES, top.top_options),
        (None, 'bench', 'Measure: the ladder, decoding, prefill, a trace of requests.', bench.EXAMPLES,
         bench.bench_commands),
        (doctor, 'doctor', 'Check every kernel on this device against float64; with --report, measure everything too.',
         DOCTOR_EXAMPLES, doctor_options),
        (info, 'info', 'Show device, compiler, bandwidth, cache and models.', INFO_EXAMPLES, device_option)])
    return root


def pull_options(p: Parser) -> None:
    "What to fetch."
    p.add_argument('name', nargs='?', default='smollm2', help='smollm2 (the default), or org/name of the Hub')


def doctor_options(p: Parser) -> None:
    "Which kernels, how many cases."
    p.add_argument('--cases', type=int, metavar='N', help=f'random cases of each kernel and dtype; default {CASES}')
    p.add_argument('--kernel', metavar='NAME', help='this one only: module, module.function, or a name of the table')
    p.add_argument('--seed', type=int, metavar='N', help='same seed, same cases; default 0')
    p.add_argument('--json', action='store_true', help='print a list of objects instead of a table')
    p.add_argument('--report', metavar='FILE', help='check and measure everything, and write it into FILE, part by '
                   'part; a FILE that is there already is completed')
    p.add_argument('--restart', action='store_true', help='with --report: forget what FILE holds')
    device_option(p)


def pull(args) -> None:
    "`tinyvllm pull`: print where the model is."
    from tinyvllm.models.hub import pull
    print(pull(args.name))


def doctor(args) -> int:
    "`tinyvllm doctor`: check the kernels of a device and print a table for an issue; 1 if one fails."
    from tinygrad import Device
    from tinyvllm.cli.doctor import diagnose, format_table, heading
    check_least(args, cases=1, seed=0)
    if args.report or args.restart:
        return report(args)
    seed = args.seed or 0
    rows = list(diagnose(Device.DEFAULT, args.cases or CASES, args.kernel, seed))
    if args.json:
        for row in rows:
            if row.trouble:
                print(f'{row.kernel}: {row.trouble}', file=sys.stderr)
    print(json.dumps([row.as_json() for row in rows]) if args.json else
          f'{heading(Device.DEFAULT, seed)}\n\n{format_table(rows)}')
    return 0 if all(row.ok for row in rows) else 1


def report(args) -> int:
    "`tinyvllm doctor --report`: write the file, print what to do with it; 1 if something is wrong."
    if not args.report:
        raise BadInput('--restart begins a report anew; name its file with --report')
    given = [f'--{name}' for name in ('cases', 'kernel', 'seed') if getattr(args, name) is not None]
    given += ['--json'] if args.json else []
    if given:
        raise BadInput(f'--report checks everything, always alike, and writes JSON; leave {" and ".join(given)} out')
    from tinygrad import Device
    from tinyvllm.cli.report import format_summary, write_report
    from tinyvllm.cli.report_sections import Plan
    plan = Plan(Device.DEFAULT)
    with suppress(BadInput):   # a download is no part of the ten minutes; parts that need the model report its failure
        plan.fetch()
    try:
        found = write_report(args.report, plan, args.restart)
    except KeyboardInterrupt:
        print(f'{args.report} holds what is done; the same command goes on there', file=sys.stderr)
        raise
    print(format_summary(found))
    return 1 if found.wrong else 0


def info(args) -> None:
    "`tinyvllm info`: what a bug report should hold."
    from importlib.metadata import version
    from tinygrad import Device
    from tinyvllm.device import cache_dir, compiler_name, probe_metal, why_no_metal
    from tinyvllm.cli.doctor import is_simulated
    from tinyvllm.measure import bandwidth, machine_name
    from tinyvllm.models.hub import models_found
    device = Device.DEFAULT
    speed = 'none: METAL is simulated here' if is_simulated(device) else f'{bandwidth(device) / 1e9:.1f} GB/s measured'
    if device.startswith('CPU'):
        speed += ', one core'
    rows = [('tinyvllm', __version__), ('tinygrad', version('tinygrad')), ('python', platform.python_version()),
            ('device', f'{device} ({machine_name(device)})'), ('compiler', compiler_name()),
            ('bandwidth', speed), ('cache', str(cache_dir()))]
    if device.startswith('METAL'):
        rows.insert(4, ('gpu family', Device[device].arch))
    elif sys.platform == 'darwin':
        reason = why_no_metal(probe_metal(), platform.mac_ver()[0])
        rows.insert(4, ('METAL', reason or 'would run here: --device METAL'))
    rows += [('model', f'{name}  {size/1e6:.0f} MB  {path}') for name, path, size in models_found()]
    if rows[-1][0] != 'model':
        rows.append(('model', 'none yet; `tinyvllm pull` fetches the default one'))
    print('\n'.join(f'{key:10} {value}' for key, value in rows))


def use_device(name: str | None) -> None:
    "Make `--device` tinygrad's default and open it; raises `BadInput` if that fails."
    if name:
        os.environ['DEV'] = name.upper()
    from tinygrad import Device
    try:
        Device[Device.DEFAULT]
    except Exception as error:   # each backend fails in its own way
        reason = str(error).strip().split('\n')[0] or type(error).__name__
        raise BadInput(f'device {name or Device.DEFAULT!r} cannot be used here: {reason}; '
                       '`--device CPU` works everywhere') from None


def main(argv: list[str] | None = None) -> int:
    "Run a command; a user's mistake is one line and exit code 2."
    args = parser().parse_args(bench.default_bench(sys.argv[1:] if argv is None else argv))
    try:
        if hasattr(args, 'device'):
            use_device(args.device)
        return args.run(args) or 0
    except BrokenPipeError:   # `tinyvllm ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (BadInput, OSError, FloatingPointError, DeviceError) as error:   # the third: weights that hold NaN
        print(f'tinyvllm: error: {error}', file=sys.stderr)
        return 1 if isinstance(error, DeviceError) else 2
    except MemoryError:
        print('tinyvllm: error: not enough memory; ask for fewer tokens, or use --dtype float16',
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
