"""From records to tables, plots and the page; bench/report.py is the command."""
