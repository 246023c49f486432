"""Policy and teacher: loading, packing, attention, sharding."""
