"""What happens before step 0: loading, checking, opening a run."""
