"""The archive that the registry would be given: what is in it, that ComfyUI runs from it, and that it keeps to the rules."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import archive
import pytest
from comfy_server import PACK

HERE, ROOT = Path(__file__).parent, archive.ROOT
FILES = archive.files() or []
MOST_BYTES = 16 << 20
# Nothing is installed, downloaded, unpickled or run from text. https://docs.comfy.org/registry/standards
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {
    "ftplib", "http", "httpx", "huggingface_hub", "pip", "requests", "subprocess", "urllib", "wget",
}  # fmt: skip
FORBIDDEN_NAMES = {"os.system", "os.popen", "pickle.load", "torch.hub", "torch.utils.model_zoo"}

pytestmark = pytest.mark.skipif(not FILES, reason="needs git and a clone of the repository")


def test_everything_that_the_pack_is_made_of_is_in_it():
    parts = ("nodes", "editloss_core", "web", "locales", "configs")
    made_of = {
        path.relative_to(ROOT).as_posix()
        for part in parts
        for path in (ROOT / part).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    made_of |= {f"workflows/{path.name}" for path in (ROOT / "workflows").glob("*.json")}
    made_of |= {f"workflows/{path.name}" for path in (ROOT / "workflows").glob("*.jpg")}
    made_of |= {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "CHANGELOG.md"}
    assert set(archive.files()) == made_of


def test_it_is_small():
    assert sum((ROOT / name).stat().st_size for name in FILES) < MOST_BYTES


def test_comfyui_runs_from_exactly_these_files(comfyui_server, object_info):
    """Every test in this folder talks to this server."""
    pack = comfyui_server.base / "custom_nodes" / PACK
    there = {p.relative_to(pack).as_posix() for p in pack.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert there == set(FILES)
    ids = {name for name in object_info if name.startswith("EditLoss")}
    assert ids == {path.stem for path in map(Path, FILES) if path.parent == Path("web/docs") and path.suffix == ".md"}


def test_code_keeps_to_the_registrys_rules():
    broken = {
        name: found for name in FILES if name.endswith(".py") and (found := forbidden((ROOT / name).read_text("utf-8")))
    }
    assert broken == {}


def forbidden(code: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in FORBIDDEN_CALLS else []
        elif isinstance(node, ast.Attribute):
            found += [ast.unparse(node)] if ast.unparse(node) in FORBIDDEN_NAMES else []
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [node.module] if node.module.partition(".")[0] in FORBIDDEN_MODULES else []
    return found


def test_what_the_rules_forbid_would_be_noticed():
    code = "import urllib.request\nfrom subprocess import run\nfrom .http import x\ntorch.hub.load('a')\nmodel.eval()\neval('1')"
    assert sorted(forbidden(code)) == ["eval", "subprocess", "torch.hub", "urllib.request"]


def test_the_guard_refuses_other_hosts_and_writes_them_down(tmp_path):
    """Otherwise the session's server could ask for what it likes, and nobody would notice."""
    code = (
        "import socket, urllib.request\n"
        "for ask in (lambda: urllib.request.urlopen('http://example.org'),\n"
        "            lambda: socket.create_connection(('192.0.2.1', 80), 1)):\n"
        "    try:\n"
        "        ask()\n"
        "    except OSError as error:\n"
        "        print(error)\n"
        "with socket.create_server(('127.0.0.1', 0)) as here, socket.create_connection(here.getsockname()):\n"
        "    print('here')\n"
    )
    asked = tmp_path / "asked.jsonl"
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"PYTHONPATH": str(HERE / "guard"), "EDITLOSS_CONNECTIONS": str(asked)}
    (tmp_path / "asks.py").write_text(code, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "asks.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.count("the tests allow no connection") == 2 and done.stdout.endswith("here\n")
    lines = [json.loads(line) for line in asked.read_text(encoding="utf-8").splitlines()]
    assert [line["host"] for line in lines] == ["example.org", "192.0.2.1"]
    assert all(str(tmp_path / "asks.py") in line["stack"] for line in lines)
