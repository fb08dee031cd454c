"""The rules of the project, checked: who imports what, what stays light, how failures travel, sizes, names, what the documents say.

Chains of imports are import-linter's (`[tool.importlinter]` in pyproject.toml, run here too); direct ones are read from the source below.
"""

import ast
import functools
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import errors

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("model", "pipeline")
CODE = (*PACKAGES, "examples", "tests", "benchmarks", "deploy")
CEILING = 400  # lines of a file

# Package -> files that may import it, anywhere in them. Everything else uses those files.
IMPORTERS = {
    "ray": {"pipeline/engine/ray/"},
    "boto3": {"pipeline/storage/"},
    "botocore": {"pipeline/storage/"},
    "model": {
        "model/",
        "pipeline/encoder/",
        "pipeline/training/",
        "pipeline/synthetic_videos/source.py",
        "pipeline/evaluation/measuring.py",
        "pipeline/look/showing.py",
        "pipeline/cli/network_commands.py",
    },
    "torch": {
        "model/",
        "pipeline/embedding/",
        "pipeline/encoder/",
        "pipeline/engine/nvdec/",
        "pipeline/export/",
        "pipeline/loader/",
        "pipeline/synthetic_videos/",
        "pipeline/training/",
    },
    "av": {
        "pipeline/engine/nvdec/",
        "pipeline/engine/worker/build_context.py",
        "pipeline/sample_corpus/",
        "pipeline/video/decode/",
    },
    "PIL": {
        "model/sheets.py",
        "pipeline/embedding/images.py",
        "pipeline/export/wds.py",
        "pipeline/report/pictures.py",
        "pipeline/video/first_frame.py",
        "pipeline/video/images.py",
        "pipeline/video/image_colour.py",
    },
    "typer": {"pipeline/cli/"},
    "pipeline.cli": {"pipeline/cli/", "pipeline/__main__.py"},
}

# Files that touch the environment, and why. Nowhere else may behaviour depend on it.
ENVIRONMENT = {
    "model/checkpoint.py": "HF_ENDPOINT, the Hugging Face client's own variable, read when it is used",
    "pipeline/config/merge.py": "RAY_ADDRESS, which `ray job submit` sets",
    "pipeline/encoder/compiling.py": "CXX and CC, and Inductor's own variables, set before torch reads them",
    "pipeline/encoder/network.py": "OMP_WAIT_POLICY, which libgomp reads when torch loads it",
    "pipeline/engine/ray/session.py": "Ray's own variables, set before it is imported",
    "pipeline/engine/decoders/process_lanes.py": "inherited by the decoder processes",
    "pipeline/engine/nvdec/lanes.py": "CUDA_VISIBLE_DEVICES, so that decoders see the encoder's GPU alone",
    "pipeline/sample_corpus/__init__.py": "sets the log level of an encoder library that has no other switch",
    "pipeline/storage/checkpoints.py": "where the cache folder is",
}

# Exceptions outside the tree: signals inside one package that never leave it.
SIGNALS = {"pipeline/reader/tar_stream.py": {"CutShort"}, "pipeline/storage/patience.py": {"OutOfPatience"}}


def python_files(*folders):
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def allowed(path, places):
    return any(name_of(path) == place or (place.endswith("/") and name_of(path).startswith(place)) for place in places)


@functools.cache
def parsed(path):
    """Syntax tree of a file, parsed once for all tests."""
    return ast.parse(path.read_text())


@functools.cache
def nodes(path):
    """Nodes of the tree."""
    return tuple(ast.walk(parsed(path)))


@functools.cache
def imports_of(path):
    """Dotted names a module imports, without those for type checkers only."""
    pending, names = [parsed(path)], []
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)
    return set(names)


def within(name, package):
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("package", IMPORTERS)
def test_a_package_is_imported_only_by(package):
    users = [path for path in python_files(*PACKAGES) if any(within(name, package) for name in imports_of(path))]
    assert [name_of(path) for path in users if not allowed(path, IMPORTERS[package])] == []
    assert users, f"no module imports {package}; remove it from the table"


