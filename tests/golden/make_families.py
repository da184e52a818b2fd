"""Run tiny models in Hugging Face transformers and write down what they answer, for tests/test_llama.py.

    pip install -e '.[parity]'
    python tests/golden/make_families.py
"""
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from support.families import FAMILIES, IDS, TINY, weight  # noqa: E402


def run_family(
    name: str, # one of FAMILIES
    folder: str|Path, # transformers saves the model there
) -> tuple[dict, dict, np.ndarray]: # config.json, {tensor: shape}, logits of IDS (tokens, vocabulary)
    "Make the model in transformers with the weights of support/families.py, save it and run it in float32."
    import torch
    import transformers
    kind, overrides = FAMILIES[name]
    config = getattr(transformers, kind)(**TINY, **overrides)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for tensor, value in model.named_parameters():
            value.copy_(torch.from_numpy(weight(tensor, list(value.shape))))
        logits = model(torch.tensor([IDS])).logits[0].numpy()
    model.save_pretrained(folder)
    shapes = {tensor: list(value.shape) for tensor, value in model.named_parameters()}
    return json.loads((Path(folder)/'config.json').read_text()), shapes, logits


def main():
    "Write families.json (configurations, shapes) and families.npz (logits)."
    models, logits = {}, {}
    for name in FAMILIES:
        with TemporaryDirectory() as folder:
            config, shapes, logits[name] = run_family(name, folder)
        models[name] = {'config': config, 'shapes': shapes}
    lines = ',\n'.join(f' {json.dumps(name)}: {json.dumps(model)}' for name, model in models.items())
    (HERE/'families.json').write_text(f'{{\n{lines}\n}}\n')
    np.savez_compressed(HERE/'families.npz', **logits)


if __name__ == '__main__':
    main()
