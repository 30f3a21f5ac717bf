"""One module per engine, each imported only in the worker process that runs it.

A module has `open_entrant(case, batch, threads, **options) -> Entrant`, which raises `CannotRunError` where the engine
is not to be had. Every engine is set up the way its best users would; the docstrings say how, the report repeats it.
"""
