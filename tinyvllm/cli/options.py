"What the commands share: a parser, options of models and of sampling, checks of numbers."
import argparse

from tinyvllm.errors import BadInput


class Parser(argparse.ArgumentParser):
    "An argument parser whose errors are one line."

    def error(self, message):
        "Print one line and exit with 2."
        self.exit(2, f'{self.prog}: error: {message} (see {self.prog} --help)\n')


def add_commands(commands, table: list) -> None:
    "Add a parser for each (function, name, text, examples, what adds its options)."
    for run, name, text, examples, add_options in table:
        p = commands.add_parser(name, help=text, description=text, epilog=examples,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        p.set_defaults(run=run)
        add_options(p)


def device_option(p: Parser) -> None:
    "`--device`."
    p.add_argument('--device', help='METAL, CUDA, CPU, ...; default: the best there is (or $DEV)')


def model_options(p: Parser, more: str = '') -> None:
    "`--model`, `--dtype`, `--quant`, `--device`."
    p.add_argument('--model', default='smollm2', help=f'a name, a folder or a .gguf file; {more}default smollm2')
    p.add_argument('--dtype', default='auto', choices=['auto', 'float32', 'float16', 'bfloat16'],
                   help='of weights that are not quantised; auto: as stored on the CPU, else float16')
    p.add_argument('--quant', '--quantization', metavar='Q',
                   help='quantise the weights: int8, int4-g32, ...; default: the numbers that are stored')
    device_option(p)


def sampling_options(p: Parser, max_tokens: int) -> None:
    "What `SamplingParams` takes."
    p.add_argument('--max-tokens', type=int, default=max_tokens, metavar='N', help=f'default {max_tokens}')
    p.add_argument('--temperature', type=float, default=0.0, metavar='T', help='0 is greedy; default 0')
    p.add_argument('--top-k', type=int, default=0, metavar='K', help='keep the K likeliest; 0 is all')
    p.add_argument('--top-p', type=float, default=1.0, metavar='P', help='keep the likeliest until they sum to P')
    p.add_argument('--min-p', type=float, default=0.0, metavar='P', help='keep what is P times the likeliest')
    p.add_argument('--repetition-penalty', type=float, default=1.0, metavar='R', help='above 1: repeat less')
    p.add_argument('--presence-penalty', type=float, default=0.0, metavar='A', help='subtract A from the logit of a token that occurred')
    p.add_argument('--frequency-penalty', type=float, default=0.0, metavar='A', help='the same for each time that it occurred')
    p.add_argument('--seed', type=int, metavar='N', help='same seed, same text')
    p.add_argument('--stop', action='append', default=[], metavar='TEXT', help='end before TEXT; repeatable')
    p.add_argument('--ignore-eos', action='store_true', help="go on after the model's end token")


def sampling_params(args):
    "The request's `SamplingParams`; raises `BadInput`."
    from tinyvllm.sampling.params import SamplingParams
    names = ('max_tokens temperature top_k top_p min_p repetition_penalty presence_penalty '
             'frequency_penalty seed ignore_eos').split()
    return SamplingParams(**{n: getattr(args, n) for n in names}, stop=tuple(args.stop))


def check_least(args, **least: int) -> None:
    "Refuse numbers that are too small; raises `BadInput`."
    for name, low in least.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < low:
                raise BadInput(f'--{name.replace("_", "-")} is {value}; use {low} or more')
