"""The frozen factors: which weights are factored, which process does it, and where the factors are kept."""
