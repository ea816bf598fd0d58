"""What a page says in words and tables: this run's numbers beside the published ones."""

from sdnb.report.findings import findings
from sdnb.report.tables import Markdown, numbers_table, provenance_table

__all__ = ["Markdown", "findings", "numbers_table", "provenance_table"]
