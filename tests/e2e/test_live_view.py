"""The live view in a real JupyterLab, with synthetic streams: painted, stopped, run again, reloaded, and without a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest

from specdec_lab.view.palette import COMPUTE, DRAFT, KV

if TYPE_CHECKING:
    from lab import Notebook
    from playwright.sync_api import Browser

    OpenNotebook = Callable[[Sequence[str]], Notebook]

RECORDED = Path(__file__).parents[2] / "tuning_db" / "AMD_EPYC_2t" / "traces"  # of `specdec-lab profile`, shipped
IMPORTS = "import synthetic, threading, ipywidgets\nfrom specdec_lab.view import LiveRun"
PROFILE = """live = LiveRun(
    synthetic.profile(["8x4096", "1x1024"], ["off", "self:4+60/chain3"], blocks={blocks}, count={count}, pace_s={pace}),
    title="Two cells, plain against self-drafting",
).start()
live"""
LONG = PROFILE.format(blocks=50, count=30, pace=0.005)  # ends only when it is stopped
SHORT = PROFILE.format(blocks=3, count=20, pace=0.003)
COUNTS = """print(
    sum(t.name.startswith("specdec-") for t in threading.enumerate()), "threads",
    len([w for w in ipywidgets.widgets.widget._instances.values() if type(w).__name__ == "LiveWidget"]), "widgets",
)"""


def test_a_run_paints_what_it_does_while_it_runs(notebook: OpenNotebook, artefacts: Path) -> None:
    book = notebook([IMPORTS, LONG])
    book.run_cell(0)
    book.run_cell(1)
    book.await_view("Number(d.steps) > 150")
    assert book.view()["gaps"] == "0"
    for family in (KV, COMPUTE, DRAFT):
        assert book.count_pixels(family.colour, canvas=0) > 2000
    assert book.count_pixels(KV.colour, canvas=1) > 500  # its share of verify
    assert book.count_pixels(COMPUTE.colour, canvas=2) > 2000  # acceptance bars
    text = book.output_text(1)
    for words in ("forced", "KV fits in cache", "sdpa", "tokens/s", "baseline", "8x4096"):
        assert words in text
    pictures = book.page.get_by_role("img").all()
    spoken = " ".join(picture.get_attribute("aria-label") or "" for picture in pictures)
    assert "Time per round, 8x4096" in spoken
    book.page.screenshot(path=artefacts / "live-light.png")
    book.press("Stop")
    book.await_view("d.state === 'stopped'")


def test_a_fall_back_is_shown_with_its_round_and_both_configurations(notebook: OpenNotebook, artefacts: Path) -> None:
    falling = """live = LiveRun(
    [synthetic.fallen_back("1x4096", "self:4+60/chain4", "ngram/chain4", at=60, count=150, pace_s=0.002)], title="A policy"
).start()
live"""
    book = notebook([IMPORTS, falling])
    book.run_cell(0)
    book.run_cell(1)
    book.await_view("d.state === 'finished' && d.steps === '150'")
    shown = book.page.locator("body").inner_text()
    book.page.screenshot(path=artefacts / "live-fall-back.png")
    assert "round 60" in shown
    assert "fell back from self:4+60/chain4 to ngram/chain4" in shown


def test_before_the_first_round_the_view_says_that_it_waits(notebook: OpenNotebook, artefacts: Path) -> None:
    waiting = """gate = threading.Event()
def held():
    gate.wait(60)
    yield synthetic.stream("8x4096", "off", 5)
