"""The run report: build_report(run_dir) writes HTML, Markdown and JSON; format_table(results) is the terminal's closing table."""

from m2mkd_ds.report.build import build_report
from m2mkd_ds.report.table import format_table

__all__ = ["build_report", "format_table"]
