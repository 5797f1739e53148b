"""Ops with a form of their own for CPUs.

Callers on every platform import them from here: each chooses its form when a
program is lowered.
"""
