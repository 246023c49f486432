"""The method: advantages, coefficients, schedules and metrics, as pure functions."""
