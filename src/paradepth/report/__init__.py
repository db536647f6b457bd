"""HTML reports from run directories: one run, several runs side by side, or a study.

Reads files only; imports neither torch nor the rest of the package. Pages are self-contained: one file, no script,
nothing fetched.
"""

from __future__ import annotations

from paradepth.report.page import write_report
from paradepth.report.study import write_study_report

__all__ = ["write_report", "write_study_report"]
