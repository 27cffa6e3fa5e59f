"""Experiments with algorithms: many workers in one process, without a network, with the code of the node.

What a node does with tensors (:mod:`prime_async.work`), and how it counts its work (``machines/account.py``), is used
as it is. What the network decides, how long an exchange takes, is a number here: the inner steps between a boundary and
the moment at which the means of its round are applied.
"""

from prime_async.lab.team import DataParallel, LabError, Team

__all__ = ["DataParallel", "LabError", "Team"]
