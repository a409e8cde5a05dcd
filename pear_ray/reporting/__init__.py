"""The report: plots and one self-contained HTML file."""
