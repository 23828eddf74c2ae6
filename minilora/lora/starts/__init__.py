"""Where training starts: first values of A and B that are not plain LoRA's.

values       A and B by the name of the start, for one weight
statistics   what some starts measure on data: covariances and gradients
layers       the starts of a model's layers, and their bases
residual     adapters that were trained over a changed base, and the way back
recomputed   the first values of such an adapter, computed once more from W
"""
