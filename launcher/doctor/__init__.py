"""What this machine is and can do: a report of its environment, and a cluster file measured on it.

`environment.py` looks; `rank.py`, `kernels.py` and `links.py` measure in processes of their own that `measure.py`
starts; `fit.py` and `cluster_file.py` turn the result into the figures of `launcher.job.cluster`. No run imports this.
"""
