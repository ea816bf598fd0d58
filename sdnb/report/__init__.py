"""What a page says in words and tables: this run's numbers beside the published ones."""

from sdnb.report.across import across_csv, across_table
from sdnb.report.findings import findings
from sdnb.report.tables import Html, Markdown, numbers_table, provenance_table

__all__ = ["Html", "Markdown", "across_csv", "across_table", "findings", "numbers_table", "provenance_table"]
