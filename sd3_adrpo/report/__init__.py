"""The page of one or several runs: one HTML file that needs nothing else. `eval/report.py` is its command."""
