"""Reports: pages of what was trained, each one HTML file that needs nothing else."""

from tessera.reports.run_report import write_report

__all__ = ["write_report"]
