"""Tools for people: the demo, benchmarks, the trace simulator and calibration. Only the command line imports them.

May import: everything public.
Never contains: anything that the rest of the package needs.
"""