live = LiveRun(held(), title="Waiting").start()
live"""
    book = notebook([IMPORTS, waiting, "gate.set()"])
    book.run_cell(0)
    book.run_cell(1)
    book.await_view("d.state === 'running' && d.theme")
    assert book.count_pixels(KV.colour) == 0
    book.page.screenshot(path=artefacts / "live-empty.png")
    book.run_cell(2)
    book.await_view("d.state === 'finished' && d.steps === '5'")
    assert book.count_pixels(KV.colour) > 500


def test_stop_and_pause_reach_a_run_in_the_background(notebook: OpenNotebook) -> None:
    book = notebook([IMPORTS, LONG, "print(live.state, live.is_alive, sum(len(r.steps) for r in live.runs) == live.num_seen)"])
    book.run_cell(0)
    book.run_cell(1)
    book.await_view("Number(d.steps) > 20")
    book.press("Pause")
    book.await_view("d.state === 'paused'")
    frozen = book.ask("live.num_seen")
    book.press("Resume")
    book.await_view("d.state === 'running'")
    book.await_view(f"Number(d.steps) > {frozen} + 20")
    book.press("Stop")
    book.await_view("d.state === 'stopped'")
    book.run_cell(2)
    book.await_output(2, "stopped False True")
    steps = book.view()["steps"]
    assert book.ask("live.num_seen") == steps  # the view shows all of what was recorded


def test_the_stop_button_works_while_another_cell_keeps_the_kernel_busy(notebook: OpenNotebook) -> None:
    book = notebook([IMPORTS, LONG, "runs = live.wait(60)\nprint(len(runs) > 0, live.state)"])
    book.run_cell(0)
    book.run_cell(1)
    book.await_view("Number(d.steps) > 20")
    major = int(book.ask("__import__('ipykernel').version_info[0]"))
    book.start_cell(2)
    book.press("Stop")
    if major < 7:  # such a kernel hears buttons only between cells, and the view says what works
        book.page.get_by_text("a busy cell can hold buttons up").wait_for()
        return
    book.await_view("d.state === 'stopped'", timeout_ms=10_000)
    book.await_output(2, "True stopped")


def test_an_interrupt_of_a_waiting_cell_stops_the_run_and_keeps_its_data(notebook: OpenNotebook) -> None:
    waiting = "print('waiting', flush=True)\nruns = live.wait()\nprint(runs[-1].interrupted, live.state)"
    book = notebook([IMPORTS, LONG, waiting])
    book.run_cell(0)
    book.run_cell(1)
    book.start_cell(2)
    book.await_output(2, "waiting")  # a starred prompt may still wait for its kernel, and an idle one hears no interrupt
    book.await_view("Number(d.steps) > 20")
    book.page.locator(".jp-NotebookPanel-toolbar [data-jp-item-name='interrupt'] jp-button").click()
    book.await_output(2, "True stopped")


def test_running_the_cell_again_leaves_one_run_one_view_and_no_leak(notebook: OpenNotebook) -> None:
    book = notebook([IMPORTS, LONG, COUNTS])
    book.run_cell(0)
    for _ in range(4):
        book.run_cell(1)
        book.await_view("Number(d.steps) > 5 && d.state === 'running'")
    book.run_cell(2)
    book.await_output(2, "2 threads 1 widgets")
    assert book.page.locator(".specdec").count() == 1
    book.press("Stop")
    book.await_view("d.state === 'stopped'")


def test_dark_and_narrow_pages_are_followed(notebook: OpenNotebook, artefacts: Path) -> None:
    book = notebook([IMPORTS, LONG])
    book.run_cell(0)
    book.run_cell(1)
    book.await_view("Number(d.steps) > 200 && d.theme === 'light'")
    book.set_theme("JupyterLab Dark")
    book.await_view("d.theme === 'dark'")
    assert book.count_pixels(KV.colour) > 2000
    book.page.locator(".specdec").screenshot(path=artefacts / "view-dark.png", animations="disabled")
    book.page.set_viewport_size({"width": 760, "height": 1500})
    book.page.wait_for_function(
        "() => { const v = document.querySelector('.specdec'); const c = v.querySelector('canvas');"
        " return c.clientWidth <= v.clientWidth && v.scrollWidth <= v.clientWidth + 1 && v.clientWidth < 700; }"
    )
    book.page.screenshot(path=artefacts / "live-narrow.png")
    book.press("Stop")
    book.await_view("d.state === 'stopped'")
    book.page.set_viewport_size({"width": 1320, "height": 1000})
    book.set_theme("JupyterLab Light")
    book.await_view("d.theme === 'light'")
    book.page.wait_for_function("() => document.querySelector('.specdec canvas').clientWidth > 1000")
    book.page.locator(".specdec").screenshot(path=artefacts / "view-light.png", animations="disabled")


def test_a_recorded_run_is_shown_again_as_it_happened(notebook: OpenNotebook, artefacts: Path) -> None:
    """The pictures of the README are taken here: `make pictures`."""
    book = notebook(["%load_ext specdec_lab", f"recorded = %specdec replay {RECORDED} --speed 20\nrecorded"])
    book.run_cell(0)
    book.run_cell(1)
    book.await_view("d.state === 'finished' && Number(d.steps) > 100")
    shown = book.page.locator(".specdec").inner_text()
    for words in ("8x4096", "1x1024", "self:4+252/chain4", "vs plain decoding"):
        assert words in shown
    assert "forced" not in shown, "a recording of what was measured"
    for theme, name in (("JupyterLab Light", "light"), ("JupyterLab Dark", "dark")):
        book.set_theme(theme)
        book.await_view(f"d.theme === '{name}'")
        assert book.count_pixels(KV.colour) > 2000
        book.page.locator(".specdec").screenshot(path=artefacts / f"recorded-{name}.png", animations="disabled")


def test_after_a_reload_the_view_is_back_and_goes_on(notebook: OpenNotebook) -> None:
    book = notebook([IMPORTS, LONG])
    book.run_cell(0)
    book.run_cell(1)
    book.await_view("Number(d.steps) > 50")
    book.save()
    before = int(book.view()["steps"])
    book.page.reload()
    book.await_kernel()
    book.await_view(f"Number(d.steps) > {before} && d.state === 'running' && d.stale === 'false'", timeout_ms=30_000)
    book.press("Stop")
    book.await_view("d.state === 'stopped'")


def test_what_is_saved_is_the_final_table_without_widget_state(notebook: OpenNotebook, folder: Path, artefacts: Path) -> None:
    book = notebook([IMPORTS, SHORT])
    book.run_cell(0)
    book.run_cell(1)
    book.await_view("d.state === 'finished'")
    book.page.wait_for_function("() => jupyterapp.shell.currentWidget.context.model.toJSON().cells[1].outputs.length === 1")
    book.page.screenshot(path=artefacts / "live-finished.png")
    book.save()
    saved = nbformat.read(folder / book.name, as_version=4)
    assert "widgets" not in saved.metadata
    (output,) = saved.cells[1].outputs
    assert "finished, 240 steps, 12 runs ended" in output.data["text/plain"]
    assert "n=3" in output.data["text/html"]
    assert len(str(output)) < 100_000


def test_without_its_kernel_an_untrusted_page_shows_the_table(notebook: OpenNotebook, folder: Path, artefacts: Path) -> None:
    book = notebook([IMPORTS, SHORT])
    book.run_cell(0)
    book.run_cell(1)
    book.await_view("d.state === 'finished'")
    book.save()
    book.shutdown()
    saved = nbformat.read(folder / book.name, as_version=4)
    saved.metadata["touched"] = True  # another text: the server no longer vouches for it
    saved.cells[1].metadata["trusted"] = False
    nbformat.write(saved, folder / book.name)
    book.open()
    table = book.page.locator(".jp-CodeCell >> nth=1 >> .jp-OutputArea-output table").first
    table.wait_for(timeout=15_000)
    assert not book.page.evaluate("() => jupyterapp.shell.currentWidget.content.model.cells.get(1).trusted")
    assert book.page.locator(".specdec").count() == 0
    assert "vs plain decoding" in table.inner_text()
    bars = (
        "() => [...document.querySelectorAll('.jp-OutputArea-output td div')].map((d) => getComputedStyle(d).backgroundColor)"
    )
    assert "rgb(0, 119, 187)" in book.page.evaluate(bars)
    assert book.page.locator(".jp-OutputArea-output img").first.evaluate("(img) => img.complete && img.naturalWidth > 300")
    book.page.screenshot(path=artefacts / "fallback-untrusted.png")


@pytest.mark.parametrize("form", ["static", "text"])
def test_a_forced_form_shows_tables_and_no_widget(notebook: OpenNotebook, form: str) -> None:
    book = notebook([f"%env SPECDEC_DISPLAY={form}\n{IMPORTS}", SHORT + "\n", "live.wait(30)\nlive"])
    book.run_cell(0)
    book.run_cell(1)
    book.run_cell(2)
    book.await_output(2, "vs plain decoding")
    book.await_output(2, "n=3")
    assert book.page.locator(".specdec").count() == 0
    assert (book.page.locator(".jp-CodeCell >> nth=2 >> table").count() > 0) == (form == "static")


def test_a_lost_message_leaves_a_hole_until_the_next_keyframe(browser: Browser, folder: Path, tmp_path: Path) -> None:
    from lab import Notebook, serve, write_notebook

    flood = "import time\nfor i in range(150):\n    print(i, flush=True)\n    time.sleep(0.02)"
    write_notebook(folder, "flood.ipynb", [IMPORTS, LONG, flood])
    with serve(tmp_path, folder, "--ZMQChannelsWebsocketConnection.iopub_msg_rate_limit=15") as address:
        page = browser.new_page(viewport={"width": 1320, "height": 1000})
        book = Notebook(page, address, "flood.ipynb")
        book.run_cell(0)
        book.run_cell(1)
        book.start_cell(2)
        book.await_view("Number(d.gaps) > 0 && d.stale === 'true'")
        book.await_view("d.stale === 'false' && d.state === 'running'")
        book.press("Stop")
        book.await_view("d.state === 'stopped'")
        book.shutdown()
        page.close()


def test_a_figure_is_drawn_by_plotly_without_an_upload_button(notebook: OpenNotebook, artefacts: Path) -> None:
    draw = """from IPython.display import display
from specdec_lab.view import figures
runs = LiveRun(synthetic.profile(["8x4096"], ["self:4+60/chain3"], blocks=2, count=60), title="t").start().wait()
display(figures.figure_bundle(figures.step_strip_figure(figures.step_strip(runs)), "a strip"), raw=True)"""
    book = notebook([IMPORTS, draw])
    book.run_cell(0)
    book.run_cell(1)
    book.page.locator(".js-plotly-plot .main-svg").first.wait_for()
    titles = book.page.locator(".modebar-btn").evaluate_all("(all) => all.map((b) => b.dataset.title)")
    assert titles
    assert not [t for t in titles if t and ("Share" in t or "Cloud" in t)]
    book.page.screenshot(path=artefacts / "figure-strip.png")
