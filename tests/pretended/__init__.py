"""A GPU that is not there: CPU tensors that say they lie on `cuda:0`, in processes that tests start.

`launch` starts such a process; `tensors`, `waits` and `cuda` are the pretence; the other modules are what is done in it.
"""
