"""What a run needs, predicted from the shapes of its models: memory and time, term by term."""
