"""One HTML file that shows a run, or a comparison of runs: all in it, nothing fetched."""

from .comparison import report_comparison
from .run import report_run

__all__ = ["report_comparison", "report_run"]