def test_only_storage_knows_the_schemes_of_uris():
    """`startswith("s3://")` elsewhere would be one more place to change for another object store."""
    tests = re.compile(r"""(startswith|removeprefix|partition|split|in|==)\W*["'](s3|gs)://""")
    found = [
        f"{name_of(path)}:{number}"
        for path in python_files("pipeline")
        if not name_of(path).startswith("pipeline/storage/")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if tests.search(line)
    ]
    assert found == []


def test_chains_of_imports_keep_the_contracts():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_product_does_not_import_its_tests():
    """`model` and `pipeline` never import the examples, the tests, the benchmarks or the deployment."""
    for path in python_files(*PACKAGES):
        names = imports_of(path)
        assert not [name for name in names if name.split(".")[0] in ("examples", "tests", "benchmarks", "deploy")], (
            name_of(path)
        )


HEAVY = (
    "torch",
    "ray",
    "boto3",
    "botocore",
    "av",
    "pyarrow",
    "webdataset",
    "huggingface_hub",
    "numpy",
    "pydantic",
    "yaml",
)


def modules_after(statement):
    """Top-level packages a fresh interpreter has loaded after `statement`."""
    program = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert child.returncode == 0, child.stderr
    return set(child.stdout.split("\n")[-2].split())


def test_the_command_line_loads_nothing_heavy():
    assert not modules_after("import pipeline.cli.app") & set(HEAVY)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_by_itself_loads_neither_torch_nor_ray(package):
    assert not modules_after(f"import {package}") & {"torch", "ray", "boto3", "av", "pyarrow"}


LIGHT = (
    "config", "errors", "records", "process.signals", "storage", "corpus", "reader", "video.cutting", "format.columns", "writer",
    "ledger.totals", "operate.status", "operate.verify", "operate.inspect", "engine.decoders.process_lanes", "engine.driver.report",
    "cli.progress",
)  # fmt: skip


