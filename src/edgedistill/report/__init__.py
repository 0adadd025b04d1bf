"""RUN/report.html: one self-contained page about one run. Reads files, writes one file, computes nothing that lasts."""

from edgedistill.report.report import write_report

__all__ = ["write_report"]
