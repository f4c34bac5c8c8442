"""What stops a drop, and what must be left then: seen from outside, by the commands and `load`.

    zygote    a process that has imported everything and forks a run in a few milliseconds
    faults    what befalls a run from inside its process: a kill, a failing call, a pause
    loading   `load` as a command: prints every parameter's dtype, shape and SHA-256
    harness   models and runs: convert, drop, cache, load; and whether a model can be completed
    cuts      checkpoints cut into shards in every way that matters
    tracer    the same faults by strace, below Python
    disk      small file systems: full, or copied while they are in use
    pairs     two commands at once on one model, and what may be left then
    sweep     a fault at every call in turn, and its table

Nothing here names a module, class or function of the package beside `load`, `convert_checkpoint`
and the base of their errors; of the files, only what the README draws.

    pytest tests/robustness -n 2                   some points of everything
    pytest tests/robustness -n 2 -m long           all of them: hours
    python -m tests.robustness.sweep --help        a table of models lost and completed
"""
