"""Image and pins: files that the Dockerfile copies exist, nothing runs as root, every dependency has one exact version."""

import re
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

from tests.deploy.manifests import DEPLOY, PROJECT, ROOT, job_of, pins

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
IGNORE = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()


def test_copied_files_exist_and_pass_dockerignore():
    let_in = {line[1:] for line in IGNORE if line.startswith("!")}
    assert "*" in IGNORE
    sources = [word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in let_in, source


def test_data_of_packages_enters_the_image():
    # Weights, recipes and tables are not `.py`; whole packages are let in, and only caches left out again.
    let_in = {line[1:] for line in IGNORE if line.startswith("!")}
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert data
    assert {package.partition(".")[0] for package in data} <= let_in
    after = IGNORE[max(place for place, line in enumerate(IGNORE) if line.startswith("!")) + 1 :]
    assert after == ["**/__pycache__"]


def test_image_does_not_run_as_root():
    users = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert users == ["lathe"]
    assert re.search(r"useradd .*--uid 1000 .*lathe", DOCKERFILE)
    assert "RUN pip" not in DOCKERFILE.split("USER lathe")[1]


def test_the_base_is_a_fixed_version_that_the_project_supports():
    base = re.search(r"^FROM python:(\d+\.\d+\.\d+)-", DOCKERFILE, re.MULTILINE)[1]
    assert base in Requirement(f"python{PROJECT['requires-python']}").specifier


def test_every_dependency_is_pinned_once_within_its_range():
    exact = pins()
    wanted = [Requirement(text) for text in PROJECT["dependencies"]]
    assert sorted(requirement.name for requirement in wanted) == sorted(exact)
    for requirement in wanted:
        assert Version(exact[requirement.name]) in requirement.specifier
        # torch's builds share a version and differ in the local part; that part is chosen by the machine.
        assert Version(exact[requirement.name]).local is None


def test_image_installs_only_what_is_pinned():
    exact = pins("requirements.txt")
    assert {name: exact.get(name) for name in pins()} == pins(), "written before constraints.txt changed"
    for extra in ("cluster", "training"):
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            assert Version(exact[requirement.name]) in requirement.specifier
    # ray[default] and the CUDA build of torch bring these.
    assert {"aiohttp", "opencensus", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "triton", "setuptools"} <= set(exact)
    installs = re.findall(r"pip install ([^\n&]*)", DOCKERFILE)
    assert len(installs) == 2
    assert all("--no-deps" in line for line in installs)
    assert "--no-build-isolation" in installs[1], "the build would fetch the newest setuptools"
    assert "torch.version.cuda" in DOCKERFILE


def test_torch_is_pinned_nowhere_else():
    for path in (ROOT / "Makefile", DEPLOY / "Dockerfile", ROOT / "pyproject.toml", *DEPLOY.rglob("*.yaml")):
        assert not re.search(r"torch==\d", path.read_text()), path.name


def test_commands_of_the_readme_are_valid(monkeypatch):
    text = (DEPLOY / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    commands = re.findall(
        r"^\s*(?:ray job submit .*? -- \s*)?((?:lathe|python -m pipeline) encode .*)$", blocks, re.MULTILINE
    )
    assert (
        len(commands)
        == text.count("pipeline encode s3") + text.count("lathe encode s3") + text.count("lathe encode clips/")
        > 0
    )
    for command in commands:
        assert job_of(command, monkeypatch).model.checkpoint


def test_files_that_the_readme_names_exist():
    text = (DEPLOY / "README.md").read_text()
    named = set(re.findall(r"(?<![\w.])deploy/[\w./-]*\w", text))
    assert {"deploy/job.yaml", "deploy/rayjob/rayjob.yaml", "deploy/kueue", "deploy/monitoring"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert [name for name in named if "-k " + name in text and not (ROOT / name / "kustomization.yaml").exists()] == []
