"""The layering, read from the imports and held to the map in the package's docstring; and the equations' labels.

A module here is a file of the package, or a folder of them, which has one place in the map.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_lessons

PACKAGE = Path(rlhf_lessons.__file__).parent
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in TREES} - {"__init__"})
LAYERS = ["estimators", "oracle", "parts", "flow", "engines", "side", "surface"]
ESTIMATORS = ["masking", "policy_gradient", "baselines", "advantages", "importance", "ppo", "preferences", "kl"]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# Which function owns which equation; a class owns what its instances compute.
OWNERS = {
    "1.1": "policy_gradient.action_log_probs",
    "1.2": "exact.sequence_log_prob",
    "2.1": "preferences.preference_probability",
    "2.2": "preferences.bradley_terry_loss",
    "2.3": "models.RewardModel",
    "3.1": "policy_gradient.discounted_return",
    "3.3": "policy_gradient.policy_gradient_loss",
    "3.2": "exact.exact_expectation",
    "4.1": "policy_gradient.reward_to_go",
    "4.4": "baselines.leave_one_out_baseline",
    "4.3": "baselines.optimal_baseline",
    "4.2": "gridworld.GridWorld",
    "5.1": "advantages.td_residuals",
    "5.2": "advantages.n_step_advantages",
    "5.4": "advantages.gae_recursion",
    "5.3": "advantages.gae",
    "6.2": "importance.importance_ratio",
    "6.1": "importance.importance_mean",
    "6.3": "importance.effective_sample_size",
    "7.1": "ppo.clipped_policy_loss",
    "7.3": "ppo.clipped_value_loss",
    "7.7": "ppo.ppo_loss",
    "7.6": "policy_gradient.entropy",
    "7.2": "ppo.clip_fraction",
    "7.4": "ppo.explained_variance",
    "7.5": "masking.masked_whiten",
    "8.1": "kl.exact_kl",
    "8.2": "kl.sampled_kl",
    "8.3": "kl.shaped_rewards",
    "8.4": "exact.optimal_policy",
    "8.5": "kl.AdaptiveKL",
    "9.1": "models.CausalLMWithValueHead",
    "11.1": "kl.sequence_kl_loss",
    "15.1": "scoring.pass_at_k",
    "12.1": "baselines.group_advantages",
    "12.2": "ppo.aggregate",
    "12.3": "importance.sequence_ratio",
    "13.1": "preferences.margins",
    "13.2": "preferences.dpo_loss",
    "13.3": "preferences.ipo_loss",
    "14.1": "exact.best_of_n",
    "14.2": "kl.best_of_n_bound",
    "14.3": "scoring.best_of_mean",
    "16.1": "importance.truncated_ratio",
    "16.2": "importance.masked_ratio",
}


def layer_map():
    """Module -> layer, as the package's docstring draws it."""
    found = {}
    for line in rlhf_lessons.__doc__.splitlines():
        layer, _, names = line.strip().partition(" ")
        if layer in LAYERS:
            without_remarks = re.sub(r"\(.*?\)|:.*", "", names)
            found |= {name.strip(): layer for name in without_remarks.split(",")}
    return found


LAYER_OF = layer_map()


def nodes(module):
    """Every syntax node of the module's file, or of all files in its folder."""
    for path, tree in TREES.items():
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") == module:
            yield from ast.walk(tree)


