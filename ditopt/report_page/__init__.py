"""The report people look at: a profile and its plan as one HTML page that needs no network."""

from ditopt.report_page.build import WrittenReport, write_report

__all__ = ["WrittenReport", "write_report"]
