"The modules of the package: who imports whom, in which layer, how much of it there is, and what it requires."

import ast
import re
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path
from sys import stdlib_module_names
from typing import NamedTuple

from book import public_names
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# From the lowest layer up: a module imports from its own layer's sub-package and from lower layers
LAYERS = (("config", "progress", "disk"), ("text",), ("tokens",), ("data",), ("model",), ("folders", "train"))
LAYERS += (("probe",), ("tasks", "arguments"), ("cli", "testing"))
NO_FILES = ("model", "data.batching", "data.masking")  # These modules reach nothing that reads files:
READ_FILES = ("disk", "text", "tokens", "data.dataset")
MAX_MODULES, MAX_LINES, MAX_PUBLIC_NAMES, MAX_CHAIN = 43, 11_310, 135, 12  # Lines: the aim is 6,000
# Imported in notebooks only; on GPUs only, where torch brings it; by what has an extra
OPTIONAL = {"IPython", "triton", "sklearn", "datasketch"}


class Imported(NamedTuple):
    "What a module takes from another one of the package."

    module: str
    name: str | None  # None if the module itself is imported


def read_package(folder: Path) -> dict[str, str]:
    "The source of every module by its name inside the package, such as `text.files`."
    files = [path for path in sorted(folder.rglob("*.py")) if path.name not in ("__init__.py", "__main__.py", "_modidx.py")]
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): path.read_text(encoding="utf-8") for path in files
    }


def within(module: str, parents: tuple[str, ...]) -> bool:
    "Whether a module is one of `parents` or in one of them."
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def find_imports(module: str, source: str, modules: set[str], package: str) -> tuple[set[Imported], list[str]]:
    "What a module imports from the package, anywhere in its code, and the imports that cannot be resolved."
    found, problems = set(), []
    bound: dict[str, str] = {}  # Modules of the package by the names they are used with
    nodes = list(ast.walk(ast.parse(source)))

    for dotted, name, used_as in (
        entry for node in nodes for entry in import_entries(node, [package, *module.split(".")])
    ):
        if dotted != package and not dotted.startswith(f"{package}."):
            continue
        inside = dotted.removeprefix(package).removeprefix(".")
        as_module = ".".join(filter(None, [inside, name]))
        if as_module in modules:
            found.add(Imported(as_module, None))
            bound[used_as] = as_module
        elif inside in modules:
            found.add(Imported(inside, name))
        elif not (inside == "" and (name or "").startswith("__")):  # `from langmlm import __version__` is allowed
            is_folder = any(other.startswith(f"{inside}.") for other in modules) or not inside
            problems.append(f"{module} imports {as_module if is_folder else inside}, which is no module")
    for node in nodes:
        if isinstance(node, ast.Attribute) and (target := bound.get(ast.unparse(node.value))):
            found.add(Imported(target, node.attr))
    return found, problems


