"""This room holds what happens before step 0: loading, checking and opening a run."""
