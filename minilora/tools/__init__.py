"""Tools on files: they read, change and write models and adapters one tensor at a time, and build
no model.

merging     base + adapters -> checkpoint: summed in float64, rounded once
comparing   two checkpoints, tensor by tensor
auditing    is a merged checkpoint right? From explaining, layers and hypotheses
factoring   an adapter from two checkpoints; an adapter of another rank
plain       an adapter of a changed base as plain LoRA
combining   several adapters summed into one
converting  another dtype; mlx-lm's adapters from and to PEFT's
inspecting  what an adapter or a checkpoint contains
rewriting   a checkpoint written anew, tensor by tensor
"""
