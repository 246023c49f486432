"""Speed and memory of the fused head against the bare GEMMs. Run: pytest bench/."""
