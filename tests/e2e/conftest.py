"""Fixtures of the browser tests: one server and one browser for all of them, one page and one kernel per test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lab import Notebook
    from playwright.sync_api import Browser, Page

CHROMIUM = Path(os.environ.get("SPECDEC_CHROMIUM", "/usr/bin/chromium"))
# Not ours: a page without an icon, and JupyterLab asking a kernel that was just shut down for its debugger.
HARMLESS = ("favicon", "the server responded with a status of 404", "Could not restore the debugger state")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder drives a browser."""
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's chromium; without it the tests are skipped, or fail where a browser is required."""
    if not CHROMIUM.exists():
        reason = f"no browser at {CHROMIUM}: apt-get install chromium, or set SPECDEC_CHROMIUM"
        if os.environ.get("SPECDEC_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebooks of the tests are."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="session")
def server(browser: Browser, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab."""
    from lab import serve

    with serve(tmp_path_factory.mktemp("lab"), folder) as address:
        yield address


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails its test on any script error."""
    context = browser.new_context(viewport={"width": 1320, "height": 1000})
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda m: faults.append(m.text) if m.type == "error" and not any(h in m.text for h in HARMLESS) else None,
    )
    yield page
    context.close()
    assert faults == []


@pytest.fixture
def notebook(
    page: Page, server: str, folder: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[[Sequence[str]], Notebook]]:
    """A function that opens a fresh notebook of these cells."""
    from lab import Notebook, write_notebook

    opened: list[Notebook] = []

    def open_notebook(cells: Sequence[str]) -> Notebook:
        name = f"{request.node.name}-{len(opened)}.ipynb"
        write_notebook(folder, name, cells)
        opened.append(Notebook(page, server, name))
        return opened[-1]

    yield open_notebook
    for book in opened[-1:]:
        book.shutdown()


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: SPECDEC_ARTEFACTS, else a temporary folder."""
    chosen = os.environ.get("SPECDEC_ARTEFACTS")
    path = Path(chosen) if chosen else tmp_path_factory.mktemp("artefacts")
    path.mkdir(parents=True, exist_ok=True)
    return path