def imports(module):
    """Every dotted name that the module imports, at the top or inside a function."""
    for node in nodes(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def package_imports(module):
    """The other modules of the package that this one imports."""
    names = [name.split(".") for name in imports(module)]
    return {parts[1] for parts in names if parts[0] == "rlhf_lessons"} & set(MODULES) - {module}


def foreign_imports(module):
    """The top-level names, outside the standard library and the package, that this module imports."""
    names = {name.split(".")[0] for name in imports(module)}
    return names - set(sys.stdlib_module_names) - {"rlhf_lessons"}


def in_layer(layer):
    return [module for module in MODULES if LAYER_OF.get(module) == layer]


# --- layers ------------------------------------------------------------------------------------


def test_the_map_has_every_layer_in_order():
    lines = [line.split()[0] for line in rlhf_lessons.__doc__.splitlines() if line.startswith("    ")]
    assert lines == LAYERS
    assert [module for module, layer in LAYER_OF.items() if layer == "estimators"] == ESTIMATORS


@pytest.mark.parametrize("module", MODULES)
def test_every_module_stands_in_the_map(module):
    assert module in LAYER_OF, f"rlhf_lessons/__init__.py does not say which layer {module} belongs to"


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_absolute(module):
    assert not [name for name in imports(module) if name.startswith(".")]


@pytest.mark.parametrize("module", sorted(set(MODULES) & set(LAYER_OF)))
def test_imports_only_go_down(module):
    """To lower layers, or to a neighbour."""
    assert package_imports(module) <= set(LAYER_OF)
    own = LAYERS.index(LAYER_OF[module])
    for other in package_imports(module):
        assert LAYERS.index(LAYER_OF[other]) <= own, f"{module} imports {other}"


@pytest.mark.parametrize("module", ESTIMATORS)
def test_estimators_import_torch_and_lower_estimators(module):
    assert foreign_imports(module) <= {"torch"}
    assert package_imports(module) <= set(ESTIMATORS[: ESTIMATORS.index(module)])


@pytest.mark.parametrize("module", in_layer("oracle"))
def test_the_oracle_imports_no_estimator(module):
    assert foreign_imports(module) <= {"torch"}
    assert package_imports(module) <= set(in_layer("oracle"))


@pytest.mark.parametrize("module", in_layer("parts"))
def test_no_part_imports_another(module):
    builds_on = {"forward": {"masking"}, "tiny_sums": {"tiny_reviews"}}
    builds_on |= {"adapters": {"masking", "forward"}, "models": {"masking", "forward", "adapters"}}
    allowed = builds_on.get(module, set())
    assert package_imports(module) <= allowed


@pytest.mark.parametrize("layer", ["oracle", "flow", "side", "surface"])
def test_neighbours_do_not_import_each_other(layer):
    reached = {module: package_imports(module) & set(in_layer(layer)) for module in in_layer(layer)}
    for module in reached:
        seen, open_ends = set(), set(reached[module])
        while open_ends:
            seen |= open_ends
            open_ends = set().union(*(reached[other] for other in open_ends)) - seen
        assert module not in seen, f"{module} imports itself by way of its neighbours"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"models", "forward"}))
def test_only_models_and_forward_import_model_classes(module):
    from_transformers = [name for name in imports(module) if name.split(".")[0] == "transformers"]
    assert not [name for name in from_transformers if re.search(r"Model|Config|\.models\b", name)]


def test_the_lower_layers_load_torch_alone():
    """A fresh interpreter: models, tokenizers and plotting must not be loaded by anything that computes an equation."""
    lower = [*ESTIMATORS, *in_layer("oracle")]
    heavy = ["transformers", "accelerate", "tokenizers", "safetensors", "matplotlib"]
    expected = sorted(f"rlhf_lessons.{module}" for module in lower)
    code = "import sys, torch; before = set(sys.modules)\n"
    code += "".join(f"import {name}\n" for name in expected)
    code += f"print([name for name in {heavy} if name in set(sys.modules) - before])\n"
    code += "print(sorted(name for name in sys.modules if name.startswith('rlhf_lessons.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[]", str(expected)], done.stdout + done.stderr


def test_the_package_itself_loads_nothing():
    code = "import sys, rlhf_lessons; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False False", done.stdout + done.stderr


# --- size and names ----------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_over_60_lines(module):
    functions = [node for node in nodes(module) if isinstance(node, FUNCTIONS)]
    lengths = [(node.name, node.end_lineno - node.lineno + 1) for node in functions]
    assert not [(name, length) for name, length in lengths if length > 60]


def test_no_file_is_named_after_nothing():
    assert not {"utils", "util", "helpers", "misc", "common"} & {path.stem for path in TREES}


# --- annotations and messages ------------------------------------------------------------------

RULED = {path.relative_to(PACKAGE).with_suffix("").as_posix(): tree for path, tree in TREES.items()}
# What a refusal may be other than "x must be …; got …": about a file, about two options, or what a score of one's own
# raised.
OTHER_REFUSALS = r"\{\}(, line \{\})?: |cannot (load|read|write) |give --|--score \{\} raised"


