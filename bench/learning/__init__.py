"""Trains small next-token models with exact, sketched and filtered gradients of the head."""
