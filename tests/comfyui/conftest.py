"""A real ComfyUI and a real browser for the tests in this folder; nothing of ComfyUI is mocked.

The server starts once for the whole session (about 15 s on two cores). Where its requirements are missing,
every test here is skipped with the reason, and no test module is imported. With ``COMFYUI_PATH`` these are also what
that ComfyUI's own requirements.txt lists.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parents[1] / "workflows"):  # helpers; comfy_server, comfy_client, ui_to_api, run
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from runner.server import cache_folder

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page
    from runner.client import Client
    from runner.server import ComfyServer

REQUIRED = (
    "torch",
    "torchsde",
    "torchvision",
    "transformers",
    "sentencepiece",
    "safetensors",
    "aiohttp",
    "yaml",
    "PIL",
    "scipy",
    "psutil",
    "alembic",
    "sqlalchemy",
    "av",
    "einops",
    "requests",
    "comfyui_frontend_package",
    "playwright",
)


def _listed(requirements: Path) -> list[str]:
    """The packages that a ComfyUI cannot do without: those of its list before the comment that calls the others not essential."""
    essential = requirements.read_text(encoding="utf-8").partition("#non essential")[0]
    return re.findall(r"^[A-Za-z0-9][\w.-]*", essential, re.M)


def _is_installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


MISSING = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
WHAT_TO_DO = 'pip install -e ".[test]"'
LISTED = Path(os.environ.get("COMFYUI_PATH", ""), "requirements.txt").resolve()
# The extra has what the ComfyUI of the package index needs, which does without torchaudio.
if os.environ.get("COMFYUI_PATH") and LISTED.is_file() and not LISTED.is_relative_to(cache_folder().resolve()):
    MISSING += [name for name in _listed(LISTED) if not _is_installed(name)]
    WHAT_TO_DO += f", and what {LISTED} lists; CONTRIBUTING.md has the line"

# Chromium as root, in a container, without a GPU, and without calls to its maker or to any host but this one. (A route of
# Playwright's would hold every request, pictures too, until this process has time to look at it.)
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A first visit opens a tutorial and a template browser on top of the graph.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Release.Status": "what's new seen",
    "Comfy.Validation.NodeDefs": True,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Minimap.Visible": False,
}


class _SkippedModule(pytest.Module):
    """A test module that is not imported, because what it imports is not there."""

    def collect(self) -> list[Any]:
        pytest.skip(f"needs {', '.join(MISSING)}: {WHAT_TO_DO}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder needs a ComfyUI."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.comfyui)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Generator[None, list[Any], list[Any]]:
    """Put a skip in the place of every module here, its doctests included, if something is missing."""
    collected = yield
    if MISSING and file_path.suffix == ".py":
        tests = file_path.name.startswith("test_")
        return [_SkippedModule.from_parent(parent, path=file_path)] if tests else []
    return collected


@pytest.fixture(scope="session")
def comfyui_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """One ComfyUI with this pack, in a base directory of its own.

    The pack is a copy of what the registry's archive would hold, so that every test here says that nothing is missing in
    it. (Without git it is a link to the checkout.) No connection to another host is let through, and after the last test
    nothing of the pack must have asked for one.
    """
    from runner.server import PACK, ComfyServer

    base = _base(tmp_path_factory, "comfyui")
    asked = base / "connections.jsonl"
    guard = os.pathsep.join(filter(None, [str(HERE / "guard"), os.environ.get("PYTHONPATH")]))
    with ComfyServer(
        base=base,
        env={"PYTHONPATH": guard, "EDITLOSS_CONNECTIONS": str(asked), "HF_HUB_OFFLINE": "0"},
    ) as server:
        yield server
    lines = asked.read_text(encoding="utf-8").splitlines() if asked.is_file() else []
    pack = (base / "custom_nodes" / PACK).resolve()
    ours = [line for line in lines if any(str(pack) in file for file in json.loads(line)["stack"])]
    assert not ours, "the pack asked for a connection:\n" + "\n".join(ours)


@pytest.fixture(scope="session")
def newest_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The same ComfyUI behind the newest frontend."""
    from frontends import newest_frontend
    from runner.server import ComfyServer

    with ComfyServer(base=_base(tmp_path_factory, "newest"), front_end_root=newest_frontend()) as server:
        yield server


def _base(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder for one server, with the pack and the page's settings."""
    import archive
    from runner.server import PACK

    base = tmp_path_factory.mktemp(name)
    archive.unpack(base / "custom_nodes" / PACK)
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
    return base


@pytest.fixture(scope="session")
def client(comfyui_server: ComfyServer) -> Client:
    from runner.client import Client

    return Client(comfyui_server.url)


@pytest.fixture(scope="session")
def object_info(client: Client) -> dict[str, Any]:
    """Every node class of the running server."""
    return client.object_info()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = find_chromium(playwright.chromium.executable_path)
        chromium = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGS)
        yield chromium
        chromium.close()


def find_chromium(playwrights_own: str) -> str:
    """The path of a Chromium, after one attempt to install one; fails the test if there is none."""
    named = os.environ.get("CHROMIUM_PATH")
    if named:
        if not Path(named).is_file():
            pytest.fail(f"CHROMIUM_PATH is {named}, and there is no such file")
        return named
    if Path(playwrights_own).is_file():
        return playwrights_own
    found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if found:
        return found
    command = [sys.executable, "-m", "playwright", "install", "chromium"]
    try:
        said = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600).stderr
    except subprocess.TimeoutExpired:
        said = "the installation took more than 10 minutes"
    if not Path(playwrights_own).is_file():
        pytest.fail(
            "no Chromium for the frontend tests. Install one with 'python -m playwright install chromium' or "
            f"your system's package manager, or set CHROMIUM_PATH.\n{said.strip()[-800:]}"
        )
    return playwrights_own


@pytest.fixture
def page(browser: Browser, comfyui_server: ComfyServer) -> Iterator[Page]:
    """A fresh page of the frontend that ComfyUI asks for."""
    from frontends import open_page

    with open_page(browser, comfyui_server) as tab:
        yield tab


@pytest.fixture(scope="session", params=["own", "newest"])
def shared_page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    """One page for many tests, which clear the graph: of the frontend that ComfyUI asks for, then of the newest one."""
    from frontends import open_page

    newest = request.param == "newest"
    server = request.getfixturevalue("newest_server" if newest else "comfyui_server")
    with open_page(browser, server, newer_server=newest) as tab:
        # Without a GPU, fading dialogs in and out on a large page takes three quarters of the time of these tests.
        tab.set_viewport_size({"width": 1200, "height": 800})
        tab.add_style_tag(content="*, *::before, *::after { transition: none !important; animation: none !important }")
        tab.server, tab.newest = server, newest
        yield tab