def import_entries(node: ast.AST, parents: list[str]) -> list[tuple[str, str | None, str]]:
    "Absolute module, imported name and bound name of each import. `parents`: the importing module."
    if isinstance(node, ast.Import):
        return [(alias.name, None, alias.asname or alias.name) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = parents[: len(parents) - node.level] if node.level else []
    dotted = ".".join([*base, *filter(None, [node.module])])
    return [(dotted, alias.name, alias.asname or alias.name) for alias in node.names]


def import_graph(sources: dict[str, str], package: str) -> tuple[dict[str, set[Imported]], list[str]]:
    "The imports of every module, and the imports that cannot be resolved."
    graph, problems = {}, []
    for module, source in sources.items():
        graph[module], unresolved = find_imports(module, source, set(sources), package)
        problems += unresolved
    return graph, problems


def layer(module: str) -> int | None:
    "Number of a module's layer, from the bottom; None if it has no layer."
    return next((number for number, names in enumerate(LAYERS) if module.split(".")[0] in names), None)


def layer_problems(graph: dict[str, set[Imported]]) -> list[str]:
    "Imports that point upwards, star imports, and private names of other modules."
    problems = [f"{module} is in no layer" for module in graph if layer(module) is None]
    for module, imports in graph.items():
        for target, name in sorted(imports, key=str):
            if None not in (layer(module), layer(target)) and layer(target) > layer(module):
                problems.append(f"{module} imports {target}, which is in a higher layer")
            if name == "*":
                problems.append(f"{module} imports * from {target}")
            elif (name or "").startswith("_") and not name.endswith("__"):
                problems.append(f"{module} uses the private name {name} of {target}")
    return problems


def reachable(module: str, graph: dict[str, set[Imported]]) -> set[str]:
    "The modules that a module imports, directly or through others."
    found, pending = set(), [module]
    while pending:
        fresh = {target for target, _ in graph[pending.pop()]} - found
        found |= fresh
        pending += fresh
    return found


def file_problems(graph: dict[str, set[Imported]]) -> list[str]:
    "Modules of pure computation that reach a module that reads files."
    return [
        f"{module} reaches {target}, which reads files"
        for module in graph
        if within(module, NO_FILES)
        for target in sorted(reachable(module, graph))
        if within(target, READ_FILES)
    ]


def longest_chain(graph: dict[str, set[Imported]]) -> list[str]:
    "The longest chain of modules in which each imports the next; raises ValueError if there is a cycle."
    chains: dict[str, list[str] | None] = {}

    def chain(module: str) -> list[str]:
        if module not in chains:
            chains[module] = None  # In progress
            chains[module] = [
                module,
                *max((chain(target) for target, _ in sorted(graph[module], key=str)), key=len, default=[]),
            ]
        if chains[module] is None:
            raise ValueError(f"{module} imports itself through others")
        return chains[module]

    return max(map(chain, graph), key=len)


class Size(NamedTuple):
    "How large the package is."

    modules: int
    lines: int
    public_names: int
    chain: list[str]  # The longest chain of imports

    def __str__(self) -> str:
        return (
            f"{self.modules} modules, {self.lines:,} exported lines, {self.public_names} public names, "
            f"longest import chain {len(self.chain)}: {' > '.join(self.chain)}"
        )


def measure_package(sources: dict[str, str], graph: dict[str, set[Imported]]) -> Size:
    "Count what the budgets limit."
    lines = sum(len(source.splitlines()) for source in sources.values())
    return Size(
        len(sources), lines, sum(len(public_names(source)) for source in sources.values()), longest_chain(graph)
    )


def budget_problems(size: Size) -> list[str]:
    "Budgets that a package exceeds."
    limits = [
        ("modules", size.modules, MAX_MODULES),
        ("exported lines", size.lines, MAX_LINES),
        ("public names", size.public_names, MAX_PUBLIC_NAMES),
        ("modules in the longest import chain", len(size.chain), MAX_CHAIN),
    ]
    return [f"{value:,} {name}, more than {limit:,}" for name, value, limit in limits if value > limit]


def read_settings(root: Path) -> dict[str, str]:
    "What settings.ini says."
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def imported_libraries(sources: dict[str, str], package: str) -> set[str]:
    "Top-level modules of other libraries that the package imports, anywhere in its code."
    nodes = [node for source in sources.values() for node in ast.walk(ast.parse(source))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.split(".")[0] for name in names} - stdlib_module_names - OPTIONAL - {package}


def requirement_problems(
    libraries: set[str], requirements: str, owners: dict[str, list[str]] | None = None
) -> list[str]:
    "Find undeclared and unused requirements. `owners`: distributions by the modules they install."
    owners = packages_distributions() if owners is None else owners
    declared = {canonicalize_name(Requirement(word).name) for word in requirements.split()}
    used, problems = set(), []
    for library in sorted(libraries):
        names = {canonicalize_name(name) for name in owners.get(library, [library])}
        used |= names
        if not names & declared:
            problems.append(f"{library} is imported, but settings.ini does not declare it")
    return problems + [f"settings.ini declares {name}, but nothing imports it" for name in sorted(declared - used)]


def pin_problems(requirements: str, constraints: str) -> list[str]:
    "Requirements that constraints.txt does not pin, or pins to a version that they do not allow."
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", constraints, re.MULTILINE))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    problems = []
    for word in requirements.split():
        requirement, version = Requirement(word), pins.get(canonicalize_name(Requirement(word).name))
        if version is None:
            problems.append(f"constraints.txt does not pin {requirement.name}")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"constraints.txt pins {requirement.name}=={version}, but settings.ini wants {word}")
    return problems
