"""Many quantizations of one model, in memory, held against its float answers."""
