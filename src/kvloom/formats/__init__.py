"""Page formats: one file per way of storing."""
