"""What is imported where: no TensorFlow and no PyTorch at all, and downward only between the parts of the package."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted((ROOT / "vlab_jax").rglob("*.py"))

# What a training step is made of, and what reads data, measures and shows: a step is computed, or compiled, where the
# second is not installed.
STEP = (
    "vlab_jax.config",
    "vlab_jax.models.vlab",
    "vlab_jax.training.optim",
    "vlab_jax.training.step",
    "vlab_jax.training.setup",
    "vlab_jax.training.stage",
    "configs.pretrain",
    "configs.sizes",
    "experiments.speed.accelerator",
)
BESIDES = (
    "tensorflow_datasets",
    "grain",
    "array_record",
    "av",
    "pyarrow",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "lancedb",
    "pycocoevalcap",
    "matplotlib",
    "pandas",
    "tqdm",
    "tensorboardX",
)
# Makes these modules ones that cannot be imported, as if they were not installed.
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""
IMPORT = """
import importlib, sys
for module in sys.argv[2:]: importlib.import_module(module)
print(sorted(set(sys.argv[1].split(",")) & {name.split(".")[0] for name in sys.modules}))
"""

# The parts of the package (DESIGN.md, section 7) and the parts that each may import, besides itself. Modules of the
# package's top level are parts of their own.
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "config_file": {"config", "errors"},
    "config_check": {"config", "errors", "models", "evaluation"},  # choices are the names in the registries
    "data": {"errors"},
    "datasets": {"errors", "data"},
    "runtime": {"errors"},
    "models": {"errors", "runtime"},  # layers constrain their arrays on the mesh
    "compiling": {"errors"},
    "pretrained": {"errors", "models"},  # it may name the shapes of models
    "restore": {"errors", "config", "models", "runtime"},
    "evaluation": {"errors", "config", "models", "data", "datasets", "runtime", "restore"},
    "training": {"errors", "config", "models", "data", "datasets", "runtime", "pretrained", "evaluation"},
    "inference": {"errors", "config", "models", "data", "datasets", "runtime", "pretrained", "restore"},
    "main": {"errors", "config", "config_file", "config_check", "training", "evaluation", "runtime"},
    "compile": {"errors", "config", "config_file", "config_check", "compiling", "runtime", "training"},
    "predict": {"errors", "inference"},
    "export": {"errors", "data", "pretrained", "runtime", "restore"},
}


def part(file: pathlib.Path) -> str:
    """`models` for `vlab_jax/models/towers.py`, `main` for `vlab_jax/main.py`."""
    return file.relative_to(ROOT / "vlab_jax").with_suffix("").parts[0]


def imported(tree: ast.AST, module: str) -> set[str]:
    """Absolute names of all that a module imports, within functions too: `vlab_jax.data.video` and so on."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level]
                base = ".".join([*above, *filter(None, [base])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def parts_imported(file: pathlib.Path) -> set[str]:
    """The parts of `vlab_jax` that a file imports."""
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    names = imported(ast.parse(file.read_text()), module)
    return {name.split(".")[1] for name in names if name.startswith("vlab_jax.")} - {part(file)}


def test_the_reader_of_imports_sees_every_spelling():
    source = "import a.b\nfrom c import d as e\ndef f():\n  from . import g\n  from ..data import video\n"
    assert imported(ast.parse(source), "vlab_jax.models.towers") == {
        "a.b",
        "c.d",
        "vlab_jax.models.g",
        "vlab_jax.data.video",
    }
    assert parts_imported(ROOT / "vlab_jax" / "training" / "loop.py") >= {"models", "data", "runtime", "evaluation"}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downward(file):
    if file == ROOT / "vlab_jax" / "__init__.py":
        assert parts_imported(file) <= {"inference"}  # when it is asked for; see below
        return
    assert part(file) in MAY_IMPORT, f"say in MAY_IMPORT what {part(file)} may import"
    assert parts_imported(file) <= MAY_IMPORT[part(file)]


def test_the_package_hands_out_the_predictor_and_imports_nothing_before_it_is_asked_for():
    program = (
        "import sys, vlab_jax\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('jax', 'flax', 'numpy', 'av')]\n"
        "from vlab_jax import Clip, Predictor\n"
        "assert (Clip.__module__, Predictor.__name__) == ('vlab_jax.inference.clips', 'Predictor')\n"
        "assert not hasattr(vlab_jax, 'Nothing')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["main", "compile", "predict", "export"])
def test_a_command_that_only_parses_its_arguments_does_not_import_jax(command):
    """Help and mistakes are shown at once; and `compile` sets variables that JAX reads when it is imported."""
    program = f"import sys; from vlab_jax.{command} import main; sys.exit(main(sys.argv) or 'jax' in sys.modules)"
    command_line = [sys.executable, "-c", program, "--help"]
    if command in ("predict", "export"):  # argparse ends by itself
        program = f"import sys, vlab_jax.{command}; sys.exit('jax' in sys.modules)"
        command_line = [sys.executable, "-c", program]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", [IMPORT, WITHOUT + IMPORT], ids=["as it is installed", "with them missing"])
def test_model_config_and_step_need_nothing_that_reads_data_or_shows_a_run(program):
    command = [sys.executable, "-c", program, ",".join(BESIDES), *STEP]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_no_file_holds_two_ideas():
    assert len(SOURCES) > 30
    lines = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in SOURCES}
    assert {name: count for name, count in lines.items() if count > 400} == {}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_names_tensorflow_or_torch(file):
    names = {name.split(".")[0] for name in imported(ast.parse(file.read_text()), "vlab_jax")}
    assert not names & {"tensorflow", "torch"}


def test_importing_the_whole_package_imports_no_tensorflow(tmp_path):
    """Not by a library either. (`tensorboardX` takes PyTorch where it is installed; nothing here asks for it.)"""
    # A package of that name that can be imported, so that an attempt would be seen.
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("")
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in SOURCES]
    assert "vlab_jax.training.loop" in modules and "vlab_jax.datasets.registry" in modules
    program = (
        "import importlib, importlib.util, sys\n"
        "assert importlib.util.find_spec('tensorflow')\n"
        "for module in sys.argv[1:]: importlib.import_module(module)\n"
        "from transformers import CLIPTokenizer\n"  # imported on use
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'tensorflow'))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program, *modules],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
