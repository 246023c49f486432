"""What is measured: each module gives records of results_file.py."""
