"Commands of `tinyvllm`, run in this process."
from tinyvllm.cli.main import main


def run_doctor(capsys, *args):
    "Exit code, standard output and standard error of `tinyvllm doctor` here, on the CPU."
    try:
        code = main(['doctor', '--device', 'CPU', *map(str, args)])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err
