"""Rollouts: problems, sampling, rewards and their verification."""
