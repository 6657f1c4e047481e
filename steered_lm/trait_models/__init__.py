"""Models that are trained to show a trait: experiments, training data, fine-tuning backends (one file each), finished steps. Light at import."""
