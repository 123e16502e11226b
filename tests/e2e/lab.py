"""A JupyterLab of its own for the browser tests, and what a person does with a notebook in it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import Page
from playwright.sync_api import TimeoutError as PatienceLost

PATIENCE_MS = 60_000  # a wait ends as soon as its condition holds; this is for a machine with other work
TOKEN = "browser-test"
ROOT = Path(__file__).parents[2]
KERNEL = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel"


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment(home: Path) -> dict[str, str]:
    """Settings, data and workspaces in a directory of their own; no news pop-up over the corner of the page."""
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    folders += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    places = {name: str(home / name.lower()) for name in folders}
    settings = Path(places["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    other_kernel = os.environ.get("SPECDEC_KERNEL_PATH")  # a folder made by: pip install --target FOLDER ipykernel==X
    folders_of_code = (*filter(None, [other_kernel]), ROOT, ROOT / "kernels", Path(__file__).parent)
    paths = os.pathsep.join(map(str, folders_of_code))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SPECDEC_")}
    return {**inherited, **places, "PYTHONPATH": paths}


@contextlib.contextmanager
def serve(home: Path, notebooks: Path, *extra: str) -> Iterator[str]:
    """The address of a running JupyterLab; it is ended by its process id."""
    port = free_port()
    arguments = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={notebooks}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly",
        *extra,
    ]
    log = (home / "server.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *arguments], env=environment(home), stdout=log, stderr=subprocess.STDOUT
    )
    try:
        _await_server(f"http://127.0.0.1:{port}/api?token={TOKEN}", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(server)
        log.close()


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(timeout=20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _await_server(address: str, server: subprocess.Popen[bytes], patience_s: float = 60.0) -> None:
    give_up = time.monotonic() + patience_s
    while time.monotonic() < give_up and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2):
            return
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not answer at {address} within {patience_s:.0f} s; see server.log")


def write_notebook(folder: Path, name: str, cells: Sequence[str]) -> None:
    """A notebook of code cells without outputs."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / name)


class Notebook:
    """One open notebook: run cells, press what is in the output, read what is painted."""

    def __init__(self, page: Page, address: str, name: str) -> None:
        self.page, self.address, self.name = page, address, name
        self.open()

    def open(self, *, reset: bool = True) -> None:
        """Open the notebook and wait until its kernel answers."""
        self.page.goto(f"{self.address}/doc/tree/{self.name}?token={TOKEN}" + ("&reset" if reset else ""))
        self.await_kernel()

    def await_kernel(self) -> None:
        """The DOM shows idle too early; the kernel connection knows."""
        ready = f"() => {{ const k = {KERNEL}; return k && k.connectionStatus === 'connected' && k.status === 'idle'; }}"
        self.page.wait_for_function(ready, timeout=60_000)

    def start_cell(self, i: int) -> None:
        """Run a cell and come back when it has been taken up."""
        before = self._prompt(i)
        for _ in range(3):
            self.page.locator(f".jp-CodeCell >> nth={i} >> .cm-content").click()
            self.page.keyboard.press("Shift+Enter")
            with contextlib.suppress(PatienceLost):
                self._await_prompt(i, f"text !== {json.dumps(before)}", 3_000)
                return
        raise AssertionError(f"cell {i} was never taken up; its prompt stayed {before!r}")

    def run_cell(self, i: int, timeout_ms: int = PATIENCE_MS) -> str:
        """Run a cell, wait for its end, return the text of its output as far as it is drawn: await_output waits for words."""
        self.start_cell(i)
        self._await_prompt(i, "/[0-9]/.test(text)", timeout_ms)
        return self.output_text(i)

    def await_output(self, i: int, words: str) -> str:
        """Wait until the output of a cell shows these words; JupyterLab draws it after the prompt says that the cell ended."""
        script = """([i, words]) => {
            const outputs = document.querySelectorAll('.jp-CodeCell')[i].querySelectorAll('.jp-OutputArea-output');
            return [...outputs].map((output) => output.innerText).join('\\n').includes(words);
        }"""
        with contextlib.suppress(PatienceLost):
            self.page.wait_for_function(script, arg=[i, words], timeout=PATIENCE_MS)
        shown = self.output_text(i)
        assert words in shown, f"cell {i} shows {shown!r}"
        return shown

    def _prompt(self, i: int) -> str:
        return self.page.locator(f".jp-CodeCell >> nth={i} >> .jp-InputPrompt").inner_text()

    def _await_prompt(self, i: int, condition: str, timeout_ms: int) -> None:
        script = f"""() => {{
            const text = document.querySelectorAll('.jp-CodeCell')[{i}].querySelector('.jp-InputPrompt').innerText;
            return {condition};
        }}"""
        self.page.wait_for_function(script, timeout=timeout_ms)

    def output_text(self, i: int) -> str:
        """All text of a cell's outputs."""
        return "\n".join(self.page.locator(f".jp-CodeCell >> nth={i} >> .jp-OutputArea-output").all_inner_texts())

    def ask(self, source: str) -> Any:
        """Evaluate an expression in the kernel and return its value, past the notebook's cells."""
        script = f"""async (source) => {{
            const kernel = {KERNEL};
            const future = kernel.requestExecute({{code: '', silent: true, user_expressions: {{it: source}}}});
            const reply = await future.done;
            const it = reply.content.user_expressions.it;
            return it.status === 'ok' ? it.data['text/plain'] : `${{it.ename}}: ${{it.evalue}}`;
        }}"""
        return self.page.evaluate(script, source)

    def await_view(self, condition: str, timeout_ms: int = PATIENCE_MS) -> None:
        """Wait until the data of the (last) live view fulfil a condition over `d`."""
        script = f"""() => {{
            const all = [...document.querySelectorAll('.specdec')];
            if (!all.length) return false;
            const d = all[all.length - 1].dataset;
            return {condition};
        }}"""
        self.page.wait_for_function(script, timeout=timeout_ms)

    def view(self) -> dict[str, str]:
        """The data attributes of the last live view."""
        found: dict[str, str] = self.page.evaluate("() => ({...[...document.querySelectorAll('.specdec')].at(-1).dataset})")
        return found

    def count_pixels(self, colour: str, canvas: int = 0) -> int:
        """Pixels of exactly this colour in a canvas of the last live view."""
        script = """([hex, index]) => {
            const canvas = [...document.querySelectorAll('.specdec')].at(-1).querySelectorAll('canvas')[index];
            const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
            const want = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
            let n = 0;
            for (let i = 0; i < data.length; i += 4) {
                if (data[i] === want[0] && data[i + 1] === want[1] && data[i + 2] === want[2] && data[i + 3] === 255) n++;
            }
            return n;
        }"""
        number: int = self.page.evaluate(script, [colour, canvas])
        return number

    def press(self, name: str) -> None:
        """Press a button of the live view by its name, as a screen reader would."""
        self.page.get_by_role("button", name=name, exact=True).last.click()

    def save(self) -> None:
        """Save the notebook and wait until it is on disk."""
        self.page.evaluate("() => jupyterapp.shell.currentWidget.context.save()")

    def shutdown(self) -> None:
        """End the kernel."""
        self.page.evaluate("() => jupyterapp.shell.currentWidget?.sessionContext?.shutdown()")

    def set_theme(self, name: str) -> None:
        """Switch JupyterLab's theme."""
        self.page.evaluate("(theme) => jupyterapp.commands.execute('apputils:change-theme', {theme})", name)