def test_packages_that_need_no_network_load_no_torch():
    steps = "\n".join(
        f"import pipeline.{package}; print('{package}', *({{'torch', 'ray'}} & set(sys.modules)))" for package in LIGHT
    )
    child = subprocess.run(
        [sys.executable, "-c", f"import sys\n{steps}"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split("\n")[:-1] == list(LIGHT)


def modules_of_command(*arguments, code):
    """What a fresh interpreter has loaded when `lathe` has answered, and what the command wrote to stderr."""
    program = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('\\n', *sorted({name.split('.')[0] for name in sys.modules})))\n"
        "runpy.run_module('pipeline', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, *arguments]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert child.returncode == code, child.stderr
    return set(child.stdout.splitlines()[-1].split()), child.stderr


def test_help_and_a_wrong_setting_answer_without_loading_torch():
    loaded, _ = modules_of_command("encode", "--help", code=0)
    assert "typer" in loaded
    assert not loaded & set(HEAVY) - {"pydantic"}
    wrong = ("encode", "clips/", "latents/", "--set", "clips.fps=fast")
    loaded, stderr = modules_of_command(*wrong, code=2)
    assert stderr.startswith("lathe: error: clips.fps:"), stderr
    assert not loaded & {"torch", "ray", "boto3", "botocore", "huggingface_hub", "webdataset"}


def every_error():
    found, pending = [], [errors.LatheError]
    while pending:
        kind = pending.pop()
        if kind.__module__ == errors.__name__:
            found.append(kind)
        pending += kind.__subclasses__()
    return found


@pytest.mark.parametrize("kind", every_error())
def test_an_error_survives_the_way_between_processes(kind):
    where = {"uri": "s3://b/k", "shard": "000001.tar", "key": "clip-7", "stage": "decode"}
    if issubclass(kind, errors.BadDataError):
        error = kind("too_short", "got 3 frames, expected 17", frames_recovered=3, **where)
    else:
        error = kind("got a, expected b", **where)
    error.report = {"shards": 2}  # packages may attach their own facts to it
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(again) is kind
    assert (str(again), again.args, again.exit_code) == (str(error), error.args, error.exit_code)
    assert vars(again) == vars(error)
    for value in (*where.values(), error.message):
        assert value in str(again)


def test_there_is_one_tree_of_errors_and_its_picture_is_true():
    assert set(every_error()) == {
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__
    }
    for kind in every_error():
        assert kind.__name__ in errors.__doc__


def test_no_exception_is_defined_outside_the_tree():
    outside = {}
    for path in python_files(*PACKAGES):
        for node in nodes(path):
            bases = {base.id for base in getattr(node, "bases", []) if isinstance(base, ast.Name)}
            if bases & {"Exception", "BaseException", "ValueError", "RuntimeError", "OSError"}:
                outside.setdefault(name_of(path), set()).add(node.name)
    assert outside.pop("pipeline/errors.py") == {"LatheError"}
    assert outside == SIGNALS


def test_the_environment_is_read_in_few_places():
    readers = set()
    for path in python_files(*PACKAGES):
        direct = {"os.environ", "os.getenv", "os.putenv", "os.environb"} & {
            f"{node.value.id}.{node.attr}"
            for node in nodes(path)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        if direct or imports_of(path) & {"os.environ", "os.getenv"}:
            readers.add(name_of(path))
    assert readers == set(ENVIRONMENT)


def test_files_fit_in_the_head():
    lines = {name_of(path): len(path.read_text().splitlines()) for path in python_files(*CODE)}
    assert {name: count for name, count in lines.items() if count > CEILING} == {}


def test_no_room_is_called_nothing_in_particular():
    vague = {
        "utils",
        "util",
        "helpers",
        "helper",
        "common",
        "misc",
        "manager",
        "managers",
        "base",
        "core",
        "stuff",
        "v2",
        "new",
        "final",
    }
    for path in python_files(*CODE):
        assert not vague & set(path.relative_to(ROOT).with_suffix("").parts), name_of(path)


def test_every_file_says_what_it_is_for():
    silent = [
        name_of(path)
        for path in python_files(*PACKAGES, "examples", "deploy", "benchmarks")
        if path.read_text().strip() and not ast.get_docstring(parsed(path))
    ]
    assert silent == []


def test_only_public_names_cross_between_files():
    for path in python_files(*PACKAGES):
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                private = [alias.name for alias in node.names if re.match(r"_[^_]", alias.name)]
                assert not private, f"{name_of(path)} takes {private} from {node.module}"


def test_the_wheel_holds_every_package():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in python_files(*PACKAGES)}
    assert set(listed) == folders


def packages_of_code():
    return sorted({path.parent for path in python_files(*PACKAGES)})


@pytest.mark.parametrize("package", packages_of_code(), ids=name_of)
def test_a_package_docstring_names_its_modules(package):
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    modules = {path.stem for path in package.glob("*.py") if path.stem not in ("__init__", "__main__")}
    modules |= {
        path.parent.name
        for path in package.glob("*/__init__.py")
        if path.parent.parent == package and package.name != "pipeline"
    }
    assert [name for name in sorted(modules) if not re.search(rf"`{name}`", text)] == []


def test_the_architecture_page_names_every_package():
    text = (ROOT / "docs" / "architecture.md").read_text()
    names = [name_of(package) for package in packages_of_code()]
    assert [name for name in names if f"`{name}/`" not in text] == []


def test_nothing_depends_on_somebodys_machine():
    # Absolute paths of a person's or a build machine's folders. Paths inside the image (/home/lathe, /opt/lathe) are ours.
    machine = re.compile(
        r"(?:(?<![\w./~})-])|(?<=file://))/(?:work|root|Users|home/(?!lathe\b)\w+|opt/(?!lathe\b)\w+)(?:/|\b)"
    )
    texts = [path for folder in (*CODE, "docs", ".ci") for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    texts += [path for path in sorted(ROOT.iterdir()) if path.is_file()]
    found = []
    for path in texts:
        if path.suffix in (".safetensors", ".pyc", ".png", ".npz", ".npy", ".mp4", ".gif", ".jpg") or path == Path(
            __file__
        ):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if machine.search(line):
                found.append(f"{name_of(path)}:{number}: {line.strip()[:100]}")
    assert found == []
