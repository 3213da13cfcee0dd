"""What lies on disk, read without running any of it: the layouts of DeepSpeed ZeRO and torch DCP.

One description serves them all: a named tensor, and the pieces of files that hold its values. It is read by a run that
resumes and by the tools that convert; who writes, writes with its engine or in `tools/formats`.
"""
