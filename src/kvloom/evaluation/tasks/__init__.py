"""Tasks that a model answers through a cache; each family is one file, found by discovery.

task = tasks.parse("needle(length=2048, depth=0.5, examples=8, seed=0)")
"""

from kvloom.evaluation.tasks.base import Example, Task
from kvloom.evaluation.tasks.names import known, parse

__all__ = ["Example", "Task", "known", "parse"]
