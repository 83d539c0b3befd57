"""report.json and report.html: what an export holds, what was kept, and how that was checked.

data    the numbers, read from checkpoint, goldens and stages
page    the page: one self-contained file, no script
tables  cards and tables
method  drawings of what the quantizer recorded: dependency, block errors, ranges
tried   drawings of a comparison's rows
svg     axes, marks and legends
"""

from qvlm_export.report.data import (
    ComponentRow,
    Report,
    component_rows,
    divergence,
    read_comparison,
)
from qvlm_export.report.page import to_html

__all__ = [
    "ComponentRow",
    "Report",
    "component_rows",
    "divergence",
    "read_comparison",
    "to_html",
]
