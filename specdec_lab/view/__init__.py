"""Pictures of runs: the live view, figures, tables and the HTML report.

Everything here reads records. It knows neither torch, nor the engine, nor Optuna: a replayed file and a running engine
look the same from here. `import specdec_lab.view` loads no widget library and no plotly; they are loaded when used.
"""

from .forms import display_form
from .live import LiveRun, close_all, live_run
from .report import write_report
from .tables import render_table

__all__ = ["LiveRun", "close_all", "display_form", "live_run", "render_table", "write_report"]
