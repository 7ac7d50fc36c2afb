"""One HTML page of a sweep, its samples and what the model does with them, for people who look rather than read."""

from .report import Report, report
from .views import Effects, SampleView, sample_view


__all__ = ["Effects", "Report", "SampleView", "report", "sample_view"]
