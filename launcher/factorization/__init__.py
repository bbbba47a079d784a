"""The frozen factors: which weights have some, which process makes them, where they are kept."""
