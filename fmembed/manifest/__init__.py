"""The files by which a config runs on a cluster, written of its section `cluster`; and checked.

A config goes with them, in a ConfigMap; secrets never do.
"""
