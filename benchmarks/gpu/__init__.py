"""The parts of gpu_check.py.

    plan.py        the parts in order of value, and their limits
    conducting.py  runs each part in a process of its own; writes and prints what it found
    guard.py       ends what a killed run has left
    part.py        the side of a part's process: what it notes is in a file at once
    bench.py       sizes, models, steps, timing
    counting.py    what a step asks of the device
    floors.py      the machine, and the least that things cost on it
    checks.py      the tests, CPU against GPU, graph against eager
    recorder.py    a plugin of pytest that writes each test's outcome at once
    ours.py        minilora's steps, evaluation and generation
    pytorch.py     the same steps in PyTorch, transformers and peft

Until a part's process begins, nothing but Python's own library is imported.
"""
