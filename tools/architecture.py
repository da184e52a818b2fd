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


def imports():
    "From each module to the modules that it imports when it is loaded; imports inside functions aside."
    trees = sources()
    packages = {name.rpartition('.')[0] for name in trees}
    graph = {}
    for name, tree in trees.items():
        found = {m for node in top_level(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
                 for m in imported(name, node, name in packages)}
        graph[name] = sorted(found & trees.keys() - {name} - packages)
    return {name: found for name, found in graph.items() if name not in packages or found}


def top_level(tree):
    "Statements that run when a module is loaded, those below `if` and `try` included, type checkers' aside."
    for node in tree.body:
        yield node
        if isinstance(node, (ast.If, ast.Try)) and 'TYPE_CHECKING' not in ast.unparse(node):
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


def folder_graph(graph):
    "From each box to the boxes that its modules import, without those that follow from others."
    direct = {}
    for name, others in graph.items():
        direct.setdefault(box_of(name), set()).update(box_of(other) for other in others)
    direct = {box: others - {box} for box, others in direct.items()}

    def reached(box, seen):
        for other in direct.get(box, ()):
            if other not in seen:
                seen.add(other)
                reached(other, seen)
        return seen
    return {box: {other for other in others if not any(other in reached(o, {o}) for o in others - {other})}
            for box, others in direct.items()}


def draw(graph):
    "One row for each level, a box for each folder with its modules, and arcs to the folders that it imports."
    import matplotlib.pyplot as plt
    from textwrap import fill
    members, edge = {}, {}
    for name in graph:
        members.setdefault(box_of(name), []).append(name.rpartition('.')[2])
    figure, axes = plt.subplots(figsize=(8.4, 9.6))
    for i, group in enumerate(LEVELS):
        inside = {box: [m for m in members.get(box, ()) if m != box.rpartition('.')[2]] for box in group}
        shares = {box: 6 + len(names) for box, names in inside.items()}    # room for a title, then for the modules
        left = 0.0
        for box, names in inside.items():
            width = 0.8 * shares[box] / sum(shares.values())
            x, size = left + width / 2, 6 if len('  '.join(names)) > 260 * width else 7    # two lines of 7, or three of 6
            edge[box], left = (x + width * 0.48, i), left + width
            axes.add_patch(plt.Rectangle((x - width * 0.48, i - 0.36), width * 0.96, 0.72, facecolor='#eef3fb', edgecolor='#6b8cc4'))
            axes.text(x, i + (0.22 if names else 0), box, ha='center', va='center', weight='bold', fontsize=9)
            axes.text(x, i - 0.12, fill('  '.join(names), int(910 * width / size)), ha='center', va='center', fontsize=size)
    for box, others in folder_graph(graph).items():
        for other in others:
            (_, high), (_, low) = edge[box], edge[other]
            axes.annotate('', (0.785, low + 0.1), (0.785, high - 0.1), arrowprops=dict(
                arrowstyle='->', color='#888', connectionstyle=f'arc3,rad={-0.18 - 0.03 * (high - low)}'))
    axes.text(0.99, len(LEVELS) - 0.7, 'arrow: imports from\nthat level (what\nfollows left out)', fontsize=7, ha='right', va='top', color='#666')
    axes.set(xlim=(0, 1), ylim=(-0.5, len(LEVELS) - 0.5))
    axes.axis('off')
    figure.tight_layout()
    plt.close(figure)
    return figure
