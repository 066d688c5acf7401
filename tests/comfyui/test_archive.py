"""The archive that the registry would be given: what is in it, that ComfyUI runs from it, and that it keeps to the rules."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import archive
import pytest
from runner.server import PACK

HERE, ROOT = Path(__file__).parent, archive.ROOT
FILES = archive.files() or []
MOST_BYTES = 16 << 20
# The rules: https://docs.comfy.org/registry/standards (no eval or exec, nothing installed by a running pack, nothing
# obfuscated). What is uploaded is then scanned by YARA rules, which compare text: in every file, comments, JSON and Markdown
# too. One finding of the lowest severity is enough that nobody gets the version before a person has looked at it
# (Comfy-Org/registry-backend#180). The rules are not public; their names and much of what they match are, in what they said of
# others' packs: registry-backend#189, #192, #193, #208, #229, Comfy-Org/ComfyUI-Manager#3111, artokun/comfyui-mcp-panel#72,
# #1854, #1910. What has no such name here is ours.
FLAGGED = {
    "python_dynamic_execution": r"(?<![\w.])(?:eval|exec|compile)\s*\(|\.(?:eval|exec)\(\s*[^)\s]|\bbuiltins\b",
    "python_bytecode_manipulation": r"__import__|importlib\.import_module|\bCodeType\s*\(|\bexec_module\b|\brunpy\b",
    "python_environment_manipulation": r"\benviron\b|\b(?:get|put|unset)env\b",
    "python_network_operations": (
        r"\.(?:connect|bind|listen|send|sendall|sendto|recv|recvfrom|recv_into)\s*\(|\bsocket\.\w|\bcreate_connection\b"
        r"|\burllib\.\w|\burl(?:open|retrieve)\b|\bhttp\.client\b|\b(?:requests|httpx|aiohttp)\.\w|\bClientSession\b"
        r"|\b(?:ftp|smtp)lib\b|\bgettempdir\b|\bhf_hub_download\b|\bsnapshot_download\b|\btorch\.hub\b|\bmodel_zoo\b"
    ),
    "python_command_injection_risk": r"\bsubprocess\b|\bos\.(?:system|popen|startfile|exec\w+|spawn\w+)\b|shell=True",
    "python_url_command_execution": r"\b(?:curl|wget|ffmpeg|ffprobe|yt-dlp)\b",
    "python_privilege_escalation": r"\b(?:sudo|doas|pkexec|runas)\b",
    "python_database_connections": r"\bsqlite3\b",
    "python_sensitive_file_access": r"\bPath\([^()]*\)\.read_\w+\(|/etc/(?:passwd|shadow)|\.ssh\b|\bid_rsa\b",
    "python_minified_code": r"[A-Za-z0-9+/=_]{256,}",  # base64 and the like; lines of code are counted apart
    "windows_process_manipulation": r"\bctypes\b|\bkernel32\b|\bOpenProcess\b|\bwinreg\b",
    "contains_rm_rf": r"\brm -rf\b",
    "contains_blacklisted_url": r"\braw\.githubusercontent\.com\b|\bpastebin\.com\b|\bngrok\b|\b\w+://\d+\.\d+\.\d+\.\d+",
    "prohibited-string": r"\b(?:auth_token|api_key)_comfy_org\b",
    "obfuscation": (
        r"\b(?:b16|b32|b64|b85|a85|urlsafe_b64)decode\b|\bunhexlify\b|\bfromhex\b|\bcodecs\.decode\b|\bunicode_escape\b"
        r"|\b(?:zlib|gzip|bz2|lzma)\.\w|(?:\\x[0-9a-fA-F]{2}){8}"
    ),
    "pickle": (
        r"\b(?:c?[pP]ickle|marshal|shelve|dill|cloudpickle|joblib)\.\w+\(|\bimport (?:c?[pP]ickle|marshal|shelve|dill|joblib)\b"
        r"|allow_pickle=True|weights_only=False|\byaml\.(?:unsafe_|full_)?load\b|trust_remote_code"
    ),
    "runtime install": r"-m[\"', ]+pip\b|\bimport pip\b|\bensurepip\b|\bpip\._internal\b",
}
IN_SCRIPTS = {  # .js, and pages that a browser shows
    "script": (
        r"\b(?:eval|atob|fetch|importScripts|sendBeacon|XMLHttpRequest|WebSocket|EventSource)\b|\bnew Function\b|\bimport\s*\("
        r"|\bdocument\.write\w*|\b(?:inner|outer)HTML\b|\binsertAdjacentHTML\b|\bon(?:load|error)\b|\bjavascript:"
    ),
    "other host": r"\b(?:src|href|from|import|action)\s*[=(]?\s*[\"'](?:\w+:)?//|\burl\(\s*[\"']?(?:\w+:)?//",
}
MOST_IN_A_LINE = 500  # letters, of code
FORBIDDEN_MODULES = {
    "builtins", "ctypes", "dill", "ftplib", "http", "httpx", "huggingface_hub", "joblib", "marshal", "pickle", "pip", "requests",
    "runpy", "shelve", "smtplib", "socket", "sqlite3", "subprocess", "urllib", "wget", "winreg",
}  # fmt: skip
# Modules by name: the package that an extra brings, and the encoders, each of which imports what is large.
BY_NAME = {"editloss_core/extras.py", "editloss_core/encoders/__init__.py"}
TEXT = {".py", ".js", ".j2", ".json", ".md", ".toml", ".txt", ".typed", ".yaml", ""}
PICTURES_AND_WEIGHTS = {".jpg", ".png", ".webp", ".safetensors"}

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


def test_no_file_has_what_the_registry_flags():
    assert {Path(name).suffix for name in FILES} <= TEXT | PICTURES_AND_WEIGHTS
    texts = {n: (ROOT / n).read_text("utf-8") for n in FILES if Path(n).suffix in TEXT}
    assert {name: found for name, text in texts.items() if (found := flagged(name, text))} == {}


def flagged(name: str, text: str) -> list[str]:
    """What is wrong with one file of the archive: the rule and the line, or the piece of code."""
    suffix = Path(name).suffix
    rules = FLAGGED | (IN_SCRIPTS if suffix in (".js", ".j2") else {})
    found = [
        f"{rule}: {text[: match.start()].count(chr(10)) + 1}"
        for rule, pattern in rules.items()
        for match in re.finditer(pattern, text)
    ]
    if suffix in (".py", ".js"):
        found += [f"long line: {i}" for i, line in enumerate(text.splitlines(), 1) if len(line) > MOST_IN_A_LINE]
    if suffix == ".py":
        found += [f"code: {piece}" for node in ast.walk(ast.parse(text)) for piece in _forbidden(node, name in BY_NAME)]
    return found


def _forbidden(node: ast.AST, by_name: bool) -> list[str]:
    """What text alone does not tell: modules under other names, and how a function is called."""
    if isinstance(node, ast.Import):
        return [a.name for a in node.names if a.name.partition(".")[0] in FORBIDDEN_MODULES]
    if isinstance(node, ast.ImportFrom) and not node.level:
        modules = {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        wrong = {"os.system", "os.popen"} | (set() if by_name else {"importlib.import_module"})
        return sorted(m for m in modules if m.partition(".")[0] in FORBIDDEN_MODULES or m in wrong)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
        safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
        return [] if safe else ["torch.load without weights_only=True"]
    return []


FINDINGS = [
    ("a.py", "value = eval(text)", ["python_dynamic_execution: 1"]),
    ("a.py", "mx.eval(value)", ["python_dynamic_execution: 1"]),
    ("a.py", "import builtins", ["python_dynamic_execution: 1", "code: builtins"]),
    ("a.py", "__import__(name)", ["python_bytecode_manipulation: 1"]),
    ("a.py", "import importlib\nimportlib.import_module(name)", ["python_bytecode_manipulation: 2"]),
    ("a.py", "from importlib import import_module", ["code: importlib.import_module"]),
    ("a.py", "from os import environ as e", ["python_environment_manipulation: 1"]),
    ("a.py", "os.getenv('HOME')", ["python_environment_manipulation: 1"]),
    ("a.py", "link.connect (other)", ["python_network_operations: 1"]),
    ("a.py", "import urllib.request as r", ["python_network_operations: 1", "code: urllib.request"]),
    ("a.py", "from socket import socketpair", ["code: socket", "code: socket.socketpair"]),
    ("a.py", "torch.hub.load('a')", ["python_network_operations: 1"]),
    ("a.py", "from subprocess import run", ["python_command_injection_risk: 1", "code: subprocess", "code: subprocess.run"]),
    ("a.py", "from os import system", ["code: os.system"]),
    ("a.py", "x = ['-m', 'pip', 'install', 'a']", ["runtime install: 1"]),
    ("a.py", "import pickle as p", ["pickle: 1", "code: pickle"]),
    ("a.py", "torch.load(file)", ["code: torch.load without weights_only=True"]),
    ("a.py", "np.load(file, allow_pickle=True)", ["pickle: 1"]),
    ("a.py", "yaml.load(text)", ["pickle: 1"]),
    ("a.py", "run(zlib.decompress(base64.b64decode(x)))", ["obfuscation: 1", "obfuscation: 1"]),
    ("a.py", f"x = '{'QUJD' * 80}'", ["python_minified_code: 1"]),
    ("a.py", f"x = {'1 + ' * 200}1", ["long line: 1"]),
    ("a.py", "from ctypes import windll", ["windows_process_manipulation: 1", "code: ctypes", "code: ctypes.windll"]),
    ("a.py", "sqlite3 = None", ["python_database_connections: 1"]),
    ("a.py", "text = Path(name).read_text()", ["python_sensitive_file_access: 1"]),
    ("a.md", "fetch it with wget,\nthen sudo", ["python_url_command_execution: 1", "python_privilege_escalation: 2"]),
    ("a.md", "rm -rf models", ["contains_rm_rf: 1"]),
    ("a.json", '{"url": "https://raw.githubusercontent.com/a"}', ["contains_blacklisted_url: 1"]),
    ("a.json", '["api_key_comfy_org"]', ["prohibited-string: 1"]),
    ("a.js", "new Function(text)()", ["script: 1"]),
    ("a.js", "fetch(`/a`)", ["script: 1"]),
    ("a.js", "show.bind(this)", ["python_network_operations: 1"]),
    ("a.js", 'import x from "https://example.org/x.js"', ["other host: 1"]),
    ("a.j2", '<script src="//example.org/x.js"></script>', ["other host: 1"]),
    ("a.j2", "<svg onload=go>", ["script: 1"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "found"), FINDINGS, ids=[text[:40] for _, text, _ in FINDINGS])
def test_what_the_registry_flags_would_be_noticed(name, text, found):
    assert flagged(name, text) == found


def test_every_rule_is_seen_at_work_and_ordinary_code_passes():
    assert {line.partition(":")[0] for _, _, found in FINDINGS for line in found} - {"code", "long line"} == {
        *FLAGGED, *IN_SCRIPTS,
    }  # fmt: skip
    code = (
        "from .http import x\nfrom .sockets import Socket\nmodel.eval().to(device)\nre.compile(text)\nx.retrieval(1)\n"
        "import importlib.util\ntorch.load(file, weights_only=True)\nbase64.b64encode(x)\nentry.path.read_bytes()\n"
    )
    assert flagged("a.py", code) == []
    assert flagged(min(BY_NAME), "from importlib import import_module") == []


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
