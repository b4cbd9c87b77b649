"""The self-contained HTML report and `report.json`."""
