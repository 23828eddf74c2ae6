"""Which layers a configuration means, by PEFT's rules.

patterns    regular expressions whose time is bounded
endings     many names looked up at once among the endings of one
rules       PEFT's rules for one name: targets, patterns, layers
base        a model's modules, from memory or from a checkpoint's header
selection   the modules that each field of a configuration means
plan        all of them together, and the tensors of the adapter that follow
"""
