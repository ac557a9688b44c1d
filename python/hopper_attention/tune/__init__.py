"""Timing the candidate configs of a kernel, on the card at hand, to choose config.h's rows again.

`rules` asks the headers which configs can be built, `candidates` picks those to try, `build`
compiles each into a library of its own, `worker` times one in a process of its own, `run` lets them
take turns, `report` makes the table and the file.
"""
