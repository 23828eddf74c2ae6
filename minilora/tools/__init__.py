"""Models and adapters as files: read a tensor, change it, write it. No model is built; memory holds one tensor.

adapters    an adapter's folder: its layers by path, the factors of one at a time; where they stand in a base's files
folders     a folder that appears whole or not at all, and goes on where a killed run stopped; a checkpoint rewritten
merging     base + adapters -> checkpoint: summed in float64, rounded once
comparing   two checkpoints, tensor by tensor
factoring   an adapter from two checkpoints; an adapter of another rank
combining   several adapters added up to one
converting  another dtype; mlx-lm's adapters, there and back
"""
