"""The update: gradient buckets, the ZeRO-1 optimizer, clipping, learning-rate schedules."""
