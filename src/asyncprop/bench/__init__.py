"""Bench: what this machine does. Figures are ratios within one run, interleaved, medians of several rounds."""
