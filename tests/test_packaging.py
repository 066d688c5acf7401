"""What pip, ComfyUI's managers and the registry read: pyproject.toml, requirements.txt, and a wheel of the core alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from PIL import Image

import editloss_core
from editloss_core.extras import EXTRAS, need

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PICTURES = ROOT / "docs" / "registry"


def listed(name: str) -> list[str]:
    """The strings of ``name = […]`` in pyproject.toml. (Python 3.10 has no reader of TOML.)"""
    (block,) = re.findall(rf"^{name} = \[\n(.*?)^\]", PYPROJECT, re.S | re.M)
    return re.findall(r'^\s*"(.*)",', block, re.M)


def said(name: str) -> str | None:
    found = re.findall(rf'^{name} = "(.*)"$', PYPROJECT, re.M)
    return found[0] if found else None


# ---------------------------------------------------------------------------- what is installed


def test_requirements_are_those_of_the_core_and_of_what_the_nodes_use():
    """ComfyUI's managers install requirements.txt, pip reads pyproject.toml."""
    wanted = [*listed("dependencies"), *listed("encoders"), *listed("reports")]
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n") == [*wanted, ""]


def test_the_two_commands_of_the_readme_install_everything():
    assert listed("comfyui")[0] == "editloss[encoders,reports]" and listed("test")[0] == "editloss[comfyui,train]"


def test_no_package_is_forced_to_a_version():
    for requirement in (ROOT / "requirements.txt").read_text(encoding="utf-8").split():
        assert re.fullmatch(r"[\w-]+>=[\d.]+", requirement), requirement
    assert {r.split(">=")[0] for r in listed("dependencies")}.isdisjoint({"transformers", "diffusers", "torchvision"})


def test_every_extra_that_an_error_names_brings_its_package():
    distributions = metadata.packages_distributions()
    for package, extra in EXTRAS.items():
        named = {re.split(r"[>=;\[]", r)[0].lower().replace("_", "-") for r in listed(extra)}
        assert {d.lower().replace("_", "-") for d in distributions[package]} & named, package


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"timm is not installed: pip install -e '\.\[encoders\]'"):
        need("timm")


def test_a_package_that_is_there_but_broken_says_so_itself(monkeypatch, tmp_path):
    (tmp_path / "jinja2.py").write_text("import a_package_that_is_not_there", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jinja2", raising=False)
    with pytest.raises(ModuleNotFoundError, match="No module named 'a_package_that_is_not_there'"):
        need("jinja2")


# ---------------------------------------------------------------------------- what the registry reads


def test_registry_metadata_has_the_registrys_forms():
    """https://docs.comfy.org/registry/specifications"""
    assert re.fullmatch(r"[a-z](?:[a-z0-9]|[-_.](?=[a-z0-9])){1,98}", said("name")) and "comfy" not in said("name")
    assert re.fullmatch(r"\d+\.\d+\.\d+", said("version")) and said("version") == editloss_core.__version__
    assert re.fullmatch(r"[a-z0-9-]+", said("PublisherId")) and said("DisplayName")
    assert re.fullmatch(r">=\d+\.\d+\.\d+", said("requires-comfyui")) and said("requires-python") == ">=3.10"
    assert 40 < len(said("description")) < 200
    assert 'license = { file = "LICENSE" }' in PYPROJECT and (ROOT / "LICENSE").is_file()
    systems = [c for c in listed("classifiers") if c.startswith("Operating System :: ")]
    assert systems == ["Operating System :: OS Independent"]
    assert f"\n## {said('version')}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_old_names_go_when_they_say_so():
    """CONTRIBUTING.md, Deprecations: two minor versions, and a line in the changelog."""
    (deprecated,) = re.findall(r"^### Deprecated\n(.*?)^###? ", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.S | re.M)
    old = {path: path.read_text("utf-8") for path in (ROOT / "editloss_core").rglob("*.py")}
    old = {path: re.findall(r"it goes with (\d+)\.(\d+)", text) for path, text in old.items()}
    assert any(old.values()), "no old name is left: this test can go"
    for path, versions in old.items():
        module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
        for version in versions:
            assert tuple(map(int, version)) > tuple(map(int, said("version").split(".")[:2])), (
                f"{module} is still there"
            )
            assert f"{module}`" in deprecated, module


def test_pictures_of_the_registry_have_its_sizes():
    icon, banner = (Image.open(PICTURES / f"{name}.png") for name in ("icon", "banner"))
    assert icon.width == icon.height <= 400
    assert banner.width * 9 == banner.height * 21 and banner.width >= 1260
    assert all(path.stat().st_size < 300_000 for path in PICTURES.glob("*.png"))


def test_addresses_are_all_there_or_none():
    """Nobody knows the repository's address before it is published."""
    given = [said("Repository"), said("Icon"), said("Banner")]
    assert given == [None] * 3 or all(a and a.startswith("https://") for a in given)
    if given[0]:
        assert given[1].endswith("/docs/registry/icon.png") and given[2].endswith("/docs/registry/banner.png")


# ---------------------------------------------------------------------------- what runs on the repository's host


def workflow(name: str) -> tuple[dict, list[str]]:
    """A file of .github/workflows, and all commands in it."""
    read = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))
    return read, [step["run"] for job in read["jobs"].values() for step in job.get("steps", ()) if "run" in step]