def unannotated(tree):
    """(function, argument or "return") for each annotation that a public function or method lacks."""
    for owner in ast.walk(tree):
        for node in owner.body if isinstance(owner, (ast.Module, ast.ClassDef)) else []:
            if isinstance(node, FUNCTIONS) and not re.match(r"_(?!_)", node.name):
                args = node.args
                arguments = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
                bare = [x.arg for x in arguments if x.annotation is None and x.arg not in ("self", "cls")]
                yield from ((node.name, name) for name in bare + ["return"] * (node.returns is None))


def refusals(tree):
    """The message of each `raise ValueError(...)`, what is filled in shown as {}."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc and ast.unparse(node.exc).startswith("ValueError("):
            message = node.exc.args[0]
            parts = message.values if isinstance(message, ast.JoinedStr) else [message]
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)


def in_dialect(message):
    known = " must " in message or re.match(OTHER_REFUSALS, message)
    return bool(known) and not re.search("expected|, got ", message)


@pytest.mark.parametrize("name", RULED)
def test_public_functions_are_annotated(name):
    assert list(unannotated(RULED[name])) == []


@pytest.mark.parametrize("name", RULED)
def test_what_is_refused_is_refused_in_one_dialect(name):
    """ "x must be …; got …", so that a reader finds the argument first, then the rule, then what came."""
    assert [message for message in refusals(RULED[name]) if not in_dialect(message)] == []


def test_a_missing_annotation_is_found():
    code = """
def f(a, *b, c: int = 0, d=lambda x: x, **e: int) -> None: ...
def _private(a): ...
class C:
    def __init__(self, a: int): ...
    def _private(self, a): ...
    @classmethod
    def g(cls, a: int) -> int:
        def inner(b): ...
"""
    assert sorted(unannotated(ast.parse(code))) == [("__init__", "return"), ("f", "a"), ("f", "b"), ("f", "d")]


def test_another_dialect_is_found():
    code = """
raise ValueError(f"{name} must be at least 1; got {n}")
raise ValueError(f"{path}, line {n}: not " "JSON")
raise ValueError("cannot load a model from there")
raise ValueError(f"{name}: expected at least 1, got {n}")
raise ValueError(f"n must be at least 1, got {n}")
raise ValueError("wrong n")
raise ValueError(message)
"""
    found = list(refusals(ast.parse(code)))
    assert found[:2] == ["{} must be at least 1; got {}", "{}, line {}: not JSON"]
    assert list(map(in_dialect, found)) == [True, True, True, False, False, False, False]


# --- docstrings and equations ------------------------------------------------------------------


def documented(module):
    """(qualified name, docstring) of the module's functions and classes; a method counts for its class."""
    for node in TREES.get(PACKAGE / f"{module}.py", ast.Module([], [])).body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield f"{module}.{node.name}", ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            methods = [method for method in node.body if isinstance(method, FUNCTIONS)]
            yield from ((f"{module}.{node.name}", ast.get_docstring(method) or "") for method in methods)


def labels():
    """Every label in a docstring of the package, with the function or class in which it stands."""
    return [
        (label, name)
        for module in MODULES
        for name, docstring in documented(module)
        for label in re.findall(r"\(Eq\. (\d+\.\d+)\)", docstring)
    ]


def test_each_label_stands_in_one_docstring():
    assert sorted(labels()) == sorted(OWNERS.items())


def test_labels_stand_nowhere_else_in_the_code():
    """A module's docstring or a comment that repeats a label would be a second place to keep in step."""
    texts = {module: (PACKAGE / f"{module}.py").read_text(encoding="utf-8") for module in (*ESTIMATORS, "exact")}
    for module, text in texts.items():
        in_text = re.findall(r"\(Eq\. \d+\.\d+\)", text)
        assert len(in_text) == sum(name.startswith(f"{module}.") for name in OWNERS.values()), module


@pytest.mark.parametrize("module", ESTIMATORS)
def test_every_public_estimator_is_documented(module):
    public = [
        node
        for node in nodes(module)
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and not getattr(node, "name", "").startswith("_")
    ]
    assert not [getattr(node, "name", module) for node in public if not ast.get_docstring(node)]


def labels_with_a_test():
    """Labels in the `equation` marks of the tests beside this one."""
    found = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        found |= set(re.findall(r'^@pytest\.mark\.equation\("(\d+\.\d+)"\)', path.read_text(encoding="utf-8"), re.M))
    return found


@pytest.mark.parametrize("label", OWNERS)
def test_each_equation_is_tested(label):
    assert label in labels_with_a_test()
