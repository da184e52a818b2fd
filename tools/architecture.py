"""The package as a graph: which module imports which, drawn by folders, checked by tests/test_architecture.py."""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. A module imports only from its own level and from those below.
LEVELS = [('errors', 'device', 'measure', 'metalsim'), ('models',), ('reference', 'sampling'), ('core',), ('kv_cache',),
          ('kernels',), ('quant',), ('models.fused',), ('runner',), ('engine',), ('server',), ('cli',)]


def module_name(path):
    "The dotted name of a file inside the package: core.scheduler; empty for the package itself."
    parts = path.relative_to(ROOT / 'tinyvllm').with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def sources():
    "All modules of the package, from name to syntax tree; what only starts it aside."
    paths = sorted((ROOT / 'tinyvllm').rglob('*.py'))
    return {module_name(p): ast.parse(p.read_text(encoding='utf-8')) for p in paths
            if p.stem not in ('_modidx', '__main__') and p.parent.name != 'tinyvllm' or p.stem in ('errors', 'device', 'measure')}


def imported(name, node, is_package):
    "The modules of the package that one import statement names, relative ones resolved."
    if isinstance(node, ast.Import):
        return [alias.name.removeprefix('tinyvllm.') for alias in node.names if alias.name.startswith('tinyvllm.')]
    if not node.level and not (node.module or '').startswith('tinyvllm'):
        return []
    if node.level:
        base = name.split('.') if is_package else name.split('.')[:-1]
        prefix = base[:len(base) - node.level + 1] + (node.module or '').split('.')
    else:
        prefix = (node.module or '').split('.')[1:]
    prefix = '.'.join(filter(None, prefix))
    return [prefix] + [f'{prefix}.{alias.name}'.lstrip('.') for alias in node.names]


def imports(lazy=False):
    "From each module to the modules that it imports when it is loaded; with `lazy` also inside functions."
    trees = sources()
    packages = {name.rpartition('.')[0] for name in trees}
    graph = {}
    for name, tree in trees.items():
        nodes = ast.walk(tree) if lazy else top_level(tree)
        found = {m for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))
                 for m in imported(name, node, name in packages)}
        graph[name] = sorted(found & trees.keys() - {name} - packages)
    return {name: found for name, found in graph.items() if name not in packages or found}


def top_level(tree):
    "Statements that run when a module is loaded, those below `if` and `try` included."
    for node in tree.body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from top_level(node)


def find_cycle(graph):
    "A list of modules that import each other in a circle, or None."
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name):] + [name]
        if name in done:
            return None
        path.append(name)
        found = next(filter(None, (visit(other) for other in graph.get(name, ()))), None)
        path.pop()
        done.add(name)
        return found
    return next(filter(None, map(visit, graph)), None)


def level(name):
    "How high a module stands in `LEVELS`."
    places = [(len(prefix), i) for i, group in enumerate(LEVELS) for prefix in group
              if name == prefix or name.startswith(prefix + '.')]
    return max(places)[1]


def box_of(name):
    "The box of the figure that a module stands in: its folder, or itself."
    return max((prefix for group in LEVELS for prefix in group if name == prefix or name.startswith(prefix + '.')), key=len)


def draw(graph):
    "One row for each level, a box for each folder with its modules, and lines to the boxes it imports."
    import matplotlib.pyplot as plt
    boxes = {}
    for name in graph:
        boxes.setdefault(box_of(name), []).append(name.rpartition('.')[2])
    figure, axes = plt.subplots(figsize=(8.4, 9.2))
    place = {}
    for i, group in enumerate(LEVELS):
        for j, box in enumerate(group):
            x, width = (j + 0.5) / len(group), 0.94 / len(group)
            place[box] = x, i
            axes.add_patch(plt.Rectangle((x - width / 2, i - 0.3), width, 0.6, facecolor='#eef3fb', edgecolor='#6b8cc4', zorder=2))
            members = ' '.join(m for m in boxes.get(box, []) if m != box)
            axes.text(x, i + 0.13, box + ('/' if members and '.' not in box else ''), ha='center', va='center', weight='bold', fontsize=9, zorder=3)
            axes.text(x, i - 0.13, members if '.' not in box else '', ha='center', va='center', fontsize=7, zorder=3)
    axes.set(xlim=(0, 1), ylim=(-0.5, len(LEVELS) - 0.5))
    axes.axis('off')
    axes.annotate('imports go down', (0.012, 0.2), (0.012, len(LEVELS) - 1.2), rotation=90, ha='center', va='top', fontsize=8,
                  color='#666', arrowprops=dict(arrowstyle='->', color='#999'))
    plt.close(figure)
    return figure