@pytest.mark.parametrize(("name", "marker"), [("core", '"not comfyui"'), ("comfyui", "comfyui")])
def test_workflows_run_the_commands_that_people_are_told(name, marker):
    read, commands = workflow(name)
    (told,) = re.findall(r"^(python3 -m venv .*) && (.*-m pytest .*)$", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert commands[0] == told[0] and commands[-1] == f"{told[1]} -m {marker}"
    assert f"\n{told[0]}\n" in (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert {"pull_request", "workflow_call"} <= read[True].keys()  # YAML's word for "on"
    assert read["permissions"] == {"contents": "read"}


def test_style_and_types_are_checked_by_the_same_commands_everywhere():
    said = (ROOT / ".ci" / "run").read_text("utf-8")
    (checks,) = re.findall(r"^for check in (.*); do$", said, re.M)
    checks = [check[0] or check[1] for check in re.findall(r'"(.*?)"|(\S+)', checks)]
    assert " && ".join(f".venv/bin/python -m {check}" for check in checks) in workflow("core")[1]
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    entries = [hook["entry"].removeprefix(".venv/bin/python -m ") for hook in hooks["hooks"]]
    assert [entry.partition(" --")[0] for entry in entries] == [check.partition(" --")[0] for check in checks]


def test_the_core_is_tried_on_the_oldest_python_that_it_promises():
    pythons = workflow("core")[0]["jobs"]["core"]["strategy"]["matrix"]["python"]
    assert f">={pythons[0]}" == said("requires-python") and all(isinstance(python, str) for python in pythons)


def test_only_a_version_that_passed_is_published():
    read, commands = workflow("publish")
    tests = {name: job["uses"] for name, job in read["jobs"].items() if "uses" in job}
    assert tests == {name: f"./.github/workflows/{name}.yml" for name in ("core", "comfyui")}
    assert set(read["jobs"]["publish"]["needs"]) == set(tests) and read[True] == {"push": {"tags": ["v*"]}}
    (check,) = commands
    for tag, status in ((f"v{said('version')}", 0), ("v99.0.0", 1)):
        done = subprocess.run(
            ["bash", "-e", "-c", check], cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": tag}, capture_output=True
        )
        assert done.returncode == status


@pytest.mark.parametrize("name", ["bug", "config"])
def test_issue_templates_can_be_read(name):
    read = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text("utf-8"))
    if name == "bug":
        assert {field["id"] for field in read["body"] if field.get("validations", {}).get("required")} >= {
            "workflow",
            "log",
            "check",
        }


# ---------------------------------------------------------------------------- a wheel of the core alone


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A fresh folder with the wheel in it. The sources are copied first, since setuptools builds beside them."""
    work = tmp_path_factory.mktemp("wheel")
    source, wheels, target = work / "source", work / "wheels", work / "site"
    shutil.copytree(ROOT / "editloss_core", source / "editloss_core", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    isolation = [] if _setuptools() < (69,) else ["--no-build-isolation"]
    build = [*pip, "wheel", str(source), "--no-deps", *isolation, "--wheel-dir", str(wheels)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = wheels.glob("*.whl")
    assert wheel.name == f"editloss-{editloss_core.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)  # what pip does with a wheel of this kind, without a second start of pip
    return target


def _setuptools() -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in re.findall(r"\d+", metadata.version("setuptools"))[:1])
    except metadata.PackageNotFoundError:
        return (0,)


def run(installed: Path, folder: Path, *arguments: str, extras: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Python outside the checkout, with the wheel first, and without ComfyUI and what only other extras bring."""
    missing = {"comfy", "comfy_api", "folder_paths", "transformers", "diffusers", "torchvision"}
    missing |= {package for package, extra in EXTRAS.items() if extra not in extras}
    hook = f"import sys\nsys.modules.update(dict.fromkeys({sorted(missing)!r}))\n"
    (folder / "sitecustomize.py").write_text(hook, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(installed)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8", timeout=300)


def test_wheel_holds_the_core_with_its_data_and_nothing_else(installed):
    core = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "editloss_core").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    there = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    info = {name for name in there if name.startswith("editloss-")}
    assert there - info == core and len(info) >= 4
    assert {Path(name).suffix for name in core} == {".py", ".typed", ".j2", ".safetensors", ".md", ".webp", ".png"}


def test_wheel_asks_for_what_the_core_needs(installed):
    (file,) = installed.glob("editloss-*/METADATA")
    wanted = re.findall(r"^Requires-Dist: (.*)$", file.read_text(encoding="utf-8"), re.M)
    assert [w for w in wanted if "extra ==" not in w] == listed("dependencies")
    (scripts,) = installed.glob("editloss-*/entry_points.txt")
    assert re.findall(r"^(\w+) = (\S+)$", scripts.read_text(encoding="utf-8"), re.M) == [
        ("editloss", "editloss_core.__main__:enter")
    ]
    for extra in set(EXTRAS.values()):
        assert sorted(w.split(";")[0] for w in wanted if f'extra == "{extra}"' in w) == sorted(listed(extra))


WITHOUT_EXTRAS = """
import json
import editloss_core.verdict.__main__, editloss_core.drawing.sheet, editloss_core.encoders
{readme}
said = {{"file": editloss_core.__file__, "loss": loss.item(), "finite": bool(z_pred.grad.isfinite().all())}}
from editloss_core.demo.model import load_autoencoder, load_diffusion
said["weights"] = [len(load_autoencoder()), len(load_diffusion())]
for name, call in {{
    "timm": lambda: editloss_core.encoders.TimmEncoder("vit_tiny_patch16_224"),
    "open_clip": lambda: editloss_core.encoders.OpenCLIPEncoder("ViT-B-32"),
    "matplotlib": lambda: editloss_core.drawing.sheet.new_figure(800, 4, 3),
}}.items():
    try:
        call()
    except ModuleNotFoundError as error:
        said[name] = str(error)
said["judging"] = editloss_core.verdict.__main__.main(["edits", "--out", "judged"])
print(json.dumps(said))
"""


def test_core_works_without_comfyui_and_without_extras(installed, tmp_path):
    (readme,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    code = WITHOUT_EXTRAS.format(readme=readme)
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    done = run(installed, tmp_path, "example.py")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert Path(said["file"]).is_relative_to(installed)
    assert said["finite"] and said["loss"] > 0 and min(said["weights"]) > 20
    for package, extra in (("timm", "encoders"), ("open_clip", "encoders"), ("matplotlib", "reports")):
        assert f"{package} is not installed: pip install -e '.[{extra}]'" in said[package]
    assert said["judging"] == 2 and "pip install -e '.[reports]'" in done.stderr
    assert not (tmp_path / "judged").exists()


def test_diagnostics_of_the_wheel_judge_a_folder(installed, tmp_path):
    command = ("-m", "editloss_core.verdict")
    told = run(installed, tmp_path, *command, "--help")
    assert told.returncode == 0 and told.stdout.startswith("usage: python -m editloss_core.verdict")

    shipped = installed / "editloss_core" / "demo" / "pictures"
    for part, folder in (("before", shipped), ("after", shipped), ("output", ROOT / "tests" / "pictures")):
        (tmp_path / "edits" / part).mkdir(parents=True)
        shutil.copy(folder / part / "oak_chair.webp", tmp_path / "edits" / part)
    alone = run(installed, tmp_path, "-m", "editloss_core", "diagnose", "edits", "--format", "line")
    assert alone.returncode == 0, alone.stderr  # printing needs no extra
    line = json.loads(alone.stdout)
    assert (line["command"], line["exit"], line["judged"]) == ("diagnose", 0, 1)
    judge = (*command, "edits", "--out", "judged", "--workers", "1")
    done = run(installed, tmp_path, *judge, extras=("reports",))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "judged" / "verdicts.csv").read_text(encoding="utf-8").count("oak_chair") == 1
    assert Image.open(tmp_path / "judged" / "sheet.png").width >= 640
